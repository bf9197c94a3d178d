"""The saved winner: what it predicts, that its sets keep their word on fresh rows, and what it refuses."""

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from lossary.compare.model import ALPHA, FILE, columns_of, read, train
from lossary.compare.problem import Problem
from lossary.errors import BadInput

LINEAR = {
    "classes": {"family": "linear", "class_weight": None, "C": 1.0},
    "ordinal": {"family": "linear", "class_weight": None, "C": 1.0},
    "multilabel": {"family": "linear", "class_weight": None, "C": 1.0},
    "real": {"family": "linear", "error": "squared", "alpha": 1.0},
}


def drawn(task: str, n: int, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(n, 3)), columns=["a", "b", "c"])
    frame["kind"] = rng.choice(["x", "y", "z"], n)
    score = (frame.a + 0.5 * frame.b + (frame.kind == "x")).to_numpy() + rng.normal(size=n)
    names = ("low", "mid", "high")
    target = {
        "classes": np.digitize(score, [-0.3, 1.0]),
        "ordinal": np.digitize(score, [-0.3, 1.0]),
        "multilabel": (score[:, None] + rng.normal(size=(n, 3)) > [0, 0.5, 1]).astype(np.int64),
        "real": 10 * score,
    }[task]
    return Problem("made", "", frame, target, "y", task, () if task == "real" else names)


def made(task: str, locked: int = 200, seed: int = 0):
    model = train(drawn(task, 400, seed), LINEAR[task], name="linear model")
    model.calibrate(drawn(task, locked, seed + 1000), np.random.default_rng(seed))
    return model


@pytest.mark.parametrize("task", LINEAR)
def test_sets_and_intervals_keep_their_word_on_fresh_rows(task):
    """Averaged over calibrations the miss is at most alpha; 25 of 100 rows each have a standard error below 1%."""
    missed = []
    for seed in range(25):
        model, fresh = made(task, seed=seed), drawn(task, 400, seed + 2000)
        said = model.predictions(fresh.features)
        if task == "real":
            low, high = model.interval(said, ALPHA)
            missed.append(np.mean((fresh.target < low) | (fresh.target > high)))
        elif task == "multilabel":
            lost = ((fresh.target == 1) & ~model.sets(said, ALPHA)).sum(1)
            missed.append(np.mean(lost / np.maximum(fresh.target.sum(1), 1)))
        else:
            missed.append(np.mean(~model.sets(said, ALPHA)[np.arange(400), fresh.target]))
    assert 0.07 < np.mean(missed) < ALPHA + 0.015
    assert abs(model.checked["rows"] - 100) <= 2  # half of the locked rows
    assert 0.8 < model.checked["coverage"] <= 1


def test_probabilities_are_scaled_by_the_best_temperature():
    model, locked = made("classes"), drawn("classes", 300, 5)
    said = model.predictions(locked.features)
    table = model.predict(locked.features)
    p = table[[f"p({name})" for name in model.classes]].to_numpy()
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_allclose(np.log(p), log_softmax(said / model.temperature, axis=1), atol=1e-9)
    assert table.y.tolist() == [model.classes[k] for k in said.argmax(1)]
    again = train(drawn("classes", 400, 0), LINEAR["classes"])
    rows = drawn("classes", 2000, 7)
    again.calibrate(rows, np.random.default_rng(3))
    logits = again.predictions(rows.features)
    best = minimize_scalar(
        lambda t: -log_softmax(logits / t, axis=1)[np.arange(2000), rows.target].mean(), bounds=(0.1, 10)
    ).x
    assert again.temperature == pytest.approx(best, rel=0.15)  # of one half and of all


def test_far_rows_are_unusual_and_ordinary_ones_are_not():
    model, fresh = made("classes"), drawn("classes", 500, 9).features
    found = model.predict(fresh, with_sets=True)
    assert 0.4 < found.unusual.mean() < 0.6
    far = fresh.assign(a=fresh.a + 30, b=fresh.b - 30)
    assert model.predict(far, with_sets=True).unusual.min() == 1.0
    assert set("|".join(found.set).split("|")) <= {*model.classes, ""}


@pytest.mark.parametrize("task", LINEAR)
def test_a_saved_model_predicts_alike(task, tmp_path):
    model, fresh = made(task), drawn(task, 50, 3).features
    model.save(tmp_path)
    for path in (tmp_path, tmp_path / FILE):
        pd.testing.assert_frame_equal(read(path).predict(fresh, with_sets=True), model.predict(fresh, with_sets=True))


def test_levels_are_medians():
    model, fresh = made("ordinal"), drawn("ordinal", 200, 4)
    p = np.exp(model.predictions(fresh.features))
    expected = [model.classes[int(np.searchsorted(row.cumsum(), 0.5))] for row in p]
    assert model.predict(fresh.features).y.tolist() == expected


def test_too_few_locked_rows_leave_it_uncalibrated():
    model = made("classes", locked=39)
    assert model.temperature == 1.0
    assert not model.checked
    assert "p(low)" in model.predict(drawn("classes", 5, 1).features)
    with pytest.raises(BadInput, match="40 locked rows are needed"):
        model.predict(drawn("classes", 5, 1).features, with_sets=True)


def test_columns_are_found_in_any_order_and_refused_where_they_lack():
    model, fresh = made("classes"), drawn("classes", 20, 2).features
    odd = fresh[["kind", "c", "b", "a"]].assign(extra=1).astype({"a": object})
    odd.loc[3, "a"] = "n/k"
    frame, notes = columns_of(model, odd, "'new.csv'")
    assert list(frame) == ["a", "b", "c", "kind"]
    assert notes == ["Column 'a': 1 entries that are no numbers are read as missing."]
    assert np.isnan(frame.a[3])
    pd.testing.assert_frame_equal(frame.drop(index=3), fresh.drop(index=3), check_dtype=False)
    with pytest.raises(BadInput, match=r"'new.csv' lacks the columns 'a', 'kind'"):
        columns_of(model, fresh[["b", "c"]], "'new.csv'")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such model"):
        read(tmp_path)
    (tmp_path / "text.joblib").write_text("not a model")
    joblib.dump({"a": 1}, tmp_path / "other.joblib")
    for name, words in (("text.joblib", "no model that can be read"), ("other.joblib", "holds a dict")):
        with pytest.raises(BadInput, match=words):
            read(tmp_path / name)
