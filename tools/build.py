"""Builds the embedded Stable Diffusion at 64 pixels from data/scenes.py: CLIP, autoencoder, UNet,
in SD's own classes.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m tools.build
    python -m tools.build --stop-after autoencoder

The whole takes hours on two cores, and goes on where it was when it is run again.

Order of work: draw the pictures, train the autoencoder (64 x 64 x 3 to 8 x 8 x 16, f = 8), train a
small CLIP (its text tower becomes the pipeline's text encoder), train the judge (for evaluation
alone), cache the latents, train the UNet.
Everything is kept under --runs and reused when the command is run again.
"""
import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from data import scenes
from evaluation import judge
from tools import tiny

TOKENS = 16                 # text length of make_tokenizer; the longest caption has 12 tokens
CHANNELS = 16               # of the latents, as SD3's and FLUX's
WIDTH = 128                 # of both CLIP towers, and so of the UNet's cross attention

# ---- what is built, in SD's own classes --------------------------------------------------------------------


def make_clip(tokenizer):
    """A CLIPModel: 8-pixel patches, three layers in the image tower, two in the text tower."""
    tower = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=4)
    text = dict(tower, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)
    vision = dict(tower, num_hidden_layers=3, image_size=scenes.SIZE, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def make_autoencoder():
    """An AutoencoderTiny of factor 8: 64 x 64 pixels to 8 x 8 latents. AutoencoderKL of the same
    quality decodes twice as long. The blocks stand where they are cheap, at 8 x 8 and 16 x 16."""
    return AutoencoderTiny(encoder_block_out_channels=(40,) * 4, decoder_block_out_channels=(40,) * 4,
                           num_encoder_blocks=(0, 0, 2, 4), num_decoder_blocks=(4, 3, 1, 0),
                           latent_channels=CHANNELS)


def make_unet():
    """SD's UNet2DConditionModel with two levels: 6.6 M parameters, attention at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 8, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1,
        block_out_channels=(96, 160), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH, norm_num_groups=16,
        attention_head_dim=4)      # in this class the NUMBER of heads


def cached(path, shape, dtype, make, chunk=2048):
    """A memory-mapped array of n rows, made chunk by chunk where an earlier start has stopped;
    rank 0 makes it.
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


# ---- the story ---------------------------------------------------------------------------------------------


def build(runs, pictures, autoencoder_updates, clip_updates, judge_updates, unet_updates, stop_after):
    """Train the networks in turn, each once."""
    runs.mkdir(parents=True, exist_ok=True)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    plans = scenes.plan(pictures, torch.Generator().manual_seed(0), only=False)

    def draw(first, last):
        images = torch.cat([scenes.render(part) for part in plans[first:last].split(256)])
        return ((images + 1) * 127.5).round().byte().numpy()
    images = cached(runs / "images.npy", (pictures, 3, scenes.SIZE, scenes.SIZE), np.uint8, draw)

    def rows_of(batch, generator):
        return torch.randint(pictures, (batch // world,), generator=generator)

    def pixels(rows):
        rows = torch.from_numpy(images[rows.numpy()]).contiguous(memory_format=torch.channels_last)
        return rows.float() / 127.5 - 1

    # autoencoder, in two cycles of the learning rate; the second with less noise before the decoder
    autoencoder = tiny.Reconstruct(make_autoencoder().to(memory_format=torch.channels_last))
    for name, updates, lr, noise in (("autoencoder", autoencoder_updates, 3e-3, 1.0),
                                     ("autoencoder-2", autoencoder_updates, 2e-3, 0.4)):
        def autoencoder_batch(generator, noise=noise):
            rows = rows_of(32, generator)
            return pixels(rows), noise * torch.randn(len(rows), CHANNELS, 8, 8, generator=generator)
        tiny.fit(name, autoencoder, tiny.autoencoder_loss, autoencoder_batch, updates, lr, runs,
                 ema_decay=0.999)
    vae = autoencoder.autoencoder.eval()
    with torch.no_grad():
        test = scenes.render(scenes.plan(256, torch.Generator().manual_seed(1)))
        error = (vae.decode(vae.encode(test).latents).sample.clamp(-1, 1) - test).square()
        psnr = (10 * (4 / error.mean((1, 2, 3))).log10()).mean()
    print(f"autoencoder: {psnr:.2f} dB mean PSNR on 256 fresh scenes")
    if stop_after == "autoencoder":
        return

    # CLIP; a scene's caption is drawn anew each time
    tokenizer = tiny.make_tokenizer(scenes.vocabulary())

    def tokens_of(rows, generator):
        chosen = plans[rows].clone()
        for i, table in enumerate(scenes.LEVELS):
            of_count = (chosen[:, 0] == i + 1).nonzero()[:, 0]
            chosen[of_count, 6] = torch.multinomial(torch.tensor(list(table.values())), max(1, len(of_count)),
                                                    True, generator=generator)[:len(of_count)].float()
        captions = scenes.describe(chosen)[0]
        return tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids

    def clip_batch(generator):
        rows = rows_of(256, generator)
        return pixels(rows), tokens_of(rows, generator)
    clip = make_clip(tokenizer)
    tiny.fit("clip", clip, tiny.clip_loss, clip_batch, clip_updates, 1e-3, runs, ema_decay=0.995)
    clip.eval()
    if stop_after == "clip":
        return

    # the judge, for evaluation alone
    def judge_batch(generator):
        rows = rows_of(64, generator)
        return judge.augment(pixels(rows), generator), plans[rows]
    tiny.fit("judge", judge.Judge().to(memory_format=torch.channels_last), lambda model, batch:
             judge.loss(model, *batch), judge_batch, judge_updates, 1e-3, runs, ema_decay=0.995)
    if stop_after == "judge":
        return

    # latents, once; UNet
    @torch.no_grad()
    def encode(first, last):
        return torch.cat([vae.encode(pixels(rows)).latents.half()
                          for rows in torch.arange(first, last).split(256)]).numpy()
    latents = torch.from_numpy(np.array(cached(runs / "latents.npy", (pictures, CHANNELS, 8, 8), np.float16,
                                               encode)))
    scale = round(1 / latents[:8192].float().std().item(), 4)
    scheduler = tiny.make_scheduler()

    def unet_batch(generator):
        rows = rows_of(64, generator)
        z_0 = latents[rows].float() * scale
        with torch.no_grad():
            text = clip.text_model(tokens_of(rows, generator)).last_hidden_state
        t = torch.randint(1000, (len(rows),), generator=generator)
        return z_0, text, t, torch.randn(z_0.shape, generator=generator)
    unet = make_unet().to(memory_format=torch.channels_last)      # 25% faster on a CPU
    tiny.fit("unet", unet, lambda model, batch: tiny.unet_loss(model, batch, scheduler.alphas_cumprod),
             unet_batch, unet_updates, 1.5e-3, runs, ema_decay=0.9995, snapshots=2000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/build"), help="checkpoints and caches")
    parser.add_argument("--pictures", type=int, default=131_072, help="training scenes to draw")
    parser.add_argument("--autoencoder-updates", type=int, default=4500, help="of batch 32")
    parser.add_argument("--clip-updates", type=int, default=1500, help="of batch 256")
    parser.add_argument("--judge-updates", type=int, default=2500, help="of batch 64")
    parser.add_argument("--unet-updates", type=int, default=24_000, help="of batch 64")
    parser.add_argument("--stop-after", choices=("autoencoder", "clip", "judge", "unet"), default="unet")
    build(**vars(parser.parse_args()))
