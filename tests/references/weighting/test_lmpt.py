"""LMPT's losses against the official distribution-balanced loss, torch's hinge embedding loss, and numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from lossary.weighting import class_specific_embedding_loss, distribution_balanced_loss, lmpt

LOGITS = torch.tensor([[0.4, -1.0, 0.3, 2.0], [1.5, 0.2, -0.6, -2.0], [-0.3, 0.8, 1.1, 0.0]])
TARGET = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
COUNTS = (60, 20, 5, 1)

# ResampleLoss in wutong16/DistributionBalancedLoss (reweight_func "rebalance", focal, alpha 0.1, beta 10, init_bias
# 0.05) on these logits, among 100 samples, with its neg_scale and gamma of the mapping; mean over classes.
OFFICIAL = {(5.0, 0.3): [0.0437181, 0.0693054, 0.2047569], (2.0, 0.2): [0.0633154, 0.0758620, 0.2588511]}


@pytest.mark.parametrize("setting", OFFICIAL)
def test_distribution_balanced_loss_is_the_official_one(setting):
    scale, mu = setting
    values = distribution_balanced_loss(
        LOGITS, TARGET, class_counts=COUNTS, num_samples=100, mu=mu, negative_scale=scale
    )
    assert values.tolist() == pytest.approx(OFFICIAL[setting], abs=1e-6)


def test_without_weights_scale_and_bias_it_is_the_focal_loss():
    got = distribution_balanced_loss(
        LOGITS, TARGET, class_counts=COUNTS, num_samples=100, alpha=0.0, beta=0.0, negative_scale=1.0, bias=0.0, gamma=0
    )  # weights 2 (0 + sigmoid(0)) = 1
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(LOGITS, TARGET, reduction="none").mean(-1))


def test_a_sample_without_classes_has_the_largest_weight():
    settings = {"class_counts": COUNTS, "num_samples": 100, "alpha": 0.25}
    full, level = (distribution_balanced_loss(LOGITS[:1], torch.zeros(1, 4), **settings, beta=b) for b in (10.0, 0.0))
    assert (full / level).item() == pytest.approx((0.25 + 1) / (0.25 + 0.5))


def test_empty_and_full_classes_count_as_one_and_all_but_one():
    odd = distribution_balanced_loss(LOGITS, TARGET, class_counts=(100, 20, 5, 0), num_samples=100)
    torch.testing.assert_close(
        odd, distribution_balanced_loss(LOGITS, TARGET, class_counts=(99, 20, 5, 1), num_samples=100)
    )
    torch.testing.assert_close(
        class_specific_embedding_loss(LOGITS, TARGET, class_counts=(60, 20, 5, 0)),
        class_specific_embedding_loss(LOGITS, TARGET, class_counts=COUNTS),
    )


def test_with_equal_counts_the_embedding_loss_is_torchs_hinge():
    cosines = torch.tensor([[0.9, 0.95, -0.2, 0.7], [0.1, 0.85, 1.0, 0.75], [0.5, 0.5, 0.99, 0.81]])
    got = class_specific_embedding_loss(cosines, TARGET, class_counts=(7, 7, 7, 7))
    hinge = F.hinge_embedding_loss(1 - cosines, 2 * TARGET - 1, margin=0.2, reduction="none")
    torch.testing.assert_close(got, hinge.mean(-1) / 4)  # each weighs 1 / 4


def test_embedding_loss_by_hand():
    """Counts 16 and 1: margins 0.1 and 0.2, weights 16^-2 and 1 over their sum."""
    cosines = torch.tensor([[0.95, 0.7], [0.8, 0.9]], dtype=torch.float64)
    target = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    got = class_specific_embedding_loss(cosines, target, class_counts=(16, 1))
    rare = 1 / (1 + 1 / 256)
    expected = [((1 - rare) * 0.05 + rare * 0.3) / 2, ((1 - rare) * 0.2 + rare * 0.1) / 2]
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_tokens_are_compared_position_by_position():
    g = torch.Generator().manual_seed(0)
    tokens = torch.rand(3, 5, 4, generator=g)  # samples, positions, classes
    each = class_specific_embedding_loss(tokens, TARGET.unsqueeze(1).expand(3, 5, 4), class_counts=COUNTS)
    alone = [class_specific_embedding_loss(tokens[:, t], TARGET, class_counts=torch.tensor(COUNTS)) for t in range(5)]
    torch.testing.assert_close(each, torch.stack(alone, 1))


def test_exact_where_the_sigmoid_rounds_to_one():
    value = distribution_balanced_loss(
        torch.tensor([[-200.0, 0.0]]), torch.tensor([[1.0, 0.0]]), class_counts=(5, 5), num_samples=10, alpha=0.0
    )
    share = 1 / (1 + math.exp(-10 * (1 - 0.3)))  # the only class present: r = 1; counts of one half have no bias
    negative = share / 5 * 0.25 * math.log(2)
    assert value.item() == pytest.approx(2 * (share * 200 + negative) / 2, rel=1e-6)


def test_derivatives_blocks_and_maps(monkeypatch):
    input, target = LOGITS.double().requires_grad_(), TARGET.double()
    bias = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def values(z, bias=0.3):
        return distribution_balanced_loss(z, target, class_counts=COUNTS, num_samples=100, bias=bias)

    assert torch.autograd.gradcheck(values, (input, bias))
    assert torch.autograd.gradgradcheck(values, (input,))
    whole, (slope,) = values(input), torch.autograd.grad(values(input).sum(), input)
    monkeypatch.setattr(lmpt, "CELLS", 8)  # two rows at a time, the last one alone
    assert torch.equal(values(input), whole)
    assert torch.equal(torch.autograd.grad(values(input).sum(), input)[0], slope)
    mapped = torch.vmap(torch.func.grad(lambda z: values(z).sum()))(torch.stack([input.detach(), -input.detach()]))
    torch.testing.assert_close(mapped[0], slope)
    compiled = torch.compile(values, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), whole)


def test_refusals():
    with pytest.raises(ValueError, match="alpha: expected a number, got a tensor"):
        distribution_balanced_loss(LOGITS, TARGET, class_counts=COUNTS, num_samples=9, alpha=torch.tensor(0.1))
    with pytest.raises(ValueError, match="gamma: expected 0 or a number >= 1"):
        distribution_balanced_loss(LOGITS, TARGET, class_counts=COUNTS, num_samples=9, gamma=0.5)
    with pytest.raises(ValueError, match=r"class_counts: expected 4 counts, one for each class, got shape \(3,\)"):
        class_specific_embedding_loss(LOGITS, TARGET, class_counts=(3, 2, 1))
    with pytest.raises(ValueError, match="class_counts: expected a number >= 0, got -1"):
        distribution_balanced_loss(LOGITS, TARGET, class_counts=(3, 2, 1, -1), num_samples=9)
    with pytest.raises(ValueError, match="num_samples: expected a whole number >= 2, got 1"):
        distribution_balanced_loss(LOGITS, TARGET, class_counts=COUNTS, num_samples=1)
    with pytest.raises(ValueError, match="negative_scale: expected a number > 0, got 0"):
        distribution_balanced_loss(LOGITS, TARGET, class_counts=COUNTS, num_samples=9, negative_scale=0)
