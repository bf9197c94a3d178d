"""The examples of docs/frameworks.md, run as they stand: in each loop the network learns."""

import re
import warnings
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"```python (\w+)\n(.*?)```", TEXT, re.DOTALL))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "setup"])
def test_the_example_trains(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there: dict = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the frameworks' own, about workers and devices
        exec(EXAMPLES["setup"] + EXAMPLES[name], there)
    with torch.no_grad():
        right = (there["network"](there["x"]).argmax(1) == there["y"]).double().mean()
    assert right > 0.93
