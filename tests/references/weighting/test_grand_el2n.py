"""GraNd and EL2N against one gradient at a time, the closed form of a linear model, and numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lossary.weighting import el2n_score, grand_el2n, grand_score, prune_by_score

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(7, 5, generator=G), torch.tensor([0, 1, 2, 0, 2, 1, 1])


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def one_by_one(model, loss=F.cross_entropy):
    norms = []
    for x, y in zip(X, Y):
        gradient = torch.autograd.grad(
            loss(model(x[None]), y[None]), [p for p in model.parameters() if p.requires_grad]
        )
        norms.append(torch.cat([g.flatten() for g in gradient]).norm().item())
    return norms


def test_el2n_is_the_mean_length_of_the_error_vectors():
    logits = torch.randn(4, 7, 3, generator=G, dtype=torch.float64)
    odds = np.exp(logits.numpy())
    errors = odds / odds.sum(-1, keepdims=True)
    errors[:, np.arange(7), Y.numpy()] -= 1
    expected = np.sqrt((errors**2).sum(-1)).sum(0) / 4
    assert el2n_score(logits, Y).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_el2n_of_untrained_networks_and_of_ones_that_know():
    assert el2n_score(torch.zeros(3, 1, 10), torch.tensor([4])).item() == pytest.approx(math.sqrt(0.9), abs=1e-6)
    sure = 50 * F.one_hot(Y, 3).float()
    assert el2n_score(torch.stack([sure, sure, -sure]), Y).tolist() == pytest.approx([math.sqrt(1.5) / 3] * 7, abs=1e-6)


def test_grand_is_the_norm_of_each_samples_own_gradient(monkeypatch):
    models = [network(1), network(2)]
    expected = np.mean([one_by_one(model) for model in models], axis=0)
    assert grand_score(models, X, Y).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    monkeypatch.setattr(grand_el2n, "_NUMBERS_AT_ONCE", 2 * sum(p.numel() for p in models[0].parameters()))
    assert grand_score(models, X, Y).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_grand_of_a_linear_model_is_el2n_times_the_length_of_the_input():
    model = nn.Linear(5, 3)
    expected = el2n_score(model(X)[None], Y) * (X.square().sum(1) + 1).sqrt()
    assert grand_score([model], X, Y).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_grand_takes_any_loss_and_leaves_out_frozen_layers_and_the_models_themselves():
    model = network(3)
    model[0].requires_grad_(False)

    def squared(output, target):
        return (output - torch.eye(3)[target]).square().sum()

    assert grand_score([model], X, Y, loss=squared).tolist() == pytest.approx(one_by_one(model, squared), rel=1e-5)
    assert model[2].weight.grad is None


def test_grand_looks_at_batch_normalisation_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    model[1].running_var.fill_(2.0)
    assert grand_score([model], X, Y).tolist() == pytest.approx(one_by_one(model), rel=1e-5)


@pytest.mark.parametrize(("keep", "drop_top"), [(0.5, 0.0), (0.3, 0.2), (0.9, 0.1), (1.0, 0.0)])
def test_pruning_keeps_the_slice_of_the_official_code(keep, drop_top):
    score = torch.randn(50, generator=G)
    size, offset = round(keep * 50), 50 - round(keep * 50) - round(drop_top * 50)
    expected = np.sort(score.numpy().argsort()[offset : offset + size])
    assert prune_by_score(score, keep=keep, drop_top=drop_top).tolist() == expected.tolist()


def test_equal_scores_are_kept_in_order_and_shares_add_up():
    assert prune_by_score(torch.ones(4), keep=0.5).tolist() == [0, 1]
    assert prune_by_score(torch.ones(3), keep=0.5, drop_top=0.5).tolist() == [2]
    assert prune_by_score(torch.arange(10.0), keep=0.25, drop_top=0.25).tolist() == [5, 6, 7]  # ranks 2 to below 5


def test_a_loader_serves_what_is_kept():
    kept = prune_by_score(torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.0]), keep=3 / 7)
    (batch,) = DataLoader(Subset(TensorDataset(X, Y), kept.tolist()), batch_size=8)
    assert torch.equal(batch[0], X[[1, 2, 4]])


def test_refusals():
    model = nn.Linear(5, 3)
    with pytest.raises(ValueError, match="models: expected a sequence of models, got a Linear"):
        grand_score(model, X, Y)
    with pytest.raises(ValueError, match="models: expected at least one, got none"):
        grand_score([], X, Y)
    with pytest.raises(ValueError, match="models: expected parameters that require a gradient, Linear has none"):
        grand_score([model.requires_grad_(False)], X, Y)
    with pytest.raises(ValueError, match="target: expected a tensor with 7 entries"):
        grand_score([model], X, Y[:3])
    with pytest.raises(ValueError, match="input: expected logits of at least one model"):
        el2n_score(torch.zeros(0, 7, 3), Y)
    with pytest.raises(ValueError, match=r"drop_top: expected at most 1 - keep, 0.4, got 0.5"):
        prune_by_score(torch.ones(4), keep=0.6, drop_top=0.5)
    with pytest.raises(ValueError, match="score: contains NaN"):
        prune_by_score(torch.tensor([0.0, torch.nan]), keep=0.5)
