"""Stable Diffusion's family: UNet2DConditionModel with text encoders and an autoencoder (SD 1.x,
2.x, XL and their kin)."""
import math
import warnings

import torch
from diffusers import UNet2DConditionModel

from models.configs import GIVE, check_fields, trailing_ddim
from models.latents import complete, decode, encode, unscaled  # noqa: F401  (three names of a family)
from models.original import as_single_file, unet_blocks, unet_name
from runtime.cli import UserError
from teacher import check_finite

NETWORK, CLASS = "unet", UNet2DConditionModel
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")        # the second is SDXL's alone
# every linear and convolution inside the UNet's blocks, by the names diffusers gives them
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
               "time_emb_proj", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
FLOW = False


def required(pipeline):
    """The networks it needs besides."""
    return ("vae", *[name for name in TEXT_ENCODERS if name == "text_encoder" or hasattr(pipeline, name)])


def check(pipeline):
    """Raises UserError unless the UNet is evaluated with (z, timestep, text) alone, as SD's and
    SDXL's are."""
    c = pipeline.unet.config
    if c.in_channels != c.out_channels:
        raise UserError(f"its UNet takes {c.in_channels} channels and gives {c.out_channels}: it needs a "
                        "picture besides the text, as models for inpainting, editing and upscaling do; give "
                        "a text-to-image model")
    check_fields("UNet2DConditionModel", c)
    if (c.addition_embed_type == "text_time") != hasattr(pipeline, "text_encoder_2"):
        raise UserError(f"addition_embed_type of its UNet is {c.addition_embed_type!r} in a "
                        f"{type(pipeline).__name__}: text_time goes with two text encoders, as in SDXL; "
                        f"{GIVE}")


def blocks(unet):
    """The parts that FSDP gathers one at a time."""
    return (*unet.down_blocks, unet.mid_block, *unet.up_blocks)


def forward(unet):
    """(z, timestep, **cond) -> output like z."""
    def predict(z, timestep, encoder_hidden_states, **added):
        dtype = next(unet.parameters()).dtype  # DDP has no .dtype; with LoRA the first is still the base's
        # The network's own dtype only here. SDXL's additions stay float32: it casts their embedding;
        # bf16 would round 1001 px.
        output = unet(z.to(dtype), timestep, encoder_hidden_states=encoder_hidden_states.to(dtype),
                      added_cond_kwargs=added or None, return_dict=False)[0]
        return output.to(z.dtype)
    return predict


def prompts(pipeline):
    return "text"


def has_null(pipeline):
    return True


def embed_guidance(pipeline, guidance):
    """Nothing of it: what is not 1 is classifier-free guidance."""
    return guidance


@torch.no_grad()
def encode_text(pipeline, prompts, batch, null, size, device):
    """{"encoder_hidden_states": (N, L, D)}; SDXL also {"text_embeds": (N, P), "time_ids": (N, 6)},
    float32."""
    if null == "auto":
        null = "zeros" if pipeline.config.get("force_zeros_for_empty_prompt") else "empty"
    if null not in ("empty", "zeros"):
        raise ValueError(f"null {null!r}: not one of auto, empty, zeros")
    xl = hasattr(pipeline, "text_encoder_2")
    towers = [(pipeline.tokenizer,
               pipeline.text_encoder)] + ([(pipeline.tokenizer_2, pipeline.text_encoder_2)] if xl else [])
    texts, rows, cut = ["" if prompt is None else prompt for prompt in prompts], [], []
    for start in range(0, len(texts), batch):
        chunk, outputs = texts[start:start + batch], []
        for tokenizer, encoder in towers:
            # without model_max_length in its files, a tokenizer says 1e30
            positions = getattr(encoder.config, "max_position_embeddings", math.inf)
            length = min(tokenizer.model_max_length, positions)
            tokens = tokenizer(chunk, padding="max_length", max_length=length, truncation=True,
                               return_tensors="pt")
            # no padding: perhaps cut
            whole = [text for text, mask in zip(chunk, tokens.attention_mask) if mask.all()]
            cut += [(text, len(ids) - length)
                    for text, ids in zip(whole, tokenizer(whole).input_ids if whole else [])
                    if len(ids) > length]
            # as in diffusers' pipelines
            masked = not xl and getattr(encoder.config, "use_attention_mask", False)
            outputs.append(encoder(tokens.input_ids.to(encoder.device), output_hidden_states=xl,
                                   attention_mask=tokens.attention_mask.to(encoder.device) if masked
                                   else None))
        # SDXL: both encoders' last layer but one, side by side, and the second's pooled output
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1) if xl else outputs[0][0]
        rows.append([part.float().to(device) for part in ([states, outputs[-1][0]] if xl else [states])])
    if cut:
        (first, excess), others = cut[0], len({text for text, _ in cut}) - 1
        warnings.warn(f"{first[:60] + '...' * (len(first) > 60)!r} is {excess} tokens too long for the text "
                      "encoder, which does not see "
                      # 2 is no_grad, 3 models.encode_text
                      "its end" + f"; so are {others} more" * (others > 0), stacklevel=4)
    table = dict(zip(("encoder_hidden_states", "text_embeds"), map(torch.cat, zip(*rows))))
    for value in table.values():
        check_finite(value, [f"prompt {text!r}" for text in texts],
                     "its text embedding is not finite; use --dtype bf16 "
                     "or fp32, or another text encoder")
    if null == "zeros":
        dropped = torch.tensor([prompt is None for prompt in prompts]).to(device)
        for value in table.values():
            value.masked_fill_(dropped.view(-1, *[1] * (value.ndim - 1)), 0)
    if xl:
        height, width = native_size(pipeline) if size is None else size
        table["time_ids"] = torch.tensor([[height, width, 0, 0, height,
                                           width]]).float().repeat(len(texts), 1).to(device)
    return table


def native_size(pipeline):
    size = pipeline.unet.config.sample_size
    if size is None:
        raise UserError("its UNet's config.json has no sample_size: give --size, or write it there")
    return tuple(side * pipeline.vae_scale_factor
                 for side in ((size, size) if isinstance(size, int) else size))


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    c, factor = pipeline.unet.config, pipeline.vae_scale_factor
    return c.in_channels, factor, factor * 2 ** (len(c.block_out_channels) - 1)


def set_native_size(pipeline, size):
    pipeline.unet.register_to_config(sample_size=size // pipeline.vae_scale_factor)


# ---- a student's pipeline ----------------------------------------------------------------------------------


def as_student(pipeline, schedule):
    """The pipeline as a student is written, with the stock scheduler that samples it."""
    pipeline.scheduler = trailing_ddim(pipeline.scheduler)
    return pipeline


def stock_call(pipeline, steps):
    """The arguments of a stock call that samples a student, or None where no stock pipeline
    does."""
    return f"prompt, num_inference_steps={steps}, guidance_scale=1"


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card. exact: numbers of steps at which stock agrees with sampler.py;
    guidance: what the student has learned of it, in words; null: its null embedding, as in encode_text."""
    if not exact:
        return []
    notes = ["Without guidance_scale=1 diffusers takes 7.5, which is far off" + (
        f"; guidance {guidance} is in the student already." if guidance else ".")]
    if null == "zeros" and "force_zeros_for_empty_prompt" not in pipeline.config:
        notes.append("With other guidance use sampler.py: the null embedding is zeros, and diffusers' "
                     "pipeline cannot know it.")
    n = next((n for n in exact if n > 1), 1)
    strengths = ", ".join(f"{k / n:g}" for k in range(1, n)) + " or " * (n > 1) + "1"
    notes.append("Image to image and inpainting: a strength that is a multiple of 1 / num_inference_steps "
                 f"(with {n} step{'s' * (n > 1)} {strengths}). Diffusers rounds steps x strength down, and "
                 "fails below 1.")
    return notes


def kohya_layers(unet):
    """layer -> its name in kohya's LoRA files: of 1.x and 2.x diffusers' name, of XL the original
    one, as kohya trains the former on diffusers' UNet and XL on the original."""
    if unet.config.addition_embed_type != "text_time":
        return lambda layer: layer
    blocks = unet_blocks(unet)
    return lambda layer: unet_name(blocks, layer)


def single_file(pipeline):
    return as_single_file(pipeline)


def onnx_parts(pipeline):
    """What runs beside the UNet: name -> (network, function that evaluates it, example of its input).
    Raises UserError where the text is more than one encoder's answer."""
    encoder, vae = pipeline.text_encoder, pipeline.vae
    if (hasattr(pipeline, "text_encoder_2") or getattr(encoder.config, "use_attention_mask", False)
            or pipeline.config.get("force_zeros_for_empty_prompt")):
        raise UserError("its text is more than one encoder's answer to its tokens (two encoders, a mask, or "
                        "zeros for no text); ONNX is written of Stable Diffusion 1.x and 2.x alone")
    tokens = torch.zeros(1, min(pipeline.tokenizer.model_max_length, encoder.config.max_position_embeddings),
                         dtype=torch.long)
    height, width = (side // pipeline.vae_scale_factor for side in native_size(pipeline))
    z = torch.zeros(1, pipeline.unet.config.in_channels, height, width)

    def decoded(z):
        return vae.decode(unscaled(vae, z), return_dict=False)[0].clamp(-1, 1)
    return {"text_encoder": (encoder, lambda input_ids: encoder(input_ids)[0], {"input_ids": tokens}),
            "decoder": (vae, decoded, {"z": z})}


def meta_condition(unet):
    """What forward takes besides z and time, for one sample on the meta device: for counting
    operations."""
    cond = {"encoder_hidden_states": torch.empty(1, 77, unet.config.cross_attention_dim, device="meta")}
    if unet.config.get("addition_embed_type") == "text_time":
        wide = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        cond |= dict(text_embeds=torch.empty(1, wide, device="meta"),
                     time_ids=torch.empty(1, 6, device="meta"))
    return cond
