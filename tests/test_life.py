"""The whole life of a student, the same for every family: cache, training in two stages, a kill, resume, export, the stock call of its
card, difference, merge, LoRA. A family adds a row."""
import json
import re
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import ROOT, SMALL, run_two, slow
from diffusers import DDPMPipeline, DDPMScheduler, FluxPipeline, UNet2DModel
from safetensors.torch import load_file

import export
import models
import sampler
import train
from models import architectures, load, saved
from runtime import progress
from runtime.cli import UserError
from runtime.options import command

SIZE, SEEDS, PROMPTS = 32, [3, 4], ["red heart on blue", "a fox"]
VAE = dict(SMALL["sd15"]["vae"], latent_channels=4)
CLIP = SMALL["sd15"]["text_encoder"]
T5 = dict(vocab_size=1000, d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
SD3 = dict(vae=VAE, text_encoder=CLIP, text_encoder_2=dict(CLIP, hidden_size=24, intermediate_size=32, projection_dim=24), text_encoder_3=T5,
           transformer=dict(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
                            joint_attention_dim=64, caption_projection_dim=16, pooled_projection_dim=56, pos_embed_max_size=12))   # 56 = 32 + 24
FLUX = dict(vae=VAE, text_encoder=CLIP, text_encoder_2=T5,
            transformer=dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                             joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6)))
ZIMAGE = dict(vae=VAE, text_encoder=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                         num_key_value_heads=1, head_dim=16, vocab_size=1000),
              transformer=dict(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
                               axes_dims=[4, 6, 6], axes_lens=[640, 32, 32]))
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")    # with DiT's own, latents are too large for 1e-4
TRANSFORMER = dict(sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2)
DIT = dict(vae=VAE, scheduler=BETAS, transformer=TRANSFORMER)
PIXART = dict(vae=VAE, scheduler=BETAS, text_encoder=T5,
              transformer=dict(TRANSFORMER, cross_attention_dim=16, caption_channels=64, interpolation_scale=1))
SANA = dict(vae=dict(encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, encoder_layers_per_block=(1,) * 3,
                     decoder_layers_per_block=(1,) * 3, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
                     encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3, latent_channels=4),
            text_encoder=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                              head_dim=16, vocab_size=1000),
            transformer=dict(TRANSFORMER, in_channels=4, out_channels=4, num_cross_attention_heads=2, cross_attention_head_dim=8,
                             cross_attention_dim=16, caption_channels=32))
PIXEL = dict(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))


def row(make, prompts=PROMPTS, pack=lambda z: z, unpack=lambda z: z, **options):
    """make: () -> a tiny pipeline; prompts: what it is trained on and sampled with; pack, unpack: our latents to those of the stock
    call, and back; options: of train.Config."""
    return SimpleNamespace(make=make, prompts=prompts, pack=pack, unpack=unpack, options=options)


def published(name, parts):
    return lambda: architectures.build(name, **parts)


def pixels():
    torch.manual_seed(0)
    return DDPMPipeline(UNet2DModel(**PIXEL), DDPMScheduler(prediction_type="v_prediction"))


PACKED = dict(pack=lambda z: FluxPipeline._pack_latents(z, *z.shape), unpack=lambda z: FluxPipeline._unpack_latents(z, SIZE, SIZE, 4))
ROWS = {
    "sd15": row(published("sd15", SMALL["sd15"])),
    "sdxl": row(published("sdxl", SMALL["sdxl"])),
    "pixel": row(pixels, prompts=[""], data="scenes-by-group", size=None),
    "sd3": row(published("sd3", SD3)),
    "sd35 without t5": row(published("sd35-medium", {**SD3, "text_encoder_3": None, "tokenizer_3": None,
                                                     "transformer": dict(SD3["transformer"], dual_attention_layers=(0,))})),
    "flux": row(published("flux", FLUX), text_dropout=0.0, **PACKED),
    "flux-schnell": row(published("flux-schnell", FLUX), text_dropout=0.0, **PACKED),
    "zimage": row(published("zimage", ZIMAGE)),
    "dit": row(published("dit", DIT), prompts=["7", "207"]),
    "pixart": row(published("pixart", PIXART)),
    "pixart-sigma": row(published("pixart-sigma", PIXART)),
    "sana": row(published("sana", SANA)),
}

# of a family that another row walks; or test_train.py, test_export.py and test_pixel.py, step by step
SIBLINGS = ("sd15", "sdxl", "pixel", "sd35 without t5", "flux-schnell", "pixart")
OWN_FILE = ("dit", "pixart-sigma", "sana")                # whose students are compared with the stock call there


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """families(name): (row, folder of its teacher, prompts file)."""
    made = {}

    def family(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            ROWS[name].make().save_pretrained(folder / "teacher")
            (folder / "prompts.txt").write_text("\n".join(ROWS[name].prompts) + "\n")
            made[name] = ROWS[name], folder / "teacher", folder / "prompts.txt"
        return made[name]
    return family


def config(family, out, **changes):
    row, teacher, prompts = family
    given = dict(prompts="" if "data" in row.options else str(prompts), size=SIZE, windows=[2, 1], updates=4, batch=2, trajectories=4,
                 solver_steps=8, log_steps=1, grid_steps=0, checkpoint_steps=1, lr=1e-3, device="cpu")
    return train.Config(model=str(teacher), out=str(out), **{**given, **row.options, **changes})


def weights(folder):
    return export.only_network(str(folder)).state_dict()


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


def ours(row, folder, steps):
    """Latents by sampler.py."""
    pipeline, model, info = saved.open_model(str(folder))
    prompts = [row.prompts[i % len(row.prompts)] for i in range(2)]
    return sampler.generate(pipeline, model, prompts, SEEDS, sampler.time_grid(steps, info.get("windows", 1)))


def card(folder):
    """What a student's card says of a stock pipeline: (options of from_pretrained, the arguments of the call as a string)."""
    found = re.search(r"`DiffusionPipeline.from_pretrained\(folder(.*?)\)\((.*?)\)`", (folder / "README.md").read_text())
    assert f'from_pretrained("FOLDER"{found[1]})' in (folder / "README.md").read_text()      # the block's code leaves out the same
    return eval(f"dict({found[1].removeprefix(', ')})"), found[2]


def by_stock(row, stock, call, steps, shape):
    """Latents by a stock pipeline, called with the arguments that the card of a student gives, a string."""
    stock.set_progress_bar_config(disable=True)
    options = {**eval(f"dict({call.removeprefix('prompt, ')})"), "num_inference_steps": steps}
    if call.startswith("class_labels"):                    # DiT's hands its latents to the autoencoder alone, and takes no noise
        given, decode = [], stock.vae.decode
        stock.vae.decode = lambda z: given.append(z * stock.vae.config.scaling_factor) or decode(z)
        stock(**{**options, "class_labels": [int(prompt) for prompt in row.prompts]}, generator=sampler.generators(SEEDS))
        return given[0]
    if not call.startswith("prompt"):                      # pixels: pictures, as no call takes noise
        pictures = stock(2, generator=sampler.generators(SEEDS), output_type="np", **options).images
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        return pictures * 2 - 1
    given = row.pack(sampler.noise(SEEDS, shape))
    return row.unpack(stock([row.prompts[i % len(row.prompts)] for i in range(2)], latents=given, output_type="latent", **options).images)


@pytest.mark.parametrize("name", [slow(name) if name in (*SIBLINGS, *OWN_FILE) else name for name in ROWS])
def test_the_life_of_a_student(families, name, tmp_path, monkeypatch):
    family = row, teacher, _ = families(name)
    c = config(family, tmp_path / "run", cache=str(tmp_path / "cache"))

    # cached beforehand, trained in two stages, killed in the second one, resumed: the bits of a run that was never killed
    train.main(config(family, tmp_path / "run", cache=c.cache, cache_only=True))
    solved = sorted((tmp_path / "cache" / "trajectories").iterdir())
    write_log = progress.write_log

    def killed(file, board, line):
        write_log(file, board, line)
        if line["step"] == 4:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(progress, "write_log", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(c)
    assert (tmp_path / "run" / "student-2" / "reflow.json").exists() and not (tmp_path / "run" / "student-1").exists()
    last = train.main(c)
    straight = train.main(config(family, tmp_path / "straight", cache=c.cache))
    assert same(weights(last), weights(straight)) and not same(weights(last), weights(teacher))
    assert sorted((tmp_path / "cache" / "trajectories").iterdir()) == solved

    # the call on its card gives what sampler.py gives, at one step per window and at more
    for windows, steps in ((2, 2), (2, 4), (1, 1)):
        folder = tmp_path / "run" / f"student-{windows}"
        (opened, call), expected = card(folder), ours(row, folder, steps)
        assert f"num_inference_steps={windows}" in call
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **opened)
        assert (by_stock(row, pipeline, call, steps, expected.shape[1:]) - expected.clamp(*((-1, 1) if name == "pixel" else (None, 1e9)))
                ).abs().max() <= 1e-4, (windows, steps)

    # student minus teacher, put on the teacher again
    export.export_delta(export.DeltaConfig(str(last), "", str(tmp_path / "delta.safetensors")))
    export.merge(export.MergeConfig(str(tmp_path / "delta.safetensors"), str(teacher), str(tmp_path / "merged")))
    assert same(weights(tmp_path / "merged"), weights(last), 1e-6)
    assert (ours(row, tmp_path / "merged", 1) - ours(row, last, 1)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", [slow(name) if name in SIBLINGS else name for name in ROWS])
def test_a_lora_goes_back_onto_the_teacher_or_is_refused(families, name, tmp_path):
    family = row, teacher, _ = families(name)
    c = config(family, tmp_path / "run", windows=[1], updates=2, lora=2, gradient_checkpointing=True)
    if models.family(load.load_pipeline(str(teacher))).LORA_LAYERS is None:
        with pytest.raises(UserError, match="--lora 2: diffusers puts no adapters on a"):
            train.main(c)
        return
    folder = train.main(c)
    (opened, call), expected = card(folder), ours(row, folder, 1)
    stock = diffusers.DiffusionPipeline.from_pretrained(teacher, **opened)
    stock.scheduler = diffusers.DiffusionPipeline.from_pretrained(folder, **opened).scheduler
    before = by_stock(row, stock, call, 1, expected.shape[1:])
    stock.load_lora_weights(folder)
    after = by_stock(row, stock, call, 1, expected.shape[1:])
    assert (after - expected).abs().max() <= 1e-4 < (after - before).abs().max()
    assert same(export.trained_weights(folder, lora=2), export.trained_weights(folder, lora=2))
    network = models.network(load.load_pipeline(str(folder)))
    layers = set(export.adapters(export.trained_weights(folder, lora=2)))
    module = models.family_of(network)
    parts = {id(each) for block in module.blocks(network) for each in block.modules()}
    inside = {where for where, each in network.named_modules() if id(each) in parts and isinstance(each, (torch.nn.Linear, torch.nn.Conv2d))
              and getattr(each, "groups", 1) == 1}         # depthwise ones are few weights
    assert inside <= layers, inside - layers                                    # no layer of a block is without one


def test_an_export_copies_text_encoders_as_they_are_stored_and_loads_none(families, tmp_path, monkeypatch):
    """Here one in half precision, and one whose only files are of variant fp16, in several shards."""
    row, teacher, prompts = families("sd3")
    stored, loaded, real = shutil.copytree(teacher, tmp_path / "stored"), [], train.export_stage
    for name, options in (("text_encoder", {}), ("text_encoder_3", dict(variant="fp16", max_shard_size="60KB"))):
        shutil.rmtree(stored / name)
        getattr(load.load_pipeline(str(teacher)), name).half().save_pretrained(stored / name, **options)

    def export_stage(*args):
        whole = load.load_whole
        with monkeypatch.context() as patch:
            patch.setattr(load, "load_whole", lambda kind, folder, **options: loaded.append(folder.name) or whole(kind, folder, **options))
            real(*args)
    monkeypatch.setattr(train, "export_stage", export_stage)
    folder = train.main(config((row, stored, prompts), tmp_path / "run", windows=[1], updates=1))
    assert set(loaded) == {"transformer", "vae"}
    assert len(list((folder / "text_encoder_3").glob("model-*-of-*.safetensors"))) > 1 and not list(folder.rglob("*fp16*"))
    for name in ("text_encoder", "text_encoder_3"):
        files = (folder / name).glob("*.safetensors")
        assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}
    texts = [models.encode_text(load.load_pipeline(str(each)), PROMPTS) for each in (stored, folder)]
    assert all(torch.equal(texts[0][name], texts[1][name]) for name in texts[0])


def test_a_students_embedded_guidance_is_the_one_it_was_trained_with(families, tmp_path):
    family = row, teacher, _ = families("flux")
    folder = train.main(config(family, tmp_path / "run", windows=[1], updates=1, guidance_teacher=2.0))
    assert "guidance_scale=2," in (folder / "README.md").read_text()
    for name, told in ((folder, 2.0), (teacher, 3.5)):
        pipeline = saved.open_model(str(name))[0]
        assert models.encode_text(pipeline, ["fox"])["guidance"].tolist() == [told]
    info = json.loads((folder / "reflow.json").read_text())
    assert models.encode_text(saved.open_model(str(teacher), student=info)[0], ["fox"])["guidance"].tolist() == [2.0]


def test_a_range_of_embedded_guidance_is_told_to_teacher_and_student(families, tmp_path):
    family = row, teacher, _ = families("flux")
    c = config(family, tmp_path / "run", windows=[1], updates=2, guidance_range=[2.0, 5.0])
    folder = train.main(c)
    assert "guidance_scale=3.5," in card(folder)[1] and "It was trained at embedded guidance 2 to 5 alone." in (folder / "README.md").read_text()
    _, _, _, pairs = train.open_pairs(c, train.resolve_recipe(c), torch.device("cpu"), (0, 1, lambda: None))
    rows, told = pairs.rows[range(4)], pairs.drawn_guidance(range(4))
    assert torch.equal(rows["guidance"], told) and len(told.unique()) == 4
    batch = pairs.fetch(range(6), 1)
    for k in range(6):
        i = next(i for i in range(4) if torch.equal(rows["z"][i, 0], batch["z_start"][k]))
        assert batch["guidance"][k] == told[i]
    pipeline, model, _ = saved.open_model(str(teacher), size=SIZE)
    cond = {**pairs.text(rows["caption"].tolist()), "guidance": told}
    with torch.no_grad():
        end = sampler.ddim(model, rows["z"][:, 0], sampler.time_grid(8), cond)
    assert (rows["z"][:, -1] - end).abs().max() <= 1e-4
    assert train.main(config(families("flux"), tmp_path / "other", windows=[1], updates=1, guidance_range=[1.0, 2.0])).exists()
    assert "guidance_scale=1.5," in card(tmp_path / "other" / "student-1")[1]


@pytest.mark.parametrize("name", ["sd3", slow("flux")])
@pytest.mark.parametrize("shard", [slow(False), True], ids=["ddp", "fsdp"])
def test_two_processes_train_a_transformer_as_one_does(families, name, shard, tmp_path):
    family = families(name)
    options = dict(windows=[2, 1], updates=4, cache=str(tmp_path / "cache"), shard=shard, normalization="learned", matching=0.1, grid_steps=2)
    done = run_two([str(ROOT / "train.py"), *command(config(family, tmp_path / "two", **options)).split()[2:]], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    one = train.main(config(family, tmp_path / "one", **{**options, "shard": False}))
    lines = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
    assert same(weights(tmp_path / "two" / "student-1"), weights(one), 1e-4)


def test_guidance_of_a_network_that_has_it_distilled_in_is_refused(families, tmp_path):
    for name, option in (("flux", dict(text_dropout=0.1)), ("flux-schnell", dict(text_dropout=0.1)), ("flux-schnell", dict(guidance_teacher=4.0)),
                         ("flux-schnell", dict(guidance_range=[2.0, 4.0]))):
        with pytest.raises(UserError, match="this model has its guidance distilled in"):
            train.main(config(families(name), tmp_path / "run", **option))
    pipeline, model, _ = saved.open_model(str(families("flux")[1]), size=SIZE)
    with pytest.raises(UserError, match="guidance 2: this model has its guidance distilled in; use guidance 1"):
        sampler.generate(pipeline, model, ["fox"], [0], sampler.time_grid(1), 2.0)


@pytest.mark.parametrize("name", ["sd3", "sd35 without t5", "zimage"])
def test_guidance_is_that_of_the_stock_pipeline(families, name, tmp_path):
    """Z-Image's scale is one less than ours."""
    row, teacher, _ = families(name)
    pipeline, model, _ = saved.open_model(str(teacher), size=SIZE)
    expected = sampler.generate(pipeline, model, PROMPTS, SEEDS, sampler.time_grid(2), 3.0)
    absent = {part: None for part in ("text_encoder_3", "tokenizer_3") if name == "sd35 without t5"}
    stock = models.family(pipeline).as_student(diffusers.DiffusionPipeline.from_pretrained(teacher, **absent), model.schedule)
    call = f"prompt, height={SIZE}, width={SIZE}, guidance_scale={2 if name == 'zimage' else 3}"
    assert (by_stock(row, stock, call, 2, expected.shape[1:]) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("t5", [True, False])
def test_sd3_takes_as_many_t5_tokens_as_the_third_tokenizer_and_the_stock_call_says_so(t5):
    pipeline = architectures.build("sd3", **SD3 | ({} if t5 else dict(text_encoder_3=None)))
    models.set_native_size(pipeline, SIZE)
    call = models.family(pipeline).stock_call(pipeline, 2)
    assert "max_sequence_length" not in call and models.encode_text(pipeline, ["fox"])["encoder_hidden_states"].shape[1] == 77 + 256
    pipeline.tokenizer_3.model_max_length = 5
    call, model = models.family(pipeline).stock_call(pipeline, 2), models.as_model(pipeline)
    assert call.endswith(", max_sequence_length=5") and models.encode_text(pipeline, ["fox"])["encoder_hidden_states"].shape[1] == 77 + 5
    expected = sampler.generate(pipeline, model, PROMPTS, SEEDS, sampler.time_grid(2))
    stock = models.family(pipeline).as_student(pipeline, model.schedule)
    call = f"{call.replace('num_inference_steps=2, ', '')}, height={SIZE}, width={SIZE}"
    assert (by_stock(ROWS["sd3"], stock, call, 2, expected.shape[1:]) - expected).abs().max() <= 1e-4


def test_a_dynamic_shift_is_that_of_the_size_and_stays_with_the_student(families, tmp_path):
    row, teacher, _ = families("flux")
    stock = diffusers.DiffusionPipeline.from_pretrained(teacher)
    for size in (32, 64):
        pipeline, model, _ = saved.open_model(str(teacher), size=size)
        expected = sampler.generate(pipeline, model, PROMPTS, SEEDS, sampler.time_grid(2))
        stock.set_progress_bar_config(disable=True)
        found = stock(PROMPTS, latents=row.pack(sampler.noise(SEEDS, expected.shape[1:])), height=size, width=size,
                      num_inference_steps=2, guidance_scale=3.5, output_type="latent").images       # the teacher's own scheduler
        assert (FluxPipeline._unpack_latents(found, size, size, 4) - expected).abs().max() <= 1e-4
    shifts = [saved.open_model(str(teacher), size=size)[1].schedule.shift for size in (32, 64)]
    assert shifts[0] < shifts[1]


def test_what_a_transformer_cannot_do_is_one_line(families, tmp_path):
    folder = families("sd3")[1]
    with pytest.raises(UserError, match="--size 200: this model knows positions up to 96 pixels"):
        saved.open_model(str(folder), size=200)
    with pytest.raises(UserError, match="--null-text zeros: the null embedding of this model"):
        models.encode_text(load.load_pipeline(str(folder)), ["fox"], null="zeros")
    for name, lost in (("flux", "text_encoder_2"), ("sd3", "text_encoder"), ("zimage", "vae")):
        pipeline = families(name)[0].make()
        setattr(pipeline, lost, None)
        pipeline.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"--model .* lacks its {lost}; download it again"):
            load.load_pipeline(str(tmp_path / name))
    with pytest.warns(UserWarning, match="is .* tokens too long for the text encoder"):
        models.encode_text(load.load_pipeline(str(families("sd35 without t5")[1])), ["fox " * 80])


def test_a_scheduler_that_contradicts_the_network_is_refused(families, tmp_path):
    pipeline = families("sd3")[0].make()
    pipeline.scheduler = diffusers.DDIMScheduler()
    pipeline.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="its DDIMScheduler is for diffusion .* its SD3Transformer2DModel for flow matching; name the scheduler"):
        load.load_pipeline(str(tmp_path / "m"))
