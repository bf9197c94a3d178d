"""One cell of a comparison: a setting trained on some rows, all its seeds as one stack, and scored on others.

Workers load this file alone, so it imports what training takes and no more.
"""

import ctypes
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossary.compare.encode import Encoder
from lossary.compare.metrics import Metric
from lossary.compare.problem import Problem, splits
from lossary.compare.training import Fold, part_of, predict
from lossary.errors import BadInput
from lossary.tasks import Seeds

HELD_OUT = 4  # of so many parts of the search rows, each split for tuning holds out one
# What a family's first training imports, as a part's does its room: a second or two that are not the arm's.
IMPORTS = {"network": "torch._dynamo", "boosting": "lossary.compare.boosting", "linear": "sklearn.linear_model"}


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

    def network(self, rows: int, model: str = "mlp") -> dict[str, Any]:
        """What all networks have in common: about 20 passes over the rows, in 300 to 2,000 steps, unless told."""
        batch = 64
        steps = min(2000, max(300, 20 * rows // batch)) if self.steps is None else self.steps
        made: dict[str, Any] = {"hidden": [64], "activation": "relu"} if model == "mlp" else {}
        return {"model": model, **made, "steps": steps, "batch": batch}


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
    """Scores of a job, one for each seed, or why it failed; a confirmation has predictions too.

    `seconds` are those of the processor, which are the arm's own whatever else the machine does; `elapsed` those that
    went by meanwhile.
    """

    scores: tuple[float, ...] = ()
    seconds: float = 0.0
    elapsed: float = 0.0
    parameters: int = 0
    memory: int = 0
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
        device: str = "cpu",
    ) -> None:
        self.problem, self.search, self.locked = problem, search, locked
        self.metric, self.protocol, self.label_noise, self.device = metric, protocol, label_noise, device
        self._cached: tuple[tuple[Any, ...], Any] = ((), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cached": ((), None)}  # workers encode what they need

    def __call__(self, job: Job) -> Outcome:
        fold, target, weight = self.fold(job.kind, job.partition, job.fold)
        import_module(IMPORTS[job.setting["family"]])
        for entry in job.setting.get("parts", ()):
            part_of(entry)
        before = _reset_peak()
        start, began = process_time(), perf_counter()
        try:
            predictions, parameters = predict(job.setting, fold, Seeds(job.seeds), device=self.device)
        except BadInput:  # the user's own code
            raise
        except ValueError as error:  # a part that refuses this data or this hyper-parameter
            return Outcome(error=" ".join(str(error).split()))
        seconds, elapsed = process_time() - start, perf_counter() - began
        memory = max(_memory("VmHWM") - before, 0) if before else 0
        scores = self.metric.score(predictions.astype(np.float64), target, weight).tolist()
        kept = predictions if job.kind == "confirm" else None
        return Outcome(tuple(scores), seconds, elapsed, parameters, memory, predictions=kept)

    @property
    def ratio(self) -> float:
        """Rows of a test fold over rows of its training part, on average over the cells."""
        parts = [self._splits("cell", partition) for partition in range(self.protocol.partitions)]
        return float(np.mean([len(test) / len(train) for part in parts for train, test in part]))

    def facts(self) -> dict[str, Any]:
        """What fills a part's hyper-parameters when it is trained on all search rows."""
        return self.fold("confirm", 0, 0)[0].facts()

    def fold(self, kind: str, partition: int, number: int) -> tuple[Fold, NDArray[Any], NDArray[np.float64] | None]:
        """The rows to train on and to predict, encoded, with target and weight of the latter; the latest is kept."""
        if self._cached[0] != (kind, partition, number):
            if kind == "confirm":
                train, test = self.search, self.locked
            else:
                train, test = (self.search[rows] for rows in self._splits(kind, partition)[number])
            seen, unseen = self.problem.rows(train), self.problem.rows(test)
            encoder = Encoder().fit(seen.features)
            fold = Fold(
                encoder.transform(seen.features), seen.target, encoder.transform(unseen.features),
                len(seen.classes), None if seen.group is None else np.unique(seen.group, return_inverse=True)[1],
                self.label_noise, seen.task == "multilabel", seen.weight, seen.shape,
            )  # fmt: skip
            self._cached = ((kind, partition, number), (fold, unseen.target, unseen.weight))
        return self._cached[1]

    def _splits(self, kind: str, partition: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        number = HELD_OUT if kind == "tune" else self.protocol.folds
        rng = np.random.default_rng((int(kind == "tune"), partition))
        return splits(self.problem.rows(self.search), number, rng)


def _reset_peak() -> int:
    """What this process holds in memory, which from now on is its peak; 0 where only Linux could tell.

    What was freed but kept for later goes back to the system first: a fit that is given it again would seem to take
    nothing.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):  # no glibc, no such file, no library of one's own
        return 0
    return _memory("VmRSS")


def _memory(name: str) -> int:
    """Bytes of this process, VmRSS now or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
