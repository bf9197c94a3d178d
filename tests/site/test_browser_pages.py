"""The pages as a person meets them: found, filtered, read, copied, on a phone, in the dark, by keyboard, for all."""

import re

import pytest

from lossary.site import render

KINDS = (
    "/", "/evidence", "/rooms/losses", "/symptoms/label-noise", "/papers/losses/polyloss", "/papers/ood/neco",
    "/engines/losses/softmax", "/search?q=noisy+labels", "/search?q=zzzz", "/nothing",
)  # fmt: skip
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def wide(page) -> int:
    """By how many pixels the page is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_search_answers_as_one_types(page, server):
    page.goto(server.url)
    page.type("#q", "noisy lab")
    page.wait_for_selector(".answers[data-query='noisy lab'] a")
    first = page.locator(".answers a").first
    name = first.locator("b").first.inner_text()
    first.click()
    assert page.url.endswith(f"/{name}")
    assert page.locator("h1").is_visible()


def test_the_whole_way_by_keyboard_alone(page, server):
    page.goto(server.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    page.focus("#q")
    page.keyboard.type("polylos")
    page.wait_for_selector(".answers[data-query=polylos] a")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.press("Escape")
    assert page.locator(".answers").is_hidden()
    page.keyboard.press("s")
    page.wait_for_selector(".answers[data-query=polyloss] a")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/papers/losses/polyloss")
    page.focus("details summary")
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1


def test_enter_leads_to_all_answers(page, server):
    page.goto(f"{server.url}/evidence")
    page.fill("#q-top", "noisy labels")
    page.press("#q-top", "Enter")
    page.wait_for_url("**/search?q=noisy+labels")
    assert page.locator(".hits li").count() > 3


def test_the_search_works_without_scripts(open_page, server):
    page = open_page(java_script_enabled=False)
    page.goto(server.url)
    page.fill("#q", "noisy labels")
    page.press("#q", "Enter")
    assert page.locator(".hits li").count() > 3
    page.goto(f"{server.url}/rooms/losses")
    assert page.locator("#papers tbody tr").count() > 3
    assert page.locator(".filters").is_hidden()


def test_a_room_is_filtered_and_sorted(page, server):
    page.goto(f"{server.url}/rooms/losses")
    rows = page.locator("#papers tbody tr:visible")
    everything = rows.count()
    page.select_option("[name=role]", "layer")
    assert 0 < rows.count() < everything
    assert page.locator(".filters output").inner_text() == f"{rows.count()} of {everything}"
    assert all("layer" in row.get_attribute("data-role").split() for row in rows.all())
    page.select_option("[name=role]", "")
    page.select_option("[name=outcome]", "holds")
    assert all("holds" in row.get_attribute("data-outcome").split("|") for row in rows.all())
    page.select_option("[name=outcome]", "all")
    assert all(row.get_attribute("data-outcome") == "holds" for row in rows.all())
    page.select_option("[name=outcome]", "")
    page.select_option("[name=size]", "100")
    assert all(int(row.get_attribute("data-size")) <= 100 for row in rows.all())
    page.select_option("[name=size]", "")
    page.select_option("[name=cost]", "60")
    assert all(float(row.get_attribute("data-cost")) <= 60 for row in rows.all())
    page.select_option("[name=cost]", "")
    for name in ("size", "cost", "held"):
        column = page.locator(f"th[data-sort={name}]")
        values = {}
        for _ in range(2):
            column.locator("button").click()
            shown = [float(row.get_attribute(f"data-{name}") or "inf") for row in rows.all()]
            values[column.get_attribute("aria-sort")] = shown
        known = [value for value in values["ascending"] if value < float("inf")]
        assert known == sorted(known)
        assert values["descending"] == sorted(values["ascending"], reverse=True)


def test_an_example_is_copied_as_it_stands(open_page, server):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.goto(f"{server.url}/papers/losses/polyloss")
    button = page.locator("#part-poly1_cross_entropy [data-copy]")
    button.click()
    button.filter(has_text="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "from lossary.losses import poly1_cross_entropy" in copied
    compile(copied, "copied", "exec")


@pytest.mark.skipif(not (render.HERE / "static/vendor/katex").is_dir(), reason="KaTeX is not vendored")
def test_equations_are_set(page, server, now):
    for paper in [paper for paper in now.papers if paper["equation"]][:6]:
        page.goto(f"{server.url}/papers/{paper['room']}/{paper['id']}")
        page.wait_for_selector(".equation .katex-display")
        assert not page.locator(".equation .katex-error").count(), paper["id"]


@pytest.mark.parametrize("path", KINDS)
@pytest.mark.parametrize(
    "options", [{"color_scheme": "light"}, {"color_scheme": "dark", **PHONE}], ids=["light", "dark"]
)
def test_every_kind_of_page_is_fit_for_all(open_page, server, axe, path, options):
    page = open_page(**options)
    if path == "/nothing":  # the browser itself tells of the missing page
        page.route("**/nothing", lambda route: route.fulfill(response=route.fetch(), status=200))
    page.goto(server.url + path)
    assert not axe(page)
    assert wide(page) <= 0
    if page.locator("details").count():
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert not axe(page)
        assert wide(page) <= 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", background))) < 200
    assert dark == (options["color_scheme"] == "dark")
