"""Meta OOD learning: does rehearsing the adaptation help when rotated digits arrive, twenty labelled ones at a time?

Known are the digits 0 to 5, auxiliary outliers 6 and 7, strange 8 and 9. Training rotates by up to 45 degrees either
way; then six domains arrive, at 0, 15, ..., 75 degrees, and the network takes three gradient steps on twenty labelled
digits of each, one domain after another. The baseline sees the same numbers of rotated digits and of outliers, learns
to be unsure of the outliers in the usual way, and adapts by the same steps.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import MetaOODLearner, adapt_to_domain, caood_benchmark
from lossary.roles import advance
from lossary.tasks import Data, cross_entropy, digits, split, stacked_mlp

KNOWN, AUXILIARY = 6, 8  # digits below 6 are known, 6 and 7 auxiliary
STAGES, SUPPORT, QUERY, INNER_STEPS = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0), 20, 32, 3
GRID = [{"lr": lr, "inner_lr": inner} for lr in (0.003, 0.01) for inner in (0.01, 0.1)]


def _rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Images (S, n, 64) turned by degrees (S, 1) or (S, n)."""
    angle = torch.deg2rad(degrees).expand(images.shape[:2]).flatten()
    zero = torch.zeros_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    flat = images.reshape(-1, 1, 8, 8)
    grid = F.affine_grid(turn, list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, align_corners=False).view(images.shape)


@dataclass
class _Stream:
    """Batches of digits of one kind, (S, n) rows drawn anew each time, and angles."""

    data: Data
    rows: Tensor
    generators: list[Generator]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        drawn = torch.stack([torch.randint(self.rows.shape[1], (n,), generator=g) for g in self.generators])
        rows = self.rows.gather(1, drawn)
        return self.data.x[rows], self.data.y[rows]

    def angles(self, n: int) -> Tensor:
        """(S, n) degrees from -45 to 45."""
        return 90 * torch.stack([torch.rand(n, generator=g) for g in self.generators]) - 45


def _rows(data: Data, seeds: Seeds, part: str, low: int, high: int) -> Tensor:
    """(S, n) rows of the digits from low to below high in the training or the test part, in random order."""
    rows = getattr(split(data, seeds, test=0.4), part)
    wanted = rows[(data.y[rows] >= low) & (data.y[rows] < high)].view(len(seeds), -1)
    order = torch.stack([torch.randperm(wanted.shape[1], generator=g) for g in seeds.torch("rows")])
    return wanted.gather(1, order)


def _trained(seeds: Seeds, *, rehearse: bool, lr: float, inner_lr: float) -> nn.Module:
    """A network for each seed, trained in episodes or in the usual way."""
    model = stacked_mlp((64, 64, 64, KNOWN), seeds)
    learner = MetaOODLearner(model, inner_lr=inner_lr, inner_steps=INNER_STEPS)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    data = digits()
    known = _Stream(data, _rows(data, seeds, "train", 0, KNOWN), seeds.torch("known"))
    strange = _Stream(data, _rows(data, seeds, "train", KNOWN, AUXILIARY), seeds.torch("strange"))
    for step in range(seeds.few(300)):
        (x, y), (outliers, _) = known.draw(SUPPORT + QUERY), strange.draw(QUERY)
        if rehearse:
            angle = known.angles(1)
            x, outliers = _rotated(x, angle), _rotated(outliers, angle)
            episode = x[:, :SUPPORT], y[:, :SUPPORT], x[:, SUPPORT:], y[:, SUPPORT:], outliers
            advance(learner, episode, {"model": optimizer}, step=step)
        else:
            x, outliers = _rotated(x, known.angles(SUPPORT + QUERY)), _rotated(outliers, strange.angles(QUERY))
            logits = model(outliers)
            doubt = (logits.logsumexp(-1) - logits.mean(-1)).mean(-1)
            optimizer.zero_grad()
            torch.autograd.backward((cross_entropy(model(x), y).mean(-1) + learner.outlier_weight * doubt).sum())
            optimizer.step()
    return model.eval()


def _deployed(seeds: Seeds, *, measure: str, rehearse: bool, lr: float, inner_lr: float, adapts: bool = True) -> Tensor:
    """Mean over the six domains of AUROC or accuracy, in percent, per seed."""
    model = _trained(seeds, rehearse=rehearse, lr=lr, inner_lr=inner_lr)
    data = digits()
    known, strange = _rows(data, seeds, "test", 0, KNOWN), data.x[_rows(data, seeds, "test", AUXILIARY, 10)]
    arriving, test = known.split([len(STAGES) * SUPPORT, known.shape[1] - len(STAGES) * SUPPORT], dim=1)
    domains = []
    for degrees, rows in zip(STAGES, arriving.split(SUPPORT, dim=1)):
        turned = partial(_rotated, degrees=torch.full((len(seeds), 1), degrees))
        domains.append(
            (turned(data.x[rows]), data.y[rows], turned(data.x[test]), data.y[test], turned(strange)),
        )
    adapt = partial(adapt_to_domain, lr=inner_lr, steps=INNER_STEPS) if adapts else None
    return 100 * caood_benchmark(model, domains, adapt=adapt)[measure].mean(0)


_rehearsed_auroc = partial(_deployed, measure="auroc", rehearse=True)
_usual_auroc = partial(_deployed, measure="auroc", rehearse=False)
_rehearsed_accuracy = partial(_deployed, measure="accuracy", rehearse=True)
_usual_accuracy = partial(_deployed, measure="accuracy", rehearse=False)


@claim(
    says="Having rehearsed the adaptation, a network detects unseen digits better while domains arrive than one trained"
    " in the usual way that adapts by the same steps",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-5 against 8 and 9, six domains rotated by 0 to 75 degrees with 20 labels each, MLP 64-64-64-6, 300"
    " steps; 4 settings each",
)
def rehearsal_improves_detection(seeds: Seeds) -> Arms:
    rehearsed, usual = tune(_rehearsed_auroc, GRID, seeds), tune(_usual_auroc, GRID, seeds)
    details = {"method": rehearsed, "baseline": usual}
    return Arms(_rehearsed_auroc(seeds, **rehearsed), _usual_auroc(seeds, **usual), details)


@claim(
    says="Having rehearsed the adaptation, a network detects unseen digits better while domains arrive than one trained"
    " in the usual way that stays as it is",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-5 against 8 and 9, six domains rotated by 0 to 75 degrees with 20 labels each, MLP 64-64-64-6, 300"
    " steps; 4 settings each",
)
def adapting_beats_staying(seeds: Seeds) -> Arms:
    static = partial(_usual_auroc, adapts=False, inner_lr=0.1)  # which has no part in it
    rates = [{"lr": lr} for lr in (0.001, 0.003, 0.01, 0.03)]
    rehearsed, usual = tune(_rehearsed_auroc, GRID, seeds), tune(static, rates, seeds)
    details = {"method": rehearsed, "baseline": usual}
    return Arms(_rehearsed_auroc(seeds, **rehearsed), static(seeds, **usual), details)


@claim(
    says="Having rehearsed the adaptation, a network classifies no worse while domains arrive than one trained in the"
    " usual way that adapts by the same steps",
    kind="noninferiority",
    metric="accuracy",
    scale="digits 0-5, six domains rotated by 0 to 75 degrees with 20 labels each, MLP 64-64-64-6, 300 steps; 4"
    " settings each",
)
def rehearsal_keeps_accuracy(seeds: Seeds) -> Arms:
    rehearsed, usual = tune(_rehearsed_accuracy, GRID, seeds), tune(_usual_accuracy, GRID, seeds)
    details = {"method": rehearsed, "baseline": usual}
    return Arms(_rehearsed_accuracy(seeds, **rehearsed), _usual_accuracy(seeds, **usual), details)
