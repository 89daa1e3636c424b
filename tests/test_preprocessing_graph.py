"""Preprocessing inside the ONNX file: the pixels that PIL gives, the same logits, and what the file says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from PIL import Image

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ExportError
from edgecompress.exporting.onnx_export import check_file, open_session
from edgecompress.exporting.preprocessing_graph import PREFIX, describe_signature, embed_preprocessing, input_form
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.settings.target import load_target
from int8_models import CLASSES, PREPROCESSING, SIZE, Residual, export, quantized, seeded

SIDE = 24
SIZES = [(24, 24), (64, 48), (37, 91), (96, 25), (24, 60), (13, 17), (200, 31)]  # width, height


def photograph(width: int, height: int, *, channels: int = 3, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth, with edges and noise: what interpolations differ on."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 5, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    smooth[height // 3 :, width // 2 :] = 255 - smooth[height // 3 :, width // 2 :]
    noisy = np.clip(smooth + generator.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    return noisy[..., :channels]


def pixels_as_logits(preprocessing: Preprocessing) -> onnx.ModelProto:
    """A model that hands back what it reads, so that the graph in front of it is seen naked."""
    side, channels = preprocessing.input_size, preprocessing.channels
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["logits"])],
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", channels, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", channels * side * side])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def as_image(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875, 0.7])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_the_pixels_are_those_of_pil(interpolation: str, crop_fraction: float, channels: int) -> None:
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    preprocessing = Preprocessing(SIDE, channels, mean, std, interpolation, crop_fraction)
    running = session(embed_preprocessing(pixels_as_logits(preprocessing), preprocessing))
    for number, (width, height) in enumerate(SIZES):
        photo = photograph(width, height, channels=channels, seed=number)
        (normalized,) = running.run(None, {"input": photo[None]})
        levels = normalized.reshape(channels, SIDE, SIDE).astype(np.float64)
        levels = (levels * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))) * 255
        difference = np.abs(levels - preprocessing.prepare(as_image(photo)))
        # Both go along the width first and round in between; only sums that lie on the edge between two levels differ,
        # and ratios as simple as those of these small images have the most of them.
        assert difference.max() < 1.01, (width, height)
        assert np.mean(difference > 0.5) < {"nearest": 1e-9, "bilinear": 0.1, "bicubic": 0.005}[interpolation]
        if (width, height) == (SIDE, SIDE) and crop_fraction == 1.0:
            assert difference.max() < 1e-4


def test_without_a_free_size_the_pixels_are_only_normalized() -> None:
    preprocessing = Preprocessing(SIDE, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.8)
    made = embed_preprocessing(pixels_as_logits(preprocessing), preprocessing, any_size=False)
    assert {node.op_type for node in made.graph.node} == {"Transpose", "Cast", "Sub", "Mul", "Flatten"}
    running = session(made)
    assert running.get_inputs()[0].shape == ["batch", SIDE, SIDE, 3]
    photos = np.stack([photograph(SIDE, SIDE, seed=seed) for seed in range(3)])
    (normalized,) = running.run(None, {"input": photos})
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    wanted = ((photos / 255 - mean) / std).transpose(0, 3, 1, 2).reshape(3, -1)
    assert np.abs(normalized - wanted).max() < 1e-6


@pytest.fixture(scope="module", params=["float", "int8"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / f"{request.param}.onnx"
    module = seeded(Residual())
    export(module if request.param == "float" else quantized(module).graph, path, target=load_target("x86-avx2"))
    return path


def test_a_real_model_keeps_its_answers(plain: Path, tmp_path: Path) -> None:
    model = onnx.load(plain)
    made = embed_preprocessing(model, PREPROCESSING, softmax=True, top_k=2)
    onnx.save(made, tmp_path / "pixels.onnx")
    check_file(tmp_path / "pixels.onnx")
    assert (made.ir_version, made.opset_import[0].version) == (model.ir_version, model.opset_import[0].version)
    photos = [photograph(width, height, seed=width) for width, height in SIZES]
    before, after = open_session(plain, threads=1), open_session(tmp_path / "pixels.onnx", threads=1)
    for photo in photos:
        prepared = PREPROCESSING.prepare(as_image(photo))
        normalized = (prepared / np.float32(255) - np.reshape(PREPROCESSING.mean, (3, 1, 1))) / np.reshape(
            PREPROCESSING.std, (3, 1, 1)
        )
        (wanted,) = before.run(None, {"input": normalized[None].astype(np.float32)})
        logits, probabilities, top_probabilities, top_indices = after.run(None, {"input": photo[None]})
        assert np.abs(logits - wanted).max() < (0.02 if plain.stem == "float" else 0.06) * np.ptp(wanted)
        exponentials = np.exp(logits - logits.max())
        np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(), rtol=1e-5)
        order = np.argsort(-probabilities[0], kind="stable")[:2]
        assert top_indices[0].tolist() == order.tolist()
        assert top_probabilities[0].tolist() == probabilities[0][order].tolist()
    # And several at once, which must have one size.
    batch = np.stack([photograph(40, 30, seed=seed) for seed in range(5)])
    together = after.run(["logits"], {"input": batch})[0]
    alone = np.concatenate([after.run(["logits"], {"input": batch[i : i + 1]})[0] for i in range(5)])
    assert together.shape == (5, CLASSES)
    np.testing.assert_allclose(together, alone, atol=1e-5 if plain.stem == "float" else 3 / 255 * np.ptp(alone))


def test_the_integer_graph_behind_is_the_same(plain: Path, tmp_path: Path) -> None:
    onnx.save(embed_preprocessing(onnx.load(plain), PREPROCESSING), tmp_path / "pixels.onnx")
    before, after = inspect_integer_graph(plain), inspect_integer_graph(tmp_path / "pixels.onnx")
    assert (after.macs, after.int8_mac_coverage) == (before.macs, before.int8_mac_coverage)
    assert after.integer_nodes == before.integer_nodes
    assert (after.quantize_nodes, after.dequantize_nodes) == (before.quantize_nodes, before.dequantize_nodes)
    assert after.float_islands == before.float_islands


def test_the_file_says_what_it_reads_and_gives(plain: Path) -> None:
    model = onnx.load(plain)
    old = {entry.key: entry.value for entry in model.metadata_props}
    assert old["edgecompress.input_form"] == "float32_nchw" == input_form(model)
    assert json.loads(old["edgecompress.inputs"]) == [
        {"name": "input", "dtype": "float32", "shape": ["batch", 3, SIZE, SIZE]}
    ]
    made = embed_preprocessing(model, PREPROCESSING, top_k=3)
    new = {entry.key: entry.value for entry in made.metadata_props}
    assert new["edgecompress.input_form"] == "uint8_nhwc" == input_form(made)
    assert json.loads(new["edgecompress.inputs"]) == [
        {"name": "input", "dtype": "uint8", "shape": ["batch", "height", "width", 3]}
    ]
    assert json.loads(new["edgecompress.outputs"]) == [
        {"name": "logits", "dtype": "float32", "shape": ["batch", CLASSES]},
        {"name": "top_k_probabilities", "dtype": "float32", "shape": ["batch", 3]},
        {"name": "top_k_indices", "dtype": "int64", "shape": ["batch", 3]},
    ]
    changed = {"edgecompress.input_form", "edgecompress.inputs", "edgecompress.outputs"}
    assert {key: value for key, value in new.items() if key not in changed} == {
        key: value for key, value in old.items() if key not in changed
    }
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT  # the given model is left alone


def test_what_cannot_be_embedded_is_refused() -> None:
    preprocessing = Preprocessing(SIDE, 3, (0.5,) * 3, (0.5,) * 3)
    model = pixels_as_logits(preprocessing)
    with pytest.raises(ExportError, match="preprocessing is inside"):
        embed_preprocessing(embed_preprocessing(model, preprocessing), preprocessing)
    with pytest.raises(
        ExportError, match=r"reads \['batch', 3, 24, 24\], its preprocessing gives \[batch, 3, 32, 32\]"
    ):
        embed_preprocessing(model, Preprocessing(32, 3, (0.5,) * 3, (0.5,) * 3))
    for wrong in (0, 3 * SIDE * SIDE + 1):
        with pytest.raises(ExportError, match="top_k"):
            embed_preprocessing(model, preprocessing, top_k=wrong)
    model.graph.output[0].name = "scores"
    with pytest.raises(ExportError, match="not 'logits'"):
        embed_preprocessing(model, preprocessing)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    with pytest.raises(ExportError, match="no input 'input' of float32 or uint8"):
        describe_signature(model)


def test_every_new_node_can_be_told_from_the_models_own(plain: Path) -> None:
    model = onnx.load(plain)
    made = embed_preprocessing(model, PREPROCESSING)
    own = [node.name for node in model.graph.node]
    assert [node.name for node in made.graph.node if not node.name.startswith(PREFIX)] == own
