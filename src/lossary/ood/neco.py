"""NECO: an input is as strange as its features leave the few directions that the training features span.

Train a classifier past zero error and its features collapse: each class to a point, the points into a space of about
as many dimensions as there are classes, while what the network was never shown comes to stand at right angles to it.
The score is the share of a feature vector's length that lies in the principal space of the training features. It
costs one small matrix product, needs no labels and no outliers, and suits well-trained networks with far more
features than classes; where features are few, or training stopped early, the principal space holds nearly
everything and the score says little.
"""

from typing import Any, Self

import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from lossary import require
from lossary.ood._gaussian import Moments, as_classes, as_features, like, moments
from lossary.ood._subspace import centre, principal_axes, total
from lossary.paper import Paper
from lossary.roles import measure, score

PAPER = Paper(
    title="NECO: NEural Collapse Based Out-of-distribution detection",
    year=2024,
    helps=("strange-inputs",),
    url="https://arxiv.org/abs/2310.06823",
    departs=(
        "for DeiT and Swin the official code takes the denominator from features before standardising and the"
        " numerator from those after; here both come from the same features",
        "a vector of length 0 scores as one outside the principal space; the official code divides 0 by 0",
        "NC1 to NC4 are in lossary.weighting.neural_collapse_metrics, NC5 is here",
    ),
    equation=(
        r"s(x)=-\frac{\lVert P\,h(x)\rVert}{\lVert h(x)\rVert}\quad "
        r"\bigl(\text{times }\max_c z_c(x)\text{, given logits}\bigr),\qquad "
        r"P:\ \text{first principal axes of the training features}"
    ),
)


@score(
    examples=({"components": 2, "standardize": False}, {"standardize": False}),
    tune={"components": (0.5, 0.7, 0.9, 0.95)},
)
class NECO(BaseEstimator):
    """Minus the share of a feature vector's length in the training features' principal space, eq. 6.

    NECO(x) = ||P h(x)|| / ||h(x)||, from 0 to 1, large for ordinary inputs, where h are the features of the last
    layer before the classifier, P their first principal axes; here with a minus, so that higher is more unusual.
    Given logits, the share is multiplied by the largest, as the paper does for all networks but ResNets: a share
    has no scale. Arrays and tensors are answered in kind.

    Args:
        components: d, how many principal axes: a whole number, or the share of variance that they are to
            explain, between 0 and 1.
        standardize: scale every feature to mean 0 and variance 1 over the training rows before anything else, as
            the official code does unless classes are well apart. Without it P acts on h less the mean training
            feature, as in the official code, and the denominator is ||h||, so the share may exceed 1.

    Attributes:
        center_: what is subtracted before projecting, (D,), float64.
        scale_: standard deviations of the features, (D,), 1 where constant or not standardised.
        axes_: the first principal axes, (D, d).
        explained_: the share of the variance that they explain.

    Raises:
        ValueError: wrong shapes or dtypes, NaN, more components than features; asked before `fit`
            (scikit-learn's NotFittedError).

    >>> train = [[2.0, 0.0], [-2.0, 0.0], [0.0, 0.1], [0.0, -0.1]]
    >>> NECO(components=1, standardize=False).fit(train).anomaly_score([[5.0, 0.0], [3.0, 4.0], [0.0, 9.0]])
    array([-1. , -0.6, -0. ])
    """

    def __init__(self, *, components: float = 0.9, standardize: bool = True) -> None:
        self.components = components
        self.standardize = standardize

    def fit(self, features: Any, labels: Any = None) -> Self:
        """Learn from training features (N, D). Labels are looked at for their shape only."""
        f = as_features("features", features)
        if labels is not None:
            as_classes("labels", labels, f)
        return self.fit_moments(moments(f, torch.zeros(len(f), dtype=torch.int64, device=f.device), 1))

    def fit_moments(self, found: Moments) -> Self:
        """Learn from what `moments` and `merge` kept of training features; of how many classes does not matter."""
        self.n_features_in_ = len(found.scatter)
        if isinstance(self.components, int):
            require.whole("components", self.components, at_least=1, at_most=self.n_features_in_)
        else:
            require.number("components", self.components, above=0.0, below=1.0)
        self.center_, covariance = centre(found), total(found)
        spread = covariance.diagonal().sqrt()
        varies = (spread > 1e-12 * self.center_.abs()) & self.standardize  # the rest is rounding
        self.scale_ = torch.where(varies, spread, 1.0)
        variance, axes = principal_axes(covariance / self.scale_ / self.scale_.unsqueeze(1))
        explained = variance.cumsum(0)
        if isinstance(self.components, int):
            kept = self.components
        else:
            kept = int((explained < self.components * explained[-1]).sum()) + 1
        self.axes_ = axes[:, :kept]
        self.explained_ = float(explained[kept - 1] / explained[-1].clamp_min(torch.finfo(explained.dtype).tiny))
        return self

    def anomaly_score(self, x: Any, logits: Any = None) -> Any:
        """Minus the share of each row in the principal space, (N,); higher is more unusual.

        Args:
            x: (N, D) features.
            logits: (N, C), to multiply the share by the largest; where that is negative the order turns, as in
                the official code.
        """
        check_is_fitted(self)
        f = as_features("x", x, len(self.center_))
        dtype = torch.promote_types(f.dtype, torch.float32)
        center, scale, axes = (t.to(f.device, dtype) for t in (self.center_, self.scale_, self.axes_))
        h = f.to(dtype)
        inside = (h - center) @ (axes / scale.unsqueeze(1))
        share = inside.norm(dim=1) / _length((h - center) / scale if self.standardize else h)
        if logits is not None:
            z = as_features("logits", logits)
            if len(z) != len(f):
                raise ValueError(f"logits: expected {len(f)} rows, as many as x, got {len(z)}")
            share = share * z.to(share).amax(1)
        return like(x, -share.to(f.dtype))

    def score_samples(self, x: Any, logits: Any = None) -> Any:
        """The negative of `anomaly_score`, the paper's own sign."""
        return -self.anomaly_score(x, logits)


def neco_score(
    features: Float[Tensor, "rows features"], axes: Float[Tensor, "features axes"]
) -> Float[Tensor, " rows"]:
    """||P h|| / ||h|| for given orthonormal axes, as columns: 1 in their space, 0 at right angles to it or at 0.

    Args:
        features: h, (N, D), centred or standardised as the axes' were.
        axes: (D, d), d at most D.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> neco_score(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0], [0.0]]))
    tensor([0.6000, 0.0000])
    """
    require.floating("features", features, dims=2)
    require.floating("axes", axes, dims=2)
    if axes.shape[0] != features.shape[1] or axes.shape[1] > axes.shape[0]:
        raise ValueError(f"axes: expected ({features.shape[1]}, at most as many), got {tuple(axes.shape)}")
    return (features @ axes).norm(dim=1) / _length(features)


@measure(
    known=(
        {
            "inputs": {
                "features": [[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 3.0]],
                "target": [0, 0, 1, 1],
                "outside": [[2.0, 1.0], [4.0, 7.0]],
            },
            "value": 0.7,  # the mean of 0.6 and 0.8: the outside's mean is (3, 4)
        },
    ),
    within=(0.0, 1.0),
)
def id_ood_orthogonality(
    features: Float[Tensor, "rows features"],
    target: Int[Tensor, " rows"],
    outside: Float[Tensor, "others features"],
) -> Float[Tensor, ""]:
    """NC5: mean over classes of |cos| between a class's mean feature and that of the outsiders, 0 to 1.

    0 is the orthogonality that the paper sees coming with neural collapse; means are not centred.

    Args:
        features: of known inputs, (N, D).
        target: their classes, (N,).
        outside: features of strange inputs, (M, D).

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> id_ood_orthogonality(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[0.6, 0.8]]))
    tensor(0.7000)
    """
    require.floating("features", features, dims=2)
    require.integers("target", target, shape=features.shape[:1])
    require.floating("outside", outside, dims=2)
    require.same_shape("outside", outside, (len(outside), features.shape[1]))
    classes, index = target.unique(return_inverse=True)
    means = features.new_zeros(len(classes), features.shape[1]).index_add(0, index, features)
    return torch.cosine_similarity(means, outside.mean(0), dim=1).abs().mean()


def _length(rows: Tensor) -> Tensor:
    """Norms of the rows, never 0."""
    return rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
