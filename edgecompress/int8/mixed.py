"""Any placement of one int8 model, simulated: some of its layers on integers, the others in float.

What enters: a quantized model that was calibrated once, and names of layers. What leaves: its logits with those layers
in float, at the cost of one forward pass: no placement needs a calibration of its own. Which tensors are still rounded
when a layer leaves int8 is not decided here but asked of the quantizer, so that a simulated placement
rounds where the exported one will.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.observer import MinMaxObserver

from edgecompress.errors import QuantizationError
from edgecompress.int8.quantized_model import QuantizedModel, simulate
from edgecompress.int8.quantizer import Layer, OnnxRuntimeQuantizer, module_name

_ANNOTATION = "quantization_annotation"
_FAKE_QUANTIZE = torch.fake_quantize_per_tensor_affine
_WEIGHT, _BIAS = 1, 2  # positions among the arguments of a layer


@dataclass(frozen=True)
class Setting:
    """What is rounded, by the names of nodes, and which layers have int8 weights.

    `outputs`: activations that every reader gets rounded; `edges`: (source, reader) pairs that round for that reader.
    """

    outputs: frozenset[str]
    edges: frozenset[tuple[str, str]]
    layers: frozenset[str]

    @property
    def rounded(self) -> frozenset[str]:
        """The activations that are rounded for any reader."""
        return self.outputs | {source for source, _ in self.edges}


def exact_globs(names: Iterable[str]) -> tuple[str, ...]:
    """Names as globs for `exclude` that match themselves alone."""
    return tuple(name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in names)


class MixedModel:
    """One calibrated int8 model, of which any layers can be run in float.

    `layers` are the module names of its int8 layers in the order in which they run. Raises QuantizationError for a
    model without its float graph (one that was read from files).
    """

    def __init__(self, model: QuantizedModel) -> None:
        if model.reference is None:
            raise QuantizationError("the float graph of this int8 model is not at hand; quantize it again")
        self.model = model
        # Floats that sit on the integers' grid: a layer can leave them, which fused integer kernels could not.
        self.graph = simulate(model.graph)
        self.reference = model.reference
        self.nodes: list[Node] = list(self.graph.graph.nodes)
        self._position = {node.name: position for position, node in enumerate(self.nodes)}
        self._annotated = copy.deepcopy(model.reference)
        self._settings: dict[frozenset[str], Setting] = {}
        self._module_of: dict[str, str] = {}
        full = self.setting(())
        self.layers = tuple(dict.fromkeys(self._module_of.values()))
        self._float_constants = {name: self._constants_of(name) for name in full.layers}
        self._last_use = _last_uses(self.nodes)
        self._replaced: Mapping[str, Callable[..., Any]] = {}

    @contextlib.contextmanager
    def replacing(self, calls: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Within it, the named nodes call other functions on the same arguments: to try another rounding."""
        before, self._replaced = self._replaced, calls
        try:
            yield
        finally:
            self._replaced = before

    def rounded_node(self, rounder: Node) -> str:
        """The name of the node whose value one of the rounding nodes rounds."""
        return _root(rounder).name

    def nodes_of(self, layer: str) -> tuple[str, ...]:
        """The graph's nodes of one layer; more than one where a module runs more than once."""
        return tuple(name for name, module in self._module_of.items() if module == layer)

    def setting(self, float_layers: Iterable[str]) -> Setting:
        """What is rounded when `float_layers` (module names) are in float beside those that always are."""
        key = frozenset(float_layers)
        if key not in self._settings:
            exclude = (*self.model.exclude, *exact_globs(sorted(key)))
            for node in self._annotated.graph.nodes:
                node.meta.pop(_ANNOTATION, None)
            quantizer = OnnxRuntimeQuantizer(self.model.scheme, MinMaxObserver, exclude)
            quantizer.annotate(self._annotated)
            placed: list[Layer] = quantizer.placement.quantized
            if not self._module_of:
                self._module_of = {layer.node_name: layer.module_name for layer in placed}
            outputs, edges = _rounded(self._annotated)
            self._settings[key] = Setting(outputs, edges, frozenset(layer.node_name for layer in placed))
        return self._settings[key]

    @property
    def float_setting(self) -> Setting:
        """Nothing is rounded."""
        return Setting(frozenset(), frozenset(), frozenset())

    def logits(self, images: Tensor, setting: Setting) -> Tensor:
        """Logits [N, classes] of one normalized batch [N, C, H, W]."""
        (_, logits), *_ = list(self.variants(images, setting, [setting]))
        return logits

    def variants(self, images: Tensor, base: Setting, others: Sequence[Setting]) -> Iterator[tuple[int, Tensor]]:
        """(index, logits) of each of `others`, which may come in another order.

        The part of the graph in which a setting does not differ from `base` is run once for all.
        """
        forks: dict[int, list[int]] = {}
        for index, other in enumerate(others):
            forks.setdefault(self._first_difference(base, other), []).append(index)
        end = max(forks, default=0)
        trunk = _Runner(self, images)
        with torch.inference_mode():
            for position in range(end + 1):
                for index in forks.get(position, []):
                    yield index, trunk.fork().finish(position, others[index])
                if position < end:
                    trunk.step(position, base)

    def _first_difference(self, base: Setting, other: Setting) -> int:
        """Position of the first node that two settings treat differently; the last node where there is none."""
        layers = base.layers ^ other.layers
        rounded = (base.outputs ^ other.outputs) | {source for source, _ in base.edges ^ other.edges}
        differing = [self._position[name] for name in layers if name in self._position]
        differing += [
            position
            for position, node in enumerate(self.nodes)
            if node.target is _FAKE_QUANTIZE and _root(node).name in rounded
        ]
        return min(differing, default=len(self.nodes) - 1)

    def _constants_of(self, name: str) -> dict[int, Tensor]:
        """The float weight and bias of a layer's node, by position among its arguments."""
        node = next(node for node in self.reference.graph.nodes if node.name == name)
        arguments = dict(enumerate(node.args))
        return {
            place: constant_of(self.reference, value)
            for place in (_WEIGHT, _BIAS)
            if isinstance(value := arguments.get(place), Node)
        }


class _Runner:
    """Runs the graph of a mixed model node by node, each value dropped after its last reader."""

    def __init__(self, mixed: MixedModel, images: Tensor) -> None:
        self.mixed = mixed
        self.images = images
        self._interpreter = Interpreter(mixed.graph, garbage_collect_values=False)
        self._interpreter.args_iter = iter([images])

    def fork(self) -> _Runner:
        """Another runner that goes on from here; the values so far are shared and never written."""
        twin = _Runner(self.mixed, self.images)
        twin._interpreter.env = dict(self._interpreter.env)
        return twin

    def step(self, position: int, setting: Setting) -> None:
        """Run the node at `position`."""
        mixed, env = self.mixed, self._interpreter.env
        node = mixed.nodes[position]
        if node.target is _FAKE_QUANTIZE and _root(node).name not in setting.rounded:
            env[node] = self._value(node.args[0], node, setting)
        elif node.op == "call_function":
            arguments = [self._value(argument, node, setting) for argument in node.args]
            if node.name not in setting.layers:
                for place, constant in mixed._float_constants.get(node.name, {}).items():
                    arguments[place] = constant
            call: Any = mixed._replaced.get(node.name, node.target)
            env[node] = call(*arguments, **self._value(node.kwargs, node, setting))
        elif node.op != "output":
            env[node] = self._interpreter.run_node(node)
        for dead in mixed._last_use[position]:
            env.pop(dead, None)

    def finish(self, position: int, setting: Setting) -> Tensor:
        """Run from the node at `position` to the end; returns the logits."""
        output = self.mixed.nodes[-1]
        value: Any = output.args[0]
        while isinstance(value, (tuple, list)):
            value = value[0]
        for here in range(position, len(self.mixed.nodes) - 1):
            self.step(here, setting)
        logits = self._interpreter.env[value]
        assert isinstance(logits, Tensor)
        return logits.float()

    def _value(self, argument: Any, reader: Node, setting: Setting) -> Any:
        """An argument's value as `reader` gets it: rounded only where the setting says so for this reader."""

        def value_of(node: Node) -> Any:
            if node.target is _FAKE_QUANTIZE and reader.target is not _FAKE_QUANTIZE:
                root = _root(node)
                if root.name not in setting.outputs and (root.name, reader.name) not in setting.edges:
                    return self._interpreter.env[root]
            return self._interpreter.env[node]

        return torch.fx.node.map_arg(argument, value_of)


def _rounded(annotated: GraphModule) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """Nodes whose outputs are annotated, and the (source, reader) pairs whose inputs are; constants left out."""
    outputs: set[str] = set()
    edges: set[tuple[str, str]] = set()
    for node in annotated.graph.nodes:
        annotation = node.meta.get(_ANNOTATION)
        if annotation is None:
            continue
        if annotation.output_qspec is not None:
            outputs.add(node.name)
        edges |= {(source.name, node.name) for source in annotation.input_qspec_map if source.op != "get_attr"}
    return frozenset(outputs), frozenset(edges)


def _root(node: Node) -> Node:
    """The node whose value a fake-quantize node rounds."""
    source = node.args[0]
    assert isinstance(source, Node)
    return _root(source) if source.target is _FAKE_QUANTIZE else source


def constant_of(graph: GraphModule, node: Node) -> Tensor:
    """The tensor that a get_attr node reads, seen through whatever was put between it and its reader."""
    while node.op != "get_attr":
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def _last_uses(nodes: Sequence[Node]) -> list[list[Node]]:
    """For each position, the nodes whose value is read there for the last time; the graph's output is kept."""
    last: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        for source in node.all_input_nodes:
            last[source] = position
            if source.target is _FAKE_QUANTIZE:  # a reader may want what it rounds
                last[_root(source)] = position
    dead: list[list[Node]] = [[] for _ in nodes]
    for source, position in last.items():
        if nodes[position].op != "output":
            dead[position].append(source)
    return dead


def noise(reference: Tensor, logits: Tensor) -> float:
    """Energy of the error over the energy of the reference, both [samples, classes]."""
    signal = float((reference.double() ** 2).sum())
    return float(((reference - logits).double() ** 2).sum()) / max(signal, 1e-300)


def decibels(noise_share: float) -> float:
    """Signal-to-noise ratio in dB of a share of noise; infinite without any."""
    return math.inf if noise_share <= 0 else -10.0 * math.log10(noise_share)


def agreement(reference: Tensor, logits: Tensor) -> float:
    """Fraction of rows whose largest entry is at the same place."""
    return float((reference.argmax(dim=1) == logits.argmax(dim=1)).double().mean())


__all__ = [
    "MixedModel",
    "Setting",
    "agreement",
    "constant_of",
    "decibels",
    "exact_globs",
    "module_name",
    "noise",
]
