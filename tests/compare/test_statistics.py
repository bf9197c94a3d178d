"""The statistics against numbers worked by hand, and the whole comparison where no arm differs from another."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import (
    average_precision_score,
    cohen_kappa_score,
    f1_score,
    hamming_loss,
    log_loss,
    r2_score,
    roc_auc_score,
)

from lossary.compare import run
from lossary.compare.arms import Arm
from lossary.compare.cells import HELD_OUT, Job, Outcome, Protocol
from lossary.compare.confirm import answer, detectable, own_predictions
from lossary.compare.metrics import METRICS, by_rule, cost, fitting, named
from lossary.compare.problem import Problem, lock
from lossary.compare.profile import Finding, Profile
from lossary.compare.result import Confirmation, Interval
from lossary.compare.search import search
from lossary.compare.statistics import Estimate, holm, over_cells, over_rows, too_few
from lossary.errors import BadInput

ACCURACY, BALANCED, LOG_LOSS = named("accuracy"), named("balanced accuracy"), named("log-loss")


def chosen(labels: list[list[int]], classes: int = 2) -> np.ndarray:
    """Log-probabilities (S, n, k) whose largest is each given label."""
    return np.log(0.1 + 0.8 * np.eye(classes)[np.array(labels)])


def test_interval_over_cells_by_hand():
    # mean 2.5, s^2 = 5/3, SE^2 = 5/3 (1/4 + 1/4) = 5/6; t with 3 degrees of freedom: 3.182446 at 97.5%
    found = over_cells(np.array([1.0, 2.0, 3.0, 4.0]), 0.25)
    half = 3.182446305284263 * np.sqrt(5 / 6)
    assert found.interval.difference == 2.5
    assert found.interval.low == pytest.approx(2.5 - half, abs=1e-9)
    assert found.interval.high == pytest.approx(2.5 + half, abs=1e-9)
    assert found.detectable == pytest.approx(2.8 * np.sqrt(5 / 6))


def test_p_says_what_the_interval_says():
    for shift in (-4.0, 0.3, 1.0, 2.0, 2.2, 5.0):
        found = over_cells(shift + np.array([0.5, -1.0, 2.0, 0.1, -0.4]), 0.25)
        outside = found.interval.low > 0 or found.interval.high < 0
        assert (found.p < 0.05) == outside
    assert Estimate(0.0, 0.0, 4).p == 1.0


def test_cells_without_a_score_do_not_count():
    assert over_cells(np.array([1.0, np.nan, 3.0, 2.0]), 0.25) == over_cells(np.array([1.0, 3.0, 2.0]), 0.25)


def test_holm_by_hand():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "dropped": 1.0})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "dropped": 1.0})


def test_rows_and_seeds_by_hand():
    target = np.array([0, 0, 1, 1])
    first, second = chosen([[0, 0, 1, 1], [0, 1, 1, 1]]), chosen([[0, 1, 1, 0]])
    # Points of difference: seed 0 (0, 100, 0, 100), seed 1 (0, 0, 0, 100); z = (0, 50, 0, 100), mean 37.5
    found = over_rows(ACCURACY, first, second, target, np.arange(4), np.random.default_rng(0))
    s_z, s_seed = np.var([0, 50, 0, 100], ddof=1), np.var([50, 25], ddof=1)
    assert found.difference == 37.5
    assert found.error**2 == pytest.approx(s_z / 4 + s_seed / 2)
    assert found.freedom == pytest.approx((s_z / 4 + s_seed / 2) ** 2 / ((s_z / 4) ** 2 / 3 + (s_seed / 2) ** 2 / 1))


def test_balanced_accuracy_takes_its_variance_within_classes():
    rng = np.random.default_rng(0)
    target = np.repeat([0, 1, 2], (200, 60, 15))
    first, second = (chosen(rng.integers(0, 3, (1, 275)).tolist(), 3) for _ in range(2))
    found = over_rows(BALANCED, first, second, target, np.arange(275), rng)
    lead = 100.0 * ((first[0].argmax(-1) == target).astype(float) - (second[0].argmax(-1) == target))
    by_class = [lead[target == k] for k in range(3)]
    assert found.difference == pytest.approx(np.mean([values.mean() for values in by_class]))
    assert found.error**2 == pytest.approx(sum(values.var(ddof=1) / len(values) for values in by_class) / 9)


def test_copies_add_nothing():
    rng = np.random.default_rng(1)
    target = rng.integers(0, 2, 120)
    first, second = (chosen(rng.integers(0, 2, (3, 120)).tolist()) for _ in range(2))
    once = over_rows(LOG_LOSS, first, second, target, np.arange(120), rng)
    twice = over_rows(
        LOG_LOSS, first.repeat(2, axis=1), second.repeat(2, axis=1), target.repeat(2), np.arange(120).repeat(2), rng
    )
    assert twice.difference == pytest.approx(once.difference)
    assert twice.error == pytest.approx(once.error)


def test_bootstrap_agrees_with_the_formula():
    rng = np.random.default_rng(2)
    target = rng.integers(0, 2, 300)
    # Seeds of an arm agree on most rows, as trained models do.
    first, second = (chosen((rng.integers(0, 2, 300) ^ (rng.random((20, 300)) < 0.02)).tolist()) for _ in range(2))
    by_weights = replace(ACCURACY, rows=None, weighted=lambda p, y, w: 100 * (w @ (p.argmax(-1) == y)) / w.sum(1))
    exact = over_rows(ACCURACY, first, second, target, np.arange(300), rng)
    drawn = over_rows(by_weights, first, second, target, np.arange(300), rng)
    assert drawn.difference == pytest.approx(exact.difference)
    assert drawn.error == pytest.approx(exact.error, rel=0.1)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_metrics_agree_with_scikit_learn(metric):
    rng = np.random.default_rng(3)
    target = rng.integers(0, 3, 200)
    logits = rng.normal(size=(200, 3)) + np.eye(3)[target]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    predicted, values = log_p.argmax(1), target + rng.normal(size=200)
    levels, labels = np.array([np.searchsorted(p.cumsum(), 0.5) for p in np.exp(log_p)]), np.eye(3, dtype=int)[target]
    labels[:40, 0] = 1  # of which several hold
    logits = logits.round(1)  # with ties
    expected = {
        "accuracy": 100 * np.mean(predicted == target),
        "balanced accuracy": 100 * np.mean([(predicted[target == k] == k).mean() for k in range(3)]),
        "log-loss": -np.mean(log_p[np.arange(200), target]),
        "AUROC": 100 * roc_auc_score(target, np.exp(log_p), multi_class="ovr"),
        "macro F1": 100 * f1_score(target, predicted, average="macro"),
        "level error": np.abs((np.exp(log_p) @ np.tri(3).T < 0.5).sum(1) - target).mean(),
        "quadratic kappa": 100 * cohen_kappa_score(target, levels, weights="quadratic"),
        "mAP": 100 * average_precision_score(labels, logits, average="macro"),
        "label F1": 100 * f1_score(labels, logits > 0, average="macro"),
        "label accuracy": 100 - 100 * hamming_loss(labels, logits > 0),
        "label log-loss": np.mean([log_loss(labels[:, k], 1 / (1 + np.exp(-logits[:, k]))) for k in range(3)]),
        "MAE": np.mean(np.abs(values - target)),
        "RMSE": np.sqrt(np.mean((values - target) ** 2)),
        "R2": r2_score(target, values),
    }[metric.name]
    prediction = {"classes": log_p, "ordinal": log_p, "multilabel": logits, "real": values}[metric.tasks[0]]
    truth = labels if metric.tasks == ("multilabel",) else target
    assert metric.score(prediction[None], truth)[0] == pytest.approx(expected)


def test_a_class_that_does_not_occur_is_left_out():
    target, chance = np.array([0, 0, 2]), chosen([[0, 1, 2]], 3)
    assert BALANCED.score(chance, target)[0] == pytest.approx(75)
    assert named("f1").score(chance, target)[0] == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_auroc_counts_ties_half():
    target = np.array([0, 0, 1, 1])
    p = np.array([0.2, 0.6, 0.6, 0.9])
    assert named("auc").score(np.log(np.stack([1 - p, p], 1))[None], target)[0] == pytest.approx(87.5)


def test_weights_are_copies():
    rng = np.random.default_rng(4)
    target, times = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    log_p = np.log(rng.dirichlet(np.ones(3), 50))
    real, values = rng.normal(size=50), rng.normal(size=50)
    labels = rng.integers(0, 2, (50, 3))
    data = {
        "classes": (log_p, target),
        "ordinal": (log_p, target),
        "multilabel": (log_p, labels),
        "real": (values, real),
    }
    for metric in METRICS:
        prediction, truth = data[metric.tasks[0]]
        weighted = metric.score(prediction[None], truth, times.astype(float))[0]
        copied = metric.score(prediction.repeat(times, axis=0)[None], truth.repeat(times, axis=0))[0]
        assert weighted == pytest.approx(copied), metric.name


def test_costs_decide_what_is_decided():
    # A third for each of three classes; deciding 1 costs 2 on average, the others 5 and 4.
    costs = np.array([[0.0, 3.0, 6.0], [9.0, 0.0, 6.0], [6.0, 3.0, 0.0]])
    even = np.log(np.full((1, 3, 3), 1 / 3))
    assert cost(costs).score(even, np.array([0, 1, 2]))[0] == pytest.approx(2)
    assert cost(costs).detail != cost(costs + 1).detail
    accuracy = cost(1 - np.eye(3))
    guess = chosen([[0, 1, 2, 1]], 3)
    assert accuracy.score(guess, np.array([0, 1, 1, 1]))[0] == pytest.approx(0.25)


def test_a_function_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(
        "from sklearn.metrics import f1_score, roc_auc_score\n"
        "def recall_score(true, said): return (said[true == 1] == 1).mean()\n"
        "def odd(true, said): return 0.0\n"
        "def lone_score(true): return 0.0\n"
        "def broken_loss(true, said): return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    target, p = rng.integers(0, 2, 80), rng.dirichlet([1, 1], (2, 80))
    recall, area = fitting("own_metrics:recall_score", "classes", 2), fitting("own_metrics:roc_auc_score", "classes", 2)
    assert (recall.name, recall.better) == ("recall_score", "higher")
    assert recall.score(np.log(p), target) == pytest.approx((p[:, target == 1, 1] > 0.5).mean(1))
    assert 100 * area.score(np.log(p), target) == pytest.approx(named("AUROC").score(np.log(p), target))
    found = over_rows(recall, np.log(p), np.log(p[::-1]), target, np.arange(80), rng)
    assert found.difference == pytest.approx(0)
    assert found.error > 0
    for name, words in (
        ("own_metrics:odd", "End its name in _score"),
        ("own_metrics:missing_score", "cannot import"),
        ("nowhere:a_score", "cannot import"),
        ("own_metrics:lone_score", "expected .true, predicted"),
    ):
        with pytest.raises(BadInput, match=words):
            fitting(name, "classes", 2)
    with pytest.raises(BadInput, match="raised ZeroDivisionError"):
        fitting("own_metrics:broken_loss", "classes", 2).score(np.log(p), target)
    with pytest.raises(BadInput, match="--sample-weight"):
        recall.score(np.log(p), target, np.full(80, 0.5))


@pytest.mark.parametrize(
    ("target", "task", "classes", "words"),
    [
        (np.zeros(99), "real", "", "only 99 rows"),
        (np.repeat([0, 1], (200, 9)), "classes", "ab", "rarest class, 'b', has only 9"),
        (np.repeat([0, 1], (200, 10)), "classes", "ab", ""),
        (np.repeat([0, 1], (100, 100)), "ordinal", "abc", "rarest level, 'c', has only 0"),
        (np.repeat([[1, 0], [1, 1]], (200, 9), axis=0), "multilabel", "ab", "rarest label, 'b', has only 9"),
    ],
)
def test_too_few_locked_rows(target, task, classes, words):
    found = too_few(target, task, classes)
    assert words in found
    assert bool(found) == bool(words)


@pytest.mark.parametrize(
    ("task", "raised", "name"),
    [
        ("classes", (), "accuracy"),
        ("classes", ("label-noise",), "accuracy"),
        ("classes", ("class-imbalance",), "balanced accuracy"),
        ("ordinal", ("class-imbalance",), "level error"),
        ("multilabel", (), "mAP"),
        ("real", (), "RMSE"),
        ("real", ("heavy-tails",), "MAE"),
    ],
)
def test_the_metric_goes_by_the_profile(task, raised, name):
    findings = tuple(
        Finding(symptom, "", 1.0, 1.0, 1.0, "", "", "", symptom in raised)
        for symptom in ("class-imbalance", "label-noise", "heavy-tails")
    )
    found, why = by_rule(task, Profile(9, 1, None, (), None, None, findings, ()))
    assert found.name == name
    assert why


# The sentences


def confirmed(low: float, high: float, exploratory: str = "") -> Confirmation:
    effect = Interval((low + high) / 2, low, high)
    return Confirmation("new: part", "gradient boosting", effect, 2.44, 400, (20, 1), (80.0, 78.0), exploratory)


def test_the_sentence_says_what_the_interval_says():
    assert answer(confirmed(0.4, 3.8), ACCURACY) == (
        "new: part raised accuracy by 2.1 points over gradient boosting "
        "(95% interval 0.4 to 3.8, on 400 rows that nothing had looked at)."
    )
    assert answer(confirmed(0.04, 0.12), LOG_LOSS).startswith("new: part lowered log-loss by 0.080 nats over")
    assert answer(confirmed(-1.5, 0.9), ACCURACY) == (
        "Nothing tried is shown to beat gradient boosting: the best part, new: part, differed by -0.3 points in "
        "accuracy (95% interval -1.5 to 0.9, on 400 rows that nothing had looked at); "
        "a lead of 2.4 points or more would most likely have been seen."
    )
    worse = answer(confirmed(-4.0, -1.0), ACCURACY)
    assert worse.startswith(
        "Nothing tried is shown to beat gradient boosting: the best part, new: part, was worse by 2.5"
    )
    assert answer(confirmed(1.0, 3.0, "only 40 rows were locked"), ACCURACY).startswith(
        "Exploratory only, as only 40 rows were locked: there new: part differed"
    )
    assert "nothing to confirm" in answer(None, ACCURACY)
    for ends in ((0.0, 2.0), (-0.1, 5.0), (-3.0, -1.0)):
        assert "raised" not in answer(confirmed(*ends), ACCURACY)


def test_predictions_that_were_brought_are_told_no_surer_than_the_answer():
    brought = replace(confirmed(0.4, 3.8), baseline="yours")
    rest = (
        "; yours had 78, and the smallest detectable lead over yours on these 400 rows is 2.4 points (2.8 standard "
        "errors)."
    )
    assert own_predictions(brought, "yours", ACCURACY) == (
        "On the 400 locked rows new: part was better than yours: +2.1 points in accuracy (95% interval 0.4 to 3.8)"
        + rest
    )
    few = replace(brought, exploratory="only 40 rows were locked")
    said = own_predictions(few, "yours", ACCURACY)
    assert said == answer(few, ACCURACY).removesuffix(".") + rest
    assert said.startswith("Exploratory only, as only 40 rows were locked: there new: part differed from yours by +2.1")
    assert "better than yours" not in said


def test_the_smallest_detectable_lead_has_the_unit_of_the_metric():
    words = "the smallest detectable lead over gradient boosting on these 400 rows is {} (2.8 standard errors)"
    assert detectable(confirmed(0.4, 3.8), "points") == words.format("2.4 points")
    assert detectable(confirmed(0.4, 3.8), "") == words.format("2.4")


# The whole comparison, with arms that are solved in closed form: least squares on random features


def forget(*_: object) -> None:
    """No progress to show."""


def simulated(seed: int, protocol: Protocol, gain: float) -> run.Plan:
    """A comparison of four parts and two conventional arms. Each seed draws features of its own from the same law,
    so no arm differs from another, unless the first part is given features that see `gain` more of the truth.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(440, 4))
    y = (x @ np.array([1.0, -1.0, 0.5, 0.0]) + rng.normal(size=440) > 0).astype(np.int64)
    problem = Problem("simulated", "", pd.DataFrame(x), y, "y", "classes", ("no", "yes"))
    rows, locked = lock(problem, seed=seed)
    names = [f"part {i}" for i in range(4)] + ["plain", "other"]
    made = [("losses.poly1_cross_entropy", "loss"), ("optim.SAM", "optimizer")] * 2  # some of which can be combined
    parts_of = [[{"part": part, "role": role, "hyper": {}}] for part, role in made] + [[], []]
    tries = range(protocol.settings)
    arms = tuple(
        Arm(
            name,
            "network",
            "",
            tuple({"family": "network", "try": i, "lr": 1.0, "weight_decay": 0.0, "parts": part} for i in tries),
            part=part[0]["part"] if part else None,
            role=part[0]["role"] if part else "",
        )
        for name, part in zip(names, parts_of)
    )
    inputs = np.column_stack([x, np.ones(440)])

    def finish(jobs: list[Job]) -> list[Outcome]:
        return [solve(job) for job in jobs]

    def solve(job: Job) -> Outcome:
        if job.kind == "confirm":
            train, test = rows, locked
        else:
            number = HELD_OUT if job.kind == "tune" else protocol.folds
            part = parts(job.kind, job.partition, number)
            train, test = rows[part != job.fold], rows[part == job.fold]
        own = np.random.default_rng((seed, zlib.crc32(repr((job.arm, job.setting, job.seeds)).encode())))
        weight = own.normal(size=(len(job.seeds), 5, 3))
        if "part 0" in job.arm:
            weight[:, :3, :2] += gain * np.array([[1.0, -1.0], [-1.0, 1.0], [0.5, -0.5]])
        hidden = np.maximum(inputs @ weight, 0)
        a, b = hidden[:, train], 2.0 * y[train] - 1
        solved = np.linalg.solve(a.mT @ a + np.eye(3), (a.mT @ b)[..., None])[..., 0]
        margin = np.einsum("snk,sk->sn", hidden[:, test], solved)
        predictions = np.stack([-margin, margin], -1)
        scores = ACCURACY.score(predictions, y[test])
        return Outcome(tuple(scores), predictions=predictions if job.kind == "confirm" else None)

    cache: dict[object, np.ndarray] = {}

    def parts(kind: str, partition: int, number: int) -> np.ndarray:
        key = (kind, partition)
        if key not in cache:
            order = np.random.default_rng((seed, kind == "tune", partition)).permutation(len(rows))
            cache[key] = order % number
        return cache[key]

    bench = SimpleNamespace(facts=dict, ratio=1 / (protocol.folds - 1))
    work = SimpleNamespace(finish=finish, expect=forget, bench=bench)
    profile = Profile(len(rows), 4, 2, (), None, 0.0, (), ())
    return run.Plan(problem, rows, locked, profile, ACCURACY, "", protocol, arms, (), work)


def claims_that_a_part_helps(count: int, protocol: Protocol, gain: float = 0.0) -> int:
    """How many of the comparisons end with the sentence that the best part beat the best conventional arm."""
    claims = 0
    for seed in range(count):
        plan = simulated(seed, protocol, gain)
        found = search(plan.arms, protocol, plan.metric, plan.work.finish)
        results = run._results(plan, found)
        confirmation, _, _ = run._confirm(plan, found, results)
        assert not confirmation.exploratory
        claims += " raised accuracy by " in run.answer(confirmation, plan.metric)
    return claims


SHORT = Protocol(partitions=2, folds=3, seeds=2, confirm_seeds=20, settings=1, tune_splits=2, tune_seeds=1)


def test_a_dropped_arm_counts_as_p_1():
    plan = simulated(0, replace(SHORT, partitions=4, settings=2), 3.0)
    found = search(plan.arms, plan.protocol, plan.metric, plan.work.finish)
    p = {arm.name: arm.p_holm for arm in run._results(plan, found)}
    found.dropped["part 0"] = "hopeless, let us say"
    dropped = {arm.name: arm.p_holm for arm in run._results(plan, found)}
    assert p["part 0"] < 0.05
    assert dropped["part 0"] == 1.0
    assert list(dropped)[-1] == "part 0"


@pytest.mark.parametrize(("count", "most"), [(400, 18), pytest.param(2000, 67, marks=pytest.mark.slow)])
def test_where_no_arm_differs_few_comparisons_claim_that_one_helps(count, most):
    """At 2.5% a claim, 400 bring 10 on average, more than 18 with probability 0.65%; 2,000 more than 67 with 0.81%."""
    assert stats.binom.sf(most, count, 0.025) < 0.01
    assert claims_that_a_part_helps(count, SHORT) <= most


def test_where_one_part_helps_most_comparisons_say_so():
    assert claims_that_a_part_helps(20, SHORT, gain=3.0) >= 17


def test_intervals_over_cells_hold_their_level():
    """Two learners on columns of the same law: the corrected t finds a difference in about 5% of samples, the plain t
    over cells, which takes them for independent, in half of them."""
    plain = corrected = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 4))
        y = np.sign(x.sum(1) + rng.normal(size=200))
        lead = []
        for cell in range(20):
            if cell % 5 == 0:
                fold = rng.permutation(200) % 5
            train, test = fold != cell % 5, fold == cell % 5
            right = []
            for columns in ([0, 1], [2, 3]):
                weight = np.linalg.lstsq(x[train][:, columns], y[train], rcond=None)[0]
                right.append(np.mean(np.sign(x[test][:, columns] @ weight) == y[test]))
            lead.append(right[0] - right[1])
        corrected += over_cells(np.array(lead), 0.25).p < 0.05
        plain += stats.ttest_1samp(lead, 0).pvalue < 0.05
    assert corrected <= 14
    assert plain >= 40
