"""How a system answers conversations that were held out of its fine-tuning: the loss on their answers, before and after it, and
sample answers."""

import gc
import logging
from collections import deque

import numpy
import torch

from longqlora.config.settings import Device, EvaluatedModel
from longqlora.data.chat_template import tokenize_conversation, with_chat_template
from longqlora.data.hub import pinned_model
from longqlora.data.packing import pad_at_right
from longqlora.data.readers import read_parquet
from longqlora.data.token_files import IGNORED, check_token
from longqlora.data.tokenizers import load_tokenizer
from longqlora.evaluation.evaluated_model import at_commit, load_evaluated_model
from longqlora.evaluation.token_losses import NonFiniteLogits, batches_of, nll_of_batch
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.generation_settings import stop_tokens
from longqlora.modeling.loading import load_config
from longqlora.modeling.rope import rope_of

log = logging.getLogger(__name__)

NUM_SAMPLES = 5  # conversations whose last question is answered in words: enough to read
MAX_NEW_TOKENS = 256  # of such an answer


@torch.inference_mode()
def answer(model, tokenizer, messages: list[dict[str, str]], stop: list[int]) -> str:
    """Answer the last question of a conversation by greedy decoding, up to a token of ``stop``."""
    prompt = torch.tensor([tokenize_conversation(tokenizer, messages, add_generation_prompt=True)[0]], device=model.device)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        eos_token_id=stop,
        pad_token_id=stop[0],
        use_cache=not model.config._attn_implementation.startswith("shifted_sparse"),  # which does not support a cache
    )
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def nll_of_answers(model, conversations: list[tuple[list[int], list[int]]]) -> numpy.ndarray:
    """The loss on the answers of each conversation, on the same tokens as the loss in training.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        conversations: token ids and labels of each, see :func:`longqlora.data.chat_template.tokenize_conversation`.

    Returns:
        ``[conversations]``, float64: the negative log-likelihood (nats), summed over the tokens of the answers.

    Raises:
        NonFiniteLogits: if a loss is not a number; the message names the model and the conversation.
    """
    device, sums = model.get_input_embeddings().weight.device, numpy.zeros(len(conversations))
    for batch in batches_of([len(ids) - 1 for ids, _ in conversations]):
        rows = [[torch.tensor(part) for part in conversations[index]] for index in batch]
        padded = pad_at_right([{"input_ids": ids, "labels": labels} for ids, labels in rows])
        is_scored = (padded["labels"] != IGNORED)[:, 1:].numpy()  # [b, n - 1]
        skipped = int(is_scored.any(axis=0).argmax())
        losses = nll_of_batch(model, padded["input_ids"].to(device), skipped).double().cpu().numpy()
        sums[batch] = losses.sum(axis=1, where=is_scored[:, skipped:])
    if not numpy.isfinite(sums).all():
        index = int(numpy.argmin(numpy.isfinite(sums)))
        raise NonFiniteLogits(
            f"{model.name_or_path}, held-out conversation {index} of {len(sums)}: "
            "the loss is not a number (NaN or infinite logits)"
        )
    return sums


def evaluate_answers(
    *,
    untrained: EvaluatedModel,
    trained: EvaluatedModel,
    base_model: str,
    tokenizer: str,
    records: str,
    held_out: int,
    device: Device,
) -> dict:
    """Measure the loss on the answers of held-out conversations before and after the fine-tuning, and let the fine-tuned model
    answer the last question of the first :data:`NUM_SAMPLES`.

    Args:
        untrained: the system before its fine-tuning: the model that is trained, with the system's context extension.
        trained: the system.
        base_model: directory or hub id of the experiment's base model, whose end tokens end an answer too.
        tokenizer: directory or hub id of the tokenizer of the training data.
        records: Parquet file of the instruction set; its last ``held_out`` records were not trained on.
        held_out: number of these records.
        device: ``cpu`` or ``cuda``.

    Returns:
        Model and precision; ``conversations``, for each its source, id, num_tokens (of its answers), nll_before and nll_after
        (summed over these tokens, in nats); ``samples``, for each its source, messages up to the question, reference, answer.

    Raises:
        NonFiniteLogits: if a loss is not a number; the message names model and conversation.
    """
    untrained, trained = at_commit(untrained), at_commit(trained)
    base_model = pinned_model(base_model)
    chat = with_chat_template(load_tokenizer(tokenizer))
    rows = [row for _, row in deque(read_parquet(records), maxlen=held_out)]
    conversations = [tokenize_conversation(chat, row["messages"]) for row in rows]
    vocab_size = load_config(trained.path).vocab_size
    check_token(records, max(max(ids) for ids, _ in conversations), vocab_size, trained.path)
    rope = rope_of(load_config(trained.path, trained.extension))
    window, longest = rope["target_context"], max(len(ids) for ids, _ in conversations)
    what = f"reading conversations of up to {longest} tokens with {trained.path} in precision {trained.precision}"
    advice = "A smaller evaluation.precision (nf4 takes least), or the targets without answers: train, perplexity_report."
    with memory_explained(what, advice):
        before = nll_of_answers(load_evaluated_model(untrained, device, window), conversations)
        gc.collect()  # quantized layers of bitsandbytes are in reference cycles
        model = load_evaluated_model(trained, device, window)
        after = nll_of_answers(model, conversations)
        stop = stop_tokens(base_model, chat)  # those of the published model
        samples = [sample_answer(model, chat, row, stop) for row in rows[:NUM_SAMPLES]]
    return {
        "precision": trained.precision,
        "attention": trained.attention,
        "base_model": untrained.path,
        "model": trained.path,
        **rope,
        "conversations": [
            {"source": row["source"], "id": row["id"], "num_tokens": num_scored(labels), "nll_before": first, "nll_after": last}
            for row, (_, labels), first, last in zip(rows, conversations, before.tolist(), after.tolist(), strict=True)
        ],
        "samples": samples,
    }


def num_scored(labels: list[int]) -> int:
    """Number of tokens of a conversation that a loss covers."""
    return sum(label != IGNORED for label in labels[1:])


def sample_answer(model, tokenizer, row: dict, stop: list[int]) -> dict:
    """The last question of a record, its reference and the model's answer."""
    *messages, reference = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    text = answer(model, tokenizer, messages, stop)
    log.info("%s: %d characters", row["source"], len(text))
    return {"source": row["source"], "messages": messages, "reference": reference["content"], "answer": text}
