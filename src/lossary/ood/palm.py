"""PALM: each class is several prototypes on the sphere, and embeddings learn to stay close to those of their class.

One centre per class draws all of a class to one place, which suits no class that comes in several kinds. Here every
class has K prototypes that move with the embeddings; a sample is shared out among those of its class, and a loss
pulls it to them and away from the others', while a second keeps prototypes of one class together and those of
others apart. Train an embedding with it where inputs from elsewhere are to stand out by their distance, and score
them with `MahalanobisDetector` or by nearest neighbours on the network's features. It needs labels and a few hundred
steps or more, since prototypes move slowly; where each class is of one kind, one prototype is enough.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Learning with Mixture of Prototypes for Out-of-Distribution Detection",
    year=2024,
    helps=("strange-inputs",),
    url="https://arxiv.org/abs/2402.02653",
    departs=(
        "by default the log-likelihood's lower bound, as in the official code; the paper's mixture is an argument",
        "shares come from all prototypes and samples of a batch at once and the update is a weighted mean, both as in"
        " the official code",
        "the nearest prototypes of a sample are chosen anew after the update; the official code keeps the earlier ones",
        "prototypes start anywhere on the sphere; in the official code all coordinates start positive",
        "no form without labels, which the paper has too",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\log\sum_{\text{all }k}e^{p_k^\top z/\tau}-\sum_{k\in\text{class }y}w_k\,p_k^\top z/\tau "
        r"+\lambda\,L_{\mathrm{proto}},\qquad w:\ \text{Sinkhorn shares}\\ "
        r"p_k&\leftarrow\operatorname{normalise}\Bigl(m\,p_k+(1-m)\,\textstyle\sum_i w_{ik}z_i\big/\sum_i w_{ik}\Bigr) "
        r"\end{aligned}"
    ),
)


def sinkhorn_assignment(
    similarity: Float[Tensor, "*batch samples prototypes"], *, epsilon: float = 0.05, iterations: int = 3
) -> Float[Tensor, "*batch samples prototypes"]:
    """Shares of each sample among the prototypes, rows of sum 1, such that every prototype gets about as much.

    diag(u) exp(similarity / epsilon) diag(v) of the entropic transport between samples and prototypes, both
    uniform, after some rounds of Sinkhorn and Knopp's scaling: columns first, rows last, in logarithms. With more
    rounds the columns' sums come closer to samples / prototypes.

    Args:
        similarity: such as cosines.
        epsilon: weight of the entropy, > 0; the smaller, the nearer to one prototype for each sample.
        iterations: rounds, at least 1.

    Raises:
        ValueError: a shape, dtype or number out of range.

    >>> sinkhorn_assignment(torch.tensor([[1.0, 0.0], [0.9, 0.0]]), iterations=100)  # the clearer case decides
    tensor([[0.7311, 0.2689],
            [0.2689, 0.7311]])
    """
    require.floating("similarity", similarity, at_least_dims=2)
    require.number("epsilon", epsilon, above=0.0)
    require.whole("iterations", iterations, at_least=1)
    return _log_assignment(similarity, epsilon, iterations).exp()


def _log_assignment(similarity: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    log_share = similarity / epsilon
    for _ in range(iterations):
        log_share = log_share.log_softmax(-2).log_softmax(-1)
    return log_share


def prototype_contrastive_loss(
    prototypes: Float[Tensor, "prototypes features"], labels: Int[Tensor, " prototypes"], *, temperature: float = 0.5
) -> Float[Tensor, " prototypes"]:
    """Draws prototypes of one class together and all others apart; one value for each prototype.

    log sum_{q != p} exp(q . p / t) - mean_{q != p, same class} q . p / t; without the second term where a class has
    one prototype.

    Args:
        prototypes: of length 1.
        labels: their classes.
        temperature: t, > 0.

    Raises:
        ValueError: a shape, dtype or number out of range.

    >>> ends = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # as far apart as can be
    >>> prototype_contrastive_loss(ends, torch.tensor([0, 1]))
    tensor([-2., -2.])
    """
    require.floating("prototypes", prototypes, dims=2)
    require.integers("labels", labels, shape=prototypes.shape[:1])
    require.number("temperature", temperature, above=0.0)
    logits = prototypes @ prototypes.mT / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    friends = (labels.unsqueeze(1) == labels) & ~itself
    attraction = (logits * friends).sum(1) / friends.sum(1).clamp_min(1)
    return logits.masked_fill(itself, -torch.inf).logsumexp(1) - attraction


class PALMLoss(nn.Module):
    """Prototypes of all classes and the loss of a batch of embeddings, one value a sample.

    In training mode a call first moves the prototypes: p <- normalised m p + (1 - m) z, z the mean of the embeddings
    by their shares in p; a prototype without any stays. Shares are `sinkhorn_assignment` over all prototypes, cut to
    the `top` largest within the sample's class and scaled to sum 1. Then, w being the new shares and s_k = p_k . z,
    the value of a sample is

        log sum_{all k} exp(s_k / temperature) - sum_k w_k s_k / temperature     ("bound")
        log sum_{all k} exp(s_k / temperature) - log sum_k w_k exp(s_k / temperature)     ("mixture", the paper's)

    plus `contrast` times the mean `prototype_contrastive_loss`, alike for all samples. The bound is never below the
    mixture (Jensen) and is what the official code computes, thus what the published numbers come from. Shares and,
    in the first part, prototypes are held fixed; the contrast has its gradient through the embeddings' part in the
    move. With one prototype a class this is CIDER: cross-entropy of cosines, plus dispersion.

    Mean over a batch, the order of rows matters not. On several devices, gather embeddings and labels first, so that
    all keep the same prototypes.

        loss = PALMLoss(num_classes=10, num_features=128)
        loss(head(network(images)), labels).mean().backward()

    Args:
        num_classes: C.
        num_features: D, width of the embeddings.
        prototypes: K for each class.
        top: how many prototypes of its class a sample is shared among, at most K.
        momentum: m of the prototypes, between 0 and 1. The nearer to 1, the more steps it takes: the official code has
            0.999 for 500 epochs of CIFAR.
        temperature: of the first part, > 0; the second has 0.5.
        epsilon: of `sinkhorn_assignment`, > 0.
        contrast: weight of the second part, at least 0.
        likelihood: "bound" or "mixture".
        generator: draws the first prototypes, uniform on the sphere; None is torch's global one.

    Attributes:
        prototypes: (C, K, D), of length 1; a buffer.

    Raises:
        ValueError: a shape, dtype or number out of range.

    >>> loss = PALMLoss(num_classes=2, num_features=3, prototypes=1, top=1, generator=Generator().manual_seed(0)).eval()
    >>> z = 5 * loss.prototypes[:, 0]  # the length of an embedding does not count
    >>> loss(z, torch.tensor([0, 1])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        prototypes: int = 6,
        top: int = 5,
        momentum: float = 0.999,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        contrast: float = 1.0,
        likelihood: str = "bound",
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        require.whole("num_classes", num_classes, at_least=2)
        require.whole("num_features", num_features, at_least=1)
        require.whole("prototypes", prototypes, at_least=1)
        require.whole("top", top, at_least=1, at_most=prototypes)
        require.number("momentum", momentum, above=0.0, below=1.0)
        require.number("temperature", temperature, above=0.0)
        require.number("epsilon", epsilon, above=0.0)
        require.number("contrast", contrast, at_least=0.0)
        require.one_of("likelihood", likelihood, ("bound", "mixture"))
        self.top, self.momentum, self.temperature, self.epsilon = top, momentum, temperature, epsilon
        self.contrast, self.likelihood = contrast, likelihood
        drawn = torch.randn(num_classes, prototypes, num_features, generator=generator)
        self.prototypes: Tensor
        self.register_buffer("prototypes", F.normalize(drawn, dim=-1))

    def forward(
        self, embeddings: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Losses, and in training mode the prototypes' move."""
        require.floating("embeddings", embeddings, dims=2)
        require.integers("labels", labels, shape=embeddings.shape[:1])
        classes, each, width = self.prototypes.shape
        if embeddings.shape[1] != width:
            raise ValueError(f"embeddings: expected (batch, {width}), got shape {tuple(embeddings.shape)}")
        z = F.normalize(embeddings.to(self.prototypes.dtype), dim=1)
        prototypes = self.prototypes
        if self.training:
            prototypes = self._moved(z, labels)
            self.prototypes = prototypes.detach()
        logits = z @ self.prototypes.flatten(0, 1).mT / self.temperature
        own, log_share = self._own(logits, labels), self._log_share(z, labels)
        closeness = (log_share.exp() * own).sum(1) if self.likelihood == "bound" else (log_share + own).logsumexp(1)
        names = torch.arange(classes, device=z.device).repeat_interleave(each)
        contrast = prototype_contrastive_loss(prototypes.flatten(0, 1), names).mean()
        return (logits.logsumexp(1) - closeness + self.contrast * contrast).to(embeddings.dtype)

    @torch.no_grad()
    def _log_share(self, z: Tensor, labels: Tensor) -> Float[Tensor, "batch prototypes"]:
        """Of each sample in the prototypes of its class; minus infinity in all but the `top` largest."""
        log_share = self._own(_log_assignment(z @ self.prototypes.flatten(0, 1).mT, self.epsilon), labels)
        largest = log_share.topk(self.top, dim=1)
        return torch.full_like(log_share, -torch.inf).scatter(1, largest.indices, largest.values.log_softmax(1))

    def _moved(self, z: Tensor, labels: Tensor) -> Float[Tensor, "classes prototypes features"]:
        """The prototypes after this batch, with gradient to the embeddings."""
        share = self._log_share(z, labels).exp()
        mass = share.new_zeros(self.prototypes.shape[:2]).index_add(0, labels, share)
        total = torch.zeros_like(self.prototypes).index_add(0, labels, share.unsqueeze(2) * z.unsqueeze(1))
        mean = total / mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(2)
        return F.normalize(self.momentum * self.prototypes + (1 - self.momentum) * mean, dim=-1)

    def _own(self, values: Float[Tensor, "batch all"], labels: Tensor) -> Float[Tensor, "batch prototypes"]:
        """The columns of each row's own class."""
        by_class = values.view(len(values), *self.prototypes.shape[:2])
        return by_class[torch.arange(len(labels), device=labels.device), labels]
