"""The survival engine against lifelines, quadrature and hand-worked curves."""

from itertools import pairwise
from types import MappingProxyType

import numpy as np
import pytest
import torch
from lifelines import KaplanMeierFitter
from lifelines.datasets import load_lung
from sklearn.exceptions import NotFittedError

from lossary.uncertainty._survival import (
    Lifetime,
    SurvivalRegressor,
    integrated_brier_score,
    kaplan_meier,
    maximum_likelihood,
    observations,
)


def test_curve_by_hand():
    curve = kaplan_meier([2, 1, 2, 3, 2, 5], [1, 1, 0, 0, 1, 0])
    assert curve.times.tolist() == [1, 2]
    assert curve.at_risk.tolist() == [6, 5]
    assert curve.events.tolist() == [1, 2]
    assert curve.survival.tolist() == pytest.approx([5 / 6, 5 / 6 * 3 / 5])
    assert curve([0, 1, 1.5, 2, 9]).tolist() == pytest.approx([1, 5 / 6, 5 / 6, 0.5, 0.5])
    assert curve([1, 2, 2.5], before=True).tolist() == pytest.approx([1, 5 / 6, 0.5])
    ends = kaplan_meier([2, 1, 2, 3, 2, 5], [1, 1, 0, 0, 1, 0], censoring=True)  # at 2 the events leave first
    assert ends.at_risk.tolist() == [3, 2, 1]
    assert ends.survival.tolist() == pytest.approx([2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("decimals", [None, 0])
def test_curve_equals_lifelines(decimals):
    rng = np.random.default_rng(0)
    time, event = rng.exponential(10, 500), rng.random(500) < 0.6
    time = time if decimals is None else time.round(decimals)  # ties, also at 0
    expected = KaplanMeierFitter().fit(time, event).survival_function_["KM_estimate"]
    assert kaplan_meier(torch.from_numpy(time), torch.from_numpy(event))(expected.index.to_numpy()) == pytest.approx(
        expected.to_numpy(), abs=1e-12
    )


def test_curve_of_the_lung_data_equals_lifelines():
    lung = load_lung()
    fitter = KaplanMeierFitter().fit(lung["time"], lung["status"])
    curve = kaplan_meier(lung["time"], lung["status"])
    assert curve(fitter.timeline) == pytest.approx(fitter.survival_function_["KM_estimate"].to_numpy(), abs=1e-12)
    table = fitter.event_table.loc[curve.times]
    assert curve.at_risk.tolist() == table["at_risk"].tolist()
    assert curve.events.tolist() == table["observed"].tolist()
    assert curve(310) == pytest.approx(0.5, abs=0.01)  # the published median is 310 days


def test_curve_at_its_ends():
    censored = kaplan_meier([1.0, 2.0], [0, 0])
    assert censored([0, 5]).tolist() == [1, 1]
    assert kaplan_meier([3.0])([2.9, 3.0]).tolist() == [1, 0]  # without `event` all have it


def test_brier_score_without_censoring_is_a_mean_square():
    rng = np.random.default_rng(1)
    time, grid, survival = rng.exponential(1, 40), np.linspace(0.1, 1, 10), rng.random((40, 10))
    squares = [np.mean([(float(t > u) - s[j]) ** 2 for t, s in zip(time, survival)]) for j, u in enumerate(grid)]
    area = sum((a + b) / 2 * 0.1 for a, b in pairwise(squares))
    assert integrated_brier_score(time, None, survival, grid) == pytest.approx(area / 0.9)


def test_brier_score_with_a_tie_by_hand():
    """Of 1 (event), 2 (event), 2 (end), 4 (event): G(2-) = 1 and G = 1/2 from 2 on."""
    survival = [[0.9, 0.5], [0.8, 0.4], [0.7, 0.3], [0.6, 0.2]]
    first = (0.9**2 + 0.2**2 + 0.3**2 + 0.4**2) / 4
    second = (0.5**2 + 0.4**2 + 0.8**2 / 0.5) / 4  # the third is left out
    assert integrated_brier_score([1, 2, 2, 4], [1, 1, 0, 1], survival, [1.5, 2.0]) == pytest.approx(
        (first + second) / 2
    )


def test_brier_score_equals_scikit_survival():
    """0.20926722788525326 is what scikit-survival 0.28.0 gave for these rows."""
    rng = np.random.default_rng(0)
    t, c = rng.exponential(10, 100_000), rng.exponential(15, 100_000)
    time, event, grid = np.minimum(t, c)[:400], (t <= c)[:400], np.linspace(0.5, 20, 30)
    survival = np.exp(-grid / rng.uniform(5, 20, 400)[:, None])
    assert integrated_brier_score(time, event, survival, grid) == pytest.approx(0.20926722788525326, rel=1e-12)


class Exponential(Lifetime):
    arg_constraints = MappingProxyType({"rate": torch.distributions.constraints.positive})

    def __init__(self, rate):
        self.rate = rate
        super().__init__(rate.shape)

    def log_hazard(self, value):
        return self.rate.log() + 0 * value

    def cumulative_hazard(self, value):
        return self.rate * value

    def inverse_cumulative_hazard(self, value):
        return value / self.rate


def test_everything_follows_from_the_hazard():
    rate, t = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([0.3, 1.7], dtype=torch.float64)
    mine, torchs = Exponential(rate), torch.distributions.Exponential(rate)
    for name in ("log_prob", "cdf"):
        assert torch.allclose(getattr(mine, name)(t), getattr(torchs, name)(t), atol=1e-14)
    assert torch.allclose(mine.icdf(mine.cdf(t)), t)
    assert torch.allclose(mine.hazard(t), rate)
    assert torch.allclose(mine.survival(t), 1 - torchs.cdf(t))
    censored = mine.log_likelihood(t, torch.tensor([True, False]))
    assert torch.allclose(censored, torch.stack([torchs.log_prob(t)[0], (1 - torchs.cdf(t)[1]).log()]))
    state = torch.random.get_rng_state()
    draws = [mine.sample((4000,), generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(state, torch.random.get_rng_state())
    assert draws[0].mean(0).tolist() == pytest.approx([2, 0.5], rel=0.05)


class ExponentialRegressor(SurvivalRegressor):
    def _start(self, time, event, features):
        return {"rate": np.zeros(1 + features)}

    def _lifetime(self, eta):
        return Exponential(eta["rate"].exp())


def test_exponential_regression_has_a_closed_form_in_two_groups():
    """Events over total time in each group; the coefficient is the logarithm of the ratio."""
    X, time, event = [[3.0], [3.0], [3.0], [5.0], [5.0]], [1.0, 2.0, 7.0, 4.0, 6.0], [1, 1, 0, 0, 1]
    model = ExponentialRegressor().fit(X, time, event)
    rates = np.array([2 / 10, 1 / 10])
    assert np.exp(model.intercept_["rate"] + model.coef_["rate"] * [3, 5]) == pytest.approx(rates, rel=1e-7)
    assert model.log_likelihood_ == pytest.approx(2 * np.log(0.2) - 2 + np.log(0.1) - 1)
    assert model.score(X, time, event) == pytest.approx(model.log_likelihood_ / 5)
    assert model.predict_survival([[5.0]], [0, 10]) == pytest.approx(np.exp([[0, -1]]))
    assert model.predict([[5.0], [3.0]]) == pytest.approx(np.log(2) / rates[::-1])
    quantiles = model.predict_quantile([[5.0], [3.0]], [0.5, 0.9])
    assert quantiles == pytest.approx(np.log([[2, 10], [2, 10]]) / rates[::-1, None])


def test_a_constant_feature_and_a_shift_of_the_others_change_nothing():
    rng = np.random.default_rng(2)
    X, time = rng.normal(size=(60, 2)), rng.exponential(1, 60)
    plain = ExponentialRegressor().fit(X, time)
    moved = ExponentialRegressor().fit(np.column_stack([X * 100 + 1e4, np.full(60, 7.1)]), time)
    assert moved.log_likelihood_ == pytest.approx(plain.log_likelihood_, abs=1e-9)
    assert moved.coef_["rate"] == pytest.approx([*(plain.coef_["rate"] / 100), 0], abs=1e-9)


def test_maximum_likelihood_finds_a_known_maximum():
    """Normal with mean linear in x and a constant log-deviation: least squares and its residual."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=50)
    y = 1 + 2 * x + rng.normal(size=50)
    design = torch.from_numpy(np.column_stack([np.ones(50), x]))

    def log_likelihood(mean, log_std):
        return torch.distributions.Normal(mean, log_std.exp()).log_prob(torch.from_numpy(y))

    found, value = maximum_likelihood(log_likelihood, design, {"mean": np.zeros(2), "log_std": np.zeros(1)})
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.mean((y - intercept - slope * x) ** 2)
    assert found["mean"] == pytest.approx([intercept, slope], rel=1e-7)
    assert found["log_std"] == pytest.approx([np.log(residual) / 2], rel=1e-7)
    assert value == pytest.approx(-25 * (np.log(2 * np.pi * residual) + 1))


def test_steps_too_far_are_taken_back_and_parameters_may_be_apart():
    """log a - a from a = 30, where growing Newton steps soon lead below 0, and a parabola apart from it."""
    found, value = maximum_likelihood(
        lambda a, b: a.log() - a - (b - 2) ** 2,
        torch.ones(1, 1, dtype=torch.float64),
        {"a": np.array([30.0]), "b": np.zeros(1)},
    )
    assert (found["a"][0], found["b"][0], value) == pytest.approx((1, 2, -1), abs=1e-7)


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"time: expected finite numbers >= 0, got -1"):
        kaplan_meier([1.0, -1.0])
    with pytest.raises(ValueError, match=r"time: expected finite numbers > 0, got 0"):
        observations([0.0], [1], above=0.0)
    with pytest.raises(ValueError, match=r"time: contains NaN or infinite values"):
        kaplan_meier([np.nan])
    with pytest.raises(ValueError, match=r"time: expected shape \(N,\), N >= 1, got \(0,\)"):
        kaplan_meier([])
    with pytest.raises(ValueError, match=r"time: expected numbers, got <U1"):
        kaplan_meier(["a"])
    with pytest.raises(ValueError, match=r"event: expected one for each of 2 times, got shape \(1,\)"):
        kaplan_meier([1, 2], [1])
    with pytest.raises(ValueError, match=r"event: expected 1 or True where it came"):
        kaplan_meier([1, 2], [1, 2])
    X, time = [[0.0], [1.0]], [1.0, 2.0]
    with pytest.raises(ValueError, match=r"event: expected at least one event"):
        ExponentialRegressor().fit(X, time, [0, 0])
    with pytest.raises(ValueError, match=r"time: expected one for each of 2 rows, got 1"):
        ExponentialRegressor().fit(X, [1.0])
    with pytest.raises(ValueError, match="Input X contains NaN"):
        ExponentialRegressor().fit([[0.0], [np.nan]], time)
    with pytest.raises(NotFittedError):
        ExponentialRegressor().predict(X)
    with pytest.raises(ValueError, match=r"q: expected a probability between 0 and 1, or several, got 1.0"):
        ExponentialRegressor().fit(X, time).predict_quantile(X, 1.0)
    with pytest.raises(ValueError, match=r"times: expected at least two increasing numbers"):
        integrated_brier_score(time, None, [[1, 1], [1, 1]], [1, 1])
    with pytest.raises(ValueError, match=r"times: expected all below 2, where observation ends, got 3"):
        integrated_brier_score(time, None, [[1, 1], [1, 1]], [1, 3])
    with pytest.raises(ValueError, match=r"survival: expected probabilities \(2, 2\), got shape \(2, 1\)"):
        integrated_brier_score(time, None, [[1], [1]], [0.5, 1])
