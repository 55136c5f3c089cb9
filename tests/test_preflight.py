"""An experiment is checked against the files and models of this machine before any job starts."""

import json

import numpy
import pytest
from safetensors.numpy import save_file

from longqlora.config.experiment import load_experiment
from longqlora.config.validation import ConfigError
from longqlora.preflight import check_inputs


def check(config: dict):
    return load_experiment(config, check_inputs)


@pytest.fixture
def elsewhere(demo, root, tmp_path, monkeypatch):
    """Another current folder, with the files of the demo."""
    (tmp_path / "demo").symlink_to(root / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def local_model(folder, **config) -> str:
    folder.mkdir(parents=True)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = {"model_type": "llama", "max_position_embeddings": 128, "vocab_size": 512, **shape, **config}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({"weight": numpy.zeros(4, "float32")}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 511}}, "added_tokens": []}))
    return str(folder)


def test_the_demo_has_what_it_needs(demo):
    assert check(demo).systems


# --- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/*.jsonl", r"^corpus\.sources\[0\]\.paths: no file matches nowhere/\*\.jsonl$"),
        ("nowhere.jsonl", r"^corpus\.sources\[0\]\.paths: no such file: nowhere\.jsonl$"),
        ("~/a.jsonl", r"^corpus\.sources\[0\]\.paths: ~/a\.jsonl: ~ is not expanded; write the full path$"),
        ("results/demo/shard.jsonl", r"^corpus\.sources\[0\]\.paths: no rule makes results/demo/shard\.jsonl"),
        (
            "a{b}.jsonl",
            r"^corpus\.sources\[0\]\.paths: a\{b\}\.jsonl: Snakemake reads braces in a path as a wildcard; rename or link",
        ),
        (
            "a::b.jsonl",
            r"^corpus\.sources\[0\]\.paths: a::b\.jsonl: fsspec reads '::' as a chain of addresses; rename or link the file$",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named(demo, path, message):
    demo["corpus"]["sources"] = [{"paths": [path]}]
    with pytest.raises(ConfigError, match=message):
        check(demo)


def test_a_file_with_braces_that_a_wildcard_finds_is_named(demo, tmp_path):
    (tmp_path / "a{1}.jsonl").touch()
    demo["corpus"]["sources"] = [{"paths": [f"{tmp_path}/*.jsonl"]}]
    with pytest.raises(ConfigError, match=r"a\{1\}\.jsonl: Snakemake reads braces"):
        check(demo)


def test_a_file_whose_name_has_brackets_is_itself(demo, tmp_path):
    for name in ("b1.jsonl", "b[1].jsonl"):
        (tmp_path / name).touch()
    demo["corpus"]["sources"] = [{"paths": [f"{tmp_path}/*.jsonl"]}, {"paths": [f"{tmp_path}/b[1].jsonl"]}]
    first, second = check(demo).corpus.sources
    assert first.paths == [f"{tmp_path}/b1.jsonl", f"{tmp_path}/b[1].jsonl"]
    assert second.paths == [f"{tmp_path}/b[1].jsonl"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["a.txt", "?.txt"],
            r"^evaluation\.datasets\.prose\.paths: a\.txt is listed, or matched by a wildcard, more than once",
        ),
        (["a.txt", "x.bin"], r"^evaluation\.datasets\.prose\.paths: x\.bin must be the only path of its evaluation set"),
        (["folder"], r"^evaluation\.datasets\.prose\.paths: folder is a folder, not a file$"),
        (["y.bin"], r"y\.json: does not describe .*y\.bin \(dtype uint16 or uint32, document_ends\); rename it"),
    ],
)
def test_files_that_make_no_evaluation_set_are_told(demo, elsewhere, paths, message):
    for name in ("a.txt", "x.bin", "y.bin"):
        (elsewhere / name).write_bytes(b"ab")
    (elsewhere / "y.json").write_text('{"title": "a book"}')
    (elsewhere / "folder").mkdir()
    demo["evaluation"]["datasets"]["prose"]["paths"] = paths
    with pytest.raises(ConfigError, match=message):
        check(demo)


@pytest.mark.parametrize("path", ["hf://datasets/a/b/*.jsonl", "simplecache::https://x.org/a.jsonl", "s3://bucket/a.parquet"])
def test_an_address_is_left_to_the_job_that_reads_it(demo, demo_pretraining, path):
    demo["corpus"]["sources"] = [{"paths": [path]}]
    demo["evaluation"]["datasets"]["prose"]["paths"] = [path]
    demo["sft"]["sources"] = [{"name": "x", "schema": "alpaca", "paths": [path], "share": 1.0}]
    check(demo)
    demo_pretraining["pretraining"]["paths"] = [path]
    check(demo_pretraining)


@pytest.mark.parametrize(
    "path", ["data/*", "data/a.jsonl*", "data/a.jsonl.idx", "s3://bucket/a.csv", "s3://bucket/*.jsonl.idx"]
)
@pytest.mark.parametrize("section", ["corpus", "sft", "evaluation", "pretraining"])
def test_a_file_of_an_unknown_format_is_named_before_any_job(demo, demo_pretraining, root, elsewhere, section, path):
    (elsewhere / "data").mkdir()
    for name in ("a.jsonl", "a.jsonl.idx"):
        (elsewhere / f"data/{name}").write_text("{}")
    if path == "data/*":
        (elsewhere / "data/README").touch()
    config = demo_pretraining if section == "pretraining" else demo
    key = {"corpus": "corpus.sources[0].paths", "sft": "sft.sources[0].paths", "evaluation": "evaluation.datasets.prose.paths"}
    if section in ("corpus", "sft"):
        config[section]["sources"][0]["paths"] = [path]
    else:
        (config["evaluation"]["datasets"]["prose"] if section == "evaluation" else config["pretraining"])["paths"] = [path]
    with pytest.raises(ConfigError) as caught:
        check(config)
    (line,) = [line for line in str(caught.value).splitlines() if "unknown format" in line]
    assert line.startswith(f"{key.get(section, 'pretraining.paths')}: ")
    assert ("README" if path == "data/*" else path.replace("jsonl*", "jsonl.idx")) in line
    assert ("(1 more such files)" in line) == (path == "data/*")
    assert line.endswith("a wildcard that ends in the format, such as *.jsonl, leaves other files out")


def test_plain_text_has_no_instructions(demo, elsewhere):
    (elsewhere / "a.txt").write_text("text")
    demo["sft"]["sources"][0]["paths"] = ["a.txt"]
    with pytest.raises(ConfigError, match=r"^sft\.sources\[0\]\.paths: a\.txt: plain text has no instruction records"):
        check(demo)


def test_a_folder_without_tasks_of_the_harness_is_told(demo, tmp_path):
    demo["evaluation"]["harness"] = {"tasks": ["mine"], "include_path": str(tmp_path / "tasks")}
    with pytest.raises(ConfigError, match=r"^evaluation\.harness\.include_path: no such folder: .*tasks$"):
        check(demo)
    (tmp_path / "tasks").mkdir()
    with pytest.raises(ConfigError, match=r"^evaluation\.harness\.include_path: .*tasks holds no task \(\*\.yaml\)$"):
        check(demo)
    (tmp_path / "tasks/mine.yaml").write_text("task: mine")
    assert check(demo).evaluation.harness


def test_missing_files_and_mistakes_in_values_are_told_together(demo):
    demo["corpus"]["sources"] = [{"paths": ["nowhere.jsonl"]}]
    demo["training"]["rnk"] = 3
    demo["sft"]["held_out"] = 5000
    with pytest.raises(ConfigError) as caught:
        check(demo)
    lines = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert lines == ["training", "sft.held_out", "corpus.sources[0].paths"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"x\.bin: the file is empty"), (b"123", r"x\.bin: 3 bytes are not a stream of uint16 token ids")],
)
def test_a_broken_file_of_tokens_is_a_line_of_the_message(tmp_path, demo, content, message):
    (tmp_path / "x.bin").write_bytes(content)
    demo["evaluation"]["datasets"]["prose"]["paths"] = [str(tmp_path / "x.bin")]
    with pytest.raises(ConfigError, match=rf"^evaluation\.datasets\.prose: .*{message}"):
        check(demo)


def test_token_ids_beyond_the_vocabulary_are_told(tmp_path, demo):
    numpy.array([1, 600], dtype="<u2").tofile(tmp_path / "x.bin")
    demo["base_model"]["path"] = local_model(tmp_path / "small")
    demo["evaluation"]["datasets"]["prose"]["paths"] = [str(tmp_path / "x.bin")]
    with pytest.raises(ConfigError, match=r"evaluation\.datasets\.prose: .*x\.bin holds token id 600, .* \(legal: 0 to 511\)"):
        check(demo)


def test_a_length_that_is_too_short_for_a_passage_and_its_repetition_is_told(demo):
    demo["evaluation"]["lengths"] = [32, 256]
    demo["retrieval"] = {"tasks": ["induction"], "lengths": [32]}
    with pytest.raises(ConfigError, match=r"^retrieval\.lengths: 32 is too short for the task induction, .* at least 56$"):
        check(demo)


# --- models ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "context"), [("base", 128), ("longqlora", 256)])
def test_a_system_that_cannot_read_the_longest_length_chooses_no_key_tokens(demo, system, context):
    demo["evaluation"]["key_tokens"] = {"system": system, "short_context": 64}
    with pytest.raises(
        ConfigError, match=rf"^evaluation\.key_tokens\.system: '{system}' has a context of {context} tokens, less"
    ):
        check(demo)


@pytest.mark.parametrize("system", ["longqlora-512", "dynamic"])  # a dynamic scaling adapts to any length
def test_a_system_that_reads_the_longest_length_chooses_key_tokens(demo, system):
    demo["evaluation"]["key_tokens"] = {"system": system, "short_context": 64}
    assert check(demo).evaluation.key_tokens.system == system


def test_a_model_or_tokenizer_that_is_not_there_is_told(tmp_path, demo):
    for key in ("path", "tokenizer"):
        config = demo | {"base_model": demo["base_model"] | {key: "../nowhere"}}
        with pytest.raises(ConfigError, match=rf"(?m)^base_model\.{key}: \.\./nowhere is neither a folder .* nor a hub id"):
            check(config)
    demo["systems"]["x"] = {"model": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"^systems\.x\.model: .* is neither a folder with a config\.json nor a hub id"):
        check(demo)


def test_a_model_that_no_rule_makes_is_told_unless_it_is_there(demo, elsewhere):
    demo["systems"]["again"] = {"model": "results/demo/models/longqlra"}
    message = r"^systems\.again\.model: no rule makes results/demo/models/longqlra; did you mean .*/models/longqlora\?$"
    with pytest.raises(ConfigError, match=message):
        check(demo)
    local_model(elsewhere / "results/demo/models/longqlra")  # of an earlier run
    check(demo)


def test_a_model_that_the_experiment_publishes_can_be_a_row(demo):
    demo["systems"]["again"] = {"model": "results/demo/models/longqlora"}
    assert check(demo).systems["again"].model == "results/demo/models/longqlora"


def test_a_folder_has_no_revision(demo):
    demo["base_model"]["path"] = "demo/model@v1"
    with pytest.raises(ConfigError, match=r"^base_model\.path: demo/model@v1 is neither a folder .* nor a hub id"):
        load_experiment(demo, check_inputs)


def test_a_misspelled_folder_is_not_taken_for_a_hub_id(demo, elsewhere):
    local_model(elsewhere / "models/tinystories")
    demo["base_model"]["path"] = "models/tinystorys"
    message = (
        r"^base_model\.path: models/tinystorys would be a hub id, but models is a folder .*; did you mean models/tinystories\?"
    )
    with pytest.raises(ConfigError, match=message):
        check(demo)
    demo["base_model"]["path"] = "owner/tinystories"
    check(demo)


def test_a_folder_without_weights_or_with_a_broken_configuration_is_told(tmp_path, demo):
    folder = tmp_path / "base"
    demo["base_model"]["path"] = local_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^base_model\.path: .*base: holds no weights"):
        check(demo)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^base_model\.path: .*config\.json: not valid JSON"):
        check(demo)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"^base_model\.path: .*config\.json: expected a JSON object, found list"):
        check(demo)
    (folder / "config.json").write_text('{"torch_dtype": "float7"}')
    with pytest.raises(ConfigError, match=r"^base_model\.path: .*config\.json: torch_dtype is 'float7', expected float32, "):
        check(demo)
    (folder / "config.json").write_text('{"hidden_size": "64"}')
    with pytest.raises(ConfigError, match=r"^base_model\.path: .*config\.json: hidden_size is '64', expected a whole number"):
        check(demo)
    for value, key in (
        ({"rope_scaling": {"type": "linear", "factor": "2.0"}}, r"rope_scaling\.factor is '2\.0'"),
        ({"rope_parameters": {"original_max_position_embeddings": "64"}}, r"rope_parameters\.original_\w+ is '64'"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
    ):
        (folder / "config.json").write_text(json.dumps(value))
        with pytest.raises(ConfigError, match=rf"^base_model\.path: .*config\.json: {key}, expected a number"):
            check(demo)
    local_model(tmp_path / "sharded")
    index = (tmp_path / "sharded/model.safetensors").rename(tmp_path / "sharded/model.safetensors.index.json")
    demo["base_model"]["path"] = str(tmp_path / "sharded")
    for content in (index.read_bytes(), b'{"weight_map": {"a": null}}'):
        index.write_bytes(content)
        with pytest.raises(ConfigError, match=r"^base_model\.path: .*index\.json: is not an index of weights"):
            check(demo)


def test_files_of_a_model_that_are_damaged_or_missing_are_told(tmp_path, demo):
    folder = tmp_path / "base"
    demo["base_model"]["path"] = local_model(folder)
    check(demo)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"^base_model\.path: .*model\.safetensors: has .* bytes, but its header describes"):
        check(demo)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(whole)
    with pytest.raises(ConfigError, match=r"^base_model\.path: .*json: names 2 files, but model-2\.safetensors is missing"):
        check(demo)
    (folder / "model-2.safetensors").write_bytes(whole[:50])
    with pytest.raises(ConfigError, match=r"^base_model\.path: .*model-2\.safetensors: has no header of safetensors"):
        check(demo)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {}}, r"\.tokenizer: .* has settings of a tokenizer, but no vocabulary: tokenizer\.json or"),
        ({"tokenizer.json": {}}, r": .*tokenizer\.json: is not a tokenizer \(JSON with a model and its vocab\)"),
        (
            {"tokenizer.json": {"model": {"vocab": {"a": 1024}}}},
            r": the tokenizer .*own has tokens up to id 1024, but demo/model has embeddings for 1024 \(legal: 0 to 1023\)",
        ),
        (
            {
                "tokenizer.json": {"model": {"vocab": {"a": 1}}},
                "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
            },
            r"\.tokenizer: .*own: the tokenizer has no end token; name one as eos_token in its tokenizer_config\.json",
        ),
    ],
)
def test_a_tokenizer_that_cannot_make_the_data_is_told(tmp_path, demo, files, message):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    demo["base_model"]["tokenizer"] = str(folder)
    with pytest.raises(ConfigError, match="^base_model" + message):
        check(demo)


def test_a_tokenizer_that_git_did_not_fetch_is_told(tmp_path, demo):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    demo["base_model"]["tokenizer"] = str(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^base_model\.tokenizer: .*tokenizer\.model: is a pointer of Git LFS: .* git lfs pull$"
    ):
        check(demo)


def test_a_base_that_is_stored_quantized_is_told_with_the_model_it_was_made_from(tmp_path, demo):
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base = local_model(tmp_path / "base", quantization_config=stored)
    demo["systems"]["published"] = {"model": base, "precision": "auto"}
    check(demo)  # only evaluated, as it is stored
    demo["systems"]["published"]["precision"] = "nf4"
    with pytest.raises(ConfigError, match=r"^systems\.published: .*cannot be evaluated in precision nf4; .* precision: auto$"):
        check(demo)
    (tmp_path / "base/README.md").write_text("---\nbase_model: owner/name\n---\n")
    demo["base_model"]["path"] = base
    del demo["systems"]["published"]
    message = r"systems\.longqlora: .*base: its weights are stored quantized \(bitsandbytes, 4 bit\); .* from, owner/name, unq"
    with pytest.raises(ConfigError, match=message):
        check(demo)


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ({"target_context": 64}, r"^systems\.x: demo/model: target_context 64 is below the model's own context of 128 tokens$"),
        ({"target_context": 256, "training": {"rank": 200}}, r"^systems\.x: .*: rank 200 is above the model's width, .* 128$"),
    ],
)
def test_a_system_that_the_base_cannot_become_is_told(demo, system, message):
    demo["systems"]["x"] = system
    with pytest.raises(ConfigError, match=message):
        check(demo)


def test_a_cell_of_an_ablation_is_checked_like_a_row(demo):
    demo["ablations"] = {"a": {"system": "longqlora", "grid": {"rank": [500]}}}
    with pytest.raises(
        ConfigError, match=r"^systems\.longqlora\.rank-500: .*: rank 500 is above the model's width, hidden_size 128"
    ):
        check(demo)


def test_a_local_model_of_another_family_is_told(tmp_path, demo):
    demo["base_model"]["path"] = local_model(tmp_path / "mpt", model_type="mpt")
    with pytest.raises(ConfigError, match=r"is a 'mpt' model; RoPE families that can be extended: llama, mistral"):
        check(demo)


# --- a base model that is trained from scratch ----------------------------------------------------------------------------


def test_the_config_that_trains_the_base_of_the_demo_has_what_it_needs(demo_pretraining):
    experiment = check(demo_pretraining)
    assert experiment.base_model == experiment.pretrained == "results/demo-pretraining/pretrained"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", r"^pretraining\.paths: no such file: nowhere\.jsonl$"),
        ("hf://datasets/owner/name/*.csv", r"^pretraining\.paths: hf://datasets/owner/name/\*\.csv: unknown format"),
        ("nowhere/*.jsonl", r"^pretraining\.paths: no file matches nowhere/\*\.jsonl$"),
        ("demo/texts/corpus-0.jsonl.xz", r"^pretraining\.paths: demo/texts/corpus-0\.jsonl\.xz is listed, .* more than once$"),
    ],
)
def test_texts_to_train_from_scratch_on_are_checked_like_those_of_the_corpus(demo_pretraining, path, message):
    demo_pretraining["pretraining"]["paths"] = ["demo/texts/corpus-0.jsonl.xz", path]
    with pytest.raises(ConfigError, match=message):
        check(demo_pretraining)


def test_a_model_that_is_going_to_be_made_is_checked_by_what_it_will_be(demo_pretraining):
    demo_pretraining["systems"]["x"] = {"target_context": 64}
    with pytest.raises(ConfigError, match=r"^systems\.x: .*: target_context 64 is below the model's own context of 128"):
        check(demo_pretraining)


def test_a_model_that_is_going_to_be_made_shares_the_weight_of_its_output_layer(demo, demo_pretraining):
    demo_pretraining["corpus"] = demo["corpus"]
    demo_pretraining["systems"]["x"] = {"target_context": 256, "training": {"steps": 1, "modules_to_save": ["lm_head"]}}
    with pytest.raises(ConfigError, match=r"^systems\.x: .*'lm_head' shares its weight with 'embed_tokens'"):
        check(demo_pretraining)


def test_only_an_experiment_that_makes_a_base_may_name_it(demo, elsewhere):
    demo["base_model"]["path"] = "results/demo/pretrained"
    with pytest.raises(ConfigError, match=r"^base_model\.path: no rule makes results/demo/pretrained"):
        check(demo)


def test_advice_names_no_model_that_no_rule_makes(demo, elsewhere):
    demo["base_model"]["path"] = "results/demo/weights/bas"  # the base is not trained, and has no weights of its own
    with pytest.raises(
        ConfigError, match=r"no rule makes results/demo/weights/bas(; did you mean results/demo/weights/chat\?)?$"
    ):
        check(demo)


# --- served models ---------------------------------------------------------------------------------------------------------


def test_a_system_with_dynamic_scaling_is_not_served(demo):
    demo["systems"]["longer"] = {"target_context": 512, "rope_scaling": "dynamic", "training": {}}
    with pytest.raises(ConfigError, match=r"^serving\.systems: 'longer' cannot be converted: .* dynamic scaling .* yarn"):
        check(demo | {"serving": {}})
    assert check(demo | {"serving": {"systems": ["longqlora"]}}).served == ["longqlora"]


def test_a_model_that_is_stored_with_dynamic_scaling_is_not_served(demo, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    demo["base_model"] = {"path": local_model(tmp_path / "scaled", rope_parameters=rope), "tokenizer": "demo/model"}
    demo["systems"] = {"x": {"target_context": 512, "rope_scaling": "dynamic", "training": {}}}
    with pytest.raises(ConfigError, match=r"^serving\.systems: 'x' cannot be converted: .* dynamic"):
        check(demo | {"serving": {}, "retrieval": {"tasks": []}})


def test_a_converter_that_is_not_there_is_named(demo):
    with pytest.raises(ConfigError, match=r"^serving\.converter: no such file: llama\.cpp/convert_hf_to_gguf\.py$"):
        check(demo | {"serving": {"converter": "llama.cpp/convert_hf_to_gguf.py"}})


def test_without_a_section_nothing_is_served(demo):
    assert check(demo).served == []
    assert "longqlora-512" in check(demo | {"serving": {}}).served
