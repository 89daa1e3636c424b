"""Every shipped target loads, says how to use it, and has the facts that its kernels need."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecompress.errors import ConfigurationError
from edgecompress.machine import RELEVANT_FEATURES
from edgecompress.shipped import shipped_files
from edgecompress.target import load_target

NAMES = ["arm64", "rpi4", "rpi5", "x86", "x86-avx2", "x86-vnni"]


def test_these_targets_are_shipped() -> None:
    assert set(NAMES) <= {path.stem for path in shipped_files("targets")}


@pytest.mark.parametrize("path", shipped_files("targets"), ids=lambda path: path.stem)
def test_shipped_target_is_complete(path: Path) -> None:
    target = load_target(path.stem)
    assert target.name == path.stem
    assert target.description
    assert target.sources
    assert all(source.startswith("https://") for source in target.sources)
    header = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert f"--target {path.stem}" in header
    assert "Change first:" in header
    assert target.budgets.min_int8_speedup == 1.0
    assert target.budgets.max_accuracy_drop == 0.02
    assert target.budgets.size_bytes is not None
    assert target.budgets.peak_rss_bytes is not None
    assert {name for entry in target.isa for name in entry.split("|")} <= RELEVANT_FEATURES


@pytest.mark.parametrize(
    ("name", "activations", "weight_bits"),
    [
        ("x86", "auto", "auto"),
        ("x86-vnni", "uint8", 8),
        ("x86-avx2", "uint8", 7),
        ("arm64", "int8", 8),
        ("rpi4", "int8", 8),
        ("rpi5", "int8", 8),
    ],
)
def test_int8_scheme_belongs_to_the_kernels(name: str, activations: str, weight_bits: int | str) -> None:
    scheme = load_target(name).int8
    assert (scheme.activations, scheme.weight_bits) == (activations, weight_bits)


def test_only_the_newer_raspberry_pi_has_dot_products() -> None:
    old, new = load_target("rpi4"), load_target("rpi5")
    assert (old.architecture, old.cores, new.architecture, new.cores) == ("aarch64", 4, "aarch64", 4)
    assert "asimddp" not in old.isa
    assert "asimddp" in new.isa
    assert (old.device_model, new.device_model) == ("Raspberry Pi 4", "Raspberry Pi 5")


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("architecture: arm\nthreads: 0\nbudgets:\n  max_accuracy_drop: 2\n  size_byte: 1\n")
    with pytest.raises(ConfigurationError) as caught:
        load_target(str(path))
    for expected in ("architecture", "threads", "0.02", "size_byte", "size_bytes"):
        assert expected in str(caught.value)


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'rpi4'"):
        load_target("rpi44")
