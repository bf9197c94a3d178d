"""Minimax rates: does the regularised score reach n^(-s / (2 s + d)), and the samples' own score nothing?

In one dimension, a box has one derivative in L1 and a tent two. Errors are of the exact law that the probability flow
ends at, so that no sampling of it blurs them. The rate is the mean over the seeds, from n = 100 to 6400.
"""

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim
from lossary.claims.draw import Panel
from lossary.diffusion import KernelScoreDiffusion, empirical_rate, minimax_exponent

SIZES = (100, 200, 400, 800, 1600, 3200, 6400)


def _samples(smoothness: int, n: int, generator: torch.Generator) -> Tensor:
    """A sum of `smoothness` uniform numbers from -1 to 1, (n, 1): a B-spline."""
    return (2 * torch.rand(n, smoothness, generator=generator, dtype=torch.float64) - 1).sum(1, keepdim=True)


def _density(smoothness: int, x: Tensor) -> Tensor:
    return torch.full_like(x, 0.5) if smoothness == 1 else (2 - x.abs()) / 4


def _total_variation(model: KernelScoreDiffusion, smoothness: int, at: Tensor) -> Tensor:
    """E max(0, 1 - q / p) over draws from the truth p, which is the integral of max(0, p - q)."""
    return (1 - model.log_density(at).exp() / _density(smoothness, at[:, 0])).clamp(min=0).mean()


def _wasserstein(model: KernelScoreDiffusion, smoothness: int) -> Tensor:
    """W1: the integral of the difference of both distribution functions, on a grid."""
    grid = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    below = torch.special.ndtr((grid[:, None] - model.law_.means.T) / model.bandwidth_).mean(1)
    inside = grid.clamp(-smoothness, smoothness)
    truth = (inside + 1) / 2 if smoothness == 1 else 0.5 + inside / 2 - inside * inside.abs() / 8
    return (below - truth).abs().sum() * (grid[1] - grid[0])


def _errors(seeds: Seeds, smoothness: int, *, distance: str = "tv", constant: float = 0.5) -> Tensor:
    """(S, sizes)."""
    rows = []
    for g, test in zip(seeds.torch("data"), seeds.torch("test")):
        at = _samples(smoothness, seeds.few(1000, smoke=50), test)
        row = []
        for n in SIZES[: 2 if seeds.smoke else None]:
            model = KernelScoreDiffusion(smoothness, constant=constant).fit(_samples(smoothness, n, g))
            found = _total_variation(model, smoothness, at) if distance == "tv" else _wasserstein(model, smoothness)
            row.append(found)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _rate(errors: Tensor) -> Tensor:
    return empirical_rate(torch.tensor(SIZES[: errors.shape[-1]], dtype=torch.float64), errors)


@claim(
    says="In total variation the error falls as n^(-1/3) for one derivative and n^(-2/5) for two",
    kind="exact",
    metric="deviation",
    tolerance=0.04,
    scale="fitted exponent less the minimax one; box and tent in 1-D, closed-form score, n from 100 to 6400",
)
def total_variation_falls_at_the_minimax_rate(seeds: Seeds) -> Arms:
    rates = {s: _rate(_errors(seeds, s)).mean() for s in (1, 2)}
    gaps = torch.stack([rates[s] - minimax_exponent(s, 1) for s in rates])
    return Arms(gaps, details={f"{s} derivatives": rates[s].item() for s in rates})


@claim(
    says="In W1 the error falls as n^(-1/2), the fastest there is",
    kind="exact",
    metric="deviation",
    tolerance=0.05,
    scale="fitted exponent less the minimax one; tent in 1-D, closed-form score, n from 100 to 6400",
)
def wasserstein_falls_at_the_minimax_rate(seeds: Seeds) -> Arms:
    rate = _rate(_errors(seeds, 2, distance="w1")).mean()
    return Arms((rate - minimax_exponent(2, 1, distance="w1"))[None], details={"rate": rate.item()})


@claim(
    says="The samples' own score, followed to hardly any noise, memorises: at least four times the error",
    kind="ratio",
    metric="sample distance",
    margin=0.25,
    scale="total variation at n = 6400 of the regularised law to that with 1e-4 of its constant; tent in 1-D",
)
def regularised_scores_beat_memorising_ones(seeds: Seeds) -> Arms:
    return Arms(_errors(seeds, 2)[:, -1], _errors(seeds, 2, constant=5e-5)[:, -1])


def draw(seeds: Seeds) -> list[Panel]:
    """Densities of the truth and of what is generated from 400 samples."""
    x = _samples(2, 400, seeds.torch("data")[0])
    grid = torch.linspace(-2.5, 2.5, 400, dtype=torch.float64)
    panels = []
    for name, constant in (("too little noise", 0.03), ("the right bandwidth", 0.5), ("too much", 3.0)):
        found = KernelScoreDiffusion(2, constant=constant).fit(x).log_density(grid[:, None]).exp()
        truth = _density(2, grid).clamp(min=0)
        curves = [torch.stack([grid, -2 * y], dim=1).numpy() for y in (truth, found)]
        panels.append(Panel(name, polygons=curves))
    return panels
