"""The pages of runs: drop a file, choose, watch, read, download; and a paper's Run button."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Form, HTTPException, Request, UploadFile
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse

from lossary.errors import BadInput
from lossary.site import render
from lossary.site.runs import Full, Run, Runs
from lossary.site.security import refused

router = APIRouter(default_response_class=HTMLResponse)

BUDGETS = {60: "1 minute", 300: "5 minutes", 900: "15 minutes", 3600: "1 hour", 0: "as long as it takes"}
USUAL = 300  # seconds
TASKS = {
    "": "as the values suggest",
    "classes": "classes",
    "ordinal": "levels in an order",
    "multilabel": "labels, several at once",
    "real": "a number",
}
NEWEST = 8  # runs on the page to drop a file on
STREAM = 25.0  # seconds, after which a browser asks for the stream anew
LOOK = 0.4  # seconds between looks at whether there is something new
# What may be downloaded, and as what.
FILES = {
    "report.html": "text/html; charset=utf-8",
    "result.json": "application/json",
    "winner.py": "text/x-python; charset=utf-8",
    "winner.joblib": "application/octet-stream",
    "profile.html": "text/html; charset=utf-8",
    "profile.json": "application/json",
}
# What a visitor's file led to is shown as a picture is: nothing in it runs, loads or navigates.
SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"

Id = Annotated[str, InPath(pattern="^[0-9a-f]{16}$")]
Name = Annotated[str, InPath(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
Column = Annotated[str, Form(max_length=500)]


def answer_errors(app: FastAPI) -> None:
    """What a visitor can put right is answered by a page that says so."""

    @app.exception_handler(BadInput)
    def bad(request: Request, error: BadInput) -> Response:
        return refused(429 if isinstance(error, Full) else 400, str(error), "/compare")

    @app.exception_handler(RequestValidationError)
    def odd(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        if request.method == "GET":
            return refused(404, "There is no such page.")
        if field == "file":
            return refused(422, "No file was chosen; choose one first.", "/compare")
        return refused(422, f"{field or 'The form'}: {first['msg']}.", "/compare")


# Begin


@router.get("/compare")
def start(request: Request) -> HTMLResponse:
    """The page to drop a file on."""
    runs = _runs(request)
    newest = [run for run in runs.all() if run.kind != "claim"][:NEWEST]
    return _page("compare.html", here="compare", bundled=_bundled(), **_listed(runs, newest))


@router.post("/compare", status_code=303)
def drop(request: Request, file: UploadFile) -> RedirectResponse:
    """Takes a file, and profiles it."""
    return _to(_runs(request).upload(file.file, file.filename or ""))


@router.post("/compare/bundled", status_code=303)
def bundled(request: Request, name: Annotated[str, Form(max_length=40)]) -> RedirectResponse:
    """Profiles one of the data sets that come with installed packages."""
    if name not in _bundled():
        raise BadInput(f"There is no bundled set {name!r}; choose one of {', '.join(_bundled())}.")
    return _to(_runs(request).add("profile", name, {"name": name, "bundled": name}))


@router.post("/papers/{room}/{paper}/claims/{name}/run", status_code=303)
def claim(request: Request, room: Name, paper: Name, name: Name) -> RedirectResponse:
    """Runs a paper's claim, unless it is under way already."""
    if _registered(request, room, paper, name) is None:
        raise HTTPException(404)
    runs = _runs(request)
    under_way = [run for run in runs.of_claim(room, paper, name) if not run.over]
    given = {"room": room, "paper": paper, "name": name}
    return _to(under_way[0] if under_way else runs.add("claim", f"{paper}: {name}", given))


# Runs


@router.get("/runs")
def every(request: Request) -> HTMLResponse:
    """All runs."""
    runs = _runs(request)
    return _page("runs.html", here="runs", **_listed(runs, runs.all()))


@router.get("/runs/{id}")
def show(request: Request, id: Id) -> HTMLResponse:
    """A run: how far it is, or what it found."""
    run = _run(request, id)
    return _page("run.html", here=f"runs/{id}", **_shown(request, run))


@router.get("/runs/{id}/live")
def live(request: Request, id: Id) -> HTMLResponse:
    """The part of a run's page that changes while it runs; its header tells whether it is over."""
    run = _run(request, id)
    answer = _page("live.html", here=f"runs/{id}", **_shown(request, run))
    answer.headers["run-status"] = run.status
    return answer


@router.get(
    "/runs/{id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def events(request: Request, id: Id) -> StreamingResponse:
    """The same as a stream of server-sent events: `live` with the changed part, at last `over`."""
    await asyncio.to_thread(_run, request, id)
    return StreamingResponse(_events(request, id), media_type="text/event-stream")


async def _events(request: Request, id: str) -> AsyncIterator[str]:
    runs, last, until = _runs(request), None, time.monotonic() + STREAM
    yield "retry: 1000\n\n"
    while time.monotonic() < until and not runs.closing:
        run = await asyncio.to_thread(runs.get, id)
        if run is None or run.over:
            yield "event: over\ndata: \n\n"
            return
        text = await asyncio.to_thread(lambda run=run: render.page("live.html", **_shown(request, run)))
        if text != last:
            last = text
            yield "event: live\n" + "".join(f"data: {line}\n" for line in text.splitlines()) + "\n"
        await asyncio.sleep(LOOK)


@router.post("/runs/{id}/cancel", status_code=303)
def cancel(request: Request, id: Id) -> RedirectResponse:
    """Ends a run, with all of its processes."""
    run = _run(request, id)
    _runs(request).cancel(id)
    return _to(run)


@router.post("/runs/{id}/again", status_code=303)
def again(request: Request, id: Id) -> RedirectResponse:
    """Goes on with a run that failed or was cancelled."""
    run = _run(request, id)
    _runs(request).again(id)
    return _to(run)


@router.post("/runs/{id}/delete", status_code=303)
def delete(request: Request, id: Id) -> RedirectResponse:
    """Removes a run, with all that it wrote, and its file if no other run reads it."""
    _runs(request).delete(_run(request, id).id)
    return RedirectResponse("/compare", 303)


@router.post("/runs/{id}/next", status_code=303)
def next_(
    request: Request,
    id: Id,
    step: Annotated[Literal["profile", "compare"], Form()],
    target: Column = "",
    other: Column = "",
    budget: Annotated[int, Form()] = USUAL,
    task: Annotated[str, Form(max_length=20)] = "",
    metric: Annotated[str, Form(max_length=40)] = "",
    group: Column = "",
    time: Column = "",
    row: Column = "",
    drop: Annotated[list[str] | None, Form(max_length=1000)] = None,
) -> RedirectResponse:
    """Profiles the file of a profile again with another target, or compares on it.

    `other` is a target that is not among the likely ones, `row` the column that names each row.
    """
    run, runs = _run(request, id), _runs(request)
    if run.kind != "profile" or run.status != "done":
        raise BadInput("This can only be asked of a profile that is done.")
    if budget not in BUDGETS:
        raise BadInput(f"The budget of {budget} seconds is none of those offered.")
    if task not in TASKS:
        raise BadInput(f"The task {task!r} is none of those offered.")
    if ":" in metric:  # a function of the visitor's, which never runs here
        raise BadInput(f"The metric {metric!r} is none of those offered.")
    target = other or target
    if not target:
        raise BadInput("Choose the column to predict.")
    given: dict[str, Any] = {key: run.given[key] for key in ("name", "bundled") if key in run.given}
    given |= {"target": target, "task": task or None, "group": group or None, "time": time or None, "id": row or None}
    given["drop"] = [column for column in drop or () if column]
    if step == "compare":
        given |= {"budget": budget or None, "metric": metric or None}
        return _to(runs.add("compare", f"{run.given['name']}: {target}", given, file=run.file))
    return _to(runs.add("profile", run.given["name"], given, file=run.file))


@router.get("/runs/{id}/report", response_class=FileResponse)
def report(request: Request, id: Id) -> FileResponse:
    """The report of a comparison, or the page of a profile."""
    run = _run(request, id)
    return _file(request, run, "profile.html" if run.kind == "profile" else "report.html")


@router.get("/runs/{id}/files/{name}", response_class=FileResponse)
def download(request: Request, id: Id, name: Literal[tuple(FILES)]) -> FileResponse:  # type: ignore[valid-type]
    """A file that a run wrote."""
    run = _run(request, id)
    answer = _file(request, run, name)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", run.given["name"].rpartition(".")[0] or run.given["name"]).strip("-")
    answer.headers["content-disposition"] = f'attachment; filename="{stem or "data"}-{name}"'
    return answer


# What is shown


def _shown(request: Request, run: Run) -> dict[str, Any]:
    """All that the page of a run shows."""
    runs = _runs(request)
    at = runs.read(run, "progress.json")
    rows = at.get("race", [])
    shown: dict[str, Any] = {
        "run": run,
        "at": at,
        "before": runs.place(run) if run.status == "queued" else 0,
        "elapsed": (run.ended or time.time()) - run.started if run.started else 0.0,
        "rows": _drawn(rows),
        "outcome": runs.read(run, "outcome.json") if run.status == "done" else {},
        "files": [name for name in FILES if (runs.path(run) / "out" / name).exists()],
        "budgets": BUDGETS,
        "usual": USUAL,
        "tasks": TASKS,
    }
    if run.kind == "claim":
        shown |= _claim(request, run, shown["outcome"])
    return shown


def _claim(request: Request, run: Run, outcome: dict[str, Any]) -> dict[str, Any]:
    """The claim with its run on record, and with the one made here."""
    claim = _registered(request, run.given["room"], run.given["paper"], run.given["name"])
    here = {**claim, "run": outcome["record"]} if claim and "record" in outcome else None
    return {"claim": claim, "here_run": here}


def _registered(request: Request, room: str, paper: str, name: str) -> dict[str, Any] | None:
    """The claim as the catalogue has it."""
    now = request.app.state.library.now
    try:
        claims: list[dict[str, Any]] = now.claims(now.paper(room, paper))
    except KeyError:
        return None
    return next((claim for claim in claims if claim["name"] == name), None)


def _drawn(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a race with the ends of their intervals as shares of the width of the picture, 0 to 100.

    The axis takes in 0 and the leads of the arms that are still in the race, with half as much again as the middle
    interval on either side, but no arm that lies far from the others, lest it hide them; what lies beyond is cut.
    """
    told = [row for row in rows if "lead" in row]
    if not told:
        return rows
    lengths = sorted(row["high"] - row["low"] for row in told)
    reach = 0.75 * lengths[len(lengths) // 2]
    leads = sorted(row["lead"] for row in told if row["state"] != "out") or [row["lead"] for row in told]
    middle = leads[len(leads) // 2]
    least = min(0.0, max(leads[0], middle - 3 * reach) - reach)
    most = max(0.0, min(leads[-1], middle + 3 * reach) + reach)
    width = (most - least) or 1.0

    def place(value: float) -> float:
        return round(3 + 94 * (min(max(value, least), most) - least) / width, 2)

    drawn = []
    for row in rows:
        if "lead" in row:
            row = row | {"x": place(row["lead"]), "from": place(row["low"]), "to": place(row["high"])}
            row["beyond"] = row["lead"] < least or row["lead"] > most
        drawn.append(row | {"zero": place(0.0)})
    return drawn


def _listed(runs: Runs, some: list[Run]) -> dict[str, Any]:
    """Runs for a table, with the bytes of the file that each reads."""
    sizes = {run.id: path.stat().st_size for run in some if (path := runs.source(run))}
    return {"runs": some, "sizes": sizes, "limits": runs.limits}


@cache
def _bundled() -> dict[str, str]:
    """The bundled sets by name, and what they are."""
    from lossary.compare.bundled import BUNDLED  # loads pandas

    return {name: next(word for word in made.args[::-1] if isinstance(word, str)) for name, made in BUNDLED.items()}


# Small things


def _moment(seconds: float, form: str) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(form)


render.environment().filters["moment"] = _moment


def _runs(request: Request) -> Runs:
    runs: Runs = request.app.state.runs
    return runs


def _run(request: Request, id: str) -> Run:
    found = _runs(request).get(id)
    if found is None:
        raise HTTPException(404)
    return found


def _file(request: Request, run: Run, name: str) -> FileResponse:
    path: Path = _runs(request).path(run) / "out" / name
    if run.status != "done" or not path.is_file():
        raise HTTPException(404)
    headers = {"content-security-policy": SANDBOX, "cache-control": "no-store"}
    return FileResponse(path, media_type=FILES[name], headers=headers)


def _page(template: str, **context: Any) -> HTMLResponse:
    return HTMLResponse(render.page(template, **context), headers={"cache-control": "no-store"})


def _to(run: Run) -> RedirectResponse:
    return RedirectResponse(f"/runs/{run.id}", 303)
