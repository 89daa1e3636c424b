"""One int8 file made by one method, in a process that does nothing else, so that time and peak memory are its own.

What enters: a request as JSON on stdin (method, paths of the fp32 file, the calibration and evaluation images as
arrays). What leaves: the int8 file, and JSON on stdout: seconds, peak resident memory, notes; for our own methods
also the logits of the PyTorch simulation, and of the two ceilings where asked. `benchmarks/int8.py` starts it.
The seconds cover calibration and conversion, not the decoding of images nor the imports.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.measure.measure_worker import _peak_rss_bytes, _status_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from edgecompress.data.preprocessing import Preprocessing
    from edgecompress.int8.quantized_model import QuantizedModel

INPUT_NAME = "input"  # as edgecompress.exporting names it; importing that here would bring torch into the peers' memory
_BATCH = 32


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Make the file that the request names."""
    return {"ours": _make_ours, "ort": _make_ort, "nncf": _make_nncf}[request["family"]](request)


def _measured(started: tuple[float, float], before: int | None, **more: Any) -> dict[str, Any]:
    peak = _peak_rss_bytes()
    return {
        "seconds": time.perf_counter() - started[0],
        "cpu_seconds": time.process_time() - started[1],  # of all threads: on a busy machine the one to compare
        "peak_rss_bytes": peak,
        "rss_before_bytes": before,  # interpreter, libraries and the model, before the first calibration image
        **more,
    }


def _calibration(request: dict[str, Any]) -> NDArray[np.float32]:
    images: NDArray[np.float32] = np.load(request["calibration_npy"], mmap_mode="r")[: request["samples"]]
    return images


def _make_ort(request: dict[str, Any]) -> dict[str, Any]:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = ({INPUT_NAME: np.array(image[None])} for image in _calibration(request))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._feeds, None)

    before, started = _status_bytes("VmRSS"), (time.perf_counter(), time.process_time())
    prepared = Path(request["output"]).with_suffix(".prepared.onnx")
    quant_pre_process(request["fp32"], str(prepared))
    quantize_static(
        str(prepared),
        request["output"],
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=request["reduce_range"],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[request["calibrate_method"]],
    )
    prepared.unlink()
    return _measured(started, before)


def _make_nncf(request: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("NNCF_CI", "1")  # its own switch against telemetry, read on import
    import nncf
    import onnx

    model = onnx.load(request["fp32"])
    images = _calibration(request)
    before, started = _status_bytes("VmRSS"), (time.perf_counter(), time.process_time())
    made = nncf.quantize(
        model,
        nncf.Dataset(range(len(images)), lambda index: {INPUT_NAME: np.array(images[index][None])}),
        preset=nncf.QuantizationPreset[request["preset"]],
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(images),
        fast_bias_correction=request["fast_bias_correction"],
    )
    onnx.save(made, request["output"])
    return _measured(started, before)


def _make_ours(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from edgecompress.data.run_data import open_data
    from edgecompress.exporting.onnx_export import Provenance, export_onnx
    from edgecompress.int8.post_training import quantize
    from edgecompress.int8.scheme import resolve_scheme
    from edgecompress.machine import versions
    from edgecompress.models.checkpoint import example_input
    from edgecompress.models.model_building import create_model
    from edgecompress.settings.model_settings import ModelSettings
    from edgecompress.settings.recipe import DataSettings, QuantizeStage
    from edgecompress.settings.target import load_target

    torch.manual_seed(0)
    data = open_data(DataSettings.model_validate(request["data"]))
    created = create_model(ModelSettings.model_validate(request["model"]), data)
    target = load_target(request["target"])
    example = example_input(created.architecture)
    stage = QuantizeStage.model_validate(
        {"kind": "quantize", "id": "int8", "effort": request["effort"], "placement": "full"}
    )
    scheme, why = resolve_scheme(stage, target)
    images = _calibration(request)

    def batches() -> Any:
        for start in range(0, len(images), _BATCH):
            yield torch.from_numpy(np.array(images[start : start + _BATCH]))

    before, started = _status_bytes("VmRSS"), (time.perf_counter(), time.process_time())
    quantized = quantize(
        created.module.eval(),
        stage=stage,
        scheme=scheme,
        calibration=batches,
        batches=-(-len(images) // _BATCH),
        example=example,
    )
    export_onnx(
        quantized.graph,
        example,
        Path(request["output"]),
        target=target,
        preprocessing=created.architecture.preprocessing,
        provenance=Provenance((), "benchmark", "", versions()),
        extra_metadata={},
    )
    answer = _measured(started, before, scheme=f"{scheme.to_dict()} ({why})", correction=quantized.correction)
    graphs = {"simulation": quantized.simulation()}
    if request["ceilings"]:
        graphs["float weights"] = with_float_weights(quantized)
        graphs["float activations"] = with_float_activations(quantized)
    answer["logits"] = {}
    for name, graph in graphs.items():
        path = f"{request['output']}.{name.replace(' ', '_')}.npy"
        np.save(path, _logits(graph, request["evaluation_npy"], created.architecture.preprocessing))
        answer["logits"][name] = path
    return answer


def with_float_weights(quantized: QuantizedModel) -> GraphModule:
    """The simulation with every weight and bias as it was in float: what 8-bit activations alone cost."""
    import torch

    from edgecompress.int8.quantized_model import simulate

    if quantized.reference is None:
        raise ValueError("the float graph is not kept; only a model that was just quantized has it")
    simulation = simulate(quantized.graph)  # keeps the node names
    floats = {node.name: node for node in quantized.reference.graph.nodes}
    replaced = 0
    for node in simulation.graph.nodes:
        twin = floats.get(node.name)
        if node.op != "call_function" or twin is None:
            continue
        for own, other in zip(node.all_input_nodes, twin.all_input_nodes, strict=True):
            if own.op == other.op == "get_attr":
                value = _constant(quantized.reference, other.target)
                with torch.no_grad():
                    _constant(simulation, own.target).copy_(value)
                replaced += 1
    if replaced == 0:
        raise ValueError("no weight of the simulation has a float twin: the two graphs have other names")
    return simulation


def with_float_activations(quantized: QuantizedModel) -> GraphModule:
    """The simulation without any rounding of activations: what 8-bit weights alone cost."""
    from edgecompress.int8.quantized_model import simulate

    simulation = simulate(quantized.graph)
    removed = 0
    for node in list(simulation.graph.nodes):
        if node.op == "call_function" and "fake_quantize" in str(node.target):
            node.replace_all_uses_with(node.args[0])
            simulation.graph.erase_node(node)
            removed += 1
    if removed == 0:
        raise ValueError("the simulation rounds no activation")
    simulation.recompile()
    return simulation


def _constant(graph: GraphModule, name: Any) -> Tensor:
    owner, _, attribute = str(name).rpartition(".")
    value: Tensor = getattr(graph.get_submodule(owner), attribute)
    return value


def _logits(graph: GraphModule, images_npy: str, preprocessing: Preprocessing) -> NDArray[np.float32]:
    import torch

    images = np.load(images_npy, mmap_mode="r")
    with torch.no_grad():
        return np.concatenate(
            [
                graph(preprocessing.normalize(torch.from_numpy(np.array(images[start : start + _BATCH])))).numpy()
                for start in range(0, len(images), _BATCH)
            ]
        )


def main() -> None:
    # stdout is kept for the reply: whatever a library prints goes to stderr.
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    json.dump(make(json.load(sys.stdin)), reply)
    reply.close()


if __name__ == "__main__":
    main()
