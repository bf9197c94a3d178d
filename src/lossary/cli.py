"""The command line. Everything heavy is imported inside the command that needs it, so that search stays instant."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossary import __version__, catalogue
from lossary.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from lossary.compare.problem import Problem
    from lossary.compare.profile import Profile
    from lossary.compare.result import Comparison
    from lossary.roles import Result

app = typer.Typer(
    name="lossary",
    help="Published machine-learning methods as parts that run, each with evidence.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

SOURCE = (
    "A CSV, TSV, Parquet, Arrow or .npz file, a folder with a sub-folder of images for each class, a saved Hugging "
    "Face dataset, or the name of a bundled set such as digits."
)
TARGET = "Column to predict, or columns of 0 and 1 with commas between; a bundled set has one of its own."
TASK = "classes, ordinal, multilabel or real; inferred unless given."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
MARKS = {"holds": "green", "does not hold": "red", "inconclusive": "yellow"}


def main() -> None:
    """Exit codes: 0 done, 1 a failed check or a finding, 2 bad input, 130 interrupted."""
    try:
        app()
    except BadInput as error:
        print(f"lossary: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lossary: interrupted; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(epilog="Example: lossary compare my.csv --target y --budget 5m")
def compare(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    target: Annotated[str | None, typer.Option(help=TARGET)] = None,
    task: Annotated[str | None, typer.Option(help=TASK)] = None,
    group: Annotated[str | None, typer.Option(help="Column whose equal values no split may part.")] = None,
    time: Annotated[str | None, typer.Option(help="Column of times: models are tested on what is later.")] = None,
    sample_weight: Annotated[str | None, typer.Option(help="Column that says how much each row counts.")] = None,
    id: Annotated[str | None, typer.Option(help="Column that names each row; no feature.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Column to leave out; may be repeated.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="An .npy file with a row of numbers for each row.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows to confirm on, instead of a quarter of these.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these parts, papers or conventional arms: a,b,c.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Conventional arm to beat. [default: the best one]")] = None,
    model: Annotated[str | None, typer.Option(help="A network of your own: package.module:builder.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="What decides: accuracy, AUROC, MAE, ..., or your own package.module:function.")
    ] = None,
    cost_matrix: Annotated[Path | None, typer.Option(help="Table of costs, true class by decision: decides.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Table of another model's predictions by --id.")] = None,
    seeds: Annotated[int, typer.Option(help="Of each network in each cell.")] = 5,
    budget: Annotated[str | None, typer.Option(help="Time to stay within: 90s, 5m, 1h30m.")] = None,
    device: Annotated[str, typer.Option(help="Where networks are trained: cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for the results. [default: lossary-out/NAME]")] = None,
    only_estimate: Annotated[bool, typer.Option("--estimate", help="Only tell how long it would take.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find out which published part helps on your data, and whether it beats what you would have done anyway.

    A quarter of the rows is locked away first, and the answer rests on them alone. Interrupted, the same command goes
    on from what is finished.
    """
    limit = None if budget is None else _seconds(budget)
    folder = out or Path("lossary-out") / Path(source).stem
    options: dict[str, Any] = {
        "target": target, "task": task, "group": group, "time": time, "sample_weight": sample_weight, "id": id,
        "drop": drop or (), "embeddings": embeddings and str(embeddings), "test": test and str(test),
        "arms": [name.strip() for name in (arms or "").split(",") if name.strip()], "baseline": baseline,
        "model": model, "metric": metric, "cost_matrix": cost_matrix and str(cost_matrix),
        "predictions": predictions and str(predictions), "seeds": seeds, "device": device,
    }  # fmt: skip
    try:
        with _counted("reading and profiling") as progress:
            with _extra("compare"):
                from lossary.compare import run
            if only_estimate:
                seconds, plan = run.estimate(source, budget=limit, out=folder, progress=progress, **options)
            else:
                found = run.compare(source, budget=limit, out=folder, progress=progress, **options)
    except KeyboardInterrupt:
        print(f"lossary: interrupted; the same command goes on from what is in {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    if only_estimate and as_json:
        _print_json({"seconds": round(seconds), "arms": [arm.name for arm in plan.arms]})
    elif only_estimate:
        print(f"About {seconds:.0f} s on this machine for {len(plan.arms)} arms, less if hopeless ones are dropped.")
    elif as_json:
        from lossary.compare.report import to_json

        print(to_json(found))
    else:
        _print_comparison(found, folder)


@app.command(epilog="Example: lossary profile my.csv --target y --out my-profile")
def profile(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    target: Annotated[str | None, typer.Option(help=TARGET)] = None,
    task: Annotated[str | None, typer.Option(help=TASK)] = None,
    group: Annotated[str | None, typer.Option(help="Column of groups, whose errors are compared.")] = None,
    time: Annotated[str | None, typer.Option(help="Column of times: early and late rows are compared.")] = None,
    test: Annotated[str | None, typer.Option(help="File of rows to come: their columns are compared.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Column to leave out; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the page, its record and its pictures.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what is wrong with the data, each finding with its uncertainty and what it means for the choice.

    The rows that `compare` would lock for its confirmation stay unseen.
    """
    try:
        with _counted("reading") as progress:
            with _extra("compare"):
                from lossary.compare import profile_page
                from lossary.compare.load import load
                from lossary.compare.problem import lock
                from lossary.compare.profile import profile as measure
                from lossary.compare.run import check_folder
            if out is not None and not (out / profile_page.PAGE).exists():
                check_folder(out)
            problem = load(source, target=target, task=task, group=group, time=time, test=test, drop=drop or ())
            found = measure(problem, lock(problem)[0], progress=progress)
    except KeyboardInterrupt:
        print("lossary: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    if out is not None:
        profile_page.write(problem, found, out)
    if as_json:
        print(profile_page.to_json(problem, found))
    else:
        _print_profile(problem, found, out)


@app.command(epilog="Example: lossary predict lossary-out/my new.csv --with-sets --out predicted.csv")
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a comparison, or the winner.joblib in it; only your own.")],
    source: Annotated[str, typer.Argument(help="Rows to predict, in any form that compare takes.")],
    with_sets: Annotated[
        bool, typer.Option("--with-sets", help="Also sets or intervals, and how unusual each row is.")
    ] = False,
    alpha: Annotated[float, typer.Option(help="Share of rows whose set or interval may miss.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="CSV file for the predictions. [default: print them]")] = None,
    as_json: AsJson = False,
) -> None:
    """Apply the winner of a comparison to new rows."""
    if not 0 < alpha < 1:
        raise BadInput(f"--alpha: expected a number between 0 and 1, got {alpha:g}")
    with _extra("compare"):
        from lossary.compare import model as saved
        from lossary.compare.load import rows_of
    winner = saved.read(model)
    words = [name for name, kind in winner.columns.items() if kind.kind not in "biufM"]
    features, notes = saved.columns_of(winner, rows_of(source, words=words, shape=winner.shape), repr(source))
    for note in notes:
        print(note, file=sys.stderr)
    found = winner.predict(features, with_sets=with_sets, alpha=alpha)
    if out is not None:
        try:
            found.to_csv(out, index=False)
        except OSError as error:
            raise BadInput(f"--out: cannot write {str(out)!r} ({error.strerror}); name another file") from None
        print(f"{len(found):,} rows predicted by {winner.name}: {out}")
    elif as_json:
        _print_json(found.to_dict("records"))
    else:
        print(found.to_csv(index=False), end="")


@app.command(epilog='Example: lossary find "noisy labels, few positives"')
def find(
    query: Annotated[str, typer.Argument(help="Words, symptoms or names.")],
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    role: Annotated[str | None, typer.Option(help="Only papers with a part of this role.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many papers.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Search the catalogue: which published ideas claim to help, and what we found."""
    if room is not None:
        _one_of("--room", room, sorted({paper["room"] for paper in catalogue.entries()}))
    if role is not None:
        _one_of(
            "--role", role, sorted({p["role"] for paper in catalogue.entries() for p in paper["parts"] if p["role"]})
        )
    hits = [
        hit
        for hit in catalogue.search(query)
        if room in (None, hit["room"]) and (role is None or any(p["role"] == role for p in hit["parts"]))
    ][:limit]
    if as_json:
        _print_json([_hit(hit, role) for hit in hits])
        return
    if not hits:
        print(f"Nothing matches {query!r}. Try other words, or a symptom such as 'noisy labels' or 'long tail'.")
        return
    from rich.markup import escape
    from rich.padding import Padding

    out = _console()
    for hit in hits:
        where = ", ".join(filter(None, (f"room {hit['room']}", _roles(hit))))
        out.print(f"[bold cyan]{hit['id']}[/]  [dim]{where}[/]  {_found(hit)}")
        out.print(Padding(escape(hit["summary"]), (0, 0, 0, 4)))


@app.command(epilog="Example: lossary show polyloss, or a whole room: lossary show losses")
def show(
    paper_id: Annotated[str, typer.Argument(metavar="ID", help="A paper's id, as `find` prints it, or a room.")],
    as_json: AsJson = False,
) -> None:
    """What a paper changes, when it helps, how to call it, and what was found; or what a room has for which trouble."""
    papers = (
        [entry for entry in catalogue.entries() if entry["room"] == paper_id] if paper_id in catalogue.ROOMS else []
    )
    if papers:
        if as_json:
            _print_json({"room": paper_id, "about": catalogue.room_page(paper_id), "papers": papers})
        else:
            _print_room(paper_id, papers)
        return
    paper = _paper(paper_id)
    if as_json:
        _print_json(paper)
        return
    from rich.markup import escape
    from rich.padding import Padding

    out = _console()
    out.print(f"[bold]{escape(paper['title'])}[/] ({paper['year']})  [dim]{paper['room']}/{paper['id']}[/]\n")
    out.print(escape(paper["summary"]) + "\n")
    if paper["about"]:
        out.print(escape(_unwrapped(paper["about"])) + "\n")
    for part in paper["parts"]:
        kind = f" [dim]{part['role']}[/]" if part["role"] else ""
        out.print(f"[cyan]from lossary.{paper['room']} import {part['name']}[/]{kind}")
        out.print(Padding(f"{escape(part['signature'])}\n[dim]{escape(part['summary'])}[/]", (0, 0, 0, 4)))
    for claim in paper["claims"]:
        record = (paper["verdict"] or {}).get(claim["name"])
        out.print(f"\n[dim]claim[/] {escape(claim['says'])}")
        out.print(Padding(f"{_outcome(record)}\n[dim]{escape(claim['scale'])}[/]", (0, 0, 0, 6)))
    if paper["departs"]:
        out.print("\n[dim]departs from the paper:[/] " + escape("; ".join(paper["departs"])))
    if paper["url"]:
        out.print(f"[dim]{paper['url']}[/]")


@app.command(epilog="Example: lossary claim polyloss --smoke")
def claim(
    paper_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="A paper's id; none with --all.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Only the claim with this name.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every claim of every paper.")] = False,
    smoke: Annotated[bool, typer.Option(help="Only see that it runs: three seeds, few steps, no verdict.")] = False,
    record: Annotated[bool, typer.Option(help="Append the run to the paper's verdict file.")] = False,
    draw: Annotated[
        bool, typer.Option("--draw", help="Only draw what the method does, to lossary-out/ID.png.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a paper's headline claim as a small experiment, with a verdict by rules registered beforehand."""
    if everything == (paper_id is not None):
        raise BadInput("ID: give one paper's id, or --all")
    if draw:
        if everything or smoke or record or name:
            raise BadInput("--draw: give one paper's id and nothing else")
        _draw(_paper(paper_id or ""), as_json)
        return
    if smoke and record:
        raise BadInput("--record: a smoke run has no verdict to record; leave out one of --smoke and --record")
    import torch

    from lossary.claims import runner

    torch.set_num_threads(1)  # small models only wait on a second thread
    papers = catalogue.entries() if everything else [_paper(paper_id or "")]
    jobs = [(paper, c) for paper in papers for c in runner.claims_of(paper) if name in (None, c.name)]
    if not jobs:
        known = ", ".join(c["name"] for paper in papers for c in paper["claims"]) or "none"
        raise BadInput(f"--name: {name!r} is no claim of {paper_id}; registered: {known}")
    done = []
    with _progress("claims", len(jobs)) as advance:
        for paper, registered in jobs:
            if smoke:
                runner.smoke(registered)
                result = {"id": paper["id"], "claim": registered.name, "outcome": "runs"}
            else:
                result = {"id": paper["id"], **runner.run(paper, registered)}
                if record:
                    runner.append(paper, {k: v for k, v in result.items() if k != "id"})
            done.append(result)
            advance(f"{paper['id']}: {registered.name}")
    if as_json:
        _print_json(done)
    else:
        _print_verdicts(done)


@app.command(epilog="Example: lossary serve --port 8080")
def serve(
    folder: Annotated[Path, typer.Option(help="Where uploads and runs are kept.")] = Path("lossary-site"),
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own asks for a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[str | None, typer.Option(help="What visitors must show. [default: made up where needed]")] = None,
) -> None:
    """The catalogue and the comparison as pages in your browser, on this machine."""
    with _extra("site"):
        from lossary.site.serve import serve as run

        run(folder, host=host, port=port, token=token)


@app.command(epilog="Example: lossary build-site public --url https://example.org/lossary")
def build_site(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Empty, new, or of an earlier build.")],
    url: Annotated[str, typer.Option(help="Where it will be, for the links of the feed.")] = "",
) -> None:
    """Write the catalogue as static pages, for any web host or to open from disk."""
    with _extra("site"):
        from lossary.site.build import build_site as build

        with _counted("writing pages") as progress:
            page = build(folder, url=url, progress=progress)
        print(page)


@app.command(epilog="Example: lossary digest --to me@example.org --smtp mail.example.org:587 --room losses")
def digest(
    to: Annotated[str, typer.Option(help="Who gets it.")],
    smtp: Annotated[str, typer.Option(help="Mail server: HOST or HOST:PORT.")],
    query: Annotated[
        str | None, typer.Option("--search", help="Only papers that `lossary find` gives for this.")
    ] = None,
    room: Annotated[str | None, typer.Option(help="Only papers of this room.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Only verdicts of this day or later, 2026-01-31. [default at first: yesterday]")
    ] = None,
    sender: Annotated[str | None, typer.Option("--from", help="Sender's address. [default: the receiver's]")] = None,
    url: Annotated[str, typer.Option(help="Where the site is, for links.")] = "",
    state: Annotated[Path, typer.Option(help="Keeps what was sent.")] = Path("~/.local/state/lossary/digest.json"),
) -> None:
    """Mail new and changed verdicts, each once: for cron.

    A login is read from LOSSARY_SMTP_USER and LOSSARY_SMTP_PASSWORD.
    """
    with _extra("site"):
        from lossary.site.digest import send

        user, password = (os.environ.get(f"LOSSARY_SMTP_{name}") for name in ("USER", "PASSWORD"))
        login = (user, password) if user and password else None
        count = send(
            to,
            smtp,
            search=query,
            room=room,
            since=since,
            sender=sender,
            url=url,
            state=state.expanduser(),
            login=login,
        )
    print(f"{count} verdicts sent to {to}" if count else "nothing new; nothing sent")


@app.command(epilog="Example: lossary check mypackage.losses:my_loss")
def check(
    part: Annotated[str, typer.Argument(metavar="MODULE:NAME", help="Your part, or one of ours.")],
    role: Annotated[str | None, typer.Option(help="The role to hold it to, if it carries no role's decorator.")] = None,
    on: Annotated[str, typer.Option(help="For losses: what the target is (classes, multilabel, real).")] = "classes",
    as_json: AsJson = False,
) -> None:
    """Run a role's battery of checks on a part, yours or ours."""
    from lossary.roles import check as run_battery

    results = run_battery(_marked(_imported(part), role, on))
    if as_json:
        _print_json([vars(result) for result in results])
    else:
        _print_checks(part, results)
    if not all(result.passed for result in results):
        raise typer.Exit(1)


@app.command(epilog="Example: lossary new losses my-loss")
def new(
    room: Annotated[str, typer.Argument(help="The room it belongs to.")],
    paper_id: Annotated[str, typer.Argument(metavar="ID", help="Lower-case words joined by hyphens.")],
) -> None:
    """Write the stubs of a new paper: its part, its claim and its reference test."""
    from lossary.scaffold import write

    for path in write(room, paper_id):
        print(path)


@app.command(epilog="Example: lossary audit --room losses")
def audit(
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what is missing, stale or out of order. Exit code 1 if anything is."""
    if room is not None:
        _one_of("--room", room, list(catalogue.ROOMS))
    from lossary.audit import audit as findings

    found = findings(room)
    if as_json:
        _print_json(found)
    else:
        for item in found:
            print(f"{item['room']}/{item['id']}: {item['finding']}")
        papers = [paper for paper in catalogue.entries() if room in (None, paper["room"])]
        print(f"{len(papers)} papers, {len(found)} findings. {_chance(papers)}")
    if found:
        raise typer.Exit(1)


# --- helpers of the commands ----------------------------------------------------------------------------------


def _paper(paper_id: str) -> catalogue.Entry:
    try:
        return catalogue.entry(paper_id)
    except KeyError as error:
        raise BadInput(str(error.args[0])) from None


def _one_of(option: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise BadInput(f"{option}: expected one of {', '.join(choices)}, got {value!r}")


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    if not module or not name:
        raise BadInput(f"{where}: expected MODULE:NAME, for instance mypackage.losses:my_loss")
    sys.path.insert(0, str(Path.cwd()))
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise BadInput(f"{where}: no module {error.name!r}; run from its folder or install its package") from None
    except AttributeError:
        raise BadInput(f"{where}: the module {module} has no {name!r}") from None


def _marked(part: Any, role: str | None, on: str) -> Any:
    """The part itself if it carries a mark, otherwise held to `role`, a loss unless told."""
    from lossary import roles

    if roles.mark_of(part) is not None:
        return part
    if not callable(part):
        raise BadInput(f"{part!r}: expected a function or a class")
    role = role or "loss"
    _one_of("--role", role, sorted(roles.ROLES))
    if role == "loss":
        from lossary.roles.loss import FIXTURES

        _one_of("--on", on, sorted(FIXTURES))
        return roles.loss(on=on)(_positional(part, ("input", "target")))
    decorator: Callable[[Any], Any] = getattr(roles, role)()
    return decorator(part)


def _positional(part: Any, names: tuple[str, ...]) -> Any:
    """The function under the names that the battery calls its first arguments by, whatever the author called them."""
    import functools
    import inspect

    if isinstance(part, type):
        return part
    own = inspect.signature(part)
    theirs = list(own.parameters)[: len(names)]
    if len(theirs) < len(names):
        raise BadInput(f"{part.__name__}: expected at least the arguments {', '.join(names)}, got {own}")

    @functools.wraps(part)
    def renamed(**given: Any) -> Any:
        first = [given.pop(name) for name in names]
        return part(*first, **given)

    return renamed


def _console(**options: Any) -> "Console":
    from rich.console import Console

    return Console(soft_wrap=False, highlight=False, **options)


def _bar() -> "Progress":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = _console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar with the time left on stderr, where that is a terminal; `advance(text)` after each step."""
    with _bar() as progress:
        task = progress.add_task(what, total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


@contextmanager
def _counted(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """As `_progress`, for work whose total becomes known as it goes: `tell(done, total, text)`."""
    with _bar() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total, text: progress.update(task, completed=done, total=total, description=text)


def _seconds(text: str) -> float:
    """90, 90s, 5m or 1h30m in seconds."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    seconds = sum(int(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    if not seconds:
        raise BadInput(f"--budget: expected a time such as 90s, 5m or 1h30m, got {text!r}")
    return float(seconds)


def _print_comparison(found: "Comparison", folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from lossary.compare.confirm import bounds, detectable, figure
    from lossary.compare.report import capital, duration

    out, metric, data = _console(), found.metric, found.data
    for note in found.notes:
        out.print(f"[dim]{escape(note)}[/]")
    protocol = "{partitions} x {folds} cells, {seeds} seeds, {settings} configurations each".format(**found.protocol)
    rows = f"{data['rows'] - data['locked']:,} rows searched, {data['locked']:,} locked"
    out.print(f"{escape(data['name'])}: {metric['name']}, {metric['better']} is better ({metric['why']}); {rows}.\n")
    cells = []
    for arm in found.arms:
        lead = arm.against_baseline
        cells.append(
            (
                f"{arm.score:.4g}",
                figure(lead.difference, lead, sign=True) if lead else "baseline" if arm.conventional else "",
                bounds(lead) if lead else "",
                "dropped" if arm.dropped else "" if arm.p_holm is None else f"{arm.p_holm:.2g}",
                duration(arm.seconds),
            )
        )
    table = Table(box=None, pad_edge=False, header_style="dim")
    heads = ("arm", "score", "lead", "95% interval", "p", "time")
    for head in heads:
        table.add_column(head, justify="left" if head in ("arm", "95% interval") else "right", no_wrap=True)
    taken = sum(2 + max(map(len, column)) for column in zip(heads[1:], *cells))
    for arm, (score, *rest, p, time) in zip(found.arms, cells):
        name = escape(_in_lines(arm.name, max(out.width - taken, 16)))
        table.add_row(
            name if arm.part else f"[yellow]{name}[/]", score, *rest, f"[dim]{p}[/]" if arm.dropped else p, time
        )
    out.print(table)
    out.print(f"[dim]Exploratory: {protocol}; leads over the best conventional arm; p by Holm; time of one fit.[/]")
    out.print(f"\n[bold]{escape(found.sentence)}[/]")
    if found.confirmation:
        out.print(f"[dim]{escape(capital(detectable(found.confirmation, metric['unit'])))}.[/]")
    if found.own:
        out.print(escape(found.own))
    if found.brought:
        out.print(escape(found.brought["sentence"]))
    out.print(f"[dim]The winner on other rows: lossary predict {escape(str(folder))} FILE --with-sets[/]")
    out.print(f"[dim]{len(found.skipped)} parts were skipped; the reasons and all else: {folder / 'report.html'}[/]")


def _in_lines(name: str, width: int) -> str:
    """An arm's name, every line but the first indented, so that none reads like another arm."""
    lines = []
    for place, part in enumerate(name.split(" + ")):
        first = "  + " if place else ""
        lines += wrap(part, width, initial_indent=first, subsequent_indent="    ")
    return "\n".join(lines)


def _print_profile(problem: "Problem", found: "Profile", folder: Path | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from lossary.compare.profile_page import ordered, sentence
    from lossary.compare.report import quantity

    out = _console()
    for note in (*problem.notes, *found.notes):
        out.print(f"[dim]{escape(note)}[/]")
    out.print(f"{escape(problem.name)}: {found.num_samples:,} of {len(problem):,} rows looked at.\n")
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 1, 0))
    table.add_column("finding", ratio=2)
    table.add_column("what it means", ratio=3)
    for finding in ordered(found):
        value, low, high = (quantity(number, finding) for number in (finding.value, finding.low, finding.high))
        p = "" if finding.p_holm is None else f", p {finding.p_holm:.2g}"
        title = f"[bold yellow]{escape(finding.title)}: found[/]" if finding.raised else escape(finding.title)
        unit = finding.unit.removeprefix("share ")
        table.add_row(f"{title}\n{value} {unit}\n[dim]{low} to {high}{p}[/]", escape(finding.means))
    out.print(table)
    out.print(f"[bold]{escape(sentence(found))}[/]")
    out.print("[dim]Intervals are 95%, each by itself; p by Holm over all findings.[/]")
    if folder is not None:
        out.print(f"[dim]How each was measured, with pictures: {escape(str(folder / 'profile.html'))}[/]")


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1, default=str))


def _hit(hit: catalogue.Entry, role: str | None) -> dict[str, Any]:
    shown = [p for p in hit["parts"] if role in (None, p["role"])] or hit["parts"]
    return {
        **{k: hit[k] for k in ("id", "room", "title", "year", "summary", "helps", "score", "why", "verdict")},
        "role": shown[0]["role"],
        "part": shown[0]["name"],
        "parts": [p["name"] for p in hit["parts"]],
    }


def _print_room(room: str, papers: list[catalogue.Entry]) -> None:
    """The room's page, in whose table every part carries how many of its paper's claims hold, and its papers."""
    from rich.markdown import Markdown
    from rich.markup import escape
    from rich.padding import Padding

    share: dict[str, str] = {}
    for paper in papers:
        outcomes = list(catalogue.outcomes(paper).values())
        found = f"{outcomes.count('holds')}/{len(outcomes)}" if outcomes else "not run"
        share |= {part["name"]: found for part in paper["parts"]}

    def evident(match: re.Match[str]) -> str:
        name = match[1]
        return f"{match[0]} ({share[name]})" if name in share else match[0]

    lines = catalogue.room_page(room).split("\n")
    page = "\n".join(re.sub(r"`(\w+)`", evident, line) if line.startswith("|") else line for line in lines)
    out = _console()
    out.print(Markdown(page))
    out.print("[dim](2/3): two of the three claims of the part's paper hold, each on its own small task.[/]\n")
    for paper in papers:
        out.print(f"[bold cyan]{paper['id']}[/]  [dim]{_roles(paper)}[/]  {_found(paper)}")
        out.print(Padding(escape(paper["summary"]), (0, 0, 0, 4)))
    out.print(f"\n[dim]{_chance(papers)}[/]")


def _roles(paper: catalogue.Entry) -> str:
    return ", ".join(dict.fromkeys(p["role"] for p in paper["parts"] if p["role"]))


def _found(paper: catalogue.Entry) -> str:
    """The outcomes of a paper's claims, controls left out."""
    outcomes = list(catalogue.outcomes(paper).values())
    counted = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    return (
        ", ".join(f"[{MARKS[o]}]{o}[/]" + (f" x{n}" if n > 1 else "") for o, n in counted.items()) or "[dim]not run[/]"
    )


def _outcome(record: dict[str, Any] | None) -> str:
    if record is None:
        return "[dim]not run[/]"
    text = f"[{MARKS[record['outcome']]}]{record['outcome']}[/]"
    if record["note"]:
        text += f" ({record['note']})"
    if record["low"] is not None:
        interval = rf"\[{record['low']:.3g}, {record['high']:.3g}]"
        text += f": {record['effect']:.3g} {record['unit']} {interval}, {record['n']} seeds"
    elif record["effect"] is not None:
        text += f": largest deviation {record['effect']:.3g}"
    return text


def _print_verdicts(done: list[dict[str, Any]]) -> None:
    out = _console()
    for result in done:
        if result["outcome"] == "runs":
            out.print(f"{result['id']}: {result['claim']} runs (smoke; no verdict)")
            continue
        out.print(f"{result['id']}: {result['says']}\n  {_outcome(result)}")
        out.print(
            f"  [dim]{result['kind']}, threshold {result['threshold']:g} {result['unit']}; {result['scale']}; "
            f"{result['seconds']} s[/]"
        )
    if any(result["outcome"] != "runs" for result in done):
        from lossary.verdict import expected_by_chance

        out.print(
            f"[dim]At most {expected_by_chance(len(done)):.2g} of {len(done)} would hold by chance alone. "
            "Each verdict speaks of its own task and scale only.[/]"
        )


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """For what an extra brings: a package that is missing is told with what installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is not installed; pip install 'lossary[{name}]'") from None


def _draw(paper: catalogue.Entry, as_json: bool) -> None:
    import torch

    with _extra("compare"):
        from lossary.claims import Seeds
        from lossary.claims.draw import drawer, png, svg

        torch.set_num_threads(1)
        drawing = drawer(paper)
        if drawing is None:
            able = ", ".join(other["id"] for other in catalogue.entries() if other["draws"])
            raise BadInput(f"--draw: {paper['id']} has no picture; these have one: {able or 'none'}")
        panels = drawing(Seeds((0,)))
        pictures = {"png": png(panels), "svg": svg(panels).encode()}
    folder = Path("lossary-out")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{paper['id']}.{kind}" for kind in pictures]
    for path, content in zip(paths, pictures.values()):
        path.write_bytes(content)
    if as_json:
        _print_json({"id": paper["id"], "files": [str(path) for path in paths]})
    else:
        print(f"{len(panels)} pictures of {paper['id']}: {' and '.join(map(str, paths))}")


def _chance(papers: list[catalogue.Entry]) -> str:
    from lossary.verdict import expected_by_chance

    n = sum(len(paper["claims"]) for paper in papers)
    held = sum(r["outcome"] == "holds" for paper in papers for r in (paper["verdict"] or {}).values())
    return f"{held} of {n} claims hold; at most {expected_by_chance(n):.2g} would by chance alone."


def _print_checks(part: str, results: "list[Result]") -> None:
    out = _console()
    for result in results:
        mark, tail = ("[green]pass[/]", "") if result.passed else ("[red]FAIL[/]", f"\n       {result.message}")
        if result.passed and result.xfail:
            mark, tail = "[yellow]known[/]", f"\n       {result.xfail}"
        out.print(f"{mark}  {result.says}", end="")
        out.print(tail, markup=False)
    failed = sum(not result.passed for result in results)
    out.print(f"{part}: {len(results) - failed} of {len(results)} checks pass.")


def _unwrapped(text: str) -> str:
    """Paragraphs on one line each, so that the terminal wraps them; tables and lists stay as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.lstrip().startswith(("|", "-", "*", " ")) else " ".join(p.split()) for p in paragraphs)
