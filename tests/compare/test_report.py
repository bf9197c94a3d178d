"""The report on comparisons made up here: all that is in them is on the page, and nothing in them can harm it."""

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lossary.compare import charts, report
from lossary.compare.profile import Finding, Profile
from lossary.compare.result import ArmResult, Comparison, Confirmation, Interval
from lossary.errors import BadInput

HOSTILE = "<script>alert(1)</script>"
COMBINED = "polyloss: poly1_cross_entropy + sam: SAM + infobatch: InfoBatch"
VOID = {"meta", "br", "img", "link", "input", "hr"}


def arm(name: str, score: float, lead: Interval | None, **more: object) -> ArmResult:
    cells = int(more.pop("cells", 20))
    noise = np.random.default_rng(len(name)).normal(0, 1.1, cells)
    given = {
        "family": "network",
        "paper": None,
        "part": None,
        "role": "",
        "reason": "What one would do anyway.",
        "setting": {"family": "network", "lr": 0.03, "hidden": (128, 128), "steps": 600},
        "tried": 8,
        "against_own": None,
        "p_holm": None if lead is None else 0.31,
        "seconds": 1.9,
        "parameters": 19_330,
        "memory": 41_200_000,
    }
    return ArmResult(
        name=name,
        score=score,
        against_baseline=lead,
        cells=cells,
        cell_scores=tuple((score + noise).tolist()),
        **{**given, **more},
    )


def part(name: str, role: str, facts: dict[str, object] | None = None, **hyper: object) -> dict[str, object]:
    return {"part": name, "role": role, "hyper": hyper, "facts": facts or {}}


def bins(*pairs: float) -> list[dict[str, float]]:
    return [
        {"predicted": x, "observed": y, "rows": 30 * 2**place}
        for place, (x, y) in enumerate(zip(pairs[::2], pairs[1::2], strict=True))
    ]


def sample() -> Comparison:
    """Classes: a confirmed finalist, a dropped arm, skipped parts and a hostile class."""
    arms = (
        arm(
            "polyloss: poly1_cross_entropy", 92.14, Interval(1.94, 0.71, 3.17),
            paper="polyloss", part="losses.poly1_cross_entropy", role="loss", p_holm=0.021,
            reason="Claims to help with class imbalance, and the largest class has 8.8 times the rows of the smallest.",
            setting={"family": "network", "lr": 0.03, "weight_decay": 1e-4, "steps": 600, "hidden": (128, 128),
                     "parts": [part("losses.poly1_cross_entropy", "loss", epsilon=-1.0)]},
            against_own=Interval(2.31, 1.12, 3.50), seconds=2.1,
        ),
        arm(
            "sam: SAM", 91.02, Interval(0.82, -0.35, 1.99), paper="sam", part="optim.SAM", role="optimizer",
            reason="Claims to help against overfitting, which any network of this size may do.",
            setting={"lr": 0.1, "steps": 600, "parts": [part("optim.SAM", "optimizer", rho=0.05)]},
            against_own=Interval(1.19, 0.21, 2.17), seconds=4.4,
        ),
        arm(
            COMBINED, 90.9, Interval(0.7, -0.5, 1.9), paper="polyloss + sam + infobatch",
            part="losses.poly1_cross_entropy + optim.SAM + weighting.InfoBatch", role="loss + optimizer + selector",
            reason="sam: SAM added to the best so far", seconds=4.6, memory=0, against_own=Interval(1.1, 0.1, 2.1),
            setting={"lr": 0.1, "steps": 600, "parts": [
                part("losses.poly1_cross_entropy", "loss", epsilon=-0.5), part("optim.SAM", "optimizer", rho=0.02),
                part("weighting.InfoBatch", "selector", {"num_samples": 4104}, ratio=0.3),
            ]},
        ),
        arm(
            "polyloss: poly1_cross_entropy on boosting", 90.5, Interval(0.3, -0.6, 1.2), family="boosting",
            paper="polyloss", part="losses.poly1_cross_entropy", role="loss", seconds=0.9, memory=3_100_000,
            parameters=0, against_own=Interval(0.3, -0.6, 1.2),
            setting={"learning_rate": 0.1, "parts": [part("losses.poly1_cross_entropy", "loss", epsilon=-1.0)]},
        ),
        arm(
            "gradient boosting", 90.20, None, family="boosting", seconds=0.62, parameters=0, memory=2_300_000,
            setting={"learning_rate": 0.1, "max_leaf_nodes": 15, "max_iter": 120},
        ),
        arm(
            "group-dro: GroupDRO", 89.95, Interval(-0.25, -1.61, 1.11), paper="group-dro",
            part="weighting.GroupDRO", role="weighting", p_holm=1.0, reason="One group lags behind the others.",
            setting={"lr": 0.03, "parts": [part("weighting.GroupDRO", "weighting", {"num_groups": 4})], "steps": 600},
            against_own=Interval(0.1, -0.9, 1.1),
        ),
        arm("plain network", 89.83, Interval(-0.37, -1.48, 0.74), p_holm=1.0, reason="The model that parts improve."),
        arm(
            "logistic regression", 84.41, Interval(-5.79, -7.02, -4.56), family="linear", p_holm=1.0, seconds=0.03,
            parameters=11, memory=66_000, setting={"C": 1.0, "class_weight": "balanced"},
        ),
        arm(
            "infobatch: InfoBatch", 83.70, Interval(-6.5, -9.8, -3.2), paper="infobatch", part="weighting.InfoBatch",
            role="selector", cells=8, p_holm=1.0, dropped="after 8 cells its lead could no longer come above zero.",
            reason="Promises the same score for less time.", against_own=Interval(-6.1, -9.0, -3.2), seconds=1.4,
            setting={"lr": 0.03, "parts": [part("weighting.InfoBatch", "selector", ratio=0.5)]},
        ),
    )  # fmt: skip
    findings = (
        Finding(
            "class-imbalance", "Class imbalance", 8.79, 7.91, 9.79, "largest to smallest class",
            "Ratio of class counts, Wilson interval (95% over all classes); raised above 3",
            "A model that is trained on the plain mean loss may give up the small class, and accuracy would hardly "
            "show it.", True, 4e-9, 8e-9,
            {"kind": "counts", "names": ["text", HOSTILE], "values": [3685, 419]},
        ),
        Finding(
            "label-noise", "Label disagreement", 0.012, 0.0, 0.041, "share of labels",
            "Confident learning (cleanlab), range over logistic regression and randomised trees, 5 folds; raised when "
            "the low end is above 3%",
            "Up to 4% of the labels contradict the models, but about as often as overlapping classes would; this is no "
            "evidence of wrong labels, nor does it rule them out.", False, 0.8, 0.8,
            {"kind": "reliability", "lines": {"logistic regression": bins(0.7, 0.68, 0.9, 0.93)}},
        ),
    )  # fmt: skip
    return Comparison(
        sentence="poly1_cross_entropy (polyloss) beats gradient boosting, the best conventional arm, by 1.9 points of "
        "balanced accuracy on rows that nothing had looked at (95% interval 0.7 to 3.1).",
        own="It also improves its own model: a plain network gains 2.3 points with it in the search (1.1 to 3.5, "
        "exploratory).",
        data={
            "name": "page-blocks", "source": "page-blocks", "target": "block", "task": "classes", "rows": 5472,
            "columns": 10, "locked": 1368, "classes": ("text", HOSTILE), "digest": "9f2c" * 16,
            "reading": {"target": None, "task": None},
        },
        metric={
            "name": "balanced accuracy", "unit": "points", "better": "higher",
            "why": "the classes are uneven, and plain accuracy would hide the small one", "asked": "", "costs": None,
        },
        protocol={"partitions": 4, "folds": 5, "seeds": 5, "confirm_seeds": 20, "settings": 8, "comparisons": 10},
        profile=Profile(4104, 10, 2, (3685, 419), None, 0.012, findings, ("Nothing was left out.",)),
        arms=arms,
        confirmation=Confirmation(
            "polyloss: poly1_cross_entropy", "gradient boosting", Interval(1.91, 0.68, 3.14), 1.76, 1368, (20, 1),
            (92.35, 90.44),
        ),
        skipped=(
            ("losses.smooth_adversarial_comp_sum_loss", "needs attacked inputs, which compare does not make"),
            ("weighting.LDRGroups", "needs num_groups (distinct groups), which this data does not have"),
            ("detection.soft_nms", "is a suppressor; compare tries losses, weightings, selectors and optimizers"),
            ("ood.MahalanobisScore", "is a score; compare tries losses, weightings, selectors and optimizers"),
            ("ood.RelativeMahalanobisScore", "is a score; compare tries losses, weightings, selectors and optimizers"),
        ),
        notes=("Blocks of scanned pages, text or other.", f"Column '{HOSTILE}' is text.", "Nothing was left out."),
        command="lossary compare page-blocks --seeds 5 --out page-blocks-report",
        versions={"lossary": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "scikit-learn": "1.9.1", "numpy": "2.4.6"},
        seconds=84.2,
        curves={
            "reliability": {
                "polyloss: poly1_cross_entropy": bins(0.55, 0.58, 0.65, 0.63, 0.75, 0.78, 0.85, 0.86, 0.97, 0.975),
                "gradient boosting": bins(0.55, 0.5, 0.65, 0.55, 0.75, 0.64, 0.85, 0.74, 0.98, 0.955),
            },
            "confusion": {
                "polyloss: poly1_cross_entropy": [[1170, 58], [14, 126]],
                "gradient boosting": [[1210, 18], [25, 115]],
            },
        },
        brought={
            "against": asdict(Confirmation(
                "polyloss: poly1_cross_entropy", "what you brought", Interval(-2.6, -3.9, -1.3), 1.83, 1368, (20, 1),
                (92.35, 94.95),
            )),
            "sentence": "On the 1,368 locked rows polyloss: poly1_cross_entropy was worse than what you brought.",
        },
        trust={
            "rows": 684, "alpha": 0.1, "size": 1.08, "coverage": 0.862, "low": 0.834, "high": 0.886,
            "calibration_error_before": 0.0712, "calibration_error_after": 0.0123,
        },
    )  # fmt: skip


def regression() -> Comparison:
    """Numbers, in units of their own, lower is better; too few rows, and nothing helps."""
    arms = (
        arm("ridge regression", 53.9, None, family="linear", seconds=0.004, parameters=11, setting={"alpha": 10.0}),
        arm(
            "ldr-loss: ldr_squared", 55.4, Interval(-1.5, -4.1, 1.1), paper="ldr-loss", part="losses.ldr_squared",
            role="loss", p_holm=1.0, reason="Tails of the target are heavy.", against_own=Interval(0.4, -1.2, 2.0),
        ),
        arm("plain network", 56.0, Interval(-2.1, -4.9, 0.7), p_holm=1.0),
        arm("gradient boosting", 57.7, Interval(-3.8, -6.9, -0.7), family="boosting", p_holm=1.0, seconds=0.2),
    )  # fmt: skip
    tails = Finding(
        "heavy-tails", "Heavy tails of the target", -0.88, -1.1, -0.6, "excess kurtosis",
        "Excess kurtosis (normal 0, Laplace 3), bootstrap interval; raised above 1", "The tails are light.",
        False, 1.0, 1.0,
        {"kind": "quantiles", "x": "normal", "y": "deviations", "points": [[-2.0, -1.7], [0.0, 0.0], [2.0, 1.8]]},
    )  # fmt: skip
    return Comparison(
        sentence="Nothing was shown to beat ridge regression on diabetes.",
        own="ldr_squared did not measurably improve its own model.",
        data={
            "name": "diabetes", "source": "diabetes", "target": "progression", "task": "real", "rows": 442,
            "columns": 10, "locked": 89, "classes": (), "digest": "0a" * 32, "reading": {},
        },
        metric={"name": "root mean squared error", "unit": "", "better": "lower", "why": "", "asked": "",
                "costs": None},
        protocol={"partitions": 4, "folds": 5, "seeds": 5, "confirm_seeds": 20, "settings": 8, "comparisons": 6},
        profile=Profile(331, 10, None, (), None, None, (tails,), ()),
        arms=arms,
        confirmation=Confirmation(
            "ldr-loss: ldr_squared", "ridge regression", Interval(-0.6, -3.3, 2.1), 3.9, 89, (20, 1), (54.8, 54.2),
            exploratory="89 locked rows are too few to confirm anything; at least 100 are needed.",
        ),
        skipped=(),
        notes=(),
        command="lossary compare diabetes",
        versions={"lossary": "0.1.0"},
        seconds=4000.0,
        trust={"rows": 45, "alpha": 0.1, "size": 181.4, "coverage": 0.911, "low": 0.793, "high": 0.965},
        curves={
            "reliability": {
                "ldr-loss: ldr_squared": bins(90, 94, 120, 111, 150, 153, 180, 188, 220, 214),
                "ridge regression": bins(80, 94, 120, 121, 150, 146, 190, 188, 230, 221),
            }
        },
    )  # fmt: skip


def labels() -> Comparison:
    """Several labels, with a plain winner; too few rows were locked to check it."""
    c = sample()
    names = ("plain network", "sam: SAM")
    return replace(
        c,
        data={**c.data, "task": "multilabel", "classes": ("arts", "science and technology", HOSTILE)},
        metric={**c.metric, "name": "mAP"},
        profile=replace(c.profile, num_classes=3, class_counts=(900, 700, 30)),
        arms=tuple(one for one in c.arms if one.name in names),
        confirmation=replace(
            c.confirmation, finalist=names[1], baseline=names[0], effect=Interval(0.2, -0.4, 0.8), seeds=(20, 20)
        ),
        curves={"reliability": {name: bins(0.1, 0.12, 0.5, 0.47, 0.9, 0.88) for name in names}},
        brought={},
        trust={},
    )


class Page(HTMLParser):
    """Checks that elements nest, and collects what a reader meets."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pages() -> dict[str, tuple[str, Page]]:
    folder = Path("my out") / "page-blocks"
    made = {"classes": report.html(sample(), f"# {HOSTILE}", folder), "real": report.html(regression())}
    made["multilabel"] = report.html(labels(), "", folder)
    return {name: (text, Page(text)) for name, text in made.items()}


def test_answer_comes_first_and_everything_is_there(pages):
    for name, c in (("classes", sample()), ("real", regression()), ("multilabel", labels())):
        words = pages[name][1].text
        shown = [c.sentence, c.own, c.command, c.data["digest"], *c.versions.values(), *c.notes]
        shown += [arm.name for arm in c.arms] + [arm.reason for arm in c.arms] + [arm.dropped for arm in c.arms]
        shown += [text for found in c.profile.findings for text in (found.title, found.means, found.method)]
        shown += [text for pair in c.skipped for text in pair]
        for text in shown:
            assert " ".join(text.split()) in words, text
        order = [c.sentence, c.own, "lead of the finalist", *([c.brought["sentence"]] if c.brought else [])]
        order += ["Every arm on the same", "What the profile found", "Why each was tried", "On the locked rows. "]
        order += ["the Pareto front", "How far to trust it", c.command]
        places = [words.index(text) for text in order]
        assert places == sorted(places)


def test_says_how_much_was_run_and_nothing_twice(pages):
    words = pages["classes"][1].text
    for text in (
        "the same 4 partitions × 5 folds of the search rows; networks with 5 seeds, other arms once",
        "Holm-adjusted over 10 comparisons with the baseline",
        "Smallest detectable lead 1.8 points",
    ):
        assert text in words, text
    assert words.count("Nothing was left out.") == 1
    assert "20 seeds each" in pages["multilabel"][1].text
    c = sample()
    small = Page(report.html(replace(c, protocol={**c.protocol, "partitions": 1, "seeds": 1, "confirm_seeds": 1}))).text
    assert "the same 1 partition × 5 folds of the search rows; networks with 1 seed, other" in small
    assert "networks with 1 seed; that interval" in small


def test_numbers_are_those_of_the_records(pages):
    words = pages["classes"][1].text
    for text in (
        "confirmed", "+1.9 points +0.7 to +3.1", "92.3 against 90.4", "1.8 points",
        "1,368 rows, 20 seeds against one run",
        "+2.3 +1.1 to +3.5", "0.021", "8.79 largest to smallest class 7.91 to 9.79", "1.2% of labels 0.0% to 4.1%",
        "Stopped early: after 8 cells", "poly1_cross_entropy epsilon -1", "hidden 128, 128", "1 min 24 s",
        "2.1 s per fit, 41 MB , 19,330 parameters", "66 kB",
        "SAM rho 0.02 InfoBatch ratio 0.3 num samples 4104", "loss + optimizer + selector on network",
        "loss on boosting",
        "from lossary.losses import poly1_cross_entropy from lossary.optim import SAM from lossary.weighting import "
        "InfoBatch",
        "hold the truth in 90% of the rows", "86.2% 83.4% to 88.6%", "1.08 classes on average",
        "1.2% after calibration, 7.1% before", "684 rows", "less than they are made for, beyond chance",
        "lossary predict 'my out/page-blocks' new.csv --with-sets",
    ):  # fmt: skip
        assert text in words, text
    words = pages["real"][1].text
    for text in (
        "exploratory only",
        "89 locked rows are too few",
        "−0.6 −3.3 to +2.1",
        "1 h 6 min",
        "−0.88 excess kurtosis",
        "Intervals are made to hold the truth in 90%",
        "91.1% 79.3% to 96.5%",
        "Width of an interval 181 Checked",
    ):
        assert text in words, text
    assert "less than they are made for" not in words
    assert "lossary predict" not in words
    words = pages["multilabel"][1].text
    for text in ("Labels 3", "probability of a label", "a label that is given 80%", "Too few rows were locked to"):
        assert text in words, text
    assert words.endswith("charts/ .")
    assert "lossary predict 'my out/page-blocks' new.csv Took" in words  # no sets without rows to check them on
    assert "true \\ predicted" not in words


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        ({"test": None, "time": None}, "89 of 442 rows were locked away"),
        ({"test": "later.csv", "time": "day"}, "The test rows, 89, were locked away"),
        ({"test": None, "time": "day"}, "The latest 89 rows were locked away"),
    ],
)
def test_says_which_rows_were_locked(reading, said):
    c = regression()
    bare = replace(c, data={**c.data, "reading": reading}, curves={}, trust={}, arms=c.arms[:1], confirmation=None)
    assert said in Page(report.html(bare)).text


def test_works_offline_and_runs_nothing(pages):
    for text, page in pages.values():
        assert not page.having("script")
        assert not page.having("link")
        assert not page.having("img")
        for _, attrs in page.tags:
            assert not {name for name in attrs if name.startswith("on")}
            for name in ("href", "src", "xlink:href"):
                assert (attrs.get(name) or "#").startswith("#"), attrs
        assert "url(" not in text
        assert "@import" not in text
        assert len(text) < 400_000
    assert HOSTILE in pages["classes"][1].text  # as words, on the page, in a chart and in winner.py
    assert any(HOSTILE in (attrs["aria-label"] or "") for attrs in pages["classes"][1].having("svg"))


def test_reads_well_without_eyes(pages):
    for _, page in pages.values():
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in page.having("svg"))
        assert all(attrs.get("scope") in ("row", "col") for attrs in page.having("th"))
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["href"][1:] for attrs in page.having("a")} <= set(ids)
        assert page.having("html") == [{"lang": "en"}]


@pytest.mark.parametrize("theme", [charts.LIGHT, charts.DARK], ids=["light", "dark"])
def test_contrast(theme):
    """Text has a contrast of 4.5 with what it stands on (WCAG AA), lines and dots of 3."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "muted", "part", "plain"):
        for ground in ("page", "panel"):
            assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)


def test_every_colour_of_a_chart_follows_the_theme(pages):
    for text, _ in pages.values():
        drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
        assert "var(--part)" in drawn
        assert set(re.findall(r'(?:fill|stroke)="([^"]*)"', drawn)) <= {
            "none",
            *(f"var(--{name})" for name in charts.LIGHT),
        }


def test_dots_stand_where_the_numbers_say():
    """The lead's dot is in proportion between the interval's ends, on an axis that has zero and the band."""
    text = charts.svg(charts.interval_plot(sample().confirmation, "points"), "x")
    low, high = (
        float(x)
        for x in re.search(
            r'translate\(([\d.]+),\d+\)" x2="([\d.]+)"', text[text.index('stroke-width="4"') - 200 :]
        ).groups()
    )
    dot = float(re.findall(r'translate\(([\d.]+),[\d.]+\)" d="M6', text)[0])
    assert (dot - low) / high == pytest.approx((1.91 - 0.68) / (3.14 - 0.68), abs=0.01)


def test_pareto_by_hand():
    c = sample()
    assert [arm.name for arm in charts.pareto(c.arms, "higher")] == [
        "logistic regression", "gradient boosting", "polyloss: poly1_cross_entropy on boosting",
        "polyloss: poly1_cross_entropy",
    ]  # fmt: skip
    assert [arm.memory for arm in charts.pareto(c.arms, "higher", "memory")] == [66e3, 2.3e6, 3.1e6, 41.2e6]
    assert [arm.parameters for arm in charts.pareto(c.arms, "higher", "parameters")] == [11, 19_330]
    assert [arm.name for arm in charts.pareto(regression().arms, "lower")] == ["ridge regression"]
    assert "infobatch: InfoBatch" in [
        arm.name for arm in charts.pareto([replace(a, dropped="") for a in c.arms[-1:]], "higher")
    ]


def test_cell_leads_have_the_sign_of_better():
    one, other = (
        replace(sample().arms[0], cell_scores=(3.0, 1.0)),
        replace(sample().arms[1], cell_scores=(2.0, 2.0, 9.0)),
    )
    assert charts.cell_leads(one, other, "higher") == [1.0, -1.0]
    assert charts.cell_leads(one, other, "lower") == [-1.0, 1.0]


def test_an_arm_that_fails_hides_no_other():
    """The one far below ends in an arrow, without a dot, and its cells at the edge."""
    c = sample()
    far = replace(c.arms[6], against_baseline=Interval(-300.0, -400.0, -200.0), cell_scores=(-210.0,) * 20)
    arms = (*c.arms[:2], *c.arms[4:6], far)
    rows = charts.forest(arms, "points", baseline="b").to_dict()["layer"]
    leads = {row["arm"]: row for row in rows[1]["data"]["values"]}
    assert leads[far.name]["beyond"]
    assert not leads[far.name]["shown"]
    assert leads[far.name]["lead"] == pytest.approx(0.285 - 4 * (2.46 + 2.72) / 2)  # by hand, from the four intervals
    assert [row["lead"] for row in leads.values() if row["shown"]] == [1.94, 0.82, -0.25]
    strip = charts.cells(far, c.arms[4], "higher", reach=3.0).to_dict()["layer"]
    assert [row["lead"] for row in strip[1]["data"]["values"]] == [-3.0] * 20
    assert strip[2]["data"]["values"] == [{"lead": -3.0}]


@pytest.mark.parametrize("width", [report.WIDE, report.NARROW])
def test_long_names_take_several_lines(width):
    """No line is cut off, and the lines of an arm stand around its dot, or above it where the screen is narrow."""
    c = sample()
    chart = charts.forest(c.arms, "points", baseline="b", width=width).to_dict()
    dot = next(row["y"] for row in chart["layer"][1]["data"]["values"] if row["arm"] == COMBINED)
    if width == report.WIDE:
        axis = chart["layer"][1]["encoding"]["y"]["axis"]
        lines = json.loads(axis["labelExpr"].removeprefix("(").removesuffix(")[datum.value]"))
        words = [{"line": lines[f"{y:g}"], "y": y} for y in axis["values"]]
    else:
        words = chart["layer"][-1]["data"]["values"]
    first = next(place for place, word in enumerate(words) if word["line"].endswith("SAM +"))
    own = words[first : first + 2]  # 62 letters, of which 46 go into a line
    assert " ".join(word["line"] for word in own) == COMBINED
    mean = sum(word["y"] for word in own) / 2
    assert mean == pytest.approx(dot) if width == report.WIDE else own[-1]["y"] < dot
    text = charts.svg(charts.forest(c.arms, "points", baseline="b", width=width), "x")
    assert all(word["line"] in text for word in words)


def test_no_name_is_cut_off_in_the_cost_chart():
    text = charts.svg(charts.cost_gain(sample().arms, sample().metric, width=report.NARROW), "x")
    for name in ("1 logistic regression", "3 polyloss: poly1_cross_entropy on boosting"):
        assert name in text


@pytest.mark.parametrize(
    ("size", "said"), [(66_000, "66 kB"), (999, "1.0 kB"), (1_940_000, "1.9 MB"), (34e6, "34 MB"), (2.1e9, "2.1 GB")]
)
def test_memory_in_words(size, said):
    assert report.memory(size) == said


@pytest.mark.parametrize(
    ("ends", "ticks"), [((0.02, 300), [0.1, 1, 10, 100]), ((0.02, 0.4), [0.03, 0.1, 0.3]), ((2.1, 4.2), [3, 4])]
)
def test_ticks_are_round(ends, ticks):
    assert charts._ticks(*ends) == pytest.approx(ticks)


def test_coverage_is_drawn_against_what_was_promised():
    values = charts.coverage(sample().trust).to_dict()["data"]["values"]
    assert values == [{"promised": 0.9, "share": 0.862, "low": 0.834, "high": 0.886}]
    bare = charts.coverage({"alpha": 0.2, "coverage": 0.7}).to_dict()["data"]["values"]
    assert bare == [{"promised": 0.8, "share": 0.7, "low": 0.7, "high": 0.7}]


@pytest.mark.parametrize(
    ("effect", "exploratory", "said"),
    [
        (Interval(1.0, 0.1, 1.9), "", "confirmed"),
        (Interval(1.0, 0.0, 2.0), "", "not shown to help"),
        (Interval(-1.0, -1.9, -0.1), "", "worse"),
        (Interval(1.0, 0.1, 1.9), "few rows", "exploratory only"),
    ],
)
def test_verdict_says_no_more_than_the_interval(effect, exploratory, said):
    assert report.verdict(replace(sample().confirmation, effect=effect, exploratory=exploratory)) == said


@pytest.mark.parametrize(
    ("value", "half", "said"),
    [
        (1.234, 0.5, "+1.23"),
        (1.234, 2.0, "+1.2"),
        (-0.04, 3.0, "+0.0"),
        (-1234.5, 40.0, "−1,234"),
        (0.00123, 0.0005, "+0.00123"),
    ],
)
def test_number_has_two_digits_of_its_interval(value, half, said):
    assert charts.number(value, Interval(value, value - half, value + half), sign=True) == said


def test_writes_files(tmp_path):
    odd = replace(sample(), curves={**sample().curves, "array": np.array([0.5, np.nan])})
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "winner.py").write_text("print('mine')\n")
    files = report.write(odd, tmp_path / "deep")
    drawn = {"confirmation", "brought", "leaderboard", "reliability", "cost", "memory", "parameters", "trust"}
    assert set(files) == drawn | {"report", "result", "class-imbalance", "label-disagreement"}
    assert "print('mine')" in Page(files["report"].read_text("utf-8")).text
    assert all(files[name].read_bytes().startswith(b"\x89PNG") for name in set(files) - {"report", "result"})
    result = json.loads(files["result"].read_text("utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert result["curves"]["array"] == [0.5, None]
    first, baseline = result["arms"][0], result["arms"][4]
    assert (first["name"], first["difference"], first["interval"]) == (
        "polyloss: poly1_cross_entropy",
        1.94,
        [0.71, 3.17],
    )
    assert (baseline["name"], baseline["difference"], baseline["interval"]) == ("gradient boosting", None, None)


def test_schema_names_every_field():
    """`schema.md` documents what is written, and nothing else."""
    schema = Path(report.__file__).with_name("schema.md").read_text("utf-8")
    listed = [
        re.findall(r"`(\w+)`", line.partition(":")[0]) for line in schema.splitlines() if line.lstrip()[:1] == "-"
    ]
    documented = {name for names in listed for name in names}
    result = json.loads(report.to_json(sample()))
    parts = [result, result["arms"][0], result["confirmation"], result["profile"], result["profile"]["findings"][0]]
    parts += [result[name] for name in ("data", "metric", "protocol", "curves", "brought", "trust")]
    parts += [result["confirmation"]["effect"]]
    assert result["brought"]["against"].keys() == result["confirmation"].keys()
    assert documented == {name for part in parts for name in part} | {"predicted", "observed"}


def test_refuses_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="out: cannot write to"):
        report.write(regression(), tmp_path / "file")


def test_without_confirmation_or_parts():
    """A comparison of conventional arms alone has nothing to confirm and still has a page."""
    c = regression()
    bare = replace(c, arms=c.arms[:1], confirmation=None, curves={}, profile=replace(c.profile, findings=()))
    page = Page(report.html(bare))
    assert "nothing to confirm" in page.text
    assert "No finalist was tested on the locked rows" in page.text


def test_an_arm_that_diverged_spoils_no_chart():
    nothing = Interval(math.nan, math.nan, math.nan)
    c = regression()
    lost = replace(c.arms[1], score=math.nan, against_baseline=nothing, cell_scores=(math.nan,) * 20)
    endless = replace(c.arms[2], against_baseline=Interval(0.0, -math.inf, math.inf))
    page = Page(report.html(replace(c, arms=(c.arms[0], lost, endless, *c.arms[3:]), confirmation=None)))
    assert "NaN" not in str(page.having("svg"))
    assert "nan" in page.text
