"""The last step of `effort: best`: weights, biases and steps tuned together, without labels.

What enters: an int8 model, the float graph below it, calibration images. What leaves: the same graph with better
numbers, or the model as it was where held-out images do not say beyond chance that they are better. Layer-wise rounding
cannot see that two layers' errors add up; here the error of the logits alone is reduced, by gradients through the
roundings (the straight-through estimator with learned steps of `qat`), as in Nagel et al., 2021, "A White Paper on
Neural Network Quantization", section 4, but with float logits in the place of labels, so that few images do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgecompress import console
from edgecompress.exporting.significance import SIGNIFICANT, p_of_drop
from edgecompress.int8.qat import TrainableInt8
from edgecompress.int8.quantized_model import QuantizedModel

_EPOCHS = 3
_BATCH_SIZE = 16
# One Adam step moves a weight by this share of its channel's range, times the noise that there is to remove: a model
# at 35 dB is spoilt by steps that one at 20 dB needs.
_LEARNING_RATE = 6e-4
_STEP_SIZE_FACTOR = 5.0  # steps (scales) learn faster than weights: there are few, and each sees every value


@dataclass(frozen=True)
class Finetuned:
    """The tuned model where that is better beyond chance, else the model as it was.

    `gain_db` is what tuning gained on held-out images, `better` on how many of them; kept or not.
    """

    model: QuantizedModel
    gain_db: float
    better: int
    is_kept: bool


def finetune(model: QuantizedModel, reference: GraphModule, images: Tensor, held_out: Tensor) -> Finetuned:
    """Tune `model` towards the logits of `reference` on normalized `images` [N, C, H, W]; `held_out` images decide.

    After every epoch the integers that came out are judged on `held_out`. The best ones stay if the error fell on so
    many of the images that a fair coin would hardly do it: each image has one vote, so that one with a large error does
    not decide for all, and a gain that lies within chance is no reason to leave what layer-wise rounding found.
    """
    with torch.no_grad():
        wanted = torch.cat([reference(batch) for batch in torch.split(images, _BATCH_SIZE)])
        wanted_held_out = reference(held_out)
    start = _noise(wanted_held_out, model, held_out)
    energy = float((wanted_held_out.double() ** 2).sum())
    before = float(start.sum()) / energy
    if before == 0.0:
        return Finetuned(model, 0.0, 0, is_kept=False)
    net = TrainableInt8(model)
    net.train(False)
    rate = _LEARNING_RATE * math.sqrt(before)
    values = [p for name, p in net.named_parameters() if name.endswith("values")]
    steps = [p for name, p in net.named_parameters() if not name.endswith("values")]
    optimizer = torch.optim.Adam(
        [{"params": values, "lr": rate}, {"params": steps, "lr": rate * _STEP_SIZE_FACTOR}], betas=(0.9, 0.99)
    )
    count = math.ceil(len(images) / _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS * count)
    scale = float((wanted**2).mean())
    generator = torch.Generator().manual_seed(0)
    best, least = model, start
    last = before
    with console.progress("tuning int8", _EPOCHS * count) as advance:
        for _ in range(_EPOCHS):
            for chosen in torch.split(torch.randperm(len(images), generator=generator), _BATCH_SIZE):
                loss = ((net(images[chosen]) - wanted[chosen]) ** 2).mean() / scale
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(1, f"{-10 * math.log10(last):.1f} dB on held-out images")
            candidate = net.quantized(model.correction)
            found = _noise(wanted_held_out, candidate, held_out)
            last = float(found.sum()) / energy
            if best is model or float(found.sum()) < float(least.sum()):
                best, least = candidate, found
    better, worse = int((least < start).sum()), int((least > start).sum())
    is_kept = float(least.sum()) < float(start.sum()) and p_of_drop(better, worse) < SIGNIFICANT
    gain_db = 10.0 * math.log10(float(start.sum()) / max(float(least.sum()), 1e-30))
    return Finetuned(best if is_kept else model, gain_db, better, is_kept)


@torch.no_grad()
def _noise(wanted: Tensor, model: QuantizedModel, images: Tensor) -> Tensor:
    """Energy of the logits' error of each image, float64 [N]."""
    error: Tensor = model.simulation()(images) - wanted
    return (error.double() ** 2).sum(dim=1)
