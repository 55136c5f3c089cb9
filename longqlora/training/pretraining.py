"""A small tokenizer and a small LLaMA, trained from scratch; the demo uses them in place of LLaMA2."""

import logging
import time
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longqlora.config.settings import DemoArchitecture, DemoPretraining
from longqlora.data.readers import read_documents
from longqlora.data.token_files import encode
from longqlora.modeling.chunked_loss import next_token_loss
from longqlora.modeling.devices import find_device, keep_freed_memory

log = logging.getLogger(__name__)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text, with LLaMA's special tokens.

    Args:
        texts: to train on.
        vocab_size: number of tokens in the vocabulary, special tokens included.
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
    """The optimizer Muon (Jordan et al. 2024) with momentum 0.95, Nesterov and no weight decay. Its updates are those of
    ``torch.optim.Muon``, but computed in float32 and for all matrices of the same shape at once.

    ``torch.optim.Muon`` orthogonalizes the matrices one by one in bfloat16. On a CPU that only emulates bfloat16, this takes
    longer than the forward and backward passes together.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float):
        groups: dict[torch.Size, list[torch.Tensor]] = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": same_shape} for same_shape in groups.values()], {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            gradients = torch.stack([matrix.grad for matrix in group["params"]])  # [matrices, rows, columns]
            state = self.state[group["params"][0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradients)).lerp_(gradients, 0.05)
            rows, columns = gradients.shape[1:]
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            for matrix, direction in zip(group["params"], orthogonalize(gradients.lerp(momentum, 0.95)), strict=True):
                matrix.sub_(direction, alpha=rate)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximately orthogonalize matrices, by Muon's five steps of a quintic Newton-Schulz iteration.

    Args:
        matrices: ``[matrices, rows, columns]``

    Returns:
        ``[matrices, rows, columns]``, with the singular values moved to between about 0.7 and 1.2.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT  # so that wide @ wide.mT has the smaller size
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ wide
    return wide if wide.shape == matrices.shape else wide.mT


def optimizers_of(model: LlamaForCausalLM, steps: int, muon_learning_rate: float, adamw_learning_rate: float):
    """Muon for the matrices of the layers, AdamW for embeddings and norms, and a schedule for each.

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


def make_model(tokenizer, context_length: int, architecture: DemoArchitecture, seed: int) -> LlamaForCausalLM:
    """A LLaMA with random weights.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        context_length: in tokens.
        architecture: shape of the model.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=context_length,
            tie_word_embeddings=True,
            **architecture.model_dump(),
        )
    )


def pretrain(model: LlamaForCausalLM, tokens: torch.Tensor, settings: DemoPretraining, seed: int) -> None:
    """Train a model, in place, on windows drawn at random from a stream of tokens.

    Args:
        model: its context length is the length of the windows.
        tokens: ``[num_tokens]``, the corpus as one stream.
        settings: number and size of the steps, and learning rates.
        seed: of the windows.

    Raises:
        ValueError: if the corpus is shorter than one window.
    """
    window, steps, device = model.config.max_position_embeddings, settings.steps, find_device("cpu")
    if len(tokens) <= window:
        raise ValueError(f"{len(tokens)} tokens are too few for a window of {window}")
    keep_freed_memory(device)
    optimizers, schedules = optimizers_of(model, steps, settings.muon_learning_rate, settings.adamw_learning_rate)
    generator, offsets = torch.Generator().manual_seed(seed), torch.arange(window)
    started = time.perf_counter()
    for step in tqdm(range(1, steps + 1), "pre-training", unit="step", disable=None):
        starts = torch.randint(len(tokens) - window, (settings.tokens_per_step // window, 1), generator=generator)
        windows = tokens[starts + offsets]  # [b, n]
        loss = next_token_loss(model, windows, windows)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            rate = step * settings.tokens_per_step / (time.perf_counter() - started)
            log.info("step %d of %d: loss %.3f, %.0f tokens/s", step, steps, loss.item(), rate)
    model.eval()


def pretrain_model(
    *,
    shards: list[str],
    tokenizer: str,
    output: str,
    context_length: int,
    architecture: DemoArchitecture,
    pretraining: DemoPretraining,
    seed: int,
) -> None:
    """Pre-train a model on the documents of ``shards`` and write it with its tokenizer to ``output``.

    Args:
        shards: files that :func:`longqlora.data.readers.read_documents` reads.
        tokenizer: folder of the tokenizer.
        output: folder of the model.
        context_length: of the model, in tokens.
        architecture: shape of the model.
        pretraining: number and size of the steps, and learning rates.
        seed: of the weights and the windows.
    """
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    texts = (document.text for shard in shards for document in read_documents(shard))
    stream = numpy.concatenate([numpy.array([*ids, loaded.eos_token_id]) for ids in encode(loaded, texts)])
    log.info("corpus: %d tokens", len(stream))
    model = make_model(loaded, context_length, architecture, seed)
    log.info("model: %.2f M parameters", model.num_parameters() / 1e6)
    pretrain(model, torch.from_numpy(stream), pretraining, seed)
    model.save_pretrained(output)
    loaded.save_pretrained(output)
