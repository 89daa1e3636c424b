"""The runtime's own profile: where it says the time goes, and for which part of the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecompress.measure.kernel_times import Kernel, KernelTimes, by_module, by_operator, kernel_times
from onnx_models import quantized, residual_net

CPU = ("CPUExecutionProvider",)


@pytest.mark.parametrize("int8", [False, True])
def test_the_dearest_module_is_the_one_with_the_work(tmp_path: Path, int8: bool) -> None:
    path = residual_net(tmp_path / "net.onnx", 64, 32)
    if int8:
        path = quantized(path, tmp_path / "int8.onnx", size=32)
    times = kernel_times(path, threads=1, providers=CPU, input_npy=None, seconds=0.1)
    modules = {row["module"]: row for row in by_module(times)}
    # `stem` has 27 multiplications a pixel, `dw` 9; both times are a fused kernel's, named after the activation.
    assert {"stem", "dw", "head"} <= set(modules)
    assert modules["stem"]["ms"] > modules["head"]["ms"]
    convolution = "QLinearConv" if int8 else "Conv"
    assert any(convolution in operator for operator in modules["stem"]["operators"])
    operators = by_operator(times)
    total = sum(kernel.ms for kernel in times.kernels)
    for rows in (operators, list(modules.values())):
        assert sum(row["ms"] for row in rows) == pytest.approx(total)
        assert sum(row["share"] for row in rows) == pytest.approx(1.0)
        assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert total <= times.inference_ms * 1.5
    assert times.inferences >= 10


def test_beyond_the_dearest_the_rest_is_one_row() -> None:
    kernels = tuple(Kernel("Conv", None, name, name, ms, ms, 1) for name, ms in zip("abcd", (1, 4, 2, 3), strict=True))
    rows = by_module(KernelTimes(kernels, 10.0, 1), most=2)
    assert [(row["module"], row["ms"], row["modules"]) for row in rows] == [("b", 4, 1), ("d", 3, 1), (None, 3, 2)]
