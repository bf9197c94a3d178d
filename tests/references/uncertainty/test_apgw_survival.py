"""APGW times against scipy's distributions, quadrature, the official code's identities and lifelines' fits."""

import lifelines
import numpy as np
import pytest
import torch
from lifelines.datasets import load_lung, load_rossi
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lossary.uncertainty import APGW, APGWRegressor, apgw_nll

T = np.array([0.01, 0.3, 1.0, 2.5, 7.0])


def survival(t, **parameters):
    return APGW(**{k: torch.tensor(v, dtype=torch.float64) for k, v in parameters.items()}).survival(
        torch.as_tensor(t, dtype=torch.float64)
    )


@pytest.mark.parametrize("kappa", [0.0, 1e-9, -1e-9])
def test_kappa_0_is_burr_xii_and_log_logistic(kappa):
    burr = stats.burr12(c=1.7, d=0.6, scale=1 / 0.4).sf(T)
    assert survival(T, phi=0.4, lam=0.6, gamma=1.7, kappa=kappa).numpy() == pytest.approx(burr, abs=1e-8)
    log_logistic = stats.fisk(c=1.7, scale=1 / 0.4).sf(T)
    assert survival(T, phi=0.4, gamma=1.7, kappa=kappa).numpy() == pytest.approx(log_logistic, abs=1e-8)


def test_near_kappa_0_nothing_is_lost():
    """(exp(x) - 1) / x at x from 1e-4 to 0.06, where a series takes over."""
    t = np.array([0.1, 1.0, 8.0, 30.0, 1e3, 1e8])
    base = np.log1p(t / 1.003)
    expected = 1.003 * np.expm1(0.003 * base) / 0.003
    got = APGW(kappa=torch.tensor(0.003, dtype=torch.float64)).cumulative_hazard(torch.from_numpy(t))
    assert got.numpy() == pytest.approx(expected, rel=1e-12)


def test_kappa_1_is_weibull_2_linear_and_infinity_gompertz():
    weibull = stats.weibull_min(c=1.7, scale=0.6 ** (-1 / 1.7) / 0.4).sf(T)
    assert survival(T, phi=0.4, lam=0.6, gamma=1.7, kappa=1.0).numpy() == pytest.approx(weibull, abs=1e-12)
    linear = np.exp(-0.6 * (0.4 * T + (0.4 * T) ** 2 / 6))  # hazard 0.6 0.4 (1 + 0.4 t / 3)
    assert survival(T, phi=0.4, lam=0.6, kappa=2.0).numpy() == pytest.approx(linear, abs=1e-12)
    gompertz = stats.gompertz(c=0.6, scale=1 / 0.4).sf(T)
    assert survival(T, phi=0.4, lam=0.6, kappa=1e10).numpy() == pytest.approx(gompertz, abs=1e-8)


@pytest.mark.parametrize("kappa", [-0.9, -0.4, 0.003, 0.5, 3.0])
@pytest.mark.parametrize("gamma", [0.6, 1.0, 2.2])
def test_hazard_quantile_and_density_fit_together(kappa, gamma):
    phi, lam = 0.7, 1.3
    times = APGW(phi, lam, torch.tensor(gamma, dtype=torch.float64), kappa)

    def hazard(t):  # as the paper writes it
        u = phi * t
        return lam * phi * gamma * u ** (gamma - 1) * (1 + u**gamma / (kappa + 1)) ** (kappa - 1)

    t = torch.from_numpy(T)
    integrals = [quad(hazard, 0, b, epsabs=1e-12, limit=200)[0] for b in T]
    assert times.cumulative_hazard(t).numpy() == pytest.approx(integrals, rel=1e-6)
    assert times.hazard(t).numpy() == pytest.approx(hazard(T), rel=1e-10)
    assert times.log_prob(t).exp().numpy() == pytest.approx(hazard(T) * np.exp(-np.array(integrals)), rel=1e-6)
    mild = t[times.cumulative_hazard(t) < 20]
    assert torch.allclose(times.icdf(times.cdf(mild)), mild, rtol=1e-6)
    assert torch.allclose(times.inverse_cumulative_hazard(times.cumulative_hazard(t)), t, rtol=1e-9)
    if kappa > 0:  # the official code's sampler: u^gamma = H0(H / lam; 1 / kappa)
        dual = APGW(1.0, 1.0, 1.0, torch.tensor(1 / kappa, dtype=torch.float64))
        share = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        quantile = dual.cumulative_hazard(-(1 - share).log() / lam) ** (1 / gamma) / phi
        assert torch.allclose(times.icdf(share), quantile, rtol=1e-9)


def test_negative_kappa_leaves_some_for_ever():
    times = APGW(1.0, torch.tensor([0.5, 2.0], dtype=torch.float64), 1.5, -0.25)
    assert times.cure_fraction.numpy() == pytest.approx(np.exp([-0.5 * 3, -2 * 3]))
    assert torch.allclose(times.survival(torch.tensor(1e30, dtype=torch.float64)), times.cure_fraction)
    assert APGW(kappa=torch.tensor([0.0, 0.5])).cure_fraction.tolist() == [0, 0]
    draws = times.sample((5000,), generator=torch.Generator().manual_seed(0))
    assert draws.isinf().double().mean(0).numpy() == pytest.approx(times.cure_fraction.numpy(), abs=0.02)
    assert times.icdf(torch.tensor(0.9, dtype=torch.float64)).isinf().tolist() == [True, False]


def test_extremes_stay_finite():
    t = torch.tensor([1e-300, 1e-8, 1e8, 1e300], dtype=torch.float64)
    for kappa in (-0.99, 0.0, 1.0):
        assert APGW(1.0, 1.0, torch.tensor(0.5).double(), kappa).log_hazard(t).isfinite().all()
    assert survival([0.0], phi=0.5, gamma=2.0, kappa=0.5).tolist() == [1.0]
    low = APGW(0.4, 0.6, 1.7, torch.tensor(0.5)).log_prob(torch.from_numpy(T).float())
    high = APGW(0.4, 0.6, 1.7, torch.tensor(0.5).double()).log_prob(torch.from_numpy(T))
    assert torch.allclose(low.double(), high, rtol=1e-5)


def test_a_network_learns_from_nll():
    """Per-sample values from scipy's log-logistic and Weibull; the gradient agrees with finite differences."""
    input = torch.tensor([[np.log(0.4), 0, np.log(1.7), 0], [np.log(0.4), 0, np.log(1.7), np.log(2)]])
    time, event = torch.tensor([2.5, 1.5], dtype=torch.float64), torch.tensor([True, False])
    expected = [-stats.fisk(c=1.7, scale=2.5).logpdf(2.5), -stats.weibull_min(c=1.7, scale=2.5).logsf(1.5)]
    assert apgw_nll(input, time, event).numpy() == pytest.approx(expected)
    g = torch.Generator().manual_seed(0)
    random = torch.randn(3, 5, 4, generator=g, dtype=torch.float64).requires_grad_()
    t = torch.rand(3, 5, generator=g, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda z: apgw_nll(z, t, t > 0.5), random)
    assert torch.autograd.gradgradcheck(lambda z: apgw_nll(z, t, t > 0.5), random)
    assert apgw_nll(random.bfloat16(), t.bfloat16(), t > 0.5).isfinite().all()


@pytest.mark.parametrize(("kappa", "peer"), [(1.0, "WeibullAFTFitter"), (0.0, "LogLogisticAFTFitter")])
def test_fixed_families_equal_lifelines(kappa, peer):
    rossi = load_rossi()
    X, time, event = rossi.drop(columns=["week", "arrest"]), rossi["week"], rossi["arrest"]
    model = APGWRegressor(power=False, kappa=kappa).fit(X.to_numpy(), time, event)
    fitter = getattr(lifelines, peer)()
    fitter._scipy_fit_method, fitter._scipy_fit_options = "BFGS", {"gtol": 1e-8}  # by default it stops early
    fitter.fit(rossi, "week", "arrest")
    scale, shape = ("lambda_", "rho_") if kappa else ("alpha_", "beta_")
    assert fitter.params_[scale][X.columns].to_numpy() == pytest.approx(-model.coef_["phi"], abs=1e-5)
    assert fitter.params_[scale]["Intercept"] == pytest.approx(-model.intercept_["phi"], abs=1e-5)
    assert fitter.params_[shape]["Intercept"] == pytest.approx(model.intercept_["gamma"], abs=1e-5)
    assert fitter.log_likelihood_ == pytest.approx(model.log_likelihood_, abs=1e-6)
    grid = [1, 10, 30, 50]
    expected = fitter.predict_survival_function(rossi, grid).to_numpy().T
    assert model.predict_survival(X.to_numpy(), grid) == pytest.approx(expected, abs=1e-6)
    assert model.aic_ == pytest.approx(fitter.AIC_, abs=1e-5)


def test_free_kappa_is_best_where_a_search_says_so():
    lung = load_lung()
    X, time, event = lung[["age", "sex"]].to_numpy(), lung["time"], lung["status"]
    free = APGWRegressor(power=False).fit(X, time, event)
    fixed = minimize_scalar(
        lambda kappa: -APGWRegressor(power=False, kappa=kappa).fit(X, time, event).log_likelihood_, bounds=(-0.9, 6.0)
    )
    assert free.log_likelihood_ == pytest.approx(-fixed.fun, abs=1e-6)
    assert free.kappa_ == pytest.approx(fixed.x, abs=1e-3)
    assert free.n_parameters_ == 5
    wide = APGWRegressor(scale="both").fit(X, time / 365.25, event)
    for scale in ("phi", "lam"):  # what is nested in it cannot fit better
        assert APGWRegressor(scale=scale).fit(X, time / 365.25, event).log_likelihood_ < wide.log_likelihood_ + 1e-6


def test_parameters_come_back_from_crossing_hazards():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, 20_000)
    true = APGW(
        *(torch.from_numpy(p) for p in (0.5 * np.exp(0.3 * x), 0 * x + 1.0, np.exp(0.4 - 0.6 * x), 0 * x + 0.5))
    )
    event_time = true.sample(generator=torch.Generator().manual_seed(0)).numpy()
    end = rng.exponential(4, len(x))
    model = APGWRegressor().fit(x[:, None], np.minimum(event_time, end), event_time <= end)
    assert model.intercept_["phi"] == pytest.approx(np.log(0.5), abs=0.05)
    assert model.coef_["phi"] == pytest.approx([0.3], abs=0.05)
    assert model.intercept_["gamma"] == pytest.approx(0.4, abs=0.05)
    assert model.coef_["gamma"] == pytest.approx([-0.6], abs=0.05)
    assert model.kappa_ == pytest.approx(0.5, abs=0.1)


def test_scikit_learn_drives_it():
    rossi = load_rossi()
    X, time, event = rossi.drop(columns=["week", "arrest"]).to_numpy(float), rossi["week"].to_numpy(), rossi["arrest"]
    pipe = make_pipeline(StandardScaler(), APGWRegressor(kappa=1.0, power=False))
    pipe.fit(X, time, apgwregressor__event=event)
    assert pipe.predict(X) == pytest.approx(
        APGWRegressor(kappa=1.0, power=False).fit(X, time, event).predict(X), rel=1e-5
    )
    medians = cross_val_predict(pipe, X, time, cv=3, params={"apgwregressor__event": event.to_numpy()})
    assert medians.shape == (len(X),)
    search = GridSearchCV(APGWRegressor(power=False), {"kappa": [0.0, 1.0]}, cv=2).fit(X, time, event=event.to_numpy())
    assert search.best_params_["kappa"] in (0.0, 1.0)


def test_refusals_name_the_argument():
    X, time = [[0.0], [1.0], [2.0]], [1.0, 2.0, 3.0]
    with pytest.raises(NotFittedError):
        APGWRegressor().predict(X)
    with pytest.raises(ValueError, match=r"scale: expected one of 'phi', 'lam', 'both', got 'psi'"):
        APGWRegressor(scale="psi").fit(X, time)
    with pytest.raises(ValueError, match=r"kappa: expected a number > -1, got -1.0"):
        APGWRegressor(kappa=-1.0).fit(X, time)
    with pytest.raises(ValueError, match=r"power: expected one of False, True"):
        APGWRegressor(power="yes").fit(X, time)
    with pytest.raises(ValueError, match=r"event: expected at least one event"):
        APGWRegressor().fit(X, time, [0, 0, 0])
    with pytest.raises(ValueError, match="kappa"):
        APGW(kappa=-1.5, validate_args=True)  # other libraries turn the default off
    with pytest.raises(ValueError, match="support"):
        APGW(validate_args=True).log_prob(torch.tensor(-1.0))
    with pytest.raises(ValueError, match=r"input: expected log phi"):
        apgw_nll(torch.zeros(2, 3), torch.ones(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"time: expected shape \(2,\), got \(3,\)"):
        apgw_nll(torch.zeros(2, 4), torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"event: expected booleans of shape \(2,\), got torch.float32"):
        apgw_nll(torch.zeros(2, 4), torch.ones(2), torch.ones(2))
