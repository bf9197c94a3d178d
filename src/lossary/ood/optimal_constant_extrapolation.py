"""Networks extrapolate predictably: far from the training data their answer drifts to the best constant one.

The optimal constant solution is the answer with the least training loss that does not look at the input: the class
shares under cross-entropy, the mean under squared error. As inputs get stranger, the part of each layer's output that
depends on the input shrinks and the biases remain, which add up to about that constant. So choose a loss whose best
constant is the cautious answer, such as rewards with the option to abstain, and a network that meets the unknown
will tend to be cautious of itself. A tendency, not a guarantee: adversarial inputs go the other way, and inputs
of few dimensions may too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.ood._features import FeatureTap
from lossary.paper import Paper

PAPER = Paper(
    title="Deep Neural Networks Tend To Extrapolate Predictably",
    year=2024,
    helps=("strange-inputs", "train-test-shift"),
    url="https://arxiv.org/abs/2310.00873",
    departs=(
        "how strange inputs are is up to the caller; the paper measures it by a classifier of training against new"
        " data",
    ),
    equation=(
        r"f^*=\argmin_c\ \frac1n\sum_{i=1}^n\ell(c,y_i),\qquad "
        r"f_\theta(x)\longrightarrow f^*\ \text{ as }x\text{ moves away from the training data}"
    ),
)

LOSSES = ("cross_entropy", "mse", "gaussian_nll")


def optimal_constant_solution(
    target: Tensor, *, loss: str = "cross_entropy", classes: int | None = None
) -> Float[Tensor, "..."]:
    """f* = argmin_c mean_i loss(c, y_i): the best answer that does not depend on the input.

    Args:
        target: class numbers (N,) for "cross_entropy"; numbers (N,) or (N, D) for "mse"; (N,) for "gaussian_nll".
        loss: "cross_entropy", "mse" or "gaussian_nll".
        classes: how many there are, for "cross_entropy"; None is one more than the largest number.

    Returns:
        The shares of the classes (classes,); the mean, () or (D,); or mean and variance (2,).

    Raises:
        ValueError: shapes, dtypes or names that do not fit, no rows.

    >>> optimal_constant_solution(torch.tensor([0, 0, 2, 0]))
    tensor([0.7500, 0.0000, 0.2500])
    >>> optimal_constant_solution(torch.tensor([1.0, 3.0]), loss="gaussian_nll")
    tensor([2., 1.])
    """
    require.one_of("loss", loss, LOSSES)
    if not isinstance(target, Tensor) or not target.numel():
        raise ValueError("target: expected a tensor with at least one row")
    if loss == "cross_entropy":
        require.integers("target", target, shape=(len(target),))
        counts = torch.bincount(target, minlength=classes or 0)
        if classes is not None and len(counts) > classes:
            raise ValueError(f"classes: expected more than the largest target {len(counts) - 1}, got {classes}")
        return counts / counts.sum()
    require.floating("target", target, **({"dims": 1} if loss == "gaussian_nll" else {"at_least_dims": 1}))
    mean = target.mean(0)
    return torch.stack([mean, target.var(correction=0)]) if loss == "gaussian_nll" else mean


def distance_to_ocs(
    output: Float[Tensor, "rows ..."], constant: Float[Tensor, "..."], *, loss: str = "cross_entropy"
) -> Float[Tensor, " rows"]:
    """How far each answer is from the optimal constant one, (N,), at least 0.

    Args:
        output: the network's. Logits (N, C), whose distance is KL(softmax || f*) in nats; numbers (N,) or (N, D),
            mean squared difference; or means and variances (N, 2), KL between Gaussians, in nats.
        constant: from `optimal_constant_solution`. A class without share makes the first infinite.
        loss: "cross_entropy", "mse" or "gaussian_nll".

    Raises:
        ValueError: shapes, dtypes or names that do not fit.

    >>> distance_to_ocs(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([0.5, 0.5]))
    tensor([0.0000, 0.6919])
    """
    require.one_of("loss", loss, LOSSES)
    require.floating("output", output, at_least_dims=1)
    require.same_shape("constant", constant, output.shape[1:])
    if loss == "cross_entropy":
        p = output.log_softmax(1)
        return (p.exp() * (p - constant.log())).sum(1)
    if loss == "mse":
        return (output - constant).square().flatten(1).mean(1) if output.ndim > 1 else (output - constant).square()
    require.same_shape("output", output, (len(output), 2))
    mean, variance = output.unbind(1)
    ratio = variance / constant[1]
    return (ratio + (mean - constant[0]).square() / constant[1] - 1 - ratio.log()) / 2


def abstention_rewards(
    target: Int[Tensor, " rows"], classes: int, *, cost: float = 4.0
) -> Float[Tensor, "rows actions"]:
    """The reward of every action: 1 for the right class, minus `cost` for a wrong one, 0 for abstaining, the last.

    Train a network with classes + 1 outputs to predict them under squared error. Its optimal constant is to expect
    (1 + cost) share_c - cost of class c, which is below 0 for all classes rarer than cost / (1 + cost), and 0 of
    abstaining.

    Args:
        target: class numbers, (N,).
        classes: C.
        cost: of a wrong class, at least 0; 4 in the paper.

    Returns:
        (N, C + 1), float32.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.

    >>> abstention_rewards(torch.tensor([1]), 2)
    tensor([[-4.,  1.,  0.]])
    """
    require.integers("target", target)
    require.whole("classes", classes, at_least=1)
    require.number("cost", cost, at_least=0.0)
    rewards = (1 + cost) * F.one_hot(target, classes).float() - cost
    return F.pad(rewards, (0, 1))


def ocs_abstention_policy(rewards: Float[Tensor, "rows actions"]) -> Int[Tensor, " rows"]:
    """The action of highest predicted reward, (N,): a class, or minus 1 to abstain.

    Args:
        rewards: predicted, (N, C + 1), the last for abstaining. Ties go to abstaining.

    Raises:
        ValueError: shape or dtype that does not fit.

    >>> ocs_abstention_policy(torch.tensor([[0.9, -4.0, 0.1], [-3.0, -2.0, 0.0]]))
    tensor([ 0, -1])
    """
    require.floating("rewards", rewards, dims=2)
    return rewards.roll(1, 1).argmax(1) - 1


def extrapolation_table(
    model: nn.Module,
    severities: Mapping[Any, Any],
    constant: Tensor,
    *,
    layers: Sequence[str] = (),
    loss: str = "cross_entropy",
) -> list[dict[str, Any]]:
    """By severity of a shift: how near answers are to the constant, how they spread, what layers make of the input.

    Args:
        model: any module.
        severities: data by severity, the first the training distribution; each whatever `FeatureTap` takes, a
            tensor or batches.
        constant: from `optimal_constant_solution`.
        layers: names of linear layers or convolutions.
        loss: as for `distance_to_ocs`.

    Returns:
        A row for each severity: "severity"; "distance", mean distance to the constant; "spread", mean over outputs
        of their standard deviation over inputs, of probabilities under cross-entropy; and by layer name the mean of
        ||W h|| without the bias, divided by that of the first severity.

    Raises:
        ValueError: no severities, layers that the model does not have, shapes that do not fit.

    >>> data = {"plain": torch.tensor([[3.0], [-3.0]]), "faded": torch.tensor([[1.5], [-1.5]])}
    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False))
    >>> table = extrapolation_table(model, data, torch.tensor([0.5, 0.5]), layers=["0"])
    >>> table[1]["0"], table[1]["distance"] < table[0]["distance"], table[1]["spread"] < table[0]["spread"]
    (0.5, True, True)
    """
    if not severities:
        raise ValueError("severities: expected at least one, got none")
    modules, tap, table = dict(model.named_modules()), FeatureTap(model, layers, average=None), []
    first: dict[str, float] = {}
    for severity, data in severities.items():
        found = tap(data)
        answers = found.output.softmax(1) if loss == "cross_entropy" else found.output
        row: dict[str, Any] = {
            "severity": severity,
            "distance": distance_to_ocs(found.output, constant.cpu(), loss=loss).mean().item(),
            "spread": answers.flatten(1).std(0, correction=0).mean().item(),
        }
        for name, value in found.features.items():
            bias = getattr(modules[name], "bias", None)
            if bias is not None:
                along = (
                    (1, -1, *[1] * (value.ndim - 2)) if isinstance(modules[name], nn.modules.conv._ConvNd) else (-1,)
                )
                value = value - bias.detach().cpu().view(along)
            size = value.flatten(1).norm(dim=1).mean().item()
            row[name] = size / first.setdefault(name, size)
        table.append(row)
    return table


def accumulated_constants(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """The model's output where `layer` is given zeros: what the biases from there on add up to.

    The nearer to the optimal constant, the further the network reverts once the layer's input fades. What bypasses
    the layer, such as a residual connection, is not stopped.

    Args:
        model: any module; its mode is left as it is.
        layer: a name as in `model.named_modules()`, taking its input first.
        x: an input of the model.

    Raises:
        ValueError: a layer that the model does not have.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> bool((accumulated_constants(model, "2", torch.ones(1, 2)) == model[2].bias).all())
    True
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f"layer: expected the name of a module, got {layer!r}")
    hook = modules[layer].register_forward_pre_hook(lambda _, inputs: (torch.zeros_like(inputs[0]), *inputs[1:]))
    with hook, torch.no_grad():
        return model(x)


def aligned_share(
    features: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], *, share: float = 0.95
) -> Float[Tensor, " rows"]:
    """The part of each feature vector's squared length that the next layer listens to, 0 to 1.

    It is the projection on the leading right singular vectors of its weight, as few as have at least `share` of the
    weight's Frobenius norm. Strange inputs align less, and so fade.

    Args:
        features: what enters the layer, (N, D).
        weight: of the layer, (out, D).
        share: of the norm, above 0 and at most 1.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.

    >>> aligned_share(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.1]]))
    tensor([0.3600])
    """
    require.floating("features", features, dims=2)
    require.floating("weight", weight, dims=2)
    require.same_shape("weight", weight, (len(weight), features.shape[1]))
    require.number("share", share, above=0.0, at_most=1.0)
    _, scale, axes = torch.linalg.svd(weight.detach(), full_matrices=False)
    kept = scale.square().cumsum(0)
    leading = axes[: int((kept.sqrt() < share * kept[-1].sqrt()).sum()) + 1]
    return (features @ leading.mT).square().sum(1) / features.square().sum(1).clamp_min(
        torch.finfo(features.dtype).tiny
    )
