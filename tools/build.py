"""Builds the embedded Stable Diffusion from data/scenes.py, in SD's own classes.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m tools.build
    python -m tools.build --stop-after autoencoder

The whole takes some three hours on two cores, and goes on where it was when it is run again.

Order of work: train the autoencoder (64 x 64 x 3 to 8 x 8 x 16, f = 8), train a text encoder to tell
latents from captions, cache the latents, train the UNet; for evaluation alone, train the judge and a
small CLIP. assets/tiny-sd, assets/tiny-clip and assets/judge are written; python -m tools.cards
measures them.
Everything is kept under --runs and reused when the command is run again.
"""
import argparse
import functools
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, trainers
from tokenizers import models as token_models
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import export
from data import scenes
from evaluation import judge
from models.load import ASSETS, PLAIN
from tools import fitting

WORDS = 16                  # tokens for the caption, the longest of which has 14 with both ends

PLACES = (scenes.SIZE // scenes.PLACE) ** 2          # tokens after them, one a place of the picture

CHANNELS = 16               # of the latents, as SD3's and FLUX's

TEXT_WIDTH = 256            # of the text encoder, and so of the UNet's cross attention

GUIDANCE = 2.0              # that the UNet learns

GUIDED_FROM = 0.6           # of its updates: from where the learning rate falls

# ---- what is built, in SD's own classes --------------------------------------------------------------------


def make_tokenizer():
    """A CLIPTokenizer in which every word of the captions is one token; other words fall into
    letters."""
    words = scenes.vocabulary()
    letters = sorted(set("".join(words) + "abcdefghijklmnopqrstuvwxyz0123456789-'!,.?"))
    alphabet = letters + [letter + "</w>" for letter in letters]
    bpe = Tokenizer(token_models.BPE(end_of_word_suffix="</w>"))
    # the trainer breaks ties by number, and numbers letters in a random order unless they are given
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>",
                                  show_progress=False, special_tokens=alphabet)
    bpe.train_from_iterator(words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split())
              for merge in learned["merges"]]
    tokens = list(dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *alphabet,
                                 *sorted(learned["vocab"], key=learned["vocab"].get)]))
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges,
                         model_max_length=WORDS + PLACES)


def text_config(tokenizer, width, layers, length):
    """Of a CLIP text tower."""
    return dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=4,
                num_hidden_layers=layers, vocab_size=len(tokenizer), max_position_embeddings=length,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, projection_dim=64)


def make_clip(tokenizer):
    """The CLIPModel of the evaluation: 8-pixel patches, three layers in the image tower, two in the
    text tower."""
    vision = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, num_hidden_layers=3,
                  image_size=scenes.SIZE, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text_config(tokenizer, 128, 2, WORDS), vision_config=vision,
                                projection_dim=64))


def clip_loss(model, batch, step):
    """The symmetric contrastive loss of CLIP over the batch. Equal captions in a batch need no
    correction: the loss learns log p(image, text) / (p(image) p(text)) of the joint law it is
    shown."""
    images, tokens = batch
    logits = model(pixel_values=images, input_ids=tokens).logits_per_image
    target = torch.arange(len(images))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


class Painter(torch.nn.Module):
    """A stock CLIPTextModel (2.5 M parameters) and the layer by which it is trained: its last 16
    tokens, which see the whole caption as attention is causal, tell the latents of their place in the
    plainest scene that the caption can mean. What 303 objects look like is learned here, far more
    cheaply than in the UNet, which reads it by cross attention."""

    def __init__(self, tokenizer):
        super().__init__()
        config = text_config(tokenizer, TEXT_WIDTH, 3, WORDS + PLACES)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**config))
        self.head = torch.nn.Linear(TEXT_WIDTH, CHANNELS * 4)

    def forward(self, tokens):
        """(n, WORDS + PLACES) -> latents (n, CHANNELS, 8, 8)."""
        side = round(PLACES ** 0.5)
        places = self.head(self.text_encoder(tokens).last_hidden_state[:, WORDS:])
        return (places.view(-1, side, side, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
                .reshape(-1, CHANNELS, 2 * side, 2 * side))


def make_autoencoder():
    """An AutoencoderTiny of factor 8: 64 x 64 pixels to 8 x 8 latents. AutoencoderKL of the same
    quality decodes twice as long. The blocks stand where they are cheap, at 8 x 8 and 16 x 16."""
    return AutoencoderTiny(encoder_block_out_channels=(40,) * 4, decoder_block_out_channels=(40,) * 4,
                           num_encoder_blocks=(0, 0, 2, 4), num_decoder_blocks=(4, 3, 1, 0),
                           latent_channels=CHANNELS)


class Reconstruct(torch.nn.Module):
    """An autoencoder under one forward, so that DDP sees both halves."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images, noise):
        z = self.autoencoder.encode(images).latents
        return self.autoencoder.decode(z + noise).sample, z


def autoencoder_loss(model, batch, step):
    """Mean squared and absolute error, latents kept near zero mean and unit variance. The decoder
    sees a little noise, so that it forgives the diffusion model's small errors."""
    images, noise = batch
    output, z = model(images, noise)
    moments = z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean()
    error = output - images
    return error.square().mean() + 0.05 * error.abs().mean() + 0.01 * moments


@torch.no_grad()
def balance(autoencoder, images):
    """Turn the latents to their principal axes and take the square root of each variance, inside the
    autoencoder: one direction otherwise holds most of their energy, and the schedule's noise drowns
    all others at its first timesteps. The decoder's first layer undoes it, up to its own squashing of
    latents beyond 3.  images: (n, 3, H, W), of which the axes are taken."""
    z = autoencoder.encode(images).latents.transpose(0, 1).flatten(1)
    mean, (variances, axes) = z.mean(1), torch.linalg.eigh(torch.cov(z))
    factors = variances.pow(-0.25) / variances[-1].pow(0.25)      # the largest variance, the last, becomes 1
    there, back = factors[:, None] * axes.T, axes / factors
    last, first = autoencoder.encoder.layers[-1], autoencoder.decoder.layers[0]
    last.weight.copy_(torch.einsum("ij,jkhw->ikhw", there, last.weight))
    last.bias.copy_(there @ (last.bias - mean))
    first.bias.add_(torch.einsum("ijhw,j->i", first.weight, mean))
    first.weight.copy_(torch.einsum("ijhw,jk->ikhw", first.weight, back))


def make_unet():
    """SD's UNet2DConditionModel with two levels: 5.4 M parameters, attention at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 8, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1,
        block_out_channels=(80, 144), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16, attention_head_dim=4)      # in this class the NUMBER of heads


def unet_loss(model, batch, alphas_cumprod, guidance=1.0):
    """The diffusion loss: epsilon prediction, weighted as an error of v = alpha eps - sigma x,
    which is eps's error over alpha. Plain eps weights hardly see the noisiest tenth of the axis,
    where few-step sampling takes place.
    batch: z_0 and eps (n, C, h, w), text and null text (n, tokens, width), t (n,).
    guidance: above 1, the target is moved by a share of what the network itself says that the text
    changes (model-guidance, Tang et al. 2025). As this has the guidance in it already, the share is
    1 - 1 / guidance: told = eps + share (told - untold) where told = untold + guidance (eps - untold)."""
    z_0, text, null, t, eps = batch
    alpha = alphas_cumprod[t].sqrt()[:, None, None, None]
    z_t = alpha * z_0 + (1 - alpha ** 2).sqrt() * eps
    if guidance != 1:
        with torch.no_grad():
            twice = model(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([text, null])).sample
        told, untold = twice.chunk(2)
        eps = eps + (1 - 1 / guidance) * (told - untold)
    return ((model(z_t, t, text).sample - eps) / alpha).square().mean()


def make_scheduler(prediction="epsilon"):
    """SD 1.5's noise schedule, sampled as the students are: trailing DDIM down to clean data."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         clip_sample=False, set_alpha_to_one=True, steps_offset=1,
                         timestep_spacing="trailing", prediction_type=prediction)


def cached(path, count, make, chunk=2048):
    """`count` planned scenes and their latents, made once, each process its share.
    make(first, last) -> two tensors of rows.  Returns: the two as tensors, the latents in half
    precision."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = range(0, count, chunk)
    for start in tqdm(starts[rank::world], desc=path.stem, disable=rank > 0):
        file = path.with_name(f"{path.stem}-{start:08d}{path.suffix}")
        if not file.exists():
            plans, latents = make(start, min(start + chunk, count))
            save_file({"plans": plans, "latents": latents.half().contiguous()},
                      file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
    if world > 1:
        dist.barrier()
    parts = [load_file(path.with_name(f"{path.stem}-{start:08d}{path.suffix}")) for start in starts]
    return (torch.cat([part[key] for part in parts]) for key in ("plans", "latents"))


@torch.no_grad()
def encode(vae, images):
    """Latents of scenes, before their scale."""
    return torch.cat([vae.encode(part).latents for part in images.split(64)])


def scene_latents(vae, runs, pictures):
    """So many training scenes and their latents, before their scale, kept in `runs`.
    Returns: (plans, latents in half precision)."""
    def make(first, last):
        plans = scenes.plan(last - first, torch.Generator().manual_seed(1000 + first), held_out=False)
        return plans, encode(vae, scenes.render(plans).contiguous(memory_format=torch.channels_last))
    return cached(runs / "latents.safetensors", pictures, make)


# ---- the story ---------------------------------------------------------------------------------------------


def build(runs, pictures, autoencoder_updates, text_updates, unet_updates, judge_updates, clip_updates,
          stop_after):
    """Train the networks in turn, each once."""
    runs.mkdir(parents=True, exist_ok=True)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)

    def draw(batch, generator):
        plans = scenes.plan(batch // world, generator, held_out=False)
        return scenes.render(plans).contiguous(memory_format=torch.channels_last), plans

    # autoencoder; then its latents are balanced, and the decoder alone learns on
    autoencoder = Reconstruct(make_autoencoder().to(memory_format=torch.channels_last))
    vae = autoencoder.autoencoder

    def autoencoder_batch(generator, noise=0.05):
        images, _ = draw(32, generator)
        return images, noise * torch.randn(len(images), CHANNELS, 8, 8, generator=generator)
    fitting.fit("autoencoder", autoencoder, autoencoder_loss, autoencoder_batch, autoencoder_updates, 3e-3,
                runs, ema_decay=0.998)
    some = min(4096, pictures) * world                     # scenes of which moments are taken
    balance(vae, draw(some, torch.Generator().manual_seed(1))[0])
    vae.encoder.requires_grad_(False)
    fitting.fit("decoder", autoencoder, autoencoder_loss, functools.partial(autoencoder_batch, noise=0.02),
                autoencoder_updates // 2, 2e-3, runs, ema_decay=0.998)
    vae.eval()
    with torch.no_grad():
        test = scenes.render(scenes.plan(256, torch.Generator().manual_seed(1)))
        error = (vae.decode(vae.encode(test).latents).sample.clamp(-1, 1) - test).square()
        psnr = (10 * (4 / error.mean((1, 2, 3))).log10()).mean()
    print(f"autoencoder: {psnr:.2f} dB mean PSNR on 256 fresh scenes")
    if stop_after == "autoencoder":
        return

    # the text encoder, on the latents of the plainest scenes
    tokenizer = make_tokenizer()

    def tokens_of(plans, length=WORDS + PLACES):
        return tokenizer(scenes.describe(plans)[0], padding="max_length", max_length=length, truncation=True,
                         return_tensors="pt").input_ids

    scale = round(1 / encode(vae, draw(some, torch.Generator().manual_seed(2))[0]).std().item(), 4)

    def text_batch(generator):
        plans = scenes.plan(128 // world, generator, held_out=False)
        images = scenes.render(scenes.plainest(plans)).contiguous(memory_format=torch.channels_last)
        return tokens_of(plans), scale * encode(vae, images)
    painter = Painter(tokenizer)
    fitting.fit("text", painter, lambda model, batch, step: (model(batch[0]) - batch[1]).square().mean(),
                text_batch, text_updates, 2e-3, runs, ema_decay=0.998)
    text_encoder = painter.text_encoder.eval().requires_grad_(False)
    if stop_after == "text":
        return

    # the UNet; a scene's caption is drawn anew each time
    plans, latents = scene_latents(vae, runs, pictures)
    scheduler = make_scheduler()
    null = tokenizer([""], padding="max_length", return_tensors="pt").input_ids

    def unet_batch(generator):
        rows = torch.randint(pictures, (64 // world,), generator=generator)
        z_0 = scale * latents[rows].float()
        with torch.no_grad():
            text = text_encoder(torch.cat([tokens_of(scenes.recaption(plans[rows], generator)),
                                           null])).last_hidden_state
        t = torch.randint(1000, (len(rows),), generator=generator)
        eps = torch.randn(z_0.shape, generator=generator)
        return z_0, text[:-1], text[-1:].expand(len(rows), -1, -1), t, eps
    unet = make_unet().to(memory_format=torch.channels_last)      # 25% faster on a CPU

    def loss(model, batch, step):
        guided = step >= GUIDED_FROM * unet_updates
        return unet_loss(model, batch, scheduler.alphas_cumprod, GUIDANCE if guided else 1.0)
    fitting.fit("unet", unet, loss, unet_batch, unet_updates, 2e-3, runs, ema_decay=0.9995, snapshots=500)
    if stop_after == "unet":
        return

    # for evaluation alone: the judge, and CLIP
    def judge_batch(generator):
        images, plans = draw(64, generator)
        return judge.augment(images, generator), plans
    judged = judge.Judge().to(memory_format=torch.channels_last)
    fitting.fit("judge", judged, lambda model, batch, step: judge.loss(model, *batch), judge_batch,
                judge_updates, 2e-3, runs, ema_decay=0.995)

    def clip_batch(generator):
        images, plans = draw(256, generator)
        return images, tokens_of(plans, WORDS)
    clip = make_clip(tokenizer)
    fitting.fit("clip", clip, clip_loss, clip_batch, clip_updates, 2e-3, runs, ema_decay=0.995)
    if int(os.environ.get("RANK", 0)) == 0:
        vae.register_to_config(scaling_factor=scale)
        parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet.eval())
        save(StableDiffusionPipeline(**parts, scheduler=scheduler, **PLAIN), clip.eval(), judged)


def save(pipeline, clip, judged):
    """Write assets/tiny-sd, assets/tiny-clip and assets/judge in fp16, and the words that the model
    knows. Their cards are tools/cards.py's."""
    pipeline.to(dtype=torch.float16).save_pretrained(ASSETS / "tiny-sd", safe_serialization=True)
    (ASSETS / "tiny-sd" / "vocabulary.json").write_text(json.dumps(scenes.vocabulary()))
    clip.half().save_pretrained(ASSETS / "tiny-clip", safe_serialization=True)
    pipeline.tokenizer.save_pretrained(ASSETS / "tiny-clip")
    for folder in ("tiny-sd", "tiny-clip"):
        export.make_portable(ASSETS / folder)
    (ASSETS / "judge").mkdir(exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in judged.state_dict().items()},
              ASSETS / "judge" / "judge.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/build"), help="checkpoints and caches")
    parser.add_argument("--pictures", type=int, default=65_536, help="scenes that the UNet is trained on")
    parser.add_argument("--autoencoder-updates", type=int, default=2400,
                        help="of batch 32, then half as many of the decoder")
    parser.add_argument("--text-updates", type=int, default=2000, help="of batch 128")
    parser.add_argument("--unet-updates", type=int, default=5600, help="of batch 64")
    parser.add_argument("--judge-updates", type=int, default=1200, help="of batch 64")
    parser.add_argument("--clip-updates", type=int, default=500, help="of batch 256")
    parser.add_argument("--stop-after", choices=("autoencoder", "text", "unet", "all"), default="all")
    build(**vars(parser.parse_args()))
