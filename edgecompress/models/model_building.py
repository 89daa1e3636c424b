"""Models: which architecture, rebuilt from a description, and with which weights.

What enters: the model settings and the data. What leaves: an nn.Module and its `Architecture`, all that is needed
to build the module again without weights, so that a stage on disk is a description and tensors, never a pickled module.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torchvision
from torch import nn

from edgecompress import console
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import ImageData
from edgecompress.errors import ModelError
from edgecompress.models.finiteness import non_finite_tensor
from edgecompress.models.nets import SMALL_NETS
from edgecompress.models.weights import NEW_HEAD, head_classes, load_checkpoint, one_line
from edgecompress.models.zoo import (
    TIMM,
    TORCHVISION,
    check_name,
    published_classes,
    timm_defaults,
    torchvision_defaults,
    torchvision_weights,
)
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.user_code import call_function, default_of, is_user_code

__all__ = [
    "Architecture",
    "CreatedModel",
    "build",
    "create_model",
    "load_checkpoint",
    "published_new_head",
    "resolve_architecture",
]

# Ways to other weights than the settings name; and what this package sets itself.
_OTHER_WEIGHTS = frozenset(
    {
        *("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
        *("pretrained_strict", "progress", "weights", "weights_backbone"),
    }
)
_RESERVED_ARGUMENTS = _OTHER_WEIGHTS | {"in_channels", "input_size", "num_classes"}
# Both train with auxiliary heads by default, which return a tuple, and warn when init_weights is not said. Their
# published weights expect inputs shifted from ImageNet's mean and std, as torchvision sets it beside the weights.
_TORCHVISION_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True, "transform_input": True},
    "inception_v3": {"aux_logits": False, "init_weights": True, "transform_input": True},
}


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a module again, weights aside."""

    name: str
    arguments: dict[str, Any]
    num_classes: int
    preprocessing: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `from_dict` reads it back."""
        return {
            "name": self.name,
            "arguments": self.arguments,
            "num_classes": self.num_classes,
            "preprocessing": self.preprocessing.to_dict(),
        }

    @classmethod
    def from_dict(cls, document: Any) -> Architecture:
        """Read what `to_dict` wrote. Raises ModelError."""
        expected: dict[str, type] = {"name": str, "arguments": dict, "num_classes": int, "preprocessing": dict}
        if not isinstance(document, dict) or document.keys() != expected.keys():
            raise ModelError(f"architecture: expected a mapping with exactly the keys {', '.join(expected)}")
        for key, kind in expected.items():
            if not isinstance(document[key], kind) or isinstance(document[key], bool):
                raise ModelError(f"architecture: {key} must be {kind.__name__}, not {document[key]!r}")
        if document["num_classes"] < 1:
            raise ModelError(f"architecture: num_classes must be at least 1, not {document['num_classes']}")
        return cls(**{**document, "preprocessing": Preprocessing.from_dict(document["preprocessing"])})


@dataclass(frozen=True)
class CreatedModel:
    """A module in float32, how to build it again, where its weights are from, and what the user should know."""

    module: nn.Module
    architecture: Architecture
    weights: Literal["checkpoint", "pretrained", "random"]
    notes: list[str]

    @property
    def new_head(self) -> str | None:
        """The note of an output layer that the weights do not fit and that begins at random, where there is one."""
        return next((note for note in self.notes if note.startswith(NEW_HEAD)), None)


def create_model(settings: ModelSettings, data: ImageData) -> CreatedModel:
    """Build the model of the settings for this data and load its weights. Seed torch before.

    The notes are for the caller to print. Raises ModelError, also when the model cannot take the input that its
    preprocessing makes, or returns anything but [N, classes].
    """
    architecture = resolve_architecture(settings, data)
    module, notes = _build(architecture, pretrained=settings.pretrained)
    weights: Literal["checkpoint", "pretrained", "random"] = "pretrained" if settings.pretrained else "random"
    if settings.checkpoint is not None:
        notes += load_checkpoint(module, settings.checkpoint, allow_new_head=settings.num_classes is None)
        weights = "checkpoint"
    wrong = non_finite_tensor(module.state_dict())
    if wrong is not None:
        raise ModelError(f"model {architecture.name}: '{wrong}' holds NaN or infinity; mend how its weights are made")
    _check_output(module, architecture)
    return CreatedModel(module, architecture, weights, notes)


def resolve_architecture(settings: ModelSettings, data: ImageData) -> Architecture:
    """Settle class count and preprocessing; nothing is downloaded.

    The class count is the settings', else the data's. Under a class index the data's is a lower bound, and the model's
    own count (of the zoo's weights, or user code's default of num_classes) is used when it is large enough. The
    preprocessing is the model's own (timm, torchvision's first weights, `module.preprocessing` of user code), or fits
    the data's native size; the settings override each field. Raises ModelError.
    """
    name, arguments = settings.name, dict(settings.arguments)
    check_name(name)
    if reserved := sorted(_RESERVED_ARGUMENTS & arguments.keys()):
        raise ModelError(f"model.arguments: {', '.join(reserved)} cannot be given here; use the keys of model itself")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model.arguments: cannot be stored beside the weights ({error}); use plain values") from error
    override = settings.preprocessing
    if name.startswith(TIMM):
        own_classes, own = timm_defaults(name.removeprefix(TIMM), arguments, override)
    elif name.startswith(TORCHVISION):
        own_classes, own = torchvision_defaults(name.removeprefix(TORCHVISION), override)
    else:
        own_classes = default_of(name, "num_classes") if is_user_code(name) and data.has_class_index else 0
        own = _native_defaults(data, override.channels or data.channels)
    own_classes = own_classes if isinstance(own_classes, int) else 0
    classes = settings.num_classes
    if classes is None:
        classes = own_classes if data.has_class_index and own_classes >= data.num_classes else data.num_classes
    if classes < data.num_classes:
        wanted = f"data.class_index goes up to {data.num_classes - 1}"
        wanted = wanted if data.has_class_index else f"{data.name} has {data.num_classes} classes"
        raise ModelError(f"model.num_classes: {classes}, but {wanted}; leave it out or raise it")
    if is_user_code(name):
        own.update(_user_defaults(name, arguments, classes))
    own.update({key: value for key, value in override.model_dump().items() if value is not None})
    if own.get("input_size") is None:
        raise ModelError(
            f"model {name}: takes its input size from the data, and {data.name} has no images that are square and of "
            "one size; set model.preprocessing.input_size"
        )
    return Architecture(name, arguments, classes, Preprocessing.from_dict(own))


def build(architecture: Architecture, *, pretrained: bool = False) -> nn.Module:
    """Build the module, float32 and in training mode, with random weights or those of timm or torchvision.

    The network is used only with `pretrained`. Raises ModelError.
    """
    module, notes = _build(architecture, pretrained=pretrained)
    for text in notes:
        console.note(text)
    return module


def published_new_head(settings: ModelSettings, data: ImageData) -> str | None:
    """The note of a new head that published weights would leave, where they would; nothing is downloaded.

    Raises ModelError where the model has no published weights.
    """
    _require_published(settings.name)
    theirs, ours = published_classes(settings.name), resolve_architecture(settings, data).num_classes
    return None if theirs == ours else _new_head(settings.name, theirs, ours)


def _native_defaults(data: ImageData, channels: int) -> dict[str, Any]:
    return {
        "input_size": data.native_size,
        "channels": channels,
        "mean": [0.5] * channels,
        "std": [0.5] * channels,
        "interpolation": "bilinear",
        "crop_fraction": 1.0,
    }


def _user_defaults(name: str, arguments: dict[str, Any], classes: int) -> dict[str, Any]:
    """The dict `preprocessing` of the module that the user's function returns, if it has one."""
    with torch.random.fork_rng(devices=[]):  # looking must not change what is initialised next
        module = _build_user_module(name, arguments, classes)
    own = getattr(module, "preprocessing", {})
    if not isinstance(own, Mapping):
        raise ModelError(f"{name}: the module's 'preprocessing' is {type(own).__name__}; expected a dict")
    defaults = dict(own)
    channels = defaults.get("channels")
    if isinstance(channels, int):
        for key in ("mean", "std"):
            defaults.setdefault(key, [0.5] * channels)
    return defaults


# ---- building


def _build(architecture: Architecture, *, pretrained: bool) -> tuple[nn.Module, list[str]]:
    name, classes = architecture.name, architecture.num_classes
    check_name(name)
    # Asked of model.json too, which may come from somebody else: timm would load a file of any kind, or fetch one.
    if not is_user_code(name) and (leading := sorted(_OTHER_WEIGHTS & architecture.arguments.keys())):
        raise ModelError(f"model.arguments: {', '.join(leading)} cannot be given, since it leads to other weights")
    if pretrained:
        _require_published(name)
    if is_user_code(name):
        return _build_user_module(name, architecture.arguments, classes).float(), []
    if name.startswith(TORCHVISION):
        short = name.removeprefix(TORCHVISION)
        arguments = {**_TORCHVISION_ARGUMENTS.get(short, {}), **architecture.arguments}
        module = _construct(name, torchvision.models.get_model, short, weights=None, num_classes=classes, **arguments)
        return (module, _load_published(module, short, classes, arguments) if pretrained else [])
    if name.startswith(TIMM):
        short = name.removeprefix(TIMM)
        create = timm.create_model
        if not pretrained:
            return _construct(name, create, short, num_classes=classes, **architecture.arguments), []
        module = _fetch(name, create, short, pretrained=True, num_classes=classes, **architecture.arguments)
        published = int(getattr(module, "pretrained_cfg", {}).get("num_classes") or 0)
        return module, [] if published == classes else [_new_head(name, published, classes)]
    preprocessing = architecture.preprocessing
    arguments = {
        "num_classes": classes,
        "in_channels": preprocessing.channels,
        "input_size": preprocessing.input_size,
        **architecture.arguments,
    }
    return _construct(name, SMALL_NETS[name], **arguments), []


def _require_published(name: str) -> None:
    if not name.startswith((TIMM, TORCHVISION)):
        raise ModelError(f"model.pretrained: {name} has no published weights; give model.checkpoint, or train it")


def _construct(name: str, constructor: Any, *positional: Any, **arguments: Any) -> nn.Module:
    try:
        module: nn.Module = constructor(*positional, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ModelError(f"model {name}: cannot be built ({one_line(error)}); mend model.arguments") from error
    return module


def _fetch(name: str, function: Any, *positional: Any, **arguments: Any) -> Any:
    try:
        return function(*positional, **arguments)
    except Exception as error:  # each hub client has exceptions of its own, with no base but this
        raise ModelError(
            f"model {name}: the published weights could not be fetched ({type(error).__name__}: {one_line(error)}); "
            "try again with a network, or get the file elsewhere and set model.checkpoint"
        ) from error


def _load_published(module: nn.Module, short: str, classes: int, arguments: dict[str, Any]) -> list[str]:
    """Copy published weights into `module`, in place; through torchvision's own builder, which renames old keys."""
    weights = torchvision_weights(short)
    name = TORCHVISION + short
    options = {key: value for key, value in arguments.items() if key != "init_weights"}
    published = _fetch(name, torchvision.models.get_model, short, weights=weights, **options).state_dict()
    own = module.state_dict()
    shapes = {key: (tuple(published[key].shape), tuple(own[key].shape)) for key in own}
    misfits = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    if misfits and head_classes(misfits) is None:
        raise ModelError(f"model {name}: published weights do not fit these model.arguments at {next(iter(misfits))}")
    module.load_state_dict({key: value for key, value in published.items() if key not in misfits}, strict=False)
    notes = [f"{name}: weights {weights.name} of torchvision"]
    if misfits:
        notes.append(_new_head(name, len(weights.meta["categories"]), classes))
    return notes


def _new_head(name: str, theirs: int, ours: int) -> str:
    return f"{NEW_HEAD}the published weights of {name} have {theirs} classes, the model {ours}"


def _build_user_module(name: str, arguments: dict[str, Any], classes: int) -> nn.Module:
    module = call_function(name, arguments, offered={"num_classes": classes})
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name}: returned {type(module).__name__}; expected a torch.nn.Module")
    return module


def _check_output(module: nn.Module, architecture: Architecture) -> None:
    """Run one blank image through the module, so that a misfit is met now and not after the data is decoded."""
    preprocessing = architecture.preprocessing
    side, channels = preprocessing.input_size, preprocessing.channels
    where = f"model {architecture.name}"
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            output = module(torch.zeros(1, channels, side, side))
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError) as error:
        raise ModelError(
            f"{where}: cannot take an input of [1, {channels}, {side}, {side}] ({one_line(error)}); change "
            "model.preprocessing.input_size or model.arguments"
        ) from error
    finally:
        module.train(was_training)
    expected = (1, architecture.num_classes)
    if isinstance(output, torch.Tensor) and tuple(output.shape) == expected:
        return
    if isinstance(output, torch.Tensor):
        found: object = list(output.shape)
        fix = "set model.num_classes to what the model has, or let its function take the argument num_classes"
    else:
        found, fix = type(output).__name__, "let its forward return one tensor of logits and nothing beside it"
    raise ModelError(f"{where}: returns {found} for one image; expected logits {list(expected)}: {fix}")


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode, so that a stage never changes the model of the stage before it."""
    return copy.deepcopy(module).eval()
