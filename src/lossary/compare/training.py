"""From a setting to predictions: stacks of networks with parts in them, boosting, linear models.

A setting is plain values that say all there is to say about one configuration:

- every family: `family` ("network", "boosting" or "linear"); `class_weight` (None or "balanced": each class, or each
  side of a label, weighs the same in all), for a real target `error` ("squared" or "absolute"); and for arms of the
  catalogue `parts`, each with `part` ("losses.poly1_cross_entropy"), `role`, `hyper` (its hyper-parameters), and in
  results also `facts`, what of the search rows filled further ones (counted anew on the rows at hand);
- network: `model` ("mlp" with `hidden` widths and `activation`, "cnn", or the user's own, "package.module:builder"),
  `optimizer` ("AdamW"), `lr`, `weight_decay`, `steps`, `batch`;
- boosting (LightGBM): `learning_rate`, `num_leaves`, `n_estimators`;
- linear: `C` (logistic regression) or `alpha` (ridge regression).
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from lossary.compare.metrics import imported
from lossary.errors import BadInput
from lossary.roles import mark_of
from lossary.roles.procedure import Procedure, advance
from lossary.tasks import Seeds, cross_entropy, fit, per_seed, small_cnn, stacked_mlp
from lossary.vocabulary import asked, fill

Loss = Callable[..., Tensor]
Setting = Mapping[str, Any]

ROWS_AT_ONCE = 4096  # when predicting
LEAST_PROBABILITY = 1e-15

_adamw = partial(AdamW, fused=True)  # the same steps, a fifth faster


@dataclass(frozen=True)
class Recipe:
    """The parts that a stack of networks is trained with, nothing more; all see the stack of seeds in front.

    Attributes:
        loss: (output, target) to values (S, batch); handed `index` too if it names it.
        optimizer: makes one of parameters; its step is handed a closure.
        weighting: called with the values and those of target, group and index that it names, gives weights (S, batch).
        selector: an iterable of positions for each seed.
        penalty: called with the stack of networks and those of its batch x and y that it names, gives (S,).
        procedure: makes one of model(name) and the loss; it then takes the place of a single network.
    """

    loss: Loss
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    weighting: Callable[..., Tensor] | None = None
    selector: Sequence[Iterable[int]] | None = None
    penalty: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    procedure: Callable[[Callable[[str], nn.Module], Loss], Procedure] | None = None


@dataclass(frozen=True, eq=False)
class Fold:
    """Encoded rows to train on, and those to predict.

    `x` (n, d) and `test` (m, d) are float32; `y` (n,) class numbers int64, (n, labels) of 0 and 1 where `several`
    labels may hold, or values float64; `group` (n,) numbers from 0 without gaps, or None; `classes` the number of
    classes or labels, 0 for a real target; `label_noise` is the profile's; `weight` (n,) what each row counts, or
    None; `shape` what a row is before it is flattened, () in a table.
    """

    x: NDArray[np.float32]
    y: NDArray[Any]
    test: NDArray[np.float32]
    classes: int
    group: NDArray[np.int64] | None = None
    label_noise: float | None = None
    several: bool = False
    weight: NDArray[np.float64] | None = None
    shape: tuple[int, ...] = ()

    @property
    def counts(self) -> NDArray[np.int64] | None:
        """Rows of each class, or with each label."""
        if self.several:
            return self.y.sum(0)
        return np.bincount(self.y, minlength=self.classes) if self.classes else None

    def facts(self) -> dict[str, Any]:
        """What fills hyper-parameters by name, counted on the training rows."""
        return {
            "num_samples": len(self.y),
            "num_features": self.x.shape[1],
            "num_classes": self.classes or None,
            "num_groups": None if self.group is None else int(self.group.max()) + 1,
            "class_counts": None if self.counts is None else tuple(self.counts.tolist()),
            "label_noise": self.label_noise,
        }


def predict(setting: Setting, fold: Fold, seeds: Seeds, *, device: str = "cpu") -> tuple[NDArray[Any], int]:
    """Train on the fold's training rows and predict the others; also the number of parameters of one model.

    Returns:
        log-probabilities (S, m, classes), log-odds (S, m, labels) or values (S, m). S is the number of seeds for a
        network and 1 for the others, which draw nothing.

    Raises:
        ValueError: the part refuses its hyper-parameters or the data, or training ends in numbers that are not finite.
    """
    made = fitted(setting, fold, seeds, device=device)
    predictions = made(fold.test)
    if not np.isfinite(predictions).all():
        raise ValueError("training ended in numbers that are not finite")
    return predictions, made.parameters


@dataclass(frozen=True)
class Fitted:
    """What training leaves: rows (m, d) go to predictions (S, m, ...), see `predict`."""

    call: Callable[[NDArray[np.float32]], NDArray[Any]]
    parameters: int = 0

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        return self.call(rows)


def fitted(setting: Setting, fold: Fold, seeds: Seeds, *, device: str = "cpu") -> Fitted:
    """Train on the fold's training rows; what comes of it can be pickled.

    Raises:
        ValueError: the part refuses its hyper-parameters or the data.
    """
    if setting["family"] == "network":
        return _network(setting, fold, seeds, device)
    if setting["family"] == "linear":
        return _linear(setting, fold)
    from lossary.compare.boosting import boosting  # LightGBM takes a second to import

    return boosting(setting, fold)


def part_of(part: Mapping[str, Any]) -> Any:
    """The part that an entry of a setting's `parts` names."""
    room, _, name = part["part"].partition(".")
    return getattr(import_module(f"lossary.{room}"), name)


def filled(part: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that the part asks for by name."""
    return fill(part_of(part), facts)


def recipe(setting: Setting, fold: Fold, seeds: Seeds, device: str = "cpu") -> Recipe:
    """The parts of a network's setting, made for this fold and these seeds."""
    facts = fold.facts()
    loss, case = _plain_loss(setting, fold, device), _cases(fold, device)
    parts: dict[str, Any] = {"optimizer": partial(_adamw, lr=setting["lr"], weight_decay=setting["weight_decay"])}
    weightings = []
    for entry in setting.get("parts", ()):
        part, hyper, role = part_of(entry), entry["hyper"], entry["role"]
        if role == "loss":
            loss = _weighted(stacked_loss(part, hyper, fold, seeds, batch=setting["batch"]), setting, fold, device)
        elif role == "optimizer":
            parts["optimizer"] = _optimizer(part, setting, {**fill(part, facts), **hyper})
        elif role == "penalty":
            parts["penalty"] = _penalty(part, {**fill(part, facts), **hyper}, seeds)
        elif role == "procedure":
            parts["procedure"] = partial(_build, part, facts, hyper)
        else:
            epochs = -(-setting["steps"] * setting["batch"] // len(fold.y))
            copies = stacked_weighting(part, role, hyper, fold, seeds, epochs=epochs)
            if role == "selector":
                parts["selector"] = copies
            if role == "weighting" or mark_of(part).options["weighs"]:
                weightings.append(copies.to(device))
    if weightings or case is not None:
        parts["weighting"] = weightings[0] if len(weightings) == 1 and case is None else _product(weightings, case)
    return Recipe(loss, **parts)


def stacked_weighting(part: Any, role: str, hyper: Mapping[str, Any], fold: Fold, seeds: Seeds, *, epochs: int) -> Any:
    """A copy of a weighting or selector for each seed, its arguments filled."""
    named, generators = inspect.signature(part).parameters, seeds.torch(role)

    def make(s: int) -> Any:
        own = {"epochs": epochs, "generator": generators[s], "labels": torch.from_numpy(fold.y)}
        bound = {**fill(part, fold.facts()), **{name: own[name] for name in own if name in named}, **hyper}
        return part(**bound) if isinstance(part, type) else partial(part, **bound)

    return per_seed(make, seeds)


def _build(
    part: Any, facts: Mapping[str, Any], hyper: Mapping[str, Any], model: Callable[[str], nn.Module], loss: Loss
) -> Procedure:
    made: Procedure = part.build(model, loss, facts, **hyper)
    return made


def _penalty(part: Any, hyper: Mapping[str, Any], seeds: Seeds) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A penalty on a whole stack of networks, which it tells apart by the generators that it is handed."""
    own = {"generator": seeds.torch("penalty")} if "generator" in inspect.signature(part).parameters else {}
    made = part(**hyper, **own) if isinstance(part, type) else partial(part, **hyper, **own)
    return lambda model, x, y: made(model, **asked(made, {"x": x, "y": y}))


def _product(weightings: Sequence[Any], case: Tensor | None) -> Callable[..., Tensor]:
    """What each row counts times the weights of the parts."""

    def weigh(values: Tensor, *, target: Tensor, group: Tensor | None, index: Tensor) -> Tensor:
        weight = torch.ones_like(values) if case is None else case[index]
        for part in weightings:
            weight = weight * part(values, **asked(part[0], {"target": target, "group": group, "index": index}))
        return weight

    return weigh


def _cases(fold: Fold, device: str) -> Tensor | None:
    return None if fold.weight is None else torch.from_numpy(fold.weight).float().to(device)


def _network(setting: Setting, fold: Fold, seeds: Seeds, device: str) -> Fitted:
    """A stack of multilayer perceptrons; any other model one seed after another, which shares no random numbers."""
    groups = [seeds] if setting["model"] == "mlp" else [seeds.one(s) for s in range(len(seeds))]
    stacks = [Stack.of(setting, fold, group, device) for group in groups]
    parameters = sum(p.numel() for stack in stacks for p in stack.model.parameters()) // len(seeds)
    return Fitted(partial(_together, stacks), parameters)


def _together(stacks: Sequence["Stack"], rows: NDArray[np.float32]) -> NDArray[Any]:
    return np.concatenate([stack(rows) for stack in stacks])


@dataclass(frozen=True)
class Stack:
    """Trained networks side by side, and how their outputs are read.

    Attributes:
        model: (S, rows, *shape) to (S, rows, outputs).
        size: S.
        shape: of a row as the model takes it.
        reads: "classes", "labels" or "values", which are scaled back by `centre` and `scale`.
    """

    model: nn.Module
    size: int
    shape: tuple[int, ...]
    reads: str
    centre: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, setting: Setting, fold: Fold, seeds: Seeds, device: str) -> "Stack":
        """Trained by the setting, then moved to the CPU."""
        model, (centre, scale) = train(setting, fold, seeds, device)
        shape = (fold.x.shape[1],) if setting["model"] == "mlp" else _shape(fold)
        reads = "labels" if fold.several else "classes" if fold.classes else "values"
        return cls(model.eval().cpu(), len(seeds), shape, reads, centre, scale)

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        inputs = torch.from_numpy(rows).unflatten(1, self.shape)
        with torch.no_grad():
            parts = [self.model(part.expand(self.size, *part.shape)) for part in inputs.split(ROWS_AT_ONCE)]
        output = torch.cat(parts, 1)
        if self.reads == "classes":
            return output.log_softmax(-1).numpy()
        return (
            output.numpy()
            if self.reads == "labels"
            else (output.squeeze(-1).double().numpy() * self.scale + self.centre)
        )


def train(setting: Setting, fold: Fold, seeds: Seeds, device: str = "cpu") -> tuple[nn.Module, tuple[float, float]]:
    """A trained stack of networks, and the mean and deviation by which a real target was standardised."""
    y, centre, scale = targets(fold)
    x, own = torch.from_numpy(fold.x), setting.get("model", "mlp")
    if own != "mlp":
        x = x.unflatten(1, _shape(fold))
    x, y = x.to(device), y.to(device)
    made, names = recipe(setting, fold, seeds, device), []

    def model(name: str) -> nn.Module:
        """A network of its own for each name; the first starts as the plain network would."""
        ids = Seeds(tuple(id + 100_000 * len(names) for id in seeds.ids))
        names.append(name)
        return _untrained(setting, fold, ids).to(device)

    with torch.random.fork_rng(devices=[]):  # a model of the user's may draw, in dropout for instance
        torch.manual_seed(seeds.torch("model")[0].initial_seed())
        if made.procedure is None:
            trained: nn.Module = model("")
            group = None if fold.group is None else torch.from_numpy(fold.group).to(device)
            fit(
                trained, x, y, loss=made.loss, seeds=seeds, steps=setting["steps"], batch=setting["batch"],
                optimizer=made.optimizer, group=group, weighting=made.weighting, selector=made.selector,
                penalty=made.penalty,
            )  # fmt: skip
        else:
            trained = made.procedure(model, made.loss).to(device)
            _in_turns(trained, x, y, made.optimizer, seeds, setting["steps"], setting["batch"])
    return trained, (centre, scale)


def targets(fold: Fold) -> tuple[Tensor, float, float]:
    """What a network is trained on: a real target standardised, and by which mean and deviation; otherwise 0 and 1."""
    if fold.classes:
        y = torch.from_numpy(fold.y)
        return y.float() if fold.several else y, 0.0, 1.0
    centre, scale = standard(fold)
    return torch.from_numpy((fold.y - centre) / scale).float(), centre, scale


def standard(fold: Fold) -> tuple[float, float]:
    """Mean and deviation, by which a real target is standardised; a constant one has deviation 1."""
    return float(fold.y.mean()), float(fold.y.std()) or 1.0


def _shape(fold: Fold) -> tuple[int, ...]:
    return fold.shape or (fold.x.shape[1],)


def _untrained(setting: Setting, fold: Fold, seeds: Seeds) -> nn.Module:
    """The setting's model, or a stack of them, with the weights of these seeds."""
    own, outputs = setting.get("model", "mlp"), fold.classes or 1
    if own == "mlp":
        return stacked_mlp((fold.x.shape[1], *setting["hidden"], outputs), seeds, activation=setting["activation"])
    generators = seeds.torch("init")
    if own == "cnn":
        return per_seed(lambda s: small_cnn(outputs, generator=generators[s], colours=fold.shape[0]), seeds)

    def build(s: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generators[s].initial_seed())
            return built(own, _shape(fold), outputs)

    return per_seed(build, seeds)


def built(name: str, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The user's model: builder(inputs, outputs), where inputs is the number of columns, or the shape of an image.

    Raises:
        BadInput: the builder raises, gives no module, or one whose output has another shape.
    """
    builder = imported(name, "--model")
    try:
        model = builder(shape[0] if len(shape) == 1 else shape, outputs)
        if not isinstance(model, nn.Module):
            raise BadInput(f"--model: {name} gave a {type(model).__name__}, expected a torch.nn.Module")
        model.eval()
        with torch.no_grad():
            got = tuple(model(torch.zeros(2, *shape)).shape)
    except BadInput:
        raise
    except Exception as error:  # whatever the user's code raises
        words = " ".join(str(error).split())
        raise BadInput(f"--model: {name} raised {type(error).__name__}: {words}") from None
    if got != (2, outputs):
        raise BadInput(f"--model: for rows of {shape} {name} gives {got}, expected (rows, {outputs})")
    return model.train()


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


def _plain_loss(setting: Setting, fold: Fold, device: str) -> Loss:
    if fold.several:
        return partial(_binary, balance=_balance(setting, fold, device))
    if fold.classes:
        return _weighted(cross_entropy, setting, fold, device)
    if setting["error"] == "absolute":
        return lambda output, target: (output.squeeze(-1) - target).abs()
    return lambda output, target: (output.squeeze(-1) - target) ** 2


def _binary(output: Tensor, target: Tensor, *, balance: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, the mean over labels; `balance` is how much a label that holds counts."""
    return F.binary_cross_entropy_with_logits(output, target, pos_weight=balance, reduction="none").mean(-1)


def _balance(setting: Setting, fold: Fold, device: str) -> Tensor | None:
    """Rows without each label for one with it, where the setting asks for balance."""
    if setting["class_weight"] is None:
        return None
    held = np.maximum(fold.counts, 1)
    return torch.tensor(np.maximum(len(fold.y) - held, 1) / held, dtype=torch.float32, device=device)


def maker(part: Any) -> Any:
    """What sets a part up from data: its `build`, where it has one."""
    return getattr(part, "build", part)


def stacked_loss(part: Any, hyper: Mapping[str, Any], fold: Fold, seeds: Seeds, *, batch: int) -> Loss:
    """The loss for a whole stack, its arguments filled: as it is where it broadcasts, otherwise a copy for each seed.

    One that asks for `labels` gets those of the training rows as it will meet them, `batch_size` says how many at once.
    """
    one, generators = maker(part), seeds.torch("loss")
    named, labels = inspect.signature(one).parameters, targets(fold)[0]
    bound = {**fill(one, fold.facts()), **hyper}

    def make(s: int) -> Any:
        offered = {"generator": generators[s], "labels": labels, "batch_size": batch}
        own = {name: offered[name] for name in offered if name in named}
        return one(**bound, **own) if isinstance(part, type) else partial(part, **bound, **own)

    coupled = isinstance(part, type) or mark_of(part).options["couples"]
    values: Loss = per_seed(make, seeds) if coupled else partial(part, **bound)
    if fold.classes:
        return values
    return lambda output, target: values(output.squeeze(-1), target)


def _weighted(loss: Loss, setting: Setting, fold: Fold, device: str) -> Loss:
    """Values times the weights of their classes, where the setting asks for them; labels have losses of their own."""
    if fold.several or not fold.classes or setting["class_weight"] is None:
        return loss
    weight = torch.tensor(class_weights(fold), dtype=torch.float32, device=device)
    one = loss[0] if isinstance(loss, nn.Module) else loss
    if "index" in asked(one, {"index": None}):
        return lambda output, target, *, index: loss(output, target, index=index) * weight[target]
    return lambda output, target: loss(output, target) * weight[target]


def class_weights(fold: Fold) -> NDArray[np.float64]:
    """(classes,): each class that occurs weighs the same in all, and the rows 1 on average."""
    counts = np.bincount(fold.y, minlength=fold.classes)
    return len(fold.y) / (np.count_nonzero(counts) * np.maximum(counts, 1))


def _optimizer(part: Any, setting: Setting, hyper: Mapping[str, Any]) -> Callable[..., Optimizer]:
    """With the setting's learning rate and weight decay; around AdamW where it wraps another optimizer."""
    asked = inspect.signature(part).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked.values())
    options = {name: setting[name] for name in ("lr", "weight_decay") if takes_any or name in asked}
    stacked = setting["model"] == "mlp"  # others are trained one by one
    own = {name: value for name, value in (("base", _adamw), ("replicas", stacked)) if name in asked}
    return partial(part, **{**own, **options, **hyper})


def _linear(setting: Setting, fold: Fold) -> Fitted:
    from sklearn.linear_model import LogisticRegression, Ridge
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a solver that could go on; what counts is how it predicts
        if not fold.classes:
            model = Ridge(alpha=setting["alpha"]).fit(fold.x, fold.y, sample_weight=fold.weight)
            return Fitted(partial(values, model), fold.x.shape[1] + 1)

        def make(fold: Fold) -> Any:
            model = LogisticRegression(C=setting["C"], class_weight=setting["class_weight"], max_iter=300)
            return model.fit(fold.x, fold.y, sample_weight=fold.weight)

        outputs = fold.classes if fold.classes > 2 or fold.several else 1
        return Fitted(choices(make, fold), (fold.x.shape[1] + 1) * outputs)


def values(model: Any, rows: NDArray[np.float32]) -> NDArray[Any]:
    """What a scikit-learn regressor predicts, (1, m)."""
    found: NDArray[Any] = model.predict(rows)[None]
    return found


def choices(make: Callable[[Fold], Any], fold: Fold) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    """A scikit-learn classifier, or one for each label, as a function of rows."""
    if not fold.several:
        return ByClass.of(make, fold)
    columns = [replace(fold, y=fold.y[:, label], classes=2, several=False) for label in range(fold.classes)]
    return partial(_log_odds, [ByClass.of(make, column) for column in columns])


def _log_odds(models: "Sequence[ByClass]", rows: NDArray[np.float32]) -> NDArray[Any]:
    logs = [model(rows)[0] for model in models]
    return np.stack([log[:, 1] - log[:, 0] for log in logs], 1)[None]


@dataclass(frozen=True)
class ByClass:
    """A classifier that knows only the classes that occurred, `present`; of one class there is nothing to learn."""

    model: Any
    present: NDArray[np.int64]
    classes: int

    @classmethod
    def of(cls, make: Callable[[Fold], Any], fold: Fold) -> "ByClass":
        """`make` is handed the fold with its classes numbered without gaps."""
        present, y = np.unique(fold.y, return_inverse=True)
        model = make(replace(fold, y=y, classes=len(present))) if len(present) > 1 else None
        return cls(model, present, fold.classes)

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        """Log-probabilities (1, m, classes)."""
        chance = np.zeros((1, len(rows), self.classes))
        chance[..., self.present] = 1.0 if self.model is None else self.model.predict_proba(rows)
        return np.log(np.clip(chance, LEAST_PROBABILITY, 1.0))
