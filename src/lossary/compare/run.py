"""The whole comparison, from a file to an answer."""

import os
import platform
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import lossary
from lossary.compare import arms as choice
from lossary.compare import metrics
from lossary.compare.arms import Arm
from lossary.compare.cells import Bench, Job, Protocol
from lossary.compare.confirm import answer, confirm, curves, own_answer
from lossary.compare.load import load
from lossary.compare.metrics import Metric
from lossary.compare.problem import Problem, lock
from lossary.compare.profile import Profile, profile
from lossary.compare.result import ArmResult, Comparison, Confirmation
from lossary.compare.search import Progress, Search, Work, search, tune_jobs
from lossary.compare.statistics import Estimate, holm, over_cells
from lossary.compare.store import Store
from lossary.compare.training import filled
from lossary.errors import BadInput
from lossary.tasks import cores

STORE = "cells.sqlite"
START = 8.0  # seconds that processes take to begin, and the report to be written


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


def compare(
    source: str | Path,
    *,
    target: str | None = None,
    task: Literal["classes", "real"] | None = None,
    group: str | None = None,
    drop: str | Iterable[str] = (),
    arms: str | Iterable[str] = (),
    metric: str | None = None,
    seeds: int = 5,
    budget: float | None = None,
    out: str | Path | None = None,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Comparison:
    """Find out which published part helps on this data, if any. The same call gives the same answer.

    Args:
        source, target, task, group, drop: as `load` takes them.
        arms: try only these parts (by name or paper), and if conventional arms are named, only those.
        metric: one of `metrics.METRICS`; None goes by `metrics.by_rule`.
        seeds: of each network in each cell.
        budget: seconds to stay within: partitions are left out, from four down to one, and then the parts that fit
            worst, as the first training of each arm foretells. Conventional arms and one part always run.
        out: folder for the report, its JSON and charts, `winner.py`, and all cells that are finished: the same call
            goes on where a killed one stopped. None writes nothing.
        protocol: how much is run; None is the full protocol.
        progress: called with (jobs done, jobs in all, arm).
        workers: processes; None is one for each core.

    Raises:
        BadInput: something in the data or the arguments can be put right.
    """
    start = time.perf_counter()
    given = {"target": target, "task": task, "group": group, "metric": metric}
    given |= {"drop": (drop,) if isinstance(drop, str) else tuple(drop)}
    given |= {"arms": (arms,) if isinstance(arms, str) else tuple(arms)}
    plan = _plan(source, **given, seeds=seeds, out=out, protocol=protocol, progress=progress, workers=workers)
    with plan.work:
        if budget is not None:
            plan = _within(budget, plan)
        found = search(plan.arms, plan.protocol, plan.metric, plan.work.finish, plan.work.expect)
        results = _results(plan, found)
        confirmation, drawn = _confirm(plan, found, results)
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
        },
        metric={"name": plan.metric.name, "unit": plan.metric.unit, "better": plan.metric.better, "why": plan.why},
        protocol={
            "partitions": plan.protocol.partitions,
            "folds": plan.protocol.folds,
            "seeds": plan.protocol.seeds,
            "confirm_seeds": plan.protocol.confirm_seeds,
            "settings": plan.protocol.settings,
        },
        profile=plan.profile,
        arms=results,
        confirmation=confirmation,
        skipped=plan.skipped,
        notes=(*problem.notes, *plan.profile.notes, *plan.notes),
        command=_command(source, **given, seeds=seeds, budget=budget, out=out),
        versions=_versions(),
        seconds=time.perf_counter() - start,
        curves=drawn,
    )
    if out is not None:
        from lossary.compare import report, winner  # charts take a second to import

        winner.write(comparison, problem, Path(out), locked=plan.locked)
        report.write(comparison, Path(out))
    return comparison


def estimate(source: str | Path, *, budget: float | None = None, **options: Any) -> tuple[float, Plan]:
    """Seconds that `compare` would take with these options, and what it would run.

    Each arm is trained once, which is kept if there is an `out`. What racing will save is not counted.
    """
    plan = _plan(source, **options)
    with plan.work:
        if budget is not None:
            plan = _within(budget, plan)
        return _seconds(plan, _first_round(plan)), plan


def _plan(
    source: str | Path,
    *,
    target: str | None = None,
    task: Literal["classes", "real"] | None = None,
    group: str | None = None,
    drop: Iterable[str] = (),
    arms: Sequence[str] = (),
    metric: str | None = None,
    seeds: int = 5,
    out: str | Path | None = None,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Plan:
    if seeds < 1:
        raise BadInput(f"--seeds: expected a whole number >= 1, got {seeds}")
    if metric is not None:
        metrics.named(metric)
    choice.check_names(arms)
    folder = None if out is None else check_folder(Path(out))
    protocol = replace(protocol or Protocol(), seeds=seeds)

    problem = load(source, target=target, task=task, group=group, drop=drop)
    asked = None if metric is None else metrics.fitting(metric, problem.task)
    rows, locked = lock(problem)
    facts = profile(problem, rows)
    by, why = (asked, "as asked") if asked else metrics.by_rule(problem.task, facts)
    chosen, skipped = choice.choose(
        problem, facts, by, settings=protocol.settings, network=protocol.network(len(rows)), names=arms
    )
    bench = Bench(problem, rows, locked, by, protocol, facts.label_noise)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out: cannot make {str(folder)!r} ({error.strerror}); name another folder") from None
    work = Work(bench, Store(None if folder is None else folder / STORE), progress, workers)
    return Plan(problem, rows, locked, facts, by, why, protocol, chosen, skipped, work)


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


def _first_round(plan: Plan) -> dict[str, float]:
    """Seconds of each arm's first training, which tuning needs in any case."""
    jobs = [tune_jobs(arm, plan.protocol)[0] for arm in plan.arms]
    return {job.arm: outcome.seconds for job, outcome in zip(jobs, plan.work.finish(jobs))}


def _seconds(plan: Plan, first: dict[str, float]) -> float:
    """What the whole takes if no arm is dropped, from the seconds of each arm's first training."""
    p = plan.protocol
    longer = {"network": (6 + p.seeds) / (6 + p.tune_seeds)}  # a stack of 20 takes three times as long as one of 2
    each = {
        arm.name: first[arm.name]
        * (len(arm.settings) * p.tune_splits + p.partitions * p.folds * longer.get(arm.family, 1.0))
        for arm in plan.arms
    }
    confirming = 2 * max(first.values()) * (6 + p.confirm_seeds) / (6 + p.tune_seeds)
    return START + sum(each.values()) / cores() + confirming


def _within(budget: float, plan: Plan) -> Plan:
    """The plan, cut down until its estimate fits: fewer partitions, then fewer parts, the worst fitting first."""
    first, full = _first_round(plan), plan
    while _seconds(plan, first) > budget:
        parts = [arm for arm in plan.arms if arm.part]
        if plan.protocol.partitions > 1:
            plan = replace(plan, protocol=replace(plan.protocol, partitions=plan.protocol.partitions - 1))
        elif len(parts) > 1:
            left_out = (parts[-1].part, f"the budget of {budget:g} s leaves no time for it")
            kept = tuple(arm for arm in plan.arms if arm is not parts[-1])
            plan = replace(plan, arms=kept, skipped=(*plan.skipped, left_out))
        else:
            note = f"Even the least comparison takes longer than the budget of {budget:g} s."
            return replace(plan, notes=(*plan.notes, note))
    if plan.protocol.partitions < full.protocol.partitions:
        note = (
            f"To stay within {budget:g} s, {plan.protocol.partitions} of {full.protocol.partitions} partitions are "
            f"run, with {len(plan.arms)} of {len(full.arms)} arms."
        )
        plan = replace(plan, notes=(*plan.notes, note))
    return plan


# From scores to the answer


def _results(plan: Plan, found: Search) -> tuple[ArmResult, ...]:
    """All arms, best first; those that were dropped come last."""
    sign, running = plan.metric.sign, found.running()
    plain = found.best([arm for arm in running if arm.part is None], sign)
    if not plain:
        reasons = "; ".join(f"{name}: {why}" for name, why in found.dropped.items())
        raise BadInput(f"no conventional arm could be trained ({reasons}); look at the data, or name others by --arms")
    baseline, own = plain[0], next((arm for arm in plain if arm.family == "network"), None)
    leads = {arm.name: _lead(plan, found, arm, baseline) for arm in found.arms if arm is not baseline}
    p = holm({name: 1.0 if lead is None or name in found.dropped else lead.p for name, lead in leads.items()})
    dropped = [arm for arm in found.arms if arm.name in found.dropped]
    ranked = found.best(running, sign) + found.best([arm for arm in dropped if found.scores[arm.name]], sign)
    ranked += [arm for arm in dropped if not found.scores[arm.name]]
    facts = plan.work.bench.facts()
    results = []
    for arm in ranked:
        lead, over_own = leads.get(arm.name), _lead(plan, found, arm, own) if arm.part and own else None
        scores, setting = tuple(found.scores[arm.name]), dict(found.setting[arm.name])
        if arm.part:
            setting["facts"] = filled(setting, facts)
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
                dropped=found.dropped.get(arm.name, ""),
            )
        )
    return tuple(results)


def _lead(plan: Plan, found: Search, arm: Arm, other: Arm) -> Estimate | None:
    """The lead of one arm over another on the cells that both have, or None without any."""
    first, second = found.scores[arm.name], found.scores[other.name]
    count = min(len(first), len(second))
    if not count:
        return None
    lead = plan.metric.sign * (np.array(first[:count]) - np.array(second[:count]))
    return over_cells(lead, 1 / (plan.protocol.folds - 1))


def _confirm(plan: Plan, found: Search, results: tuple[ArmResult, ...]) -> tuple[Confirmation | None, dict[str, Any]]:
    """The best part against the best conventional arm on the locked rows; nothing without a part."""
    by_name = {arm.name: arm for arm in plan.arms}
    finalist = next((by_name[arm.name] for arm in results if arm.part and not arm.dropped), None)
    baseline = next(by_name[arm.name] for arm in results if arm.conventional and not arm.dropped)
    if finalist is None:
        return None, {}
    names = (finalist.name, baseline.name)
    jobs = [
        Job("confirm", arm.name, found.setting[arm.name], 0, 0, _seeds(arm, plan.protocol.confirm_seeds), arm.code)
        for arm in (finalist, baseline)
    ]
    outcomes = plan.work.finish(jobs)
    for name, outcome in zip(names, outcomes):
        if outcome.error:
            raise BadInput(f"{name} could not be trained on all search rows ({outcome.error}); leave it out by --arms")
    first, second = (outcome.predictions for outcome in outcomes)
    locked, classes = plan.problem.rows(plan.locked), len(plan.problem.classes)
    confirmation = confirm(names, (first, second), plan.metric, locked.target, locked.units, classes)
    return confirmation, curves(names, (first, second), locked.target, classes)


def _seeds(arm: Arm, number: int) -> tuple[int, ...]:
    return tuple(range(number)) if arm.family == "network" else (0,)


def _command(source: str | Path, **options: Any) -> str:
    """The same call on the command line."""
    words = ["lossary", "compare", str(source)]
    for name, value in options.items():
        if name == "arms" and value:
            words += ["--arms", ",".join(value)]
        elif name == "drop":
            words += [word for column in value for word in ("--drop", column)]
        elif value is not None and value != () and (name, value) != ("seeds", 5):
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "scikit-learn", "pandas")
    own = {"lossary": lossary.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}
