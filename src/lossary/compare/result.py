"""What a comparison found: plain records, the same in Python, in the JSON and in the report."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lossary.compare.profile import Profile


@dataclass(frozen=True)
class Interval:
    """An effect in the metric's unit, positive being better, with its 95% interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmResult:
    """One arm's score over the search cells.

    Attributes:
        name: shown to people, unique: "cross-entropy MLP", "polyloss: poly1_cross_entropy".
        family: "network", "boosting" or "linear": the model it trains.
        paper: the paper's id, or None for a conventional arm; a combination has several, joined by " + ".
        part: "losses.poly1_cross_entropy", or None for a conventional arm; of a combination joined likewise.
        role: the part's role, or ""; of a combination joined likewise.
        reason: why it was tried, in words.
        setting: the configuration that tuning chose, of `tried` configurations.
        score: mean over cells of the metric, in its own direction.
        against_baseline: difference from the best conventional arm; None for that arm itself.
        against_own: difference from the same model trained plainly; None for a conventional arm.
        p_holm: Holm-adjusted over all registered arms; 1 for a dropped arm.
        cells: finished cells; fewer than the others' when `dropped` says why it was stopped.
        cell_scores: the score in each (partition, fold), seeds averaged, in order.
        seconds: training time per fit, all seeds of one cell together.
        parameters: of one trained model, 0 where that means nothing.
        memory: bytes that a fit took at most beyond what its process held in use before, 0 where that cannot be told.
    """

    name: str
    family: str
    paper: str | None
    part: str | None
    role: str
    reason: str
    setting: dict[str, Any]
    tried: int
    score: float
    against_baseline: Interval | None
    against_own: Interval | None
    p_holm: float | None
    cells: int
    cell_scores: tuple[float, ...]
    seconds: float
    parameters: int = 0
    memory: int = 0
    dropped: str = ""

    @property
    def conventional(self) -> bool:
        return self.part is None


@dataclass(frozen=True)
class Confirmation:
    """The finalist against the registered baseline, once, on rows that nothing had looked at.

    Attributes:
        finalist, baseline: names of arms.
        effect: the finalist's lead on the locked rows.
        detectable: the smallest lead that this comparison would have seen four times in five, 2.8 SE.
        rows: locked.
        seeds: of the finalist and of the baseline; 1 of an arm that draws nothing.
        scores: locked score of the finalist and of the baseline, in the metric's own direction.
        exploratory: why the locked rows are too few to confirm anything; empty when they are enough.
    """

    finalist: str
    baseline: str
    effect: Interval
    detectable: float
    rows: int
    seeds: tuple[int, int]
    scores: tuple[float, float]
    exploratory: str = ""


@dataclass(frozen=True)
class Comparison:
    """The whole answer.

    Attributes:
        sentence: what helped, by how much and how surely, or that nothing did. Says no more than the
            confirmation's interval does.
        own: the second answer, in a sentence: does the part improve its own model.
        data: name, source, target, task, rows, columns, locked, classes, digest.
        metric: name, unit, better ("higher" or "lower"), why it was chosen.
        protocol: partitions, folds, seeds, confirm_seeds, settings tried per arm, comparisons adjusted for by Holm.
        arms: best first.
        skipped: parts of the catalogue that were not tried, each with its reason.
        command, versions, seconds: how to reproduce it, and how long it took.
    """

    sentence: str
    own: str
    data: dict[str, Any]
    metric: dict[str, str]
    protocol: dict[str, Any]
    profile: Profile
    arms: tuple[ArmResult, ...]
    confirmation: Confirmation | None
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    command: str
    versions: dict[str, str]
    seconds: float
    curves: dict[str, Any] = field(default_factory=dict)
    """For charts: "reliability" and "confusion" of finalist and baseline on the locked rows."""
    brought: dict[str, Any] = field(default_factory=dict)
    """Where the user brought predictions: "against", a `Confirmation`, and its "sentence"."""
    trust: dict[str, Any] = field(default_factory=dict)
    """How far the saved winner's probabilities, sets and intervals can be trusted: `model.Model.checked`."""

    def to_json(self) -> dict[str, Any]:
        """Plain values. Each arm also carries `difference` and `interval`, those against the baseline."""
        record = asdict(self)
        for arm in record["arms"]:
            effect = arm["against_baseline"]
            arm["difference"] = effect and effect["difference"]
            arm["interval"] = effect and [effect["low"], effect["high"]]
        return record


def winning(comparison: Comparison) -> ArmResult:
    """The arm to train.

    The finalist where it was confirmed to help, the best conventional arm where the finalist was confirmed to be
    worse, and otherwise whichever arm was best in the search.
    """
    sure, name = comparison.confirmation, ""
    if sure and not sure.exploratory:
        name = sure.finalist if sure.effect.low > 0 else sure.baseline if sure.effect.high < 0 else ""
    finished = [arm for arm in comparison.arms if not arm.dropped]
    return next((arm for arm in finished if arm.name == name), finished[0])
