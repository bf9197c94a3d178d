"""HRR loss: does a network that counts white dots count other things better than with cross-entropy?

As in the official code the distances of a batch enter through one norm. The networks are convolutional, so the seeds
run one after another: a claim takes two to three minutes for twenty of them.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import HRRClassificationLoss
from lossary.tasks import PerSeed, accuracy, cross_entropy, fit, per_seed, small_cnn, stacked_mlp

COUNTS, SIDE, CELL, WIDTH, DIM = 6, 24, 8, 128, 64
SHIFTS = ("larger", "squares", "rings", "inverted")


def _images(rng: np.random.Generator, n: int, kind: str) -> tuple[Tensor, Tensor]:
    """(n, 1, 24, 24) images, 0 or 1, with 1 to 6 things each in a cell of its own of a 3 x 3 grid; counts from 0."""
    counts = rng.integers(1, COUNTS + 1, size=n)
    taken = rng.random((n, 9)).argsort(1) < counts[:, None]
    low, high = (2.5, 3.5) if kind in ("larger", "rings") else (1.5, 2.5)
    radius = rng.uniform(low, high, size=(n, 9, 1, 1))
    grid = CELL * np.stack(np.divmod(np.arange(9), 3), 1) + (CELL - 1) / 2
    centre = grid + rng.uniform(-1, 1, size=(n, 9, 2)) * (CELL / 2 - high)
    rows, columns = np.abs(np.arange(SIDE) - centre[..., None]).transpose(2, 0, 1, 3)
    if kind == "squares":
        reach = np.maximum(rows[..., None], columns[..., None, :])
    else:
        reach = np.hypot(rows[..., None], columns[..., None, :])
    drawn = (reach <= radius) & ((reach > radius - 1.2) | (kind != "rings")) & taken[..., None, None]
    image = drawn.any(1) != (kind == "inverted")
    return torch.from_numpy(image[:, None].astype(np.float32)), torch.from_numpy(counts - 1)


def _data(seeds: Seeds, stream: str, n: int, kind: str) -> tuple[Tensor, Tensor]:
    images, counts = zip(*(_images(rng, n, kind) for rng in seeds.numpy(stream)))
    return torch.stack(images), torch.stack(counts)


class _RandomCodes(HRRClassificationLoss):
    """The control: random unit codes without keys, values or binding; prediction is by cosine."""

    def __init__(self, *args: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.code = F.normalize(torch.randn(self.code.shape, generator=kwargs["generator"]), dim=1)

    def scores(self, input: Tensor) -> Tensor:
        return F.cosine_similarity(input.unsqueeze(-2), self.code, dim=-1)


def _networks(seeds: Seeds, outputs: int) -> PerSeed:
    """A small convolutional network for each seed, with a hidden dense layer, which targets such as codes need."""
    generators, dense = seeds.torch("convolutions"), stacked_mlp((WIDTH, outputs), seeds)
    return per_seed(
        lambda s: nn.Sequential(
            small_cnn(WIDTH, generator=generators[s], channels=(8, 16)), nn.ReLU(), *dense.replica(s)
        ),
        seeds,
    )


def _shifted_accuracy(seeds: Seeds, *, head: str, lr: float, kinds: tuple[str, ...] = SHIFTS) -> Tensor:
    """Percentage of counts that are right, mean over kinds of images, per seed."""
    x, y = _data(seeds, "train", seeds.few(2000, smoke=64), "dots")
    adam = partial(torch.optim.Adam, lr=lr, fused=True)
    train = {"seeds": seeds, "steps": seeds.few(400, smoke=2), "optimizer": adam}
    if head == "softmax":
        scores = _networks(seeds, COUNTS)
        fit(scores, x, y, loss=cross_entropy, **train)
    else:
        make = {"hrr": HRRClassificationLoss, "codes": _RandomCodes}[head]
        criteria = [make(COUNTS, dim=DIM, generator=generator) for generator in seeds.torch("codes")]
        network = _networks(seeds, DIM)
        over_batch = per_seed(lambda s: lambda z, y: criteria[s].batch_norm(z.tanh(), y).expand(len(y)), seeds)
        fit(network, x, y, loss=over_batch, **train)
        scores = per_seed(lambda s: lambda images: criteria[s].scores(network[s](images).tanh()), seeds)
    tests = [_data(seeds, kind, seeds.few(500, smoke=16), kind) for kind in kinds]
    with torch.no_grad():
        return torch.stack([accuracy(scores(images), counts) for images, counts in tests]).mean(0)


def _tuned(head: str, seeds: Seeds) -> dict:
    return tune(_shifted_accuracy, [{"head": head, "lr": lr} for lr in (0.001, 0.003, 0.01)], seeds, n=2)


@claim(
    says="A network trained on white dots counts changed things better with the HRR loss than with cross-entropy",
    kind="superiority",
    metric="accuracy",
    scale="1 to 6 dots on 24x24, over larger, squares, rings, inverted; CNN 8-16-128, 400 Adam steps; 3 settings each",
)
def hrr_loss_counts_better_than_cross_entropy(seeds: Seeds) -> Arms:
    hrr, softmax = _tuned("hrr", seeds), _tuned("softmax", seeds)
    return Arms(
        _shifted_accuracy(seeds, **hrr), _shifted_accuracy(seeds, **softmax), {"method": hrr, "baseline": softmax}
    )


@claim(
    says="The HRR loss counts as well as regression to random unit codes without any binding, no better and no worse",
    kind="equality",
    metric="accuracy",
    scale="1 to 6 dots on 24x24, over larger, squares, rings, inverted; CNN 8-16-128, 400 Adam steps; lr 0.003",
)
def hrr_loss_equals_random_codes(seeds: Seeds) -> Arms:
    return Arms(*(_shifted_accuracy(seeds, head=head, lr=0.003) for head in ("hrr", "codes")))


@claim(
    says="Reading classes by unbinding is comparing with the fixed codes: both cosines agree",
    kind="exact",
    metric="deviation",
    tolerance=1e-5,
    scale="100 classes in 64 dimensions, 1000 random outputs, single precision; largest gap of cosines",
)
def unbinding_is_comparing_with_codes(seeds: Seeds) -> Arms:
    gaps = []
    for codes, outputs in zip(seeds.torch("codes"), seeds.torch("outputs")):
        criterion = HRRClassificationLoss(100, dim=DIM, generator=codes)
        s = torch.randn(seeds.few(1000), DIM, generator=outputs).tanh()
        gaps.append((criterion.scores(s) - F.normalize(s, dim=1) @ criterion.code.T).abs().max().item())
    return Arms(gaps)
