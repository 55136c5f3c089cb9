"""The model card of a published model: how it was made and trained, and how far its merge is from the trained adapter."""

from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData

from longqlora.data.hub import is_hub_id, split_revision


@dataclass(frozen=True)
class Stage:
    """One of the trainings that made a model; each later one trained the merged model of the one before.

    Attributes:
        label: name of the system.
        card: the training card, see :func:`longqlora.training.train.train`.
        report: of the merge, see :func:`longqlora.publishing.merge_report.merge_adapter`; None if all weights were trained.
    """

    label: str
    card: dict
    report: dict | None = None


def model_card(stages: list[Stage]) -> str:
    """The README.md of a model folder: Markdown with the metadata that the hub reads.

    Args:
        stages: the trainings that made the model, in their order.
    """
    card, report, base_model = stages[-1].card, stages[-1].report, stages[0].card["base_model"]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "longqlora"],
        base_model=split_revision(base_model)[0] if is_hub_id(base_model) else None,
    )
    parts = [f"---\n{metadata}\n---", f"# {stages[-1].label}", describe(stages), usage(stages), serving(card)]
    if len(stages) > 1:
        parts.append(stage_table(stages))
    parts.append(training_table(card))
    if report:
        parts.append(merge_table(report))
    parts.append("Made with longqlora. The license of the base model applies.")
    return ModelCard("\n\n".join(parts) + "\n").content


def describe(stages: list[Stage]) -> str:
    """The base model, the context extension and the training method in words; of several trainings, the last one."""
    card = stages[-1].card
    settings, base = card["settings"], f"`{card['base_model']}`" if len(stages) == 1 else f"{stages[-2].label} (see below)"
    how = {
        "qlora": "a {kind} adapter (rank {rank}) trained on its 4-bit (NF4) weights and merged",
        "lora": "a {kind} adapter (rank {rank}) trained on its 16-bit weights and merged",
        "full": "all its weights trained",
    }[settings["method"]].format(kind=adapter_kind(settings), **settings)
    attention = (
        "shifted sparse attention in training" if settings["attention"] == "shifted_sparse" else "full attention in training"
    )
    if share := settings["full_attention_share"]:
        attention += f", and full attention in the last {share:.0%} of its steps"
    choice = card.get("scaling_choice")
    chosen = f" (chosen as the best of {len(choice['scalings'])} before training)" if choice else ""
    if window := settings["pose_window"]:
        attention += f", in windows of {window} tokens whose positions skip up to that length (PoSE)"
    return (
        f"{base} with its context extended to {card['target_context']} tokens: rope scaling "
        f"`{card['rope_scaling']}`{chosen}, {how}, {attention}. At inference it is an ordinary model with full attention."
    )


def adapter_kind(settings: dict) -> str:
    """The kind of an adapter: LoRA, or its variants."""
    variants = {"DoRA": settings["dora"], "rsLoRA": settings["rslora"], "LoRA+": settings["loraplus_ratio"]}
    return " and ".join(name for name, used in variants.items() if used) or "LoRA"


def usage(stages: list[Stage]) -> str:
    """How to load the model."""
    is_chat_model = any(stage.card["settings"]["data"] == "sft" for stage in stages)
    prompt = " Its prompt is the tokenizer's chat template." if is_chat_model else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("<this folder>")\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n```'
        f"\n\nIt needs no code but transformers.{prompt}"
    )


def serving(card: dict) -> str:
    """The commands that serve the model at its full context, as far as a server has its RoPE scaling."""
    scaling, context = card["rope_scaling"], card["target_context"]
    transformers = "transformers serve <this folder>"
    vllm = f"vllm serve <this folder> --max-model-len {context}"
    llama_cpp = (
        "python convert_hf_to_gguf.py <this folder> --outtype f16 --outfile model.gguf\n"
        f"llama-server --model model.gguf --ctx-size {context}"
    )
    if scaling == "dynamic":
        return (
            f"## Serve it\n\n```bash\n{transformers}\n```\n\n`dynamic` scaling depends on the length of each sequence. Beyond "
            "the original context, vLLM's results are not numbers. llama.cpp drops the scaling. Neither says so."
        )
    notes = {
        "linear": "Without `--max-model-len`, vLLM multiplies the context by the factor again, and offers too much.",
        "ntk": "The scaling is a larger `rope_theta`, which every server reads.",
        "theta": "The scaling is a larger `rope_theta`, which every server reads.",
    }
    note = f"\n\n{notes[scaling]}" if scaling in notes else ""
    return f"## Serve it\n\n```bash\n{transformers}\n{vllm}\n{llama_cpp}\n```{note}"


def stage_table(stages: list[Stage]) -> str:
    """The trainings in their order, with the data, the length and the merge of each."""
    rows = [
        f"| {number}. {stage.label} | {data_row(stage.card)} | {stage.card['settings']['method']} | "
        f"{stage.card['target_context']} | {steps_row(stage.card)} | {merge_row(stage.report)} |"
        for number, stage in enumerate(stages, start=1)
    ]
    return (
        f"## Stages\n\n`{stages[0].card['base_model']}` was trained in {len(stages)} stages, each on the merged model of the "
        "one before. Below the table are the details of the last stage.\n\n"
        "| stage | data | method | context | steps | perplexity of the merge |\n|:---|:---|:---|---:|:---|:---|\n"
        + "\n".join(rows)
    )


def data_row(card: dict) -> str:
    """What was trained on."""
    return f"{card['settings']['data']}, SHA-256 {card['data']['sha256'][:16]}…"


def steps_row(card: dict) -> str:
    """The length of a training."""
    settings = card["settings"]
    groups = settings["num_processes"] * settings.get("num_nodes", 1) // settings.get("sequence_parallel", 1)
    factors = [settings["batch_size"], settings["gradient_accumulation"], *([groups] if groups > 1 else [])]
    return f"{card['steps']} of {' × '.join(map(str, factors))} windows"


def merge_row(report: dict | None) -> str:
    """The merge that was published, compared with the adapter as it was trained."""
    if report is None:
        return "– (all weights trained)"
    trained, merge = next(iter(report["models"].values())), report["models"][report["published"]]
    return f"{merge['perplexity']:.3f} ({report['published']}), as trained {trained['perplexity']:.3f}"


def training_table(card: dict) -> str:
    """Settings and cost of the training."""
    settings, machine = card["settings"], card["machine"]
    rows = {
        "data": data_row(card),
        "steps": steps_row(card),
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
