"""Phasic fusing and directional consistency: move a diffusion model to a domain of which there are ten pictures.

Tuned on so few pictures a model copies them. Here what is made from a source sample has to differ from it, in a frozen
encoder's space, by the mean difference of the domains, so that the target keeps the spread of the source. Noise levels
have phases: where noise is strong the model is also shown the source sample (content) and learns that shift, where it
is weak it is shown nothing and learns the details of the few targets. While sampling, low frequencies may be taken
from the noised source. For few-shot adaptation between domains that correspond; where their shapes differ, a shift of
means says too little.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import Process, over
from lossary.diffusion._samplers import ancestral
from lossary.paper import Paper

PAPER = Paper(
    title=(
        "Phasic Content Fusing Diffusion Model with Directional Distribution Consistency for Few-Shot Model Adaption"
    ),
    year=2023,
    helps=("few-labels", "train-test-shift", "rare-modes"),
    departs=(
        "encoder and style loss (CLIP and VGG's Gram matrices in the paper) are the caller's functions",
        "both phases are drawn within one batch; the official code takes a batch of each in turn and adds them",
        "the guided step's reference is noised a little more and stepped to the level where it is used; the official"
        " one is noised to that level and stepped one of a thousand below it",
        "low frequencies of any factor by antialiased cubic resizing, or by the caller's filter",
        "the claims are in the plane, with a fixed random encoder: no style loss, no frequencies to guide",
    ),
    equation=(
        r"\mathcal L_{\mathrm{DDC}}=\bigl\lVert E(\hat x_0(x^A_t,m(t)))-E(x^A)-w\bigr\rVert^2,\quad"
        r" w=\mathbb E[E(x^B)]-\mathbb E[E(x^A)],\quad"
        r" m(t)=\frac1{1+e^{\,t_s-t}};\qquad"
        r" x_{t-1}\leftarrow x_{t-1}-\phi(x_{t-1})+\phi(x^{\mathrm{ref}}_{t-1})"
    ),
    url="https://arxiv.org/abs/2309.03729",
)

BASE, LAST = 20.0, 0.9  # of the weights 20^t and 20^0.9 - 20^t


def directional_distribution_consistency_loss(
    input: Float[Tensor, "*batch features"],
    source: Float[Tensor, "*batch features"],
    *,
    direction: Float[Tensor, "*#batch features"],
) -> Float[Tensor, "*batch"]:
    """Mean square of E(x_hat) - E(x_A) - w over the features.

    A generator for which it is 0 has the source's distribution of features, shifted: all of its diversity.

    Args:
        input: features of what was made from a source sample.
        source: features of that sample.
        direction: w, mean features of the target samples minus those of the source.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> made, source = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> directional_distribution_consistency_loss(made, source, direction=torch.tensor([1.0, 2.0]))
    tensor([0.0000, 2.5000])
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("source", source, tuple(input.shape))
    require.floating("direction", direction, at_least_dims=1)
    if direction.shape[-1] != input.shape[-1]:
        raise ValueError(f"direction: expected {input.shape[-1]} features, got shape {tuple(direction.shape)}")
    return (input - source - direction).square().mean(-1)


def phasic_content_weight(
    t: Float[Tensor, "*batch"], *, boundary: float = 0.3, steepness: float = 1000.0
) -> Float[Tensor, "*batch"]:
    """m(t) = sigmoid(steepness (t - boundary)): how much of the content is seen, t from 0, data, to 1, noise.

    Args:
        t: times.
        boundary: t_s between the phases.
        steepness: the paper's 1000 steps, which make it all but a jump.

    Raises:
        ValueError: t not a floating-point tensor, or numbers out of range.

    >>> phasic_content_weight(torch.tensor([0.298, 0.3, 0.302, 0.5]))
    tensor([0.1192, 0.5000, 0.8808, 1.0000])
    """
    require.floating("t", t)
    require.number("boundary", boundary, at_least=0.0, at_most=1.0)
    require.number("steepness", steepness, above=0.0)
    return torch.sigmoid(steepness * (t - boundary))


class PhasicContentFusion(nn.Module):
    """Join a network's middle features with those of the content, which give way to noise at small times.

    Args:
        fuse: takes both side by side and gives features as wide as the network's; the official one has three 3x3
            convolutions with ReLU between.
        dim: along which they are joined, 1 for maps.
        boundary, steepness: see `phasic_content_weight`.

    >>> fusion = PhasicContentFusion(lambda both: both[:, 2:], dim=1)
    >>> fusion(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1))
    tensor([[1., 1.]])
    """

    def __init__(
        self,
        fuse: Callable[[Tensor], Tensor],
        *,
        dim: int = 1,
        boundary: float = 0.3,
        steepness: float = 1000.0,
    ) -> None:
        super().__init__()
        self.fuse, self.dim, self.boundary, self.steepness = fuse, dim, boundary, steepness

    def forward(
        self,
        features: Float[Tensor, "*batch_and_data"],
        content: Float[Tensor, "*batch_and_data"],
        t: Float[Tensor, "*batch"],
        *,
        generator: Randomness = None,
    ) -> Tensor:
        """Fused features.

        Args:
            features: of x_t, in the middle of the network.
            content: those of the content, noised to the same t; it gets no gradient.
            t: 0 to 1.
            generator: of the noise; a sequence has one for each replica.

        Raises:
            ValueError: shapes that do not fit.
        """
        require.floating("features", features)
        require.same_shape("content", content, tuple(features.shape))
        seen = over(phasic_content_weight(t, boundary=self.boundary, steepness=self.steepness), features)
        content = content.detach()
        shown = seen * content + (1 - seen) * noise(content, generator)
        return self.fuse(torch.cat([features, shown], dim=self.dim))


def phasic_adaptation_loss(
    denoise: Denoise,
    source: Float[Tensor, "*batch_and_data"],
    target: Float[Tensor, "*batch_and_data"],
    t: Float[Tensor, "*batch"],
    *,
    process: Process,
    encode: Callable[[Tensor], Tensor],
    consistency: Callable[[Tensor, Tensor], Tensor],
    style: Callable[[Tensor], Tensor] | None = None,
    boundary: float = 0.3,
    generator: Randomness = None,
) -> Float[Tensor, "*batch"]:
    """Content and style where t is large, details where it is small: one value per sample.

        20^t (consistency(E(x_hat), E(x_A)) + style(x_hat)) + (20^0.9 - 20^t) |noise error|_1     if t >= boundary,
        (20^0.9 - 20^t) |noise error|_1 / 5                                                       if t < boundary,

    x_hat made in one step from the source sample noised to t, seen as content; noise error that of the target sample
    noised to t, without content.

    Args:
        denoise: denoise(x, sigma, content) and denoise(x, sigma), the network that is tuned.
        source, target: (*batch, ...); the few targets repeat.
        t: 0 to 0.8 in the paper, half of them below the boundary. The noise is that of 0.001 for times below, as the
            error of the noise cannot be told at 0.
        process: under which t is a time.
        encode: frozen; samples to features.
        consistency: of features made and source features, per sample, usually
            partial(directional_distribution_consistency_loss, direction=w).
        style: of samples made, per sample.
        boundary: between the phases.
        generator: of the noise; a sequence has one for each replica.

    Raises:
        ValueError: shapes that do not fit.

    >>> from functools import partial
    >>> from lossary.diffusion._process import cosine
    >>> consistency = partial(directional_distribution_consistency_loss, direction=torch.ones(2))
    >>> x, t, call = torch.zeros(1, 2), torch.tensor([0.5]), lambda x, sigma, *content: 0 * x
    >>> phasic_adaptation_loss(  # 20^0.5, as x_hat should be 1 everywhere and the target is met
    ...     call, x, x, t, process=cosine(), encode=lambda x: x, consistency=consistency
    ... )
    tensor([4.4721])
    """
    require.floating("source", source)
    require.same_shape("target", target, tuple(source.shape))
    require.same_shape("t", t, tuple(source.shape[: t.ndim]))
    require.number("boundary", boundary, at_least=0.0, at_most=1.0)
    sigma = process.ratio(t.clamp(min=1e-3)).to(source)
    made = denoise(source + over(sigma, source) * noise(source, generator), sigma, source)
    far = consistency(encode(made), encode(source).detach())
    if style is not None:
        far = far + style(made)
    found = denoise(target + over(sigma, target) * noise(target, generator), sigma)
    error = (found - target).abs().flatten(t.ndim).mean(-1) / sigma
    alpha, early = BASE**t, t >= boundary
    return torch.where(early, alpha * far, 0.0) + (BASE**LAST - alpha) * torch.where(early, 1.0, 0.2) * error


def cross_domain_structure_guidance(
    denoise: Denoise,
    x: Float[Tensor, "batch *data"],
    sigmas: Float[Tensor, " levels"],
    *,
    source: Float[Tensor, "batch *data"],
    until: float,
    low_pass: Callable[[Tensor], Tensor] | int = 8,
    eta: float = 1.0,
    step: float = 0.01,
    generator: Generator | None = None,
) -> Float[Tensor, "batch *data"]:
    """Sample with the low frequencies of the noised source: x <- x - phi(x) + phi(ref) after each step above a level.

    ref is the source, noised and taken a small step by the same denoiser. Two evaluations for a guided step, one for
    others.

    Args:
        denoise: usually with the source as its content.
        x: start, of level sigmas[0]: in the paper the source itself, noised to 600 of 1000 steps.
        sigmas: falling levels.
        source: samples of the source domain, of the shape of x.
        until: the last steps, to levels not above this one, are left alone.
        low_pass: phi, or the factor by which pictures (batch, channels, height, width) are made small and large again.
        eta: of the steps: 1 as in the official code, 0 is DDIM.
        step: how much more than the level the reference is noised, relatively.
        generator: of the noise.

    Raises:
        ValueError: shapes or numbers that do not fit.

    >>> low, sigmas = lambda x: x, torch.tensor([2.0, 1.0, 0.0])  # everything is low: the source comes out
    >>> seven = torch.full((1, 2), 7.0)
    >>> cross_domain_structure_guidance(
    ...     lambda x, sigma: seven, torch.zeros(1, 2), sigmas, source=seven, until=0.5, low_pass=low
    ... )
    tensor([[7., 7.]])
    """
    require.floating("x", x, at_least_dims=1)
    require.same_shape("source", source, tuple(x.shape))
    require.floating("sigmas", sigmas, dims=1)
    require.number("until", until, at_least=0.0)
    require.number("step", step, above=0.0)
    require.number("eta", eta, at_least=0.0, at_most=1.0)
    if isinstance(low_pass, int):
        require.whole("low_pass", low_pass, at_least=1)
        factor = low_pass

        def phi(y: Tensor) -> Tensor:
            return _resized(y, factor)

    else:
        phi = low_pass
    for k in range(len(sigmas) - 1):
        x = ancestral(denoise, x, sigmas[k : k + 2], generator=generator, eta=eta)
        level = float(sigmas[k + 1])
        if level > until:
            above = level * (1 + step)
            noised = source + above * noise(source, generator)
            reference = ancestral(denoise, noised, sigmas.new_tensor([above, level]), generator=generator)
            x = x - phi(x) + phi(reference)
    return x


def _resized(x: Tensor, factor: int) -> Tensor:
    """Down and up again by antialiased cubic interpolation, which takes no half precision on CPUs."""
    height, width = x.shape[-2:]
    resize = partial(F.interpolate, mode="bicubic", antialias=True)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    small = resize(wide, size=(max(1, height // factor), max(1, width // factor)))
    return resize(small, size=(height, width)).to(x.dtype)
