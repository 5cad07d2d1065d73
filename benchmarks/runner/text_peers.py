"""What people embed texts with on a CPU: each peer is a function of texts that returns their vectors, (N, E).

The constructor of a peer that is not installed, or that does not support the model or the processor, raises; the
benchmark's table shows the message. None is a dependency of bert_fast. Peers of matrix runtimes (ONNX Runtime,
OpenVINO, CTranslate2, zentorch) get what their users write around them: batches of similar length, padded, and a mean
of the real tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bert_fast
from benchmarks.runner.cpu_peers import AbsentError, Encode, Encoder, ModelForms, of_onnxruntime, of_openvino, quiet
from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer import TOKENIZER_FILES
from bert_fast.models import BertModel
from bert_fast.models.embedding import batches_by_length

INSTALL = {
    "sentence_transformers": "sentence-transformers",
    "optimum.onnxruntime": "optimum-onnx onnx onnxruntime",
    "optimum.intel": "optimum-intel openvino nncf",
    "ctranslate2": "ctranslate2",
    "fastembed": "fastembed",
    "llama_cpp": "llama-cpp-python",
    "zentorch": "zentorch",
}
BATCH = 32  # texts, sentence-transformers' default
Embed = Callable[[list[str]], Tensor]


def need(package: str) -> None:
    """AbsentError unless the package is installed."""
    parent = package.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(package) is None:
        raise AbsentError(f"not installed: pip install {INSTALL[package]}")


class TextModel:
    """A checkpoint as the peers read it; files of other runtimes are made once in `scratch`.

    Args:
        folder: a BERT in transformers' form, with its tokenizer.
        scratch: for the other runtimes' files.
        max_seqlen: longer texts are truncated to it.
        gguf: the model in llama.cpp's form, which only its own converter makes.
    """

    def __init__(self, folder: Path, scratch: Path, max_seqlen: int, gguf: Path | None = None) -> None:
        self.folder, self.scratch, self.max_seqlen, self.gguf = folder, scratch, max_seqlen, gguf
        self.threads = torch.get_num_threads()

    @cached_property
    def forms(self) -> ModelForms:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.BertModel.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="sdpa")
        return ModelForms(model.eval(), self.scratch)

    def _file(self, name: str, form: str) -> Path:
        file = self.scratch / name
        return file if file.exists() else Path(getattr(self.forms, form))

    @property
    def onnx(self) -> Path:
        return self._file("model.onnx", "onnx")

    @property
    def onnx_dynamic(self) -> Path:
        return self._file("dynamic.onnx", "onnx_dynamic")

    @property
    def onnx_static(self) -> Path:
        return self._file("static.onnx", "onnx_static")

    def tokenizer(self) -> Any:
        """A tokenizer of its own, which truncates."""
        tokenizer = load_tokenizer(self.folder)
        tokenizer.enable_truncation(self.max_seqlen)
        return tokenizer


def padded(encode: Encode, model: TextModel) -> Embed:
    """Vectors from a function of padded ids and their mask: sorted by length, `BATCH` texts a call, mean pooling."""
    tokenizer = model.tokenizer()

    def embed(texts: list[str]) -> Tensor:
        sequences = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts)]
        parts: list[Tensor] = [torch.empty(0)] * len(texts)
        longest_first = batches_by_length([len(ids) for ids in sequences], BATCH * model.max_seqlen, BATCH)
        for indices in longest_first:
            ids = torch.nn.utils.rnn.pad_sequence([sequences[index] for index in indices], batch_first=True)
            lengths = torch.tensor([len(sequences[index]) for index in indices])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            hidden = encode(ids, mask).float()
            pooled = (hidden * mask.unsqueeze(2)).sum(1) / lengths[:, None]
            for index, vector in zip(indices, pooled, strict=True):
                parts[index] = vector
        return torch.stack(parts)

    return embed


def of_runtime(make: Callable[[Any], Encode]) -> Callable[[TextModel], Embed]:
    """A peer of `cpu_peers`, which reads the attributes of `ModelForms` that a TextModel has too."""
    return lambda model: padded(make(model), model)


def ours(precision: str, *, frozen: bool) -> Callable[[TextModel], Embed]:
    """`BertModel.encode` with its defaults, with or without `freeze`."""

    def make(model: TextModel) -> Embed:
        with quiet():  # which says that the checkpoint's pooler is not used
            bert = BertModel.from_pretrained(model.folder, add_pooling_layer=False).eval()
        if precision == "bf16":
            bert = bert.to(torch.bfloat16)
        elif precision == "int8":
            bert = bert_fast.quantize(bert, "int8")
        if frozen:
            bert_fast.freeze(bert)
        tokenizer = load_tokenizer(model.folder)

        def embed(texts: list[str]) -> Tensor:
            vectors = bert.encode(texts, tokenizer=tokenizer, max_seqlen=model.max_seqlen)
            assert isinstance(vectors, Tensor)
            return vectors

        return embed

    return make


def sentence_transformers(**arguments: Any) -> Callable[[TextModel], Embed]:
    """sentence-transformers' encode with its defaults."""

    def make(model: TextModel) -> Embed:
        need("sentence_transformers")
        return _of_sentence_transformer(model.folder, model.max_seqlen, **arguments)

    return make


def _of_sentence_transformer(folder: Path, max_seqlen: int, **arguments: Any) -> Embed:
    from sentence_transformers import SentenceTransformer

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = SentenceTransformer(str(folder), device="cpu", **arguments)
    model.max_seq_length = max_seqlen

    def embed(texts: list[str]) -> Tensor:
        vectors: Tensor = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        return vectors.float()

    return embed


def _copied(model: TextModel, name: str) -> Path:
    """A copy of the checkpoint, to which a peer may write."""
    folder = model.scratch / name
    if not folder.is_dir():
        import shutil

        shutil.copytree(model.folder, folder)
    return folder


def sentence_transformers_onnx(quantized: bool) -> Callable[[TextModel], Embed]:
    """sentence-transformers' backend "onnx"; quantized as its documentation recommends for this processor."""

    def make(model: TextModel) -> Embed:
        need("sentence_transformers")
        need("optimum.onnxruntime")
        folder = _copied(model, "st-onnx")
        if not quantized:
            return _of_sentence_transformer(folder, model.max_seqlen, backend="onnx", model_kwargs={"export": True})
        from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

        target = "avx512_vnni" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "avx2"
        name = f"onnx/model_qint8_{target}.onnx" if "512" in target else f"onnx/model_quint8_{target}.onnx"
        if not (folder / name).is_file():
            with quiet():
                exported: Any = SentenceTransformer(str(folder), backend="onnx", model_kwargs={"export": True})
                export_dynamic_quantized_onnx_model(exported, target, str(folder))  # type: ignore[arg-type]
        return _of_sentence_transformer(folder, model.max_seqlen, backend="onnx", model_kwargs={"file_name": name})

    return make


def sentence_transformers_openvino(quantized: bool) -> Callable[[TextModel], Embed]:
    """sentence-transformers' backend "openvino"; quantized as its documentation recommends (static, by NNCF)."""

    def make(model: TextModel) -> Embed:
        need("sentence_transformers")
        need("optimum.intel")
        from optimum.intel import openvino  # noqa: F401  # fails with versions of transformers that it doesn't know

        folder = _copied(model, "st-openvino")
        if not quantized:
            return _of_sentence_transformer(folder, model.max_seqlen, backend="openvino", model_kwargs={"export": True})
        from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

        name = "openvino/openvino_model_qint8_quantized.xml"
        if not (folder / name).is_file():
            exported: Any = SentenceTransformer(str(folder), backend="openvino", model_kwargs={"export": True})
            export_static_quantized_openvino_model(exported, None, str(folder))
        return _of_sentence_transformer(folder, model.max_seqlen, backend="openvino", model_kwargs={"file_name": name})

    return make


def ctranslate2(compute_type: str) -> Callable[[TextModel], Embed]:
    """CTranslate2's encoder."""

    def make(model: TextModel) -> Embed:
        need("ctranslate2")
        import ctranslate2 as library
        import numpy as np

        if compute_type not in library.get_supported_compute_types("cpu"):
            raise AbsentError(f"CTranslate2 has no {compute_type} on this processor")
        folder = model.scratch / "ctranslate2"
        if not folder.is_dir():
            with quiet():
                library.converters.TransformersConverter(str(model.folder)).convert(str(folder))
        encoder = library.Encoder(str(folder), compute_type=compute_type, intra_threads=model.threads)

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            sequences = [row[:length].tolist() for row, length in zip(ids, mask.sum(1).tolist(), strict=True)]
            hidden = encoder.forward_batch(sequences).last_hidden_state.to(library.DataType.float32)
            return torch.from_numpy(np.array(hidden))

        return padded(run, model)

    return make


def fastembed(model: TextModel) -> Embed:
    """fastembed with the model as ONNX."""
    need("fastembed")
    import numpy as np
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    folder, name = model.scratch / "fastembed", "bert-fast/benchmark"
    if not folder.is_dir():
        folder.mkdir()
        for file in ("config.json", *TOKENIZER_FILES):
            if (model.folder / file).is_file():
                os.symlink((model.folder / file).resolve(), folder / file)
        os.symlink(model.onnx, folder / "model.onnx")
    if name not in {known["model"] for known in TextEmbedding.list_supported_models()}:
        TextEmbedding.add_custom_model(
            model=name,
            pooling=PoolingType.MEAN,
            normalization=True,
            sources=ModelSource(hf=name),
            dim=model.forms.model.config.hidden_size,
            model_file="model.onnx",
        )
    embedding = TextEmbedding(name, specific_model_path=str(folder), threads=model.threads)
    embedding.model.tokenizer.enable_truncation(model.max_seqlen)
    return lambda texts: torch.from_numpy(np.stack(list(embedding.embed(texts, batch_size=BATCH)))).float()


def llama_cpp(model: TextModel) -> Embed:
    """llama.cpp by llama-cpp-python, from a GGUF file in Q8_0."""
    need("llama_cpp")
    if model.gguf is None:
        raise AbsentError("needs a GGUF file, which llama.cpp's convert_hf_to_gguf.py --outtype q8_0 makes: --gguf")
    import llama_cpp as library

    llama: Any = library.Llama(
        str(model.gguf),
        embedding=True,
        n_ctx=model.max_seqlen,
        n_batch=model.max_seqlen,
        n_threads=model.threads,
        pooling_type=library.LLAMA_POOLING_TYPE_MEAN,
        verbose=False,
    )
    return lambda texts: torch.tensor(llama.embed(texts, truncate=True))


def zentorch(model: TextModel) -> Embed:
    """AMD's zentorch: torch.compile with its backend."""
    need("zentorch")
    import zentorch as _  # noqa: F401  # registers the backend

    compiled = torch.compile(Encoder(model.forms.model).eval(), backend="zentorch", dynamic=True)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.inference_mode(), contextlib.redirect_stdout(None):
            hidden: Tensor = compiled(ids, mask)
        return hidden

    return padded(run, model)


@dataclass(frozen=True)
class TextPeer:
    """`make` creates the function that is timed."""

    name: str
    precision: str
    make: Callable[[TextModel], Embed]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.precision}"


_BF16 = {"model_kwargs": {"dtype": torch.bfloat16}}
PEERS = (
    TextPeer("sentence-transformers", "fp32", sentence_transformers()),
    TextPeer("sentence-transformers", "bf16", sentence_transformers(**_BF16)),
    TextPeer("sentence-transformers, onnx", "fp32", sentence_transformers_onnx(quantized=False)),
    TextPeer("sentence-transformers, onnx", "int8", sentence_transformers_onnx(quantized=True)),
    TextPeer("sentence-transformers, openvino", "fp32", sentence_transformers_openvino(quantized=False)),
    TextPeer("sentence-transformers, openvino", "int8", sentence_transformers_openvino(quantized=True)),
    TextPeer("ONNX Runtime", "fp32", of_runtime(of_onnxruntime(lambda model: model.onnx))),
    TextPeer("ONNX Runtime, dynamic", "int8", of_runtime(of_onnxruntime(lambda model: model.onnx_dynamic))),
    TextPeer("OpenVINO", "fp32", of_runtime(of_openvino(lambda model: model.onnx, "f32"))),
    TextPeer("OpenVINO", "bf16", of_runtime(of_openvino(lambda model: model.onnx, "bf16"))),
    TextPeer("OpenVINO, static", "int8", of_runtime(of_openvino(lambda model: model.onnx_static, "f32"))),
    TextPeer("CTranslate2", "fp32", ctranslate2("float32")),
    TextPeer("CTranslate2", "bf16", ctranslate2("bfloat16")),
    TextPeer("CTranslate2", "int8", ctranslate2("int8_float32")),
    TextPeer("fastembed", "fp32", fastembed),
    TextPeer("llama.cpp, Q8_0", "int8", llama_cpp),
    TextPeer("zentorch", "fp32", zentorch),
)
OURS = tuple(
    TextPeer(f"bert_fast{', frozen' if frozen else ''}", precision, ours(precision, frozen=frozen))
    for frozen in (False, True)
    for precision in ("fp32", "bf16", "int8")
)


def versions() -> dict[str, str]:
    """The versions of the installed peers."""
    from importlib.metadata import PackageNotFoundError, version

    packages = (
        *("transformers", "sentence-transformers", "optimum-onnx", "optimum-intel", "onnxruntime", "openvino"),
        *("ctranslate2", "fastembed", "llama-cpp-python", "zentorch"),
    )
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
