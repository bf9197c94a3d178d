"""Diffusion as subspace clustering: the denoiser of a mixture of low-rank Gaussians, with learnable subspaces.

Where data lie on a few low-dimensional subspaces, the best denoiser projects onto each, weighted by how much of the
sample lies there. Training that denoiser is subspace clustering: principal components for one subspace, K-subspaces
for several. So as many samples as a subspace has dimensions suffice to find it, and fewer never do, whatever the
dimension of the space: the paper's account of when diffusion models generalise. Useful as a transparent test bed, as
an oracle with a known Jacobian, and for clustering by a denoising loss.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._discrete import multinomial
from lossary.diffusion._noise import noise
from lossary.paper import Paper

PAPER = Paper(
    title="Diffusion Models Learn Low-Dimensional Distributions via Subspace Clustering",
    year=2024,
    helps=("density-estimation", "few-labels"),
    departs=(
        "x is data plus noise, as everywhere in this room, which sets s_t = 1 and g_t = sigma",
        "weights are the exact posterior; the theorem for several subspaces takes hard ones and averages the noise",
        "bases are the Q of free matrices rather than optimised over orthonormal ones",
        "all subspaces have one dimension",
        "the editing of images along the Jacobian's singular vectors is left to the caller",
    ),
    equation=(
        r"D(x,\sigma)=\frac1{1+\sigma^2}\sum_k w_k\,U_kU_k^\top x,\qquad "
        r"w=\operatorname{softmax}_k\Bigl(\log\pi_k+\frac{\lVert U_k^\top x\rVert^2}{2\sigma^2(1+\sigma^2)}\Bigr)"
    ),
    url="https://arxiv.org/abs/2409.02426",
)


class MoLRGDenoiser(nn.Module):
    """denoise(x, sigma) -> x_0, exact for x_0 = U_k a, a standard normal, k drawn with probability pi_k.

    Args:
        bases: (*replicas, K, D, d) of full rank, from which the U_k start.
        weights: pi_k, of any sum; None for equal ones. They are not trained.

    Attributes:
        free: matrices whose Q are the U_k; a parameter.
        log_weights: (K,); a buffer.

    Raises:
        ValueError: bases of other shapes, or weights that are not K numbers above 0.

    >>> axes = torch.eye(3)[:, :, None]  # three lines in space
    >>> MoLRGDenoiser(axes)(torch.tensor([[4.0, 1.0, 0.0]]), 1.0).round(decimals=2)  # nearly on the first one
    tensor([[1.9200, 0.0100, 0.0000]], grad_fn=<RoundBackward1>)
    """

    log_weights: Tensor

    def __init__(self, bases: Float[Tensor, "*replicas K D d"], *, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        require.floating("bases", bases, at_least_dims=3)
        if bases.shape[-1] > bases.shape[-2]:
            raise ValueError(f"bases: expected (*replicas, K, D, d) with d <= D, got {tuple(bases.shape)}")
        chosen = [1.0] * bases.shape[-3] if weights is None else list(weights)
        if len(chosen) != bases.shape[-3] or min(chosen) <= 0:
            raise ValueError(f"weights: expected {bases.shape[-3]} numbers > 0, got {weights}")
        self.free = nn.Parameter(bases.detach().clone())
        self.register_buffer("log_weights", torch.tensor(chosen, dtype=bases.dtype, device=bases.device).log())

    @property
    def bases(self) -> Float[Tensor, "*replicas K D d"]:
        """U_k, with orthonormal columns."""
        return torch.linalg.qr(self.free).Q

    def forward(
        self, x: Float[Tensor, "*replicas batch D"], sigma: Float[Tensor, "*replicas batch"] | float
    ) -> Float[Tensor, "*replicas batch D"]:
        """E[x_0 | x_0 + sigma noise = x], sigma > 0."""
        u = self.bases
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[:-1]).unsqueeze(-1)
        inside = x.unsqueeze(-3) @ u  # (*replicas, K, batch, d)
        lying = inside.square().sum(-1).movedim(-2, -1)  # (*replicas, batch, K)
        w = (self.log_weights + lying / (2 * level.square() * (1 + level.square()))).softmax(-1)
        projected = (inside @ u.mT).movedim(-3, -2)  # (*replicas, batch, K, D)
        return (w.unsqueeze(-1) * projected).sum(-2) / (1 + level.square())


def sample_molrg(
    bases: Float[Tensor, "K D d"],
    n: int,
    *,
    weights: Sequence[float] | None = None,
    generator: Generator | None = None,
) -> tuple[Float[Tensor, "n D"], Int[Tensor, " n"]]:
    """n points U_k a, a standard normal, and the subspace k of each.

    Args:
        bases: U_k with orthonormal columns.
        n: how many.
        weights: pi_k, of any sum; None for equal ones.
        generator: of all randomness.

    Raises:
        ValueError: bases of other shapes.

    >>> x, k = sample_molrg(torch.eye(4)[None, :, :2], 5)
    >>> x.shape, x[:, 2:].abs().max(), k
    (torch.Size([5, 4]), tensor(0.), tensor([0, 0, 0, 0, 0]))
    """
    require.floating("bases", bases, dims=3)
    require.whole("n", n, at_least=1)
    given = [1.0] * len(bases) if weights is None else list(weights)
    chance = torch.tensor(given, dtype=torch.float64, device=bases.device)
    k = multinomial(chance, n, generator=generator)
    a = noise(bases.new_empty(n, bases.shape[-1]), generator)
    return torch.einsum("nDd,nd->nD", bases[k], a), k


def subspace_recovery_error(
    found: Float[Tensor, "*batch K D d"], true: Float[Tensor, "*batch K D d"]
) -> Float[Tensor, "*batch"]:
    """Largest |U_k U_k' - V_k V_k'|_F over the subspaces under the assignment that makes it least.

    0 if all are found, sqrt(2 d) at most. K! assignments are tried, for K up to 6.

    Args:
        found, true: bases of full rank; columns need not be orthonormal.

    Raises:
        ValueError: shapes or dtypes that differ, or more than 6 subspaces.

    >>> lines = torch.eye(3)[:, :, None]
    >>> subspace_recovery_error(lines[[2, 0, 1]], lines), subspace_recovery_error(lines[:2], lines[1:])
    (tensor(0.), tensor(1.4142))
    """
    require.floating("found", found, at_least_dims=3)
    require.same_shape("true", true, tuple(found.shape))
    number = found.shape[-3]
    if number > 6:
        raise ValueError(f"found: expected at most 6 subspaces, got {number}")
    first, second = torch.linalg.qr(found).Q.unsqueeze(-3), torch.linalg.qr(true).Q.unsqueeze(-4)
    across = first - second @ (second.mT @ first)  # (*batch, K, K, D, d)
    apart = 2**0.5 * across.square().sum((-2, -1)).sqrt()
    rows = range(number)
    each = [apart[..., rows, order].amax(-1) for order in itertools.permutations(rows)]
    return torch.stack(each).amin(0)
