"""FlopCounterMode counts the layer as it counts the same convolution by F.conv2d."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nflows_kconv import InvertibleConv2d


def operations(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_both_directions_and_gradients_are_counted(groups: int, inverse: bool, bias: bool, device: str):
    layer = InvertibleConv2d(8, (3, 2), corners=("TL", "TR", "BL", "BR")[:groups], bias=bias).to(device)
    function = layer.inverse if inverse else layer
    input = torch.randn(5, 8, 7, 6, device=device, requires_grad=True)
    padded = torch.randn(5, 8, 9, 7, device=device, requires_grad=True)

    def ours(input: torch.Tensor) -> torch.Tensor:
        return function(input)[0]

    def theirs(input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(input, layer.weight, layer.bias, groups=groups)

    forward = 2 * 5 * 7 * 6 * layer.raw_weight.numel()
    with torch.no_grad():
        assert operations(lambda: ours(input)) == operations(lambda: theirs(padded)) == forward
    assert operations(lambda: ours(input).sum().backward()) == 3 * forward
    if groups == 1:  # torch counts the weight gradient of all pairs of channels, in whatever groups
        assert operations(lambda: theirs(padded).sum().backward()) == 3 * forward
    per_image = torch.func.vmap(lambda image: ours(image[None]))
    assert operations(lambda: per_image(input.detach())) == forward
