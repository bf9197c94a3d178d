"""Columns of any kind as float32 numbers, by what the training rows alone can tell."""

import warnings

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

MOST_LEVELS = 30  # a text column with more distinct values is encoded by its character n-grams


class Encoder:
    """Raw columns as a float32 array without gaps. Fit it anew on the training rows of every fold.

    Numbers: the median where one is missing, a column that marks what was missing, then mean 0 and variance 1. Text:
    one column per value, or 30 numbers from its character n-grams where it has more than `MOST_LEVELS` values. Dates:
    year to hour and seconds, standardised. All but the numbers goes through skrub's `TableVectorizer`.

    >>> frame = pd.DataFrame({"x": [1.0, 3.0]})
    >>> Encoder().fit(frame).transform(pd.DataFrame({"x": [5.0, None]}))
    array([[3.],
           [0.]], dtype=float32)
    """

    def fit(self, frame: pd.DataFrame) -> "Encoder":
        self._numeric = [column for column in frame if frame[column].dtype.kind in "biuf"]
        parts = [("numbers", _numbers(), self._numeric)]
        other = [column for column in frame if column not in self._numeric]
        if other:
            parts.append(("rest", _vectorizer(), other))
        self._columns = ColumnTransformer(parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # skrub on what it cannot parse as a date
            self._columns.fit(self._floats(frame))
        return self

    def transform(self, frame: pd.DataFrame) -> NDArray[np.float32]:
        """(rows, encoded columns). Values not seen in training, and missing ones, are fine."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # unseen categories become zeros, as they should
            return np.asarray(self._columns.transform(self._floats(frame)), dtype=np.float32)

    def _floats(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame.astype(dict.fromkeys(self._numeric, np.float64))


def _numbers() -> Pipeline:
    return make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True), StandardScaler()
    )


def _vectorizer() -> "object":
    from skrub import DatetimeEncoder, StringEncoder, TableVectorizer  # three seconds, and only for such columns

    return TableVectorizer(
        cardinality_threshold=MOST_LEVELS + 1,
        low_cardinality=OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32),
        high_cardinality=StringEncoder(n_components=30, random_state=0),
        numeric=_numbers(),
        datetime=make_pipeline(DatetimeEncoder(), _numbers()),
    )
