"""Scenes of shapes and small detectors: what is drawn is what the boxes say, and the measures by hand."""

from collections import Counter

import numpy as np
import pytest
import torch

from lossary.detection._overlap import box_iou
from lossary.tasks import (
    ConvDetector,
    dense_loss,
    detection_ap,
    detections,
    grid_points,
    shape_scenes,
    train_detector,
    trained_detector,
    transformer_detector,
)


def scenes(family, n=300, seed=0):
    return shape_scenes(n, family=family, generator=np.random.default_rng(seed))


@pytest.mark.parametrize("family", ["plain", "crowded", "rare"])
def test_scenes_are_as_described(family):
    drawn = scenes(family)
    assert drawn.images.shape == (300, 3, 64, 64)
    assert drawn.images.is_contiguous(memory_format=torch.channels_last)
    sides = (drawn.boxes[..., 2:] - drawn.boxes[..., :2])[drawn.mask]
    assert 12 <= sides.min() < 13
    assert 29 < sides.max() <= 30.00001
    assert drawn.boxes[drawn.mask].min() >= 0
    assert drawn.boxes[drawn.mask].max() <= 64
    assert not drawn.boxes[~drawn.mask].any()
    counts = drawn.mask.sum(1)
    assert set(counts.tolist()) == ({2, 4, 6} if family == "crowded" else {1, 2, 3, 4, 5})
    iou = box_iou(drawn.boxes[:, :, None], drawn.boxes[:, None])
    both = drawn.mask[:, :, None] & drawn.mask[:, None] & ~torch.eye(6, dtype=torch.bool)
    if family == "crowded":
        pairs = torch.tensor([0, 0, 1, 1, 2, 2])
        mates = both & (pairs[:, None] == pairs)
        assert 0.299 < iou[mates].min() < 0.31
        assert 0.59 < iou[mates].max() < 0.601
        assert torch.equal(drawn.labels[:, ::2], drawn.labels[:, 1::2])
        both &= ~mates
    assert iou[both].max() <= 0.1001


def test_rare_classes_form_a_long_tail():
    """Class c of 6 has a chance proportional to 30^(-c / 5)."""
    drawn = scenes("rare", 1000)
    counts = drawn.labels[drawn.mask].bincount(minlength=6).double()
    chance = torch.tensor([30 ** (-c / 5) for c in range(6)], dtype=torch.float64)
    expected = counts.sum() * chance / chance.sum()
    assert ((counts - expected).abs() < 4.5 * expected.sqrt()).all()


def test_an_object_is_painted_in_its_box_and_up_to_its_sides():
    """Where one object is alone, pixels that stand out lie in its box, and a square fills it."""
    drawn = scenes("plain", 400)
    seen = Counter()
    for image, box, label, there in zip(drawn.images, drawn.boxes, drawn.labels, drawn.mask):
        if there.sum() > 1:
            continue
        x1, y1, x2, y2 = box[there][0].tolist()
        label = label[there].item()
        rows, columns = torch.arange(64) + 0.5, torch.arange(64) + 0.5
        inside = ((rows > y1) & (rows < y2))[:, None] & ((columns > x1) & (columns < x2))
        ground = image[:, ~inside].mean(1)
        apart = (image - ground[:, None, None]).norm(dim=0)
        assert apart[~inside].mean() < 0.2  # noise of 0.1 in three channels: a Maxwell mean of 0.16
        covered = (apart[inside] > 0.35).double().mean().item()
        share = {0: np.pi / 4, 1: 1.0, 2: 0.5, 3: 0.5, 4: 5 / 9, 5: np.pi / 4 * 0.7}[label]
        if apart[inside].topk(20).values.mean() > 0.7:  # a colour that stands out
            assert covered == pytest.approx(share, abs=0.12)
            seen[label] += 1
    assert len(seen) == 6


def test_scenes_refuse():
    with pytest.raises(ValueError, match="family"):
        scenes("none")
    with pytest.raises(ValueError, match="n:"):
        scenes("plain", 0)


def test_detections_by_hand():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]])
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.3], [0.2, 0.7]]])
    ((box, score, label),) = detections(scores, boxes, limit=4)
    assert score.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.3])
    assert label.tolist() == [0, 0, 1, 1]
    assert torch.equal(box, boxes[0, [0, 1, 2, 1]])
    ((box, score, label),) = detections(scores, boxes, limit=4, iou_threshold=0.5)
    assert score.tolist() == pytest.approx([0.9, 0.7, 0.3, 0.2])
    assert label.tolist() == [0, 1, 1, 0]


def test_average_precision_of_right_and_half_right_answers():
    drawn = scenes("plain", 20)
    right = [(b[m], torch.ones(int(m.sum())), y[m]) for b, y, m in zip(drawn.boxes, drawn.labels, drawn.mask)]
    assert detection_ap(right, drawn) == pytest.approx(100.0)
    assert detection_ap([(b, s, (y + 1) % 6) for b, s, y in right], drawn) < 20
    blind = [(b[y < 3], s[y < 3], y[y < 3]) for b, s, y in right]
    assert detection_ap(blind, drawn) == pytest.approx(50.0)


def test_dense_loss_by_hand():
    logits = torch.tensor([[[0.0], [0.0]]])
    boxes = torch.tensor([[[0.0, 0, 2, 2], [5, 5, 6, 6]]])
    target = torch.tensor([[[0.5], [0.0]]])
    other = torch.tensor([[[1.0, 0, 3, 2], [0, 0, 0, 0]]])
    weight = torch.tensor([[4.0, 0.0]])  # 2 ln 2, and 2 (1 - 1/3) of weight 4, over 4
    assert dense_loss(logits, boxes, target, other, weight).item() == pytest.approx(0.5 * np.log(2) + 4 / 3)


def test_grid_points_go_row_by_row():
    points = grid_points()
    assert points[0].tolist() == [4.0, 4.0]
    assert points[1].tolist() == [12.0, 4.0]
    assert points[8].tolist() == [4.0, 12.0]


def test_an_untrained_detector_sees_a_box_of_16_pixels_at_every_point():
    detector = ConvDetector(generator=torch.Generator().manual_seed(0)).eval()
    logits, boxes = detector(scenes("plain", 4).images)
    assert logits.shape == (4, 64, 6)
    assert logits.sigmoid().mean().item() == pytest.approx(0.05, abs=0.01)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    assert (centres - grid_points()).abs().max() < 4
    assert (boxes[..., 2:] - boxes[..., :2]).mean().item() == pytest.approx(16, abs=2)


def test_training_learns_and_is_the_same_every_time():
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))

    def run():
        layer = torch.nn.Linear(3, 1)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)

        def objective(rows):
            return (layer(x[rows]).squeeze(1) - x[rows] @ torch.tensor([1.0, -2, 3])).square().mean()

        order = torch.Generator().manual_seed(1)
        train_detector(objective, layer.parameters(), n=32, steps=200, generator=order, lr=0.1)
        return layer.weight.detach()

    first = run()
    torch.testing.assert_close(first, torch.tensor([[1.0, -2, 3]]), atol=0.05, rtol=0)
    assert torch.equal(first, run())


def test_a_trained_detector_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = trained_detector("plain", steps=2)
    (file,) = tmp_path.rglob("*.pt")
    stamp = file.stat().st_mtime_ns
    again = trained_detector("plain", steps=2)
    assert file.stat().st_mtime_ns == stamp
    assert not again.training
    fresh = ConvDetector(generator=torch.Generator().manual_seed(0))
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert not torch.equal(state["backbone.0.0.weight"], fresh.state_dict()["backbone.0.0.weight"])


def test_the_transformer_and_its_mask():
    model = transformer_detector(generator=torch.Generator().manual_seed(0), inputs=8).double()
    features = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits, boxes = model(features)
    assert logits.shape == (2, 16, 6)
    assert boxes.shape == (2, 16, 4)
    memory = model.encode(features)
    content, reference = model.content.expand(2, -1, -1), model.reference.expand(2, -1, -1)
    more = torch.cat([content, content[:, :5] + 1], 1), torch.cat([reference, reference[:, :5] + 0.1], 1)
    group = torch.tensor([0] * 16 + [1] * 5)
    answers = model.decode(memory, *more, mask=group[:, None] == group)
    torch.testing.assert_close(answers[-1][0][:, :16], logits)  # what a query cannot see has no influence on it
    torch.testing.assert_close(answers[-1][1][:, :16], boxes)
    free = model.decode(memory, *more)
    assert (free[-1][0][:, :16] - logits).abs().max() > 1e-4


def test_the_transformer_looks_where_its_boxes_are():
    """What a query sees of the memory is about its box: the gradient lies there."""
    model = transformer_detector(generator=torch.Generator().manual_seed(0), inputs=8)
    memory = torch.randn(1, 64, 48, requires_grad=True, generator=torch.Generator().manual_seed(1))
    logits, _ = model.decode(memory, model.content[None], model.reference[None], mask=torch.eye(16, dtype=torch.bool))[
        0
    ]
    for query in (0, 6, 15):
        (gradient,) = torch.autograd.grad(logits[0, query].sum(), memory, retain_graph=True)
        middle = 64 * model.reference[query].sigmoid()[:2]
        far = (grid_points() - middle).abs().amax(1) > 32
        assert gradient[0].norm(dim=1).max() > 0
        assert gradient[0, far].abs().max() == 0
