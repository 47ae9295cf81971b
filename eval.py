"""Measures students against their teacher: python eval.py runs/demo

Everything is generated from the same noise and captions: the teacher in 32 DDIM steps, the untrained student (plain DDIM
in 8, 4, 2, 1 steps), and every student found under the run. Leaves results.json, results.md and grid.png in the run;
safe to interrupt, finished rows are kept.

FD is the Frechet distance between Gaussians fitted to image features of the repository's own small CLIP, against real
images nobody trained on. It is not FID (whose features are Inception's) and compares with no published number.
"""
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

import config
import data
import sampler
import sprites
import teacher
from config import UserError

GRID_PROMPTS = ("red heart on blue", "strawberry on pink", "pizza on gray", "penguin on orange", "fox on green", "animal on yellow", "food",
                "on purple")

# ---- distances -----------------------------------------------------------------------------------------------------


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two pairs (mean, covariance), as moments gives them.
    0 for equal Gaussians. The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2)."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.clamp_min(0).item()                     # rounding can leave -1e-12


def frechet_interval(features, reference, resamples=100):
    """95% interval of the distance of features (N, D) to the moments `reference`, by basic bootstrap over the N images
    (which also corrects the estimator's own upward bias to first order).  Returns: (low, high)."""
    value = frechet_distance(moments(features), reference)
    draws = [frechet_distance(moments(features[torch.randint(len(features), (len(features),), generator=data.generator(0, "bootstrap", i))]),
                              reference) for i in range(resamples)]
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return 2 * value - high, 2 * value - low


class Clip:
    """Image and text features of a CLIPModel folder. images: (N, 3, H, W) in [-1, 1], of the tower's own size."""

    def __init__(self, folder):
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--clip {folder}: no CLIPModel folder there (config.json is missing)")
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def images(self, images, batch=256):
        """(N, D) float32, not normalised."""
        size = self.model.config.vision_config.image_size
        if images.shape[-2:] != (size, size):
            raise UserError(f"images of {tuple(images.shape[-2:])} pixels: this CLIP takes {size} x {size}; give another --clip")
        return torch.cat([self.model.visual_projection(self.model.vision_model(pixel_values=chunk).pooler_output)
                          for chunk in images.split(batch)])

    @torch.no_grad()
    def texts(self, texts):
        """(N, D) float32, not normalised."""
        unique = list(dict.fromkeys(texts))
        tokens = self.tokenizer(unique, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
                                return_tensors="pt").input_ids
        features = self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)
        return features[torch.tensor([unique.index(text) for text in texts])]


def clip_score(image_features, text_features):
    """100 x the mean cosine between each image and its caption. Both (N, D).  Returns: float, in [-100, 100]."""
    return 100 * torch.cosine_similarity(image_features, text_features).mean().item()


# ---- the protocol of the embedded default --------------------------------------------------------------------------


@dataclass
class Config:
    run: str = field(default="", metadata=dict(positional=True))  # folder with student-* folders, at any depth
    n: int = 2048               # images per row
    real: int = 16384           # real images of the reference
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])  # of the students; fewer than its windows are left out
    ddim_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # of the untrained student
    teacher_steps: int = 32     # of the teacher
    guidance: float = 1.0       # of teacher and students alike; 1 = none
    seed: int = 1_000_000       # of the first image
    batch: int = 64             # images generated at a time
    clip: str = str(teacher.ASSETS / "tiny-clip")  # CLIPModel folder: features of FD and CLIP score
    device: str = ""            # cpu or cuda; default: cuda if there is one


def real_images(n, stream):
    """n images and captions of the mix of caption levels, held-out pairs included.  Returns: (images, captions)."""
    generator = data.generator(0, "evaluation", stream)
    plans = sprites.plan(n, generator)
    return torch.cat([sprites.render(chunk) for chunk in plans.split(2048)]), sprites.describe(plans)[0]


def evaluate_row(c, clip, folder, cache, prompts, steps, bar):
    """CLIP features and speed of one model at one step count, from `cache` if it holds this very row.
    Returns: (features (N, D), seconds per image)."""
    pipeline, model, info = sampler.open_model(folder, teacher.pick_device(c.device))
    key = json.dumps([str(folder), file_age(folder), steps, c.n, c.guidance, c.seed, c.clip])
    if cache.is_file():
        with safe_open(cache, "pt") as file:
            if file.metadata()["key"] == key:
                bar.update(c.n)
                return file.get_tensor("features"), float(file.metadata()["seconds"])
    times = sampler.time_grid(steps, info.get("windows", 1))
    features, start = [], time.perf_counter()
    pause = 0.0
    for first in range(0, c.n, 4 * c.batch):
        part = slice(first, min(c.n, first + 4 * c.batch))
        z = sampler.generate(pipeline, model, prompts[part], range(c.seed + part.start, c.seed + part.stop), times, c.guidance,
                             c.batch, progress=bar)
        images = teacher.decode(pipeline, z)
        mark = time.perf_counter()
        features.append(clip.images(images))
        pause += time.perf_counter() - mark
    features, seconds = torch.cat(features), (time.perf_counter() - start - pause) / c.n
    cache.parent.mkdir(parents=True, exist_ok=True)
    data.write_atomically(cache, lambda part: save_file({"features": features}, part, {"key": key, "seconds": str(seconds)}))
    return features, seconds


def file_age(folder):
    """When the model's weights were written: a cached row of an older student is not used."""
    weights = Path(teacher.PRESETS.get(folder, (folder, ""))[0]) / "unet" / "diffusion_pytorch_model.safetensors"
    return weights.stat().st_mtime_ns if weights.is_file() else 0


def main(c):
    run = Path(c.run)
    if not c.run or not run.is_dir():
        raise UserError(f"{c.run or 'no run'}: give the folder that train.py wrote, e.g. python eval.py runs/demo")
    students = sorted(run.rglob("student-*/reflow.json"), key=lambda file: (len(file.parts), -int(file.parent.name.split("-")[1])))
    if not students:
        raise UserError(f"{run}: no finished student in it (student-*/reflow.json); train first: python train.py --out {run}")
    clip = Clip(c.clip)
    enough = 10 * clip.model.config.projection_dim          # fewer images than that do not determine a covariance
    for option, value, least in (("--n", c.n, enough), ("--real", c.real, enough), ("--seed", c.seed, 0), ("--guidance", c.guidance, 0),
                                 ("--batch", c.batch, 1), ("--steps", min(c.steps), 1), ("--ddim-steps", min(c.ddim_steps), 1),
                                 ("--teacher-steps", c.teacher_steps, 1)):
        if value < least:
            raise UserError(f"{option} {value}: must be at least {least}")
    infos = [json.loads(file.read_text()) for file in students]
    names = {info["teacher"] for info in infos}
    if len(names) > 1:
        raise UserError(f"{run}: students of several teachers ({', '.join(sorted(names))}); evaluate their runs one by one")
    teacher_name = names.pop()

    # rows: (method, windows, steps, folder)
    plan = [("teacher", None, c.teacher_steps, teacher_name)]
    plan += [("ddim", None, steps, teacher_name) for steps in c.ddim_steps]
    found = [(info["method"], info["windows"], steps, str(file.parent)) for file, info in zip(students, infos)
             for steps in c.steps if steps >= info["windows"]]
    plan += sorted(found, key=lambda row: row[1] not in (1, row[2]))        # one step per window first; stable otherwise

    _, prompts = real_images(c.n, "prompts")
    reference = moments(clip.images(real_images(c.real, "reference")[0]))
    texts = clip.texts(prompts)
    captioned = torch.tensor([bool(prompt) for prompt in prompts])
    rows, teacher_features = [], None
    with tqdm(total=c.n * len(plan), desc="evaluation", unit="image") as bar:
        for method, windows, steps, folder in plan:
            cache = run / "eval" / f"{method}-{windows or 'x'}w-{steps}.safetensors"
            features, seconds = evaluate_row(c, clip, folder, cache, prompts, steps, bar)
            teacher_features = features if teacher_features is None else teacher_features
            low, high = frechet_interval(features, reference)
            rows.append(dict(method=method, windows=windows, steps=steps, nfe=steps * (1 if c.guidance in (0, 1) else 2),
                             guidance=c.guidance, fd=frechet_distance(moments(features), reference), fd_interval=[low, high],
                             fd_teacher=frechet_distance(moments(features), moments(teacher_features)),
                             clip=clip_score(features[captioned], texts[captioned]), seconds_per_image=seconds))
    half = c.n // 2
    noise = frechet_distance(moments(teacher_features[:half]), moments(teacher_features[half:]))
    protocol = dict(name="tiny", n=c.n, real=c.real, reference="fresh sprite images, all pairs, mix of caption levels",
                    features=f"{Path(c.clip).name}, projected image features", guidance=c.guidance, teacher=teacher_name,
                    solver="DDIM", weights="running average (EMA)", dtype="float32", seeds=[c.seed, c.seed + c.n - 1], batch=c.batch,
                    noise_fd_two_teacher_halves=noise, interval="95%, basic bootstrap over the generated images",
                    seconds_per_image="wall time of text, sampling and decoding at this batch size",
                    commit=infos[0]["commit"], versions=infos[0]["versions"], students=[info["command"] for info in infos])
    result = dict(protocol=protocol, rows=rows)
    data.write_atomically(run / "results.json", lambda part: part.write_text(json.dumps(result, indent=1)))
    text = table(result)
    data.write_atomically(run / "results.md", lambda part: part.write_text(text))
    print(text)
    picture(c, teacher_name, plan, run / "grid.png")
    print(f"{run}/results.json, results.md, grid.png")
    return result


def table(result):
    """results as a Markdown table."""
    protocol, lines = result["protocol"], ["| method | windows | steps | NFE | FD (95%) | FD to teacher | CLIP score | s/image |",
                                           "|---|---|---|---|---|---|---|---|"]
    for r in result["rows"]:
        lines.append(f"| {r['method']} | {r['windows'] or '-'} | {r['steps']} | {r['nfe']} | {r['fd']:.2f} ({r['fd_interval'][0]:.2f} to "
                     f"{r['fd_interval'][1]:.2f}) | {r['fd_teacher']:.2f} | {r['clip']:.1f} | {r['seconds_per_image']:.4f} |")
    return "\n".join(lines) + (
        f"\n\nFD: Frechet distance on {protocol['features']} (not FID); N = {protocol['n']} against {protocol['real']} real images; seeds "
        f"{protocol['seeds'][0]} to {protocol['seeds'][1]}; guidance {protocol['guidance']:g}; {protocol['solver']}; two halves of the "
        f"teacher's samples differ by {protocol['noise_fd_two_teacher_halves']:.2f}. Commit {protocol['commit']}.\n")


def picture(c, teacher_name, plan, file, scale=3):
    """grid.png: the same seeds and prompts down the rows; teacher, plain DDIM and students across."""
    progressive = next((method for method, windows, _, _ in plan if windows and windows > 1), "reflow")
    columns = [row for row in plan if row[0] == "teacher"]
    columns += [row for steps in (4, 2, 1) for row in plan if row[0] == "ddim" and row[2] == steps]
    columns += [row for steps in (4, 2, 1) for row in plan if row[0] == progressive and row[1] == steps == row[2]]
    pictures = []
    for _, _, steps, folder in columns:
        pipeline, model, info = sampler.open_model(folder, teacher.pick_device(c.device))
        z = sampler.generate(pipeline, model, list(GRID_PROMPTS), range(len(GRID_PROMPTS)), sampler.time_grid(steps, info.get("windows", 1)))
        pictures.append(sampler.to_pil(teacher.decode(pipeline, z), scale))
    titles = [f"{method if method != progressive else 'reflow'}\n{steps} step{'s' * (steps > 1)}" for method, _, steps, _ in columns]
    sampler.grid(list(zip(*pictures)), titles, GRID_PROMPTS).save(file)


if __name__ == "__main__":
    config.run(main, Config, __doc__)
