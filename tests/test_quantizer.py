"""Which operators run on integers, pattern by pattern, in the graph that ONNX Runtime really runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.errors import ConfigurationError
from edgecompress.int8.qat import TrainableInt8
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.int8.scheme import Scheme
from edgecompress.machine import architecture, has_vnni
from edgecompress.measure.integer_graph import inspect_integer_graph
from int8_models import (
    CLASSES,
    PATTERNS,
    SIZE,
    UINT8_7,
    Exported,
    Fire,
    Padded,
    Residual,
    Shared,
    Shuffle,
    conv,
    export,
    exported,
    images,
    quantized,
    run,
    seeded,
)

# What each net must run, and how many float-to-integer and integer-to-float steps it may have.
EXPECTED: dict[str, tuple[dict[str, int], int, int]] = {
    "Residual": (
        {"QLinearConv": 3, "QLinearAdd": 1, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1, "QGemm": 2},
        1,
        0,
    ),
    "SqueezeExcite": (
        {"QLinearConv": 3, "QLinearMul": 1, "QLinearSigmoid": 1, "QLinearGlobalAveragePool": 2, "QGemm": 1},
        1,
        0,
    ),
    "Fire": ({"QLinearConv": 5, "QLinearConcat": 1, "QLinearGlobalAveragePool": 1}, 1, 1),
    "Shuffle": ({"QLinearConv": 3, "QLinearConcat": 1, "Split": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}, 1, 0),
    "Padded": ({"QLinearConv": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}, 1, 0),
    "Shared": ({"QLinearConv": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1}, 1, 0),
    # x + 1 is a float island: one way out of the integers and one back in; so is the relu of a tensor with two readers.
    "Sums": ({"QLinearConv": 3, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1, "Add": 1}, 3, 2),
    "HardSwish": (
        {"QLinearConv": 2, "QLinearAdd": 2, "QLinearMul": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
        1,
        0,
    ),
    "Silu": (
        {"QLinearConv": 2, "QLinearSigmoid": 2, "QLinearMul": 2, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1},
        1,
        0,
    ),
    # The hard-sigmoid behind the convolution costs no node at all; the one behind the linear a QLinearAdd.
    "HardExcite": (
        {"QLinearConv": 3, "QLinearMul": 2, "QLinearAdd": 1, "QLinearGlobalAveragePool": 2, "QGemm": 2},
        1,
        0,
    ),
    # Both batch norms are depthwise convolutions; what is joined stays integers.
    "Dense": (
        {"QLinearConv": 5, "QLinearConcat": 1, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
        1,
        0,
    ),
    "Upsampled": ({"QLinearConv": 2, "Resize": 1, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}, 1, 0),
    # The layer norm and GELU are float islands; the factor behind the convolution costs nothing.
    "Scaled": (
        {
            **{"QLinearConv": 4, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
            **{"Gelu": 1, "LayerNormalization": 1, "Mul": 1, "Gather": 0},
        },
        3,
        2,
    ),
    # No clamp is left: each quantized range ends where its clamp does.
    "Clamped": ({"QLinearConv": 3, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 2}, 1, 0),
    "Gated": (
        {
            **{"QLinearConv": 3, "QLinearSigmoid": 3, "QLinearMul": 5, "QLinearAdd": 3},
            **{"QLinearGlobalAveragePool": 1, "QGemm": 3},
        },
        1,
        0,
    ),
    # Linear layers give floats where floats are wanted, bias included: nothing is quantized only to be read back.
    "Tokens": ({"QLinearConv": 1, "QGemm": 5, "Gelu": 1, "LayerNormalization": 2, "Softmax": 1}, 6, 1),
}
LAYERS: dict[str, tuple[str, ...]] = {
    "Residual": ("conv", "depthwise", "project", "hidden", "head"),
    "SqueezeExcite": ("conv", "squeeze", "excite", "head"),
    "Fire": ("conv", "squeeze", "left", "right", "classifier"),
    "Shuffle": ("conv", "pointwise", "depthwise", "head"),
    "Padded": ("conv", "depthwise", "head"),
    "Shared": ("conv", "shared", "shared", "head"),
    "Sums": ("first", "second", "third", "head"),
    "HardSwish": ("first", "second", "head"),
    "Silu": ("first", "second", "head"),
    "HardExcite": ("conv", "squeeze", "excite", "hidden", "head"),
    "Dense": ("conv", "norm", "grow", "last", "transition", "head"),
    "Upsampled": ("conv", "down", "head"),
    "Tokens": ("patches", "qkv", "project", "widen", "narrow", "head"),
    "Clamped": ("conv", "depthwise", "point", "hidden", "head"),
    "Gated": ("stem", "one", "two", "first", "second", "head"),
    "Scaled": ("stem", "depthwise", "widen", "narrow", "head"),
}
WITH_FLOAT_ISLANDS = ("Sums", "Scaled", "Tokens")
_FLOAT_WORK = {
    "Conv",
    "Gemm",
    "MatMul",
    "Relu",
    "Clip",
    "GlobalAveragePool",
    "AveragePool",
    "Pad",
    "Mul",
    "Sigmoid",
    "HardSigmoid",
    "BatchNormalization",
}


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    folder, made = tmp_path_factory.mktemp("patterns"), {}

    def make(name: str) -> Exported:
        if name not in made:
            made[name] = exported(name, folder)
        return made[name]

    return make


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_runs_on_integers(pattern: Callable[[str], Exported], name: str) -> None:
    net = pattern(name)
    operators, quantize_nodes, dequantize_nodes = EXPECTED[name]
    counts = net.graph.op_counts
    assert {operator: counts.get(operator, 0) for operator in operators} == operators
    assert net.graph.quantize_nodes == quantize_nodes
    assert net.graph.dequantize_nodes == dequantize_nodes
    assert net.graph.int8_mac_coverage == 1.0 or name == "Tokens"  # attention stays in float
    assert net.model.quantized_layers == LAYERS[name]
    assert net.model.float_layers == ()
    if name not in WITH_FLOAT_ISLANDS:
        assert net.graph.float_islands == []
        assert not _FLOAT_WORK & counts.keys()


@pytest.mark.parametrize("name", PATTERNS)
def test_runtime_gives_what_the_simulation_gives(pattern: Callable[[str], Exported], name: str) -> None:
    net, inputs = pattern(name), images(24, seed=5)
    with torch.no_grad():
        wanted = net.module(inputs).numpy()
        simulated = net.model.simulation()(inputs)
        in_floats = net.model.graph(inputs).numpy()
    got = run(net.path, inputs)
    # One step is what an 8-bit logit would resolve. A tie that falls the other way may move a value, most move none.
    step = float(np.ptp(simulated.numpy())) / 255
    difference = np.abs(got - simulated.numpy())
    assert difference.max() <= 3 * step
    assert np.median(difference) <= 0.25 * step
    # The converted graph sums in float, in another order.
    assert np.abs(in_floats - simulated.numpy()).max() <= 3 * step
    assert np.median(np.abs(in_floats - simulated.numpy())) <= 0.25 * step
    assert difference.max() < np.abs(simulated.numpy() - wanted).max()
    assert np.abs(simulated.numpy() - wanted).mean() < 0.05 * wanted.std()


def trained(net: Exported, inputs: Tensor) -> QuantizedModel:
    """A few optimizer steps, and every learned step wider, each by a share of its own: what long training may do."""
    trainable = TrainableInt8(net.model)
    trainable.train(False)
    optimizer = torch.optim.Adam(trainable.parameters(), lr=2e-3)
    with torch.no_grad():
        wanted = net.module(inputs)
    for _ in range(5):
        optimizer.zero_grad()
        ((trainable(inputs) - wanted) ** 2).mean().backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainable.named_parameters():
            if name.endswith("factor"):
                parameter.add_(0.02 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return trainable.quantized("trained")


@pytest.mark.parametrize("name", PATTERNS)
def test_training_keeps_every_kernel(pattern: Callable[[str], Exported], tmp_path: Path, name: str) -> None:
    """What fusions presuppose of scales holds for learned ones: equal ones stay equal, clamps and [0, 1] stay."""
    net, inputs = pattern(name), images(24, seed=5)
    model = trained(net, images())
    rewrites = export(model.graph, tmp_path / "net.onnx")
    graph = inspect_integer_graph(tmp_path / "net.onnx")
    assert rewrites == net.rewrites
    assert graph.op_counts == net.graph.op_counts
    assert len(graph.float_islands) == len(net.graph.float_islands)
    with torch.no_grad():
        simulated = model.simulation()(inputs).numpy()
    got = run(tmp_path / "net.onnx", inputs)
    agree = np.isclose(simulated, got, atol=1e-4 * np.abs(simulated).max()).all(axis=1)
    assert agree.mean() >= 0.95


@pytest.mark.parametrize(
    ("name", "made"),
    [("Padded", (2, 1, 0)), ("SqueezeExcite", (0, 2, 0)), ("HardSwish", (0, 1, 2)), ("HardExcite", (0, 2, 2))],
)
def test_graphs_were_rewritten(pattern: Callable[[str], Exported], name: str, made: tuple[int, int, int]) -> None:
    names = ("pad_into_conv", "mean_as_global_pool", "hard_sigmoid_as_sum")
    assert pattern(name).rewrites == dict(zip(names, made, strict=True)) | {"gelu_regrouped": 0}


@pytest.mark.parametrize("name", PATTERNS)
def test_int8_activations_run_the_same_integer_graph(tmp_path: Path, name: str) -> None:
    """As Arm builds of the runtime do."""
    model = quantized(seeded(PATTERNS[name]()), scheme=Scheme("int8", 8))
    export(model.graph, tmp_path / "net.onnx")
    graph = inspect_integer_graph(tmp_path / "net.onnx", int8_activations=True)
    operators, quantize_nodes, dequantize_nodes = EXPECTED[name]
    assert {operator: graph.op_counts.get(operator, 0) for operator in operators} == operators
    assert (graph.quantize_nodes, graph.dequantize_nodes) == (quantize_nodes, dequantize_nodes)
    assert graph.float_islands == [] or name in WITH_FLOAT_ISLANDS


def test_the_runtimes_integer_bilinear_resize_cuts_fractions_off() -> None:
    """Why a bilinear resize stays in float. Once this fails, the quantizer can treat it like a nearest one."""

    def resized(values: np.ndarray, kind: int) -> np.ndarray:
        node = helper.make_node(
            "Resize", ["x", "", "scales"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel"
        )
        ends = [helper.make_tensor_value_info(name, kind, [1, 4, side, side]) for name, side in (("x", 7), ("y", 14))]
        scales = helper.make_tensor("scales", onnx.TensorProto.FLOAT, [4], [1.0, 1.0, 2.0, 2.0])
        graph = helper.make_graph([node], "resize", ends[:1], ends[1:], [scales])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"x": values})[0])

    values = np.random.default_rng(0).integers(0, 256, (1, 4, 7, 7)).astype(np.uint8)
    exact = resized(values.astype(np.float32), onnx.TensorProto.FLOAT)
    assert np.array_equal(resized(values, onnx.TensorProto.UINT8), np.floor(exact).astype(np.uint8))


@pytest.mark.slow
def test_relu6_range_is_clamped_without_a_clip(tmp_path: Path) -> None:
    layers = (conv(3, 8), nn.ReLU6(), conv(8, 8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = seeded(nn.Sequential(*layers))
    inputs = 20 * images()  # far above 6
    model = quantized(module, samples=inputs)
    export(model.graph, tmp_path / "net.onnx")
    graph = inspect_integer_graph(tmp_path / "net.onnx")
    assert graph.op_counts["QLinearConv"] == 2
    assert (graph.quantize_nodes, graph.dequantize_nodes) == (1, 1)
    assert "Clip" not in graph.op_counts
    with torch.no_grad():
        simulated = model.simulation()(inputs).numpy()
    got = run(tmp_path / "net.onnx", inputs)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    scales = [float(node.args[1]) for node in model.graph.graph.nodes if node.target is quantize]
    assert scales[1:3] == pytest.approx([6 / 255, 6 / 255])
    assert np.abs(got - simulated).max() <= 3 * 6 / 255


@pytest.mark.slow
def test_symmetric_activations_of_arm(tmp_path: Path) -> None:
    module, inputs = seeded(Residual()), images(24, seed=5)
    model = quantized(module, scheme=Scheme("int8", 8))
    export(model.graph, tmp_path / "net.onnx")
    # x86 turns int8 activations into uint8 first, and misses some; this asks for the graph that Arm runs.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    operators, quantize_nodes, dequantize_nodes = EXPECTED["Residual"]
    assert {operator: counts[operator] for operator in operators} == operators
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (quantize_nodes, dequantize_nodes)
    with torch.no_grad():
        wanted, simulated = module(inputs).numpy(), model.simulation()(inputs).numpy()
    assert np.abs(simulated - wanted).mean() < 0.05 * wanted.std()
    (got,) = session.run(None, {"input": inputs.numpy()})
    # 8-bit weights: exact on Arm; on x86 kernels for int8 activations may saturate, which random weights hardly do.
    assert np.abs(got - simulated).max() <= 3 * np.ptp(simulated) / 255


@pytest.mark.parametrize(
    ("net", "operators"),
    [
        (Residual, {"max_pool2d": 1, "flatten": 1, "dropout": 1}),
        (Fire, {"max_pool2d": 1, "cat": 1, "dropout": 1, "flatten": 1}),
        (Shuffle, {"cat": 1, "chunk": 1, "view": 1, "transpose": 1, "reshape": 1, "flatten": 1}),
        (Padded, {"pad": 1}),
    ],
)
def test_values_that_only_move_keep_their_scale(net: type[nn.Module], operators: dict[str, int]) -> None:
    """By a low percentile: the largest value would often be the same on both sides by itself."""
    model = quantized(seeded(net()), method="percentile", percentile=80.0)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    found: Counter[str] = Counter()
    for node in model.graph.graph.nodes:
        operator = node.name.rstrip("_0123456789")
        if operator not in operators or node.args[0] is None:
            continue
        sources = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
        if any(source.op == "placeholder" for source in sources):
            continue  # the padding of the input, which is not quantized yet
        readers = [piece for user in node.users for piece in (user.users if operator == "chunk" else [user])]
        assert all(reader.target is quantize for reader in readers)
        scales = {step.args[1:3] for step in [*sources, *readers]}
        assert len(scales) == 1, node
        found[operator] += 1
    assert found == operators


def int8_weights(model: QuantizedModel) -> int:
    dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
    return sum(node.target is dequantize and node.args[6] is torch.int8 for node in model.graph.graph.nodes)


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        (("project",), ["project"]),
        (("*d*",), ["depthwise", "hidden", "head"]),
        (("conv", "head"), ["conv", "head"]),
    ],
)
def test_excluded_layers_stay_float_and_are_named(exclude: tuple[str, ...], kept: list[str]) -> None:
    module = seeded(Residual())
    model = quantized(module, exclude=exclude)
    assert list(model.float_layers) == kept
    assert set(model.quantized_layers) == set(LAYERS["Residual"]) - set(kept)
    assert int8_weights(model) == 5 - len(kept)
    with torch.no_grad():
        error = model.simulation()(images(8)) - module(images(8))
    assert float(error.abs().mean()) < 0.05


def test_glob_without_a_match_names_the_nearest_layer() -> None:
    with pytest.raises(ConfigurationError, match=r"'depthwize' matches no layer.*'depthwise'"):
        quantized(seeded(Residual()), exclude=("conv", "depthwize"))


def test_nested_module_names_are_those_of_named_modules() -> None:
    module = seeded(nn.Sequential(Residual(), nn.Sequential(nn.Linear(CLASSES, 4))))
    model = quantized(module)
    names = dict(module.named_modules())
    assert model.quantized_layers == ("0.conv", "0.depthwise", "0.project", "0.hidden", "0.head", "1.0")
    assert all(name in names for name in model.quantized_layers)


def test_a_layer_that_runs_twice_has_one_bias_scale_for_each_input(pattern: Callable[[str], Exported]) -> None:
    graph = pattern("Shared").model.graph
    convolutions = [node for node in graph.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    scales = []
    for node in convolutions[1:]:
        activation = node.args[0].args[1]
        weight, bias = (getattr(graph, node.args[position].args[1].target) for position in (1, 2))
        assert torch.allclose(bias, activation * weight, rtol=1e-6)
        scales.append(bias)
    assert not torch.equal(*scales)


def test_shared_weights_survive_the_fold_of_their_two_batch_norms() -> None:
    module = seeded(Shared(), seed=3)
    model = quantized(module, scheme=Scheme("uint8", 8))
    with torch.no_grad():
        wanted, got = module(images(16)), model.simulation()(images(16))
    assert float((wanted - got).abs().max()) < 0.05 * float(wanted.abs().max())


class ReadTwice(nn.Module):
    """A convolution that its batch norm shares with an add, and batch norms without weights and before everything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.norm = nn.BatchNorm2d(3), conv(3, 8), nn.BatchNorm2d(8)
        self.plain, self.head = nn.BatchNorm2d(8, affine=False), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        z = functional.relu(self.norm(y)) + y
        return self.head(functional.relu(self.plain(z)).mean((2, 3)))


@pytest.mark.parametrize("net", [PATTERNS["Dense"], ReadTwice])
def test_batch_norms_that_cannot_be_folded_are_equal_as_convolutions(net: type[nn.Module]) -> None:
    module = seeded(net())
    model = quantized(module)
    assert model.reference is not None
    with torch.no_grad():
        wanted, inputs = module(images(16)), images(16)
        torch.testing.assert_close(model.reference(inputs), wanted, rtol=1e-5, atol=1e-5)
        assert float((model.simulation()(inputs) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    assert model.float_layers == ()
    assert not any("batch_norm" in str(node.target) for node in model.graph.graph.nodes)


class ThroughViews(nn.Module):
    """In-place operators on views of tensors that are read afterwards, between a batch norm to fold and one to free."""

    def __init__(self, *, by_view: bool) -> None:
        super().__init__()
        self.by_view, self.first, self.norm, self.second = by_view, conv(3, 8), nn.BatchNorm2d(8), conv(8, 8)
        self.last, self.head = nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        if self.by_view:
            y.flatten(1).relu_()
            y[:, :4].mul_(0.5)
        else:
            y = functional.relu(y)
            y = torch.cat((y[:, :4] * 0.5, y[:, 4:]), 1)
        y = self.second(y)
        return self.head((functional.relu(self.last(y)) + y).mean((2, 3)))


def test_in_place_operators_through_a_view_are_seen_by_all_readers(tmp_path: Path) -> None:
    module, plain = seeded(ThroughViews(by_view=True)), seeded(ThroughViews(by_view=False))
    with torch.no_grad():
        wanted = plain(images(16))
        torch.testing.assert_close(module(images(16)), wanted)
    model = quantized(module)
    assert model.reference is not None
    assert model.quantized_layers == quantized(plain).quantized_layers
    export(model.graph, tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(model.reference(images(16)), wanted, rtol=1e-5, atol=1e-5)
        got = model.simulation()(images(16))
    assert float((wanted - got).abs().max()) < 0.05 * float(wanted.abs().max())
    in_the_file = torch.from_numpy(run(tmp_path / "model.onnx", images(16)))
    assert float((in_the_file - got).abs().max()) <= 3 * float(got.max() - got.min()) / 255


class WholeLimits(nn.Module):
    """Clamps whose limits are integers, one-sided and beside a float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(self.first(x), min=0)
        return self.head(torch.clamp(self.second(x), 0, 1.5).mean((2, 3)))


def test_clamps_at_whole_numbers_are_taken_into_kernels_too(tmp_path: Path) -> None:
    module = seeded(WholeLimits())
    export(quantized(module).graph, tmp_path / "int8.onnx")
    graph = inspect_integer_graph(tmp_path / "int8.onnx")
    assert graph.op_counts["QLinearConv"] == 2
    assert graph.float_islands == []
    export(module, tmp_path / "fp32.onnx")
    inputs = images(4)
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "fp32.onnx", inputs), module(inputs).numpy(), rtol=1e-4, atol=1e-5)


class Joined(nn.Module):
    """Tensors that start at zero and end at one, at six, or nowhere, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 4), *(conv(4, 4) for _ in range(3))])
        self.last, self.head = conv(16, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.convs
        x = functional.relu(first(x))
        y = functional.max_pool2d(functional.relu6(second(x)), 3, 1, 1)
        x = torch.cat([functional.hardsigmoid(third(x)), y, torch.clamp(fourth(x), 0.0, 1.0), x], 1)
        return self.head(self.last(x).mean((2, 3)))


def test_joining_widens_no_range_that_clamps_and_cuts_none_off(tmp_path: Path) -> None:
    module, inputs = seeded(Joined()), 8.0 * images(24, seed=5)
    model = quantized(module, samples=8.0 * images())
    export(model.graph, tmp_path / "net.onnx")
    graph = inspect_integer_graph(tmp_path / "net.onnx")
    assert (graph.op_counts["QLinearConv"], graph.op_counts["QLinearConcat"]) == (5, 1)
    assert (graph.quantize_nodes, graph.dequantize_nodes, graph.float_islands) == (1, 0, [])
    with torch.no_grad():
        simulated, wanted = model.simulation()(inputs).numpy(), module(inputs).numpy()
    got = run(tmp_path / "net.onnx", inputs)
    assert np.abs(got - simulated).max() <= 3 * np.ptp(simulated) / 255
    assert np.abs(simulated - wanted).mean() < 0.05 * wanted.std()


class InPlace(nn.Module):
    """In-place operators on tensors that others read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        before = functional.avg_pool2d(y, 2)
        functional.relu_(y)
        z = self.second(y)
        z += y
        functional.relu6(z, inplace=True)
        return self.head(z.mean((2, 3)) + before.mean((2, 3)))


def test_in_place_operators_change_nothing_that_is_read_elsewhere() -> None:
    module = seeded(InPlace())
    model = quantized(module)
    assert model.quantized_layers == ("first", "second", "head")
    with torch.no_grad():
        wanted, got = module(images(16)), model.simulation()(images(16))
        in_floats = model.graph(images(16))
    assert float((got - in_floats).abs().max()) <= 3 * float(got.max() - got.min()) / 255
    assert float((wanted - got).abs().max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(nn.AvgPool2d(3, 2, ceil_mode=True), id="overhangs"),
        pytest.param(nn.AvgPool2d((2, 3), ceil_mode=True), id="overhangs in width"),
        pytest.param(nn.AvgPool2d((3,), (2,), (1,), ceil_mode=True), id="overhangs the padding"),
        pytest.param(nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True), id="padded in height"),
        pytest.param(nn.AvgPool2d((3, 4), (2, 5), (1, 2), ceil_mode=True), id="no window in the padding"),
        pytest.param(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), id="padding not counted"),
        pytest.param(nn.AvgPool2d(3, 2, 1), id="no ceil_mode"),
    ],
)
def test_average_pools_are_the_same_in_the_file(tmp_path: Path, pool: nn.AvgPool2d) -> None:
    pooled = pool(torch.zeros(1, 8, SIZE, SIZE)).numel()
    module = seeded(nn.Sequential(conv(3, 8), nn.ReLU(), pool, nn.Flatten(), nn.Linear(pooled, CLASSES)))
    model, path = quantized(module), tmp_path / "model.onnx"
    assert model.reference is not None
    export(model.graph, path)
    with torch.no_grad():
        wanted, simulated = module(images(16)), model.simulation()(images(16))
        torch.testing.assert_close(model.reference(images(16)), wanted, rtol=1e-5, atol=1e-5)
    step = float(wanted.max() - wanted.min()) / 255
    assert float((torch.from_numpy(run(path, images(16))) - simulated).abs().max()) <= step
    assert float((simulated - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    assert inspect_integer_graph(path).op_counts["QLinearAveragePool"] == 1


# --- Saturation: what decides between 7 and 8 bits for weights.


def multiply_add_pairs(unsigned: np.ndarray, signed: np.ndarray) -> np.ndarray:
    """VPMADDUBSW: sums of two neighbouring products uint8 x int8, saturated to int16."""
    products = unsigned.astype(np.int32) * signed.astype(np.int32)
    return np.clip(products.reshape(*products.shape[:-1], -1, 2).sum(-1), -32768, 32767)


def test_seven_bit_weights_never_saturate_sixteen_bits_and_eight_bit_ones_do() -> None:
    limits = {bits: Scheme("uint8", bits).weight_limit for bits in (7, 8)}
    assert limits == {7: 63, 8: 127}
    values = np.array([0, 1, 127, 128, 254, 255], dtype=np.uint8)
    unsigned = np.stack(np.meshgrid(values, values), -1).reshape(-1, 1, 2)
    saturated = {}
    for bits, limit in limits.items():
        weights = np.arange(-limit, limit + 1, dtype=np.int8)
        signed = np.stack(np.meshgrid(weights, weights), -1).reshape(1, -1, 2)
        exact = (unsigned.astype(np.int32) * signed.astype(np.int32)).sum(-1)
        got = multiply_add_pairs(np.broadcast_to(unsigned, (len(unsigned), signed.shape[1], 2)), signed)[..., 0]
        saturated[bits] = int((got != exact).sum())
    assert saturated[7] == 0
    assert saturated[8] > 0
    worst = multiply_add_pairs(np.array([255, 255], np.uint8), np.array([127, 127], np.int8))
    assert worst.tolist() == [32767]
    assert 2 * 255 * 127 == 64770


class Brightest(nn.Module):
    """One layer whose every product is the largest there is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 8, 1, bias=False)
        nn.init.constant_(self.conv.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("bits", [7, 8])
def test_worst_case_saturates_where_the_kernels_do(tmp_path: Path, bits: int) -> None:
    width = 256
    inputs = torch.ones(4, width, 4, 4)
    model = quantized(Brightest(width), scheme=Scheme("uint8", bits), samples=torch.cat([inputs, inputs / 2]))
    export(model.graph, tmp_path / "net.onnx", example=inputs[:2])
    assert inspect_integer_graph(tmp_path / "net.onnx").op_counts["QLinearConv"] == 1
    with torch.no_grad():
        simulated = model.simulation()(inputs).numpy()
    assert simulated == pytest.approx(0.5 * width, rel=0.01)
    got = run(tmp_path / "net.onnx", inputs)
    if bits == 8 and architecture() == "x86_64" and not has_vnni():
        limit = UINT8_7.weight_limit * 2 + 1
        pairs = multiply_add_pairs(np.full(width, 255, np.uint8), np.full(width, limit, np.int8))
        share = pairs.sum() / (width * 255 * limit)
        assert share < 0.51  # half of the sum is lost, in silence
        assert got == pytest.approx(simulated * share, rel=0.01)
    else:
        assert got == pytest.approx(simulated, rel=0.005)
