"""Other runtimes of a BERT encoder on a CPU: each peer is a function of padded token ids and their mask.

The constructor of a peer that is not installed, or that the processor does not support, raises; the benchmark's table
shows the message. `INSTALL` names the packages; none is a dependency of bert_fast.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = {
    "onnxruntime": "onnx onnxscript onnxruntime",
    "onnx": "onnx onnxscript onnxruntime",
    "openvino": "onnx onnxscript openvino",
}
OPSET = 17  # ONNX Runtime's BERT fusions recognise graphs of the exporter up to this one
CALIBRATION = 4  # batches
Encode = Callable[[Tensor, Tensor], Tensor]  # ids (B, S), mask (B, S) -> (B, S, E)


class AbsentError(RuntimeError):
    """A peer cannot run here, for the reason in the message."""


def need(*packages: str) -> None:
    """AbsentError unless the packages are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise AbsentError(f"not installed: pip install {INSTALL[package]}")


def copy_sharing_weights(model: nn.Module) -> Any:
    """A copy of a model that shares its parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class Encoder(nn.Module):
    """transformers' model as exporters need it: tensors in, one tensor out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S, E)."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


class ModelForms:
    """One model in the forms that peers read, each created on first use.

    Args:
        model: transformers' BertModel in float32, in eval mode, with `sdpa` attention.
        folder: for the files of the other runtimes.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.threads = torch.get_num_threads()

    @cached_property
    def eager(self) -> Any:
        model = copy_sharing_weights(self.model)
        model.set_attn_implementation("eager")
        return model

    @cached_property
    def bf16(self) -> Any:
        return copy.deepcopy(self.model).to(torch.bfloat16)

    @cached_property
    def onnx(self) -> Path:
        """The model as ONNX."""
        need("onnx", "onnxruntime")
        file = self.folder / "model.onnx"
        ids, mask = self.batch(2, 9)
        axes = {0: "batch", 1: "seqlen"}
        names = ["input_ids", "attention_mask"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracing exporter is deprecated, but fusions recognise its graph
            torch.onnx.export(
                Encoder(self.eager).eval(), (ids, mask), str(file), dynamo=False, opset_version=OPSET,
                input_names=names, output_names=["hidden"], dynamic_axes=dict.fromkeys([*names, "hidden"], axes),
            )  # fmt: skip
        return file

    @cached_property
    def onnx_fused(self) -> Path:
        """The model after ONNX Runtime's BERT fusions."""
        from onnxruntime.transformers import optimizer

        config = self.model.config
        with quiet():
            optimized = optimizer.optimize_model(
                str(self.onnx), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size,
                opt_level=0,
            )  # fmt: skip
        fused = optimized.get_fused_operator_statistics()["Attention"]
        if fused != config.num_hidden_layers:
            raise AbsentError(f"ONNX Runtime fused {fused} of {config.num_hidden_layers} layers")
        file = self.folder / "fused.onnx"
        optimized.save_model_to_file(str(file))
        return file

    @cached_property
    def onnx_dynamic(self) -> Path:
        """The model with INT8 weights per channel and dynamically quantized activations."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        file = self.folder / "dynamic.onnx"
        with quiet():
            quantize_dynamic(str(self.onnx), str(file), weight_type=QuantType.QInt8, per_channel=True)
        return file

    @cached_property
    def onnx_static(self) -> Path:
        """The model with quantized linear layers, their input ranges calibrated on random batches."""
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        batches = iter([feed(*self.batch(4, 64)) for _ in range(CALIBRATION)])

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Any] | None:
                return next(batches, None)

        graph = onnx.load(str(self.onnx)).graph
        weights = {tensor.name for tensor in graph.initializer}
        linear = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
        file = self.folder / "static.onnx"
        with quiet():
            quantize_static(
                str(self.onnx), str(file), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_quantize=linear,
            )  # fmt: skip
        return file

    def batch(self, batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
        """Random ids (B, S) without padding, and their mask."""
        ids = torch.randint(5, self.model.config.vocab_size, (batch, seqlen))
        return ids, torch.ones_like(ids)


class quiet:  # noqa: N801  # reads as a statement
    """Context that silences the advice of onnxruntime's tools in the root logger."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)


def feed(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """The inputs as ONNX Runtime and OpenVINO take them."""
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}


def of_torch(model: Any) -> Encode:
    """A torch module as a peer."""
    encoder = Encoder(model).eval()

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.inference_mode():
            return encoder(ids, mask)

    return run


def compiled(model: Any) -> Encode:
    """Each layer through torch.compile, recompiled per size: PyTorch's advice for models of repeated layers."""
    model = copy_sharing_weights(model)
    for layer in model.encoder.layer:
        layer.compile(dynamic=False)
    encoder = Encoder(model).eval()

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return encoder(ids, mask)

    return run


def dynamic_int8(forms: ModelForms) -> Encode:
    """torch's dynamically quantized linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, a separate package
        return of_torch(torch.ao.quantization.quantize_dynamic(forms.model, {nn.Linear}, dtype=torch.qint8))


def of_onnxruntime(file: Callable[[ModelForms], Path]) -> Callable[[ModelForms], Encode]:
    """ONNX Runtime as a peer."""

    def make(forms: ModelForms) -> Encode:
        need("onnx", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = forms.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file(forms)), options, providers=["CPUExecutionProvider"])
        return lambda ids, mask: torch.from_numpy(session.run(None, feed(ids, mask))[0])

    return make


def of_openvino(file: Callable[[ModelForms], Path], precision: str) -> Callable[[ModelForms], Encode]:
    """OpenVINO as a peer, with activations of `precision` ("f32", "bf16")."""

    def make(forms: ModelForms) -> Encode:
        need("openvino")
        import openvino

        core = openvino.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in capabilities:
            raise AbsentError(f"OpenVINO has no BF16 on this processor (only {', '.join(capabilities)})")
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": forms.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(str(file(forms)), "CPU", settings).create_infer_request()

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            request.infer(feed(ids, mask), share_inputs=True)
            return torch.from_numpy(request.get_output_tensor().data)

        return run

    return make


@dataclass(frozen=True)
class Peer:
    """`make` creates the function that is timed."""

    name: str
    precision: str
    make: Callable[[ModelForms], Encode]


PEERS = (
    Peer("transformers, eager", "fp32", lambda forms: of_torch(forms.eager)),
    Peer("transformers", "fp32", lambda forms: of_torch(forms.model)),
    Peer("transformers, torch.compile", "fp32", lambda forms: compiled(forms.model)),
    Peer("ONNX Runtime", "fp32", of_onnxruntime(lambda forms: forms.onnx)),
    Peer("ONNX Runtime, BERT fusions", "fp32", of_onnxruntime(lambda forms: forms.onnx_fused)),
    Peer("OpenVINO", "fp32", of_openvino(lambda forms: forms.onnx, "f32")),
    Peer("transformers", "bf16", lambda forms: of_torch(forms.bf16)),
    Peer("transformers, torch.compile", "bf16", lambda forms: compiled(forms.bf16)),
    Peer("OpenVINO", "bf16", of_openvino(lambda forms: forms.onnx, "bf16")),
    Peer("torch, dynamic", "int8", dynamic_int8),
    Peer("ONNX Runtime, dynamic", "int8", of_onnxruntime(lambda forms: forms.onnx_dynamic)),
    Peer("OpenVINO, static", "int8", of_openvino(lambda forms: forms.onnx_static, "f32")),
)


def versions() -> Iterator[tuple[str, str]]:
    """The versions of the installed runtimes."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("transformers", "onnxruntime", "openvino"):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "missing"
