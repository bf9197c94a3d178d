"""Two feature regularisers that bring neural collapse back where classes are imbalanced.

A network trained on balanced classes ends with features that sit on their class mean, the means as far apart as they
can be. On a long tail rare classes neither collapse nor keep their distance. Here every class gets a learnable mean:
NC1 pulls features to the mean of their class, every class counting alike, and NC2 widens the angle between each mean
and its nearest neighbour. Add both to whatever classification loss you use when some classes are a hundred times
rarer than others. NC1 slows learning where its weight is large, and neither says anything new about a class with a
handful of samples: they shape the features, the classifier's bias towards frequent classes is another matter.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import measure, penalty

PAPER = Paper(
    title="Inducing Neural Collapse in Deep Long-tailed Learning",
    year=2023,
    helps=("class-imbalance",),
    departs=(
        "NC2 leaves a class itself out of its neighbours; the official code turns its cosine of 1 into -1",
        "the measure NC1 is taken in double precision; the official one, in single, can come out negative",
        "only NC2 by each class's nearest neighbour, the variant that the official code calls v0",
    ),
    equation=(
        r"\begin{aligned} "
        r"L&=\ell+\lambda_1\mathrm{NC}_1+\lambda_2\mathrm{NC}_2,\qquad "
        r"\mathrm{NC}_1=\frac1C\sum_k\frac1{n_k}\sum_{i:\,y_i=k}\lVert h_i-\mu_k\rVert^2\\ "
        r"\mathrm{NC}_2&=-\frac1C\sum_k\arccos\,\max_{k'\ne k}\cos(\mu_k-\bar\mu,\;\mu_{k'}-\bar\mu) "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2302.12453",
)


@penalty(on="features", examples=({"feature_dim": 5},))
class NC1Loss(nn.Module):
    """Squared distance of features to a learnable mean of their class, each class alike: within-class collapse.

    NC1 = (1 / C) sum_k (1 / n_k) sum_{i: y_i = k} ||h_i - mu_k||^2 with n_k counted in the batch; a class that is
    absent adds 0. The whole objective is loss + lambda_1 NC1 + lambda_2 nc2_loss(means), 0.01 and 0.1 in the official
    code. There the means have an SGD of their own, without momentum, of learning rate 0.5 / lambda_1: a slower one
    lets them trail behind the features.

    Args:
        num_classes: C, at least 2.
        feature_dim: width of the features.
        generator: of the initial means, standard normal; a sequence makes a stack, one replica for each. None is a
            generator with seed 0.

    Attributes:
        means: mu, (*replicas, num_classes, feature_dim), a parameter that the caller's optimizer has to hold.

    Raises:
        ValueError: a number out of range; features or labels whose shape or dtype does not fit.

    >>> nc1 = NC1Loss(3, 2)
    >>> _ = nn.init.zeros_(nc1.means)
    >>> nc1(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))  # ((1 + 9) / 2 + 4) / 3
    tensor(3., grad_fn=<SumBackward1>)
    """

    def __init__(
        self, num_classes: int, feature_dim: int, *, generator: Generator | Sequence[Generator] | None = None
    ) -> None:
        super().__init__()
        require.whole("num_classes", num_classes, at_least=2)
        require.whole("feature_dim", feature_dim, at_least=1)
        generator = Generator().manual_seed(0) if generator is None else generator
        drawn = [
            torch.randn(num_classes, feature_dim, generator=g, device=g.device)
            for g in (generator if isinstance(generator, Sequence) else [generator])
        ]
        self.means = nn.Parameter(torch.stack(drawn) if isinstance(generator, Sequence) else drawn[0])

    def forward(
        self, features: Float[Tensor, "*replicas batch width"], y: Int[Tensor, "*replicas batch"]
    ) -> Float[Tensor, "*replicas"]:
        """The penalty of a batch, one for each replica."""
        *replicas, classes, width = self.means.shape
        require.floating("features", features, dims=len(replicas) + 2)
        require.same_shape("features", features, (*replicas, features.shape[-2], width))
        require.integers("y", y, shape=features.shape[:-1])
        own = torch.take_along_dim(self.means, y.unsqueeze(-1), dim=-2)
        count = F.one_hot(y, classes).sum(-2).gather(-1, y)
        return ((features - own).square().sum(-1) / (classes * count)).sum(-1)


def nc2_loss(means: Float[Tensor, "*replicas classes width"]) -> Float[Tensor, "*replicas"]:
    """Minus the mean angle between each centred class mean and its nearest neighbour, in radians.

    NC2 = -(1 / C) sum_k arccos max_{k' != k} cos(mu_k - mu_G, mu_k' - mu_G), mu_G the mean of the means. From
    classes - 1 dimensions on it is least, -arccos(-1 / (C - 1)), at a simplex equiangular tight frame. Cosines are cut
    at +-0.99999, as in the official code: means closer than 0.26 degrees do not push each other apart.

    Args:
        means: mu, such as `NC1Loss.means`; at least two.

    Raises:
        ValueError: fewer than two means, or not floating-point.

    >>> nc2_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))  # neighbours at a right angle
    tensor(-1.5708)
    """
    require.floating("means", means, at_least_dims=2)
    if means.shape[-2] < 2:
        raise ValueError(f"means: expected at least two classes, got shape {tuple(means.shape)}")
    nearest = _cosines(means - means.mean(-2, keepdim=True)).amax(-1)
    return -nearest.clamp(-0.99999, 0.99999).arccos().mean(-1)


@measure(
    known=(
        {
            "inputs": {
                "features": [[4.0, 0.0], [2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]],
                "target": [0, 0, 1, 1],
            },
            "value": 0.0625,
        },
    ),
)
def neural_collapse_metrics(
    features: Float[Tensor, "batch width"],
    target: Int[Tensor, " batch"],
    *,
    weight: Float[Tensor, "classes width"] | None = None,
    bias: Float[Tensor, " classes"] | None = None,
) -> dict[str, Tensor]:
    """How far features are from neural collapse, in the terms of Papyan, Han and Donoho: each measure is 0 there.

    S_W is the mean over all samples of the scatter about their class mean, S_B that over classes of the class means
    about the mean of the means. C counts the classes that occur; others are passed over, in the classifier too.
    With a single class, or where all class means coincide, there is nothing to compare and NC1 and NC2 are NaN.

    Args:
        features: h, of the last layer before the classifier; training features, as a rule.
        target: class numbers from 0.
        weight: W of the classifier features W^T + bias.
        bias: of the classifier; None is 0.

    Returns:
        Scalars, computed in double precision, in this order:
        "nc1", tr(S_W S_B^+) / C, variation within classes relative to that between them;
        "norm_spread", standard deviation of the centred class means' norms, in units of their mean;
        "cosine_spread", standard deviation of the cosines between two centred class means;
        "cosine_gap", mean of |cos + 1 / (C - 1)| over these pairs, how far they are from a simplex;
        and with a classifier "nc3", ||W / ||W|| - M / ||M|| ||^2 in Frobenius norm, M the centred class means, and
        "nc4", the share of samples that the classifier puts elsewhere than their nearest class mean.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> features = torch.tensor([[4.0, 0.0], [2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> neural_collapse_metrics(features, torch.tensor([0, 0, 1, 1]))["nc1"]  # (1/2) / 4 / 2, by the first axis
    tensor(0.0625)
    """
    require.floating("features", features, dims=2)
    require.integers("target", target, shape=features.shape[:1])
    h = features.double()
    present, member = target.unique(return_inverse=True)
    count = member.bincount(minlength=len(present)).double()
    means = h.new_zeros(len(present), h.shape[1]).index_add(0, member, h) / count.unsqueeze(1)
    centred = means - means.mean(0)

    # S_B = centred^T centred / C, so its pseudo-inverse comes from the singular vectors, with no width x width matrix.
    _, scale, axes = torch.linalg.svd(centred, full_matrices=False)
    real = scale > scale.max() * max(centred.shape) * torch.finfo(h.dtype).eps
    within = ((h - means[member]) @ axes.mT).square().mean(0)
    nc1 = torch.where(real, within / scale.square(), 0.0).sum() / real.any()  # 0 / 0 where there is no axis at all

    norms = torch.linalg.vector_norm(centred, dim=1)
    cosines = _cosines(centred / norms.mean())[~_same(len(means), h.device)]
    found = {
        "nc1": nc1,
        "norm_spread": norms.std(correction=0) / norms.mean(),
        "cosine_spread": (cosines - cosines.mean()).square().mean().sqrt(),  # `std` would warn where there is no pair
        "cosine_gap": (cosines + 1 / max(1, len(means) - 1)).abs().mean(),
    }
    if weight is not None:
        require.floating("weight", weight, dims=2)
        require.same_shape("weight", weight, (len(weight), h.shape[1]))
        classifier = weight.double()[present]
        found["nc3"] = (classifier / classifier.norm() - centred / centred.norm()).square().sum()
        logits = F.linear(h, classifier, None if bias is None else bias.double()[present])
        found["nc4"] = (logits.argmax(1) != torch.cdist(h, means).argmin(1)).double().mean()
    return {name: value.to(features.dtype) for name, value in found.items()}


def _cosines(vectors: Tensor) -> Tensor:
    """Cosines between all pairs of rows, -inf on the diagonal."""
    units = F.normalize(vectors, dim=-1)
    return (units @ units.mT).masked_fill(_same(vectors.shape[-2], vectors.device), -torch.inf)


def _same(n: int, device: torch.device) -> Tensor:
    """Where a row meets itself: (n, n)."""
    return torch.eye(n, dtype=torch.bool, device=device)
