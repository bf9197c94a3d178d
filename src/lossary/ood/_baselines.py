"""What a detector has to beat: the usual scores of logits and of features, higher meaning more unusual.

They need little or no fitting and are short; papers' claims compare with them on the very same network.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.ood._gaussian import ROWS, moments
from lossary.ood._subspace import principal_axes, total

CHUNK = 2**24
"""Distances held at a time."""


def max_softmax(logits: Float[Tensor, "rows classes"]) -> Float[Tensor, " rows"]:
    """Minus the largest softmax probability (Hendrycks and Gimpel 2017), -1 to -1 / classes."""
    require.floating("logits", logits, dims=2)
    return -(logits - logits.amax(1, keepdim=True)).exp().sum(1).reciprocal()


def max_logit(logits: Float[Tensor, "rows classes"]) -> Float[Tensor, " rows"]:
    """Minus the largest logit (Hendrycks et al. 2022)."""
    require.floating("logits", logits, dims=2)
    return -logits.amax(1)


def energy(logits: Float[Tensor, "rows classes"], *, temperature: float = 1.0) -> Float[Tensor, " rows"]:
    """The free energy -T log sum_c exp(z_c / T) (Liu et al. 2020)."""
    require.floating("logits", logits, dims=2)
    require.number("temperature", temperature, above=0.0)
    return -temperature * (logits / temperature).logsumexp(1)


def neighbour_distance(
    x: Float[Tensor, "rows features"], train: Float[Tensor, "known features"], *, k: int = 50
) -> Float[Tensor, " rows"]:
    """Distance to the k-th nearest training row, all rows scaled to length 1 (Sun et al. 2022), 0 to 2.

    Exact, a matrix product and a partial sort; rows that are 0 stay 0.
    """
    require.floating("train", train, dims=2)
    require.floating("x", x, dims=2)
    require.whole("k", k, at_least=1, at_most=len(train))
    x, train = F.normalize(x, dim=1), F.normalize(train, dim=1)
    squares = train.square().sum(1)
    nearest = [
        (squares - 2 * rows @ train.mT).topk(k, largest=False).values[:, -1] + rows.square().sum(1)
        for rows in x.split(max(1, CHUNK // len(train)))
    ]
    return torch.cat(nearest).clamp_min(0).sqrt()


@dataclass(frozen=True)
class VirtualLogit:
    """ViM (Wang et al. 2022): what features have outside their principal space, as one more logit.

    Attributes:
        origin: u = -W^+ b, where the classifier is closest to saying nothing, (D,).
        residual: axes outside the principal space, (D, D - dimension).
        scale: alpha, which gives residuals the mean size of the largest logit.
        weight, bias: of the classifier, (C, D) and (C,).
    """

    origin: Tensor
    residual: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, features: Tensor, weight: Tensor, bias: Tensor, *, dimension: int) -> Self:
        """From training features (N, D), the classifier, and the dimension of the principal space, below D."""
        require.floating("features", features, dims=2)
        require.same_shape("weight", weight, (len(weight), features.shape[1]))
        require.same_shape("bias", bias, (len(weight),))
        require.whole("dimension", dimension, at_most=features.shape[1] - 1)
        weight, bias = weight.detach(), bias.detach()
        origin = -torch.linalg.pinv(weight.double()) @ bias.double()
        found = moments(features, torch.zeros(len(features), dtype=torch.int64, device=features.device), 1)
        variance, axes = principal_axes(total(found, origin))
        if variance[dimension] <= len(variance) * torch.finfo(torch.float64).eps * variance[0]:
            raise ValueError(
                f"dimension: the features have no variance outside a principal space of {dimension} dimensions"
            )
        residual = axes[:, dimension:]
        origin, residual = origin.to(features.dtype), residual.to(features.dtype)
        scale = F.linear(features, weight, bias).amax(1).mean() / _lengths(features, origin, residual).mean()
        return cls(origin, residual, scale, weight, bias)

    def anomaly_score(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
        """alpha ||R' (x - u)|| + the energy of the classifier's logits."""
        logits = F.linear(features, self.weight, self.bias)
        return self.scale * _lengths(features, self.origin, self.residual) + energy(logits)


def _lengths(features: Tensor, origin: Tensor, axes: Tensor) -> Float[Tensor, " rows"]:
    """Of rows less the origin along the axes (D, R)."""
    return torch.cat([((rows - origin) @ axes).norm(dim=1) for rows in features.split(ROWS)])
