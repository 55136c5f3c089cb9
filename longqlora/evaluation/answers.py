"""Answers of a chat model to questions that were held out of its training, to read with one's own eyes."""

import json
import logging
from collections import deque
from pathlib import Path

import torch
from transformers import AutoTokenizer

from longqlora.data.readers import read_parquet
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.devices import find_device
from longqlora.modeling.loading import load_model

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
SHOWN_CHARACTERS = 600  # of a question, in the Markdown file; the JSON file has all of it


@torch.inference_mode()
def answer(model, tokenizer, messages: list[dict[str, str]]) -> str:
    """The most likely answer to a conversation that ends with a question (greedy decoding)."""
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


def answer_held_out(
    *, model_path: str, records: str, held_out: int, label: str, device: str, output: str, markdown: str
) -> None:
    """Let a model answer the last question of each held-out conversation; write questions, references and answers.

    Args:
        model_path: folder of a model with its chat template.
        records: Parquet file of the instruction set; its last ``held_out`` records were not trained on.
        held_out: how many.
        label: of the system.
        device: ``cpu`` or ``cuda``.
        output: JSON file, a list of source, messages (up to the question), reference and answer.
        markdown: the same to read, long questions shortened in their middle.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    answers = []
    advice = "A GPU with more memory, or the targets without answers: train, evaluate, perplexity_report."
    with memory_explained(f"answering with {model_path}", advice):
        model = load_model(model_path, device=find_device(device)).eval()
        for _, row in deque(read_parquet(records), maxlen=held_out):
            *messages, reference = row["messages"]
            given = answer(model, tokenizer, messages)
            answers.append({"source": row["source"], "messages": messages, "reference": reference["content"], "answer": given})
            log.info("%s: %d characters", row["source"], len(given))
    Path(output).write_text(json.dumps(answers, indent=2, ensure_ascii=False))
    Path(markdown).write_text(render_answers(label, answers), encoding="utf-8")


def render_answers(label: str, answers: list[dict]) -> str:
    """Questions, references and answers as Markdown."""
    parts = [f"# Answers of {label}\n\nGreedy answers to {len(answers)} questions that were held out of the training."]
    for number, row in enumerate(answers, start=1):
        question = shorten_middle(row["messages"][-1]["content"])
        texts = {"Question": question, "Reference": row["reference"], "Answer": row["answer"] or "(nothing)"}
        parts.append(f"## {number}. {row['source']}")
        parts += [f"**{name}**\n\n{indent(text)}" for name, text in texts.items()]
    return "\n\n".join(parts) + "\n"


def shorten_middle(text: str) -> str:
    """A text of at most ``SHOWN_CHARACTERS``, more being left out in its middle."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def indent(text: str) -> str:
    """A text as a Markdown code block, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())
