"""What leaves a run: complete diffusers pipelines, weight differences, LoRA files. Reached through sampler.py:

    python sampler.py export --checkpoint runs/x/checkpoint-000400.safetensors --out student    # a pipeline, before the run is over
    python sampler.py export-delta --student runs/x/student-4 --base sd15 --out delta.safetensors   # student minus base
    python sampler.py merge --delta delta.safetensors --model dreamshaper/ --out merged         # the same difference, on another model
"""
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import config
import data
import teacher
from config import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"             # the name that diffusers' load_lora_weights looks for


def versions():
    """The commit of this code ('+' if more than results has changed since, 'unknown' outside a git checkout) and its libraries'."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!results"], capture_output=True).returncode
        commit = head + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return dict(commit=commit, versions=dict(torch=torch.__version__, diffusers=diffusers.__version__))


# ---- a student as a pipeline ---------------------------------------------------------------------------------------


def split_lora(weights):
    """A network's weights, as its state_dict names them, into those of the plain network and those of its adapter
    "student".  Returns: (plain: name -> tensor, layers: layer -> (A, B)); without adapters, layers is empty."""
    plain, layers = {}, {}
    for name, value in weights.items():
        if ".lora_A.student." in name:
            layer = name.split(".lora_A.")[0]
            layers[layer] = value, weights[name.replace(".lora_A.", ".lora_B.")]
        elif ".lora_" not in name:
            plain[name.replace(".base_layer.", ".")] = value
    return plain, layers


def merge_lora(plain, layers):
    """W + B A of every adapted layer, linear or convolution, in fp32 and back. Scale 1: our alpha is the rank."""
    for layer, (down, up) in layers.items():
        weight = plain[f"{layer}.weight"]
        product = (up.flatten(1).float() @ down.flatten(1).float()).view(weight.shape)
        plain[f"{layer}.weight"] = (weight.float() + product).to(weight.dtype)
    return plain


CARD = """# A reflow student of {windows} window(s)

Distilled from `{teacher}` by `{command}`; the teacher's licence covers these weights. Sample it with
{sampled}, or any multiple of {windows};
reflow.json tells the rest.
"""
SAMPLED = {
    "text": "`DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps={windows}, guidance_scale=1)`",
    "unconditional": "`DiffusionPipeline.from_pretrained(folder)(num_inference_steps={windows})`",
    "classes": "`python sampler.py --model FOLDER --prompt CLASS --steps {windows}` (no pipeline of diffusers hands on a class; its DDIM\n"
               "scheduler, around the UNet with class_labels, gives the same pictures)",
    "edm": "`python sampler.py --model FOLDER --steps {windows}`: the network is in EDM's form, to which diffusers' DDIM does not apply,\n"
           "and the windows are even in sigma^(1/7), from the scheduler's sigma_max down to 0",
}


def sampled(pipeline, windows):
    """How a student is sampled, in the words of its card."""
    kind = ("edm" if teacher.is_edm(pipeline.scheduler) else "text" if not teacher.in_pixels(pipeline) else
            "classes" if teacher.class_names(pipeline) else "unconditional")
    return SAMPLED[kind].format(windows=windows)


def export(folder, weights, unet_config, info):
    """Write a complete diffusers pipeline with a stock DDIM scheduler (a network in EDM's form keeps its own), reflow.json beside
    it, and a LoRA file if the weights have adapters. weights: name -> whole CPU tensor; info: the contents of reflow.json
    (train.describe)."""
    plain, layers = split_lora(weights)
    merge_lora(plain, layers)
    with torch.device("meta"):
        unet = teacher.unet_class(unet_config).from_config(unet_config)
    unet.load_state_dict(plain, assign=True)
    options = info["config"]
    pipeline = teacher.load_pipeline(options["model"], unet.dtype, options["random_init"], options["seed"], options["model_config"],
                                     unet=unet)
    lora = {f"{layer}.lora_{side}.weight": value for layer, pair in layers.items() for side, value in zip("AB", pair)}
    write_pipeline(folder, pipeline, info, lora)


def write_pipeline(folder, pipeline, info, lora=None):
    if not teacher.is_edm(pipeline.scheduler):
        stock = dict(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, thresholding=False, steps_offset=1)
        pipeline.scheduler = teacher.as_ddim(pipeline.scheduler, **stock)
        if teacher.in_pixels(pipeline):                     # a DDPMPipeline, or another: this one takes a DDIM scheduler's steps
            labels, pipeline = pipeline.labels, DDIMPipeline(pipeline.unet, pipeline.scheduler)
            pipeline.labels = labels

    def write(part):
        pipeline.save_pretrained(part, safe_serialization=True)
        if lora:
            type(pipeline).save_lora_weights(part, unet_lora_layers=lora)
        source = Path(teacher.PRESETS.get(info["teacher"], (info["teacher"], ""))[0])
        for name in ("vocabulary.json", "labels.json"):
            if (source / name).is_file():
                shutil.copy(source / name, part)
        (part / "README.md").write_text(CARD.format(**info, sampled=sampled(pipeline, info["windows"])))
        (part / "reflow.json").write_text(json.dumps(info, indent=1))
    folder.parent.mkdir(parents=True, exist_ok=True)
    data.write_atomically(folder, write)


def trained_weights(folder, lora):
    """What the student in `folder` was trained in, under the names the trainer gives it: name -> tensor."""
    if not lora:
        kind = teacher.unet_class(json.loads((folder / "unet" / "config.json").read_text()))
        return teacher.load_whole(kind, folder / "unet", use_safetensors=True).state_dict()
    rename = {"lora_A.weight": "lora_A.student.weight", "lora_B.weight": "lora_B.student.weight"}
    return {name.removeprefix("unet.")[:-13] + rename[name[-13:]]: value for name, value in load_file(folder / LORA_FILE).items()}


# ---- commands ------------------------------------------------------------------------------------------------------


def free_folder(option, name):
    """A Path that nothing occupies yet.  Raises UserError."""
    if not name:
        raise UserError(f"{option}: name a folder to write")
    folder = Path(name)
    if folder.exists():
        raise UserError(f"{option} {folder}: exists already; choose another")
    return folder


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
    """The running average of a checkpoint as a pipeline, complete like the one at the end of a stage."""
    folder = free_folder("--out", c.out)
    metadata, tensors = open_safetensors("--checkpoint", c.checkpoint)
    if "info" not in metadata:
        raise UserError(f"--checkpoint {c.checkpoint}: not one of train.py's checkpoints")
    info = json.loads(metadata["info"])
    options = info["config"]
    average = {key.removeprefix("ema:"): value for key, value in tensors.items() if key.startswith("ema:")}
    dtype = teacher.DTYPES[options["precision"] if options["lora"] and not options["shard"] else "fp32"]      # as it was trained
    unet = teacher.load_pipeline(options["model"], dtype, options["random_init"], options["seed"], options["model_config"],
                                 vae=None, text_encoder=None).unet
    export(folder, {**unet.state_dict(), **average}, unet.config, {**info, "updates": int(metadata["step"])})
    print(f"{folder}: student of {info['windows']} windows after {metadata['step']} updates")


@dataclass
class DeltaConfig:
    student: str = ""                # a student's folder
    base: str = ""                   # what to subtract; default: the teacher it was distilled from
    out: str = "delta.safetensors"   # file to write
    dtype: str = "fp32"              # of the difference: fp32, or fp16 at half the size


def export_delta(c):
    """Student minus base, tensor by tensor, as safetensors; its metadata tells how to sample what it is merged into."""
    dtype = teacher.DTYPES[config.choose("--dtype", c.dtype, ("fp32", "fp16"))]
    info = read_info("--student", c.student)
    base = c.base or info["teacher"]
    seed, random_init = info["config"].get("seed", 0), info["config"].get("random_init", False) and not c.base
    student = only_unet(c.student).state_dict()
    other = only_unet(base, random_init=random_init, seed=seed).state_dict()
    check_same_architecture(f"--base {base}", other, f"--student {c.student}", student)
    delta = {name: (value.float() - other[name].float()).to(dtype) for name, value in student.items()}
    data.write_atomically(Path(c.out), lambda part: save_file(delta, part, {"info": json.dumps(info)}))
    size = sum(value.float().square().sum().item() for value in delta.values()) ** 0.5
    print(f"{c.out}: {c.student} minus {base}, {len(delta)} tensors, norm {size:.4g}")


@dataclass
class MergeConfig:
    delta: str = ""                  # a file that export-delta wrote
    model: str = ""                  # what to add it to: a preset, folder, hub id or single file of the same architecture
    out: str = ""                    # folder to write: a complete pipeline
    scale: float = 1.0               # how much of the difference to add


def merge(c):
    """Another model of the same architecture plus the difference: it samples in as few steps, in its own style."""
    folder = free_folder("--out", c.out)
    metadata, delta = open_safetensors("--delta", c.delta)
    if "info" not in metadata:
        raise UserError(f"--delta {c.delta}: not a difference that export-delta wrote")
    if not c.model:
        raise UserError("--model: name the model to add the difference to")
    pipeline = teacher.load_pipeline(c.model)
    weights = pipeline.unet.state_dict()
    check_same_architecture(f"--model {c.model}", weights, f"--delta {c.delta}", delta)
    for name, value in weights.items():
        value += c.scale * delta[name].float()
    info = json.loads(metadata["info"])
    write_pipeline(folder, pipeline, {**info, "teacher": c.model, "delta": dict(file=c.delta, scale=c.scale, student_of=info["teacher"])})
    print(f"{folder}: {c.model} with {c.scale:g} x {c.delta}; sample it in {info['windows']} steps or a multiple")


def read_info(option, folder):
    """reflow.json of a student's folder.  Raises UserError."""
    file = Path(folder or "?") / "reflow.json"
    if not file.is_file():
        raise UserError(f"{option} {folder}: no student there (reflow.json is missing)")
    return json.loads(file.read_text())


def only_unet(name, **how):
    return teacher.load_pipeline(name, **how, vae=None, text_encoder=None).unet


def check_same_architecture(one, weights, other, others):
    """Raises UserError naming the first tensor in which two networks differ."""
    for name in sorted({*weights, *others}):
        shapes = [tuple(w[name].shape) if name in w else None for w in (weights, others)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{one}: not the architecture of {other} ({name}: {shapes[0] or 'absent'} against {shapes[1] or 'absent'}); "
                            "give a model of the same family")


COMMANDS = {"export": (export_checkpoint, ExportConfig), "export-delta": (export_delta, DeltaConfig), "merge": (merge, MergeConfig)}
