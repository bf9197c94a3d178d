"""Objects to find: pictures of coloured shapes, a small convolutional detector and a small transformer.

The pictures are 64x64 in three colours. Three families: in "plain" ones one to five objects hardly overlap; in
"crowded" ones they stand in pairs of one class, one half hidden by the other; in "rare" ones the six classes form a
long tail. The detectors look at 64 points, 8 pixels apart.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from lossary import require
from lossary.detection._assign import taken, task_aligned
from lossary.detection._average_precision import average_precision
from lossary.detection._heads import around, box_giou, corners, sine_position
from lossary.detection._suppress import hard, suppress
from lossary.tasks import task
from lossary.tasks.cache import trained
from lossary.tasks.models import _drawn

SIZE, STRIDE = 64, 8
SHAPES = ("disc", "square", "diamond", "triangle", "cross", "ring")
FAMILIES = ("plain", "crowded", "rare")
MOST = 6  # objects in a picture


@dataclass(frozen=True)
class ShapeScenes:
    """N pictures and what is in them; of the six rows of a picture those are real where `mask` is True.

    Attributes:
        images: (N, 3, 64, 64) float32, about 0 to 1, in torch's channels-last format.
        boxes: (N, 6, 4) float32, x1, y1, x2, y2 in pixels.
        labels: (N, 6) int64, 0 to 5.
        mask: (N, 6) bool.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    mask: Tensor


@task(version=1)
def shape_scenes(n: int, *, family: str, generator: np.random.Generator, ratio: float = 30.0) -> ShapeScenes:
    """Draw n pictures of a family. An object has sides of 12 to 30 pixels and a colour of its own.

    A "plain" or "rare" picture has one to five objects that overlap by an IoU of 0.1 at most, a "crowded" one one to
    three pairs of the same class, two boxes of one size that overlap by an IoU of 0.3 to 0.6, drawn one over the
    other. Pixels have Gaussian noise of standard deviation 0.1.

    Args:
        n: pictures, >= 1.
        family: "plain", "crowded" or "rare".
        generator: of everything drawn.
        ratio: of the most to the least frequent class in "rare" pictures; in the others all are alike.

    Raises:
        ValueError: an argument outside these.
    """
    require.whole("n", n, at_least=1)
    require.one_of("family", family, FAMILIES)
    require.number("ratio", ratio, at_least=1.0)
    boxes, mask = _places(n, 2 if family == "crowded" else 1, generator)
    chance = (ratio if family == "rare" else 1.0) ** -np.linspace(0, 1, len(SHAPES))
    labels = generator.choice(len(SHAPES), (n, MOST), p=chance / chance.sum())
    if family == "crowded":
        labels[:, 1::2] = labels[:, ::2]
    images = torch.from_numpy(_painted(boxes, labels, mask, generator))
    return ShapeScenes(
        images.contiguous(memory_format=torch.channels_last),
        torch.from_numpy((boxes * mask[..., None]).astype(np.float32)),
        torch.from_numpy(labels * mask),
        torch.from_numpy(mask),
    )


def _places(n: int, together: int, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Boxes (n, 6, 4) and which of them are there: objects alone or in pairs, each where it first fits in 20 tries."""
    slots, tries = MOST // together, 20
    boxes, mask = np.zeros((n, MOST, 4)), np.zeros((n, MOST), bool)
    wanted = rng.integers(1, slots + (together == 2), n)
    for slot in range(slots):
        size = rng.uniform(12, 30, (n, tries, 1, 2))
        overlap, share, sign = rng.uniform(0.3, 0.6, size.shape[:3]), rng.random(size.shape[:3]), rng.random(size.shape)
        common = 2 * overlap / (1 + overlap)  # of the area of one of a pair
        shift = size * (1 - common[..., None] ** np.stack([share, 1 - share], -1)) * np.where(sign < 0.5, -0.5, 0.5)
        middle = rng.uniform(0, SIZE, size.shape)
        centre = np.concatenate([middle - shift, middle + shift], 2) if together == 2 else middle
        tried = np.concatenate([centre - size / 2, centre + size / 2], -1)  # (n, tries, together, 4)
        fits = ((tried >= 0) & (tried <= SIZE)).all((2, 3))
        placed, there = boxes[:, None, None, : slot * together], mask[:, None, None, : slot * together]
        fits &= ~((_iou(tried[:, :, :, None], placed) > 0.1) & there).any((2, 3))
        mine = slice(slot * together, (slot + 1) * together)
        boxes[:, mine] = tried[np.arange(n), fits.argmax(1)]
        mask[:, mine] = (fits.any(1) & (slot < wanted))[:, None]  # type: ignore[call-overload]
    return boxes, mask


def _iou(a: NDArray, b: NDArray) -> NDArray:
    side = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = side.clip(0).prod(-1)
    return common / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - common)


def _painted(boxes: NDArray, labels: NDArray, mask: NDArray, rng: np.random.Generator) -> NDArray:
    """Pictures (n, 3, 64, 64) float32, an object over those before it."""
    n = len(boxes)
    ground = rng.uniform(0.2, 0.8, (n, 3))
    contrast = rng.uniform(0.3, 0.6, (n, MOST, 3)) * rng.choice([-1.0, 1.0], (n, MOST, 3))
    colour = (ground[:, None] + contrast).clip(0, 1).astype(np.float32)
    images = rng.standard_normal((n, 3, SIZE, SIZE), np.float32) * np.float32(0.1)
    canvas = np.broadcast_to(ground.astype(np.float32)[..., None, None], images.shape).copy()
    ticks = np.arange(SIZE, dtype=np.float32) + 0.5
    for slot in range(MOST):
        for label, shape in enumerate(SHAPES):
            (rows,) = (mask[:, slot] & (labels[:, slot] == label)).nonzero()
            x1, y1, x2, y2 = boxes[rows, slot].astype(np.float32).T[..., None]
            u, v = (2 * ticks - x1 - x2) / (x2 - x1), (2 * ticks - y1 - y2) / (y2 - y1)
            covered = _covers(shape, u[:, None, :], v[:, :, None])
            canvas[rows] = np.where(covered[:, None], colour[rows, slot, :, None, None], canvas[rows])
    return images + canvas


def _covers(shape: str, u: NDArray, v: NDArray) -> NDArray:
    """Whether a shape covers the place (u, v) of its box, which runs from -1 to 1."""
    a, b = np.abs(u), np.abs(v)
    within = np.maximum(a, b) <= 1
    if shape == "square":
        return within
    if shape == "diamond":
        return a + b <= 1
    if shape == "triangle":
        return within & (2 * a <= v + 1)
    if shape == "cross":
        return within & (np.minimum(a, b) <= 1 / 3)
    radius = u * u + v * v
    return (radius <= 1) & ((shape == "disc") | (radius >= 0.3))


class ConvDetector(nn.Module):
    """Pictures to class logits and boxes at 64 points: `backbone`, five convolutions, and `head`, two.

    Args:
        generator: of the initial weights.
        classes: of objects.
        width: channels at stride 8; half of them at stride 4 and a quarter at stride 2.
    """

    points: Tensor

    def __init__(self, *, generator: Generator, classes: int = len(SHAPES), width: int = 48) -> None:
        super().__init__()
        steps = ((3, width // 4, 2), (width // 4, width // 2, 2), (width // 2, width, 2), (width, width, 1))
        self.backbone = nn.Sequential(*(_convolution(*step, generator) for step in (*steps, steps[-1])))
        self.head = conv_head(width, classes, generator=generator)
        self.register_buffer("points", grid_points())
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 64, 64) to logits (B, 64, classes) and boxes (B, 64, 4)."""
        return dense_predictions(self.head(self.backbone(images)), self.points)


def grid_points() -> Tensor:
    """The centres (64, 2) of the cells, row by row."""
    ticks = STRIDE * (torch.arange(SIZE // STRIDE) + 0.5)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


@task(version=1)
def conv_head(width: int, classes: int, *, generator: Generator) -> nn.Sequential:
    """Features (B, width, 8, 8) to (B, classes + 4, 8, 8), at first with a probability of 0.05 everywhere."""
    last = _drawn(nn.Conv2d(width, classes + 4, 1, device="meta"), generator)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias[:classes].fill_(-3.0)  # type: ignore[index]
        last.bias[classes:].zero_()  # type: ignore[index]
    return nn.Sequential(_convolution(width, width, 1, generator), last).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@task(version=1)
def dense_predictions(raw: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """What a head says, (B, classes + 4, 8, 8), as logits (B, 64, classes) and boxes (B, 64, 4)."""
    flat = raw.flatten(2).mT
    return flat[..., :-4], around(points, STRIDE * flat[..., -4:].clamp(max=3.0).exp())


def _convolution(inputs: int, outputs: int, stride: int, generator: Generator) -> nn.Sequential:
    layer = _drawn(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, device="meta"), generator)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


@task(version=1)
def trained_detector(family: str, *, steps: int = 1500) -> ConvDetector:
    """A `ConvDetector` trained on a family of scenes with one-to-many targets, for evaluation and without gradients.

    Always the same one: it is trained once, in a minute or two, and then read from the user's cache folder.

    Args:
        family: of `shape_scenes`.
        steps: of training, in batches of 16 of as many scenes.
    """
    require.one_of("family", family, FAMILIES)
    require.whole("steps", steps, at_least=1)

    def one_to_many(network: nn.Module) -> None:
        scenes = shape_scenes(max(steps, 16), family=family, generator=np.random.default_rng(0))

        def objective(rows: Tensor) -> Tensor:
            logits, boxes = network(scenes.images[rows])
            truth, labels, mask = scenes.boxes[rows], scenes.labels[rows], scenes.mask[rows]
            match, weight = task_aligned(
                logits.sigmoid(), boxes, grid_points(), truth, labels, mask, k=10, alpha=0.5, beta=6.0
            )
            target = F.one_hot(taken(labels, match), logits.shape[-1]) * weight.unsqueeze(-1)
            return dense_loss(logits, boxes, target, taken(truth, match), weight)

        order = Generator().manual_seed(1)
        train_detector(objective, network.parameters(), n=len(scenes.mask), steps=steps, generator=order, lr=3e-3)

    key = f"one to many, {family} scenes, {steps} steps"
    return trained(lambda: ConvDetector(generator=Generator().manual_seed(0)), one_to_many, key=key)  # type: ignore[return-value]


@task(version=1)
def dense_loss(logits: Tensor, boxes: Tensor, target: Tensor, box_target: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy of the logits plus 2 (1 - GIoU) of the boxes, over the total of the weights; a scalar.

    Args:
        logits: (B, A, classes).
        boxes: (B, A, 4).
        target: (B, A, classes), 0 to 1.
        box_target: (B, A, 4).
        weight: (B, A) of the box at each place; 0 leaves it out.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    chosen = weight > 0
    apart = (1 - box_giou(boxes[chosen], box_target[chosen])) * weight[chosen]
    return (entropy + 2 * apart.sum()) / weight.sum().clamp(min=1)


@task(version=1)
def train_detector(
    objective: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    n: int,
    steps: int,
    generator: Generator,
    batch: int = 16,
    lr: float = 2e-3,
) -> None:
    """AdamW on objective(rows), rows (batch,) of n; the learning rate rises for a tenth of the steps, then falls."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    rows = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(rows) < batch:
            rows = torch.cat([rows, torch.randperm(n, generator=generator)])
        optimizer.zero_grad()
        objective(rows[:batch]).backward()
        optimizer.step()
        schedule.step()
        rows = rows[batch:]


@task(version=1)
def detections(
    scores: Tensor, boxes: Tensor, *, limit: int = 30, iou_threshold: float | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each image the boxes (D, 4), scores (D,) and classes (D,), best first, D at most `limit`.

    Args:
        scores: (B, A, classes), probabilities.
        boxes: (B, A, 4).
        limit: detections of an image.
        iou_threshold: of non-maximum suppression within each class; None does without.
    """
    classes = scores.shape[-1]
    values, order = scores.flatten(1).topk(min(100 if iou_threshold is not None else limit, scores[0].numel()))
    found = []
    for own, value, index in zip(boxes, values, order):
        box, label = own[index // classes], index % classes
        if iou_threshold is not None:
            keep, _ = suppress(box, value, decay=hard, parameter=iou_threshold, floor=0.0, groups=label)
            box, value, label = box[keep[:limit]], value[keep[:limit]], label[keep[:limit]]
        found.append((box, value, label))
    return found


@task(version=1)
def detection_ap(found: Sequence[tuple[Tensor, Tensor, Tensor]], scenes: ShapeScenes) -> float:
    """COCO's average precision in percent, the mean over the classes that the scenes have."""
    values = []
    for label in scenes.labels[scenes.mask].unique():
        mine = [classes == label for _, _, classes in found]
        true = [own[there & (kind == label)] for own, there, kind in zip(scenes.boxes, scenes.mask, scenes.labels)]
        boxes, scores = zip(*((box[m], score[m]) for (box, score, _), m in zip(found, mine)))
        values.append(average_precision(boxes, scores, true))
    return float(np.mean(values))


@task(version=1)
def transformer_detector(*, generator: Generator, inputs: int, classes: int = len(SHAPES)) -> "TransformerDetector":
    """A `TransformerDetector` for features (B, inputs, 8, 8), its weights drawn from the generator."""
    return TransformerDetector(generator=generator, inputs=inputs, classes=classes)


class TransformerDetector(nn.Module):
    """Features to class logits and boxes of 16 queries: an encoder layer and two decoder layers.

    As in Deformable DETR a query is a vector and a reference box, at first one of a grid of four by four. Each decoder
    layer lets the queries see each other, lets each look at some places in and about its box, and moves the box. The
    last layer's answer counts.

    Args:
        generator: of the initial weights.
        inputs: channels of the features, at stride 8.
        classes: of objects.
        width: of every vector.
    """

    centres: Tensor

    def __init__(self, *, generator: Generator, inputs: int, classes: int = len(SHAPES), width: int = 48) -> None:
        super().__init__()
        self.width = width
        self.project, self.place = (_linear(n, width, generator) for n in (inputs, 2 * width))
        self.encoder = _Block(width, generator)
        self.decoder = nn.ModuleList(_DecoderLayer(width, classes, generator) for _ in range(2))
        self.content = nn.Parameter(0.1 * torch.randn(16, width, generator=generator))
        spread = (torch.cartesian_prod(*[torch.arange(4)] * 2) + 0.5) / 4
        self.reference = nn.Parameter(torch.logit(torch.cat([spread, torch.full((16, 2), 0.33)], 1)))
        self.register_buffer("centres", torch.cat([grid_points() / SIZE, torch.full((64, 2), 1 / 8)], 1))

    def encode(self, features: Tensor) -> Tensor:
        """Features (B, inputs, 8, 8) to the memory (B, 64, width)."""
        return self.encoder(self.project(features.flatten(2).mT), self.where(self.centres))

    def decode(
        self, memory: Tensor, content: Tensor, reference: Tensor, *, mask: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Logits (B, Q, classes) and boxes (B, Q, 4) of each decoder layer.

        Args:
            memory: (B, 64, width).
            content: (B, Q, width).
            reference: (B, Q, 4), logits of the boxes' centres and sizes as shares of the picture.
            mask: bool, broadcasts with (B, 1, Q, Q): whether a query sees another; None is all.
        """
        answers = []
        for layer in self.decoder:
            box = reference.sigmoid()
            content, logits, shift = layer(content, self.where(box), box, memory, mask)
            moved = reference + shift
            answers.append((logits, SIZE * corners(moved.sigmoid())))
            reference = moved.detach()
        return answers

    def where(self, boxes: Tensor) -> Tensor:
        """What boxes (..., 4), centres and sizes as shares of the picture, add to a vector: (..., width)."""
        return self.place(sine_position(boxes, self.width // 2))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, inputs, 8, 8) to logits (B, 16, classes) and boxes (B, 16, 4)."""
        content, reference = (own.expand(len(features), -1, -1) for own in (self.content, self.reference))
        return self.decode(self.encode(features), content, reference)[-1]


def _linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    return _drawn(nn.Linear(inputs, outputs, device="meta"), generator)


class _Block(nn.Module):
    """Self-attention of four heads and a two-layer network, each added to a stream that it reads normalised."""

    def __init__(self, width: int, generator: Generator) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = _linear(width, 3 * width, generator), _linear(width, width, generator)
        self.network = nn.Sequential(
            _linear(width, 2 * width, generator), nn.ReLU(), _linear(2 * width, width, generator)
        )

    def forward(self, x: Tensor, where: Tensor, mask: Tensor | None = None) -> Tensor:
        queries, keys, values = self.inward(self.first(x) + where).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = x + self.outward(seen.transpose(1, 2).flatten(2))
        return x + self.network(self.second(x))


class _DecoderLayer(nn.Module):
    """A query looks at four places a head, at first on the sides of its box and half way to them."""

    def __init__(self, width: int, classes: int, generator: Generator) -> None:
        super().__init__()
        self.among = _Block(width, generator)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.value, self.seen, self.hidden = (_linear(width, width, generator) for _ in range(3))
        self.offset, self.share = _linear(width, 4 * 4 * 2, generator), _linear(width, 4 * 4, generator)
        self.classify, self.move = _linear(width, classes, generator), _linear(width, 4, generator)
        sides = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
        with torch.no_grad():
            for layer in (self.offset, self.share, self.move):
                layer.weight.mul_(0.1)
            self.offset.bias.copy_((sides[:, None] * torch.tensor([0.0, 0.5, 1.0, 1.5])[:, None]).flatten())
            self.classify.bias.fill_(-3.0)

    def forward(
        self, x: Tensor, where: Tensor, box: Tensor, memory: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new vectors, their logits, and how far the logits of their boxes (B, Q, 4) move."""
        x = self.among(x, where, mask)
        query = self.before(x) + where
        places = box[..., None, :2] + 0.5 * box[..., None, 2:] * self.offset(query).unflatten(-1, (16, 2))
        maps = self.value(memory).mT.reshape(len(memory) * 4, -1, SIZE // STRIDE, SIZE // STRIDE)  # a head's channels
        grid = (2 * places - 1).unflatten(2, (4, 4)).transpose(1, 2).flatten(0, 1)  # (B * 4, Q, 4, 2)
        looked = F.grid_sample(maps, grid, align_corners=False)  # (B * 4, width / 4, Q, 4)
        share = self.share(query).unflatten(-1, (4, 4)).softmax(-1).transpose(1, 2).flatten(0, 1).unsqueeze(1)
        looked = (looked * share).sum(-1).unflatten(0, (-1, 4)).flatten(1, 2).mT
        x = x + self.seen(looked)
        y = self.after(x)
        return x, self.classify(y), self.move(F.relu(self.hidden(y)))
