"""One view of every network: denoise(x, sigma) -> x_0, whatever it was trained to predict.

x is data plus noise of standard deviation sigma (`Process.ratio`). All predictions are p x_0 + q noise with known p
and q, so each follows exactly from each other.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lossary.diffusion._process import Process, over

Denoise = Callable[..., Tensor]
"""denoise(x (*batch, ...), sigma (*batch) or a number) -> x_0, of the shape of x."""

Kind = Literal["clean", "noise", "v", "score", "velocity"]


def _factors(kind: Kind, t: Tensor, process: Process) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and c of c * prediction = p x_0 + q noise; c keeps the score finite."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "clean":
        return one, zero, one
    if kind == "noise":
        return zero, one, one
    if kind == "v":
        return -sigma, alpha, one
    if kind == "score":
        return zero, -one, sigma
    if kind == "velocity":
        alpha_rate, sigma_rate, *_ = process.rates(t)
        return alpha_rate, sigma_rate, one
    raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")


def to_clean(prediction: Tensor, x: Tensor, t: Tensor, process: Process, kind: Kind) -> Tensor:
    """x_0 from a prediction at x_t; t has the leading dimensions of x. Noise tells nothing of it at alpha = 0.

    Of a process with a second end point x_t and a velocity are taken without that end's share.
    """
    p, q, c = (over(f, x) for f in _factors(kind, t, process))
    alpha, sigma = over(process.alpha(t), x), over(process.sigma(t), x)
    return (sigma * c * prediction - q * x) / (sigma * p - q * alpha)


def from_clean(clean: Tensor, x: Tensor, t: Tensor, process: Process, kind: Kind) -> Tensor:
    """The prediction that says the same as this x_0 at x_t; sigma > 0 unless kind is "clean". Ends as in `to_clean`."""
    if kind == "clean":
        return clean
    p, q, c = (over(f, x) for f in _factors(kind, t, process))
    noise = (x - over(process.alpha(t), x) * clean) / over(process.sigma(t), x)
    return (p * clean + q * noise) / c


class Denoiser(nn.Module):
    """A trained network as denoise(x, sigma, *conditions).

    The network is called with x_t = alpha x, or alpha x + end_weight end, in its own dtype, but with times in at
    least single precision: in half the steps of a schedule run into each other. The arithmetic around it is that of x.

    Args:
        network: called as network(x_t, t (*batch), *conditions).
        process: under which it was trained.
        kind: what it predicts: "clean" (x_0), "noise", "v" (alpha noise - sigma x_0), "score" (-noise / sigma) or
            "velocity" (dx_t / dt).
    """

    def __init__(self, network: nn.Module, process: Process, kind: Kind = "noise") -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
        self.network, self.process, self.kind = network, process, kind

    def forward(
        self, x: Tensor, sigma: Tensor | float, *conditions: Any, end: Tensor | None = None, **named: Any
    ) -> Tensor:
        """x_0 of the shape of x; `end`, of that shape, is the second end point of a process that has one."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        sigma = sigma.expand(x.shape[: max(1, sigma.ndim)])
        t = self.process.time(sigma)
        noisy = over(self.process.alpha(t), x) * x
        x_t = self.process.ended(noisy, t, end)
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), x.dtype)
        times = t.to(torch.promote_types(dtype, torch.float32))
        prediction = self.network(x_t.to(dtype), times, *conditions, **named).to(x.dtype)
        if end is not None and self.kind == "velocity":
            prediction = prediction - over(self.process.rates(t)[-1], x) * end
        return to_clean(prediction, noisy, t, self.process, self.kind)


class Counted:
    """A denoiser that counts its evaluations: most papers on sampling are about this number."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.evaluations = denoise, 0

    def __call__(self, x: Tensor, sigma: Tensor | float, *conditions: Any, **named: Any) -> Tensor:
        self.evaluations += 1
        return self.denoise(x, sigma, *conditions, **named)


def denoising_error(denoise: Denoise, clean: Tensor, sigma: Tensor, noise: Tensor, *conditions: Any) -> Tensor:
    """|denoise(x_0 + sigma noise) - x_0|^2, the mean over what is not batch: sigma's shape. Losses weight this one.

    Times 1 / sigma^2 it is the error of the noise, times 1 + 1 / sigma^2 the error of v.
    """
    x = clean + over(sigma, clean) * noise
    error = (denoise(x, sigma, *conditions) - clean).square()
    return error.flatten(sigma.ndim).mean(-1) if error.ndim > sigma.ndim else error


def score_of(denoise: Denoise, x: Tensor, sigma: Tensor | float, *conditions: Any) -> Tensor:
    """grad log p_sigma(x) = (denoise(x, sigma) - x) / sigma^2, by Tweedie's formula."""
    level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return (denoise(x, sigma, *conditions) - x) / over(level, x) ** 2
