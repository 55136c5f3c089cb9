"""Systems with everything filled in, and what each is evaluated as."""

import json
import shutil

import pytest

from longqlora.config.experiment import load_experiment
from longqlora.config.settings import EvaluatedModel, Protocol, RopeExtension
from longqlora.config.systems import evaluated_model, protocol_at, untrained_model
from longqlora.config.validation import ConfigError
from longqlora.preflight import check_inputs

TO_256 = RopeExtension(scaling="linear", target_context=256)
BASE = EvaluatedModel(path="demo/model", precision="float32", group_ratio=0.25)


def test_a_systems_own_training_wins_over_the_experiments(demo):
    demo["systems"]["longqlora"]["training"] = {"rank": 4, "epochs": 2.0, "logging_steps": 3}
    system = load_experiment(demo).systems["longqlora"]
    training = system.training
    assert (training.rank, training.epochs, training.steps, training.alpha) == (4, 2, None, 16)
    assert (system.progress.logging_steps, system.progress.checkpoint_steps) == (3, 50)


def test_a_default_that_is_written_out_wins_too(demo):
    demo["systems"]["longqlora"]["training"] = {"rank": 64, "memory": "smallest"}
    training = load_experiment(demo).systems["longqlora"].training
    assert (training.rank, training.memory) == (64, "smallest")


def test_a_published_model_is_evaluated_as_it_is_with_its_own_tokenizer(demo):
    demo["systems"]["mpt"] = {"model": "owner/mpt"}
    demo["systems"]["own"] = {"model": "owner/name", "tokenizer": "owner/other"}
    systems = load_experiment(demo).systems
    assert systems["mpt"].tokenizer == systems["mpt"].model == "owner/mpt"
    assert systems["own"].tokenizer == "owner/other"
    assert systems["base"].model == demo["base_model"]["path"]
    assert systems["base"].tokenizer == systems["longqlora"].tokenizer == "demo/model"
    assert {systems[name].rope_scaling for name in ("base", "mpt", "own")} == {"linear"}


def test_untrained_rows_stand_before_the_trained_ones_and_are_the_base_by_each_scaling(demo):
    demo["untrained_rows"] = 512
    demo["systems"]["untrained-yarn"] = {"label": "mine", "target_context": 256, "rope_scaling": "yarn"}
    experiment = load_experiment(demo)
    assert experiment.rows[:7] == [
        "base", "interpolated", "dynamic", "untrained-linear", "untrained-dynamic", "untrained-ntk", "longlora-lora",
    ]  # fmt: skip
    assert experiment.systems["untrained-yarn"].label == "mine"  # a row that is written out wins
    assert experiment.systems["untrained-ntk"].label == "NTK to 512, untrained"
    for scaling in ("linear", "dynamic", "ntk"):
        model = evaluated_model(experiment, f"untrained-{scaling}")
        assert model.path == experiment.base_model
        assert model.extension == RopeExtension(scaling=scaling, target_context=512)


def test_the_base_row_is_evaluated_as_usual_if_there_are_several(demo):
    others = {"sparse": {"evaluation_attention": "shifted_sparse"}, "small": {"precision": "nf4"}}
    demo["systems"] = others | demo["systems"]
    assert load_experiment(demo).base_row == "base"
    del demo["systems"]["base"]
    assert load_experiment(demo).base_row == "small"


def test_a_scaled_model_has_no_untrained_rows_which_is_told_once(demo, tmp_path):
    folder = shutil.copytree("demo/model", tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    demo |= {"base_model": {"path": str(folder)}, "untrained_rows": 512, "systems": {"base": {}}}
    with pytest.raises(ConfigError) as caught:
        load_experiment(demo, check_inputs)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        f"untrained_rows: {folder}: positions are scaled already (llama3): only rope_scaling: llama3 extends"
    )


def test_untrained_rows_at_the_models_own_context_are_refused(demo):
    demo["untrained_rows"] = 128
    message = "untrained_rows: 128 is the base model's own context, which needs no extension"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        load_experiment(demo, check_inputs)


def test_a_share_of_full_attention_for_all_systems_leaves_those_with_full_attention_as_they_are(demo):
    demo["training"]["full_attention_share"] = 0.2
    systems = load_experiment(demo).systems
    assert systems["longqlora"].training.full_attention_share == 0.2
    assert systems["longqlora-full-attention"].training.full_attention_share == 0
    demo["training"]["attention"] = "full"
    with pytest.raises(ConfigError, match=r"systems\.longqlora\.training\.full_attention_share: has no effect with attention"):
        load_experiment(demo)


def test_a_mistake_in_untrained_rows_names_this_key_once(demo):
    demo["untrained_rows"] = 100
    with pytest.raises(ConfigError) as caught:
        load_experiment(demo, check_inputs)
    message = "untrained_rows: demo/model: target_context 100 is below the model's own context of 128 tokens"
    assert str(caught.value) == message


def test_the_best_scaling_is_chosen_on_texts_of_the_corpus_if_nothing_is_trained(demo):
    demo["systems"] = {"x": {"target_context": 256, "rope_scaling": "best"}}
    assert load_experiment(demo, check_inputs).systems["x"].rope_scaling == "best"
    del demo["corpus"]
    with pytest.raises(
        ConfigError, match=r"^systems\.x\.rope_scaling: best is chosen on training texts; add the section corpus:$"
    ):
        load_experiment(demo)


def test_the_best_scaling_needs_a_context_to_extend(demo):
    demo["systems"]["x"] = {"target_context": 128, "rope_scaling": "best"}
    with pytest.raises(
        ConfigError, match=r"^systems\.x: demo/model: target_context 128 is the model's own context: rope_scaling"
    ):
        load_experiment(demo, check_inputs)


def test_trained_and_untrained_rows_of_the_base_at_the_same_context_can_be_compared(demo):
    extra = {
        "untrained-512": {"target_context": 512},
        "unmerged": {"weights_of": "longqlora", "merged": False},
        "sparse": {"weights_of": "longqlora", "evaluation_attention": "shifted_sparse"},
        "4-bit": {"target_context": 256, "precision": "nf4"},
        "other": {"model": "owner/name", "target_context": 512},
        "to-1024": {"target_context": 1024, "training": {}},
    }
    demo["systems"] |= extra
    trained = ["longlora-lora", "longlora-full", "longqlora", "longqlora-full-attention", "unmerged", "tuned", "tuned-unmerged"]
    chain(demo)["systems"]["tuned-unmerged"] = {"weights_of": "tuned", "merged": False}
    assert load_experiment(demo).extended_rows == {
        256: {"trained": trained, "untrained": ["interpolated", "dynamic"]},
        512: {"trained": ["longqlora-512"], "untrained": ["untrained-512"]},
    }


@pytest.fixture
def evaluated(demo):
    """Add a system to the demo and return what it is evaluated as."""

    def model(name: str, **system) -> EvaluatedModel:
        demo["systems"][name] = system or demo["systems"][name]
        return evaluated_model(load_experiment(demo), name)

    return model


def weights_of(name: str, **changes) -> EvaluatedModel:
    return BASE.model_copy(update={"path": f"results/demo/weights/{name}", **changes})


def on_the_base(**changes) -> EvaluatedModel:
    return BASE.model_copy(update={"extension": TO_256, **changes})


def test_rows_of_the_demo_are_evaluated_as_they_were_made(evaluated):
    assert evaluated("base") == BASE
    assert evaluated("interpolated") == on_the_base()
    dynamic = RopeExtension(scaling="dynamic", target_context=256)
    assert evaluated("dynamic") == on_the_base(extension=dynamic)
    for name in ("longqlora", "longqlora-512", "longlora-full", "chat"):
        assert evaluated(name) == weights_of(name)


def test_before_its_training_a_system_is_the_base_with_the_same_positions(demo):
    demo["systems"]["chat"] |= {"rope_scaling": "yarn", "precision": "nf4"}
    before = untrained_model(load_experiment(demo), "chat")
    assert before == on_the_base(extension=RopeExtension(scaling="yarn", target_context=256), precision="nf4")


def test_an_adapter_that_is_not_merged_is_put_on_the_base(evaluated):
    model = evaluated("x", target_context=256, training={}, merged=False, precision="nf4", rope_scaling="yarn")
    yarn = RopeExtension(scaling="yarn", target_context=256)
    assert model == on_the_base(adapter="results/demo/adapters/x", precision="nf4", extension=yarn)


def test_the_weights_of_another_system_are_evaluated_in_another_way(evaluated):
    model = evaluated("x", weights_of="longqlora", evaluation_attention="shifted_sparse")
    assert model == weights_of("longqlora", attention="shifted_sparse")
    model = evaluated("y", weights_of="longqlora", merged=False, precision="int8")
    assert model == on_the_base(adapter="results/demo/adapters/longqlora", precision="int8")


def test_a_system_with_seeds_is_there_once_for_each_and_the_first_has_its_name(demo):
    before = load_experiment(demo)
    demo["systems"]["longqlora"]["training"]["seeds"] = [1, 7]
    experiment = load_experiment(demo, check_inputs)
    assert set(experiment.systems) - set(before.systems) == {"longqlora.seed-7"}
    first, other = (experiment.systems[name] for name in ("longqlora", "longqlora.seed-7"))
    assert first == before.systems["longqlora"].model_copy(update={"label": "LongQLoRA to 256, seed 1"})
    assert other == first.model_copy(update={"label": "LongQLoRA to 256, seed 7", "seed": 7})
    assert experiment.rows.index("longqlora.seed-7") == experiment.rows.index("longqlora") + 1
    assert experiment.row_labels == {"longqlora": "LongQLoRA to 256", "longqlora.seed-7": "LongQLoRA to 256"}
    assert (experiment.untrained, before.row_labels) == ([], {})


def test_seeds_of_all_systems_leave_out_what_is_not_trained_and_who_has_one_of_its_own(demo):
    demo["training"]["seeds"] = [2, 3]
    demo["systems"]["longlora-full"]["training"]["seeds"] = [5]
    demo["systems"] = {name: demo["systems"][name] for name in ("base", "longlora-full", "chat")}
    systems = load_experiment(demo).systems
    assert {name: system.seed for name, system in systems.items()} == {
        "base": 1, "longlora-full": 5, "chat": 2, "chat.seed-3": 3
    }  # fmt: skip


def test_a_seed_goes_on_from_the_same_seed_of_its_base(demo):
    demo["systems"]["longqlora"]["training"]["seeds"] = [1, 2, 3]
    systems = load_experiment(chain(demo, training={"seeds": [3, 4, 1, 2]}), check_inputs).systems
    found = {systems[name].seed: systems[name].base for name in systems if systems[name].base}
    assert found == {3: "longqlora.seed-3", 4: "longqlora", 1: "longqlora", 2: "longqlora.seed-2"}


def test_a_name_that_a_seed_takes_is_refused_and_a_mistake_is_told_once(demo):
    demo["systems"]["longqlora"]["training"]["seeds"] = [1, 7]
    demo["systems"]["longqlora.seed-7"] = {"label": "mine"}
    with pytest.raises(ConfigError, match=r"^systems\.longqlora\.seed-7: is the name of a seed of 'longqlora'; choose another"):
        load_experiment(demo)
    del demo["systems"]["longqlora.seed-7"]
    demo["systems"]["longqlora"]["target_context"] = 64
    with pytest.raises(ConfigError) as caught:
        load_experiment(demo, check_inputs)
    assert (
        str(caught.value) == "systems.longqlora: demo/model: target_context 64 is below the model's own context of 128 tokens"
    )


@pytest.mark.parametrize("other", [{}, {"training": {"seeds": [3, 4]}}])
def test_the_label_of_a_row_with_seeds_is_that_of_no_other_row(demo, other):
    demo["systems"]["longqlora"] |= {"label": "same", "training": {"seeds": [1, 7]}}
    demo["systems"]["tuned"] = {"label": "same", "target_context": 256} | other
    with pytest.raises(ConfigError, match=r"^systems: every label must be different, but 'same' occurs 2 times$"):
        load_experiment(demo)


def chain(demo, **changes) -> dict:
    """The demo with a system that is trained on its row ``longqlora``."""
    demo["systems"]["tuned"] = {"base": "longqlora", "training": {"data": "sft", "method": "lora"}} | changes
    return demo


def test_a_system_that_is_trained_on_another_starts_from_its_merged_weights_and_has_its_context(demo):
    demo["systems"]["longqlora"] |= {"rope_scaling": "yarn", "merged": False}
    experiment = load_experiment(chain(demo), check_inputs)
    system = experiment.systems["tuned"]
    assert (system.model, system.tokenizer) == ("results/demo/weights/longqlora", "demo/model")
    assert (system.target_context, system.rope_scaling) == (256, "yarn")
    assert system.label == "tuned, trained on LongQLoRA to 256"
    assert (system.training.data, system.training.method) == ("sft", "lora")
    yarn = RopeExtension(scaling="yarn", target_context=256)
    assert untrained_model(experiment, "tuned") == weights_of("longqlora", extension=yarn)
    assert evaluated_model(experiment, "tuned") == weights_of("tuned")
    assert experiment.stages_of("tuned") == ["longqlora", "tuned"]
    assert experiment.base_row == "base"


def test_an_adapter_that_was_trained_on_another_system_is_put_on_the_merged_weights_of_that_one(demo):
    demo["systems"]["unmerged"] = {"weights_of": "tuned", "merged": False, "label": "unmerged"}
    experiment = load_experiment(chain(demo), check_inputs)
    expected = weights_of("longqlora", adapter="results/demo/adapters/tuned", extension=TO_256)
    assert evaluated_model(experiment, "unmerged") == expected


def test_systems_are_trained_on_each_other_in_any_order_and_extended_further(demo):
    last = {"base": "tuned", "target_context": 512, "label": "last", "training": {"method": "full"}}
    demo["systems"] = {"last": last} | demo["systems"]
    demo["systems"]["again"] = {"base": "last", "label": "again", "training": {}}
    experiment = load_experiment(chain(demo, label="tuned"), check_inputs)
    assert experiment.stages_of("again") == ["longqlora", "tuned", "last", "again"]
    assert [experiment.systems[name].target_context for name in experiment.stages_of("again")] == [256, 256, 512, 512]
    assert experiment.systems["again"].model == "results/demo/weights/last"


@pytest.mark.parametrize(("scaling", "further"), [("ntk", "yarn"), ("ntk", "ntk"), ("yarn", "yarn"), ("dynamic", "dynamic")])
def test_the_scaling_of_a_base_can_be_extended_where_transformers_can(demo, scaling, further):
    demo["systems"]["longqlora"]["rope_scaling"] = scaling
    assert load_experiment(chain(demo, target_context=384, rope_scaling=further), check_inputs)


def test_a_theta_is_kept_by_what_is_trained_on_it_and_enlarged_for_a_longer_context(demo):
    demo["systems"]["longqlora"] |= {"rope_scaling": "theta", "rope_theta": 5000.0}
    assert load_experiment(chain(demo), check_inputs).systems["tuned"].rope_theta is None
    assert load_experiment(chain(demo, target_context=512, rope_theta=9000.0), check_inputs)
    with pytest.raises(ConfigError, match=r"^systems\.tuned\.rope_theta: missing; rope_scaling: theta needs it"):
        load_experiment(chain(demo, target_context=512), check_inputs)
    with pytest.raises(ConfigError, match=r"rope_theta 4000 is not above the model's own rope_theta, 5000$"):
        load_experiment(chain(demo, target_context=512, rope_theta=4000.0), check_inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "nobody"}, r"base: 'nobody' is not a trained system \(legal: longlora-lora, .*, chat, circle\)$"),
        ({"base": "interpolated"}, r"base: 'interpolated' is not trained; leave base out, and give target_context and rope_sc"),
        ({"base": "tuned"}, r"base: 'tuned' is this system itself, or is trained on it$"),
        ({"base": "circle"}, r"base: 'circle' is this system itself, or is trained on it$"),
        ({"base": "same"}, r"base: 'same' has the weights of 'longqlora'; write base: longqlora$"),
        ({"model": "demo/model"}, r"base: cannot be combined with model: the model of 'longqlora' is trained on$"),
        ({"weights_of": "chat"}, r"base: comes from 'chat', whose weights this system has; leave it out$"),
        (
            {"target_context": 128},
            r"results/demo/weights/longqlora: target_context 128 is below the model's own context of 256",
        ),
        (
            {"rope_scaling": "yarn"},
            r"rope_scaling: has no effect without a target_context above that of 'longqlora', 256, whose",
        ),
        ({"rope_factor": 4.0}, r"target_context 256 is the model's own context: rope_factor and rope_theta have no effect$"),
        (
            {"target_context": 512, "rope_scaling": "yarn"},
            r"positions are scaled already \(linear\): only rope_scaling: linear",
        ),
        (
            {"target_context": 512, "rope_factor": 2.0},
            r"rope_factor 2 is not above the model's own factor, 2, which it replaces",
        ),
    ],
)
def test_a_base_that_makes_no_sense_is_told(demo, changes, message):
    demo["systems"]["circle"] = {"base": "tuned", "training": {}, "label": "circle"}
    demo["systems"]["same"] = {"weights_of": "longqlora", "merged": False}
    with pytest.raises(ConfigError, match=rf"(?m)^systems\.tuned[:.].*{message}") as caught:
        load_experiment(chain(demo, **changes), check_inputs)
    assert "systems.tuned.target_context: missing" not in str(caught.value)


def test_a_chosen_scaling_is_kept_by_what_is_trained_on_it_whatever_the_model_was_scaled_by(demo, tmp_path):
    demo["systems"]["longqlora"]["rope_scaling"] = "best"
    demo["systems"]["again"] = {"base": "tuned", "label": "again", "merged": False, "training": {}}
    assert load_experiment(chain(demo), check_inputs).systems["again"].rope_scaling == "best"
    shutil.copytree("demo/model", folder := tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    rope = {"type": "linear", "factor": 1.5, "rope_theta": 10000.0}  # the old form, with the original length beside it
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": rope, "rope_parameters": None}))
    demo["base_model"] = {"path": str(folder)}
    demo["systems"] = {name: demo["systems"][name] for name in ("longqlora", "tuned", "again")}
    assert load_experiment(demo, check_inputs).systems["again"].target_context == 256


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": "linear"}, {"rope_scaling": "ntk"}])
def test_a_scaling_that_is_chosen_only_in_the_run_is_not_extended_further(demo, changes):
    demo["systems"]["longqlora"]["rope_scaling"] = "best"
    with pytest.raises(ConfigError, match=r"^systems\.tuned\.target_context: 'longqlora' is not extended further, [^\n]*$"):
        load_experiment(chain(demo, target_context=512, **changes), check_inputs)
    with pytest.raises(ConfigError) as caught:
        load_experiment(chain(demo, target_context=128), check_inputs)
    assert "extended further" not in str(caught.value)


def test_a_base_needs_a_training(demo):
    demo["systems"]["tuned"] = {"base": "longqlora"}
    message = r"^systems\.tuned\.base: needs 'training'; to evaluate .* write weights_of: longqlora$"
    with pytest.raises(ConfigError, match=message):
        load_experiment(demo, check_inputs)


def test_a_further_extension_of_a_model_on_the_hub_is_checked_before_its_first_training(demo):
    demo["base_model"] = {"path": "owner/name"}
    demo["systems"] = {"longqlora": demo["systems"]["longqlora"]}
    assert load_experiment(chain(demo, target_context=512), check_inputs)
    with pytest.raises(ConfigError, match=r"target_context 128 is below the model's own context of 256 tokens"):
        load_experiment(chain(demo, target_context=128), check_inputs)
    with pytest.raises(ConfigError, match=r"positions are scaled already \(linear\)"):
        load_experiment(chain(demo, target_context=512, rope_scaling="yarn"), check_inputs)


@pytest.mark.parametrize("folder", ["demo/model/", "./demo/model", "demo//model", "demo/../demo/model"])
def test_a_folder_is_the_same_in_every_spelling(demo, folder):
    before = load_experiment(demo)
    demo["base_model"] = {"path": folder}
    demo["systems"]["base"] |= {"model": folder, "tokenizer": folder}
    assert load_experiment(demo) == before


def test_settings_of_an_adapter_do_not_change_a_system_without_one(demo):
    before = load_experiment(demo).systems["longlora-full"]
    demo["training"] |= {"rank": 4, "alpha": 8, "dropout": 0.5, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    assert load_experiment(demo).systems["longlora-full"] == before


@pytest.mark.parametrize(("common", "own"), [({"steps": 50}, {"epochs": 2.0}), ({"epochs": 2.0}, {"steps": 50})])
def test_a_system_may_give_its_length_in_the_other_unit(demo, common, own):
    del demo["training"]["steps"]
    demo["training"] |= common
    demo["systems"]["longqlora"]["training"] = own
    training = load_experiment(demo).systems["longqlora"].training
    assert (training.steps, training.epochs) == (own.get("steps"), own.get("epochs"))


@pytest.mark.parametrize(
    ("settings", "stride"),
    [({}, 128), ({"stride": 32}, 32), ({"protocol": "longqlora"}, 128), ({"protocol": "longlora", "lengths": [512]}, 256)],
)
def test_the_stride_is_that_of_the_protocol_unless_it_is_given(demo, settings, stride):
    demo["evaluation"] |= settings
    demo["retrieval"] = {"tasks": []}
    evaluation = load_experiment(demo).evaluation
    assert protocol_at(evaluation, 128) == Protocol(name=evaluation.protocol, window=128, stride=stride)
