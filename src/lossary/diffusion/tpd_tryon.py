"""TPD: put the garment beside the person, in one wide picture, and self-attention carries its texture across.

Virtual try-on usually hands a diffusion network the garment through an image encoder, whose vectors lose fine texture.
Here person and garment are joined along their width, as are all conditions, and the network's own self-attention
copies; its cross-attention sees one learned vector. The region to repaint is predicted, too, as one more channel of
what is diffused: a first pass repaints a whole box, a second one only the predicted region, so that arms and
background stay. For copying detail from a reference at about the same scale; attention over twice the pixels costs up
to four times as much, and a reference of which only the gist should come over is better encoded.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Texture-Preserving Diffusion Models for High-Fidelity Virtual Try-On",
    year=2024,
    helps=("inverse-problems", "guidance"),
    departs=(
        "the largest hole is that of the mask's zeros; the official code finds it so only where it is smaller than the"
        " rest of the picture",
        "autoencoder, pose maps, segmentation, distorted training masks and the soft-edged blending of the repainted"
        " region are the caller's; so is the ordinary loss, a mean over all diffused channels and both halves",
        "claims: a transformer of one block that predicts x_0 on 8x8 pictures of patterns in garment shapes, without"
        " poses, trained for each seed",
    ),
    equation=(
        r"\hat\epsilon=\epsilon_\theta\bigl([\,x_t\,;\,m_t\,;\,\tilde x\,;\,\tilde m\,;\,p\,]\bigr),\qquad "
        r"x=[\text{person}\,|\,\text{garment}],\; m=[\text{worn}\,|\,1],\; \tilde x=[\text{person}\odot\tilde m\,|\,"
        r"\text{garment}]"
    ),
    url="https://github.com/Gal4way/TPD",
)

Picture = Float[Tensor, "batch channels height width"]
Mask = Float[Tensor, "batch 1 height width"]


def spatial_concat_target(person: Picture, garment: Picture, worn: Mask) -> Float[Tensor, "batch more height wide"]:
    """What is diffused, (B, C + 1, H, 2 W): person and garment side by side, and the mask of where it is worn.

    Args:
        person: wearing the garment, as pixels or latents.
        garment: of the same shape.
        worn: 0 where it is worn, 1 elsewhere; beside the garment it is 1.

    Raises:
        ValueError: shapes that differ.

    >>> import torch
    >>> spatial_concat_target(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 5.0), torch.zeros(1, 1, 1, 1))
    tensor([[[[0., 5.]],
    <BLANKLINE>
             [[0., 1.]]]])
    """
    _fit(person, garment, worn, "worn")
    return torch.cat([_beside(person, garment), _beside(worn, torch.ones_like(worn))], dim=1)


def spatial_concat_condition(
    kept: Picture, garment: Picture, mask: Mask, poses: Sequence[Picture] = ()
) -> Float[Tensor, "batch more height wide"]:
    """What the network is told, (B, C + 1 + C for each pose map, H, 2 W): the garment is beside every picture.

    Args:
        kept: the person with what is to be repainted blanked out (before encoding, if these are latents).
        garment: of the same shape.
        mask: 1 where the person is kept, 0 where repainted; beside the garment it is 1.
        poses: pictures of the pose, of the same shape.

    Raises:
        ValueError: shapes that differ.

    >>> import torch
    >>> x = torch.zeros(2, 4, 8, 6)
    >>> spatial_concat_condition(x, x, x[:, :1], [x, x]).shape  # 13 channels beside the 5 that are diffused
    torch.Size([2, 13, 8, 12])
    """
    _fit(kept, garment, mask, "mask")
    for pose in poses:
        require.same_shape("poses", pose, tuple(kept.shape))
    pictures = [_beside(pose, garment) for pose in poses]
    return torch.cat([_beside(kept, garment), _beside(mask, torch.ones_like(mask)), *pictures], dim=1)


class SelfAttentionTransfer(nn.Module):
    """A network for wide pictures: network(what is diffused and the condition, t, one learned vector).

    Args:
        network: called as network(x (B, channels, H, 2 W), t, prompt (B, 1, width)) -> (B, diffused, H, 2 W), such as
            lambda x, t, prompt: unet(x, t, prompt).sample with a diffusers `UNet2DConditionModel`. Its self-attention
            must reach across the picture. A module's weights become those of this module.
        width: of the vector that its cross-attention sees in place of a text.

    Raises:
        ValueError: a width below 1; when called, a condition of another size than x.

    >>> import torch
    >>> model = SelfAttentionTransfer(lambda x, t, prompt: x[:, :2] + prompt.sum(), width=3)
    >>> model(torch.ones(1, 2, 4, 8), 0.5, torch.zeros(1, 2, 4, 8)).shape
    torch.Size([1, 2, 4, 8])
    """

    def __init__(self, network: Callable[..., Tensor], *, width: int = 768) -> None:
        super().__init__()
        require.whole("width", width, at_least=1)
        self.network = network
        self.prompt = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor) -> Tensor:
        if condition.shape[-2:] != x.shape[-2:] or len(condition) != len(x):
            raise ValueError(
                f"condition: expected the batch and size of x, {tuple(x.shape)}, got {tuple(condition.shape)}"
            )
        return self.network(torch.cat([x, condition], dim=1), t, self.prompt.expand(len(x), -1, -1))


def widened_convolution(conv: nn.Conv2d, *, inputs: int = 0, outputs: int = 0, at: int | None = None) -> nn.Conv2d:
    """A copy of a trained network's first or last convolution with further channels, whose weights start at 0.

    TPD's from Stable Diffusion's inpainting network of 9 channels: first 1 input at 4, for the noisy mask, and 8 at
    the end, for two pose maps; last 1 output.

    Args:
        conv: without groups.
        inputs: how many input channels to add.
        outputs: how many output channels to add, behind the others.
        at: the position of the first new input channel; None is the end.

    Raises:
        ValueError: grouped convolutions, numbers below 0, or a position beyond the end.

    >>> import torch
    >>> wide = widened_convolution(torch.nn.Conv2d(9, 16, 3), inputs=1, at=4)
    >>> wide.in_channels, wide.weight[:, 4].abs().max().item()
    (10, 0.0)
    """
    require.whole("inputs", inputs)
    require.whole("outputs", outputs)
    at = conv.in_channels if at is None else at
    require.whole("at", at, at_most=conv.in_channels)
    if conv.groups != 1:
        raise ValueError(f"conv: expected one group, got {conv.groups}")
    weight = conv.weight.detach()
    blank = weight.new_zeros(len(weight), inputs, *weight.shape[2:])
    weight = torch.cat([weight[:, :at], blank, weight[:, at:]], dim=1)
    weight = torch.cat([weight, weight.new_zeros(outputs, *weight.shape[1:])])
    wide = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,
        dilation=conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    wide.weight = nn.Parameter(weight)
    if conv.bias is not None:
        wide.bias = nn.Parameter(torch.cat([conv.bias.detach(), weight.new_zeros(outputs)]))
    return wide


def decoupled_mask_prediction(
    predicted: Float[Tensor, "batch 1 height wide"], worn: Mask, *, threshold: float = 0.5, dilation: int = 10
) -> Mask:
    """The mask of the second pass, 0 where it repaints: where the new garment will be, and where the old one is.

    The predicted mask's largest hole, of pixels below the threshold that touch by their sides, is dilated, and joined
    with what the person wears. Without a hole only the latter is repainted.

    Args:
        predicted: the mask channel that the first pass has drawn; only its left half, beside the garment, counts.
        worn: 0 where the person's own garment is, 1 elsewhere.
        threshold: below it a pixel is repainted.
        dilation: pixels by which the hole grows on every side; 10 in the paper, at a height of 512.

    Raises:
        ValueError: sizes that do not fit, or a dilation below 0.

    >>> import torch
    >>> decoupled_mask_prediction(torch.tensor([[[[1.0, 0.1, 0.9, 1, 0, 1]]]]), torch.ones(1, 1, 1, 3), dilation=0)
    tensor([[[[1., 0., 1.]]]])
    """
    from scipy.ndimage import label

    require.floating("worn", worn, dims=4)
    require.same_shape("predicted", predicted, (len(worn), 1, worn.shape[2], 2 * worn.shape[3]))
    require.whole("dilation", dilation)
    holes = torch.zeros_like(worn)
    for hole, picture in zip(holes, predicted[..., : worn.shape[3]]):
        below = (picture < threshold).cpu().numpy()
        regions, found = label(below)
        if found:
            sizes = torch.from_numpy(regions).flatten().bincount(minlength=found + 1)
            hole.copy_(torch.from_numpy(regions == int(sizes[1:].argmax()) + 1))
    grown = F.max_pool2d(holes, 2 * dilation + 1, stride=1, padding=dilation)
    return (1 - grown) * worn


def _beside(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, right], dim=-1)


def _fit(picture: Tensor, garment: Tensor, mask: Tensor, name: str) -> None:
    require.floating("person" if name == "worn" else "kept", picture, dims=4)
    require.same_shape("garment", garment, tuple(picture.shape))
    require.same_shape(name, mask, (len(picture), 1, *picture.shape[-2:]))
