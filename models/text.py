"""Prompts to conditions, for every family whose stock pipeline encodes them itself."""
import warnings

import torch

from runtime.cli import UserError
from teacher import check_finite


@torch.no_grad()
def encode(encode_chunk, prompts, batch, null, device):
    """encode_chunk: list of strings -> dict of tensors (N, ...); the rest, and what is returned: as
    for models.encode_text. The null embedding is the encoded "", as in these stock pipelines."""
    if null == "zeros":
        raise UserError('--null-text zeros: the null embedding of this model is the encoded ""; leave it out')
    texts = ["" if prompt is None else prompt for prompt in prompts]
    rows = [encode_chunk(texts[start:start + batch]) for start in range(0, len(texts), batch)]
    table = {key: torch.cat([row[key] for row in rows]).to(device) for key in rows[0]}
    for key, value in table.items():
        table[key] = value.float() if value.is_floating_point() else value
        check_finite(table[key], [f"prompt {text!r}" for text in texts],
                     "its text embedding is not finite; use --dtype bf16 or fp32, or another text encoder")
    return table


def warn_of_cut(tokenizer, texts, length):
    """Warn of texts that have more than `length` tokens."""
    cut = [(text, len(ids) - length) for text, ids in zip(texts, tokenizer(texts).input_ids)
           if len(ids) > length]
    if cut:
        (first, excess), others = cut[0], len({text for text, _ in cut}) - 1
        warnings.warn(f"{first[:60] + '...' * (len(first) > 60)!r} is {excess} tokens too long for the text "
                      "encoder, which does not see its end" + f"; so are {others} more" * (others > 0),
                      stacklevel=6)


def check_width(pipeline):
    """Raises UserError unless the text encoder, where there is one, gives what the transformer takes."""
    encoder, wide = pipeline.text_encoder, pipeline.transformer.config.caption_channels
    if encoder is not None and encoder.config.hidden_size != wide:
        raise UserError(f"its text_encoder gives {encoder.config.hidden_size} channels, and its transformer "
                        f"takes {wide} (caption_channels); give the text encoder that it was trained with")


# ---- two answers that most families give ------------------------------------------------------------------


def prompts(pipeline):
    return "text"


def has_null(pipeline):
    return True
