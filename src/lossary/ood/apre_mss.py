"""Mean-shift scoring: an autoencoder's output is held against the row moved into its neighbourhood, not the row itself.

Autoencoders learn to reconstruct some outliers well. Here a row's reconstruction is compared with the mean of the row
and its nearest neighbours, which for an outlier lies elsewhere, so a good reconstruction no longer hides it. Besides,
the autoencoder predicts each feature's variance, and the score weighs squared error by precision against log variance
as one likes. For tables in which outliers are few, also among the training rows, which need no labels. The number of
neighbours matters: the paper chose it with labels. It keeps the training rows and searches them for every new one.
"""

from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Generator, Tensor, nn

from lossary import require
from lossary.ood._gaussian import as_classes, as_features, like
from lossary.paper import Paper
from lossary.roles import score

PAPER = Paper(
    title="Improving Autoencoder-based Outlier Detection with Adjustable Probabilistic Reconstruction Error and"
    " Mean-shift Outlier Scoring",
    year=2023,
    helps=("strange-inputs",),
    url="https://arxiv.org/abs/2304.00709",
    departs=(
        "neighbours and epochs are arguments; the official code chooses both by labels of a validation part",
        "rows of fit that are scored later are new rows: they meet their copy among the neighbours",
        "a constant feature is left at 0; the official code divides by its deviation plus 1e-5",
        "weights are drawn uniform as in torch's layers, from the detector's own seed",
    ),
    equation=(
        r"s(x)=\alpha\sum_j\frac{(\mu_j(x)-t_j)^2}{\sigma_j^2(x)}+\beta\sum_j\ln\sigma_j^2(x),\qquad "
        r"t=\frac1k\Bigl(x+\sum_{i\in N_{k-1}(x)}x_i\Bigr)"
    ),
)

_FLOOR = 1e-5  # below which no variance is predicted
_HALVED = 1000  # epochs after which the learning rate is halved
_CHUNK = 2**24  # distances held at a time


def apre_loss(
    input: Float[Tensor, "*batch twice"],
    target: Float[Tensor, "*batch features"],
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Adjustable probabilistic reconstruction error, per sample: alpha sum_j (mu_j - t_j)^2 / s_j + beta sum_j ln s_j.

    At alpha = beta = 1 it is twice a Gaussian's negative log-likelihood but for a constant, which is what an
    autoencoder is trained with; other weights (0.5 and 2 in the official code) are for scoring.

    Args:
        input: means mu, then raw variances r of as many features: s = softplus(r) + 1e-5.
        target: t.
        alpha: weight of the error, at least 0.
        beta: weight of the variance, at least 0.

    Raises:
        ValueError: a shape, dtype or number out of range.

    >>> apre_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0]]))  # an error of 1 at variance ln 2
    tensor([1.0762])
    """
    require.floating("target", target, at_least_dims=1)
    require.same_shape("input", input, (*target.shape[:-1], 2 * target.shape[-1]))
    require.number("alpha", alpha, at_least=0.0)
    require.number("beta", beta, at_least=0.0)
    mean, raw = input.chunk(2, -1)
    variance = F.softplus(raw) + _FLOOR
    return alpha * ((mean - target).square() / variance).sum(-1) + beta * variance.log().sum(-1)


def mean_shift_transform(features: Any, x: Any = None, *, neighbors: int = 20, times: int = 1) -> Any:
    """Rows moved to the mean of their neighbourhoods, one or more times.

    Each of `features` becomes the mean of its nearest ones, itself included, all at once; a second time starts from
    the moved rows. With x, new rows are moved instead: each becomes the mean of itself and its neighbors - 1 nearest
    features, these having been moved as often as it has. Distances are Euclidean; of equal ones any may count.

    Args:
        features: array or tensor (N, D).
        x: (M, D), or None to move the features.
        neighbors: k, at most N; 1 moves nothing.
        times: m, at least 1.

    Returns:
        Array or tensor, as given, (N, D) or (M, D).

    Raises:
        ValueError: a shape, dtype or number out of range, NaN.

    >>> mean_shift_transform([[0.0], [1.0], [9.0]], neighbors=2).tolist()
    [[0.5], [0.5], [5.0]]
    >>> mean_shift_transform([[0.0], [1.0], [9.0]], [[8.0]], neighbors=2, times=2).tolist()
    [[6.75]]
    """
    known = as_features("features", features)
    require.whole("neighbors", neighbors, at_least=1, at_most=len(known))
    require.whole("times", times, at_least=1)
    if x is None:
        return like(features, _shifts(known, neighbors, times)[-1])
    rows = as_features("x", x, known.shape[1])
    return like(x, _follow(rows, [known, *_shifts(known, neighbors, times - 1)], neighbors))


@score(examples=({"epochs": 20}, {"epochs": 20, "probabilistic": False}, {"epochs": 20, "times": 0, "alpha": 1.0}))
class MeanShiftOutlierScorer(BaseEstimator):
    """Autoencoder whose output is held against the mean-shifted row: APRE or squared error, higher more unusual.

    Features are standardised, then D -> D/2 (-> D/4 from 20 features, -> D/8 from 100, or D/16 from 200) and back,
    with ReLU between; trained on all rows at once with Adam, the rate halved every 1000 epochs. A row x scores
    `apre_loss` (alpha, beta) of the output for x against x mean-shifted `times` times, or the squared error. Training
    is always on x itself with weights of 1. It takes place on the features' device, in double precision.

    Args:
        neighbors: k of `mean_shift_transform`, at most the number of rows. The official runs try 2 to 100.
        times: m, 1 to 3 in the paper; 0 scores against x itself, a plain autoencoder.
        probabilistic: predict variances; False is an autoencoder with squared error.
        alpha: weight of the error in the score.
        beta: weight of the variance in the score.
        epochs: full-batch steps; the official runs have 5000.
        lr: Adam's rate.
        random_state: seed of the initial weights.

    Attributes:
        network_: the autoencoder, on standardised rows.
        mean_, scale_: of the features (D,).
        shifted_: the standardised training rows, unmoved and moved up to times - 1 times.

    Raises:
        ValueError: wrong shapes, dtypes or numbers, NaN, fewer rows than neighbours; asked before `fit`
            (scikit-learn's NotFittedError).

    >>> rows = torch.linspace(0, 1, 50).unsqueeze(1) * torch.ones(1, 2)  # on a line
    >>> scorer = MeanShiftOutlierScorer(neighbors=5, epochs=200).fit(rows)
    >>> usual, strange = scorer.anomaly_score(torch.tensor([[0.4, 0.4], [0.1, 0.9]]))
    >>> bool(strange > usual)
    True
    """

    def __init__(
        self,
        *,
        neighbors: int = 20,
        times: int = 1,
        probabilistic: bool = True,
        alpha: float = 0.5,
        beta: float = 2.0,
        epochs: int = 1000,
        lr: float = 1e-3,
        random_state: int = 0,
    ) -> None:
        self.neighbors, self.times, self.probabilistic = neighbors, times, probabilistic
        self.alpha, self.beta = alpha, beta
        self.epochs, self.lr, self.random_state = epochs, lr, random_state

    def fit(self, features: Any, labels: Any = None) -> Self:
        """Learn from rows (N, D); labels (N,) are not used."""
        found = as_features("features", features).detach()
        if labels is not None:
            as_classes("labels", labels, found)
        require.whole("neighbors", self.neighbors, at_least=1, at_most=len(found))
        require.whole("times", self.times)
        require.whole("epochs", self.epochs)
        require.whole("random_state", self.random_state)
        require.number("alpha", self.alpha, at_least=0.0)
        require.number("beta", self.beta, at_least=0.0)
        require.number("lr", self.lr, above=0.0)
        rows = found.double()
        self.mean_, deviation = rows.mean(0), rows.std(0, correction=0)
        self.scale_ = torch.where(deviation > 1e-12 * self.mean_.abs(), deviation, 1.0)  # the rest is rounding
        self.n_features_in_ = found.shape[1]
        rows = (rows - self.mean_) / self.scale_
        self.shifted_ = [rows, *_shifts(rows, self.neighbors, self.times - 1)]
        generator = Generator().manual_seed(self.random_state)
        self.network_ = _autoencoder(found.shape[1], 1 + self.probabilistic, generator).to(found.device)
        self._train(rows)
        return self

    @torch.no_grad()
    def anomaly_score(self, x: Any) -> Any:
        """Scores (N,)."""
        check_is_fitted(self)
        found = as_features("x", x, len(self.mean_))
        rows = (found.to(self.mean_) - self.mean_) / self.scale_
        target = _follow(rows, self.shifted_, self.neighbors) if self.times else rows
        return like(x, self._errors(rows, target, self.alpha, self.beta).to(found.device, found.dtype))

    def score_samples(self, x: Any) -> Any:
        """The negative of `anomaly_score`, as scikit-learn's outlier detectors have it."""
        return -self.anomaly_score(x)

    @torch.enable_grad()
    def _train(self, rows: Tensor) -> None:
        optimizer = torch.optim.Adam(self.network_.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, _HALVED, 0.5)
        for _ in range(self.epochs):
            optimizer.zero_grad()
            torch.autograd.backward(self._errors(rows, rows, 1.0, 1.0).mean())
            optimizer.step()
            schedule.step()

    def _errors(self, rows: Tensor, target: Tensor, alpha: float, beta: float) -> Float[Tensor, " rows"]:
        output: Tensor = self.network_(rows)
        if self.probabilistic:
            return apre_loss(output, target, alpha=alpha, beta=beta)
        return (output - target).square().sum(1)


def _shifts(known: Tensor, neighbors: int, times: int) -> list[Tensor]:
    """The rows moved once, twice, ...; all move at once."""
    moved: list[Tensor] = []
    for _ in range(times):
        known = _nearest_sum(known, known, neighbors) / neighbors
        moved.append(known)
    return moved


def _follow(rows: Tensor, shifted: list[Tensor], neighbors: int) -> Tensor:
    """New rows moved once into each of the sets in turn, themselves among the neighbours."""
    for known in shifted:
        rows = (rows + _nearest_sum(rows, known, neighbors - 1)) / neighbors
    return rows


def _nearest_sum(rows: Tensor, known: Tensor, k: int) -> Tensor:
    """Sum of the k nearest known rows, for each row."""
    squares, sums = known.square().sum(1), []
    for part in rows.split(max(1, _CHUNK // len(known))):
        nearest = (squares - 2 * part @ known.mT).topk(k, largest=False).indices
        sums.append(F.embedding_bag(nearest, known, mode="sum") if k else torch.zeros_like(part))
    return torch.cat(sums)


def _autoencoder(width: int, outputs: int, generator: Generator) -> nn.Sequential:
    """Widths halve towards the middle and double back, `outputs` numbers for each feature at the end."""
    halvings = [1] + [2] * (width >= 20) + [4] * (width >= 100)
    middle = 2 * halvings[-1] * (2 if width >= 200 else 1)
    narrowing = [max(1, round(width / h)) for h in (*halvings, middle)]
    widths = [*narrowing, *narrowing[-2:0:-1], outputs * width]
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layer = nn.Linear(wide, narrow, device="meta", dtype=torch.float64).to_empty(device="cpu")
        for weight in layer.parameters():
            nn.init.uniform_(weight, -(wide**-0.5), wide**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
