"""RIDE: a few experts on shared early layers, told to disagree, and a router that runs only as many as a sample needs.

Each expert has late layers and a cosine classifier of its own and is trained on its own loss, with LDAM's margin, which
is wider for rarer classes. A diversity term pushes the experts apart, on rare classes more than on frequent ones, by a
temperature for each class; the prediction is the mean of their logits. Experts trained so err in different places, and
the mean varies less from one training set to another, on all classes. Use it on long tails where an ensemble would
help but is too dear. In a second stage, with the experts frozen, a router learns after each expert whether a further
one is worth running. Together with `DeferredReweighting` the loss is what the paper trains; gamma 0 and weights 1 are
its first four fifths.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.losses._softmax import log_prob
from lossary.paper import Paper
from lossary.roles import layer

PAPER = Paper(
    title="Long-tailed Recognition by Routing Diverse Distribution-Aware Experts",
    year=2021,
    helps=("class-imbalance",),
    departs=(
        "class temperatures are divided by the largest, as in the official code, which keeps them positive; the paper"
        " subtracts",
        "with diversity 0 every expert still has its own loss; the official code then trains their mean",
        "class weights, applied from outside, multiply the diversity term too",
        "no self-distillation",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\sum_i\Bigl[-\log\operatorname{softmax}(z_i-s\,m_y e_y)_y "
        r"-\lambda\,\bar T^2\operatorname{KL}(\bar p\,\|\,p_i)\Bigr],\qquad "
        r"p_i=\operatorname{softmax}(z_i/T)\\ "
        r"m_c&=m\Bigl(\frac{\min_j n_j}{n_c}\Bigr)^{1/4},\qquad "
        r"T_c\propto\gamma\,\frac{n_c}{\bar n}+1-\gamma,\qquad "
        r"\bar p=\operatorname{softmax}(\bar z/T) "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2010.01809",
)


def ride_loss(
    input: Float[Tensor, "*batch experts classes"],
    target: Int[Tensor, "*batch"],
    *,
    class_counts: Sequence[int] | Tensor,
    diversity: float = 0.2,
    gamma: float = 0.05,
    temperature: float = 1.0,
    max_margin: float = 0.5,
    scale: float = 30.0,
    against: str = "mean",
) -> Float[Tensor, "*batch"]:
    """Sum over experts of cross-entropy with a margin, minus diversity times how far they stray. In nats, per sample.

    sum_i [-log softmax(z_i - scale m_y onehot(y))_y - diversity mean(T)^2 D_i] with margins
    m_c = max_margin (min n / n_c)^(1/4) (LDAM), temperatures T_c proportional to gamma n_c / mean(n) + 1 - gamma, the
    largest being `temperature`, and p = softmax(z / T). D_i is

    - "mean": KL(p_bar || p_i), p_bar of the experts' mean logits: the official code, which holds p_bar fixed; summed
      over experts, p_bar's own gradient is 0
    - "experts": the mean over j != i of KL(p_i || p_j): the paper

    The term rewards disagreement without bound, so the logits should be bounded, as those of `MultiExpertHead` are.

    Args:
        input: logits z of each expert.
        target: class numbers y, 0 to classes - 1.
        class_counts: n_c, training rows of each class, (classes,). A class without rows is taken to have one.
        diversity: lambda >= 0; 0.2 is the official default, 0.45 on CIFAR100-LT.
        gamma: how much temperatures follow frequencies, from 0 to below 1, so that they stay positive. 0.015 to 0.05.
        temperature: alpha > 0.
        max_margin: margin of the rarest class, in cosine; 0 is cross-entropy.
        scale: of the cosine, by which margins are multiplied; not the logits, which carry it already.
        against: "mean" or "experts".

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range or a tensor.

    >>> z, y = torch.zeros(1, 2, 4), torch.tensor([2])
    >>> ride_loss(z, y, class_counts=(8, 8, 8, 8), max_margin=0.0)  # two experts, each log 4
    tensor([2.7726])
    """
    require.floating("input", input, at_least_dims=2)
    require.integers("target", target, shape=input.shape[:-2])
    numbers = {"diversity": diversity, "temperature": temperature, "max_margin": max_margin, "scale": scale}
    for name, value in {**numbers, "gamma": gamma}.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a number, got a tensor")
    require.number("diversity", diversity, at_least=0.0)
    require.number("gamma", gamma, at_least=0.0, below=1.0)
    require.number("temperature", temperature, above=0.0)
    require.number("max_margin", max_margin, at_least=0.0)
    require.number("scale", scale, above=0.0)
    require.one_of("against", against, ("mean", "experts"))
    counts = torch.as_tensor(class_counts, dtype=torch.float32, device=input.device).clamp(min=1)
    if counts.shape != input.shape[-1:]:
        raise ValueError(f"class_counts: expected {input.shape[-1]} numbers, got {tuple(counts.shape)}")

    margin = scale * max_margin * (counts.min() / counts) ** 0.25
    own = target.unsqueeze(-1).expand(input.shape[:-1])
    fit = log_prob(input, own, margin=margin.to(input.dtype)[own] if max_margin else 0.0)
    if not diversity:
        return -fit.sum(-1)

    shares = gamma * counts / counts.mean() + 1 - gamma
    heat = (temperature * shares / shares.max()).to(input.dtype)
    if against == "mean":  # sum_i KL(p_bar || p_i) = sum_i log sum exp(z_i / T) - experts * log sum exp(z_bar / T)
        apart = (input / heat).logsumexp(-1) - (input.mean(-2, keepdim=True) / heat).logsumexp(-1)
    else:
        log_p = F.log_softmax(input / heat, -1)
        others = (log_p.sum(-2, keepdim=True) - log_p) / max(1, input.shape[-2] - 1)
        apart = (log_p.exp() * (log_p - others)).sum(-1) * (input.shape[-2] > 1)
    return -fit.sum(-1) - diversity * heat.mean().square() * apart.sum(-1)


@layer(examples=({"in_features": 6, "width": 5}, {"in_features": 6, "width": 4, "experts": 2}))
class MultiExpertHead(nn.Module):
    """The experts: each has late layers of its own and a cosine classifier, logits scale * cos(features, w_c).

    The caller's early layers, shared by all, come before. The prediction is the mean of the experts' logits,
    `head(x).mean(-2)`. Reduced widths keep three experts about as dear as one whole network.

    Args:
        in_features: width of the input of the default blocks; not looked at where `block` is given.
        num_classes: at least 2.
        width: of an expert's features.
        experts: how many, 2 to 4 in the paper.
        scale: s of the cosine, > 0.
        block: block(i) makes the late layers of expert i, to (*batch, width); None is a linear layer and ReLU.

    Raises:
        ValueError: a number out of range.

    >>> head = MultiExpertHead(6, 4, width=5)
    >>> head(torch.ones(2, 6)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        width: int,
        experts: int = 3,
        scale: float = 30.0,
        block: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": (in_features, 1), "num_classes": (num_classes, 2), "width": (width, 1)}
        for name, (value, least) in {**sizes, "experts": (experts, 1)}.items():
            require.whole(name, value, at_least=least)
        if isinstance(scale, Tensor):
            raise ValueError("scale: expected a number, got a tensor")
        require.number("scale", scale, above=0.0)
        make = block or (lambda _: nn.Sequential(nn.Linear(in_features, width), nn.ReLU()))
        self.blocks = nn.ModuleList(make(i) for i in range(experts))
        self.weight = nn.Parameter(F.normalize(torch.empty(experts, num_classes, width).uniform_(-1, 1), dim=-1))
        self.scale = scale

    def expert(self, input: Tensor, i: int) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, "*batch classes"]]:
        """Features and logits of expert i alone."""
        features = self.blocks[i](input)
        return features, self.scale * F.normalize(features, dim=-1) @ F.normalize(self.weight[i], dim=-1).mT

    def features(self, input: Tensor) -> Float[Tensor, "*batch experts width"]:
        """Features of all experts."""
        require.floating("input", input, at_least_dims=1)
        return torch.stack([block(input) for block in self.blocks], dim=-2)

    def classify(self, features: Float[Tensor, "*batch experts width"]) -> Float[Tensor, "*batch experts classes"]:
        """Logits of all experts from their features."""
        features, weight = F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1)
        return self.scale * torch.einsum("...ef,ecf->...ec", features, weight)

    def forward(self, input: Tensor) -> Float[Tensor, "*batch experts classes"]:
        """Logits of all experts."""
        return self.classify(self.features(input))


class ExpertRouter(nn.Module):
    """After each expert but the last, a small network says whether the next one should be run.

    Gate i sees the features of expert i, at length 1, through a hidden layer of its own, and the `top` largest of the
    mean logits of the experts so far, through an output layer that all gates share. Gates are trained by
    `router_loss` in a second stage: nothing that they look at gets a gradient.

    Args:
        width: of an expert's features.
        experts: how many the head has, at least 2.
        hidden: width of the hidden layers.
        top: logits that a gate sees, at most as many as there are classes; 5 to 50 in the official code.

    Raises:
        ValueError: a number out of range, or features and logits that do not fit.

    >>> head, router = MultiExpertHead(6, 8, width=5), ExpertRouter(5)
    >>> features = head.features(torch.ones(2, 6))
    >>> gates = router(features, head.classify(features))
    >>> gates.shape  # run the second expert, the third
    torch.Size([2, 2])
    >>> logits, used = router.route(head, torch.ones(2, 6))
    >>> bool((used >= 1).all())
    True
    """

    def __init__(self, width: int, *, experts: int = 3, hidden: int = 16, top: int = 5) -> None:
        super().__init__()
        for name, value, least in (
            ("width", width, 1),
            ("experts", experts, 2),
            ("hidden", hidden, 1),
            ("top", top, 1),
        ):
            require.whole(name, value, at_least=least)
        self.hidden = nn.ModuleList(nn.Linear(width, hidden) for _ in range(experts - 1))
        self.output = nn.Linear(hidden + top, 1)
        self.top = top

    def forward(
        self, features: Float[Tensor, "*batch experts width"], logits: Float[Tensor, "*batch experts classes"]
    ) -> Float[Tensor, "*batch gates"]:
        """Gates in logits, above 0 to go on: one for each expert but the last."""
        require.floating("features", features, at_least_dims=2)
        require.floating("logits", logits, at_least_dims=2)
        experts = len(self.hidden) + 1
        for name, tensor in (("features", features), ("logits", logits)):
            if tensor.shape[:-1] != (*logits.shape[:-2], experts):
                raise ValueError(f"{name}: expected (*batch, {experts}, ...), got shape {tuple(tensor.shape)}")
        so_far = _running_mean(logits)
        return torch.stack([self._gate(i, features[..., i, :], so_far[..., i, :]) for i in range(experts - 1)], dim=-1)

    @torch.no_grad()
    def route(
        self, head: MultiExpertHead, input: Float[Tensor, "batch ..."]
    ) -> tuple[Float[Tensor, "batch classes"], Int[Tensor, " batch"]]:
        """Mean logits of the experts that a sample needs, and how many those are; the others are not run on it."""
        rows = torch.arange(len(input), device=input.device)
        used = torch.zeros_like(rows)
        for i in range(len(self.hidden) + 1):
            features, logits = head.expert(input[rows], i)
            total = logits if i == 0 else total.index_add(0, rows, logits)
            used[rows] += 1
            if i == len(self.hidden):
                break
            rows = rows[self._gate(i, features, total[rows] / (i + 1)) > 0]
            if not len(rows):
                break
        return total / used.unsqueeze(-1), used

    def _gate(self, i: int, features: Tensor, so_far: Tensor) -> Tensor:
        if so_far.shape[-1] < self.top:
            raise ValueError(f"logits: expected at least {self.top} classes, as top says, got {so_far.shape[-1]}")
        looks = self.hidden[i](F.normalize(features.detach(), dim=-1)).relu()
        confidence = so_far.detach().topk(self.top, dim=-1).values
        return self.output(torch.cat([confidence, looks], dim=-1)).squeeze(-1)


def router_loss(
    gates: Float[Tensor, "*batch gates"],
    logits: Float[Tensor, "*batch experts classes"],
    target: Int[Tensor, "*batch"],
    *,
    pos_weight: float = 100.0,
) -> Float[Tensor, "*batch"]:
    """Mean over gates of the binary cross-entropy to their targets, positives counting `pos_weight` times. In nats.

    Gate i should be on where the mean of experts 0 to i is wrong and that of some longer row, 0 to j > i, is right: the
    official code. (The paper asks whether a later expert alone is right.)

    Args:
        gates: from `ExpertRouter`.
        logits: of all experts; they get no gradient.
        target: class numbers, 0 to classes - 1.
        pos_weight: w_on > 0, 100 in the configurations; the larger, the more experts are run.

    Raises:
        ValueError: shapes or dtypes that do not fit, pos_weight out of range or a tensor.

    >>> logits = torch.tensor([[[0.0, 1.0], [3.0, 0.0]]])  # wrong, then right together
    >>> router_loss(torch.zeros(1, 1), logits, torch.tensor([0]), pos_weight=100.0)  # 100 log 2
    tensor([69.3147])
    """
    require.floating("logits", logits, at_least_dims=2)
    require.same_shape("gates", gates, (*logits.shape[:-2], logits.shape[-2] - 1))
    require.integers("target", target, shape=logits.shape[:-2])
    if isinstance(pos_weight, Tensor):
        raise ValueError("pos_weight: expected a number, got a tensor")
    require.number("pos_weight", pos_weight, above=0.0)
    right = _running_mean(logits).argmax(-1) == target.unsqueeze(-1)
    later = right.flip(-1).cummax(-1).values.flip(-1)  # by some row at least this long
    on = (~right[..., :-1] & later[..., 1:]).to(gates.dtype)
    weight = torch.where(on > 0, pos_weight, 1.0).to(gates.dtype)
    return F.binary_cross_entropy_with_logits(gates, on, weight=weight, reduction="none").mean(-1)


def _running_mean(logits: Tensor) -> Tensor:
    """Mean logits of experts 0 to i, for every i."""
    return logits.cumsum(-2) / torch.arange(1, logits.shape[-2] + 1, device=logits.device).unsqueeze(-1)
