"""Asymmetric loss against its formula in scalars, the official code, torch's own losses and finite differences."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lossary.losses import AdaptiveAsymmetricLoss, _blocks, asymmetric_loss, asymmetric_loss_single_label

# Six samples of four logits, without a pattern that a wrong index could survive.
Z = 3 * torch.sin(torch.arange(24, dtype=torch.float64) ** 2).view(6, 4)
Y = (torch.cos(torch.arange(24, dtype=torch.float64) * 1.7) > 0.4).double().view(6, 4)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


def term(z: float, y: float, gamma_neg: float, gamma_pos: float, m: float) -> float:
    p = 1 / (1 + math.exp(-z))
    if y:
        return -((1 - p) ** gamma_pos) * math.log(p)
    q = max(p - m, 0.0)
    return -(q**gamma_neg) * math.log(1 - q)


@pytest.mark.parametrize(
    ("gamma_neg", "gamma_pos", "clip"), [(4.0, 0.0, 0.05), (4.0, 1.0, 0.05), (2.5, 1.5, 0.3), (0.0, 0.0, 0.2)]
)
def test_every_label_adds_its_term(gamma_neg, gamma_pos, clip):
    rows = zip(Z.tolist(), Y.tolist())
    expected = [sum(term(*zy, gamma_neg, gamma_pos, clip) for zy in zip(*row)) for row in rows]
    value = asymmetric_loss(Z, Y, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip)
    assert value.tolist() == pytest.approx(expected, abs=1e-12)


def test_it_is_what_the_official_code_computes():
    # Alibaba-MIIL/ASL, src/loss_functions/losses.py: AsymmetricLoss(4, 1, 0.05) and ASLSingleLabel(1, 4, 0.1), which
    # takes the mean over samples
    assert asymmetric_loss(Z, Y, gamma_pos=1.0).sum().item() == pytest.approx(13.915211998659, abs=1e-6)
    value = asymmetric_loss_single_label(Z, LABELS, gamma_pos=1.0).mean().item()
    assert value == pytest.approx(3.7004180802757, abs=1e-9)


def test_gammas_and_margin_of_zero_leave_cross_entropy():
    plain = asymmetric_loss(Z, Y, gamma_neg=0.0, clip=0.0)
    assert torch.allclose(plain, F.binary_cross_entropy_with_logits(Z, Y, reduction="none").sum(-1), rtol=1e-12)
    smoothed = asymmetric_loss_single_label(Z, LABELS, gamma_neg=0.0, label_smoothing=0.3)
    expected = F.cross_entropy(Z, LABELS, reduction="none", label_smoothing=0.3)
    assert torch.allclose(smoothed, expected, rtol=1e-12)


def test_hopeless_labels_keep_their_loss_in_single_precision():
    z, y = torch.tensor([[-20.0], [-1e4], [200.0], [1e4]]), torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    sure = 0.95**4 * math.log(20)
    assert asymmetric_loss(z, y).tolist() == pytest.approx([20.0, 1e4, sure, sure], rel=1e-6)


def test_below_the_margin_nothing_counts_and_doubtful_negatives_fade():
    p = torch.tensor([[0.001], [0.0499], [0.0501], [0.7], [1 - 1e-9]], dtype=torch.float64)
    z = p.logit().requires_grad_()
    value = asymmetric_loss(z, torch.zeros_like(z), gamma_neg=2.0)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert value[:2].tolist() == slope[:2, 0].tolist() == [0.0, 0.0]
    assert slope[2].item() > 0
    # at p = 1 - e the slope by z is about e (2 q log(1/m) + q^2 / m) with q = 1 - m
    assert slope[4].item() == pytest.approx(1e-9 * (2 * 0.95 * math.log(20) + 0.95**2 / 0.05), rel=1e-6)
    assert slope[3].item() > 1e6 * slope[4].item()


def test_a_detached_focus_leaves_the_value_and_scales_the_plain_slope():
    z = Z.clone().requires_grad_()
    value = asymmetric_loss(z, Y, gamma_neg=2.0, gamma_pos=1.0, clip=0.0, detach_focus=True)
    assert torch.allclose(value, asymmetric_loss(Z, Y, gamma_neg=2.0, gamma_pos=1.0, clip=0.0), rtol=1e-12)
    p = torch.sigmoid(Z)
    focus = torch.where(Y > 0.5, 1 - p, p**2)
    assert torch.allclose(torch.autograd.grad(value.sum(), z)[0], focus * (p - Y), rtol=1e-10)


def single_label(z: list[float], y: int, gamma_neg: float, gamma_pos: float, e: float) -> float:
    total = sum(math.exp(v) for v in z)
    p = [math.exp(v) / total for v in z]
    own = -(1 - e + e / len(z)) * (1 - p[y]) ** gamma_pos * math.log(p[y])
    return own - e / len(z) * sum(q**gamma_neg * math.log(q) for k, q in enumerate(p) if k != y)


@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "e"), [(4.0, 0.0, 0.1), (2.5, 1.5, 0.4), (4.0, 2.0, 0.0)])
def test_the_single_label_form(gamma_neg, gamma_pos, e, monkeypatch):
    hyper = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "label_smoothing": e}
    expected = [single_label(z, y, gamma_neg, gamma_pos, e) for z, y in zip(Z.tolist(), LABELS.tolist())]
    assert asymmetric_loss_single_label(Z, LABELS, **hyper).tolist() == pytest.approx(expected, abs=1e-12)
    z = Z.clone().requires_grad_()
    call = partial(asymmetric_loss_single_label, target=LABELS, **hyper)
    assert torch.autograd.gradcheck(call, z, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, z, fast_mode=True)
    (slope,) = torch.autograd.grad(call(z).sum(), z)
    assert torch.allclose(torch.autograd.grad(call(z).sum(), z, create_graph=True)[0], slope, rtol=1e-10)
    monkeypatch.setattr(_blocks, "CELLS", 8)  # two rows at a time
    in_blocks = call(z)
    assert in_blocks.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(torch.autograd.grad(in_blocks.sum(), z)[0], slope, rtol=1e-12)


def test_the_exponent_follows_the_gap():
    criterion = AdaptiveAsymmetricLoss(target_gap=0.2, step=0.5, gamma_neg=2.0)
    value = criterion(Z, Y)
    assert torch.allclose(value, asymmetric_loss(Z, Y, gamma_neg=2.0), rtol=1e-12)  # the one before it moves
    p = torch.sigmoid(Z)
    gap = p[Y == 1].mean() - (1 - p[Y == 0]).mean()
    assert criterion.gamma_neg.item() == pytest.approx(2.0 + 0.5 * (0.2 - gap.item()), abs=1e-6)

    stored = criterion.state_dict()
    resumed = AdaptiveAsymmetricLoss(target_gap=0.2, step=0.5)
    resumed.load_state_dict(stored)
    assert torch.equal(resumed(Z, Y), criterion(Z, Y))

    z, before = Z.clone().requires_grad_(), criterion.eval().gamma_neg.item()
    assert torch.autograd.gradcheck(lambda z: criterion(z, Y), z, fast_mode=True)
    assert criterion.gamma_neg.item() == before


@pytest.mark.parametrize("present", [0.0, 1.0])
def test_a_batch_of_one_kind_moves_no_exponent(present):
    criterion = AdaptiveAsymmetricLoss(gamma_neg=3.0, step=1.0)
    assert criterion(Z, torch.full_like(Z, present)).isfinite().all()
    assert criterion.gamma_neg.item() == 3.0


def test_the_exponent_stays_at_least_one():
    criterion = AdaptiveAsymmetricLoss(target_gap=-1.0, step=10.0, gamma_neg=1.5)
    criterion(Z, Y)
    assert criterion.gamma_neg.item() == 1.0


def test_in_training_the_gap_comes_to_its_target():
    """One logit for all positives and one for all negatives, a third of either kind mislabelled."""
    z = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    criterion = AdaptiveAsymmetricLoss(target_gap=0.1, step=0.1, clip=0.0)
    optimizer = torch.optim.SGD([z], lr=0.3)
    for _ in range(800):
        optimizer.zero_grad()
        criterion(z.expand(2, 3), y).sum().backward()
        optimizer.step()
    p = torch.sigmoid(z.detach().expand(2, 3))
    assert (p[y == 1].mean() - (1 - p[y == 0]).mean()).item() == pytest.approx(0.1, abs=1e-3)


def test_refusals():
    for name in ("gamma_neg", "gamma_pos"):
        with pytest.raises(ValueError, match=f"{name}: expected 0 or a number >= 1, got 0.5"):
            asymmetric_loss(Z, Y, **{name: 0.5})
        with pytest.raises(ValueError, match=f"{name}: expected a number, got a tensor"):
            asymmetric_loss_single_label(Z, LABELS, **{name: torch.tensor(2.0)})
    with pytest.raises(ValueError, match=r"clip: expected a number >= 0 and < 1, got 1\.0"):
        asymmetric_loss(Z, Y, clip=1.0)
    with pytest.raises(ValueError, match=r"gamma_neg: expected a number >= 1, got 0\.0"):
        AdaptiveAsymmetricLoss(gamma_neg=0.0)
    with pytest.raises(ValueError, match=r"target_gap: expected a number >= -1 and <= 1, got 2\.0"):
        AdaptiveAsymmetricLoss(target_gap=2.0)
