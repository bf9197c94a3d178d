"""One faulty estimator per check of the estimator battery: each is a sound classifier, but for its fault."""

import time

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from lossary.roles import estimator


class NearestMean(ClassifierMixin, BaseEstimator):
    """Nearest class mean."""

    def __init__(self, *, scale: float = 1.0):
        self.scale = scale

    def fit(self, X, y):
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        if self.scale != self.scale:
            raise ValueError("scale: expected a number")
        self.classes_ = np.unique(y)
        self.means_ = np.stack([X[y == c].mean(0) for c in self.classes_])
        return self

    def predict(self, X):
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return self.classes_[((X[:, None] - self.means_) ** 2).sum(-1).argmin(1)]


@estimator(on="classes")
class PredictsOnce(NearestMean):
    def predict(self, X):
        return super().predict(X)[:1]


@estimator(on="classes")
class ForgetsItsWidth(NearestMean):
    def fit(self, X, y):
        super().fit(X, y)
        del self.n_features_in_
        return self


@estimator(on="classes")
class ReturnsNothing(NearestMean):
    def fit(self, X, y):
        super().fit(X, y)


@estimator(on="classes")
class AnswersUnfitted(NearestMean):
    def predict(self, X):
        return super().predict(X) if hasattr(self, "means_") else np.zeros(len(X))


@estimator(on="classes", examples=({"scale": 2.0},))
class ChangesItsParameter(NearestMean):
    def __init__(self, *, scale: float = 1.0):
        self.scale = scale + 0.5


@estimator(on="classes")
class LearnsUnderAPlainName(NearestMean):
    def fit(self, X, y):
        self.rows = len(X)
        return super().fit(X, y)


@estimator(on="classes")
class Remembers(NearestMean):
    def fit(self, X, y):
        before = getattr(self, "means_", 0.0)
        super().fit(X, y)
        self.means_ = self.means_ - 2 * before
        return self


@estimator(on="classes")
class HoldsALambda(NearestMean):
    def fit(self, X, y):
        self.square_ = lambda value: value**2
        return super().fit(X, y)


@estimator(on="real")
class ComparesTheBatch(BaseEstimator):
    def fit(self, X, y):
        self.slope_ = np.linalg.lstsq(X, y)[0]
        return self

    def predict(self, X):
        return (X - X.mean(0)) @ self.slope_


@estimator(on="classes")
class Sleeps(NearestMean):
    def fit(self, X, y):
        time.sleep(1.1)
        return super().fit(X, y)


@estimator(on="classes")
class Centres(NearestMean):
    def fit(self, X, y):
        X -= X.mean(0)
        return super().fit(X, y)


@estimator(on="classes")
class DrawsGlobally(NearestMean):
    def predict(self, X):
        import torch

        return super().predict(X) + torch.randint(9, (len(X),)).numpy()


@estimator(on="classes")
class PrefersDoubles(NearestMean):
    def predict(self, X):
        return super().predict(X) + (X.dtype == np.float32)


@estimator(on="classes")
class FillsInGaps(NearestMean):
    def predict(self, X):
        return super().predict(np.nan_to_num(X))


@estimator(on="classes")
class TakesAnyScale(NearestMean):
    def fit(self, X, y):
        self.scale, given = 1.0, self.scale
        super().fit(X, y)
        self.scale = given
        return self


@estimator(on="classes")
class SaysNothing(NearestMean):
    """Nearest class mean, without an example of its scale."""


@estimator(on="logits")
class ForgetsToNormalise(BaseEstimator):
    def fit(self, logits, labels):
        self.scale_ = np.abs(logits).max()
        return self

    def predict_proba(self, logits):
        check_is_fitted(self)
        return np.exp(logits / self.scale_)


FAULTS = {
    "predicts_rows": PredictsOnce,
    "probabilities": ForgetsToNormalise,
    "conventions": ForgetsItsWidth,
    "fits": ReturnsNothing,
    "unfitted": AnswersUnfitted,
    "cloneable": ChangesItsParameter,
    "keeps_parameters": LearnsUnderAPlainName,
    "refits": Remembers,
    "pickles": HoldsALambda,
    "batch_free": ComparesTheBatch,
    "quick": Sleeps,
    "unmutated": Centres,
    "repeatable": DrawsGlobally,
    "dtypes_agree": PrefersDoubles,
    "refuses_rows": FillsInGaps,
    "refuses_hyper": TakesAnyScale,
    "documented": SaysNothing,
}
