"""The profile: every finding against planted trouble of known size, and silence on clean data."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brute
from scipy.special import expit
from scipy.stats import binom, ks_2samp, norm
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from lossary.compare.load import load
from lossary.compare.problem import Problem, lock
from lossary.compare.profile import LEVEL, profile
from lossary.compare.profile.errors import (
    calibration,
    group_gaps,
    residual_tails,
    target_tails,
    uneven_errors,
)
from lossary.compare.profile.fits import Fits, Part, Seen, _evenly
from lossary.compare.profile.labels import disagreement, imbalance, missing_positives, overlap_misfit, unlabelled
from lossary.compare.profile.rows import copies, strange_rows
from lossary.compare.profile.shift import _area_error, _areas, _distance, _single, shift
from lossary.compare.profile.size import _enough, few_labels, redundancy
from lossary.compare.statistics import holm
from lossary.vocabulary import SYMPTOMS, fill
from tests.compare.half_samples import clean, profiles


def problem(x, target, task=None, **more):
    target = np.asarray(target)
    task = task or ("classes" if target.dtype == np.int64 else "real")
    names = range(target.shape[1]) if task == "multilabel" else () if task == "real" else np.unique(target)
    return Problem("p", "p", pd.DataFrame(x).rename(columns=str), target, "y", task, tuple(map(str, names)), **more)


def look(p, seed=0):
    """All rows of it, those of a test aside."""
    rows = np.arange(len(p)) if p.test is None else np.setdiff1d(np.arange(len(p)), p.test)
    arrivals = None if p.test is None else p.rows(p.test)
    return Seen(p.rows(rows), rows, len(p), arrivals, seed)


def alarm(measure):
    """Whether it would be raised if it were the only one."""
    return measure.p <= LEVEL


def fitted(p, prediction, name="a model"):
    """As if a model had made these predictions."""
    rows, target = np.arange(len(p)), p.target
    if p.task == "real":
        target = target / target.std()
        prediction = prediction / p.target.std()
    parts = (Part(rows, rows, np.zeros((len(p), 1), np.float32), np.zeros((len(p), 1), np.float32)),)
    seen = look(p)
    vars(seen)["fits"] = Fits(p, rows, target, np.arange(p.outputs), (parts,), {name: np.asarray(prediction)[None]}, 0)
    return seen


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
        found = imbalance(look(problem({"x": np.arange(100.0)}, np.repeat([0, 1], [80, 20]))))
        z, n, p = 1.959964, 100, 0.2
        centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
        assert found.value == 4.0
        assert found.low == pytest.approx((1 - high) / high, rel=1e-5)
        assert found.high == pytest.approx((1 - low) / low, rel=1e-5)
        assert found.p == pytest.approx(2 * norm.cdf((0.2 - 0.25) / np.sqrt(0.25 * 0.75 / 100)))
        assert not alarm(found)  # 4, but it could well be 2.5
        assert found.picture == {"kind": "counts", "names": ["0", "1"], "values": [80, 20]}

    @pytest.mark.parametrize("small", range(10, 26))
    def test_p_and_the_interval_agree(self, small):
        found = imbalance(look(problem({"x": np.arange(100.0)}, np.repeat([0, 1], [100 - small, small]))))
        assert alarm(found) == (found.low > 3)

    def test_raised_where_it_is_certain(self):
        found = imbalance(look(problem({"x": np.arange(1000.0)}, np.repeat([0, 1], [800, 200]))))
        assert found.low > 3
        assert alarm(found)
        assert "'0' has 800 rows and '1' 200" in found.alarm

    def test_many_balanced_classes_raise_nothing(self):
        """The extremes of thirty equal classes of about twenty differ by chance, up to 3 to 1."""
        rng = np.random.default_rng(0)
        ratios = []
        for _ in range(200):
            target = np.concatenate([np.arange(30), rng.integers(0, 30, 570)])
            found = imbalance(look(problem({"x": np.arange(600.0)}, target)))
            ratios.append(found.value)
            assert not alarm(found)
        assert max(ratios) > 3

    def test_labels(self):
        target = np.zeros((200, 3), dtype=np.int64)
        target[:150, 0], target[:60, 1], target[:15, 2] = 1, 1, 1
        found = imbalance(look(problem({"x": np.arange(200.0)}, target, "multilabel")))
        assert (found.value, found.title) == (10.0, "Label imbalance")
        assert alarm(found)

    def test_not_for_real_targets(self):
        assert imbalance(look(problem({"x": np.arange(60.0)}, np.arange(60.0)))) is None


@pytest.fixture(scope="module")
def digits():
    p = load("digits")
    return p.rows(lock(p)[0])


class TestDisagreement:
    @pytest.mark.parametrize("kind", ["uniform", "pair"])
    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.4])
    def test_tracks_flipped_digits(self, digits, rate, kind):
        found = disagreement(look(flipped(digits, rate, kind)))
        assert found.value == pytest.approx(rate, abs=0.05)
        assert found.low <= rate <= found.high + 0.01
        # Pairwise flips at 40% are nearly what two overlapping classes look like: there the low end may be 0.
        assert alarm(found) == (rate > 0) or (rate, kind) == (0.4, "pair")

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["uniform", "pair"])
    def test_tracks_whichever_labels_were_flipped(self, digits, kind):
        for seed in range(1, 6):
            found = disagreement(look(flipped(digits, 0.4, kind, seed), seed))
            assert found.value == pytest.approx(0.4, abs=0.05)

    @pytest.mark.parametrize("distance", [0.7, 1.5])
    def test_overlap_is_not_noise(self, distance):
        """Two Gaussians whose best rule errs in 36% or 23% of the rows: every label is right."""
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 1500)
        x = rng.normal(size=(1500, 4))
        x[:, 0] += distance * y
        found = disagreement(look(problem(x, y)))
        assert found.high > 0.1  # what confident learning counts
        assert found.low < 0.01
        assert not alarm(found)
        assert "no evidence of wrong labels" in found.calm

    def test_overlap_and_noise_together(self):
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 3000)
        x = rng.normal(size=(3000, 4))
        x[:, 0] += 2.5 * y
        found = disagreement(look(flipped(problem(x, y), 0.2, "uniform")))
        assert found.value == pytest.approx(0.2, abs=0.05)
        assert alarm(found)

    def test_levels_in_order(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2000, 4))
        level = np.digitize(x[:, 0], (-0.7, 0.7))
        assert not alarm(disagreement(look(problem(x, level, "ordinal"))))
        found = disagreement(look(flipped(problem(x, level, "ordinal"), 0.2, "uniform")))
        assert found.value == pytest.approx(0.2, abs=0.05)
        assert alarm(found)

    def test_equal_rows_do_not_hide_in_training(self):
        """Every row doubled: were copies parted by the folds, randomised trees would find every wrong label right."""
        noisy = flipped(load("breast-cancer"), 0.2, "uniform")
        doubled = noisy.rows(np.repeat(np.arange(len(noisy)), 2))
        found = disagreement(look(doubled))
        assert found.value == pytest.approx(0.2, abs=0.05)

    def test_many_rows_are_sampled(self):
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 6000)
        found = disagreement(look(problem({"x": rng.normal(size=6000) + 6 * y}, y)))
        assert re.search(r"on 5,00\d of 6,000 rows", found.method)

    def test_rare_classes(self):
        rng = np.random.default_rng(0)
        y = np.concatenate([np.zeros(200), np.ones(100), [2, 2, 3, 3]]).astype(np.int64)
        found = disagreement(look(problem(rng.normal(size=(304, 3)) + y[:, None], y)))
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


class TestMissingLabels:
    @pytest.mark.parametrize("gone", [0.0, 0.3])
    def test_labels_that_were_taken_away(self, gone):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1500, 8))
        full = (x[:, :5] + 0.4 * rng.normal(size=(1500, 5)) > 0.7).astype(np.int64)
        target = full * (rng.random(full.shape) >= gone)
        found = missing_positives(look(problem(x, target, "multilabel")))
        assert found.value == pytest.approx(gone, abs=0.06)
        assert alarm(found) == (gone > 0)
        assert f"{(target.sum(1) == 0).sum()} of 1,500 rows carry no label at all" in found.calm
        assert "no single row can tell" in found.alarm
        assert len(found.picture["values"]) == 5

    @pytest.mark.parametrize("kind", ["positive-unlabelled", "both ways", "clean"])
    def test_two_classes(self, kind):
        """Only what is missing on one side is missing labels; on both sides it is wrong ones."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1500, 6))
        y = (x[:, :3].sum(1) + 0.3 * rng.normal(size=1500) > 0.8).astype(np.int64)
        seen = {"clean": y, "positive-unlabelled": y * (rng.random(1500) >= 0.3)}.get(kind)
        found = missing_positives(look(problem(x, y ^ (rng.random(1500) < 0.3) if seen is None else seen)))
        assert alarm(found) == (kind == "positive-unlabelled")
        if alarm(found):
            assert found.value == pytest.approx(0.3, abs=0.06)

    def test_overlap_is_not_missing(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1500, 6))
        target = (x[:, :4] + 1.5 * rng.normal(size=(1500, 4)) > 0.7).astype(np.int64)
        assert not alarm(missing_positives(look(problem(x, target, "multilabel"))))

    def test_too_rare(self):
        target = np.zeros((100, 2), dtype=np.int64)
        target[:5] = 1
        said = missing_positives(look(problem(np.random.default_rng(0).normal(size=(100, 2)), target, "multilabel")))
        assert said == "Missing labels were not measured: every label is in fewer than 30 rows."
        few = problem(np.random.default_rng(0).normal(size=(100, 2)), (np.arange(100) < 20).astype(np.int64))
        assert missing_positives(look(few)) == "Missing labels were not measured: a class has fewer than 30 rows."

    def test_rows_without_a_target(self, tmp_path):
        frame = pd.DataFrame({"x": np.sin(np.arange(300.0)), "y": ["up", "down"] * 150})
        frame.loc[:59, "y"] = None
        frame.to_csv(tmp_path / "f.csv", index=False)
        p = load(tmp_path / "f.csv", target="y")
        found = unlabelled(look(p))
        assert found.value == 60 / 300
        z = 1.959964
        centre, half = (
            (0.2 + z * z / 600) / (1 + z * z / 300),
            z * np.sqrt(0.16 / 300 + z * z / 360000) / (1 + z * z / 300),
        )
        assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
        assert found.p == pytest.approx(binom.sf(59, 300, 0.05))
        assert unlabelled(look(problem({"x": np.arange(60.0)}, np.arange(60.0)))) is None


class TestCopies:
    def test_counts(self):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(200, 3)), rng.integers(0, 2, 200)
        x[100:110], y[100:110] = x[:10], y[:10]
        x[110], y[110] = x[0], y[0]
        found = copies(look(problem(x, y)))
        assert found.value == 11 / 200
        assert found.picture["values"] == [180 - 1 + 0, 9, 1]
        assert found.p == pytest.approx(binom.sf(10, 200, 0.01))
        assert alarm(found)
        assert found.alarm.endswith("Splits keep rows with equal features together.")
        apart = copies(look(problem(x, y, group=np.arange(200) // 100)))  # copies in another group
        assert "a split may put on the other side, which flatters" in apart.alarm

    def test_coincidences_in_coarse_columns_are_no_copies(self):
        rng = np.random.default_rng(0)
        found = copies(look(problem(rng.integers(0, 12, size=(1000, 2)), rng.integers(0, 2, 1000))))
        assert found.value > 0.5
        assert not alarm(found)

    def test_none(self):
        assert copies(look(problem({"x": np.arange(60.0)}, np.arange(60.0)))).value == 0


class TestStrangeRows:
    @pytest.mark.parametrize("rows", [200, 2000])
    @pytest.mark.parametrize("task", ["classes", "real"])
    def test_finds_the_planted_ones(self, rows, task):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(rows, 8))
        y = x[:, 7] + rng.normal(size=rows)
        planted = rng.permutation(rows)[: rows // 50]
        x[planted, 2:5] += 12
        found = strange_rows(look(problem(x, (y > 0).astype(np.int64) if task == "classes" else y)))
        assert found.value == len(planted) / rows
        assert alarm(found)
        named = re.search(r"The furthest: rows ([\d, ]+)\.", found.alarm)[1]
        assert {int(row) - 1 for row in named.split(", ")} <= set(planted.tolist())
        picture = found.picture
        beyond = [
            n for edge, n in zip(picture["edges"], picture["counts"], strict=False) if edge >= picture["cut"] - 1e-9
        ]
        assert sum(beyond) == len(planted)
        assert sum(picture["counts"]) == rows

    def test_a_tenth_of_the_rows_do_not_hide_each_other(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1000, 8))
        x[:100, 2] += 15
        assert strange_rows(look(problem(x, x[:, 0]))).value == pytest.approx(0.1, abs=0.005)

    def test_pixels_that_are_nearly_always_black(self, digits):
        assert strange_rows(look(digits)).value == 0

    @pytest.mark.parametrize("law", ["lognormal", "laplace", "poisson", "rare marks", "uniform"])
    def test_ordinary_tables(self, law):
        """Heavy columns, counts, and columns that are nearly always 0."""
        rng = np.random.default_rng(0)
        draw = {"poisson": lambda: rng.poisson(1.0, (1000, 8)), "rare marks": lambda: rng.random((1000, 8)) < 0.01}
        x = draw.get(law, lambda: getattr(rng, law)(size=(1000, 8)))().astype(float)
        x[:, 0] = rng.normal(size=1000)
        assert not alarm(strange_rows(look(problem(x, rng.normal(size=1000)))))

    def test_names_rows_by_their_id(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(300, 3))
        x[[7, 70, 77]] += 40
        ids = np.array([f"r{row}" for row in range(300)], dtype=object)
        found = strange_rows(look(problem(x, rng.normal(size=300), ids=ids)))
        assert set(re.search(r"rows (.*?)\.", found.alarm[found.alarm.index("furthest") :])[1].split(", ")) == {
            "r7", "r70", "r77",
        }  # fmt: skip


class TestShift:
    def moved(self, rows, how):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(rows, 6))
        late = np.arange(rows * 2 // 3, rows)
        if how == "mean":
            x[late, 3] += 0.7
        elif how == "spread":
            x[late, 3] *= 2
        elif how == "together":
            x[late, 3] = 0.8 * x[late, 4] + 0.6 * x[late, 3]
        frame = pd.DataFrame(x).rename(columns=str)
        if how == "text":
            frame["6"] = np.where(rng.random(rows) < np.where(np.arange(rows) >= late[0], 0.6, 0.3), "a", "b")
        return problem(frame, (x[:, 0] > 0).astype(np.int64)), late

    @pytest.mark.parametrize(
        ("how", "column"), [("mean", "3"), ("spread", "3"), ("together", None), ("text", "6"), ("none", None)]
    )
    def test_between_files(self, how, column):
        p, late = self.moved(1500, how)
        found = shift(look(replace(p, test=late)))
        assert alarm(found) == (how != "none")
        assert "999 permutations" in found.method
        if how == "none":
            assert found.low < 0.5 < found.high
        else:
            assert found.low > 0.5
            assert found.p == 1 / 1000  # none of 999 as good
            told = f"tells them apart: {column!r}." if column else "No single column tells them apart"
            assert told in found.alarm
            assert column in (None, found.picture["names"][0])

    def test_over_time(self):
        rng = np.random.default_rng(0)
        p, _ = self.moved(1500, "mean")
        when = rng.permutation(1500)
        p = replace(p.rows(when), time=when.astype(float))
        found = shift(look(p))
        assert found.title == "Shift between early rows and late rows"
        assert alarm(found)
        assert not alarm(shift(look(replace(p, time=rng.random(1500)))))

    def test_neither_time_nor_test(self):
        assert shift(look(problem({"x": np.arange(60.0)}, np.arange(60.0)))) is None

    def test_groups_count_once(self):
        """Forty groups, each with a mean of its own: rows differ between files, but groups do not."""
        rng = np.random.default_rng(0)
        group = np.repeat(np.arange(80), 20)
        x = rng.normal(size=(80, 3))[group] + 0.1 * rng.normal(size=(1600, 3))
        p = problem(x, rng.integers(0, 2, 1600), group=group, test=np.arange(800, 1600))
        found = shift(look(p))
        assert "40 search rows and 40 test rows" in found.method
        assert not alarm(found)
        assert alarm(shift(look(replace(p, group=None))))
        few = replace(p, group=group // 8)
        assert shift(look(few)) == (
            "Shift between search rows and test rows was not measured: 5 independent rows on one side, at least 30 are "
            "taken."
        )

    def test_p_holds_its_level(self):
        """On rows of one law, p below 10% in 7 of 100 draws; from 20 on, one would doubt it at 0.1%."""
        rng = np.random.default_rng(0)
        side = np.repeat([0.0, 1.0], (60, 40))
        below = 0
        for _ in range(100):
            x = rng.standard_t(3, (100, 4))
            dealt = np.column_stack([side, *(rng.permutation(side) for _ in range(99))])
            areas = _areas(x, dealt, rng)
            below += (1 + (areas[1:] >= areas[0]).sum()) / 100 <= 0.1
        assert below < binom.isf(0.001, 100, 0.1)

    def test_the_classifier_is_ridge_regression_refitted(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(200, 5))
        x -= x.mean(0)
        dealt = rng.integers(0, 2, (200, 3)).astype(float)
        fold = np.random.default_rng(1).permutation(200) % 5
        expected = []
        for column in dealt.T:
            areas = []
            for number in range(5):
                train, test = fold != number, fold == number
                # Without an intercept on centred sides; a common shift of all predictions ranks alike.
                model = Ridge(alpha=0.1 * train.sum(), fit_intercept=False)
                model.fit(x[train], column[train] - column[train].mean())
                areas.append(roc_auc_score(column[test], model.predict(x[test])))
            expected.append(np.mean(areas))
        assert _areas(x, dealt, np.random.default_rng(1)) == pytest.approx(expected)

    def test_distances(self):
        rng = np.random.default_rng(0)
        values = pd.Series(rng.normal(size=60).round(1))
        side = (np.arange(60) >= 25).astype(float)
        weight = (side / side.sum() - (1 - side) / (1 - side).sum())[:, None]
        expected = ks_2samp(values[side == 1], values[side == 0]).statistic
        assert _distance(values, weight)[0] == pytest.approx(expected)
        text = pd.Series(np.where(side == 1, "a", np.where(np.arange(60) < 5, "b", "a")))
        assert _distance(text, weight)[0] == pytest.approx(5 / 25)

    def test_area_error(self):
        """Hanley and McNeil's formula, as MedCalc gives it for 0.8 with 30 and 40 cases."""
        q1, q2 = 0.8 / 1.2, 2 * 0.64 / 1.8
        by_hand = np.sqrt((0.16 + 29 * (q1 - 0.64) + 39 * (q2 - 0.64)) / 1200)
        assert _area_error(0.8, 30, 40) == pytest.approx(by_hand)

    def test_single(self):
        rows = _single(np.array([3, 3, 3, 1, 0, 0]), np.random.default_rng(0))
        assert len(rows) == 3
        assert {3} < set(rows.tolist())

    def test_test_targets_are_not_looked_at(self):
        p, late = self.moved(300, "mean")
        other = p.target.copy()
        other[late] = 1 - other[late]
        rows = np.setdiff1d(np.arange(300), late)
        first, second = (profile(replace(p, target=y, test=late), rows) for y in (p.target, other))
        assert first == second
        assert any("features alone, no target" in f.method for f in first.findings)


class TestTails:
    def test_by_hand(self):
        y = np.concatenate([np.zeros(98), [7.0, -7.0]])
        found = target_tails(look(problem({"x": np.arange(100.0)}, y)))
        assert found.value == pytest.approx(100 / 2 - 3)  # two of a hundred at +-7: m4 / m2^2 = n / 2
        assert found.low < found.value
        huge = target_tails(look(problem({"x": np.arange(100.0)}, y * 1e30)))
        assert huge.value == pytest.approx(found.value)

    @pytest.mark.parametrize(
        ("draw", "raised"), [("normal", False), ("uniform", False), ("standard_t", True), ("laplace", True)]
    )
    def test_laws(self, draw, raised):
        rng = np.random.default_rng(0)
        y = rng.standard_t(2.5, 2000) if draw == "standard_t" else getattr(rng, draw)(size=2000)
        assert alarm(target_tails(look(problem({"x": np.arange(2000.0)}, y)))) is raised

    def test_of_the_errors_alone(self):
        """A light target with heavy noise, and a heavy target that the columns explain."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1000, 4))
        noisy = look(problem(x, 8 * x[:, 0] + rng.standard_t(2.2, 1000)))
        assert alarm(residual_tails(noisy))
        assert not alarm(target_tails(noisy))
        x[:, 0] = rng.laplace(size=1000) * 3
        explained = look(problem(x, 3 * x[:, 0] + rng.normal(size=1000)))
        assert not alarm(residual_tails(explained))
        assert alarm(target_tails(explained))

    def test_not_for_classes(self):
        assert target_tails(look(problem({"x": np.arange(60.0)}, np.arange(60) % 2))) is None


class TestUnevenErrors:
    @pytest.mark.parametrize("strength", [0.0, 0.5])
    def test_spread_that_a_column_tells(self, strength):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2000, 5))
        found = uneven_errors(look(problem(x, x[:, 0] + rng.normal(size=2000) * np.exp(strength * x[:, 3]))))
        fifths = np.array_split(np.exp(strength * norm.ppf((np.arange(20000) + 0.5) / 20000)), 5)
        assert found.low < fifths[-1].mean() / fifths[0].mean() < found.high
        assert alarm(found) == (strength > 0)

    def test_a_slight_slope_is_no_alarm(self):
        """A third more in the noisiest fifth: beyond doubt, but below what is raised."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(4000, 3))
        found = uneven_errors(look(problem(x, x[:, 0] + rng.normal(size=4000) * np.exp(0.1 * x[:, 1]))))
        assert 1 < found.low < found.high < 1.6
        assert not alarm(found)

    def test_heavy_noise_does_not_drown_it(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(600, 5))
        assert alarm(uneven_errors(look(problem(x, x[:, 0] + rng.standard_t(3, 600) * np.exp(0.6 * x[:, 3])))))

    def test_nothing_left_to_explain(self):
        x = np.random.default_rng(0).normal(size=(100, 2))
        p = problem(x, x[:, 0])
        assert uneven_errors(fitted(p, p.target)) is None
        assert residual_tails(fitted(p, p.target)) is None


class TestCalibration:
    def test_by_hand(self):
        """Always 90% sure, right in 70 of 100 rows."""
        p = problem({"x": np.arange(100.0)}, np.repeat([0, 1], [70, 30]))
        found = calibration(fitted(p, np.tile([0.9, 0.1], (100, 1))))
        gaps = [abs(10 * 0.9 - (10 if place < 7 else 0)) / 100 for place in range(10)]
        assert found.value == pytest.approx(sum(gaps))
        z = (0.2 - 0.02) / np.sqrt(0.21 / 100)
        assert found.p == pytest.approx(max(1 / 1000, 2 * norm.sf(z)), rel=1e-6)
        assert alarm(found)
        assert "mean confidence of a model is 90%, and 70% are right" in found.alarm

    def test_of_a_calibrated_model(self):
        """About 5% of the 95% intervals of its error miss what chance alone would give; nothing is raised."""
        rng = np.random.default_rng(0)
        for _ in range(20):
            sure = rng.uniform(0.5, 1, 500)
            y = (rng.random(500) < sure).astype(np.int64)
            found = calibration(fitted(problem({"x": np.arange(500.0)}, y), np.column_stack([1 - sure, sure])))
            assert not alarm(found)
            by_chance = float(re.search(r"error of ([\d.]+)% by chance", found.calm)[1]) / 100
            assert found.low < by_chance < found.high

    def test_modest_is_no_alarm(self):
        p = problem({"x": np.arange(200.0)}, np.repeat([0, 1], [190, 10]))
        found = calibration(fitted(p, np.tile([0.7, 0.3], (200, 1))))
        assert not alarm(found)
        assert "rather too modest" in found.calm

    def test_rows_of_a_group_count_as_one(self):
        """Twenty groups, each right throughout or wrong throughout: 100 rows say no more than 20."""
        right = np.repeat(np.arange(20) % 10 < 8, 5)
        p = problem({"x": np.arange(100.0)}, (~right).astype(np.int64), group=np.repeat(np.arange(20), 5))
        found = calibration(fitted(p, np.tile([0.95, 0.05], (100, 1))))
        assert "20 independent units" in found.method
        assert found.p == pytest.approx(2 * norm.sf((0.15 - 0.02) / np.sqrt(0.16 / 20)), rel=1e-6)

    def test_labels(self):
        """Two labels, 90% sure of each, right in 60%."""
        target = np.zeros((200, 2), dtype=np.int64)
        target[:80] = 1
        found = calibration(fitted(problem({"x": np.arange(200.0)}, target, "multilabel"), np.full((200, 2), 0.1)))
        assert found.low > 0.2
        assert alarm(found)


class TestGroupGaps:
    def errors(self, rates, rows=100, seed=0):
        """A model that errs at these rates in groups of equal size."""
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(len(rates)), rows)
        wrong = rng.random(len(group)) < np.repeat(rates, rows)
        p = problem({"x": np.arange(len(group)) * 1.0}, np.arange(len(group)) % 2, group=group)
        return fitted(p, np.eye(2)[np.where(wrong, 1 - p.target, p.target)]), wrong.reshape(len(rates), rows)

    def test_by_hand(self):
        seen, wrong = self.errors((0.1, 0.1, 0.5, 0.1))
        found = group_gaps(seen)
        assert found.value == pytest.approx(wrong[2].mean() - wrong.mean())
        assert alarm(found)
        assert "The group of row 201 (100 rows)" in found.alarm
        values = dict(zip(found.picture["names"], found.picture["values"], strict=True))
        assert values["of row 1"] == pytest.approx(wrong[0].mean() - wrong.mean())

    def test_intervals_hold_for_all_groups_together(self):
        """Ten groups alike: in 60 draws at most 8 have any interval without 0, which chance exceeds once in 1,000."""
        missed = raised = 0
        for seed in range(60):
            found = group_gaps(self.errors((0.2,) * 10, 40, seed)[0])
            raised += alarm(found)
            missed += any(
                low > 0 or high < 0 for low, high in zip(found.picture["lows"], found.picture["highs"], strict=True)
            )
        assert binom.sf(8, 60, 0.05) < 0.005
        assert missed <= 8
        assert raised <= 2  # by more than two points, rarer still

    def test_real_targets(self):
        rng = np.random.default_rng(0)
        group = np.arange(600) % 6
        y = rng.normal(size=600) * np.where(group == 4, 3, 1)
        found = group_gaps(fitted(problem({"x": y}, y, group=group), np.zeros(600)))
        assert found.value == pytest.approx(abs(y[group == 4]).mean() / abs(y).mean() - 1)
        assert alarm(found)

    def test_planted_in_the_data(self):
        rng = np.random.default_rng(0)
        x, group = rng.normal(size=(1000, 5)), rng.integers(0, 8, 1000)
        y = (x[:, 0] > 0).astype(np.int64) ^ ((group == 2) & (rng.random(1000) < 0.5))
        found = group_gaps(look(problem(x, y, group=group)))
        assert alarm(found)
        assert f"of row {np.flatnonzero(group == 2)[0] + 1} " in found.alarm

    def test_none_or_too_small(self):
        assert group_gaps(look(problem({"x": np.arange(60.0)}, np.arange(60.0)))) is None
        p = problem({"x": np.arange(60.0)}, np.arange(60.0), group=np.arange(60) // 5)
        assert "fewer than two groups have 10 rows" in group_gaps(fitted(p, np.zeros(60)))


class TestSize:
    def test_the_rule(self):
        assert _enough(np.array([9.0, 5.0, 3.0, 3.4, 3.1, 3.0]), 0.2) == 4  # 3.4 is beyond, so only after it
        assert _enough(np.array([3.1, 3.0]), 0.2) == 0
        assert _enough(np.array([9.0, 3.0]), 0.2) == 1

    def test_smaller_shares_keep_the_strata(self):
        strata = np.repeat([0, 1, 2], [500, 100, 20])
        order = _evenly(strata, np.random.default_rng(0))
        assert sorted(order) == list(range(620))
        for count in (62, 124, 310):
            assert np.bincount(strata[order[:count]]) == pytest.approx(np.array([500, 100, 20]) * count / 620, abs=1)

    @pytest.mark.parametrize(("rows", "columns"), [(2000, 2), (200, 40)])
    def test_plenty_and_scarcity(self, rows, columns):
        """A line in two columns needs few of 2,000 rows; one in forty columns all of 200 and more."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(rows, columns))
        y = ((x @ np.ones(columns)) / np.sqrt(columns) + 0.1 * rng.normal(size=rows) > 0).astype(np.int64)
        seen = look(problem(x, y))
        spare, gain = redundancy(seen), few_labels(seen)
        assert spare.p is None
        if columns == 2:
            assert spare.low >= 0.3
            assert not alarm(gain)
        else:
            assert spare.high <= 0.5
            assert gain.value > 0.02
        shares, predictions = seen.fits.curve
        wrong = (predictions[shares.index(0.5), 0].argmax(1) != y) * 1.0 - (predictions[-1, 0].argmax(1) != y)
        first = [wrong[part.test].mean() for part in seen.fits.parts[0]]
        second = [
            ((predictions[shares.index(0.5), 1].argmax(1) != y) * 1.0 - (predictions[-1, 1].argmax(1) != y))[
                part.test
            ].mean()
            for part in seen.fits.parts[1]
        ]
        assert gain.value == pytest.approx(np.mean(first + second))

    def test_steep(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1000, 200))
        y = (x.sum(1) > 0).astype(np.int64)
        assert alarm(few_labels(look(problem(x, y))))


class TestProfile:
    def test_facts(self, digits):
        group = np.arange(len(digits)) // 10
        found = profile(replace(digits, group=group), np.arange(300))
        assert (found.num_samples, found.num_features, found.num_classes, found.num_groups) == (300, 61, 10, 30)
        assert sum(found.class_counts) == 300
        assert {f.symptom for f in found.findings} == {
            "class-imbalance", "label-noise", "training-cost", "overconfidence", "worst-group", "strange-inputs",
            "few-labels",
        }  # fmt: skip
        assert {f.symptom for f in found.findings} <= set(SYMPTOMS)
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
        assert [f.title for f in found.findings] == [
            "Heavy tails of the target", "Exact duplicates", "Heavy tails of the errors", "Uneven errors",
            "Strange rows", "Rows to spare", "Gain from more rows",
        ]  # fmt: skip
        assert not any(f.raised for f in found.findings)

    def test_labels(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(300, 4))
        target = (x[:, :3] + rng.normal(size=(300, 3)) > np.array([0.0, 0.3, 0.6])).astype(np.int64)
        found = profile(problem(x, target, "multilabel"), np.arange(300))
        assert (found.num_classes, found.class_counts) == (3, tuple(target.sum(0)))
        assert found.label_noise is None

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

    def test_all_are_held_together(self):
        p = load("yeast")
        found = profile(p, lock(p)[0])
        expected = holm({f.title: f.p for f in found.findings if f.p is not None})
        assert {f.title: f.p_holm for f in found.findings if f.p is not None} == expected
        for f in found.findings:
            assert f.raised == (f.p_holm is not None and f.p_holm <= 0.05)
            assert f.low <= f.value <= f.high
        assert len({f.title for f in found.findings}) == len(found.findings)

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
        found = profile(problem(x, rng.normal(size=120), time=np.arange(120.0)), np.arange(100))
        assert found.num_features == 6  # a, a is missing, three values of b, b is missing
        assert finding(found, "train-test-shift").picture["names"]

    def test_many_classes_and_one_group(self):
        rng = np.random.default_rng(0)
        crowd = profile(problem({"x": rng.normal(size=404)}, np.arange(404) % 101), np.arange(404))
        assert [f.title for f in crowd.findings] == ["Class imbalance", "Exact duplicates"]
        assert crowd.notes[0].startswith("No model was fitted, as there are 101 classes, and at most 100 are taken; so")
        p = problem({"x": rng.normal(size=100)}, np.arange(100) % 2, group=np.repeat([0, 1], 50))
        assert "all rows hang together in one group" in profile(p, np.arange(50)).notes[0]

    def test_images(self):
        rng = np.random.default_rng(0)
        x = rng.random((120, 3 * 12 * 12)).astype(np.float32)
        y = np.arange(120) % 2
        x[:, :50] += 0.3 * y[:, None].astype(np.float32)
        found = profile(problem(x, y, shape=(3, 12, 12), test=np.arange(80, 120)), np.arange(80))
        assert not any(f.raised for f in found.findings)
        assert finding(found, "train-test-shift").picture == {}  # too many columns to name one

    def test_tells_its_progress(self):
        told = []
        p = load("wine")
        profile(p, lock(p)[0], progress=lambda done, total, text: told.append((done, total, text)))
        assert [done for done, _, _ in told] == list(range(len(told)))
        assert {total for _, total, _ in told} == {len(told)}

    def test_is_plain_data(self):
        p = load("wine")
        found = asdict(profile(replace(p, time=np.arange(len(p)) * 1.0), lock(p)[0]))
        assert json.loads(json.dumps(found, allow_nan=False))["findings"] == json.loads(json.dumps(found))["findings"]

    @pytest.mark.slow
    def test_raises_little_where_nothing_is_wrong(self):
        """36 half-samples of clean data; at one alarm in twenty, more than 6 have a chance of 0.2%.

        The full form, 1,000 of them with 67 allowed, is `python -m tests.compare.half_samples 1000`.
        """
        assert binom.sf(6, 36, 0.05) < 0.003
        raised = [any(f.raised for f in found.findings) for _, found in profiles(36, clean())]
        assert sum(raised) <= 6
