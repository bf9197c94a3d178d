"""PLS-LSA: two detectors of wrong labels by turns, and training on the network's own labels where they strike.

Images found on the web under a class name are wrong in two ways: another class of ours, or none of them at all. A
hyperplane in the features of a contrastively pretrained network separates the latter nearly perfectly, but along
with them it discards clean, simple images that training needs. The size of the loss makes other mistakes. So one
detector is used in the odd epochs and the other in the even ones, and no image stays out for long. What is detected
gets the network's own sharpened prediction as its label, weighed by how much the network believes in it. Use it on
noisy labels with many strange images, where pretrained features are to be had; with wrong classes only, the small
loss alone does as well.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.weighting._two_gaussians import TwoGaussians, two_gaussians

PAPER = Paper(
    title="An accurate detection is not all you need to combat label noise in web-noisy datasets",
    year=2024,
    helps=("label-noise", "strange-inputs"),
    departs=(
        "the variant with two networks, PLS-LSA+, which keeps only what both detect, is not here",
        "infinite pseudo-losses get a weight of 0; the official code gives them the next largest loss",
        "all losses alike, or no sample detected by the loss, is no error: nothing is detected then",
    ),
    equation=(
        r"\begin{aligned} "
        r"L&=\frac{\sum_i w_i\operatorname{CE}(z_i,t_i)}{\sum_i w_i},\qquad "
        r"(t_i,w_i)=\begin{cases}(y_i,\;1)&i\text{ clean}\\ "
        r"\bigl(p_i^{\gamma}/\textstyle\sum_k p_{ik}^{\gamma},\ P(\text{low}\mid\text{pseudo-loss}_i)\bigr) "
        r"&i\text{ noisy}\end{cases}\\ "
        r"&\text{noisy: beyond a hyperplane in even epochs, in the upper heap of losses in odd ones} "
        r"\end{aligned}"
    ),
    url="https://www.ecva.net/papers/eccv_2024/papers_ECCV/papers/06511.pdf",
)


class SmallLossGMMDetector:
    """Noisy are the samples that belong to the upper of two heaps of losses.

    Losses are scaled to 0 to 1 and two Gaussians fitted to them, with the official code's ten steps at most.

    Args:
        threshold: posterior probability of the upper heap above which a sample is noisy, 0 to 1.

    Attributes:
        range_: (2,), smallest and largest loss.
        mixture_: the two Gaussians, or None where all losses were alike.

    Raises:
        ValueError: threshold out of range, losses that are not a floating-point vector, or none that is finite.

    >>> losses = torch.tensor([0.1, 0.2, 0.2, 0.3, 4.0, 4.1])
    >>> SmallLossGMMDetector().fit(losses).predict(losses)
    tensor([False, False, False, False,  True,  True])
    """

    def __init__(self, *, threshold: float = 0.95) -> None:
        require.number("threshold", threshold, at_least=0.0, at_most=1.0)
        self.threshold = threshold

    def fit(self, losses: Float[Tensor, " n"], features: Any = None) -> Self:
        """Learn from all samples' losses under their labels. Those that are not finite, and features, are ignored."""
        require.floating("losses", losses, dims=1)
        finite = losses[losses.isfinite()].double()
        if not len(finite):
            raise ValueError(f"losses: expected at least one that is finite, got {len(losses)} that are not")
        self.range_ = torch.stack([finite.min(), finite.max()])
        self.mixture_: TwoGaussians | None = None
        if self.range_[0] < self.range_[1]:
            self.mixture_ = two_gaussians(self._scaled(finite), tol=1e-2, regularisation=5e-4, max_iter=10)
        return self

    def probability(self, losses: Float[Tensor, " n"], features: Any = None) -> Float[Tensor, " n"]:
        """Posterior probability of the upper heap; 1 where a loss is not finite."""
        require.floating("losses", losses, dims=1)
        _demand_fit(self, "mixture_")
        high = torch.zeros_like(losses)
        if self.mixture_ is not None:
            high = self.mixture_.high(self._scaled(losses)).to(losses.dtype)
        return high.where(losses.isfinite(), 1.0)

    def predict(self, losses: Float[Tensor, " n"], features: Any = None) -> Bool[Tensor, " n"]:
        """Which samples are noisy."""
        return self.probability(losses) > self.threshold

    def _scaled(self, losses: Tensor) -> Tensor:
        return (losses - self.range_[0]) / (self.range_[1] - self.range_[0])


class LinearSeparationDetector:
    """Noisy are the samples beyond a hyperplane in feature space, drawn along the small-loss detector's guesses.

    Features are scaled to length 1 and standardised. A balanced logistic regression without penalty learns which
    samples the `SmallLossGMMDetector` takes for noisy, its mistakes included, or what is known of trusted ones.

    Args:
        threshold: of the small-loss detector.

    Attributes:
        model_: scikit-learn's pipeline; or the one answer, True or False, that all samples to learn from had.

    Raises:
        ValueError: arguments that do not fit together.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.2, 1.0], [0.1, 1.0], [0.0, 1.0]])
    >>> losses = torch.tensor([0.1, 4.0, 0.2, 4.1, 0.3, 4.2])  # in each half one has the loss of the other half
    >>> LinearSeparationDetector().fit(losses, features).predict(losses, features)
    tensor([False, False, False,  True,  True,  True])
    """

    def __init__(self, *, threshold: float = 0.95) -> None:
        self.guess = SmallLossGMMDetector(threshold=threshold)

    def fit(
        self,
        losses: Float[Tensor, " n"],
        features: Float[Tensor, "n d"],
        *,
        trusted: tuple[Int[Tensor, " m"], Bool[Tensor, " m"]] | None = None,
    ) -> Self:
        """Learn from all samples' losses and features; `trusted` are positions, and whether they are noisy."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer, StandardScaler

        _demand_rows(losses, features)
        rows = features.detach().cpu().double()
        if trusted is None:
            known, noisy = rows, self.guess.fit(losses).predict(losses).cpu()
        else:
            known, noisy = rows[trusted[0].cpu()], trusted[1].cpu()
        self.model_: Any = bool(noisy.any())
        if noisy.any() and not noisy.all():
            scale = make_pipeline(Normalizer(), StandardScaler()).fit(rows.numpy())
            plane = LogisticRegression(C=math.inf, max_iter=1000, class_weight="balanced")
            plane.fit(scale.transform(known.numpy()), noisy.numpy())
            self.model_ = make_pipeline(scale, plane)
        return self

    def probability(self, losses: Float[Tensor, " n"], features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Probability of being noisy, a sigmoid of the distance from the plane; losses do not count any more."""
        _demand_rows(losses, features)
        _demand_fit(self, "model_")
        if isinstance(self.model_, bool):
            return torch.full_like(losses, float(self.model_))
        beyond = self.model_.predict_proba(features.detach().cpu().double().numpy())[:, 1]
        return torch.from_numpy(beyond).to(losses)

    def predict(self, losses: Float[Tensor, " n"], features: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        """Which samples are noisy: those with a probability above 1/2."""
        return self.probability(losses, features) > 0.5


class AlternatingNoiseDetector:
    """One detector in one epoch, the other in the next.

    Args:
        order: what is used in epochs 0, 1, ..., again and again: "linear", a `LinearSeparationDetector`, or "loss", a
            `SmallLossGMMDetector`.
        threshold: of the small-loss detector, alone and inside the linear one.

    Raises:
        ValueError: an unknown name, an empty order.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.2, 1.0], [0.1, 1.0], [0.0, 1.0]])
    >>> losses = torch.tensor([0.1, 4.0, 0.2, 4.1, 0.3, 4.2])
    >>> detector = AlternatingNoiseDetector()
    >>> for epoch in range(2):
    ...     detector.fit(losses, features, epoch=epoch).predict(losses, features)
    tensor([False, False, False,  True,  True,  True])
    tensor([False,  True, False,  True, False,  True])
    """

    def __init__(self, order: Sequence[str] = ("linear", "loss"), *, threshold: float = 0.95) -> None:
        kinds: dict[str, type[LinearSeparationDetector | SmallLossGMMDetector]] = {
            "linear": LinearSeparationDetector,
            "loss": SmallLossGMMDetector,
        }
        for name in order:
            require.one_of("order", name, kinds)
        if not order:
            raise ValueError("order: expected at least one name, got none")
        self.detectors = [kinds[name](threshold=threshold) for name in order]

    def fit(
        self,
        losses: Float[Tensor, " n"],
        features: Float[Tensor, "n d"],
        *,
        epoch: int,
        trusted: tuple[Int[Tensor, " m"], Bool[Tensor, " m"]] | None = None,
    ) -> Self:
        """Learn with the detector whose turn it is in this epoch; only the linear one looks at what is trusted."""
        require.whole("epoch", epoch)
        self.chosen_ = self.detectors[epoch % len(self.detectors)]
        if isinstance(self.chosen_, LinearSeparationDetector):
            self.chosen_.fit(losses, features, trusted=trusted)
        else:
            self.chosen_.fit(losses)
        return self

    def probability(self, losses: Float[Tensor, " n"], features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Probability of being noisy under the detector that was last fitted."""
        _demand_fit(self, "chosen_")
        return self.chosen_.probability(losses, features)

    def predict(self, losses: Float[Tensor, " n"], features: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        """Which samples are noisy."""
        _demand_fit(self, "chosen_")
        return self.chosen_.predict(losses, features)


def pseudo_label_confidence(pseudo_losses: Float[Tensor, " n"], noisy: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Weights for `PLSLoss`: 1 for clean samples; for noisy ones how surely their pseudo-loss is a small one, 0 to 1.

    Two Gaussians are fitted to the noisy samples' pseudo-losses, scaled to 0 to 1; the weight is the posterior
    probability of the lower one.

    Args:
        pseudo_losses: cross-entropy of all samples with their pseudo-labels.
        noisy: what a detector found.

    Returns:
        Where at most two are noisy or their losses are all alike, 1 for all. 0 for a loss that is not finite.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> pseudo_label_confidence(torch.tensor([9.0, 0.1, 0.2, 0.2, 3.0]), torch.arange(5) > 0)
    tensor([1., 1., 1., 1., 0.])
    """
    require.floating("pseudo_losses", pseudo_losses, dims=1)
    if noisy.dtype is not torch.bool or noisy.shape != pseudo_losses.shape:
        expected = f"bool of shape {tuple(pseudo_losses.shape)}"
        raise ValueError(f"noisy: expected {expected}, got {noisy.dtype} of shape {tuple(noisy.shape)}")
    usable = noisy & pseudo_losses.isfinite()
    weight = torch.ones_like(pseudo_losses)
    weight[noisy & ~usable] = 0.0
    if usable.sum() > 2:
        values = pseudo_losses[usable]
        weight[usable] = 1 - SmallLossGMMDetector().fit(values).probability(values)
    return weight


class PLSLoss(nn.Module):
    """The training loss: weighted cross-entropy with pseudo-labels, and a contrast of two views by their labels.

    With weights w, soft labels t, and mixup of each sample i with its partner j = partner[i] at share lam,

        N (lam w_i CE(z_i, t_i) / sum w + (1 - lam) w_j CE(z_i, t_j) / sum w) + C_i + P

    whose mean over the batch is the official loss. C_i is the supervised contrastive term: the mean over the samples
    k with i's label of -log softmax_k(u_i . v_k / temperature), u and v being the two views' projections scaled to
    length 1; under mixup it is lam of that and 1 - lam of the same with j's label. P, in every value alike, is
    sum_c (1/K) log((1/K) / mean p_c), which keeps classes from dying out. In nats, per sample.

        labels = torch.where(noisy[index, None], pls.pseudo_labels(model(weak)), onehot)
        pls(model(mixed), labels, weight=weight[index], partner=partner, lam=lam, projections=(u, v)).mean()

    Args:
        gamma: power that sharpens pseudo-labels, > 0.
        temperature: of the contrastive term, mu in the code, > 0.
        prior_penalty: whether to add P. (The official runs do on WebVision only.)

    Raises:
        ValueError: a hyper-parameter out of range, tensors that do not fit together.

    >>> pls = PLSLoss()
    >>> pls.pseudo_labels(torch.tensor([[0.75, 0.25]]).log())  # 9 to 1
    tensor([[0.9000, 0.1000]])
    >>> pls(torch.zeros(2, 2), torch.eye(2), weight=torch.tensor([1.0, 3.0]))  # 2 log 2 (1, 3) / 4
    tensor([0.3466, 1.0397])
    """

    def __init__(self, *, gamma: float = 2.0, temperature: float = 0.2, prior_penalty: bool = False) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("temperature", temperature)):
            if isinstance(value, Tensor):
                raise ValueError(f"{name}: expected a number, got a tensor")
            require.number(name, value, above=0.0)
        self.gamma, self.temperature, self.prior_penalty = gamma, temperature, prior_penalty

    @torch.no_grad()
    def pseudo_labels(self, *logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
        """Mean of the softmax over views or networks, to the power gamma, rescaled to sum 1. Without gradient."""
        if not logits:
            raise ValueError("logits: expected those of at least one view, got none")
        mean = torch.stack([view.log_softmax(-1) for view in logits]).logsumexp(0)
        return (self.gamma * mean).softmax(-1)

    def forward(
        self,
        input: Float[Tensor, "batch classes"],
        target: Float[Tensor, "batch classes"],
        *,
        weight: Float[Tensor, " batch"] | None = None,
        partner: Int[Tensor, " batch"] | None = None,
        lam: float | Tensor = 1.0,
        projections: tuple[Float[Tensor, "batch d"], Float[Tensor, "batch d"]] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Values of a batch.

        Args:
            input: logits, of the mixed samples under mixup.
            target: soft labels of the samples before mixing.
            weight: of the samples, >= 0; None is 1. Where all are 0 the cross-entropy counts nothing.
            partner: position of what each sample is mixed with; None is no mixup.
            lam: share of the sample itself, 0 to 1.
            projections: of two strong views, the first mixed; None leaves out the contrastive term.
        """
        require.floating("input", input, dims=2)
        require.same_shape("target", target, input.shape)
        require.number("lam", lam, at_least=0.0, at_most=1.0)
        weight = input.new_ones(len(input)) if weight is None else weight
        require.same_shape("weight", weight, input.shape[:1])
        weight = weight * len(weight) / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        log_p = input.log_softmax(-1)
        value = weight * _cross_entropy(log_p, target)
        if partner is not None:
            require.integers("partner", partner, shape=weight.shape)
            value = lam * value + (1 - lam) * weight[partner] * _cross_entropy(log_p, target[partner])
        if projections is not None:
            value = value + self._contrast(projections, target.argmax(-1), partner, lam)
        if self.prior_penalty:
            classes = input.shape[-1]
            log_mean = log_p.logsumexp(0) - math.log(len(log_p))
            value = value - math.log(classes) - log_mean.mean()
        return value

    def _contrast(
        self, projections: tuple[Tensor, Tensor], label: Tensor, partner: Tensor | None, lam: float | Tensor
    ) -> Tensor:
        first, second = projections
        require.floating("projections", first, dims=2)
        require.same_shape("projections", second, (len(label), first.shape[-1]))
        u, v = nn.functional.normalize(first, dim=-1), nn.functional.normalize(second, dim=-1)
        log_q = (u @ v.T / self.temperature).log_softmax(-1)
        alike = (label.unsqueeze(1) == label).to(log_q.dtype)
        alike = alike / alike.sum(-1, keepdim=True)
        value = _cross_entropy(log_q, alike)
        return value if partner is None else lam * value + (1 - lam) * _cross_entropy(log_q, alike[partner])


def _cross_entropy(log_p: Tensor, target: Tensor) -> Tensor:
    value: Tensor = -torch.linalg.vecdot(target, log_p)
    return value


def _demand_rows(losses: Tensor, features: Tensor) -> None:
    require.floating("losses", losses, dims=1)
    require.floating("features", features, dims=2)
    if len(features) != len(losses):
        raise ValueError(f"features: expected {len(losses)} rows, one for each loss, got shape {tuple(features.shape)}")


def _demand_fit(detector: Any, attribute: str) -> None:
    if not hasattr(detector, attribute):
        raise ValueError(f"{type(detector).__name__}: call fit first")
