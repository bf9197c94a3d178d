"""What every role with a `fit` shares: scikit-learn's contract, whatever it is that is learned.

scikit-learn is imported inside the checks, since it takes seconds and most roles do without it.
"""

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossary.roles._battery import Case, Fault, demand, same


class FittedCase(Case):
    """Fits a fresh instance and asks it about new rows. A role names the inputs and the question."""

    learns_from: tuple[str, ...]
    asked_about: str

    @property
    def method(self) -> str:
        """The name of the method that is asked."""
        raise NotImplementedError

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
        """Fresh inputs; another seed draws other rows of the same kind."""
        raise NotImplementedError

    def fit(self, part: Any, inputs: Mapping[str, Any]) -> Any:
        """Fit an instance and return what its fit returns."""
        return part.fit(*(inputs[name] for name in self.learns_from))

    def ask(self, part: Any, inputs: Mapping[str, Any]) -> Any:
        """A fitted instance's answer, one entry a row."""
        return getattr(part, self.method)(inputs[self.asked_about])

    def learn(self, inputs: Mapping[str, Any], **override: Any) -> Any:
        """A fresh instance after its fit."""
        part = self.build(**override)
        self.fit(part, inputs)
        return part

    def call(self, inputs: Mapping[str, Any], **override: Any) -> Any:
        return self.ask(self.learn(inputs, **override), inputs)


def fits(case: FittedCase) -> None:
    """fit returns the object itself."""
    part = case.build()
    returned = case.fit(part, case.inputs())
    demand(returned is part, f"fit returned {type(returned).__name__} instead of the object itself")


def unfitted(case: FittedCase) -> None:
    """Asking before fit raises a ValueError, such as scikit-learn's NotFittedError."""
    try:
        case.ask(case.build(), case.inputs())
    except ValueError:
        return
    except Exception as error:
        raise Fault(f"{case.method} before fit raised {type(error).__name__} instead of a ValueError") from error
    raise Fault(f"{case.method} before fit was answered in silence")


def cloneable(case: FittedCase) -> None:
    """scikit-learn's clone gives an unfitted copy that learns the same."""
    from sklearn.base import clone

    part = case.learn(case.inputs())
    demand(hasattr(part, "get_params"), "has no get_params; inherit from sklearn.base.BaseEstimator")
    copy = clone(part)
    case.fit(copy, case.inputs())
    demand(same(case.ask(copy, case.inputs()), case.ask(part, case.inputs())), "a clone with the same rows differs")


def keeps_parameters(case: FittedCase) -> None:
    """fit leaves the parameters alone and keeps what it learned under names that end in an underscore."""
    before, after = vars(case.build()), vars(case.learn(case.inputs()))
    moved = [name for name, value in before.items() if not _equal(after.get(name), value)]
    demand(not moved, f"fit changed {', '.join(moved)}, which the constructor had set")
    stray = [name for name in after if name not in before and name[0] != "_" and name[-1] != "_"]
    demand(not stray, f"fit learned {', '.join(stray)}; the name of what is learned ends in an underscore")


def refits(case: FittedCase) -> None:
    """A second fit forgets the first."""
    inputs = case.inputs()
    part = case.learn(case.inputs(seed=1))
    case.fit(part, inputs)
    demand(same(case.ask(part, inputs), case.call(inputs)), "a second fit still remembers the first")


def pickles(case: FittedCase) -> None:
    """A pickled copy answers alike."""
    part = case.learn(case.inputs())
    copy = pickle.loads(pickle.dumps(part))
    demand(same(case.ask(copy, case.inputs()), case.ask(part, case.inputs())), "a pickled copy answers differently")


def batch_free(case: FittedCase) -> None:
    """A row's answer is the same alone and in a batch."""
    inputs = case.inputs()
    part, rows = case.learn(inputs), inputs[case.asked_about]
    alone = torch.cat([case.ask(part, {case.asked_about: row}) for row in rows.split(1)])
    demand(same(alone, case.ask(part, inputs), rtol=1e-6, atol=1e-9), "a row's answer depends on the rows beside it")


FITTED = (fits, unfitted, cloneable, keeps_parameters, refits, pickles, batch_free)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray) and isinstance(b, Tensor | np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    return bool(a is b or a == b)
