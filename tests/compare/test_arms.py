"""Which arms are tried: the rules on real and on planted papers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lossary.compare import arms
from lossary.compare.arms import MOST_PARTS, RATES, check_names, choose
from lossary.compare.metrics import named
from lossary.compare.problem import Problem
from lossary.compare.profile import Finding, Profile
from lossary.errors import BadInput

NETWORK = {"hidden": [8], "activation": "relu", "steps": 10, "batch": 32}


def problem(task: str = "classes", group: bool = False) -> Problem:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 60) if task == "classes" else rng.normal(size=60)
    names = ("no", "yes") if task == "classes" else ()
    groups = np.arange(60) % 3 if group else None
    return Problem("made", "", pd.DataFrame(rng.normal(size=(60, 3))), target, "y", task, names, groups)


def profile(*raised: str, group: bool = False, label_noise: float | None = 0.0) -> Profile:
    findings = tuple(
        Finding(symptom, symptom, 9.0, 8.0, 10.0, "", "", "", symptom in raised)
        for symptom in ("class-imbalance", "label-noise", "heavy-tails")
    )
    return Profile(60, 3, 2, (30, 30), 3 if group else None, label_noise, findings, ())


def chosen(
    *raised: str, task: str = "classes", metric: str = "accuracy", group: bool = False, settings: int = 6, names=()
):
    found, skipped = choose(
        problem(task, group),
        profile(*raised, group=group),
        named(metric),
        settings=settings,
        network=NETWORK,
        names=names,
    )
    return {arm.part or arm.name: arm for arm in found}, dict(skipped)


def test_a_part_is_tried_for_what_the_profile_found():
    tried, skipped = chosen()
    assert "losses.poly1_cross_entropy" not in tried
    assert "no sign" in skipped["losses.poly1_cross_entropy"]
    tried, skipped = chosen("class-imbalance")
    assert tried["losses.poly1_cross_entropy"].reason == "for class imbalance, which the profile found"
    assert tried["losses.poly1_cross_entropy"].name == "polyloss: poly1_cross_entropy"
    assert "losses.poly1_cross_entropy" not in skipped


def test_some_symptoms_always_apply():
    tried, _ = chosen()
    assert "any network can fit" in tried["optim.SAM"].reason
    assert "shorter training" in tried["weighting.InfoBatch"].reason


def test_a_part_that_cannot_serve_says_why():
    _, skipped = chosen("class-imbalance")
    assert skipped["weighting.GroupDRO"] == "needs num_groups (distinct groups), which this data does not have"
    _, skipped = chosen("class-imbalance", task="real", metric="RMSE")
    assert skipped["losses.poly1_cross_entropy"] == "is for a target of classes, this one is of real"
    tried, _ = chosen(group=True)
    assert "groups were named" in tried["weighting.GroupDRO"].reason


def test_every_arm_has_the_same_number_of_configurations():
    for settings in (2, 4, 6, 8):
        tried, _ = chosen("class-imbalance", group=True, settings=settings)
        for arm in tried.values():
            assert len(arm.settings) == settings, arm.name
            assert len({repr(sorted(setting.items())) for setting in arm.settings}) == settings, arm.name


def test_a_part_crosses_rates_with_its_own_grid():
    tried, _ = chosen(names=["poly1_cross_entropy"])
    settings = tried["losses.poly1_cross_entropy"].settings
    crossed = {((s["lr"], s["weight_decay"]), s["hyper"]["epsilon"]) for s in settings}
    assert crossed == {(rate, epsilon) for rate in RATES[:2] for epsilon in (-1.0, 2.0, 5.0)}
    assert all(s["class_weight"] is None and s["part"] == "losses.poly1_cross_entropy" for s in settings)


def test_conventional_arms_meet_what_was_found():
    plain, _ = chosen()
    assert [arm.family for arm in plain.values() if arm.part is None] == ["linear", "boosting", "network"]
    weighted = [arm for arm in chosen("class-imbalance")[0].values() if arm.name.startswith("class-weighted")]
    assert {arm.family for arm in weighted} == {"linear", "boosting", "network"}
    assert all(s["class_weight"] == "balanced" for arm in weighted for s in arm.settings)
    tails, _ = chosen("heavy-tails", task="real", metric="MAE")
    absolute = [arm for arm in tails.values() if arm.name.startswith("absolute-error")]
    assert {arm.family for arm in absolute} == {"boosting", "network"}
    assert all(s["error"] == "absolute" for arm in absolute for s in arm.settings)


def test_class_weights_go_with_a_metric_that_counts_classes_alike():
    def weights(metric: str, part: str) -> list[str | None]:
        tried, _ = chosen("class-imbalance", metric=metric)
        return [setting["class_weight"] for setting in tried[part].settings]

    assert set(weights("balanced accuracy", "optim.SAM")) == {"balanced"}
    assert set(weights("accuracy", "optim.SAM")) == {None}
    # A paper that is itself for imbalance is tried with and without, at every rate and every value.
    tried, _ = chosen("class-imbalance", metric="balanced accuracy", settings=8)
    settings = tried["losses.poly1_cross_entropy"].settings
    for key in ("lr", "hyper"):
        for value in [setting[key] for setting in settings]:
            assert {setting["class_weight"] for setting in settings if setting[key] == value} == {None, "balanced"}
    assert (
        sorted(map(str, weights("balanced accuracy", "losses.poly1_cross_entropy"))) == ["None"] * 3 + ["balanced"] * 3
    )


def test_names_choose_parts_papers_and_conventional_arms():
    tried, skipped = chosen(names=["polyloss"])
    assert {arm.paper for arm in tried.values() if arm.part} == {"polyloss"}
    assert sum(arm.part is None for arm in tried.values()) == 3
    assert skipped["optim.SAM"] == "not among --arms"
    tried, _ = chosen(names=["SAM", "boosting"])
    assert list(tried) == ["gradient boosting", "optim.SAM"]
    assert tried["optim.SAM"].reason.startswith("named by --arms")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["poly1_cross_entrpy"], "did you mean poly1_cross_entropy"),
        (["xqzw"], "see `lossary find`"),
        (["GroupDRO"], "weighting.GroupDRO needs num_groups"),
        (["group-dro"], "weighting.GroupDRO needs num_groups"),
        (["class-weighted network"], "is not for this target"),
    ],
)
def test_names_that_cannot_be_used_are_refused(names, words):
    with pytest.raises(BadInput, match="--arms") as refusal:
        chosen(names=names)
    assert words in str(refusal.value)


def test_names_are_checked_without_data():
    check_names(["sam", "polyloss", "losses.poly1_cross_entropy", "linear", "plain network"])
    with pytest.raises(BadInput, match="no arm or part 'gradient bosting'; did you mean gradient boosting"):
        check_names(["gradient bosting"])


def test_the_best_fitting_parts_are_kept(monkeypatch):
    entry, part = next((e, p) for e, p in arms._candidates() if p["name"] == "poly1_cross_entropy")
    general = [({**entry, "id": f"g{i}", "helps": ["overfitting"], "parts": [part]}, part) for i in range(MOST_PARTS)]
    fitting = ({**entry, "helps": ["class-imbalance"], "parts": [part]}, part)
    monkeypatch.setattr(arms, "_candidates", lambda: [*general, fitting])
    found, skipped = choose(problem(), profile("class-imbalance"), named("accuracy"), settings=2, network=NETWORK)
    parts = [arm.paper for arm in found if arm.part]
    assert parts[0] == "polyloss"
    assert len(parts) == MOST_PARTS
    assert len(skipped) == 1
    assert "fit better" in skipped[0][1]


def test_a_real_loss_fits_a_real_target(monkeypatch):
    entry, part = next((e, p) for e, p in arms._candidates() if p["name"] == "poly1_cross_entropy")
    real = {**part, "options": {**part["options"], "on": "real"}}
    monkeypatch.setattr(arms, "_candidates", lambda: [({**entry, "parts": [real], "helps": ["heavy-tails"]}, real)])
    found, _ = choose(
        problem("real"), replace(profile("heavy-tails"), num_classes=None), named("MAE"), settings=2, network=NETWORK
    )
    assert [s["error"] for s in found[-1].settings] == ["squared", "squared"]
    assert "for heavy tails" in found[-1].reason
