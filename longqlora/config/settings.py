"""Every key of an experiment's configuration: its type, legal values, default, unit and description.

The classes hold values and nothing else. The first ones are what a configuration file may say (:class:`Configuration` is the
whole file); the last ones (:class:`RopeExtension`, :class:`Protocol`, …) are what the workflow makes of it and hands to its
jobs. A job rebuilds them from its rule's params, so that a changed value reruns what depends on it, and a changed description
nothing.

``config/README.md`` and the JSON schema for editors are generated from these classes (:mod:`longqlora.config.reference`).
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from longqlora.config.paths import is_local

Device = Literal["cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"]
RopeScaling = Literal["linear", "dynamic", "yarn", "llama3", "ntk", "theta", "best"]
Attention = Literal["shifted_sparse", "full"]
Method = Literal["qlora", "lora", "full"]
TrainingData = Literal["corpus", "sft"]
Optimizer = Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"]
ActivationMemory = Literal["auto", "speed", "smallest"]
ProtocolName = Literal["exact", "longqlora", "longlora"]
RetrievalTask = Literal["passkey", "single_needle", "multi_key", "multi_value", "induction"]
GgufFormat = Literal["f16", "q8_0"]
DEFAULT_ROPE_SCALING: RopeScaling = "linear"  # Position Interpolation
InstructionSchema = Literal[
    "natural_questions",
    "natural_questions_hub",
    "natural_questions_simplified",
    "l_eval",
    "lost_in_the_middle",
    "alpaca",
    "sharegpt",
    "messages",
    "human_assistant",
    "query_response",
    "booksum",
    "long_alpaca",
    "qmsum",
    "input_output",
]


def without_repetition(values: list) -> list:
    """The list itself.

    Raises:
        ValueError: if a value occurs twice.
    """
    repeated = [value for number, value in enumerate(values) if value in values[:number]]
    if repeated:
        raise ValueError(f"{repeated[0]!r} occurs twice")
    return values


def an_address(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: if it is not an address.
    """
    if is_local(text):
        raise ValueError(f"{text!r} is not an address such as s3://bucket/folder; of a shared folder, it is file:///folder")
    return text


DISTINCT = AfterValidator(without_repetition)
AT_LEAST_ONE = Field(min_length=1, json_schema_extra={"uniqueItems": True})
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=100)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)]
TaskNames = Annotated[list[TaskName], Field(json_schema_extra={"uniqueItems": True}), DISTINCT]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Tokens = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Address = Annotated[str, AfterValidator(an_address)]
Paths = Annotated[list[Text], Field(min_length=1)]
EvalLengths = Annotated[list[Annotated[int, Field(ge=2)]], AT_LEAST_ONE, DISTINCT]


class Section(BaseModel):
    """A group of settings: immutable, with no keys but its own, and values of exactly the right type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


# --- where the base model and the texts come from --------------------------------------------------------------------------


class BaseModelSection(Section):
    """The model whose context is extended."""

    path: Text = Field(
        description="Folder or hub id (owner/name or owner/name@revision) of a model with rotary position embeddings."
    )
    tokenizer: Text | None = Field(
        default=None, description="Folder or hub id of its tokenizer, if that is not in the model's own folder."
    )


class Architecture(Section):
    """Shape of a LLaMA that is trained from scratch: fields of transformers' LlamaConfig."""

    hidden_size: int = Field(ge=8, description="Width of the hidden states.")
    intermediate_size: int = Field(ge=8, description="Width inside the feed-forward layers.")
    num_hidden_layers: Count = Field(description="Number of transformer layers.")
    num_attention_heads: Count = Field(description="Number of query heads per layer.")
    num_key_value_heads: Count = Field(description="Number of key and value heads per layer.")


class PretrainingSettings(Section):
    """Trains a tokenizer and a small base model from scratch, on one core of a CPU."""

    paths: Paths = Field(description="Files of the texts to train on, in a format that the corpus may have.")
    license: Text = Field(description="License of the texts, for the model card.")
    vocab_size: int = Field(ge=300, description="Number of tokens in the tokenizer's vocabulary.")
    context: int = Field(ge=32, description="Context length of the model in tokens, and the length of a training window.")
    rope_theta: float = Field(
        gt=1,
        description="Base of the wavelengths of the rotary position embeddings; the longest is about 2π times this, in tokens.",
    )
    architecture: Architecture = Field(description="Shape of the model.")
    steps: Count = Field(description="Number of optimizer steps.")
    tokens_per_step: int = Field(ge=32, description="Tokens of one optimizer step.")
    muon_learning_rate: float = Field(gt=0, description="Learning rate of the matrices inside the layers (Muon).")
    adamw_learning_rate: float = Field(gt=0, description="Learning rate of embeddings and norms (AdamW).")


class DecontaminationSettings(Section):
    """Removes training texts that share word n-grams with an evaluation set."""

    ngram_words: int = Field(default=13, ge=2, description="Words of an n-gram.")
    threshold: Count = Field(
        default=1, description="Number of different n-grams that a text must share with an evaluation set to be removed."
    )


class CorpusSource(Section):
    """Files of texts, all with the same fields."""

    name: Text | None = Field(
        default=None, description="Name of the source for records that name none; by default the first path."
    )
    paths: Paths = Field(
        description="Local files (wildcards allowed) or addresses that fsspec opens, such as "
        "hf://datasets/owner/name@revision/*.parquet."
    )
    text_field: Text = Field(default="text", description="Field that holds the text; dots lead into nested objects.")
    source_field: Text = Field(
        default="meta.source",
        description="Field that names the subset of the corpus that a text belongs to; at most 1000 different values.",
    )
    metadata_fields: list[Text] = Field(default=[], description="Other fields to keep in addition to the text.")
    share: Share | None = Field(
        default=None, description="Share of the sample taken from this source; give one to every source or to none."
    )
    jobs: Count | None = Field(
        default=None,
        description="Number of jobs that read the files; by default one per file (at most 256), and one for plain text files "
        "and for a remote pattern.",
    )


class CorpusSettings(Section):
    """The texts that systems are trained on: a random sample of the texts of suitable length."""

    sources: list[CorpusSource] = Field(min_length=1, description="Where the texts come from.")
    shares: dict[Text, Share] | None = Field(
        default=None,
        min_length=1,
        description="Share of the sample by subset, as source_field names them; by default every text is equally likely.",
    )
    num_texts: Count = Field(description="Number of texts in the sample.")
    min_tokens: Tokens = Field(description="Length of the shortest text, in tokens.")
    max_tokens: Tokens = Field(description="Length of the longest text, in tokens.")
    examined_share: Share = Field(
        default=1.0,
        description="Share of the texts, chosen by hash, that are tokenized and checked; below 1 for a corpus much larger than "
        "the sample.",
    )
    near_duplicates: Share | None = Field(
        default=None,
        description="Similarity (Jaccard, of 5-word shingles) at or above which one of two texts is removed; by default only "
        "equal texts are.",
    )
    allow_fewer: bool = Field(default=False, description="Accept a sample smaller than num_texts.")


class SftSource(Section):
    """Files of instruction records with one schema."""

    name: Text = Field(description="Name of the source in the data card and the plot.")
    record_schema: InstructionSchema = Field(alias="schema", description="Format of its records.")
    paths: Paths = Field(
        description="Local files (wildcards allowed) or addresses that fsspec opens, such as "
        "hf://datasets/owner/name@revision/*.parquet."
    )
    share: Share = Field(description="Share of the records taken from this source; all shares add up to 1.")


class SftSettings(Section):
    """The instruction set for supervised fine-tuning."""

    sources: list[SftSource] = Field(min_length=1, description="Where the records come from.")
    num_records: Count = Field(description="Number of records in the set.")
    max_tokens: Tokens = Field(
        description="Length of the longest record in tokens; a longer one loses the end of its document."
    )
    held_out: int = Field(
        default=64,
        ge=0,
        description="Number of records that are not trained on; the loss on their answers is measured before and after the "
        "fine-tuning, and the fine-tuned models answer the first five.",
    )
    allow_fewer: bool = Field(default=False, description="Accept fewer records where a source cannot fill its share.")


# --- training --------------------------------------------------------------------------------------------------------------


class ProgressSettings(Section):
    """What a training checks before it starts, and logs and saves on its way; nothing here changes what is trained."""

    logging_steps: Count = Field(
        default=10,
        description="Optimizer steps between two lines of the log. If these steps take longer than 15 seconds, there are lines "
        "in between.",
    )
    checkpoint_steps: Count = Field(default=50, description="Optimizer steps between two checkpoints.")
    checkpoint_store: Address | None = Field(
        default=None,
        description="Address of a folder that fsspec opens, such as s3://bucket/folder, to which each checkpoint is copied; a "
        "training that is started on another machine resumes from there.",
    )
    check_memory: bool = Field(
        default=True,
        description="Before weights are loaded, estimate the peak memory, and refuse to start where the device has less.",
    )


class TrainingSettings(Section):
    """How a system is trained: everything that changes the weights."""

    method: Method = Field(
        default="qlora",
        description="qlora trains an adapter on a 4-bit base, lora an adapter on a 16-bit base, full all weights.",
    )
    data: TrainingData = Field(default="corpus", description="What is trained on: texts (corpus) or instructions (sft).")
    isolate_documents: bool = Field(
        default=False, description="For texts: attention and positions do not cross the documents that share a window."
    )
    pack_records: bool = Field(
        default=False,
        description="For instructions: several whole records share a window, and none attends to another; otherwise each "
        "record is a row of its own.",
    )
    pose_window: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="For texts: train in windows of this many tokens, whose second part gets positions anywhere up to "
        "target_context (PoSE); needs attention: full. By default a window is as long as target_context.",
    )
    attention: Attention = Field(default="shifted_sparse", description="Attention in training.")
    group_ratio: Share = Field(default=0.25, description="Group of the shifted sparse attention, as a share of the window.")
    full_attention_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the optimizer steps, the last ones, that are trained with full attention instead of the shifted "
        "sparse attention.",
    )
    rank: Count = Field(default=64, description="Rank of the adapter.")
    alpha: float = Field(default=16.0, gt=0, description="The adapter's update is scaled by alpha / rank.")
    rslora: bool = Field(default=False, description="Scale the adapter's update by alpha / √rank instead (rsLoRA).")
    dora: bool = Field(
        default=False, description="Also train the magnitude of every adapted weight, one number per output (DoRA)."
    )
    loraplus_ratio: float | None = Field(
        default=None,
        ge=1,
        description="Learning rate of the adapter's matrices B, and of trained vectors, as a multiple of learning_rate "
        "(LoRA+); by default it is the same.",
    )
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout probability at the adapter's input.")
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = Field(
        default="all-linear",
        description="Layers that get an adapter: all-linear (all linear layers but the output layer), or a list of names.",
    )
    modules_to_save: list[Text] = Field(
        default=[],
        description="Modules trained in full as part of the adapter, by the end of their names, such as embed_tokens or norm "
        "(every norm).",
    )
    steps: Count | None = Field(default=None, description="Number of optimizer steps; give either steps or epochs.")
    epochs: float | None = Field(default=None, gt=0, description="Passes over the data; give either steps or epochs.")
    batch_size: Count = Field(default=1, description="Windows in one forward pass of a process.")
    gradient_accumulation: Count = Field(default=16, description="Forward passes of one optimizer step.")
    learning_rate: float = Field(default=0.0002, gt=0, description="Learning rate, constant after the warm-up.")
    warmup_steps: int = Field(default=20, ge=0, description="Optimizer steps over which the learning rate rises.")
    max_grad_norm: float = Field(default=0.3, gt=0, description="Norm to which gradients are clipped.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of the optimizer.")
    optimizer: Optimizer = Field(default="paged_adamw_32bit", description="Optimizer, by its name in transformers.")
    memory: ActivationMemory = Field(
        default="auto",
        description="Which activations are kept for the backward pass, which computes the others again: speed keeps all, "
        "smallest as few as possible, and auto as many as fit into the memory of the GPU (or of the machine, on a CPU).",
    )
    num_processes: Count = Field(default=1, description="Processes that train together on each node, one per GPU.")
    num_nodes: Count = Field(default=1, description="Nodes of a SLURM cluster that train together.")
    sequence_parallel: Count = Field(
        default=1,
        description="Processes that share each window, for contexts beyond the memory of one GPU: each computes a part of the "
        "tokens, and in the attention a part of the heads.",
    )
    zero_stage: Literal[0, 2, 3] = Field(
        default=0,
        description="DeepSpeed ZeRO: 2 shards gradients and optimizer state over the processes, 3 the weights too, 0 does "
        "without DeepSpeed.",
    )
    offload: bool = Field(default=False, description="With ZeRO: keep the sharded state in CPU memory.")


class TrainingSection(TrainingSettings, ProgressSettings):
    """How systems are trained. The same keys under a system's own ``training`` override these for that system."""

    seeds: Annotated[list[Seed], AT_LEAST_ONE, DISTINCT] | None = Field(
        default=None,
        description="Seeds of the initial weights and the order of the data: the system is trained once by each, and its row "
        "has the mean and the spread over them; by default the experiment's seed.",
    )


class MergeSettings(Section):
    """Merging of adapters into the base model."""

    max_perplexity_ratio: float = Field(
        default=1.05,
        ge=1,
        description="Largest perplexity of a merged model, relative to that of the adapter as trained, on held-out training "
        "text; a merge above it stops the run.",
    )


# --- systems and their evaluation ------------------------------------------------------------------------------------------


class SystemSection(Section):
    """The base model as it is, extended or trained, or another model: usually one row of the table."""

    label: Text | None = Field(default=None, description="Name in tables and plots; by default the system's name.")
    model: Text | None = Field(
        default=None,
        description="Folder or hub id (owner/name or owner/name@revision) of a published model to evaluate as it is; by "
        "default the base model.",
    )
    tokenizer: Text | None = Field(
        default=None, description="Folder or hub id of that model's tokenizer, if it is not in the model's own folder."
    )
    target_context: int | None = Field(
        default=None, ge=8, description="Context length in tokens to which the model is extended; by default its own."
    )
    rope_scaling: RopeScaling | None = Field(
        default=None,
        description="How positions are scaled: linear (Position Interpolation, the default), dynamic (NTK-aware, by the length "
        "of the sequence), yarn (YaRN), llama3 (as in Llama 3.1), ntk (NTK-aware, by a larger rope_theta that follows from the "
        "factor), theta (the rope_theta that is given), best (of linear, ntk, yarn and llama3, the one with the lowest loss "
        "before training, on the training data). If a model is scaled already, only its own scaling extends it.",
    )
    rope_factor: float | None = Field(
        default=None,
        gt=1,
        description="Factor of the scaling; by default target_context divided by the model's own context (linear: rounded up), "
        "times the factor of a model that is scaled already.",
    )
    rope_theta: float | None = Field(
        default=None, gt=1, description="With rope_scaling: theta, the model's new rope_theta; larger than its own."
    )
    training: TrainingSection | None = Field(
        default=None, description="Train this system; the settings given here override the experiment's training settings."
    )
    base: Text | None = Field(
        default=None,
        description="Name of another trained system: this one is trained on its merged model, and has its context and scaling "
        "unless a larger target_context extends them further.",
    )
    weights_of: Text | None = Field(
        default=None, description="Name of a trained system whose weights are evaluated in another way; nothing is trained."
    )
    merged: bool | None = Field(
        default=None,
        description="Evaluate the adapter merged into the base (true, the default), or on top of it, in the row's precision.",
    )
    precision: Precision | None = Field(
        default=None, description="Precision of the weights in evaluation; by default evaluation.precision."
    )
    evaluation_attention: Attention | None = Field(
        default=None, description="Attention in evaluation: full (the default), or shifted_sparse for comparison."
    )
    table_row: bool = Field(
        default=True,
        description="Measure perplexity and retrieval, as a row of their tables and plots; false is for a trained system, such "
        "as a chat model, or the system of evaluation.key_tokens.",
    )


class EvaluationDataset(Section):
    """Text to measure perplexity on."""

    label: Text = Field(description="Name in tables and plots.")
    paths: Paths = Field(
        description="One .bin file of token ids, or texts: local files or addresses that fsspec opens (wildcards allowed)."
    )


class KeyTokensSection(Section):
    """The tokens that a long context helps to predict; their perplexity is LongPPL."""

    system: Text = Field(
        description="Name of the system that chooses the key tokens for all systems; best a strong model that is no row of the "
        "table itself."
    )
    short_context: int = Field(
        default=1024,
        ge=4,
        description="Tokens of the short context: a key token is predicted much better from the longest of evaluation.lengths "
        "than from its last tokens.",
    )


class HarnessSettings(Section):
    """How a task of EleutherAI's lm-evaluation-harness is measured."""

    num_fewshot: int | None = Field(
        default=None, ge=0, description="Solved examples in each prompt; by default as the task has it."
    )
    limit: Count | None = Field(default=None, description="Number of documents per task, the first ones; by default all.")
    chat_template: bool = Field(
        default=False, description="Write prompts with the chat template of the tokenizer, if it has one."
    )
    batch_size: Count = Field(default=1, description="Prompts that a model reads at once.")
    include_path: Text | None = Field(
        default=None, description="Folder of your own tasks: YAML files in the format of the harness, and their data."
    )


class HarnessSection(HarnessSettings):
    """Tasks of EleutherAI's lm-evaluation-harness, which every row of the table is measured on."""

    tasks: TaskNames = Field(
        default=[], description="Tasks, groups or tags with texts of their own, such as arc_easy, hellaswag or mmlu."
    )
    long_tasks: TaskNames = Field(
        default=[],
        description="Tasks that make texts of a given length, at each of the lengths: those of RULER, such as niah_single_1, "
        "or ruler for all thirteen.",
    )
    lengths: EvalLengths | None = Field(
        default=None, description="Context lengths of long_tasks in tokens; by default evaluation.lengths."
    )


class EvaluationSettings(Section):
    """How perplexity is measured."""

    lengths: EvalLengths = Field(description="Context lengths to evaluate at, in tokens: the columns of the table.")
    protocol: ProtocolName = Field(
        default="exact",
        description="exact scores every token once inside its document and averages over tokens; longqlora and longlora are "
        "the protocols of the two papers' code.",
    )
    stride: Tokens | None = Field(
        default=None,
        description="Tokens from one window to the next; by default the window; 256 with the protocol longlora.",
    )
    precision: Precision = Field(
        default="auto",
        description="Precision of the weights: nf4 (4 bit), int8, a float type, or auto (16 bit on a GPU, float32 on a CPU).",
    )
    num_processes: Count = Field(default=1, description="Processes that share the windows of a cell, one per GPU.")
    key_tokens: KeyTokensSection | None = Field(
        default=None,
        description="Measure LongPPL, the perplexity of the tokens that need a long context; needs protocol: exact.",
    )
    datasets: dict[Name, EvaluationDataset] = Field(min_length=1, description="Evaluation sets by name.")
    harness: HarnessSection | None = Field(
        default=None, description="Tasks of lm-evaluation-harness, which must be installed (the extra harness)."
    )


class RetrievalSection(Section):
    """How much of what is hidden in a long text each system finds."""

    tasks: Annotated[list[RetrievalTask], Field(json_schema_extra={"uniqueItems": True}), DISTINCT] = Field(
        default=["passkey", "single_needle", "multi_key", "multi_value"],
        description="Tasks: passkey and the needles hide numbers in a text and ask for them; induction repeats a passage, for "
        "models of a few million parameters; an empty list measures no retrieval.",
    )
    lengths: EvalLengths | None = Field(
        default=None, description="Context lengths in tokens, out of evaluation.lengths; by default all of them."
    )
    depths: Annotated[list[Annotated[float, Field(ge=0, le=1)]], AT_LEAST_ONE, DISTINCT] = Field(
        default=[0.0, 0.25, 0.5, 0.75, 1.0], description="Where in the text something is hidden: 0 is the beginning, 1 the end."
    )
    samples: Count = Field(default=10, description="Prompts per task, length and depth.")
    filler: Text | None = Field(
        default=None, description="Name of the evaluation set that the surrounding text comes from; by default the first."
    )
    chat_template: bool = Field(
        default=True,
        description="Ask a model through the chat template of its tokenizer, if it has one; false asks every model in plain "
        "text. The task induction has no question.",
    )


class ServingSettings(Section):
    """GGUF files of trained systems for llama.cpp, each checked against transformers."""

    gguf: Annotated[list[GgufFormat], AT_LEAST_ONE, DISTINCT] = Field(
        default=["f16", "q8_0"], description="Formats of the weights: f16 (16 bit) and q8_0 (8 bit)."
    )
    systems: Annotated[list[Text], AT_LEAST_ONE, DISTINCT] | None = Field(
        default=None, description="Names of trained systems; by default all that the configuration lists."
    )
    converter: Text | None = Field(
        default=None,
        description="Path of llama.cpp's convert_hf_to_gguf.py; by default the package convert-hf-to-gguf (the extra gguf).",
    )


class AblationGrid(Section):
    """Values by setting; every combination is a cell of the grid."""

    rank: Annotated[list[Count], AT_LEAST_ONE, DISTINCT] | None = Field(default=None, description="Ranks of the adapter.")
    steps: Annotated[list[Count], AT_LEAST_ONE, DISTINCT] | None = Field(
        default=None, description="Numbers of optimizer steps."
    )
    rope_scaling: Annotated[list[RopeScaling], AT_LEAST_ONE, DISTINCT] | None = Field(
        default=None, description="Ways to scale positions."
    )
    evaluation_attention: Annotated[list[Attention], AT_LEAST_ONE, DISTINCT] | None = Field(
        default=None, description="Attention in evaluation."
    )


class AblationSection(Section):
    """A grid of settings: a table and a plot."""

    label: Text | None = Field(default=None, description="Title of the table; by default the ablation's name.")
    system: Text = Field(description="Name of the trained system whose settings are varied.")
    grid: AblationGrid = Field(description="Values by setting.")


class PublishedRow(Section):
    """Perplexities from the literature, shown beside the measured ones."""

    label: Text = Field(description="Name in tables and plots.")
    dataset: Text = Field(description="Label of the evaluation set.")
    perplexity: dict[Annotated[int, Field(strict=False)], float] = Field(description="Perplexity by context length in tokens.")


class Configuration(Section):
    """One experiment of longqlora. Every length is in tokens."""

    experiment: Name = Field(description="Name of the experiment; everything it makes lies under results/<experiment>/.")
    seed: int = Field(
        default=1, ge=0, lt=2**32, description="Seed of the samples, the initial weights and the order of the data."
    )
    device: Device = Field(description="Where models run.")
    base_model: BaseModelSection = Field(description="The model whose context is extended.")
    pretraining: PretrainingSettings | None = Field(
        default=None,
        description="Makes the base model from texts; base_model.path is then results/<experiment>/pretrained. The demo's base "
        "was made so.",
    )
    max_malformed_share: float = Field(
        default=0.001, ge=0, le=1, description="Share of a source's records that may be unusable before the run stops."
    )
    decontamination: DecontaminationSettings = Field(
        default=DecontaminationSettings(), description="Removes training texts that share passages with an evaluation set."
    )
    corpus: CorpusSettings | None = Field(default=None, description="The texts that systems are trained on.")
    sft: SftSettings | None = Field(default=None, description="The instruction set for supervised fine-tuning.")
    training: TrainingSection = Field(default=TrainingSection(), description="Settings that all trained systems share.")
    systems: dict[Name, SystemSection] = Field(min_length=1, description="The systems by name: the rows of the table.")
    untrained_rows: int | None = Field(
        default=None,
        ge=8,
        description="Target context in tokens: adds four rows, in which the base model is extended to this length by linear, "
        "dynamic, ntk and yarn scaling, without training.",
    )
    evaluation: EvaluationSettings = Field(description="How perplexity is measured.")
    retrieval: RetrievalSection = Field(default=RetrievalSection(), description="How retrieval is measured.")
    merge: MergeSettings = Field(default=MergeSettings(), description="When a merged model is good enough to publish.")
    serving: ServingSettings | None = Field(
        default=None, description="Makes GGUF files for llama.cpp and checks them; needs the extra gguf."
    )
    ablations: dict[Name, AblationSection] = Field(default={}, description="Grids of settings, made by the target ablations.")
    published: list[PublishedRow] = Field(default=[], description="Reference rows from the literature.")


# --- what the workflow makes of a configuration and hands to its jobs ------------------------------------------------------


class RopeExtension(Section):
    """How a model's context is extended.

    Attributes:
        scaling: how positions are scaled; ``best`` is replaced by the chosen scaling before a model is loaded.
        target_context: context length to reach, in tokens.
        factor: of the scaling; None: target_context divided by the model's own context.
        theta: the new rope_theta of the scaling ``theta``.
    """

    scaling: RopeScaling = DEFAULT_ROPE_SCALING
    target_context: int
    factor: float | None = None
    theta: float | None = None


class Protocol(Section):
    """How perplexity is measured in one cell.

    Attributes:
        name: see :mod:`longqlora.evaluation.protocols`.
        window: tokens that a model reads at once.
        stride: tokens from one window to the next, 1 ≤ stride ≤ window.
    """

    name: ProtocolName
    window: int
    stride: int


class RetrievalSettings(Section):
    """The questions of one retrieval cell.

    Attributes:
        tasks, depths, samples, chat_template: see :class:`RetrievalSection`.
        seed: of the experiment.
    """

    tasks: list[RetrievalTask]
    depths: list[float]
    samples: int
    chat_template: bool = True
    seed: int


class EvaluatedModel(Section):
    """What a system is evaluated as.

    Attributes:
        path: directory or hub id.
        adapter: folder of an adapter in peft's format that is put on the model without merging; None: there is none.
        extension: how the context is extended; None: it is unchanged.
        precision: of the weights.
        attention: in evaluation.
        group_ratio: of the shifted sparse attention.
    """

    path: str
    adapter: str | None = None
    extension: RopeExtension | None = None
    precision: Precision = "auto"
    attention: Attention = "full"
    group_ratio: float


class Ablation(Section):
    """A grid of settings whose cells are systems.

    Attributes:
        label: title of the table.
        axes: the settings that are varied.
        rows: values by setting, by the name of the system that is this cell.
    """

    label: str
    axes: list[str]
    rows: dict[str, dict[str, int | str]]
