"""Score Jacobian chaining: a diffusion of pictures teaches a scene, through the renderer's Jacobian.

A scene is rendered from random cameras; the score of a picture diffusion says how each picture should change, and the
chain rule carries it to the scene's parameters. Clean renders are not what the denoiser was trained on, so the render
is perturbed first and the score averaged over the noise: the gradient of a lower bound on the log-density at noise
sqrt(2) sigma. For scenes, shapes or any parameters with a differentiable picture, where no data of their own exist;
it seeks modes, so do not expect variety.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._distil import Levels, log_uniform, pushed
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="Score Jacobian Chaining: Lifting Pretrained 2D Diffusion Models for 3D Generation",
    year=2023,
    helps=("guidance", "few-labels"),
    departs=(
        "noise levels log-uniform, or as `levels` says; the official code draws them from its model's own list",
        "the background is one learned colour, in the official code a small texture by direction",
        "no skipping of empty space; the loss on depth, off by default in the official code, is left out",
    ),
    equation=(
        r"\nabla_\theta\log\tilde p(\theta)=\mathbb E_\pi\Bigl[J_\pi^\top\,\mathbb E_{n}\Bigl["
        r"\frac{D(x_\pi+\sigma n;\sigma)-x_\pi}{\sigma^2}\Bigr]\Bigr],\qquad x_\pi=g(\theta,\pi)"
    ),
    url="https://github.com/pals-ttic/sjc",
)

Colours = Literal["signed", "plain"]


def perturb_and_average_score(
    denoise: Denoise,
    x: Float[Tensor, "*batch_and_data"],
    sigma: Float[Tensor, "*batch"] | float,
    *conditions: Any,
    samples: int = 1,
    antithetic: bool = False,
    generator: Randomness = None,
) -> Tensor:
    """Mean over noise n of (denoise(x + sigma n, sigma) - x) / sigma^2, of the shape of x.

    x, not x + sigma n, is taken away: the mean is the same, the spread smaller where sigma is above the width of the
    data, and larger where it is below.

    Args:
        denoise: of the room; called `samples` times, twice as often with `antithetic`.
        x: clean data, such as renders.
        sigma: noise level, > 0.
        conditions: handed on to `denoise`.
        samples: draws of n.
        antithetic: use -n beside each n.
        generator: of the noise; a sequence has one for each replica.

    Raises:
        ValueError: shapes that do not fit, or fewer than one sample.

    >>> halve = lambda x, sigma: x / 2
    >>> perturb_and_average_score(halve, torch.tensor([[4.0]]), 2.0, antithetic=True)  # (2 - 4) / 4
    tensor([[-0.5000]])
    """
    require.floating("x", x)
    require.whole("samples", samples, at_least=1)
    level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if level.ndim:
        require.same_shape("sigma", level, tuple(x.shape[: level.ndim]))
    width, total = over(level, x), torch.zeros_like(x)
    for _ in range(samples):
        shift = width * noise(x, generator)
        for turn in (shift, -shift) if antithetic else (shift,):
            total = total + denoise(x + turn, level, *conditions) - x
    return total / (samples * (2 if antithetic else 1)) / width**2


class ScoreJacobianChaining(nn.Module):
    """A loss on renders whose gradient is minus the weighted score, to be carried on to the scene by backward().

    Args:
        denoise: runs without gradient; guide it beforehand where a condition shall be stressed.
        levels: of the noise, see `log_uniform`.
        power: the score is weighted by sigma^power; 1 in the official code, 2 gives D(x + sigma n) - x.
        samples, antithetic: see `perturb_and_average_score`.

    Raises:
        ValueError: a power that is not a number, or fewer than one sample.

    >>> from lossary.diffusion._mixture import ring
    >>> chain = ScoreJacobianChaining(ring(1, radius=1.0).denoise, levels=log_uniform(0.5, 2.0))
    >>> scene = torch.zeros(1, 2, requires_grad=True)  # its own picture
    >>> chain(scene, generator=torch.Generator().manual_seed(0)).sum().backward()
    >>> scene.grad[0, 0] < 0  # towards (1, 0)
    tensor(True)
    """

    def __init__(
        self,
        denoise: Denoise,
        *,
        levels: Levels | None = None,
        power: float = 1.0,
        samples: int = 1,
        antithetic: bool = False,
    ) -> None:
        super().__init__()
        require.number("power", power)
        require.whole("samples", samples, at_least=1)
        self.denoise, self.levels = denoise, levels or log_uniform(0.05, 20.0)
        self.power, self.samples, self.antithetic = power, samples, antithetic

    def forward(
        self, x: Float[Tensor, "*batch_and_data"], *conditions: Any, batch: int = 1, generator: Randomness = None
    ) -> Float[Tensor, "*batch"]:
        """A value for each render, half the squared push; one noise level for each.

        Args:
            x: renders.
            conditions: handed on to the denoiser.
            batch: number of leading dimensions of x that are not data.
            generator: of levels and noise; a sequence has one for each replica.
        """
        with torch.no_grad():
            sigma = self.levels(tuple(x.shape[:batch]), generator).to(x)
            score = perturb_and_average_score(
                self.denoise,
                x,
                sigma,
                *conditions,
                samples=self.samples,
                antithetic=self.antithetic,
                generator=generator,
            )
            push = -over(sigma**self.power, x) * score
        return pushed(x, push).flatten(batch).sum(-1)


@dataclass(frozen=True)
class _Rendered:
    """What rays see.

    Attributes:
        colour: (*replicas, N, channels).
        depth: (*replicas, N), mean distance, the background being 10 away.
        weights: (*replicas, N, samples), share of each sample in the colour; what is missing to 1 is background.
    """

    colour: Tensor
    depth: Tensor
    weights: Tensor


class VoxelRadianceField(nn.Module):
    """A grid of densities and colours in the box from -1 to 1, in two or three dimensions, seen along rays.

    A ray is sampled from where it enters the box; sample i takes alpha_i = 1 - exp(-density step) of the light that
    those before it have let through.

    Args:
        size: voxels along each axis, two or three numbers, the last one for the first coordinate.
        channels: of the colours.
        replicas: number of scenes side by side, each with rays of its own; None is one scene.
        shift: density is softplus(exp(scale) value + shift), values starting at 0; `scale` is learned, too.
        step: distance of samples in voxels.
        colours: "signed", sigmoid to -1..1, or "plain", such as for latents.
        generator: of the first colours.

    Raises:
        ValueError: a size of other than two or three positive numbers, or numbers out of range.

    >>> field = VoxelRadianceField((8, 8, 8), channels=1)
    >>> seen = field(torch.tensor([[0.0, 0.0, -3.0]]), torch.tensor([[0.0, 0.0, 1.0]]))
    >>> seen.colour.shape, seen.depth.shape, round(seen.weights.sum().item(), 2)  # 16 samples, the outer two halved
    (torch.Size([1, 1]), torch.Size([1]), 0.47)
    """

    def __init__(
        self,
        size: Sequence[int],
        *,
        channels: int = 3,
        replicas: int | None = None,
        shift: float = -1.0,
        step: float = 0.5,
        colours: Colours = "signed",
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if len(size) not in (2, 3) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
            raise ValueError(f"size: expected two or three whole numbers >= 1, got {size!r}")
        for name, value in (("channels", channels), ("replicas", 1 if replicas is None else replicas)):
            require.whole(name, value, at_least=1)
        require.number("shift", shift)
        require.number("step", step, above=0.0)
        require.one_of("colours", colours, get_args(Colours))
        count = replicas or 1
        self.replicas, self.shift, self.colours = replicas, shift, colours
        self.step = step * sum(2 / n for n in size) / len(size)
        self.samples = int(2 * len(size) ** 0.5 / self.step) + 1
        self.density = nn.Parameter(torch.zeros(count, 1, *size))
        self.colour = nn.Parameter(torch.randn(count, channels, *size, generator=generator))
        self.background = nn.Parameter(torch.zeros(count, channels))
        self.scale = nn.Parameter(torch.zeros(count))

    def forward(
        self, origins: Float[Tensor, "*replicas N axes"], directions: Float[Tensor, "*replicas N axes"]
    ) -> _Rendered:
        """`colour` (*replicas, N, channels), `depth` (*replicas, N) and `weights` (*replicas, N, samples) of rays.

        Args:
            origins: where rays begin, of the field's dtype.
            directions: whither, of any length but 0.

        Raises:
            ValueError: rays of another number of axes or replicas, or of another dtype.
        """
        axes, lead = self.density.ndim - 2, () if self.replicas is None else (self.replicas,)
        require.floating("origins", origins, dims=2 + len(lead))
        if origins.shape[-1] != axes or tuple(origins.shape[: len(lead)]) != lead:
            wanted = ", ".join([*map(str, lead), "N", str(axes)])
            raise ValueError(f"origins: expected ({wanted}), got {tuple(origins.shape)}")
        require.same_shape("directions", directions, tuple(origins.shape))
        for name, rays in (("origins", origins), ("directions", directions)):
            if rays.dtype != self.density.dtype:
                raise ValueError(f"{name}: expected {self.density.dtype} as the field has it, got {rays.dtype}")
        start, way = (r if lead else r.unsqueeze(0) for r in (origins, F.normalize(directions, dim=-1)))
        slope = torch.where(way.abs() < 1e-9, 1e-9, way)
        walls = torch.stack([(-1 - start) / slope, (1 - start) / slope])
        near, far = walls.amin(0).amax(-1).clamp(min=0), walls.amax(0).amin(-1)
        ticks = self.step * torch.arange(self.samples, dtype=start.dtype, device=start.device)
        far_enough = ticks < (far - near).unsqueeze(-1)
        distance = near.unsqueeze(-1) + ticks
        places = start.unsqueeze(-2) + distance.unsqueeze(-1) * way.unsqueeze(-2)  # (R, N, samples, axes)

        grid = places if axes == 2 else places.unsqueeze(-2)
        value = F.grid_sample(self.density, grid, align_corners=False).flatten(3).squeeze(1)
        colour = F.grid_sample(self.colour, grid, align_corners=False).flatten(3).movedim(1, -1)
        background = self.background
        if self.colours == "signed":
            colour, background = 2 * colour.sigmoid() - 1, 2 * background.sigmoid() - 1
        density = F.softplus(self.scale.exp().view(-1, 1, 1) * value + self.shift) * far_enough
        through = (-density * self.step).exp()
        ahead = torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], dim=-1).cumprod(-1)
        weights = (1 - through) * ahead
        rest = 1 - weights.sum(-1)
        seen = (weights.unsqueeze(-1) * colour).sum(-2) + rest.unsqueeze(-1) * background.unsqueeze(1)
        depth = (weights * distance).sum(-1) + 10 * rest
        return _Rendered(*(out if lead else out.squeeze(0) for out in (seen, depth, weights)))


def emptiness_loss(weights: Float[Tensor, "*rays samples"], *, scale: float = 10.0) -> Float[Tensor, "*rays"]:
    """log(1 + scale w), the mean over a ray's samples: thin fog costs most for what it shows, so space clears.

    Args:
        weights: of `VoxelRadianceField`.
        scale: > 0; the official code weighs the loss by 10^4, 20 times more in the second half.

    Raises:
        ValueError: a scale that is not above 0.

    >>> emptiness_loss(torch.tensor([[0.0, 0.1]]))  # log(2) / 2
    tensor([0.3466])
    """
    require.floating("weights", weights, at_least_dims=1)
    require.number("scale", scale, above=0.0)
    return (scale * weights).log1p().mean(-1)
