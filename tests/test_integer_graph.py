"""MACs and integer coverage, against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import helper

from edgecompress.errors import ProfileError
from edgecompress.measure.integer_graph import inspect_integer_graph
from onnx_models import SIZE, _constant, quantized, residual_net, residual_net_macs, save


# 5 channels fill no vector, so the layout pass pads them: the padding must not count as work.
@pytest.mark.parametrize("channels", [8, 5])
def test_float_model_has_hand_counted_macs_and_no_integers(tmp_path: Path, channels: int) -> None:
    graph = inspect_integer_graph(residual_net(tmp_path / "net.onnx", channels))
    assert graph.macs == sum(residual_net_macs(channels).values())
    assert graph.int8_mac_coverage == 0.0
    assert graph.integer_nodes == graph.quantize_nodes == 0
    assert len(graph.float_islands) == 1
    assert graph.float_islands[0]["macs_share"] == pytest.approx(1.0)
    assert graph.weights_bytes >= 4 * (channels * 27 + channels * 9 + 6 * channels + 6)


@pytest.mark.parametrize("channels", [8, 5])
def test_quantized_model_runs_wholly_on_integers(tmp_path: Path, channels: int) -> None:
    source = residual_net(tmp_path / "net.onnx", channels)
    graph = inspect_integer_graph(quantized(source, tmp_path / "int8.onnx"))
    assert graph.macs == sum(residual_net_macs(channels).values())
    assert graph.int8_mac_coverage == 1.0
    assert graph.op_counts["QLinearConv"] == 2
    assert graph.op_counts["QGemm"] == 1
    assert graph.op_counts["QLinearAdd"] == 1
    assert graph.integer_nodes >= 4
    assert graph.float_islands == []
    assert graph.quantize_nodes == 1
    assert graph.weights_bytes < inspect_integer_graph(source).weights_bytes


def test_layer_left_in_float_lowers_coverage_by_its_share(tmp_path: Path) -> None:
    source = residual_net(tmp_path / "net.onnx")
    graph = inspect_integer_graph(quantized(source, tmp_path / "int8.onnx", exclude=["stem"]))
    macs = residual_net_macs()
    share = macs["stem"] / sum(macs.values())
    assert graph.int8_mac_coverage == pytest.approx(1 - share)
    heaviest = graph.float_islands[0]
    assert heaviest["macs_share"] == pytest.approx(share)
    assert "stem" in heaviest["nodes"][0]


def test_float_islands_are_told_apart(tmp_path: Path) -> None:
    source = residual_net(tmp_path / "net.onnx")
    graph = inspect_integer_graph(quantized(source, tmp_path / "int8.onnx", exclude=["stem", "head"]))
    shares = [island["macs_share"] for island in graph.float_islands]
    macs = residual_net_macs()
    assert shares == pytest.approx([macs["stem"] / sum(macs.values()), macs["head"] / sum(macs.values())])


def test_matrix_products_and_transposed_convolutions(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ConvTranspose", ["input", "up"], ["wide"], strides=[2, 2], kernel_shape=[2, 2]),
        helper.make_node("MatMul", ["wide", "right"], ["product"]),
        helper.make_node("GlobalAveragePool", ["product"], ["logits"]),
    ]
    path = save(tmp_path / "net.onnx", nodes, [_constant("up", 3, 4, 2, 2), _constant("right", 8, 5)], ["N", 3, 4, 4])
    # 3 x 16 inputs each spread over 4 x 4 weights; then 4 x 8 rows of 8, times 5 columns.
    assert inspect_integer_graph(path).macs == 3 * 16 * 4 * 4 + 4 * 8 * 8 * 5


def test_free_axes_beside_the_batch_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["input", "w"], ["logits"], kernel_shape=[3, 3])]
    path = save(tmp_path / "net.onnx", nodes, [_constant("w", 4, 3, 3, 3)], ["N", 3, "H", "W"])
    with pytest.raises(ProfileError, match="free axes"):
        inspect_integer_graph(path)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ProfileError, match=r"broken\.onnx.*does not load"):
        inspect_integer_graph(broken)
    with pytest.raises(ProfileError, match="no such file"):
        inspect_integer_graph(tmp_path / "absent.onnx")


def test_every_float_island_says_why(tmp_path: Path) -> None:
    source = residual_net(tmp_path / "net.onnx", 16, 32)
    (whole,) = inspect_integer_graph(source).float_islands
    assert whole["reason"] == "nothing in this file is rounded to integers"
    left = inspect_integer_graph(quantized(source, tmp_path / "int8.onnx", exclude=["head"], size=32)).float_islands
    (head,) = [island for island in left if island["macs_share"] > 0]
    assert head["reason"] == "the file leaves Gemm in float: no rounding stands around it"


def test_an_operator_without_an_integer_kernel_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], name="a", kernel_shape=[3, 3]),
        helper.make_node("Softplus", ["a"], ["b"], name="b"),
        helper.make_node("Conv", ["b", "v"], ["logits"], name="c", kernel_shape=[3, 3]),
    ]
    weights = [_constant("w", 4, 3, 3, 3), _constant("v", 4, 4, 3, 3)]
    source = save(tmp_path / "net.onnx", nodes, weights, ["N", 3, SIZE, SIZE])
    islands = inspect_integer_graph(quantized(source, tmp_path / "int8.onnx")).float_islands
    assert [island["reason"] for island in islands] == ["the CPU provider has no integer kernel for Softplus"]


def test_free_axes_can_be_given_a_size(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["input", "w"], ["logits"], kernel_shape=[3, 3])]
    path = save(tmp_path / "net.onnx", nodes, [_constant("w", 4, 3, 3, 3)], ["N", 3, "H", "W"])
    assert inspect_integer_graph(path, shapes={"input": [1, 3, 6, 5]}).macs == 4 * 3 * 4 * 3 * 9
    with pytest.raises(ProfileError, match="does not fit"):
        inspect_integer_graph(path, shapes={"input": [1, 4, 6, 5]})
