"""Comp-sum losses: one family that holds sum-exponential, cross-entropy, generalised cross-entropy and MAE.

All are Phi_tau(S) of one sum, S = sum_{k != y} exp(f_k - f_y), and tau says how hard to insist on a sample the model
gets wrong: exponentially at 0, linearly at 1 (cross-entropy), with a bound above 1 (generalised cross-entropy with
q = tau - 1), hardly at all at 2 (mean absolute error). Try tau from 1.3 to 1.7 where labels are wrong, and pay with
slower learning, the more so the more classes: `h_consistency_bound`, by which a small loss means few errors, is about
the same up to tau = 1 and weakens by num_classes^(tau - 1) beyond. On clean labels stay near 1. The smooth adversarial
form, for inputs under attack, adds how far an attack shifts the margins.
"""

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.losses._modes import evaluating
from lossary.losses._softmax import log_prob
from lossary.paper import Paper
from lossary.roles import loss, perturbation

PAPER = Paper(
    title="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    year=2023,
    helps=("label-noise", "adversarial-attacks"),
    departs=(
        "the attack searches l-infinity balls only and starts at a random point of the ball",
        "bounds and gaps are those of all measurable score functions; the paper's bounded scores are left out",
    ),
    equation=(
        r"\ell_\tau=\Phi_\tau\Bigl(\sum_{k\ne y}e^{f_k-f_y}\Bigr),\qquad "
        r"\Phi_\tau(S)=\frac{(1+S)^{1-\tau}-1}{1-\tau},\qquad\Phi_1(S)=\log(1+S)"
    ),
    url="https://proceedings.mlr.press/v202/mao23b.html",
)


@loss(
    on="classes",
    examples=({"tau": 1.7}, {"tau": 1.0}, {"tau": 2.0}, {"tau": 0.5}),
    tune={"tau": (1.0, 1.3, 1.7, 2.0)},
    limits={"cross_entropy": {"tau": 1.0}},
    xfail={"finite": "at tau < 1 the loss grows like p_y^(tau - 1), which overflows at such logits"},
)
def comp_sum_loss(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, tau: float | Tensor = 1.7
) -> Float[Tensor, "*batch"]:
    """Phi_tau(S) = ((1 + S)^(1 - tau) - 1) / (1 - tau), which is log(1 + S) at tau = 1. Per sample.

    As 1 + S = 1 / p_y, it is cross-entropy in nats at tau = 1 and (1 - p_y^q) / q with q = tau - 1 above. Below 1 it
    overflows single precision where -log p_y exceeds 88 / (1 - tau).

    Args:
        input: logits f.
        target: class numbers y, 0 to classes - 1.
        tau: 0 sum-exponential, 1 cross-entropy, between 1 and 2 generalised cross-entropy, 2 mean absolute error
            (1 - p_y, half the l1 distance); at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, tau below 0.

    >>> import torch
    >>> comp_sum_loss(torch.zeros(1, 4), torch.tensor([2]), tau=1.5)  # (1 - sqrt(1/4)) / 0.5
    tensor([1.])
    """
    require.number("tau", tau, at_least=0.0)
    return _phi(log_prob(input, target), tau)


@loss(
    on="classes",
    examples=({"tau": 1.0}, {"tau": 1.5, "rho": 0.5, "nu": 2.0}),
    limits={"cross_entropy": {"tau": 1.0, "rho": 1.0, "nu": 0.0}},
)
def smooth_adversarial_comp_sum_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    perturbed: Float[Tensor, "*batch classes"],
    tau: float | Tensor = 1.0,
    rho: float | Tensor = 1.0,
    nu: float | Tensor = 1.0,
) -> Float[Tensor, "*batch"]:
    """Phi_tau(sum_{k != y} exp((f_k - f_y) / rho)) + nu ||D' - D||_2, per sample, with margins D_k = f_y - f_k.

    The first term sees clean inputs alone, the second how far an attack shifts the margins, whichever way. Both sets
    of logits carry gradients: `perturbed` is model(margin_shift_attack(model, x, y, ...)).

    Args:
        input: logits f of the clean inputs.
        target: class numbers y, 0 to classes - 1.
        perturbed: logits of the attacked inputs, which give the margins D'.
        tau: as in `comp_sum_loss`.
        rho: temperature of the first term, above 0.
        nu: weight of the shift, at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> import torch
    >>> f, shifted = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]])
    >>> smooth_adversarial_comp_sum_loss(f, torch.tensor([0]), perturbed=shifted, nu=2.0)  # log 2 + 2 * 3
    tensor([6.6931])
    """
    require.number("tau", tau, at_least=0.0)
    require.number("rho", rho, above=0.0)
    require.number("nu", nu, at_least=0.0)
    log_p = log_prob(input, target, temperature=rho)
    require.same_shape("perturbed", perturbed, tuple(input.shape))
    return _phi(log_p, tau) + nu * _margin_shift(input, perturbed, target)


@perturbation(norm="inf", examples=({"epsilon": 0.1}, {"epsilon": 0.3, "steps": 3, "step_size": 0.2}))
def margin_shift_attack(
    model: nn.Module,
    x: Float[Tensor, "..."],
    y: Int[Tensor, "*batch"],
    *,
    generator: Generator,
    epsilon: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
) -> Float[Tensor, "..."]:
    """The inner maximum of `smooth_adversarial_comp_sum_loss`: inputs that shift the margins of y most.

    Projected gradient ascent on ||D(x') - D(x)||_2 within ||x' - x||_inf <= epsilon, by signed steps from a random
    start, since the shift has no slope at x itself. The model runs in evaluation mode and is left as it was.

    Args:
        model: gives logits (*batch, classes).
        x: its inputs.
        y: class numbers (*batch).
        generator: of the start.
        epsilon: radius of the ball, at least 0.
        steps: of ascent.
        step_size: None is epsilon / 4.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> import torch
    >>> x = torch.zeros(1, 2)
    >>> moved = margin_shift_attack(torch.nn.Identity(), x, torch.tensor([0]), generator=torch.Generator(), epsilon=0.5)
    >>> moved.abs()  # one up, the other down: the logits are the inputs
    tensor([[0.5000, 0.5000]])
    """
    require.floating("x", x)
    require.number("epsilon", epsilon, at_least=0.0)
    require.whole("steps", steps, at_least=1)
    step_size = epsilon / 4 if step_size is None else step_size
    require.number("step_size", step_size, at_least=0.0)
    x = x.detach()
    with evaluating(model):
        with torch.no_grad():
            before = model(x)
        require.integers("y", y, shape=before.shape[:-1])
        moved = x + epsilon * torch.empty_like(x).uniform_(-1, 1, generator=generator)
        for _ in range(steps):
            with torch.enable_grad():
                shift = _margin_shift(before, model(moved.requires_grad_()), y)
                (slope,) = torch.autograd.grad(shift.sum(), moved)
            moved = (moved.detach() + step_size * slope.sign()).clamp(x - epsilon, x + epsilon)
    return moved


def minimizability_gap(
    best_risk: float | Tensor, conditional: Float[Tensor, "*batch classes"], *, tau: float
) -> Tensor:
    """What keeps a set of models from the best conditional risk everywhere: best_risk - E inf_f E[Phi_tau | x].

    The infimum is over all scores at x; it is the conditional entropy at tau = 1 and
    ((sum_k p_k^(1 / (2 - tau)))^(2 - tau) - 1) / (1 - tau) at other tau below 2; from 2 on it is
    (1 - max_k p_k) / (tau - 1).

    Args:
        best_risk: the smallest expected `comp_sum_loss` that a model of the set attains.
        conditional: class probabilities p at each x, over which the mean is taken.
        tau: at least 0.

    Returns:
        A scalar, 0 for a set that holds every function.

    Raises:
        ValueError: `conditional` not floating-point, tau out of range.

    >>> import torch
    >>> minimizability_gap(0.5, torch.eye(3), tau=1.0)  # labels without noise: all of the risk is the models' fault
    tensor(0.5000)
    """
    require.floating("conditional", conditional, at_least_dims=1)
    _fixed_tau(tau)
    if tau == 1:
        least = -torch.xlogy(conditional, conditional).sum(-1)
    elif tau < 2:
        log_norm = (2 - tau) * torch.logsumexp(conditional.log() / (2 - tau), -1)
        least = log_norm.expm1() / (1 - tau)
    else:
        least = (1 - conditional.amax(-1)) / (tau - 1)
    return best_risk - least.mean()


def h_consistency_bound(surrogate: float | Tensor, *, tau: float, num_classes: int) -> Float[Tensor, "..."]:
    """Gamma_tau: the most errors beyond the best possible that a small loss leaves room for.

    For a complete, symmetric set H of models, with estimation error R(h) - inf_H R and minimizability gap M of each:
    zero-one estimation error + M_01 <= Gamma_tau(estimation error of comp_sum_loss + M_tau). Gamma_tau inverts

        tau = 1        ((1 + b) log(1 + b) + (1 - b) log(1 - b)) / 2
        0 <= tau < 2   c (1 - (((1 + b)^a + (1 - b)^a) / 2)^(1 / a)) / (1 - tau), a = 1 / (2 - tau)
        2 <= tau       num_classes^(1 - tau) b / (tau - 1)

    with c = 2^(1 - tau) below 1 and num_classes^(1 - tau) above. With two classes and tau up to 2 it is tight.

    Args:
        surrogate: estimation error plus gap of `comp_sum_loss`, at least 0, of any shape.
        tau: at least 0.
        num_classes: at least 2; the bound grows with it only for tau above 1.

    Returns:
        float64, 0 to 1, shaped as `surrogate`.

    Raises:
        ValueError: tau or num_classes out of range.

    >>> h_consistency_bound(0.02, tau=1.0, num_classes=10)  # near sqrt(2 * 0.02)
    tensor(0.1993, dtype=torch.float64)
    """
    _fixed_tau(tau)
    require.whole("num_classes", num_classes, at_least=2)
    surrogate = torch.as_tensor(surrogate, dtype=torch.float64)
    low, high = torch.zeros_like(surrogate), torch.ones_like(surrogate)
    for _ in range(53):  # bits of a double
        b = (low + high) / 2
        below = _least_excess(b, tau, num_classes) < surrogate
        low, high = torch.where(below, b, low), torch.where(below, high, b)
    return high


def _phi(log_p: Tensor, tau: float | Tensor) -> Tensor:
    """Phi_tau(1 / p - 1) = (1 - p^(tau - 1)) / (tau - 1), continued to -log p at tau = 1, with its slope in tau."""
    if not isinstance(tau, Tensor):
        return -log_p if tau == 1 else ((tau - 1) * log_p).expm1() / (1 - tau)
    u = (tau - 1) * log_p
    near = u.abs() < 0.01  # here the derivative of (e^u - 1) / u would cancel
    series = 1 + u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5)))
    apart = torch.where(near, 1.0, u)
    return -log_p * torch.where(near, series, apart.expm1() / apart)


def _margin_shift(before: Tensor, after: Tensor, target: Tensor) -> Tensor:
    """||D' - D||_2, where D_k = f_y - f_k; zero where nothing shifts, and so is its slope there."""
    shift = after - before
    return torch.linalg.vector_norm(shift - shift.gather(-1, target.unsqueeze(-1)), dim=-1)


def _least_excess(b: Tensor, tau: float, num_classes: int) -> Tensor:
    """T_tau(b): the least excess conditional risk of a score whose error exceeds the least by b."""
    if tau == 1:
        return (torch.xlogy(1 + b, 1 + b) + torch.xlogy(1 - b, 1 - b)) / 2
    if tau >= 2:
        return num_classes ** (1 - tau) * b / (tau - 1)
    a = 1 / (2 - tau)
    log_mean = torch.logaddexp(a * b.log1p(), a * (-b).log1p()) - torch.log(b.new_tensor(2.0))
    return -((2.0 if tau < 1 else num_classes) ** (1 - tau)) * (log_mean / a).expm1() / (1 - tau)


def _fixed_tau(tau: float) -> None:
    if isinstance(tau, Tensor):
        raise ValueError("tau: expected a number, got a tensor")
    require.number("tau", tau, at_least=0.0)
