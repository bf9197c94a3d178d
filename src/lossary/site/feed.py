"""New and changed verdicts as an Atom feed."""

import uuid
import xml.etree.ElementTree as ET
from typing import Any

from lossary.site import plot, render
from lossary.site.library import Snapshot, address

MOST = 100  # entries
SPACE = "http://www.w3.org/2005/Atom"


def atom(now: Snapshot, base: str, room: str | None = None, *, static: bool = False) -> bytes:
    """The feed of all rooms or of one.

    Args:
        now: the catalogue.
        base: where the site is, with a slash at its end; "" gives links relative to the feed.
        room: only this one.
        static: whether pages are files.
    """
    events = [event for event in now.events() if room in (None, event["paper"]["room"])][:MOST]
    here = f"rooms/{room}.xml" if room else "feed.xml"
    base = base or "../" * here.count("/")
    feed = ET.Element("feed", xmlns=SPACE)
    _text(feed, "title", f"Lossary: verdicts{f' of {room}' if room else ''}")
    _text(feed, "id", name(here))
    _text(feed, "updated", f"{events[0]['run']['date'] if events else '1970-01-01'}T00:00:00Z")
    ET.SubElement(feed, "link", rel="self", href=base + here)
    ET.SubElement(ET.SubElement(feed, "author"), "name").text = "Lossary"
    for event in events:
        _entry(feed, event, base, static)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(feed)


def name(text: str) -> str:
    """A lasting identifier that needs no domain."""
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, f'lossary/{text}')}"


def told(event: dict[str, Any]) -> str:
    """A verdict in a sentence or two."""
    claim = {**event["run"], "run": event["run"]}
    before = f" It was {event['before']['outcome']} before." if event["before"] else ""
    return f"{plot.in_words(claim)}{before} Scale: {event['run']['scale']}."


def _entry(feed: ET.Element, event: dict[str, Any], base: str, static: bool) -> None:
    run, paper = event["run"], event["paper"]
    page = address(paper)
    entry = ET.SubElement(feed, "entry")
    _text(entry, "title", f"{run['outcome'].capitalize()}: {run['says']} ({paper['id']})")
    _text(entry, "id", name(f"{page}/{run['claim']}/{run['date']}/{run['outcome']}"))
    _text(entry, "updated", f"{run['date']}T00:00:00Z")
    target = render.file_of(page) if static else page
    ET.SubElement(entry, "link", rel="alternate", type="text/html", href=f"{base}{target}#{run['claim']}")
    ET.SubElement(entry, "category", term=paper["room"])
    _text(entry, "summary", told(event))


def _text(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text
