"""D3PM: diffusion on categories, where the choice of transition matrix says which categories are near.

Noise is a Markov chain on each token: `uniform_transition` forgets it for a random one, `absorbing_transition` for a
mask, and `discretized_gaussian_transition` moves it to near values, which suits ordered categories such as grey
levels. The network guesses the clean token; summing the forward chain's joint over its guess gives the reverse step,
and a variational bound, plus a little cross-entropy, trains it. Take the mask for text, near values for quantised
numbers; with the mask and the rates 1/T, ..., 1/2, 1, it is masked language modelling
at all mask rates. Sampling costs one evaluation for each of the T steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._discrete import draw, rows_of, stepwise
from lossary.paper import Paper

PAPER = Paper(
    title="Structured Denoising Diffusion Models in Discrete State-Spaces",
    year=2021,
    helps=("text-generation", "density-estimation"),
    departs=(
        "the mask is an extra state; the paper's image model uses the middle grey instead",
        "no nearest-neighbour matrices in embedding space, no mutual-information schedule, no truncated logistic head:"
        " matrices and logits come from the caller",
        "the last step is drawn like the others; the official image code takes its most probable value",
        "exact zeros in the matrices; the official code adds 1e-6 inside its logarithms",
    ),
    equation=(
        r"p_\theta(x_{t-1}\mid x_t)\propto\sum_{\tilde x_0}q(x_{t-1},x_t\mid\tilde x_0)\,"
        r"\tilde p_\theta(\tilde x_0\mid x_t),\qquad q(x_t\mid x_0)=\mathrm{Cat}(x_0Q_1Q_2\cdots Q_t)"
    ),
    url="https://arxiv.org/abs/2107.03006",
)

Logits = Callable[[Tensor, Tensor], Tensor]
"""predict(x_t (*batch, L), t (*batch)) -> logits of the clean tokens (*batch, L, tokens)."""


def uniform_transition(tokens: int, rates: Float[Tensor, " steps"]) -> Float64[Tensor, "steps tokens tokens"]:
    """(1 - beta) I + beta / K 11': with chance beta a token is drawn anew.

    Args:
        tokens: K, at least 2.
        rates: beta of each step, 0 to 1; `cosine_rates` gives the paper's.

    Raises:
        ValueError: tokens below 2, or rates that are not a floating-point vector.

    >>> import torch
    >>> uniform_transition(2, torch.tensor([0.5]))
    tensor([[[0.7500, 0.2500], [0.2500, 0.7500]]], dtype=torch.float64)
    """
    beta = _rates(tokens, rates)
    return (1 - beta) * torch.eye(tokens, dtype=beta.dtype, device=beta.device) + beta / tokens


def absorbing_transition(tokens: int, rates: Float[Tensor, " steps"]) -> Float64[Tensor, "steps states states"]:
    """With chance beta a token becomes the mask, state K, which stays: `states` is K + 1.

    Args:
        tokens: K, at least 2.
        rates: beta of each step, 0 to 1; 1 / (T - t + 1) masks a share t / T at step t.

    Raises:
        ValueError: tokens below 2, or rates that are not a floating-point vector.

    >>> import torch
    >>> absorbing_transition(2, torch.tensor([0.25]))[0, 0]
    tensor([0.7500, 0.0000, 0.2500], dtype=torch.float64)
    """
    beta = _rates(tokens, rates)
    onto = F.one_hot(torch.full((tokens + 1,), tokens, device=beta.device), tokens + 1)
    return (1 - beta) * torch.eye(tokens + 1, dtype=beta.dtype, device=beta.device) + beta * onto


def discretized_gaussian_transition(
    tokens: int, rates: Float[Tensor, " steps"]
) -> Float64[Tensor, "steps tokens tokens"]:
    """To j from i != j with a chance proportional to exp(-4 (i - j)^2 / ((K - 1)^2 beta)), app. A.2.3.

    Normalised over all differences from -(K - 1) to K - 1, and what falls off the ends is added to staying: so columns
    sum to 1 as well, and the chain ends in the uniform distribution. Values are thought of as spread over -1 to 1.

    Args:
        tokens: K, at least 2, in order.
        rates: beta of each step, above 0: twice the variance of a step; the paper has 1e-4 to 0.02 in 1000 steps.

    Raises:
        ValueError: tokens below 2, or rates that are not a floating-point vector.

    >>> import torch
    >>> discretized_gaussian_transition(3, torch.tensor([1.0]))[0, 0]  # e^-1 and e^-4 over 1 + 2 (e^-1 + e^-4)
    tensor([0.7821, 0.2076, 0.0103], dtype=torch.float64)
    """
    beta = _rates(tokens, rates)
    place = torch.arange(tokens, device=beta.device)
    gap = (place[:, None] - place).double()
    every = torch.arange(1 - tokens, tokens, device=beta.device).double()
    scale = 4 / ((tokens - 1) ** 2 * beta)
    moved = (-scale * gap**2).exp() / (-scale * every**2).exp().sum(-1, keepdim=True)
    moved = moved - moved.diagonal(dim1=-2, dim2=-1).diag_embed()
    return moved + (1 - moved.sum(-1)).diag_embed()


def cosine_rates(steps: int) -> Float64[Tensor, " steps"]:
    """beta_t = 1 - f(t) / f(t - 1) with f(t) = cos(pi/2 (t/T + 0.008) / 1.008), at most 0.999: for the uniform chain.

    Args:
        steps: T, at least 1.

    Raises:
        ValueError: steps below 1.

    >>> cosine_rates(2)
    tensor([0.2973, 0.9990], dtype=torch.float64)
    """
    require.whole("steps", steps, at_least=1)
    kept = (torch.pi / 2 * (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008).cos()
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)


class D3PM:
    """The model of a chain's matrices: noise, loss, bound and samples of a network that guesses clean tokens.

    Any leading dimensions stand for `*batch`; times are whole numbers 1 to T. All sums are in double precision.

    Args:
        tokens: K, at least 2.
        transitions: (T, states, states), rows sum to 1; states is K, or K + 1 with a mask last.
        hybrid: lambda, the factor of the cross-entropy; the paper has 0.001 for images and 0.01 for text.

    Raises:
        ValueError: shapes that do not fit, rows that are no probabilities, or a negative factor.

    >>> import torch
    >>> model = D3PM(2, absorbing_transition(2, torch.tensor([0.5, 1.0])), hybrid=0.0)
    >>> clean, masked, t = torch.tensor([[1]]), torch.tensor([[2]]), torch.tensor([2])
    >>> model.loss(torch.zeros(1, 1, 2), clean, masked, t)  # half of the masks go: 1/2 log 2
    tensor([0.3466], dtype=torch.float64)
    """

    def __init__(self, tokens: int, transitions: Tensor, *, hybrid: float = 0.001) -> None:
        require.whole("tokens", tokens, at_least=2)
        require.floating("transitions", transitions, dims=3)
        require.number("hybrid", hybrid, at_least=0.0)
        if not bool((transitions >= 0).all() and ((transitions.sum(-1) - 1).abs() < 1e-4).all()):
            raise ValueError("transitions: expected probabilities that sum to 1 in each row")
        self.process, self.hybrid = stepwise(tokens, transitions), hybrid
        self.steps = len(transitions)

    def noised(
        self, clean: Int[Tensor, "*batch length"], t: Int[Tensor, "*batch"], *, generator: Generator | None = None
    ) -> Int[Tensor, "*batch length"]:
        """x_t of clean tokens."""
        self._check(clean, t)
        return self.process.noised(clean, t, generator=generator)

    def reverse(
        self, logits: Float[Tensor, "*batch length tokens"], x: Int[Tensor, "*batch length"], t: Int[Tensor, "*batch"]
    ) -> Float64[Tensor, "*batch length states"]:
        """p(x_{t-1} | x_t), eq. 4: proportional to sum_v q(x_{t-1}, x_t | x_0 = v) softmax(logits)_v.

        At t = 1 it is the guess itself. Before, the joint and not the posterior is summed: a guess that is
        p(x_0 | x_t) already holds the evidence of x_t at its own place and would count it twice (a mask is none).
        The perfect guess is the one from all other places.
        """
        guess = logits.double().softmax(-1)
        before = (t - 1).double()
        onward = rows_of(self.process.between(before, t.double()).mT, x)
        first = (t == 1)[..., None, None]
        joint = (guess @ self.process.cumulative(before)[..., : self.process.tokens, :]) * torch.where(first, 1, onward)
        return joint / joint.sum(-1, keepdim=True)

    def loss(
        self,
        logits: Float[Tensor, "*batch length tokens"],
        clean: Int[Tensor, "*batch length"],
        x: Int[Tensor, "*batch length"],
        t: Int[Tensor, "*batch"],
    ) -> Float64[Tensor, "*batch"]:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) + hybrid * cross-entropy, eq. 5: nats per token.

        Args:
            logits: of the clean tokens, from x and t.
            clean: x_0. x: x_t. t: 1 to T.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        self._check(clean, t)
        require.integers("x", x, shape=tuple(clean.shape))
        require.same_shape("logits", logits, (*clean.shape, self.process.tokens))
        cross = F.cross_entropy(logits.double().flatten(0, -2), clean.flatten(), reduction="none").view(clean.shape)
        return (self._divergence(logits, clean, x, t) + self.hybrid * cross).mean(-1)

    @torch.no_grad()
    def bound(
        self, predict: Logits, clean: Int[Tensor, "*batch length"], *, generator: Generator | None = None
    ) -> Float64[Tensor, "*batch"]:
        """An estimate of the bound on -log p(x_0), nats per token: T evaluations, one noised x_t for each step."""
        last = torch.full(clean.shape[:-1], self.steps, device=clean.device)
        self._check(clean, last)
        reached = rows_of(self.process.cumulative(last.double()), clean)
        total = _divergence(reached, self.process.prior.to(reached)).mean(-1)
        for step in range(1, self.steps + 1):
            t = torch.full_like(last, step)
            x = self.process.noised(clean, t, generator=generator)
            total = total + self._divergence(predict(x, t), clean, x, t).mean(-1)
        return total

    @torch.no_grad()
    def sample(
        self,
        predict: Logits,
        shape: tuple[int, ...],
        *,
        generator: Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "*batch length"]:
        """Tokens of shape (*batch, L), from x_T down: T evaluations."""
        x = draw(self.process.prior.to(device).expand(*shape, -1), generator=generator)
        for step in range(self.steps, 0, -1):
            t = torch.full(shape[:-1], step, device=x.device)
            x = draw(self.reverse(predict(x, t), x, t), generator=generator)
        return x

    def _divergence(self, logits: Tensor, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
        known = F.one_hot(clean, self.process.tokens)
        return _divergence(self.process.posterior(x, known, t - 1, t), self.reverse(logits, x, t))

    def _check(self, clean: Tensor, t: Tensor) -> None:
        require.integers("clean", clean)
        require.integers("t", t, shape=tuple(clean.shape[:-1]))


def _divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) over the last dimension."""
    return (torch.special.xlogy(q, q) - q * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def _rates(tokens: int, rates: Tensor) -> Tensor:
    require.whole("tokens", tokens, at_least=2)
    require.floating("rates", rates, dims=1)
    return rates.double()[:, None, None]
