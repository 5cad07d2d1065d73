"""Late interaction: a vector for each token of a text, and MaxSim of a query with documents (ColBERT).

Source: Khattab and Zaharia, "ColBERT", 2020, section 3; the folders are those of sentence-transformers'
MultiVectorEncoder and of PyLate.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast.models.bert import BertModel
from bert_fast.models.embedding import WINDOW, TextTokens, batches_by_length, pack
from bert_fast.models.files import HUB_OPTIONS, Source
from bert_fast.models.inputs import Tokens
from bert_fast.models.layers import linear_bias
from bert_fast.models.sentence import (
    MODULE_CONFIG,
    MODULES_NAME,
    MULTI_VECTOR_KINDS,
    ModulesReader,
    Normalize,
    SentenceModules,
    module_name,
    read_list,
)
from bert_fast.models.texts import as_iterable, as_tokenizer, check_integer_argument, evaluating, text_windows

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Self

_TASKS = ("query", "document")
_EXPANSION_KEYS = {"strategy", "attend", "token", "length"}
SCORE_COLUMNS = 1 << 20  # tokens of documents that are scored at once, for one query


@dataclass(frozen=True)
class Expansion:
    """Query augmentation: tokens put after a query up to a length, whose vectors are scored.

    Attributes:
        length: queries have at least this number of tokens.
        fixed: longer queries are truncated to `length`.
        attend: whether tokens attend to the added ones; in either case these attend to the query's tokens.
        token: the added token; None for [MASK].
    """

    length: int
    fixed: bool = True
    attend: bool = False
    token: str | None = None

    @classmethod
    def of(cls, values: Any, where: str) -> Expansion | None:
        """Of the setting query_expansion of a Transformer module; None where it is None."""
        if values is None:
            return None
        length = values.get("length") if isinstance(values, Mapping) else None
        if (
            isinstance(length, bool)
            or not isinstance(length, int)
            or length < 1
            or values.keys() - _EXPANSION_KEYS
            or values.get("strategy") not in ("fixed", "min")
            or not isinstance(values.get("attend", False), bool)
            or not isinstance(values.get("token"), (str, type(None)))
        ):
            raise ValueError(
                f"{where}: query_expansion is {values!r}; expected strategy fixed or min, a length of 1 or more, and "
                "attend and token, or none"
            )
        return cls(length, values["strategy"] == "fixed", values.get("attend", False), values.get("token"))


@dataclass(frozen=True)
class MultiVectorModules:
    """How texts become vectors of tokens.

    Attributes:
        texts: prompts and lengths; its `token_steps` are applied to the token vectors.
        expansion: of queries; None for none.
        skiplist: the tokens whose vectors are left out, such as punctuation.
        skiplist_tasks: of which texts: "query", "document" or both.
        prefixes: texts at the start of a prompt that are one token where the vocabulary has them, such as "[Q] ".
    """

    texts: SentenceModules
    expansion: Expansion | None = None
    skiplist: tuple[str, ...] = ()
    skiplist_tasks: tuple[str, ...] = ("document",)
    prefixes: tuple[str, ...] = ()


class MultiVectorModel:
    """A model that returns a vector for each token.

    Args:
        model: the encoder.
        modules: how texts become vectors.
        tokenizer: as `bert_fast.data.load_tokenizer` returns it, or transformers' fast one; None for that of the folder
            that `model` was loaded from.
    """

    def __init__(self, model: BertModel, modules: MultiVectorModules, tokenizer: Any = None) -> None:
        self.model, self.modules = model, modules
        tokenizer = as_tokenizer(model.source_tokenizer() if tokenizer is None else tokenizer)
        self.tokenizer = _with_prefixes(tokenizer, modules.prefixes)
        ids = (self.tokenizer.token_to_id(word) for word in modules.skiplist)
        self._skipped = torch.tensor(sorted({i for i in ids if i is not None}), dtype=torch.int64)
        self._expansion_id = 0
        if (expansion := modules.expansion) is not None:
            names = ("[MASK]", "<mask>", "</s>") if expansion.token is None else (expansion.token,)
            found = [i for name in names if (i := self.tokenizer.token_to_id(name)) is not None]
            if not found:
                raise ValueError(f"queries are expanded by {' or '.join(names)}, which the tokenizer doesn't have")
            self._expansion_id = found[0]

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, allow_pickle: bool = False, **options: Any) -> Self:
        """Load a folder of sentence-transformers' MultiVectorEncoder or of PyLate.

        Args:
            name_or_path: a folder, or the name of a hub repository.
            allow_pickle, options: see `BertModel.from_pretrained`.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `BertModel.from_pretrained`; ValueError also where the folder
                is that of another kind of model, or has a module that can't be applied, by its name.
        """
        options.setdefault("add_pooling_layer", False)
        model = BertModel.from_pretrained(name_or_path, allow_pickle=allow_pickle, **options)
        root = Source(name_or_path, **{name: options[name] for name in HUB_OPTIONS if name in options})
        return cls(model, read_multi_vector_modules(root, model.config, allow_pickle=allow_pickle))

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        task: str = "document",
        prompt: str | None = None,
        prompt_name: str | None = None,
        max_seqlen: int | None = None,
        batch_tokens: int = 8192,
        batch_size: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Embed texts as a vector for each token.

        Args:
            texts: a str, or any number of them: a sequence, an iterator, a Series, an array.
            task: "query" or "document": prompt, length, expansion and skiplist are those of the task.
            prompt, prompt_name, max_seqlen, batch_tokens, batch_size: see `bert_fast.models.embedding.encode`. Queries
                that are expanded to a fixed length are truncated to that.

        Returns:
            For each text (n, D) float32 on the CPU, n the number of its tokens that are scored; a list of them, or one
            for a str.

        Raises:
            TypeError: a text is no str, by its index; or an argument has another type.
            ValueError: `task` or the prompt's name is unknown, or a number is out of range.
        """
        if task not in _TASKS:
            raise ValueError(f"task is {task!r}; expected 'query' or 'document'")
        check_integer_argument("batch_tokens", batch_tokens, 1)
        if batch_size is not None:
            check_integer_argument("batch_size", batch_size, 1)
        expansion = self.modules.expansion if task == "query" else None
        if expansion is not None and expansion.fixed:
            max_seqlen = expansion.length
        options: Any = {"prompt": prompt, "prompt_name": prompt_name, "task": task, "max_seqlen": max_seqlen}
        tokens = TextTokens.of(self.model, self.tokenizer, self.modules.texts, **options)
        single = isinstance(texts, str)
        parts: list[Tensor] = []
        with evaluating(self.model), torch.inference_mode():
            for window in text_windows([texts] if single else as_iterable(texts), WINDOW):
                parts += self._embed(tokens(window), task, expansion, batch_tokens, batch_size)
        return parts[0] if single else parts

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Tensor | list[Tensor]:
        """`encode` with task="query"."""
        return self.encode(texts, **{"task": "query", **options})

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Tensor | list[Tensor]:
        """`encode` with task="document"."""
        return self.encode(texts, **{"task": "document", **options})

    def _embed(
        self, ids: list[list[int]], task: str, expansion: Expansion | None, batch_tokens: int, batch_size: int | None
    ) -> list[Tensor]:
        lengths = [len(sequence) for sequence in ids]
        if expansion is not None:
            ids = [sequence + [self._expansion_id] * (expansion.length - len(sequence)) for sequence in ids]
        out = [torch.empty(0)] * len(ids)
        for indices in batches_by_length([len(sequence) for sequence in ids], batch_tokens, batch_size):
            batch = [ids[i] for i in indices]
            inputs = pack(batch, self.model.device)
            if expansion is None or expansion.attend:
                hidden = self.model(**inputs, return_dict=True).last_hidden_state
            else:
                seen = torch.tensor([lengths[i] for i in indices], device=self.model.device)
                hidden = _hidden_with_unseen(self.model, inputs, seen)
            vectors = hidden.float().cpu()  # the modules are small, on the CPU
            for step in self.modules.texts.token_steps:
                vectors = step(vectors)
            for i, sequence, x in zip(indices, batch, vectors.split([len(s) for s in batch]), strict=True):
                if task in self.modules.skiplist_tasks and len(self._skipped):
                    x = x[~torch.isin(torch.tensor(sequence), self._skipped)]
                with torch.inference_mode(False):  # an ordinary tensor, which takes part in training
                    out[i] = torch.empty(x.shape).copy_(x)
        return out


def maxsim(queries: Sequence[Tensor], documents: Sequence[Tensor], *, normalize: bool = False) -> Tensor:
    """The late-interaction score of each query with each document: sum over i of max over j of q_i . d_j.

    Args:
        queries: Q tensors (n_q, D), floating point, the vectors of a query's tokens.
        documents: N tensors (n_d, D), on the device of the queries.
        normalize: divide by n_q, as bge-m3 does.

    Returns:
        (Q, N) float32. 0 for a query or a document that has no vector.

    Raises:
        TypeError: an argument is no sequence of floating-point tensors.
        ValueError: a tensor has another shape, by its index.
    """
    width = None
    for name, tensors in (("queries", queries), ("documents", documents)):
        if isinstance(tensors, (str, Tensor)) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name} is of type {type(tensors).__name__}; expected a list of tensors (n, D)")
        for index, x in enumerate(tensors):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"{name}[{index}] is of type {type(x).__name__}; expected a floating-point tensor")
            width = x.shape[-1] if width is None and x.dim() == 2 else width
            if x.dim() != 2 or x.shape[1] != width:
                raise ValueError(f"{name}[{index}] has shape {tuple(x.shape)}; expected (n, {width or 'D'})")
    device = documents[0].device if len(documents) else None
    scores = torch.zeros(len(queries), len(documents), device=device)
    for columns in batches_by_length([len(x) for x in documents], SCORE_COLUMNS):
        columns = [j for j in columns if len(documents[j])]
        if not columns:
            continue
        tokens = torch.cat([documents[j] for j in columns]).float()
        lengths = torch.tensor([len(documents[j]) for j in columns], device=device)
        for row, query in enumerate(queries):
            if len(query):
                products = tokens @ query.float().T  # (sum of n_d, n_q)
                best = torch.segment_reduce(products, "max", lengths=lengths, axis=0)
                scores[row, columns] = best.mean(1) if normalize else best.sum(1)
    return scores


def read_multi_vector_modules(source: Source, config: Any, *, allow_pickle: bool = False) -> MultiVectorModules:
    """Read modules.json and the files that it names.

    Raises:
        ValueError: the folder is that of another kind of model, or has a module or setting that can't be applied.
        FileNotFoundError: there is no modules.json, or a module's weights are not there.
    """
    if (path := source.find(MODULES_NAME)) is None:
        raise FileNotFoundError(
            f"{source} has no {MODULES_NAME}; expected a folder of a MultiVectorEncoder, or PyLate's"
        )
    reader = ModulesReader(source, config, "MultiVectorEncoder", allow_pickle)
    settings = reader.settings
    if (kind := settings.get("model_type")) not in MULTI_VECTOR_KINDS:
        raise ValueError(f"{source} is a model of the type {kind!r}; expected {' or '.join(MULTI_VECTOR_KINDS)}")
    entries = read_list(path)
    texts = reader.first(entries, str(path))
    from_pylate = kind == "ColBERT"
    skiplist: Any = settings.get("skiplist_words")
    skiplist = list(string.punctuation) if from_pylate and skiplist is None else skiplist or []
    tasks: Any = ["document"]
    steps: list[nn.Module] = []
    for entry in entries[1:]:
        name, folder = module_name(entry), str(entry.get("path", "")).rstrip("/")
        values = reader.read_kept(f"{folder}/{MODULE_CONFIG}")
        if name == "MultiVectorMask":
            if values.get("keep_only_token_ids"):
                raise ValueError(f"{path}: {folder} has keep_only_token_ids, which is not supported")
            skiplist, tasks = values.get("skiplist_words") or [], values.get("skiplist_tasks") or tasks
        elif name in ("Dense", "Normalize", "LayerNorm"):
            reads = values.get("module_input_name", "token_embeddings")
            if reads != "token_embeddings" or values.get("module_output_name") not in (None, reads):
                raise ValueError(f"{path}: {folder} reads {reads!r}; expected 'token_embeddings'")
            steps.append(reader.build(name, folder, values))
        elif name != "Dropout":
            raise ValueError(
                f"{path}: the module {entry.get('type')!r} is not supported; expected Transformer, Dense, Normalize, "
                "LayerNorm, Dropout, MultiVectorMask"
            )
    if from_pylate:
        steps.append(Normalize())
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not all(isinstance(word, str) for word in [*skiplist, *tasks]):
        raise ValueError(
            f"{source}: skiplist_words and skiplist_tasks are {skiplist!r}, {tasks!r}; expected lists of str"
        )
    texts = replace(texts, token_steps=tuple(steps), files=reader.files)
    prefixes = [settings.get(f"{task}_prefix") for task in _TASKS]
    prompts = dict(texts.prompts)
    for task, prefix in zip(_TASKS, prefixes, strict=True):
        if isinstance(prefix, str) and prefix:
            prompts[task] = prefix + prompts[task].removeprefix(prefix)
    values = reader.transformer_values
    expansion = Expansion.of(values.get("query_expansion", _flat_expansion(settings)), str(source))
    lengths = dict(texts.task_lengths)
    for task in _TASKS:
        if task not in lengths and (length := reader.length(settings.get(f"{task}_length"))) is not None:
            lengths[task] = length
    texts = replace(texts, prompts=prompts, task_lengths=lengths)
    known = tuple(prefix for prefix in prefixes if isinstance(prefix, str) and prefix.strip())
    return MultiVectorModules(texts, expansion, tuple(skiplist), tuple(tasks), known)


def _flat_expansion(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The query_expansion that PyLate's settings mean: on, where any of them is there and none switches it off."""
    if "query_expansion" in settings:
        value: dict[str, Any] | None = settings["query_expansion"]
        return value
    names = {"query_length", "document_length", "query_prefix", "document_prefix", "skiplist_words"}
    names |= {"do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens"}
    if not names & settings.keys() or settings.get("do_query_expansion") is False:
        return None
    attend = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
    return {"strategy": "fixed", "attend": bool(attend), "length": settings.get("query_length") or 32}


def _with_prefixes(tokenizer: Tokenizer, prefixes: Sequence[str]) -> Tokenizer:
    """`tokenizer`, or a copy in which each prefix that is in the vocabulary is one token of a text."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    special = []
    for prefix in prefixes:
        for name in (prefix, prefix.split(None, 1)[0]):
            number = tokenizer.token_to_id(name)
            if number is not None:
                if tokenizer.encode(name, add_special_tokens=False).ids != [number]:
                    special.append(AddedToken(name, normalized=False, special=True))
                break
    if not special:
        return tokenizer
    tokenizer = Backend.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(special)
    return tokenizer


def _hidden_with_unseen(model: BertModel, inputs: dict[str, Any], seen: Tensor) -> Tensor:
    """The last hidden state (T, E) where all tokens attend only to the first `seen` (B,) tokens of their sequence.

    The kernels have no such attention; queries are short, and torch computes it on a padded batch.
    """
    tokens = Tokens.from_inputs(model.config, **inputs)
    lengths = tokens.cu_seqlens.long().diff()
    places = torch.arange(tokens.max_seqlen, device=seen.device)
    real = places < lengths.unsqueeze(1)  # (B, S)
    mask = (places < seen.unsqueeze(1))[:, None, None, :]
    hidden = model.embeddings(tokens, None)
    if model.embeddings_project is not None:
        hidden = linear_bias(hidden, model.embeddings_project)
    for layer in model.encoder.layer:
        block: Any = layer
        attention = block.attention.self
        qkv, bias = attention.project(hidden)
        qkv = qkv.to(hidden.dtype)
        qkv = qkv if bias is None else qkv + bias.to(qkv.dtype)
        padded = qkv.new_zeros(*real.shape, *qkv.shape[1:])
        padded[real] = qkv
        query, key, value = padded.permute(2, 0, 3, 1, 4)  # (B, N, S, D) each
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = block.attention.output(out.transpose(1, 2)[real].flatten(1), hidden, None)
        hidden = block.output(block.intermediate(hidden), hidden, None)
    return hidden
