"""The command line: a dataclass is the only place where an option is declared, and an error is one
line.

Each field of the dataclass is an option; the comment behind it in the source is its help.
"""
import argparse
import dataclasses
import difflib
import errno
import functools
import importlib
import inspect
import io
import math
import os
import re
import signal
import sys
import time
import types
import typing
from pathlib import Path

import yaml
from tqdm import tqdm

# what training derives from a seed (seed x 1,000,003 + step, times the number of processes) then stays below
# 2^63
MAX_SEED = 2 ** 32 - 1

# our option -> what other trainers and samplers call it
USUAL_NAMES = {
    "optimizer": "use-8bit-adam optimizer-type",
    "model": "pretrained-model-name-or-path pretrained-teacher-model model-path ckpt",
    "base": "pretrained-model-name-or-path",
    "data": "train-data-dir dataset-name instance-data-dir dataset data-dir",
    "size": "resolution height width image-size",
    "out": "output-dir output",
    "steps": "num-inference-steps",
    "updates": "max-train-steps max-steps num-train-epochs epochs steps",
    "batch": "train-batch-size batch-size per-device-train-batch-size",
    "micro-batch": "gradient-accumulation-steps gradient-accumulation",
    "lr": "learning-rate",
    "ema": "use-ema ema-decay",
    "lora": "rank lora-rank network-dim",
    "precision": "mixed-precision dtype",
    "dtype": "mixed-precision precision",
    "guidance": "guidance-scale cfg cfg-scale",
    "guidance-teacher": "guidance-scale guidance cfg",
    "text-dropout": "proportion-empty-prompts",
    "solver": "scheduler sampler",
    "solver-steps": "num-ddim-timesteps",
    "n": "num-images-per-prompt num-images",
    "resume": "resume-from-checkpoint",
    "checkpoint-steps": "checkpointing-steps",
    "keep": "checkpoints-total-limit",
    "validation-prompts": "validation-prompt sample-prompts",
    "grid-steps": "validation-steps validation-epochs",
}

# what others choose and we do not: why it needs no option -> their names
NO_OPTION = {
    "a run logs to OUT/log.jsonl and OUT/tensorboard; leave it out": "logging-dir",
    "each stage warms up and decays to a tenth of --lr; leave it out": "lr-scheduler lr-warmup-steps",
    "gradients are clipped at norm 1; leave it out": "max-grad-norm",
    "attention is PyTorch's own; leave it out": "enable-xformers-memory-efficient-attention xformers",
    "images are read a micro-batch ahead; leave it out": "dataloader-num-workers",
    "torchrun --nproc_per_node=N starts N processes": "num-processes num-gpus",
}


class UserError(Exception):
    """Something the user can fix. The message names the thing, its value and the remedy;
    it is printed alone, exit 2."""


def check_png(file):
    """Raises UserError unless `file` (a PNG) can be written; makes its folder."""
    if file.suffix.lower() != ".png":
        raise UserError(f"--out {file}: must end in .png")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        file.open("ab").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written ({error.strerror}); choose another file") from error


@functools.cache                     # a study parses the options of each of its runs
def comments(config_class):
    """The help of each field of a dataclass: name -> the comment behind it in the source, or what it
    brings along as metadata."""
    found = {field.name: field.metadata["help"] for field in dataclasses.fields(config_class)
             if "help" in field.metadata}
    for part in config_class.__mro__:
        if not inspect.get_annotations(part).keys() <= found.keys():
            lines = re.findall(r"^\s+(\w+):.*?#\s*(.+(?:\n\s+#.+)*)$", inspect.getsource(part), re.M)
            found |= {name: re.sub(r"\n\s+#\s*", " ", text) for name, text in lines}
    return found


def make_parser(config_class, description):
    """The options of a dataclass. Types come from the annotations: bool gives --x / --no-x, list[str]
    takes several values. Of a class with several bases each is a group of --help, the last one first;
    but the options that FIRST names come before them all."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    texts, first, groups = comments(config_class), getattr(config_class, "FIRST", ()), {}
    if first:
        parser.usage = "%(prog)s [options]"                # all of them would fill a screen
        top = parser.add_argument_group(f"most runs need no more than these {len(first)}")
        groups |= dict.fromkeys(first, top)
    for base in reversed(config_class.__bases__) if len(config_class.__bases__) > 1 else ():
        group = parser.add_argument_group(base.__name__.lower(), base.__doc__)
        groups |= {field.name: groups.get(field.name, group) for field in dataclasses.fields(base)}
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for field in (fields[name] for name in dict.fromkeys([*first, *fields])):
        flag, help_text = "--" + field.name.replace("_", "-"), texts.get(field.name, "").replace("%", "%%")
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        help_text += f" (default: {default})" if default not in (None, "", []) else ""
        kind, add = field.type, groups.get(field.name, parser).add_argument
        if isinstance(kind, types.UnionType):                         # int | None
            kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
        if kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, default=default, help=help_text)
        elif typing.get_origin(kind) is list and field.metadata.get("positional"):
            add(field.name, nargs="*", type=typing.get_args(kind)[0], default=default, help=help_text)
        elif typing.get_origin(kind) is list:
            # given again, the last counts, as of every option; unless its values add up
            add(flag, nargs="+", type=typing.get_args(kind)[0], default=default, help=help_text,
                action=field.metadata.get("action", "store"))
        elif field.metadata.get("positional"):
            add(field.name, nargs="?", type=kind, default=default, help=help_text)
        else:
            add(flag, type=kind, default=default, help=help_text)
        if "off" in field.metadata:
            add(f"--no-{field.name}", dest=field.name, action="store_const", const=field.metadata["off"],
                default=argparse.SUPPRESS, help=f"the same as {flag} {field.metadata['off']:g}")
    return parser


def parse_known(parser, argv, source=""):
    """argparse's Namespace of argv. source: for messages, where argv is from.  Raises UserError: an
    unknown option is refused with the nearest known one."""
    try:
        known, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{source}{error}; --help lists the options") from error
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        what = "unknown option" if unknown[0].startswith("-") else "unexpected word"
        raise UserError(f"{source}{what} {unknown[0]!r}; {hint(unknown[0].split('=')[0], options)}")
    return known


def arguments(name, value):
    """The words of the command line that set an option: a list of strings, [] for None."""
    flag, values = name.replace("_", "-"), value if isinstance(value, list) else [value]
    if isinstance(value, bool):
        return [f"--{'no-' * (not value)}{flag}"]
    if value is None or not values:
        return []
    if not isinstance(value, list) and str(value).startswith("-"):     # or it would be taken for an option
        return [f"--{flag}={value}"]
    return [f"--{flag}", *map(str, values)]


def read_options(file):
    """What a file of options says, as words of the command line. Options are named as on the command
    line, with - or _; of a reflow.json only its `config` is read.  Raises UserError."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))   # of which JSON is a part
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file}: cannot be read ({error}); give a .yaml or .json file") from error
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]
    if not isinstance(content, dict):
        raise UserError(f"--config {file}: holds no options; write one per line, such as `updates: 3000`")
    if content.pop("config", ""):
        raise UserError(f"--config {file}: names another file of options; name that one, or copy it in here")
    for name, value in content.items():
        parts = value if isinstance(value, list) else [value]
        if not all(part is None or isinstance(part, (bool, int, float, str)) for part in parts):
            raise UserError(f"--config {file}: {name}: neither text, a number, true or false, nor a list of "
                            "these")
    return [word for name, value in content.items() for word in arguments(str(name), value)]


def parse(config_class, description, argv=None):
    """A config_class from the command line, and from the file of options that its --config names, if
    it has one: the command line wins.  Raises UserError."""
    argv, parser = sys.argv[1:] if argv is None else argv, make_parser(config_class, description)
    known = parse_known(parser, argv)
    if getattr(known, "config", ""):
        given = read_options(known.config)
        parse_known(parser, given, f"--config {known.config}: ")
        known = parse_known(parser, [*given, *argv])
        known.config = ""                                  # its options stand in their own places now
    c = config_class(**vars(known))
    for name, value in vars(c).items():  # whatever the range is, nan would pass: it compares as false
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, float) and not math.isfinite(each):
                raise UserError(f"--{name.replace('_', '-')} {each}: must be a finite number")
            if not is_text(each):
                raise UserError(f"--{name.replace('_', '-')} {each!r}: is not UTF-8; type it in UTF-8")
    if hasattr(c, "seed") and not 0 <= c.seed <= MAX_SEED:
        raise UserError(f"--seed {c.seed}: must be at least 0 and at most {MAX_SEED}")
    return c


def is_text(value):
    """Whether a string can be written: without halves of characters, as which Python keeps bytes that are
    not UTF-8."""
    return not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value)


def extra(option, module, name):
    """A module that only some options need, and pyproject.toml therefore only lists as an extra.
    Raises UserError naming the option and how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{option}: needs {error.name}, which is not installed; in the folder of this "
                        f"project: pip install '.[{name}]'") from error


def hint(option, options):
    """What to say of an unknown option: its name among ours, the nearest one, or where to look."""
    name = option.lstrip("-").replace("_", "-")
    for reason, usual in NO_OPTION.items():
        if name in usual.split():
            return reason
    ours = [f"--{our}" for our, usual in USUAL_NAMES.items() if name in (our, *usual.split())]
    near = [our for our in ours if our in options] or difflib.get_close_matches(option, options, 1, 0.5)
    return f"did you mean {near[0]}?" if near else "--help lists the options"


def at_least(c, **least):
    """Raises UserError unless each of these options that is given is at least so much;
    of a list, every value."""
    for name, low in least.items():
        value = getattr(c, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each < low:
                raise UserError(f"--{name.replace('_', '-')} {each}: must be at least {low}")


def run(main, config_class, description, argv=None):
    """The body of every `if __name__ == "__main__"`: parse, run, turn a UserError into one line and
    exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):           # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(parse(config_class, description, argv))
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            sys.exit(fail(f"{str(error.filename)[:60]}...: no file has so long a name; give another"))
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(fail(f"no space left on the device ({error.filename or 'while writing'}); free some and run "
                      "the same command again"))


def fail(message):
    """Print one line to stderr, once for all processes that torchrun started: it ends the others as
    soon as one has ended, so each waits as many seconds as its rank, and speaks if it is still
    there: nobody before it had anything to say.
    Returns: the exit status, 2."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        # torchrun's; a handler of training's would let the wait go on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(min(rank, 10))
    said_by = f" (process {rank})" if rank else ""
    # keeps clear of a progress bar
    tqdm.write(f"error{said_by}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def choose(option, value, table):
    """table[value], or value itself if table is a tuple; an unknown value is a UserError that
    suggests the nearest."""
    if value not in table:
        near = difflib.get_close_matches(str(value), table, 1, 0.4)
        raise UserError(f"{option} {value}: not one of {', '.join(table)}" +
                        (f"; did you mean {near[0]}?" if near else ""))
    return value if isinstance(table, tuple) else table[value]
