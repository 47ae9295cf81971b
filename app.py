"""A student beside its teacher, from the same noise, on a page: `python app.py`

Above, what is drawn: prompt, models, steps, solver, guidance, seed. Below, of each model, the picture,
the time it took, and what the network predicted the picture to be along its way: where trajectories
are straight, it predicts the same from its first step on. Needs gradio: pip install '.[app]'.
"""
import contextlib
import os
import shlex
import time
import warnings
from dataclasses import dataclass

import torch

import models
import sampler
from data import imaging
from models import load, saved
from runtime import cli, processes
from runtime.cli import UserError
from teacher import DTYPES

SHOWN = 8                       # predictions in a strip, at most
TEACHER_STEPS = 32


@dataclass
class Config:
    model: str = ""             # the student shown first; default: the one in assets/
    dtype: str = "fp32"         # of the networks: fp32, bf16 or fp16
    device: str = ""            # cpu, cuda, mps or xpu; default: cuda if there is one
    port: int = 7860            # of the page, which only this machine can open


def draw(name, opened, prompt, steps, solver, guidance, seed):
    """One picture, as sampler.py draws it. opened: what saved.open_model(name) returned.
    Returns: (picture, x_hat at SHOWN of its steps or all in a row, both PIL; what it took, a line).
    Raises UserError."""
    pipeline, model, info = opened
    windows = info.get("windows", 1)
    if models.prompts(pipeline) and not prompt.strip():    # its line for sampler.py would draw nothing
        raise UserError("no prompt: say what to draw, for instance red heart on blue")
    try:
        times = sampler.time_grid(steps, windows)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    prompt, predicted, start = prompt if models.prompts(pipeline) else "", [], time.perf_counter()
    z = sampler.generate(pipeline, model, [prompt], [seed], times, guidance, solver=solver,
                         callback=lambda state: predicted.append(state["x_hat"].float()))
    image = models.decode(pipeline, z)
    seconds = time.perf_counter() - start

    shown = torch.linspace(0, steps - 1, min(steps, SHOWN)).round().int().tolist()
    decoded = models.decode(pipeline, torch.cat([predicted[i] for i in shown]))
    decoded = torch.cat([decoded, torch.ones(SHOWN - len(shown), *decoded.shape[1:])])      # white: as long
    (picture,), strip = (imaging.to_pil(images, max(1, side // images.shape[-1]))
                         for images, side in ((image, 256), (decoded, 128)))
    count = sampler.evaluations(solver, steps, windows) * (1 if guidance in (0, 1) else 2)
    return (picture, imaging.contact_sheet([strip], [str(i + 1) for i in shown]),
            f"{steps} step{'s' * (steps > 1)}, {count} network evaluation{'s' * (count > 1)}: "
            f"{seconds:.2f} s")


def command(student, prompt, steps, solver, guidance, seed, precision="fp32"):
    """What draws the student's picture again."""
    given = dict(model=student, prompt=prompt, steps=steps, solver=solver, guidance=guidance, seed=seed,
                 dtype=precision)
    default = vars(sampler.Config())
    return shlex.join(["python", "sampler.py", *(word for key, value in given.items() if value != default[key]
                                                 for word in cli.arguments(key, value))])


@contextlib.contextmanager
def warnings_to(show):
    """What is told to the user goes to show(text). Warnings for developers (an event loop of the server
    that is not closed) do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: show(str(message))
        yield


def page(gradio, first, device, precision):
    """The page as gradio's Blocks, nothing opened yet. first: the student it starts with;
    precision: of DTYPES."""
    kept = {}                                              # one student and one teacher, and what made them

    def opened(role, name, about=None):
        """about: reflow.json of the student, for a teacher, which is opened as its run opened it."""
        key = name, saved.read_about(name), about and (about.get("teacher"), saved.settings(about))
        if role not in kept or kept[role][0] != key:
            kept.pop(role, None)                           # first: there may be room for one of them
            kept[role] = key, saved.open_model(name, device, DTYPES[precision], student=about)
        return kept[role][1]

    def goes_with(student):
        """Its teacher, and the steps it was made for."""
        info = saved.read_about(student)
        return info.get("teacher", student), info.get("windows", TEACHER_STEPS)

    def compare(student, teacher, prompt, steps, teacher_steps, solver, guidance, seed):
        seed = seed or 0                                   # an empty field is None
        with warnings_to(gradio.Warning):
            try:
                about = saved.read_about(student)
                for doubt in saved.doubts(student, about, [prompt], steps, guidance):
                    gradio.Warning(doubt)
                # the teacher first: the time that only a first picture takes is lost among its steps
                other = opened("teacher", teacher, about)
                at = saved.teacher_guidance(other[0], about, guidance)
                theirs = draw(teacher, other, prompt, teacher_steps, solver, at, seed)
                ours = draw(student, opened("student", student), prompt, steps, solver, guidance, seed)
            except UserError as error:
                raise gradio.Error(str(error), title="Not drawn") from error
        return *ours, *theirs, command(student, prompt, steps, solver, guidance, seed, precision)

    teacher, windows = goes_with(first)
    with gradio.Blocks(title="Reflow", analytics_enabled=False) as blocks:
        gradio.Markdown("# Reflow: a student beside its teacher\nBoth from the same noise. "
                        "Where a trajectory is straight, one step is as good as many.")
        with gradio.Row(equal_height=True):
            prompt = gradio.Textbox("red heart on blue", label="Prompt", scale=4)
            go = gradio.Button("Draw", variant="primary", scale=1)
        with gradio.Row():
            students = [first, *(os.path.relpath(folder) for folder in saved.students())]
            student = gradio.Dropdown(list(dict.fromkeys(students)), value=first, label="Student",
                                      allow_custom_value=True, min_width=180)
            other = gradio.Dropdown([teacher, *(name for name in load.PRESETS if name != teacher)],
                                    value=teacher, label="Teacher", allow_custom_value=True, min_width=180)
            steps = gradio.Slider(1, 64, windows, step=1, label="Student's steps", min_width=180)
            other_steps = gradio.Slider(1, 64, TEACHER_STEPS, step=1, label="Teacher's steps", min_width=180)
        with gradio.Row():
            solver = gradio.Dropdown(list(sampler.SOLVERS), value="ddim", label="Solver", min_width=180)
            guidance = gradio.Slider(0, 10, 1, step=0.5, label="Guidance (1 = none)", min_width=180)
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=cli.MAX_SEED, min_width=180)
        shown, plain = [], dict(format="png", show_label=False)
        with gradio.Row():
            for name in "Student", "Teacher":
                with gradio.Column(min_width=300):
                    gradio.Markdown(f"### {name}")
                    took = gradio.Markdown(min_height=24)
                    picture = gradio.Image(label=name, buttons=["fullscreen", "download"], **plain)
                    gradio.Markdown("What it predicts the picture to be, at step:")
                    shown += [picture, gradio.Image(label=f"{name}, step by step", buttons=[], **plain), took]
        again = gradio.Code(label="The student's picture again", language="shell", interactive=False, lines=1,
                            show_line_numbers=False, wrap_lines=True)
        inputs = [student, other, prompt, steps, other_steps, solver, guidance, seed]
        student.change(goes_with, student, [other, steps])
        for event in (blocks.load, go.click, prompt.submit):
            event(compare, inputs, [*shown, again])
    return blocks


def main(c):
    gradio = cli.extra("app.py", "gradio", "app")
    device = processes.pick_device(c.device)
    cli.choose("--dtype", c.dtype, DTYPES)
    first = c.model or os.path.relpath(load.ASSETS / "student-2")
    blocks = page(gradio, first, device, c.dtype)
    theme = gradio.themes.Default(font=["system-ui"], font_mono=["monospace"])   # none from the network
    try:
        blocks.launch(server_port=c.port, theme=theme)
    except OSError as error:
        raise UserError(f"--port {c.port}: taken ({error}); give another") from error


def run():
    cli.run(main, Config, __doc__)


if __name__ == "__main__":
    run()
