"""Stable Diffusion's original layout: the names that the first code gave the weights, by which
ComfyUI and the web UIs know single files and LoRAs. Names are read off the network's own blocks, so
that one table serves 1.x, 2.x and XL. Diffusers has the way from there to here (from_single_file),
which the tests run on everything written here.
"""
import torch
from diffusers import AutoencoderKL

from models.configs import is_edm
from runtime.cli import UserError

# inside a block: diffusers' name -> the original one
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}

UNET_TOP = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
            "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}

VAE_TOP = {"conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1",
           "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.1": "mid.block_2"}

VAE_INSIDE = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
              "to_out.0": "proj_out"}

OPENCLIP = {"embeddings.token_embedding.weight": "token_embedding.weight",
            "embeddings.position_embedding.weight": "positional_embedding",
            "text_projection.weight": "text_projection"}

OPENCLIP_INSIDE = {"encoder.layers.": "transformer.resblocks.", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc",
                   "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
                   "final_ln_": "ln_final"}


def unet_blocks(unet):
    """The prefixes of a UNet's blocks: diffusers' -> the original one. The original code counts
    what a latent passes through: a resnet with its attention, or a change of size."""
    names, n = {**UNET_TOP, "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0":
                "middle_block.1", "mid_block.resnets.1": "middle_block.2"}, 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if block.downsamplers:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        # beside the last resnet, behind its attention if there is one
        place = 1 + bool(getattr(block, "attentions", None))
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{n - 1}.{place}"
    return names


def vae_blocks(vae):
    """The same for an autoencoder; the decoder's levels are counted from the picture's side."""
    names, levels = {}, len(vae.config.block_out_channels)
    for half, word, inside in (("encoder", "down", "down_blocks"), ("decoder", "up", "up_blocks")):
        names |= {f"{half}.{ours}": f"{half}.{theirs}" for ours, theirs in VAE_TOP.items()}
        for i, block in enumerate(getattr(getattr(vae, half), inside)):
            there = f"{half}.{word}.{i if half == 'encoder' else levels - 1 - i}"
            for j in range(len(block.resnets)):
                names[f"{half}.{inside}.{i}.resnets.{j}"] = f"{there}.block.{j}"
            names[f"{half}.{inside}.{i}.{word}samplers.0"] = f"{there}.{word}sample"
    return names


def rename(name, blocks, inside):
    """A weight's name: its block's prefix, and behind it what stands in the table `inside`."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        prefix, rest = ".".join(parts[:k]), ".".join(parts[k:])
        if prefix in blocks:
            for ours, theirs in inside.items():
                if rest == ours or rest.startswith(ours + "."):
                    rest = theirs + rest[len(ours):]
            return f"{blocks[prefix]}.{rest}".rstrip(".")
    return name


def unet_name(blocks, name):
    """The original name of a UNet's layer or weight. blocks: from unet_blocks."""
    resnet = "resnets" in name.split(".")
    return rename(name, blocks, RESNET if resnet else {})


def unet_weights(unet):
    blocks = unet_blocks(unet)
    return {unet_name(blocks, name): value for name, value in unet.state_dict().items()}


def vae_weights(vae):
    blocks, weights = vae_blocks(vae), {}
    for name, value in vae.state_dict().items():
        there = rename(name, blocks, VAE_INSIDE)
        # attention by 1 x 1 convolutions
        weights[there] = value[:, :, None, None] if ".attn_1." in there and value.ndim == 2 else value
    return weights


def openclip_weights(encoder):
    """OpenCLIP keeps queries, keys and values in one matrix, and its projection the other way
    around."""
    weights, state = {}, {name.removeprefix("text_model."): value
                          for name, value in encoder.state_dict().items()}
    for name, value in state.items():
        there = OPENCLIP.get(name, name)
        for ours, theirs in OPENCLIP_INSIDE.items():
            there = there.replace(ours, theirs)
        if ".q_proj." in name:
            three = [state[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            weights[there.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name and "position_ids" not in name:
            weights[there] = value.T if there == "text_projection" else value
    return weights


def clip_weights(encoder):
    return {f"text_model.{name.removeprefix('text_model.')}": value
            for name, value in encoder.state_dict().items()}


def as_single_file(pipeline):
    """A pipeline as one file of the original layout.  Returns: (name -> tensor, metadata).
    The metadata and the empty tensors v_pred and ztsnr say what it predicts, to whoever reads them.
    Raises UserError for what these cannot say (EDM's form, a prediction of x), and for another
    autoencoder."""
    xl, c = hasattr(pipeline, "text_encoder_2"), pipeline.scheduler.config
    if not isinstance(pipeline.vae, AutoencoderKL):
        raise UserError(f"a single file cannot hold its {type(pipeline.vae).__name__}, only an "
                        "AutoencoderKL; use the folder")
    if is_edm(pipeline.scheduler) or c.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"a single file cannot say {type(pipeline.scheduler).__name__} with prediction type "
                        f"{c.prediction_type}; use the folder")
    if xl:
        kind, text = "stable-diffusion-xl-v1-base", {
            "conditioner.embedders.0.transformer.": clip_weights(pipeline.text_encoder),
            "conditioner.embedders.1.model.": openclip_weights(pipeline.text_encoder_2)}
    elif pipeline.text_encoder.config.hidden_act == "gelu":     # OpenCLIP; OpenAI's own has quick_gelu
        kind = f"stable-diffusion-v2-{'768-v' if c.prediction_type == 'v_prediction' else '512'}"
        text = {"cond_stage_model.model.": openclip_weights(pipeline.text_encoder)}
    else:
        kind = "stable-diffusion-v1"
        text = {"cond_stage_model.transformer.": clip_weights(pipeline.text_encoder)}
    groups = {"model.diffusion_model.": unet_weights(pipeline.unet),
              "first_stage_model.": vae_weights(pipeline.vae), **text}
    weights = {prefix + name: value for prefix, group in groups.items() for name, value in group.items()}
    v = c.prediction_type == "v_prediction"
    marks = {"v_pred": v, "ztsnr": c.get("rescale_betas_zero_snr")}
    weights |= {name: torch.tensor([]) for name, said in marks.items() if said}
    metadata = {"modelspec.architecture": kind, "modelspec.prediction_type": "v" if v else "epsilon"}
    return weights, metadata
