"""Every registered claim runs, tiny; its registration is one that the statistics accept."""

import pytest

from lossary import catalogue
from lossary.claims import runner
from lossary.verdict import threshold

CLAIMS = [(paper["id"], claim["name"]) for paper in catalogue.entries() for claim in paper["claims"]]


@pytest.fixture
def registered(request):
    paper = catalogue.entry(request.param[0])
    return next(claim for claim in runner.claims_of(paper) if claim.name == request.param[1])


@pytest.mark.parametrize("registered", CLAIMS, indirect=True)
def test_the_claim_runs(registered):
    runner.smoke(registered)


@pytest.mark.parametrize("registered", CLAIMS, indirect=True)
def test_the_registration_is_complete(registered):
    threshold(registered.kind, registered.metric, **runner.registration(registered))
    assert registered.scale
    assert registered.says
