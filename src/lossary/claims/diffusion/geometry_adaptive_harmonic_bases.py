"""Geometry-adaptive bases: do two networks of disjoint data agree, and is their basis the data's own?

Signals of 32 numbers, smooth but for one jump at an unknown place: given the place they are Gaussian, so the exact
posterior mean and its Jacobian are known, and no fixed basis fits all places. Perceptrons without biases, which are
not told the noise level, predict the noise.
"""

from functools import cache

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim
from lossary.claims.draw import Panel
from lossary.diffusion import denoiser_jacobian_basis, score_convergence_test
from lossary.diffusion._samplers import karras_sigmas
from lossary.tasks import minimise, stacked_mlp

LENGTH = 32
PLACES = range(6, 27)
LOW, HIGH = 0.05, 5.0
NOISE = 0.3  # where bases and errors are measured
STEPS = 40  # of ancestral sampling


@cache
def _covariances() -> Tensor:
    """(21, 32, 32), of a signal whose jump is at each place: variance 1, correlated over four numbers."""
    i = torch.arange(LENGTH, dtype=torch.float64)
    smooth = (-(i[:, None] - i).square() / 32).exp()
    left = torch.stack([(i < place).double() for place in PLACES])
    together = left[:, :, None] * left[:, None] + (1 - left)[:, :, None] * (1 - left)[:, None]
    return smooth * together


@cache
def _roots() -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(_covariances())
    return values.clamp(min=0), vectors


def _exact(y: Tensor, sigma: Tensor | float) -> Tensor:
    """E[x | y] of y (B, 32): the Wiener filter of each place, by its posterior probability."""
    values, vectors = _roots()
    square = torch.as_tensor(sigma, dtype=torch.float64).square().reshape(-1, 1, 1)
    along = torch.einsum("kde,bd->bke", vectors, y.double())
    total = values + square
    log = -0.5 * (along.square() / total + total.log()).sum(-1)
    clean = torch.einsum("kde,bke->bkd", vectors, along * values / total)
    return (log.softmax(-1)[..., None] * clean).sum(1)


def _signals(n: int, generators: list[torch.Generator]) -> Tensor:
    """(S, n, 32)."""
    values, vectors = _roots()
    root = (vectors * values.sqrt().unsqueeze(1)).float()
    rows = []
    for g in generators:
        place = torch.randint(len(PLACES), (n,), generator=g)
        rows.append(torch.einsum("nde,ne->nd", root[place], torch.randn(n, LENGTH, generator=g)))
    return torch.stack(rows)


def _trained(seeds: Seeds, pool: Tensor, *, steps: int) -> nn.Module:
    """y (S, B, 32) -> the noise, of signals from the pool (S, N, 32)."""
    network = stacked_mlp((LENGTH, 96, 96, LENGTH), seeds)
    for layer in network[::2]:
        nn.init.zeros_(layer.bias).requires_grad_(False)
    weights, generators = [layer.weight for layer in network[::2]], seeds.torch("training")

    def objective() -> Tensor:
        rows = [torch.randint(pool.shape[1], (64,), generator=g) for g in generators]
        clean = torch.stack([x[r] for x, r in zip(pool, rows)])
        place = torch.stack([torch.rand(64, 1, generator=g) for g in generators])
        noise = torch.stack([torch.randn(64, LENGTH, generator=g) for g in generators])
        sigma = LOW * (HIGH / LOW) ** place
        error = network(clean + sigma * noise) - sigma * noise
        return ((1 + sigma**-2) * error.square()).mean((1, 2)).sum()

    minimise(objective, weights, steps=seeds.few(steps, smoke=2), lr=0.003)
    return network.requires_grad_(False)


def _denoisers(network: nn.Module, seeds: Seeds) -> list:
    nets = [network.replica(s) for s in range(len(seeds))]
    return [lambda x, sigma, net=net: x - net(x) for net in nets]


def _other(seeds: Seeds) -> Seeds:
    """Another network and other data for each seed."""
    return Seeds(tuple(50_000 + id for id in seeds.ids), seeds.smoke)


def _converged(seeds: Seeds, n: int) -> list:
    pair = []
    for who in (seeds, _other(seeds)):
        pool = _signals(n, who.torch("pool"))
        pair.append((pool, _denoisers(_trained(who, pool, steps=600), who)))
    sigmas = karras_sigmas(seeds.few(STEPS, smoke=3), low=LOW, high=HIGH, rho=3.0)
    found = []
    for s, g in enumerate(seeds.torch("start")):
        start = HIGH * torch.randn(seeds.few(200, smoke=8), LENGTH, generator=g)
        (a, first), (b, second) = ((pool[s], nets[s]) for pool, nets in pair)
        found.append(score_convergence_test(first, second, start, sigmas, pools=(a, b), generator=g))
    return found


def _differ(found: list) -> list[float]:
    return [1 - one.between.mean().item() for one in found]


def _new(found: list) -> list[float]:
    return [1 - one.nearest[0].mean().item() for one in found]


@claim(
    says="Networks of disjoint data differ, from the same noise, at most half as much at 2000 signals as at 20",
    kind="ratio",
    metric="sample distance",
    margin=0.5,
    scale="1 - cosine; signals of 32 with a jump, bias-free MLP of 96, 600 steps of 64; ancestral, 40 evaluations",
)
def networks_of_disjoint_data_agree(seeds: Seeds) -> Arms:
    few, many = _converged(seeds, 20), _converged(seeds, 2000)
    details = {"evaluations": [STEPS, STEPS], "to nearest at 20": _new(few), "to nearest at 2000": _new(many)}
    return Arms(_differ(many), _differ(few), details)


@claim(
    says="At 2000 signals two networks' samples are nearer each other than the nearest training signal",
    kind="ratio",
    metric="sample distance",
    margin=0.8,
    scale="1 - cosine; signals of 32 with a jump, bias-free MLP of 96, 600 steps of 64; ancestral, 40 evaluations",
)
def samples_agree_without_being_copies(seeds: Seeds) -> Arms:
    found = _converged(seeds, 2000)
    return Arms(_differ(found), _new(found), {"evaluations": [STEPS, STEPS]})


def _well_trained(seeds: Seeds) -> nn.Module:
    return _trained(seeds, _signals(seeds.few(10_000, smoke=20), seeds.torch("pool")), steps=1500)


def _noisy(seeds: Seeds, n: int) -> tuple[Tensor, Tensor]:
    clean = _signals(n, seeds.torch("test"))
    noise = torch.stack([torch.randn(n, LENGTH, generator=g) for g in seeds.torch("test noise")])
    return clean, clean + NOISE * noise


def _jacobian(denoise, y: Tensor) -> Tensor:
    basis = denoiser_jacobian_basis(denoise, y, NOISE)
    return (basis.vectors * basis.values.unsqueeze(1)) @ basis.vectors.mT


@claim(
    says="The learned shrinkage is at most half as far from the exact one as the best shrinkage in a fixed basis",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="Jacobians at noise 0.3; 10000 signals of 32 with a jump, bias-free MLP of 96, 1500 steps of 64",
)
def the_basis_adapts(seeds: Seeds) -> Arms:
    denoisers = _denoisers(_well_trained(seeds), seeds)
    _, y = _noisy(seeds, seeds.few(32, smoke=4))
    mean = _covariances().mean(0)
    wiener = mean @ torch.linalg.inv(mean + NOISE**2 * torch.eye(LENGTH))
    learned, fixed = [], []
    for denoise, one in zip(denoisers, y):
        true = _jacobian(_exact, one.double())
        size = true.square().sum().sqrt()
        learned.append(((_jacobian(denoise, one) - true).square().sum().sqrt() / size).item())
        fixed.append(((wiener - true).square().sum().sqrt() / size).item())
    return Arms(learned, fixed)


@claim(
    says="Denoising is near-optimal: at most a quarter above the least possible mean squared error",
    kind="ratio",
    metric="mean squared error",
    margin=1.25,
    scale="noise 0.3, not told; 10000 signals of 32 with a jump, bias-free MLP of 96, 1500 steps; exact posterior mean",
)
def denoising_is_near_optimal(seeds: Seeds) -> Arms:
    network = _well_trained(seeds)
    clean, y = _noisy(seeds, seeds.few(500, smoke=8))
    best = torch.stack([_exact(one, NOISE) for one in y])
    return Arms(*((x - clean).square().mean((1, 2)).tolist() for x in (y - network(y), best)))


def draw(seeds: Seeds) -> list[Panel]:
    """A noisy signal with its jump, what the network makes of it, and leading vectors of its basis."""
    one = seeds.one(0)
    denoise = _denoisers(_well_trained(one), one)[0]
    clean, y = (x[0, :1] for x in _noisy(one, 1))
    basis = denoiser_jacobian_basis(denoise, y, NOISE)
    where = torch.arange(LENGTH, dtype=torch.float32)

    def curve(values: Tensor) -> list:
        line = torch.stack([where, -6 * values], dim=1)
        return torch.cat([line, line.flip(0)]).tolist()  # a closed outline, there and back

    panels = [Panel("signal and denoised", polygons=[curve(clean[0]), curve(denoise(y, NOISE)[0])])]
    for k in (0, 2, 4):
        title = f"vector {k + 1}, shrunk to {basis.values[0, k].item():.2f}"
        panels.append(Panel(title, polygons=[curve(basis.vectors[0, :, k])]))
    return panels
