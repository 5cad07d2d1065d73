"""Hostile texts, labels, names and settings: huge, malformed, or markup for a page, a terminal or a spreadsheet."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.torture.attack import Broken, Case
from tests.torture.hostile_files import attempt, base, embed, hostile
from tests.torture.material import SIZES, finetune_command, prepare_command, pretrain_command
from tests.torture.process import command


@hostile
def huge_words(case: Case, folder: Path) -> None:

    blob = "".join(random.Random(1).choices("ABCDEFGHIJKLMNOPabcdefghijklmnop0123456789+/", k=2_000_000))
    (folder / "a.txt").write_text(f"{'a' * 300_000}\n\n{blob}\n\na usual sentence here.\n")
    run = prepare_command(
        folder / "data", folder / "a.txt", sources=f"[{folder / 'a.txt'}, {case.material / 'corpus.txt'}]"
    )
    attempt(case, run, "words of 300,000 and 2,000,000 characters", fails=False)
    (folder / "rows.txt").write_text(f"{'a' * 300_000}\n{blob}\n")
    attempt(
        case,
        command("predict", case.material / "tuned", "--file", folder / "rows.txt"),
        "rows of huge words",
        fails=False,
    )


_LINES = {
    "deep JSON": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a number of 5,000 digits": '{"text": "a text here", "id": ' + "7" * 5000 + "}",
    "a number as the text": '{"text": ' + "7" * 5000 + "}",
    "a lone surrogate": '{"text": "a \\ud800 text that is here"}',
    "NaN": '{"text": NaN}',
    "an exponent": '{"text": 1e999999}',
    "invalid UTF-8": b'{"text": "caf\xe9 and more"}',
    "a null byte": '{"text": "a\\u0000b and some more"}',
    "a repeated key": '{"text": "one text here", "text": "another one"}',
    "a list": '["a", "text"]',
    "a byte order mark": b'\xef\xbb\xbf{"text": "a text here"}',
    "UTF-16": '{"text": "a text here"}'.encode("utf-16"),
}


@hostile
def rows_of_strange_json(case: Case, folder: Path) -> None:
    name = case.rng.choice(sorted(_LINES))
    line = _LINES[name]
    path = folder / "rows.jsonl"
    good = b'{"text": "a small bird sings near the river"}\n'
    path.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    case.note(name)
    run = prepare_command(folder / "data", path, sources=f"[{path}, {case.material / 'corpus.txt'}]")
    attempt(case, run, f"prepare, {name}", fails=False)
    attempt(case, command("predict", case.material / "tuned", "--file", path), f"predict, {name}")
    attempt(case, command("embed", case.material / "base", "--file", path), f"embed, {name}")
    attempt(case, command("predict", case.material / "tuned"), f"predict from stdin, {name}", stdin=path.read_bytes())


_CONFIG = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_BAD = (10**9, 2**31, 2**63, 10**30, -1, 0, 1.5, float("nan"), float("inf"), "12", "x", [2], {}, None, True)
_OTHER = {
    "layer_norm_eps": (-1.0, 0.0, float("nan"), float("inf"), "x", None, []),
    "hidden_act": ("x", 3, None, [], "__import__"),
    "hidden_dropout_prob": (-1, 1.5, float("nan"), "x", None),
    "pad_token_id": (-1, 10**9, "x", 1.5),
    "model_type": ("x", "gpt2", None, 3, "../bert", "\x1b[31m"),
    "initializer_range": (-1, float("nan"), "x"),
    "architectures": ("x", 3, [3], ["os.mkdir"]),
    "id2label": ("x", {"a": "b"}, {"0": 3}, []),
    "num_labels": (10**9, -1, "x"),
}


@hostile
def settings_of_models(case: Case, folder: Path) -> None:
    """config.json with sizes that no machine has, and with values of other types."""
    name = case.rng.choice([*_CONFIG * 2, *_OTHER])
    value = case.rng.choice(_OTHER.get(name, _BAD))
    model = base(case, folder)
    config = json.loads((model / "config.json").read_text())
    config[name] = value
    (model / "config.json").write_text(json.dumps(config))
    case.note(f"{name} = {value!r}")
    is_size = name in _CONFIG and not (value is None or value is True)
    embed(case, model, f"{name} = {value!r}", fails=True if is_size else None)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES, name: value}))
    run = pretrain_command(folder / "run", case.material, **{"model.config": folder / "config.json", "steps": 1})
    if name not in ("vocab_size",):  # the prepared data has its own
        attempt(
            case,
            run,
            f"pretrain, {name} = {value!r}"[:100],
            fails=True if is_size and _too_large(value) else None,
            memory=3 << 30,
        )


def _too_large(value: Any) -> bool:
    return isinstance(value, int) and value >= 10**9


_SCRIPT = "<script>alert(1)</script>"


@hostile
def markup_in_reports(case: Case, folder: Path) -> None:
    """Texts, labels and names of a run that are HTML."""
    lines = "".join(
        f'"{word} {_SCRIPT} ""x"" <img src=x onerror=alert(1)>","{label}"\n'
        for word, label in [("good", f"g{_SCRIPT}"), ("bad", "b&<b>")] * 12
    )
    (folder / "rows.csv").write_text("text,label\n" + lines)
    for target in (folder / "cost$x_{$y <i>",):
        files = {"data.train": folder / "rows.csv", "data.dev": folder / "rows.csv", "report": "true"}
        attempt(case, finetune_command(target, case.material, **files), "markup in rows", fails=False, memory=4 << 30)
        page = (target / "report.html").read_text()
        if _SCRIPT in page or "<img src=x" in page or "<i>" in page:
            raise Broken("markup of a row or a name is in report.html")
        explained = folder / "explain.html"
        attempt(
            case,
            command("explain", target, f"a {_SCRIPT} bird", "--output", explained),
            "explain",
            fails=False,
            memory=4 << 30,
        )
        if _SCRIPT in explained.read_text():
            raise Broken("markup of a text is in the page of explain")


@hostile
def escapes_for_terminals(case: Case, folder: Path) -> None:
    escape = "\x1b[31mred\x07\x9b1m\x1b]0;title\x07"
    (folder / "rows.csv").write_text(f'text,label\n"a {escape} bird",good\n"the old house",bad\n' * 8)
    named = folder / f"rows{escape.replace('/', '')}.csv"
    shutil.copy(folder / "rows.csv", named)
    tuned = case.material / "tuned"
    attempt(case, command("predict", tuned, "--file", folder / "rows.csv"), "predict", fails=False)
    attempt(case, command("predict", tuned, "--file", named), "a path", fails=False)
    attempt(case, command("predict", tuned, "--file", folder / f"no{escape}.csv"), "a missing path", fails=True)
    attempt(case, command("fill-mask", case.material / "base", f"a [MASK] {escape}"), "fill-mask")
    attempt(
        case,
        command("embed", case.material / "base", "a", "--output", folder / f"no{escape}.xyz"),
        "an output",
        fails=True,
    )
    attempt(case, command("report", folder / f"no{escape}"), "report", fails=True)
    attempt(case, command(f"pre{escape}"), "a command", fails=True)
    attempt(
        case,
        command("prepare", "--output", folder / "o", f"--sources=[{folder}/no{escape.split(']')[0]}]"),
        "a source",
        fails=True,
    )
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"a bird {i},l{i % 2}{escape}\n" for i in range(16)))
    files = {"data.train": folder / "labels.csv", "data.dev": folder / "labels.csv"}
    attempt(case, finetune_command(folder / "out", case.material, **files), "labels", memory=4 << 30)


@hostile
def formulas_for_spreadsheets(case: Case, folder: Path) -> None:
    """With the option for it, no cell of predictions.csv starts a formula."""

    texts = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1"]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = folder / "p.csv"
    run = command(
        "predict",
        case.material / "tuned",
        "--file",
        folder / "rows.jsonl",
        "--output",
        output,
        "--quote_formulas",
        "true",
    )
    attempt(case, run, "formulas", fails=False)
    with output.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["text"][:1] in "=+-@\t\r":
                raise Broken(f"a cell starts a formula: {row['text']!r}")


@hostile
def names_of_outputs(case: Case, folder: Path) -> None:
    """Names that are options, patterns, very long, or hold line breaks."""
    for name in ("a\nb", "x" * 300, " ", "-n", "$(touch mark)", "`touch mark`", "*", "{0}", "%s", "é" * 100, "a\\b"):
        run = command("embed", case.material / "base", "a text", f"--output={folder / name}.jsonl")
        attempt(case, run, f"an output named {name[:20]!r}", fails=len(f"{name}.jsonl".encode()) > 255)
