from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import nn

from edgecompress.models.nets import SMALL_NETS


def last_feature_sizes(net: nn.Module, size: int, channels: int = 3) -> list[int]:
    """Side of what each global pooling layer reads."""
    sides: list[int] = []
    for layer in net.modules():
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            layer.register_forward_hook(lambda _, inputs, __: sides.append(inputs[0].shape[-1]))
    net.eval()(torch.zeros(1, channels, size, size))
    return sides


@pytest.mark.parametrize("name", sorted(SMALL_NETS))
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_logits_and_feature_map_fit_the_input(name: str, channels: int, size: int) -> None:
    net = SMALL_NETS[name](7, channels, width=8, input_size=size).eval()
    assert net(torch.randn(2, channels, size, size)).shape == (2, 7)
    assert min(last_feature_sizes(net, size, channels)) >= 2


@pytest.mark.parametrize("size", range(4, 70, 3))
def test_the_feature_map_never_ends_as_one_pixel(size: int) -> None:
    for name in ("resnet8", "mobilenet_small", "student_cnn"):
        net = SMALL_NETS[name](2, 3, width=4, input_size=size)
        assert 2 <= min(last_feature_sizes(net, size)) <= (size + 1) // 2


@pytest.mark.parametrize(("name", "layers"), [("resnet8", 8), ("resnet20", 20), ("resnet32", 32), ("resnet56", 56)])
def test_depth_is_that_of_the_paper(name: str, layers: int) -> None:
    net = SMALL_NETS[name](10, 3)
    counted = [
        path for path, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in path
    ]
    assert len(counted) == layers


def test_resnet20_has_the_published_size() -> None:
    # Table 6 of the paper: 0.27 M parameters; the two 1 x 1 shortcuts of option B add 2,752.
    parameters = sum(p.numel() for p in SMALL_NETS["resnet20"](10, 3).parameters())
    assert parameters == 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "mobilenet_small", "student_cnn"])
def test_activations_keep_their_scale_at_initialisation(name: str) -> None:
    torch.manual_seed(0)
    net = SMALL_NETS[name](10, 3, input_size=16).train()
    logits = net(torch.randn(32, 3, 16, 16))
    assert 0.1 < float(logits.detach().std()) < 10.0


@pytest.mark.parametrize("name", sorted(SMALL_NETS))
def test_only_plain_modules_and_nothing_in_place(name: str) -> None:
    net = SMALL_NETS[name](10, 3)
    assert not any(getattr(module, "inplace", False) for module in net.modules())
    functions = [
        node for node in torch.fx.symbolic_trace(net).graph.nodes if node.op in ("call_function", "call_method")
    ]
    assert {node.target.__name__ for node in functions} <= {"add"}


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_small", "student_cnn"])
def test_a_removed_channel_acts_as_a_zeroed_one(name: str) -> None:
    torch.manual_seed(0)
    net = SMALL_NETS[name](5, 3, width=8, input_size=16).eval()
    example = torch.randn(4, 3, 16, 16)
    # A layer inside a block, whose channels end inside it: zeroing them is removing them.
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    layer = net.blocks[0].conv1 if name == "resnet8" else layers[1]
    graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=example)
    group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=[1, 3])
    with torch.no_grad():
        for dependency, indices in group:
            module = dependency.target.module
            if isinstance(module, nn.BatchNorm2d):
                module.weight[indices] = 0
                module.bias[indices] = 0
            elif isinstance(module, nn.Conv2d) and dependency.handler.__name__ == "prune_out_channels":
                module.weight[indices] = 0
        expected = net(example)
        before = sum(p.numel() for p in net.parameters())
        group.prune()
        assert sum(p.numel() for p in net.parameters()) < before
        torch.testing.assert_close(net(example), expected, atol=1e-5, rtol=1e-5)
