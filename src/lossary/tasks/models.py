"""Small models. Dense ones are stacked: one weight tensor holds the layer of every seed, S in front.

Stacking pays for small dense models only. Convolutions run faster one seed after another: see `per_seed`.
"""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Generator, Tensor, nn

from lossary import require
from lossary.tasks import task
from lossary.tasks.seeds import Seeds

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


L = TypeVar("L", nn.Linear, nn.Conv2d)


def _drawn(meta: L, generator: Generator) -> L:
    """The layer with the weights that torch would have given it, had its global stream been `generator`."""
    layer = meta.to_empty(device="cpu")
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(layer.weight[0].numel())
    nn.init.uniform_(cast(Tensor, layer.bias), -bound, bound, generator=generator)
    return layer


class StackedLinear(nn.Module):
    """S linear layers side by side: (S, batch, in) to (S, batch, out).

    `weight` (S, out, in) and `bias` (S, out) of replica s are what `torch.nn.Linear` would have drawn from
    the generator s: both uniform within 1 / sqrt(in).

    Args:
        in_features, out_features: widths.
        generators: one for each replica.
    """

    def __init__(self, in_features: int, out_features: int, *, generators: Sequence[Generator]) -> None:
        super().__init__()
        layers = [_drawn(nn.Linear(in_features, out_features, device="meta"), g) for g in generators]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, input: Tensor) -> Tensor:
        # Weight first: its gradient then comes out in the weight's own layout, which saves a copy in each step.
        return torch.baddbmm(self.bias.unsqueeze(2), self.weight, input.mT).mT

    def replica(self, s: int) -> nn.Linear:
        """A copy of layer s, as it now is."""
        _, out_features, in_features = self.weight.shape
        layer = nn.Linear(in_features, out_features, device="meta", dtype=self.weight.dtype)
        layer = layer.to_empty(device=self.weight.device)
        with torch.no_grad():
            layer.weight.copy_(self.weight[s])
            layer.bias.copy_(self.bias[s])
        return layer

    def extra_repr(self) -> str:
        stack, out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, stack={stack}"


class StackedMLP(nn.Sequential):
    """Stacked linear layers with activations between: (S, batch, d) to (S, batch, k), contiguous."""

    def forward(self, input: Tensor) -> Tensor:
        for module in self:
            input = module(input)
        return input.contiguous()

    def replica(self, s: int) -> nn.Sequential:
        """A plain copy of the model of the seed at position s, as it now is: (batch, d) to (batch, k)."""
        return nn.Sequential(*(m.replica(s) if isinstance(m, StackedLinear) else copy.deepcopy(m) for m in self))


@task(version=1)
def stacked_mlp(sizes: Sequence[int], seeds: Seeds, *, activation: str = "relu") -> StackedMLP:
    """A multilayer perceptron for every seed, in one module.

    Args:
        sizes: widths from input to output, at least two.
        seeds: stream "init".
        activation: between the layers: "relu", "gelu", "silu" or "tanh".

    Raises:
        ValueError: `sizes` or `activation` outside these.
    """
    require.one_of("activation", activation, ACTIVATIONS)
    if len(sizes) < 2:
        raise ValueError(f"sizes: expected at least two widths, got {tuple(sizes)}")
    generators = seeds.torch("init")
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [StackedLinear(wide, narrow, generators=generators), ACTIVATIONS[activation]()]
    return StackedMLP(*layers[:-1])


@task(version=1)
def small_cnn(
    classes: int, *, generator: Generator, channels: tuple[int, int] = (16, 32), colours: int = 1
) -> nn.Sequential:
    """A plain convolutional network for one seed: (batch, colours, h, w), h and w from 8 to 32, to (batch, classes).

    Twice a 3x3 convolution, ReLU and 2x2 max-pooling, then averages over 2x2 regions and a linear layer.

    Args:
        classes: width of the output.
        generator: of the initial weights, drawn as torch's layers would.
        channels: of the two convolutions.
        colours: channels of the pictures.
    """
    first, second = channels
    return nn.Sequential(
        _drawn(nn.Conv2d(colours, first, 3, padding=1, device="meta"), generator),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _drawn(nn.Conv2d(first, second, 3, padding=1, device="meta"), generator),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        _drawn(nn.Linear(4 * second, classes, device="meta"), generator),
    )
