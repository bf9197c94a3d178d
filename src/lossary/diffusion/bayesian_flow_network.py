"""Bayesian flow networks: the network sees what Bayes' rule makes of noisy messages, not noised data.

A sender transmits each number or token by itself through noise that lets up; the receiver updates a belief about each
one exactly, and the network, seeing all beliefs, guesses the data jointly. Training minimises the bits that the
messages cost. For tokens the beliefs are probabilities, so that the network's input is continuous from pure ignorance
to certainty and no token is ever wrong for good: an alternative to masks for small alphabets. For numbers it is a
Gaussian diffusion under another name: the same denoiser, loss and ancestral sampler, with the schedule
sigma^2 = s^{2t} / (1 - s^{2t}).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._denoiser import Denoise, denoising_error
from lossary.diffusion._discrete import draw
from lossary.diffusion._noise import noise
from lossary.diffusion._process import Process, over
from lossary.diffusion._samplers import ancestral
from lossary.paper import Paper

PAPER = Paper(
    title="Bayesian Flow Networks",
    year=2023,
    helps=("text-generation", "density-estimation"),
    departs=(
        "no discretised outputs for numbers in bins",
        "the first guess, before any message, is 0 as in the paper, and costs no evaluation",
        "the last tokens are drawn, as in the paper; the official code takes the most probable ones",
        "two classes are not special: the network always sees K probabilities",
    ),
    equation=(
        r"\theta_i\propto e^{y_i}\,\theta_{i-1},\quad y_i\sim\mathcal N\bigl(\alpha_i(Ke_x-1),\alpha_iKI\bigr);\qquad "
        r"L_\infty=K\beta_1\,\mathbb E_t\bigl[t\,\lVert e_x-\hat e(\theta,t)\rVert^2\bigr]"
    ),
    url="https://arxiv.org/abs/2308.07037",
)

Guess = Callable[[Tensor, Tensor], Tensor]
"""predict(beliefs (*batch, L, K), t (*batch)) -> logits of the tokens (*batch, L, K)."""


class ContinuousBFN:
    """Flow of beliefs about numbers: mean mu ~ N(gamma x, gamma (1 - gamma)), gamma = 1 - s^{2t}, t from 0 to 1.

    `process` is that flow, so `Denoiser(network, bfn.process, "noise")` is the paper's network, which sees mu and t.

    Args:
        sigma: s, the standard deviation that is left at t = 1, between 0 and 1.

    Raises:
        ValueError: sigma out of range.

    >>> import torch
    >>> ContinuousBFN(0.1).process.alpha(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.9000, 0.9900])
    """

    def __init__(self, sigma: float = 0.001) -> None:
        require.number("sigma", sigma, above=0.0, below=1.0)
        self.rate = rate = -math.log(sigma)
        self.process = Process(
            lambda t: -(-2 * rate * t).expm1(),
            lambda t: (-(-2 * rate * t).expm1()).sqrt() * (-rate * t).exp(),
            lambda ratio: ratio.square().reciprocal().log1p() / (2 * rate),
        )

    def loss(
        self,
        denoise: Denoise,
        clean: Float[Tensor, "*batch_and_data"],
        sigma: Float[Tensor, "*batch"],
        noise: Float[Tensor, "*batch_and_data"],
        *conditions: Tensor,
    ) -> Float[Tensor, "*batch"]:
        """-ln s s^{-2t} (x - x_hat)^2: nats per number, the mean over t from 0 to 1 being the cost.

        Args:
            denoise: denoise(x, sigma, *conditions) -> x_0.
            clean: x. noise: of its shape, standard normal.
            sigma: `process.ratio(t)` of times drawn uniformly.
        """
        return self.rate * (1 + sigma**-2) * denoising_error(denoise, clean, sigma, noise, *conditions)

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        shape: tuple[int, ...],
        *,
        steps: int,
        generator: Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "*batch_and_data"]:
        """Beliefs after `steps` messages about the network's own guesses; `steps` evaluations.

        Raises:
            ValueError: steps below 1.
        """
        require.whole("steps", steps, at_least=1)
        sigmas = torch.cat([self.process.ratio(torch.arange(1, steps + 1).double() / steps), torch.zeros(1)])
        first = sigmas[0].item() * noise(torch.empty(shape, device=device), generator)  # message, about a guess of 0
        return ancestral(denoise, first, sigmas, generator=generator)


class DiscreteBFN:
    """Flow of beliefs about tokens: theta = softmax(y), y ~ N(beta (K e_x - 1), beta K I), beta = beta_1 t^2.

    Args:
        tokens: K, at least 2.
        accuracy: beta_1 > 0; the paper has 3 for K = 2 and 0.75 for K = 27.

    Raises:
        ValueError: arguments out of range.

    >>> import torch
    >>> bfn = DiscreteBFN(4, accuracy=2.0)
    >>> bfn.loss(torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([0.5]))  # 4 * 2 * 0.5 (9 + 1 + 1 + 1) / 16
    tensor([3.])
    """

    def __init__(self, tokens: int, *, accuracy: float = 0.75) -> None:
        require.whole("tokens", tokens, at_least=2)
        require.number("accuracy", accuracy, above=0.0)
        self.tokens, self.accuracy = tokens, accuracy

    def beliefs(
        self, clean: Int[Tensor, "*batch length"], t: Float[Tensor, "*batch"], *, generator: Generator | None = None
    ) -> Float[Tensor, "*batch length tokens"]:
        """theta after messages up to time t, 0 to 1, of the dtype of t."""
        self._check(clean, t)
        return self._message(clean, self.accuracy * t**2, generator).softmax(-1)

    def loss(
        self,
        logits: Float[Tensor, "*batch length tokens"],
        clean: Int[Tensor, "*batch length"],
        t: Float[Tensor, "*batch"],
    ) -> Float[Tensor, "*batch"]:
        """K beta_1 t |e_x - softmax(logits)|^2: nats per token, for t uniform from 0 to 1.

        Args:
            logits: of the tokens, from `beliefs(clean, t)` and t.
            clean: the tokens.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        self._check(clean, t)
        require.same_shape("logits", logits, (*clean.shape, self.tokens))
        miss = (F.one_hot(clean, self.tokens) - logits.softmax(-1)).square().sum(-1)
        return self.tokens * self.accuracy * t * miss.mean(-1)

    @torch.no_grad()
    def step_loss(
        self,
        predict: Guess,
        clean: Int[Tensor, "*batch length"],
        step: Int[Tensor, "*batch"],
        *,
        steps: int,
        generator: Generator | None = None,
    ) -> Float64[Tensor, "*batch"]:
        """n KL(sender || receiver) of message `step`, 1 to n, by one message: nats per token.

        Averaged over steps, and with `final_loss` added, it bounds -log p from above. The receiver expects the messages
        of all tokens, weighted by the network's guess.
        """
        t = (step - 1).double() / steps
        guess = predict(self.beliefs(clean, t, generator=generator), t).double().log_softmax(-1)
        alpha = self.accuracy * (2 * step - 1).double() / steps**2
        message = self._message(clean, alpha, generator)
        own = message.gather(-1, clean[..., None])[..., 0]  # log N(y; token v) is y_v + what is the same for all v
        return steps * (own - (guess + message).logsumexp(-1)).mean(-1)

    @torch.no_grad()
    def final_loss(
        self, predict: Guess, clean: Int[Tensor, "*batch length"], *, generator: Generator | None = None
    ) -> Float64[Tensor, "*batch"]:
        """-log of the guess after the last message: nats per token."""
        t = torch.ones(clean.shape[:-1], dtype=torch.float64, device=clean.device)
        guess = predict(self.beliefs(clean, t, generator=generator), t).double().log_softmax(-1)
        return -guess.gather(-1, clean[..., None])[..., 0].mean(-1)

    @torch.no_grad()
    def sample(
        self,
        predict: Guess,
        shape: tuple[int, ...],
        *,
        steps: int,
        generator: Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "*batch length"]:
        """Tokens of shape (*batch, L), after messages about the network's own guesses: `steps` + 1 evaluations.

        Raises:
            ValueError: steps below 1.
        """
        require.whole("steps", steps, at_least=1)
        total = torch.zeros(*shape, self.tokens, dtype=torch.float64, device=device)
        for i in range(steps + 1):
            t = torch.full(shape[:-1], i / steps, dtype=total.dtype, device=device)
            tokens = draw(predict(total.softmax(-1), t).double().softmax(-1), generator=generator)
            alpha = torch.full_like(t, self.accuracy * (2 * i + 1) / steps**2)
            total = total + self._message(tokens, alpha, generator)
        return tokens

    def _message(self, tokens: Tensor, alpha: Tensor, generator: Generator | None) -> Tensor:
        around = noise(alpha.new_empty(*tokens.shape, self.tokens), generator)
        centre = self.tokens * F.one_hot(tokens, self.tokens) - 1
        return over(alpha, around) * centre + over((self.tokens * alpha).sqrt(), around) * around

    def _check(self, clean: Tensor, t: Tensor) -> None:
        require.integers("clean", clean)
        require.same_shape("t", t, tuple(clean.shape[:-1]))
