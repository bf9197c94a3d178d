"""Z-loss: better top-k accuracy on words than softmax, and steps whose price ignores the number of classes?

The words are synthetic: what comes next depends on a context of 16 numbers, with Zipf's frequencies on top.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import FactoredOutput, z_loss, z_loss_from_sums
from lossary.tasks import cross_entropy, fit, stacked_mlp

WORDS, CONTEXT, WIDTH, BATCH = 500, 16, 64, 32


def _taylor_softmax(input: Tensor, target: Tensor) -> Tensor:
    """-log p_y with p proportional to 1 + o + o^2 / 2: the strongest spherical loss before the Z-loss."""
    mass = 1 + input + input.square() / 2
    return mass.sum(-1).log() - mass.gather(-1, target.unsqueeze(-1)).squeeze(-1).log()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "taylor_softmax": _taylor_softmax,
    "z_loss": z_loss,
}
PLAIN = [{"lr": lr, "decay": decay} for lr in (0.001, 0.003, 0.01, 0.03) for decay in (0.0, 0.1)]
Z = [{"lr": lr, "decay": 0.0, "a": a, "b": b} for lr in (0.003, 0.01) for a in (0.1, 1.0) for b in (3.0, 10.0)]


def _text(seeds: Seeds, n: int) -> tuple[Tensor, Tensor]:
    """Contexts (S, n, 16) and the words that follow (S, n)."""
    contexts, words = [], []
    for rng in seeds.numpy("text"):
        context, meaning = rng.normal(size=(n, CONTEXT)), rng.normal(size=(CONTEXT, WORDS)) / 2
        score = context @ meaning - np.log(np.arange(1, WORDS + 1)) + rng.gumbel(size=(n, WORDS))
        contexts.append(torch.from_numpy(context.astype(np.float32)))
        words.append(torch.from_numpy(score.argmax(1)))
    return torch.stack(contexts), torch.stack(words)


def _top5(seeds: Seeds, *, loss: str, lr: float, decay: float, **hyper: float) -> Tensor:
    """Percentage of 3000 held-out words among the five largest logits, per seed; 6000 words for training."""
    n = seeds.few(6000, smoke=100)
    (x, y), model = _text(seeds, 3 * n // 2), stacked_mlp((CONTEXT, WIDTH, WORDS), seeds)
    adam = partial(torch.optim.AdamW, lr=lr, weight_decay=decay)
    objective = partial(LOSSES[loss], **hyper)
    fit(model, x[:, :n], y[:, :n], loss=objective, seeds=seeds, steps=seeds.few(300), optimizer=adam)
    with torch.no_grad():
        best = model(x[:, n:]).topk(5).indices
    return 100 * (best == y[:, n:].unsqueeze(-1)).any(-1).double().mean(-1)


def _beats(other: str, seeds: Seeds) -> Arms:
    method = tune(_top5, [{"loss": "z_loss", **setting} for setting in Z], seeds)
    baseline = tune(_top5, [{"loss": other, **setting} for setting in PLAIN], seeds)
    return Arms(_top5(seeds, **method), _top5(seeds, **baseline), {"method": method, "baseline": baseline})


@claim(
    says="The Z-loss finds more words among its top five than cross-entropy",
    kind="superiority",
    metric="accuracy",
    scale="500 synthetic words of Zipf frequencies, MLP 16-64-500, 300 AdamW steps of 64; 8 settings each",
)
def z_loss_beats_cross_entropy_at_top_5(seeds: Seeds) -> Arms:
    return _beats("cross_entropy", seeds)


@claim(
    says="The Z-loss finds more words among its top five than Taylor softmax, another spherical loss",
    kind="superiority",
    metric="accuracy",
    scale="500 synthetic words of Zipf frequencies, MLP 16-64-500, 300 AdamW steps of 64; 8 settings each",
)
def z_loss_beats_taylor_softmax_at_top_5(seeds: Seeds) -> Arms:
    return _beats("taylor_softmax", seeds)


def _batch(classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(BATCH, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    return hidden, torch.randint(classes, (BATCH,), generator=generator)


def _factored_step(output: FactoredOutput, hidden: Tensor, target: Tensor) -> None:
    sums = output(hidden, target)
    for value in sums:
        value.retain_grad()
    z_loss_from_sums(*sums, num_classes=len(output.V), b=5.0).mean().backward()
    output.update(hidden, target, tuple(value.grad for value in sums), lr=0.1)


def _dense_step(weight: Tensor, hidden: Tensor, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    weight.requires_grad_()
    slope, _ = torch.autograd.grad(loss(hidden @ weight.T, target).mean(), (weight, hidden))
    with torch.no_grad():
        return weight.sub_(slope, alpha=0.1)


def _seconds(classes: int, seeds: Seeds, *, factored: bool) -> list[float]:
    """Fastest of five steps of the output layer alone, forward to update, per seed."""
    fastest = []
    for generator in seeds.torch("steps"):
        weight = torch.randn(classes, WIDTH, generator=generator) / 8
        output = FactoredOutput(weight) if factored else None
        times = []
        for _ in range(5):
            hidden, target = _batch(classes, generator)
            start = time.perf_counter()
            if output is None:
                weight = _dense_step(weight.detach(), hidden, target, cross_entropy)
            else:
                _factored_step(output, hidden, target)
            times.append(time.perf_counter() - start)
        fastest.append(min(times))
    return fastest


@claim(
    says="A factored step of the Z-loss takes at most a tenth of the time of a dense one of cross-entropy",
    kind="ratio",
    metric="time",
    margin=0.1,
    scale="output layer of 50 000 classes, width 64, batches of 32, one thread, fastest of 5 steps",
)
def factored_step_is_faster_than_dense_softmax(seeds: Seeds) -> Arms:
    classes = seeds.few(50_000, smoke=1000)
    return Arms(_seconds(classes, seeds, factored=True), _seconds(classes, seeds, factored=False))


@claim(
    says="A hundred times the classes leave a factored step within half as much time again",
    kind="ratio",
    metric="time",
    margin=1.5,
    scale="output layer of 100 000 against 1000 classes, width 64, batches of 32, one thread, fastest of 5 steps",
)
def factored_step_does_not_feel_the_classes(seeds: Seeds) -> Arms:
    return Arms(*(_seconds(seeds.few(n, smoke=1000), seeds, factored=True) for n in (100_000, 1000)))


@claim(
    says="The factored update is gradient descent on the dense matrix, exactly",
    kind="exact",
    metric="deviation",
    tolerance=1e-8,
    scale="output layer of 2000 classes, width 64, 100 steps of 32 at lr 0.1, double precision; largest gap in W",
)
def factored_update_is_exact(seeds: Seeds) -> Arms:
    gaps = []
    for generator in seeds.torch("exact"):
        weight = torch.randn(2000, WIDTH, generator=generator, dtype=torch.float64) / 8
        output = FactoredOutput(weight)
        for _ in range(seeds.few(100)):
            hidden, target = _batch(2000, generator, torch.float64)
            weight = _dense_step(weight.detach(), hidden, target, partial(z_loss, b=5.0))
            _factored_step(output, hidden, target)
        gaps.append((output.weight() - weight).abs().max().item())
    return Arms(gaps)
