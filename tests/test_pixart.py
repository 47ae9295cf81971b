"""PixArt-alpha and -Sigma behind the contract: stock pipelines, masks, resolution, sizes, and what is refused."""
import warnings

import diffusers
import pytest
import torch
from small_transformers import alpha, alpha_1024, pixart
from test_train import small

import models
import sampler
import train
from models import architectures, load, saved
from runtime.cli import UserError

KINDS = {"sigma": pixart, "alpha": alpha, "alpha-1024": alpha_1024, "alpha-256": lambda: alpha(sample_size=32)}
PROMPTS = ["red fox on blue", "a heart"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pixart")
    for name, make in KINDS.items():
        make().save_pretrained(root / name)
    return root


def open_stock(folder):
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return stock


def stock_latents(stock, prompts, seeds, steps, guidance=1, **call):
    return stock(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=sampler.generators(seeds), output_type="latent",
                 **call).images


def difference(ours, theirs):
    """As a share of the largest number: x = z / alpha, and alpha is 0.0064 at t = 1."""
    return (ours - theirs).abs().max() / theirs.abs().max()


UNBINNED = dict(use_resolution_binning=False)


@pytest.mark.parametrize("kind, guidance, call", [
    ("sigma", 1, UNBINNED), ("sigma", 4.5, UNBINNED), ("alpha", 1, UNBINNED), ("alpha-256", 1, {}),
    ("alpha-1024", 1, dict(UNBINNED, height=64, width=64))])
def test_an_untrained_student_is_the_teachers_ddim_in_the_stock_pipeline(folders, tmp_path, kind, guidance, call):
    pipeline, size = load.load_pipeline(str(folders / kind)), call.get("height")
    model = models.as_model(pipeline)
    solved = {steps: sampler.generate(pipeline, model, PROMPTS, [0, 1], sampler.time_grid(steps), guidance, size=size) for steps in (1, 2, 4)}
    models.family(pipeline).as_student(pipeline, model.schedule).save_pretrained(tmp_path / "s")
    stock = open_stock(tmp_path / "s")
    for steps, ours in solved.items():
        assert difference(ours, stock_latents(stock, PROMPTS, [0, 1], steps, guidance, **call)) <= 1e-6
    assert ("use_resolution_binning=False" in models.family(pipeline).stock_call(pipeline, 2)) == (kind in ("sigma", "alpha"))


def test_a_student_of_another_size_is_sampled_alike_by_the_stock_pipeline(folders, tmp_path):
    """Positions are scaled from sample_size: written with another one, the network must still see those it was trained at."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    train.main(small(folders / "sigma", tmp_path / "run", data="", prompts=str(tmp_path / "p.txt"),
                     updates=2, trajectories=2, windows=[2, 1], lr=1e-3, size=32))
    for windows, steps in ((1, 1), (2, 2), (2, 4)):
        student = tmp_path / "run" / f"student-{windows}"
        pipeline, model, _ = saved.open_model(str(student))
        assert models.native_size(pipeline) == (32, 32)
        ours = sampler.generate(pipeline, model, PROMPTS, [3, 4], sampler.time_grid(steps, windows))
        assert ours.shape == (2, 4, 4, 4)
        assert difference(ours, stock_latents(open_stock(student), PROMPTS, [3, 4], steps, **UNBINNED)) <= 1e-6
        card = (student / "README.md").read_text()
        assert f"(prompt, num_inference_steps={windows}, guidance_scale=1, use_resolution_binning=False)" in card
        assert "diffusers takes 4.5" in card
    trained, _, _ = saved.open_model(str(folders / "sigma"), size=32)
    trained.transformer.load_state_dict(pipeline.transformer.state_dict())
    z, cond = torch.randn(2, 4, 4, 4), models.encode_text(pipeline, PROMPTS)
    pairs = (models.as_model(each)(z, torch.ones(2), cond)[1] for each in (trained, pipeline))
    assert torch.allclose(*pairs, atol=1e-5)


def test_what_the_mask_hides_changes_nothing(folders):
    pipeline = load.load_pipeline(str(folders / "sigma"))
    model, cond = models.as_model(pipeline), models.encode_text(pipeline, ["red fox"])
    z, t = torch.randn(1, 4, 8, 8), torch.ones(1)
    assert cond["encoder_hidden_states"].shape == (1, 300, 16) and cond["encoder_attention_mask"].sum() == 3      # red, fox, </s>
    before = model(z, t, cond)[1]
    for token, same in ((3, True), (299, True), (2, False), (0, False)):
        changed = cond["encoder_hidden_states"].clone()
        changed[:, token] += 1
        assert torch.equal(model(z, t, {**cond, "encoder_hidden_states": changed})[1], before) == same, token
    assert not torch.equal(model(z, t, {**cond, "encoder_attention_mask": torch.ones(1, 300).long()})[1], before)
    with pytest.raises(TypeError, match="encoder_attention_mask"):
        model(z, t, {"encoder_hidden_states": cond["encoder_hidden_states"]})


def test_text_is_what_the_stock_pipeline_makes_of_it(folders):
    for kind, length in (("sigma", 300), ("alpha", 120)):
        pipeline = load.load_pipeline(str(folders / kind))
        ours = models.encode_text(pipeline, ["Red FOX ", None, ""], batch=2)
        states, mask, *_ = pipeline.encode_prompt(["red fox", "", ""], False)
        assert torch.equal(ours["encoder_hidden_states"], states) and torch.equal(ours["encoder_attention_mask"], mask)
        assert mask.shape[1] == length
        exact, over = "a " * (length - 1), "a " * (length + 1)                # and the end
        with pytest.warns(UserWarning, match="'a a .*' is 2 tokens too long .* so are 1 more"):
            models.encode_text(pipeline, [over, "fox", over + "a"])

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            models.encode_text(pipeline, [exact])
    with pytest.raises(UserError, match='--null-text zeros: the null embedding of this model is the encoded ""; leave it out'):
        models.encode_text(pipeline, [None], null="zeros")


def test_alpha_is_told_the_size_where_the_stock_pipeline_tells_it(folders):
    pipeline = load.load_pipeline(str(folders / "alpha-1024"))
    cond = models.encode_text(pipeline, ["fox", "heart"], size=(64, 128))
    assert cond["resolution"].tolist() == [[64, 128]] * 2 and cond["aspect_ratio"].tolist() == [[0.5]] * 2
    assert models.encode_text(pipeline, ["fox"])["resolution"].tolist() == [[1024, 1024]]
    z, t = torch.randn(2, 4, 8, 8), torch.ones(2)
    assert not torch.allclose(models.as_model(pipeline)(z, t, cond)[1], models.as_model(pipeline)(z, t, {**cond, "resolution": cond["resolution"] * 2})[1])
    assert "resolution" not in models.encode_text(load.load_pipeline(str(folders / "alpha")), ["fox"])


@pytest.mark.parametrize("make, reason", [
    (lambda: pixart(out_channels=6), "takes 4 channels and gives 6; give one with 4, or 8 where it learned its variance"),
    (lambda: pixart(width=24), "text_encoder gives 24 channels, and its transformer takes 16 .*; give the text encoder"),
    (lambda: pixart(sample_size=128, num_attention_heads=3, cross_attention_dim=24), "use_additional_conditions .* PixArtSigmaPipeline tells no "
     "resolution at sample_size 128; only PixArtAlphaPipeline"),
    (lambda: alpha(use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24), "tells no resolution at sample_size 8")])
def test_what_contradicts_the_stock_pipeline_is_refused(tmp_path, make, reason):
    make().save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=f"--model .*: .*{reason}"):
        load.load_pipeline(str(tmp_path / "m"))


def test_a_missing_text_encoder_adapters_and_sizes_are_refused_before_anything_is_cached(folders, tmp_path):
    pipeline = pixart()
    pipeline.text_encoder = None
    pipeline.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="PixArtSigmaPipeline lacks its text_encoder; download it again, whole"):
        load.load_pipeline(str(tmp_path / "m"))
    (tmp_path / "p.txt").write_text("fox\n")
    for kind, changes, reason in (("sigma", dict(lora=4), "--lora 4: diffusers puts no adapters on a PixArtTransformer2DModel"),
                                  ("alpha-1024", dict(size=512), "--size 512: stock pipelines tell .* use --size 1024"),
                                  ("sigma", dict(null_text="zeros"), "--null-text zeros")):
        with pytest.raises(UserError, match=reason):
            train.main(small(folders / kind, tmp_path / "run", data="", prompts=str(tmp_path / "p.txt"), **changes))
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize("name, size", [("pixart", 611_349_152), ("pixart-sigma", 610_856_096)])
def test_pixart_has_its_published_size(name, size):
    pipeline = architectures.build(name, weights=False)
    counts = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in ("transformer", "text_encoder", "vae")}
    assert counts == dict(transformer=size, text_encoder=4_762_310_656, vae=83_653_863)
    assert models.native_size(pipeline) == (1024, 1024) and models.latent_shape(pipeline) == (4, 128, 128)
    assert models.family(pipeline).stock_call(pipeline, 4) == "prompt, num_inference_steps=4, guidance_scale=1"
    predict, cond = (make(pipeline.transformer) for make in (models.family(pipeline).forward, models.family(pipeline).meta_condition))
    assert ("resolution" in cond) == (name == "pixart")
    assert predict(torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta"), **cond).shape == (1, 4, 32, 32)
