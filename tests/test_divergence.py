"""Where a file first differs: one layer is broken on purpose, and must be named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgecompress.exporting.divergence import first_divergence
from edgecompress.settings.target import load_target
from int8_models import Residual, SqueezeExcite, export, images, seeded

TARGET = load_target("x86-avx2")


def _break(path: Path, operator: str, number: int) -> None:
    """Change one weight of the given node."""
    model = onnx.load(path)
    node = [node for node in model.graph.node if node.op_type == operator][number]
    constant = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    values = numpy_helper.to_array(constant).copy()
    values.flat[0] += 0.5 * np.abs(values).max()
    constant.CopyFrom(numpy_helper.from_array(values, constant.name))
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("operator", "number", "layer"), [("Conv", 1, "depthwise"), ("Conv", 2, "project"), ("Gemm", 1, "head")]
)
def test_the_broken_layer_is_named(tmp_path: Path, operator: str, number: int, layer: str) -> None:
    module, path = seeded(Residual()), tmp_path / "model.onnx"
    export(module, path, target=TARGET)
    assert first_divergence(module, path, images(2), target=TARGET, limit=1e-4) is None
    _break(path, operator, number)
    found = first_divergence(module, path, images(2), target=TARGET, limit=1e-4)
    assert found is not None
    assert found.layer == layer
    assert found.relative_diff > 1e-3
    assert layer in found.sentence
    assert found.last_agreeing_layer not in (None, layer)


def test_a_branch_that_is_not_broken_is_not_named(tmp_path: Path) -> None:
    module, path = seeded(SqueezeExcite()), tmp_path / "model.onnx"
    export(module, path, target=TARGET)
    _break(path, "Conv", 2)
    found = first_divergence(module, path, images(2), target=TARGET, limit=1e-4)
    assert found is not None
    assert (found.layer, found.last_agreeing_layer) == ("excite", "relu")
