"""Identities of sampler.py's grids and solvers: closed forms, convergence orders, diffusers' own pipelines."""
import functools
import inspect
import itertools
import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import slow
from PIL import Image

import models
import reflow
import sampler
import solvers
import teacher
from data import imaging
from models import load, saved
from runtime import cli

ORDERS = {"ddim": 1, "heun": 2, "dpm2": 2, **{f"dpm2, r = {r}": 2 for r in (0.2, 0.7)}}
OURS = {name: functools.partial(solvers.dpm2, r=float(name.split()[-1])) if "=" in name else sampler.SOLVERS[name] for name in ORDERS}
STOCK = {"dpmsolver++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler, "lcm": diffusers.LCMScheduler}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "edm"])
@pytest.mark.parametrize("spacing", sampler.GRIDS)
@pytest.mark.parametrize("windows, steps", [(1, 1), (1, 2), (1, 9), (2, 2), (2, 7), (3, 5), (4, 8), (8, 8), (4, 40), (1000, 2500)])
def test_every_grid_falls_from_1_to_0_and_meets_every_boundary(schedule, kind, spacing, windows, steps):
    """Also where the last window lies at or below the lowest noise that the network knows."""
    schedule = schedule if kind == "sd" else teacher.EDMSchedule(0.002, 80.0, 0.5)
    times = sampler.time_grid(steps, windows, sampler.GRIDS[spacing], schedule)
    assert times.shape == (steps + 1,) and times.dtype == torch.float64 and times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all() and set(reflow.boundaries(windows)) <= set(times.tolist())
    edges = reflow.boundaries(windows)
    counts = [((times <= start) & (times > end)).sum().item() for start, end in zip(edges, edges[1:])]
    assert sorted(counts, reverse=True) == counts and max(counts) - min(counts) <= 1     # the remainder goes to the noisiest


def test_one_step_per_window_is_the_boundaries_whatever_the_spacing(schedule):
    for spacing in sampler.GRIDS.values():
        assert sampler.time_grid(4, 4, spacing, schedule).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_sigmoid_grid_is_its_closed_form_symmetric_and_uniform_in_the_limit():
    u = torch.linspace(0, 1, 6, dtype=torch.float64)
    rise = {5: [0, 0.126, 0.356, 0.644, 0.874, 1], 10: [0, 0.041, 0.266, 0.734, 0.959, 1], 20: [0, 0.002, 0.119, 0.881, 0.998, 1]}
    for kappa, expected in rise.items():
        times = solvers.sigmoid_grid(u, 1.0, 0.0, None, kappa)
        assert torch.allclose(1 - times, torch.tensor(expected, dtype=torch.float64), atol=5e-4)
        assert torch.allclose(times + times.flip(0), torch.ones(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(solvers.sigmoid_grid(u, 0.5, 0.25, None, 1e-3), 0.5 - 0.25 * u, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_edm_grid_is_diffusers_karras_sigmas(schedule, steps):
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    found = solvers.sigma_karras(schedule, sampler.time_grid(steps, 1, solvers.edm_grid, schedule))
    assert torch.allclose(found, scheduler.sigmas.double(), rtol=1e-4)


def test_edm_grid_inside_a_window_is_even_in_the_seventh_root(schedule):
    times = solvers.edm_grid(torch.linspace(0, 1, 5, dtype=torch.float64), 0.75, 0.5, schedule)
    root = solvers.sigma_karras(schedule, times) ** (1 / 7)
    assert times[0] == pytest.approx(0.75, abs=1e-12) and times[-1] == pytest.approx(0.5, abs=1e-12)
    assert torch.allclose(root.diff(), root.diff()[:1].expand(4), atol=1e-10)


def test_time_of_inverts_sigma_karras_also_between_timesteps(schedule):
    t = torch.linspace(0, 1, 3000, dtype=torch.float64).reshape(3, -1)
    assert torch.allclose(schedule.time_of(solvers.sigma_karras(schedule, t)), t, atol=1e-10)
    assert schedule.time_of(torch.tensor([1e9, torch.inf])).tolist() == [1, 1]


def test_grids_that_cannot_be_are_refused(schedule):
    u = torch.linspace(0, 1, 3, dtype=torch.float64)
    for kappa in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="kappa = .*above 0"):
            solvers.sigmoid_grid(u, 1, 0, schedule, kappa)
    with pytest.raises(ValueError, match="5 steps: some lie closer"):
        sampler.time_grid(5, 1, functools.partial(solvers.sigmoid_grid, kappa=500))
    with pytest.raises(ValueError, match="infinite at t = 1"):
        sampler.time_grid(5, 1, solvers.edm_grid, zero_terminal_snr())
    with pytest.raises(ValueError, match="1 steps cannot cross 2 windows"):
        sampler.time_grid(1, 2, solvers.edm_grid, schedule)


def zero_terminal_snr():
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    return teacher.Schedule(scheduler.alphas_cumprod)


# ---- our own solvers -----------------------------------------------------------------------------------------------


def test_all_solvers_have_one_signature():
    expected = list(inspect.signature(sampler.ddim).parameters)
    for name, solver in sampler.SOLVERS.items():
        assert list(inspect.signature(solver).parameters)[:len(expected)] == expected, name


@pytest.mark.parametrize("solver", sampler.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_point_mass_data_is_hit_exactly_in_any_number_of_steps(gaussian, solver, steps):
    network, model = gaussian
    network.mean, network.std = -1.3, 0.0
    end = sampler.SOLVERS[solver](model, normal(4, 3), sampler.time_grid(steps), {}, generators=sampler.generators(range(4)))
    # our own are exact; diffusers' compute in float32, and lcm keeps a share c_skip of 1e-9 of the noise, 1e-7 at low t
    assert (end + 1.3).abs().max() < (1e-9 if solver in OURS else 2e-6)


@pytest.mark.parametrize("spacing", sampler.GRIDS)
@pytest.mark.parametrize("solver", OURS)
def test_gaussian_data_is_reached_at_the_solvers_order(gaussian, schedule, solver, spacing):
    """Down to t = 0.2, where no step is the last one: error / 2^order when steps double."""
    network, model = gaussian
    z, errors = normal(16, 3), []
    for steps in (40, 80):
        times = sampler.GRIDS[spacing](torch.linspace(0, 1, steps + 1, dtype=torch.float64), 1.0, 0.2, schedule)
        errors.append((OURS[solver](model, z, times, {}) - network.flow(z, 1.0, 0.2)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2 ** ORDERS[solver], rel=0.15), errors


def test_second_order_pays_at_equal_cost_down_to_clean_data_on_the_edm_grid_only(gaussian, schedule):
    """The last step is DDIM in all: from t = 0.05, where the uniform grid of 20 steps leaves it, that is most of the error."""
    network, model = gaussian
    z, errors = normal(16, 3), {}
    for spacing in (solvers.edm_grid, sampler.uniform_grid):
        for name, steps in (("ddim", 39), ("heun", 20), ("dpm2", 20)):
            end = sampler.SOLVERS[name](model, z, sampler.time_grid(steps, 1, spacing, schedule), {})
            errors[spacing.__name__, name] = (end - network.flow(z, 1.0, 0.0)).abs().max().item()
    for name in ("heun", "dpm2"):
        assert errors["edm_grid", name] < 0.5 * errors["edm_grid", "ddim"], errors
        assert errors["uniform_grid", name] > errors["uniform_grid", "ddim"] > errors["edm_grid", "ddim"], errors


def test_heun_is_the_trapezoid_in_sigma_karras_and_dpm2_its_published_formula(gaussian, schedule):
    network, model = gaussian
    z, (t, t_next), r = normal(5, 3), (0.9, 0.6), 0.3
    (a, b), (a_next, b_next) = (schedule(torch.tensor(time, dtype=torch.float64)) for time in (t, t_next))
    sigma, sigma_next = b / a, b_next / a_next
    times = torch.tensor([t, t_next], dtype=torch.float64)

    def eps(x, s):
        where = schedule.time_of(s).expand(5)
        return model(x / (1 + s * s).sqrt(), where, {})[1]
    first = eps(z / a, sigma)
    second = eps(z / a + (sigma_next - sigma) * first, sigma_next)
    heun = a_next * (z / a + (sigma_next - sigma) * (first + second) / 2)
    assert torch.allclose(sampler.SOLVERS["heun"](model, z, times, {}), heun, atol=1e-6)
    sigma_m = sigma ** (1 - r) * sigma_next ** r
    middle = eps(z / a + (sigma_m - sigma) * first, sigma_m)
    dpm2 = a_next * (z / a + (sigma_next - sigma) * ((1 - 1 / (2 * r)) * first + middle / (2 * r)))
    assert torch.allclose(solvers.dpm2(model, z, times, {}, r=r), dpm2, atol=1e-6)
    assert (heun - dpm2).abs().max() > 1e-3


@pytest.mark.parametrize("windows", [1, 2, 4])
@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_evaluations_are_what_they_are_said_to_be(schedule, solver, windows):
    for steps in (windows, 2 * windows, 4 * windows):
        asked = []
        model = teacher.Model(lambda z, timestep: asked.append(timestep[0].item()) or 0.1 * z, schedule, windows=windows)
        sampler.SOLVERS[solver](model, normal(2, 3), sampler.time_grid(steps, windows), {}, generators=sampler.generators(range(2)))
        assert len(asked) == sampler.evaluations(solver, steps, windows)
        assert sampler.steps_for(solver, len(asked), windows) == steps
        assert min(asked) >= 0 and asked[0] == 999


def test_evaluations_that_no_number_of_steps_costs_are_refused():
    assert sampler.steps_for("heun", 9) == 5 and sampler.steps_for("ddim", 9) == 9 and sampler.steps_for("dpm2", 4, 2) == 3
    for arguments, possible in ((("heun", 8), "1, 3, 5"), (("dpm2", 5, 2), "2, 4, 6"), (("ddim", 1, 2), "2, 3, 4"),
                                (("heun", 0), "1, 3, 5")):
        with pytest.raises(ValueError, match=f"{arguments[1]} network evaluations: {arguments[0]} takes {possible}, ..."):
            sampler.steps_for(*arguments)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm2"])
def test_any_number_of_steps_per_window_is_exact_once_the_chord_is_known(gaussian, solver):
    """A student that answers with the chords of the exact flow lands on its boundaries: this is what 'straight over the window' means.
    At a boundary the network speaks for the next window: a solver that asked it there to finish this one would miss."""
    network, model = gaussian
    for path in (None, reflow.vp_path) if solver == "dpm2" else (None, *reflow.PATHS.values()):
        for windows in (1, 2, 4, 8):
            z = normal(3, 2, seed=windows)
            exact = [network.flow(z, 1.0, t) for t in reflow.boundaries(windows)]
            known = teacher.Model(None, model.schedule, path=path, windows=windows)

            class Chord:
                windows, schedule, coefficients = known.windows, known.schedule, known.coefficients

                def __call__(self, z, t, cond, guidance, uncond):
                    t_start, t_end = reflow.window_of(t, windows)
                    i = round((1 - t_start[0].item()) * windows)
                    ends = [[v[:, None] for v in model.schedule(time)] for time in (t_start, t_end)]
                    return reflow.chord(exact[i], exact[i + 1], *ends)
            for per_window in (1, 2, 5):
                end = sampler.SOLVERS[solver](Chord(), z, sampler.time_grid(windows * per_window, windows), {})
                assert torch.allclose(end, exact[-1], atol=1e-9)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm2"])
def test_a_column_of_times_per_sample_is_each_sample_alone(gaussian, solver):
    """Also where one sample's step is its last and another's is not. Batch equal to width, which would hide a broadcast."""
    network, model = gaussian
    z = normal(3, 3)
    times = torch.tensor([[1, 0.6, 0.2], [1, 0.5, 0], [0.4, 0.2, 0]], dtype=torch.float64).T
    together = sampler.SOLVERS[solver](model, z, times, {})
    for i in range(3):
        assert torch.allclose(together[i:i + 1], sampler.SOLVERS[solver](model, z[i:i + 1], times[:, i], {}), atol=1e-7)


def test_the_callback_sees_every_step_once(gaussian):
    network, model = gaussian
    for name, solver in sampler.SOLVERS.items():
        states = []
        end = solver(model, normal(2, 3), sampler.time_grid(4), {}, callback=states.append, generators=sampler.generators(range(2)))
        assert [state["i"] for state in states] == [0, 1, 2, 3] and states[-1]["t_next"].tolist() == [0, 0]
        assert all(set(state) == {"i", "t", "t_next", "z", "x_hat", "eps_hat"} and state["t"].shape == (2,) for state in states)
        assert torch.allclose(end, states[-1]["x_hat"], atol=1e-6), name                # the last step jumps to the belief


def test_guidance_reaches_both_evaluations(schedule):
    model = teacher.Model(lambda z, timestep, c: c * z, schedule)
    cond, uncond = {"c": torch.full((2, 1), 0.3).double()}, {"c": torch.full((2, 1), 0.1).double()}
    for name, solver in sampler.SOLVERS.items():
        def solve(*conditions, solver=solver):
            return solver(model, normal(2, 3), sampler.time_grid(4), *conditions, generators=sampler.generators(range(2)))
        combined = solve({"c": torch.full((2, 1), 0.5).double()})                      # 0.1 + 2 (0.3 - 0.1)
        assert torch.allclose(solve(cond, 2.0, uncond), combined, atol=1e-5), name


def test_what_a_solver_cannot_do_is_refused(schedule):
    network = torch.zeros_like
    plain = teacher.Model(lambda z, timestep: network(z), schedule)
    z = normal(2, 3)
    for r in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="r = .*above 0 and at most 1"):
            solvers.dpm2(plain, z, sampler.time_grid(2), {}, r=r)
    infinite = teacher.Model(plain.network, zero_terminal_snr(), "v_prediction")
    with pytest.raises(cli.UserError, match="infinite at t = 1"):
        solvers.dpm2(infinite, z, sampler.time_grid(2), {})
    for name in STOCK:
        for times in (sampler.time_grid(5, 2), sampler.time_grid(4, 1, solvers.sigmoid_grid), sampler.time_grid(4)[:, None].expand(-1, 2)):
            with pytest.raises(cli.UserError, match=f"solver {name.replace('+', '.')}: has its own times"):
                sampler.SOLVERS[name](plain, z, times, {}, generators=sampler.generators(range(2)))
    with pytest.raises(cli.UserError, match="solver lcm: cannot make 51 steps"):
        sampler.SOLVERS["lcm"](plain, z, sampler.time_grid(51), {}, generators=sampler.generators(range(2)))
    with pytest.raises(ValueError, match="give 2 generators"):
        sampler.SOLVERS["lcm"](plain, z, sampler.time_grid(2), {})
    off = teacher.Model(plain.network, schedule, path=reflow.linear_path, windows=2)
    for name in ("dpm2", "dpmsolver++", "unipc"):
        sampler.SOLVERS[name](off, z, sampler.time_grid(2, 2), {})                     # at boundaries every path is on the schedule
        with pytest.raises(cli.UserError, match="leaves the noise schedule"):
            sampler.SOLVERS[name](off, z, sampler.time_grid(4, 2), {})


# ---- guidance by a weaker model ------------------------------------------------------------------------------------


def linear_model(schedule, factor, prediction="epsilon", asked=None, **path):
    """A network that answers c z, c of its conditioning and its own factor; notes in asked that it was."""
    def network(z, timestep, c):
        if asked is not None:
            asked.append(factor)
        return factor * c * z
    return teacher.Model(network, schedule, prediction, **path)


@pytest.mark.parametrize("prediction", list(teacher.PREDICTIONS))
@pytest.mark.parametrize("path", [None, reflow.linear_path])
def test_a_guided_pair_is_the_line_through_the_two_answers_and_still_makes_z(schedule, prediction, path):
    """The guide predicts something else, and without text there is no answer. Batch equal to width, which would hide a broadcast."""
    model, guide = (linear_model(schedule, *about, path=path, windows=2) for about in ((0.3, prediction), (0.1, "v_prediction")))
    both, z, t = teacher.guided(model, guide), normal(3, 3), torch.tensor([1, 0.7, 0.2], dtype=torch.float64)
    cond, uncond = {"c": torch.full((3, 1), 1.0).double()}, {"c": torch.full((3, 1), float("nan")).double()}
    strong, weak = model(z, t, cond), guide(z, t, cond)
    a, b = both.coefficients(t, 2)
    for w in (0, 0.5, 1, 2, 7.5):
        found = both(z, t, cond, w, uncond)
        for one, s, k in zip(found, strong, weak):
            assert torch.allclose(one, (1 - w) * k + w * s, atol=1e-11)
        assert torch.allclose(a * found[0] + b * found[1], z, atol=1e-9)
    for w, alone in ((1, strong), (0, weak)):
        assert all(torch.equal(one, other) for one, other in zip(both(z, t, cond, w), alone))
    for w in (0, 1, 3.0):
        itself = teacher.guided(model, model)(z, t, cond, w)
        assert all(torch.allclose(one, s, atol=1e-11) for one, s in zip(itself, strong))


@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_models_linear_in_their_weights_are_guided_as_one_with_the_weights_on_their_line(schedule, solver):
    asked, cond = [], {"c": torch.full((2, 1), 1.0).double()}
    both = teacher.guided(linear_model(schedule, 0.3, asked=asked, windows=2), linear_model(schedule, 0.1, asked=asked, windows=4))
    assert both.windows == 2 and isinstance(both, teacher.Model)

    def solve(model, w):
        return sampler.SOLVERS[solver](model, normal(2, 3), sampler.time_grid(4), cond, w, None, generators=sampler.generators(range(2)))
    guided = solve(both, 2.0)
    counts = [asked.count(factor) for factor in (0.3, 0.1)]
    assert counts == [sampler.evaluations(solver, 4, 2)] * 2                          # two networks per evaluation
    one = solve(linear_model(schedule, 0.5, windows=2), 1.0)                          # 0.1 + 2 (0.3 - 0.1)
    assert torch.allclose(guided, one, atol=1e-5)
    asked.clear()
    for w, factor in ((1, 0.3), (0, 0.1)):
        solve(both, w)
        assert set(asked) == {factor}
        asked.clear()


def test_a_guide_that_is_asked_about_another_z_is_refused(schedule):
    def plain(schedule=schedule, **path):
        return linear_model(schedule, 0.1, "v_prediction", **path)
    other = teacher.Schedule(diffusers.DDIMScheduler().alphas_cumprod)
    for model, guide in ((plain(), plain(zero_terminal_snr())), (plain(), plain(other)), (plain(), plain(path=reflow.linear_path)),
                         (plain(path=reflow.linear_path, windows=2), plain(windows=2)),
                         (plain(path=reflow.linear_path, windows=2), plain(path=reflow.linear_path, windows=4))):
        with pytest.raises(cli.UserError, match="its noise schedule or path is not the model's"):
            teacher.guided(model, guide)
    for model, guide in ((plain(windows=2), plain(path=reflow.vp_path, windows=8)),
                         (plain(path=reflow.linear_path, windows=2), plain(path=reflow.linear_path, windows=2))):
        assert teacher.guided(model, guide).guide is guide


@pytest.fixture(scope="module")
def weaker(random_sd, tmp_path_factory):
    """A folder like random_sd, its UNet other random weights, and a reflow.json of 4 windows."""
    folder = shutil.copytree(random_sd, tmp_path_factory.mktemp("weaker") / "student-4")
    torch.manual_seed(1)
    diffusers.UNet2DConditionModel.from_config(diffusers.UNet2DConditionModel.load_config(folder / "unet")).save_pretrained(folder / "unet")
    (folder / "reflow.json").write_text(json.dumps(dict(windows=4, path="vp")))
    return folder


def test_the_command_line_guides_by_a_folder(random_sd, weaker, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = dict(model=str(random_sd), prompt=["fox"], out="a.png", scale=1, steps=2, guidance=1.5)
    sampler.main(sampler.Config(**options, guide=str(weaker)))
    assert f"by {random_sd} guided by {weaker}, 2 steps = 4 network evaluations" in capsys.readouterr().out
    (pipeline, model, _), (_, guide, _) = map(saved.open_model, map(str, (random_sd, weaker)))
    z, cond = sampler.noise([0], models.latent_shape(pipeline)), models.encode_text(pipeline, ["fox"])
    for t, t_next in ((1.0, 0.5), (0.5, 0.0)):
        (x, eps), (x_weak, eps_weak) = (each(z, torch.tensor([t], dtype=torch.float64), cond) for each in (model, guide))
        a, b = (v.float() for v in model.schedule(torch.tensor(t_next, dtype=torch.float64)))
        z = a * (1.5 * x - 0.5 * x_weak) + b * (1.5 * eps - 0.5 * eps_weak)
    found, expected = np.asarray(Image.open("a.png")), np.asarray(imaging.to_pil(models.decode(pipeline, z))[0])
    assert np.abs(found.astype(int) - expected).max() <= 1
    sampler.main(sampler.Config(**options, guide=str(weaker), compare=True))
    sampler.main(sampler.Config(**options | dict(guidance=0.0, out="b.png"), guide=str(weaker)))
    sampler.main(sampler.Config(**options | dict(guidance=1.0, model=str(weaker), out="c.png", steps=4)))
    assert "2 steps = 2 network" in capsys.readouterr().out


def test_beside_a_student_the_teacher_is_called_at_the_guidance_that_it_has_learned(random_sd, tmp_path, monkeypatch):
    student, called = shutil.copytree(random_sd, tmp_path / "student-2"), []
    (student / "reflow.json").write_text(json.dumps(dict(teacher=str(random_sd), windows=2, path="vp", config=dict(guidance_teacher=4.0))))
    real = sampler.generate

    def generate(pipeline, model, prompts, seeds, times, guidance=1.0, *args, **options):
        called.append((len(times) - 1, guidance))
        return real(pipeline, model, prompts, seeds, times, guidance, *args, **options)
    monkeypatch.setattr(sampler, "generate", generate)
    sampler.main(sampler.Config(["fox"], str(student), out=str(tmp_path / "a.png"), compare=True))
    assert called == [(2, 1.0), (32, 4.0), (2, 4.0)]


def test_a_guide_that_does_not_go_with_the_model_is_one_line(random_sd, weaker, small_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = load.load_pipeline(str(weaker), torch.float16)                          # stored with fewer digits: still the same encoder
    half.save_pretrained(tmp_path / "half")
    linear = shutil.copytree(weaker, tmp_path / "linear")
    (linear / "reflow.json").write_text(json.dumps(dict(windows=4, path="linear")))
    broken = shutil.copytree(weaker, tmp_path / "broken")
    (broken / "reflow.json").write_text("{")
    foreign = load.load_pipeline(str(weaker))
    next(foreign.text_encoder.parameters()).data[0, 0] += 1
    foreign.save_pretrained(tmp_path / "foreign")
    options = dict(model=str(random_sd), prompt=["fox"], out="a.png", scale=1, steps=1, guidance=2.0)
    for given, message in ((dict(guide="nowhere"), "--guide nowhere: no diffusers pipeline there"),
                           (dict(guide=str(weaker), guidance=1.0), "--guide .*student-4: not used at --guidance 1; give another"),
                           (dict(guide="broken"), "--guide broken: broken/reflow.json: broken"),
                           (dict(guide="linear"), "--guide linear: its noise schedule or path is not the model's"),
                           (dict(guide="foreign"), "--guide foreign: its text_encoder is not the model's"),
                           (dict(guide=str(small_models["sd15"])), r"--guide .*sd15: its latents are \(4, 8, 8\), the model's \(")):
        with pytest.raises(cli.UserError, match=message):
            sampler.main(sampler.Config(**options | given))
    assert not (tmp_path / "a.png").exists()
    sampler.main(sampler.Config(**options, guide="half"))
    assert (tmp_path / "a.png").exists()


# ---- inversion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", sampler.GRIDS)
def test_inversion_finds_the_noise_and_comes_back_the_closer_the_more_steps(gaussian, schedule, spacing):
    """From clean data of t = 0 itself; only its first and last steps know less than the exact flow (timestep 0 for t = 0)."""
    network, model = gaussian
    z_0 = network.mean + network.std * normal(16, 3)
    noise, back = [], []
    for steps in (20, 80, 160):
        times = sampler.time_grid(steps, 1, sampler.GRIDS[spacing], schedule)
        z = sampler.invert(model, z_0, times, {})
        noise.append((network.flow(z, 1.0, 0.0) - z_0).abs().max().item())
        back.append((sampler.ddim(model, z, times, {}) - z_0).abs().max().item())
    for errors in (noise, back):
        assert errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 1.6 and errors[2] < 0.06, (noise, back)


def test_inversion_asks_from_timestep_0_up_to_the_last_before_noise_and_is_exact_on_a_point_mass(schedule):
    asked, eps = [], normal(2, 3)

    def network(z, timestep):
        """Knows the noise: every trajectory is straight."""
        asked.append(timestep[0].item())
        return eps
    model, times, x = teacher.Model(network, schedule), sampler.time_grid(4), normal(2, 3, seed=1)
    a, b = (v.item() for v in schedule(torch.tensor(1 / 1000, dtype=torch.float64)))
    for grid in (times, times[:, None].expand(-1, 2)):
        z = sampler.invert(model, a * x + b * eps, grid, {})
        assert asked == [0, 249, 499, 749] and torch.allclose(sampler.ddim(model, z, grid, {}), x, atol=1e-9)
        asked.clear()


def test_inversion_refuses_times_that_do_not_fall(schedule):
    model = teacher.Model(lambda z, timestep: z, schedule)
    for times in (torch.tensor([1, 0.5, 0.5, 0]), torch.tensor([0.0, 0.5, 1]), torch.tensor([[1, 0.5], [0.5, 0.7], [0, 0]])):
        with pytest.raises(ValueError, match="must fall"):
            sampler.invert(model, normal(2, 3), times.double(), {})


# ---- diffusers' own ------------------------------------------------------------------------------------------------


def stock_pipeline(folder, solver):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    spacing = {} if solver == "lcm" else dict(timestep_spacing="trailing")
    pipeline.scheduler = STOCK[solver].from_config(pipeline.scheduler.config, **spacing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


EACH_ONCE = ("sd15-lcm", "sd21-unipc", "sdxl-dpmsolver++")      # every solver, every family


@pytest.mark.parametrize("small, solver", [case if "-".join(case) in EACH_ONCE else slow(*case)
                                           for case in itertools.product(("sd15", "sd21", "sdxl"), STOCK)], indirect=["small"])
def test_stock_solvers_equal_diffusers_own_pipelines(small, solver):
    """From seeds alone: diffusers draws the first latents, and lcm's noise after them, from the same generators."""
    ours, theirs = load.load_pipeline(str(small)), stock_pipeline(small, solver)
    model, prompts, seeds = models.as_model(ours), ["red heart on blue", "", "fox"], [5, 6, 7]
    for steps, guidance in ((1, 1.0), (1, 3.0), (3, 3.0), (4, 1.0), (4, 3.0)):
        expected = theirs(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
                          generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
        found = sampler.generate(ours, model, prompts, seeds, sampler.time_grid(steps), guidance, solver=solver)
        assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
        if guidance == 1 and steps == 4:
            plain = sampler.generate(ours, model, prompts, seeds, sampler.time_grid(steps))
            assert (found - plain).abs().max() > 1e-2                                  # and not DDIM under another name


@pytest.mark.parametrize("solver", STOCK)
def test_stock_solvers_take_a_student_of_two_windows_and_zero_terminal_snr(schedule, solver):
    for model in (teacher.Model(lambda z, timestep: 0.1 * z, schedule, windows=2),
                  teacher.Model(lambda z, timestep: 0.1 * z, zero_terminal_snr(), "v_prediction")):
        end = sampler.SOLVERS[solver](model, normal(2, 3), sampler.time_grid(4), {}, generators=sampler.generators(range(2)))
        assert end.isfinite().all() and end.shape == (2, 3)


@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_image_i_is_the_same_in_any_batch(small_models, solver):
    pipeline = load.load_pipeline(str(small_models["sd15"]))
    model, prompts, times = models.as_model(pipeline), ["fox"] * 3, sampler.time_grid(3)
    together = sampler.generate(pipeline, model, prompts, range(3), times, batch=3, solver=solver)
    apart = sampler.generate(pipeline, model, prompts, range(3), times, batch=2, solver=solver)
    assert (together - apart).abs().max() < 1e-4 * together.abs().max() and not torch.allclose(together[0], together[1], atol=0.1)
    assert torch.equal(together, sampler.generate(pipeline, model, prompts, range(3), times, batch=3, solver=solver))


def test_unknown_solvers_and_options_are_one_line(random_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(model=str(random_sd), prompt=["fox"], out="a.png", scale=1)
    for given, message in ((dict(solver="huen"), "--solver huen: not one of .*did you mean heun"),
                           (dict(time_grid="sigmoids"), "--time-grid sigmoids: not one of .*did you mean sigmoid"),
                           (dict(solver="heun", nfe=4), "--nfe 4 network evaluations: heun takes 1, 3, 5"),
                           (dict(nfe=4, steps=4), "--steps 4 and --nfe 4: give one"),
                           (dict(nfe=0), "--nfe 0: must be at least 1"),
                           (dict(solver="dpm2", r=0.0), "--r 0: must be above 0"),
                           (dict(solver="dpm2", r=1.1), "--r 1.1: must be above 0"),
                           (dict(solver="heun", r=0.5), "--r 0.5: only goes with --solver dpm2"),
                           (dict(kappa=3.0), "--kappa 3: only goes with --time-grid sigmoid"),
                           (dict(time_grid="sigmoid", kappa=0.0), "--kappa 0: must be above 0"),
                           (dict(time_grid="edm", solver="unipc", steps=3), "solver unipc: has its own times"),
                           (dict(solver="lcm", steps=60), "solver lcm: cannot make 60 steps"),
                           (dict(solver="unipc", steps=1001), "solver unipc: cannot make 1001 steps of 1000 timesteps"),
                           (dict(solver="dpmsolver++", steps=2000), "cannot make 2000 steps of 1000 timesteps")):
        with pytest.raises(cli.UserError, match=message):
            sampler.main(sampler.Config(**options, **given))


def test_the_command_line_counts_evaluations(random_sd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = dict(model=str(random_sd), prompt=["fox"], out="a.png", scale=1)
    for given, message in ((dict(solver="heun", nfe=5), "3 steps = 5 network"),
                           (dict(solver="dpm2", r=0.4, steps=2, guidance=2.0), "2 steps = 6 network"),
                           (dict(solver="lcm", steps=2), "2 steps = 2 network"),
                           (dict(time_grid="sigmoid", kappa=5.0, steps=3), "3 steps = 3 network"),
                           (dict(time_grid="edm", solver="heun", steps=3, save_steps=True), "3 steps = 5 network")):
        sampler.main(sampler.Config(**options, **given))
        assert message in capsys.readouterr().out


def test_a_solver_in_one_word_is_the_solver_with_its_options(schedule):
    assert sampler.parse_solver("ddim") == (sampler.ddim, sampler.uniform_grid)
    solve, spacing = sampler.parse_solver("dpm2:0.4/sigmoid:20")
    assert (solve.func, solve.keywords) == (solvers.dpm2, dict(r=0.4)) and (spacing.func, spacing.keywords) == (solvers.sigmoid_grid, dict(kappa=20.0))
    assert sampler.parse_solver("heun/edm") == (sampler.SOLVERS["heun"], solvers.edm_grid)
    for spec, message in (("dmp2", "did you mean dpm2"), ("ddim:0.4", "--r 0.4: only goes with --solver dpm2"), ("dpm2:x", "dpm2:0.4/sigmoid:20"),
                          ("dpm2/edm:3", "--kappa 3: only goes with"), ("ddim/sigmoid:0", "--kappa 0: must be above 0"), ("dpm2:2", "--r 2: must be")):
        with pytest.raises(cli.UserError, match=re.escape(message)):
            sampler.parse_solver(spec)


def test_sheets_hold_the_pictures_they_name(random_sd, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(imaging, "contact_sheet", lambda rows, *_, **__: sheets.append(rows) or Image.new("RGB", (8, 8)))
    options = dict(model=str(random_sd), prompt=["fox", "red heart"], steps=2, scale=1, seed=5, out=str(tmp_path / "a.png"), device="cpu")
    sampler.main(sampler.Config(**options, n=2, grid=True, save_steps=True))
    sampler.main(sampler.Config(**options, compare=True))
    pipeline, model, _ = saved.open_model(str(random_sd))

    def drawn(prompts):
        z = sampler.generate(pipeline, model, prompts, range(5, 5 + len(prompts)), sampler.time_grid(2))
        return imaging.to_pil(models.decode(pipeline, z), 1)

    def same(a, b):
        return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    grid, strips, compared = sheets
    expected = drawn(["fox", "fox", "red heart", "red heart"])
    assert all(same(grid[i // 2][i % 2], picture) for i, picture in enumerate(expected))
    assert all(len(strip) == 2 and same(strip[1], picture) and not same(*strip) for strip, picture in zip(strips, expected, strict=True))
    assert all(same(row[1], picture) for row, picture in zip(compared, drawn(["fox", "red heart"]), strict=True))
