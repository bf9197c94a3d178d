"""Five views of how well an example is represented in the data: prototypes, memorised ones and rare kinds.

An example is well represented if (adv) it takes a large change to alter the prediction, (ret) retraining on other
data leaves its prediction alone, (agr) independently trained models agree on it, (conf) they are sure of it, or
(priv) even training with strong differential privacy, which cannot memorise, gets it right. The views mostly
agree; where they do not they tell something. High in all: a prototype. High conf but low priv: memorised, often
mislabelled. Low agr with the rest high: a rare kind. Use them to look through a data set, or to order or choose what
to train on. Every score here is higher for the better represented, and only its order has a meaning:
`rank_percentile` makes scores comparable. conf and agr cost an ensemble, ret a second training, priv a dozen.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Distribution Density, Tails, and Outliers in Machine Learning: Metrics and Applications",
    year=2019,
    helps=("label-noise",),
    departs=(
        "adv finds its perturbations with DeepFool and a line search, not with Carlini and Wagner's attack",
        "the trainings (retraining, ensembles, differential privacy) are the caller's; the scores take their outputs",
        "ret and agr are negated, so that a higher score always means better represented",
        "the paper's text was not at hand, only its abstract and reports of it",
    ),
    equation=(
        r"\begin{aligned} "
        r"\mathrm{adv}&=\min\{\lVert r\rVert_2:\hat y(x+r)\ne\hat y(x)\},& "
        r"\mathrm{ret}&=-\operatorname{KL}(p\,\|\,q)-\operatorname{KL}(q\,\|\,p)\\ "
        r"\mathrm{agr}&=-\operatorname*{mean}_{a<b}\,\operatorname{JS}(p_a,p_b),& "
        r"\mathrm{conf}&=\operatorname*{mean}_a\,\max_k p_{a,k}\\ "
        r"\mathrm{priv}&=-\min\{\varepsilon:\text{half of the runs are right}\},& "
        r"p,q&:\ \text{before and after retraining} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/1910.13427",
)


def adversarial_distance_score(
    model: Callable[[Tensor], Tensor],
    input: Float[Tensor, "batch ..."],
    *,
    steps: int = 50,
    candidates: int = 10,
) -> Float[Tensor, " batch"]:
    """adv: length |r|_2 of a smallest change found that alters the prediction, argmax model(x + r). An upper bound.

    DeepFool (Moosavi-Dezfooli et al., 2016): step to the nearest decision boundary of the linearised model until
    the prediction changes; then a bisection of the way there. Exact for linear models.

    Args:
        model: maps inputs to logits (batch, classes), in its present mode: call `eval` first.
        input: the examples.
        steps: linearisations, at most.
        candidates: number of classes that are looked at, the likeliest ones.

    Returns:
        Infinity where no change was found.

    Raises:
        ValueError: input that is not floating point, a number of steps below 1 or of candidates below 2.

    >>> identity = torch.nn.Identity()
    >>> adversarial_distance_score(identity, torch.tensor([[3.0, 1.0, 0.0]]))  # as far as the plane x_0 = x_1
    tensor([1.4142])
    """
    require.floating("input", input, at_least_dims=2)
    require.whole("steps", steps, at_least=1)
    require.whole("candidates", candidates, at_least=2)
    start, shape = input.detach().flatten(1), input.shape[1:]

    def logits(rows: Tensor) -> Tensor:
        return model(rows.view(-1, *shape))

    with torch.no_grad():
        first = logits(start)
    likeliest = first.topk(min(candidates, first.shape[-1])).indices
    predicted, rivals = likeliest[:, 0], likeliest[:, 1:]
    end, pending = start.clone(), torch.arange(len(start), device=start.device)
    for _ in range(steps):
        end[pending] = _past_nearest_boundary(logits, end[pending], predicted[pending], rivals[pending])
        with torch.no_grad():
            pending = pending[logits(end[pending]).argmax(-1) == predicted[pending]]
        if not len(pending):
            break
    return _crossing(logits, start, end, predicted).index_fill(0, pending, torch.inf)


@torch.no_grad()
def holdout_retraining_score(
    before: Float[Tensor, "*models batch classes"], after: Float[Tensor, "*models batch classes"]
) -> Float[Tensor, " batch"]:
    """ret: minus the symmetric divergence KL(p, q) + KL(q, p) of predictions before and after retraining, in nats.

    Train on the data that are to be scored, note the logits, fine-tune on held-out data, note them again.

    Args:
        before: logits; with several models in front, scores are averaged.
        after: the same after retraining.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> holdout_retraining_score(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]))  # -2 (0.8808 - 0.5)
    tensor([-0.7616])
    """
    require.floating("before", before, at_least_dims=2)
    require.same_shape("after", after, before.shape)
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return -divergence.reshape(-1, before.shape[-2]).mean(0)


@torch.no_grad()
def ensemble_agreement_score(input: Float[Tensor, "models batch classes"]) -> Float[Tensor, " batch"]:
    """agr: minus the mean Jensen-Shannon divergence of the predictions of two models, over all pairs. -log 2 to 0.

    Args:
        input: logits of at least two models trained on the same data.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> ensemble_agreement_score(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]], [[9.0, -9.0]]]))  # two pairs of three
    tensor([-0.4621])
    """
    require.floating("input", input, dims=3)
    if len(input) < 2:
        raise ValueError(f"input: expected logits of at least two models, got shape {tuple(input.shape)}")
    p = input.softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    total = torch.zeros_like(entropy[0])
    for k in range(1, len(p)):
        mixed = torch.special.entr((p[k] + p[:k]) / 2).sum(-1)
        total += (mixed - (entropy[k] + entropy[:k]) / 2).sum(0)
    return -total / (len(p) * (len(p) - 1) / 2)


@torch.no_grad()
def model_confidence_score(input: Float[Tensor, "models batch classes"]) -> Float[Tensor, " batch"]:
    """conf: mean over models of the largest probability, 1 / classes to 1.

    Args:
        input: logits of at least one model.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> model_confidence_score(torch.tensor([[[0.0, 0.0]], [[20.0, 0.0]]]))
    tensor([0.7500])
    """
    require.floating("input", input, dims=3)
    if not len(input):
        raise ValueError(f"input: expected logits of at least one model, got shape {tuple(input.shape)}")
    return input.softmax(-1).amax(-1).mean(0)


@torch.no_grad()
def privacy_training_score(
    input: Float[Tensor, "budgets runs batch classes"], target: Int[Tensor, " batch"], *, budgets: Sequence[float]
) -> Float[Tensor, " batch"]:
    """priv: minus the smallest privacy budget at which at least half of the runs classify the example correctly.

    Args:
        input: logits of models that were trained with DP-SGD, a few runs at each budget.
        target: class numbers, 0 to classes - 1.
        budgets: epsilon of each level, increasing; or what grows with it, such as 1 / noise multiplier, as only the
            order matters.

    Returns:
        Minus infinity where no budget suffices.

    Raises:
        ValueError: shapes or dtypes that do not fit, budgets that do not increase.

    >>> right, wrong = torch.tensor([[[5.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]])
    >>> privacy_training_score(torch.stack([wrong, right, right]), torch.tensor([0]), budgets=(0.5, 1.0, 8.0))
    tensor([-1.])
    """
    require.floating("input", input, dims=4)
    if not (input.shape[0] and input.shape[1]):
        raise ValueError(f"input: expected logits of at least one budget and run, got shape {tuple(input.shape)}")
    require.classes(input[0, 0], target)
    if len(budgets) != len(input) or any(low >= high for low, high in pairwise(budgets)):
        raise ValueError(f"budgets: expected {len(input)} increasing numbers, one for each level, got {budgets}")
    enough = (input.argmax(-1) == target).to(input.dtype).mean(1) >= 0.5
    cost = input.new_tensor(budgets).unsqueeze(-1)
    return -torch.where(enough, cost, torch.inf).amin(0)


def rank_percentile(score: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Share of the examples that score lower, those that score the same counting half: above 0, below 1.

    Args:
        score: any of the scores, infinities allowed.

    Raises:
        ValueError: not a floating-point vector.

    >>> rank_percentile(torch.tensor([0.3, 7.0, 0.3, -torch.inf]))
    tensor([0.5000, 0.8750, 0.5000, 0.1250])
    """
    require.floating("score", score, dims=1)
    ordered = score.sort().values
    ends = torch.searchsorted(ordered, score, right=False) + torch.searchsorted(ordered, score, right=True)
    return (ends / (2 * len(score))).to(score.dtype)


def _past_nearest_boundary(
    logits: Callable[[Tensor], Tensor], rows: Tensor, predicted: Tensor, rivals: Tensor
) -> Tensor:
    """Rows moved a little past the nearest boundary of the predicted class with a rival, were the model linear."""
    rows = rows.requires_grad_()
    with torch.enable_grad():
        z = logits(rows)
        leads = z.gather(-1, predicted.unsqueeze(-1)) - z.gather(-1, rivals)
        slopes = torch.stack([torch.autograd.grad(lead.sum(), rows, retain_graph=True)[0] for lead in leads.T], 1)
    length = slopes.norm(dim=-1)
    way, nearest = torch.where(length > 0, leads.detach() / length, torch.inf).min(-1, keepdim=True)
    direction = slopes.take_along_dim(nearest.unsqueeze(-1), 1).squeeze(1) / length.gather(-1, nearest)
    return rows.detach() - torch.where(way.isfinite(), (1.02 * way + 1e-4) * direction, 0)


@torch.no_grad()
def _crossing(logits: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, predicted: Tensor) -> Tensor:
    """Distance from the start, on the way to the end, at which the prediction changes."""
    low, high = start.new_zeros(len(start), 1), start.new_ones(len(start), 1)
    for _ in range(20):
        middle = (low + high) / 2
        same = (logits(start + middle * (end - start)).argmax(-1) == predicted).unsqueeze(-1)
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    length: Tensor = high.squeeze(-1) * (end - start).norm(dim=-1)
    return length
