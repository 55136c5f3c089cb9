"""A small tokenizer and a small LLaMA, trained from scratch on one core; the demo has such a model in place of LLaMA2."""

import logging
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import torch
from huggingface_hub import ModelCardData
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longqlora.config.settings import PretrainingSettings
from longqlora.data.readers import find_files, read_documents
from longqlora.data.token_files import encode
from longqlora.jobs.digests import digest_of_file
from longqlora.jobs.machine import versions
from longqlora.jobs.progress import step_of
from longqlora.modeling.chunked_loss import next_token_loss
from longqlora.modeling.devices import find_device, keep_freed_memory

log = logging.getLogger(__name__)

LOGGED_STEPS = 50  # steps from one line of the log to the next


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


def make_model(tokenizer, settings: PretrainingSettings, seed: int) -> LlamaForCausalLM:
    """A LLaMA with random weights.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        settings: context length and shape.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=settings.context,
            rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
            tie_word_embeddings=True,
            **settings.architecture.model_dump(),
        )
    )


def draw_windows(tokens: torch.Tensor, settings: PretrainingSettings, generator: torch.Generator) -> torch.Tensor:
    """The windows of one step, from random places of a stream.

    Args:
        tokens: ``[num_tokens]``, the texts as one stream.
        settings: length and number of the windows.
        generator: of the random numbers.

    Returns:
        ``[b, n]``, token ids.
    """
    length = settings.context
    starts = torch.randint(len(tokens) - length + 1, (settings.tokens_per_step // length, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def pretrain(model: LlamaForCausalLM, tokens: torch.Tensor, settings: PretrainingSettings, seed: int) -> float:
    """Train a model, in place.

    Args:
        model: see :func:`make_model`.
        tokens: ``[num_tokens]``, the texts as one stream.
        settings: number and size of the steps, and learning rates.
        seed: of the windows.

    Returns:
        Mean loss of the last steps, in nats.

    Raises:
        ValueError: if the texts are shorter than one window.
    """
    if len(tokens) <= settings.context:
        raise ValueError(f"pretraining.paths: {len(tokens)} tokens are too few for a window of {settings.context}")
    keep_freed_memory(find_device("cpu"))
    optimizers, schedules = optimizers_of(model, settings.steps, settings.muon_learning_rate, settings.adamw_learning_rate)
    generator, started = torch.Generator().manual_seed(seed), time.perf_counter()
    losses: deque[float] = deque(maxlen=LOGGED_STEPS)
    for step in range(1, settings.steps + 1):
        windows = draw_windows(tokens, settings, generator)
        loss = next_token_loss(model, windows, windows)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % LOGGED_STEPS == 0 or step == settings.steps:
            seconds = (time.perf_counter() - started) / step
            progress = step_of(step, settings.steps, (settings.steps - step) * seconds)
            log.info("%s: loss %.3f, %.0f tokens/s", progress, fmean(losses), settings.tokens_per_step / seconds)
    model.eval()
    return fmean(losses)


def pretrain_model(*, settings: PretrainingSettings, seed: int, command: str, output: str) -> None:
    """Train a tokenizer and a model on texts, and write the model's folder: weights in bfloat16, tokenizer and model card.

    Args:
        settings: texts, shape and training.
        seed: of the weights and the windows.
        command: makes the folder; for the model card.
        output: folder of the model.
    """
    files = [file for path in settings.paths for file in find_files(path)]
    documents = [document.text for path in files for document in read_documents(path)]
    tokenizer: Any = train_tokenizer(documents, settings.vocab_size)
    stream = numpy.concatenate([numpy.array([*ids, tokenizer.eos_token_id]) for ids in encode(tokenizer, documents)])
    model = make_model(tokenizer, settings, seed)
    log.info("%d tokens, %.2f M parameters", len(stream), model.num_parameters() / 1e6)
    loss = pretrain(model, torch.from_numpy(stream), settings, seed)
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
    facts = {"command": command, "seed": seed, "vocabulary": len(tokenizer), "tokens": len(stream), "loss": loss}
    facts["parameters"] = model.num_parameters()
    Path(output, "README.md").write_text(pretrained_card(output, settings, facts), encoding="utf-8")


def pretrained_card(folder: str, settings: PretrainingSettings, facts: dict) -> str:
    """The model card of a pre-trained model: how it was made, and digests of its files and of its texts.

    Args:
        folder: of the model, with weights and tokenizer.
        settings: see :func:`pretrain_model`.
        facts: command, seed, parameters, vocabulary, tokens (of the texts), loss (at the end, in nats).
    """
    shape = ", ".join(f"{name} {value}" for name, value in settings.architecture.model_dump().items())
    seen = settings.steps * settings.tokens_per_step
    rows = {
        "made by": f"`{facts['command']}`",
        "license": f"that of the texts: {settings.license}",
        "parameters": f"{facts['parameters']:,} ({shape}, vocabulary {facts['vocabulary']})",
        "context": f"{settings.context} tokens, rope_theta {settings.rope_theta:g}",
        "texts": f"{facts['tokens']:,} tokens, each seen {seen / facts['tokens']:.1f} times",
        "steps": f"{settings.steps:,} of {settings.tokens_per_step:,} tokens, seed {facts['seed']}",
        "learning rates": f"Muon {settings.muon_learning_rate:g}, AdamW {settings.adamw_learning_rate:g}",
        "training loss at the end": f"{facts['loss']:.3f} nats per token",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", license="other", license_name=settings.license.lower()
    )
    files = [*sorted(path for path in Path(folder).iterdir() if path.name != "README.md"), *map(Path, settings.paths)]
    return "\n".join(
        [
            f"---\n{metadata}\n---\n",
            f"# A LLaMA with a context of {settings.context} tokens\n",
            "Trained from scratch, to be extended. It completes texts like those that it was trained on, and knows little.\n",
            "| | |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "\n| file | SHA-256 |\n|---|---|",
            *(f"| {path.name} | {digest_of_file(path)} |" for path in files if path.is_file()),  # a text may be a remote file
            "",
        ]
    )
