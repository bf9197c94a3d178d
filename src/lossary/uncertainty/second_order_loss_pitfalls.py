"""Pitfalls of second-order losses: what a network says about its own ignorance is not learned from the data.

A second-order classifier predicts a distribution over class probabilities, such as a Dirichlet, and its spread is
meant to be what the learner does not know. Averaging a convex loss over it (the inner loss, which evidential networks
use) is least for no spread at all, however few the data; a loss of its mean (the outer loss) does not see the spread.
A KL to the flat Dirichlet restores one, but of the size that its weight asks for: with the log score it is that of
1 / weight observations. Use these parts to find out what a loss of yours rewards before you trust the uncertainty that
it gives. Strange inputs may still stand out, since a network says less where it has learned nothing; how much data
there was it does not say. What does shrink with the data is Bayes' posterior, or the disagreement of an ensemble.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import loss
from lossary.uncertainty import _dirichlet as dirichlet
from lossary.uncertainty._scoring import brier_score, log_score

PAPER = Paper(
    title="Pitfalls of Epistemic Uncertainty Quantification through Loss Minimisation",
    year=2022,
    departs=(
        "second-order distributions are Dirichlets; the theorems hold for any",
        "the log and the Brier score stand for the convex losses",
        "the closed form for the log score with a KL, 1 + frequency / weight, is derived here: with the weight 1 / n"
        " it is the Bayesian posterior, so a weight that knows n is the way out, which no fixed one is",
        "built from the abstract and a derivation; the paper's own regulariser and experiments were not read",
    ),
    equation=(
        r"\argmin_{\alpha}\ \mathbb E_{y\sim f}\, "
        r"\mathbb E_{\theta\sim\operatorname{Dir}(\alpha)}\bigl[-\log\theta_y\bigr] "
        r"+\lambda\operatorname{KL}\bigl(\operatorname{Dir}(\alpha)\,\|\,\operatorname{Dir}(1)\bigr) "
        r"=1+\frac f\lambda,\quad "
        r"f:\ \text{class shares}"
    ),
)

_SCORES = ("log", "brier")


@loss(on="classes", examples=({}, {"score": "brier"}, {"kl_weight": 0.1}), tune={"kl_weight": (0.0, 0.01, 0.1)})
def inner_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    score: str = "log",
    kl_weight: float | Tensor = 0.0,
) -> Float[Tensor, "*batch"]:
    """E[score(theta, y)] + kl_weight KL(Dir(alpha) || flat), for theta from Dir(alpha), alpha = exp(input). In nats.

    With the log score psi(alpha_0) - psi(alpha_y), with Brier's the squared error of the mean plus the variances.
    Without the KL its best alpha is infinite; with it, and the log score, 1 + (frequency of the class) / kl_weight.

    Args:
        input: logits, the logarithms of alpha; beyond +-30 they change nothing.
        target: class numbers, 0 to classes - 1.
        score: "log" or "brier".
        kl_weight: at least 0; a tensor, one for all or one for each sample, gets its gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit, another score, a weight below 0.

    >>> import torch
    >>> inner_loss(torch.tensor([[2.0, 1.0]]).log(), torch.tensor([1]))  # psi(3) - psi(1)
    tensor([1.5000])
    """
    alpha = _concentration(input, target, score, kl_weight)
    expected = dirichlet.expected_log_loss if score == "log" else dirichlet.expected_brier_loss
    return (expected(alpha, target) + _penalty(alpha, kl_weight)).to(input.dtype)


@loss(
    on="classes",
    examples=({}, {"score": "brier"}, {"kl_weight": 0.1}),
    limits={"cross_entropy": {"score": "log", "kl_weight": 0.0}},
)
def outer_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    score: str = "log",
    kl_weight: float | Tensor = 0.0,
) -> Float[Tensor, "*batch"]:
    """score(E[theta], y) + kl_weight KL(Dir(alpha) || flat), for theta from Dir(alpha), alpha = exp(input). In nats.

    The mean alpha / alpha_0 is the softmax, so without the KL the log score is cross-entropy: it says nothing about
    alpha_0, which stays where the initial weights left it.

    Args:
        input: logits, the logarithms of alpha; beyond +-30 they change nothing.
        target: class numbers, 0 to classes - 1.
        score: "log" or "brier".
        kl_weight: at least 0; a tensor, one for all or one for each sample, gets its gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit, another score, a weight below 0.

    >>> import torch
    >>> outer_loss(torch.tensor([[2.0, 1.0]]).log(), torch.tensor([1]))  # log 3
    tensor([1.0986])
    """
    alpha = _concentration(input, target, score, kl_weight)
    first_order = log_score if score == "log" else brier_score
    return (first_order(dirichlet.mean(alpha), target) + _penalty(alpha, kl_weight)).to(input.dtype)


def second_order_risk(
    loss: Callable[[Tensor, Tensor], Tensor],
    input: Float[Tensor, "*batch classes"],
    frequencies: Float[Tensor, "*#batch classes"],
) -> Float[Tensor, "*batch"]:
    """The mean of a loss over outcomes of given frequencies: sum_k frequency_k loss(input, k).

    With the shares of the classes in a sample it is the empirical risk, with their probabilities the expected one.

    Args:
        loss: loss(input, target), per sample, on logits.
        input: logits.
        frequencies: of the classes, not negative, adding up to 1; broadcast against `input`.

    Raises:
        ValueError: arguments that are no floating-point tensors, or whose last dimensions differ.

    >>> import torch
    >>> alpha, shares = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.5])
    >>> second_order_risk(inner_loss, alpha.log(), shares)  # psi(3) - (psi(2) + psi(1)) / 2
    tensor(1.0000)
    """
    require.floating("input", input, at_least_dims=1)
    require.floating("frequencies", frequencies, at_least_dims=1)
    if frequencies.shape[-1] != input.shape[-1]:
        raise ValueError(f"frequencies: expected {input.shape[-1]} classes last, got shape {tuple(frequencies.shape)}")
    return (frequencies * dirichlet.by_outcome(loss, input)).sum(-1)


def dirichlet_collapse_test(
    loss: Callable[[Tensor, Tensor], Tensor],
    counts: Int[Tensor, "*batch classes"],
    *,
    start: float = 1.0,
    steps: int = 500,
) -> tuple[Float[Tensor, "*batch classes"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Fit a Dirichlet to class counts by minimising a loss, and hold its spread against that of Bayes' posterior.

    The mean loss over the counted outcomes is minimised over logits by L-BFGS, in double precision. A loss that tells
    the truth would give variances near the posterior's, which fall as 1 / n.

    Args:
        loss: loss(input, target), per sample, on logits that are the logarithms of alpha, such as `inner_loss`. For
            others, such as those of the evidential survey, take evidence="exp" and prior=0.
        counts: of each class, whole numbers that are not negative, n > 0 in all.
        start: what every alpha_k is at the beginning, above 0.
        steps: of L-BFGS, at most; all rows are fitted together, so give it many rows at once only with more steps.

    Returns:
        alpha after the fit, (*batch, classes); the summed variances of the class probabilities under it, (*batch);
        and the same under Dir(1 + counts), the posterior after a flat prior.

    Raises:
        ValueError: counts that are no int64 tensor of two classes or more, a number out of range.

    >>> import torch
    >>> from functools import partial
    >>> counts = torch.tensor([[3, 7], [300, 700]])
    >>> alpha, fitted, bayes = dirichlet_collapse_test(partial(inner_loss, kl_weight=0.1), counts)
    >>> alpha.round()  # the same Dirichlet, whether ten were counted or a thousand
    tensor([[4., 8.],
            [4., 8.]], dtype=torch.float64)
    >>> fitted / bayes
    tensor([ 1.0000, 81.5823], dtype=torch.float64)
    """
    require.integers("counts", counts)
    if counts.ndim < 1 or counts.shape[-1] < 2:
        raise ValueError(f"counts: expected at least two classes in the last dimension, got {tuple(counts.shape)}")
    require.number("start", start, above=0.0)
    require.whole("steps", steps, at_least=1)
    frequencies = counts / counts.sum(-1, keepdim=True).double()
    input = torch.full_like(frequencies, start).log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [input], max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    @torch.enable_grad()
    def objective() -> Tensor:
        optimizer.zero_grad()
        risk = second_order_risk(loss, input, frequencies).sum()
        risk.backward(inputs=[input])
        return risk

    optimizer.step(objective)
    alpha = input.detach().clamp(-dirichlet.CAP, dirichlet.CAP).exp()
    return alpha, _variance(alpha), _variance(1.0 + counts)


def _concentration(input: Tensor, target: Tensor, score: str, kl_weight: float | Tensor) -> Tensor:
    require.classes(input, target)
    require.one_of("score", score, _SCORES)
    require.number("kl_weight", kl_weight, at_least=0.0)
    return dirichlet.concentration(input, evidence="exp", prior=0.0)


def _penalty(alpha: Tensor, kl_weight: float | Tensor) -> float | Tensor:
    free = not isinstance(kl_weight, Tensor) and kl_weight == 0
    return 0.0 if free else kl_weight * dirichlet.kl(alpha)


def _variance(alpha: Tensor) -> Tensor:
    return (1 - dirichlet.mean(alpha).square().sum(-1)) / (alpha.sum(-1) + 1)
