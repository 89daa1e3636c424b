"""Quantization as a stage: what it leaves alone, what it refuses, and what a stored model gives back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import edgecompress.int8.post_training
import edgecompress.int8.scheme
from edgecompress.errors import QuantizationError, RunError
from edgecompress.int8.capture import capture
from edgecompress.int8.quantized_model import QuantizedModel, load_quantized, save_quantized
from edgecompress.int8.scheme import Scheme, resolve_scheme
from edgecompress.settings.target import Int8Scheme, Target, load_target
from edgecompress.steps.debug_run import adds_in_16_bits
from int8_models import UINT8_7, HardSwish, Residual, Shared, conv, export, images, quantized, seeded, stage

METHODS = ["minmax", "histogram", "percentile"]


@pytest.mark.parametrize("effort", ["fast", "balanced"])
@pytest.mark.parametrize("training", [False, True])
def test_the_given_module_is_left_alone(effort: str, training: bool) -> None:
    module = seeded(Residual()).train(training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    quantized(module, effort=effort)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(child.training is training for child in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stays_near_float(method: str) -> None:
    module = seeded(Residual())
    model = quantized(module, method=method)
    with torch.no_grad():
        wanted, got = module(images(64, seed=3)), model.simulation()(images(64, seed=3))
    assert float((wanted - got).abs().mean()) < 0.03 * float(wanted.std())
    assert model.correction == "rounded to nearest"


def integers(model: QuantizedModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.graph.named_buffers() if not tensor.is_floating_point()}


def test_weights_use_the_range_of_their_bits() -> None:
    for bits, limit in ((7, 63), (8, 127)):
        model = quantized(seeded(Residual()), scheme=Scheme("uint8", bits))
        weights = [tensor for tensor in integers(model).values() if tensor.dtype is torch.int8]
        assert len(weights) == 5
        for weight in weights:  # per channel: each one comes near its limit, and in one or another reaches it
            largest = weight.flatten(1).abs().amax(1)
            assert largest.min() >= round(limit / 1.25)
            assert largest.max() <= limit
        assert max(int(weight.max()) for weight in weights) == limit


# --- Stored models.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizedModel]:
    folder = tmp_path_factory.mktemp("stored")
    model = quantized(seeded(Residual()), effort="balanced", method="percentile")
    save_quantized(model, folder, float_model={"architecture": "residual"})
    return folder, model


@pytest.fixture
def stored(saved: tuple[Path, QuantizedModel], tmp_path: Path) -> tuple[Path, QuantizedModel]:
    """A stored model, and a copy of its files to damage."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, saved[1]


def description(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "model.json").read_text())
    return content


def loaded(folder: Path, module: nn.Module | None = None, **changes: Any) -> QuantizedModel:
    # Other weights and another example: both must be without effect.
    net = seeded(Residual(), seed=77) if module is None else module
    return load_quantized(folder, net, description(folder) | changes, 3 * images(2, seed=8))


def test_round_trip_gives_identical_logits(stored: tuple[Path, QuantizedModel]) -> None:
    folder, model = stored
    again = loaded(folder)
    inputs = images(32, seed=4)
    with torch.no_grad():
        assert torch.equal(again.graph(inputs), model.graph(inputs))
        assert torch.equal(again.simulation()(inputs), model.simulation()(inputs))
    assert (again.scheme, again.exclude) == (model.scheme, model.exclude)
    assert (again.quantized_layers, again.float_layers) == (model.quantized_layers, model.float_layers)
    assert description(folder)["architecture"] == "residual"
    one, other = integers(model), integers(again)
    assert one.keys() == other.keys()
    assert sum(tensor.dtype is torch.int8 for tensor in one.values()) == 5
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_round_trip_exports_identical_integers_and_scales(stored: tuple[Path, QuantizedModel]) -> None:
    folder, model = stored
    files = []
    for number, each in enumerate((model, loaded(folder))):
        path = folder / f"{number}.onnx"
        export(each.graph, path)
        files.append({t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer})
    assert files[0].keys() == files[1].keys()
    assert sum(array.dtype == np.int8 for array in files[0].values()) >= 5
    assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize(("net", "exclude"), [(Residual, ("depthwise", "he*")), (Shared, ()), (HardSwish, ("second",))])
def test_round_trip_of_float_layers_and_shared_ones(
    tmp_path: Path, net: Callable[[], nn.Module], exclude: tuple[str, ...]
) -> None:
    model = quantized(seeded(net()), exclude=exclude)
    save_quantized(model, tmp_path, float_model={})
    again = loaded(tmp_path, seeded(net(), seed=77))
    with torch.no_grad():
        assert torch.equal(again.graph(images(8)), model.graph(images(8)))
    assert again.float_layers == model.float_layers


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _change(**changes: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name, change in changes.items():
            value = change(tensors.pop(name))
            if value is not None:
                tensors[name] = value
        save_file(tensors, folder / "model.safetensors")

    return apply


def _with(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b"") and None,
    "text": lambda folder: (folder / "model.safetensors").write_text("not tensors") and None,
    "missing": lambda folder: (folder / "model.safetensors").unlink(),
    "no scales": _change(activation_scales=lambda tensor: None),
    "fewer scales": _change(activation_scales=lambda tensor: tensor[:-1].clone()),
    "fewer zero points": _change(activation_zero_points=lambda tensor: tensor[:-1].clone()),
    "scale of zero": _change(activation_scales=_with(0, 0.0)),
    "scale of nan": _change(activation_scales=_with(1, float("nan"))),
    "zero point outside": _change(activation_zero_points=_with(0, 300)),
    "no weight": _change(_frozen_param0=lambda tensor: None),
    "other shape": _change(_frozen_param0=lambda tensor: tensor[:-1].clone()),
    "other type": _change(_frozen_param0=lambda tensor: tensor.to(torch.int32)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(stored: tuple[Path, QuantizedModel], damage: str) -> None:
    folder, _ = stored
    DAMAGES[damage](folder)
    with pytest.raises(RunError, match=r"run the quantize stage again|made by other versions"):
        loaded(folder)


@pytest.mark.parametrize(
    "quantized_part", [{}, {"scheme": {}}, {"scheme": {"activations": "uint8", "weight_bits": "many"}}, None]
)
def test_a_damaged_description_is_refused(stored: tuple[Path, QuantizedModel], quantized_part: Any) -> None:
    with pytest.raises(RunError, match="run the quantize stage again"):
        loaded(stored[0], quantized=quantized_part)


def test_another_model_is_refused(stored: tuple[Path, QuantizedModel]) -> None:
    with pytest.raises(RunError, match=r"made by other versions|cannot be rebuilt"):
        loaded(stored[0], seeded(Shared()))


# --- What cannot be quantized.


class Broken(nn.Module):
    """Gives NaN or infinity at a place of one's choice, although its weights are sound."""

    def __init__(self, place: str, value: float) -> None:
        super().__init__()
        self.place, self.value = place, value
        self.conv, self.relu6, self.head = conv(3, 8), nn.ReLU6(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.relu6(x + self.value) if self.place == "inside" else self.relu6(x)
        x = self.head(x.mean((2, 3)))
        return x + self.value if self.place == "output" else x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "head.weight", "head.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(method: str, name: str, value: float) -> None:
    module = seeded(Broken("nowhere", 0.0))
    with torch.no_grad():
        module.get_parameter(name).view(-1)[1] = value
    with pytest.raises(QuantizationError, match=f"{name} holds NaN or infinity"):
        quantized(module, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_that_are_not_finite_are_refused(method: str) -> None:
    module = seeded(Residual())
    module.bn.running_var[2] = float("nan")
    with pytest.raises(QuantizationError, match=r"conv\.weight: NaN or infinity"):
        quantized(module, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("place", "value"), [("inside", float("nan")), ("output", float("nan")), ("output", 1e39)])
def test_activations_that_are_not_finite_are_refused(method: str, place: str, value: float) -> None:
    with pytest.raises(QuantizationError, match="NaN or infinit"):
        quantized(seeded(Broken(place, value)), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_images_that_are_not_finite_are_refused(method: str) -> None:
    samples = images()
    samples[5, 1, 2, 3] = float("nan")
    with pytest.raises(QuantizationError, match="x: NaN or infinity on calibration images"):
        quantized(seeded(Broken("nowhere", 0.0)), method=method, samples=samples)


@pytest.mark.parametrize("net", [nn.Sequential(nn.Flatten(), nn.ReLU()), nn.Sequential(nn.MaxPool2d(2), nn.Flatten())])
def test_a_model_without_layers_is_refused(net: nn.Module) -> None:
    with pytest.raises(QuantizationError, match="holds no Conv2d or Linear"):
        quantized(net.eval())


def test_a_model_whose_layers_are_all_excluded_is_refused() -> None:
    with pytest.raises(QuantizationError, match="outside of exclude"):
        quantized(seeded(Residual()), exclude=("*",))


def test_no_calibration_image_is_refused() -> None:
    module = seeded(Residual())
    with pytest.raises(QuantizationError, match="never ran on calibration images"):
        edgecompress.int8.post_training.quantize(
            module,
            stage=stage(),
            scheme=UINT8_7,
            calibration=lambda: iter(()),
            batches=0,
            example=images(2),
        )


class DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class Boxes(nn.Module):
    """A detector's head: how many boxes are left depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv(x).mean((2, 3))
        kept = torchvision.ops.nms(torch.cat([logits[:, :2], logits[:, :2] + 1], 1), logits[:, 0], 0.5)
        return logits + 0 * kept.sum()


class SomePixels(Boxes):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv(x).mean((2, 3))
        return logits + 0 * logits[logits > 0].sum()


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(2, -1)


@pytest.mark.parametrize("net", [DependsOnValues, FixedBatch])
def test_code_that_cannot_be_captured_is_refused(net: Callable[[], nn.Module]) -> None:
    with pytest.raises(QuantizationError, match=r"cannot be captured by torch\.export: .*one image batch of any size"):
        capture(net(), images(2))


def test_a_branch_on_values_is_named_with_its_line_and_nothing_else_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(QuantizationError) as caught:
        capture(DependsOnValues(), images(2))
    assert re.search(
        r"branches on the values of a tensor \(.*test_quantize\.py, line \d+, in forward\)", str(caught.value)
    )
    assert "u0" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_operator_whose_result_depends_on_values_is_named_where_the_graph_needs_a_count() -> None:
    with pytest.raises(QuantizationError, match=r"torchvision\.nms gives as many values as it finds .*\(u\d+ >= 2\)"):
        capture(Boxes(), images(2))
    module = SomePixels().eval()
    with torch.no_grad():
        torch.testing.assert_close(capture(module, images(2))(images(3) * 0), module(images(3) * 0))


def test_what_torchao_cannot_prepare_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise TypeError("no such channel\nand more words")

    monkeypatch.setattr(edgecompress.int8.capture, "prepare_pt2e", stopped)
    with pytest.raises(QuantizationError, match=r"torchao stopped with TypeError: no such channel; give it") as caught:
        quantized(seeded(Residual()))
    assert "\n" not in str(caught.value)


# --- The scheme.


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize(
    ("target", "activations", "bits"),
    [
        (None, "uint8", None),
        ("x86", "uint8", None),
        ("x86-avx2", "uint8", 7),
        ("x86-vnni", "uint8", 8),
        ("arm64", "int8", 8),
        ("rpi4", "int8", 8),
        ("rpi5", "int8", 8),
    ],
)
def test_scheme_of_every_target(
    monkeypatch: pytest.MonkeyPatch, vnni: bool, target: str | None, activations: str, bits: int | None
) -> None:
    monkeypatch.setattr(edgecompress.int8.scheme, "has_vnni", lambda: vnni)
    monkeypatch.setattr(edgecompress.int8.scheme, "fits", lambda _: [])
    scheme, why = resolve_scheme(stage(), load_target(target) if target else None)
    expected = bits if bits is not None else 8 if vnni else 7
    assert scheme == Scheme(activations, expected)
    assert why.startswith(f"{expected}-bit weights")
    if bits is None:
        assert "VNNI" in why
    elif target is not None:
        assert target in why or "Arm" in why


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize("target", [None, "x86", "x86-avx2", "rpi4"])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_the_recipe_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch, vnni: bool, target: str | None, bits: int, activations: str
) -> None:
    monkeypatch.setattr(edgecompress.int8.scheme, "has_vnni", lambda: vnni)
    given = stage(scheme={"activations": activations, "weight_bits": bits})
    scheme, why = resolve_scheme(given, load_target(target) if target else None)
    assert scheme == Scheme(activations, bits)
    assert why == f"{bits}-bit weights, as the recipe says"


@pytest.mark.parametrize("vnni", [False, True])
def test_auto_on_arm_does_not_ask_this_machine(monkeypatch: pytest.MonkeyPatch, vnni: bool) -> None:
    monkeypatch.setattr(edgecompress.int8.scheme, "has_vnni", lambda: vnni)
    target = load_target("rpi4").model_copy(update={"int8": Int8Scheme()})
    scheme, why = resolve_scheme(stage(), target)
    assert scheme == Scheme("int8", 8)
    assert "Arm" in why


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize(
    ("facts", "at_hand", "bits", "reason"),
    [
        ({"isa": ["avx2"]}, True, None, "this CPU has"),
        ({"isa": ["avx2"]}, False, 7, "target edge is another machine than this one and names no VNNI"),
        ({"isa": ["avx2"], "device": {"host": "pi@box"}}, True, 7, "target edge is another machine"),
        ({"isa": ["avx2", "avx512_vnni"]}, False, 8, "target edge has VNNI"),
        ({"isa": ["avx512_vnni|avx_vnni"], "device": {"host": "pi@box"}}, False, 8, "target edge has VNNI"),
        ({"isa": ["avx2|avx_vnni"]}, False, 7, "target edge is another machine"),  # which one it has is open
        ({}, True, None, "this CPU has"),
        ({"device": {"host": "pi@box"}}, True, 7, "target edge is another machine"),
    ],
)
def test_auto_asks_this_machine_only_about_itself(
    monkeypatch: pytest.MonkeyPatch, vnni: bool, facts: dict[str, Any], at_hand: bool, bits: int | None, reason: str
) -> None:
    monkeypatch.setattr(edgecompress.int8.scheme, "has_vnni", lambda: vnni)
    monkeypatch.setattr(edgecompress.int8.scheme, "fits", lambda _: [] if at_hand else ["another machine"])
    target = Target.model_validate({"name": "edge", "architecture": "x86_64", **facts})
    scheme, why = resolve_scheme(stage(), target)
    expected = bits or (8 if vnni else 7)
    assert scheme == Scheme("uint8", expected)
    assert why.startswith(f"{expected}-bit weights: {reason}")
    assert adds_in_16_bits(target) is (expected == 7)
