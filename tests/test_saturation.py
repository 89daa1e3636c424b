"""Why 8-bit weights are wrong on x86 without VNNI, and why 7-bit ones are right.

ONNX Runtime's AVX2 kernels multiply uint8 activations by int8 weights with VPMADDUBSW, which adds two neighbouring
products into a *saturating* int16, then VPMADDWD with ones, which adds neighbours into int32. Shown twice: by an exact
emulation of the two instructions in numpy, and by ONNX Runtime itself under user-mode emulation of a CPU that has AVX2
but neither AVX-512 nor VNNI (`qemu-x86_64 -cpu Haswell`, Debian's package qemu-user, which `.ci/run` installs where it
can: about 20 s with its download, and some 10 s for the test). The second part is skipped where qemu is missing.

Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, PMADDUBSW and PMADDWD.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgecompress.exporting.onnx_export import open_session
from edgecompress.int8.scheme import Scheme

Ints = NDArray[np.int64]
_BRIGHT = 255


def vpmaddubsw(activations: Ints, weights: Ints) -> Ints:
    """uint8 [..., 2n] times int8 [..., 2n]: each pair's products, added and saturated to int16 [..., n]."""
    products = activations * weights
    return np.clip(products[..., 0::2] + products[..., 1::2], -(2**15), 2**15 - 1)


def vpmaddwd_ones(words: Ints) -> Ints:
    """int16 [..., 2n] times ones: pairs added into int32 [..., n]; two int16 always fit."""
    return words[..., 0::2] + words[..., 1::2]


def avx2_dot(activations: Ints, weights: Ints) -> Ints:
    """The kernel's dot product over the last axis, which it pads with zeros to whole groups of four."""
    missing = -activations.shape[-1] % 4
    activations, weights = (
        np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) for array in (activations, weights)
    )
    return vpmaddwd_ones(vpmaddubsw(activations, weights)).sum(axis=-1)


def avx2_matmul(activations: Ints, weights: Ints) -> Ints:
    """uint8 [rows, k] times int8 [k, columns]."""
    return avx2_dot(activations[:, None, :], weights.T[None])


def patches(images: Ints, kernel: int) -> Ints:
    """Images [n, c, h, w] as rows [n * oh * ow, kernel * kernel * c]: channels last, as the kernel has them."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (kernel, kernel), axis=(2, 3))
    rows = windows.transpose(0, 2, 3, 4, 5, 1)
    return rows.reshape(-1, rows.shape[3] * rows.shape[4] * rows.shape[5])


def columns(weights: Ints) -> Ints:
    """Convolution weights [out, c, kh, kw] as a matrix [kh * kw * c, out] in the order of `patches`."""
    return weights.transpose(2, 3, 1, 0).reshape(-1, weights.shape[0])


def integers(weights: NDArray[np.float64], bits: int) -> Ints:
    """Weights [out, ...] as integers with one scale an output channel, rounded to nearest, as our scheme has them."""
    limit = Scheme("uint8", bits).weight_limit
    largest = np.abs(weights).reshape(len(weights), -1).max(axis=1)
    return np.rint(weights / largest.reshape(-1, *[1] * (weights.ndim - 1)) * limit).astype(np.int64)


def _smoothing_filters() -> NDArray[np.float64]:
    """A convolution [8, 4, 3, 3] whose neighbouring weights often share their sign, as trained filters' do."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(8, 1, 3, 3)) + 0.3 * generator.normal(size=(8, 4, 3, 3))


def _bright_images(channels: int) -> Ints:
    return np.random.default_rng(1).integers(150, 256, size=(2, channels, 8, 8))


@pytest.mark.parametrize(
    ("activations", "weights", "expected"),
    [
        ((255, 255), (127, 127), 32767),  # 64770 does not fit
        ((255, 255), (-128, -128), -32768),  # nor does -65280
        ((255, 255), (127, -127), 0),  # the sum saturates, not the products
        ((255, 255), (64, 64), 32640),  # the largest equal pair that fits
        ((255, 255), (65, 64), 32767),  # 32895 is the next one
        ((200, 3), (-100, 7), -19979),
        ((255, 0), (-128, -128), -32640),  # one product alone always fits
    ],
)
def test_the_emulation_follows_the_published_semantics(activations, weights, expected):
    assert vpmaddubsw(np.array(activations), np.array(weights)).tolist() == [expected]


def test_the_emulation_matches_the_manual_written_out_byte_by_byte():
    generator = np.random.default_rng(3)
    activations = generator.integers(0, 256, size=(200, 16))
    weights = generator.integers(-128, 128, size=(200, 16))
    for row in range(200):
        total = 0
        for dword in range(4):
            words = []
            for word in (2 * dword, 2 * dword + 1):
                low = int(activations[row, 2 * word]) * int(weights[row, 2 * word])
                high = int(activations[row, 2 * word + 1]) * int(weights[row, 2 * word + 1])
                words.append(max(-0x8000, min(0x7FFF, high + low)))
            total += words[0] * 1 + words[1] * 1
        assert avx2_dot(activations[row], weights[row]) == total


@pytest.mark.parametrize(("bits", "fits"), [(7, True), (8, False)])
def test_every_pair_of_products_of_seven_bit_weights_fits_sixteen_bits(bits, fits):
    """Exhaustive: every activation times every weight, and every sum of two such products."""
    limit = Scheme("uint8", bits).weight_limit
    products = np.unique(np.multiply.outer(np.arange(256), np.arange(-limit, limit + 1)))
    saturates = 0
    for chunk in np.array_split(products.astype(np.int32), 64):
        sums = chunk[:, None] + products.astype(np.int32)
        saturates += int(np.count_nonzero((sums > 32767) | (sums < -32768)))
    assert (saturates == 0) is fits
    assert (2 * _BRIGHT * limit < 2**15) is fits


@pytest.mark.parametrize(("bits", "same"), [(7, True), (8, False)])
def test_a_convolution_is_exact_with_seven_bits_and_wrong_with_eight(bits, same):
    matrix = columns(integers(_smoothing_filters(), bits))
    rows = patches(_bright_images(4), 3)
    exact, emulated = rows @ matrix, avx2_matmul(rows, matrix)
    assert np.array_equal(exact, emulated) is same
    if not same:  # not a rounding: a visible share of the signal
        assert np.abs(exact - emulated).max() > 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(("bits", "same"), [(7, True), (8, False)])
def test_a_gemm_is_exact_with_seven_bits_and_wrong_with_eight(bits, same):
    generator = np.random.default_rng(4)
    matrix = integers(generator.normal(size=(10, 30)), bits).T  # 30: the last group of four is padded
    rows = generator.integers(0, 256, size=(50, 30))
    assert np.array_equal(rows @ matrix, avx2_matmul(rows, matrix)) is same


def test_the_worst_case_at_every_length_is_exact_with_seven_bits():
    limit = Scheme("uint8", 7).weight_limit
    for length in (1, 2, 3, 4, 5, 63, 64, 1000):
        for sign in (1, -1):
            weights = np.full(length, sign * limit)
            assert avx2_dot(np.full(length, _BRIGHT), weights) == sign * limit * _BRIGHT * length


# ONNX Runtime itself, on a CPU without VNNI.

_RUN = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
folder = sys.argv[1]
names = sys.argv[2:]
outputs = {}
for name in names:
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", options, providers=["CPUExecutionProvider"])
    outputs[name] = session.run(None, {"x": np.load(f"{folder}/{name}.npy")})[0]
np.savez(f"{folder}/outputs.npz", **outputs)
"""


def _qemu() -> str:
    """qemu-x86_64 with AVX2 (7.2 or newer), or a skip that says why."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("runs this interpreter under qemu-x86_64, so it must be an x86-64 Linux one")
    found = shutil.which("qemu-x86_64")
    if found is None:
        pytest.skip("qemu-x86_64 is not installed (Debian and Ubuntu: apt-get install qemu-user)")
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\d+)\.(\d+)", text)
    if version is None or (int(version[1]), int(version[2])) < (7, 2):
        pytest.skip(f"qemu emulates AVX2 from 7.2 on; this is: {text.splitlines()[0]}")
    return found


def _save(
    folder: Path, name: str, node: onnx.NodeProto, images: Ints, constants: dict[str, NDArray], output: int
) -> None:
    shape = ["n", *images.shape[1:]]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / f"{name}.onnx"))
    np.save(folder / f"{name}.npy", images.astype(np.uint8))


def _save_convolution(folder: Path, name: str, weights: Ints, images: Ints, scale: float, group: int = 1) -> None:
    """A QLinearConv whose output is round(sum / scale) + 128."""
    inputs = ["x", "one", "zero", "w", "ones", "zeros", "scale", "middle"]
    node = helper.make_node("QLinearConv", inputs, ["y"], kernel_shape=list(weights.shape[2:]), group=group)
    constants = {
        "one": np.array(1, np.float32),
        "zero": np.array(0, np.uint8),
        "w": weights.astype(np.int8),
        "ones": np.ones(len(weights), np.float32),
        "zeros": np.zeros(len(weights), np.int8),
        "scale": np.array(scale, np.float32),
        "middle": np.array(128, np.uint8),
    }
    _save(folder, name, node, images, constants, TensorProto.UINT8)


def _requantized(sums: Ints, scale: float) -> Ints:
    return np.clip(np.rint(sums / scale) + 128, 0, 255).astype(np.int64)


@pytest.mark.slow
def test_onnxruntime_without_vnni_saturates_with_eight_bits_and_is_exact_with_seven(tmp_path):
    """Real kernels, bit for bit: they equal the emulation with 8-bit weights, and exact arithmetic with 7-bit ones.

    Depthwise convolutions have a kernel of their own that widens first: they are exact with 8 bits too.
    """
    qemu = _qemu()
    generator = np.random.default_rng(5)
    rows = generator.integers(100, 256, size=(9, 30))
    matrix = {bits: integers(generator.normal(size=(10, 30)), bits).T for bits in (7, 8)}
    images, filters = _bright_images(4), {bits: integers(_smoothing_filters(), bits) for bits in (7, 8)}
    taps = patches(images, 3)
    sums = {bits: taps @ columns(filters[bits]) for bits in (7, 8)}
    scale = {bits: float(np.abs(sums[bits]).max() / 127) for bits in (7, 8)}
    smooth = integers(np.abs(generator.normal(size=(4, 1, 3, 3))) + 1, 8)
    deep = np.stack([patches(images[:, [c]], 3) @ columns(smooth[[c]])[:, 0] for c in range(4)], axis=1)
    deep_scale = float(np.abs(deep).max() / 127)
    for bits in (7, 8):
        node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
        constants = {"w": matrix[bits].astype(np.int8)}
        _save(tmp_path, f"matmul{bits}", node, rows, constants, TensorProto.INT32)
        _save_convolution(tmp_path, f"conv{bits}", filters[bits], images, scale[bits])
    _save_convolution(tmp_path, "depthwise8", smooth, images, deep_scale, group=4)
    names = ["matmul7", "matmul8", "conv7", "conv8", "depthwise8"]
    # -cpu Haswell: AVX2 and FMA, no AVX-512 and no VNNI.
    done = subprocess.run(
        [qemu, "-cpu", "Haswell", sys.executable, "-c", _RUN, str(tmp_path), *names],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "outputs.npz") as outputs:
        got = {name: outputs[name].astype(np.int64) for name in names}
    flat = {
        name: array.transpose(0, 2, 3, 1).reshape(-1, array.shape[1]) for name, array in got.items() if array.ndim == 4
    }

    assert np.array_equal(got["matmul7"], rows @ matrix[7])
    assert np.array_equal(got["matmul8"], avx2_matmul(rows, matrix[8]))
    assert not np.array_equal(got["matmul8"], rows @ matrix[8])

    # The kernel scales in float32, so a tie may fall either way: one step.
    assert np.abs(flat["conv7"] - _requantized(sums[7], scale[7])).max() <= 1
    emulated = avx2_matmul(taps, columns(filters[8]))
    assert np.abs(flat["conv8"] - _requantized(emulated, scale[8])).max() <= 1
    assert np.abs(flat["conv8"] - _requantized(sums[8], scale[8])).max() > 10
    assert np.abs(flat["depthwise8"] - _requantized(deep, deep_scale)).max() <= 1

    # The same 7-bit file on the CPU at hand, whatever it is.
    here = open_session(tmp_path / "conv7.onnx").run(None, {"x": images.astype(np.uint8)})[0].astype(np.int64)
    assert np.abs(here - got["conv7"]).max() <= 1
