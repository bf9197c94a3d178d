"""Human-aligned calibration: confidence that may be trusted the more, the higher it is, by whoever receives it.

A person with a confidence h of her own is told a model's confidence b that the outcome is 1. Even if b is calibrated,
P(y = 1 | h, b) need not rise with both, where she knows something that the model does not; the best use of b is then
to trust it less when it is higher, which nobody finds out. Calibrated anew at each level of h, it rises, and the best
rule is a threshold that falls with h. Use it where people decide with advice and record what they think before they
get it. `alignment_error` measures the trouble, `HumanAlignedCalibrator` removes it from a few hundred cases a level;
fewer make the advice coarse and noisy.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import TransformerTags
from sklearn.utils.validation import check_is_fitted

from lossary import require
from lossary.paper import Paper
from lossary.uncertainty._calibration import mass_edges
from lossary.uncertainty._conformal import numbers

PAPER = Paper(
    title="Human-Aligned Calibration for AI-Assisted Decision Making",
    year=2023,
    helps=("overconfidence", "uncertainty"),
    url="https://arxiv.org/abs/2306.00074",
    departs=(
        "a bin's value is its share of positives; the code of the follow-up study adds noise of 1e-10 to break ties",
        "multicalibrate_by_group moves all cells that are off at once, and each to its mean",
    ),
    equation=(
        r"\begin{aligned} "
        r"\mathrm{MAE}&=\max_{h\le h',\;b\le b'}\bigl[P(y=1\mid h,b)-P(y=1\mid h',b')\bigr]_+\\ "
        r"b&\to P\bigl(y=1\mid h,\ \text{bin of }b\text{ at level }h\bigr) "
        r"\end{aligned}"
    ),
)

Array = Any  # an array or a tensor


def alignment_error(
    confidence: Array,
    human: Array,
    outcome: Array,
    *,
    confidence_bins: int | None = 8,
    human_bins: int | None = 3,
    at_least: int = 30,
    pairs: str = "large",
) -> tuple[float, float]:
    """max(0, P(y=1 | cell) - P(y=1 | cell')) over pairs of cells with h <= h' and b <= b', each cell with itself too.

    Args:
        confidence: b (N,), the model's probability that the outcome is 1.
        human: h (N,), the person's own, before she is told b; any scale.
        outcome: y (N,), 0 or 1.
        confidence_bins: bins of b, of equal width; None takes its values as they are.
        human_bins: bins of h, alike frequent; None takes its values as they are.
        at_least: cells with fewer samples are passed over.
        pairs: what the average is over: pairs of cells that are large enough ("large", as in the follow-up study), or
            pairs of all cells ("all", as in the paper's code).

    Returns:
        Maximum (MAE) and mean over pairs (EAE), from 0 to 1; 0 where no cell is large enough.

    Raises:
        ValueError: shapes that differ, values out of range.

    >>> b, h, y = [0.2, 0.2, 0.8, 0.8], [0.1, 0.1, 0.9, 0.9], [0, 1, 0, 0]
    >>> alignment_error(b, h, y, human_bins=2, at_least=2)  # half of the lower cell, none of the higher; 3 pairs
    (0.5, 0.16666666666666666)
    """
    b, h, y = _cases(confidence, human, outcome)
    require.whole("at_least", at_least, at_least=1)
    require.one_of("pairs", pairs, ("large", "all"))
    i = np.searchsorted(_edges("human_bins", h, human_bins), h)
    if confidence_bins is None:
        j = np.unique(b, return_inverse=True)[1]
    else:
        require.whole("confidence_bins", confidence_bins, at_least=1)
        j = _of_equal_width(b, confidence_bins)
    cells, cell, counts = np.unique(np.column_stack([i, j]), axis=0, return_inverse=True, return_counts=True)
    large = counts >= at_least
    share = (np.bincount(cell, weights=y) / counts)[large]
    (i, j), (rows, columns) = cells[large].T, (i.max() + 1, confidence_bins or j.max() + 1)
    ordered = (i[:, None] <= i) & (j[:, None] <= j)
    violation = np.where(ordered, share[:, None] - share, 0.0).clip(min=0)
    number = ordered.sum() if pairs == "large" else rows * (rows + 1) * columns * (columns + 1) / 4
    return float(violation.max(initial=0.0)), float(violation.sum() / max(number, 1))


class HumanAlignedCalibrator(BaseEstimator):
    """A histogram of P(y = 1) by model's confidence for each level of human confidence: multicalibration w.r.t. h.

    Each level of h has bins of b that are alike frequent, and a case is given its bin's share of positives. On the
    cases it learned from, the result is calibrated within each level and has no alignment error.

    Args:
        confidence_bins: bins of b in each level; fewer where values tie.
        human_bins: levels of h, alike frequent; None takes its values as they are, and one that is new for the next
            above it.

    Attributes:
        human_edges_: upper ends of all levels but the last.
        edges_: by level, upper ends of all bins but the last.
        values_: by level, shares of positives in the bins.

    Raises:
        ValueError: shapes that differ, values out of range; asked before `fit` (scikit-learn's NotFittedError).

    >>> b, h, y = [0.3, 0.4, 0.7, 0.6, 0.3, 0.4, 0.6, 0.7], [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1, 1]
    >>> calibrator = HumanAlignedCalibrator(confidence_bins=2, human_bins=None).fit(b, h, y)
    >>> calibrator.transform([0.2, 0.9, 0.2, 0.9], [0, 0, 1, 1])
    array([1. , 0. , 0.5, 1. ])
    """

    def __init__(self, *, confidence_bins: int = 5, human_bins: int | None = 3) -> None:
        self.confidence_bins, self.human_bins = confidence_bins, human_bins

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags = TransformerTags()  # of two vectors at once, so that there is no fit_transform(X, y)
        tags.input_tags.one_d_array, tags.input_tags.two_d_array = True, False
        return tags

    def fit(self, confidence: Array, human: Array, outcome: Array) -> Self:
        """Learn from b (N,), h (N,) and y (N,), as `alignment_error` takes them."""
        require.whole("confidence_bins", self.confidence_bins, at_least=1)
        b, h, y = _cases(confidence, human, outcome)
        self.human_edges_ = _edges("human_bins", h, self.human_bins)
        level = np.searchsorted(self.human_edges_, h)
        self.edges_, self.values_ = [], []
        for group in range(len(self.human_edges_) + 1):
            own, positive = b[level == group], y[level == group]
            edges = mass_edges(own, self.confidence_bins)
            found = np.searchsorted(edges, own)
            self.edges_.append(edges)
            self.values_.append(np.bincount(found, weights=positive) / np.bincount(found))
        return self

    def transform(self, confidence: Array, human: Array) -> NDArray[np.float64]:
        """What to tell the person in place of b, (N,)."""
        check_is_fitted(self)
        b, h, _ = _cases(confidence, human)
        level, told = np.searchsorted(self.human_edges_, h), np.empty_like(b)
        for group, (edges, values) in enumerate(zip(self.edges_, self.values_)):
            told[level == group] = values[np.searchsorted(edges, b[level == group])]
        return told


def multicalibrate_by_group(
    confidence: Array,
    group: Array,
    outcome: Array,
    new_confidence: Array,
    new_group: Array,
    *,
    alpha: float = 0.05,
    bins: int = 10,
    at_least: int = 30,
) -> NDArray[np.float64]:
    """New confidences after steps that leave each cell (group, bin of b) within alpha of its share of positives.

    While there is a cell of at least `at_least` cases with |mean y - mean b| > alpha, add that difference to b there
    and cut b to 0 and 1. It leaves b as it is where it is right, while `HumanAlignedCalibrator` makes it a histogram.
    Each step takes at least alpha^2 a case off the squared error, which ends it. With groups that are levels of human
    confidence, the cases' maximal `alignment_error` is then at most 2 alpha + 1 / bins.

    Args:
        confidence: b (N,), 0 to 1.
        group: (N,), the group of each case; groups do not overlap.
        outcome: y (N,), 0 or 1.
        new_confidence: (M,), to be taken through the same steps.
        new_group: (M,), from the same groups.
        alpha: what is close enough, above 0.
        bins: of b, of equal width.
        at_least: cells with fewer cases are left alone.

    Returns:
        (M,) float64.

    Raises:
        ValueError: shapes that differ, values out of range, a new group that is not among the old.

    >>> b, group, y = [0.5] * 4 + [0.9] * 4, [0] * 8, [1, 1, 1, 0] + [1, 1, 1, 1]
    >>> multicalibrate_by_group(b, group, y, [0.5, 0.9], [0, 0], alpha=0.15, at_least=4)
    array([0.75, 0.9 ])
    """
    b, g, y = _cases(confidence, group, outcome, "group")
    new_b, new_g, _ = _cases(new_confidence, new_group, name="group")
    require.number("alpha", alpha, above=0.0)
    require.whole("bins", bins, at_least=1)
    require.whole("at_least", at_least, at_least=1)
    groups, row = np.unique(g, return_inverse=True)
    if not np.isin(new_g, groups).all():
        raise ValueError(f"new_group: expected groups among the {len(groups)} of group, got others too")
    new_row, cells = np.searchsorted(groups, new_g), len(groups) * bins
    while True:
        cell = row * bins + _of_equal_width(b, bins)
        counts = np.bincount(cell, minlength=cells)
        gap = np.bincount(cell, weights=y - b, minlength=cells) / counts.clip(min=1)
        step = np.where((counts >= at_least) & (np.abs(gap) > alpha), gap, 0.0)
        if not step.any():
            return new_b
        new_cell = new_row * bins + _of_equal_width(new_b, bins)
        b, new_b = (b + step[cell]).clip(0, 1), (new_b + step[new_cell]).clip(0, 1)


def best_monotone_decisions(probability: Array, mass: Array) -> NDArray[np.bool_]:
    """Of all rules that say 1 the more readily the higher h and b are, the one that is right most often.

    The most sum_ij mass_ij (d_ij p_ij + (1 - d_ij) (1 - p_ij)) over decisions d with d_ij <= d_i'j' wherever i <= i'
    and j <= j'. Such a rule is a threshold on b for each h that falls with h; dynamic programming finds the best.

    Args:
        probability: p (H, B), of the outcome 1 at the i-th human and the j-th model confidence, in rising order.
        mass: (H, B), share or number of cases in the cells, not negative; where it is 0, p does not count.

    Returns:
        (H, B), true where the rule says 1.

    Raises:
        ValueError: other than two arrays of one shape, a negative mass, probabilities outside 0 to 1.

    >>> best_monotone_decisions([[0.1, 0.9, 0.4], [0.6, 0.2, 0.8]], [[1, 1, 1], [1, 1, 1]])
    array([[False,  True,  True],
           [ True,  True,  True]])
    """
    p, m = numbers("probability", probability, dims=2), numbers("mass", mass, dims=2)
    if p.shape != m.shape or m.min() < 0:
        raise ValueError(f"mass: expected numbers >= 0 of shape {p.shape}, got shape {m.shape} from {m.min():g}")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"probability: expected numbers from 0 to 1, got {p.min():g} to {p.max():g}")
    rows, columns = p.shape
    gain = np.pad((m * (2 * p - 1))[:, ::-1].cumsum(axis=1)[:, ::-1], ((0, 0), (0, 1)))  # of 1 from column t on
    value = gain.copy()
    for i in range(1, rows):
        value[i] += np.maximum.accumulate(value[i - 1][::-1])[::-1]  # the threshold before is at least as high
    threshold, lowest = np.empty(rows, dtype=np.intp), 0
    for i in reversed(range(rows)):
        lowest = threshold[i] = lowest + int(value[i, lowest:].argmax())
    return np.arange(columns) >= threshold[:, None]


def _cases(
    confidence: Array, human: Array, outcome: Array | None = None, name: str = "human"
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """b from 0 to 1, h, and y, 0 or 1, of one shape (N,); without outcomes y is b."""
    b = numbers("confidence", confidence, dims=1)
    h = numbers(name, human, dims=1)
    y = b if outcome is None else numbers("outcome", outcome, dims=1)
    if b.min() < 0 or b.max() > 1:
        raise ValueError(f"confidence: expected numbers from 0 to 1, got {b.min():g} to {b.max():g}")
    if h.shape != b.shape:
        raise ValueError(f"{name}: expected {len(b)} numbers, got {len(h)}")
    if outcome is not None and (y.shape != b.shape or not np.isin(y, (0, 1)).all()):
        raise ValueError(f"outcome: expected {len(b)} zeros and ones, got shape {y.shape}")
    return b, h, y


def _edges(name: str, values: NDArray[np.float64], bins: int | None) -> NDArray[np.float64]:
    if bins is None:
        return np.unique(values)[:-1]
    require.whole(name, bins, at_least=1)
    return mass_edges(values, bins)


def _of_equal_width(b: NDArray[np.float64], bins: int) -> NDArray[np.intp]:
    """Bins own their lower end, as in the paper's code; the last one also 1."""
    return np.minimum((b * bins).astype(np.intp), bins - 1)
