"""SAM: step with the gradient taken a little uphill, so that training settles where the loss is flat.

Every step climbs to the worst point in a ball of radius rho, which to first order lies along the gradient, takes
the gradient there, returns, and lets a base optimizer step with it. Try it when the network fits its training set
and generalises less well than you would like, above all with noisy labels. It costs two gradients a step: under a
fixed budget it must beat the same optimizer run twice as long, and it helps little where the training set is not
fitted anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lossary import require
from lossary.paper import Paper
from lossary.roles import optimizer

PAPER = Paper(
    title="Sharpness-Aware Minimization for Efficiently Improving Generalization",
    year=2021,
    helps=("overfitting", "label-noise"),
    departs=(
        "only the 2-norm of eq. 2, the one the experiments use",
        "weight decay is the base optimizer's, at w; the official code has it inside the loss that is perturbed",
        "adaptive=True is the later ASAM without its eta",
    ),
    equation=(
        r"\min_w\max_{\lVert\epsilon\rVert_2\le\rho}L(w+\epsilon),\qquad "
        r"w\leftarrow w-\eta\,\nabla L\Bigl(w+\rho\,\frac{\nabla L(w)}{\lVert\nabla L(w)\rVert_2}\Bigr)"
    ),
    url="https://arxiv.org/abs/2010.01412",
)


@optimizer(
    examples=({"rho": 0.05, "lr": 0.1}, {"rho": 0.5, "adaptive": True, "lr": 0.05, "momentum": 0.9}),
    tune={"rho": (0.02, 0.05, 0.1, 0.2)},
)
class SAM(Optimizer):
    """Sharpness-aware minimisation around any optimizer: base steps with the gradient at w + e(w), eq. 3.

    `step(closure)` evaluates the closure twice; it clears the gradients, computes the loss and its gradients, and
    returns the loss. Without closures, call `first_step()` after the first backward pass and `second_step()` after
    the second, with the gradients cleared between. Under DDP the perturbation is that of the whole batch; with the
    first pass inside `model.no_sync()` each process has its own, as in the paper.

    Args:
        params: parameters or groups, as for any optimizer; a group may have its own rho.
        base: makes the optimizer that takes the step, as base(params, **options).
        rho: radius of the ball, >= 0; 0 is the base optimizer.
        adaptive: measure the ball in units of |w| (ASAM), which wants a rho ten times larger or more.
        replicas: the leading dimension of every parameter is a stack of models, each with a norm of its own.
        model: its batch-norm running statistics are updated in the first evaluation only, as in the official
            code; None updates them in both.
        **options: for the base optimizer, its learning rate among them.

    Raises:
        ValueError: rho below 0 or not a number, no closure, or what the base optimizer refuses.

    >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> sam = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    >>> def closure():
    ...     sam.zero_grad()
    ...     loss = 0.5 * (w**2).sum()
    ...     loss.backward()
    ...     return loss
    >>> _ = sam.step(closure)
    >>> w.data  # w - 0.1 (w + 0.5 w / |w|)
    tensor([2.6700, 3.5600])
    """

    def __init__(
        self,
        params: Any,
        base: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        replicas: bool = False,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.base = base(params, **options)
        self.adaptive, self.replicas, self.model = adaptive, replicas, model
        self._home: list[tuple[Tensor, Tensor]] = []
        self._paused: list[_BatchNorm] = []
        super().__init__(self.base.param_groups, {**self.base.defaults, "rho": rho})
        self._share()

    def _share(self) -> None:
        """Let the base optimizer work on these very groups and states, so that one state_dict holds both."""
        self.base.param_groups, self.base.state = self.param_groups, self.state

    def __getstate__(self) -> dict[str, Any]:
        own = ("base", "adaptive", "replicas", "model", "_home", "_paused")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check(param_group.get("rho", self.defaults["rho"]))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step and return the loss of the first evaluation."""
        if closure is None:
            raise ValueError("closure: expected a function that computes the loss and its gradients, got None")
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step()
        try:
            closure()
        except BaseException:
            self._return()
            raise
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb from w to w + e(w), and pause the model's running statistics."""
        if self._home:
            raise RuntimeError("first_step: expected second_step before it is called again")
        moving = [(p, group["rho"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        climbers = [p for p, _ in moving]
        units = sam_perturbation(
            climbers, [p.grad for p in climbers], rho=1.0, adaptive=self.adaptive, replicas=self.replicas
        )
        for (p, rho), unit in zip(moving, units, strict=True):
            self._home.append((p, p.clone()))
            p.add_(unit, alpha=rho)
        if self.model is not None:
            self._paused = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
            for module in self._paused:
                module.track_running_stats = False

    @torch.no_grad()
    def second_step(self) -> None:
        """Return to w, and let the base optimizer step with the gradients of w + e(w)."""
        self._return()
        self.base.step()

    def _return(self) -> None:
        for p, home in self._home:
            p.copy_(home)
        for module in self._paused:
            module.track_running_stats = True
        self._home, self._paused = [], []


def sam_perturbation(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    replicas: bool = False,
) -> list[Tensor]:
    """The step to the worst point in the ball, to first order: e(w) = rho g / |g|, eq. 2 with p = 2.

    With `adaptive`, e(w) = rho w^2 g / |w g|, elementwise products. The norm is over all tensors together; a
    gradient of 0 gives 0. Each e carries no gradient and has the shape and dtype of its parameter.

    Args:
        params: w, any shapes.
        grads: g, as many and of the same shapes.
        rho: radius of the ball, >= 0.
        adaptive: measure the ball in units of |w|.
        replicas: a norm for each index of the leading dimension, which all tensors share.

    Raises:
        ValueError: rho below 0, or gradients that do not fit the parameters.

    >>> sam_perturbation([torch.zeros(2), torch.zeros(1)], [torch.tensor([2.0, 0.0]), torch.tensor([-1.5])], rho=0.5)
    [tensor([0.4000, 0.0000]), tensor([-0.3000])]
    """
    _check(rho)
    if [p.shape for p in params] != [g.shape for g in grads]:
        raise ValueError(
            f"grads: expected the shapes of params, {[tuple(p.shape) for p in params]}, "
            f"got {[tuple(g.shape) for g in grads]}"
        )
    if replicas and len({p.shape[:1] for p in params}) > 1:
        raise ValueError(
            f"params: expected one leading dimension for all with replicas, got {[tuple(p.shape) for p in params]}"
        )
    if not params:
        return []
    with torch.no_grad():
        weighted = [w.abs() * g for w, g in zip(params, grads)] if adaptive else grads
        norms = torch.stack([_norm(g, replicas).to(params[0].device) for g in weighted])
        scale = rho / (torch.linalg.vector_norm(norms, dim=0) + 1e-12)
        climbs = [w.abs() * g for w, g in zip(params, weighted)] if adaptive else grads
        return [(g * _beside(g, scale.to(g.device), replicas)).to(w) for w, g in zip(params, climbs)]


def _norm(g: Tensor, replicas: bool) -> Tensor:
    """2-norm of each replica of a gradient, (replicas,), or of all of it, (1,), in at least single precision."""
    rows = g.reshape(len(g) if replicas else 1, -1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(g.dtype, torch.float32))


def _beside(g: Tensor, scale: Tensor, replicas: bool) -> Tensor:
    """The scale, as shaped by `_norm`, so that it broadcasts over a gradient."""
    return scale.view(-1, *[1] * (g.ndim - 1)) if replicas else scale.squeeze(0)


def _check(rho: Any) -> None:
    if isinstance(rho, Tensor):
        raise ValueError("rho: expected a number, got a tensor, which would get no gradient")
    require.number("rho", rho, at_least=0.0)
