"""The command line. Everything that takes time to import is imported inside the commands."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import tempfile
from typing import Any

import typer

from decomp_bench.cli import exchange, experiments, listing, machine, making, reporting, training
from decomp_bench.errors import RunFailed, UserError

INTERRUPTED = 130

app = typer.Typer(
    name="decomp-bench",
    help="Train, score and draw sparse decompositions of frozen networks, all under one protocol.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for part in (training, experiments, reporting, exchange, listing, machine, making):
    part.register(app)


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(args=arguments, standalone_mode=False, prog_name="decomp-bench")
        if code == INTERRUPTED:  # the parser turns Ctrl-C into an exit code by itself
            raise KeyboardInterrupt
    except BaseException as error:
        code = _explain(error, arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _explain(error: BaseException, arguments: list[str]) -> int:
    """One line on stderr that names the fix, and the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        _say(f"interrupted; what was saved is kept, continue with: decomp-bench {shlex.join(_without_existing(arguments))}")
        return INTERRUPTED
    if isinstance(error, UserError):
        _say(f"error: {error}")
        return 2
    if isinstance(error, RunFailed):
        _say(f"failed: {error}")
        return 1
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        _say(f"error: no space left on the disk{where}; free some (decomp-bench cache evict, decomp-bench runs rm), then run it again")
        return 1
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the usage errors of the parser
        message = error.format_message()  # type: ignore[attr-defined]
        words = _command(arguments)
        _say(f"error: {message} Try: {' '.join(['decomp-bench', *(words[:-1] if 'No such command' in message else words), '--help'])}")
        return 2
    return _unexpected(error, arguments)


def _unexpected(error: BaseException, arguments: list[str]) -> int:
    import traceback

    text = f"decomp-bench {shlex.join(arguments)}\n{''.join(traceback.format_exception(error))}"
    first = (str(error).strip().splitlines() or ["no message"])[0]
    try:
        with tempfile.NamedTemporaryFile("w", prefix="decomp-bench-", suffix=".log", delete=False) as log:
            log.write(text)
        where = f"; the traceback is in {log.name}"
    except OSError:
        where = ""
    _say(f"error: unexpected {type(error).__name__}: {first}{where}")
    return 1


def _say(message: str) -> None:
    print(" ".join(message.split("\n")), file=sys.stderr, flush=True)


def _command(arguments: list[str]) -> list[str]:
    """The beginning of the arguments that names a command."""
    groups = {group.name for group in app.registered_groups}
    known = groups | {command.name for command in app.registered_commands}
    words = arguments[: 2 if arguments and arguments[0] in groups else 1]
    return [word for word in words if not word.startswith("-")] if words and words[0] in known else []


def _without_existing(arguments: list[str]) -> list[str]:
    """Repeating a command continues its runs, unless it says to begin again."""
    kept, skip = [], False
    for word in arguments:
        if not skip and not word.startswith("--existing"):
            kept.append(word)
        skip = word == "--existing"
    return kept
