"""Cauchy loss and company: consistency models trained from scratch on latents that have outliers.

A consistency model maps noise of any level to data in one step, trained so that neighbouring levels agree. Latents of
autoencoders have rare huge entries that dominate that training; a loss that grows only logarithmically ignores them,
with a width that shrinks as levels get finer. Besides: noise is paired with data by optimal transport within the
batch, the cleanest levels are also trained to denoise, and layer norms do not rescale, so that one huge entry is not
amplified. For one- and two-step generation without a teacher; on clean, bounded data pseudo-Huber does as well.
"""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._process import over
from lossary.paper import Paper
from lossary.roles import layer, loss

PAPER = Paper(
    title="Improved Training Technique for Latent Consistency Models",
    year=2025,
    helps=("slow-sampling", "heavy-tails"),
    departs=(
        "mean over a sample's entries inside the logarithm, as in the official code; the paper has the norm",
        "the constants of the schedule of c are those of the official code",
        "the training loop, its moving average and dropout state are the caller's",
    ),
    equation=(
        r"\ell=\frac1{t-t'}\log\Bigl(1+\frac{\lVert f_\theta(x_t,t)-f_{\theta^-}(x_{t'},t')\rVert^2/d}{2c^2}\Bigr),"
        r"\qquad c=e^{-1.15\ln N-0.85}"
    ),
    url="https://github.com/quandao10/sLCT",
)

Distance = Literal["cauchy", "pseudo_huber", "squared"]


@loss(on="real", examples=({}, {"c": 0.1}), tune={"c": (0.03, 0.1, 0.3, 1.0)})
def cauchy_loss(
    input: Float[Tensor, "*batch"], target: Float[Tensor, "*batch"], *, c: Float[Tensor, "*batch"] | float = 1.0
) -> Float[Tensor, "*batch"]:
    """log(1 + r^2 / (2 c^2)), r = input - target: the pull r / (c^2 + r^2 / 2) of an outlier fades as it grows.

    Args:
        input: predictions.
        target: numbers of the same shape.
        c: width, > 0; residuals below it are charged by their square over 2 c^2.

    Raises:
        ValueError: shapes or dtypes that do not fit, or c that is not above 0.

    >>> cauchy_loss(torch.tensor([0.0, 2.0, 200.0]), torch.zeros(3))  # log 1, log 3, log 20001
    tensor([0.0000, 1.0986, 9.9035])
    """
    require.floating("input", input)
    require.same_shape("target", target, tuple(input.shape))
    require.number("c", c, above=0.0)
    return (0.5 * ((input - target) / c).square()).log1p()


def consistency_loss(
    input: Float[Tensor, "*batch_and_data"],
    target: Float[Tensor, "*batch_and_data"],
    *,
    gap: Float[Tensor, "*batch"],
    c: float,
    distance: Distance = "cauchy",
) -> Float[Tensor, "*batch"]:
    """Distance of a consistency model's outputs at two neighbouring levels over the gap between them, per sample.

    With m the mean square of the differences, it is log(1 + m / (2 c^2)) for "cauchy", sqrt(m + c^2) - c for
    "pseudo_huber" (iCT) and m for "squared".

    Args:
        input: f(x + t noise, t).
        target: f(x + t' noise, t'), t' < t, the same noise; it gets no gradient.
        gap: t - t', of the leading dimensions, above 0.
        c: width, see `consistency_width`; "squared" ignores it.
        distance: see above.

    Raises:
        ValueError: shapes that do not fit, or c that is not above 0.

    >>> consistency_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 0.0]]), gap=torch.tensor([0.5]), c=1.0)
    tensor([2.5055])
    """
    require.floating("input", input)
    require.same_shape("target", target, tuple(input.shape))
    require.same_shape("gap", gap, tuple(input.shape[: gap.ndim]))
    require.number("c", c, above=0.0)
    require.one_of("distance", distance, get_args(Distance))
    square = (input - target.detach()).square()
    mean = square.flatten(gap.ndim).mean(-1) if square.ndim > gap.ndim else square
    if distance == "cauchy":
        return (mean / (2 * c**2)).log1p() / gap
    return (mean if distance == "squared" else mean / ((mean + c**2).sqrt() + c)) / gap


def consistency_width(intervals: int, *, dimension: int, first: int = 10) -> float:
    """c for N intervals of noise levels: 0.00054 sqrt(dimension) in the first phase, then exp(-1.15 ln N - 0.85).

    Args:
        intervals: N, doubled from phase to phase.
        dimension: entries of a sample.
        first: N of the first phase.

    Raises:
        ValueError: numbers below 1.

    >>> consistency_width(10, dimension=4096), round(consistency_width(20, dimension=4096), 5)
    (0.03456, 0.01364)
    """
    for name, value in (("intervals", intervals), ("dimension", dimension), ("first", first)):
        require.whole(name, value, at_least=1)
    return 0.00054 * dimension**0.5 if intervals <= first else math.exp(-1.15 * math.log(intervals) - 0.85)


def level_weights(sigmas: Float[Tensor, " levels"], *, mean: float = -1.1, deviation: float = 2.0) -> Tensor:
    """Probability that training takes each pair of neighbouring levels, (levels - 1,): a normal's in log sigma.

    Args:
        sigmas: falling, above 0.
        mean, deviation: of the normal.

    Raises:
        ValueError: fewer than two levels, or a deviation that is not above 0.

    >>> level_weights(torch.tensor([80.0, 1.0, 0.002])).round(decimals=2)
    tensor([0.2900, 0.7100])
    """
    require.floating("sigmas", sigmas, dims=1)
    require.number("deviation", deviation, above=0.0)
    if len(sigmas) < 2:
        raise ValueError(f"sigmas: expected at least 2 levels, got {len(sigmas)}")
    below = torch.special.ndtr((sigmas.log() - mean) / deviation)
    share = below[:-1] - below[1:]
    return share / share.sum()


def early_denoising_loss(
    denoised: Float[Tensor, "batch *data"],
    clean: Float[Tensor, "batch *data"],
    sigma: Float[Tensor, " batch"],
    index: Int[Tensor, " batch"],
    *,
    levels: int,
    weight: float = 5.0,
    spread: float = 0.5,
) -> Float[Tensor, " batch"]:
    """weight (1 / sigma^2 + 1 / spread^2) |denoised - clean|^2 / d for the cleanest quarter of the levels, else 0.

    Scaled so that the mean over the batch is that over the samples it concerns.

    Args:
        denoised: the consistency model's output.
        clean: the data.
        sigma: noise levels.
        index: of the levels, from 0, the noisiest.
        levels: how many there are.
        weight: of this loss beside the consistency loss.
        spread: standard deviation of the data.

    Raises:
        ValueError: shapes that do not fit.

    >>> one = torch.ones(2)
    >>> early_denoising_loss(torch.zeros(2, 1), torch.ones(2, 1), one, torch.tensor([3, 9]), levels=11)  # 5 (1 + 4) 2
    tensor([ 0., 50.])
    """
    require.floating("denoised", denoised, at_least_dims=1)
    require.same_shape("clean", clean, tuple(denoised.shape))
    require.same_shape("sigma", sigma, tuple(denoised.shape[:1]))
    require.integers("index", index, shape=tuple(denoised.shape[:1]))
    chosen = (index >= int(0.75 * levels)).to(denoised.dtype)
    error = (denoised - clean).square().flatten(1).mean(1)
    share = chosen.mean().clamp(min=1 / len(chosen))
    return weight * (sigma**-2 + spread**-2) * error * chosen / share


def transport_noise(clean: Float[Tensor, "batch *data"], noise: Float[Tensor, "batch *data"]) -> Tensor:
    """The noise in another order: each goes to the data it is assigned to by least total squared distance.

    Args:
        clean: the data.
        noise: as many samples of noise.

    Raises:
        ValueError: shapes that differ.

    >>> transport_noise(torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.3], [-2.0]]))
    tensor([[-2.0000],
            [ 0.3000]])
    """
    from scipy.optimize import linear_sum_assignment

    require.floating("clean", clean, at_least_dims=1)
    require.same_shape("noise", noise, tuple(clean.shape))
    cost = torch.cdist(clean.flatten(1).double(), noise.flatten(1).double()).square()
    _, order = linear_sum_assignment(cost.cpu().numpy())
    return noise[torch.as_tensor(order, device=noise.device)]


@layer(examples=({"normalized_shape": 6}, {"normalized_shape": (4, 6), "eps": 1e-3}))
class NonScalingLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose scale stays 1 while its bias learns: an outlier's channel cannot be blown up.

    Weights of an `nn.LayerNorm` load, their scale included.

    Args:
        normalized_shape: the last dimensions.
        eps: added to the variance.

    Raises:
        ValueError: an eps that is not a number above 0; an input that is not floating, or ends in other dimensions.

    >>> NonScalingLayerNorm(2)(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]], grad_fn=<NativeLayerNormBackward0>)
    """

    def __init__(self, normalized_shape: Any, *, eps: float = 1e-5) -> None:
        if isinstance(eps, Tensor):
            raise ValueError("eps: expected a number, got a tensor, which would get no gradient")
        require.number("eps", eps, above=0.0)
        super().__init__(normalized_shape, eps=eps)
        self.weight.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        require.floating("input", input)
        if tuple(input.shape[-len(self.normalized_shape) :]) != tuple(self.normalized_shape):
            raise ValueError(f"input: expected to end in {tuple(self.normalized_shape)}, got {tuple(input.shape)}")
        return super().forward(input)


class ConsistencyModel(nn.Module):
    """denoise(x, sigma) = c_skip x + c_out network(c_in x, log(sigma) / 4): at the lowest level x itself.

    Args:
        network: called as network(x (*batch, ...), t (*batch)), to the shape of x.
        spread: standard deviation of the data.
        lowest: noise level at which x is the data.

    Raises:
        ValueError: a number that is not above 0.

    >>> model = ConsistencyModel(lambda x, t: x.exp())
    >>> model(torch.tensor([[3.0]]), 0.002)
    tensor([[3.]])
    """

    def __init__(self, network: Any, *, spread: float = 0.5, lowest: float = 0.002) -> None:
        super().__init__()
        require.number("spread", spread, above=0.0)
        require.number("lowest", lowest, above=0.0)
        self.network, self.spread, self.lowest = network, spread, lowest

    def forward(self, x: Tensor, sigma: Tensor | float, *conditions: Any) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        level = level.expand(x.shape[: max(1, level.ndim)])
        total = over((level.square() + self.spread**2).sqrt(), x)
        beyond = over(level - self.lowest, x)
        predicted = self.network(x / total, level.log() / 4, *conditions)
        skip = self.spread**2 / (beyond.square() + self.spread**2)
        return skip * x + beyond * self.spread / total * predicted  # type: ignore[no-any-return]
