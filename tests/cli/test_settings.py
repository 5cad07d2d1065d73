"""No setting names a class, whatever way it comes; YAML is read within limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("jsonargparse")
from bert_fast.cli import settings
from bert_fast.cli.main import main

CLASS = "sentinel_of_the_test.Thing"
SPEC = f'{{"class_path": "{CLASS}"}}'
SPEC_WITH_ARGUMENTS = f'{{"class_path": "{CLASS}", "init_args": {{"a": 1}}}}'
FINETUNE = ["finetune", "classification", "--model", "m", "--output_dir", "o", "--data.train", "t"]
MULTITASK = ["multitask", "--model", "m", "--output_dir", "o"]
PRETRAIN = ["pretrain", "--output_dir", "o", "--data.folder", "d", "--steps", "1"]

FILES = [
    f"class_path: {CLASS}",
    f"options: {SPEC}",
    f"options: {SPEC_WITH_ARGUMENTS}",
    f"options:\n  x:\n    class_path: {CLASS}\n    init_args: {{}}",
    f"options: {{x: [[{SPEC}]]}}",
    f"options: {{x: {{init_args: {{class_path: {CLASS}}}}}}}",
    f'options: {{x: {{"class\\x5fpath": {CLASS}}}}}',
    f"optimizer: {CLASS}",
    f"optimizer: {SPEC}",
    f"optimizer.class_path: {CLASS}",
    f"data: {CLASS}",
    f"data: {{class_path: {CLASS}, init_args: {{train: t}}}}",
    f"data: {{columns: {SPEC}}}",
    f"data: {{names: [{SPEC}]}}",
    f"text: {CLASS}",
    f"loss: {{class_weights: {SPEC}}}",
    f"loss: {{class_weights: [{SPEC}]}}",
    f"model: {SPEC}",
    f"steps: {SPEC}",
    "__path__: /etc/passwd",
    f"a: &a {SPEC}\noptions: {{x: *a}}",
    f"<<: {SPEC}",
    f"options: {{<<: {SPEC}}}",
    f"options: {{x: !!python/object/apply:{CLASS} []}}",
    f"options: {{x: !!python/name:{CLASS} ''}}",
    f"options: {{x: !!python/module:{CLASS.split('.')[0]} ''}}",
    "--- !!python/object:collections.OrderedDict {}",
]
TASK_FILES = [
    f"tasks: {CLASS}",
    f"tasks: {{a: {CLASS}}}",
    f"tasks: {{a: {SPEC}}}",
    f"tasks: {{a: {{task: classification, data: {CLASS}}}}}",
    f"tasks: {{a: {{task: classification, data: {SPEC}}}}}",
    f"tasks: {{a: {{task: classification, data: {{train: t}}, text: {CLASS}}}}}",
    f"tasks: {{a: {{task: classification, data: {{train: t}}, text: {SPEC}}}}}",
    f"tasks: {{a: {{task: classification, data: {{train: t}}, options: {{x: {SPEC}}}}}}}",
]
ARGUMENTS = [
    *[[*FINETUNE, *x] for x in (
        ["--options", SPEC], ["--options", SPEC_WITH_ARGUMENTS], ["--options.x", SPEC], ["--options.class_path", CLASS],
        ["--options.class-path", CLASS], ["--options.x.class_path", CLASS], ["--options.x.init_args.a", "1"],
        ["--options+", SPEC], ["--optimizer", CLASS], ["--optimizer", SPEC], [f"--optimizer={CLASS}"],
        ["--optimizer.class_path", CLASS], ["--data", CLASS], ["--data", SPEC], ["--text.class_path", CLASS],
        ["--text.help", CLASS], ["--help.text", CLASS], ["--loss.class_weights", SPEC], ["--data.names", f"[{SPEC}]"],
        ["--data.columns", SPEC], ["--betas", SPEC], ["--config", SPEC], ["--config", f"options: {SPEC}"],
        ["--recipe", SPEC], ["--recipe", CLASS],
    )],
    *[[*MULTITASK, *x] for x in (
        ["--tasks", CLASS], ["--tasks", f"{{a: {CLASS}}}"], ["--tasks", f"{{a: {SPEC}}}"], ["--tasks.a", CLASS],
        ["--tasks.a", SPEC], ["--tasks.a.data", CLASS], ["--tasks.a.text", CLASS], ["--tasks.a.class_path", CLASS],
    )],
    ["predict", "m", "a", "--options", SPEC], ["predict", "m", "a", "--options.x", SPEC],
    ["predict", "m", "a", "--columns", SPEC], ["evaluate", "m", "a.csv", "--options.init_args.x", "1"],
    ["sweep", *FINETUNE[1:], "--grid", SPEC], ["sweep", *FINETUNE[1:], "--grid", f"{{optimizer: [{CLASS}]}}"],
    ["sweep", *FINETUNE[1:], "--grid", f"{{optimizer: [{SPEC}]}}"],
    [*PRETRAIN, "--model", CLASS], [*PRETRAIN, "--model", SPEC], [*PRETRAIN, "--optimizer", SPEC],
    ["prepare", "--output", "y", "--sources", f"[{SPEC}]"], ["verify", "--ops", f"[{SPEC}]"],
]  # fmt: skip


@pytest.fixture(autouse=True)
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that must not be imported, on the path; the test runs in an empty folder."""
    modules, work = tmp_path / "modules", tmp_path / "work"
    modules.mkdir()
    work.mkdir()
    name = CLASS.split(".")[0]
    (modules / f"{name}.py").write_text("class Thing:\n    def __init__(self, **values): pass\n")
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(work)


def check_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for extra in ([], ["--print_config"]) if arguments[0] not in ("predict", "evaluate", "verify") else ([],):
        assert main([*arguments, *extra]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        assert CLASS.split(".")[0] not in sys.modules


@pytest.mark.parametrize("text", FILES)
def test_a_file_names_no_class(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(text)
    check_refused([*FINETUNE, "--config", "run.yaml"], capsys)


@pytest.mark.parametrize("text", TASK_FILES)
def test_a_file_of_tasks_names_no_class(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(text)
    check_refused([*MULTITASK, "--config", "run.yaml"], capsys)


@pytest.mark.parametrize("text", [f"class_path: {CLASS}", f"max_length: {SPEC}", f"text: {CLASS}"])
def test_a_file_of_a_group_names_no_class(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.yaml").write_text(text)
    check_refused([*FINETUNE, "--text", "text.yaml"], capsys)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda x: " ".join(x)[-60:])
def test_an_argument_names_no_class(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[-2:-1] == ["--grid"] and CLASS in arguments[-1] and "class_path" not in arguments[-1]:
        assert main(arguments) == 2  # the grid is read when the run starts: nothing is imported then either
        assert CLASS.split(".")[0] not in sys.modules
        return
    check_refused(arguments, capsys)


def test_the_environment_sets_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for prefix in ("BERT_FAST_FINETUNE_", "BERT_FAST_FINETUNE__", "BERT-FAST FINETUNE_", "BERT_FAST FINETUNE_", ""):
        monkeypatch.setenv(f"{prefix}SEED", "77")
        monkeypatch.setenv(f"{prefix}OPTIONS", SPEC)
        monkeypatch.setenv(f"{prefix}CONFIG", SPEC)
    with pytest.raises(SystemExit, match="0"):
        main([*FINETUNE, "--print_config"])
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["seed"], values["options"]) == (0, {})
    assert CLASS.split(".")[0] not in sys.modules


def test_texts_may_hold_these_words(capsys: pytest.CaptureFixture[str], base: Path, finetuned: Path) -> None:
    assert main(["predict", str(finetuned), "one class_path two", SPEC]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def alias_bomb(levels: int, merge: bool) -> str:
    """YAML whose aliases expand to 10 ** `levels` values."""
    lines = ["a0: &a0 {x0: 1}"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        inner = f"{{<<: [{aliases}], x{level}: 1}}" if merge else f"[{aliases}]"
        lines.append(f"a{level}: &a{level} {inner}")
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True], ids=["lists", "merge keys"])
def test_aliases_expand_within_limits(merge: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.load(alias_bomb(3, merge))
    Path("run.yaml").write_text(alias_bomb(12, merge))
    for arguments in (["--config", "run.yaml"], ["--options", alias_bomb(12, merge)]):
        assert main([*FINETUNE, *arguments]) == 2
        assert "values; expected at most 100,000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("options: &a {x: *a}", "an alias that contains itself"),
        ("options: &a [*a]", "an alias that contains itself"),
        ("[" * 5000, "nesting depth"),
        ("steps: " + "9" * 5000, "digits"),
        ("x" * (2**22 + 1), "characters; expected at most"),
        ("steps: 1\x00", "character"),
    ],
    ids=["alias in itself", "alias in a list", "depth", "digits", "length", "control character"],
)
def test_damaged_and_huge_files_are_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(text)
    assert main([*FINETUNE, "--config", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bert-fast finetune: error: run.yaml: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_file_without_an_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FINETUNE, "--config", "/dev/zero"]) == 2
    assert "characters; expected at most" in capsys.readouterr().err
