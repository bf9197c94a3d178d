"""Requests made up from the OpenAPI description: whatever is asked, the answer is never a fault of the server."""

from contextlib import suppress

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from lossary.site import views
from lossary.site.app import create_app
from lossary.site.runs import Limits

OWN = {"host": "127.0.0.1", "sec-fetch-site": "same-origin"}
ONCE = 5  # requests of each kind for each route


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """A site that starts no run."""
    app = create_app(tmp_path_factory.mktemp("site"), limits=Limits(waiting=50, kept=60))
    app.state.runs.closing = True  # streams of events end at once
    # Hypothesis builds syntax trees, and so do pages, in threads, which Python 3.11 takes badly: hence all pages first.
    for address, make in views.every(app.state.library.now):
        app.state.library.now.once(address, make)
    return app


@pytest.fixture(scope="module")
def known(app) -> dict[str, list[str]]:
    """What there is, for the parameters of addresses: a run of each kind, one of them done, and a claim."""
    runs = app.state.runs
    paper = next(paper for paper in app.state.library.now.papers if paper["claims"])
    claim = {"room": paper["room"], "paper": paper["id"], "name": paper["claims"][0]["name"]}
    made = [
        runs.add("profile", "wine", {"name": "wine", "bundled": "wine"}),
        runs.add("profile", "wine", {"name": "wine", "bundled": "wine"}),
        runs.add("compare", "wine: y", {"name": "wine", "bundled": "wine", "target": "y"}),
        runs.add("claim", "a claim", claim),
    ]
    runs.path(made[0]).mkdir()
    (runs.path(made[0]) / "outcome.json").write_text(
        '{"rows": 3, "columns": [], "more": 0, "guesses": [], "notes": []}'
    )
    runs._over(made[0].id, "done", "", "queued")
    return {"id": [run.id for run in made], **{name: [value] for name, value in claim.items()}}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_no_request_is_a_fault_of_the_server(app, known, mode):
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=OWN)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        with suppress(Unsatisfiable):  # a request without parameters cannot be wrong
            _try(operation.as_strategy(generation_mode=mode), known, delete=operation.label.endswith("/delete"))


def _try(cases, known, *, delete: bool) -> None:
    @settings(
        max_examples=ONCE,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
    )
    @given(case=cases, there=st.booleans(), which=st.integers(0, 3))
    def once(case, there, which):
        """Half of the requests ask for what is there; nothing of that is deleted."""
        if there and not delete:
            mine = {name: known[name][which % len(known[name])] for name in case.path_parameters or {} if name in known}
            case.path_parameters = {**(case.path_parameters or {}), **mine}
        case.call_and_validate(checks=[not_a_server_error], headers=OWN)

    once()


def test_the_description_has_every_route(app):
    client = TestClient(app, base_url="http://127.0.0.1")
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/compare", "/runs/{id}", "/runs/{id}/next", "/papers/{room}/{paper}/claims/{name}/run"} <= set(paths)
