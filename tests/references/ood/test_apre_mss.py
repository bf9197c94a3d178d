"""APRE against torch's Gaussian likelihood, mean shift against scikit-learn's neighbours, the scorer part by part."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors, kneighbors_graph
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import lossary.ood.apre_mss as module
from lossary.ood import MeanShiftOutlierScorer, apre_loss, mean_shift_transform


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((60, 4)) @ rng.standard_normal((4, 4)) + 3


@pytest.fixture
def new():
    return np.random.default_rng(1).standard_normal((7, 4)) * 2 + 3


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_apre_at_weights_of_one_is_twice_the_gaussian_likelihood():
    output, target = drawn(2, 5, 6), drawn(2, 5, 3)
    variance = F.softplus(output[..., 3:]) + 1e-5
    twice = 2 * F.gaussian_nll_loss(output[..., :3], target, variance, reduction="none").sum(-1)
    torch.testing.assert_close(apre_loss(output, target), twice)


def test_apre_is_linear_in_its_weights():
    output, target = drawn(5, 6), drawn(5, 3)
    squares = ((output[:, :3] - target) ** 2 / ((1 + output[:, 3:].exp()).log() + 1e-5)).sum(1)
    torch.testing.assert_close(apre_loss(output, target, alpha=1.5, beta=0.0), 1.5 * squares)
    both = apre_loss(output, target, alpha=1.5, beta=2.0) - apre_loss(output, target, alpha=0.0, beta=2.0)
    torch.testing.assert_close(both, 1.5 * squares)
    no_error = apre_loss(output, output[:, :3], alpha=9.0, beta=2.0)
    torch.testing.assert_close(no_error, 2 * ((1 + output[:, 3:].exp()).log() + 1e-5).log().sum(1))


def test_apre_stays_finite_where_no_variance_is_left():
    output = torch.tensor([[1.0, -1e4]], requires_grad=True)
    value = apre_loss(output, torch.tensor([[1.5]]))
    (gradient,) = torch.autograd.grad(value.sum(), output)
    assert value.item() == pytest.approx(0.25 / 1e-5 + np.log(1e-5), rel=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("times", [1, 3])
def test_training_rows_move_to_the_mean_of_their_neighbours(rows, times):
    moved = rows
    for _ in range(times):
        moved = kneighbors_graph(moved, 6, include_self=True).toarray() @ moved / 6
    np.testing.assert_allclose(mean_shift_transform(rows, neighbors=6, times=times), moved, rtol=1e-10)


@pytest.mark.parametrize("times", [1, 3])
def test_new_rows_move_through_training_rows_that_have_moved_as_often(rows, new, times):
    known, moved = rows, new
    for _ in range(times):
        nearest = NearestNeighbors(n_neighbors=5).fit(known).kneighbors(moved, return_distance=False)
        moved = np.stack([np.vstack([row, known[near]]).mean(0) for row, near in zip(moved, nearest)])
        known = kneighbors_graph(known, 6, include_self=True).toarray() @ known / 6
    got = mean_shift_transform(rows, new, neighbors=6, times=times)
    np.testing.assert_allclose(got, moved, rtol=1e-10)
    tensor = mean_shift_transform(torch.from_numpy(rows), torch.from_numpy(new), neighbors=6, times=times)
    assert torch.equal(tensor, torch.from_numpy(got))


def test_chunks_do_not_show(rows, new, monkeypatch):
    whole = mean_shift_transform(rows, new, neighbors=6, times=2)
    monkeypatch.setattr(module, "_CHUNK", 100)
    np.testing.assert_allclose(mean_shift_transform(rows, new, neighbors=6, times=2), whole, rtol=1e-12)


def test_one_neighbour_moves_nothing_and_all_of_them_move_to_the_mean(rows, new):
    np.testing.assert_allclose(mean_shift_transform(rows, neighbors=1, times=2), rows)
    np.testing.assert_allclose(mean_shift_transform(rows, new, neighbors=1), new)
    everything = mean_shift_transform(rows, neighbors=60)
    np.testing.assert_allclose(everything, np.broadcast_to(rows.mean(0), rows.shape), rtol=1e-12)


@pytest.mark.parametrize("probabilistic", [True, False])
def test_the_score_is_the_output_for_a_row_against_its_mean_shift(rows, new, probabilistic):
    scorer = MeanShiftOutlierScorer(neighbors=6, times=2, probabilistic=probabilistic, epochs=30).fit(rows)
    known, z = ((a - rows.mean(0)) / rows.std(0) for a in (rows, new))
    target = mean_shift_transform(known, z, neighbors=6, times=2)
    output = scorer.network_(torch.from_numpy(z)).detach().numpy()
    if probabilistic:
        variance = np.log1p(np.exp(output[:, 4:])) + 1e-5
        expected = (0.5 * (output[:, :4] - target) ** 2 / variance + 2 * np.log(variance)).sum(1)
    else:
        expected = ((output - target) ** 2).sum(1)
    np.testing.assert_allclose(scorer.anomaly_score(new), expected, rtol=1e-9)


def test_without_shifts_it_is_a_plain_autoencoder(rows, new):
    scorer = MeanShiftOutlierScorer(times=0, probabilistic=False, epochs=30).fit(rows)
    z = torch.from_numpy((new - rows.mean(0)) / rows.std(0))
    expected = (scorer.network_(z) - z).square().sum(1).detach()
    np.testing.assert_allclose(scorer.anomaly_score(new), expected, rtol=1e-12)


def test_a_perfect_reconstruction_hides_nothing(rows, new):
    """With the identity for an autoencoder, what is left is how far a row is from its neighbourhood."""
    scorer = MeanShiftOutlierScorer(neighbors=6, probabilistic=False, epochs=0).fit(rows)
    scorer.network_ = nn.Identity()
    z, known = ((a - rows.mean(0)) / rows.std(0) for a in (new, rows))
    apart = ((z - mean_shift_transform(known, z, neighbors=6)) ** 2).sum(1)
    np.testing.assert_allclose(scorer.anomaly_score(new), apart, rtol=1e-9)
    scorer.times = 0
    assert (scorer.anomaly_score(new) == 0).all()


@pytest.mark.parametrize("probabilistic", [True, False])
def test_training_takes_adams_steps_on_plain_errors_and_halves_the_rate(rows, probabilistic, monkeypatch):
    monkeypatch.setattr(module, "_HALVED", 1)
    how = {"probabilistic": probabilistic, "lr": 0.01, "random_state": 3}
    start, end = (MeanShiftOutlierScorer(epochs=epochs, **how).fit(rows).network_ for epochs in (0, 2))
    z = torch.from_numpy((rows - rows.mean(0)) / rows.std(0))
    weights = list(start.parameters())
    first, second = [0.0] * len(weights), [0.0] * len(weights)
    for step, rate in ((1, 0.01), (2, 0.005)):
        output = start(z)
        if probabilistic:
            variance = F.softplus(output[:, 4:]) + 1e-5
            loss = ((output[:, :4] - z) ** 2 / variance + variance.log()).sum(1).mean()
        else:
            loss = ((output - z) ** 2).sum(1).mean()
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for i, (weight, g) in enumerate(zip(weights, gradients)):
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                size = (second[i] / (1 - 0.999**step)).sqrt() + 1e-8
                weight -= rate * first[i] / (1 - 0.9**step) / size
    for got, expected in zip(end.parameters(), weights):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (1, [1, 2]),
        (9, [4, 18]),
        (32, [16, 8, 16, 64]),
        (150, [75, 38, 19, 38, 75, 300]),
        (200, [100, 50, 12, 50, 100, 400]),
    ],
)
def test_widths_are_the_official_codes(width, expected):
    x = drawn(3, width)
    network = MeanShiftOutlierScorer(neighbors=2, epochs=0).fit(x).network_
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == expected
    assert linear[0].in_features == width
    assert linear[0].weight.abs().max() <= width**-0.5
    assert isinstance(network[-1], nn.Linear)
    assert sum(isinstance(layer, nn.ReLU) for layer in network) == len(linear) - 1


def test_the_seed_alone_decides_the_weights(rows, new):
    scores = [MeanShiftOutlierScorer(epochs=5, random_state=s).fit(rows).anomaly_score(new) for s in (1, 1, 2)]
    assert (scores[0] == scores[1]).all()
    assert not (scores[0] == scores[2]).any()


def test_a_constant_feature_and_copies_of_a_row_are_taken(rows, new):
    flat = np.column_stack([np.repeat(rows[:30], 2, axis=0), np.full(60, 7.0)])
    scorer = MeanShiftOutlierScorer(neighbors=4, epochs=20).fit(flat)
    assert scorer.scale_[-1] == 1
    assert np.isfinite(scorer.anomaly_score(np.column_stack([new, np.full(7, 8.0)]))).all()


def test_it_ends_a_scikit_learn_pipeline(rows, new):
    pipeline = make_pipeline(StandardScaler(), MeanShiftOutlierScorer(epochs=10)).fit(rows)
    alone = MeanShiftOutlierScorer(epochs=10).fit(rows)
    np.testing.assert_allclose(pipeline.score_samples(new), -alone.anomaly_score(new), rtol=1e-6)


def test_refusals_name_the_argument(rows, new):
    with pytest.raises(ValueError, match=r"neighbors: expected a whole number >= 1 and <= 60, got 61"):
        MeanShiftOutlierScorer(neighbors=61).fit(rows)
    with pytest.raises(ValueError, match=r"neighbors: expected a whole number >= 1 and <= 60, got 0"):
        mean_shift_transform(rows, neighbors=0)
    with pytest.raises(ValueError, match=r"times: expected a whole number >= 1, got 0"):
        mean_shift_transform(rows, times=0)
    with pytest.raises(ValueError, match=r"x: expected \(rows, 4\), neither empty, got shape \(7, 3\)"):
        mean_shift_transform(rows, new[:, :3])
    with pytest.raises(ValueError, match=r"lr: expected a number > 0, got 0.0"):
        MeanShiftOutlierScorer(lr=0.0).fit(rows)
    with pytest.raises(ValueError, match=r"input: expected shape \(5, 6\), got \(5, 3\)"):
        apre_loss(torch.ones(5, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"beta: expected a number >= 0, got -1.0"):
        apre_loss(torch.ones(5, 6), torch.ones(5, 3), beta=-1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees(rows, new):
    scorer = MeanShiftOutlierScorer(epochs=10)
    expected = scorer.fit(torch.from_numpy(rows)).anomaly_score(torch.from_numpy(new))
    got = scorer.fit(torch.from_numpy(rows).cuda()).anomaly_score(torch.from_numpy(new).cuda())
    torch.testing.assert_close(got.cpu(), expected)
