"""CAMOUFLaGE: does guidance away from the original hide who it is, and leave smile and gaze?

Faces of 8x8 pixels: who someone is are five numbers (skin, width, eyes' distance and height, hair), attributes are
smile and gaze. A perceptron paints them under controls, the picture at half the resolution and the attributes as a
ridge regression reads them off the photograph, and, in its further branch, under the five numbers as well. Attackers
and judges are ridge regressions, too; each is trained on people of its own. Each of 50 people is looked for among 100,
of whom other photographs are known.

While it pushes away, a step takes three evaluations, without or at low noise two: 55 in all, against 40 without.

Registered anew: in the first form the control was handed the true attributes, which the judge then asked for, and
blurred pictures had only a judge who had never seen any.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim
from lossary.claims.draw import Panel
from lossary.diffusion import AnonymizingDenoiser, attribute_agreement, reidentification_rate
from lossary.diffusion._denoiser import Counted, Denoiser
from lossary.diffusion._process import cosine
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import fit_denoiser, stacked_denoiser

WHO, STEPS, SCALE = 5, 20, 1.5
CONTROL, KNOWN = 19, 6  # widths of the conditions, each with a flag that it is there


def _faces(who: Tensor, attributes: Tensor, g: Generator) -> Tensor:
    """Pictures (n, 64) of people (n, WHO), numbers from 0 to 1, who smile and look left or not, (n, 2)."""
    place = torch.linspace(-1, 1, 8)
    y, x = (v[None] for v in torch.meshgrid(place, place, indexing="ij"))
    skin, wide, apart, high, hair = who[:, :, None, None].unbind(1)
    smile, left = (2 * attributes[:, :, None, None].float() - 1).unbind(1)
    head = torch.sigmoid(8 * (1 - (x / (0.6 + 0.4 * wide)) ** 2 - (y / 0.95) ** 2))
    picture = head * (0.6 + 1.2 * skin) - 1
    picture = picture + head * torch.sigmoid(10 * (-0.45 - y)) * (2 * hair - 1.2)
    for side in (-1, 1):
        eye = side * (0.25 + 0.25 * apart) - 0.12 * left
        picture = picture - 0.9 * torch.exp(-(((x - eye) / 0.18) ** 2) - ((y + 0.35 * high) / 0.18) ** 2)
    mouth = torch.exp(-(((y - 0.55 + 0.5 * smile * (x**2 - 0.1)) / 0.16) ** 2) - (x / 0.45) ** 4)
    picture = picture - 0.7 * mouth + 0.05 * torch.randn(len(who), 8, 8, generator=g)
    return picture.flatten(1)


def _people(n: int, g: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, who it is, and attributes."""
    who, attributes = torch.rand(n, WHO, generator=g), torch.randint(2, (n, 2), generator=g)
    return _faces(who, attributes, g), who, attributes


def _ridge(x: Tensor, target: Tensor) -> Tensor:
    """(65, k): from pictures (n, 64) with a one to (n, k)."""
    inputs = F.pad(x, (0, 1), value=1.0)
    return torch.linalg.solve(inputs.T @ inputs + torch.eye(65), inputs.T @ target)


def _read(x: Tensor, ridge: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0) @ ridge


def _attributes(x: Tensor, ridge: Tensor) -> Tensor:
    """0 or 1, as the ridge sees them."""
    return (_read(x, ridge) > 0).long()


@cache
def _readers(seeds: Seeds) -> Tensor:
    """(S, 65, 2): for each seed a ridge of attributes, which the controls use."""
    people = [_people(2000, g) for g in seeds.torch("readers")]
    return torch.stack([_ridge(x, 2.0 * attributes - 1) for x, _, attributes in people])


def _control(x: Tensor, reader: Tensor) -> Tensor:
    """(*batch, CONTROL): the picture at half the resolution, attributes as they are read off it, and a one."""
    coarse = F.avg_pool2d(x.reshape(-1, 1, 8, 8), 2).reshape(*x.shape[:-1], 16)
    return torch.cat([coarse, 2.0 * _attributes(x, reader) - 1, torch.ones_like(coarse[..., :1])], -1)


def _known(who: Tensor) -> Tensor:
    return torch.cat([2 * who - 1, torch.ones_like(who[..., :1])], -1)


@cache
@torch.enable_grad()
def _trained(seeds: Seeds) -> Denoiser:
    pools, readers = [_people(seeds.few(4000), g) for g in seeds.torch("people")], _readers(seeds)

    def draw(n: int, generators: list[Generator]) -> tuple[Tensor, Tensor]:
        rows = [torch.randint(len(pool[0]), (n,), generator=g) for pool, g in zip(pools, generators)]
        x, who = (torch.stack([pool[k][row] for pool, row in zip(pools, rows)]) for k in range(2))
        part = torch.stack([torch.rand(n, 1, generator=g) for g in generators])
        # one in ten without any condition, half of the rest without knowing who it is
        return x, torch.cat([_control(x, readers) * (part > 0.1), _known(who) * (part > 0.55)], -1)

    denoise = stacked_denoiser(64, seeds, hidden=(128, 128), conditions=CONTROL + KNOWN)
    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(1500, smoke=2), batch=96)
    return denoise


@cache
def _scenes(seeds: Seeds) -> list[tuple[Tensor, ...]]:
    """For each seed: who the 100 known people are, their known photographs, then photographs and attributes of 50."""
    rows = []
    for g in seeds.torch("test"):
        known, who, _ = _people(100, g)
        attributes = torch.randint(2, (50, 2), generator=g)
        rows.append((who, known, _faces(who[:50], attributes, g), attributes))
    return rows


@torch.no_grad()
def _anonymised(seeds: Seeds, *, repulsion: float) -> tuple[Tensor, int]:
    """(S, 50, 64), and the evaluations it took."""
    denoise, scenes = Counted(_trained(seeds)), _scenes(seeds)
    who, _, photos, _ = (torch.stack(column) for column in zip(*scenes))
    control, known = _control(photos, _readers(seeds)), _known(who[:, :50])
    sigmas = process_sigmas(cosine(), seeds.few(STEPS, smoke=3), first=0.99)
    start = torch.stack([torch.randn(50, 64, generator=g) for g in seeds.torch("start")]) * float(sigmas[0])
    conditions = {
        "conditional": torch.cat([control, 0 * known], -1),
        "unconditional": torch.cat([0 * control, 0 * known], -1),
        "identity": torch.cat([control, known], -1),
    }

    def under(condition: Tensor):
        def predict(x: Tensor, sigma: float) -> Tensor:
            stacked = x.unflatten(0, control.shape[:2])
            return denoise(stacked, torch.full(control.shape[:2], sigma), condition).flatten(0, 1)

        return predict

    branches = {name: under(condition) for name, condition in conditions.items()}
    lowest = float(sigmas[round(0.7 * (len(sigmas) - 1))])
    anonymising = AnonymizingDenoiser(**branches, scale=SCALE, repulsion=repulsion, lowest=lowest)
    found = euler(anonymising, start.flatten(0, 1), sigmas).unflatten(0, control.shape[:2])
    return found, denoise.evaluations


def _blur(x: Tensor, width: float) -> Tensor:
    """Pictures (*batch, 64) blurred by a Gaussian of that standard deviation in pixels."""
    place = torch.arange(8.0)
    bell = (-0.5 * ((place[:, None] - place) / width) ** 2).exp()
    bell = bell / bell.sum(1, keepdim=True)
    return (bell @ x.unflatten(-1, (8, 8)) @ bell.T).flatten(-2)


def _blurred(seeds: Seeds, *, width: float) -> Tensor:
    """(S, 50, 64)."""
    return _blur(torch.stack([scene[2] for scene in _scenes(seeds)]), width)


def _measured(seeds: Seeds, found: Tensor, *, blur: float | None = None) -> tuple[list[float], list[float]]:
    """The share of people found, 0 to 1, and the share of attributes kept, in percent.

    With a blur a second judge has learnt from pictures of that blur, and the better of both counts.
    """
    hidden, kept = [], []
    everyone = torch.arange(100)
    for (_, photos, _, attributes), x, g in zip(_scenes(seeds), found, seeds.torch("judges")):
        pictures, who, truth = _people(2000, g)
        identify = _ridge(pictures, 2 * who - 1)
        found_out = reidentification_rate(_read(x, identify), everyone[:50], _read(photos, identify), everyone)
        seen = [pictures] if blur is None else [pictures, _blur(pictures, blur)]
        judges = [partial(_attributes, ridge=_ridge(v, 2.0 * truth - 1)) for v in seen]
        hidden.append(found_out.item())
        kept.append(max(100 * attribute_agreement(judge, x, attributes).mean().item() for judge in judges))
    return hidden, kept


def _against_controls(seeds: Seeds) -> tuple[list[tuple[list[float], list[float]]], dict[str, list[int]]]:
    """What was measured with repulsion and without, and what either took."""
    found, evaluations = zip(*(_anonymised(seeds, repulsion=w) for w in (1.0, 0.0)))
    return [_measured(seeds, x) for x in found], {"evaluations": list(evaluations)}


@claim(
    says="Guidance away from the original makes people harder to find than the controls alone",
    kind="superiority",
    metric="risk",
    scale="top-1 of 100 people; 8x8 faces, controls read by a ridge, perceptron 128-128, 1500 steps,"
    " 20 to sample, scale 1.5, repulsion 1; 55 evaluations against 40",
)
def guidance_hides_people(seeds: Seeds) -> Arms:
    (ours, theirs), details = _against_controls(seeds)
    return Arms(ours[0], theirs[0], details | {"attributes kept": [ours[1], theirs[1]]})


@claim(
    says="The stronger it pushes, the fewer are found",
    kind="trend",
    metric="risk",
    levels=(0.0, 0.5, 1.0, 2.0),
    scale="top-1 of 100 people; 8x8 faces, controls read by a ridge, perceptron 128-128, 1500 steps,"
    " 20 to sample, scale 1.5; 40 evaluations without, 55 with it",
)
def stronger_hides_more(seeds: Seeds) -> Arms:
    found, evaluations = zip(*(_anonymised(seeds, repulsion=w) for w in (0.0, 0.5, 1.0, 2.0)))
    hidden, kept = zip(*(_measured(seeds, x) for x in found))
    return Arms(
        torch.tensor(hidden).T.numpy(), details={"evaluations": list(evaluations), "attributes kept": list(kept)}
    )


@claim(
    says="Smile and gaze survive it no worse than the controls alone",
    kind="noninferiority",
    metric="accuracy",
    scale="ridge classifiers; 8x8 faces, controls read by a ridge, perceptron 128-128, 1500 steps,"
    " 20 to sample, scale 1.5, repulsion 1; 55 evaluations against 40",
)
def attributes_survive(seeds: Seeds) -> Arms:
    (ours, theirs), details = _against_controls(seeds)
    return Arms(ours[1], theirs[1], details)


@claim(
    says="Smile and gaze survive it better than a blur that hides people as well, if there is one",
    kind="superiority",
    metric="accuracy",
    scale="8x8 faces, controls read by a ridge, perceptron 128-128, repulsion 1, 55 evaluations; the least of 6 blurs"
    " as safe on 4 seeds, else the strongest, which is recorded; ridge judges, for blurs the better of two, one trained"
    " on blurs",
)
def keeps_more_than_blurring(seeds: Seeds) -> Arms:
    tuning = seeds.tuning(1 if seeds.smoke else 4)
    safe = sum(_measured(tuning, _anonymised(tuning, repulsion=1.0)[0])[0])
    widths = (0.5, 0.75, 1.0, 1.5, 2.5, 4.0)
    enough = [width for width in widths if sum(_measured(tuning, _blurred(tuning, width=width))[0]) <= safe]
    width = min(enough, default=widths[-1])
    found, evaluations = _anonymised(seeds, repulsion=1.0)
    ours = _measured(seeds, found)
    theirs = _measured(seeds, _blurred(seeds, width=width), blur=width)
    details = {"evaluations": [evaluations, 0], "blur": width, "as safe": bool(enough), "found": [ours[0], theirs[0]]}
    return Arms(ours[1], theirs[1], details)


def draw(seeds: Seeds) -> list[Panel]:
    """A photograph, the other known one of the same person, and the person repainted."""
    one = seeds.one(0)
    _, known, photos, _ = _scenes(one)[0]
    pictures = {"photograph": photos[0], "known to the attacker": known[0], "blurred": _blurred(one, width=1.5)[0, 0]}
    for w in (0.0, 1.0, 2.0):
        [x], _ = _anonymised(one, repulsion=w)
        pictures[f"repulsion {w:g}"] = x[0]
    return [Panel(name, image=(x.view(8, 8) / 2 + 0.5).clamp(0, 1).numpy()) for name, x in pictures.items()]
