"""ST-DQR: prediction regions of any shape for several targets at once, drawn where the targets look like a Gaussian.

Half-spaces, one for each direction, that most targets fulfil make a region, but a convex one. So a conditional
variational autoencoder first maps the targets to a space where they gather around one point; the half-spaces are
fitted there, points between them are decoded, and the cloud is the region. Growing or shrinking it by a distance
chosen on held-out rows makes it cover as often as asked, whatever the networks are worth; that last step serves any
method whose regions are points. Take it when two to four targets depend on each other in a curved way. Where they
are about jointly normal, an ellipsoid does as well; with many targets points no longer fill a region.
"""

from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Generator, Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import estimator
from lossary.uncertainty._conformal import as_array, misshapen, numbers, quantile
from lossary.uncertainty._network import generator, perceptron, standard, train
from lossary.uncertainty._quantile import pinball

PAPER = Paper(
    title="Calibrated Multiple-Output Quantile Regression with Representation Learning",
    year=2023,
    helps=("uncertainty",),
    url="https://arxiv.org/abs/2110.00816",
    departs=(
        "growing and shrinking are one signed distance, whose quantile decides which; the paper treats them apart,"
        " with the same result up to the spacing of the points",
        "latent points are quasi-random numbers with the mean and spread of the training targets' codes; the official"
        " code fills a box with a grid",
        "directions are of length 1; the official code's have the level's length, which scales its loss",
        "two hidden layers, a fixed number of steps and 8 directions in each; the official code has up to seven layers,"
        " stops early and takes 32",
        "no adversarial variants of the autoencoder, which the official code has besides",
    ),
    equation=(
        r"\begin{aligned} "
        r"R(x)&=\bigl\{\operatorname{dec}(z,x):\ u^\top z\ge q(x,u)\ \forall u\bigr\},\qquad "
        r"q(x,u):\ \tau\text{-quantile of }u^\top z\\ "
        r"C(x)&=\{y:\ d(y,R(x))\le\hat r\,\},\qquad "
        r"\hat r=\lceil(n+1)(1-\alpha)\rceil\text{-th smallest signed }d(y_i,R(x_i)) "
        r"\end{aligned}"
    ),
)

Array = Any  # an array or a tensor


def directional_quantile_loss(
    input: Float[Tensor, "*batch directions"],
    target: Float[Tensor, "*batch targets"],
    *,
    directions: Float[Tensor, "directions targets"],
    level: float,
) -> Float[Tensor, "*batch"]:
    """Mean over directions u of the pinball loss, at `level`, of the input q_u for u . target. Per sample.

    At its least, u . target is below q_u with probability `level`, for each u by itself. The targets that are below
    for no u are then a convex region; of a Gaussian in d dimensions it holds the share with a chi-squared (d) below
    the square of the normal quantile, 74% for a level of 5% in the plane.

    Args:
        input: quantiles, one for each direction.
        target: vectors.
        directions: u, mostly of length 1.
        level: between 0 and 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, a level out of range.

    >>> import torch
    >>> axes = torch.eye(2)
    >>> directional_quantile_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, -1.0]]), directions=axes, level=0.1)
    tensor([0.5500])
    """
    require.floating("target", target, at_least_dims=1)
    require.floating("directions", directions, dims=2)
    require.same_shape("directions", directions, (len(directions), target.shape[-1]))
    require.same_shape("input", input, (*target.shape[:-1], len(directions)))
    require.number("level", level, above=0.0, below=1.0)
    return pinball(input.unsqueeze(-1), target @ directions.mT, level).squeeze(-1).mean(-1)


class MultivariateConformalRegion(BaseEstimator):
    """Regions given by points, grown or shrunk by one distance until they cover with probability 1 - alpha.

    A target lies in a row's region if it is no farther from its points than these are from each other (the quantile
    `spacing` of the distances to the nearest one). Outside, the score is the distance to the nearest point; inside,
    minus the distance to the nearest point of a grid that is outside. The radius is the conformal quantile of the
    scores of held-out rows: above 0 the regions grow by it, below 0 they shrink.

    Args:
        alpha: share of targets that may be missed, between 0 and 1.
        spacing: between 0 and 1.

    Attributes:
        grid_: (H, d), as given to `fit`.
        radius_: in the targets' unit; infinite with fewer than 1 / alpha - 1 held-out rows.

    Raises:
        ValueError: wrong shapes, NaN, a hyper-parameter out of range; asked before `fit` (scikit-learn's
            NotFittedError).

    >>> points = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    >>> grid = np.stack(np.meshgrid(np.linspace(-4, 4, 33), np.linspace(-4, 4, 33)), axis=-1).reshape(-1, 2)
    >>> targets = np.array([[1.0, 0.5], [0.0, 2.0], [5.0, 0.0]])
    >>> region = MultivariateConformalRegion(alpha=0.5).fit(np.stack([points] * 3), targets, grid)
    >>> region.radius_
    2.0
    >>> region.contains(points[None], np.array([[1.0, 1.9]])).item()
    True
    """

    def __init__(self, *, alpha: float = 0.1, spacing: float = 0.9) -> None:
        self.alpha, self.spacing = alpha, spacing

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array, tags.input_tags.allow_nan = False, True, True
        return tags

    def fit(self, inside: Array, y: Array, grid: Array) -> Self:
        """Choose the radius on held-out rows.

        Args:
            inside: (n, G, d) points of each row's region; where it has fewer than G the rest is NaN.
            y: (n, d) targets.
            grid: (H, d) points that fill the space in which targets lie.
        """
        require.number("alpha", self.alpha, above=0.0, below=1.0)
        require.number("spacing", self.spacing, above=0.0, below=1.0)
        self.grid_ = numbers("grid", grid, dims=2)
        self.radius_ = quantile(self.scores(inside, y), self.alpha)
        return self

    def scores(self, inside: Array, y: Array) -> Float[NDArray, " rows"]:
        """Distance to the region, minus the distance to its outside for a target within."""
        check_is_fitted(self, "grid_")
        cloud, targets = self._checked(inside, y)
        return self._signed(cloud, targets.unsqueeze(1), deep=True).squeeze(1).numpy()

    def contains(self, inside: Array, y: Array) -> Bool[NDArray, " rows"]:
        """Whether each target is in its row's region."""
        check_is_fitted(self, "radius_")
        cloud, targets = self._checked(inside, y)
        return (self._signed(cloud, targets.unsqueeze(1), deep=self.radius_ < 0) <= self.radius_).squeeze(1).numpy()

    def share(self, inside: Array) -> Float[NDArray, " rows"]:
        """What share of the grid is in each row's region: its volume, if the grid is even and large enough."""
        check_is_fitted(self, "radius_")
        cloud, _ = self._checked(inside, None)
        points = self._centred_grid().expand(len(cloud), -1, -1)
        covered = self._signed(cloud, points, deep=self.radius_ < 0) <= self.radius_
        return covered.double().mean(1).numpy()

    def _checked(self, inside: Array, y: Array | None) -> tuple[Tensor, Tensor]:
        cloud = torch.from_numpy(as_array("inside", inside).astype(np.float64))
        d = self.grid_.shape[1]
        if cloud.ndim != 3 or cloud.shape[2] != d or 0 in cloud.shape or bool(cloud.isinf().any()):
            got = misshapen(tuple(cloud.shape))
            raise ValueError(f"inside: expected finite points (rows, points, {d}) or NaN, got {got}")
        targets = np.zeros((len(cloud), d)) if y is None else numbers("y", y, dims=2)
        if targets.shape != (len(cloud), d):
            raise ValueError(f"y: expected shape {(len(cloud), d)}, got {targets.shape}")
        centre = self.grid_.mean(0)  # squares of large coordinates would lose the distances' digits
        return cloud - torch.from_numpy(centre), torch.from_numpy(targets - centre)

    def _centred_grid(self) -> Tensor:
        return torch.from_numpy(self.grid_ - self.grid_.mean(0))

    def _signed(self, inside: Tensor, points: Tensor, *, deep: bool) -> Float[Tensor, "rows points"]:
        """Scores of points (rows, Q, d); unless `deep`, those within a region have 0."""
        grid = self._centred_grid()
        widest = max(points.shape[1], inside.shape[1], len(grid)) * max(inside.shape[1], len(grid) if deep else 1)
        parts = []
        for cloud, asked in zip(*(t.split(max(1, _ENTRIES // widest)) for t in (inside, points))):
            spacing = _spacing(cloud, self.spacing)
            near = _nearest(asked, cloud)
            depth = torch.zeros_like(near)
            if deep:
                outside = _nearest(grid.expand(len(cloud), -1, -1), cloud) > spacing
                edge = torch.where(outside.unsqueeze(-1), grid, torch.nan)
                depth = _nearest(asked, edge)
            parts.append(torch.where(near > spacing, near, -depth))
        return torch.cat(parts)


@estimator(
    on="real",
    examples=(
        {"steps": 30, "points": 64, "directions": 16, "grid": 100, "hidden": 16, "lr": 0.02, "latent": 1, "alpha": 0.2},
    ),
)
class SpaceTransformedDQR(RegressorMixin, BaseEstimator):
    """Regions for several targets at once that cover with probability at least 1 - alpha.

    `fit` trains the autoencoder and the directional quantiles on a part of the rows and calibrates on the rest;
    `calibrate` does the latter anew. `predict` gives the decoded centre of the latent space.

    Args:
        alpha: share of targets that may be missed, between 0 and 1.
        level: of the directional quantiles, between 0 and 0.5; decides the regions' shape, not their coverage.
        latent: dimensions of the latent space; 0 fits the directional quantiles to the targets themselves, whose
            regions are convex.
        kl: weight of the divergence from a standard normal against the mean squared error.
        calibration: share of the rows kept for calibration, between 0 and 1.
        points: tried in each row's latent space.
        directions: half-spaces of a region.
        grid: points in the targets' space, by which volumes are measured and regions shrunk.
        hidden: width of the networks' two hidden layers.
        steps: of training either.
        batch: rows in a step.
        lr: learning rate at the start.
        random_state: of the split, the weights, batches and directions: a whole number or a `RandomState`.

    Attributes:
        encoder_, decoder_: (x, y) to mean and log-variance of z, and (z, x) to y, all standardised; None for
            `latent` = 0.
        quantiles_: (x, u) to the quantile of u . z.
        region_: the calibrated `MultivariateConformalRegion`, in standardised targets.

    Raises:
        ValueError: wrong shapes, NaN, fewer than 4 rows, a hyper-parameter out of range; asked before `fit`
            (scikit-learn's NotFittedError).

    >>> rng = np.random.default_rng(0)
    >>> angle = rng.uniform(0, np.pi, 300)
    >>> X, Y = rng.random((300, 1)), np.stack([np.cos(angle), np.sin(angle)], axis=1)  # half a circle
    >>> model = SpaceTransformedDQR(steps=100, points=100, grid=400).fit(X, Y)
    >>> model.contains(X, 100 + Y).any()
    np.False_
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        level: float = 0.05,
        latent: int = 3,
        kl: float = 0.01,
        calibration: float = 0.3,
        points: int = 1024,
        directions: int = 256,
        grid: int = 3000,
        hidden: int = 64,
        steps: int = 1000,
        batch: int = 64,
        lr: float = 0.003,
        random_state: Any = 0,
    ) -> None:
        self.alpha, self.level, self.latent, self.kl = alpha, level, latent, kl
        self.calibration, self.points, self.directions, self.grid = calibration, points, directions, grid
        self.hidden, self.steps, self.batch, self.lr, self.random_state = hidden, steps, batch, lr, random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Train on a part of the rows X (N, D) and their targets y (N, d), calibrate on the others."""
        require.number("level", self.level, above=0.0, below=0.5)
        require.number("calibration", self.calibration, above=0.0, below=1.0)
        require.number("lr", self.lr, above=0.0)
        require.number("kl", self.kl, at_least=0.0)
        for name, least in (
            ("latent", 0),
            ("steps", 0),
            *((n, 1) for n in "points directions grid hidden batch".split()),
        ):
            require.whole(name, getattr(self, name), at_least=least)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, multi_output=True, ensure_min_samples=4)
        g = generator(self.random_state)
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1).astype(np.float64)
        order = torch.randperm(len(X), generator=g).numpy()
        kept = min(max(round(self.calibration * len(X)), 1), len(X) - 2)
        held_out, rows = order[:kept], order[kept:]
        self._x, self._y = standard(X[rows]), standard(y[rows])
        x, target = _to(self._x, X[rows]), _to(self._y, y[rows])
        self.encoder_ = self.decoder_ = None
        if self.latent:
            self._fit_autoencoder(x, target, g)
        self._fit_quantiles(x, target, g)
        self._grid = _filling(target, 0.2, self.grid)
        return self.calibrate(X[held_out], y[held_out])

    def calibrate(self, X: Any, y: Any) -> Self:
        """Choose the radius on rows that the networks were not trained on."""
        X, target = self._rows_and_targets(X, y)
        self.region_ = MultivariateConformalRegion(alpha=self.alpha).fit(self._cloud(X), target, self._grid)
        return self

    def predict(self, X: Any) -> Float[NDArray, "rows targets"]:
        """What the centre of the latent space decodes to; (N,) if `fit` was given a single target so."""
        X = self._rows(X)
        centre = self._middle.expand(len(X), -1)
        answer = _from(self._y, self._decoded(centre, X))
        return answer[:, 0] if self._flat else answer

    def predict_region(self, X: Any) -> Float[NDArray, "rows points targets"]:
        """Points of each row's region before it is grown or shrunk; where it has fewer, the rest is NaN."""
        return _from(self._y, self._cloud(self._rows(X)))

    def signed_distance(self, X: Any, y: Any) -> Float[NDArray, " rows"]:
        """Of each target (N, d), standardised, to its row's region before calibration; below 0 within."""
        X, target = self._rows_and_targets(X, y)
        return self.region_.scores(self._cloud(X), target)

    def contains(self, X: Any, y: Any) -> Bool[NDArray, " rows"]:
        """Whether each target (N, d) is in its row's region."""
        X, target = self._rows_and_targets(X, y)
        return self.region_.contains(self._cloud(X), target)

    def volume(self, X: Any) -> Float[NDArray, " rows"]:
        """Of each row's region, within the box of training targets and a fifth of a standard deviation more."""
        cloud = self._cloud(self._rows(X))
        box = (self._grid.amax(0) - self._grid.amin(0)).prod().item() * self._y[1].prod()
        return self.region_.share(cloud) * box

    def _fit_autoencoder(self, x: Tensor, y: Tensor, g: Generator) -> None:
        features, targets = x.shape[1], y.shape[1]
        self.encoder_ = perceptron((features + targets, self.hidden, self.hidden, 2 * self.latent), g)
        self.decoder_ = perceptron((self.latent + features, self.hidden, self.hidden, targets), g)

        def objective(index: Tensor) -> Tensor:
            z, divergence = self._encoded(x[index], y[index], g)
            restored = self.decoder_(torch.cat([z, x[index]], -1))
            return (restored - y[index]).square().mean() + self.kl * divergence.mean()

        parameters = [*self.encoder_.parameters(), *self.decoder_.parameters()]
        train(parameters, objective, len(x), steps=self.steps, batch=self.batch, lr=self.lr, g=g)

    def _encoded(self, x: Tensor, y: Tensor, g: Generator) -> tuple[Tensor, Tensor]:
        """A draw of z and the divergence of its distribution from the standard normal; y itself without encoder."""
        if self.encoder_ is None:
            return y, y.new_zeros(len(y))
        mean, log_variance = self.encoder_(torch.cat([x, y], -1)).chunk(2, -1)
        noise = torch.randn(mean.shape, generator=g, dtype=mean.dtype)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(-1) / 2
        return mean + (log_variance / 2).exp() * noise, divergence

    def _fit_quantiles(self, x: Tensor, y: Tensor, g: Generator) -> None:
        with torch.no_grad():
            z, _ = self._encoded(x, y, g)
        dims = z.shape[1]
        self._middle = z.mean(0)
        self._tried = _gaussian(z, self.points) if self.latent else _filling(z, 1.0, self.points)
        self._directions = _directions(self.directions, dims, g)
        self.quantiles_ = perceptron((x.shape[1] + dims, self.hidden, self.hidden, 1), g)

        def objective(index: Tensor) -> Tensor:
            with torch.no_grad():
                latent, _ = self._encoded(x[index], y[index], g)
            u = _directions(_DIRECTIONS, dims, g)
            return directional_quantile_loss(self._quantile(x[index], u), latent, directions=u, level=self.level).mean()

        train(self.quantiles_.parameters(), objective, len(x), steps=self.steps, batch=self.batch, lr=self.lr, g=g)

    def _quantile(self, x: Tensor, u: Tensor) -> Float[Tensor, "rows directions"]:
        both = torch.cat([x.unsqueeze(1).expand(-1, len(u), -1), u.expand(len(x), -1, -1)], -1)
        return self.quantiles_(both).squeeze(-1)

    @torch.no_grad()
    def _decoded(self, z: Tensor, x: Tensor) -> Tensor:
        return z if self.decoder_ is None else self.decoder_(torch.cat([z, x], -1))

    @torch.no_grad()
    def _cloud(self, x: Tensor) -> Float[Tensor, "rows points targets"]:
        """Decoded points that fulfil every half-space, NaN behind them."""
        projected = self._tried @ self._directions.mT
        parts = []
        for rows in x.split(max(1, _ENTRIES // projected.numel())):
            fulfil = (projected >= self._quantile(rows, self._directions).unsqueeze(1)).all(-1)
            first = fulfil.sort(dim=1, descending=True, stable=True)
            z = self._tried[first.indices]
            y = self._decoded(z, rows.unsqueeze(1).expand(-1, z.shape[1], -1))
            parts.append(torch.where(first.values.unsqueeze(-1), y, torch.nan))
        cloud = torch.cat(parts)
        return cloud[:, : max(1, int((~cloud[..., 0].isnan()).sum(1).max()))]

    def _rows(self, X: Any) -> Tensor:
        check_is_fitted(self, "quantiles_")
        return _to(self._x, validate_data(self, X, dtype=np.float64, reset=False))

    def _rows_and_targets(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        check_is_fitted(self, "quantiles_")
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, multi_output=True, reset=False)
        y = y.reshape(len(y), -1).astype(np.float64)
        if y.shape[1] != len(self._y[0]):
            raise ValueError(f"y: expected {len(self._y[0])} targets, got {y.shape[1]}")
        return _to(self._x, X), _to(self._y, y)


_ENTRIES = 1_000_000  # of the largest table at a time: what a cache holds
_DIRECTIONS = 8  # in a training step


def _squares(points: Tensor, cloud: Tensor) -> Float[Tensor, "rows points others"]:
    """Squared distances of points (rows, Q, d) to their row's cloud (rows, G, d), less the points' own squares."""
    missing = cloud[..., :1].isnan()
    own = torch.where(missing, torch.inf, cloud.square().sum(-1, keepdim=True))
    return torch.baddbmm(own.mT, points, torch.where(missing, 0.0, cloud).mT, alpha=-2)


def _nearest(points: Tensor, cloud: Tensor) -> Float[Tensor, "rows points"]:
    """Distance of each point (rows, Q, d) to the nearest of its row's cloud (rows, G, d), NaN being none."""
    return (_squares(points, cloud).amin(-1) + points.square().sum(-1)).clamp_min(0).sqrt()


def _spacing(cloud: Tensor, share: float) -> Float[Tensor, "rows 1"]:
    """Quantile of the distances from each point of a cloud to the nearest other one; 0 for fewer than two points."""
    squares = _squares(cloud, cloud)
    squares.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = (squares.amin(-1) + cloud.square().sum(-1)).clamp_min(0).sqrt()
    nearest = torch.where(nearest.isinf(), torch.nan, nearest)  # of the only point
    return nearest.nanquantile(share, dim=1, keepdim=True).nan_to_num(0.0)


def _directions(count: int, dims: int, g: Generator) -> Tensor:
    """Random vectors of length 1."""
    return torch.nn.functional.normalize(torch.randn(count, dims, generator=g, dtype=torch.float64))


def _filling(table: Tensor, margin: float, count: int) -> Tensor:
    """An even grid of about `count` points in the box of all but 1% of each column at either end, and a margin."""
    low, high = table.quantile(0.01, dim=0) - margin, table.quantile(0.99, dim=0) + margin
    axis = torch.linspace(0, 1, max(2, round(count ** (1 / table.shape[1]))), dtype=table.dtype)
    unit = torch.cartesian_prod(*[axis] * table.shape[1]).view(-1, table.shape[1])
    return low + unit * (high - low)


def _gaussian(table: Tensor, count: int) -> Tensor:
    """`count` quasi-random points of a normal distribution with the columns' means and standard deviations."""
    unit = torch.quasirandom.SobolEngine(table.shape[1]).draw(count + 1, dtype=table.dtype)[1:]  # the first is 0
    return table.mean(0) + torch.special.ndtri(unit) * table.std(0, correction=0)


def _to(standard: tuple[NDArray, NDArray], table: NDArray) -> Tensor:
    return torch.from_numpy((table - standard[0]) / standard[1])


def _from(standard: tuple[NDArray, NDArray], table: Tensor) -> NDArray:
    return table.numpy() * standard[1] + standard[0]
