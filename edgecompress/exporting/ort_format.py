"""ORT format: the exported files for mobile and minimal builds of ONNX Runtime, through its own tools.

What enters: ONNX files. What leaves: `.ort` files beside them, the list of operators that a minimal build needs, and
what ONNX Runtime's mobile usability checker says. The optimizer has run when an .ort file is written, so what it chose
is fixed: the conversion leaves out the one pass whose result depends on the vector width of the machine at hand.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecompress.errors import ExportError
from edgecompress.run_directory import atomic_path, write_text
from edgecompress.settings.target import Target

OPERATORS_FILE = "required_operators_and_types.config"
_PROVIDERS = {
    "nnapi": None,
    "coreml_neuralnetwork": "coreml_supported_neuralnetwork_ops.md",
    "coreml_mlprogram": "coreml_supported_mlprogram_ops.md",
}
Json = dict[str, Any]


def convert(models: Sequence[Path], folder: Path, *, target: Target) -> list[Path]:
    """Write `<name>.ort` into `folder` for each ONNX file, and OPERATORS_FILE for all of them; returns the .ort files.

    For Arm targets int8 x int8 is fused, as Arm builds do. Raises ExportError with the converter's own words.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "onnx", Path(scratch) / "ort"
        given.mkdir()
        for model in models:
            shutil.copyfile(model, given / model.name)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), _quiet_logs(), warnings.catch_warnings():
                warnings.simplefilter("ignore", category=ResourceWarning)  # the tool leaves its files to be collected
                convert_onnx_models_to_ort(
                    given,
                    output_dir=made,
                    optimization_styles=[OptimizationStyle.Fixed],
                    target_platform="arm" if target.architecture == "aarch64" else None,
                    enable_type_reduction=True,
                )
        except Exception as error:  # the runtime's exception classes share no public base
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"ORT format: ONNX Runtime's converter failed: {words}; export without --ort") from error
        files = []
        for model in models:
            files.append(folder / f"{model.stem}.ort")
            with atomic_path(files[-1]) as temporary:
                shutil.copyfile(made / f"{model.stem}.ort", temporary)
        # Its comments name the files by their full paths, which are those of a folder that is gone.
        lines = (made / OPERATORS_FILE).read_text(encoding="utf-8").splitlines()
        names = [f"# {path.name}" for path in files]
        write_text(folder / OPERATORS_FILE, "\n".join([*names, *(x for x in lines if not x.startswith("#"))]) + "\n")
    return files


def remove_stale(folder: Path) -> list[str]:
    """Remove what an earlier `convert` left in `folder`; returns the names. They would belong to other ONNX files."""
    stale = [*folder.glob("*.ort"), *folder.glob(OPERATORS_FILE)]
    for path in stale:
        path.unlink()
    return sorted(path.name for path in stale)


def mobile_usability(model: Path) -> Json:
    """What ONNX Runtime's mobile usability checker says of one ONNX file, by provider of phones.

    For each: `as_is` and `with_fixed_shapes` ("YES", "MAYBE" or "NO": would the provider help?), `supported_nodes` and
    `partitions` with the shapes fixed, and `unsupported_operators`. Raises ExportError.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker as checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    with tempfile.TemporaryDirectory() as scratch, _quiet_logs():
        basic = Path(scratch) / model.name
        try:
            optimize_model(model, basic)
            shaped = ModelProtoWithShapeInfo(basic).model_with_shape_info
            dynamic, _ = checker.check_shapes(shaped.graph)
            answer: Json = {
                "inputs_with_free_shapes": [value.name for value in dynamic],
                "nodes": len(shaped.graph.node),
            }
            for name, operators in _PROVIDERS.items():
                as_is, fixed = (
                    checker.check_nnapi_partitions(shaped, strict)
                    if operators is None
                    else checker.check_coreml_partitions(shaped, strict, operators)
                    for strict in (True, False)
                )
                answer[name] = {
                    "as_is": as_is.suitability().name,
                    "with_fixed_shapes": fixed.suitability().name,
                    "supported_nodes": fixed.num_supported_nodes,
                    "partitions": fixed.num_partitions,
                    "unsupported_operators": sorted(str(name) for name in fixed.unsupported_ops),
                }
        except Exception as error:  # the tool's own exceptions, and the runtime's, share no base
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{model.name}: ONNX Runtime's mobile usability checker failed: {words}") from error
    return answer


@contextlib.contextmanager
def _quiet_logs() -> Any:
    """The tools log what is returned here anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
