"""What llama.cpp computes with a model whose context is extended, compared with transformers, by RoPE scaling.

    python benchmarks/serving.py MODEL TEXT --scaling linear:512 yarn:512 theta:512:8000 --format f16 q8_0 --lengths 64 128 256

MODEL is a folder with a base model, TEXT a text file; its beginning is read. A scaling is a name, the target context and, for
theta, the new rope_theta. ``none`` is the model as it is. Each scaling is put into ``config.json`` as by the
workflow, without training. ``--wrong`` puts another scaling into the GGUF file, to see what the serving check makes of it.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from longqlora.config.settings import RopeExtension
from longqlora.data.tokenizers import load_tokenizer
from longqlora.modeling.loading import load_config
from longqlora.publishing.gguf import convert
from longqlora.publishing.served_config import served_config
from longqlora.publishing.serving_check import compare, differences


def extended(base: str, scaling: str, folder: Path) -> Path:
    """The folder of a base model with another configuration; the other files are links."""
    folder.mkdir()
    for file in Path(base).iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    name, *values = scaling.split(":")
    extension = None
    if name != "none":
        target, *theta = values
        extension = RopeExtension(scaling=name, target_context=int(target), theta=float(theta[0]) if theta else None)
    config = served_config(load_config(base, extension).to_dict())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(options: argparse.Namespace, folder: Path, scaling: str, gguf_format: str) -> dict:
    """Convert a model with one scaling and compare it; ``problems`` is what the serving check says."""
    model = extended(options.model, scaling, folder / "model")
    source = extended(options.model, options.wrong, folder / "wrong") if options.wrong else model
    gguf = str(folder / "model.gguf")
    convert(model=str(source), output=gguf, gguf_format=gguf_format, name="model", converter=options.converter)
    text = Path(options.text).read_text(encoding="utf-8")
    tokens = torch.tensor(load_tokenizer(str(model))(text)["input_ids"])
    begin = time.perf_counter()
    record = {"format": gguf_format, **compare(gguf, str(model), tokens, options.lengths)}
    return record | {"seconds": time.perf_counter() - begin, "problems": list(differences(record))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--scaling", nargs="+", required=True)
    parser.add_argument("--format", nargs="+", default=["f16"], choices=["f16", "q8_0"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--wrong", help="scaling of the GGUF file, if it is to be another than that of the model")
    parser.add_argument("--converter", help="path of a convert_hf_to_gguf.py")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print("| scaling | format | window | perplexity | in llama.cpp | KL divergence | same top token | frequencies | passes |")
    print("|:---|:---|---:|---:|---:|---:|---:|---:|:---|")
    for scaling in options.scaling:
        for gguf_format in options.format:
            with tempfile.TemporaryDirectory() as folder:
                record = measure(options, Path(folder), scaling, gguf_format)
            for row in record["windows"]:
                print(
                    f"| {scaling} | {gguf_format} | {row['window']} | {row['perplexity']:.4f} | {row['gguf_perplexity']:.4f} | "
                    f"{row['kl_divergence']:.1e} | {100 * row['top_1_agreement']:.2f} % | "
                    f"{record['frequencies']['largest_ratio']:.6f} | {'no' if record['problems'] else 'yes'} |",
                    flush=True,
                )
            print(f"{record['seconds']:.0f} s", *record["problems"], sep="\n  ", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
