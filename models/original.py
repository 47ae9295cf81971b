"""The original layouts: the names that the first code gave the weights, by which ComfyUI and the web
UIs know single files and LoRAs. Stable Diffusion's are read off the network's own blocks, so that
one table serves 1.x, 2.x and XL; of SD3, FLUX.1 and Z-Image it is the transformer alone. Diffusers
has the way from there to here (from_single_file), which the tests run on everything written here.
"""
import re

import torch
from diffusers import AutoencoderKL
from diffusers.models.normalization import AdaLayerNormContinuous

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


# ---- transformers ------------------------------------------------------------------------------------------


def parts(ours, theirs, letters="qkv"):
    """Names of queries, keys and values, which are one tensor there. ours has {} for the letter."""
    return {ours.format(letter): f"{theirs}<{i}>" for i, letter in enumerate(letters)}


def embedders(layers, **names):
    """Names of the embeddings of time, pooled text and guidance, two layers each: ours=theirs."""
    return {f"time_text_embed.{ours}_embedder.linear_{i + 1}": f"{theirs}.{layer}"
            for ours, theirs in names.items() for i, layer in enumerate(layers)}


# a transformer's tables: (prefix in diffusers, the original one, names behind it); the first that fits.
# <0> to <3> are parts of one tensor, in this order
SD3 = (("transformer_blocks.", "joint_blocks.", {
            ".norm1.linear": ".x_block.adaLN_modulation.1",
            ".norm1_context.linear": ".context_block.adaLN_modulation.1",
            **parts(".attn.to_{}.", ".x_block.attn.qkv."), **parts(".attn2.to_{}.", ".x_block.attn2.qkv."),
            **parts(".attn.add_{}_proj.", ".context_block.attn.qkv."),
            ".attn.norm_q": ".x_block.attn.ln_q", ".attn.norm_k": ".x_block.attn.ln_k",
            ".attn2.norm_q": ".x_block.attn2.ln_q", ".attn2.norm_k": ".x_block.attn2.ln_k",
            ".attn.norm_added_q": ".context_block.attn.ln_q",
            ".attn.norm_added_k": ".context_block.attn.ln_k",
            ".attn.to_out.0": ".x_block.attn.proj", ".attn2.to_out.0": ".x_block.attn2.proj",
            ".attn.to_add_out": ".context_block.attn.proj",
            ".ff.net.0.proj": ".x_block.mlp.fc1", ".ff.net.2": ".x_block.mlp.fc2",
            ".ff_context.net.0.proj": ".context_block.mlp.fc1",
            ".ff_context.net.2": ".context_block.mlp.fc2"}),
       ("", "", {"pos_embed.proj": "x_embedder.proj", "pos_embed.pos_embed": "pos_embed",
                 "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
                 **embedders(("mlp.0", "mlp.2"), timestep="t_embedder", text="y_embedder")}))

FLUX = (("transformer_blocks.", "double_blocks.", {
             ".norm1.linear": ".img_mod.lin", ".norm1_context.linear": ".txt_mod.lin",
             **parts(".attn.to_{}.", ".img_attn.qkv."), **parts(".attn.add_{}_proj.", ".txt_attn.qkv."),
             ".attn.norm_q.weight": ".img_attn.norm.query_norm.scale",
             ".attn.norm_k.weight": ".img_attn.norm.key_norm.scale",
             ".attn.norm_added_q.weight": ".txt_attn.norm.query_norm.scale",
             ".attn.norm_added_k.weight": ".txt_attn.norm.key_norm.scale",
             ".attn.to_out.0": ".img_attn.proj", ".attn.to_add_out": ".txt_attn.proj",
             ".ff.net.0.proj": ".img_mlp.0", ".ff.net.2": ".img_mlp.2",
             ".ff_context.net.0.proj": ".txt_mlp.0", ".ff_context.net.2": ".txt_mlp.2"}),
        ("single_transformer_blocks.", "single_blocks.", {
             **parts(".attn.to_{}.", ".linear1."), ".proj_mlp.": ".linear1.<3>", ".proj_out": ".linear2",
             ".attn.norm_q.weight": ".norm.query_norm.scale", ".attn.norm_k.weight": ".norm.key_norm.scale",
             ".norm.linear": ".modulation.lin"}),
        ("", "", {"x_embedder": "img_in", "context_embedder": "txt_in",
                  "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
                  **embedders(("in_layer", "out_layer"), timestep="time_in", text="vector_in",
                              guidance="guidance_in")}))

Z_IMAGE = (("", "", {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
                     **parts(".attention.to_{}.", ".attention.qkv."), ".attention.to_out.0": ".attention.out",
                     ".attention.norm_q": ".attention.q_norm", ".attention.norm_k": ".attention.k_norm"}),)


def transformer_file(tables):
    """A family's single_file: its transformer in the original layout.
    Where diffusers' last modulations give scale and shift, theirs give shift and scale."""
    def single_file(pipeline):
        transformer, pieces = pipeline.transformer, {}
        last = [name for name, part in transformer.named_modules()
                if isinstance(part, AdaLayerNormContinuous)]
        for name, value in transformer.state_dict().items():
            if name.rpartition(".linear.")[0] in last:
                value = torch.cat(value.chunk(2)[::-1])
            ours, theirs, inside = next(table for table in tables if name.startswith(table[0]))
            name = theirs + name.removeprefix(ours)
            here = next((here for here in inside if here in name), None)
            name = name.replace(here, inside[here]) if here else name
            pieces.setdefault(re.sub("<.>", "", name), {})[name] = value
        return {f"model.diffusion_model.{name}": torch.cat([piece[key] for key in sorted(piece)])
                if len(piece) > 1 else piece[name] for name, piece in pieces.items()}, {}
    return single_file
