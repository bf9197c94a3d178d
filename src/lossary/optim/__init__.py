"""Optimizers: how the parameters move once the gradients are there.

There is no engine: every part is a `torch.optim.Optimizer`, so schedules, parameter groups, `state_dict` and the
loop that you have stay as they are. Those that evaluate the loss more than once in a step, or look at its value,
want `optimizer.step(closure)`. Those that take a norm over all parameters accept `replicas=True` for a stack of
models in the leading dimension.

| Your trouble | Try first | Then |
|---|---|---|
| overfitting, and compute to spare | `SAM` with rho 0.05 | rho 0.1 to 0.2 for larger networks |
| noisy labels | `SAM` with rho 0.1 or more | |
| you want the perturbation in a loop of your own | `sam_perturbation` | |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
