"""One faulty assigner per check of the assigner battery: a plain one with something wrong."""

import time

import torch

from lossary.detection._assign import fits, settle
from lossary.roles import assigner


def _overlap(boxes, truth):
    low = torch.maximum(boxes[..., :, None, :2], truth[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], truth[..., None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (boxes, truth)]
    return common / (areas[0][..., :, None] + areas[1][..., None, :] - common)


def _assign(boxes, truth, mask, threshold=0.5):
    """Right in itself: anything that overlaps a true box by more than the threshold."""
    overlap = _overlap(boxes.detach(), truth)
    return settle((overlap > threshold) & mask[..., None, :], overlap)


@assigner()
def counts_from_one(boxes, truth, mask):
    return _assign(boxes, truth, mask) + 1


@assigner()
def forgets_the_first(boxes, truth, mask):
    match = _assign(boxes, truth, mask)
    return match.masked_fill(match == 0, -1)


@assigner()
def leaves_none_out(boxes, truth, mask):
    return _assign(boxes, truth, mask).clamp(min=0)


@assigner(one_to_one=True)
def matches_many(boxes, truth, mask):
    return _assign(boxes, truth, mask)


@assigner()
def needs_a_true_box(boxes, truth, mask):
    overlap = _overlap(boxes, truth)
    value, match = overlap.max(-1)
    return torch.where((value > 0.5) & mask.gather(-1, match), match, -1)


@assigner()
def fooled_by_padding(boxes, truth, mask):
    size = (truth[..., 2:] - truth[..., :2]).mean((-1, -2), keepdim=True)  # of the padding too
    return _assign(boxes, truth, mask, 0.5 + 0.01 * (size - 20))


@assigner()
def averages_over_the_batch(boxes, truth, mask):
    overlap = _overlap(boxes, truth)
    real = (overlap > 0) & mask[..., None, :]
    threshold = torch.where(real, overlap, 0.0).sum() / real.sum() if real.any() else 0.5
    return _assign(boxes, truth, mask, threshold)


@assigner()
def prefers_what_comes_first(boxes, truth, mask):
    match = _assign(boxes, truth, mask)
    return match.masked_fill((match == 0).cumsum(-1) > 1, -1)


@assigner()
def measures_from_the_origin(boxes, truth, mask):
    return _assign(boxes, truth, mask, 0.5 * (1 + boxes[..., :2].mean() / 200) if boxes.numel() else 0.5)


@assigner()
def teaches_its_targets(boxes, truth, mask):
    match = _assign(boxes, truth, mask)
    overlap = _overlap(boxes, truth).nan_to_num(nan=0.0)
    own = match[..., None] == torch.arange(truth.shape[-2])
    return match, (overlap * own).sum(-1)


@assigner()
def sleeps(boxes, truth, mask):
    time.sleep(1.1)
    return _assign(boxes, truth, mask)


@assigner()
def overwrites(boxes, truth, mask):
    match = _assign(boxes, truth, mask)
    truth.mul_(0.5)
    return match


@assigner()
def draws_globally(boxes, truth, mask):
    return _assign(boxes + torch.randn_like(boxes), truth, mask)


@assigner()
def lower_bar_in_single(boxes, truth, mask):
    return _assign(boxes, truth, mask, 0.5 if boxes.dtype == torch.float64 else 0.8)


@assigner()
def overflows_in_bfloat16(boxes, truth, mask):
    match = _assign(boxes, truth, mask)
    return match, (match >= 0).to(boxes) * (1.0 if boxes.dtype != torch.bfloat16 else float("nan"))


@assigner()
def always_single(boxes, truth, mask):
    match = _assign(boxes, truth, mask)
    return match, (match >= 0).float()


@assigner()
def accepts_anything(boxes, truth, mask):
    return torch.full(boxes.shape[:-1], -1)


@assigner(examples=({"threshold": 0.5},))
def accepts_any_threshold(boxes, truth, mask, *, threshold: float = 0.5):
    fits(truth, mask, boxes=boxes)
    return _assign(boxes, truth, mask, threshold)


@assigner(examples=({"gain": 1.0},))
def cuts_its_hyper_parameter(boxes, truth, mask, *, gain: float = 1.0):
    match = _assign(boxes, truth, mask)
    return match, (match >= 0).to(boxes) * float(torch.as_tensor(gain).detach())


@assigner()
def says_nothing(boxes, truth, mask):
    return _assign(boxes, truth, mask)


FAULTS = {
    "legal": counts_from_one,
    "served": forgets_the_first,
    "near": leaves_none_out,
    "one_to_one": matches_many,
    "empty": needs_a_true_box,
    "padding": fooled_by_padding,
    "batched": averages_over_the_batch,
    "order_free": prefers_what_comes_first,
    "moved": measures_from_the_origin,
    "detached": teaches_its_targets,
    "quick": sleeps,
    "unmutated": overwrites,
    "repeatable": draws_globally,
    "dtypes_agree": lower_bar_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_threshold,
    "tensor_hyper": cuts_its_hyper_parameter,
    "documented": says_nothing,
}
