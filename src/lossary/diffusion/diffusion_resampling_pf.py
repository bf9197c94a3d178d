"""Diffusion resampling: several samples are drawn together, and at times the unlikely ones are replaced by others.

A model's samples are not quite the data's: some modes come too often, some objects are forgotten. Where the ratio of
both densities can be estimated, by a discriminator on noised data or an object detector, particles drawn together are
resampled by it at a few noise levels, then noised a little so that copies part again: a particle filter, exact as the
number of particles grows. No gradients and no training of the model; a filter needs something to choose from, so that
modes the model never draws stay away, and samples of one group are not independent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._discrete import multinomial
from lossary.diffusion._noise import noise
from lossary.diffusion._samplers import heun
from lossary.paper import Paper

PAPER = Paper(
    title="Correcting Diffusion Generation through Resampling",
    year=2024,
    helps=("rare-modes", "guidance"),
    departs=(
        "the EDM sampler of the paper's two; no Restart",
        "the best particle is chosen at the lowest level above 0, where the official code has one of its own",
        "churn outside resampling steps has no range of noise levels and no inflated noise",
    ),
    equation=(
        r"w^{(i)}\propto\frac{\phi_t(x_t^{(i)})}{\phi_{t'}(x_{t'}^{(i)})},\qquad \phi_t=\frac{d}{1-d}"
        r"\prod_o\frac{p_o}{p_o+(1-p_o)\,r_o}\approx\frac{q_t}{p_t}"
    ),
    url="https://github.com/UCSB-NLP-Chang/diffusion_resampling",
)

_CLIP = math.log((1 - 1e-6) / 1e-6)


def discriminator_log_ratio(logits: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """log d / (1 - d) of a discriminator with d = sigmoid(logits) that a sample is real, d within 1e-6 of 0 and 1.

    Raises:
        ValueError: not a floating-point tensor.

    >>> discriminator_log_ratio(torch.tensor([0.5, 100.0]))
    tensor([ 0.5000, 13.8155])
    """
    require.floating("logits", logits)
    return logits.clamp(-_CLIP, _CLIP)


def object_log_ratio(
    log_prob: Float[Tensor, "*batch objects"], *, detected: Float[Tensor, "*objects"], prior: float = 0.2
) -> Float[Tensor, "*batch"]:
    """sum over objects of log p / (p + (1 - p) r): how much likelier these are among real pictures.

    r = h (1 - prior) / (prior + h (1 - prior)) is the chance that a generated picture without the object had a caption
    that asked for it, h = 1 - detected.

    Args:
        log_prob: log p that each object of the prompt is seen, <= 0; best on the denoised prediction. An object that
            is never forgotten counts 0, whatever p.
        detected: share of generated samples that show each object, at this noise level.
        prior: chance that a prompt's picture goes without the object, 0 to 1.

    Raises:
        ValueError: shapes that do not fit, or a prior out of range.

    >>> object_log_ratio(torch.tensor([[0.5]]).log(), detected=torch.tensor([0.75])).exp()  # r = 0.2 / 0.4
    tensor([0.6667])
    """
    require.floating("log_prob", log_prob, at_least_dims=1)
    require.same_shape("detected", detected, tuple(log_prob.shape[-1:]))
    require.number("prior", prior, above=0.0, below=1.0)
    forgotten = (1 - detected) * (1 - prior)
    share = forgotten / (prior + forgotten)
    excess = share.log() + torch.log1p(-log_prob.exp()) - log_prob  # log of (1 - p) r / p
    return torch.where(share > 0, -F.softplus(excess), 0.0).sum(-1)


def multinomial_resample(
    log_weights: Float[Tensor, "*groups particles"], *, generator: Generator | None = None
) -> Int[Tensor, "*groups particles"]:
    """Numbers of the particles that go on, drawn with replacement within each group, by weights of any sum.

    A group whose weights are all 0 stays as it is.

    Args:
        log_weights: -inf for a weight of 0; not all of a group NaN.

    Raises:
        ValueError: not a floating-point tensor with at least one dimension.

    >>> multinomial_resample(torch.tensor([[0.0, -torch.inf, -torch.inf], [-torch.inf] * 3]))
    tensor([[0, 0, 0],
            [0, 1, 2]])
    """
    require.floating("log_weights", log_weights, at_least_dims=1)
    n = log_weights.shape[-1]
    flat = log_weights.double().reshape(-1, n)
    dead = (flat == -torch.inf).all(-1, keepdim=True)
    chosen = multinomial(flat.masked_fill(dead, 0.0).softmax(-1), n, generator=generator)
    stay = torch.arange(n, device=flat.device)
    return torch.where(dead, stay, chosen).view(log_weights.shape)


@dataclass(frozen=True)
class ParticleFilterSampler:
    """s(denoise, x, sigmas, *, generator): Heun's method with resampling, evaluations as many as `heun`.

    Consecutive samples along the last batch dimension form groups. At each chosen step a group is resampled by its
    potential over that of each particle's ancestor at the step before, and noised up by sqrt(2). A potential of -inf
    is a weight of 0; a group in which all are stays as it is, and its ancestors do not count at the next step.

    Args:
        log_potential: log phi(x (*batch, *data), sigma, a number) -> (*batch), an estimate of log q / p of the
            data's density over the model's at that noise level, up to a constant.
        particles: N >= 1 in a group.
        at: numbers of the steps, from 0, before which to resample; 15, 19, 23 and 27 of 32 in the paper.
        churn: by how much, relatively, noise is raised at the other steps.
        keep_best: return of each group only the particle of the largest potential, instead of all.
        data_dims: how many trailing dimensions make one sample; None is all but the first.

    Raises:
        ValueError: numbers out of range, steps that the levels do not have, a batch that does not divide into groups,
            or potentials of another shape than the batch.

    >>> sampler = ParticleFilterSampler(lambda x, sigma: x[..., 0], particles=2, at=(0,), keep_best=True)
    >>> sampler(lambda x, sigma: x, torch.randn(6, 3), torch.tensor([1.0, 0.5])).shape
    torch.Size([3, 3])
    """

    log_potential: Callable[[Tensor, float], Tensor]
    particles: int
    at: Sequence[int]
    churn: float = 0.0
    keep_best: bool = False
    data_dims: int | None = None

    def __post_init__(self) -> None:
        require.whole("particles", self.particles, at_least=1)
        require.number("churn", self.churn, at_least=0.0)
        for step in self.at:
            require.whole("at", step)

    def __call__(
        self, denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None
    ) -> Float[Tensor, "*batch_and_data"]:
        require.floating("x", x, at_least_dims=2)
        dims = x.ndim - 1 if self.data_dims is None else self.data_dims
        require.whole("data_dims", dims, at_least=1, at_most=x.ndim - 1)
        shape = x.shape[:-dims]
        if shape[-1] % self.particles:
            raise ValueError(f"x: expected a batch in groups of {self.particles}, got shape {tuple(x.shape)}")
        steps = len(sigmas) - 1
        if any(step >= steps for step in self.at):
            raise ValueError(f"at: expected steps from 0 to {steps - 1}, got {list(self.at)}")
        before: Tensor | float = 0.0
        for step, (sigma, lower) in enumerate(zip(sigmas.tolist(), sigmas[1:].tolist())):
            raised = sigma * (1 + self.churn)
            if step in self.at:
                potential = self._potential(x, sigma, dims)
                index = multinomial_resample(potential - before, generator=generator)
                x, before = self._chosen(x, index, dims).view(x.shape), potential.gather(-1, index)
                before = torch.where(before == -torch.inf, 0.0, before)
                raised = sigma * math.sqrt(2)
            if raised > sigma:
                x = x + math.sqrt(raised**2 - sigma**2) * noise(x, generator)
            x = heun(denoise, x, torch.tensor([raised, lower], dtype=torch.float64))
        if not self.keep_best:
            return x
        best = self._potential(x, sigmas[sigmas > 0][-1].item(), dims).argmax(-1, keepdim=True)
        return self._chosen(x, best, dims).view(*shape[:-1], shape[-1] // self.particles, *x.shape[-dims:])

    def _potential(self, x: Tensor, sigma: float, dims: int) -> Float[Tensor, "groups particles"]:
        found = self.log_potential(x, sigma)
        require.same_shape("log_potential", found, tuple(x.shape[:-dims]))
        return found.reshape(-1, self.particles)

    def _chosen(self, x: Tensor, index: Int[Tensor, "groups kept"], dims: int) -> Tensor:
        grouped = x.reshape(len(index), self.particles, -1)
        return grouped.gather(1, index[..., None].expand(*index.shape, grouped.shape[-1]))
