"""One faulty perturbation per check of the perturbation battery."""

import time

import torch
import torch.nn.functional as F

from lossary.roles import perturbation


def _fgsm(model, x, y, epsilon=0.1):
    """One signed gradient step; every fault below is this with a mistake."""
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    for module, mode in zip(model.modules(), modes):
        module.training = mode
    return x.detach() + epsilon * slope.sign()


@perturbation()
def does_nothing(model, x, y):
    return x.clone()


@perturbation(norm="inf")
def steps_too_far(model, x, y, *, epsilon: float = 0.1):
    return _fgsm(model, x, y, 0.1)


@perturbation()
def leaves_eval_mode(model, x, y):
    model.eval()
    return _fgsm(model, x, y)


@perturbation()
def forgets_to_enable_grad(model, x, y):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return x.detach() + slope


@perturbation()
def steps_along_the_batch_gradient(model, x, y):
    step = _fgsm(model, x, y) - x
    return x + step / step.norm() * x.norm()


@perturbation()
def sleeps(model, x, y):
    time.sleep(1.1)
    return _fgsm(model, x, y)


@perturbation()
def overwrites(model, x, y):
    return x.add_(0.1).clone()


@perturbation()
def draws_globally(model, x, y):
    return x + 0.1 * torch.randn_like(x)


@perturbation()
def overflows_in_bfloat16(model, x, y):
    return _fgsm(model, x, y) + (float("nan") if x.dtype == torch.bfloat16 else 0.0)


@perturbation()
def always_single(model, x, y):
    return _fgsm(model, x, y).float()


@perturbation()
def accepts_anything(model, x, y):
    return x + 1


@perturbation()
def accepts_any_epsilon(model, x, y, *, epsilon: float = 0.1):
    return _fgsm(model, x, y, epsilon)


@perturbation()
def says_nothing(model, x, y):
    return _fgsm(model, x, y)


FAULTS = {
    "perturbs": does_nothing,
    "inside_ball": steps_too_far,
    "model_restored": leaves_eval_mode,
    "works_without_grad": forgets_to_enable_grad,
    "rows_apart": steps_along_the_batch_gradient,
    "quick": sleeps,
    "unmutated": overwrites,
    "repeatable": draws_globally,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_epsilon,
    "documented": says_nothing,
}
