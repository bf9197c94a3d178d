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
from lossary.compare.training import Fold, predict
from lossary.errors import BadInput
from lossary.tasks import Seeds

NETWORK = {"model": "mlp", "hidden": [8], "activation": "relu", "steps": 10, "batch": 32}


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
    tried = {arm.part or arm.name: arm for arm in found if not arm.name.endswith("on boosting")}
    return tried, dict(skipped)


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
    assert skipped["losses.poly1_cross_entropy"] == "is for a target of classes, this one is of numbers"
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
    crossed = {((s["lr"], s["weight_decay"]), s["parts"][0]["hyper"]["epsilon"]) for s in settings}
    assert crossed == {(rate, epsilon) for rate in RATES[:2] for epsilon in (-1.0, 2.0, 5.0)}
    assert all(s["class_weight"] is None and s["parts"][0]["part"] == "losses.poly1_cross_entropy" for s in settings)


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
    def weights(metric: str, part: str, paper: str = "polyloss") -> list[str | None]:
        tried, _ = chosen("class-imbalance", metric=metric, names=[paper])
        return [setting["class_weight"] for setting in tried[part].settings]

    assert set(weights("balanced accuracy", "losses.comp_sum_loss", "comp-sum-loss")) == {"balanced"}
    assert set(weights("accuracy", "losses.comp_sum_loss", "comp-sum-loss")) == {None}
    # A paper that is itself for imbalance is tried with and without, at every rate and every value.
    tried, _ = chosen("class-imbalance", metric="balanced accuracy", settings=8, names=["polyloss"])
    settings = tried["losses.poly1_cross_entropy"].settings
    for key in ("lr", "parts"):
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
    parts = [arm.paper for arm in found if arm.part and arm.family == "network"]
    assert parts[0] == "polyloss"
    assert len(parts) == MOST_PARTS
    assert len(skipped) == 1
    assert "fit better" in skipped[0][1]


def test_of_equal_matches_those_whose_claims_held_come_first(monkeypatch):
    entry, part = next((e, p) for e, p in arms._candidates() if p["name"] == "poly1_cross_entropy")
    claims = [
        {"name": "a", "kind": "superiority"},
        {"name": "b", "kind": "ratio"},
        {"name": "c", "kind": "exact"},
        {"name": "d", "kind": "superiority", "control": "planted"},
    ]

    def paper(id, *held):
        verdict = {name: {"outcome": "holds" if name in held else "does not hold"} for name in "abcd"}
        return {**entry, "id": id, "helps": ["class-imbalance"], "parts": [part], "claims": claims, "verdict": verdict}

    papers = [
        {**paper("new"), "verdict": None},
        paper("half", "b"),
        paper("exact only", "c", "d"),
        paper("both", "a", "b"),
    ]
    monkeypatch.setattr(arms, "_candidates", lambda: [(p, part) for p in papers])
    found, _ = choose(problem(), profile("class-imbalance"), named("accuracy"), settings=2, network=NETWORK)
    assert [arm.paper for arm in found if arm.part and arm.family == "network"] == ["both", "half", "new", "exact only"]


def test_a_real_loss_fits_a_real_target(monkeypatch):
    entry, part = next((e, p) for e, p in arms._candidates() if p["name"] == "poly1_cross_entropy")
    real = {**part, "options": {**part["options"], "on": "real"}}
    monkeypatch.setattr(arms, "_candidates", lambda: [({**entry, "parts": [real], "helps": ["heavy-tails"]}, real)])
    found, _ = choose(
        problem("real"), replace(profile("heavy-tails"), num_classes=None), named("MAE"), settings=2, network=NETWORK
    )
    assert [s["error"] for s in found[-1].settings] == ["squared", "squared"]
    assert "for heavy tails" in found[-1].reason


def test_the_first_losses_and_weightings_go_into_boosting_too():
    found, _ = choose(problem(), profile("class-imbalance"), named("accuracy"), settings=4, network=NETWORK)
    boosted = [arm for arm in found if arm.part and arm.family == "boosting"]
    networks = [arm for arm in found if arm.part and arm.family == "network" and arm.role in ("loss", "weighting")]
    assert len(boosted) == arms.MOST_BOOSTED
    assert {arm.part for arm in boosted} <= {arm.part for arm in networks}
    plain = next(arm for arm in found if arm.name == "gradient boosting")
    for arm in boosted:
        assert arm.name.endswith(" on boosting")
        assert len(arm.settings) == 4
        assert set(arm.settings[0]) == set(plain.settings[0]) | {"parts"}
    tried, _ = choose(
        problem(), profile(), named("accuracy"), settings=4, network=NETWORK, names=["linear", "polyloss"]
    )
    assert {arm.family for arm in tried} == {"linear", "network"}  # boosting was not asked for


def test_labels_and_levels_have_arms_of_their_own():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(60, 3)))
    labels = Problem("made", "", table, rng.integers(0, 2, (60, 4)), "y", "multilabel", tuple("abcd"))
    known = replace(profile("class-imbalance"), num_classes=4, class_counts=(30, 30, 30, 30))
    found, skipped = choose(labels, known, named("mAP"), settings=2, network=NETWORK)
    parts = {arm.part for arm in found if arm.part}
    assert "losses.asymmetric_loss" in parts or "weighting.distribution_balanced_loss" in parts
    assert dict(skipped)["losses.poly1_cross_entropy"] == "is for a target of classes, this one is of several labels"
    assert all(arm.family == "network" for arm in found if arm.part)
    levels = Problem("made", "", table, rng.integers(0, 3, 60), "y", "ordinal", tuple("abc"))
    known = replace(known, num_classes=3, class_counts=(20, 20, 20))
    found, _ = choose(levels, known, named("level error"), settings=2, network=NETWORK)
    assert any(arm.part for arm in found)


def test_pictures_have_no_trees():
    table = pd.DataFrame(np.zeros((60, 16), dtype=np.float32))
    pictures = Problem("made", "", table, np.arange(60) % 2, "y", "classes", ("a", "b"), shape=(1, 4, 4))
    found, _ = choose(pictures, profile(), named("accuracy"), settings=2, network={"model": "cnn"})
    assert {arm.family for arm in found} == {"linear", "network"}


PARTS = [f"{paper['room']}.{part['name']}" for paper, part in arms._candidates()]


@pytest.mark.parametrize("name", PARTS)
def test_every_part_that_can_serve_trains_on_what_the_profile_knows(name):
    """On three imbalanced classes in two groups, no hyper-parameter set by hand, at the first value of each grid."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((90, 5)).astype(np.float32), np.repeat([0, 1, 2], [60, 20, 10])
    fold = Fold(x, y, x[:7], 3, rng.integers(0, 2, 90), 0.1)
    table = Problem("made", "", pd.DataFrame(x), y, "y", "classes", ("a", "b", "c"), fold.group)
    facts = {name: value for name, value in fold.facts().items() if name != "class_counts"}
    known = Profile(findings=(), notes=(), class_counts=(60, 20, 10), **facts)
    paper, part = next((e, p) for e, p in arms._candidates() if f"{e['room']}.{p['name']}" == name)
    if arms._obstacle(paper, part, table, known):
        assert part["options"].get("on") in ("multilabel", "real") or name in NEEDS_MORE
        return
    assert name not in NEEDS_MORE
    hyper = {key: values[0] for key, values in (part["options"].get("tune") or {}).items()}
    usual = {"family": "network", "class_weight": None, "optimizer": "AdamW", "lr": 0.01, "weight_decay": 0.01}
    setting = {**usual, **NETWORK, "parts": [{"part": name, "role": part["role"], "hyper": hyper}]}
    predicted, parameters = predict(setting, fold, Seeds((0, 1)))
    assert predicted.shape == (2, 7, 3)
    assert np.exp(predicted).sum(-1) == pytest.approx(np.ones((2, 7)), abs=1e-5)
    assert parameters > 0


# What a table does not have: a perturbed copy of every input, embeddings.
NEEDS_MORE = {"losses.smooth_adversarial_comp_sum_loss", "weighting.ClusterSensitivitySampler"}
