"""One faulty guidance per check of the guidance battery: a plain one with something wrong."""

import time

import torch

from lossary import require
from lossary.roles import guidance


def _free(cond, uncond, scale=3.0):
    require.floating("cond", cond)
    require.same_shape("uncond", uncond, tuple(cond.shape))
    return uncond + scale * (cond - uncond)


@guidance()
def flattens(cond, uncond, state):
    return _free(cond, uncond).flatten(), state


@guidance()
def always_stretches(cond, uncond, state):
    return 1.1 * _free(cond, uncond), state


@guidance()
class KeepsItToItself:
    def __init__(self):
        self.before = 0.0

    def __call__(self, cond, uncond, state):
        now = cond - uncond + 0.1 * self.before
        self.before = now
        return cond + 2 * now, state


@guidance()
def centres_the_batch(cond, uncond, state):
    return _free(cond, uncond) - (cond - uncond).mean(0), state


@guidance()
def takes_none(cond, uncond, state):
    return cond if uncond is None else _free(cond, uncond), state


@guidance()
def takes_its_scale_by_place(cond, uncond, state, scale=3.0):
    return _free(cond, uncond, scale), state


@guidance()
def sleeps(cond, uncond, state):
    time.sleep(0.4)
    return _free(cond, uncond), state


@guidance()
def overwrites(cond, uncond, state):
    guided = _free(cond, uncond)
    uncond.zero_()
    return guided, state


@guidance()
def draws_globally(cond, uncond, state):
    return _free(cond, uncond, 2 + torch.rand(())), state


@guidance()
def stronger_in_single(cond, uncond, state):
    return _free(cond, uncond, 3.0 if cond.dtype == torch.float64 else 3.1), state


@guidance()
def overflows_in_bfloat16(cond, uncond, state):
    return _free(cond, uncond, float("inf") if cond.dtype == torch.bfloat16 else 3.0), state


@guidance()
def always_single(cond, uncond, state):
    return _free(cond, uncond).float(), state


@guidance()
def accepts_anything(cond, uncond, state):
    return cond + 0 * uncond.sum(), state


@guidance(examples=({"scale": 3.0},))
def accepts_any_scale(cond, uncond, state, *, scale: float = 3.0):
    return _free(cond, uncond, scale), state


@guidance(examples=({"scale": 3.0},))
def cuts_its_hyper_parameter(cond, uncond, state, *, scale: float = 3.0):
    return _free(cond, uncond, float(torch.as_tensor(scale).detach())), state


@guidance()
def says_nothing(cond, uncond, state):
    return _free(cond, uncond), state


FAULTS = {
    "shaped": flattens,
    "content": always_stretches,
    "stateless": KeepsItToItself,
    "separate": centres_the_batch,
    "spared": takes_none,
    "keyworded": takes_its_scale_by_place,
    "quick": sleeps,
    "unmutated": overwrites,
    "repeatable": draws_globally,
    "dtypes_agree": stronger_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_scale,
    "tensor_hyper": cuts_its_hyper_parameter,
    "documented": says_nothing,
}
