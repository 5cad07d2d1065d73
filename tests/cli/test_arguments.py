"""Arguments as people write them: dashes, short names, flags, lists; files of settings; what is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("jsonargparse")
from bert_fast.cli import verify
from bert_fast.cli.arguments import make_parser, parse, readable
from bert_fast.cli.main import COMMANDS, RECIPES, main
from bert_fast.cli.standard import Parser

FINETUNE = ["finetune", "classification", "--model", "m", "--output_dir", "o", "--data.train", "t"]
PREPARE = ["prepare", "--output", "y"]
PRETRAIN = ["pretrain", "--output_dir", "o", "--data.folder", "d", "--steps", "7"]


def settings_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The settings that a command line gives."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--print_config"])
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


def value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        (["--output-dir", "x"], "output_dir", "x"),
        (["--output-dir=a b"], "output_dir", "a b"),
        (["--lr", "1e-4"], "optimizer.lr", 1e-4),
        (["--optimizer.weight-decay=0.5"], "optimizer.weight_decay", 0.5),
        (["--weight-decay", "0.5"], "optimizer.weight_decay", 0.5),
        (["--max-length", "64"], "text.max_length", 64),
        (["--train", "rows.csv"], "data.train", "rows.csv"),
        (["--columns.label", "kind"], "data.columns", {"label": "kind"}),
        (["--data.columns.text-pair", "b"], "data.columns", {"text-pair": "b"}),
        (["--options.pooling", "mean"], "options", {"pooling": "mean"}),
        (["--options.columns", "a", "b c"], "options", {"columns": ["a", "b c"]}),
        (["--options", '{"pooling": "max"}'], "options", {"pooling": "max"}),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "true"], "overwrite", True),
        (["--overwrite=yes"], "overwrite", True),
        (["--overwrite", "False"], "overwrite", False),
        (["--no-overwrite"], "overwrite", False),
        (["--no-progress"], "progress", False),
        (["--no_progress"], "progress", False),
        (["--no-keep-best"], "keep_best", False),
        (["--freeze-embeddings"], "optimizer.freeze_embeddings", True),
        (["--no-freeze-embeddings", "--seed", "3"], "seed", 3),
        (["--names", "a", "b"], "data.names", ["a", "b"]),
        (["--names", "a,b"], "data.names", ["a", "b"]),
        (["--names", "[a, b]"], "data.names", ["a", "b"]),
        (["--names", "a", "--names+", "b"], "data.names", ["a", "b"]),
        (["--names+", "b"], "data.names", ["b"]),
        (["--class-weights", "1", "2", "0.5"], "loss.class_weights", [1.0, 2.0, 0.5]),
        (["--class-weights", "1,2"], "loss.class_weights", [1.0, 2.0]),
        (["--class-weights", "balanced"], "loss.class_weights", "balanced"),
        (["--betas", "0.8", "0.9"], "optimizer.betas", [0.8, 0.9]),
        (["--betas", "(0.8,0.9)"[1:-1]], "optimizer.betas", [0.8, 0.9]),
        (["--steps", "null"], "steps", None),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--data", "{train: other.csv, max_rows: 3}", "--max-rows", "4"], "data.max_rows", 4),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and all(isinstance(part, str) for part in x) else "",
)
def test_options_as_people_write_them(
    arguments: list[str], name: str, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert value(settings_of([*FINETUNE, *arguments], capsys), name) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["builtin"]),
        (["--sources", "my.txt"], ["my.txt"]),
        (["--sources", "my.txt", "other.txt", "--workers", "2"], ["my.txt", "other.txt"]),
        (["--sources", "my.txt,other.txt"], ["my.txt", "other.txt"]),
        (["--sources", '["my.txt", "crawl/**/*.gz"]'], ["my.txt", "crawl/**/*.gz"]),
        (["--sources", "crawl/*.jsonl", "[ab]*.txt"], ["crawl/*.jsonl", "[ab]*.txt"]),
        (["--sources", "1,2.txt"], ["1,2.txt"]),  # the name of a file
        (["--sources+", "my.txt"], ["my.txt"]),  # added to nothing: not to the default
        (["--sources+=my.txt"], ["my.txt"]),
        (["--sources", "a.txt", "--sources+", "b.txt", "--sources+", "c.txt"], ["a.txt", "b.txt", "c.txt"]),
        (["--sources=datasets:wiki:20220301.en"], ["datasets:wiki:20220301.en"]),
    ],
)
def test_one_or_several_sources(
    arguments: list[str],
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1,2.txt").write_text("x")
    assert settings_of([*PREPARE, *arguments], capsys)["sources"] == expected


def test_files_are_merged_in_order_and_arguments_override_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("steps: 5\nseed: 1\noptimizer:\n  lr: 1e-3\n  eps: 1e-6\n")
    second.write_text("seed: 2\noptimizer.lr: 2e-3\ndata: {seq_len: 64}\n")
    files = ["--config", str(first), f"--config={second}"]
    values = settings_of(["pretrain", "--seed=3", *files, "--output_dir", "o", "--data.folder", "d"], capsys)
    assert (values["steps"], values["seed"], values["data"]["seq_len"]) == (5, 3, 64)
    assert (values["optimizer"]["lr"], values["optimizer"]["eps"]) == (2e-3, 1e-6)
    (tmp_path / "sources.yaml").write_text("sources+: [a.txt]\n")
    prepare = [*PREPARE, "--config", str(tmp_path / "sources.yaml")]
    assert settings_of(prepare, capsys)["sources"] == ["a.txt"]
    assert settings_of([*prepare, "--sources+", "b.txt"], capsys)["sources"] == ["a.txt", "b.txt"]
    assert settings_of([*prepare, "--sources", "b.txt"], capsys)["sources"] == ["b.txt"]
    assert settings_of([*prepare, *prepare[3:]], capsys)["sources"] == ["a.txt", "a.txt"]


def test_settings_of_several_tasks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one = {"task": "classification", "data": {"train": "a.csv"}, "text": {"max_length": 24}, "weight": 2.0}
    two = {"task": "token-classification", "data": {"train": "b.conll", "columns": {"tokens": "x"}}}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"one": one, "two-2": two}, "model": "m"}))
    command = ["multitask", "--config", str(tmp_path / "tasks.yaml"), "--output-dir", "o", "--lr", "1e-3"]
    values = settings_of(command, capsys)
    given = values["tasks"]["one"]
    assert (given["weight"], given["text"]["max_length"], given["data"]["train"]) == (2.0, 24, "a.csv")
    assert list(values["tasks"]) == ["one", "two-2"]
    assert values["optimizer"]["lr"] == 1e-3
    assert settings_of(["multitask", "--tasks", str(yaml.safe_dump({"one": one}, default_flow_style=True)), "--model=m",
                        "--output-dir=o"], capsys)["tasks"].keys() == {"one"}  # fmt: skip


def test_help_of_a_task_lists_its_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: question-answering\n")
    for arguments, expected in (
        (["finetune", "--task", "ner", "--help"], "--options.learnt_scheme {iob1,iob2,iobes}"),
        (["finetune", "token-classification", "-h"], "--options.scheme"),
        (["finetune", "--config", str(tmp_path / "run.yaml"), "--help"], "--options.null_threshold"),
        (["sweep", "multi-label", "--help"], "--options.threshold"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        printed = capsys.readouterr().out
        assert expected in printed
        assert "--optimizer.lr" in printed
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    assert "bert-fast finetune TASK --help" in capsys.readouterr().out
    assert main(["finetune", "classifcation", "--help"]) == 2
    assert "did you mean 'classification'?" in capsys.readouterr().err


WRONG = [
    # commands
    ["fintune"], ["pretrian"], ["fill-masks"], ["--treads", "2"], ["predict-all"], ["\x1b[31m"], ["Finetune"], ["-x"],
    # options: unknown, ambiguous, without a value, with a wrong one
    *[[*FINETUNE, *x] for x in (
        ["--learning-rate", "1"], ["--rows", "3"], ["--epoch", "3"], ["--epochs"], ["--epochs", "--seed", "1"],
        ["--epochs", "many"], ["--epochs", ""], ["--epochs=nan"], ["--epochs", "-1"], ["--epochs", "[1]"],
        ["--steps", "1.5"], ["--steps", "x"], ["--steps", "0"], ["--steps", "{a: 1}"], ["--steps", "None"],
        ["--seed", "-1"], ["--seed", "1e3"], ["--seed="], ["--lr", "0"], ["--lr", "fast"], ["--lr", "inf"],
        ["--optimizer.decay", "cosin"], ["--optimizer", "x"], ["--optimizer", "{lr: x}"], ["--optimizer", "[1]"],
        ["--optimizer", "{ler: 1}"], ["--optimizer.lrr", "1"], ["--optimizer.betas", "0.9"], ["--betas", "a", "b"],
        ["--betas", "1", "2", "3"], ["--overwrite", "maybe"], ["--overwrite="], ["--no-overwrite=1"], ["--no-steps"],
        ["--no-overwrite", "true"], ["--overwrites"], ["--progress", "3"], ["--precision", "fp16"],
        ["--precision", "FP32"], ["--text.long", "middle"], ["--text.max_length", "2"], ["--max-length", "long"],
        ["--data.names"], ["--data.columns", "label"], ["--data.columns", "[a]"], ["--data.columns", "{1: 2}"],
        ["--data.columns.label"], ["--data.empty", "ignore"], ["--data.folds", "1"], ["--data.fold", "3"],
        ["--data.dev_fraction", "2"], ["--options", "x"], ["--options", "[1]"], ["--options", "{a: 1, a: 2}"],
        ["--options.pooling", "men"], ["--options.x", "1"], ["--options."], ["--loss.class_weights", "balance"],
        ["--loss.class_weights", "-1", "1"], ["--loss.focal_gamma", "-1"], ["--loss.resample", "some"],
        ["--augment.mask", "2"], ["--dropout", "1"], ["--config"], ["--config", "absent.yaml"], ["--config", "."],
        ["--config", "steps: 3"], ["--recipe"], ["--recipe", "finetun"], ["--recipe", "../finetune"], ["extra"], ["-q"],
        ["--"], ["---"], ["--=3"], ["--task"], ["--task", "classify"], ["--print_config=all"], ["--threads", "x"],
        ["--threads", "-1"], ["--threads"], ["--threads", "²"], ["--help=3"], ["--data.train"], ["--data", "rows.csv"],
        ["--data", "{train: 3}"], ["--options.class_path", "os.system"], ["--model", ""], ["--output-dir", ""],
    )],
    ["finetune"], ["finetune", "classification"], ["finetune", "clasification", *FINETUNE[2:]],
    ["multitask", "--model", "m", "--output_dir", "o"], ["multitask", "--tasks", "x"], ["multitask", "--tasks.a", "x"],
    ["multitask", "--model", "m", "--output_dir", "o", "--tasks", "{}"],
    ["multitask", "--model", "m", "--output_dir", "o", "--tasks", "{a: {task: classification, date: {train: t}}}"],
    ["multitask", "--model", "m", "--output_dir", "o", "--tasks", "{a/b: {task: classification, data: {train: t}}}"],
    ["sweep", "classification", *FINETUNE[2:], "--grid", "lr"],
    ["sweep", "classification", *FINETUNE[2:], "--grid", "{optimizer.lr: 3}"],
    ["sweep", "classification", *FINETUNE[2:], "--grid", "{optimizer: [fast]}"],
    ["sweep", "classification", *FINETUNE[2:], "--grid", "{lrr: [1]}"],
    ["sweep", "classification", *FINETUNE[2:], "--keep", "some"], ["sweep", "classification", "--folds", "two"],
    # the other commands
    ["pretrain"], [*PRETRAIN, "--model.size", "huge"], [*PRETRAIN, "--epochs", "1"], [*PRETRAIN, "--model", "mini"],
    [*PRETRAIN, "--optimizer.name", "adam"], [*PRETRAIN, "--on-divergence", "go"], [*PRETRAIN, "--cuda-graph"],
    [*PRETRAIN, "--warmup-steps", "9"], [*PRETRAIN, "--resume", "absent"], [*PRETRAIN, "--parallel", "tp"],
    ["prepare"], [*PREPARE, "--sources", "absent.txt"], [*PREPARE, "--sources"], [*PREPARE, "--sources", "[]"],
    [*PREPARE, "--boundary", "lines"], [*PREPARE, "--language", "English"], [*PREPARE, "--workers", "-1"],
    ["predict"], ["predict", "absent", "a"], ["predict", "absent", "a", "--output", "a.txt"],
    ["predict", "absent", "a", "--output", ""], ["predict", "absent", "--columns", "label"],
    ["predict", "absent", "--empty", "ignore"], ["predict", "absent", "--batch-tokens", "many"],
    ["predict", "absent", "--options", "{class_path: os.system}"], ["predict", "absent", "--class-column"],
    ["evaluate"], ["evaluate", "absent"], ["evaluate", "absent", "rows.csv"], ["evaluate", "absent", "a", "b"],
    ["evaluate", "absent", "rows.csv", "--metrics", "."], ["embed"], ["embed", "absent", "a"],
    ["embed", "absent", "a", "--pooling", "median"], ["embed", "absent", "a", "--output", "a.csv"],
    ["embed", "absent", "a", "--max-seqlen", "long"], ["embed", "absent", "--file", "absent.txt"],
    ["fill-mask", "absent", "a [MASK]"], ["fill-mask", "absent", "a", "--top-k", "x"], ["fill_mask", "absent", "a"],
    ["explain", "absent", "a"], ["explain", "absent", "a", "--steps", "0"], ["explain", "absent", "a", "--output", "."],
    ["report"], ["report", "absent"], ["report", "absent", "absent2"], ["report", ".", "--png", "x"],
    ["replay"], ["replay", "absent"], ["replay", "absent", "--device", "tpu"],
    ["verify", "--ops", "kitchen"], ["verify", "--ops", "[lamb]", "--impls", "[cuda]"], ["verify", "--seeds", "3"],
    ["verify", "--seed", "x"], ["verify", "--ops"], ["verify", "--record", "maybe"],
    ["info", "--jsn"], ["info", "extra"], ["info", "--json", "maybe"], ["info", "--js"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG, ids=lambda x: " ".join(x)[-60:])
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bert-fast")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_list_of_wrong_command_lines_is_long() -> None:
    assert len({tuple(arguments) for arguments in WRONG}) == len(WRONG) > 119


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["fintune"], "finetune"),
        (["evalute"], "evaluate"),
        ([*FINETUNE, "--epoch", "3"], "--epochs"),
        ([*FINETUNE, "--optimizer.lrr", "3"], "--optimizer.lr"),
        ([*FINETUNE, "--learning-rate", "3"], "--lr"),
        ([*FINETUNE, "--outputdir", "x"], "--output_dir"),
        ([*FINETUNE, "--optimizer.decay", "cosin"], "cosine"),
        ([*FINETUNE, "--recipe", "finetun"], "finetune"),
        ([*FINETUNE, "--optimizer", "{ler: 1}"], "optimizer.lr"),
        ([*FINETUNE, "--class-weights", "balancd"], "balanced"),
        (["finetune", "clasification", *FINETUNE[2:]], "classification"),
        (["finetune", "--task", "regresion", *FINETUNE[2:]], "regression"),
        ([*PRETRAIN, "--model.size", "smal"], "small"),
        ([*PREPARE, "--soruces", "x"], "--sources"),
        (["info", "--jsn"], "--json"),
    ],
    ids=lambda x: " ".join(x)[-40:] if isinstance(x, list) else x,
)
def test_the_most_similar_name_is_suggested(
    arguments: list[str],
    meant: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert f"did you mean {meant!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ops", "a", "b", "--record"],
        ["--ops", "a,b", "--record", "true"],
        ["--ops=[a, b]", "--record=yes"],
        ["--no-record", "--ops", "[a,b]", "--record", "on"],
    ],
    ids=" ".join,
)
def test_verify_reads_what_the_other_commands_read(arguments: list[str]) -> None:
    """Without jsonargparse, and as jsonargparse reads the same arguments."""
    standard = Parser("bert-fast verify", "")
    verify.add_arguments(standard)
    parsed = standard.parse(arguments)
    assert (parsed.ops, parsed.impls, parsed.seed, parsed.record) == (["a", "b"], None, 0, True)
    with_jsonargparse = make_parser("bert-fast verify", "")
    verify.add_arguments(with_jsonargparse)
    others = parse(with_jsonargparse, arguments, str)
    assert (others.ops, others.impls, others.seed, others.record) == (["a", "b"], None, 0, True)
    assert standard.parse(["--no-record"]).record is False
    assert standard.parse([]).ops is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "m", "--dtypes", "float32", "bfloat16", "--against", "transformers"],
        ["--tolerance", "1e-3", "--max-seqlen", "7", "--library=fused"],
        ["--normalize", "true", "--dialect", "tei", "--endpoint", "http://localhost"],
        ["--dtypes=[float32, float16]", "--normalize", "false", "--kernels", "a b.py"],
        [],
    ],
    ids=" ".join,
)
def test_every_option_of_verify_is_read_alike(arguments: list[str]) -> None:
    standard = Parser("bert-fast verify", "")
    verify.add_arguments(standard)
    with_jsonargparse = make_parser("bert-fast verify", "")
    verify.add_arguments(with_jsonargparse)
    assert vars(standard.parse(arguments)) == vars(parse(with_jsonargparse, arguments, str))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes", "float32", "float8"], "--dtypes has 'float8'; expected some of float32"),
        (["--library", "onnx"], "--library is 'onnx'; expected one of 'auto'"),
        (["--tolerance", "small"], "--tolerance is 'small'; expected a number"),
        (["--max_seqlen", "1.5"], "--max_seqlen is '1.5'; expected an integer"),
        (["--normalize", "maybe"], "--normalize is 'maybe'; expected true or false"),
    ],
)
def test_verify_names_a_wrong_value(arguments: list[str], message: str) -> None:
    standard = Parser("bert-fast verify", "")
    verify.add_arguments(standard)
    with pytest.raises(ValueError, match=re.escape(message)):
        standard.parse(arguments)


def test_ambiguous_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FINETUNE, "--rows", "3"]) == 2
    assert "--rows may be --augment.rows or --batch.rows" in capsys.readouterr().err


def test_settings_of_a_file_are_checked_with_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, message in (
        ("optimizr: {lr: 3}\n", "unknown setting optimizr; did you mean 'optimizer'?"),
        ("optimizer: {ler: 3}\n", "unknown setting optimizer.ler; did you mean 'optimizer.lr'?"),
        ("lr: 3\n", "unknown setting lr; did you mean 'optimizer.lr'?"),
        ("optimizer: 3\n", "optimizer is 3; expected settings"),
        ("- a\n", "is ['a']; expected settings"),
        ("3: a\n", "has the key 3; expected the name of a setting"),
        ("steps: [1\n", "while parsing a flow sequence"),
        ("steps: 1\nsteps: 2\n", "line 1: 'steps' is set 2 times; expected once"),
    ):
        path.write_text(text)
        assert main([*FINETUNE, "--config", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"bert-fast finetune: error: {path}")
        assert message in error
    path.write_bytes(b"steps: \xff")
    assert main([*FINETUNE, "--config", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    path.write_text("")
    with pytest.raises(SystemExit, match="0"):
        main([*FINETUNE, "--config", str(path), "--print_config"])


def test_messages_about_types_are_sentences() -> None:
    assert (
        readable("Parser key \"a.b\":\n  Expected a <class 'float'>. Got value: x") == "a.b is 'x'; expected a number"
    )
    union = (
        'Parser key "s":\n Does not validate against any of the Union subtypes\n '
        "Subtypes: [typing.Literal['p', 'q'], list[float], <class 'int'>, <class 'NoneType'>]\n Errors:\n - no\n "
        "Given value type: <class 'str'>\n Given value: x"
    )
    assert readable(union) == "s is 'x'; expected p or q or list[float] or an integer or null"
    assert readable("something else") == "something else"


def test_every_recipe_and_command_has_a_name_without_surprises() -> None:
    assert all(name == name.lower().replace("_", "-") for name in COMMANDS)
    assert list(RECIPES.glob("*.yaml"))


def test_groups_and_lists_of_commands_without_a_file_of_settings(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("sentence;kind\none yes two;yes\ntwo no one;-\n")
    arguments = ["evaluate", str(finetuned), str(tmp_path / "rows.csv"), "--columns.label", "kind", "--no-label", "-"]
    for given in (["--format", "{delimiter: ;}"], ["--delimiter", ";"], ["--format.delimiter=;"]):
        assert main([*arguments, *given]) == 0
        assert "accuracy" in capsys.readouterr().out
    assert main([*arguments, "--format", "{delimeter: ;}"]) == 2
    assert "unknown option --format.delimeter; did you mean '--format.delimiter'?" in capsys.readouterr().err
