"""f-distill: do divergences other than reverse KL keep more modes, and is Jensen-Shannon the best of them?

Modes are counted where nothing but the divergence counts: a Gaussian that must imitate two, with exact scores and
ratios. Samples are compared on eight uneven Gaussians on a circle, with a discriminator, as in the paper.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import FDistillation, f_divergence, f_divergence_weight
from lossary.diffusion._distil import OneStepGenerator, karras_levels, log_uniform
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._noise import noise
from lossary.tasks import (
    Tally,
    distil,
    drawn_from,
    generated,
    ring_denoiser,
    ring_distance,
    stacked_mlp,
    uneven_ring,
)

LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
TWO = Mixture(torch.tensor([[-1.5, 0.0], [1.5, 0.0]], dtype=torch.float64), 0.5)
RATES = (0.0005, 0.001, 0.002, 0.004)


def _distilled(seeds: Seeds, *, divergence: str, lr: float) -> tuple[FDistillation, Tally]:
    truth = uneven_ring()
    procedure = FDistillation(
        OneStepGenerator(ring_denoiser(seeds)),
        ring_denoiser(seeds),
        truth.denoise,
        stacked_mlp((64, 1), seeds),
        "network.mlp.3",
        divergence=divergence,
        gan_weight=0.01,
        head_weight=0.1,
        levels=LEVELS,
        gan_levels=LEVELS,
        fake_steps=3,
    )
    tally = Tally(procedure)

    def batch(generators: Sequence[Generator]) -> dict[str, Tensor]:
        return {"latent": noise((len(seeds), 64, 2), generators), "real": drawn_from(truth)(64, generators)[0]}

    distil(procedure, batch, seeds=seeds, steps=seeds.few(150, smoke=2), lr=lr)
    return procedure, tally


def _distance(seeds: Seeds, **setting: object) -> tuple[list[float], float, int]:
    """Distances to the data, the evaluations for a sample, and those of training."""
    procedure, tally = _distilled(seeds, **setting)
    training, x = tally.taken(), generated(procedure, seeds)
    return ring_distance(x, seeds).tolist(), tally.taken() / x.shape[1], training


@claim(
    says="Under the Jensen-Shannon divergence the generator ends nearer the data than under reverse KL, which is DMD2",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, head on an MLP of 64, 150 steps of 64; 4 learning rates each",
)
def jensen_shannon_beats_reverse_kl(seeds: Seeds) -> Arms:
    best, found = {}, []
    for divergence in ("jensen_shannon", "reverse_kl"):
        score = functools.partial(_distance, divergence=divergence)
        grid = [{"lr": lr} for lr in RATES]
        best[divergence] = tune(lambda *a, score=score, **setting: score(*a, **setting)[0], grid, seeds, better="lower")
        found.append(score(seeds, **best[divergence]))
    values, evaluations, training = zip(*found)
    return Arms(*values, {"evaluations": list(evaluations), "training evaluations": list(training), **best})


class _Gaussian(nn.Module):
    """mean + scale latent, one for each seed."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        zeros = torch.zeros(len(seeds), 1, 2, dtype=torch.float64)
        self.mean, self.log_scale = nn.Parameter(noise(zeros, seeds.torch("mean"))), nn.Parameter(zeros)

    def forward(self, latent: Tensor) -> Tensor:
        return self.mean + self.log_scale.exp() * latent

    def variance(self, sigma: Tensor) -> Tensor:
        return (2 * self.log_scale).exp().detach() + sigma[..., None] ** 2


class _ExactFake(nn.Module):
    """The generator's own denoiser."""

    def __init__(self, of: _Gaussian) -> None:
        super().__init__()
        self.of, self.unused = (of,), nn.Identity()  # where a discriminator would look

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        kept = 1 - sigma[..., None] ** 2 / self.of[0].variance(sigma)
        return self.of[0].mean.detach() + kept * (x - self.of[0].mean.detach())


class _Exact(FDistillation):
    """With exact scores and ratios, and without the discriminator's loss."""

    def log_ratio(self, x_t: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        variance = self.generator.variance(sigma)
        square = (x_t - self.generator.mean.detach()).square() / variance
        own = -0.5 * (square + (2 * torch.pi * variance).log()).sum(-1)
        return TWO.log_density(x_t, sigma) - own

    def logits(self, x: Tensor, generator: object, *condition: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1])


def _one_for_two(seeds: Seeds, divergence: str) -> Tensor:
    """Samples (S, n, 2) of the Gaussian that imitates two."""
    gaussian = _Gaussian(seeds)
    fake = _ExactFake(gaussian)
    settings = {"divergence": divergence, "clip": 50.0, "levels": log_uniform(0.05, 0.5)}
    procedure = _Exact(gaussian, fake, TWO.denoise, nn.Identity(), "unused", **settings)
    optimizer, generators = torch.optim.Adam(gaussian.parameters(), lr=0.02), seeds.torch("distil")
    for step in range(seeds.few(400, smoke=2)):
        batch = {"latent": noise(gaussian.mean.expand(-1, 128, -1), generators)}
        optimizer.zero_grad()
        procedure.objective("generator", batch, step=step, generator=generators).mean(-1).sum().backward()
        optimizer.step()
    return generated(lambda latent: gaussian(latent.double()), seeds)


def _mode_error(seeds: Seeds, divergence: str) -> list[float]:
    """By how many points the share of samples on the right differs from half."""
    right = (_one_for_two(seeds, divergence)[..., 0] > 0).double().mean(-1)
    return (100 * (right - 0.5).abs()).tolist()


@claim(
    says="Forward KL loses fewer modes than reverse KL",
    kind="superiority",
    metric="mode error",
    scale="one Gaussian for two in 2-D, 3 apart with deviation 0.5; exact scores and ratios, 400 steps of 128",
)
def forward_kl_keeps_modes(seeds: Seeds) -> Arms:
    return Arms(_mode_error(seeds, "forward_kl"), _mode_error(seeds, "reverse_kl"))


@claim(
    says="Jensen-Shannon loses fewer modes than reverse KL",
    kind="superiority",
    metric="mode error",
    scale="one Gaussian for two in 2-D, 3 apart with deviation 0.5; exact scores and ratios, 400 steps of 128",
)
def jensen_shannon_keeps_modes(seeds: Seeds) -> Arms:
    return Arms(_mode_error(seeds, "jensen_shannon"), _mode_error(seeds, "reverse_kl"))


DIVERGENCES = ("reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys")


@claim(
    says="The difference of scores weighted by h is the gradient of the f-divergence, for all six",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="by mean and scale of a Gaussian from a mixture of three, 1-D, by quadrature; relative to the largest",
)
def weights_make_the_gradient(seeds: Seeds) -> Arms:
    grid = torch.linspace(-40, 40, 16_001, dtype=torch.float64)[:, None]
    rows = []
    for g in seeds.torch("problem"):
        data = Mixture(torch.randn(3, 1, generator=g, dtype=torch.float64), 1.0)
        mean = torch.randn(1, generator=g, dtype=torch.float64).requires_grad_()
        scale = (1 + torch.rand(1, generator=g, dtype=torch.float64)).requires_grad_()
        own = Mixture(mean[None], scale)
        log_ratio = data.log_density(grid) - own.log_density(grid)
        density = own.log_density(grid).exp()
        apart = (own.score(grid) - data.score(grid))[:, 0].detach()
        moves = torch.stack([torch.ones_like(grid[:, 0]), (grid[:, 0] - mean) / scale]).detach()
        row = []
        for divergence in DIVERGENCES:
            whole = torch.trapezoid(density * f_divergence(log_ratio, divergence), grid[:, 0])
            exact = torch.cat(torch.autograd.grad(whole, (mean, scale), retain_graph=True))
            weight = f_divergence_weight(log_ratio, divergence)
            found = torch.trapezoid((density * weight * apart).detach() * moves, grid[:, 0])
            row.append(((found - exact).abs().max() / exact.abs().max()).item())
        rows.append(row)
    return Arms(rows)


@claim(
    says="Weights of Jensen-Shannon vary at most a tenth as much as those of forward KL, relative to their mean",
    kind="ratio",
    metric="variance",
    margin=0.1,
    scale="20000 samples of a unit Gaussian whose teacher is one 1.5 away, in 1-D",
)
def jensen_shannon_weights_vary_less(seeds: Seeds) -> Arms:
    rows = []
    for divergence in ("jensen_shannon", "forward_kl"):
        row = []
        for g in seeds.torch("samples"):
            x = torch.randn(seeds.few(20_000), generator=g, dtype=torch.float64)
            h = f_divergence_weight(1.5 * x - 1.5**2 / 2, divergence)
            row.append((h.var() / h.mean() ** 2).item())
        rows.append(row)
    return Arms(*rows)


def draw(seeds: Seeds) -> list[Panel]:
    """What one Gaussian makes of two under three divergences."""
    one = seeds.one(0)
    data = TWO.sample(400, generator=one.torch("true")[0])[0]
    found = {name: _one_for_two(one, name)[0, :400] for name in ("reverse_kl", "jensen_shannon", "forward_kl")}
    panels = [Panel("data", points=data.numpy())]
    return panels + [Panel(name.replace("_", " "), points=points.numpy()) for name, points in found.items()]
