"""Show versions, device, CPU features, and for every op the available implementations and why others are not."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pyarrow", "transformers")


def add_arguments(parser: Any) -> None:
    parser.add_argument("--json", type=bool, default=False, help="print one JSON object")


def run(args: Any) -> int:
    report = collect()
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    for section in ("versions", "machine", "native modules"):
        print(section)
        for name, value in report[section].items():
            print(f"  {name:<16} {value}")
    if report["tuned"]["file"]:
        print(f"tuned by bert-fast tune: {report['tuned']['file']}")
    for line in report["tuned"]["ignored"]:
        print(f"  ignored: {line}")
    print("operations (* is the choice of impl='auto' for float32 on this device)")
    for op, impls in report["operations"].items():
        print(f"  {op}")
        for line in report["times"].get(op, []):
            print(f"      measured here: {line}")
        for impl, state in impls.items():
            mark = "*" if state["chosen"] else " "
            runs = "runs" if state["verified"] else "runs, unverified"
            families = ", ".join(state["families"])
            runs += f", verified on GPUs with the matrix instructions of {families}" * bool(families)
            runs += f": {state['reason']}" * bool(state["reason"])
            print(f"  {mark} {impl:<12} {runs if state['ok'] else state['reason']}")
    return 0


def collect() -> dict[str, Any]:
    """The data of `bert-fast info`, as JSON values."""
    import torch

    import bert_fast
    from bert_fast.kernels._common import dispatch, extensions, tuned
    from bert_fast.kernels._common.times import table

    cuda = torch.cuda.is_available()
    versions = {"bert_fast": bert_fast.__version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    versions["torch"] = str(torch.__version__)  # with its CUDA version, which the package's metadata may leave out
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "CPU features": tuned.cpu_features(),
        "threads": torch.get_num_threads(),
    }
    if cuda:
        machine["CUDA"] = torch.version.cuda
        machine["compute"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
    modules = {
        "bert_fast._C": extensions.MISSING or "built",
        "bert_fast._CUDA": _cuda_state(extensions.build_report("_CUDA"), extensions.CUDA_MISSING),
        "bert_fast._host": _host_state(Path(bert_fast.__file__).parent),
    }
    probe = torch.empty(0, device="cuda" if cuda else "cpu")
    operations: dict[str, dict[str, dict[str, Any]]] = {}
    for name, impls in dispatch.available_impls().items():
        op = dispatch.OPS[name]
        chosen = op.select("auto", probe)
        operations[name] = {
            impl: {
                **state._asdict(),
                "families": [f"sm_{arch}" for arch in sorted(op.impls[impl].families or ())],
                "chosen": state.ok and op.impls[impl].call is chosen,
            }
            for impl, state in impls.items()
        }
    times = {name: table(op.times(dispatch.device_key(probe.device))) for name, op in dispatch.OPS.items()}
    return {
        "versions": versions,
        "machine": machine,
        "native modules": modules,
        "operations": operations,
        "times": {name: lines for name, lines in times.items() if lines},  # by which auto chooses, on this device
        "tuned": _tuned(probe.device.type),
    }


def _tuned(device: str) -> dict[str, Any]:
    """The table of `bert-fast tune` for a device type: its file, "" where there is none, and what doesn't count."""
    from bert_fast.kernels._common import dispatch, tuned

    path = tuned.path_of(tuned.device_label(device))
    table = dispatch.tuned_table(device)
    ignored = [line for op in table.ops for line in dispatch.tuned_entries(device, op)[1]]
    return {"file": str(path) if path.exists() else "", "ignored": [*table.ignored, *ignored]}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_state(report: dict[str, Any], missing: str) -> str:
    """What the CUDA kernels were built for, and the reason where they can't run here all the same."""
    if not report.get("built"):
        return missing or "emulated on CPU tensors (BERT_FAST_CUDA_EMULATOR), for tests"
    architectures = ", ".join(f"sm_{arch}" for arch in report["architectures"])
    return f"built with CUDA {report['cuda']} for {architectures}" + (f"; {missing}" if missing else "")


def _host_state(package: Path) -> str:
    try:
        from bert_fast import _host  # noqa: F401
    except ImportError as error:
        info = package / "_build_info.json"
        report = json.loads(info.read_text())["_host"] if info.exists() else {"reason": ""}
        return f"not built: {report['reason'] or error}; the numpy implementation is used"
    return "built"
