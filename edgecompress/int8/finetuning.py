"""The last step of `effort: best`: weights, biases and steps tuned together, without labels.

What enters: an int8 model, the float graph below it, calibration images. What leaves: the same graph with better
numbers, or the model as it was where held-out images say that it was better. Layer-wise rounding cannot see that two
layers' errors add up; here the error of the logits alone is reduced, by gradients through the roundings (the
straight-through estimator with learned steps of `qat`), as in Nagel et al., 2021, "A White Paper on Neural Network
Quantization", section 4, but with float logits in the place of labels, so that few images do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgecompress import console
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
    """The better of two models, and in decibels what tuning gained on held-out images (negative: it was dropped)."""

    model: QuantizedModel
    gain_db: float


def finetune(model: QuantizedModel, reference: GraphModule, images: Tensor, held_out: Tensor) -> Finetuned:
    """Tune `model` towards the logits of `reference` on normalized `images` [N, C, H, W]; `held_out` images decide.

    After every epoch the integers that came out are judged on `held_out`, and the best stay.
    """
    with torch.no_grad():
        wanted = torch.cat([reference(batch) for batch in torch.split(images, _BATCH_SIZE)])
        wanted_held_out = reference(held_out)
    before = _noise_share(wanted_held_out, model, held_out)
    if before == 0.0:
        return Finetuned(model, 0.0)
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
    best, best_noise, last = model, before, before
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
            last = _noise_share(wanted_held_out, candidate, held_out)
            if last < best_noise:
                best, best_noise = candidate, last
    gained = best_noise if best is not model else last
    return Finetuned(best, 10.0 * math.log10(before / gained))


@torch.no_grad()
def _noise_share(wanted: Tensor, model: QuantizedModel, images: Tensor) -> float:
    """Energy of the logits' error over that of the logits."""
    noise = ((model.simulation()(images) - wanted).double() ** 2).sum()
    return float(noise / (wanted.double() ** 2).sum())
