"""ST-DQR against the definitions written out, the official code's loss, a Gaussian's half-spaces and its guarantee."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.distributions import Normal, kl_divergence

from lossary.uncertainty import MultivariateConformalRegion, SpaceTransformedDQR, directional_quantile_loss
from lossary.uncertainty._network import generator


def test_loss_is_pinball_of_projections_and_the_official_codes():
    """Run by the authors' code (Shai128/mqr, multivariate_qr_loss), whose mean is over rows and directions."""
    u = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    y, q = torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([[1.3, 0.5, -0.7], [1.6, 0.8, -0.4]])
    got = directional_quantile_loss(q, y, directions=u, level=0.1)
    for row, target, value in zip(q.tolist(), y.tolist(), got.tolist()):
        parts = []
        for r, direction in zip(row, u.tolist()):
            along = sum(a * b for a, b in zip(direction, target))
            parts.append(0.1 * (along - r) if along > r else 0.9 * (r - along))
        assert value == pytest.approx(sum(parts) / 3)
    assert got.mean().item() == pytest.approx(0.43333330750465393, abs=1e-6)


def test_loss_is_least_at_the_sample_quantile_of_each_direction():
    rng = np.random.default_rng(0)
    y, u = torch.from_numpy(rng.normal(size=(101, 3))), torch.from_numpy(rng.normal(size=(4, 3)))
    along = y @ u.mT
    best = along.sort(0).values[10]  # of 101, the quantile at 0.1
    for step in (-1e-3, 1e-3):
        worse = directional_quantile_loss((best + step).expand(101, -1), y, directions=u, level=0.1).mean()
        assert worse > directional_quantile_loss(best.expand(101, -1), y, directions=u, level=0.1).mean()


def clouds(rows=6, points=15, side=9, seed=0):
    """Points in discs, some missing, targets in and about them, and a grid."""
    rng = np.random.default_rng(seed)
    inside = rng.normal(size=(rows, points, 2))
    inside[rng.random((rows, points)) < 0.3] = np.nan
    axis = np.linspace(-4, 4, side)
    return inside, rng.normal(size=(rows, 2)), np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


def signed(points, y, grid, share=0.9):
    """The definition, point by point."""
    points = [p for p in points if p[0] == p[0]]
    if not points:
        return math.inf
    nearest = [
        min((math.dist(p, q) for j, q in enumerate(points) if j != i), default=math.nan) for i, p in enumerate(points)
    ]
    spacing = np.quantile(nearest, share) if len(points) > 1 else 0.0
    distance = min(math.dist(p, y) for p in points)
    if distance > spacing:
        return distance
    outside = [g for g in grid if min(math.dist(p, g) for p in points) > spacing]
    return -min((math.dist(g, y) for g in outside), default=math.inf)


@pytest.mark.parametrize("alpha", [0.4, 0.8])
def test_regions_are_the_definition(alpha):
    inside, y, grid = clouds()
    inside[3] = np.nan  # an empty one
    inside[4, 1:] = np.nan  # a single point
    inside[4, 0] = 0.5
    region = MultivariateConformalRegion(alpha=alpha).fit(inside, torch.from_numpy(y), grid)
    expected = [signed(p, t, grid) for p, t in zip(inside, y)]
    np.testing.assert_allclose(region.scores(inside, y), expected, atol=1e-9)
    rank = math.ceil(7 * (1 - alpha) - 1e-9)
    assert region.radius_ == pytest.approx(sorted(expected)[rank - 1], abs=1e-9)
    assert (region.radius_ < 0) == (alpha == 0.8)  # shrunk where less is asked for than the points hold
    new = np.random.default_rng(9).normal(size=(6, 2))
    holds = [signed(p, t, grid) <= region.radius_ for p, t in zip(inside, new)]
    assert region.contains(inside, new).tolist() == holds
    share = np.mean([signed(inside[0], g, grid) <= region.radius_ for g in grid])
    assert 0 < share < 1
    np.testing.assert_allclose(region.share(inside[:1]), share)


def test_far_from_the_origin_nothing_changes():
    inside, y, grid = clouds()
    here, there = (MultivariateConformalRegion(alpha=0.8).fit(inside + c, y + c, grid + c) for c in (0.0, 1e6))
    np.testing.assert_allclose(here.scores(inside, y), there.scores(inside + 1e6, y + 1e6), atol=1e-8)


@pytest.mark.parametrize(("alpha", "spread"), [(0.1, 1.0), (0.4, 0.6)])
def test_coverage_is_exact_whether_regions_grow_or_shrink(alpha, spread):
    """9 rows calibrate and one is to be covered, 500 times over, with regions that differ by row: binomial."""
    rng = np.random.default_rng(1)
    shapes, grid = rng.normal(size=(5, 30, 2)), clouds()[2]
    which = rng.integers(0, 5, 500 * 10)
    y = spread * rng.normal(size=(len(which), 2)) * (1 + which[:, None] / 4)
    scores = MultivariateConformalRegion().fit(shapes[which[:9]], y[:9], grid).scores(shapes[which], y).reshape(500, 10)
    rank = math.ceil(10 * (1 - alpha) - 1e-9)
    radius = np.sort(scores[:, :9], axis=1)[:, rank - 1]
    hits = (scores[:, 9] <= radius).sum()
    assert (np.median(radius) > 0) == (alpha == 0.1)
    low, high = binom.interval(0.9999, 500, rank / 10)
    assert low <= hits <= high
    for k in range(0, 500, 50):  # the public way, now and then
        rows = slice(10 * k, 10 * k + 10)
        again = MultivariateConformalRegion(alpha=alpha).fit(shapes[which[rows]][:9], y[rows][:9], grid)
        assert again.contains(shapes[which[rows]], y[rows])[9] == (scores[k, 9] <= radius[k])


def test_too_few_rows_cover_everything():
    inside, y, grid = clouds()
    region = MultivariateConformalRegion(alpha=0.05).fit(inside, y, grid)  # 19 are needed
    assert region.radius_ == math.inf
    assert region.contains(inside, y + 1e9).all()
    assert region.share(inside).tolist() == [1.0] * 6


SMALL = {"steps": 100, "points": 100, "directions": 32, "grid": 100, "hidden": 32, "lr": 0.02}


def arc(rows, seed=0):
    rng = np.random.default_rng(seed)
    X, along = rng.random((rows, 1)), rng.uniform(-1, 1, rows)
    Y = np.stack([3 * along, X[:, 0] + 2 * along**2], axis=1) + 0.1 * rng.normal(size=(rows, 2))
    return X, Y


def test_without_a_latent_space_a_gaussian_gets_its_chi_squared_disc():
    """Half-spaces at 5% of a standard normal leave a disc of radius 1.645: its share is 74%, its area 8.5."""
    rng = np.random.default_rng(2)
    X, Y = rng.random((2000, 1)), [10.0, -5.0] + np.array([1.0, 4.0]) * rng.normal(size=(2000, 2))
    model = SpaceTransformedDQR(**{**SMALL, "latent": 0, "steps": 200, "points": 400, "calibration": 0.02}).fit(X, Y)
    points = (model.predict_region(X[:40]) - [10.0, -5.0]) / [1.0, 4.0]
    radius = np.sqrt(np.nansum(points**2, axis=2))
    assert np.quantile(np.nanmax(radius, axis=1), 0.5) == pytest.approx(1.645, abs=0.25)
    inside = [np.linalg.norm((Y[:1000] - [10.0, -5.0]) / [1.0, 4.0], axis=1) < 1.645]
    assert np.mean(inside) == pytest.approx(0.742, abs=0.05)
    assert np.nanmean(model.predict(X), axis=0) == pytest.approx([10.0, -5.0], abs=0.5)


def test_the_pieces_are_the_definition():
    model = SpaceTransformedDQR(**{**SMALL, "latent": 2, "steps": 40}).fit(*arc(200))
    X, Y = arc(7, seed=3)
    x, y = torch.from_numpy((X - model._x[0]) / model._x[1]), torch.from_numpy((Y - model._y[0]) / model._y[1])
    with torch.no_grad():
        mean, log_variance = model.encoder_(torch.cat([x, y], 1)).chunk(2, 1)
        expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
        z, divergence = model._encoded(x, y, generator(0))
        noise = torch.randn(7, 2, generator=generator(0), dtype=torch.float64)
        assert torch.allclose(divergence, expected)
        assert torch.allclose(z, mean + log_variance.exp().sqrt() * noise)
        cloud = torch.from_numpy((model.predict_region(X) - model._y[0]) / model._y[1])
        u = model._directions
        assert torch.allclose(u.norm(dim=1), torch.ones(32, dtype=torch.float64))
        for i in range(7):
            q = torch.stack([model.quantiles_(torch.cat([x[i], v])) for v in u]).squeeze(1)
            kept = [p for p in model._tried if bool((u @ p >= q).all())]
            points = torch.stack([model.decoder_(torch.cat([p, x[i]])) for p in kept])
            assert torch.allclose(points, cloud[i][: len(kept)], atol=1e-9)
            assert cloud[i][len(kept) :].isnan().all()
    assert len(model._tried) == 100
    z = model._tried.numpy()
    np.testing.assert_allclose(z.mean(0), model._middle.numpy(), atol=0.1 * z.std())


@pytest.mark.parametrize(("latent", "alpha"), [(0, 0.2), (2, 0.2), (0, 0.4), (0, 0.1)])
def test_coverage_is_exact_over_recalibrations_of_one_model(latent, alpha):
    model = SpaceTransformedDQR(latent=latent, alpha=alpha, **SMALL).fit(*arc(100))
    X, Y = arc(500 * 10, seed=4)
    scores = model.signed_distance(X, Y).reshape(500, 10)
    rank = round(10 * (1 - alpha))
    radius = np.sort(scores[:, :9], axis=1)[:, rank - 1]
    low, high = binom.interval(0.9999, 500, rank / 10)
    assert low <= (scores[:, 9] <= radius).sum() <= high
    model.calibrate(X[:9], Y[:9])
    assert model.region_.radius_ == pytest.approx(radius[0], abs=1e-9)
    assert np.array_equal(model.contains(X[9:200], Y[9:200]), scores.ravel()[9:200] <= model.region_.radius_)


def test_the_latent_space_follows_the_arc_where_half_spaces_fill_it():
    X, Y = arc(600)
    off = []
    for latent in (2, 0):
        points = SpaceTransformedDQR(latent=latent, **{**SMALL, "steps": 200}).fit(X, Y).predict_region(X[:50])
        off.append(np.nanmean(np.abs(points[..., 1] - X[:50] - 2 * (points[..., 0] / 3) ** 2)))
    assert off[0] < 0.65 * off[1]


def test_volume_is_the_share_of_a_box():
    model = SpaceTransformedDQR(latent=2, **SMALL).fit(*arc(200))
    box = model._y[1] * (model._grid.amax(0) - model._grid.amin(0)).numpy()
    cloud = (model.predict_region(arc(3)[0]) - model._y[0]) / model._y[1]
    np.testing.assert_allclose(model.volume(arc(3)[0]), model.region_.share(cloud) * box[0] * box[1])


def test_degenerate_data_have_a_defined_outcome():
    X, Y = arc(30)
    few = SpaceTransformedDQR(alpha=0.1, calibration=0.25, **SMALL).fit(X, Y)  # 8 rows, 9 are needed
    assert few.contains(X, Y + 1e6).all()
    constant = SpaceTransformedDQR(latent=2, **SMALL).fit(np.ones((30, 1)), np.column_stack([Y, np.full(30, 7.0)]))
    assert np.isfinite(constant.predict(np.ones((2, 1)))).all()
    assert constant.predict(np.ones((2, 1))).shape == (2, 3)
    single = SpaceTransformedDQR(latent=1, **SMALL).fit(X, Y[:, 0])
    assert single.predict(X).shape == (30,)
    assert single.contains(X, Y[:, 0]).dtype == bool


def test_scikit_learn_drives_it():
    X, Y = arc(60)
    answers = cross_val_predict(make_pipeline(StandardScaler(), SpaceTransformedDQR(**SMALL)), X, Y, cv=2)
    assert answers.shape == (60, 2)


def test_refusals_name_the_argument():
    u, y = torch.ones(4, 2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"input: expected shape \(3, 4\), got \(3, 3\)"):
        directional_quantile_loss(torch.zeros(3, 3), y, directions=u, level=0.1)
    with pytest.raises(ValueError, match=r"directions: expected shape \(4, 2\), got \(4, 3\)"):
        directional_quantile_loss(torch.zeros(3, 4), y, directions=torch.ones(4, 3), level=0.1)
    with pytest.raises(ValueError, match=r"level: expected a number > 0 and < 1, got 1.0"):
        directional_quantile_loss(torch.zeros(3, 4), y, directions=u, level=1.0)
    inside, targets, grid = clouds()
    with pytest.raises(ValueError, match=r"inside: expected finite points \(rows, points, 2\)"):
        MultivariateConformalRegion().fit(inside[0], targets, grid)
    with pytest.raises(ValueError, match=r"y: expected shape \(6, 2\), got \(5, 2\)"):
        MultivariateConformalRegion().fit(inside, targets[1:], grid)
    with pytest.raises(ValueError, match=r"alpha: expected a number > 0 and < 1, got 0"):
        MultivariateConformalRegion(alpha=0).fit(inside, targets, grid)
    with pytest.raises(NotFittedError):
        MultivariateConformalRegion().contains(inside, targets)
    X, Y = arc(20)
    with pytest.raises(ValueError, match=r"level: expected a number > 0 and < 0.5, got 0.5"):
        SpaceTransformedDQR(level=0.5).fit(X, Y)
    with pytest.raises(ValueError, match=r"latent: expected a whole number >= 0, got -1"):
        SpaceTransformedDQR(latent=-1).fit(X, Y)
    with pytest.raises(ValueError, match="y: expected 2 targets, got 1"):
        SpaceTransformedDQR(**{**SMALL, "steps": 1}).fit(X, Y).contains(X, Y[:, 0])
    with pytest.raises(NotFittedError):
        SpaceTransformedDQR().volume(X)
