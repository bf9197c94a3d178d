"""ConjNorm: an input is strange where the features' density is low, in a geometry whose norm is chosen on data.

Every class is an exponential family about its mean feature: its density falls with the Bregman divergence of half a
squared q-norm, features and means being scaled to p-norm 1, 1/p + 1/q = 1. With p = 2 this is the spherical Gaussian
on unit vectors; p is searched for, and so is the temperature. What each class's density integrates to is estimated
from the stored training features, so that classes can be added up. No outliers are needed to fit, but p and the
temperature want a few to be chosen by; the score is blind to the length of a feature vector.
"""

from typing import Any, Self

import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from lossary import require
from lossary.ood._gaussian import as_classes, as_features, like, moments
from lossary.paper import Paper
from lossary.roles import score

PAPER = Paper(
    title="ConjNorm: Tractable Density Estimation for Out-of-Distribution Detection",
    year=2024,
    helps=("strange-inputs",),
    departs=(
        "the gradient of the conjugate divides each mean by its own norm, as in the paper; the official code, given"
        " the means transposed, divides each feature by its norm over the classes",
        "partition='all' sums over every training feature; the official code over a bootstrap draw of as many",
        "a feature of 0 stays 0; the official code adds 1e-10 to norms",
    ),
    equation=(
        r"\begin{aligned} "
        r"S(z)&=-\log\sum_k\frac{e^{l_k(z)}}{\Phi(k)},\qquad "
        r"l_k(z)=\frac1t\Bigl(\langle z,\nabla\varphi(\mu_k)\rangle-\varphi(z)\Bigr),\qquad "
        r"\varphi=\tfrac12\lVert\cdot\rVert_q^2\\ "
        r"\Phi(k)&=\sum_{j}e^{l_k(z_j)}\text{ over training rows},\qquad "
        r"\lVert z\rVert_p=\lVert\mu_k\rVert_p=1,\quad\tfrac1p+\tfrac1q=1 "
        r"\end{aligned}"
    ),
)

CHUNK = 2**22
"""Numbers that the sum over training features holds at a time."""


@score(
    examples=({}, {"p": 2.0, "temperature": 0.1}, {"p": 1.5, "partition": "class"}),
    tune={"p": (1.5, 2.0, 2.5, 3.0), "temperature": (0.02, 0.05, 0.2)},
)
class ConjNormDetector(BaseEstimator):
    """Minus the log-density of a feature, summed over classes with estimated partition functions.

    S(z) = log sum_k exp(l_k(z)) / Phi(k), l_k(z) = (-||z||_q^2 / 2 + <z, grad phi(mu_k)>) / t: minus the
    Bregman divergence from mu_k, without the term of mu_k alone, which Phi(k) has too and cancels. Higher
    `anomaly_score` is more unusual. Arrays and tensors are answered in kind.

    Args:
        p: the norm that features and means are scaled by, above 1. The official scripts take 2.2 and 2.5 for
            DenseNets on CIFAR-10 and CIFAR-100, 1.5 for ResNet-50 and 1.8 for MobileNetV2 on ImageNet.
        temperature: t, above 0; in these scripts 0.05, 0.08, 0.0005 and 0.005.
        partition: over which training features Phi(k) sums, "all" as for CIFAR or those of the "class" k as for
            ImageNet.

    Attributes:
        duals_: grad phi(mu_k) of each class, (K, D), float64.
        log_partition_: log Phi(k), (K,).

    Raises:
        ValueError: wrong shapes or dtypes, NaN; asked before `fit` (scikit-learn's NotFittedError).

    >>> detector = ConjNormDetector(p=2.0, temperature=0.5).fit([[2.0, 0.0], [1.0, 0.0]], [0, 0])
    >>> detector.anomaly_score([[3.0, 0.0], [0.0, 1.0]])  # log 2, and 1 / t more at a right angle
    array([0.69314718, 2.69314718])
    """

    def __init__(self, *, p: float = 2.2, temperature: float = 0.05, partition: str = "all") -> None:
        self.p = p
        self.temperature = temperature
        self.partition = partition

    def fit(self, features: Any, labels: Any) -> Self:
        """Learn from training features (N, D) and their labels (N,), numbers or names."""
        require.number("p", self.p, above=1.0)
        require.number("temperature", self.temperature, above=0.0)
        require.one_of("partition", self.partition, ("all", "class"))
        f = as_features("features", features)
        classes, index = as_classes("labels", labels, f)
        self.n_features_in_ = f.shape[1]
        means = _to_length_one(moments(f, index, len(classes)).means, self.p)
        self.duals_ = _conjugate_slope(means, self._q)
        own = index if self.partition == "class" else None
        self.log_partition_ = _log_partition(
            _to_length_one(f.double(), self.p), self.duals_, self._q, self.temperature, own
        )
        return self

    def anomaly_score(self, x: Any) -> Any:
        """Minus the log-density, up to a constant, (N,); higher is more unusual."""
        check_is_fitted(self)
        f = as_features("x", x, self.duals_.shape[1])
        dtype = torch.promote_types(f.dtype, torch.float32)
        duals, log_partition = (t.to(f.device, dtype) for t in (self.duals_, self.log_partition_))
        values = _log_density(_to_length_one(f.to(dtype), self.p), duals, self._q, self.temperature)
        return like(x, -(values - log_partition).logsumexp(1).to(f.dtype))

    def score_samples(self, x: Any) -> Any:
        """The negative of `anomaly_score`, the paper's own sign."""
        return -self.anomaly_score(x)

    @property
    def _q(self) -> float:
        return self.p / (self.p - 1)


def bregman_lq_divergence(
    z: Float[Tensor, "rows features"], mu: Float[Tensor, "classes features"], *, q: float = 2.0
) -> Float[Tensor, "rows classes"]:
    """D(z, mu) = phi(z) - phi(mu) - <z - mu, grad phi(mu)> with phi = ||.||_q^2 / 2; at least 0, 0 at z = mu.

    Since <mu, grad phi(mu)> = ||mu||_q^2, it is (||z||_q^2 + ||mu||_q^2) / 2 - <z, grad phi(mu)>. With q = 2
    half the squared distance.

    Args:
        z: (N, D).
        mu: (K, D).
        q: above 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, or q out of range.

    >>> bregman_lq_divergence(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, 0.0]]))
    tensor([[12.5000,  0.0000]])
    """
    require.number("q", q, above=1.0)
    _widths(z, mu)
    sizes = torch.linalg.vector_norm(mu, ord=q, dim=1).square() / 2
    return sizes - _log_density(z, _conjugate_slope(mu, q), q, 1.0)


def importance_partition(
    z: Float[Tensor, "samples features"],
    mu: Float[Tensor, "classes features"],
    *,
    q: float = 2.0,
    temperature: float = 1.0,
    target: Int[Tensor, " samples"] | None = None,
) -> Float[Tensor, " classes"]:
    """log Phi(k) = log sum_j exp(l_k(z_j)): the partition functions by importance sampling, all samples weighing alike.

    Divided by their number the sums are unbiased for the mean of exp(l_k) over wherever the samples come from.
    See `ConjNormDetector` for l_k.

    Args:
        z: samples (N, D), such as training features scaled to p-norm 1.
        mu: class means (K, D), scaled likewise.
        q: above 1.
        temperature: t, above 0.
        target: class of each sample, 0 to K - 1, to sum over a class's own samples only; a class without any has
            minus infinity.

    Raises:
        ValueError: shapes or dtypes that do not fit, numbers out of range.

    >>> importance_partition(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).exp()  # e^.5 + e^-.5
    tensor([2.2553])
    """
    require.number("q", q, above=1.0)
    require.number("temperature", temperature, above=0.0)
    _widths(z, mu)
    if target is not None:
        require.integers("target", target, shape=z.shape[:1])
    return _log_partition(z, _conjugate_slope(mu, q), q, temperature, target)


def _widths(z: Tensor, mu: Tensor) -> None:
    require.floating("z", z, dims=2)
    require.floating("mu", mu, dims=2)
    require.same_shape("mu", mu, (len(mu), z.shape[1]))


def _to_length_one(rows: Tensor, p: float) -> Tensor:
    """Rows scaled to p-norm 1; rows of 0 stay."""
    return torch.nn.functional.normalize(rows, p=p, dim=1, eps=torch.finfo(rows.dtype).tiny)


def _conjugate_slope(mu: Tensor, q: float) -> Tensor:
    """grad phi(mu) = ||mu||_q^(2 - q) sign(mu) |mu|^(q - 1), written so that large q does not underflow."""
    size = torch.linalg.vector_norm(mu, ord=q, dim=1, keepdim=True)
    return size * mu.sign() * (mu.abs() / size.clamp_min(torch.finfo(mu.dtype).tiny)).pow(q - 1)


def _log_density(z: Tensor, duals: Tensor, q: float, temperature: float) -> Tensor:
    """l_k(z) for each class, (N, K)."""
    sizes = torch.linalg.vector_norm(z, ord=q, dim=1, keepdim=True).square()
    return (z @ duals.mT - sizes / 2) / temperature


def _log_partition(z: Tensor, duals: Tensor, q: float, temperature: float, own: Tensor | None) -> Tensor:
    sums = duals.new_full((len(duals),), -torch.inf)
    for start in range(0, len(z), max(1, CHUNK // len(duals))):
        part = slice(start, start + max(1, CHUNK // len(duals)))
        values = _log_density(z[part], duals, q, temperature)
        if own is not None:
            values = values.masked_fill(own[part, None] != torch.arange(len(duals), device=own.device), -torch.inf)
        sums = torch.logaddexp(sums, values.logsumexp(0))
    return sums
