"""Z-Image: ZImageTransformer2DModel, flow matching told t = 1 - sigma and answering -u, with text of any
length from a Qwen3."""
import torch
from diffusers import ZImageTransformer2DModel

from models.configs import flow_match_euler
from models.latents import complete as complete_autoencoder
from models.latents import decode, encode  # noqa: F401  (two names of a family)
from models.original import Z_IMAGE, transformer_file
from models.text import encode as encode_prompts
from models.text import has_null, prompts, warn_of_cut  # noqa: F401  (two names of a family)
from runtime.cli import UserError

NETWORK, CLASS = "transformer", ZImageTransformer2DModel
TEXT_ENCODERS = ("text_encoder",)
# every linear inside the blocks: attention, feed-forward, modulation
LORA_LAYERS = (r"(noise_refiner|context_refiner|layers)\.\d+\."
               r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)")
FLOW = True
single_file = transformer_file(Z_IMAGE)
TOKENS, PIXELS = 512, 1024      # the stock pipeline's


def required(pipeline):
    return "vae", "text_encoder"


def complete(pipeline, folder, given):
    complete_autoencoder(pipeline, folder, given)
    pipeline.native_size = PIXELS


def check(pipeline):
    """Raises UserError unless the transformer is evaluated with (z, timestep, text) alone."""
    if pipeline.transformer.config.siglip_feat_dim is not None:
        raise UserError("its transformer takes pictures besides the text, as Z-Image-Omni's does; give a "
                        "text-to-image model")


def blocks(transformer):
    """The parts that FSDP gathers one at a time."""
    return *transformer.noise_refiner, *transformer.context_refiner, *transformer.layers


def forward(transformer):
    """(z, timestep, **cond) -> output like z. cap_lengths: tokens of each prompt, which the host must
    know; default: all of cap_feats."""
    def predict(z, timestep, cap_feats, cap_lengths=None):
        dtype = next(transformer.parameters()).dtype
        lengths = [cap_feats.shape[1]] * len(z) if cap_lengths is None else cap_lengths.tolist()
        texts = [feats[:length] for feats, length in zip(cap_feats.to(dtype), lengths)]
        output = transformer(list(z.to(dtype)[:, :, None].unbind()), (1000 - timestep) / 1000, texts,
                             return_dict=False)[0]          # each (C, 1, h, w)
        return -torch.stack(output)[:, :, 0].to(z.dtype)
    return predict


def embed_guidance(pipeline, guidance):
    """Nothing of it: what is not 1 is classifier-free guidance."""
    return guidance


def encode_text(pipeline, texts, batch, null, size, device):
    """{"cap_feats": (N, 512, D) float32, zeros beyond the prompt, "cap_lengths": (N,) int64}."""
    def chunk(texts):
        warn_of_cut(pipeline.tokenizer, texts, TOKENS)
        found, _ = pipeline.encode_prompt(list(texts), device=pipeline.text_encoder.device,
                                          do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        padded = [torch.nn.functional.pad(feats, (0, 0, 0, TOKENS - len(feats))) for feats in found]
        return dict(cap_feats=torch.stack(padded), cap_lengths=torch.tensor([len(feats) for feats in found]))
    return encode_prompts(chunk, texts, batch, null, device)


def native_size(pipeline):
    return pipeline.native_size, pipeline.native_size


def latent_geometry(pipeline):
    """(channels, pixels per latent, what the sides of a picture must be multiples of)."""
    return pipeline.transformer.config.in_channels, pipeline.vae_scale_factor, 2 * pipeline.vae_scale_factor


def set_native_size(pipeline, size):
    pipeline.native_size = size


# ---- a student's pipeline ----------------------------------------------------------------------------------


def as_student(pipeline, schedule):
    """The pipeline as a student is written, with the stock scheduler that samples it."""
    pipeline.scheduler = flow_match_euler(schedule.shift)
    return pipeline


def stock_call(pipeline, steps):
    size = pipeline.native_size
    return (f"prompt, num_inference_steps={steps}, guidance_scale=0"
            + (f", height={size}, width={size}" if size != PIXELS else ""))


def stock_notes(pipeline, exact, guidance, null):
    """Sentences of a student's card."""
    there = f", and guidance {guidance} is in the student already" * bool(guidance)
    return ["Without guidance_scale=0 diffusers takes 5, which is far off; its scale is one less than that "
            f"of sampler.py{there}."]


def meta_condition(transformer):
    """What forward takes besides z and time, for one sample on the meta device."""
    return dict(cap_feats=torch.empty(1, TOKENS, transformer.config.cap_feat_dim, device="meta"))
