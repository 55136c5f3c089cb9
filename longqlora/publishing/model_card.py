"""The model card of a published model: how it was made and trained, and how far its merge is from the trained adapter."""

from huggingface_hub import ModelCard, ModelCardData

from longqlora.data.hub import is_hub_id, split_revision


def model_card(label: str, card: dict, report: dict | None = None) -> str:
    """The README.md of a model folder: Markdown with the metadata that the hub reads.

    Args:
        label: name of the system.
        card: the training card, see :func:`longqlora.training.train.train`.
        report: of the merge, see :func:`longqlora.publishing.merge_report.merge_adapter`; None if all weights were trained.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "longqlora"],
        base_model=split_revision(card["base_model"])[0] if is_hub_id(card["base_model"]) else None,
    )
    parts = [f"---\n{metadata}\n---", f"# {label}", describe(card), usage(card), training_table(card)]
    if report:
        parts.append(merge_table(report))
    parts.append("Made with longqlora. The license of the base model applies.")
    return ModelCard("\n\n".join(parts) + "\n").content


def describe(card: dict) -> str:
    """The base model, the context extension and the training method in words."""
    settings = card["settings"]
    how = {
        "qlora": "a LoRA adapter (rank {rank}) trained on its 4-bit (NF4) weights and merged",
        "lora": "a LoRA adapter (rank {rank}) trained on its 16-bit weights and merged",
        "full": "all its weights trained",
    }[settings["method"]].format(**settings)
    attention = (
        "shifted sparse attention in training" if settings["attention"] == "shifted_sparse" else "full attention in training"
    )
    if share := settings["full_attention_share"]:
        attention += f", and full attention in the last {share:.0%} of its steps"
    choice = card.get("scaling_choice")
    chosen = f" (chosen as the best of {len(choice['scalings'])} before training)" if choice else ""
    return (
        f"`{card['base_model']}` with its context extended to {card['target_context']} tokens: rope scaling "
        f"`{card['rope_scaling']}`{chosen}, {how}, {attention}. At inference it is an ordinary model with full attention."
    )


def usage(card: dict) -> str:
    """How to load the model."""
    prompt = " Its prompt is the tokenizer's chat template." if card["settings"]["data"] == "sft" else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("<this folder>")\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n```'
        f"\n\nIt needs no code but transformers.{prompt}"
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
        "peak memory": memory_row(card),
        "machine": f"{machine.get('gpu', machine['processor'])}, {machine['cores']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    }
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def memory_row(card: dict) -> str:
    """Peak memory of the training; on a GPU also the allocator's reserved memory and that of a paged optimizer's state."""
    parts = [f"{card['peak_memory_bytes'] / 2**30:.2f} GiB"]
    if "peak_reserved_bytes" in card:
        parts.append(f"{card['peak_reserved_bytes'] / 2**30:.2f} GiB reserved")
    if card["paged_optimizer_bytes"]:
        parts.append(f"{card['paged_optimizer_bytes'] / 2**30:.2f} GiB of paged optimizer state in addition")
    return ", ".join(parts)


def merge_table(report: dict) -> str:
    """The merge report as a table."""
    lines = [
        f"| {name} | {row['perplexity']:.3f} | {row['kl_divergence']:.2e} | {100 * row['top_1_agreement']:.1f} % |"
        for name, row in report["models"].items()
    ]
    sample = report["sample"]
    text = (
        "the held-out end of the training data"
        if sample["held_out"]
        else ("the beginning of the training data, which were too few to hold any out (this text was trained on)")
    )
    return (
        f"## Merge\n\nPublished: **{report['published']}**, the merge with the lowest perplexity on "
        f"{sample['tokens']:,} tokens in windows of {sample['window']}: {text}. KL divergence: of the next-token "
        "distribution from that of the adapter as trained, in nats.\n\n"
        "| model | perplexity | KL divergence | same most likely token |\n|:---|---:|---:|---:|\n" + "\n".join(lines)
    )
