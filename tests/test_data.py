from __future__ import annotations

import contextlib
import gzip
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgecompress import console
from edgecompress.data import data_sources, images
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import calibration_indices, open_data
from edgecompress.errors import DataError
from edgecompress.settings.recipe import DataSettings

PLAIN = Preprocessing(8, 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
GREY8 = Preprocessing(8, 1, (0.5,), (0.5,), "bilinear", 1.0)


def solid(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def make_folder(root: Path, splits: dict[str, dict[str, int]], size: tuple[int, int] = (8, 8)) -> Path:
    """Images whose red is their class's number and whose green is their position."""
    names = sorted({name for classes in splits.values() for name in classes})
    for split, classes in splits.items():
        (root / split).mkdir(parents=True)
        for name, count in classes.items():
            (root / split / name).mkdir()
            for position in range(count):
                solid(root / split / name / f"{position:03d}.png", (names.index(name), position, 0), size)
    return root


def folder(root: Path, **more: object) -> DataSettings:
    return DataSettings.model_validate({"name": "image_folder", "root": root, **more})


# ---- digits and the drawing of splits


def test_digits_are_split_in_three_without_overlap() -> None:
    data = open_data(DataSettings(name="digits"))
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 1222, "val": 216, "test": 359}
    assert (data.num_classes, data.channels, data.native_size, data.report_split) == (10, 1, 8, "test")
    everything = np.concatenate([split.items.pixels.reshape(-1, 64) for split in data.splits.values()])
    assert everything.max() == 255
    rows = {row.tobytes() for row in everything}
    # Digits holds no image twice, so as many different rows as images means no overlap and nothing lost.
    assert len(everything) == len(rows) == 1797
    for split in data.splits.values():
        shares = np.bincount(split.labels) / len(split)
        assert np.abs(shares - 0.1).max() < 0.01


def test_splits_depend_on_their_seed_alone() -> None:
    first, again = (open_data(DataSettings(name="digits")) for _ in range(2))
    other = open_data(DataSettings(name="digits", split_seed=1))
    negative = open_data(DataSettings(name="digits", split_seed=-1))
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, negative.fingerprint}) == 3
    # The test split does not move when val is drawn in another size.
    smaller = open_data(DataSettings(name="digits", val_fraction=0.05))
    np.testing.assert_array_equal(smaller.splits["test"].items.pixels, first.splits["test"].items.pixels)
    assert smaller.fingerprint != first.fingerprint


def test_a_training_subset_is_balanced_and_leaves_the_rest_alone() -> None:
    whole = open_data(DataSettings(name="digits"))
    part = open_data(DataSettings(name="digits", max_train_samples=55))
    assert set(np.bincount(part.splits["train"].labels)) == {5, 6}
    np.testing.assert_array_equal(part.splits["val"].items.pixels, whole.splits["val"].items.pixels)
    assert any("class-balanced subset of 55" in note for note in part.notes)
    assert part.fingerprint != whole.fingerprint
    more = open_data(DataSettings(name="digits", max_train_samples=10**6))
    assert more.fingerprint == whole.fingerprint
    assert any("all 1222 images are used" in note for note in more.notes)


def test_describe_is_json() -> None:
    facts = json.loads(json.dumps(open_data(DataSettings(name="digits")).describe()))
    assert facts["splits"]["test"] == 359
    assert facts["report_split"] == "test"
    assert len(facts["fingerprint"]) == 64


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    samples=st.integers(1, 150),
    seed=st.integers(-5, 2**70),
)
def test_calibration_is_balanced_in_every_prefix(counts: list[int], samples: int, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)) * 3, counts))
    chosen = calibration_indices(labels, samples, seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(samples, len(labels))
    np.testing.assert_array_equal(chosen, calibration_indices(labels, samples, seed))
    for length in range(1, len(chosen) + 1):
        taken = [int((labels[chosen[:length]] == 3 * number).sum()) for number in range(len(counts))]
        # A class may lag behind the fullest by more than one only when it is used up.
        assert all(max(taken) - have <= 1 or have == total for have, total in zip(taken, counts, strict=True))


def test_calibration_depends_on_the_seed() -> None:
    labels = np.repeat(np.arange(10), 50)
    assert set(calibration_indices(labels, 40, 0).tolist()) != set(calibration_indices(labels, 40, 1).tolist())


def test_an_unknown_source_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'fashion_mnist'"):
        open_data(DataSettings(name="fashion-mnist"))
    with pytest.raises(DataError, match=r"known: .*digits.*file.py:function"):
        open_data(DataSettings(name="zzzz"))


# ---- binary layouts


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_fashion_mnist(root: Path, compress: bool = False) -> dict[str, np.ndarray]:
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for prefix, count in (("train", 60), ("t10k", 20)):
        arrays[prefix] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, array in ((f"{prefix}-images-idx3-ubyte", arrays[prefix]), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = idx(array)
            (root / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return arrays


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("inside", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_idx(tmp_path: Path, compress: bool, inside: str) -> None:
    arrays = write_fashion_mnist(tmp_path / inside, compress)
    data = open_data(DataSettings(name="fashion_mnist", root=tmp_path, val_fraction=0.5))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 30, "val": 30, "test": 20}
    np.testing.assert_array_equal(data.splits["test"].items.pixels, arrays["t10k"])
    assert data.splits["test"].labels.tolist() == [n % 10 for n in range(20)]
    assert (data.native_size, data.channels, data.class_names[9]) == (28, 1, "Ankle boot")


def test_fashion_mnist_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_fashion_mnist(tmp_path / "data")
    assert len(open_data(DataSettings(name="fashion_mnist")).splits["test"]) == 20


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t10k-images-idx3-ubyte", b"", "not an IDX file"),
        ("t10k-images-idx3-ubyte", b"\0\0\x0d\3" + bytes(12), "not an IDX file"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((20, 28, 28), np.uint8))[:-1], "holds only 15679"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((20, 28, 28), np.uint8)) + b"x", "holds more"),
        ("t10k-images-idx3-ubyte", bytes((0, 0, 8, 3)) + b"\xff" * 12, "claims the shape"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((19, 28, 28), np.uint8)), "19 images and 20 labels"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((20, 28, 27), np.uint8)), "not square"),
        ("t10k-labels-idx1-ubyte", idx(np.full(20, 10, np.uint8)), r"20 labels are outside 0\.\.9"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        open_data(DataSettings(name="fashion_mnist", root=tmp_path))


@given(content=st.binary(max_size=200))
@settings(max_examples=60)
def test_no_bytes_crash_the_idx_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    place = tmp_path_factory.mktemp("idx")
    for prefix in (b"", bytes((0, 0, 8, 1)), b"\x1f\x8b\x08\0"):
        (place / "labels.gz").write_bytes(prefix + content)
        (place / "plain").write_bytes(prefix + content)
        for name in ("labels", "plain"):
            with contextlib.suppress(DataError):
                assert data_sources._read_idx(place, name, dimensions=1).dtype == np.uint8


def test_missing_fashion_mnist_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root.*data\.download: true.*dataset-fashion-mnist") as caught:
        open_data(DataSettings(name="fashion_mnist", root=tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_download_happens_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fetch(root: str, download: bool) -> None:
        assert download
        calls.append(root)
        write_fashion_mnist(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    for _ in range(2):
        data = open_data(DataSettings(name="fashion_mnist", root=tmp_path, download=True))
        assert len(data.splits["test"]) == 20
    assert calls == [str(tmp_path)]


def test_a_failed_download_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    with pytest.raises(DataError, match=r"download failed \(no route to host\)"):
        open_data(DataSettings(name="cifar10", root=tmp_path, download=True))


def write_cifar10(folder: Path, per_file: int = 4) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate([f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]):
        rows = []
        for position in range(per_file):
            planes = [np.full(1024, value, np.uint8) for value in (number, position, 200)]
            rows.append(bytes([position % 2]) + b"".join(plane.tobytes() for plane in planes))
        (folder / name).write_bytes(b"".join(rows))


def test_cifar10_is_read_from_its_binary_version(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    data = open_data(DataSettings(name="cifar10", root=tmp_path))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 17, "val": 3, "test": 4}
    preprocessing = Preprocessing(32, 3, (0.5,) * 3, (0.5,) * 3)
    pictures, labels = next(data.splits["test"].prepare(preprocessing, cache=False).batches(4))
    assert labels.tolist() == [0, 1, 0, 1]
    assert pictures[3, :, 31, 0].tolist() == [5, 3, 200]
    assert data.class_names[9] == "truck"


def test_cifar10_of_a_wrong_size_is_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "here")
    with (tmp_path / "here" / "data_batch_3.bin").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*whole records"):
        open_data(DataSettings(name="cifar10", root=tmp_path / "here"))


def test_the_pickled_cifar10_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(DataError, match="a pickle, which is never opened"):
        open_data(DataSettings(name="cifar10", root=tmp_path))


# ---- image folders


def test_a_folder_with_its_own_val(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": {"cat": 3, "ant": 2}, "val": {"cat": 2}, "test": {"ant": 1}})
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / "._000.png").write_bytes(b"junk")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    solid(tmp_path / "train" / "cat" / "more" / "X.JPEG", (1, 9, 0))
    data = open_data(folder(tmp_path))
    assert data.class_names == ("ant", "cat")
    assert {name: split.labels.tolist() for name, split in data.splits.items()} == {
        "train": [0, 0, 1, 1, 1, 1],
        "val": [1, 1],
        "test": [0],
    }
    assert (data.report_split, data.native_size, data.channels, data.has_class_index) == ("test", 8, 3, False)
    assert "val: holds 1 of 2 classes; no image of 'ant'" in data.notes


def test_without_val_a_stratified_part_of_train_is_drawn(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": {"a": 10, "b": 20, "c": 1}})
    data = open_data(folder(tmp_path, val_fraction=0.2))
    assert np.bincount(data.splits["val"].labels).tolist() == [2, 4]
    assert np.bincount(data.splits["train"].labels).tolist() == [8, 16, 1]
    assert data.report_split == "val"
    files = {name: set(split.items.files) for name, split in data.splits.items()}
    assert not files["train"] & files["val"]


def test_a_class_never_gives_its_last_image_away(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": {"a": 1, "b": 1, "c": 8}})
    data = open_data(folder(tmp_path, val_fraction=0.5))
    assert np.bincount(data.splits["train"].labels, minlength=3).tolist()[:2] == [1, 1]
    assert set(data.splits["val"].labels.tolist()) == {2}


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "one", {"train": {"a": 4, "b": 4}})
    second = make_folder(tmp_path / "two", {"train": {"a": 4, "b": 4}})
    before = open_data(folder(first)).fingerprint
    assert open_data(folder(second)).fingerprint == before
    solid(second / "train" / "a" / "000.png", (5, 5, 5), size=(60, 60))
    assert open_data(folder(second)).fingerprint != before


def test_mixed_sizes_have_no_native_size(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": {"a": 3, "b": 3}})
    solid(tmp_path / "train" / "a" / "001.png", (0, 0, 0), size=(9, 9))
    assert open_data(folder(tmp_path)).native_size is None


def test_grey_files_give_one_channel(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": {"a": 4, "b": 4}})
    for path in tmp_path.rglob("*.png"):
        Image.new("L", (8, 8), 3).save(path)
    assert open_data(folder(tmp_path)).channels == 1


def test_a_class_index_gives_numbers_and_a_lower_bound(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": {"dog": 2, "cat": 2}, "val": {"dog": 1}})
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"dog": 2, "cat": 5, "absent": 3}))
    data = open_data(folder(tmp_path, class_index=index))
    assert data.class_names == ("0", "1", "dog", "3", "4", "cat")
    assert data.has_class_index
    assert data.splits["train"].labels.tolist() == [5, 5, 2, 2]
    assert [note for note in data.notes if "classes" in note] == ["val: holds 1 of 2 classes; no image of 'cat'"]
    wider = data.with_num_classes(8)
    assert wider.class_names[5:] == ("cat", "6", "7")
    assert wider.fingerprint == data.fingerprint
    with pytest.raises(DataError, match="6 classes, which 3 cannot hold"):
        data.with_num_classes(3)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ('{"dog": 1}', "unknown class folders 'cat'"),
        ('{"dog": 1, "cat": 1}', "both have index 1"),
        ('{"dog": 1, "cat": -2}', "'cat': -2 is no class index"),
        ('{"dog": 1, "cat": true}', "'cat': True is no class index"),
        ('{"dog": 1, "cat": 2.0}', r"'cat': 2\.0 is no class index"),
        ('{"dog": 1, "cat": 99999999999}', "is no class index"),
        ('{"dog": 1, "cat": 2, "dog": 3}', "listed twice: 'dog'"),
        ("[1, 2]", "JSON object"),
        ("{}", "JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_a_wrong_class_index_is_refused(tmp_path: Path, index: str, match: str) -> None:
    make_folder(tmp_path, {"train": {"dog": 1, "cat": 1}})
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(DataError, match=match):
        open_data(folder(tmp_path, class_index=tmp_path / "index.json"))


def test_a_class_index_belongs_to_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class_index belongs to image_folder"):
        open_data(DataSettings(name="digits", class_index=tmp_path / "index.json"))
    make_folder(tmp_path, {"train": {"dog": 1, "cat": 1}})
    with pytest.raises(DataError, match=r"nowhere\.json.*cannot be read"):
        open_data(folder(tmp_path, class_index=tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("splits", "match"),
    [
        ({"val": {"a": 1}}, "has no folder train/"),
        ({"train": {}}, "no class folder"),
        ({"train": {"a": 0, "b": 0}}, "2 class folders and no image"),
        ({"train": {"a": 2, "b": 0}}, "without an image: 'b'"),
        ({"train": {"a": 2, "b": 2}, "val": {}}, "val: no class folder"),
        ({"train": {"a": 2, "b": 2}, "val": {"c": 1}}, "unknown class folders 'c'"),
        ({"train": {"a": 5}}, "only the class 'a'"),
        ({"train": {"a": 1, "b": 1}}, "leaves val or train empty"),
    ],
)
def test_incomplete_folders_are_refused(tmp_path: Path, splits: dict[str, dict[str, int]], match: str) -> None:
    make_folder(tmp_path, splits)
    with pytest.raises(DataError, match=match):
        open_data(folder(tmp_path))


def test_a_folder_needs_a_root() -> None:
    with pytest.raises(DataError, match=r"needs data\.root"):
        open_data(DataSettings(name="image_folder"))


# ---- the user's own arrays


def user_data(tmp_path: Path, body: str) -> DataSettings:
    (tmp_path / "mine.py").write_text(f"import numpy as np\n\ndef splits():\n    {body}\n")
    return DataSettings(name=f"{tmp_path}/mine.py:splits", val_fraction=0.25)


def test_arrays_of_the_users_own(tmp_path: Path) -> None:
    body = 'x = np.zeros((8, 6, 6), np.uint8); return {"train": (x, [0, 1] * 4), "test": (x, [1] * 8)}'
    data = open_data(user_data(tmp_path, body))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6, "val": 2, "test": 8}
    assert (data.class_names, data.channels, data.native_size) == (("0", "1"), 1, 6)
    named = 'x = np.zeros((4, 5, 6, 3), np.uint8); return {"train": (x, [0, 1, 0, 1]), "class_names": ["no", "yes"]}'
    data = open_data(user_data(tmp_path, named))
    assert (data.class_names, data.channels, data.native_size) == (("no", "yes"), 3, None)


X = "x = np.zeros((4, 6, 6), np.uint8); "


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("return None", "returned NoneType; expected a dict"),
        (X + 'return {"trian": (x, [0] * 4)}', "did you mean 'train'"),
        (X + 'return {"val": (x, [0] * 4)}', "no 'train' split"),
        (X + 'return {"train": x}', "must be a pair"),
        (X + 'return {"train": (x / 255, [0] * 4)}', "float64 array; give a numpy array of uint8"),
        ('return {"train": (np.zeros((4, 3, 6, 6), np.uint8), [0] * 4)}', "transpose"),
        ('return {"train": (np.zeros((0, 6, 6), np.uint8), [])}', "the shape"),
        (X + 'return {"train": (x, [0, 1])}', "one whole number per image"),
        (X + 'return {"train": (x, [0.5] * 4)}', "one whole number per image"),
        (X + 'return {"train": (x, [[1], [1, 2], 0, 0])}', "no array of whole numbers"),
        (X + 'return {"train": (x, [-1] * 4)}', "number the classes from 0"),
        (X + 'return {"train": (x, [10**12] * 4)}', "number the classes from 0"),
        (X + 'return {"train": (x, [0, 1, 0, 1]), "val": (x, [2] * 4)}', r"outside 0\.\.1"),
        (X + 'return {"train": (x, [0, 1, 0, 1]), "val": (x[:, :5], [0] * 4)}', "differ in height"),
        (X + 'return {"train": (x, [0, 1, 0, 1]), "class_names": "ab"}', "list of names"),
        ("return 1 / 0", "ZeroDivisionError at line 4: division by zero"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, body: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_data(user_data(tmp_path, body))


@pytest.mark.parametrize(
    ("text", "function", "match"),
    [
        (None, "splits", "there is no file"),
        ("def split():\n    pass\n", "splits", "did you mean 'split'"),
        ("splits = 3\n", "splits", "'splits' is a int"),
        ("import nowhere_to_be_found\n", "splits", "ModuleNotFoundError at line 1"),
        ("def splits(:\n", "splits", "SyntaxError at line 1"),
        ("raise SystemExit(3)\n", "splits", "SystemExit at line 1"),
        ("", "not-a-name", "expected path/file.py:function"),
    ],
)
def test_faults_of_the_users_file_are_bad_input(tmp_path: Path, text: str | None, function: str, match: str) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(DataError, match=match):
        open_data(DataSettings(name=f"{tmp_path}/mine.py:{function}"))


def test_the_users_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("SIDE = 6\n")
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom neighbour_of_mine import SIDE\n"
        "def splits():\n    return {'train': (np.zeros((9, SIDE, SIDE), np.uint8), [0, 1, 2] * 3)}\n"
    )
    assert open_data(DataSettings(name=f"{tmp_path}/mine.py:splits", val_fraction=0.3)).native_size == 6


# ---- batches


@pytest.mark.parametrize("cache", [True, False])
def test_batches_follow_the_order_asked_for(tmp_path: Path, cache: bool) -> None:
    make_folder(tmp_path, {"train": {"a": 20, "b": 20}, "val": {"a": 1}}, size=(16, 16))
    prepared = open_data(folder(tmp_path)).splits["train"].prepare(PLAIN, cache=cache)
    assert prepared.cached is cache
    assert len(prepared) == 40
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:33]
    batches = list(prepared.batches(8, indices=order))
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 8, 1]
    pictures = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (33, 3, 8, 8)
    torch.testing.assert_close(pictures[:, 0, 0, 0].long(), labels)
    torch.testing.assert_close(pictures[:, 1, 4, 4].long(), order % 20)
    torch.testing.assert_close(labels, prepared.labels[order])
    natural = torch.cat([images for images, _ in prepared.batches(7)])
    torch.testing.assert_close(natural[:, 1, 0, 0].long(), torch.arange(40) % 20)
    assert list(prepared.batches(8, indices=torch.tensor([], dtype=torch.int64))) == []


def test_what_a_caller_does_to_a_batch_stays_with_the_caller() -> None:
    prepared = open_data(DataSettings(name="digits")).splits["val"].prepare(GREY8, cache=True)
    before = next(prepared.batches(16))[0].clone()
    next(prepared.batches(16))[0].zero_()
    torch.testing.assert_close(next(prepared.batches(16))[0], before)


def test_arrays_that_need_no_change_are_in_memory_without_a_cache() -> None:
    split = open_data(DataSettings(name="digits")).splits["test"]
    prepared = split.prepare(GREY8, cache=False)
    assert prepared.cached
    np.testing.assert_array_equal(next(prepared.batches(500))[0][:, 0].numpy(), split.items.pixels)


def test_grey_arrays_become_colour_for_a_colour_model() -> None:
    split = open_data(DataSettings(name="digits")).splits["test"]
    pictures, _ = next(split.prepare(Preprocessing(16, 3, (0.5,) * 3, (0.5,) * 3), cache=True).batches(4))
    assert pictures.shape == (4, 3, 16, 16)
    torch.testing.assert_close(pictures[:, 0], pictures[:, 2])


def test_leaving_a_pass_early_ends_its_threads(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": {"a": 30, "b": 30}})
    prepared = open_data(folder(tmp_path)).splits["train"].prepare(PLAIN, cache=False)
    for _ in prepared.batches(4):
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def damaged_folder(root: Path, good: int, bad: int) -> DataSettings:
    make_folder(root, {"train": {"a": good, "b": good}, "val": {"a": 1}})
    for number in range(bad):
        (root / "train" / "a" / f"{number:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return folder(root)


def test_a_few_undecodable_images_are_dropped_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    prepared = open_data(damaged_folder(tmp_path, 60, 1)).splits["train"].prepare(PLAIN, cache=True)
    assert len(prepared) == len(prepared.labels) == 119
    assert "1 of 120 images" in said[0]
    assert "000.png" in said[0]
    pictures, labels = next(prepared.batches(200))
    torch.testing.assert_close(pictures[:, 0, 0, 0].long(), labels)
    assert pictures[0, 1, 0, 0] == 1


def test_many_undecodable_images_are_refused(tmp_path: Path) -> None:
    split = open_data(damaged_folder(tmp_path, 60, 5)).splits["train"]
    with pytest.raises(DataError, match=r"5 of 120 images(.|\n)*000\.png(.|\n)*002\.png(.|\n)*and 2 more"):
        split.prepare(PLAIN, cache=True)


def test_without_a_cache_the_first_undecodable_image_is_named(tmp_path: Path) -> None:
    split = open_data(damaged_folder(tmp_path, 60, 1)).splits["train"]
    with pytest.raises(DataError, match=r"000\.png: cannot be decoded .*; replace the file or remove it"):
        list(split.prepare(PLAIN, cache=False).batches(32))


def test_a_decompression_bomb_counts_as_undecodable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, {"train": {"a": 2, "b": 2}}, size=(30, 30))
    split = open_data(folder(tmp_path, val_fraction=0.5)).splits["train"]
    for limit in (800, 400):  # above and below half of the image's 900 pixels, where PIL warns and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="cannot be decoded"):
            split.prepare(PLAIN, cache=True)


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": {"a": 2, "b": 2}, "val": {"a": 1}})
    split = open_data(folder(tmp_path)).splits["val"]
    os.remove(tmp_path / "val" / "a" / "000.png")
    with pytest.raises(DataError, match=r"000\.png"):
        list(split.prepare(PLAIN, cache=False).batches(1))


def test_too_little_memory_turns_the_cache_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, {"train": {"a": 4, "b": 4}, "val": {"a": 1}})
    split = open_data(folder(tmp_path)).splits["train"]
    said: list[str] = []
    monkeypatch.setattr(console, "note", said.append)
    wanted = 8 * 3 * 8 * 8
    monkeypatch.setattr(images, "available_memory_bytes", lambda: 2 * wanted - 1)
    assert not split.prepare(PLAIN, cache=True).cached
    assert "decoded again in every pass" in said[0]
    monkeypatch.setattr(images, "available_memory_bytes", lambda: 2 * wanted)
    assert split.prepare(PLAIN, cache=True).cached


def test_available_memory_respects_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert images.available_memory_bytes(tmp_path) == 5000
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("3000\n")
    assert images.available_memory_bytes(tmp_path) == 5000
    (group / "memory.max").write_text("4000\n")
    (group / "memory.stat").write_text("anon 100\ninactive_file 500\n")
    assert images.available_memory_bytes(tmp_path) == 4000 - (3000 - 500)
