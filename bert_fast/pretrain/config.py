"""What a pretraining run is told: typed dataclasses, checked once, without importing torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

SIZES = ("tiny", "mini", "small", "medium", "base", "large")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_choices(options: Any) -> None:
    """ValueError where a Literal field of the dataclass `options` has another value."""
    for name, hint in get_type_hints(type(options)).items():
        choices = get_args(hint)
        value = getattr(options, name)
        if getattr(hint, "__origin__", None) is Literal and value not in choices:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")


def _check_fraction(name: str, value: float | None) -> None:
    _check(value is None or 0.0 <= value < 1.0, f"{name} is {value}; expected 0 <= {name} < 1")


@dataclass(frozen=True)
class ModelOptions:
    """Which model is trained. The vocabulary's size comes from the prepared data.

    Args:
        size: architecture by name; ignored where config or init_from is given.
        config: a Hugging Face config.json, or a folder with one, in place of size.
        init_from: a checkpoint folder to start the weights from (a new run, unlike resume).
        hidden_dropout_prob: in place of the configuration's.
        attention_probs_dropout_prob: in place of the configuration's.
        unigram_bias: start the bias of the predicted tokens at the logarithm of their frequencies in the training
            split, so that a new model begins at the unigram loss and not at log V. It saves a short run the hundreds of
            steps in which it would learn nothing else.
    """

    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = "mini"
    config: str | None = None
    init_from: str | None = None
    hidden_dropout_prob: float | None = None
    attention_probs_dropout_prob: float | None = None
    unigram_bias: bool = False

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_fraction("hidden_dropout_prob", self.hidden_dropout_prob)
        _check_fraction("attention_probs_dropout_prob", self.attention_probs_dropout_prob)
        _check(
            self.config is None or self.init_from is None,
            "model.config and model.init_from are both given; a checkpoint brings its own config: give one of them",
        )
        _check(
            not (self.unigram_bias and self.init_from),
            "model.unigram_bias and model.init_from are both given; a checkpoint brings its own bias: give one of them",
        )


@dataclass(frozen=True)
class OptimizerOptions:
    """How the weights are updated.

    Args:
        name: adamw, or lamb for large batches.
        lr: learning rate at the end of the warm-up.
        warmup_steps: steps over which lr rises linearly from 0; below 1, a fraction of all steps.
        decay: linear falls to 0 at the last step; none stays.
        weight_decay: decoupled; biases and LayerNorm weights have none.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        max_grad_norm: clip the global gradient norm to this; 0 does not clip.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = 1e-4
    warmup_steps: float = 0.06
    decay: Literal["linear", "none"] = "linear"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(self.lr > 0 and math.isfinite(self.lr), f"lr is {self.lr}; expected a positive number")
        _check(
            self.warmup_steps >= 0 and (self.warmup_steps < 1 or float(self.warmup_steps).is_integer()),
            f"warmup_steps is {self.warmup_steps}; expected whole steps, or a fraction below 1 of all steps",
        )
        _check(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; expected 0 or more")
        _check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas are {self.betas}; expected two numbers from 0 up to 1",
        )
        _check(self.eps > 0, f"eps is {self.eps}; expected a positive number")
        _check(self.max_grad_norm >= 0, f"max_grad_norm is {self.max_grad_norm}; expected 0 (no clipping) or more")


@dataclass(frozen=True)
class DataOptions:
    """Where the examples come from and how they are made.

    Args:
        folder: what `bert-fast prepare` wrote.
        seq_len: most tokens of an example, [CLS] and [SEP] among them.
        token_budget: most tokens of a packed micro-batch; there is no padding in it.
        short_seq_prob: how often an example aims at a random shorter length.
        next_sentence: whether examples are sentence pairs for next-sentence prediction, or one text each.
        whole_words: whether all pieces of a word are masked together.
        max_span: the most words of a masked span, 1 for no spans; SpanBERT has 10. Lengths are geometric.
        span_p: how likely a span ends after each word; SpanBERT has 0.2.
        mask_prob: share of the tokens to predict.
        mask_token_prob: share of those that become [MASK].
        random_token_prob: share of those that become a random token; the rest stays as it is.
    """

    folder: str
    seq_len: int = 128
    token_budget: int = 4096
    short_seq_prob: float = 0.1
    next_sentence: bool = True
    whole_words: bool = True
    max_span: int = 1
    span_p: float = 0.2
    mask_prob: float = 0.15
    mask_token_prob: float = 0.8
    random_token_prob: float = 0.1

    def __post_init__(self) -> None:
        _check(bool(self.folder), "data.folder is empty; expected the folder that `bert-fast prepare` wrote")
        _check(self.seq_len >= 5, f"seq_len is {self.seq_len}; expected 5 or more: [CLS] A [SEP] B [SEP]")
        _check(
            self.token_budget >= self.seq_len,
            f"token_budget is {self.token_budget}, below seq_len = {self.seq_len}; a batch has to hold an example",
        )
        _check(0.0 < self.mask_prob <= 1.0, f"mask_prob is {self.mask_prob}; expected more than 0, to 1")
        for name in ("short_seq_prob", "mask_token_prob", "random_token_prob"):
            _check(0.0 <= getattr(self, name) <= 1.0, f"{name} is {getattr(self, name)}; expected 0 to 1")
        _check(1 <= self.max_span <= 1000, f"max_span is {self.max_span}; expected 1 to 1000 words")
        _check(0.0 < self.span_p < 1.0, f"span_p is {self.span_p}; expected more than 0 and less than 1")
        both = self.mask_token_prob + self.random_token_prob
        _check(both <= 1.0 + 1e-9, f"mask_token_prob + random_token_prob is {both}; expected at most 1")


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run.

    Args:
        output_dir: folder for checkpoints, logs and the final model.
        data: what is read.
        model: what is trained.
        optimizer: how it is trained.
        steps: optimizer steps; give this or epochs.
        epochs: passes over the training split; give this or steps.
        accumulation: micro-batches of data.token_budget tokens that make a step, on all ranks together: the step is the
            same whatever their number, and with N ranks each computes accumulation / N of them. Every masked token and
            every sequence pair of a step weighs the same, whichever micro-batch and rank it is in.
        precision: fp32, or bf16 autocast with fp32 weights.
        device: auto takes CUDA where there is one; under torchrun each rank its own.
        parallel: what several ranks share: ddp has the whole model on each, fsdp its parameters, gradients and
            optimizer states in shards (adamw only).
        gradient_communication: the dtype in which ranks exchange gradients.
        timeout: seconds after which a rank that does not answer ends the run.
        seed: of the weights, the dropout and the examples.
        log_interval: steps between two lines of the log.
        eval_interval: steps between two evaluations on the held-out split; 0 evaluates only at the end.
        eval_batches: at most so many batches an evaluation; 0 takes the whole held-out split.
        checkpoint_interval: steps between two checkpoints; 0 writes only the last.
        keep_last: checkpoints that are kept; 0 keeps all.
        keep_best: keep the checkpoint with the lowest held-out loss too; an evaluation that beats all before it writes
            one. Not where checkpoint_interval is 0.
        on_divergence: what follows where the loss or the gradient norm is not finite, or the loss explodes: stop ends
            the run, skip leaves that update out. Either way the batch and the weights are kept in output_dir/diverged.
        explosion: a loss above this many times its running mean explodes; 0 for no such limit.
        max_skips: updates left out in a row after which skip ends the run too.
        resume: auto goes on from the newest good checkpoint in output_dir, never refuses to, and a path names one.
        tensorboard: write TensorBoard events beside the JSONL log.
        wandb: the project of Weights & Biases to log to as well, with the package's own settings (WANDB_MODE=offline).
        trace: record so many steps, after the first ten, as trace.json in output_dir, for chrome://tracing or Perfetto;
            0 for none.
        progress: show a progress bar.
        recompute: keep only each layer's input for the backward pass and compute the rest again: less memory, a third
            more work.
        masked_last_layer: compute the last layer, behind its attention, only where a loss is: at the masked and the
            first tokens. The same loss and gradient; its dropout is another.
        static_shapes: fill every micro-batch up to data.token_budget tokens, so that all have one shape.
        cuda_graph: record a step (forward, backward, clipping, update) as a CUDA graph and replay it: the same bits,
            and the host starts a step by one call. Needs static_shapes, one rank, a CUDA device, and kernels that are
            verified there.
        ceiling: measure at the start how fast matrix products are, to log the share of it that the model's take (MFU).
        prefetch: steps whose batches a thread makes ahead; 0 makes each when it is needed.
    """

    output_dir: str
    data: DataOptions
    model: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    steps: int | None = None
    epochs: int | None = None
    accumulation: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    gradient_communication: Literal["fp32", "bf16"] = "fp32"
    timeout: float = 600.0
    seed: int = 0
    log_interval: int = 10
    eval_interval: int = 500
    eval_batches: int = 0
    checkpoint_interval: int = 500
    keep_last: int = 2
    keep_best: bool = True
    on_divergence: Literal["stop", "skip"] = "stop"
    explosion: float = 0.0
    max_skips: int = 10
    resume: str = "auto"
    tensorboard: bool = True
    wandb: str | None = None
    trace: int = 0
    progress: bool = True
    recompute: bool = False
    masked_last_layer: bool = True
    static_shapes: bool = False
    cuda_graph: bool = False
    ceiling: bool = True
    prefetch: int = 2

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(bool(self.output_dir), "output_dir is empty; expected a folder")
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise ValueError(f"{given} of steps and epochs given; expected one of them: it sets the length of the run")
        for name, least in {
            "steps": 1, "epochs": 1, "accumulation": 1, "log_interval": 1, "seed": 0,
            "eval_interval": 0, "eval_batches": 0, "checkpoint_interval": 0, "keep_last": 0,
            "max_skips": 1, "prefetch": 0, "trace": 0,
        }.items():  # fmt: skip
            value = getattr(self, name)
            _check(value is None or value >= least, f"{name} is {value}; expected at least {least}")
        _check(
            self.explosion == 0 or self.explosion > 1,
            f"explosion is {self.explosion}; expected more than 1 times the running mean, or 0 for no limit",
        )
        _check(self.timeout > 0, f"timeout is {self.timeout}; expected seconds, more than 0")
        _check(
            self.parallel == "ddp" or self.optimizer.name == "adamw",
            "parallel is fsdp and optimizer.name is lamb, whose trust ratios need whole tensors; choose adamw, or ddp",
        )
        _check(
            self.static_shapes or not self.cuda_graph,
            "cuda_graph is on and static_shapes off; a graph takes batches of one shape: set static_shapes to true",
        )
        _check(
            self.parallel == "ddp" or not self.cuda_graph,
            "cuda_graph is on and parallel is fsdp, whose exchange of shards is in no graph; choose one of them",
        )
        if self.steps is not None:
            self.warmup(self.steps)

    def warmup(self, total_steps: int) -> int:
        """The warm-up in whole steps, of a run of `total_steps`. ValueError where the warm-up would never end."""
        warmup = self.optimizer.warmup_steps
        steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
        _check(
            steps < total_steps or total_steps == 1,
            f"warmup_steps is {steps} of {total_steps} steps; expected fewer than all of them",
        )
        return min(steps, total_steps - 1)


def from_mapping(kind: type, values: Any) -> Any:
    """Build the dataclass `kind` from a mapping or namespace whose groups may be nested.

    Raises:
        ValueError: a name that the dataclass does not have.
    """
    values = dict(values) if isinstance(values, dict) else dict(vars(values))
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(f.name for f in fields(kind))}"
        )
    for name, value in values.items():
        if hasattr(hints[name], "__dataclass_fields__") and not isinstance(value, hints[name]):
            values[name] = from_mapping(hints[name], value)
        elif isinstance(value, list) and getattr(hints[name], "__origin__", None) is tuple:
            values[name] = tuple(value)
        elif value is not None and (inner := _dataclass_in(hints[name])) and not isinstance(value, inner):
            if getattr(hints[name], "__origin__", None) is dict:
                values[name] = {key: x if isinstance(x, inner) else from_mapping(inner, x) for key, x in value.items()}
            else:
                values[name] = from_mapping(inner, value)
    return kind(**values)


def _dataclass_in(hint: Any) -> Any:
    """The dataclass of `dict[str, X]` or `X | None`; None where there is none."""
    return next((kind for kind in get_args(hint) if hasattr(kind, "__dataclass_fields__")), None)


# A resumed run with another value of one of these would not continue the same run.
_FIXED = ("data.", "model.", "optimizer.name", "accumulation", "precision", "seed")
_FREE_DATA = ("data.folder",)  # may have moved; its fingerprint is compared instead


def differences(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted name: (before, now)} of the values in which two nested mappings differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            found.update(differences(old, new, f"{prefix}{name}."))
        elif old != new:
            found[prefix + name] = (old, new)
    return found


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What changed since the checkpoint was written, among the settings that may change.

    Raises:
        ValueError: a setting changed with which this would be another run.
    """
    changed = differences(before, now)
    wrong = {name: pair for name, pair in changed.items() if name.startswith(_FIXED) and name not in _FREE_DATA}
    if wrong:
        listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in wrong.items())
        raise ValueError(
            f"the checkpoint in output_dir belongs to another run ({listed}); restore these settings, choose another "
            "output_dir, or start a new run from its weights with model.init_from"
        )
    return changed
