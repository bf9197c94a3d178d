"""Minority guidance: ask a diffusion for the rare samples, by how badly it remembers them.

Noise a sample strongly and let the network denoise it: what comes back is drawn towards the common data, so the
distance to the original is large for rare samples. That `minority_score` of the training data, cut into classes of
equal size, trains a classifier on noised data whose gradient steers sampling to a class, the last one for the rarest.
For more of the long tail that the network knows but seldom draws; samples it never learned will not appear, and a
score in pixels takes unusual brightness for rarity: give it a distance of features.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._noise import noise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="Don't Play Favorites: Minority Guidance for Diffusion Models",
    year=2023,
    helps=("rare-modes", "guidance"),
    departs=(
        "the distance is Euclidean unless another is given; the paper has LPIPS",
        "the noise level of the score is an argument: the official code takes step 60 of 100, the text a late one",
        "guidance shifts the prediction of x_0, which is the code's for DDIM; for DDPM it shifts the mean",
        "training of the classifier is the caller's",
    ),
    equation=(
        r"l(x_0)=\mathbb E_{\varepsilon}\bigl[d\bigl(x_0,\hat x_0(x_0+\sigma\varepsilon)\bigr)\bigr],\qquad "
        r"\hat x_0\leftarrow\hat x_0+w\,\sigma^2\,\nabla_x\log p(l=k\mid x)"
    ),
    url="https://github.com/soobin-um/minority-guidance",
)

Distance = Callable[[Tensor, Tensor], Tensor]
"""distance(clean, found), both (*batch, ...), -> (*batch)."""


@torch.no_grad()
def minority_score(
    denoise: Denoise,
    clean: Float[Tensor, "*batch_and_data"],
    sigma: float,
    *,
    draws: int = 5,
    distance: Distance | None = None,
    data_dims: int | None = None,
    generator: Generator | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean distance between samples and what is denoised from them, `draws` evaluations: large for the rare ones.

    Args:
        denoise: denoise(x, sigma) -> x_0.
        clean: the samples.
        sigma: noise level > 0, several times the spread of the data.
        draws: of noise.
        distance: None is the Euclidean one.
        data_dims: how many trailing dimensions make one sample; None is all but the first.
        generator: of the noise.

    Raises:
        ValueError: numbers out of range.

    >>> forgets = lambda x, sigma: torch.zeros_like(x)  # the mean of all data
    >>> minority_score(forgets, torch.tensor([[0.0, 1.0], [3.0, 4.0]]), 80.0)
    tensor([1., 5.])
    """
    require.floating("clean", clean, at_least_dims=1)
    require.number("sigma", sigma, above=0.0)
    require.whole("draws", draws, at_least=1)
    dims = clean.ndim - 1 if data_dims is None else data_dims
    require.whole("data_dims", dims, at_least=1, at_most=clean.ndim)
    total: Any = 0.0
    for _ in range(draws):
        found = denoise(clean + sigma * noise(clean, generator), sigma)
        gap = (found - clean).flatten(clean.ndim - dims).norm(dim=-1) if distance is None else distance(clean, found)
        total = total + gap
    return total / draws  # type: ignore[no-any-return]


def minority_classes(scores: Float[Tensor, " samples"], *, levels: int = 100) -> Int[Tensor, " samples"]:
    """Classes of equally many samples by score, 0 for the most common, levels - 1 for the rarest; ties stay together.

    Args:
        scores: one for each training sample.
        levels: L.

    Raises:
        ValueError: fewer than two levels.

    >>> minority_classes(torch.tensor([0.1, 5.0, 0.2, 0.3]), levels=2)
    tensor([0, 1, 0, 1])
    """
    require.floating("scores", scores, dims=1)
    require.whole("levels", levels, at_least=2)
    scores = scores.double()  # quantiles of half precision are not defined
    share = torch.arange(1, levels, dtype=scores.dtype, device=scores.device) / levels
    return torch.bucketize(scores, scores.quantile(share))


class MinorityGuidance:
    """denoise(x, sigma) with the score of p(l = level | x) added `scale` times.

    One gradient of the classifier for each evaluation. With a perfect classifier and scale 1 it is the denoiser of
    the data in that class.

    Args:
        denoise: denoise(x, sigma, *conditions) -> x_0.
        classifier: classifier(x (*batch, ...), sigma) -> logits (*batch, L), for data plus noise of level sigma.
        level: class, from 0, one for all or (*batch); levels - 1 for the rarest.
        scale: w >= 0; 1 to 5 in the paper.

    Raises:
        ValueError: a scale below 0, or a level that the classifier does not have.

    >>> wide = lambda x, sigma: x / (1 + sigma**2)  # data N(0, 1)
    >>> sign = lambda x, sigma: torch.cat([-x, x], dim=-1)  # larger is rarer
    >>> MinorityGuidance(wide, sign, level=1, scale=1.0)(torch.zeros(1, 1), 2.0)  # 4 (1 - (0.5 - 0.5))
    tensor([[4.]])
    """

    def __init__(
        self, denoise: Denoise, classifier: Callable[..., Tensor], *, level: int | Tensor, scale: float = 1.0
    ) -> None:
        require.number("scale", scale, at_least=0.0)
        if isinstance(level, Tensor):
            require.integers("level", level)
        else:
            require.whole("level", level)
        self.denoise, self.classifier, self.level, self.scale = denoise, classifier, level, scale

    def __call__(self, x: Tensor, sigma: Tensor | float, *conditions: Any, **named: Any) -> Tensor:
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            log_prob = self.classifier(here, sigma).log_softmax(-1)
            if not isinstance(self.level, Tensor) and self.level >= log_prob.shape[-1]:
                raise ValueError(f"level: expected a class below {log_prob.shape[-1]}, got {self.level}")
            level = torch.as_tensor(self.level, device=x.device).expand(log_prob.shape[:-1])
            (slope,) = torch.autograd.grad(log_prob.gather(-1, level[..., None]).sum(), here)
        variance = torch.as_tensor(sigma, dtype=x.dtype, device=x.device) ** 2
        return self.denoise(x, sigma, *conditions, **named) + self.scale * over(variance, x) * slope
