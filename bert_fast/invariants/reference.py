"""The oracle of an encoder: its weights in float64, one text at a time, without padding.

transformers computes it where it is installed, with eager attention; else our model with the reference kernels. So that
a wrong vector can be named, the oracle also computes what known faults would give.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.invariants.folder import POOLINGS, Folder
from bert_fast.kernels import use_impl

_OTHER_GELU = {"gelu": "gelu_new", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu"}


class Reference:
    """An encoder in float64, or in another dtype by PyTorch's own operators.

    Args:
        folder: of a checkpoint that transformers or bert_fast loads; the files of sentence-transformers, or the entry
            that fine-tuning wrote into config.json, say what becomes of texts and token vectors (`Folder`).
        pooling: one of `POOLINGS`; None for the folder's own, else mean. As in `encode`, it takes the place of every
            module of the folder: Dense, LayerNorm, Normalize and truncate_dim.
        normalize: whether vectors have length 1; None for the folder's own.
        max_seqlen: the length that longer texts are truncated to; None for the folder's own.
        dtype: of weights and computation.
        library: "transformers" or "bert_fast"; None for transformers where it is installed.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: modules.json has a module that this class does not compute, or an argument is wrong.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_seqlen: int | None = None,
        dtype: torch.dtype = torch.float64,
        library: str | None = None,
    ) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self.requested = {"pooling": pooling, "normalize": normalize, "max_seqlen": max_seqlen}
        if not (self.folder / "config.json").is_file() and not (self.folder / "modules.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; expected the folder of a model")
        modules = Folder(self.folder)
        self.weights = modules.transformer
        self.pooling = modules.pooling if pooling is None else pooling
        self.steps = modules.steps if pooling is None else ()
        self.truncate_dim = modules.truncate_dim if pooling is None else None
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; expected one of {', '.join(POOLINGS)}")
        self.normalize = modules.normalize if normalize is None else normalize
        if normalize is False and self.steps:
            raise ValueError(
                f"normalize is False, and {folder} has modules after its pooling; expected a pooling "
                "too, which takes their place"
            )
        self.lowercase, self.prompt, self.keep = modules.lowercase, modules.prompt, modules.keep
        self.library = library or ("transformers" if find_spec("transformers") else "bert_fast")
        self.model = self._load(None)
        self.config: Any = self.model.config
        self.tokenizer = _load_tokenizer(self.weights, self.library)
        self.longest = longest_input(self.config)
        self.max_seqlen = min(max_seqlen or modules.max_seqlen or self.longest, self.longest)
        # Tokens that are not pooled: those of the prompt, as they are without a text.
        self.unpooled = 0 if modules.include_prompt or not self.prompt else len(self.ids("")) - self._special()[1]
        self._variants: dict[str, Any] = {}

    def _load(self, activation: str | None) -> Any:
        if self.library == "bert_fast":
            from bert_fast.models import BertModel

            return BertModel.from_pretrained(self.weights).to(self.dtype).eval()
        import transformers

        with _quiet():
            config = transformers.AutoConfig.from_pretrained(self.weights)
            for name in ("hidden_act", "activation"):
                if activation is not None and hasattr(config, name):
                    setattr(config, name, activation)
            model = transformers.AutoModel.from_pretrained(
                self.weights, config=config, attn_implementation="eager", dtype=torch.float32
            )
        return model.to(self.dtype).eval()

    def in_dtype(self, dtype: torch.dtype) -> Reference:
        """The same in another dtype."""
        other = copy.copy(self)
        other.dtype, other._variants = dtype, {}
        other.model = copy.deepcopy(self.model).to(dtype)
        return other

    def ids(
        self, text: str, *, max_seqlen: int | None = None, special: bool = True, prompt: str | None = None
    ) -> list[int]:
        """The tokens of the prompt and a text, truncated as the model's texts are: special tokens stay."""
        text = (self.prompt if prompt is None else prompt) + text
        text = text.lower() if self.lowercase else text
        longest = self.max_seqlen if max_seqlen is None else max_seqlen
        if self.library == "transformers" and self.keep == "head":
            encoded = self.tokenizer(text, truncation=True, max_length=longest, add_special_tokens=special)
            return list(encoded["input_ids"])
        ids, (leading, trailing) = self._all_ids(text, special), self._special() if special else (0, 0)
        if len(ids) <= longest:
            return ids
        size, end = longest - leading - trailing, len(ids) - trailing
        head = {"head": size, "tail": 0, "head_tail": size // 4}[self.keep]
        return [*ids[: leading + head], *ids[end - (size - head) : end], *ids[end:]]

    def _all_ids(self, text: str, special: bool) -> list[int]:
        if self.library == "bert_fast":
            return list(self.tokenizer.encode(text, add_special_tokens=special).ids)
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _special(self) -> tuple[int, int]:
        """The numbers of special tokens before and after a text."""
        added, own = self._all_ids("a", True), self._all_ids("a", False)
        first = next(i for i in range(len(added)) if added[i : i + len(own)] == own)
        return first, len(added) - len(own) - first

    def hidden(
        self,
        ids: list[int],
        *,
        shift: int = 0,
        padded_to: int = 0,
        masked: bool = True,
        model: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The hidden states (S, E) of one text and the pooler's output (E,), on the CPU.

        The keywords are faults: positions that begin at `shift`, and padding that is not masked.

        Raises:
            LookupError: the model has no such positions, or is not told them.
        """
        model = model or self.model
        pad = getattr(self.config, "pad_token_id", None) or 0
        length = len(ids)
        row = torch.tensor([[*ids, *[pad] * (padded_to - length)]])
        mask = torch.ones_like(row)
        if masked:
            mask[:, length:] = 0
        inputs: dict[str, Any] = {"input_ids": row, "attention_mask": mask}
        if shift:
            inputs["position_ids"] = self.positions(row.shape[1], shift)
        with torch.inference_mode(), use_impl("reference"):
            out = model(**inputs, return_dict=True)
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state[0], None if pooled is None else pooled[0]

    def positions(self, length: int, shift: int = 0) -> Tensor:
        """The position ids (1, length) of a text, which begin `shift` later; LookupError where there are none."""
        if self.library != "transformers" or "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise LookupError
        embeddings = getattr(self.model, "embeddings", None)
        first = getattr(embeddings, "padding_idx", -1) + 1  # RoBERTa's family begins after the padding index
        last = first + shift + length
        if first + shift < 0 or last > self.config.max_position_embeddings:
            raise LookupError
        return torch.arange(first + shift, last).unsqueeze(0)

    def pool(
        self, hidden: Tensor, pooled: Tensor | None, pooling: str | None = None, *, unpooled: int | None = None
    ) -> Tensor:
        """The vector (D,) of hidden states (S, E), in float64, after the folder's modules."""
        pooling = pooling or self.pooling
        tokens = hidden.double()[self.unpooled if unpooled is None else unpooled :]
        if pooling == "pooler":
            if pooled is None:
                raise LookupError
            vector = pooled.double()
        elif pooling == "max":
            vector = tokens.amax(0)
        elif pooling in ("cls", "lasttoken"):
            vector = tokens[0 if pooling == "cls" else -1]
        else:
            vector = tokens.mean(0)
            vector = vector * len(tokens) ** 0.5 if pooling == "mean_sqrt_len_tokens" else vector
        for step in self.steps:
            vector = step(vector.to(self.dtype)).double()
        # After truncate_dim sentence-transformers normalizes on request alone.
        vector = vector[: self.truncate_dim]
        return torch.nn.functional.normalize(vector, dim=0) if self.normalize else vector

    def embed(self, text: str) -> Tensor:
        """The vector of a text: float64 (D,)."""
        return self.pool(*self.hidden(self.ids(text)))

    def variant(self, name: str) -> Any:
        """The model with a fault in its weights or settings: "activation" or "token types".

        Raises:
            LookupError: the fault changes nothing in this model.
        """
        if self.library != "transformers":
            raise LookupError
        if name not in self._variants:
            if name == "activation":
                own = getattr(self.config, "hidden_act", getattr(self.config, "activation", None))
                if own not in _OTHER_GELU:
                    raise LookupError
                self._variants[name] = self._load(_OTHER_GELU[own])
            else:
                table = getattr(getattr(self.model, "embeddings", None), "token_type_embeddings", None)
                if table is None:
                    raise LookupError
                other = copy.deepcopy(self.model)
                other.embeddings.token_type_embeddings.weight.data.zero_()
                self._variants[name] = other
        return self._variants[name]


def longest_input(config: Any) -> int:
    """The number of tokens that a model has positions for."""
    from bert_fast.models.config import longest_input as longest

    return int(longest(config))


def _load_tokenizer(folder: Path, library: str) -> Any:
    if library == "bert_fast":
        from bert_fast.data import load_tokenizer

        return load_tokenizer(folder)
    import transformers

    with _quiet():
        return transformers.AutoTokenizer.from_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings of heads that the encoder does not have, and its progress bars."""
    from transformers.utils import logging as hf_logging

    before, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
        if bar:
            hf_logging.enable_progress_bar()
