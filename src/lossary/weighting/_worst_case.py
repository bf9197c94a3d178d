"""Worst-case weights: the distribution over samples, close to uniform, under which the mean loss is largest.

Each function solves max_q sum_i q_i l_i over probabilities q, either within a ball, D(q) <= radius, or less a penalty,
strength * D(q). D is the divergence from the uniform distribution 1/n: Kullback-Leibler, KL = sum q log(n q), in nats;
chi-square, chi2 = n sum (q - 1/n)^2; a cap on every q_i (CVaR); or a spectrum, which gives the k-th largest loss the
k-th largest of given weights, and whose permutations span the permutahedron.

Losses are (*batch, n), every row a problem of its own; weights are of the same shape and sum to 1 in each row. Equal
losses weigh the same. Where some losses are +inf the weights are their limit as these grow. The work is done in
double precision. No gradient passes: by Danskin's theorem that of the maximum is q itself.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lossary import require

Weights = Float[Tensor, "*batch n"]


def kl_penalty(losses: Weights, strength: float) -> Weights:
    """q = softmax(l / strength): exponential tilting. strength > 0, in the unit of the losses."""
    values = _double(losses)
    require.number("strength", strength, above=0.0)
    return (values / strength).softmax(-1).to(losses.dtype)


def kl_ball(losses: Weights, radius: float) -> Weights:
    """q = softmax(l / tau), with the tau at which KL is the radius; the largest losses alone where they reach it.

    Args:
        losses: at least one in a row.
        radius: >= 0, in nats; log n is as far as a single sample.
    """
    values = _double(losses)
    require.number("radius", radius, at_least=0.0)
    n, scale = values.shape[-1], (values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True))
    values = (values - values.amax(-1, keepdim=True)) / torch.where(scale > 0, scale, 1)
    highest = (values == 0).double().sum(-1, keepdim=True)
    beyond = (radius >= (n / highest).log()) | (radius == 0)
    # KL is a rising function of 1 / tau, about variance / (2 tau^2) near 0: Newton on logarithms, kept within a
    # bracket that every step narrows.
    log_beta = (0.5 * (2 * max(radius, 1e-300) / values.var(-1, correction=0, keepdim=True)).log()).nan_to_num(
        posinf=0.0
    )
    low, high = torch.full_like(log_beta, -math.inf), torch.full_like(log_beta, math.inf)
    squared = values**2
    for _ in range(200):
        beta = log_beta.exp()
        raised = (beta * values).exp_()
        total = raised.sum(-1, keepdim=True)
        mean, square = (torch.linalg.vecdot(raised, v).unsqueeze(-1) / total for v in (values, squared))
        divergence = beta * mean - (total / n).log()
        gap = divergence - radius
        if ((gap.abs() <= 1e-13 * max(1.0, radius)) | beyond).all():
            break
        low, high = torch.where(gap < 0, log_beta, low), torch.where(gap > 0, log_beta, high)
        step = log_beta - (divergence / radius).log() * divergence / (beta**2 * (square - mean**2))
        middle = torch.where(low.isinf(), high - 1, torch.where(high.isinf(), low + 1, (low + high) / 2))
        log_beta = torch.where((step > low) & (step < high), step, middle)
    at_limit = (values == 0) / highest if radius else torch.full_like(values, 1 / n)
    return torch.where(beyond, at_limit, raised / total).to(losses.dtype)


def chi2_penalty(losses: Weights, strength: float) -> Weights:
    """q = (1/n + l / (2 n strength) - theta)_+, the projection onto the simplex. strength > 0."""
    values = _double(losses)
    require.number("strength", strength, above=0.0)
    target = (values - values.amax(-1, keepdim=True)) / (2 * values.shape[-1] * strength)
    descending = _sorted(target).flip(-1)
    count = torch.arange(1, values.shape[-1] + 1, device=values.device)
    theta = (descending.cumsum(-1) - 1) / count
    support = (descending > theta).sum(-1, keepdim=True)
    return (target - theta.gather(-1, support - 1)).clamp(min=0).to(losses.dtype)


def chi2_ball(losses: Weights, radius: float) -> Weights:
    """q proportional to (l - eta)_+, with the eta at which chi2 is the radius >= 0; n - 1 is as far as one sample."""
    values = _double(losses)
    require.number("radius", radius, at_least=0.0)
    n = values.shape[-1]
    values = values - values.amax(-1, keepdim=True)
    descending = _sorted(values).flip(-1)
    count = torch.arange(1, n + 1, device=values.device, dtype=values.dtype)
    first, second = descending.cumsum(-1), (descending**2).cumsum(-1)
    # With eta at the j-th largest loss: sums over those above it of l - eta and of its square. chi2 falls with j.
    above = first - count * descending
    squares = second - 2 * descending * first + count * descending**2
    divergence = torch.where(above > 0, n * squares / above**2 - 1, math.inf)
    support = (divergence >= radius).sum(-1, keepdim=True)
    mean = first.gather(-1, support - 1) / support
    variance = (second.gather(-1, support - 1) / support - mean**2).clamp(min=0)
    surplus = support * (1 + radius) - n
    highest = (values == 0).double().sum(-1, keepdim=True)
    beyond = (radius >= n / highest - 1) | (surplus <= 0)
    distance = (n * variance / torch.where(beyond, 1.0, surplus)).sqrt()  # of the supported mean from eta
    raised = torch.where(beyond, (values == 0).double(), (values - mean + distance).clamp(min=0))
    if radius == 0:
        raised = torch.ones_like(values)
    return (raised / raised.sum(-1, keepdim=True)).to(losses.dtype)


def cvar(losses: Weights, share: float) -> Weights:
    """q_i <= 1 / (share n), 0 < share <= 1: all weight on the worst share; equal losses at its edge divide the rest."""
    values = _double(losses, 1.0)
    require.number("share", share, above=0.0, at_most=1.0)
    n = values.shape[-1]
    worst = max(1.0, share * n)
    edge = values.kthvalue(n - math.ceil(worst) + 1, dim=-1, keepdim=True).values
    above, level = (values > edge).double(), (values == edge).double()
    left = worst - above.sum(-1, keepdim=True)
    return ((above + level * left / level.sum(-1, keepdim=True)) / worst).to(losses.dtype)


def spectral(losses: Weights, spectrum: Float[Tensor, " n"]) -> Weights:
    """The k-th smallest loss gets the k-th weight of the spectrum; equal losses share theirs.

    Args:
        losses: (*batch, n).
        spectrum: nondecreasing, non-negative, sums to 1.
    """
    values, sigma = _double(losses, 1.0), _spectrum(spectrum, losses)
    order = values.argsort(-1) if values.is_cuda else torch.from_numpy(np.argsort(values.numpy()))
    ascending = values.gather(-1, order)
    place, n = torch.arange(losses.shape[-1], device=values.device), losses.shape[-1]
    new = torch.ones_like(values, dtype=torch.bool)
    new[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    # Of every run of equal losses where it begins, and where the next one does.
    low = place.where(new, 0).cummax(-1).values
    high = (place + 1).where(new.roll(-1, -1), n).flip(-1).cummin(-1).values.flip(-1)
    until = torch.cat([sigma.new_zeros(1), sigma.cumsum(0)])
    return torch.empty_like(values).scatter_(-1, order, (until[high] - until[low]) / (high - low)).to(losses.dtype)


def spectral_penalty(losses: Weights, spectrum: Float[Tensor, " n"], strength: float) -> Weights:
    """max q.l - strength chi2(q) over the permutahedron of a spectrum; strength 0 is `spectral`.

    This is the projection of 1/n + l / (2 n strength), which is an isotonic regression along the sorted losses and
    solved exactly by pooling adjacent violators.

    Args:
        losses: (*batch, n).
        spectrum: as in `spectral`.
        strength: nu >= 0.
    """
    require.number("strength", strength, at_least=0.0)
    if strength == 0:
        return spectral(losses, spectrum)
    n = losses.shape[-1]
    # An infinite loss is as far above the others as any spectrum can tell apart.
    values, sigma = _double(losses, 4 * n * strength).reshape(-1, n), _spectrum(spectrum, losses)
    target = (values - values.amax(-1, keepdim=True)) / (2 * n * strength)
    rows = [_projected(row, sigma.numpy(force=True)) for row in target.numpy(force=True)]
    return torch.from_numpy(np.stack(rows)).view(losses.shape).to(losses)


def _projected(target: np.ndarray, spectrum: np.ndarray) -> np.ndarray:
    from scipy.optimize import isotonic_regression

    order = np.argsort(target, kind="stable")
    q = np.empty_like(target)
    q[order] = target[order] - isotonic_regression(target[order] - spectrum).x
    return np.maximum(q, 0)


def _double(losses: Tensor, gap: float | None = None) -> Tensor:
    """In double precision, infinite losses put `gap` above the largest finite one of their row.

    Without a gap: where a row has infinite losses, a huge number for them and 0 for the others, since next to them
    these are alike.
    """
    require.floating("losses", losses, at_least_dims=1)
    if losses.shape[-1] == 0:
        raise ValueError(f"losses: expected at least one sample, got shape {tuple(losses.shape)}")
    values = losses.detach().double()
    infinite = values == math.inf
    if gap is None:
        return torch.where(infinite.any(-1, keepdim=True), infinite.double() * 1e100, values)
    highest = values.masked_fill(infinite, -math.inf).amax(-1, keepdim=True)
    return torch.where(infinite, highest.nan_to_num(neginf=0.0) + gap, values)


def _sorted(values: Tensor) -> Tensor:
    """Ascending; on a CPU NumPy sorts in a fraction of torch's time."""
    return values.sort(-1).values if values.is_cuda else torch.from_numpy(np.sort(values.numpy()))


def _spectrum(spectrum: Tensor, losses: Tensor) -> Tensor:
    require.same_shape("spectrum", spectrum, losses.shape[-1:])
    return spectrum.detach().double()
