"""One faulty loss per check of the loss battery."""

import time

import torch
import torch.nn.functional as F

from lossary.roles import loss


def _ce(input, target):
    return F.cross_entropy(input.movedim(-1, 1) if input.ndim > 2 else input, target, reduction="none")


@loss(on="classes")
def reduces(input, target):
    return _ce(input, target).mean()


class _WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g


@loss(on="classes")
def wrong_slope(input, target):
    return _WrongSlope.apply(_ce(input, target))


@loss(on="classes")
def overflows(input, target):
    return _ce(input, target).exp()


@loss(on="classes", limits={"cross_entropy": {"epsilon": 0.0}})
def misses_its_limit(input, target, *, epsilon: float = 1.0):
    return _ce(input, target) + epsilon + 0.01


@loss(on="classes")
def ranks_by_position(input, target):
    return _ce(input, target) * torch.arange(1, input.shape[-2] + 1, dtype=input.dtype)


@loss(on="classes")
def mixes_replicas(input, target):
    return _ce(input, target) / input.abs().amax()


@loss(on="classes")
def sleeps(input, target):
    time.sleep(1.1)
    return _ce(input, target)


@loss(on="classes")
def overwrites(input, target):
    value = _ce(input, target)
    with torch.no_grad():
        input.mul_(2)
    return value


@loss(on="classes")
def draws_globally(input, target):
    return _ce(input + 0.1 * torch.randn_like(input), target)


@loss(on="classes")
def rounds_in_single(input, target):
    return _ce(input, target) * (1.0 if input.dtype == torch.float64 else 1.001)


@loss(on="classes")
def overflows_in_bfloat16(input, target):
    return _ce(input, target) + (float("nan") if input.dtype == torch.bfloat16 else 0.0)


@loss(on="classes")
def always_single(input, target):
    return _ce(input, target).float()


@loss(on="classes")
def accepts_anything(input, target):
    return input.double().sum(-1) * 0


@loss(on="classes", examples=({"epsilon": 1.0},))
def accepts_any_epsilon(input, target, *, epsilon: float = 1.0):
    return _ce(input, target) * epsilon


@loss(on="classes", examples=({"epsilon": 1.0},))
def cuts_its_hyper_parameter(input, target, *, epsilon: float = 1.0):
    return _ce(input, target) * float(epsilon)


@loss(on="classes")
def says_nothing(input, target):
    return _ce(input, target)


FAULTS = {
    "per_sample": reduces,
    "gradient": wrong_slope,
    "finite": overflows,
    "limits": misses_its_limit,
    "order_free": ranks_by_position,
    "stacks": mixes_replicas,
    "quick": sleeps,
    "unmutated": overwrites,
    "repeatable": draws_globally,
    "dtypes_agree": rounds_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_epsilon,
    "tensor_hyper": cuts_its_hyper_parameter,
    "documented": says_nothing,
}
