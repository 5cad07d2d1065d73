"""The training loop: exact resume, accumulation, evaluation, signals, divergence, checkpoints for transformers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fast.models import BertForPreTraining
from bert_fast.optim.config import OptimizerOptions
from bert_fast.pretrain.config import ModelOptions, PretrainConfig
from bert_fast.pretrain.metrics import held_out_totals
from bert_fast.pretrain.micro_batches import Position
from bert_fast.pretrain.setup import open_data
from bert_fast.pretrain.trainer import PretrainResult, Trainer, pretrain
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import read_log
from bert_fast.runtime.ranks import TrainingDivergedError, stop_signals

EXACT = (
    "step",
    "kind",
    "epoch",
    "loss",
    "mlm_loss",
    "mlm_accuracy",
    "nsp_loss",
    "nsp_accuracy",
    "lr",
    "grad_norm",
    "tokens",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(make_config: Callable[..., PretrainConfig]) -> PretrainConfig:
    return make_config(steps=12, log_interval=2, eval_interval=6, checkpoint_interval=5)


def exact_lines(config: PretrainConfig) -> list[dict[str, Any]]:
    """The log without measured times."""
    lines = read_log(Path(config.output_dir) / "log.jsonl")
    return [{name: line[name] for name in EXACT if name in line} for line in lines]


def quiet(_: str) -> None:
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Call `act()` in the middle of the optimizer step after `step`."""
    original = Trainer._update

    def update(self: Trainer, *arguments: Any) -> Any:
        if self.step == step:
            act()
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "_update", update)


class CrashError(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation": 3},
        {"optimizer": OptimizerOptions(name="lamb", lr=1e-2)},
        {"precision": "bf16"},
    ],
    ids=["plain", "accumulation", "lamb", "bf16"],
)
def test_a_crash_and_a_resume_give_the_losses_of_an_uninterrupted_run(
    config: PretrainConfig, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, **changes)
    uninterrupted = replace(config, output_dir=str(tmp_path / "uninterrupted"))
    expected = pretrain(uninterrupted, quiet)

    def crash() -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        stop_after(patch, 8, crash)
        with pytest.raises(CrashError):
            pretrain(config, quiet)
    assert [line["step"] for line in exact_lines(config)][-1] == 8
    resumed = pretrain(config, quiet)  # from step 5, in the middle of a log interval
    assert exact_lines(config) == exact_lines(uninterrupted)
    assert resumed.metrics == expected.metrics
    assert resumed.tokens == expected.tokens
    a, b = (BertForPreTraining.from_pretrained(result.model_dir).state_dict() for result in (resumed, expected))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(config: PretrainConfig) -> None:
    """Micro-batches have unequal numbers of masked tokens and pairs; every token and every pair has the same weight."""
    no_dropout = replace(config.model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    unclipped = replace(config.optimizer, max_grad_norm=0.0)
    trainer = Trainer(replace(config, model=no_dropout, accumulation=3, optimizer=unclipped), quiet)
    batches = [trainer.data.train.batch(0, index) for index in range(3)]
    assert len({int((batch.labels != -100).sum()) for batch in batches}) > 1
    gradients: dict[str, torch.Tensor] = {}
    step = trainer.optimizer.step

    def keep(*arguments: Any) -> Any:
        gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        return step(*arguments)

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    reference = BertForPreTraining.from_pretrained(save(trainer.model, config)).double().train()
    trainer.train_step()

    weights = [(batch.labels != -100).sum() for batch in batches], [len(batch.next_sentence_label) for batch in batches]
    for batch, masked, pairs in zip(batches, *weights, strict=True):
        out = reference(**vars(batch))
        (out.mlm_loss * masked / sum(weights[0]) + out.next_sentence_loss * pairs / sum(weights[1])).backward()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        # float32 gradients of up to 0.3, of which an eps is 3e-8; some are zero but for rounding.
        assert torch.allclose(gradients[name].double(), parameter.grad, rtol=1e-3, atol=1e-6), name


def save(model: BertForPreTraining, config: PretrainConfig) -> str:
    folder = Path(config.output_dir) / "saved"
    model.save_pretrained(folder)
    return str(folder)


def test_evaluation_does_not_depend_on_the_batch_size(config: PretrainConfig) -> None:
    trainer = Trainer(config, quiet)
    small = trainer.evaluate()
    data = open_data(replace(config.data, token_budget=1024), config.seed)
    large = held_out_totals(trainer.model, data.held_out_batches(), trainer.device, "fp32").summary()
    assert trainer.model.training
    # float32 sums in batches of other sizes: the error is 3e-8, a quarter of an eps.
    assert small == pytest.approx(large, rel=1e-5)


def test_training_lowers_the_loss(config: PretrainConfig) -> None:
    result = pretrain(
        replace(
            config, steps=120, eval_interval=40, checkpoint_interval=0, optimizer=replace(config.optimizer, lr=3e-3)
        ),
        quiet,
    )
    lines = exact_lines(config)
    train = [line["loss"] for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "eval"]
    assert sum(train[-5:]) / 5 < train[0] - 0.5
    assert [line["step"] for line in held_out] == [40, 80, 120]
    assert {name: held_out[-1][name] for name in result.metrics} == result.metrics
    assert result.metrics["mlm_loss"] < held_out[0]["mlm_loss"]
    assert result.interrupted is None
    assert result.step == result.total_steps == 120


def test_epochs_set_the_length_and_follow_each_other(config: PretrainConfig) -> None:
    data = open_data(config.data, config.seed)
    trainer = Trainer(replace(config, steps=None, epochs=2), quiet)
    assert trainer.total_steps == data.train.num_batches(0) + data.train.num_batches(1)
    last = trainer.feed.step(Position(0, data.train.num_batches(0) - 1))
    first = trainer.feed.step(last.end)
    for batches, (epoch, index) in ((last, (0, data.train.num_batches(0) - 1)), (first, (1, 0))):
        assert torch.equal(batches.micro[0].batch.input_ids, data.train.batch(epoch, index).input_ids)
    assert first.end == (1, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_run_with_a_checkpoint_after_the_step(
    config: PretrainConfig, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_after(patch, 6, lambda: os.kill(os.getpid(), number))
        result = pretrain(config, quiet)
    assert signal.getsignal(number) is handler
    assert (result.interrupted, result.step) == (number, 7)
    assert Path(result.model_dir).name == "step-00000007"
    uninterrupted = replace(config, output_dir=str(tmp_path / "uninterrupted"))
    pretrain(uninterrupted, quiet)
    pretrain(config, quiet)
    assert exact_lines(config) == exact_lines(uninterrupted)


def test_under_torchrun_a_repeated_signal_is_ignored() -> None:
    """The process group gets it, and torchrun sends it again: it must not interrupt the checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals(repeated=True) as received_signal:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received_signal() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(config: PretrainConfig) -> None:
    trainer = Trainer(config, quiet)
    with torch.no_grad():
        trainer.model.base_model.encoder.layer[0].attention.self.qkv.bias.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"the loss is nan at step 1; lower optimizer\.lr"):
        trainer.run()
    assert checkpoint.list_checkpoints(trainer.checkpoints) == []


def test_checkpoints_are_pruned_and_a_corrupt_one_is_skipped_with_a_message(
    config: PretrainConfig, tmp_path: Path
) -> None:
    config = replace(config, keep_last=2)
    first = pretrain(config, quiet)
    folder = Path(config.output_dir) / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-00000010", "step-00000012"]
    weights = folder / "step-00000012" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    messages: list[str] = []
    resumed = pretrain(config, messages.append)
    assert any("step-00000012/model.safetensors is corrupt: sha256" in text for text in messages)
    assert any("step-00000010 at step 10 of 12" in text for text in messages)
    assert resumed.metrics == first.metrics
    checkpoint.verify_folder(folder / "step-00000012")


def test_the_best_checkpoint_is_kept_too(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 1.5, 2.0, 4.0, 0.5])
    other_metrics = {"mlm_loss": 1.0, "mlm_accuracy": 0.5, "nsp_accuracy": 0.5}
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"loss": next(losses), **other_metrics})
    config = replace(config, eval_interval=2, checkpoint_interval=5, keep_last=1)
    pretrain(config, quiet)
    folder = Path(config.output_dir) / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-00000004", "step-00000012"]
    assert checkpoint.load_trainer_state(folder / "step-00000012")["best"] == {"step": 4, "loss": 1.0}
    pretrain(replace(config, steps=14), quiet)
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-00000014"]


def test_resuming_with_never_other_settings_or_other_data_raises(
    config: PretrainConfig, prepared: Path, text_file: Path, tmp_path: Path
) -> None:
    pretrain(replace(config, steps=2), quiet)
    with pytest.raises(ValueError, match="has checkpoints and resume is never"):
        pretrain(replace(config, steps=2, resume="never"), quiet)
    with pytest.raises(ValueError, match="seed 0 -> 5"):
        pretrain(replace(config, steps=2, seed=5), quiet)
    with pytest.raises(FileNotFoundError, match="resume is 'nowhere'"):
        pretrain(replace(config, resume="nowhere"), quiet)
    from bert_fast.data import PrepareConfig, prepare

    other = tmp_path / "other"
    prepare(PrepareConfig(str(other), [str(text_file)], vocab_size=120, heldout_fraction=0.3, progress=False))
    with pytest.raises(ValueError, match="is not the data that"):
        pretrain(replace(config, data=replace(config.data, folder=str(other))), quiet)


def test_configs_that_do_not_fit_the_model_or_machine_raise(config: PretrainConfig, tmp_path: Path) -> None:
    long = replace(config.data, seq_len=100)
    with pytest.raises(ValueError, match="seq_len is 100 and the model has 64 positions"):
        pretrain(replace(config, data=long), quiet)
    with pytest.raises(ValueError, match="device is 'cuda:99'"):
        pretrain(replace(config, device="cuda:99"), quiet)
    with pytest.raises(FileNotFoundError, match=r"data\.folder is .*absent, which is not a folder"):
        pretrain(replace(config, data=replace(config.data, folder=str(tmp_path / "absent"))), quiet)


def test_init_from_starts_a_new_run_and_requires_the_same_vocabulary(
    config: PretrainConfig, text_file: Path, tmp_path: Path
) -> None:
    result: PretrainResult = pretrain(config, quiet)
    model = ModelOptions(init_from=result.model_dir)
    trainer = Trainer(replace(config, output_dir=str(tmp_path / "second"), model=model), quiet)
    assert trainer.step == 0
    assert trainer.evaluate() == result.metrics
    from bert_fast.data import PrepareConfig, prepare

    folder = tmp_path / "other"
    prepare(PrepareConfig(str(folder), [str(text_file)], vocab_size=90, heldout_fraction=0.2, progress=False))
    third = replace(config, data=replace(config.data, folder=str(folder)), output_dir=str(tmp_path / "third"))
    with pytest.raises(ValueError, match=r"has another vocabulary than the data .*: \d+ tokens differ, such as"):
        Trainer(replace(third, model=model), quiet)


def test_init_from_a_padded_vocabulary(config: PretrainConfig, text_file: Path, tmp_path: Path) -> None:
    """A checkpoint with more rows than its tokenizer has tokens (30528 and 30522): prepare, pretrain, fill masks."""
    from transformers import AutoTokenizer

    from bert_fast.data import PrepareConfig, copy_tokenizer, load_tokenizer, prepare
    from bert_fast.models import BertConfig, BertForMaskedLM
    from bert_fast.tasks.fill_mask import fill_mask

    tokens = load_tokenizer(config.data.folder).get_vocab_size()
    settings = BertConfig.from_pretrained(Path(config.model.config).parent, vocab_size=tokens + 6)
    model = BertForPreTraining(settings)
    padded, data = tmp_path / "padded", str(tmp_path / "data")
    model.cls.predictions.bias.data[tokens:] = 50.0  # the rows without a token are the most likely ones
    model.save_pretrained(padded)
    copy_tokenizer(config.data.folder, padded)
    prepare(
        PrepareConfig(data, [str(text_file)], vocab=str(padded), heldout_fraction=0.3, min_characters=1, progress=False)
    )
    options = replace(config.data, folder=data)
    config = replace(config, data=options, steps=2)
    result = pretrain(replace(config, model=ModelOptions(init_from=str(padded))), quiet)
    trained = BertForMaskedLM.from_pretrained(result.model_dir).eval()
    assert trained.config.vocab_size == tokens + 6
    tokenizer = load_tokenizer(result.model_dir)
    candidates = fill_mask(trained, tokenizer, "the [MASK]", top_k=tokens)[0]
    assert {candidate.token for candidate in candidates} == set(tokenizer.get_vocab())
    theirs = AutoTokenizer.from_pretrained(result.model_dir)
    assert theirs.model_max_length == settings.max_position_embeddings
    assert theirs("the cat")["input_ids"] == tokenizer.encode("the cat").ids
    fewer = BertForPreTraining(settings.replace(vocab_size=tokens - 1))
    fewer.save_pretrained(tmp_path / "fewer")
    expected = rf"has {tokens - 1} word embeddings and the data a vocabulary of {tokens} tokens"
    fourth = replace(config, output_dir=str(tmp_path / "fourth"))
    with pytest.raises(ValueError, match=expected):
        Trainer(replace(fourth, model=ModelOptions(init_from=str(tmp_path / "fewer"))), quiet)


def test_without_sentence_pairs_the_loss_is_that_of_masked_tokens(config: PretrainConfig) -> None:
    result = pretrain(replace(config, steps=3, data=replace(config.data, next_sentence=False)), quiet)
    assert result.metrics["loss"] == result.metrics["mlm_loss"]
    assert result.metrics["nsp_accuracy"] != result.metrics["nsp_accuracy"]  # NaN: there are no pairs


def test_transformers_loads_every_checkpoint_with_the_same_logits(config: PretrainConfig) -> None:
    import transformers

    result = pretrain(config, quiet)
    batch = open_data(config.data, config.seed).held_out.batch(0, 0)
    first = batch.input_ids[: int(batch.cu_seqlens[1])][None]
    last = checkpoint.list_checkpoints(Path(config.output_dir) / "checkpoints")[-1]
    for folder in (result.model_dir, last):
        ours = BertForPreTraining.from_pretrained(folder)
        theirs = transformers.BertForPreTraining.from_pretrained(folder).eval()
        with torch.no_grad():
            a, b = ours(first), theirs(first)
        # float32 in another order through two layers: the error is 1.2e-7, two eps of logits of up to 0.5.
        assert torch.allclose(a.prediction_logits, b.prediction_logits, atol=1e-5)
        assert torch.allclose(a.seq_relationship_logits, b.seq_relationship_logits, atol=1e-5)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("the small bird")["input_ids"][0] == tokenizer.cls_token_id


def test_a_unigram_bias_starts_at_the_unigram_loss(config: PretrainConfig) -> None:
    trainer = Trainer(replace(config, model=replace(config.model, unigram_bias=True)), quiet)
    # Weights of 0.02 on 32 values of size 1 give the logits a variance of 0.013, which adds half of it to the loss.
    assert trainer.evaluate()["mlm_loss"] == pytest.approx(trainer.data.unigram_loss(), abs=0.05)


def test_the_unigram_loss_is_below_the_uniform_one(config: PretrainConfig) -> None:
    data = open_data(config.data, config.seed)
    loss = data.unigram_loss()
    assert 1.0 < loss < torch.tensor(120.0).log().item()
