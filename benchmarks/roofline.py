"""ResNet-50 in float and int8, whole and with half of its channels cut: speed, and the share of this machine's peak.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --model torchvision/resnet18 --seconds 60 --folder files

Weights are random and seeded (see int8_latency.py): enough for speed. Channels are cut by the package's own pruning,
half of each layer's, by the size of their weights. All four files run interleaved in the same fresh processes on one
thread, and the peaks are measured in processes of their own right after. `share of int8 peak` is the MACs a second that
a file reaches against the machine's own integer peak; for float files it is that of the float peak. `--folder` keeps
the files and uses those that are there already.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from int8_latency import create, images, write_onnx, write_ours
from rich.console import Console
from rich.table import Table
from torch import nn

from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.measure.measuring import measure_latency
from edgecompress.measure.roofline import measure_peaks
from edgecompress.pruning.prune import ChannelPruner
from edgecompress.settings.recipe import PruneStage
from edgecompress.settings.target import load_target

CHANNEL_RATIO = 0.5


def half(module: nn.Module) -> nn.Module:
    """The same network with half of the channels of every layer."""
    module = copy.deepcopy(module)
    stage = PruneStage.model_validate(
        {
            "kind": "prune",
            "id": "half",
            "channel_ratio": CHANNEL_RATIO,
            "scope": "layer",
            "steps": 1,
        }
    )
    pruner = ChannelPruner(module, stage=stage, channel_multiple=8, example=images(1, 0), scoring_batches=())
    scored = pruner.score()
    pruner.cut_to(pruner.plan(CHANNEL_RATIO, scored), scored)
    return module.eval()


def make_files(name: str, folder: Path, target_name: str) -> dict[str, Path]:
    """fp32, int8, and both of the pruned network; files that are there already stay."""
    files = {key: folder / f"{key}.onnx" for key in ("fp32", "int8", "pruned fp32", "pruned int8")}
    if not all(path.is_file() for path in files.values()):
        target, whole = load_target(target_name), create(name)
        for prefix, module in (("", whole), ("pruned ", half(whole))):
            write_onnx(module, files[f"{prefix}fp32"], target)
            write_ours(module, files[f"{prefix}int8"], target)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision/resnet50", metavar="LIBRARY/NAME")
    parser.add_argument("--seconds", type=float, default=90.0, help="time for the latencies")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="x86")
    parser.add_argument("--folder", type=Path, help="where files are kept; a temporary folder otherwise")
    parser.add_argument("--files-only", action="store_true", help="make the files and measure nothing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = make_files(arguments.model, folder, arguments.target)
        if arguments.files_only:
            return
        graphs = {name: inspect_integer_graph(path) for name, path in files.items()}
        providers = ("CPUExecutionProvider",)
        how = {"threads": arguments.threads, "providers": providers, "input_npy": None}
        measured = measure_latency(files, seconds=arguments.seconds, **how)
        peak = measure_peaks(threads=arguments.threads)["threads"][str(arguments.threads)]
    console = Console(width=150)
    table = Table(title=f"{arguments.model}, batch 1, {arguments.threads} thread(s), {measured.processes} processes")
    for column in (
        "",
        "GMACs",
        "median ms",
        "against fp32 [95 %]",
        "against whole [95 %]",
        "GMAC/s",
        "share of peak",
        "of convolution's peak",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for name, graph in graphs.items():
        kind = "int8" if name.endswith("int8") else "float"
        median = measured.percentile(name, 50)
        rate = graph.macs / median.value / 1e6
        ceiling = peak[f"{kind}_gmacs_per_s_by_kernel"]["convolution"]
        table.add_row(
            name,
            f"{graph.macs / 1e9:.2f}",
            f"{median.value:.2f} [{median.low:.2f}, {median.high:.2f}]",
            _ratio(measured, name.replace("int8", "fp32"), name),
            _ratio(measured, name.removeprefix("pruned "), name),
            f"{rate:.0f}",
            f"{rate / peak[f'{kind}_gmacs_per_s']:.0%} of {kind}",
            f"{rate / ceiling:.0%}",
        )
    console.print(table)
    console.print(
        f"peaks measured here: float {peak['float_gmacs_per_s']:.0f} GMAC/s, int8 {peak['int8_gmacs_per_s']:.0f} "
        f"(convolution alone: {peak['float_gmacs_per_s_by_kernel']['convolution']:.0f} and "
        f"{peak['int8_gmacs_per_s_by_kernel']['convolution']:.0f}), memory {peak['memory_gb_per_s']:.1f} GB/s"
    )
    console.print(f"stopped because {measured.stopped_because}; {measured.steady_processes} processes were steady")
    console.print(f"machine: {summarize_machine(describe_machine())}")
    console.print(f"versions: {versions()}")


def _ratio(measured, slower: str, faster: str) -> str:  # type: ignore[no-untyped-def]
    if slower == faster:
        return "-"
    ratio = measured.ratio(slower, faster)
    return f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


if __name__ == "__main__":
    main()
