"""One faulty weighting per check of the weighting battery."""

import time

import torch
from torch import nn

from lossary.roles import weighting


@weighting()
def reduces(losses):
    return losses.detach().mean()


@weighting()
def goes_below_zero(losses):
    return losses.detach() - 1


@weighting(normalised="mean")
def sums_to_one(losses):
    return losses.detach().softmax(0)


@weighting()
def ranks_by_position(losses):
    return torch.arange(1, len(losses) + 1, dtype=losses.dtype)


@weighting()
def stays_in_the_graph(losses):
    return losses.sigmoid()


@weighting()
class ForgetsItsState(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, losses):
        self.calls += 1
        return torch.full_like(losses, 1.0 + self.calls)


@weighting()
class LearnsFromValidation(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, losses):
        self.mean.copy_(losses.detach().mean())
        return torch.ones_like(losses)


@weighting()
def sleeps(losses):
    time.sleep(1.1)
    return torch.ones_like(losses)


@weighting()
def overwrites(losses):
    return losses.detach().exp_()


@weighting()
def draws_globally(losses):
    return torch.rand(len(losses), dtype=losses.dtype)


@weighting()
def rounds_in_single(losses):
    return torch.full_like(losses, 1.0 if losses.dtype == torch.float64 else 1.001)


@weighting()
def overflows_in_bfloat16(losses):
    return torch.full_like(losses, float("nan") if losses.dtype == torch.bfloat16 else 1.0)


@weighting()
def always_single(losses):
    return torch.ones(len(losses))


@weighting()
def accepts_anything(losses, *, group):
    return torch.ones(6)


@weighting(examples=({"power": 1.0},))
def accepts_any_power(losses, *, power: float = 1.0):
    return losses.detach() ** power


@weighting()
def says_nothing(losses):
    return torch.ones_like(losses)


FAULTS = {
    "per_sample": reduces,
    "non_negative": goes_below_zero,
    "normalised": sums_to_one,
    "fair": ranks_by_position,
    "order_free": ranks_by_position,
    "detached": stays_in_the_graph,
    "resumes": ForgetsItsState,
    "evaluation": LearnsFromValidation,
    "quick": sleeps,
    "unmutated": overwrites,
    "repeatable": draws_globally,
    "dtypes_agree": rounds_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_power,
    "documented": says_nothing,
}
