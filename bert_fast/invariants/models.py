"""Models of a folder as subjects: ours, transformers' own, fused, and sentence-transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.invariants.checks import LAYOUTS
from bert_fast.invariants.reference import Reference

LIBRARIES = ("bert_fast", "fused", "transformers", "sentence-transformers")


def load_subject(
    folder: str | Path, library: str, reference: Reference, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> ModelSubject:
    """The model of a folder, in a library.

    Args:
        folder: of the checkpoint.
        library: one of `LIBRARIES`; "fused" is transformers' model after `bert_fast.fuse`.
        reference: says how token vectors are pooled, where the library does not.
        dtype, device: of the model.

    Raises:
        ValueError: `library` is unknown, or can't load or fuse this model.
        ImportError: the library is not installed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library is {library!r}; expected one of {', '.join(LIBRARIES)}")
    if library == "bert_fast":
        return _Ours(folder, reference, dtype, device)
    if library == "sentence-transformers":
        return _SentenceTransformer(folder, reference, dtype, device)
    return _Transformers(folder, reference, dtype, device, fused=library == "fused")


def default_library(folder: str | Path) -> str:
    """bert_fast where it loads the folder's architecture, else sentence-transformers or transformers."""
    from bert_fast.models import BertConfig

    weights = weights_folder(folder)
    try:
        BertConfig.from_pretrained(weights)
    except (ValueError, TypeError):
        modules = (Path(folder) / "modules.json").is_file() and find_spec("sentence_transformers")
        return "sentence-transformers" if modules else "transformers"
    return "bert_fast"


def weights_folder(folder: str | Path) -> Path:
    """Where the weights of a folder are: the folder itself, or that of modules.json's Transformer."""
    from bert_fast.invariants.folder import Folder

    return Folder(Path(folder)).transformer


class ModelSubject:
    """A model in this process; see `bert_fast.invariants.Subject`."""

    name: str
    layouts: tuple[str, ...] = LAYOUTS

    def embed(self, texts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def hidden(self, ids: Sequence[list[int]], layout: str) -> list[Tensor]:
        raise NotImplementedError


class _Padded(ModelSubject):
    """A model of padded batches."""

    model: Any
    reference: Reference
    layouts: tuple[str, ...] = ("alone", "right padding", "left padding")

    def hidden(self, ids: Sequence[list[int]], layout: str) -> list[Tensor]:
        length = max(map(len, ids))
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        starts = [length - len(row) if layout == "left padding" else 0 for row in ids]
        batch, mask = torch.full((len(ids), length), pad), torch.zeros(len(ids), length, dtype=torch.int64)
        for index, (row, start) in enumerate(zip(ids, starts, strict=True)):
            batch[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[index, start : start + len(row)] = 1
        device = self.model.device
        inputs = {"input_ids": batch.to(device), "attention_mask": mask.to(device), **self.options(mask, layout)}
        with torch.inference_mode():
            out = self.model(**inputs, return_dict=True)
        states = out.last_hidden_state
        spans = zip(states, starts, ids, strict=True)
        return [row[start : start + len(tokens)].cpu() for row, start, tokens in spans]

    def options(self, mask: Tensor, layout: str) -> dict[str, Tensor]:
        """position_ids for left padding: models count the columns without them, as transformers documents."""
        if layout != "left padding":
            return {}
        try:
            first = int(self.reference.positions(1)[0, 0])
        except LookupError:
            return {}
        return {"position_ids": (first + (mask.cumsum(1) - 1).clamp(min=0)).to(self.model.device)}


class _Ours(_Padded):
    layouts = LAYOUTS

    def __init__(self, folder: str | Path, reference: Reference, dtype: torch.dtype, device: str) -> None:
        from bert_fast.models import BertModel

        self.name = f"bert_fast, {str(dtype).removeprefix('torch.')}"
        self.reference = reference
        self.model = BertModel.from_pretrained(folder).to(device, dtype).eval()
        self.requested = _requested(reference)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """By the folder's own files, so that our reading of them is tested too."""
        vectors = self.model.encode(list(texts), **self.requested)
        assert isinstance(vectors, Tensor)
        return vectors

    def hidden(self, ids: Sequence[list[int]], layout: str) -> list[Tensor]:
        if layout != "packing":
            return super().hidden(ids, layout)
        from bert_fast.models.embedding import pack

        with torch.inference_mode():
            states = self.model(**pack(ids, self.model.device), return_dict=True).last_hidden_state
        return [part.cpu() for part in states.split([len(row) for row in ids])]


def _requested(reference: Reference) -> dict[str, Any]:
    """Arguments of `encode` for what the reference was told in place of the folder's files; {} where it was not."""
    told, options = reference.requested, dict[str, Any]()
    if told["max_seqlen"] is not None:
        options["max_seqlen"] = reference.max_seqlen
    if told["pooling"] is not None or told["normalize"] is False:  # a pooling drops the folder's Normalize
        options |= {"pooling": reference.pooling, "normalize": reference.normalize}
    elif told["normalize"]:
        options["normalize"] = True
    return options


class _Transformers(_Padded):
    def __init__(self, folder: str | Path, reference: Reference, dtype: torch.dtype, device: str, fused: bool) -> None:
        import transformers

        from bert_fast.invariants.reference import _quiet

        self.name = f"{'fused ' if fused else ''}transformers, {str(dtype).removeprefix('torch.')}"
        self.reference = reference
        with _quiet():
            model = transformers.AutoModel.from_pretrained(reference.weights, dtype=torch.float32)
        model = model.to(device, dtype).eval()
        if reference.pooling != "pooler" and getattr(model, "pooler", None) is not None:
            model.pooler = None  # nothing reads it, and with one `fuse` leaves left-padded batches to transformers
        if fused:
            import bert_fast

            model = bert_fast.fuse(model)
            if not bert_fast.is_fused(model):
                raise ValueError(f"{folder}: bert_fast.fuse leaves {type(model).__name__} as it is")
        self.model = model

    def embed(self, texts: Sequence[str]) -> Tensor:
        """As transformers' users do: padded on the right, pooled here."""
        ids = [self.reference.ids(text) for text in texts]
        states = self.hidden(ids, "right padding")
        pooled = [None] * len(ids)
        if self.reference.pooling == "pooler":
            raise ValueError("pooling is 'pooler'; the check of transformers' models takes the others")
        return torch.stack([self.reference.pool(*pair) for pair in zip(states, pooled, strict=True)])


class _SentenceTransformer(ModelSubject):
    layouts = ()

    def __init__(self, folder: str | Path, reference: Reference, dtype: torch.dtype, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        from bert_fast.invariants.reference import _quiet

        self.name = f"sentence-transformers, {str(dtype).removeprefix('torch.')}"
        with _quiet():
            self.model = SentenceTransformer(str(folder), device=device).to(dtype).eval()

    def embed(self, texts: Sequence[str]) -> Tensor:
        vectors = self.model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return torch.as_tensor(vectors).cpu()
