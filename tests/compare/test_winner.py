"""`winner.py` of every role, run by itself: it scores what the harness scores with the same setting and seed."""

import ast
import csv
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lossary.compare import winner
from lossary.compare.encode import Encoder
from lossary.compare.load import load
from lossary.compare.metrics import named
from lossary.compare.problem import lock
from lossary.compare.result import Comparison, Interval, winning
from lossary.compare.training import Fold, predict
from lossary.errors import BadInput
from lossary.roles import loss
from lossary.tasks import Seeds
from tests.compare.test_report import arm, sample

NETWORK = {
    "model": "mlp",
    "hidden": [12],
    "activation": "relu",
    "steps": 25,
    "batch": 32,
    "optimizer": "AdamW",
    "lr": 1e-2,
}
CLASSES = {"family": "network", "class_weight": None, **NETWORK, "weight_decay": 1e-2}
REAL = {"family": "network", "error": "squared", **NETWORK, "weight_decay": 1.0}
TREES = {"family": "boosting", "learning_rate": 0.1, "num_leaves": 4, "n_estimators": 10}


def part(name: str, role: str, **hyper: object) -> dict[str, object]:
    return {**CLASSES, "class_weight": "balanced", "parts": [{"part": name, "role": role, "hyper": hyper}]}


def stack(*settings: dict[str, object]) -> dict[str, object]:
    return {**settings[0], "parts": [entry for setting in settings for entry in setting["parts"]]}


# name -> (data, metric, setting)
CASES = {
    "plain": ("page-blocks", "log-loss", CLASSES),
    "loss": ("page-blocks", "log-loss", part("losses.poly_n_cross_entropy", "loss", epsilons=(-0.5, 0.25))),
    "selector": ("wine", "log-loss", part("weighting.InfoBatch", "selector", ratio=0.5)),
    "optimizer": ("wine", "log-loss", part("optim.SAM", "optimizer", rho=0.05)),
    "weighting": ("csv", "log-loss", part("weighting.GroupDRO", "weighting", step_size=0.1)),
    "procedure": ("wine", "AUROC", part("weighting.CompressedCoTeaching", "procedure", sigma=3.0)),
    "stack": (
        "wine",
        "log-loss",
        stack(
            part("weighting.DynamicLossGate", "weighting"),
            part("losses.poly1_cross_entropy", "loss", epsilon=1.0),
            part("weighting.InfoBatch", "selector", ratio=0.5),
            part("losses.VATLoss", "penalty", epsilon=0.3),
            part("optim.SAM", "optimizer", rho=0.05),
        ),
    ),
    "penalty": ("wine", "log-loss", part("losses.VATLoss", "penalty", epsilon=1.0)),
    "built": ("diabetes", "RMSE", {**part("weighting.DistLoss", "loss", weight=0.5), **REAL}),
    "index": ("wine", "log-loss", part("losses.ALDRKLLoss", "loss", alpha=4.0)),
    "boosting": ("breast-cancer", "AUROC", {**TREES, "class_weight": "balanced"}),
    "linear": ("digits", "macro F1", {"family": "linear", "class_weight": None, "C": 0.1}),
    "text": ("german-credit", "balanced accuracy", {"family": "linear", "class_weight": "balanced", "C": 1.0}),
    "real": ("diabetes", "RMSE", REAL),
    "absolute": ("diabetes", "MAE", {**REAL, "error": "absolute"}),
    "real boosting": ("diabetes", "MAE", {**TREES, "error": "absolute"}),
    "ridge": ("diabetes", "R2", {"family": "linear", "error": "squared", "alpha": 1.0}),
}


@pytest.fixture(scope="module")
def odd_csv(tmp_path_factory) -> Path:
    """A file with much that a reader may stumble over: separators, strays, gaps, flags, blanks, hostile names."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)).round(3)
    rows = [["ord", "a\"b'c", "{{ 7*7 }}", "flag", "site", '"""\\', "kind"]]
    for i, (first, second) in enumerate(x):
        mixed = "unknown" if i == 7 else f"{second:.3f}".replace(".", ",")
        label = "" if i == 11 else ["{% raw %} ", 'it\'s "so"'][int(first + rng.normal() > 0)]
        gap = "?" if i % 9 == 0 else str(i)
        rows.append([f"{first:.3f}".replace(".", ","), mixed, gap, str(i % 2 == 0), f"s{i % 3}", "same", label])
    path = tmp_path_factory.mktemp("odd") / "odd \"file'.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    return path


@cache
def problem_of(data: str, odd_csv: Path):
    return load(odd_csv, target="kind", group="site") if data == "csv" else load(data)


def comparison(setting: dict[str, object], metric: str) -> Comparison:
    """One in which an arm of this setting was best, and nothing was confirmed."""
    kind = named(metric)
    best = arm("best", 90.0, None, family=setting["family"], setting=setting)
    return replace(
        sample(),
        arms=(best,),
        confirmation=None,
        metric={"name": kind.name, "unit": kind.unit, "better": kind.better, "why": ""},
    )


@pytest.fixture(scope="module")
def printed(tmp_path_factory, odd_csv) -> tuple[dict[str, str], dict[str, Path]]:
    """What the scripts print, all in one process that starts with nothing of the harness."""
    paths = {}
    for name, (data, metric, setting) in CASES.items():
        out = tmp_path_factory.mktemp("winner")
        paths[name] = winner.write(comparison(setting, metric), problem_of(data, odd_csv), out)
    run = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]: runpy.run_path(path, run_name='__main__')\n"
        "harness = tuple(f'lossary.{name}' for name in ('compare', 'tasks', 'claims'))\n"
        "print(*(name for name in sys.modules if name.startswith(harness)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", run, *map(str, paths.values())], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert len(lines) == len(CASES) + 2, done.stdout
    assert lines[-2] == "", "the scripts import the harness"
    return dict(zip(CASES, lines, strict=False)), paths


@pytest.mark.parametrize("name", CASES)
def test_script_scores_what_the_harness_scores(name, printed, odd_csv):
    data, metric, setting = CASES[name]
    problem = problem_of(data, odd_csv)
    search, locked = lock(problem)
    encoder = Encoder().fit(problem.features.iloc[search])
    x, test = (encoder.transform(problem.features.iloc[rows]) for rows in (search, locked))
    group = None if problem.group is None else np.unique(problem.group[search], return_inverse=True)[1]
    fold = Fold(x, problem.target[search], test, len(problem.classes), group, 0.012)
    predictions, _ = predict(setting, fold, Seeds((0,)))
    expected = float(named(metric).score(predictions.astype(float), problem.target[locked])[0])
    line = printed[0][name]
    said = re.fullmatch(rf"{re.escape(metric)} on ([\d,]+) rows that training did not see: (\S+)", line)
    assert said, line
    assert int(said[1].replace(",", "")) == len(locked)
    # A procedure's second network starts from other weights than in the harness: it cannot be the same to the digit.
    assert float(said[2]) == pytest.approx(expected, rel=0.1 if name == "procedure" else 1e-3)


def trained_by(source: str, problem) -> tuple[dict[str, object], tuple[object, ...], pd.DataFrame]:
    """What a script defines, what it trains on the search rows, and the locked rows' columns."""
    made: dict[str, object] = {"__name__": "winner"}
    exec(compile(source, "winner.py", "exec"), made)
    features, target = made["load"]()
    search, locked = lock(problem)
    return made, made["train"](features.iloc[search], target.iloc[search]), features.iloc[locked]


@pytest.mark.parametrize("name", ["plain", "loss", "optimizer", "index"])
def test_script_and_harness_agree_in_float64(name):
    """With the script's columns, not rounded, and the same weights: what is left is the order of sums, and the weights
    of classes, which the harness rounds to float32."""
    data, metric, setting = CASES[name]
    problem = load(data)
    search, locked = lock(problem)
    torch.set_default_dtype(torch.float64)
    try:
        source = winner.script(comparison(setting, metric), problem).replace("np.float32", "np.float64")
        made, trained, unseen = trained_by(source, problem)
        x, test = (trained[0].transform(problem.features.iloc[rows]) for rows in (search, locked))
        fold = Fold(x, problem.target[search], test, len(problem.classes))
        predictions, _ = predict(setting, fold, Seeds((0,)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert predictions.dtype == np.float64
    np.testing.assert_allclose(np.exp(predictions[0]), made["probabilities"](trained, unseen), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["optimizer", "real"])
def test_script_reproduces_the_confirmed_score_with_other_seeds(name):
    """The mean of ten seeds that the comparison did not draw lies within two standard errors of that of its twenty."""
    data, metric, setting = CASES[name]
    problem = load(data)
    search, locked = lock(problem)
    encoder = Encoder().fit(problem.features.iloc[search])
    x, test = (encoder.transform(problem.features.iloc[rows]) for rows in (search, locked))
    predictions, _ = predict(
        setting, Fold(x, problem.target[search], test, len(problem.classes)), Seeds(tuple(range(20)))
    )
    confirmed = named(metric).score(predictions.astype(float), problem.target[locked])
    scores = []
    for seed in range(20, 30):
        made, trained, unseen = trained_by(winner.script(comparison(setting, metric), problem, seed=seed), problem)
        said = np.log(made["probabilities"](trained, unseen)) if problem.classes else made["predict"](trained, unseen)
        scores.append(named(metric).score(said[None].astype(float), problem.target[locked])[0])
    error = confirmed.std(ddof=1) * np.sqrt(1 / 20 + 1 / 10)
    assert abs(np.mean(scores) - confirmed.mean()) <= 2 * error
    assert np.std(scores) > 0


def test_scripts_are_clean(printed, tmp_path):
    """By the linter and the formatter, outside of any project."""
    for name, path in printed[1].items():
        shutil.copy(path, tmp_path / f"{name.replace(' ', '_')}.py")
    for command in (["check", "--select=E,F,W,I,UP,B,C4,SIM,RUF", "--target-version=py311"], ["format", "--check"]):
        call = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length=120", "."]
        done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout


def test_reads_an_odd_file_as_load_does(printed, odd_csv):
    problem = load(odd_csv, target="kind", group="site")
    features, target, group = runpy.run_path(str(printed[1]["weighting"]))["load"]()
    pd.testing.assert_frame_equal(features, problem.features, check_dtype=False)
    assert [problem.classes[code] for code in problem.target] == target.tolist()
    assert (pd.factorize(group)[0] == problem.group).all()
    assert len(target) == 299  # the row without a target is gone


def test_predicts_labels(printed):
    made = runpy.run_path(str(printed[1]["optimizer"]))
    features, target = made["load"]()
    trained = made["train"](features, target)
    assert (made["predict"](trained, features) == target).mean() > 0.8
    assert made["probabilities"](trained, features.head(50)).sum(1) == pytest.approx(np.ones(50))


def test_hostile_words_stay_words(odd_csv):
    """What comes from the data or the catalogue cannot end a comment or a string."""
    said = 'x"""\n\rimport os\\\n# {{ 7*7 }}'
    hostile = replace(comparison(CLASSES, "accuracy"), sentence=said)
    hostile = replace(hostile, arms=(replace(hostile.arms[0], name=said),))
    source = winner.script(hostile, problem_of("csv", odd_csv))
    statements = {type(node).__name__ for node in ast.parse(source).body}
    assert statements == {"Expr", "Import", "ImportFrom", "Assign", "FunctionDef", "If"}
    assert "import os\n" not in source
    assert "{{ 7*7 }}" in source


def test_loss_module_gets_what_it_asks_for(monkeypatch):
    import torch

    @loss(on="classes")
    class Remembering(torch.nn.Module):
        def __init__(self, num_samples: int, *, momentum: float = 0.9) -> None:
            super().__init__()

        def forward(self, input, target, *, index):
            return input.sum(-1)

    monkeypatch.setattr(winner, "part_of", lambda setting: Remembering)
    source = winner.script(comparison(part("losses.Remembering", "loss", momentum=0.5), "accuracy"), load("wine"))
    assert "criterion = Remembering(num_samples=len(x), momentum=0.5)" in source
    assert "criterion(output, y[rows], index=rows) * class_weight[y[rows]]" in source


def test_which_arm_wins():
    c = sample()
    confirmed, first = c.confirmation, c.arms[0].name
    swapped = replace(c, arms=(c.arms[1], c.arms[0], *c.arms[2:]))
    assert winning(swapped).name == first == confirmed.finalist
    open_ = replace(swapped, confirmation=replace(confirmed, effect=Interval(0.1, -1.0, 1.2)))
    assert winning(open_).name == c.arms[1].name
    worse = replace(swapped, confirmation=replace(confirmed, effect=Interval(-2.0, -3.0, -1.0)))
    assert winning(worse).name == "gradient boosting"
    few = replace(swapped, confirmation=replace(confirmed, exploratory="few rows"))
    assert winning(few).name == c.arms[1].name
    dropped = replace(c, arms=(c.arms[-1], *c.arms[1:]), confirmation=None)
    assert winning(dropped).name == c.arms[1].name


def test_refuses_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="out: cannot write to"):
        winner.write(comparison(CLASSES, "accuracy"), load("wine"), tmp_path / "file")
