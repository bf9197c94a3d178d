"""DiffEnc: variational diffusion whose mean is an encoding of the data that changes with the noise level.

A variational diffusion model noises the data as they are. Here a small network may move their mean at every level,
which costs nothing when sampling, since the generator never sees it, and can tighten the bound on the likelihood. The
generator is told by one term that the mean will drift. Try it where bits per dimension count and the network is what
limits them: where the plain model's network is perfect its bound is tight, and a drifting mean only loosens it. Also
here: what a reverse variance other than the forward one's costs, which pays with few steps and must vanish with many.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="DiffEnc: Variational Diffusion with a Learned Encoder",
    year=2024,
    helps=("density-estimation",),
    departs=(
        "a linear log-SNR only; the schedule is not learned",
        "data may be continuous: their density given z_0 is then a Gaussian, in place of the discretised one",
        "no dynamic thresholding in the sampler, no regularisation of the encoder other than tanh",
    ),
    equation=(
        r"\mathcal L_\infty=\tfrac12\,\mathbb E\;g'(t)\,\alpha_t^2\, "
        r"\bigl\lVert v-\hat v+\sigma_t\bigl(\hat x-x_\phi+y_\phi+\tfrac{dy_\phi}{dg}\bigr)\bigr\rVert^2,\qquad "
        r"x_\phi=\alpha_t^2x+\sigma_t^2\,y_\phi(x,g)"
    ),
    url="https://arxiv.org/abs/2310.19789",
)


class LearnedMeanEncoder(nn.Module):
    """y(x, t) = tanh(network(x, t)), what the mean becomes in pure noise: x_phi = alpha^2 x + sigma^2 y.

    Args:
        network: called as network(x (*batch, ...), t (*batch)), t from 0, data, to 1, to the shape of x; a last layer
            of zeros starts it as alpha^2 x. None keeps y at 0, the paper's encoder without training.

    >>> LearnedMeanEncoder(lambda x, t: 2 * x)(torch.tensor([[0.5]]), torch.tensor([0.3]))
    tensor([[0.7616]])
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.network is None else self.network(x, t).tanh()


class DiffEnc(nn.Module):
    """A variational diffusion model: forward(x) is minus the bound on log p(x) of each sample, in nats.

    z_t = alpha x_phi + sigma noise with sigma^2 = sigmoid(g), alpha^2 = 1 - sigma^2, and g = -log SNR rising from `low`
    to `high`. Divide by D log 2 for bits per dimension.

    Args:
        network: v-hat, called as network(z (*batch, ...), t (*batch)), to the shape of z.
        encoder: y, such as `LearnedMeanEncoder`; None leaves the data as they are, a plain model (VDM).
        levels: the data are this many evenly spaced values from -1 to 1; None for continuous data.
        low, high: g at times 0 and 1.

    Raises:
        ValueError: an argument out of range.

    >>> model = DiffEnc(lambda z, t: 0 * z, levels=3)
    >>> model.prior_loss(torch.zeros(1, 2))  # sigma_1^2 is nearly 1
    tensor([2.2531e-05])
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        encoder: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        levels: int | None = None,
        low: float = -13.3,
        high: float = 5.0,
    ) -> None:
        super().__init__()
        require.number("low", low)
        require.number("high", high, above=low)
        if levels is not None:
            require.whole("levels", levels, at_least=2)
        self.network, self.encoder, self.levels, self.low, self.high = network, encoder, levels, low, high

    def gamma(self, t: Tensor) -> Tensor:
        """g at times t."""
        return self.low + (self.high - self.low) * t

    def encode(self, x: Tensor, t: Tensor) -> Tensor:
        """x_phi at times t (*batch), of the shape of x."""
        if self.encoder is None:
            return x
        kept = over(torch.sigmoid(-self.gamma(t)), x)
        return kept * x + (1 - kept) * self.encoder(x, t)

    def diffusion_loss(
        self, x: Float[Tensor, "*batch_and_data"], t: Float[Tensor, "*batch"], noise: Tensor
    ) -> Float[Tensor, "*batch"]:
        """Of infinitely many steps, at times t: the mean over t from 0 to 1 is the bound's term. In nats.

        Raises:
            ValueError: shapes that do not fit.
        """
        require.floating("x", x)
        require.same_shape("noise", noise, tuple(x.shape))
        require.same_shape("t", t, tuple(x.shape[: t.ndim]))
        g = self.gamma(t)
        alpha, sigma = over(torch.sigmoid(-g).sqrt(), x), over(torch.sigmoid(g).sqrt(), x)
        encoded, drift = x, None
        if self.encoder is not None:
            y, slope = torch.autograd.functional.jvp(  # type: ignore[no-untyped-call]
                lambda at: self.encoder(x, at), t, torch.ones_like(t), create_graph=torch.is_grad_enabled()
            )
            encoded = alpha.square() * x + sigma.square() * y
            drift = y + slope / (self.high - self.low)
        z, v = alpha * encoded + sigma * noise, alpha * noise - sigma * encoded
        predicted = self.network(z, t)
        residual = v - predicted
        if drift is not None:
            residual = residual + sigma * (alpha * z - sigma * predicted - encoded + drift)
        each = (alpha * residual).square()
        summed = each.flatten(t.ndim).sum(-1) if each.ndim > t.ndim else each
        return 0.5 * (self.high - self.low) * summed

    def prior_loss(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, " batch"]:
        """KL(q(z_1 | x) | N(0, I)) of samples (batch, ...), in nats."""
        t = x.new_ones(_lead(x))
        variance = torch.sigmoid(self.gamma(t))
        encoded = over((1 - variance).sqrt(), x) * self.encode(x, t)
        rest = over(variance - variance.log() - 1, x)
        return 0.5 * (encoded.square() + rest).flatten(t.ndim).sum(-1)

    def reconstruction_loss(self, x: Float[Tensor, "batch *data"], noise: Tensor) -> Float[Tensor, " batch"]:
        """-log p(x | z_0), in nats; of a density if the data are continuous."""
        t = x.new_zeros(_lead(x))
        seen = self.encode(x, t) + math.exp(self.low / 2) * noise
        if self.levels is None:
            each = 0.5 * ((x - seen).square() * math.exp(-self.low) + self.low + math.log(2 * math.pi))
        else:
            grid = torch.linspace(-1, 1, self.levels, dtype=x.dtype, device=x.device)
            logits = -0.5 * math.exp(-self.low) * (seen.unsqueeze(-1) - grid).square()
            index = ((x + 1) / 2 * (self.levels - 1)).round().long().clamp(0, self.levels - 1)
            each = -F.log_softmax(logits, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        return each.flatten(t.ndim).sum(-1)

    def forward(self, x: Float[Tensor, "*replicas batch data"], *, generator: Randomness = None) -> Tensor:
        """Minus the bound of each sample, in nats, at times spread evenly over the batch.

        Args:
            x: (batch, ...), or (replicas, batch, D), which are three dimensions; in the latter case generators may be
                one for each replica. Pictures have four.
            generator: of times and noise.
        """
        lead = _lead(x)
        offset = noise(x.new_empty((*lead[:-1], 1)), generator, kind=torch.rand)
        t = (torch.arange(lead[-1], dtype=x.dtype, device=x.device) / lead[-1] + offset) % 1
        diffusion = self.diffusion_loss(x, t, noise(x, generator))
        return diffusion + self.prior_loss(x) + self.reconstruction_loss(x, noise(x, generator))

    @torch.no_grad()
    def sample(
        self, shape: tuple[int, ...], *, steps: int, generator: Randomness = None, like: Tensor | None = None
    ) -> Tensor:
        """Data of that shape, as in `forward`, in `steps` evaluations of the network; the encoder is not needed."""
        z = noise((torch.empty(0) if like is None else like).new_empty(shape), generator)
        times = torch.linspace(1, 0, steps + 1).tolist()
        for t, s in pairwise(times):
            z = self._step(z, t, s, generator)
        x = z / math.sqrt(1 / (1 + math.exp(self.low)))
        if self.levels is None:
            return x
        return (((x + 1) / 2 * (self.levels - 1)).round() / (self.levels - 1) * 2 - 1).clamp(-1, 1)

    def _step(self, z: Tensor, t: float, s: float, generator: Randomness) -> Tensor:
        """A draw of z_s given z_t."""
        g_t, g_s = (self.low + (self.high - self.low) * at for at in (t, s))
        sigma_t, sigma_s = (math.sqrt(1 / (1 + math.exp(-g))) for g in (g_t, g_s))
        alpha_t, alpha_s = (math.sqrt(1 / (1 + math.exp(g))) for g in (g_t, g_s))
        clean = alpha_t * z - sigma_t * self.network(z, z.new_full(_lead(z), t))
        fall = math.expm1(g_s - g_t)
        share = -fall if self.encoder is None else -fall - (g_s - g_t) * sigma_t**2
        mean = alpha_s / alpha_t * (fall + 1) * z + alpha_s * share * clean
        return mean + sigma_s * math.sqrt(-fall) * noise(z, generator)


def _lead(x: Tensor) -> tuple[int, ...]:
    """(replicas, batch) of three dimensions, else (batch,)."""
    return tuple(x.shape[:-1] if x.ndim == 3 else x.shape[:1])


def reverse_variance_kl(
    error: Float[Tensor, "*batch"], snr_gain: Float[Tensor, "*batch"], *, dimension: int, ratio: Tensor | float = 1.0
) -> Float[Tensor, "*batch"]:
    """KL of one reverse step whose variance is the forward posterior's over `ratio`, in nats.

    (D (w - 1 - log w) + w (SNR(s) - SNR(t)) |x - x-hat|^2) / 2. Unless w = 1 the first term adds up without bound as
    steps get smaller.

    Args:
        error: |x - x-hat|^2, summed over the sample.
        snr_gain: SNR(s) - SNR(t) > 0 of the step from t to s.
        dimension: D.
        ratio: w > 0.

    Raises:
        ValueError: shapes that differ, or a number out of range.

    >>> reverse_variance_kl(torch.tensor([2.0]), torch.tensor([1.0]), dimension=2, ratio=0.5)  # (2 log 2 - 1 + 1) / 2
    tensor([0.6931])
    """
    require.floating("error", error)
    require.same_shape("snr_gain", snr_gain, tuple(error.shape))
    require.whole("dimension", dimension, at_least=1)
    require.number("ratio", ratio, above=0.0)
    w = torch.as_tensor(ratio, dtype=error.dtype, device=error.device)
    return 0.5 * (dimension * (w - 1 - w.log()) + w * snr_gain * error)


def best_variance_ratio(
    error: Float[Tensor, "*batch"], snr_gain: Float[Tensor, "*batch"], *, dimension: int
) -> Float[Tensor, "*batch"]:
    """The w that makes `reverse_variance_kl` least: D / (D + (SNR(s) - SNR(t)) |x - x-hat|^2), at most 1.

    Args:
        error, snr_gain, dimension: see `reverse_variance_kl`; the error is an expected one.

    Raises:
        ValueError: shapes that differ, or a dimension below 1.

    >>> best_variance_ratio(torch.tensor([2.0]), torch.tensor([1.0]), dimension=2)
    tensor([0.5000])
    """
    require.floating("error", error)
    require.same_shape("snr_gain", snr_gain, tuple(error.shape))
    require.whole("dimension", dimension, at_least=1)
    return dimension / (dimension + snr_gain * error)
