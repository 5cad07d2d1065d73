"""`bert-fast`: parses the arguments, runs the command, and prints an error as one line.

Only the module of the requested command is imported, and it imports torch when it runs, so that help is fast. Exit
codes: 0 success, 1 a check failed, 2 invalid usage or input, 128 + n ended by signal n (141: the reader of stdout has
ended).
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert_fast import _heap
from bert_fast._config import did_you_mean
from bert_fast._terminal import discard, safe_streams

COMMANDS = {
    "prepare": "convert text to a vocabulary and tokenised shards",
    "pretrain": "pretrain a BERT on prepared data, or resume an interrupted run",
    "finetune": "fine-tune a model on a task: classification, regression, pairs, tokens, answers ...",
    "multitask": "fine-tune one encoder on several tasks, each with its own head and data",
    "sweep": "fine-tune with every combination of a grid of settings, on one split or k folds",
    "predict": "predict labels, values or answers with a fine-tuned model",
    "evaluate": "compute the metrics of a fine-tuned model on labelled data",
    "replay": "recompute a diverged pretraining step",
    "report": "write an HTML report: a comparison of pretraining runs, or a fine-tuning run",
    "explain": "attribute a prediction to the words of its text, as an HTML page",
    "fill-mask": "predict the tokens at the [MASK] positions of a text",
    "embed": "convert texts to vectors",
    "rerank": "order texts by their scores for a query",
    "serve": "serve models over HTTP: embeddings, reranking, classification",
    "info": "show versions, device, CPU features and available implementations",
    "bench": "time kernels or a model beside their peers, or compare what was recorded",
    "tune": "measure the kernels on this device at the sizes of a model, for impl='auto'",
    "verify": "verify kernels, a model or an embeddings server against float64",
}
_BROKEN_PIPE = 128 + 13
LONGEST_MESSAGE = 2000  # characters of an error; a name in a file can have any length
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Import names of optional packages, and the extra of bert_fast that installs each.
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
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve"),
}
# They need nothing but torch: what is missing elsewhere is seen with them.
STANDARD = ("info", "verify", "bench kernels", "bench model", "bench compare", "bench export", "tune")
TRAINING = ("pretrain", "finetune", "multitask", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    status = _main_on_safe_streams(argv)
    if argv is None:
        end_rank(status)
    return status


def end_rank(status: int) -> None:
    """End this process at once with exit code `status` if it is a rank of torchrun that has used torch.distributed.

    When the last collective has returned, a thread of gloo may still wait for the GIL to free what the collective used
    (measured with torch 2.13: in one of ten runs on a busy machine). Python's shutdown ends a thread that takes the GIL
    by an exception that C++ doesn't let through: the process aborts, and torchrun reports a finished run as failed.
    """
    distributed = sys.modules.get("torch.distributed")
    if "RANK" not in os.environ or distributed is None or not distributed.is_available():
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _main_on_safe_streams(argv: Sequence[str] | None) -> int:
    with safe_streams():
        try:
            try:
                return _main(list(sys.argv[1:] if argv is None else argv), ends=argv is None)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            # The reader of stdout has ended, as `head` does. Files have been written before anything is printed.
            discard(sys.stdout)
            return _BROKEN_PIPE
        except OSError as error:  # of the last flush
            print(f"bert-fast: error: {_one_line(error)}", file=sys.stderr)
            discard(sys.stdout)
            return 2


def _main(arguments: list[str], ends: bool) -> int:
    """Run a command line; `ends` says whether the process ends after it."""
    debug = "--debug" in arguments or os.environ.get("BERT_FAST_DEBUG") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = arguments[0].replace("_", "-") if arguments else ""
    prefix = f"bert-fast {command}" if command in COMMANDS else "bert-fast"
    if ends and command in TRAINING:
        _heap.keep_freed_memory()
    try:
        if command in COMMANDS:
            return _run(command, arguments[1:])
        return _overview(command)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug or not _is_user_error(error):
            traceback.print_exc()
        else:
            print(f"{prefix}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if ends:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not interrupt the end of Python
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130


def _run(command: str, arguments: list[str]) -> int:
    module: Any = importlib.import_module(f"bert_fast.cli.{command.replace('-', '_')}")
    if hasattr(module, "SUBCOMMANDS"):
        subcommand = arguments[0] if arguments else ""
        if subcommand not in module.SUBCOMMANDS:
            return _overview_of(command, module, subcommand)
        module = importlib.import_module(f"{module.__name__}_{subcommand}")
        command, arguments = f"{command} {subcommand}", arguments[1:]
    if hasattr(module, "positional"):
        arguments = module.positional(arguments)
    arguments, threads = _without_threads(arguments)
    parsed = (_parse_standard if command in STANDARD else _parse)(command, module, arguments)

    from bert_fast.threads import use_threads

    with use_threads(threads):
        result: int = module.run(parsed)
    return result


def _parse(command: str, module: Any, arguments: list[str]) -> Any:
    from bert_fast.cli.arguments import make_parser, parse

    parser = make_parser(f"bert-fast {command}", module.__doc__)
    module.add_arguments(parser)
    return parse(parser, arguments, _recipe, getattr(module, "more_help", None))


def _parse_standard(command: str, module: Any, arguments: list[str]) -> Any:
    from bert_fast.cli.standard import Parser

    parser = Parser(f"bert-fast {command}", module.__doc__)
    module.add_arguments(parser)
    return parser.parse(arguments)


def _without_threads(arguments: list[str]) -> tuple[list[str], int | None]:
    """The arguments without `--threads N`, an option of every command, and N."""
    rest, threads = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--threads" or argument.startswith("--threads="):
            value = argument.partition("=")[2] or next(remaining, "")
            if not (value.isascii() and value.isdigit()):
                raise ValueError(f"--threads is {value!r}; expected the number of threads, 1 or more")
            threads = int(value)
        else:
            rest.append(argument)
    return rest, threads


def _recipe(name: str) -> str:
    """The path of the recipe `name` of the package."""
    recipes = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    if name not in recipes:
        raise ValueError(
            f"--recipe is {name!r}; expected one of {', '.join(recipes)} (pass a file with --config)"
            f"{did_you_mean(name, recipes)}"
        )
    return str(RECIPES / f"{name}.yaml")


def _overview(command: str) -> int:
    import bert_fast

    if command in ("--version", "-V"):
        print(f"bert_fast {bert_fast.__version__}")
        return 0
    if command not in ("", "-h", "--help"):
        raise ValueError(
            f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}{did_you_mean(command, COMMANDS)}"
        )
    print("usage: bert-fast COMMAND [options]        bert-fast COMMAND --help lists the options\n")
    for name, text in COMMANDS.items():
        print(f"  {name:<10} {text}")
    print("\n  --version  show the version of bert_fast\n  --debug    with any command: show the traceback of an error")
    print("  --threads  with any command: number of CPU threads; by default limited by CPU affinity and cgroup quota")
    return 0 if command else 2


def _overview_of(command: str, module: Any, subcommand: str) -> int:
    """The list of the subcommands; ValueError where an unknown one was given."""
    if subcommand not in ("", "-h", "--help"):
        raise ValueError(
            f"unknown command {f'{command} {subcommand}'!r}; expected one of {', '.join(module.SUBCOMMANDS)}"
            f"{did_you_mean(subcommand, module.SUBCOMMANDS)}"
        )
    print(f"usage: bert-fast {command} COMMAND [options]\n\n{module.__doc__}")
    for name, text in module.SUBCOMMANDS.items():
        print(f"  {name:<10} {text}")
    print(f"\nbert-fast {command} COMMAND --help lists the options")
    return 0 if subcommand else 2


def _is_user_error(error: Exception) -> bool:
    """Whether the message of `error` is meant for the user; other errors are bugs, shown with their traceback."""
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
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 500]} ... {text[-495:]}"


if __name__ == "__main__":
    sys.exit(main())
