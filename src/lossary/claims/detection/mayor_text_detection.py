"""MAYOR: does a fully connected mask decoder keep lines of text apart, and does every long box get its anchors?

A region shows a stroke of text through its middle, and in dense ones a second stroke beside it, drawn alike; the
mask is the middle one alone. Decoders are trained on the same regions and batches, after the same two convolutions.
"""

from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import MLPMaskDecoder, adaptive_anchor_assign, instance_aware_mask_loss
from lossary.tasks import train_detector

RATES = [{"lr": lr} for lr in (1e-3, 3e-3)]


def _regions(n: int, dense: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 14, 14) with noise, and masks (n, 28, 28) of the stroke in the middle."""
    angle, gap, side = rng.uniform(0, np.pi, n), rng.uniform(6, 9, n), rng.choice([-1, 1], n)
    length, width, slide = rng.uniform(16, 26, n), rng.uniform(3, 5, n), rng.uniform(-6, 6, n)
    ticks = np.arange(28) - 13.5
    along, across = np.stack([np.cos(angle), np.sin(angle)]), np.stack([-np.sin(angle), np.cos(angle)])
    u, v = (axis[0][:, None, None] * ticks + axis[1][:, None, None] * ticks[:, None] for axis in (along, across))
    length, width, slide, away = (a[:, None, None] for a in (length, width, slide, side * gap))
    own = (np.abs(u) <= length / 2) & (np.abs(v) <= width / 2)
    other = (np.abs(u - slide) <= length / 2) & (np.abs(v - away) <= width / 2) & dense
    images = (own | other).reshape(n, 14, 2, 14, 2).mean((2, 4)) + rng.normal(0, 0.2, (n, 14, 14))
    return torch.from_numpy(images).float().unsqueeze(1), torch.from_numpy(own).float()


@cache
def _masks(seed: Seeds, dense: bool, decoder: str, loss: str, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images, true masks and logits of the test regions, after training."""
    (train_rng,), (test_rng,) = seed.numpy("regions"), seed.numpy("test regions")
    images, masks = _regions(seed.few(1000), dense, train_rng)
    unseen, true = _regions(seed.few(400), dense, test_rng)
    (init,), (order,) = seed.torch("init"), seed.torch("order")
    looks = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    heads = {
        "mlp": lambda: (MLPMaskDecoder(channels=16, squeezed=8, hidden=128),),
        "deconv": lambda: (
            *(m for _ in range(4) for m in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())),
            nn.ConvTranspose2d(16, 16, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 1, 1),
            nn.Flatten(1, 2),
        ),
    }
    model = nn.Sequential(*looks, *heads[decoder]())
    _draw_weights(model, init)

    def objective(rows: Tensor) -> Tensor:
        logits, target = model(images[rows]).flatten(1), masks[rows].flatten(1)
        if loss == "pixels":
            return F.binary_cross_entropy_with_logits(logits, target)
        return instance_aware_mask_loss(logits, target).mean()

    train_detector(
        objective,
        model.parameters(),
        n=len(masks),
        steps=seed.few(300, smoke=3),
        batch=32,
        generator=order,
        lr=lr,
    )
    with torch.no_grad():
        return unseen, true, model(unseen)


def _draw_weights(model: nn.Module, generator: Generator) -> None:
    """As torch would, from a generator."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)


def _iou(seeds: Seeds, *, dense: bool, decoder: str, lr: float, loss: str = "instance") -> list[float]:
    """Mean IoU of the test masks in percent, per seed."""
    values = []
    for i in range(len(seeds)):
        _, true, logits = _masks(seeds.one(i), dense, decoder, loss, lr)
        found, true = logits > 0, true > 0
        values.append(100 * float(((found & true).sum((1, 2)) / (found | true).sum((1, 2))).mean()))
    return values


def _compare(seeds: Seeds, dense: bool, method: dict, baseline: dict) -> Arms:
    score = partial(_iou, dense=dense)
    chosen, other = (tune(score, [{**arm, **rate} for rate in RATES], seeds, n=2) for arm in (method, baseline))
    return Arms(score(seeds, **chosen), score(seeds, **other), {"method": chosen, "baseline": other})


@claim(
    says="Where a region holds two lines, a fully connected decoder masks the right one better than convolutions do",
    kind="superiority",
    metric="IoU",
    scale="1000 regions of 14x14 with two strokes, masks of 28x28, 300 steps of 32; 2 learning rates each",
)
def mlp_beats_deconv_in_dense_regions(seeds: Seeds) -> Arms:
    return _compare(seeds, True, {"decoder": "mlp"}, {"decoder": "deconv"})


@claim(
    says="Where a region holds a single line, the fully connected decoder loses nothing",
    kind="noninferiority",
    metric="IoU",
    scale="1000 regions of 14x14 with one stroke, masks of 28x28, 300 steps of 32; 2 learning rates each",
)
def mlp_costs_nothing_in_sparse_regions(seeds: Seeds) -> Arms:
    return _compare(seeds, False, {"decoder": "mlp"}, {"decoder": "deconv"})


@claim(
    says="Where a region holds two lines, a loss on the whole mask does better than one on each pixel",
    kind="superiority",
    metric="IoU",
    scale="1000 regions of 14x14 with two strokes, fully connected decoder, 300 steps of 32; 2 learning rates each",
)
def whole_masks_beat_pixels(seeds: Seeds) -> Arms:
    return _compare(seeds, True, {"decoder": "mlp"}, {"decoder": "mlp", "loss": "pixels"})


@claim(
    says="With one square anchor a place every box of 1:10 that is alone gets nine; a fixed threshold gives it none",
    kind="exact",
    metric="deviation",
    scale="200 images with a box of 120x12 to 200x20, anchors of 32 at stride 8: boxes with another number",
    tolerance=0.0,
)
def long_boxes_get_their_anchors(seeds: Seeds) -> Arms:
    (rng,) = seeds.one(0).numpy("boxes")
    ticks = 8.0 * torch.arange(32) + 4
    centres = torch.cartesian_prod(ticks, ticks)
    anchors = torch.cat([centres - 16, centres + 16], 1)
    height = torch.from_numpy(rng.uniform(12, 20, (200, 1, 1))).float()
    corner = torch.from_numpy(rng.uniform(0, 50, (200, 1, 2))).float()
    truth = torch.cat([corner, corner + torch.cat([10 * height, height], -1)], -1)
    adaptive, fixed = (adaptive_anchor_assign(anchors, truth, k=k) for k in (9, 0))
    wrong = [float(((adaptive == 0).sum(1) != 9).sum()), float((fixed == 0).any(1).sum())]
    return Arms(np.array(wrong))


def draw(seeds: Seeds) -> list[Panel]:
    """Regions with two lines, and what each decoder masks."""
    panels = []
    for title, decoder in (("Convolutions", "deconv"), ("Fully connected", "mlp")):
        images, _, logits = _masks(seeds.one(0), True, decoder, "instance", 3e-3)
        for i in range(2):
            large = images[i, 0].repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
            mask = (logits[i] > 0).float().numpy()
            panels.append(Panel(title, image=np.stack([large, large * (1 - mask), large * (1 - mask)], -1)))
    return panels
