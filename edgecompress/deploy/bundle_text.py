"""What a bundle says about itself: README.md for people, model_facts.h for the C++ example.

What enters: the bundle's manifest. What leaves: text.
"""

from __future__ import annotations

import json

from edgecompress.reporting.report_page import markdown_environment
from edgecompress.run_directory import Json


def readme_text(document: Json, caution: str | None) -> str:
    """README.md: what the bundle is, whether it may be shipped, and how to run it on the device."""
    return markdown_environment().get_template("bundle.md.j2").render(bundle=document, caution=caution)


def model_facts_header(document: Json) -> str:
    """cpp/model_facts.h: what the example must know about the models, as C++ constants."""
    wanted, models = document["preprocessing"], document["models"]
    facts = models[document["default_model"]]
    numbers = {key: ", ".join(f"{value!r}f" for value in map(float, wanted[key])) for key in ("mean", "std")}
    int8 = models.get("int8", models["fp32"])
    return f"""// Written by edgecompress for this bundle; the same facts stand in manifest.json.
#pragma once

constexpr const char* kFp32File = {json.dumps(models["fp32"]["file"])};
constexpr const char* kInt8File = {json.dumps(int8["file"])};
constexpr const char* kDefaultFile = {json.dumps(facts["file"])};
constexpr const char* kLabelsFile = {json.dumps(document["labels"])};
constexpr const char* kInput = {json.dumps(facts["input"]["name"])};
constexpr const char* kOutput = {json.dumps(facts["output"]["name"])};
constexpr bool kReadsPixels = {"true" if facts["input"]["dtype"] == "uint8" else "false"};  // uint8 [N, H, W, C]
constexpr int kChannels = {wanted["channels"]};
constexpr int kInputSize = {wanted["input_size"]};
constexpr float kMean[kChannels] = {{{numbers["mean"]}}};
constexpr float kStd[kChannels] = {{{numbers["std"]}}};
"""
