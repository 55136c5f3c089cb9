"""Models as they are evaluated: adapters on the base, precisions, attention in evaluation, and windows beyond the context."""

import json

import bitsandbytes
import pytest
import torch
from conftest import LONGLORA, evaluated_model, save_base, train_tiny
from peft import PeftModel
from transformers import LlamaForCausalLM, MptConfig

from longqlora.config.settings import RopeExtension
from longqlora.evaluation.evaluated_model import is_within_context, load_evaluated_model
from longqlora.modeling.loading import load_model

CPU = torch.device("cpu")
IDS = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(0))


def load(path: str, **fields):
    return load_evaluated_model(evaluated_model(path, **fields), "cpu", 64)


def logits_of(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("settings", [{}, LONGLORA], ids=["qlora", "lora with embeddings and norms"])
def test_an_adapter_on_the_base_is_the_model_that_was_trained(model_folder, corpus, tmp_path, settings):
    adapter = str(tmp_path / "adapter")
    train_tiny(model_folder, corpus, adapter, steps=3, **settings)
    extension = RopeExtension(target_context=128)
    model = load(model_folder, adapter=adapter, extension=extension)
    base = load_model(model_folder, device=CPU, precision="float32", extension=extension)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(logits_of(model), logits_of(PeftModel.from_pretrained(base, adapter).eval()))
    assert not torch.allclose(logits_of(model), logits_of(load(model_folder, extension=extension)), atol=1e-4)


@pytest.mark.parametrize(("precision", "layer"), [("int8", bitsandbytes.nn.Linear8bitLt), ("nf4", bitsandbytes.nn.Linear4bit)])
def test_quantized_weights_are_loaded_and_give_nearly_the_same_logits(tmp_path, tokenizer, precision, layer):
    folder = save_base(tmp_path / "base", tokenizer, hidden_size=64)
    model = load(folder, precision=precision)
    assert isinstance(model.model.layers[0].mlp.up_proj, layer)
    exact = logits_of(LlamaForCausalLM.from_pretrained(folder).eval())
    assert 0 < (logits_of(model) - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize("width", [16, 48, 64, 80, 288])  # of the layers' inputs: no multiple of a block, but for 64
@pytest.mark.parametrize("inner", [40, 64])  # of the layers' outputs: 40 cannot be repacked
def test_layers_of_any_width_have_the_weights_of_nf4_and_are_read(tmp_path, tokenizer, width, inner):
    shape = {
        "hidden_size": width,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": inner,
    }
    folder = save_base(tmp_path / "base", tokenizer, **shape)
    model, exact = load(folder, precision="nf4"), LlamaForCausalLM.from_pretrained(folder)
    for name in ("gate_proj", "down_proj"):
        layer, original = (getattr(loaded.model.layers[1].mlp, name).weight for loaded in (model, exact))
        error = bitsandbytes.functional.dequantize_4bit(layer.data, layer.quant_state) - original
        assert error.norm() / original.norm() < 0.12  # of NF4 for a normal distribution it is about 0.09
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_weights_have_the_configured_type(model_folder, precision):
    assert load(model_folder, precision=precision).dtype is getattr(torch, precision)


def test_sparse_attention_in_evaluation_differs_from_full_and_sees_no_future_token(model_folder):
    full, sparse = (load(model_folder, attention=attention) for attention in ("full", "shifted_sparse"))
    torch.testing.assert_close(logits_of(sparse)[:, :8], logits_of(full)[:, :8])  # the first half of a group sees all before it
    assert (logits_of(sparse) - logits_of(full))[:, 32:].abs().max() > 1e-3
    for place in (7, 8, 16, 40, 63):
        other = IDS.clone()
        other[0, place] = 500 if IDS[0, place] != 500 else 501
        changed = (logits_of(sparse, other) - logits_of(sparse)).abs().amax(-1)[0] > 1e-6
        assert not changed[:place].any()
        assert changed[place]


def test_a_shorter_sequence_has_the_groups_of_the_window(model_folder):
    sparse = load(model_folder, attention="shifted_sparse")
    torch.testing.assert_close(logits_of(sparse, IDS[:, :41]), logits_of(sparse)[:, :41])


def test_the_group_ratio_reaches_the_attention(model_folder):
    whole = load(model_folder, attention="shifted_sparse", group_ratio=1.0)
    half = load(model_folder, attention="shifted_sparse", group_ratio=0.5)
    assert not torch.allclose(logits_of(whole), logits_of(half), atol=1e-4)


def test_a_window_is_within_the_context_that_the_model_is_extended_to(model_folder):
    base = evaluated_model(model_folder)
    linear = evaluated_model(model_folder, extension=RopeExtension(target_context=128))
    assert [is_within_context(base, window) for window in (64, 65)] == [True, False]
    assert [is_within_context(linear, window) for window in (65, 128, 129)] == [True, True, False]


def test_a_published_model_that_keeps_its_original_length_is_within_the_context_it_is_scaled_to(tmp_path, tokenizer):
    folder = tmp_path / "published"
    save_base(folder, tokenizer)
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    old = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(values | old))
    assert [is_within_context(evaluated_model(folder), window) for window in (65, 128, 129)] == [True, True, False]


def test_dynamic_scaling_adapts_to_any_window(model_folder):
    dynamic = RopeExtension(scaling="dynamic", target_context=128)
    assert is_within_context(evaluated_model(model_folder, extension=dynamic), 10_000)


def test_a_window_that_a_model_with_alibi_cannot_read_is_refused(tmp_path):
    MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=512).save_pretrained(tmp_path / "mpt")
    model = evaluated_model(tmp_path / "mpt")
    assert is_within_context(model, 64)
    with pytest.raises(ValueError, match=r"mpt: a window of 65 tokens is beyond the 64 that the model takes"):
        is_within_context(model, 65)
