"""What runs on CUDA only, or on several processes only, entered on a machine with neither: whole runs on a pretended device (fake_cuda)."""
import contextlib
import json
import socket

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, slow, start_python
from fake_cuda import CudaTensor, fake_cuda
from torch.distributed.tensor import DTensor

import models
import reflow
import sampler
import train
from evaluation import metrics
from models import architectures, load, saved, student
from runtime import checkpoints, cli, processes, progress, updates


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """SD 1.5's architecture at a thousandth of its size."""
    folder = tmp_path_factory.mktemp("models") / "sd15"
    architectures.build("sd15", **SMALL["sd15"]).save_pretrained(folder)
    return folder


def options(model, out, device, **changes):
    return train.Config(**{**dict(model=str(model), data="scenes", out=str(out), windows=[2, 1], updates=4, batch=2, micro_batch=1,
                                  trajectories=4, solver_steps=8, log_steps=1, checkpoint_steps=2, grid_steps=0, device=device), **changes})


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def stopped_after(step, c):
    """A run that dies after this update."""
    real = progress.write_log

    def write_log(file, board, line):
        real(file, board, line)
        if line["step"] == step:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress, "write_log", write_log)
        train.main(c)


@pytest.mark.parametrize("changes", [slow(dict(grid_steps=2, windows=[1])), slow(dict(pairs="student", normalization="learned", precision="bf16")),
                                     slow(dict(pairs="student", lora=2, precision="bf16")),
                                     dict(pairs="consistency", windows=[1], grid_steps=2), dict(pairs="imitation", windows=[4, 2]),
                                     dict(matching=0.1, windows=[2]), slow(dict(matching=0.1, lora=2, windows=[1])),
                                     slow(dict(pairs="flow-map", windows=[2]))],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_a_run_on_cuda_killed_and_resumed_inside_a_stage_gives_the_losses_of_the_cpu(model, tmp_path, monkeypatch, changes):
    """The device of every part is asserted by what fake_cuda refuses, and here of all that a resume restores."""
    train.main(options(model, tmp_path / "cpu", "cpu", **changes))
    restored, real = [], checkpoints.restore

    def restore(*args):
        real(*args)
        restored.append(args)
    monkeypatch.setattr(checkpoints, "restore", restore)
    with fake_cuda():
        stopped_after(3, options(model, tmp_path / "cuda", "cuda", **changes))
        train.main(options(model, tmp_path / "cuda", "cuda", **changes))
        (_, done, network, normalizer, optimizer, ema, _), = restored
        states = checkpoints.states(network, normalizer, optimizer, ema)
        assert done > 0 and states and {*map(str, network.buffers())} == set()
        for name, (p, parts) in states.items():
            moments = {"exp_avg", "exp_avg_sq", "step"}
            beside = name.startswith(("normalizer.", "critic."))
            assert set(parts) == ({"beside", *moments} if beside else {"student", "ema", *moments})
            for part, tensor in parts.items():
                assert isinstance(tensor, CudaTensor) and tensor.dtype == torch.float32, (name, part)
                assert part == "step" and tensor.shape == () or tensor.stride() == p.stride(), (name, part)
        if not changes.get("lora"):
            assert all(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.ndim == 4)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=4e-2 if "precision" in changes else 1e-3)  # bf16 rounds otherwise there


@pytest.mark.parametrize("changes", [slow(dict(grid_steps=2, windows=[1])), slow(dict(pairs="student", normalization="learned")),
                                     slow(dict(pairs="consistency", windows=[1])), dict(windows=[1], time_law="log-normal", matching=0.1)],
                         ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_a_run_on_a_device_without_float64_gives_the_losses_of_the_cpu(model, tmp_path, changes):
    train.main(options(model, tmp_path / "cpu", "cpu", **changes))
    with fake_cuda("mps"):
        train.main(options(model, tmp_path / "mps", "mps", **changes))
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64).to("mps")
    assert losses(tmp_path / "mps") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_a_process_without_a_gpu_of_its_own_is_one_line(monkeypatch):
    def set_device(device):
        raise RuntimeError("CUDA error: invalid device ordinal")
    with fake_cuda():
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(cli.UserError, match="--nproc_per_node: process 2 has no GPU of its own, as the machine has 2; start so many"):
            processes.start_processes(train.Config(device="cuda"))


def test_processes_share_gradients_once_in_an_update(model, tmp_path, monkeypatch):
    """DDP decides in its forward: the loop says which micro-batch is the last before that."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network, shared = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1)), []

        def hook(_, bucket):
            shared.append(bucket.buffer().clone())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done
        network.register_comm_hook(None, hook)
        for i in range(4):
            updates.share_gradients(i == 3, network)
            network(torch.ones(1, 1)).sum().backward()
        assert len(shared) == 1 and shared[0].tolist() == [4, 4]
    finally:
        dist.destroy_process_group()
    events, real = [], reflow.student_loss
    monkeypatch.setattr(updates, "share_gradients", lambda last, *_: events.append(last))
    monkeypatch.setattr(reflow, "student_loss", lambda *args: events.append("forward") or real(*args))
    train.main(options(model, tmp_path, "cpu", windows=[1], updates=2, batch=3))
    assert events == 2 * [False, "forward", False, "forward", True, "forward"]


def test_a_trajectory_is_measured_on_a_device_without_float64_as_on_the_cpu(model):
    values = []
    for device in ("cpu", "mps"):
        with fake_cuda("mps") if device == "mps" else contextlib.nullcontext():
            pipeline, contract, _ = saved.open_model(str(model), device)
            cond = models.encode_text(pipeline, ["fox", "cat"], device=device)
            path = torch.randn(2, 5, *models.latent_shape(pipeline), generator=torch.Generator().manual_seed(0)).to(device)
            values.append([*metrics.straightness(contract, path[:, 0], cond, 2, 2), *metrics.chord_error(contract, path, cond, 4)])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in sampler.SOLVERS if name != "lcm"])           # which draws noise
def test_every_solver_samples_on_a_device_without_float64(model, name):
    latents = []
    for device in ("cpu", "mps"):
        with fake_cuda("mps") if device == "mps" else contextlib.nullcontext():
            pipeline, contract, _ = saved.open_model(str(model), device)
            z = sampler.generate(pipeline, contract, ["fox"], [3], sampler.time_grid(4), solver=sampler.SOLVERS[name])
            latents.append(z.cpu())
    assert torch.allclose(*latents, atol=1e-4)


@pytest.fixture
def one_process(monkeypatch):
    """A process group of one, whose CUDA mesh is on the CPU."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    real = dist.init_device_mesh
    monkeypatch.setattr(dist, "init_device_mesh", lambda device, shape: real("cpu", shape))


@pytest.mark.parametrize("lora", [0, 2])
def test_shards_of_cuda_networks_are_made_of_contiguous_weights_and_stay_shards(model, one_process, lora):
    unet = load.load_pipeline(str(model)).unet
    inputs = torch.randn(2, 8, 8, 8)[:, :unet.config.in_channels], torch.tensor([500.0, 20.0]), torch.randn(2, 5, 32)
    expected = unet(*inputs).sample
    c = train.Config(lora=lora, shard=True)
    frozen = student.FrozenNetwork(c, unet, torch.device("cuda"))
    network = student.make_student(c, unet, torch.device("cuda"))
    for one in (frozen, network):
        with torch.no_grad():
            assert torch.allclose(one(*inputs).sample, expected, atol=1e-5)
        assert all(isinstance(p, DTensor) for p in one.parameters())
    frozen.become(checkpoints.trained(network), c)


def test_sharded_and_whole_runs_agree_with_pictures_and_a_resume_between(model, tmp_path):
    changes = dict(pairs="student", grid_steps=2)
    train.main(options(model, tmp_path / "whole", "cpu", **changes))
    stopped_after(3, options(model, tmp_path / "sharded", "cpu", shard=True, **changes))
    train.main(options(model, tmp_path / "sharded", "cpu", shard=True, **changes))
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_only_the_first_process_keeps_what_is_gathered(one_process):
    """The others hold two whole tensors at most: the one just dropped, and the next."""
    import weakref
    mesh, alive, most = dist.init_device_mesh("cpu", (1,)), [], []
    whole = {str(i): torch.randn(4, 4) for i in range(6)}
    shards = {name: checkpoints.distribute_tensor(value, mesh) for name, value in whole.items()}
    real = DTensor.full_tensor

    def full_tensor(self):
        found = real(self).clone()
        alive.append(weakref.ref(found))
        most.append(sum(ref() is not None for ref in alive))
        return found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", full_tensor)
        assert checkpoints.gather_full(shards, rank=1) == {} and len(most) == 6 and max(most) <= 2
        found = checkpoints.gather_full(shards, rank=0)
    assert all(torch.equal(found[name], value) and type(found[name]) is torch.Tensor for name, value in whole.items())


# ---- a state that is not finite is never kept ----------------------------------------------------------------------


def test_a_stop_on_cuda_waits_for_the_update_it_keeps():
    """The signal of update s is known after s + 1: whether s + 1 was finite is known then as well."""
    with fake_cuda():
        flags = processes.StopFlags(torch.device("cuda"), 1)
        good, bad = torch.zeros((), dtype=torch.bool).to("cuda"), torch.ones((), dtype=torch.bool).to("cuda")
        assert flags(False, good) == [False, False] and flags(True, good) == [False, False]
        assert flags(False, bad) == [True, True] and not flags.pending
        assert flags(False, bad) == [False, False] and flags(False, good, wait=True) == [False, True]


@pytest.mark.parametrize("device, every, kept", [("cpu", 1, ["checkpoint-000001.safetensors"]), ("cpu", 9, []),
                                                 ("cuda", 1, ["checkpoint-000001.safetensors"])])
def test_a_weight_that_is_not_finite_never_becomes_a_checkpoint_or_a_student(model, tmp_path, monkeypatch, device, every, kept):
    """Loss and gradient of the last update are finite, one weight that it leaves is not."""
    real, steps = torch.optim.AdamW.step, []

    def step(self, *args):
        real(self, *args)
        steps.append(self)
        if len(steps) == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].fill_(float("inf"))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with fake_cuda() if device == "cuda" else contextlib.nullcontext(), pytest.raises(cli.UserError, match="is not finite"):
        train.main(options(model, tmp_path, device, windows=[1], updates=2, checkpoint_steps=every))
    assert [file.name for file in tmp_path.glob("checkpoint-*")] == kept and not list(tmp_path.glob("student-*"))


# ---- waiting for one another ---------------------------------------------------------------------------------------


SLOW = """
import datetime, os, sys, time
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
import export, train
from data import captioned
from runtime import checkpoints
real = dist.init_process_group
dist.init_process_group = lambda *args, **options: real(*args, **{{"timeout": datetime.timedelta(seconds={timeout}), **options}})

def slow(owner, name):
    real = getattr(owner, name)
    def wrapper(*args, **options):
        time.sleep({sleep} if os.environ["RANK"] == "0" else 0)
        return real(*args, **options)
    setattr(owner, name, wrapper)
for owner, name in {places}:
    slow(owner, name)
train.main(train.{config!r})
"""


@pytest.mark.parametrize("place", ["captioned, 'open_dataset'", *(pytest.param(place, marks=pytest.mark.slow) for place in
                                                                  ("checkpoints, 'save_file'", "export, 'export'"))])
def test_a_process_that_works_alone_for_longer_than_the_timeout_is_waited_for(model, tmp_path, monkeypatch, place):
    script, timeout = tmp_path / "slow.py", 5
    c = options(model, tmp_path / "out", "cpu", windows=[1], updates=2)
    script.write_text(SLOW.format(root=str(ROOT), timeout=timeout, sleep=timeout + 1, places=f"[({place})]", config=c))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free.getsockname()[1])
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    processes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        processes.append(start_python([str(script)], tmp_path, err=tmp_path / f"err-{rank}"))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "err-1").read_text()[-2000:]
