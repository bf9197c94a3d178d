"""Which arms are tried: the rules on real and on planted papers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from lossary.compare import arms
from lossary.compare.arms import MOST_PARTS, RATES, check_names, choose
from lossary.compare.metrics import named
from lossary.compare.problem import Problem
from lossary.compare.profile import Finding, Profile
from lossary.compare.training import Fold, predict, recipe, targets
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


@pytest.mark.parametrize(
    ("name", "paper"), [("presto", "presto"), ("EnsLoss", "ensloss"), ("weighting.presto_penalty", "presto")]
)
def test_what_the_catalogue_has_and_no_comparison_can_try_is_refused_as_that(name, paper):
    with pytest.raises(BadInput, match=f"'{name}' has no role that a comparison tries; `lossary show {paper}`"):
        check_names([name])


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
    """On imbalanced classes, labels or numbers in two groups, without a hyper-parameter set by hand."""
    paper, part = next((e, p) for e, p in arms._candidates() if f"{e['room']}.{p['name']}" == name)
    served = []
    for task, y in TARGETS.items():
        fold = fold_of(y, task)
        facts = {name: value if value is not None else () for name, value in fold.facts().items()}
        known = Profile(findings=(), notes=(), **facts)
        table = Problem("made", "", pd.DataFrame(fold.x), y, "y", task, ("a", "b", "c")[: fold.classes], fold.group)
        if arms._obstacle(paper, part, table, known):
            continue
        served.append(task)
        hyper = {key: values[0] for key, values in (part["options"].get("tune") or {}).items()}
        predicted, parameters = predict(setting_of(name, part["role"], task, **hyper), fold, Seeds((0, 1)))
        assert predicted.shape == ((2, 7) if task == "real" else (2, 7, 3))
        if task == "classes":
            assert np.exp(predicted).sum(-1) == pytest.approx(np.ones((2, 7)), abs=1e-5)
        assert parameters > 0
    assert bool(served) != (name in NEEDS_MORE)


TARGETS = {
    "classes": np.repeat([0, 1, 2], [60, 20, 10]),
    "multilabel": np.repeat([[1, 0, 0], [1, 1, 0], [0, 0, 1]], [60, 20, 10], axis=0),
    "real": np.geomspace(1.0, 50.0, 90),
}
# What a table does not have: a perturbed copy of every input, embeddings, features of the network.
NEEDS_MORE = {
    "losses.smooth_adversarial_comp_sum_loss",
    "weighting.ClusterSensitivitySampler",
    "weighting.NC1Loss",
}


def fold_of(y: np.ndarray, task: str) -> Fold:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((len(y), 5)).astype(np.float32)
    group = rng.integers(0, 2, len(y))
    return Fold(x, y, x[:7], 0 if task == "real" else 3, group, 0.1, several=task == "multilabel")


def setting_of(name: str, role: str, task: str, **hyper: object) -> dict[str, object]:
    usual = {"error": "squared"} if task == "real" else {"class_weight": None}
    rates = {"family": "network", "optimizer": "AdamW", "lr": 0.01, "weight_decay": 0.01}
    return {**usual, **rates, **NETWORK, "parts": [{"part": name, "role": role, "hyper": hyper}]}


def test_a_penalty_is_for_classifiers_and_for_no_features():
    tried, _ = chosen(names=["vat"])
    assert [setting["parts"][0]["hyper"]["epsilon"] for setting in tried["losses.VATLoss"].settings[:3]] == [0.3, 1, 3]
    _, skipped = chosen(task="real", metric="RMSE")
    assert skipped["losses.VATLoss"] == "is for a target of classes, this one is of numbers"
    assert skipped["weighting.NC1Loss"].startswith("acts on features")


def test_a_penalty_tells_the_seeds_of_a_stack_apart():
    """Each seed trains as it would alone; a step of length 0 changes no prediction, and costs nothing."""
    fold = fold_of(TARGETS["classes"], "classes")
    setting = setting_of("losses.VATLoss", "penalty", "classes", epsilon=3.0)
    both, _ = predict(setting, fold, Seeds((0, 1)))
    for s in (0, 1):
        alone, _ = predict(setting, fold, Seeds((s,)))
        assert both[s] == pytest.approx(alone[0], abs=1e-5)
    plain, _ = predict({**setting, "parts": []}, fold, Seeds((0, 1)))
    none, _ = predict(setting_of("losses.VATLoss", "penalty", "classes", epsilon=0.0), fold, Seeds((0, 1)))
    assert none == pytest.approx(plain, abs=1e-4)
    assert np.abs(both - plain).max() > 0.01


def test_a_loss_that_is_built_from_labels_gets_those_that_it_will_meet():
    """Of a normal target, standardised: against predictions of 0 its absolute error is sqrt(2 / pi), and that of the
    pseudo labels, smoothed with half a deviation, sqrt(2 (1 + 1 / 4) / pi)."""
    fold = fold_of(100 + 7 * norm.ppf((np.arange(4000) + 0.5) / 4000), "real")
    setting = {**setting_of("weighting.DistLoss", "loss", "real", weight=2.0), "batch": 4000}
    made, (y, centre, scale) = recipe(setting, fold, Seeds((0, 1))), targets(fold)
    assert (centre, scale) == pytest.approx((100, 7), rel=1e-3)
    values = made.loss(torch.zeros(2, 4000, 1), y.expand(2, -1))
    assert values.shape == (2, 4000)
    expected = np.sqrt(2 / np.pi) + 2 * np.sqrt(2.5 / np.pi)
    assert values.mean(1).tolist() == pytest.approx([expected, expected], rel=2e-3)


def test_a_loss_that_is_built_from_labels_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="labels: expected two different values"):
        predict(setting_of("weighting.DistLoss", "loss", "real"), fold_of(np.full(90, 3.0), "real"), Seeds((0,)))


def test_rare_values_of_a_target_bring_the_loss_that_is_for_them():
    known = replace(profile("heavy-tails"), num_classes=None, class_counts=())
    found, _ = choose(problem("real"), known, named("MAE"), settings=6, network=NETWORK)
    arm = next(arm for arm in found if arm.part == "weighting.DistLoss")
    assert {setting["parts"][0]["hyper"]["weight"] for setting in arm.settings} == {0.5, 1.0, 2.0}
    assert not any(arm.part == "weighting.DistLoss" and arm.family == "boosting" for arm in found)
