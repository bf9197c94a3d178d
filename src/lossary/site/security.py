"""Who may ask for what: the host, the token, the origin and the size of a request, and what a page may load."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response

from lossary.site import render

COOKIE = "lossary"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAFE = ("GET", "HEAD", "OPTIONS")
FORM = 200_000  # bytes of a request that uploads nothing
AROUND = 10_000  # bytes that a form puts around an uploaded file, at most
DRAINED = 10  # times the limit: so much is read and thrown away, as browsers show no answer before they have sent all
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def guard(app: FastAPI, *, token: str | None) -> None:
    """Puts the guard before all pages of the application."""
    app.add_middleware(Guard, token=token, uploads={"/compare": app.state.runs.limits.upload + AROUND})


class TooLarge(Exception):
    """The body of a request is larger than it may be."""


class Guard:
    """Refuses what must not reach a page, and sets the headers of what leaves it.

    Args:
        app: what is guarded.
        token: what a visitor must show, once, as `?token=`; a cookie then stands for it. None asks for nothing, but
            then only names of this machine are answered to: a page elsewhere whose name was bent to point here
            could otherwise read all.
        uploads: bytes that the body of a request to an address may have, where it is more than `FORM`.
    """

    def __init__(self, app: Any, *, token: str | None, uploads: dict[str, int]) -> None:
        self.app, self.token, self.uploads = app, token, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    found.setdefault(name, value)
            await send(message)

        refusal = self._host(headers) or self._visitor(scope, headers) or _origin(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, sent)
            return
        await self._within(scope, receive, sent, headers)

    def _host(self, headers: Headers) -> Response | None:
        """What a browser calls this server must be a name of this machine where no token protects it."""
        if self.token is None and _split(f"//{headers.get('host', '')}").hostname not in LOOPBACK:
            return refused(400, "Ask for this page at 127.0.0.1 or localhost.")
        return None

    def _visitor(self, scope: Scope, headers: Headers) -> Response | None:
        if self.token is None or scope["path"].startswith("/static/"):
            return None
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        shown = query.pop("token", None)
        if shown is not None and _same(shown, self.token):
            to = "/" + scope["path"].lstrip("/") + (f"?{urlencode(query)}" if query else "")
            answer = RedirectResponse(to, 303)  # so that the token does not stay in the address
            secure = scope.get("scheme") == "https"
            answer.set_cookie(COOKIE, _stands_for(self.token), httponly=True, samesite="lax", secure=secure)
            return answer
        if _same(_cookie(headers), _stands_for(self.token)):
            return None
        wrong = "This is not the token. " if shown is not None else ""
        return HTMLResponse(render.page("token.html", wrong=wrong), 401)

    async def _within(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Runs the application as long as no more than the limit is read."""
        most = self.uploads.get(scope["path"], FORM)
        told = headers.get("content-length", "")
        over = told.isascii() and told.isdigit() and int(told) > most
        read, ended, started = 0, False, False

        async def counted() -> Message:
            nonlocal read, ended
            message = await receive()
            read += len(message.get("body", b""))
            ended = message["type"] == "http.disconnect" or not message.get("more_body")
            return message

        async def limited() -> Message:
            nonlocal over
            message = await counted()
            if read > most:
                over = True
                raise TooLarge
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            if not over:
                started = True
                await send(message)

        if not over:
            with suppress(TooLarge):
                await self.app(scope, limited, answer)
        if over and not started:
            while not ended and read <= DRAINED * most:
                await counted()
            size = f"{most / 1e6:.3g} MB"
            await refused(413, f"This is more than {size}, the most that is taken here.", "/compare")(
                scope, receive, send
            )


def refused(status: int, says: str, back: str = "/") -> HTMLResponse:
    """A page that says why a request is refused."""
    return HTMLResponse(render.page("refused.html", status=status, says=says, back=back), status)


def _origin(scope: Scope, headers: Headers) -> Response | None:
    """What changes something must come from a page of this site; browsers tell, and no page can make them lie."""
    if scope["method"] in SAFE:
        return None
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        own = site == "same-origin"
    else:
        own = origin is not None and _split(origin).netloc.lower() == headers.get("host", "").lower() != ""
    return None if own else refused(403, "This was asked for by a page of another site, so nothing was done.")


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:  # no address at all
        return urlsplit("")


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())


def _stands_for(token: str) -> str:
    """What the cookie holds: from it nobody learns the token."""
    return hashlib.sha256(f"lossary:{token}".encode()).hexdigest()


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value
