import json

from longqlora.config.settings import EvaluatedModel, RopeExtension
from longqlora.modeling.scaling_choice import as_chosen, model_as_chosen, read_choice

BEST = RopeExtension(scaling="best", target_context=8192)


def test_the_chosen_scaling_takes_the_place_of_best(tmp_path):
    (tmp_path / "choice.json").write_text(json.dumps({"chosen": "yarn", "scalings": {}}))
    choice = read_choice(str(tmp_path / "choice.json"))
    assert as_chosen(BEST, choice) == RopeExtension(scaling="yarn", target_context=8192)
    model = EvaluatedModel(path="x", group_ratio=0.25, extension=BEST)
    assert model_as_chosen(model, choice).extension == RopeExtension(scaling="yarn", target_context=8192)


def test_without_a_choice_everything_stays_as_configured():
    assert read_choice([]) is None  # what Snakemake has for an input that a system does not need
    linear = RopeExtension(target_context=8192)
    assert as_chosen(linear, None) == linear
    model = EvaluatedModel(path="x", group_ratio=0.25, extension=linear)
    assert model_as_chosen(model, None) == model
