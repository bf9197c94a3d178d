"""Scores, segmentation and the query-distribution loss, pixel by pixel in plain numbers; volumes like images."""

import math

import pytest
import torch
import torch.nn.functional as F

from lossary.ood import cluster_segmentation, maxquery_score, query_distribution_loss

SIZES = (2, 1, 3)


def drawn(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(affinity):
    """Every pixel's affinities to the queries, as lists."""
    return affinity.flatten(2).movedim(1, 2).flatten(0, 1).tolist()


@pytest.mark.parametrize("space", [(5,), (4, 3), (2, 3, 2)])
def test_the_score_is_minus_the_largest_inner_product(space):
    queries, features = drawn(2, 6, 8), drawn(2, 8, *space, seed=1)
    affinity = torch.einsum("bnd,bd...->bn...", queries, features)
    got = maxquery_score(affinity)
    assert got.shape == (2, *space)
    flat = features.flatten(2)
    for image in range(2):
        for p, value in enumerate(got[image].flatten().tolist()):
            products = [
                sum(q * f for q, f in zip(query, flat[image, :, p].tolist())) for query in queries[image].tolist()
            ]
            assert value == pytest.approx(-max(products), abs=1e-12)


def test_with_queries_of_one_length_it_ranks_by_distance_to_the_nearest():
    """-max <f, q> for unit f and q is half the smallest squared distance, less one: far from every centre is high."""
    queries, features = F.normalize(drawn(1, 6, 8), dim=2), F.normalize(drawn(1, 8, 50, seed=1), dim=1)
    nearest = torch.cdist(features.mT, queries).amin(2).square() / 2 - 1
    torch.testing.assert_close(maxquery_score(queries @ features), nearest)


@pytest.mark.parametrize("space", [(5,), (4, 3), (2, 3, 2)])
def test_segmentation_shares_out_the_queries_classes(space):
    affinity, classes = drawn(2, 6, *space), drawn(2, 6, 3, seed=1)
    got = cluster_segmentation(affinity, classes)
    assert got.shape == (2, 3, *space)
    count = math.prod(space)
    for i, (values, shares) in enumerate(zip(pixels(got), pixels(affinity))):
        weights = [math.exp(s) for s in shares]
        logits = [sum(w * c[k] for w, c in zip(weights, classes[i // count].tolist())) / sum(weights) for k in range(3)]
        assert values == pytest.approx(logits, abs=1e-12)


@pytest.mark.parametrize("space", [(5,), (4, 3), (2, 3, 2)])
def test_the_loss_is_minus_the_logarithm_of_the_groups_mass(space):
    affinity = drawn(2, 6, *space)
    target = torch.randint(3, (2, *space), generator=torch.Generator().manual_seed(1))
    got = query_distribution_loss(affinity, target, sizes=SIZES)
    assert got.shape == target.shape
    starts = [0, 2, 3, 6]
    for value, values, g in zip(got.flatten().tolist(), pixels(affinity), target.flatten().tolist()):
        mass = [math.exp(s) for s in values]
        assert value == pytest.approx(-math.log(sum(mass[starts[g] : starts[g + 1]]) / sum(mass)), abs=1e-12)


def test_with_one_query_a_group_it_is_cross_entropy():
    affinity, target = drawn(2, 4, 3, 3), torch.arange(18).view(2, 3, 3) % 4
    got = query_distribution_loss(affinity, target, sizes=(1, 1, 1, 1))
    torch.testing.assert_close(got, F.cross_entropy(affinity, target, reduction="none"))


def test_within_a_group_the_loss_moves_queries_in_proportion_to_their_mass():
    """Its gradient at query n is the softmax, less the softmax within the group where n is in the pixel's."""
    affinity, target = drawn(1, 6, 4).requires_grad_(), torch.tensor([[2, 0, 1, 2]])
    (gradient,) = torch.autograd.grad(query_distribution_loss(affinity, target, sizes=SIZES).sum(), affinity)
    share = affinity.detach().softmax(1)
    inside = torch.tensor([0, 0, 1, 2, 2, 2]).view(1, 6, 1) == target.unsqueeze(1)
    mine = share * inside
    torch.testing.assert_close(gradient, share - mine / mine.sum(1, keepdim=True))


def test_extreme_affinities_and_low_precision_are_finite():
    affinity = (1e4 * drawn(1, 6, 4, 4).sign()).float().requires_grad_()
    target = torch.arange(16).view(1, 4, 4) % 3
    value = query_distribution_loss(affinity, target, sizes=SIZES)
    (gradient,) = torch.autograd.grad(value.sum(), affinity)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    low = query_distribution_loss(drawn(1, 6, 4, 4).bfloat16(), target, sizes=SIZES)
    assert low.dtype is torch.bfloat16
    assert low.isfinite().all()


def test_training_with_it_gives_every_group_its_queries():
    """Free queries on pixels of two kinds, one of them rare: afterwards a pixel's group holds nearly all its mass."""
    target = (torch.arange(100) % 20 == 0).long().unsqueeze(0)
    features = torch.stack([torch.ones(100), 2.0 * target[0] - 1]).unsqueeze(0)
    queries = torch.zeros(1, 4, 2, requires_grad=True)
    for _ in range(60):
        loss = query_distribution_loss(queries @ features, target, sizes=(2, 2)).mean()
        (slope,) = torch.autograd.grad(loss, queries)
        queries = (queries - 4.0 * slope).detach().requires_grad_()
    mass = (queries @ features).softmax(1).detach()
    assert mass[0, 2:, target[0] == 1].sum(0).min() > 0.9
    assert mass[0, :2, target[0] == 0].sum(0).min() > 0.9


def test_refusals_name_the_argument():
    affinity, target = drawn(2, 6, 4), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"affinity: expected at least 3 dimensions, got shape \(6, 4\)"):
        maxquery_score(affinity[0])
    with pytest.raises(ValueError, match=r"query_logits: expected \(2, 6, classes\), got shape \(2, 5, 3\)"):
        cluster_segmentation(affinity, drawn(2, 5, 3))
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 4\), got \(2, 3\)"):
        query_distribution_loss(affinity, target[:, :3], sizes=SIZES)
    with pytest.raises(ValueError, match=r"target: expected an int64 tensor, got torch.float32"):
        query_distribution_loss(affinity, target.float(), sizes=SIZES)
    for sizes in ((2, 2), (6,), (6, 0), ()):
        with pytest.raises(ValueError, match=r"sizes: expected at least two whole numbers >= 1 that sum to 6, got"):
            query_distribution_loss(affinity, target, sizes=sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees():
    affinity, target = drawn(2, 6, 4), torch.arange(8).view(2, 4) % 3
    got = query_distribution_loss(affinity.cuda(), target.cuda(), sizes=SIZES)
    torch.testing.assert_close(got.cpu(), query_distribution_loss(affinity, target, sizes=SIZES))
