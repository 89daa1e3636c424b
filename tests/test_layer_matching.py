from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgecompress.errors import ConfigurationError, TrainingError
from edgecompress.models.nets import resnet8, student_cnn
from edgecompress.training.layer_matching import LayerMatcher, LayerShape, pair_by_size, stage_ends
from small_models import tiny_net

EXAMPLE = torch.zeros(2, 1, 16, 16)


def _student() -> nn.Module:
    torch.manual_seed(0)
    return resnet8(10, 1, width=8, input_size=16).eval()


def _teacher() -> nn.Module:
    torch.manual_seed(1)
    return resnet8(10, 1, width=16, input_size=16).eval()


def test_stage_ends_are_the_last_modules_of_each_size_before_the_classifier() -> None:
    assert stage_ends(_teacher(), EXAMPLE) == [
        LayerShape("blocks.0", 16, 16),
        LayerShape("blocks.1", 32, 8),
        LayerShape("blocks", 64, 4),
    ]


def test_a_convolution_that_classifies_is_no_stage_end() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(4, 10, 1), nn.ReLU(), nn.Flatten()
    )
    assert [end.name for end in stage_ends(net, EXAMPLE)] == ["0", "1"]


def test_layers_pair_by_the_halvings_of_their_input_whatever_its_size() -> None:
    student = [LayerShape("a", 8, 16), LayerShape("b", 16, 8)]
    teacher = [LayerShape("x", 8, 112), LayerShape("y", 16, 56), LayerShape("z", 32, 28)]
    paired = pair_by_size(student, 32, teacher, 224)
    assert [(mine.name, theirs.name) for mine, theirs in paired] == [("a", "x"), ("b", "y")]


def test_a_pool_that_rounds_down_pairs_with_a_stride_that_rounds_up() -> None:
    paired = pair_by_size([LayerShape("a", 8, 7), LayerShape("b", 8, 3)], 14, [LayerShape("x", 8, 4)], 14)
    assert [(mine.name, theirs.name) for mine, theirs in paired] == [("b", "x")]


def test_where_no_factor_is_shared_the_last_layers_pair() -> None:
    paired = pair_by_size([LayerShape("a", 8, 32)], 32, [LayerShape("x", 8, 112), LayerShape("y", 16, 7)], 224)
    assert [(mine.name, theirs.name) for mine, theirs in paired] == [("a", "y")]


def test_it_matches_numpy() -> None:
    student, teacher = _student(), _teacher()
    matcher = LayerMatcher(teacher, example=EXAMPLE, layers={"blocks.1": "blocks.1"}, seed=0)
    images = torch.randn(3, 1, 16, 16)
    with matcher.watching(student, EXAMPLE):
        student.train()(images)
        teacher(images)
        value = float(matcher().detach())
        student.train()(images)
        mine = student.blocks[0](student.relu(student.bn(student.conv(images))))  # type: ignore[operator,index]
        s = student.blocks[1](mine).detach().numpy()  # type: ignore[operator,index]
        first = teacher.blocks[0](teacher.relu(teacher.bn(teacher.conv(images))))  # type: ignore[operator,index]
        t = teacher.blocks[1](first).detach().numpy()  # type: ignore[operator,index]
    adapter = matcher.adapters[0]
    weight, bias = adapter.weight.detach().numpy()[:, :, 0, 0], adapter.bias.detach().numpy()  # type: ignore[union-attr,operator,index]
    told = np.einsum("oc,nchw->nohw", weight, s) + bias[None, :, None, None]
    spread = np.mean((t - t.mean(axis=(0, 2, 3), keepdims=True)) ** 2)
    assert value == pytest.approx(float(np.mean((told - t) ** 2) / spread), rel=1e-4)


def test_gradient_reaches_student_and_adapters_and_not_the_teacher() -> None:
    student, teacher = _student().train(), _teacher().requires_grad_(False)
    matcher = LayerMatcher(teacher, example=EXAMPLE, layers={}, seed=0)
    with matcher.watching(student, EXAMPLE):
        student.train()
        images = torch.randn(4, 1, 16, 16).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            student(images)
            with torch.no_grad():
                teacher(images)
        matcher().backward()
    assert student.conv.weight.grad is not None  # type: ignore[union-attr]
    assert len(list(matcher.parameters())) == 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in matcher.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_hooks_are_gone_afterwards_and_evaluation_is_not_recorded() -> None:
    student, teacher = _student(), _teacher()
    matcher = LayerMatcher(teacher, example=EXAMPLE, layers={}, seed=0)
    with matcher.watching(student, EXAMPLE):
        teacher(EXAMPLE)
        student.eval()(EXAMPLE)
        with pytest.raises(TrainingError, match="did not run"):
            matcher()
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


def test_adapters_follow_a_student_that_loses_channels_and_start_the_same_whatever_was_drawn_before() -> None:
    teacher = _teacher()
    matcher = LayerMatcher(teacher, example=EXAMPLE, layers={}, seed=3)
    with matcher.watching(_student(), EXAMPLE):
        wide = [p.clone() for p in matcher.parameters()]
    with matcher.watching(resnet8(10, 1, width=4, input_size=16), EXAMPLE):
        assert matcher.adapters[0].weight.shape == (16, 4, 1, 1)
    torch.randn(100)
    with matcher.watching(_student(), EXAMPLE):
        assert all(torch.equal(a, b) for a, b in zip(wide, matcher.parameters(), strict=True))


def test_different_architectures_and_flat_layers_match() -> None:
    student, teacher = student_cnn(10, 1, width=4, input_size=16).train(), _teacher()
    layers = {"flatten": "flatten", "features": "blocks", "features.6": "blocks"}  # one layer may teach several
    matcher = LayerMatcher(teacher, example=EXAMPLE, layers=layers, seed=0)
    with matcher.watching(student, EXAMPLE):
        student.train()(torch.randn(4, 1, 16, 16))
        teacher(torch.randn(4, 1, 16, 16))
        assert torch.isfinite(matcher())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"blocks.9": "blocks.1"}, "student has no module 'blocks.9'; did you mean"),
        ({"blocks.1": "block.1"}, "teacher has no module 'block.1'; did you mean"),
    ],
)
def test_names_that_are_not_there_are_refused(layers: dict[str, str], message: str) -> None:
    matcher = LayerMatcher(_teacher(), example=EXAMPLE, layers=layers, seed=0)
    with pytest.raises(ConfigurationError, match=message):
        with matcher.watching(_student(), EXAMPLE):
            pass


def test_a_layer_without_a_map_is_refused() -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Flatten(2)
            self.head = nn.LazyLinear(10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.tokens(images).flatten(1))
            return logits

    matcher = LayerMatcher(_teacher(), example=EXAMPLE, layers={"tokens": "blocks.1"}, seed=0)
    with pytest.raises(ConfigurationError, match=r"'tokens' returns neither"):
        with matcher.watching(Sequences(), EXAMPLE):
            pass


def test_a_model_whose_first_layer_classifies_has_nothing_to_match() -> None:
    matcher = LayerMatcher(_teacher(), example=EXAMPLE, layers={}, seed=0)
    with pytest.raises(ConfigurationError, match="the student has no square feature map"):
        with matcher.watching(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), EXAMPLE):
            pass
    assert stage_ends(tiny_net(), torch.zeros(2, 1, 8, 8))
