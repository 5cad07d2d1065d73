"""What a runtime's threads take of the processor after a call, while nothing is called, and the setting that ends it.

    python -m benchmarks.models.idle_threads

Threads that wait for the next call in a loop ("spin") take cores from another runtime in the same process. Process CPU
time over a sleep of 0.3 seconds after a product of (512, 768) and (768, 3072) on two threads, the median of seven; each
setting in a process of its own, because a runtime reads it once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.runner.cpu_peers import OPSET, AbsentError, need

SLEEP = 0.3  # seconds
ROWS, TERMS, COLUMNS = 512, 768, 3072
THREADS = 2


class Setting(NamedTuple):
    """A runtime and what is set for it."""

    runtime: str
    environment: Mapping[str, str] = {}
    spinning: str | None = None  # ONNX Runtime's session.intra_op.allow_spinning


SETTINGS = {
    "torch": Setting("torch"),
    "torch, OMP_WAIT_POLICY=PASSIVE": Setting("torch", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "torch, OMP_WAIT_POLICY=ACTIVE": Setting("torch", {"OMP_WAIT_POLICY": "ACTIVE"}),
    "ONNX Runtime": Setting("onnxruntime"),
    "ONNX Runtime, OMP_WAIT_POLICY=PASSIVE KMP_BLOCKTIME=0": Setting(
        "onnxruntime", {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    ),
    "ONNX Runtime, session.intra_op.allow_spinning=0": Setting("onnxruntime", spinning="0"),
    "OpenVINO": Setting("openvino"),
}


def of_torch(_: str | None) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(THREADS)
    x, weight = torch.randn(ROWS, TERMS), torch.randn(COLUMNS, TERMS)
    return lambda: torch.nn.functional.linear(x, weight)


def of_onnxruntime(spinning: str | None) -> Callable[[], Any]:
    need("onnx", "onnxruntime")
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, TERMS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])],
        [numpy_helper.from_array(np.ones((TERMS, COLUMNS), np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8  # of OPSET: older releases of ONNX Runtime refuse that of a newer onnx
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    if spinning is not None:
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.ones((ROWS, TERMS), np.float32)
    return lambda: session.run(None, {"x": x})


def of_openvino(_: str | None) -> Callable[[], Any]:
    need("openvino")
    import numpy as np
    import openvino
    from openvino import opset13

    x, weight = np.ones((ROWS, TERMS), np.float32), np.ones((TERMS, COLUMNS), np.float32)
    parameter = opset13.parameter([ROWS, TERMS], np.float32)
    product = opset13.matmul(parameter, opset13.constant(weight), False, False)
    settings = {"INFERENCE_NUM_THREADS": THREADS}
    compiled = openvino.Core().compile_model(openvino.Model([product], [parameter]), "CPU", settings)
    return lambda: compiled([x])


RUNTIMES = {"torch": of_torch, "onnxruntime": of_onnxruntime, "openvino": of_openvino}


def idle_seconds(call: Callable[[], Any], rounds: int = 7) -> float:
    """Process CPU seconds over a sleep after `call`, the median of `rounds`."""
    call()
    times = []
    for _ in range(rounds):
        call()
        start = time.process_time()
        time.sleep(SLEEP)
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(name: str) -> str:
    """A line of the table: the milliseconds of a setting, or why it was not measured."""
    # These override what the caller's environment says of threads.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "KMP_", "GOMP_"))}
    command = [sys.executable, "-m", "benchmarks.models.idle_threads", "--setting", name]
    environment = inherited | SETTINGS[name].environment
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        return f"failed: {(run.stderr.strip() or 'no message').splitlines()[-1]}"
    return run.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time that idle threads of a runtime take")
    parser.add_argument("--setting", choices=SETTINGS, help="measure this one in this process")
    name = parser.parse_args().setting
    if name is None:
        for setting in SETTINGS:
            print(f"{setting:55} {measure(setting)}", flush=True)
        return
    try:
        call = RUNTIMES[SETTINGS[name].runtime](SETTINGS[name].spinning)
    except AbsentError as absent:
        print(f"not measured: {absent}")
    else:
        print(f"{1e3 * idle_seconds(call):.1f} ms")


if __name__ == "__main__":
    main()
