"""DiffFashion: a shape in the colours of a reference, its surroundings as they were: better than SDEdit or scissors?

A small U-Net paints 8x8 pictures of four shapes, plain or striped, before plain backgrounds, given the shape, which
goes with colours of its own. All are lit in the middle and dark at their ends, as garments are round. Sources are such
pictures, references are flat stripes of any colours all over. The truth is the source's shape with its shading in the
reference's stripes; nobody is told where the shape is. Features come from a classifier of the shapes.

Registered anew: in the first form shapes were flat, and then a mask from a threshold and the reference pasted into it
are all but the truth. Pasting, with the method's masks, is now an arm of its own, flat or with the brightness of the
source, and all arms have eight settings, masks among them. SDEdit, which had 20 evaluations, later got as many as the
method: those of its mask, of its steps and of their repetitions.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import StructureAppearanceLoss, label_contrast_mask, structure_appearance_guidance
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._process import cosine
from lossary.diffusion._samplers import ancestral, process_sigmas
from lossary.tasks import Unet, minimise, small_cnn, trained, v_error

SHAPES, NONE = 4, 4
STEPS, RESTARTS = 20, 10
FOR_MASK = STEPS // 2 + SHAPES  # evaluations: half the way down, then all labels
EVALUATIONS = FOR_MASK + STEPS + RESTARTS - 1
COLOURS = 0.7 * torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])


def _shape(label: Tensor, g: Generator) -> Tensor:
    """(n, 1, 8, 8): a square, a diamond, a flat or a tall bar within 5x5 pixels somewhere, 1 where it is."""
    row, column = torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing="ij")
    forms = [torch.ones(5, 5), row.abs() + column.abs() <= 2, row.abs() <= 1, column.abs() <= 1]
    form = torch.stack([f.float() for f in forms])[label]
    top, left = torch.randint(4, (2, len(label)), generator=g)
    y, x = (torch.arange(8) - start[:, None] for start in (top, left))
    inside = ((y >= 0) & (y < 5))[:, :, None] & ((x >= 0) & (x < 5))[:, None]
    rows = torch.arange(len(label))[:, None, None]
    return (form[rows, y.clamp(0, 4)[:, :, None], x.clamp(0, 4)[:, None]] * inside)[:, None]


def _lit(colours: Tensor, mask: Tensor) -> Tensor:
    """Brightness from black (-1) falls from all of it in the middle of the shape to 0.2 at two pixels and a half."""
    place = torch.arange(8.0)
    y, x = torch.meshgrid(place, place, indexing="ij")
    middle = [(v * mask[:, 0]).sum((1, 2)) / mask[:, 0].sum((1, 2)) for v in (y, x)]
    away = sum((v - m[:, None, None]).square() for v, m in zip((y, x), middle))[:, None]
    return (colours + 1) * (1 - 0.8 * away / 6.25).clamp(min=0.2) - 1


def _stripes(first: Tensor, second: Tensor, g: Generator) -> Tensor:
    """(n, 3, 8, 8): two colours (n, 3) in turn, by rows or columns, two pixels wide."""
    place = torch.arange(8) // 2 % 2 == 0
    down = torch.rand(len(first), 1, 1, 1, generator=g) < 0.5
    turn = torch.where(down, place[:, None].expand(8, 8), place.expand(8, 8))
    return torch.where(turn, first[..., None, None], second[..., None, None])


def _pictures(n: int, g: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (n, 3, 8, 8), labels, and where the shapes are. Each shape has colours about one of its own."""
    label = torch.randint(SHAPES, (n,), generator=g)
    mask = _shape(label, g)
    first, second = COLOURS[label] + 0.4 * torch.randn(2, n, 3, generator=g)
    second = torch.where(torch.rand(n, 1, generator=g) < 0.5, first, second)
    ground = 2 * torch.rand(n, 3, 1, 1, generator=g) - 1
    return torch.where(mask > 0, _lit(_stripes(first, second, g).clamp(-1, 1), mask), ground), label, mask


@cache
def _denoiser(steps: int) -> Denoiser:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Denoiser(Unet(classes=SHAPES, colours=3), cosine(), "v")

    @torch.enable_grad()
    def train(denoise: nn.Module) -> None:
        g = Generator().manual_seed(1)

        def objective() -> Tensor:
            x, label, _ = _pictures(64, g)
            label = torch.where(torch.rand(64, generator=g) < 0.1, NONE, label)
            sigma = denoise.process.ratio(torch.rand(64, generator=g).clamp(1e-3, 1 - 1e-3))
            return v_error(denoise, x, sigma, torch.randn(x.shape, generator=g), label).mean()

        minimise(objective, denoise.parameters(), steps=steps, lr=3e-3)

    return trained(build, train, key=f"difffashion denoiser, {steps} steps")


@cache
def _classifier(steps: int) -> nn.Module:
    @torch.enable_grad()
    def train(network: nn.Module) -> None:
        g = Generator().manual_seed(2)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(steps):
            x, label, _ = _pictures(64, g)
            optimizer.zero_grad()
            F.cross_entropy(network(x), label).backward()
            optimizer.step()

    def build() -> nn.Module:
        return small_cnn(SHAPES, generator=Generator().manual_seed(0), colours=3)

    return trained(build, train, key=f"difffashion classifier, {steps} steps")


def _features(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's 8x8 places, and what the last layer sees."""
    places = network[:2](x)
    return places.flatten(2).mT, network[2:-1](places)


def _tasks(one: Seeds) -> tuple[Tensor, ...]:
    """Eight sources, their labels, their shapes' masks, and references, of one seed."""
    (g,) = one.torch("pairs")
    n = one.few(8, smoke=1)
    return *_pictures(n, g), _stripes(*2 * torch.rand(2, n, 3, generator=g) - 1, g)


@torch.no_grad()
def _mask(one: Seeds, *, contrast: str = "labels", threshold: float = -0.2, first: float = 0.7) -> Tensor:
    """Where the shapes are, by their other labels or by no label, halfway down from the noised source."""
    denoise = _denoiser(one.few(500, smoke=2))
    source, label, _, _ = _tasks(one)
    (generator,) = one.torch("mask")
    sigmas = process_sigmas(cosine(), STEPS, first=first)[: STEPS // 2 + 1]
    start = source + float(sigmas[0]) * torch.randn(source.shape, generator=generator)
    x = ancestral(lambda x, sigma: denoise(x, sigma, label), start, sigmas, generator=generator)
    others = torch.stack([(label + k) % SHAPES for k in (1, 2, 3)], 1)
    if contrast == "none":
        others = torch.full_like(others[:, :1], NONE)
    return label_contrast_mask(denoise, x, float(sigmas[-1]), label, others, threshold=threshold)


def _iou(seeds: Seeds, **setting: object) -> list[float]:
    """Intersection over union of the mask and the shape, in percent."""
    shares = []
    for k in range(len(seeds)):
        found, true = _mask(seeds.one(k), **setting), _tasks(seeds.one(k))[2] > 0
        share = (found & true).sum((1, 2, 3)) / (found | true).sum((1, 2, 3))
        shares.append(100 * share.mean().item())
    return shares


def _transferred(one: Seeds, *, strength: float, first: float, threshold: float) -> Tensor:
    """DiffFashion's pictures. The official code's shares of steps: 35 pasted and 19 changing of 120."""
    denoise, network = _denoiser(one.few(500, smoke=2)), _classifier(one.few(300, smoke=2))
    source, label, _, reference = _tasks(one)
    mask = _mask(one, threshold=threshold).float()
    loss = StructureAppearanceLoss(partial(_features, network), source, reference, mask, strength=strength)
    return structure_appearance_guidance(
        lambda x, sigma: denoise(x, sigma, label),
        loss,
        process_sigmas(cosine(), one.few(STEPS, smoke=3), first=first),
        restarts=one.few(RESTARTS, smoke=2),
        pasted=6,
        changing=3,
        generator=one.torch("transfer")[0],
    )


@torch.no_grad()
def _sdedit(one: Seeds, *, begin: str, first: float) -> Tensor:
    """Noise on source or reference, taken off under the source's label."""
    denoise = _denoiser(one.few(500, smoke=2))
    source, label, _, reference = _tasks(one)
    sigmas = process_sigmas(cosine(), one.few(EVALUATIONS, smoke=3), first=first)
    (generator,) = one.torch("transfer")
    x = {"source": source, "reference": reference}[begin]
    x = x + float(sigmas[0]) * torch.randn(x.shape, generator=generator)
    return ancestral(lambda x, sigma: denoise(x, sigma, label), x, sigmas, generator=generator)


def _pasted(one: Seeds, *, threshold: float, first: float, lit: bool) -> Tensor:
    """The reference within the method's mask, flat or with the brightness of the source over its largest there."""
    source, _, _, reference = _tasks(one)
    mask = _mask(one, threshold=threshold, first=first)
    bright = torch.where(mask, (source + 1).mean(1, keepdim=True), 0.0)
    share = bright / bright.amax((2, 3), keepdim=True).clamp(min=1e-3)
    return torch.where(mask, (reference + 1) * share - 1 if lit else reference, source)


def _truth(one: Seeds) -> Tensor:
    source, _, mask, reference = _tasks(one)
    return torch.where(mask > 0, _lit(reference, mask), source)


def _error(seeds: Seeds, *, how: str, **setting: object) -> list[float]:
    draw = {"guided": _transferred, "sdedit": _sdedit, "pasted": _pasted}[how]
    ones = [seeds.one(k) for k in range(len(seeds))]
    return [(draw(one, **setting) - _truth(one)).square().mean().item() for one in ones]


MASKS = (-0.2, 0.4)  # thresholds
GUIDED = [
    {"how": "guided", "strength": strength, "first": first, "threshold": threshold}
    for strength in (0.0005, 0.002)
    for first in (0.5, 0.75)
    for threshold in MASKS
]
MASKED = [
    {"how": "guided", "strength": 0.0, "first": first, "threshold": threshold}
    for first in (0.3, 0.5, 0.75, 0.9)
    for threshold in MASKS
]
PASTED = [
    {"how": "pasted", "lit": lit, "first": first, "threshold": threshold}
    for lit in (False, True)
    for first in (0.5, 0.7)
    for threshold in MASKS
]
SDEDIT = [
    {"how": "sdedit", "begin": begin, "first": first}
    for begin in ("source", "reference")
    for first in (0.3, 0.5, 0.7, 0.85)
]


def _compare(seeds: Seeds, baseline: list[dict], evaluations: int) -> Arms:
    ours, theirs = (tune(_error, grid, seeds, better="lower") for grid in (GUIDED, baseline))
    details = {"evaluations": [EVALUATIONS, evaluations], "method": ours, "baseline": theirs}
    return Arms(_error(seeds, **ours), _error(seeds, **theirs), details)


@claim(
    says="Mask and guidance come nearer to the source's shape and shading in the reference's stripes than SDEdit",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="8x8 pictures of 4 lit shapes, U-Net of 16 channels, 8 pairs a seed, 43 evaluations; 8 settings each",
)
def beats_sdedit(seeds: Seeds) -> Arms:
    return _compare(seeds, SDEDIT, EVALUATIONS)


@claim(
    says="They come nearer than the reference pasted into the same masks, flat or with the source's brightness",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="8x8 pictures of 4 lit shapes, U-Net of 16 channels, 8 pairs a seed, 43 evaluations against the mask's 14;"
    " 8 settings each",
)
def beats_pasting(seeds: Seeds) -> Arms:
    return _compare(seeds, PASTED, FOR_MASK)


@claim(
    says="Guidance brings it nearer than the mask alone",
    kind="ratio",
    metric="mean squared error",
    margin=0.95,
    scale="8x8 pictures of 4 lit shapes, U-Net of 16 channels, 8 pairs a seed, 43 evaluations; 8 settings each",
)
def guidance_adds_to_the_mask(seeds: Seeds) -> Arms:
    return _compare(seeds, MASKED, EVALUATIONS)


@claim(
    says="Contrast with other labels finds the shape better than contrast with no label",
    kind="superiority",
    metric="IoU",
    scale="8x8 pictures of 4 lit shapes, U-Net of 16 channels, 8 pictures a seed; 6 settings each",
)
def labels_find_the_shape(seeds: Seeds) -> Arms:
    places = [{"threshold": threshold, "first": first} for threshold in (-0.2, 0.4) for first in (0.5, 0.7, 0.85)]
    grids = [[{"contrast": contrast} | place for place in places] for contrast in ("labels", "none")]
    ours, theirs = (tune(_iou, grid, seeds) for grid in grids)
    details = {"evaluations": [FOR_MASK, STEPS // 2 + 2], "method": ours, "baseline": theirs}
    return Arms(_iou(seeds, **ours), _iou(seeds, **theirs), details)


def draw(seeds: Seeds) -> list[Panel]:
    """Source, reference, mask, the transfer, SDEdit, scissors and the truth."""
    one = seeds.one(0)
    source, _, _, reference = _tasks(one)
    pictures = {"source": source, "reference": reference, "mask": 2 * _mask(one).float().expand_as(source) - 1}
    pictures["DiffFashion"] = _transferred(one, strength=0.002, first=0.75, threshold=-0.2)
    pictures["SDEdit"] = _sdedit(one, begin="reference", first=0.7)
    pictures["pasted"] = _pasted(one, threshold=-0.2, first=0.7, lit=True)
    pictures["wanted"] = _truth(one)
    images = {name: x[0].permute(1, 2, 0) / 2 + 0.5 for name, x in pictures.items()}
    return [Panel(name, image=image.clamp(0, 1).numpy()) for name, image in images.items()]
