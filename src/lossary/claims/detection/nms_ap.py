"""NMS-AP: does it tell better than AP which detectors know an object's name, and what does it say of the others?

Simulated detectors find every object and give its box two names, the right one and its rival (a red thing is also
called blue). They differ in how often the right name has the higher score and in how well the boxes sit.
"""

import numpy as np
import torch
from scipy.stats import spearmanr

from lossary.claims import Arms, Seeds, claim
from lossary.claims.draw import Panel
from lossary.detection import nms_average_precision
from lossary.detection._average_precision import average_precision

DETECTORS = 12
IMAGES = 20
OBJECTS = 4
LABELS = 4


def _detector(rng: np.random.Generator, images: int, *, knows: float, blur: float, rivals_exist: bool) -> dict:
    """One detector's output on its images, and the share of the objects whose right name has the higher score.

    Args:
        knows: probability that it has.
        blur: standard deviation of the errors of a box, relative to its sides of 40.
        rivals_exist: whether the wrong names are labels of other objects, or of none.
    """
    corner = np.stack(np.meshgrid([0.0, 100.0], [0.0, 100.0]), axis=-1).reshape(4, 2)
    truth = np.concatenate([corner, corner + 40], axis=1)
    found = {name: [] for name in ("boxes", "scores", "labels", "truth", "truth_labels")}
    right = 0
    for _ in range(images):
        label = rng.integers(0, LABELS, OBJECTS)
        boxes = truth + 40 * blur * rng.standard_normal((OBJECTS, 4))
        high = rng.uniform(0.3, 1.0, OBJECTS)
        low = high * rng.uniform(0.3, 1.0, OBJECTS)
        wins = rng.random(OBJECTS) < knows
        right += wins.sum()
        rival = label ^ 1 if rivals_exist else label + LABELS
        found["boxes"].append(torch.from_numpy(np.concatenate([boxes, boxes])))
        found["scores"].append(torch.from_numpy(np.concatenate([np.where(wins, high, low), np.where(wins, low, high)])))
        found["labels"].append(torch.from_numpy(np.concatenate([label, rival])))
        found["truth"].append(torch.from_numpy(truth))
        found["truth_labels"].append(torch.from_numpy(label))
    return {"images": found, "right": right / (images * OBJECTS)}


@claim(
    says="NMS-AP ranks detectors by how often they name an object right better than AP does",
    kind="superiority",
    metric="rank correlation",
    scale="12 simulated detectors, right name first for 50 to 100% and boxes off by 1 to 8%; 20 images of 4 objects",
)
def nms_ap_ranks_by_names(seeds: Seeds) -> Arms:
    values = []
    for rng in seeds.numpy("detectors"):
        runs = [
            _detector(
                rng, seeds.few(IMAGES), knows=rng.uniform(0.5, 1), blur=rng.uniform(0.01, 0.08), rivals_exist=True
            )
            for _ in range(DETECTORS)
        ]
        right = [run["right"] for run in runs]
        measures = nms_average_precision, average_precision
        values.append([100 * spearmanr(right, [f(**run["images"]) for run in runs]).statistic for f in measures])
    method, baseline = zip(*values)
    return Arms(list(method), list(baseline))


@claim(
    says="Wrong names that no image asks for leave AP at 100 and NMS-AP at the share of right names",
    kind="exact",
    metric="deviation",
    tolerance=0.01,
    scale="20 images of 4 objects, exact boxes, right name first for 50 to 100% of them; recall points of COCO's AP",
)
def unasked_names(seeds: Seeds) -> Arms:
    """The mean over labels of the share of COCO's 101 recalls that is reached."""
    deviations = []
    for rng in seeds.numpy("unasked"):
        run = _detector(rng, seeds.few(IMAGES), knows=rng.uniform(0.5, 1), blur=0.0, rivals_exist=False)
        images = run["images"]
        label, score = (torch.cat(images[name]).view(-1, 2, OBJECTS) for name in ("labels", "scores"))
        wins = score[:, 0] > score[:, 1]
        shares = [wins[label[:, 0] == k].double().mean().item() for k in label[:, 0].unique().tolist()]
        expected = np.mean([100 * np.mean(np.linspace(0, 1, 101) <= share) if share else 0.0 for share in shares])
        deviations.append(max(abs(average_precision(**images) - 100), abs(nms_average_precision(**images) - expected)))
    return Arms(deviations, [0.0] * len(deviations))


@claim(
    says="Where every object has one name, NMS-AP is AP",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="20 images of 4 objects, boxes off by 5%, one name each, right for 70%",
)
def one_name_each(seeds: Seeds) -> Arms:
    method, baseline = [], []
    for rng in seeds.numpy("one name"):
        images = _detector(rng, seeds.few(IMAGES), knows=0.7, blur=0.05, rivals_exist=True)["images"]
        best = [s.view(2, OBJECTS).argmax(0) * OBJECTS + torch.arange(OBJECTS) for s in images["scores"]]
        single = {
            name: [part[keep] for part, keep in zip(images[name], best)] for name in ("boxes", "scores", "labels")
        }
        method.append(nms_average_precision(**{**images, **single}))
        baseline.append(average_precision(**{**images, **single}))
    return Arms(method, baseline)


def draw(seeds: Seeds) -> list[Panel]:
    """What a detector says of one image: AP counts both names of an object, NMS-AP the better one alone."""
    images = _detector(seeds.one(0).numpy("detectors")[0], 1, knows=0.7, blur=0.05, rivals_exist=True)["images"]
    boxes, scores, labels = (images[name][0] for name in ("boxes", "scores", "labels"))
    names = [f"{'abcdefgh'[label]} {score:.2f}" for label, score in zip(labels.tolist(), scores.tolist())]
    best = (scores.view(2, OBJECTS).argmax(0) * OBJECTS + torch.arange(OBJECTS)).tolist()
    objects = images["truth"][0].numpy()
    return [
        Panel(
            "objects", boxes=objects, labels=tuple("abcdefgh"[label] for label in images["truth_labels"][0].tolist())
        ),
        Panel("right names", boxes=boxes[:OBJECTS].numpy(), labels=tuple(names[:OBJECTS])),
        Panel("their rivals", boxes=boxes[OBJECTS:].numpy(), labels=tuple(names[OBJECTS:])),
        Panel("left by NMS across names", boxes=boxes[best].numpy(), labels=tuple(names[k] for k in best)),
    ]
