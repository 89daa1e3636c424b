"""PyTorch to ONNX: the float file and the int8 QDQ file, each checked and loaded before it is given its name.

What enters: a float module or a quantized graph. What leaves: one ONNX file with a dynamic batch, whose metadata
says what the device must know: labels, input size, mean and std, and where the model came from.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from edgecompress import console
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ExportError
from edgecompress.exporting.node_names import name_nodes
from edgecompress.exporting.onnx_rewrite import rewrite
from edgecompress.exporting.preprocessing_graph import describe_signature, embed_preprocessing
from edgecompress.models.graph_caches import forget_graphs
from edgecompress.run_directory import atomic_path
from edgecompress.settings.target import INT8_ACTIVATIONS_KEY, Target

INPUT_NAME = "input"
OUTPUT_NAME = "logits"


@dataclass(frozen=True)
class Provenance:
    """What is written into the file's metadata beside the preprocessing."""

    class_names: tuple[str, ...]
    recipe_name: str
    recipe_sha256: str
    versions: dict[str, str]


def export_onnx(
    module: nn.Module,
    example: Tensor,
    path: Path,
    *,
    target: Target,
    preprocessing: Preprocessing,
    provenance: Provenance,
    extra_metadata: dict[str, str],
) -> dict[str, int]:
    """Write `module` as ONNX; returns how often each graph rewrite was made.

    Input `input`, float32 [batch, C, H, W], normalized; output `logits`, float32 [batch, classes]. Raises
    ExportError when the exporter, the ONNX checker or ONNX Runtime refuses the model.
    """
    with console.busy(f"exporting {path.name}"):
        model: onnx.ModelProto = translate(module, example, target).model_proto
        rewrites = rewrite(model)
    name_nodes(model)
    _tidy(model, target)
    _write_metadata(model, preprocessing, provenance, extra_metadata)
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))
        check_file(temporary)
    return rewrites


def export_with_preprocessing(plain: Path, path: Path) -> None:
    """Write the exported file `plain` as `path` with the preprocessing that it names inside. Raises ExportError."""
    source = onnx.load(plain)
    facts = {entry.key: entry.value for entry in source.metadata_props}
    model = embed_preprocessing(source, Preprocessing.from_dict(json.loads(facts["edgecompress.preprocessing"])))
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))
        check_file(temporary)


def translate(module: nn.Module, example: Tensor, target: Target) -> torch.onnx.ONNXProgram:
    """The module as torch's exporter writes it, before any rewrite. Raises ExportError."""
    # A channels_last layout would be exported too, as gathers that move it back.
    module = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    try:
        for child in module.modules():
            child.training = False  # a converted graph refuses eval(), and its mode is fixed in its nodes anyway
        with warnings.catch_warnings():
            # The exporter warns about its own internals (copyreg, deprecated enums), not about the model.
            warnings.simplefilter("ignore", category=FutureWarning)
            warnings.simplefilter("ignore", category=DeprecationWarning)
            # Captured here, since torch.onnx.export would fall back to ways that give up the free batch in silence.
            captured = torch.export.export(
                module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
            )
            _refuse_own_divisors(captured)
            _forget_strides_of_pools(captured)
            _write_limits_as_floats(captured)
            program = torch.onnx.export(
                captured,
                dynamo=True,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                opset_version=target.opset,
                verbose=False,
            )
    except ExportError:
        raise
    except Exception as error:  # both raise many unrelated types for graphs that they cannot translate
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps the cause in advice on how to report it
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ExportError(
            f"the model cannot be exported to ONNX: {lines[0]}; "
            "its forward must not depend on tensor values, and must take one image batch of any size"
        ) from error
    del captured
    forget_graphs()
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    return program


def _refuse_own_divisors(captured: torch.export.ExportedProgram) -> None:
    """Raise ExportError for average pools with `divisor_override`: ONNX has none, and torch's exporter drops it."""
    for node in captured.graph.nodes:
        if node.target is torch.ops.aten.avg_pool2d.default and len(node.args) > 6 and node.args[6] is not None:
            modules = list((node.meta.get("nn_module_stack") or {}).values())
            place = str(modules[-1][0]) if modules else ""
            raise ExportError(
                f"{place or node.name}: divisor_override={node.args[6]} of an average pool cannot be exported to ONNX; "
                "leave it out, and multiply what the pool gives by (height * width of its kernel) / divisor"
            )


def _write_limits_as_floats(captured: torch.export.ExportedProgram) -> None:
    """Write 0 as 0.0 where floats are clamped.

    The exporter would promote it to a tensor: a clamp at the integer 0 becomes a Max, which the runtime takes into no
    integer kernel, and one between an integer and a float is refused.
    """
    aten = torch.ops.aten
    for node in captured.graph.nodes:
        if node.target not in (aten.clamp.default, aten.clamp_.default):
            continue
        value = node.args[0].meta.get("val")
        if value is not None and value.is_floating_point():
            limits = (float(limit) if isinstance(limit, int) else limit for limit in node.args[1:])
            node.args = (node.args[0], *limits)
    captured.graph_module.recompile()


def _forget_strides_of_pools(captured: torch.export.ExportedProgram) -> None:
    """Write a global average pool as a mean over height and width.

    The exporter would do so too, but behind a channels_last tensor (ConvNeXt) it adds an `as_strided`, which becomes a
    gather and keeps the pool from its integer kernel.
    """
    aten = torch.ops.aten
    for node in list(captured.graph.nodes):
        if node.target is not aten.adaptive_avg_pool2d.default or any(int(size) != 1 for size in node.args[1]):
            continue
        value = node.args[0].meta.get("val")
        if value is None or value.dim() != 4:
            continue
        with captured.graph.inserting_before(node):
            mean = captured.graph.call_function(aten.mean.dim, (node.args[0], [2, 3], True))
        mean.meta = dict(node.meta)
        node.replace_all_uses_with(mean)
        captured.graph.erase_node(node)
    captured.graph_module.recompile()


def _tidy(model: onnx.ModelProto, target: Target) -> None:
    """Lower the IR version to what the target's runtime reads; drop the exporter's stack traces (and paths)."""
    model.ir_version = target.ir_version
    model.producer_name = "edgecompress"
    model.doc_string = ""
    model.graph.doc_string = ""
    model.graph.name = "model"
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for element in [*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]:
        del element.metadata_props[:]
        element.doc_string = ""
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # torch.export's own name for it, such as s77
                dim.dim_param = "batch"
    # The runtime infers the inner shapes again; they would only add bytes.
    del model.graph.value_info[:]


def _write_metadata(
    model: onnx.ModelProto, preprocessing: Preprocessing, provenance: Provenance, extra: dict[str, str]
) -> None:
    entries: dict[str, Any] = {
        "preprocessing": json.dumps(preprocessing.to_dict()),
        "labels": json.dumps(list(provenance.class_names), ensure_ascii=False),
        "recipe": provenance.recipe_name,
        "recipe_sha256": provenance.recipe_sha256,
        "versions": json.dumps(provenance.versions),
        **extra,
    }
    onnx.helper.set_model_props(model, {f"edgecompress.{key}": value for key, value in entries.items()})
    describe_signature(model)


def check_file(path: Path) -> None:
    """Run the ONNX checker with shape inference, then load the file. Raises ExportError."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: the ONNX checker refuses it: {str(error).splitlines()[0]}") from error
    open_session(path)


def open_session(
    path: Path, *, target: Target | None = None, threads: int = 0, optimize: bool = True
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU provider; `threads` 0 uses every core. Raises ExportError.

    With a `target` the machine at hand runs the graph that the target's sessions run: on x86, ONNX Runtime leaves int8
    activations in float where Arm builds fuse them. Without `optimize` the graph runs as it is written: an int8
    model's layers are then computed in float.
    """
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if target is not None:
        options.add_session_config_entry(INT8_ACTIVATIONS_KEY, "1" if target.fuses_int8_activations else "0")
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes share no public base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"{path}: ONNX Runtime cannot load it: {lines[0]}") from error
