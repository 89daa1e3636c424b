"""Files made bad by chance: bytes, text, documents and tensors changed by a seeded generator.

What enters: the content of a good file and a generator. What leaves: the content of a bad one, the same for the same
seed, so that a fault can be made again.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import onnx
import yaml

_BYTES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\n", b"{", b"[", b'"', b"\xef\xbb\xbf")
_WORDS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "null", "true", "~", "[", "]", "{", "}", ":", ",", '"'),
    *("\\ud800", "\x00", "\t", "&a", "*a", "!!python/object/apply:os.system [true]", "9" * 400, "- " * 300),
    *("[" * 5000, '{"a":' * 3000, "../../../etc/passwd", "/etc/passwd", "x" * 10_000, "\udcff", "---\n", "<<: *x"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 1e308, -1e308, 1e-320, 0.5),
    *(float("nan"), float("inf"), "", " ", "x", "nan", "1e999", "../../../etc/passwd", "/etc/passwd", "a\x00b"),
    *("x" * 5000, "<script>alert(1)</script>", "\u202e", "\ud800", "{{ 7 * 7 }}", [], {}, [[]], [None], {"": None}),
    *([0] * 2000, {"a": {"b": {"c": [1, 2, {"d": None}]}}}, [1, "a", None, {}], [float("nan")], [float("inf")] * 3),
)


def bytes_changed(content: bytes, chance: random.Random) -> bytes:
    """One to eight changes anywhere in the file: bits, slices, the end."""
    if chance.random() < 0.03:
        return chance.choice((b"", b"\n", b"null", b"\x00" * 64, chance.randbytes(256), content * 2))
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        if not data:
            break
        place = chance.randrange(len(data)) if chance.random() < 0.6 else chance.randrange(min(len(data), 256))
        length = chance.choice((1, 2, 4, 16, 200))
        kind = chance.randrange(8)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place : place + 1] = chance.choice(_BYTES)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            data[place:place] = chance.randbytes(length)
        elif kind == 5:
            data[place : place + length] = bytes(min(length, len(data) - place))
        elif kind == 6:
            del data[place:]
        else:
            data[place : place + 8] = struct.pack("<Q", chance.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
    return bytes(data)


def text_changed(content: bytes, chance: random.Random) -> bytes:
    """Words that mean something to a parser, put in or in place of others."""
    text = content.decode("utf-8", "surrogateescape")
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice(_WORDS) + text[place + chance.choice((0, 0, 1, 5, 30)) :]
    return text.encode("utf-8", "surrogateescape")


def document_changed(document: Any, chance: random.Random) -> Any:
    """A copy of a parsed document with one to four values replaced, removed, renamed, doubled or exchanged."""
    whole = [copy.deepcopy(document)]
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = [(parent, key) for parent, key in _places(whole) if parent is not whole or chance.random() < 0.1]
        if not places:
            break
        parent, key = chance.choice(places)
        kind = chance.randrange(6)
        if kind <= 2 or parent is whole:
            parent[key] = copy.deepcopy(chance.choice(VALUES))
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, dict):
            parent[chance.choice(("", "x", "../x", f"{key}s", f" {key}"))] = parent.pop(key)
        elif kind == 4:
            parent.append(copy.deepcopy(parent[key]))
        else:
            other, place = chance.choice(places)
            parent[key] = copy.deepcopy(other[place])
    return whole[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        here = waiting.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            found.append((here, key))
            waiting.append(here[key])
    return found


def json_changed(content: bytes, chance: random.Random) -> bytes:
    """A JSON file: mostly its document, now and then its text or its bytes."""
    if chance.random() < 0.3:
        return chance.choice((text_changed, bytes_changed))(content, chance)
    return json.dumps(document_changed(json.loads(content), chance)).encode("utf-8", "surrogatepass")


def yaml_changed(content: bytes, chance: random.Random) -> bytes:
    """A YAML file, likewise."""
    if chance.random() < 0.4:
        return chance.choice((text_changed, bytes_changed))(content, chance)
    changed = document_changed(yaml.safe_load(content), chance)
    return json.dumps(changed).encode("utf-8", "surrogatepass")  # YAML reads JSON


def safetensors_changed(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file: its bytes, or its header with the length put right."""
    if chance.random() < 0.5:
        return bytes_changed(content, chance)
    length = int.from_bytes(content[:8], "little")
    header = json_changed(content[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def onnx_changed(content: bytes, chance: random.Random) -> bytes:
    """An ONNX file: its bytes, or a field of its nodes, tensors, inputs or metadata."""
    if chance.random() < 0.4:
        return bytes_changed(content, chance)
    model = onnx.load_from_string(content)
    for _ in range(chance.choice((1, 1, 2))):
        _change_model(model, chance)
    changed: bytes = model.SerializeToString()
    return changed


def _change_model(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = model.graph
    node = chance.choice(graph.node) if graph.node else onnx.NodeProto()
    tensor = chance.choice(graph.initializer) if graph.initializer else onnx.TensorProto()
    names = [name for other in graph.node for name in (*other.input, *other.output)] or ["x"]

    def another_input() -> None:
        if node.input:
            node.input[chance.randrange(len(node.input))] = chance.choice((*names, "", "nowhere"))

    def another_attribute() -> None:
        if node.attribute:
            attribute = chance.choice(node.attribute)
            attribute.i = chance.choice((-1, 0, 2**31, 2**62))
            if attribute.ints:
                attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice((-1, 0, 7, 2**31, 2**62))

    def external() -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        location = chance.choice(("../../../etc/passwd", "/etc/passwd", "labels.txt", "", "w.bin"))
        tensor.external_data.add(key="location", value=location)

    def other_metadata() -> None:
        if model.metadata_props:
            chance.choice(model.metadata_props).value = chance.choice(("", "{", "null", "[]", '{"a": 1}', "x" * 1000))

    def another_shape() -> None:
        value = chance.choice((*graph.input, *graph.output))
        sizes = value.type.tensor_type.shape.dim
        if sizes:
            chance.choice(sizes).dim_value = chance.choice((-1, 0, 1, 3, 2**31, 2**62))

    changes: tuple[Callable[[], Any], ...] = (
        another_input,
        another_attribute,
        external,
        other_metadata,
        another_shape,
        lambda: setattr(node, "op_type", chance.choice(("Relu", "Loop", "If", "Nothing", ""))),
        lambda: setattr(tensor, "raw_data", tensor.raw_data[: chance.randrange(len(tensor.raw_data) + 1)]),
        lambda: setattr(tensor, "data_type", chance.randrange(24)),
        lambda: tensor.dims.append(chance.choice((-1, 0, 2, 2**31, 2**62))),
        lambda: setattr(model, "ir_version", chance.choice((0, 3, 99))),
        lambda: model.opset_import[0].__setattr__("version", chance.choice((-1, 0, 5, 999))),
        lambda: graph.node.remove(node) if graph.node else None,
        lambda: graph.node.append(node),
        lambda: graph.output.pop() if graph.output else None,
    )
    chance.choice(changes)()
