"""One faulty optimizer per check of the optimizer battery: gradient descent with something wrong."""

import time

import torch

from lossary.roles import optimizer


class _Descent(torch.optim.Optimizer):
    """Gradient descent with heavy-ball momentum 0.5, right in itself; the faults below override a piece of it."""

    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group["lr"])
        return loss

    def move(self, p, lr):
        velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
        velocity.mul_(0.5).add_(p.grad)
        p.sub_(velocity, alpha=lr)


@optimizer(examples=({"lr": 0.1},))
class climbs(_Descent):
    def move(self, p, lr):
        p.add_(p.grad, alpha=lr)


@optimizer(examples=({"lr": 0.1},))
class forgets_its_velocity(_Descent):
    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, lr)
        self.velocity = {}

    def move(self, p, lr):
        velocity = self.velocity.setdefault(p, torch.zeros_like(p))
        velocity.mul_(0.5).add_(p.grad)
        p.sub_(velocity, alpha=lr)


@optimizer(examples=({"lr": 0.1},))
class decays_what_has_no_gradient(_Descent):
    def step(self, closure):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.999)
        return super().step(closure)


@optimizer(examples=({"lr": 0.1},))
class reads_one_learning_rate(_Descent):
    def move(self, p, lr):
        super().move(p, self.defaults["lr"])


@optimizer(examples=({"lr": 0.1},))
class returns_nothing(_Descent):
    def step(self, closure):
        super().step(closure)


@optimizer(examples=({"lr": 0.1},))
class copies_its_learning_rate(_Descent):
    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, lr)
        self.lr = lr

    def move(self, p, lr):
        super().move(p, self.lr)


@optimizer(examples=({"lr": 0.1},))
class normalises_over_the_stack(_Descent):
    def move(self, p, lr):
        p.sub_(p.grad / p.grad.norm().clamp(min=1.0), alpha=lr)


@optimizer(examples=({"lr": 0.1},))
class sleeps(_Descent):
    def move(self, p, lr):
        time.sleep(0.06)
        super().move(p, lr)


@optimizer(examples=({"lr": 0.1},))
class draws_globally(_Descent):
    def move(self, p, lr):
        p.sub_(p.grad + 0.01 * torch.randn_like(p), alpha=lr)


@optimizer(examples=({"lr": 0.1},))
class steps_further_in_single(_Descent):
    def move(self, p, lr):
        super().move(p, lr if p.dtype == torch.float64 else 1.01 * lr)


@optimizer(examples=({"lr": 0.1},))
class overflows_in_bfloat16(_Descent):
    def move(self, p, lr):
        super().move(p, lr if p.dtype != torch.bfloat16 else float("inf"))


@optimizer(examples=({"lr": 0.1},))
class turns_to_single(_Descent):
    def move(self, p, lr):
        super().move(p, lr)
        p.data = p.data.float()


@optimizer(examples=({"damping": 0.1},))
class accepts_any_damping(_Descent):
    def __init__(self, params, lr: float = 0.1, *, damping: float = 0.1):
        super().__init__(params, lr / (1 + damping))


@optimizer(examples=({"damping": 0.1},))
class cuts_its_hyper_parameter(_Descent):
    def __init__(self, params, lr: float = 0.1, *, damping: float = 0.1):
        super().__init__(params, lr / (1 + float(torch.as_tensor(damping).detach())))


@optimizer(examples=({"lr": 0.1},))
class says_nothing(_Descent):
    pass


FAULTS = {
    "converges": climbs,
    "resumes": forgets_its_velocity,
    "missing_gradients": decays_what_has_no_gradient,
    "groups": reads_one_learning_rate,
    "returns_loss": returns_nothing,
    "schedules": copies_its_learning_rate,
    "stacks": normalises_over_the_stack,
    "quick": sleeps,
    "repeatable": draws_globally,
    "dtypes_agree": steps_further_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": turns_to_single,
    "refuses_hyper": accepts_any_damping,
    "tensor_hyper": cuts_its_hyper_parameter,
    "documented": says_nothing,
}
