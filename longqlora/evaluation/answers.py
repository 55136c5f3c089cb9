"""Answers of a chat model to questions that were held out of its training, for a person to read."""

import logging
from collections import deque

import torch
from transformers import AutoTokenizer

from longqlora.config.settings import Device
from longqlora.data.readers import read_parquet
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.devices import find_device, keep_freed_memory
from longqlora.modeling.loading import load_model

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
SHOWN_CHARACTERS = 600  # of a question in the Markdown file; the JSON file has the whole question


@torch.inference_mode()
def answer(model, tokenizer, messages: list[dict[str, str]]) -> str:
    """Answer the last question of a conversation by greedy decoding."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    prompt = prompt.to(model.device)
    ids = model.generate(
        **prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def answer_held_out(*, model_path: str, records: str, held_out: int, device: Device) -> list[dict]:
    """Let a model answer the last question of each held-out conversation.

    Args:
        model_path: folder of a model with a chat template.
        records: Parquet file of the instruction set; its last ``held_out`` records were not trained on.
        held_out: number of these records.
        device: ``cpu`` or ``cuda``.

    Returns:
        For each conversation its source, messages (up to the question), reference and answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    answers = []
    advice = "A GPU with more memory, or the targets that need no answers: train, evaluate, perplexity_report."
    with memory_explained(f"answering with {model_path}", advice):
        torch_device = find_device(device)
        keep_freed_memory(torch_device)
        model = load_model(model_path, device=torch_device).eval()
        for _, row in deque(read_parquet(records), maxlen=held_out):
            *messages, reference = row["messages"]
            text = answer(model, tokenizer, messages)
            answers.append({"source": row["source"], "messages": messages, "reference": reference["content"], "answer": text})
            log.info("%s: %d characters", row["source"], len(text))
    return answers


def render_answers(label: str, answers: list[dict]) -> str:
    """Questions, references and answers as Markdown, with long questions shortened.

    Args:
        label: name of the system in the title.
        answers: see :func:`answer_held_out`.
    """
    parts = [f"# Answers of {label}\n\nGreedy answers to {len(answers)} questions that were held out of the training."]
    for number, row in enumerate(answers, start=1):
        question = shorten_middle(row["messages"][-1]["content"])
        texts = {"Question": question, "Reference": row["reference"], "Answer": row["answer"] or "(nothing)"}
        parts.append(f"## {number}. {row['source']}")
        parts += [f"**{name}**\n\n{indent(text)}" for name, text in texts.items()]
    return "\n\n".join(parts) + "\n"


def shorten_middle(text: str) -> str:
    """A text, without its middle if it is longer than :data:`SHOWN_CHARACTERS`."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def indent(text: str) -> str:
    """A text as an indented Markdown code block, so that markup in it is not interpreted."""
    return "\n".join(f"    {line}" for line in text.splitlines())
