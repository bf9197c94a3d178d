"""ROAD: hide the group from an adversary, above all in the regions where it is easiest to guess.

Adversarial debiasing trains a predictor together with an adversary that tries to tell the sensitive group from the
prediction. On average it may fail and yet succeed somewhere: among the young, say, or in one town. ROAD weighs the
adversary's loss with r(x, group), which grows where that loss is small, so that the predictor attends to the regions
that are locally unfair without being told which they are. The ratio is a small network, which keeps it smooth
in x, or in BROAD the closed form for every sample of a batch. Try it where prediction gaps must be small within
unknown subpopulations. It needs the groups in training, not afterwards; it costs accuracy wherever the group tells
something about the target, and a price, `lambda_adv`, that has to be found on data of one's own.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import Procedure, advance, estimator

PAPER = Paper(
    title="On the Fairness ROAD: Robust Optimization for Adversarial Debiasing",
    year=2024,
    helps=("worst-group",),
    departs=(
        "any number of classes and groups, by softmax where the paper has one sigmoid",
        "the ratio network gives one number for each group instead of taking the group as an input",
        "for equalised odds ratios are normalised within group and class; the official code does so within group",
    ),
    equation=(
        r"\begin{aligned} "
        r"&\min_\theta\ \frac1n\sum_i\bigl[\ell(f_\theta(x_i),y_i)-\lambda\,r_i\,a_i\bigr],\qquad "
        r"a_i=-\log g_\phi\bigl(s_i\mid f_\theta(x_i)\bigr),\quad\phi\text{ minimises }\textstyle\sum_i a_i\\ "
        r"&r_i=e^{-a_i/\lambda_r}\Big/\operatorname*{mean}_{j:\,s_j=s_i}e^{-a_j/\lambda_r} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2310.18413",
)


def road_weights(
    losses: Float[Tensor, "*batch"], *, group: Int[Tensor, "*batch"], num_groups: int = 2, lambda_r: float = 0.1
) -> Float[Tensor, "*batch"]:
    """BROAD's ratios in closed form: exp(-loss / lambda_r), divided by its mean within the sample's group.

    Among all r that average 1 within every group of the batch, they minimise mean(r * loss) + lambda_r mean(r log r).
    The losses are the adversary's, so that weight goes to samples whose group it guesses. They carry no gradient.
    Groups that do not occur are passed over, and samples with infinite loss weigh nothing, unless their whole group
    is such: then they weigh 1. In a stack (*replicas, batch) every replica is a batch of its own.

    Args:
        losses: of the adversary, per sample, in nats.
        group: group numbers, 0 to num_groups - 1.
        num_groups: how many groups there can be.
        lambda_r: temperature, > 0, in nats; large ones give weights of 1, small ones single samples.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a hyper-parameter out of range.

    >>> losses, group = torch.tensor([0.0, 0.6931, 3.0]), torch.tensor([0, 0, 1])
    >>> road_weights(losses, group=group, lambda_r=1.0)  # 1 and 1/2 over 3/4, and 1
    tensor([1.3333, 0.6667, 1.0000])
    """
    require.floating("losses", losses, at_least_dims=1)
    require.integers("group", group, shape=losses.shape)
    require.whole("num_groups", num_groups, at_least=1)
    require.number("lambda_r", lambda_r, above=0.0)
    scores = (-losses.detach() / lambda_r).clamp(min=torch.finfo(losses.dtype).min)
    return _log_ratio(scores, group, num_groups).exp()


class ROAD(Procedure):
    """A predictor, an adversary and a ratio, trained in turns on batches (x, y, group).

    Each step begins with `adversary_turns` turns of the adversary, which minimises its cross-entropy in telling the
    group from the predictor's logits, a. Then come `ratio_turns` turns of the ratio, which minimises
    r a + lambda_r r log r, r being exp(ratio) over its mean in the group. At last the predictor has one turn at
    loss - lambda_adv r a. Without a ratio network r are the `road_weights` of a (BROAD); they are 1 in the limit of a
    large lambda_r, which is plain adversarial debiasing (Zhang et al., 2018).

    Args:
        predictor: x to logits (*replicas, batch, classes); what is deployed.
        adversary: those logits to logits of the groups. For equalised odds it is handed the one-hot class besides,
            (*replicas, batch, 2 classes).
        ratio: x to one number per group, the logarithm of r up to a constant; for equalised odds one per class and
            group, classes first. None is BROAD.
        loss: loss(input, target) gives the predictor's values (*replicas, batch); None is cross-entropy.
        num_groups: how many groups there are; with 1 only the predictor is trained.
        lambda_adv: price of a nat of the adversary's success, >= 0; 0.1 to 5 in the paper's experiments.
        lambda_r: temperature of the ratios, > 0; up to 0.7 there.
        adversary_turns: of a step, at least 1; 10 to 50 there.
        ratio_turns: of a step, at least 1; not used without a ratio network.
        equalized_odds: hide the group among samples of one class instead of among all (demographic parity).

    Raises:
        ValueError: a hyper-parameter out of range.

    >>> g = torch.Generator().manual_seed(0)
    >>> x, y, group = torch.randn(8, 3, generator=g), torch.arange(8) % 2, torch.arange(8) // 4
    >>> road = ROAD(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(3, 2), adversary_turns=2, ratio_turns=1)
    >>> road.turns(0)
    ('adversary', 'adversary', 'ratio', 'predictor')
    >>> optimizers = {name: torch.optim.Adam(player.parameters()) for name, player in road.players().items()}
    >>> means = advance(road, (x, y, group), optimizers, step=0)
    >>> road(x).shape
    torch.Size([8, 2])
    """

    def __init__(
        self,
        predictor: nn.Module,
        adversary: nn.Module,
        ratio: nn.Module | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        num_groups: int = 2,
        lambda_adv: float = 1.0,
        lambda_r: float = 0.1,
        adversary_turns: int = 10,
        ratio_turns: int = 10,
        equalized_odds: bool = False,
    ) -> None:
        super().__init__()
        require.whole("num_groups", num_groups, at_least=1)
        require.number("lambda_adv", lambda_adv, at_least=0.0)
        require.number("lambda_r", lambda_r, above=0.0)
        require.whole("adversary_turns", adversary_turns, at_least=1)
        require.whole("ratio_turns", ratio_turns, at_least=1)
        self.predictor, self.adversary, self.ratio, self.loss = predictor, adversary, ratio, loss or _cross_entropy
        self.num_groups, self.lambda_adv, self.lambda_r = num_groups, lambda_adv, lambda_r
        self.adversary_turns, self.ratio_turns, self.equalized_odds = adversary_turns, ratio_turns, equalized_odds

    def players(self) -> Mapping[str, nn.Module]:
        networks = {"adversary": self.adversary, "ratio": self.ratio, "predictor": self.predictor}
        return {name: network for name, network in networks.items() if network is not None}

    def turns(self, step: int) -> Sequence[str]:
        if self.num_groups == 1:  # nothing to hide
            return ("predictor",)
        ratio = () if self.ratio is None else ("ratio",) * self.ratio_turns
        return ("adversary",) * self.adversary_turns + ratio + ("predictor",)

    def objective(
        self,
        player: str,
        batch: tuple[Tensor, Tensor, Tensor],
        *,
        step: int,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Float[Tensor, "*replicas batch"]:
        x, y, group = batch
        require.integers("group", group, shape=y.shape)
        with torch.set_grad_enabled(player == "predictor" and torch.is_grad_enabled()):
            logits = self.predictor(x)
        if self.equalized_odds:
            logits_and_class = torch.cat([logits, F.one_hot(y, logits.shape[-1]).to(logits.dtype)], -1)
            cell, cells = group + self.num_groups * y, self.num_groups * logits.shape[-1]
        else:
            logits_and_class, cell, cells = logits, group, self.num_groups
        success = _cross_entropy(self.adversary(logits_and_class), group)
        if player == "adversary":
            return success
        if self.ratio is None:
            weights = road_weights(success, group=cell, num_groups=cells, lambda_r=self.lambda_r)
        else:
            own = self.ratio(x).gather(-1, cell.unsqueeze(-1)).squeeze(-1)
            log_ratio = _log_ratio(own, cell, cells)
            if player == "ratio":
                return log_ratio.exp() * (success.detach() + self.lambda_r * log_ratio)
            weights = log_ratio.detach().exp()
        return self.loss(logits, y) - self.lambda_adv * weights * success

    def forward(self, x: Tensor) -> Tensor:
        """The predictor's logits."""
        return self.predictor(x)


@estimator(on="classes", examples=({"epochs": 10, "hidden": (16,), "lr": 0.05},))
class BROADClassifier(ClassifierMixin, BaseEstimator):
    """Perceptron for tables that hides the sensitive group, with ratios in closed form.

    `fit(X, y, sensitive_features=s)` takes a column of group labels, which need not be among the features and is not
    asked for again. Without one there is nothing to hide, and the perceptron is trained alone. Scale the
    features beforehand.

    Args:
        lambda_adv: price of a nat of the adversary's success, >= 0.
        lambda_r: temperature of the ratios, > 0.
        adversary_turns: of a step, at least 1.
        equalized_odds: hide the group among samples of one class instead of among all.
        hidden: widths of the predictor's hidden layers, and of the other networks'.
        epochs: passes over the data.
        batch_size: rows of a step.
        lr: of Adam, for all networks.
        random_state: seed of initial weights and batches, a whole number.

    Attributes:
        classes_: labels in order, as `predict_proba` has them.
        groups_: sensitive groups in order.
        road_: the trained `ROAD`.

    Raises:
        ValueError: at fit, hyper-parameters out of range and data that are not as scikit-learn asks.

    >>> X, s = np.array([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]]), ["a", "b", "a", "b"]
    >>> fair = BROADClassifier(hidden=(8,), lr=0.05).fit(X, ["no", "no", "yes", "yes"], sensitive_features=s)
    >>> fair.predict(X)
    array(['no', 'no', 'yes', 'yes'], dtype='<U3')
    """

    def __init__(
        self,
        *,
        lambda_adv: float = 1.0,
        lambda_r: float = 0.1,
        adversary_turns: int = 10,
        equalized_odds: bool = False,
        hidden: Sequence[int] = (64, 32),
        epochs: int = 50,
        batch_size: int = 256,
        lr: float = 1e-3,
        random_state: int = 0,
    ) -> None:
        self.lambda_adv, self.lambda_r, self.adversary_turns = lambda_adv, lambda_r, adversary_turns
        self.equalized_odds, self.hidden, self.epochs = equalized_odds, hidden, epochs
        self.batch_size, self.lr, self.random_state = batch_size, lr, random_state

    def fit(self, X: Any, y: Any, sensitive_features: Any = None) -> Self:
        """Train on rows X (N, d), targets y (N,) and group labels (N,)."""
        for name, value in (*((f"hidden[{i}]", width) for i, width in enumerate(self.hidden)), ("epochs", self.epochs)):
            require.whole(name, value, at_least=1)
        require.whole("batch_size", self.batch_size, at_least=1)
        require.number("lr", self.lr, above=0.0)
        require.whole("random_state", self.random_state)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        sensitive = np.zeros(len(y)) if sensitive_features is None else np.asarray(sensitive_features)
        check_consistent_length(X, sensitive)
        self.classes_, target = np.unique(y, return_inverse=True)
        self.groups_, group = np.unique(sensitive, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("y: expected at least two classes, got 1 class")
        if sensitive.ndim != 1:
            raise ValueError(f"sensitive_features: expected one label a row, got shape {sensitive.shape}")

        g = torch.Generator().manual_seed(self.random_state)
        self.road_ = self._road(X.shape[1], len(self.classes_), len(self.groups_), g).double()
        players = self.road_.players().items()
        optimizers = {name: torch.optim.Adam(player.parameters(), lr=self.lr) for name, player in players}
        data = torch.from_numpy(X), torch.from_numpy(target), torch.from_numpy(group)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(y), generator=g).split(self.batch_size):
                advance(self.road_, tuple(column[rows] for column in data), optimizers, step=0)
        self.road_.eval()
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (N, classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            probability: np.ndarray = self.road_(torch.from_numpy(X)).softmax(-1).numpy()
        return probability

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of every row, (N,)."""
        likeliest = self.predict_proba(X).argmax(1)
        predicted: np.ndarray = self.classes_[likeliest]
        return predicted

    def _road(self, features: int, classes: int, groups: int, generator: Generator, **ratio: Any) -> ROAD:
        sees = 2 * classes if self.equalized_odds else classes
        return ROAD(
            _network(features, *self.hidden, classes, generator=generator),
            _network(sees, *self.hidden, groups, generator=generator),
            num_groups=groups,
            lambda_adv=self.lambda_adv,
            lambda_r=self.lambda_r,
            adversary_turns=self.adversary_turns,
            equalized_odds=self.equalized_odds,
            **ratio,
        )


@estimator(on="classes", examples=({"epochs": 10, "hidden": (16,), "lr": 0.05},))
class ROADClassifier(BROADClassifier):
    """The same with a network for the ratios, which makes them smooth in the features.

    Args:
        lambda_adv: price of a nat of the adversary's success, >= 0.
        lambda_r: temperature of the ratios, > 0.
        adversary_turns: of a step, at least 1.
        ratio_turns: of a step, at least 1.
        equalized_odds: hide the group among samples of one class instead of among all.
        hidden: widths of the predictor's hidden layers, and of the other networks'.
        epochs: passes over the data.
        batch_size: rows of a step.
        lr: of Adam, for all networks.
        random_state: seed of initial weights and batches, a whole number.

    Attributes:
        classes_: labels in order, as `predict_proba` has them.
        groups_: sensitive groups in order.
        road_: the trained `ROAD`.

    Raises:
        ValueError: at fit, hyper-parameters out of range and data that are not as scikit-learn asks.

    >>> X, s = np.array([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]]), ["a", "b", "a", "b"]
    >>> fair = ROADClassifier(hidden=(8,), lr=0.05).fit(X, [0, 0, 1, 1], sensitive_features=s)
    >>> fair.predict(X), fair.groups_
    (array([0, 0, 1, 1]), array(['a', 'b'], dtype='<U1'))
    """

    def __init__(
        self,
        *,
        lambda_adv: float = 1.0,
        lambda_r: float = 0.1,
        adversary_turns: int = 10,
        ratio_turns: int = 10,
        equalized_odds: bool = False,
        hidden: Sequence[int] = (64, 32),
        epochs: int = 50,
        batch_size: int = 256,
        lr: float = 1e-3,
        random_state: int = 0,
    ) -> None:
        super().__init__(
            lambda_adv=lambda_adv,
            lambda_r=lambda_r,
            adversary_turns=adversary_turns,
            equalized_odds=equalized_odds,
            hidden=hidden,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            random_state=random_state,
        )
        self.ratio_turns = ratio_turns

    def _road(self, features: int, classes: int, groups: int, generator: Generator, **ratio: Any) -> ROAD:
        cells = groups * classes if self.equalized_odds else groups
        network = _network(features, *self.hidden, cells, generator=generator)
        return super()._road(features, classes, groups, generator, ratio=network, ratio_turns=self.ratio_turns)


def _log_ratio(scores: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Scores (*replicas, batch), shifted within every cell so that their exponentials average 1."""
    empty = scores.new_zeros(*scores.shape[:-1], cells)
    top = (empty - torch.inf).scatter_reduce(-1, cell, scores.detach(), "amax").gather(-1, cell)
    count = empty.scatter_add(-1, cell, torch.ones_like(scores))
    total = empty.scatter_add(-1, cell, (scores - top).exp())
    return scores - top - (total / count).gather(-1, cell).log()


def _cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


def _network(*sizes: int, generator: Generator) -> nn.Sequential:
    """A perceptron with the weights that torch would have drawn from this generator."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layer = nn.Linear(wide, narrow, device="meta").to_empty(device="cpu")
        for tensor in (layer.weight, layer.bias):
            nn.init.uniform_(tensor, -(wide**-0.5), wide**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
