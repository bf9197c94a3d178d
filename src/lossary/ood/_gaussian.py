"""The engine of detectors that look at features: class means, the covariance all classes share, whitening.

`moments` reduces features to counts, means and scatter, which `merge` adds up exactly: data may come in
batches, and classes one after another. `TiedGaussian` whitens once, after which the Mahalanobis distances of
N rows to K classes are Euclidean ones, a single matrix product. `as_features` and `as_classes` take arrays
or tensors and check their values; `like` hands the answer back in kind.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.linalg.blas import dsyrk
from scipy.sparse import issparse
from torch import Tensor

ROWS = 256  # whose products are added up at a time: few enough for the cache


def as_features(name: str, x: Any, width: int | None = None) -> Float[Tensor, "rows features"]:
    """Features as a checked tensor; what follows the second dimension is space and is averaged over.

    Args:
        name: of the argument, for the refusal.
        x: array or tensor (N, D) or (N, D, ...), numbers. Integer arrays become float64.
        width: the D that is expected, if any.

    Raises:
        ValueError: shape, dtype, NaN or infinity.
    """
    if not isinstance(x, Tensor):
        if issparse(x):
            raise ValueError(f"{name}: expected a dense array, got a sparse one; give x.toarray()")
        x = np.asarray(x)
        if x.dtype.kind == "O":
            x = x.astype(np.float64)
        if x.dtype.kind not in "fiub":
            hint = ". Complex data not supported" if x.dtype.kind == "c" else ""
            raise ValueError(f"{name}: expected numbers, got an array of {x.dtype}{hint}")
        x = torch.from_numpy(np.require(x, x.dtype if x.dtype.kind == "f" else np.float64, ["C", "W"]))
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.ndim < 2 or 0 in x.shape or width not in (None, x.shape[1]):
        wanted = "(rows, features)" if width is None else f"(rows, {width})"
        # in the words that scikit-learn's own checks look for
        none = f": 0 feature(s) (shape={tuple(x.shape)}) while a minimum of 1 is required."
        hint = none if x.shape[1:] == (0,) else ""
        raise ValueError(f"{name}: expected {wanted}, neither empty, got shape {tuple(x.shape)}{hint}")
    if not torch.stack(x.detach().aminmax()).isfinite().all():  # far faster than isfinite on x, and NaN goes through
        raise ValueError(f"{name}: contains NaN or infinite values")
    return x.flatten(2).mean(2) if x.ndim > 2 else x


def as_classes(name: str, labels: Any, features: Tensor) -> tuple[np.ndarray, Int[Tensor, " rows"]]:
    """The distinct labels, sorted, and for each row the position of its label among them.

    Raises:
        ValueError: not one label for each row of `features`, or labels that are fractions.
    """
    found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.shape != (len(features),):
        raise ValueError(f"{name}: expected one label a row, shape ({len(features)},), got {found.shape}")
    if found.dtype.kind == "f" and not (found == np.floor(found)).all():
        raise ValueError(f"{name}: expected class numbers or names, got fractions")
    classes, index = np.unique(found, return_inverse=True)
    return classes, torch.from_numpy(index).to(features.device)


def like(given: Any, answer: Tensor) -> Any:
    """The answer as a tensor if a tensor was given, otherwise as an array."""
    return answer if isinstance(given, Tensor) else answer.detach().cpu().numpy()


@dataclass(frozen=True)
class Moments:
    """What a sample says about K classes, in float64: counts (K,), means (K, D), pooled scatter (D, D).

    `moments` takes them from rows, `merge` adds those of more rows; several detectors may learn from one, by
    `fit_moments`.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Maximum-likelihood covariance about the class means, (D, D): scatter / N."""
        return self.scatter / self.counts.sum()

    def spread(self, positions: Tensor, classes: int) -> "Moments":
        """The same moments with each class moved to its position among `classes`; the others are empty."""
        counts, means = self.counts.new_zeros(classes), self.means.new_zeros(classes, self.means.shape[1])
        return Moments(
            counts.index_copy(0, positions, self.counts), means.index_copy(0, positions, self.means), self.scatter
        )


def moments(features: Float[Tensor, "rows features"], index: Int[Tensor, " rows"], classes: int) -> Moments:
    """Moments of rows whose class is `index`, 0 to classes - 1; a class may be empty, its mean is then 0."""
    parts = list(zip(features.detach().split(ROWS), index.split(ROWS)))
    counts = torch.bincount(index, minlength=classes).double()
    sums, lower = (counts.new_zeros(size, features.shape[1]) for size in (classes, features.shape[1]))
    for rows, own in parts:
        sums.index_add_(0, own, rows.double())
    means = sums / counts.clamp_min(1).unsqueeze(1)
    for rows, own in parts:
        _add_products(lower, rows - means[own])
    return Moments(counts, means, lower.tril() + lower.tril(-1).mT)


def _add_products(lower: Float[Tensor, "features features"], rows: Float[Tensor, "rows features"]) -> None:
    """Add rows' rows to the lower triangle in place, for half the work of the whole product where BLAS can."""
    if rows.device.type == "cpu":
        dsyrk(1.0, rows.numpy().T, beta=1.0, c=lower.numpy().T, overwrite_c=True)
    else:
        lower.addmm_(rows.mT, rows)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two samples together, exactly (Chan, Golub and LeVeque's update)."""
    counts = a.counts + b.counts
    share = (b.counts / counts.clamp_min(1)).unsqueeze(1)
    apart = b.means - a.means
    between = apart.mT @ (a.counts.unsqueeze(1) * share * apart)
    return Moments(counts, a.means + share * apart, a.scatter + b.scatter + between)


def whitening(covariance: Float[Tensor, "features features"], ridge: float = 0.0) -> Float[Tensor, "features rank"]:
    """W with W W' the pseudo-inverse of covariance + ridge I.

    Directions whose variance is below features * machine epsilon of the largest carry only rounding and are
    left out. Without any variance, W has no columns.
    """
    covariance = covariance + ridge * torch.eye(len(covariance)).to(covariance)
    negligible = len(covariance) * torch.finfo(covariance.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        # The smallest variance is at least 1 / |W|^2, the largest at most the trace: no direction has to go.
        if inverse.square().sum() * covariance.trace() * negligible < 1:
            return inverse.mT
    variance, axes = torch.linalg.eigh(covariance)
    kept = variance > negligible * variance[-1].clamp_min(0)
    return axes[:, kept] / variance[kept].sqrt()


@dataclass(frozen=True)
class TiedGaussian:
    """Normal classes that share a covariance, whitened: where features D go to rank R, and the K means there."""

    centre: Float[Tensor, " features"]
    whitener: Float[Tensor, "features rank"]
    means: Float[Tensor, "classes rank"]

    @classmethod
    def of(cls, found: Moments, ridge: float = 0.0) -> Self:
        """From moments; `ridge` is added to every variance."""
        whitener = whitening(found.covariance, ridge)
        centre = found.means.mean(0)  # distances do not depend on it, their rounding errors do
        return cls(centre, whitener, (found.means - centre) @ whitener)

    def distances(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows classes"]:
        """Squared Mahalanobis distances to the class means, in the features' dtype. Differentiable."""
        dtype = torch.promote_types(features.dtype, torch.float32)  # half precision has too few digits
        centre, whitener, means = (t.to(features.device, dtype) for t in (self.centre, self.whitener, self.means))
        z = (features.to(dtype) - centre) @ whitener
        squares = z.square().sum(1, keepdim=True) + means.square().sum(1) - 2 * z @ means.mT
        return squares.clamp_min(0).to(features.dtype)
