"""Data diet: rate the training samples by their early errors, averaged over a few networks, and keep the hard ones.

GraNd is the norm of a sample's loss gradient, EL2N the length of its error vector, softmax minus one-hot; both
are averaged over initialisations, since one network alone ranks the samples poorly. Samples with small scores are
soon learned and move the network little, so training goes as well without them: the paper drops half of CIFAR-10.
Use it to prune a large and clean data set on which many networks will be trained: scores carry over to other
architectures, and the paper trains on the rest for as many steps as on all. Take EL2N, which needs logits alone,
after 10 to 20 epochs; GraNd costs a gradient for each sample. (The paper takes it at initialisation too; a later
replication could not confirm that it is of use there.) Wrong labels score highest: the same ranking finds them,
and where there are some, pruning has to drop the top as well. Where data are few or most of them go, hard samples
alone can be worse than random ones.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lossary import require
from lossary.paper import Paper
from lossary.weighting.error_norm_truncation import error_norm

PAPER = Paper(
    title="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
    year=2021,
    helps=("training-cost", "label-noise"),
    equation=(
        r"\operatorname{GraNd}(x,y)=\mathbb E_w\lVert\nabla_w\,\ell(f_w(x),y)\rVert_2,\qquad "
        r"\operatorname{EL2N}(x,y)=\mathbb E_w\lVert p_w(x)-e_y\rVert_2"
    ),
    url="https://arxiv.org/abs/2107.07075",
)

_NUMBERS_AT_ONCE = 2**25  # of gradients that exist at a time, 128 MiB in float32


def el2n_score(input: Float[Tensor, "models *batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Mean over models of |softmax(input) - onehot(target)|_2, 0 to sqrt(2). No gradient.

    Args:
        input: logits of each model, 10 in the paper.
        target: class numbers, 0 to classes - 1.

    Raises:
        ValueError: no model, shapes or dtypes that do not fit.

    >>> one, other = torch.zeros(2, 2), torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    >>> el2n_score(torch.stack([one, other]), torch.tensor([0, 1]))  # sqrt(1/2) / 2, and half of sqrt(2) more
    tensor([0.3536, 1.0606])
    """
    require.floating("input", input, at_least_dims=2)
    if not len(input):
        raise ValueError(f"input: expected logits of at least one model, got shape {tuple(input.shape)}")
    require.classes(input[0], target)
    return error_norm(input, target.expand(input.shape[:-1])).mean(0)


def grand_score(
    models: Sequence[nn.Module],
    input: Tensor,
    target: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Float[Tensor, " batch"]:
    """Mean over models of |gradient of the sample's loss|_2, over all parameters that require one. No gradient.

    In linear softmax regression it is EL2N times sqrt(|x|^2 + 1), in a network the last layer's share of it is.

    Args:
        models: each maps a batch to outputs, in its present mode; batch normalisation and dropout have to be in
            evaluation mode, since a sample's gradient is its own affair.
        input: (batch, ...), what the models take.
        target: (batch, ...), what the loss takes.
        loss: loss(outputs, target), called with one sample at a time, in a batch of its own; values are summed.

    Raises:
        ValueError: no models, one without parameters that require a gradient, input and target of different length.

    >>> model = nn.Linear(2, 2)
    >>> _ = nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> grand_score([model], x, torch.tensor([0, 1])) ** 2  # 1/2 times |x|^2 + 1
    tensor([ 0.5000, 13.0000])
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise ValueError(f"models: expected a sequence of models, got a {type(models).__name__}; put it in a list")
    if not len(models):
        raise ValueError("models: expected at least one, got none")
    if not isinstance(target, Tensor) or not len(input) == len(target):
        raise ValueError(f"target: expected a tensor with {len(input)} entries, one for each row of input")
    return torch.stack([_gradient_norms(model, input, target, loss) for model in models]).mean(0)


def prune_by_score(score: Float[Tensor, " samples"], *, keep: float, drop_top: float = 0.0) -> Int[Tensor, " kept"]:
    """Positions of the samples with the largest scores, increasing; for `torch.utils.data.Subset` or a sampler.

    With `drop_top`, the paper's sliding window: of the ranks 0, 1, ... from the largest score down it keeps those
    from round(drop_top N) to below round((drop_top + keep) N). Of equal scores the first come first.

    Args:
        score: of all N samples.
        keep: share that is kept, 0 < keep <= 1.
        drop_top: share of the largest scores that is dropped as likely wrong, >= 0, together with `keep` at most 1.

    Raises:
        ValueError: shares out of range, NaN among the scores.

    >>> prune_by_score(torch.tensor([0.1, 0.9, 0.5, 0.3]), keep=0.5, drop_top=0.25)
    tensor([2, 3])
    """
    require.floating("score", score, dims=1)
    require.number("keep", keep, above=0.0, at_most=1.0)
    require.number("drop_top", drop_top, at_least=0.0)
    if drop_top + keep > 1 + 1e-9:
        raise ValueError(f"drop_top: expected at most 1 - keep, {1 - keep:g}, got {drop_top!r}")
    if bool(score.isnan().any()):
        raise ValueError("score: contains NaN")
    first, last = round(drop_top * len(score)), round((drop_top + keep) * len(score))
    return score.argsort(descending=True, stable=True)[first:last].sort().values


def _gradient_norms(
    model: nn.Module, input: Tensor, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, " batch"]:
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError(f"models: expected parameters that require a gradient, {type(model).__name__} has none")

    def norm(x: Tensor, y: Tensor) -> Tensor:
        def value(weights: dict[str, Tensor]) -> Tensor:
            return loss(functional_call(model, weights, (x.unsqueeze(0),)), y.unsqueeze(0)).sum()

        gradient = grad(value)(weights)
        return torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()

    rows = max(1, _NUMBERS_AT_ONCE // sum(p.numel() for p in weights.values()))
    norms: Tensor = vmap(norm, chunk_size=rows)(input, target)
    return norms
