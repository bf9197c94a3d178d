"""Formulas on images and masks that the surveyed losses and metrics share: windows, orderings, boundaries, segments."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossary import require


def gaussian_window(size: int, sigma: float, like: Tensor) -> Float[Tensor, "size size"]:
    """A Gaussian on a square of pixels that sums to 1."""
    offset = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    line = torch.softmax(-offset.square() / (2 * sigma**2), 0)
    return torch.outer(line, line)


def ssim_map(
    x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"], window: Float[Tensor, "k k"], data_range: float
) -> Float[Tensor, "n c h-k+1 w-k+1"]:
    """Structural similarity in each window that lies inside the image, K1 = 0.01 and K2 = 0.03."""
    kernel = window.expand(x.shape[1], 1, *window.shape)
    moments = [F.conv2d(a, kernel, groups=x.shape[1]) for a in (x, y, x * x, y * y, x * y)]
    mean_x, mean_y, square_x, square_y, product = moments
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance = product - mean_x * mean_y
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def lovasz_extension(
    errors: Float[Tensor, "*batch pixels"], target: Float[Tensor, "*batch pixels"]
) -> Float[Tensor, "*batch"]:
    """The Jaccard loss of a set of wrong pixels, extended to real errors by interpolation along their order."""
    errors, order = errors.sort(-1, descending=True)
    there = target.gather(-1, order).to(torch.promote_types(errors.dtype, torch.float32))  # counts outgrow float16
    total = there.sum(-1, keepdim=True)
    jaccard = 1 - (total - there.cumsum(-1)) / (total + (1 - there).cumsum(-1))
    steps = jaccard.diff(dim=-1, prepend=torch.zeros_like(jaccard[..., :1]))
    value: Tensor = torch.linalg.vecdot(errors, steps.to(errors.dtype))
    return value


def boundary(mask: Bool[Tensor, "n h w"]) -> Bool[Tensor, "n h w"]:
    """Pixels of a mask with one of their four neighbours outside; the edge of the image is no boundary."""
    grown = F.pad(mask.float().unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1) > 0
    around = [grown[:, :-2, 1:-1], grown[:, 2:, 1:-1], grown[:, 1:-1, :-2], grown[:, 1:-1, 2:]]
    return mask & ~torch.stack(around).all(0)


def near(mask: Bool[Tensor, "n h w"], distance: float) -> Bool[Tensor, "n h w"]:
    """Pixels within a Euclidean distance of one in the mask."""
    reach = int(distance)
    offset = torch.arange(-reach, reach + 1, device=mask.device, dtype=torch.float32)
    disc = (offset.square() + offset.square().unsqueeze(1) <= distance**2).float()
    return F.conv2d(mask.float().unsqueeze(1), disc[None, None], padding=reach).squeeze(1) > 0.5


def matched_segments(
    input: Int[Tensor, "pixels 2"], target: Int[Tensor, "pixels 2"], categories: int
) -> Float[Tensor, "4 categories"]:
    """Of one image's segments (category, instance): summed IoU of the matches, matches, unmatched found and true ones.

    Segments of one category match where their IoU exceeds 1/2, which no third segment can then do.
    """
    found, of_found, found_size = torch.unique(input, dim=0, return_inverse=True, return_counts=True)
    true, of_true, true_size = torch.unique(target, dim=0, return_inverse=True, return_counts=True)
    common = torch.bincount(of_found * len(true) + of_true, minlength=len(found) * len(true)).view(len(found), -1)
    iou = common.double() / (found_size.unsqueeze(1) + true_size - common)
    matches = (iou > 0.5) & (found[:, :1] == true[:, 0])
    rows, columns = matches.nonzero(as_tuple=True)
    right = torch.bincount(found[rows, 0], minlength=categories)
    summed = torch.bincount(found[rows, 0], iou[rows, columns], minlength=categories)
    alarms = torch.bincount(found[:, 0], minlength=categories) - right
    misses = torch.bincount(true[:, 0], minlength=categories) - right
    return torch.stack((summed, right.double(), alarms.double(), misses.double()))


def images(input: Tensor, target: Tensor, *, window: int = 1) -> None:
    """Two batches of images (n, c, h, w) of one shape, no side below the window."""
    require.floating("input", input, dims=4)
    if min(input.shape[2:]) < window:
        raise ValueError(f"input: expected images of at least {window}x{window}, got shape {tuple(input.shape)}")
    require.same_shape("target", target, tuple(input.shape))
