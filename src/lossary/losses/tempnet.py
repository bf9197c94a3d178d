"""TempNet: a small network that reads off the logits how far each sample's softmax should be cooled or heated.

tau times the cross-entropy at temperature tau, plus tau (rho - log K), is the dual of a robust loss: an adversary may
put the weight of the K comparisons with the true class where it hurts, but no further than KL rho from uniform. Its
best tau differs from sample to sample. `robust_temperature_loss` finds it exactly, which needs the label; TempNet
learns to predict it from the logits alone, so that it serves prediction too: divide the logits by it. Try it for
language models and other tasks with many classes in which some contexts leave one answer and others many, jointly
with the model or on top of a frozen one. rho needs tuning, between 0 and log K. The tau that is robust is not the tau
that calibrates: where probabilities are all you want, fit one temperature on held-out data first."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.losses._softmax import log_prob
from lossary.paper import Paper
from lossary.roles import layer, loss

PAPER = Paper(
    title="To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO",
    year=2024,
    helps=("overconfidence",),
    departs=(
        "TempNet always sees logits less their maximum; the official code subtracts it when generating but not when"
        " training",
        "the contrastive form, which compares a pair with the other pairs of its batch, is left out",
        "the exact minimum over temperatures is found by halving; the Newton steps in the official code are unused",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell_\tau&=\tau\log\Bigl(\frac1K\sum_{k=1}^K e^{(h_k-h_y)/\tau}\Bigr)+\tau\rho,\qquad "
        r"\tau=\tau_{\min}+(\tau_{\max}-\tau_{\min})\,\sigma\bigl(u_\phi(h)\bigr)\\ "
        r"\min_{\tau}\ell_\tau&=\max_{p:\,\operatorname{KL}(p\,\|\,1/K)\le\rho}\ \sum_k p_k\,(h_k-h_y) "
        r"\end{aligned}"
    ),
    url="https://github.com/zhqiu/TempNet",
)

_HALVINGS = 40


@loss(on="classes", examples=({}, {"tau": 0.5, "rho": 0.7}, {"tau": 3.0, "rho": 1.5}))
def tau_cross_entropy(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    tau: float | Tensor = 1.0,
    rho: float | Tensor = 0.0,
) -> Float[Tensor, "*batch"]:
    """tau log(1/K sum_k exp((h_k - h_y) / tau)) + tau rho, the robust loss's dual at a given tau. Per sample.

    It is tau times cross-entropy at temperature tau, plus (rho - log K) tau; at tau = 1 and rho = log K it is
    cross-entropy. Convex in tau.

    Args:
        input: logits h of K classes.
        target: class numbers y, 0 to K - 1.
        tau: temperature, above 0; a tensor holds one for all samples, (), or one for each, (*batch), as TempNet
            predicts it, and gets its gradient.
        rho: how far from uniform the adversary may go, in nats, at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, tau not above 0, rho below 0.

    >>> import torch
    >>> tau_cross_entropy(torch.tensor([[0.0, 2.0]]), torch.tensor([0]), tau=2.0, rho=0.5)  # 2 log((1 + e) / 2) + 1
    tensor([2.2402])
    """
    require.number("tau", tau, above=0.0)
    require.number("rho", rho, at_least=0.0)
    return tau * (rho - math.log(input.shape[-1]) - log_prob(input, target, temperature=tau))


@loss(
    on="classes",
    examples=({"rho": 0.5}, {"rho": 1.5, "tau_min": 0.3, "tau_max": 2.0}),
    tune={"rho": (0.3, 1.0, 2.0)},
)
def robust_temperature_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    rho: float | Tensor = 1.0,
    tau_min: float = 0.01,
    tau_max: float = 100.0,
) -> Float[Tensor, "*batch"]:
    """The smallest `tau_cross_entropy` over tau_min <= tau <= tau_max. Per sample.

    Where tau is not at an end, it equals max over p of sum_k p_k (h_k - h_y) with KL(p, uniform) <= rho, and the
    maximising p is the softmax at the best tau. That tau is found to rounding, at the price of forty softmaxes, and
    then held fixed, which leaves first derivatives exact (Danskin's theorem); second ones do not see it move.

    Args:
        input: logits h of K classes.
        target: class numbers y, 0 to K - 1.
        rho: radius of the adversary's ball in nats, at least 0; from log K on nothing binds it but tau_min.
        tau_min: smallest temperature, above 0; KL is then charged at this price beyond the ball.
        tau_max: largest, at least tau_min.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> import torch
    >>> robust_temperature_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), rho=math.log(2))  # free: the worst gap
    tensor([1.])
    """
    require.classes(input, target)
    require.number("rho", rho, at_least=0.0)
    require.number("tau_min", tau_min, above=0.0)
    require.number("tau_max", tau_max, at_least=tau_min)
    _fixed(tau_min=tau_min, tau_max=tau_max)
    with torch.no_grad():
        tau = _best_temperature(input, rho, tau_min, tau_max)
    return tau_cross_entropy(input, target, tau=tau, rho=rho)


@layer(shape=(4, 7), random=True, examples=({"hidden": 8}, {"hidden": 5, "tau_min": 0.5, "tau_max": 5.0}))
class TempNet(nn.Module):
    """Predicts a temperature for each sample from its logits: (*batch, num_classes) to (*batch).

    The logits, less their maximum and scaled to length 1, pass through linear, sigmoid, dropout, linear to z;
    attention a = softmax(z / e^s) with a learned s pools them to u = w . ((a - 1/hidden) z) + c, and
    tau = tau_min + (tau_max - tau_min) sigmoid(u). w starts at 1, s and c at 0.

    Scaling to length 1 makes it blind to how large the logits are: it tells shapes apart.

        tau = tempnet(logits.detach())
        tau_cross_entropy(logits, labels, tau=tau, rho=rho).mean().backward()

    trains both the model and TempNet; leave the model's parameters out of the optimizer to train TempNet alone.

    Args:
        num_classes: K, the size of the vocabulary.
        hidden: width.
        tau_min: lower end of the range, above 0. The official code has 0.01 to 2 for LLaMA, 0.5 to 5 for GPT-2.
        tau_max: upper end, above tau_min.
        dropout: rate, 0 to below 1, in training mode.

    Raises:
        ValueError: a hyper-parameter out of range, logits of another width.

    >>> import torch
    >>> tempnet = TempNet(5, tau_min=0.5, tau_max=2.0).eval()
    >>> tau = tempnet(torch.tensor([[9.0, 1.0, 0.0, 0.0, 2.0]]))
    >>> bool(0.5 < tau < 2.0)
    True
    """

    def __init__(
        self,
        num_classes: int,
        *,
        hidden: int = 256,
        tau_min: float = 0.01,
        tau_max: float = 2.0,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        require.whole("num_classes", num_classes, at_least=2)
        require.whole("hidden", hidden, at_least=1)
        require.number("tau_min", tau_min, above=0.0)
        require.number("tau_max", tau_max, above=tau_min)
        require.number("dropout", dropout, at_least=0.0, below=1.0)
        _fixed(tau_min=tau_min, tau_max=tau_max, dropout=dropout)
        self.tau_min, self.tau_max = tau_min, tau_max
        self.project = nn.Sequential(
            nn.Linear(num_classes, hidden), nn.Sigmoid(), nn.Dropout(dropout), nn.Linear(hidden, hidden)
        )
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.pool = nn.Linear(hidden, 1)
        nn.init.ones_(self.pool.weight)
        nn.init.zeros_(self.pool.bias)

    def forward(self, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
        """Temperatures, between tau_min and tau_max."""
        require.floating("logits", logits, at_least_dims=1)
        width = self.project[0].in_features
        if logits.shape[-1] != width:
            raise ValueError(f"logits: expected {width} classes last, got shape {tuple(logits.shape)}")
        z = self.project(F.normalize(logits - logits.amax(-1, keepdim=True), dim=-1))
        attention = torch.softmax(z / self.log_scale.exp(), -1)
        u = self.pool((attention - 1 / z.shape[-1]) * z).squeeze(-1)
        return self.tau_min + (self.tau_max - self.tau_min) * torch.sigmoid(u)

    @torch.no_grad()
    def process_logits(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """scores / tau, as a logits processor of transformers: LogitsProcessorList([tempnet.process_logits])."""
        return scores / self(scores).unsqueeze(-1)


def _best_temperature(
    logits: Float[Tensor, "*batch classes"], rho: float | Tensor, tau_min: float, tau_max: float
) -> Float[Tensor, "*batch"]:
    """Where KL(softmax(logits / tau), uniform), which falls with tau, crosses rho, within the bounds.

    The slope of `tau_cross_entropy` by tau is rho less this KL, whatever the label.
    """
    low = torch.full_like(logits[..., 0], math.log(tau_min))
    high = torch.full_like(low, math.log(tau_max))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        log_p = torch.log_softmax(logits / middle.exp().unsqueeze(-1), -1)
        too_sharp = torch.linalg.vecdot(log_p.exp(), log_p) + math.log(logits.shape[-1]) > rho
        low, high = torch.where(too_sharp, middle, low), torch.where(too_sharp, high, middle)
    return ((low + high) / 2).exp()


def _fixed(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a number, got a tensor")
