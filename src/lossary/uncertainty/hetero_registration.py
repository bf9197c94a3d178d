"""Heteroscedastic registration: match images where the signal is strong, with the noise learnt beside the motion.

A displacement network warps a moving image onto a fixed one; a second network looks at both and says how large the
difference must be expected at each pixel. Weighing the differences by the inverse variance, as a likelihood would,
gives up on all that is hard to match and never gets better there. Instead the variance only makes a mild weight
between 0.5 and 0.73, from the signal-to-noise ratio relative to the rest of the image, and is itself learnt by a
likelihood that is not dominated by what fits already (beta-NLL). Meant for images whose noise differs from place to
place, such as ultrasound and magnetic resonance of the heart; where the ratio is even it is half a mean squared error.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles.procedure import Procedure

PAPER = Paper(
    title="Heteroscedastic Uncertainty Estimation Framework for Unsupervised Registration",
    year=2023,
    helps=("uncertainty",),
    url="https://arxiv.org/abs/2312.00836",
    departs=(
        "the signal-to-noise ratio is scaled within each image; the official code does so within the batch",
        "an image of even signal-to-noise ratio has the weight 1/2; the official code gives NaN",
        "signal below 0 counts as 0; the official code gives NaN",
        "smoothness has no factor for the resolution of the displacement, which in the official code doubles it",
        "no backbone: VoxelMorph, TransMorph or any other network is handed in",
    ),
    equation=(
        r"\begin{aligned} "
        r"L_u&=\operatorname{mean}(w\,e^2)+\lambda\operatorname{mean}\lvert\nabla u\rvert^2,\qquad "
        r"e=I_f-I_m(\cdot+u)\\ "
        r"w&=\operatorname{sigmoid}\bigl[(I_f/v)^{\gamma}\text{ scaled to 0 to 1}\bigr],\qquad "
        r"L_v=\operatorname{mean}\,\operatorname{sg}(v)^{\beta}\bigl(e^2/v+\log v\bigr)/2 "
        r"\end{aligned}"
    ),
)


def beta_nll_loss(
    input: Float[Tensor, "*batch"],
    target: Float[Tensor, "*batch"],
    *,
    log_variance: Float[Tensor, "*batch"],
    beta: float = 0.5,
    distribution: str = "gaussian",
) -> Float[Tensor, "*batch"]:
    """((target - input)^2 exp(-l) + l) / 2 * sg(exp(l))^beta with l = `log_variance`, for each entry.

    The gradient with respect to `input` is (input - target) exp(-l)^(1 - beta): at beta = 0 the Gaussian negative
    log-likelihood up to a constant, in which entries of large variance hardly count any more, at 1 that of half the
    squared error. The best exp(l) is the expected square (or absolute value) whatever beta is.

    Args:
        input: predicted means.
        target: observed, of the same shape.
        log_variance: predicted, of the same shape.
        beta: 0 to 1; the paper has 0.5.
        distribution: "gaussian", or "laplace" with |target - input| in place of the square.

    Raises:
        ValueError: shapes or dtypes that do not fit, a parameter out of range.

    >>> beta_nll_loss(torch.tensor([1.0]), torch.tensor([3.0]), log_variance=torch.tensor([4.0]).log(), beta=0.0)
    tensor([1.1931])
    """
    require.floating("input", input)
    require.same_shape("target", target, tuple(input.shape))
    require.same_shape("log_variance", log_variance, tuple(input.shape))
    require.number("beta", beta, at_least=0.0, at_most=1.0)
    require.one_of("distribution", distribution, ("gaussian", "laplace"))
    residual = target - input
    distance = residual.square() if distribution == "gaussian" else residual.abs()
    return (distance * (-log_variance).exp() + log_variance) / 2 * (beta * log_variance.detach()).exp()


def snr_weight(
    image: Float[Tensor, "batch *shape"],
    log_variance: Float[Tensor, "batch *shape"],
    *,
    gamma: float = 0.5,
    mask: Float[Tensor, "batch *shape"] | None = None,
) -> Float[Tensor, "batch *shape"]:
    """sigmoid of (image / exp(log_variance))^gamma, scaled to 0 to 1 within each image: 0.5 to 0.731. No gradient.

    Args:
        image: the signal, not negative.
        log_variance: of its noise.
        gamma: above 0; smaller evens out the ratio.
        mask: 1 where the image counts, 0 elsewhere: there the weight is 0, and the ratio before scaling.

    Raises:
        ValueError: shapes or dtypes that do not fit, gamma out of range.

    >>> snr_weight(torch.tensor([[0.0, 1.0, 4.0]]), torch.zeros(1, 3))
    tensor([[0.5000, 0.6225, 0.7311]])
    """
    require.floating("image", image, at_least_dims=2)
    require.same_shape("log_variance", log_variance, tuple(image.shape))
    require.number("gamma", gamma, above=0.0)
    keep = _mask(mask, image)
    with torch.no_grad():
        ratio = ((image.clamp_min(0) * keep) ** gamma * (-gamma * log_variance * keep).exp()).flatten(1)
        low, high = ratio.aminmax(dim=1, keepdim=True)
        even = (ratio - low) / torch.where(high > low, high - low, 1)
        return even.sigmoid().view_as(image) * keep


def snr_weighted_mse_loss(
    input: Float[Tensor, "batch *shape"],
    target: Float[Tensor, "batch *shape"],
    *,
    log_variance: Float[Tensor, "batch *shape"],
    gamma: float = 0.5,
    mask: Float[Tensor, "batch *shape"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean over each image of w (target - input)^2, with w = `snr_weight` of the target: (batch,).

    Args:
        input: warped images.
        target: fixed images, not negative.
        log_variance: of their difference; it gets no gradient.
        gamma: of `snr_weight`.
        mask: 1 where images count, 0 elsewhere; the mean is over all pixels.

    Raises:
        ValueError: shapes or dtypes that do not fit, gamma out of range.

    >>> image = torch.tensor([[0.0, 1.0, 4.0]])
    >>> snr_weighted_mse_loss(image + 1, image, log_variance=torch.zeros(1, 3))  # the mean weight
    tensor([0.6178])
    """
    require.floating("input", input, at_least_dims=2)
    require.same_shape("target", target, tuple(input.shape))
    return (snr_weight(target, log_variance, gamma=gamma, mask=mask) * (target - input).square()).flatten(1).mean(1)


def collaborative_variance_loss(
    input: Float[Tensor, "batch *shape"],
    target: Float[Tensor, "batch *shape"],
    *,
    log_variance: Float[Tensor, "batch *shape"],
    beta: float = 0.5,
    distribution: str = "gaussian",
    mask: Float[Tensor, "batch *shape"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean over each image of `beta_nll_loss`, from which only the variance learns: images get no gradient. (batch,).

    Args:
        input: warped images.
        target: fixed images.
        log_variance: of their difference, predicted.
        beta, distribution: of `beta_nll_loss`.
        mask: 1 where images count, 0 elsewhere; the mean is over all pixels.

    Raises:
        ValueError: shapes or dtypes that do not fit, a parameter out of range.

    >>> warped, fixed = torch.zeros(1, 4), torch.full((1, 4), 2.0)
    >>> collaborative_variance_loss(warped, fixed, log_variance=torch.zeros(1, 4))
    tensor([2.])
    """
    require.floating("input", input, at_least_dims=2)
    values = beta_nll_loss(
        input.detach(), target.detach(), log_variance=log_variance, beta=beta, distribution=distribution
    )
    return (values * _mask(mask, input)).flatten(1).mean(1)


class HeteroscedasticRegistration(Procedure):
    """The two networks in turn: displacement by the weighted error plus smoothness, variance by beta-NLL.

    A batch is (moving, fixed), each (batch, channels, *space) with two or three dimensions of space and values not
    negative. Players "displacement" and "variance", one turn each in every step, in this order; see `advance`. The
    paper trains both with Adam at 1e-4.

    Args:
        displacement: from both images, channels one after another, to (batch, space dimensions, *space): how far to
            look away in the moving image from each place of the fixed one, in pixels, by dimension of space.
        variance: from warped and fixed image, channels one after another, to the log-variance of each pixel.
        smoothness: lambda, weight of the mean squared difference of neighbouring displacements, at least 0.
        gamma: of `snr_weight`.
        beta, distribution: of `beta_nll_loss`.
        warm_up: so many steps train the displacement alone, unweighted, and as many the variance, before both.

    Raises:
        ValueError: a parameter out of range; a batch of wrong shapes.

    >>> still = nn.Conv2d(2, 2, 3, padding=1)
    >>> _ = [nn.init.zeros_(p) for p in still.parameters()]
    >>> registration = HeteroscedasticRegistration(still, nn.Conv2d(2, 1, 3, padding=1))
    >>> moving = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    >>> warped, _, _ = registration(moving, moving)
    >>> torch.allclose(warped, moving)
    True
    """

    def __init__(
        self,
        displacement: nn.Module,
        variance: nn.Module,
        *,
        smoothness: float = 0.01,
        gamma: float = 0.5,
        beta: float = 0.5,
        distribution: str = "gaussian",
        warm_up: int = 0,
    ) -> None:
        super().__init__()
        require.number("smoothness", smoothness, at_least=0.0)
        require.number("gamma", gamma, above=0.0)
        require.number("beta", beta, at_least=0.0, at_most=1.0)
        require.one_of("distribution", distribution, ("gaussian", "laplace"))
        require.whole("warm_up", warm_up)
        self.displacement, self.variance = displacement, variance
        self.smoothness, self.gamma, self.beta = smoothness, gamma, beta
        self.distribution, self.warm_up = distribution, warm_up

    def players(self) -> dict[str, nn.Module]:
        return {"displacement": self.displacement, "variance": self.variance}

    def turns(self, step: int) -> tuple[str, ...]:
        """Displacement alone, then variance alone, `warm_up` steps each, then both."""
        if step < self.warm_up:
            return ("displacement",)
        return ("variance",) if step < 2 * self.warm_up else ("displacement", "variance")

    def objective(
        self, player: str, batch: Any, *, step: int, generator: Generator | Sequence[Generator] | None = None
    ) -> Tensor:
        """One value for each pair of images, (batch,)."""
        moving, fixed = batch
        _images(moving, fixed)
        if player == "variance":
            with torch.no_grad():
                warped, _ = self._warped(moving, fixed)
            log_variance = self.variance(torch.cat([warped, fixed], dim=1))
            return collaborative_variance_loss(
                warped, fixed, log_variance=log_variance, beta=self.beta, distribution=self.distribution
            )
        warped, flow = self._warped(moving, fixed)
        error: Tensor
        if step < self.warm_up:
            error = (fixed - warped).square().flatten(1).mean(1)
        else:
            with torch.no_grad():
                log_variance = self.variance(torch.cat([warped, fixed], dim=1))
            error = snr_weighted_mse_loss(warped, fixed, log_variance=log_variance, gamma=self.gamma)
        return error + self.smoothness * _roughness(flow)

    def forward(
        self, moving: Float[Tensor, "batch channels *space"], fixed: Float[Tensor, "batch channels *space"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Warped images, displacements (batch, space dimensions, *space) in pixels and log-variances."""
        _images(moving, fixed)
        warped, flow = self._warped(moving, fixed)
        return warped, flow, self.variance(torch.cat([warped, fixed], dim=1))

    def _warped(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        flow = self.displacement(torch.cat([moving, fixed], dim=1))
        require.same_shape("displacement", flow, (len(moving), moving.ndim - 2, *moving.shape[2:]))
        return warp(moving, flow), flow


def warp(
    image: Float[Tensor, "batch channels *space"], displacement: Float[Tensor, "batch dimensions *space"]
) -> Float[Tensor, "batch channels *space"]:
    """image(x + displacement(x)) at each place x, linear between pixels and 0 outside the image.

    Args:
        image: with two or three dimensions of space.
        displacement: in pixels, by dimension of space in their order.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> shift = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    >>> warp(torch.tensor([[[[1.0, 2.0, 3.0]]]]), shift)
    tensor([[[[2., 3., 0.]]]])
    """
    require.floating("image", image, at_least_dims=4)
    space = image.shape[2:]
    require.same_shape("displacement", displacement, (len(image), len(space), *space))
    axes = [torch.arange(n, dtype=image.dtype, device=image.device) for n in space]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacement
    size = torch.tensor(space, dtype=image.dtype, device=image.device).view(1, -1, *[1] * len(space))
    grid = ((2 * places + 1) / size - 1).flip(1).movedim(1, -1)  # -1 to 1 over the edges of the outer pixels, x first
    warped: Tensor = F.grid_sample(image, grid, align_corners=False)
    return warped


def _roughness(flow: Tensor) -> Tensor:
    """Mean squared difference of neighbours, averaged over dimensions of space: (batch,)."""
    steps = [flow.diff(dim=d).square().flatten(1).mean(1) for d in range(2, flow.ndim)]
    return torch.stack(steps).mean(0)


def _mask(mask: Tensor | None, image: Tensor) -> Tensor | float:
    if mask is None:
        return 1.0
    require.same_shape("mask", mask, tuple(image.shape))
    return mask


def _images(moving: Tensor, fixed: Tensor) -> None:
    require.floating("moving", moving, at_least_dims=4)
    require.same_shape("fixed", fixed, tuple(moving.shape))
