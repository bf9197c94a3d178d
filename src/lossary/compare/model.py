"""The winner as something to use: trained, calibrated on rows it was not trained on, saved, and asked about new rows.

Half of the locked rows calibrate, the other half tells what comes of it:

- probabilities: softmax(z / T), the temperature T by maximum likelihood;
- sets of classes, and intervals: split conformal, {class: 1 - p <= q} or value +- q, where q is the conformal quantile
  of the calibration rows' scores; of labels, the set whose expected share of missed labels is at most alpha
  (`ConformalRiskControl`). They hold on average over rows like those of the data;
- how unusual a row is: the share of calibration rows whose Mahalanobis distance to the nearest class, or to the whole,
  of the encoded columns is smaller (`MahalanobisDetector`).
"""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binomtest

from lossary.compare.encode import Encoder
from lossary.compare.metrics import level
from lossary.compare.problem import Problem, deal
from lossary.compare.training import Fitted, Fold, fitted
from lossary.errors import BadInput
from lossary.ood import MahalanobisDetector
from lossary.tasks import Seeds
from lossary.uncertainty import ConformalRiskControl
from lossary.uncertainty._calibration import calibrated, expected_calibration_error, temperature
from lossary.uncertainty._conformal import quantile

FILE = "winner.joblib"
ALPHA = 0.1  # sets and intervals miss one in ten, unless told
FEWEST = 40  # locked rows, half of which calibrate
RIDGE = 1e-3  # added to the variances of encoded columns, so that leaving what the rows span counts as strange


@dataclass
class Model:
    """A trained arm. `predictions` are those of `training.predict` for one seed, before any calibration.

    Attributes:
        name, task, target, classes: the arm's, and those of the data.
        columns, shape: names and types of the columns that it was trained on, and the shape of an image.
        encoder, fitted, detector: what was fitted.
        scores: of the calibration rows, for sets and intervals; (rows,), or of labels (rows, labels) with `held`.
        held: which labels hold in the calibration rows.
        distances: of the calibration rows, ascending.
        temperature: 1 before calibration.
        checked: what the other half of the locked rows tells: `rows`, `alpha`, `coverage` (share of rows, of labels
            the mean share of a row's that its set holds) with `low` and `high`, `size` (classes in a set, or width),
            and for classes `calibration_error_before` and `_after`.
    """

    name: str
    task: str
    target: str
    classes: tuple[str, ...]
    columns: dict[str, Any]
    shape: tuple[int, ...]
    encoder: Encoder
    fitted: Fitted
    detector: MahalanobisDetector
    scores: NDArray[np.float64] | None = None
    held: NDArray[np.bool_] | None = None
    distances: NDArray[np.float64] | None = None
    temperature: float = 1.0
    checked: dict[str, Any] = field(default_factory=dict)

    def predictions(self, features: pd.DataFrame) -> NDArray[np.float64]:
        """Log-probabilities (n, classes), log-odds (n, labels) or values (n,)."""
        return self.fitted(self.encoder.transform(features))[0].astype(np.float64)

    def calibrate(self, locked: Problem, rng: np.random.Generator) -> None:
        """Learn what sets, intervals and probabilities need from rows that training has not seen, and check it.

        Fewer than `FEWEST` rows leave the model as it is.
        """
        if len(locked) < FEWEST:
            return
        half = deal(locked, (0.5, 0.5), rng)
        own, other = (locked.rows(np.flatnonzero(half == part)) for part in (0, 1))
        said = self.predictions(own.features)
        self.distances = np.sort(self._distances(own.features))
        if self.task == "real":
            self.scores = np.abs(own.target - said)
        elif self.task == "multilabel":
            self.scores, self.held = expit(said), own.target == 1
        else:
            self.temperature = temperature(said, own.target)
            chance = calibrated(said, self.temperature)
            self.scores = 1 - chance[np.arange(len(own)), own.target]
        self.checked = self._check(other)

    def _check(self, rows: Problem) -> dict[str, Any]:
        said = self.predictions(rows.features)
        found: dict[str, Any] = {"rows": len(rows), "alpha": ALPHA}
        if self.task == "real":
            low, high = self.interval(said, ALPHA)
            hits = (low <= rows.target) & (rows.target <= high)
            found["size"] = float(np.mean(high - low))
        else:
            sets = self.sets(said, ALPHA)
            found["size"] = float(sets.sum(1).mean())
            if self.task == "multilabel":
                missed = ((rows.target == 1) & ~sets).sum(1) / np.maximum((rows.target == 1).sum(1), 1)
                half = 1.96 * missed.std(ddof=1) / np.sqrt(len(rows))
                kept = 1 - float(missed.mean())
                return {**found, "coverage": kept, "low": max(0.0, kept - half), "high": min(1.0, kept + half)}
            hits = sets[np.arange(len(rows)), rows.target]
            for when, chance in (("before", np.exp(said)), ("after", calibrated(said, self.temperature))):
                right = chance.argmax(1) == rows.target
                found[f"calibration_error_{when}"] = expected_calibration_error(chance.max(1).clip(0, 1), right)
        interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
        return {**found, "coverage": float(hits.mean()), "low": float(interval.low), "high": float(interval.high)}

    def sets(self, said: NDArray[np.float64], alpha: float) -> NDArray[np.bool_]:
        """Which classes or labels belong to each row's set, (n, classes)."""
        if self.task == "multilabel":
            control = ConformalRiskControl(alpha=alpha).fit(self.scores, self.held)
            return control.predict(expit(said))
        return 1 - calibrated(said, self.temperature) <= quantile(self.scores, alpha)

    def interval(self, said: NDArray[np.float64], alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper ends, (n,) each; infinite where the calibration rows are too few for alpha."""
        radius = quantile(self.scores, alpha)
        return said - radius, said + radius

    def unusual(self, features: pd.DataFrame) -> NDArray[np.float64]:
        """The share of calibration rows that are less unusual than each row, 0 to 1."""
        return np.searchsorted(self.distances, self._distances(features)) / len(self.distances)

    def _distances(self, features: pd.DataFrame) -> NDArray[np.float64]:
        return self.detector.anomaly_score(self.encoder.transform(features).astype(np.float64))

    def predict(self, features: pd.DataFrame, *, with_sets: bool = False, alpha: float = ALPHA) -> pd.DataFrame:
        """A line for each row: what is predicted, calibrated probabilities, and `with_sets` the rest.

        Columns: the target's name; of classes and labels "p(NAME)" for each; and with sets "set", names with "|"
        between them, or "low" and "high", and "unusual".

        Raises:
            BadInput: sets are asked of a model that had too few locked rows to be calibrated.
        """
        said = self.predictions(features)
        table: dict[str, Any] = {}
        if self.task == "real":
            table[self.target] = said
        elif self.task == "multilabel":
            table[self.target] = [_joined(self.classes, row) for row in said > 0]
        else:
            chosen = level(said) if self.task == "ordinal" else said.argmax(1)
            table[self.target] = np.array(self.classes, dtype=object)[chosen]
        if self.task != "real":
            chance = expit(said) if self.task == "multilabel" else calibrated(said, self.temperature)
            table |= {f"p({name})": chance[:, place] for place, name in enumerate(self.classes)}
        if with_sets:
            if self.scores is None:
                raise BadInput(f"--with-sets: {FEWEST} locked rows are needed to calibrate, and this model had fewer")
            if self.task == "real":
                table["low"], table["high"] = self.interval(said, alpha)
            else:
                table["set"] = [_joined(self.classes, row) for row in self.sets(said, alpha)]
            table["unusual"] = self.unusual(features)
        return pd.DataFrame(table)

    def save(self, folder: Path) -> Path:
        """Writes `FILE` into the folder."""
        path = folder / FILE
        joblib.dump(self, path, compress=3)
        return path


def train(
    problem: Problem, setting: dict[str, Any], *, name: str = "", seed: int = 0, label_noise: float | None = None
) -> Model:
    """The setting's model on all rows of the problem, the weights and batches drawn by one seed."""
    encoder = Encoder().fit(problem.features)
    x = encoder.transform(problem.features)
    group = None if problem.group is None else np.unique(problem.group, return_inverse=True)[1]
    fold = Fold(
        x, problem.target, x[:0], len(problem.classes), group, label_noise, problem.task == "multilabel",
        problem.weight, problem.shape,
    )  # fmt: skip
    kinds = problem.target if problem.task in ("classes", "ordinal") else np.zeros(len(problem), dtype=np.int64)
    return Model(
        name=name,
        task=problem.task,
        target=problem.target_name,
        classes=problem.classes,
        columns={str(column): kind for column, kind in problem.features.dtypes.items()},
        shape=problem.shape,
        encoder=encoder,
        fitted=fitted(setting, fold, Seeds((seed,))),
        detector=MahalanobisDetector(ridge=RIDGE).fit(x.astype(np.float64), kinds),
    )


def read(path: Path) -> Model:
    """A saved model; open only those that you trust, since unpickling runs what it is told to.

    Raises:
        BadInput: there is no such file, or it is no model.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"{str(file)!r}: no such model; name the folder of a comparison, or the {FILE} in it")
    try:
        model = joblib.load(file)
    except (pickle.UnpicklingError, ValueError, EOFError, ImportError, AttributeError, KeyError, IndexError) as error:
        raise BadInput(f"{str(file)!r} is no model that can be read ({type(error).__name__}); compare anew") from None
    if not isinstance(model, Model):
        raise BadInput(f"{str(file)!r} holds a {type(model).__name__}, no model of a comparison")
    return model


def columns_of(model: Model, frame: pd.DataFrame, where: str) -> tuple[pd.DataFrame, list[str]]:
    """The model's columns out of a table, in its types, and notes on what had to give.

    Raises:
        BadInput: a column is missing.
    """
    lacking = [name for name in model.columns if name not in frame]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise BadInput(f"{where} lacks the columns {', '.join(map(repr, lacking[:3]))}{more}, which the model needs")
    taken, notes = {}, []
    for name, kind in model.columns.items():
        values = frame[name]
        if kind.kind in "iufb":
            numbers = pd.to_numeric(values, errors="coerce").astype(float)
            odd = numbers.isna() & values.notna()
            if odd.any():
                notes.append(f"Column {name!r}: {int(odd.sum())} entries that are no numbers are read as missing.")
            taken[name] = numbers.astype(kind) if kind.kind == "f" else numbers
        elif kind.kind == "M":
            taken[name] = pd.to_datetime(values, errors="coerce")
        else:
            taken[name] = values.astype(str).where(values.notna())
    return pd.DataFrame(taken), notes


def _joined(names: tuple[str, ...], chosen: NDArray[np.bool_]) -> str:
    return "|".join(name for name, in_ in zip(names, chosen) if in_)
