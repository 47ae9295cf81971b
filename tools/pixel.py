"""Builds assets/tiny-pixel: a small UNet2DModel that draws the embedded scenes of one object at 16 x 16
pixels, without an autoencoder or text, given the object's group as its class; the domain of Simple
ReFlow.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m tools.pixel

A quarter of an hour on two cores; goes on where it was when it is run again. The last step measures
what was built and writes its model card.
"""
import argparse
import json
import os
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist

import models
from data import scenes
from models.load import ASSETS
from tools import cards, fitting
from tools.build import make_scheduler

SIZE = 16                           # of the pictures

STEPS = 32, 9, 4, 2, 1              # of the card

LABELS = list(scenes.OBJECTS)       # its classes by number; one more is the null class, ""


def make_unet():
    """A class-conditional UNet2DModel with three levels: 1.9 M parameters, attention at 8 x 8 and
    4 x 4."""
    return diffusers.UNet2DModel(
        sample_size=SIZE, layers_per_block=1, block_out_channels=(32, 64, 96), norm_num_groups=8,
        attention_head_dim=16, down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=len(LABELS) + 1)


def loss(model, batch, alphas_cumprod):
    """The diffusion loss of v_prediction, v = alpha eps - sigma x, unweighted: what build.unet_loss
    weights epsilon's error to."""
    x, classes, t, eps = batch
    alpha = alphas_cumprod[t].sqrt()[:, None, None, None]
    sigma = (1 - alpha ** 2).sqrt()
    return (model(alpha * x + sigma * eps, t, class_labels=classes).sample -
            (alpha * eps - sigma * x)).square().mean()


def build(runs, updates):
    """Train the model and save assets/tiny-pixel in fp16."""
    runs.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    scheduler, world = make_scheduler("v_prediction"), int(os.environ.get("WORLD_SIZE", 1))
    groups = torch.tensor([LABELS.index(group) for group in scenes.GROUPS])

    def batch(generator):
        plans = scenes.plan(64 // world, generator, held_out=False, levels=scenes.GROUP_LEVELS)
        x, named = scenes.render(plans, SIZE), plans[:, scenes.FACTS - 1] == 0
        t = torch.randint(1000, (len(x),), generator=generator)
        return (x, torch.where(named, groups[plans[:, 1].long()], len(LABELS)), t,
                torch.randn(x.shape, generator=generator))
    unet = make_unet()
    fitting.fit("pixel", unet, lambda model, batch, step: loss(model, batch, scheduler.alphas_cumprod), batch,
                updates, 2e-3, runs, ema_decay=0.999)
    if int(os.environ.get("RANK", 0)) == 0:
        pipeline = diffusers.DDIMPipeline(unet=unet.eval(), scheduler=scheduler)
        pipeline.to(dtype=torch.float16).save_pretrained(ASSETS / "tiny-pixel", safe_serialization=True)
        (ASSETS / "tiny-pixel" / "labels.json").write_text(json.dumps(LABELS))


def measure(n=2048):
    """Measure assets/tiny-pixel by eval.py's protocol `pixel` and write its model card."""
    evaluator, rows = cards.lines_of("pixel", "pixel", STEPS, n)
    if not rows:
        return
    parameters = sum(p.numel() for p in models.network(evaluator.open("pixel")[0]).parameters()) / 1e6
    (ASSETS / "tiny-pixel" / "README.md").write_text(CARD.format(
        size=SIZE, parameters=parameters, labels=", ".join(LABELS), attribution=scenes.ATTRIBUTION,
        n=n, floor=evaluator.floor()["floor"], rows=rows))
    print((ASSETS / "tiny-pixel" / "README.md").read_text())


CARD = """---
license: apache-2.0
---
# tiny-pixel: a class-conditional diffusion model of pixels

A diffusers `DDIMPipeline` folder ({size} x {size} pixels, fp16 weights): UNet2DModel {parameters:.2f} M parameters, v_prediction on Stable
Diffusion's scaled_linear schedule. No autoencoder, no text: its classes are the groups of objects of `data/scenes.py`, named by
labels.json in order ({labels}); the class after the
last is the null class. It exists so that reflow in pixels can be run, read and tested on a laptop. Built by
`torchrun --nproc_per_node=2 -m tools.pixel` from `assets/scenes/sprites.webp`.
No pipeline of diffusers hands on a class: `python sampler.py --model pixel --prompt animal`.

## Data and license

The pictures are drawn from {attribution} The license text is in
assets/scenes/README.md. The weights and the code that made them are Apache-2.0.

The class of a picture was replaced by the null class at 10%. A tenth of the pairs of object and color was never shown in training.

## Measured (`torchrun --nproc_per_node=2 -m tools.pixel --measure`)

FD: Frechet distance on the judge's features (not FID), pictures brought to 64 x 64 pixels, N = {n} images (90% named classes, 10%
null) against 8192 fresh real images, no guidance; corrected for the bias of so few images, ± 95% over the choice of images; real
pictures {floor[fd_corrected]:.2f}. Prompts followed: an object of the named group, as the judge sees it in so few pixels; in real pictures
{floor[prompt_accuracy][all]:.1%}.

| DDIM steps | FD | ratio to 32 steps | prompts followed |
|---|---|---|---|
{rows}

## Recipe

Endless pictures; Muon and AdamW, EMA; 4,000 updates of 64, mean squared error of v.
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/pixel-build"), help="checkpoints")
    parser.add_argument("--updates", type=int, default=4000, help="of batch 64")
    parser.add_argument("--measure", action="store_true", help="only measure the folder and write its card")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    if not options.measure:
        build(options.runs, options.updates)
    measure()
