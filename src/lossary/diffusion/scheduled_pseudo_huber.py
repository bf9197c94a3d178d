"""Scheduled pseudo-Huber: train a denoiser so that outliers in the data pull less, most of all where noise is strong.

The squared error of the noise is replaced by one that turns linear beyond delta, and delta shrinks with the noise
level: in deep noise, where a sample's kind is decided, the loss is nearly absolute, so a few foreign images cannot
drag the average; near the clean end it stays squared and fine detail is learned as before. For data scraped without
a filter. On clean data it promises no gain, only no loss; delta is in units of the prediction, so check it against
the residuals of your model.
"""

from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.diffusion._process import over
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss",
    year=2024,
    helps=("heavy-tails",),
    departs=(
        "twice the paper's loss, as in trainers, so that it becomes the squared error for large delta",
        "time runs from 0 to 1 instead of over a model's steps",
        "the schedule by signal-to-noise ratio is the trainers', added after the paper",
    ),
    equation=(
        r"H_\delta(r)=2\delta^2\Bigl(\sqrt{1+r^2/\delta^2}-1\Bigr),\qquad "
        r"\delta_t=\delta_{\min}^{\,t/T},\quad r=\epsilon-\epsilon_\theta(x_t,t)"
    ),
    url="https://arxiv.org/abs/2403.16728",
)


@loss(
    on="real",
    examples=({}, {"delta": 0.1}),
    tune={"delta": (0.03, 0.1, 0.3, 1.0)},
    limits={"mse_loss": {"delta": 1e6}},
)
def pseudo_huber_loss(
    input: Float[Tensor, "*batch"], target: Float[Tensor, "*batch"], *, delta: Float[Tensor, "*batch"] | float = 1.0
) -> Float[Tensor, "*batch"]:
    """2 delta^2 (sqrt(1 + r^2 / delta^2) - 1), r = input - target: r^2 for small residuals, 2 delta |r| for large.

    Args:
        input: predictions.
        target: numbers of the same shape.
        delta: where the loss turns from squared to absolute, > 0; a tensor broadcasts over `input`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or delta that is not above 0.

    >>> import torch
    >>> pseudo_huber_loss(torch.tensor([0.75, 100.0]), torch.zeros(2))  # 2 (5/4 - 1), then about 200
    tensor([  0.5000, 198.0100])
    """
    require.floating("input", input)
    require.same_shape("target", target, tuple(input.shape))
    require.number("delta", delta, above=0.0)
    residual = input - target
    return 2 * residual.square() / (1 + (1 + (residual / delta).square()).sqrt())  # exact where r << delta


def exponential_delta(time: Float[Tensor, "*batch"], *, smallest: float = 0.1) -> Float[Tensor, "*batch"]:
    """The paper's schedule, smallest^time: 1 at the clean end, `smallest` in pure noise.

    Args:
        time: 0, data, to 1, noise; a scheduler's step over its number of training steps.
        smallest: delta at time 1, above 0 and at most 1.

    Raises:
        ValueError: a dtype that is not floating, or `smallest` out of range.

    >>> import torch
    >>> exponential_delta(torch.tensor([0.0, 0.5, 1.0]), smallest=0.01)
    tensor([1.0000, 0.1000, 0.0100])
    """
    require.floating("time", time)
    require.number("smallest", smallest, above=0.0, at_most=1.0)
    return smallest**time


def snr_delta(ratio: Float[Tensor, "*batch"], *, smallest: float = 0.1) -> Float[Tensor, "*batch"]:
    """The same ends by noise level, so that it means the same under every schedule of noise.

    (1 - smallest) / (1 + ratio)^2 + smallest.

    Args:
        ratio: sigma / alpha of the noised data, >= 0.
        smallest: delta in pure noise, above 0 and at most 1.

    Raises:
        ValueError: a dtype that is not floating, or `smallest` out of range.

    >>> import torch
    >>> snr_delta(torch.tensor([0.0, 1.0, torch.inf]), smallest=0.2)
    tensor([1.0000, 0.4000, 0.2000])
    """
    require.floating("ratio", ratio)
    require.number("smallest", smallest, above=0.0, at_most=1.0)
    return (1 - smallest) / (1 + ratio).square() + smallest


def scheduled_pseudo_huber_loss(
    input: Float[Tensor, "*batch_and_data"],
    target: Float[Tensor, "*batch_and_data"],
    *,
    delta: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """`pseudo_huber_loss` with a delta for each sample, its mean over the sample's entries: shaped as `delta`.

    Args:
        input: the network's prediction.
        target: the noise, v or whatever it is to predict.
        delta: of the leading dimensions, by `exponential_delta` or `snr_delta`.

    Raises:
        ValueError: shapes that do not fit.

    >>> import torch
    >>> noise, delta = torch.tensor([[0.75, 0.0], [0.75, 0.0]]), torch.tensor([1.0, 0.25])
    >>> scheduled_pseudo_huber_loss(torch.zeros(2, 2), noise, delta=delta)
    tensor([0.2500, 0.1351])
    """
    require.floating("input", input)
    require.same_shape("delta", delta, tuple(input.shape[: delta.ndim]))
    values = pseudo_huber_loss(input, target, delta=over(delta, input))
    return values.flatten(delta.ndim).mean(-1) if values.ndim > delta.ndim else values
