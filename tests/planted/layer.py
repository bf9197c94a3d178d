"""One faulty layer per check of the layer battery: a linear map with something wrong."""

import time

import torch
from torch import nn

from lossary.roles import layer


class _Linear(nn.Module):
    """Right in itself; the faults below override a piece of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 6)

    def forward(self, input):
        if not input.is_floating_point():
            raise ValueError(f"input: expected a floating-point tensor, got {input.dtype}")
        return self.map(input)

    def map(self, input):
        return input @ self.weight


class _WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g


@layer()
class wrong_slope(_Linear):
    def map(self, input):
        return _WrongSlope.apply(super().map(input))


@layer()
class leaves_a_weight_idle(_Linear):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))


@layer()
class keeps_state_outside(_Linear):
    def __init__(self) -> None:
        super().__init__()
        self.gain = float(torch.rand(())) + 1.0

    def map(self, input):
        return self.gain * super().map(input)


@layer(random=True)
class drops_in_eval_mode(_Linear):
    def map(self, input):
        return nn.functional.dropout(super().map(input))


@layer()
class sleeps(_Linear):
    def map(self, input):
        time.sleep(1.1)
        return super().map(input)


@layer()
class overwrites(_Linear):
    def map(self, input):
        value = super().map(input)
        with torch.no_grad():
            input.mul_(2)
        return value


@layer()
class draws_globally(_Linear):
    def map(self, input):
        return super().map(input + 0.1 * torch.randn_like(input) if self.training else input)


@layer()
def rounds_in_single(input):
    return input * (1.0 if input.dtype == torch.float64 else 1.001)


@layer()
def overflows_in_bfloat16(input):
    return input / (0.0 if input.dtype == torch.bfloat16 else 1.0)


@layer()
def always_single(input):
    return input.float()


@layer()
def accepts_anything(input):
    return input * 1.0


@layer(examples=({"slope": 0.5},))
def accepts_any_slope(input, *, slope: float = 0.5):
    return input * slope


@layer(examples=({"slope": 0.5},))
def cuts_its_hyper_parameter(input, *, slope: float = 0.5):
    return input * float(torch.as_tensor(slope).detach())


@layer()
def says_nothing(input):
    return input * 1.0


FAULTS = {
    "gradient": wrong_slope,
    "learns": leaves_a_weight_idle,
    "restores": keeps_state_outside,
    "rests": drops_in_eval_mode,
    "quick": sleeps,
    "unmutated": overwrites,
    "repeatable": draws_globally,
    "dtypes_agree": rounds_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_slope,
    "tensor_hyper": cuts_its_hyper_parameter,
    "documented": says_nothing,
}
