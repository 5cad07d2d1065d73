"""One thread, and no warning given yet about calls that run transformers' own forward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bert_fast.integrations import bert as fused_bert


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused_bert, "_warned", set())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
