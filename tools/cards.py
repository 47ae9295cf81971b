"""Measures the embedded models and writes their cards.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m tools.cards
    python -m tools.cards --curve runs/build

The first takes some ten minutes on two cores. Beside the card of assets/tiny-sd goes sheet.webp: 64
pictures of specific prompts, chosen by seed. The second measures the snapshots that the builder has
left of the UNet, and writes assets/tiny-sd/curve.json.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

import models
import sampler
from data import imaging, scenes
from evaluation import measuring, metrics, protocols
from models.load import ASSETS
from runtime import cli, processes, seeds
from runtime.cli import UserError
from tools import build

STEPS = 32, 8, 4, 2, 1

COLUMNS = 8                         # of the sheet


def specific(n, stream, held_out=None):
    """Plans of scenes whose captions name every object and the background."""
    plans = scenes.plan(n, seeds.generator(0, "cards", stream), held_out)
    plans[:, scenes.FACTS - 1] = 0                              # the first level says all
    return plans


def draw(pipeline, model, captions, first_seed, steps=32):
    """Pictures of these captions, (n, 3, H, W)."""
    with torch.no_grad():
        z = sampler.generate(pipeline, model, captions, range(first_seed, first_seed + len(captions)),
                             sampler.time_grid(steps))
        return models.decode(pipeline, z)


def seconds(call, turns=5):
    """Median time of a call."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[turns // 2]


def real_against_real(features, n, trials=20):
    """FD of n real pictures against the rest, plain and corrected, by their features (N, dim): mean and
    standard deviation over random choices."""
    values = []
    for trial in range(trials):
        rows = features[torch.randperm(len(features), generator=seeds.generator(0, "cards", "trial", trial))]
        ours, others = rows[:n], rows[n:]
        values.append([metrics.frechet_distance(metrics.moments(ours), metrics.moments(others)),
                       metrics.mean_interval(metrics.frechet_groups(ours, others))[0]])
    values = torch.tensor(values)
    return [f"{mean:.2f} ± {std:.2f}" for mean, std in zip(values.mean(0).tolist(), values.std(0).tolist())]


def snapshots(folder, n):
    """FD of the UNet while it was trained, in 32 steps; n pictures each.
    Returns: [{"updates", "samples", "fd_corrected", "fd_interval", "prompt_accuracy"}]."""
    files = sorted(Path(folder).glob("unet-*.safetensors"))
    if not files:
        raise UserError(f"--curve {folder}: no unet-*.safetensors in it; give --runs of tools.build")
    evaluator, found = measuring.Evaluator(protocols.Config(protocol="tiny", n=n, teacher_steps=1, paths=1)), []
    pipeline, model, _ = evaluator.open("tiny")
    for file in files:
        with safe_open(file, "pt") as stored:
            updates = int(stored.metadata()["updates"])
        models.network(pipeline).load_state_dict({key: value.float() for key, value in load_file(file).items()})
        rows = torch.cat([evaluator.judge.images(draw(pipeline, model, evaluator.prompts[i:i + 64], 1_000_000 + i))
                          for i in range(0, n, 64)])
        corrected, half = metrics.mean_interval(metrics.frechet_groups(rows, evaluator.reference["judge"]))
        found.append(dict(updates=updates, samples=updates * 64, fd_corrected=corrected,
                          fd_interval=[corrected - half, corrected + half],
                          prompt_accuracy=evaluator.judge.accuracy(rows, evaluator.plans)["all"]))
        print(found[-1])
    return found


def lines_of(folder, protocol, steps, n):
    """The rows of a small card: FD, its ratio to the first number of steps, prompts followed. Every process
    of a group that is there makes its share.
    Returns: (Evaluator, Markdown), "" on all processes but the first."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank, barrier = (dist.get_rank(), dist.barrier) if world > 1 else (0, lambda: None)
    barrier()                                              # the first process has written the folder
    evaluator = measuring.Evaluator(protocols.Config(protocol=protocol, teacher=folder, n=n), rank, world,
                                    barrier)
    rows = {count: evaluator.row(folder, count, costly=False) for count in steps}
    if rank:
        return evaluator, ""
    first = rows[steps[0]]["fd_corrected"]
    return evaluator, "\n".join(
        f"| {count} | {row['fd_corrected']:.2f} ± {row['fd_interval'][1] - row['fd_corrected']:.2f} | "
        f"{row['fd_corrected'] / first:.2f} | {row['prompt_accuracy']['all']:.1%} |"
        for count, row in rows.items())


@dataclass
class Config:
    n: int = 2048               # pictures of each number of steps
    curve: str = ""             # --runs of tools.build: measure the snapshots there instead


def main(c):
    n = c.n
    if c.curve:
        (ASSETS / "tiny-sd" / "curve.json").write_text(json.dumps(snapshots(c.curve, n), indent=1))
        return
    rank, world, _, barrier = processes.start_processes(SimpleNamespace(device="cpu", shard=False))
    evaluator = measuring.Evaluator(protocols.Config(protocol="tiny", n=n), rank, world, barrier)
    for steps in STEPS:
        evaluator.features("tiny", steps)
        evaluator.trajectories("tiny", steps, costly=False)
    if rank:
        return
    evaluator.processes = 0, 1, lambda: None
    rows = {steps: evaluator.row("tiny", steps, costly=False) for steps in STEPS}
    # the same on features that the model's own pictures and captions made
    by_clip = {steps: metrics.mean_interval(metrics.frechet_groups(
        evaluator.features("tiny", steps)[range(n)]["clip"], evaluator.reference["clip"]))[0] for steps in STEPS}
    floor, (pipeline, model, _) = evaluator.floor()["floor"], evaluator.open("tiny")

    # the autoencoder, on pictures it never saw
    images, _ = measuring.real_images(n, "prompts", "scenes")
    decoded = models.decode(pipeline, models.encode(pipeline, images))
    psnr = (10 * (4 / (decoded - images).square().mean((1, 2, 3))).log10()).mean().item()
    coded, half = metrics.mean_interval(metrics.frechet_groups(evaluator.look(decoded, range(n), "")["judge"],
                                                               evaluator.reference["judge"]))

    # does it compose? full captions of pairs it has seen, and of pairs it never saw
    composed = {}
    for name, held_out in (("seen", False), ("held out", True)):
        plans = specific(512, name, held_out)
        drawn = draw(pipeline, model, scenes.describe(plans)[0], 2_000_000)
        composed[name] = [evaluator.judge.accuracy(evaluator.judge.images(x), plans)["all"]
                          for x in (scenes.render(plans), drawn)]

    # 64 pictures by seed
    captions = scenes.describe(specific(64, "sheet"))[0]
    pictures = imaging.to_pil(draw(pipeline, model, captions, 0), 2)
    sheet = imaging.contact_sheet([pictures[i:i + COLUMNS] for i in range(0, 64, COLUMNS)])
    sheet.save(ASSETS / "tiny-sd" / "sheet.webp", quality=90, method=6)

    # what decoding costs beside the network
    z = torch.randn(64, *models.latent_shape(pipeline))
    cond = models.encode_text(pipeline, captions)
    with torch.no_grad():
        forward = seconds(lambda: model(z, torch.full((64,), 0.5), cond))
        decoding = seconds(lambda: models.decode(pipeline, z))

    sizes = {type(part).__name__: sum(p.numel() for p in part.parameters()) / 1e6
             for part in (models.network(pipeline), pipeline.vae, pipeline.text_encoder)}
    real = evaluator.judge.images(measuring.real_images(n, "floor", "scenes")[0])
    real = torch.cat([real, evaluator.reference["judge"].cpu()])
    facts = dict(
        trials="; ".join(f"at N = {count:,} {plain} plain, {corrected} corrected"
                         for count in (1024, 2048) for plain, corrected in [real_against_real(real, count)]),
        sizes=", ".join(f"{name} {size:.2f} M" for name, size in sizes.items()), psnr=psnr, n=n,
        objects=len(scenes.NAMES), groups=len(set(scenes.GROUPS)), colors=len(scenes.COLORS), coded=coded,
        coded_half=half, decoding=decoding / forward, composed=composed, attribution=scenes.ATTRIBUTION,
        real=evaluator.c.real, floor=floor, guidance=build.GUIDANCE,
        judge_size=sum(p.numel() for p in evaluator.judge.model.parameters()) / 1e6,
        prompts="\n".join(f"{i + 1}. {caption}" for i, caption in enumerate(captions)),
        rows="\n".join(
            f"| {steps} | {row['fd_corrected']:.2f} ± {row['fd_interval'][1] - row['fd_corrected']:.2f} "
            f"| {row['fd_corrected'] / rows[32]['fd_corrected']:.2f} "
            f"| {by_clip[steps]:.2f} | {by_clip[steps] / by_clip[32]:.2f} | {row['prompt_accuracy']['all']:.1%} "
            f"| {row['clip']:.1f} | {row['picture_distance']:.3f} |" for steps, row in rows.items()))
    for folder, card in (("tiny-sd", CARD), ("tiny-clip", CLIP_CARD), ("judge", JUDGE_CARD)):
        (ASSETS / folder / "README.md").write_text(card.format(**facts))
    print((ASSETS / "tiny-sd" / "README.md").read_text())


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-sd: Stable Diffusion's architecture at 1/100 of its size

![64 pictures of specific prompts, chosen by seed](sheet.webp)

A complete diffusers `StableDiffusionPipeline` (64 x 64 pixels, 8 x 8 x 16 latents, fp16 weights): {sizes} parameters. It draws
{objects} objects of {groups} groups, one or two at a time, on backgrounds of {colors} colors, and exists so that reflow can be run,
read and tested on a laptop. Sample it with
`DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=32, guidance_scale=1)`: a guidance of {guidance:g} is learned already,
so that a step costs one evaluation of the network, and more would come on top.

Built by `python -m tools.build` from `assets/scenes`. What is unusual: the text encoder, a stock CLIPTextModel, was trained before the UNet
to tell from a caption the latents of the plainest scene that it can mean, in its last 16 tokens, one for each of 4 x 4 places. Stock
inpainting takes 4 latent channels alone, so it does not take this model; img2img does.

## Data and license

{attribution}
The weights were learned from these pictures alone; they are ours to give under Apache-2.0, with this notice of the pictures' license.

Captions: "fox on blue", "fox", "animal on blue", "animal", "on blue", "", and of two objects "fox left of pizza on blue",
"fox left of pizza", "animal above food", "fox and pizza"; shares in `data/scenes.py`. A tenth of the object x color and object x object
pairs was never shown in training. Vague captions ("animal on blue") are a blur of modes at this size.

## Measured (`torchrun --nproc_per_node=2 -m tools.cards`)

FD: Frechet distance on the 192 features of `assets/judge` (not FID), N = {n} images over the mix of caption levels against {real} fresh
real images; corrected for the bias of so few images, ± 95% over the choice of images. As many other real pictures: {floor[fd_corrected]:.2f}
({floor[fd_interval][0]:.2f} to {floor[fd_interval][1]:.2f}); reconstructions of real pictures: {coded:.2f} ± {coded_half:.2f}. Prompts followed: the
share of pictures that show what their prompt names, as the judge says; of real pictures {floor[prompt_accuracy][all]:.1%}. CLIP score and the
second FD on `assets/tiny-clip`; the score of real pictures {floor[clip]:.1f}. Distance: to the picture of 32 steps from the same noise, of the judge's features.

| DDIM steps | FD | ratio to 32 steps | FD of CLIP features | ratio | prompts followed | CLIP score | distance |
|---|---|---|---|---|---|---|---|
{rows}

- Autoencoder: {psnr:.2f} dB mean PSNR on pictures it never saw; decoding takes {decoding:.2f} times one evaluation of the UNet (one thread, 64 at a time).
- Prompts followed with full captions, 512 each: pairs seen in training, real {composed[seen][0]:.1%}, generated {composed[seen][1]:.1%}; pairs never
  seen, real {composed[held out][0]:.1%}, generated {composed[held out][1]:.1%}.
- FD and prompts followed of the UNet's snapshots, by samples seen: [curve.json](curve.json).

## The prompts of the sheet, row by row

The first 64 scenes of their stream with full captions, 32 steps, seeds 0 to 63.

{prompts}
"""

CLIP_CARD = """---
license: apache-2.0
---
# tiny-clip: a small CLIPModel for the embedded pictures

Trained contrastively by `python -m tools.build` on the pictures and captions of `data/scenes.py`; `eval.py` uses it for CLIP scores, no part
of tiny-sd does. Pictures go in as 64 x 64 pixels in [-1, 1]. {attribution}
"""

JUDGE_CARD = """---
license: apache-2.0
---
# judge: what do the embedded pictures show?

A residual network of {judge_size:.2f} M parameters (`evaluation/judge.py`) that names objects, places and colors of scenes of 64 x 64 pixels,
trained by `python -m tools.build` on real pictures with noise, blur and changed colors, and on no picture of any diffusion model. `eval.py`
takes from it whether a picture follows its prompt, how far it looks from the teacher's, and the 192 features of the Frechet distance.
Real pictures against real ones have an FD of 0; measured, mean and standard deviation over 20 choices of the N: {trials}.
All that captions name is right on {floor[prompt_accuracy][all]:.1%} of {n} real pictures. {attribution}
"""

if __name__ == "__main__":
    cli.run(main, Config, __doc__)
