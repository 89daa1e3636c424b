from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
import torchvision
from PIL import Image
from torch import nn

from edgecompress import console
from edgecompress.data.images import ArrayItems, ImageSplit
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import ImageData
from edgecompress.errors import ModelError
from edgecompress.models import model_building, zoo
from edgecompress.models.model_building import Architecture, build, create_model, load_checkpoint, resolve_architecture
from edgecompress.models.nets import SMALL_NETS
from edgecompress.settings.model_settings import ModelSettings


def images(classes: int = 10, *, channels: int = 1, size: int | None = 8, class_index: bool = False) -> ImageData:
    split = ImageSplit("train", np.zeros(1, np.int64), ArrayItems(np.zeros((1, 8, 8), np.uint8)))
    names = tuple(str(number) for number in range(classes))
    return ImageData("some_images", names, channels, size, {"train": split, "val": split}, "0" * 64, class_index)


def model(name: str, **more: Any) -> ModelSettings:
    return ModelSettings.model_validate({"name": name, **more})


# ---- architectures


def test_small_nets_take_their_shape_from_the_data() -> None:
    created = create_model(model("resnet8", arguments={"width": 8}), images())
    architecture = created.architecture
    assert architecture.preprocessing == Preprocessing(8, 1, (0.5,), (0.5,), "bilinear", 1.0)
    assert created.module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert (created.weights, created.notes, created.module.training) == ("random", [], True)
    again = build(Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))))
    again.load_state_dict(created.module.state_dict())
    example = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(again.eval()(example), created.module.eval()(example), rtol=0, atol=0)


def test_a_seed_fixes_the_initial_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_model(model("student_cnn"), images()).module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "resnet18.a1_in1k", "mobilenetv3_small_100", "efficientnet_b1"]
)
def test_timm_preprocessing_gives_timms_pixels(name: str) -> None:
    architecture = resolve_architecture(model(f"timm/{name}"), images(channels=3, size=None))
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    reference = timm.data.create_transform(**config, is_training=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 333, 3), dtype=np.uint8))
    ours = architecture.preprocessing
    result = ours.normalize(torch.from_numpy(ours.prepare(image))[None])[0]
    assert torch.allclose(result, reference(image), atol=1e-6)


def test_every_timm_crop_resizes_to_timms_size() -> None:
    for crop_pct in {timm.get_pretrained_cfg(name).crop_pct for name in timm.list_models()[::7]} | {0.9, 0.95, 0.96}:
        for size in (224, 240, 288, 384):
            resized = int(size / crop_pct)
            assert round(size / (size / resized)) == resized


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_b1", "mnasnet0_75", "efficientnet_b2"])
def test_torchvision_preprocessing_gives_torchvisions_pixels(name: str) -> None:
    architecture = resolve_architecture(model(f"torchvision/{name}"), images(channels=3, size=None))
    weights = next(iter(torchvision.models.get_model_weights(name)))
    # Square, since a model without a crop keeps the whole image here.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8))
    ours = architecture.preprocessing
    result = ours.normalize(torch.from_numpy(ours.prepare(image))[None])[0]
    assert torch.allclose(result, weights.transforms()(image), atol=1e-6)


def test_the_recipe_overrides_each_field() -> None:
    override = {"input_size": 64, "mean": [0.1, 0.2, 0.3], "crop_fraction": 1}
    changed = resolve_architecture(model("timm/tf_efficientnet_lite0", preprocessing=override), images(channels=3))
    assert changed.preprocessing == Preprocessing(64, 3, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "bicubic", 1.0)
    with pytest.raises(ModelError, match=r"mean has 1 values.*3 channels"):
        resolve_architecture(model("torchvision/resnet18", preprocessing={"mean": [0.5]}), images())


def test_grey_data_is_made_colour_for_zoo_models_unless_they_take_grey() -> None:
    assert resolve_architecture(model("torchvision/resnet18"), images(channels=1)).preprocessing.channels == 3
    settings = model("timm/resnet18", arguments={"in_chans": 1}, preprocessing={"input_size": 32})
    created = create_model(settings, images(channels=1))
    assert created.architecture.preprocessing.channels == 1
    assert created.module.conv1.in_channels == 1


@pytest.mark.parametrize(
    ("name", "given", "classes", "class_index", "expected"),
    [
        ("timm/resnet18", None, 10, False, 10),
        ("timm/resnet18", None, 702, True, 1000),
        ("torchvision/resnet18", None, 702, True, 1000),
        ("torchvision/resnet18", None, 1001, True, 1001),
        ("resnet8", None, 702, True, 702),
        ("torchvision/resnet18", 12, 10, True, 12),
        ("timm/resnet18", 12, 10, False, 12),
    ],
)
def test_the_class_count(name: str, given: int | None, classes: int, class_index: bool, expected: int) -> None:
    settings = model(name, **({} if given is None else {"num_classes": given}))
    assert resolve_architecture(settings, images(classes, class_index=class_index)).num_classes == expected


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.num_classes: 5, but some_images has 10"):
        resolve_architecture(model("resnet8", num_classes=5), images())
    with pytest.raises(ModelError, match=r"model\.num_classes: 5, but data\.class_index goes up to 9;"):
        resolve_architecture(model("resnet8", num_classes=5), images(class_index=True))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnt20", "did you mean 'resnet20'"),
        ("tf_efficientnet_lite0", "did you mean timm/tf_efficientnet_lite0"),
        ("resnet18", r"timm/resnet18 or torchvision/resnet18"),
        ("zzz", "known: resnet8"),
        ("timm/tf_eficientnet_lite0", "did you mean 'timm/tf_efficientnet_lite0'"),
        ("timm/resnet18.nope", "Invalid pretrained tag"),
        ("timm/hf_hub:someone/something", "unknown"),
        ("torchvision/squeezenet1_2", "did you mean 'torchvision/squeezenet1_[01]'"),
        ("torchvision/fasterrcnn_resnet50_fpn", "unknown"),
        ("nowhere.py:net", "there is no file nowhere.py"),
        ("nowhere.py", "expected path/file.py:function"),
    ],
)
def test_unknown_names_get_one_short_hint(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        create_model(model(name), images())
    assert len(str(caught.value)) < 600


def test_mixed_sizes_ask_for_an_input_size() -> None:
    with pytest.raises(ModelError, match=r"set model\.preprocessing\.input_size"):
        resolve_architecture(model("resnet8"), images(size=None))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (model("resnet8", arguments={"wdth": 8}), "unexpected keyword argument 'wdth'"),
        (model("resnet8", arguments={"width": "wide"}), "cannot be built"),
        (model("resnet8", arguments={"num_classes": 3}), "num_classes cannot be given here"),
        (model("timm/resnet18", arguments={"checkpoint_path": "x.pt"}), "checkpoint_path cannot be given"),
        (model("torchvision/resnet18", arguments={"nope": 3}), "cannot be built"),
        (model("timm/vit_tiny_patch16_224", preprocessing={"input_size": 32}), "model.arguments.img_size: 32"),
        (model("torchvision/alexnet", preprocessing={"input_size": 16}), "cannot take an input of .1, 3, 16, 16"),
        (model("resnet8", pretrained=True), "no published weights"),
    ],
)
def test_models_that_cannot_be_built_or_run(settings: ModelSettings, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        create_model(settings, images(channels=3))


def test_a_fixed_size_model_is_built_for_another_size() -> None:
    arguments = {"img_size": 32, "depth": 1}
    created = create_model(model("timm/vit_tiny_patch16_224", arguments=arguments), images(channels=3))
    assert created.architecture.preprocessing.input_size == 32


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_models_with_auxiliary_heads_return_one_tensor_in_training(name: str) -> None:
    settings = model(f"torchvision/{name}", preprocessing={"input_size": 96})
    module = create_model(settings, images(channels=3)).module
    assert module.training
    assert module(torch.zeros(2, 3, 96, 96)).shape == (2, 10)


@pytest.mark.parametrize(
    "change",
    [{"name": 3}, {"num_classes": 0}, {"num_classes": True}, {"arguments": []}, {"extra": 1}, {"preprocessing": {}}],
)
def test_senseless_descriptions_are_refused(change: dict[str, Any]) -> None:
    good = Architecture("resnet8", {}, 2, Preprocessing(8, 1, (0.5,), (0.5,))).to_dict()
    assert Architecture.from_dict(good).to_dict() == good
    with pytest.raises(ModelError):
        Architecture.from_dict({**good, **change})


# ---- user code


def user_model(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.py").write_text("import torch\nfrom torch import nn\n\n" + text)
    return f"{tmp_path}/mine.py:net"


NET = """
def net(num_classes, hidden=4):
    module = nn.Sequential(nn.Flatten(), nn.Linear(108, hidden), nn.Linear(hidden, num_classes))
    module.preprocessing = {"input_size": 6, "channels": 3, "mean": [0, 0, 0]}
    return module
"""


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    name = user_model(tmp_path, NET)
    created = create_model(model(name, arguments={"hidden": 5}), images(channels=1, size=28))
    assert created.architecture.preprocessing == Preprocessing(6, 3, (0, 0, 0), (0.5, 0.5, 0.5))
    assert created.module[1].out_features == 5
    again = build(Architecture.from_dict(created.architecture.to_dict()))
    again.load_state_dict(created.module.state_dict())


def test_the_class_count_is_offered_and_an_argument_wins(tmp_path: Path) -> None:
    name = user_model(tmp_path, "def net(num_classes=3, **more):\n    return nn.LazyLinear(num_classes)\n")
    assert build(Architecture(name, {}, 7, Preprocessing(8, 1, (0.5,), (0.5,)))).out_features == 7
    given = Architecture(name, {"num_classes": 5}, 7, Preprocessing(8, 1, (0.5,), (0.5,)))
    assert build(given).out_features == 5
    fixed = user_model(tmp_path, "def net(**more):\n    return nn.LazyLinear(len(more) + 1)\n")
    assert build(Architecture(fixed, {}, 7, Preprocessing(8, 1, (0.5,), (0.5,)))).out_features == 1


def test_looking_at_a_users_model_does_not_move_the_seed(tmp_path: Path) -> None:
    body = "return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))"
    name = user_model(tmp_path, f"def net(num_classes):\n    {body}\n")
    torch.manual_seed(0)
    created = create_model(model(name), images())
    torch.manual_seed(0)
    assert torch.equal(created.module[1].weight, nn.Linear(64, 10).weight)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("def net():\n    return 3\n", "returned int; expected a torch.nn.Module"),
        ("def net():\n    return undefined\n", "NameError at line 5"),
        ("def net(a):\n    return nn.Flatten()\n", "missing 1 required positional argument"),
        ("def net():\n    return nn.Flatten()\n", r"returns \[1, 64\].*expected logits \[1, 10\]"),
        (
            "class Net(nn.Module):\n    def forward(self, x):\n        return {'logits': x}\n\nnet = Net\n",
            r"returns dict for one image.*let its forward return one tensor",
        ),
        ("def net():\n    m = nn.Flatten()\n    m.preprocessing = 3\n    return m\n", "expected a dict"),
        ("def net():\n    m = nn.Flatten()\n    m.preprocessing = {'size': 3}\n    return m\n", "'size' is unknown"),
        ("def net():\n    return nn.Linear(3, 10)\n", "cannot take an input"),
    ],
)
def test_faults_in_a_users_model(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        create_model(model(user_model(tmp_path, text)), images())


# ---- checkpoints


def small(classes: int = 10, width: int = 4) -> nn.Module:
    return SMALL_NETS["student_cnn"](classes, 1, width=width, input_size=8)


def saved(path: Path, document: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(document, path)
    else:
        torch.save(document, path)
    return path


def wrapped(state: dict[str, Any], how: str) -> Any:
    match how:
        case "plain" | "safetensors":
            return state
        case "prefix":
            return {f"module._orig_mod.{key}": value for key, value in state.items()}
        case "half":
            return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        case _:
            return {how: state, "epoch": 3}


@pytest.mark.parametrize("how", ["plain", "safetensors", "prefix", "half", "state_dict", "model", "model_state_dict"])
def test_checkpoints_are_read_in_every_common_form(tmp_path: Path, how: str) -> None:
    source, target = small(), small()
    suffix = ".safetensors" if how == "safetensors" else ".pth"
    path = saved(tmp_path / f"weights{suffix}", wrapped(source.state_dict(), how))
    assert load_checkpoint(target, path, allow_new_head=False) == []
    tolerance = 1e-2 if how == "half" else 0.0
    for key, tensor in target.state_dict().items():
        torch.testing.assert_close(tensor, source.state_dict()[key], rtol=tolerance, atol=tolerance)


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = {key: value for key, value in small().state_dict().items() if "num_batches" not in key}
    assert load_checkpoint(small(), saved(tmp_path / "old.pt", state), allow_new_head=False) == []


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"weight": Payload(trace)}))
    else:
        torch.save({"weight": Payload(trace)}, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ModelError, match=r"contains code \(pickle\) and is refused"):
        load_checkpoint(small(), path, allow_new_head=True)
    assert not trace.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"contains code.*torch\.save\(model\.state_dict\(\), "):
        load_checkpoint(small(), saved(tmp_path / "module.pt", small()), allow_new_head=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    torch.jit.save(traced, tmp_path / "jit.pt")
    with pytest.raises(ModelError, match=r"jit\.pt: is TorchScript, .*torch\.save\(model\.state_dict\(\), "):
        load_checkpoint(small(), tmp_path / "jit.pt", allow_new_head=True)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.pt", b"", "not a PyTorch state dict"),
        ("a.pt", b"hello world, no weights here", "not a PyTorch state dict"),
        ("a.pth", b"PK\x03\x04garbage", "not a PyTorch state dict"),
        ("a.safetensors", b"", "not a whole safetensors file"),
        ("a.safetensors", b"\xff" * 64, "not a whole safetensors file"),
        ("a.onnx", b"", "a checkpoint is a .safetensors, .pt or .pth"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=match):
        load_checkpoint(small(), tmp_path / name, allow_new_head=True)


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ([torch.zeros(1)], "holds list"),
        ({}, "expected a state dict"),
        ({"epoch": 3}, "'epoch' is no tensor"),
        ({"state_dict": {"a": torch.zeros(1), "b": [1]}}, "'b' is no tensor"),
    ],
)
def test_documents_that_are_no_state_dict(tmp_path: Path, document: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        load_checkpoint(small(), saved(tmp_path / "a.pt", document), allow_new_head=True)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*nowhere\.pt"):
        create_model(model("student_cnn", checkpoint=tmp_path / "nowhere.pt"), images())


def test_mismatches_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = small(width=8).state_dict()
    state["extra.weight"] = torch.zeros(1)
    target = small()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_checkpoint(target, saved(tmp_path / "wide.pt", state), allow_new_head=True)
    text = str(caught.value)
    assert "unexpected: extra.weight" in text
    assert "features.0.weight [8, 1, 3, 3], the model has [4, 1, 3, 3]" in text
    assert " more" in text
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())
    with pytest.raises(ModelError, match=r"missing: features\.0\.weight"):
        load_checkpoint(target, saved(tmp_path / "few.pt", {"classifier.bias": torch.zeros(10)}), allow_new_head=True)


def test_a_narrower_layer_is_not_taken_for_a_head(tmp_path: Path) -> None:
    def net(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 2))

    with pytest.raises(ModelError, match="does not fit the model"):
        load_checkpoint(net(4), saved(tmp_path / "a.pt", net(5).state_dict()), allow_new_head=True)
    other = saved(tmp_path / "b.pt", nn.Linear(4, 5).state_dict())
    with pytest.raises(ModelError, match="does not fit the model"):
        load_checkpoint(nn.Linear(3, 2), other, allow_new_head=True)


def test_another_class_count_trains_a_new_head_unless_the_count_is_set(tmp_path: Path) -> None:
    source = small(classes=12, width=16)
    path = saved(tmp_path / "twelve.safetensors", source.state_dict())
    created = create_model(model("student_cnn", checkpoint=path), images())
    assert created.weights == "checkpoint"
    assert created.notes == ["head re-initialised: the checkpoint has 12 classes, the model 10"]
    assert torch.equal(created.module.features[0].weight, source.features[0].weight)
    with pytest.raises(ModelError, match=r"head has 12 classes, the model 10; set model\.num_classes: 12"):
        create_model(model("student_cnn", checkpoint=path, num_classes=10), images())
    whole = create_model(model("student_cnn", checkpoint=path, num_classes=12), images())
    assert torch.equal(whole.module.classifier.weight, source.classifier.weight)
    assert whole.notes == []


def test_with_a_class_index_code_of_ones_own_keeps_its_count(tmp_path: Path) -> None:
    """A checkpoint of 20 classes for a folder of some of them fits, where 8 (largest index + 1) would be a new head."""
    body = "return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))"
    name = user_model(tmp_path, f"def net(num_classes=20):\n    {body}\n")
    path = saved(tmp_path / "w.pt", nn.Sequential(nn.Flatten(), nn.Linear(64, 20)).state_dict())
    created = create_model(model(name, checkpoint=path), images(8, class_index=True))
    assert (created.architecture.num_classes, created.new_head) == (20, None)
    assert resolve_architecture(model(name), images(25, class_index=True)).num_classes == 25
    assert resolve_architecture(model(name), images(8)).num_classes == 8
    without = user_model(tmp_path, f"def net(num_classes):\n    {body}\n")
    assert resolve_architecture(model(without), images(8, class_index=True)).num_classes == 8


def test_a_convolutional_head_is_found_too(tmp_path: Path) -> None:
    published = torchvision.models.squeezenet1_1(num_classes=20)
    path = saved(tmp_path / "squeezenet.pth", published.state_dict())
    created = create_model(model("torchvision/squeezenet1_1", checkpoint=path), images(channels=3))
    assert created.notes == ["head re-initialised: the checkpoint has 20 classes, the model 10"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = small().state_dict()
    state["features.1.running_var"][2] = value
    with pytest.raises(ModelError, match=r"'features\.1\.running_var' holds values that are not finite"):
        load_checkpoint(small(), saved(tmp_path / "a.pt", state), allow_new_head=False)


# ---- published weights, with the download replaced


def publish(monkeypatch: pytest.MonkeyPatch, short: str) -> nn.Module:
    published = torchvision.models.get_model(short, weights=None)
    weights = zoo.torchvision_weights(short)
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: published.state_dict())
    return published


def test_torchvision_weights_keep_all_but_a_new_head(monkeypatch: pytest.MonkeyPatch) -> None:
    published = publish(monkeypatch, "squeezenet1_1")
    whole = create_model(model("torchvision/squeezenet1_1", pretrained=True), images(702, channels=3, class_index=True))
    example = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(whole.module.eval()(example), published.eval()(example))
    assert whole.weights == "pretrained"
    assert whole.notes == ["torchvision/squeezenet1_1: weights IMAGENET1K_V1 of torchvision"]
    ten = create_model(model("torchvision/squeezenet1_1", pretrained=True), images(channels=3))
    assert torch.equal(ten.module.features[0].weight, published.features[0].weight)
    assert "have 1000 classes, the model 10" in ten.notes[1]


def test_build_says_that_the_head_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "squeezenet1_1")
    said: list[str] = []
    monkeypatch.setattr(console, "note", said.append)
    architecture = resolve_architecture(model("torchvision/squeezenet1_1"), images(channels=3))
    build(architecture, pretrained=True)
    assert any("head re-initialised" in text for text in said)
    said.clear()
    build(architecture)
    assert said == []


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/squeezenet1_1"])
def test_a_failed_download_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(type(zoo.torchvision_weights("squeezenet1_1")), "get_state_dict", refuse)
    with pytest.raises(ModelError, match=r"ConnectionError: no route to host.*set model.checkpoint"):
        create_model(model(name, pretrained=True), images(channels=3))


def test_nothing_is_fetched_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(model_building, "_fetch", refuse)
    for name in ("timm/tf_efficientnet_lite0", "torchvision/squeezenet1_1", "resnet8"):
        create_model(model(name, preprocessing={"input_size": 64}), images(channels=3))
