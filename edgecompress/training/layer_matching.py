"""Layers of a student matched to layers of its teacher, while the student is trained.

What enters: both modules, and pairs of module names or nothing. What leaves: one term of the loss, the share of the
teacher's features that 1 x 1 adapters on the student's cannot tell. Features are read by forward hooks, so neither
model is changed; the adapters are this module's own parameters, trained along and never part of the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from edgecompress.errors import ConfigurationError, TrainingError
from edgecompress.models.complexity import weight_layers
from edgecompress.settings.spelling import did_you_mean

# Modules that say nothing of their own: a dropout's output is its input with noise.
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class LayerShape:
    """What a module returns for one image: channels, and the side of its feature map in px."""

    name: str
    channels: int
    side: int


class LayerMatcher(nn.Module):
    """FitNets' hints (Romero et al., 2015, eq. 3), one for each pair of layers, on the scale of its teacher layer."""

    def __init__(self, teacher: nn.Module, *, example: Tensor, layers: Mapping[str, str], seed: int) -> None:
        """`example` is an input batch of the teacher; `layers` maps student modules to teacher modules; `seed` draws
        the adapters' first weights, whatever was drawn before them.
        """
        super().__init__()
        self._teacher = [teacher]  # in a list, so that it is no submodule: it is neither trained nor saved with this
        self._example = example
        self._layers = dict(layers)
        self._seed = seed
        self.pairs: tuple[tuple[LayerShape, LayerShape], ...] = ()
        self.adapters = nn.ModuleList()
        self._student_features: dict[str, Tensor] = {}
        self._teacher_features: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, student: nn.Module, example: Tensor) -> Iterator[None]:
        """Pair the layers, make the adapters that fit them, and read both models' layers until the end of the block."""
        self._pair(student, example)
        handles = [
            *_record(student, [mine.name for mine, _ in self.pairs], self._student_features, only_in_training=True),
            *_record(self._teacher[0], [theirs.name for _, theirs in self.pairs], self._teacher_features),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._student_features.clear()
            self._teacher_features.clear()

    def forward(self) -> Tensor:
        """Mean over the pairs of |A(s) - t|^2 / |t - mean(t)|^2 for the forward passes last seen.

        s and t are feature maps [N, C, S, S], the larger pooled to the smaller; the mean of t is each channel's.
        1 means that the adapter A knows no more than that mean.
        """
        terms = []
        for (mine, theirs), adapter in zip(self.pairs, self.adapters, strict=True):
            student = _as_map(self._student_features.get(mine.name), mine.name)
            teacher = _as_map(self._teacher_features.get(theirs.name), theirs.name)
            side = min(student.shape[-1], teacher.shape[-1])
            told = adapter(functional.adaptive_avg_pool2d(student, side))
            teacher = functional.adaptive_avg_pool2d(teacher, side)
            spread = (teacher - teacher.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
            terms.append((told - teacher).square().mean() / spread.clamp(min=1e-12))
        self._student_features.clear()  # a layer that does not run in the next step must not be taken for one that does
        self._teacher_features.clear()
        return torch.stack(terms).mean()

    def describe(self) -> str:
        """Which layers are matched, in words."""
        return ", ".join(f"{mine.name} to {theirs.name}" for mine, theirs in self.pairs)

    def _pair(self, student: nn.Module, example: Tensor) -> None:
        teacher = self._teacher[0]
        if self._layers:
            mine = _named_shapes(student, example, list(self._layers), model="student")
            theirs = _named_shapes(teacher, self._example, list(self._layers.values()), model="teacher")
            pairs = tuple(zip(mine, theirs, strict=True))
        else:
            pairs = pair_by_size(
                stage_ends(student, example),
                example.shape[-1],
                stage_ends(teacher, self._example),
                self._example.shape[-1],
            )
        if pairs != self.pairs:  # at the start, and after channels were cut
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                self.adapters = nn.ModuleList(nn.Conv2d(m.channels, t.channels, 1) for m, t in pairs)
            self.pairs = pairs


def stage_ends(module: nn.Module, example: Tensor) -> list[LayerShape]:
    """The last module at each size of the feature map, before the classifier, from the largest size to the smallest."""
    last_at: dict[int, LayerShape] = {}
    classifier = _last_weight_layer(module, example)
    for name, output in _outputs(module, example, until=classifier):
        if output.dim() == 4 and output.shape[-1] == output.shape[-2]:
            last_at[output.shape[-1]] = LayerShape(name, output.shape[1], output.shape[-1])
    return [last_at[side] for side in sorted(last_at, reverse=True) if side > 1]


def pair_by_size(
    student: list[LayerShape], student_input: int, teacher: list[LayerShape], teacher_input: int
) -> tuple[tuple[LayerShape, LayerShape], ...]:
    """The last layers after the same number of halvings of the input; where no number is shared, the last of each.

    Raises ConfigurationError when a model has no feature map at all.
    """
    if not student or not teacher:
        which = "student" if not student else "teacher"
        raise ConfigurationError(
            f"teacher.method feature: the {which} has no square feature map before its classifier; use dkd or relation"
        )
    # Rounded, since a stride makes 4 of 7 and a pool makes 3 of it.
    mine = {round(math.log2(student_input / layer.side)): layer for layer in student}
    theirs = {round(math.log2(teacher_input / layer.side)): layer for layer in teacher}
    pairs = [(mine[halvings], theirs[halvings]) for halvings in sorted(mine.keys() & theirs.keys())]
    return tuple(pairs) or ((student[-1], teacher[-1]),)


def _record(
    module: nn.Module, names: list[str], into: dict[str, Tensor], *, only_in_training: bool = False
) -> list[RemovableHandle]:
    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(layer: nn.Module, inputs: object, output: Tensor) -> None:
            if layer.training or not only_in_training:
                into[name] = output

        return hook

    return [module.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]


def _as_map(features: Tensor | None, name: str) -> Tensor:
    if features is None:
        raise TrainingError(f"teacher.layers: module '{name}' did not run in this training step; choose another layer")
    features = features.float()
    return features[:, :, None, None] if features.dim() == 2 else features


def _named_shapes(module: nn.Module, example: Tensor, names: list[str], *, model: str) -> list[LayerShape]:
    known = [name for name, _ in module.named_modules() if name]
    shapes: dict[str, LayerShape] = {}
    for name, output in _outputs(module, example):
        if output.dim() == 2:
            shapes[name] = LayerShape(name, output.shape[1], 1)
        elif output.dim() == 4 and output.shape[-1] == output.shape[-2]:
            shapes[name] = LayerShape(name, output.shape[1], output.shape[-1])
    for name in names:
        if name not in known:
            raise ConfigurationError(f"teacher.layers: the {model} has no module '{name}'{did_you_mean(name, known)}")
        if name not in shapes:
            raise ConfigurationError(
                f"teacher.layers: {model} module '{name}' returns neither [N, C, S, S] nor [N, C]"
                f"; one that does: {', '.join(list(shapes)[-3:])}"
            )
    return [shapes[name] for name in names]


def _last_weight_layer(module: nn.Module, example: Tensor) -> str:
    layers = weight_layers(module)
    names = [name for name, _ in _outputs(module, example) if name in layers]
    if not names:
        raise ConfigurationError("teacher.method feature: the model has no convolution or linear layer")
    return names[-1]


def _outputs(module: nn.Module, example: Tensor, *, until: str | None = None) -> list[tuple[str, Tensor]]:
    """(name, output) of every module that returns one tensor, in the order in which they end, until `until` begins."""
    ended: list[tuple[str, Tensor]] = []
    reached = False

    def end(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(layer: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not isinstance(layer, _PASSING) and not reached:
                ended.append((name, output))

        return hook

    def begin(layer: nn.Module, inputs: object) -> None:
        nonlocal reached
        reached = True

    handles = [child.register_forward_hook(end(name)) for name, child in module.named_modules() if name]
    if until is not None:
        handles.append(module.get_submodule(until).register_forward_pre_hook(begin))
    device = next((p.device for p in module.parameters()), example.device)
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()(example.to(device))
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    return ended
