# GGUF files of the published models for llama.cpp, each checked against transformers.


if EXPERIMENT.serving:

    rule convert_gguf:
        input:
            model=rules.publish_model.output.model,
        output:
            gguf=f"{RESULTS}/gguf/{{system}}/{{system}}-{{format}}.gguf",
        log:
            f"{RESULTS}/logs/convert_gguf/{{system}}-{{format}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/convert_gguf/{{system}}-{{format}}.tsv"
        wildcard_constraints:
            system=one_of(EXPERIMENT.served),
            format=one_of(EXPERIMENT.serving.gguf),
        retries: 2
        conda:
            "../../environment.yml"
        resources:
            **planned("merging", runtime=120),
        params:
            *code_of("convert_gguf"),
            label=lambda wildcards: SYSTEMS[wildcards.system].label,
            converter=EXPERIMENT.serving.converter,
        message:
            "write {wildcards.system} as a GGUF file ({wildcards.format})"
        script:
            "../scripts/convert_gguf.py"

    rule check_gguf:
        input:
            gguf=rules.convert_gguf.output.gguf,
            model=rules.publish_model.output.model,
            cards=lambda wildcards: files_of_stages(wildcards, "training", TRAINED),
            data=training_data,
        output:
            record=f"{RESULTS}/serving/{{system}}-{{format}}.json",
        log:
            f"{RESULTS}/logs/check_gguf/{{system}}-{{format}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/check_gguf/{{system}}-{{format}}.tsv"
        wildcard_constraints:
            system=one_of(EXPERIMENT.served),
            format=one_of(EXPERIMENT.serving.gguf),
        retries: 2
        conda:
            "../../environment.yml"
        threads: 4  # of a CPU, also where models run on a GPU
        resources:
            **planned("merging", runtime=240),
        params:
            *code_of("check_gguf"),
        message:
            "compare llama.cpp with transformers for {wildcards.system} ({wildcards.format})"
        script:
            "../scripts/check_gguf.py"

    rule report_serving:
        input:
            records=expand(rules.check_gguf.output.record, system=EXPERIMENT.served, format=EXPERIMENT.serving.gguf),
        output:
            csv=f"{RESULTS}/tables/serving.csv",
            markdown=f"{RESULTS}/tables/serving.md",
            html=report(
                f"{RESULTS}/tables/serving.html",
                caption="../report/table_serving.rst",
                category="Serving",
                labels={"content": "GGUF files in llama.cpp"},
            ),
        log:
            f"{RESULTS}/logs/report_serving.log",
        benchmark:
            f"{RESULTS}/benchmarks/report_serving.tsv"
        conda:
            "../../environment.yml"
        resources:
            **REPORTING,
        params:
            *code_of("report_serving"),
            labels=labels_of(EXPERIMENT.served),
        message:
            "table of the serving check"
        script:
            "../scripts/report_serving.py"


rule gguf:
    input:
        served_files,
    localrule: True
