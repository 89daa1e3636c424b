"""What captures leave in the caches of the libraries: nothing, after graphs are let go of."""

from __future__ import annotations

import gc
import linecache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import int8_models
from edgecompress.models.graph_caches import forget_graphs


class Net(nn.Module):
    """A convolution with its batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = int8_models.conv(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).relu().mean((2, 3)))  # type: ignore[no-any-return]


def _held() -> tuple[int, int]:
    """Graphs that are alive, and sources of functions that torch.fx wrote."""
    gc.collect()
    graphs = sum(type(found).__name__ == "GraphModule" for found in gc.get_objects())
    return graphs, sum(name.startswith("<eval_with_key>") for name in linecache.cache)


def test_rounds_of_quantizing_and_exporting_leave_no_graph_and_no_source(tmp_path: Path) -> None:
    held = []
    for number in range(3):
        model = int8_models.quantized(int8_models.seeded(Net()))
        int8_models.export(model.graph, tmp_path / f"{number}.onnx")
        del model
        held.append(_held())
    assert held[1] == held[2]
    assert held[2][1] == 0


def test_a_graph_runs_on_and_can_be_copied_without_the_source_of_its_forward() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    images = torch.randn(3, 4)
    before = graph(images)
    forget_graphs()
    again = GraphModule(graph, graph.graph)
    again.recompile()
    assert torch.equal(again(images), before)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        graph(torch.randn(3, 5))
