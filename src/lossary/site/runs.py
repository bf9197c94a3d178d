"""The queue of runs: profiles, comparisons and claims, each a process of its own (`worker`), a few at a time.

All that is known of a run is a row in SQLite and a folder, so a server that is killed and started again goes on with
what is in the queue: a comparison from its last finished cell, a claim or a profile anew. A run ends with its server.
"""

import asyncio
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from lossary.errors import BadInput

ID = re.compile(r"[0-9a-f]{16}")
TICK = 0.2  # seconds between looks at the processes
COLUMNS = "id, kind, title, status, given, file, created, queued, started, ended, message, pid, born"
OVER = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Limits:
    """What runs may take.

    Attributes:
        upload: bytes of a file.
        memory: bytes that a run's processes hold of their own, all together.
        seconds: of a run.
        waiting: runs in the queue.
        kept: runs in all; those that are over can be deleted.
        at_once: runs side by side. A comparison uses all cores by itself.
    """

    upload: int = 200_000_000
    memory: int = field(default_factory=lambda: psutil.virtual_memory().total // 2)
    seconds: float = 4 * 3600
    waiting: int = 20
    kept: int = 200
    at_once: int = 1


@dataclass(frozen=True)
class Run:
    """One run as the queue knows it.

    Attributes:
        kind: "profile", "compare" or "claim".
        title: for people; may hold anything that a file can be named.
        status: "queued", "running", "done", "failed" or "cancelled".
        given: what the worker is told.
        file: id of the uploaded file that it reads, or "".
        created, queued, started, ended: seconds since 1970; the last two None until then.
        message: why it failed, in a line.
        pid, born: the process and when it started, which together name it for good.
    """

    id: str
    kind: str
    title: str
    status: str
    given: dict[str, Any]
    file: str
    created: float
    queued: float
    started: float | None
    ended: float | None
    message: str
    pid: int | None
    born: float | None

    @property
    def over(self) -> bool:
        return self.status in OVER


class Full(BadInput):
    """As many runs as there may be."""


class Runs:
    """All runs in a folder.

    Args:
        folder: holds the queue, uploads and results, and belongs to one server at a time.
        limits: what runs may take.
        protocol: how much a comparison runs, as `compare.cells.Protocol` takes it; None is the full protocol.
    """

    def __init__(
        self, folder: Path, *, limits: Limits | None = None, protocol: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder).absolute()
        self.limits = limits or Limits()
        self.protocol = None if protocol is None else dict(protocol)
        self.closing = False  # streams of events end when they see it
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._taken: Any = None
        for name in ("runs", "uploads"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.folder / "runs.sqlite", check_same_thread=False, isolation_level=None)
        self._do(f"create table if not exists runs ({COLUMNS}, primary key (id))")

    # The server's life

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """While this is open, runs are run."""
        self.take()
        self._recover()
        self.closing = False
        keeper = threading.Thread(target=self._keep, name="runs")
        keeper.start()
        try:
            yield
        finally:
            self.closing = True
            self._wake.set()
            await asyncio.to_thread(keeper.join)
            self.release()

    def take(self) -> None:
        """Makes the folder this server's.

        Raises:
            BadInput: another server works in it.
        """
        if self._taken is not None:
            return
        file = open(self.folder / "lock", "w")  # noqa: SIM115 (held as long as the server lives)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise BadInput(f"--folder: another server works in {str(self.folder)!r}; stop it or name another") from None
        self._taken = file

    def release(self) -> None:
        """Lets another server have the folder."""
        if self._taken is not None:
            self._taken.close()
            self._taken = None

    # What pages ask for

    def get(self, id: str) -> Run | None:
        """The run with this id."""
        found = self._rows("where id = ?", id)
        return found[0] if found else None

    def all(self) -> list[Run]:
        """Every run, the newest first."""
        return self._rows("order by created desc")

    def of_claim(self, room: str, paper: str, name: str) -> list[Run]:
        """The runs of this claim that were made here, the newest first."""
        asked = {"room": room, "paper": paper, "name": name}
        return [run for run in self._rows("where kind = 'claim' order by created desc") if run.given == asked]

    def place(self, run: Run) -> int:
        """How many runs are before this one in the queue."""
        return len(self._rows("where status = 'running' or (status = 'queued' and queued < ?)", run.queued))

    def path(self, run: Run) -> Path:
        """The run's folder."""
        return self.folder / "runs" / run.id

    def read(self, run: Run, name: str) -> dict[str, Any]:
        """One of the JSON files that the worker writes, {} as long as it has not."""
        try:
            found: dict[str, Any] = json.loads((self.path(run) / name).read_text("utf-8"))
        except FileNotFoundError:
            return {}
        return found

    def source(self, run: Run) -> Path | None:
        """The uploaded file that the run reads."""
        return next((self.folder / "uploads" / run.file).iterdir(), None) if run.file else None

    # What pages do

    def add(self, kind: str, title: str, given: Mapping[str, Any], *, file: str = "") -> Run:
        """Puts a run at the end of the queue.

        Raises:
            Full: there are as many as there may be.
        """
        with self._lock:
            self.check_room()
            now, id = time.time(), secrets.token_hex(8)
            row = (id, kind, title, "queued", json.dumps(dict(given)), file, now, now, None, None, "", None, None)
            self._do(f"insert into runs ({COLUMNS}) values ({', '.join('?' * len(row))})", *row)
        self._wake.set()
        return self._rows("where id = ?", id)[0]

    def check_room(self) -> None:
        """
        Raises:
            Full: there are as many runs as there may be.
        """
        self._check_waiting()
        if (kept := len(self._rows())) >= self.limits.kept:
            raise Full(f"{kept} runs are kept, and no more may be; delete some that you no longer need")

    def _check_waiting(self) -> None:
        waiting = len(self._rows("where status = 'queued'"))
        if waiting >= self.limits.waiting:
            raise Full(f"{waiting} runs are waiting, and no more may; cancel one or come back later")

    def upload(self, file: BinaryIO, name: str) -> Run:
        """Keeps the file and puts its profile into the queue.

        Raises:
            Full: there are as many runs as there may be.
        """
        self.check_room()
        id, shown = secrets.token_hex(8), shown_name(name)
        path = self.folder / "uploads" / id / safe_name(name)
        with self._lock:  # lest it be cleared away as nobody's
            path.parent.mkdir()
            try:
                with open(path, "xb") as kept:
                    shutil.copyfileobj(file, kept, 2**20)
                return self.add("profile", shown, {"name": shown}, file=id)
            except BaseException:
                shutil.rmtree(path.parent)
                raise

    def cancel(self, id: str) -> None:
        """Ends the run, with all of its processes, or takes it out of the queue."""
        self._over(id, "cancelled", "", "queued", "running")
        self._wake.set()

    def again(self, id: str) -> None:
        """Puts a run that failed or was cancelled back into the queue; a comparison goes on where it stopped.

        Raises:
            Full: there are as many as there may be in the queue.
        """
        with self._lock:
            self._check_waiting()
            self._do(
                "update runs set status = 'queued', queued = ?, started = null, ended = null, message = '' "
                "where id = ? and status in ('failed', 'cancelled')",
                time.time(), id,
            )  # fmt: skip
        self._wake.set()

    def delete(self, id: str) -> None:
        """Ends the run and removes all that it wrote, and its file if no other run reads it."""
        with self._lock:
            self._do("delete from runs where id = ?", id)
            self._clear()
        self._wake.set()

    # The processes

    def _keep(self) -> None:
        while not self.closing:
            self._watch()
            with self._lock:
                waiting = self._rows("where status = 'queued' order by queued")
                for run in waiting[: self.limits.at_once - len(self._processes)]:
                    try:
                        self._start(run)
                    except OSError as error:  # a full disk, most likely
                        self._over(run.id, "failed", f"It could not be started: {error.strerror}.", "queued")
            self._wake.wait(TICK if self._processes else None)
            self._wake.clear()
        for id, process in self._processes.items():
            _end(process)
            self._do("update runs set status = 'queued' where id = ? and status = 'running'", id)
        self._processes.clear()

    def _start(self, run: Run) -> None:
        folder = self.path(run)
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        for name in ("progress.json", "outcome.json"):
            (folder / name).unlink(missing_ok=True)
        source = self.source(run)
        given = {
            **run.given,
            "kind": run.kind,
            "source": run.given.get("bundled") if source is None else str(source),
            "memory": self.limits.memory,
            "protocol": self.protocol,
        }
        (folder / "given.json").write_text(json.dumps(given), "utf-8")
        places = {"TMPDIR": str(folder / "tmp"), "JOBLIB_TEMP_FOLDER": str(folder / "tmp")}
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lossary.site.worker", str(folder)],
                stdin=subprocess.PIPE,  # whose end tells the worker that the server is gone
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, **places, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self._processes[run.id] = process
        self._do(
            "update runs set status = 'running', started = ?, pid = ?, born = ? where id = ?",
            time.time(), process.pid, _born(process.pid), run.id,
        )  # fmt: skip

    def _watch(self) -> None:
        """Ends what was cancelled or takes too much, and notes what is over."""
        for id, process in list(self._processes.items()):
            run = self.get(id)
            ended = process.poll() is not None
            if run is not None and run.status == "running":
                if ended:
                    self._note(run, process.returncode)
                elif time.time() - (run.started or 0) > self.limits.seconds:
                    self._over(id, "failed", f"It was stopped after {_hours(self.limits.seconds)}, which is the limit.")
                elif _memory(process.pid) > self.limits.memory:
                    self._over(id, "failed", too_much_memory(self.limits.memory))
                else:
                    continue
            _end(process)
            with self._lock:
                del self._processes[id]
                shutil.rmtree(self.folder / "runs" / id / "tmp", ignore_errors=True)
                self._clear()

    def _note(self, run: Run, code: int) -> None:
        outcome = self.read(run, "outcome.json")
        if "refused" in outcome:
            self._over(run.id, "failed", outcome["refused"])
        elif code == 0 and outcome:
            self._over(run.id, "done", "")
        else:
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            self._over(run.id, "failed", f"It ended unexpectedly ({why}); its log is runs/{run.id}/log.txt.")

    def _over(self, id: str, status: str, message: str, *before: str) -> None:
        before = before or ("running",)
        self._do(
            "update runs set status = ?, message = ?, ended = ? "
            f"where id = ? and status in ({', '.join('?' * len(before))})",
            status, message, time.time(), id, *before,
        )  # fmt: skip

    def _recover(self) -> None:
        """Ends what an earlier server left behind, and puts it back into the queue."""
        for run in self._rows("where pid is not null and status = 'running'"):
            if run.pid is not None and _born(run.pid) == run.born:
                with suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
        self._do("update runs set status = 'queued', pid = null where status = 'running'")
        self._clear()

    def _clear(self) -> None:
        """Removes the folders that belong to no run."""
        runs = self._rows()
        known = {"runs": {*self._processes, *(run.id for run in runs)}, "uploads": {run.file for run in runs}}
        for name, ids in known.items():
            for path in (self.folder / name).iterdir():
                if path.name not in ids:
                    shutil.rmtree(path, ignore_errors=True)

    # The rows

    def _do(self, statement: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    def _rows(self, which: str = "", *values: Any) -> list[Run]:
        found = self._do(f"select {COLUMNS} from runs {which}", *values)
        return [Run(*row[:4], json.loads(row[4]), *row[5:]) for row in found]


def shown_name(name: str) -> str:
    """A file's name as pages show it: without folders and control characters, of at most 100 characters."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(c for c in last if c.isprintable())[:100].strip() or "data"


def safe_name(name: str) -> str:
    """A name made of the letters, digits, dots and dashes of what a visitor called a file, ending as that does."""
    stem, dot, ending = shown_name(name).rpartition(".")
    if not dot or not re.fullmatch(r"[A-Za-z0-9]{1,8}", ending):
        stem, ending = shown_name(name), "csv"
    return (re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:60] or "data") + "." + ending.lower()


def too_much_memory(limit: int) -> str:
    return f"It took more memory than a run may ({limit / 1e9:.2g} GB); give it fewer rows or columns."


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2g} h" if seconds >= 3600 else f"{seconds:.3g} s"


def _born(pid: int) -> float | None:
    """When a process started, None if there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.Error:
        return []


def _memory(pid: int) -> int:
    """Bytes that a process and its children hold, what they share with others aside."""
    held = 0
    for process in _family(pid):
        with suppress(psutil.Error):
            found = process.memory_info()
            held += found.rss - getattr(found, "shared", 0)
    return held


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a worker with all that it started; nothing is lost, as whatever it finished is committed."""
    family = _family(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in family:
        with suppress(psutil.Error):
            each.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=5)
    if process.stdin:
        process.stdin.close()
