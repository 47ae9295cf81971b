"""The command line: a dataclass is the only place where an option is declared, and an error is one
line.

Each field of the dataclass is an option; the comment behind it in the source is its help.
"""
import argparse
import dataclasses
import difflib
import importlib
import inspect
import math
import os
import re
import signal
import sys
import time
import types
import typing

from tqdm import tqdm

# what training derives from a seed (seed x 1,000,003 + step, times the number of processes) then stays below
# 2^63
MAX_SEED = 2 ** 32 - 1

# our option -> what other trainers and samplers call it
USUAL_NAMES = {
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
    "grid-steps": "validation-steps validation-epochs",
}

# what others choose and we do not: why it needs no option -> their names
NO_OPTION = {
    "a run logs to OUT/log.jsonl and OUT/tensorboard; leave it out": "report-to logging-dir",
    "each stage warms up and decays to a tenth of --lr; leave it out": "lr-scheduler lr-warmup-steps",
    "gradients are clipped at norm 1; leave it out": "max-grad-norm",
    "the optimizer is AdamW; leave it out": "use-8bit-adam optimizer",
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


def parse(config_class, description, argv=None):
    """A config_class from the command line. Types come from the annotations: bool gives --x /
    --no-x, list[str] takes several values. An unknown option is refused with the nearest known one.
    Raises UserError."""
    found = re.findall(r"^\s+(\w+):.*?#\s*(.+(?:\n\s+#.+)*)$", inspect.getsource(config_class), re.M)
    comments = {name: re.sub(r"\n\s+#\s*", " ", text) for name, text in found}
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
        elif typing.get_origin(kind) is list and field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="*", type=typing.get_args(kind)[0], default=default,
                                help=help_text)
        elif typing.get_origin(kind) is list:
            parser.add_argument(flag, nargs="+", type=typing.get_args(kind)[0], default=default,
                                help=help_text)
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
        raise UserError(f"unknown option {unknown[0]!r}; {hint(unknown[0].split('=')[0], options)}")
    c = config_class(**vars(known))
    for name, value in vars(c).items():  # whatever the range is, nan would pass: it compares as false
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, float) and not math.isfinite(each):
                raise UserError(f"--{name.replace('_', '-')} {each}: must be a finite number")
    if hasattr(c, "seed") and not 0 <= c.seed <= MAX_SEED:
        raise UserError(f"--seed {c.seed}: must be at least 0 and at most {MAX_SEED}")
    return c


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
