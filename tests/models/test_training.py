"""Training: dropout, gradient checkpointing, autocast, compilation, and what the heads compute in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bert_fast import BertConfig, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel
from bert_fast.models.encoder import draw_rng_states
from bert_fast.models.pretraining import BertLMPredictionHead

CONFIG = BertConfig.size("tiny", vocab_size=50, max_position_embeddings=40)
WITHOUT_DROPOUT = CONFIG.replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def batch() -> dict[str, Any]:
    ids = torch.randint(1, 50, (30,), generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": ids,
        "cu_seqlens": torch.tensor([0, 17, 18, 30], dtype=torch.int32),
        "max_seqlen": 17,
        "labels": torch.where(torch.arange(30) % 4 == 0, ids, -100),
        "next_sentence_label": torch.tensor([0, 1, 1]),
    }


def step(model: nn.Module, seed: int = 0, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**{**batch(), **inputs}).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_seed_determines_the_dropout() -> None:
    model = BertForPreTraining(CONFIG).train()
    loss, gradients = step(model)
    again, same = step(model)
    other, _ = step(model, seed=1)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert not torch.equal(loss, other)


def test_rng_states_determine_the_dropout() -> None:
    model = BertForPreTraining(CONFIG).train()
    torch.manual_seed(7)
    states = draw_rng_states(CONFIG, torch.device("cpu"))
    assert states is not None
    drawn, gradients = step(model, seed=7)
    passed, same = step(model, seed=8, rng_states=states)
    assert torch.equal(passed, drawn)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    other, _ = step(model, seed=7, rng_states=states + 1)
    assert not torch.equal(other, drawn)
    with pytest.raises(ValueError, match="rng_states"):
        step(model, rng_states=states[:-1])
    model.eval()
    assert torch.equal(step(model, rng_states=states)[0], step(model)[0])


def test_every_place_of_dropout_has_its_own_mask() -> None:
    """With one draw of the generator for all places, one would repeat another's mask."""
    model = BertModel(CONFIG.replace(hidden_dropout_prob=0.5)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(("word_embeddings.weight", "LayerNorm.bias")) else 0.0)
    states = model(
        **{key: batch()[key] for key in ("input_ids", "cu_seqlens", "max_seqlen")}, output_hidden_states=True
    )
    dropped = [state == 0 for state in states.hidden_states[:1]]
    assert 0.4 < dropped[0].float().mean().item() < 0.6
    rows = draw_rng_states(CONFIG, torch.device("cpu"))
    assert rows is not None
    assert rows.shape == (7, 2)
    assert len(set(map(tuple, rows.tolist()))) == 7


def test_dropout_is_off_in_eval_and_draws_nothing_where_there_is_none() -> None:
    model = BertForPreTraining(CONFIG).eval()
    assert torch.equal(step(model)[0], step(model, seed=1)[0])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    BertForPreTraining(WITHOUT_DROPOUT).requires_grad_(False)
    torch.set_rng_state(before)
    still = BertModel(WITHOUT_DROPOUT)
    torch.set_rng_state(before)
    still.train()(torch.zeros(1, 3, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_checkpointing_changes_nothing_dropout_included() -> None:
    model = BertForPreTraining(CONFIG).train()
    loss, gradients = step(model)
    model.gradient_checkpointing_enable()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    handle = model.bert.encoder.layer[0].register_forward_pre_hook(count)
    checkpointed, same = step(model)
    handle.remove()
    assert runs == 2  # forward, and again in the backward pass
    assert torch.equal(loss, checkpointed)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    model.gradient_checkpointing_disable()
    assert torch.equal(step(model)[0], loss)


@pytest.mark.parametrize("model_class", [BertForPreTraining, BertForMaskedLM])
def test_in_training_the_heads_compute_only_the_loss(model_class: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_class(WITHOUT_DROPOUT)
    inputs = batch()
    if model_class is BertForMaskedLM:
        del inputs["next_sentence_label"]
    logits = "prediction_logits" if model_class is BertForPreTraining else "logits"
    with monkeypatch.context() as patch:
        patch.setattr(BertLMPredictionHead, "forward", None)  # which computes the logits
        trained = model.train()(**inputs)
    assert logits not in trained
    requested = model(**inputs, output_logits=True)
    evaluated = model.eval()(**inputs)
    assert torch.equal(requested[logits], evaluated[logits])
    assert requested[logits].shape == (30, 50)
    assert torch.equal(trained.loss, evaluated.loss)
    assert trained.loss.requires_grad
    labels = inputs["labels"]
    masked = labels != -100
    assert int(evaluated.mlm_count) == int(masked.sum()) == 8
    assert int(evaluated.mlm_correct) == int((evaluated[logits][masked].argmax(1) == labels[masked]).sum())
    assert model.train()(**{**inputs, "labels": None})[logits].shape == (30, 50)


def test_pretraining_needs_both_labels_for_its_loss_and_names_the_parts() -> None:
    model = BertForPreTraining(WITHOUT_DROPOUT).eval()
    both = model(**batch())
    assert torch.equal(both.loss, both.mlm_loss + both.next_sentence_loss)
    words = model(**{**batch(), "next_sentence_label": None})
    assert words.loss is None
    assert torch.equal(words.mlm_loss, both.mlm_loss)
    assert words.next_sentence_loss is None
    sentences = model(**{**batch(), "labels": None})
    assert sentences.loss is None
    assert torch.equal(sentences.next_sentence_loss, both.next_sentence_loss)


def test_the_padding_row_gets_no_gradient() -> None:
    model = BertModel(CONFIG).eval()
    assert not model.embeddings.word_embeddings.weight[0].any()
    model(torch.tensor([[0, 3, 0, 4]])).last_hidden_state[0, :, 0].sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert not gradient[0].any()
    assert gradient[3].any()


def test_initial_weights() -> None:
    model = BertForPreTraining(BertConfig.size("tiny", vocab_size=2000))
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 1000:
            assert abs(parameter.std().item() - 0.02) < 0.001, name
            assert abs(parameter.mean().item()) < 0.001, name
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_bfloat16_autocast_is_close_to_fp32_and_has_fp32_gradients() -> None:
    model = BertForPreTraining(WITHOUT_DROPOUT).train()
    loss, gradients = step(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, rounded_gradients = step(model)
        hidden = model.bert(batch()["input_ids"].unsqueeze(0)).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    # bfloat16 is off by half an eps, 0.004, in either direction; in the loss, a mean over 8 words, 1e-4 is left.
    torch.testing.assert_close(rounded.float(), loss, rtol=0.01, atol=0.0)
    for name, gradient in gradients.items():
        assert rounded_gradients[name].dtype == torch.float32, name
        if gradient.norm() > 1e-3:
            cosine = torch.cosine_similarity(gradient.flatten(), rounded_gradients[name].flatten(), dim=0)
            # Random errors of one bfloat16 eps (0.008) leave 1 - 3e-5; 0.99 is an error of 14%.
            assert cosine.item() > 0.99, name


def test_a_step_of_sgd_lowers_the_loss() -> None:
    model = BertForPreTraining(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = step(model)[0].item()
    for seed in range(30):
        step(model, seed)
        optimizer.step()
    assert step(model.eval())[0].item() < first - 1.5


def test_classifier_dropout() -> None:
    model = BertForSequenceClassification(CONFIG.replace(classifier_dropout=0.75))
    theirs = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=9, hidden_size=12, num_hidden_layers=1, classifier_dropout=0.75)
    )
    assert model.dropout.p == theirs.dropout.p == 0.75
    assert BertForSequenceClassification(CONFIG).dropout.p == 0.1


ONE_LAYER = WITHOUT_DROPOUT.replace(num_hidden_layers=1)


@pytest.mark.parametrize("form", ["packed", "padded", "masked"])
def test_compiles_without_a_graph_break(form: str, compile_backend: str) -> None:
    model = BertModel(ONE_LAYER).eval()
    inputs = {key: batch()[key] for key in ("input_ids", "cu_seqlens", "max_seqlen")}
    if form != "packed":
        ids = inputs["input_ids"].view(3, 10)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        inputs = {"input_ids": ids} if form == "padded" else {"input_ids": ids, "attention_mask": mask}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compile_backend if form == "packed" else "aot_eager")
    with torch.no_grad():
        expected, actual = model(**inputs), compiled(**inputs)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output)


def test_a_training_step_with_dropout_compiles_without_a_graph_break() -> None:
    model = BertForPreTraining(CONFIG.replace(num_hidden_layers=1)).train()
    loss, gradients = step(model)
    torch._dynamo.reset()
    compiled_loss, compiled_gradients = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in gradients.items():
        # aot_eager calls the same float32 operators, with equal bits; 1e-5 is 150 eps of gradients of up to 0.6.
        torch.testing.assert_close(compiled_gradients[f"_orig_mod.{name}"], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("extra", [[], [1, 1, 29]], ids=["label rows", "and others"])
def test_the_last_layer_at_labels_only_has_the_same_loss_and_gradients(extra: list[int]) -> None:
    model = BertForPreTraining(WITHOUT_DROPOUT).double().train()
    rows = torch.cat([(batch()["labels"] != -100).nonzero()[:, 0], torch.tensor(extra, dtype=torch.int64)])
    loss, expected = step(model)
    again, gradients = step(model, label_rows=rows)
    # float64 sums over other numbers of rows: some eps (2.2e-16) of a loss of 4.5 and of gradients of up to 0.7.
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-9, atol=1e-12), name
    out = model(**batch(), label_rows=rows, output_logits=True)
    every = model(**batch(), output_logits=True)
    torch.testing.assert_close(out.prediction_logits, every.prediction_logits[rows])
    torch.testing.assert_close(out.seq_relationship_logits, every.seq_relationship_logits)


def test_label_rows_are_for_packed_tokens_and_in_range() -> None:
    model = BertForPreTraining(WITHOUT_DROPOUT)
    with pytest.raises(ValueError, match="label_rows came with padded or empty input"):
        model(input_ids=torch.ones(2, 5, dtype=torch.int64), label_rows=torch.tensor([0]))
    with pytest.raises(ValueError, match="label_rows has values from 30 to 30; expected 0 to 29"):
        model(**batch(), label_rows=torch.tensor([30]))
