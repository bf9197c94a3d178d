"""Dynamics: what training does, and what theory says about it, as objects that can be checked.

There is no shared engine: each paper brings the object that its theorem is about, a predictor, a kernel, an
estimator or a bound, and its claim holds the statement against numbers.

| Your question | Try first | Then |
|---|---|---|
| what can one layer of linear attention learn in context | `LinearSelfAttention` | `one_step_gd_predictor` |
| a baseline for in-context regression | `one_step_gd_predictor` with `optimal_icl_step_size` | a preconditioner |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
