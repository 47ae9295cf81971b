"""Shared fixtures: a randomly initialized pipeline of the embedded architecture, and closed-form models. No downloads."""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# one thread here and in the processes that tests start: the same bits need the same number of threads
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# no test asks the hub: where it is out of reach each file takes half a minute of retries
os.environ["HF_HUB_OFFLINE"] = "1"

from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

import teacher  # noqa: E402
from models import architectures  # noqa: E402
from tools import build  # noqa: E402


def slow(*values):
    """A case of parametrize that `make test` leaves to `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def torchrun(processes):
    """The launcher of a run on several processes, at a port nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free.getsockname()[1]}")


# Importing torch, diffusers and transformers takes six seconds, as often as a command is run. Commands are therefore forked from one
# process that has imported all the project's files, and does nothing else.
FORKS = multiprocessing.get_context("forkserver")
MODULES = [".".join(file.relative_to(ROOT).with_suffix("").parts) for folder in (".", "*") for file in ROOT.glob(f"{folder}/*.py")
           if file.parent.name not in ("tests", ".venv") and not file.stem.startswith("__")]
FORKS.set_forkserver_preload(["conftest", *MODULES])


def begin(command, cwd, environment, out, err):
    """What `python FILE ...` or `python -m MODULE ...` does, in a new process. out, err: files for what it prints."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, sys.path[0] = command, str(ROOT)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


def start_python(command, cwd, out=os.devnull, err=os.devnull, **environment):
    """subprocess.Popen for [FILE, ...], a file of the project with its arguments.  Returns: multiprocessing's Process."""
    process = FORKS.Process(target=begin, args=(command, cwd, {**os.environ, **environment}, out, err))
    process.start()
    return process


def run_python(command, cwd, timeout=600):
    """subprocess.run for the same.  Returns: CompletedProcess."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start_python(command, cwd, out, err)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def pytest_collection_modifyitems(items):
    """The longest test first: with a worker per core it must not be the last to begin."""
    items.sort(key=lambda item: item.originalname != "test_every_command_runs")


@pytest.fixture(scope="session")
def schedule():
    """Stable Diffusion 1.5's noise schedule."""
    return teacher.Schedule(build.make_scheduler().alphas_cumprod)


@pytest.fixture(scope="session")
def random_sd(tmp_path_factory):
    """Folder of a StableDiffusionPipeline of the embedded one's tokens, latents and size, with small networks of random weights."""
    torch.manual_seed(0)
    tokenizer = build.make_tokenizer()
    text_encoder = CLIPTextModel(CLIPTextConfig(**build.text_config(tokenizer, 64, 2, build.WORDS + build.PLACES)))
    unet = UNet2DConditionModel(**{**SMALL_UNET, "in_channels": build.CHANNELS, "out_channels": build.CHANNELS,
                                   "cross_attention_dim": text_encoder.config.hidden_size})
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny(**SMALL_AUTOENCODER), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=build.make_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("models") / "random-sd"
    pipeline.save_pretrained(folder)
    return folder


SMALL_AUTOENCODER = dict(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(0, 0, 0, 1),
                         num_decoder_blocks=(1, 0, 0, 0), latent_channels=build.CHANNELS)
# What makes a published architecture small: two levels of UNet, three of autoencoder (factor 4), two layers of text.
SMALL_VAE = dict(block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                 layers_per_block=1, norm_num_groups=8, sample_size=32)
SMALL_TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000, projection_dim=32)
SMALL_UNET = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=8, attention_head_dim=2,
                  cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
SMALL = {
    "sd15": dict(vae=SMALL_VAE, text_encoder=SMALL_TEXT, unet=SMALL_UNET),
    "sd21": dict(vae=SMALL_VAE, text_encoder=SMALL_TEXT, unet=dict(SMALL_UNET, attention_head_dim=(2, 4))),
    "sdxl": dict(vae=SMALL_VAE, text_encoder=SMALL_TEXT, text_encoder_2=dict(SMALL_TEXT, hidden_size=48, projection_dim=24),
                 unet=dict(SMALL_UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                           up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
                           attention_head_dim=(2, 4), cross_attention_dim=80, addition_time_embed_dim=8,
                           projection_class_embeddings_input_dim=72)),                 # 80 = 32 + 48, 72 = 6 x 8 + 24
}


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """{"sd15", "sd21", "sdxl": folder of a pipeline}: each published architecture at a thousandth of its size, random weights."""
    folders = {name: tmp_path_factory.mktemp("small") / name for name in SMALL}
    for name, folder in folders.items():
        architectures.build(name, **SMALL[name]).save_pretrained(folder)
    return folders


@pytest.fixture(params=list(SMALL))
def small(request, small_models):
    """Folder of each of small_models in turn."""
    return small_models[request.param]


def run_two(command, cwd, timeout=300):
    """What torchrun with two processes makes of the same: one group, ranks 0 and 1, and where one fails the other is killed.
    Returns: CompletedProcess, its status the worse of both."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        free.close()
        files = [[Path(folder) / f"{name}-{rank}" for name in ("out", "err")] for rank in range(2)]
        both = [start_python(command, cwd, *files[rank], RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
        while (alive := [process.sentinel for process in both if process.exitcode is None]) and not any(process.exitcode for process in both):
            if not wait(alive, timeout):
                break
        for process in both:
            process.kill()
            process.join()
        texts = ["".join(file.read_text() for file in streams) for streams in zip(*files)]
        return subprocess.CompletedProcess(command, max(abs(process.exitcode) for process in both), *texts)


@pytest.fixture
def run_file(tmp_path):
    """run_file("train.py", "--out", "x") runs a file of the project as a user does, in tmp_path, and run_file("-m", "studies") a module.
    Returns CompletedProcess."""
    def run(*arguments, launcher=(), timeout=300):
        command = [arguments[0] if arguments[0] == "-m" else str(ROOT / arguments[0]), *map(str, arguments[1:])]
        if not launcher:
            return run_python(command, tmp_path, timeout)
        return subprocess.run([*launcher, *command], cwd=tmp_path, capture_output=True, text=True, timeout=timeout)
    return run


class Gaussian:
    """The exact denoiser of data ~ N(mean, std^2 I), as a network under each prediction type. Its probability flow is
    known in closed form: (z - alpha mean) / sqrt(alpha^2 std^2 + sigma^2) is constant along it."""

    def __init__(self, schedule, prediction, mean=0.7, std=0.4):
        self.schedule, self.prediction, self.mean, self.std = schedule, prediction, mean, std

    def __call__(self, z, timestep, **cond):
        alpha, sigma = (v.to(z.dtype)[:, None] for v in self.schedule((timestep.double() + 1) / 1000))
        x = self.mean + alpha * self.std ** 2 * (z - alpha * self.mean) / (alpha ** 2 * self.std ** 2 + sigma ** 2)
        eps = (z - alpha * x) / sigma
        return {"epsilon": eps, "sample": x, "v_prediction": alpha * eps - sigma * x}[self.prediction]

    def flow(self, z, t, t_next):
        """The exact end at t_next of the trajectory through z at t."""
        (a, s), (a_next, s_next) = (self.schedule(torch.tensor(v, dtype=torch.float64)) for v in (t, t_next))
        unit = (z - a * self.mean) / (a ** 2 * self.std ** 2 + s ** 2).sqrt()
        return a_next * self.mean + unit * (a_next ** 2 * self.std ** 2 + s_next ** 2).sqrt()


@pytest.fixture(params=["epsilon", "sample", "v_prediction"])
def gaussian(request, schedule):
    """(denoiser, model): the closed-form Gaussian teacher under the contract, for each prediction type."""
    network = Gaussian(schedule, request.param)
    return network, teacher.Model(network, schedule, request.param)
