"""Building blocks against the textbook's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medray.models.layers import DropPath, InstanceNorm, MergeUp, initialise, replace_instance_norms, widths
from medray.models.transformer import (
    PatchExpanding,
    PatchMerging,
    WindowBlock,
    _join,
    _relative_index,
    _shift_mask,
    _windows,
)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instance_norm_is_the_same_in_every_layout(ndim: int, channels_last: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = InstanceNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 + 2 * torch.randn(2, 6, *(8, 10, 12)[:ndim])).to(dtype)
    reference = x.float().clone().requires_grad_()
    wanted = F.instance_norm(reference, weight=norm.weight, bias=norm.bias)
    gradient = torch.randn_like(wanted)
    wanted.backward(gradient)
    wanted_weight, wanted_bias = norm.weight.grad.clone(), norm.bias.grad.clone()
    norm.zero_grad()

    if channels_last:
        x = x.to(memory_format=torch.channels_last if ndim == 2 else torch.channels_last_3d)
    x.requires_grad_()
    got = norm(x)
    assert got.dtype == dtype
    assert got.stride() == x.stride()
    got.backward(gradient.to(dtype))
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(got.float(), wanted, **tolerance)
    torch.testing.assert_close(x.grad.float(), reference.grad, **tolerance)
    torch.testing.assert_close(norm.weight.grad, wanted_weight, atol=20 * tolerance["atol"], rtol=tolerance["rtol"])
    torch.testing.assert_close(norm.bias.grad, wanted_bias, atol=20 * tolerance["atol"], rtol=tolerance["rtol"])
    with torch.no_grad():
        torch.testing.assert_close(norm(x).float(), wanted, **tolerance)


@pytest.mark.parametrize("ndim", [2, 3])
def test_merge_up_can_be_the_textbook_s_decoder(ndim: int) -> None:
    """Upsample by a kernel of 2, concatenate, convolve: what MergeUp computes for the composed kernel."""
    torch.manual_seed(0)
    transposed, convolve = (F.conv_transpose2d, F.conv2d) if ndim == 2 else (F.conv_transpose3d, F.conv3d)
    up = torch.randn(5, 4, *(2,) * ndim)
    kernel = torch.randn(3, 4 + 2, *(3,) * ndim)
    x, skip = torch.randn(2, 5, *(4, 5, 3)[:ndim]), torch.randn(2, 2, *(8, 10, 6)[:ndim])
    wanted = convolve(torch.cat([transposed(x, up, stride=2), skip], dim=1), kernel, padding=1)

    merge = MergeUp(ndim, 5, 2, 3)
    with torch.no_grad():
        # What one input voxel does to the output: the small kernels, one after the other.
        merge.up.weight.copy_(convolve(up, kernel[:, :4], padding=2))
        merge.skip.weight.copy_(kernel[:, 4:])
        got = merge.up(x) + merge.skip(skip)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_initialisation_keeps_the_variance_through_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    merge = MergeUp(2, 64, 64, 64)
    initialise(merge)
    x = torch.randn(2, 64, 16, 16)
    skip = torch.randn(2, 64, 32, 32)
    up, side = merge.up(x)[..., 2:-2, 2:-2].var(), merge.skip(skip)[..., 2:-2, 2:-2].var()
    assert 0.8 < up / side < 1.25


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 2)
    y = DropPath(0.25).train()(x)
    assert y[:, 0, 0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y[:, 0, 0], y[:, 1, 1])
    assert y.mean().item() == pytest.approx(1, abs=0.05)


def test_a_vendor_s_norms_are_replaced_under_the_same_names() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.InstanceNorm2d(4, affine=True)), nn.InstanceNorm2d(4))
    before = set(net.state_dict())
    replace_instance_norms(net)
    assert isinstance(net[1][0], InstanceNorm)
    assert isinstance(net[2], nn.InstanceNorm2d)
    assert set(net.state_dict()) == before


def test_widths_double_up_to_a_cap() -> None:
    assert widths(32, 6, 3) == [32, 64, 128, 256, 320, 320]
    assert widths(32, 6, 2) == [32, 64, 128, 256, 512, 512]
    assert widths(512, 2, 3) == [512, 512]


@pytest.mark.parametrize(("grid", "window"), [((6, 4), (3, 2)), ((4, 6, 2), (2, 3, 2))])
def test_windows_are_cut_and_joined(grid: tuple[int, ...], window: tuple[int, ...]) -> None:
    x = torch.arange(2 * 3 * torch.Size(grid).numel()).view(2, *grid, 3)
    cut = _windows(x, window)
    corner = x[(slice(None), *(slice(0, w) for w in window))]
    assert torch.equal(cut[:, 0], corner.flatten(1, -2))
    assert torch.equal(_join(cut, grid, window), x)


def test_relative_positions() -> None:
    """The bias of a pair depends on its offset alone, and every offset has a row of its own."""
    index = _relative_index((3, 2), 3).reshape(6, 6)
    places = [(r, c) for r in range(3) for c in range(2)]
    rows: dict[tuple[int, int], int] = {}
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            offset = (a[0] - b[0], a[1] - b[1])
            assert rows.setdefault(offset, index[i, j]) == index[i, j]
    assert len(set(rows.values())) == len(rows)
    assert index.min() >= 0
    assert index.max() < 25


def test_the_shift_mask_parts_what_the_roll_brought_together() -> None:
    mask = _shift_mask((4,), (2,), (1,))[:, 0]
    assert (mask[0] == 0).all()  # places 1, 2: neighbours
    assert (mask[1] < 0).tolist() == [[False, True], [True, False]]  # places 3, 0: opposite ends


def test_shifted_windows_do_not_leak_around_the_border() -> None:
    """Far ends share a window after the roll: a change at one end must not reach the other."""
    torch.manual_seed(0)
    block = WindowBlock(2, 8, 2, window=4, shifted=True, dropout=0.0, drop_path=0.0).eval()
    x = torch.randn(1, 8, 8, 8)
    changed = x.clone()
    changed[:, 0, 0] += 5
    with torch.no_grad():
        difference = (block(changed) - block(x)).abs().sum(-1)[0]
    assert difference[0, 0] > 0
    assert difference[:2, :2].min() > 0
    assert difference[4:, :].max() == 0
    assert difference[:, 4:].max() == 0


@pytest.mark.parametrize("ndim", [2, 3])
def test_merging_halves_and_expanding_doubles(ndim: int) -> None:
    x = torch.randn(2, *(4, 6, 8)[:ndim], 4)
    merged = PatchMerging(ndim, 4)(x)
    assert merged.shape == (2, *(2, 3, 4)[:ndim], 8)
    expand = PatchExpanding(ndim, 8, 3, 2)
    assert expand(merged).shape == (2, *(4, 6, 8)[:ndim], 3)
    bumped = merged.clone()
    bumped[(0,) * (ndim + 1)] += 1
    changed = (expand(bumped) - expand(merged)).abs().sum(-1) > 1e-6
    assert changed[(slice(0, 1), *(slice(0, 2),) * ndim)].all()
    assert changed.sum() == 2**ndim
