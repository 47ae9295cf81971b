"""Reflow of a flow in the plane that is known exactly (noise to four blobs): windows 8, 4, 2, 1 by
a small network, and a picture.

    python -m tools.flow2d           # some 20 seconds; saves reflow-2d.png, asserts what it shows
    python -m tools.flow2d uniform   # the same with times drawn uniformly
    python -m tools.flow2d starts reflow-2d.png 800 1   # of 800 updates a stage, and another seed

With uniform times students of many windows hardly learn (see reflow.starts).
"""
import sys

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler

import reflow
import sampler
import teacher

SCHEDULE = teacher.Schedule(DDIMScheduler(beta_start=0.00085, beta_end=0.012,
                                          beta_schedule="scaled_linear").alphas_cumprod)
ANGLES = torch.arange(4) * torch.pi / 2
BLOBS = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)      # (4, 2)
SPREAD = 0.25                                                   # standard deviation of the data around each


def exact(z, timestep):
    """The optimal v-prediction. z: (B, 2); timestep: (B,).  Returns: (B, 2)."""
    alpha, sigma = (v.to(z)[:, None] for v in SCHEDULE((timestep.double() + 1) / 1000))
    variance = alpha ** 2 * SPREAD ** 2 + sigma ** 2
    nearness = -(z[:, None] - alpha[:, :, None] * BLOBS).square().sum(2) / (2 * variance)
    center = nearness.softmax(1) @ BLOBS
    x = center + alpha * SPREAD ** 2 / variance * (z - alpha * center)
    return (alpha * z - x) / sigma  # v = alpha eps - sigma x, with eps = (z - alpha x) / sigma


class Student(torch.nn.Module):
    """The exact teacher plus a correction that starts at zero: the untrained student is the
    teacher."""

    def __init__(self, width=128):
        super().__init__()
        layers = [torch.nn.Linear(12, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU(),
                  torch.nn.Linear(width, 2)]
        self.net = torch.nn.Sequential(*layers)
        torch.nn.init.zeros_(layers[-1].weight), torch.nn.init.zeros_(layers[-1].bias)

    def forward(self, z, timestep):
        # a window is a sawtooth in t
        phase = timestep[:, None] / 1000 * torch.tensor([1, 2, 4, 8, 16]) * torch.pi
        return exact(z, timestep) + self.net(torch.cat([z, phase.sin(), phase.cos()], 1))


def solve(model, count, windows=8):
    """Trajectories of the exact flow, at the boundaries of 8 windows: (count, 9, 2)."""
    visited = []
    end = sampler.ddim(model, torch.randn(count, 2), sampler.time_grid(32), {},
                       callback=lambda state: visited.append(state["z"]) if state["i"] % (32 // windows) == 0
                       else None)
    return torch.stack([*visited, end], 1)


def straighten(network, windows, trajectories, recipe, updates, callback=None):
    """One stage: train the network (in place) to predict the chord of its windows.
    callback: called with (updates done, model) after each.  Returns: the model."""
    model = teacher.Model(network, SCHEDULE, "v_prediction", windows=windows)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    rows = torch.arange(512)
    for update in range(updates):
        path = trajectories[torch.randint(len(trajectories), (512,))]
        t = reflow.draw_times(recipe, torch.rand(512, dtype=torch.float64), windows, SCHEDULE)
        edges = reflow.window_of(t, windows)
        # row k of a trajectory is at t = 1 - k/8
        ends = [path[rows, ((1 - edge) * 8).round().long()] for edge in edges]
        loss = reflow.student_loss(model, ends, (t, *edges), {}, recipe)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if callback:
            callback(update + 1, model)
    return model


@torch.no_grad()
def fine_path(model, z):
    """The trajectory of 64 DDIM steps: list of (t, z)."""
    path = []
    last = sampler.ddim(model, z, sampler.time_grid(64), {},
                        callback=lambda state: path.append((state["t"], state["z"])))
    return [*path, (torch.zeros(len(z), dtype=torch.float64), last)]


def seen(path):
    """As points of z / (alpha + sigma), where a chord is a straight line to the eye.
    path: of fine_path.  Returns: numpy (times, B, 2)."""
    return torch.stack([z / sum(v.float() for v in SCHEDULE(t))[:, None] for t, z in path]).numpy()


def draw(panels, file):
    """panels: (title, path, where the few steps land) each."""
    _, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.3))
    for axis, (title, path, end) in zip(axes, panels):
        line = seen(path)                                                                   # (65, 40, 2)
        axis.plot(line[..., 0], line[..., 1], color="#0072B2", alpha=0.45, linewidth=1.2)
        axis.plot(*line[0].T, ".", color="#999999", markersize=4)
        axis.plot(*end.T, ".", color="#D55E00", markersize=6)
        axis.set(title=title, xticks=[], yticks=[], xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
    plt.tight_layout()
    plt.savefig(file, dpi=80)
    print(f"{file}: lines in 64 steps, from noise (gray) to where one step per window lands (orange)")


def main(time_law="starts", file="reflow-2d.png", updates=800, seed=0):
    torch.manual_seed(int(seed))
    recipe = reflow.Recipe(time_law=time_law)
    exact_model = teacher.Model(exact, SCHEDULE, "v_prediction")
    train, test = solve(exact_model, 8192), solve(exact_model, 1024)
    network = Student()
    path = fine_path(exact_model, test[:40, 0])
    panels = [("teacher", path, path[-1][1])]
    for windows in (8, 4, 2, 1):
        model = straighten(network, windows, train, recipe, int(updates))
        with torch.no_grad():
            found, plain = (sampler.ddim(m, test[:, 0], sampler.time_grid(windows), {})
                            for m in (model, exact_model))
        reflowed, untrained = ((z - test[:, -1]).norm(dim=1).mean().item() for z in (found, plain))
        print(f"{windows} windows, {windows} steps: distance to the teacher's 32 steps {reflowed:.3f}; plain "
              f"DDIM {untrained:.3f}")
        assert time_law != "starts" or reflowed < untrained
        panels.append((f"student, {windows} window{'s' * (windows > 1)}",
                       fine_path(model, test[:40, 0]), found[:40]))
    draw(panels, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
