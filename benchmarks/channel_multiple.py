"""Which channel counts ONNX Runtime's convolutions like: is it worth going down to an odd multiple of 1, 2, 4 or 8?

    python benchmarks/channel_multiple.py
    python benchmarks/channel_multiple.py --low 16 --high 40 --side 28 --rounds 200

Times chains of equal convolutions (3 x 3, 1 x 1 and depthwise 3 x 3 between two 1 x 1), in fp32 and as QLinearConv with
uint8 activations and int8 weights per channel, for every channel count from `--low` to `--high`, one image, one thread,
all interleaved in one process. Prints the median of each, and for each step m what its odd multiples cost beside the
next multiple of 2 m above them: the mean ratio of their times. At 1 or above, those channels were cut for nothing; at
the mean ratio of their MACs (last columns), the kernels do not mind the count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from edgecompress.machine import describe_machine, summarize_machine, versions

# Kernel sizes of a chain; "d" is depthwise.
CHAINS: dict[str, Sequence[str]] = {"3x3": ["3"] * 4, "1x1": ["1"] * 8, "depthwise": ["1", "d", "1", "d", "1"]}
STEPS = (1, 2, 4, 8)
Key = tuple[str, str, int]


def build(chain: Sequence[str], channels: int, side: int, *, int8: bool) -> ModelProto:
    """A chain of convolutions with `channels` channels each, float or on integers throughout."""
    random = np.random.default_rng(0)
    kind = TensorProto.UINT8 if int8 else TensorProto.FLOAT
    initializers, nodes, current = [], [], "x"

    def constant(name: str, value: np.ndarray) -> str:  # type: ignore[type-arg]
        initializers.append(numpy_helper.from_array(value, name))
        return name

    scale, zero = constant("scale", np.float32(0.02).reshape(())), constant("zero", np.uint8(128).reshape(()))
    for index, layer in enumerate(chain):
        size, groups = (1, 1) if layer == "1" else (3, channels if layer == "d" else 1)
        shape = (channels, channels // groups, size, size)
        attributes = {"kernel_shape": [size, size], "pads": [size // 2] * 4, "group": groups}
        output = f"y{index}"
        if int8:
            weight = constant(f"w{index}", random.integers(-127, 128, shape).astype(np.int8))
            scales = constant(f"s{index}", np.full(channels, 0.01, np.float32))
            zeros = constant(f"z{index}", np.zeros(channels, np.int8))
            inputs = [current, scale, zero, weight, scales, zeros, scale, zero]
            nodes.append(helper.make_node("QLinearConv", inputs, [output], **attributes))
        else:
            weight = constant(f"w{index}", (random.normal(size=shape) / channels**0.5).astype(np.float32))
            nodes.append(helper.make_node("Conv", [current, weight], [output], **attributes))
        current = output
    shape = [1, channels, side, side]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(current, kind, shape)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def macs(chain: Sequence[str], channels: int) -> int:
    """Multiply-accumulates a position."""
    return sum({"1": channels, "3": 9 * channels, "d": 9}[layer] * channels for layer in chain)


def measure(keys: Sequence[Key], side: int, rounds: int) -> dict[Key, float]:
    """Median latency in ms by (chain, form, channels); every round runs each once."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions, feeds = {}, {}
    for chain, form, channels in keys:
        model = build(CHAINS[chain], channels, side, int8=form == "int8").SerializeToString()
        sessions[chain, form, channels] = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        values = np.random.default_rng(1).integers(0, 256, (1, channels, side, side))
        feeds[chain, form, channels] = {"x": values.astype(np.uint8 if form == "int8" else np.float32)}
    taken: dict[Key, list[float]] = {key: [] for key in keys}
    for _ in range(rounds):
        for key, session in sessions.items():
            session.run(None, feeds[key])  # its weights come back into the cache
            started = time.perf_counter()
            session.run(None, feeds[key])
            taken[key].append(1e3 * (time.perf_counter() - started))
    return {key: float(np.median(times)) for key, times in taken.items()}


def beside_next(medians: dict[Key, float], chain: str, form: str, step: int) -> tuple[float, float]:
    """Over the odd multiples of `step`: mean of (time, MACs) over those of the next multiple of twice the step."""
    counts = {channels for c, f, channels in medians if (c, f) == (chain, form)}
    ratios = []
    for count in sorted(counts):
        up = count + step
        if count % (2 * step) == step and up in counts:
            time_ratio = medians[chain, form, count] / medians[chain, form, up]
            ratios.append((time_ratio, macs(CHAINS[chain], count) / macs(CHAINS[chain], up)))
    times, shares = zip(*ratios, strict=True)
    return float(np.mean(times)), float(np.mean(shares))


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--low", type=int, default=48)
    parser.add_argument("--high", type=int, default=80)
    parser.add_argument("--side", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    forms = ("fp32", "int8")
    counts = range(arguments.low, arguments.high + 1)
    keys = [(chain, form, count) for chain in CHAINS for form in forms for count in counts]
    medians = measure(keys, arguments.side, arguments.rounds)
    console = Console(width=120)
    console.print(f"{summarize_machine(describe_machine())}, onnxruntime {versions()['onnxruntime']}, one thread")
    columns = [(chain, form) for chain in CHAINS for form in forms]
    table = Table("channels", *(f"{chain} {form} ms" for chain, form in columns))
    for count in counts:
        table.add_row(str(count), *(f"{medians[chain, form, count]:.3f}" for chain, form in columns))
    console.print(table)
    table = Table("odd multiples of", *(f"{chain} {form}" for chain, form in columns), "MACs, 3x3", "MACs, 1x1")
    for step in STEPS:
        found = {column: beside_next(medians, *column, step) for column in columns}
        shares = [found["3x3", "fp32"][1], found["1x1", "fp32"][1]]
        cells = [f"{found[column][0]:.2f}" for column in columns]
        table.add_row(str(step), *cells, *(f"{share:.2f}" for share in shares))
    console.print(table)


if __name__ == "__main__":
    main()
