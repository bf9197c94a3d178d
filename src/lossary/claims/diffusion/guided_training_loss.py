"""Guided training loss: does it forgive a wrong guidance scale, and is it better at the right one?

Four classes of two overlapping Gaussians each, on a circle; the exact predictions are known. Then the ten classes of
real digits, of 64 pixels; the distance of samples of all classes is Frechet's between features. Guidance w means
(1 + w) cond - w uncond, both of them evaluated at each step, at w 0 as well. The baseline drops one condition in ten,
as usual; both are charged the error of the noise. The guided loss evaluates the network twice for each sample, so the
usual one takes twice the steps. The first two claims are registered anew with that: their first results, with as many
steps for both, had been seen.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import effective_guidance_scale, guided_noise_loss
from lossary.diffusion._denoiser import Denoiser, denoising_error
from lossary.diffusion._guidance import Guided, classifier_free
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._process import over
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import digit_distance, drawn_digits, fit_denoiser, sheet, sliced_wasserstein, stacked_denoiser

TRUTH = ring(8, radius=1.3, scale=0.3)
CLASSES = 4
RATES = (0.003, 0.01)
STRENGTHS = (0.0, 1.0, 2.0, 4.0, 8.0)
MANY, FEW = 20, 10  # steps of sampling


def _class(c: int) -> Mixture:
    """Components c and c + 4, on opposite sides."""
    return Mixture(TRUTH.means[c::CLASSES], 0.3)


def _plain(denoise: Denoiser, clean: Tensor, sigma: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
    """The error of the noise; the draw has dropped conditions."""
    return sigma**-2 * denoising_error(denoise, clean, sigma, noise, condition)


def _ring(n: int, generators: Sequence[Generator]) -> tuple[Tensor, Tensor]:
    """Points (S, n, 2) and their classes (S, n)."""
    found = [TRUTH.sample(n, generator=g) for g in generators]
    x, component = (torch.stack(parts) for parts in zip(*found))
    return x.float(), component % CLASSES


def _digits(n: int, generators: Sequence[Generator]) -> tuple[Tensor, Tensor]:
    """Digits (S, n, 64) and their classes (S, n)."""
    x, classes = drawn_digits(n, generators)
    return x, classes.argmax(-1)


def _trained(seeds: Seeds, *, guided: bool, lr: float, digits: bool = False) -> Denoiser:
    size, hidden, classes, data = (64, (128, 128), 10, _digits) if digits else (2, (64, 64), CLASSES, _ring)
    denoise = stacked_denoiser(size, seeds, hidden=hidden, conditions=classes)

    def draw(n: int, generators: Sequence[Generator]) -> tuple[Tensor, Tensor]:
        x, which = data(n, generators)
        label = torch.nn.functional.one_hot(which, classes).float()
        kept = torch.stack([torch.rand(n, 1, generator=g) for g in generators]) >= 0.1
        return x, label if guided else label * kept

    loss = guided_noise_loss if guided else _plain
    steps = (1 if guided else 2) * (500 if digits else 400)  # as many evaluations
    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(steps, smoke=2), lr=lr, loss=loss)
    return denoise


def _samples(denoise: Denoiser, seeds: Seeds, *, w: float, steps: int, digits: bool = False) -> Tensor:
    """(S, 4, n, 2), or (S, 10, n, 1, 8, 8), by DDIM."""
    classes, n, shape = (10, 30, (1, 8, 8)) if digits else (CLASSES, 500, (2,))
    n, bound = seeds.few(n), 1.0 if digits else math.inf  # of pixels, as is usual in sampling pictures
    label = torch.eye(classes).repeat_interleave(n, 0).expand(len(seeds), -1, -1)
    guided = Guided(classifier_free(1 + w), lambda x, s: denoise(x, s, label), lambda x, s: denoise(x, s))

    def bounded(x: Tensor, sigma: float) -> Tensor:
        return guided(x, sigma).clamp(-bound, bound)

    sigmas = process_sigmas(denoise.process, steps, first=0.99, last=0.01)
    start = [torch.randn(classes * n, math.prod(shape), generator=g) for g in seeds.torch("start")]
    with torch.no_grad():
        found = euler(bounded, sigmas[0].item() * torch.stack(start), sigmas)
    return found.view(len(seeds), classes, n, *shape)


def _distances(seeds: Seeds, *, strengths: tuple[float, ...], steps: int, **setting: object) -> Tensor:
    """To each class, averaged: (S, strengths)."""
    denoise, rows = _trained(seeds, **setting), []
    n = seeds.few(500, smoke=8)
    true = torch.stack(
        [
            torch.stack([_class(c).sample(n, generator=g)[0].float() for c in range(CLASSES)])
            for g in seeds.torch("true")
        ]
    )
    for w in strengths:
        found = _samples(denoise, seeds, w=w, steps=steps)
        rows.append(sliced_wasserstein(found, true).mean(-1))
    return torch.stack(rows, dim=-1)


def _overall(seeds: Seeds, **setting: object) -> list[float]:
    return _distances(seeds, strengths=STRENGTHS, steps=MANY, **setting).mean(-1).tolist()


def _overall_digits(seeds: Seeds, **setting: object) -> list[float]:
    denoise = _trained(seeds, digits=True, **setting)
    found = [_samples(denoise, seeds, w=w, steps=MANY, digits=True).flatten(1, 2) for w in STRENGTHS]
    return torch.stack([digit_distance(x) for x in found]).mean(0).tolist()


def _at_one(seeds: Seeds, *, w: float, **setting: object) -> list[float]:
    return _distances(seeds, strengths=(w,), steps=FEW, **setting)[:, 0].tolist()


def _compare(score, grid: list[dict], seeds: Seeds, *, steps: int) -> Arms:
    """The guided loss against the usual one; a step of sampling takes two evaluations."""
    ours, theirs = (
        tune(score, [{"guided": guided} | one for one in grid], seeds, better="lower") for guided in (True, False)
    )
    details = {"evaluations": [2 * steps, 2 * steps], "method": ours, "baseline": theirs}
    return Arms(score(seeds, **ours), score(seeds, **theirs), details)


@claim(
    says="Over guidance w from 0 to 8 its samples are at most 0.8 times as far from the true classes, on average, at"
    " the same nominal w (true scale (1+w)/2 against 1+w)",
    kind="ratio",
    metric="sample distance",
    margin=0.8,
    scale="sliced W1, w in 0, 1, 2, 4, 8; 4 classes in 2-D, MLP of 64, loss w 1, 400 steps against 800: equal"
    " evaluations; DDIM, 20 steps; 2 rates each",
)
def guided_loss_forgives_the_scale(seeds: Seeds) -> Arms:
    return _compare(_overall, [{"lr": lr} for lr in RATES], seeds, steps=MANY)


@claim(
    says="On real digits its samples are at most 0.8 times as far from the data, on average over w from 0 to 8, at the"
    " same nominal w",
    kind="ratio",
    metric="sample distance",
    margin=0.8,
    scale="Frechet distance of 32 features, w in 0, 1, 2, 4, 8; 10 classes of digits 8x8, MLP of 128, loss w 1, 500"
    " steps against 1000: equal evaluations; DDIM, 20 steps, 300 samples; 3 rates each",
)
def guided_loss_forgives_the_scale_on_digits(seeds: Seeds) -> Arms:
    return _compare(_overall_digits, [{"lr": lr} for lr in (0.005, 0.015, 0.05)], seeds, steps=MANY)


@claim(
    says="In 10 steps, with the better of two scales for each, its samples are nearer the true classes",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; w 0 or 1; 4 classes in 2-D, MLP of 64, loss w 1, 400 steps against 800: equal evaluations; DDIM,"
    " 10 steps; 4 settings each",
)
def guided_loss_is_better_at_its_best_scale(seeds: Seeds) -> Arms:
    return _compare(_at_one, [{"lr": lr, "w": w} for lr in RATES for w in (0.0, 1.0)], seeds, steps=FEW)


@claim(
    says="Its guided prediction at w 3 is that of true guidance at scale 2, not 4: at most a quarter as far from it",
    kind="ratio",
    metric="relative error",
    margin=0.25,
    scale="root mean square of x_0-hat over times 0.1 to 0.9; 4 classes in 2-D, MLP of 64, 400 steps, lr 0.01, w 1",
)
def guided_loss_rescales_guidance(seeds: Seeds) -> Arms:
    denoise, w = _trained(seeds, guided=True, lr=0.01), 3.0
    n = seeds.few(500, smoke=8)
    near, far = [], []
    for c in range(CLASSES):
        clean = torch.stack([_class(c).sample(n, generator=g)[0] for g in seeds.torch(f"test {c}")])
        noise = torch.stack([torch.randn(n, 2, generator=g, dtype=torch.float64) for g in seeds.torch(f"noise {c}")])
        sigma = denoise.process.ratio(torch.linspace(0.1, 0.9, n, dtype=torch.float64)).expand(clean.shape[:2])
        x = clean + over(sigma, clean) * noise
        label = torch.eye(CLASSES)[c].expand(*x.shape[:2], -1)
        with torch.no_grad():
            cond, uncond = (denoise(x.float(), sigma.float(), *given).double() for given in ((label,), ()))
        found = uncond + (1 + w) * (cond - uncond)
        true, base = _class(c).denoise(x, sigma), TRUTH.denoise(x, sigma)
        for rows, scale in ((near, effective_guidance_scale(w, trained=1.0)), (far, 1 + w)):
            rows.append((found - base - scale * (true - base)).square().mean((1, 2)))
    return Arms(*(torch.stack(rows).mean(0).sqrt().tolist() for rows in (near, far)))


def draw(seeds: Seeds) -> list[Panel]:
    """Samples of one class in 20 steps at growing guidance; two digits of each class at w 4."""
    one = seeds.one(0)
    true = _class(0).sample(400, generator=one.torch("true")[0])[0]
    panels = [Panel("the class", points=true.numpy())]
    for name, guided in (("usual loss", False), ("guided loss", True)):
        denoise = _trained(one, guided=guided, lr=0.01)
        for w in (1.0, 4.0):
            found = _samples(denoise, one, w=w, steps=MANY)[0, 0, :400]
            panels.append(Panel(f"{name}, w = {w:g}", points=found.numpy()))
    for name, guided in (("usual loss", False), ("guided loss", True)):
        found = _samples(_trained(one, guided=guided, lr=0.01, digits=True), one, w=4.0, steps=MANY, digits=True)
        panels.append(Panel(f"{name}, w = 4", image=sheet(found[0, :, :2].transpose(0, 1).flatten(0, 1))))
    return panels
