import copy
import json
import re

import numpy
import pytest
import yaml

from longqlora.config.experiment import (
    ConfigError,
    check_corpus,
    corpus_shards,
    evaluated_model,
    load_experiment,
    sample_shares,
)

CONFIGS = ["config", "llama2-7b-8k", "llama2-7b-12k", "llama2-13b-8k", "vicuna-13b-8k", "vicuna-13b-8k-mixture"]


@pytest.fixture(scope="session")
def schema(root):
    return yaml.safe_load((root / "workflow/schemas/config.schema.yaml").read_text())


@pytest.fixture
def demo(root):
    return yaml.safe_load((root / "config/config.yaml").read_text())


def change(config, key, value):
    """The configuration with one value set by its dotted key; None deletes it."""
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    part = config
    for name in path:
        part = part[name]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_valid(root, schema, name, monkeypatch):
    monkeypatch.chdir(root)
    load_experiment(yaml.safe_load((root / f"config/{name}.yaml").read_text()), schema)


def test_the_papers_run_has_the_published_hyper_parameters(root, schema):
    for name, learning_rate, length in [("llama2-7b-8k", 2e-4, {"steps": 1000}), ("vicuna-13b-8k", 1e-4, {"epochs": 1})]:
        experiment = load_experiment(yaml.safe_load((root / f"config/{name}.yaml").read_text()), schema)
        training = experiment["systems"]["longqlora"]["training"]
        published = {
            "rank": 64, "alpha": 16, "dropout": 0.05, "batch_size": 1, "gradient_accumulation": 16, "warmup_steps": 20,
            "max_grad_norm": 0.3, "weight_decay": 0, "optimizer": "paged_adamw_32bit", "group_ratio": 0.25,
            "target_modules": "all-linear", "learning_rate": learning_rate, **length,
        }  # fmt: skip
        assert published.items() <= training.items()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.rnk", 8, r"training: unknown key 'rnk'; did you mean 'rank'\? \(legal: .*rank.*\)"),
        ("sytems", {}, r"unknown key 'sytems'; did you mean 'systems'\?"),
        ("training.rank", "sixteen", r"training\.rank: 'sixteen' is not of type 'integer'"),
        ("training.attention", "sparse", r"training\.attention: 'sparse' is not one of \['shifted_sparse', 'full'\]"),
        ("device", None, r"'device' is a required property"),
        ("device", "gpu", r"device: 'gpu' is not one of \['cpu', 'cuda'\]"),
        ("evaluation.stride", 128, r"evaluation\.stride: 128 exceeds the shortest of evaluation\.lengths, 64"),
        ("evaluation.stride", 0, r"evaluation\.stride: 0 is less than the minimum of 1 \(tokens from one window to the next"),
        ("evaluation.protocol", "rolling", r"evaluation\.protocol: 'rolling' is not one of \['exact', 'longqlora', "),
        ("evaluation.protocol", "longlora", r"evaluation\.stride: 256 exceeds the shortest of evaluation\.lengths, 64"),
        ("evaluation.precision", "int4", r"evaluation\.precision: 'int4' is not one of \['auto', 'float32', .*'int8', 'nf4'\]"),
        ("systems.Base", {}, r"systems: 'Base' does not match"),
        ("systems.base.weights_of", "nobody", r"systems\.base\.weights_of: 'nobody' is no system with a training of its own"),
        ("systems.chat.weights_of", "longqlora", r"systems\.chat\.weights_of: .* 'longqlora' .*; leave training out"),
        ("systems.x", {"weights_of": "longqlora", "rope_scaling": "yarn"}, r"x\.weights_of: .*; leave rope_scaling out"),
        ("retrieval", {"tasks": ["haystack"]}, r"retrieval\.tasks\.0: 'haystack' is not one of \['passkey', "),
        ("retrieval", {"depths": [0, 1.5]}, r"retrieval\.depths\.1: 1\.5 is greater than the maximum of 1"),
        ("retrieval", {"tasks": ["induction"], "lengths": [32]}, r"retrieval\.lengths: 32 is too short .* at least 56"),
        ("retrieval", {"lengths": [64, 100]}, r"retrieval\.lengths: 100 is none of evaluation\.lengths"),
        ("retrieval", {"filler": "poems"}, r"retrieval\.filler: 'poems' is no name of .* \(legal: prose, code\)"),
        ("corpus.sources", [{"paths": ["nowhere/*.jsonl"]}], r"corpus\.sources: no such file: nowhere/\*\.jsonl"),
        ("corpus.min_tokens", 5000, r"corpus\.min_tokens: 5000 exceeds corpus\.max_tokens, 1024"),
        ("base_model.path", "../nowhere", r"base_model\.path: \.\./nowhere is neither a folder .* nor a hub id"),
        ("sft.num_records", 0, r"sft\.num_records: 0 is less than the minimum of 1"),
        ("systems.longqlora.target_context", None, r"systems\.longqlora\.target_context: missing"),
        ("systems.longqlora.training", {"epochs": 1, "steps": 5}, r"give either steps or epochs"),
        ("published", [{"label": "x", "dataset": "y", "perplexity": {"32": 1.0}}], r"published: dataset 'y' is no label"),
        ("training.target_modules", "all", r"training\.target_modules: all-linear, or a list of module names"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_would_be_right(schema, demo, key, value, message):
    config = change(demo, key, value)
    with pytest.raises(ConfigError, match=message) as caught:
        load_experiment(config, schema)
    assert len(str(caught.value).splitlines()) <= 8


def test_training_data_must_be_configured(schema, demo):
    config = change(change(demo, "sft", None), "systems.chat", None)
    load_experiment(config, schema)
    config["systems"]["longqlora"]["training"]["data"] = "sft"
    with pytest.raises(ConfigError, match=r"systems\.longqlora\.training\.data: 'sft' is not configured"):
        load_experiment(config, schema)


def test_shares_must_add_up(schema, demo):
    demo["sft"]["sources"][0]["share"] = 0.5
    with pytest.raises(ConfigError, match=r"sft\.sources: the shares add up to 1\.07"):
        load_experiment(demo, schema)


def test_a_systems_own_training_wins_over_the_experiments(schema, demo):
    demo["systems"]["longqlora"]["training"] = {"rank": 4, "epochs": 2}
    system = load_experiment(demo, schema)["systems"]["longqlora"]["training"]
    assert (system["rank"], system["epochs"], system["alpha"]) == (4, 2, 16)
    assert "steps" not in system


def local_model(folder, **config):
    folder.mkdir()
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = {"model_type": "llama", "max_position_embeddings": 128, "vocab_size": 512, **shape, **config}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").touch()
    return str(folder)


def test_a_local_model_is_checked_before_any_job_starts(tmp_path, schema, demo):
    demo["base_model"] = {"path": local_model(tmp_path / "mpt", model_type="mpt")}
    with pytest.raises(ConfigError, match=r"is a 'mpt' model; RoPE families that can be extended: llama, mistral"):
        load_experiment(demo, schema)
    demo["base_model"] = {"path": local_model(tmp_path / "long", max_position_embeddings=300)}
    with pytest.raises(
        ConfigError, match=r"systems\.longqlora: .*long: target_context 256 is below the model's own context of 300 tokens"
    ):
        load_experiment(demo, schema)
    numpy.array([1, 600], dtype="<u2").tofile(tmp_path / "x.bin")
    demo["base_model"] = {"path": local_model(tmp_path / "small")}
    demo["evaluation"]["datasets"]["prose"]["paths"] = [str(tmp_path / "x.bin")]
    with pytest.raises(ConfigError, match=r"evaluation\.datasets\.prose: .*x\.bin holds token id 600, .* \(legal: 0 to 511\)"):
        load_experiment(demo, schema)


def test_globs_become_files_and_remote_paths_stay(tmp_path, schema, demo):
    for name in ("b.jsonl", "a.jsonl.gz"):
        (tmp_path / name).touch()
    remote = "hf://datasets/owner/name/*.jsonl"
    demo["corpus"]["sources"] = [{"paths": [f"{tmp_path}/*.jsonl*", remote]}]
    paths = load_experiment(demo, schema)["corpus"]["sources"][0]["paths"]
    assert paths == [f"{tmp_path}/a.jsonl.gz", f"{tmp_path}/b.jsonl", remote]


def test_every_file_of_a_corpus_is_in_exactly_one_shard():
    files = [f"data/{number:03}.jsonl.gz" for number in range(300)]
    for options in ({}, {"jobs": 1}, {"jobs": 7}, {"jobs": 300}, {"jobs": 400}):
        shards = corpus_shards([{"name": "x", "paths": files, **options}])
        assert sorted(path for shard in shards.values() for path in shard["paths"]) == files
        assert len(shards) == options.get("jobs", 256)
        assert all(re.fullmatch(r"[\w.-]+", name) for name in shards)  # they become names of files


def test_a_shard_of_one_file_has_its_name_and_keeps_it_when_a_file_is_added():
    files = [f"data/{number}.jsonl" for number in range(4)]
    before = corpus_shards([{"name": "x", "paths": files}])
    after = corpus_shards([{"name": "x", "paths": [*files, "data/4.jsonl"]}])
    assert set(before) < set(after)
    assert [name.rsplit("-", 1)[0] for name in before] == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]
    assert len(corpus_shards([{"name": "x", "paths": ["a/0.jsonl", "b/0.jsonl"]}])) == 2


def test_a_shard_of_one_file_stays_as_it_is_when_a_file_before_it_is_added():
    files = [f"data/{number}.jsonl" for number in range(1, 5)]
    before = corpus_shards([{"name": "x", "paths": files}])
    after = corpus_shards([{"name": "x", "paths": ["data/0.jsonl", *files]}])
    assert set(before) < set(after)
    assert all(after[name]["part"] == before[name]["part"] for name in before)  # Snakemake reruns a job whose parameters change


def test_the_same_file_in_two_sources_is_read_for_both():
    shards = corpus_shards([{"name": name, "paths": ["data/0.jsonl"]} for name in ("a", "b")])
    assert [shard["source"]["name"] for shard in shards.values()] == ["a", "b"]


def test_text_files_are_read_by_one_job_unless_more_are_asked_for():
    files = [f"books/{number}.txt" for number in range(50)]
    assert [shard["paths"] for shard in corpus_shards([{"name": "x", "paths": files}]).values()] == [files]
    assert len(corpus_shards([{"name": "x", "paths": files, "jobs": 4}])) == 4


def test_what_a_remote_pattern_matches_is_split_by_jobs():
    pattern, file = "hf://datasets/owner/name/*.jsonl.zst", "hf://datasets/owner/name/one.jsonl"
    (single,) = corpus_shards([{"name": "x", "paths": [pattern]}]).values()
    assert (single["paths"], single["part"]) == ([pattern], (0, 1))
    shards = corpus_shards([{"name": "x", "paths": [pattern, file], "jobs": 3}])
    assert [shard["part"] for shard in shards.values()] == [(0, 3), (1, 3), (2, 3)]
    assert [shard["paths"] for shard in shards.values()] == [[file, pattern], [pattern], [pattern]]
    assert all(name.startswith(f"part-{number}-of-3-") for number, name in enumerate(shards))


def corpus_with(names, shares=None, **options):
    sources = [{"name": name, "paths": [f"{n}.jsonl"]} for n, name in enumerate(names)]
    for source, share in zip(sources, shares or [], strict=False):
        if share is not None:
            source["share"] = share
    return {"sources": sources, **options}


@pytest.mark.parametrize(
    ("corpus", "problem"),
    [
        (corpus_with("ab"), None),
        (corpus_with("aa"), None),
        (corpus_with("ab", [0.3, 0.7]), None),
        (corpus_with("a", shares=None) | {"shares": {"C4": 0.25, "Book": 0.75}}, None),
        (corpus_with("abc", [0.1, 0.2, 0.7]), None),
        (corpus_with("ab", [0.3, 0.6]), r"corpus\.sources: the shares add up to 0\.9, they must add up to 1"),
        (corpus_with("ab") | {"shares": {"C4": 0.5, "Book": 0.6}}, r"corpus\.shares: the shares add up to 1\.1"),
        (corpus_with("ab", [0.3, 0.7]) | {"shares": {"C4": 1}}, r"corpus\.shares: give shares either here or to the sources"),
        (corpus_with("abc", [0.3, None, 0.7]), r"corpus\.sources: b has no share but a, c has; give one to all or to none"),
        (corpus_with("aa", [0.3, 0.7]), r"every source with a share needs a name of its own, found a, a"),
    ],
)
def test_shares_of_a_corpus_are_checked(corpus, problem):
    problems = list(check_corpus(corpus))
    assert len(problems) == (problem is not None)
    assert problem is None or re.search(problem, problems[0])


def test_shares_of_a_sample_come_from_the_sources_or_the_section():
    assert sample_shares(corpus_with("ab")) is None
    assert sample_shares(corpus_with("ab", [0.3, 0.7])) == {"a": 0.3, "b": 0.7}
    assert sample_shares(corpus_with("ab") | {"shares": {"C4": 1.0}}) == {"C4": 1.0}


def test_shares_of_a_corpus_are_checked_before_any_job_starts(tmp_path, schema, demo):
    (tmp_path / "a.jsonl").touch()
    demo["corpus"]["sources"] = [{"paths": [f"{tmp_path}/a.jsonl"], "share": 0.5}]
    with pytest.raises(ConfigError, match=r"corpus\.sources: the shares add up to 0\.5"):
        load_experiment(demo, schema)


def test_a_published_model_is_evaluated_as_it_is_with_its_own_tokenizer(tmp_path, schema, demo):
    demo["systems"]["mpt"] = {"model": local_model(tmp_path / "mpt", model_type="mpt")}
    demo["systems"]["own"] = {"model": "owner/name", "tokenizer": "owner/other"}
    systems = load_experiment(demo, schema)["systems"]
    assert systems["mpt"]["tokenizer"] == systems["mpt"]["model"] == str(tmp_path / "mpt")
    assert systems["own"]["tokenizer"] == "owner/other"
    assert systems["base"]["model"] == demo["base_model"]["path"]
    assert systems["base"]["tokenizer"] == systems["long"]["tokenizer"] == demo["base_model"]["tokenizer"]
    assert {system["rope_scaling"] for system in systems.values()} == {"linear"}


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (
            {"model": "owner/name", "target_context": 256, "training": {}},
            r"systems\.x\.model: owner/name is evaluated as it is",
        ),
        ({"model": "../nowhere"}, r"systems\.x\.model: \.\./nowhere is neither a folder .* nor a hub id"),
        (
            {"target_context": 256, "rope_scaling": "ntk"},
            r"systems\.x\.rope_scaling: 'ntk' is not one of \['linear', 'dynamic'",
        ),
        (
            {"target_context": 256, "training": {"method": "lra"}},
            r"systems\.x\.training\.method: 'lra' is not one of \['qlora'",
        ),
        ({"target_context": 64}, r"systems\.x: .*base: target_context 64 is below the model's own context of 128 tokens"),
        ({"target_context": 256, "training": {"rank": 200}}, r"systems\.x: .*: rank 200 is above the model's width, .* 128"),
        (
            {"target_context": 256, "training": {"modules_to_save": ["wte"]}},
            r"systems\.x: .*: modules_to_save: 'wte' matches no layer",
        ),
    ],
)
def test_a_system_that_cannot_run_is_told_before_any_job_starts(schema, demo, system, message):
    demo["systems"]["x"] = system
    with pytest.raises(ConfigError, match=message):
        load_experiment(demo, schema)


def test_the_architecture_of_the_demo_is_checked_before_it_is_made(schema, demo):
    with pytest.raises(ConfigError, match=r"num_attention_heads 4 is not divisible by num_key_value_heads 3"):
        load_experiment(change(demo, "demo.architecture.num_key_value_heads", 3), schema)
    with pytest.raises(ConfigError, match=r"hidden_size 130 is not divisible by num_attention_heads 4"):
        load_experiment(change(demo, "demo.architecture.hidden_size", 130), schema)
    with pytest.raises(ConfigError, match=r"target_context 256 is below the model's own context of 300"):
        load_experiment(change(demo, "demo.pretrained.base", 300), schema)


def test_a_local_model_that_does_not_fit_the_training_is_told_before_any_job_starts(tmp_path, schema, demo):
    demo["base_model"] = {"path": local_model(tmp_path / "mistral", model_type="mistral", sliding_window=200)}
    with pytest.raises(ConfigError, match=r"systems\.longqlora: .*shifted_sparse at 256 tokens: .* sliding window of 200"):
        load_experiment(demo, schema)
    demo["training"]["attention"] = "full"
    load_experiment(demo, schema)


def test_records_must_be_left_to_train_on(schema, demo):
    with pytest.raises(ConfigError, match=r"sft\.held_out: 1213 of sft\.num_records 1213 leaves nothing to train on"):
        load_experiment(change(demo, "sft.held_out", 1213), schema)


def test_a_length_beyond_every_context_is_evaluated_to_show_where_a_model_breaks(schema, demo):
    config = change(change(demo, "evaluation.lengths", [64, 1024]), "retrieval.lengths", None)
    lengths = load_experiment(config, schema)["evaluation"]["lengths"]
    assert lengths == [64, 1024]


def test_the_stride_is_left_to_the_protocol_of_the_papers(schema, demo):
    demo["evaluation"]["protocol"] = "longqlora"
    assert load_experiment(demo, schema)["evaluation"]["stride"] is None
    with pytest.raises(ConfigError, match=r"evaluation\.stride: in the protocol longqlora the stride is the window"):
        load_experiment(change(demo, "evaluation.stride", 64), schema)


def test_retrieval_is_measured_at_the_lengths_of_perplexity_in_the_first_set(schema, demo):
    demo.pop("retrieval", None)
    retrieval = load_experiment(demo, schema)["retrieval"]
    assert (retrieval["lengths"], retrieval["filler"]) == (demo["evaluation"]["lengths"], "prose")
    assert retrieval["tasks"] == ["passkey", "single_needle", "multi_key", "multi_value"]
    demo["retrieval"] = {"lengths": [128], "filler": "code", "tasks": []}
    retrieval = load_experiment(demo, schema)["retrieval"]
    assert (retrieval["lengths"], retrieval["filler"], retrieval["tasks"]) == ([128], "code", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.bin: the file is empty"),
        (b"123", r"x\.bin: 3 bytes are not a stream of uint16 token ids"),
    ],
)
def test_a_broken_file_of_tokens_is_a_line_of_the_message(tmp_path, schema, demo, content, message):
    (tmp_path / "x.bin").write_bytes(content)
    demo["base_model"] = {"path": local_model(tmp_path / "small")}
    demo["evaluation"]["datasets"]["prose"]["paths"] = [str(tmp_path / "x.bin")]
    with pytest.raises(ConfigError, match=rf"^evaluation\.datasets\.prose: .*{message}"):
        load_experiment(demo, schema)


# --- what a system is evaluated as -----------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(schema, demo):
    """Add a system to the demo and tell what it is evaluated as."""

    def fields(name: str, **system) -> dict:
        demo["systems"][name] = system or demo["systems"][name]
        return evaluated_model(load_experiment(demo, schema), name)

    return fields


FULL = {"attention": "full", "precision": "float32"}
ON_THE_BASE = {"path": "results/demo/pretrained/base", "rope_scaling": "linear", "target_context": 256}


def test_rows_of_the_demo_are_evaluated_as_they_were_made(evaluated):
    assert evaluated("base") == FULL | ON_THE_BASE | {"target_context": None}
    assert evaluated("interpolated") == FULL | ON_THE_BASE
    assert evaluated("long")["path"] == "results/demo/pretrained/long"
    for name in ("longqlora", "longlora-full", "chat"):
        assert evaluated(name) == FULL | {"group_ratio": 0.25, "path": f"results/demo/weights/{name}"}


def test_an_adapter_that_is_not_merged_is_put_on_the_base(evaluated):
    fields = evaluated("x", target_context=256, training={}, merged=False, precision="nf4", rope_scaling="yarn")
    on_it = {"group_ratio": 0.25, "adapter": "results/demo/adapters/x", "precision": "nf4", "rope_scaling": "yarn"}
    assert fields == FULL | ON_THE_BASE | on_it


def test_the_weights_of_another_system_are_evaluated_in_another_way(evaluated):
    fields = evaluated("x", weights_of="longqlora", evaluation_attention="shifted_sparse")
    assert fields == FULL | {"attention": "shifted_sparse", "group_ratio": 0.25, "path": "results/demo/weights/longqlora"}
    fields = evaluated("y", weights_of="longqlora", merged=False, precision="int8")
    on_it = {"adapter": "results/demo/adapters/longqlora", "group_ratio": 0.25, "precision": "int8"}
    assert fields == FULL | ON_THE_BASE | on_it


def test_a_model_trained_whole_has_nothing_to_merge(evaluated):
    assert evaluated("x", weights_of="longlora-full", merged=False)["path"] == "results/demo/weights/longlora-full"
