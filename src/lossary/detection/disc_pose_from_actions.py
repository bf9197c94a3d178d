"""Poses from actions: two networks that sample poses, one told the action, are drawn towards each other.

Annotating poses is dear, naming the action is cheap, and the action narrows the pose down. A conditional network sees
the image and the action, a prediction network the image alone; fed with noise, both draw samples of poses. On every
image their distributions are brought together under the dissimilarity coefficient of the very loss one is judged by,
and on the few annotated ones each also towards the truth. Use it where a cheap label says much about a structured
target of which few are annotated. It needs several samples of both networks in each step. Where the input alone fixes
the target, or annotations are plenty, regress it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import Procedure

PAPER = Paper(
    title="Learning Human Poses from Actions",
    year=2018,
    helps=("few-labels", "uncertainty", "odd-shapes"),
    departs=(
        "vectors of joints from any network; the paper's sample heat maps with a stacked hourglass",
        "the task's loss is the mean distance of joints unless another is given",
        "both networks move in every step, in turn; the paper alternates between longer runs of each",
    ),
    equation=r"\mathrm{DISC} = \mathrm{DIV}(P_w, P_\theta) - \gamma\,\mathrm{DIV}(P_\theta, P_\theta)"
    r" - (1 - \gamma)\,\mathrm{DIV}(P_w, P_w),\qquad \mathrm{DIV}(P, Q) = \mathbb E_{h \sim P,\, h' \sim Q}"
    r"\,\Delta(h, h')",
    url="https://arxiv.org/abs/1807.09075",
)

Delta = Callable[[Tensor, Tensor], Tensor]


def pose_distance(first: Float[Tensor, "*batch j d"], second: Float[Tensor, "*batch j d"]) -> Float[Tensor, "*batch"]:
    """Euclidean distance of corresponding joints, averaged; its gradient is 0 where two joints coincide.

    Args:
        first: j joints in d dimensions.
        second: another pose; their dimensions before the joints may broadcast.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> pose_distance(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor(3.)
    """
    require.floating("first", first, at_least_dims=2)
    require.floating("second", second, at_least_dims=2)
    if first.shape[-2:] != second.shape[-2:]:
        raise ValueError(f"second: expected poses {tuple(first.shape[-2:])}, got shape {tuple(second.shape)}")
    return torch.linalg.vector_norm(first - second, dim=-1).mean(-1)


def diversity(
    first: Float[Tensor, "k *batch j d"],
    second: Float[Tensor, "l *batch j d"] | None = None,
    *,
    delta: Delta = pose_distance,
) -> Float[Tensor, "*batch"]:
    """DIV(P, Q): mean loss between a sample of one distribution and a sample of the other, over all pairs.

    Args:
        first: samples of P.
        second: samples of Q; None is P itself, whose pairs are of different samples, so that nothing is biased.
        delta: the task's loss of two poses (..., j, d), giving (...).

    Raises:
        ValueError: shapes or dtypes that do not fit, or a single sample to be compared with itself.

    >>> samples = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1)
    >>> diversity(samples), diversity(samples, samples)
    (tensor(2.), tensor(1.3333))
    """
    _samples("first", first)
    if second is None:
        if len(first) < 2:
            raise ValueError(f"first: expected at least two samples to compare among themselves, got {len(first)}")
        pairs = delta(first.unsqueeze(1), first.unsqueeze(0))
        return (pairs.sum((0, 1)) - pairs.diagonal().sum(-1)) / (len(first) * (len(first) - 1))
    _samples("second", second)
    if second.shape[1:] != first.shape[1:]:
        raise ValueError(f"second: expected samples of shape {tuple(first.shape[1:])}, got {tuple(second.shape[1:])}")
    return delta(first.unsqueeze(1), second.unsqueeze(0)).mean((0, 1))


def dissimilarity_coefficient(
    prediction: Float[Tensor, "k *batch j d"],
    conditional: Float[Tensor, "l *batch j d"],
    *,
    gamma: float = 0.5,
    delta: Delta = pose_distance,
) -> Float[Tensor, "*batch"]:
    """DIV(P_w, P_theta) - gamma DIV(P_theta, P_theta) - (1 - gamma) DIV(P_w, P_w), estimated without bias.

    For distances and gamma 1/2 its expectation is 0 where the distributions are equal and positive elsewhere, half
    their energy distance; with squared distances it sees means alone. A single estimate may be negative.

    Args:
        prediction: samples of P_w, at least two.
        conditional: samples of P_theta, at least two.
        gamma: 0 to 1.
        delta: the task's loss of two poses (..., j, d), giving (...).

    Raises:
        ValueError: shapes or dtypes that do not fit, or gamma out of range.

    >>> apart = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    >>> dissimilarity_coefficient(apart, apart + 5)  # 5 - 1/2 - 1/2
    tensor(4.)
    """
    require.number("gamma", gamma, at_least=0.0, at_most=1.0)
    own = gamma * diversity(conditional, delta=delta) + (1 - gamma) * diversity(prediction, delta=delta)
    return diversity(prediction, conditional, delta=delta) - own


def pose_energy_score(
    samples: Float[Tensor, "k *batch j d"], pose: Float[Tensor, "*batch j d"], *, delta: Delta = pose_distance
) -> Float[Tensor, "*batch"]:
    """The dissimilarity of a distribution from the truth: mean loss of its samples less half their own diversity.

    Args:
        samples: at least two.
        pose: the true one.
        delta: the task's loss of two poses (..., j, d), giving (...).

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> pose_energy_score(torch.tensor([0.0, 1.0]).view(2, 1, 1), torch.tensor([[3.0]]))  # 2.5 - 1/2
    tensor(2.)
    """
    _samples("samples", samples)
    require.same_shape("pose", pose, samples.shape[1:])
    return diversity(samples, pose.unsqueeze(0), delta=delta) - diversity(samples, delta=delta) / 2


def min_expected_loss_prediction(
    samples: Float[Tensor, "k *batch j d"], *, delta: Delta = pose_distance
) -> Float[Tensor, "*batch j d"]:
    """The sample with the least mean loss to all of them: one pose, of those that the network thinks possible.

    Of equal ones the first is taken.

    Args:
        samples: of one distribution; the paper draws about a hundred.
        delta: the task's loss of two poses (..., j, d), giving (...).

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> min_expected_loss_prediction(torch.tensor([0.0, 1.0, 9.0]).view(3, 1, 1))
    tensor([[1.]])
    """
    _samples("samples", samples)
    expected = delta(samples.unsqueeze(1), samples.unsqueeze(0)).mean(1)
    best = expected.argmin(0)[None, ..., None, None]
    return samples.take_along_dim(best, 0).squeeze(0)


class DiscoNet(nn.Module):
    """A network that draws samples: it sees uniform noise in -1 to 1 beside its input, and gives one pose for each.

    Args:
        head: (*replicas, batch, features + condition + noise_size) to (*replicas, batch, joints * dimensions).
        joints: j.
        noise_size: numbers of noise, at least 1.
        dimensions: d.
        encoder: what makes features of the input, run once however many samples are drawn; None is nothing.

    Raises:
        ValueError: numbers out of range.

    >>> net = DiscoNet(nn.Linear(4 + 2, 3 * 2), joints=3, noise_size=2)
    >>> net(torch.zeros(5, 4), samples=10).shape
    torch.Size([10, 5, 3, 2])
    """

    def __init__(
        self, head: nn.Module, *, joints: int, noise_size: int, dimensions: int = 2, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        for name, value in (("joints", joints), ("noise_size", noise_size), ("dimensions", dimensions)):
            require.whole(name, value, at_least=1)
        self.encoder = nn.Identity() if encoder is None else encoder
        self.head, self.pose, self.noise_size = head, (joints, dimensions), noise_size

    def forward(
        self,
        x: Float[Tensor, "..."],
        condition: Float[Tensor, "*replicas batch c"] | None = None,
        *,
        samples: int = 100,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Float[Tensor, "samples *replicas batch j d"]:
        """Samples of poses; `generator` draws their noise, or one of a sequence for each replica."""
        require.whole("samples", samples, at_least=1)
        seen = self.encoder(x)
        if condition is not None:
            seen = torch.cat([seen, condition.to(seen)], -1)
        *replicas, batch, _ = seen.shape
        shape = (samples * batch, self.noise_size)
        noise = 2 * _uniform((*replicas, *shape), generator, seen) - 1
        repeated = seen.unsqueeze(-3).expand(*replicas, samples, batch, seen.shape[-1]).flatten(-3, -2)
        poses = self.head(torch.cat([repeated, noise], -1))
        return poses.unflatten(-1, self.pose).unflatten(-3, (samples, batch)).movedim(-4, 0)


class DissimilarityLearner(Procedure):
    """Trains the prediction network, and the conditional one beside it, on few poses and many actions.

    A batch is (x, action, pose, annotated); where annotated is false the pose is not looked at. The objective of either
    player, for each image, is `dissimilarity_coefficient` between fresh samples of both, of which the other's are held
    fixed, and on annotated images also its own `pose_energy_score`. For the first `warmup` steps the second alone.
    Drive it with `lossary.roles.advance`. Called with inputs it gives one pose for each.

    Args:
        prediction: draws poses from x.
        conditional: draws poses from x and the action, one-hot.
        num_actions: actions are 0 to num_actions - 1.
        samples: K of each network in a step, at least 2.
        gamma: 0 to 1, see `dissimilarity_coefficient`.
        delta: the task's loss of two poses (..., j, d), giving (...).
        warmup: steps from the annotated images alone.

    Raises:
        ValueError: a number out of range, a batch that is none.

    >>> from lossary.roles import advance
    >>> heads = nn.Linear(4 + 2, 6), nn.Linear(4 + 3 + 2, 6)
    >>> learner = DissimilarityLearner(*(DiscoNet(h, joints=3, noise_size=2) for h in heads), num_actions=3)
    >>> optimizers = {name: torch.optim.Adam(net.parameters()) for name, net in learner.players().items()}
    >>> x, action, pose = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64), torch.zeros(5, 3, 2)
    >>> means = advance(learner, (x, action, pose, torch.arange(5) < 2), optimizers, step=0)
    >>> learner(x).shape
    torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        prediction: nn.Module,
        conditional: nn.Module,
        *,
        num_actions: int,
        samples: int = 10,
        gamma: float = 0.5,
        delta: Delta = pose_distance,
        warmup: int = 0,
    ) -> None:
        super().__init__()
        require.whole("num_actions", num_actions, at_least=1)
        require.whole("samples", samples, at_least=2)
        require.number("gamma", gamma, at_least=0.0, at_most=1.0)
        require.whole("warmup", warmup)
        self.prediction, self.conditional = prediction, conditional
        self.num_actions, self.samples, self.gamma, self.delta, self.warmup = num_actions, samples, gamma, delta, warmup

    def players(self) -> Mapping[str, nn.Module]:
        return {"conditional": self.conditional, "prediction": self.prediction}

    def objective(
        self,
        player: str,
        batch: tuple[Tensor, Int[Tensor, "*replicas b"], Float[Tensor, "*replicas b j d"], Bool[Tensor, "*replicas b"]],
        *,
        step: int,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Float[Tensor, "*replicas b"]:
        if not isinstance(batch, tuple | list) or len(batch) != 4:
            raise ValueError("batch: expected inputs, actions, poses and which of them are annotated")
        x, action, pose, annotated = batch
        given = {"prediction": (x,), "conditional": (x, F.one_hot(action, self.num_actions))}
        drawn = {}
        for name, net in self.players().items():
            with torch.set_grad_enabled(name == player):
                drawn[name] = net(*given[name], samples=self.samples, generator=generator)
        known = torch.where(annotated[..., None, None], pose, 0)  # whatever an unknown pose holds, it may be NaN
        values = pose_energy_score(drawn[player], known, delta=self.delta) * annotated
        if step < self.warmup:
            return values
        return values + dissimilarity_coefficient(**drawn, gamma=self.gamma, delta=self.delta)

    def forward(
        self, x: Tensor, *, samples: int = 100, generator: Generator | Sequence[Generator] | None = None
    ) -> Float[Tensor, "*replicas b j d"]:
        """`min_expected_loss_prediction` of that many samples of the prediction network."""
        drawn: Tensor = self.prediction(x, samples=samples, generator=generator)
        return min_expected_loss_prediction(drawn, delta=self.delta)


def _uniform(shape: Sequence[int], generator: Generator | Sequence[Generator] | None, like: Tensor) -> Tensor:
    if isinstance(generator, Generator) or generator is None:
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator: expected one, or one for each of {shape[0]} replicas, got {len(generator)}")
    return torch.stack([_uniform(shape[1:], g, like) for g in generator])


def _samples(name: str, samples: Tensor) -> None:
    require.floating(name, samples, at_least_dims=3)
    if not len(samples):
        raise ValueError(f"{name}: expected at least one sample, got shape {tuple(samples.shape)}")
