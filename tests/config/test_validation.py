"""Every mistake in a configuration is one line: the key, the value, what would be right."""

import copy
import datetime

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longqlora.config.experiment import load_experiment
from longqlora.config.settings import Configuration
from longqlora.config.validation import MAX_PROBLEMS, ConfigError, duplicate_keys

NOTHING = object()


def change(config: dict, key: str, value: object) -> dict:
    """The configuration with one value set by its dotted key, or the key deleted."""
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    part = config
    for name in path:
        part = part[name]
    if value is NOTHING:
        del part[last]
    else:
        part[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.rnk", 8, r"^training: unknown key 'rnk'; did you mean 'rank'\? \(legal: .*rank.*\)"),
        ("sytems", {}, r"unknown key 'sytems'; did you mean 'systems'\?"),
        (
            "training.activation_checkpointing",
            False,
            r"^training: unknown key 'activation_checkpointing': the key is memory now: leave it out in place of true, and "
            r"write memory: speed in place of false \(legal: ",
        ),
        ("training.offload_activations", True, r"^training: unknown key 'offload_activations': the key is memory now: write "),
        ("training.checkpoint_store", "/data/a", r"^training\.checkpoint_store: '/data/a' is not an address such as s3://"),
        ("training.memory", "small", r"^training\.memory: 'small' is not one of 'auto', 'speed', 'smallest'"),
        ("systems.base.context_length", 8, r"^systems\.base: unknown key 'context_length': it is called target_context now"),
        ("training.rank", "sixteen", r"^training\.rank: 'sixteen' is text, expected a whole number \(Rank of the adapter\)"),
        ("training.rank", "16", r"^training\.rank: '16' is text, expected a whole number; write it without quotes"),
        ("training.rank", 16.0, r"^training\.rank: 16\.0 is a number, expected a whole number: write 16"),
        ("training.rank", True, r"^training\.rank: True is true or false, expected a whole number"),
        ("training.learning_rate", "2e-4", r"rate: '2e-4' is text, expected a number; YAML reads 2e-4 as text: write 0\.0002"),
        ("training.learning_rate", "0.002", r"rate: '0\.002' is text, .*; write it without quotes: 0\.002 "),
        ("training.learning_rate", float("nan"), r"^training\.learning_rate: nan is a number, expected a finite number"),
        ("training.attention", "sparse", r"^training\.attention: 'sparse' is not one of 'shifted_sparse', 'full'$"),
        ("training.target_modules", [], r"^training\.target_modules: \[\] is not legal \("),
        ("seed", -1, r"^seed: -1 is below the minimum of 0"),
        ("systems.x", {"training": {"context_length": 8}}, r"x\.training: unknown key 'context_length' \(legal"),
        ("training.target_modules", "all", r"^training\.target_modules: 'all' is not legal \(.*all-linear.*a list of names\)"),
        ("training.data", "txt", r"^training\.data: 'txt' is not one of 'corpus', 'sft'$"),
        ("systems.longqlora.training", None, r"longqlora\.training: has no value; write {} for the defaults, or leave"),
        ("sft", None, r"^sft: has no value; write one, or leave the key out$"),  # {} would lack keys
        ("base_model.revision", "v1", r"^base_model: unknown key 'revision': a revision follows the hub id, after an @"),
        ("systems.base.revision", "v1", r"^systems\.base: unknown key 'revision': a revision follows the hub id, after an @"),
        ("demo", {"vocab_size": 2048}, r"unknown key 'demo': the demo's model and texts are in the folder demo/; the section"),
        ("systems.x", {"label": 8}, r"^systems\.x\.label: 8 is a number, expected text; put it into quotes"),
        ("systems.x", {"label": False}, r"^systems\.x\.label: False .*; YAML reads yes, no, on and off as true and"),
        ("systems.longqlora", {"rank": 4}, r"unknown key 'rank'; it is a key of training: write systems\.longqlora\.train"),
        ("systems.x", {"label:base": None}, r"x\.label:base: has no value; a space is missing after the colon in 'la"),
        ("base_model", "owner/name", r"^base_model: 'owner/name' is text, .*; write base_model: \{path: owner/name\}"),
        ("evaluation.lengths", 256, r"^evaluation\.lengths: 256 is a number, expected a list; write \[256\]"),
        ("systems.x", {"merged": "yes"}, r"^systems\.x\.merged: 'yes' is text, expected true or false"),
        ("systems.x", [], r"^systems\.x: \[\] is a list, expected keys with values"),
        ("systems", {}, r"^systems: must not be empty"),
        ("systems", {False: {}}, r"^systems: False is not a legal name: YAML reads yes, no, on and off as true and false; put"),
        ("systems", {8: {}}, r"^systems: 8 is not a legal name: YAML reads it as a number; put the name into quotes"),
        ("systems.Base", {}, r"^systems: 'Base' is not a legal name: a name has lower-case letters"),
        ("device", NOTHING, r"^device: missing \(Where models run\)"),
        ("device", "gpu", r"^device: 'gpu' is not one of 'cpu', 'cuda'$"),
        ("evaluation.stride", 0, r"^evaluation\.stride: 0 is below the minimum of 1 \(Tokens from one window to the next"),
        ("evaluation.protocol", "rolling", r"^evaluation\.protocol: 'rolling' is not one of 'exact', 'longqlora', 'longlora'$"),
        ("evaluation.precision", "int4", r"^evaluation\.precision: 'int4' is not one of 'auto', 'float32', .*'int8', 'nf4'$"),
        ("evaluation.lengths", [64, 64], r"^evaluation\.lengths: 64 occurs twice"),
        ("evaluation.datasets.prose.paths", "a.txt", r"^evaluation\.datasets\.prose\.paths: 'a\.txt' is text, expected a list"),
        ("retrieval", {"tasks": ["haystack"]}, r"^retrieval\.tasks\[0\]: 'haystack' is not one of 'passkey', "),
        ("retrieval", {"depths": [0, 1.5]}, r"^retrieval\.depths\[1\]: 1\.5 is above the maximum of 1"),
        ("sft.num_records", 0, r"^sft\.num_records: 0 is below the minimum of 1"),
        ("sft.sources", [{"name": "x"}], r"^sft\.sources\[0\]\.schema: missing \(Format of its records\)"),
        ("experiment", "My run", r"^experiment: 'My run' is not a legal name: a name has lower-case letters"),
        ("published", [{"label": "x", "dataset": "y", "perplexity": {"a": 1.0}}], r"^published\[0\]\.perplexity"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_would_be_right(demo, key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(change(demo, key, value))


def test_all_mistakes_are_told_at_once_of_the_values_too(demo):
    demo["training"] |= {"rnk": 8, "dropout": 1.5}
    demo["systems"]["x"] = {"weights_of": "nobody"}
    demo["sft"]["held_out"] = 5000
    with pytest.raises(ConfigError) as caught:
        load_experiment(demo)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["training.dropout", "training", "systems.x.weights_of", "sft.held_out"]


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("systems", {"longqlora": {"target_context": "256", "training": {}}}),
        ("systems", {"longqlora": {"target_contxt": 256, "training": {}}}),
        ("systems", {"longqlora": {"target_context": 256, "table_row": False, "training": True}}),
        ("evaluation", {"lengths": "64"}),
        ("evaluation", {"length": [64]}),
        ("training", {"steps": "50"}),
        ("training", {"data": "txt"}),
        ("corpus", {"num_texts": None}),
        ("systems", {"chat": None, "x": {"weights_of": "chat"}}),
    ],
)
def test_what_follows_from_a_mistake_is_no_second_one(demo, section, changes):
    demo[section] = {**demo[section], **changes}
    if "length" in changes:
        del demo["evaluation"]["lengths"]
    with pytest.raises(ConfigError) as caught:
        load_experiment(demo)
    assert len(str(caught.value).splitlines()) == 1


def test_a_mistake_hides_no_other_whose_key_begins_alike(demo):
    demo["systems"] |= {"a": None, "ab": {"target_context": 256, "training": {"steps": 1, "epochs": 1.0}}}
    with pytest.raises(ConfigError) as caught:
        load_experiment(demo)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["systems.a", "systems.ab.training"]


def test_a_key_that_occurs_twice_is_told_with_its_lines(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1}\nb:\n  - c: 1\n    d: 2\n    c: 3\na: {<<: *a, x: 2}\n")
    assert list(duplicate_keys(str(path))) == [
        f"b[0].c: occurs twice in {path} (lines 3 and 5)", f"a: occurs twice in {path} (lines 1 and 6)",
    ]  # fmt: skip


def test_the_shipped_configurations_have_no_key_twice(root):
    for path in (root / "config").glob("*.yaml"):
        assert list(duplicate_keys(str(path))) == []


def test_a_hundred_mistakes_are_not_all_shown(demo):
    demo["systems"] |= {f"x{number}": {"labl": "x"} for number in range(100)}
    with pytest.raises(ConfigError, match=r"… and 80 more$") as caught:
        load_experiment(demo)
    assert len(str(caught.value).splitlines()) == MAX_PROBLEMS + 1


@pytest.mark.parametrize("config", [None, [], "text", 3, {}, {"systems": None}, {1: 2}])
def test_what_is_no_configuration_at_all_is_told(config):
    with pytest.raises(ConfigError):
        load_experiment(config)


# --- any configuration loads, or is refused in words -----------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
    | st.sampled_from(["2e-4", "cpu", "full", "corpus", "a/b", "results/demo/x", "{a}", "x::y", "hf://a/*.txt", 0, 1, 8, 256])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
)


def places(part: object, place: tuple = ()) -> list[tuple]:
    """Every place in a configuration."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else []
    return [place, *(found for key, value in items for found in places(value, (*place, key)))]


@st.composite
def configurations(draw, start: dict) -> object:
    """The demo with some values replaced by anything, some keys dropped, and some added."""
    config = copy.deepcopy(start)
    for _ in range(draw(st.integers(1, 4))):
        *path, last = draw(st.sampled_from([place for place in places(config) if place]))
        part = config
        for key in path:
            part = part[key]
        action = draw(st.sampled_from(["replace", "drop", "add"]))
        if action == "replace":
            part[last] = draw(VALUES)
        elif action == "drop":
            del part[last]
        elif isinstance(part, dict):
            known = sorted({name for model in MODELS for name in model.model_fields})
            part[draw(st.sampled_from(known) | st.text(max_size=4))] = draw(VALUES)
    return config


MODELS = [
    Configuration,
    *(field.annotation for field in Configuration.model_fields.values() if isinstance(field.annotation, type)),
]
MODELS = [model for model in MODELS if hasattr(model, "model_fields")]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_configuration_loads_or_raises_a_config_error(demo, data):
    from longqlora.preflight import check_inputs

    config = data.draw(configurations(demo))
    message = "fine: nothing to say"
    try:
        load_experiment(config, check_inputs)
    except ConfigError as error:
        message = str(error)
    assert all(": " in line or line.startswith("…") for line in message.splitlines())


def test_a_date_is_no_text(demo):
    demo["experiment"] = yaml.safe_load("2026-01-01")
    assert isinstance(demo["experiment"], datetime.date)
    with pytest.raises(ConfigError, match=r"^experiment: datetime.date.* is a date, expected text; put it into quotes"):
        load_experiment(demo)
