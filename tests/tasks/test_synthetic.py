from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from lossary.tasks import (
    Seeds,
    blurred_masks,
    crowded_boxes,
    digit_sets,
    digits,
    flip_labels,
    gaussian_blobs,
    hide_positives,
    linear_regression_prompts,
    long_tail,
    split,
    spurious_groups,
)

SEEDS = Seeds(tuple(range(8)))


def in_band(successes: float, n: int, p: float) -> bool:
    """Whether a binomial count lies within 4.5 standard deviations of its mean (0.0007% outside)."""
    return abs(successes - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(("kind", "rate"), [("uniform", 0.3), ("pairwise", 0.45)])
def test_flipped_labels(kind: str, rate: float) -> None:
    y = digits().y
    labels, wrong = flip_labels(y, rate, SEEDS, kind=kind)
    assert torch.equal(labels != y, wrong)
    assert in_band(int(wrong.sum()), wrong.numel(), rate)
    shift = ((labels - y) % 10)[wrong].bincount(minlength=10)
    if kind == "pairwise":
        assert shift[1] == wrong.sum()
    else:
        assert all(in_band(int(count), int(wrong.sum()), 1 / 9) for count in shift[1:])
    assert not torch.equal(wrong[0], wrong[1])


def test_flipping_labels_that_differ_by_seed() -> None:
    y = digits().y
    again, wrong = flip_labels(y.expand(8, -1), 0.2, SEEDS)
    assert all(map(torch.equal, (again, wrong), flip_labels(y, 0.2, SEEDS)))
    assert torch.equal(flip_labels(y, 0.0, SEEDS)[0], y.expand(8, -1))


def test_long_tail_has_the_exponential_profile() -> None:
    data = digits()
    parts = split(data, SEEDS)
    rows = long_tail(data.y, 50.0, SEEDS, rows=parts.train)
    for row, train in zip(rows, parts.train):
        assert set(row.tolist()) <= set(train.tolist())
        # 130 rows of the rarest class are for training; 130 * 50^(-c/9) by hand:
        assert data.y[row].bincount().tolist() == [130, 84, 54, 35, 22, 14, 9, 6, 4, 2]
    assert long_tail(data.y, 1.0, SEEDS).shape == (8, 1740)


def test_spurious_groups() -> None:
    train, test = spurious_groups(SEEDS)
    for data in (train, test):
        odd, bright = data.group // 2, data.group % 2
        assert torch.equal(odd, data.y)
        corner = data.x.view(*data.y.shape, 8, 8)[..., :2, :2]
        assert torch.equal(corner, bright[..., None, None].expand_as(corner).float())
    agree = train.y == train.group % 2
    assert in_band(int(agree.sum()), agree.numel(), 0.95)
    agree = test.y == test.group % 2
    assert in_band(int(agree.sum()), agree.numel(), 0.5)
    assert train.x.shape == (8, 1347, 64)
    assert test.x.shape == (8, 450, 64)
    parts = split(digits(), SEEDS)
    assert torch.equal(test.x[..., 16:], digits().x[parts.test][..., 16:])


def test_digit_sets_show_what_their_labels_say() -> None:
    train, test = digit_sets(SEEDS, 400, ratio=10.0, noise=0.0, test=300)
    assert train.x.shape == (8, 400, 256)
    assert test.y.shape == (8, 300, 10)
    digit = {tuple(row.tolist()): int(label) for row, label in zip(digits().x, digits().y)}
    parts, shown = split(digits(), SEEDS, test=0.3), []
    for data, rows in ((train, parts.train), (test, parts.test)):
        for s in range(8):
            pixels = {tuple(row.tolist()) for row in digits().x[rows[s]]}
            tiles = data.x[s].view(-1, 2, 8, 2, 8).transpose(2, 3).reshape(len(data.x[s]), 4, 64)
            for picture, labels in zip(tiles[:50], data.y[s]):
                found = [tuple(tile.tolist()) for tile in picture if tile.any()]
                assert set(found) <= pixels
                assert sorted(digit[tile] for tile in found) == labels.nonzero().flatten().tolist()
                shown.append(len(found))
    assert all(in_band(shown.count(k), len(shown), 1 / 3) for k in (1, 2, 3))
    # The first digit drawn is digit c with a chance proportional to 10^(-c / 9): check it on pictures of one digit.
    single = train.y[train.y.sum(-1) == 1]
    chance = 10.0 ** (-torch.arange(10) / 9)
    for c, p in enumerate(chance / chance.sum()):
        assert in_band(single[:, c].sum().item(), len(single), p.item())


def test_hidden_positives() -> None:
    y = (torch.rand(500, 10, generator=SEEDS.torch("y")[0]) < 0.3).float()
    hidden = hide_positives(y, 0.4, SEEDS)
    assert (hidden <= y).all()
    assert in_band(8 * y.sum().item() - hidden.sum().item(), int(8 * y.sum()), 0.4)


@pytest.mark.parametrize(("classes", "dimensions", "distance"), [(2, 2, 2.0), (4, 6, 1.5), (3, 3, 0.0)])
def test_blobs_have_the_stated_bayes_error(classes: int, dimensions: int, distance: float) -> None:
    blobs = gaussian_blobs(SEEDS, 2000, classes=classes, dimensions=dimensions, distance=distance)
    apart = torch.cdist(blobs.means, blobs.means)[:, ~torch.eye(classes, dtype=torch.bool)]
    assert torch.allclose(apart, torch.full_like(apart, distance), atol=1e-5)
    if classes == 2:
        assert blobs.bayes_error == pytest.approx(NormalDist().cdf(-distance / 2), abs=1e-9)
    if distance == 0:
        assert blobs.bayes_error == pytest.approx(1 - 1 / classes, abs=1e-9)
    else:
        nearest = torch.cdist(blobs.x, blobs.means).argmin(-1)
        assert in_band(int((nearest != blobs.y).sum()), 16_000, blobs.bayes_error)


def test_prompts_without_noise_are_solved_by_least_squares() -> None:
    """Of a normal w, k < d pairs leave d - k of the squared norm; d pairs leave nothing."""
    prompts = linear_regression_prompts(SEEDS, 50, dimensions=6, length=9)
    x, y, w = prompts.x.double(), prompts.y.double(), prompts.weights.double()
    for k in (0, 2, 5):
        found = torch.linalg.pinv(x[:, :, :k]) @ y[:, :, :k, None]
        left = (found.squeeze(-1) - w).square().sum(-1).flatten()
        # a chi-square of d - k degrees, as the unseen directions are normal too
        assert abs(left.mean() - (6 - k)) < 4.5 * (2 * (6 - k) / len(left)) ** 0.5
    found = torch.linalg.lstsq(x, y[..., None]).solution.squeeze(-1)
    assert (found - w).abs().max() < 1e-4  # of numbers that were rounded to float32


def test_prompts_with_noise_have_the_excess_of_least_squares() -> None:
    prompts = linear_regression_prompts(SEEDS, 200, dimensions=4, length=20, noise=0.5)
    x, y, w = prompts.x.double(), prompts.y.double(), prompts.weights.double()
    found = torch.linalg.lstsq(x, y[..., None]).solution.squeeze(-1)
    excess = (found - w).square().sum(-1).flatten()
    expected = 0.25 * 4 / (20 - 4 - 1)
    assert abs(excess.mean() - expected) < 4.5 * excess.std() / len(excess) ** 0.5
    assert excess.std() / len(excess) ** 0.5 < expected / 30


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Of boxes at the same position, by counting covered area along each axis."""
    side = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    common = side[..., 0] * side[..., 1]
    areas = [(box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b)]
    return common / (areas[0] + areas[1] - common)


def test_crowded_pairs_overlap_as_stated() -> None:
    scenes = crowded_boxes(SEEDS, 100, pairs=5, detections=2, false_alarms=3)
    assert scenes.boxes.shape == (8, 100, 23, 4)
    assert scenes.truth.shape == (8, 100, 10, 4)
    overlap = iou(scenes.truth[:, :, 0::2], scenes.truth[:, :, 1::2])
    assert overlap.min() > 0.3999
    assert overlap.max() < 0.7001
    assert abs(overlap.mean() - 0.55) < 4.5 * 0.3 / (12 * overlap.numel()) ** 0.5  # uniform between them
    strangers = [
        iou(scenes.truth[:, :, i], scenes.truth[:, :, j]) for i in range(10) for j in range(i) if i // 2 != j // 2
    ]
    assert torch.stack(strangers).max() == 0


def test_detections_lie_on_their_source() -> None:
    """Errors are jitter times a normal number, relative to the box: recovered here from the corners."""
    scenes = crowded_boxes(SEEDS, 50, jitter=0.1)
    assert scenes.source.tolist() == [k for k in range(8) for _ in range(3)] + [-1] * 4
    seen, truth = scenes.boxes[:, :, :24], scenes.truth[:, :, scenes.source[:24]]
    size = truth[..., 2:] - truth[..., :2]
    moved = (seen[..., :2] + seen[..., 2:] - truth[..., :2] - truth[..., 2:]) / 2 / size
    scaled = ((seen[..., 2:] - seen[..., :2]) / size).log()
    error = torch.cat([moved, scaled], dim=-1) / 0.1
    assert abs(error.mean()) < 4.5 / error.numel() ** 0.5
    assert abs(error.square().mean() - 1) < 4.5 * (2 / error.numel()) ** 0.5
    # the logit's mean is 1 + 1 - 4 / 4 and its slope on the squared error -1 / 4
    logit = scenes.scores.logit()
    slope, level = np.polyfit(error.square().sum(-1).flatten(), logit[:, :, :24].flatten(), 1)
    assert slope == pytest.approx(-0.25, abs=0.02)
    assert level == pytest.approx(2.0, abs=0.1)
    assert logit[:, :, 24:].mean() == pytest.approx(-1, abs=4.5 / 1600**0.5)


def test_blurred_masks() -> None:
    plain = blurred_masks(SEEDS, 60, noise=0.0)
    area = plain.masks.sum((-1, -2))
    assert (plain.scores.sum((-1, -2)) - area).abs().max() < 0.02  # blurring keeps the sum
    noisy = blurred_masks(SEEDS, 60)
    assert torch.equal(noisy.masks, plain.masks)
    assert noisy.scores.aminmax().min == 0
    assert noisy.scores.aminmax().max == 1
    assert area.min() >= 2 * 3.14 * (32 / 12) ** 2 / 2  # two discs, one at worst inside the other
    missed = [((noisy.scores < cut) & noisy.masks).sum((-1, -2)) / area for cut in (0.1, 0.3, 0.5, 0.7)]
    assert all((low <= high).all() for low, high in pairwise(missed))  # a lower cut never misses more
    assert missed[0].mean() < 0.01
    assert missed[2].mean() > 0.1


def test_a_seed_draws_the_same_alone() -> None:
    for draw in (
        lambda s: flip_labels(digits().y, 0.2, s)[0],
        lambda s: long_tail(digits().y, 10.0, s),
        lambda s: spurious_groups(s)[0].x,
        lambda s: gaussian_blobs(s, 20).x,
        lambda s: linear_regression_prompts(s, 3).y,
        lambda s: crowded_boxes(s, 2).boxes,
        lambda s: blurred_masks(s, 2).scores,
        lambda s: digit_sets(s, 20)[1].x,
        lambda s: hide_positives(torch.ones(20, 3), 0.5, s),
    ):
        assert torch.equal(draw(SEEDS)[5], draw(SEEDS.one(5))[0])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: flip_labels(torch.arange(3), 1.0, SEEDS), "rate"),
        (lambda: flip_labels(torch.arange(3), 0.1, SEEDS, kind="odd"), "kind"),
        (lambda: long_tail(torch.arange(3), 0.5, SEEDS), "ratio"),
        (lambda: spurious_groups(SEEDS, correlation=1.5), "correlation"),
        (lambda: gaussian_blobs(SEEDS, 5, classes=3, dimensions=2), "classes"),
        (lambda: gaussian_blobs(SEEDS, 5, distance=-1.0), "distance"),
        (lambda: linear_regression_prompts(SEEDS, 0), "prompts"),
        (lambda: crowded_boxes(SEEDS, 1, jitter=0.0), "jitter"),
        (lambda: crowded_boxes(SEEDS, 1, pairs=0), "pairs"),
        (lambda: digit_sets(SEEDS, 0), "n"),
        (lambda: digit_sets(SEEDS, 1, ratio=0.5), "ratio"),
        (lambda: digit_sets(SEEDS, 1, noise=-1.0), "noise"),
        (lambda: hide_positives(torch.ones(2, 3), 1.5, SEEDS), "rate"),
        (lambda: blurred_masks(SEEDS, 1, size=8), "size"),
        (lambda: blurred_masks(SEEDS, 1, blur=(2.0, 1.0)), "blur"),
    ],
)
def test_refusals(call, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        call()
