"""Where an exported file first differs from PyTorch: the name of the layer, not only the size of the difference.

What enters: a float module, its ONNX file and a few images. What leaves: the first layer, in the order of the graph,
whose output differs by more than is allowed. The exporter names a tensor of the file after the node of the captured
graph that it stands for, so both are run once with every output kept, and compared name by name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from edgecompress.errors import ExportError
from edgecompress.exporting.onnx_export import INPUT_NAME, OUTPUT_NAME, translate
from edgecompress.settings.target import Target


@dataclass(frozen=True)
class Divergence:
    """`layer` is a module's dotted name; `relative_diff` is against the largest value of PyTorch's output.

    `compared` outputs were compared until then, of which the last that agreed belongs to `last_agreeing_layer`.
    """

    layer: str
    operator: str
    relative_diff: float
    last_agreeing_layer: str | None
    compared: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What was found, for a person."""
        before = f" ({self.last_agreeing_layer} before it agrees)" if self.last_agreeing_layer else ""
        return f"The first layer that differs is {self.layer} ({self.operator}), by {self.relative_diff:.1e}{before}."


def first_divergence(
    module: nn.Module, path: Path, inputs: Tensor, *, target: Target, limit: float
) -> Divergence | None:
    """Compare a float module with the file exported from it, layer by layer, on normalized images [N, C, H, W].

    None where every output agrees within `limit`, as a fraction of its largest value. Raises ExportError when the
    module cannot be captured or the file does not run.
    """
    program = translate(module, inputs, target).exported_program
    if program is None:
        raise ExportError(f"{path.name}: the exporter kept no graph to compare with")
    recorder = _Recorder(program.module())
    with torch.no_grad():
        recorder.run(inputs)
    found = _outputs(path, inputs.numpy(), set(recorder.values))
    last: str | None = None
    compared = 0
    for name, value in recorder.values.items():
        if name not in found or found[name].shape != value.shape:
            continue  # folded into a neighbour, or rewritten to another form
        compared += 1
        difference = float(np.abs(found[name] - value).max()) / max(float(np.abs(value).max()), 1e-12)
        if not difference <= limit:  # NaN differs too
            return Divergence(recorder.layers[name], recorder.operators[name], difference, last, compared)
        last = recorder.layers[name]
    return None


class _Recorder(fx.Interpreter):
    """Runs a captured graph and keeps every float output, with the module and the operator that it belongs to."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, np.ndarray[Any, Any]] = {}
        self.layers: dict[str, str] = {}
        self.operators: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            self._keep(n.name, n, result)
        if n.op == "output":
            (logits,) = (value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, Tensor))
            self._keep(OUTPUT_NAME, next(node for node in n.all_input_nodes), logits)
        return result

    def _keep(self, name: str, node: fx.Node, value: Tensor) -> None:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        # A tuple's item carries no stack in some versions; its source does.
        stack = stack or [
            entry for before in node.all_input_nodes for entry in before.meta.get("nn_module_stack", {}).values()
        ]
        self.values[name] = value.detach().numpy()
        self.layers[name] = (str(stack[-1][0]) if stack else "") or node.name
        self.operators[name] = node.name.rstrip("0123456789_")


def _outputs(path: Path, inputs: np.ndarray[Any, Any], wanted: set[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Those outputs of a file's nodes whose names are wanted, computed without the optimizer, which would fuse them."""
    model = onnx.load(path)
    already = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name in wanted - already]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, {INPUT_NAME: inputs}), strict=True))
    except Exception as error:  # onnxruntime's exception classes share no public base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"{path.name}: cannot be run layer by layer: {lines[0]}") from error
