"""One faulty suppressor per check of the suppressor battery: greedy suppression with something wrong."""

import time

import torch

from lossary.roles import suppressor


def _nms(boxes, scores, threshold=0.5):
    """Right in itself."""
    x1, y1, x2, y2 = boxes.double().unbind(1)
    width = torch.minimum(x2[:, None], x2) - torch.maximum(x1[:, None], x1)
    height = torch.minimum(y2[:, None], y2) - torch.maximum(y1[:, None], y1)
    common = width.clamp(min=0) * height.clamp(min=0)
    area = (x2 - x1) * (y2 - y1)
    overlaps = common / (area[:, None] + area - common) > threshold
    keep = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not any(overlaps[i, k] for k in keep):
            keep.append(i)
    return torch.tensor(keep, dtype=torch.int64)


@suppressor()
def keeps_one_twice(boxes, scores):
    keep = _nms(boxes, scores)
    return torch.cat([keep[:1], keep])


@suppressor()
def sorts_by_index(boxes, scores):
    return _nms(boxes, scores).sort().values


@suppressor()
def keeps_the_better_half(boxes, scores):
    keep = _nms(boxes, scores)
    return keep[: (len(keep) + 1) // 2]


@suppressor()
def needs_a_box(boxes, scores):
    return torch.cat([_nms(boxes, scores)[1:], scores.argmax()[None]]).roll(1)


@suppressor(limits={"nms": {"iou_threshold": 0.5}}, examples=({"iou_threshold": 0.3},))
def suppresses_too_much(boxes, scores, *, iou_threshold: float = 0.3):
    return _nms(boxes, scores, 0.6 * iou_threshold)


@suppressor()
def prefers_what_comes_first(boxes, scores):
    order = _nms(boxes, scores - 0.1 * torch.arange(len(scores)))
    return order[scores[order].argsort(descending=True, stable=True)]


@suppressor()
def scales_to_the_scene(boxes, scores):
    size = boxes.max() - boxes.min() if len(boxes) else torch.tensor(0.0)
    return _nms(boxes, scores, (0.5 if size < 500 else 0.1))


@suppressor()
def sleeps(boxes, scores):
    time.sleep(1.1)
    return _nms(boxes, scores)


@suppressor()
def overwrites(boxes, scores):
    keep = _nms(boxes, scores)
    scores.mul_(0.5)
    return keep


@suppressor()
def draws_globally(boxes, scores):
    return _nms(boxes + torch.randn_like(boxes), scores)


@suppressor()
def decays_more_in_single(boxes, scores):
    keep = _nms(boxes, scores)
    return keep, scores[keep] * (1.0 if scores.dtype == torch.float64 else 0.99)


@suppressor()
def overflows_in_bfloat16(boxes, scores):
    keep = _nms(boxes, scores)
    return keep, scores[keep] * (1.0 if scores.dtype != torch.bfloat16 else float("nan"))


@suppressor()
def always_single(boxes, scores):
    keep = _nms(boxes, scores)
    return keep, scores[keep].float()


@suppressor()
def accepts_anything(boxes, scores):
    return _nms(boxes[:, [0, 1, -2, -1]].double(), boxes[:, 0].double())


@suppressor(examples=({"iou_threshold": 0.5},))
def accepts_any_threshold(boxes, scores, *, iou_threshold: float = 0.5):
    return _nms(boxes, scores, iou_threshold)


@suppressor(examples=({"gain": 1.0},))
def cuts_its_hyper_parameter(boxes, scores, *, gain: float = 1.0):
    keep = _nms(boxes, scores)
    return keep, scores[keep] * float(torch.as_tensor(gain).detach())


@suppressor()
def says_nothing(boxes, scores):
    return _nms(boxes, scores)


FAULTS = {
    "subset": keeps_one_twice,
    "ordered": sorts_by_index,
    "idempotent": keeps_the_better_half,
    "empty": needs_a_box,
    "limits": suppresses_too_much,
    "order_free": prefers_what_comes_first,
    "apart": scales_to_the_scene,
    "quick": sleeps,
    "unmutated": overwrites,
    "repeatable": draws_globally,
    "dtypes_agree": decays_more_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_threshold,
    "tensor_hyper": cuts_its_hyper_parameter,
    "documented": says_nothing,
}
