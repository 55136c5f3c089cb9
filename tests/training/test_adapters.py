import pytest
import torch
from conftest import SETTINGS, save_base, tiny_llama
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import Qwen3Config, Qwen3ForCausalLM

from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.modeling.loading import load_model
from longqlora.training.adapters import FLOAT32, BaseDtypes, add_adapter, base_dtypes

CPU = torch.device("cpu")
BFLOAT16 = BaseDtypes(weights=torch.bfloat16, layers=torch.bfloat16)
FLOAT16 = BaseDtypes(weights=torch.float32, layers=torch.float16)
IDS = torch.arange(3, 60)[None]


@pytest.fixture
def llama(tmp_path, tokenizer) -> str:
    return save_base(tmp_path / "llama", tokenizer, torch.bfloat16)


@pytest.fixture
def qwen3(tmp_path) -> str:
    torch.manual_seed(0)
    shape = tiny_llama().config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    Qwen3ForCausalLM(Qwen3Config(**{key: shape[key] for key in keys}, head_dim=8)).save_pretrained(tmp_path / "qwen3")
    return str(tmp_path / "qwen3")


def adapted(base: str, dtypes: BaseDtypes, **settings):
    """A model with an adapter that is not zero, ready to train."""
    model = use_chunked_loss(load_model(base, device=CPU, precision="nf4"))
    torch.manual_seed(1)
    model = add_adapter(model, SETTINGS.model_copy(update=settings), base=dtypes)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.train()


def loss_and_gradients(model, autocast: torch.dtype | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def activation_types(model, autocast: torch.dtype) -> dict[str, set[torch.dtype]]:
    """The dtypes that arrive in the decoder layers (``residual``) and in their linear layers, of which o_proj shows what
    attention returns."""
    seen = {"residual": set(), "linear": set()}

    def note(kind):
        return lambda module, inputs: seen[kind].add(inputs[0].dtype)

    for layer in model.get_base_model().get_decoder().layers:
        layer.register_forward_pre_hook(note("residual"))
        for name, module in layer.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(note("linear"))
    loss_and_gradients(model, autocast)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtypes", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
def test_the_layers_work_in_16_bit_and_the_adapter_is_in_32(request, family, dtypes):
    model = adapted(request.getfixturevalue(family), dtypes)
    seen = activation_types(model, dtypes.layers)
    assert seen == {"residual": {dtypes.weights}, "linear": {dtypes.layers}}
    kinds = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {kinds.pop(name) for name in list(kinds) if "lora_" in name} == {torch.float32}
    assert {kinds.pop(name) for name in list(kinds) if "_proj" in name} == {torch.uint8}
    assert set(kinds.values()) == {dtypes.weights}
    assert any("embed_tokens" in name for name in kinds)
    assert any("input_layernorm" in name for name in kinds)
    assert any("lm_head" in name for name in kinds) or model.config.tie_word_embeddings
    assert {weight.requires_grad for name, weight in model.named_parameters() if "lora_" not in name} == {False}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtypes", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
def test_gradients_in_16_bit_are_close_to_those_in_32(request, family, dtypes, checkpointing):
    base = request.getfixturevalue(family)
    expected_loss, expected = loss_and_gradients(adapted(base, FLOAT32))
    model = adapted(base, dtypes)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    loss, found = loss_and_gradients(model, dtypes.layers)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=5e-3)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype is torch.float32
        assert gradient.isfinite().all()
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.99, name
        assert gradient.norm().item() == pytest.approx(expected[name].norm().item(), rel=0.05), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_on_a_cpu_the_base_is_what_peft_prepares(tmp_path, tokenizer, stored):
    base = save_base(tmp_path / "base", tokenizer, stored)
    ours = adapted(base, FLOAT32)
    reference = prepare_model_for_kbit_training(
        use_chunked_loss(load_model(base, device=CPU, precision="nf4")), use_gradient_checkpointing=False
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    reference = get_peft_model(reference, lora).train()
    reference.load_state_dict(ours.state_dict(), strict=False)
    assert [(name, p.dtype, p.requires_grad) for name, p in ours.named_parameters()] == [
        (name, p.dtype, p.requires_grad) for name, p in reference.named_parameters()
    ]
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(ours), loss_and_gradients(reference)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)  # sums in another order
    assert not any(module._forward_hooks for module in ours.modules())


@pytest.mark.parametrize("dtypes", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
def test_modules_that_are_trained_whole_are_in_32_bit_and_their_layers_in_16(llama, dtypes):
    model = adapted(llama, dtypes, modules_to_save=["embed_tokens", "input_layernorm", "norm"])
    seen = activation_types(model, dtypes.layers)
    assert seen == {"residual": {torch.float32}, "linear": {dtypes.layers}}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained.values())


@pytest.mark.parametrize(("capability", "dtypes"), [((8, 0), BFLOAT16), ((7, 0), FLOAT16)])
def test_the_types_follow_the_gpu(monkeypatch, capability, dtypes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert base_dtypes(torch.device("cuda")) == dtypes
    assert base_dtypes(CPU) == FLOAT32
