"""Second-order scoring rules: no loss that sees one outcome can pay a forecaster for telling its ignorance.

A forecaster that predicts a distribution Q over class probabilities theta would be honest if its expected loss were
least for the true P. But nature shows an outcome, not theta, and outcomes depend on P through its mean alone: two P
of one mean and different spread give every Q the same expected loss, so one of them is misreported. The log score of
the mean still brings out the mean, as proper scores do. `check_second_order_propriety` says which spread a loss pays
for: none, any, or one that its own constants fix. Give it your evidential loss before you read precisions off a
network. The proof ends where theta can be seen more than once: two outcomes of the same theta are enough, which the
check shows too (draws=2).
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="On Second-Order Scoring Rules for Epistemic Uncertainty Quantification",
    year=2023,
    url="https://proceedings.mlr.press/v202/bengs23a.html",
    departs=(
        "P and Q are Dirichlets; the theorems hold for any distributions",
        "several outcomes of one theta (draws) are not in the paper: they show that a faithful loss would be found",
        "built from the abstract and a derivation; the paper's own proofs were not read",
    ),
    equation=(
        r"\mathbb E_{\theta\sim P}\,\mathbb E_{y\sim\theta}\bigl[S(Q,y)\bigr] "
        r"=\sum_k\mathbb E_P[\theta_k]\,S(Q,k)\qquad\text{depends on }P\text{ through its mean alone}"
    ),
)

_SAME = 1e-9


def second_order_expected_score(
    loss: Callable[[Tensor, Tensor], Tensor],
    input: Float[Tensor, "*batch classes"],
    truth: Float[Tensor, "*#batch classes"],
    *,
    draws: int = 1,
) -> Float[Tensor, "*batch"]:
    """The mean of loss(input, y) where theta is drawn from Dir(truth) and y, or each of several, from theta.

    With one draw it is sum_k truth_k / truth_0 loss(input, k): what else `truth` says than its mean is lost. The
    expectation is exact, a sum over all classes**draws outcomes.

    Args:
        loss: loss(input, target), per sample, on logits; target is (*batch) class numbers, with more draws than one
            (*batch, draws).
        input: logits.
        truth: alpha of the true second-order distribution, above 0; broadcast against `input`.
        draws: how many outcomes of one theta the loss sees, at least 1.

    Raises:
        ValueError: arguments that are no floating-point tensors, or whose last dimensions differ; draws below 1.

    >>> import torch
    >>> from lossary.uncertainty import outer_loss
    >>> forecast = torch.tensor([1.0, 1.0, 2.0]).log()
    >>> truth = torch.tensor([[1.0, 1.0, 2.0], [50.0, 50.0, 100.0]])
    >>> second_order_expected_score(outer_loss, forecast, truth)  # blind to the truth's precision: 1.5 log 2
    tensor([1.0397, 1.0397])
    """
    require.floating("input", input, at_least_dims=1)
    require.floating("truth", truth, at_least_dims=1)
    require.whole("draws", draws, at_least=1)
    classes = input.shape[-1]
    if truth.shape[-1] != classes:
        raise ValueError(f"truth: expected {classes} classes last, got shape {tuple(truth.shape)}")
    outcomes = torch.cartesian_prod(*[torch.arange(classes, device=input.device)] * draws).view(-1, draws)
    rows = input.unsqueeze(-2).expand(*input.shape[:-1], len(outcomes), classes)
    target = outcomes.squeeze(1) if draws == 1 else outcomes
    values = loss(rows, target.expand(*input.shape[:-1], *target.shape))
    return (_probability(truth, outcomes) * values).sum(-1)


def check_second_order_propriety(
    loss: Callable[[Tensor, Tensor], Tensor],
    mean: Sequence[float],
    *,
    precisions: Sequence[float] = (2.0, 10.0, 100.0),
    draws: int = 1,
) -> tuple[str, tuple[float, ...]]:
    """Which precision a loss pays for, when the true one is each of several and the mean is known.

    For every true precision the expected score of Dir(c mean) is computed for c from 0.01 to a million, in steps of
    six per cent, and the best c is taken.

    Args:
        loss: loss(input, target), per sample, on logits that are the logarithms of alpha; see
            `second_order_expected_score`.
        mean: true class probabilities, above 0, adding up to 1.
        precisions: alpha_0 of the truths, above 0.
        draws: how many outcomes of one theta the loss sees.

    Returns:
        A verdict, and the best precision for each truth, NaN where all are as good. The verdict is "faithful" (the
        truth, to a step), "indifferent" (all precisions cost the same), "certainty" or "ignorance" (the more, or the
        less, the better), "fixed" (the loss has a favourite of its own) or "unfaithful" (none of these).

    Raises:
        ValueError: a mean or precisions other than these, draws below 1.

    >>> from functools import partial
    >>> from lossary.uncertainty import inner_loss
    >>> check_second_order_propriety(inner_loss, (0.3, 0.7))[0]
    'certainty'
    >>> verdict, best = check_second_order_propriety(partial(inner_loss, kl_weight=0.1), (0.3, 0.7))
    >>> verdict, [round(c) for c in best]  # the least at this mean; at its own it is 2 + 1 / 0.1
    ('fixed', [13, 13, 13])
    """
    if len(mean) < 2 or not all(p > 0 for p in mean) or abs(sum(mean) - 1) > 1e-6:
        raise ValueError(f"mean: expected at least two probabilities above 0 that add up to 1, got {tuple(mean)}")
    if not precisions:
        raise ValueError("precisions: expected at least one, got none")
    for precision in precisions:
        require.number("precisions", precision, above=0.0)
    m = torch.tensor(mean, dtype=torch.float64)
    truths = torch.tensor(precisions, dtype=torch.float64)
    grid = torch.logspace(-2, 6, 321, dtype=torch.float64)
    input = (grid.unsqueeze(-1) * m).log()
    scores = torch.stack([second_order_expected_score(loss, input, c * m, draws=draws) for c in truths])
    if ((scores.amax(1) - scores.amin(1)) <= _SAME * (1 + scores.abs().amax(1))).all():
        return "indifferent", (math.nan,) * len(truths)
    where = scores.argmin(1)
    best = grid[where]
    step = (grid[1] / grid[0]).log() * (1 + _SAME)
    if (where == len(grid) - 1).all():
        verdict = "certainty"
    elif (where == 0).all():
        verdict = "ignorance"
    elif ((best / truths).log().abs() <= step).all():
        verdict = "faithful"
    else:
        verdict = "fixed" if (where == where[0]).all() else "unfaithful"
    return verdict, tuple(best.tolist())


def _probability(truth: Tensor, outcomes: Tensor) -> Tensor:
    """Of each sequence of outcomes, by Polya's urn: prod_i (alpha_{y_i} + earlier ones like y_i) / (alpha_0 + i)."""
    earlier = (outcomes.unsqueeze(2) == outcomes.unsqueeze(1)).tril(-1).sum(2)
    total = truth.sum(-1, keepdim=True).unsqueeze(-1) + torch.arange(outcomes.shape[1], device=truth.device)
    found: Tensor = ((truth[..., outcomes] + earlier) / total).prod(-1)
    return found
