"""DASO: pseudo-labels that mix two classifiers class by class, for semi-supervised learning on imbalanced data.

Where few labels have a long tail, the linear classifier's pseudo-labels drift to the frequent classes, and a classifier
by similarity to class prototypes drifts to the rare ones. DASO blends the two: the more often a class is presently
handed out, the more say the prototypes have on samples that it claims. A second loss makes strongly augmented views
agree with weak ones about their similarity to the prototypes. Use it on top of FixMatch or another method with
pseudo-labels, above all where the unlabelled data have another class distribution than the labelled. Everything waits
for a warm-up, since prototypes of untrained features mean nothing. Without imbalance it has little to add.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.weighting._memory import from_all

PAPER = Paper(
    title="DASO: Distribution-Aware Semantics-Oriented Pseudo-label for Imbalanced Semi-Supervised Learning",
    year=2022,
    helps=("class-imbalance", "few-labels"),
    departs=(
        "before the first pseudo-labels are counted nothing is blended; the official code divides by zero",
        "under torch.distributed all processes share one memory and one count",
        "the moving average of the encoder is the caller's",
        "no ReMixMatch, MeanTeacher or ABC variants",
    ),
    equation=(
        r"\begin{aligned} "
        r"\hat p&=(1-v_k)\,p+v_k\,q,\qquad k=\argmax_j p_j,\qquad "
        r"v_k=\Bigl(\frac{m_k}{\max_j m_j}\Bigr)^{1/T}\\ "
        r"q&=\operatorname{softmax}_j\bigl(\cos(h,\text{prototype}_j)/\tau\bigr),\qquad "
        r"m_k:\ \text{how often class }k\text{ is handed out} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2106.05682",
)


def daso_blend(
    linear: Float[Tensor, "*replicas batch classes"],
    semantic: Float[Tensor, "*replicas batch classes"],
    distribution: Float[Tensor, "*replicas classes"],
    *,
    temperature: float = 1.5,
) -> Float[Tensor, "*replicas batch classes"]:
    """Pseudo-labels (1 - v_k) linear + v_k semantic, k the class that `linear` favours for the sample.

    v_k = (m_k / max m)^(1 / T): 1 for the class that is handed out most, 0 for one that never is. A distribution of 0
    throughout leaves `linear` as it is.

    Args:
        linear: probabilities p from the linear classifier.
        semantic: probabilities q from the similarity to prototypes.
        distribution: m, shares or counts of the present pseudo-labels.
        temperature: T > 0. 1.5 where labelled and unlabelled data are imbalanced alike, otherwise 0.3, which lowers v
            of all classes but the first.

    Raises:
        ValueError: shapes or dtypes that do not fit, temperature out of range or a tensor.

    >>> p, q = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    >>> daso_blend(p, q, torch.tensor([0.8, 0.2]), temperature=1.0)  # v = 1, 1/4
    tensor([[0.2000, 0.8000],
            [0.3750, 0.6250]])
    """
    require.floating("linear", linear, at_least_dims=2)
    require.same_shape("semantic", semantic, tuple(linear.shape))
    require.same_shape("distribution", distribution, (*linear.shape[:-2], linear.shape[-1]))
    _plain("temperature", temperature)
    tiny = torch.finfo(distribution.dtype).tiny
    share = (distribution / distribution.amax(-1, keepdim=True).clamp(min=tiny)) ** (1 / temperature)
    v = share.gather(-1, linear.argmax(-1)).unsqueeze(-1).to(linear.dtype)
    return linear + v * (semantic - linear)


def semantic_alignment_loss(
    weak: Float[Tensor, "*batch classes"], strong: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of the strong view's similarities to softmax(weak), in nats, per sample, for all samples.

    Args:
        weak: similarities of the weak view to the prototypes, over their temperature; they get no gradient.
        strong: those of the strong view.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> semantic_alignment_loss(torch.zeros(1, 2), torch.zeros(1, 2))  # log 2
    tensor([0.6931])
    """
    require.floating("weak", weak, at_least_dims=1)
    require.same_shape("strong", strong, tuple(weak.shape))
    return -(weak.detach().softmax(-1) * strong.log_softmax(-1)).sum(-1)


class BalancedPrototypeMemory(nn.Module):
    """The last features of every class, as many for each, and their means: prototypes that no class dominates.

    It is fed with labelled features of a moving average of the encoder, such as
    `torch.optim.swa_utils.AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)` gives.
    A class of which nothing was seen has prototype 0, hence similarity 0 to everything.

    Args:
        num_classes: at least 2.
        feature_dim: width of the features.
        size: features that are kept of each class, the oldest leaving first.
        temperature: of the similarities, > 0.
        replicas: leading dimensions of stacked networks, each with a memory of its own.

    Attributes:
        bank: (*replicas, num_classes, size, feature_dim), a buffer.
        pushed: (*replicas, num_classes), how many there have been of each class; a buffer.

    Raises:
        ValueError: a number out of range, features or labels that do not fit.

    >>> memory = BalancedPrototypeMemory(2, 2, size=2, temperature=0.5)
    >>> memory.push(torch.tensor([[9.0, 9.0], [1.0, 1.0], [3.0, -1.0]]), torch.tensor([0, 0, 0]))
    >>> memory.prototypes()  # the first feature has left again
    tensor([[2., 0.],
            [0., 0.]])
    >>> memory(torch.tensor([[5.0, 0.0], [0.0, 5.0]]))
    tensor([[2., 0.],
            [0., 0.]])
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        size: int = 256,
        temperature: float = 0.05,
        replicas: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        require.whole("num_classes", num_classes, at_least=2)
        require.whole("feature_dim", feature_dim, at_least=1)
        require.whole("size", size, at_least=1)
        _plain("temperature", temperature)
        self.temperature = temperature
        self.register_buffer("bank", torch.zeros(*replicas, num_classes, size, feature_dim))
        self.register_buffer("pushed", torch.zeros(*replicas, num_classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, features: Float[Tensor, "*replicas batch width"], y: Int[Tensor, "*replicas batch"]) -> None:
        """Keep a labelled batch, under `torch.distributed` that of all processes."""
        self._fits(features)
        require.integers("y", y, shape=features.shape[:-1])
        features = from_all(features.movedim(-2, 0)).movedim(0, -2).to(self.bank)
        y = from_all(y.movedim(-1, 0)).movedim(0, -1)
        classes, size, _ = self.bank.shape[-3:]
        met = F.one_hot(y, classes).cumsum(-2)
        place = met.gather(-1, y.unsqueeze(-1)).squeeze(-1) - 1  # in the batch, among those of its class
        slot = (self.pushed.gather(-1, y) + place) % size
        row = y + classes * torch.arange(y.numel() // y.shape[-1], device=y.device).view(*y.shape[:-1], 1)
        if y.shape[-1] > size:  # what the batch itself pushes out again
            stays = place >= met[..., -1, :].gather(-1, y) - size
            row, slot, features = row[stays], slot[stays], features[stays]
        self.bank.view(-1, size, self.bank.shape[-1])[row, slot] = features
        self.pushed += met[..., -1, :]

    def prototypes(self) -> Float[Tensor, "*replicas classes width"]:
        """Mean of what is kept of each class."""
        return self.bank.sum(-2) / self.pushed.clamp(1, self.bank.shape[-2]).unsqueeze(-1)

    def forward(self, features: Float[Tensor, "*replicas batch width"]) -> Float[Tensor, "*replicas batch classes"]:
        """Similarities cos(features, prototypes) / temperature, the logits of the semantic classifier."""
        self._fits(features)
        prototypes = F.normalize(self.prototypes(), dim=-1).to(features.dtype)
        return F.normalize(features, dim=-1) @ prototypes.mT / self.temperature

    def _fits(self, features: Tensor) -> None:
        require.floating("features", features, at_least_dims=2)
        *replicas, _, _, width = self.bank.shape
        require.same_shape("features", features, (*replicas, features.shape[-2], width))


class DASO(nn.Module):
    """The losses of unlabelled data: FixMatch on blended pseudo-labels, and semantic alignment.

        for (x, y), (weak, strong) in zip(labelled, unlabelled):
            with torch.no_grad():
                daso.memory.push(ema_encoder(x), y)
            h, h_weak, h_strong = encoder(torch.cat([x, weak, strong])).split([len(x), len(weak), len(strong)])
            consistency, alignment = daso(head(h_weak), h_weak, head(h_strong), h_strong)
            loss = F.cross_entropy(head(h), y) + consistency.mean() + alignment.mean()
            ...  # a step, and one of ema_encoder

    Consistency is cross-entropy of the strong view to the class of the blended pseudo-label, 0 where its probability is
    below the threshold. In training mode a call counts its pseudo-labels, confident or not, and every `period` calls
    the counts become the distribution by which the next ones are blended. In the first `warmup` calls it is FixMatch.

    Args:
        num_classes: at least 2.
        feature_dim: width of the features.
        temperature: T of `daso_blend`.
        threshold: tau of the confident pseudo-labels, 0 to 1.
        warmup: calls before prototypes are used; 5000 of 250 000 steps in the official code.
        period: calls between two distributions.
        size: of the memory, for each class.
        similarity_temperature: of the memory.
        replicas: leading dimensions of stacked networks.

    Attributes:
        memory: the `BalancedPrototypeMemory`.
        distribution: (*replicas, num_classes), counts of the last whole period; a buffer.
        counts: those since; a buffer.
        calls: in training mode; a buffer.

    Raises:
        ValueError: a number out of range, or inputs that do not fit.

    >>> daso = DASO(3, 2, warmup=0, threshold=0.9)
    >>> daso.memory.push(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    >>> weak, strong = torch.tensor([[5.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.zeros(2, 3)
    >>> consistency, alignment = daso(weak, torch.eye(2), strong, torch.eye(2))
    >>> consistency  # log 3, and 0 for an unsure pseudo-label
    tensor([1.0986, 0.0000])
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        temperature: float = 1.5,
        threshold: float = 0.95,
        warmup: int = 5000,
        period: int = 100,
        size: int = 256,
        similarity_temperature: float = 0.05,
        replicas: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        _plain("temperature", temperature)
        _plain("similarity_temperature", similarity_temperature)
        if isinstance(threshold, Tensor):
            raise ValueError("threshold: expected a number, got a tensor")
        require.number("threshold", threshold, at_least=0.0, at_most=1.0)
        require.whole("warmup", warmup)
        require.whole("period", period, at_least=1)
        self.memory = BalancedPrototypeMemory(
            num_classes, feature_dim, size=size, temperature=similarity_temperature, replicas=replicas
        )
        self.temperature, self.threshold, self.warmup, self.period = temperature, threshold, warmup, period
        self.register_buffer("distribution", torch.zeros(*replicas, num_classes))
        self.register_buffer("counts", torch.zeros(*replicas, num_classes))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        weak_logits: Float[Tensor, "*replicas batch classes"],
        weak_features: Float[Tensor, "*replicas batch width"],
        strong_logits: Float[Tensor, "*replicas batch classes"],
        strong_features: Float[Tensor, "*replicas batch width"],
    ) -> tuple[Float[Tensor, "*replicas batch"], Float[Tensor, "*replicas batch"]]:
        """Consistency and alignment, per sample, in nats."""
        require.same_shape("strong_logits", strong_logits, tuple(weak_logits.shape))
        require.same_shape("strong_features", strong_features, tuple(weak_features.shape))
        label, sure = self.pseudo_label(weak_logits, weak_features)
        consistency = -strong_logits.log_softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1) * sure
        if self.calls < self.warmup:
            alignment = torch.zeros_like(consistency)
        else:
            alignment = semantic_alignment_loss(self.memory(weak_features), self.memory(strong_features))
        if self.training:
            self._count(label)
        return consistency, alignment

    @torch.no_grad()
    def pseudo_label(
        self, logits: Float[Tensor, "*replicas batch classes"], features: Float[Tensor, "*replicas batch width"]
    ) -> tuple[Int[Tensor, "*replicas batch"], Bool[Tensor, "*replicas batch"]]:
        """Class of the blended pseudo-label, and whether it is confident. Nothing is counted."""
        require.floating("logits", logits, at_least_dims=2)
        p = logits.softmax(-1)
        if self.calls >= self.warmup:
            p = daso_blend(p, self.memory(features).softmax(-1), self.distribution, temperature=self.temperature)
        confidence, label = p.max(-1)
        return label, confidence >= self.threshold

    @torch.no_grad()
    def _count(self, label: Tensor) -> None:
        every = from_all(label.movedim(-1, 0)).movedim(0, -1)
        self.counts += F.one_hot(every, self.counts.shape[-1]).sum(-2)
        self.calls += 1
        if self.calls % self.period == 0:
            self.distribution.copy_(self.counts)
            self.counts.zero_()


def _plain(name: str, value: float) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor")
    require.number(name, value, above=0.0)
