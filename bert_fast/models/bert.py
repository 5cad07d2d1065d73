"""`BertModel`, and what every model shares: initialisation, tied weights, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from bert_fast.kernels._common.checks import check_integer, check_range, check_same_device, check_shape
from bert_fast.models import checkpoint
from bert_fast.models.config import BertConfig
from bert_fast.models.encoder import SITES_PER_LAYER, BertEmbeddings, BertEncoder, BertPooler, draw_rng_states
from bert_fast.models.family import ARCHITECTURES, FOR_ALL, Names
from bert_fast.models.files import find_file
from bert_fast.models.inputs import Tokens
from bert_fast.models.outputs import BaseModelOutputWithPooling, ModelOutput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Self, Unpack

Output = TypeVar("Output", bound=ModelOutput)


class Flags(TypedDict, total=False):
    """What a forward is asked to return beside its logits; None for the configuration's setting."""

    output_attentions: bool | None
    output_hidden_states: bool | None


class Options(Flags, total=False):
    """The keywords that every head passes on to `BertModel` as they come; the first two are for packed input."""

    cu_seqlens: Tensor | None
    max_seqlen: int | None
    rng_states: Tensor | None


class Encoded(NamedTuple):
    """hidden (T, E) and pooled (B, E) of the tokens; what else was asked for, in the shape of the input."""

    tokens: Tokens
    hidden: Tensor
    pooled: Tensor | None
    states: dict[str, tuple[Tensor, ...] | None]


class BertPreTrainedModel(nn.Module):
    """Base of the models: `config`, initialisation as BERT's, tied weights, from_pretrained and save_pretrained."""

    base_model_prefix: ClassVar[str] = "bert"
    head: ClassVar[str] = "Model"  # the end of transformers' class name
    model_types: ClassVar[tuple[str, ...]] = tuple(ARCHITECTURES)  # that have this head

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        config.validate()
        if config.model_type not in self.model_types:
            raise ValueError(
                f"{type(self).__name__} is there for {', '.join(self.model_types)} only, and the configuration's "
                f"model_type is {config.model_type!r}; expected one of {', '.join(FOR_ALL)}"
            )
        self.config = config

    @property
    def base_model(self) -> BertModel:
        """The encoder inside."""
        model = getattr(self, self.base_model_prefix, self)
        assert isinstance(model, BertModel)
        return model

    @property
    def hf_class(self) -> str:
        """The name of transformers' class for this model, as "RobertaForMaskedLM"."""
        return self.config.architecture.prefix + self.head

    @property
    def hf_names(self) -> Names:
        """The names of the tensors in a checkpoint: pairs, ours first."""
        return self.config.architecture.names_of(self.head)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """The number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding."""
        return self.base_model.embeddings.word_embeddings

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again, with the same dropout."""
        self.base_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep every activation that the backward pass needs."""
        self.base_model.encoder.gradient_checkpointing = False

    def tie_weights(self) -> None:
        """Make tied parameters one, where the model has any."""

    def finish(self) -> None:
        """Initialise the parameters and tie: the last line of a model's constructor."""
        for child in self.children():
            if not isinstance(child, BertModel):  # which has initialised itself
                child.apply(self.init_module)
        self.tie_weights()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        """Normal weights, zero biases, LayerNorm 1 and 0, a zero padding row (Devlin et al., 2018, and its code)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()  # type: ignore[operator]

    def finished(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        """`output`, or its tuple where `return_dict` (default: the configuration's) is False."""
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
        """Load a checkpoint in transformers' format; the model comes back in eval mode, on the CPU.

        A head or a pooler that the checkpoint does not have is initialised anew, heads that it has beside are left
        out; both are named in a warning of the logger "bert_fast".

        Args:
            name_or_path: a folder, or the name of a repository on the hub.
            config: instead of the checkpoint's own.
            dtype: of the parameters; "auto" for the one that the file has.
            strict: False to go on with tensors missing or unexpected, named in a warning.
            allow_pickle: read pytorch_model.bin where there is no safetensors file (weights only, no code).
            ignore_mismatched_sizes: initialise a head anew where its shapes differ, as with another num_labels.
            new_head: leave the checkpoint's head out, and initialise one anew; a pooler is no head.
            revision: branch, tag or commit on the hub.
            settings: replace those of config.json, for example `num_labels=3`; and the constructor's own arguments.

        Raises:
            FileNotFoundError: no such folder or repository, or no weights in it.
            ValueError: missing or unexpected tensors or wrong shapes (all named), or a config that contradicts itself.
        """
        model_arguments = {name: settings.pop(name) for name in cls.model_arguments if name in settings}
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
            model = cls(config, **model_arguments)
        model = model.to(dtype).to_empty(device="cpu")
        model.tie_weights()
        checkpoint.load(
            model, stored, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes, new_head=new_head
        )
        model.base_model.source = name_or_path, revision
        return model.eval()

    model_arguments: ClassVar[tuple[str, ...]] = ()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json to `folder`, in transformers' format and under its names.

        Each file is written under a temporary name and renamed, so that none is ever half there.
        """
        checkpoint.save(self, Path(folder))


class BertModel(BertPreTrainedModel):
    """The encoder of every architecture, with a pooler of the first token where it has one.

    None with `add_pooling_layer` False, and in DistilBERT and ELECTRA.
    """

    model_arguments = ("add_pooling_layer",)

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        projected = config.input_size != config.hidden_size
        self.embeddings_project = nn.Linear(config.input_size, config.hidden_size) if projected else None
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer and config.architecture.pooler else None
        self.source: tuple[str | Path, str | None] | None = None  # name or path, and revision
        self._tokenizer: Tokenizer | None = None
        self.finish()

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
        **flags: Unpack[Flags],
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode padded (B, S) or packed (T,) input; see `bert_fast.models.inputs.Inputs` for the tensors.

        Padding is removed once, before the embeddings, and put back as zeros after the last layer.

        Args:
            label_rows: int64 (M,), of packed input: the tokens that will have a loss. Then the last layer is computed
                at these and at the first tokens only, and last_hidden_state is (M, E), theirs.
            rng_states: int64 (1 + 3L, 2), (seed, offset) of every place of dropout; in training without them they are
                drawn from torch's generator.
            output_hidden_states: also return the embeddings' and every layer's output.
            output_attentions: also return every layer's attention probabilities before dropout, (B, N, S, S).
            return_dict: False for a tuple.

        Returns:
            last_hidden_state (B, S, E), for packed input (T, E); pooler_output (B, E), from each sequence's first real
            token; hidden_states and attentions where asked for.

        Raises:
            ValueError, TypeError: a shape, a dtype, a device or a value is wrong; the message names it.
        """
        tokens = Tokens.of(
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
        wanted = None if label_rows is None else _first_and(label_rows, tokens)
        encoded = self.encoder(
            hidden,
            tokens,
            None if rng_states is None else rng_states[1:],
            wanted=wanted,
            output_hidden_states=self._flag("output_hidden_states", **flags),
            output_attentions=self._flag("output_attentions", **flags),
        )
        last, first = encoded.hidden, None
        if wanted is not None:
            first, last = last.split([tokens.batch, wanted.shape[0] - tokens.batch])
            first = first.masked_fill(tokens.cu_seqlens.diff().eq(0).unsqueeze(1), 0.0)
        elif self.pooler is not None:
            first = tokens.first(last)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens.restore(last),
            pooler_output=None if self.pooler is None else self.pooler(first),
            hidden_states=restored(tokens.restore, encoded.hidden_states),
            attentions=restored(tokens.restore_attentions, encoded.attentions),
        )
        return self.finished(output, return_dict)

    def _rng_states(self, given: Tensor | None, device: torch.device) -> Tensor | None:
        """Those of this pass: none outside of training, those given, else drawn."""
        if given is None or not self.training:
            return draw_rng_states(self.config, device) if self.training else None
        check_integer("rng_states", given, (torch.int64,))
        check_shape("rng_states", given, (1 + SITES_PER_LAYER * self.config.num_hidden_layers, 2))
        return given

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
        """The vector of each text: sorted by length, packed up to `batch_tokens` tokens, never padded.

        Args:
            tokenizer: that of the folder, or of the repository, which the model was loaded from if None.
            others: see `bert_fast.models.embedding.encode`, which this is.

        Returns:
            (len(texts), E) float32 on the CPU, in the order of `texts`.

        Raises:
            ValueError, TypeError, ImportError: as `bert_fast.models.embedding.encode`; or there is no tokenizer.
        """
        from bert_fast.models.embedding import encode

        return encode(
            self,
            self._own_tokenizer() if tokenizer is None else tokenizer,
            texts,
            pooling=pooling,
            normalize=normalize,
            max_seqlen=max_seqlen,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
        )

    def _own_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            if self.source is None:
                raise ValueError("the model was not loaded by from_pretrained; give encode a tokenizer")
            from bert_fast.data.tokenizer import TOKENIZER_FILES, load_tokenizer

            name, revision = self.source
            found = [path for file in TOKENIZER_FILES if (path := find_file(name, file, revision=revision))]
            if not found:
                raise ValueError(f"{name} has no tokenizer ({', '.join(TOKENIZER_FILES)}); give encode one")
            self._tokenizer = load_tokenizer(found[0].parent)
        return self._tokenizer

    def _flag(self, name: str, **flags: Unpack[Flags]) -> bool:
        unknown = flags.keys() - Flags.__annotations__.keys()
        if unknown:
            raise TypeError(f"forward got an unexpected keyword: {', '.join(sorted(unknown))}")
        asked = flags.get(name)
        return bool(getattr(self.config, name) if asked is None else asked)


def restored(restore: Callable[[Tensor], Tensor], states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """`states` in the shape of the input; None where there are none."""
    return tuple(restore(state) for state in states) if states else None


def _first_and(label_rows: Tensor, tokens: Tokens) -> Tensor:
    """The rows of the sequences' first tokens, and then `label_rows`, checked."""
    T = tokens.token_type_ids.shape[0]
    if tokens.shape is not None or T == 0:
        raise ValueError("label_rows came with padded or empty input; expected packed tokens, with cu_seqlens")
    check_integer("label_rows", label_rows, (torch.int64,))
    check_shape("label_rows", label_rows, ("M",))
    check_same_device(tokens.cu_seqlens, label_rows=label_rows)
    check_range("label_rows", label_rows, T, "the number of tokens")
    return torch.cat([tokens.cu_seqlens[:-1].long().clamp(max=T - 1), label_rows])


class BertHeadModel(BertPreTrainedModel):
    """Base of the models with a head: the encoder is `bert`, and padding is gone before it runs."""

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
        **flags: Unpack[Flags],
    ) -> Encoded:
        """Remove the padding and run the encoder on the real tokens."""
        tokens = Tokens.of(
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
            _first_and(label_rows, tokens)  # once more inside, where padding is already gone
        inner = {"label_rows": label_rows, "rng_states": rng_states}
        output = self.bert(**tokens.arguments(), **inner, return_dict=True, **flags)
        states = {
            "hidden_states": restored(tokens.restore, output.hidden_states),
            "attentions": restored(tokens.restore_attentions, output.attentions),
        }
        return Encoded(tokens, output.last_hidden_state, output.pooler_output, states)
