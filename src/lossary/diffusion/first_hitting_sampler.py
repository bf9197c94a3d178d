"""First-hitting sampler: masked diffusion unmasks one token at a time, so draw the times and skip the rest.

Between two unmaskings nothing changes, and where tokens are masked independently the next time and place can be drawn
in closed form. `first_hitting` therefore needs one evaluation for each masked token (fewer with several per call),
one draw of one token each, and gives exactly the samples of infinitely many ancestral steps. The time itself turns out
to be useless: what a masked model learns depends on which tokens are masked, as in `order_agnostic_loss`, so any
masked language model will do. Beware of comparisons by generative perplexity alone: samplers that draw each token's
categories by Gumbel noise made of 32-bit numbers cut its tail and act like a lower temperature, the more so the more
steps they take; `truncated_gumbel_probabilities` says by how much.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._discrete import Predict, draw
from lossary.diffusion._noise import noise
from lossary.paper import Paper

PAPER = Paper(
    title=(
        "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling"
    ),
    year=2024,
    helps=("text-generation", "slow-sampling"),
    departs=(
        "the schedule enters by its inverse; without it times are those of survival 1 - t",
        "several tokens in a call: each keeps a time of its own, all are drawn from the first one's prediction; no"
        " extrapolation of earlier predictions (the paper's high-order variants), no corrector",
    ),
    equation=(
        r"\alpha_{\tau_{n-1}}=1-u^{1/n}\,(1-\alpha_{\tau_n}),\quad u\sim\mathcal U(0,1);\qquad "
        r"\mathcal L=\mathbb E_{n\sim\mathcal U\{1..L\}}\,\mathbb E_{x_n\mid x_0}\Bigl[\tfrac Ln"
        r"\sum_{i:\,x_n^i=m}-\log p_\theta(x_0^i\mid x_n)\Bigr]"
    ),
    url="https://arxiv.org/abs/2409.02908",
)

_FLOAT32_GUMBEL = -math.log(-math.log1p(-(2.0**-24)))
"""The largest Gumbel noise of a 32-bit uniform number below 1: 16.6."""


def first_hitting(
    predict: Predict,
    x: Int[Tensor, "batch length"],
    *,
    mask: int,
    per_call: int = 1,
    time: Callable[[Tensor], Tensor] | None = None,
    generator: Generator | None = None,
) -> Int[Tensor, "batch length"]:
    """Fill in the masks of x, from the last time on: ceil(most masks in a row / per_call) evaluations.

    With n masks left at a time when a share m is masked, the next one falls when that share is m u^(1/n), and any of
    them is equally likely to. What is not masked in x stays, so prompts and gaps need nothing special.

    Args:
        predict: predict(x (B, L), t (B,)) -> probabilities of the tokens (B, L, V); it may ignore t.
        x: tokens, some of them masked.
        mask: the state that is the mask.
        per_call: tokens that one prediction fills; more than 1 is faster and no longer exact.
        time: t of the share of tokens that are masked at it, (B,); None is t itself, for survival 1 - t.

    Raises:
        ValueError: x not two-dimensional int64, mask below 0, or per_call below 1.

    >>> import torch
    >>> x = torch.tensor([[2, 0, 2]])
    >>> first_hitting(lambda x, t: torch.tensor([0.0, 1.0]).expand(1, 3, 2), x, mask=2)
    tensor([[1, 0, 1]])
    """
    require.integers("x", x)
    if x.ndim != 2:
        raise ValueError(f"x: expected (batch, length), got shape {tuple(x.shape)}")
    require.whole("mask", mask)
    require.whole("per_call", per_call, at_least=1)
    left, rows = (x == mask).sum(-1), torch.arange(len(x), device=x.device)
    place = noise(torch.empty(x.shape, dtype=torch.float64, device=x.device), generator, kind=torch.rand)
    order = place.masked_fill(x != mask, 2.0).argsort(-1)  # the masked places first, in the order in which they fall
    share = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for start in range(0, int(left.max()) if len(x) else 0, per_call):
        tokens, filled = None, x.clone()
        for k in range(start, min(start + per_call, x.shape[1])):
            chance = noise(share, generator, kind=torch.rand)
            share = share * chance ** (1 / (left - k).clamp(min=1))
            if tokens is None:
                tokens = predict(x, share if time is None else time(share))
            here = order[:, k]
            found = draw(tokens[rows, here], generator=generator)
            filled[rows, here] = torch.where(k < left, found, filled[rows, here])
        x = filled
    return x


def mask_uniformly(
    clean: Int[Tensor, "*batch length"], *, mask: int, generator: Generator | None = None
) -> Int[Tensor, "*batch length"]:
    """Tokens with n random places masked, n uniform from 1 to L: what `order_agnostic_loss` is averaged over.

    Raises:
        ValueError: clean not int64, or mask below 0.

    >>> import torch
    >>> mask_uniformly(torch.tensor([5]), mask=9)
    tensor([9])
    """
    require.integers("clean", clean)
    require.whole("mask", mask)
    length = clean.shape[-1]
    place = noise(torch.empty(clean.shape, device=clean.device), generator, kind=torch.rand)
    rank = place.argsort(-1).argsort(-1)
    count = noise(clean.new_empty(clean.shape[:-1]), generator, kind=partial(torch.randint, 1, length + 1))
    return torch.where(rank < count[..., None], mask, clean)


def order_agnostic_loss(
    input: Float[Tensor, "*batch length tokens"],
    target: Int[Tensor, "*batch length"],
    *,
    masked: Bool[Tensor, "*batch length"],
) -> Float[Tensor, "*batch"]:
    """The mean cross-entropy of the masked tokens, nats per token; 0 where none is.

    With `mask_uniformly` its mean is the bound on -log p of masked diffusion in continuous time, whatever the
    schedule: the paper's L / n times the sum over n masked tokens, divided by the length.

    Args:
        input: logits of the clean tokens. target: those tokens.
        masked: which of them were hidden from the network.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> order_agnostic_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]), masked=torch.tensor([True, True, False]))
    tensor(1.3863)
    """
    require.classes(input, target)
    if masked.dtype is not torch.bool or masked.shape != target.shape:
        raise ValueError(f"masked: expected bool of shape {tuple(target.shape)}, got {masked.dtype} {masked.shape}")
    missed = F.cross_entropy(input.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
    return (missed * masked).sum(-1) / masked.sum(-1).clamp(min=1)


def truncated_gumbel_probabilities(
    probabilities: Float[Tensor, "*batch tokens"], *, bound: float = _FLOAT32_GUMBEL
) -> Float64[Tensor, "*batch tokens"]:
    """How often argmax(log p + g) finds each token when the Gumbel noise g is cut off at `bound`.

    g is distributed as a Gumbel variable that is known to be below the bound. Where y = e^-(log p + g) lies between
    a_k = e^-bound / p_k and a_{k+1}, p falling, only the k most likely tokens compete; summing over k,

        P(i) = p_i sum_{k >= i} e^{k e^-bound} (e^{-P_k a_k} - e^{-P_k a_{k+1}}) / P_k,   P_k = p_1 + ... + p_k.

    Args:
        probabilities: of the tokens, which sum to 1.
        bound: of the noise, above 0: 16.6 for 32-bit uniform numbers, 36.7 for 64-bit ones.

    Raises:
        ValueError: not a floating-point tensor, or a bound not above 0.

    >>> import torch
    >>> truncated_gumbel_probabilities(torch.tensor([0.9, 0.1]), bound=1.0)
    tensor([0.9947, 0.0053], dtype=torch.float64)
    """
    require.floating("probabilities", probabilities, at_least_dims=1)
    require.number("bound", bound, above=0.0)
    p, order = probabilities.double().sort(-1, descending=True)
    least = math.exp(-bound)
    sums, number = p.cumsum(-1), torch.arange(1, p.shape[-1] + 1, device=p.device)
    start = least / p
    stop = torch.cat([start[..., 1:], torch.full_like(start[..., :1], torch.inf)], dim=-1)
    share = (number * least).exp() * ((-sums * start).exp() - (-sums * stop).exp()) / sums
    wins = p * share.flip(-1).cumsum(-1).flip(-1)
    return torch.empty_like(wins).scatter_(-1, order, wins)
