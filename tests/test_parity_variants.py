"""One file in other settings gives the same answers, and where it does not, the check fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from edgecompress.data.images import FileItems, ImageSplit
from edgecompress.exporting.onnx_export import export_with_preprocessing
from edgecompress.exporting.ort_format import OPERATORS_FILE, convert, mobile_usability, remove_stale
from edgecompress.exporting.parity import Logits, run_onnx
from edgecompress.exporting.parity_variants import (
    Subset,
    choose_subset,
    compare_ort_format,
    compare_variants,
    compare_with_preprocessing,
)
from edgecompress.settings.recipe import Gates
from edgecompress.settings.target import load_target
from int8_models import PREPROCESSING, Residual, export, quantized, seeded
from test_preprocessing_graph import photograph

COUNT = 24
TARGET = load_target("x86-avx2")
GATES = Gates(preprocessing_min_top1_agreement=0.95)


@dataclass(frozen=True)
class Exported:
    folder: Path
    subset: Subset
    usual: dict[str, Logits]

    @property
    def files(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}.onnx" for name in self.usual}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A float and an int8 file, and their logits on photographs of many sizes."""
    folder = tmp_path_factory.mktemp("exported")
    names = [f"{number}.png" for number in range(COUNT)]
    for number, name in enumerate(names):
        Image.fromarray(photograph(20 + 3 * number, 70 - 2 * number, seed=number)).save(folder / name)
    sizes = tuple((folder / name).stat().st_size for name in names)
    items = FileItems(folder, tuple(names), sizes)
    split = ImageSplit("test", np.zeros(COUNT, np.int64), items).prepare(PREPROCESSING, cache=False)
    indices = np.arange(COUNT, dtype=np.int64)
    subset = choose_subset(split, PREPROCESSING, indices, samples=16, seed=1)
    module = seeded(Residual())
    export(module, folder / "fp32.onnx", target=TARGET)
    export(quantized(module).graph, folder / "int8.onnx", target=TARGET)
    usual = {
        name: run_onnx(folder / f"{name}.onnx", split, PREPROCESSING, indices, target=TARGET)
        for name in ("fp32", "int8")
    }
    return Exported(folder, subset, {name: found[subset.positions] for name, found in usual.items()})


def test_the_choice_is_seeded_and_in_order(exported: Exported) -> None:
    subset = exported.subset
    again, other = (
        choose_subset(subset.split, PREPROCESSING, subset.indices, samples=16, seed=seed).positions for seed in (1, 2)
    )
    assert len(subset) == 16
    assert np.array_equal(again, subset.positions)
    assert np.array_equal(np.unique(again), again)
    assert not np.array_equal(again, other)
    everything = choose_subset(subset.split, PREPROCESSING, subset.indices, samples=1000, seed=1)
    assert len(everything) == COUNT


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_batches_threads_and_optimizer_change_nothing_that_matters(exported: Exported, precision: str) -> None:
    path, reference = exported.files[precision], exported.usual[precision]
    found = compare_variants(path, exported.subset, reference, GATES, precision=precision, target=TARGET)
    assert found["passed"]
    assert [(row["batch"], row["threads"], row["graph_optimization"]) for row in found["runs"]] == [
        (1, 1, "all"),
        (8, "all", "all"),
        (8, "all", "none"),
    ]
    assert found["samples"] == 16
    if precision == "int8":
        assert found["runs"][2]["note"]
    # The same check on other answers must fail, and say in which run.
    wrong = np.roll(reference, 1, axis=1)
    failed = compare_variants(path, exported.subset, wrong, GATES, precision=precision, target=TARGET)
    assert not failed["passed"]
    sentences = [check["sentence"] for check in failed["checks"] if not check["passed"]]
    assert any(sentence.startswith(f"{precision} with batch ") for sentence in sentences)
    assert all(check["gate"].startswith(f"{precision}_runs_") for check in failed["checks"])


def test_ort_format_is_the_same_model(exported: Exported, tmp_path: Path) -> None:
    made = convert(list(exported.files.values()), tmp_path, target=TARGET)
    assert [path.name for path in made] == ["fp32.ort", "int8.ort"]
    files = dict(zip(exported.files, made, strict=True))
    found = compare_ort_format(files, exported.usual, exported.subset, GATES, whole_images=False, target=TARGET)
    assert found["passed"]
    assert found["int8"]["top1_agreement"] == 1.0
    assert found["fp32"]["size_bytes"] == made[0].stat().st_size
    operators = (tmp_path / OPERATORS_FILE).read_text()
    assert "QLinearConv" in operators
    assert "nchwc" not in operators  # weights laid out for this machine's vectors would be wrong on another
    assert "/" not in operators.replace("com/", "")
    mixed = {"fp32": files["int8"], "int8": files["fp32"]}
    failed = compare_ort_format(mixed, exported.usual, exported.subset, GATES, whole_images=False, target=TARGET)
    assert not failed["fp32"]["passed"]
    assert remove_stale(tmp_path) == ["fp32.ort", "int8.ort", OPERATORS_FILE]
    assert list(tmp_path.iterdir()) == []


def test_the_mobile_checker_says_what_phones_can_run(exported: Exported) -> None:
    found = mobile_usability(exported.files["int8"])
    assert found["inputs_with_free_shapes"] == ["input"]
    assert found["nnapi"]["as_is"] == "NO"  # the batch is free
    assert found["coreml_mlprogram"]["with_fixed_shapes"] == "NO"
    assert "ai.onnx:QuantizeLinear" in found["coreml_mlprogram"]["unsupported_operators"]
    assert mobile_usability(exported.files["fp32"])["nnapi"]["with_fixed_shapes"] == "YES"


def test_preprocessing_inside_agrees_on_images_as_they_come(exported: Exported, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.onnx" for name in exported.files}
    for name, path in files.items():
        export_with_preprocessing(exported.files[name], path)
    labels = exported.usual["fp32"].argmax(axis=1)
    found, logits = compare_with_preprocessing(files, exported.usual, exported.subset, labels, GATES, target=TARGET)
    assert found["images_resized"] == 16
    assert found["fp32"]["accuracy_python"] == 1.0
    assert found["fp32"]["passed"]
    assert found["passed"]
    assert found["top1_agreement"] == found["fp32"]["top1_agreement"]
    assert 0 < found["max_abs_diff"] < 0.2 * np.ptp(exported.usual["fp32"])
    assert logits["int8"].shape == (16, 5)


def test_wrong_preprocessing_inside_is_a_failure(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.files["fp32"])
    for entry in model.metadata_props:
        if entry.key == "edgecompress.preprocessing":
            entry.value = entry.value.replace("[0.5, 0.4, 0.3]", "[0.0, 0.4, 1.3]")
    onnx.save(model, tmp_path / "plain.onnx")
    export_with_preprocessing(tmp_path / "plain.onnx", tmp_path / "fp32.onnx")
    labels = np.zeros(16, np.int64)
    found, _ = compare_with_preprocessing(
        {"fp32": tmp_path / "fp32.onnx"}, exported.usual, exported.subset, labels, GATES, target=TARGET
    )
    (check,) = found["checks"]
    assert not check["passed"]
    assert check["gate"] == "inside_preprocessing_min_top1_agreement"
    assert "agrees with the Python pipeline on" in check["sentence"]


def test_int8_inside_must_be_as_close_to_float_as_the_plain_file(exported: Exported, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.onnx" for name in exported.files}
    for name, path in files.items():
        export_with_preprocessing(exported.files[name], path)
    labels = np.zeros(16, np.int64)
    # Two images of which the plain file says something else, and rightly as rarely: no loss.
    other = exported.usual["int8"].copy()
    other[:2] = -other[:2]
    found, _ = compare_with_preprocessing(
        files, exported.usual | {"int8": other}, exported.subset, labels, GATES, target=TARGET
    )
    assert found["int8"]["top1_agreement"] <= 14 / 16
    assert found["int8"]["won"] == 2
    assert found["int8"]["passed"]
    # An int8 file that sees other pixels than fp32 does is caught, whatever fp32 says.
    model = onnx.load(exported.files["int8"])
    for entry in model.metadata_props:
        if entry.key == "edgecompress.preprocessing":
            entry.value = entry.value.replace("[0.5, 0.4, 0.3]", "[0.0, 0.4, 1.3]")
    onnx.save(model, tmp_path / "plain.onnx")
    export_with_preprocessing(tmp_path / "plain.onnx", files["int8"])
    failed, _ = compare_with_preprocessing(files, exported.usual, exported.subset, labels, GATES, target=TARGET)
    assert failed["fp32"]["passed"]
    assert not failed["int8"]["passed"]
    assert failed["int8"]["lost"] > failed["int8"]["won"]
    (check,) = failed["checks"]
    assert check["sentence"].startswith("int8 with preprocessing inside agrees with fp32 on ")
