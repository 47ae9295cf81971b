"""What leaves a run is sampled alike by stock diffusers, in every family; differences and LoRA files go where they came from."""
import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tokenizers
import torch
from conftest import slow
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_teacher import ldm_clip, ldm_unet, ldm_vae
from test_train import interrupted, small, weights

import eval as evaluation
import export
import models
import sampler
import train
from evaluation import judge, measuring, protocols
from models import load, saved, student
from runtime import checkpoints
from runtime.cli import UserError
from tools import build

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
            train.main(small(teachers[family], out, **{**dict(lr=1e-3, updates=4, windows=None if "recipe" in changes else [4, 2, 1]), **changes}))
            made[key] = out
        return made[key]
    return run


def latents(folder, steps, guidance, prompts=PROMPTS):
    """By sampler.py."""
    pipeline, model, info = saved.open_model(str(folder))
    return sampler.generate(pipeline, model, prompts, SEEDS, sampler.time_grid(steps, info.get("windows", 1)), guidance)


def stock_latents(pipeline, steps, guidance, prompts=PROMPTS, **options):
    """By diffusers' own pipeline, from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise = sampler.noise(SEEDS, models.latent_shape(pipeline))
    return pipeline(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="latent", latents=noise,
                    **options).images


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windows, steps, guidance", [(4, 8, 2.5), (1, 1, 1.0), *(slow(*case) for case in (
    (4, 4, 1.0), (4, 4, 2.5), (4, 8, 1.0), (2, 2, 1.0), (2, 2, 2.5), (1, 1, 2.5), (1, 4, 1.0), (1, 4, 2.5)))])
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
        channels = (16, 32, 64, 96)[:stock.vae_scale_factor.bit_length()]
        net = diffusers.ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=channels)
        control = diffusers.StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=net)
        made = [to_image(image=image, strength=0.5, **common), control(image=image, height=size, width=size, **common)]
        if family == "sd15":                               # diffusers' inpainting wants SD's four channels
            paint = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder)
            mask = torch.zeros(1, 1, size, size)
            mask[..., :size // 2] = 1
            made.append(paint(image=image, mask_image=mask, height=size, width=size, **common))
        for output in made:
            assert output.images.shape == (1, size, size, 3) and np.isfinite(output.images).all()


def test_an_ip_adapter_adds_its_picture_to_a_student(students, tmp_path):
    """Random weights of the first IP-Adapter's form. At scale 0 the student is as it was; beyond it the picture counts."""
    stock = diffusers.DiffusionPipeline.from_pretrained(students("sd15") / "student-4")
    unet, generator = stock.unet, torch.Generator().manual_seed(0)
    text, features = unet.config.cross_attention_dim, 24
    weights = {"image_proj.proj.weight": (4 * text, features), "image_proj.proj.bias": (4 * text,), "image_proj.norm.weight": (text,),
               "image_proj.norm.bias": (text,)}
    layers = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(layers):
        weights |= {f"ip_adapter.{2 * i + 1}.to_{letter}_ip.weight": tuple(unet.get_submodule(name).to_k.weight.shape) for letter in "kv"}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in weights.items()}, tmp_path / "ip.safetensors")
    pictures = torch.randn(2, 1, features, generator=generator)
    before = stock_latents(stock, 4, 1.0)
    stock.load_ip_adapter(tmp_path, subfolder="", weight_name="ip.safetensors", image_encoder_folder=None)

    def after(scale, picture):
        stock.set_ip_adapter_scale(scale)
        return stock_latents(stock, 4, 1.0, ip_adapter_image_embeds=[picture[None].expand(len(before), -1, -1)])
    assert torch.allclose(after(0.0, pictures[0]), before, atol=1e-5)
    assert (after(1.0, pictures[0]) - before).abs().max() > 1e-2 < (after(1.0, pictures[0]) - after(1.0, pictures[1])).abs().max()
    assert after(1.0, pictures[0]).isfinite().all()


@pytest.mark.parametrize("family", [slow("tiny"), "sd15", slow("sdxl")])
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
    unet = load.load_pipeline(str(students("sd15") / "student-2")).unet
    inside = {name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
              and name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")}
    assert layers == inside


@pytest.mark.parametrize("changes", [dict(), dict(lora=2)], ids=["full", "lora"])
def test_a_checkpoint_is_exported_on_request(random_sd, tmp_path, monkeypatch, changes):
    interrupted(random_sd, tmp_path / "run", monkeypatch, 5, checkpoint_steps=4, lr=1e-3, **changes)
    out = tmp_path / "exported"
    export.export_checkpoint(export.ExportConfig(str(tmp_path / "run" / "checkpoint-000004.safetensors"), str(out)))
    export.export_delta(export.DeltaConfig(str(out), "", str(tmp_path / "delta.safetensors")))
    with pytest.raises(UserError, match="delta.safetensors: not one of train.py's checkpoints"):
        export.export_checkpoint(export.ExportConfig(str(tmp_path / "delta.safetensors"), str(tmp_path / "other")))
    info = json.loads((out / "reflow.json").read_text())
    assert (info["windows"], info["updates"]) == (1, 4) and (out / export.LORA_FILE).exists() == bool(changes)
    stock = diffusers.DiffusionPipeline.from_pretrained(out)
    assert (latents(out, 1, 1.0) - stock_latents(stock, 1, 1.0)).abs().max() <= 1e-4
    assert not torch.equal(weights(out)["conv_in.weight" if not changes else "mid_block.resnets.0.conv1.weight"],
                           weights(random_sd)["conv_in.weight" if not changes else "mid_block.resnets.0.conv1.weight"])


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-6), slow("fp16", 1e-3)])
def test_a_difference_merged_into_the_base_is_the_student_and_into_another_model_the_difference(students, teachers, tmp_path, dtype, tolerance):
    student = students("sd15") / "student-4"
    file, merged = tmp_path / "new" / "delta.safetensors", tmp_path / "merged"
    export.export_delta(export.DeltaConfig(str(student), "", str(file), dtype))
    export.merge(export.MergeConfig(str(file), str(teachers["sd15"]), str(merged)))
    found = weights(merged)
    for name, value in weights(student).items():
        assert torch.allclose(found[name], value, atol=tolerance)
    if dtype == "fp32":
        assert (latents(merged, 4, 1.0) - latents(student, 4, 1.0)).abs().max() < 1e-3
    # another model of the same architecture
    other = shutil.copytree(teachers["sd15"], tmp_path / "other")
    unet = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(unet).items()}, unet, {"format": "pt"})
    export.merge(export.MergeConfig(str(file), str(other), str(tmp_path / "style"), scale=0.5))
    found, base = weights(tmp_path / "style"), weights(other)
    for name, value in load_file(file).items():
        assert torch.allclose(found[name], base[name] + 0.5 * value.float(), atol=1e-6)
    info = json.loads((tmp_path / "style" / "reflow.json").read_text())
    assert info["teacher"] == str(other) and info["windows"] == 4 and info["delta"]["scale"] == 0.5
    assert latents(tmp_path / "style", 4, 1.0).isfinite().all()


def test_a_difference_is_written_over_nothing_and_merged_into_its_own_kind(students, teachers, tmp_path):
    student = str(students("sd15") / "student-4")
    kept = tmp_path / "victim" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("x")
    for out, complaint in ((kept.parent, "name a .safetensors file"), (kept, "name a .safetensors file"), ("", "missing"),
                           (kept / "d.safetensors", "cannot be written")):
        with pytest.raises(UserError, match=f"--out .*{complaint}"):
            export.export_delta(export.DeltaConfig(student, "", str(out)))
    file = tmp_path / "delta.safetensors"
    export.export_delta(export.DeltaConfig(student, "", str(file)))
    with pytest.raises(UserError, match="--out .*exists already"):
        export.export_delta(export.DeltaConfig(student, "", str(file)))
    assert kept.read_text() == "x"
    for number, (field, value) in enumerate((("prediction_type", "sample"), ("beta_end", 0.02))):
        other = shutil.copytree(teachers["sd15"], tmp_path / f"other-{number}")
        settings = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
        (other / "scheduler" / "scheduler_config.json").write_text(json.dumps({**settings, field: value}))
        with pytest.raises(UserError, match=f"its {'prediction' if number == 0 else 'schedule'} is not that of the student"):
            export.merge(export.MergeConfig(str(file), str(other), str(tmp_path / "merged")))
    with pytest.raises(UserError, match="--out .*cannot be written"):
        export.merge(export.MergeConfig(str(file), str(teachers["sd15"]), str(kept / "a" / "b")))


def test_merge_lora_is_the_adapted_network(random_sd):
    """W + B A for linear layers and convolutions alike, against peft's own forward."""
    unet = load.load_pipeline(str(random_sd)).unet
    c = train.Config(lora=3)
    student.make_student(c, unet, torch.device("cpu"))
    with torch.no_grad():
        for p in checkpoints.trained(unet).values():
            p.normal_(std=0.1)
    inputs = torch.randn(2, 16, 8, 8), torch.tensor([500.0, 20.0]), torch.randn(2, 5, unet.config.cross_attention_dim)
    other = load.load_pipeline(str(random_sd)).unet
    untouched = unet.eval()(*inputs).sample
    export.merge_lora(other.state_dict(), export.adapters(unet.state_dict()))
    assert torch.allclose(other.eval()(*inputs).sample, untouched, atol=1e-3 * untouched.abs().max().item())


# ---- what is written can be read ------------------------------------------------------------------------------------


def stock(folder):
    """diffusers' own pipeline by the plain call, in the default dtype."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SHIPPED = [str(file.parent) for file in sorted(load.ASSETS.glob("*/README.md"))]


@pytest.fixture(params=[*SHIPPED, "tiny", "sd21", "sdxl", "bf16 lora", "build.save"], ids=lambda name: name.split("/")[-1])
def written(request, students, random_sd, tmp_path, monkeypatch):
    """A folder that ships, or that a run or tools/build.py has written."""
    if request.param in SHIPPED:
        return Path(request.param)
    if request.param == "build.save":
        monkeypatch.setattr(build, "ASSETS", tmp_path)
        pipeline = load.load_pipeline(str(random_sd))
        build.save(pipeline, build.make_clip(pipeline.tokenizer), judge.Judge((8, 8, 8)))
        return tmp_path
    family, changes = ("tiny", dict(lora=2, precision="bf16")) if "lora" in request.param else (request.param, {})
    return students(family, **changes) / "student-2"


def test_text_encoders_and_tokenizers_are_written_as_every_transformers_reads_them(written):
    """The names of published models: CLIPTextModel's all begin with text_model. Tokenizers: vocab.json and merges.txt make the same
    tokens as tokenizer.json. Nothing is stored with a dtype that transformers would load beside diffusers' float32."""
    for file in written.rglob("config.json"):
        settings = json.loads(file.read_text())
        if "model_type" in settings:
            assert settings["dtype"] == "float32" and "torch_dtype" not in settings
            names = set(load_file(file.parent / "model.safetensors"))
            inside = {name for name in names if name.startswith("text_model.")}
            assert "text_model.embeddings.token_embedding.weight" in inside
            assert settings["architectures"] != ["CLIPTextModel"] or inside == names
    for file in written.rglob("tokenizer.json"):
        whole = tokenizers.Tokenizer.from_file(str(file))
        model = json.loads(whole.to_str())["model"]
        if model["type"] == "Unigram":                     # T5's, which tiny-sd3 has without its encoder
            continue
        parts = tokenizers.models.BPE.from_file(str(file.parent / "vocab.json"), str(file.parent / "merges.txt"),
                                                **{key: model[key] for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")})
        expected = [whole.encode(text).ids for text in ("red heart on blue", "a quixotic zebra!", "")]
        whole.model = parts
        assert [whole.encode(text).ids for text in ("red heart on blue", "a quixotic zebra!", "")] == expected


def test_nothing_written_names_the_folder_that_this_machine_read_it_from(written):
    configs = [file for file in written.rglob("*.json") if file.name in ("model_index.json", "config.json", "tokenizer_config.json")]
    assert configs or written.name in ("judge", "scenes")   # without configs
    for file in configs:
        assert not json.loads(file.read_text()).keys() & {"_name_or_path", "name_or_path"}, file


@pytest.mark.parametrize("changes", [dict(), dict(lora=2, precision="bf16")], ids=["full", "bf16 lora"])
def test_the_line_of_a_students_card_gives_what_sampler_gives_in_the_default_dtype(students, changes):
    folder = students("tiny", **changes) / "student-2"
    line = re.search(r"`(DiffusionPipeline\S+)\(prompt, (.*?)\)`", (folder / "README.md").read_text())
    assert line[1] == "DiffusionPipeline.from_pretrained(folder)"
    options = eval(f"dict({line[2]})")
    assert options == dict(num_inference_steps=2, guidance_scale=1)
    theirs = stock(folder)(PROMPTS, latents=sampler.noise(SEEDS, (16, 8, 8)), output_type="latent", **options).images
    assert (latents(folder, 2, 1.0) - theirs).abs().max() <= 1e-4


def test_the_card_begins_with_what_the_hub_reads_and_with_the_call(students, teachers, tmp_path):
    folder = students("tiny", lora=2, precision="bf16") / "student-2"
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data == dict(library_name="diffusers", pipeline_tag="text-to-image", tags=["reflow", "few-step", "distillation", "lora"])
    assert text.index("# A reflow student of 2 windows") < text.index("```python")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace('"FOLDER"', "folder")
    names = dict(folder=folder)
    exec(code, names)
    assert names["image"].size == (64, 64)
    info, pipeline = json.loads((folder / "reflow.json").read_text()), load.load_pipeline(str(folder))
    for name, base, license_ in (("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"), ("tiny", None, "apache-2.0"),
                                 ("someone/model", "someone/model", None)):
        data = export.card_data(pipeline, {**info, "teacher": name})
        assert (data.base_model, data.license) == (base, license_)


def test_a_card_counts_distribution_matching_and_names_the_student_it_began_as(tmp_path):
    info = dict(updates=10, config=dict(batch=4, init="runs/a/student-1"), columns=dict(matching=0.3), commit="abc",
                cost=dict(evaluations=1376, processes=1, device="CPU (1 threads)"))
    told = export.cost(info, tmp_path)
    assert told.startswith("It began as the student in `runs/a/student-1`, whose card has what that took. It took 10 updates of 4 samples")
    assert "Its pairs and distribution matching took 1,376 network evaluations, a backward counted as two." in told
    plain = export.cost({**info, "config": dict(batch=4), "columns": dict(matching=0.0)}, tmp_path)
    assert plain.startswith("It took 10 updates") and "Its pairs took 1,376 network evaluations without gradient." in plain


def test_the_card_shows_a_picture_and_says_by_which_command_and_at_what_cost_it_was_made(teachers, tmp_path, monkeypatch):
    """Two stages of 2 and 6 updates of 4 samples; 6 trajectories of 8 steps at guidance 3, which evaluates twice."""
    run = tmp_path / "run"
    train.main(small(teachers["tiny"], run, windows=[2, 1], updates=8, batch=4, trajectories=6, solver_steps=8, guidance_teacher=3.0, grid_steps=3,
                     checkpoint_steps=7, log_steps=1, recipe="default"))
    stages = {windows: sum(json.loads((run / f"student-{windows}" / "reflow.json").read_text())[key] for key in ("updates",)) for windows in (2, 1)}
    assert stages[1] == 8 and 0 < stages[2] < 8
    for windows, updates in stages.items():
        text = (run / f"student-{windows}" / "README.md").read_text()
        assert f"It took {updates} updates of 4 samples: {4 * updates} forwards and backwards of the student." in text
        assert "Its pairs took 96 network evaluations without gradient." in text and f"Code: commit {export.versions()['commit']}." in text
        assert f"```bash\npython train.py --model {teachers['tiny']} " in text and "](samples.png)" in text
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][:updates]
        hours = sum(4 / line["samples_per_second"] for line in log) / 3600
        assert f"The updates took {hours:.2g} hours, on 1 process: CPU" in text
    last = run / "student-1" / export.PICTURE
    assert last.read_bytes() == (run / "grids" / "000008.png").read_bytes() != (run / "student-2" / export.PICTURE).read_bytes()
    # a checkpoint of before: its own updates, the picture of that time
    export.export_checkpoint(export.ExportConfig(str(run / "checkpoint-000007.safetensors"), str(tmp_path / "now")))
    assert "It took 7 updates" in (tmp_path / "now" / "README.md").read_text()
    assert (tmp_path / "now" / export.PICTURE).read_bytes() == (run / "grids" / "000006.png").read_bytes() != last.read_bytes()


@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub up to the network.  Returns: what it was called with."""
    calls = []
    monkeypatch.setattr(export.huggingface_hub, "get_token", lambda: "token")
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(export.huggingface_hub, name, lambda *args, name=name, **options: calls.append((name, args, options)))
    return calls


def results(folder):
    """results.json of a run that eval.py has measured."""
    row = dict(steps=2, nfe=2, fd=3.5, fd_corrected=3.25, fd_interval=[3.0, 3.5], clip=21.04)
    rows = [dict(row, method="teacher", windows=None, steps=32, nfe=32), dict(row, method="ddim", windows=None),
            dict(row, method="default", windows=4, run=""), dict(row, method="default", windows=2, run="", fd_corrected=1.75)]
    about = dict(distance="FD", features="tiny-clip", n=9, real=8, guidance=1.0, commit="abc")
    (folder / "results.json").write_text(json.dumps(dict(protocol=about, rows=rows)))


def test_a_push_sends_what_its_dry_run_lists_and_the_card_has_what_was_measured(students, tmp_path, hub, capsys):
    folder = shutil.copytree(students("tiny", lora=2, precision="bf16") / "student-2", tmp_path / "run" / "student-2")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("not sent")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nby hand\n")
    results(tmp_path / "run")
    before = card.read_text()
    export.push(export.PushConfig(str(folder), "me/student", dry_run=True))
    said = capsys.readouterr().out
    listed = dict(reversed(line.split(" MB  ")) for line in said.splitlines() if " MB  " in line)
    found = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    del found[".cache/x"]
    assert {name: float(size) for name, size in listed.items()} == {name: pytest.approx(size / 1e6, abs=6e-4) for name, size in found.items()}
    assert {"README.md", "reflow.json", export.LORA_FILE, "model_index.json"} <= found.keys()
    assert f"me/student: would get {sum(found.values()) / 1e6:.3f} MB in {len(found)} files, the card with figures" in said
    assert "names no license" in said and not hub and card.read_text() == before
    for private in (False, True):                          # twice: the figures are replaced
        export.push(export.PushConfig(str(folder), "me/student", private=private))
    text = card.read_text()
    opened = 'pipe = DiffusionPipeline.from_pretrained("{}")'.format
    assert opened("FOLDER") in before and text.startswith(before.replace(opened("FOLDER"), opened("me/student")))
    assert text.count("## Measured") == 1 == text.count("this student")
    assert "| this student | 2 | 2 | 1.75 (3.00 to 3.50) | 21.0 |" in text and "| teacher, ddim | 2 | 2 | 3.25 " in text
    made, sent = hub[2:]
    assert made == ("create_repo", ("me/student",), dict(private=True, exist_ok=True)) and hub[0][2]["private"] is None
    assert sent[0] == "upload_folder" and sent[2]["repo_id"] == "me/student" and sent[2]["folder_path"] == folder
    assert set(sent[2]["allow_patterns"]) == found.keys()
    export.push(export.PushConfig(str(folder), "me/elsewhere"))                       # a card opens where it lies
    assert opened("me/elsewhere") in card.read_text() and "me/student" not in card.read_text()
    # another student of two windows beside it was not measured, or has rows of its own
    assert export.measured(tmp_path / "run" / "merged", 2) == ""
    file = tmp_path / "run" / "results.json"
    result = json.loads(file.read_text())
    for name in ("student-early", "student-2"):
        file.write_text(json.dumps(result | dict(rows=[dict(row, student=name) for row in result["rows"]])))
        assert [bool(export.measured(tmp_path / "run" / other, 2)) for other in ("student-early", "student-2")] == [
            name == "student-early", name == "student-2"]


def test_a_push_that_cannot_be_is_one_line(students, tmp_path, hub, monkeypatch):
    folder = str(students("tiny") / "student-2")

    def refuse(*_, **__):
        raise ConnectionError("no route")
    for given, message in ((("nowhere", "me/x"), "FOLDER nowhere: no student there"), ((folder, ""), "USER/NAME .*: .*[Gg]ive USER/NAME"),
                           ((folder, "x"), "USER/NAME x: whose"), ((folder, "a/b/c"), "USER/NAME a/b/c: no name of a repository")):
        with pytest.raises(UserError, match=message):
            export.push(export.PushConfig(*given))
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"me/x: not sent \(ConnectionError: no route\); .* is whole, try again"):
        patch.setattr(export.huggingface_hub, "create_repo", refuse)
        export.push(export.PushConfig(folder, "me/x"))
    monkeypatch.setattr(export.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="USER/NAME me/x: not logged in to the hub; run hf auth login"):
        export.push(export.PushConfig(folder, "me/x"))
    export.push(export.PushConfig(folder, "me/x", dry_run=True))
    for broken, complaint in (({}, "results.json: not what eval.py writes"), ([], "results.json cannot be read")):
        (tmp_path / "torn").mkdir(exist_ok=True)
        (tmp_path / "torn" / "results.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=complaint):
            export.measured(tmp_path / "torn" / "student-2", 2)
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "README.md").unlink()
    with pytest.raises(UserError, match="README.md: is missing, and the hub shows it"):
        export.push(export.PushConfig(str(bare), "me/x", dry_run=True))
    with pytest.raises(UserError, match="--push-to-hub me/x: not logged in"):
        train.main(small("nowhere", tmp_path / "run", push_to_hub="me/x"))
    assert not hub and not (tmp_path / "run").exists()


def test_a_run_pushes_its_last_student(teachers, tmp_path, hub):
    folder = train.main(small(teachers["tiny"], tmp_path / "run", updates=2, push_to_hub="me/x"))
    assert [name for name, *_ in hub] == ["create_repo", "upload_folder"] and hub[1][2]["folder_path"] == folder


def test_the_command_of_a_card_starts_as_many_processes():
    c = train.Config(updates=5)
    assert train.command(c) == "python train.py --updates 5"
    assert train.command(c, 8) == "torchrun --nproc_per_node=8 train.py --updates 5"


def test_the_command_of_several_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert train.command(train.Config(updates=5), 16) == "torchrun --nnodes=2 --nproc_per_node=8 train.py --updates 5"


def test_pairs_solved_while_training_are_counted_to_the_end_of_a_stage():
    """The teacher's 8 steps through 2 windows; then the student of 2 windows, a step for each, through one."""
    c = train.Config(recipe="proreflow", windows=[2, 1], solver_steps=8, updates=10, batch=4)
    recipe = train.resolve_recipe(c)
    assert train.plan.evaluations(c, recipe, 1.0, 1) == (0, 5 * 4 * 4)
    assert train.plan.evaluations(c, recipe, 1.0, 2) == train.plan.evaluations(c, recipe, 1.0) == (0, 5 * 4 * 4 + 5 * 4 * 2)


# ---- where stock samplers agree -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, changes, windows, exact, others", [
    slow("tiny", {}, 4, [4, 8, 20, 40], [12]), ("tiny", {}, 1, [1, 2, 4, 5], [3, 6]),
    ("tiny", dict(recipe="2-reflow"), 1, [1], [2, 4]), slow("tiny", dict(recipe="perflow"), 4, [4], [8])])
def test_stock_samplers_agree_exactly_at_the_numbers_of_steps_that_the_card_names(students, tmp_path, family, changes, windows, exact, others):
    folder = students(family, **{key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}) / f"student-{windows}"
    info, pipeline = json.loads((folder / "reflow.json").read_text()), stock(folder)
    assert export.exact_steps(pipeline.scheduler, windows, info["path"])[:4] == exact
    card = (folder / "README.md").read_text()
    assert (f"{', '.join(map(str, exact))}, ... steps" if len(exact) > 1 else f"exactly {windows} step") in card
    assert export.exact_steps(pipeline.scheduler, 3, "vp") == []             # older students of 3 windows: sampler.py alone
    assert "do not divide into 3 windows" in export.agreement(pipeline.scheduler, 3, "vp")
    assert f"at exactly {windows} step" in export.agreement(pipeline.scheduler, windows, "angle") and "(path angle)" in export.agreement(pipeline.scheduler, windows, "angle")
    for steps in exact[:3] + others:
        apart = (latents(folder, steps, 1.0) - stock_latents(pipeline, steps, 1.0)).abs().max()
        assert apart <= 1e-4 if steps in exact else apart > 1e-3, steps
    if not changes:
        return
    file = tmp_path / "delta.safetensors"
    export.export_delta(export.DeltaConfig(str(folder), "", str(file)))
    export.merge(export.MergeConfig(str(file), info["teacher"], str(tmp_path / "merged")))
    assert export.agreement(pipeline.scheduler, windows, info["path"]) in (tmp_path / "merged" / "README.md").read_text()


def test_merge_says_where_stock_samplers_agree(students, teachers, tmp_path, capsys):
    export.export_delta(export.DeltaConfig(str(students("tiny", recipe="2-reflow") / "student-1"), "", str(tmp_path / "d.safetensors")))
    export.merge(export.MergeConfig(str(tmp_path / "d.safetensors"), str(teachers["tiny"]), str(tmp_path / "merged")))
    assert "agree with sampler.py at exactly 1 step:" in capsys.readouterr().out.splitlines()[-1]


def test_image_to_image_starts_at_boundaries_at_the_strengths_that_the_card_names():
    """Multiples of 1 / steps. Diffusers rounds steps x strength down (0.8 of two steps is 0.5), and below one step it fails."""
    folder = load.ASSETS / "student-2"
    card = (folder / "README.md").read_text()
    assert "a strength that is a multiple of 1 / num_inference_steps (with 2 steps 0.5 or 1)" in card
    pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def drawn(steps, strength, output_type="latent"):
        return pipeline("red heart on blue", image=image, num_inference_steps=steps, strength=strength, guidance_scale=1,
                        output_type=output_type, generator=torch.Generator().manual_seed(1)).images
    ours, model, _ = saved.open_model(str(folder))
    z_0 = models.encode(ours, image * 2 - 1)
    noise, cond = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(1)), models.encode_text(ours, ["red heart on blue"])
    for steps, strength in ((2, 0.5), (2, 1.0), (4, 0.25), (4, 0.75)):
        a, b = (c.float() for c in model.coefficients(torch.tensor([strength], dtype=torch.float64), 4))
        times = sampler.time_grid(steps, 2)[round(steps * (1 - strength)):]
        with torch.no_grad():
            expected = sampler.ddim(model, a * z_0 + b * noise, times, cond)
        assert (drawn(steps, strength) - expected).abs().max() <= 1e-4, (steps, strength)
    assert torch.equal(drawn(2, 0.8), drawn(2, 0.5))
    for steps, strength in ((1, 0.9), (2, 0.3)):
        with pytest.raises((RuntimeError, IndexError, ValueError)):      # from inside diffusers: there is no picture
            drawn(steps, strength, "np")


# ---- LoRA -------------------------------------------------------------------------------------------------------------


def test_a_lora_trained_in_bf16_loses_nothing_of_what_it_learnt(students, teachers, tmp_path):
    """Student minus teacher is B A, in the folder and in export-delta's file; what no adapter touches is the teacher's to the bit."""
    folder, file = students("tiny", lora=2, precision="bf16") / "student-2", tmp_path / "delta.safetensors"
    pairs = export.adapters(export.trained_weights(folder, lora=True))
    before, after = weights(teachers["tiny"]), weights(folder)
    export.export_delta(export.DeltaConfig(str(folder), "", str(file)))
    export.merge(export.MergeConfig(str(file), str(teachers["tiny"]), str(tmp_path / "merged")))         # has no adapter any more
    with pytest.raises(UserError, match="--init .*merged: its --lora is 0, not 2; give 0, or another student"):
        train.main(small(teachers["tiny"], tmp_path / "on", windows=[2], lora=2, precision="bf16", init=str(tmp_path / "merged")))
    delta, touched = load_file(file), {f"{layer}.weight" for layer in pairs}
    assert after.keys() == before.keys() == delta.keys() and len(touched) == len(pairs) < len(delta)
    learned = {f"{layer}.weight": (up.flatten(1).double() @ down.flatten(1).double()).view(before[f"{layer}.weight"].shape)
              for layer, (down, up) in pairs.items()}
    error = sum((after[name].double() - before[name].double() - value).square().sum() for name, value in learned.items())
    assert error.sqrt() <= 1e-3 * sum(value.square().sum() for value in learned.values()).sqrt()
    for name, value in delta.items():
        if name in touched:
            assert torch.allclose(value.double(), learned[name], atol=1e-9, rtol=1e-5), name
        else:
            assert not value.any() and torch.equal(after[name], before[name]), name


# ---- a run's options that decide what its models mean -------------------------------------------------------------------

# option -> the test that shows that it is read where a student, or its teacher, is opened again; recipe is resolved into windows and path
MEANING = dict(
    model="test_a_difference_merged_into_the_base_is_the_student_and_into_another_model_the_difference",
    model_config="test_a_teacher_from_a_single_file_is_opened_again_with_its_configuration",
    random_init="test_a_random_teacher_is_opened_again_with_its_seed", seed="test_a_random_teacher_is_opened_again_with_its_seed",
    size="test_a_student_is_sampled_at_the_size_it_was_trained_at", null_text="test_a_student_is_guided_by_the_null_embedding_it_was_trained_with",
    windows="test_stock_samplers_agree_exactly_at_the_numbers_of_steps_that_the_card_names",
    path="test_stock_samplers_agree_exactly_at_the_numbers_of_steps_that_the_card_names",
    recipe="test_stock_samplers_agree_exactly_at_the_numbers_of_steps_that_the_card_names",
    lora="test_a_lora_trained_in_bf16_loses_nothing_of_what_it_learnt",
    guidance_teacher="test_the_card_says_that_guidance_is_in_the_student",
    guidance_range="test_the_card_says_that_guidance_is_in_the_student")
TRAINING = set("""init pairs space loss matching high_pass_weight high_pass_radius normalization time_law starts_share time_base time_inside direction_weight direction_space
    solver_steps reuse forward_rate projection dropout name data image_column caption_column skip_bad prompts out cache trajectories cache_latents
    cache_only updates batch micro_batch lr ema precision gradient_checkpointing shard compile text_dropout resume keep checkpoint_steps log_steps grid_steps
    export export_dtype device validation_prompts config optimizer ema_device report_to caption min_size push_to_hub""".split())


def test_every_option_that_changes_what_a_model_means_has_a_reader():
    fields = {field.name for field in dataclasses.fields(train.Config)}
    assert fields == MEANING.keys() | TRAINING and not MEANING.keys() & TRAINING     # a new option: which of the two is it?
    assert all(callable(globals()[test]) for test in MEANING.values())
    assert saved.SETTINGS == {key: getattr(train.Config(), key) for key in saved.SETTINGS} and saved.SETTINGS.keys() < MEANING.keys()


def opened_by_eval(folder, info):
    """As eval.py opens a model of a run whose student has this reflow.json."""
    c = SimpleNamespace(dtype="fp32", guide="", size=None)
    return measuring.Evaluator.open(SimpleNamespace(opened=(None, None), c=c, device="cpu", student=info), str(folder))


@pytest.mark.parametrize("family", [slow("tiny"), "sdxl"])
def test_a_student_is_sampled_at_the_size_it_was_trained_at(students, teachers, tmp_path, family):
    folder = students(family, size=48, windows=(2,)) / "student-2"
    info, pipeline = json.loads((folder / "reflow.json").read_text()), stock(folder)
    small = 2 * (48 // pipeline.vae_scale_factor,)
    assert latents(folder, 2, 1.0).shape[-2:] == small
    image = pipeline("fox", num_inference_steps=2, guidance_scale=1, output_type="np").images
    assert image.shape == (1, 48, 48, 3)
    assert (latents(folder, 2, 1.0) - stock_latents(pipeline, 2, 1.0)).abs().max() <= 1e-4
    for name in (folder, teachers[family]):
        assert models.native_size(opened_by_eval(name, info)[0]) == (48, 48)
    sampler.main(sampler.Config(["fox"], str(folder), out=str(tmp_path / "a.png"), compare=True, scale=1))
    export.export_delta(export.DeltaConfig(str(folder), "", str(tmp_path / "d.safetensors")))
    export.merge(export.MergeConfig(str(tmp_path / "d.safetensors"), str(teachers[family]), str(tmp_path / "merged")))
    assert latents(tmp_path / "merged", 2, 1.0).shape[-2:] == small


@pytest.mark.parametrize("family, null", [("tiny", "zeros"), ("sdxl", "empty")])
def test_a_student_is_guided_by_the_null_embedding_it_was_trained_with(students, teachers, family, null):
    folder = students(family, null_text=null, windows=(2,)) / "student-2"
    info = json.loads((folder / "reflow.json").read_text())
    plain = load.load_pipeline(str(folder))
    expected = models.encode_text(plain, [None], null=null)
    for name in (folder, teachers[family]):
        found = models.encode_text(opened_by_eval(name, info)[0], [None])
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    unlike = models.encode_text(load.load_pipeline(str(teachers[family])), [None])
    assert not torch.equal(unlike["encoder_hidden_states"], expected["encoder_hidden_states"])
    apart = (latents(folder, 2, 2.5) - stock_latents(stock(folder), 2, 2.5)).abs().max()
    told = "With other guidance use sampler.py" in (folder / "README.md").read_text()
    assert (apart > 1e-3 and told) if family == "tiny" else (apart <= 1e-4 and not told)      # SD's own pipeline knows no zeros


def test_a_teacher_from_a_single_file_is_opened_again_with_its_configuration(teachers, tmp_path, monkeypatch):
    p = load.load_pipeline(str(teachers["sd15"]))
    parts = {**ldm_unet(p.unet), **ldm_vae(p.vae), **ldm_clip(p.text_encoder, "cond_stage_model.transformer.")}
    save_file({name: value.contiguous() for name, value in parts.items()}, tmp_path / "single.safetensors")
    c = small(tmp_path / "single.safetensors", tmp_path / "run", windows=[2], updates=2, model_config=str(teachers["sd15"]), checkpoint_steps=1)
    folder = train.main(c)
    info = json.loads((folder / "reflow.json").read_text())
    monkeypatch.setattr(load, "PRESETS", {})            # whoever asks for the published configuration fails
    opened_by_eval(c.model, info)
    sampler.main(sampler.Config(["fox"], str(folder), out=str(tmp_path / "a.png"), compare=True, scale=1))
    file = tmp_path / "d.safetensors"
    export.export_delta(export.DeltaConfig(str(folder), "", str(file)))
    export.export_checkpoint(export.ExportConfig(str(tmp_path / "run" / "checkpoint-000001.safetensors"), str(tmp_path / "now")))
    export.merge(export.MergeConfig(str(file), c.model, str(tmp_path / "merged"), str(teachers["sd15"])))
    info = json.loads((tmp_path / "merged" / "reflow.json").read_text())
    assert info["config"]["model_config"] == str(teachers["sd15"])
    opened_by_eval(info["teacher"], info)


def test_a_random_teacher_is_opened_again_with_its_seed(teachers, tmp_path):
    """In half precision it is the same network, rounded: a LoRA trained on that is added to this."""
    folder = train.main(small(teachers["tiny"], tmp_path / "run", random_init=True, seed=5, windows=[2], updates=2, lora=2, precision="bf16"))
    info = json.loads((folder / "reflow.json").read_text())
    made = [load.load_pipeline(str(teachers["tiny"]), dtype, True, 5).unet.state_dict() for dtype in (torch.float32, torch.bfloat16)]
    found = opened_by_eval(teachers["tiny"], info)[0].unet.state_dict()
    for name, value in found.items():
        assert torch.equal(value, made[0][name]) and torch.equal(value.bfloat16(), made[1][name]), name
    assert torch.equal(weights(folder)["conv_in.weight"], found["conv_in.weight"])
    pictures = sampler.Config(["fox"], str(folder), out=str(tmp_path / "a.png"), compare=True, scale=1)
    sampler.main(pictures)


def test_the_card_says_that_guidance_is_in_the_student(students):
    assert "guidance 3 is in the student already" in (students("tiny", guidance_teacher=3.0, windows=(2,)) / "student-2" / "README.md").read_text()
    assert saved.guidance_in(dict(config=dict(guidance_range=[4.0, 9.0]))) == "4 to 9" and saved.guidance_in({}) == ""
    assert "already" not in (students("tiny") / "student-2" / "README.md").read_text()


def test_students_that_were_opened_in_several_ways_are_evaluated_one_by_one(students, tmp_path):
    for name, changes in (("a", {}), ("b", dict(null_text="zeros", windows=(2,)))):
        shutil.copytree(students("tiny", **changes) / "student-2", tmp_path / name / "student-2")
    with pytest.raises(UserError, match=r"students of runs with several --null-text \(auto, zeros\); evaluate them one by one"):
        evaluation.main(protocols.Config(str(tmp_path), device="cpu"))
