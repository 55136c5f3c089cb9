"""Grids of settings become systems; what two cells share is trained and evaluated once."""

import math
import re

import pytest
import yaml

from longqlora.config.ablations import add_ablations
from longqlora.config.completed import Experiment, System
from longqlora.config.experiment import load_experiment
from longqlora.config.settings import NAME_PATTERN, AblationSection
from longqlora.config.systems import evaluated_model
from longqlora.config.validation import ConfigError


@pytest.fixture
def load(demo):
    """The demo with ablations, complete."""

    def experiment(systems: dict | None = None, **ablations) -> Experiment:
        return load_experiment({**demo, "systems": demo["systems"] | (systems or {}), "ablations": ablations})

    return experiment


def grid(system: str = "longqlora", **axes) -> dict:
    return {"system": system, "grid": axes}


def added(experiment: Experiment) -> dict[str, System]:
    """The systems that are no rows of the table."""
    return {name: system for name, system in experiment.systems.items() if name not in experiment.listed}


def test_a_grid_is_the_product_of_its_values(load):
    experiment = load(both=grid(rank=[4, 8], steps=[10, 20, 30]) | {"label": "Rank and steps"})
    ablation = experiment.ablations["both"]
    assert (ablation.label, ablation.axes) == ("Rank and steps", ["rank", "steps"])
    found = {(changes["rank"], changes["steps"]) for changes in ablation.rows.values()}
    assert found == {(rank, steps) for rank in (4, 8) for steps in (10, 20, 30)}
    assert len(ablation.rows) == len(added(experiment)) == 6
    for name, changes in ablation.rows.items():
        assert changes.items() <= experiment.systems[name].training.model_dump().items()


def test_a_cell_is_the_varied_system_in_all_that_is_not_varied(load):
    experiment = load(rank=grid(rank=[4]))
    (cell,), row = added(experiment).values(), experiment.systems["longqlora"]
    assert cell.training == row.training.model_copy(update={"rank": 4})
    same = {"training", "merged", "label"}
    assert cell.model_dump(exclude=same) == row.model_dump(exclude=same)


def test_only_the_cell_with_theta_keeps_the_rope_theta_of_the_varied_system(load):
    theta = {"target_context": 256, "rope_scaling": "theta", "rope_theta": 50000.0, "training": {}}
    computed = {"target_context": 256, "rope_scaling": "ntk", "training": {}}
    systems = {"theta": theta, "computed": computed}
    experiment = load(systems, a=grid("theta", rope_scaling=["theta", "ntk", "yarn"]))
    cells = {experiment.systems[name].rope_scaling: experiment.systems[name] for name in experiment.ablations["a"].rows}
    assert {scaling: cell.rope_theta for scaling, cell in cells.items()} == {"theta": 50000.0, "ntk": None, "yarn": None}
    assert cells["ntk"].weights_of == "computed"


def test_cells_are_no_rows_of_the_table_and_their_names_are_legal(load):
    experiment = load(a=grid(rank=[4], evaluation_attention=["full", "shifted_sparse"]), b=grid(rope_scaling=["llama3"]))
    assert not set(added(experiment)) & set(experiment.rows)
    names = set(added(experiment))
    assert all(re.search(NAME_PATTERN, name) for name in names)
    assert "longqlora.rope-scaling-llama3" in names
    assert len({experiment.systems[name].label for name in names}) == len(names)


def test_what_two_grids_have_in_common_is_one_cell(load):
    experiment = load(rank=grid(rank=[4, 8]), both=grid(rank=[8, 32], evaluation_attention=["full"]))
    assert len(added(experiment)) == 3
    assert set(experiment.ablations["rank"].rows) & set(experiment.ablations["both"].rows) == {"longqlora.rank-8"}


def test_weights_that_a_row_has_are_not_trained_again(load):
    """The row has rank 16 and is evaluated merged; the cell has its adapter on the base."""
    experiment = load(rank=grid(rank=[8, 16]))
    cell = experiment.systems["longqlora.rank-16"]
    assert (cell.weights_of, cell.training, cell.progress) == ("longqlora", None, None)
    other = evaluated_model(experiment, "longqlora.rank-8")
    assert evaluated_model(experiment, "longqlora.rank-16") == other.model_copy(
        update={"adapter": "results/demo/adapters/longqlora"}
    )


def test_a_row_that_is_the_cell_is_shown_itself(load):
    row = {"target_context": 256, "training": {"rank": 8}, "merged": False}
    experiment = load({"small": row}, rank=grid(rank=[8]))
    assert experiment.ablations["rank"].rows == {"small": {"rank": 8}}
    assert added(experiment) == {}


def test_attention_at_inference_is_varied_with_the_same_weights(load):
    experiment = load(attention=grid(rank=[4], evaluation_attention=["full", "shifted_sparse"]))
    trained = [name for name in added(experiment) if experiment.systems[name].training]
    assert trained == ["longqlora.rank-4.evaluation-attention-full"]
    full, sparse = [evaluated_model(experiment, name) for name in experiment.ablations["attention"].rows]
    assert (full.attention, sparse.attention) == ("full", "shifted_sparse")
    assert full.model_copy(update={"attention": "shifted_sparse"}) == sparse
    assert full.adapter == "results/demo/adapters/longqlora.rank-4.evaluation-attention-full"


def test_another_scaling_is_another_training(load):
    experiment = load(rope=grid(rope_scaling=["linear", "yarn"]))
    assert experiment.systems["longqlora.rope-scaling-linear"].weights_of == "longqlora"
    cell = experiment.systems["longqlora.rope-scaling-yarn"]
    assert cell.training == experiment.systems["longqlora"].training
    assert evaluated_model(experiment, "longqlora.rope-scaling-yarn").extension.scaling == "yarn"


def test_steps_take_the_place_of_epochs(load):
    row = {"target_context": 256, "training": {"epochs": 2.0}}
    training = added(load({"x": row}, steps=grid("x", steps=[5])))["x.steps-5"].training
    assert (training.steps, training.epochs) == (5, None)


def test_the_systems_of_the_configuration_stay_as_they_are(load):
    rows = load().systems
    before = dict(rows)
    systems, _ = add_ablations(rows, {"a": AblationSection(**grid(rank=[4, 16], rope_scaling=["linear", "yarn"]))})
    assert rows == before
    assert rows.items() < systems.items()


def test_adding_the_same_grids_again_adds_nothing(load):
    """A cell that is there is found, whether a row or an earlier grid made it."""
    ablations = {"a": AblationSection(**grid(rank=[4, 16], evaluation_attention=["full", "shifted_sparse"]))}
    once, first = add_ablations(load().systems, ablations)
    twice, second = add_ablations(once, ablations)
    assert once == twice
    assert first == second


def test_the_shipped_ablations_fit_the_demo(root, load):
    shipped = yaml.safe_load((root / "config/ablations.yaml").read_text())["ablations"]
    experiment = load(**shipped)
    for name, ablation in shipped.items():
        rows = experiment.ablations[name].rows
        assert len(rows) == math.prod(map(len, ablation["grid"].values()))
        assert set(rows) <= set(experiment.systems)


@pytest.mark.parametrize("system", ["base", "nobody"])
def test_only_a_trained_system_can_be_varied(load, system):
    with pytest.raises(ConfigError, match=rf"ablations\.a\.system: '{system}' is not a trained system \(legal: .*longqlora"):
        load(a=grid(system, rank=[4]))


def test_a_cell_is_not_varied_again(load):
    with pytest.raises(ConfigError, match=r"ablations\.b\.system: 'longqlora\.rank-4' is not a trained system"):
        load(a=grid(rank=[4]), b=grid("longqlora.rank-4", steps=[5]))


def test_the_cells_of_a_system_that_is_trained_on_another_are_too(load):
    tuned = {"base": "longqlora", "training": {"rank": 2}}
    experiment = load({"tuned": tuned}, a=grid("tuned", rank=[4]))
    assert experiment.systems["tuned.rank-4"].model == "results/demo/weights/longqlora"
    assert experiment.stages_of("tuned.rank-4") == ["longqlora", "tuned.rank-4"]
    with pytest.raises(ConfigError, match=r"^ablations\.a\.grid\.rope_scaling: 'tuned' has the scaling of its base; vary that"):
        load({"tuned": tuned}, a=grid("tuned", rope_scaling=["yarn"]))


def test_a_cell_has_the_first_seed_of_the_varied_system(load):
    several = {"target_context": 256, "training": {"seeds": [5, 6], "rank": 8}}
    other = {"target_context": 256, "training": {"seeds": [9], "rank": 2}}
    experiment = load({"other": other, "several": several}, a=grid("several", rank=[2, 8]))
    assert (experiment.systems["several.rank-2"].seed, experiment.systems["several.rank-2"].training.rank) == (5, 2)
    assert experiment.systems["several.rank-8"].weights_of == "several"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"rnk": [4]}, r"ablations\.a\.grid: unknown key 'rnk'; did you mean 'rank'\?"),
        ({"rank": []}, r"ablations\.a\.grid\.rank: must not be empty"),
        ({"rank": [4, 4]}, r"ablations\.a\.grid\.rank: 4 occurs twice"),
        ({"rope_scaling": ["su"]}, r"ablations\.a\.grid\.rope_scaling\[0\]: 'su' is not one of"),
        ({"rope_scaling": ["ntk", "theta"]}, r"ablations\.a\.grid\.rope_scaling: theta needs systems\.longqlora\.rope_theta"),
        ({}, r"ablations\.a\.grid: names no setting \(legal: rank, steps, rope_scaling, evaluation_attention\)"),
    ],
)
def test_a_grid_that_cannot_run_is_told_before_any_job_starts(load, axes, message):
    with pytest.raises(ConfigError, match=message):
        load(a=grid(**axes))


def test_a_grid_may_have_the_best_scaling_of_a_system_without_a_factor_of_its_own(load):
    experiment = load(a=grid(rope_scaling=["linear", "best"]))
    assert [experiment.systems[name].rope_scaling for name in experiment.ablations["a"].rows] == ["linear", "best"]
    row = {"target_context": 256, "rope_factor": 3.0, "training": {}}
    with pytest.raises(ConfigError, match=r"rope_scaling: best cannot be combined with systems\.x\.rope_factor"):
        load({"x": row}, a=grid("x", rope_scaling=["best"]))


def test_a_system_is_not_overwritten_by_a_cell_of_its_name(load):
    """A row that is called as a cell would be, with other settings."""
    row = {"target_context": 256, "training": {"rank": 2}}
    experiment = load({"longqlora.rank-8": row}, rank=grid(rank=[8]))
    assert experiment.systems["longqlora.rank-8"].training.rank == 2
    (name,) = experiment.ablations["rank"].rows
    assert experiment.systems[name].training.rank == 8
