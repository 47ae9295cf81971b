"""What leaves a run is sampled alike by stock diffusers, in every family; differences and LoRA files go where they came from."""
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import interrupted, small, weights

import export
import sampler
import teacher
import train

PROMPTS, SEEDS = ["red heart on blue", "animal"], [3, 4]
FAMILIES = ["tiny", "sd15", "sd21", "sdxl"]


@pytest.fixture(scope="module")
def teachers(random_sd, small_models):
    """Random teachers of each family: name -> folder."""
    return {"tiny": random_sd, **{name: small_models[name] for name in FAMILIES[1:]}}


@pytest.fixture(scope="module")
def students(teachers, tmp_path_factory):
    """students(family, **changes): the folder of a run, trained once."""
    made = {}

    def run(family, **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            out = tmp_path_factory.mktemp(family)
            train.main(small(teachers[family], out, lr=1e-3, steps=8, **changes))
            made[key] = out
        return made[key]
    return run


def latents(folder, steps, guidance, prompts=PROMPTS):
    """By sampler.py."""
    pipeline, model, info = sampler.open_model(str(folder))
    return sampler.generate(pipeline, model, prompts, SEEDS, sampler.time_grid(steps, info.get("windows", 1)), guidance)


def stock_latents(pipeline, steps, guidance, prompts=PROMPTS):
    """By diffusers' own pipeline, from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise = sampler.noise(SEEDS, sampler.latent_shape(pipeline))
    return pipeline(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="latent", latents=noise).images


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windows, steps", [(4, 4), (4, 8), (2, 2), (1, 1), (1, 4)])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_student_is_sampled_alike_by_stock_diffusers(students, family, windows, steps, guidance):
    folder = students(family) / f"student-{windows}"
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(stock.scheduler) is diffusers.DDIMScheduler
    assert (latents(folder, steps, guidance) - stock_latents(stock, steps, guidance)).abs().max() <= 1e-4


def test_one_generator_per_image_is_diffusers_own_convention(students):
    folder = students("sd15") / "student-4"
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(PROMPTS, num_inference_steps=4, guidance_scale=1, output_type="latent",
                   generator=[torch.Generator().manual_seed(seed) for seed in SEEDS]).images
    assert (latents(folder, 4, 1.0) - theirs).abs().max() <= 1e-4


def test_img2img_inpainting_and_controlnet_accept_a_student(students):
    for family in ("tiny", "sd15"):
        folder = students(family) / "student-4"
        stock = diffusers.DiffusionPipeline.from_pretrained(folder)
        size = stock.unet.config.sample_size * stock.vae_scale_factor
        image = torch.rand(1, 3, size, size)
        common = dict(prompt="fox", num_inference_steps=4, guidance_scale=1, output_type="np")
        to_image = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
        # its picture is halved once per channel but the first, as often as the autoencoder does
        net = diffusers.ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(16, 32, 96))
        control = diffusers.StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=net)
        made = [to_image(image=image, strength=0.5, **common), control(image=image, height=size, width=size, **common)]
        if family == "sd15":                               # diffusers' inpainting wants SD's four channels
            paint = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder)
            mask = torch.zeros(1, 1, size, size)
            mask[..., :size // 2] = 1
            made.append(paint(image=image, mask_image=mask, height=size, width=size, **common))
        for output in made:
            assert output.images.shape == (1, size, size, 3) and np.isfinite(output.images).all()


@pytest.mark.parametrize("family", ["tiny", "sd15", "sdxl"])
def test_a_lora_is_the_whole_student_when_load_lora_weights_puts_it_on_the_teacher(students, teachers, family):
    folder = students(family, lora=3) / "student-2"
    stock = diffusers.DiffusionPipeline.from_pretrained(teachers[family])
    stock.scheduler = diffusers.DiffusionPipeline.from_pretrained(folder).scheduler
    before = stock_latents(stock, 2, 1.0)
    stock.load_lora_weights(folder)
    after = stock_latents(stock, 2, 1.0)
    assert (after - latents(folder, 2, 1.0)).abs().max() <= 1e-4 < (after - before).abs().max()


def test_every_layer_inside_the_blocks_has_an_adapter(students):
    layers = {name.split(".lora_")[0].removeprefix("unet.") for name in load_file(students("sd15", lora=3) / "student-2" / export.LORA_FILE)}
    unet = teacher.load_pipeline(str(students("sd15") / "student-2")).unet
    inside = {name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
              and name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")}
    assert layers == inside


@pytest.mark.parametrize("changes", [dict(), dict(lora=2)], ids=["full", "lora"])
def test_a_checkpoint_is_exported_on_request(random_sd, tmp_path, monkeypatch, changes):
    interrupted(random_sd, tmp_path / "run", monkeypatch, 11, checkpoint_steps=10, lr=1e-3, **changes)
    out = tmp_path / "exported"
    export.export_checkpoint(export.ExportConfig(str(tmp_path / "run" / "checkpoint-000010.safetensors"), str(out)))
    info = json.loads((out / "reflow.json").read_text())
    assert (info["windows"], info["updates"]) == (1, 10) and (out / export.LORA_FILE).exists() == bool(changes)
    stock = diffusers.DiffusionPipeline.from_pretrained(out)
    assert (latents(out, 1, 1.0) - stock_latents(stock, 1, 1.0)).abs().max() <= 1e-4
    assert not torch.equal(weights(out)["conv_in.weight" if not changes else "mid_block.resnets.0.conv1.weight"],
                           weights(random_sd)["conv_in.weight" if not changes else "mid_block.resnets.0.conv1.weight"])


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-6), ("fp16", 1e-3)])
def test_a_difference_merged_into_the_base_is_the_student_and_into_another_model_the_difference(students, teachers, tmp_path, dtype, tolerance):
    student = students("sd15") / "student-4"
    file, merged = tmp_path / "delta.safetensors", tmp_path / "merged"
    export.export_delta(export.DeltaConfig(str(student), "", str(file), dtype))
    export.merge(export.MergeConfig(str(file), str(teachers["sd15"]), str(merged)))
    for name, value in weights(student).items():
        assert torch.allclose(weights(merged)[name], value, atol=tolerance)
    if dtype == "fp32":
        assert (latents(merged, 4, 1.0) - latents(student, 4, 1.0)).abs().max() < 1e-3
    # another model of the same architecture
    other = shutil.copytree(teachers["sd15"], tmp_path / "other")
    unet = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(unet).items()}, unet, {"format": "pt"})
    export.merge(export.MergeConfig(str(file), str(other), str(tmp_path / "style"), scale=0.5))
    for name, value in load_file(file).items():
        assert torch.allclose(weights(tmp_path / "style")[name], weights(other)[name] + 0.5 * value.float(), atol=1e-6)
    info = json.loads((tmp_path / "style" / "reflow.json").read_text())
    assert info["teacher"] == str(other) and info["windows"] == 4 and info["delta"]["scale"] == 0.5
    assert latents(tmp_path / "style", 4, 1.0).isfinite().all()


def test_merge_lora_is_the_adapted_network(random_sd):
    """W + B A for linear layers and convolutions alike, against peft's own forward."""
    import student
    unet = teacher.load_pipeline(str(random_sd)).unet
    c = train.Config(lora=3)
    student.make_student(c, unet, torch.device("cpu"))
    with torch.no_grad():
        for p in student.trained(unet).values():
            p.normal_(std=0.1)
    inputs = torch.randn(2, 8, 8, 8), torch.tensor([500.0, 20.0]), torch.randn(2, 5, unet.config.cross_attention_dim)
    other = teacher.load_pipeline(str(random_sd)).unet
    untouched = unet.eval()(*inputs).sample
    export.merge_lora(other.state_dict(), export.adapters(unet.state_dict()))
    assert torch.allclose(other.eval()(*inputs).sample, untouched, atol=1e-3 * untouched.abs().max().item())
