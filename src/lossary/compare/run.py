"""The whole comparison, from a file to an answer."""

import os
import platform
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import lossary
from lossary.compare import arms as choice
from lossary.compare import metrics
from lossary.compare.arms import Arm
from lossary.compare.brought import read_costs, read_predictions
from lossary.compare.cells import Bench, Job, Protocol
from lossary.compare.confirm import answer, confirm, curves, own_answer, own_predictions
from lossary.compare.encode import Encoder
from lossary.compare.load import load
from lossary.compare.metrics import Metric
from lossary.compare.model import Model, train
from lossary.compare.problem import Problem, Task, lock
from lossary.compare.profile import Profile, profile
from lossary.compare.result import ArmResult, Comparison, Confirmation, winning
from lossary.compare.search import (
    MOST_COMBINED,
    NO_DEADLINE,
    WORTH_WORKERS,
    Deadline,
    Progress,
    Search,
    Work,
    search,
    tune_jobs,
)
from lossary.compare.statistics import Estimate, holm, over_cells
from lossary.compare.store import Store
from lossary.compare.training import built, filled
from lossary.errors import BadInput
from lossary.tasks import cores

STORE = "cells.sqlite"
# The arguments that `load` takes.
READING = ("target", "task", "group", "time", "sample_weight", "id", "drop", "embeddings", "test")
# Seconds of the processor that a comparison takes besides its trainings, on any data.
IMPORTING, STARTING, REPORTING = 5.0, 5.0, 6.0


@dataclass(frozen=True)
class Plan:
    """What would be run: everything that is settled before an arm is trained in full."""

    problem: Problem
    search: NDArray[np.int64]
    locked: NDArray[np.int64]
    profile: Profile
    metric: Metric
    why: str
    protocol: Protocol
    arms: tuple[Arm, ...]
    skipped: tuple[tuple[str, str], ...]
    work: Work
    notes: tuple[str, ...] = ()
    baseline: str | None = None
    brought: NDArray[np.float64] | None = None


def compare(
    source: Any,
    *,
    target: str | Sequence[str] | None = None,
    task: Task | None = None,
    group: str | None = None,
    time: str | None = None,
    sample_weight: str | None = None,
    id: str | None = None,
    drop: str | Iterable[str] = (),
    embeddings: str | Path | None = None,
    test: str | Path | None = None,
    arms: str | Iterable[str] = (),
    baseline: str | None = None,
    model: str | None = None,
    metric: str | None = None,
    cost_matrix: str | Path | None = None,
    predictions: str | Path | None = None,
    seeds: int = 5,
    budget: float | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    planned: Callable[[Plan, float], object] | None = None,
) -> Comparison:
    """Find out which published part helps on this data, if any.

    The same call gives the same answer, unless a budget cuts it down: how far depends on the machine.

    Args:
        source, target, task, group, time, sample_weight, id, drop, embeddings, test: as `load` takes them.
        arms: try only these parts (by name or paper), and if conventional arms are named, only those.
        baseline: the conventional arm that the finalist has to beat; None is the best one of the search.
        model: the user's own network instead of a small one, "package.module:builder", see `training.built`.
        metric: one of `metrics.METRICS`, or the user's own, "package.module:function", see `metrics.own`; None goes by
            `metrics.by_rule`.
        cost_matrix: file of costs, see `brought.read_costs`; the metric is then the mean cost.
        predictions: file of another model's predictions, see `brought.read_predictions`; the finalist is held
            against them on the locked rows.
        seeds: of each network in each cell.
        budget: seconds to stay within: partitions are left out, from four down to one, and then the parts that fit
            worst, as the first training of each arm foretells; the clock then stops the search before a partition or
            a combination that would end too late. Conventional arms and one part always run, in one partition, and
            the notes say where that took longer.
        device: where networks are trained: "cpu" or "cuda".
        out: folder for the report, its JSON and charts, the model, `winner.py`, and all cells that are finished: the
            same call goes on where a killed one stopped. None writes nothing.
        protocol: how much is run; None is the full protocol.
        progress: called with (jobs done, jobs in all, arm).
        workers: processes; None is one for each core.
        planned: called once, with what will be run and the seconds from the start that takes if no arm is dropped.

    Raises:
        BadInput: something in the data or the arguments can be put right.
    """
    start = perf_counter()
    given: dict[str, Any] = {
        "target": target, "task": task, "group": group, "time": time, "sample_weight": sample_weight, "id": id,
        "drop": (drop,) if isinstance(drop, str) else tuple(drop), "embeddings": embeddings, "test": test,
        "arms": (arms,) if isinstance(arms, str) else tuple(arms), "baseline": baseline, "model": model,
        "metric": metric, "cost_matrix": cost_matrix, "predictions": predictions, "device": device,
    }  # fmt: skip
    plan = _plan(source, **given, seeds=seeds, out=out, protocol=protocol, progress=progress, workers=workers)
    full, deadline = plan, NO_DEADLINE
    with plan.work:
        if budget is not None or planned is not None:
            first = _first_round(plan)
            if budget is not None:
                plan = _within(plan, first, start + budget - perf_counter())
                plan = replace(plan, notes=_cuts(budget, full, plan))
                deadline = Deadline(start + budget - _ending(plan, first), perf_counter)
            if planned is not None:
                planned(plan, _expected(plan, first, perf_counter() - start, budget))
        found = search(
            plan.arms, plan.protocol, plan.metric, plan.work.finish, plan.work.expect,
            ratio=plan.work.bench.ratio, deadline=deadline,
        )  # fmt: skip
        plan = replace(plan, protocol=replace(plan.protocol, partitions=found.partitions))
        results = _results(plan, found)
        confirmation, drawn, other = _confirm(plan, found, results)
    finalist = next((arm for arm in results if confirmation and arm.name == confirmation.finalist), None)
    problem = plan.problem
    comparison = Comparison(
        sentence=answer(confirmation, plan.metric),
        own=own_answer(finalist, plan.metric),
        data={
            "name": problem.name,
            "source": problem.source,
            "target": problem.target_name,
            "task": problem.task,
            "rows": len(problem),
            "columns": len(problem.features.columns),
            "locked": len(plan.locked),
            "classes": problem.classes,
            "digest": problem.digest,
            "reading": {name: given[name] for name in READING},
        },
        metric={
            "name": plan.metric.name,
            "unit": plan.metric.unit,
            "better": plan.metric.better,
            "why": plan.why,
            "asked": metric or "",
            "costs": None if cost_matrix is None else plan.metric.rows.args[0].tolist(),
        },
        protocol={
            "partitions": plan.protocol.partitions,
            "folds": plan.protocol.folds,
            "seeds": plan.protocol.seeds,
            "confirm_seeds": plan.protocol.confirm_seeds,
            "settings": plan.protocol.settings,
            "comparisons": len(results) - 1 + _not_combined(found),
        },
        profile=plan.profile,
        arms=results,
        confirmation=confirmation,
        skipped=plan.skipped,
        notes=(*problem.notes, *plan.profile.notes),
        command=_command(source, **given, seeds=seeds, budget=budget, out=out),
        versions=_versions(),
        seconds=perf_counter() - start,
        curves=drawn,
        brought=other,
    )
    made = _model(plan, comparison)
    comparison = replace(comparison, trust=made.checked, seconds=perf_counter() - start)
    if budget is not None:
        whole = comparison.seconds + first.slowdown * (IMPORTING + REPORTING)  # what lies before and after
        said = (*_cuts(budget, full, plan, fewer_combined=found.cut_short), *_overrun(budget, whole))
        comparison = replace(comparison, notes=(*comparison.notes, *said))
    if out is not None:
        from lossary.compare import report, winner  # charts take a second to import

        made.save(Path(out))
        winner.write(comparison, problem, Path(out), locked=plan.locked)
        report.write(comparison, Path(out))
    return comparison


def _model(plan: Plan, comparison: Comparison) -> Model:
    """The winner trained on the search rows, and calibrated on the locked ones now that these have spoken."""
    arm = winning(comparison)
    rows = plan.problem.rows(plan.search)
    made = train(rows, arm.setting, name=arm.name, label_noise=plan.profile.label_noise)
    made.calibrate(plan.problem.rows(plan.locked), np.random.default_rng(0))
    return made


def estimate(source: Any, *, budget: float | None = None, **options: Any) -> tuple[float, Plan]:
    """Seconds that `compare` would take with these options from its first import on, and what it would run.

    The data are read and profiled and each arm is trained once, which is kept if there is an `out`. What racing will
    save is not counted.
    """
    start = perf_counter()
    plan = _plan(source, **options)
    with plan.work:
        first = _first_round(plan)
        if budget is not None:
            plan = _within(plan, first, start + budget - perf_counter())
        return _expected(plan, first, perf_counter() - start, budget), plan


def _plan(
    source: Any,
    *,
    arms: Sequence[str] = (),
    baseline: str | None = None,
    model: str | None = None,
    metric: str | None = None,
    cost_matrix: str | Path | None = None,
    predictions: str | Path | None = None,
    seeds: int = 5,
    device: str = "cpu",
    out: str | Path | None = None,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    **reading: Any,
) -> Plan:
    if seeds < 1:
        raise BadInput(f"--seeds: expected a whole number >= 1, got {seeds}")
    if metric is not None and cost_matrix is not None:
        raise BadInput(f"--metric {metric} and --cost-matrix: costs are a metric of their own; give one of the two")
    if metric is not None and ":" not in metric:
        metrics.named(metric)
    if model is not None:
        metrics.imported(model, "--model")
    _check_device(device)
    choice.check_names(arms)
    _check_baseline(baseline, choice.CONVENTIONAL)
    folder = None if out is None else check_folder(Path(out))
    protocol = replace(protocol or Protocol(), seeds=seeds)

    problem = load(source, **reading)
    asked = None if metric is None else metrics.fitting(metric, problem.task, len(problem.classes))
    if cost_matrix is not None:
        if problem.task not in ("classes", "ordinal"):
            raise BadInput(f"--cost-matrix: is for classes, not for a target of {metrics.KINDS[problem.task]}")
        asked = metrics.cost(read_costs(cost_matrix, problem.classes))
    rows, locked = lock(problem)
    network = protocol.network(len(rows), model or ("cnn" if len(problem.shape) == 3 else "mlp"))
    if model is not None:
        shape = problem.shape or (
            Encoder().fit(problem.rows(rows).features).transform(problem.features.head(1)).shape[1],
        )
        built(model, shape, problem.outputs)
    brought = None
    if predictions is not None:  # before the profile, which takes its time; a metric by rule reads what accuracy reads
        said: list[str] = []
        brought = read_predictions(predictions, problem.rows(locked), asked or metrics.named("accuracy"), said)
        problem = replace(problem, notes=(*problem.notes, *said))
    facts = profile(problem, rows, progress=progress)
    by, why = (asked, "as asked") if asked else metrics.by_rule(problem.task, facts)
    chosen, skipped = choice.choose(problem, facts, by, settings=protocol.settings, network=network, names=arms)
    _check_baseline(baseline, [arm.name for arm in chosen if arm.part is None])
    bench = Bench(problem, rows, locked, by, protocol, facts.label_noise, device)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out: cannot make {str(folder)!r} ({error.strerror}); name another folder") from None
    work = Work(bench, Store(None if folder is None else folder / STORE), progress, workers)
    return Plan(
        problem, rows, locked, facts, by, why, protocol, chosen, skipped, work, baseline=baseline, brought=brought
    )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device: {device!r} is not to be had here ({reason}); use cpu") from None


def _check_baseline(baseline: str | None, names: Collection[str]) -> None:
    if baseline is not None and baseline not in names:
        raise BadInput(f"--baseline: no conventional arm {baseline!r}; choose one of {', '.join(sorted(names))}")


def check_folder(folder: Path) -> Path:
    """The folder, refused before any work where it cannot be written to or holds something else.

    Raises:
        BadInput: it is a file, is not writable, or holds files that no comparison left there.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise BadInput(f"--out: {str(existing)!r} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"--out: {str(existing)!r} cannot be written to; name another folder")
    if existing == folder and any(folder.iterdir()) and not (folder / STORE).exists():
        raise BadInput(f"--out: {str(folder)!r} holds other files; name a new or an empty folder")
    return folder


# The budget


@dataclass(frozen=True)
class First:
    """What each arm's first training tells: seconds of the processor by arm, and how many seconds go by with one."""

    seconds: dict[str, float]
    slowdown: float


def _first_round(plan: Plan) -> First:
    """Each arm trained once, which tuning needs in any case, and counts as done when it comes to it."""
    jobs = [tune_jobs(arm, plan.protocol)[0] for arm in plan.arms]
    outcomes = plan.work.finish(jobs)
    plan.work.done -= len(jobs)
    total = sum(outcome.seconds for outcome in outcomes)
    slowdown = sum(outcome.elapsed for outcome in outcomes) / total if total else 1.0
    return First({job.arm: outcome.seconds for job, outcome in zip(jobs, outcomes)}, slowdown)


def _expected(plan: Plan, first: First, spent: float, budget: float | None) -> float:
    """How long the whole takes, of which so much is spent: combinations are tried while the budget lasts."""
    least, most = (spent + _seconds(plan, first, combinations) for combinations in (0, MOST_COMBINED))
    return most if budget is None else max(least, min(most, budget))


def _seconds(plan: Plan, first: First, combinations: int) -> float:
    """How long all that follows the first round takes, with so many combinations, if no arm is dropped."""
    p = plan.protocol
    longer = {"network": (6 + p.seeds) / (6 + p.tune_seeds)}  # a stack of 20 takes three times as long as one of 2
    each = {
        arm.name: first.seconds[arm.name]
        * (len(arm.settings) * p.tune_splits - 1 + p.partitions * p.folds * longer.get(arm.family, 1.0))
        for arm in plan.arms
    }
    parts = [each[arm.name] for arm in plan.arms if arm.part and arm.family == "network"]
    if len({arm.role for arm in plan.arms if arm.part}) < 2:
        combinations = 0
    searching = sum(each.values()) + (combinations * sum(parts) / len(parts) if combinations else 0.0)
    workers = plan.work.workers
    if searching > WORTH_WORKERS and workers != 0:
        searching = STARTING + searching / (workers or cores())
    return first.slowdown * searching + _ending(plan, first)


def _ending(plan: Plan, first: First) -> float:
    """How long it takes to confirm, to train the winner and to write the report; and what was imported beforehand."""
    p, longest = plan.protocol, max(first.seconds.values())
    confirming = 2 * longest * (6 + p.confirm_seeds) / (6 + p.tune_seeds)
    return first.slowdown * (IMPORTING + confirming + longest + REPORTING)


def _within(plan: Plan, first: First, left: float) -> Plan:
    """The plan, cut down to the seconds left: fewer partitions, then fewer parts, the worst fitting first.

    Combinations are not reckoned with: they come last, and the clock tells how many are tried.
    """
    while _seconds(plan, first, 0) > left:
        parts = [arm for arm in plan.arms if arm.part]
        if plan.protocol.partitions > 1:
            plan = replace(plan, protocol=replace(plan.protocol, partitions=plan.protocol.partitions - 1))
        elif len(parts) > 1:
            left_out = (parts[-1].part, "the budget leaves no time for it")
            kept = tuple(arm for arm in plan.arms if arm is not parts[-1])
            plan = replace(plan, arms=kept, skipped=(*plan.skipped, left_out))
        else:
            break
    return plan


def _cuts(budget: float, full: Plan, plan: Plan, *, fewer_combined: bool = False) -> tuple[str, ...]:
    """What the budget left of the full plan, in a sentence where it left less than all."""
    sizes = [
        (plan.protocol.partitions, full.protocol.partitions, "partitions"),
        (len(plan.arms), len(full.arms), "arms"),
    ]
    cuts = [f"{size} of {whole} {what}" for size, whole, what in sizes if size < whole]
    cuts += ["fewer combinations"] if fewer_combined else []
    return (f"Cut down to {', '.join(cuts)} by the budget of {budget:g} s.",) if cuts else ()


def _overrun(budget: float, seconds: float) -> tuple[str, ...]:
    return (f"Took about {seconds:.0f} s in all, longer than the budget of {budget:g} s.",) if seconds > budget else ()


# From scores to the answer


def _results(plan: Plan, found: Search) -> tuple[ArmResult, ...]:
    """All arms, best first; those that were dropped come last."""
    sign, running = plan.metric.sign, found.running()
    plain = found.best([arm for arm in running if arm.part is None], sign)
    if not plain:
        reasons = "; ".join(f"{name}: {why}" for name, why in found.dropped.items())
        raise BadInput(f"no conventional arm could be trained ({reasons}); look at the data, or name others by --arms")
    baseline, own = _baseline(plan, plain), [arm for arm in plain if arm.family != "linear"]
    leads = {arm.name: _lead(plan, found, arm, baseline) for arm in found.arms if arm is not baseline}
    p = {name: 1.0 if lead is None or name in found.dropped else lead.p for name, lead in leads.items()}
    p |= {f"combination {place} that was not tried": 1.0 for place in range(_not_combined(found))}
    p = holm(p)
    dropped = [arm for arm in found.arms if arm.name in found.dropped]
    ranked = found.best(running, sign) + found.best([arm for arm in dropped if found.scores[arm.name]], sign)
    ranked += [arm for arm in dropped if not found.scores[arm.name]]
    facts = plan.work.bench.facts()
    results = []
    for arm in ranked:
        same = next((other for other in own if arm.part and other.family == arm.family), None)
        lead, over_own = leads.get(arm.name), _lead(plan, found, arm, same) if same else None
        scores, setting = tuple(found.scores[arm.name]), dict(found.setting[arm.name])
        if arm.part:
            setting["parts"] = [{**entry, "facts": filled(entry, facts)} for entry in setting["parts"]]
        results.append(
            ArmResult(
                name=arm.name,
                family=arm.family,
                paper=arm.paper,
                part=arm.part,
                role=arm.role,
                reason=arm.reason,
                setting=setting,
                tried=len(arm.settings),
                score=float(np.nanmean(scores)) if scores else float("nan"),
                against_baseline=None if lead is None else lead.interval,
                against_own=None if over_own is None else over_own.interval,
                p_holm=p.get(arm.name),
                cells=len(scores),
                cell_scores=scores,
                seconds=found.seconds[arm.name],
                parameters=found.parameters[arm.name],
                memory=found.memory[arm.name],
                dropped=found.dropped.get(arm.name, ""),
            )
        )
    return tuple(results)


def _not_combined(found: Search) -> int:
    """Combinations that could have been tried and were not; they count in Holm's adjustment."""
    return MOST_COMBINED - sum(" + " in arm.role for arm in found.arms)


def _lead(plan: Plan, found: Search, arm: Arm, other: Arm) -> Estimate | None:
    """The lead of one arm over another on the cells that both have, or None without any."""
    first, second = found.scores[arm.name], found.scores[other.name]
    count = min(len(first), len(second))
    if not count:
        return None
    lead = plan.metric.sign * (np.array(first[:count]) - np.array(second[:count]))
    return over_cells(lead, plan.work.bench.ratio)


def _baseline(plan: Plan, plain: Sequence[Arm]) -> Arm:
    """The registered one where it was trained, otherwise the best of the search."""
    return next((arm for arm in plain if arm.name == plan.baseline), plain[0])


def _confirm(
    plan: Plan, found: Search, results: tuple[ArmResult, ...]
) -> tuple[Confirmation | None, dict[str, Any], dict[str, Any]]:
    """The best part against the baseline on the locked rows, and against what the user brought; nothing without a part.

    A conventional arm takes the part's place against what the user brought where there is none.
    """
    by_name = {arm.name: arm for arm in found.arms}
    finalist = next((by_name[arm.name] for arm in results if arm.part and not arm.dropped), None)
    plain = [by_name[arm.name] for arm in results if arm.conventional and not arm.dropped]
    baseline = _baseline(plan, plain)
    arms = [baseline] if finalist is None else [finalist, baseline]
    if finalist is None and plan.brought is None:
        return None, {}, {}
    jobs = [
        Job("confirm", arm.name, found.setting[arm.name], 0, 0, _seeds(arm, plan.protocol.confirm_seeds), arm.code)
        for arm in arms
    ]
    predicted = {}
    for arm, outcome in zip(arms, plan.work.finish(jobs)):
        if outcome.error:
            raise BadInput(
                f"{arm.name} could not be trained on all search rows ({outcome.error}); leave it out by --arms"
            )
        predicted[arm.name] = outcome.predictions
    locked, other = plan.problem.rows(plan.locked), {}
    if plan.brought is not None:
        held = confirm((arms[0].name, "what you brought"), (predicted[arms[0].name], plan.brought), plan.metric, locked)
        other = {"against": asdict(held), "sentence": own_predictions(held, "what you brought", plan.metric)}
    if finalist is None:
        return None, {}, other
    names, pair = (finalist.name, baseline.name), (predicted[finalist.name], predicted[baseline.name])
    return confirm(names, pair, plan.metric, locked), curves(names, pair, locked), other


def _seeds(arm: Arm, number: int) -> tuple[int, ...]:
    return tuple(range(number)) if arm.family == "network" else (0,)


def _command(source: Any, **options: Any) -> str:
    """The same call on the command line."""
    words = ["lossary", "compare", str(source) if isinstance(source, str | Path) else "DATA"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "drop":
            words += [word for column in value for word in (flag, column)]
        elif isinstance(value, tuple | list) and value:
            words += [flag, ",".join(value)]
        elif value is not None and value != () and (name, value) not in (("seeds", 5), ("device", "cpu")):
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "scikit-learn", "lightgbm", "pandas")
    own = {"lossary": lossary.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}
