import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lossary.tasks import JobError, run_all


def inverse(job: int) -> tuple[float, int]:
    return 1 / job, os.getpid()


def threads(job: int) -> int:
    import torch

    return torch.get_num_threads()


def vanish(job: int) -> None:
    if job == 2:
        os._exit(1)
    time.sleep(0.05)


def unsendable(job: int) -> object:
    return lambda: job


def test_results_come_from_warm_processes() -> None:
    found = dict(run_all(inverse, range(1, 21), workers=2))
    assert {job: value for job, (value, _) in found.items()} == {job: 1 / job for job in range(1, 21)}
    processes = {process for _, process in found.values()}
    assert len(processes) <= 2
    assert os.getpid() not in processes


def test_workers_have_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert dict(run_all(threads, [1, 2], workers=1)) == {1: 1, 2: 1}
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "MKL_NUM_THREADS" not in os.environ


def test_a_failure_carries_its_job_and_traceback() -> None:
    done = []
    with pytest.raises(JobError, match=r"return 1 / job.*") as caught:
        done.extend(run_all(inverse, [1, 2, 3, 4, 0, 5], workers=1))
    assert caught.value.job == 0
    assert "ZeroDivisionError" in str(caught.value)
    assert "job 0 failed" in str(caught.value)


@pytest.mark.parametrize(("function", "reason"), [(vanish, "its process died"), (unsendable, "lambda")])
def test_a_dead_process_or_an_unsendable_result_is_a_failure(function, reason: str) -> None:
    with pytest.raises(JobError, match=reason) as caught:
        list(run_all(function, [2, 3], workers=1))
    assert caught.value.job == 2


@pytest.mark.parametrize(("jobs", "workers"), [([3, 2, 1], 0), ([4], None), ([], None)])
def test_inline(jobs: list[int], workers: int | None) -> None:
    before = threads(0)
    assert list(run_all(inverse, jobs, workers=workers)) == [(job, (1 / job, os.getpid())) for job in jobs]
    assert list(run_all(threads, jobs, workers=workers)) == [(job, 1) for job in jobs]
    assert threads(0) == before


def test_inline_failure() -> None:
    with pytest.raises(JobError) as caught:
        list(run_all(inverse, [1, 0], workers=0))
    assert caught.value.job == 0
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


PROGRAM = """
    import time
    from lossary.tasks.workers import run_all

    def job(seconds):
        time.sleep(seconds)

    if __name__ == "__main__":
        try:
            for seconds, _ in run_all(job, [0.0, 600.0, 0.0, 600.0], workers=2):
                print(seconds, flush=True)
        except KeyboardInterrupt:
            print("stopped", flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_parent(end: signal.Signals, tmp_path) -> None:
    """Both workers are in a long job when the parent is interrupted or killed."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["0.0\n", "0.0\n"]
        parent.send_signal(end)
        rest = parent.stdout.read()  # ends once nobody holds the pipe any more: the workers are gone
        assert parent.wait(timeout=200) == (0 if end is signal.SIGINT else -signal.SIGKILL)
    assert rest == ("stopped\n" if end is signal.SIGINT else "")
