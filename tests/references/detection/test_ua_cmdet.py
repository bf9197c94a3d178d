"""UA-CMDet by hand: pixels counted, boxes whose overlaps are simple fractions, and suppression step by step."""

import math

import pytest
import torch

from lossary.detection import cross_modal_uncertainty_weights, illumination_aware_nms, illumination_weight

CAR = [0.0, 0.0, 4.0, 2.0, 0.0]


def moved(x, y=0.0):
    """The car moved along x: an IoU of (4 - x) / (4 + x) with itself for y = 0."""
    return [x, y, 4.0, 2.0, 0.0]


def test_the_share_of_dark_pixels():
    """Of a hundred pixels 44, 45 and all are dark; a pure green of 0.4 is as bright as 0.235."""
    image = torch.full((3, 3, 10, 10), 0.5)
    for k, count in enumerate((44, 45, 100)):
        image[k].view(3, 100)[:, :count] = 0.1
    torch.testing.assert_close(illumination_weight(image), torch.tensor([1.0, 0.55, 0.0]))
    green = torch.zeros(3, 1, 2)
    green[1] = torch.tensor([0.39, 0.41])  # times 0.587: 0.229 and 0.241, about 60 / 255 = 0.2353
    assert illumination_weight(green).item() == pytest.approx(0.5)
    assert illumination_weight(green, share=0.6).item() == 1
    blue, red = torch.zeros(3, 1, 1), torch.zeros(3, 1, 1)
    blue[2], red[0] = 1.0, 0.8  # 0.114 and 0.239
    assert (illumination_weight(blue).item(), illumination_weight(red).item()) == (0, 1)


def test_weights_by_hand():
    """0 agrees (IoU 9/11 with infrared 0), 1 disagrees (3/5 with infrared 1), 2 is seen by the colour camera alone."""
    colour = torch.tensor([moved(0.4), moved(50.0), moved(100.0)], dtype=torch.float64)
    infrared = torch.tensor([CAR, moved(51.0), moved(200.0)], dtype=torch.float64)
    ours, theirs = cross_modal_uncertainty_weights(colour, infrared, 0.7)
    assert ours.weights.tolist() == pytest.approx([0.7, 0.7 * 3 / 5, 0.7, 0.1])
    assert torch.equal(ours.boxes, torch.cat([colour, infrared[2:]]))
    assert ours.copied.tolist() == [2]
    assert theirs.weights.tolist() == [1, 1, 1, 1]
    assert torch.equal(theirs.boxes, torch.cat([infrared, colour[2:]]))
    assert theirs.copied.tolist() == [2]


def test_two_partial_overlaps_multiply_and_one_agreement_forgives_all():
    """IoUs of 3/5 and 1/3; then 3/5 and 1."""
    colour = torch.tensor([CAR])
    ours, _ = cross_modal_uncertainty_weights(colour, torch.tensor([moved(1.0), moved(-2.0)]), 1.0)
    assert ours.weights.tolist() == pytest.approx([3 / 5 / 3])
    ours, _ = cross_modal_uncertainty_weights(colour, torch.tensor([moved(1.0), CAR]), 1.0)
    assert ours.weights.tolist() == [1]


def test_an_overlap_up_to_the_contact_counts_for_nothing():
    """An IoU of 1/11 is not above 0.1; with contact 0.05 it is."""
    colour, infrared = torch.tensor([CAR]), torch.tensor([moved(10 / 3)])
    assert cross_modal_uncertainty_weights(colour, infrared, 1.0)[0].weights.tolist() == [1]
    doubted = cross_modal_uncertainty_weights(colour, infrared, 1.0, contact=0.05)[0].weights
    assert doubted.tolist() == pytest.approx([1 / 11], rel=1e-5)


def test_unseen_is_a_mean_over_all_of_the_other_cameras_boxes():
    """One IoU of 1/31 among four colour boxes is a mean of 0.008: the infrared object is copied all the same."""
    far = [moved(100.0 + 10 * k) for k in range(3)]
    infrared = torch.tensor([moved(4 * 30 / 32)], dtype=torch.float64)
    alone, _ = cross_modal_uncertainty_weights(torch.tensor([CAR], dtype=torch.float64), infrared, 1.0)
    among, _ = cross_modal_uncertainty_weights(torch.tensor([CAR, *far], dtype=torch.float64), infrared, 1.0)
    assert (alone.copied.tolist(), among.copied.tolist()) == ([], [0])


def test_a_camera_that_sees_nothing_is_given_the_others_boxes():
    none, cars = torch.zeros(0, 5), torch.tensor([CAR, moved(9.0)])
    ours, theirs = cross_modal_uncertainty_weights(none, cars, 0.5)
    assert (ours.weights.tolist(), ours.copied.tolist(), theirs.copied.tolist()) == (
        [pytest.approx(0.1)] * 2,
        [0, 1],
        [],
    )
    ours, theirs = cross_modal_uncertainty_weights(cars, none, 0.5)
    assert (ours.weights.tolist(), theirs.weights.tolist(), theirs.copied.tolist()) == ([0.5, 0.5], [1, 1], [0, 1])
    ours, theirs = cross_modal_uncertainty_weights(none, none, 0.5)
    assert (len(ours.boxes), len(theirs.weights)) == (0, 0)


def test_boxes_that_are_no_boxes_are_alone():
    odd = torch.tensor([[0.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 4.0, math.nan, 0.0]])
    ours, theirs = cross_modal_uncertainty_weights(odd, torch.tensor([CAR]), 1.0)
    assert ours.weights.tolist() == pytest.approx([1, 1, 0.1])
    assert theirs.copied.tolist() == [0, 1]


def test_suppression_by_hand():
    """Turned boxes of two classes. In the dark the colour box falls behind the infrared one that it covers."""
    boxes = torch.tensor([CAR, moved(0.5), moved(0.2), moved(30.0), moved(30.0)])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.08])
    idxs, from_colour = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([True, False, True, False, True])
    keep, kept = illumination_aware_nms(boxes, scores, idxs, from_colour, 1.0)
    assert (keep.tolist(), kept.tolist()) == ([0, 2, 3, 4], pytest.approx([0.9, 0.7, 0.6, 0.08]))
    keep, kept = illumination_aware_nms(boxes, scores, idxs, from_colour, 0.5)
    assert (keep.tolist(), kept.tolist()) == ([1, 3, 2], pytest.approx([0.8, 0.6, 0.35]))
    assert len(illumination_aware_nms(boxes, scores, idxs, from_colour, 0.0)[0]) == 2


def test_boxes_that_cross_at_right_angles_overlap_little():
    """10 by 1 boxes: an IoU of 1 / 19, though their bounding boxes are the same."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 1.0, math.pi / 4], [0.0, 0.0, 10.0, 1.0, -math.pi / 4]])
    rest = torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), torch.tensor([False, False])
    assert illumination_aware_nms(boxes, *rest, 1.0)[0].tolist() == [0, 1]
    assert illumination_aware_nms(boxes, *rest, 1.0, iou_threshold=0.05)[0].tolist() == [0]


def test_nothing_to_suppress():
    keep, scores = illumination_aware_nms(
        torch.zeros(0, 5), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).bool(), 0.5
    )
    assert (keep.shape, keep.dtype, scores.shape) == ((0,), torch.int64, (0,))


def test_refusals():
    car, one = torch.tensor([CAR]), torch.ones(1)
    with pytest.raises(ValueError, match="image: expected 3 channels"):
        illumination_weight(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="image: expected 3 channels and at least one pixel"):
        illumination_weight(torch.zeros(3, 0, 4))
    with pytest.raises(ValueError, match="share: expected a number >= 0 and <= 1, got 2"):
        illumination_weight(torch.zeros(3, 1, 1), share=2.0)
    with pytest.raises(ValueError, match="infrared: expected shape"):
        cross_modal_uncertainty_weights(car, torch.zeros(1, 4), 1.0)
    with pytest.raises(ValueError, match=r"illumination: expected a number >= 0 and <= 1, got 1\.5"):
        cross_modal_uncertainty_weights(car, car, 1.5)
    with pytest.raises(ValueError, match="from_colour: expected bool of shape"):
        illumination_aware_nms(car, one, torch.zeros(1).long(), one, 1.0)
    with pytest.raises(ValueError, match="boxes: expected shape"):
        illumination_aware_nms(torch.zeros(1, 4), one, torch.zeros(1).long(), one > 0, 1.0)
