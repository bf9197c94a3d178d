"""One faulty penalty per check of the penalty battery."""

import time

import torch

from lossary.roles import penalty


@penalty(on="features")
def keeps_the_batch(features):
    return features.square().sum(-1)


@penalty(on="features")
def rewards(features):
    return -features.square().mean()


class _WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g


@penalty(on="features")
def wrong_slope(features):
    return _WrongSlope.apply(features).mean()


@penalty(on="module")
def leaves_gradients(module, x):
    loss = module(x).square().mean()
    loss.backward(retain_graph=True)
    return loss


@penalty(on="features")
def ranks_by_position(features):
    return (features.square().mean(-1) * torch.arange(1, len(features) + 1, dtype=features.dtype)).mean()


@penalty(on="features")
def sleeps(features):
    time.sleep(1.1)
    return features.square().mean()


@penalty(on="features")
def overwrites(features):
    value = features.square().mean()
    with torch.no_grad():
        features.mul_(2)
    return value


@penalty(on="features")
def draws_globally(features):
    return (features + torch.randn_like(features)).square().mean()


@penalty(on="features")
def rounds_in_single(features):
    return features.square().mean() * (1.0 if features.dtype == torch.float64 else 1.001)


@penalty(on="features")
def overflows_in_bfloat16(features):
    return features.square().mean() + (float("nan") if features.dtype == torch.bfloat16 else 0.0)


@penalty(on="features")
def always_single(features):
    return features.square().mean().float()


@penalty(on="features")
def accepts_anything(features):
    return features.double().square().mean()


@penalty(on="features", examples=({"weight": 1.0},))
def accepts_any_weight(features, *, weight: float = 1.0):
    return weight * features.square().mean()


@penalty(on="features", examples=({"weight": 1.0},))
def cuts_its_hyper_parameter(features, *, weight: float = 1.0):
    return float(weight) * features.square().mean()


@penalty(on="features")
def says_nothing(features):
    return features.square().mean()


FAULTS = {
    "scalar": keeps_the_batch,
    "nonnegative": rewards,
    "gradient": wrong_slope,
    "module_untouched": leaves_gradients,
    "order_free": ranks_by_position,
    "quick": sleeps,
    "unmutated": overwrites,
    "repeatable": draws_globally,
    "dtypes_agree": rounds_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_weight,
    "tensor_hyper": cuts_its_hyper_parameter,
    "documented": says_nothing,
}
