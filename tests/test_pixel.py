"""Models of pixels, unconditional or with classes, under the latent ones' contract: against diffusers, then from training to tables."""
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, slow
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from test_eval import parts  # noqa: F401  a fixture
from test_train import same_bits, small, weights

import eval as evaluation
import export
import models
import sampler
import train
from data import captioned, drawn, imaging, scenes
from evaluation import measuring, protocols
from models import configs, load, pixel, saved
from runtime.cli import UserError
from tools import bench, build
from tools import pixel as builder

LABELS = list(scenes.OBJECTS)
UNET = dict(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))


def save(folder, scheduler=None, labels=None, kind=DDPMPipeline, **changes):
    """A random pixel model.  Returns: its folder."""
    torch.manual_seed(0)
    # DDPM's own schedule clips what it believes the picture to be; neither we nor the exported student may
    pipeline = kind(UNet2DModel(**{**UNET, **changes}), scheduler or DDPMScheduler(clip_sample=True))
    pipeline.save_pretrained(folder)
    if labels:
        (folder / "labels.json").write_text(json.dumps(labels))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by kind: unconditional; classes, named, with a null class; numbers, without names and so without null class; gray."""
    root = tmp_path_factory.mktemp("pixel")
    return dict(unconditional=save(root / "unconditional"), gray=save(root / "gray", in_channels=1, out_channels=1),
                classes=save(root / "classes", build.make_scheduler("v_prediction"), LABELS, DDIMPipeline, num_class_embeds=13),
                numbers=save(root / "numbers", num_class_embeds=3))


def options(folder, out, **changes):
    return small(folder, out, **{"data": "scenes-by-group", "updates": 4, "lr": 1e-3, **changes})


@pytest.fixture(scope="module")
def students(folders, tmp_path_factory):
    """students(kind): the folder of a run, trained once."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            train.main(options(folders[kind], made[kind], windows=[4, 2, 1]))
        return made[kind]
    return run


# ---- against diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unconditional", "gray"])
@pytest.mark.parametrize("windows, steps", [(4, 8), slow(2, 2), (1, 1)])
def test_an_unconditional_student_is_sampled_alike_by_ddim_pipeline(students, kind, windows, steps):
    folder = students(kind) / f"student-{windows}"
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is DDIMPipeline and not stock.scheduler.config.clip_sample
    theirs = stock(2, num_inference_steps=steps, eta=0.0, output_type="np", generator=sampler.generators([3, 4])).images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    pipeline, model, info = saved.open_model(str(folder))
    z = sampler.generate(pipeline, model, ["", ""], [3, 4], sampler.time_grid(steps, info["windows"]))
    assert (models.decode(pipeline, z) / 2 + 0.5 - theirs).abs().max() <= 1e-4      # its pictures are in [0, 1]


@pytest.mark.parametrize("guidance", [slow(1.0), 2.5, 0.0])
def test_a_student_with_classes_is_sampled_alike_by_its_own_stock_scheduler(students, guidance):
    folder, prompts = students("classes") / "student-4", ["food", "heart", ""]
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    z, labels = sampler.noise([3, 4, 5], (3, 16, 16)), torch.tensor([1, 11, 12])
    stock.scheduler.set_timesteps(8)
    with torch.no_grad():
        for timestep in stock.scheduler.timesteps:
            given, null = (stock.unet(z, timestep, class_labels=value).sample for value in (labels, torch.full((3,), 12)))
            z = stock.scheduler.step(null + guidance * (given - null), timestep, z).prev_sample
    pipeline, model, _ = saved.open_model(str(folder))
    ours = sampler.generate(pipeline, model, prompts, [3, 4, 5], sampler.time_grid(8, 4), guidance)
    assert (ours - z).abs().max() <= 1e-4


def test_the_latents_are_the_pixels_and_gray_is_shown_as_rgb(folders):
    images = scenes.render(scenes.plan(2, torch.Generator().manual_seed(0)))
    rgb, gray = (load.load_pipeline(str(folders[kind])) for kind in ("classes", "gray"))
    assert torch.equal(models.encode(rgb, images), images) and torch.equal(models.decode(rgb, images), images)
    assert models.decode(rgb, 3 * images).abs().max() == 1
    luma = models.encode(gray, images)
    assert luma.shape == (2, 1, 64, 64) and torch.allclose(luma[:, 0], images[:, 0] * 0.299 + images[:, 1] * 0.587 + images[:, 2] * 0.114)
    shown = models.decode(gray, luma)
    assert shown.shape == images.shape and torch.equal(shown[:, 2], luma[:, 0])
    assert torch.allclose(models.encode(gray, shown), luma, atol=1e-6)          # gray pictures come back
    assert models.native_size(rgb) == (16, 16) and models.latent_shape(gray, 20) == (1, 20, 20)


# ---- classes ------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_the_name_of_a_class_and_none_is_the_null_class(folders):
    named, numbers, without = (load.load_pipeline(str(folders[kind])) for kind in ("classes", "numbers", "unconditional"))
    cond = models.encode_text(named, ["heart", "animal", "", None])
    assert cond["class_labels"].tolist() == [11, 0, 12, 12] and cond["class_labels"].dtype == torch.int64
    assert models.encode_text(numbers, ["2", "0"])["class_labels"].tolist() == [2, 0]
    assert models.encode_text(without, ["anything", "", None]) == {}
    assert [models.has_null(p) for p in (named, numbers, without)] == [True, False, False]
    assert pixel.class_names(numbers) == ["0", "1", "2"] and pixel.class_names(without) == []
    with pytest.raises(UserError, match="prompt 'fox': not one of this model's 12 classes: animal, food, .*heart"):
        models.encode_text(named, ["fox"])
    with pytest.raises(UserError, match="prompt '3': not one"):
        models.encode_text(numbers, ["3"])
    for null in ("", None):
        with pytest.raises(UserError, match="no null class"):
            models.encode_text(numbers, [null])
    with pytest.raises(UserError, match="--null-text zeros: .* no text"):
        models.encode_text(named, ["food"], null="zeros")


def test_of_many_classes_the_nearest_are_named(tmp_path):
    labels = [f"class {i}" for i in range(1000)]
    pipeline = load.load_pipeline(str(save(tmp_path / "m", labels=labels, num_class_embeds=1001)))
    with pytest.raises(UserError, match="1000 classes: .*class 77.*, ...") as found:
        models.encode_text(pipeline, ["clas 77"])
    assert len(str(found.value)) < 300


def test_what_needs_a_null_class_is_refused_where_there_is_none(folders, tmp_path):
    times = sampler.time_grid(1)
    for kind, prompt, reason in (("unconditional", "", "is unconditional"), ("numbers", "1", "has no null class")):
        pipeline, model, _ = saved.open_model(str(folders[kind]))
        with pytest.raises(UserError, match=f"guidance 2: this model {reason}; use guidance 1"):
            sampler.generate(pipeline, model, [prompt], [0], times, 2.0)
        with pytest.raises(UserError, match=f"guidance 2: this model {reason}"):
            train.main(options(folders[kind], tmp_path / kind, guidance_teacher=2.0))
    with pytest.raises(UserError, match="--text-dropout 0.1: .* use --text-dropout 0"):
        train.main(options(folders["numbers"], tmp_path / "d"))


@pytest.mark.parametrize("text, reason", [('["a", "a"]', "list of different names"), ('{"a": 0}', "list of different names"),
                                          ("[", "cannot be read"), ('["a", "b"]', "names 2 classes, and its UNet has 13")])
def test_labels_that_do_not_fit_are_refused(tmp_path, text, reason):
    folder = save(tmp_path / "m", num_class_embeds=13)
    (folder / "labels.json").write_text(text)
    with pytest.raises(UserError, match=f"--model .*labels.json .*{reason}"):
        load.load_pipeline(str(folder))


@pytest.mark.parametrize("changes, reason", [
    (dict(out_channels=6), "takes 3 channels and gives 6"), (dict(in_channels=4, out_channels=4), "takes 4 channels"),
    (dict(class_embed_type="timestep"), "class_embed_type .* 'timestep'"), (dict(time_embedding_type="fourier"), "embedding_type .* 'fourier'")])
def test_a_unet_that_is_asked_otherwise_is_refused(tmp_path, changes, reason):
    with pytest.raises(UserError, match=f"--model .*: .*{reason}"):
        load.load_pipeline(str(save(tmp_path / "m", **changes)))


def test_a_latent_model_without_text_is_still_refused(tmp_path):
    autoencoder = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4)
    diffusers.LDMPipeline(autoencoder, UNet2DModel(**UNET), build.make_scheduler()).save_pretrained(tmp_path / "ldm")
    with pytest.raises(UserError, match="LDMPipeline has vqvae beside its UNet2DModel; give a model of pixels"):
        load.load_pipeline(str(tmp_path / "ldm"))


# ---- from training to tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, changes", [
    ("unconditional", dict(pairs="student")), ("unconditional", dict(pairs="consistency", windows=[1])),
    ("classes", dict(pairs="trajectory")), ("classes", dict(pairs="data", reuse=2)),
    slow("unconditional", dict(pairs="trajectory")), slow("unconditional", dict(pairs="data", reuse=2)),
    slow("classes", dict(pairs="student")), slow("classes", dict(pairs="consistency", windows=[1]))],
    ids=lambda value: value if isinstance(value, str) else value["pairs"])
def test_the_same_loop_trains_pixels_from_every_kind_of_pairs(folders, tmp_path, kind, changes):
    last = train.main(options(folders[kind], tmp_path, grid_steps=2, **changes))
    assert not same_bits(weights(last), weights(folders[kind])) and list((tmp_path / "grids").glob("*.png"))


def test_latents_of_an_unconditional_model_are_cached_though_captions_are_dropped(folders, tmp_path):
    """The tenth that --text-dropout takes is row 0 of the captions, and of these it has none."""
    (tmp_path / "data").mkdir()
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * i, np.uint8)).save(tmp_path / "data" / f"{i}.png")
    last = train.main(options(folders["unconditional"], tmp_path / "out", data=str(tmp_path / "data"), caption="x", pairs="data",
                              cache_latents=True, text_dropout=0.5, batch=8))
    assert not same_bits(weights(last), weights(folders["unconditional"]))


def test_an_unconditional_model_is_led_away_from_a_weaker_one(folders):
    folder = str(folders["unconditional"])
    pipeline, model, _ = saved.open_model(folder, guide=folder)                    # as strong: nothing to be led away from
    z = [sampler.generate(pipeline, model, [""], [0], sampler.time_grid(2), guidance) for guidance in (1.0, 2.0)]
    assert torch.allclose(*z, atol=1e-4)


def test_classes_without_null_class_train_from_their_names(folders, tmp_path):
    (tmp_path / "names.txt").write_text("0\n2\n")
    last = train.main(options(folders["numbers"], tmp_path / "out", data="", prompts=str(tmp_path / "names.txt"), text_dropout=0.0))
    assert not (last / "labels.json").exists()             # none is invented
    pipeline, model, _ = saved.open_model(str(last))
    assert sampler.generate(pipeline, model, ["1"], [0], sampler.time_grid(1)).isfinite().all()


def test_a_student_keeps_the_labels_says_how_it_is_sampled_and_is_resumed(folders, students, tmp_path):
    named, without = (students(kind) / "student-2" for kind in ("classes", "unconditional"))
    assert json.loads((named / "labels.json").read_text()) == LABELS and not (without / "labels.json").exists()
    assert "--prompt CLASS --steps 2" in (named / "README.md").read_text()
    assert "from_pretrained(folder)(num_inference_steps=2)" in (without / "README.md").read_text()
    assert set(p.name for p in named.iterdir()) == {"model_index.json", "unet", "scheduler", "labels.json", "README.md", "reflow.json"}
    assert same_bits(export.trained_weights(named, 0), weights(named))
    shutil.copytree(students("classes"), tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "student-1")        # the last stage begins anew from student-2
    last = train.main(options(folders["classes"], students("classes"), windows=[4, 2, 1], resume=True))
    c = options(folders["classes"], tmp_path / "again", windows=[4, 2, 1], cache=str(students("classes") / "cache"))
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    (tmp_path / "again" / "config.json").write_text(json.dumps({**settings, "out": c.out, "cache": c.cache}))
    (tmp_path / "again" / "checkpoint-000004.safetensors").unlink(missing_ok=True)
    assert same_bits(weights(train.main(c)), weights(last))


def test_a_difference_is_merged_into_another_pixel_model(folders, students, tmp_path):
    student = students("unconditional") / "student-4"
    export.export_delta(export.DeltaConfig(str(student), "", str(tmp_path / "d.safetensors")))
    export.merge(export.MergeConfig(str(tmp_path / "d.safetensors"), str(folders["unconditional"]), str(tmp_path / "merged")))
    merged = weights(tmp_path / "merged")
    for name, value in weights(student).items():
        assert torch.allclose(merged[name], value, atol=1e-6)


def test_lora_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="--lora 2: diffusers puts no adapters on a UNet2DModel"):
        train.main(options(folders["unconditional"], tmp_path, lora=2))


def test_random_init_knows_the_architecture_of_a_folder(folders):
    random, trained = (load.load_pipeline(str(folders["classes"]), random_init=flag).unet.state_dict() for flag in (True, False))
    assert {k: v.shape for k, v in random.items()} == {k: v.shape for k, v in trained.items()} and not same_bits(random, trained)


def test_latents_are_cached_as_pixels(folders, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(imaging.to_pil(scenes.render(scenes.plan(4, torch.Generator().manual_seed(0))))):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(LABELS[i])
    last = train.main(options(folders["classes"], tmp_path / "out", data=str(folder), pairs="data", cache_latents=True))
    rows, text = (load_file(tmp_path / "out" / "cache" / name / "00000.safetensors") for name in ("latents", "captions"))
    dataset = captioned.open_dataset(str(folder), "", 0)
    assert torch.equal(rows["z_0"], dataset.decode(range(4), 16)) and last.exists()
    assert text["class_labels"].tolist() == [len(LABELS), 0, 1, 2, 3]                  # the null class first


def test_sampler_needs_a_prompt_only_where_there_is_a_class(folders, tmp_path):
    def run(kind, **changes):
        sampler.main(sampler.Config(model=str(folders[kind]), steps=2, out=str(tmp_path / f"{kind}.png"), **changes))
    run("unconditional")
    run("classes", prompt=["food"])
    run("classes", prompt=["food"], guidance=2.0, grid=True, save_steps=True)
    assert (tmp_path / "unconditional.png").stat().st_size > 0 and (tmp_path / "classes-steps.png").exists()
    with pytest.raises(UserError, match="no prompt"):
        run("classes")
    with pytest.raises(UserError, match="not one of this model's 12 classes"):
        run("classes", prompt=["red heart on blue"])


@pytest.mark.parametrize("kind", ["classes", slow("unconditional")])
def test_protocol_pixel_measures_students_against_their_teacher(students, parts, tmp_path, kind, monkeypatch):  # noqa: F811
    monkeypatch.setattr(measuring, "STRAIGHTNESS_STEPS", 2)
    result = evaluation.main(protocols.Config(run=str(students(kind)), protocol="pixel", n=80, real=80, steps=[1], ddim_steps=[1],
                                               teacher_steps=4, paths=4, cache=str(tmp_path), device="cpu", clip=str(parts / "tiny-clip"), judge=str(parts / "judge")))
    found = result["protocol"]
    assert found["size"] == "16 pixels as generated, 64 as both networks see them"
    assert found["resize"].endswith("of real and generated images")
    assert "classes" in found["captions"] and [row["steps"] for row in result["rows"]] == [4, 1, 1]
    assert all(row["fd"] > 0 and len(row["straightness"]) == (row["windows"] or row["steps"]) for row in result["rows"])
    assert (students(kind) / "grid.png").exists()


def test_real_pictures_of_protocol_pixel_are_drawn_at_its_size():
    images, captions = measuring.real_images(300, "prompts", "scenes-by-group", 16)
    assert images.shape == (300, 3, 16, 16) and set(captions) == {"", *LABELS} and 10 <= captions.count("") <= 55


# ---- the pictures, the embedded model -----------------------------------------------------------------------------------


def test_pictures_by_group_are_scenes_of_one_object_with_class_names():
    by_group = captioned.open_dataset("scenes-by-group", "", 3)
    plans, numbers = by_group.plans(range(400)), by_group.caption_indices(range(400))
    assert set(plans[:, 0].tolist()) == {1} and by_group.images(range(2), 16).shape == (2, 3, 16, 16)
    captions = [by_group.captions[i] for i in numbers]
    assert set(captions) == {"", *LABELS} and 20 <= captions.count("") <= 60
    _, facts = scenes.describe(plans, scenes.GROUP_LEVELS)
    assert all(caption in ("", fact["group_a"]) for caption, fact in zip(captions, facts))


def test_the_pixel_model_is_built_trained_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "ASSETS", tmp_path / "assets")
    builder.build(tmp_path / "runs", 3)
    folder = tmp_path / "assets" / "tiny-pixel"
    assert json.loads((folder / "labels.json").read_text()) == LABELS
    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    pipeline = load.load_pipeline(str(folder))
    assert models.has_null(pipeline) and configs.read_schedule(pipeline.scheduler)[1] == "v_prediction"
    trained = load_file(tmp_path / "runs" / "pixel.safetensors")
    assert torch.allclose(pipeline.unet.conv_in.weight, trained["conv_in.weight"], atol=1e-3)


def test_pixel_loss_is_zero_where_the_network_knows_v_and_one_where_it_says_nothing():
    alphas, generator = build.make_scheduler().alphas_cumprod, torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 512, 3, 4, 4, generator=generator)
    t, classes = torch.randint(1000, (512,), generator=generator), torch.zeros(512).long()
    alpha = alphas[t].sqrt()[:, None, None, None]
    v = alpha * eps - (1 - alpha ** 2).sqrt() * x

    class Known(torch.nn.Module):
        def forward(self, z, timestep, class_labels):
            assert torch.equal(class_labels, classes) and torch.equal(timestep, t)
            assert torch.allclose(z, alpha * x + (1 - alpha ** 2).sqrt() * eps)
            return type("Output", (), {"sample": self.scale * v})
    known = Known()
    for scale, expected in ((1.0, 0.0), (0.0, v.square().mean().item())):
        known.scale = scale
        assert abs(builder.loss(known, (x, classes, t, eps), alphas).item() - expected) < 1e-6


@pytest.mark.skipif(not (ROOT / "assets" / "tiny-pixel").exists(), reason="assets/tiny-pixel has not been built: python -m tools.pixel")
def test_the_embedded_pixel_model_is_a_preset_that_knows_its_classes():
    pipeline, model, _ = saved.open_model("pixel")
    assert pixel.class_names(pipeline) == LABELS and models.has_null(pipeline) and models.native_size(pipeline) == (16, 16)
    assert load.PRESETS["pixel"][1] in drawn.SOURCES
    z = sampler.generate(pipeline, model, LABELS, range(len(LABELS)), sampler.time_grid(16))
    assert z.isfinite().all() and z.abs().mean() < 1 and (z.abs() > 1.3).float().mean() < 0.01       # pictures, not noise


def test_bench_times_a_pixel_model(folders, capsys):
    c = bench.Config(model=str(folders["classes"]), prompt="food", updates=1, batch=2, steps=2, repeats=1)
    found = bench.training(c, "cpu")
    assert found["evaluations"]["student"] == 2 and found["weights"]["text"] == found["weights"]["vae"] == 0
    assert set(bench.sampling(c, "cpu")) == {"ours", "network"} and "diffusers' pipeline" not in capsys.readouterr().out
    assert bench.forward_flops(c) > 1e5
