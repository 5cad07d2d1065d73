"""The base class of all models: initialization, tied weights, the vocabulary's size, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bert_fast.models import checkpoint, int8, storage
from bert_fast.models.config import BertConfig
from bert_fast.models.family import ARCHITECTURES, COMMON_MODELS, NamePairs
from bert_fast.models.files import HUB_OPTIONS, Source
from bert_fast.models.loading import check_flags, check_save_keywords, parameter_dtype, read_config, single_device
from bert_fast.models.outputs import ModelOutput
from bert_fast.models.sentence import (
    SentenceModules,
    read_modules,
    stored_length,
    task_modules,
    transformer_source,
)
from bert_fast.models.texts import lowercased
from bert_fast.models.vocabulary import check_embedding, resize_rows, rows_after

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Self

    from bert_fast.models.bert import BertModel

Output = TypeVar("Output", bound=ModelOutput)

_logger = logging.getLogger("bert_fast")


class BertPreTrainedModel(nn.Module):
    """Base class of the models: initialization, tied weights, `from_pretrained` and `save_pretrained`.

    Args:
        config: checked again; ValueError where it is wrong or the model does not exist for its model_type, TypeError
            where it is no BertConfig.
    """

    base_model_prefix: ClassVar[str] = "bert"
    head: ClassVar[str] = "Model"  # suffix of transformers' class name
    model_types: ClassVar[tuple[str, ...]] = tuple(ARCHITECTURES)  # that have this head
    init_arguments: ClassVar[tuple[str, ...]] = ()  # of the constructor, besides `config`
    modules_kind: ClassVar[str | None] = None  # the class of sentence-transformers, see `SentenceModules`

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        if not isinstance(config, BertConfig):
            raise TypeError(
                f"config is of type {type(config).__name__}; expected a BertConfig (from_dict makes one of a mapping; "
                f"{type(self).__name__}.from_pretrained loads a model)"
            )
        config.validate()
        if config.model_type not in self.model_types:
            raise ValueError(
                f"{type(self).__name__} exists for {', '.join(self.model_types)} only, and the configuration's "
                f"model_type is {config.model_type!r}; expected one of {', '.join(COMMON_MODELS)}"
            )
        self.config = config
        self.source: Source | None = None  # of the checkpoint, for the tokenizer
        self.sentence_modules: SentenceModules | None = None  # of the checkpoint
        self._tokenizer: Tokenizer | None = None
        self._plain_modules: SentenceModules | None = None

    @property
    def base_model(self) -> BertModel:
        """The encoder model; of a BertModel, itself."""
        model: Any = getattr(self, self.base_model_prefix, self)
        return model

    @property
    def hf_class(self) -> str:
        """The name of transformers' class for this model, such as "RobertaForMaskedLM"."""
        return self.config.architecture.prefix + self.head

    @property
    def hf_names(self) -> NamePairs:
        """The names of the tensors in a checkpoint: pairs, ours first."""
        return self.config.architecture.tensor_names(self.head)

    @property
    def tied_names(self) -> set[str]:
        """Second names of tied parameters; a checkpoint has only the first."""
        return set()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def accepts_loss_kwargs(self) -> bool:
        """What transformers' Trainer asks when it is constructed; the answer is a TypeError.

        It saves the state_dict of a model that is not transformers' own, with the names and the tied parameters of
        this package, and no configuration: nobody could load that.
        """
        raise TypeError(
            f"transformers' Trainer can't save and resume bert_fast's {type(self).__name__}: use bert_fast.fuse on "
            f"transformers' {self.hf_class} and give it that, or train this model with bert_fast.finetune"
        )

    def num_parameters(self) -> int:
        """The number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding."""
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embedding, and set `config.vocab_size` to its number of rows.

        The decoder of a masked-LM head follows when `tie_weights` is called next.

        Raises:
            TypeError: `value` is no nn.Embedding.
            ValueError: its rows have another width than the model's.
        """
        self.base_model.embeddings.word_embeddings = check_embedding(value, self.config.input_size)
        self.config.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        """The decoder of a masked-LM head; None for models without one."""
        return None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the number of rows of the word embedding, and of the decoder, as in transformers.

        The first rows keep their values; `config.vocab_size` follows. An optimizer that exists already holds the old
        parameters.

        Args:
            new_num_tokens: the number of rows; None for the present number.
            pad_to_multiple_of: round the number of rows up to a multiple of this.
            mean_resizing: draw new rows from a normal distribution with the mean of the old ones and 1e-9 times their
                covariance; False for mean 0 and the standard deviation `config.initializer_range`.

        Returns:
            The word embedding.

        Raises:
            TypeError: an argument has another type.
            ValueError: a number is out of range, or pad_token_id would have no row.
        """
        check_flags(mean_resizing=mean_resizing)
        embedding = self.get_input_embeddings()
        rows = rows_after(embedding.num_embeddings, new_num_tokens, pad_to_multiple_of)
        if self.config.pad_token_id is not None and rows <= self.config.pad_token_id:
            raise ValueError(f"there would be {rows} rows and pad_token_id is {self.config.pad_token_id}")
        if rows != embedding.num_embeddings:
            std = None if mean_resizing else self.config.initializer_range
            embedding.weight, embedding.num_embeddings = resize_rows(embedding.weight, rows, std), rows
            self._resize_output(rows, std)
        self.config.vocab_size = rows
        self.tie_weights()
        return embedding

    def _resize_output(self, rows: int, std: float | None) -> None:
        """Give the decoder `rows` rows; without effect on models that have none."""

    def gradient_checkpointing_enable(self) -> None:
        """Store only each layer's input for the backward pass and recompute the rest, with the same dropout."""
        self.base_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Store every activation that the backward pass needs."""
        self.base_model.encoder.gradient_checkpointing = False

    def tie_weights(self) -> None:
        """Share the tied parameters, if the model has any."""

    def untie_weights(self) -> None:
        """Give tied parameters memory of their own, and set `config.tie_word_embeddings` to False."""

    def post_init(self) -> None:
        """Initialize and tie the parameters: the last statement of a model's constructor."""
        for child in self.children():
            if not isinstance(child, BertPreTrainedModel):  # its own constructor has initialized it
                child.apply(self.init_module)
        self.tie_weights()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        """Initialize normal weights, zero biases, LayerNorm to 1 and 0, the padding row to 0.

        Source: Devlin et al., 2018, and its code.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()  # type: ignore[operator]

    def format_output(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        """`output`, or a tuple of its fields where `return_dict` (default: the configuration's) is False."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: BertConfig | str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | int | Mapping[str, Any] | None = None,
        strict: bool = True,
        allow_pickle: bool = False,
        ignore_mismatched_sizes: bool = False,
        new_head: bool = False,
        **settings: Any,
    ) -> Self:
        """Load a checkpoint in transformers' format, or of a quantized model.

        A head or pooler that the checkpoint lacks is newly initialized, heads that the model lacks are not used; the
        logger "bert_fast" warns of both. Prefixes that wrappers put before every name (`module.`, `_orig_mod.`,
        `model.`, `base_model.model.`) are ignored.

        Args:
            name_or_path: a folder, or the name of a hub repository.
            config: replaces the checkpoint's; also as the folder of one, or as transformers' configuration.
            dtype: of the parameters, float32 by default; "auto" for the dtype in the file. `torch_dtype` is its old
                name.
            device_map: the device of the model, also as {"": device}; None for the CPU. A model is never split.
            strict: False to accept missing and unexpected tensors, with a warning that names them.
            allow_pickle: read pytorch_model.bin where there is no safetensors file (weights only, no code).
            ignore_mismatched_sizes: initialize a new head where its shapes differ, as with another num_labels.
            new_head: ignore the checkpoint's head and initialize a new one; a pooler is no head.
            settings: replace those of config.json, for example `num_labels=3`; or arguments of the constructor; or
                subfolder, revision, token, cache_dir, local_files_only and force_download, see
                `bert_fast.models.files.Source`.

        Returns:
            The model in eval mode.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it has no weights.
            TypeError: a keyword is unknown, or has no meaning here; or an argument has another type.
            ValueError: tensors are missing or unexpected, shapes differ, none of the encoder's is there, a setting is
                wrong, or this CPU can't multiply the INT8 weights of a quantized model exactly.
            ImportError: `name_or_path` may be a repository, and huggingface_hub is not installed.
        """
        flags = {"strict": strict, "ignore_mismatched_sizes": ignore_mismatched_sizes, "new_head": new_head}
        check_flags(allow_pickle=allow_pickle, **flags)
        device = single_device(device_map)
        source = Source(name_or_path, **{name: settings.pop(name) for name in HUB_OPTIONS if name in settings})
        init_arguments = {name: settings.pop(name) for name in cls.init_arguments if name in settings}
        root = source
        try:
            config = read_config(cls, config, source, settings)
        except FileNotFoundError:
            if (source := transformer_source(root)) == root:
                raise
            config = read_config(cls, config, source, settings)
        stored = storage.read(source, allow_pickle=allow_pickle)
        dtype = parameter_dtype(dtype, torch_dtype, stored)
        with torch.device("meta"):  # names and shapes are compared before memory is allocated
            model = cls(config, **init_arguments).to(dtype)
            if int8.is_quantized(stored):
                for layer in model.base_model.encoder.layer:
                    int8.prepare(layer, stored)
                model.base_model.requires_grad_(False)
        tensors = model._match(stored, **flags)
        model.to_empty(device=device)
        model.tie_weights()
        model._set(tensors)
        int8.finish(model, source)
        model.source = model.base_model.source = source
        model._read_modules(root, allow_pickle=allow_pickle)
        return model.eval()

    def load_hf(self, stored: Mapping[str, Tensor], **options: bool) -> None:
        """Set the parameters from tensors under transformers' names and initialize those that are not among them.

        Args:
            stored: for example the state_dict of transformers' model.
            options: strict, ignore_mismatched_sizes and new_head, see `from_pretrained`.

        Raises:
            ValueError: tensors are missing or unexpected, or their shapes differ.
        """
        self._set(self._match(stored, **options))

    def _match(self, stored: Mapping[str, Tensor], **options: bool) -> dict[str, Tensor]:
        """The tensors of a checkpoint under our names; where it contradicts the tied weights, they are untied."""
        stored = checkpoint.modern_names(stored)
        tied = self._tensors()
        if differing := checkpoint.tied_pairs_differ(tied, stored):
            _logger.warning(
                "%s differ in the checkpoint, though tie_word_embeddings is True; they are not tied: set "
                "tie_word_embeddings=False to silence this warning",
                ", ".join(differing),
            )
            self.untie_weights()
        int8.check_stored(stored)
        # What the checkpoint has once, because it is tied there, still belongs to both.
        model = self._tensors()._replace(ties_embeddings=tied.ties_embeddings)
        tensors = checkpoint.match_tensors(model, stored, **options)
        layers = int8.int8_layers(self)
        names = [f"{prefix}.{name}" for prefix, layer in layers.items() for name in layer.checkpoint_tensors()]
        if absent := [name for name in names if name not in tensors]:
            raise ValueError(
                f"the checkpoint lacks {storage.shorten(absent)} of INT8 layers, which have no initial value"
            )
        return tensors

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors`, under our names, into the parameters, and initialize the others."""
        model = self._tensors()
        missing = model.state.keys() - model.tied - tensors.keys()
        for prefix, module in self.named_modules():
            if any(f"{prefix}.{name}" in missing for name, _ in module.named_parameters(recurse=False)):
                self.init_module(module)  # the tensors that are there are copied over it
        with torch.no_grad():
            for name, x in tensors.items():
                model.state[name].copy_(x)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        **unsupported: Any,
    ) -> None:
        """Write model.safetensors and config.json to `folder`, in transformers' format: both or none.

        A quantized model is written with its INT8 weights, and transformers refuses the folder: in place of a layer's
        `weight` there are `weight_int8` (N, K) int8, `weight_scale` (N,) float32 and, if it was calibrated,
        `input_range` (2,) float32, and config.json has a quantization_config whose `method` is "bert_fast".

        Other files of `folder` stay. A process that is killed leaves the old checkpoint or the new one; only a folder
        that can't be replaced as a whole (a mount point, the working folder) gets the two files one after the other.

        Args:
            folder: created if missing.
            state_dict: the tensors to write in place of the model's, such as those that FSDP gathered.
            is_main_process: False to write nothing.
            safe_serialization: True; other values are refused.
            unsupported: transformers' other keywords, which are refused.

        Raises:
            NotADirectoryError: `folder` is a file.
            OSError: a file can't be written; the old checkpoint is unchanged.
            TypeError: a keyword is unknown or not supported.
            ValueError: `state_dict` has other names than the model's.
        """
        check_save_keywords(self, safe_serialization=safe_serialization, **unsupported)
        check_flags(is_main_process=is_main_process)
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; expected a folder, or the path of a new one")
        tensors = self._tensors()
        if state_dict is not None:
            if different := sorted(state_dict.keys() ^ tensors.state.keys()):
                raise ValueError(f"state_dict and the model's differ in {storage.shorten(different)}")
            tensors = tensors._replace(state=state_dict)
        if is_main_process:
            dtype = next(str(x.dtype) for x in tensors.state.values()).removeprefix("torch.")
            config = self.config.replace(architectures=[self.hf_class], dtype=dtype)
            if quantization := int8.describe(self):
                config = config.replace(extra={**config.extra, "quantization_config": quantization})
            storage.write(checkpoint.to_stored(tensors), config.to_json(), folder, self._files_beside(folder))

    @property
    def modules_of_texts(self) -> SentenceModules:
        """How texts are read: as the folder's modules.json says, or the task that the model was fine-tuned for;
        otherwise with no prompt, and to the length that the folder's tokenizer names."""
        modules = self.sentence_modules or task_modules(self.config)
        if modules is not None:
            return modules
        if self._plain_modules is None:
            length = None
            if self.source is not None:
                with suppress(FileNotFoundError):  # a folder that is gone
                    length = stored_length(self.source, self.config)
            self._plain_modules = SentenceModules(max_seqlen=length)
        return self._plain_modules

    def source_tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder or repository that the model was loaded from.

        Raises:
            ValueError: the model was not loaded, or there is no tokenizer, or it has more tokens than the model rows.
        """
        if self._tokenizer is None:
            if self.source is None:
                raise ValueError("the model was not loaded by from_pretrained; pass a tokenizer to encode")
            from bert_fast.data.tokenizer import TOKENIZER_FILES, check_rows, load_tokenizer  # tokenizers is optional

            files = [path for file in TOKENIZER_FILES if (path := self.source.find(file))]
            if not files:
                raise ValueError(f"{self.source} has no tokenizer ({', '.join(TOKENIZER_FILES)}); pass one to encode")
            tokenizer = load_tokenizer(files[0].parent)
            check_rows(tokenizer, self.config.vocab_size, str(self.source))
            self._tokenizer = lowercased(tokenizer) if self.modules_of_texts.lowercase else tokenizer
        return self._tokenizer

    def _read_modules(self, root: Source, *, allow_pickle: bool) -> None:
        if self.modules_kind is None:
            return
        try:
            self.sentence_modules = read_modules(root, self.config, self.modules_kind, allow_pickle=allow_pickle)
        except FileNotFoundError as error:  # offline, and the hub's cache doesn't say whether there is such a file
            self.sentence_modules = SentenceModules(problem=str(error))

    def _files_beside(self, folder: Path) -> dict[str, bytes]:
        """Those of sentence-transformers that the model was loaded with, and the tokenizer where `folder` has none."""
        if self.sentence_modules is None or not self.sentence_modules.files:
            return {}
        from bert_fast.data.tokenizer import TOKENIZER_FILES

        files = dict(self.sentence_modules.files)
        if self.source is not None and not any((folder / name).exists() for name in TOKENIZER_FILES):
            with suppress(FileNotFoundError):  # the folder is gone; the model is whole without it
                found = {name: path for name in TOKENIZER_FILES if (path := self.source.find(name))}
                files |= {name: path.read_bytes() for name, path in found.items()}
        return files

    def _tensors(self) -> checkpoint.ModelTensors:
        return checkpoint.ModelTensors(
            self.state_dict(destination=int8.CheckpointState()),
            self.tied_names,
            self.hf_names,
            base=self.config.architecture.base,
            has_head=self.base_model is not self,
            ties_embeddings=self.config.tie_word_embeddings,
        )
