"""The engine of second-order classifiers: a Dirichlet over class probabilities, from logits to closed forms.

`concentration` maps logits to alpha; the rest are functions of alpha (*batch, K), one value a sample, in nats. All
are written in two small functions, psi(x + 1) - log x and what Stirling's formula leaves of log Gamma. The terms that
grow like alpha log alpha then cancel on paper and not in rounding, so that values and gradients hold from alpha =
1e-12 to 1e12 in single precision too.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require

CAP = 30.0  # of log evidence, either way; the sum of exp(30) over a thousand classes still has a gradient
FAR = 12.0  # from here on the asymptotic series are exact to 1e-14

EVIDENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda z: z.clamp(-CAP, CAP).exp(),
    "softplus": F.softplus,
    "relu": F.relu,
}


def concentration(
    input: Float[Tensor, "*batch classes"], *, evidence: str = "softplus", prior: float | Tensor = 1.0
) -> Float[Tensor, "*batch classes"]:
    """alpha = prior + evidence(input), in single precision at least.

    Args:
        input: logits.
        evidence: "exp" (of logits held within +-30), "softplus" or "relu".
        prior: what alpha is without evidence; above 0, or 0 with "exp", whose evidence is never nothing.

    Raises:
        ValueError: `input` is no tensor of floating-point numbers with two classes or more, `evidence` or `prior`
            outside these.
    """
    require.floating("input", input, at_least_dims=1)
    if input.shape[-1] < 2:
        raise ValueError(f"input: expected at least two classes in the last dimension, got shape {tuple(input.shape)}")
    require.one_of("evidence", evidence, EVIDENCE)
    if evidence == "exp":
        require.number("prior", prior, at_least=0.0)
    else:
        require.number("prior", prior, above=0.0)
    return prior + EVIDENCE[evidence](input.to(torch.promote_types(input.dtype, torch.float32)))


def mean(alpha: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Expected class probabilities, alpha_k / alpha_0."""
    return alpha / alpha.sum(-1, keepdim=True)


def entropy(alpha: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Differential entropy, at most -log Gamma(K), that of the flat Dirichlet."""
    x, classes = _with_total(alpha), alpha.shape[-1]
    c = 1 + (classes - 1) * (torch.arange(classes + 1, device=x.device) == classes)  # 1, ..., 1, K
    more, remainder = _Both.apply(x)
    terms = (c - 0.5) * x.log() + remainder + (x - c) * (x.reciprocal() - more)
    return _less_last(terms) + (classes - 1) / 2 * math.log(2 * math.pi)


def kl(
    alpha: Float[Tensor, "*batch classes"], other: Float[Tensor, "*batch classes"] | None = None
) -> Float[Tensor, "*batch"]:
    """KL(Dir(alpha) || Dir(other)); `other` broadcasts, None is the flat Dirichlet, all ones."""
    if other is None:
        return -entropy(alpha) - math.lgamma(alpha.shape[-1])
    ratio = mean(alpha) / mean(other)
    between = (other * (ratio - 1 - ratio.log())).sum(-1)  # ratio - 1 adds nothing but takes the rounding out of log
    x, y = _with_total(alpha), _with_total(other)
    more, remainder = _Both.apply(x)
    terms = (x / y).log() / 2 + stirling_remainder(y) - remainder + (y - x) * (x.reciprocal() - more)
    return between + _less_last(terms)


def negative_log_density(
    alpha: Float[Tensor, "*batch classes"], log_p: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """-log density of Dir(alpha) at class probabilities; the mean over several is that at the mean of their `log_p`."""
    x, classes = _with_total(alpha), alpha.shape[-1]
    apart = (alpha * (mean(alpha).log() - log_p) + log_p).sum(-1)
    return apart + _less_last(stirling_remainder(x) - x.log() / 2) + (classes - 1) / 2 * math.log(2 * math.pi)


def mutual_information(alpha: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Between label and class probabilities: the entropy that knowing the latter would take away, 0 to log K."""
    more = excess(_with_total(alpha))
    return (mean(alpha) * more[..., :-1]).sum(-1) - more[..., -1]


def mean_entropy(alpha: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Entropy of the expected class probabilities: all uncertainty about the label, 0 to log K."""
    return torch.special.entr(mean(alpha)).sum(-1)


def expected_entropy(alpha: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Expected entropy of the class probabilities: what is left when they are known, 0 to log K."""
    return mean_entropy(alpha) - mutual_information(alpha)


def expected_log_loss(alpha: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """E[-log theta_y] = psi(alpha_0) - psi(alpha_y)."""
    own, total = at(alpha, target), alpha.sum(-1)
    gaps = log_gap(torch.stack([own, total]))
    return gaps[0] - gaps[1] - (own / total).log()


def expected_brier_loss(
    alpha: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """E[sum_k (1[k = y] - theta_k)^2]: the mean's squared error and the variances m_k (1 - m_k) / (alpha_0 + 1)."""
    m = mean(alpha)
    squares = m.square().sum(-1)
    return 1 - 2 * at(m, target) + squares + (1 - squares) / (alpha.sum(-1) + 1)


def log_rising(x: Tensor, power: float | Tensor) -> Tensor:
    """log Gamma(x + power) - log Gamma(x), for x above 0 and power at least 0; E[theta_k^power] is made of these."""
    raised = x + power
    stirling = (x - 0.5) * torch.log1p(power / x) + power * raised.log() - power
    return stirling + stirling_remainder(raised) - stirling_remainder(x)


def at(values: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The entry of each row that belongs to its class."""
    return values.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def excess(x: Tensor) -> Tensor:
    """psi(x + 1) - log x, above 0: about 1 / (2 x) where x is large, -log x where it is small."""
    small, r = x.clamp(max=FAR), x.clamp(min=FAR).reciprocal()
    q = r.square()
    series = r / 2 - q * (1 / 12 - q * (1 / 120 - q * (1 / 252 - q * (1 / 240 - q / 132))))
    return torch.where(x < FAR, torch.digamma(small + 1) - small.log(), series)


def log_gap(x: Tensor) -> Tensor:
    """log x - psi(x), above 0."""
    return x.reciprocal() - excess(x)


def stirling_remainder(x: Tensor) -> Tensor:
    """log Gamma(x) - [(x - 1/2) log x - x + log(2 pi) / 2], above 0: about 1 / (12 x) where x is large."""
    small, r = x.clamp(max=FAR), x.clamp(min=FAR).reciprocal()
    q = r.square()
    series = r * (1 / 12 - q * (1 / 360 - q * (1 / 1260 - q * (1 / 1680 - q / 1188))))
    near = torch.lgamma(small) - (small - 0.5) * small.log() + small - math.log(2 * math.pi) / 2
    return torch.where(x < FAR, near, series)


class _Both(torch.autograd.Function):
    """`excess` and `stirling_remainder` at once: the slope of the second is the first less 1 / (2 x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return excess(x), stirling_remainder(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, by_excess: Tensor, by_remainder: Tensor) -> Tensor:
        x, more = ctx.saved_tensors
        small, r = x.clamp(max=FAR), x.clamp(min=FAR).reciprocal()
        q = r.square()
        series = -q * (1 / 2 - r * (1 / 6 - q * (1 / 30 - q * (1 / 42 - q * (1 / 30 - q * 10 / 132)))))
        slope = torch.where(x < FAR, torch.polygamma(1, small + 1) - small.reciprocal(), series)
        if torch.is_grad_enabled():  # a second derivative is wanted, so this must depend on the input
            more = excess(x)
        return by_excess * slope + by_remainder * (more - 0.5 / x)


def by_outcome(
    loss: Callable[[Tensor, Tensor], Tensor], input: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch classes"]:
    """What a per-sample loss(input, target) comes to for every class that the outcome could be."""
    rows = input.unsqueeze(-2).expand(*input.shape, input.shape[-1])
    return loss(rows, torch.arange(input.shape[-1], device=input.device).expand(input.shape))


def _with_total(alpha: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch more"]:
    """alpha_1, ..., alpha_K and alpha_0 beside them, so that what is asked of all is asked once."""
    return torch.cat([alpha, alpha.sum(-1, keepdim=True)], -1)


def _less_last(terms: Float[Tensor, "*batch more"]) -> Float[Tensor, "*batch"]:
    return terms[..., :-1].sum(-1) - terms[..., -1]
