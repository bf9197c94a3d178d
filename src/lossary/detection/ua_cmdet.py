"""UA-CMDet: a camera and an infrared camera on one drone, the one believed less where it is dark or they disagree.

A box that was drawn in the colour image is trusted by how bright the image is and how well it agrees with the infrared
box of the same object: the weight multiplies the regression of this box and nothing else. Objects that only one camera
was labelled for are added to the other's truth. In the end the colour branch's scores are lowered by the brightness
before all branches' boxes are suppressed together. Try it on two aligned sensors of which one fails in a known way; a
single sensor gains nothing from it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossary import require
from lossary.detection._overlap import ROTATED_BOX, pairwise
from lossary.detection._suppress import hard, suppress
from lossary.paper import Paper

PAPER = Paper(
    title="Drone-based RGB-Infrared Cross-Modality Vehicle Detection via Uncertainty-Aware Learning",
    year=2022,
    helps=("train-test-shift",),
    departs=(
        "no three-branch network: weights, completed truth and suppression work with any detectors of two sensors",
        "grey values are not rounded to whole numbers before they are compared with 60",
        "an image without objects in one camera gets the other's; the official code fails there",
        "a score of exactly the score threshold stays",
    ),
    equation=r"w_i = w_{\mathrm{dark}} \prod_{j:\, 0.1 < o_{ij} < 0.8} o_{ij} \;\text{ if } \max_j o_{ij} < 0.8,"
    r"\quad w_{\mathrm{dark}} = \begin{cases} 1 - d & d \ge 0.45 \\ 1 & \text{else} \end{cases}",
    url="https://github.com/SunYM2020/UA-CMDet",
)


def illumination_weight(
    image: Float[Tensor, "*batch 3 height width"], *, dark: float = 60 / 255, share: float = 0.45
) -> Float[Tensor, "*batch"]:
    """How far to trust a colour image: 1 minus the share d of its dark pixels, but 1 where d is below `share`.

    Args:
        image: red, green and blue, 0 to 1, with at least one pixel.
        dark: a pixel is dark if 0.299 red + 0.587 green + 0.114 blue is below it, 0 to 1.
        share: of dark pixels at which an image is dark, 0 to 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a hyper-parameter outside its range.

    >>> image = torch.ones(3, 2, 5)
    >>> image[:, :, 2:] = 0.1  # six of ten pixels
    >>> illumination_weight(image)
    tensor(0.4000)
    """
    require.floating("image", image, at_least_dims=3)
    if image.shape[-3] != 3 or not image[..., 0, :, :].numel():
        raise ValueError(f"image: expected 3 channels and at least one pixel, got shape {tuple(image.shape)}")
    for name, value in (("dark", dark), ("share", share)):
        require.number(name, value, at_least=0.0, at_most=1.0)
    grey = 0.299 * image[..., 0, :, :] + 0.587 * image[..., 1, :, :] + 0.114 * image[..., 2, :, :]
    d = (grey < dark).to(image.dtype).mean((-2, -1))
    return torch.where(d >= share, 1 - d, torch.ones_like(d))


class _Truth(NamedTuple):
    """Boxes of one camera, its own first, then copies; their weights; and which of the other's boxes were copied."""

    boxes: Tensor
    weights: Tensor
    copied: Tensor


def cross_modal_uncertainty_weights(
    colour: Float[Tensor, "n 5"],
    infrared: Float[Tensor, "m 5"],
    illumination: float,
    *,
    agreement: float = 0.8,
    contact: float = 0.1,
    unseen: float = 0.01,
    guessed: float = 0.1,
) -> tuple[_Truth, _Truth]:
    """True boxes of both cameras, each completed by the other's, and how far the regression of each is to be trusted.

    A colour box starts at the illumination weight. If its best IoU with the infrared boxes is below `agreement`, it is
    multiplied by each of its IoUs between `contact` and `agreement`, normally one. Infrared boxes weigh 1. An object
    whose mean IoU with all of the other camera's boxes is below `unseen` is copied: into the colour boxes with weight
    `guessed`, into the infrared boxes with weight 1. Multiply the box regression loss of positives by the weights, not
    the classification.

    Args:
        colour: boxes cx, cy, width, height, angle in radians, drawn in the colour image.
        infrared: the same of the infrared image.
        illumination: `illumination_weight` of the colour image, 0 to 1.
        agreement: IoU at which boxes agree.
        contact: IoU up to which boxes are strangers.
        unseen: mean IoU below which the other camera does not show the object.
        guessed: weight of what is copied into the colour boxes.

    Returns:
        for colour and for infrared (boxes (N, 5), weights (N,), copied (K,)): the last K boxes are copies of the other
        camera's boxes `copied`, whose labels go with them.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a number outside 0 to 1.

    >>> colour = torch.tensor([[0.0, 0.0, 4.0, 2.0, 0.0]])
    >>> infrared = torch.tensor([[1.0, 0.0, 4.0, 2.0, 0.0], [9.0, 9.0, 4.0, 2.0, 0.0]])  # an IoU of 3/5, and none
    >>> cross_modal_uncertainty_weights(colour, infrared, 0.5)[0].weights
    tensor([0.3000, 0.1000])
    """
    for name, boxes in (("colour", colour), ("infrared", infrared)):
        require.floating(name, boxes, dims=2)
        require.same_shape(name, boxes, (len(boxes), 5))
    for name, value in (
        ("illumination", illumination),
        ("agreement", agreement),
        ("contact", contact),
        ("unseen", unseen),
        ("guessed", guessed),
    ):
        require.number(name, value, at_least=0.0, at_most=1.0)
    overlap = pairwise(ROTATED_BOX, colour.detach(), infrared.detach().to(colour))
    doubtful = (overlap > contact) & (overlap < agreement) & (overlap < agreement).all(1, keepdim=True)
    weights = illumination * torch.where(doubtful, overlap, 1.0).prod(1)
    hidden, other = (mean.nan_to_num(nan=0.0) < unseen for mean in (overlap.mean(0), overlap.mean(1)))
    return (
        _completed(colour, weights, infrared, hidden, guessed),
        _completed(infrared, infrared.new_ones(len(infrared)), colour, other, 1.0),
    )


def _completed(boxes: Tensor, weights: Tensor, others: Tensor, missing: Tensor, weight: float) -> _Truth:
    copied = missing.nonzero()[:, 0].to(others.device)
    return _Truth(
        torch.cat([boxes, others[copied].to(boxes)]),
        torch.cat([weights, weights.new_full((len(copied),), weight)]),
        copied,
    )


def illumination_aware_nms(
    boxes: Float[Tensor, "n 5"],
    scores: Float[Tensor, " n"],
    idxs: Int[Tensor, " n"],
    from_colour: Bool[Tensor, " n"],
    illumination: float,
    *,
    iou_threshold: float = 0.1,
    score_threshold: float = 0.05,
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """Suppression of all branches' boxes together, the colour branch's scores first multiplied by the illumination.

    Args:
        boxes: cx, cy, width, height, angle in radians, of the colour, infrared and fusion branch.
        scores: of a class, 0 to 1.
        idxs: class of each, int64; boxes of different classes leave each other alone.
        from_colour: whether a box comes from the colour branch.
        illumination: `illumination_weight` of the colour image, 0 to 1.
        iou_threshold: of rotated boxes, 0 to 1.
        score_threshold: what falls below it is dropped, >= 0.

    Returns:
        keep (K,) int64, best first, and their scores.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a hyper-parameter outside its range.

    >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0, 0.0], [1.0, 0.0, 4.0, 2.0, 0.1]])
    >>> labels, from_colour = torch.tensor([0, 0]), torch.tensor([True, False])
    >>> illumination_aware_nms(boxes, torch.tensor([0.9, 0.6]), labels, from_colour, 0.5)
    (tensor([1]), tensor([0.6000]))
    """
    require.floating("boxes", boxes, dims=2)
    require.same_shape("boxes", boxes, (len(boxes), 5))
    require.same_shape("scores", scores, (len(boxes),))
    require.integers("idxs", idxs, shape=scores.shape)
    if from_colour.dtype is not torch.bool or from_colour.shape != scores.shape:
        wanted, got = tuple(scores.shape), tuple(from_colour.shape)
        raise ValueError(f"from_colour: expected bool of shape {wanted}, got {from_colour.dtype} of shape {got}")
    for name, value in (("illumination", illumination), ("iou_threshold", iou_threshold)):
        require.number(name, value, at_least=0.0, at_most=1.0)
    require.number("score_threshold", score_threshold, at_least=0.0)
    seen = torch.where(from_colour, scores * illumination, scores)
    return suppress(
        boxes, seen, decay=hard, parameter=iou_threshold, floor=score_threshold, overlap=ROTATED_BOX, groups=idxs
    )
