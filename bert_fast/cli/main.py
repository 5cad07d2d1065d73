"""`bert-fast`: find the command, parse its arguments, run it, and turn its errors into one line.

Only the module of the command that runs is imported, and the commands import torch only once they run, so that help
is quick. Exit codes: 0 done, 1 a check failed, 2 wrong usage or input, 128 + n ended by signal n.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "prepare": "text into a vocabulary and tokenised shards",
    "pretrain": "train a BERT on prepared data, or go on with a run that stopped",
    "finetune": "fine-tune a model on a task: classification, regression, pairs, tokens, answers ...",
    "multitask": "fine-tune one encoder on several tasks at once, each with its own head and rows",
    "sweep": "fine-tune with every combination of a grid of settings, on one split or on k folds",
    "predict": "what a fine-tuned model says about texts or rows",
    "evaluate": "metrics of a fine-tuned model on rows with the true answers",
    "replay": "a step of pretraining that diverged, computed again",
    "report": "curves of pretraining runs beside each other, or a fine-tuning run's page, as HTML",
    "explain": "which words an answer comes from, as an HTML page",
    "fill-mask": "what could stand where a text says [MASK]",
    "embed": "texts into vectors",
    "info": "versions, device, CPU features, which implementation runs here and why the others can't",
    "verify": "test every implementation that runs on this machine against float64",
}
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# The import name of an optional package and the extra of bert_fast that installs it.
EXTRAS = {
    **dict.fromkeys(("jsonargparse", "yaml", "pyarrow", "tokenizers", "tensorboard", "tqdm", "huggingface_hub"), "cli"),
    **dict.fromkeys(("sklearn", "scipy", "seqeval", "matplotlib"), "finetune"),
    "captum": "explain",
    "wandb": "wandb",
    "datasets": "datasets",
    **dict.fromkeys(("sentencex", "fsspec"), "data"),
    "rjieba": "chinese",
    "ray": "ray",
    "triton": "triton",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("BERT_FAST_DEBUG") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = arguments[0] if arguments else ""
    prefix = f"bert-fast {command}" if command in COMMANDS else "bert-fast"
    try:
        if command in COMMANDS:
            return _run(command, arguments[1:])
        return _overview(command)
    except Exception as error:
        if debug or not _is_users(error):
            traceback.print_exc()
        else:
            print(f"{prefix}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130


def _run(command: str, arguments: list[str]) -> int:
    from jsonargparse import ArgumentParser

    module: Any = importlib.import_module(f"bert_fast.cli.{command.replace('-', '_')}")
    parser = ArgumentParser(
        prog=f"bert-fast {command}", description=module.__doc__, exit_on_error=False, parser_mode="yaml"
    )
    module.add_arguments(parser)
    if hasattr(module, "positional"):
        arguments = module.positional(arguments)
    arguments, threads = _without_threads(arguments)
    parsed = parser.parse_args(_with_recipe(arguments))

    from bert_fast.threads import use_threads

    with use_threads(threads):
        result: int = module.run(parsed)
    return result


def _without_threads(arguments: list[str]) -> tuple[list[str], int | None]:
    """The arguments without `--threads N`, which every command has, and N."""
    rest, threads = [], None
    after = iter(arguments)
    for argument in after:
        if argument == "--threads" or argument.startswith("--threads="):
            value = argument.partition("=")[2] or next(after, "")
            if not value.isdigit():
                raise ValueError(f"--threads is {value!r}; expected the number of threads, 1 or more")
            threads = int(value)
        else:
            rest.append(argument)
    return rest, threads


def _with_recipe(arguments: list[str]) -> list[str]:
    """Replace `--recipe NAME` by `--config` and the path of the recipe that comes with the package."""
    replaced: list[str] = []
    for index, argument in enumerate(arguments):
        if argument.startswith("--recipe="):
            replaced += ["--config", str(_recipe(argument.partition("=")[2]))]
        elif index and arguments[index - 1] == "--recipe":
            replaced += ["--config", str(_recipe(argument))]
        elif argument != "--recipe" or index == len(arguments) - 1:
            replaced.append(argument)
    return replaced


def _recipe(name: str) -> Path:
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(found.stem for found in RECIPES.glob("*.yaml")))
        raise ValueError(f"--recipe is {name!r}; expected one of {names} (a file of your own goes to --config)")
    return path


def _overview(command: str) -> int:
    import bert_fast

    if command in ("--version", "-V"):
        print(f"bert_fast {bert_fast.__version__}")
        return 0
    if command not in ("", "-h", "--help"):
        raise ValueError(f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}")
    print("usage: bert-fast COMMAND [options]        bert-fast COMMAND --help explains the options\n")
    for name, text in COMMANDS.items():
        print(f"  {name:<10} {text}")
    print("\n  --version  the version of bert_fast\n  --debug    with any command: the whole traceback of an error")
    print("  --threads  with any command: how many the processor computes with; no more than the quota if not given")
    return 0 if command else 2


def _is_users(error: Exception) -> bool:
    """Whether the message of `error` is written for the user; another error is our fault and keeps its traceback."""
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return True
    return any(
        kind.__name__ in ("ImplUnavailableError", "TrainingDivergedError", "RankError", "ArgumentError")
        for kind in type(error).mro()
    )


def _one_line(error: Exception) -> str:
    package = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if package in EXTRAS:
        return f"{package} is not installed; this command needs it: pip install 'bert_fast[{EXTRAS[package]}]'"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
