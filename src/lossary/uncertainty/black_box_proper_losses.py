"""Black-box proper losses: score a generator by its draws alone, and right on average.

A proper loss needs the probability that a model gave to what happened; a generator only gives draws. A loss of m
draws is a fair judge of the model p against the target q if its mean over the draws is least at p = q, and that mean
is always a polynomial of degree m at most in p. So the squared distance can be had from two draws, other even powers
from as many draws as the power, and cross-entropy from no fixed number: -log p is no polynomial. It can be had from a
random number. Use `black_box_squared_loss` to compare samplers of symbols, words or whole texts whose probabilities
cannot be computed; plugging frequencies into a formula instead rewards samplers that repeat themselves. For
cross-entropy prefer `sequential_cross_entropy_loss`, which waits for the target to be drawn: the Poisson loss is
unbiased too, but its variance is infinite.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Proper losses for discrete generative models",
    year=2022,
    departs=(
        "built from abstract and introduction; the estimators are derived here, the Poisson one too, and checked by"
        " exact summation; the paper's own construction of it was not read",
        "sequential_cross_entropy_loss is not the paper's: another sampling scheme, with a finite variance",
        "losses are per pair of samples; their mean over pairs is the caller's",
    ),
    equation=(
        r"\ell=\frac{\sum_{i\ne j}[x_i=x_j]}{m(m-1)}-\frac{2\sum_{i,j}[x_i=y_j]}{mn} "
        r"+\frac{\sum_{i\ne j}[y_i=y_j]}{n(n-1)},\qquad "
        r"\mathbb E\,\ell=\sum_k(p_k-q_k)^2,\quad "
        r"x_i\sim p,\ y_j\sim q"
    ),
)


def black_box_squared_loss(
    model_samples: Int[Tensor, "*batch draws"], target_samples: Int[Tensor, "*batch outcomes"], *, offset: bool = True
) -> Float[Tensor, "*batch"]:
    """An unbiased estimate of sum_k (p_k - q_k)^2 from m draws of p and n of q, in float64.

    (ordered pairs of equal draws) / (m (m - 1)) - 2 (equal pairs of draw and outcome) / (m n) + (ordered pairs of equal
    outcomes) / (n (n - 1)). It may be negative. Any symbols will do, as long as equal ones have equal numbers; time
    grows as m log m.

    Args:
        model_samples: draws of the model, at least two.
        target_samples: outcomes, at least two, or one without `offset`.
        offset: add the third term, which does not depend on the model.

    Raises:
        ValueError: samples that are no int64 tensors of these shapes, or too few.

    >>> import torch
    >>> black_box_squared_loss(torch.tensor([0, 0, 1]), torch.tensor([0, 1]))  # 2/6 - 2 * 3/6 + 0
    tensor(-0.6667, dtype=torch.float64)
    """
    _samples(model_samples, target_samples, 2, 2 if offset else 1)
    m, n = model_samples.shape[-1], target_samples.shape[-1]
    found = (_matches(model_samples, model_samples) - 1).sum(-1) / (m * (m - 1))
    found = found - 2 * _matches(target_samples, model_samples).sum(-1) / (m * n)
    if offset:
        found = found + (_matches(target_samples, target_samples) - 1).sum(-1) / (n * (n - 1))
    return found


def black_box_power_loss(
    model_samples: Int[Tensor, "*batch draws"], target_samples: Int[Tensor, "*batch outcomes"], *, power: int = 4
) -> Float[Tensor, "*batch"]:
    """An unbiased estimate of sum_k (p_k - q_k)^power from m draws of p and n of q, in float64.

    The powers of (p_k - q_k) are multiplied out, and p_k^r is estimated by N_k (N_k - 1) ... / (m (m - 1) ...), r
    factors each, where N_k of the draws are k. Power 2 is `black_box_squared_loss`.

    Args:
        model_samples: draws of the model, at least `power`.
        target_samples: outcomes, at least `power`.
        power: even, at least 2.

    Raises:
        ValueError: samples that are no int64 tensors of these shapes, or too few; an odd power.

    >>> import torch
    >>> black_box_power_loss(torch.tensor([0, 0, 0, 0]), torch.tensor([1, 1, 1, 1]))  # one for either symbol
    tensor(2., dtype=torch.float64)
    """
    require.whole("power", power, at_least=2)
    if power % 2:
        raise ValueError(f"power: expected an even number, got {power}")
    _samples(model_samples, target_samples, power, power)
    m, n = model_samples.shape[-1], target_samples.shape[-1]

    def of_symbol(drawn: Tensor, out: Tensor) -> Tensor:
        found = torch.zeros_like(drawn)
        for j in range(power + 1):
            found = found + math.comb(power, j) * (-1) ** j * _power(drawn, m, power - j) * _power(out, n, j)
        return found

    # Each symbol counts once: a share for every time that it was drawn or, if it never was, that it came out.
    drawn, out = _matches(model_samples, model_samples), _matches(model_samples, target_samples)
    total = (of_symbol(drawn, out) / drawn).sum(-1)
    drawn, out = _matches(target_samples, model_samples), _matches(target_samples, target_samples)
    return total + torch.where(drawn > 0, 0.0, of_symbol(drawn, out) / out).sum(-1)


def poisson_cross_entropy_loss(misses: Int[Tensor, "*batch"], *, rate: float) -> Float[Tensor, "*batch"]:
    """An unbiased estimate of -log p_y from a Poisson number of draws of p, in float64.

    Draw the number of draws from Poisson(rate), count those that are not y, n, and take
    sum_{r=1}^n n (n - 1) ... (n - r + 1) / (r rate^r); it comes from -log p = sum_r (1 - p)^r / r. Its variance is
    infinite whatever the rate: it shows that such a loss exists, and a mean of many is no use.

    Args:
        misses: n, not negative.
        rate: of the Poisson distribution, above 0.

    Raises:
        ValueError: `misses` no int64 tensor, a rate not above 0.

    >>> import torch
    >>> poisson_cross_entropy_loss(torch.tensor([0, 1, 2]), rate=2.0)  # 0, 1/2, 2/2 + 2/(2 * 4)
    tensor([0.0000, 0.5000, 1.2500], dtype=torch.float64)
    """
    require.integers("misses", misses)
    if isinstance(rate, Tensor):
        raise ValueError("rate: expected a number, got a tensor")
    require.number("rate", rate, above=0.0)
    term, total = torch.ones_like(misses, dtype=torch.float64), torch.zeros_like(misses, dtype=torch.float64)
    for r in range(1, int(misses.max().item()) + 1 if misses.numel() else 1):
        term = torch.where(misses >= r, term * (misses - r + 1) / rate, 0.0)
        total = total + term / r
    return total


def sequential_cross_entropy_loss(draws: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """An unbiased estimate of -log p_y from draws of p until y comes, in float64: 1 + 1/2 + ... + 1 / (draws - 1).

    It needs 1 / p_y draws on average. Its variance is finite, sum_r (1 - p)^r / r^2 (at most pi^2 / 6), so means of
    many converge as usual.

    Args:
        draws: the number of draws with the one that was y, at least 1.

    Raises:
        ValueError: `draws` no int64 tensor.

    >>> import torch
    >>> sequential_cross_entropy_loss(torch.tensor([1, 2, 4]))
    tensor([0.0000, 1.0000, 1.8333], dtype=torch.float64)
    """
    require.integers("draws", draws)
    first = torch.ones((), dtype=torch.float64, device=draws.device)
    return torch.digamma(draws.double()) - torch.digamma(first)


def _samples(model_samples: Tensor, target_samples: Tensor, draws: int, outcomes: int) -> None:
    for name, given, least in (("model_samples", model_samples, draws), ("target_samples", target_samples, outcomes)):
        require.integers(name, given)
        if given.ndim < 1 or given.shape[-1] < least:
            raise ValueError(f"{name}: expected at least {least} last, got shape {tuple(given.shape)}")
    if model_samples.shape[:-1] != target_samples.shape[:-1]:
        shapes = f"{tuple(model_samples.shape)} and {tuple(target_samples.shape)}"
        raise ValueError(f"target_samples: expected the batch shape of model_samples, got {shapes}")


def _matches(values: Int[Tensor, "*batch some"], among: Int[Tensor, "*batch others"]) -> Float[Tensor, "*batch some"]:
    """How many of `among` equal each value."""
    ordered, values = among.sort(-1).values, values.contiguous()
    found = torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)
    return found.double()


def _power(count: Tensor, size: int, power: int) -> Tensor:
    """count (count - 1) ... / (size (size - 1) ...), so many factors."""
    found = torch.ones_like(count)
    for i in range(power):
        found = found * (count - i) / (size - i)
    return found
