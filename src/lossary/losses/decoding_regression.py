"""Decoding-based regression: write the target in digits and learn to spell it, one digit after another.

A small causal Transformer, started on the features, is trained by plain cross-entropy on each next digit. Its digit
probabilities multiply to those of the leaves of a tree over numbers, a density of any shape, several peaks included,
that costs digits times base outputs where a histogram as fine would cost base to the power of digits. Take it where a
target's distribution is multimodal, skewed or spreads by orders of magnitude (the float scheme), or where a model of
tokens is what there is. With few rows use few digits: each further bit halves the bias and doubles the variance. If
one smooth number is all you want, least squares is simpler.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Decoding-based Regression",
    year=2025,
    helps=("uncertainty", "heavy-tails"),
    departs=(
        "tokens that cannot stand at a place are masked in training too, not in decoding alone",
        "a number too large for the float scheme becomes the largest one; the official code raises",
        "exact powers of the base get their own exponent; the official logarithm turns 1000 into 100",
        "no top-k, top-p, repetition of tokens or weights on their places",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=-\sum_{k=1}^{K}\log p_\theta(t_k\mid t_1,\dots,t_{k-1},x), "
        r"\qquad t_k=\lfloor y\,B^k\rfloor\bmod B,\quad 0\le y<1\\ "
        r"&\text{density at }y\text{: }\ B^K e^{-\ell}\qquad(K\text{ digits to base }B) "
        r"\end{aligned}"
    ),
    url="https://openreview.net/forum?id=avUQ8jguxg",
)

_NUDGE = 1 + 2.0**-50  # so that a number made of digits gets them back in spite of rounding


def digit_tokenize(
    y: Float[Tensor, "*batch"], *, base: int = 10, digits: int = 4, exponent_digits: int | None = None
) -> Int[Tensor, "*batch length"]:
    """Numbers as tokens: 0 to base - 1 are digits, base is a plus and base + 1 a minus. Cut off, never rounded.

    Without `exponent_digits` numbers lie between 0 and 1, and token k = 1, ..., digits is floor(y base^k) mod base.
    With them there are sign, sign of the exponent, its digits and the leading `digits` of the number, as in
    -123.4 = - + 2 1 2 3 4 with one digit of exponent. Numbers outside become the nearest that can be written; towards
    zero that is 0.

    Args:
        y: numbers.
        base: of the digits, at least 2.
        digits: of the fraction, or with an exponent of the mantissa; base^digits must stay below 2^52.
        exponent_digits: None for numbers from 0 to 1.

    Raises:
        ValueError: not a floating-point tensor, a hyper-parameter out of range.

    >>> import torch
    >>> digit_tokenize(torch.tensor([0.625, 1.0]), base=2, digits=3)
    tensor([[1, 0, 1],
            [1, 1, 1]])
    >>> digit_tokenize(torch.tensor([-123.4]), base=10, digits=4, exponent_digits=1)
    tensor([[11, 10,  2,  1,  2,  3,  4]])
    """
    require.floating("y", y)
    _check(base, digits, exponent_digits)
    y = y.detach().double()
    if exponent_digits is None:
        return _digits((y * base**digits * _NUDGE).floor().clamp(0, base**digits - 1), base, digits)
    most = base**exponent_digits - 1
    powers = _power(base, torch.arange(-most, most + 1, device=y.device))
    size = y.abs() * _NUDGE
    place = torch.searchsorted(powers, size, right=True) - 1
    exponent = (place - most).masked_fill(place < 0, 0)
    mantissa = (size / _power(base, exponent - digits + 1)).floor().clamp(0, base**digits - 1).masked_fill(place < 0, 0)
    signs = torch.stack([y < 0, (place < most) & (size > 0)], -1).long() + base
    return torch.cat([signs, _digits(exponent.abs(), base, exponent_digits), _digits(mantissa, base, digits)], -1)


def digit_detokenize(
    tokens: Int[Tensor, "*batch length"], *, base: int = 10, exponent_digits: int | None = None
) -> Float[Tensor, "*batch"]:
    """The number written by `digit_tokenize`, in double precision: of all with these tokens the nearest to zero.

    Args:
        tokens: as `digit_tokenize` gives them.
        base: of the digits, at least 2.
        exponent_digits: None for numbers from 0 to 1.

    Raises:
        ValueError: not an int64 tensor, too few tokens, a hyper-parameter out of range.

    >>> import torch
    >>> digit_detokenize(torch.tensor([[1, 0, 1], [1, 1, 1]]), base=2)
    tensor([0.6250, 0.8750], dtype=torch.float64)
    """
    require.integers("tokens", tokens)
    least = 1 if exponent_digits is None else exponent_digits + 3
    if tokens.ndim == 0 or tokens.shape[-1] < least:
        raise ValueError(f"tokens: expected at least {least} in the last dimension, got shape {tuple(tokens.shape)}")
    _check(base, tokens.shape[-1] - least + 1, exponent_digits)
    if exponent_digits is None:
        return _number(tokens, base) / float(base) ** tokens.shape[-1]
    signs = 1.0 - 2.0 * (tokens[..., :2] == base + 1)
    power = signs[..., 1] * _number(tokens[..., 2 : 2 + exponent_digits], base)
    mantissa = _number(tokens[..., 2 + exponent_digits :], base)
    return signs[..., 0] * mantissa * _power(base, power - (tokens.shape[-1] - exponent_digits - 3))


def constrained_decode(
    step: Callable[[Int[Tensor, "batch written"]], Float[Tensor, "batch vocabulary"]],
    allowed: Bool[Tensor, "length vocabulary"],
    batch: int,
    *,
    temperature: float = 1.0,
    generator: Generator | None = None,
) -> Int[Tensor, "batch length"]:
    """Write `length` tokens one after another, each among those allowed at its place.

    Args:
        step: gives the next token's logits for what has been written, at first nothing.
        allowed: tokens that may stand at each place, at least one.
        batch: how many sequences.
        temperature: the logits are divided by it, above 0.
        generator: what tokens are drawn with; None takes the likeliest at each place.

    Raises:
        ValueError: `allowed` or logits that do not fit, a number out of range.

    >>> import torch
    >>> allowed = torch.tensor([[True, True, False], [False, True, True]])
    >>> constrained_decode(lambda written: torch.tensor([[3.0, 2.0, 1.0]]), allowed, 1)
    tensor([[0, 1]])
    """
    if not isinstance(allowed, Tensor) or allowed.dtype is not torch.bool or allowed.ndim != 2:
        raise ValueError("allowed: expected a boolean tensor (length, vocabulary)")
    require.whole("batch", batch)
    require.number("temperature", temperature, above=0.0)
    written = torch.empty(batch, 0, dtype=torch.int64, device=allowed.device)
    for place in allowed:
        logits = step(written)
        if logits.shape != (batch, len(place)):
            raise ValueError(f"step: expected logits {(batch, len(place))}, got shape {tuple(logits.shape)}")
        logits = logits.masked_fill(~place, -torch.inf)
        if generator is None:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
        written = torch.cat([written, token], -1)
    return written


class DecodingRegressionHead(nn.Module):
    """A head that spells numbers: a causal Transformer over digits, conditioned on a feature vector.

        loss = head.loss(trunk(x), y).mean()      # y as digit_tokenize takes it
        head.log_prob(trunk(x), y), head.sample(trunk(x), 100, generator=g), head.predict(trunk(x), "median")

    Args:
        features: width of the feature vector.
        base, digits, exponent_digits: of the numbers, as in `digit_tokenize`.
        width: of the Transformer, a multiple of `heads`.
        layers: of it.
        heads: of its attention.

    Raises:
        ValueError: a hyper-parameter out of range, tensors that do not fit.

    >>> import torch
    >>> head = DecodingRegressionHead(3, base=2, digits=4, width=8)
    >>> head.log_prob(torch.zeros(5, 3), torch.rand(5)).shape
    torch.Size([5])
    >>> head.sample(torch.zeros(5, 3), 7, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([7, 5])
    """

    allowed: Tensor

    def __init__(
        self,
        features: int,
        *,
        base: int = 10,
        digits: int = 4,
        exponent_digits: int | None = None,
        width: int = 128,
        layers: int = 1,
        heads: int = 1,
    ) -> None:
        super().__init__()
        _check(base, digits, exponent_digits)
        for name, value in {"features": features, "layers": layers, "heads": heads, "width": width}.items():
            require.whole(name, value, at_least=1)
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads = {heads}, got {width}")
        self.base, self.digits, self.exponent_digits = base, digits, exponent_digits
        signs = 0 if exponent_digits is None else 2
        length = signs + digits + (exponent_digits or 0)
        allowed = torch.zeros(length, base + signs, dtype=torch.bool)
        allowed[:signs, base:] = True
        allowed[signs:, :base] = True
        self.register_buffer("allowed", allowed, persistent=False)
        self.start = nn.Linear(features, width)
        self.token = nn.Embedding(base + signs, width)
        self.place = nn.Embedding(length, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.output = nn.Linear(width, base + signs)

    def forward(
        self, features: Float[Tensor, "*batch features"], written: Int[Tensor, "*batch written"]
    ) -> Float[Tensor, "*batch next vocabulary"]:
        """Logits of the token after none, one, ..., all of `written`; -inf where it cannot stand."""
        self._check_features(features)
        require.integers("written", written)
        if written.shape[:-1] != features.shape[:-1] or written.shape[-1] >= len(self.allowed):
            wanted = (*features.shape[:-1], f"at most {len(self.allowed) - 1}")
            raise ValueError(f"written: expected {wanted} tokens, got shape {tuple(written.shape)}")
        x = torch.cat([self.start(features).unsqueeze(-2), self.token(written)], -2)
        x = x + self.place.weight[: x.shape[-2]]
        for layer in self.layers:
            x = layer(x)
        return self.output(x).masked_fill(~self.allowed[: x.shape[-2]], -torch.inf)  # type: ignore[no-any-return]

    def loss(self, features: Float[Tensor, "*batch features"], y: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """-log probability of the tokens of y, in nats: the sum of the cross-entropies of its digits."""
        return -self._log_prob_of(features, self._tokens(features, y))

    def log_prob(
        self, features: Float[Tensor, "*batch features"], y: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """Logarithm of the density at y, the probability of its tokens over the width of what they stand for.

        With an exponent, tokens that no number has (a leading zero, an exponent -0) take a little of the mass.
        """
        tokens = self._tokens(features, y)
        return self._log_prob_of(features, tokens) - self._spacing(tokens).log().to(features.dtype)

    @torch.no_grad()
    def sample(
        self, features: Float[Tensor, "*batch features"], n: int, *, generator: Generator, temperature: float = 1.0
    ) -> Float[Tensor, "n *batch"]:
        """n numbers for each feature vector, uniform among those with the same tokens."""
        self._check_features(features)
        require.whole("n", n, at_least=1)
        flat = features.expand(n, *features.shape).reshape(-1, features.shape[-1])
        tokens = constrained_decode(
            lambda written: self(flat, written)[:, -1],
            self.allowed,
            len(flat),
            temperature=temperature,
            generator=generator,
        )
        y = digit_detokenize(tokens, base=self.base, exponent_digits=self.exponent_digits)
        within = torch.rand(y.shape, generator=generator, dtype=y.dtype, device=generator.device).to(y.device)
        negative = (tokens[:, 0] == self.base + 1).to(y.dtype)
        y = y + (1 - 2 * negative) * within * self._spacing(tokens)
        return y.to(features.dtype).view(n, *features.shape[:-1])

    @torch.no_grad()
    def leaves(
        self, features: Float[Tensor, "*batch features"]
    ) -> tuple[Float[Tensor, " leaves"], Float[Tensor, "*batch leaves"]]:
        """Centre and log-probability of each of the base^digits intervals of [0, 1]; without an exponent only."""
        self._check_features(features)
        if self.exponent_digits is not None:
            raise ValueError(f"exponent_digits: expected None for the leaves of [0, 1], got {self.exponent_digits}")
        prefixes = torch.tensor(list(product(range(self.base), repeat=self.digits - 1)), device=features.device)
        written = prefixes.expand(*features.shape[:-1], *prefixes.shape)
        repeated = features.unsqueeze(-2).expand(*written.shape[:-1], features.shape[-1])
        log_p = self(repeated, written).log_softmax(-1)
        so_far = log_p[..., :-1, :].gather(-1, written.unsqueeze(-1)).squeeze(-1).sum(-1, keepdim=True)
        count = self.base**self.digits
        centre = (torch.arange(count, device=features.device, dtype=features.dtype) + 0.5) / count
        return centre, (so_far + log_p[..., -1, :]).flatten(-2)

    @torch.no_grad()
    def predict(
        self,
        features: Float[Tensor, "*batch features"],
        estimate: str = "mean",
        *,
        samples: int | None = None,
        generator: Generator | None = None,
    ) -> Float[Tensor, "*batch"]:
        """One number for each feature vector.

        Args:
            features: of the trunk.
            estimate: "mean", "median" or "mode" of the distribution.
            samples: how many to estimate mean or median from, with an exponent or many digits; None goes through all
                leaves.
            generator: what samples are drawn with.
        """
        require.one_of("estimate", estimate, ("mean", "median", "mode"))
        if samples is not None:
            if estimate == "mode" or generator is None:
                raise ValueError("samples: expected None for a mode, or a generator beside them")
            drawn = self.sample(features, samples, generator=generator)
            return drawn.mean(0) if estimate == "mean" else drawn.quantile(0.5, dim=0)
        centre, log_p = self.leaves(features)
        if estimate == "mean":
            return log_p.exp() @ centre
        if estimate == "mode":
            return centre[log_p.argmax(-1)]
        up_to = log_p.double().exp().cumsum(-1)
        return centre[(up_to < 0.5).sum(-1).clamp_max(len(centre) - 1)]

    def _tokens(self, features: Tensor, y: Tensor) -> Tensor:
        self._check_features(features)
        require.same_shape("y", y, tuple(features.shape[:-1]))
        return digit_tokenize(y, base=self.base, digits=self.digits, exponent_digits=self.exponent_digits)

    def _log_prob_of(self, features: Tensor, tokens: Tensor) -> Tensor:
        log_p = self(features, tokens[..., :-1]).log_softmax(-1)
        total: Tensor = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).sum(-1)
        return total

    def _spacing(self, tokens: Tensor) -> Tensor:
        """Width of the interval of numbers that have these tokens."""
        if self.exponent_digits is None:
            return torch.full(tokens.shape[:-1], float(self.base) ** -self.digits, dtype=torch.float64).to(
                tokens.device
            )
        power = _number(tokens[..., 2 : 2 + self.exponent_digits], self.base)
        power = torch.where(tokens[..., 1] == self.base + 1, -power, power) - self.digits + 1
        smallest = 1 - self.base**self.exponent_digits
        zero = (tokens[..., 2:] == 0).all(-1)
        return _power(self.base, torch.where(zero, smallest, power))

    def _check_features(self, features: Tensor) -> None:
        require.floating("features", features, at_least_dims=1)
        if features.shape[-1] != self.start.in_features:
            wanted = self.start.in_features
            raise ValueError(f"features: expected {wanted} in the last dimension, got shape {tuple(features.shape)}")


class _Layer(nn.Module):
    """Causal attention and two dense layers, normalised after each residual sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.after_attention, self.after_dense = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        heard = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x = self.after_attention(x + self.merge(heard.transpose(-2, -3).flatten(-2)))
        y: Tensor = self.after_dense(x + self.dense(x))
        return y


def _check(base: int, digits: int, exponent_digits: int | None) -> None:
    require.whole("base", base, at_least=2)
    require.whole("digits", digits, at_least=1, at_most=int(52 / math.log2(base)))
    if exponent_digits is not None:
        most = math.floor(math.log(300 / math.log10(base) - digits) / math.log(base))
        require.whole("exponent_digits", exponent_digits, at_least=1, at_most=most)  # so that doubles hold the powers


def _digits(number: Tensor, base: int, digits: int) -> Int[Tensor, "*batch digits"]:
    place = torch.tensor([base**k for k in range(digits - 1, -1, -1)], device=number.device)
    return number.long().unsqueeze(-1) // place % base


def _number(digits: Tensor, base: int) -> Tensor:
    place = torch.tensor([base**k for k in range(digits.shape[-1] - 1, -1, -1)], device=digits.device)
    total: Tensor = (digits * place).sum(-1).double()
    return total


def _power(base: int, exponent: Tensor) -> Tensor:
    return torch.pow(torch.tensor(float(base), dtype=torch.float64, device=exponent.device), exponent.double())
