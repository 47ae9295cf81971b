"""EDM teachers under the variance-preserving contract: diffusers' own EDM schedulers, a Gaussian's closed form, and on to a student."""
import json

import diffusers
import pytest
import torch
from test_pixel import options, save
from test_train import weights

import reflow
import sampler
import solvers
import teacher
import train
from models import load, saved
from runtime.cli import UserError

SIGMA = dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
KINDS = [("epsilon", 0.5), ("v_prediction", 0.5), ("v_prediction", 1.0)]


def schedule_of(sigma_data=0.5):
    return teacher.EDMSchedule(**{**SIGMA, "sigma_data": sigma_data})


def stock(prediction, sigma_data, kind=diffusers.EDMEulerScheduler):
    return kind(**{**SIGMA, "sigma_data": sigma_data}, prediction_type=prediction)


class Gaussian:
    """The exact F of data ~ N(mean, std^2 I) as an EDM network: asked with c_in (x + s eps) and ln(s) / 4, in float64."""

    def __init__(self, prediction, sigma_data, mean=0.7, std=0.4):
        self.prediction, self.sigma_data, self.mean, self.std = prediction, sigma_data, mean, std

    def __call__(self, scaled, c_noise):
        s = (4 * c_noise.double()).exp()[:, None]
        root = (s ** 2 + self.sigma_data ** 2).sqrt()
        y = scaled.double() * root                         # x + s eps
        x = self.mean + self.std ** 2 / (self.std ** 2 + s ** 2) * (y - self.mean)
        c_out = s * self.sigma_data / root * (-1 if self.prediction == "v_prediction" else 1)
        return ((x - self.sigma_data ** 2 / root ** 2 * y) / c_out).to(scaled.dtype)


def known_times(schedule, n=50):
    return torch.linspace(schedule.floor, 1, n, dtype=torch.float64)


# ---- the clock and the schedule -----------------------------------------------------------------------------------------


def test_the_clock_is_edms_ramp_down_to_sigma_min_then_the_data_and_its_own_inverse():
    schedule, t = schedule_of(), torch.linspace(0, 1, 2001, dtype=torch.float64)
    alpha, sigma = schedule(t)
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones_like(t), atol=1e-15) and (alpha[0], sigma[0]) == (1, 0)
    s = solvers.sigma_karras(schedule, t)
    assert schedule.floor == 0.001 and s[2].item() == pytest.approx(0.002, rel=1e-12) and s[-1].item() == pytest.approx(80, rel=1e-12)
    root = s[2:] ** (1 / 7)
    assert torch.allclose(root.diff(), root.diff()[:1].expand(1998), atol=1e-12)           # even in the seventh root above the floor
    assert s[1].item() == pytest.approx(0.001, rel=1e-12) and (s.diff() > 0).all()         # and linear below
    assert torch.allclose(schedule.time_of(s), t, atol=1e-12)
    assert schedule.time_of(torch.tensor([0, 1e9, torch.inf])).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="outside"):
        schedule(torch.tensor([1.1]))


@pytest.mark.parametrize("windows", [2, 4, 8])
def test_every_window_crosses_noise_that_the_network_knows(windows):
    """None is spent below sigma_min: the last one starts well above it (with a ramp down to 0, that of 4 windows starts at 0.0049)."""
    starts = solvers.sigma_karras(schedule_of(), torch.tensor(reflow.boundaries(windows), dtype=torch.float64))[:-1]
    root = torch.cat([starts, torch.tensor([0.002], dtype=torch.float64)]) ** (1 / 7)
    assert (root.diff() < 0).all() and root.diff().max() / root.diff().min() > 0.98        # all equally long, up to the 1/1000 below the floor
    assert starts[-1] > 10 * 0.002


@pytest.mark.parametrize("changes", [dict(sigma_min=0.0), dict(sigma_min=90.0), dict(sigma_max=float("inf")), dict(sigma_data=0.0)])
def test_levels_that_are_no_ramp_are_refused(changes):
    with pytest.raises(UserError, match="need 0 < sigma_min < sigma_max and sigma_data above 0"):
        teacher.EDMSchedule(**{**SIGMA, **changes})


def test_the_network_is_told_a_quarter_of_the_logarithm_and_nothing_below_sigma_min():
    schedule = schedule_of()
    t = known_times(schedule)
    expected = stock("epsilon", 0.5).precondition_noise(solvers.sigma_karras(schedule, t))
    assert torch.allclose(schedule.timestep(t).double(), expected, atol=1e-6)
    assert torch.equal(schedule.timestep(torch.tensor([0.0, schedule.floor / 2])), schedule.timestep(torch.tensor([schedule.floor] * 2)))


@pytest.mark.parametrize("prediction, sigma_data", KINDS)
def test_output_is_linear_in_the_pair_as_precondition_outputs_says(prediction, sigma_data):
    schedule, generator = schedule_of(sigma_data), torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 50, 7, generator=generator, dtype=torch.float64)
    alpha, sigma = (value[:, None] for value in schedule(known_times(schedule)))
    p, q = schedule.output(prediction, alpha, sigma)
    s = sigma / alpha
    assert torch.allclose(stock(prediction, sigma_data).precondition_outputs(x + s * eps, p * x + q * eps, s), x, atol=1e-9)
    if sigma_data == 1:
        assert torch.allclose(p * x + q * eps, alpha * eps - sigma * x)         # v, as diffusers' DDIM means it


@pytest.mark.parametrize("prediction, sigma_data", KINDS)
def test_x_hat_of_a_gaussian_is_what_diffusers_makes_of_the_same_network(prediction, sigma_data):
    network, schedule = Gaussian(prediction, sigma_data), schedule_of(sigma_data)
    model, t = teacher.Model(network, schedule, prediction), known_times(schedule)
    z = torch.randn(50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_hat, eps_hat = model(z, t, {})
    alpha, sigma = (value[:, None] for value in schedule(t))
    s, theirs = sigma / alpha, stock(prediction, sigma_data)
    output = network(theirs.precondition_inputs(z / alpha, s), theirs.precondition_noise(s[:, 0]))
    assert torch.allclose(x_hat, theirs.precondition_outputs(z / alpha, output, s), atol=1e-5)      # the told time is float32
    assert torch.allclose(alpha * x_hat + sigma * eps_hat, z, atol=1e-12)


@pytest.mark.parametrize("kind", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction, sigma_data", KINDS)
def test_ddim_is_diffusers_euler_in_sigma_on_the_same_times(tmp_path, kind, prediction, sigma_data):
    folder = save(tmp_path / "m", stock(prediction, sigma_data, kind))
    pipeline, model, _ = saved.open_model(str(folder))
    theirs = stock(prediction, sigma_data)
    theirs.set_timesteps(sigmas=torch.tensor([0.0, 0.1, 0.35, 0.6, 0.8, 1.0]), num_inference_steps=6)
    noise = sampler.noise([3, 4], (3, 16, 16))
    y = noise * theirs.init_noise_sigma
    with torch.no_grad():
        for timestep in theirs.timesteps:
            y = theirs.step(pipeline.unet(theirs.scale_model_input(y, timestep), timestep).sample, timestep, y).prev_sample
    times = model.schedule.time_of(theirs.sigmas)
    assert times[0] == 1 and times[-1] == 0
    ours = sampler.generate(pipeline, model, ["", ""], [3, 4], times)
    assert (ours - y).abs().max() <= 1e-4 * y.abs().max()


def test_the_edm_grid_is_diffusers_own():
    schedule, theirs = schedule_of(), stock("epsilon", 0.5)
    theirs.set_timesteps(9)
    found = solvers.sigma_karras(schedule, sampler.time_grid(9 + 1, 1, solvers.edm_grid, schedule))
    assert found[-1] == 0 and len(found) == 11
    theirs.set_timesteps(10)
    assert torch.allclose(found, theirs.sigmas.double(), rtol=1e-5)


def test_ddim_approaches_the_gaussians_flow_and_heun_does_so_faster():
    network = Gaussian("epsilon", 0.5)
    model = teacher.Model(network, schedule_of(), "epsilon")
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = model.schedule(torch.tensor(1.0))
    exact = network.mean + network.std * (z - alpha * network.mean) / (alpha ** 2 * network.std ** 2 + sigma ** 2).sqrt()
    errors = {steps: (sampler.ddim(model, z, sampler.time_grid(steps), {}) - exact).abs().max().item() for steps in (30, 90, 270)}
    assert errors[30] > 2.5 * errors[90] > 6 * errors[270], errors
    heun = solvers.dpm2(model, z, sampler.time_grid(45), {}, r=1.0)
    assert (heun - exact).abs().max() < 0.5 * errors[90]


def test_inversion_starts_at_sigma_min_and_comes_back():
    model = teacher.Model(Gaussian("epsilon", 0.5), schedule_of(), "epsilon")
    z_0 = 0.7 + 0.4 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked, times = [], sampler.time_grid(200)
    z = sampler.invert(model, z_0, times, {}, callback=lambda state: asked.append(state["t"].min().item()))
    assert min(asked) == model.schedule.floor
    assert (sampler.ddim(model, z, times, {}) - z_0).abs().max() < 0.05


# ---- what is refused ------------------------------------------------------------------------------------------------------


def test_what_does_not_go_with_edm_is_refused(tmp_path):
    folder = save(tmp_path / "m", stock("epsilon", 0.5))
    pipeline, model, _ = saved.open_model(str(folder))
    for solver in ("dpmsolver++", "unipc", "lcm"):
        with pytest.raises(UserError, match="needs a table of betas.*EDM's; use ddim"):
            sampler.generate(pipeline, model, [""], [0], sampler.time_grid(2), solver=solver)
    with pytest.raises(UserError, match="prediction type 'sample' of EDMDPMSolver"):
        load.load_pipeline(str(save(tmp_path / "x", stock("sample", 0.5, diffusers.EDMDPMSolverMultistepScheduler))))


def test_a_ddim_pipeline_that_has_lost_its_edm_scheduler_is_refused(tmp_path):
    """DDIMPipeline turns any scheduler into DDIM: sampled on a linear schedule of betas, an EDM network would draw noise, silently."""
    save(tmp_path / "saved", stock("epsilon", 0.5), kind=diffusers.DDIMPipeline)
    folder = save(tmp_path / "named", stock("epsilon", 0.5))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDIMPipeline"}))
    for name in ("saved", "named"):
        with pytest.raises(UserError, match="has put a DDIM scheduler in the place of its EDM scheduler"):
            load.load_pipeline(str(tmp_path / name))


# ---- a student ----------------------------------------------------------------------------------------------------------


def test_a_student_keeps_the_edm_scheduler_and_starts_as_its_teacher(tmp_path):
    folder = save(tmp_path / "m", diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=40.0, sigma_data=0.4, prediction_type="v_prediction"))
    last = train.main(options(folder, tmp_path / "out", lr=1e-12, windows=[2]))
    pipeline, model, info = saved.open_model(str(last))
    assert type(pipeline.scheduler) is diffusers.EDMEulerScheduler and type(pipeline) is diffusers.DDPMPipeline and info["windows"] == 2
    assert (model.schedule.key, model.prediction) == (("edm", 0.01, 40.0, 0.4), "v_prediction")
    card = (last / "README.md").read_text()
    assert "python sampler.py" in card and "DDIM does not apply" in card
    teachers, plain, _ = saved.open_model(str(folder))
    times = sampler.time_grid(4, 2)
    ours, theirs = (sampler.generate(*pair, ["", ""], [0, 1], times) for pair in ((pipeline, model), (teachers, plain)))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_student_of_an_edm_teacher_learns(tmp_path):
    folder = save(tmp_path / "m", stock("epsilon", 0.5))
    last = train.main(options(folder, tmp_path / "out", recipe="reflow", windows=None, updates=60, batch=16, lr=1e-3, trajectories=16, log_steps=5))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert not torch.equal(weights(last)["conv_in.weight"], diffusers.UNet2DModel.from_pretrained(folder / "unet").conv_in.weight)
