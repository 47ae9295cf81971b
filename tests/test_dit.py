"""DiT behind the contract: stock pipelines, classes, its learned variance, and what it cannot do."""
import json

import diffusers
import pytest
import torch
from small_transformers import dit
from test_train import small

import models
import sampler
import train
from models import architectures, load, saved
from models.dit import class_number
from models.student import make_student
from runtime.cli import UserError


def save(folder, **changes):
    dit(**changes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("dit") / "dit")


def stock_latents(folder, classes, seeds, steps, guidance=1):
    """Latents of the stock pipeline: it has no output_type for them, so what its autoencoder is given."""
    stock, given = diffusers.DiffusionPipeline.from_pretrained(folder), []
    assert type(stock) is diffusers.DiTPipeline
    stock.set_progress_bar_config(disable=True)
    decode = stock.vae.decode
    stock.vae.decode = lambda z: given.append(z * stock.vae.config.scaling_factor) or decode(z)
    stock(classes, num_inference_steps=steps, guidance_scale=guidance, generator=sampler.generators(seeds), output_type="pt")
    return given[0]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run of two stages, and its folder of names."""
    out = tmp_path_factory.mktemp("dit-run")
    (out / "names.txt").write_text("fox\ncat\n12\n")
    train.main(small(folder, out / "run", data="", prompts=str(out / "names.txt"), updates=8, windows=[2, 1], lr=1e-3))
    return out / "run"


@pytest.mark.parametrize("windows, steps", [(1, 1), (2, 2), (2, 4)])
def test_a_student_is_sampled_alike_by_the_stock_pipeline(run, folder, windows, steps):
    student = run / f"student-{windows}"
    pipeline, model, info = saved.open_model(str(student))
    ours = sampler.generate(pipeline, model, ["red fox", "cat", "12"], [3, 4, 5], sampler.time_grid(steps, windows))
    theirs = stock_latents(student, [0, 7, 12], [3, 4, 5], steps)
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()    # x = z / alpha, and alpha is 0.0064 at t = 1
    assert not torch.allclose(ours, stock_latents(student, [0, 7, 13], [3, 4, 5], steps))
    assert f"(class_labels=[0], num_inference_steps={windows}, guidance_scale=1)" in (student / "README.md").read_text()
    assert diffusers.DiffusionPipeline.from_pretrained(student).labels == {"cat": 7, "fox": 0, "red fox": 0}


@pytest.mark.parametrize("steps, guidance", [(1, 1), (2, 1), (4, 3.0)])
def test_an_untrained_student_is_the_teachers_ddim(folder, tmp_path, steps, guidance):
    pipeline = load.load_pipeline(folder)
    ours = sampler.generate(pipeline, models.as_model(pipeline), ["fox", "999"], [0, 1], sampler.time_grid(steps), guidance)
    models.family(pipeline).as_student(pipeline, models.schedule(pipeline)[0]).save_pretrained(tmp_path / "s")
    theirs = stock_latents(tmp_path / "s", [0, 999], [0, 1], steps, guidance)
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_a_prompt_is_the_name_of_a_class_or_its_number(folder):
    pipeline = load.load_pipeline(folder)
    assert models.encode_text(pipeline, ["red fox", "cat", "999", "", None])["class_labels"].tolist() == [0, 7, 999, 1000, 1000]
    for wrong in ("dog", "1000", "-1"):
        with pytest.raises(UserError, match=f"prompt '{wrong}': none of this model's classes; give a number from 0 to 999, or a name, such as"):
            class_number(pipeline, wrong)
    with pytest.raises(UserError, match="--null-text zeros: .* no text"):
        models.encode_text(pipeline, ["fox"], null="zeros")
    assert models.prompts(pipeline) == "class" and models.has_null(pipeline)


def test_no_class_is_dropped_while_it_trains(folder):
    """diffusers' embedding of classes drops one in ten of them in training mode, in each block another one."""
    pipeline = load.load_pipeline(folder)
    z, t = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((64,), 0.5)
    cond = {"class_labels": torch.arange(64)}
    frozen = models.as_model(pipeline)(z, t, cond)[1]
    student = make_student(small(folder, "x"), pipeline.transformer, torch.device("cpu"))
    assert student.training
    with torch.no_grad():
        assert torch.equal(models.as_model(pipeline)(z, t, cond)[1], frozen)


def test_of_the_learned_variance_nothing_is_read(folder, tmp_path):
    pipeline = load.load_pipeline(folder)
    z, t, cond = torch.randn(2, 4, 8, 8), torch.ones(2), {"class_labels": torch.tensor([0, 7])}
    x, eps = models.as_model(pipeline)(z, t, cond)
    output = pipeline.transformer(z, torch.full((2,), 999.0), cond["class_labels"]).sample
    assert output.shape[1] == 8 and torch.allclose(eps, output[:, :4])
    rows = pipeline.transformer.proj_out_2.weight.view(2, 2, 8, -1)            # (patch, patch, channel, width)
    rows[:, :, 4:] += 1
    assert torch.equal(models.as_model(pipeline)(z, t, cond)[1], eps)
    rows[:, :, :4] += 1
    assert not torch.allclose(models.as_model(pipeline)(z, t, cond)[1], eps)
    plain = load.load_pipeline(save(tmp_path / "plain", out_channels=4))
    assert models.as_model(plain)(z, t, cond)[1].shape == z.shape
    with pytest.raises(UserError, match="takes 4 channels and gives 6; give one with 4, or 8 where it learned its variance"):
        load.load_pipeline(save(tmp_path / "six", out_channels=6))


def test_names_beyond_its_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match="names 'cat' as class 7, and its transformer has 5"):
        load.load_pipeline(save(tmp_path / "m", num_embeds_ada_norm=5))


def test_what_it_cannot_do_is_refused_before_anything_is_cached(folder, tmp_path):
    (tmp_path / "p.txt").write_text("fox\n")
    for changes, reason in ((dict(lora=4), "--lora 4: diffusers puts no adapters on a DiTTransformer2DModel"),
                            (dict(size=128), "--size 128: the positions of a DiT .* use --size 64"),
                            (dict(size=100), "--size 100: must be a multiple of 16")):
        with pytest.raises(UserError, match=reason):
            train.main(small(folder, tmp_path / "run", data="", prompts=str(tmp_path / "p.txt"), **changes))
    assert not (tmp_path / "run" / "cache").exists()
    train.main(small(folder, tmp_path / "run", data="", prompts=str(tmp_path / "p.txt"), size=64, updates=1, windows=[1]))


def test_published_folders_that_name_the_class_of_old_are_loaded(folder, tmp_path):
    """The first files say Transformer2DModel, which diffusers reads as a DiTTransformer2DModel."""
    save(tmp_path / "m")
    for file, part in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        content = json.loads((tmp_path / "m" / file).read_text())
        content[part] = ["diffusers", "Transformer2DModel"] if part == "transformer" else "Transformer2DModel"
        (tmp_path / "m" / file).write_text(json.dumps(content))
    new, old = load.load_pipeline(folder), load.load_pipeline(str(tmp_path / "m"))
    assert type(old.transformer) is diffusers.DiTTransformer2DModel
    assert all(torch.equal(a, b) for a, b in zip(new.transformer.parameters(), old.transformer.parameters()))
    random = load.load_pipeline(str(tmp_path / "m"), random_init=True, seed=1)
    assert type(random.transformer) is diffusers.DiTTransformer2DModel


def test_dit_has_its_published_size():
    """675,129,632 with its table of positions, which is no parameter in diffusers, where each of the 28 blocks has embeddings of its own."""
    pipeline = architectures.build("dit", weights=False)
    count = sum(p.numel() for p in pipeline.transformer.parameters())
    embeddings = 1001 * 1152 + (256 + 1) * 1152 + (1152 + 1) * 1152
    assert count - 27 * embeddings + 256 * 1152 == 675_129_632
    assert models.native_size(pipeline) == (256, 256) and models.latent_shape(pipeline) == (4, 32, 32)
    predict, cond = (make(pipeline.transformer.to("meta")) for make in (models.family(pipeline).forward, models.family(pipeline).meta_condition))
    assert predict(torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta"), **cond).shape == (1, 4, 32, 32)
