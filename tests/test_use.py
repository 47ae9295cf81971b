"""docs/use.md: its table of what stock pipelines make of a student is measured here, on the student that ships."""
import math
import re

import diffusers
import pytest
import torch
from conftest import ROOT, slow

import models
import sampler
from models import architectures, load, saved

PAGE = (ROOT / "docs" / "use.md").read_text() if (ROOT / "docs" / "use.md").is_file() else ""
PROMPTS, SEEDS = ["red heart on blue", "fox on green", "pizza on white", "penguin on orange"] * 4, list(range(16))
TRAILING = dict(timestep_spacing="trailing")


def scheduler(name, **options):
    return lambda config: getattr(diffusers, name).from_config(config, **options)


# row of the table -> (scheduler, more arguments of the call)
ROWS = {
    "as it is: DDIM, trailing": (None, {}),
    "Euler, trailing": (scheduler("EulerDiscreteScheduler", **TRAILING), {}),
    "DPM++ 2M, trailing": (scheduler("DPMSolverMultistepScheduler", **TRAILING), {}),
    "UniPC, trailing": (scheduler("UniPCMultistepScheduler", **TRAILING), {}),
    "LCM": (scheduler("LCMScheduler", original_inference_steps=1000), {}),
    "Euler ancestral, trailing": (scheduler("EulerAncestralDiscreteScheduler", **TRAILING), {}),
    "DDIM, leading": (scheduler("DDIMScheduler", timestep_spacing="leading"), {}),
    "Euler, Karras sigmas": (scheduler("EulerDiscreteScheduler", use_karras_sigmas=True, **TRAILING), {}),
    "PNDM, leading": (scheduler("PNDMScheduler", skip_prk_steps=True, timestep_spacing="leading"), {}),
    "guidance 1.5": (None, dict(guidance_scale=1.5)),
    "guidance 2": (None, dict(guidance_scale=2.0)),
    "guidance 7.5": (None, dict(guidance_scale=7.5)),
}


@pytest.fixture(scope="module")
def student():
    """(pipeline, pictures of the teacher's 32 steps, noise)."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(load.ASSETS / "student-2")
    pipeline.set_progress_bar_config(disable=True)
    noise = sampler.noise(SEEDS, (16, 8, 8))
    teacher, model, _ = saved.open_model("tiny")
    cond = models.encode_text(teacher, PROMPTS)
    with torch.no_grad():
        expected = sampler.ddim(model, noise, sampler.time_grid(32), cond)
    return pipeline, models.decode(teacher, expected), noise


def distance(student, make, **options):
    """rms of pictures in [-1, 1] from the teacher's at 32 steps, from the same noise."""
    pipeline, expected, noise = student
    kept = pipeline.scheduler
    pipeline.scheduler = make(kept.config) if make else kept
    generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]        # of the schedulers that add noise
    call = dict(guidance_scale=1) | options
    try:
        z = pipeline(PROMPTS, latents=noise, output_type="latent", generator=generator, **call).images
    finally:
        pipeline.scheduler = kept
    return (models.decode(pipeline, z) - expected).square().mean().sqrt().item()


def comfy(student, schedule, steps):
    """The same distance for ComfyUI's sampler euler under one of its schedules, both written down here from its code: noise scaled by
    sqrt(1 + sigma^2), sigmas by their place in the model's own table of 1000, the network at the nearest whole timestep."""
    pipeline, expected, noise = student
    sigmas = ((1 - pipeline.scheduler.alphas_cumprod) / pipeline.scheduler.alphas_cumprod).sqrt().double()
    places = {"simple": [999 - int(k * 1000 / steps) for k in range(steps)], "sgm_uniform": torch.linspace(999, 0, steps + 1)[:-1],
              "normal": torch.linspace(999, 0, steps)}[schedule]
    places = torch.as_tensor(places, dtype=torch.float64)
    low, part = places.floor().long(), places.frac()
    logs = sigmas.log()
    levels = [*torch.lerp(logs[low], logs[(low + 1).clamp(max=999)], part).exp().tolist(), 0.0]
    with torch.no_grad():
        text = models.encode_text(pipeline, PROMPTS)["encoder_hidden_states"]
        x = noise * (1 + levels[0] ** 2) ** 0.5
        for sigma, following in zip(levels, levels[1:]):
            timestep = (logs - torch.tensor(sigma, dtype=torch.float64).log()).abs().argmin()
            eps = pipeline.unet(x / (1 + sigma ** 2) ** 0.5, timestep, text).sample
            x = x + (following - sigma) * eps
    return (models.decode(pipeline, x) - expected).square().mean().sqrt().item()


def table():
    """Of the page: row -> the distances at 1, 2 and 4 steps."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.M)
    return {name: [float(value) for value in values] for name, *values in rows}


QUICK = ("as it is: DDIM, trailing", "Euler, trailing", "guidance 2")     # the others are diffusers' own


@pytest.mark.parametrize("row", [row if row in QUICK else slow(row) for row in ROWS])
def test_the_table_of_schedulers_and_guidance_is_measured(student, row):
    make, options = ROWS[row]
    found = [distance(student, make, num_inference_steps=steps, **options) for steps in (1, 2, 4)]
    print(f"| {row} | {found[0]:.2f} | {found[1]:.2f} | {found[2]:.2f} |")
    assert table()[row] == pytest.approx(found, abs=0.02)


@pytest.mark.parametrize("schedule", ["simple", slow("sgm_uniform"), slow("normal")])
def test_the_table_of_comfyuis_schedules_is_measured(student, schedule):
    row, found = f"ComfyUI: euler, {schedule}", [comfy(student, schedule, steps) for steps in (1, 2, 4)]
    print(f"| {row} | {found[0]:.2f} | {found[1]:.2f} | {found[2]:.2f} |")
    if schedule == "simple":                                # the very steps of sampler.py
        assert found == pytest.approx([distance(student, None, num_inference_steps=steps) for steps in (1, 2, 4)], abs=1e-4)
    assert table()[row] == pytest.approx(found, abs=0.02)


@pytest.mark.slow
def test_the_plain_call_is_what_the_page_says(student):
    found = distance(student, None, guidance_scale=7.5, num_inference_steps=50)
    print(f"plain call {found:.2f}")
    said = re.search(r"the plain call `pipe\(prompt\)`, 50 steps at guidance 7\.5: (\d\.\d+)", " ".join(PAGE.split()))
    assert float(said[1]) == pytest.approx(found, abs=0.02)


@pytest.mark.parametrize("name, shift", [("sd3", 3.0), ("flux", math.exp(1.15)), slow("flux-schnell", 1.0), slow("zimage", 6.0)])
def test_comfyuis_simple_schedule_asks_a_flow_student_at_its_window_starts(name, shift):
    """Written down from its code: a table of a thousand sigmas with the model's shift (of FLUX.1-dev that of 1024 x 1024 pixels), of which
    `simple` takes every 1000/steps-th, from the noise."""
    schedule = models.schedule(architectures.build(name, weights=False))[0]
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    table = shift * t / (1 + (shift - 1) * t)
    for steps in (1, 2, 4, 8):
        theirs = [table[-1 - int(k * 1000 / steps)].item() for k in range(steps)]
        assert schedule(sampler.time_grid(steps)[:-1])[1].tolist() == pytest.approx(theirs, abs=1e-6)
