"""Compressed co-teaching: two networks that keep only their first few features teach each other past wrong labels.

Nested dropout sets all but the first k of a network's last features to zero, k drawn anew for every batch. Early
features are kept more often, so they learn what matters most, and there is less room to memorise wrong labels.
Two such networks are then trained together: each picks the samples of a batch on which its loss is small, which
are likely to be right, and the other learns from these alone. Use it where a known share of the labels, up to
about half, is wrong. It costs two networks and four forward passes a step, and it slights samples that are
rare or hard as well as those that are wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from lossary import require
from lossary.losses._modes import evaluating
from lossary.paper import Paper
from lossary.roles import Procedure, layer, procedure
from lossary.vocabulary import fill

PAPER = Paper(
    title="Compressing Features for Learning with Noisy Labels",
    year=2022,
    helps=("label-noise",),
    departs=(
        "both networks see the whole batch, as in Co-teaching; the official code gives each a half",
        "each network draws a k of its own; the official code draws one for both",
        "the claims train both networks from scratch; the paper first trains each alone",
        "k for evaluation is 2 sigma or the caller's choice; the official code takes the best on clean validation data",
        "no convolutional form (the paper's VGG-19 has nested dropout in two layers)",
    ),
    equation=(
        r"\begin{aligned} "
        r"z&\to(z_1,\dots,z_k,0,\dots,0),\qquad\Pr(k)\propto e^{-k^2/\sigma^2},\quad k=1,\dots,K\\ "
        r"L&=\frac1{|S_2|}\sum_{i\in S_2}\ell_1(x_i,y_i)+\frac1{|S_1|}\sum_{i\in S_1}\ell_2(x_i,y_i),\qquad "
        r"S_m:\ \text{those of least }\ell_m\text{ in the batch} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2206.13140",
)


@layer(random=True, examples=({"sigma": 1.0}, {"sigma": 100.0}), tune={"sigma": (3.0, 10.0, 30.0, 100.0)})
class NestedDropout(nn.Module):
    """Keep the first k features and set the others to zero. Nothing is rescaled.

    In training k is drawn from 1 to K with probability proportional to exp(-(k / sigma)^2), once for a batch
    (*replicas, batch, K), for each replica its own. In evaluation k is ceil(2 sigma), since training hardly ever
    shows later features (in one batch of 200), or what `truncate` says.

    Args:
        sigma: spread of k, > 0, in features: 100 on Clothing1M and ANIMAL-10N, 10 on CIFAR-10, there of K = 512.
        generator: draws k; a sequence has one for each replica; None is torch's global one, as for
            `torch.nn.Dropout`.

    Attributes:
        keep: k in evaluation; a buffer.

    Raises:
        ValueError: sigma <= 0, or an input without a batch dimension.

    >>> nested = NestedDropout(sigma=2.0, generator=torch.Generator().manual_seed(0))
    >>> nested(torch.ones(2, 5))
    tensor([[1., 1., 0., 0., 0.],
            [1., 1., 0., 0., 0.]])
    >>> nested.truncate(3).eval()(torch.ones(1, 5))
    tensor([[1., 1., 1., 0., 0.]])
    """

    def __init__(self, *, sigma: float = 100.0, generator: Generator | Sequence[Generator] | None = None) -> None:
        super().__init__()
        if isinstance(sigma, Tensor):
            raise ValueError("sigma: expected a number, got a tensor; what is drawn passes no gradient back to it")
        require.number("sigma", sigma, above=0.0)
        self.sigma, self.generator = sigma, generator
        self.register_buffer("keep", torch.tensor(math.ceil(2 * sigma)))

    def truncate(self, k: int) -> "NestedDropout":
        """Keep the first k features in evaluation; where there are validation data, choose k on them."""
        require.whole("k", k, at_least=1)
        self.keep.fill_(k)
        return self

    def forward(self, input: Float[Tensor, "*replicas batch features"]) -> Float[Tensor, "*replicas batch features"]:
        """Cut the input."""
        require.floating("input", input, at_least_dims=2)
        k = self._drawn(input) if self.training else self.keep
        return input * (_numbers(input.shape[-1], input.device) <= k)

    def _drawn(self, input: Tensor) -> Tensor:
        replicas = input.shape[:-2]
        generators = self.generator if isinstance(self.generator, Sequence) else [self.generator]
        device = input.device if generators[0] is None else generators[0].device
        chance = (_numbers(input.shape[-1], device) / self.sigma).square().neg().softmax(0)
        draws = math.prod(replicas) // len(generators)
        place = torch.cat([chance.multinomial(draws, replacement=True, generator=g) for g in generators])
        return 1 + place.view(*replicas, 1, 1).to(input.device)


@procedure(
    on="classes",
    examples=({"sigma": 3.0}, {"sigma": 3.0, "label_noise": 0.4, "gradual": 10}),
    tune={"sigma": (3.0, 10.0, 30.0, 100.0), "gradual": (0, 200)},
)
class CompressedCoTeaching(Procedure):
    """Two networks with nested dropout, each trained on the samples of a batch on which the other's loss is small.

    Of each batch a network picks the int((1 - forget) * batch) samples with the smallest loss, computed in
    evaluation mode; forget grows linearly from 0 to label_noise over the first `gradual` steps. The networks are
    one player, "networks", since both pick before either moves. The objective of a sample is its two losses,
    each times batch / picked where the other network picked the sample and 0 elsewhere. The output is the mean
    of both networks' logits.

    The paper trains each network alone first and then lets them teach each other (gradual=0). Without
    `NestedDropout` in the networks this is Co-teaching (Han et al., 2018).

    Args:
        first: a network with a `NestedDropout` before its last layer, (*replicas, batch, ...) to logits.
        second: another, initialised differently.
        loss: loss(input, target) gives the values (*replicas, batch).
        label_noise: tau, share of wrong labels, 0 <= tau < 1.
        gradual: T_k, steps until the whole share is forgotten.

    Raises:
        ValueError: a hyper-parameter out of range.

    >>> from functools import partial
    >>> from lossary.roles import advance
    >>> def network():
    ...     return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), NestedDropout(sigma=10.0), nn.Linear(32, 3))
    >>> cross_entropy = partial(nn.functional.cross_entropy, reduction="none")
    >>> pair = CompressedCoTeaching(network(), network(), cross_entropy, label_noise=0.3)
    >>> optimizers = {"networks": torch.optim.SGD(pair.parameters(), lr=0.1)}
    >>> x, y = torch.zeros(8, 6), torch.zeros(8, dtype=torch.int64)
    >>> for step in range(2):
    ...     means = advance(pair, (x, y), optimizers, step=step)
    >>> pair.eval()(x).shape
    torch.Size([8, 3])
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        label_noise: float,
        gradual: int = 0,
    ) -> None:
        super().__init__()
        require.number("label_noise", label_noise, at_least=0.0, below=1.0)
        require.whole("gradual", gradual)
        self.networks = nn.ModuleList([first, second])
        self.loss, self.label_noise, self.gradual = loss, label_noise, gradual

    @classmethod
    def build(
        cls,
        model: Callable[[str], nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        profile: Mapping[str, Any],
        *,
        sigma: float = 100.0,
        **hyper: Any,
    ) -> "CompressedCoTeaching":
        """From networks that are `torch.nn.Sequential`: nested dropout goes in before their last layer."""

        def compressed(name: str) -> nn.Module:
            network = model(name)
            if not isinstance(network, nn.Sequential):
                raise ValueError(f"model: expected torch.nn.Sequential networks, got {type(network).__name__}")
            *features, classifier = network
            return nn.Sequential(*features, NestedDropout(sigma=sigma), classifier)

        return cls(compressed("first"), compressed("second"), loss, **{**fill(cls, profile), **hyper})

    def players(self) -> Mapping[str, nn.Module]:
        return {"networks": self.networks}

    def objective(
        self,
        player: str,
        batch: tuple[Tensor, Tensor],
        *,
        step: int,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Float[Tensor, "*replicas batch"]:
        x, y = batch
        if generator is not None:
            for module in self.modules():
                if isinstance(module, NestedDropout):
                    module.generator = generator
        first, second = self.networks
        for_second, for_first = (self._picked(teacher, x, y, step) for teacher in self.networks)
        return for_first * self.loss(first(x), y) + for_second * self.loss(second(x), y)

    def forward(self, x: Tensor) -> Tensor:
        """Mean of the two networks' logits."""
        first, second = self.networks
        return (first(x) + second(x)) / 2

    @torch.no_grad()
    def _picked(self, teacher: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
        """batch / picked for the samples that the teacher picks, 0 for the others: (*replicas, batch)."""
        with evaluating(teacher):
            values = self.loss(teacher(x), y)
        forget = self.label_noise * (min(1.0, step / self.gradual) if self.gradual else 1.0)
        batch = values.shape[-1]
        picked = max(1, int((1 - forget) * batch))
        smallest = values.topk(picked, largest=False).indices
        return torch.zeros_like(values).scatter(-1, smallest, batch / picked)


def _numbers(features: int, device: torch.device) -> Tensor:
    return torch.arange(1, features + 1, device=device)
