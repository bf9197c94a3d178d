"""Ctrl-U: trust a reward less where two looks at what is nearly the same picture disagree.

To make a conditional generator keep to its condition, a frozen model reads the condition off its one-step estimates
of the clean data and is held against what was asked for. Such a model errs on pictures that it has not met. Two
estimates from two noise levels are therefore read; where the readings differ the reward counts less, by exp(-U), and
the difference U itself is charged, so that readings become consistent. For reward models that are good but not
certain; where the reward is exact it only weakens it.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward Modeling",
    year=2025,
    helps=("guidance", "uncertainty"),
    departs=(
        "U is KL(second || first) and the reward that of the first reading, as in the official code, which finds it as"
        " good as the paper's form with both",
        "the weight of U is relative to the reward's: 10 times 0.1 is the official code's 1",
        "the warm-up of the reward's weight is the caller's; no background class but -1",
        "the claims tune small stacked networks on vectors with a class as the condition: no ControlNet, no pictures",
    ),
    equation=(
        r"\mathcal L=\lVert\epsilon-\epsilon_\theta\rVert^2+\mu\,\mathbb 1[t\le\tau]\,"
        r"\bigl(e^{-U}\,\mathcal L_c(R(\hat x_0(t_1)),c)+\lambda U\bigr),\qquad"
        r" U=\mathrm{KL}\bigl(R(\hat x_0(t_2))\,\Vert\,R(\hat x_0(t_1))\bigr)"
    ),
    url="https://arxiv.org/abs/2410.11236",
)

Reading = Literal["classes", "real"]


def reading_disagreement(
    first: Float[Tensor, "*batch"], second: Float[Tensor, "*batch"], *, on: Reading = "classes"
) -> Tensor:
    """U: KL(second || first) of class probabilities in nats, or |first - second| of numbers.

    A class that the second reading rules out counts 0; U is infinite where the first rules out one that it does not.

    Args:
        first, second: what the reward model reads off two estimates: logits, classes last, or numbers. A logit may be
            -inf.
        on: which of these; "classes" drops the last dimension.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> reading_disagreement(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 50.0]))  # log 2
    tensor(0.6931)
    """
    require.one_of("on", on, get_args(Reading))
    require.floating("first", first, at_least_dims=int(on == "classes"))
    require.same_shape("second", second, tuple(first.shape))
    if on == "real":
        return (first - second).abs()
    log_q = second.log_softmax(-1)
    q = log_q.exp()
    gap = (log_q - first.log_softmax(-1)).masked_fill(q == 0, 0.0)  # -inf - -inf is not a number
    return (q * gap).sum(-1)


def uncertainty_aware_reward_loss(
    input: Tensor,
    target: Tensor,
    *,
    other: Tensor,
    on: Reading = "classes",
    penalty: float = 10.0,
    trust: float = 1.0,
) -> Tensor:
    """exp(-U) L + penalty U for every element, L the cross-entropy or squared error of the first reading.

    Were U free to choose, it would be log(L / penalty) where that is above 0, and large L would count by their
    logarithm, as with a learnt variance. Gradients go through U as well: consistent readings are part of the aim.

    Args:
        input: first reading: logits (*batch, classes) or numbers (*batch).
        target: the condition: classes (*batch), -1 where there is none, or numbers (*batch).
        other: second reading, of the shape of `input`.
        on: "classes" or "real".
        penalty: lambda, >= 0.
        trust: factor of U, >= 0; the number 0 is the plain reward, also where U is infinite.

    Returns:
        (*batch); 0 where the target is -1. Where U is infinite the reward counts nothing, however large L is: the value
        is infinite, or 0 where the penalty is the number 0.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.

    >>> first, second = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 50.0]])  # L = U = log 2
    >>> uncertainty_aware_reward_loss(first, torch.tensor([0]), other=second, penalty=1.0)
    tensor([1.0397])
    """
    require.number("penalty", penalty, at_least=0.0)
    require.number("trust", trust, at_least=0.0)
    uncertainty = _times(trust, reading_disagreement(input, other, on=on))
    sure = uncertainty != math.inf
    if on == "classes":
        require.classes(input, target)
        flat = F.cross_entropy(input.flatten(0, -2), target.flatten(), reduction="none", ignore_index=-1)
        values = (-uncertainty).exp() * flat.view(target.shape).where(sure, 0.0) + _times(penalty, uncertainty)
        return values.where(target >= 0, 0.0)
    require.same_shape("target", target, tuple(input.shape))
    return (-uncertainty).exp() * (input - target).square().where(sure, 0.0) + _times(penalty, uncertainty)


def _times(factor: float, values: Tensor) -> Tensor:
    """The product, where the number 0 times infinity is 0."""
    return torch.zeros_like(values) if not isinstance(factor, Tensor) and factor == 0 else factor * values


class CtrlULoss(nn.Module):
    """The error of the noise at two levels and, below a level, the uncertainty-aware reward: a value per sample.

    Args:
        reward: frozen; estimates of clean data (*replicas, batch, ...) to logits, classes last, or numbers.
        threshold: largest sigma at which the reward counts; 400 of 1000 steps of Stable Diffusion is 1.2. The first
            level decides alone: a second estimate from above it is read all the same.
        on: see `uncertainty_aware_reward_loss`.
        weight: mu, of reward and uncertainty.
        penalty, trust: see there.

    Raises:
        ValueError: a number out of range.

    >>> x, low, high = torch.zeros(3, 2), torch.full((3,), 0.1), torch.full((3,), 0.2)
    >>> loss = CtrlULoss(lambda x: x, threshold=1.0, weight=0.5)
    >>> loss(lambda x, sigma: x, x, torch.tensor([0, 1, 1]), low, high, torch.ones(3, 2))  # 1 + 0.5 log 2
    tensor([1.3466, 1.3466, 1.3466])
    """

    def __init__(
        self,
        reward: Callable[[Tensor], Tensor],
        *,
        threshold: float,
        on: Reading = "classes",
        weight: float = 0.1,
        penalty: float = 10.0,
        trust: float = 1.0,
    ) -> None:
        super().__init__()
        require.one_of("on", on, get_args(Reading))
        for name, value in (("threshold", threshold), ("weight", weight), ("penalty", penalty), ("trust", trust)):
            require.number(name, value, at_least=0.0)
        self.reward, self.threshold, self.on, self.weight = reward, threshold, on, weight
        self.penalty, self.trust = penalty, trust

    def forward(
        self,
        denoise: Denoise,
        clean: Float[Tensor, "*batch_and_data"],
        target: Tensor,
        sigma: Float[Tensor, "*replicas batch"],
        other: Float[Tensor, "*replicas batch"],
        noise: Tensor,
        *conditions: Any,
    ) -> Float[Tensor, "*replicas batch"]:
        """Its mean over the batch is the mean error plus the mean reward loss of the samples that the reward is for.

        Args:
            denoise: denoise(x, sigma, *conditions), the network that is tuned.
            clean: data, (*replicas, batch, ...).
            target: the condition as the reward model reads it, (*replicas, batch, ...).
            sigma, other: noise levels of the first and the second estimate, above 0; the official code takes the
                next of a thousand steps as the other.
            noise: standard normal, the same for both.
            conditions: for the network.

        Raises:
            ValueError: shapes that do not fit.
        """
        require.floating("sigma", sigma, at_least_dims=1)
        require.same_shape("other", other, tuple(sigma.shape))
        require.same_shape("clean", clean, (*sigma.shape, *clean.shape[sigma.ndim :]))
        require.same_shape("noise", noise, tuple(clean.shape))
        dims, errors, readings = sigma.ndim, [], []
        counts = sigma <= self.threshold  # elsewhere nothing that the reward says, infinite or not, may get through
        for level in (sigma, other):
            found = denoise(clean + over(level, clean) * noise, level, *conditions)
            errors.append((found - clean).square().flatten(dims).mean(-1) / level.square())
            reading = self.reward(found.where(over(counts, found), clean))
            readings.append(reading.where(over(counts, reading), 0.0))
        values = uncertainty_aware_reward_loss(
            readings[0], target, other=readings[1], on=self.on, penalty=self.penalty, trust=self.trust
        )
        if values.ndim > dims:  # over the elements that have a condition
            known = (target >= 0).to(values) if self.on == "classes" else torch.ones_like(values)
            values = values.flatten(dims).sum(-1) / known.flatten(dims).sum(-1).clamp(min=1)
        part = counts.to(values)
        share = part / part.mean(-1, keepdim=True).clamp(min=1 / part.shape[-1])
        return (errors[0] + errors[1]) / 2 + self.weight * share * values
