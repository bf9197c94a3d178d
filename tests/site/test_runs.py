"""Runs from the first byte of a file to the last of a report: real servers, real workers, a tiny protocol."""

import io
import json
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lossary.errors import BadInput
from lossary.site.runs import Full, Limits, Runs, safe_name, shown_name
from lossary.site.worker import guess
from tests.site.serving import TINY, gone, served, table, upload, wait, workers

pytestmark = pytest.mark.timeout(900)  # workers on a busy machine

HOSTILE = '<img src=x onerror="alert(1)">'
WRECK = "</script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with served(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture(scope="module")
def client(site):
    with site.client() as client:
        yield client


@pytest.fixture(scope="module")
def profiled(client) -> str:
    """A profile of a table whose column names, values and own name are hostile."""
    run = upload(client, f"{WRECK}.csv", table(first=HOSTILE, word=WRECK))
    wait(client, run)
    return run


@pytest.fixture(scope="module")
def compared(client, profiled) -> str:
    """A comparison on that table."""
    answer = client.post(f"{profiled}/next", data={"step": "compare", "target": "y", "budget": "0"})
    assert answer.status_code == 303, answer.text
    run = answer.headers["location"]
    wait(client, run)
    return run


def cells(folder: Path, run: str) -> list[str]:
    """Keys of the cells that a comparison has finished, in their order."""
    path = folder / run.strip("/") / "out" / "cells.sqlite"
    if not path.exists():
        return []
    with sqlite3.connect(path) as db:
        if not db.execute("select name from sqlite_master where name = 'cells'").fetchall():
            return []  # made, but empty so far
        found = db.execute("select key from cells order by rowid").fetchall()
    db.close()
    return [key for (key,) in found]


# From a file to an answer


def test_a_profile_guesses_the_target_and_offers_the_others(client, profiled):
    page = client.get(profiled).text
    assert "Predicting <b>y</b>" in page
    assert page.index('name="target" value="y" checked') < page.index('<option value="b">')
    assert client.get(f"{profiled}/report").text.startswith("<!doctype html>")


def test_nothing_of_a_file_reaches_html_unescaped(client, profiled, compared):
    for address in ("/compare", "/runs", profiled, f"{profiled}/report", compared, f"{compared}/report"):
        page = client.get(address).text
        assert HOSTILE not in page, address
        assert WRECK not in page, address
        assert "<script>alert" not in page, address
    assert "&lt;img src=x" in client.get(profiled).text


def test_a_comparison_ends_with_a_report_and_its_files(client, compared):
    page = client.get(compared).text
    found = client.get(f"{compared}/files/result.json")
    sentence = json.loads(found.text)["sentence"]
    assert sentence.split(",")[0] in page.replace("&#39;", "'")
    assert "The race" in page
    assert page.count('<tr class="') == len(json.loads(found.text)["arms"])
    for name, kind in {
        "report.html": "text/html",
        "result.json": "application/json",
        "winner.py": "text/x-python",
        "winner.joblib": "application/octet-stream",
    }.items():
        answer = client.get(f"{compared}/files/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-disposition"].startswith("attachment")
    report = client.get(f"{compared}/report")
    assert report.headers["content-security-policy"].startswith("sandbox; default-src 'none'")


def test_another_target_is_profiled_and_what_does_not_fit_is_said_beside_the_form(client, profiled):
    runs = [
        client.post(f"{profiled}/next", data={"step": "profile", "other": name}).headers["location"]
        for name in ("kind", "no such column")
    ]
    assert "Predicting <b>kind</b>" in wait(client, runs[0])
    page = wait(client, runs[1])
    assert "no column &#39;no such column&#39;" in page
    assert 'name="step" value="compare"' in page


BAD = {
    "empty.csv": (b"", "is empty; it needs a header line and rows"),
    "binary.csv": (bytes(range(256)) * 40, "binary"),
    "photo.png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "is not UTF-8|binary"),
    "latin.csv": ("naïve,y\n1,2\n".encode("latin-1") * 60, "not UTF-8"),
    "utf16.csv": ("a,y\n1,2\n" * 60).encode("utf-16"),
    "ragged.csv": (b"a,y\n1,2\n1,2,3\n", "3 fields where the header has 2"),
    "header.csv": (b"a,b,y\n", "a header line but no rows"),
    "twice.csv": (b"a,a\n" + b"1,2\n" * 60, "both named"),
    "book.xlsx": (b"PK\x03\x04" + bytes(200), "a zip or Excel file"),
    "data.parquet": (b"PAR1" + bytes(100) + b"PAR1", "data.parquet"),
    "data.npz": (b"PK\x03\x04" + bytes(100), "data.npz"),
    "pickle.npz": (None, "data|pickle"),
}
BAD["utf16.csv"] = (BAD["utf16.csv"], "UTF-16")


@pytest.fixture(scope="module")
def bad(client) -> dict[str, str]:
    """All bad files at once: they queue up."""
    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([{"a": 1}] * 60, dtype=object), y=np.arange(60))
    BAD["pickle.npz"] = (buffer.getvalue(), "pickle.npz")
    return {name: upload(client, name, content) for name, (content, _) in BAD.items()}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_a_page_that_says_what_is_wrong(client, site, bad, name):
    page = wait(client, bad[name], "failed")
    told = page[page.index('role="alert">') :].partition("</p>")[0]
    assert any(word in told for word in BAD[name][1].split("|")), told
    assert name in told
    assert "unexpectedly" not in told
    assert "Traceback" not in page
    assert str(site.folder) not in page
    log = site.folder / bad[name].strip("/") / "log.txt"
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("one.csv", "y\n" + "0\n1\n" * 60),
        ("constant.csv", "a,y\n" + "1,same\n" * 60),
        ("few.csv", "a,y\n" + "1,0\n2,1\n" * 5),
        (
            "wide.csv",
            ",".join(f"c{i}" for i in range(200)) + ",y\n" + ("1," * 200 + "0\n" + "2," * 200 + "1\n") * 40,
        ),
    ],
)
def test_an_odd_table_still_gets_a_page(client, site, name, content):
    page = wait(client, upload(client, name, content), "done", "failed")
    assert "unexpectedly" not in page
    assert len(page) < 400_000


# The queue


def test_several_runs_queue_up_in_order(tmp_path):
    with served(tmp_path) as site, site.client() as client:
        runs = [upload(client, f"{i}.csv", table()) for i in range(3)]
        assert "for 2 runs before this one" in client.get(runs[2]).text.replace("\n", " ")
        client.post(f"{runs[1]}/cancel")
        assert "for 1 run before this one" in client.get(runs[2]).text.replace("\n", " ")
        wait(client, runs[2])
        assert "done" in client.get(runs[0]).text
        client.post(f"{runs[0]}/delete")
        assert client.get(runs[0]).status_code == 404
        assert not (tmp_path / runs[0].strip("/")).exists()
        assert len(list((tmp_path / "uploads").iterdir())) == 2


def test_a_full_queue_is_said(tmp_path):
    runs = Runs(tmp_path, limits=Limits(waiting=2, kept=3))
    first = runs.upload(io.BytesIO(b"a"), "a.csv")
    runs.upload(io.BytesIO(b"b"), "b.csv")
    with pytest.raises(Full, match="2 runs are waiting"):
        runs.upload(io.BytesIO(b"c"), "c.csv")
    runs.cancel(first.id)
    runs.upload(io.BytesIO(b"c"), "c.csv")
    with pytest.raises(Full, match="2 runs are waiting"):
        runs.again(first.id)
    assert len(list((tmp_path / "uploads").iterdir())) == 3


def test_a_folder_belongs_to_one_server(tmp_path):
    with served(tmp_path), pytest.raises(BadInput, match="another server works in"):
        Runs(tmp_path).take()
    runs = Runs(tmp_path)
    runs.take()
    runs.release()


def test_cancel_ends_every_process_and_the_run_can_go_on(tmp_path):
    with served(tmp_path, protocol=TINY | {"steps": 400, "seeds": 5}) as site, site.client() as client:
        profile = upload(client, "small.csv", table(1000))
        wait(client, profile)
        data = {"step": "compare", "target": "y", "budget": "0"}
        run = client.post(f"{profile}/next", data=data).headers["location"]
        until = time.monotonic() + 120
        while not cells(tmp_path, run) and time.monotonic() < until:
            time.sleep(0.1)
        assert workers(tmp_path)
        client.post(f"{run}/cancel")
        assert gone(tmp_path)
        page = client.get(run).text
        assert "Cancelled" in page
        assert client.get(f"{run}/report").status_code == 404
        before = cells(tmp_path, run)
        client.post(f"{run}/again")
        while len(cells(tmp_path, run)) <= len(before) and time.monotonic() < until + 120:
            time.sleep(0.1)
        assert cells(tmp_path, run)[: len(before)] == before
        client.post(f"{run}/delete")
        assert gone(tmp_path)
        assert client.get(run).status_code == 404
    assert not (tmp_path / run.strip("/")).exists()


def test_a_server_that_is_killed_loses_nothing(tmp_path):
    with served(tmp_path) as site, site.client() as client:
        profile = upload(client, "small.csv", table())
        wait(client, profile)
        data = {"step": "compare", "target": "y", "budget": "0"}
        run = client.post(f"{profile}/next", data=data).headers["location"]
        waiting = upload(client, "next.csv", table(first="z"))
        until = time.monotonic() + 120
        while len(cells(tmp_path, run)) < 5 and time.monotonic() < until:
            time.sleep(0.05)
        site.process.send_signal(signal.SIGKILL)
        site.process.wait()
        before = cells(tmp_path, run)
        assert gone(tmp_path), "a worker outlives its server"
    assert len(before) >= 5
    with served(tmp_path) as site, site.client() as client:
        assert client.get(profile).status_code == 200
        wait(client, run)
        assert cells(tmp_path, run)[: len(before)] == before
        assert "Predicting <b>y</b>" in wait(client, waiting)


def test_an_interrupted_server_ends_at_once_though_a_page_listens(tmp_path):
    with served(tmp_path) as site, site.client() as client:
        run = upload(client, "small.csv", table())
        with client.stream("GET", f"{run}/events") as events:
            assert next(events.iter_text())
            site.process.send_signal(signal.SIGINT)
            site.process.wait(120)  # while the page listens; it would for hours
        assert site.process.returncode == 0
    assert gone(tmp_path)
    [left] = Runs(tmp_path).all()
    assert left.status == "queued"


def test_a_run_is_limited_in_time_and_memory(tmp_path):
    with served(tmp_path / "time", seconds=1.0) as site, site.client() as client:
        page = wait(client, upload(client, "small.csv", table()), "failed")
        assert "stopped after 1 s, which is the limit" in page
        assert gone(site.folder)
    with served(tmp_path / "memory", memory=60_000_000) as site, site.client() as client:
        page = wait(client, upload(client, "small.csv", table()), "failed")
        assert "more memory than a run may (0.06 GB)" in page
        assert gone(site.folder)


def test_a_sudden_demand_for_memory_is_refused(tmp_path):
    """A file that unpacks to far more than it is: refused by the system before it is held."""
    path = tmp_path / "bomb.parquet"
    pd.DataFrame({"a": np.zeros(60_000_000), "y": np.zeros(60_000_000)}).to_parquet(path, compression="gzip")
    with served(tmp_path / "site", memory=700_000_000) as site, site.client() as client:
        page = wait(client, upload(client, path.name, path.read_bytes()), "failed", "done")
        assert "Traceback" not in page
        assert "unexpectedly" not in page


# A claim


def test_a_claim_runs_here_and_is_held_against_its_record(tmp_path):
    with served(tmp_path) as site, site.client() as client:
        address = "/papers/layers/two-pass-softmax/claims"
        page = client.get("/papers/layers/two-pass-softmax").text
        name = page.partition(f'action="{address}/')[2].partition("/run")[0]
        assert name, "the paper's page has no Run button"
        assert client.post(f"{address}/no-such-claim/run").status_code == 404
        run = client.post(f"{address}/{name}/run").headers["location"]
        assert client.post(f"{address}/{name}/run").headers["location"] == run
        page = wait(client, run)
        assert "What this run found" in page
        assert "On record" in page


# Names


@pytest.mark.parametrize(
    ("name", "shown", "safe"),
    [
        ("my data (2).csv", "my data (2).csv", "my-data-2.csv"),
        ("../../etc/passwd", "passwd", "passwd.csv"),
        ("C:\\x\\Größe.CSV", "Größe.CSV", "Gr-e.csv"),
        ("..", "..", "data.csv"),
        ("", "data", "data.csv"),
        ("a\x00\x1b\n.tsv", "a.tsv", "a.tsv"),
        ("digits", "digits", "digits.csv"),
        ("<b>.npz", "<b>.npz", "b.npz"),
        ("x" * 300 + ".csv", "x" * 100, "x" * 60 + ".csv"),
    ],
)
def test_names_of_files(name, shown, safe):
    assert shown_name(name) == shown
    assert safe_name(name) == safe


def column(name: str, distinct: int, kind: str = "numbers", missing: float = 0.0) -> dict:
    return {"name": name, "distinct": distinct, "kind": kind, "missing": missing}


@pytest.mark.parametrize(
    ("columns", "first"),
    [
        ([column("id", 100), column("a", 50), column("class", 3, "words")], "class"),
        ([column("label", 2), column("a", 50), column("b", 40)], "label"),
        ([column("a", 50), column("b", 40), column("price", 90)], "price"),
        ([column("name", 100, "words"), column("a", 50), column("note", 90, "words")], "a"),
        ([column("y", 1), column("a", 50)], "a"),
        ([column("a", 60, missing=0.8), column("b", 100)], None),
    ],
)
def test_the_likely_target(columns, first):
    assert next(iter(guess(columns, 100)), None) == first
