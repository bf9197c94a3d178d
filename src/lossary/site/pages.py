"""The routes of the catalogue's pages."""

import html
from typing import Annotated

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteException

from lossary.site import feed, pictures, render, views
from lossary.site.library import Snapshot
from lossary.vocabulary import SYMPTOMS

router = APIRouter(default_response_class=HTMLResponse)
Words = Annotated[str, Query(max_length=300, description="Words, symptoms or names.")]
ATOM = "application/atom+xml"
NOWHERE = "http://site.invalid/"  # stands in a kept feed for the address that it is asked for at


def _now(request: Request) -> Snapshot:
    now: Snapshot = request.app.state.library.now
    return now


@router.get("/")
async def home(request: Request) -> str:
    now = _now(request)
    return now.once("", lambda: views.home(now))


@router.get("/evidence")
async def evidence(request: Request) -> str:
    now = _now(request)
    return now.once("evidence", lambda: views.evidence(now))


@router.get("/rooms/{room}.xml", response_class=Response)
async def room_feed(request: Request, room: str) -> Response:
    now = _now(request)
    if room not in now.rooms:
        raise HTTPException(404, f"There is no room {room}.")
    return _feed(request, room)


@router.get("/rooms/{room}")
async def room(request: Request, room: str) -> str:
    now = _now(request)
    if room not in now.rooms:
        raise HTTPException(404, f"There is no room {room}.")
    return now.once(f"rooms/{room}", lambda: views.room(now, room))


@router.get("/symptoms/{symptom}")
async def symptom(request: Request, symptom: str) -> str:
    now = _now(request)
    if symptom not in SYMPTOMS:
        raise HTTPException(404, f"The catalogue knows no symptom {symptom}.")
    return now.once(f"symptoms/{symptom}", lambda: views.trouble(now, symptom))


@router.get("/papers/{room}/{id}")
async def paper(request: Request, room: str, id: str) -> str:
    now = _now(request)
    try:
        found = now.paper(room, id)
    except KeyError:
        raise HTTPException(404, f"There is no paper {id} in the room {room}.") from None
    return now.once(f"papers/{room}/{id}", lambda: views.paper(now, found))


@router.get("/engines/{room}/{name}")
async def engine(request: Request, room: str, name: str) -> str:
    now = _now(request)
    module = f"lossary.{room}._{name}"
    if module not in now.engines:
        raise HTTPException(404, f"The room {room} has no engine {name}.")
    return now.once(f"engines/{room}/{name}", lambda: views.engine(now, module))


@router.get("/pictures/{room}/{id}.svg", response_class=Response)
async def picture(request: Request, room: str, id: str) -> Response:
    """What the paper's claims draw; the first request for it waits until it is drawn."""
    now = _now(request)
    try:
        found = now.paper(room, id)
        drawn = await pictures.svg(now, found, request.app.state.folder / "pictures")
    except KeyError:
        raise HTTPException(404, f"There is no picture of {id} in the room {room}.") from None
    except (TimeoutError, RuntimeError) as error:
        raise HTTPException(503, f"{id} cannot be drawn now: {error}") from None
    return Response(drawn, media_type="image/svg+xml")


@router.get("/search")
async def search(request: Request, q: Words = "") -> str:
    return views.search(_now(request), q)


@router.get("/answers")
async def answers(request: Request, q: Words = "") -> str:
    """The best few papers as a list, for the page to show while one types."""
    return views.answers(_now(request), q)


@router.get("/feed.xml", response_class=Response)
async def verdicts(request: Request) -> Response:
    """New and changed verdicts."""
    return _feed(request, None)


def _feed(request: Request, room: str | None) -> Response:
    now, base = _now(request), html.escape(str(request.base_url))
    made = now.once(f"feed {room}", lambda: feed.atom(now, NOWHERE, room))
    return Response(made.replace(NOWHERE.encode(), base.encode()), media_type=ATOM)


@router.get("/robots.txt", response_class=PlainTextResponse)
async def robots() -> str:
    return "User-agent: *\nDisallow: /runs\nDisallow: /search\nDisallow: /answers\n"


def answer_missing(app: FastAPI) -> None:
    """What is not there is answered by a page that says so."""

    @app.exception_handler(StarletteException)
    async def missing(request: Request, error: StarletteException) -> HTMLResponse:
        said = error.detail if error.detail != "Not Found" else "There is no such page."
        return HTMLResponse(
            render.page("error.html", here="error", message=said), error.status_code, headers=error.headers
        )
