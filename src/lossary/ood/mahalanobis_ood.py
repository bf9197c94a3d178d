"""Mahalanobis detector: an input is as strange as its features are far from every class.

Fit one Gaussian per class, all with the same covariance, to the features of a trained classifier; no training,
no outliers needed. An input's score is its squared Mahalanobis distance to the nearest class mean, where
softmax confidence would only say which class is nearest. Good at inputs far off the data (another domain,
noise, corruption) and at adversarial ones, best with several layers; less so at new classes that resemble the
old ones. The same distances make a classifier that takes up new classes without training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lossary import require
from lossary.ood._gaussian import Moments, TiedGaussian, as_classes, as_features, like, merge, moments
from lossary.paper import Paper
from lossary.roles import estimator, measure, score

PAPER = Paper(
    title="A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
    year=2018,
    helps=("strange-inputs",),
    url="https://arxiv.org/abs/1807.03888",
    departs=(
        "squared distances as in the paper; the official code has them times -1/2, which ranks alike",
        "before fit_weights, layers count alike: the log-likelihood of independent Gaussian layers",
        "fit_weights is one penalised logistic regression on standardised scores; the official code also"
        " chooses the penalty, by cross-validation",
        "new classes enter the shared covariance by their number of samples, so that the order of classes does"
        " not matter; the paper weighs all classes alike, which is the same for classes of one size",
    ),
    equation=(
        r"s(x)=\sum_l w_l\,\min_c\,(f_l(x)-\mu_{lc})^\top\Sigma_l^{-1}(f_l(x)-\mu_{lc}),\qquad "
        r"l:\ \text{layers},\quad c:\ \text{classes}"
    ),
)


@score(examples=({}, {"ridge": 0.1}))
class MahalanobisDetector(BaseEstimator):
    """Squared Mahalanobis distance to the nearest class, eq. 2, summed over layers with weights.

    Features are arrays or tensors (N, D), or (N, D, ...) to be averaged over space; several layers come as a
    list or a dict of them. Answers are arrays for arrays and tensors, on the same device, for tensors.

    Args:
        ridge: added to every variance, at least 0. With 0 a singular covariance has a pseudo-inverse, as in the
            official code: directions in which the training features do not vary are ignored. With more,
            leaving the training features' subspace counts as strange.

    Attributes:
        gaussians_: by layer, the fitted classes.
        weights_: by layer (L,), float64; ones until `fit_weights`.
        n_features_in_: of all layers together.

    Raises:
        ValueError: wrong shapes or dtypes, NaN, other layers than in `fit`; asked before `fit`
            (scikit-learn's NotFittedError).

    >>> detector = MahalanobisDetector().fit([[0.0, 1.0], [2.0, -1.0], [0.0, -1.0], [2.0, 1.0]], [0, 0, 0, 0])
    >>> detector.anomaly_score([[1.0, 0.0], [4.0, 0.0]])  # one class about (1, 0), unit covariance
    array([0., 9.])
    """

    def __init__(self, *, ridge: float = 0.0) -> None:
        self.ridge = ridge

    def fit(self, features: Any, labels: Any) -> Self:
        """Learn from training features, or layers of them, and their labels (N,), numbers or names."""
        found = {}
        for name, layer in _layers(features).items():
            f = as_features("features", layer)
            classes, index = as_classes("labels", labels, f)
            found[name] = moments(f, index, len(classes))
        return self.fit_moments(found)

    def fit_moments(self, found: Moments | Mapping[Any, Moments]) -> Self:
        """Learn from what `moments` and `merge` kept of training features, or of layers of them by name."""
        require.number("ridge", self.ridge, at_least=0.0)
        layers = found if isinstance(found, Mapping) else {0: found}
        self.gaussians_ = {name: TiedGaussian.of(layer, self.ridge) for name, layer in layers.items()}
        self.weights_ = np.ones(len(self.gaussians_))
        self.n_features_in_ = sum(len(gaussian.centre) for gaussian in self.gaussians_.values())
        return self

    def layer_scores(self, x: Any) -> Any:
        """Distance to the nearest class in each layer, (N, L)."""
        return like(_first(x), self._layer_scores("x", x))

    def anomaly_score(self, x: Any) -> Any:
        """Weighted sum of the layer scores, (N,); higher is more unusual."""
        scores = self._layer_scores("x", x)
        return like(_first(x), scores @ torch.from_numpy(self.weights_).to(scores))

    def score_samples(self, x: Any) -> Any:
        """The negative of `anomaly_score`, as scikit-learn's outlier detectors have it."""
        return -self.anomaly_score(x)

    def fit_weights(self, inside: Any, outside: Any) -> Self:
        """Weigh the layers by logistic regression on a few inputs known to be ordinary and to be strange.

        Args:
            inside: features of ordinary inputs, not those of the training data.
            outside: features of strange ones; adversarial versions of the ordinary ones will do.
        """
        from sklearn.linear_model import LogisticRegression

        ordinary, strange = (self._layer_scores(n, f) for n, f in (("inside", inside), ("outside", outside)))
        scores = torch.cat([ordinary, strange.to(ordinary)]).double().cpu().numpy()
        scale = np.where(np.ptp(scores, 0) > 0, scores.std(0), 1.0)
        target = np.arange(len(scores)) >= len(ordinary)
        self.weights_ = LogisticRegression().fit((scores - scores.mean(0)) / scale, target).coef_[0] / scale
        return self

    def perturbed_features(self, model: Callable[[Tensor], Any], x: Tensor, *, epsilon: float | Tensor) -> Any:
        """Features after the paper's input preprocessing, x - epsilon sign(grad d(x)), each layer with its own.

        The step brings an input closer to its nearest class, ordinary inputs more than strange ones. Give the
        result to `anomaly_score`, and use the same epsilon in `fit_weights`. The paper chooses epsilon
        on validation data, from 0 to 0.01 for pixels from 0 to 1.

        Args:
            model: maps x to features in the form given to `fit`; in evaluation mode.
            x: (N, ...) inputs, floating point.
            epsilon: size of the step; a tensor broadcasts over x, such as 0.0014 / std for inputs
                standardised by channel.
        """
        check_is_fitted(self)
        require.number("epsilon", epsilon, at_least=0.0)
        require.floating("x", x, at_least_dims=2)
        layers = {}
        for name, gaussian in self.gaussians_.items():
            with torch.enable_grad():
                start = x.detach().requires_grad_()
                distance = gaussian.distances(as_features("model", _layers(model(start))[name])).amin(1)
                (slope,) = torch.autograd.grad(distance.sum(), start)
            with torch.no_grad():
                features = model(x - epsilon * slope.sign())
            layers[name] = _layers(features)[name]
        return layers if isinstance(features, Mapping) else list(layers.values())

    def _layer_scores(self, name: str, x: Any) -> Float[Tensor, "rows layers"]:
        check_is_fitted(self)
        layers = _layers(x)
        if layers.keys() != self.gaussians_.keys():
            raise ValueError(f"{name}: expected the layers {list(self.gaussians_)} of fit, got {list(layers)}")
        with torch.no_grad():
            pairs = [(g, as_features(name, layers[key], len(g.centre))) for key, g in self.gaussians_.items()]
            if len({len(f) for _, f in pairs}) > 1:
                raise ValueError(f"{name}: expected as many rows in each layer, got {[len(f) for _, f in pairs]}")
            return torch.stack([g.distances(f).amin(1) for g, f in pairs], dim=1)


@estimator(on="classes", examples=({}, {"ridge": 0.1}))
class MahalanobisClassifier(ClassifierMixin, BaseEstimator):
    """Nearest class mean in Mahalanobis distance, sec. 2.3; classes may be added later, without training.

    It is linear discriminant analysis with equal priors, on whatever features X are. Arrays and tensors
    are answered in kind.

    Args:
        ridge: added to every variance, at least 0; see `MahalanobisDetector`.

    Attributes:
        classes_: labels seen so far, sorted.
        moments_: their counts, means and scatter, all that is kept of the data.

    Raises:
        ValueError: wrong shapes or dtypes, NaN; asked before `fit` (scikit-learn's NotFittedError).

    >>> classifier = MahalanobisClassifier().fit([[0.0], [2.0], [6.0], [8.0]], ["a", "a", "b", "b"])
    >>> classifier.partial_fit([[20.0], [22.0]], ["c", "c"]).predict([[2.0], [12.0], [15.0]])
    array(['a', 'b', 'c'], dtype='<U1')
    """

    def __init__(self, *, ridge: float = 0.0) -> None:
        self.ridge = ridge

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from features (N, D) and labels (N,), forgetting what was learned before."""
        vars(self).pop("moments_", None)
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Learn from more rows, of known or new classes; the result is that of one fit on all rows.

        Args:
            X: (N, D).
            y: (N,).
            classes: not needed; scikit-learn's interface has it.
        """
        require.number("ridge", self.ridge, at_least=0.0)
        first = not hasattr(self, "moments_")
        if isinstance(X, Tensor):
            require.integers("y", y, shape=X.shape[:1])
        else:
            X, y = validate_data(self, X, y, reset=first)
            check_classification_targets(y)
        f = as_features("X", X, None if first else self.n_features_in_)
        self.n_features_in_ = f.shape[1]
        found, index = as_classes("y", y, f)
        now = moments(f, index, len(found))
        if first:
            self.classes_, self.moments_ = found, now
        else:
            labels = np.union1d(self.classes_, found)
            old, new = (torch.from_numpy(np.searchsorted(labels, c)).to(f.device) for c in (self.classes_, found))
            self.moments_ = merge(self.moments_.spread(old, len(labels)), now.spread(new, len(labels)))
            self.classes_ = labels
        self.gaussian_ = TiedGaussian.of(self.moments_, self.ridge)
        return self

    def predict(self, X: Any) -> Any:
        """The nearest class of each row, (N,)."""
        distances = self._distances(X)
        nearest = self.classes_[distances.argmin(1).cpu().numpy()]
        return torch.from_numpy(nearest).to(distances.device) if isinstance(X, Tensor) else nearest

    def predict_proba(self, X: Any) -> Any:
        """Posterior probabilities of `classes_` under equal priors, (N, K): softmax of minus half the distances."""
        return like(X, torch.softmax(self._distances(X) / -2, dim=1))

    def _distances(self, X: Any) -> Float[Tensor, "rows classes"]:
        check_is_fitted(self)
        if not isinstance(X, Tensor):
            X = validate_data(self, X, reset=False)
        return self.gaussian_.distances(as_features("X", X, self.n_features_in_))


def class_conditional_gaussian(features: Any, labels: Any) -> tuple[Any, Any]:
    """Class means and tied covariance, eq. 1: mu_c, and Sigma = (1/N) sum_i (f_i - mu_y_i)(f_i - mu_y_i)'.

    Args:
        features: array or tensor (N, D), or (N, D, ...) to be averaged over the last dimensions.
        labels: (N,) class numbers or names.

    Returns:
        Means (K, D), in the sorted order of the labels, and covariance (D, D); arrays or tensors as given.

    Raises:
        ValueError: shapes or dtypes that do not fit, NaN or infinite features.

    >>> means, covariance = class_conditional_gaussian([[0.0, 1.0], [2.0, 1.0], [5.0, 3.0]], [0, 0, 1])
    >>> means.tolist(), covariance.tolist()
    ([[1.0, 1.0], [5.0, 3.0]], [[0.6666666666666666, 0.0], [0.0, 0.0]])
    """
    f = as_features("features", features)
    classes, index = as_classes("labels", labels, f)
    found = moments(f, index, len(classes))
    return like(features, found.means.to(f.dtype)), like(features, found.covariance.to(f.dtype))


@measure(
    known=(
        {
            "inputs": {"inside": [1.0, 4.0, 2.0, 3.0], "outside": [0.5, 6.0, 3.5, 5.0]},
            "hyper": {"tpr": 0.75},
            "value": 0.75,
        },
        {"inputs": {"inside": [1.0, 1.0, 1.0], "outside": [1.0, 1.5]}, "value": 0.5},
    ),
    within=(0.0, 1.0),
)
def tnr_at_tpr(
    inside: Float[Tensor, " inside"], outside: Float[Tensor, " outside"], *, tpr: float = 0.95
) -> Float[Tensor, ""]:
    """Share of strange inputs caught by the threshold that lets a share `tpr` of ordinary ones pass, 0 to 1.

    The paper's first figure of merit; 1 - it is the false-positive rate at 95% recall of others. Ties with
    the threshold pass.

    Args:
        inside: anomaly scores of ordinary inputs.
        outside: anomaly scores of strange ones.
        tpr: least share of ordinary inputs that pass, above 0 and at most 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, or tpr outside this range.

    >>> tnr_at_tpr(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 3.5, 5.0, 6.0]), tpr=0.75)
    tensor(0.7500)
    """
    require.floating("inside", inside, dims=1)
    require.floating("outside", outside, dims=1)
    require.number("tpr", tpr, above=0.0, at_most=1.0)
    passing = math.ceil(round(tpr * len(inside), 9))  # 0.95 * 20 is a rounding error above 19
    return (outside > inside.kthvalue(passing).values).to(outside.dtype).mean()


def _layers(features: Any) -> dict[Any, Any]:
    """Layers by name; unnamed ones are numbered."""
    if isinstance(features, Mapping) and not issparse(features):  # one of scipy's sparse matrices is a dict
        return dict(features)
    several = isinstance(features, Sequence) and len(features) and getattr(features[0], "ndim", 0) >= 2
    return dict(enumerate(features)) if several else {0: features}


def _first(features: Any) -> Any:
    return next(iter(_layers(features).values()))
