"""NMS-AP: an average precision for open vocabularies, in which naming one object twice is no longer free.

Ordinary AP judges each label alone, so a detector that puts "red mug" and "blue mug" on the same mug loses nothing
for the wrong one as long as no image asks for it. Here the names compete first: of all detections on one true box
only the best scored stays, whatever its label, and AP is taken of the rest. Use it wherever labels are fine-grained
and given as text (colours, materials, positions, negations), with hard negatives among the queries. For a closed set
of labels that exclude each other's boxes anyway it says what AP says.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.detection._average_precision import COCO_THRESHOLDS, average_precision
from lossary.detection._overlap import BOX, pairwise
from lossary.detection._suppress import hard, suppress
from lossary.paper import Paper

PAPER = Paper(
    title="How to Evaluate the Generalization of Detection? A Benchmark for Comprehensive Open-Vocabulary Detection",
    year=2023,
    helps=(),
    departs=(
        "the paper describes class-agnostic suppression of the predictions; mode 'ground_truth', the default, does what"
        " its official script does, where the true boxes choose",
        "of equal scores the earlier detection stays; in the official script it depends on a sort",
        "hard negatives are the most similar labels by a given similarity; the benchmark's were made by language models"
        " and people",
    ),
    equation=r"\mathrm{NMS\text{-}AP} = \mathrm{AP}\Bigl(P \setminus \bigcup_g P_g \;\cup\; \bigcup_g"
    r" \bigl\{\operatorname*{argmax}_{p \in P_g} s_p\bigr\}\Bigr),\quad P_g = \{p \in P : \mathrm{IoU}(p, g) > 0.5\}",
    url="https://arxiv.org/abs/2308.13177",
)

Mode = Literal["ground_truth", "class_agnostic"]


def nms_average_precision(
    boxes: Sequence[Float[Tensor, "detections 4"]],
    scores: Sequence[Float[Tensor, " detections"]],
    labels: Sequence[Int[Tensor, " detections"]],
    truth: Sequence[Float[Tensor, "objects 4"]],
    truth_labels: Sequence[Int[Tensor, " objects"]],
    *,
    mode: Mode = "ground_truth",
    iou_threshold: float = 0.5,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    limit: int = 100,
) -> float:
    """COCO's average precision in percent of what is left when each object keeps one name; NaN without true boxes.

    With mode "ground_truth" each true box keeps, of all detections that overlap it by more than iou_threshold, the one
    with the highest score; the others go unless another true box keeps them. What overlaps no true box stays. With
    "class_agnostic" the detections are suppressed at iou_threshold as if all had one label.

    Args:
        boxes: of each image the detections under all labels that were asked for, x1, y1, x2, y2.
        scores: comparable between labels; of equal ones the earlier detection wins.
        labels: int64, of the detections.
        truth: true boxes.
        truth_labels: int64, of the true boxes.
        mode: "ground_truth" or "class_agnostic".
        iou_threshold: 0 to 1.
        thresholds: of the average precision.
        limit: so many of the best detections of an image and label count.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, or a hyper-parameter outside its range.

    >>> mug = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    >>> red, both = torch.tensor([0]), torch.tensor([1, 0])  # "red mug"; and "blue mug" with the higher score
    >>> nms_average_precision([mug.repeat(2, 1)], [torch.tensor([0.9, 0.8])], [both], [mug], [red])
    0.0
    """
    require.one_of("mode", mode, ("ground_truth", "class_agnostic"))
    require.number("iou_threshold", iou_threshold, at_least=0.0, at_most=1.0)
    for name, images in {"scores": scores, "labels": labels, "truth": truth, "truth_labels": truth_labels}.items():
        if len(images) != len(boxes):
            raise ValueError(f"{name}: expected one entry for each of {len(boxes)} images, got {len(images)}")
    kept = []
    for found, score, label, true in zip(boxes, scores, labels, truth):
        require.same_shape("boxes", found, (len(found), 4))
        require.same_shape("scores", score, (len(found),))
        require.integers("labels", label, shape=(len(found),))
        require.same_shape("truth", true, (len(true), 4))
        if mode == "class_agnostic":
            keep, _ = suppress(found, score, decay=hard, parameter=iou_threshold, floor=0.0)
            kept.append(keep.sort().values)
        else:
            kept.append(_named_once(found, score, true, iou_threshold))
    return average_precision(
        *([part[keep] for part, keep in zip(parts, kept)] for parts in (boxes, scores)),
        truth,
        labels=[label[keep] for label, keep in zip(labels, kept)],
        truth_labels=truth_labels,
        thresholds=thresholds,
        limit=limit,
    )


def _named_once(boxes: Tensor, scores: Tensor, truth: Tensor, threshold: float) -> Tensor:
    """Indices of the detections that no true box sends away, or that some true box keeps."""
    near = (pairwise(BOX, truth.double(), boxes.double()) > threshold).to(boxes.device)
    stays = ~near.any(0)
    near = near[near.any(1)]
    if len(near):
        stays[torch.where(near, scores, -torch.inf).argmax(1)] = True
    return stays.nonzero()[:, 0]


def hard_negative_queries(
    truth_labels: Sequence[Int[Tensor, " objects"]], similarity: Float[Tensor, "labels labels"], *, negatives: int
) -> list[Int[Tensor, " queries"]]:
    """The labels to ask each image for: its own, ascending, then those most easily taken for one of them.

    The negatives of an image are the labels that are most similar to any of its own, the most similar first, of equal
    ones the lower label; an image without objects is asked for labels 0, 1, ....

    Args:
        truth_labels: of each image the labels of what is in it, 0 to labels - 1.
        similarity: of each label (row) with each other, such as the cosine of their text embeddings.
        negatives: how many more labels an image is asked for, at most; there may not be as many.

    Raises:
        ValueError: a similarity that is not square, labels that are no integers, or `negatives` below 0.

    >>> similarity = torch.tensor([[1.0, 0.2, 0.7], [0.2, 1.0, 0.1], [0.7, 0.1, 1.0]])
    >>> hard_negative_queries([torch.tensor([0, 0])], similarity, negatives=1)
    [tensor([0, 2])]
    """
    require.floating("similarity", similarity, dims=2)
    require.same_shape("similarity", similarity, (len(similarity), len(similarity)))
    require.whole("negatives", negatives)
    queries = []
    for labels in truth_labels:
        require.integers("truth_labels", labels)
        mine = labels.unique()
        nearest = similarity.new_zeros(len(similarity)) if not len(mine) else similarity[mine].amax(0)
        order = nearest.argsort(descending=True, stable=True)
        others = order[~torch.isin(order, mine)]
        queries.append(torch.cat([mine, others[:negatives]]))
    return queries


class NMSAveragePrecision:
    """`nms_average_precision` of batches as they come, called as torchmetrics' `MeanAveragePrecision` is.

    Args:
        hyper: keyword arguments of `nms_average_precision`.

    >>> metric, mug = NMSAveragePrecision(), torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    >>> found = {"boxes": mug.repeat(2, 1), "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 1])}
    >>> metric.update([found], [{"boxes": mug, "labels": torch.tensor([0])}])
    >>> metric.compute()
    100.0
    """

    def __init__(self, **hyper: object) -> None:
        self.hyper = hyper
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.images: dict[str, list[Tensor]] = {
            name: [] for name in ("boxes", "scores", "labels", "truth", "truth_labels")
        }

    def update(self, preds: Sequence[dict[str, Tensor]], target: Sequence[dict[str, Tensor]]) -> None:
        """Add images: of each a dict of boxes, scores and labels, and one of true boxes and labels.

        Raises:
            ValueError: not as many predictions as targets.
        """
        if len(preds) != len(target):
            raise ValueError(f"target: expected one for each of {len(preds)} predictions, got {len(target)}")
        for found, true in zip(preds, target):
            for name in ("boxes", "scores", "labels"):
                self.images[name].append(found[name].detach().cpu())
            self.images["truth"].append(true["boxes"].cpu())
            self.images["truth_labels"].append(true["labels"].cpu())

    def compute(self) -> float:
        """Over all images so far, in percent."""
        return nms_average_precision(**self.images, **self.hyper)
