"""From a setting to predictions: stacks of networks with parts in them, boosting, linear models.

A setting is plain values that say all there is to say about one configuration:

- every family: `family` ("network", "boosting" or "linear"), and `class_weight` (None or "balanced", each class
  weighing the same in all) for classes or `error` ("squared" or "absolute") for a real target;
- network: `hidden` (widths), `activation`, `optimizer` ("AdamW"), `lr`, `weight_decay`, `steps`, `batch`; and for
  a part `part` ("losses.poly1_cross_entropy"), `role`, `hyper` (its hyper-parameters), and in results also `facts`,
  what of the search rows filled further hyper-parameters (counted anew on the rows at hand);
- boosting: `learning_rate`, `max_leaf_nodes`, `max_iter`, `random_state`;
- linear: `C` (logistic regression) or `alpha` (ridge regression).
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from lossary.roles import mark_of
from lossary.roles.procedure import Procedure, advance
from lossary.tasks import Seeds, cross_entropy, fit, per_seed, stacked_mlp
from lossary.vocabulary import fill

Loss = Callable[[Tensor, Tensor], Tensor]
Setting = Mapping[str, Any]

ROWS_AT_ONCE = 4096  # when predicting
LEAST_PROBABILITY = 1e-15

_adamw = partial(AdamW, fused=True)  # the same steps, a fifth faster


@dataclass(frozen=True)
class Recipe:
    """The parts that a stack of networks is trained with, nothing more; all see the stack of seeds in front.

    Attributes:
        loss: (output, target) to values (S, batch).
        optimizer: makes one of parameters; its step is handed a closure.
        weighting: called with the values and those of target, group and index that it names, gives weights (S, batch).
        selector: an iterable of positions for each seed.
        procedure: makes one of model(name) and the loss; it then takes the place of a single network.
    """

    loss: Loss
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    weighting: Callable[..., Tensor] | None = None
    selector: Sequence[Iterable[int]] | None = None
    procedure: Callable[[Callable[[str], nn.Module], Loss], Procedure] | None = None


@dataclass(frozen=True, eq=False)
class Fold:
    """Encoded rows to train on, and those to predict.

    `x` (n, d) and `test` (m, d) are float32; `y` (n,) class numbers int64 or values float64; `group` (n,) numbers
    from 0 without gaps, or None; `classes` their number, 0 for a real target; `label_noise` is the profile's.
    """

    x: NDArray[np.float32]
    y: NDArray[Any]
    test: NDArray[np.float32]
    classes: int
    group: NDArray[np.int64] | None = None
    label_noise: float | None = None

    def facts(self) -> dict[str, Any]:
        """What fills hyper-parameters by name, counted on the training rows."""
        counts = tuple(np.bincount(self.y, minlength=self.classes).tolist()) if self.classes else None
        return {
            "num_samples": len(self.y),
            "num_features": self.x.shape[1],
            "num_classes": self.classes or None,
            "num_groups": None if self.group is None else int(self.group.max()) + 1,
            "class_counts": counts,
            "label_noise": self.label_noise,
        }


def predict(setting: Setting, fold: Fold, seeds: Seeds) -> tuple[NDArray[Any], int]:
    """Train on the fold's training rows and predict the others; also the number of parameters of one model.

    Returns:
        log-probabilities (S, m, classes), or values (S, m) for a real target. S is the number of seeds for a
        network and 1 for the others, which draw nothing.

    Raises:
        ValueError: the part refuses its hyper-parameters or the data, or training ends in numbers that are not finite.
    """
    train = {"network": _network, "boosting": _boosting, "linear": _linear}[setting["family"]]
    predictions, parameters = train(setting, fold, seeds)
    if not np.isfinite(predictions).all():
        raise ValueError("training ended in numbers that are not finite")
    return predictions, parameters


def part_of(setting: Setting) -> Any:
    """The part that a setting names, or None."""
    if "part" not in setting:
        return None
    room, _, name = setting["part"].partition(".")
    return getattr(import_module(f"lossary.{room}"), name)


def filled(setting: Setting, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that the setting's part asks for by name."""
    return fill(part_of(setting), facts) if "part" in setting else {}


def recipe(setting: Setting, fold: Fold, seeds: Seeds) -> Recipe:
    """The parts of a network's setting, made for this fold and these seeds."""
    part, hyper, facts = part_of(setting), setting.get("hyper", {}), fold.facts()
    role = setting.get("role", "")
    loss = _plain_loss(setting, fold)
    if role == "loss":
        loss = _weighted(_stacked_loss(part, {**fill(part, facts), **hyper}, fold, seeds), setting, fold)
    parts: dict[str, Any] = {"optimizer": partial(_adamw, lr=setting["lr"], weight_decay=setting["weight_decay"])}
    if role == "optimizer":
        parts["optimizer"] = _optimizer(part, setting, {**fill(part, facts), **hyper})
    if role in ("weighting", "selector"):
        epochs, generators = -(-setting["steps"] * setting["batch"] // len(fold.y)), seeds.torch(role)
        asked = inspect.signature(part).parameters

        def make(s: int) -> Any:
            own = {"epochs": epochs, "generator": generators[s], "labels": torch.from_numpy(fold.y)}
            bound = {**fill(part, facts), **{name: own[name] for name in own if name in asked}, **hyper}
            return part(**bound) if isinstance(part, type) else partial(part, **bound)

        copies = per_seed(make, seeds)
        if role == "selector":
            parts["selector"] = copies
        if role == "weighting" or mark_of(part).options["weighs"]:
            parts["weighting"] = copies
    if role == "procedure":
        parts["procedure"] = lambda model, loss: part.build(model, loss, facts, **hyper)
    return Recipe(loss, **parts)


def _network(setting: Setting, fold: Fold, seeds: Seeds) -> tuple[NDArray[Any], int]:
    centre, scale = (0.0, 1.0) if fold.classes else (fold.y.mean(), fold.y.std() or 1.0)
    x, y = torch.from_numpy(fold.x), torch.from_numpy(fold.y if fold.classes else (fold.y - centre) / scale)
    if not fold.classes:
        y = y.float()
    made, names = recipe(setting, fold, seeds), []
    steps, batch = setting["steps"], setting["batch"]

    def model(name: str) -> nn.Module:
        """A network of its own for each name; the first starts as the plain network would."""
        ids = tuple(id + 100_000 * len(names) for id in seeds.ids)
        names.append(name)
        sizes = (x.shape[1], *setting["hidden"], fold.classes or 1)
        return stacked_mlp(sizes, Seeds(ids), activation=setting["activation"])

    if made.procedure is None:
        trained = model("")
        group = None if fold.group is None else torch.from_numpy(fold.group)
        fit(
            trained, x, y, loss=made.loss, seeds=seeds, steps=steps, batch=batch, optimizer=made.optimizer,
            group=group, weighting=made.weighting, selector=made.selector,
        )  # fmt: skip
    else:
        trained = made.procedure(model, made.loss)
        _in_turns(trained, x, y, made.optimizer, seeds, steps, batch)
    trained.eval()
    test = torch.from_numpy(fold.test).expand(len(seeds), -1, -1)
    with torch.no_grad():
        output = torch.cat([trained(test[:, i : i + ROWS_AT_ONCE]) for i in range(0, len(fold.test), ROWS_AT_ONCE)], 1)
    parameters = sum(p.numel() for p in trained.parameters()) // len(seeds)
    if fold.classes:
        return output.log_softmax(-1).numpy(), parameters
    return output.squeeze(-1).double().numpy() * scale + centre, parameters


def _in_turns(
    procedure: Procedure,
    x: Tensor,
    y: Tensor,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    seeds: Seeds,
    steps: int,
    batch: int,
) -> None:
    """Train a procedure on the batches that `fit` would draw."""
    optimizers = {name: optimizer(player.parameters()) for name, player in procedure.players().items()}
    generator = seeds.torch("turns")[0]
    procedure.train()
    for step, rows in zip(range(steps), _batches(len(x), seeds.torch("order"), batch)):
        advance(procedure, (x[rows], y[rows]), optimizers, step=step, generator=generator)


def _batches(n: int, generators: Sequence[Generator], batch: int) -> Iterator[Tensor]:
    """Endless (S, batch) positions, permutation after permutation."""
    pool = torch.empty(len(generators), 0, dtype=torch.int64)
    while True:
        while pool.shape[1] < batch:
            pool = torch.cat([pool, torch.stack([torch.randperm(n, generator=g) for g in generators])], 1)
        yield pool[:, :batch]
        pool = pool[:, batch:]


def _plain_loss(setting: Setting, fold: Fold) -> Loss:
    if fold.classes:
        return _weighted(cross_entropy, setting, fold)
    if setting["error"] == "absolute":
        return lambda output, target: (output.squeeze(-1) - target).abs()
    return lambda output, target: (output.squeeze(-1) - target) ** 2


def _stacked_loss(part: Any, hyper: Mapping[str, Any], fold: Fold, seeds: Seeds) -> Loss:
    """The loss for a whole stack: as it is where it broadcasts, otherwise a copy for each seed."""
    if isinstance(part, type):
        values: Loss = per_seed(lambda s: part(**hyper), seeds)
    elif mark_of(part).options["couples"]:
        values = per_seed(lambda s: partial(part, **hyper), seeds)
    else:
        values = partial(part, **hyper)
    if fold.classes:
        return values
    return lambda output, target: values(output.squeeze(-1), target)


def _weighted(loss: Loss, setting: Setting, fold: Fold) -> Loss:
    """Values times the weights of their classes, where the setting asks for them."""
    if not fold.classes or setting["class_weight"] is None:
        return loss
    counts = np.bincount(fold.y, minlength=fold.classes)
    weight = torch.tensor(len(fold.y) / (np.count_nonzero(counts) * np.maximum(counts, 1)), dtype=torch.float32)
    return lambda output, target: loss(output, target) * weight[target]


def _optimizer(part: Any, setting: Setting, hyper: Mapping[str, Any]) -> Callable[..., Optimizer]:
    """With the setting's learning rate and weight decay; around AdamW where it wraps another optimizer."""
    asked = inspect.signature(part).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked.values())
    options = {name: setting[name] for name in ("lr", "weight_decay") if takes_any or name in asked}
    own = {name: value for name, value in (("base", _adamw), ("replicas", True)) if name in asked}
    return partial(part, **{**own, **options, **hyper})


def _boosting(setting: Setting, fold: Fold, seeds: Seeds) -> tuple[NDArray[Any], int]:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    options = {name: setting[name] for name in ("learning_rate", "max_leaf_nodes", "max_iter", "random_state")}
    if fold.classes:
        model = HistGradientBoostingClassifier(class_weight=setting["class_weight"], early_stopping=False, **options)
    else:
        model = HistGradientBoostingRegressor(loss=f"{setting['error']}_error", early_stopping=False, **options)
    return _fitted(model, fold), 0


def _linear(setting: Setting, fold: Fold, seeds: Seeds) -> tuple[NDArray[Any], int]:
    from sklearn.linear_model import LogisticRegression, Ridge

    if fold.classes:
        model = LogisticRegression(C=setting["C"], class_weight=setting["class_weight"], max_iter=300)
    else:
        model = Ridge(alpha=setting["alpha"])
    predictions = _fitted(model, fold)
    return predictions, (fold.x.shape[1] + 1) * (fold.classes if fold.classes > 2 else 1)


def _fitted(model: Any, fold: Fold) -> NDArray[Any]:
    """Predictions of a scikit-learn model, in `predict`'s shape, on one thread whatever process this is."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a solver that could go on; what counts is how it predicts
        if not fold.classes:
            return model.fit(fold.x, fold.y).predict(fold.test)[None]
        probability = np.zeros((1, len(fold.test), fold.classes))
        present = np.unique(fold.y)
        if len(present) == 1:  # a fold that holds one class only teaches that class
            probability[..., present] = 1.0
        else:
            probability[0][:, present] = model.fit(fold.x, fold.y).predict_proba(fold.test)
    return np.log(np.clip(probability, LEAST_PROBABILITY, 1.0))
