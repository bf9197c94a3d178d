"""One cell of a comparison: a setting trained on some rows, all its seeds as one stack, and scored on others.

Workers load this file alone, so it imports what training takes and no more.
"""

import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossary.compare.encode import Encoder
from lossary.compare.metrics import Metric, named
from lossary.compare.problem import Problem, folds
from lossary.compare.training import Fold, predict
from lossary.tasks import Seeds

HELD_OUT = 4  # of so many parts of the search rows, each split for tuning holds out one


@dataclass(frozen=True)
class Protocol:
    """How much is run. The defaults are for tables of some thousand rows on two cores: about a minute.

    Attributes:
        partitions, folds, seeds: of the search; a cell is a partition and a fold, with all seeds of an arm.
        confirm_seeds: of each arm on the locked rows.
        settings: configurations of each arm.
        tune_splits, tune_seeds: on which each configuration is tried; a split holds out one row in `HELD_OUT`.
        steps: of each network; None goes by the rows.
    """

    partitions: int = 4
    folds: int = 5
    seeds: int = 5
    confirm_seeds: int = 20
    settings: int = 6
    tune_splits: int = 2
    tune_seeds: int = 2
    steps: int | None = None

    def network(self, rows: int) -> dict[str, Any]:
        """What all networks have in common: about 20 passes over the rows, in 300 to 2,000 steps, unless told."""
        batch = 64
        steps = min(2000, max(300, 20 * rows // batch)) if self.steps is None else self.steps
        return {"hidden": [64], "activation": "relu", "steps": steps, "batch": batch}


@dataclass(frozen=True)
class Job:
    """One stack of seeds to train and score: `kind` is "tune", "cell" or "confirm"."""

    kind: str
    arm: str
    setting: dict[str, Any]
    partition: int
    fold: int
    seeds: tuple[int, ...]
    code: str = ""


@dataclass(frozen=True)
class Outcome:
    """Scores of a job, one for each seed, or why it failed; a confirmation has predictions too."""

    scores: tuple[float, ...] = ()
    seconds: float = 0.0
    parameters: int = 0
    error: str = ""
    predictions: NDArray[Any] | None = None

    @property
    def score(self) -> float:
        """The mean over seeds; NaN where the job failed."""
        return float(np.mean(self.scores)) if self.scores else float("nan")


class Bench:
    """What every worker is given once: the rows, and how a job turns them into scores."""

    def __init__(
        self,
        problem: Problem,
        search: NDArray[np.int64],
        locked: NDArray[np.int64],
        metric: Metric,
        protocol: Protocol,
        label_noise: float | None,
    ) -> None:
        self.problem, self.search, self.locked = problem, search, locked
        self.metric, self.protocol, self.label_noise = metric.name, protocol, label_noise
        self._cached: tuple[tuple[Any, ...], Any] = ((), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cached": ((), None)}  # workers encode what they need

    def __call__(self, job: Job) -> Outcome:
        fold, target = self._fold(job.kind, job.partition, job.fold)
        import_module("torch._dynamo")  # which an optimizer's first step imports: a second that is not the arm's
        start = time.process_time()
        try:
            predictions, parameters = predict(job.setting, fold, Seeds(job.seeds))
        except ValueError as error:  # a part that refuses this data or this hyper-parameter
            return Outcome(error=" ".join(str(error).split()))
        seconds = time.process_time() - start  # of this one thread, whatever else the machine does
        scores = named(self.metric).score(predictions.astype(np.float64), target).tolist()
        return Outcome(tuple(scores), seconds, parameters, "", predictions if job.kind == "confirm" else None)

    def facts(self) -> dict[str, Any]:
        """What fills a part's hyper-parameters when it is trained on all search rows."""
        return self._fold("confirm", 0, 0)[0].facts()

    def _fold(self, kind: str, partition: int, number: int) -> tuple[Fold, NDArray[Any]]:
        """The rows to train on and to predict, encoded, with the target of the latter; the latest is kept."""
        if self._cached[0] != (kind, partition, number):
            if kind == "confirm":
                train, test = self.search, self.locked
            else:
                part = self._parts(kind, partition)
                train, test = self.search[part != number], self.search[part == number]
            features, target = self.problem.features, self.problem.target
            encoder = Encoder().fit(features.iloc[train])
            group = None if self.problem.group is None else np.unique(self.problem.group[train], return_inverse=True)[1]
            x, unseen = (encoder.transform(features.iloc[rows]) for rows in (train, test))
            fold = Fold(x, target[train], unseen, len(self.problem.classes), group, self.label_noise)
            self._cached = ((kind, partition, number), (fold, target[test]))
        return self._cached[1]

    def _parts(self, kind: str, partition: int) -> NDArray[np.int64]:
        number = HELD_OUT if kind == "tune" else self.protocol.folds
        rng = np.random.default_rng((int(kind == "tune"), partition))
        return folds(self.problem.rows(self.search), number, rng)
