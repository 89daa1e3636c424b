"""Names of nodes: modules in, modules out again, for our files and for those of other exporters."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.exporting.node_names import module_in_name, modules_of, name_nodes
from edgecompress.exporting.onnx_export import Provenance, export_onnx
from edgecompress.settings.target import load_target


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(self.conv(images))) + images


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Block(), Block())
        self.head = nn.Linear(3 * 8 * 8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(images).flatten(1))


def test_exported_nodes_are_called_after_their_modules(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    preprocessing = Preprocessing(input_size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    export_onnx(
        Net().eval(),
        torch.zeros(2, 3, 8, 8),
        path,
        target=load_target("x86"),
        preprocessing=preprocessing,
        provenance=Provenance(("a", "b", "c", "d"), "test", "0" * 64, {}),
        extra_metadata={},
    )
    model = onnx.load(path)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    # The batch norm is folded into the convolution, which keeps its own name.
    for wanted in ("stem.0.conv/Conv", "stem.0.relu/Relu", "stem.0/Add", "stem.1.conv/Conv", "head/Gemm"):
        assert wanted in names
    assert modules_of(model)["stem.1.conv/Conv"] == "stem.1.conv"


def test_rounding_belongs_to_what_it_rounds() -> None:
    def scoped(operator: str, inputs: list[str], output: str, scope: str | None = None) -> onnx.NodeProto:
        node = helper.make_node(operator, inputs, [output])
        if scope is not None:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{scope}', 'op']")
        return node

    nodes = [
        scoped("DequantizeLinear", ["w", "s", "z"], "weight"),
        scoped("QuantizeLinear", ["input", "s", "z"], "q"),
        scoped("DequantizeLinear", ["q", "s", "z"], "dq"),
        scoped("Conv", ["dq", "weight"], "c", "first.conv"),
        scoped("QuantizeLinear", ["c", "s", "z"], "q2"),
        scoped("DequantizeLinear", ["q2", "s", "z"], "dq2"),
    ]
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in ("w", "s", "z")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], constants))
    name_nodes(model)
    assert [node.name for node in model.graph.node] == [
        "first.conv/DequantizeLinear",
        "model/QuantizeLinear",
        "model/DequantizeLinear",
        "first.conv/Conv",
        "first.conv/QuantizeLinear",
        "first.conv/DequantizeLinear_2",
    ]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("layer1.0.conv1/Conv_2", "layer1.0.conv1"),
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("/features/features.3/block/block.1/Mul", "features.3.block.1"),
        ("resnet/unit_1/Conv2D", "resnet.unit_1"),
        ("Conv_12", None),
        ("", None),
    ],
)
def test_modules_in_names_of_several_exporters(name: str, module: str | None) -> None:
    assert module_in_name(name) == module


def test_a_node_without_scope_stands_for_itself() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="Relu_3")
    unnamed = helper.make_node("Relu", ["y"], ["z"])
    model = helper.make_model(helper.make_graph([node, unnamed], "g", [], []))
    assert modules_of(model) == {"Relu_3": "Relu_3", "y": "Relu_3", "z": "z"}
