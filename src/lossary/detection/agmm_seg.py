"""AGMM: let the features around a few labelled pixels, as a mixture of Gaussians, label the rest of the image.

Points, scribbles or blocks label a few pixels of each image. In each image every labelled class gets a centre, the mean
feature of its labelled pixels, and each pixel responds to it by its distance. The responses are soft labels for the
classifier everywhere, and are themselves trained: high at the labelled pixels of the class, low at those of others,
with centres apart. The centres are formed anew in each step and deployed networks use the classifier alone. Use it
when few pixels of an image are labelled but all its classes are. Image tags or boxes need pseudo-labels first. With
densely labelled images it adds nothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Modeling the Label Distributions for Weakly-Supervised Semantic Segmentation",
    year=2024,
    helps=("few-labels", "missing-labels"),
    departs=(
        "built from the official code of its conference version, for points, scribbles and blocks; tags and boxes have"
        " to be turned into labelled pixels first",
        "no variance in the Gaussian, as in that code, where it is commented out",
        "values per image, averaged over its pixels; the official code pools the pixels of a batch",
        "centres are averaged over the batch before they are held apart; the official code ends up with their sum",
    ),
    equation=r"G_k(x) = \exp\!\Bigl(-\bigl(\tfrac1D \textstyle\sum_d |f_d(x) - \mu_{kd}|\bigr)^2\Bigr),\qquad"
    r" \mathcal L_{\text{self}} = \frac{1}{2|K|} \sum_{k \in K} \mathrm{BCE}(p_k, G_k)",
    url="https://arxiv.org/abs/2403.13225",
)

EPSILON = 1e-6  # the official code's, inside logarithms


def class_centers(
    features: Float[Tensor, "b d h w"], labels: Int[Tensor, "b H W"], num_classes: int
) -> tuple[Float[Tensor, "b k d"], Bool[Tensor, "b k"]]:
    """Mean feature of each class's labelled pixels in each image, with its gradient, and which classes are labelled.

    Features are interpolated to the size of the labels. A class without labelled pixels has its centre at 0.

    Args:
        features: of the decoder, before the classifier.
        labels: 0 to num_classes - 1; any other number, such as 255 or -1, is a pixel without label.
        num_classes: k.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> features = torch.tensor([[[[0.0, 2.0, 9.0]]]])
    >>> class_centers(features, torch.tensor([[[1, 1, 255]]]), 2)
    (tensor([[[0.],
             [1.]]]), tensor([[False,  True]]))
    """
    require.floating("features", features, dims=4)
    _labels(labels, len(features))
    require.whole("num_classes", num_classes, at_least=1)
    there = _one_hot(labels, num_classes).to(features.dtype)
    count = there.sum((2, 3))
    total = torch.einsum("bkhw,bdhw->bkd", there, _resized(features, labels))
    return total / count.clamp_min(1).unsqueeze(2), count > 0


def gmm_response(
    features: Float[Tensor, "b d h w"], centers: Float[Tensor, "b k d"], present: Bool[Tensor, "b k"]
) -> Float[Tensor, "b k h w"]:
    """G_k = exp(-d_k^2), d_k the mean absolute difference of a pixel's feature from centre k; 0 for absent classes.

    Args:
        features: of the decoder.
        centers: see `class_centers`.
        present: which classes are labelled in the image.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> gmm_response(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 2), torch.tensor([[True, False]])).flatten()
    tensor([0.3679, 0.0000])
    """
    require.floating("features", features, dims=4)
    require.floating("centers", centers, dims=3)
    require.same_shape("centers", centers, (len(features), centers.shape[1], features.shape[1]))
    _flags("present", present, centers.shape[:2])
    distance = (features.unsqueeze(1) - centers[..., None, None]).abs().mean(2)
    return torch.exp(-distance.square()) * present[..., None, None]


def gmm_self_supervision_loss(
    logits: Float[Tensor, "b k h w"],
    response: Float[Tensor, "b k h w"],
    present: Bool[Tensor, "b k"],
    *,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Half the binary cross-entropy of the class probabilities from the responses, averaged, for each image.

    The mean goes over the present classes, then over the pixels. Gradients go into both, so that classifier and
    mixture teach each other.

    Args:
        logits: of the classifier.
        response: G, 0 to 1, see `gmm_response`; of the logits' size.
        present: which classes are labelled in the image; one without any gets 0.
        valid: pixels that count, such as those that a crop did not pad; None is all.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> logits, response = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    >>> gmm_self_supervision_loss(logits, response, torch.ones(1, 2, dtype=torch.bool))  # log 2 / 2
    tensor([0.3466])
    """
    require.floating("logits", logits, dims=4)
    require.same_shape("response", response, logits.shape)
    _flags("present", present, logits.shape[:2])
    return _mean(_present_entropy(logits.softmax(1), response, present), valid)


def gmm_maximization_loss(
    response: Float[Tensor, "b k H W"], labels: Int[Tensor, "b H W"], present: Bool[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """Half the binary cross-entropy of the responses from the labels, averaged over labelled pixels, for each image.

    Args:
        response: G, 0 to 1, of the labels' size.
        labels: as in `class_centers`; an image without any gets 0.
        present: which classes are labelled in the image.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> response, present = torch.full((1, 2, 1, 1), 0.5), torch.ones(1, 2, dtype=torch.bool)
    >>> gmm_maximization_loss(response, torch.zeros(1, 1, 1, dtype=torch.int64), present)  # log 2 / 2
    tensor([0.3466])
    """
    require.floating("response", response, dims=4)
    _labels(labels, len(response))
    require.same_shape("response", response, (*response.shape[:2], *labels.shape[1:]))
    _flags("present", present, response.shape[:2])
    truth = _one_hot(labels, response.shape[1])
    return _mean(_present_entropy(response, truth.to(response.dtype), present), truth.any(1))


def center_separation_loss(centers: Float[Tensor, "b k d"], present: Bool[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Mean over pairs of classes of exp(-|m_i - m_j|^2), m their centres averaged over the images that have them.

    |.| is the mean absolute difference over dimensions. 0 where the batch has fewer than two classes.

    Args:
        centers: see `class_centers`.
        present: which classes are labelled in the image.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> center_separation_loss(torch.tensor([[[0.0], [1.0]]]), torch.ones(1, 2, dtype=torch.bool))
    tensor(0.3679)
    """
    require.floating("centers", centers, dims=3)
    _flags("present", present, centers.shape[:2])
    mean = (centers * present.unsqueeze(2)).sum(0) / present.sum(0).clamp_min(1).unsqueeze(1)
    distance = (mean.unsqueeze(0) - mean.unsqueeze(1)).abs().mean(2)
    there = present.any(0)
    pairs = (there.unsqueeze(0) & there.unsqueeze(1)).triu(1)
    return (torch.exp(-distance.square()) * pairs).sum() / pairs.sum().clamp_min(1)


def absent_class_loss(
    logits: Float[Tensor, "b k h w"], present: Bool[Tensor, "b k"], *, valid: Bool[Tensor, "b h w"] | None = None
) -> Float[Tensor, " b"]:
    """-sum of log(1 - p_k) over the classes that are not in the image, averaged over its pixels, for each image.

    Args:
        logits: of the classifier.
        present: which classes are in the image.
        valid: pixels that count; None is all.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> absent_class_loss(torch.zeros(1, 2, 1, 1), torch.tensor([[True, False]]))
    tensor([0.6931])
    """
    require.floating("logits", logits, dims=4)
    _flags("present", present, logits.shape[:2])
    wrong = -torch.log(1 - logits.softmax(1) + EPSILON) * ~present[..., None, None]
    return _mean(wrong.sum(1), valid)


def agmm_loss(
    features: Float[Tensor, "b d h w"],
    logits: Float[Tensor, "b k H W"],
    labels: Int[Tensor, "b H W"],
    *,
    tags: Bool[Tensor, "b k"] | None = None,
    valid: Bool[Tensor, "b H W"] | None = None,
) -> Float[Tensor, " b"]:
    """Cross-entropy at the labelled pixels and the four terms of the mixture, all of weight 1, for each image.

    The separation of centres is one number for the batch, added to each image's value.

    Args:
        features: of the decoder, of the logits' size or smaller: responses are interpolated.
        logits: of the classifier.
        labels: 0 to k - 1; any other number is a pixel without label.
        tags: classes that are in the image, labelled pixels or not; None is those that are labelled.
        valid: pixels that count, such as those that a crop did not pad; None is all.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> g = torch.Generator().manual_seed(0)
    >>> features, logits = (torch.randn(2, n, 4, 4, generator=g) for n in (8, 3))
    >>> labels = torch.full((2, 4, 4), 255)
    >>> labels[:, 0, 0], labels[:, 3, 3] = 0, 2
    >>> agmm_loss(features, logits, labels).shape
    torch.Size([2])
    """
    require.floating("logits", logits, dims=4)
    _labels(labels, len(logits))
    require.same_shape("logits", logits, (*logits.shape[:2], *labels.shape[1:]))
    centers, present = class_centers(features, labels, logits.shape[1])
    response = _resized(gmm_response(features, centers, present), labels)
    truth = _one_hot(labels, logits.shape[1])
    terms = (
        _mean((-logits.log_softmax(1) * truth).sum(1), truth.any(1)),
        gmm_self_supervision_loss(logits, response, present, valid=valid),
        gmm_maximization_loss(response, labels, present),
        center_separation_loss(centers, present),
        absent_class_loss(logits, present if tags is None else tags, valid=valid),
    )
    return sum(terms[1:], start=terms[0])


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(B, K, H, W) bool, nowhere true where a pixel has no label."""
    return labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)[:, None, None]


def _resized(maps: Tensor, labels: Tensor) -> Tensor:
    if maps.shape[2:] == labels.shape[1:]:
        return maps
    return F.interpolate(maps, size=labels.shape[1:], mode="bilinear", align_corners=False)


def _present_entropy(input: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """Half of the binary cross-entropy (B, H, W), averaged over present classes."""
    entropy = -target * torch.log(input + EPSILON) - (1 - target) * torch.log(1 - input + EPSILON)
    there = present.to(input.dtype)
    return torch.einsum("bkhw,bk->bhw", entropy, there / there.sum(1, keepdim=True).clamp_min(1)) / 2


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Over the valid pixels of each image, 0 where it has none."""
    if valid is None:
        return values.mean((1, 2))
    _flags("valid", valid, values.shape)
    return (values * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)


def _labels(labels: Tensor, batch: int) -> None:
    require.integers("labels", labels)
    if labels.ndim != 3 or len(labels) != batch:
        raise ValueError(f"labels: expected shape ({batch}, height, width), got {tuple(labels.shape)}")


def _flags(name: str, flags: Tensor, shape: torch.Size) -> None:
    if not isinstance(flags, Tensor) or flags.dtype is not torch.bool or flags.shape != shape:
        got = f"{flags.dtype} of shape {tuple(flags.shape)}" if isinstance(flags, Tensor) else type(flags).__name__
        raise ValueError(f"{name}: expected bool of shape {tuple(shape)}, got {got}")
