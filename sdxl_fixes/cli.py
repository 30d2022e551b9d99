"""The ``sdxl-fixes`` command."""

from __future__ import annotations

import io
import os
import sys

from sdxl_fixes.command_line import Parser
from sdxl_fixes.commands import buckets, demo, doctor, inspect, samples, schedule, stamp, uis
from sdxl_fixes.errors import FixError, plain, printable
from sdxl_fixes.version import __version__

CLOSED_PIPE = 141  # as the shell says of a program that SIGPIPE ended


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status. Wrong input is one sentence on standard error and status 2,
    no command the help and status 2."""
    _open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console without the letters of some file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # None: it was closed
                sys.stdout.flush()  # here, not where Python ends and an error is no longer ours
    except OSError as error:  # Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read it has read enough
            return CLOSED_PIPE
        print(f"sdxl-fixes: standard output: {plain(error)}", file=sys.stderr)
        return 2


def _open_standard_streams() -> None:
    """Where a standard stream is closed, the next file to be opened takes its number, and gets what a library
    says there: keep the number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="sdxl-fixes", description="One noise schedule for SDXL training.")
    parser.add_argument("--version", action="version", version=f"sdxl-fixes {__version__}")
    commands = parser.add_subparsers(dest="command")
    for command in (demo, schedule, doctor, stamp, inspect, samples, buckets, uis):
        command.add_command(commands)
    return parser


def _run(argv: list[str] | None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(args.run(args))
    except BrokenPipeError:
        raise
    except (ValueError, OSError, FixError) as error:
        said = plain(error) if isinstance(error, OSError) else str(error)
        print(f"sdxl-fixes {args.command}: {printable(said)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
