"""Dice losses against their definition in scalars, MONAI and scikit-learn's F1; biases worked by hand."""

import math

import pytest
import torch
from sklearn.metrics import f1_score

from lossary.losses import _blocks, batch_dice_loss, sample_dice_loss, simpsons_bias

# Eight rows of three logits, without a pattern that a wrong index could survive.
Z = torch.sin(torch.arange(24, dtype=torch.float64) ** 2).view(8, 3) * 2
Y = torch.tensor([0, 2, 2, 0, 2, 0, 0, 2])  # class 1 does not occur


def probabilities() -> list[list[float]]:
    rows = [[math.exp(z) for z in row] for row in Z.tolist()]
    return [[e / sum(row) for e in row] for row in rows]


def dice(p: list[float], y: list[int], s: float) -> float:
    """1 - (2 sum p y + s) / (sum p^2 + sum y^2 + s), over whatever is listed."""
    return 1 - (2 * sum(a * b for a, b in zip(p, y)) + s) / (sum(a * a for a in p) + sum(b * b for b in y) + s)


@pytest.mark.parametrize("s", [1e-3, 1.0, 7.0])
def test_sample_dice_is_the_ratio_of_each_sample_and_class(s):
    rows = zip(probabilities(), Y.tolist())
    expected = [sum(dice([p], [int(k == y)], s) for k, p in enumerate(row)) / 3 for row, y in rows]
    assert sample_dice_loss(Z, Y, smooth=s).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("s", [1e-3, 1.0, 7.0])
def test_batch_dice_is_the_ratio_of_sums_over_the_batch(s):
    columns = zip(*probabilities())
    expected = sum(dice(p, [int(y == k) for y in Y.tolist()], s) for k, p in enumerate(columns)) / 3
    assert batch_dice_loss(Z, Y, smooth=s).mean().item() == pytest.approx(expected, abs=1e-12)
    assert batch_dice_loss(Z.view(4, 2, 3), Y.view(4, 2), smooth=s).mean().item() == pytest.approx(expected, abs=1e-12)


def test_batch_dice_is_what_monai_computes():
    # monai 1.6.1: DiceLoss(batch=True, softmax=True, to_onehot_y=True, squared_pred=True, smooth_nr=s, smooth_dr=s)
    expected = {0.5: 0.5746491812, 1.0: 0.4950543019}
    for s, value in expected.items():
        assert batch_dice_loss(Z, Y, smooth=s).mean().item() == pytest.approx(value, abs=1e-9)


def test_of_hard_predictions_batch_dice_is_one_minus_macro_f1():
    guess = Z.argmax(-1)
    value = batch_dice_loss(1e4 * torch.eye(3)[guess], Y, smooth=1e-9).mean().item()
    assert value == pytest.approx(1 - f1_score(Y, guess, average="macro"), abs=1e-6)


def test_a_batch_of_one_sample_is_that_sample():
    for z, y in zip(Z, Y):
        assert batch_dice_loss(z[None], y[None]).item() == pytest.approx(sample_dice_loss(z, y).item(), abs=1e-12)


def test_as_smoothing_vanishes_other_classes_cost_one_and_teach_nothing():
    z = Z.clone().requires_grad_()
    value = sample_dice_loss(z, Y, smooth=1e-15)
    p = torch.tensor(probabilities(), dtype=torch.float64)[torch.arange(8), Y]
    assert value.tolist() == pytest.approx(((2 + (1 - p) ** 2 / (p**2 + 1)) / 3).tolist(), abs=1e-9)
    (slope,) = torch.autograd.grad(value.sum(), z)
    # d/dp (1 - p)^2 / (1 + p^2) = -2 (1 - p^2) / (1 + p^2)^2, and dp/dz of the target's class is p (1 - p)
    expected = -2 * (1 - p**2) / (1 + p**2) ** 2 * p * (1 - p) / 3
    assert slope[torch.arange(8), Y].tolist() == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.parametrize("part", [sample_dice_loss, batch_dice_loss])
def test_derivatives_are_right_and_blocks_do_not_show(part, monkeypatch):
    weights = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
    z = Z.clone().requires_grad_()
    whole = part(z, Y, smooth=0.3)
    (slope,) = torch.autograd.grad((weights * whole).sum(), z)
    few = Z[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: part(z, Y[:3], smooth=0.3), few)
    assert torch.autograd.gradgradcheck(lambda z: part(z, Y[:3], smooth=0.3), few)
    monkeypatch.setattr(_blocks, "CELLS", 9)  # blocks of three rows
    in_blocks = part(z, Y, smooth=0.3)
    assert torch.allclose(in_blocks, whole, rtol=1e-12)
    assert torch.allclose(torch.autograd.grad((weights * in_blocks).sum(), z)[0], slope, rtol=1e-12)


def test_a_mean_has_no_bias_even_where_parts_are_uneven():
    values = Z[:, 0]
    assert simpsons_bias(torch.mean, values, sizes=(1, 3, 5, 8)).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-15)


def test_smoothing_turns_the_sign_of_the_bias_at_one_sample():
    """Ten rows, one positive, p = 1/10 throughout: the sums are 9/10 over 11/10."""
    p, y = torch.full((10,), 0.1, dtype=torch.float64), torch.eye(10, dtype=torch.float64)[3]

    def at(s: float):
        return lambda p, y: ((p - y) ** 2).sum() / ((p**2 + y).sum() + s)

    smooth, rough = (simpsons_bias(at(0.0), p, y, sizes=(1,), surrogate=at(s)).item() for s in (1.0, 0.0))
    assert smooth == pytest.approx((9 * 0.01 / 1.01 + 0.81 / 2.01) / 10 - 9 / 11, abs=1e-12)
    assert rough == pytest.approx((9 + 0.81 / 1.01) / 10 - 9 / 11, abs=1e-12)
    assert smooth < 0 < rough


def test_mean_sentence_precision_is_not_corpus_precision():
    """Clipped word precision, BLEU's factor, of lists of sentences: 1/1 and 1/3 against (1 + 1) / (1 + 3)."""

    def precision(hypotheses: list[str], references: list[str]) -> float:
        pairs = [(h.split(), r.split()) for h, r in zip(hypotheses, references)]
        hits = sum(min(h.count(w), r.count(w)) for h, r in pairs for w in set(h))
        return hits / sum(len(h) for h, _ in pairs)

    bias = simpsons_bias(precision, ["yes", "no no never"], ["yes indeed", "no"], sizes=(1, 2))
    assert bias.tolist() == pytest.approx([(1 + 1 / 3) / 2 - 2 / 4, 0.0])


def test_refusals():
    for part in (sample_dice_loss, batch_dice_loss):
        with pytest.raises(ValueError, match="smooth: expected a number > 0"):
            part(Z, Y, smooth=0.0)
        with pytest.raises(ValueError, match="smooth: expected a number, got a tensor"):
            part(Z, Y, smooth=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"data: .* got lengths \[8, 3\]"):
        simpsons_bias(torch.mean, Z, Y[:3], sizes=(1,))
    with pytest.raises(ValueError, match=r"data: .* got lengths \[\]"):
        simpsons_bias(torch.mean, sizes=(1,))
    with pytest.raises(ValueError, match="sizes: expected a whole number >= 1 and <= 8, got 9"):
        simpsons_bias(torch.mean, Z, sizes=(9,))
