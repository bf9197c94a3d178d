"""The whole comparison, from a file to an answer."""

import os
import platform
import shlex
from collections.abc import Callable, Iterable, Sequence
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
from lossary.compare.search import MOST_COMBINED, Progress, Search, Work, search, tune_jobs
from lossary.compare.statistics import Estimate, holm, over_cells
from lossary.compare.store import Store
from lossary.compare.training import built, filled
from lossary.errors import BadInput
from lossary.tasks import cores

STORE = "cells.sqlite"
# The arguments that `load` takes.
READING = ("target", "task", "group", "time", "sample_weight", "id", "drop", "embeddings", "test")
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
    """Find out which published part helps on this data, if any. The same call gives the same answer.

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
            worst, as the first training of each arm foretells. Conventional arms and one part always run.
        device: where networks are trained: "cpu" or "cuda".
        out: folder for the report, its JSON and charts, the model, `winner.py`, and all cells that are finished: the
            same call goes on where a killed one stopped. None writes nothing.
        protocol: how much is run; None is the full protocol.
        progress: called with (jobs done, jobs in all, arm).
        workers: processes; None is one for each core.
        planned: called once, with what will be run and the seconds that takes if no arm is dropped.

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
    with plan.work:
        if budget is not None:
            plan = _within(budget, plan)
        if planned is not None:
            planned(plan, _seconds(plan, _first_round(plan)))
        found = search(
            plan.arms, plan.protocol, plan.metric, plan.work.finish, plan.work.expect, ratio=plan.work.bench.ratio
        )
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
        },
        profile=plan.profile,
        arms=results,
        confirmation=confirmation,
        skipped=plan.skipped,
        notes=(*problem.notes, *plan.profile.notes, *plan.notes),
        command=_command(source, **given, seeds=seeds, budget=budget, out=out),
        versions=_versions(),
        seconds=perf_counter() - start,
        curves=drawn,
        brought=other,
    )
    made = _model(plan, comparison)
    comparison = replace(comparison, trust=made.checked, seconds=perf_counter() - start)
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
    """Seconds that `compare` would take with these options, and what it would run.

    Each arm is trained once, which is kept if there is an `out`. What racing will save is not counted.
    """
    plan = _plan(source, **options)
    with plan.work:
        if budget is not None:
            plan = _within(budget, plan)
        return _seconds(plan, _first_round(plan)), plan


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
    facts = profile(problem, rows, progress=progress)
    by, why = (asked, "as asked") if asked else metrics.by_rule(problem.task, facts)
    brought = None if predictions is None else read_predictions(predictions, problem.rows(locked), by)
    chosen, skipped = choice.choose(problem, facts, by, settings=protocol.settings, network=network, names=arms)
    _check_baseline(baseline, chosen)
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


def _check_baseline(baseline: str | None, arms: Sequence[Arm]) -> None:
    plain = [arm.name for arm in arms if arm.part is None]
    if baseline is not None and baseline not in plain:
        raise BadInput(f"--baseline: no conventional arm {baseline!r}; choose one of {', '.join(plain)}")


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
    """Seconds of each arm's first training, which tuning needs in any case, and counts as done when it comes to it."""
    jobs = [tune_jobs(arm, plan.protocol)[0] for arm in plan.arms]
    first = {job.arm: outcome.seconds for job, outcome in zip(jobs, plan.work.finish(jobs))}
    plan.work.done -= len(jobs)
    return first


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
    parts = [each[arm.name] for arm in plan.arms if arm.part and arm.family == "network"]
    combining = MOST_COMBINED * sum(parts) / len(parts) if len({arm.role for arm in plan.arms if arm.part}) > 1 else 0.0
    return START + (sum(each.values()) + combining) / cores() + confirming


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
    baseline, own = _baseline(plan, plain), [arm for arm in plain if arm.family != "linear"]
    leads = {arm.name: _lead(plan, found, arm, baseline) for arm in found.arms if arm is not baseline}
    p = {name: 1.0 if lead is None or name in found.dropped else lead.p for name, lead in leads.items()}
    registered = sum(" + " in arm.role for arm in found.arms)
    p |= {f"combination {place} that was not tried": 1.0 for place in range(registered, MOST_COMBINED)}
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
