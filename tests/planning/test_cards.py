"""Cards by name, by memory, and the probe of the device that is present."""

import pytest
import torch

from longqlora.planning.cards import GIB, PUBLISHED, card_named, card_with_memory, probe


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("v100-32gb", "V100-32GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla V100-PCIE-16GB", "V100-16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("rtx 3090", "RTX-3090"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_card_is_found_by_its_name(name, card):
    assert card_named(name).name == card


@pytest.mark.parametrize("name", ["V100", "A100", "RTX 4080 SUPER", "NVIDIA GeForce RTX 4090 Laptop GPU", "Radeon", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"V100-32GB, T4, .*H100-80GB") as error:
        card_named(name)
    assert repr(name) in str(error.value)


def test_every_card_is_found_by_its_own_name():
    for name, (memory, _, _, has_bfloat16) in PUBLISHED.items():
        card = card_named(name)
        assert card.name == name
        assert card.memory == pytest.approx(memory * GIB)
        assert card.compute == ("bfloat16" if has_bfloat16 else "float16")
        assert card.device == "cuda"


def test_the_h100_has_the_rates_that_were_measured_on_it():
    card = card_named("H100-80GB")
    assert card.matmul_rate == pytest.approx(780e12)
    assert card.bandwidth == pytest.approx(2.96e12)


@pytest.mark.parametrize(("text", "gib"), [("24GB", 24), ("11.5 gb", 11.5), ("80GiB", 80)])
def test_a_card_of_which_only_the_memory_is_known_has_no_rates(text, gib):
    card = card_with_memory(text)
    assert card.memory == gib * GIB
    assert (card.matmul_rate, card.bandwidth) == (None, None)


@pytest.mark.parametrize("text", ["24", "0GB", "-8GB", "24000MB", "a lot"])
def test_a_memory_without_its_unit_is_an_error(text):
    with pytest.raises(ValueError, match="such as 24GB"):
        card_with_memory(text)


def test_the_probe_measures_rates_that_a_cpu_can_have():
    card = probe("cpu")
    assert (card.device, card.compute, card.memory) == ("cpu", "float32", None)
    assert 1e9 < card.matmul_rate < 1e14
    assert 1e8 < card.bandwidth < 1e12


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_probe_of_a_missing_gpu_is_an_error():
    with pytest.raises(ValueError, match="sees no GPU"):
        probe("cuda")
