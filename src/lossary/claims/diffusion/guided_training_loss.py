"""Guided training loss: does it forgive a wrong guidance scale, and is it better at the right one?

Four classes of two overlapping Gaussians each, on a circle; the exact predictions are known. Guidance w means
(1 + w) cond - w uncond. The baseline drops one condition in ten, as usual; both are charged the error of the noise.
The guided loss evaluates the network twice for each sample, so the usual one takes twice the steps. The first two
claims are registered anew with that: their first results, with as many steps for both, had been seen.
"""

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import effective_guidance_scale, guided_noise_loss
from lossary.diffusion._denoiser import Denoiser, denoising_error
from lossary.diffusion._guidance import Guided, classifier_free
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._process import over
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser

TRUTH = ring(8, radius=1.3, scale=0.3)
CLASSES = 4
RATES = (0.003, 0.01)
STRENGTHS = (0.0, 1.0, 2.0, 4.0, 8.0)


def _class(c: int) -> Mixture:
    """Components c and c + 4, on opposite sides."""
    return Mixture(TRUTH.means[c::CLASSES], 0.3)


def _plain(denoise: Denoiser, clean: Tensor, sigma: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
    """The error of the noise; the draw has dropped conditions."""
    return sigma**-2 * denoising_error(denoise, clean, sigma, noise, condition)


def _trained(seeds: Seeds, *, guided: bool, lr: float) -> Denoiser:
    denoise = stacked_denoiser(2, seeds, conditions=CLASSES)

    def draw(n: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        found = [TRUTH.sample(n, generator=g) for g in generators]
        x, component = (torch.stack(parts) for parts in zip(*found))
        label = torch.nn.functional.one_hot(component % CLASSES, CLASSES).float()
        kept = torch.stack([torch.rand(n, 1, generator=g) for g in generators]) >= 0.1
        return x.float(), label if guided else label * kept

    loss = guided_noise_loss if guided else _plain
    steps = 400 if guided else 800  # as many evaluations
    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(steps, smoke=2), lr=lr, loss=loss)
    return denoise


def _samples(denoise: Denoiser, seeds: Seeds, *, w: float, evaluations: int) -> Tensor:
    """(S, 4, n, 2) by DDIM."""
    n = seeds.few(500, smoke=8)
    label = torch.eye(CLASSES).repeat_interleave(n, 0).expand(len(seeds), -1, -1)
    guided = Guided(classifier_free(1 + w), lambda x, s: denoise(x, s, label), lambda x, s: denoise(x, s))
    sigmas = process_sigmas(denoise.process, evaluations, first=0.99, last=0.01)
    noise = torch.stack([torch.randn(CLASSES * n, 2, generator=g) for g in seeds.torch("start")])
    with torch.no_grad():
        return euler(guided, sigmas[0].item() * noise, sigmas).view(len(seeds), CLASSES, n, 2)


def _distances(seeds: Seeds, *, strengths: tuple[float, ...], evaluations: int, **setting: object) -> Tensor:
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
        found = _samples(denoise, seeds, w=w, evaluations=evaluations)
        rows.append(sliced_wasserstein(found, true).mean(-1))
    return torch.stack(rows, dim=-1)


def _overall(seeds: Seeds, **setting: object) -> list[float]:
    return _distances(seeds, strengths=STRENGTHS, evaluations=20, **setting).mean(-1).tolist()


def _at_one(seeds: Seeds, *, w: float, **setting: object) -> list[float]:
    return _distances(seeds, strengths=(w,), evaluations=10, **setting)[:, 0].tolist()


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
    grids = [[{"guided": guided, "lr": lr} for lr in RATES] for guided in (True, False)]
    ours, theirs = (tune(_overall, grid, seeds, better="lower") for grid in grids)
    return Arms(_overall(seeds, **ours), _overall(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="In 10 steps, with the better of two scales for each, its samples are nearer the true classes",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; w 0 or 1; 4 classes in 2-D, MLP of 64, loss w 1, 400 steps against 800: equal evaluations; DDIM,"
    " 10 steps; 4 settings each",
)
def guided_loss_is_better_at_its_best_scale(seeds: Seeds) -> Arms:
    grids = [[{"guided": guided, "lr": lr, "w": w} for lr in RATES for w in (0.0, 1.0)] for guided in (True, False)]
    ours, theirs = (tune(_at_one, grid, seeds, better="lower") for grid in grids)
    return Arms(_at_one(seeds, **ours), _at_one(seeds, **theirs), {"method": ours, "baseline": theirs})


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
    """Samples of one class in 20 steps at growing guidance."""
    one = seeds.one(0)
    true = _class(0).sample(400, generator=one.torch("true")[0])[0]
    panels = [Panel("the class", points=true.numpy())]
    for name, guided in (("usual loss", False), ("guided loss", True)):
        denoise = _trained(one, guided=guided, lr=0.01)
        for w in (1.0, 4.0):
            found = _samples(denoise, one, w=w, evaluations=20)[0, 0, :400]
            panels.append(Panel(f"{name}, w = {w:g}", points=found.numpy()))
    return panels
