"""Probabilities and likeliest classes behind the logits: in the file, and proven to be those of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgecompress.errors import ConfigurationError, ExportError
from edgecompress.exporting.answers import LIMIT, Answers, append_answers, compare_answers
from edgecompress.settings.target import load_target
from onnx_models import CLASSES, SIZE, residual_net


@dataclass
class Images:
    """As much of a Subset as a comparison needs."""

    count: int = 16

    def __len__(self) -> int:
        return self.count

    def normalized(self, batch: int) -> list[Any]:
        return list(np.random.default_rng(0).normal(size=(2, self.count // 2, 3, SIZE, SIZE)).astype(np.float32))


TARGET = load_target("x86")


def with_answers(folder: Path, answers: Answers) -> Path:
    path = folder / "model.onnx"
    residual_net(path)
    append_answers(path, answers)
    return path


@pytest.mark.parametrize("answers", [Answers(softmax=True), Answers(top_k=2), Answers(softmax=True, top_k=CLASSES)])
def test_outputs_follow_the_logits(tmp_path: Path, answers: Answers) -> None:
    path = with_answers(tmp_path, answers)
    names = [output.name for output in onnxruntime.InferenceSession(path).get_outputs()]
    assert names == ["logits", *answers.outputs]
    result = compare_answers({"fp32": path}, Images(), answers, whole_images=False, target=TARGET)  # type: ignore[arg-type]
    assert result["passed"]
    assert 0 < result["fp32"]["max_abs_diff"] <= LIMIT


@pytest.mark.parametrize(("output", "answers"), [("probabilities", Answers(True)), ("top_k_indices", Answers(top_k=3))])
def test_a_wrong_answer_is_found(tmp_path: Path, output: str, answers: Answers) -> None:
    path = with_answers(tmp_path, answers)
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if output in node.output]
    if output == "probabilities":  # over the images in place of the classes
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("axis", 0))
    else:  # the least likely classes first
        node.attribute.append(onnx.helper.make_attribute("largest", 0))
    onnx.save(model, path)
    result = compare_answers({"fp32": path}, Images(), answers, whole_images=False, target=TARGET)  # type: ignore[arg-type]
    assert not result["passed"]
    assert "fp32's answers differ" in result["checks"][0]["sentence"]


def test_more_classes_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"--top-k 7: the model has {CLASSES} classes; give 1 to {CLASSES}"):
        Answers(top_k=7).require_fitting(CLASSES)
    with pytest.raises(ExportError):
        with_answers(tmp_path, Answers(top_k=CLASSES + 1))
