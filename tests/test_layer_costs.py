"""What layers cost where nothing can be measured, against what the module itself counts."""

from __future__ import annotations

import pytest

from edgecompress.int8.layer_costs import costs_by_macs
from edgecompress.int8.mixed import MixedModel
from edgecompress.models.complexity import measure_complexity
from int8_models import PATTERNS, SIZE, images, quantized, seeded


@pytest.mark.parametrize("name", ["Residual", "Tokens"])
def test_work_is_that_of_one_image(name: str) -> None:
    module = seeded(PATTERNS[name]())
    costs = {cost.layer: cost for cost in costs_by_macs(MixedModel(quantized(module)), {})}
    counted = sum(cost.float_cost for cost in costs.values()) * 1e6
    assert round(counted) == measure_complexity(module, images(1)).macs
    if name == "Tokens":
        tokens = (SIZE // 2) ** 2
        assert costs["qkv"].float_cost * 1e6 == pytest.approx(tokens * 8 * 24)
        assert costs["head"].float_cost * 1e6 == pytest.approx(8 * 5)  # behind the mean over tokens
