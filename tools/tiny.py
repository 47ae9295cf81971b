"""Builds the embedded default: Stable Diffusion's own architecture and classes at 1/200 of its
size, trained on sprites.

    torchrun --nproc_per_node=2 -m tools.tiny
    OMP_NUM_THREADS=1 python -m tools.tiny --pixel

The first takes an hour and a half on two cores (twice that without torchrun), the second, the
class-conditional model in pixels, half an hour on one. Either goes on where it was when it is run
again.

Order of work: draw the pictures (sprites.py), train a small CLIP on them (its text tower becomes
the pipeline's text encoder, both towers serve the evaluation), train the autoencoder, cache latents
and text embeddings, train the UNet.
Result: assets/tiny-sd, a complete StableDiffusionPipeline folder in fp16, and assets/tiny-clip.
The last step measures what was built and writes the model card, assets/tiny-sd/README.md.

--pixel builds assets/tiny-pixel instead: a small UNet2DModel that draws the same pictures at 16 x
16 pixels, without an autoencoder or text, given one of the eight groups of objects as its class;
the domain of Simple ReFlow.
"""
import argparse
import datetime
import json
import math
import os
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, trainers
from tokenizers import models as token_models
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

import export
import models
import sampler
from data.captioned import sprites
from evaluation import measuring, metrics, protocols
from models import saved

ASSETS = Path(__file__).parent.parent / "assets"

TOKENS = 16                 # text length; the longest caption has 6 words

LATENT_CHANNELS = 8         # 4 as in SD lose the fine black lines at 32 px

WIDTH = 128                 # of both CLIP towers, and so of the UNet's cross attention

PIXEL_SIZE = 16             # of the pixel model's pictures

LABELS = list(sprites.OBJECTS)      # its classes by number; one more is the null class, ""

# ---- what is built, in SD's own classes --------------------------------------------------------------------


def make_tokenizer(vocabulary=None):
    """A CLIPTokenizer in which every word of the captions is one token; other words fall into
    letters. vocabulary: the words."""
    words = sprites.vocabulary() if vocabulary is None else vocabulary
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
                         model_max_length=TOKENS)


def make_clip(tokenizer):
    """A CLIPModel of 1.1 M parameters: 8-pixel patches, four layers in the image tower, two in the
    text tower."""
    tower = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=4)
    text = dict(tower, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)
    vision = dict(tower, num_hidden_layers=4, image_size=sprites.SIZE, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def make_autoencoder():
    """An AutoencoderTiny of factor 4: 32 x 32 pixels to 8 x 8 latents."""
    return diffusers.AutoencoderTiny(encoder_block_out_channels=(48, 48, 48), decoder_block_out_channels=(48, 48, 48),
                           num_encoder_blocks=(0, 1, 2), num_decoder_blocks=(2, 1, 0),
                           latent_channels=LATENT_CHANNELS)


def make_unet():
    """SD's UNet2DConditionModel with two levels: 4.3 M parameters, attention at 4 x 4."""
    return diffusers.UNet2DConditionModel(
        sample_size=sprites.SIZE // 4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(80, 128), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH, norm_num_groups=16,
        attention_head_dim=4)      # in this class the NUMBER of heads


def make_pixel_unet():
    """A class-conditional UNet2DModel with three levels: 1.9 M parameters, attention at 8 x 8 and 4
    x 4."""
    return diffusers.UNet2DModel(
        sample_size=PIXEL_SIZE, layers_per_block=1, block_out_channels=(32, 64, 96), norm_num_groups=8,
        attention_head_dim=16, down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=len(LABELS) + 1)


def make_scheduler(prediction="epsilon"):
    """SD 1.5's noise schedule, sampled as the students are: trailing DDIM down to clean data."""
    return diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing",
                         prediction_type=prediction)


# ---- one loop trains all three networks --------------------------------------------------------------------


def fit(name, model, loss_fn, batches, steps, lr, runs, ema_decay=0.0, snapshots=0):
    """Train model in place: AdamW, linear warm-up and cosine decay, EMA, atomic checkpoints,
    resumed when found.
    loss_fn(model, batch) -> scalar; batches(generator) -> one rank's batch. Step i draws from its
    own generator, so that a resumed run sees the same data as an uninterrupted one.
    snapshots: updates between copies of the average, kept for a curve over training; 0 = none."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    finished, checkpoint = runs / f"{name}.safetensors", runs / f"{name}-checkpoint.pt"
    if finished.exists():
        return model.load_state_dict(load_file(finished))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, i / steps)))))
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        start = state["step"]
    wrapped = DistributedDataParallel(model) if world > 1 else model
    model.train()
    average, saved = None, time.time()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, disable=rank > 0, mininterval=5)
    for step in bar:
        generator = torch.Generator().manual_seed(1_000_003 * step + rank)
        loss = loss_fn(wrapped, batches(generator))
        if not torch.isfinite(loss):
            raise SystemExit(f"{name}: loss {loss.item()} at step {step}; delete {checkpoint} and lower lr "
                             f"{lr}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
        if rank == 0 and (time.time() - saved > 60 or step == steps - 1):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict(), "ema": ema.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            saved = time.time()
        if rank == 0 and snapshots and (step + 1) % snapshots == 0 and step + 1 < steps:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            save_file({key: value.half().contiguous() for key, value in model.state_dict().items()},
                      runs / f"{name}-{step + 1:06d}.safetensors")
            ema.restore(model.parameters())
    ema.copy_to(model.parameters())
    if rank == 0:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, finished)
        checkpoint.unlink(missing_ok=True)
    if world > 1:
        dist.barrier()


def cached(path, make):
    """The array at path; rank 0 makes it first if it is not there."""
    if (not dist.is_initialized() or dist.get_rank() == 0) and not path.exists():
        with open(path.with_suffix(".part"), "wb") as file:
            np.save(file, make())
        os.replace(path.with_suffix(".part"), path)
    if dist.is_initialized():
        dist.barrier()
    return np.load(path, mmap_mode="r")


def draw_all(n, chunk=4096):
    """n training images as uint8 (n, 3, 32, 32), and beside them the caption of every level, as
    indices (n, levels)."""
    generator = torch.Generator().manual_seed(0)
    captions = all_captions()
    index = {caption: i for i, caption in enumerate(captions)}
    images, indices = [], []
    for start in tqdm(range(0, n, chunk), desc="pictures"):
        x, _, facts = sprites.draw(min(chunk, n - start), generator, held_out=False)
        images.append(((x + 1) * 127.5).round().byte().numpy())
        indices += [[index[level.format(**fact)] for level in sprites.LEVELS] for fact in facts]
    return np.concatenate(images), np.array(indices, dtype=np.int64)


def all_captions():
    """Every caption of every level, in a fixed order; held-out pairs included (they are never
    trained on)."""
    names, categories, _ = sprites.load_sheet()
    facts = [{"object": o, "category": c, "background": b} for o, c in zip(names, categories)
             for b in sprites.BACKGROUNDS]
    return list(dict.fromkeys(level.format(**fact) for level in sprites.LEVELS for fact in facts))


# ---- losses of the three networks --------------------------------------------------------------------------


def clip_loss(model, batch):
    """The symmetric contrastive loss of CLIP over the batch. Equal captions in a batch need no
    correction: the loss learns log p(image, text) / (p(image) p(text)) of the joint law it is
    shown."""
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
    """Mean squared and absolute error; latents kept at zero mean and unit variance per channel;
    the decoder sees a little noise, so that it forgives the diffusion model's small errors."""
    images, noise = batch
    output, z = model(images, noise)
    moments = z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean()
    error = output - images
    return error.square().mean() + 0.05 * error.abs().mean() + 0.01 * moments


def unet_loss(model, batch, alphas_cumprod):
    """The diffusion loss: epsilon prediction, weighted as an error of v = alpha eps - sigma x,
    which is eps's error over alpha. Plain eps weights hardly see the noisiest tenth of the axis,
    where few-step sampling takes place."""
    z_0, text, t, eps = batch
    alpha = alphas_cumprod[t].sqrt()[:, None, None, None]
    z_t = alpha * z_0 + (1 - alpha ** 2).sqrt() * eps
    return ((model(z_t, t, text).sample - eps) / alpha).square().mean()


def pixel_loss(model, batch, alphas_cumprod):
    """The diffusion loss of v_prediction, v = alpha eps - sigma x, unweighted: what unet_loss
    weights epsilon's error to."""
    x, classes, t, eps = batch
    alpha = alphas_cumprod[t].sqrt()[:, None, None, None]
    sigma = (1 - alpha ** 2).sqrt()
    return (model(alpha * x + sigma * eps, t, class_labels=classes).sample -
            (alpha * eps - sigma * x)).square().mean()


# ---- the story ---------------------------------------------------------------------------------------------


def build(runs, pictures, clip_steps, autoencoder_steps, unet_steps):
    """Train all three networks and save the two folders. Returns: the StableDiffusionPipeline, in
    fp32."""
    runs.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        # one process may work alone for hours
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        torch.set_num_threads(max(1, os.cpu_count() // world))
    torch.manual_seed(0)

    def draw_once():
        images, indices = draw_all(pictures)
        np.save(runs / "captions.npy", indices)
        return images
    images = cached(runs / "images.npy", draw_once)
    indices = torch.from_numpy(np.load(runs / "captions.npy"))
    level_weights = torch.tensor(list(sprites.LEVELS.values()))

    def choose(batch, generator):
        """Row numbers of a batch, and for each the index of a caption at a random level."""
        rows = torch.randint(len(images), (batch // world,), generator=generator)
        levels = torch.multinomial(level_weights, len(rows), replacement=True, generator=generator)
        return rows, indices[rows, levels]

    def pixels(rows):
        return torch.from_numpy(images[rows.numpy()]).float() / 127.5 - 1

    # CLIP
    tokenizer = make_tokenizer()
    tokens = tokenizer(all_captions(), padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids

    def clip_batch(generator):
        rows, captions = choose(512, generator)
        return pixels(rows), tokens[captions]
    clip = make_clip(tokenizer)
    fit("clip", clip, clip_loss, clip_batch, clip_steps, 1e-3, runs, ema_decay=0.995)
    clip.eval()

    # autoencoder
    def autoencoder_batch(generator):
        rows, _ = choose(32, generator)
        return pixels(rows), torch.randn(len(rows), LATENT_CHANNELS, 8, 8, generator=generator)
    autoencoder = Reconstruct(make_autoencoder())
    fit("autoencoder", autoencoder, autoencoder_loss, autoencoder_batch, autoencoder_steps, 2e-3, runs,
        ema_decay=0.999)
    vae = autoencoder.autoencoder.eval()

    # latents and text embeddings, once
    @torch.no_grad()
    def encode_all():
        return np.concatenate([vae.encode(pixels(rows)).latents.half().numpy()
                               for rows in tqdm(torch.arange(len(images)).split(1024), desc="latents")])
    latents = torch.from_numpy(np.array(cached(runs / "latents.npy", encode_all)))
    vae.register_to_config(scaling_factor=round(1 / latents[:8192].float().std().item(), 4))
    with torch.no_grad():
        text = torch.cat([clip.text_model(chunk).last_hidden_state for chunk in tokens.split(512)])

    # UNet
    scheduler = make_scheduler()

    def unet_batch(generator):
        rows, captions = choose(64, generator)
        z_0 = latents[rows].float() * vae.config.scaling_factor
        t = torch.randint(1000, (len(rows),), generator=generator)
        return z_0, text[captions], t, torch.randn(z_0.shape, generator=generator)
    unet = make_unet()
    fit("unet", unet, lambda model, batch: unet_loss(model, batch, scheduler.alphas_cumprod), unet_batch,
        unet_steps, 1.5e-3, runs, ema_decay=0.999)

    text_encoder = CLIPTextModel(clip.config.text_config)
    getattr(text_encoder, "text_model", text_encoder).load_state_dict(clip.text_model.state_dict())
    pipeline = diffusers.StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
                                       unet=unet.eval(),
                                       scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                       requires_safety_checker=False)
    if rank == 0:
        save(pipeline, clip)
    return pipeline


def save(pipeline, clip):
    """Write assets/tiny-sd and assets/tiny-clip in fp16, and the list of words the model knows."""
    pipeline.to(dtype=torch.float16).save_pretrained(ASSETS / "tiny-sd", safe_serialization=True)
    (ASSETS / "tiny-sd" / "vocabulary.json").write_text(json.dumps(sprites.vocabulary()))
    clip.half().save_pretrained(ASSETS / "tiny-clip", safe_serialization=True)
    pipeline.tokenizer.save_pretrained(ASSETS / "tiny-clip")
    for folder in ("tiny-sd", "tiny-clip"):
        export.make_portable(ASSETS / folder)
    pipeline.to(dtype=torch.float32), clip.float()


def build_pixel(runs, pictures, steps):
    """Train the pixel model and save assets/tiny-pixel in fp16.  Returns: the DDIMPipeline, in
    fp32."""
    runs.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    def draw_once(chunk=4096):
        generator = torch.Generator().manual_seed(0)
        images, classes, (_, categories, _) = [], [], sprites.load_sheet()
        for start in tqdm(range(0, pictures, chunk), desc="pictures"):
            plans = sprites.plan(min(chunk, pictures - start), generator, held_out=False)
            images.append(((sprites.render(plans, PIXEL_SIZE) + 1) * 127.5).round().byte().numpy())
            classes += [LABELS.index(categories[int(row)]) for row in plans[:, 0]]
        np.save(runs / "classes.npy", np.array(classes, dtype=np.int64))
        return np.concatenate(images)
    images = torch.from_numpy(np.array(cached(runs / "pixels.npy", draw_once)))
    classes, scheduler = torch.from_numpy(np.load(runs / "classes.npy")), make_scheduler("v_prediction")

    def batch(generator):
        rows = torch.randint(len(images), (64,), generator=generator)
        x = images[rows].float() / 127.5 - 1
        named = torch.rand(len(rows), generator=generator) >= sprites.GROUP_LEVELS[""]
        t = torch.randint(1000, (len(rows),), generator=generator)
        return x, torch.where(named, classes[rows], len(LABELS)), t, torch.randn(x.shape, generator=generator)
    unet = make_pixel_unet()
    fit("pixel", unet, lambda model, batch: pixel_loss(model, batch, scheduler.alphas_cumprod), batch, steps,
        1e-3, runs, ema_decay=0.999)
    pipeline = diffusers.DDIMPipeline(unet=unet.eval(), scheduler=scheduler)
    pipeline.to(dtype=torch.float16).save_pretrained(ASSETS / "tiny-pixel", safe_serialization=True)
    (ASSETS / "tiny-pixel" / "labels.json").write_text(json.dumps(LABELS))
    return pipeline.to(dtype=torch.float32)


def measure(n=2048):
    """Measure what lies in assets/ and write the model card, assets/tiny-sd/README.md."""
    pipeline, model, _ = saved.open_model("tiny")
    clip = metrics.Clip(ASSETS / "tiny-clip")
    images, captions = measuring.real_images(n, "prompts")
    decoded = models.decode(pipeline, models.encode(pipeline, images))
    psnr = (10 * (4 / (decoded - images).square().mean((1, 2, 3))).log10()).mean().item()
    reference = clip.images(measuring.real_images(16384, "reference")[0])

    def corrected(features):
        return metrics.mean_interval(metrics.frechet_groups(features, reference))

    # the teacher over the mix of caption levels, at several step counts from the same noise
    fd = {}
    for steps in (32, 8, 4, 2, 1):
        z = sampler.generate(pipeline, model, captions, range(1_000_000, 1_000_000 + n),
                             sampler.time_grid(steps))
        fd[steps] = corrected(clip.images(models.decode(pipeline, z)))
    reconstruction, _ = corrected(clip.images(decoded))

    # does it compose? full captions of pairs it has seen and of pairs it never saw, for real images and its
    # own
    scores = {}
    for name, held_out in (("seen", False), ("held out", True)):
        plans = sprites.plan(512, torch.Generator().manual_seed(5), held_out)
        plans[:, 2] = 0                                         # the full caption, "fox on blue"
        full = sprites.describe(plans)[0]
        text = clip.texts(full)
        z = sampler.generate(pipeline, model, full, range(2_000_000, 2_000_512), sampler.time_grid(32))
        scores[name] = [metrics.clip_score(clip.images(x), text)
                        for x in (sprites.render(plans), models.decode(pipeline, z))]

    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in
             (("UNet2DConditionModel", pipeline.unet), ("AutoencoderTiny", pipeline.vae),
              ("CLIPTextModel", pipeline.text_encoder))}
    (ASSETS / "tiny-sd" / "README.md").write_text(CARD.format(
        sizes=", ".join(f"{name} {size:.2f} M" for name, size in sizes.items()), psnr=psnr,
        objects=len(sprites.load_sheet()[0]),
        backgrounds=len(sprites.BACKGROUNDS), n=n, reconstruction=reconstruction, scores=scores,
        attribution=sprites.ATTRIBUTION,
        rows="\n".join(f"| {steps} | {value:.2f} ± {half:.2f} | {value / fd[32][0]:.2f} |"
                       for steps, (value, half) in fd.items())))
    (ASSETS / "tiny-clip" / "README.md").write_text(CLIP_CARD.format(attribution=sprites.ATTRIBUTION))
    print((ASSETS / "tiny-sd" / "README.md").read_text())


def measure_pixel(n=2048):
    """Measure assets/tiny-pixel by eval.py's protocol `pixel` and write its model card."""
    evaluator = measuring.Evaluator(protocols.Config(protocol="pixel", n=n))
    rows = {steps: evaluator.row("pixel", steps, kernels=False) for steps in (32, 9, 4, 2, 1)}
    images, captions = measuring.real_images(n, "prompts", sprites.GROUP_LEVELS, PIXEL_SIZE)
    named = torch.tensor([bool(caption) for caption in captions])
    features = evaluator.look(images, range(n), "")["clip"]
    parameters = sum(p.numel() for p in evaluator.open("pixel")[0].unet.parameters()) / 1e6
    (ASSETS / "tiny-pixel" / "README.md").write_text(PIXEL_CARD.format(
        size=PIXEL_SIZE, parameters=parameters, labels=", ".join(LABELS), attribution=sprites.ATTRIBUTION,
        n=n, clip=rows[32]["clip"],
        real_clip=metrics.clip_score(features[named], evaluator.texts[named]),
        rows="\n".join(f"| {steps} | {row['fd_corrected']:.2f} ± "
                       f"{row['fd_interval'][1] - row['fd_corrected']:.2f} | "
                       f"{row['fd_corrected'] / rows[32]['fd_corrected']:.2f} |"
                       for steps, row in rows.items())))
    print((ASSETS / "tiny-pixel" / "README.md").read_text())


CLIP_CARD = """---
license: cc-by-sa-4.0
---
# tiny-clip: a small CLIPModel for the embedded pictures

Trained contrastively by `python -m tools.tiny` on the pictures and captions of `sprites.py`; tiny-sd uses its text tower, `eval.py` both.
Pictures go in as 32 x 32 pixels in [-1, 1]. {attribution} Treat the weights as an adaptation under the same license.
"""

PIXEL_CARD = """---
license: cc-by-sa-4.0
---
# tiny-pixel: a class-conditional diffusion model of pixels

A diffusers `DDIMPipeline` folder ({size} x {size} pixels, fp16 weights): UNet2DModel {parameters:.2f} M parameters, v_prediction on Stable
Diffusion's scaled_linear schedule. No autoencoder, no text: its classes are the groups of the OpenMoji objects of `sprites.py`, named by
labels.json in order ({labels}); the class after the
last is the null class. It exists so that reflow in pixels can be run, read and tested on a laptop. Built by
`python -m tools.tiny --pixel` from `assets/sprites.png`.
No pipeline of diffusers hands on a class: `python sampler.py --model pixel --prompt animal`.

## Data and license

{attribution}
The weights were trained on these pictures alone; treat them, and pictures made with them, as adaptations under CC BY-SA 4.0: name
OpenMoji, and share alike. The code that made them is Apache-2.0.

The class of a picture was replaced by the null class at 10%. A tenth of the object x background pairs was never shown in training.

## Measured (`python -m tools.tiny --pixel --measure`)

FD: Frechet distance on tiny-clip's image features (not FID), pictures brought to 32 x 32 pixels, N = {n} images (90% named classes, 10%
null) against 16384 fresh real images, no guidance; corrected for the bias of so few images, ± 95% over the choice of images.

| DDIM steps | FD | ratio to 32 steps |
|---|---|---|
{rows}

- CLIP score (tiny-clip) with the class name: real pictures {real_clip:.1f}, generated in 32 steps {clip:.1f}.

## Recipe

163,840 pictures; AdamW, cosine decay, EMA; 4,000 updates of 64, mean squared error of v. One CPU thread.
"""

CARD = """---
license: cc-by-sa-4.0
---
# tiny-sd: Stable Diffusion's architecture at 1/200 of its size

A complete diffusers `StableDiffusionPipeline` (32 x 32 pixels, 8 x 8 x 8 latents, fp16 weights): {sizes} parameters. It draws
{objects} OpenMoji objects on {backgrounds} pastel backgrounds, and exists so that reflow can be run, read and tested on a laptop.
Built by `python -m tools.tiny` from `assets/sprites.png`; beside it, `assets/tiny-clip` is the CLIP whose text tower it uses.
Sample it with `DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=32, guidance_scale=1)`.

## Data and license

{attribution}
The weights were trained on these pictures alone and can reproduce them closely; treat them, and pictures made with them, as
adaptations under CC BY-SA 4.0: name OpenMoji, and share alike. The code that made them is Apache-2.0.

Captions: "fox on blue" 40%, "animal on blue" 15%, "fox" 15%, "animal" 10%, "on blue" 10%, "" 10%. A tenth of the object x
background pairs was never shown in training.

## Measured (`python -m tools.tiny --measure`)

FD: Frechet distance on tiny-clip's image features (not FID), N = {n} images over the mix of caption levels against 16384 fresh
real images, no guidance; corrected for the bias of so few images, ± 95% over the choice of images. Autoencoder reconstructions of real
images are at {reconstruction:.2f}.

| DDIM steps | FD | ratio to 32 steps |
|---|---|---|
{rows}

- Autoencoder: {psnr:.1f} dB mean PSNR on images it never saw.
- CLIP score with full captions, 512 each: pairs seen in training, real {scores[seen][0]:.1f}, generated in 32 steps {scores[seen][1]:.1f};
  pairs never seen, real {scores[held out][0]:.1f}, generated {scores[held out][1]:.1f}. Guidance 1.

## Recipe

163,840 pictures; AdamW, cosine decay, EMA. CLIP: 800 updates of 512. Autoencoder: 7,000 updates of 32. UNet: 11,000
updates of 64, epsilon prediction on SD's scaled_linear schedule, the error weighted as an error of v. Two one-thread CPU processes.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixel", action="store_true", help="the pixel model instead: only --pictures and "
                                                             "--pixel-steps count")
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny-build"), help="checkpoints and caches")
    parser.add_argument("--pictures", type=int, default=163_840, help="training images to draw")
    parser.add_argument("--clip-steps", type=int, default=800, help="updates of batch 512")
    parser.add_argument("--autoencoder-steps", type=int, default=7000, help="updates of batch 32")
    parser.add_argument("--unet-steps", type=int, default=11_000, help="updates of batch 64")
    parser.add_argument("--pixel-steps", type=int, default=4000, help="updates of batch 64")
    parser.add_argument("--measure", action="store_true", help="only measure assets/ and write the model "
                                                               "card")
    options = vars(parser.parse_args())
    only_measure, pixel, pixel_steps = (options.pop(key) for key in ("measure", "pixel", "pixel_steps"))
    if pixel:
        if not only_measure:
            build_pixel(options["runs"], options["pictures"], pixel_steps)
        measure_pixel()
    else:
        if not only_measure:
            build(**options)
        if int(os.environ.get("RANK", 0)) == 0:
            measure()
