"""Covariances of all rows and of class means, and their axes: for detectors that split features in two parts.

Everything is a function of `Moments`, so what is streamed batch by batch, or class by class, serves here too. In
double precision.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lossary.ood._gaussian import Moments


def centre(found: Moments) -> Float[Tensor, " features"]:
    """The mean of all rows."""
    return found.counts @ found.means / found.counts.sum()


def between(found: Moments, about: Tensor | None = None) -> Float[Tensor, "features features"]:
    """Maximum-likelihood covariance of the rows' class means about a point, by default the mean of all rows."""
    apart = found.means - (centre(found) if about is None else about.to(found.means))
    return (found.counts / found.counts.sum() * apart.mT) @ apart


def total(found: Moments, about: Tensor | None = None) -> Float[Tensor, "features features"]:
    """Maximum-likelihood covariance of all rows about a point, by default their mean."""
    return found.covariance + between(found, about)


def principal_axes(covariance: Float[Tensor, "features features"]) -> tuple[Tensor, Tensor]:
    """Variances (D,), falling and not below 0, and as columns of (D, D) the orthonormal axes that have them."""
    variance, axes = torch.linalg.eigh(covariance)
    return variance.flip(0).clamp_min(0), axes.flip(1)
