"""A folder of sentence-transformers: what modules.json says about texts, token vectors and their pooling.

The modules are those of a text encoder: Transformer, Dense, LayerNorm, Normalize, Dropout (which does nothing in
inference) and Pooling. Any other is refused by its name when texts are embedded.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast._io import check_fields, read_json, safe_name
from bert_fast.models import storage
from bert_fast.models.config import BertConfig, longest_input
from bert_fast.models.files import CONFIG_NAME, WEIGHTS_NAME, Source
from bert_fast.models.pooling import check_pooling

MODULES_NAME = "modules.json"
SETTINGS_NAME = "config_sentence_transformers.json"
MODULE_CONFIG = "config.json"
TASK_KEY = "bert_fast_task"  # of the entry that fine-tuning writes into config.json
# The file of the Transformer module; the others are of older releases.
_TRANSFORMER_NAMES = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")
)
_OLD_POOLINGS = {  # in the order in which their vectors are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
NO_PROMPTS = {"query": "", "document": ""}  # of every model
# The task of the Transformer module of each class, and the output that is used.
_OUTPUTS = {
    "SentenceTransformer": ("feature-extraction", "last_hidden_state"),
    "CrossEncoder": ("sequence-classification", "logits"),
    "SparseEncoder": ("fill-mask", "logits"),
    "MultiVectorEncoder": ("feature-extraction", "last_hidden_state"),
}
MULTI_VECTOR_KINDS = ("MultiVectorEncoder", "ColBERT")  # sentence-transformers' name, and that of PyLate


@dataclass(frozen=True)
class SentenceModules:
    """How texts become vectors.

    Attributes:
        pooling: names of `bert_fast.models.pooling.POOLINGS`.
        include_prompt: whether the tokens of a prompt are pooled.
        token_steps: modules that are applied to the token vectors.
        steps: modules that are applied to the pooled vectors, in float32.
        max_seqlen: longer texts are truncated to this number of tokens; None for the model's maximum.
        task_lengths: the same for encode_query ("query") and encode_document ("document"), where it differs.
        keep: what truncation keeps: head, tail or head_tail.
        lowercase: whether texts are converted to lower case before the tokenizer's own normalization.
        prompts: texts by their name, put before each text.
        default_prompt_name: the name of the prompt where none is requested.
        truncate_dim: the number of components that are returned; None for all.
        activation: of a cross-encoder's score, by its name in torch; of a SPLADE vector, relu or log1p_relu.
        max_active_dims: the number of components that a SPLADE vector keeps; None for all.
        problem: why the modules can't be applied; "" where they can.
        files: the files to write beside the model's own, by their path in the folder.
    """

    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    token_steps: tuple[nn.Module, ...] = ()
    steps: tuple[nn.Module, ...] = ()
    max_seqlen: int | None = None
    task_lengths: Mapping[str, int] = field(default_factory=dict)
    keep: str = "head"
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(NO_PROMPTS))
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    activation: str = ""
    max_active_dims: int | None = None
    problem: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)

    def prompt_of(self, prompt: str | None, prompt_name: str | None, task: str | None = None) -> str:
        """The text to put before each text, "" for none.

        Args:
            prompt: the text itself.
            prompt_name: a key of `prompts`; None for the prompt of `task`, or the default one.
            task: "query" or "document".

        Raises:
            TypeError: an argument is no str.
            ValueError: both are given, or there is no prompt of this name.
        """
        for name, value in (("prompt", prompt), ("prompt_name", prompt_name)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} is of type {type(value).__name__}; expected a str, or None")
        if prompt is not None and prompt_name is not None:
            raise ValueError("prompt and prompt_name were both given; expected at most one of them")
        if prompt is not None:
            return prompt
        prompt_name = (task or self.default_prompt_name) if prompt_name is None else prompt_name
        if prompt_name is None:
            return ""
        if prompt_name not in self.prompts:
            listed = ", ".join(map(repr, self.prompts))
            raise ValueError(f"prompt_name is {prompt_name!r}; expected one of the model's prompts, {listed}")
        return self.prompts[prompt_name]

    def check(self) -> None:
        """Raise ValueError where the modules can't be applied."""
        if self.problem:
            raise ValueError(f"{self.problem} (an explicit pooling ignores the folder's modules)")

    def with_pooling(self, pooling: Any) -> SentenceModules:
        """The same texts with this pooling, and no module but it."""
        return replace(self, pooling=check_pooling(pooling), token_steps=(), steps=(), truncate_dim=None, problem="")

    def apply(self, vectors: Tensor) -> Tensor:
        """The pooled vectors (B, n * E) float32 after the last module: (B, D)."""
        for step in self.steps:
            vectors = step(vectors)
        return vectors


class Dense(nn.Module):
    """sentence-transformers' Dense: activation(x W^T + b), plus x or its projection with `use_residual`."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None) -> None:
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, residual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.linear(x))
        return out if self.residual is None else out + self.residual(x)


class Normalize(nn.Module):
    """x / ||x||, over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


def transformer_source(source: Source) -> Source:
    """Where the files of the Transformer module are: `source`, or the folder in it that its modules.json names."""
    if source.find(CONFIG_NAME) is not None or (path := source.find(MODULES_NAME)) is None:
        return source
    entries = read_list(path)
    where = next((_field(entry, "path") for entry in entries if module_name(entry) == "Transformer"), "")
    return source.within(where) if where else source


def kind_of(source: Source, config: BertConfig) -> str:
    """What a folder is for: SentenceTransformer, CrossEncoder or SparseEncoder, a task of ours, or "encoder".

    That is what sentence-transformers wrote, or else the task that the model was fine-tuned for by its name, such as
    "classification"; a plain sequence classifier of one label is a CrossEncoder; any other folder is an "encoder".
    """
    if (path := source.find(MODULES_NAME)) is not None:
        settings = source.find(SETTINGS_NAME)
        kind = {} if settings is None else read_json(settings)
        if "SpladePooling" in map(module_name, read_list(path)):
            return "SparseEncoder"
        return str(kind.get("model_type", "SentenceTransformer"))
    if isinstance(name := _mapping(config.extra, TASK_KEY).get("name"), str):
        return name
    head = (config.architectures or [""])[0]
    return "CrossEncoder" if head.endswith("ForSequenceClassification") and config.num_labels == 1 else "encoder"


def task_modules(config: BertConfig) -> SentenceModules | None:
    """How the task sentence-embedding embeds texts, where fine-tuning wrote it into `config`; None for other models."""
    entry = _mapping(config.extra, TASK_KEY)
    if entry.get("name") != "sentence-embedding":
        return None
    options, text = _mapping(entry, "options"), _mapping(entry, "text")
    length, keep = text.get("max_length", longest_input(config)), text.get("long", "head")
    if (
        isinstance(length, bool)
        or not isinstance(length, int)
        or length < 2
        or keep not in ("head", "tail", "head_tail")
    ):
        raise ValueError(f"{TASK_KEY}: text is {reprlib.repr(text)}; expected max_length of 2 or more, and long")
    pooling = check_pooling(options.get("pooling", "mean"))
    return SentenceModules(pooling=pooling, max_seqlen=min(length, longest_input(config)), keep=keep)


def read_modules(
    source: Source, config: BertConfig, kind: str = "SentenceTransformer", *, allow_pickle: bool = False
) -> SentenceModules | None:
    """Read modules.json and the files that it names.

    Args:
        source: the folder or repository with modules.json.
        config: of the model in it.
        kind: the class of sentence-transformers: SentenceTransformer, CrossEncoder or SparseEncoder.
        allow_pickle: read the weights of a module from pytorch_model.bin where there is no safetensors file.

    Returns:
        The modules; what can't be applied, or read, is in `problem`. None where there is no modules.json, or it
        is that of another kind of model.
    """
    if (path := source.find(MODULES_NAME)) is None:
        return None
    try:
        reader = ModulesReader(source, config, kind, allow_pickle)
        found = reader.settings.get("model_type", "SentenceTransformer")
        if found in MULTI_VECTOR_KINDS and kind == "SentenceTransformer":
            return SentenceModules(
                problem=f"{source} has a vector for each token ({found}); expected a model of one vector for each "
                "text: load it with bert_fast.models.MultiVectorModel"
            )
        if found != kind:
            return None
        return _READERS[kind](reader, read_list(path), str(path))
    except (ValueError, FileNotFoundError) as error:
        return SentenceModules(problem=str(error))


class ModulesReader:
    def __init__(self, source: Source, config: BertConfig, kind: str, allow_pickle: bool) -> None:
        self.source, self.config, self.kind, self.allow_pickle = source, config, kind, allow_pickle
        self.files: dict[str, bytes] = {}
        self.transformer_values: dict[str, Any] = {}
        self.settings = self.read_kept(SETTINGS_NAME)

    def read_cross_encoder(self, entries: list[Any], where: str) -> SentenceModules:
        modules = self.first(entries, where)
        if len(entries) > 1:
            raise ValueError(f"{where}: the module {entries[1].get('type')!r} is not supported after the Transformer")
        activation = self.settings.get("activation_fn") or ""
        return replace(modules, activation=activation, files=self.files)

    def read_sparse_encoder(self, entries: list[Any], where: str) -> SentenceModules:
        modules = self.first(entries, where)
        if len(entries) != 2 or module_name(entries[1]) != "SpladePooling":
            kinds = ", ".join(str(entry.get("type")) for entry in entries[1:]) or "no module"
            raise ValueError(f"{where}: after the Transformer there is {kinds}; expected SpladePooling alone")
        values = self.read_kept(f"{_field(entries[1], 'path')}/{MODULE_CONFIG}")
        strategy, activation = values.get("pooling_strategy", "max"), values.get("activation_function", "relu")
        if strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
            raise ValueError(f"{where}: SpladePooling has {strategy!r} of {activation!r}; expected max or sum of relu")
        dims = self.settings.get("max_active_dims")
        if dims is not None and (isinstance(dims, bool) or not isinstance(dims, int) or dims < 1):
            raise ValueError(f"{self.source}/{SETTINGS_NAME}: max_active_dims is {dims!r}; expected 1 or more")
        return replace(modules, pooling=(strategy,), activation=activation, max_active_dims=dims, files=self.files)

    def first(self, entries: list[Any], where: str) -> SentenceModules:
        """What the first module, the Transformer, says."""
        if not entries or module_name(entries[0]) not in ("Transformer", "MLMTransformer"):
            first = repr(entries[0].get("type")) if entries else "no module"
            raise ValueError(f"{where}: the first module is {first}; expected sentence_transformers' Transformer")
        # Where the Transformer had a folder of its own, what is saved has it at the top.
        top = [{**entries[0], "path": ""}, *entries[1:]]
        self.files[MODULES_NAME] = (json.dumps(top, indent=2) + "\n").encode()
        return self._transformer(_field(entries[0], "path"))

    def read(self, entries: list[Any], where: str) -> SentenceModules:
        modules = self.first(entries, where)
        token_steps: list[nn.Module] = []
        steps: list[nn.Module] = []
        pooling: dict[str, Any] | None = None
        for entry in entries[1:]:
            kind, folder = module_name(entry), _field(entry, "path")
            if kind not in _BUILDERS and kind not in ("Pooling", "Dropout"):
                raise ValueError(
                    f"{where}: the module {entry.get('type')!r} is not supported; expected Transformer, Pooling, "
                    f"Dropout, {', '.join(_BUILDERS)} of sentence_transformers"
                )
            values = self.read_kept(f"{folder}/{MODULE_CONFIG}" if folder else MODULE_CONFIG, kept=bool(folder))
            if kind == "Pooling":
                if pooling is not None:
                    raise ValueError(f"{where}: there are two Pooling modules; expected one")
                pooling = values
            elif kind != "Dropout":
                step = self.build(kind, folder, values)
                name = values.get("module_input_name", "sentence_embedding")
                if values.get("module_output_name") not in (None, name):
                    raise ValueError(f"{where}: {folder} writes {values['module_output_name']!r}; expected {name!r}")
                (token_steps if name == "token_embeddings" else steps).append(step)
                if (name == "sentence_embedding") != (pooling is not None) or name not in _INPUTS:
                    raise ValueError(f"{where}: the module {kind} in {folder} reads {name!r}, which is not there")
        if pooling is None:
            raise ValueError(f"{where}: there is no Pooling module; expected one after the Transformer")
        return replace(
            modules,
            pooling=_pooling_names(pooling),
            include_prompt=pooling.get("include_prompt", True) is not False,
            token_steps=tuple(token_steps),
            steps=tuple(steps),
            files=self.files,
        )

    def _transformer(self, folder: str) -> SentenceModules:
        values: dict[str, Any] = {}
        for name in _TRANSFORMER_NAMES:
            if values := self.read_kept(f"{folder}/{name}" if folder else name, name):
                break
        self.transformer_values = values
        where = f"{self.source}: the Transformer module"
        task, output = _OUTPUTS[self.kind]
        if values.get("transformer_task", task) != task:
            raise ValueError(f"{where} is for {values['transformer_task']!r}; expected {task!r}")
        text = _mapping(_mapping(values, "modality_config"), "text")
        if text.get("method", "forward") != "forward" or text.get("method_output_name", output) not in (
            output,
            [output],
        ):
            raise ValueError(f"{where} returns {text.get('method_output_name')!r}; expected {output!r}")
        if values.get("query_expansion") and self.kind != "MultiVectorEncoder":
            raise ValueError(f"{where} has query_expansion, which is not supported")
        arguments = _mapping(values, "processor_kwargs") or _mapping(values, "tokenizer_args")
        length = arguments.get("model_max_length") or values.get("max_seq_length")
        prompts = NO_PROMPTS | self._prompts()
        default = self.settings.get("default_prompt_name")
        if default is not None and not (isinstance(default, str) and default in prompts):
            raise ValueError(f"{self.source}: default_prompt_name is {default!r}, and there is no prompt of this name")
        lengths = {task: self.length(values.get(f"{task}_length")) for task in ("query", "document")}
        kept = _mapping(_mapping(self.config.extra, TASK_KEY), "text").get("long", "head")
        return SentenceModules(
            max_seqlen=self.length(length) or stored_length(self.source.within(folder), self.config),
            task_lengths={task: value for task, value in lengths.items() if value is not None},
            keep=kept if kept in ("head", "tail", "head_tail") else "head",
            lowercase=bool(values.get("do_lower_case")),
            prompts=prompts,
            default_prompt_name=default,
            truncate_dim=self.settings.get("truncate_dim"),
        )

    def _prompts(self) -> dict[str, str]:
        prompts = self.settings.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, (str, type(None))) for text in prompts.values()):
            raise ValueError(f"{self.source}/{SETTINGS_NAME}: prompts is no mapping from names to texts")
        return {name: text or "" for name, text in prompts.items()}

    def length(self, value: Any) -> int | None:
        """A number of tokens; the model's maximum where it is larger, None where it is not set."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 2:
            raise ValueError(f"{self.source}: the maximum length is {value!r}; expected 2 or more tokens")
        return int(min(value, longest_input(self.config)))

    def read_kept(self, name: str, saved_as: str = "", *, kept: bool = True) -> dict[str, Any]:
        """The values of a JSON file, {} where it is absent; the file is kept for saving."""
        path = self.source.find(name)
        if path is None:
            return {}
        if kept:
            self.files[saved_as or name] = path.read_bytes()
        return read_json(path)

    def tensors(self, folder: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
        """The weights of a module, in float32, which are kept for saving."""
        from safetensors.torch import save

        tensors = storage.read(self.source.within(folder), allow_pickle=self.allow_pickle)
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        expected = {name.replace("__", "."): shape for name, shape in shapes.items()}
        if found != expected:
            raise ValueError(f"{self.source}: {folder} has the tensors {found}; expected {expected}")
        self.files[f"{folder}/{WEIGHTS_NAME}"] = save({name: x.contiguous() for name, x in tensors.items()})
        return {name: x.float() for name, x in tensors.items()}

    def build(self, kind: str, folder: str, values: dict[str, Any]) -> nn.Module:
        """The module `kind`, Dense, LayerNorm or Normalize, in `folder`; `values` are those of its config.json."""
        return _BUILDERS[kind](self, folder, values)

    def dense(self, folder: str, values: dict[str, Any]) -> nn.Module:
        check_fields(values, {"in_features": int, "out_features": int}, f"{self.source}/{folder}/{MODULE_CONFIG}")
        sizes = (values["in_features"], values["out_features"])
        bias, projected = values.get("bias", True), values.get("use_residual", False) and sizes[0] != sizes[1]
        shapes: dict[str, tuple[int, ...]] = {"linear__weight": sizes[::-1]}
        shapes |= {"linear__bias": (sizes[1],)} if bias else {}
        shapes |= {"residual__weight": sizes[::-1]} if projected else {}
        tensors = self.tensors(folder, **shapes)
        residual: nn.Module | None = _linear(tensors["residual.weight"], None) if projected else None
        if values.get("use_residual", False) and not projected:
            residual = nn.Identity()
        activation = activation_of(values.get("activation_function", "torch.nn.Tanh"), f"{self.source}/{folder}")
        return Dense(_linear(tensors["linear.weight"], tensors.get("linear.bias")), activation, residual).eval()

    def layer_norm(self, folder: str, values: dict[str, Any]) -> nn.Module:
        check_fields(values, {"dimension": int}, f"{self.source}/{folder}/{MODULE_CONFIG}")
        size = values["dimension"]
        tensors = self.tensors(folder, norm__weight=(size,), norm__bias=(size,))
        norm = nn.LayerNorm(size)
        norm.load_state_dict({"weight": tensors["norm.weight"], "bias": tensors["norm.bias"]})
        return norm.requires_grad_(False).eval()

    def normalize(self, folder: str, values: dict[str, Any]) -> nn.Module:
        return Normalize()


_INPUTS = ("sentence_embedding", "token_embeddings")
_BUILDERS: dict[str, Callable[[ModulesReader, str, dict[str, Any]], nn.Module]] = {
    "Dense": ModulesReader.dense,
    "LayerNorm": ModulesReader.layer_norm,
    "Normalize": ModulesReader.normalize,
}


_READERS = {
    "SentenceTransformer": ModulesReader.read,
    "CrossEncoder": ModulesReader.read_cross_encoder,
    "SparseEncoder": ModulesReader.read_sparse_encoder,
}


def stored_length(source: Source, config: BertConfig) -> int | None:
    """model_max_length of the tokenizer's settings, where it is a length that the model has; None elsewhere."""
    path = source.find("tokenizer_config.json")
    length = None if path is None else read_json(path).get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, (int, float)) or length < 2:
        return None
    return int(min(length, longest_input(config)))


def activation_of(name: Any, where: str) -> nn.Module:
    """The activation that `name`, such as "torch.nn.modules.activation.Tanh", names.

    Raises:
        ValueError: it is none of torch.nn's.
    """
    parts = name.split(".") if isinstance(name, str) else []
    kind = getattr(torch.nn, parts[-1], None) if parts[:2] == ["torch", "nn"] else None
    names_it = kind is not None and name in (f"torch.nn.{parts[-1]}", f"{kind.__module__}.{parts[-1]}")
    is_activation = isinstance(kind, type) and (kind is nn.Identity or kind.__module__ == "torch.nn.modules.activation")
    if not names_it or not is_activation or kind is nn.MultiheadAttention or kind is nn.Threshold:
        raise ValueError(f"{where}: the activation function is {name!r}; expected one of torch.nn, such as Tanh")
    activation: nn.Module = kind().eval()  # type: ignore[misc]
    return activation


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _pooling_names(values: Mapping[str, Any]) -> tuple[str, ...]:
    names = values.get("pooling_mode")
    if names is None:
        names = tuple(name for old, name in _OLD_POOLINGS.items() if values.get(old)) or ("mean",)
    names = check_pooling(names)
    if "pooler" in names:
        raise ValueError(f"pooling_mode is {names}; sentence_transformers has no 'pooler'")
    return names


def read_list(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is no list of modules")
    for entry in entries:
        if folder := _field(entry, "path"):
            safe_name(path.parent, folder, str(path))
    return entries


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping called `name`, empty where it is absent or None."""
    value = values.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected a mapping")
    return value or {}


def _field(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{MODULES_NAME}: {name} is {value!r}; expected a str")
    return value.rstrip("/") if name == "path" else value


def module_name(entry: Mapping[str, Any]) -> str:
    """The class of a module of sentence_transformers or PyLate; "" for other code."""
    package, _, name = _field(entry, "type").rpartition(".")
    return name if package.split(".")[0] in ("sentence_transformers", "pylate") else ""
