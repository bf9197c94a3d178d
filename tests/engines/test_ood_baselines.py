"""The scores to beat against pytorch-ood 0.4.0, whose numbers on the same inputs are quoted, and small cases."""

import math

import pytest
import torch

from lossary.ood._baselines import VirtualLogit, energy, max_logit, max_softmax, neighbour_distance


def wave(rows, columns, frequency):
    return torch.sin(frequency * torch.arange(rows * columns, dtype=torch.float64).view(rows, columns) ** 1.5)


x, train = wave(4, 6, 0.7), wave(40, 6, 1.3)
weight, bias = wave(3, 6, 0.9), wave(1, 3, 2.1)[0]
logits = x @ weight.T + bias


# What pytorch-ood 0.4.0 prints for these inputs; its ViM computes in single precision.
@pytest.mark.parametrize(
    ("ours", "theirs", "atol"),
    [
        (lambda: max_softmax(logits), (-0.899783484758, -0.486690690894, -0.835718517483, -0.588763791422), 1e-10),
        (lambda: max_logit(logits), (-2.70822253069, -0.327861984463, -1.25023661489, -1.48449823806), 1e-10),
        (lambda: energy(logits), (-2.81382364778, -1.04798847378, -1.42970003906, -2.01422844707), 1e-10),
        (
            lambda: energy(logits, temperature=2.0),
            (-3.41643167151, -2.11847417146, -2.15556685752, -2.8697151127),
            1e-10,
        ),
        (
            lambda: neighbour_distance(x, train, k=5),
            (0.844703424368, 0.921928827459, 0.768972448743, 0.995785618199),
            1e-10,
        ),
        (
            lambda: VirtualLogit.of(train, weight, bias, dimension=2).anomaly_score(x),
            (-1.71247947216, -0.44352376461, -0.22198176384, -0.610808610916),
            1e-6,
        ),
    ],
    ids=["max softmax", "max logit", "energy", "energy at 2", "neighbours", "virtual logit"],
)
def test_scores_are_those_of_pytorch_ood(ours, theirs, atol):
    torch.testing.assert_close(ours(), torch.tensor(theirs, dtype=torch.float64), rtol=0.0, atol=atol)


def test_huge_logits_stay_finite():
    huge = torch.tensor([[1e4, -1e4, 0.0]])
    assert max_softmax(huge).item() == -1
    assert energy(huge).item() == -1e4
    large = (60 * logits).float()
    torch.testing.assert_close(max_softmax(large).double(), max_softmax(large.double()), rtol=1e-6, atol=0.0)


def test_neighbours_do_not_depend_on_the_cut(monkeypatch):
    expected = neighbour_distance(x, train, k=3)
    monkeypatch.setattr("lossary.ood._baselines.CHUNK", 80)  # two rows at a time
    torch.testing.assert_close(neighbour_distance(x, train, k=3), expected)
    assert neighbour_distance(train[:1], 7 * train, k=1).item() == pytest.approx(0, abs=1e-7)
    assert neighbour_distance(torch.zeros(1, 6), train.float(), k=1).item() == pytest.approx(1)


def test_virtual_logit_worked_by_hand():
    train = torch.tensor([[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 0.1], [0, 0, -0.1]])
    weight = torch.tensor([[1.0, 0, 0], [-1, 0, 0]])
    score = VirtualLogit.of(train, weight, torch.zeros(2), dimension=2)
    # Outside the first two axes rows measure 1/30 on average, the largest logit 2/3: the scale is 20.
    got = score.anomaly_score(torch.tensor([[0.0, 5.0, 0.3]]))
    torch.testing.assert_close(got, torch.tensor([20 * 0.3 - math.log(2)]))
    with pytest.raises(ValueError, match=r"dimension: .* no variance outside .* 2 dimensions"):
        VirtualLogit.of(train[:4], weight, torch.zeros(2), dimension=2)


def test_virtual_logit_keeps_its_digits_in_single_precision():
    """Where variances fall as 1 / k^2 and the mean is not 0; a fit in single precision is off by a tenth and more."""
    g = torch.Generator().manual_seed(0)
    size, kept = 256, 32
    spread = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    spread[kept:] /= 2
    axes = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q
    rows = (torch.randn(2000, size, generator=g, dtype=torch.float64) * spread) @ axes + 1
    weight = torch.randn(5, size, generator=g, dtype=torch.float64) / 16
    bias = torch.randn(5, generator=g, dtype=torch.float64)
    exact = VirtualLogit.of(rows, weight, bias, dimension=kept).anomaly_score(rows)
    single = VirtualLogit.of(rows.float(), weight.float(), bias.float(), dimension=kept).anomaly_score(rows.float())
    assert (single - exact).abs().max() < 1e-4 * exact.abs().max()


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"logits: expected 2 dimensions, got shape \(3,\)"):
        max_softmax(logits[:, 0][:3])
    with pytest.raises(ValueError, match=r"temperature: expected a number > 0, got 0"):
        energy(logits, temperature=0.0)
    with pytest.raises(ValueError, match=r"k: expected a whole number >= 1 and <= 40, got 41"):
        neighbour_distance(x, train, k=41)
    with pytest.raises(ValueError, match=r"dimension: expected a whole number >= 0 and <= 5, got 6"):
        VirtualLogit.of(train, weight, bias, dimension=6)
    with pytest.raises(ValueError, match=r"bias: expected shape \(3,\), got \(2,\)"):
        VirtualLogit.of(train, weight, bias[:2], dimension=2)
