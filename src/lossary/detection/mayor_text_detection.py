"""MAYOR: a mask head that sees its whole region at once, and square anchors that no long box goes without.

Where lines of text stand close, a region holds several of them, and a convolutional mask head, which looks at one
neighbourhood at a time, cannot tell whose pixels they are. Here the head's decoder is fully connected, and it is
taught the shape of the one whole instance. And every true box, however long and thin, gets its best anchors, so that
one square anchor a place is enough. Try it where instances of one kind crowd each other; where a region holds a single
instance it gains little, and a fully connected decoder has many more weights than a convolutional one.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.detection._assign import by_overlap, fits, setting
from lossary.detection._overlap import box_iou
from lossary.paper import Paper
from lossary.roles import assigner, layer, loss

PAPER = Paper(
    title="Mask is All You Need: Rethinking Mask R-CNN for Dense and Arbitrary-Shaped Scene Text Detection",
    year=2021,
    helps=("crowded-scenes", "odd-shapes"),
    departs=(
        "only the abstract was at hand: the decoder's sizes, the form of the mask loss and the rule of assignment are"
        " ours, made after its words",
    ),
    equation=(
        r"\hat M = \sigma\bigl(W_2 \max(0,\, W_1 \operatorname{vec} F)\bigr), \qquad"
        r" \ell = 1 - \frac{2 \sum_i \hat M_i M_i + 1}{\sum_i \hat M_i^2 + \sum_i M_i^2 + 1}"
    ),
    url="https://arxiv.org/abs/2109.03426",
)


@layer(
    shape=(2, 3, 6, 6),
    examples=(
        {"channels": 3, "size": 6, "squeezed": 2, "hidden": 8, "mask": 5},
        {"channels": 3, "size": 6, "convolutions": 1, "squeezed": 2, "hidden": 8, "mask": 5},
    ),
)
class MLPMaskDecoder(nn.Module):
    """Features of a region to the logits of its mask, every one of which depends on all of the region.

    3x3 convolutions, a 1x1 convolution to a few channels, and two fully connected layers.

    Args:
        channels: of the features, and of the convolutions.
        size: of the region's features, height and width.
        convolutions: 3x3, with ReLU, before the rest.
        squeezed: channels after the 1x1 convolution.
        hidden: width between the fully connected layers.
        mask: height and width of the mask.
        input: (N, channels, size, size).

    Raises:
        ValueError: a size below 1 (convolutions: 0), or features that do not fit.

    >>> import torch
    >>> MLPMaskDecoder(channels=8, size=7, squeezed=4, hidden=32, mask=14)(torch.zeros(5, 8, 7, 7)).shape
    torch.Size([5, 14, 14])
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        size: int = 14,
        convolutions: int = 0,
        squeezed: int = 64,
        hidden: int = 1024,
        mask: int = 28,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "size": size, "squeezed": squeezed, "hidden": hidden, "mask": mask}
        for name, value in sizes.items():
            require.whole(name, value, at_least=1)
        require.whole("convolutions", convolutions)
        self.shape = (channels, size, size)
        looks = [m for _ in range(convolutions) for m in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
        self.decode = nn.Sequential(
            *looks,
            nn.Conv2d(channels, squeezed, 1),
            nn.Flatten(),
            nn.Linear(squeezed * size * size, hidden),
            nn.ReLU(),
            nn.Linear(hidden, mask * mask),
            nn.Unflatten(1, (mask, mask)),
        )

    def forward(self, input: Float[Tensor, "n channels size size"]) -> Float[Tensor, "n mask mask"]:
        """Logits; above 0 is the instance."""
        require.same_shape("input", input, (len(input), *self.shape))
        result: Tensor = self.decode(input)
        return result


@loss(on="multilabel")
def instance_aware_mask_loss(
    input: Float[Tensor, "*batch pixels"], target: Float[Tensor, "*batch pixels"]
) -> Float[Tensor, "*batch"]:
    """1 - (2 sum p y + 1) / (sum p^2 + sum y^2 + 1) over a mask's pixels, p = sigmoid(input): Dice, per mask.

    The mask is judged as one shape: what a pixel costs depends on the others. In 0 to 1.

    Args:
        input: logits of the pixels, flattened.
        target: 1 where the region's own instance is, 0 elsewhere, also on other instances in the region.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> instance_aware_mask_loss(torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))  # 1 - 3 / 4
    tensor([0.2500])
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("target", target, tuple(input.shape))
    likely = input.sigmoid()
    common = 2 * (likely * target).sum(-1) + 1
    return 1 - common / (likely.square().sum(-1) + target.square().sum(-1) + 1)


@assigner(examples=({"k": 4, "positive": 0.5}, {}))
def adaptive_anchor_assign(
    anchors: Float[Tensor, "anchors 4"],
    truth: Float[Tensor, "*batch true 4"],
    mask: Bool[Tensor, "*batch true"] | None = None,
    *,
    k: int = 9,
    positive: float = 0.7,
    negative: float = 0.3,
) -> Int[Tensor, "*batch anchors"]:
    """The true box that each anchor learns; -1 is background, and -2 takes no part in the loss.

    Anchors of an IoU of `positive` or more belong to a true box, and its k best in any case, as far as they overlap it
    at all; one that belongs to several goes to the one of largest IoU. Of the rest those below `negative` everywhere
    are background. A box without area or with a NaN gets none.

    Args:
        anchors: x1, y1, x2, y2; one square a place is enough.
        truth: true boxes.
        mask: False for rows of `truth` that only pad.
        k: anchors that a true box gets in any case, >= 0; at 0 this is the fixed rule of Faster R-CNN.
        positive: 0 to 1.
        negative: 0 to `positive`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a hyper-parameter outside its range.

    >>> import torch
    >>> corner = torch.tensor([[0.0, 0.0], [4.0, 0.0], [8.0, 0.0], [8.0, 8.0]])
    >>> long = torch.tensor([[0.0, 1.0, 12.0, 2.0]])  # an IoU of 1 / 6 with three of the anchors
    >>> adaptive_anchor_assign(torch.cat([corner, corner + 4], 1), long)
    tensor([ 0,  0,  0, -1])
    >>> adaptive_anchor_assign(torch.cat([corner, corner + 4], 1), long, k=0)
    tensor([-1, -1, -1, -1])
    """
    fits(truth, mask, anchors=anchors)
    require.whole("k", k)
    setting("positive", positive, at_least=0.0, at_most=1.0)
    setting("negative", negative, at_least=0.0, at_most=1.0)
    if negative > positive:
        raise ValueError(f"negative: expected at most positive, {positive}, got {negative}")
    overlap = box_iou(anchors.unsqueeze(-2), truth.unsqueeze(-3)).detach()
    return by_overlap(overlap, mask, positive=positive, negative=negative, k=k)
