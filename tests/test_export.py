"""The exported file: what it says about itself, what it does not say, and that it computes the model."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import edgecompress
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ExportError
from edgecompress.exporting.onnx_export import Provenance, check_file, export_onnx, open_session
from edgecompress.settings.configuration import validate
from edgecompress.settings.target import Target, load_target
from int8_models import CLASSES, PREPROCESSING, PROVENANCE, SIZE, Residual, conv, export, images, quantized, run, seeded


@dataclass(frozen=True)
class File:
    """One export of a net in training mode, and what stdout saw of it."""

    kind: str
    path: Path
    module: nn.Module
    stdout: str


OLDEST = load_target("rpi4").model_copy(update={"onnxruntime_min": "1.14"})
TARGETS = {"float": OLDEST, "int8": load_target("x86-avx2")}


@pytest.fixture(scope="module", params=["float", "int8"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> File:
    folder = tmp_path_factory.mktemp("export")
    module: nn.Module = seeded(Residual())
    if request.param == "int8":
        module = quantized(module).graph
    else:
        module.train()
    with redirect_stdout(io.StringIO()) as printed:
        export(module, folder / "model.onnx", target=TARGETS[request.param])
    return File(request.param, folder / "model.onnx", module, printed.getvalue())


@pytest.mark.parametrize("opset", [21, 23])
def test_a_newer_opset_computes_the_same(file: File, opset: int, tmp_path: Path) -> None:
    """Up to the newest that a target may ask for; between float and int8 nothing is lost to the conversion."""
    target = validate(
        Target,
        {"name": "t", "architecture": "x86_64", "opset": opset, "onnxruntime_min": "1.23"},
        source="t",
    )
    with redirect_stdout(io.StringIO()):
        export(file.module, tmp_path / "newer.onnx", target=target)
    model = onnx.load(tmp_path / "newer.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    assert model.ir_version == target.ir_version == 11
    np.testing.assert_allclose(run(tmp_path / "newer.onnx", images(8)), run(file.path, images(8)), rtol=1e-5, atol=1e-5)


def test_version_numbers_are_the_targets(file: File) -> None:
    model, target = onnx.load(file.path), TARGETS[file.kind]
    assert model.ir_version == target.ir_version == {"float": 8, "int8": 9}[file.kind]
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions[""] == target.opset == 18
    assert set(versions) <= {"", "ai.onnx"}  # nothing that only some runtimes know
    assert model.producer_name == "edgecompress"


def test_input_and_output(file: File) -> None:
    session = open_session(file.path, threads=1)
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("input", "tensor(float)", [3, SIZE, SIZE])
    assert (made.name, made.type, made.shape[1:]) == ("logits", "tensor(float)", [CLASSES])
    assert isinstance(given.shape[0], str)  # a free axis has a name instead of a number
    assert isinstance(made.shape[0], str)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_batch_is_free(file: File, count: int) -> None:
    inputs = images(7, seed=2)
    with torch.no_grad():
        wanted = (seeded(Residual()) if file.kind == "float" else file.module)(inputs)[:count].numpy()
    got = run(file.path, inputs[:count])
    assert got.shape == (count, CLASSES)
    tolerance = 1e-5 if file.kind == "float" else 3 / 255
    assert np.abs(got - wanted).max() <= tolerance * np.ptp(wanted)


def test_metadata_say_what_a_device_must_know(file: File) -> None:
    facts = {entry.key: entry.value for entry in onnx.load(file.path).metadata_props}
    assert all(key.startswith("edgecompress.") for key in facts)
    assert json.loads(facts["edgecompress.labels"]) == list(PROVENANCE.class_names)
    assert Preprocessing.from_dict(json.loads(facts["edgecompress.preprocessing"])) == PREPROCESSING
    assert json.loads(facts["edgecompress.versions"]) == PROVENANCE.versions
    assert facts["edgecompress.recipe"] == PROVENANCE.recipe_name
    assert facts["edgecompress.recipe_sha256"] == PROVENANCE.recipe_sha256
    assert facts["edgecompress.precision"] == "test"
    # The runtime hands them to the device without the onnx package.
    assert open_session(file.path).get_modelmeta().custom_metadata_map == facts


def test_nothing_of_this_machine_is_in_the_file(file: File) -> None:
    content = file.path.read_bytes()
    places = [
        "site-packages",
        "Traceback",
        ".py",
        str(file.path.parent),
        tempfile.gettempdir(),
        str(Path(edgecompress.__file__).parent),
        str(Path(__file__).parent),
        str(Path(torch.__file__).parent),
        str(Path.home()) + "/",
    ]
    assert [place for place in places if place.encode() in content] == []
    model = onnx.load(file.path)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert [path.name for path in file.path.parent.iterdir()] == ["model.onnx"]


def test_stdout_stays_free(file: File) -> None:
    assert file.stdout == ""


def test_modes_of_the_module_are_put_back(file: File) -> None:
    assert all(child.training == (file.kind == "float") for child in file.module.modules() if _has_mode(child))


def _has_mode(child: nn.Module) -> bool:
    return isinstance(child, (nn.BatchNorm2d, nn.Dropout, Residual))


def test_int8_weights_are_stored_as_int8(file: File) -> None:
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file.path).graph.initializer]
    count = sum(parameter.numel() for name, parameter in Residual().named_parameters() if parameter.dim() > 1)
    stored = sum(array.size for array in arrays if array.dtype == np.int8 and array.ndim > 1)
    floats = sum(array.size for array in arrays if array.dtype == np.float32 and array.ndim > 1)
    assert (stored, floats) == ((0, count) if file.kind == "float" else (count, 0))


# --- What is refused.


class DependsOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("the net's own words\nand more of them")


class NoOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).abs()


class WrongChannels(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(4, 8))


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (DependsOnValues, "data-dependent"),
        (FixedBatch, "batch"),
        (Fails, "the net's own words"),
        (NoOperator, "linalg_eig"),
        (WrongChannels, "to have 4 channels, but got 3"),
    ],
)
def test_modules_that_cannot_be_exported_are_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], net: Callable[[], nn.Module], reason: str
) -> None:
    with pytest.raises(ExportError, match="cannot be exported to ONNX") as caught:
        export(net().eval(), tmp_path / "model.onnx")
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert "\x1b" not in message
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_a_pool_with_a_divisor_of_its_own_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(conv(3, 8), nn.AvgPool2d(2, divisor_override=3))
    with pytest.raises(ExportError, match=r"^1: divisor_override=3 of an average pool .* multiply what the pool gives"):
        export(net.eval(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _unknown_operator(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "Convolve"
    return model.SerializeToString()


def _dangling_input(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    model.graph.node[-1].input[0] = "nowhere"
    return model.SerializeToString()


def _text(content: bytes) -> bytes:
    return b"not a model"


def _empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [_truncated, _text, _empty, _unknown_operator, _dangling_input])
def test_damaged_files_are_refused(file: File, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    check_file(file.path)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(damage(file.path.read_bytes()))
    with pytest.raises(ExportError, match=r"broken\.onnx: (the ONNX checker refuses it|ONNX Runtime cannot load it)"):
        check_file(broken)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"absent\.onnx: ONNX Runtime cannot load it"):
        open_session(tmp_path / "absent.onnx")


def test_a_file_that_the_checker_refuses_does_not_replace_an_older_one(
    file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise ExportError(f"{path.name}: refused")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"the older one")
    monkeypatch.setattr(
        "edgecompress.exporting.onnx_export.translate", lambda *_: SimpleNamespace(model_proto=onnx.load(file.path))
    )
    monkeypatch.setattr("edgecompress.exporting.onnx_export.check_file", refuse)
    with pytest.raises(ExportError, match="refused"):
        export(file.module, path)
    assert path.read_bytes() == b"the older one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_a_channels_last_module_exports_the_same_operators(tmp_path: Path) -> None:
    """Its layout must not become gathers, which no kernel fuses (seen with a pooled EfficientNet head)."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    operators = []
    for name, layout in (("plain", torch.contiguous_format), ("last", torch.channels_last)):
        export_onnx(
            net.to(memory_format=layout),
            torch.zeros(2, 1, 8, 8),
            tmp_path / f"{name}.onnx",
            target=load_target("x86"),
            preprocessing=Preprocessing(8, 1, (0.5,), (0.5,), "bilinear", 1.0),
            provenance=Provenance((), "test", "", {}),
            extra_metadata={},
        )
        operators.append([node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node])
    assert operators[0] == operators[1]
    assert "Gather" not in operators[1]
