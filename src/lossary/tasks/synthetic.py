"""Data with known answers, drawn anew for each seed: every tensor has the seed dimension S in front."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lossary import require
from lossary.tasks import task
from lossary.tasks.data import Data, digits, split
from lossary.tasks.seeds import Seeds


@task(version=1)
def flip_labels(y: Tensor, rate: float, seeds: Seeds, *, kind: str = "uniform") -> tuple[Tensor, Tensor]:
    """Labels of which each is wrong with probability `rate`, and which ones: (S, N) int64 and (S, N) bool.

    Args:
        y: (N,) or (S, N) classes from 0.
        rate: of wrong labels, 0 <= rate < 1.
        seeds: stream "flip".
        kind: a wrong label is any other class alike ("uniform") or the next class, the last one's being the
            first ("pairwise").

    Raises:
        ValueError: `rate` or `kind` outside these.
    """
    require.number("rate", rate, at_least=0.0, below=1.0)
    require.one_of("kind", kind, ("uniform", "pairwise"))
    classes, n = int(y.max()) + 1, y.shape[-1]
    generators = seeds.numpy("flip")
    wrong = torch.from_numpy(np.stack([rng.random(n) < rate for rng in generators]))
    if kind == "uniform":
        shift = torch.from_numpy(np.stack([rng.integers(1, classes, n) for rng in generators]))
    else:
        shift = torch.ones_like(y)
    return (y + wrong * shift) % classes, wrong


@task(version=1)
def long_tail(y: Tensor, ratio: float, seeds: Seeds, *, rows: Tensor | None = None) -> Tensor:
    """Row numbers (S, n) that leave class c with about m * ratio^(-c / (K - 1)) rows, sorted.

    The usual exponential profile: class 0 keeps m rows, m being what the rarest class has, and the last
    class m / ratio, rounded down, but each at least one. The counts are the same under every seed.

    Args:
        y: (N,) classes 0 to K - 1.
        ratio: of the most to the least frequent class, >= 1.
        seeds: stream "tail".
        rows: (S, m) row numbers to choose from, such as the training part; None is all.

    Raises:
        ValueError: `ratio` below 1.
    """
    require.number("ratio", ratio, at_least=1.0)
    classes = int(y.max()) + 1
    pools = [np.arange(len(y))] * len(seeds) if rows is None else [part.numpy() for part in rows]
    labels = y.numpy()
    by_class = [[pool[labels[pool] == c] for c in range(classes)] for pool in pools]
    most = min(len(members) for pool in by_class for members in pool)
    counts = [max(1, int(most * ratio ** (-c / (classes - 1)))) for c in range(classes)]
    kept = [
        np.sort(np.concatenate([rng.permutation(members)[:k] for members, k in zip(pool, counts)]))
        for rng, pool in zip(seeds.numpy("tail"), by_class)
    ]
    return torch.from_numpy(np.stack(kept))


@task(version=1)
def spurious_groups(seeds: Seeds, *, correlation: float = 0.95, test: float = 0.25) -> tuple[Data, Data]:
    """Odd or even digit, with a bright corner that mostly goes along with odd: training and test part.

    Whoever looks at the corner alone is right on `correlation` of the training rows and on half of the test
    rows, where corner and parity are independent. x (S, n, 64), y (S, n), group (S, n) = 2 * odd + bright.

    Args:
        seeds: streams "split" and "patch".
        correlation: probability that the corner agrees with the parity in training, 0 to 1.
        test: fraction of rows in the test part.

    Raises:
        ValueError: `correlation` out of range.
    """
    require.number("correlation", correlation, at_least=0.0, at_most=1.0)
    data = digits()
    parts = split(data, seeds, test=test)
    generators = seeds.numpy("patch")

    def patched(name: str, rows: Tensor, agreement: float) -> Data:
        odd = data.y[rows] % 2
        agrees = torch.from_numpy(np.stack([rng.random(rows.shape[1]) < agreement for rng in generators]))
        bright = torch.where(agrees, odd, 1 - odd)
        images = data.x[rows].view(*rows.shape, 8, 8)
        images[..., :2, :2] = bright[..., None, None].float()
        return Data(images.flatten(-2), odd, name, 2, 2 * odd + bright)

    return (
        patched("spurious_groups train", parts.train, correlation),
        patched("spurious_groups test", parts.test, 0.5),
    )


@task(version=1)
def digit_sets(seeds: Seeds, n: int, *, ratio: float = 1.0, noise: float = 0.2, test: int = 1000) -> tuple[Data, Data]:
    """Which digits are in the picture: 16x16 images with one, two or three different digits in their quadrants.

    Every picture draws its digits without replacement, digit c with a chance proportional to ratio^(-c / 9), so the
    ten labels form a long tail. In the test part all digits are alike frequent, and its digits come from images that
    no training picture shows. x (S, n, 256), y (S, n, 10) float32, 1 where the digit is there.

    Args:
        seeds: streams "split", "pictures" and "test pictures".
        n: training pictures.
        ratio: of the most to the least frequent digit's chance, >= 1.
        noise: standard deviation of the Gaussian noise on every pixel (digits' pixels run from 0 to 1).
        test: pictures of the test part.

    Raises:
        ValueError: a number out of range.
    """
    require.whole("n", n, at_least=1)
    require.whole("test", test, at_least=1)
    require.number("ratio", ratio, at_least=1.0)
    require.number("noise", noise, at_least=0.0)
    data = digits()
    parts = split(data, seeds, test=0.3)

    def pictures(name: str, rows: Tensor, stream: str, count: int, ratio: float) -> Data:
        drawn = [
            _digit_sets(data, own.numpy(), rng, count, ratio, noise) for own, rng in zip(rows, seeds.numpy(stream))
        ]
        x, y = zip(*drawn)
        return Data(_float32(list(x)), _float32(list(y)), name, 10)

    return (
        pictures("digit_sets train", parts.train, "pictures", n, ratio),
        pictures("digit_sets test", parts.test, "test pictures", test, 1.0),
    )


@task(version=1)
def hide_positives(y: Tensor, rate: float, seeds: Seeds) -> Tensor:
    """0/1 labels (S, N, classes) of which each 1 has turned 0 with probability `rate`.

    Args:
        y: (S, N, classes), or (N, classes) where the seeds share it.
        rate: 0 to 1.
        seeds: stream "hidden".

    Raises:
        ValueError: `rate` out of range.
    """
    require.number("rate", rate, at_least=0.0, at_most=1.0)
    seen = np.stack([rng.random(y.shape[-2:]) >= rate for rng in seeds.numpy("hidden")])
    return y * torch.from_numpy(seen).to(y)


@dataclass(frozen=True)
class Blobs:
    """Gaussian classes: x (S, N, d) float32, y (S, N), means (S, classes, d), and the error nobody can beat.

    `bayes_error` is a fraction; the Bayes rule is the nearest mean.
    """

    x: Tensor
    y: Tensor
    means: Tensor
    bayes_error: float


@task(version=1)
def gaussian_blobs(seeds: Seeds, n: int, *, classes: int = 2, dimensions: int = 2, distance: float = 2.0) -> Blobs:
    """Equally likely classes with unit covariance and means that all lie `distance` apart.

    The Bayes rule is right with probability E[Phi(t + distance / sqrt(2))^(classes - 1)], t standard
    normal; for two classes that is Phi(distance / 2).

    Args:
        seeds: stream "blobs"; a seed also turns the means.
        n: rows under each seed; the rows are independent, so any slice may serve as a test part.
        classes: 2 to `dimensions`.
        dimensions: of x.
        distance: between any two means, in standard deviations, >= 0.

    Raises:
        ValueError: a number outside these.
    """
    require.whole("n", n, at_least=1)
    require.whole("classes", classes, at_least=2, at_most=dimensions)
    require.number("distance", distance, at_least=0.0)
    scale = distance / math.sqrt(2)
    x, y, means = [], [], []
    for rng in seeds.numpy("blobs"):
        axes, _ = np.linalg.qr(rng.standard_normal((dimensions, classes)))
        label = rng.integers(classes, size=n)
        x.append(scale * axes.T[label] + rng.standard_normal((n, dimensions)))
        y.append(label)
        means.append(scale * axes.T)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    right = torch.special.ndtr(torch.from_numpy(nodes) + scale).numpy() ** (classes - 1)
    error = 1 - float(weights @ right) / math.sqrt(2 * math.pi)
    return Blobs(_float32(x), torch.from_numpy(np.stack(y)), _float32(means), error)


@dataclass(frozen=True)
class Prompts:
    """Regression tasks to be solved in context: x (S, P, n, d), y (S, P, n), weights (S, P, d), float32."""

    x: Tensor
    y: Tensor
    weights: Tensor


@task(version=1)
def linear_regression_prompts(
    seeds: Seeds, prompts: int, *, dimensions: int = 8, length: int = 16, noise: float = 0.0
) -> Prompts:
    """Prompts of `length` pairs, y = w . x + noise, each prompt with a w of its own; all standard normal.

    After k pairs without noise, least squares of minimal norm errs by d - k in mean square for k < d, and by
    nothing from k = d on. With noise and k > d + 1 its excess is noise^2 * d / (k - d - 1).

    Args:
        seeds: stream "prompts".
        prompts: under each seed, >= 1.
        dimensions: d of x, >= 1.
        length: pairs in a prompt, >= 1.
        noise: standard deviation of what is added to y, >= 0.

    Raises:
        ValueError: a number outside these.
    """
    for name, value in (("prompts", prompts), ("dimensions", dimensions), ("length", length)):
        require.whole(name, value, at_least=1)
    require.number("noise", noise, at_least=0.0)
    x, y, weights = [], [], []
    for rng in seeds.numpy("prompts"):
        x.append(rng.standard_normal((prompts, length, dimensions)))
        weights.append(rng.standard_normal((prompts, dimensions)))
        y.append(np.einsum("pnd,pd->pn", x[-1], weights[-1]) + noise * rng.standard_normal((prompts, length)))
    return Prompts(_float32(x), _float32(y), _float32(weights))


@dataclass(frozen=True)
class Scenes:
    """Detections in scenes, boxes as x1, y1, x2, y2 in pixels, float32.

    Attributes:
        boxes: (S, scenes, D, 4) detections.
        scores: (S, scenes, D), 0 to 1.
        truth: (S, scenes, T, 4) true boxes; 2k and 2k + 1 are a crowded pair.
        source: (D,) index of the true box that a detection comes from, -1 for a false alarm.
    """

    boxes: Tensor
    scores: Tensor
    truth: Tensor
    source: Tensor


@task(version=1)
def crowded_boxes(
    seeds: Seeds, scenes: int, *, pairs: int = 4, detections: int = 3, false_alarms: int = 4, jitter: float = 0.08
) -> Scenes:
    """Objects that stand in pairs, overlapping by an IoU uniform between 0.4 and 0.7, and what a detector sees.

    A pair has two boxes of one size in a cell of 100x100 pixels of its own. Each true box is detected several
    times, moved and scaled by normal relative errors e of standard deviation `jitter`. The logit of a score is
    N(1, 1) for the object, which makes some objects hard, plus 1 - |e|^2 / (4 jitter^2), plus N(0, 0.5^2). False
    alarms are boxes anywhere, of logit N(-1, 1).

    Args:
        seeds: stream "boxes".
        scenes: under each seed, >= 1.
        pairs: in a scene, >= 1.
        detections: of each true box, >= 1.
        false_alarms: in a scene, >= 0.
        jitter: relative to the box's size, > 0.

    Raises:
        ValueError: a number outside these.
    """
    for name, value in (("scenes", scenes), ("pairs", pairs), ("detections", detections)):
        require.whole(name, value, at_least=1)
    require.whole("false_alarms", false_alarms)
    require.number("jitter", jitter, above=0.0)
    side = math.ceil(math.sqrt(pairs))
    cells = 100.0 * np.stack(np.divmod(np.arange(pairs), side), axis=-1)
    boxes, scores, truth = [], [], []
    for rng in seeds.numpy("boxes"):
        size = rng.uniform(30, 40, (scenes, pairs, 2))
        overlap = rng.uniform(0.4, 0.7, (scenes, pairs, 1))
        common = 2 * overlap / (1 + overlap)  # of the area of one box
        share = rng.random((scenes, pairs, 1))
        shift = size * (1 - common ** np.concatenate([share, 1 - share], axis=-1))
        shift *= rng.choice([-1.0, 1.0], shift.shape) / 2
        centre = cells + 50 + rng.uniform(-5, 5, (scenes, pairs, 2))
        centres = np.stack([centre - shift, centre + shift], axis=2).reshape(scenes, -1, 2)
        sizes = size.repeat(2, axis=1)
        truth.append(_corners(centres, sizes))

        error = rng.standard_normal((scenes, 2 * pairs, detections, 4))
        seen = centres[:, :, None] + jitter * error[..., :2] * sizes[:, :, None]
        seen_size = sizes[:, :, None] * np.exp(jitter * error[..., 2:])
        logit = rng.normal(1, 1, (scenes, 2 * pairs, 1)) + 1 - (error**2).sum(-1) / 4
        logit += rng.normal(0, 0.5, logit.shape)
        alarm = _corners(
            rng.uniform(20, 100 * side - 20, (scenes, false_alarms, 2)), rng.uniform(30, 40, (scenes, false_alarms, 2))
        )
        logits = np.concatenate([logit.reshape(scenes, -1), rng.normal(-1, 1, (scenes, false_alarms))], axis=1)
        boxes.append(np.concatenate([_corners(seen, seen_size).reshape(scenes, -1, 4), alarm], axis=1))
        scores.append(1 / (1 + np.exp(-logits)))
    source = np.concatenate([np.arange(2 * pairs).repeat(detections), np.full(false_alarms, -1)])
    return Scenes(_float32(boxes), _float32(scores), _float32(truth), torch.from_numpy(source))


@dataclass(frozen=True)
class Masks:
    """Segmentation: masks (S, N, size, size) bool and a model's scores of the same shape, float32, 0 to 1."""

    masks: Tensor
    scores: Tensor


@task(version=1)
def blurred_masks(
    seeds: Seeds, images: int, *, size: int = 32, blur: tuple[float, float] = (1.0, 3.0), noise: float = 0.1
) -> Masks:
    """Images with two to four discs, and scores that are the mask blurred, more in some images than in others.

    The images are independent and alike, hence exchangeable. Without noise the scores of an image add up to
    the area of its mask.

    Args:
        seeds: stream "masks".
        images: N under each seed, >= 1.
        size: of an image, >= 16; discs have a radius of size / 12 to size / 6 and stay inside.
        blur: bounds of the Gaussian blur's standard deviation in pixels, uniform over images.
        noise: standard deviation of noise in the scores, itself blurred by one pixel; scores are then cut to
            0 to 1.

    Raises:
        ValueError: a number outside these.
    """
    require.whole("images", images, at_least=1)
    require.whole("size", size, at_least=16)
    require.number("noise", noise, at_least=0.0)
    if not 0 <= blur[0] <= blur[1]:
        raise ValueError(f"blur: expected bounds 0 <= lower <= upper, got {blur}")
    masks, scores = [], []
    pixel = np.arange(size) + 0.5
    for rng in seeds.numpy("masks"):
        radius = rng.uniform(size / 12, size / 6, (images, 4))
        radius *= np.arange(4) < rng.integers(2, 5, (images, 1))  # a disc of radius 0 is none
        centre = rng.uniform(size / 4, 3 * size / 4, (2, images, 4, 1, 1))
        distance = np.hypot(pixel[:, None] - centre[0], pixel - centre[1])
        mask = (distance < radius[..., None, None]).any(axis=1)
        sigma = rng.uniform(*blur, images)
        score = _blurred(mask.astype(np.float64), sigma)
        if noise:
            rough = _blurred(rng.standard_normal(mask.shape), np.ones(images))
            score = score + noise * rough / rough.std()
        masks.append(mask)
        scores.append(score.clip(0, 1))
    return Masks(torch.from_numpy(np.stack(masks)), _float32(scores))


def _float32(per_seed: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(per_seed).astype(np.float32))


def _digit_sets(
    data: Data, rows: np.ndarray, rng: np.random.Generator, n: int, ratio: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 256) of digits in these rows, and which digits they show (n, 10)."""
    images, labels = data.x.numpy()[rows].reshape(-1, 8, 8), data.y.numpy()[rows]
    by_class = [np.flatnonzero(labels == c) for c in range(10)]
    # The largest of log-chance plus Gumbel noise are draws without replacement.
    keys = -np.log(ratio) * np.arange(10) / 9 + rng.gumbel(size=(n, 10))
    shown = np.argsort(-keys, axis=1)[:, :3]
    count = rng.integers(1, 4, size=n)
    quadrant = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)
    x, y = noise * rng.standard_normal((n, 16, 16)), np.zeros((n, 10))
    for i in range(n):
        for c, q in zip(shown[i, : count[i]], quadrant[i]):
            top, left = 8 * (q // 2), 8 * (q % 2)
            x[i, top : top + 8, left : left + 8] += images[rng.choice(by_class[c])]
            y[i, c] = 1
    return x.reshape(n, 256), y


def _corners(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def _blurred(images: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Images (N, h, w) under Gaussian blurs of sigma (N,) pixels, around the edges."""
    frequency = np.fft.fftfreq(images.shape[-1])
    square = frequency[:, None] ** 2 + frequency**2
    damping = np.exp(-2 * (np.pi * sigma[:, None, None]) ** 2 * square)
    return np.fft.ifft2(np.fft.fft2(images) * damping).real
