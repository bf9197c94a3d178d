"""What a user brings beside the data: every form of predictions and costs, and every refusal."""

import numpy as np
import pandas as pd
import pytest

from lossary.compare.brought import SURE, read_costs, read_predictions
from lossary.compare.metrics import named
from lossary.compare.problem import Problem
from lossary.errors import BadInput


def problem(task: str = "classes", classes: tuple[str, ...] = ("no", "yes")) -> Problem:
    """Four rows, named r1 to r4."""
    target = np.array([0, 1, 1, 0]) if task != "real" else np.arange(4.0)
    if task == "multilabel":
        target = np.eye(4, len(classes), dtype=int)
    ids = np.array(["r1", "r2", "r3", "r4"], dtype=object)
    return Problem("made", "", pd.DataFrame({"x": range(4)}), target, "y", task, classes, ids=ids)


@pytest.fixture
def write(tmp_path):
    def writing(text: str, name: str = "p.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return writing


def test_classes_and_probabilities_and_values(write):
    accuracy, loss = named("accuracy"), named("log-loss")
    said = read_predictions(write("id,y\nr4,no\nr1,yes\nr9,no\nr2,yes\nr3,no\n"), problem(), accuracy)
    assert said.shape == (1, 4, 2)
    assert said.argmax(-1).tolist() == [[1, 1, 0, 0]]
    one = read_predictions(write("id,score\nr1,0.1\nr2,0.9\nr3,0.25\nr4,0\n"), problem(), loss)
    np.testing.assert_allclose(np.exp(one[0, :3, 1]), [0.1, 0.9, 0.25], atol=1e-9)
    assert np.exp(one[0, 3, 1]) == pytest.approx(SURE)  # a rounded zero is not infinitely wrong
    wide = "id,yes,other,no\nr1,0.1,x,0.9\nr2,0.9,x,0.1\nr3,0.25,x,0.75\nr4,0,x,1\n"
    np.testing.assert_allclose(read_predictions(write(wide), problem(), loss), one, atol=1e-9)
    values = read_predictions(write("id,v\nr1,1\nr2,2\nr3,3\nr4,4\n"), problem("real", ()), named("MAE"))
    assert named("MAE").score(values, problem("real", ()).target)[0] == 1.0
    labels = problem("multilabel", ("a", "b"))
    odds = read_predictions(write("id,b,a\nr1,0.5,0.9\nr2,0.8,0.5\nr3,0,0\nr4,0,1\n"), labels, named("mAP"))
    np.testing.assert_allclose(odds[0, :2], [[np.log(9), 0], [0, np.log(4)]], atol=1e-9)


def test_of_two_classes_one_column_is_of_the_class_that_it_is_named_after(write):
    for header, second in (("yes", 0.1), ("no", 0.9), ("score", 0.1)):
        notes = []
        text = f"id,{header}\nr1,0.1\nr2,0.9\nr3,0.25\nr4,0.5\n"
        found = read_predictions(write(text), problem(), named("AUROC"), notes)
        assert np.exp(found[0, 0]) == pytest.approx([1 - second, second])
        assert len(notes) == (header == "score")
    assert notes == [
        "Predictions: 'score' was read as the probability of 'yes'; if it is that of 'no', name the column so."
    ]
    both = "id,y, no\nr1,no,0.9\nr2,yes,0.1\nr3,no,0.75\nr4,no,1\n"  # classes are no ranking, probabilities are
    assert np.exp(read_predictions(write(both), problem(), named("AUROC"))[0, :3, 1]) == pytest.approx([0.1, 0.9, 0.25])


def test_other_separators_and_decimal_commas(write):
    loss = named("log-loss")
    plain = read_predictions(write("id,no,yes\nr1,0.9,0.1\nr2,0.1,0.9\nr3,0.75,0.25\nr4,1,0\n"), problem(), loss)
    odd = write("id;no;yes\nr1;0,9;0,1\nr2;0,1;0,9\nr3;0,75;0,25\nr4;1;0\n")
    np.testing.assert_array_equal(read_predictions(odd, problem(), loss), plain)
    tabs = write("id\tyes\nr1\t0.1\nr2\t0.9\nr3\t0.25\nr4\t0\n", "p.tsv")
    np.testing.assert_allclose(read_predictions(tabs, problem(), loss), plain, atol=1e-9)
    assert read_costs(write(";yes;no\nno;5,5;0\nyes;1;20\n"), ("no", "yes")).tolist() == [[0.0, 5.5], [20.0, 1.0]]


def test_parquet_is_read_too(tmp_path):
    path = tmp_path / "p.parquet"
    pd.DataFrame({"id": ["r1", "r2", "r3", "r4"], "y": ["no", "yes", "yes", "no"]}).to_parquet(path)
    assert read_predictions(path, problem(), named("accuracy")).argmax(-1).tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("text", "metric", "words"),
    [
        ("id\nr1\n", "accuracy", "one column"),
        ("id,y\nr1,no\nr1,no\n", "accuracy", "names row 'r1' twice"),
        ("id,y\nr1,no\n", "accuracy", "lacks 3 of the 4 locked rows, such as id 'r2'"),
        ("id,y\nr1,no\nr2,maybe\nr3,no\nr4,no\n", "accuracy", "'no' for 'r1' is no finite number"),
        ("id,y\nr1,no\nr2,yes\nr3,no\nr4,no\n", "AUROC", "AUROC needs probabilities"),
        ("id,y\nr1,0.2\nr2,1.2\nr3,0\nr4,0\n", "AUROC", "expected 0 to 1"),
        ("id,no,yes\nr1,0.2,0.2\nr2,0,1\nr3,0,1\nr4,0,1\n", "AUROC", "sum to 0.4"),
        ("id,y\nr1,inf\nr2,1\nr3,0\nr4,0\n", "AUROC", "no finite number"),
        ("id,y\nr1,0.2\nr2,0.3\nr3,0\nr4,0.5,1\n", "AUROC", "line 5: 3 fields where the header has 2"),
        ("id,no,no \nr1,0.2,0\n", "AUROC", "two columns named 'no'"),
        ('id,y\nr1,"0,2"\nr2,1\nr3,0\nr4,0\n', "AUROC", "'0,2' for 'r1' is no finite number"),
        ("", "accuracy", "is empty"),
    ],
)
def test_predictions_that_cannot_be_used_are_refused(write, text, metric, words):
    with pytest.raises(BadInput, match=words) as refusal:
        read_predictions(write(text), problem(), named(metric))
    assert str(refusal.value).startswith("--predictions: ")
    assert "\n" not in str(refusal.value)


def test_predictions_need_ids_a_file_and_known_classes(write, tmp_path):
    nameless = Problem("made", "", pd.DataFrame({"x": [1]}), np.array([0]), "y", "classes", ("no", "yes"))
    with pytest.raises(BadInput, match="--id"):
        read_predictions(write("id,y\nr1,no\n"), nameless, named("accuracy"))
    with pytest.raises(BadInput, match="no file"):
        read_predictions(tmp_path / "none.csv", problem(), named("accuracy"))
    three = problem(classes=("a", "b", "c"))
    with pytest.raises(BadInput, match="has 'd', which is no class; give one of 'a', 'b', 'c'"):
        read_predictions(write("id,y\nr1,a\nr2,d\nr3,a\nr4,a\n"), three, named("accuracy"))
    with pytest.raises(BadInput, match="a column of probabilities for each of 'a', 'b'"):
        read_predictions(write("id,a\nr1,1\nr2,1\nr3,1\nr4,1\n"), problem("multilabel", ("a", "b")), named("mAP"))


def test_costs(write):
    costs = read_costs(write(",yes,no\nno,5,0\nyes,1,20\n"), ("no", "yes"))
    assert costs.tolist() == [[0.0, 5.0], [20.0, 1.0]]
    for text, words in (
        (",yes\nno,5\nyes,1\n", "has the columns 'yes', expected 'no', 'yes'"),
        (",yes,no\nno,5,0\n", "has the rows 'no', expected"),
        (",yes,no\nno,x,0\nyes,1,2\n", "'x' for 'no' is no finite number"),
    ):
        with pytest.raises(BadInput, match=words):
            read_costs(write(text), ("no", "yes"))
