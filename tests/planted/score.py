"""One faulty score per check of the score battery: each is the distance to the mean, but for its fault."""

import time

import numpy as np
import torch
from sklearn.base import BaseEstimator

from lossary.roles import score


class Distance(BaseEstimator):
    """Distance to the mean of the training features."""

    def __init__(self, *, scale: float = 1.0):
        self.scale = scale

    def check(self, name, x, width=None):
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        if x.ndim != 2 or (width and x.shape[1] != width) or not x.isfinite().all():
            raise ValueError(f"{name}: expected finite rows")
        return x

    def fit(self, features, labels):
        f = self.check("features", features)
        labels = torch.as_tensor(labels)
        if self.scale != self.scale:
            raise ValueError("scale: expected a number")
        if len(labels) != len(f) or labels.is_floating_point():
            raise ValueError("labels: expected class numbers")
        self.mean_ = f.double().mean(0)
        return self

    def anomaly_score(self, x):
        if not hasattr(self, "mean_"):
            raise ValueError("not fitted")
        rows = self.check("x", x, len(self.mean_))
        value = self.scale * torch.linalg.vector_norm(rows.double() - self.mean_, dim=1).to(rows)
        return value.numpy() if isinstance(x, np.ndarray) else value

    def score_samples(self, x):
        return -self.anomaly_score(x)


@score()
class RatesTheBatch(Distance):
    def anomaly_score(self, x):
        return super().anomaly_score(x).mean()


@score()
class RatesTheOrdinary(Distance):
    def anomaly_score(self, x):
        return -super().anomaly_score(x)


@score()
class Positive(Distance):
    def score_samples(self, x):
        return self.anomaly_score(x)


@score()
class TensorsOnly(Distance):
    def anomaly_score(self, x):
        return torch.as_tensor(super().anomaly_score(x))


@score()
class ReturnsNothing(Distance):
    def fit(self, features, labels):
        super().fit(features, labels)


@score()
class AnswersUnfitted(Distance):
    def anomaly_score(self, x):
        if not hasattr(self, "mean_"):
            return torch.zeros(len(x))
        return super().anomaly_score(x)


@score(examples=({"scale": 2.0},))
class ChangesItsParameter(Distance):
    def __init__(self, *, scale: float = 1.0):
        self.scale = scale + 0.5


@score()
class OverwritesItsParameter(Distance):
    def fit(self, features, labels):
        self.scale = 2.0
        return super().fit(features, labels)


@score()
class Remembers(Distance):
    def fit(self, features, labels):
        before = getattr(self, "mean_", 0.0)
        super().fit(features, labels)
        self.mean_ = self.mean_ + before
        return self


@score()
class HoldsALambda(Distance):
    def fit(self, features, labels):
        self.norm_ = lambda rows: rows.norm(dim=1)
        return super().fit(features, labels)


@score()
class ComparesTheBatch(Distance):
    def anomaly_score(self, x):
        value = super().anomaly_score(x)
        return value - value.min()


@score()
class Sleeps(Distance):
    def fit(self, features, labels):
        time.sleep(1.1)
        return super().fit(features, labels)


@score()
class Centres(Distance):
    def fit(self, features, labels):
        super().fit(features, labels)
        features -= self.mean_
        return self


@score()
class DrawsGlobally(Distance):
    def fit(self, features, labels):
        super().fit(features, labels)
        self.mean_ = self.mean_ + 0.1 * torch.randn(len(self.mean_))
        return self


@score()
class RoundsInSingle(Distance):
    def anomaly_score(self, x):
        return super().anomaly_score(x) * (1.001 if x.dtype == torch.float32 else 1.0)


@score()
class OverflowsInBfloat16(Distance):
    def anomaly_score(self, x):
        return super().anomaly_score(x) / (x.dtype != torch.bfloat16)


@score()
class AlwaysDouble(Distance):
    def anomaly_score(self, x):
        return super().anomaly_score(x).double()


@score()
class TakesAnyLabels(Distance):
    def fit(self, features, labels):
        return super().fit(features, torch.zeros(len(features), dtype=torch.int64))


@score()
class PassesNanOn(Distance):
    def check(self, name, x, width=None):
        super().check(name, x.nan_to_num(), width)
        return x


@score()
class TakesAnyScale(Distance):
    def fit(self, features, labels):
        self.scale, given = 1.0, self.scale
        super().fit(features, labels)
        self.scale = given
        return self


@score()
class SaysNothing(Distance):
    """Distance, at some length but without an example of its scale."""


FAULTS = {
    "rates_rows": RatesTheBatch,
    "far_is_unusual": RatesTheOrdinary,
    "negated": Positive,
    "numpy_agrees": TensorsOnly,
    "fits": ReturnsNothing,
    "unfitted": AnswersUnfitted,
    "cloneable": ChangesItsParameter,
    "keeps_parameters": OverwritesItsParameter,
    "refits": Remembers,
    "pickles": HoldsALambda,
    "batch_free": ComparesTheBatch,
    "quick": Sleeps,
    "unmutated": Centres,
    "repeatable": DrawsGlobally,
    "dtypes_agree": RoundsInSingle,
    "bfloat16_finite": OverflowsInBfloat16,
    "dtype_follows": AlwaysDouble,
    "refuses_inputs": TakesAnyLabels,
    "refuses_values": PassesNanOn,
    "refuses_hyper": TakesAnyScale,
    "documented": SaysNothing,
}
