"""Centroid deferral: accept a prediction whose softmax vector lies nearer to its class's usual one than any error did.

The usual vector of a class is the mean over its correctly classified samples; its safety threshold is the distance
of the nearest sample that was wrongly put into the class. What lies closer is accepted, the rest goes to a human.
Use it where errors are costly and deferral is cheap, on any classifier, without training. The threshold is the least
of all errors' distances: on samples without an error it accepts everything, and the more errors it has seen the less
it accepts, so set it on held-out samples, as many as coverage allows. Compare it with a threshold on the largest
probability: with two classes the distance is that probability's distance to the class's mean, so that what is surer
than usual counts as strange.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from lossary import require
from lossary.paper import Paper
from lossary.uncertainty._calibration import as_labels, rows_of

PAPER = Paper(
    title="When to Accept Automated Predictions and When to Defer to Human Judgment?",
    year=2024,
    helps=("uncertainty", "train-test-shift", "strange-inputs"),
    url="https://arxiv.org/abs/2407.07821",
    departs=(
        "an error's distance is to the class it was taken for, which is all that is known of a new sample; the"
        " authors' code measures it to the class that would have been right, which on their CIFAR-10 outputs leaves"
        " nothing to defer",
        "centroids are the means, without the run of k-means by which the authors' code then moves them",
        "a class without errors accepts all, or up to the largest distance seen, which the paper leaves open",
    ),
    equation=(
        r"\begin{aligned} "
        r"&\text{accept if }\ \lVert p-\mu_c\rVert<\tau_c,\qquad c=\argmax_k p_k\\ "
        r"&\mu_c=\operatorname*{mean}_{i:\,\hat y_i=y_i=c}p_i,\qquad "
        r"\tau_c=\min_{i:\,\hat y_i=c\ne y_i}\lVert p_i-\mu_c\rVert "
        r"\end{aligned}"
    ),
)


class CentroidDeferral(BaseEstimator):
    """Accepts a sample predicted as c if ||p - mu_c|| < tau_c, for softmax vectors p (N, C), and defers otherwise.

    mu_c is the mean p of the samples of class c that are predicted as c, and tau_c the smallest distance to it among
    the samples of other classes that are predicted as c. Arrays or tensors come in, arrays go out.

    Args:
        without_errors: what a class accepts of which no error is known: "all", or with "seen" what is closer than the
            farthest of its correct samples. A class without correct samples accepts nothing.

    Attributes:
        centroids_: mu (C, C), NaN for a class without correct samples.
        thresholds_: tau (C,), infinity where all is accepted, 0 where nothing is.

    Raises:
        ValueError: rows that are not probabilities, labels out of range, another number of classes than in `fit`;
            asked before `fit` (scikit-learn's NotFittedError).

    >>> p = np.array([[0.9, 0.1], [0.7, 0.3], [0.1, 0.9], [0.3, 0.7], [0.6, 0.4]])
    >>> deferral = CentroidDeferral().fit(p, [0, 0, 1, 1, 1])  # the last one is wrong, 0.2 sqrt(2) from (0.8, 0.2)
    >>> deferral.predict([[0.75, 0.25], [0.55, 0.45], [0.45, 0.55]])
    array([ 0, -1,  1])
    """

    def __init__(self, *, without_errors: str = "all") -> None:
        self.without_errors = without_errors

    def fit(self, probabilities: Any, labels: Any) -> Self:
        """Learn centroids and thresholds from softmax vectors (N, C) and class numbers (N,)."""
        p = self._probabilities(probabilities, reset=True)
        y = as_labels("labels", labels, *p.shape)
        right = p[p.argmax(axis=1) == y], y[p.argmax(axis=1) == y]
        counts = np.bincount(right[1], minlength=p.shape[1])
        sums = np.zeros((p.shape[1], p.shape[1]))
        np.add.at(sums, right[1], right[0])
        self.centroids_ = np.where(counts[:, None] > 0, sums / counts.clip(min=1)[:, None], np.nan)
        return self.fit_thresholds(p, y)

    def fit_thresholds(self, probabilities: Any, labels: Any) -> Self:
        """Learn the thresholds anew, the centroids staying as they are; on held-out samples where there are any."""
        require.one_of("without_errors", self.without_errors, ("all", "seen"))
        p, d = self._distances(probabilities)
        y = as_labels("labels", labels, *p.shape)
        predicted = p.argmax(axis=1)
        wrong = predicted != y
        nearest = np.full(p.shape[1], np.inf)
        np.minimum.at(nearest, predicted[wrong], d[wrong])
        if self.without_errors == "seen":
            farthest = np.zeros(p.shape[1])
            np.maximum.at(farthest, predicted[~wrong], d[~wrong])
            nearest = np.where(np.isinf(nearest), farthest, nearest)
        self.thresholds_ = np.where(np.isnan(self.centroids_[:, 0]), 0.0, nearest)
        return self

    def decision_function(self, probabilities: Any) -> NDArray[np.float64]:
        """tau_c - ||p - mu_c||, (N,), c being the predicted class: accepted where it is above 0."""
        p, d = self._distances(probabilities)
        return self.thresholds_[p.argmax(axis=1)] - d

    def predict(self, probabilities: Any) -> NDArray[np.intp]:
        """The predicted class of each sample that is accepted, -1 for one that is deferred, (N,)."""
        p, d = self._distances(probabilities)
        predicted = p.argmax(axis=1)
        return np.where(self.thresholds_[predicted] - d > 0, predicted, -1)

    def anomaly_score(self, probabilities: Any) -> NDArray[np.float64]:
        """||p - mu_c||, (N,), higher is more unusual; sqrt(2), the most there can be, in a class without centroid."""
        return self._distances(probabilities)[1]

    def _distances(self, probabilities: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        check_is_fitted(self, "centroids_")
        p = self._probabilities(probabilities)
        d = np.linalg.norm(p - self.centroids_[p.argmax(axis=1)], axis=1)
        return p, np.where(np.isnan(d), np.sqrt(2), d)

    def _probabilities(self, probabilities: Any, *, reset: bool = False) -> NDArray[np.float64]:
        p = rows_of(self, "probabilities", probabilities, reset=reset)
        if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 0.01:  # bfloat16 has no more digits
            raise ValueError(
                "probabilities: expected rows of numbers >= 0 with sum 1; logits go through a softmax first"
            )
        return p
