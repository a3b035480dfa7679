"""A flow run from the command line: its server, its table on the terminal, its exit code."""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from prefect.logging import get_run_logger
from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.states import Failed

from rlheals.errors import EXIT_BAD_INPUT, EXIT_INTERNAL, EXIT_OK, UserError
from rlheals.orchestration.console import Board
from rlheals.orchestration.execute import reset_stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect.client.schemas.objects import State

    from rlheals.orchestration.job import Node, ProgressLine, Verdict
    from rlheals.orchestration.schedule import Listener

EXIT_CANCELLED = 130
BAD_INPUT = "BadInput"
"""Name of the final state of a run that could not begin; a stage that failed makes it Failed."""
TERMINAL: ContextVar[Board | None] = ContextVar("TERMINAL", default=None)
"""The table on the terminal of a run from the command line; a deployment has only its log."""


def on_terminal(run: Callable[[], Any]) -> None:
    """Call a flow that returns its state, with a Prefect API and a table on the terminal; exits with the run's code.

    Raises:
        SystemExit: always; see `tell` for the code.
    """
    from flows.server import prefect_api

    with ExitStack() as stack:
        try:
            stack.enter_context(prefect_api())
            board = stack.enter_context(Board())
            setup_logging()
            quiet_console()
            TERMINAL.set(board)
            state = run()
        except UserError as error:
            state = bad_input(error)
        except KeyboardInterrupt:
            raise SystemExit(EXIT_CANCELLED) from None
    raise SystemExit(tell(state))


def begin() -> Callable[[str], None]:
    """Prepare this process for a flow run; where to say something.

    A flow calls this instead of doing it, because it travels to Ray workers by value, with all that it names.
    """
    board = TERMINAL.get()
    reset_stop()
    logger = get_run_logger()
    if board is None:
        return logger.info
    quiet_console()

    def say(text: str) -> None:
        logger.info(text)
        board.note(text)

    return say


def run_folder(root: Path) -> Path:
    """Where the logs of this run go."""
    return root / "scratch" / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


class RunLog:
    """The scheduler's events as lines in the flow run's log."""

    def __init__(self) -> None:
        self._logger = get_run_logger()

    def started(self, name: str, gpus: tuple[str, ...], log: str) -> None:
        """A stage was started."""
        self._logger.info("%s started%s; log: %s", name, f" on GPU {','.join(gpus)}" if gpus else "", log)

    def settled(self, name: str, verdict: Verdict, seconds: float, message: str) -> None:
        """A stage has a verdict."""
        took = f" after {seconds:.1f} s" if seconds else ""
        level = logging.INFO if verdict.good and not message else logging.WARNING
        self._logger.log(level, "%s %s%s%s", name, verdict.value, took, f": {message}" if message else "")

    def tick(self, progress: dict[str, ProgressLine]) -> None:
        """Progress is shown by the task runs' artifacts."""

    def note(self, text: str) -> None:
        """A remark."""
        self._logger.info(text)


def listeners(nodes: list[Node]) -> list[Listener]:
    """Who follows a run: its log, and the terminal where there is one."""
    board = TERMINAL.get()
    if board is None:
        return [RunLog()]
    board.planned(nodes)
    return [RunLog(), board]


def bad_input(error: UserError) -> State[Any]:
    """The final state of a run that could not begin."""
    return Failed(name=BAD_INPUT, message=str(error))


def tell(state: State[Any]) -> int:
    """Print what the run came to and give the exit code."""
    if state.is_completed():
        typer.echo(state.message)
        return EXIT_OK
    if state.is_cancelled():
        typer.echo("cancelled; what had finished is recorded. Run the same command again to go on.", err=True)
        return EXIT_CANCELLED
    typer.echo(f"error: {state.message}", err=True)
    return EXIT_BAD_INPUT if state.name == BAD_INPUT else EXIT_INTERNAL


def quiet_console() -> None:
    """Leave the terminal to the table: Prefect's log goes to its server, the stages' to their files."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(lambda record: not _is_prefects(record))


def _is_prefects(record: logging.LogRecord) -> bool:
    """Whether a line went to one of Prefect's loggers, some of which are known only by where they are called."""
    return record.name.startswith("prefect") or "prefect" in Path(record.pathname).parts
