from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.orchestration.execute import clear_outputs, execute, read_progress, reset_stop, stop_all
from rlheals.orchestration.job import Job, JobResult, ProgressLine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
# A child, a grandchild, one in a session of its own and deaf to SIGTERM, and an orphaned daemon.
FAMILY = """sleep 300 & setsid sh -c 'trap "" TERM; sleep 300; sleep 300' & (setsid sleep 300 &) ; wait"""
MEMBERS = 5


@pytest.fixture(autouse=True)
def _let_jobs_run() -> Iterator[None]:
    reset_stop()
    yield
    reset_stop()


@dataclass
class Run:
    """A job and what its callbacks were told."""

    job: Job
    lines: list[str] = field(default_factory=list)
    progress: list[ProgressLine] = field(default_factory=list)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.job = replace(self.job, environment={"TEST_MARK": self.mark, **self.job.environment})

    def __call__(self, stop: threading.Event | None = None, **callbacks: Any) -> JobResult:
        given = {"on_line": self.lines.append, "on_progress": self.progress.append, **callbacks}
        return execute(self.job, stop=stop, **given)

    @property
    def log(self) -> str:
        return Path(self.job.log).read_text()

    def alive(self) -> list[int]:
        return alive(self.mark)


def alive(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def run(tmp_path: Path, *scripts: str, **settings: Any) -> Run:
    log = str(tmp_path / "logs" / "train@a.log")
    defaults = {"name": "train@a", "environment": {}, "outputs": (), "cwd": str(tmp_path), "log": log}
    commands = tuple(("sh", "-c", script) for script in scripts)
    return Run(Job(commands=commands, **{**defaults, **settings}))


def python(code: str) -> str:
    return f"{sys.executable} - <<'END'\n{code}\nEND"


def test_output_goes_to_the_log_and_the_callback(tmp_path: Path) -> None:
    job = run(tmp_path, "echo one; echo two >&2; echo; printf three")
    result = job()
    assert (result.returncode, result.timed_out, result.stopped, result.last_line) == (0, False, False, "three")
    assert 0 < result.seconds < 10
    assert job.lines == ["one", "two", "", "three"]
    assert job.log == "$ sh -c 'echo one; echo two >&2; echo; printf three'\none\ntwo\n\nthree\n"


def test_commands_run_in_turn_up_to_the_first_that_fails(tmp_path: Path) -> None:
    job = run(tmp_path, "echo one", "echo two; exit 3", "echo never")
    result = job()
    assert (result.returncode, result.last_line) == (3, "two")
    assert job.lines == ["one", "two"]


def test_a_second_attempt_appends_to_the_log_and_starts_progress_anew(tmp_path: Path) -> None:
    job = run(tmp_path, "echo again; test -s logs/train@a.progress.jsonl; echo $?; echo x >&$RLHEALS_PROGRESS_FD")
    job()
    job()
    assert job.lines == ["again", "1"] * 2
    assert job.log.count("$ sh -c") == job.log.count("again\n") == 2


def test_signal_is_a_negative_return_code(tmp_path: Path) -> None:
    assert run(tmp_path, "kill -KILL $$")().returncode == -signal.SIGKILL


def test_program_that_does_not_exist_is_told_in_its_last_line(tmp_path: Path) -> None:
    job = run(tmp_path, "true", launcher=("no-such-launcher", "-n1"))
    result = job()
    assert result.returncode == 127
    assert result.last_line == "no-such-launcher cannot be started: No such file or directory."


def test_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("RLHEALS_PROGRESS_FILE", "of some other job")
    job = run(tmp_path, 'echo $INHERITED $CUDA_VISIBLE_DEVICES "$RLHEALS_PROGRESS_FILE" $(pwd -P)')
    job.job = job.job.on_gpus(("2", "3"))
    job()
    assert job.lines == [f"yes 2,3  {tmp_path.resolve()}"]


def test_folder_that_this_machine_lacks_is_refused(tmp_path: Path) -> None:
    job = run(tmp_path, "true", cwd=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"train@a: its working directory .*elsewhere does not exist on .*share"):
        job()
    assert not Path(job.job.log).parent.exists()


def test_lines_of_a_progress_bar_and_of_other_systems(tmp_path: Path) -> None:
    job = run(tmp_path, r"printf '10%%\r20%%\rdone\r\nwindows\r'; sleep 0.1; printf '\nlast'")
    job()
    assert job.lines == ["10%", "20%", "done", "windows", "last"]


def test_characters_are_not_torn_where_the_output_pauses(tmp_path: Path) -> None:
    job = run(tmp_path, r"printf 'h\303'; sleep 0.2; printf '\266he\n'")
    job()
    assert job.lines == ["höhe"]


def test_binary_output(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 2000)
    job = run(tmp_path, "cat noise; echo; echo end")
    result = job()
    assert (result.returncode, result.last_line) == (0, "end")
    assert "�" in job.lines[0]
    assert not any("\0" in line for line in job.lines)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    job = run(tmp_path, "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo end")
    assert job().last_line == "end"
    assert max(map(len, job.lines)) < 100_000
    assert sum(map(len, job.lines)) == 3_000_003


def test_a_flood_of_output_is_passed_on_whole(tmp_path: Path) -> None:
    job = run(tmp_path, "seq 1 400000; seq 1 400000 >&2")
    began = time.monotonic()
    result = job()
    assert (result.returncode, result.last_line, len(job.lines)) == (0, "400000", 800_000)
    assert job.lines[:400_000] == job.lines[400_000:]
    assert time.monotonic() - began < 60


def test_standard_input_is_empty(tmp_path: Path) -> None:
    job = run(tmp_path, "cat; echo end")
    job()
    assert job.lines == ["end"]


@pytest.mark.parametrize("script", ["sleep 300", "yes", "trap '' TERM; while :; do sleep 0.1; done", FAMILY])
@pytest.mark.fault
def test_time_limit(tmp_path: Path, script: str) -> None:
    job = run(tmp_path, script, "echo never", timeout=0.7)
    result = job()
    assert result.timed_out
    assert not result.stopped
    assert result.returncode != 0
    assert 0.7 <= result.seconds < 60
    assert job.alive() == []
    assert "never" not in job.lines
    assert "train@a stopped at its time limit of 0.7 s" in job.lines
    assert "train@a stopped at its time limit of 0.7 s\n" in job.log
    assert "stopped" not in result.last_line


def test_time_limit_holds_while_a_callback_hangs(tmp_path: Path) -> None:
    job, released = run(tmp_path, "echo one; sleep 300", timeout=0.7), threading.Event()
    with ThreadPoolExecutor() as pool:
        future = pool.submit(job, on_line=lambda _: released.wait())
        until(lambda: len(job.alive()) > 1)
        until(lambda: not job.alive())
        released.set()
        assert future.result(10).timed_out


def test_time_limit_is_for_all_commands_together(tmp_path: Path) -> None:
    result = run(tmp_path, "sleep 0.4", "sleep 300", timeout=0.8)()
    assert result.timed_out
    assert result.seconds < 60


def test_a_command_that_ends_well_when_stopped_has_not_succeeded(tmp_path: Path) -> None:
    job = run(tmp_path, "trap 'exit 0' TERM; sleep 300 & wait", "echo never", timeout=0.5)
    result = job()
    assert (result.timed_out, result.returncode) == (True, -signal.SIGTERM)
    assert "never" not in job.lines


@pytest.mark.fault
def test_stop_event(tmp_path: Path) -> None:
    stop = threading.Event()
    job = run(tmp_path, FAMILY)
    with ThreadPoolExecutor() as pool:
        future = pool.submit(job, stop)
        until(lambda: len(job.alive()) > MEMBERS)
        began = time.monotonic()
        stop.set()
        result = future.result(10)
    assert time.monotonic() - began < 60
    assert (result.stopped, result.timed_out) == (True, False)
    assert result.returncode != 0
    assert job.alive() == []
    assert run(tmp_path, "echo never")(stop).stopped


@pytest.mark.fault
def test_stop_all_ends_every_job_and_keeps_new_ones_from_starting(tmp_path: Path) -> None:
    jobs = [run(tmp_path / str(index), FAMILY) for index in range(3)]
    for index in range(3):
        (tmp_path / str(index)).mkdir()
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(job) for job in jobs]
        until(lambda: all(len(job.alive()) > MEMBERS for job in jobs))
        began = time.monotonic()
        assert stop_all()
        assert time.monotonic() - began < 60
        assert [job.alive() for job in jobs] == [[]] * 3
        assert all(future.result(10).stopped for future in futures)
    job = run(tmp_path, "echo never")
    assert job() == JobResult(-signal.SIGTERM, 0.0, stopped=True)
    reset_stop()
    assert job().returncode == 0


def test_stop_all_does_not_wait_for_a_callback_that_hangs(tmp_path: Path) -> None:
    job, released = run(tmp_path, "echo one; echo two; sleep 300"), threading.Event()
    with ThreadPoolExecutor() as pool:
        future = pool.submit(job, on_line=lambda _: released.wait())
        until(lambda: len(job.alive()) > 1)
        time.sleep(0.2)
        assert stop_all()
        assert job.alive() == []
        released.set()
        assert future.result(10).stopped


def test_stop_all_from_a_signal_handler_of_the_thread_that_runs_the_job(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: stop_all())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        result = run(tmp_path, "sleep 300")()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert result.stopped
    assert result.seconds < 2.5


def test_a_slow_callback_does_not_delay_the_end(tmp_path: Path) -> None:
    result = run(tmp_path, "yes", timeout=0.5)(on_line=lambda _: time.sleep(0.05))
    assert result.timed_out
    assert result.seconds < 2.5


@pytest.mark.fault
@pytest.mark.parametrize("error", [RuntimeError("callback"), KeyboardInterrupt()])
def test_a_callback_that_raises_ends_the_job(tmp_path: Path, error: BaseException) -> None:
    job = run(tmp_path, f"echo one; {FAMILY}")

    def fail(_: str) -> None:
        raise error

    with pytest.raises(type(error)):
        job(on_line=fail)
    assert job.alive() == []


@pytest.mark.fault
def test_full_disk_is_told_and_ends_the_job(tmp_path: Path) -> None:
    job = run(tmp_path, "sleep 300")
    Path(job.job.log).parent.mkdir()
    Path(job.job.log).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"train@a\.log could not be written because the disk is full"):
        job()
    assert job.alive() == []


DRIVER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from rlheals.orchestration.execute import execute
from rlheals.orchestration.job import Job

jobs = [Job(**record) for record in json.loads(sys.stdin.read())]
with ThreadPoolExecutor(len(jobs)) as pool:
    for job in jobs:
        pool.submit(execute, job, on_line=print, on_progress=print)
"""


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_jobs_whose_driver_is_killed(tmp_path: Path, number: int) -> None:
    mark = uuid.uuid4().hex
    jobs = [run(tmp_path, FAMILY, name=name, log=str(tmp_path / f"{name}.log"), environment={}) for name in "abc"]
    records = json.dumps([asdict(replace(job.job, environment={"TEST_MARK": mark})) for job in jobs])
    with subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, stdin=subprocess.PIPE, text=True) as driver:
        assert driver.stdin
        driver.stdin.write(records)
        driver.stdin.close()
        until(lambda: len(alive(mark)) >= 3 * (MEMBERS + 1))
        driver.send_signal(number)
        driver.wait()
    until(lambda: not alive(mark))


def test_nothing_leaks(tmp_path: Path) -> None:
    job = run(tmp_path, "true")
    job()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
    for _ in range(5):
        job()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before  # noqa: PTH208


REPORT = """
import time
from rlheals.progress import Progress
progress = Progress("sft", 3)
for loss in range(3):
    time.sleep(0.8)
    progress.update(note=f"loss {loss}")
"""


@pytest.mark.parametrize("launcher", [(), ("env", "LAUNCHED=1")])
def test_progress_of_a_stage(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    job = run(tmp_path, python(REPORT), launcher=launcher, environment={"PYTHONPATH": str(ROOT)})
    assert job().returncode == 0, job.lines
    # At most one a second, the last one always.
    assert 2 <= len(job.progress) <= 4
    assert [line.done for line in job.progress] == sorted({line.done for line in job.progress})
    assert job.progress[-1] == ProgressLine("sft", 3, 3, "step", "loss 2", 0.0)
    assert read_progress(job.job.progress) == job.progress[-1]
    assert job.progress[-1].fraction == 1.0


def test_descriptor_of_the_protocol_is_left_alone_once_it_is_another_file(tmp_path: Path) -> None:
    inner = "from rlheals.progress import Progress; Progress('x', 1).update()"
    job = run(
        tmp_path,
        f'eval "exec $RLHEALS_PROGRESS_FD>mine.db"; {sys.executable} -c "{inner}"',
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert job().returncode == 0, job.lines
    assert (tmp_path / "mine.db").read_text() == ""
    assert job.progress == []


LINE = b'{"label": "a", "done": 1, "total": 2, "unit": "step", "note": "", "eta": null}'


@pytest.mark.parametrize(
    ("content", "done"),
    [
        (b"", None),
        (LINE, None),
        (LINE + b"\n", 1),
        (LINE + b"\n" + LINE.replace(b'"done": 1', b'"done": 2') + b"\n", 2),
        (LINE + b'\n{"label": "a", "do', 1),
        (LINE + b'\nWarning: something\n[1, 2]\nnull\n"text"\n{}\n\xff\xfe\n\n', 1),
        (b'{"label": "a", "done": 4, "total": 2, "extra": []}\n', 4),
        (b"x" * 10_000_000 + b"\n" + LINE + b"\n", 1),
        (LINE.replace(b"1", b"true") + b"\n", None),
        (LINE.replace(b"1", b"-1") + b"\n", None),
        (LINE.replace(b"1", b"1.5") + b"\n", None),
        (LINE.replace(b"null", b"NaN") + b"\n", None),
        (LINE.replace(b"null", b"-1") + b"\n", None),
        (LINE.replace(b'"a"', b"7") + b"\n", None),
        (b"[" * 5000 + b"\n", None),
    ],
)
def test_read_progress_takes_the_newest_valid_line(tmp_path: Path, content: bytes, done: int | None) -> None:
    path = tmp_path / "a.progress.jsonl"
    path.write_bytes(content)
    newest = read_progress(path)
    assert (newest and newest.done) == done


def test_read_progress_without_a_file(tmp_path: Path) -> None:
    assert read_progress(tmp_path / "none") is None
    assert read_progress(tmp_path) is None


@given(st.binary(max_size=200), st.integers(0, len(LINE)))
def test_read_progress_never_raises(tmp_path_factory: pytest.TempPathFactory, noise: bytes, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(LINE + b"\n" + noise.replace(b"{", b"") + b"\n" + LINE[:cut])
    newest = read_progress(path)
    assert newest is not None
    assert newest.done == 1


def test_clear_outputs(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    work = tmp_path / "work"
    (work / "folder" / "deep").mkdir(parents=True)
    (work / "folder" / "deep" / "file").touch(0o444)
    (work / "folder" / "link").symlink_to(outside)
    (work / "file").touch()
    (work / "kept").touch()
    (work / "linked").symlink_to(outside)
    (work / "dangling").symlink_to("nowhere")
    names = ("folder", "file", "linked", "dangling", "missing")
    job = run(tmp_path, cwd=str(work), outputs=tuple(str(work / name) for name in names)).job
    clear_outputs(job)
    clear_outputs(job)
    assert [path.name for path in work.iterdir()] == ["kept"]
    assert (outside / "precious").exists()


@pytest.mark.parametrize("output", ["", "..", "inner/.."])
def test_an_output_that_holds_the_repository_is_not_cleared(tmp_path: Path, output: str) -> None:
    work = tmp_path / "work"
    (work / "inner").mkdir(parents=True)
    job = run(tmp_path, cwd=str(work), outputs=(str(work / output),)).job
    with pytest.raises(UserError, match="holds the repository"):
        clear_outputs(job)
    assert (work / "inner").exists()
