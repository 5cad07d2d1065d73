"""Pretrain a BERT on prepared data. The same command resumes an interrupted run.

With several processes: torchrun --nproc-per-node N -m bert_fast.cli pretrain ...; a run can resume with another N.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from bert_fast._config import from_mapping
from bert_fast.pretrain.config import PretrainConfig


def add_arguments(parser: Any) -> None:
    parser.add_argument("--config", action="config", help="YAML file; --recipe NAME uses one of bert_fast")
    parser.add_class_arguments(PretrainConfig)


def run(args: Any) -> int:
    values = dict(vars(args))
    values.pop("config", None)
    config = from_mapping(PretrainConfig, values)

    from bert_fast.data import local_folder
    from bert_fast.pretrain.trainer import pretrain

    # Data at a URL is read from its verified local copy.
    config = replace(config, data=replace(config.data, folder=str(local_folder(config.data.folder))))
    result = pretrain(config, report=lambda text: print(text, file=sys.stderr))
    if result.rank:
        return 128 + result.interrupted if result.interrupted is not None else 0
    if result.interrupted is not None:
        print(f"stopped by signal {result.interrupted} after step {result.step} of {result.total_steps}; saved")
        print(f"checkpoint: {result.model_dir} (the same command resumes from it)")
        return 128 + result.interrupted
    for name, value in result.metrics.items():
        print(f"{'held-out ' + name:<22} {value:.4f}")
    if result.skipped:
        print(f"{'skipped updates':<22} {result.skipped:,}")
    print(f"{'tokens':<22} {result.tokens:,}")
    print(f"{'tokens per second':<22} {result.tokens_per_second:,.0f}")
    print(f"{'model':<22} {result.model_dir}")
    return 0
