"""Builds the embedded Stable Diffusion at 64 pixels from data/scenes.py: CLIP, autoencoder, UNet, in SD's own classes.

    torchrun --nproc_per_node=2 -m tools.build      # hours on two cores; resumable, run it again to go on
    python -m tools.build --stop-after autoencoder  # a part of it

Order of work: draw the pictures, train the autoencoder (64 x 64 x 3 to 8 x 8 x 16, f = 8), train a small CLIP (its text tower becomes
the pipeline's text encoder), cache the latents, train the UNet. Everything is kept under --runs and reused when the command is run again.
"""
import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, trainers
from tokenizers import models as token_models
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from data import scenes

TOKENS = 16                 # text length; the longest caption has 12 tokens
CHANNELS = 16               # of the latents, as SD3's and FLUX's
WIDTH = 128                 # of both CLIP towers, and so of the UNet's cross attention

# ---- what is built, in SD's own classes ----------------------------------------------------------------------------


def make_tokenizer():
    """A CLIPTokenizer in whose vocabulary every word of the captions is one token; other words fall into letters."""
    letters = sorted(set("".join(scenes.vocabulary()) + "abcdefghijklmnopqrstuvwxyz0123456789-'!,.?"))
    alphabet = letters + [letter + "</w>" for letter in letters]
    bpe = Tokenizer(token_models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(scenes.vocabulary(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in learned["merges"]]
    tokens = list(dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *alphabet,
                                 *sorted(learned["vocab"], key=learned["vocab"].get)]))
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=TOKENS)


def make_clip(tokenizer):
    """A CLIPModel: 8-pixel patches, three layers in the image tower, two in the text tower."""
    tower = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=4)
    text = dict(tower, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(tower, num_hidden_layers=3, image_size=scenes.SIZE, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def make_autoencoder():
    """An AutoencoderTiny of factor 8: 64 x 64 pixels to 8 x 8 latents. AutoencoderKL of the same quality decodes twice as long."""
    return AutoencoderTiny(encoder_block_out_channels=(48,) * 4, decoder_block_out_channels=(48,) * 4,
                           num_encoder_blocks=(0, 1, 2, 3), num_decoder_blocks=(3, 2, 1, 0), latent_channels=CHANNELS)


def make_unet():
    """SD's UNet2DConditionModel with two levels: 6.6 M parameters, attention at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 8, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1,
        block_out_channels=(96, 160), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH, norm_num_groups=16,
        attention_head_dim=4)      # in this class the NUMBER of heads


def make_scheduler(prediction="epsilon"):
    """SD 1.5's noise schedule, sampled as the students are: trailing DDIM down to clean data."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing", prediction_type=prediction)


# ---- one loop trains all networks ----------------------------------------------------------------------------------


def fit(name, model, loss_fn, batches, updates, lr, runs, ema_decay=0.0):
    """Train model in place: AdamW, linear warm-up and cosine decay, EMA, atomic checkpoints, resumed when found.
    loss_fn(model, batch) -> scalar; batches(generator) -> one rank's batch. Update i draws from its own generator, so
    that a resumed run sees the same data as an uninterrupted one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    finished, checkpoint = runs / f"{name}.safetensors", runs / f"{name}-checkpoint.pt"
    if finished.exists():
        model.load_state_dict(load_file(finished))
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, i / updates)))))
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        start = state["update"]
    wrapped = DistributedDataParallel(model) if world > 1 else model
    model.train()
    average, saved = None, time.time()
    bar = tqdm(range(start, updates), initial=start, total=updates, desc=name, disable=rank > 0, mininterval=30)
    for update in bar:
        generator = torch.Generator().manual_seed(1_000_003 * update + rank)
        loss = loss_fn(wrapped, batches(generator))
        if not torch.isfinite(loss):
            raise SystemExit(f"{name}: loss {loss.item()} at update {update}; delete {checkpoint} and lower the rate {lr}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
        if rank == 0 and (time.time() - saved > 120 or update == updates - 1):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                     "ema": ema.state_dict(), "update": update + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            saved = time.time()
    ema.copy_to(model.parameters())
    if rank == 0:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, finished)
        checkpoint.unlink(missing_ok=True)
    if world > 1:
        dist.barrier()


def cached(path, shape, dtype, make, chunk=2048):
    """A memory-mapped array of n rows, made chunk by chunk where an earlier start has stopped; rank 0 makes it.
    make(first, last) -> rows.  Returns: the array, read-only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        progress = path.with_suffix(".done")
        array = np.lib.format.open_memmap(path, "r+" if path.exists() else "w+", dtype, shape)
        first = int(progress.read_text()) if progress.exists() else 0
        for start in tqdm(range(first, shape[0], chunk), desc=path.stem, mininterval=30):
            array[start:start + chunk] = make(start, min(start + chunk, shape[0]))
            array.flush()
            progress.write_text(str(start + chunk))
    if dist.is_initialized():
        dist.barrier()
    return np.load(path, mmap_mode="r")


# ---- losses of the three networks ----------------------------------------------------------------------------------


def clip_loss(model, batch):
    """The symmetric contrastive loss of CLIP over the batch. Equal captions in a batch need no correction: the loss
    learns log p(image, text) / (p(image) p(text)) of the joint law it is shown."""
    images, tokens = batch
    logits = model(pixel_values=images, input_ids=tokens).logits_per_image
    target = torch.arange(len(images))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Reconstruct(torch.nn.Module):
    """Autoencoder under one forward, so that DDP sees both halves."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images, noise):
        z = self.autoencoder.encode(images).latents
        return self.autoencoder.decode(z + 0.05 * noise).sample, z


def autoencoder_loss(model, batch):
    """Mean squared and absolute error; latents kept at zero mean and unit variance per channel; the decoder sees a
    little noise, so that it forgives the diffusion model's small errors."""
    images, noise = batch
    output, z = model(images, noise)
    moments = z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean()
    error = output - images
    return error.square().mean() + 0.05 * error.abs().mean() + 0.01 * moments


def unet_loss(model, batch, alphas_cumprod):
    """The diffusion loss: epsilon prediction, weighted as an error of v = alpha eps - sigma x, which is eps's error over
    alpha. Plain eps weights hardly see the noisiest tenth of the axis, where few-step sampling takes place."""
    z_0, text, t, eps = batch
    alpha = alphas_cumprod[t].sqrt()[:, None, None, None]
    z_t = alpha * z_0 + (1 - alpha ** 2).sqrt() * eps
    return ((model(z_t, t, text).sample - eps) / alpha).square().mean()


# ---- the story -----------------------------------------------------------------------------------------------------


def build(runs, pictures, autoencoder_updates, clip_updates, unet_updates, stop_after):
    """Train the networks in turn, each once."""
    runs.mkdir(parents=True, exist_ok=True)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() if world == 1 else 1)) if "OMP_NUM_THREADS" not in os.environ else
                          int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    plans = scenes.plan(pictures, torch.Generator().manual_seed(0), only=False)

    def draw(first, last):
        images = torch.cat([scenes.render(part) for part in plans[first:last].split(256)])
        return ((images + 1) * 127.5).round().byte().numpy()
    images = cached(runs / "images.npy", (pictures, 3, scenes.SIZE, scenes.SIZE), np.uint8, draw)

    def rows_of(batch, generator):
        return torch.randint(pictures, (batch // world,), generator=generator)

    def pixels(rows):
        return torch.from_numpy(images[rows.numpy()]).float() / 127.5 - 1

    # autoencoder
    def autoencoder_batch(generator):
        rows = rows_of(32, generator)
        return pixels(rows), torch.randn(len(rows), CHANNELS, 8, 8, generator=generator)
    autoencoder = Reconstruct(make_autoencoder().to(memory_format=torch.channels_last))
    fit("autoencoder", autoencoder, autoencoder_loss, autoencoder_batch, autoencoder_updates, 2e-3, runs, ema_decay=0.999)
    vae = autoencoder.autoencoder.eval()
    with torch.no_grad():
        test = scenes.render(scenes.plan(256, torch.Generator().manual_seed(1)))
        psnr = (10 * (4 / (vae.decode(vae.encode(test).latents).sample.clamp(-1, 1) - test).square().mean((1, 2, 3))).log10()).mean()
    print(f"autoencoder: {psnr:.2f} dB mean PSNR on 256 fresh scenes")
    if stop_after == "autoencoder":
        return

    # CLIP; a scene's caption is drawn anew each time
    tokenizer = make_tokenizer()

    def tokens_of(rows, generator):
        chosen = plans[rows].clone()
        for i, table in enumerate(scenes.LEVELS):
            of_count = (chosen[:, 0] == i + 1).nonzero()[:, 0]
            chosen[of_count, 6] = torch.multinomial(torch.tensor(list(table.values())), max(1, len(of_count)), True,
                                                    generator=generator)[:len(of_count)].float()
        captions = scenes.describe(chosen)[0]
        return tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids

    def clip_batch(generator):
        rows = rows_of(256, generator)
        return pixels(rows), tokens_of(rows, generator)
    clip = make_clip(tokenizer)
    fit("clip", clip, clip_loss, clip_batch, clip_updates, 1e-3, runs, ema_decay=0.995)
    clip.eval()
    if stop_after == "clip":
        return

    # latents, once; UNet
    @torch.no_grad()
    def encode(first, last):
        return torch.cat([vae.encode(pixels(rows)).latents.half() for rows in torch.arange(first, last).split(256)]).numpy()
    latents = torch.from_numpy(np.array(cached(runs / "latents.npy", (pictures, CHANNELS, 8, 8), np.float16, encode)))
    scale = round(1 / latents[:8192].float().std().item(), 4)
    scheduler = make_scheduler()

    def unet_batch(generator):
        rows = rows_of(64, generator)
        z_0 = latents[rows].float() * scale
        with torch.no_grad():
            text = clip.text_model(tokens_of(rows, generator)).last_hidden_state
        t = torch.randint(1000, (len(rows),), generator=generator)
        return z_0, text, t, torch.randn(z_0.shape, generator=generator)
    unet = make_unet()
    fit("unet", unet, lambda model, batch: unet_loss(model, batch, scheduler.alphas_cumprod), unet_batch, unet_updates,
        1.5e-3, runs, ema_decay=0.9995)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/build"), help="checkpoints and caches")
    parser.add_argument("--pictures", type=int, default=131_072, help="training scenes to draw")
    parser.add_argument("--autoencoder-updates", type=int, default=8000, help="of batch 32")
    parser.add_argument("--clip-updates", type=int, default=1500, help="of batch 256")
    parser.add_argument("--unet-updates", type=int, default=40_000, help="of batch 64")
    parser.add_argument("--stop-after", choices=("autoencoder", "clip", "unet"), default="unet")
    build(**vars(parser.parse_args()))
