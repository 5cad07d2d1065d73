"""Preparation with Ray Data on a local Ray: the same files, and the original exception of a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bert_fast.data import PrepareConfig, prepare

RAY = """
import json, sys
import ray
from bert_fast.data import PrepareConfig, prepare

ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
prepare(PrepareConfig(**json.loads(sys.argv[1]), engine="ray", workers=0))
try:
    prepare(PrepareConfig(**json.loads(sys.argv[2]), engine="ray", errors="raise"))
except ValueError as error:
    print("error:", error)
"""


def test_a_local_ray_gives_the_same_files(text_file: Path, tmp_path: Path) -> None:
    settings = {"sources": [str(text_file)], "vocab_size": 300, "part_bytes": 2**14, "progress": False}
    prepare(PrepareConfig(str(tmp_path / "here"), **settings))
    (tmp_path / "broken.jsonl").write_text('{"text": "A fine text of a document."}\n{broken\n')
    broken = {**settings, "sources": [str(tmp_path / "broken.jsonl")], "output": str(tmp_path / "none")}
    arguments = [json.dumps({**settings, "output": str(tmp_path / "ray")}), json.dumps(broken)]
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RAY, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, **quiet},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = {str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert len(files) > 6
    for name in files:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name
    assert "error:" in done.stdout
    assert "broken.jsonl, line 2: not JSON" in done.stdout
    assert not (tmp_path / "none").exists()


def test_without_ray_the_error_has_the_extra(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"engine 'ray' needs the package ray: pip install 'bert_fast\[ray\]'"):
        prepare(PrepareConfig(str(tmp_path / "data"), [str(text_file)], engine="ray", progress=False))
