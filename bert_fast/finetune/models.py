"""The models of fine-tuning: loaded from a checkpoint, passed by the user, and several on one encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from bert_fast.finetune.config import FinetuneConfig
from bert_fast.models import BertConfig, BertPreTrainedModel
from bert_fast.tasks.task import CONFIG_KEY, Task, task_entry

_SHARED = ("embeddings", "embeddings_project", "encoder")
_HEAD_DROPOUTS = ("qa_dropout", "seq_classif_dropout", "summary_last_dropout")


def config_entry(config: FinetuneConfig, task: Task) -> dict[str, Any]:
    """The entry of the task in config.json: what prediction needs."""
    return {**task_entry(task), "text": asdict(config.text)}


def build_model(config: FinetuneConfig, task: Task, report: Callable[[str], None] = print) -> nn.Module:
    """The model of the task's class from the checkpoint `config.model`.

    A head for another task, pooling or number of labels is initialized randomly, and `report` is called with a message.

    Raises:
        ValueError: the checkpoint is damaged, or has no dropout where classifier_dropout sets one.
    """
    import bert_fast.models

    kind: Any = getattr(bert_fast.models, task.model_class)
    settings: Any = BertConfig.from_pretrained(config.model)
    extra = settings.extra
    other_extra = {name: value for name, value in extra.items() if name != "classifier_pooling"}
    changes: dict[str, Any] = {
        **task.model_config(),
        "extra": {**other_extra, **task.head_config(), CONFIG_KEY: config_entry(config, task)},
    }
    if config.dropout is not None:
        changes |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.dropout)
    if config.classifier_dropout is not None:
        if task.model_class == "BertForTokenClassification" and "classifier_dropout" in settings.architecture.fixed:
            raise ValueError(
                f"classifier_dropout is {config.classifier_dropout}; expected None: {settings.model_type} has none for "
                "token-classification, set dropout instead"
            )
        # DistilBERT and ELECTRA name the dropout of some heads differently.
        names = [name for name in _HEAD_DROPOUTS if name in settings.architecture.defaults]
        changes["extra"] |= dict.fromkeys(names, config.classifier_dropout)
        changes["classifier_dropout"] = config.classifier_dropout
    settings = settings.replace(**changes)
    mismatch = head_mismatch(extra, task)
    if mismatch:
        report(f"{config.model}: {mismatch}; the head is initialized randomly")
    model: nn.Module = kind.from_pretrained(
        config.model, config=settings, ignore_mismatched_sizes=True, new_head=bool(mismatch)
    )
    return model


def head_mismatch(extra: Mapping[str, Any], task: Task) -> str:
    """Why the head of a checkpoint fine-tuned by bert_fast can't be reused for `task`; "" if it can.

    Args:
        extra: the entries of the checkpoint's config.json that BERT itself does not have.
    """
    entry = extra.get(CONFIG_KEY)
    if not isinstance(entry, Mapping):
        return ""
    if entry["name"] != task.name:
        return f"the checkpoint has a head for the task {entry['name']}"
    pooling, requested = (config.get("classifier_pooling", "cls") for config in (extra, task.head_config()))
    return "" if pooling == requested else f"the checkpoint has a head for pooling {pooling}, expected {requested}"


def adopt_model(model: nn.Module, config: FinetuneConfig, task: Task) -> nn.Module:
    """Write the task into the configuration of a model passed by the user (from transformers, fused or not).

    Raises:
        ValueError: its head has another number of labels than the data, or is of another kind than the task's.
    """
    settings: Any = model.config
    required = task.model_config()
    count = required.get("num_labels")
    if count is not None and count != settings.num_labels:
        raise ValueError(f"model has {settings.num_labels} labels; expected {count}, the labels of the training rows")
    for name, value in required.items():
        if name != "num_labels":  # transformers derives it from id2label
            setattr(settings, name, value)
    if unsupported := task.head_config():
        raise ValueError(f"model does not support {unsupported}; drop that option, or let finetune load the model")
    describe_task(model, config, task)
    return model


def describe_task(model: nn.Module, config: FinetuneConfig, task: Task) -> None:
    """Write the current state of the task into the configuration of `model`, from bert_fast or transformers."""
    settings: Any = model.config
    if isinstance(settings, BertConfig):
        settings.extra = {**settings.extra, CONFIG_KEY: config_entry(config, task)}
        if isinstance(model, BertPreTrainedModel):
            model.sentence_modules = None  # of the checkpoint: the task has its own
    else:
        setattr(settings, CONFIG_KEY, config_entry(config, task))


def share_encoder(models: Sequence[Any]) -> None:
    """Replace the embeddings and layers of all models by those of the first, in place; poolers and heads stay separate.

    Args:
        models: built by `build_model` from one checkpoint.
    """
    first, *others = [model.base_model for model in models]
    for other in others:
        for name in _SHARED:
            setattr(other, name, getattr(first, name))
