"""The model card that goes with a published model: where it comes from, how it was trained, what its merge changed."""

from pathlib import Path


def model_card(label: str, card: dict, report: dict | None = None) -> str:
    """Markdown with the header that the hub reads.

    Args:
        label: name of the system.
        card: the training card, see :func:`longqlora.training.train.train`.
        report: of the merge, see :func:`longqlora.publishing.merge_report.merge_adapter`; None where all weights were trained.
    """
    is_hub_id = not Path(card["base_model"]).exists()
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [long-context, longqlora]"]
    header += [f"base_model: {card['base_model']}"] if is_hub_id else []
    parts = ["\n".join([*header, "---"]), f"# {label}", describe(card), usage(card), training_table(card)]
    if report:
        parts.append(merge_table(report))
    return "\n\n".join([*parts, "Made with longqlora. The licence of the base model applies."]) + "\n"


def describe(card: dict) -> str:
    """What the model is, in a sentence or two."""
    settings = card["settings"]
    how = {
        "qlora": "a LoRA adapter (rank {rank}) trained on its 4-bit (NF4) weights and merged",
        "lora": "a LoRA adapter (rank {rank}) trained on its 16-bit weights and merged",
        "full": "all its weights trained",
    }[settings["method"]].format(**settings)
    attention = (
        "shifted sparse attention in training" if settings["attention"] == "shifted_sparse" else "full attention in training"
    )
    return (
        f"`{card['base_model']}` with its context extended to {card['target_context']} tokens: rope scaling "
        f"`{card['rope_scaling']}`, {how}, {attention}. At inference it is an ordinary model with full attention."
    )


def usage(card: dict) -> str:
    """How to load it."""
    prompt = " Its prompt is the tokenizer's chat template." if card["settings"]["data"] == "sft" else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("<this folder>")\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n```'
        f"\n\nNo code of other projects is needed.{prompt}"
    )


def training_table(card: dict) -> str:
    """Settings and cost of the training."""
    settings, machine = card["settings"], card["machine"]
    rows = {
        "data": f"{settings['data']}, SHA-256 {card['data']['sha256'][:16]}…",
        "steps": f"{card['steps']} of {settings['batch_size']} × {settings['gradient_accumulation']} windows",
        "tokens": f"{card['tokens']:,}",
        "learning rate": f"{settings['learning_rate']:g}, constant after {settings['warmup_steps']} steps",
        "trained parameters": f"{card['trainable_parameters']:,}",
        "loss, first and last": " → ".join(f"{row['loss']:.3f}" for row in (card["trace"][0], card["trace"][-1]))
        if card["trace"]
        else "–",
        "time": f"{card['seconds']:g} s, {card['tokens_per_second']:g} tokens/s",
        "peak memory": memory_of(card),
        "machine": f"{machine.get('gpu', machine['processor'])}, {machine['cores']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    }
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def memory_of(card: dict) -> str:
    """Peak memory of the training; on a GPU with what its allocator reserved and a paged optimizer's state, apart from both."""
    parts = [f"{card['peak_memory_bytes'] / 2**30:.2f} GiB"]
    if "peak_reserved_bytes" in card:
        parts.append(f"{card['peak_reserved_bytes'] / 2**30:.2f} GiB reserved")
    if card["paged_optimizer_bytes"]:
        parts.append(f"{card['paged_optimizer_bytes'] / 2**30:.2f} GiB of paged optimizer state beside it")
    return ", ".join(parts)


def merge_table(report: dict) -> str:
    """The merge report."""
    lines = [
        f"| {name} | {row['perplexity']:.3f} | {row['kl_divergence']:.2e} | {100 * row['top_1_agreement']:.1f} % |"
        for name, row in report["models"].items()
    ]
    sample = report["sample"]
    text = (
        "the end of the training data, which was held out"
        if sample["held_out"]
        else ("the beginning of the training data (they are too few to hold any out, so this text was trained on)")
    )
    return (
        f"## Merge\n\nPublished: **{report['published']}**, of the merges the one with the lower perplexity on "
        f"{sample['tokens']:,} tokens in windows of {sample['window']}: {text}. The divergence is "
        "that of the next-token distribution from the model as trained, in nats.\n\n"
        "| model | perplexity | KL divergence | same most likely token |\n|:---|---:|---:|---:|\n" + "\n".join(lines)
    )
