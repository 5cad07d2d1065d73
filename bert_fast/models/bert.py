"""`BertModel`, and the base classes of all models: initialization, tied weights, checkpoints, padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from bert_fast.kernels._common.checks import check_integer, check_range, check_same_device, check_shape
from bert_fast.models import checkpoint
from bert_fast.models.config import BertConfig
from bert_fast.models.embedding import encode
from bert_fast.models.encoder import DROPOUTS_PER_LAYER, BertEncoder, draw_rng_states
from bert_fast.models.family import ARCHITECTURES, COMMON_MODELS, NamePairs
from bert_fast.models.files import find_file
from bert_fast.models.inputs import Tokens
from bert_fast.models.layers import BertEmbeddings, BertPooler
from bert_fast.models.outputs import BaseModelOutputWithPooling, ModelOutput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Self, Unpack

Output = TypeVar("Output", bound=ModelOutput)


class OutputFlags(TypedDict, total=False):
    """Optional outputs of a forward; None for the configuration's setting."""

    output_attentions: bool | None
    output_hidden_states: bool | None


class EncoderOptions(OutputFlags, total=False):
    """The keywords that every head passes to `BertModel`; cu_seqlens and max_seqlen are for packed input."""

    cu_seqlens: Tensor | None
    max_seqlen: int | None
    rng_states: Tensor | None


class PackedOutput(NamedTuple):
    """What the encoder returns to a head."""

    tokens: Tokens
    hidden: Tensor  # (T, E)
    pooled: Tensor | None  # (B, E)
    states: dict[str, tuple[Tensor, ...] | None]  # hidden_states and attentions, in the shape of the input


class BertPreTrainedModel(nn.Module):
    """Base class of the models: initialization, tied weights, `from_pretrained` and `save_pretrained`.

    Args:
        config: checked again; ValueError where it is wrong or the model does not exist for its model_type.
    """

    base_model_prefix: ClassVar[str] = "bert"
    head: ClassVar[str] = "Model"  # suffix of transformers' class name
    model_types: ClassVar[tuple[str, ...]] = tuple(ARCHITECTURES)  # that have this head
    init_arguments: ClassVar[tuple[str, ...]] = ()  # of the constructor, besides `config`

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        config.validate()
        if config.model_type not in self.model_types:
            raise ValueError(
                f"{type(self).__name__} exists for {', '.join(self.model_types)} only, and the configuration's "
                f"model_type is {config.model_type!r}; expected one of {', '.join(COMMON_MODELS)}"
            )
        self.config = config

    @property
    def base_model(self) -> BertModel:
        """The encoder model; of a BertModel, itself."""
        model = getattr(self, self.base_model_prefix, self)
        assert isinstance(model, BertModel)
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

    def num_parameters(self) -> int:
        """The number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding."""
        return self.base_model.embeddings.word_embeddings

    def gradient_checkpointing_enable(self) -> None:
        """Store only each layer's input for the backward pass and recompute the rest, with the same dropout."""
        self.base_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Store every activation that the backward pass needs."""
        self.base_model.encoder.gradient_checkpointing = False

    def tie_weights(self) -> None:
        """Share the tied parameters, if the model has any."""

    def post_init(self) -> None:
        """Initialize and tie the parameters: the last statement of a model's constructor."""
        for child in self.children():
            if not isinstance(child, BertModel):  # its own constructor has initialized it
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
        config: BertConfig | None = None,
        dtype: torch.dtype | str = torch.float32,
        strict: bool = True,
        allow_pickle: bool = False,
        ignore_mismatched_sizes: bool = False,
        new_head: bool = False,
        revision: str | None = None,
        **settings: Any,
    ) -> Self:
        """Load a checkpoint in transformers' format.

        A head or pooler that the checkpoint lacks is newly initialized, heads that the model lacks are not used; the
        logger "bert_fast" warns of both.

        Args:
            name_or_path: a folder, or the name of a hub repository.
            config: replaces the checkpoint's.
            dtype: of the parameters; "auto" for the dtype in the file.
            strict: False to accept missing and unexpected tensors, with a warning.
            allow_pickle: read pytorch_model.bin where there is no safetensors file (weights only, no code).
            ignore_mismatched_sizes: initialize a new head where its shapes differ, as with another num_labels.
            new_head: ignore the checkpoint's head and initialize a new one; a pooler is no head.
            revision: branch, tag or commit of the repository.
            settings: replace those of config.json, for example `num_labels=3`; or arguments of the constructor.

        Returns:
            The model in eval mode, on the CPU.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it has no weights.
            ValueError: tensors are missing or unexpected, shapes differ (all are named), or a setting is wrong.
            ImportError: `name_or_path` may be a repository, and huggingface_hub is not installed.
        """
        init_arguments = {name: settings.pop(name) for name in cls.init_arguments if name in settings}
        if config is None:
            config = BertConfig.from_pretrained(name_or_path, revision=revision, **settings)
        elif settings:
            config = config.replace(**settings)
        stored = checkpoint.read(name_or_path, allow_pickle=allow_pickle, revision=revision)
        if dtype == "auto":
            dtype = next((x.dtype for x in stored.values() if x.is_floating_point()), torch.float32)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; expected a torch.dtype or 'auto'")
        with torch.device("meta"):
            model = cls(config, **init_arguments)
        model = model.to(dtype).to_empty(device="cpu")
        model.tie_weights()
        model.load_hf(stored, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes, new_head=new_head)
        model.base_model.source = name_or_path, revision
        return model.eval()

    def load_hf(self, stored: Mapping[str, Tensor], **options: bool) -> None:
        """Set the parameters from tensors under transformers' names and initialize those that are not among them.

        Args:
            stored: for example the state_dict of transformers' model.
            options: strict, ignore_mismatched_sizes and new_head, see `from_pretrained`.

        Raises:
            ValueError: tensors are missing or unexpected, or their shapes differ.
        """
        model = self._tensors()
        tensors = checkpoint.match_tensors(model, stored, **options)
        missing = model.state.keys() - model.tied - tensors.keys()
        for prefix, module in self.named_modules():
            if any(f"{prefix}.{name}" in missing for name, _ in module.named_parameters(recurse=False)):
                self.init_module(module)  # the tensors that are there are copied over it
        with torch.no_grad():
            for name, x in tensors.items():
                model.state[name].copy_(x)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json to `folder`, each atomically, in transformers' format.

        Raises:
            NotADirectoryError: `folder` is a file.
            ValueError: the model is quantized.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; expected a folder, or the path of a new one")
        checkpoint.write(self._tensors(), folder)
        dtype = str(self.dtype).removeprefix("torch.")
        self.config.replace(architectures=[self.hf_class], dtype=dtype).save_pretrained(folder)

    def _tensors(self) -> checkpoint.ModelTensors:
        base = self.config.architecture.base
        return checkpoint.ModelTensors(
            self.state_dict(), self.tied_names, self.hf_names, base, has_head=self.base_model is not self
        )


class BertModel(BertPreTrainedModel):
    """The encoder of every architecture.

    Args:
        config: the settings.
        add_pooling_layer: whether to pool the first token; DistilBERT and ELECTRA never do.
    """

    init_arguments = ("add_pooling_layer",)

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        projected = config.input_size != config.hidden_size
        self.embeddings_project = nn.Linear(config.input_size, config.hidden_size) if projected else None
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer and config.architecture.pooler else None
        self.source: tuple[str | Path, str | None] | None = None  # name_or_path and revision
        self._tokenizer: Tokenizer | None = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        label_rows: Tensor | None = None,
        rng_states: Tensor | None = None,
        return_dict: bool | None = None,
        **flags: Unpack[OutputFlags],
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode padded or packed input.

        Padding is removed once, before the embeddings; in the output it is zeros.

        Args:
            input_ids ... inputs_embeds, cu_seqlens, max_seqlen: see `bert_fast.models.inputs.Inputs`.
            label_rows: int64 (M,), for packed input: the tokens that will have a loss. The last layer is computed at
                these and at the first tokens only, and last_hidden_state is (M, E), theirs.
            rng_states: int64 (1 + 3L, 2), the dropout states (seed, offset) of the embeddings and of three places in
                every layer; None to draw them from torch's generator. Only used in training mode.
            return_dict: False for a tuple.
            output_hidden_states: also return the embeddings' and every layer's output.
            output_attentions: also return every layer's attention probabilities before dropout, (B, N, S, S).

        Returns:
            last_hidden_state (B, S, E), for packed input (T, E); pooler_output (B, E), from each sequence's first real
            token; hidden_states and attentions where requested.

        Raises:
            TypeError: an input has another type or dtype, or a keyword is unknown.
            ValueError: a shape, a device or a value is wrong, or inputs contradict each other.
        """
        tokens = Tokens.from_inputs(
            self.config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        rng_states = self._rng_states(rng_states, tokens.cu_seqlens.device)
        hidden = self.embeddings(tokens, None if rng_states is None else rng_states[0])
        if self.embeddings_project is not None:
            hidden = self.embeddings_project(hidden)
        output_rows = None if label_rows is None else _first_and_label_rows(tokens, label_rows)
        encoded = self.encoder(
            hidden,
            tokens,
            None if rng_states is None else rng_states[1:],
            output_rows=output_rows,
            output_hidden_states=self._flag("output_hidden_states", **flags),
            output_attentions=self._flag("output_attentions", **flags),
        )
        hidden, first = encoded.hidden, None
        if output_rows is not None:
            first, hidden = hidden.split([tokens.batch_size, output_rows.shape[0] - tokens.batch_size])
            first = first.masked_fill(tokens.cu_seqlens.diff().eq(0).unsqueeze(1), 0.0)
        elif self.pooler is not None:
            first = tokens.first(hidden)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens.restore(hidden),
            pooler_output=None if self.pooler is None else self.pooler(first),
            hidden_states=_restore_all(tokens.restore, encoded.hidden_states),
            attentions=_restore_all(tokens.restore_attentions, encoded.attentions),
        )
        return self.format_output(output, return_dict)

    def _rng_states(self, rng_states: Tensor | None, device: torch.device) -> Tensor | None:
        """`rng_states`, checked, or drawn where they are None; None outside of training."""
        if rng_states is None or not self.training:
            return draw_rng_states(self.config, device) if self.training else None
        check_integer("rng_states", rng_states, (torch.int64,))
        check_shape("rng_states", rng_states, (1 + DROPOUTS_PER_LAYER * self.config.num_hidden_layers, 2))
        return rng_states

    def encode(
        self,
        texts: Sequence[str],
        *,
        tokenizer: Tokenizer | None = None,
        pooling: str = "mean",
        normalize: bool = False,
        max_seqlen: int | None = None,
        batch_tokens: int = 8192,
        show_progress_bar: bool = False,
    ) -> Tensor:
        """Embed texts: `bert_fast.models.embedding.encode` with this model.

        Args:
            tokenizer: None for the tokenizer of the folder or repository that the model was loaded from.
            texts, pooling ... show_progress_bar: see `bert_fast.models.embedding.encode`.

        Returns:
            (len(texts), E) float32 on the CPU, in the order of `texts`.

        Raises:
            TypeError, ValueError, ImportError: as `encode`; ValueError also where there is no tokenizer.
        """
        return encode(
            self,
            self._source_tokenizer() if tokenizer is None else tokenizer,
            texts,
            pooling=pooling,
            normalize=normalize,
            max_seqlen=max_seqlen,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
        )

    def _source_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            if self.source is None:
                raise ValueError("the model was not loaded by from_pretrained; pass a tokenizer to encode")
            from bert_fast.data.tokenizer import TOKENIZER_FILES, check_rows, load_tokenizer  # tokenizers is optional

            name, revision = self.source
            files = [path for file in TOKENIZER_FILES if (path := find_file(name, file, revision=revision))]
            if not files:
                raise ValueError(f"{name} has no tokenizer ({', '.join(TOKENIZER_FILES)}); pass one to encode")
            tokenizer = load_tokenizer(files[0].parent)
            check_rows(tokenizer, self.config.vocab_size, name)
            self._tokenizer = tokenizer
        return self._tokenizer

    def _flag(self, name: str, **flags: Unpack[OutputFlags]) -> bool:
        unknown = flags.keys() - OutputFlags.__annotations__.keys()
        if unknown:
            raise TypeError(f"forward got an unexpected keyword: {', '.join(sorted(unknown))}")
        requested = flags.get(name)
        return bool(getattr(self.config, name) if requested is None else requested)


def _restore_all(restore: Callable[[Tensor], Tensor], states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    return tuple(restore(state) for state in states) if states else None


def _first_and_label_rows(tokens: Tokens, label_rows: Tensor) -> Tensor:
    """The rows of the sequences' first tokens, then `label_rows`, checked."""
    T = tokens.token_type_ids.shape[0]
    if tokens.shape is not None or T == 0:
        raise ValueError("label_rows came with padded or empty input; expected packed tokens, with cu_seqlens")
    check_integer("label_rows", label_rows, (torch.int64,))
    check_shape("label_rows", label_rows, ("M",))
    check_same_device(tokens.cu_seqlens, label_rows=label_rows)
    check_range("label_rows", label_rows, T, "the number of tokens")
    return torch.cat([tokens.cu_seqlens[:-1].long().clamp(max=T - 1), label_rows])


class BertHeadModel(BertPreTrainedModel):
    """Base class of the models with a head; the encoder is `bert`, and runs on packed tokens."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=add_pooling_layer)

    def run_encoder(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        label_rows: Tensor | None = None,
        rng_states: Tensor | None = None,
        **flags: Unpack[OutputFlags],
    ) -> PackedOutput:
        """Remove padding and run the encoder; the arguments are those of `BertModel.forward`.

        The packed tokens go through its forward, so that hooks on the encoder run.
        """
        tokens = Tokens.from_inputs(
            self.config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        if label_rows is not None:
            _first_and_label_rows(tokens, label_rows)  # checked here: the encoder never sees padded input
        output = self.bert(
            **tokens.as_inputs(), label_rows=label_rows, rng_states=rng_states, return_dict=True, **flags
        )
        states = {
            "hidden_states": _restore_all(tokens.restore, output.hidden_states),
            "attentions": _restore_all(tokens.restore_attentions, output.attentions),
        }
        return PackedOutput(tokens, output.last_hidden_state, output.pooler_output, states)
