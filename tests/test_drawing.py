"""The report's figures: what matplotlib drew becomes markup that is safe, of its own ids, and in the page's colours."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from edgecompress.reporting.drawing import draw, legend_of
from edgecompress.reporting.figures import latency_trade_off, size_trade_off
from edgecompress.reporting.time_figures import distribution_figure, roofline_figure, scaling_figure
from edgecompress.reporting.training_figures import training_figures
from edgecompress.reporting.trust_figures import class_figure, layer_figure, reliability_figure
from edgecompress.reporting.variants import mark_front, variants

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "$\\frac{1}{$",
    "\u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f680",
    "&@0@",
)


def _rows(labels: tuple[str, ...], **more: Any) -> dict[str, Any]:
    rows = [
        {"label": label, "dot": float(k), "low": k - 0.5, "high": k + 0.5, "text": "1 ms"}
        for k, label in enumerate(labels)
    ]
    facts = {
        "id": "a",
        "kind": "rows",
        "title": "A",
        "description": "B.",
        "x": {"label": "ms"},
        "rows": rows,
        "mark": 1.0,
    }
    return facts | more


def _points(labels: tuple[str, ...], values: tuple[float, ...]) -> dict[str, Any]:
    points = [
        {"label": label, "x": value, "y": 90.0 + k, "y_ci95": [89.0, 99.0], "x_ci95": None, "text": "t", "front": True}
        for k, (label, value) in enumerate(zip(labels, values, strict=False))
    ]
    return {
        "id": "b",
        "kind": "scatter",
        "title": "A",
        "description": "B.",
        "x": {"label": "ms", "log": min(values) > 0},
        "y": {"label": "%", "limits": [0.0, 100.0]},
        "points": points,
    }


@pytest.mark.parametrize(
    "facts", [_rows(HOSTILE), _points(HOSTILE, (1.0, 2.0, 3.0, 40.0, 500.0))], ids=["rows", "scatter"]
)
def test_names_are_put_in_as_text(facts: dict[str, Any]) -> None:
    svg = str(draw(facts))
    root = ElementTree.fromstring(svg)
    assert {element.tag for element in root.iter()} <= {
        *("svg", "title", "desc", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect")
    }
    shown = [text.text for text in root.iter("text")]
    for name in HOSTILE:
        assert name in shown, name


def test_ids_of_two_figures_do_not_clash_and_all_references_are_within() -> None:
    one, two = (str(draw(_rows(("x", "y"), id=name))) for name in ("one", "two"))
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in (one, two)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    for svg, own in zip((one, two), ids, strict=True):
        assert len(own) == len(set(own))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(own)


def test_every_colour_is_a_variable_of_the_page() -> None:
    for facts in (_rows(("fp32", "int8", "other")), _points(("fp32", "int8"), (1.0, 2.0))):
        svg = str(draw(facts))
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert "var(--series-2)" in svg
        assert "<style" not in svg


def test_it_is_drawn_the_same_again_and_says_its_values() -> None:
    facts = _rows(("fp32",))
    assert draw(facts) == draw(facts)
    root = ElementTree.fromstring(str(draw(facts)))
    assert [element.text for element in root if element.tag in ("title", "desc")] == ["A", "B. fp32: 1 ms."]


@pytest.mark.parametrize("values", [(0.0, 0.0), (1.0, 1.0), (1e-9, 1e9), (-1.0, 5.0)])
def test_degenerate_values_are_drawn(values: tuple[float, ...]) -> None:
    assert "<svg" in draw(_points(("a", "b"), values))
    rows = [
        {"label": "a", "bar": max(0.0, values[0]), "text": "t"},
        {"label": "b", "bar": max(0.0, values[1]), "text": "t"},
    ]
    assert "<svg" in draw(_rows(()) | {"rows": rows, "mark": None})


def test_the_front_holds_what_no_other_beats() -> None:
    points = [{"x": 1.0, "y": 90.0}, {"x": 2.0, "y": 95.0}, {"x": 3.0, "y": 94.0}, {"x": 1.0, "y": 90.0}]
    assert [point["front"] for point in mark_front(points)] == [True, True, False, True]


STAGES = [
    {
        "id": "dense",
        "kind": "train",
        "accuracy": 0.9,
        "accuracy_ci95": [0.88, 0.92],
        "size_bytes_compressed": 4e6,
        "is_baseline": True,
    },
    {"id": "half", "kind": "prune", "accuracy": 0.85, "size_bytes_compressed": 2e6, "is_baseline": False},
    {"id": "thin", "kind": "prune", "accuracy": 0.89, "size_bytes_compressed": 1e6, "is_baseline": False},
    {"id": "whole", "kind": "quantize", "accuracy": 0.88, "size_bytes_compressed": 3e5, "is_baseline": False},
]
MODEL = {"latency_ms": {"p50": 2.0, "p50_ci95": [1.9, 2.1]}, "peak_rss_bytes": 5e7, "macs": 1e6, "weights_bytes": 1e5}
PROFILE: dict[str, Any] = {"models": {"baseline": MODEL, "fp32": MODEL, "int8": MODEL | {"latency_ms": {"p50": 1.0}}}}


def test_every_variant_stands_in_the_trade_offs() -> None:
    rows = variants(STAGES, PROFILE)
    assert [row["model"] for row in rows] == ["baseline", None, "fp32", "int8"]
    latency, size = latency_trade_off(rows), size_trade_off(rows)
    assert latency is not None
    assert size is not None
    assert [(p["label"], p["x"], p["front"]) for p in latency["points"]] == [
        ("dense (baseline)", 2.0, True),
        ("thin (fp32)", 2.0, False),
        ("whole (int8)", 1.0, True),
    ]
    assert [(p["label"], p["x"], p["front"]) for p in size["points"]] == [
        ("dense (baseline)", 4.0, True),
        ("half", 2.0, False),
        ("thin (fp32)", 1.0, True),
        ("whole (int8)", 0.3, True),
    ]


def test_what_was_measured_is_drawn_and_what_was_not_is_not() -> None:
    assert distribution_figure({}) is roofline_figure({}) is reliability_figure({}) is layer_figure({}) is None
    assert scaling_figure({}, "threads") is class_figure([]) is None
    assert training_figures([]) == []
    bins = [{"confidence": 0.5, "accuracy": 0.4, "samples": 5}, {"confidence": 0.9, "accuracy": 1.0, "samples": 20}]
    peak = {"memory_gb_per_s": 10.0, "float_gmacs_per_s": 100.0, "int8_gmacs_per_s": 400.0}
    share = {"gmacs_per_s": 50.0, "threads": 1}
    profile = {
        "models": {"int8": MODEL | {"latency_ms_quantiles": {"0.01": 1.0, "0.5": 2.0, "0.9": 2.5, "0.999": 9.0}}},
        "roofline": {"threads": {"1": peak}, "models": {"int8": share}},
        "scaling": {
            "int8": {
                "threads": [{"threads": 1, "speedup": 1.0}, {"threads": 2, "speedup": 1.8, "speedup_ci95": [1.7, 1.9]}]
            }
        },
    }
    layers = [{"layer": f"layer{k}", "alone_sqnr_db": 40.0 + k, "gain_db": 0.1} for k in range(20)]
    found = [
        reliability_figure({"calibration": {"fp32": {"bins": bins}, "int8": {"bins": bins}}}),
        class_figure([{"delta": -k / 100} for k in range(20, 0, -1)]),
        layer_figure({"layers": layers[::-1], "full": {"sqnr_db": 38.0}}),
        distribution_figure(profile),
        roofline_figure(profile),
        scaling_figure(profile, "threads"),
        *training_figures([{"stage": "dense", "loss": 1 / k, "val_accuracy": 1 - 1 / k} for k in range(1, 300)]),
    ]
    for facts in found:
        assert facts is not None
        assert ElementTree.fromstring(str(draw(facts))).get("role") == "img"
    layer, curve = found[2], found[6]
    assert layer is not None
    assert curve is not None
    assert layer["rows"][0]["label"] == "layer0"
    assert len(layer["rows"]) == 14
    assert curve["series"][0]["x"][-1] == 299
    assert [key["series"] for key in legend_of(found[0] or {})] == [2, 3]
