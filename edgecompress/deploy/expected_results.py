"""What a device must answer: a few images, the logits expected of them, and how far a device may stray.

What enters: a bundle's folder with its models in it, and images that the export kept. What leaves: samples/ and the
manifest's `self_test`. The int8 file's expectation is computed without fusing, in float, which is what its
operators are defined to give: integer kernels differ from CPU to CPU (without VNNI, 8-bit weights saturate), and the
expectation must not depend on the machine that made the bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgecompress.device.infer import Classifier, read_labels, top_classes
from edgecompress.errors import ExportError
from edgecompress.run_directory import Json

SAMPLES = 8
FLOAT_TOLERANCE = 1e-3  # of the largest logit; ten times what the export allows between PyTorch and ONNX
TOP_CLASSES = 5
RULE = (
    "Each stored image runs alone, on one thread. fp32: a logit may differ by max_abs_diff, 0.1 % of the largest "
    "logit, which is ten times what the export allows between PyTorch and ONNX, since other CPUs sum in another order. "
    "int8: on these images the int8 file is at most e away from the fp32 file. Another CPU's integer kernels may round "
    "ties otherwise, but must stay as close to fp32; two answers within e of the same third are within 2 e of "
    "each other. So max_abs_diff is 2 e for the largest difference, and rms_diff is 2 e for the root mean square. The "
    "expected int8 logits are computed without integer kernels. The top class must be the same wherever the expected "
    "one leads by more than 2 max_abs_diff (`decided`); where it leads by less, the tolerance itself allows another."
)
Pixels = NDArray[np.uint8]


def write_expected(folder: Path, manifest: Json, stored: NDArray[np.uint8]) -> Json:
    """Write samples/ into a bundle's folder and return its `self_test`.

    `stored` is uint8 [N, C, H, W] at the model's size; images of different classes are preferred. `manifest` (already
    in the folder) names the models. Raises ExportError when a model gives no finite logits.
    """
    images = [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in stored]
    names = list(manifest["models"])
    first = Classifier(folder, "fp32", threads=1)
    answers = [int(first.logits(image, prepared=True).argmax()) for image in images]
    images = [images[index] for index in _spread(answers)]
    if first.facts["input"]["dtype"] == "uint8" and not isinstance(first.facts["input"]["shape"][1], int):
        images.append(_oblong(images[0]))  # the graph resizes, and this one makes it do so along both axes
    logits = {name: _logits(folder, name, images) for name in names}
    (folder / "samples").mkdir()
    samples = [_write_image(folder, index, image) for index, image in enumerate(images)]
    models: Json = {}
    labels = read_labels(folder, manifest)
    for name in names:
        path = f"samples/logits.{name}.npy"
        np.save(folder / path, logits[name])
        models[name] = {"logits": path, **_tolerance(name, logits)}
        for index, sample in enumerate(samples):
            best = np.sort(logits[name][index])[::-1]
            lead = float(best[0] - best[1]) if len(best) > 1 else 0.0
            sample["expected"][name] = top_classes(logits[name][index], labels, TOP_CLASSES)
            sample["decided"][name] = lead > 2 * models[name]["max_abs_diff"]
    return {"rule": RULE, "models": models, "samples": samples}


def _spread(answers: list[int]) -> list[int]:
    """Places of at most SAMPLES images, those of classes not yet seen first."""
    fresh = [index for index, answer in enumerate(answers) if answer not in answers[:index]]
    rest = [index for index in range(len(answers)) if index not in fresh]
    return sorted([*fresh, *rest][:SAMPLES])


def _oblong(image: Pixels) -> Pixels:
    """The same image with another size and shape: twice as wide and half as high again."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize((2 * width, height + height // 2), Image.Resampling.BICUBIC), dtype=np.uint8)
    return resized[:, :, None] if resized.ndim == 2 else resized


def _logits(folder: Path, name: str, images: list[Pixels]) -> NDArray[np.float32]:
    classifier = Classifier(folder, name, threads=1, fused=name != "int8")
    logits = np.stack([classifier.logits(image, prepared=True) for image in images]).astype(np.float32)
    if not np.isfinite(logits).all():
        raise ExportError(f"{name}: gives NaN or infinity on the sample images; the model cannot be shipped")
    return logits


def _tolerance(name: str, logits: dict[str, NDArray[np.float32]]) -> Json:
    largest = FLOAT_TOLERANCE * float(np.abs(logits[name]).max())
    if name != "int8":
        return {"max_abs_diff": largest, "rms_diff": largest}
    error = np.abs(logits["int8"].astype(np.float64) - logits["fp32"])
    return {
        "max_abs_diff": max(largest, 2 * float(error.max())),
        "rms_diff": max(largest, 2 * float(np.sqrt(np.mean(error**2)))),
    }


def _write_image(folder: Path, index: int, image: Pixels) -> dict[str, Any]:
    pixels, picture = f"samples/{index}.npy", f"samples/{index}.png"
    np.save(folder / pixels, image)
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(folder / picture, format="PNG")
    return {"image": pixels, "picture": picture, "expected": {}, "decided": {}}
