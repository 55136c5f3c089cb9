"""The command ``longqlora``: a subcommand for what is done outside of the workflow.

A subcommand's modules are imported when it runs, because they import torch.
"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        arguments: of the command line; None: those of this process.
    """
    options = parser().parse_args(arguments)
    # at its import, on some CPUs, it asks for a package of kernels that nothing here needs
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        options.run(options)
    except BrokenPipeError:  # a reader such as head has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError, ImportError) as error:
        sys.exit(f"longqlora: {error}")


def parser() -> argparse.ArgumentParser:
    """The subcommands with their options."""
    top = argparse.ArgumentParser(prog="longqlora", description="Tools for models whose context was extended.")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_chat(commands)
    add_generate(commands)
    add_publish(commands)
    add_plan(commands)
    return top


def add_chat(commands) -> None:
    """``longqlora chat MODEL``."""
    chat = commands.add_parser("chat", help="talk to a model about long texts", description="Talk to a chat model.")
    chat.set_defaults(run=run_chat)
    add_model_options(chat)
    chat.add_argument("--file", action="append", default=[], metavar="TEXT", help="text to talk about; may be given repeatedly")
    chat.add_argument("--truncate", action="store_true", help="cut the texts at the end of a sentence so that they fit")
    chat.add_argument("--web", action="store_true", help="serve a page on this machine (needs the extra web)")
    chat.add_argument("--port", type=int, default=7860, help="port of the page (default: %(default)s)")


def add_generate(commands) -> None:
    """``longqlora generate MODEL --prompt-file TEXT``."""
    generate = commands.add_parser("generate", help="continue a text", description="Continue a text, without a chat template.")
    generate.set_defaults(run=run_generate)
    add_model_options(generate)
    generate.add_argument("--prompt-file", required=True, metavar="TEXT", help="text to continue; - reads the standard input")
    generate.add_argument("--truncate", action="store_true", help="cut the text at the end of a sentence so that it fits")


def add_publish(commands) -> None:
    """``longqlora publish results/<experiment>``."""
    publish = commands.add_parser(
        "publish",
        help="publish a trained system on the Hugging Face Hub",
        description="Show what would be published of a trained system on the Hugging Face Hub, and with --really publish it.",
    )
    publish.set_defaults(run=run_publish)
    publish.add_argument("results", type=Path, help="folder of the experiment, such as results/demo")
    publish.add_argument("--system", required=True, metavar="NAME", help="name of the trained system")
    publish.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="repository on the hub; created if it is not there"
    )
    publish.add_argument("--private", action="store_true", help="create the repository as a private one")
    publish.add_argument(
        "--license", metavar="ID", help="license on the hub, such as apache-2.0 (default: that of the base model)"
    )
    publish.add_argument("--base", metavar="OWNER/NAME", help="hub id of the base model, if it was trained from a local folder")
    publish.add_argument("--really", action="store_true", help="publish; without it, nothing is sent")


def add_plan(commands) -> None:
    """``longqlora plan CONFIG``."""
    plan = commands.add_parser(
        "plan",
        help="tell what an experiment needs: memory, time, disk",
        description="Tell what the jobs of an experiment need, whether they fit a device, and what would make them fit. Of the "
        "models only the config.json is read; nothing is run.",
    )
    plan.set_defaults(run=run_plan)
    plan.add_argument("config", nargs="+", metavar="CONFIG", help="configuration; further files override the ones before")
    device = plan.add_mutually_exclusive_group()
    device.add_argument("--gpu", metavar="NAME", help="GPU to plan for, such as V100-32GB (default: this machine)")
    device.add_argument("--gpu-memory", metavar="MEMORY", help="memory of the GPU to plan for, such as 24GB")
    plan.add_argument(
        "--model",
        action="append",
        type=replacement,
        default=[],
        metavar="MODEL=FOLDER",
        help="folder with the config.json of a model of the configuration that cannot be read here; may be given repeatedly",
    )
    plan.add_argument("--json", action="store_true", help="print JSON, as results/<experiment>/plan.json has it")


def add_model_options(command: argparse.ArgumentParser) -> None:
    """The model, and how it generates."""
    command.add_argument("model", metavar="MODEL", help="folder of a model (results/<experiment>/models/<system>) or hub id")
    command.add_argument("--adapter", metavar="FOLDER", help="adapter for the model (results/<experiment>/adapters/<system>)")
    command.add_argument("--4bit", dest="four_bit", action="store_true", help="quantize the weights to 4 bit (NF4)")
    command.add_argument(
        "--max-new-tokens", type=positive, default=512, metavar="N", help="longest answer, in tokens (default: %(default)s)"
    )
    command.add_argument(
        "--temperature",
        type=temperature,
        metavar="T",
        help="temperature of sampling; 0 always takes the most likely token (default: that of the model's generation settings)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of sampling (default: %(default)s)")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


def temperature(text: str) -> float:
    """A finite number from 0 on."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not {text}")
    return number


def replacement(text: str) -> tuple[str, str]:
    """A model of the configuration, and the folder to read in its place."""
    model, equals, folder = text.partition("=")
    if not (model and equals and folder):
        raise argparse.ArgumentTypeError(f"must be MODEL=FOLDER, such as meta-llama/Llama-2-7b-hf=models/7b, not {text}")
    return model, folder


def run_chat(options: argparse.Namespace) -> None:
    """Talk to a model in the terminal, or on a page."""
    from longqlora.chat.commands import chat

    chat(options)


def run_generate(options: argparse.Namespace) -> None:
    """Continue a text."""
    from longqlora.chat.commands import generate

    generate(options)


def run_publish(options: argparse.Namespace) -> None:
    """Show what would be published of a system, or publish it."""
    from longqlora.publishing.hub_upload import publish_command

    publish_command(options)


def run_plan(options: argparse.Namespace) -> None:
    """Tell what an experiment needs."""
    from longqlora.planning.command import plan_command

    plan_command(options)
