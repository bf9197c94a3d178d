"""What the profile hands over: findings and facts, plain records that go into JSON as they are."""

from dataclasses import dataclass, field
from typing import Any

from lossary.vocabulary import PROFILE_FIELDS

LEVEL = 0.05  # the chance that any finding of a profile is raised where nothing is wrong


@dataclass(frozen=True)
class Finding:
    """One symptom (a key of `vocabulary.SYMPTOMS`): value and 95% interval [low, high] in `unit`, and what it means.

    Attributes:
        title: in words; no two findings of a profile share one.
        method: how it was measured, and beyond what it is an alarm.
        means: for the choice of what to try.
        raised: it is an alarm: `p_holm` is at most `LEVEL`.
        p: of what was found, or more, if the truth were no further than the threshold; None where there is nothing to
            be alarmed at.
        p_holm: `p`, adjusted by Holm for all findings of the profile.
        picture: plain data with a `kind`, which `profile_page` draws.
    """

    symptom: str
    title: str
    value: float
    low: float
    high: float
    unit: str
    method: str
    means: str
    raised: bool
    p: float | None = None
    p_holm: float | None = None
    picture: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Facts about the rows that may be looked at, and findings. Counts are None or empty where they do not apply.

    `class_counts` are rows of each class or level, or with each label; `label_noise` is the value of the finding on
    label disagreement; `notes` say what was not measured, and why.
    """

    num_samples: int
    num_features: int
    num_classes: int | None
    class_counts: tuple[int, ...]
    num_groups: int | None
    label_noise: float | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """The fields that fill a part's hyper-parameters by name (`vocabulary.fill`), None where they do not apply."""
        return {name: None if (value := getattr(self, name)) == () else value for name in PROFILE_FIELDS}


@dataclass(frozen=True)
class Measure:
    """A finding before it is known what all the others came to, and so whether it is raised.

    `alarm` and `calm` are what it means if it is, and if it is not; the others are the finding's.
    """

    symptom: str
    title: str
    value: float
    low: float
    high: float
    unit: str
    method: str
    p: float | None
    alarm: str
    calm: str
    picture: dict[str, Any]

    def finding(self, p_holm: float | None) -> Finding:
        """The finding, by its p as adjusted for all."""
        raised = p_holm is not None and p_holm <= LEVEL
        return Finding(
            symptom=self.symptom,
            title=self.title,
            value=float(self.value),
            low=float(self.low),
            high=float(self.high),
            unit=self.unit,
            method=self.method,
            means=self.alarm if raised else self.calm,
            raised=raised,
            p=self.p,
            p_holm=p_holm,
            picture=self.picture,
        )
