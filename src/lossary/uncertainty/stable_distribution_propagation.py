"""Stable distribution propagation: an uncertain input in, an uncertain output out, in one pass by linearisation.

Where an input is only known as a Gaussian or Cauchy distribution, the network is linearised at its location: the
location passes as usual, and a covariance becomes J S J^T, independent Cauchy scales |J| g, with the network's Jacobian
J. For a ReLU of one Gaussian (or Cauchy) variable nothing of the same kind is closer in total variation: it either
passes unchanged or is cut to a point. Matching moments instead moves the mean at each layer and, as it must take units
for independent, loses the correlations. Works on trained networks as they are and can be trained through. Use it
where the noise of inputs is known and small against the network's bends; samples are the judge where it is not, and a
softmax is hard to beat as a mere measure of a classifier's confidence.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Uncertainty Quantification via Stable Distribution Propagation",
    year=2024,
    helps=("uncertainty", "strange-inputs"),
    url="https://ar5iv.labs.arxiv.org/html/2402.08324",
    departs=(
        "the official code could not be had; written from the paper's statements",
        "layer by layer (marginal) it knows affine layers, elementwise activations, max-pooling and flattening",
        "no multivariate Cauchy input with dependence, no stable laws besides Gaussian and Cauchy",
    ),
    equation=(
        r"\begin{aligned} "
        r"\mathcal N(\mu,\Sigma)&\longrightarrow\mathcal N\bigl(f(\mu),\,J\Sigma J^\top\bigr),\qquad "
        r"J=\frac{\partial f}{\partial x}(\mu)\\ "
        r"\operatorname{Cauchy}(\mu,g)&\longrightarrow\operatorname{Cauchy}\bigl(f(\mu),\,|J|\,g\bigr) "
        r"\end{aligned}"
    ),
)


class GaussianSDP(nn.Module):
    """A network for Gaussian inputs: N(mean, S) becomes N(f(mean), J S J^T), with the Jacobian J at the mean.

    Its parameters are those of `model`, which may be trained through it, for instance by the likelihood of targets
    under the output.

    Args:
        model: any module from (batch, ...) to (batch, ...) that treats rows apart (batch norm in eval mode only).

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    >>> mean, covariance = GaussianSDP(model)(torch.tensor([[3.0, 1.0]]), 0.5)
    >>> mean.tolist(), covariance.tolist()
    ([[4.0, 2.0]], [[[0.5, 0.0], [0.0, 0.5]]])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        mean: Float[Tensor, "batch *features"],
        std: float | Float[Tensor, "batch *features"] | None = None,
        *,
        covariance: Float[Tensor, "batch inputs inputs"] | None = None,
    ) -> tuple[Float[Tensor, "batch outputs"], Float[Tensor, "batch outputs outputs"]]:
        """Mean and covariance of the flattened output.

        Args:
            mean: of the input.
            std: standard deviations of independent inputs, a number or like `mean`.
            covariance: of the flattened input, instead of `std`.

        Raises:
            ValueError: shapes or dtypes that do not fit, or not one of `std` and `covariance`.
        """
        output, jacobian = _linearised(self.model, mean)
        factor = _factor(jacobian, mean, std, covariance)
        return output, factor @ jacobian.mT

    def pairwise_probabilities(
        self,
        mean: Float[Tensor, "batch *features"],
        std: float | Float[Tensor, "batch *features"] | None = None,
        *,
        covariance: Float[Tensor, "batch inputs inputs"] | None = None,
    ) -> Float[Tensor, "batch outputs outputs"]:
        """P(output i > output j) = Phi((m_i - m_j) / sqrt(S_ii + S_jj - 2 S_ij)); 1/2 where they cannot differ.

        The least of a row tells how sure a class is; its logarithm can be trained. Arguments as of `forward`.
        """
        output, jacobian = _linearised(self.model, mean)
        cov = _factor(jacobian, mean, std, covariance) @ jacobian.mT
        variance = cov.diagonal(dim1=-2, dim2=-1)
        spread = (variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * cov).clamp_min(0)
        return _exceeds(output, spread, torch.sqrt, torch.special.ndtr)


class CauchySDP(nn.Module):
    """A network for independent Cauchy inputs: location x and scales g become f(x) and |J| g, J the Jacobian at x.

    Cauchy tails stand for inputs that may be far off; there is no mean or variance to match.

    Args:
        model: any module from (batch, ...) to (batch, ...) that treats rows apart (batch norm in eval mode only).

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    >>> location, scale = CauchySDP(model)(torch.tensor([[3.0, 1.0]]), 0.5)
    >>> location.tolist(), scale.tolist()
    ([[1.0]], [[1.5]])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, location: Float[Tensor, "batch *features"], scale: float | Float[Tensor, "batch *features"]
    ) -> tuple[Float[Tensor, "batch outputs"], Float[Tensor, "batch outputs"]]:
        """Location and scales of the flattened output; its entries are not independent.

        Args:
            location: of the input.
            scale: of the inputs, a number or like `location`.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        output, jacobian = _linearised(self.model, location)
        return output, (jacobian.abs() @ _spread("scale", scale, location).flatten(1).unsqueeze(-1)).squeeze(-1)

    def pairwise_probabilities(
        self, location: Float[Tensor, "batch *features"], scale: float | Float[Tensor, "batch *features"]
    ) -> Float[Tensor, "batch outputs outputs"]:
        """P(output i > output j) = 1/2 + arctan((x_i - x_j) / (|J_i - J_j| g)) / pi; 1/2 where they cannot differ."""
        output, jacobian = _linearised(self.model, location)
        given = _spread("scale", scale, location).flatten(1)
        apart = ((jacobian.unsqueeze(-2) - jacobian.unsqueeze(-3)).abs() * given[:, None, None]).sum(-1)
        return _exceeds(output, apart, lambda s: s, lambda t: 0.5 + t.atan() / math.pi)


def propagate_distribution(
    model: nn.Module,
    location: Float[Tensor, "batch *features"],
    scale: float | Float[Tensor, "batch *features"],
    *,
    family: str = "gaussian",
    method: str = "sdp",
) -> tuple[Float[Tensor, "batch outputs"], Float[Tensor, "batch outputs"]]:
    """Location and scale of each output, flattened, for independent inputs with these locations and scales.

    Args:
        model: from (batch, ...) to (batch, ...), treating rows apart; for other methods than "sdp" an `nn.Sequential`,
            nested or not, of layers that are named where others are met.
        location: of the input: means, or medians of Cauchy inputs.
        scale: standard deviations, or scales of Cauchy inputs; a number or like `location`.
        family: "gaussian" or "cauchy".
        method: "sdp" linearises the network as a whole, with all correlations, at the cost of a backward pass for each
            output; "marginal" goes layer by layer and takes units for independent, a forward pass; "moments" does so
            too, with the exact mean and variance after each ReLU, the usual moment matching (Gaussian only).

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown family or method, a layer without a rule.

    >>> model = nn.Sequential(nn.Identity(), nn.ReLU())
    >>> propagate_distribution(model, torch.tensor([[1.0, -1.0]]), 1.0)
    (tensor([[1., 0.]]), tensor([[1., 0.]]))
    >>> propagate_distribution(model, torch.tensor([[1.0, -1.0]]), 1.0, method="moments")
    (tensor([[1.0833, 0.0833]]), tensor([[0.8667, 0.2615]]))
    """
    require.one_of("family", family, ("gaussian", "cauchy"))
    require.one_of("method", method, ("sdp", "marginal", "moments"))
    spread = _spread("scale", scale, location)
    if method == "sdp" and family == "gaussian":
        output, jacobian = _linearised(model, location)
        return output, _root((jacobian * spread.flatten(1).unsqueeze(-2)).square().sum(-1))
    if method == "sdp":
        return CauchySDP(model)(location, spread)
    if method == "moments" and family == "cauchy":
        raise ValueError("method: 'moments' is for family 'gaussian', since Cauchy variables have no moments")
    output, spread = _layerwise(model, location, spread, family, method)
    return output.flatten(1), spread.flatten(1)


_ELEMENTWISE = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid),
    *(nn.BatchNorm1d, nn.BatchNorm2d),
)
_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d)
_RESHAPING = (nn.Flatten, nn.Identity, nn.Dropout)
_KNOWN = (*_AFFINE, *_ELEMENTWISE, *_RESHAPING, nn.MaxPool2d)


def _linearised(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), flattened, (batch, outputs), and the Jacobian (batch, outputs, inputs)."""
    require.floating("location", x, at_least_dims=2)
    differentiable = _tracked(model, x)
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        output = model(x).flatten(1)
        each = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        (rows,) = torch.autograd.grad(
            output,
            x,
            each.unsqueeze(1).expand(-1, len(x), -1),
            is_grads_batched=True,
            create_graph=differentiable,
        )
    return output if differentiable else output.detach(), rows.flatten(2).transpose(0, 1)


def _tracked(model: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in model.parameters()))


def _factor(jacobian: Tensor, mean: Tensor, std: float | Tensor | None, covariance: Tensor | None) -> Tensor:
    """J S."""
    if (std is None) == (covariance is None):
        raise ValueError(f"std: expected it or covariance, got {'neither' if std is None else 'both'}")
    if covariance is None:
        return jacobian * _spread("std", std, mean).flatten(1).square().unsqueeze(-2)
    require.same_shape("covariance", covariance, (len(mean), jacobian.shape[-1], jacobian.shape[-1]))
    return jacobian @ covariance


def _spread(name: str, value: float | Tensor | None, location: Tensor) -> Tensor:
    require.floating("location", location, at_least_dims=2)
    if isinstance(value, Tensor) and value.ndim:
        require.same_shape(name, value, tuple(location.shape))
        return value
    require.number(name, value, at_least=0.0)
    return torch.as_tensor(value, dtype=location.dtype, device=location.device).expand(location.shape)


def _exceeds(
    output: Tensor, spread: Tensor, root: Callable[[Tensor], Tensor], cdf: Callable[[Tensor], Tensor]
) -> Tensor:
    """cdf(difference / root(spread)) for all pairs; what has no spread is larger or not, for certain."""
    difference = output.unsqueeze(-1) - output.unsqueeze(-2)
    some = spread > 0
    chance = cdf(difference / root(torch.where(some, spread, 1)))
    return torch.where(some, chance, (1 + difference.sign()) / 2)


def _layerwise(model: nn.Module, x: Tensor, spread: Tensor, family: str, method: str) -> tuple[Tensor, Tensor]:
    if isinstance(model, nn.Sequential):
        for layer in model:
            x, spread = _layerwise(layer, x, spread, family, method)
        return x, spread
    if not isinstance(model, _KNOWN) or (method == "moments" and isinstance(model, _ELEMENTWISE[1:-2])):
        known = "linear and convolutional layers, max-pooling, " + ("ReLU" if method == "moments" else "activations")
        raise ValueError(f"model: method {method!r} has rules for {known}, got a layer {type(model).__name__}")
    if model.training and isinstance(model, nn.Dropout | nn.BatchNorm1d | nn.BatchNorm2d):
        raise ValueError(f"model: expected {type(model).__name__} in evaluation mode")
    if isinstance(model, _AFFINE):
        return model(x), _affine(model, spread, family)
    if isinstance(model, _RESHAPING):
        return model(x), model(spread)
    if isinstance(model, nn.MaxPool2d):
        settings = (model.kernel_size, model.stride, model.padding, model.dilation, model.ceil_mode)
        pooled, index = nn.functional.max_pool2d(x, *settings, return_indices=True)
        return pooled, spread.flatten(-2).gather(-1, index.flatten(-2)).view_as(pooled)
    if method == "moments" and isinstance(model, nn.ReLU):
        return _rectified_moments(x, spread)
    differentiable = _tracked(model, x)
    with torch.enable_grad():
        z = x if x.requires_grad else x.detach().requires_grad_()
        y = model(z.clone())  # which may work in place
        (slope,) = torch.autograd.grad(y.sum(), z, create_graph=differentiable)
    return y if differentiable else y.detach(), slope.abs() * spread


def _affine(layer: nn.Module, spread: Tensor, family: str) -> Tensor:
    """The spread after a layer whose inputs are independent: variances add, or Cauchy scales."""
    power = 2 if family == "gaussian" else 1
    weights = {
        name: torch.zeros_like(p) if name == "bias" else p.abs() ** power for name, p in layer.named_parameters()
    }
    total = torch.func.functional_call(layer, weights, spread**power)
    return _root(total) if power == 2 else total


def _root(variance: Tensor) -> Tensor:
    """Square root, with gradient 0 at 0."""
    some = variance > 0
    return torch.where(some, torch.where(some, variance, 1).sqrt(), 0)


def _rectified_moments(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of max(X, 0), X Gaussian."""
    some = std > 0
    sigma = torch.where(some, std, 1)
    a = mean / sigma
    above, below, density = torch.special.ndtr(a), torch.special.ndtr(-a), (-a * a / 2).exp() / math.sqrt(2 * math.pi)
    # Var / sigma^2 = (a^2 + 1) above + a density - (a above + density)^2, written so that large a do not cancel.
    variance = above + a * a * above * below + a * density * (below - above) - density**2
    location = torch.where(some, mean * above + sigma * density, mean.relu())
    return location, torch.where(some, sigma * _root(variance.clamp_min(0)), 0)
