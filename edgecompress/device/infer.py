#!/usr/bin/env python3
"""Classify an image with a model of this bundle, or check that the device computes what was expected.

    python3 infer.py IMAGE                  # .npy (uint8 [height, width, channels]); with Pillow any image file
    python3 infer.py IMAGE --model fp32
    python3 infer.py --self-test            # ends with 1 when an answer is not the expected one

What enters: the bundle's folder, which is the one that this file stands in. What leaves: the likeliest classes, or
for each model how far its logits are from the expected ones. Needs Python 3.9 or newer, numpy and onnxruntime;
Pillow only for image files.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import threading
import tokenize
import zlib
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime as ort
except ImportError as missing:
    raise SystemExit(
        f"error: {missing}; this script needs numpy and onnxruntime: {sys.executable} -m pip install numpy onnxruntime"
    ) from missing

if __name__ == "__main__":
    sys.dont_write_bytecode = True  # the folder stays as it was made, for edgecompress verify

Json = dict[str, Any]
MANIFEST = "manifest.json"
KIND = "edgecompress bundle"
SCHEMA_VERSION = 1
ANSWER_SECONDS = 60.0  # for one image; a model from somebody else may hold a loop that never ends


class BundleError(Exception):
    """A bundle or an image that cannot be used: where, what, and how to mend it."""


def read_manifest(folder: Path) -> Json:
    """The bundle's manifest. Raises BundleError when the folder is no bundle, or a newer one than this script reads."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read: {error}; keep this script in its bundle's folder") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise BundleError(f"{path}: is no manifest of a bundle")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version")
        raise BundleError(f"{path}: schema_version {found!r}, this script reads {SCHEMA_VERSION}; use the bundle's own")
    return manifest


# What numpy and Pillow are known to raise on damaged files, beside errors of their own.
_DAMAGED = (OSError, ValueError, EOFError, TypeError, LookupError, SyntaxError, ArithmeticError, MemoryError)
_DAMAGED_ARRAY = (*_DAMAGED, tokenize.TokenError, RecursionError)
_DAMAGED_IMAGE = (*_DAMAGED, struct.error, zlib.error)


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """The array of a .npy file, never of pickled objects. Raises BundleError."""
    try:
        array = np.load(path, allow_pickle=False)
    except _DAMAGED_ARRAY as error:
        raise BundleError(f"{path}: cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise BundleError(f"{path}: cannot be read: is no .npy file")
    return array


def read_image(path: Path, channels: int) -> np.ndarray[Any, Any]:
    """Pixels of an image: uint8 [H, W, C] of a .npy file, or what Pillow decodes, in grey or in colour.

    Raises BundleError.
    """
    if path.suffix == ".npy":
        pixels = read_array(path)
        if pixels.ndim == 4 and pixels.shape[0] == 1:
            pixels = pixels[0]
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
            raise BundleError(
                f"{path}: holds {pixels.dtype} {list(pixels.shape)}; an image is uint8 [height, width, channels]"
            )
        return pixels if pixels.ndim == 3 else pixels[:, :, None]
    try:
        from PIL import Image
    except ImportError as error:
        raise BundleError(
            f"{path}: decoding it needs Pillow: {sys.executable} -m pip install pillow; "
            "or give the pixels as a .npy file, uint8 [height, width, channels]"
        ) from error
    from edgecompress.data.preprocessing import to_mode

    try:
        with Image.open(path) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            image.load()
            pixels = np.asarray(to_mode(image, "L" if channels == 1 else "RGB"))
    except (*_DAMAGED_IMAGE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BundleError(f"{path}: cannot be decoded: {error}") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


class Classifier:
    """One model of a bundle. `name` is `fp32`, `int8`, or None for the bundle's own choice; `threads` 0 is all.

    With `fused` off, nothing is optimized: an int8 file then rounds in float, as its operators are defined, and no
    integer kernel runs.
    """

    def __init__(self, folder: Path, name: str | None = None, *, threads: int = 0, fused: bool = True) -> None:
        self.manifest = read_manifest(folder)
        self.name = name or self.manifest["default_model"]
        if self.name not in self.manifest["models"]:
            raise BundleError(f"--model {self.name}: the bundle holds {', '.join(self.manifest['models'])}")
        self.facts = self.manifest["models"][self.name]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = folder / self.facts["file"]
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exception classes share no public base
            wanted = self.manifest["onnxruntime_min"]
            raise BundleError(
                f"{path}: onnxruntime {ort.__version__} cannot load it (the bundle needs {wanted} or newer): {error}"
            ) from error

    def logits(self, pixels: np.ndarray[Any, Any], *, prepared: bool = False) -> np.ndarray[Any, Any]:
        """float32 [classes] for one image, uint8 [H, W, C]. Raises BundleError when the image does not fit.

        `prepared` says that pixels of the input's size were resized and cropped before; it is asked only where
        the preprocessing is not inside the model.
        """
        feed = {self.facts["input"]["name"]: self.model_input(pixels, prepared=prepared)}
        options = ort.RunOptions()
        watchdog = threading.Timer(ANSWER_SECONDS, setattr, (options, "terminate", True))
        watchdog.daemon = True
        watchdog.start()
        try:
            answer: np.ndarray[Any, Any] = self.session.run([self.facts["output"]["name"]], feed, options)[0]
        except Exception as error:  # onnxruntime's exception classes share no public base
            if options.terminate:
                raise BundleError(
                    f"{self.facts['file']}: gave no answer within {ANSWER_SECONDS:g} s; do not use this model"
                ) from error
            raise BundleError(f"{self.facts['file']}: cannot run on an image {list(pixels.shape)}: {error}") from error
        finally:
            watchdog.cancel()
        logits: np.ndarray[Any, Any] = answer[0]
        return logits

    def model_input(self, pixels: np.ndarray[Any, Any], *, prepared: bool = False) -> np.ndarray[Any, Any]:
        """The pixels as the model reads them, a batch of one."""
        wanted = self.manifest["preprocessing"]
        channels, size = wanted["channels"], wanted["input_size"]
        if pixels.shape[2] != channels:
            raise BundleError(f"the image has {pixels.shape[2]} channels, the model reads {channels}")
        if self.facts["input"]["dtype"] == "uint8":
            return np.ascontiguousarray(pixels[None])  # the graph itself resizes and normalizes
        if pixels.shape == (size, size, channels) and (prepared or wanted["crop_fraction"] == 1.0):
            planes = pixels.transpose(2, 0, 1)
        else:
            planes = _prepared(pixels, wanted)
        mean, std = (np.array(wanted[key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
        normalized = (planes.astype(np.float32) / np.float32(255.0) - mean) / std
        return np.ascontiguousarray(normalized[None].astype(np.float32))


def _prepared(pixels: np.ndarray[Any, Any], wanted: Json) -> np.ndarray[Any, Any]:
    """Resized and cropped outside of the graph: uint8 [C, H, W], as the model was trained."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BundleError(
            f"the image has {list(pixels.shape)} pixels, and resizing it needs Pillow: "
            f"{sys.executable} -m pip install pillow; or use a bundle with the preprocessing inside"
        ) from error
    from edgecompress.data.preprocessing import Preprocessing

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return Preprocessing.from_dict(wanted).prepare(image)


def read_labels(folder: Path, manifest: Json) -> list[str]:
    """One label a class."""
    text: str = (folder / manifest["labels"]).read_text(encoding="utf-8")
    return text.removesuffix("\n").split("\n")


def top_classes(logits: np.ndarray[Any, Any], labels: list[str], count: int) -> list[Json]:
    """The likeliest classes, best first: index, label, logit and softmax probability."""
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = shifted / shifted.sum()
    order = np.argsort(-logits, kind="stable")[:count]
    return [
        {
            "class": int(index),
            "label": labels[index] if index < len(labels) else str(index),
            "logit": float(logits[index]),
            "probability": float(probabilities[index]),
        }
        for index in order
    ]


def self_test(folder: Path, names: list[str] | None = None) -> list[Json]:
    """Run the stored images through the models (all, or those named) and compare with the expected logits.

    One row a model: `model`, `samples`, `max_abs_diff`, `rms_diff`, what is `allowed` of both, `same_top1`, `passed`
    and, in words, `problems`. The rule stands in the manifest, `self_test.rule`. Raises BundleError.
    """
    manifest = read_manifest(folder)
    test = manifest["self_test"]
    return [_test_model(folder, name, test) for name in names or list(manifest["models"])]


def _test_model(folder: Path, name: str, test: Json) -> Json:
    rule = test["models"][name]
    expected = read_array(folder / rule["logits"])
    classifier = Classifier(folder, name, threads=1)
    channels = classifier.manifest["preprocessing"]["channels"]
    images = (read_image(folder / sample["image"], channels) for sample in test["samples"])
    found = np.stack([classifier.logits(image, prepared=True) for image in images])
    if found.shape != expected.shape:
        raise BundleError(f"{name}: gives logits {list(found.shape)}, expected {list(expected.shape)}")
    difference = np.abs(found.astype(np.float64) - expected)
    largest, rms = float(difference.max()), float(np.sqrt(np.mean(difference**2)))
    problems = []
    if not np.isfinite(found).all():
        problems.append("the logits hold NaN or infinity")
    elif largest > rule["max_abs_diff"]:
        worst = int(difference.max(axis=1).argmax())
        problems.append(
            f"a logit of {test['samples'][worst]['image']} differs by {largest:.3g}; "
            f"{rule['max_abs_diff']:.3g} is allowed"
        )
    if rms > rule["rms_diff"]:
        problems.append(f"all logits differ by {rms:.3g} (root mean square); {rule['rms_diff']:.3g} is allowed")
    for index, sample in enumerate(test["samples"]):
        wanted, got = int(expected[index].argmax()), int(found[index].argmax())
        if wanted != got and sample["decided"][name]:
            problems.append(f"{sample['image']}: expected class {wanted}, found {got}")
    return {
        "model": name,
        "samples": len(expected),
        "max_abs_diff": largest,
        "rms_diff": rms,
        "allowed": {"max_abs_diff": rule["max_abs_diff"], "rms_diff": rule["rms_diff"]},
        "same_top1": int(np.sum(expected.argmax(axis=1) == found.argmax(axis=1))),
        "passed": not problems,
        "problems": problems,
    }


def self_test_lines(rows: list[Json]) -> list[str]:
    """The result for people: one line a model, and one line a problem."""
    lines = []
    for row in rows:
        allowed = row["allowed"]
        lines.append(
            f"{'passed' if row['passed'] else 'FAILED'}  {row['model']}: {row['samples']} images, "
            f"largest difference {row['max_abs_diff']:.3g} (allowed {allowed['max_abs_diff']:.3g}), "
            f"root mean square {row['rms_diff']:.3g} (allowed {allowed['rms_diff']:.3g}), "
            f"same top class on {row['same_top1']}"
        )
        lines += [f"        {problem}" for problem in row["problems"]]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Classify an image, or check the device against the expected answers.")
    parser.add_argument("image", nargs="?", type=Path, help="a .npy file (uint8 [H, W, C]), or with Pillow any image")
    parser.add_argument(
        "--self-test", action="store_true", help="replay the expected results; end with 1 if they differ"
    )
    parser.add_argument("--model", help="fp32 or int8 (default: what the bundle ships)")
    parser.add_argument("--top", type=int, default=5, help="classes to print (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="threads of one inference (default: one a core)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main() -> int:
    """Parse the arguments, do what they ask, return the exit code: 0, 1 for a failed self-test, 2 for bad input."""
    parser = _parser()
    arguments = parser.parse_args()
    if (arguments.image is None) != arguments.self_test:
        parser.error("give an IMAGE or --self-test")
    folder = Path(__file__).resolve().parent
    try:
        if arguments.self_test:
            rows = self_test(folder, [arguments.model] if arguments.model else None)
            passed = all(row["passed"] for row in rows)
            text = json.dumps({"passed": passed, "models": rows}, indent=2)
            print(text if arguments.json else "\n".join(self_test_lines(rows)))
            if not passed:
                print(
                    "self-test FAILED: this device does not compute what was proven; do not use these answers",
                    file=sys.stderr,
                )
            return 0 if passed else 1
        classifier = Classifier(folder, arguments.model, threads=max(0, arguments.threads))
        pixels = read_image(arguments.image, classifier.manifest["preprocessing"]["channels"])
        logits = classifier.logits(pixels, prepared=arguments.image.suffix == ".npy")
        best = top_classes(logits, read_labels(folder, classifier.manifest), max(1, arguments.top))
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"model": classifier.name, "top": best}, indent=2, ensure_ascii=False))
        return 0
    for row in best:
        print(f"{row['probability']:7.2%}  {row['label']} (class {row['class']}, logit {row['logit']:.4g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
