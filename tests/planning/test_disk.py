"""Estimated disk space, compared with what finished runs have left."""

import pytest
import yaml
from planned_models import DEMO, DEMO_TRAINING, LLAMA_7B, SMOLLM2, SMOLLM2_TRAINING, training

from longqlora.config.experiment import load_experiment
from longqlora.planning import disk
from longqlora.planning.disk import data_bytes, system_bytes
from longqlora.training import trainer


def test_smollm2s_run_is_as_large_as_measured():
    sizes, data = system_bytes(SMOLLM2, SMOLLM2_TRAINING), data_bytes(2_422_199, 0, 49152)
    assert sizes["model"] == pytest.approx(269_065_469, rel=0.01)
    assert sizes["adapter"] == pytest.approx(39_145_625, rel=0.01)
    assert data - disk.TEXT_BYTES * 2_422_199 == pytest.approx(4_844_398, rel=0.01)  # tokens
    assert data == pytest.approx(4_844_398 + 5_435_605, rel=0.2)  # and texts
    assert 2 * (sizes["model"] + sizes["adapter"]) + data == pytest.approx(634_560_810, rel=0.15)


def test_the_demos_run_is_as_large_as_measured():
    in_full = ["embed_tokens", "norm"]
    lora = {"method": "lora", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "modules_to_save": in_full}
    systems = [system_bytes(DEMO, DEMO_TRAINING.model_copy(update=each)) for each in ({}, {}, {}, {}, lora, {"method": "full"})]
    assert sum(each["model"] for each in systems) == pytest.approx(13_462_036, rel=0.15)
    assert sum(each["adapter"] for each in systems) == pytest.approx(4_628_297, rel=0.2)
    texts = disk.TEXT_BYTES * 637_377 + disk.INSTRUCTION_TEXT_BYTES * 248_446
    assert texts == pytest.approx(2_038_768 + 227_255, rel=0.15)
    assert data_bytes(637_377, 248_446, 1024) - texts == pytest.approx(3_462_183, rel=0.15)  # tokens


def test_data_take_at_most_what_the_longest_texts_would(root):
    demo = load_experiment(yaml.safe_load((root / "config/config.yaml").read_text()))
    measured = 3_462_183 + 2_038_768 + 227_255
    assert measured < disk.most_data_bytes(demo, vocab_size=1024) < 10 * measured
    assert disk.most_data_bytes(demo, vocab_size=2**16 + 1) > disk.most_data_bytes(demo, vocab_size=2**16)


def test_as_many_checkpoints_count_as_a_training_keeps():
    assert disk.KEPT_CHECKPOINTS == trainer.KEPT_CHECKPOINTS


def test_a_run_of_all_weights_has_no_adapter_and_no_second_merge():
    sizes = system_bytes(LLAMA_7B, training(method="full", optimizer="paged_adamw_8bit"))
    assert (sizes["adapter"], sizes["merging"]) == (0, 0)
    assert sizes["model"] == pytest.approx(13.5e9, rel=0.01)
    assert sizes["checkpoints"] == pytest.approx(2 * 6 * 6.74e9, rel=0.01)


def test_checkpoints_are_as_large_as_adapter_and_optimizer_state():
    assert system_bytes(LLAMA_7B, training())["checkpoints"] == pytest.approx(2 * 1.9e9, rel=0.02)
