"""Columns of any kind as float32 numbers, by what the training rows alone can tell."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

MOST_LEVELS = 30  # a text column with more distinct values is encoded by its character n-grams


class Encoder:
    """Raw columns as a float32 array without gaps. Fit it anew on the training rows of every fold.

    Numbers: the median where one is missing, a column that marks what was missing, then mean 0 and variance 1. Text:
    one column per value, or 30 numbers from its character n-grams where it has more than `MOST_LEVELS` values. Dates:
    year to hour and seconds, standardised. All but the numbers goes through skrub's `TableVectorizer`. Columns that are
    float32 already, as those of images and embeddings are, have no gaps and are only standardised; they come last.

    >>> frame = pd.DataFrame({"x": [1.0, 3.0]})
    >>> Encoder().fit(frame).transform(pd.DataFrame({"x": [5.0, None]}))
    array([[3.],
           [0.]], dtype=float32)
    """

    def fit(self, frame: pd.DataFrame) -> "Encoder":
        kinds = frame.dtypes
        dense = (kinds == np.float32).to_numpy()
        numbers = np.array([kind.kind in "biuf" for kind in kinds], dtype=bool) & ~dense
        wanted = (
            ("numbers", numbers, _Numbers()),
            ("rest", ~numbers & ~dense, None),
            ("dense", dense, StandardScaler()),
        )
        self._parts: list[tuple[str, Any, Any]] = []
        for name, chosen, made in wanted:
            if chosen.any():
                columns = frame.columns[chosen]
                made = _vectorizer() if made is None else made
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # skrub on what it cannot parse as a date
                    self._parts.append((name, columns, made.fit(_values(frame, name, columns))))
        return self

    def transform(self, frame: pd.DataFrame) -> NDArray[np.float32]:
        """(rows, encoded columns). Values not seen in training, and missing ones, are fine."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # unseen categories become zeros, as they should
            parts = [part.transform(_values(frame, name, columns)) for name, columns, part in self._parts]
        return np.hstack([np.asarray(part, dtype=np.float32) for part in parts])


def _values(frame: pd.DataFrame, part: str, columns: Any) -> Any:
    if part == "rest":
        return frame[columns]
    return frame[columns].to_numpy(dtype=np.float64 if part == "numbers" else np.float32)


class _Numbers:
    """Medians for gaps, marks of gaps, and a common scale: scikit-learn's imputer and scaler to the last bit.

    The imputer finds medians by sorting masked arrays, which with 3,000 columns takes several times as long.
    """

    def fit(self, x: NDArray[np.float64]) -> "_Numbers":
        gaps = np.isnan(x)
        self._gappy = gaps.any(axis=0)
        known = ~gaps.all(axis=0)
        self._median = np.zeros(x.shape[1])
        self._median[known] = np.nanmedian(x[:, known], axis=0)
        self._scaler = StandardScaler().fit(self._filled(x))
        return self

    def transform(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._scaler.transform(self._filled(x))

    def _filled(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        gaps = np.isnan(x)
        if not gaps.any() and not self._gappy.any():
            return x
        return np.hstack([np.where(gaps, self._median, x), gaps[:, self._gappy]])


def _vectorizer() -> Any:
    from skrub import DatetimeEncoder, StringEncoder, TableVectorizer  # three seconds, and only for such columns

    numbers = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True), StandardScaler()
    )
    return TableVectorizer(
        cardinality_threshold=MOST_LEVELS + 1,
        low_cardinality=OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32),
        high_cardinality=StringEncoder(n_components=30, random_state=0),
        numeric=numbers,
        datetime=make_pipeline(DatetimeEncoder(), numbers),
    )
