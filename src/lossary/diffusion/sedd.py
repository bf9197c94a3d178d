"""SEDD: the score of tokens, ratios of probabilities between neighbouring texts, learned by score entropy.

For every place and every token the network says how much more likely the text would be with that token there. Score
entropy is the loss whose minimum these ratios are; unlike their squared error it keeps them positive, does not
starve small ones, and integrates to a bound on the negative log-likelihood. The ratios reverse the noise, jump by jump
(`euler`) or by the exact step that a perfect score allows (`analytic`, better in few steps), and any places may be
held, so infilling needs no training of its own. Take the mask (`AbsorbingGraph`) for text. With a mask the ratios are
probabilities of the clean tokens over e^sigma - 1: `order_agnostic_loss` learns the same with a softmax.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._discrete import draw
from lossary.diffusion._noise import noise
from lossary.paper import Paper

PAPER = Paper(
    title="Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution",
    year=2023,
    helps=("text-generation", "density-estimation", "inverse-problems"),
    departs=(
        "the analytic step is the default; the official code's default is Euler",
        "categories are drawn in double precision; the official code draws them in the network's precision",
        "the loss is the mean over places, not their sum; no offset by log(K) of the initial network",
    ),
    equation=(
        r"\mathcal L=\mathbb E_{t,x_t}\,\dot{\bar\sigma}(t)\sum_{i,\,y\ne x_t^i}Q(x_t^i,y)\Bigl[s_\theta(x_t,t)_{i,y}"
        r"-r\log s_\theta(x_t,t)_{i,y}+r(\log r-1)\Bigr],\qquad r=\frac{p_t(y\mid x_0^i)}{p_t(x_t^i\mid x_0^i)}"
    ),
    url="https://arxiv.org/abs/2310.16834",
)

Method = Literal["analytic", "euler"]
LogScore = Callable[[Tensor, Tensor], Tensor]
"""log_score(x (*batch, L), sigma (*batch)) -> logarithms of the ratios (*batch, L, states)."""


def log_linear_noise(t: Float[Tensor, "*batch"], *, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Total noise -log(1 - (1 - eps) t) and its rate, t from 0 to 1: a share (1 - eps) t of all tokens is hit by t.

    Raises:
        ValueError: t not floating-point, or eps not between 0 and 1.

    >>> import torch
    >>> [x.item() for x in log_linear_noise(torch.tensor(0.5), eps=0.5)]  # log(4/3) and 2/3
    [0.287682..., 0.666666...]
    """
    require.floating("t", t)
    require.number("eps", eps, above=0.0, below=1.0)
    return -torch.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)


@dataclass(frozen=True)
class AbsorbingGraph:
    """At rate 1 a token turns into the mask, state K, and stays it.

    >>> import torch
    >>> AbsorbingGraph(2).incoming(torch.tensor([0, 2]))
    tensor([[0., 0., 0.],
            [1., 1., 0.]], dtype=torch.float64)
    """

    tokens: int

    @property
    def states(self) -> int:
        return self.tokens + 1

    def prior(self) -> Tensor:
        """(states,): all masks."""
        return F.one_hot(torch.tensor(self.tokens), self.states).double()

    def noised(self, clean: Tensor, sigma: Tensor, *, generator: Generator | None = None) -> Tensor:
        """x_t of tokens (*batch, L) at total noise (*batch)."""
        chance = noise(torch.empty(clean.shape, dtype=torch.float64, device=clean.device), generator, kind=torch.rand)
        return torch.where(chance < -(-sigma[..., None]).expm1(), self.tokens, clean)

    def incoming(self, x: Tensor) -> Tensor:
        """Rate of jumps to x from each other state, (*batch, L, states)."""
        real = torch.arange(self.states, device=x.device) < self.tokens
        return ((x == self.tokens)[..., None] & real).double()

    def ratios(self, x: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        """p(y | clean) / p(x | clean) where `incoming` is not 0, else 0: (*batch, L, states)."""
        hit = (x == self.tokens)[..., None] & (F.one_hot(clean, self.states) > 0)
        return hit / sigma[..., None, None].expm1()

    def log_score(self, raw: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """What a network says (*batch, L, K) as log ratios: over e^sigma - 1, and 1 for x itself."""
        padded = F.pad(raw - sigma[..., None, None].expm1().log(), (0, 1))
        return padded.scatter(-1, x[..., None], 0.0)

    def earlier(self, score: Tensor, less: Tensor) -> Tensor:
        """exp(-less Q) score: the ratios of probabilities at total noise sigma - less to that of x at sigma."""
        grown = less[..., None, None].exp() * score[..., :-1]
        masked = score[..., -1:] - less[..., None, None].expm1() * score[..., :-1].sum(-1, keepdim=True)
        return torch.cat([grown, masked], dim=-1)

    def reached(self, x: Tensor, less: Tensor) -> Tensor:
        """P(x now | y before) over the states y that it was in at noise `less` less, (*batch, L, states)."""
        stay = (-less[..., None, None]).exp()
        return stay * F.one_hot(x, self.states) + (1 - stay) * (x == self.tokens)[..., None]


@dataclass(frozen=True)
class UniformGraph:
    """At rate 1 a token is drawn anew from all K. Methods are those of `AbsorbingGraph`.

    >>> import torch
    >>> UniformGraph(2).incoming(torch.tensor([0, 1]))
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]], dtype=torch.float64)
    """

    tokens: int

    @property
    def states(self) -> int:
        return self.tokens

    def prior(self) -> Tensor:
        return torch.full((self.tokens,), 1 / self.tokens, dtype=torch.float64)

    def noised(self, clean: Tensor, sigma: Tensor, *, generator: Generator | None = None) -> Tensor:
        chance = noise(torch.empty(clean.shape, dtype=torch.float64, device=clean.device), generator, kind=torch.rand)
        anew = noise(clean, generator, kind=partial(torch.randint, self.tokens))
        return torch.where(chance < -(-sigma[..., None]).expm1(), anew, clean)

    def incoming(self, x: Tensor) -> Tensor:
        return (1 - F.one_hot(x, self.tokens)).double() / self.tokens

    def ratios(self, x: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        chance = self.reached(clean, sigma)  # the chain is symmetric
        return chance / chance.gather(-1, x[..., None])

    def log_score(self, raw: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return raw.scatter(-1, x[..., None], 0.0)

    def earlier(self, score: Tensor, less: Tensor) -> Tensor:
        stay = (-less[..., None, None]).exp()
        return (score - (1 - stay) * score.mean(-1, keepdim=True)) / stay

    def reached(self, x: Tensor, less: Tensor) -> Tensor:
        hit = -(-less[..., None, None]).expm1()
        return (1 - hit) * F.one_hot(x, self.tokens) + hit / self.tokens


def score_entropy_loss(
    log_score: Float[Tensor, "*batch length states"],
    clean: Int[Tensor, "*batch length"],
    x: Int[Tensor, "*batch length"],
    *,
    sigma: Float[Tensor, "*batch"],
    rate: Float[Tensor, "*batch"],
    graph: AbsorbingGraph | UniformGraph,
) -> Float[Tensor, "*batch"]:
    """Denoising score entropy, rate * sum_y Q(x, y) (s_y - r_y log s_y + r_y (log r_y - 1)): nats per token.

    Never negative; 0 where the score is the ratio r given the clean token. For t uniform in 0 to 1 its mean, with the
    divergence of what is left at t = 1 from the prior, bounds -log p(clean), tightly for a perfect score.

    Args:
        log_score: logarithms of the ratios s.
        clean: x_0. x: `graph.noised(clean, sigma)`.
        sigma, rate: total noise and its rate at t, as `log_linear_noise` gives them.
        graph: how tokens jump.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> clean, x, sigma = torch.tensor([0]), torch.tensor([2]), torch.tensor(2.0).log()  # r = (1, 0), s = (1, 1)
    >>> score_entropy_loss(torch.zeros(1, 3), clean, x, sigma=sigma, rate=torch.tensor(1.0), graph=AbsorbingGraph(2))
    tensor(1.)
    """
    require.integers("clean", clean)
    require.integers("x", x, shape=tuple(clean.shape))
    require.same_shape("log_score", log_score, (*clean.shape, graph.states))
    require.same_shape("sigma", sigma, tuple(clean.shape[:-1]))
    require.same_shape("rate", rate, tuple(clean.shape[:-1]))
    ratio = graph.ratios(x, clean, sigma)
    entropy = log_score.exp() - ratio * log_score + torch.special.xlogy(ratio, ratio) - ratio
    return rate * (graph.incoming(x).to(entropy) * entropy).sum(-1).mean(-1)


class SEDDSampler:
    """Tokens from a score: sampler(log_score, x) -> x, `steps` + 1 evaluations.

    From t = 1 to `eps` in equal steps, then the rest of the noise at once, to real tokens only.

    Args:
        graph: how tokens jump.
        steps: at least 1.
        method: "analytic", exp(-d Q) score times the chance of coming from there to x; "euler", one jump at most in a
            step, at rates d Q score.
        eps: where the last step begins, between 0 and 1.

    Raises:
        ValueError: arguments out of range.

    >>> import torch
    >>> graph = AbsorbingGraph(2)
    >>> def log_score(x, sigma):  # all texts of ones
    ...     return graph.log_score(torch.tensor([-50.0, 0.0]).expand(*x.shape, 2), x, sigma)
    >>> SEDDSampler(graph, steps=4)(log_score, torch.full((1, 3), 2))
    tensor([[1, 1, 1]])
    """

    def __init__(
        self, graph: AbsorbingGraph | UniformGraph, *, steps: int, method: Method = "analytic", eps: float = 1e-5
    ) -> None:
        require.whole("steps", steps, at_least=1)
        require.one_of("method", method, get_args(Method))
        require.number("eps", eps, above=0.0, below=1.0)
        self.graph, self.method = graph, method
        self.times = torch.linspace(1, eps, steps + 1, dtype=torch.float64)

    def start(
        self, shape: tuple[int, ...], *, generator: Generator | None = None, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "*batch length"]:
        """x of the last time."""
        return draw(self.graph.prior().to(device).expand(*shape, -1), generator=generator)

    @torch.no_grad()
    def __call__(
        self,
        log_score: LogScore,
        x: Int[Tensor, "*batch length"],
        *,
        known: Bool[Tensor, "*batch length"] | None = None,
        generator: Generator | None = None,
    ) -> Int[Tensor, "*batch length"]:
        """Samples from x at the last time; places that are `known` stay as they are.

        Raises:
            ValueError: x not int64, or known not of its shape.
        """
        require.integers("x", x)
        if known is not None and known.shape != x.shape:
            raise ValueError(f"known: expected shape {tuple(x.shape)}, got {tuple(known.shape)}")
        for t, lower in zip(self.times, [*self.times[1:], None]):
            sigma, rate = (v.to(x.device).expand(x.shape[:-1]) for v in log_linear_noise(t))
            score = log_score(x, sigma).double().exp()
            if lower is None:
                chances = self._analytic(score, x, sigma)[..., : self.graph.tokens]
            elif self.method == "analytic":
                chances = self._analytic(score, x, sigma - log_linear_noise(lower)[0].to(x.device))
            else:
                jumps = (t - lower).item() * rate[..., None, None] * self.graph.incoming(x) * score
                stay = (1 - jumps.sum(-1, keepdim=True)).clamp(min=0)
                chances = jumps.scatter(-1, x[..., None], stay)
            after = draw(chances, generator=generator)
            x = after if known is None else torch.where(known, x, after)
        return x

    def _analytic(self, score: Tensor, x: Tensor, less: Tensor) -> Tensor:
        return (self.graph.earlier(score, less) * self.graph.reached(x, less)).clamp(min=0)
