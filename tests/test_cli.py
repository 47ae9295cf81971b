"""What a user types: good commands and bad input. Bad input is one line, exit status 2, and nothing lost."""
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing

import pytest
import torch
from conftest import ROOT, torchrun
from PIL import Image

import eval as evaluation
import export
import reflow
import sampler
import train
from models import saved
from runtime import checkpoints
from runtime import cli as command_line
from studies import runner
from tools import bench

MODULES = {"train.py": train, "sampler.py": sampler, "eval.py": evaluation, "tools.bench": bench}


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("train.py --updates 3") in this process.  Returns: (exit status, stdout, stderr)."""
    def run(line, *more):
        name, *arguments = [*line.split(), *map(str, more)]
        main, options = export.COMMANDS[arguments.pop(0)] if name == "export.py" else (MODULES[name].main, MODULES[name].Config)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        status = 0
        try:
            command_line.run(main, options, "")
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err
    return run


@pytest.fixture(scope="module")
def student(random_sd, tmp_path_factory):
    """A 2-window student of the random teacher."""
    out = tmp_path_factory.mktemp("run")
    return train.main(train.Config(model=str(random_sd), data="scenes", out=str(out), windows=[2], updates=2, batch=2, trajectories=2,
                                   solver_steps=8))


@pytest.fixture(scope="module")
def delta(student, tmp_path_factory):
    """The difference of that student, in a file."""
    file = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    export.export_delta(export.DeltaConfig(str(student), "", str(file)))
    return file


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, random_sd):
    """A folder with a few bad things in it."""
    tmp_path = tmp_path_factory.mktemp("mistakes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "file").write_text("")
    (tmp_path / "file.safetensors").write_text("torn")
    (tmp_path / "weights.ckpt").write_text("")
    (tmp_path / "other" / "trajectories").mkdir(parents=True)
    (tmp_path / "other" / "trajectories" / "manifest.json").write_text(json.dumps({"teacher": "123"}))
    broken = shutil.copytree(random_sd, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    incomplete = shutil.copytree(random_sd, tmp_path / "incomplete")
    shutil.rmtree(incomplete / "vae")
    for name, content in (("fake", b"not an image"), ("lonely", None), ("stray", None)):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "a.png").write_bytes(content)
        else:
            Image.new("RGB", (40, 40)).save(tmp_path / name / "a.png")
        if name != "lonely":
            (tmp_path / name / "a.txt").write_text("a caption")
    (tmp_path / "stray" / "b.txt").write_text("a caption")
    return tmp_path


@pytest.fixture
def here(tmp_path, monkeypatch, mistakes):
    """A working folder with these things in it, and no other; MODEL stands for the random teacher."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(mistakes, tmp_path, copy_function=os.link, dirs_exist_ok=True)


BAD = [
    ("train.py --updatse 5", "did you mean --updates?"),
    ("train.py --updates five", "invalid int value: 'five'"),
    ("train.py --windows 8 3", "8 windows do not merge into 3"),
    ("train.py --windows 2 4", "2 windows do not merge into 4"),
    ("train.py --windows 0", "windows"),
    ("train.py --windows 4 0", "at least one stage of at least one window is needed"),
    ("train.py --windows 5", "--solver-steps 32: must be a multiple of 40, the least that 8 and 5 windows divide"),
    ("train.py --solver-steps 12", "multiple of 8"),
    ("train.py --solver-steps 0", "--solver-steps 0: must be a multiple of 8"),
    ("train.py --model MODEL --data scenes --windows 6 --solver-steps 24", "--windows 6: does not divide the model's 1000 timesteps"),
    ("train.py --model MODEL --data scenes --windows 2000 1 --solver-steps 2000", "--windows 2000: does not divide the model's"),
    # pieces of a recipe that do not fit
    ("train.py --recipe lcm --path linear", "--path linear: does not go with pairs from consistency"),
    ("train.py --recipe lcm --windows 2", "--windows 2: does not go with pairs from consistency"),
    ("train.py --pairs consistency", "--windows 8 4 2 1: does not go with pairs from consistency"),
    ("train.py --recipe lcm --reuse 2", "--reuse 2: does not go with pairs from consistency"),
    ("train.py --recipe imitation --path linear", "--path linear: does not go with pairs from imitation"),
    ("train.py --recipe flow-map --reuse 2", "--reuse 2: does not go with pairs from flow-map"),
    ("train.py --recipe flow-map --precision bf16", "--precision bf16: does not go with pairs from flow-map"),
    ("train.py --pairs flow-map --windows 1 --precision fp16", "--precision fp16: does not go with pairs from flow-map"),
    ("sampler.py --prompt caf\udce9", "--prompt 'caf\\udce9': is not UTF-8"),
    ("train.py --recipe imitation --cache-only", "--cache-only: pairs from imitation are made while training"),
    ("train.py --recipe imitation --cache-latents", "--cache-latents: only goes with pairs from images"),
    ("train.py --recipe lcm --forward-rate 0.5", "--forward-rate 0.5: changes whole trajectories; use --pairs trajectory"),
    ("train.py --time-law uniform --starts-share 0.3", "--starts-share: only goes with --time-law starts"),
    ("train.py --time-base 4", "--time-base: only goes with --time-law exponential"),
    ("train.py --loss mse --high-pass-weight 0", "--high-pass-weight: only goes with --loss high-pass"),
    ("train.py --loss mse --high-pass-radius 0.2", "--high-pass-radius: only goes with --loss high-pass"),
    ("train.py --recipe lcm --direction-space x", "--direction-space: only goes with --direction-weight above 0"),
    ("train.py --cache-latents", "--cache-latents: only goes with pairs from images"),
    # what other trainers and samplers call our options
    ("train.py --learning-rate 1e-4", "unknown option '--learning-rate'; did you mean --lr?"),
    ("train.py --learning_rate=1e-4", "did you mean --lr?"),
    ("train.py --train_batch_size 4", "did you mean --batch?"),
    ("train.py --output_dir x", "did you mean --out?"),
    ("train.py --pretrained_model_name_or_path x", "did you mean --model?"),
    ("train.py --report_to wandb", "did you mean --report-to?"),
    ("train.py --logging_dir x", "a run logs to OUT/log.jsonl and OUT/tensorboard; leave it out"),
    ("train.py --use_8bit_adam", "did you mean --optimizer?"),
    ("train.py --report-to comet", "--report-to comet: not one of tensorboard, wandb, trackio"),
    ("train.py --optimizer adam", "--optimizer adam: not one of adamw, adamw8bit, muon"),
    ("train.py --ema-device gpu", "--ema-device gpu: not one of cpu"),
    ("train.py --no-ema --ema-device cpu", "--ema-device: only goes with --ema above 0"),
    ("train.py --precision fp16 --shard", "--precision fp16: does not go with --shard"),
    ("train.py --model MODEL --data scenes --out o --validation-prompts nowhere.txt", "--validation-prompts nowhere.txt: cannot be read"),
    ("train.py --mixed_precision bf16", "did you mean --precision?"),
    ("train.py --max_train_steps 4", "did you mean --updates?"),
    ("train.py --num_train_epochs 4", "did you mean --updates?"),
    ("train.py --resolution 512", "did you mean --size?"),
    ("train.py --gradient_accumulation_steps 4", "did you mean --micro-batch?"),
    ("train.py --rank 4", "did you mean --lora?"),
    ("train.py --guidance 4", "did you mean --guidance-teacher?"),
    ("train.py --guidance_teacher 4", "did you mean --guidance-teacher?"),
    ("sampler.py --num_inference_steps 4", "did you mean --steps?"),
    ("sampler.py --guidance_scale 4", "did you mean --guidance?"),
    ("sampler.py --pretrained_model_name_or_path x", "did you mean --model?"),
    ("sampler.py --precision bf16", "did you mean --dtype?"),
    ("export.py checkpoint --output_dir x", "did you mean --out?"),
    ("export.py delta --pretrained_model_name_or_path x", "did you mean --base?"),
    ("export.py merge --pretrained_model_name_or_path x", "did you mean --model?"),
    ("eval.py RUN --resolution 512", "did you mean --size?"),
    ("eval.py RUN --guidance_scale 4", "did you mean --guidance?"),
    ("tools.bench --mixed_precision bf16", "did you mean --precision?"),
    ("tools.bench --max_train_steps 4", "did you mean --updates?"),
    ("train.py --updates 3", "need at least as many updates"),
    ("train.py --recipe proreflwo", "did you mean proreflow?"),
    ("train.py --pairs trajectories", "did you mean trajectory?"),
    ("train.py --space v", "not one of eps, u, x, velocity, end"),
    ("train.py --time-law start", "--time-law start: not one of uniform, starts, exponential, cosh, log-normal; did you mean starts?"),
    ("train.py --seed -1", "--seed -1: must be at least 0"),
    ("train.py --batch 0", "--batch 0: must be at least 1"),
    ("train.py --lr 0", "--lr 0.0: must be above 0"),
    ("train.py --text-dropout 2", "--text-dropout 2.0: must be in [0, 1]"),
    ("train.py --forward-rate 1.5", "--forward-rate 1.5: must be in [0, 1]"),
    ("train.py --forward-rate -0.1", "--forward-rate -0.1: must be in [0, 1]"),
    ("train.py --forward-rate 0.5 --pairs data", "--forward-rate 0.5: changes whole trajectories; use --pairs trajectory"),
    ("train.py --model MODEL --forward-rate 0.5 --prompts file", "--forward-rate 0.5: needs images, and --prompts file holds none"),
    ("train.py --high-pass-weight -1", "--high-pass-weight -1.0: must be above -1"),
    ("train.py --high-pass-radius 2", "--high-pass-radius 2.0: must be in [0, 1]"),
    ("train.py --starts-share 1.1", "--starts-share 1.1: must be in [0, 1]"),
    ("train.py --time-base 1", "--time-base 1.0: must be above 0 and not 1"),
    ("train.py --time-base -3", "--time-base -3.0: must be above 0 and not 1"),
    ("train.py --normalization lernt", "did you mean learned?"),
    ("train.py --dropout 1", "--dropout 1.0: must be in [0, 1)"),
    ("train.py --projection -1 --windows 1", "--projection -1.0: must be at least 0"),
    ("train.py --projection 2 --windows 1", "--projection 2.0: must be in [0, 1]"),
    ("train.py --projection 0.1", "--projection 0.1: moves the two ends of whole trajectories; use --windows 1"),
    ("train.py --projection 0.1 --windows 1 --pairs data", "--projection 0.1: changes whole trajectories"),
    ("train.py --matching -1", "--matching -1.0: must be at least 0"),
    ("train.py --matching 0.1 --recipe proreflow", "--matching 0.1: is done against the teacher, whose place the student takes"),
    ("train.py --matching 0.1 --guidance-range 2 4", "--matching 0.1: needs one teacher, and --guidance-range makes many"),
    ("train.py --device cuda", "no CUDA device here; use --device cpu"),
    ("train.py --model nowhere", "--model nowhere: no diffusers pipeline there"),
    ("train.py --model broken --data scenes", "--model broken: cannot be loaded"),
    ("train.py --model incomplete --data scenes", "--model incomplete"),
    ("train.py --model MODEL", "give either --data"),
    ("train.py --model MODEL --data scenes --prompts empty.txt", "give either --data"),
    ("train.py --model MODEL --data nowhere", "--data nowhere: no such folder"),
    ("train.py --model MODEL --data empty", "--data empty: no image in it"),
    ("train.py --model MODEL --data fake", "a.png or its caption cannot be read"),
    ("train.py --model MODEL --data lonely", "a.png has no caption; write one into a.txt"),
    ("train.py --model MODEL --data stray", "b.txt is the caption of no image; add its image or move it away"),
    ("train.py --model MODEL --prompts empty.txt", "--prompts empty.txt: no prompt in it"),
    ("train.py --model MODEL --prompts file/x", "--prompts file/x: cannot be read"),
    ("train.py --model MODEL --data scenes --out file/out", "--out file/out: cannot be written"),
    ("train.py --model MODEL --data scenes --size 30", "--size 30: must be a multiple of 16 for this model, for instance 16 or 32"),
    ("train.py --model MODEL --data scenes --batch 6 --micro-batch 4", "6: not divisible by 4 (--micro-batch)"),
    ("train.py --model MODEL --data scenes --batch 4 --reuse 3", "4: not divisible by 3 (--reuse)"),
    ("train.py --reuse 0", "--reuse 0: must be at least 1"),
    ("train.py --precision fp8", "--precision fp8: not one of fp32, bf16"),
    ("train.py --null-text none", "--null-text none: not one of auto, empty, zeros"),
    ("train.py --lora -1", "--lora -1: must be at least 0"),
    ("train.py --keep 0", "--keep 0: must be at least 1"),
    ("train.py --device tpu", "--device tpu: not one of cpu, cuda, mps, xpu"),
    ("train.py --device mps", "--device mps: no Apple GPU (mps) device here; use --device cpu"),
    ("train.py --device xpu", "--device xpu: no Intel GPU (xpu) device here; use --device cpu"),
    ("train.py --model MODEL --data scenes --pairs data --cache-latents", "--cache-latents: --data scenes is endless"),
    ("train.py --model MODEL --data scenes --pairs data --cache-only", "--cache-only: --data scenes is endless"),
    ("train.py --model weights.ckpt --data scenes", "never pickles"),
    ("train.py --model missing.safetensors --data scenes", "--model missing.safetensors"),
    ("train.py --model file.safetensors --data scenes", "--model file.safetensors"),
    ("train.py --model some/hub --random-init --data scenes", "--model some/hub"),
    ("train.py --model MODEL --data " + 300 * "x", "xxx...: no file has so long a name; give another"),
    ("sampler.py --prompt x --out x.png --model " + 300 * "x", "xxx...: no file has so long a name; give another"),
    ("train.py --model MODEL --data scenes --cache other", "--cache other/trajectories: made with other settings"),
    ("export.py checkpoint --checkpoint nowhere.safetensors --out x", "--checkpoint nowhere.safetensors: no such file"),
    ("export.py checkpoint --checkpoint DELTA --out empty", "--out empty: exists already"),
    ("export.py checkpoint --checkpoint file.safetensors --out x", "not a whole safetensors file"),
    ("export.py checkpoint --chekpoint x", "did you mean --checkpoint?"),
    ("export.py delta --student nowhere", "--student nowhere: no student there"),
    ("export.py delta --student STUDENT --dtype int8", "--dtype int8: not one of fp32, fp16"),
    ("export.py delta --student STUDENT --base SDXL", "not the architecture of --student"),
    ("export.py merge --delta nowhere --model MODEL --out x", "--delta nowhere: no such file"),
    ("export.py merge --delta DELTA --model SDXL --out x", "not the architecture of --delta"),
    ("export.py merge --delta DELTA --out x", "--model: name the model"),
    ("export.py merge --delta DELTA --model MODEL", "--out: name a folder"),
    ("export.py onnx", "MODEL: name a student's folder or a teacher"),
    ("export.py onnx MODEL", "OUT: name a folder"),
    ("export.py onnx MODEL empty", "OUT empty: exists already"),
    ("export.py onnx MODEL x y", "unexpected word 'y'"),
    ("export.py onnx --model MODEL --out x", "unknown option '--model'"),
    ("sampler.py --model STUDENT --prompt fox --size 30", "--size 30: must be a multiple of 16"),
    ("sampler.py --model STUDENT --prompt fox --dtype fp8", "--dtype fp8: not one of"),
    ("tools.bench --parts sped", "--parts sped: not one of training, evaluations, sampling, speed"),
    ("tools.bench --device cuda", "no CUDA device here; use --device cpu"),
    ("sampler.py", "no prompt"),
    ("sampler.py --prompt", "--prompt"),
    ("sampler.py --model STUDENT --promt fox", "did you mean --prompt?"),
    ("sampler.py --model STUDENT --prompt fox --steps 0", "--steps 0: must be at least 1"),
    ("sampler.py --model STUDENT --prompt fox --steps 1", "use --steps 2 or more, or a student of 1 window"),
    ("sampler.py --model STUDENT --prompt fox --seed -3", "--seed -3: must be at least 0"),
    ("sampler.py --model STUDENT --prompt fox --n 0", "--n 0: must be at least 1"),
    ("sampler.py --model STUDENT --prompt fox --out file/a.png", "--out file/a.png: cannot be written"),
    ("sampler.py --model STUDENT --prompt fox --out a.gif", "--out a.gif: must end in .png"),
    ("sampler.py --model nowhere --prompt fox", "--model nowhere: no diffusers pipeline there"),
    ("sampler.py --model broken --prompt fox", "--model broken: cannot be loaded"),
    ("eval.py", "give the folder that train.py wrote"),
    ("eval.py nowhere", "nowhere: give the folder"),
    ("eval.py empty", "empty: no finished student in it"),
    ("eval.py RUN --n 100", "--n 100: must be at least 960"),
    ("eval.py RUN --steps 0", "--steps 0: must be at least 1"),
    ("eval.py RUN --steps 1", "--steps 1: fewer than the windows of every student in"),
    ("eval.py RUN --clip empty", "--clip empty: no CLIPModel folder there"),
]


@pytest.mark.parametrize("line, message", BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_one_line_and_exit_status_2(cli, here, random_sd, small_models, student, delta, line, message):
    before = sorted(here.iterdir())
    for word, path in dict(MODEL=random_sd, STUDENT=student, RUN=student.parent, SDXL=small_models["sdxl"], DELTA=delta).items():
        line = line.replace(word, str(path))
    status, out, err = cli(line)
    assert status == 2 and message in err, (status, err)
    err = re.sub(r"\A(\rcaptions: .*)+\n", "", err)         # they are encoded before some mistakes can be seen
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [path for path in sorted(here.iterdir()) if path.name != "runs"] == before
    assert not list(here.glob("runs/*/student-*"))


def test_prompts_add_up_and_of_every_other_list_the_last_counts():
    words = ["--prompt", "fox", "cat", "--n", "2", "--prompt", "red heart"]
    assert command_line.parse(sampler.Config, "", words).prompt == ["fox", "cat", "red heart"]
    assert command_line.parse(sampler.Config, "", []).prompt == []
    assert command_line.parse(train.Config, "", ["--windows", "8", "4", "--windows", "2"]).windows == [2]


def numbers(kind, *types):
    """The options of a Config whose values are of these types, a list of them included."""
    hints = {name: field.type for name, field in kind.__dataclass_fields__.items()}
    return [name for name, hint in hints.items() if any(each in (hint, *typing.get_args(hint)) for each in types)]


CONFIGS = [module.Config for module in (*MODULES.values(), runner)] + [kind for _, kind in export.COMMANDS.values()]


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_no_option_takes_a_number_that_is_not_finite(kind):
    for name in numbers(kind, float):
        for value in ("nan", "inf", "-inf"):
            with pytest.raises(command_line.UserError, match=f"--{name.replace('_', '-')} {value}: must be a finite number"):
                command_line.parse(kind, "", [f"--{name.replace('_', '-')}={value}"])


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_seed_fits_what_torch_takes_also_after_a_run_has_derived_its_own(kind):
    if "seed" not in kind.__dataclass_fields__:
        return
    for value in (-1, command_line.MAX_SEED + 1, 18 * 10 ** 12, 10 ** 20):
        with pytest.raises(command_line.UserError, match=f"--seed {value}: must be at least 0 and at most 4294967295"):
            command_line.parse(kind, "", [f"--seed={value}"])
    assert command_line.parse(kind, "", [f"--seed={command_line.MAX_SEED}"]).seed == command_line.MAX_SEED
    torch.manual_seed((command_line.MAX_SEED * 1_000_003 + 10 ** 8) * 1024 + 1023)              # train.py's: 1024 processes, 10^8 updates
    sampler.generators([command_line.MAX_SEED + 10 ** 9])


NUMBERS = [(file, name) for file, module in MODULES.items() for name in numbers(module.Config, int, float)]


@pytest.mark.parametrize("file, name", NUMBERS)
def test_every_number_has_a_range(cli, here, student, file, name):
    required = {"train.py": "", "sampler.py": f"--model {student} --prompt fox", "eval.py": f"{student.parent}", "tools.bench": ""}[file]
    status, _, err = cli(f"{file} {required} --{name.replace('_', '-')}=-8")
    assert status == 2 and f"--{name.replace('_', '-')}" in err and "-8" in err and err.count("\n") == 1, err


def test_a_recipe_that_starts_from_images_needs_images(cli, here, random_sd):
    (here / "prompts.txt").write_text("fox")
    status, _, err = cli("train.py --recipe perflow --prompts prompts.txt --model", random_sd)
    assert status == 2 and "prompts.txt: holds no images" in err and err.count("\n") == 1


def test_a_run_with_other_settings_is_not_overwritten(cli, here, random_sd):
    line = f"train.py --model {random_sd} --data scenes --windows 1 --grid-steps 0 --updates 1 --batch 2 --trajectories 2 --solver-steps 8 --out o"
    assert cli(line)[0] == 0
    status, _, err = cli(line, "--lr", 0.01)
    assert status == 2 and "lr 0.0002 -> 0.01" in err
    assert cli(line)[:2] == (0, "o/student-1: this run is finished; choose another --out to train again\n")
    assert "python export.py single-file o/student-1 o/student-1-single-file.safetensors" in cli(line, "--export", "diffusers", "single-file")[1]


def test_a_mistake_does_not_claim_the_folder(cli, here, random_sd):
    line = "train.py --data scenes --windows 1 --grid-steps 0 --updates 1 --batch 2 --trajectories 2 --solver-steps 8 --out o --model"
    assert cli(line, "nowhere")[0] == 2
    assert cli(line, random_sd)[0] == 0
    status, _, err = cli(line, random_sd, "--no-resume")
    assert status == 2 and "--out o: holds a run; choose another --out or delete it" in err


def test_a_cache_of_another_teacher_is_refused(cli, here, random_sd, small_models):
    line = "train.py --data scenes --windows 1 --grid-steps 0 --updates 1 --batch 2 --trajectories 2 --solver-steps 8 --cache c --model"
    assert cli(line, random_sd, "--out", "a")[0] == 0
    status, _, err = cli(line, small_models["sd15"], "--out", "b")
    assert status == 2 and "--cache c/prompts: made with other settings" in err and "'text'" in err and err.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_with_where_and_keeps_the_checkpoint(cli, here, random_sd):
    status, _, err = cli(f"train.py --model {random_sd} --data scenes --batch 2 --trajectories 2 --updates 40 --solver-steps 8 --recipe "
                         "reflow --lr 1e30 --checkpoint-steps 1 --out o")
    found = re.search(r"loss \S+ at step (\d+), window \(0.000, 1.000\], t = (\S+), stage 0 \(1 windows\);", err)
    assert status == 2 and found and 0 < float(found[2]) <= 1 and "lower --lr" in err
    assert not (here / "o" / "student-1").exists()
    # the updates before it were finite, and so is what they left
    newest = sorted((here / "o").glob("checkpoint-*"))[-1]
    assert newest.name == f"checkpoint-{int(found[1]):06d}.safetensors"
    _, tensors = export.open_safetensors("", newest)
    assert all(value.isfinite().all() for name, value in tensors.items() if name.startswith("ema:"))


def test_a_gradient_that_is_not_finite_is_not_kept(cli, here, random_sd, monkeypatch):
    """The loss of the update is finite, the weights it leaves are not: no checkpoint of them."""
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, norm):
        calls.append(real(parameters, norm))
        return calls[-1] * (float("inf") if len(calls) == 3 else 1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    status, _, err = cli(f"train.py --model {random_sd} --data scenes --batch 2 --trajectories 2 --updates 8 --solver-steps 8 --recipe reflow "
                         "--checkpoint-steps 1 --out o")
    assert status == 2 and "gradient norm inf at step 2, stage 0 (1 windows)" in err
    assert sorted(file.name for file in (here / "o").glob("checkpoint-*")) == ["checkpoint-000001.safetensors", "checkpoint-000002.safetensors"]


def test_a_full_disk_keeps_the_last_checkpoint(cli, here, random_sd, monkeypatch):
    real_save = checkpoints.save_file

    def save(tensors, file, metadata):
        if int(metadata["step"]) > 1:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real_save(tensors, file, metadata)
    monkeypatch.setattr(checkpoints, "save_file", save)
    status, _, err = cli(f"train.py --model {random_sd} --data scenes --batch 2 --trajectories 2 --updates 8 --solver-steps 8 --recipe reflow "
                         "--checkpoint-steps 1 --out o")
    assert status == 2 and "no space left on the device" in err
    assert [file.name for file in (here / "o").glob("checkpoint-*")] == ["checkpoint-000001.safetensors"]


def test_data_cache_makes_what_training_then_uses(here, random_sd, run_file):
    options = ["--model", random_sd, "--data", "scenes", "--trajectories", 3, "--solver-steps", 8, "--cache", here / "c"]
    done = run_file("train.py", "--cache-only", *options)
    assert done.returncode == 0 and "c: 3 trajectories" in done.stdout, done.stderr[-2000:]
    made = {file: file.stat().st_mtime_ns for file in (here / "c").rglob("*.safetensors")}
    train.main(train.Config(model=str(random_sd), data="scenes", trajectories=3, solver_steps=8, cache=str(here / "c"), out="o", updates=2, windows=[1],
                            batch=2, grid_steps=0))
    assert made and made == {file: file.stat().st_mtime_ns for file in (here / "c").rglob("*.safetensors")}
    Image.new("RGB", (40, 40)).save(here / "empty" / "a.png")
    (here / "empty" / "a.txt").write_text("black")
    done = run_file("train.py", "--cache-only", "--model", random_sd, "--data", here / "empty", "--recipe", "perflow", "--cache", here / "c")
    assert done.returncode == 0 and "c: 1 latents; train with --cache-latents" in done.stdout, done.stderr[-2000:]


def test_sampler_writes_what_was_asked_for(cli, here, student, random_sd):
    status, out, err = cli(f"sampler.py --model {student} --prompt fox --out a.png")
    assert status == 0 and "2 steps = 2 network evaluations" in out
    assert Image.open("a.png").size == (256, 256)
    cli(f"sampler.py --model {student} --prompt fox cat --n 2 --steps 4 --scale 1 --out b.png")
    assert [Image.open(f"b-{i}.png").size for i in range(4)] == [(64, 64)] * 4
    cli(f"sampler.py --model {student} --prompt fox cat --n 3 --grid --guidance 2 --scale 2 --out c.png")
    assert Image.open("c.png").width > 3 * 64
    cli(f"sampler.py --model {student} --prompt fox --compare --save-steps --scale 2 --out d.png")
    assert Image.open("d.png").width > 3 * 128 and Image.open("d-steps.png").width > 2 * 64      # the teacher at 32 and 2 steps, the student
    cli(f"sampler.py --model {random_sd} --prompt fox --compare --scale 2 --out e.png")
    assert Image.open("e.png").width > 4 * 128                                                   # the teacher at 32, 4, 2 and 1 steps


def test_beside_a_teacher_s_own_steps_stand_those_of_the_solver_that_was_asked_for(cli, here, random_sd):
    for name, given in (("plain", ""), ("heun", "--solver heun"), ("grid", "--time-grid sigmoid")):
        assert cli(f"sampler.py --model {random_sd} --prompt fox --steps 2 --compare --scale 1 --out {name}.png", *given.split())[0] == 0
    widths = {name: Image.open(f"{name}.png").width for name in ("plain", "heun", "grid")}
    assert widths["heun"] == widths["grid"] > widths["plain"]


def test_every_file_of_a_call_is_known_to_be_writable_before_a_picture_is_made(cli, here, student, monkeypatch):
    monkeypatch.setattr(sampler, "generate", None)         # a call of it would be a traceback
    (here / "a-0.png").mkdir()
    (here / "b-steps.png").mkdir()
    for line in ("--prompt fox cat --out a.png", "--prompt fox --save-steps --out b.png", f"--prompt fox --n 2 --out {250 * 'x'}.png"):
        status, _, err = cli(f"sampler.py --model {student}", *line.split())
        assert status == 2 and "cannot be written" in err and err.count("\n") == 1, err
    shutil.copytree(student, here / "orphan")
    info = json.loads((student / "reflow.json").read_text())
    (here / "orphan" / "reflow.json").write_text(json.dumps(info | dict(teacher="runs/gone")))
    status, _, err = cli("sampler.py --model orphan --prompt fox --compare --out c.png")
    assert status == 2 and "--compare: --model runs/gone" in err, err
    status, _, err = cli(f"sampler.py --model {student} --prompt fox --scale 65 --out c.png")
    assert status == 2 and "--scale 65: must be at most 64" in err, err


def test_same_seed_same_picture_and_image_i_has_seed_plus_i(cli, here, student):
    cli(f"sampler.py --model {student} --prompt fox --seed 7 --scale 1 --out a.png")
    cli(f"sampler.py --model {student} --prompt fox --seed 6 --n 2 --scale 1 --out b.png")
    assert Image.open("a.png").tobytes() == Image.open("b-1.png").tobytes() != Image.open("b-0.png").tobytes()


def test_unknown_words_are_named(cli, here, student):
    shutil.copytree(student, here / "s")
    (here / "s" / "vocabulary.json").write_text(json.dumps(["fox", "on", "blue"]))
    _, out, _ = cli("sampler.py --model s --out a.png --prompt", "fox on mauve")
    assert "never seen: mauve" in out and "blue fox on" in out
    assert "never seen" not in cli("sampler.py --model s --out a.png --prompt", "Fox on blue")[1]


def test_steps_and_guidance_that_a_student_was_not_made_for_are_doubted_in_one_line(cli, here, student):
    line = f"sampler.py --model {student} --prompt fox --scale 1 --out a.png"
    for given, doubt in (("--steps 5", f"warning: 5 steps: {student} has 2 windows, and some get a step more than others; use 4 or 6"),
                         ("--guidance 2.5", f"warning: guidance 2.5: {student} has learned none, and so much burns its pictures; use 1, or up to 2")):
        said = [each for each in "".join(cli(f"{line} {given}")[1:]).splitlines() if "warning" in each]
        assert [each.strip() for each in said] == [doubt]
    for given in ("", "--steps 4 --guidance 2", "--steps 6 --guidance 0", f"--guidance 3 --guide {student}"):
        assert "warning" not in "".join(cli(f"{line} {given}")[1:]), given
    info = dict(windows=4, config=dict(guidance_teacher=3.0))
    assert saved.doubts("s", info, (), 8, 1.5) == ["guidance 1.5: guidance 3 is in s already, and this comes on top of it; use 1"]
    assert not saved.doubts("s", info, (), 4, 1.0) and not saved.doubts("s", info, (), 3, 1.0)      # 3 are refused
    assert not saved.doubts("sd15", {}, (), 7, 7.5)                                                # a teacher
    page = (ROOT / "docs" / "use.md").read_text()
    assert f"| guidance {saved.USEFUL_GUIDANCE} |" in page and "the most that is useful" in page


def test_the_newest_student_is_the_default(here, student):
    assert saved.students()[0].endswith("student-2") and "assets" in saved.students()[0]
    shutil.copytree(student, here / "runs" / "x" / "student-2")
    assert saved.students()[0] == "runs/x/student-2"


def test_help_lists_every_option_with_its_comment(cli):
    for name, module in MODULES.items():
        status, out, _ = cli(f"{name} --help")
        assert status == 0 and all(field.replace("_", "-") in out or field in out for field in module.Config.__dataclass_fields__)
        assert "peak, per stage" in out or name != "train.py"


@pytest.mark.parametrize("ranks, said", [((0, 1), "error: bad"), ((1,), "error (process 1): bad")], ids=["all", "the second"])
def test_a_mistake_is_said_once_whichever_process_meets_it(tmp_path, run_file, ranks, said):
    script = tmp_path / "meets.py"
    script.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom runtime import cli\n"
                      f"sys.exit(cli.fail('bad')) if int(os.environ['RANK']) in {ranks} else time.sleep(60)\n")
    done = run_file(script, launcher=torchrun(2))
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and lines == [said]


# ---- --config, --help ----------------------------------------------------------------------------------------------


def test_a_file_of_options_is_read_and_the_command_line_wins(here):
    def read(text, *more, name="o.yaml"):
        (here / name).write_text(text)
        return command_line.parse(train.Config, "", ["--config", name, *more])
    text = "updates: 7\nlr: 1e-3\nwindows: [4, 2]\nrandom-init: true\nresume: false\nguidance_teacher: 2\nexport: [kohya]\nsize: null\n"
    expected = train.Config(updates=7, lr=1e-3, windows=[4, 2], random_init=True, resume=False, guidance_teacher=2.0, export=["kohya"])
    assert read(text) == expected
    assert read(text, "--updates", "9", "--resume", "--windows", "1") == dataclasses.replace(expected, updates=9, resume=True, windows=[1])
    every = dataclasses.asdict(expected)
    assert read(json.dumps(every), name="config.json") == read(json.dumps({"method": "x", "config": every}), name="reflow.json") == expected


@pytest.mark.parametrize("text, message", [
    ("updatse: 5", "--config o.yaml: unknown option '--updatse'; did you mean --updates?"),
    ("learning_rate: 1e-4", "did you mean --lr?"),
    ("updates: five", "--config o.yaml: argument --updates: invalid int value: 'five'"),
    ("resume: maybe", "--config o.yaml: unexpected word 'maybe'"),
    ("lr: -.inf", "--lr -inf: must be a finite number"),
    ("updates: {a: 1}", "--config o.yaml: updates: neither text, a number"),
    ("updates: [1\nlr", "--config o.yaml: cannot be read"),
    ("just words", "--config o.yaml: holds no options"),
    ("config: other.yaml", "names another file of options"),
    ("lr: -1", "--lr -1.0: must be above 0")])
def test_a_bad_file_of_options_is_one_line(cli, here, text, message):
    (here / "o.yaml").write_text(text)
    status, _, err = cli("train.py --config o.yaml")
    assert status == 2 and message in err and err.count("\n") == 1, err


def test_the_files_that_a_run_writes_give_that_run_again(here, student):
    """OUT/config.yaml and the student's reflow.json: all of it. OUT/config.json: all that decides the result."""
    out, plain = student.parent, command_line.parse(train.Config, "", [])
    whole = command_line.parse(train.Config, "", ["--config", str(out / "config.yaml")])
    assert whole == command_line.parse(train.Config, "", ["--config", str(student / "reflow.json")])
    assert whole.windows == [2] and whole.updates == 2 and whole.data == "scenes" and whole.out == str(out)
    short = dataclasses.asdict(command_line.parse(train.Config, "", ["--config", str(out / "config.json")]))
    assert {key for key, value in dataclasses.asdict(whole).items() if short[key] != value} <= set(train.MAY_CHANGE_ON_RESUME)
    assert short["updates"] == 2 and whole != plain
    assert train.main(whole) == student                              # found finished, not refused
    train.main(train.Config(model="tiny", out="own", windows=[1], updates=1, batch=2, trajectories=2, solver_steps=8, grid_steps=0))
    assert command_line.parse(train.Config, "", ["--config", "own/config.yaml"]).data == ""       # the model's own was not asked for
    assert command_line.parse(train.Config, "", shlex.split(train.command(whole))[2:]) == whole


def test_a_run_from_before_an_option_existed_goes_on(here, student):
    before = json.loads((student.parent / "config.json").read_text())
    older = {key: value for key, value in before.items() if key not in ("null_text", "reuse", "text_dropout")}
    shutil.copytree(student.parent, here / "old")
    (here / "old" / "config.json").write_text(json.dumps(older))
    c = command_line.parse(train.Config, "", ["--config", str(student.parent / "config.yaml"), "--out", "old"])
    settings = {**older, "out": "old"}
    (here / "old" / "config.json").write_text(json.dumps(settings))
    assert train.main(c).name == student.name
    with pytest.raises(command_line.UserError, match="text_dropout 0.1 -> 0.5"):
        train.main(dataclasses.replace(c, text_dropout=0.5))


def test_a_recipes_columns_are_options_with_the_recipes_own_words(cli):
    columns = [field for field in dataclasses.fields(reflow.Recipe) if field.name not in ("stages", "shares")]
    fields = {field.name: field for field in dataclasses.fields(train.Config)}
    for column in columns:
        assert fields[column.name].type == column.type | None and fields[column.name].default is None
    words = command_line.comments(train.Config)
    assert words.keys() == fields.keys() and all(words[column.name] == command_line.comments(reflow.Recipe)[column.name] for column in columns)
    assert words["time_inside"] == "the law inside each window, all windows equally often, instead of on the whole axis"


def test_help_has_the_ten_that_matter_first_and_then_the_groups(cli):
    _, out, _ = cli("train.py --help")
    places = [out.index(f"\n{title}:") for title in ("most runs need no more than these 10", "model", "method", "data", "training", "memory",
                                                     "output")]
    assert places == sorted(places) and max(out.index(f"  --{name} ") for name in train.Config.FIRST) < places[1]
    for name, group in dict(model_config=1, windows=2, space=2, cache=3, ema=4, device=5, keep=6).items():
        found = out.index(f"  --{name.replace('_', '-')} ")
        assert places[group] < found < [*places, len(out)][group + 1], name


def test_a_name_that_is_no_text_can_be_printed(tmp_path):
    """A file's, where the terminal's encoding is a strict UTF-8."""
    (tmp_path / "says.py").write_text("from dataclasses import dataclass\nfrom runtime import cli\n\n\n@dataclass\nclass Config:\n    seed: int = 0\n\n\n"
                                      "cli.run(lambda c: print('caf\\udce9.png'), Config, '')\n")
    done = subprocess.run([sys.executable, tmp_path / "says.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(ROOT)})
    assert done.stdout == "caf\\udce9.png\n", done.stderr
