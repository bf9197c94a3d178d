"""Evidential networks: one forward pass gives a distribution over class probabilities, or over mean and variance.

The logits of a classifier become the alpha of a Dirichlet, alpha = 1 + evidence; its mean predicts, its spread is what
the network does not know. This survey gathers the losses that teach such a spread: from labels alone
(`evidential_mse_loss`, `uce_loss`, `information_robust_dirichlet_loss`), from examples of strange inputs
(`prior_network_loss`, `reverse_kl_prior_network_loss`), from an ensemble (`ensemble_distillation_loss`), or from the
density of the features (`PosteriorHead`, `NaturalPosteriorHead`), and the same for regression (`nig_loss`,
`regression_prior_network_loss`). `dirichlet_uncertainty` and its likes read the answer. It costs one network where an
ensemble costs five. Try it to tell strange inputs cheaply, with outlier examples where you have some. Do not read the
spread as how much data there was: no loss of labels can teach that (`second-order-loss-pitfalls`), and all of them can
be sure of themselves far from the data, save those with a density.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import layer, loss
from lossary.uncertainty import _dirichlet as dirichlet
from lossary.uncertainty._normal_wishart import NormalWishart, nig_nll

PAPER = Paper(
    title="Prior and Posterior Networks: A Survey on Evidential Deep Learning Methods For Uncertainty Estimation",
    year=2023,
    helps=("uncertainty", "strange-inputs"),
    url="https://orbit.dtu.dk/en/publications/prior-and-posterior-networks-a-survey-on-evidential-deep-learning",
    departs=(
        "logits are held within +-30 before exp, as in the natural posterior network's code",
        "the weight of a KL or an entropy is an argument at each call: annealing it is the caller's",
        "prior networks aim at 1 + 100 for the label and 1 elsewhere, as in the reverse KL's code, in the forward KL"
        " too, where its paper smooths the label; the weight of outliers is the caller's",
        "the entropy of adversarial inputs in information-robust Dirichlets is left out, and its defaults are ours",
        "posterior networks: encoder and its batch norm are the user's; radial flows as in the natural posterior"
        " network, whose heads for numbers and counts are left out, as are its ensembles",
        "regression prior networks: no distillation of an ensemble; kappa and nu have an output each",
        "graph, recurrent and variational variants and those with a representation gap are left out",
    ),
    equation=(
        r"\begin{aligned} "
        r"&\pi\mid x\sim\operatorname{Dir}(\alpha),\qquad "
        r"\alpha_k=1+\mathrm{evidence}_k(x),\qquad\hat p_k=\alpha_k\big/\textstyle\sum_j\alpha_j\\ "
        r"&\underbrace{\mathrm H[\hat p]}_{\text{total}} "
        r"=\underbrace{\mathbb E_{\pi}\,\mathrm H[\pi]}_{\text{the data's}} "
        r"+\underbrace{\mathrm I[y;\pi]}_{\text{the model's}} "
        r"\end{aligned}"
    ),
)

_FLOOR = 1e-6  # of what softplus must keep above 0


@loss(
    on="classes",
    examples=({}, {"kl_weight": 0.1, "evidence": "exp"}, {"evidence": "relu", "kl_weight": 0.0}),
    tune={"kl_weight": (0.01, 0.1), "evidence": ("softplus", "exp")},
)
def evidential_mse_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    kl_weight: float | Tensor = 1.0,
    evidence: str = "softplus",
    prior: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Evidential deep learning (Sensoy et al. 2018): expected squared error, and no evidence for other classes.

    sum_k (1[k = y] - m_k)^2 + m_k (1 - m_k) / (alpha_0 + 1) + kl_weight KL(Dir(alpha~) || flat), where m is the mean
    and alpha~ is alpha with the label's own entry put to 1.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        kl_weight: at least 0; the paper lets it grow from 0 to 1 over the first ten epochs.
        evidence: "softplus", "relu" (the paper's) or "exp".
        prior: alpha without evidence.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> import torch
    >>> evidential_mse_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), evidence="relu")  # 2/16 + 2 (3/16) / 5
    tensor([0.2000])
    """
    require.classes(input, target)
    require.number("kl_weight", kl_weight, at_least=0.0)
    alpha = dirichlet.concentration(input, evidence=evidence, prior=prior)
    error = dirichlet.expected_brier_loss(alpha, target)
    if _matters(kl_weight):
        error = error + kl_weight * dirichlet.kl(torch.where(_is_own(input, target), 1.0, alpha))
    return error.to(input.dtype)


@loss(
    on="classes",
    examples=({}, {"entropy_weight": 0.1, "evidence": "softplus"}, {"entropy_weight": 0.0, "prior": 0.0}),
    tune={"entropy_weight": (0.0, 0.01, 0.1)},
)
def uce_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    entropy_weight: float | Tensor = 1e-5,
    evidence: str = "exp",
    prior: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Uncertainty-aware cross-entropy (Bilos et al. 2019) with the entropy bonus of posterior networks (2020).

    psi(alpha_0) - psi(alpha_y) - entropy_weight H(Dir(alpha)). A posterior network is `PosteriorHead` or
    `NaturalPosteriorHead` under this loss as it stands. With entropy_weight w it is, up to a constant, the bound that
    belief matching (Joo et al. 2020) maximises for a flat prior weighted by w.

    Args:
        input: logits, or log evidence.
        target: class numbers, 0 to classes - 1.
        entropy_weight: at least 0.
        evidence: "exp", "softplus" or "relu".
        prior: alpha without evidence.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> import torch
    >>> uce_loss(torch.zeros(1, 2), torch.tensor([0]), entropy_weight=0.0)  # psi(4) - psi(2) = 1/3 + 1/2
    tensor([0.8333])
    """
    require.classes(input, target)
    require.number("entropy_weight", entropy_weight, at_least=0.0)
    alpha = dirichlet.concentration(input, evidence=evidence, prior=prior)
    error = dirichlet.expected_log_loss(alpha, target)
    if _matters(entropy_weight):
        error = error - entropy_weight * dirichlet.entropy(alpha)
    return error.to(input.dtype)


@loss(
    on="classes",
    examples=({}, {"p": 2.0, "weight": 0.0}, {"evidence": "exp", "weight": 0.01}),
    tune={"weight": (0.0, 0.01, 0.1), "p": (2.0, 4.0)},
)
def information_robust_dirichlet_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    p: float | Tensor = 4.0,
    weight: float | Tensor = 0.1,
    evidence: str = "softplus",
    prior: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Information-robust Dirichlet networks (Tsiligkaridis 2019): a bound on the largest error, and on information.

    E[(1 - theta_y)^p + sum_{k != y} theta_k^p]^(1/p) bounds the expected maximum error. The second term,
    weight / 2 sum_{k != y} (alpha_k - 1)^2 (psi'(alpha_k) - psi'(alpha~_0)) with alpha~_0 = 1 + sum_{k != y} alpha_k,
    is the local form of a Renyi divergence from flat of what is believed of the other classes.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        p: at least 1.
        weight: of the second term, at least 0.
        evidence: "softplus", "relu" or "exp".
        prior: alpha without evidence.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> import torch
    >>> zero = torch.zeros(1, 2)  # theta uniform on [0, 1]: (2 / 3)^(1/2)
    >>> information_robust_dirichlet_loss(zero, torch.tensor([0]), p=2.0, evidence="relu")
    tensor([0.8165])
    """
    require.classes(input, target)
    require.number("p", p, at_least=1.0)
    require.number("weight", weight, at_least=0.0)
    alpha = dirichlet.concentration(input, evidence=evidence, prior=prior)
    own = _is_own(input, target)
    others = alpha.masked_fill(own, 0.0)
    rest = others.sum(-1, keepdim=True)
    powers = torch.logsumexp(dirichlet.log_rising(torch.where(own, rest, alpha), p), -1)
    error = ((powers - dirichlet.log_rising(alpha.sum(-1), p)) / p).exp()
    if _matters(weight):
        curvature = torch.polygamma(1, alpha) - torch.polygamma(1, 1 + rest)
        error = error + weight * ((alpha - 1).square() * curvature).masked_fill(own, 0.0).sum(-1) / 2
    return error.to(input.dtype)


@loss(on="classes", examples=({}, {"target_concentration": 10.0}), tune={"target_concentration": (10.0, 100.0)})
def prior_network_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    outlier: Bool[Tensor, "*batch"] | None = None,
    target_concentration: float | Tensor = 100.0,
) -> Float[Tensor, "*batch"]:
    """Prior networks (Malinin and Gales 2018): KL(Dir(beta) || Dir(alpha)) to what the Dirichlet should be.

    alpha = exp(input); beta is 1 + target_concentration for the label and 1 elsewhere, flat for outliers.

    Args:
        input: logits, the logarithms of alpha.
        target: class numbers, 0 to classes - 1; for outliers any of these, it is ignored.
        outlier: true for examples of strange inputs; None is none.
        target_concentration: above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a concentration not above 0.

    >>> import torch
    >>> prior_network_loss(torch.zeros(2, 3), torch.tensor([0, 0]), outlier=torch.tensor([False, True]))
    tensor([6.5765, 0.0000])
    """
    alpha, beta = _alpha_beta(input, target, outlier, target_concentration)
    return dirichlet.kl(beta, alpha).to(input.dtype)


@loss(on="classes", examples=({}, {"target_concentration": 10.0}), tune={"target_concentration": (10.0, 100.0)})
def reverse_kl_prior_network_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    outlier: Bool[Tensor, "*batch"] | None = None,
    target_concentration: float | Tensor = 100.0,
) -> Float[Tensor, "*batch"]:
    """Prior networks by reverse KL (Malinin and Gales 2019): KL(Dir(alpha) || Dir(beta)), as in `prior_network_loss`.

    Where labels of one input disagree the forward KL averages their targets, and so lets alpha sink at the corners;
    the reverse one averages beta and keeps one mode, however noisy the labels.

    Args:
        input: logits, the logarithms of alpha.
        target: class numbers, 0 to classes - 1; for outliers any of these, it is ignored.
        outlier: true for examples of strange inputs; None is none.
        target_concentration: above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a concentration not above 0.

    >>> import torch
    >>> reverse_kl_prior_network_loss(torch.zeros(2, 3), torch.tensor([0, 0]), outlier=torch.tensor([False, True]))
    tensor([141.4531,   0.0000])
    """
    alpha, beta = _alpha_beta(input, target, outlier, target_concentration)
    return dirichlet.kl(alpha, beta).to(input.dtype)


def ensemble_distillation_loss(
    input: Float[Tensor, "*batch classes"],
    members: Float[Tensor, "*batch members classes"],
    *,
    temperature: float = 1.0,
    smoothing: float = 1e-3,
) -> Float[Tensor, "*batch"]:
    """Ensemble distribution distillation (Malinin et al. 2020): the Dirichlet that an ensemble looks drawn from.

    The mean over members of -log Dir(pi_m; alpha), times temperature^2, with alpha = exp(input / temperature) and
    pi_m = (1 - smoothing) softmax(members_m / temperature) + smoothing / classes. The paper starts at a temperature of
    10 and lets it fall to 1.

    Args:
        input: logits of the student.
        members: logits of the ensemble for the same inputs, no gradient needed.
        temperature: above 0.
        smoothing: keeps probabilities above 0, from 0 to below 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> import torch
    >>> members = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    >>> ensemble_distillation_loss(torch.zeros(1, 2), members)  # flat: a density of 1 everywhere
    tensor([0.])
    """
    require.floating("input", input, at_least_dims=1)
    require.floating("members", members, at_least_dims=2)
    if members.shape[:-2] != input.shape[:-1] or members.shape[-1] != input.shape[-1]:
        wanted = (*input.shape[:-1], "members", input.shape[-1])
        raise ValueError(f"members: expected shape {wanted}, got {tuple(members.shape)}")
    require.number("temperature", temperature, above=0.0)
    require.number("smoothing", smoothing, at_least=0.0, below=1.0)
    alpha = dirichlet.concentration(input / temperature, evidence="exp", prior=0.0)
    p = torch.softmax(members.to(alpha.dtype) / temperature, -1)
    log_p = ((1 - smoothing) * p + smoothing / p.shape[-1]).log().mean(-2)
    return (dirichlet.negative_log_density(alpha, log_p) * temperature**2).to(input.dtype)


def dirichlet_uncertainty(
    input: Float[Tensor, "*batch classes"], *, evidence: str = "softplus", prior: float = 1.0
) -> tuple[Float[Tensor, "*batch classes"], Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """What an evidential classifier predicts and how it is uncertain, sec. 3.2, in nats.

    Args:
        input: logits.
        evidence, prior: as in the loss that trained them; "exp" and 0 for prior networks, "exp" and 1 for `uce_loss`.

    Returns:
        Class probabilities, the mean of the Dirichlet; their entropy, all uncertainty about the label; the expected
        entropy of a draw, which is the data's; and the difference of the two, the mutual information of label and
        draw, which is the model's: the score for strange inputs.

    Raises:
        ValueError: logits of a wrong shape or dtype, another evidence, a prior out of range.

    >>> import torch
    >>> p, total, data, model = dirichlet_uncertainty(torch.tensor([[0.0, 0.0], [99.0, 99.0]]), evidence="relu")
    >>> total, data, model  # log 2 is 1/2 and 0.1931 without evidence; with a lot of it, all is the data's
    (tensor([0.6931, 0.6931]), tensor([0.5000, 0.6907]), tensor([0.1931, 0.0025]))
    """
    alpha = dirichlet.concentration(input, evidence=evidence, prior=prior)
    total, model = dirichlet.mean_entropy(alpha), dirichlet.mutual_information(alpha)
    found = (dirichlet.mean(alpha), total, total - model, model)
    return tuple(value.to(input.dtype) for value in found)  # type: ignore[return-value]


@layer(shape=(4, 6), examples=({}, {"layers": 2}))
class PosteriorHead(nn.Module):
    """Posterior networks (Charpentier, Zuegner and Guennemann 2020): evidence is counts times density of the features.

    Gives log N_k + log p(z | k), so that alpha = 1 + N_k p(z | k) is `uce_loss`'s own: far from the data no class has
    any evidence. p(z | k) is a normalising flow for each class: radial layers on a standard normal one. Put it behind
    an encoder that ends in few features (the paper has 6 to 10) and a batch norm without scale, and train both with
    `uce_loss`.

    Args:
        num_features: of z, at least 1.
        class_counts: N_k, training rows of each class.
        layers: of each flow, at least 1.

    Raises:
        ValueError: a hyper-parameter out of range, features of another width.

    >>> import torch
    >>> head = PosteriorHead(2, (300, 700))
    >>> head(torch.randn(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(self, num_features: int, class_counts: Sequence[float], *, layers: int = 6) -> None:
        super().__init__()
        if len(class_counts) < 2 or not all(count > 0 for count in class_counts):
            raise ValueError(f"class_counts: expected a number above 0 for two classes or more, got {class_counts!r}")
        self.flows = _RadialFlows(num_features, len(class_counts), layers)
        self.register_buffer("log_counts", torch.tensor(class_counts, dtype=torch.float64).log().float())

    def forward(self, input: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        """Log evidence of features."""
        return self.log_counts + self.flows(input)


@layer(shape=(4, 6), examples=({}, {"layers": 2, "log_budget": 0.0}))
class NaturalPosteriorHead(nn.Module):
    """Natural posterior networks (Charpentier et al. 2022): one density for all classes, a softmax to share it out.

    Gives log p(z) + log_budget + log softmax(W z + b)_k, so that alpha = 1 + N p(z) softmax(W z + b) is `uce_loss`'s
    own. As `PosteriorHead`, with one flow however many the classes.

    Args:
        num_features: of z, at least 1.
        num_classes: at least 2.
        layers: of the flow, at least 1.
        log_budget: log N, the evidence to go around; None is num_features log(4 pi) / 2, which makes up for how
            densities shrink with the dimension.

    Raises:
        ValueError: a hyper-parameter out of range, features of another width.

    >>> import torch
    >>> head = NaturalPosteriorHead(2, 3)
    >>> head(torch.randn(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self, num_features: int, num_classes: int, *, layers: int = 8, log_budget: float | None = None
    ) -> None:
        super().__init__()
        require.whole("num_classes", num_classes, at_least=2)
        self.flows = _RadialFlows(num_features, 1, layers)
        self.classify = nn.Linear(num_features, num_classes)
        if log_budget is None:
            log_budget = num_features * math.log(4 * math.pi) / 2
        require.number("log_budget", log_budget)
        self.log_budget = log_budget

    def forward(self, input: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        """Log evidence of features."""
        return self.flows(input) + self.log_budget + torch.log_softmax(self.classify(input), -1)


def nig_loss(
    input: Float[Tensor, "*batch 4"], target: Float[Tensor, "*batch"], *, evidence_weight: float | Tensor = 0.01
) -> Float[Tensor, "*batch"]:
    """Deep evidential regression (Amini et al. 2020): Student's t, and no evidence where the error is large.

    -log St(y; gamma, beta (1 + nu) / (nu alpha), 2 alpha) + evidence_weight |y - gamma| (2 nu + alpha), the density of
    y when mean and variance are drawn from a normal-inverse-gamma distribution. gamma = input_0, nu =
    softplus(input_1), alpha = 1 + softplus(input_2), beta = softplus(input_3), each a millionth more than that.

    Args:
        input: four outputs for each number.
        target: the numbers; standardise them, since the second term depends on their scale.
        evidence_weight: at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a weight below 0.

    >>> import torch
    >>> nig_loss(torch.zeros(1, 4), torch.tensor([0.5]))
    tensor([1.1634])
    """
    gamma, nu, alpha, beta = _nig(input)
    require.same_shape("target", target, tuple(input.shape[:-1]))
    require.number("evidence_weight", evidence_weight, at_least=0.0)
    nll = nig_nll(gamma, nu, alpha, beta, target.to(gamma.dtype))
    return (nll + evidence_weight * (target - gamma).abs() * (2 * nu + alpha)).to(input.dtype)


def nig_uncertainty(
    input: Float[Tensor, "*batch 4"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """What a network trained with `nig_loss` predicts and how it is uncertain.

    Returns:
        The mean gamma; the expected variance beta / (alpha - 1), which is the data's; and the variance of the mean,
        beta / (nu (alpha - 1)), which is the model's.

    Args:
        input: four outputs for each number.

    Raises:
        ValueError: outputs of a wrong shape or dtype.

    >>> import torch
    >>> nig_uncertainty(torch.tensor([[0.5, 0.0, 0.0, 0.0]]))  # nu = alpha - 1 = beta = log 2
    (tensor([0.5000]), tensor([1.0000]), tensor([1.4427]))
    """
    gamma, nu, alpha, beta = _nig(input)
    data = beta / (alpha - 1)
    return gamma.to(input.dtype), data.to(input.dtype), (data / nu).to(input.dtype)


def regression_prior_network_loss(
    input: Float[Tensor, "*batch outputs"],
    target: Float[Tensor, "*batch targets"],
    *,
    outlier: Bool[Tensor, "*batch"] | None = None,
    prior_mean: Float[Tensor, " targets"] | None = None,
    prior_covariance: Float[Tensor, "targets targets"] | None = None,
    prior_strength: float = 0.01,
    kl_weight: float | Tensor = 0.01,
) -> Float[Tensor, "*batch"]:
    """Regression prior networks (Malinin et al. 2020): several numbers, their covariance, and a prior to fall back on.

    E[-log N(y; mu, Lambda^-1)] + kl_weight KL(NW || prior) over the predicted normal-Wishart distribution; for
    outliers the second term alone. The prior has the mean and covariance of the targets and the weight of
    `prior_strength` observations.

    D targets take D + D (D + 1) / 2 + 2 outputs: the mean; the Cholesky factor of W row by row, softplus on its
    diagonal; kappa = softplus; nu = D + 2 + softplus, so that covariances exist.

    Args:
        input: outputs for each sample.
        target: D numbers each, at least 1.
        outlier: true for examples of strange inputs, whose targets are ignored (but must be numbers); None is none.
        prior_mean: of the targets; None is 0, for standardised ones.
        prior_covariance: of the targets, positive definite; None is the identity.
        prior_strength: kappa of the prior, above 0; its nu is D + 2 more.
        kl_weight: at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> import torch
    >>> regression_prior_network_loss(torch.zeros(1, 4), torch.zeros(1, 1))
    tensor([1.5202])
    """
    require.floating("target", target, at_least_dims=1)
    require.number("prior_strength", prior_strength, above=0.0)
    require.number("kl_weight", kl_weight, at_least=0.0)
    size = target.shape[-1]
    predicted = _normal_wishart(input, size)
    require.same_shape("target", target, (*input.shape[:-1], size))
    like = predicted.mean
    mean = like.new_zeros(size) if prior_mean is None else prior_mean.to(like)
    covariance = torch.eye(size).to(like) if prior_covariance is None else prior_covariance.to(like)
    for name, given, shape in (("prior_mean", mean, (size,)), ("prior_covariance", covariance, (size, size))):
        require.same_shape(name, given, shape)
    kappa = like.new_tensor(prior_strength)
    nu = kappa + size + 2
    factor = torch.linalg.cholesky(torch.linalg.inv(nu * covariance))
    divergence = kl_weight * predicted.kl(NormalWishart(mean, factor, kappa, nu))
    nll = predicted.expected_nll(target.to(like))
    if outlier is not None:
        _boolean("outlier", outlier, tuple(input.shape[:-1]))
        nll = torch.where(outlier, 0.0, nll)
    return (nll + divergence).to(input.dtype)


def normal_wishart_uncertainty(
    input: Float[Tensor, "*batch outputs"], *, targets: int
) -> tuple[
    Float[Tensor, "*batch targets"], Float[Tensor, "*batch targets targets"], Float[Tensor, "*batch targets targets"]
]:
    """What a network trained with `regression_prior_network_loss` predicts and how it is uncertain.

    Args:
        input: outputs for each sample.
        targets: D, how many numbers they are about.

    Returns:
        The mean (*batch, D); the expected covariance, which is the data's; and the covariance of the mean, that over
        kappa, which is the model's (*batch, D, D).

    Raises:
        ValueError: outputs of a wrong shape or dtype, `targets` below 1.

    >>> import torch
    >>> mean, data, model = normal_wishart_uncertainty(torch.zeros(3, 7), targets=2)
    >>> model.shape, (model / data)[0, 0, 0]  # 1 / log 2
    (torch.Size([3, 2, 2]), tensor(1.4427))
    """
    require.whole("targets", targets, at_least=1)
    found = _normal_wishart(input, targets)
    covariance = found.covariance
    of_mean = covariance / found.kappa[..., None, None]
    return found.mean.to(input.dtype), covariance.to(input.dtype), of_mean.to(input.dtype)


class _RadialFlows(nn.Module):
    """Densities of `flows` normalising flows side by side: (*batch, features) to log p (*batch, flows).

    Each layer is z + beta (z - c) / (a + |z - c|) with a > 0 and beta > -a, which keeps it invertible; they lead to a
    standard normal distribution.
    """

    def __init__(self, num_features: int, flows: int, layers: int) -> None:
        super().__init__()
        require.whole("num_features", num_features, at_least=1)
        require.whole("layers", layers, at_least=1)
        width = num_features**-0.5

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(layers, flows, *shape).uniform_(-width, width))

        self.centre, self.radius, self.pull = drawn(num_features), drawn(), drawn()

    def forward(self, input: Tensor) -> Tensor:
        require.floating("input", input, at_least_dims=1)
        features = self.centre.shape[-1]
        if input.shape[-1] != features:
            raise ValueError(f"input: expected {features} features last, got shape {tuple(input.shape)}")
        z, log_det = input.unsqueeze(-2), input.new_zeros(())
        for centre, radius, pull in zip(self.centre, F.softplus(self.radius), F.softplus(self.pull)):
            apart = z - centre
            h = 1 / (radius + torch.linalg.vector_norm(apart, dim=-1))
            stretch = (pull - radius) * h
            z = z + stretch.unsqueeze(-1) * apart
            log_det = log_det + (features - 1) * stretch.log1p() + (stretch * radius * h).log1p()
        return log_det - (z.square().sum(-1) + features * math.log(2 * math.pi)) / 2


def _matters(weight: float | Tensor) -> bool:
    """Whether a term of this weight has to be computed: a tensor's gradient may be wanted, whatever its value."""
    return isinstance(weight, Tensor) or weight != 0


def _is_own(input: Tensor, target: Tensor) -> Tensor:
    return torch.arange(input.shape[-1], device=input.device) == target.unsqueeze(-1)


def _alpha_beta(
    input: Tensor, target: Tensor, outlier: Tensor | None, target_concentration: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The alpha that is and the one that should be."""
    require.classes(input, target)
    require.number("target_concentration", target_concentration, above=0.0)
    own = _is_own(input, target)
    if outlier is not None:
        _boolean("outlier", outlier, tuple(target.shape))
        own = own & ~outlier.unsqueeze(-1)
    alpha = dirichlet.concentration(input, evidence="exp", prior=0.0)
    return alpha, 1 + target_concentration * own.to(alpha.dtype)


def _boolean(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    if given.dtype is not torch.bool or tuple(given.shape) != shape:
        raise ValueError(f"{name}: expected booleans of shape {shape}, got {given.dtype} {tuple(given.shape)}")


def _nig(input: Tensor) -> tuple[Tensor, ...]:
    """gamma, nu, alpha, beta, in single precision at least."""
    require.floating("input", input, at_least_dims=1)
    if input.shape[-1] != 4:
        raise ValueError(f"input: expected 4 outputs last, got shape {tuple(input.shape)}")
    gamma, *others = input.to(torch.promote_types(input.dtype, torch.float32)).unbind(-1)
    nu, more, beta = (F.softplus(other) + _FLOOR for other in others)
    return gamma, nu, 1 + more, beta


def _normal_wishart(input: Tensor, size: int) -> NormalWishart:
    require.floating("input", input, at_least_dims=1)
    below = size * (size + 1) // 2
    if input.shape[-1] != size + below + 2:
        wanted = f"{size + below + 2} outputs last for {size} targets"
        raise ValueError(f"input: expected {wanted}, got shape {tuple(input.shape)}")
    given = input.to(torch.promote_types(input.dtype, torch.float32))
    mean, entries, kappa, nu = given.split([size, below, 1, 1], -1)
    factor = entries.new_zeros(*entries.shape[:-1], size, size)
    factor[..., *torch.tril_indices(size, size, device=entries.device)] = entries
    diagonal = F.softplus(factor.diagonal(dim1=-2, dim2=-1)) + _FLOOR
    factor = factor.tril(-1) + torch.diag_embed(diagonal)
    return NormalWishart(
        mean, factor, F.softplus(kappa).squeeze(-1) + _FLOOR, size + 2 + F.softplus(nu).squeeze(-1) + _FLOOR
    )
