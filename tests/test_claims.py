"""Every registered claim runs, tiny; its registration is one that the statistics accept."""

import pytest

from lossary import audit, catalogue
from lossary.claims import runner
from lossary.verdict import threshold

CLAIMS = [(paper["id"], claim["name"]) for paper in catalogue.entries() for claim in paper["claims"]]


def registered(paper_id, name):
    return next(claim for claim in runner.claims_of(catalogue.entry(paper_id)) if claim.name == name)


@pytest.mark.parametrize(("paper_id", "name"), CLAIMS)
def test_the_claim_runs(paper_id, name):
    runner.smoke(registered(paper_id, name))


@pytest.mark.parametrize(("paper_id", "name"), CLAIMS)
def test_the_registration_is_complete(paper_id, name):
    claim = registered(paper_id, name)
    threshold(claim.kind, claim.metric, **runner.registration(claim))
    assert claim.scale
    assert claim.says


def test_every_room_has_its_planted_effect_and_its_control():
    assert list(audit._controls(catalogue.entries())) == []
    one = catalogue.entry("polyloss")
    without = {**one, "claims": [claim for claim in one["claims"] if claim.get("control") != "A/A"]}
    (finding,) = audit._controls([without])
    assert (finding["id"], finding["room"]) == ("*", "losses")
    assert "'A/A'" in finding["finding"]
