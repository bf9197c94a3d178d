"""Skip-Tuning: turn the skips of a trained U-Net down a little, the deepest most, and few steps give better samples.

A U-Net's decoder sees what the encoder saw through concatenated skips, which keep it near a simple map of its input.
With few steps of sampling the network has to do more than that; factors below 1 on the skips, before the norm that
follows, shift weight to the deep path. The denoising error in pixels rises, that in features is said to fall, at
intermediate noise above all. No training: one number to search, the deepest factor, 0.5 to 0.95, nearer to 1 the more
steps. For U-Nets with concatenated skips; nothing to tune in transformers without them.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.paper import Paper

PAPER = Paper(
    title="The Surprising Effectiveness of Skip-Tuning in Diffusion Sampling",
    year=2024,
    helps=("slow-sampling",),
    departs=(
        "factors are linear in the number of the join, from the deepest to the last, not in its resolution",
        "no search: the factor is chosen by the caller, by the distance of samples or the error in features",
    ),
    equation=(
        r"h\leftarrow\bigl[h_{\mathrm{up}},\;\rho_i\,h_{\mathrm{skip}}\bigr],\qquad "
        r"\rho_i=\rho_{\mathrm{bottom}}+\frac{i}{n-1}\,(\rho_{\mathrm{top}}-\rho_{\mathrm{bottom}})"
    ),
    url="https://arxiv.org/abs/2402.15170",
)


def set_skip_scale(module: nn.Module, skip_channels: int, rho: float) -> RemovableHandle:
    """Multiply the last `skip_channels` channels (dimension 1) of the module's first input by rho, until removed.

    Args:
        module: takes what comes from below with the skip concatenated behind it.
        skip_channels: how many channels are the skip.
        rho: factor, 1 for none.

    Returns:
        The hook's handle: `handle.remove()`.

    Raises:
        ValueError: numbers out of range; in the call, an input given by keyword, or without that many channels and
            one more.

    >>> block = nn.Identity()
    >>> handle = set_skip_scale(block, 2, 0.5)
    >>> block(torch.ones(1, 3))
    tensor([[1.0000, 0.5000, 0.5000]])
    >>> handle.remove()
    """
    require.whole("skip_channels", skip_channels, at_least=1)
    require.number("rho", rho, at_least=0.0)

    def scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise ValueError("input: expected as the module's first positional argument, got keywords only")
        x, *rest = args
        require.floating("input", x, at_least_dims=2)
        if x.shape[1] <= skip_channels:
            raise ValueError(f"input: expected more than {skip_channels} channels, got shape {tuple(x.shape)}")
        below, skip = x[:, :-skip_channels], x[:, -skip_channels:]
        return (torch.cat([below, rho * skip], dim=1), *rest)

    return module.register_forward_pre_hook(scale)


class SkipTuning:
    """A context in which the skips of a U-Net are scaled, and by `denoiser` a network that is so at some noise levels.

    Args:
        joins: (module, skip channels) from the deepest to the last, or a U-Net of `diffusers` as it is
            (`UNet2DModel`, `UNet2DConditionModel` and their kin).
        bottom: rho of the deepest join.
        top: rho of the last one.

    Raises:
        ValueError: no join, a network where none are found, or a factor below 0.

    >>> one, two = nn.Identity(), nn.Identity()
    >>> with SkipTuning([(one, 1), (two, 1)], bottom=0.5):
    ...     one(torch.ones(1, 2)), two(torch.ones(1, 2))
    (tensor([[1.0000, 0.5000]]), tensor([[1., 1.]]))
    >>> one(torch.ones(1, 2))
    tensor([[1., 1.]])
    """

    def __init__(
        self, joins: nn.Module | Sequence[tuple[nn.Module, int]], *, bottom: float = 0.8, top: float = 1.0
    ) -> None:
        require.number("bottom", bottom, at_least=0.0)
        require.number("top", top, at_least=0.0)
        self.joins = _joins(joins) if isinstance(joins, nn.Module) else list(joins)
        if not self.joins:
            raise ValueError("joins: expected at least one, got none")
        last = max(len(self.joins) - 1, 1)
        self.factors = [bottom + i / last * (top - bottom) for i in range(len(self.joins))]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        if self._handles:
            raise ValueError("SkipTuning: expected to be entered once at a time")
        for (module, channels), rho in zip(self.joins, self.factors):
            self._handles.append(set_skip_scale(module, channels, rho))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def denoiser(self, denoise: Denoise, *, between: tuple[float, float] | None = None) -> Denoise:
        """denoise(x, sigma, ...) with scaled skips at noise levels from between[0] to between[1], None for all.

        Args:
            denoise: calls the network to which the joins belong.
            between: the levels, rising; where one batch has several, all must lie between.

        Raises:
            ValueError: levels that do not rise.
        """
        if between is not None:
            require.number("between[0]", between[0], below=between[1])

        def tuned(x: Tensor, sigma: Float[Tensor, "*batch"] | float, *conditions: Any, **named: Any) -> Tensor:
            level = torch.as_tensor(sigma)
            if between is not None and not bool(((level >= between[0]) & (level <= between[1])).all()):
                return denoise(x, sigma, *conditions, **named)
            with self:
                return denoise(x, sigma, *conditions, **named)

        return tuned


def _joins(unet: nn.Module) -> list[tuple[nn.Module, int]]:
    """Those of a U-Net of `diffusers`: every residual block of `up_blocks` takes as a skip what is not from below."""
    middle, ups = getattr(unet, "mid_block", None), getattr(unet, "up_blocks", None)
    if middle is None or ups is None or not all(hasattr(block, "resnets") for block in (middle, *ups)):
        raise ValueError(f"joins: expected a U-Net with mid_block and up_blocks of resnets, got {type(unet).__name__}")
    joins, below = [], middle.resnets[-1].out_channels
    for block in ups:
        for resnet in block.resnets:
            joins.append((resnet, resnet.in_channels - below))
            below = resnet.out_channels
    return joins
