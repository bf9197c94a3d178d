"""New and changed verdicts by e-mail: `lossary digest`, for instance daily from cron."""

import json
import smtplib
import ssl
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from email.message import EmailMessage
from email.utils import formatdate, make_msgid, parseaddr
from pathlib import Path
from typing import Any

from lossary import catalogue
from lossary.catalogue import PACKAGE
from lossary.errors import BadInput
from lossary.site import feed, render
from lossary.site.library import Library, Snapshot, address

PATIENCE = 30.0  # seconds for the mail server to answer

Event = dict[str, Any]


def send(
    to: str,
    smtp: str,
    *,
    state: Path,
    search: str | None = None,
    room: str | None = None,
    since: str | None = None,
    sender: str | None = None,
    url: str = "",
    login: tuple[str, str] | None = None,
    package: Path = PACKAGE,
) -> int:
    """Sends what was not sent to this address before, if there is anything.

    Args:
        to: the address.
        smtp: the mail server, HOST or HOST:PORT (25 unless told). It is asked for TLS, and used without if it has none.
        state: a file that remembers what was sent; made where it is missing.
        search, room: only verdicts of papers that match these words, only of this room.
        since: only verdicts of this day or later, as 2026-01-31. The first time it is yesterday unless told.
        sender: the From address; the same as `to` unless told.
        url: where the site is, for links.
        login: user and password for the server, sent over TLS only.
        package: where the catalogue lies.

    Returns:
        how many verdicts were sent.

    Raises:
        BadInput: an argument that cannot be, a state file that is none, a server that does not take the mail.
    """
    for name, given in (("--to", to), ("--from", sender or to)):
        if "@" not in parseaddr(given)[1] or any(letter in given for letter in "\r\n"):
            raise BadInput(f"{name}: expected an e-mail address, got {given!r}")
    host, port = _server(smtp)
    now = Library(package).now
    if room is not None and room not in now.rooms:
        raise BadInput(f"--room: expected one of {', '.join(now.rooms)}, got {room!r}")
    known = _read(state)
    start = _day(since) if since else date.fromisoformat(known["since"]) if known else _yesterday()
    sent = {*known.get(to, ())}
    events = [
        event
        for event in _asked(now, search, room)
        if date.fromisoformat(event["run"]["date"]) >= start and identify(event) not in sent
    ]
    if events:
        _deliver(compose(events, to, sender or to, url, _topic(search, room)), host, port, login)
    sent |= {identify(event) for event in events}  # only now: what the server refuses is sent the next time
    _write(state, {**known, "since": known.get("since", start.isoformat()), to: sorted(sent)})
    return len(events)


def identify(event: Event) -> str:
    run = event["run"]
    return f"{address(event['paper'])}#{run['claim']} {run['date']} {run['outcome']}"


def compose(events: Sequence[Event], to: str, sender: str, url: str = "", topic: str = "") -> EmailMessage:
    """The mail, as plain text and as HTML."""
    link = (url if url.endswith("/") else f"{url}/") if url else ""
    found = [{**event, "link": f"{link}{address(event['paper'])}#{event['run']['claim']}"} for event in events]
    mail = EmailMessage()
    mail["Subject"] = f"Lossary: {len(events)} new or changed verdict{'s' if len(events) > 1 else ''}{topic}"
    mail["From"], mail["To"] = sender, to
    mail["Date"], mail["Message-ID"] = formatdate(), make_msgid(domain="lossary.invalid")
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content("\n\n".join(_plain(event, bool(link)) for event in found) + f"\n\n-- \n{_foot(link)}\n")
    template = render.environment().get_template("digest.html")
    mail.add_alternative(template.render(events=found, linked=bool(link), told=feed.told, foot=_foot(link)), "html")
    return mail


def _plain(event: Event, linked: bool) -> str:
    run = event["run"]
    lines = [f"{run['outcome'].upper()}: {run['says']}", f"{event['paper']['id']}. {feed.told(event)}"]
    return "\n".join([*lines, event["link"]] if linked else lines)


def _foot(link: str) -> str:
    return f"Every verdict speaks of its own task and scale only. {link}".strip()


def _topic(search: str | None, room: str | None) -> str:
    about = " ".join(filter(None, (search and f"on {search}", room and f"in {room}")))
    return f" {' '.join(about.split())}" if about else ""


def _asked(now: Snapshot, search: str | None, room: str | None) -> list[Event]:
    found = now.papers if search is None else catalogue.search(search, now.index)
    ids = {paper["id"] for paper in found if room in (None, paper["room"])}
    return [event for event in now.events() if event["paper"]["id"] in ids]


def _deliver(mail: EmailMessage, host: str, port: int, login: tuple[str, str] | None) -> None:
    try:
        with smtplib.SMTP(host, port, timeout=PATIENCE) as server:
            server.ehlo()
            safe = server.has_extn("starttls")
            if safe:
                # A password goes only to a server that proves its name; the mail itself travels as mail does.
                server.starttls(context=ssl.create_default_context() if login else None)
            if login is not None:
                if not safe:
                    raise BadInput(f"--smtp: {host}:{port} offers no TLS, so it gets no password; name another server")
                server.login(*login)
            server.send_message(mail)
    except (OSError, smtplib.SMTPException) as error:
        raise BadInput(f"--smtp: {host}:{port} did not take the mail ({' '.join(str(error).split())})") from None


def _server(smtp: str) -> tuple[str, int]:
    host, colon, port = smtp.rpartition(":") if not smtp.endswith("]") else (smtp, "", "")
    if not colon:
        host, port = smtp, "25"
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BadInput(f"--smtp: expected HOST or HOST:PORT, got {smtp!r}")
    return host.strip("[]"), int(port)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise BadInput(f"--since: expected a day such as 2026-01-31, got {text!r}") from None


def _yesterday() -> date:
    return datetime.now(UTC).date() - timedelta(days=1)


def _read(state: Path) -> dict[str, Any]:
    if not state.exists():
        return {}
    try:
        known = json.loads(state.read_text("utf-8"))
        date.fromisoformat(known["since"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--state: {str(state)!r} is no record of sent digests; name another file") from None
    return dict(known)


def _write(state: Path, known: Mapping[str, Any]) -> None:
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        draft = state.with_name(f"{state.name}.draft")
        draft.write_text(json.dumps(known, indent=1), "utf-8")
        draft.replace(state)
    except OSError as error:
        raise BadInput(f"--state: cannot write {str(state)!r} ({error.strerror}); name another file") from None
