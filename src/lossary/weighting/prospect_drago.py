"""Prospect: minimise a spectral risk, a weighted mean in which larger losses weigh more, with one step size to tune.

The k-th smallest of n losses has the k-th of n nondecreasing weights: CVaR, the extremile and the like. Taken over
mini-batches such a risk is biased, so that plain SGD stops short of its minimum. Prospect keeps a table of the last
loss, gradient and weight of every sample. Each step looks at one sample, corrects the table's gradient by how its own
has changed, as SAGA does, and recomputes all weights from the table's losses: neither bias nor variance is left
where it converges, which it does linearly for smooth convex losses with weight decay. Use it for linear models and
heads on frozen features, up to some ten thousand samples: the table holds a gradient per sample, and
every step sorts all losses.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.optim import Optimizer

from lossary import require
from lossary.paper import Paper
from lossary.weighting._worst_case import spectral_penalty

PAPER = Paper(
    title="Distributionally Robust Optimization with Bias and Variance Reduction",
    year=2023,
    helps=("worst-group", "train-test-shift"),
    departs=(
        "the loss that a step refreshes is that of the sample whose gradient it takes, as in the official code; the"
        " paper draws another",
        "weight decay is a proximal step, as in the official code; in the paper it is part of the gradient",
        "mini-batches, which the paper does not have",
        "only the chi-square penalty; and no Moreau variant for losses that are not smooth",
    ),
    equation=(
        r"\begin{aligned} "
        r"&\min_w\max_{q\in\mathcal P(\sigma)}\ \sum_i q_i\,\ell_i(w)-\nu n\,\lVert q-\tfrac1n\rVert^2 "
        r"+\tfrac\mu2\lVert w\rVert^2,\qquad w\leftarrow\frac{w-\eta v}{1+\eta\mu}\\ "
        r"&v=n\bigl(q_i\nabla\ell_i(w)-\rho_i g_i\bigr)+\sum_k\rho_k g_k,\qquad "
        r"g_k,\rho_k:\ \text{last gradient and weight of }k "
        r"\end{aligned}"
    ),
    url="https://openreview.net/pdf?id=TTrzgEZt9s",
)


def spectral_risk_weights(
    num_samples: int, *, risk: str = "cvar", level: float = 0.5, dtype: torch.dtype = torch.float64
) -> Float[Tensor, " n"]:
    """The spectrum sigma of a risk: its weights for the smallest to the largest of n losses; they sum to 1.

    sigma_k = F(k / n) - F((k - 1) / n), with F(t) = max(0, t - level) / (1 - level) for "cvar", the mean of the worst
    1 - level; t^level for "extremile", at whole levels the mean of the largest of so many losses; and
    (e^(level t) - 1) / (e^level - 1) for "esrm", the exponential spectral risk measure. The paper's are 0.5, 2 and 1.

    Args:
        num_samples: n.
        risk: "cvar", "extremile" or "esrm".
        level: in [0, 1) for CVaR, where 0 is the mean of all; >= 1 for the extremile, where 1 is; > 0 for ESRM.
        dtype: of the result.

    Raises:
        ValueError: an argument out of range.

    >>> spectral_risk_weights(4, risk="cvar", level=0.625)  # the worst loss and a half of the next
    tensor([0.0000, 0.0000, 0.3333, 0.6667], dtype=torch.float64)
    >>> spectral_risk_weights(2, risk="extremile", level=2.0)
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    require.whole("num_samples", num_samples, at_least=1)
    require.one_of("risk", risk, ("cvar", "extremile", "esrm"))
    t = torch.linspace(0, 1, num_samples + 1, dtype=torch.float64)
    if risk == "cvar":
        _number("level", level, at_least=0.0, below=1.0)
        below = (t - level).clamp(min=0) / (1 - level)
    elif risk == "extremile":
        _number("level", level, at_least=1.0)
        below = t**level
    else:
        _number("level", level, above=0.0)
        below = torch.expm1(level * (t - 1)) / -torch.expm1(torch.tensor(-level, dtype=torch.float64)) + 1
    return below.diff().to(dtype)


def penalized_permutahedron_max(
    losses: Float[Tensor, "*batch n"], spectrum: Float[Tensor, " n"], *, nu: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch n"]]:
    """max over q of q.l - nu n |q - 1/n|^2, q a mixture of permutations of the spectrum; and that q, as torch.max does.

    With nu = 0 this is the spectral risk itself. Otherwise q is the projection of 1/n + l / (2 nu n) onto the
    permutahedron, an isotonic regression along the sorted losses. The gradient of the value with respect to the
    losses is q; q carries none. Equal losses weigh the same; an infinite loss makes the value infinite.

    Args:
        losses: any number of rows, each a problem of its own.
        spectrum: nondecreasing weights that sum to 1, such as `spectral_risk_weights`.
        nu: price of the chi-square divergence from uniform weights, >= 0, in the unit of the losses; half of the
            official code's shift cost.

    Raises:
        ValueError: shapes or dtypes that do not fit, or nu below 0.

    >>> sigma = spectral_risk_weights(4, risk="cvar", level=0.5)
    >>> penalized_permutahedron_max(torch.tensor([1.0, 4.0, 2.0, 3.0]), sigma, nu=0.0)  # (3 + 4) / 2
    (tensor(3.5000), tensor([0.0000, 0.5000, 0.0000, 0.5000]))
    >>> penalized_permutahedron_max(torch.tensor([1.0, 4.0, 2.0, 3.0]), sigma, nu=2.0)
    (tensor(2.6562), tensor([0.1562, 0.3438, 0.2188, 0.2812]))
    """
    require.floating("losses", losses, at_least_dims=1)
    _number("nu", nu, at_least=0.0)
    q = spectral_penalty(losses, spectrum, nu)
    n = losses.shape[-1]
    return (q * losses).sum(-1) - nu * n * (q - 1 / n).square().sum(-1), q


class Prospect(Optimizer):
    """Minimise max_q q.l(w) - nu n |q - 1/n|^2 + weight_decay |w|^2 / 2 over a spectrum's permutahedron.

    A step draws a sample i, looks up its loss and gradient g at w, and moves along v = n (q_i g - rho_i g_i) + gbar:
    g_i is the gradient that the table has for i, rho_i the weight with which it went in, and gbar = sum_k rho_k g_k.
    Then w <- (w - lr v) / (1 + lr weight_decay), the table takes g, q_i and the new loss of i, and q is recomputed.
    With batch_size b, n becomes n / b and differences are summed over b distinct samples. The first step fills the
    table, by one look at every sample.

        prospect = Prospect(model.parameters(), sigma, nu=1.0, lr=0.01, weight_decay=1 / n, generator=g)
        for _ in range(100 * n):
            prospect.step(lambda index: loss(model(x[index]), y[index]))

    The `state_dict` holds the tables; memory is n times that of the parameters.

    Args:
        params: parameters or groups; a group may have its own lr and weight_decay.
        spectrum: sigma, (n,), such as `spectral_risk_weights`.
        nu: price of the chi-square divergence from uniform weights, >= 0; the guarantee needs > 0.
        lr: eta, > 0, the one number to tune.
        weight_decay: mu, >= 0; the paper has 1/n; the guarantee needs > 0.
        batch_size: samples of a step, 1 in the paper.
        generator: draws the samples.

    Raises:
        ValueError: an argument out of range, or an oracle that does not give a loss for each sample.

    >>> x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    >>> w = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    >>> sigma = spectral_risk_weights(3, risk="extremile", level=2.0)
    >>> prospect = Prospect([w], sigma, nu=1.0, lr=0.1, generator=torch.Generator().manual_seed(0))
    >>> for _ in range(600):
    ...     risk = prospect.step(lambda index: (w - x[index]) ** 2 / 2)
    >>> optimum = penalized_permutahedron_max((w - x) ** 2 / 2, sigma, nu=1.0)[1] @ x
    >>> abs(w.item() - optimum.item()) < 1e-9
    True
    """

    def __init__(
        self,
        params: Any,
        spectrum: Float[Tensor, " n"],
        *,
        nu: float = 1.0,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        batch_size: int = 1,
        generator: Generator,
    ) -> None:
        require.floating("spectrum", spectrum, dims=1)
        _number("nu", nu, at_least=0.0)
        require.whole("batch_size", batch_size, at_least=1, at_most=len(spectrum))
        if not isinstance(generator, Generator):
            raise ValueError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        self.spectrum, self.nu, self.batch_size, self.generator = spectrum, nu, batch_size, generator
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        own = ("spectrum", "nu", "batch_size", "generator")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _number("lr", param_group.get("lr", self.defaults["lr"]), above=0.0)
        _number("weight_decay", param_group.get("weight_decay", self.defaults["weight_decay"]), at_least=0.0)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, oracle: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """Take a step, and return the risk that the table's losses have after it, without weight decay.

        Args:
            oracle: oracle(index) gives the losses (k,) of the samples index (k,), 0 to n - 1, with their graph.
        """
        n, params = len(self.spectrum), self._params()
        if any("table" not in self.state[p] for p in params):
            self._fill(oracle)
        shared = self.state[params[0]]
        index = torch.randperm(n, generator=self.generator, device=self.generator.device)[: self.batch_size]
        index = index.to(params[0].device)
        losses, gradients = _look(oracle, index, params)
        q, past = shared["weights"][index], shared["past"][index]
        fresh = iter(gradients)
        for group in self.param_groups:
            for p in group["params"]:
                own, g = self.state[p], next(fresh)
                change = torch.tensordot(q, g, 1) - torch.tensordot(past, own["table"][index], 1)
                p.sub_(n / self.batch_size * change + own["mean"], alpha=group["lr"])
                p.div_(1 + group["lr"] * group["weight_decay"])
                own["table"][index] = g
                own["mean"] += change
        shared["losses"][index], shared["past"][index] = losses.to(q.dtype), q
        risk, shared["weights"] = penalized_permutahedron_max(shared["losses"], self.spectrum, nu=self.nu)
        return risk

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _fill(self, oracle: Callable[[Tensor], Tensor]) -> None:
        """Tables from one look at every sample."""
        params = self._params()
        everyone = torch.arange(len(self.spectrum), device=params[0].device)
        looks = [_look(oracle, index, params) for index in everyone.split(256)]
        losses = torch.cat([values for values, _ in looks]).to(params[0].dtype)
        _, q = penalized_permutahedron_max(losses, self.spectrum, nu=self.nu)
        self.state[params[0]].update(losses=losses, weights=q, past=q)
        for k, p in enumerate(params):
            table = torch.cat([gradients[k] for _, gradients in looks])
            self.state[p].update(table=table, mean=torch.tensordot(q, table, 1))


def _look(oracle: Callable[[Tensor], Tensor], index: Tensor, params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Losses (k,) of k samples, and their gradients (k, ...) with respect to every parameter."""
    with torch.enable_grad():
        losses = oracle(index)
    if losses.shape != index.shape:
        raise ValueError(f"oracle: expected losses of shape {tuple(index.shape)}, got {tuple(losses.shape)}")
    each = torch.eye(len(index), dtype=losses.dtype, device=losses.device)
    gradients = torch.autograd.grad(losses, params, each, is_grads_batched=True, materialize_grads=True)
    return losses.detach(), list(gradients)


def _number(name: str, value: Any, **bounds: float) -> None:
    """A number within bounds, no tensor: what is learned here gives none of these a gradient."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor")
    require.number(name, value, **bounds)
