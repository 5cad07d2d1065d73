"""Files of a checkpoint that are damaged or lie: each is named in one sentence, before memory is allocated."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bert_fast import BertConfig, BertForMaskedLM, BertModel
from tests.models.conftest import SMALL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_config(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


SETTINGS: list[dict[str, Any]] = [
    *(
        {name: value}
        for name in ("hidden_size", "vocab_size", "num_hidden_layers")
        for value in (10**9, -1, "48", 48.0)
    ),
    *({name: 10**9} for name in ("intermediate_size", "max_position_embeddings", "type_vocab_size", "num_labels")),
    *({"hidden_size": value} for value in (True, None, [48], {}, float("nan"), float("inf"), 10**400)),
    *({"num_attention_heads": value} for value in (0, 5, -3, "3", None)),
    *({"hidden_act": value} for value in (3, None, ["gelu"], "gleu")),
    *({"layer_norm_eps": value} for value in (0, 1e-50, -1e-12, float("nan"), float("inf"), "1e-12", True, 10**400)),
    *({"initializer_range": value} for value in (-1, float("nan"), None)),
    *({"hidden_dropout_prob": value} for value in (1.0, -0.1, float("nan"), "0.1", [0.1], True)),
    *({name: "x"} for name in ("attention_probs_dropout_prob", "classifier_dropout", "qa_dropout")),
    *({"pad_token_id": value} for value in ("0", -1, 61, 1.5, True)),
    *({"tie_word_embeddings": value} for value in ("yes", 1, None)),
    *({"id2label": value} for value in (3, ["a"], {"x": "a"}, {"0": None}, {"0": ["a"]})),
    *({"label2id": value} for value in (3, ["a"], {"a": "x"}, {"a": None})),
    *({"model_type": value} for value in (3, None, ["bert"], {}, "gpt2")),
    *({"architectures": value} for value in (3, "BertModel", [3])),
    *({"problem_type": value} for value in (3, "ranking", [])),
    *({"dtype": value} for value in (3, ["float32"])),
    *({name: "no"} for name in ("output_attentions", "output_hidden_states", "return_dict", "is_decoder")),
    {"vocab_size": 2**24, "hidden_size": 2**16, "num_attention_heads": 1},
    {"num_hidden_layers": 255, "hidden_size": 2**15, "num_attention_heads": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings)[:60])
def test_a_setting_that_is_no_berts_is_named(folder: Path, settings: dict[str, Any]) -> None:
    write_config(folder, **settings)
    start = time.monotonic()
    with pytest.raises(ValueError, match=next(iter(settings))) as error:
        BertModel.from_pretrained(folder)
    assert str(folder / "config.json") in str(error.value)
    assert len(str(error.value)) < 600
    assert time.monotonic() - start < 20  # not the minutes of a model of 1e9 layers, even on a busy machine


@pytest.mark.parametrize(
    "settings", [{"embedding_size": 10**9}, {"embedding_size": "8"}, {"embedding_size": None}, {"embedding_size": -8}]
)
def test_settings_of_an_architecture_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="embedding_size is"):
        BertConfig.from_dict({"model_type": "electra", **settings})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"a":' * 100_000 + "1" + "}" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "\x00"],
    ids=["empty", "half", "list", "null", "number", "deep", "digits", "zero byte"],
)
def test_a_config_that_is_no_object_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        BertModel.from_pretrained(folder)


LARGE: list[dict[str, Any]] = [
    {"vocab_size": 16_000_000},
    {"hidden_size": 9600, "intermediate_size": 2**20},
    {"max_position_embeddings": 2**24},
    {"intermediate_size": 2**20},
]
LOAD_IN_2_GB = """
import resource, sys
from bert_fast import BertModel
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**9, used + 2 * 10**9))
for folder in sys.argv[1:]:
    try:
        BertModel.from_pretrained(folder)
    except ValueError as error:
        print(error)
"""


def test_shapes_are_compared_before_memory_is_allocated(folder: Path, tmp_path: Path) -> None:
    """Each of these models has gigabytes of parameters; the limit of the address space leaves 2 GB."""
    folders = []
    for number, settings in enumerate(LARGE):
        folders.append(str(shutil.copytree(folder, tmp_path / str(number))))
        write_config(tmp_path / str(number), **settings)
    done = subprocess.run([sys.executable, "-c", LOAD_IN_2_GB, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.count("the checkpoint does not fit the configuration") == len(LARGE)


@pytest.mark.parametrize("kind", ["cut", "bit", "bytes", "length"])
def test_a_damaged_safetensors_file_is_named(folder: Path, kind: str) -> None:
    path = folder / "model.safetensors"
    whole, draw = path.read_bytes(), random.Random(kind)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(40):
        damaged = bytearray(whole)
        if kind == "cut":
            damaged = damaged[: draw.randrange(len(damaged))]
        elif kind == "bit":
            damaged[draw.randrange(8, header)] ^= 1 << draw.randrange(8)
        elif kind == "bytes":
            for _ in range(4):
                damaged[draw.randrange(header)] = draw.randrange(256)
        else:
            damaged[:8] = draw.randrange(2**64).to_bytes(8, "little")
        path.write_bytes(damaged)
        try:
            BertModel.from_pretrained(folder)  # a flipped bit in the metadata or in white space does no harm
        except ValueError as error:
            assert "model.safetensors is damaged" in str(error) or "the checkpoint" in str(error)  # noqa: PT017


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "evil.pt", "evil.pkl", "evil", ["evil"], 3, None])
def test_an_index_of_safetensors_names_nothing_else(folder: Path, name: Any, allow_pickle: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    write_index(folder, dict.fromkeys(tensors, name))
    torch.save(tensors, folder / str(name))
    with pytest.raises(ValueError, match=r"index\.json names .*expected names of \.safetensors files"):
        BertModel.from_pretrained(folder, allow_pickle=allow_pickle)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "./x.safetensors", "a\x00.safetensors"]
)
def test_an_index_names_nothing_outside_its_folder(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
    (folder / "a").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "a" / "x.safetensors")
    write_index(folder, dict.fromkeys(tensors, name))
    with pytest.raises(ValueError, match=r"index\.json names"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize("weight_map", [3, None, [], "x"])
def test_an_index_without_a_mapping_is_named(folder: Path, weight_map: Any) -> None:
    write_index(folder, weight_map)
    with pytest.raises(ValueError, match=r"index\.json: 'weight_map' is"):
        BertModel.from_pretrained(folder)


def test_an_index_of_pickles_needs_allow_pickle_and_names_pickles(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    write_index(folder, dict.fromkeys(tensors, "part.bin"), "pytorch_model.bin.index.json")
    torch.save(tensors, folder / "part.bin")
    with pytest.raises(FileNotFoundError, match="allow_pickle=True"):
        BertModel.from_pretrained(folder)
    assert torch.equal(
        BertModel.from_pretrained(folder, allow_pickle=True).embeddings.LayerNorm.weight,
        tensors["embeddings.LayerNorm.weight"],
    )


def test_shards_that_repeat_or_lack_a_tensor_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for shard in ("a.safetensors", "b.safetensors"):
        save_file(tensors, folder / shard)
    write_index(folder, dict(zip(tensors, ["a.safetensors", "b.safetensors"] * 99, strict=False)))
    with pytest.raises(ValueError, match=r"b\.safetensors has .* and 36 more, which another"):
        BertModel.from_pretrained(folder)
    write_index(folder, {**dict.fromkeys(tensors, "a.safetensors"), "more": "a.safetensors"})
    with pytest.raises(ValueError, match="lack more"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x04N."])
def test_a_damaged_pickle_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        BertModel.from_pretrained(folder, allow_pickle=True)


@pytest.mark.parametrize("value", [3, [torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, {1: torch.zeros(2)}, {}])
def test_a_pickle_without_tensors_is_named(folder: Path, value: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no tensors; expected a state_dict"):
        BertModel.from_pretrained(folder, allow_pickle=True)


def test_symbolic_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """The hub's cache has a folder of links to its files."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    first, second = BertModel.from_pretrained(folder), BertModel.from_pretrained(linked)
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


# Saving


def test_files_have_the_mode_of_the_umask(folder: Path) -> None:
    import os

    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            BertModel(BertConfig(**SMALL)).save_pretrained(folder)
        finally:
            os.umask(before)
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
            ("config.json", "model.safetensors"), mode
        )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_limit_of_the_file_size_is_an_os_error_with_the_name(folder: Path) -> None:
    before = snapshot(folder)
    code = (
        "import resource, sys\nfrom bert_fast import BertModel\nmodel = BertModel.from_pretrained(sys.argv[1])\n"
        "sys.dont_write_bytecode = True  # Python cuts a .pyc at the limit without an error\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    model.save_pretrained(sys.argv[1])\n"
        "except OSError as error:\n    print(error.errno, error.filename, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"27 None [Errno 27] {folder} can't be written: the file would exceed the limit")
    assert snapshot(folder) == before


class Killed(BaseException):
    """In place of a kill: nothing of the save runs after it but what `finally` blocks would do to a temporary."""


def calls_of(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None], stop: int | None = None) -> int:
    """The number of file calls of `action`; before number `stop` the process "dies" and makes no more of them."""
    count = 0

    def guarded(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if stop is not None and count >= stop:
                raise Killed(name)
            count += 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, names in (
            ("os", ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "open")),
            ("pathlib.Path", ("write_text", "touch", "chmod", "mkdir", "rename", "replace", "unlink", "rmdir")),
            ("shutil", ("rmtree",)),
            ("safetensors.torch", ("save_file",)),
        ):
            for name in names:
                target = f"{module}.{name}"
                patch.setattr(target, guarded(target, _resolve(target)))
        with contextlib.suppress(Killed):
            action()
    return count


def _resolve(target: str) -> Any:
    from pydoc import locate

    return locate(target)


def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed before every file call of a save: weights and configuration are of the same model, other files stay."""
    old = BertModel.from_pretrained(folder)
    (folder / "vocab.txt").write_text("mine")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    new = BertModel(BertConfig(**SMALL, layer_norm_eps=1e-6))
    new.load_state_dict({name: x + 1.0 for name, x in old.state_dict().items()})
    total = calls_of(monkeypatch, lambda: new.save_pretrained(shutil.copytree(folder, tmp_path / "count")))
    assert total > 10
    seen = set()
    for stop in range(total):
        target = Path(shutil.copytree(folder, tmp_path / f"stop-{stop}"))
        calls_of(monkeypatch, lambda target=target: new.save_pretrained(target), stop)  # type: ignore[misc]
        loaded = BertModel.from_pretrained(target)
        is_new = loaded.config.layer_norm_eps == 1e-6
        seen.add(is_new)
        expected = new if is_new else old
        for name, x in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], x), (stop, name)
        assert (target / "vocab.txt").read_text() == "mine"
        assert (target / "1_Pooling" / "config.json").read_text() == "{}"
        old.save_pretrained(target)  # the next writer completes or clears what was left
        assert BertModel.from_pretrained(target).config.layer_norm_eps == 1e-12
    assert seen == {False, True}


def test_a_new_folder_has_both_files_or_neither(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(folder)
    total = calls_of(monkeypatch, lambda: model.save_pretrained(tmp_path / "count"))
    for stop in range(total):
        target = tmp_path / f"stop-{stop}"
        calls_of(monkeypatch, lambda target=target: model.save_pretrained(target), stop)  # type: ignore[misc]
        try:
            BertModel.from_pretrained(target)
        except FileNotFoundError as error:
            assert "no config.json" in str(error) or "is not a folder" in str(error)  # noqa: PT017


def test_writers_of_one_folder_leave_one_model(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    models = []
    for number in range(4):
        model = BertModel(BertConfig(**SMALL, layer_norm_eps=float(f"1e-{number + 3}")))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        models.append(model)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: models[number % 4].save_pretrained(folder), range(24)))
    loaded = BertModel.from_pretrained(folder)
    values: set[float] = {float(x) for parameter in loaded.parameters() for x in parameter.detach().unique()}
    assert len(values) == 1
    assert loaded.config.layer_norm_eps == float(f"1e-{int(values.pop()) + 3}")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_save_keeps_the_old_files_of_the_users(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model-00001-of-00001.safetensors", "model.safetensors", "notes.txt"]
    assert "cls.predictions.bias" in load_file(folder / "model.safetensors")
