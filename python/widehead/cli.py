"""widehead/cli.py -- the command `widehead`: runs a subcommand, turns errors into one line and an exit code.

Each command is a module of `widehead.commands` with `add_arguments(parser)` and `run(arguments)`. Only the one that was
asked for is imported, so that `--help` need not wait for packages that it does not use.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from ._core import Error, __version__

COMMANDS = {
    "train": "train a classifier on a data file",
    "evaluate": "measure a trained classifier on a data file",
    "predict": "print the best classes of points or lines of text",
    "plan": "memory and time of each head, before anything is built",
    "data": "statistics of a data file, conversion, data sets to begin with",
    "demo": "train the place resolver and ask it",
}

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="widehead",
        description="Output layers for 100 thousand to 100 million classes.",
        epilog="`widehead COMMAND --help` explains a command. Exit codes: 0 done, 1 error, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"widehead {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        child.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == chosen:
            module = importlib.import_module(f".commands.{name}", __package__)
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; `argv` without the program's name. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(next((word for word in words if word in COMMANDS), None))
    arguments = parser.parse_args(words)
    try:
        return int(arguments.run(arguments) or 0)
    except BrokenPipeError:
        # The reader of our output has gone, as in `widehead predict ... | head`: nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("widehead: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (Error, OSError, ValueError, ImportError, MemoryError) as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"widehead {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return " ".join(f"not enough memory {error}".split())
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
