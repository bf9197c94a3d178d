"""Masks against the overconfidence of networks that were trained on distilled data: do they help?

Ten images a class are distilled from 1500 by gradient matching, a network is trained on them, and its temperature is
fitted on 800 real images that it did not see; it is judged on the rest. The masks are stand-ins, as the part says.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim
from lossary.tasks import accuracy, cross_entropy, fit, optdigits_writers, stacked_mlp
from lossary.tasks.models import StackedMLP
from lossary.uncertainty import MaskedTemperatureScaling, masked_distillation_step
from lossary.uncertainty._calibration import calibrated, expected_calibration_error, temperature

SIZES, TRAIN, CALIBRATE, IMAGES = (64, 64, 10), 1500, 800, 10


class Trained(NamedTuple):
    """Networks for all seeds, and the real images (S, n, 64) and labels (S, n) to calibrate and to test on."""

    model: StackedMLP
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _trained(seeds: Seeds, *, distilled: bool = True, mask_rate: float = 0.0) -> Trained:
    data = optdigits_writers()
    home = torch.nonzero(data.group == 0).squeeze(1)
    rows = torch.stack([home[torch.randperm(len(home), generator=g)] for g in seeds.torch("people")])
    x, y = data.x[rows[:, :TRAIN]], data.y[rows[:, :TRAIN]]
    if distilled:
        pairs = zip(x, y, seeds.torch("distil"), seeds.torch("mask"))
        found = [_distilled(seeds.one(s), *p, mask_rate=mask_rate) for s, p in enumerate(pairs)]
        x, y = (torch.stack(t) for t in zip(*found))
    model = stacked_mlp(SIZES, seeds)
    fit(model, x, y, loss=cross_entropy, seeds=seeds, steps=seeds.few(400), lr=0.05)
    parts = rows[:, TRAIN : TRAIN + CALIBRATE], rows[:, TRAIN + CALIBRATE :]
    return Trained(model, *((data.x[r], data.y[r]) for r in parts))


def _distilled(
    seed: Seeds, x: Tensor, y: Tensor, generator: Generator, masks: Generator, *, mask_rate: float
) -> tuple[Tensor, Tensor]:
    """Images that begin as real ones and come to match their gradients, on six networks that learn from the images."""
    labels = torch.arange(10).repeat_interleave(IMAGES)
    start = torch.cat([torch.nonzero(y == c).squeeze(1)[:IMAGES] for c in range(10)])
    images = x[start].clone().requires_grad_()
    optimizer = torch.optim.SGD([images], lr=0.1, momentum=0.5)
    for outer in range(seed.few(6, smoke=1)):
        network = stacked_mlp(SIZES, Seeds((1_000_000 + 10 * seed.ids[0] + outer,))).replica(0)
        learner = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(20):
            batch = torch.randint(len(x), (256,), generator=generator)
            optimizer.zero_grad()
            masked_distillation_step(
                network, images, labels, x[batch], y[batch], mask_rate=mask_rate, generator=masks
            ).backward(inputs=[images])
            optimizer.step()
            for _ in range(5):
                learner.zero_grad()
                cross_entropy(network(images.detach()), labels).mean().backward()
                learner.step()
    return images.detach(), labels


def _logits(model: StackedMLP, images: Tensor) -> NDArray:
    with torch.no_grad():
        return model(images).double().numpy()


def _calibration_error(trained: Trained, *, masked: bool) -> NDArray:
    """In percent, per seed, from 15 bins, after a temperature fitted with or without masks."""
    (x, y), (new, labels) = trained.held_out, trained.test
    errors = []
    for held_out, z, target, truth in zip(_logits(trained.model, x), _logits(trained.model, new), y, labels):
        if masked:
            p = MaskedTemperatureScaling().fit(held_out, target).predict_proba(z)
        else:
            p = calibrated(z, temperature(held_out, target))
        errors.append(100 * expected_calibration_error(p.max(1), p.argmax(1) == truth.numpy()))
    return np.array(errors)


@claim(
    says="After masked temperature scaling a network trained on distilled data errs less than after a plain one",
    kind="superiority",
    metric="calibration error",
    scale="optdigits 8x8, 10 images a class distilled from 1500, MLP 64-64-10, 800 to calibrate; nothing to tune",
)
def masked_logits_calibrate_better(seeds: Seeds) -> Arms:
    trained = _trained(seeds)
    whole = _calibration_error(_trained(seeds, distilled=False), masked=False).mean()
    details = {"mean of the baseline where all 1500 images train": whole}
    return Arms(_calibration_error(trained, masked=True), _calibration_error(trained, masked=False), details)


@claim(
    says="A network trained on images distilled under masks errs less after temperature scaling",
    kind="superiority",
    metric="calibration error",
    scale="optdigits 8x8, 10 images a class distilled from 1500, MLP 64-64-10, 800 to calibrate; nothing to tune",
)
def masked_distillation_calibrates_better(seeds: Seeds) -> Arms:
    arms = (_calibration_error(_trained(seeds, mask_rate=rate), masked=False) for rate in (0.1, 0.0))
    return Arms(*arms)


@claim(
    says="Masks during distillation cost no accuracy",
    kind="noninferiority",
    metric="accuracy",
    scale="optdigits 8x8, 10 images a class distilled from 1500, MLP 64-64-10; nothing to tune",
)
def masked_distillation_keeps_accuracy(seeds: Seeds) -> Arms:
    both = [_trained(seeds, mask_rate=rate) for rate in (0.1, 0.0)]
    return Arms(*(accuracy(torch.from_numpy(_logits(t.model, t.test[0])), t.test[1]) for t in both))


@claim(
    says="The largest logits of a network trained on distilled data lie closer together, relative to their mean",
    kind="ratio",
    metric="variance",
    margin=0.9,
    scale="variance over squared mean, optdigits 8x8, 10 images a class distilled from 1500 against all, MLP 64-64-10",
)
def largest_logits_are_concentrated(seeds: Seeds) -> Arms:
    arms, ranks = [], {}
    for distilled in (True, False):
        trained = _trained(seeds, distilled=distilled)
        top = _logits(trained.model, trained.test[0]).max(2)
        arms.append(top.var(1) / top.mean(1) ** 2)
        with torch.no_grad():
            singular = torch.linalg.svdvals(trained.model[:2](trained.test[0])).double()
        share = singular / singular.sum(1, keepdim=True)
        entropy = -(share * share.clamp_min(1e-12).log()).sum(1)
        ranks["distilled" if distilled else "all"] = entropy.exp().mean().item()
    return Arms(*arms, {"mean effective rank of the hidden features": ranks})
