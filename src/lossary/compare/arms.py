"""Which arms a comparison tries: what one would do anyway, and the parts whose promises fit the data.

A part of the catalogue is tried if

1. its role is one that a small network can be trained with: `ROLES`;
2. it can serve: its loss is for this kind of target, and every fact that it needs is known;
3. its paper claims to help with something that applies. A symptom that the profile measures applies if the
   finding is raised; "worst-group" if a group column is given; those of `ALWAYS` whatever the data. Naming a
   part takes the place of this rule.

Past `MOST_PARTS` the rest is left out: raised findings count before `ALWAYS`, then more matches before fewer, then
each paper's first part before its others, then papers of whose claims a larger share has held. Every other part of a
fitting role is skipped, with its reason.

Parts go into a network. In tables the first `MOST_BOOSTED` of those that are losses or weightings go into gradient
boosting too: losses as its objective, weightings as weights of the rows, anew in every round.

Every arm has the same number of configurations, chosen before anything is trained. A network's come from pairs of
learning rate and weight decay, `RATES`; a part crosses the first of them with values spread evenly over its grid
`tune`. Where the profile finds imbalance and the metric counts every class the same, parts train on class-weighted
losses, as the class-weighted network does; those that weigh samples themselves, or are for imbalance, have half of
their configurations without. A combination (`stack`) keeps the setting that tuning chose for its first part and tries
the second's values, at the rates of both.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from typing import Any, Literal

from lossary import catalogue
from lossary.compare.metrics import KINDS, Metric
from lossary.compare.problem import Problem
from lossary.compare.profile import Profile
from lossary.compare.training import maker, part_of
from lossary.errors import BadInput
from lossary.roles import mark_of
from lossary.vocabulary import PROFILE_FIELDS, MissingFact, fill

ROLES = ("loss", "weighting", "selector", "penalty", "optimizer", "procedure")
ALWAYS = {
    "overfitting": "any network can fit its training rows too well",
    "training-cost": "shorter training is always welcome",
}
MOST_PARTS = 8
MOST_BOOSTED = 2
EVEN = ("balanced accuracy", "macro F1", "mAP", "label F1")  # metrics for which every class counts the same
# Arguments without a default that training hands to a part.
MADE_HERE = {
    "self", "input", "target", "losses", "params", "epochs", "generator", "labels", "batch_size", "model", "loss",
    "profile", "index",
}  # fmt: skip
ALONE = {"procedure"}  # roles that train in a loop of their own, which knows losses only

# Learning rate and weight decay, the more promising pairs first.
RATES = (
    (1e-3, 1.0), (1e-2, 1.0), (1e-3, 1e-2), (1e-2, 1e-2), (3e-3, 1.0), (3e-3, 1e-2), (3e-2, 1.0), (3e-2, 1e-2),
)  # fmt: skip
# Learning rate and leaves of a tree, in boosting.
TREES = ((0.1, 8), (0.03, 8), (0.1, 31), (0.3, 4), (0.03, 31), (0.1, 4), (0.3, 8), (0.03, 4))
PENALTIES = (0.1, 10.0, 1.0, 0.01, 100.0, 0.03, 0.3, 3.0)


@dataclass(frozen=True)
class Arm:
    """One way to train, before it is tuned: `settings` are its configurations, as `training` documents them.

    `name`, `family`, `paper`, `part`, `role` and `reason` are those of `result.ArmResult`; `code` is the hash of the
    papers' files.
    """

    name: str
    family: Literal["network", "boosting", "linear"]
    reason: str
    settings: tuple[dict[str, Any], ...]
    paper: str | None = None
    part: str | None = None
    role: str = ""
    code: str = ""

    @property
    def roles(self) -> set[str]:
        """Those of its parts; a combination has several."""
        return set(self.role.split(" + ")) - {""}


def stack(first: Arm, chosen: dict[str, Any], second: Arm, tuned: dict[str, Any]) -> Arm | None:
    """The first arm with the second's part put in beside its own, or None where they do not go together.

    Args:
        first, second: networks.
        chosen, tuned: the settings that tuning chose for them.
    """
    roles = first.roles | second.roles
    if first.roles & second.roles or (roles & ALONE and roles - ALONE - {"loss"}):
        return None
    values = [setting["parts"][0] for setting in (tuned, *second.settings)]
    values = [value for place, value in enumerate(values) if value not in values[:place]]
    rates = [(chosen["lr"], chosen["weight_decay"]), (tuned["lr"], tuned["weight_decay"]), *RATES]
    made: list[dict[str, Any]] = []
    for (lr, decay), value in product(dict.fromkeys(rates), values[: max(1, len(first.settings) // 2)]):
        made.append({**chosen, "lr": lr, "weight_decay": decay, "parts": [*chosen["parts"], value]})
    joined = {name: f"{getattr(first, name)} + {getattr(second, name)}" for name in ("name", "paper", "part", "role")}
    return Arm(
        family="network",
        reason=f"{second.name} added to the best so far",
        settings=tuple(made[: len(first.settings)]),
        code=first.code + second.code,
        **joined,
    )


def choose(
    problem: Problem,
    profile: Profile,
    metric: Metric,
    *,
    settings: int,
    network: Mapping[str, Any],
    names: Sequence[str] = (),
) -> tuple[tuple[Arm, ...], tuple[tuple[str, str], ...]]:
    """The arms, conventional ones first, and the parts that are skipped, with reasons.

    Args:
        problem, profile, metric: what is to be predicted, what was found in the rows that may be looked at, and
            what arms are scored by.
        settings: configurations of each arm.
        network: what all networks have in common: `model` and what it takes, `steps`, `batch`.
        names: only these parts, by name, room.name or paper, and conventional arms, by name or family. Where no
            conventional arm is named, all of them run.

    Raises:
        BadInput: a name that is none, or of a part that cannot serve here.
    """
    check_names(names)
    asked = {name.lower() for name in names}
    raised = {finding.symptom for finding in profile.findings if finding.raised}
    conventional = _conventional(problem, raised, settings, network)
    absent = asked & CONVENTIONAL - {arm.name for arm in conventional}
    if absent:
        raise BadInput(f"--arms: {min(absent)!r} is not for this target, or for nothing that the profile found")
    balance = "balanced" if "class-imbalance" in raised and metric.name in EVEN else None
    served: set[str] = set()
    parts, skipped, unfit = [], [], {}  # unfit: what a part that cannot serve answers to -> why
    for paper, part in _candidates():
        name = f"{paper['room']}.{part['name']}"
        answers = {*_own_names(paper, part), paper["id"]}
        if names and asked.isdisjoint(answers):
            skipped.append((name, "not among --arms"))
            continue
        obstacle = _obstacle(paper, part, problem, profile)
        rank, reason = _match(paper, raised, problem.group is not None)
        if obstacle or not (rank or names):
            skipped.append((name, obstacle or reason))
            unfit |= dict.fromkeys(answers & asked, f"{name} {obstacle}")
            continue
        if names:
            reason = f"named by --arms{'; ' + reason if rank else ''}"
            served |= answers
        order = (*rank, paper["parts"].index(part), -catalogue.held(paper))
        parts.append((order, _part_arm(paper, part, reason, balance, problem, settings, network)))
    for name in unfit.keys() - served:
        raise BadInput(f"--arms: {unfit[name]}")
    if not names:
        parts.sort(key=lambda ranked: ranked[0])
        skipped += [(arm.part, f"{MOST_PARTS} parts that fit better are tried") for _, arm in parts[MOST_PARTS:]]
        parts = parts[:MOST_PARTS]
    kept = [arm for arm in conventional if asked & {arm.name, arm.family}] or conventional
    chosen = [arm for _, arm in parts]
    boosted = _boosted(chosen, problem, settings) if any(arm.family == "boosting" for arm in kept) else []
    return (*kept, *chosen, *boosted), tuple(skipped)


def check_names(names: Sequence[str]) -> None:
    """Refuse names that no data could make right, before any data are read."""
    known = {name for paper, part in _candidates() for name in (*_own_names(paper, part), paper["id"])}
    known |= {"network", "boosting", "linear", *CONVENTIONAL}
    for name in names:
        if name.lower() in known:
            continue
        idle = [paper["id"] for paper, part in _parts() if name.lower() in (*_own_names(paper, part), paper["id"])]
        if idle:
            raise BadInput(
                f"--arms: {name!r} has no role that a comparison tries; `lossary show {idle[0]}` tells its use"
            )
        near = get_close_matches(name.lower(), sorted(known), n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `lossary find` for parts"
        raise BadInput(f"--arms: no arm or part {name!r}; {hint}")


TITLES = {"linear": "linear model", "boosting": "gradient boosting", "network": "network"}
REMEDIES = {"class-imbalance": "class-weighted", "heavy-tails": "absolute-error"}
CONVENTIONAL = {
    "linear model",
    "gradient boosting",
    "plain network",
    *(f"{remedy} {title}" for remedy in REMEDIES.values() for title in TITLES.values()),
}


def _conventional(problem: Problem, raised: set[str], settings: int, network: Mapping[str, Any]) -> list[Arm]:
    """What one would do anyway; with the remedies that are usual for what was found."""
    classes = len(problem.classes)
    grids = {
        "linear": [{"C" if classes else "alpha": value} for value in PENALTIES],
        "boosting": _trees(problem),
        "network": [{**network, "optimizer": "AdamW", "lr": lr, "weight_decay": decay} for lr, decay in RATES],
    }
    reasons = {
        "linear": "what one would try first",
        "boosting": "usually the strongest on tables",
        "network": "the model that the parts are put into",
    }
    if problem.shape:
        del grids["boosting"]
    symptom = "class-imbalance" if classes else "heavy-tails"
    key, usual, remedy = ("class_weight", None, "balanced") if classes else ("error", "squared", "absolute")
    arms = []
    for family, grid in grids.items():
        name = f"plain {family}" if family == "network" else TITLES[family]
        plain = tuple({"family": family, key: usual, **one} for one in grid[:settings])
        arms.append(Arm(name, family, reasons[family], plain))
        if symptom in raised and (classes or family != "linear"):
            mended = tuple({**one, key: remedy} for one in plain)
            why = f"the usual remedy for {_plain(symptom)}, which the profile found"
            arms.append(Arm(f"{REMEDIES[symptom]} {TITLES[family]}", family, why, mended))
    return arms


def _trees(problem: Problem) -> list[dict[str, Any]]:
    """Fewer rounds the more classes there are, since a round grows a tree for each."""
    outputs = problem.outputs
    rounds = min(100, max(20, 300 // outputs)) if outputs > 2 else 100
    return [{"learning_rate": rate, "num_leaves": leaves, "n_estimators": rounds} for rate, leaves in TREES]


def _boosted(arms: Sequence[Arm], problem: Problem, settings: int) -> list[Arm]:
    """The first losses and weightings of these networks, put into boosting instead."""
    if problem.shape or problem.task == "multilabel":
        return []
    trees, found = _trees(problem), []
    for arm in arms:
        entry = arm.settings[0]["parts"][0]
        made = part_of(entry)
        options = mark_of(made).options
        asked = inspect.signature(getattr(made, "forward", made)).parameters
        lonely = arm.role == "loss" and not options["couples"] and not {"index", "generator"} & set(asked)
        if not (lonely or arm.role == "weighting"):
            continue
        values = [setting["parts"][0] for setting in arm.settings]
        values = [value for place, value in enumerate(values) if value not in values[:place]]
        weights = [
            {name: setting[name]} for setting in arm.settings for name in ("class_weight", "error") if name in setting
        ]
        made_settings = tuple(
            {"family": "boosting", **tree, **weight, "parts": [value]}
            for (tree, value), weight in zip(product(trees, values), weights)
        )[:settings]
        name = f"{arm.name} on boosting"
        found.append(replace(arm, name=name, family="boosting", settings=made_settings))
        if len(found) == MOST_BOOSTED:
            break
    return found


def _candidates() -> list[tuple[catalogue.Entry, dict[str, Any]]]:
    """The papers' parts whose role fits."""
    return [(paper, part) for paper, part in _parts() if part["role"] in ROLES]


def _parts() -> list[tuple[catalogue.Entry, dict[str, Any]]]:
    return [(paper, part) for paper in catalogue.entries() for part in paper["parts"]]


def _own_names(paper: catalogue.Entry, part: Mapping[str, Any]) -> tuple[str, ...]:
    """What a part answers to, in small letters."""
    name = part["name"].lower()
    return name, f"{paper['room']}.{name}", f"{paper['id']}: {name}"


def _obstacle(paper: catalogue.Entry, part: Mapping[str, Any], problem: Problem, profile: Profile) -> str:
    """Why a part cannot serve on this data, or nothing."""
    kind = "classes" if problem.task == "ordinal" else problem.task
    on = part["options"].get("on", kind)
    if part["role"] == "penalty":
        if on != "module":
            return f"acts on {on}, which a comparison's networks do not hand out"
        on = "classes"  # what the role's module tells and its y holds
    if on != kind:
        return f"is for a target of {KINDS[on]}, this one is of {KINDS[kind]}"
    made = part_of({"part": f"{paper['room']}.{part['name']}"})
    if part["role"] == "procedure" and problem.weight is not None:
        return "trains in turns, which know no weights of rows"
    if part["role"] == "procedure" and not hasattr(made, "build"):
        return "has no `build`, by which a comparison could set it up"
    try:  # a procedure's `build` gets all facts at once, and its constructor asks for some by name
        fill(made if part["role"] == "procedure" else maker(made), profile.facts())
    except MissingFact as missing:
        return str(missing)
    calls = [maker(made)]
    if part["role"] != "procedure" and hasattr(made, "forward"):
        calls.append(made.forward)
    handed = {*MADE_HERE, *PROFILE_FIELDS, *(part["options"].get("tune") or ())}
    if part["role"] == "penalty":
        handed |= {"module", "x", "y"}
    if problem.group is not None and part["role"] in ("weighting", "selector"):
        handed |= {"group"}
    if kind != "classes" and part["role"] in ("weighting", "selector"):
        handed -= {"target", "labels"}  # one class number a row
    lacking = [
        name
        for call in calls
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in handed
    ]
    return f"needs {', '.join(lacking)}, which a comparison cannot supply here" if lacking else ""


def _match(paper: catalogue.Entry, raised: set[str], groups: bool) -> tuple[tuple[int, ...], str]:
    """How well a paper's promises fit (small is better, empty is not at all), and the reason in words."""
    found = [symptom for symptom in paper["helps"] if symptom in raised or (symptom == "worst-group" and groups)]
    general = [symptom for symptom in paper["helps"] if symptom in ALWAYS]
    if found or general:
        words = [_worded(symptom) for symptom in found] + [f"against {_plain(s)}: {ALWAYS[s]}" for s in general]
        return (0 if found else 1, -len(found) - len(general)), "; ".join(words)
    if not paper["helps"]:
        return (), "claims to help with nothing that a table shows"
    return (), f"is for {' and '.join(map(_plain, paper['helps']))}, of which this data shows no sign"


def _worded(symptom: str) -> str:
    if symptom == "worst-group":
        return "for the worst group: groups were named"
    return f"for {_plain(symptom)}, which the profile found"


def _plain(symptom: str) -> str:
    return symptom.replace("-", " ")


def _part_arm(
    paper: catalogue.Entry,
    part: Mapping[str, Any],
    reason: str,
    balance: str | None,
    problem: Problem,
    settings: int,
    network: Mapping[str, Any],
) -> Arm:
    tune = part["options"].get("tune") or {}
    grid = [dict(zip(tune, values)) for values in product(*tune.values())]
    grid = _evenly(grid, max(1, settings // 2))
    name = f"{paper['room']}.{part['name']}"
    divided = balance and (part["role"] == "weighting" or "class-imbalance" in paper["helps"])
    if problem.task == "multilabel" and part["role"] == "loss":
        balance = divided = None  # a loss over labels has its own way to weigh them
    made = []
    for place, ((lr, decay), hyper) in enumerate(list(product(RATES, grid))[:settings]):
        without = (
            divided and (place % len(grid) + place // len(grid)) % 2 == 1
        )  # every rate and every value comes with and without
        usual = {"class_weight": None if without else balance} if problem.classes else {"error": "squared"}
        base = {"family": "network", **usual, **network, "optimizer": "AdamW", "lr": lr, "weight_decay": decay}
        made.append({**base, "parts": [{"part": name, "role": part["role"], "hyper": hyper}]})
    title = f"{paper['id']}: {part['name']}"
    return Arm(title, "network", reason, tuple(made), paper["id"], name, part["role"], paper["code"])


def _evenly(values: Sequence[Any], count: int) -> list[Any]:
    """`count` of the values, the first and the last among them, or all where there are fewer."""
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / max(count - 1, 1))] for place in range(count)]
