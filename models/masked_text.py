"""Text with a mask, from one encoder and as the pipeline's own encode_prompt makes it: PixArt's and
SANA's."""
import warnings

import torch

from runtime.cli import UserError
from teacher import check_finite


def encode(pipeline, texts, batch, device, prefix="", **options):
    """texts: list of N strings; prefix: text that the pipeline puts before each; options: for
    encode_prompt.
    Returns: {"encoder_hidden_states": float32 (N, L, D), "encoder_attention_mask": int64 (N, L), 1
    where the network looks}.  Warns of text beyond the L tokens.
    Raises UserError on an embedding that is not finite."""
    states, masks, cut = [], [], []
    for start in range(0, len(texts), batch):
        chunk = texts[start:start + batch]
        found, mask, *_ = pipeline.encode_prompt(chunk, False, device=pipeline.text_encoder.device, **options)
        states.append(found.float().to(device))
        masks.append(mask.long().to(device))
        # no padding: perhaps cut. Of the prefix, which is not counted among the L, one token stays
        before = len(pipeline.tokenizer(prefix).input_ids) - 2 if prefix else 0
        for text, whole in zip(chunk, mask.all(1).tolist()):
            excess = whole and len(pipeline.tokenizer(prefix + text).input_ids) - before - mask.shape[1]
            cut += [(text, excess)] if excess > 0 else []
    if cut:
        (first, excess), others = cut[0], len({text for text, _ in cut}) - 1
        warnings.warn(f"{first[:60] + '...' * (len(first) > 60)!r} is {excess} tokens too long for the text "
                      "encoder, which does not see its end" + f"; so are {others} more" * (others > 0),
                      stacklevel=5)                         # the caller of models.encode_text
    table = {"encoder_hidden_states": torch.cat(states), "encoder_attention_mask": torch.cat(masks)}
    check_finite(table["encoder_hidden_states"], [f"prompt {text!r}" for text in texts],
                 "its text embedding is not finite; use --dtype bf16 or fp32, or another text encoder")
    return table


def check_null(null):
    """Raises UserError on a null embedding of zeros, which such a model has never seen."""
    if null == "zeros":
        raise UserError('--null-text zeros: the null embedding of this model is the encoded ""; leave it out')


def check_width(pipeline, width):
    """Raises UserError unless the text encoder, where there is one, gives what the network takes."""
    encoder, wide = pipeline.text_encoder, pipeline.transformer.config.caption_channels
    if encoder is not None and width(encoder.config) != wide:
        raise UserError(f"its text_encoder gives {width(encoder.config)} channels, and its transformer takes "
                        f"{wide} (caption_channels); give the text encoder it was trained with")
