"""Learning from checkpoints: a diffusion over network parameters that jumps to the loss one asks for.

Checkpoints of many training runs are a data set that training throws away. This model learns from it: given
parameters, their loss and a wanted loss, it samples parameters that have it, so that one update replaces many steps
of gradient descent and a prompt sets how good the result shall be. For one small architecture on one task whose runs
are at hand; it knows nothing of other tasks, and parameters beyond some thousands need large transformers.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import Process, over, variance_preserving
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.paper import Paper

PAPER = Paper(
    title="Learning to Learn with Generative Models of Neural Network Checkpoints",
    year=2022,
    helps=("training-cost",),
    departs=(
        "parameters of perceptrons only; the official code also permutes convolutions",
        "continuous time in place of 1000 steps, and DDIM in 50 steps in place of the ancestral sampler",
        "losses only where lower is better; the official code also prompts with errors and returns",
        "torch's initialisation, apart from the decoders that start at 0",
    ),
    equation=(
        r"\mathcal L=\mathbb E\bigl\lVert\theta^\ast-\theta-g_\phi\bigl(\sqrt{\bar\alpha_k}\,\theta^\ast"
        r"+\sqrt{1-\bar\alpha_k}\,\epsilon,\;\theta,\;\ell,\;\ell^\ast,\;k\bigr)\bigr\rVert^2"
    ),
    url="https://github.com/wpeebles/G.pt",
)

_EDGE = 1e-3  # training times are drawn from here to 1; sampling starts as far from 1, where alpha may be 0


def permute_hidden_units(
    *parameters: Float[Tensor, "*batch P"], sizes: Sequence[int], generator: Randomness = None
) -> tuple[Tensor, ...]:
    """The same networks with their hidden units in a random order, a new one for each batch element.

    Args:
        parameters: of perceptrons, flattened as `torch.nn.utils.parameters_to_vector` does (weight (out, in), bias,
            layer by layer). Several tensors get the same orders: checkpoints of one run stay one run.
        sizes: widths of the perceptron, from input to output.
        generator: of the orders; a sequence has one for each replica, the first dimension.

    Raises:
        ValueError: tensors whose shapes differ or whose last dimension is not the number of parameters.

    >>> # a 1-2-1 perceptron
    >>> theta = torch.tensor([[1.0, 2.0, 10.0, 20.0, 5.0, 6.0, 0.5]])
    >>> [moved] = permute_hidden_units(theta, sizes=(1, 2, 1), generator=torch.Generator().manual_seed(1))
    >>> moved
    tensor([[ 2.0000,  1.0000, 20.0000, 10.0000,  6.0000,  5.0000,  0.5000]])
    """
    count = sum(_pieces(sizes))
    if not parameters:
        raise ValueError("parameters: expected at least one tensor, got none")
    for vector in parameters:
        require.same_shape("parameters", vector, tuple(parameters[0].shape))
        if not vector.ndim or vector.shape[-1] != count:
            raise ValueError(f"parameters: expected {count} numbers each, got shape {tuple(vector.shape)}")
    batch, device = tuple(parameters[0].shape[:-1]), parameters[0].device

    def same(width: int) -> Tensor:
        return torch.arange(width, device=device).expand(*batch, width)

    blank, index, before, start = parameters[0], [], same(sizes[0]), 0
    for layer, (wide, narrow) in enumerate(pairwise(sizes)):
        if layer < len(sizes) - 2:
            after = noise(blank[..., :1].expand(*batch, narrow), generator, kind=torch.rand).argsort(-1)
        else:
            after = same(narrow)
        index += [
            (start + after.unsqueeze(-1) * wide + before.unsqueeze(-2)).flatten(-2),
            start + wide * narrow + after,
        ]
        before, start = after, start + (wide + 1) * narrow
    order = torch.cat(index, dim=-1)
    return tuple(vector.gather(-1, order) for vector in parameters)


class ParameterTokenizer(nn.Module):
    """Parameters of a perceptron to tokens and back: each weight and bias its own, large ones in chunks.

    Every chunk has a linear map of its own, without a bias, to the tokens' width, and one back, which starts at 0.

    Args:
        sizes: widths of the perceptron, from input to output.
        width: of the tokens.
        chunk: most parameters in a token.
        vectors: number of parameter vectors that are encoded side by side, each with maps of its own.

    Attributes:
        pieces: parameters in each token of one vector.

    Raises:
        ValueError: numbers below 1, or fewer than two sizes.

    >>> tokenizer = ParameterTokenizer((2, 8, 1), 16, chunk=10)
    >>> tokenizer.pieces  # 8 x 2 weights in two chunks, 8 biases, 8 weights, 1 bias
    [10, 6, 8, 8, 1]
    >>> tokenizer.encode(torch.zeros(3, 33)).shape, tokenizer.decode(torch.zeros(3, 5, 16)).shape
    (torch.Size([3, 5, 16]), torch.Size([3, 33]))
    """

    def __init__(self, sizes: Sequence[int], width: int, *, chunk: int = 1000, vectors: int = 1) -> None:
        super().__init__()
        for name, value in (("width", width), ("chunk", chunk), ("vectors", vectors)):
            require.whole(name, value, at_least=1)
        self.pieces = [min(chunk, n - k) for n in _pieces(sizes) for k in range(0, n, chunk)]
        self.encoders = nn.ModuleList(nn.Linear(n, width, bias=False) for n in self.pieces * vectors)
        self.decoders = nn.ModuleList(nn.Linear(width, n, bias=False) for n in self.pieces)
        for decoder in self.decoders:
            nn.init.zeros_(decoder.weight)

    def encode(self, *parameters: Float[Tensor, "batch P"]) -> Float[Tensor, "batch tokens width"]:
        """Tokens of as many vectors as `vectors` says, one vector after another."""
        chunks = [piece for vector in parameters for piece in vector.split(self.pieces, dim=-1)]
        return torch.stack([encoder(piece) for encoder, piece in zip(self.encoders, chunks, strict=True)], dim=-2)

    def decode(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch P"]:
        """Parameters from the first tokens; what stands behind those of one vector is left alone."""
        rows = tokens[..., : len(self.pieces), :].unbind(-2)
        return torch.cat([decoder(row) for decoder, row in zip(self.decoders, rows, strict=True)], dim=-1)


class CheckpointTransformer(nn.Module):
    """network(x_t, t, theta, loss, prompt) -> the change of theta: a transformer on tokens of both vectors.

    Tokens of x_t and theta, and one each for t, prompt - loss, prompt and loss, by sines and cosines; no masking.

    Args:
        sizes: widths of the perceptron whose parameters these are.
        width, depth, heads: of the transformer.
        chunk: see `ParameterTokenizer`.
        frequencies: number of frequencies of a scalar's embedding, from 1 to 2^max_log2.
        max_log2: see above.

    Raises:
        ValueError: numbers below 1, or a width that the heads do not divide.

    >>> network = CheckpointTransformer((2, 8, 1), width=16, depth=1, heads=2)
    >>> one = torch.ones(3)
    >>> network(torch.randn(3, 33), one, torch.randn(3, 33), one, one).abs().max()  # at first no change
    tensor(0., grad_fn=<MaxBackward1>)
    """

    frequencies: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        chunk: int = 1000,
        frequencies: int = 16,
        max_log2: float = 14.0,
    ) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("heads", heads), ("frequencies", frequencies)):
            require.whole(name, value, at_least=1)
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads, {heads}, got {width}")
        self.tokenizer = ParameterTokenizer(sizes, width, chunk=chunk, vectors=2)
        self.scalars = nn.ModuleList(nn.Linear(2 * frequencies + 1, width, bias=False) for _ in range(4))
        self.place = nn.Parameter(torch.zeros(len(self.tokenizer.encoders) + 4, width))
        self.first, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.register_buffer("frequencies", 2.0 ** torch.linspace(0, max_log2, frequencies), persistent=False)

    def forward(self, x: Tensor, t: Tensor, theta: Tensor, loss: Tensor, prompt: Tensor) -> Tensor:
        tokens = [self.tokenizer.encode(x, theta)]
        for layer, scalar in zip(self.scalars, (1000 * t, prompt - loss, prompt, loss)):
            angle = scalar.unsqueeze(-1) * self.frequencies
            tokens.append(layer(torch.cat([angle.sin(), angle.cos(), scalar.unsqueeze(-1)], dim=-1)).unsqueeze(-2))
        h = self.first(torch.cat(tokens, dim=-2)) + self.place
        for block in self.blocks:
            h = block(h)
        return self.tokenizer.decode(self.last(h))


class CheckpointDiffusion(nn.Module):
    """Samples parameters of a wanted loss, given parameters and their loss.

    Args:
        network: called as network(x_t, t, theta, loss, prompt), parameters (*batch, P) scaled, the others (*batch);
            theta is added to what it returns, which makes it a prediction of the clean parameters.
        scale: by which parameters are multiplied first, a number, or a tensor that broadcasts over them, such as one
            for each replica; the paper takes 0.538 over their standard deviation.
        process: of the noise, with times from 0 to 1; None is `variance_preserving()`. Sampling starts at 0.999.

    Raises:
        ValueError: a scale that is not above 0.

    >>> model = CheckpointDiffusion(lambda x, t, theta, loss, prompt: 0 * theta)  # untrained: nothing changes
    >>> model.sample(torch.tensor([[1.0, 2.0]]), torch.tensor([0.7]), torch.tensor([0.1]), steps=5)
    tensor([[1., 2.]])
    """

    scale: Tensor | float

    def __init__(
        self, network: Callable[..., Tensor], *, scale: Tensor | float = 1.0, process: Process | None = None
    ) -> None:
        super().__init__()
        require.number("scale", scale, above=0.0)
        if isinstance(scale, Tensor):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale
        self.network = network
        self.process = process or variance_preserving()

    def _predict(self, x: Tensor, t: Tensor, theta: Tensor, loss: Tensor, prompt: Tensor) -> Tensor:
        return self.network(x, t, theta, loss, prompt) + theta

    def loss(
        self,
        theta: Float[Tensor, "*batch P"],
        target: Float[Tensor, "*batch P"],
        loss: Float[Tensor, "*batch"],
        prompt: Float[Tensor, "*batch"],
        *,
        generator: Randomness = None,
    ) -> Float[Tensor, "*batch"]:
        """Mean squared error of the target's parameters, scaled, from noised ones at a random time.

        Args:
            theta: where the update starts.
            target: a later checkpoint of the same run, in the same order of hidden units.
            loss: of theta.
            prompt: the loss of the target.
            generator: of times and noise; a sequence has one for each replica.

        Raises:
            ValueError: shapes that do not fit.
        """
        require.floating("theta", theta, at_least_dims=1)
        require.same_shape("target", target, tuple(theta.shape))
        require.same_shape("loss", loss, tuple(theta.shape[:-1]))
        require.same_shape("prompt", prompt, tuple(theta.shape[:-1]))
        start, clean = self.scale * theta, self.scale * target
        t = _EDGE + (1 - _EDGE) * noise(loss, generator, kind=torch.rand)
        x = self.process.noised(clean, noise(clean, generator), t)
        return (self._predict(x, t, start, loss, prompt) - clean).square().mean(-1)

    @torch.no_grad()
    def sample(
        self,
        theta: Float[Tensor, "*batch P"],
        loss: Float[Tensor, "*batch"],
        prompt: Float[Tensor, "*batch"],
        *,
        steps: int = 50,
        sampler: Callable[..., Tensor] = euler,
        generator: Randomness = None,
    ) -> Float[Tensor, "*batch P"]:
        """One update: new parameters that shall have the loss `prompt`.

        Args:
            theta: the present parameters.
            loss: of theta.
            prompt: the wanted loss.
            steps: of the sampler, one evaluation each with the default.
            sampler: of the room.
            generator: of the noise; a sequence, one for each replica, goes with samplers that draw nothing.

        Raises:
            ValueError: shapes that do not fit.
        """
        require.floating("theta", theta, at_least_dims=1)
        require.same_shape("loss", loss, tuple(theta.shape[:-1]))
        require.same_shape("prompt", prompt, tuple(theta.shape[:-1]))
        sigmas, start = process_sigmas(self.process, steps, first=1 - _EDGE), self.scale * theta

        def denoise(x: Tensor, sigma: float) -> Tensor:
            t = self.process.time(torch.full_like(loss, sigma))
            return self._predict(over(self.process.alpha(t), x) * x, t, start, loss, prompt)

        first = sigmas[0].item() * noise(start, generator)
        return sampler(denoise, first, sigmas, generator=generator) / self.scale


def _pieces(sizes: Sequence[int]) -> list[int]:
    """Numbers of parameters: weight and bias of each layer."""
    if len(sizes) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"sizes: expected at least two whole numbers >= 1, got {sizes!r}")
    return [n for wide, narrow in pairwise(sizes) for n in (wide * narrow, narrow)]
