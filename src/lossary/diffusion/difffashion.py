"""DiffFashion: dress a garment in the look of any picture, its shape held by features and by a mask from labels.

A class-conditional diffusion knows where its object is: the prediction changes most there when the label does, which
gives a mask without segmentation. Then the reference picture, not the garment, is noised and denoised under the
garment's label, while gradients of frozen image features pull layout (how similar patches are to each other) towards
the garment and look towards the reference, and early steps paste the garment's surroundings back. No training, no
pair of examples; a gradient through network and features at every step, and weights that want tuning.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._noise import noise
from lossary.paper import Paper

PAPER = Paper(
    title="DiffFashion: Reference-based Fashion Design with Structure-aware Transfer by Diffusion Models",
    year=2023,
    helps=("inverse-problems", "guidance"),
    departs=(
        "defaults and terms are the official code's, for 120 of 200 respaced steps at 256x256 with keys and class token"
        " of DINO's last layer; the features are the caller's",
        "steps have the posterior's variance, not a learned one; surroundings are pasted at the noise level that the"
        " sample has after the step, the official code's is one step noisier",
        "between the repeated first steps noise is added back as from the level reached to the first; the official code"
        " adds that of the beta one step below",
        "claims: 8x8 pictures of four lit shapes, a U-Net of two levels, features of a two-layer classifier, 20 steps;"
        " no transfer of colour statistics there, since it recolours the surroundings as well",
    ),
    equation=(
        r"m=\mathbf 1\Bigl[z\bigl(\textstyle\sum_{\mathrm{rgb}}(\mu(c)-\tfrac1K\sum_k\mu(c_k))^2\bigr)>-0.2\Bigr],"
        r"\qquad x_{t-1}\sim\mathcal N(\mu_t-\Sigma_t\nabla_{x_t}\mathcal L,\Sigma_t),\quad "
        r"x\leftarrow m\odot x+(1-m)\odot q(x^{\mathrm{src}},t)"
    ),
    url="https://github.com/Rem105-210/DiffFashion",
)

Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""features(pictures (B, C, H, W) from -1 to 1) -> keys of places (B, places, width) and a summary (B, wide)."""


@torch.no_grad()
def label_contrast_mask(
    denoise: Denoise,
    x: Float[Tensor, "batch channels height width"],
    sigma: float,
    label: Int[Tensor, " batch"],
    contrast: Int[Tensor, "batch labels"],
    *,
    threshold: float = -0.2,
) -> Bool[Tensor, "batch 1 height width"]:
    """True where a prediction under the label differs from the mean of those under other labels: at the object.

    The squared difference, summed over channels, minus its mean over the picture, over its standard deviation there,
    is held against the threshold. 1 + labels evaluations. Posterior means differ by a common factor from predictions
    of x_0 and give the same mask.

    Args:
        denoise: denoise(x, sigma, label) -> x_0.
        x: a sample, best halfway down from the garment noised; the official code passes the prediction of x_0 there.
        sigma: its noise level.
        label: of the garment.
        contrast: other labels, one or more.
        threshold: in standard deviations; the lower, the more is taken for the object.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> def denoise(x, sigma, label): return x * label.view(-1, 1, 1, 1)
    >>> x = torch.tensor([[[[0.0, 0.0, 3.0]]]])
    >>> label_contrast_mask(denoise, x, 1.0, torch.tensor([2]), torch.tensor([[1, 0]]))
    tensor([[[[False, False,  True]]]])
    """
    require.floating("x", x, dims=4)
    require.integers("label", label, shape=(len(x),))
    require.integers("contrast", contrast)
    if contrast.ndim != 2 or len(contrast) != len(x) or not contrast.shape[1]:
        raise ValueError(f"contrast: expected shape ({len(x)}, at least 1), got {tuple(contrast.shape)}")
    require.number("threshold", threshold)
    others = torch.stack([denoise(x, sigma, other) for other in contrast.T]).mean(0)
    difference = (denoise(x, sigma, label) - others).square().sum(1, keepdim=True)
    centred = difference - difference.mean((-2, -1), keepdim=True)
    return centred > threshold * difference.std((-2, -1), keepdim=True)


@dataclass(frozen=True)
class StructureAppearanceLoss:
    """What the transfer descends: layout towards the source, look towards the reference; one value for each picture.

    Attributes:
        features: see `Features`; differentiable.
        source: the garment (B, C, H, W), from -1 to 1.
        reference: the look, of the same shape.
        mask: (B, 1, H, W), where the garment is; None is everywhere. The rest is black to the summary.
        structure: weight of the mean squared difference of the places' cosine similarities to each other.
        contrast: of the cross-entropy, at temperature 0.07, of finding each place's own key among the source's.
        summary: of the mean squared difference between the summaries of the masked picture and the reference.
        pixels: of that between their pixels.
        range: of that between predicted x_0 and itself clamped from -1 to 1.
        change: of minus that between the summary and the previous step's.
        strength: factor on all of it. Gradients by pixel fall with the number of pixels: small pictures want less.

    Raises:
        ValueError: shapes that do not fit, or a weight below 0.

    >>> import torch
    >>> x = torch.ones(1, 3, 2, 2)
    >>> loss = StructureAppearanceLoss(lambda x: (x.flatten(2).mT, x.mean((2, 3))), 0.5 * x, x, contrast=0.0)
    >>> loss(x, x), loss(0 * x + 0.9, 2 * x)  # 0.01 (3000 + 200) + 200
    (tensor([0.]), tensor([232.0000]))
    """

    features: Features
    source: Tensor
    reference: Tensor
    mask: Tensor | None = None
    structure: float = 1000.0
    contrast: float = 200.0
    summary: float = 200.0
    pixels: float = 3000.0
    range: float = 200.0
    change: float = 100.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        require.floating("source", self.source, dims=4)
        require.same_shape("reference", self.reference, tuple(self.source.shape))
        batch, _, height, width = self.source.shape
        if self.mask is not None and tuple(self.mask.shape) != (batch, 1, height, width):
            raise ValueError(f"mask: expected shape {(batch, 1, height, width)}, got {tuple(self.mask.shape)}")
        for name in ("structure", "contrast", "summary", "pixels", "range", "change", "strength"):
            require.number(name, getattr(self, name), at_least=0.0)

    def __call__(
        self,
        x: Float[Tensor, "batch channels height width"],
        clean: Float[Tensor, "batch channels height width"],
        previous: Float[Tensor, "batch channels height width"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The loss.

        Args:
            x: what the features see.
            clean: the prediction of x_0.
            previous: x of the step before, from which to move away; None leaves the term out.
        """
        keys, summary = self.features(x)
        masked = x if self.mask is None else (x + 1) * self.mask - 1
        dressed = summary if self.mask is None else self.features(masked)[1]
        with torch.no_grad():
            wanted, _ = self.features(self.source)
            look = self.features(self.reference)[1]
            before = None if previous is None else self.features(previous)[1]
        unit, goal = F.normalize(keys, dim=-1), F.normalize(wanted, dim=-1)
        alike = unit @ goal.mT / 0.07
        places = torch.arange(alike.shape[-1], device=alike.device).expand(alike.shape[:2])
        value = self.structure * (unit @ unit.mT - goal @ goal.mT).square().mean((-2, -1))
        value = value + self.contrast * F.cross_entropy(alike.mT, places, reduction="none").mean(-1)
        value = value + self.summary * (dressed - look).square().mean(-1)
        value = value + self.pixels * (x - self.reference).square().flatten(1).mean(1)
        value = value + self.range * (clean - clean.clamp(-1, 1)).square().flatten(1).mean(1)
        if before is not None:
            value = value - self.change * (summary - before).square().mean(-1)
        return self.strength * value


@torch.no_grad()
def structure_appearance_guidance(
    denoise: Denoise,
    loss: StructureAppearanceLoss,
    sigmas: Float[Tensor, " steps_and_one"],
    *,
    restarts: int = 10,
    pasted: int = 35,
    changing: int = 19,
    generator: Generator | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """The reference noised to sigmas[0], then denoised with each step's mean moved down the loss's gradient.

    The loss sees f x_0 + (1 - f) x_t with f^2 = sigma^2 / (1 + sigma^2), its gradient runs through the network, and is
    weighed by the step's variance as of a variance-preserving process. steps + restarts - 1 evaluations.

    Args:
        denoise: denoise(x, sigma) -> x_0, under the garment's label; x is data plus noise.
        loss: with the source, the reference and the mask.
        sigmas: falling noise levels; the first is where the reference starts, the last may be 0.
        restarts: times that the first step is taken, noised again between.
        pasted: steps after the first which end by pasting the source's surroundings, noised, outside the mask.
        changing: first steps in which the loss also moves away from the previous step; before the first is the source.

    Raises:
        ValueError: sigmas that do not fall, or a number of steps out of range.

    >>> import torch
    >>> x = torch.ones(1, 3, 2, 2)
    >>> loss = StructureAppearanceLoss(lambda x: (x.flatten(2).mT, x.mean((2, 3))), 0 * x, x)
    >>> structure_appearance_guidance(lambda x, sigma: 0.5 + 0 * x, loss, torch.tensor([3.0, 1.0, 0.0])).unique()
    tensor([0.5000])
    """
    levels = sigmas.tolist()
    if sigmas.ndim != 1 or len(levels) < 2 or levels[-1] < 0 or any(a <= b for a, b in pairwise(levels)):
        raise ValueError("sigmas: expected at least two falling values, none below 0")
    require.whole("restarts", restarts, at_least=1)
    require.whole("pasted", pasted)
    require.whole("changing", changing)
    source, previous = loss.source, loss.source
    x = loss.reference + levels[0] * noise(source, generator)
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        alpha, after = 1 / math.sqrt(1 + sigma**2), 1 / math.sqrt(1 + lower**2)
        share = (lower / sigma) ** 2
        variance = lower**2 * (1 - share)
        for again in range(restarts if step == 0 else 1):
            if again:
                x = x + math.sqrt(sigma**2 - lower**2) * noise(source, generator)
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                clean = denoise(x, sigma)
                seen = alpha * sigma * clean + (1 - alpha * sigma) * alpha * x
                value = loss(seen, clean, previous if step < changing else None)
                (slope,) = torch.autograd.grad(value.sum(), x)
            x, clean, previous = x.detach(), clean.detach(), seen.detach()
            x = clean + share * (x - clean) - (after / alpha) * variance * slope
            if variance > 0:
                x = x + math.sqrt(variance) * noise(source, generator)
        if loss.mask is not None and 0 < step <= pasted:
            x = torch.where(loss.mask.bool(), x, source + lower * noise(source, generator))
    return x


def match_colours(
    x: Float[Tensor, "batch channels height width"], reference: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch channels height width"]:
    """Each picture with the reference's mean and covariance of colours, by the linear map that moves them least.

    T = S^-1/2 (S^1/2 R S^1/2)^1/2 S^-1/2, of Monge and Kantorovich, S and R being the covariances. Colours that do
    not vary in x stay constant.

    Args:
        x: the result of a transfer.
        reference: of the same batch and channels, of any size.

    Raises:
        ValueError: batches or channels that differ.

    >>> import torch
    >>> match_colours(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[5.0, 9.0]]]]))
    tensor([[[[5., 9.]]]])
    """
    require.floating("x", x, dims=4)
    require.floating("reference", reference, dims=4)
    if x.shape[:2] != reference.shape[:2]:
        raise ValueError(f"reference: expected batch and channels {tuple(x.shape[:2])}, got {tuple(reference.shape)}")
    own, other = x.double().flatten(2), reference.double().flatten(2)
    mean, goal = own.mean(-1, keepdim=True), other.mean(-1, keepdim=True)
    spread, wanted = ((v - m) @ (v - m).mT / v.shape[-1] for v, m in ((own, mean), (other, goal)))
    root, inverse = _power(spread, 0.5), _power(spread, -0.5)
    moved = inverse @ _power(root @ wanted @ root, 0.5) @ inverse @ (own - mean) + goal
    return moved.view(x.shape).to(x.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Of symmetric matrices; directions without spread stay without."""
    values, vectors = torch.linalg.eigh(matrix)
    live = values > 1e-12
    powers = torch.where(live, values.clamp(min=1e-12) ** exponent, 0.0)
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT
