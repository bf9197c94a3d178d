"""The digest, sent to a real mail server on this machine."""

import json
import socket
from email import message_from_bytes
from email.message import Message
from email.policy import default

import pytest
from aiosmtpd.controller import Controller

from lossary.errors import BadInput
from lossary.site import digest

EARLY = "2000-01-01"


class Box:
    """Takes mail; refuses what goes to nobody@."""

    def __init__(self) -> None:
        self.mails: list[Message] = []

    async def handle_DATA(self, server, session, envelope) -> str:
        if "nobody@example.org" in envelope.rcpt_tos:
            return "550 no such mailbox"
        self.mails.append(message_from_bytes(envelope.content, policy=default))
        return "250 OK"


@pytest.fixture
def box():
    box = Box()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    box.smtp = f"127.0.0.1:{port}"
    yield box
    controller.stop()


@pytest.fixture
def state(tmp_path):
    return tmp_path / "folder" / "sent.json"


def bodies(mail: Message) -> tuple[str, str]:
    return tuple(mail.get_body([kind]).get_content() for kind in ("plain", "html"))


def test_everything_since_a_day_is_sent_once(box, state, now):
    sent = digest.send("me@example.org", box.smtp, state=state, since=EARLY, url="https://example.org/lossary")
    assert sent == len(now.events()) > 0
    (mail,) = box.mails
    assert mail["To"] == mail["From"] == "me@example.org"
    assert mail["Subject"] == f"Lossary: {sent} new or changed verdicts"
    plain, html = bodies(mail)
    event = now.events()[0]
    assert event["run"]["says"] in plain
    link = f"https://example.org/lossary/papers/{event['paper']['room']}/{event['paper']['id']}#{event['run']['claim']}"
    assert link in plain
    assert f'href="{link}"' in html
    assert digest.send("me@example.org", box.smtp, state=state) == 0
    assert len(box.mails) == 1
    assert digest.send("you@example.org", box.smtp, state=state) == sent  # another reader, same state


def test_only_what_changed_is_sent_the_next_day(box, state, now):
    digest.send("me@example.org", box.smtp, state=state, since=EARLY)
    known = json.loads(state.read_text("utf-8"))
    known["me@example.org"] = known["me@example.org"][1:]
    state.write_text(json.dumps(known), "utf-8")
    assert digest.send("me@example.org", box.smtp, state=state, sender="Lossary <lossary@example.org>") == 1
    assert box.mails[1]["Subject"] == "Lossary: 1 new or changed verdict"
    assert box.mails[1]["From"] == "Lossary <lossary@example.org>"


def test_a_search_and_a_room_narrow_it(box, state, now):
    digest.send("me@example.org", box.smtp, state=state, since=EARLY, room="losses", search="polyloss")
    plain, html = bodies(box.mails[0])
    assert "polyloss" in plain
    assert "group-dro" not in plain
    assert box.mails[0]["Subject"].endswith("on polyloss in losses")
    assert "href" not in html  # no links where no site is named


def test_nothing_is_sent_where_there_is_nothing(box, state):
    assert digest.send("me@example.org", box.smtp, state=state, since="2999-01-01") == 0
    assert not box.mails


def test_what_a_server_refuses_is_sent_the_next_time(box, state, now):
    with pytest.raises(BadInput, match="did not take the mail"):
        digest.send("nobody@example.org", box.smtp, state=state, since=EARLY)
    assert not state.exists()


def test_text_of_a_claim_stays_text(now):
    event = {**now.events()[0]}
    event["run"] = {**event["run"], "says": '<script>alert("x")</script>\r\nBcc: all@example.org'}
    mail = digest.compose([event], "me@example.org", "me@example.org")
    plain, html = bodies(message_from_bytes(mail.as_bytes(), policy=default))
    assert "<script>" not in html
    assert "<script>" in plain
    assert mail["Bcc"] is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"to": "nobody"}, "--to: expected an e-mail address"),
        ({"to": "a@b.org\nBcc: c@d.org"}, "--to: expected an e-mail address"),
        ({"smtp": "host:port"}, "--smtp: expected HOST or HOST:PORT"),
        ({"smtp": ":25"}, "--smtp: expected HOST or HOST:PORT"),
        ({"since": "yesterday"}, "--since: expected a day"),
        ({"room": "attic"}, "--room: expected one of"),
        ({"smtp": "127.0.0.1:1"}, "--smtp: 127.0.0.1:1 did not take the mail"),
        ({"login": ("me", "secret")}, "offers no TLS, so it gets no password"),
        ({"search": "two\nlines", "smtp": "127.0.0.1:1"}, "did not take the mail"),
    ],
)
def test_bad_input_is_told_in_a_line(box, state, given, says):
    with pytest.raises(BadInput, match=says) as error:
        digest.send(**{"to": "me@example.org", "smtp": box.smtp, "state": state, "since": EARLY, **given})
    assert "\n" not in str(error.value)


def test_a_state_file_of_something_else_is_left_alone(box, state):
    state.parent.mkdir()
    state.write_text("[1, 2]", "utf-8")
    with pytest.raises(BadInput, match="no record of sent digests"):
        digest.send("me@example.org", box.smtp, state=state)
    assert state.read_text("utf-8") == "[1, 2]"
