"""What is generated from the settings is up to date, and says of each key what the settings say."""

import json
from typing import get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from longqlora.config.reference import generated_files, json_schema, main, reference, sections_of
from longqlora.config.settings import Optimizer


def test_the_generated_files_are_up_to_date():
    assert main(["--check"]) == 0
    assert all(path.is_file() for path in generated_files())


def test_every_key_has_a_description_that_is_a_sentence_and_stands_in_the_reference():
    text = reference()
    sections = dict(sections_of())
    assert len(sections) > 15
    for place, section in sections.items():
        assert place == "" or f"## `{place}`" in text
        for name, field in section.model_fields.items():
            assert field.description, (place, name)
            assert field.description[0].isupper() or field.description.split()[0].islower(), field.description
            assert field.description.endswith("."), field.description
            assert f"| `{field.alias or name}` | " in text
    for optimizer in get_args(Optimizer):
        assert f"`{optimizer}`" in text


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "demo-pretraining",
        "llama2-7b-8k",
        "llama2-7b-8k-redpajama",
        "vicuna-13b-8k-mixture",
        "local-files",
        "measure",
        "tinystories-2k",
        "ablations",
    ],
)
def test_editors_accept_the_shipped_configurations_by_the_schema_that_they_name(root, name):
    path = root / f"config/{name}.yaml"
    first, *_ = path.read_text().splitlines()
    schema = root / "config" / first.removeprefix("# yaml-language-server: $schema=")
    config = json.loads(json.dumps(yaml.safe_load(path.read_text())))  # keys of a JSON object are text
    jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(config)


def test_the_schema_refuses_what_the_settings_refuse(demo):
    validator = jsonschema.Draft202012Validator(json_schema())
    for key, value in {"rank": "x", "rnk": 8, "attention": "sparse", "dropout": 2, "steps": None, "batch_size": 0}.items():
        config = demo | {"training": {key: value}}
        assert list(validator.iter_errors(config)), key
    assert list(validator.iter_errors(demo | {"systems": {"Base": {}}}))


def test_settings_hold_values_and_nothing_else():
    """Jobs rebuild them from params, and an edit of them reruns nothing: so they compute nothing."""
    for _, section in sections_of():
        own = [name for base in section.__mro__ if base is not BaseModel and issubclass(base, BaseModel) for name in vars(base)]
        assert not {name for name in own if not name.startswith("_")} - {
            "model_config",
            "model_fields",
            "model_computed_fields",
        }
