"""Classification helps regression against its official code's numbers, torch's cross-entropy and numpy's histograms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lossary.losses import RegressionWithClassificationLoss, imbalanced_regression_sampler, target_edges

LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.5, -0.5, 0.0, 1.0], [2.0, 0.0, -1.0, 0.25]])
INPUT, TARGET = torch.tensor([0.2, -1.0, 2.5]), torch.tensor([0.0, -0.5, 3.0])
EDGES = torch.tensor([-0.25, 1.0, 2.0])  # the targets lie in bins 1, 0 and 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mean_is_the_official_codes():
    """19.928066 by Reg_Cls.loss of SilviaLauraPintea/reg-cls, 1d/model.py, with labels 1, 0, 3 and weight 100."""
    loss = RegressionWithClassificationLoss(EDGES, lam=100.0)
    assert loss(INPUT, TARGET, class_logits=LOGITS).mean().item() == pytest.approx(19.928066, rel=1e-6)


@pytest.mark.parametrize("regression", ["mse", "l1"])
def test_per_sample_it_is_torchs_two_losses(regression):
    loss = RegressionWithClassificationLoss(EDGES, lam=3.0, regression=regression)
    error = {"mse": F.mse_loss, "l1": F.l1_loss}[regression](INPUT, TARGET, reduction="none")
    expected = 3 * error + F.cross_entropy(LOGITS, torch.tensor([1, 0, 3]), reduction="none")
    torch.testing.assert_close(loss(INPUT, TARGET, class_logits=LOGITS), expected)


def test_a_target_belongs_to_the_bin_that_numpy_says():
    """Edges are in the bin above; beyond the ends are the first and the last bin. Read off the loss at sharp logits."""
    target = torch.tensor([-9.0, -0.25, 0.99, 1.0, 2.0, 9.0, -0.26])
    loss = RegressionWithClassificationLoss(EDGES, lam=0.0)
    values = torch.stack([loss(target, target, class_logits=1e3 * F.one_hot(torch.full((7,), k), 4)) for k in range(4)])
    assert values.argmin(0).tolist() == np.digitize(target.numpy(), EDGES.numpy()).tolist() == [0, 1, 1, 2, 3, 3, 0]


def test_both_heads_and_lambda_get_their_gradients_and_a_stack_is_a_stack():
    lam = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    stack = [t.double().expand(2, *t.shape).clone().requires_grad_() for t in (INPUT, LOGITS)]
    target = TARGET.double().expand(2, 3)

    def call(input, logits, lam):
        return RegressionWithClassificationLoss(EDGES, lam=lam)(input, target, class_logits=logits)

    assert torch.autograd.gradcheck(call, (*stack, lam))
    one = RegressionWithClassificationLoss(EDGES, lam=2.0)(INPUT, TARGET, class_logits=LOGITS)
    torch.testing.assert_close(call(*stack, lam)[1].float(), one)
    half = RegressionWithClassificationLoss(EDGES)(
        *(t.bfloat16() for t in (INPUT, TARGET)), class_logits=LOGITS.bfloat16()
    )
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    assert list(RegressionWithClassificationLoss(EDGES).state_dict()) == ["edges"]


@pytest.mark.parametrize("num_bins", [2, 7, 64])
def test_edges_are_numpys(num_bins):
    y = torch.randn(500, generator=seeded(0), dtype=torch.float64).exp()
    width = np.histogram_bin_edges(y.numpy(), num_bins)[1:-1]
    np.testing.assert_allclose(target_edges(y, num_bins).numpy(), width, rtol=1e-12)
    quantiles = np.quantile(y.numpy(), np.arange(1, num_bins) / num_bins)
    np.testing.assert_allclose(target_edges(y, num_bins, equal="frequency").numpy(), quantiles, rtol=1e-12)


def test_bins_of_equal_frequency_merge_where_a_value_repeats():
    y = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0])
    assert target_edges(y, 4, equal="frequency").tolist() == [0.5, 1.0]
    assert target_edges(torch.tensor([0.0, 0.0, 0.0, 5.0]), 2, equal="frequency").tolist() == []


def test_without_a_peak_every_bin_that_is_not_empty_is_drawn_alike():
    y = torch.tensor([0.0, 0.1, 0.2, 0.26, 1.0], dtype=torch.float64)  # quarters with 3, 1, 0 and 1 of them
    weights = list(imbalanced_regression_sampler(y, num_bins=4, generator=seeded(0)).weights)
    assert weights == pytest.approx([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 3], abs=1e-12)


def test_peak_and_background_add_up():
    y = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    sampler = imbalanced_regression_sampler(y, spread=0.25, centre=0.5, background=0.3, num_bins=1, generator=seeded(0))
    assert list(sampler.weights) == pytest.approx([0.1, 0.8, 0.1], abs=1e-12)


def test_the_peak_has_its_share_evenly_within_its_reach():
    """Skewed targets on [0, 1]: nine tenths uniform on 0.7 +- 0.1, one tenth uniform on all."""
    y = torch.rand(200_000, generator=seeded(0), dtype=torch.float64) ** 3
    y = (y - y.min()) / (y.max() - y.min())
    sampler = imbalanced_regression_sampler(y, spread=0.1, centre=0.7, num_draws=50_000, generator=seeded(1))
    drawn = y[list(sampler)].numpy()
    share, _ = np.histogram(drawn, bins=[0, 0.2, 0.4, 0.6, 0.65, 0.7, 0.75, 0.8, 1.0])
    inside = 0.9 / 4 + 0.005
    np.testing.assert_allclose(share / 50_000, [0.02, 0.02, 0.02, inside, inside, inside, inside, 0.02], atol=0.006)


def test_the_generator_decides_centre_and_draws():
    y = torch.linspace(0, 1, 1000)
    first, second = (list(imbalanced_regression_sampler(y, spread=0.03, generator=seeded(4))) for _ in range(2))
    assert first == second
    assert len(first) == 1000
    other = list(imbalanced_regression_sampler(y, spread=0.03, generator=seeded(5)))
    assert abs(np.median(first) - np.median(other)) > 60  # positions are targets times 1000: another centre


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RegressionWithClassificationLoss(torch.ones(0)), "edges: expected at least one"),
        (lambda: RegressionWithClassificationLoss(EDGES, lam=-1.0), "lam: expected a number >= 0, got -1.0"),
        (
            lambda: RegressionWithClassificationLoss(EDGES, regression="huber"),
            "regression: expected one of 'mse', 'l1'",
        ),
        (
            lambda: RegressionWithClassificationLoss(EDGES)(INPUT, TARGET, class_logits=LOGITS[:, :3]),
            r"class_logits: expected shape \(3, 4\), got \(3, 3\)",
        ),
        (
            lambda: RegressionWithClassificationLoss(EDGES)(INPUT, TARGET[:2], class_logits=LOGITS),
            r"target: expected shape \(3,\), got \(2,\)",
        ),
        (lambda: target_edges(torch.ones(3), 4), "target: expected two different values at least"),
        (lambda: target_edges(torch.ones(0), 4), "target: expected two different values at least"),
        (lambda: target_edges(torch.tensor([0.0, math.nan]), 4), "target: expected two different values at least"),
        (lambda: target_edges(TARGET, 1), "num_bins: expected a whole number >= 2"),
        (
            lambda: imbalanced_regression_sampler(TARGET, generator=seeded(0), spread=0.0),
            "spread: expected a number > 0",
        ),
        (
            lambda: imbalanced_regression_sampler(TARGET, generator=seeded(0), spread=0.1, centre=9.0),
            "centre: expected a target within 0.35 of it, got 9 and none so near",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
