"""Difformer: diffusion on word embeddings that do not collapse, from an anchor loss and more noise.

Embeddings that are learned together with the network that denoises them can make the task trivial by moving together.
The usual guard, cross-entropy at the clean embedding, is soon satisfied by any two that differ at all; the anchor loss
takes it at the *predicted* embedding, which must therefore be near its own word and far from others. Normalised
embeddings keep frequent words from shrinking rare ones, and noise multiplied by a factor in training makes the easy
noise levels rarer. Use all three for text generated from continuous embeddings; where tokens may be masked instead,
`order_agnostic_loss` is simpler. The factor is only a shift of levels: training covers all ratios sigma / alpha times
the factor, and decoding starts at the same network without it.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._noise import noise
from lossary.diffusion._process import Process
from lossary.diffusion._samplers import ancestral
from lossary.diffusion._tokens import embedded, square_root
from lossary.paper import Paper

PAPER = Paper(
    title="Difformer: Empowering Diffusion Models on the Embedding Space for Text Generation",
    year=2022,
    helps=("text-generation",),
    departs=(
        "normalisation is of the clean embeddings, as in the paper; the released scripts normalise the decoder's input",
        "no encoder, no prediction of lengths, no self-conditioning, no reranking: these are the caller's",
        "decoding uses the schedule's times from 0.99 evenly down to 0; the official code respaces 2000 steps",
    ),
    equation=(
        r"\mathcal L=\lVert\hat z_0-z_0\rVert^2-\log p_E(y\mid\hat z_0),\qquad z_0=\mathrm{LN}(\sqrt d\,E_y),\quad "
        r"z_t=\sqrt{\bar\alpha_t}\,z_0+F\sqrt{1-\bar\alpha_t}\,\epsilon,\quad \hat z_0=f_\theta(z_t,t)"
    ),
    url="https://arxiv.org/abs/2212.09412",
)


class NormalizedEmbedding(nn.Module):
    """z_0 = LayerNorm(sqrt(D) E[y]), without scale and shift: every word has mean 0 and the same length sqrt(D).

    Args:
        table: E (V, D), D at least 2, to start from, with entries of about 1 / sqrt(D); (S, V, D) is a stack of S.
        normalise: False leaves out the LayerNorm.

    Raises:
        ValueError: not a floating-point table.

    >>> import torch
    >>> NormalizedEmbedding(torch.tensor([[3.0, 1.0], [0.0, 0.5]]))(torch.tensor([0, 1]))
    tensor([[ 1.0000, -1.0000],
            [-1.0000,  1.0000]], grad_fn=<...>)
    """

    def __init__(self, table: Tensor, *, normalise: bool = True) -> None:
        super().__init__()
        require.floating("table", table, at_least_dims=2)
        self.weight, self.normalise = nn.Parameter(table.clone()), normalise

    def forward(self, tokens: Int[Tensor, "*batch length"]) -> Float[Tensor, "*batch length width"]:
        """Embeddings of tokens."""
        require.integers("tokens", tokens)
        width = self.weight.shape[-1]
        z = math.sqrt(width) * embedded(self.weight, tokens)
        return F.layer_norm(z, (width,)) if self.normalise else z

    def logits(self, z: Float[Tensor, "*batch length width"]) -> Float[Tensor, "*batch length tokens"]:
        """E z: how well each word fits an embedding."""
        lead = z.ndim - self.weight.ndim
        return z @ self.weight.mT[(..., *[None] * lead, slice(None), slice(None))]


def embedding_diffusion_anchor_loss(
    input: Float[Tensor, "*batch length width"],
    target: Int[Tensor, "*batch length"],
    *,
    embedding: NormalizedEmbedding,
    present: Bool[Tensor, "*batch length"] | None = None,
    anchor: bool = True,
    label_smoothing: float = 0.1,
) -> Float[Tensor, "*batch"]:
    """(z_0_hat - z_0)^2 + cross-entropy of E z_0_hat, the mean over tokens. Gradients reach the embedding by both.

    Args:
        input: z_0_hat, predicted from a noised `embedding(target)`.
        target: the tokens.
        embedding: E.
        present: False at padding, which does not count; None is all present.
        anchor: False takes the cross-entropy at z_0 instead, the rounding loss of Diffusion-LM.
        label_smoothing: share of the cross-entropy's target that goes to all words alike, 0 to 1.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> words = NormalizedEmbedding(torch.eye(2))
    >>> z = words(torch.tensor([[0]]))  # (1, -1): -log softmax(1, -1)_0 = 0.1269
    >>> embedding_diffusion_anchor_loss(z + 1.0, torch.tensor([[0]]), embedding=words, label_smoothing=0.0)
    tensor([1.1269], grad_fn=<...>)
    """
    require.floating("input", input, at_least_dims=2)
    require.integers("target", target, shape=tuple(input.shape[:-1]))
    require.number("label_smoothing", label_smoothing, at_least=0.0, at_most=1.0)
    if present is not None and (present.dtype is not torch.bool or present.shape != target.shape):
        raise ValueError(f"present: expected bool of shape {tuple(target.shape)}, got {present.dtype} {present.shape}")
    clean = embedding(target)
    error = (input - clean).square().mean(-1)
    log_p = embedding.logits(input if anchor else clean).log_softmax(-1)
    own = log_p.gather(-1, target[..., None])[..., 0]
    missed = -(1 - label_smoothing) * own - label_smoothing * log_p.mean(-1)
    counted = torch.ones_like(error) if present is None else present.to(error)
    return ((error + missed) * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def noise_factor_process(factor: float = 4.0, *, variance_preserving: bool = False) -> Process:
    """alpha^2 = a, sigma = F sqrt(1 - a) with a = 1 - sqrt(t + 0.0001); or the same ratio with alpha^2 + sigma^2 = 1.

    Both show the denoiser the same noise at the same time; only the scale of what the network sees differs.

    Args:
        factor: F; 4 is the paper's, 1 the plain schedule, used in decoding.
        variance_preserving: alpha^2 = a / (F^2 - (F^2 - 1) a).

    Raises:
        ValueError: a factor not above 0.

    >>> import torch
    >>> process = noise_factor_process(4.0)
    >>> process.sigma(torch.tensor(0.2499)) / process.alpha(torch.tensor(0.2499))  # a = 1/2
    tensor(4.)
    """
    require.number("factor", factor, above=0.0)
    plain = square_root(factor=factor)
    if not variance_preserving:
        return plain
    return Process(
        lambda t: (1 + plain.ratio(t) ** 2).rsqrt(),
        lambda t: plain.ratio(t) * (1 + plain.ratio(t) ** 2).rsqrt(),
        plain.time,
    )


@torch.no_grad()
def decode_embeddings(
    denoise: Denoise,
    embedding: NormalizedEmbedding,
    shape: tuple[int, ...],
    *,
    steps: int = 20,
    generator: Generator | None = None,
) -> Int[Tensor, "*batch length"]:
    """Tokens of shape (*batch, L) from noise: ancestral steps of the plain schedule, then the words that fit best.

    Args:
        denoise: denoise(z, sigma) -> z_0 in the engine's coordinates: `Denoiser(network, noise_factor_process(1.0),
            "clean")` around a network trained under a larger factor.
        embedding: E.
        shape: of the tokens.
        steps: evaluations of the network, at least 1.

    Raises:
        ValueError: steps below 1.

    >>> import torch
    >>> words = NormalizedEmbedding(torch.eye(2))
    >>> decode_embeddings(lambda z, sigma: words(torch.ones(1, 3, dtype=torch.long)), words, (1, 3), steps=2)
    tensor([[1, 1, 1]])
    """
    require.whole("steps", steps, at_least=1)
    times = torch.linspace(0.99, 0, steps + 1, dtype=torch.float64)[:-1]
    sigmas = torch.cat([noise_factor_process(1.0).ratio(times), torch.zeros(1)])
    weight = embedding.weight
    start = noise(weight.new_empty(*shape, weight.shape[-1]), generator)
    return embedding.logits(ancestral(denoise, sigmas[0].item() * start, sigmas, generator=generator)).argmax(-1)
