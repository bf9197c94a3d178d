"""Classification helps regression: predict the bin of the target too, with a second head that is dropped afterwards.

The network gets another linear layer on its last features, which tells in which of K intervals the target lies; its
cross-entropy is added to the regression's loss. The paper asks when this helps, and finds: chiefly where some values
of the target are much rarer than others and all of them count alike in the end. Squared errors then serve the
frequent values, while the bins give every value a direction of its own in the features. With evenly spread targets it
makes little difference. It has a weight and a number of bins to tune; try lam from 10 to 1000 on targets of unit
scale, K from 4 to 1024. The alternative, at no cost in training, is to draw all values of the target equally often:
`imbalanced_regression_sampler` with spread=None.
"""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.utils.data import WeightedRandomSampler

from lossary import require
from lossary.losses._softmax import log_prob
from lossary.paper import Paper

PAPER = Paper(
    title="A step towards understanding why classification helps regression",
    year=2023,
    helps=("class-imbalance",),
    departs=(
        "bins of equal frequency end at quantiles, where the official code merges the bins of a histogram and leaves"
        " some samples of large bins out of the classification",
    ),
    equation=(
        r"\ell=\lambda\,(f(x)-y)^2-\log p_{b(y)}(x),\qquad "
        r"b(y)\in\{1,\dots,K\}:\ \text{the bin in which }y\text{ lies}"
    ),
    url="https://arxiv.org/abs/2308.10603",
)


class RegressionWithClassificationLoss(nn.Module):
    """lam * (f - y)^2 + cross-entropy of the class logits with the bin in which y lies. Per sample, not reduced.

        model = nn.Linear(width, 1 + K)  # both heads in one layer
        loss = RegressionWithClassificationLoss(target_edges(y_train, K))
        out = model(features)
        loss(out[:, 0], y, class_logits=out[:, 1:]).mean().backward()

    Args:
        edges: the K - 1 inner ends of the bins, ascending, as `target_edges` gives them; kept as a buffer. A target on
            an edge belongs to the bin above; those beyond the ends belong to the first and last bin.
        lam: lambda, weight of the regression, at least 0, in nats per unit of its loss. The official code chose 100
            for clean and 1000 for noisy targets of about unit scale. A regression weighted by 1 has lam = 1 and the
            classification's weight 1 / lam.
        regression: "mse" or "l1", which is |f - y| in place of the square.

    Raises:
        ValueError: shapes or dtypes that do not fit, lam below 0, another `regression`.

    >>> loss = RegressionWithClassificationLoss(torch.tensor([0.0, 1.0]), lam=2.0)
    >>> loss(torch.tensor([0.0]), torch.tensor([0.5]), class_logits=torch.zeros(1, 3))  # 2 / 4 + log 3
    tensor([1.5986])
    """

    edges: Tensor

    def __init__(self, edges: Float[Tensor, " inner"], *, lam: float | Tensor = 100.0, regression: str = "mse") -> None:
        super().__init__()
        require.floating("edges", edges, dims=1)
        if not len(edges):
            raise ValueError("edges: expected at least one, which makes two bins, got none")
        require.number("lam", lam, at_least=0.0)
        require.one_of("regression", regression, ("mse", "l1"))
        self.register_buffer("edges", edges)
        self.lam, self.regression = lam, regression

    def forward(
        self,
        input: Float[Tensor, "*batch"],
        target: Float[Tensor, "*batch"],
        *,
        class_logits: Float[Tensor, "*batch classes"],
    ) -> Float[Tensor, "*batch"]:
        """The loss of predictions `input` with the class head's logits; a NaN target gives NaN."""
        require.floating("input", input)
        require.same_shape("target", target, tuple(input.shape))
        require.same_shape("class_logits", class_logits, (*input.shape, len(self.edges) + 1))
        miss = input - target
        error = miss.square() if self.regression == "mse" else miss.abs()
        return self.lam * error - log_prob(class_logits, torch.bucketize(target.contiguous(), self.edges, right=True))

    def extra_repr(self) -> str:
        return f"classes={len(self.edges) + 1}, lam={self.lam}, regression={self.regression!r}"


def target_edges(target: Float[Tensor, " samples"], num_bins: int, *, equal: str = "width") -> Float[Tensor, " inner"]:
    """The num_bins - 1 inner ends of bins of the target, ascending.

    Args:
        target: of the training samples.
        num_bins: K, at least 2.
        equal: what the bins have in common: "width", or "frequency", where ends that coincide, at values which occur
            often, are merged, so that there may be fewer, or none where more than 1 - 1 / K of the targets are least.

    Raises:
        ValueError: a target that is not (samples,), floating-point and of two values at least, num_bins below 2,
            another `equal`.

    >>> y = torch.tensor([0.0, 1.0, 2.0, 8.0])
    >>> target_edges(y, 2), target_edges(y, 2, equal="frequency")
    (tensor([4.]), tensor([1.5000]))
    """
    low, high = _range(target)
    require.whole("num_bins", num_bins, at_least=2)
    require.one_of("equal", equal, ("width", "frequency"))
    cuts = torch.linspace(0, 1, num_bins + 1, dtype=target.dtype, device=target.device)[1:-1]
    if equal == "width":
        return low + (high - low) * cuts
    ends = torch.quantile(target, cuts)
    return ends[ends.diff(prepend=ends.new_tensor([low])) > 0]


def imbalanced_regression_sampler(
    target: Float[Tensor, " samples"],
    *,
    generator: Generator,
    spread: float | None = None,
    centre: float | None = None,
    background: float = 0.1,
    num_bins: int = 100,
    num_draws: int | None = None,
) -> WeightedRandomSampler:
    """Draw positions, with replacement, so that the drawn targets are spread evenly, or peaked to a chosen degree.

    A share 1 - background of the draws is uniform over the targets within spread * (max - min) of the centre, the rest
    over all targets: uniform as to a histogram, each bin that is not empty being as likely as another. The paper's
    imbalances are 0.3 ("mild"), 0.1 ("moderate") and 0.03 ("severe").

    Args:
        target: of all samples.
        generator: of the draws, and of the centre where none is given.
        spread: half the width of the peak, in units of the target's range, above 0; None has no peak, and balances.
        centre: of the peak; None draws it, uniform over the target's range.
        background: 0 to 1.
        num_bins: of each of the two histograms, at least 1.
        num_draws: positions in a round, at least 1; None is as many as there are samples.

    Raises:
        ValueError: a target that is not (samples,), floating-point and of two values at least, a number out of range,
            a centre with no target within reach.

    >>> y = torch.tensor([0.0, 0.0, 0.0, 1.0])
    >>> sampler = imbalanced_regression_sampler(y, generator=torch.Generator())
    >>> sampler.weights  # the one sample at 1 is drawn as often as the three others together
    tensor([0.1667, 0.1667, 0.1667, 0.5000], dtype=torch.float64)
    """
    low, high = _range(target)
    require.number("background", background, at_least=0.0, at_most=1.0)
    require.whole("num_bins", num_bins, at_least=1)
    if num_draws is not None:
        require.whole("num_draws", num_draws, at_least=1)
    weights = _evenly(target, low, high, num_bins)
    if spread is not None:
        require.number("spread", spread, above=0.0)
        if centre is None:
            centre = low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()
        require.number("centre", centre)
        reach = spread * (high - low)
        peak = _evenly(target, centre - reach, centre + reach, num_bins)
        if not peak.any():
            raise ValueError(f"centre: expected a target within {reach:g} of it, got {centre:g} and none so near")
        weights = (1 - background) * peak + background * weights
    return WeightedRandomSampler(weights.tolist(), num_draws or len(target), generator=generator)


def _evenly(target: Tensor, low: float, high: float, num_bins: int) -> Tensor:
    """Chances of the samples that make each bin of [low, high] that is not empty as likely as another."""
    inside = (target >= low) & (target <= high)
    bin = ((target.double() - low) / (high - low) * num_bins).long().clamp(0, num_bins - 1)
    counts = torch.zeros(num_bins, dtype=torch.float64, device=target.device).index_add_(0, bin, inside.double())
    return torch.where(inside, 1 / counts[bin].clamp_min(1), 0.0) / (counts > 0).sum().clamp_min(1)


def _range(target: Tensor) -> tuple[float, float]:
    require.floating("target", target, dims=1)
    low, high = (end.item() for end in target.aminmax()) if len(target) else (0.0, 0.0)
    if not low < high:
        raise ValueError(f"target: expected two different values at least, got {len(target)} from {low:g} to {high:g}")
    return low, high
