"""How the embedded models are trained: Muon and the loop against closed forms and against themselves, what each network is asked, and
the whole builder, a few updates long."""
import functools
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

import models
import sampler
from data import scenes
from evaluation import judge, measuring, protocols
from models import load, saved
from runtime.cli import UserError
from tools import build, cards, fitting, sd3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the loop that trains every part ---------------------------------------------------------------------------------


def test_the_learning_rate_goes_up_stays_and_falls_to_zero():
    shares = [fitting.trapezoid(step, 1000) for step in range(1000)]
    assert shares[0] == 0.01 and shares[99] == shares[599] == 1 and shares[800] == 0.5 and 0 < shares[999] < 0.003
    assert all(a >= b for a, b in zip(shares[600:], shares[601:]))


def regression(folder, steps=12, stop=None):
    """A small training, stopped by an error before the update `stop`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def loss(network, batch, step):
        if step == stop:
            raise KeyboardInterrupt
        return (network(batch) - batch.sum(1, keepdim=True)).square().mean()
    fitting.fit("regression", model, loss, lambda g: torch.randn(16, 4, generator=g), steps, 0.01, folder, ema_decay=0.9, snapshots=5)
    return model.state_dict()


def test_a_training_goes_on_where_it_was(tmp_path, monkeypatch):
    straight = regression(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["regression-000005.safetensors", "regression-000010.safetensors",
                                                                "regression.safetensors"]
    (again := tmp_path / "again").mkdir()
    monkeypatch.setattr(fitting.time, "time", iter(range(0, 10 ** 6, 61)).__next__)         # a checkpoint after every update
    with pytest.raises(KeyboardInterrupt):
        regression(again, stop=7)
    resumed = regression(again)
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    assert all(torch.equal(value, regression(again)[key]) for key, value in straight.items())        # finished: read


def test_a_training_that_diverges_says_so(tmp_path):
    with pytest.raises(SystemExit, match="regression: loss nan at update 0"):
        fitting.fit("regression", torch.nn.Linear(2, 2), lambda model, batch, step: model(batch).sum() * float("nan"),
                    lambda g: torch.zeros(1, 2), 3, 0.1, tmp_path)


# ---- what the networks are asked -------------------------------------------------------------------------------------


@torch.no_grad()
def test_balance_takes_the_root_of_each_variance_and_what_is_decoded_stays():
    torch.manual_seed(0)
    vae, images = build.make_autoencoder().eval(), scenes.render(scenes.plan(24, generator()))
    vae.encoder.layers[-1].weight.mul_(torch.linspace(0.2, 2, build.CHANNELS)[:, None, None, None])

    def moments():
        z = vae.encode(images).latents.transpose(0, 1).flatten(1)
        return torch.cov(z), z.mean(1)
    before, decoded = torch.linalg.eigvalsh(moments()[0]), vae.decode(vae.encode(images).latents).sample
    build.balance(vae, images)
    cov, mean = moments()
    assert mean.abs().max() < 1e-4 and (cov - cov.diagonal().diag()).abs().max() < 1e-3
    assert torch.allclose(cov.diagonal(), (before / before[-1]).sqrt(), rtol=1e-2)
    inside = (slice(None), slice(None), slice(16, -16), slice(16, -16))                   # zeros are padded at the edge
    again = vae.decode(vae.encode(images).latents).sample
    assert (again - decoded)[inside].abs().mean() < 0.05 * decoded[inside].std()


def test_each_of_the_last_tokens_tells_the_latents_of_its_place():
    torch.manual_seed(0)
    tokenizer = build.make_tokenizer()
    painter = build.Painter(tokenizer)
    tokens = tokenizer(["fox left of pizza on blue"], padding="max_length", return_tensors="pt").input_ids
    assert tokens.shape == (1, build.WORDS + build.PLACES)
    latents = painter(tokens)
    assert latents.shape == (1, build.CHANNELS, 8, 8)
    told = painter.head(painter.text_encoder(tokens).last_hidden_state)[0, build.WORDS:]
    for place in range(build.PLACES):
        y, x = divmod(place, 4)
        assert torch.allclose(latents[0, :, 2 * y:2 * y + 2, 2 * x:2 * x + 2].flatten(), told[place], atol=1e-6)


def test_every_caption_leaves_the_places_their_tokens():
    tokenizer = build.make_tokenizer()
    longest = sorted(scenes.NAMES, key=lambda name: -len(tokenizer(name).input_ids))[0]
    text = f"{longest} left of {longest} on purple and yellow"
    assert len(tokenizer(text).input_ids) <= build.WORDS
    ids = tokenizer(scenes.vocabulary()).input_ids
    assert all(len(each) == 3 for each in ids) and len({each[1] for each in ids}) == len(ids)            # one token a word


def test_the_plainest_scene_is_decided_by_what_the_caption_tells():
    plans = scenes.plan(400, generator())
    plain = scenes.plainest(plans)
    captions, images = scenes.describe(plain)[0], scenes.render(plain)
    assert captions == scenes.describe(plans)[0]
    seen = {}
    for caption, image, level in zip(captions, images, plans[:, scenes.FACTS - 1]):
        if level == 0:
            assert torch.equal(seen.setdefault(caption, image), image)
    exact = plans[plans[:, scenes.FACTS - 1] == 0][:8]
    moved = exact.clone()
    moved[:, scenes.FACTS:] = torch.rand(8, scenes.UNIFORMS, generator=generator(1))
    assert torch.equal(scenes.render(scenes.plainest(exact)), scenes.render(scenes.plainest(moved)))
    assert not torch.equal(scenes.render(exact), scenes.render(moved))


def test_a_network_that_has_learned_its_guidance_has_no_loss():
    """Its answer with the text, u + 2.5 (eps - u), if u is its answer without."""
    alphas = build.make_scheduler().alphas_cumprod
    z_0, eps = torch.randn(2, 6, 16, 8, 8, generator=generator())
    text, null, t = torch.randn(6, 3, 4, generator=generator(1)), torch.zeros(6, 3, 4), torch.randint(1000, (6,), generator=generator())
    change = text.mean((1, 2))[:, None, None, None]                 # of its answer, by the text

    class Network:
        def __call__(self, z, t, said):
            answer = self.base if len(z) == 6 else torch.cat([self.base, self.base])
            told = said.mean((1, 2))[:, None, None, None]
            return type("Output", (), {"sample": answer + told})
    network = Network()
    network.base = eps - change / 2.5
    assert build.unet_loss(network, (z_0, text, null, t, eps), alphas, 2.5).item() < 1e-8
    assert build.unet_loss(network, (z_0, text, null, t, eps), alphas).item() > 1e-3
    network.base = eps - change
    assert build.unet_loss(network, (z_0, text, null, t, eps), alphas).item() < 1e-8


def test_the_curve_is_of_every_snapshot(tmp_path, monkeypatch):
    """The teacher's own weights as one of two: what its own row says."""
    with pytest.raises(UserError, match="--curve .*: no unet-"):
        cards.snapshots(tmp_path, 40)
    save_file(judge.Judge((8, 8, 8)).state_dict(), tmp_path / "judge.safetensors")
    config = functools.partial(protocols.Config, judge=str(tmp_path), real=48, cache=str(tmp_path / "cache"))
    monkeypatch.setattr(cards.protocols, "Config", config)
    weights = load_file(load.ASSETS / "tiny-sd" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "unet-000500.safetensors", {"updates": "500"})
    save_file({key: value * 0 for key, value in weights.items()}, tmp_path / "unet-000900.safetensors", {"updates": "900"})
    draw = cards.draw
    monkeypatch.setattr(cards, "draw", lambda *given: draw(*given, steps=1))
    right, nothing = cards.snapshots(tmp_path, 40)
    assert (right["updates"], right["samples"], nothing["samples"]) == (500, 32_000, 57_600)
    row = measuring.Evaluator(config(protocol="tiny", n=40, teacher_steps=1, paths=1)).row("tiny", 1, costly=False)
    assert right["fd_corrected"] == pytest.approx(row["fd_corrected"], rel=1e-3) != nothing["fd_corrected"]
    assert right["prompt_accuracy"] == row["prompt_accuracy"]["all"]


def test_a_small_card_has_a_line_for_each_number_of_steps(monkeypatch):
    class Evaluator:
        def __init__(self, c, rank, world, barrier):
            assert (c.protocol, c.teacher, c.n, rank, world) == ("pixel", "folder", 96, 0, 1)

        def row(self, folder, steps, costly):
            return dict(fd_corrected=12.0 / steps, fd_interval=[0.0, 12.0 / steps + 0.5], prompt_accuracy=dict(all=0.75))
    monkeypatch.setattr(cards.measuring, "Evaluator", Evaluator)
    assert cards.lines_of("folder", "pixel", (8, 1), 96)[1] == "| 8 | 1.50 ± 0.50 | 1.00 | 75.0% |\n| 1 | 12.00 ± 0.50 | 8.00 | 75.0% |"


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_the_builder_writes_a_pipeline_that_is_sampled_as_stock_diffusers_does(tmp_path, monkeypatch):
    for name in ("tiny-sd", "tiny-clip"):
        (tmp_path / "assets" / name).mkdir(parents=True)
    monkeypatch.setattr(build, "ASSETS", tmp_path / "assets")
    build.build(tmp_path / "runs", 32, 2, 1, 2, 1, 1, "all")
    assert {"autoencoder", "decoder", "text", "unet", "judge", "clip"} <= {file.stem for file in (tmp_path / "runs").iterdir()}
    folder = tmp_path / "assets" / "tiny-sd"
    pipeline, model, _ = saved.open_model(str(folder))
    assert 4e6 < sum(p.numel() for p in pipeline.unet.parameters()) < 8e6 and models.latent_shape(pipeline) == (16, 8, 8)
    z = sampler.generate(pipeline, model, ["red heart on blue"], range(1), sampler.time_grid(2))
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    theirs = stock("red heart on blue", latents=sampler.noise(range(1), (16, 8, 8)), num_inference_steps=2, guidance_scale=1,
                   output_type="latent").images
    assert (z - theirs).abs().max() < 1e-4 * z.abs().max()
    assert len(load_file(tmp_path / "assets" / "judge" / "judge.safetensors")) > 20
    shutil.rmtree(tmp_path / "assets")
    for name in ("tiny-sd", "tiny-clip"):
        (tmp_path / "assets" / name).mkdir(parents=True)
    build.build(tmp_path / "runs", 32, 2, 1, 2, 1, 1, "all")                 # all is there: only written again
    assert torch.equal(saved.open_model(str(folder))[0].unet.conv_in.weight, pipeline.unet.conv_in.weight)


# ---- the transformer's twin ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin():
    return sd3.make_pipeline()


def test_sd3_reads_what_the_towers_of_the_embedded_model_say(twin):
    """The UNet's text before its last norm, the small CLIP's layer before its last and its class features; one zero for T5."""
    texts = ["fox on blue", "ghost left of pizza on black and purple", ""]
    found = models.encode_text(twin, texts)
    teacher = load.load_pipeline("tiny")
    theirs, states = models.encode_text(teacher, texts)["encoder_hidden_states"], found["encoder_hidden_states"]
    with torch.no_grad():
        normed = teacher.text_encoder.final_layer_norm(states[:, :32, :256])                # which SD3 leaves out
    assert states.shape == (3, 33, 384) and (normed - theirs).abs().max() < 1e-4 and not states[:, 32].any()
    clip = CLIPModel.from_pretrained(load.ASSETS / "tiny-clip").float().eval()
    tokens = twin.tokenizer(texts, padding="max_length", max_length=build.WORDS, return_tensors="pt").input_ids
    with torch.no_grad():
        said = clip.text_model(tokens, output_hidden_states=True)
        features = clip.text_projection(said.pooler_output)
    assert torch.allclose(states[:, :build.WORDS, 256:], said.hidden_states[-2], atol=1e-4)
    assert torch.allclose(found["pooled_projections"][:, sd3.POOLED:], features, atol=1e-4)
    with pytest.raises(ValueError, match="not the tensors of this tower"):                    # of which it has two layers
        sd3.with_projection(clip.text_model, {**clip.config.text_config.to_dict(), "num_hidden_layers": 1}, torch.zeros(64, 128))


def test_a_flow_network_that_has_learned_its_guidance_has_no_loss():
    z_0, eps = torch.randn(2, 6, 16, 8, 8, generator=generator())
    sigma, change = torch.rand(6, generator=generator(1)), torch.randn(6, 1, 1, 1, generator=generator(2))
    text, null = dict(said=change), dict(said=torch.zeros(6, 1, 1, 1))

    class Network:
        def __call__(self, z, timestep, said):
            level = sigma.repeat(len(z) // 6)
            assert torch.allclose(timestep, 1000 * level)
            assert torch.allclose(z[:6], torch.lerp(z_0, eps, sigma[:, None, None, None]), atol=1e-6)
            return type("Output", (), {"sample": self.base.repeat(len(z) // 6, 1, 1, 1) + said})
    network = Network()
    network.base = eps - z_0 - change / 2.5
    assert sd3.loss(network, (z_0, text, null, sigma, eps), 2.5).item() < 1e-8
    assert sd3.loss(network, (z_0, text, null, sigma, eps)).item() > 1e-3
    network.base = eps - z_0 - change
    assert sd3.loss(network, (z_0, text, null, sigma, eps)).item() < 1e-8


def test_blocks_of_the_twin_begin_as_the_identity(twin):
    z, cond = torch.randn(2, 16, 8, 8, generator=generator()), models.encode_text(twin, ["fox", ""])
    assert not twin.transformer(z, timestep=torch.full((2,), 500.0), **cond).sample.any()
    sizes = sum(p.numel() for p in twin.transformer.parameters())
    assert 4e6 < sizes < 8e6


def test_the_twin_is_trained_and_sampled_as_stock_diffusers_does(tmp_path, monkeypatch):
    """Its folder has links to tiny-sd's, and the schedule of its training is the scheduler's own."""
    shutil.copytree(load.ASSETS / "tiny-sd", tmp_path / "assets" / "tiny-sd")
    shutil.copytree(load.ASSETS / "tiny-clip", tmp_path / "assets" / "tiny-clip")
    monkeypatch.setattr(sd3, "ASSETS", tmp_path / "assets")
    sd3.train(tmp_path / "runs", 64, 4)
    folder = tmp_path / "assets" / "tiny-sd3"
    assert (folder / "vae").resolve() == (tmp_path / "assets" / "tiny-sd" / "vae").resolve()
    before = {file: file.read_bytes() for file in (tmp_path / "assets" / "tiny-sd").rglob("*") if file.is_file()}
    sd3.train(tmp_path / "runs", 64, 4)                                      # written again: what is linked stays as it is
    assert all(file.read_bytes() == content for file, content in before.items())
    pipeline, model, _ = saved.open_model(str(folder))
    z = sampler.generate(pipeline, model, ["fox on blue"], range(1), sampler.time_grid(2))
    stock = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None)
    stock.scheduler = models.sd3.as_student(pipeline, model.schedule).scheduler
    stock.set_progress_bar_config(disable=True)
    theirs = stock("fox on blue", latents=sampler.noise(range(1), (16, 8, 8)), num_inference_steps=2, guidance_scale=1,
                   max_sequence_length=1, output_type="latent").images
    assert z.abs().max() > 0.1 and (z - theirs).abs().max() < 1e-3 * z.abs().max()


def test_the_committed_twin_shares_with_tiny_and_draws_what_it_is_told():
    """As the judge sees full captions of one object, in eight steps of Euler."""
    pipeline, model, _ = saved.open_model("tiny-sd3")
    tiny = saved.open_model("tiny")[0]
    assert load.PRESETS["tiny-sd3"][1] == load.PRESETS["tiny"][1] and models.latent_shape(pipeline) == models.latent_shape(tiny)
    assert all(torch.equal(value, tiny.vae.state_dict()[key]) for key, value in pipeline.vae.state_dict().items())
    plans = cards.specific(32, "test")
    pictures = cards.draw(pipeline, model, scenes.describe(plans)[0], 0, steps=8)
    eyes = judge.Features(load.ASSETS / "judge")
    told, shuffled = (eyes.accuracy(eyes.images(pictures), each)["all"] for each in (plans, plans.flip(0)))
    assert told > 0.7 and shuffled < 0.1
