"""What a run leaves: complete diffusers pipelines, weight differences, LoRA files, ONNX.

    python export.py kohya runs/x/student-4 lora.safetensors              # its LoRA, for ComfyUI and web UIs
    python export.py single-file runs/x/student-4 student.safetensors     # all of it in one file, likewise
    python export.py checkpoint --checkpoint runs/x/checkpoint-000400.safetensors --out student
    python export.py delta --student runs/x/student-4 --base sd15 --out delta.safetensors
    python export.py merge --delta delta.safetensors --model dreamshaper/ --out merged
    python export.py onnx assets/student-2 student-onnx                   # its networks without torch
    python export.py push runs/x/student-4 USER/NAME --dry-run            # what would go to the hub

A checkpoint becomes a pipeline before its run is over; a difference (student minus base) is merged
into another model of the same architecture.
"""
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import huggingface_hub
import torch
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import models
import teacher
from models import configs, load, saved
from runtime import cli, store
from runtime.cli import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for


def versions():
    """The commit of this code ('+' if more than results has changed since, 'unknown' outside a git
    checkout) and its libraries'."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # installed, this file may lie inside somebody else's checkout
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True,
                       check=True)
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True,
                              check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!results"],
                                 capture_output=True).returncode
        commit = head + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return dict(commit=commit, versions=dict(torch=torch.__version__, diffusers=diffusers.__version__))


# ---- a student as a pipeline -------------------------------------------------------------------------------


def adapters(weights):
    """The adapter "student" among a network's weights, as its state_dict names them.
    Returns: layer -> (A, B); {} without one."""
    return {name.split(".lora_A.")[0]: (value, weights[name.replace(".lora_A.", ".lora_B.")])
            for name, value in weights.items() if ".lora_A.student." in name}


def merge_lora(weights, layers):
    """Add B A to every adapted layer, linear or convolution, in place. Scale 1: our alpha is the
    rank.
    weights: name -> fp32 tensor; layers: from adapters().  Returns: weights."""
    for layer, (down, up) in layers.items():
        weight = weights[f"{layer}.weight"]
        weight += (up.flatten(1).float() @ down.flatten(1).float()).view(weight.shape)
    return weights


def exact_steps(scheduler, windows, path):
    """The numbers of steps at which the stock scheduler takes the very steps of sampler.py: for DDIM
    (timestep_spacing "trailing") those that divide the timesteps, as others are rounded to whole
    timesteps; for a flow's all multiples of the windows.
    On path linear only one per window, as in between the student leaves the schedule's curve.
    Returns: list of int, rising; empty for EDM's form, and where windows do not divide the
    timesteps."""
    timesteps = 0 if configs.is_edm(scheduler) else scheduler.config.num_train_timesteps
    steps = [n for n in range(windows, timesteps + 1, windows)
             if timesteps % n == 0 or configs.is_flow(scheduler)]
    return steps if path == "vp" else [n for n in steps if n == windows]


def agreement(scheduler, windows, path):
    """A sentence: at which numbers of steps stock samplers give the pictures of sampler.py."""
    if configs.is_edm(scheduler):
        return ("Only sampler.py samples it: its network is in EDM's form, to which diffusers' DDIM does not "
                "apply, and its windows are even in sigma^(1/7), from the scheduler's sigma_max down to "
                "sigma_min, and then the data.")
    steps, timesteps = exact_steps(scheduler, windows,
                                   path), f"{scheduler.config.num_train_timesteps} timesteps"
    if not steps:
        return f"Only sampler.py stops at its boundaries: {timesteps} do not divide into {windows} windows."
    if path != "vp":
        return (f"Stock samplers agree with sampler.py at exactly {windows} step{'s' * (windows > 1)}: in "
                f"between, the student leaves the noise schedule (path {path}).")
    if configs.is_flow(scheduler):
        return f"Stock samplers agree with sampler.py at every multiple of {windows} steps."
    shown = ", ".join([*map(str, steps[:4]), *["..."] * (len(steps) > 4)])
    return (f"Stock samplers agree with sampler.py at {shown} steps (the multiples of {windows} that divide "
            f"the {timesteps}); other numbers are rounded to whole timesteps.")


OPENED = 'pipe = DiffusionPipeline.from_pretrained("'     # in a card; a push says where

BLOCK = """```python
from diffusers import DiffusionPipeline
{opened}FOLDER"{without})
image = pipe({arguments}).images[0]
```

Both numbers are needed: without them diffusers takes many more steps, with guidance.

"""

CARD = """---
{data}
---
# A reflow student of {windows} window{s}

{block}{picture}Distilled from `{teacher}`; the teacher's license covers these weights.
reflow.json tells the rest. Sample it with `{line}`.
{sentences}

## How it was made

```bash
{command}
```

{cost}
"""
PICTURE = "samples.png"         # beside the card


def cost(info, run):
    """What a student took, in sentences; "" where that is not known: of older ones, and without a run.
    info: the contents of reflow.json; run: the folder of its run, whose log has the time."""
    spent, log = info.get("cost"), run and run / "log.jsonl"
    if not spent or not run:
        return ""
    updates, batch, hours, before = info["updates"], info["config"]["batch"], 0.0, 0
    for _, entry in store.read_log(log) if log.is_file() else ():
        if entry["step"] <= updates:
            hours += (entry["step"] - before) * batch / entry["samples_per_second"] / 3600
            before = entry["step"]
    begun = info["config"].get("init")
    sentences = [f"It began as the student in `{begun}`, whose card has what that took."] if begun else []
    sentences += [f"It took {updates:,} updates of {batch:,} samples: {updates * batch:,} forwards and "
                  "backwards of the student."]
    if spent["evaluations"] is not None:
        matched = info.get("columns", {}).get("matching")
        what, how = (("Its pairs and distribution matching", ", a backward counted as two") if matched else
                     ("Its pairs", " without gradient"))
        sentences.append(f"{what} took {spent['evaluations']:,} network evaluations{how}.")
    if hours:
        sentences.append(f"The updates took {hours:.2g} hours, on {spent['processes']} "
                         f"process{'es' * (spent['processes'] > 1)}: {spent['device']}.")
    return " ".join([*sentences, f"Code: commit {info['commit']}."])


def last_picture(info, run):
    """The newest picture that the run drew of a student while it trained, or None. info, run: as for cost."""
    drawn = sorted((run / "grids").glob("*.png")) if run else []
    return next((file for file in reversed(drawn)
                 if file.stem.isdigit() and int(file.stem) <= info["updates"]), None)


def card(pipeline, info, run=None):
    """The model card of a student, which says how it is sampled. info: the contents of
    reflow.json; run: the folder of its run, None for what comes from no run."""
    windows, path = info["windows"], info["path"]
    module, exact = models.family(pipeline), exact_steps(pipeline.scheduler, windows, path)
    word, call = models.prompts(pipeline), module.stock_call(pipeline, windows) if exact else None
    prompt = {"text": " --prompt PROMPT", "class": " --prompt CLASS", "": ""}[word]
    # diffusers wants to be told of every part that its class expects and the folder does not have
    without = "".join(f", {name}=None" for name, part in pipeline.components.items()
                      if part is None and name not in pipeline._optional_components)
    line = (f"DiffusionPipeline.from_pretrained(folder{without})({call})" if call else
            f"python sampler.py --model FOLDER{prompt} --steps {windows}")
    block = BLOCK.format(opened=OPENED, without=without,
                         arguments=call.replace("prompt", '"a prompt"', 1)) if call else ""
    sentences = [agreement(pipeline.scheduler, windows, path),
                 *module.stock_notes(pipeline, exact, saved.guidance_in(info),
                                     saved.settings(info)["null_text"])]
    picture = f"![Samples, one step per window]({PICTURE})\n\n" * bool(last_picture(info, run))
    parts = dict(data=card_data(pipeline, info).to_yaml(), block=block, picture=picture,
                 s="s" * (windows > 1), line=line, sentences="\n".join(sentences), cost=cost(info, run))
    return CARD.format(**{**info, **parts}).rstrip() + "\n"


# of presets whose folder is not at hand; others say it in their own card
LICENSES = {"sd15": "creativeml-openrail-m", "sd21": "openrail++", "sdxl": "openrail++"}


def card_data(pipeline, info):
    """What the hub reads at the head of a card. A teacher on the hub is base_model; its license is
    the student's, left out where it is not known."""
    source = load.PRESETS.get(info["teacher"], (info["teacher"], ""))[0]
    file, license_ = Path(source) / "README.md", LICENSES.get(info["teacher"])
    if file.is_file():
        license_ = ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    lora, kind = bool(info["config"].get("lora")), "text-to-image"
    if models.prompts(pipeline) != "text":
        kind = "unconditional-image-generation"
    return ModelCardData(base_model=source if not Path(source).exists() else None, license=license_,
                         library_name="diffusers", pipeline_tag=kind,
                         tags=["reflow", "few-step", "distillation", *["lora"] * lora])


def export(folder, trained, info, run):
    """Write a student as a complete diffusers pipeline in fp32, its text encoders as the teacher's files
    have them, with the stock scheduler that samples it (a network in EDM's form keeps its own),
    reflow.json beside it, and a LoRA file if it is one.
    trained: name -> whole CPU tensor, as the network's state_dict names them;
    of a LoRA only the adapters are read: what they sat on may have been rounded to bf16, and they
    are added to the teacher as it is stored. info: the contents of reflow.json (train.describe);
    run: the folder of the run."""
    kinds = [kind for kind in info["config"].get("export") or () if kind != "diffusers"]
    # text encoders that a single file holds are needed, and those that no file has
    needed = saved.settings(info)["random_init"] or "single-file" in kinds and models.file_holds_text(
        saved.load_teacher(info, empty=models.NETWORKS))
    pipeline = saved.load_teacher(info, empty=() if needed else models.TEXT_ENCODERS)
    layers = adapters(trained)
    if layers:
        merge_lora(models.network(pipeline).state_dict(), layers)
    else:
        network = models.network(pipeline)
        learned = dict(network.named_parameters())          # the rest are tables, as SD3's of positions
        tables = {name: value for name, value in network.state_dict().items() if name not in learned}
        network.load_state_dict({**tables, **trained})
    lora = {f"{layer}.lora_{side}.weight": value for layer, pair in layers.items()
            for side, value in zip("AB", pair)}
    for kind in kinds:                                      # first: the folder says that all is there
        write, _, ending = FILES[kind]
        dtype = teacher.DTYPES[info["config"]["export_dtype"]]
        write(folder.with_name(folder.name + ending), pipeline, layers, info, dtype)
    write_pipeline(folder, pipeline, info, lora, run)


def write_pipeline(folder, pipeline, info, lora=None, run=None):
    saved.apply_settings(pipeline, info, written=True)
    pipeline = models.family(pipeline).as_student(pipeline, models.schedule(pipeline)[0])

    def write(part):
        pipeline.save_pretrained(part, safe_serialization=True)
        make_portable(part)
        if lora:
            type(pipeline).save_lora_weights(part, **{f"{models.family(pipeline).NETWORK}_lora_layers": lora})
        source = load.folder_of(info["teacher"])
        for name in ("vocabulary.json", "labels.json"):
            if (source / name).is_file():
                shutil.copy(source / name, part)
        (part / "README.md").write_text(card(pipeline, info, run), encoding="utf-8")
        if picture := last_picture(info, run):
            shutil.copy(picture, part / PICTURE)
        (part / "reflow.json").write_text(json.dumps(info, indent=1))
    folder.parent.mkdir(parents=True, exist_ok=True)
    store.write_atomically(folder, write)


def make_portable(folder):
    """Change what diffusers and transformers 5 have just written in a model's folder so that it tells nothing
    of the machine, transformers 4 reads it too, and diffusers' plain call runs. In place; what is so already
    stays.
    - Configs: without "_name_or_path", where this machine had read them from.
    - Text encoders: CLIPTextModel's tensors begin with "text_model.", as in every published model.
      Since 5.6 transformers may leave that out; older ones then fill the encoder with random
      numbers, in silence.
    - Tokenizers: vocab.json and merges.txt, which transformers 4 wants, beside tokenizer.json.
    - config.json: "dtype" float32. Transformers 5 loads in the dtype named there, diffusers loads
      its networks in float32 whatever the files hold, and two dtypes in one pipeline fail. Weights
      stored in half precision stay as small as they are."""
    for file in (folder / "model_index.json", *folder.rglob("config.json")):
        if not file.is_file():                             # of a network alone
            continue
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)
        if "model_type" in settings:                       # transformers'
            for part in (settings, settings.get("text_config", {})):
                part.pop("torch_dtype", None)
                part["dtype"] = "float32"
        file.write_text(json.dumps(settings, indent=2) + "\n")
        if settings.get("architectures") == ["CLIPTextModel"]:
            weights = load_file(file.parent / "model.safetensors")
            save_file({"text_model." + name.removeprefix("text_model."): value
                       for name, value in weights.items()},
                      file.parent / "model.safetensors", {"format": "pt"})
    for file in folder.rglob("tokenizer.json"):
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        if model["type"] == "BPE":
            (file.parent / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False),
                                                      encoding="utf-8")
            merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
            (file.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]),
                                                      encoding="utf-8")


# ---- files for other tools ---------------------------------------------------------------------------------


def write_file(file, weights, metadata, info, dtype):
    """Tensors in dtype as one safetensors file, with reflow.json's contents in its metadata.
    Raises UserError where dtype cannot hold a value: fp16 ends at 65504."""
    weights = {name: value.to(dtype).contiguous() for name, value in weights.items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{file}: {name} is not finite in {dtype}; write it in bf16 or fp32")
    metadata = {**metadata, "format": "pt", "info": json.dumps(info)}
    store.write_atomically(file, lambda part: save_file(weights, part, metadata))


def write_kohya(file, pipeline, layers, info, dtype):
    """A LoRA under kohya's names, which ComfyUI and the web UIs match with the layers of theirs.
    layers: from adapters()."""
    if not layers:
        raise UserError(f"{file}: a kohya file holds a LoRA, and this student was trained in every weight "
                        "(no --lora); write it as single-file")
    name = models.other_tools(pipeline, "kohya_layers")(models.network(pipeline))
    weights = convert_state_dict_to_kohya({f"unet.{name(layer)}.lora_{side}.weight": value for layer, pair
                                           in layers.items() for side, value in zip("AB", pair)})
    rank = str(len(next(iter(layers.values()))[0]))
    metadata = dict(ss_network_module="networks.lora", ss_network_dim=rank, ss_network_alpha=rank)
    write_file(file, weights, metadata, info, dtype)


def write_single_file(file, pipeline, layers, info, dtype):
    """A whole pipeline in the layout of the original code, or a transformer without the rest. layers:
    not needed, they are merged."""
    weights, metadata = models.other_tools(pipeline, "single_file")(pipeline)
    write_file(file, weights, metadata, info, dtype)


# what a run leaves beside each folder: how it is written, what its family must know, the name's ending
FILES = {"kohya": (write_kohya, "kohya_layers", "-lora.safetensors"),
         "single-file": (write_single_file, "single_file", ".safetensors")}


def check_files(c, pipeline):
    """Raises UserError, before anything is trained, for files that this run could not leave.
    c: train.Config."""
    for kind in c.export or ():
        if cli.choose("--export", kind, ("diffusers", *FILES)) == "diffusers":
            continue
        if kind == "kohya" and not c.lora:
            raise UserError("--export kohya: a LoRA; train one with --lora RANK, or take single-file")
        given = models.network(pipeline) if kind == "kohya" else pipeline
        try:
            models.other_tools(pipeline, FILES[kind][1])(given)
        except UserError as error:
            raise UserError(f"--export {kind}: {error}") from error


def trained_weights(folder, lora):
    """What the student in `folder` was trained in, under the names the trainer gives it: name ->
    tensor.  Raises UserError."""
    if not lora:
        return only_network(str(folder)).state_dict()
    _, layers = open_safetensors("the student's", folder / LORA_FILE)
    rename = {"lora_A.weight": "lora_A.student.weight", "lora_B.weight": "lora_B.student.weight"}
    # the network's name stands before: unet. or transformer.
    return {name.partition(".")[2][:-13] + rename[name[-13:]]: value
            for name, value in layers.items()}


# ---- commands ----------------------------------------------------------------------------------------------


def free_folder(option, name):
    """A Path that nothing occupies yet, in a folder that is there.  Raises UserError."""
    if not name:
        raise UserError(f"{option}: name a folder to write")
    folder = Path(name)
    if folder.exists():
        raise UserError(f"{option} {folder}: exists already; choose another")
    store.make_folder(option, folder.parent)
    store.check_writable(folder.parent)
    return folder


def free_file(option, name):
    """A Path of a .safetensors file that is not there yet.  Raises UserError."""
    if Path(name).suffix != ".safetensors":
        raise UserError(f"{option} {name or '(missing)'}: name a .safetensors file to write")
    return free_folder(option, name)


def open_safetensors(option, file):
    """The metadata of a safetensors file and its tensors.  Raises UserError."""
    if not Path(file or "?").is_file():
        raise UserError(f"{option} {file}: no such file")
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}
    except SafetensorError as error:
        raise UserError(f"{option} {file}: not a whole safetensors file ({error})") from error


@dataclass
class ExportConfig:
    checkpoint: str = ""             # a checkpoint-*.safetensors of train.py
    out: str = ""                    # folder to write: a complete pipeline


def export_checkpoint(c):
    """The running average of a checkpoint, or where there is none its weights, as a pipeline, complete
    like the one at the end of a stage."""
    folder = free_folder("--out", c.out)
    metadata, tensors = open_safetensors("--checkpoint", c.checkpoint)
    if not {"info", "step"} <= metadata.keys():            # other files of ours tell info, too
        raise UserError(f"--checkpoint {c.checkpoint}: not one of train.py's checkpoints")
    info = json.loads(metadata["info"])
    kind = "ema:" if any(key.startswith("ema:") for key in tensors) else "student:"     # --no-ema
    average = {key.removeprefix(kind): value for key, value in tensors.items() if key.startswith(kind)}
    info["updates"] = int(metadata["step"])
    if info["columns"]["pairs"] != "trajectory" and "cost" in info:
        info["cost"]["evaluations"] = None                 # what is there counts the stage to its end
    export(folder, average, info, Path(c.checkpoint).parent)
    print(f"{folder}: student of {info['windows']} windows after {metadata['step']} updates")


def positional(what):
    return field(default=what, metadata=dict(positional=True))


@dataclass
class FileConfig:
    folder: str = positional("")     # a student's folder
    out: str = positional("")        # .safetensors file to write
    dtype: str = "fp16"              # of its tensors: fp16, bf16 or fp32


def open_student(c, whole=False):
    """whole: for a file that holds the text encoders where its family's do: they are loaded then.
    Raises UserError.  Returns: (file to write, pipeline, adapters, reflow.json, dtype)."""
    dtype, file = cli.choose("--dtype", c.dtype, teacher.DTYPES), free_file("OUT", c.out)
    info, folder = saved.read_info("FOLDER", c.folder), Path(c.folder)
    layers = adapters(trained_weights(folder, lora=True)) if (folder / LORA_FILE).is_file() else {}
    needed = whole and models.file_holds_text(load.load_pipeline(c.folder, empty=models.NETWORKS))
    pipeline = load.load_pipeline(c.folder, empty=() if needed else models.TEXT_ENCODERS)
    return file, pipeline, layers, info, dtype


def export_kohya(c):
    """A student's LoRA in kohya's names, for ComfyUI, Forge and other web UIs."""
    file, _, layers, *_ = opened = open_student(c)
    write_kohya(*opened)
    print(f"{file}: a LoRA on {len(layers)} layers")


def export_single_file(c):
    """A whole student, text encoders and autoencoder included, in one file of the original layout
    (Stable Diffusion 1.x, 2.x, XL), or its transformer alone (SD3, FLUX.1, Z-Image), for ComfyUI, Forge and
    other web UIs."""
    file, *_ = opened = open_student(c, whole=True)
    write_single_file(*opened)
    print(f"{file}: {file.stat().st_size / 1e9:.2f} GB")


@dataclass
class DeltaConfig:
    student: str = ""                # a student's folder
    base: str = ""                   # what to subtract; default: the teacher it was distilled from
    out: str = "delta.safetensors"   # file to write
    dtype: str = "fp32"              # of the difference: fp32, or fp16 at half the size


def export_delta(c):
    """Student minus base, tensor by tensor, as safetensors; its metadata tells how to sample what
    it is merged into. Of a LoRA and its teacher it is what the adapters add, free of rounding;
    tensors without adapter are zero."""
    dtype, file = teacher.DTYPES[cli.choose("--dtype", c.dtype, ("fp32", "fp16"))], free_file("--out", c.out)
    info = saved.read_info("--student", c.student)
    base, folder = c.base or info["teacher"], Path(c.student)
    pipeline = load.load_pipeline(c.student, empty=models.BESIDE)
    student = models.network(pipeline).state_dict()
    if base == info["teacher"] and (folder / LORA_FILE).is_file():
        delta = merge_lora({name: torch.zeros_like(value) for name, value in student.items()},
                           adapters(trained_weights(folder, lora=True)))
    else:
        alone = dict.fromkeys(models.BESIDE)
        other = (models.network(saved.load_teacher(info, **alone)) if base == info["teacher"]
                 else only_network(base)).state_dict()
        check_same_architecture(f"--base {base}", other, f"--student {c.student}", student)
        delta = {name: value - other[name] for name, value in student.items()}
    write_file(file, delta, {}, {**info, **kind(pipeline)}, dtype)
    stored = [value.to(dtype) for value in delta.values()]
    size = sum(value.float().square().sum().item() for value in stored) ** 0.5
    changed = sum(map(torch.any, stored))
    print(f"{c.out}: {c.student} minus {base}, {changed} of {len(delta)} tensors differ, norm {size:.4g}")


@dataclass
class MergeConfig:
    delta: str = ""                  # a file that export.py delta wrote
    model: str = ""                  # what to add it to: a preset, folder, hub id or single file of the same
                                     # architecture
    out: str = ""                    # folder to write: a complete pipeline
    model_config: str = ""           # for a .safetensors file: a diffusers folder with its configuration;
                                     # default, of SD and SDXL alone: from the hub
    scale: float = 1.0               # how much of the difference to add


def merge(c):
    """Another model of the same architecture plus the difference: it samples in as few steps, in
    its own style."""
    folder = free_folder("--out", c.out)
    metadata, delta = open_safetensors("--delta", c.delta)
    if "info" not in metadata:
        raise UserError(f"--delta {c.delta}: not a difference that export.py delta wrote")
    if not c.model:
        raise UserError("--model: name the model to add the difference to")
    pipeline = load.load_pipeline(c.model, model_config=c.model_config, empty=models.TEXT_ENCODERS)
    weights, info = models.network(pipeline).state_dict(), json.loads(metadata["info"])
    check_same_architecture(f"--model {c.model}", weights, f"--delta {c.delta}", delta)
    for name, value in kind(pipeline).items():
        if info.pop(name, value) != value:
            raise UserError(f"--model {c.model}: its {name} is not that of the student of --delta {c.delta}; "
                            "give a model with the same scheduler configuration")
    for name, value in weights.items():
        value += c.scale * delta[name].float()
    options = {**info["config"], "model": c.model, "model_config": c.model_config, "random_init": False,
               "lora": 0}
    write_pipeline(folder, pipeline, {**info, "teacher": c.model, "config": options,
                                      "delta": dict(file=c.delta, scale=c.scale, student_of=info["teacher"])})
    print(f"{folder}: {c.model} with {c.scale:g} x {c.delta}. "
          f"{agreement(pipeline.scheduler, info['windows'], info['path'])}")


@dataclass
class OnnxConfig:
    model: str = positional("")      # a student's folder, or a teacher: preset or folder
    out: str = positional("")        # folder to write


def export_onnx(c):
    """A model's networks as ONNX, for runtimes without torch, a browser's among them: unet.onnx,
    text_encoder.onnx, decoder.onnx, each compared with torch before it counts, and model.json, what
    a sampler must know besides. Stable Diffusion 1.x and 2.x, in fp32."""
    if not c.model:
        raise UserError("MODEL: name a student's folder or a teacher")
    folder = free_folder("OUT", c.out)
    runtime, _ = (cli.extra("export.py onnx", name, "onnx") for name in ("onnxruntime", "onnx"))
    pipeline, model, info = saved.open_model(c.model)
    if not isinstance(model.schedule, teacher.Schedule):
        raise UserError(f"MODEL {c.model}: its noise schedule is no table of alphas, which model.json holds")
    shape, cond = models.latent_shape(pipeline), models.encode_text(pipeline, [""])
    inputs = dict(z=torch.zeros(1, *shape), timestep=model.schedule.timestep(torch.ones(1)), **cond)
    parts = {models.family(pipeline).NETWORK: (models.network(pipeline), model.network, inputs),
             **models.other_tools(pipeline, "onnx_parts")(pipeline)}
    tokenizer, length = pipeline.tokenizer, parts["text_encoder"][2]["input_ids"].shape[1]
    tokens = dict(length=length, start=tokenizer.bos_token, end=tokenizer.eos_token, pad=tokenizer.pad_token,
                  unknown=tokenizer.unk_token)
    about = dict(windows=model.windows, path=info.get("path", "vp"), prediction=model.prediction,
                 alpha=model.schedule.alpha.tolist(), latents=shape, tokens=tokens, **versions())

    def write(part):
        part.mkdir()
        for name, (network, call, example) in parts.items():
            error = write_onnx(part / f"{name}.onnx", network, call, example, runtime)
            print(f"{name}.onnx: within {error:.1e} of torch")
        tokenizer.save_pretrained(part / "tokenizer")
        make_portable(part)
        source = load.folder_of(c.model)
        for name in ("README.md", "vocabulary.json"):          # the card has the license of the weights
            if (source / name).is_file():
                shutil.copy(source / name, part)
        (part / "model.json").write_text(json.dumps(about))
    store.write_atomically(folder, write)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.glob('*.onnx')) / 1e6:.0f} MB")


ONNX_LIMIT = 2 ** 31 - 2 ** 20  # bytes of one file, less what is not weights
ONNX_TOLERANCE = 1e-4           # of an output, as a share of its largest number


def write_onnx(file, network, call, example, runtime):
    """One network as ONNX, its output called "output", and the comparison with torch at a batch of
    two random inputs.
    call: of the inputs, in the order of `example`, name -> tensor (1, ...).  Returns: the largest
    difference, as a share of the largest number of the output.  Raises UserError if that is too large."""
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    if size > ONNX_LIMIT:
        raise UserError(f"{file.name}: {size / 1e9:.1f} GB of weights, and one ONNX file holds 2; convert "
                        "the student's folder with the optimum library, which splits it")

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, *values):
            return call(**dict(zip(example, values)))
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(2, *value.shape[1:], generator=generator) if value.is_floating_point() else
              torch.randint(2, (2, *value.shape[1:]), generator=generator) for name, value in example.items()}
    traced = Traced().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")        # on constants of a trace; what is wrong shows below
        # dynamo=True traces the same graph in twenty times the time
        torch.onnx.export(traced, tuple(inputs.values()), str(file), input_names=list(inputs),
                          output_names=["output"], dynamic_axes={name: {0: "batch"} for name in
                                                                 (*inputs, "output")}, dynamo=False)
        expected = traced(*inputs.values())
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found, = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    error = ((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()).item()
    if not error <= ONNX_TOLERANCE:
        raise UserError(f"{file.name}: {error:.1e} from torch's output, more than {ONNX_TOLERANCE:g}; "
                        "nothing is written")
    return error


# ---- to the hub --------------------------------------------------------------------------------------------


@dataclass
class PushConfig:
    folder: str = positional("")     # a student's folder
    repo: str = positional("")       # USER/NAME on the Hugging Face hub; made if it is not there
    private: bool = False            # make it private
    dry_run: bool = False            # list what would go, and send nothing


def check_repo(option, repo, send=True):
    """Raises UserError unless a student could go there. send: False asks for no log-in."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{option} {repo}: no name of a repository ({error}); give USER/NAME") from error
    if "/" not in repo:
        raise UserError(f"{option} {repo or '(missing)'}: whose? Give USER/NAME")
    if send and not huggingface_hub.get_token():
        raise UserError(f"{option} {repo}: not logged in to the hub; run hf auth login, or set HF_TOKEN")


MEASURED = "\n## Measured\n"


def measured(folder, windows):
    """The section of a card with what eval.py measured of this student, from results.json of its run;
    "" where that is not there or does not have it.  Raises UserError."""
    folder = folder.absolute()
    file = folder.parent / "results.json"
    result = configs.read_json(file) if file.is_file() else dict(rows=[], protocol={})
    if not {"rows", "protocol"} <= result.keys():
        raise UserError(f"{file}: not what eval.py writes, as it has no rows; measure again, or move it away")
    # without a run: of the run that was measured alone, not of one among several; of this folder, as others
    # of as many windows may lie beside it
    own = [row for row in result["rows"] if row.get("windows") == windows and not row.get("run")
           and row.get("student", f"student-{windows}") == folder.name]
    rows = [row for row in result["rows"] if row.get("windows") is None] + own
    if not own:
        return ""
    about = result["protocol"]
    name, key = about.get("distance", "FD"), "fd_corrected" if "fd_corrected" in own[0] else "fd"
    lines = [f"| | steps | evaluations | {name} (95%) | CLIP score |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["fd_interval"]
        kind = "this student" if row in own else row["method"] if row["method"] == "teacher" else \
            f"teacher, {row['method']}"
        lines.append(f"| {kind} | {row['steps']} | {row['nfe']} | {row[key]:.2f} ({low:.2f} to {high:.2f}) | "
                     f"{row['clip']:.1f} |")
    lines += ["", f"{name}: on {about['features']}; N = {about['n']} against {about['real']} real images; "
                  f"guidance {about['guidance']:g}. Commit {about['commit']}."]
    return MEASURED + "\n" + "\n".join(lines) + "\n"


def push(c):
    """A student's folder to the Hugging Face hub, its card with the repository's name and with what
    eval.py has measured since. What else stands in the card stays as it is, changes by hand among it."""
    info, folder = saved.read_info("FOLDER", c.folder), Path(c.folder)
    check_repo("USER/NAME", c.repo, not c.dry_run)
    card, figures = folder / "README.md", measured(folder, info["windows"])
    if not card.is_file():
        raise UserError(f"{card}: is missing, and the hub shows it; write one, or export the student anew")
    if not c.dry_run:
        text = re.sub(re.escape(OPENED) + '[^"]*', lambda _: OPENED + c.repo,
                      card.read_text(encoding="utf-8"))
        if figures:
            text, _, old = text.partition(MEASURED)
            text += figures + old[old.find("\n## "):] * ("\n## " in old)
        store.write_atomically(card, lambda part: part.write_text(text, encoding="utf-8"))
    files = sorted(file for file in folder.rglob("*") if file.is_file()
                   and not any(part.startswith(".") for part in file.relative_to(folder).parts))
    for file in files:
        print(f"{file.stat().st_size / 1e6:12.3f} MB  {file.relative_to(folder).as_posix()}")
    size = f"{sum(file.stat().st_size for file in files) / 1e6:.3f} MB in {len(files)} files"
    if not ModelCard.load(card, ignore_metadata_errors=True).data.get("license"):
        print(f"{card}: names no license; add the teacher's at its head, as `license: NAME`")
    if c.dry_run:
        print(f"{c.repo}: would get {size}" + ", the card with figures from results.json" * bool(figures))
        return
    try:
        huggingface_hub.create_repo(c.repo, private=c.private or None, exist_ok=True)
        message = f"A reflow student of {info['windows']} window{'s' * (info['windows'] > 1)}"
        huggingface_hub.upload_folder(repo_id=c.repo, folder_path=folder, commit_message=message,
                                      allow_patterns=[file.relative_to(folder).as_posix() for file in files])
    except Exception as error:     # networks fail, and hubs refuse, in more ways than can be listed
        raise UserError(f"USER/NAME {c.repo}: not sent ({type(error).__name__}: {error}); {folder} is whole, "
                        f"try again: python export.py push {folder} {c.repo}") from error
    print(f"https://huggingface.co/{c.repo}: {size}")


def only_network(name):
    return models.network(load.load_pipeline(name, **dict.fromkeys(models.BESIDE)))


def kind(pipeline):
    """What a student and the model that its difference is added to must share besides the architecture: the
    prediction type, and how much noise each time has."""
    schedule, prediction = models.schedule(pipeline)
    if configs.is_flow(pipeline.scheduler):                # one path; its shift may depend on the size
        return dict(prediction=prediction)
    return dict(prediction=prediction, schedule=store.digest(schedule.key))


def check_same_architecture(one, weights, other, others):
    """Raises UserError naming the first tensor in which two networks differ."""
    for name in sorted({*weights, *others}):
        shapes = [tuple(w[name].shape) if name in w else None for w in (weights, others)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{one}: not the architecture of {other} ({name}: {shapes[0] or 'absent'} "
                            f"against {shapes[1] or 'absent'}); give a model of the same family")


COMMANDS = {"kohya": (export_kohya, FileConfig), "single-file": (export_single_file, FileConfig),
            "checkpoint": (export_checkpoint, ExportConfig), "delta": (export_delta, DeltaConfig),
            "merge": (merge, MergeConfig), "onnx": (export_onnx, OnnxConfig), "push": (push, PushConfig)}

def run():
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        command, options = COMMANDS[sys.argv[1]]
        cli.run(command, options, command.__doc__, sys.argv[2:])
    elif sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__)
    else:
        sys.exit(cli.fail(f"export.py {sys.argv[1]}: not one of {', '.join(COMMANDS)}"))


if __name__ == "__main__":
    run()
