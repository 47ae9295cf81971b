"""The command line: a dataclass is the only place where an option is declared, and an error is one line.

Each field of the dataclass is an option; the comment behind it in the source is its help.
"""
import argparse
import dataclasses
import difflib
import inspect
import os
import re
import signal
import sys
import time
import types
import typing

from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. The message names the thing, its value and the remedy; it is printed alone, exit 2."""


def parse(config_class, description, argv=None):
    """A config_class from the command line. Types come from the annotations: bool gives --x / --no-x, list[str] takes
    several values. An unknown option is refused with the nearest known one.  Raises UserError."""
    comments = dict(re.findall(r"^\s+(\w+):.*?#\s*(.+)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        flag, help_text = "--" + field.name.replace("_", "-"), comments.get(field.name, "").replace("%", "%%")
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        help_text += f" (default: {default})" if default not in (None, "", []) else ""
        kind = field.type
        if isinstance(kind, types.UnionType):                         # int | None
            kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help_text)
        elif typing.get_origin(kind) is list:
            parser.add_argument(flag, nargs="+", type=typing.get_args(kind)[0], default=default, help=help_text)
        elif field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="?", type=kind, default=default, help=help_text)
        else:
            parser.add_argument(flag, type=kind, default=default, help=help_text)
    try:
        known, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help lists the options") from error
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], options, 1, 0.5)
        raise UserError(f"unknown option {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else "; --help lists the options"))
    return config_class(**vars(known))


def run(main, config_class, description, argv=None):
    """The body of every `if __name__ == "__main__"`: parse, run, turn a UserError into one line and exit status 2."""
    try:
        main(parse(config_class, description, argv))
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno != 28:      # ENOSPC
            raise
        sys.exit(fail(f"no space left on the device ({error.filename or 'while writing'}); free some and run the same command again"))


def fail(message):
    """Print one line to stderr, once for all processes that torchrun started: it ends the others as soon as one has ended, so each
    waits as many seconds as its rank, and speaks if it is still there: nobody before it had anything to say.
    Returns: the exit status, 2."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)        # torchrun's; a handler of training's would let the wait go on
        time.sleep(min(rank, 10))
    said_by = f" (process {rank})" if rank else ""
    tqdm.write(f"error{said_by}: {' '.join(str(message).split())}", file=sys.stderr)     # keeps clear of a progress bar
    return 2


def choose(option, value, table):
    """table[value], or value itself if table is a tuple; an unknown value is a UserError that suggests the nearest."""
    if value not in table:
        near = difflib.get_close_matches(str(value), table, 1, 0.4)
        raise UserError(f"{option} {value}: not one of {', '.join(table)}" + (f"; did you mean {near[0]}?" if near else ""))
    return value if isinstance(table, tuple) else table[value]
