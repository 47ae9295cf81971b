"""What training and sampling cost, side by side: memory by part, network evaluations per update,
overhead of our own code.

    python -m tools.bench
    python -m tools.bench --model sd15 --random-init --gradient-checkpointing
    python -m tools.bench --model sd15 --random-init --device cuda --batch 8 --precision bf16
    python -m tools.bench --model flux --random-init --layers 2 --lora 16 --precision bf16 --parts training
    python -m tools.bench --parts speed --batch 64

The first takes a minute, on the embedded model; --random-init takes full size without a download;
--device cuda adds MFU and latency; --layers keeps a transformer's width and so many of its blocks, and of
its text encoders' blocks.

Ratios are taken within one run, on whatever machine this is. Every training is the product's own
train.py, in a process of its own, with timers around the network, the optimizer and the average;
what remains is the loop.
"""
import contextlib
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

import models
import reflow
import sampler
import train
from models import architectures, conditions, load
from runtime import checkpoints, cli, processes
from runtime.cli import UserError
from teacher import PRECISIONS

# dense bf16 peak of a device, FLOP/s, from the makers' data sheets
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}

PARTS = ("training", "evaluations", "sampling", "speed")


@dataclass
class Config:
    model: str = "tiny"              # preset, folder, hub id or .safetensors file
    random_init: bool = False        # random weights: nothing is downloaded
    prompt: str = "a lighthouse at dawn"  # what is drawn; a class-conditional model needs the name of one of
                                          # its classes
    parts: list[str] = field(default_factory=lambda: list(PARTS[:3]))  # training, evaluations, sampling and,
                                                                       # where asked for, speed
    layers: int = 0                  # blocks of each kind in a transformer preset and in its text encoders;
                                     # default: all of them
    size: int | None = None          # pixels; default: the model's own
    batch: int = 1                   # samples per update
    updates: int = 4                 # updates of training, spread over the stages 8 4 2 1;
                                     # fewer than 4: one window only
    lora: int = 0                    # rank; 0 = full fine-tuning with EMA
    precision: str = "fp32"          # fp32, bf16 or fp16
    gradient_checkpointing: bool = False  # a forward more per update, for less memory
    compile: bool = False            # torch.compile
    steps: int = 4                   # of sampling
    repeats: int = 5                 # of sampling, alternating with diffusers' own pipeline
    peak_tflops: float = 0.0         # of the GPU, for MFU; default: known for A100, H100, H200, L40S, 4090
    device: str = ""                 # cpu, cuda, mps or xpu; default: cuda if there is one
    out: str = ""                    # also write all figures to this JSON file


# ---- training, in a process of its own ---------------------------------------------------------------------


def measured_training(options, queue):
    """Run train.main(Config(**options)) with timers and counters; put what was found on the
    queue."""
    spent, counts, weights = dict(forward=0.0, backward=0.0, optimizer=0.0), dict(student=0, solver=0), {}
    if layers := options.pop("layers", 0):
        architectures.shorten(options["model"], layers)
    cuda = options["device"] == "cuda"

    def now():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(owner, method, part, count=False):
        plain = getattr(owner, method)

        def wrapper(self, *args, **kwargs):
            if not training:
                return plain(self, *args, **kwargs)
            start = now()
            result = plain(self, *args, **kwargs)
            if count:
                counts["student" if torch.is_grad_enabled() else "solver"] += len(args[0])
            spent[part] += now() - start
            return result
        setattr(owner, method, wrapper)
    training = []
    real_init = torch.optim.AdamW.__init__

    def init(self, *args, **kwargs):  # the optimizer is made when the loop begins: caches are done
        training.append(True)
        real_init(self, *args, **kwargs)
    torch.optim.AdamW.__init__ = init
    for family in models.FAMILIES:
        timed(family.CLASS, "forward", "forward", count=True)
    timed(torch.Tensor, "backward", "backward")
    timed(torch.optim.AdamW, "step", "optimizer")
    timed(EMAModel, "step", "optimizer")
    real_pairs, real_student = train.open_pairs, train.make_student

    def open_pairs(*args):
        *rest, pipeline, pairs = real_pairs(*args)
        gone = pairs.conditions.text_encoders if pairs.conditions else 0
        text = size_of(*models.text_encoders(pipeline)) + gone * models.network(pipeline).dtype.itemsize
        weights.update(text=text, vae=size_of(*models.autoencoder(pipeline)), online=pairs.online,
                       caching=peak_memory(cuda))
        forget_peak(cuda)
        return *rest, pipeline, pairs

    def make_student(c, unet, device, dropout):
        student = real_student(c, unet, device, dropout)
        weights.update(network=size_of(student),
                       trained=sum(p.nbytes for p in checkpoints.trained(student).values()))
        return student
    train.open_pairs, train.make_student = open_pairs, make_student
    train.export_stage = lambda *_: None                    # reads the whole teacher once more, in fp32
    train.plan.check_disk = lambda *_: None                 # nor is there anything else to keep
    if options.get("random_init") and options.get("pairs", "trajectory") == "trajectory":
        # of random weights, a solved trajectory would mean as little, and text; its encoders are loaded
        sampler.ddim = noise_for_trajectories
        conditions.encode, models.join_text = noise_for_text, noise_for_join
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text(options.pop("prompt", Config.prompt))
        if not options.get("data"):
            options["prompts"] = str(prompts)
        train.main(train.Config(**options, out=f"{folder}/run", grid_steps=0, log_steps=1,
                                checkpoint_steps=10 ** 9))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    rates = [line["samples_per_second"] for line in lines]
    loop = sum(options["batch"] / rate for rate in rates)
    queue.put(dict(seconds=loop, updates=len(lines), rates=rates, **spent, evaluations=counts,
                   peak=peak_memory(cuda), weights=weights))


def noise_for_trajectories(model, z, times, cond, guidance, uncond, callback):
    for i in range(len(times) - 1):
        callback(dict(i=i, z=torch.randn_like(z)))
    return torch.randn_like(z)


def noise_for_text(c, pipeline, captions, device="cpu", part=None):
    """In the place of conditions.encode; of one of several encoders, rows of nothing."""
    return noise_rows(pipeline, len(captions)) if part is None else {"row": torch.zeros(len(captions))}


def noise_for_join(pipeline, parts):
    """In the place of models.join_text."""
    return noise_rows(pipeline, len(next(iter(parts.values()))["row"])) if any(parts) else parts.get(None, {})


def noise_rows(pipeline, count):
    network = models.network(pipeline)
    rows = models.family_of(network).meta_condition(network)
    return {name: (torch.randn if value.is_floating_point() else torch.ones)(count, *value.shape[1:],
                                                                             dtype=value.dtype)
            for name, value in rows.items()}


def size_of(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


def peak_memory(cuda):
    """Bytes: the highest this process held since forget_peak, on the GPU or in main memory."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():                                 # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def forget_peak(cuda):
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def run_training(**options):
    """measured_training in a fresh process, forked from one that has only imported us.
    Returns: its figures."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.bench"])
    queue = context.Queue()
    process = context.Process(target=measured_training, args=(options, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"training with {options} ended with status {process.exitcode}; its message is above")
    return queue.get()


def training(c, device):
    """One update of every stage, or more, from cached trajectories: memory by part, and where the
    time goes."""
    found = run_training(model=c.model, prompt=c.prompt, random_init=c.random_init, layers=c.layers,
                         size=c.size, batch=c.batch, updates=c.updates,
                         trajectories=1, windows=[8, 4, 2, 1] if c.updates >= 4 else [1], solver_steps=8,
                         lora=c.lora, text_dropout=0.0,    # costs nothing, and FLUX.1 has no null embedding
                         precision=c.precision, compile=c.compile,
                         gradient_checkpointing=c.gradient_checkpointing, device=device)
    gib, weights = 2 ** 30, found["weights"]
    parts = {"student (before it is trained, the teacher)": weights["network"],
             "gradients": weights["trained"],
             "Adam's two moments": 2 * weights["trained"], "running average": weights["trained"],
             "a second network for the teacher": 0,
             f"text encoders (while caching {weights['text'] / gib:.2f})": 0,
             f"VAE (while caching {weights['vae'] / gib:.2f})": 0}
    parts["activations, libraries and the rest, at the peak"] = found["peak"] - sum(parts.values())
    windows = "8, 4, 2, 1" if c.updates >= 4 else "1"
    print(f"\n## Training {c.model}, {'LoRA ' + str(c.lora) if c.lora else 'every weight'}, {c.precision}, "
          f"{c.size or 'its own'} pixels, batch {c.batch}, {found['updates']} updates over windows "
          f"{windows}\n\n| memory | GiB | share |\n|---|---|---|")
    for name, size in parts.items():
        print(f"| {name} | {size / gib:.2f} | {size / found['peak']:.0%} |")
    where = "on the device" if device == "cuda" else "resident"
    print(f"| peak {where} | {found['peak'] / gib:.2f} | |\n"
          f"| peak before, while caching | {weights['caching'] / gib:.2f} | |")
    inside = found["forward"] + found["backward"] + found["optimizer"]
    print("\n| time per update | s | share |\n|---|---|---|\n" + "\n".join(
        f"| {name} | {value / found['updates']:.4f} | {value / found['seconds']:.1%} |" for name, value in
        (("network, forward", found["forward"]), ("network, backward", found["backward"]),
         ("optimizer and average", found["optimizer"]),
         ("the loop: all the rest", found["seconds"] - inside), ("whole", found["seconds"]))))
    print(f"\nThe loop costs {(found['seconds'] - inside) / (found['forward'] + found['backward']):.1%} of "
          "the network's time.")
    counted = (3 + c.gradient_checkpointing) * c.batch
    forward = found["forward"] / found["evaluations"]["student"]
    found["forward_equivalents"] = found["seconds"] / found["updates"] / forward
    recomputed = ", the recomputation one" * c.gradient_checkpointing
    print(f"Forward-equivalents per update: {counted} counted (a backward is two{recomputed}), "
          f"{found['forward_equivalents']:.1f} by the clock, of {forward:.2f} s.")
    if device == "cuda":
        name = torch.cuda.get_device_name()
        peak = c.peak_tflops * 1e12 or next((value for key, value in PEAK_FLOPS.items() if key in name), 0)
        forwards = 3 + c.gradient_checkpointing
        rate = c.batch * found["updates"] / found["seconds"]
        flops = forward_flops(c) * forwards * rate
        found |= dict(images_per_second=rate, flops_per_second=flops, mfu=flops / peak if peak else None)
        print(f"{rate:.2f} images/s, {flops / 1e12:.1f} TFLOP/s"
              + (f", MFU {flops / peak:.1%} of {name}" if peak else "; give --peak-tflops for MFU"))
    return found


def forward_flops(c):
    """Of one sample through the UNet, counted on shapes alone."""
    known = c.model in architectures.ARCHITECTURES
    pipeline = architectures.build(c.model, weights=False) if known else load.load_pipeline(c.model)
    network = models.network(pipeline).to("meta")
    shape = models.latent_shape(pipeline, c.size)
    predict, cond = models.family_of(network).forward(network), models.family_of(network).meta_condition(
        network)
    with FlopCounterMode(display=False) as counter:
        predict(torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta"), **cond)
    return counter.get_total_flops()


# ---- network evaluations per update ------------------------------------------------------------------------


def evaluations(c, device):
    """Counted on the embedded model, in its own training loop: the count does not depend on the
    size. A unit is one forward of the UNet for one sample; a backward is two, the recomputation of
    checkpointing one."""
    print("\n## Network evaluations per sample and update\n\n"
          "| recipe | windows | solver | student | with checkpointing | made once, for the cache "
          "|\n|---|---|---|---|---|---|")
    rows = {}
    for name, recipe in reflow.RECIPES.items():
        stages, batch = len(recipe.stages), 4
        found = run_training(model="tiny", data="scenes", recipe=name, batch=batch, updates=stages,
                             trajectories=2, device=device)
        solver = found["evaluations"]["solver"] / (batch * stages)
        student = 3 * found["evaluations"]["student"] / (batch * stages)
        cached = recipe.pairs == "trajectory"
        defaults = train.Config()
        once = defaults.trajectories * recipe.solver_steps / (defaults.updates *
                                                              defaults.batch) if cached else 0
        rows[name] = dict(solver=solver, student=student, checkpointing=student / 3, once=once)
        made = f"{once:.2f}" if cached else "-"
        print(f"| {name} | {' '.join(map(str, recipe.stages))} | {solver:.2f} | {student:g} | "
              f"{solver + 4 / 3 * student:.2f} | {made} |")
    print("\nStages get equal updates here; of `matched` the critic counts as the student. Pairs from images "
          "also encode each image once per pair (1.39 UNet forwards on SD 1.5) unless --cache-latents.")
    return rows


# ---- samples per second ------------------------------------------------------------------------------------


def speed(c, device):
    """Samples per second of whole updates, by the clock, of the recipes that make a student of several
    windows. A stage of k windows comes after one of 2k, whose student solves the pairs of `proreflow`; the
    cache is not in it."""
    print(f"\n## Training {c.model}, batch {c.batch}: samples per second, median of {c.updates} updates\n\n"
          "| recipe | 8 windows | 4 | 2 | 1 |\n|---|---|---|---|---|")
    rows = {}
    for name in ("default", "proreflow", "perflow"):
        rows[name] = {}
        for windows in (8, 4, 2, 1):
            stages = [windows] if windows == 8 else [2 * windows, windows]
            found = run_training(model=c.model, data="scenes", recipe=name, windows=stages, batch=c.batch,
                                 updates=(c.updates + 1) * len(stages), trajectories=1, device=device)
            rows[name][windows] = statistics.median(found["rates"][-c.updates:])
        print(f"| {name} | " + " | ".join(f"{rate:.1f}" for rate in rows[name].values()) + " |")
    return rows


# ---- sampling ----------------------------------------------------------------------------------------------


@torch.no_grad()
def sampling(c, device):
    """Our sampler, diffusers' own pipeline, and the bare network: the same model, steps, noise and
    prompt, taken in turn."""
    pipeline = load.load_pipeline(c.model, PRECISIONS[c.precision], c.random_init).to(device)
    model, size = models.as_model(pipeline), c.size
    shape = models.latent_shape(pipeline, size)
    prompts, times = [c.prompt] * c.batch, sampler.time_grid(c.steps)
    pixels = shape[-1] * pipeline.vae_scale_factor
    stock = pipeline
    if "safety_checker" in pipeline.components:
        stock = type(pipeline)(**pipeline.components, requires_safety_checker=False)
    stock = models.family(pipeline).as_student(stock, model.schedule)
    stock.set_progress_bar_config(disable=True)
    noise = sampler.noise(range(c.batch), shape)
    cond = {key: value.to(device)
            for key, value in models.encode_text(pipeline, prompts, size=(pixels, pixels)).items()}
    t = torch.full((c.batch,), 0.5, dtype=torch.float64, device=device)

    def ours():
        models.decode(pipeline, sampler.generate(pipeline, model, prompts, range(c.batch), times, size=size))

    def theirs():
        stock(prompts, num_inference_steps=c.steps, guidance_scale=1.0, output_type="pt",
              latents=noise.to(device, models.network(pipeline).dtype), height=pixels, width=pixels)

    def network():
        for _ in range(c.steps):
            model(noise.to(device), t, cond)
        models.decode(pipeline, noise.to(device))

    def text():
        models.encode_text(pipeline, prompts[:1], size=(pixels, pixels))

    def seconds(call):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    # no pipeline of diffusers takes a class
    calls = (ours, theirs, network, text) if models.prompts(pipeline) == "text" else (ours, network)
    taken = {call.__name__: [] for call in calls}
    for repeat in range(c.repeats + 1):
        for call in calls:
            taken[call.__name__] += [seconds(call)] * (repeat > 0)          # the first round warms up
    middle = {name: statistics.median(values) for name, values in taken.items()}
    print(f"\n## Sampling {c.model}: {c.steps} steps, batch {c.batch}, {c.precision}, median of {c.repeats} "
          "turns (min to max)\n\n| | s | of network and decoding |\n|---|---|---|")
    rows = {"network": f"{c.steps} forwards and decoding", "text": "text alone",
            "ours": "sampler.py, with text", "theirs": "diffusers' pipeline, with text"}
    for name, words in rows.items():
        if name not in middle:
            continue
        ratio = middle[name] / middle["network"]
        print(f"| {words} | {middle[name]:.4f} ({min(taken[name]):.4f} to {max(taken[name]):.4f}) | "
              f"{ratio:.3f} |")
    return taken


def main(c):
    for part in c.parts:
        cli.choose("--parts", part, PARTS)
    device = processes.pick_device(c.device)
    cli.choose("--precision", c.precision, PRECISIONS)
    cli.at_least(c, size=1, batch=1, updates=1, lora=0, layers=0, steps=1, repeats=1, peak_tflops=0)
    run = {"training": training, "evaluations": evaluations, "sampling": sampling, "speed": speed}
    found = {part: run[part](c, device) for part in c.parts}
    if c.out:
        Path(c.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
