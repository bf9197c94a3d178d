"""Compare as a person meets it: drop, choose, watch, reload, cancel, read; on a phone, in the dark, by keyboard."""

import json
import re
import time

import pytest

from tests.site.serving import LONGEST, gone, served, table, upload, wait, workers

pytestmark = pytest.mark.timeout(900)  # workers on a busy machine

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
LONG = 1000 * LONGEST
HOSTILE = '<img src=x onerror="alert(1)">'
SLOW = {
    "partitions": 2, "folds": 3, "seeds": 5, "confirm_seeds": 3, "settings": 2, "tune_splits": 1, "tune_seeds": 1,
    "steps": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def profiled(client) -> str:
    run = upload(client, "<b>shop</b>.csv", table(first=HOSTILE))
    wait(client, run)
    return run


@pytest.fixture(scope="module")
def compared(client, profiled) -> str:
    answer = client.post(f"{profiled}/next", data={"step": "compare", "target": "y", "budget": "0"})
    run = answer.headers["location"]
    wait(client, run)
    return run


@pytest.fixture(scope="module")
def failed(client) -> str:
    run = upload(client, "empty.csv", b"")
    wait(client, run, "failed")
    return run


def wide(page) -> int:
    """By how many pixels the page is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_from_a_file_to_the_report(page, server, tmp_path):
    (tmp_path / "shop.csv").write_text(table())
    page.goto(f"{server.url}/compare")
    page.set_input_files("#file", tmp_path / "shop.csv")
    page.click("text=Upload and profile")
    page.wait_for_url("**/runs/*")
    page.wait_for_selector("#found", timeout=LONG)
    assert page.locator("input[name=target]:checked").input_value() == "y"
    page.select_option("select[name=other]", "c")
    assert page.locator("input[name=target]:checked").count() == 0
    page.check("input[name=target][value=y]")
    assert page.locator("select[name=other]").input_value() == ""
    page.check("input[name=budget][value='0']")
    page.click("button[value=compare]")
    page.wait_for_selector(".race circle", state="attached", timeout=LONG)
    address = page.url
    page.reload()
    page.wait_for_selector("text=Read the report", timeout=LONG)
    assert page.url == address
    with page.expect_download() as download:
        page.click("text=its numbers as JSON")
    found = json.loads(download.value.path().read_text())
    assert page.locator("h1").inner_text().startswith(found["sentence"][:40])
    assert download.value.suggested_filename == "shop-result.json"
    assert page.get_attribute("text=Read the report", "href") == address.removeprefix(server.url) + "/report"


def test_the_report_is_read_in_a_sandbox(browser, server, compared):
    page = browser.new_context().new_page()  # whose console tells that the sandbox keeps even playwright's scripts out
    page.goto(f"{server.url}{compared}")
    page.click("text=Read the report")
    page.wait_for_selector("#leaderboard svg")
    assert page.evaluate("getComputedStyle(document.querySelector('.panel')).borderRadius") == "10px"
    assert page.evaluate("self.origin") == "null"
    page.click("nav a[href='#trust']")
    assert page.url.endswith("#trust")
    page.context.close()


def test_a_dropped_file_is_taken(page, server):
    page.goto(f"{server.url}/compare")
    page.evaluate(
        """text => {
            const carried = new DataTransfer();
            carried.items.add(new File([text], "dropped.csv", { type: "text/csv" }));
            const event = { dataTransfer: carried, bubbles: true, cancelable: true };
            for (const name of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(name, event));
        }""",
        table(60),
    )
    page.wait_for_url("**/runs/*")
    assert page.locator("h1").inner_text() == "dropped.csv"
    page.click("text=Cancel")
    page.wait_for_selector(".caveat:has-text('Cancelled')")


def test_a_race_is_watched_reloaded_and_cancelled(page, tmp_path):
    with served(tmp_path, protocol=SLOW) as site, site.client() as client:
        run = upload(client, "shop.csv", table(600))
        wait(client, run)
        run = client.post(f"{run}/next", data={"step": "compare", "target": "y", "budget": "0"}).headers["location"]
        page.goto(f"{site.url}{run}")
        page.wait_for_selector(".race .bar rect.span", state="attached", timeout=LONG)
        read = "Number(document.querySelector('progress').value)"
        before = page.evaluate(read)
        page.evaluate("document.body.dataset.kept = 'yes'")
        until = time.monotonic() + LONGEST
        while page.evaluate(read) <= before and time.monotonic() < until:
            page.wait_for_timeout(200)
        assert page.evaluate(read) > before
        assert page.evaluate("document.body.dataset.kept") == "yes"  # watched, not loaded anew
        assert page.locator("#said").inner_text()
        page.reload()
        assert page.evaluate(read) >= before
        assert page.locator("tr.baseline").count() == 1
        page.focus("text=Cancel")
        page.wait_for_timeout(1000)
        assert page.evaluate("document.activeElement.textContent") == "Cancel"  # no change took the focus away
        page.keyboard.press("Enter")
        page.wait_for_selector(".caveat:has-text('Cancelled after')")
        assert gone(tmp_path)
        assert page.locator("button:has-text('Go on')").is_visible()


def test_without_event_streams_a_page_asks_again_and_again(open_page, client, server):
    page = open_page()
    page.add_init_script("delete window.EventSource")
    run = upload(client, "shop.csv", table(first="z"))
    page.goto(f"{server.url}{run}")
    page.wait_for_selector("#found", timeout=LONG)


def test_without_scripts_all_of_it_works(open_page, server, tmp_path):
    page = open_page(java_script_enabled=False)
    (tmp_path / "plain.csv").write_text(table(first="plain"))
    page.goto(f"{server.url}/compare")
    page.set_input_files("#file", tmp_path / "plain.csv")
    page.click("text=Upload and profile")
    assert "/runs/" in page.url
    page.wait_for_selector("#found", timeout=LONG)  # loaded anew by itself
    page.check("input[name=budget][value='60']")
    page.click("button[value=compare]")
    page.wait_for_selector("text=You may close this page")
    page.click("text=Cancel")
    page.wait_for_selector(".caveat:has-text('Cancelled')")
    page.click("text=Delete this run")
    page.wait_for_url("**/compare")


def test_a_bad_file_is_explained(page, server, failed):
    page.goto(f"{server.url}{failed}")
    assert "'empty.csv' is empty" in page.locator("[role=alert]").inner_text()
    page.once("dialog", lambda dialog: dialog.accept())
    page.goto(f"{server.url}{failed}")


def test_a_file_that_is_too_large_is_refused_with_and_without_scripts(browser, open_page, tmp_path):
    (tmp_path / "large.csv").write_bytes(b"x" * 400_000)
    with served(tmp_path / "site", upload=100_000) as site:
        page = open_page()
        page.goto(f"{site.url}/compare")
        page.set_input_files("#file", tmp_path / "large.csv")
        page.click("text=Upload and profile")
        assert "more than is taken" in page.locator("[data-note]").inner_text()
        assert page.url.endswith("/compare")
        bare = browser.new_context(java_script_enabled=False).new_page()  # whose console tells of the 413
        bare.goto(f"{site.url}/compare")
        bare.set_input_files("#file", tmp_path / "large.csv")
        bare.click("text=Upload and profile")
        assert "more than 0.11 MB" in bare.locator("h1").inner_text()
        bare.context.close()


def test_by_keyboard_alone(page, server, profiled):
    page.goto(f"{server.url}{profiled}")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "(e => ({ tag: e.tagName, name: e.name || '', text: e.textContent.trim(), seen: "
            "getComputedStyle(e).outlineStyle !== 'none' || e.matches('.skip') }))(document.activeElement)"
        )
        reached.append(found)
        if found["name"] == "target":
            page.keyboard.press("ArrowDown")
            page.keyboard.press("ArrowUp")
        if found["name"] == "step":
            break
    names = [found["name"] for found in reached]
    assert names.index("target") < names.index("other") < names.index("budget") < names.index("step")
    assert all(found["seen"] for found in reached), [found for found in reached if not found["seen"]]
    assert reached[-1]["text"] == "Compare"
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Cancel")
    page.focus("text=Cancel")
    page.keyboard.press("Enter")
    page.wait_for_selector(".caveat:has-text('Cancelled')")


def test_a_claim_runs_from_its_paper(page, server):
    page.goto(f"{server.url}/papers/layers/two-pass-softmax")
    page.locator("text=Run it here").first.click()
    page.wait_for_url("**/runs/*")
    page.wait_for_selector("#here", timeout=LONG)
    assert re.search("Holds|Does not hold|Inconclusive", page.locator("#here").inner_text())
    page.goto(f"{server.url}/papers/layers/two-pass-softmax")
    page.locator("text=Run it here").last.click()
    page.wait_for_selector("text=Cancel")
    page.click("text=Cancel")
    page.wait_for_selector(".caveat:has-text('Cancelled')")
    assert gone(server.folder) or workers(server.folder)  # another test's run may be next


@pytest.mark.parametrize("kind", ["compare", "runs", "profile", "done", "failed"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_kind_of_page_fits_a_phone_and_is_accessible(
    open_page, server, axe, profiled, compared, failed, kind, scheme
):
    address = {"profile": profiled, "done": compared, "failed": failed}.get(kind, f"/{kind}")
    for device in ({}, PHONE):
        page = open_page(color_scheme=scheme, **device)
        page.goto(f"{server.url}{address}")
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert wide(page) <= 0
        assert not axe(page)
        assert page.locator("h1").count() == 1
