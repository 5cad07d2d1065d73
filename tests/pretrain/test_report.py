"""The report on pretraining runs: self-contained, escaped, with every run; and the curves as PNG files."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from html import escape
from pathlib import Path
from typing import Any

import pytest

from bert_fast.cli.main import main
from bert_fast.pretrain.report import read_runs, write_pretrain_report


def make_run(folder: Path, lr: float, steps: int = 4, **extra: Any) -> Path:
    folder.mkdir(parents=True)
    settings = {"output_dir": str(folder), "optimizer": {"lr": lr, "name": "adamw"}, "steps": steps, "note": "<b>"}
    (folder / "pretrain.json").write_text(json.dumps(settings))
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        train = {"loss": 8 / step, "mlm_accuracy": step / 10, "nsp_accuracy": None, "lr": lr, "grad_norm": 1.0 + step}
        speed = {"tokens": 100 * step, "tokens_per_second": 1000.0 + step, "tflops": 0.5, "fill": 0.9, "skipped": 0}
        lines.append({"step": step, "kind": "train", **train, **speed, **extra})
        if step % 2 == 0:
            held_out = {"loss": 9 / step, "mlm_accuracy": step / 20, "nsp_accuracy": None}
            lines.append({"step": step, "kind": "eval", **held_out})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "<run>", 1e-3, mfu=0.25)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "Pretraining: &lt;run&gt;" in text
    assert "<b>" not in text
    assert '<td>training loss, last</td><td class="n">2.0000</td>' in text
    assert '<td>held-out masked-token accuracy, best</td><td class="n">0.2000</td>' in text
    assert '<td>MFU, median</td><td class="n">0.2500</td>' in text
    for title in ("loss", "masked-token accuracy", "learning rate", "gradient norm", "real tokens per second", "MFU"):
        assert title in text
    assert "next-sentence accuracy" not in text  # not in the log
    assert text.count("<svg") == 6
    assert 'src="' not in text
    assert 'href="http' not in text
    assert "Settings that differ" not in text


def test_several_runs_are_compared_with_their_differing_settings_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "a", 1e-3), make_run(tmp_path / "b", 5e-4, steps=6)]
    page, pictures = tmp_path / "both" / "page.html", tmp_path / "pictures"
    assert main(["report", *map(str, runs), "--output", str(page), "--png", str(pictures)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<tr><td>optimizer.lr</td><td>0.001</td><td>0.0005</td></tr>" in text
    assert "<tr><td>steps</td><td>4</td><td>6</td></tr>" in text
    assert "optimizer.name" not in text[: text.index("<details>")]
    names = sorted(path.name for path in pictures.iterdir())
    assert names == [f"{name}.png" for name in ("grad_norm", "loss", "lr", "mlm_accuracy", "tokens_per_second")]
    assert all((pictures / name).read_bytes().startswith(b"\x89PNG") for name in names)
    order = ("loss", "mlm_accuracy", "lr", "grad_norm", "tokens_per_second")
    assert capsys.readouterr().out.splitlines() == [str(page), *(str(pictures / f"{name}.png") for name in order)]


@pytest.mark.parametrize("name", ["cost$x_{$y", "a$b", r"\$_\$", "_hidden", "new\nline\x1b[0m", "\udce4"])
def test_any_name_of_a_folder_is_drawn_as_it_is(tmp_path: Path, name: str) -> None:
    runs = [make_run(tmp_path / name, 1e-3), make_run(tmp_path / "b", 1e-3)]
    write_pretrain_report(runs, tmp_path / "page.html", tmp_path / "pictures")
    figures = (tmp_path / "page.html").read_text(encoding="utf-8").split("<svg")[1:]
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    for figure in figures:
        assert f">{escape(shown)}<" in figure or f"> {escape(shown)}<" in figure
        xml.etree.ElementTree.fromstring(f"<svg{figure[: figure.index('</svg>')]}</svg>")


def test_runs_with_the_same_name_are_named_by_path(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / part / "run", 1e-3) for part in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_damaged_lines_of_a_log_are_left_out_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1e-3)
    lines = (run / "log.jsonl").read_bytes().splitlines()
    strange = json.dumps({"step": 9, "kind": "train", "loss": "x", "lr": True, "tokens": None, "mfu": [1]}).encode()
    (run / "log.jsonl").write_bytes(b"\n".join([lines[0], b"\xff", *lines[1:], strange]) + b"\n")
    write_pretrain_report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<p>{run}/log.jsonl has damaged lines (2; 1 in all), which are left out</p>" in text
    assert '<td>training loss, last</td><td class="n">2.0000</td>' in text
    (run / "pretrain.json").write_text("[]")
    with pytest.raises(ValueError, match=r"pretrain\.json is \[\]; expected an object"):
        write_pretrain_report([run], tmp_path / "page.html")


def test_folders_without_a_run_and_empty_logs_raise(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1e-3)
    with pytest.raises(FileNotFoundError, match=r"pretrain\.json does not exist; expected a folder that bert-fast"):
        write_pretrain_report([run, tmp_path], tmp_path / "page.html")
    (run / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="the log of run is empty"):
        write_pretrain_report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
