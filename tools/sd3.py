"""Builds assets/tiny-sd3, the transformer's twin of tiny-sd: SD3's own classes and flow matching, on the
same scenes, with the autoencoder of tiny-sd and the text towers of tiny-sd and tiny-clip.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m tools.sd3

Under an hour on two cores; goes on where it was when it is run again. The last step measures what was
built and writes its model card.
"""
import argparse
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, T5Tokenizer

import export
import models
from data import scenes
from models import load
from models.load import ASSETS
from tools import build, cards, fitting

POOLED = 64                 # of each text tower

SHIFT = 3.0                 # of the noise levels towards noise, SD3's

STEPS = 32, 16, 8, 4, 2, 1  # of the card


# ---- what is built, in SD3's own classes -------------------------------------------------------------------


def with_projection(tower, config, projection):
    """A CLIPTextModelWithProjection around the layers of a text tower. SD3 reads what goes into the last
    layer; so one that adds nothing comes after the tower's own, if it has one less.
    tower: module with a tower's tensors; config: dict, of the new one; projection: (POOLED, width)."""
    found = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    weights = {name.removeprefix("text_model."): value.float() for name, value in tower.state_dict().items()}
    positions = found.text_model.embeddings.position_embedding.weight
    known = weights["embeddings.position_embedding.weight"]
    # attention is causal: what stands after the caption changes nothing before
    weights["embeddings.position_embedding.weight"] = torch.cat(
        [known, known[-1:].expand(len(positions) - len(known), -1)])
    missing, unexpected = found.text_model.load_state_dict(weights, strict=False)
    last = len(found.text_model.encoder.layers) - 1
    if unexpected or any(not name.startswith(f"encoder.layers.{last}.") for name in missing):
        raise ValueError(f"not the tensors of this tower: {unexpected or missing}")
    with torch.no_grad():
        for name, value in found.text_model.encoder.layers[last].named_parameters():
            if missing and name.startswith(("self_attn.out_proj", "mlp.fc2")):
                value.zero_()
        found.text_projection.weight.copy_(projection)
    return found.eval().requires_grad_(False)


def make_towers(pipeline, clip):
    """SD3's two CLIP text encoders, of tiny-sd's and tiny-clip's.  pipeline: tiny-sd; clip: CLIPModel."""
    tower, small = pipeline.text_encoder, clip.text_model
    shared = dict(max_position_embeddings=build.WORDS + build.PLACES, projection_dim=POOLED)
    first = {**tower.config.to_dict(), **shared, "num_hidden_layers": tower.config.num_hidden_layers + 1}
    mixed = torch.nn.init.orthogonal_(torch.empty(POOLED, tower.config.hidden_size),
                                      generator=torch.Generator().manual_seed(0))
    second = {**clip.config.text_config.to_dict(), **shared}
    return (with_projection(tower, first, mixed),
            with_projection(small, second, clip.text_projection.weight.float()))


def make_transformer(joint):
    """SD3Transformer2DModel with six blocks of width 192: a picture is 4 x 4 tokens of 2 x 2 latents.
    Blocks begin as the identity (adaLN-Zero, Peebles & Xie 2023).  joint: width of the text."""
    network = SD3Transformer2DModel(
        sample_size=scenes.SIZE // 8, patch_size=2, in_channels=build.CHANNELS, out_channels=build.CHANNELS,
        num_layers=6, num_attention_heads=6, attention_head_dim=32, caption_projection_dim=192,
        joint_attention_dim=joint, pooled_projection_dim=2 * POOLED, pos_embed_max_size=8, qk_norm="rms_norm")
    for name, module in network.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    return network


def make_pipeline(seed=0):
    """The whole StableDiffusion3Pipeline, its transformer untrained. It has no T5; that the third tokenizer
    takes one token alone is why a single zero stands in its place, and not SD3's 256."""
    torch.manual_seed(seed)
    teacher = load.load_pipeline(str(ASSETS / "tiny-sd"))
    first, second = make_towers(teacher, CLIPModel.from_pretrained(ASSETS / "tiny-clip").float())
    joint = first.config.hidden_size + second.config.hidden_size
    words = T5Tokenizer(vocab=[(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")], extra_ids=0,
                        model_max_length=1)
    return StableDiffusion3Pipeline(
        transformer=make_transformer(joint), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=teacher.vae, text_encoder=first, text_encoder_2=second, text_encoder_3=None,
        tokenizer=teacher.tokenizer, tokenizer_2=teacher.tokenizer, tokenizer_3=words)


def loss(model, batch, guidance=1.0):
    """The flow matching loss: z = (1 - sigma) z_0 + sigma eps, the network gives eps - z_0.
    batch: z_0 and eps (n, C, h, w); text and null text, dicts of tensors of n rows; sigma (n,).
    guidance: as build.unet_loss says."""
    z_0, text, null, sigma, eps = batch
    level = sigma[:, None, None, None]
    z, target = (1 - level) * z_0 + level * eps, eps - z_0
    if guidance != 1:
        both = {key: torch.cat([value, null[key]]) for key, value in text.items()}
        with torch.no_grad():
            twice = model(torch.cat([z, z]), timestep=1000 * torch.cat([sigma, sigma]), **both).sample
        told, untold = twice.chunk(2)
        target = target + (1 - 1 / guidance) * (told - untold)
    return (model(z, timestep=1000 * sigma, **text).sample - target).square().mean()


# ---- the story ---------------------------------------------------------------------------------------------


def train(runs, pictures, updates):
    """Train the transformer and save assets/tiny-sd3 in fp16; what it shares with tiny-sd as links."""
    runs.mkdir(parents=True, exist_ok=True)
    world = int(os.environ.get("WORLD_SIZE", 1))
    pipeline = make_pipeline()
    plans, latents = build.scene_latents(pipeline.vae, runs, pictures)
    null = models.encode_text(pipeline, [""])

    def batch(generator):
        rows = torch.randint(pictures, (64 // world,), generator=generator)
        z_0 = pipeline.vae.config.scaling_factor * latents[rows].float()
        text = models.encode_text(pipeline, scenes.describe(scenes.recaption(plans[rows], generator))[0])
        u = 1 - torch.rand(len(rows), generator=generator)
        return (z_0, text, {key: value.expand(len(rows), *value.shape[1:]) for key, value in null.items()},
                SHIFT * u / (1 + (SHIFT - 1) * u), torch.randn(z_0.shape, generator=generator))

    def guided(model, batch, step):
        return loss(model, batch, build.GUIDANCE if step >= build.GUIDED_FROM * updates else 1.0)
    fitting.fit("sd3", pipeline.transformer, guided, batch, updates, 2e-3, runs, ema_decay=0.9995,
                snapshots=500)
    if int(os.environ.get("RANK", 0)) == 0:
        save(pipeline, ASSETS / "tiny-sd3")


def save(pipeline, folder):
    """Write the pipeline in fp16; the autoencoder and the tokenizers are links to tiny-sd's."""
    if folder.exists():                                    # or the links would be written through
        for link in filter(Path.is_symlink, folder.iterdir()):
            link.unlink()
    pipeline.transformer.eval()
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    export.make_portable(folder)
    for name, target in (("vae", "vae"), ("tokenizer", "tokenizer"), ("tokenizer_2", "tokenizer")):
        shutil.rmtree(folder / name)
        (folder / name).symlink_to(Path("..", "tiny-sd", target))


def measure(n=2048):
    """Measure assets/tiny-sd3 by eval.py's protocol `tiny` and write its model card."""
    folder = str(ASSETS / "tiny-sd3")
    evaluator, rows = cards.lines_of(folder, "tiny", STEPS, n)
    if not rows:
        return
    transformer = evaluator.open(folder)[0].transformer
    (ASSETS / "tiny-sd3" / "README.md").write_text(CARD.format(
        parameters=sum(p.numel() for p in transformer.parameters()) / 1e6, n=n, shift=SHIFT, rows=rows,
        guidance=build.GUIDANCE, attribution=scenes.ATTRIBUTION, floor=evaluator.floor()["floor"]))
    print((ASSETS / "tiny-sd3" / "README.md").read_text())


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-sd3: Stable Diffusion 3's architecture on the embedded pictures

A complete diffusers `StableDiffusion3Pipeline` (64 x 64 pixels, 8 x 8 x 16 latents, fp16 weights): SD3Transformer2DModel
{parameters:.2f} M parameters, flow matching with shift {shift:g}. Autoencoder and text towers are tiny-sd's and tiny-clip's; the first tower has
one more layer that adds nothing, as SD3 reads what goes into the last one; it has no T5, and one zero in its place. Sample it with
`DiffusionPipeline.from_pretrained(folder, text_encoder_3=None)(prompt, num_inference_steps=32, guidance_scale=1, max_sequence_length=1)`: a guidance of
{guidance:g} is learned already. Built by `torchrun --nproc_per_node=2 -m tools.sd3`, on the scenes of tiny-sd.

## Data and license

{attribution}
The weights were learned from these pictures alone; they are ours to give under Apache-2.0, with this notice of the pictures' license.

## Measured (`torchrun --nproc_per_node=2 -m tools.sd3 --measure`)

FD: Frechet distance on the 192 features of `assets/judge` (not FID), N = {n} images over the mix of caption levels against 8192 fresh
real images; corrected for the bias of so few images, ± 95% over the choice of images; as many real pictures {floor[fd_corrected]:.2f}.
Prompts followed: as the judge sees; of real pictures {floor[prompt_accuracy][all]:.1%}.

| Euler steps | FD | ratio to 32 steps | prompts followed |
|---|---|---|---|
{rows}
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/build"), help="checkpoints and caches")
    parser.add_argument("--pictures", type=int, default=65_536, help="scenes that it is trained on")
    parser.add_argument("--updates", type=int, default=4000, help="of batch 64")
    parser.add_argument("--measure", action="store_true", help="only measure the folder and write its card")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    if not options.measure:
        train(options.runs, options.pictures, options.updates)
    measure()
