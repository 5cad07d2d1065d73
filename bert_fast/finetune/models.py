"""The models of fine-tuning: from a checkpoint, from the user, and several on one encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from bert_fast.finetune.config import FinetuneConfig
from bert_fast.models import BertConfig
from bert_fast.tasks.task import CONFIG_KEY, Task, task_entry

_SHARED = ("embeddings", "embeddings_project", "encoder")


def config_entry(config: FinetuneConfig, task: Task) -> dict[str, Any]:
    """What config.json says about the task: enough to predict."""
    return {**task_entry(task), "text": asdict(config.text)}


_HEAD_DROPOUTS = ("qa_dropout", "seq_classif_dropout", "summary_last_dropout")


def build_model(config: FinetuneConfig, task: Task, report: Callable[[str], None] = print) -> nn.Module:
    """The model of the task's class from the checkpoint `config.model`.

    A head of another task, another pooling or another number of labels is made anew, and `report` says so.

    Raises:
        ValueError: the checkpoint is damaged, or has fewer positions than text.max_length.
    """
    import bert_fast.models

    kind: Any = getattr(bert_fast.models, task.model_class)
    settings: Any = BertConfig.from_pretrained(config.model)
    before = settings.extra
    kept = {name: value for name, value in before.items() if name != "classifier_pooling"}
    changes: dict[str, Any] = {
        **task.model_config(),
        "extra": {**kept, **task.head_config(), CONFIG_KEY: config_entry(config, task)},
    }
    if config.dropout is not None:
        changes |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.dropout)
    if config.classifier_dropout is not None:
        if task.model_class == "BertForTokenClassification" and "classifier_dropout" in settings.architecture.fixed:
            raise ValueError(f"classifier_dropout came, and {settings.model_type} has none for tokens; set dropout")
        # DistilBERT and ELECTRA have settings of their own for some heads.
        own = [name for name in _HEAD_DROPOUTS if name in settings.architecture.defaults]
        changes["extra"] |= dict.fromkeys(own, config.classifier_dropout)
        changes["classifier_dropout"] = config.classifier_dropout
    settings = settings.replace(**changes)
    said = other_head(before, task)
    if said:
        report(f"{config.model}: {said}; it is made anew")
    model: nn.Module = kind.from_pretrained(
        config.model, config=settings, ignore_mismatched_sizes=True, new_head=bool(said)
    )
    return model


def other_head(before: Mapping[str, Any], task: Task) -> str:
    """In which way the head of a checkpoint that was fine-tuned here is of another kind than that of `task`, or "".

    Args:
        before: what config.json of the checkpoint has beside BERT's settings.
    """
    entry = before.get(CONFIG_KEY)
    if not isinstance(entry, Mapping):
        return ""
    if entry["name"] != task.name:
        return f"its head is of the task {entry['name']}"
    pooling, wanted = (found.get("classifier_pooling", "cls") for found in (before, task.head_config()))
    return "" if pooling == wanted else f"its head is one for the pooling {pooling}, and {wanted} is wanted"


def adopt_model(model: nn.Module, config: FinetuneConfig, task: Task) -> nn.Module:
    """Write the task into the configuration of a model that the user made (transformers', fused or not).

    Raises:
        ValueError: its head has another number of labels than the data.
    """
    settings: Any = model.config
    wanted = task.model_config()
    count = wanted.get("num_labels")
    if count is not None and count != settings.num_labels:
        raise ValueError(
            f"the model has {settings.num_labels} labels and the training rows have {count}; make it with {count}"
        )
    for name, value in wanted.items():
        if name != "num_labels":  # transformers derives it from id2label
            setattr(settings, name, value)
    if unknown := task.head_config():
        raise ValueError(f"a model came that does not have {unknown}; leave it out, or let finetune make the model")
    describe_task(model, config, task)
    return model


def describe_task(model: nn.Module, config: FinetuneConfig, task: Task) -> None:
    """Write what is known of the task by now into the configuration of `model`, ours or transformers'."""
    settings: Any = model.config
    if isinstance(settings, BertConfig):
        settings.extra = {**settings.extra, CONFIG_KEY: config_entry(config, task)}
    else:
        setattr(settings, CONFIG_KEY, config_entry(config, task))


def share_encoder(models: Sequence[Any]) -> None:
    """Give all models the embeddings and the layers of the first, in place; pooler and head stay each one's own.

    Args:
        models: of `build_model`, from one checkpoint.
    """
    first, *others = [model.base_model for model in models]
    for other in others:
        for name in _SHARED:
            setattr(other, name, getattr(first, name))
