"""The options of train.py, and the recipe that they make: checked, so that pieces which do not fit
are refused before anything runs."""
import dataclasses
import os
import shlex
from dataclasses import dataclass

import losses
import reflow
from pairs import FROM_IMAGES, SOURCES, cache_windows
from runtime import cli
from runtime.cli import UserError
from runtime.plan import OPTIMIZERS
from runtime.progress import check_reports
from teacher import DTYPES, PRECISIONS

# ---- the options, a class for each group of --help; the comment behind a field is its help -----------------


@dataclass
class Model:
    """the teacher"""
    model: str = "tiny"              # teacher: a preset (tiny, tiny-sd3, pixel, sd15, sd21, sdxl, sd3,
                                     # sd35, sd35-medium, flux, flux-schnell, zimage, dit, pixart,
                                     # pixart-sigma, sana), a diffusers folder, a hub id or .safetensors
    model_config: str = ""           # for a .safetensors file: a diffusers folder with its configuration;
                                     # default, of SD and SDXL alone: from the hub
    init: str = ""                   # folder of a student of this teacher, to go on from instead of the
                                     # teacher itself
    random_init: bool = False        # random weights in the teacher's architecture: measures everything but
                                     # quality, downloads nothing
    guidance_teacher: float = 1.0    # guidance the pairs are made with; 1 = none, as in ProReflow;
                                     # w puts w into the student; of FLUX.1-dev it is the network's
                                     # input, where 1 means its own 3.5
    guidance_range: list[float] | None = None  # LOW HIGH: instead, a guidance for each trajectory, uniform
                                     # between them; the student is then called at 1 (FLUX.1-dev's: at
                                     # any of it)
    null_text: str = "auto"          # null embedding: empty (the encoded ""), zeros, or auto (what the
                                     # model's own pipeline does)


@dataclass
class Named:
    recipe: str = "default"          # a row of reflow.RECIPES; the options from --windows to --reuse
                                     # override its columns
    windows: list[int] | None = None  # windows of each stage, e.g. 8 4 2 1


RECIPE_COLUMNS = tuple(field.name for field in dataclasses.fields(reflow.Recipe)
                       if field.name not in ("stages", "shares"))

Method = dataclasses.make_dataclass("Method", [
    (field.name, field.type | None,
     dataclasses.field(default=None, metadata=dict(help=cli.comments(reflow.Recipe)[field.name])))
    for field in dataclasses.fields(reflow.Recipe) if field.name in RECIPE_COLUMNS], bases=(Named,),
    namespace=dict(__doc__="a row of reflow.RECIPES, and what overrides its columns"))


@dataclass
class Data:
    """what it learns from"""
    data: str = ""                   # images with captions: folder, shards, datasets name, scenes (tiny's)
                                     # or scenes-by-group (pixel's)
    prompts: str = ""                # text file, one prompt per line, instead of --data: no images needed
    size: int | None = None          # pixels, square; default: what the model was made for
    image_column: str = ""           # of a datasets source; default: its first column of images
    caption_column: str = ""         # of a datasets source or metadata file; default: text, caption,
                                     # captions, prompt or txt
    caption: str = ""                # of images of --data that have none of their own; default: refuse them
    min_size: int = 0                # pixels of an image's shorter side, or it is refused; 0: any is enlarged
    skip_bad: bool = False           # leave out images that cannot be used, and say how many, instead of
                                     # refusing the data
    text_dropout: float = 0.1        # share of captions replaced by the null embedding, so that guidance
                                     # works at sampling
    trajectories: int = 6144         # how many to cache, at most one per pair; each costs solver_steps
                                     # evaluations
    cache: str = ""                  # teacher trajectories and latents, shared by runs; default OUT/cache
    cache_only: bool = False         # make the caches of this run and stop, to share them with other runs
    cache_latents: bool = False      # for pairs from images: encode every image and caption once, before
                                     # training


@dataclass
class Training:
    """the optimizer and its budget"""
    updates: int = 3000              # optimizer steps over all stages
    batch: int = 64                  # samples per update, over all processes and micro-batches
    lr: float = 2e-4                 # peak, per stage; warm-up and cosine decay to a tenth
    ema: float = dataclasses.field(default=0.999, metadata=dict(off=0.0))  # decay of the running average,
                                     # which is what is kept; 0 or --no-ema: none, and the weights
                                     # themselves are kept
    optimizer: str = "adamw"         # or muon, which learns faster (with --lr 1e-3) and keeps half as much;
                                     # or adamw8bit: bitsandbytes', a quarter of the memory of its moments
    lora: int = 0                    # rank of LoRA adapters on one shared network; 0 = train every weight
    seed: int = 0                    # of data, noise, times and random weights
    resume: bool = True              # go on from what OUT holds; --no-resume refuses an OUT that holds a run


@dataclass
class Memory:
    """memory, speed and devices"""
    precision: str = "fp32"          # bf16 or fp16: autocast; what is trained stays fp32, what LoRA leaves
                                     # frozen is kept so; fp16 (cards before bf16) with its loss scaled
    ema_device: str = ""             # cpu: the running average in main memory; default: the device's
    micro_batch: int | None = None   # samples per forward on one process; gradients accumulate;
                                     # default: all of its share
    gradient_checkpointing: bool = False  # a forward more per update, for much less memory
    shard: bool = False              # FSDP2: weights, gradients and optimizer state spread over the processes
    compile: bool = False            # torch.compile the network: minutes at first, then faster on GPUs
    device: str = ""                 # cpu, cuda, mps (Apple) or xpu (Intel); default: cuda if there is one


@dataclass
class Output:
    """what it leaves"""
    out: str = "runs/train"          # students, checkpoints and log go here
    name: str = ""                   # what tables call this method; default: the recipe's name
    export: list[str] | None = None  # files beside each student: kohya (its LoRA) and single-file, for
                                     # ComfyUI and web UIs; the diffusers folder is always there
    export_dtype: str = "fp16"       # of these files: fp16, bf16 or fp32
    keep: int = 2                    # checkpoints kept
    checkpoint_steps: int = 200      # updates between checkpoints
    log_steps: int = 20              # updates between lines of OUT/log.jsonl and points of OUT/tensorboard
    grid_steps: int = 500            # updates between pictures in OUT/grids, beside the teacher's, the first
                                     # of them before any update; 0 = none
    validation_prompts: str = ""     # text file, one prompt per line: what these pictures show; default: four
                                     # captions of the data
    report_to: list[str] | None = None  # wandb or trackio, beside OUT/tensorboard, which is always there
    push_to_hub: str = ""            # USER/NAME on the Hugging Face hub: where the last student goes
    config: str = ""                 # a file of these options, .yaml or .json: OUT/config.yaml or config.json
                                     # of another run, or a student's reflow.json; the command line wins


@dataclass
class Config(Output, Memory, Training, Data, Method, Model):
    """Every option of train.py. Its fields come in the order of the groups, the teacher first."""
    FIRST = ("model", "prompts", "data", "recipe", "updates", "batch", "lr", "lora", "precision", "out")


NULL_TEXTS = ("auto", "empty", "zeros")


def resolve_recipe(c):
    """The recipe of a Config, overrides applied and checked.  Raises UserError."""
    recipe = cli.choose("--recipe", c.recipe, reflow.RECIPES)
    if c.windows is not None:
        recipe = dataclasses.replace(recipe, stages=tuple(c.windows),
                                     shares=recipe.shares[-len(c.windows):] if
                                     len(c.windows) <= len(recipe.shares) else (1,) * len(c.windows))
    overrides = {name: getattr(c, name) for name in RECIPE_COLUMNS}
    recipe = dataclasses.replace(recipe,
                                 **{name: value for name, value in overrides.items() if value is not None})
    tables = {"pairs": SOURCES, "path": reflow.PATHS, "space": reflow.SPACES,
              "direction_space": reflow.SPACES, "loss": losses.LOSSES,
              "time_law": reflow.TIME_LAWS, "normalization": losses.NORMALIZATIONS}
    for name, table in tables.items():
        cli.choose(f"--{name.replace('_', '-')}", getattr(recipe, name), table)
    cli.choose("--precision", c.precision, PRECISIONS)
    cli.choose("--optimizer", c.optimizer, OPTIMIZERS)
    cli.choose("--ema-device", c.ema_device or "cpu", ("cpu",))
    cli.choose("--export-dtype", c.export_dtype, DTYPES)
    cli.choose("--null-text", c.null_text, NULL_TEXTS)
    try:
        reflow.check_curriculum(recipe.stages)
        reflow.stage_updates(recipe, c.updates)
    except ValueError as error:
        raise UserError(f"--windows / --updates: {error}") from error
    if recipe.solver_steps < 1 or recipe.solver_steps % cache_windows(recipe):
        most, of = cache_windows(recipe), "the number of windows"
        if most > max(recipe.stages):
            of = f"the least that 8 and {', '.join(map(str, recipe.stages))} windows divide"
        raise UserError(f"--solver-steps {recipe.solver_steps}: must be a multiple of {most}, {of}, so that "
                        "the teacher stops at every boundary")
    cli.at_least(c, trajectories=1, batch=1, micro_batch=1, checkpoint_steps=1, log_steps=1, grid_steps=0,
                 keep=1, lora=0, size=1, min_size=0, guidance_teacher=0, text_dropout=0)
    cli.at_least(recipe, direction_weight=0, reuse=1, projection=0, matching=0)
    for name, value, good, range_ in (
            ("lr", c.lr, c.lr > 0, "above 0"), ("ema", c.ema, 0 <= c.ema < 1, "in [0, 1)"),
            ("text_dropout", c.text_dropout, c.text_dropout <= 1, "in [0, 1]"),
            ("high_pass_weight", recipe.high_pass_weight, recipe.high_pass_weight > -1,
             "above -1, or the loss is blind to some frequencies"),
            ("high_pass_radius", recipe.high_pass_radius, 0 <= recipe.high_pass_radius <= 1, "in [0, 1]"),
            ("starts_share", recipe.starts_share, 0 <= recipe.starts_share <= 1, "in [0, 1]"),
            ("time_base", recipe.time_base, 0 < recipe.time_base != 1,
             "above 0 and not 1; --time-law uniform is what it tends to at 1"),
            ("forward_rate", recipe.forward_rate, 0 <= recipe.forward_rate <= 1, "in [0, 1]"),
            ("projection", recipe.projection, recipe.projection <= 1, "in [0, 1]"),
            ("dropout", recipe.dropout, 0 <= recipe.dropout < 1, "in [0, 1)")):
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {range_}")
    if c.guidance_range is not None:
        between = " ".join(f"{value:g}" for value in c.guidance_range)
        if len(c.guidance_range) != 2 or not 1 <= c.guidance_range[0] < c.guidance_range[1] < float("inf"):
            raise UserError(f"--guidance-range {between}: must be two numbers, LOW below HIGH and neither "
                            "below 1; for one strength use --guidance-teacher")
        if c.guidance_teacher != 1:
            raise UserError(f"--guidance-range {between}: does not go with --guidance-teacher "
                            f"{c.guidance_teacher:g}; leave one of them out")
    check_pieces(c, recipe)
    check_reports(c)
    for option, value, module, name in (("lora", c.lora, "peft", "lora"),
                                        ("optimizer", c.optimizer * (c.optimizer == "adamw8bit"),
                                         "bitsandbytes", "memory"),
                                        ("projection", recipe.projection, "ot", "studies")):
        if value:                                          # now, not after the caches are made
            cli.extra(f"--{option} {value}", module, name)
    return recipe


def check_pieces(c, recipe):
    """Raises UserError where two pieces of a recipe do not go together, or one is given that the
    others never read."""
    for name, value in (("forward_rate", recipe.forward_rate), ("projection", recipe.projection)):
        option = f"--{name.replace('_', '-')} {value}"
        if value and recipe.pairs != "trajectory":
            raise UserError(f"{option}: changes whole trajectories; use --pairs trajectory, or set it to 0 "
                            f"with --pairs {recipe.pairs}")
        if value and c.prompts:
            raise UserError(f"{option}: needs images, and --prompts {c.prompts} holds none; give --data, or "
                            "set it to 0")
    if recipe.projection and recipe.stages != (1,):
        raise UserError(f"--projection {recipe.projection}: moves the two ends of whole trajectories; use "
                        "--windows 1, or set it to 0")
    if recipe.pairs in losses.TARGETS:
        right = dict(path="vp", reuse=1)
        if recipe.pairs == "consistency":                  # whose pairs run straight to the data
            right["stages"] = (1,)
        for column, value in right.items():
            if getattr(recipe, column) != value:
                option = {"stages": "windows"}.get(column, column)
                shown, remedy = (str(each).strip("(,)").replace(",", "")
                                 for each in (getattr(recipe, column), value))
                raise UserError(f"--{option} {shown}: does not go with pairs from {recipe.pairs}, each of "
                                f"which begins where its student is evaluated; use --{option} {remedy}, or "
                                "other --pairs")
    if recipe.matching and recipe.pairs == "student":
        raise UserError(f"--matching {recipe.matching:g}: is done against the teacher, whose place the "
                        "student takes with pairs from student; use --pairs trajectory, or set it to 0")
    if recipe.matching and c.guidance_range is not None:
        raise UserError(f"--matching {recipe.matching:g}: needs one teacher, and --guidance-range makes "
                        "many; use --guidance-teacher, or set it to 0")
    if recipe.pairs == "imitation" and c.cache_only:
        raise UserError("--cache-only: pairs from imitation are made while training, of nothing that is "
                        "kept; leave it out")
    if recipe.pairs == "flow-map" and c.precision != "fp32":
        raise UserError(f"--precision {c.precision}: does not go with pairs from flow-map, whose targets are "
                        "differences of answers so close that its rounding is larger; use --precision fp32")
    for option, value in (("precision", "fp16"), ("ema_device", "cpu"), ("optimizer", "adamw8bit"),
                          ("optimizer", "muon")):
        if c.shard and getattr(c, option) == value:
            raise UserError(f"--{option.replace('_', '-')} {value}: does not go with --shard, which spreads "
                            "the state over the processes; leave out one of them")
    for option, read, owner in (("ema_device", c.ema > 0, "--ema above 0"),
                                ("time_base", recipe.time_law == "exponential", "--time-law exponential"),
                                ("starts_share", recipe.time_law == "starts", "--time-law starts"),
                                ("high_pass_weight", recipe.loss == "high-pass", "--loss high-pass"),
                                ("high_pass_radius", recipe.loss == "high-pass", "--loss high-pass"),
                                ("direction_space", recipe.direction_weight > 0,
                                 "--direction-weight above 0"),
                                ("cache_latents", recipe.pairs in FROM_IMAGES, "pairs from images")):
        if getattr(c, option) != getattr(Config, option) and not read:
            raise UserError(f"--{option.replace('_', '-')}: only goes with {owner}; leave it out")


def fit_prediction(c, recipe, prediction):
    """The recipe for a teacher of this prediction type: one that predicts x is compared in x, where
    the recipe compares what contains eps. In u, one sample of 64 held 22% of the gradient (median;
    up to 89%), with times kept above the schedule's floor 20% (66%), in x 3%.
    Raises UserError where another space was given on the command line."""
    if prediction != "sample":
        return recipe
    for option in ("space", "direction_space"):
        given = getattr(c, option)
        if given not in (None, "x", "end"):
            raise UserError(f"--{option.replace('_', '-')} {given}: this teacher predicts x, whose errors "
                            "have no bound there as t goes to 0; leave it out (x), or give end")
    return dataclasses.replace(recipe, **{option: "x" for option in ("space", "direction_space")
                                          if getattr(recipe, option) != "end"})


def command(c, world=1):
    """The command line that gives this Config: every option that is not its default. world: processes,
    which torchrun starts, LOCAL_WORLD_SIZE of them on each machine."""
    given = (cli.arguments(key, value) for key, value in dataclasses.asdict(c).items()
             if value != getattr(Config, key))
    local, start = int(os.environ.get("LOCAL_WORLD_SIZE", world)), ["python"]
    if world > 1:
        start = ["torchrun", *[f"--nnodes={world // local}"] * (world > local), f"--nproc_per_node={local}"]
    return shlex.join([*start, "train.py", *(word for words in given for word in words)])
