"""The battery: checks that every part of a role must pass, and the checks that all roles share.

A check is a function of one `Case` whose name is its name and whose docstring says in plain words what a pass
means. It raises `Fault` with a sentence that a stranger understands. A role lists its checks; `run` applies
them to every example on the part's mark.
"""

import copy
import doctest
import inspect
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossary.roles._mark import Mark, mark_of
from lossary.vocabulary import PROFILE_FIELDS, fill

# Facts of the small data that the fixtures draw, for hyper-parameters that are filled from a profile.
FACTS: dict[str, Any] = {
    "num_samples": 12,
    "num_features": 6,
    "num_classes": 7,
    "num_groups": 3,
    "class_counts": (50, 30, 20, 10, 6, 4, 2),
    "label_noise": 0.2,
}


class Fault(AssertionError):
    """What a check found, in a sentence that names the part's mistake."""


def demand(condition: object, message: str) -> None:
    """Raise `Fault(message)` unless the condition holds."""
    if not condition:
        raise Fault(message)


class Case:
    """A part with one example of hyper-parameters, and how to feed it. A role subclasses this."""

    def __init__(self, part: Any, mark: Mark, hyper: Mapping[str, Any]) -> None:
        self.part, self.mark, self.hyper = part, mark, dict(hyper)

    def build(self, **override: Any) -> Callable[..., Any]:
        """The callable under test: an instance of a class, or the function with its hyper-parameters bound."""
        hyper = {**fill(self.part, FACTS), **self.hyper, **override}
        if isinstance(self.part, type):
            return self.part(**hyper)  # type: ignore[no-any-return]
        return lambda **inputs: self.part(**inputs, **hyper)

    def call(self, inputs: Mapping[str, Any], **override: Any) -> Any:
        """Build and call in one step."""
        return self.build(**override)(**inputs)

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Fresh, well-formed inputs; the same values at every call."""
        raise NotImplementedError

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        """(argument, inputs in which that argument has a wrong shape or dtype) pairs."""
        return ()

    def hyper_parameters(self) -> dict[str, Any]:
        """Keyword-only parameters with a default, by name, at this example's values."""
        found = {}
        for name, parameter in inspect.signature(self.part).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
                found[name] = self.hyper.get(name, parameter.default)
        return found


Check = Callable[[Any], None]


@dataclass(frozen=True)
class Role:
    """A role's protocol in one sentence, how to make its cases, and its checks in order."""

    name: str
    protocol: str
    case: type[Case]
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Result:
    """One check on one part. `example` is the first that failed; `xfail` the reason why failing is meant."""

    part: str
    check: str
    says: str
    passed: bool
    message: str = ""
    example: Mapping[str, Any] | None = None
    xfail: str = ""


def run(part: Any, role: Role, only: Sequence[str] = ()) -> list[Result]:
    """Apply the role's checks to every example of a marked part."""
    mark = mark_of(part)
    if mark is None or mark.role != role.name:
        raise ValueError(f"part: {part!r} does not carry the mark of the role {role.name!r}")
    cases = [role.case(part, mark, example) for example in mark.examples]
    return [_apply(check, cases, mark) for check in role.checks if not only or check.__name__ in only]


def _apply(check: Check, cases: Sequence[Case], mark: Mark) -> Result:
    name, says = check.__name__, inspect.getdoc(check) or ""
    part, reason = cases[0].part.__name__, mark.xfail.get(name, "")
    message, example = "", None
    for case in cases:
        try:
            check(case)
        except Exception as error:  # a stranger's part may raise anything; every error is a finding
            message = str(error) if isinstance(error, Fault) else f"raised {type(error).__name__}: {error}"
            example = case.hyper
            break
    if reason:
        stale = "" if message else f"passes although xfail says {reason!r}: remove the xfail"
        return Result(part, name, says, not stale, stale, example, reason)
    return Result(part, name, says, not message, message, example)


def tensors(output: Any) -> list[Tensor]:
    """All tensors in an output: a tensor, or a (named) tuple or dict of them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [found for item in output for found in tensors(item)]
    return []


def same(a: Any, b: Any, rtol: float = 0.0, atol: float = 0.0) -> bool:
    """Equal outputs, elementwise within a tolerance; NaN equals nothing."""
    left, right = tensors(a), tensors(b)
    return len(left) == len(right) and all(
        x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=rtol, atol=atol)
        for x, y in zip(left, right, strict=True)
    )


# --- checks shared by all roles -------------------------------------------------------------------------------


def quick(case: Case) -> None:
    """The example runs in under a second."""
    inputs = case.inputs()
    case.call(inputs)  # the first call may pay for lazy set-up
    start = time.perf_counter()
    case.call(case.inputs())
    demand(time.perf_counter() - start < 1.0, f"took {time.perf_counter() - start:.1f} s on a dozen samples")


def unmutated(case: Case) -> None:
    """Inputs are left as they were."""
    inputs = case.inputs()
    before = copy.deepcopy(inputs)
    case.call(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            demand(torch.equal(value, before[name]), f"changed its argument {name} in place")


def repeatable(case: Case) -> None:
    """The same call gives the same values and leaves the global random state alone."""
    torch.manual_seed(0)  # so that a part that draws globally cannot repeat by luck of a common state
    state = torch.random.get_rng_state()
    first = case.call(case.inputs())
    demand(torch.equal(state, torch.random.get_rng_state()), "drew from the global random state; take a generator")
    demand(same(first, case.call(case.inputs())), "two calls on the same inputs gave different values")


def dtypes_agree(case: Case) -> None:
    """float32 and float64 agree to 1e-4."""
    single, double = case.call(case.inputs(torch.float32)), case.call(case.inputs(torch.float64))
    demand(same(single, double, rtol=1e-4, atol=1e-4), f"float32 gave {_short(single)}, float64 {_short(double)}")


def bfloat16_finite(case: Case) -> None:
    """bfloat16 inputs give finite values."""
    for value in tensors(case.call(case.inputs(torch.bfloat16))):
        demand(bool(value.isfinite().all()), f"bfloat16 inputs gave {_short(value)}")


def dtype_follows(case: Case) -> None:
    """Output dtype and device follow the input."""
    for dtype in (torch.float32, torch.float64):
        for value in tensors(case.call(case.inputs(dtype))):
            if value.is_floating_point():
                demand(value.dtype == dtype, f"{dtype} inputs gave a {value.dtype} output")


def refuses_inputs(case: Case) -> None:
    """A wrong shape or dtype raises a ValueError that names the argument."""
    for name, inputs in case.wrong():
        given = inputs[name]
        what = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else repr(given)
        _demand_refusal(partial(case.call, inputs), name, what)


def refuses_hyper(case: Case) -> None:
    """A wrong hyper-parameter raises a ValueError that names it."""
    for name, value in case.hyper_parameters().items():
        if name in PROFILE_FIELDS or isinstance(value, Tensor) or value is None:
            continue
        wrong: Any = "no such value"
        if isinstance(value, float | int) and not isinstance(value, bool):
            wrong = float("nan")
        elif not isinstance(value, str):
            continue
        _demand_refusal(partial(case.call, case.inputs(), **{name: wrong}), name, repr(wrong))


def tensor_hyper(case: Case) -> None:
    """A tensor hyper-parameter that requires grad gets its gradient, or is refused."""
    for name, value in case.hyper_parameters().items():
        if not isinstance(value, float) or name in PROFILE_FIELDS:
            continue
        learned = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        try:
            output = tensors(case.call(case.inputs(), **{name: learned}))[0]
        except ValueError:
            continue
        demand(output.requires_grad, f"{name} given as a tensor that requires grad is silently cut from the graph")
        (exact,) = torch.autograd.grad(output.sum(), learned, allow_unused=True)
        demand(exact is not None, f"{name} given as a tensor that requires grad gets no gradient")
        step = 1e-6
        sums = [tensors(case.call(case.inputs(), **{name: learned.detach() + d}))[0].sum() for d in (-step, step)]
        numeric = (sums[1] - sums[0]) / (2 * step)
        demand(
            torch.allclose(exact, numeric, rtol=1e-4, atol=1e-6),
            f"the gradient with respect to {name} is {exact.item():.6g}, finite differences say {numeric.item():.6g}",
        )


def documented(case: Case) -> None:
    """The docstring names every parameter and its example runs."""
    text = inspect.getdoc(case.part) or ""
    if isinstance(case.part, type):
        text += inspect.getdoc(vars(case.part).get("__init__")) or ""
    missing = [name for name in inspect.signature(case.part).parameters if name not in text]
    demand(not missing, f"the docstring does not mention {', '.join(missing)}")
    examples = [e for t in _doctests(case.part) for e in t.examples]
    demand(examples, "the docstring has no example (>>>)")
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for test in _doctests(case.part):
        runner.run(test, out=report.append)
    demand(not runner.failures, "the docstring's example fails: " + " ".join("".join(report).split()))


SHARED = (
    quick,
    unmutated,
    repeatable,
    dtypes_agree,
    bfloat16_finite,
    dtype_follows,
    refuses_inputs,
    refuses_hyper,
    tensor_hyper,
    documented,
)


def _doctests(part: Any) -> list[doctest.DocTest]:
    module = inspect.getmodule(part)
    scope = vars(module) if module else {}
    return doctest.DocTestFinder(recurse=False).find(part, part.__name__, globs=dict(scope))


def _demand_refusal(call: Callable[[], Any], name: str, given: str) -> None:
    try:
        call()
    except ValueError as error:
        named = re.search(rf"\b{re.escape(name)}\b", str(error))
        demand(named, f"{name} = {given} is refused without naming it: {error}")
    except Exception as error:
        raise Fault(f"{name} = {given} raised {type(error).__name__} instead of a ValueError naming it") from error
    else:
        raise Fault(f"{name} = {given} was accepted in silence")


def _short(value: Any) -> str:
    numbers = tensors(value)[0].detach().flatten()[:4].tolist() if tensors(value) else value
    return str([round(n, 6) for n in numbers]) if isinstance(numbers, list) else repr(numbers)
