"""A configuration becomes an experiment with everything filled in; values that do not fit together are refused."""

import pytest
import yaml

from longqlora.config.experiment import load_experiment
from longqlora.config.validation import ConfigError

CONFIGS = [
    "config", "demo-pretraining", "llama2-7b-8k", "llama2-7b-8k-redpajama", "llama2-7b-12k", "llama2-13b-8k", "vicuna-13b-8k",
    "vicuna-13b-8k-mixture", "local-files", "measure", "tinystories-2k",
]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_valid(root, name):
    assert load_experiment(yaml.safe_load((root / f"config/{name}.yaml").read_text())).systems


def test_the_mixture_tolerates_the_empty_questions_of_evol_instruct(root):
    experiment = load_experiment(yaml.safe_load((root / "config/vicuna-13b-8k-mixture.yaml").read_text()))
    assert 240 / 143_000 < experiment.max_malformed_share < 0.01


def test_the_papers_run_has_the_published_hyper_parameters(root):
    published_runs = [
        ("llama2-7b-8k", 2e-4, {"steps": 1000}),
        ("llama2-7b-8k-redpajama", 2e-4, {"steps": 1000}),
        ("vicuna-13b-8k", 1e-4, {"epochs": 1}),
    ]
    for name, learning_rate, length in published_runs:
        experiment = load_experiment(yaml.safe_load((root / f"config/{name}.yaml").read_text()))
        published = {
            "rank": 64, "alpha": 16, "dropout": 0.05, "batch_size": 1, "gradient_accumulation": 16, "warmup_steps": 20,
            "max_grad_norm": 0.3, "weight_decay": 0, "optimizer": "paged_adamw_32bit", "group_ratio": 0.25,
            "target_modules": "all-linear", "learning_rate": learning_rate, **length,
        }  # fmt: skip
        assert published.items() <= experiment.systems["longqlora"].training.model_dump().items()


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("evaluation", {"stride": 200}, r"^evaluation\.stride: 200 exceeds the shortest of evaluation\.lengths, 128$"),
        ("evaluation", {"protocol": "longlora"}, r"^evaluation\.stride: 256 exceeds the shortest of evaluation\.lengths, 128$"),
        (
            "evaluation",
            {"protocol": "longqlora", "stride": 64},
            r"^evaluation\.stride: in the protocol longqlora the stride is",
        ),
        ("evaluation", {"harness": {}}, r"^evaluation\.harness: names no task; give tasks or long_tasks$"),
        (
            "evaluation",
            {"harness": {"tasks": ["niah_single_1"], "long_tasks": ["niah_single_1"]}},
            r"^evaluation\.harness\.long_tasks: 'niah_single_1' is in tasks, too; keep one of them$",
        ),
        (
            "evaluation",
            {"harness": {"tasks": ["arc_easy"], "lengths": [128]}},
            r"^evaluation\.harness\.lengths: has no effect without long_tasks$",
        ),
        (
            "evaluation",
            {"harness": {"tasks": ["../arc"]}},
            r"^evaluation\.harness\.tasks\[0\]: '\.\./arc' is not a legal name: a name has letters, digits",
        ),
        (
            "evaluation",
            {"harness": {"tasks": ["niah-128"], "long_tasks": ["niah"], "lengths": [128]}},
            r"^evaluation\.harness\.tasks: 'niah-128' is the name of the results of one of the long_tasks, too$",
        ),
        (
            "evaluation",
            {"key_tokens": {"system": "nobody", "short_context": 64}},
            r"^evaluation\.key_tokens\.system: 'nobody' is not a system \(legal: base, interpolated, ",
        ),
        (
            "evaluation",
            {"key_tokens": {"system": "dynamic", "short_context": 512}},
            r"^evaluation\.key_tokens\.short_context: 512 is not below the longest of evaluation\.lengths, 512$",
        ),
        (
            "evaluation",
            {"key_tokens": {"system": "dynamic", "short_context": 64}, "protocol": "longqlora"},
            r"^evaluation\.key_tokens: needs evaluation\.protocol: exact, .* found longqlora$",
        ),
        ("systems", {"x": {"weights_of": "nobody"}}, r"^systems\.x\.weights_of: 'nobody' is not a trained system"),
        (
            "systems",
            {"x": {"weights_of": "base"}},
            r"^systems\.x\.weights_of: 'base' is not a trained system \(legal: ",
        ),
        (
            "systems",
            {"x": {"weights_of": "longqlora", "target_context": 256, "training": {}}},
            r"^systems\.x\.training: comes from 'longqlora', whose weights this system has; leave it out$",
        ),
        (
            "systems",
            {"x": {"weights_of": "longqlora", "rope_scaling": "yarn"}},
            r"^systems\.x\.rope_scaling: comes from 'longqlora'",
        ),
        (
            "systems",
            {"x": {"training": {}}},
            r"^systems\.x\.target_context: missing; a trained system needs the context length",
        ),
        (
            "systems",
            {"x": {"label": "chat model"}},
            r"^systems: every label must be different, but 'chat model' occurs 2 times$",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "training": {"epochs": 1.0, "steps": 5}}},
            r"^systems\.x\.training: has both steps \(5\) and epochs \(1\); keep one of them$",
        ),
        (
            "systems",
            {"x": {"model": "owner/name", "target_context": 256, "training": {}}},
            r"^systems\.x\.model: owner/name is evaluated as it is; only the base_model is trained$",
        ),
        ("systems", {"x": {"rope_factor": 2.0}}, r"^systems\.x\.rope_factor: has no effect without target_context; give both"),
        (
            "systems",
            {"x": {"target_context": 256, "rope_scaling": "theta"}},
            r"^systems\.x\.rope_theta: missing; rope_scaling: theta needs it",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "rope_theta": 2000.0}},
            r"^systems\.x\.rope_theta: works only with rope_scaling: theta, found rope_scaling: linear",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "rope_scaling": "theta", "rope_theta": 2000.0, "rope_factor": 2.0}},
            r"^systems\.x\.rope_factor: has no effect with rope_scaling: theta",
        ),
        ("systems", {"x": {"rope_scaling": "yarn"}}, r"^systems\.x\.rope_scaling: has no effect without target_context"),
        ("systems", {"x": {"rope_scaling": "best"}}, r"^systems\.x\.rope_scaling: has no effect without target_context"),
        (
            "systems",
            {"x": {"target_context": 256, "rope_scaling": "best", "rope_factor": 2.0}},
            r"^systems\.x\.rope_factor: has no effect with rope_scaling: best, whose factor follows from target_context$",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "rope_scaling": "best", "model": "owner/name"}},
            r"^systems\.x\.rope_scaling: best works only for the base_model, found model: owner/name$",
        ),
        (
            "systems",
            {"x": {"tokenizer": "a/b"}},
            r"^systems\.x\.tokenizer: has no effect without model; the tokenizer of the base model is",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "table_row": False}},
            r"^systems\.x\.table_row: false needs 'training': of a system that is not trained, nothing else would be made$",
        ),
        (
            "systems",
            {"x": {"weights_of": "longqlora", "merged": False, "table_row": False}},
            r"^systems\.x\.table_row: false needs 'training'",
        ),
        ("systems", {"x": {"merged": False}}, r"^systems\.x\.merged: false needs an adapter"),
        ("systems", {"x": {"weights_of": "longlora-full", "merged": False}}, r"^systems\.x\.merged: false needs an adapter"),
        (
            "evaluation",
            {"datasets": {name: {"label": "x", "paths": ["results/x"]} for name in "ab"}},
            r"every label must be .*'x'",
        ),
        ("training", {"epochs": 2.0}, r"^training: has both steps \(40\) and epochs \(2\); keep one of them$"),
        ("training", {"pack_records": True}, r"training\.pack_records: works only with data: sft, found data: corpus"),
        (
            "systems",
            {"x": {"target_context": 256, "training": {"data": "sft", "isolate_documents": True}}},
            r"^systems\.x\.training\.isolate_documents: works only with data: corpus, found data: sft$",
        ),
        (
            "training",
            {"sequence_parallel": 2, "num_processes": 3},
            r"training\.sequence_parallel: 2 does not divide the number of processes, num_processes · num_nodes = 3",
        ),
        (
            "training",
            {"sequence_parallel": 2, "num_nodes": 2, "isolate_documents": True},
            r"training\.sequence_parallel: 2 does not work with isolate_documents: processes share windows of one document",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "rope_scaling": "dynamic", "training": {"sequence_parallel": 2, "num_processes": 2}}},
            r"^systems\.x\.rope_scaling: dynamic depends on the length of the window",
        ),
        ("training", {"offload": True}, r"training\.offload: needs DeepSpeed, zero_stage: 2 or 3"),
        (
            "training",
            {"attention": "full", "full_attention_share": 0.2},
            r"full_attention_share: has no effect with attention: full",
        ),
        (
            "training",
            {"steps": 40, "full_attention_share": 0.01},
            r"training\.full_attention_share: 0\.01 of 40 steps is less than one step",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "training": {"pose_window": 256, "attention": "full"}}},
            r"^systems\.x\.training\.pose_window: 256 is not below target_context, 256; the positions of a window could not",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "training": {"pose_window": 64}}},
            r"^systems\.x\.training\.pose_window: needs attention: full, found shifted_sparse",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "training": {"pose_window": 64, "attention": "full", "isolate_documents": True}}},
            r"^systems\.x\.training\.pose_window: cannot be combined with isolate_documents: true",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "training": {"pose_window": 64, "attention": "full", "data": "sft"}}},
            r"^systems\.x\.training\.pose_window: works only with data: corpus, found data: sft",
        ),
        (
            "systems",
            {"x": {"target_context": 256, "training": {"method": "full", "dora": True}}},
            r"^systems\.x\.training\.dora: needs an adapter, method qlora or lora, found method: full$",
        ),
        ("training", {"method": "full", "loraplus_ratio": 4}, r"^training\.loraplus_ratio: needs an adapter"),
        (
            "sft",
            {"max_tokens": 512},
            r"^systems\.chat\.training\.pack_records: sft\.max_tokens is 512, more than the window of 256",
        ),
        ("retrieval", {"lengths": [128, 100]}, r"^retrieval\.lengths: 100 is not in evaluation\.lengths \(128, 256, 512\)$"),
        ("retrieval", {"filler": "poems"}, r"^retrieval\.filler: 'poems' is not a name of .* \(legal: prose, code\)$"),
        ("corpus", {"min_tokens": 5000}, r"^corpus\.min_tokens: 5000 exceeds corpus\.max_tokens, 1024$"),
        ("sft", {"held_out": 1213}, r"^sft\.held_out: 1213 of sft\.num_records 1213 leaves nothing to train on$"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(demo, section, values, message):
    demo[section] |= values
    with pytest.raises(ConfigError, match=message):
        load_experiment(demo)


def test_reference_figures_belong_to_an_evaluation_set(demo):
    demo["published"] = [{"label": "x", "dataset": "y", "perplexity": {"32": 1.0, 64: 2}}]
    with pytest.raises(
        ConfigError, match=r"^published: dataset 'y' is not a label of evaluation\.datasets \(legal: code .*, prose"
    ):
        load_experiment(demo)
    demo["published"][0]["dataset"] = demo["evaluation"]["datasets"]["code"]["label"]
    assert load_experiment(demo).published[0].perplexity == {32: 1.0, 64: 2.0}


def test_a_trained_system_need_not_be_a_row_of_the_tables(demo):
    demo["systems"]["chat"]["table_row"] = False
    demo["systems"]["longqlora"]["table_row"] = False
    demo["ablations"] = {"rank": {"system": "longqlora", "grid": {"rank": [8]}}}
    experiment = load_experiment(demo)
    assert experiment.listed == list(demo["systems"])
    assert experiment.rows == [name for name in demo["systems"] if name not in ("chat", "longqlora")]
    assert set(experiment.systems) - set(experiment.listed) == set(experiment.ablations["rank"].rows)


def test_the_system_that_chooses_the_key_tokens_need_not_be_a_row_but_has_the_tokenizer_of_the_base(demo):
    demo["systems"]["strong"] = {"model": "owner/name", "table_row": False}
    demo["evaluation"]["key_tokens"] = {"system": "strong", "short_context": 64}
    message = (
        r"^evaluation\.key_tokens\.system: 'strong' has the tokenizer owner/name instead of the base model's "
        r"\(legal: base, .*\); if the two are equal, set its tokenizer to demo/model$"
    )
    with pytest.raises(ConfigError, match=message):
        load_experiment(demo)
    demo["systems"]["strong"]["tokenizer"] = "demo/model"
    experiment = load_experiment(demo)
    assert "strong" in experiment.systems
    assert "strong" not in experiment.rows


def test_a_table_needs_a_row(demo):
    demo["systems"] = {"chat": demo["systems"]["chat"] | {"table_row": False}}
    with pytest.raises(ConfigError, match=r"^systems: none is a row of the tables; remove table_row: false from at least one$"):
        load_experiment(demo)


def test_training_data_must_be_configured(demo):
    del demo["sft"], demo["systems"]["chat"]
    load_experiment(demo)
    demo["systems"]["longqlora"]["training"]["data"] = "sft"
    with pytest.raises(ConfigError, match=r"systems\.longqlora\.training\.data: 'sft' is not configured"):
        load_experiment(demo)


def test_shares_of_an_instruction_set_must_add_up(demo):
    demo["sft"]["sources"][0]["share"] = 0.5
    with pytest.raises(ConfigError, match=r"sft\.sources: the shares add up to 1\.07"):
        load_experiment(demo)
    demo["sft"]["sources"][1] |= {"share": 0.19, "name": demo["sft"]["sources"][0]["name"]}
    with pytest.raises(ConfigError, match=r"^sft\.sources: every name must be different, but .* occurs 2 times"):
        load_experiment(demo)


def corpus_with(names, shares=None, **section):
    sources = [{"name": name, "paths": [f"results/{n}.jsonl"]} for n, name in enumerate(names)]
    for source, share in zip(sources, shares or [], strict=False):
        if share is not None:
            source["share"] = share
    return {"sources": sources, **section}


@pytest.mark.parametrize(
    ("corpus", "problem"),
    [
        (corpus_with("ab"), None),
        (corpus_with("aa"), None),
        (corpus_with("ab", [0.3, 0.7]), None),
        (corpus_with("a") | {"shares": {"C4": 0.25, "Book": 0.75}}, None),
        (corpus_with("abc", [0.1, 0.2, 0.7]), None),
        (corpus_with("ab", [0.3, 0.6]), r"^corpus\.sources: the shares add up to 0\.9, they must add up to 1$"),
        (corpus_with("ab") | {"shares": {"C4": 0.5, "Book": 0.6}}, r"^corpus\.shares: the shares add up to 1\.1"),
        (corpus_with("ab", [0.3, 0.7]) | {"shares": {"C4": 1}}, r"^corpus\.shares: give shares either here or to the sources"),
        (corpus_with("abc", [0.3, None, 0.7]), r"^corpus\.sources: b has no share but a, c has; give one to all or to none$"),
        (corpus_with("aa", [0.3, 0.7]), r"every source with a share needs a name of its own, found a, a"),
    ],
)
def test_shares_of_a_corpus_are_checked(demo, corpus, problem):
    demo["corpus"] |= corpus
    if problem is None:
        load_experiment(demo)
    else:
        with pytest.raises(ConfigError, match=problem):
            load_experiment(demo)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "base_model",
            {"path": "demo/model"},
            r"^base_model\.path: demo/model is not what the section pretraining makes; write results/demo-pretraining/pretra",
        ),
        (
            "base_model",
            {"tokenizer": "demo/model"},
            r"^base_model\.tokenizer: demo/model is not what the section pretraining makes; leave the key out$",
        ),
        ("pretraining", {"tokens_per_step": 200}, r"^pretraining\.tokens_per_step: 200 is not a multiple of .*context, 128$"),
        (
            "pretraining",
            {"paths": ["demo/texts/prose.jsonl.xz"]},
            r"^pretraining\.paths: demo/texts/prose\.jsonl\.xz is also in evaluation\.datasets\.prose, and would be trained",
        ),
        ("pretraining", {"context": 16}, r"^pretraining\.context: 16 is below the minimum of 32 "),
    ],
)
def test_a_pretraining_that_cannot_run_is_refused(demo_pretraining, section, values, message):
    demo_pretraining[section] |= values
    with pytest.raises(ConfigError, match=message):
        load_experiment(demo_pretraining)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 126, r"hidden_size: 126 is not a multiple of 2 \* num_attention_heads, 8$"),
        ("hidden_size", 132, r"hidden_size: 132 is not a multiple of 2 \* num_attention_heads, 8$"),  # heads of odd width
        ("num_key_value_heads", 3, r"num_attention_heads: 4 is not a multiple of num_key_value_heads, 3$"),
    ],
)
def test_the_shape_of_a_new_model_is_checked(demo_pretraining, key, value, message):
    demo_pretraining["pretraining"]["architecture"][key] = value
    with pytest.raises(ConfigError, match=rf"^pretraining\.architecture\.{message}"):
        load_experiment(demo_pretraining)


def test_a_pretraining_of_one_window_a_step_is_legal(demo_pretraining):
    demo_pretraining["pretraining"] |= {"tokens_per_step": 128}
    demo_pretraining["base_model"]["path"] += "/"
    assert load_experiment(demo_pretraining).pretraining.tokens_per_step == 128


def test_wildcards_in_the_texts_of_a_pretraining_become_files_and_addresses_stay(tmp_path, demo_pretraining):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).touch()
    remote = "hf://datasets/owner/name/*.jsonl"
    demo_pretraining["pretraining"]["paths"] = [f"{tmp_path}/*.txt", remote]
    assert load_experiment(demo_pretraining).pretraining.paths == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", remote]


def test_wildcards_become_files_and_addresses_stay(tmp_path, demo):
    for name in ("b.jsonl", "a.jsonl.gz"):
        (tmp_path / name).touch()
    remote = "hf://datasets/owner/name/*.jsonl"
    demo["corpus"]["sources"] = [{"paths": [f"{tmp_path}/*.jsonl*", remote]}]
    source = load_experiment(demo).corpus.sources[0]
    assert source.paths == [f"{tmp_path}/a.jsonl.gz", f"{tmp_path}/b.jsonl", remote]
    assert source.name == f"{tmp_path}/*.jsonl*"


def test_a_length_beyond_every_context_is_evaluated_to_show_where_a_model_breaks(demo):
    demo["evaluation"]["lengths"] = [64, 1024]
    del demo["retrieval"]["lengths"]
    assert load_experiment(demo).evaluation.lengths == [64, 1024]


def test_retrieval_is_measured_at_the_lengths_of_perplexity_in_the_first_set(demo):
    del demo["retrieval"]
    experiment = load_experiment(demo)
    assert (experiment.retrieval_lengths, experiment.filler) == (demo["evaluation"]["lengths"], "prose")
    assert experiment.retrieval.tasks == ["passkey", "single_needle", "multi_key", "multi_value"]
    demo["retrieval"] = {"lengths": [128], "filler": "code", "tasks": []}
    experiment = load_experiment(demo)
    assert (experiment.retrieval_lengths, experiment.filler, experiment.retrieval.tasks) == ([128], "code", [])


def test_each_task_of_the_harness_is_measured_once_and_long_ones_at_each_length(demo):
    demo["systems"]["sparse"] = {"evaluation_attention": "shifted_sparse"}
    demo["evaluation"]["harness"] = {"tasks": ["arc_easy"], "long_tasks": ["ruler"], "lengths": [4096, 8192]}
    experiment = load_experiment(demo)
    assert experiment.harness_cells == {
        "arc_easy": ("arc_easy", None), "ruler-4096": ("ruler", 4096), "ruler-8192": ("ruler", 8192),
    }  # fmt: skip
    assert experiment.harness_rows == [name for name in experiment.rows if name != "sparse"]
    del demo["evaluation"]["harness"]["lengths"]
    lengths = demo["evaluation"]["lengths"]
    assert list(load_experiment(demo).harness_cells) == ["arc_easy", *(f"ruler-{length}" for length in lengths)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"systems": ["base"]}, r"^serving\.systems: 'base' is not a trained system \(legal: longlora-lora, .*\)$"),
        ({"gguf": ["q4_k"]}, r"^serving\.gguf\[0\]: .*f16.*q8_0"),
        ({"gguf": []}, r"^serving\.gguf: "),
    ],
)
def test_only_trained_systems_are_served_in_known_formats(demo, values, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(demo | {"serving": values})


def test_without_a_trained_system_there_is_nothing_to_serve(demo):
    demo["systems"] = {"base": {}}
    with pytest.raises(
        ConfigError, match=r"^serving: no system is trained, so there is no model to serve; remove the section$"
    ):
        load_experiment(demo | {"serving": {}})
