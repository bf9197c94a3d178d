"""PRESTO against a conic solver, statsmodels' proportional odds, scikit-learn's logistic regression and scipy."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from lossary.weighting import PrestoOrdinalClassifier, presto_penalty

AT = np.arange(60)
X = np.column_stack([(7 * AT) % 17 - 8, (5 * AT) % 13 - 6, (11 * AT) % 19 - 9]) / 4
Y = np.digitize(X[:, 0] + X[:, 1] / 2 + ((13 * AT) % 23 - 11) / 4, [-1.0, 1.0, 2.5])  # 20, 20, 13 and 7 rows

# cvxpy 1.9.3 with Clarabel 0.11.1 on the same objective, log(1 - exp(-gap)) as an exponential cone, gaps of 1e-11:
# lam, base, objective, intercepts, slopes
CONIC = (
    (0.03, 1.0, 1.179149116, [-0.847780, 0.811119, 2.694664],
     [[-0.660763, -0.450177, 0.095968], [-0.730071, -0.297461, 0.095968], [-1.123073, -0.297461, 0.190100]]),
    (0.1, 1.0, 1.259078578, [-0.817750, 0.725495, 2.186814], [[-0.511054, -0.080263, 0.0]] * 3),
    (0.03, 0.0, 1.130410693, [-0.924738, 0.825345, 2.716275],
     [[-0.825323, -0.644029, 0.191202], [-0.825323, -0.387094, 0.191202], [-1.175869, -0.387094, 0.244354]]),
    (0.005, 0.5, 1.087874938, [-0.853309, 0.878073, 4.796731],
     [[-0.662484, -0.728818, 0.125464], [-0.785120, -0.251891, 0.125464], [-2.790723, -0.705738, 0.670640]]),
)  # fmt: skip


def objective(intercepts, slopes, x, y, lam, base=1.0):
    """As it is written, with scipy's logistic distribution."""
    below = stats.logistic.cdf(intercepts + x @ np.transpose(slopes))
    p = np.diff(np.column_stack([np.zeros(len(x)), below, np.ones(len(x))]), axis=1)[np.arange(len(x)), y]
    steps = np.diff(np.vstack([np.zeros((1, x.shape[1])), slopes]), axis=0) * x.std(axis=0)
    return -np.log(p).mean() + lam * (base * np.abs(steps[0]).sum() + np.abs(steps[1:]).sum())


@pytest.mark.parametrize(("lam", "base", "value", "intercepts", "slopes"), CONIC)
def test_the_fit_is_that_of_a_conic_solver(lam, base, value, intercepts, slopes):
    model = PrestoOrdinalClassifier(lam=lam, base=base).fit(X, Y)
    assert model.coef_ == pytest.approx(np.array(slopes), abs=1e-5)
    assert model.intercept_ == pytest.approx(np.array(intercepts), abs=1e-5)
    assert objective(model.intercept_, model.coef_, X, Y, lam, base) == pytest.approx(value, abs=1e-9)
    assert model.n_iter_ <= 8
    penalty = presto_penalty(torch.from_numpy(model.coef_ * X.std(axis=0)), base=base).item()
    if lam > 0.01:  # with less of it boundaries cross at some rows, outside their own category
        likelihood = -np.log(model.predict_proba(X)[AT, Y]).mean()
        assert likelihood + lam * penalty == pytest.approx(value, abs=1e-9)


def test_scipy_finds_nothing_lower():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 2)) * [1.0, 5.0]
    y = np.digitize(x[:, 0] + 0.1 * x[:, 1] + rng.logistic(size=80), [0.0, 1.5])
    model = PrestoOrdinalClassifier(lam=0.04).fit(x, y)

    def split(v):  # positive and negative parts of psi, in standard deviations
        return v[:2], ((v[2:6] - v[6:]).reshape(2, 2) / x.std(axis=0)).cumsum(axis=0)

    def smooth(v):
        intercepts, slopes = split(v)
        return objective(intercepts, slopes, x, y, 0.0) + 0.04 * v[2:].sum()

    start = np.concatenate([[0.0, 1.5], np.zeros(8)])
    found = minimize(smooth, start, bounds=[(None, None)] * 2 + [(0, None)] * 8, options={"ftol": 1e-15})
    assert objective(model.intercept_, model.coef_, x, y, 0.04) == pytest.approx(found.fun, abs=1e-7)
    assert model.coef_ == pytest.approx(split(found.x)[1], abs=2e-3)


def test_a_full_step_across_a_boundary_is_cut_back_to_the_optimum():
    """Outliers, of which the first full step would make boundaries cross. The slopes of the likelihood must balance
    the penalty: exactly where psi is not 0, at most where it is."""
    at, lam = np.arange(40), 0.01
    x = np.column_stack([1 / (((19 * at) % 41) / 20.5 - 1.01), ((3 * at) % 37 - 18) / 4])
    y = np.digitize(x[:, 0] + ((13 * at) % 23 - 11) / 8, [-0.5, 1.0])
    model, spread = PrestoOrdinalClassifier(lam=lam).fit(x, y), x.std(axis=0)
    assert model.n_iter_ <= 12

    def likelihood(v):
        return objective(v[:2], (v[2:].reshape(2, 2) / spread).cumsum(axis=0), x, y, 0.0)

    psi = np.diff(np.vstack([np.zeros((1, 2)), model.coef_]), axis=0) * spread
    v, h = np.concatenate([model.intercept_, psi.ravel()]), 1e-5
    slope = np.array([(likelihood(v + h * e) - likelihood(v - h * e)) / (2 * h) for e in np.eye(6)])
    assert slope[:2] == pytest.approx([0, 0], abs=1e-7)
    assert np.abs(slope[2:]).max() <= lam + 1e-7
    assert (slope[2:] + lam * np.sign(v[2:]))[v[2:] != 0] == pytest.approx(0, abs=1e-7)
    assert v[2:].any()


def test_a_large_penalty_on_differences_is_proportional_odds():
    """statsmodels 0.15.0, OrderedModel(y, x, distr="logit").fit(method="newton"), whose slopes have the other sign."""
    model = PrestoOrdinalClassifier(lam=100.0, base=0.0).fit(X, Y)
    assert model.coef_ == pytest.approx(-np.tile([0.87792462, 0.50391648, -0.20355286], (3, 1)), abs=1e-6)
    assert model.intercept_ == pytest.approx(np.array([-0.93987097, 0.83699228, 2.44361598]), abs=1e-6)
    assert 60 * objective(model.intercept_, model.coef_, X, Y, 0.0) == pytest.approx(68.38192118645732, abs=1e-7)


def test_a_large_penalty_on_everything_leaves_the_frequencies():
    model = PrestoOrdinalClassifier(lam=100.0).fit(X, Y)
    assert not model.coef_.any()
    assert model.predict_proba(X[:2]) == pytest.approx(np.tile(np.bincount(Y) / 60, (2, 1)))


def test_without_a_penalty_the_ends_cannot_be_beaten_by_common_slopes():
    free, shared = (PrestoOrdinalClassifier(lam=lam, base=0.0).fit(X, Y) for lam in (0.0, 100.0))
    assert objective(free.intercept_, free.coef_, X, Y, 0.0) < objective(shared.intercept_, shared.coef_, X, Y, 0.0)
    assert np.ptp(free.coef_, axis=0).min() > 0.01


def test_two_categories_are_logistic_regression_with_an_l1_penalty():
    y, scaled = Y >= 2, (X - X.mean(axis=0)) / X.std(axis=0)
    model = PrestoOrdinalClassifier(lam=0.02).fit(scaled, y)
    peer = LogisticRegression(C=1 / (60 * 0.02), l1_ratio=1, solver="saga", tol=1e-10, max_iter=10_000).fit(scaled, y)
    assert -model.coef_ == pytest.approx(peer.coef_, abs=1e-5)
    assert -model.intercept_ == pytest.approx(peer.intercept_, abs=1e-5)
    assert model.predict_proba(scaled) == pytest.approx(peer.predict_proba(scaled), abs=1e-5)


def test_units_and_names_of_the_categories_do_not_matter():
    named = np.array(["a ad", "b seen", "c click", "d bought"])[Y]
    plain, other = PrestoOrdinalClassifier(lam=0.03).fit(X, Y), PrestoOrdinalClassifier(lam=0.03)
    other.fit(X * [10.0, 1.0, 0.1] + 5, named)
    assert other.coef_ * [10.0, 1.0, 0.1] == pytest.approx(plain.coef_, abs=1e-7)
    assert other.predict(X * [10.0, 1.0, 0.1] + 5).tolist() == other.classes_[plain.predict(X)].tolist()


def test_probabilities_where_boundaries_cross():
    model = PrestoOrdinalClassifier(lam=0.005, base=0.5).fit(X, Y)
    far = np.array([[4.0, 0.0, 0.0], [0.0, 0.0, 40.0], [0.0, 0.0, -40.0]])
    below = stats.logistic.cdf(model.intercept_ + far @ model.coef_.T)
    assert (np.diff(below, axis=1) < 0).any()
    parts = [[a, max(b - a, 0), max(c - b, 0), 1 - c] for a, b, c in below]
    assert model.predict_proba(far) == pytest.approx(np.array([[p / sum(row) for p in row] for row in parts]))


def test_lambda_is_the_one_with_the_least_brier_score_on_held_out_folds():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(150, 3))
    y = np.digitize(x @ [2.0, -1.0, 0.5] + rng.logistic(size=150), [-0.5, 2.0])
    model = PrestoOrdinalClassifier(n_lambdas=4, cv=4).fit(x, y)
    small, largest = model.lam_ / 2, 200 * model.lam_  # around the first of the grid, at which nothing is left
    for _ in range(40):
        middle = (small * largest) ** 0.5
        some = PrestoOrdinalClassifier(lam=middle).fit(x, y).coef_.any()
        small, largest = (middle, largest) if some else (small, middle)
    scores = []
    for lam in (grid := largest * 10.0 ** -np.linspace(0, 2, 4)):
        p = cross_val_predict(PrestoOrdinalClassifier(lam=lam), x, y, cv=4, method="predict_proba")
        scores.append(((p - np.eye(3)[y]) ** 2).sum())
    assert model.lam_ == pytest.approx(grid[np.argmin(scores)], rel=1e-5)
    assert np.argmin(scores) == 2


def test_the_penalty_is_a_sum_of_steps_and_takes_a_stack():
    weight = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for base in (1.0, 0.25):
        got = presto_penalty(weight, base=base)
        for w, value in zip(weight.tolist(), got.tolist()):
            steps = sum(abs(w[k][j] - w[k - 1][j]) for k in (1, 2, 3) for j in range(3))
            assert value == pytest.approx(base * sum(map(abs, w[0])) + steps)
    assert torch.autograd.gradcheck(presto_penalty, weight)
    with pytest.raises(ValueError, match="weight: expected at least 2 dimensions"):
        presto_penalty(weight[0, 0])
    with pytest.raises(ValueError, match="base: expected a number >= 0"):
        presto_penalty(weight, base=-1.0)


def test_a_constant_feature_has_no_slope_and_separable_classes_stay_finite():
    x = np.column_stack([X, np.full(60, 3.0)])
    assert PrestoOrdinalClassifier(lam=0.03).fit(x, Y).coef_[:, 3].tolist() == [0.0] * 3
    model = PrestoOrdinalClassifier(lam=0.01).fit(AT[:, None], AT // 20)
    assert (model.predict(AT[:, None]) == AT // 20).all()
    assert np.isfinite(model.coef_).all()


def test_a_category_of_three_rows_is_cut_into_three_folds():
    y = np.digitize(AT, [30, 57])
    assert (
        PrestoOrdinalClassifier(n_lambdas=3).fit(X, y).lam_ == PrestoOrdinalClassifier(n_lambdas=3, cv=3).fit(X, y).lam_
    )


def test_refusals_and_warnings():
    with pytest.raises(ValueError, match="y: expected at least two classes, got one class"):
        PrestoOrdinalClassifier(lam=0.1).fit(X, 0 * Y)
    with pytest.raises(ValueError, match="lam: expected a number, as class 5 has one row only"):
        PrestoOrdinalClassifier().fit(X, np.append(Y[:-1], 5))
    for name, bad in (("lam", -1.0), ("base", -1.0), ("n_lambdas", 1), ("cv", 1), ("max_iter", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            PrestoOrdinalClassifier(**{name: bad}).fit(X, Y)
    with pytest.warns(ConvergenceWarning, match="PRESTO has not converged in 1 steps"):
        PrestoOrdinalClassifier(lam=0.001, max_iter=1).fit(X, Y)
