"""Robust self-supervised training: unlabelled data, even slightly shifted, push the boundary out of crowded regions.

Every sample is replaced by the worst one near it: the loss becomes phi(x, y) = sup_z l(z, y) - gamma c(z, x), the
Lagrangian form of a Wasserstein ball around the data. Unlabelled samples join with the model's own prediction for a
label, so their loss is large where they lie close to the decision boundary, whatever side they are on. Try it when
labels are few and unlabelled samples of about the same kind plentiful, in the paper 10 and 10,000 in 200 dimensions.
It relies on classes that form clusters: where they do not, it moves the boundary to the wrong gap. With predictions
that are wrong to begin with it confirms them, so restart from several initial weights and keep the lowest loss.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.losses._modes import evaluating
from lossary.paper import Paper

PAPER = Paper(
    title="Out-Of-Domain Unlabeled Data Improves Generalization",
    year=2024,
    helps=("few-labels", "train-test-shift"),
    departs=(
        "the linear form measures distances to the boundary; the official code has weight decay instead of |w| = 1",
        "pseudo-labels are the predicted classes, as in the paper; the official code passes raw logits",
        "the ascent's steps are in units of 1 / (2 gamma), so that one step size serves every gamma",
        "the claims choose hyper-parameters on data of their own; the official code does so on the test set",
    ),
    equation=(
        r"\begin{aligned} "
        r"&\min_\theta\ \frac1n\sum_{i=1}^n\phi_\gamma(x_i,y_i) "
        r"+\frac\lambda m\sum_{j=1}^m\phi_{\gamma'}\bigl(x_j,\hat y_\theta(x_j)\bigr)\\ "
        r"&\phi_\gamma(x,y)=\sup_z\ \ell_\theta(z,y)-\gamma\lVert z-x\rVert^2 "
        r"\end{aligned}"
    ),
    url="https://openreview.net/forum?id=Bo6GpQ3B9a",
)


def wasserstein_surrogate_loss(
    model: Callable[[Tensor], Tensor],
    x: Float[Tensor, "..."],
    y: Int[Tensor, "*batch"],
    *,
    gamma: float,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    steps: int = 10,
    step_size: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """The worst loss near each sample, phi(x, y) = sup_z l(model(z), y) - gamma |z - x|^2, for any network.

    z is found by gradient ascent from x, whose t-th step is the gradient times step_size / (2 gamma t). Where gamma
    is more than half the loss's largest curvature in z, the objective is concave and the ascent finds its maximum.
    The gradient with respect to the model's parameters is that of l at z. The ascent sees the model in
    evaluation mode; modes are restored.

    Args:
        model: network, x to logits.
        x: samples (*batch, ...), floating point.
        y: class numbers, or whatever the loss takes.
        gamma: price of a unit of squared distance, > 0; the larger, the closer phi is to the loss.
        loss: loss(model(x), y) gives the values (*batch); None is cross-entropy.
        steps: of the ascent; 0 is the plain loss.
        step_size: of the ascent's first step, > 0; with 1 it reaches the maximum at once where l is linear in z.

    Raises:
        ValueError: x that is not floating point, or a hyper-parameter out of range.

    >>> x, y = torch.tensor([[2.0], [0.0]]), torch.tensor([0, 0])
    >>> wasserstein_surrogate_loss(lambda x: x, x, y, gamma=0.5, loss=lambda z, y: 3 * z[:, 0])  # 3 x + 9 / (4 gamma)
    tensor([10.5000,  4.5000])
    """
    require.floating("x", x, at_least_dims=1)
    require.number("gamma", gamma, above=0.0)
    require.whole("steps", steps)
    require.number("step_size", step_size, above=0.0)
    loss = loss or _cross_entropy
    z = x.detach()
    with evaluating(model), torch.enable_grad():
        for t in range(1, steps + 1):
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(z), y).sum(), z)
            z = (z + step_size / t * (gradient / (2 * gamma) - (z - x))).detach()
    values = loss(model(z), y)
    return values - gamma * (z - x).square().flatten(values.ndim).sum(-1)


def linear_surrogate_loss(
    model: nn.Linear, x: Float[Tensor, "*batch d"], y: Int[Tensor, "*batch"], *, gamma: float
) -> Float[Tensor, "*batch"]:
    """The same in closed form for the 0-1 loss of a linear classifier and the price gamma |z - x|: from 0 to 1.

    It takes a distance of min_k (z_y - z_k) / |w_y - w_k| to leave class y, z being the logits, so the worst that can
    happen is clip(1 - gamma * distance, 0, 1). With two classes and a unit vector w = w_1 - w_0 this is
    the paper's clip(1 - gamma y w.x, 0, 1), y being -1 or 1.

    Args:
        model: `torch.nn.Linear`, or anything with `weight` (..., classes, d) that maps x to logits.
        x: samples.
        y: class numbers, 0 to classes - 1.
        gamma: price of a unit of distance, > 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or gamma <= 0.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[-3.0], [3.0]])})
    >>> linear_surrogate_loss(model, torch.tensor([[1.0], [-1.0], [9.0]]), torch.tensor([1, 1, 1]), gamma=0.25)
    tensor([0.7500, 1.0000, 0.0000], grad_fn=<ClampBackward1>)
    """
    require.number("gamma", gamma, above=0.0)
    require.floating("x", x, at_least_dims=1)
    require.integers("y", y, shape=x.shape[:-1])
    logits, weight = model(x), model.weight
    if logits.shape[-1] < 2:
        raise ValueError("model: expected logits of at least two classes, got one")
    apart = torch.linalg.vector_norm(weight.unsqueeze(-2) - weight.unsqueeze(-3), dim=-1)
    own = F.one_hot(y, logits.shape[-1]).to(logits.dtype)
    lead = (own * logits).sum(-1, keepdim=True) - logits
    # Classes of equal weights have no boundary between them, which is then very far on the side of the leader.
    distance = (lead / (own @ apart.clamp(min=1e-12))).masked_fill(own > 0, torch.inf).amin(-1)
    return (1 - gamma * distance).clamp(0, 1)


class RobustSelfTrainingLoss(nn.Module):
    """Mean of phi over labelled samples plus lam times its mean over unlabelled ones, with predicted classes as labels.

    The objective of RSS training. The predictions are those of the model as it now is, in evaluation mode and without
    gradient. A part without samples adds nothing.

    Args:
        gamma: price of moving a labelled sample, > 0; the official code searches 0.001 to 20.
        gamma_unlabeled: that of moving an unlabelled one, > 0, there below gamma.
        lam: weight of the unlabelled part, >= 0, there up to 20; 0 is learning from the labelled samples alone.
        surrogate: surrogate(model, x, y, gamma=) gives phi (*batch): `wasserstein_surrogate_loss` for networks,
            `linear_surrogate_loss` for linear classifiers, or one's own.

    Raises:
        ValueError: a hyper-parameter out of range.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[-1.0], [1.0]])})
    >>> objective = RobustSelfTrainingLoss(gamma=1.0, gamma_unlabeled=0.5, lam=2.0, surrogate=linear_surrogate_loss)
    >>> xl, yl, xu = torch.tensor([[0.5], [0.25]]), torch.tensor([1, 0]), torch.tensor([[-1.5], [1.0]])
    >>> objective(model, xl, yl, xu)  # (0.5 + 1) / 2 + 2 (0.25 + 0.5) / 2
    tensor(1.5000, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        gamma_unlabeled: float = 0.5,
        lam: float = 1.0,
        surrogate: Callable[..., Tensor] = wasserstein_surrogate_loss,
    ) -> None:
        super().__init__()
        require.number("gamma", gamma, above=0.0)
        require.number("gamma_unlabeled", gamma_unlabeled, above=0.0)
        require.number("lam", lam, at_least=0.0)
        self.gamma, self.gamma_unlabeled, self.lam, self.surrogate = gamma, gamma_unlabeled, lam, surrogate

    def forward(
        self,
        model: Any,
        xl: Float[Tensor, "..."],
        yl: Int[Tensor, "*replicas labelled"],
        xu: Float[Tensor, "..."],
    ) -> Float[Tensor, "*replicas"]:
        """The objective, one for each replica of a stack of models."""
        with evaluating(model), torch.no_grad():
            predicted = model(xu).argmax(-1)
        labelled = self.surrogate(model, xl, yl, gamma=self.gamma)
        unlabelled = self.surrogate(model, xu, predicted, gamma=self.gamma_unlabeled)
        return _mean(labelled) + self.lam * _mean(unlabelled)


def _mean(values: Tensor) -> Tensor:
    return values.sum(-1) / max(1, values.shape[-1])


def _cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
