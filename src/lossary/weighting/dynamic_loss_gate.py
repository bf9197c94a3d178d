"""Dynamic loss gate with label correction: leave out what is probably mislabelled, by a cut that follows training.

The logarithms of all samples' losses form two heaps, right labels below and wrong ones above. Before each epoch two
Gaussians are fitted to the losses of the epoch before, and the gate is set where they cross: from then on it keeps
the samples below. Samples above may come back with a new label, where the network is sure of another class. Use it
where many labels are wrong, such as cluster numbers used as labels: no share of wrong labels has to be guessed, and
the cut needs no tuning as losses fall. It needs a few epochs first, and many samples; a network that has already
memorised its labels shows a single heap, and hard samples are slighted along with wrong ones.
"""

import math

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import loss, weighting
from lossary.weighting._memory import record
from lossary.weighting._two_gaussians import two_gaussians

PAPER = Paper(
    title="Self-Supervised Learning with Cluster-Aware-DINO for High-Performance Robust Speaker Verification",
    year=2023,
    helps=("label-noise",),
    departs=(
        "cluster-aware DINO, the pretraining whose positive crops come from one cluster, is not here",
        "the margin of the speaker losses is the caller's: the gate takes any loss, the correction any logits",
        "built from a third-party implementation (theolepage/wavlm_ssl_sv), as no official code was found; the crossing"
        " is solved for instead of searched on a grid of 1000 points",
        "a gate that finds no crossing stays where it was; in that implementation it stops the run",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\begin{cases}-\log p_y&\text{if }\log(-\log p_y)\le t_1\\ "
        r"-\log p_{\hat y}&\text{else, if }\hat p_{\hat y}=\max_k\hat p_k>t_2\\0&\text{else}\end{cases} "
        r"\qquad\hat p=\operatorname{softmax}(z/T)\\ "
        r"&t_1:\ \pi_1\mathcal N(t_1;\mu_1,\sigma_1^2)=\pi_2\,\mathcal N(t_1;\mu_2,\sigma_2^2),\quad\mu_1<t_1<\mu_2 "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2304.05754",
)

_SMALLEST = 1e-8  # losses below it are rounding errors, and count as this


def fit_loss_gate(losses: Float[Tensor, " samples"]) -> float | None:
    """The log-loss at which the larger of two Gaussians begins to outweigh the smaller, or None if there is none.

    A mixture of two Gaussians is fitted to the logarithms (tolerance 1e-5). The threshold is the one point between
    their means where weight times density are equal.

    Args:
        losses: last loss of every sample, in nats; those that are not finite are passed over, and losses below 1e-8
            count as that.

    Returns:
        None where fewer than two different losses are left, or the curves do not cross exactly once.

    Raises:
        ValueError: not a floating-point vector.

    >>> low, high = torch.linspace(-3.0, -1.0, 101).exp(), torch.linspace(1.0, 3.0, 101).exp()
    >>> abs(fit_loss_gate(torch.cat([low, high]))) < 1e-3  # two heaps about e^-2 and e^2
    True
    >>> fit_loss_gate(torch.ones(5)) is None
    True
    """
    require.floating("losses", losses, dims=1)
    logs = losses.detach()[losses.isfinite()].double().clamp(min=_SMALLEST).log()
    if not len(logs) or logs.min() == logs.max():
        return None
    (low, high), (a, b), (share, other) = (parameter.tolist() for parameter in two_gaussians(logs))
    # u = x - low solves curve u^2 - gap / b u + lead = 0; between the means the left side falls all the way.
    gap, curve = high - low, 0.5 / b - 0.5 / a
    lead = math.log(share / other) + 0.5 * math.log(b / a) + 0.5 * gap**2 / b
    discriminant = (gap / b) ** 2 - 4 * curve * lead
    if lead <= 0 or discriminant < 0:
        return None
    u = 2 * lead / (gap / b + math.sqrt(discriminant))
    return low + u if u < gap else None


@weighting(
    examples=({}, {"warmup": 0}, {"warmup": 1}),
    tune={"warmup": (1, 4)},
)
class DynamicLossGate(nn.Module):
    """Weights of 0 above the gate and alike below it, so that their mean with the losses is that of the kept samples.

    A sample is kept if log(loss) <= threshold, t_1; the weight is batch / kept. (Where none is kept all are 0.) In
    training mode the losses are remembered, and every num_samples samples, which is an epoch, the gate is fitted
    anew to what is remembered, once `warmup` epochs are over; until then all samples are kept.

    Under `torch.distributed` every process remembers the losses of all, and counts are summed over them, so that
    they share one gate and together do what a single process would do with all their samples.

        gate = DynamicLossGate(len(data))
        for x, y, index in loader:
            losses = F.cross_entropy(model(x), y, reduction="none")
            (gate(losses, index=index) * losses).mean().backward()

    Args:
        num_samples: length of the data.
        warmup: epochs before the first fit, >= 0.

    Attributes:
        losses: (num_samples,), last loss of every sample, infinite before the first; a buffer.
        threshold: t_1, infinite before the first fit; a buffer.
        epoch: number of epochs seen; a buffer.
        seen: samples seen in this epoch; a buffer.

    Raises:
        ValueError: an argument out of range; losses that are not (batch,), or positions that do not fit them.

    >>> gate = DynamicLossGate(6, warmup=1)
    >>> losses, index = torch.tensor([0.1, 0.1, 0.2, 0.2, 5.0, 6.0]), torch.arange(6)
    >>> gate(losses, index=index), round(gate.threshold.exp().item(), 1)  # an epoch, after which the gate is fitted
    (tensor([1., 1., 1., 1., 1., 1.]), 2.5)
    >>> gate(losses, index=index)
    tensor([1.5000, 1.5000, 1.5000, 1.5000, 0.0000, 0.0000])
    """

    losses: Tensor
    threshold: Tensor
    epoch: Tensor
    seen: Tensor

    def __init__(self, num_samples: int, *, warmup: int = 4) -> None:
        super().__init__()
        require.whole("num_samples", num_samples, at_least=1)
        require.whole("warmup", warmup)
        self.warmup = warmup
        self.register_buffer("losses", torch.full((num_samples,), torch.inf))
        self.register_buffer("threshold", torch.tensor(torch.inf))
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("seen", torch.tensor(0))

    @torch.no_grad()
    def forward(self, losses: Float[Tensor, " batch"], *, index: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Weigh the samples, and in training mode remember their losses."""
        require.floating("losses", losses, dims=1)
        require.integers("index", index, shape=losses.shape)
        kept = losses.log() <= self.threshold
        counts = torch.stack([kept.sum(), torch.tensor(len(kept), device=kept.device)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        if self.training:
            record(self.losses, index, losses)
            self.seen += counts[1]
            if self.seen >= len(self.losses):
                self.update()
        return kept * (counts[1] / counts[0].clamp(min=1)).to(losses.dtype)

    def update(self) -> None:
        """End an epoch: fit the gate to what is remembered. Calls do this themselves, every num_samples samples."""
        self.epoch += 1
        self.seen.zero_()
        if self.epoch >= self.warmup:
            threshold = fit_loss_gate(self.losses)
            if threshold is not None:
                self.threshold.fill_(threshold)


@loss(
    on="classes",
    examples=({}, {"threshold": 0.0}, {"threshold": -1.0, "confidence": 0.2, "temperature": 1.0}),
    tune={"threshold": (0.0, 1.0), "labels": ("hard", "soft")},
    limits={"cross_entropy": {"threshold": 100.0}},
)
def loss_gate_label_correction(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    clean: Float[Tensor, "*batch classes"] | None = None,
    threshold: float | Tensor = 1.0,
    confidence: float = 0.5,
    temperature: float = 0.1,
    labels: str = "hard",
) -> Float[Tensor, "*batch"]:
    """Cross-entropy below the gate; above it cross-entropy with the network's own label where it is sure of one.

    With p = softmax(clean / temperature), without gradient, a sample above the gate learns argmax p ("hard") or p
    ("soft") if max p > confidence, and counts 0 otherwise. The mean is over the whole batch. In nats, per sample.
    The implementation at hand takes hard labels, the paper, as far as known, soft ones.

        gate(F.cross_entropy(z, y, reduction="none"), index=index)  # remembers, for the next epoch's gate
        loss_gate_label_correction(z, y, clean=model(x), threshold=gate.threshold).mean().backward()

    Args:
        input: logits, of augmented samples where there is an augmentation.
        target: the given labels, 0 to classes - 1.
        clean: logits of the samples as they are; None takes `input` for them.
        threshold: t_1, the log-loss up to which labels are believed; 1 is a common fixed gate. A tensor, such as
            that of a `DynamicLossGate`, has one for all samples, or broadcasts to (*batch).
        confidence: t_2, 0 to 1.
        temperature: > 0, sharpens p below 1.
        labels: "hard" or "soft".

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> z = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.01]])
    >>> y = torch.tensor([0, 0, 0])
    >>> loss_gate_label_correction(z, y, threshold=-0.5, confidence=0.9)  # believed, corrected, left out
    tensor([0.1269, 0.1269, 0.0000])
    """
    require.classes(input, target)
    if clean is None:
        clean = input
    require.same_shape("clean", clean, input.shape)
    for name, value in (("confidence", confidence), ("temperature", temperature)):
        if isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a number, got a tensor; it passes no gradient back")
    require.number("confidence", confidence, at_least=0.0, at_most=1.0)
    require.number("temperature", temperature, above=0.0)
    require.number("threshold", threshold)
    if isinstance(threshold, Tensor) and threshold.requires_grad:
        raise ValueError("threshold: expected a number or a tensor without gradient; a gate passes none back")
    require.one_of("labels", labels, ("hard", "soft"))
    log_p = input.log_softmax(-1)
    given = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        own = (clean / temperature).softmax(-1)
        sure, label = own.max(-1)
        believed = given.log() <= threshold
    if labels == "hard":
        corrected = -log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    else:
        corrected = -torch.linalg.vecdot(own, log_p)
    return torch.where(believed, given, torch.where(sure > confidence, corrected, 0))
