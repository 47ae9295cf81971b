"""Flow matching under the contract: the schedule's identities, diffusers' own Euler, a Gaussian's closed form, what is refused."""
import json
import math

import diffusers
import pytest
import torch

import models
import reflow
import sampler
import solvers
import teacher
from models import configs
from runtime.cli import UserError

SHIFTS = [1.0, 3.0, 0.5]


class Gaussian:
    """The exact u of data ~ N(mean, std^2 I) for a flow network told 1000 sigma, in float64."""

    def __init__(self, mean=0.7, std=0.4):
        self.mean, self.std = mean, std

    def __call__(self, z, timestep):
        sigma = timestep.double().view(-1, *[1] * (z.ndim - 1)) / 1000
        alpha = 1 - sigma
        # the score's eps and x, from the joint Gaussian of z = alpha x + sigma eps
        residual = (z.double() - alpha * self.mean) / (alpha ** 2 * self.std ** 2 + sigma ** 2)
        return (sigma * residual - self.mean - alpha * self.std ** 2 * residual).to(z.dtype)

    def flow(self, schedule, z, t, t_next):
        """The exact end at t_next of the trajectory through z at t."""
        (a, s), (a_next, s_next) = (schedule(torch.tensor(v, dtype=torch.float64)) for v in (t, t_next))
        unit = (z - a * self.mean) / (a ** 2 * self.std ** 2 + s ** 2).sqrt()
        return a_next * self.mean + unit * (a_next ** 2 * self.std ** 2 + s_next ** 2).sqrt()


def model_of(network, shift=3.0, **changes):
    return teacher.Model(network, teacher.FlowSchedule(shift), "flow_prediction", **changes)


def wavy(z, timestep):
    """A network of no particular meaning: every step of a sampler changes its answer."""
    return torch.sin(3 * z) + timestep.view(-1, 1).to(z) / 500


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_schedule_is_the_shifted_line_from_data_to_pure_noise_and_its_own_inverse(shift):
    schedule, t = teacher.FlowSchedule(shift), torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = schedule(t)
    assert torch.allclose(alpha + sigma, torch.ones_like(t), atol=1e-15) and (sigma.diff() > 0).all()
    assert (alpha[0], sigma[0], alpha[-1], sigma[-1]) == (1, 0, 0, 1)
    assert torch.allclose(sigma, shift * t / (1 + (shift - 1) * t), atol=1e-15)
    assert torch.allclose(schedule.timestep(t), (1000 * sigma).float())
    assert torch.allclose(schedule.time_of(sigma / alpha), t, atol=1e-12)               # infinity at t = 1 included
    assert schedule.floor == 0.001 and schedule.timesteps is None and schedule.key != teacher.FlowSchedule(shift + 1).key
    with pytest.raises(ValueError, match="outside"):
        schedule(torch.tensor(1.1))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("windows", [1, 2, 4, 7])
def test_windows_even_in_t_are_where_diffusers_evaluates(shift, windows):
    starts = teacher.FlowSchedule(shift).timestep(torch.tensor(reflow.boundaries(windows)[:-1], dtype=torch.float64))
    own = configs.flow_map_euler(shift)
    own.set_timesteps(windows)
    assert torch.allclose(own.timesteps.float(), starts, atol=1e-3)
    given = configs.flow_match_euler(shift)
    given.set_timesteps(sigmas=[k / windows for k in range(windows, 0, -1)], mu=2.0)      # as FLUX's pipeline calls it
    assert torch.allclose(given.timesteps, starts, atol=1e-3)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_chord_of_a_window_is_the_pair_and_its_velocity_the_slope(shift):
    """u = eps - x is (z_start - z_end) / (sigma_s - sigma_e), and the determinant is sigma_e - sigma_s, at t = 1 as well."""
    schedule = teacher.FlowSchedule(shift)
    x, eps = normal(2, 3, seed=1), normal(2, 3, seed=2)
    for start, end in ((1.0, 0.5), (0.5, 0.25), (1.0, 0.0)):
        ends = [schedule(torch.tensor(t, dtype=torch.float64)) for t in (start, end)]
        z = [a * x + s * eps for a, s in ends]
        found = reflow.chord(*z, *ends)
        assert all(torch.allclose(f, e, atol=1e-12) for f, e in zip(found, (x, eps)))
        (a_s, sigma_s), (a_e, sigma_e) = ends
        assert torch.allclose(found[1] - found[0], (z[0] - z[1]) / (sigma_s - sigma_e), atol=1e-12)
        assert a_s * sigma_e - a_e * sigma_s == pytest.approx((sigma_e - sigma_s).item(), abs=1e-15)


def test_output_and_pair_are_the_same_thing_and_pure_noise_is_not_singular():
    schedule, t = teacher.FlowSchedule(3.0), torch.tensor([1.0, 0.6, 0.001], dtype=torch.float64)
    x, eps = normal(3, 5, seed=1), normal(3, 5, seed=2)
    alpha, sigma = (c[:, None] for c in schedule(t))
    p, q = schedule.output("flow_prediction", alpha, sigma)
    assert torch.equal(p * x + q * eps, eps - x)
    z = alpha * x + sigma * eps
    found = teacher.to_pair(p * x + q * eps, z, (p, q), alpha, sigma)
    assert all(torch.allclose(f, e, atol=1e-12) for f, e in zip(found, (x, eps)))
    u, z = normal(1, 5), normal(1, 5, seed=3)
    found = model_of(lambda *_: u)(z, torch.ones(1, dtype=torch.float64), {})
    assert torch.equal(found[1], z) and torch.allclose(found[0], z - u, atol=1e-15)
    p, q = schedule.output("flow_prediction", *schedule(t))
    assert [model.item() for model in (p[0], q[0])] == [-1, 1]


# ---- a sampler's step is Euler's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("windows", [1, 2, 4])
def test_an_untrained_student_of_k_windows_is_diffusers_euler_at_k_steps(shift, windows):
    z, scheduler = normal(2, 3).float(), diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[k / windows for k in range(windows, 0, -1)])
    expected = z
    for timestep in scheduler.timesteps:
        expected = scheduler.step(wavy(expected, timestep.expand(2)), timestep, expected).prev_sample
    found = sampler.ddim(model_of(wavy, shift, windows=windows), z, sampler.time_grid(windows, windows), {})
    assert (found - expected).abs().max() <= 1e-5 and (found - z).abs().max() > 0.1


def test_euler_approaches_the_gaussians_flow_at_first_order_and_inverts():
    network, model, z = Gaussian(), model_of(Gaussian()), normal(64, 2)
    expected = network.flow(model.schedule, z, 1.0, 0.0)
    errors = [(sampler.ddim(model, z, sampler.time_grid(n), {}) - expected).abs().max().item() for n in (32, 64, 128)]
    assert errors[-1] < 0.05 and all(1.7 < before / after < 2.3 for before, after in zip(errors, errors[1:]))
    errors = [(sampler.invert(model, expected, sampler.time_grid(n), {}) - z).abs().max().item() for n in (64, 128)]
    assert errors[-1] < 0.15 and 1.5 < errors[0] / errors[1] < 2.5


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_a_student_that_answers_with_the_chord_has_no_loss_and_crosses_each_window_in_one_step(windows):
    """The chords of the Gaussian's own trajectories, through student_loss and back through the sampler."""
    schedule, gaussian, z = teacher.FlowSchedule(3.0), Gaussian(), normal(16, 2)
    recipe = reflow.RECIPES["reflow"]
    u = torch.linspace(0, 0.999, 16, dtype=torch.float64)
    for law in reflow.TIME_LAWS:
        drawn = reflow.draw_times(reflow.Recipe(time_law=law), u, windows, schedule)
        assert ((drawn > 0) & (drawn <= 1)).all(), law
    t = reflow.draw_times(recipe, u, windows, schedule)
    t_start, t_end = reflow.window_of(t, windows)
    ends = [torch.stack([gaussian.flow(schedule, z[i], 1.0, edge.item()) for i, edge in enumerate(edges)]).float()
            for edges in (t_start, t_end)]

    def exact(given, timestep):
        """The chord that passes through given at this time: x and eps are linear in the unit noise of the trajectory."""
        sigma = timestep.double()[:, None] / 1000
        t = schedule.time_of(sigma / (1 - sigma)).clamp_max(1)
        start, end = (torch.as_tensor(edge, dtype=torch.float64) for edge in reflow.window_of(t - 1e-9, windows))
        (a_s, s_s), (a_e, s_e) = schedule(start), schedule(end)
        k_s, k_e = ((a ** 2 * gaussian.std ** 2 + s ** 2).sqrt() for a, s in ((a_s, s_s), (a_e, s_e)))
        d = a_s * s_e - a_e * s_s
        x_slope, eps_slope = (s_e * k_s - s_s * k_e) / d, (a_s * k_e - a_e * k_s) / d
        unit = (given.double() - (1 - sigma) * gaussian.mean) / ((1 - sigma) * x_slope + sigma * eps_slope)
        return (eps_slope * unit - gaussian.mean - x_slope * unit).float()
    model = model_of(exact, windows=windows)
    values, parts = reflow.student_loss(model, ends, (t, t_start, t_end), {}, recipe)
    assert values.max() <= 1e-6 and parts["z"].std() > 0.1
    found = sampler.ddim(model, z.float(), sampler.time_grid(windows, windows), {})
    assert (found - gaussian.flow(schedule, z, 1.0, 0.0)).abs().max() <= 1e-4
    assert reflow.student_loss(model_of(Gaussian(), windows=windows), ends, (t, t_start, t_end), {}, recipe)[0].max() > 1e-3


def test_solvers_that_divide_by_alpha_say_so_and_grids_without_it_work():
    model, z = model_of(Gaussian()), normal(2, 2)
    for name in ("dpmsolver++", "unipc", "lcm"):
        with pytest.raises(UserError, match=f"solver {name.replace('+', '.')}: needs a table of betas.* a flow's; use ddim"):
            sampler.SOLVERS[name](model, z, sampler.time_grid(4), {})
    for name in ("heun", "dpm2"):
        with pytest.raises(UserError, match="infinite at t = 1.*use ddim"):
            sampler.SOLVERS[name](model, z, sampler.time_grid(4), {})
    with pytest.raises(ValueError, match="infinite at t = 1"):
        sampler.time_grid(4, spacing=solvers.edm_grid, schedule=model.schedule)
    exact = Gaussian().flow(model.schedule, z, 1.0, 0.0)
    assert (sampler.ddim(model, z, sampler.time_grid(64, spacing=solvers.sigmoid_grid), {}) - exact).abs().max() < 0.05


# ---- what a scheduler says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler, shift", [
    (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0), (diffusers.FlowMapEulerDiscreteScheduler(shift=2.0), 2.0),
    (diffusers.FlowMatchHeunDiscreteScheduler(shift=1.5), 1.5),
    (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=4.0, prediction_type="flow_prediction"), 4.0),
    # mu = 0.5 + 0.65 (1024 - 256) / 3840 at 1024 patches
    (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), math.exp(0.63)),
    (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"), 0.63)],
    ids=["euler", "map", "heun", "dpm-solver", "dynamic", "dynamic linear"])
def test_every_flow_scheduler_says_its_shift(scheduler, shift):
    schedule, prediction = configs.read_schedule(scheduler, lambda: 1024)
    assert schedule.shift == pytest.approx(shift) and prediction == "flow_prediction"


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_diffusers_own(kind):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    schedule, _ = configs.read_schedule(scheduler, lambda: 1024)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.63)
    assert torch.allclose(schedule(torch.tensor([1.0, 0.75, 0.5, 0.25]))[1].float(), scheduler.sigmas[:-1], atol=1e-6)


@pytest.mark.parametrize("scheduler, message", [
    (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas of its flow scheduler is True"),
    (diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), "num_train_timesteps of its flow scheduler is 100"),
    (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "prediction type 'epsilon' of its DPMSolverMultistepScheduler with flow sigmas"),
    (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "'flow_prediction' is not one of: epsilon, sample, v_prediction"),
    (diffusers.FlowMatchEulerDiscreteScheduler(shift=-1.0), "a flow scheduler with shift -1.0: must be above 0"),
    (diffusers.AmusedScheduler(mask_token_id=1), "AmusedScheduler has neither a schedule of betas nor a flow's shift")])
def test_a_flow_scheduler_that_means_something_else_is_refused(scheduler, message):
    with pytest.raises(UserError, match=message):
        configs.read_schedule(scheduler)


def test_a_family_that_is_not_known_is_named_with_the_ones_that_are():
    pipeline = type("Mine", (), dict(components=dict(prior=torch.nn.Linear(1, 1), scheduler=None)))()
    with pytest.raises(UserError, match="Mine is of no family that we know .*UNet2DConditionModel.*SD3Transformer2DModel.*it has prior Linear"):
        models.family(pipeline)
    assert json.dumps(teacher.FlowSchedule(3.0).key)                                     # a cache is known by it
