"""The face networks against sizes published with them, and against a face and faces whose places are known."""

from importlib.util import find_spec

import pytest
import torch

from lossary.detection import soft_nms
from lossary.detection._overlap import box_iou
from lossary.tasks import Seeds
from lossary.tasks.faces import face_candidates, face_collages, face_networks

if find_spec("mtcnn") is None:  # to import it would take TensorFlow
    pytest.skip("needs the package mtcnn", allow_module_level=True)
data = pytest.importorskip("skimage.data")


def test_the_networks_have_the_published_sizes():
    assert [sum(p.numel() for p in network.parameters()) for network in face_networks()] == [6632, 100178, 389040]


def test_the_face_in_a_photograph():
    """facenet-pytorch's MTCNN, run on this photograph, gives this box with probability 0.99999."""
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    boxes, scores = face_candidates(image)
    assert len(boxes) > 20
    assert (scores.diff() <= 0).all()
    keep, _ = soft_nms(boxes, scores, method="hard", iou_threshold=0.3, score_threshold=0.7)
    assert len(keep) == 1
    assert scores[keep].item() > 0.9999
    theirs = torch.tensor([[179.0, 59.5, 268.1, 176.0]])
    assert box_iou(boxes[keep], theirs).item() > 0.9


@pytest.mark.parametrize("pairs", [False, True])
def test_faces_are_found_where_they_were_pasted(pairs):
    scenes = face_collages(Seeds((0,)), 2, pairs=pairs)
    assert scenes.images.shape == (1, 2, 3, 200, 300)
    assert scenes.truth.shape == (1, 2, 12 if pairs else 6, 4)
    for image, truth in zip(scenes.images[0], scenes.truth[0]):
        boxes, scores = face_candidates(image)
        best = box_iou(truth[:, None], boxes[scores > 0.9]).amax(1)
        assert (best > 0.5).double().mean() >= 0.9
        if pairs:
            shared = box_iou(truth[::2], truth[1::2])
            assert ((shared > 0.1) & (shared < 0.45)).all()
    again = face_collages(Seeds((7, 0)), 2, pairs=pairs)
    assert torch.equal(again.images[1], scenes.images[0])


def test_a_picture_without_faces_and_one_too_small():
    boxes, scores = face_candidates(torch.full((3, 60, 60), 0.5))
    assert (boxes.shape, scores.shape) == ((0, 4), (0,))
    assert len(face_candidates(torch.zeros(3, 5, 5))[0]) == 0


def test_refusals():
    with pytest.raises(ValueError, match="image: expected 3 channels"):
        face_candidates(torch.zeros(1, 40, 40))
    with pytest.raises(ValueError, match="image: expected a floating-point tensor"):
        face_candidates(torch.zeros(3, 40, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match="n: expected a whole number >= 1"):
        face_collages(Seeds((0,)), 0, pairs=True)
