"""Models, trainings and devices whose plans are tested."""

from longqlora.config.settings import TrainingSettings
from longqlora.planning.cards import Card, card_named


def llama(
    width: int, inner: int, layers: int, heads: int, *, keys: int | None = None, vocabulary: int = 32000, **other
) -> dict:
    """The ``config.json`` of a LLaMA."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys or heads,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **other,
    }


SMALL = llama(128, 352, 4, 8, keys=2, vocabulary=512, torch_dtype="float32")
LLAMA_7B, LLAMA_13B = llama(4096, 11008, 32, 32), llama(5120, 13824, 40, 40)
SMOLLM2 = llama(576, 1536, 30, 9, keys=3, vocabulary=49152, tie_word_embeddings=True)
H100 = card_named("H100-80GB")
CPU = Card("a CPU", None, "float32", 1e11, 1e10)


def training(**settings) -> TrainingSettings:
    return TrainingSettings(**{"steps": 1, "gradient_accumulation": 2, **settings})


DEMO = llama(128, 384, 5, 4, keys=2, vocabulary=1024, tie_word_embeddings=True)
DEMO_TRAINING = training(rank=16, dropout=0.0, steps=40, batch_size=8, gradient_accumulation=1, optimizer="adamw_torch")
SMOLLM2_TRAINING = training(rank=32, dropout=0.0, steps=10, gradient_accumulation=1)
