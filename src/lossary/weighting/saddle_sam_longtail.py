"""Saddle points on the long tail: see them in the Hessian of every class's loss, and leave them with SAM.

Networks trained with re-weighting fit their rare classes, and yet the loss of such a class has directions of strong
negative curvature where the network ends: for the class that point is a saddle. `classwise_hessian_spectrum` shows it,
`saddle_index_by_class` puts it in a number. The remedy is `lossary.optim.SAM` on the re-weighted loss, with a radius
rho of 0.2 to 0.8, far above the usual 0.05. Re-weighting is deferred to the last fifth of training
(`DeferredReweighting`), and where the networks are large rho rises with it: set `group["rho"]` of SAM's groups, for
instance 0.05, 0.1, then 0.5. Try it on imbalanced data when re-weighting alone leaves rare classes behind; it costs
two gradients a step. A diagnosis needs a Hessian-vector product for each class and step of Lanczos.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.losses._modes import evaluating
from lossary.paper import Paper
from lossary.roles import measure, weighting
from lossary.weighting.class_balanced_loss_aradic import class_balanced_weights

PAPER = Paper(
    title="Escaping Saddle Points for Effective Generalization on Class-Imbalanced Data",
    year=2022,
    helps=("class-imbalance",),
    departs=(
        "re-weighted losses are divided by the batch size; the official code divides by the sum of the weights",
        "SAM is that of lossary.optim; a schedule of its rho is the caller's",
        "the saddle index, |lambda_min / lambda_max| in the paper, is 0 where lambda_min is positive",
        "PGD and LPF-SGD, the escapes that the paper compares with, are left out",
    ),
    equation=(
        r"\begin{aligned} "
        r"&\min_\theta\max_{\lVert\epsilon\rVert\le\rho}\ \frac1n\sum_i w_{y_i}\,\ell_i(\theta+\epsilon),\qquad "
        r"w_c\propto\frac{1-\beta}{1-\beta^{n_c}}\text{ at the end of training}\\ "
        r"&\text{saddle}_c=\frac{\max(0,-\lambda_{\min}(H_c))}{\max(0,\lambda_{\max}(H_c))},\qquad "
        r"H_c=\nabla^2_\theta\,\frac1{n_c}\sum_{i:\,y_i=c}\ell_i(\theta) "
        r"\end{aligned}"
    ),
    url="http://arxiv.org/abs/2212.13827",
)


_cross_entropy = partial(F.cross_entropy, reduction="none")


@weighting(examples=({"epochs": 1}, {"epochs": 2, "delta": 0.0, "beta": 0.99}), tune={"beta": (0.9, 0.99, 0.9999)})
class DeferredReweighting(nn.Module):
    """Weight 1 at first, class-balanced weights for the end of the training (DRW of Cao et al., 2019).

    The weights count from the batch with which delta * epochs passes over the data have been seen: features are learned
    on the data as they come, and what follows, usually at a lower learning rate, settles the classes' shares. Every
    call in training mode counts its batch as seen, times the number of processes under `torch.distributed`. An
    optimizer that evaluates twice a step, such as SAM, sees every sample twice: give it twice the epochs.

    Args:
        class_counts: training rows of each class, (classes,).
        epochs: length of the training, in passes over the data.
        delta: share of it before re-weighting, 0 to 1; 0.8 in the paper.
        beta: of the effective numbers, as in `class_balanced_weights`; 0 to 1.

    Attributes:
        seen: samples so far; a buffer.

    Raises:
        ValueError: a number out of range; losses or labels that do not fit.

    >>> deferred = DeferredReweighting((3, 1), epochs=1, delta=0.5, beta=1.0)
    >>> losses, target = torch.ones(2), torch.tensor([0, 1])
    >>> deferred(losses, target=target), deferred(losses, target=target)  # 0 of 4, then 2 of 4 seen before
    (tensor([1., 1.]), tensor([0.5000, 1.5000]))
    """

    def __init__(self, class_counts: Sequence[int], *, epochs: int, delta: float = 0.8, beta: float = 0.9999) -> None:
        super().__init__()
        require.whole("epochs", epochs, at_least=1)
        for name, value in (("delta", delta), ("beta", beta)):
            if isinstance(value, Tensor):
                raise ValueError(f"{name}: expected a number, got a tensor; the weights pass no gradient back to it")
        require.number("delta", delta, at_least=0.0, at_most=1.0)
        every = torch.arange(len(class_counts))
        weights = class_balanced_weights(torch.ones(len(every)), target=every, class_counts=class_counts, beta=beta)
        self.deferred = delta * epochs * sum(class_counts)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self, losses: Float[Tensor, "*replicas batch"], *, target: Int[Tensor, "*replicas batch"]
    ) -> Float[Tensor, "*replicas batch"]:
        """Weigh a batch."""
        require.floating("losses", losses, at_least_dims=1)
        require.integers("target", target, shape=losses.shape)
        begun = self.seen >= self.deferred
        if self.training:
            processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            self.seen += losses.shape[-1] * processes
        return torch.where(begun, self.weights[target], 1.0).to(losses.dtype)


def classwise_hessian_spectrum(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    *,
    num_classes: int,
    generator: Generator,
    loss: Callable[[Tensor, Tensor], Tensor] = _cross_entropy,
    iterations: int = 100,
    draws: int = 1,
) -> tuple[Float[Tensor, "classes draws iterations"], Float[Tensor, "classes draws iterations"]]:
    """Spectrum of the Hessian of each class's mean loss, by stochastic Lanczos quadrature: eigenvalues and weights.

    The weights of a draw add up to 1, and the sum of weight * f(eigenvalue) estimates the mean of f over all of the
    Hessian's eigenvalues; it is exact for one draw on average, so draws are averaged. The smallest and largest values
    converge to the extreme eigenvalues from inside. With as many iterations as parameters they are the eigenvalues.
    Every iteration is a Hessian-vector product over all rows of the class, and Lanczos vectors are kept and made
    orthogonal anew: iterations * parameters numbers.

    Args:
        model: gives logits; it runs in evaluation mode, as it is deployed, and is left as it was.
        x: rows; training rows in the paper.
        y: their class numbers, 0 to num_classes - 1.
        num_classes: those that do not occur in y get NaN eigenvalues and weights 0.
        generator: of the random directions, independent signs.
        loss: loss(logits, y) gives values (batch,), twice differentiable.
        iterations: of Lanczos; more than there are parameters are cut to their number.
        draws: random directions for each class.

    Returns:
        Eigenvalues in ascending order, float64, and their weights.

    Raises:
        ValueError: a number out of range, or shapes that do not fit.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> x, y, g = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]), torch.Generator().manual_seed(0)
    >>> eigenvalues, _ = classwise_hessian_spectrum(model, x, y, num_classes=2, generator=g)
    >>> eigenvalues[:, 0]  # x^2 (diag p - p p^T) with p = (1/2, 1/2)
    tensor([[0.0000, 0.5000],
            [0.0000, 4.5000]], dtype=torch.float64)
    """
    for name, value in (("num_classes", num_classes), ("iterations", iterations), ("draws", draws)):
        require.whole(name, value, at_least=1)
    require.floating("x", x, at_least_dims=1)
    require.integers("y", y, shape=x.shape[:1])
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    shape = num_classes, draws, min(iterations, size)
    eigenvalues = torch.full(shape, torch.nan, dtype=torch.float64, device=x.device)
    weights = torch.zeros_like(eigenvalues)
    with evaluating(model), torch.enable_grad():
        for c in y.unique().tolist():
            own = y == c
            objective = loss(model(x[own]), y[own]).mean()
            slope = _flat(torch.autograd.grad(objective, parameters, create_graph=True, materialize_grads=True))

            def product(v: Tensor, slope: Tensor = slope) -> Tensor:
                return _flat(
                    torch.autograd.grad(slope, parameters, v, retain_graph=True, materialize_grads=True)
                ).detach()

            for draw in range(draws):
                start = torch.randint(2, (size,), generator=generator, device=generator.device).to(slope) * 2 - 1
                eigenvalues[c, draw], weights[c, draw] = _lanczos(product, start, shape[-1], generator)
    return eigenvalues, weights


@measure(
    known=(
        {
            "inputs": {"eigenvalues": [[[-0.5, 0.0, 2.0], [-0.1, 0.3, 1.0]], [[0.1, 0.2, 0.3], [0.0, 0.4, 0.4]]]},
            "value": [0.25, 0.0],
        },
    ),
    order_free=False,
)
def saddle_index_by_class(eigenvalues: Float[Tensor, "classes draws iterations"]) -> Float[Tensor, " classes"]:
    """Depth of each class's saddle: -lambda_min / lambda_max of its Hessian, 0 where nothing curves downwards.

    Infinite where nothing curves upwards, NaN for a class without rows and for a Hessian of 0.

    Args:
        eigenvalues: from `classwise_hessian_spectrum`.

    Raises:
        ValueError: other than three dimensions, or not floating-point.

    >>> saddle_index_by_class(torch.tensor([[[-0.5, 0.0, 2.0]], [[0.0, 0.1, 0.4]]]))
    tensor([0.2500, 0.0000])
    """
    require.floating("eigenvalues", eigenvalues, dims=3)
    return eigenvalues.amin((1, 2)).clamp(max=0).abs() / eigenvalues.amax((1, 2)).clamp(min=0)


def _lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Ritz values of a symmetric matrix in the Krylov space of `start`, and the squares of its parts along them."""
    basis = start.new_zeros(iterations, len(start))
    basis[0] = start / start.norm()
    small = torch.finfo(start.dtype).eps * len(start) ** 0.5
    diagonal, beside = torch.zeros(2, iterations, dtype=torch.float64, device=start.device)
    for i in range(iterations):
        image = product(basis[i])
        diagonal[i] = image @ basis[i]
        if i + 1 == iterations:
            break
        rest = _orthogonal(image, basis[: i + 1])
        beside[i] = rest.norm()
        if beside[i] <= small * (diagonal.abs() + beside).max():  # the space is exhausted: start in another
            beside[i] = 0.0
            fresh = torch.randn(len(start), generator=generator, device=generator.device)
            rest = _orthogonal(fresh.to(start), basis[: i + 1])
        basis[i + 1] = rest / rest.norm()
    values, vectors = torch.linalg.eigh(diagonal.diag() + beside[:-1].diag(1) + beside[:-1].diag(-1))
    return values, vectors[0].square()


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """What of the vector is orthogonal to the rows of the basis; twice is enough."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
