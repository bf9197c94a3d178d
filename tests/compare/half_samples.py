"""How often a profile raises anything where nothing is wrong: on half-samples of clean data.

    python -m tests.compare.half_samples 1000

Twelve sets, real and made up, in which no symptom is planted. Each half-sample is drawn without replacement, and in
turn gets what could raise a false alarm: six groups dealt out at random, the other half as a test file, or a time at
random.
At 5% of all profiles, 67 alarms in 1,000 are the most that chance brings about once in a hundred times.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
from sklearn import datasets

from lossary.compare.load import load
from lossary.compare.problem import Problem
from lossary.compare.profile import Profile, profile


def problem(name: str, x: np.ndarray | pd.DataFrame, target: np.ndarray, task: str = "classes") -> Problem:
    target = np.asarray(target)
    names = range(target.shape[1]) if task == "multilabel" else () if task == "real" else range(int(target.max()) + 1)
    return Problem(name, name, pd.DataFrame(x).rename(columns=str), target, "y", task, tuple(map(str, names)))


def clean() -> dict[str, Problem]:
    """Data in which every label is right, no row is strange, and errors are about as large everywhere."""
    found = {name: load(name) for name in ("digits", "breast-cancer", "wine", "diabetes")}
    iris = datasets.load_iris()
    found["iris"] = problem("iris", iris.data, iris.target.astype(np.int64))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(800, 10))
    noise = rng.normal(size=800)
    score = x[:, :3].sum(1) + noise
    found["overlap"] = problem("overlap", x, (score > 0).astype(np.int64))
    found["five classes"] = problem(
        "five classes", x, np.digitize(x[:, 0] + 0.3 * noise, (-1, -0.3, 0.3, 1)).astype(np.int64)
    )
    found["levels"] = problem("levels", x, np.digitize(score, (-2, 0, 2)).astype(np.int64), "ordinal")
    found["linear"] = problem("linear", x, score, "real")
    bent, y = datasets.make_friedman1(800, noise=1.0, random_state=0)
    found["friedman"] = problem("friedman", bent, y, "real")
    labels = (x[:, :6] + 0.5 * rng.normal(size=(800, 6)) > np.linspace(0.2, 0.8, 6)).astype(np.int64)
    found["six labels"] = problem("six labels", x, labels, "multilabel")
    text = pd.DataFrame({"a": rng.choice(list("uvw"), 600), "b": rng.normal(size=600), "c": rng.integers(0, 5, 600)})
    right = (text["b"] + (text["a"] == "u") - 0.3 + rng.normal(size=600) > 0).to_numpy().astype(np.int64)
    found["mixed"] = problem("mixed", text, right)
    return found


def profiles(count: int, sets: dict[str, Problem], first: int = 0) -> Iterator[tuple[str, Profile]]:
    """The sets take turns."""
    names = list(sets)
    for number in range(first, first + count):
        name = names[number % len(names)]
        whole, rng = sets[name], np.random.default_rng((1, number))
        n = len(whole)
        order = rng.permutation(n)
        half, rest = np.sort(order[: n // 2]), np.sort(order[n // 2 :])
        turn = number // len(names) % 3
        if turn == 0:
            whole = replace(whole, group=rng.integers(0, 6, n))
        elif turn == 1:
            whole = replace(whole, test=rest)
        else:
            whole = replace(whole, time=rng.random(n))
        yield name, profile(whole, half, seed=number)


if __name__ == "__main__":
    count = int(sys.argv[1])
    alarms = 0
    which: Counter[tuple[str, str]] = Counter()
    for done, (name, found) in enumerate(profiles(count, clean()), 1):
        raised = [finding.title for finding in found.findings if finding.raised]
        alarms += bool(raised)
        which.update((name, title) for title in raised)
        if raised or done % 50 == 0:
            print(done, alarms, name, raised, flush=True)
    print(f"{alarms} of {count} half-samples raised an alarm")
    for (name, title), times in which.most_common():
        print(f"  {times:4} {name}: {title}")
