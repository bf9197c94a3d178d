"""EnsLoss: every batch is trained with a random loss, convex and calibrated, of which only the slopes are ever drawn.

Gradient descent sees a margin loss phi(y f(x)) through its derivative alone. So it is enough to draw, for every batch,
one number for each margin, to put them into the order of the margins (phi is convex) and to keep them below 0 (phi is
calibrated: it leads to the most accurate classifier). As with dropout the noise keeps a network from fitting its
training set to the last label. Try it on binary tasks with a network that overfits, wrong labels or few of them, with
the learning rate and length of training that you have. It takes batches of some size, say 32 or more, since a loss is
seen at as many points as there are samples. The outputs rank and classify; they are no probabilities, as no single
loss stands behind them. And there is no curve to watch: the value has the right gradient and means nothing.
"""

from jaxtyping import Float
from torch import Generator, Tensor, float32, nn, no_grad, randn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification",
    year=2024,
    helps=("overfitting", "label-noise"),
    departs=(
        "the draws come from a generator of the caller's; the official code takes them from the global one",
        "the schedule that draws lam anew every few epochs, off in the published configurations, is the caller's",
    ),
    equation=(
        r"\begin{aligned} "
        r"\frac{\partial\ell_i}{\partial f(x_i)}&=y_i\,g_i,\qquad "
        r"g_i=-\frac{\min(1,e^{\xi_i})}{\max(1,s_i)}-10^{-6},\qquad s_i=y_i f(x_i)\\ "
        r"&\xi_i\sim\mathcal N(0,1),\ \text{dealt out so that }s_i\le s_j\Rightarrow\xi_i\ge\xi_j "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2409.00908",
)


def inverse_box_cox(input: Float[Tensor, "*any"], *, lam: float = 0.0) -> Float[Tensor, "*any"]:
    """exp(z) for lam = 0, otherwise max(1 + lam z, 0)^(1 / lam), which tends to it: never negative, of any shape.

    Args:
        input: z. For lam < 0 the result is infinite from z = -1 / lam on.
        lam: 1 cuts at -1 and is linear; the smaller, the heavier the upper tail.

    Raises:
        ValueError: an input that is not floating-point, or lam not a finite number.

    >>> import torch
    >>> inverse_box_cox(torch.tensor([-3.0, 0.0, 4.0]), lam=0.5)  # (1 + z / 2)^2, cut at 0
    tensor([0., 1., 9.])
    """
    require.floating("input", input)
    _check(lam)
    if lam == 0.0:
        return input.exp()
    return ((lam * input).clamp_min(-1).log1p() / lam).exp()


@no_grad()
def random_calibrated_derivatives(
    margin: Float[Tensor, "*batch"], *, generator: Generator, lam: float = 0.0
) -> Float[Tensor, "*batch"]:
    """phi'(s) at every margin s, of a random loss phi that is convex and calibrated.

    As many values -BCinv(e; lam) as there are margins, e standard normal, are floored at -1 and dealt out in ascending
    order, the smallest margin getting the smallest. Beyond s = 1 they are divided by s, so that phi falls only like a
    logarithm, and all are lowered by 1e-6, so that none is 0. The result lies in [-1 - 1e-6, -1e-6], carries no
    gradient, and does not decrease in s.

    Args:
        margin: s = y f(x) with y in {-1, +1}; all of them are one batch, whatever the shape.
        generator: of the draws, on any device.
        lam: of `inverse_box_cox`; the smaller, the more of the values are at -1 or near 0.

    Raises:
        ValueError: a margin that is not floating-point, or lam not a finite number.

    >>> import torch
    >>> random_calibrated_derivatives(torch.tensor([2.0, -1.0, 0.5]), generator=torch.Generator().manual_seed(0))
    tensor([-0.0566, -1.0000, -0.7457])
    """
    require.floating("margin", margin)
    draws = randn(margin.numel(), generator=generator, device=generator.device, dtype=float32)
    sizes = inverse_box_cox(draws, lam=lam).clamp_max(1).sort(descending=True).values.to(margin)
    flat = margin.flatten()
    dealt = sizes.new_empty(sizes.shape).scatter_(0, flat.argsort(), -sizes)  # the smallest margin gets the steepest
    return (dealt / flat.clamp_min(1) - 1e-6).view(margin.shape)


class EnsLoss(nn.Module):
    """Called as loss(logit, target), like `torch.nn.BCEWithLogitsLoss`: a fresh random loss at every call.

    The value of a sample is phi'(s) s with phi'(s) from `random_calibrated_derivatives`, held fixed: per sample, not
    reduced, and with the gradient phi'(s) y by the logit. It is not phi(s), and may fall while the classifier gets
    worse: watch the accuracy instead. Second derivatives are 0. All samples of a call are one batch.
    `Criterion(EnsLoss(generator=g), class_dim=None)` takes the mean.

    The published configurations keep lam = 0. To draw it too, as the official code can, set the attribute between
    epochs, for instance `loss.lam = rng.uniform(-1, 1)`.

    Args:
        generator: of the draws; its state is the caller's to save.
        lam: of `inverse_box_cox`, an attribute that may be changed at any time.

    Raises:
        ValueError: lam not a finite number; a logit that is not floating-point, or a target of another shape or dtype.

    >>> import torch
    >>> loss = EnsLoss(generator=torch.Generator().manual_seed(0))
    >>> logit = torch.tensor([2.0, 1.0, 0.5], requires_grad=True)
    >>> loss(logit, torch.tensor([1.0, 0.0, 1.0])).sum().backward()
    >>> logit.grad  # the second is on the wrong side, and pushed down
    tensor([-0.0566,  1.0000, -0.7457])
    """

    def __init__(self, *, generator: Generator, lam: float = 0.0) -> None:
        super().__init__()
        _check(lam)
        self.generator, self.lam = generator, lam

    def forward(self, logit: Float[Tensor, "*batch"], target: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Apply a new random loss to logits f(x), with target 1 or 0 in the logits' shape."""
        require.floating("logit", logit)
        require.same_shape("target", target, tuple(logit.shape))
        margin = (2 * target - 1) * logit
        return random_calibrated_derivatives(margin, generator=self.generator, lam=self.lam) * margin

    def extra_repr(self) -> str:
        return f"lam={self.lam}"


def _check(lam: float) -> None:
    if isinstance(lam, Tensor):
        raise ValueError("lam: expected a number, got a tensor; what is drawn passes no gradient back to it")
    require.number("lam", lam)
