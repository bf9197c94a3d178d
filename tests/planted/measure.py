"""One faulty measure per check of the measure battery: each is the share of positives, but for its fault."""

import time

import torch

from lossary.roles import measure

KNOWN = {"inputs": {"values": [0.5, -1.0, 2.0, 3.0]}, "value": 0.75}
WITH_CUT = {"inputs": {"values": [0.5, -1.0, 2.0, 3.0]}, "hyper": {"cut": 1.0}, "value": 0.5}


def _share(values):
    return (values > 0).to(values.dtype).mean()


@measure(known=(KNOWN,))
def counts_instead(values):
    return (values > 0).sum()


@measure(known=(KNOWN,))
def weighs_by_position(values):
    return ((values > 0) * torch.arange(1, len(values) + 1)).to(values.dtype).mean()


@measure(known=(KNOWN,), within=(0.0, 1.0))
def gives_percent(values):
    return 100 * _share(values)


@measure(known=(KNOWN,))
def sleeps(values):
    time.sleep(1.1)
    return _share(values)


@measure(known=(KNOWN,))
def sorts_in_place(values):
    values.copy_(values.sort().values)
    return _share(values)


@measure(known=(KNOWN,))
def draws_globally(values):
    return _share(values + torch.randn_like(values))


@measure(known=(KNOWN,))
def rounds_in_single(values):
    return _share(values) * (1.001 if values.dtype == torch.float32 else 1.0)


@measure(known=(KNOWN,))
def overflows_in_bfloat16(values):
    return _share(values) / (values.dtype != torch.bfloat16)


@measure(known=(KNOWN,))
def always_single(values):
    return _share(values).float()


@measure(known=(KNOWN,))
def accepts_anything(values):
    return _share(values.double())


@measure(known=(WITH_CUT,))
def accepts_any_cut(values, *, cut: float = 0.0):
    return _share(values - cut)


@measure(known=(KNOWN,))
def says_nothing(values):
    return _share(values)


FAULTS = {
    "known_value": counts_instead,
    "shuffles": weighs_by_position,
    "in_range": gives_percent,
    "quick": sleeps,
    "unmutated": sorts_in_place,
    "repeatable": draws_globally,
    "dtypes_agree": rounds_in_single,
    "bfloat16_finite": overflows_in_bfloat16,
    "dtype_follows": always_single,
    "refuses_inputs": accepts_anything,
    "refuses_hyper": accepts_any_cut,
    "documented": says_nothing,
}
