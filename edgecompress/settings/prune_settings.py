"""Settings of a prune stage: what is removed, how much of it, and how it is ranked.

What enters: one stage of a recipe. What leaves: a frozen `PruneStage`, whose settings fit its method.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from edgecompress.settings.configuration import ClosedFraction, Fraction
from edgecompress.settings.model_settings import Identifier
from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.settings.training_settings import TrainingSettings


def _quoted_pattern(value: Any) -> Any:
    """Refuse what YAML makes of an unquoted 2:4, a number to the base of sixty."""
    if not isinstance(value, str) or not re.fullmatch(r"[1-9]\d?:[1-9]\d?", value):
        raise ValueError(f'{value} is no pattern; write N:M in quotes, for instance "2:4" (pattern: "2:4")')
    kept, size = (int(part) for part in value.split(":"))
    if kept >= size:
        raise ValueError(f"{value} keeps {kept} of {size}, so nothing is zeroed; for instance 2:4")
    return value


STRUCTURED_TARGETS = ("channel_ratio", "macs_ratio", "params_ratio", "latency_ratio")


class PruneStage(TrainingSettings):
    """Remove channels (structured) or zero weights (unstructured), finetuning between steps and after them.

    Every ratio is the share to remove.
    """

    kind: Literal["prune"]
    id: Identifier
    method: Literal["structured", "unstructured"] = "structured"
    channel_ratio: Fraction | None = Field(default=None, description="structured: share of channels to remove")
    macs_ratio: Fraction | None = Field(
        default=None, description="structured: share of the MACs to remove; the channel ratio for it is searched"
    )
    params_ratio: Fraction | None = Field(default=None, description="structured: share of the parameters to remove")
    latency_ratio: Fraction | None = Field(
        default=None, description="structured: share of the float latency to remove, measured on the target"
    )
    layer_ratios: dict[str, ClosedFraction] = Field(
        default_factory=dict,
        description="structured: layers, as globs, that lose a share of their own; alone, all others stay whole",
    )
    sparsity: Fraction | None = Field(default=None, description="unstructured: share of weights to zero")
    pattern: Annotated[str, BeforeValidator(_quoted_pattern)] | None = Field(
        default=None,
        description='unstructured, in place of sparsity: "2:4" keeps 2 of every 4 neighbouring inputs of a filter',
    )
    regularization: Literal["l1", "l2"] | None = Field(
        default=None, description="unstructured: a penalty on the weights that may be zeroed, while finetuning"
    )
    regularization_strength: Annotated[float, Field(gt=0)] = Field(
        default=1e-5, description="of the sum of |w| (l1) or of w^2 (l2), beside the loss"
    )
    rewind_epoch: PositiveInt | None = Field(
        default=None,
        description="unstructured: after each removal, what is left goes back to the weights that the stage before had "
        "after this epoch (the lottery ticket)",
    )
    scope: Literal["global", "isomorphic", "layer"] = Field(
        default="global", description="rank over all layers, over layers of one pattern, or in each"
    )
    importance: Literal["magnitude", "l1", "bn_scale", "taylor", "lamp", "hessian"] = "magnitude"
    channel_multiple: PositiveInt | None = Field(default=None, description="left out, the target's")
    max_layer_ratio: Fraction = Field(default=0.9, description="no layer loses more than this share of its channels")
    steps: Annotated[int, Field(ge=1, le=100)] = Field(default=1, description="removals, each followed by finetuning")
    epochs_between: Annotated[int, Field(ge=0)] = Field(
        default=1, description="finetuning epochs after each step but the last; the last gets `epochs`"
    )
    exclude: tuple[str, ...] = Field(default=(), description="module names, as globs, that keep every channel")
    teacher: TeacherSettings | None = None

    @model_validator(mode="after")
    def _target_of_the_method(self) -> PruneStage:
        given = [name for name in STRUCTURED_TARGETS if getattr(self, name) is not None]
        if self.method == "structured":
            for name in ("sparsity", "pattern", "regularization", "rewind_epoch"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} does not belong to method structured; use it with method unstructured")
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} are both given; keep one, the share to remove of one thing")
            if not given and not self.layer_ratios:
                raise ValueError(
                    f"method structured needs one of {', '.join(STRUCTURED_TARGETS)}, the share to remove, a fraction "
                    "between 0 and 1 (or layer_ratios alone)"
                )
            too_much = [name for name, ratio in self.layer_ratios.items() if ratio > self.max_layer_ratio]
            if too_much:
                raise ValueError(
                    f"layer_ratios: '{too_much[0]}' loses {self.layer_ratios[too_much[0]]:g}, more than "
                    f"max_layer_ratio {self.max_layer_ratio:g} allows; lower the one or raise the other"
                )
            return self
        if self.sparsity is None and self.pattern is None:
            raise ValueError("method unstructured needs sparsity, a fraction between 0 and 1 (or a pattern)")
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("sparsity and pattern are both given; keep one, a pattern sets the sparsity itself")
        foreign = [*given, *(["layer_ratios"] if self.layer_ratios else [])]
        if foreign:
            raise ValueError(f"{foreign[0]} does not belong to method unstructured; use sparsity")
        if self.importance != "magnitude":
            raise ValueError("unstructured pruning ranks weights by magnitude (L1); leave importance out")
        if self.scope == "isomorphic":
            raise ValueError("scope isomorphic is about channels; use scope global or layer with method unstructured")
        return self

    @property
    def target(self) -> tuple[str, float]:
        """What the stage is to remove, and which share of it; the channel ratio is 0 where layer_ratios stand alone."""
        for name in STRUCTURED_TARGETS:
            value = getattr(self, name)
            if value is not None:
                return name.removesuffix("_ratio"), float(value)
        return "channel", 0.0
