"""The two integer kernels of a convolution: the same answers from both, and the faster one chosen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from torch import Tensor, nn

import int8_models
from edgecompress.errors import ExportError
from edgecompress.exporting.onnx_rewrite import GraphIndex
from edgecompress.int8 import conv_kernels
from edgecompress.int8.conv_kernels import choose_conv_kernels, use_matrix_products
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.measure.statistics import RatioInterval
from edgecompress.settings.target import Target, load_target


class Net(nn.Module):
    """A plain, a strided, a depthwise and a pointwise convolution, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = int8_models.conv(3, 16, 3)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.depthwise = int8_models.conv(32, 32, 3, groups=32)
        self.pointwise = nn.Conv2d(32, 48, 1)
        self.head = nn.Linear(48, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).relu()
        hidden = self.down(hidden).relu()
        hidden = self.pointwise(self.depthwise(hidden).relu()).relu()
        return self.head(hidden.mean((2, 3)))  # type: ignore[no-any-return]


UNGROUPED = ["down/Conv", "pointwise/Conv", "stem/Conv"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = int8_models.quantized(int8_models.seeded(Net()))
    path = tmp_path / "model.int8.onnx"
    int8_models.export(model.graph, path)
    return path


def zero_points(path: Path) -> dict[str, set[int]]:
    model = onnx.load(path)
    index, found = GraphIndex(model.graph), {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            scaling = index.producer[node.input[1]]
            zero = index.constant(scaling.input[2]) if len(scaling.input) > 2 else None
            found[node.name] = {0} if zero is None else set(np.unique(zero).tolist())
    return found


def test_matrix_products_give_the_same_answers_to_the_last_bit(file: Path) -> None:
    images = int8_models.images(8)
    before, graph = int8_models.run(file, images), inspect_integer_graph(file)
    assert use_matrix_products(file, UNGROUPED) == 3
    onnx.checker.check_model(str(file), full_check=True)
    assert np.array_equal(int8_models.run(file, images), before)
    assert inspect_integer_graph(file).op_counts == graph.op_counts  # still fused: nothing fell back to float
    assert zero_points(file) == {**{name: {-1} for name in UNGROUPED}, "depthwise/Conv": {0}}


def test_only_the_named_ones_change_and_they_are_counted(file: Path) -> None:
    assert use_matrix_products(file, ["stem/Conv", "gone/Conv", "depthwise/Conv"]) == 1
    assert zero_points(file)["stem/Conv"] == {-1}
    assert zero_points(file)["down/Conv"] == {0}


def test_weights_that_cannot_be_shifted_stay(file: Path) -> None:
    model = onnx.load(file)
    index = GraphIndex(model.graph)
    stem = next(node for node in model.graph.node if node.name == "stem/Conv")
    name = index.producer[stem.input[1]].input[0]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    weight = onnx.numpy_helper.to_array(tensor).copy()
    weight.flat[0] = -128
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, file)
    assert use_matrix_products(file, UNGROUPED) == 2
    assert zero_points(file)["stem/Conv"] == {0}


def _at_hand(monkeypatch: pytest.MonkeyPatch, features: list[str]) -> Target:
    monkeypatch.setattr(conv_kernels, "isa_features", lambda: features)
    monkeypatch.setattr(conv_kernels, "not_at_hand", lambda target: [])
    monkeypatch.setattr(conv_kernels, "_LEAST_MACS", 1)
    return load_target("x86")


def _measured(monkeypatch: pytest.MonkeyPatch, ratio: RatioInterval) -> None:
    """Kernel times in which stem is far slower as a matrix product, down far faster, pointwise by 3 % only."""
    times = {"stem/Conv": (1.0, 2.0), "down/Conv": (2.0, 1.0), "pointwise/Conv": (1.0, 0.97)}

    def kernel_times(path: Path, **_: Any) -> Any:
        column = int(path.name == "shifted.onnx")
        rows = [SimpleNamespace(name=name, ms=ms[column], operator="QLinearConv") for name, ms in times.items()]
        return SimpleNamespace(kernels=rows)

    monkeypatch.setattr(conv_kernels, "kernel_times", kernel_times)
    answer = SimpleNamespace(ratio=lambda before, after: ratio)
    monkeypatch.setattr(conv_kernels, "measure_latency", lambda files, **_: answer)


def test_each_convolution_gets_the_kernel_that_was_faster(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _at_hand(monkeypatch, ["avx2", "amx_int8"])
    _measured(monkeypatch, RatioInterval(1.2, 1.1, 1.3))
    chosen = choose_conv_kernels(file, target)
    assert chosen is not None
    assert chosen.nodes == ("down/Conv",)
    assert chosen.candidates == 3
    assert "1 of 3 convolutions" in chosen.sentence
    assert zero_points(file)["down/Conv"] == {0}  # choosing changes nothing


def test_a_gain_that_the_whole_model_does_not_show_is_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _at_hand(monkeypatch, ["amx_int8"])
    _measured(monkeypatch, RatioInterval(1.01, 0.99, 1.03))
    chosen = choose_conv_kernels(file, target)
    assert chosen is not None
    assert chosen.nodes == ()
    assert chosen.to_dict() == {"nodes": [], "candidates": 3, "speedup": None, "speedup_ci95": None}


def test_nothing_is_measured_where_there_is_nothing_to_choose(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    target = _at_hand(monkeypatch, ["avx2", "avx512_vnni"])
    monkeypatch.setattr(conv_kernels, "kernel_times", refuse)
    assert choose_conv_kernels(file, target) is None  # no such instructions
    monkeypatch.setattr(conv_kernels, "isa_features", lambda: ["amx_int8"])
    assert choose_conv_kernels(file, load_target("x86-vnni")) is None  # the target's files go to other CPUs too
    monkeypatch.setattr(conv_kernels, "_LEAST_MACS", 10**9)
    assert choose_conv_kernels(file, target) is None  # too small
    monkeypatch.setattr(conv_kernels, "not_at_hand", lambda target: ["another machine"])
    monkeypatch.setattr(conv_kernels, "_LEAST_MACS", 1)
    assert choose_conv_kernels(file, target) is None


def test_kernels_that_disagree_are_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _at_hand(monkeypatch, ["amx_int8"])
    _measured(monkeypatch, RatioInterval(1.2, 1.1, 1.3))
    shifted = conv_kernels._shifted

    def wrong(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
        made = shifted(model, names)
        for tensor in made.graph.initializer:
            if tensor.name.endswith("_zero_point"):
                tensor.CopyFrom(
                    onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.int8(5), tensor.name)
                )
        return made

    monkeypatch.setattr(conv_kernels, "_shifted", wrong)
    with pytest.raises(ExportError, match="conv_kernels: symmetric"):
        choose_conv_kernels(file, target)
