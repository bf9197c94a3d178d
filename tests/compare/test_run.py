"""The comparison as a whole: arms are paired; it repeats, resumes, drops what is hopeless and keeps its budget."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lossary import tasks
from lossary.compare import cells, compare, run
from lossary.compare.arms import Arm
from lossary.compare.cells import Bench, Job, Outcome, Protocol
from lossary.compare.encode import Encoder
from lossary.compare.load import load
from lossary.compare.metrics import named
from lossary.compare.problem import Problem, lock, splits
from lossary.compare.search import ALWAYS_KEPT, TASKS, Deadline, Work, search
from lossary.compare.store import Store
from lossary.compare.training import Fold, predict
from lossary.errors import BadInput
from lossary.tasks import Seeds

TINY = Protocol(partitions=2, folds=3, seeds=2, confirm_seeds=3, settings=2, tune_splits=2, tune_seeds=1, steps=15)
ARMS = ["linear", "boosting", "network", "sam", "infobatch"]
NETWORK = {
    "family": "network", "class_weight": None, "model": "mlp", "hidden": [8], "activation": "relu", "steps": 15,
    "batch": 16, "optimizer": "AdamW", "lr": 1e-2, "weight_decay": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """240 rows in groups of four, classes that two of the columns tell."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(240, 3)).round(4), columns=["a", "b", "c"])
    frame["site"] = np.arange(240) // 4
    frame["y"] = np.where(frame.a - frame.b + 0.5 * rng.normal(size=240) > 0, "yes", "no")
    path = tmp_path_factory.mktemp("data") / "small.csv"
    frame.to_csv(path, index=False)
    return path


def without_times(found) -> dict:
    record = json.loads(json.dumps(found.to_json(), default=str))
    del record["seconds"], record["command"]
    for arm in record["arms"]:
        del arm["seconds"], arm["memory"]
    return record


# Pairing


def fold(classes: int = 3) -> Fold:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 4)).astype(np.float32)
    y = rng.integers(0, classes, 60) if classes else rng.normal(size=60)
    return Fold(x[:60], y, x[60:], classes, np.arange(60) % 2, 0.1)


@pytest.mark.parametrize(
    "part",
    [
        {"part": "losses.poly1_cross_entropy", "role": "loss", "hyper": {"epsilon": 0.0}},
        {"part": "optim.SAM", "role": "optimizer", "hyper": {"rho": 0.0}},
    ],
    ids=lambda part: part["part"],
)
@pytest.mark.parametrize("weight", [None, "balanced"])
def test_a_part_without_effect_is_the_plain_network(part, weight):
    """Weights, batches and class weights are those of the plain network: what differs between arms is the part."""
    setting = {**NETWORK, "class_weight": weight}
    plain, _ = predict(setting, fold(), Seeds((0, 1)))
    found, parameters = predict({**setting, "parts": [part]}, fold(), Seeds((0, 1)))
    np.testing.assert_allclose(found, plain, atol=2e-5)
    assert parameters == 4 * 8 + 8 + 8 * 3 + 3


def test_a_seed_does_not_depend_on_its_neighbours():
    together, _ = predict(NETWORK, fold(), Seeds((0, 1, 2)))
    alone, _ = predict(NETWORK, fold(), Seeds((1,)))
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


@pytest.mark.parametrize(
    "part",
    [
        {"part": "weighting.GroupDRO", "role": "weighting", "hyper": {"step_size": 0.5}},
        {"part": "weighting.InfoBatch", "role": "selector", "hyper": {"ratio": 0.5}},
        {"part": "weighting.CompressedCoTeaching", "role": "procedure", "hyper": {"sigma": 3.0}},
        {"part": "losses.poly1_cross_entropy", "role": "loss", "hyper": {"epsilon": 5.0}},
        {"part": "optim.SAM", "role": "optimizer", "hyper": {"rho": 0.5}},
    ],
    ids=lambda part: part["part"],
)
def test_a_part_of_every_role_changes_training(part):
    plain, _ = predict(NETWORK, fold(), Seeds((0, 1)))
    found, _ = predict({**NETWORK, "parts": [part]}, fold(), Seeds((0, 1)))
    assert found.shape == plain.shape == (2, 30, 3)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)
    assert np.abs(found - plain).max() > 1e-3


def test_a_real_target_comes_back_in_its_own_units():
    data = fold(classes=0)
    data = replace(data, y=1000 + 50 * data.x[:, 0].astype(float), test=data.test * 0)
    setting = {**NETWORK, "error": "squared", "steps": 200}
    for error in ("squared", "absolute"):
        values, _ = predict({**setting, "error": error}, data, Seeds((0, 1)))
        assert values.shape == (2, 30)
        assert np.abs(values - 1000).max() < 15


def test_all_arms_meet_the_same_folds_and_no_group_is_parted(table):
    problem = load(table, target="y", group="site")
    rows, locked = lock(problem)
    bench = Bench(problem, rows, locked, named("accuracy"), TINY, None)
    assert not set(problem.group[rows]) & set(problem.group[locked])
    for partition in range(2):
        parts = bench._splits("cell", partition)
        for (train, test), (_, again) in zip(parts, bench._splits("cell", partition), strict=True):
            np.testing.assert_array_equal(test, again)
            np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(rows)))
            assert not set(problem.group[rows][train]) & set(problem.group[rows][test])
        assert len(parts) == 3
    assert any(set(a) != set(b) for (_, a), (_, b) in zip(bench._splits("cell", 0), bench._splits("cell", 1)))
    assert bench.ratio == pytest.approx(0.5, rel=0.05)


def test_the_encoder_sees_training_rows_only(monkeypatch, table):
    problem = load(table, target="y")
    rows, locked = lock(problem)
    seen = []
    fit = Encoder.fit
    monkeypatch.setattr(Encoder, "fit", lambda self, frame: seen.append(set(frame.a)) or fit(self, frame))
    bench = Bench(problem, rows, locked, named("accuracy"), TINY, None)
    train = bench._splits("cell", 0)[1][0]
    bench(Job("cell", "linear", {"family": "linear", "class_weight": None, "C": 1.0}, 0, 1, (0,)))
    assert seen == [set(problem.features.a[rows[train]])]


# The search, with made-up scores


def made_up(scores: dict[str, float], error: tuple[str, str] | None = None):
    """Outcomes of arms whose scores are known: mean by arm, the same noise for all in a cell, a little of its own."""
    asked: list[Job] = []

    def finish(jobs):
        asked.extend(jobs)
        outcomes = []
        for job in jobs:
            own = np.random.default_rng((job.partition, job.fold, sum(job.arm.encode()))).normal()
            common = np.random.default_rng((job.partition, job.fold)).normal()
            if error and error == (job.kind, job.arm):
                outcomes.append(Outcome(error="refused"))
            else:
                gain = 5.0 * job.setting.get("good", 0)
                outcomes.append(Outcome((scores[job.arm] + gain + common + 0.1 * own,) * len(job.seeds), 0.1, 7))
        return outcomes

    return finish, asked


def arm(name: str, part: bool = True) -> Arm:
    """Every part is a loss, so none of them go together."""
    settings = tuple({"family": "network", "good": good, "parts": [{"part": f"losses.{name}"}]} for good in (0, 1))
    return Arm(name, "network", "", settings, part=f"losses.{name}" if part else None, role="loss" if part else "")


def test_the_better_configuration_is_chosen_and_hopeless_parts_stop_at_fixed_counts():
    scores = {"plain": 80.0, "poor": 60.0, "a": 81.0, "b": 79.99, "c": 70.0, "d": 78.0, "e": 79.97}
    finish, asked = made_up(scores)
    arms = [arm("plain", part=False), arm("poor", part=False), *map(arm, "abcde")]
    found = search(arms, replace(TINY, partitions=4), named("accuracy"), finish)
    assert all(setting["good"] for setting in found.setting.values())
    assert set(found.dropped) == {"poor", "c", "d"}
    assert "hopeless after 3 cells" in found.dropped["c"]
    stopped = {"poor": 3, "c": 3, "d": 3}
    assert {name: len(cells) for name, cells in found.scores.items()} == dict.fromkeys(["plain", *"abe"], 12) | stopped
    cells = [job for job in asked if job.kind == "cell"]
    assert len(cells) == sum(map(len, found.scores.values()))
    first = {(job.partition, job.fold, job.seeds) for job in cells if job.arm == "plain"}
    assert {(job.partition, job.fold, job.seeds) for job in cells if job.arm == "a"} == first
    assert not {id for job in asked if job.kind == "tune" for id in job.seeds} & {
        id for job in cells for id in job.seeds
    }


def test_the_best_plain_network_stays_for_parts_to_be_held_against():
    finish, _ = made_up({"trees": 90.0, "plain": 60.0, "weighted": 61.0, "a": 60.0})
    arms = [replace(arm("trees", part=False), family="boosting"), arm("plain", part=False), arm("weighted", part=False)]
    assert set(search([*arms, arm("a")], TINY, named("accuracy"), finish).dropped) == {"plain"}


def test_the_leading_parts_stay_even_where_all_are_hopeless():
    finish, _ = made_up({"plain": 90.0, "a": 60.0, "b": 61.0, "c": 50.0})
    found = search([arm("plain", part=False), *map(arm, "abc")], TINY, named("accuracy"), finish)
    assert set(found.dropped) == {"c"}
    assert len(found.running()) == 1 + ALWAYS_KEPT


def test_lower_is_better_where_it_is():
    finish, _ = made_up({"plain": 1.0, "a": 9.0, "b": 8.0, "c": 30.0})
    found = search([arm("plain", part=False), *map(arm, "abc")], TINY, named("RMSE"), finish)
    assert not any(setting["good"] for setting in found.setting.values())
    assert set(found.dropped) == {"c"}


@pytest.mark.parametrize(
    ("kind", "words"), [("tune", "no configuration worked: refused"), ("cell", "failed in a cell")]
)
def test_an_arm_that_fails_is_dropped_with_the_reason(kind, words):
    finish, _ = made_up({"plain": 80.0, "a": 81.0}, error=(kind, "a"))
    found = search([arm("plain", part=False), arm("a")], TINY, named("accuracy"), finish)
    assert words in found.dropped["a"]
    assert len(found.scores["plain"]) == 6


def test_the_best_part_is_stacked_with_others_as_long_as_that_helps():
    def part(name: str, role: str) -> Arm:
        settings = tuple(
            {"lr": lr, "weight_decay": 0.1, "parts": [{"part": name, "role": role, "hyper": {}}]} for lr in (1.0, 2.0)
        )
        return Arm(name, "network", "", settings, name, name, role, name)

    gains = {"plain": 0.0, "a": 5.0, "b": 4.0, "c": 1.0, "d": 3.0, "e": 2.0}

    def finish(jobs):
        """Gains add up, but the first two do not go together."""
        return [
            Outcome((70.0 + sum(map(gains.get, job.arm.split(" + "))) - 9.0 * ("a + b" in job.arm),)) for job in jobs
        ]

    arms = [arm("plain", part=False), part("a", "loss"), part("b", "weighting"), part("c", "optimizer")]
    arms += [part("d", "loss"), part("e", "selector")]
    found = search(arms, TINY, named("accuracy"), finish)
    assert [a.name for a in found.arms[6:]] == ["a + b", "a + e", "a + e + c"]  # d is another loss
    best = found.best(found.running(), 1.0)[0]
    assert best.name == "a + e + c"
    assert [entry["part"] for entry in found.setting[best.name]["parts"]] == ["a", "e", "c"]
    assert best.roles == {"loss", "selector", "optimizer"}
    assert all(len(a.settings) == 2 for a in found.arms)
    assert all(len(scores) == 6 for scores in found.scores.values())


# The store


def test_a_cell_is_kept_as_it_was_first_written(tmp_path):
    store = Store(tmp_path / "cells.sqlite")
    row = {"arm": "a", "kind": "confirm", "partition": 0, "fold": 0}
    values = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    store.write("k", **row, value={"scores": [1.0]}, predictions=values)
    store.write("k", **row, value={"scores": [2.0]}, predictions=None)
    again = Store(tmp_path / "cells.sqlite")
    assert again.read(["k", "unknown"]) == {"k": {"scores": [1.0]}}
    np.testing.assert_array_equal(again.predictions("k"), values)


def test_no_store_is_refused(tmp_path):
    (tmp_path / "cells.sqlite").write_text("This is no database, but a longer text that fills a header or so. " * 20)
    with pytest.raises(BadInput, match="--out"):
        Store(tmp_path / "cells.sqlite")


def test_a_key_holds_all_that_an_outcome_depends_on(table):
    problem = load(table, target="y")
    rows, locked = lock(problem)
    job = Job("cell", "a", {"family": "linear", "C": 1.0}, 0, 0, (0, 1))

    def key(job: Job = job, problem: Problem = problem, metric: str = "accuracy", protocol: Protocol = TINY) -> str:
        return Work(Bench(problem, rows, locked, named(metric), protocol, None), Store()).key(job)

    other = [
        key(replace(job, setting={"family": "linear", "C": 2.0})),
        key(replace(job, seeds=(0, 2))),
        key(replace(job, fold=1)),
        key(replace(job, code="edited")),
        key(metric="AUROC"),
        key(protocol=replace(TINY, folds=5)),
        key(problem=load(table, target="y", drop=["c"])),
    ]
    assert len({key(), *other}) == 8
    assert key(protocol=replace(TINY, partitions=4)) == key()  # further partitions build on those there are


# The whole


@pytest.fixture(scope="module")
def found(table):
    tasks.forget()
    found = compare(table, target="y", arms=ARMS, seeds=2, protocol=TINY, workers=0)
    assert tasks.used().keys() <= set(TASKS)  # or a key would not hold all that an outcome depends on
    return found


def test_the_answer_rests_on_the_locked_rows(found):
    assert [arm.name for arm in found.arms if arm.conventional and arm.against_baseline is None] == [
        found.confirmation.baseline
    ]
    assert {arm.name for arm in found.arms} == {
        "linear model", "gradient boosting", "plain network", "sam: SAM", "infobatch: InfoBatch",
        "infobatch: InfoBatch + sam: SAM",
    }  # fmt: skip
    assert found.data["rows"] == 240
    assert found.confirmation.rows == found.data["locked"]
    for name in (found.confirmation.finalist, found.confirmation.baseline):
        assert sum(map(sum, found.curves["confusion"][name])) == found.data["locked"]
        assert sum(bin["rows"] for bin in found.curves["reliability"][name]) == pytest.approx(found.data["locked"])
    assert found.confirmation.exploratory.startswith(f"only {found.data['locked']} rows")
    assert found.sentence.startswith("Exploratory only")
    assert found.protocol["seeds"] == 2
    for arm in found.arms:
        assert arm.cells == 6 or arm.dropped
        assert np.mean(arm.cell_scores) == pytest.approx(arm.score)
        assert arm.tried == 2


def test_settings_say_all_there_is_to_say(found):
    arms = {arm.name: arm for arm in found.arms}
    assert arms["infobatch: InfoBatch"].setting["parts"][0]["facts"] == {
        "num_samples": found.data["rows"] - found.data["locked"]
    }
    for arm in arms.values():
        assert json.loads(json.dumps(arm.setting)) == arm.setting


def test_a_setting_alone_gives_the_locked_scores_again(found, table):
    problem = load(table, target="y")
    rows, locked = lock(problem)
    encoder = Encoder().fit(problem.features.iloc[rows])
    x, unseen = (encoder.transform(problem.features.iloc[part]) for part in (rows, locked))
    for name, score in zip(("finalist", "baseline"), found.confirmation.scores):
        arm = next(arm for arm in found.arms if arm.name == getattr(found.confirmation, name))
        seeds = Seeds((0, 1, 2) if arm.family == "network" else (0,))
        predictions, _ = predict(arm.setting, Fold(x, problem.target[rows], unseen, 2), seeds)
        assert named("accuracy").score(predictions, problem.target[locked]).mean() == pytest.approx(score)


def test_the_same_call_gives_the_same_answer(found, table):
    told = []
    again = compare(
        table, target="y", arms=ARMS, seeds=2, protocol=TINY, workers=0,
        planned=lambda plan, seconds: told.append(({arm.name for arm in plan.arms}, seconds > 0)),
    )  # fmt: skip
    assert told == [({arm.name for arm in found.arms if " + " not in arm.name}, True)]
    assert without_times(again) == without_times(found)


PROGRAM = """
import sys
from lossary.compare import run, search
from lossary.compare.cells import Protocol
if __name__ == "__main__":
    search.WORTH_WORKERS = 0.0  # so that processes are started even for this
    table, out, arms = sys.argv[1:]
    run.compare(table, target="y", arms=arms.split(","), seeds=2, out=out, protocol=Protocol(**{protocol}), workers=2)
"""


def committed(store: Path) -> dict[str, tuple[int, str]]:
    if not store.exists():
        return {}
    # Not read-only: a commit that was killed half-way is rolled back by whoever opens the store next.
    with sqlite3.connect(f"file:{store}?mode=rw", uri=True) as connection:
        if not connection.execute("select name from sqlite_master where name = 'cells'").fetchall():
            return {}
        return {key: (row, value) for row, key, value in connection.execute("select rowid, key, value from cells")}


def test_a_killed_run_resumes_and_computes_nothing_twice(found, table, tmp_path):
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(PROGRAM.replace("{protocol}", repr(vars(TINY))))
    running = subprocess.Popen([sys.executable, program, table, out, ",".join(ARMS)])
    try:
        until = time.monotonic() + 120
        while len(committed(out / "cells.sqlite")) < 12 and running.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    before = committed(out / "cells.sqlite")
    assert len(before) >= 12

    told = []
    resumed = compare(
        table,
        target="y",
        arms=ARMS,
        seeds=2,
        protocol=TINY,
        out=out,
        workers=0,
        progress=lambda *state: state[2].startswith("profile: ") or told.append(state),
    )
    after = committed(out / "cells.sqlite")
    assert {key: after[key] for key in before} == before
    assert len(told) == len(after) - len(before)
    assert told[-1][0] == told[-1][1] == len(after)
    assert without_times(resumed) == without_times(found)  # of one process without interruption
    assert {"report.html", "result.json", "winner.py"} <= {file.name for file in out.iterdir()}
    assert json.loads((out / "result.json").read_text("utf-8"))["sentence"] == resumed.sentence


# Budget and folder


def plan_of(seconds: float, parts: int = 6, slowdown: float = 1.0) -> run.Plan:
    """A plan whose arms all take so long for their first training, on one core."""

    class Told:
        done, workers = 0, 1

        def finish(self, jobs):
            return [Outcome((1.0,), seconds, slowdown * seconds) for _ in jobs]

    arms = (arm("plain", part=False), *(replace(arm(f"p{i}"), part=f"losses.p{i}") for i in range(parts)))
    return run.Plan(*[None] * 6, Protocol(settings=2), arms, (), Told())


def test_a_budget_cuts_partitions_and_then_the_worst_fitting_parts():
    full = plan_of(1.0)
    first = run._first_round(full)
    assert run._within(full, first, 1e9) == full
    seen = [run._within(full, first, left) for left in np.linspace(run._seconds(full, first, 0), 0, 60)]
    sizes = [(plan.protocol.partitions, len(plan.arms)) for plan in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == (4, 7)
    assert {partitions for partitions, arms in sizes if arms == 7} == {4, 3, 2, 1}
    assert sizes[-1] == (1, 2)
    assert seen[-1].skipped[0] == ("losses.p5", "the budget leaves no time for it")
    assert run._cuts(30, full, seen[-1]) == ("Cut down to 1 of 4 partitions, 2 of 7 arms by the budget of 30 s.",)
    assert run._cuts(30, full, full) == ()
    shorter = next(plan for plan in seen if plan.protocol.partitions == 1 and len(plan.arms) == 4)
    assert run._seconds(shorter, first, 0) <= run._seconds(full, first, 0)


def test_an_estimate_goes_by_the_clock_and_not_by_the_processor():
    """Two arms of 1 s, one left: 3 further tunings, 20 cells of 11 / 8 s, then 20 seeds twice and the winner."""
    plan = plan_of(1.0, parts=1)
    alone = run._seconds(plan, run._first_round(plan), run.MOST_COMBINED)  # one part is combined with no other
    assert alone == pytest.approx(2 * (3 + 20 * 11 / 8) + run.STARTING + 2 * 26 / 8 + 1 + run.IMPORTING + run.REPORTING)
    busy = plan_of(1.0, parts=1, slowdown=3.0)
    assert run._first_round(busy).slowdown == pytest.approx(3)
    assert run._seconds(busy, run._first_round(busy), 0) == pytest.approx(3 * alone)


def test_combinations_are_expected_as_far_as_the_budget_goes():
    """Each takes what a part takes: 3 further tunings of 1 s and 20 cells of 11 / 8 s."""
    plan = plan_of(1.0, parts=2)
    plan = replace(plan, arms=(*plan.arms[:2], replace(plan.arms[2], role="weighting")))
    first, part = run._first_round(plan), 3 + 20 * 11 / 8
    least = 10 + run._seconds(plan, first, 0)
    assert run._expected(plan, first, 10, None) == pytest.approx(least + 3 * part)
    for budget, expected in ((0, least), (least + 5, least + 5), (1e9, least + 3 * part)):
        assert run._expected(plan, first, 10, budget) == pytest.approx(expected)


class Clock:
    """Stands still but for what is told to take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def during(self, function, *seconds: float):
        """The function, taking so many seconds at each call; the last number stays."""
        left = list(seconds)

        def slow(*args, **kwargs):
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return function(*args, **kwargs)

        return slow


@pytest.mark.parametrize(
    ("until", "partitions"), [(0.0, 1), (39.0, 1), (40.0, 2), (42.5, 2), (43.0, 3), (51.0, 3), (52.0, 4)]
)
def test_the_clock_stops_a_search_between_partitions(until, partitions):
    """Tuning takes 10 s, a partition of five arms 15 s; c and d are then hopeless, and the others take 9 s."""
    finish, asked = made_up({"plain": 80.0, "a": 81.0, "b": 79.99, "c": 60.0, "d": 60.0})
    clock = Clock()

    def timed(jobs):
        clock.now += sum(1.0 if job.kind == "cell" else 0.5 for job in jobs)
        return finish(jobs)

    arms = [arm("plain", part=False), *map(arm, "abcd")]
    protocol = replace(TINY, partitions=4)
    found = search(arms, protocol, named("accuracy"), timed, deadline=Deadline(until, clock))
    assert found.partitions == partitions
    assert {job.partition for job in asked if job.kind == "cell"} == set(range(partitions))
    assert all(len(found.scores[name]) == 3 * partitions for name in ("plain", "a", "b"))
    assert set(found.dropped) == ({"c", "d"} if partitions > 1 else set())


@pytest.mark.parametrize(("until", "tried"), [(47.5, 0), (48.5, 1), (55.5, 1), (56.5, 2)])
def test_combinations_are_left_out_where_they_would_end_too_late(until, tried):
    """The search ends at 32 s. A combination is judged by its two parts, half of 12 s a partition, and by two
    partitions and the 2/3 that its tuning is: 16 s; it takes 8 s."""

    def part(name: str, role: str) -> Arm:
        settings = ({"lr": 1.0, "weight_decay": 0.1, "parts": [{"part": name, "role": role, "hyper": {}}]},)
        return Arm(name, "network", "", settings, name, name, role, name)

    clock = Clock()

    def finish(jobs):
        clock.now += len(jobs)
        return [Outcome((70.0 if job.arm == "plain" else 80.0 + len(job.arm),), 1.0) for job in jobs]

    plain = replace(part("plain", ""), part=None)
    arms = [plain, part("a", "loss"), part("b", "weighting"), part("c", "optimizer")]
    found = search(arms, TINY, named("accuracy"), finish, deadline=Deadline(until, clock))
    assert found.partitions == 2
    assert [a.name for a in found.arms[4:]] == ["a + b", "a + b + c"][:tried]
    assert found.cut_short == (tried < 2)


@pytest.fixture
def clocked(table, monkeypatch):
    """Comparisons by a clock that only reading (5 s), profiling (15 s) and jobs move, which take so many seconds."""
    clock = Clock()
    for module in (run, cells):
        monkeypatch.setattr(module, "perf_counter", clock)
    monkeypatch.setattr(cells, "process_time", clock)
    monkeypatch.setattr(run, "load", clock.during(run.load, 5.0))
    monkeypatch.setattr(run, "profile", clock.during(run.profile, 15.0))
    trained = cells.predict

    def call(function, *jobs: float, **options):
        monkeypatch.setattr(cells, "predict", clock.during(trained, *jobs))
        return function(
            table, target="y", arms=["linear", "sam"], seeds=2, protocol=replace(TINY, partitions=4), workers=0,
            **options,
        )  # fmt: skip

    return call


def test_a_budget_counts_all_that_went_by(clocked):
    """The network's 12 cells were thought to take 8/7 of its tuning's 1 s; then come two confirmations of 9/7 s."""
    foretold, plan = clocked(run.estimate, 1.0)
    assert plan.protocol.partitions == 4
    besides = run.IMPORTING + run.REPORTING
    assert foretold == pytest.approx(5 + 15 + 8 + 12 + 12 * 8 / 7 + 2 * 9 / 7 + 1 + besides)
    full = clocked(compare, 1.0)
    assert full.seconds == 5 + 15 + 8 + 12 + 12 + 2
    enough = clocked(compare, 1.0, budget=foretold + 0.1)
    assert without_times(enough) == without_times(full)
    less = clocked(compare, 1.0, budget=foretold - 0.1)
    assert less.protocol["partitions"] == 3
    assert less.notes[-1] == f"Cut down to 3 of 4 partitions by the budget of {foretold - 0.1:g} s."
    assert less.seconds == full.seconds - 6


def test_the_clock_goes_on_after_the_plan(clocked, table):
    """After the first round each job takes 3 s and not 1: of two partitions that seemed to fit, one is run."""
    told = []
    found = clocked(
        compare, 1.0, 1.0, 3.0, budget=60.0, planned=lambda plan, _: told.append((plan.protocol.partitions, plan.notes))
    )
    assert told == [(2, ("Cut down to 2 of 4 partitions by the budget of 60 s.",))]
    assert found.seconds == 20 + 2 + 6 * 3 + 6 * 3 + 2 * 3
    assert found.notes[-2:] == (
        "Cut down to 1 of 4 partitions by the budget of 60 s.",
        f"Took about {64 + run.IMPORTING + run.REPORTING:.0f} s in all, longer than the budget of 60 s.",
    )
    # What is said rests on the three cells that there are: t with 2 degrees of freedom.
    assert found.protocol["partitions"] == 1
    baseline, other = sorted(found.arms, key=lambda arm: arm.against_baseline is not None)
    assert baseline.cells == other.cells == 3
    lead = np.array(other.cell_scores) - np.array(baseline.cell_scores)
    problem = load(table, target="y")
    cut = splits(problem.rows(lock(problem)[0]), 3, np.random.default_rng((0, 0)))
    error = lead.std(ddof=1) * np.sqrt(1 / 3 + np.mean([len(test) / len(train) for train, test in cut]))
    assert other.against_baseline.high - lead.mean() == pytest.approx(stats.t.ppf(0.975, 2) * error)
    assert found.protocol["comparisons"] == 1 + 3  # and combinations that were not tried
    assert other.p_holm == pytest.approx(min(1, 4 * 2 * stats.t.sf(abs(lead.mean()) / error, 2)))


def test_even_the_least_comparison_is_made_and_said_to_overrun(table):
    found = compare(table, target="y", arms=["linear", "sam"], seeds=2, protocol=TINY, workers=0, budget=0.001)
    assert found.protocol["partitions"] == 1
    assert {arm.name for arm in found.arms} == {"linear model", "sam: SAM"}
    assert "longer than the budget of 0.001 s" in found.notes[-1]


def test_folders_that_hold_other_things_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, words in ((tmp_path / "full", "holds other files"), (tmp_path / "file" / "sub", "is a file")):
        with pytest.raises(BadInput, match=words):
            run.check_folder(folder)
    assert run.check_folder(tmp_path / "new" / "one") == tmp_path / "new" / "one"
    assert not (tmp_path / "new").exists()
    (tmp_path / "full" / "cells.sqlite").touch()
    run.check_folder(tmp_path / "full")
