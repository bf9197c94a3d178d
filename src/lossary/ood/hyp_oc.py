"""Hyp-OC: one class learned against random features around its own, told apart in hyperbolic space.

Where only ordinary inputs are known, their features are set against pseudo-negatives, drawn anew in every step from
a Gaussian about the features' running mean. Both go through a small head into the Poincare ball, whose volume grows
exponentially towards its rim; there a hyperbolic logistic regression separates them, and a second loss draws ordinary
ones together. Use it on the features of a network that was trained on something related, since features that may
still move as they like can leave the negatives behind without learning anything. The spread of the negatives must
match that of the features, and an input far off, where no negatives were, may pass for real. Try
`MahalanobisDetector` on the same features first.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import layer

PAPER = Paper(
    title="Hyp-OC: Hyperbolic One Class Classification for Face Anti-Spoofing",
    year=2024,
    helps=("strange-inputs", "few-labels"),
    url="https://arxiv.org/abs/2404.14406",
    departs=(
        "the distance has the inverse hyperbolic tangent as in geometry; the official code has the arc tangent",
        "pairs count by their mean; the official code halves it",
        "the running mean runs on; the official code averages the last two batches only",
        "the exponential map is at the origin; the official code learns its base point",
        "gradients are the loss's own; the official code scales those that come out of the ball by (1 - c|x|^2)^2 / 4",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell_i&=\tfrac12\bigl[-\log p(\text{real}\mid z_i)-\log p(\text{none}\mid\tilde z_i)\bigr] "
        r"+\lambda\,d_c(z_i,z_{i'}),\qquad\tilde f_i\sim\mathcal N(m,\sigma^2I)\\ "
        r"z_i&=\exp_0^c(h(f_i)),\quad\tilde z_i=\exp_0^c(h(\tilde f_i)),\qquad "
        r"\exp_0^c(v)=\tanh\bigl(\sqrt c\,\lVert v\rVert\bigr)\frac{v}{\sqrt c\,\lVert v\rVert} "
        r"\end{aligned}"
    ),
)


@layer(examples=({}, {"curvature": 1.0, "clip": 1.0}, {"clip": 100.0}))
def to_poincare_ball(
    input: Float[Tensor, "*batch features"], *, curvature: float = 0.1, clip: float = 2.0
) -> Float[Tensor, "*batch features"]:
    """Features cut to Euclidean length `clip`, then mapped into the Poincare ball by the exponential map at its centre.

    exp_0(x) = tanh(sqrt(c) |x|) x / (sqrt(c) |x|). Clipping keeps points off the rim, where gradients vanish.

    Args:
        input: x.
        curvature: c > 0; the ball has curvature -c and radius 1 / sqrt(c).
        clip: r > 0.

    Raises:
        ValueError: a dtype or number out of range.

    >>> to_poincare_ball(torch.tensor([3.0, 4.0]), curvature=1.0, clip=0.5)  # tanh(0.5) = 0.4621
    tensor([0.2773, 0.3697])
    """
    require.floating("input", input, at_least_dims=1)
    require.number("curvature", curvature, above=0.0)
    require.number("clip", clip, above=0.0)
    length = torch.linalg.vector_norm(input, dim=-1, keepdim=True).clamp_min(1e-5)
    return _exponential(input * (clip / length).clamp_max(1.0), curvature)


@layer(examples=({}, {"curvature": 1.0}))
class HyperbolicMLR(nn.Module):
    """Multinomial logistic regression in the Poincare ball: (*batch, num_features) to logits (*batch, num_classes).

    Class k has a hyperplane through p_k = exp_0(`points`_k) that is normal to a_k = `normals`_k. Its logit is the
    signed hyperbolic distance to that plane, times 2 |a_k|:

        2 |a| / sqrt(c) * asinh(2 sqrt(c) <w, a / |a|> / (1 - c |w|^2)),    w = (-p) Mobius+ x.

    It costs two matrix products. As c goes to 0 it becomes linear, 4 <x - p, a>.

    Args:
        num_features: dimension of the ball.
        num_classes: K.
        curvature: c > 0, that of the ball.
        generator: draws the weights, uniform as in `torch.nn.Linear`; None is torch's global one.

    Raises:
        ValueError: a number out of range, points of another dimension.

    >>> regression = HyperbolicMLR(2, 1, curvature=1.0)
    >>> weights = {"points": torch.tensor([[0.0, 0.0]]), "normals": torch.tensor([[0.5, 0.0]])}
    >>> keys = regression.load_state_dict(weights)
    >>> regression(torch.tensor([[math.tanh(1.0), 0.0]]))  # twice the distance is 4, |a| a half
    tensor([[2.]], grad_fn=<MulBackward0>)
    """

    def __init__(
        self, num_features: int, num_classes: int, *, curvature: float = 0.1, generator: Generator | None = None
    ) -> None:
        super().__init__()
        require.whole("num_features", num_features, at_least=1)
        require.whole("num_classes", num_classes, at_least=1)
        _number("curvature", curvature)
        self.curvature = curvature
        self.points, self.normals = (nn.Parameter(torch.empty(num_classes, num_features)) for _ in range(2))
        for weight in (self.points, self.normals):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        """Logits of points in the ball; those outside are taken back to just inside its rim."""
        require.floating("x", x, at_least_dims=1)
        if x.shape[-1] != self.points.shape[1]:
            raise ValueError(f"x: expected {self.points.shape[1]} features last, got shape {tuple(x.shape)}")
        c = self.curvature
        x, p = _inside(x, c), _exponential(self.points, c)
        steepness = torch.linalg.vector_norm(self.normals, dim=1)
        a = F.normalize(self.normals, dim=1)
        x_room, p_room = 1 - c * x.square().sum(-1, keepdim=True), 1 - c * p.square().sum(-1)
        root: float = c**0.5
        sides = p_room * (x @ a.mT) - (2 - x_room - 2 * c * x @ p.mT) * (p * a).sum(-1)
        distance = torch.asinh(2 * root * sides / (x_room * p_room)) / root
        return 2 * steepness * distance


def hyperbolic_pairwise_confusion_loss(
    points: Float[Tensor, "batch features"], *, curvature: float = 0.1
) -> Float[Tensor, " batch"]:
    """Hyperbolic distance of each point of the ball to the one half a batch further on; draws a class together.

    d(u, v) = 2 / sqrt(c) artanh(sqrt(c) |(-u) Mobius+ v|). In an even batch, the first half meets the second, each
    pair twice, so that the mean is the mean over pairs; in an odd one every point still has a partner.

    Args:
        points: in the ball; those outside are taken back to just inside its rim.
        curvature: c > 0.

    Raises:
        ValueError: a shape, dtype or number out of range.

    >>> hyperbolic_pairwise_confusion_loss(torch.tensor([[0.0], [0.5]]), curvature=1.0)  # ln 3
    tensor([1.0986, 1.0986])
    """
    require.floating("points", points, dims=2)
    require.number("curvature", curvature, above=0.0)
    x = _inside(points, curvature)
    room = 1 - curvature * x.square().sum(1)
    partner, its_room = (t.roll(-(len(x) // 2), 0) for t in (x, room))
    apart = torch.linalg.vector_norm(x - partner, dim=1)
    root: float = curvature**0.5
    return 2 / root * torch.asinh(root * apart / (room * its_room).sqrt())


class RunningMeanPseudoNegatives(nn.Module):
    """As many random features as there are real ones, about their running mean: N(m, variance I), without gradient.

    In training mode m <- alpha m + (1 - alpha) mean of the batch, before drawing. m starts at 0.

    Args:
        num_features: width.
        alpha: 0 to below 1.
        variance: of every feature, > 0; that of the real features is a start.

    Attributes:
        mean: m (num_features,); a buffer.

    Raises:
        ValueError: a shape, dtype or number out of range.

    >>> negatives = RunningMeanPseudoNegatives(2, alpha=0.5, variance=1e-12)
    >>> negatives(torch.tensor([[2.0, 0.0], [2.0, 4.0]]), generator=Generator().manual_seed(0))
    tensor([[1.0000, 1.0000],
            [1.0000, 1.0000]])
    """

    def __init__(self, num_features: int, *, alpha: float = 0.8, variance: float = 1.0) -> None:
        super().__init__()
        require.whole("num_features", num_features, at_least=1)
        require.number("alpha", alpha, at_least=0.0, below=1.0)
        require.number("variance", variance, above=0.0)
        self.alpha, self.variance = alpha, variance
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(num_features))

    @torch.no_grad()
    def forward(
        self, features: Float[Tensor, "batch features"], *, generator: Generator | None = None
    ) -> Float[Tensor, "batch features"]:
        """Negatives for a batch of real features; a generator of None is torch's global one."""
        require.floating("features", features, dims=2)
        if features.shape[1:] != self.mean.shape:
            raise ValueError(f"features: expected (batch, {len(self.mean)}), got shape {tuple(features.shape)}")
        if self.training:
            self.mean = self.alpha * self.mean + (1 - self.alpha) * features.mean(0).to(self.mean.dtype)
        device = features.device if generator is None else generator.device
        noise = torch.randn(features.shape, generator=generator, device=device, dtype=features.dtype)
        return (self.mean + math.sqrt(self.variance) * noise.to(features.device)).to(features.dtype)


class HypOC(nn.Module):
    """Head, hyperbolic classifier and losses for one class, on the features of any network.

    A call takes features of ordinary inputs and gives one value each:

        (cross-entropy of its being real + that of its pseudo-negative's being none) / 2 + confusion * d,

    both after `head`, `to_poincare_ball` and `HyperbolicMLR`, d being `hyperbolic_pairwise_confusion_loss`. It trains
    head and classifier, and the network where the features carry a gradient. The paper trains with Adam, gradients cut
    to norm 3, on VGG-Face features with head 4096-8192-1000-512-128.

        loss = one_class(network(images)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(one_class.parameters(), 3.0)
        ...
        one_class.eval().anomaly_score(network(new_images))

    Args:
        head: (batch, num_features) to (batch, num_embedding), such as linear layers with ReLU.
        num_features: width of the features.
        num_embedding: dimension of the ball.
        curvature: c > 0.
        clip: Euclidean length of an embedding before it enters the ball, > 0.
        alpha: of `RunningMeanPseudoNegatives`.
        variance: of `RunningMeanPseudoNegatives`.
        confusion: weight of the second loss, at least 0.
        generator: draws the classifier's weights; None is torch's global one.

    Raises:
        ValueError: a shape, dtype or number out of range.

    >>> one_class = HypOC(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), num_features=6, num_embedding=4)
    >>> one_class(torch.zeros(5, 6), generator=Generator().manual_seed(0)).shape
    torch.Size([5])
    >>> one_class.eval().anomaly_score(torch.zeros(3, 6)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        head: nn.Module,
        num_features: int,
        num_embedding: int,
        *,
        curvature: float = 0.1,
        clip: float = 2.0,
        alpha: float = 0.8,
        variance: float = 1.0,
        confusion: float = 1.0,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        _number("curvature", curvature)
        require.number("clip", clip, above=0.0)
        require.number("confusion", confusion, at_least=0.0)
        self.curvature, self.clip, self.confusion = curvature, clip, confusion
        self.negatives = RunningMeanPseudoNegatives(num_features, alpha=alpha, variance=variance)
        self.head = head
        self.classifier = HyperbolicMLR(num_embedding, 2, curvature=curvature, generator=generator)

    def forward(
        self, features: Float[Tensor, "batch features"], *, generator: Generator | None = None
    ) -> Float[Tensor, " batch"]:
        """Losses; the generator draws the negatives, None is torch's global one."""
        points = self.embed(torch.cat([features, self.negatives(features, generator=generator)]))
        none, real = self._log_odds(points), len(features)
        doubt = (F.softplus(none[:real]) + F.softplus(-none[real:])) / 2
        return doubt + self.confusion * hyperbolic_pairwise_confusion_loss(points[:real], curvature=self.curvature)

    def embed(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch embedding"]:
        """Points of the ball."""
        return to_poincare_ball(self.head(features), curvature=self.curvature, clip=self.clip)

    def anomaly_score(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """Log-odds of being none of the class; higher is more unusual. Their sigmoid is the paper's score."""
        require.floating("features", features, dims=2)
        return self._log_odds(self.embed(features))

    def _log_odds(self, points: Tensor) -> Tensor:
        logits: Tensor = self.classifier(points)
        return logits[:, 1] - logits[:, 0]


def _exponential(x: Tensor, curvature: float | Tensor) -> Tensor:
    """exp_0, in the ball also after rounding."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-5) * curvature**0.5
    return _inside(x * (torch.tanh(length) / length), curvature)


def _inside(x: Tensor, curvature: float | Tensor) -> Tensor:
    """Points of the ball as they are, others pulled back to just inside its rim."""
    rim = (1 - max(1e-3, 4 * torch.finfo(x.dtype).eps)) / curvature**0.5
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length > rim, x / length.clamp_min(1e-5) * rim, x)


def _number(name: str, value: float) -> None:
    require.number(name, value, above=0.0)
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor")
