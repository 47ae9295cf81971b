"""SANA behind the contract: the stock pipeline, the instruction before a prompt, masks, its flow, its autoencoder."""
import diffusers
import pytest
import torch
from small_transformers import sana
from test_train import small

import models
import sampler
import train
from models import architectures, load, saved
from runtime.cli import UserError

PROMPTS = ["red fox on blue", "a heart"]
CALL = dict(height=32, width=32, use_resolution_binning=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sana().save_pretrained(tmp_path_factory.mktemp("sana") / "sana")
    return str(tmp_path_factory.getbasetemp() / "sana0" / "sana")


def open_stock(folder):
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is diffusers.SanaPipeline
    stock.set_progress_bar_config(disable=True)
    return stock


def stock_latents(stock, prompts, seeds, steps, guidance=1, **call):
    return stock(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=sampler.generators(seeds), output_type="latent",
                 **{**CALL, **call}).images


@pytest.mark.parametrize("guidance, changes", [(1, {}), (4.5, {}), (1, dict(timestep_scale=0.001)),
                                               (1, dict(interpolation_scale=2, qk_norm="rms_norm_across_heads"))])
def test_an_untrained_student_is_the_teachers_euler_in_the_stock_pipeline(folder, tmp_path, guidance, changes):
    if changes:
        folder = str(tmp_path / "teacher")
        sana(**changes).save_pretrained(folder)
    pipeline = load.load_pipeline(folder)
    model, cond = models.as_model(pipeline), models.encode_text(pipeline, PROMPTS)
    solved = {steps: sampler.generate(pipeline, model, PROMPTS, [0, 1], sampler.time_grid(steps), guidance) for steps in (1, 2, 4)}
    models.family(pipeline).as_student(pipeline, model.schedule).save_pretrained(tmp_path / "s")
    stock = open_stock(tmp_path / "s")
    assert stock.scheduler.config.shift == model.schedule.shift == 3.0
    for steps, ours in solved.items():
        assert (ours - stock_latents(stock, PROMPTS, [0, 1], steps, guidance)).abs().max() <= 1e-5
        if guidance == 1:                                  # and Euler, by hand: z falls by the network's velocity
            z, sigmas = sampler.noise([0, 1], (4, 8, 8)), [3 * (1 - k / steps) / (1 + 2 * (1 - k / steps)) for k in range(steps + 1)]
            with torch.no_grad():
                for sigma, after in zip(sigmas, sigmas[1:]):
                    time = torch.full((2,), 1000 * sigma * pipeline.transformer.config.timestep_scale)
                    z = z + (after - sigma) * pipeline.transformer(z, timestep=time, **cond).sample
            assert (ours - z).abs().max() <= 1e-5


def test_a_student_of_another_size_is_sampled_alike_by_the_stock_pipeline(tmp_path):
    """Of a network with positions, too, which are scaled from sample_size; also with the arguments of the card."""
    sana(interpolation_scale=2).save_pretrained(tmp_path / "teacher")
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    train.main(small(tmp_path / "teacher", tmp_path / "run", data="", prompts=str(tmp_path / "p.txt"),
                     updates=2, trajectories=2, windows=[2, 1], lr=1e-3, size=64))
    for windows, steps in ((1, 1), (2, 2), (2, 4)):
        student = tmp_path / "run" / f"student-{windows}"
        pipeline, model, _ = saved.open_model(str(student))
        ours = sampler.generate(pipeline, model, PROMPTS, [3, 4], sampler.time_grid(steps, windows))
        theirs = stock_latents(open_stock(student), PROMPTS, [3, 4], steps, height=64, width=64)
        assert ours.shape == (2, 4, 16, 16) and (ours - theirs).abs().max() <= 1e-5
        card = (student / "README.md").read_text()
        assert f"num_inference_steps={windows}, guidance_scale=1, height=64, width=64, use_resolution_binning=False)" in card
    trained, _, _ = saved.open_model(str(tmp_path / "teacher"), size=64)
    trained.transformer.load_state_dict(pipeline.transformer.state_dict())
    z, cond = torch.randn(2, 4, 16, 16), models.encode_text(pipeline, PROMPTS)
    pairs = (models.as_model(each)(z, torch.ones(2), cond)[0] for each in (trained, pipeline))
    assert torch.allclose(*pairs, atol=1e-5)


def test_a_prompt_follows_the_instruction_and_the_null_embedding_does_not(folder):
    pipeline = load.load_pipeline(folder)
    ours = models.encode_text(pipeline, ["Red FOX ", None, "a heart"], batch=2)
    given = dict(complex_human_instruction=diffusers.SanaPipeline.__call__.__wrapped__.__defaults__[-1])
    assert given["complex_human_instruction"][-1] == "User Prompt: "
    for i, (text, options) in enumerate((("red fox", given), ("", {}), ("a heart", given))):
        states, mask, *_ = pipeline.encode_prompt(text, False, **options)
        assert torch.equal(ours["encoder_hidden_states"][i:i + 1], states) and torch.equal(ours["encoder_attention_mask"][i:i + 1], mask)
        plain, _, *_ = pipeline.encode_prompt(text, False)
        assert torch.equal(plain, states) == (text == "")
    assert ours["encoder_attention_mask"].shape == (3, 300) and ours["encoder_attention_mask"][1].sum() == 1
    with pytest.warns(UserWarning, match="'x* is 2 tokens too long|xxx.* tokens too long"):
        models.encode_text(pipeline, ["x" * 301])
    with pytest.raises(UserError, match="--null-text zeros: .*encoded"):
        models.encode_text(pipeline, [None], null="zeros")


def test_what_the_mask_hides_changes_nothing(folder):
    pipeline = load.load_pipeline(folder)
    model, cond = models.as_model(pipeline), models.encode_text(pipeline, ["red fox"])
    z, t, seen = torch.randn(1, 4, 8, 8), torch.ones(1), int(cond["encoder_attention_mask"].sum())
    before = model(z, t, cond)[0]
    for token, same in ((seen, True), (299, True), (seen - 1, False), (0, False)):
        changed = cond["encoder_hidden_states"].clone()
        changed[:, token] += torch.randn(16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model(z, t, {**cond, "encoder_hidden_states": changed})[0], before) == same, token


def test_pictures_go_through_the_autoencoder_as_in_the_stock_pipeline(folder):
    pipeline = load.load_pipeline(folder)
    assert pipeline.vae_scale_factor == 4 and models.latent_shape(pipeline, 32) == (4, 8, 8)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 4
    images, vae = models.decode(pipeline, z), pipeline.vae
    with torch.no_grad():
        assert torch.allclose(images, vae.decode(z / 0.41407).sample.clamp(-1, 1), atol=1e-5)
        assert torch.allclose(models.encode(pipeline, images), vae.encode(images).latent * 0.41407, atol=1e-5)
    assert load.load_pipeline(folder, vae=None).vae_scale_factor == 4


def test_students_that_are_distilled_already_and_schedulers_of_diffusion_are_refused(tmp_path, folder):
    for make, reason in ((lambda: sana(guidance_embeds=True), "takes guidance as an input, as Sana-Sprint"),
                         (lambda: sana(out_channels=6), "takes 4 channels and gives 6"),
                         (lambda: sana(width=24), "text_encoder gives 24 channels, and its transformer takes 16")):
        make().save_pretrained(tmp_path / "m")
        with pytest.raises(UserError, match=reason):
            load.load_pipeline(str(tmp_path / "m"))
    pipeline = sana()
    pipeline.scheduler = diffusers.DDIMScheduler()
    pipeline.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="DDIMScheduler is for diffusion .* its SanaTransformer2DModel for flow matching"):
        load.load_pipeline(str(tmp_path / "m"))


def test_sana_has_its_published_size():
    pipeline = architectures.build("sana", weights=False)
    counts = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in ("transformer", "text_encoder", "vae")}
    assert counts == dict(transformer=1_604_462_752, text_encoder=2_614_341_888, vae=312_250_275)
    assert models.latent_shape(pipeline) == (32, 32, 32) and models.schedule(pipeline)[0].shift == 3.0
    assert models.family(pipeline).stock_call(pipeline, 4) == "prompt, num_inference_steps=4, guidance_scale=1"
    predict, cond = (make(pipeline.transformer) for make in (models.family(pipeline).forward, models.family(pipeline).meta_condition))
    assert predict(torch.empty(1, 32, 32, 32, device="meta"), torch.empty(1, device="meta"), **cond).shape == (1, 32, 32, 32)
