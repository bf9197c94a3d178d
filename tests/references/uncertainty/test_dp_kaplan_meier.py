"""Private survival curves against lifelines, a step-by-step release, exact likelihood ratios and probabilities."""

import math

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from lifelines.datasets import load_lung
from scipy import stats
from sklearn.exceptions import NotFittedError

from lossary.uncertainty import (
    DPKaplanMeierFitter,
    audited_privacy_loss,
    membership_inference_survival,
    time_indexed_laplace,
)

LUNG = load_lung()
TIME, EVENT = LUNG["time"].to_numpy(float), LUNG["status"].to_numpy()


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "setting", [{"mechanism": "time-indexed", "window": 1}, {"mechanism": "counts", "grid": np.unique(TIME)}]
)
def test_without_noise_both_are_lifelines_curve(setting):
    """Where every time of the data is a point of the grid."""
    theirs = KaplanMeierFitter().fit(TIME, EVENT)
    fitter = DPKaplanMeierFitter(epsilon=math.inf, **setting).fit(TIME, EVENT, generator=rng())
    assert fitter.predict(theirs.timeline) == pytest.approx(theirs.predict(theirs.timeline).to_numpy(), abs=1e-12)
    ours, expected = fitter.survival_function_, theirs.survival_function_
    assert (ours.index.name, list(ours.columns)) == (expected.index.name, list(expected.columns))
    assert ours["KM_estimate"].to_numpy() == pytest.approx(expected.loc[ours.index, "KM_estimate"].to_numpy())


def test_counts_by_hand():
    """Intervals (0, 10], (10, 20], beyond: events 2, 1; ends 1, 1; 2 beyond, whatever became of them."""
    time, event = [3, 10, 4, 11, 20, 21, 99], [1, 1, 0, 0, 1, 1, 0]
    fitter = DPKaplanMeierFitter(epsilon=math.inf, grid=[10, 20]).fit(time, event, generator=rng())
    assert fitter.survival_.tolist() == pytest.approx([5 / 7, 5 / 7 * 3 / 4])
    assert fitter.predict([0, 5, 20, 50]).tolist() == pytest.approx([1, 6 / 7, 15 / 28, 15 / 28])


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_counts_keep_their_promise_to_the_letter(epsilon):
    """One event or none among 30: S(1) = 1 is exp(epsilon) times likelier without it, from the noise's closed form."""
    n, base = 2000, [5.0] * 30
    fitter, g = DPKaplanMeierFitter(epsilon=epsilon, grid=[1.0]), rng()
    untouched = [
        np.mean([fitter.fit(t, generator=g).survival_[0] == 1 for _ in range(n)]) for t in (base, [*base, 0.5])
    ]
    expected = [1 / (1 + math.exp(-epsilon)), math.exp(-epsilon) / (1 + math.exp(-epsilon))]
    assert untouched == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(n))


def test_noise_on_counts_has_its_variance():
    """P(k) = tanh(epsilon / 2) exp(-epsilon |k|), seen in S where n is so large that S is linear in the counts."""
    fitter, g, n = DPKaplanMeierFitter(epsilon=0.5, grid=[1.0]), rng(), 100_000
    time = np.r_[np.full(n // 2, 0.5), np.full(n // 2, 5.0)]
    values = np.array([fitter.fit(time, generator=g).survival_[0] for _ in range(300)])
    k = np.arange(-200, 201)
    p = math.tanh(0.25) * np.exp(-0.5 * np.abs(k))
    ends = k.clip(min=0)  # nobody's observation ends before 1: that count is noise, cut at 0
    one, cut = (p * k**2).sum(), (p * ends**2).sum() - (p * ends).sum() ** 2
    assert one == pytest.approx(2 * math.exp(-0.5) / (1 - math.exp(-0.5)) ** 2)
    # S = (ends + beyond) / (events + ends + beyond), half of them each: a count moves it by 1 / 2n
    assert values.std() == pytest.approx(math.sqrt(2 * one + cut) / (2 * n), rel=0.15)


@pytest.mark.parametrize("schedule", ["index", "risk"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_release_step_by_step(schedule, clip, window, seed):
    survival, at_risk = np.array([0.99, 0.8, 0.7, 0.4, 0.35, 0.1]), np.array([40, 36, 30, 20, 9, 2])
    got = time_indexed_laplace(
        survival, at_risk, epsilon=2.0, schedule=schedule, clip=clip, window=window, generator=rng(seed)
    )
    noise, last, noisy = rng(seed).laplace(size=6), 1.0, []
    for j, s in enumerate(survival):
        scale = (1 / (j + 2) if schedule == "index" else at_risk[j] / 40) / 2
        value = s + scale * noise[j]
        last = min(max(value, 0.0), last) if clip else value
        noisy.append(last)
    half = window // 2
    expected = [np.mean(noisy[max(j - half, 0) : j + half + 1]) for j in range(6)]
    assert got == pytest.approx(expected)
    if clip:
        assert (np.diff(got) <= 0).all()


@pytest.mark.parametrize("schedule", ["index", "risk"])
def test_audit_is_the_largest_log_likelihood_ratio(schedule):
    """Of releasing exactly the curve without a record, with Laplace densities from scipy and curves from lifelines."""
    for seed, n in ((0, 5), (1, 5), (2, 5), (3, 15)):
        g = rng(seed)
        _check_audit(g.exponential(5, n).round(), g.random(n) < 0.7, schedule)


def _check_audit(time, event, schedule):
    times = np.unique(time[event])
    curve = KaplanMeierFitter().fit(time, event)
    survival = curve.predict(times).to_numpy()
    at_risk = curve.event_table.loc[times, "at_risk"].to_numpy()
    scale = (1 / (1 + np.arange(1, len(times) + 1)) if schedule == "index" else at_risk / at_risk[0]) / 3
    ratios = []
    for i in range(len(time)):
        other = KaplanMeierFitter().fit(np.delete(time, i), np.delete(event, i)).predict(times).to_numpy()
        density = [stats.laplace.logpdf(other, mean, scale).sum() for mean in (other, survival)]
        ratios.append(density[0] - density[1])
    loss = audited_privacy_loss(time, event, epsilon=3.0, schedule=schedule)
    assert loss == pytest.approx(max(ratios))
    assert audited_privacy_loss(time, event, epsilon=6.0, schedule=schedule) == pytest.approx(2 * loss)


def test_audit_by_hand():
    """S = 2/5; without an event 1/2, without an end of observation 1/4, and the noise's scale is 1/2."""
    assert audited_privacy_loss([1, 1, 1, 9, 9], [1, 1, 1, 0, 0], epsilon=1.0) == pytest.approx(0.15 / 0.5)


def test_published_release_loses_more_than_it_says_on_the_lung_data():
    assert audited_privacy_loss(TIME, EVENT, epsilon=1.0) > 1


def test_influence_is_the_largest_move():
    fitter = DPKaplanMeierFitter(epsilon=math.inf, mechanism="time-indexed", window=1)
    times = np.unique(TIME)
    got = membership_inference_survival(fitter, TIME[:40], EVENT[:40], times=times, generator=rng())
    whole = KaplanMeierFitter().fit(TIME[:40], EVENT[:40]).predict(times).to_numpy()
    for i in (0, 7, 39):
        other = KaplanMeierFitter().fit(np.delete(TIME[:40], i), np.delete(EVENT[:40], i)).predict(times).to_numpy()
        assert got[i] == pytest.approx(np.abs(whole - other).max())
    assert not hasattr(fitter, "survival_")


def test_ends_of_the_data():
    for setting in ({"mechanism": "time-indexed"}, {"grid": [5.0]}):  # nobody has the event: no times, or noise only
        fitter = DPKaplanMeierFitter(**setting).fit([1.0, 2.0], [0, 0], generator=rng())
        assert ((fitter.predict([0.0, 9.0]) >= 0) & (fitter.predict([0.0, 9.0]) <= 1)).all()
    assert audited_privacy_loss([1.0, 2.0], [0, 0], epsilon=1.0) == 0
    tiny = DPKaplanMeierFitter(epsilon=0.01, grid=np.arange(1, 50)).fit([3.0], generator=rng())
    assert ((tiny.survival_ >= 0) & (tiny.survival_ <= 1)).all()
    assert (np.diff(tiny.survival_) <= 0).all()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    draws = [DPKaplanMeierFitter(grid=[5.0]).fit(TIME, EVENT, generator=rng(3)).survival_ for _ in range(2)]
    assert np.array_equal(*draws)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_refusals_name_the_argument():
    with pytest.raises(NotFittedError):
        DPKaplanMeierFitter(grid=[1.0]).predict([1.0])
    with pytest.raises(ValueError, match=r"epsilon: expected a number > 0, got 0.0"):
        DPKaplanMeierFitter(epsilon=0.0, grid=[1.0]).fit(TIME, EVENT, generator=rng())
    with pytest.raises(ValueError, match=r"mechanism: expected one of 'counts', 'time-indexed', got 'laplace'"):
        DPKaplanMeierFitter(mechanism="laplace").fit(TIME, EVENT, generator=rng())
    for grid in (None, [2.0, 1.0], [0.0, 1.0], [], [1.0, math.inf]):
        with pytest.raises(ValueError, match=r"grid: expected increasing times above 0, fixed without looking"):
            DPKaplanMeierFitter(grid=grid).fit(TIME, EVENT, generator=rng())
    with pytest.raises(ValueError, match=r"window: expected an odd number, got 2"):
        DPKaplanMeierFitter(mechanism="time-indexed", window=2).fit(TIME, EVENT, generator=rng())
    with pytest.raises(ValueError, match=r"schedule: expected one of 'index', 'risk', got 'flat'"):
        audited_privacy_loss(TIME, EVENT, epsilon=1.0, schedule="flat")
    with pytest.raises(ValueError, match=r"epsilon: expected a number > 0, got -1.0"):
        audited_privacy_loss(TIME, EVENT, epsilon=-1.0)
    with pytest.raises(ValueError, match=r"at_risk: expected the curve's shape \(2,\), \(J,\), got \(3,\)"):
        time_indexed_laplace(np.array([0.5, 0.2]), np.array([3, 2, 1]), epsilon=1.0, generator=rng())
    with pytest.raises(ValueError, match=r"clip: expected one of False, True"):
        time_indexed_laplace(np.array([0.5]), np.array([3]), epsilon=1.0, clip="yes", generator=rng())
    with pytest.raises(ValueError, match=r"time: expected at least two records, got 1"):
        membership_inference_survival(DPKaplanMeierFitter(grid=[1.0]), [1.0], times=[1.0], generator=rng())
    with pytest.raises(ValueError, match=r"time: expected finite numbers >= 0, got -1"):
        DPKaplanMeierFitter(grid=[1.0]).fit([-1.0], generator=rng())
