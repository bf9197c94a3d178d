"""Virtual adversarial training: let no small step of an input change what the network says about it.

The step is the worst one of a given length, found without labels: along the direction in which the predicted
distribution changes fastest, the top eigenvector of its Fisher information in the input, by one power iteration. So
inputs without labels train the network as well as others do, and that is its use: a few labels, many inputs. With all
labels known it is a mild regulariser. The length epsilon is the one number to tune, in the units of the inputs; it
should be smaller than the distance between inputs of different classes. The price is two more forward and backward
passes, three where the clean logits are not at hand. Where clusters follow the classes, add `conditional_entropy_loss`
on the unlabelled inputs, as the paper's best results do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lossary import require
from lossary.paper import Paper
from lossary.roles import penalty

PAPER = Paper(
    title="Virtual Adversarial Training: A Regularization Method for Supervised and Semi-Supervised Learning",
    year=2018,
    helps=("few-labels", "missing-labels", "overfitting"),
    departs=(
        "xi is 0.1 where the paper and its code have 1e-6, at which single precision drowns the direction in rounding",
        "the constants that keep norms from 0 are gone: a gradient of 0 gives a direction of 0",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell(x)&=\operatorname{KL}\bigl(p(\cdot\mid x)\,\|\,p(\cdot\mid x+\epsilon d)\bigr),\qquad "
        r"d=g/\lVert g\rVert\\ "
        r"g&=\nabla_r\operatorname{KL}\bigl(p(\cdot\mid x)\,\|\,p(\cdot\mid x+r)\bigr)\Big|_{r=\xi d_0}, "
        r"\qquad d_0\text{ random, of length 1} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/1704.03976",
)


@penalty(
    on="module",
    examples=({"epsilon": 0.5}, {"epsilon": 1.0, "steps": 2}),
    tune={"epsilon": (0.3, 1.0, 3.0)},
    xfail={
        "gradient": "p(x) and the direction are held fixed, which finite differences do not do",
        "order_free": "each row's first direction is drawn in the order of the batch",
    },
)
class VATLoss(nn.Module):
    """`vat_loss` with its settings: called as loss(model, x), labelled and unlabelled inputs alike.

        vat = VATLoss(epsilon=2.0, generator=torch.Generator().manual_seed(0))
        loss = F.cross_entropy(model(x), y) + vat(model, torch.cat([x, unlabelled]))

    Args:
        epsilon, xi, steps: as in `vat_loss`.
        generator: of the first directions; a sequence makes a stack, one replica for each in x's leading dimension,
            and each replica has its own mean or sum. None is a generator with seed 0.
        reduction: "mean", "sum" or "none", which leaves one value for each input.

    Raises:
        ValueError: what `vat_loss` raises, an unknown reduction.

    >>> model = nn.Linear(4, 3)
    >>> vat = VATLoss(epsilon=0.5, generator=torch.Generator().manual_seed(0))
    >>> vat(model, torch.zeros(6, 4)).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        epsilon: float,
        generator: Generator | Sequence[Generator] | None = None,
        xi: float = 0.1,
        steps: int = 1,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check("epsilon", epsilon)
        _check("xi", xi)
        require.whole("steps", steps)
        require.one_of("reduction", reduction, ("mean", "sum", "none"))
        self.generator = Generator().manual_seed(0) if generator is None else generator
        self.epsilon, self.xi, self.steps, self.reduction = epsilon, xi, steps, reduction

    def forward(
        self, model: Callable[[Tensor], Tensor], x: Float[Tensor, "*inputs"], *, logits: Tensor | None = None
    ) -> Tensor:
        """The loss of a model at inputs."""
        values = vat_loss(
            model, x, epsilon=self.epsilon, generator=self.generator, xi=self.xi, steps=self.steps, logits=logits
        )
        if self.reduction == "none":
            return values
        replicas = () if isinstance(self.generator, Generator) else (len(values),)
        values = values.reshape(*replicas, -1)
        return values.mean(-1) if self.reduction == "mean" else values.sum(-1)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, xi={self.xi}, steps={self.steps}, reduction={self.reduction!r}"


def vat_loss(
    model: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*inputs"],
    *,
    epsilon: float,
    generator: Generator | Sequence[Generator],
    xi: float = 0.1,
    steps: int = 1,
    logits: Float[Tensor, "*batch classes"] | None = None,
) -> Float[Tensor, "*batch"]:
    """KL(p(x) || p(x + epsilon d)) with d of `virtual_adversarial_direction`, eq. 5. In nats, one for each input.

    The gradient reaches the model through the second distribution alone: p(x) and d are held fixed, so finite
    differences of the value do not give it.

    Args:
        model: inputs (*batch, ...) to logits (*batch, classes), in whatever mode it is.
        x: inputs.
        epsilon: length of the step, at least 0, in units of x.
        generator, xi, steps: as in `virtual_adversarial_direction`.
        logits: the model's at x, where they are at hand; None computes them.

    Raises:
        ValueError: an argument out of range, of the wrong dtype or shape.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))  # logits x and -x, p(0) = 1/2
    >>> vat_loss(model, torch.zeros(1, 1), epsilon=1.0, generator=torch.Generator().manual_seed(0))  # log cosh 1
    tensor([0.4338], grad_fn=<SumBackward1>)
    """
    _check("epsilon", epsilon)
    with _still(model):
        clean = _clean(model, x, logits)
        direction = virtual_adversarial_direction(model, x, generator=generator, xi=xi, steps=steps, logits=clean)
        return _divergence(clean, model(x + epsilon * direction))


def virtual_adversarial_direction(
    model: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*inputs"],
    *,
    generator: Generator | Sequence[Generator],
    xi: float = 0.1,
    steps: int = 1,
    logits: Float[Tensor, "*batch classes"] | None = None,
) -> Float[Tensor, "*inputs"]:
    """For each input the direction, of length 1, in which the model's distribution changes fastest, to second order.

    Power iteration from a random direction: d <- g / |g| with g the gradient of KL(p(x) || p(x + r)) by r at r = xi d,
    which is xi H d up to O(xi^2), H being the Fisher information J^T (diag p - p p^T) J of the logits' Jacobian J. An
    input where g is 0 gets a direction of 0. Running statistics of batch-norm layers do not move, the model keeps its
    mode, and no gradients stay on its parameters. Dropout draws anew in each pass, which disturbs the direction.

    Args:
        model: inputs (*batch, ...) to logits (*batch, classes), in whatever mode it is.
        x: inputs; the dimensions beyond those of the logits' batch are one input's.
        generator: of the first directions; a sequence has one for each replica in x's leading dimension.
        xi: above 0, in units of x: small beside the scale at which the model bends, large beside rounding. Cosine with
            the exact direction in single precision, for a digit classifier with pixels from 0 to 1, mean: 0.64 at 1e-6,
            0.97 at 1e-3, 0.99 at 0.1, 0.93 at 1.
        steps: K power iterations, each a forward and a backward pass; 0 leaves the direction random.
        logits: the model's at x, where they are at hand; None computes them.

    Raises:
        ValueError: an argument out of range, of the wrong dtype or shape.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # the second input does nothing
    >>> virtual_adversarial_direction(model, torch.zeros(1, 2), generator=torch.Generator().manual_seed(0)).abs()
    tensor([[1., 0.]])
    """
    require.floating("x", x, at_least_dims=1)
    _check("xi", xi, above=0.0)
    require.whole("steps", steps)
    with _still(model), torch.enable_grad():
        clean = _clean(model, x, logits)
        direction = _unit(_noise(x, generator), clean.ndim - 1)
        for _ in range(steps):
            step = (xi * direction).requires_grad_()
            (gradient,) = torch.autograd.grad(_divergence(clean, model(x.detach() + step)).sum(), step)
            direction = _unit(gradient, clean.ndim - 1)
    return direction


def conditional_entropy_loss(input: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Entropy of softmax(input), eq. 11: -sum over classes of p log p, in nats, per sample.

    Added to the loss of unlabelled inputs it asks for confident predictions, whichever they are.

    Args:
        input: logits, two classes at least.

    Raises:
        ValueError: an input that is not floating-point, or of fewer than two classes.

    >>> conditional_entropy_loss(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))  # log 2, and at p = 0.12
    tensor([0.6931, 0.3653])
    """
    require.floating("input", input, at_least_dims=1)
    if input.shape[-1] < 2:
        raise ValueError(f"input: expected at least two classes in the last dimension, got shape {tuple(input.shape)}")
    log_p = input.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _clean(model: Callable[[Tensor], Tensor], x: Tensor, logits: Tensor | None) -> Tensor:
    """The logits at x, without a graph."""
    if not callable(model):
        raise ValueError(f"model: expected something to call on inputs, got a {type(model).__name__}")
    require.floating("x", x, at_least_dims=1)
    if logits is None:
        with torch.no_grad():
            logits = model(x)
    require.floating("logits", logits, at_least_dims=1)
    batch = logits.shape[:-1]
    if len(batch) >= x.ndim or batch != x.shape[: len(batch)]:
        raise ValueError(
            f"logits: expected one row for each input of x {tuple(x.shape)}, classes last, got {tuple(logits.shape)}"
        )
    return logits.detach()


def _divergence(clean: Tensor, logits: Tensor) -> Tensor:
    log_p = clean.log_softmax(-1)
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def _noise(x: Tensor, generator: Generator | Sequence[Generator]) -> Tensor:
    """Standard normal numbers in the shape of x, drawn in single precision whatever its dtype."""
    if isinstance(generator, Generator):
        return torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    if len(generator) != len(x):
        raise ValueError(f"generator: expected one for each of {len(x)} replicas, got {len(generator)}")
    return torch.stack([torch.randn(x.shape[1:], generator=g, device=g.device) for g in generator]).to(x)


def _unit(vector: Tensor, batch_dims: int) -> Tensor:
    """The vectors divided by their lengths, where an input takes up the dimensions from `batch_dims` on; 0 stays 0."""
    rows = vector.flatten(batch_dims)
    rows = rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)  # squares underflow
    return nn.functional.normalize(rows, dim=-1).view(vector.shape)


@contextmanager
def _still(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Running statistics stay as they are for a while; batches are normalised as the model's mode says."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    paused = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in paused:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in paused:
            module.track_running_stats = True


def _check(name: str, value: float, above: float | None = None) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor, which would get no gradient")
    require.number(name, value, at_least=0.0) if above is None else require.number(name, value, above=above)
