"""The configuration of a pretraining run: typed dataclasses, checked once. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bert_fast._config import check, check_finite, check_fraction, convert_fields, differences
from bert_fast.optim.config import OptimizerOptions

SETTINGS = "pretrain.json"  # in output_dir: the run's PretrainConfig
RECORDS = "diverged"  # in output_dir: the records of steps that diverged


@dataclass(frozen=True)
class ModelOptions:
    """The model to train. Its vocabulary size comes from the prepared data.

    Args:
        size: architecture by name; ignored if config or init_from is given.
        config: a Hugging Face config.json, or a folder with one, in place of size.
        init_from: a checkpoint folder to initialize the weights from (a new run, unlike resume).
        hidden_dropout_prob: overrides the model configuration's.
        attention_probs_dropout_prob: overrides the model configuration's.
        unigram_bias: initialize the bias of the predicted tokens to the logarithm of their frequencies in the training
            split, so that a new model starts at the unigram loss instead of log V. It saves a short run the hundreds of
            steps in which it would learn nothing else.
    """

    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = "mini"
    config: str | None = None
    init_from: str | None = None
    hidden_dropout_prob: float | None = None
    attention_probs_dropout_prob: float | None = None
    unigram_bias: bool = False

    def __post_init__(self) -> None:
        convert_fields(self)
        check_finite(self)
        check_fraction("hidden_dropout_prob", self.hidden_dropout_prob)
        check_fraction("attention_probs_dropout_prob", self.attention_probs_dropout_prob)
        check(
            self.config is None or self.init_from is None,
            "model.config and model.init_from are both given; a checkpoint has its own config: give one of them",
        )
        check(
            not (self.unigram_bias and self.init_from),
            "model.unigram_bias and model.init_from are both given; a checkpoint has its own bias: give one of them",
        )


@dataclass(frozen=True)
class DataOptions:
    """The training data and how examples are made from it.

    Args:
        folder: the output of `bert-fast prepare`.
        seq_len: maximum tokens of an example, including [CLS] and [SEP].
        token_budget: maximum tokens of a packed micro-batch, which has no padding.
        short_seq_prob: probability that an example has a random shorter target length.
        next_sentence: whether examples are sentence pairs for next-sentence prediction, or single texts.
        whole_words: whether to mask all pieces of a word together.
        max_span: maximum words of a masked span, 1 for no spans; SpanBERT uses 10. Lengths are geometric.
        span_p: probability that a span ends after each word; SpanBERT uses 0.2.
        mask_prob: fraction of the tokens to predict.
        mask_token_prob: fraction of those that are replaced by [MASK].
        random_token_prob: fraction of those that are replaced by a random token; the rest is unchanged.
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
        convert_fields(self)
        check_finite(self)
        check(bool(self.folder), "data.folder is empty; expected the folder that `bert-fast prepare` wrote")
        check(self.seq_len >= 5, f"seq_len is {self.seq_len}; expected 5 or more: [CLS] A [SEP] B [SEP]")
        check(
            self.token_budget >= self.seq_len,
            f"token_budget is {self.token_budget}, below seq_len = {self.seq_len}; a batch must hold an example",
        )
        check(0.0 < self.mask_prob <= 1.0, f"mask_prob is {self.mask_prob}; expected more than 0, at most 1")
        for name in ("short_seq_prob", "mask_token_prob", "random_token_prob"):
            check(0.0 <= getattr(self, name) <= 1.0, f"{name} is {getattr(self, name)}; expected 0 to 1")
        check(1 <= self.max_span <= 1000, f"max_span is {self.max_span}; expected 1 to 1000 words")
        check(0.0 < self.span_p < 1.0, f"span_p is {self.span_p}; expected more than 0 and less than 1")
        both = self.mask_token_prob + self.random_token_prob
        check(both <= 1.0 + 1e-9, f"mask_token_prob + random_token_prob is {both}; expected at most 1")


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run.

    Args:
        output_dir: folder for checkpoints, logs and the final model.
        data: the training data.
        model: the model to train.
        optimizer: the optimizer.
        steps: optimizer steps; give this or epochs.
        epochs: passes over the training split; give this or steps.
        accumulation: micro-batches of data.token_budget tokens per step, over all ranks: a step is the same on any
            number of ranks, and each of N ranks computes accumulation / N of them. Every masked token and every
            sequence pair of a step has the same weight, whichever micro-batch and rank it is in.
        precision: fp32, or bf16 autocast with fp32 weights.
        device: auto is CUDA if available, else the CPU; under torchrun each rank takes its own CUDA device.
        parallel: ddp replicates the model on every rank, fsdp shards parameters, gradients and optimizer states (adamw
            only).
        gradient_communication: the dtype in which gradients are reduced over the ranks.
        timeout: seconds without an answer from a rank after which the run ends.
        seed: of the weights, the dropout and the examples.
        log_interval: steps between two lines of the log.
        eval_interval: steps between two evaluations on the held-out split; 0 evaluates only at the end.
        eval_batches: maximum batches per evaluation; 0 uses the whole held-out split.
        checkpoint_interval: steps between two checkpoints; 0 writes only the last.
        keep_last: number of checkpoints to keep; 0 keeps all.
        keep_best: keep the checkpoint with the lowest held-out loss too; an evaluation with a new lowest loss writes a
            checkpoint. Has no effect if checkpoint_interval is 0.
        on_divergence: what to do if the loss or the gradient norm is not finite, or the loss explodes: stop ends the
            run, skip skips that update. Either way the batch and the weights are saved in output_dir/diverged.
        explosion: a loss above this many times its running mean explodes; 0 for no limit.
        max_skips: consecutive skipped updates after which skip ends the run too.
        resume: auto resumes from the newest valid checkpoint in output_dir if there is one, never raises an error if
            there is one, and a path names the checkpoint to resume from; checkpoints of output_dir that are later than
            it are moved to output_dir/checkpoints/abandoned-N first. Given again, the command with that path goes on.
        tensorboard: write TensorBoard events in addition to the JSONL log.
        wandb: the Weights & Biases project to log to as well; the package's own settings apply (WANDB_MODE=offline).
        trace: profile this many steps, after the first ten, into trace.json in output_dir, for chrome://tracing or
            Perfetto; 0 disables it.
        progress: show a progress bar.
        recompute: activation checkpointing: save only each layer's input for the backward pass and recompute the rest:
            less memory, a third more work.
        masked_last_layer: compute the part of the last layer after its attention only at the masked and the first
            tokens, where a loss is. Loss and gradient stay the same, except that other dropout is drawn there.
        static_shapes: pad every micro-batch to data.token_budget tokens, so that all have one shape.
        cuda_graph: capture a step (forward, backward, clipping, update) as a CUDA graph and replay it: the same bits,
            with one launch per step. Needs static_shapes, one rank, a CUDA device, and kernels verified there.
        ceiling: measure the throughput of matrix products at the start, to log the fraction of it that the model
            reaches (MFU).
        prefetch: steps whose batches a thread prepares ahead; 0 prepares each when it is needed.
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
        convert_fields(self)
        check_finite(self)
        check(bool(self.output_dir), "output_dir is empty; expected a folder")
        if (self.steps is None) == (self.epochs is None):
            which = "neither" if self.steps is None else "both"
            raise ValueError(f"{which} of steps and epochs given; expected one of them: it sets the length of the run")
        for name, least in {
            "steps": 1, "epochs": 1, "accumulation": 1, "log_interval": 1, "seed": 0,
            "eval_interval": 0, "eval_batches": 0, "checkpoint_interval": 0, "keep_last": 0,
            "max_skips": 1, "prefetch": 0, "trace": 0,
        }.items():  # fmt: skip
            value = getattr(self, name)
            check(value is None or value >= least, f"{name} is {value}; expected at least {least}")
        check(
            self.explosion == 0 or self.explosion > 1,
            f"explosion is {self.explosion}; expected more than 1 times the running mean, or 0 for no limit",
        )
        check(self.seed < 2**63, f"seed is {self.seed}; expected at most 2**63 - 1")
        check(0 < self.timeout <= 1e9, f"timeout is {self.timeout}; expected seconds, more than 0 and at most 1e9")
        check(
            self.parallel == "ddp" or self.optimizer.name == "adamw",
            "parallel is fsdp and optimizer.name is lamb, whose trust ratios need whole tensors; choose adamw, or ddp",
        )
        check(
            self.static_shapes or not self.cuda_graph,
            "cuda_graph is on and static_shapes off; a graph needs batches of one shape: set static_shapes to true",
        )
        check(
            self.parallel == "ddp" or not self.cuda_graph,
            "cuda_graph is on and parallel is fsdp, whose collectives can't be captured; choose one of them",
        )
        if self.steps is not None:
            self.warmup(self.steps)

    def warmup(self, total_steps: int) -> int:
        """The warm-up in steps of a run of `total_steps`; ValueError if it would not end before the run."""
        warmup = self.optimizer.warmup_steps
        steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
        check(
            steps < total_steps or total_steps == 1,
            f"warmup_steps is {steps} of {total_steps} steps; expected fewer than all of them",
        )
        return min(steps, total_steps - 1)


# Settings with which a resumed run would not be the same run.
_FIXED = ("data.", "model.", "optimizer.name", "accumulation", "precision", "seed")
_FREE_DATA = ("data.folder",)  # may move; its fingerprint is compared instead
_OF_A_CALL = ("output_dir", "resume", "progress", "data.folder")  # say nothing of the run


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted name: (before, now)} of the settings of the run that changed since the checkpoint was written.

    Raises:
        ValueError: a setting changed that must not change within a run.
    """
    changed = differences(before, now)
    fixed = {name: pair for name, pair in changed.items() if name.startswith(_FIXED) and name not in _FREE_DATA}
    if fixed:
        raise ValueError(
            f"the checkpoint in output_dir belongs to another run ({listed(fixed)}); restore these settings, choose "
            "another output_dir, or start a new run from its weights with model.init_from"
        )
    return {name: pair for name, pair in changed.items() if name not in _OF_A_CALL}


def listed(changed: dict[str, tuple[Any, Any]]) -> str:
    """The settings that changed, for a message."""
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
