"""The profile: every finding against planted trouble of known size, and silence on clean data."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brute
from scipy.special import expit

from lossary.compare.load import load
from lossary.compare.problem import Problem, lock
from lossary.compare.profile import disagreement, heavy_tails, imbalance, overlap_misfit, profile
from lossary.vocabulary import SYMPTOMS, fill


def problem(x, target, group=None):
    target = np.asarray(target)
    classes = tuple(map(str, np.unique(target))) if target.dtype == np.int64 else ()
    features = pd.DataFrame(x).rename(columns=str)
    return Problem("p", "p", features, target, "y", "classes" if classes else "real", classes, group)


def flipped(p, rate, kind, seed=0):
    """A share `rate` of the labels replaced: by any other class, or by the next one."""
    rng = np.random.default_rng(seed)
    target, classes = p.target.copy(), len(p.classes)
    rows = rng.permutation(len(p))[: round(rate * len(p))]
    shift = rng.integers(1, classes, len(rows)) if kind == "uniform" else 1
    target[rows] = (target[rows] + shift) % classes
    return replace(p, target=target)


def finding(found, symptom):
    return next(f for f in found.findings if f.symptom == symptom)


class TestImbalance:
    def test_by_hand(self):
        found = imbalance(problem({"x": np.arange(100.0)}, np.repeat([0, 1], [80, 20])), None)
        z, n, p = 1.959964, 100, 0.2
        centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
        assert found.value == 4.0
        assert found.low == pytest.approx((1 - high) / high, rel=1e-5)
        assert found.high == pytest.approx((1 - low) / low, rel=1e-5)
        assert not found.raised  # 4, but it could well be 2.5

    def test_raised_where_it_is_certain(self):
        found = imbalance(problem({"x": np.arange(1000.0)}, np.repeat([0, 1], [800, 200])), None)
        assert found.low > 3
        assert found.raised
        assert "'0' has 800 rows and '1' 200" in found.means

    def test_many_balanced_classes_raise_nothing(self):
        """The extremes of thirty equal classes of about twenty differ by chance, up to 3 to 1."""
        rng = np.random.default_rng(0)
        ratios = []
        for _ in range(200):
            target = np.concatenate([np.arange(30), rng.integers(0, 30, 570)])
            found = imbalance(problem({"x": np.arange(600.0)}, target), None)
            ratios.append(found.value)
            assert not found.raised
        assert max(ratios) > 3

    def test_not_for_real_targets(self):
        assert imbalance(problem({"x": np.arange(60.0)}, np.arange(60.0)), None) is None


@pytest.fixture(scope="module")
def digits():
    p = load("digits")
    return p.rows(lock(p)[0])


class TestDisagreement:
    @pytest.mark.parametrize(
        ("rate", "kind"), [(0.0, "uniform"), (0.1, "uniform"), (0.2, "uniform"), (0.4, "uniform"), (0.4, "pair")]
    )
    def test_tracks_flipped_digits(self, digits, rate, kind):
        found = disagreement(flipped(digits, rate, kind), np.random.default_rng(0))
        assert found.value == pytest.approx(rate, abs=0.05)
        assert found.low <= rate <= found.high + 0.01
        # Pairwise flips at 40% are nearly what two overlapping classes look like: there the low end may be 0.
        assert found.raised or rate == 0 or kind == "pair"
        assert ("contradict both models" in found.means) == found.raised

    @pytest.mark.parametrize("distance", [0.7, 1.5])
    def test_overlap_is_not_noise(self, distance):
        """Two Gaussians whose best rule errs in 36% or 23% of the rows: every label is right."""
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 1500)
        x = rng.normal(size=(1500, 4))
        x[:, 0] += distance * y
        found = disagreement(problem(x, y), np.random.default_rng(0))
        assert found.high > 0.1  # what confident learning counts
        assert found.low < 0.01
        assert not found.raised
        assert "no evidence of wrong labels" in found.means

    def test_overlap_and_noise_together(self):
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 3000)
        x = rng.normal(size=(3000, 4))
        x[:, 0] += 2.5 * y
        found = disagreement(flipped(problem(x, y), 0.2, "uniform"), np.random.default_rng(0))
        assert found.value == pytest.approx(0.2, abs=0.05)
        assert found.raised

    def test_equal_rows_do_not_hide_in_training(self):
        """Every row doubled: were copies parted by the folds, randomised trees would find every wrong label right."""
        noisy = flipped(load("breast-cancer"), 0.2, "uniform")
        doubled = noisy.rows(np.repeat(np.arange(len(noisy)), 2))
        found = disagreement(doubled, np.random.default_rng(0))
        assert found.value == pytest.approx(0.2, abs=0.05)

    def test_many_rows_are_sampled_and_many_classes_refused(self):
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 6000)
        found = disagreement(problem({"x": rng.normal(size=6000) + 6 * y}, y), rng)
        assert re.search(r"on 5,00\d of 6,000 rows", found.method)
        crowd = disagreement(problem({"x": rng.normal(size=404)}, np.arange(404) % 101), rng)
        assert crowd == "Label disagreement was not measured: 101 classes, at most 100 are taken."

    def test_rare_classes(self):
        rng = np.random.default_rng(0)
        y = np.concatenate([np.zeros(200), np.ones(100), [2, 2, 3, 3]]).astype(np.int64)
        found = disagreement(problem(rng.normal(size=(304, 3)) + y[:, None], y), rng)
        assert 0 <= found.low <= found.value <= found.high <= 1


class TestOverlapMisfit:
    def draw(self, rows, rate, seed, slope=1.0):
        """Scores of a model, and labels: its choice with probability (1 - rate) sigmoid(slope * score)."""
        rng = np.random.default_rng(seed)
        score = abs(rng.normal(0, 3, rows))
        right = rng.random(rows) < (1 - rate) * expit(slope * score)
        return np.column_stack([expit(score), expit(-score)]), np.where(right, 0, 1), score

    def test_against_brute_force(self):
        probability, label, score = self.draw(150, 0.2, 0)
        score = np.minimum(score, np.log(0.999 / 0.001))
        for rate in (0.0, 0.15):

            def loss(curve, rate=rate):
                p = np.clip((1 - rate) * expit(curve[0] + curve[1] * score), 1e-12, 1 - 1e-12)
                return -np.where(label == 0, np.log(p), np.log1p(-p)).sum()

            best = brute(loss, ((-3, 3), (1e-9, 5)), Ns=40, full_output=True)[1]
            assert overlap_misfit(probability, label, np.array([rate]))[0] == pytest.approx(best, abs=1e-4)

    @pytest.mark.parametrize("slope", [1.0, 0.5, 2.0])
    def test_recovers_the_rate(self, slope):
        """However over- or underconfident the model is."""
        probability, label, _ = self.draw(20000, 0.15, 1, slope)
        rates = np.linspace(0, 0.4, 81)
        assert rates[overlap_misfit(probability, label, rates).argmin()] == pytest.approx(0.15, abs=0.03)

    def test_the_bound_covers(self):
        """The lower 95% bound lies above the true rate in about one sample of twenty, here two of forty."""
        rates = np.linspace(0, 0.3, 16)
        for truth in (0.0, 0.1):
            above = 0
            for seed in range(40):
                probability, label, _ = self.draw(400, truth, seed)
                misfit = overlap_misfit(probability, label, rates)
                above += rates[np.argmax(misfit <= misfit.min() + 1.35)] > truth + 1e-9
            assert above <= 6


class TestHeavyTails:
    def test_by_hand(self):
        y = np.concatenate([np.zeros(98), [7.0, -7.0]])
        found = heavy_tails(problem({"x": np.arange(100.0)}, y), np.random.default_rng(0))
        assert found.value == pytest.approx(100 / 2 - 3)  # two of a hundred at +-7: m4 / m2^2 = n / 2
        assert found.low < found.value
        huge = heavy_tails(problem({"x": np.arange(100.0)}, y * 1e30), np.random.default_rng(0))
        assert huge.value == pytest.approx(found.value)

    @pytest.mark.parametrize(
        ("draw", "raised"), [("normal", False), ("uniform", False), ("standard_t", True), ("laplace", True)]
    )
    def test_laws(self, draw, raised):
        rng = np.random.default_rng(0)
        y = rng.standard_t(2.5, 2000) if draw == "standard_t" else getattr(rng, draw)(size=2000)
        assert heavy_tails(problem({"x": np.arange(2000.0)}, y), rng).raised is raised

    def test_not_for_classes(self):
        assert heavy_tails(problem({"x": np.arange(60.0)}, np.arange(60) % 2), None) is None


class TestProfile:
    def test_facts(self, digits):
        group = np.arange(len(digits)) // 10
        found = profile(replace(digits, group=group), np.arange(300))
        assert (found.num_samples, found.num_features, found.num_classes, found.num_groups) == (300, 61, 10, 30)
        assert sum(found.class_counts) == 300
        assert {f.symptom for f in found.findings} == {"class-imbalance", "label-noise"} <= set(SYMPTOMS)
        assert found.label_noise == finding(found, "label-noise").value

        def part(*, num_classes, class_counts, label_noise=0.5):
            """Takes facts by name."""

        assert fill(part, found.facts()) == {
            "num_classes": 10,
            "class_counts": found.class_counts,
            "label_noise": found.label_noise,
        }

    def test_real_target(self):
        p = load("diabetes")
        found = profile(p, lock(p)[0])
        assert (found.num_classes, found.class_counts, found.label_noise, found.num_groups) == (None, (), None, None)
        assert [f.symptom for f in found.findings] == ["heavy-tails"]
        assert not finding(found, "heavy-tails").raised

    def test_real_trouble(self):
        p = load("yeast")
        found = profile(p, lock(p)[0])
        assert finding(found, "class-imbalance").raised
        assert finding(found, "class-imbalance").value == pytest.approx(1321 / 163, rel=0.02)
        assert not finding(found, "label-noise").raised

    @pytest.mark.parametrize("name", ["breast-cancer", "wine"])
    def test_clean_data_raise_nothing(self, name):
        p = load(name)
        found = profile(p, lock(p)[0])
        assert finding(found, "label-noise").high < 0.02
        assert not any(f.raised for f in found.findings)

    def test_sees_the_given_rows_alone(self):
        p = load("wine")
        rows, others = lock(p)
        features = p.features.copy()
        features.loc[others] = 1e6
        target = p.target.copy()
        target[others] = 0
        spoilt = replace(p, features=features, target=target)
        assert profile(p, rows, seed=1) == profile(spoilt, rows, seed=1)

    def test_text_and_gaps(self):
        rng = np.random.default_rng(0)
        x = pd.DataFrame({"a": rng.normal(size=120), "b": rng.choice(["u", "v", "w"], 120)})
        x.loc[::7, "a"] = np.nan
        x.loc[::5, "b"] = None
        found = profile(problem(x, rng.normal(size=120)), np.arange(100))
        assert found.num_features == 6  # a, a is missing, three values of b, b is missing
