"""The model zoo: which timm and torchvision models exist, and what their published configuration says.

What enters: a name from the recipe. What leaves: whether it exists, its class count, its preprocessing. Everything
here is read from tables inside the two packages; nothing is built and nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import timm
import timm.data.config
import timm.models
import torchvision

from edgecompress.errors import ModelError
from edgecompress.models.nets import SMALL_NETS
from edgecompress.settings.model_settings import PreprocessingSettings
from edgecompress.settings.spelling import nearest
from edgecompress.settings.user_code import is_user_code

TIMM, TORCHVISION = "timm/", "torchvision/"
_resolve_data_config: Callable[..., dict[str, Any]] = timm.data.config.resolve_data_config


def check_name(name: str) -> None:
    """Raise ModelError, with the nearest known name, unless the name is known or points to user code."""
    if is_user_code(name):
        return
    if name.startswith(TIMM):
        short, known, listing = name.removeprefix(TIMM), timm.list_models(), "timm.list_models()"
        if timm.is_model(short):
            try:
                timm.models.get_pretrained_cfg(short)
            except RuntimeError as error:
                tags = timm.list_pretrained(f"{short.partition('.')[0]}.*")
                raise ModelError(f"model.name: '{name}': {error} Known: {', '.join(tags) or 'none'}") from error
            return
    elif name.startswith(TORCHVISION):
        short, known = name.removeprefix(TORCHVISION), _torchvision_names()
        listing = "torchvision.models.list_models()"
        if short in known:
            return
    else:
        if name in SMALL_NETS:
            return
        listings = ((TIMM, timm.list_models()), (TORCHVISION, _torchvision_names()))
        zoos = [zoo for zoo, names in listings if name in names]
        match = nearest(name, SMALL_NETS)
        if zoos:
            hint = f"did you mean {' or '.join(zoo + name for zoo in zoos)}?"
        elif match is not None:
            hint = f"did you mean '{match}'?"
        else:
            hint = f"known: {', '.join(SMALL_NETS)}, timm/<name>, torchvision/<name>, file.py:function"
        raise ModelError(f"model.name: unknown '{name}'; {hint}")
    match = nearest(short, known)
    prefix = name.removesuffix(short)
    hint = f"did you mean '{prefix}{match}'?" if match is not None else f"{listing} lists those that exist"
    raise ModelError(f"model.name: unknown '{name}'; {hint}")


def _torchvision_names() -> list[str]:
    """Classification models only: detection and segmentation live in modules of their own."""
    return [str(name) for name in torchvision.models.list_models(module=torchvision.models)]


def timm_defaults(name: str, arguments: dict[str, Any], override: PreprocessingSettings) -> tuple[int, dict[str, Any]]:
    """Class count (0 where the model has no head) and preprocessing fields of a timm model. Raises ModelError."""
    found = timm.models.get_pretrained_cfg(name)
    published = dataclasses.asdict(found) if found is not None else {}
    config = _resolve_data_config({"in_chans": 3}, pretrained_cfg=published)
    channels = arguments.get("in_chans", 3)
    if channels not in (1, 3):
        raise ModelError(f"model.arguments.in_chans: images have 1 or 3 channels, not {channels!r}")
    height, width = config["input_size"][1:]
    size = override.input_size or arguments.get("img_size")
    if size is None and height != width:
        raise ModelError(f"model timm/{name}: wants {height} x {width} px; set model.preprocessing.input_size")
    size = size or height
    if published.get("fixed_input_size") and size != height and arguments.get("img_size") != size:
        raise ModelError(
            f"model timm/{name}: is built for {height} px; for {size} px set model.arguments.img_size: {size} too"
        )
    mean, std = list(config["mean"]), list(config["std"])
    if channels == 1:
        # timm sums the colour filters of the first convolution, so one channel takes the average statistics.
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    # timm resizes to floor(size / crop_pct), as in timm.data.transforms_factory; the fraction that says exactly that.
    resized = math.floor(size / config["crop_pct"]) if isinstance(size, int) else 0
    own = {
        "input_size": size,
        "channels": channels,
        "mean": mean,
        "std": std,
        "interpolation": config["interpolation"],
        "crop_fraction": size / resized if resized else 1.0,
    }
    return int(published.get("num_classes") or 0), own


def torchvision_defaults(name: str, override: PreprocessingSettings) -> tuple[int, dict[str, Any]]:
    """Class count and preprocessing fields of a torchvision model."""
    weights = torchvision_weights(name)
    transforms = weights.transforms()
    crop, resized = transforms.crop_size[0], transforms.resize_size[0]
    own = {
        "input_size": override.input_size or crop,
        "channels": 3,
        "mean": list(transforms.mean),
        "std": list(transforms.std),
        "interpolation": transforms.interpolation.value,
        "crop_fraction": min(1.0, crop / resized),
    }
    return len(weights.meta["categories"]), own


def published_classes(name: str) -> int:
    """How many classes the published weights of a model know; 0 where there are none."""
    if name.startswith(TIMM):
        return timm_defaults(name.removeprefix(TIMM), {}, PreprocessingSettings())[0]
    if name.startswith(TORCHVISION):
        return torchvision_defaults(name.removeprefix(TORCHVISION), PreprocessingSettings())[0]
    return 0


def torchvision_weights(name: str) -> Any:
    """The first published weights, whose preprocessing a bare checkpoint most often was trained with."""
    return next(iter(torchvision.models.get_model_weights(name)))
