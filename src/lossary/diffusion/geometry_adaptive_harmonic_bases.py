"""Geometry-adaptive harmonic bases: what a denoiser has learned, read off its Jacobian and off a second denoiser.

A network without additive constants is linear around each noisy image, f(y) = J(y) y: it shrinks y in the basis of
J's eigenvectors, which follow the edges of that very image and oscillate between them. And whether a network has
memorised or learned the density shows when two are trained on disjoint halves and sample from the same noise: with
enough data they draw the same new image. Two probes for any trained denoiser, and the layer that makes the first one
exact; they diagnose, they do not improve a model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._samplers import ancestral
from lossary.paper import Paper
from lossary.roles import layer

PAPER = Paper(
    title="Generalization in diffusion models arises from geometry-adaptive harmonic representations",
    year=2023,
    helps=("overfitting", "few-labels"),
    departs=(
        "samples by any sampler of the room, with given noise levels, in place of the paper's ascent that estimates"
        " the level on its way",
        "eigenvectors of the Jacobian's symmetric part; what is left out is reported as `asymmetry`",
        "the norm's scale starts at 1, in the official code at small random numbers",
        "the images of class C^alpha and their optimal slope of PSNR are left out",
    ),
    equation=(
        r"f(y)=\nabla f(y)\,y=\sum_k\lambda_k(y)\,\langle y,e_k(y)\rangle\,e_k(y),"
        r"\qquad \operatorname{MSE}(f,\sigma^2)=\sigma^2\,\mathbb E_y\sum_k\lambda_k(y)"
    ),
    url="https://github.com/LabForComputationalVision/memorization_generalization_in_diffusion_models",
)


@dataclass(frozen=True)
class _ShrinkageBasis:
    """How a denoiser shrinks a batch of noisy data, d numbers each.

    Attributes:
        values: lambda_k (B, d), falling: 1 keeps a direction, 0 removes it.
        vectors: e_k (B, d, d), orthonormal columns.
        net_bias: f(y) - J y, of the shape of y; 0 where the network has no additive constants.
        asymmetry: |J - J'| / (2 |J|) (B,); 0 for a true posterior mean, and where J is 0.
        sigma: (B,).
    """

    values: Tensor
    vectors: Tensor
    net_bias: Tensor
    asymmetry: Tensor
    sigma: Tensor

    @property
    def dimension(self) -> Float[Tensor, " B"]:
        """tr J, about how many directions are kept."""
        return self.values.sum(-1)

    @property
    def expected_error(self) -> Float[Tensor, " B"]:
        """sigma^2 tr J, for a true posterior mean exactly E[|x - f(y)|^2 | y], the sum over the d numbers."""
        return self.sigma.square() * self.dimension


def denoiser_jacobian_basis(
    denoise: Denoise,
    y: Float[Tensor, "B *data"],
    sigma: Float[Tensor, " B"] | float,
    *,
    chunk_size: int | None = None,
) -> _ShrinkageBasis:
    """Eigenvalues and eigenvectors of the denoiser's Jacobian at noisy data, d backward passes in one call.

    The denoiser runs in the dtype of y, the rest in it or float32, whichever is more precise.

    Args:
        denoise: denoise(x, sigma) -> x_0 that `torch.func.vmap` can run; put networks in eval mode.
        y: noisy data, each of d numbers in any shape.
        sigma: standard deviation of their noise.
        chunk_size: how many of the d backward passes run at a time, None for all; fewer take less memory.

    Returns:
        `values` (B, d), falling: 1 keeps a direction, 0 removes it; `vectors` (B, d, d), orthonormal columns;
        `net_bias`, f(y) - J y, of the shape of y; `asymmetry` (B,), |J - J'| / (2 |J|); `dimension` (B,), tr J;
        `expected_error` (B,), sigma^2 tr J, the squared error of a true posterior mean, summed over the d numbers.

    Raises:
        ValueError: `y` without a batch, a `sigma` of another length, or a `chunk_size` below 1.

    >>> halve = lambda x, sigma: x * torch.tensor([0.5, 0.25])
    >>> denoiser_jacobian_basis(halve, torch.ones(1, 2), 2.0).expected_error  # 4 (0.5 + 0.25)
    tensor([3.])
    """
    require.floating("y", y, at_least_dims=2)
    if chunk_size is not None:
        require.whole("chunk_size", chunk_size, at_least=1)
    level = torch.as_tensor(sigma, dtype=y.dtype, device=y.device)
    if level.ndim:
        require.same_shape("sigma", level, tuple(y.shape[:1]))
    level = level.expand(len(y))

    def both(one: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        found = denoise(one.view(1, *y.shape[1:]), s.view(1)).flatten()
        return found, found

    flat = y.detach().flatten(1)
    derived = torch.func.vmap(torch.func.jacrev(both, has_aux=True, chunk_size=chunk_size))(flat, level)
    wide = torch.promote_types(y.dtype, torch.float32)  # eigh knows no half precision
    jacobian, found, flat, level = (part.to(wide) for part in (*derived, flat, level))
    values, vectors = torch.linalg.eigh((jacobian + jacobian.mT) / 2)
    size, skew = (part.flatten(1).norm(dim=1) for part in (jacobian, jacobian - jacobian.mT))
    skew = skew / (2 * torch.where(size > 0, size, 1.0))
    rest = found - (jacobian @ flat.unsqueeze(-1)).squeeze(-1)
    return _ShrinkageBasis(values.flip(-1), vectors.flip(-1), rest.view_as(y), skew, level)


@dataclass(frozen=True)
class _Convergence:
    """Cosines between samples, -1 to 1, each (B,), and the two samples themselves.

    Attributes:
        between: of the two denoisers' samples from the same noise; near 1 where both learned one density.
        nearest: of each denoiser's samples with the most similar of its own training data; near 1 where it copies.
        samples: of each denoiser.
    """

    between: Tensor
    nearest: tuple[Tensor, Tensor]
    samples: tuple[Tensor, Tensor]


@torch.no_grad()
def score_convergence_test(
    first: Denoise,
    second: Denoise,
    start: Float[Tensor, "B *data"],
    sigmas: Float[Tensor, " levels"],
    *,
    pools: tuple[Float[Tensor, "N *data"], Float[Tensor, "M *data"]],
    generator: Generator,
    sampler: Callable[..., Tensor] = ancestral,
) -> _Convergence:
    """Sample with two denoisers from the same start and the same noise, and compare.

    Args:
        first, second: denoise(x, sigma), trained on disjoint data.
        start: where both begin, noise of standard deviation sigmas[0].
        sigmas: falling noise levels.
        pools: the training data of the first and of the second.
        generator: of the sampler's noise, the same numbers for both; left as after one of the runs.
        sampler: of the room; run once with each denoiser.

    Returns:
        Cosines, each (B,): `between` the two samples of a start, near 1 where both learned one density; `nearest`,
        of each denoiser's samples with the most similar of its training data, near 1 where it copies; and `samples`.

    Raises:
        ValueError: pools that do not fit the shape of `start`.

    >>> copy = lambda x, sigma: torch.tensor([[3.0, 4.0]]).expand_as(x)  # all that it knows is one point
    >>> found = score_convergence_test(
    ...     copy,
    ...     lambda x, sigma: -copy(x, sigma),
    ...     torch.ones(1, 2),
    ...     torch.tensor([1.0, 0.0]),
    ...     pools=(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]])),
    ...     generator=torch.Generator(),
    ... )
    >>> found.between, found.nearest
    (tensor([-1.]), (tensor([1.]), tensor([-1.])))
    """
    require.floating("start", start, at_least_dims=2)
    for pool in pools:
        if pool.shape[1:] != start.shape[1:] or not len(pool):
            raise ValueError(f"pools: expected (N, {', '.join(map(str, start.shape[1:]))}), got {tuple(pool.shape)}")
    twin = Generator(generator.device)
    twin.set_state(generator.get_state())
    one = sampler(first, start, sigmas, generator=twin)
    two = sampler(second, start, sigmas, generator=generator)
    a, b, *known = (nn.functional.normalize(x.flatten(1), dim=1) for x in (one, two, *pools))
    nearest = (a @ known[0].mT).amax(1), (b @ known[1].mT).amax(1)
    return _Convergence((a * b).sum(1), nearest, (one, two))


@layer(
    shape=(3, 2, 5, 5),
    examples=({"in_channels": 2, "out_channels": 3}, {"in_channels": 2, "out_channels": 1, "norm": False}),
)
class BiasFreeConv2d(nn.Conv2d):
    """A convolution and a batch norm without additive constants: in eval mode f(c x) = c f(x), c > 0.

    gamma (w * x) / s, s the standard deviation of each channel: of the batch in training, its running mean in eval
    mode. No mean is taken away and none is added. The borders are padded with zeros, so that the size stays.

    Args:
        in_channels, out_channels: numbers of channels.
        kernel_size: side of the kernel, odd.
        norm: divide by the standard deviation; False is a plain convolution without a bias.
        momentum: share of the batch in the running standard deviation, 0 to 1.
        eps: added to the variance.

    Raises:
        ValueError: numbers out of range; an input that is not a floating (B, in_channels, H, W).

    >>> conv = BiasFreeConv2d(1, 4).eval()
    >>> x = torch.ones(1, 1, 3, 3)
    >>> torch.allclose(conv(5 * x), 5 * conv(x))
    True
    """

    running_sd: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        norm: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("kernel_size", kernel_size)):
            require.whole(name, value, at_least=1)
        if not kernel_size % 2:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        for name, number in (("momentum", momentum), ("eps", eps)):
            if isinstance(number, Tensor):
                raise ValueError(f"{name}: expected a number, got a tensor, which would get no gradient")
        require.number("momentum", momentum, at_least=0.0, at_most=1.0)
        require.number("eps", eps, above=0.0)
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm, self.momentum, self.eps = norm, momentum, eps
        if norm:
            self.gamma = nn.Parameter(torch.ones(out_channels))
            self.register_buffer("running_sd", torch.ones(out_channels))

    def forward(self, input: Tensor) -> Tensor:
        require.floating("input", input, dims=4)
        if input.shape[1] != self.in_channels:
            raise ValueError(f"input: expected {self.in_channels} channels, got shape {tuple(input.shape)}")
        x = super().forward(input)
        if not self.norm:
            return x
        sd = self.running_sd
        if self.training:
            wide = torch.promote_types(x.dtype, self.running_sd.dtype)  # they differ under autocast
            sd = (x.to(wide).var((0, 2, 3), unbiased=False) + self.eps).sqrt()
            self.running_sd.lerp_(sd.detach().to(self.running_sd), self.momentum)
        return x * (self.gamma / sd).view(-1, 1, 1).to(x.dtype)
