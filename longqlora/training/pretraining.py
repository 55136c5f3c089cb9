"""A small tokenizer and a small LLaMA, trained from scratch: the demo's stand-in for LLaMA2."""

import logging
import time

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longqlora.data.readers import read_documents
from longqlora.data.token_files import encode
from longqlora.modeling.chunked_loss import next_token_loss
from longqlora.modeling.devices import compute_dtype, find_device

log = logging.getLogger(__name__)


def train_tokenizer(texts, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (no text is unknown to it) with LLaMA's special tokens.

    Args:
        texts: iterable of strings.
        vocab_size: number of pieces, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


class Muon(torch.optim.Optimizer):
    """The update of ``torch.optim.Muon`` (momentum 0.95, Nesterov, no weight decay), for all matrices of a shape at once and in
    float32.

    torch's own orthogonalises one matrix after the other, in bfloat16: on a CPU that only emulates that type it takes longer
    than the forward and the backward pass together.
    """

    def __init__(self, matrices, lr: float):
        groups = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": same_shape} for same_shape in groups.values()], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            gradients = torch.stack([matrix.grad for matrix in group["params"]])  # [matrices, rows, columns]
            state = self.state[group["params"][0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradients)).lerp_(gradients, 0.05)
            rows, columns = gradients.shape[1:]
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            for matrix, direction in zip(group["params"], orthogonalised(gradients.lerp(momentum, 0.95)), strict=True):
                matrix.sub_(direction, alpha=rate)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Each of ``[matrices, rows, columns]`` with its singular values drawn towards 1 (mostly to within 0.7 to 1.2): Muon's five
    steps of a quintic Newton-Schulz iteration."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT  # the products are then of the smaller side
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ wide
    return wide if wide.shape == matrices.shape else wide.mT


def optimizers_of(model: LlamaForCausalLM, steps: int, muon_learning_rate: float, adamw_learning_rate: float):
    """Muon for the matrices of the layers, AdamW for embeddings and norms, and the schedule of each.

    Both learning rates rise over the first 5 % of the steps and fall to zero over the last 40 %.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers" not in name]
    optimizers = [
        Muon(matrices, lr=muon_learning_rate),
        torch.optim.AdamW(others, lr=adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def share_of_peak(step: int) -> float:
        return min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.4 * steps))

    return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak) for optimizer in optimizers]


def pretrain(
    tokens: torch.Tensor,
    *,
    vocab_size: int,
    bos_token_id: int,
    eos_token_id: int,
    context_length: int,
    architecture: dict,
    steps: int,
    tokens_per_step: int,
    muon_learning_rate: float,
    adamw_learning_rate: float,
    seed: int,
) -> LlamaForCausalLM:
    """Train a LLaMA from random weights on windows drawn from a stream of tokens.

    Args:
        tokens: ``[num_tokens]``, the corpus as one stream.
        vocab_size, bos_token_id, eos_token_id: of the tokenizer.
        context_length: tokens of a window, and the context that the model is made for.
        architecture: further fields of ``LlamaConfig`` (hidden_size, num_hidden_layers, …).
        steps, tokens_per_step: how long to train.
        muon_learning_rate, adamw_learning_rate: peak values.
        seed: of the weights and of the windows.

    Raises:
        ValueError: if the corpus is shorter than one window.
    """
    if len(tokens) <= context_length:
        raise ValueError(f"{len(tokens)} tokens are too few for a window of {context_length}")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            max_position_embeddings=context_length,
            tie_word_embeddings=True,
            **architecture,
        )
    )
    model.set_attn_implementation("eager")  # in windows this short its backward pass is faster than the fused kernel's on a CPU
    log.info("model: %.2f M parameters", model.num_parameters() / 1e6)
    optimizers, schedules = optimizers_of(model, steps, muon_learning_rate, adamw_learning_rate)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context_length)
    dtype, started = compute_dtype(find_device("cpu")), time.perf_counter()
    for step in tqdm(range(1, steps + 1), "pre-training", unit="step", disable=None):
        starts = torch.randint(len(tokens) - context_length, (tokens_per_step // context_length, 1), generator=generator)
        windows = tokens[starts + offsets]  # [b, n]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            loss = next_token_loss(model, windows, windows)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            rate = step * tokens_per_step / (time.perf_counter() - started)
            log.info("step %d of %d: loss %.3f, %.0f tokens/s", step, steps, loss.item(), rate)
    return model.eval()


def pretrain_model(
    *, shards: list[str], tokenizer: str, output: str, context_length: int, architecture: dict, pretraining: dict, seed: int
) -> None:
    """Pre-train a model on the documents of ``shards`` and write it to ``output``, its tokenizer beside it.

    Args:
        shards: files of :func:`longqlora.data.readers.read_documents`.
        tokenizer: folder of the tokenizer.
        output: folder of the model.
        context_length, architecture, seed: see :func:`pretrain`.
        pretraining: steps, tokens_per_step, muon_learning_rate, adamw_learning_rate.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    texts = (document.text for shard in shards for document in read_documents(shard))
    stream = numpy.concatenate([numpy.array([*ids, tokenizer.eos_token_id]) for ids in encode(tokenizer, texts)])
    log.info("corpus: %d tokens", len(stream))
    model = pretrain(
        torch.from_numpy(stream),
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        context_length=context_length,
        architecture=architecture,
        seed=seed,
        **pretraining,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
