"""Dice against its definition in scalars and MONAI; segment scores against sed_eval and a case counted by hand."""

import math

import numpy as np
import pytest
import torch

from lossary.losses import dice_sed, multilabel_dice_loss, segment_based_f1_er

# Two clips of three frames with four labels, without a pattern that a wrong index could survive.
Z = 2 * torch.sin(torch.arange(24, dtype=torch.float64) ** 2).view(2, 3, 4)
Y = (torch.cos(torch.arange(24, dtype=torch.float64) * 1.7) > 0.4).double().view(2, 3, 4)


def dice(z: torch.Tensor, y: torch.Tensor, s: float, power: int) -> float:
    """1 - (2 sum p y + s) / (sum p + sum y + s), over whatever is given."""
    p, y = [1 / (1 + math.exp(-v)) for v in z.flatten().tolist()], y.flatten().tolist()
    lower = sum(v**power for v in p) + sum(v**power for v in y) + s
    return 1 - (2 * sum(a * b for a, b in zip(p, y)) + s) / lower


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("s", [0.01, 1.0])
@pytest.mark.parametrize("y", [Y, 0.1 + 0.7 * Y])
def test_the_mean_is_one_minus_the_ratio_of_sums(s, squared, y):
    power = 1 + squared

    def mean(**dims) -> float:
        return multilabel_dice_loss(Z, y, smooth=s, squared=squared, **dims).mean().item()

    clips = [dice(a, b, s, power) for a, b in zip(Z, y)]
    labels = [dice(Z[..., c], y[..., c], s, power) for c in range(4)]
    frames = [dice(a, b, s, power) for a, b in zip(Z.flatten(0, 1), y.flatten(0, 1))]
    assert mean() == pytest.approx(dice(Z, y, s, power), abs=1e-12)
    assert mean(dims=(1, 2)) == pytest.approx(np.mean(clips), abs=1e-12)
    assert mean(dims=(0, 1)) == pytest.approx(np.mean(labels), abs=1e-12)
    assert mean(dims=(-1,)) == pytest.approx(np.mean(frames), abs=1e-12)


def test_a_sample_owns_its_share_of_the_errors():
    p = torch.sigmoid(Z)
    shares = 6 * (p - Y).abs().sum(-1) / (p.sum() + Y.sum() + 1)
    assert torch.allclose(multilabel_dice_loss(Z, Y), shares, rtol=1e-12)


def test_it_is_what_monai_computes():
    # monai 1.6.1 on (batch, channel, space) = (2, 4, 3): DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1, ...)
    assert multilabel_dice_loss(Z, Y, dims=(0, 1)).mean().item() == pytest.approx(0.4932757564, abs=1e-9)
    value = multilabel_dice_loss(Z, Y, dims=(1,), squared=True).mean().item()
    assert value == pytest.approx(0.2939245696, abs=1e-9)


def test_frames_that_are_rightly_silent_change_nothing():
    silent = torch.full((2, 50, 4), -1e4, dtype=torch.float64)
    more = multilabel_dice_loss(torch.cat([Z, silent], 1), torch.cat([Y, torch.zeros_like(silent)], 1))
    assert more.mean().item() == pytest.approx(multilabel_dice_loss(Z, Y).mean().item(), abs=1e-12)


def test_without_positives_silence_is_perfect():
    z = Z.clone().requires_grad_()
    value = multilabel_dice_loss(z, torch.zeros_like(Y), smooth=0.5).mean()
    total = torch.sigmoid(Z).sum()
    assert value.item() == pytest.approx((total / (total + 0.5)).item(), abs=1e-12)
    (slope,) = torch.autograd.grad(value, z)
    expected = 0.5 / (total + 0.5) ** 2 * torch.sigmoid(Z) * torch.sigmoid(-Z)
    assert torch.allclose(slope, expected, rtol=1e-10)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dims", [None, (0,), (-1,), (0, 2)])
def test_derivatives_are_right_and_blocks_do_not_show(squared, dims, monkeypatch):
    weights, z = torch.linspace(0.5, 2, 6, dtype=torch.float64).view(2, 3), Z.clone().requires_grad_()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return multilabel_dice_loss(z, Y, smooth=0.3, squared=squared, dims=dims)

    assert torch.autograd.gradcheck(loss, z, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, z, fast_mode=True)
    whole = loss(z)
    (slope,) = torch.autograd.grad((weights * whole).sum(), z)
    monkeypatch.setattr(dice_sed, "CELLS", 12)  # one clip at a time
    in_blocks = loss(z)
    assert torch.allclose(in_blocks, whole, rtol=1e-12)
    assert torch.allclose(torch.autograd.grad((weights * in_blocks).sum(), z)[0], slope, rtol=1e-12)


def roll(step: float, level: float) -> torch.Tensor:
    """(1, 57, 4): class c is active in frame t where sin((t + 1) (c + step)) > level."""
    frame, label = np.arange(1, 58)[:, None], np.arange(4)
    return torch.from_numpy(np.sin(frame * (label + step)) > level).double().unsqueeze(0)


def test_segment_scores_are_those_of_sed_eval():
    # sed_eval 0.2.1, SegmentBasedMetrics(time_resolution=1.0) over three files of 5.7 seconds at ten frames a second:
    # 39 hits, 10 alarms, 5 misses; 1 substitution, 4 deletions, 9 insertions
    steps = (0.35, 0.8, 1.7)
    target = torch.cat([roll(0.31 * k, 0.9) for k in steps])
    score = 0.2 + 0.5 * torch.cat([roll(0.33 * k, 0.93) for k in steps])
    f1, error_rate = segment_based_f1_er(score, target)
    assert f1.item() == pytest.approx(0.8387096774193548, abs=1e-12)
    assert error_rate.item() == pytest.approx(0.31818181818181823, abs=1e-12)


def test_a_segment_in_which_everything_happens():
    """Misses 1, alarms 2 of hits 1: one substitution, one insertion, over two references."""
    target, score = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.tensor([[[0.9, 0.1, 0.9, 0.9]]])
    f1, error_rate = segment_based_f1_er(score, target, frames=1)
    assert (f1.item(), error_rate.item()) == pytest.approx((2 / 5, 2 / 2))


def test_a_score_at_the_threshold_is_no_detection():
    assert segment_based_f1_er(torch.full((1, 1, 1), 0.5), torch.ones(1, 1, 1))[0].item() == 0.0


def test_without_references_there_is_nothing_to_divide_by():
    silence, noise = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    assert all(value.isnan() for value in segment_based_f1_er(silence, silence))
    f1, error_rate = segment_based_f1_er(noise, silence)
    assert (f1.item(), error_rate.item()) == (0.0, math.inf)


def test_refusals():
    for dims in ((), (3,), (0, -3), [0], (0.0,)):
        with pytest.raises(ValueError, match="dims: expected different dimensions from -3 to 2"):
            multilabel_dice_loss(Z, Y, dims=dims)
    with pytest.raises(ValueError, match="smooth: expected a number > 0"):
        multilabel_dice_loss(Z, Y, smooth=0.0)
    with pytest.raises(ValueError, match="frames: expected a whole number >= 1"):
        segment_based_f1_er(Z, Y, frames=0)
