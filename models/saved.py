"""Students on disk: reflow.json beside a pipeline, and the options of its run that decide what the
model means."""
import json
from pathlib import Path

import torch

import models
import reflow
import teacher
from models import configs, load
from runtime.cli import UserError

# The options of a run (train.Config) that decide what its teacher and its students mean, besides windows and
# path, and what they are where reflow.json does not say. They are read here alone.
SETTINGS = dict(random_init=False, seed=0, model_config="", size=None, null_text="auto",
                guidance_teacher=1.0, guidance_range=None)


def settings(info):
    """These options of a student's run. info: its reflow.json, or {}.  Returns: dict with the keys
    of SETTINGS."""
    return {key: info.get("config", {}).get(key, default) for key, default in SETTINGS.items()}


def learned_guidance(info):
    """The guidance a student has learned: [w], [low, high], or [] for none. info: as for settings."""
    learned = settings(info)["guidance_range"] or [settings(info)["guidance_teacher"]]
    return learned if learned != [1] else []


def teacher_guidance(pipeline, info, guidance):
    """What the teacher is called at beside a student that is called at `guidance`: the same, or what the
    student has learned. pipeline: the teacher's; info: as for settings.  Returns: a number, 1 where guidance
    is an input of the network."""
    about = settings(info)
    return (models.embed_guidance(pipeline, about["guidance_teacher"], about["guidance_range"])
            if learned_guidance(info) else guidance)


def guidance_in(info):
    """The same in words, "" for none."""
    return " to ".join(f"{value:g}" for value in learned_guidance(info))


USEFUL_GUIDANCE = 2                # the most for a student without guidance in it: the table of docs/use.md


def doubts(name, info, prompts, steps, guidance):
    """Why a model's pictures may be worse than they need be, for its user to read: list of str.
    name: as for open_model; info: as for settings; guidance: classifier-free."""
    found, windows, learned = [], info.get("windows", 1), guidance_in(info)
    if steps > windows and steps % windows:                # fewer cannot cross them at all
        low = steps // windows * windows
        found.append(f"{steps} steps: {name} has {windows} windows, and some get a step more than others; "
                     f"use {low} or {low + windows}")
    if learned and guidance not in (0, 1):
        found.append(f"guidance {guidance:g}: guidance {learned} is in {name} already, and this comes on top "
                     "of it; use 1")
    elif info and guidance > USEFUL_GUIDANCE:
        found.append(f"guidance {guidance:g}: {name} has learned none, and so much burns its pictures; "
                     f"use 1, or up to {USEFUL_GUIDANCE}")
    vocabulary = load.folder_of(name) / "vocabulary.json"
    if vocabulary.is_file():
        known = set(configs.read_json(vocabulary, list))
        unknown = sorted({word for prompt in prompts for word in prompt.lower().split()} - known)
        if unknown:
            found.append(f"this model has never seen: {', '.join(unknown)}. It knows: "
                         f"{' '.join(sorted(known))}")
    return found


def load_teacher(info, **how):
    """The teacher of a student as its run opened it, but in fp32. info: the student's reflow.json;
    how: more for load_pipeline."""
    opened = {key: settings(info)[key] for key in ("random_init", "seed", "model_config")}
    return load.load_pipeline(info["teacher"], **opened, **how)


def apply_settings(pipeline, info, written=False):
    """Make the size, the null embedding and an embedded guidance of a run its pipeline's own: what
    samples it reads them there. info: reflow.json or {};
    written: leave out what diffusers' own pipeline would not read back (the null embedding of SD
    1.x and 2.x)."""
    size, null = settings(info)["size"], settings(info)["null_text"]
    if size:
        models.set_native_size(pipeline, size)
    models.embed_guidance(pipeline, settings(info)["guidance_teacher"], settings(info)["guidance_range"])
    if null != "auto" and ("force_zeros_for_empty_prompt" in pipeline.config or not written):
        pipeline.register_to_config(force_zeros_for_empty_prompt=null == "zeros")


def read_info(option, folder):
    """reflow.json of a student's folder.  Raises UserError."""
    if not (Path(folder or "?") / "reflow.json").is_file():
        raise UserError(f"{option} {folder}: no student there (reflow.json is missing)")
    return read_about(folder, "teacher", "windows", "path")


def check_start(c, recipe):
    """Raises UserError unless --init is a student that training can go on from: of this teacher, opened in
    the same way, and path, with the same adapters or none."""
    info = read_info("--init", c.init)
    here = dict(model=c.model, path=recipe.path, lora=c.lora)
    there = dict(model=info["teacher"], path=info["path"], lora=info.get("config", {}).get("lora", 0))
    for name, value in there.items():
        if value != here[name]:
            raise UserError(f"--init {c.init}: its --{name} is {value}, not {here[name]}; give {value}, or "
                            "another student")
    for name in ("random_init", "model_config", *["seed"] * c.random_init):
        if settings(info)[name] != getattr(c, name):       # two teachers of one name
            raise UserError(f"--init {c.init}: its teacher was opened with --{name.replace('_', '-')} "
                            f"{settings(info)[name] or 'not given'}; do the same, or give another student")


def check_inputs(pipeline, other, size):
    """Raises UserError unless both networks can be evaluated at the same latents with the same text.
    size: as for latent_shape."""
    shape, expected = models.latent_shape(other, size), models.latent_shape(pipeline, size)
    if shape != expected:
        raise UserError(f"its latents are {shape}, the model's {expected}; give a model of the same family")
    for part in models.family(pipeline).TEXT_ENCODERS:
        a, b = (getattr(each, part, None) for each in (pipeline, other))
        a, b = (dict(each.named_parameters()) if each is not None else {} for each in (a, b))
        # up to the rounding of a folder stored in half precision
        if a.keys() != b.keys() or not all(a[key].shape == b[key].shape and
                                           torch.allclose(a[key].float(), b[key].float(), 1e-2, 1e-6)
                                           for key in a):
            raise UserError(f"its {part} is not the model's, and both see the same encoding of "
                            "the prompts; give a model of the same family")


def read_about(folder, *needed):
    """The reflow.json of a student's folder, preset or hub id (downloaded), {} where there is none: a
    teacher's.
    Raises UserError if it is broken or lacks one of the needed keys."""
    file = load.folder_of(str(folder)) / "reflow.json"
    if not file.is_file():
        return {}
    try:
        info = json.loads(file.read_text())
        _ = reflow.PATHS[info.get("path", "vp")], int(info.get("windows", 1)), [info[key] for key in needed]
        _ = dict(info.get("config", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # AttributeError: a list, not an object
        raise UserError(f"{file}: broken ({type(error).__name__}: {error}); train the student again or "
                        "restore the file") from error
    return info


def open_model(name, device="cpu", dtype=torch.float32, random_init=False, model_config="", guide="",
               size=None, student=None):
    """A teacher or a student, with the size and null embedding it was trained with.
    name and the rest: as for load.load_pipeline;
    guide: name of a weaker model, which makes the model one of Guided; size: pixels, which becomes
    the pipeline's own; student: reflow.json of a student, whose teacher is opened as its run
    opened it, if that is its name.
    Returns: (pipeline, model, info); info is the folder's reflow.json, {} for a teacher: windows
    and path say how to sample it."""
    if student and student.get("teacher") == name:
        pipeline, info = load_teacher(student, dtype=dtype).to(device), read_about(name)
    else:
        pipeline = load.load_pipeline(name, dtype, random_init, model_config=model_config).to(device)
        info = student = read_about(name)  # only now: of a hub id it has just been downloaded
    apply_settings(pipeline, student)
    if size:
        models.set_native_size(pipeline, size)
    model = models.as_model(pipeline, path=reflow.PATHS[info.get("path", "vp")],
                            windows=int(info.get("windows", 1)))
    if guide:
        try:
            other, weaker, _ = open_model(guide, device, dtype, random_init, size=size, student=student)
            check_inputs(pipeline, other, size)
            model = teacher.guided(model, weaker)
        except UserError as error:
            raise UserError(f"--guide {guide}: {str(error).removeprefix(f'--model {guide}: ')}") from error
    return pipeline, model, info


def students(runs=Path("runs")):
    """Folders of students: those under runs/, the newest first, then the one that comes with the
    repository."""
    found = sorted(runs.glob("**/student-*/reflow.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [*(str(file.parent) for file in found), str(load.ASSETS / "student-2")]
