"""Transformers at a thousandth of their size, with random weights and the schedulers they were published with."""
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from models.architectures import random_part

BETAS = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
WORDS = ["red", "heart", "on", "blue", "fox", "green", "a", "and"]
VAE = dict(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
           layers_per_block=1, norm_num_groups=4, latent_channels=4, scaling_factor=0.13025)
SMALL = dict(sample_size=8, num_attention_heads=2, attention_head_dim=8, num_layers=2)


def t5(width=16):
    """(tokenizer of words and letters, encoder)."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *((f"▁{word}", -2.0) for word in WORDS),
              *((letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    return T5Tokenizer(vocab=pieces, extra_ids=0), random_part(lambda: T5EncoderModel(config), "text_encoder")


def autoencoder():
    return random_part(lambda: AutoencoderKL(**VAE), "vae")


def dit(**changes):
    """DiT with ImageNet's number of classes, three of them named."""
    config = {**SMALL, "out_channels": 8, **changes}
    pipeline = DiTPipeline(random_part(lambda: DiTTransformer2DModel(**config), "transformer"), autoencoder(),
                           DDIMScheduler(**BETAS, clip_sample=False), id2label={0: "fox, red fox", 7: "cat"})
    pipeline.register_to_config(id2label={0: "fox, red fox", 7: "cat"})        # as the published model_index.json has it
    return pipeline


def pixart(kind=PixArtSigmaPipeline, width=16, **changes):
    config = {**SMALL, "cross_attention_dim": 16, "caption_channels": 16, **changes}
    tokenizer, encoder = t5(width)
    return kind(tokenizer, encoder, autoencoder(), random_part(lambda: PixArtTransformer2DModel(**config), "transformer"),
                DPMSolverMultistepScheduler(**BETAS))


def alpha(**changes):
    return pixart(PixArtAlphaPipeline, **changes)


def alpha_1024():
    """At this sample_size alpha is told the size of the picture; three embeddings share its width."""
    return alpha(sample_size=128, num_attention_heads=3, cross_attention_dim=24)


def gemma(width=16):
    """(tokenizer of words and characters, encoder). It pads on the left until the pipeline says otherwise, as Gemma's."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *map(chr, range(32, 127)), "▁"]
    config = Gemma2Config(vocab_size=len(pieces), hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=8, max_position_embeddings=4096)
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], padding_side="left")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer, random_part(lambda: Gemma2Model(config), "text_encoder")


def sana(width=16, **changes):
    config = {**SMALL, "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
              "cross_attention_dim": 16, "caption_channels": 16, **changes}
    levels = dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1, 1, 1),
                  decoder_layers_per_block=(1, 1, 1), encoder_block_types="ResBlock", decoder_block_types="ResBlock",
                  encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()))
    tokenizer, encoder = gemma(width)
    return SanaPipeline(tokenizer, encoder, random_part(lambda: AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **levels), "vae"),
                        random_part(lambda: SanaTransformer2DModel(**config), "transformer"),
                        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))
