"""`--paper ID` keeps one paper's tests: its reference file, and what is parametrised by its id."""

import signal

import pytest
import torch

torch.set_num_threads(1)  # small models only wait on a second thread
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job; programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--paper", help="only this paper's tests, by id")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    paper = config.getoption("--paper")
    if paper is None:
        return
    stem = f"test_{paper.replace('-', '_')}"
    kept = [
        item
        for item in items
        if item.path.stem == stem or (hasattr(item, "callspec") and item.callspec.params.get("paper_id") == paper)
    ]
    if not kept:
        raise pytest.UsageError(f"--paper {paper}: no tests; is it in `lossary find {paper}`?")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
