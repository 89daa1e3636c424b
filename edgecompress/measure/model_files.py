"""Any ONNX files, ours or not: what to call them, what they take, and one clear reason where one cannot be measured.

What enters: paths that a user gave. What leaves: names that tell the files apart, and for each file its inputs. A file
is refused before anything is measured, so that a fault in the third file does not cost the time of the first two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from edgecompress.errors import ModelError
from edgecompress.measure.integer_graph import input_side
from edgecompress.measure.measure_worker import DTYPES, input_shape

Shapes = Mapping[str, Sequence[int | None]]


@dataclass(frozen=True)
class ModelFile:
    """An ONNX file that ONNX Runtime loads: its inputs as they are fed, and the images of one inference.

    `batch` is None where the first axis is free, and the images of one inference where the file or --shape fixes it.
    `sizes` [input] are what free axes must be given, None where an axis is left to the batch.
    """

    path: Path
    inputs: tuple[dict[str, Any], ...]
    batch: int | None
    sizes: dict[str, list[int | None]]

    @property
    def images(self) -> int:
        """Images of one inference as it is measured."""
        return self.batch or 1


def name_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Names by stem, with as much of the folder as tells two files apart, and a number for a file given twice."""
    resolved = [path.resolve() for path in paths]
    names: dict[str, Path] = {}
    for path, whole in zip(paths, resolved, strict=True):
        parts = whole.with_suffix("").parts
        others = [other.with_suffix("").parts for other in resolved if other != whole]
        length = next((n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)), 1)
        name = "/".join(parts[-length:])
        count = sum(known == name or known.startswith(f"{name}#") for known in names)
        names[name if not count else f"{name}#{count + 1}"] = path
    return names


def parse_shapes(texts: Sequence[str]) -> dict[str, list[int]]:
    """`input=1x3x224x224` as given on the command line. Raises ModelError."""
    shapes: dict[str, list[int]] = {}
    for text in texts:
        name, separator, sizes = text.rpartition("=")
        words = sizes.replace(",", "x").split("x")
        if not separator or not name or not all(word.isdigit() and int(word) > 0 for word in words):
            raise ModelError(f"--shape {text}: give the input's name and sizes, such as --shape input=1x3x224x224")
        shapes[name] = [int(word) for word in words]
    return shapes


def open_files(models: Mapping[str, Path], shapes: Shapes) -> dict[str, ModelFile]:
    """Load every file once and read its inputs. Raises ModelError with the faults of all of them."""
    files: dict[str, ModelFile] = {}
    faults: list[str] = []
    for name, path in models.items():
        try:
            files[name] = _open(path, shapes)
        except ModelError as error:
            faults.append(str(error))
    known = {entry["name"] for file in files.values() for entry in file.inputs}
    unknown = [name for name in shapes if name not in known]
    if unknown and not faults:
        faults.append(f"--shape {unknown[0]}: no file has such an input; there are {', '.join(sorted(known))}")
    if faults:
        raise ModelError("\n".join(faults))
    return files


def _open(path: Path, shapes: Shapes) -> ModelFile:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises a type of its own per status code, with no common base
        reason = _reason(path, error)
        raise ModelError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {reason}") from error
    inputs = []
    given = {name: list(sizes) for name, sizes in shapes.items()}
    fed: dict[str, list[int | None]] = {}
    side = input_side(onnx.load(str(path), load_external_data=False))
    for node in session.get_inputs():
        # A file of ours with its preprocessing inside takes photographs of any size; the model's own is as good as any.
        photographs = side is not None and len(node.shape) == 4 and node.name not in given
        own = [None, side, side, node.shape[3]] if photographs else given.get(node.name)
        if own is not None:
            fed[node.name] = own
        if node.type not in DTYPES:
            raise ModelError(f"{path}: input '{node.name}' is {node.type}; known are {', '.join(DTYPES)}")
        try:
            shape = input_shape(node.name, node.shape, batch=1, given=fed)
        except ValueError as error:
            example = "x".join(str(size) if isinstance(size, int) else "SIZE" for size in node.shape)
            raise ModelError(f"{path}: {error}; give their sizes, such as --shape {node.name}={example}") from error
        inputs.append({"name": node.name, "type": node.type, "shape": shape, "axes": list(node.shape)})
    if not inputs:
        raise ModelError(f"{path}: the model takes no input, so there is nothing to run it on")
    # With sizes given for all axes the batch is one of them.
    free = not inputs[0]["axes"] or not isinstance(inputs[0]["axes"][0], int)
    sizes = {entry["name"] for entry in inputs} & set(shapes)
    batch = None if free and not sizes else (inputs[0]["shape"] or [1])[0]
    return ModelFile(path, tuple(inputs), batch, fed)


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with a file that does not load: most often it is no ONNX file at all."""
    if not path.stat().st_size:
        return "it is empty"
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf's errors share no public base
        return "it is no ONNX file"
    if not model.graph.node:
        return "it is no ONNX file, or one without a single node"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
