"""Fine-tuning: settings, public functions, data, loop, unfinished runs, task runs, models, report and grid search."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert_fast.finetune.api import FinetuneResult, MultitaskResult, finetune, multitask
    from bert_fast.finetune.config import (
        BatchOptions,
        FinetuneConfig,
        FinetuneOptimizer,
        LossSettings,
        MultitaskConfig,
        TableOptions,
        TaskSettings,
    )
    from bert_fast.finetune.grid import sweep
    from bert_fast.finetune.unfinished import RunInterruptedError

__all__ = [
    "BatchOptions",
    "FinetuneConfig",
    "FinetuneOptimizer",
    "FinetuneResult",
    "LossSettings",
    "MultitaskConfig",
    "MultitaskResult",
    "RunInterruptedError",
    "TableOptions",
    "TaskSettings",
    "finetune",
    "multitask",
    "sweep",
]
_MODULES = {
    **dict.fromkeys(("FinetuneResult", "MultitaskResult", "finetune", "multitask"), "api"),
    "RunInterruptedError": "unfinished",
    "sweep": "grid",
}


def __getattr__(name: str) -> Any:
    # The settings are imported without torch, which the help of the commands need not wait for.
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'config')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
