"""WDiscOOD: an input is strange if it is far from every class where classes differ, or far from all where they do not.

Features are whitened by the scatter within classes, then split in two: the few directions in which class means
differ, and the rest, in which all classes are one tight cloud. The score adds the distance to the nearest class mean
in the first to the distance to the common mean in the second. It needs features and labels, no logits, so it also
serves encoders that were never trained to classify; give it rows of length 1 where the encoder was trained on
cosines. With few rows for each feature the whitening amplifies noise: then use a ridge, or fewer features.
"""

from typing import Any, Self

import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from lossary import require
from lossary.ood._gaussian import Moments, as_classes, as_features, like, moments, whitening
from lossary.ood._subspace import between, centre, principal_axes
from lossary.paper import Paper
from lossary.roles import score

PAPER = Paper(
    title="WDiscOOD: Out-of-Distribution Detection via Whitened Linear Discriminant Analysis",
    year=2023,
    helps=("strange-inputs",),
    url="https://arxiv.org/abs/2303.07543",
    departs=(
        "the scatter between classes counts each class by its rows, as in Fisher's definition; the official code"
        " counts all alike, having sampled as many of each",
        "by default all directions in which class means differ are discriminative, at most classes - 1; the"
        " official code asks for as many as there are classes, one of which is then arbitrary",
        "directions without variance within classes are left out, unless there is a ridge",
    ),
    equation=(
        r"s(x)=\min_c\lVert g-\mu_c\rVert+\alpha\,\lVert h-\mu\rVert,\qquad "
        r"S_w^{-1/2}x=(g,h):\ \text{where class means differ, and the rest}"
    ),
)


@score(
    examples=({}, {"weight": 1.0, "discriminants": 1}, {"ridge": 0.1}),
    tune={"weight": (0.5, 1.0, 2.0, 5.0)},
)
class WDiscOOD(BaseEstimator):
    """Distance to the nearest class among the discriminants plus weighted distance to all in the residual.

    score = min_c ||g - mu_c^g|| + alpha ||h - mu^h||, neither squared, where z = S_w^(-1/2) x is a whitened
    feature, g its coordinates on the discriminants and h what is left of z. Higher is more unusual; the paper has
    the negative. Arrays and tensors are answered in kind.

    Args:
        weight: alpha of the residual distance, at least 0. The official scripts take 5 for ResNets, supervised
            contrastive ones and CLIP, and 1 for a vision transformer.
        discriminants: M, how many; None is all in which class means differ, at most classes - 1.
        ridge: added to every variance within classes, at least 0.

    Attributes:
        center_: the mean of all training rows, (D,), float64.
        projection_: to whitened coordinates, the discriminants first, (D, R), R the rank of the scatter within.
        fisher_: scatter between classes along each discriminant, that within being 1; falling, (M,).
        means_: of the classes among the discriminants, about the centre, (K, M).

    Raises:
        ValueError: wrong shapes or dtypes, NaN, no variance within classes and no ridge, more discriminants than
            there are; asked before `fit` (scikit-learn's NotFittedError).

    >>> train = [[-5.0, 1.0], [-3.0, -1.0], [-5.0, -1.0], [-3.0, 1.0], [5.0, 1.0], [3.0, -1.0], [5.0, -1.0], [3.0, 1.0]]
    >>> detector = WDiscOOD(weight=2.0).fit(train, [0, 0, 0, 0, 1, 1, 1, 1])
    >>> detector.anomaly_score([[4.0, 0.0], [1.0, 0.0], [4.0, 3.0]])  # unit variances about (-4, 0) and (4, 0)
    array([0., 3., 6.])
    """

    def __init__(self, *, weight: float = 5.0, discriminants: int | None = None, ridge: float = 0.0) -> None:
        self.weight = weight
        self.discriminants = discriminants
        self.ridge = ridge

    def fit(self, features: Any, labels: Any) -> Self:
        """Learn from training features (N, D) and their labels (N,), numbers or names."""
        return self.fit_moments(_moments(features, labels))

    def fit_moments(self, found: Moments) -> Self:
        """Learn from what `moments` and `merge` kept of training features."""
        require.number("weight", self.weight, at_least=0.0)
        self.n_features_in_ = len(found.scatter)
        self.center_, self.projection_, self.fisher_ = _discriminants(found, self.ridge)
        if self.discriminants is not None:
            require.whole("discriminants", self.discriminants, at_least=1, at_most=len(self.fisher_))
            self.fisher_ = self.fisher_[: self.discriminants]
        self.means_ = (found.means - self.center_) @ self.projection_[:, : len(self.fisher_)]
        return self

    def distances(self, x: Any) -> tuple[Any, Any]:
        """To the nearest class mean among the discriminants and to the common mean in the residual, (N,) each."""
        check_is_fitted(self)
        f = as_features("x", x, len(self.center_))
        dtype = torch.promote_types(f.dtype, torch.float32)
        center, projection, means = (t.to(f.device, dtype) for t in (self.center_, self.projection_, self.means_))
        z = (f.to(dtype) - center) @ projection
        g, h = z[:, : means.shape[1]], z[:, means.shape[1] :]
        return like(x, torch.cdist(g, means).amin(1).to(f.dtype)), like(x, h.norm(dim=1).to(f.dtype))

    def anomaly_score(self, x: Any) -> Any:
        """Both distances, the residual's times `weight`, (N,); higher is more unusual."""
        to_class, to_all = self.distances(x)
        return to_class + self.weight * to_all

    def score_samples(self, x: Any) -> Any:
        """The negative of `anomaly_score`, the paper's own sign."""
        return -self.anomaly_score(x)


def whitened_lda(features: Any, labels: Any, *, ridge: float = 0.0) -> tuple[Any, Any]:
    """The discriminants as directions in feature space, and their Fisher ratios.

    Args:
        features: array or tensor (N, D).
        labels: (N,) class numbers or names.
        ridge: added to every variance within classes, at least 0.

    Returns:
        (D, M) with (x - mean) @ it the discriminative coordinates, in which each class has unit variance, and
        (M,) the ratio of scatter between classes to that within, falling. M is the number of directions in which
        class means differ, at most classes - 1. Arrays or tensors as given.

    Raises:
        ValueError: shapes or dtypes that do not fit, NaN, no variance within classes and no ridge.

    >>> directions, ratios = whitened_lda([[0.0, 2.0], [0.0, -2.0], [6.0, 2.0], [6.2, -2.0]], [0, 0, 1, 1])
    >>> directions.shape, ratios.shape
    ((2, 1), (1,))
    """
    f = as_features("features", features)
    _, projection, fisher = _discriminants(_moments(features, labels), ridge)
    return like(features, projection[:, : len(fisher)].to(f.dtype)), like(features, fisher.to(f.dtype))


def _moments(features: Any, labels: Any) -> Moments:
    f = as_features("features", features)
    classes, index = as_classes("labels", labels, f)
    return moments(f, index, len(classes))


def _discriminants(found: Moments, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centre (D,), projection (D, R) to whitened coordinates with the discriminants first, Fisher ratios (M,)."""
    require.number("ridge", ridge, at_least=0.0)
    white = whitening(found.covariance, ridge)
    if not white.shape[1]:
        raise ValueError("features: no variance within classes to whiten by; give a ridge")
    fisher, axes = principal_axes(white.mT @ between(found) @ white)
    differ = int((fisher > 1e-12 * len(fisher) * fisher[0].clamp_min(1)).sum())  # the rest is rounding
    return centre(found), white @ axes, fisher[: min(differ, len(found.counts) - 1)]
