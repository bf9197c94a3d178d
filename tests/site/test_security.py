"""Who is let in, what is refused, and what a page may do."""

import io

import pytest
from fastapi.testclient import TestClient

from lossary.site.app import create_app
from lossary.site.runs import Limits
from lossary.site.security import AROUND, FORM
from lossary.site.serve import serve
from tests.site.serving import served

OWN = {"origin": "http://127.0.0.1"}
TOKEN = "a token, with spaces & signs"


def visitor(app, host: str = "http://127.0.0.1", **headers: str) -> TestClient:
    return TestClient(app, base_url=host, headers=headers, follow_redirects=False)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return create_app(tmp_path_factory.mktemp("open"), limits=Limits(upload=50_000))


@pytest.fixture(scope="module")
def client(app) -> TestClient:
    return visitor(app, **OWN)


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    return create_app(tmp_path_factory.mktemp("closed"), token=TOKEN)


# Hosts


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "localhost:9", "[::1]:8000"])
def test_names_of_this_machine_are_answered_to(app, host):
    assert visitor(app).get("/compare", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:127.0.0.1", "[::1", "", "\xff"]
)
def test_a_name_that_was_bent_to_point_here_is_not(app, host):
    answer = visitor(app).get("/compare", headers={"host": host.encode("latin-1")})
    assert answer.status_code == 400
    assert "127.0.0.1" in answer.text


# Origins


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1"},
        {"sec-fetch-site": "none"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH"])
def test_what_changes_something_must_come_from_a_page_of_this_site(app, headers, method):
    answer = visitor(app).request(method, "/compare/bundled", data={"name": "wine"}, headers=headers)
    assert answer.status_code == 403
    assert app.state.runs.all() == []


def test_a_page_of_this_site_may(app, client):
    for headers in (OWN, {"sec-fetch-site": "same-origin"}):
        answer = visitor(app).post("/compare/bundled", data={"name": "wine"}, headers=headers)
        assert answer.status_code == 303
        app.state.runs.delete(answer.headers["location"].rpartition("/")[2])


# The token


def test_without_the_token_nothing_is_shown(closed):
    for address in ("/", "/compare", "/runs/0123456789abcdef", "/openapi.json", "/feed.xml"):
        answer = visitor(closed).get(address)
        assert answer.status_code == 401
        assert "token" in answer.text
        assert "polyloss" not in answer.text
    assert visitor(closed, **OWN).post("/compare/bundled", data={"name": "wine"}).status_code == 401


@pytest.mark.parametrize("wrong", ["", "a", TOKEN + "x", "\udcff", "é"])
def test_a_wrong_token_opens_nothing(closed, wrong):
    answer = visitor(closed).get("/compare", params={"token": wrong.encode("utf-8", "surrogateescape")})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert visitor(closed, cookie="lossary=x").get("/compare").status_code == 401


def test_the_token_is_shown_once_and_a_cookie_stands_for_it(closed):
    client = visitor(closed, host="http://machine.local:8000")
    answer = client.get("/compare", params={"token": TOKEN, "q": "a b"})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/compare?q=a+b"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert TOKEN not in cookie
    assert client.get("/compare").status_code == 200
    evil = client.post("/compare/bundled", data={"name": "wine"}, headers={"origin": "http://evil.example"})
    assert evil.status_code == 403
    answer = visitor(closed).get("http://127.0.0.1//evil.example/", params={"token": TOKEN})
    assert answer.headers["location"] == "/evil.example/"


def test_beyond_loopback_a_token_is_made_up(tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr("lossary.site.serve.create_app", lambda folder, **given: made.append(given) or 1 / 0)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ZeroDivisionError):
            serve(tmp_path, host=host)
        assert len(made[-1]["token"]) >= 32
    for host in ("127.0.0.1", "::1", "localhost"):
        with pytest.raises(ZeroDivisionError):
            serve(tmp_path, host=host)
        assert made[-1]["token"] is None


# Sizes


def test_a_large_file_is_refused_with_a_page(client, app):
    for body in (b"x" * 70_000, (b"x" * 1000 for _ in range(400))):
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = client.post("/compare", content=body, headers=headers)
        assert answer.status_code == 413
        assert "more than 0.06 MB" in answer.text
        assert "<h1>" in answer.text
    assert app.state.runs.all() == []
    assert not list((app.state.runs.folder / "uploads").iterdir())


def test_a_large_form_is_refused(client):
    answer = client.post("/compare/bundled", data={"name": "x" * (FORM + 1)})
    assert answer.status_code == 413


def test_a_file_of_just_the_limit_is_taken(client, app):
    answer = client.post("/compare", files={"file": ("a.csv", io.BytesIO(b"x" * 50_000))})
    assert answer.status_code == 303
    app.state.runs.delete(answer.headers["location"].rpartition("/")[2])
    assert AROUND < FORM


def test_odd_forms_get_a_page(client):
    for content, kind in [
        (b"", "multipart/form-data; boundary=b"),
        (b"--b\r\n", "multipart/form-data; boundary=b"),
        (b"\xff\xfe", "multipart/form-data"),
        (b"file=1", "application/x-www-form-urlencoded"),
        (b"{}", "application/json"),
    ]:
        answer = client.post("/compare", content=content, headers={"content-type": kind})
        assert answer.status_code in (400, 422), (content, answer.status_code)
        assert "<h1>" in answer.text
    assert "No file was chosen" in client.post("/compare", files={"file": ("", b"")}).text


# Files


@pytest.mark.parametrize(
    "address",
    [
        "/runs/..%2f..%2fetc",
        "/runs/../../etc/passwd",
        "/runs/0123456789abcdef/files/..%2f..%2fruns.sqlite",
        "/runs/0123456789abcdef/files/cells.sqlite",
        "/runs/{id}/files/given.json",
        "/runs/{id}/files/..%2fgiven.json",
        "/runs/{id}/files/log.txt",
        "/runs/{id}/report",
        "/runs/{ID}",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
    ],
)
def test_no_request_names_a_file(app, client, address):
    run = app.state.runs.add("profile", "wine", {"name": "wine", "bundled": "wine"})
    app.state.runs.path(run).mkdir()
    (app.state.runs.path(run) / "given.json").write_text("{}")
    answer = client.get(address.replace("{id}", run.id).replace("{ID}", run.id.upper() + "0"))
    assert answer.status_code == 404
    app.state.runs.delete(run.id)


def test_no_request_names_code_or_a_path(app, client):
    runs = app.state.runs
    for name in ("/etc/passwd", "../x.csv", "digits ", "<script>"):
        answer = client.post("/compare/bundled", data={"name": name})
        assert answer.status_code == 400
        assert "<script>" not in answer.text
    run = runs.add("profile", "wine", {"name": "wine", "bundled": "wine"})
    runs._over(run.id, "done", "", "queued")
    (runs.path(run)).mkdir()
    form = {"step": "compare", "target": "y", "budget": "300"}
    for more in ({"metric": "os:system"}, {"budget": "7"}, {"task": "code"}, {"target": ""}, {"step": "shell"}):
        answer = client.post(f"/runs/{run.id}/next", data=form | more)
        assert answer.status_code in (400, 422)
    sent = form | {"model": "os:system", "embeddings": "/etc/passwd", "test": "/etc/passwd", "arms": "x", "source": "/"}
    answer = client.post(f"/runs/{run.id}/next", data=sent)
    made = runs.get(answer.headers["location"].rpartition("/")[2])
    assert set(made.given) == {"name", "bundled", "target", "task", "group", "time", "id", "drop", "budget", "metric"}
    for each in runs.all():
        runs.delete(each.id)


# Headers


@pytest.mark.parametrize("address", ["/", "/compare", "/runs", "/runs/0123456789abcdef", "/static/compare.js", "/no"])
def test_every_answer_carries_the_guards(client, address):
    headers = client.get(address).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"


def test_a_real_server_reads_a_large_upload_to_its_end_so_that_the_browser_shows_the_answer(tmp_path):
    with served(tmp_path, upload=100_000) as site, site.client() as client:
        answer = client.post("/compare", files={"file": ("a.csv", b"x" * 900_000)})
        assert answer.status_code == 413
        assert "0.11 MB" in answer.text
