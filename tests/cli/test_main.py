"""The command line: fast help, one-line errors, recipes, --print_config."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bert_fast.cli.bench import SUBCOMMANDS
from bert_fast.cli.main import COMMANDS, RECIPES, main

RUN = [sys.executable, "-m", "bert_fast.cli.main"]


def test_help_imports_no_torch() -> None:
    code = "import sys; from bert_fast.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(f"  {command}" in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "command", [*(name for name in COMMANDS if name != "bench"), *(f"bench {name}" for name in SUBCOMMANDS)]
)
def test_every_command_lists_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert f"usage: bert-fast {command}" in capsys.readouterr().out


def test_a_group_of_commands_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in SUBCOMMANDS)
    assert main(["bench"]) == 2


def test_without_a_command_the_overview_is_printed_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: bert-fast COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bert_fast ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "unknown command 'pretrian'; expected one of prepare, pretrain"),
        (["pretrain", "--steps", "many"], "bert-fast pretrain: error: "),
        (["pretrain", "--data.folder", "x", "--output_dir", "y"], "neither of steps and epochs given"),
        (
            ["pretrain", "--data.folder", "absent", "--output_dir", "y", "--steps", "1"],
            "data.folder is absent, which is no",
        ),
        (["pretrain", "--config", "absent.yaml"], "absent.yaml"),
        (["pretrain", "--recipe", "absent"], "--recipe is 'absent'; expected one of"),
        (["pretrain", "--recipe"], "--recipe is ''; expected one of"),
        (["pretrain", "--learning_rate", "1"], "learning_rate"),
        (
            ["finetune", "classification", "--model", "m", "--output_dir", "o", "--data.train", "t"],
            "m is not a folder; expected a folder with config.json and weights",
        ),
        (["predict", "absent", "a"], "expected a folder written by bert-fast finetune"),
        (["evaluate", "absent", "a.csv"], "expected a folder written by bert-fast finetune"),
        (["fill-mask", "absent", "a [MASK]"], "absent is not a folder; expected a checkpoint"),
        (["embed", "absent", "a", "--pooling", "median"], "median"),
        (["embed", "absent", "a", "--output", "vectors.txt"], "expected a file name ending in .npy, .jsonl, .parquet"),
        (["embed", "absent", "--file", "absent.txt"], "absent.txt"),
        (["verify", "--ops", "[kitchen]"], "ops has kitchen; expected some of add_layer_norm"),
        (["verify", "--ops", "[lamb]", "--impls", "[cuda]"], "nothing to test"),
        (["prepare", "--output", "y", "--sources", "[absent.txt]"], "absent.txt"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else None,
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["fill-mask", "absent", "a [MASK]", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("BERT_FAST_DEBUG", "1")
    assert main(["fill-mask", "absent", "a [MASK]"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("jsonargparse", ["pretrain", "--help"], "cli"),
        ("tokenizers", ["fill-mask", ".", "a [MASK]"], "cli"),
        ("pyarrow", ["prepare", "--output", "out", "--sources", "[text.txt]", "--vocab_size", "60"], "cli"),
    ],
)
def test_a_missing_package_is_named_with_the_extra(
    package: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    (tmp_path / "text.txt").write_text("\n\n".join(f"a b c d {n}\ne f g h" for n in range(9)))
    code = (
        f"import sys; sys.modules[{package!r}] = None; from bert_fast.cli.main import main; sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{package} is not installed" in done.stderr
    assert f"pip install 'bert_fast[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_print_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output_dir", "out", "--data.folder", "d", "--steps", "7", "--optimizer.betas", "[0.8,0.9]"]
    with pytest.raises(SystemExit, match="0"):
        main(["pretrain", *arguments, "--optimizer.lr", "3e-4", "--print_config"])
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert (values["steps"], values["optimizer"]["lr"], values["optimizer"]["betas"]) == (7, 3e-4, [0.8, 0.9])
    path = tmp_path / "run.yaml"
    path.write_text(printed)
    with pytest.raises(SystemExit, match="0"):
        main(["pretrain", "--config", str(path), "--print_config"])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="0"):
        main(["pretrain", "--config", str(path), "--steps", "9", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == {**values, "steps": 9}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_complete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endings = {"prepare": "prepare", "finetune": "finetune"}
    command = next((name for ending, name in endings.items() if path.stem.endswith(ending)), "pretrain")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--recipe", path.stem, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    for name, value in yaml.safe_load(path.read_text()).items():
        assert printed[name] == value if not isinstance(value, dict) else value.items() <= printed[name].items()


def test_a_message_is_bounded_whatever_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--recipe", "a" * 100_000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bert-fast pretrain: error: --recipe is 'aaa")
    assert " ... " in line
    assert "expected one of" in line
    assert len(line) < 2_100


def test_a_rank_of_torchrun_ends_before_pythons_shutdown() -> None:
    code = """
import atexit, torch.distributed
from bert_fast.cli.main import end_rank

class Module:
    def __del__(self):
        print("shutdown")

kept = Module()
atexit.register(print, "exit functions")
end_rank(3)
print("no rank")
"""
    ends = {
        rank: subprocess.run(
            [sys.executable, "-c", code],
            env={**{name: value for name, value in os.environ.items() if name != "RANK"}, **rank_of},
            capture_output=True,
            text=True,
            check=False,
        )
        for rank, rank_of in (("no", {}), ("0", {"RANK": "0"}))
    }
    assert (ends["0"].returncode, ends["0"].stdout.split("\n")) == (3, ["exit functions", ""])
    assert (ends["no"].returncode, ends["no"].stdout.split("\n")) == (0, ["no rank", "exit functions", "shutdown", ""])
