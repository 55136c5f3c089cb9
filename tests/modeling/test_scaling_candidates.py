import pytest

from longqlora.modeling.scaling_candidates import candidates, choice_problems

MODEL = {"model_type": "llama", "max_position_embeddings": 4096, "rope_theta": 10000.0}


def test_the_scalings_of_a_model_are_compared_that_fit_every_length():
    assert [extension.scaling for extension in candidates(MODEL, 8192)] == ["linear", "ntk", "yarn", "llama3"]
    assert {extension.target_context for extension in candidates(MODEL, 8192)} == {8192}
    assert not list(choice_problems(MODEL, 8192))


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_a_scaled_model_has_its_own_scaling(scaling):
    scaled = MODEL | {"rope_scaling": {"rope_type": scaling, "factor": 2.0, "original_max_position_embeddings": 4096}}
    assert [extension.scaling for extension in candidates(scaled, 16384)] == [scaling]


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (MODEL, 4096, "target_context 4096 is the model's own context: rope_scaling: best has nothing to choose from"),
        (MODEL, 2048, "target_context 2048 is below the model's own context of 4096 tokens"),
        (
            MODEL | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            16384,
            "positions are scaled already (dynamic): only rope_scaling: dynamic extends it further; for another scaling, start "
            "from the unscaled model",
        ),
    ],
)
def test_a_model_without_a_choice_is_told_why(model, target, message):
    assert list(choice_problems(model, target)) == [message]
