"""The host time of a layer: each path is the one that its name says."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.models import host_time
from bert_fast.models.fast_path import LayerFastPath


def test_a_hook_on_each_layer_disables_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = LayerFastPath.run

    def counted(self: LayerFastPath, *arguments: Any) -> Any:
        runs.append(1)
        return run(self, *arguments)

    monkeypatch.setattr(LayerFastPath, "run", counted)
    host_time.step(host_time.model(2, hooked=False))
    assert len(runs) == 2
    host_time.step(host_time.model(2, hooked=True))
    assert len(runs) == 2


def test_the_time_is_that_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed(list[int]):
        """Stands for a model: its length is the number of layers."""

    monkeypatch.setattr(host_time, "model", lambda layers, hooked: Timed([int(hooked)] * layers))
    monkeypatch.setattr(
        host_time, "step", lambda model: ((3 + len(model)) * 1e-6, (5 + (2 + model[0]) * len(model)) * 1e-6)
    )
    times = host_time.measure(2)
    assert times["fast path"] == pytest.approx((1, 2))
    assert times["modules"] == pytest.approx((1, 3))
