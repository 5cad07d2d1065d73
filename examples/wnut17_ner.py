"""WNUT 2017: emerging and rare entities in noisy English text, from all-MiniLM-L6-v2's weights.

    python -m examples.wnut17_ner --data FOLDER  # bert_fast and transformers' Trainer

FOLDER contains train.conll, dev.conll and test.conll (CC BY 4.0; under other names in
github.com/leondz/emerging_entities_17; Derczynski et al., 2017). F1 is that of entities, from seqeval. Both sides train
on the same rows with the same settings and keep the model of the last step.
"""

from __future__ import annotations

from pathlib import Path

from bert_fast.tasks.io.sources import read_table
from examples.trainer_comparison import Experiment, arguments, compared, minilm, thinned, write_results


def main() -> None:
    parser = arguments(__doc__ or "", epochs=3, seeds=1, max_length=128)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.conll, dev.conll and test.conll")
    options = parser.parse_args()
    splits = {}
    for split in ("train", "dev", "test"):
        table = read_table(str(options.data / f"{split}.conll"))
        splits[split] = [table.row(number) for number in range(len(table))]
    experiment = Experiment(
        "token-classification",
        minilm(),
        thinned(splits, options.rows),
        ("f1", "precision", "recall"),
        options.epochs,
        lr=2e-4,
        batch=16,
        max_length=options.max_length,
    )
    lines = compared(experiment, options.seeds, options.sides)
    write_results("wnut17_ner", "WNUT17 entities, from MiniLM-L6's weights", lines, write=options.write)


if __name__ == "__main__":
    main()
