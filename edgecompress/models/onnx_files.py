"""ONNX files in, models out: one place that opens them, and one clear reason where one cannot be opened.

What enters: a path from anywhere. What leaves: the model with all its weights. A file that takes weights from another
file is refused, since a path in it could name any file of this machine; the export writes one file each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from edgecompress.errors import ModelError


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model of an ONNX file. Raises ModelError when it is none, or is not whole."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors share no public base
        raise ModelError(f"{path}: is no ONNX file ({' '.join(str(error).split())[:200]}); export it again") from error
    if takes_other_files(model):
        raise ModelError(f"{path}: takes weights from another file, which an exported model may not; export it again")
    return model


def takes_other_files(model: onnx.ModelProto) -> bool:
    """Whether any tensor of the model, in a graph within it too, is kept in another file."""
    graphs = [model.graph, *model.functions]
    return any(onnx.external_data_helper.uses_external_data(t) for graph in graphs for t in _tensors(graph))


def _tensors(graph: Any) -> Iterator[Any]:
    """Every constant of a graph or function, those of graphs within it included."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (
                attribute.t,
                *attribute.tensors,
                attribute.sparse_tensor.values,
                attribute.sparse_tensor.indices,
            )
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
