"""The search: every arm tuned and scored on the same paired cells, hopeless ones dropped, all of it resumable.

The rows that were not locked are dealt into folds several times over (partitions). A cell is an arm's training on
all but one fold of one partition, with all its seeds as one stack, and its scores on that fold. All arms meet the
same folds and, for the same seed, the same initial weights and batches. Boosting and linear models draw nothing,
so they train once in a cell.

In the end the best part is stacked with parts of other roles, one by one, as long as that helps: `combine`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import inf
from time import perf_counter
from typing import Any

import numpy as np
import torch

import lossary
from lossary import tasks
from lossary.compare.arms import Arm, stack
from lossary.compare.cells import Bench, Job, Outcome, Protocol
from lossary.compare.metrics import Metric, source
from lossary.compare.statistics import over_cells
from lossary.compare.store import Store, digest
from lossary.tasks import Seeds, run_all, warm

VERSION = 3  # raised when the same job comes to give other numbers: what older code has stored is then not used
TASKS = ("fit", "small_cnn", "stacked_mlp")  # all that cells are made of
RACES = (1, 2)  # after so many partitions hopeless arms are dropped
MOST_COMBINED = 3  # combinations that are tried
ALWAYS_KEPT = 2  # leading parts that are never dropped, so that there is a finalist to confirm
WORTH_WORKERS = 12.0  # seconds of work below which starting other processes costs more than it saves


@dataclass(frozen=True)
class Deadline:
    """When the search has to be over, by a clock.

    It is asked between partitions and between combinations, never within, and goes by their cost: what is finished is
    whole, and no score decides when to stop.
    """

    at: float = inf
    clock: Callable[[], float] = perf_counter

    def leaves(self, seconds: float) -> bool:
        """Whether there is so much time left."""
        return self.clock() + seconds <= self.at


NO_DEADLINE = Deadline()

Finish = Callable[[Sequence[Job]], list[Outcome]]

Progress = Callable[[int, int, str], None]
"""Called with jobs done, jobs in all, and what was just done."""


class Work:
    """Finishes jobs: what the store holds is read, the rest is run and committed one by one. Leave it as a context.

    Args:
        bench: does a job.
        store: where what is finished lies.
        progress: told after each job.
        workers: processes; None is one for each core, 0 none. Few short jobs run in this process in any case.
    """

    def __init__(
        self, bench: Bench, store: Store, progress: Progress | None = None, workers: int | None = None
    ) -> None:
        self.bench, self.store, self.workers = bench, store, workers
        self.progress = progress or (lambda done, total, text: None)
        self.done = self.total = 0
        self._seconds: list[float] = []
        self._processes = ExitStack()
        self._spread: Callable[..., Iterator[tuple[Job, Outcome]]] | None = None
        problem, protocol = bench.problem, bench.protocol
        versions = [VERSION, lossary.__version__, torch.__version__, tasks.versions(*TASKS)]
        metric = [bench.metric.name, bench.metric.detail]
        self._base = [problem.digest, metric, bench.label_noise, protocol.folds, bench.device, versions]

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def expect(self, total: int) -> None:
        """How many jobs there will be in all, for the progress."""
        self.total = total

    def key(self, job: Job) -> str:
        """Everything that a job's outcome depends on, in one hash."""
        model = job.setting.get("model", "")
        own = [source(model)] if ":" in model else []  # an edit of the user's network counts
        return digest([*self._base, *own, asdict(job)])

    def finish(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The jobs' outcomes, in their order."""
        keys = [self.key(job) for job in jobs]
        found = self.store.read(keys)
        self.done += sum(key in found for key in keys)
        for job, outcome in self._run([job for key, job in zip(keys, jobs) if key not in found]):
            key = self.key(job)
            found[key] = {
                name: getattr(outcome, name)
                for name in ("scores", "seconds", "elapsed", "parameters", "memory", "error")
            }
            self.store.write(
                key, arm=job.arm, kind=job.kind, partition=job.partition, fold=job.fold,
                value=found[key], predictions=outcome.predictions,
            )  # fmt: skip
            self.done += 1
            self.progress(self.done, self.total, job.arm)
        outcomes = []
        for key, job in zip(keys, jobs):
            value = {**found[key], "scores": tuple(found[key]["scores"])}
            kept = self.store.predictions(key) if job.kind == "confirm" and not value["error"] else None
            outcomes.append(Outcome(**value, predictions=kept))
        return outcomes

    def _run(self, jobs: list[Job]) -> Iterator[tuple[Job, Outcome]]:
        if jobs and not self._seconds:  # one job tells how long others may take
            yield from self._timed(jobs[-1:], 0)
            jobs = jobs[:-1]
        if jobs:
            few = np.mean(self._seconds[-50:]) * max(len(jobs), self.total - self.done) < WORTH_WORKERS
            yield from self._timed(jobs, 0 if few and self._spread is None else self.workers)

    def _timed(self, jobs: list[Job], workers: int | None) -> Iterator[tuple[Job, Outcome]]:
        if workers == 0:
            stream = run_all(self.bench, jobs, workers=0)
        else:
            if self._spread is None:  # the processes stay for all rounds
                self._spread = self._processes.enter_context(warm(self.bench, workers=workers))
            stream = self._spread(jobs)
        for job, outcome in stream:
            self._seconds.append(outcome.seconds)
            yield job, outcome


@dataclass
class Search:
    """What the search found, by arm: the tuned setting, the score of each cell, and why an arm was dropped.

    `partitions` are finished; `cut_short` where the deadline left no time for combinations.
    """

    arms: tuple[Arm, ...]
    setting: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    partitions: int = 0
    cut_short: bool = False

    def running(self) -> list[Arm]:
        """The arms that are not dropped."""
        return [arm for arm in self.arms if arm.name not in self.dropped]

    def best(self, arms: Sequence[Arm], sign: float) -> list[Arm]:
        """The arms by mean score, best first; the first named where they tie."""
        return sorted(arms, key=lambda arm: -sign * np.nanmean(self.scores[arm.name]))


def tune_jobs(arm: Arm, protocol: Protocol) -> list[Job]:
    """Each configuration of an arm on each split for tuning."""
    ids = _ids(arm, Seeds((0,)).tuning(protocol.tune_seeds).ids)
    return [
        Job("tune", arm.name, setting, 0, fold, ids, arm.code)
        for setting in arm.settings
        for fold in range(protocol.tune_splits)
    ]


def search(
    arms: Sequence[Arm],
    protocol: Protocol,
    metric: Metric,
    finish: Finish,
    expect: Callable[[int], None] = lambda n: None,
    *,
    ratio: float | None = None,
    deadline: Deadline = NO_DEADLINE,
) -> Search:
    """Tune every arm, score it cell by cell, drop what is hopeless.

    An arm is dropped after the partitions in `RACES` if the whole interval of its lead over the best conventional arm
    so far lies below 0. The best plain network stays in any case, for parts to be held against, and so do the
    leading `ALWAYS_KEPT` parts.

    Args:
        arms: all of them, with their configurations.
        protocol, metric: how much, and by what.
        finish: gives the outcomes of jobs.
        expect: told how many jobs will have been asked for in all, whenever that changes.
        ratio: rows of a test fold over rows of its training part; None is that of folds of one size.
        deadline: one partition is run in any case, and as many more as end before it if they take as long as the last.
    """
    ratio = 1 / (protocol.folds - 1) if ratio is None else ratio
    found = Search(tuple(arms))
    # One fold after another, so that an encoded fold serves all.
    tuning = sorted((job for arm in arms for job in tune_jobs(arm, protocol)), key=lambda job: job.fold)
    cells = protocol.partitions * protocol.folds
    expect(len(tuning) + cells * len(arms) + 2)
    _tune(found, metric, list(zip(tuning, finish(tuning))))
    took = 0.0
    while found.partitions < protocol.partitions and (not found.partitions or deadline.leaves(took)):
        if found.partitions in RACES:
            _race(found, metric, ratio)
        began, running = deadline.clock(), found.running()
        jobs = _cell_jobs(found, running, protocol, range(found.partitions, found.partitions + 1))
        left = (protocol.partitions - found.partitions) * protocol.folds * len(running)
        expect(len(tuning) + sum(map(len, found.scores.values())) + left + 2)
        _collect(found, list(zip(jobs, finish(jobs))))
        found.partitions, took = found.partitions + 1, deadline.clock() - began
    combine(found, protocol, metric, finish, expect, deadline=deadline, took=took)
    return found


def combine(
    found: Search,
    protocol: Protocol,
    metric: Metric,
    finish: Finish,
    expect: Callable[[int], None] = lambda n: None,
    *,
    deadline: Deadline = NO_DEADLINE,
    took: float = 0.0,
) -> None:
    """Put parts of other roles beside the best one, the better ones first, and keep each that raises the mean score.

    At most `MOST_COMBINED` are tried. A combination is tuned and scored like every other arm, on all cells. `took` are
    the seconds of the last partition, by which a combination is judged to end before the deadline.
    """
    parts = found.best([arm for arm in found.running() if arm.part and arm.family == "network"], metric.sign)
    if not parts:
        return
    best, tried = parts[0], 0
    all_arms = sum(found.seconds[arm.name] for arm in found.running()) or 1.0
    for other in parts[1:]:
        arm = stack(best, found.setting[best.name], other, found.setting[other.name])
        if arm is None:
            continue
        share = (found.seconds[best.name] + found.seconds[other.name]) / all_arms  # of a partition's time
        rounds = found.partitions + len(arm.settings) * protocol.tune_splits / protocol.folds
        if not deadline.leaves(took * share * rounds):
            found.cut_short = True
            return
        found.arms = (*found.arms, arm)
        tuning = tune_jobs(arm, protocol)
        done = sum(len(a.settings) * protocol.tune_splits for a in found.arms) + sum(map(len, found.scores.values()))
        expect(done + found.partitions * protocol.folds + 2)
        _tune(found, metric, list(zip(tuning, finish(tuning))), only=arm)
        if arm.name not in found.dropped:
            jobs = _cell_jobs(found, [arm], protocol, range(found.partitions))
            _collect(found, list(zip(jobs, finish(jobs))))
        if arm.name not in found.dropped and found.best([best, arm], metric.sign)[0] is arm:
            best = arm
        tried += 1
        if tried == MOST_COMBINED:
            return


def _cell_jobs(found: Search, arms: Sequence[Arm], protocol: Protocol, partitions: range) -> list[Job]:
    return [
        Job("cell", arm.name, found.setting[arm.name], partition, fold, _ids(arm, range(protocol.seeds)), arm.code)
        for partition in partitions
        for fold in range(protocol.folds)  # arms beside each other, so that an encoded fold serves them all
        for arm in arms
    ]


def _tune(found: Search, metric: Metric, outcomes: list[tuple[Job, Outcome]], *, only: Arm | None = None) -> None:
    """Choose each arm's configuration by its mean score; an arm that fails with all of them is dropped."""
    for arm in found.arms if only is None else (only,):
        mine = [(job, outcome) for job, outcome in outcomes if job.arm == arm.name]
        means = []
        for setting in arm.settings:
            own = [outcome for job, outcome in mine if job.setting == setting]
            scores = [outcome.score for outcome in own if np.isfinite(outcome.score)]
            failed = not scores or any(outcome.error for outcome in own)
            means.append(-np.inf if failed else metric.sign * float(np.mean(scores)))
        best = int(np.argmax(means))
        found.setting[arm.name], found.scores[arm.name] = arm.settings[best], []
        found.seconds[arm.name], found.parameters[arm.name], found.memory[arm.name] = 0.0, 0, 0
        if means[best] == -np.inf:
            reason = next((outcome.error for _, outcome in mine if outcome.error), "its scores are not finite")
            found.dropped[arm.name] = f"no configuration worked: {reason}"


def _collect(found: Search, outcomes: list[tuple[Job, Outcome]]) -> None:
    for job, outcome in outcomes:
        if outcome.error:
            found.dropped.setdefault(job.arm, f"failed in a cell: {outcome.error}")
        elif job.arm not in found.dropped:
            count = len(found.scores[job.arm])
            found.scores[job.arm].append(outcome.score)
            found.seconds[job.arm] = (count * found.seconds[job.arm] + outcome.seconds) / (count + 1)
            found.parameters[job.arm] = outcome.parameters
            found.memory[job.arm] = max(found.memory[job.arm], outcome.memory)


def _race(found: Search, metric: Metric, ratio: float) -> None:
    plain = found.best([arm for arm in found.running() if arm.part is None], metric.sign)
    parts = found.best([arm for arm in found.running() if arm.part is not None], metric.sign)
    if not plain:
        return
    best, networks = plain[0], [arm for arm in plain if arm.family == "network"]
    ahead = np.array(found.scores[best.name])
    for arm in plain + parts:
        lead = over_cells(metric.sign * (np.array(found.scores[arm.name]) - ahead), ratio).interval
        if lead.high < 0 and arm not in (*networks[:1], *parts[:ALWAYS_KEPT]):
            found.dropped[arm.name] = f"hopeless after {len(ahead)} cells: behind {best.name} throughout its interval"


def _ids(arm: Arm, ids: Sequence[int]) -> tuple[int, ...]:
    """A network's seeds; the other families draw nothing, so one run stands for all."""
    return tuple(ids) if arm.family == "network" else (ids[0],)
