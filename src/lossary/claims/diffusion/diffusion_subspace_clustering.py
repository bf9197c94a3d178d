"""Diffusion as subspace clustering: does training find what principal components and K-subspaces find, and when?

Low-rank Gaussians in 48 dimensions. The denoiser of such data, its bases random at first, trains on the plain error
of x_0 at noise levels from 0.1 to 1, with fresh noise for all samples at each step of Adam.
"""

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim
from lossary.claims.draw import Panel
from lossary.diffusion import MoLRGDenoiser, subspace_recovery_error
from lossary.diffusion._denoiser import denoising_error
from lossary.diffusion._samplers import euler, karras_sigmas
from lossary.tasks import minimise

DIMENSION = 48
RANKS = (3, 4, 5, 6)


def _subspaces(seeds: Seeds, number: int, rank: int) -> Tensor:
    """Orthogonal to each other, (S, K, D, rank)."""
    frames = [torch.linalg.qr(torch.randn(DIMENSION, number * rank, generator=g)).Q for g in seeds.torch("subspaces")]
    return torch.stack([f.unflatten(1, (number, rank)).movedim(1, 0) for f in frames])


def _samples(true: Tensor, per_subspace: int, seeds: Seeds, *, off: float = 0.0) -> Tensor:
    """As many from each subspace, (S, K n, D), and noise of that deviation."""
    x = [torch.randn(true.shape[1], per_subspace, true.shape[-1], generator=g) for g in seeds.torch("samples")]
    flat = (torch.stack(x) @ true.mT).flatten(1, 2)
    return flat + off * torch.stack([torch.randn(flat.shape[1:], generator=g) for g in seeds.torch("off")])


def _axes(x: Tensor, rank: int) -> Tensor:
    """The leading principal axes of rows, (*batch, n, D) to (*batch, D, rank)."""
    return torch.linalg.svd(x.mT, full_matrices=False).U[..., :rank]


def _random(seeds: Seeds, number: int, rank: int) -> Tensor:
    return torch.stack([torch.randn(number, DIMENSION, rank, generator=g) for g in seeds.torch("start")])


def _trained(x: Tensor, number: int, rank: int, seeds: Seeds) -> MoLRGDenoiser:
    denoise, generators = MoLRGDenoiser(_random(seeds, number, rank)), seeds.torch("noise")

    def objective() -> Tensor:
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
        sigma = torch.stack([0.1 * 10 ** torch.rand(x.shape[1], generator=g) for g in generators])
        return denoising_error(denoise, x, sigma, noise).mean(-1).sum()

    minimise(objective, denoise.parameters(), steps=seeds.few(500, smoke=2), lr=0.1)
    return denoise.requires_grad_(False)


def _clustered(x: Tensor, bases: Tensor, rounds: int) -> Tensor:
    """K-subspaces: each sample to its nearest subspace, principal axes of each cluster, and again; (S, K, D, rank)."""
    for _ in range(rounds):
        nearest = (x.unsqueeze(1) @ torch.linalg.qr(bases).Q).square().sum(-1).argmax(1)
        member = nearest.unsqueeze(1) == torch.arange(bases.shape[1])[:, None]  # (S, K, n)
        bases = _axes(x.unsqueeze(1) * member.unsqueeze(-1), bases.shape[-1])
    return bases


def _errors(seeds: Seeds, extra: int) -> Tensor:
    """Distance of planes (S, ranks) after training on rank + extra samples of one subspace."""
    errors = []
    for rank in RANKS:
        true = _subspaces(seeds, 1, rank)
        found = _trained(_samples(true, rank + extra, seeds), 1, rank, seeds).bases
        errors.append(subspace_recovery_error(found, true))
    return torch.stack(errors, dim=1)


@claim(
    says="As many samples as a subspace has dimensions suffice to learn it: error at most 0.1",
    kind="exact",
    metric="deviation",
    tolerance=0.1,
    scale="distance of planes, at most sqrt(2 d); subspaces of d = 3 to 6 of 48 dimensions, d samples, 500 steps",
)
def as_many_samples_as_dimensions_suffice(seeds: Seeds) -> Arms:
    return Arms(_errors(seeds, 0))


@claim(
    says="With one sample fewer a whole direction stays unknown: the error is at least 1",
    kind="exact",
    metric="deviation",
    tolerance=0.0,
    scale="shortfall of the error below 1, with d - 1 samples; a lost direction makes sqrt(2); otherwise as with d",
)
def one_sample_fewer_fails(seeds: Seeds) -> Arms:
    errors = _errors(seeds, -1)
    return Arms((1 - errors).clamp(min=0), details={"errors": errors.tolist()})


@claim(
    says="Training one subspace is principal components: both end at the same one",
    kind="exact",
    metric="deviation",
    tolerance=0.05,
    scale="distance of planes, at most sqrt(8); 40 samples about 4 of 48 dimensions, off by 0.1 in each, 500 steps",
)
def one_subspace_is_principal_components(seeds: Seeds) -> Arms:
    x = _samples(_subspaces(seeds, 1, 4), 40, seeds, off=0.1)
    return Arms(subspace_recovery_error(_trained(x, 1, 4, seeds).bases, _axes(x, 4).unsqueeze(1)))


def _cost(x: Tensor, bases: Tensor) -> Tensor:
    """What K-subspaces minimises: mean squared distance to the nearest subspace, (S,)."""
    inside = (x.unsqueeze(1) @ torch.linalg.qr(bases).Q).square().sum(-1)
    return (x.square().sum(-1) - inside.amax(1)).mean(-1)


@claim(
    says="Training two subspaces clusters as well as K-subspaces from the same start: at most a tenth more distance",
    kind="ratio",
    metric="suboptimality",
    margin=1.1,
    scale="squared distance to the nearer of 2 subspaces of 4 of 48 dimensions, 40 samples each, off by 0.1, 500 steps",
)
def two_subspaces_are_clustered(seeds: Seeds) -> Arms:
    x = _samples(_subspaces(seeds, 2, 4), 40, seeds, off=0.1)
    ours = _trained(x, 2, 4, seeds).bases
    theirs = _clustered(x, _random(seeds, 2, 4), seeds.few(50, smoke=2))
    return Arms(_cost(x, ours), _cost(x, theirs))


def draw(seeds: Seeds) -> list[Panel]:
    """Data on two lines of 48 dimensions and samples of the denoiser trained on 8 of each, along those lines."""
    one = seeds.one(0)
    true = _subspaces(one, 2, 1)
    lines = true[0, :, :, 0].T
    denoise = _trained(_samples(true, 8, one), 2, 1, one)
    start = torch.stack([torch.randn(400, DIMENSION, generator=g) for g in one.torch("sampling")])
    found = euler(denoise, 20 * start, karras_sigmas(40, low=0.01, high=20.0))
    return [
        Panel("training data along both lines", points=(_samples(true, 8, one)[0] @ lines).numpy()),
        Panel("samples", points=(found[0] @ lines).numpy()),
    ]
