"""Embed texts as vectors, packed without padding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bert_fast._io import atomic_file
from bert_fast._terminal import data_stream
from bert_fast.cli.models import load, model_folder, read_texts, shows_progress
from bert_fast.cli.output import check_output, to_json

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = (".npy", ".jsonl", ".parquet")


def add_arguments(parser: Any) -> None:
    parser.add_argument("model", type=str, help="folder of a checkpoint, or a hub name")
    parser.add_argument("texts", nargs="*", type=str, help="texts; read from stdin, one per line, if none")
    parser.add_argument("--file", type=str | None, default=None, help="a file of texts, one per line; - is stdin")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"output file, {', '.join(FORMATS)}; JSON lines on stdout if not set",
    )
    parser.add_argument(
        "--pooling",
        type=Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "pooler"] | None,
        default=None,
        help="how token vectors become one vector, without other modules; default: as the folder says, or mean",
    )
    parser.add_argument("--prompt", type=str | None, default=None, help="a text put before each text")
    parser.add_argument(
        "--prompt_name", type=str | None, default=None, help="the name of a prompt of the folder, such as query"
    )
    parser.add_argument("--truncate_dim", type=int | None, default=None, help="keep this number of components")
    parser.add_argument(
        "--precision",
        type=Literal["float32", "int8", "uint8", "binary", "ubinary"],
        default="float32",
        help="of the components; int8 and uint8 depend on the range over all texts",
    )
    parser.add_argument("--normalize", type=bool, default=False, help="scale each vector to unit length")
    parser.add_argument(
        "--max_seqlen", type=int | None, default=None, help="truncate longer texts; default: the folder's maximum"
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=8192, help="maximum tokens of a batch of texts of similar length"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto selects CUDA if it is available")


def run(args: Any) -> int:
    check_output(args.output, FORMATS, inputs=[args.file])
    texts = read_texts(args.texts, args.file)

    model, tokenizer = load("BertModel", args.model, args.device, add_pooling_layer=_uses_pooler(args))
    vectors = model.encode(
        texts,
        tokenizer=tokenizer,
        pooling=args.pooling,
        prompt=args.prompt,
        prompt_name=args.prompt_name,
        normalize=args.normalize,
        truncate_dim=args.truncate_dim,
        precision=args.precision,
        max_seqlen=args.max_seqlen,
        batch_tokens=args.batch_tokens,
        show_progress_bar=shows_progress(),
    )
    _write(texts, vectors, args.output)
    return 0


def _uses_pooler(args: Any) -> bool:
    """Whether the vectors are the pooler's: requested, or of a folder fine-tuned so."""
    from bert_fast.models import BertConfig
    from bert_fast.models.sentence import task_modules

    if args.pooling is not None:
        return bool(args.pooling == "pooler")
    folder = model_folder(args.model)
    if not (folder / "config.json").is_file():
        return False
    modules = task_modules(BertConfig.from_pretrained(folder))
    return modules is not None and "pooler" in modules.pooling


def _write(texts: list[str], vectors: Tensor, output: str | None) -> None:
    if output is None:
        _write_jsonl(texts, vectors, data_stream())
        return
    with atomic_file(Path(output)) as path:
        if output.endswith(".npy"):
            import numpy as np

            # Open for reading too: numpy then writes through the file object, whose errors say what is wrong.
            with path.open("w+b") as file:
                np.save(file, vectors.numpy())
        elif output.endswith(".jsonl"):
            with path.open("w", encoding="utf-8", newline="") as file:
                _write_jsonl(texts, vectors, file)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            flat = pa.array(vectors.numpy().reshape(-1))
            columns = {"text": texts, "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
            pq.write_table(pa.table(columns), path)


def _write_jsonl(texts: list[str], vectors: Tensor, file: Any) -> None:
    for text, vector in zip(texts, vectors, strict=True):
        file.write(to_json({"text": text, "embedding": vector.tolist()}) + "\n")
