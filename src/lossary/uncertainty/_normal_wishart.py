"""The engine of second-order regression: a distribution over the mean and the precision of a normal one.

`NormalWishart` is conjugate to a normal distribution of D numbers: Lambda from Wishart(W, nu), mu from
N(mean, (kappa Lambda)^-1). With D = 1 it is the normal-inverse-gamma distribution NIG(mean, kappa, nu / 2, 1 / (2 W)),
for which `nig_nll` is the short form. What grows with nu cancels on paper, as in `_dirichlet`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lossary.uncertainty._dirichlet import log_gap, log_rising, stirling_remainder


def nig_nll(gamma: Tensor, upsilon: Tensor, alpha: Tensor, beta: Tensor, target: Tensor) -> Tensor:
    """-log density of y under N(mu, sigma^2), sigma^2 from InvGamma(alpha, beta), mu from N(gamma, sigma^2 / upsilon).

    That is Student's t with 2 alpha degrees of freedom about gamma, squared scale beta (1 + upsilon) / (upsilon alpha).
    """
    omega = 2 * beta * (1 + upsilon)
    squares = upsilon * (target - gamma).square()
    tail = alpha * torch.log1p(squares / omega) + (squares + omega).log() / 2
    return tail + (math.pi / upsilon).log() / 2 - log_rising(alpha, 0.5)


@dataclass(frozen=True)
class NormalWishart:
    """mean (*batch, D), the Cholesky factor of W (*batch, D, D), kappa > 0 and nu > D - 1 (*batch)."""

    mean: Float[Tensor, "*batch targets"]
    factor: Float[Tensor, "*batch targets targets"]
    kappa: Float[Tensor, "*batch"]
    nu: Float[Tensor, "*batch"]

    @property
    def covariance(self) -> Float[Tensor, "*batch targets targets"]:
        """Expected covariance of the numbers about their mean, W^-1 / (nu - D - 1), for nu > D + 1."""
        inverse = torch.cholesky_inverse(self.factor)
        return inverse / (self.nu - self.mean.shape[-1] - 1)[..., None, None]

    def expected_nll(self, target: Float[Tensor, "*batch targets"]) -> Float[Tensor, "*batch"]:
        """E[-log N(target; mu, Lambda^-1)], in nats."""
        wide = self.nu * self._square(target - self.mean) + self.mean.shape[-1] / self.kappa
        psi = _psi(self._halves()).sum(-1)
        return (wide - psi - self._log_det() + self.mean.shape[-1] * math.log(math.pi)) / 2

    def kl(self, other: "NormalWishart") -> Float[Tensor, "*batch"]:
        """KL(self || other), in nats."""
        size, ratio = self.mean.shape[-1], other.kappa / self.kappa
        of_mean = size * (ratio - 1 - ratio.log()) + other.kappa * self.nu * self._square(self.mean - other.mean)
        apart = torch.linalg.solve_triangular(other.factor, self.factor, upper=False)
        of_scale = self.nu * apart.square().sum((-2, -1)) - other.nu * (self._log_det() - other._log_det())
        x, y = self._halves(), other._halves()
        of_shape = torch.lgamma(y) - y * _psi(x) + x.log() / 2 - x * log_gap(x) - stirling_remainder(x)
        constant = size * math.log(2 * math.pi) / 2 + size * (size - 1) / 4
        return (of_mean + of_scale) / 2 + of_shape.sum(-1) - constant

    def _square(self, apart: Tensor) -> Tensor:
        """apart' W apart."""
        return (self.factor.mT @ apart.unsqueeze(-1)).square().sum((-2, -1))

    def _log_det(self) -> Tensor:
        return 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _halves(self) -> Tensor:
        """(nu + 1 - i) / 2 for i = 1, ..., D, the shapes of the chi-squares that a Wishart is made of."""
        return (self.nu.unsqueeze(-1) - torch.arange(self.mean.shape[-1], device=self.nu.device)) / 2


def _psi(x: Tensor) -> Tensor:
    return x.log() - log_gap(x)
