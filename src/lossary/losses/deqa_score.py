"""DeQA-Score: regress a score with level tokens by teaching how likely each level is, not which one is nearest.

People's ratings of a thing have a mean and a spread. Instead of rounding the mean to one of five levels, the mass of
the rating distribution on each level becomes a soft label whose mean is the score itself, and the model's mean over
levels is its answer, its spread the disagreement to expect. Where data sets rate on scales of their own, a fidelity
loss asks only that within each set the odds of one thing being rated above another come out right. Take it when a
classifier or language model has to give scores and ratings come with a spread. With plain numbers and a network that
may end in a number, ordinary regression is simpler. The fidelity loss alone does not fix the scale: add it to another.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Teaching Large Language Models to Regress Accurate Image Quality Scores using Score Distribution",
    year=2025,
    helps=("uncertainty",),
    departs=(
        "all pairs of a batch are compared, where the official code draws one partner for each image",
        "levels run from the lowest score to the highest; the official code has them the other way round",
        "at the middle score the official code's linear map is 0/0 and makes the label uniform; here it is the limit",
        "no language model: level tokens are the classes of whatever model is trained",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=-\sum_i p_i\log q_i,\qquad "
        r"p_i=\max\Bigl(0,\;a\int_{i-1/2}^{i+1/2}\mathcal N(s;\mu,\sigma^2)\,ds+b\Bigr)\\ "
        r"&\text{with }a,b\text{ such that before the cut } "
        r"\textstyle\sum_i p_i=1,\ \sum_i i\,p_i=\mu;\quad "
        r"\mu,\sigma\text{ of the ratings},\ q\text{ predicted} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/html/2501.11561v2",
)

_TIE = 1e-8  # added to variances, so that a pair without any spread is undecided or decided, not 0/0


def score_to_soft_label(
    mean: Float[Tensor, "*batch"],
    std: Float[Tensor, "*batch"],
    *,
    levels: int = 5,
    density: str = "cdf",
    min_std: float = 0.2,
    max_shift: float = 0.1,
) -> Float[Tensor, "*batch levels"]:
    """Probabilities of the levels 1, 2, ... for a score with a spread. Without gradient.

    The mass of N(mean, std^2) within half a level of each centre, or its density there, becomes
    p_i = max(a raw_i + b, 0), with a and b such that before cutting off the sum is 1 and the mean is `mean`. Where
    that cannot be had, because the spread is small against a level or cutting off moves the mean, the label falls on
    the two levels next to the score, in proportion to their nearness. What is cut off is not made up for, as in the
    official code: the sum then exceeds 1 by a few hundredths at most.

    Train the position of the level token with `torch.nn.functional.cross_entropy(logits, label)`, which is KL up to a
    constant; the official code weighs it by 0.05 against a fidelity loss of weight 1.

    Args:
        mean: scores between 1 and `levels`; map a scale [low, high] by 1 + (levels - 1) (s - low) / (high - low), and
            its spread by the same factor. Scores beyond the ends count as the ends.
        std: spread of the ratings on that scale, at least 0.
        levels: how many, at least 2.
        density: "cdf", the mass, or "pdf", the density at the centre, which the official code prefers for data sets
            with wide spreads.
        min_std: below it the two nearest levels are used, above 0.
        max_shift: as soon as the mean moves further than this, likewise; at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> import torch
    >>> score_to_soft_label(torch.tensor([3.0, 4.25]), torch.tensor([0.5, 0.0]))
    tensor([[0.0000, 0.1567, 0.6897, 0.1567, 0.0000],
            [0.0000, 0.0000, 0.0000, 0.7500, 0.2500]])
    """
    require.floating("mean", mean)
    require.same_shape("std", std, tuple(mean.shape))
    require.whole("levels", levels, at_least=2)
    require.one_of("density", density, ("cdf", "pdf"))
    require.number("min_std", min_std, above=0.0)
    require.number("max_shift", max_shift, at_least=0.0)
    with torch.no_grad():
        score = mean.double().clamp(1, levels).unsqueeze(-1)
        spread = std.double().clamp_min(min_std).unsqueeze(-1)
        centre = torch.arange(1, levels + 1, dtype=torch.float64, device=mean.device)
        middle = (1 + levels) / 2

        def raw(score: Tensor) -> Tensor:
            z, half = (centre - score) / spread, 0.5 / spread
            mass: Tensor = torch.special.ndtr(z + half) - torch.special.ndtr(z - half)
            return mass if density == "cdf" else (-z * z / 2).exp()

        # At the middle score both sides of the equation for a vanish; a step aside they give its limit to 1e-8.
        aside = torch.where((score - middle).abs() < 1e-4, middle + 1e-4, score)
        a = (aside - middle) / (raw(aside) @ (centre - middle)).unsqueeze(-1)
        p = a * raw(score)
        p = (p + (1 - p.sum(-1, keepdim=True)) / levels).clamp_min(0)
        moved = (p @ centre - score.squeeze(-1)).abs()
        nearest = (1 - (centre - score).abs()).clamp_min(0)
        label = torch.where(((std < min_std) | ~(moved <= max_shift)).unsqueeze(-1), nearest, p)
        return label.to(mean.dtype)


def soft_label_to_score(
    probs: Float[Tensor, "*batch levels"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Mean and standard deviation of a score whose levels 1, 2, ... have these probabilities.

    Args:
        probs: of the levels, lowest score first, summing to 1: a softmax over the level tokens' logits alone.

    Raises:
        ValueError: not a floating-point tensor, or fewer than two levels.

    >>> import torch
    >>> soft_label_to_score(torch.tensor([0.0, 0.0, 0.0, 0.75, 0.25]))
    (tensor(4.2500), tensor(0.4330))
    """
    require.floating("probs", probs, at_least_dims=1)
    if probs.shape[-1] < 2:
        raise ValueError(f"probs: expected at least two levels last, got shape {tuple(probs.shape)}")
    centre = torch.arange(1, probs.shape[-1] + 1, dtype=probs.dtype, device=probs.device)
    mean = probs @ centre
    variance = (probs * (centre - mean.unsqueeze(-1)) ** 2).sum(-1)
    return mean, variance.clamp_min(torch.finfo(probs.dtype).tiny).sqrt()


def thurstone_fidelity_loss(
    input: Float[Tensor, "*replicas batch"],
    target: Float[Tensor, "*replicas batch"],
    *,
    input_std: float | Tensor = 1.0,
    target_std: float | Tensor = 1.0,
    group: Int[Tensor, "*replicas batch"] | None = None,
) -> Float[Tensor, "*replicas batch"]:
    """1 - sqrt(P Q) - sqrt((1 - P) (1 - Q)), mean over each sample's partners of the same group. From 0 to 1.

    Thurstone's model: sample i is rated above j with probability Q = Phi((s_i - s_j) / sqrt(d_i^2 + d_j^2)); P is the
    same of the predictions. It is 0 where both agree on every pair. It is blind to a shift of all scores in a group,
    hence to be added to a loss that is not. Memory is batch^2; a sample without partner gets 0.

    Args:
        input: predicted scores.
        target: given scores s, in units of their own for each group.
        input_std: spread of the predictions, as `soft_label_to_score` gives it, or a number; the official training
            keeps it at 1.
        target_std: spread d of the ratings, likewise; 0 takes the given order for certain.
        group: number of the data set that a sample belongs to; None is one for all.

    Raises:
        ValueError: shapes or dtypes that do not fit, a spread below 0.

    >>> import torch
    >>> thurstone_fidelity_loss(torch.tensor([1.0, 1.0, 7.0]), torch.tensor([2.0, 4.0, 0.0]), target_std=0.0,
    ...     group=torch.tensor([0, 0, 1]))  # 1 - sqrt(1/2) for the pair, nothing for the loner
    tensor([0.2929, 0.2929, 0.0000])
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("target", target, tuple(input.shape))
    above = _root_probability(input, _spread("input_std", input_std, input))
    with torch.no_grad():
        given = _root_probability(target, _spread("target_std", target_std, target))
    loss = 1 - above * given - above.mT * given.mT
    partner = ~torch.eye(input.shape[-1], dtype=torch.bool, device=input.device)
    if group is not None:
        require.integers("group", group, shape=tuple(input.shape))
        partner = partner & (group.unsqueeze(-1) == group.unsqueeze(-2))
    partners = partner.sum(-1).clamp_min(1)
    values: Tensor = torch.where(partner, loss, 0).sum(-1) / partners
    return values.to(input.dtype)


def _spread(name: str, value: float | Tensor, scores: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        require.number(name, value, at_least=0.0)
        return scores.new_full((), value).expand(scores.shape)
    if value.shape not in ((), scores.shape) or not value.is_floating_point():
        wanted = f"a number or a floating-point tensor of shape {tuple(scores.shape)}"
        raise ValueError(f"{name}: expected {wanted}, got {value.dtype} of shape {tuple(value.shape)}")
    return value.expand(scores.shape)


def _root_probability(score: Tensor, std: Tensor) -> Float[Tensor, "*replicas batch batch"]:
    """sqrt of the probability that the row's sample is rated above the column's; its gradient stays finite at 0."""
    variance = std.float().square() if std.dtype in (torch.bfloat16, torch.float16) else std.square()
    pair = (variance.unsqueeze(-1) + variance.unsqueeze(-2) + _TIE).sqrt()
    root: Tensor = (torch.special.log_ndtr((score.unsqueeze(-1) - score.unsqueeze(-2)) / pair) / 2).exp()
    return root
