"""Identities of reflow.py: windows, chord, paths, spaces, time laws, recipes, the loss."""
import contextlib
import functools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import losses
import pairs
import reflow
import teacher
from tools import build


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 7, 8, 10, 1000])
def test_every_grid_time_has_one_window_that_it_does_not_start_below(windows):
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    t_start, t_end = reflow.window_of(t, windows)
    assert ((t <= t_start + 1e-9) & (t > t_end + 1e-9)).all()
    assert torch.allclose(t_start - t_end, torch.full_like(t, 1 / windows))
    for edge in reflow.boundaries(windows)[:-1]:                                     # a boundary starts its own window
        assert reflow.window_of(torch.tensor([edge], dtype=torch.float64), windows)[0].item() == pytest.approx(edge)


def test_boundaries_nest_and_are_integers_on_the_1000_grid():
    for windows in (8, 4, 2, 1):
        timesteps = [1000 * t - 1 for t in reflow.boundaries(windows)]
        assert timesteps == [round(step) for step in timesteps] and timesteps[0] == 999 and timesteps[-1] == -1
        assert set(reflow.boundaries(windows)) <= set(reflow.boundaries(8))
    with pytest.raises(ValueError, match="windows = 0"):
        reflow.boundaries(0)


@pytest.mark.parametrize("stages", [(8, 3), (4, 4), (2, 4), (), (0,)])
def test_curricula_that_do_not_merge_are_refused(stages):
    with pytest.raises(ValueError, match="stages"):
        reflow.check_curriculum(stages)


@pytest.mark.parametrize("windows", [8, 4, 2, 1])
def test_chord_of_a_point_mass_trajectory_is_exact(schedule, windows):
    generator = torch.Generator().manual_seed(windows)
    x, eps = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    t_start, t_end = reflow.window_of(torch.arange(1, 9, dtype=torch.float64) / 8, windows)
    ends = [[v[:, None] for v in schedule(t)] for t in (t_start, t_end)]
    z_start, z_end = (a * x + b * eps for a, b in ends)
    found = reflow.chord(z_start, z_end, *ends)
    assert torch.allclose(found[0], x, atol=1e-10) and torch.allclose(found[1], eps, atol=1e-10)


@pytest.mark.parametrize("path", reflow.PATHS.values())
@pytest.mark.parametrize("windows", [8, 4, 1])
def test_paths_meet_the_schedule_at_both_ends_of_every_window(schedule, path, windows):
    edges = torch.tensor(reflow.boundaries(windows), dtype=torch.float64)
    for a, b in zip(path(schedule, edges, windows), schedule(edges)):
        assert torch.allclose(a, b, atol=1e-12)


def test_linear_path_is_perflow_closed_form(schedule):
    """PeRFlow: z_end = L z_start + H eps, and v = [(L - 1) z + H eps] / D with D = L (t - t_s) + (t_e - t), for ddim_eps."""
    generator = torch.Generator().manual_seed(0)
    z_start, z_end = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.999, 0.9, 0.77, 0.6, 0.51, 0.3], dtype=torch.float64)
    t_s, t_e = reflow.window_of(t, 4)
    (a_s, s_s), (a_e, s_e) = ends = [[v[:, None] for v in schedule(time)] for time in (t_s, t_e)]
    x, eps = reflow.chord(z_start, z_end, *ends)
    a, b = (v[:, None] for v in reflow.linear_path(schedule, t, 4))
    t_, ts_, te_ = (v[:, None] for v in (t, t_s, t_e))
    z_t = z_start + (t_ - ts_) / (te_ - ts_) * (z_end - z_start)
    assert torch.allclose(a * x + b * eps, z_t, atol=1e-12)
    L, H = a_e / a_s, s_e - a_e / a_s * s_s
    closed = ((L - 1) * z_t + H * eps) / (L * (t_ - ts_) + (te_ - t_))
    p, q = (v[:, None] for v in reflow.window_velocity_space(schedule, t_s, t_e))
    assert torch.allclose(p * x + q * eps, closed, atol=1e-10)
    assert torch.allclose(closed, (z_end - z_start) / (te_ - ts_), atol=1e-10)


def test_spaces_at_the_chord(schedule):
    t_s, t_e = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    x, eps = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[-1.0]], dtype=torch.float64)
    (a_s, s_s), (a_e, s_e) = schedule(t_s), schedule(t_e)
    expected = {"eps": eps, "u": eps - x, "x": x, "end": a_e * x + s_e * eps,
                "velocity": ((a_e * x + s_e * eps) - (a_s * x + s_s * eps)) / (t_e - t_s)}
    assert set(expected) == set(reflow.SPACES)
    for name, space in reflow.SPACES.items():
        p, q = space(schedule, t_s, t_e)
        assert torch.allclose(p * x + q * eps, expected[name], atol=1e-12), name


def test_every_recipe_names_rows_that_exist():
    tables = {"pairs": pairs.SOURCES, "path": reflow.PATHS, "space": reflow.SPACES, "loss": losses.LOSSES, "time_law": reflow.TIME_LAWS}
    for name, recipe in reflow.RECIPES.items():
        reflow.check_curriculum(recipe.stages)
        assert len(recipe.shares) == len(recipe.stages), name
        for column, table in tables.items():
            assert getattr(recipe, column) in table, (name, column)


@pytest.mark.parametrize("updates", [4, 5, 100, 8001])
def test_stage_updates_sum_and_leave_no_stage_out(updates):
    for recipe in reflow.RECIPES.values():
        counts = reflow.stage_updates(recipe, updates)
        assert sum(counts) == updates and min(counts) >= 1
    with pytest.raises(ValueError, match="updates = 3"):
        reflow.stage_updates(reflow.RECIPES["default"], 3)


def test_uniform_time_law_stays_in_the_half_open_interval():
    t = reflow.uniform(torch.tensor([0.0, 0.5, 1 - 2 ** -53], dtype=torch.float64), 4)
    assert t.tolist() == [1, 0.5, 2 ** -53]


@pytest.mark.parametrize("windows, share", [(1, 0.5), (2, 0.5), (8, 0.5), (4, 0.9), (4, 0.2)])
def test_starts_time_law_is_on_the_starts_at_its_share_and_uniform_elsewhere(windows, share):
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = reflow.draw_times(reflow.Recipe(starts_share=share), u, windows, SCHEDULES["sd"])
    on_start = (t == reflow.window_of(t, windows)[0])
    assert on_start.double().mean().item() == pytest.approx(share, abs=0.01)
    for start in reflow.boundaries(windows)[:-1]:
        assert (t == start).double().mean().item() == pytest.approx(share / windows, abs=0.01)
    rest = t[~on_start].sort().values
    uniform = torch.linspace(0, 1, len(rest), dtype=torch.float64)
    assert (rest - uniform).abs().max() < 0.02 and 0 < t.min() and t.max() == 1                  # Kolmogorov-Smirnov distance


def test_the_starts_law_ends_in_the_uniform_law_and_in_the_starts_alone():
    u = torch.tensor([0.0, 0.3, 0.7, 1 - 2 ** -53], dtype=torch.float64)
    assert torch.equal(reflow.starts(u, 4, 0.0), reflow.uniform(u, 4))
    assert torch.equal(reflow.starts(u, 4, 1.0), reflow.window_of(reflow.uniform(u, 4), 4)[0])
    for share in (0.0, 0.1, 0.3, 0.7, 1.0):                                               # never at 0, whatever is rounded
        assert reflow.starts(u, 4, share).min() > 0


def cumulative(density, points=200_001):
    """(tau, F(tau)) by the trapezoid rule: an integral that knows no inverse."""
    tau = torch.linspace(0, 1, points, dtype=torch.float64)
    return tau, torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density(tau), tau)])


def kolmogorov_smirnov(draws, density, low=0.0, high=1.0):
    """sup |empirical - F| of draws from the density restricted to (low, high]; 1.95 / sqrt(n) is exceeded once in a thousand."""
    tau, F = cumulative(density)
    draws = draws[(draws > low) & (draws <= high)].sort().values
    at = torch.from_numpy(np.interp(torch.cat([draws, torch.tensor([low, high]).double()]).numpy(), tau.numpy(), F.numpy()))
    at = (at[:-2] - at[-2]) / (at[-1] - at[-2])
    steps = torch.arange(len(draws) + 1, dtype=torch.float64) / len(draws)
    return max((at - steps[:-1]).max().item(), (steps[1:] - at).max().item()) * len(draws) ** 0.5


# as the papers state them: the densities of tau, on the clock of a straight flow, where sigma_karras = tau / (1 - tau)
def exponential(tau, base=10.0):
    return base ** tau * math.log(base) / (base - 1)


def cosh(tau, a=4.0):
    return a * torch.cosh(a * (tau - 0.5)) / (2 * math.sinh(a / 2))


def log_normal(tau, mean=-1.2, std=1.2):
    tau = tau.clamp(1e-12, 1 - 1e-12)
    return torch.exp(-(torch.logit(tau) - mean) ** 2 / (2 * std ** 2)) / (std * math.sqrt(2 * math.pi) * tau * (1 - tau))


DRAWS = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DENSITIES = {"uniform": torch.ones_like, "exponential": exponential, "cosh": cosh, "log-normal": log_normal}
VARIANTS = {"uniform": ({},), "exponential": ({}, dict(base=4.0), dict(base=0.1), dict(base=1e4)), "cosh": ({}, dict(a=1.0), dict(a=10.0)),
            "log-normal": ({}, dict(mean=0.5, std=0.7))}
EVERY = [(name, options) for name, variants in VARIANTS.items() for options in variants]
# Stable Diffusion's tables, the same to infinite sigma (zero terminal SNR), EDM's
SCHEDULES = {"sd": teacher.Schedule(build.make_scheduler().alphas_cumprod),
             "zero-snr": teacher.Schedule(DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod),
             "edm": teacher.EDMSchedule(0.002, 80.0, 0.5)}


def noise_levels(schedule, t):
    """(sigma_karras, tau) at t."""
    alpha, sigma = schedule(t)
    return sigma / alpha, sigma / (alpha + sigma)


@pytest.mark.parametrize("name, options", EVERY)
def test_time_laws_draw_from_their_density_and_know_its_integral(name, options):
    law, density = reflow.TIME_LAWS[name], functools.partial(DENSITIES[name], **options)
    tau, F = cumulative(density)
    assert F[-1].item() == pytest.approx(1, abs=1e-7 if options != dict(base=1e4) else 1e-6)
    draws = law(DRAWS, 1, **options)
    assert 0 < draws.min() and draws.max() <= 1 and draws.dtype == torch.float64 and kolmogorov_smirnov(draws, density) < 1.95
    if name in reflow.CUMULATIVE:
        assert torch.allclose(reflow.CUMULATIVE[name](tau, **options), F, atol=1e-6)
    else:
        assert name == "uniform"                                                       # a law of our own t, whatever the schedule


@pytest.mark.parametrize("name", VARIANTS)
def test_kolmogorov_smirnov_tells_the_laws_apart(name):
    for other in set(VARIANTS) - {name}:
        assert kolmogorov_smirnov(reflow.TIME_LAWS[name](DRAWS, 1), DENSITIES[other]) > 10


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", reflow.CUMULATIVE)
def test_laws_stated_in_noise_levels_mean_the_same_levels_on_every_schedule(schedule, name, windows):
    """The levels that are drawn follow the paper's density between the schedule's lowest and highest level, not a law of its clock."""
    schedule = SCHEDULES[schedule]
    t = reflow.draw_times(reflow.Recipe(time_law=name), DRAWS, windows, schedule)
    low, high = noise_levels(schedule, torch.tensor([schedule.floor, 1.0], dtype=torch.float64))[1]
    sigma, tau = noise_levels(schedule, t)
    assert schedule.floor <= t.min() and t.max() <= 1 and tau.min() >= low - 1e-12
    assert kolmogorov_smirnov(tau, DENSITIES[name], low.item(), high.item()) < 1.95
    assert ((tau - low).abs() < 1e-9).sum() <= 1 and ((tau - high).abs() < 1e-9).sum() <= 1           # truncated, not piled up there
    if name == "log-normal":                                                                      # EDM, table 1
        assert sigma.median().item() == pytest.approx(math.exp(-1.2), rel=0.06)
    if name == "exponential" and high > 0.98:
        assert tau.mean().item() == pytest.approx(0.677, abs=0.015)


def test_known_moments_of_the_time_laws():
    t = reflow.exponential(DRAWS, 1)
    assert t.mean().item() == pytest.approx(0.677, abs=3e-3) and (t > 0.5).double().mean().item() == pytest.approx(0.760, abs=4e-3)
    t = reflow.cosh(DRAWS, 1)
    assert t.mean().item() == pytest.approx(0.5, abs=4e-3)
    logit = torch.logit(reflow.log_normal(DRAWS, 1))
    assert logit.mean().item() == pytest.approx(-1.2, abs=0.015) and logit.std().item() == pytest.approx(1.2, abs=0.015)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", reflow.TIME_LAWS)
def test_time_laws_stay_in_the_half_open_interval_at_the_ends_of_u(name, schedule):
    u = torch.tensor([0.0, 2 ** -53, 1 - 2 ** -53], dtype=torch.float64)
    for windows in (1, 8):
        for options in VARIANTS.get(name, ({},)):
            assert 0 < reflow.TIME_LAWS[name](u, windows, **options).min() and reflow.TIME_LAWS[name](u, windows, **options).max() <= 1
        for inside in (False, True):
            for base in (10.0, 1e4, 0.1):
                t = reflow.draw_times(reflow.Recipe(time_law=name, time_base=base, time_inside=inside), u, windows, schedule)
                assert 0 < t.min() and t.max() <= 1
                reflow.window_of(t, windows)


def test_bases_without_an_exponential_law_are_refused():
    for base in (0.0, -2.0, 1.0, float("nan")):
        for function in (lambda: reflow.exponential(DRAWS[:2], 1, base), lambda: reflow.exponential_cumulative(DRAWS[:2], base)):
            with pytest.raises(ValueError, match="base = .*above 0 and not 1"):
                function()
    near = reflow.exponential(DRAWS, 1, 1 + 1e-9)                                     # and the limit is the uniform law
    assert torch.allclose(near, reflow.uniform(DRAWS, 1), atol=1e-6)


@pytest.mark.parametrize("windows", [1, 2, 8])
def test_a_law_inside_windows_asks_all_equally_often_and_follows_its_density_in_each(windows):
    recipe = reflow.Recipe(time_law="exponential", time_base=4.0, time_inside=True)
    t = reflow.draw_times(recipe, DRAWS, windows, SCHEDULES["sd"])
    t_start, t_end = reflow.window_of(t, windows)
    for start in reflow.boundaries(windows)[:-1]:
        assert (t_start == start).double().mean().item() == pytest.approx(1 / windows, abs=0.005)
    place = (t - t_end) / (t_start - t_end)
    assert kolmogorov_smirnov(place, functools.partial(exponential, base=4.0)) < 1.95
    on_starts = reflow.draw_times(reflow.Recipe(time_law="starts", time_inside=True), DRAWS, windows, SCHEDULES["sd"])
    assert (on_starts == reflow.window_of(on_starts, windows)[0]).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_recipe_draws_on_the_whole_axis_unless_told_and_its_base_is_read():
    for schedule in SCHEDULES.values():
        for name in ("uniform", "starts"):                                            # laws of our own t
            assert torch.equal(reflow.draw_times(reflow.Recipe(time_law=name), DRAWS, 4, schedule), reflow.TIME_LAWS[name](DRAWS, 4))
        t = reflow.draw_times(reflow.Recipe(time_law="exponential", time_base=0.5), DRAWS, 4, schedule)
        low, high = noise_levels(schedule, torch.tensor([schedule.floor, 1.0], dtype=torch.float64))[1].tolist()
        assert kolmogorov_smirnov(noise_levels(schedule, t)[1], functools.partial(exponential, base=0.5), low, high) < 1.95


def test_recipes_of_several_windows_train_at_the_starts_unless_their_paper_tells_its_time_law():
    """PeRFlow: uniform on its grid of 1000; Rectified Diffusion: a uniform index of 40, then uniform in its window."""
    told = {"perflow": "uniform", "rectified-diffusion": "uniform"}
    for name, recipe in reflow.RECIPES.items():
        if max(recipe.stages) > 1:
            assert recipe.time_law == told.get(name, "starts"), name


# ---- student_loss ----


def window_of_a_trajectory(windows, path="vp", ndim=4):
    """Random ends of windows, and a model whose answers are a trainable pair added to a given one."""
    generator = torch.Generator().manual_seed(3)
    shape = (6, 2, 4, 4)[:ndim]
    z_start, z_end = torch.randn(2, *shape, generator=generator)
    t = 1 - torch.rand(6, generator=generator, dtype=torch.float64)
    edges = reflow.window_of(t, windows)
    schedule = teacher.Schedule(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
    x, eps = reflow.chord(z_start, z_end, *([v.float().view(-1, *[1] * (ndim - 1)) for v in schedule(edge)] for edge in edges))
    shift = torch.zeros(2, *shape, requires_grad=True)

    class Answers(teacher.Model):
        def __call__(self, z, t, cond):
            self.given = z, t, cond
            return x + shift[0], eps + shift[1]
    model = Answers(None, schedule, path=reflow.PATHS[path], windows=windows)
    return model, (z_start, z_end), (t, *edges), (x, eps), shift


@pytest.mark.parametrize("name", reflow.RECIPES)
@pytest.mark.parametrize("windows, ndim", [(1, 4), (4, 4), (4, 3)])
def test_the_loss_is_zero_at_the_chord_and_its_point_lies_on_the_path(name, windows, ndim):
    recipe = reflow.RECIPES[name]
    model, ends, times, (x, eps), shift = window_of_a_trajectory(windows, recipe.path, ndim)
    values, parts = reflow.student_loss(model, ends, times, {"text": 1}, recipe, normalizer=lambda z, t: torch.zeros(6))
    z, t, cond = model.given
    assert torch.equal(t, times[0]) and cond == {"text": 1} and torch.equal(z, parts["z"])
    a, b = (v.float() for v in model.coefficients(t, ndim))
    assert torch.allclose(z, a * x + b * eps, atol=1e-6)
    assert parts["loss"].shape == values.shape == (6,) and parts["loss"].abs().max() < 1e-6
    assert parts["magnitude"].abs().max() < 1e-6 and parts["direction"].abs().max() < 1e-4      # norms in float32


def test_the_loss_of_a_known_error_in_every_space_and_its_gradient():
    """An error d in x alone is, in space (p, q), p d: the mean of (p d)^2 and the direction term follow, and so does the gradient."""
    for space in reflow.SPACES:
        model, ends, times, (x, eps), shift = window_of_a_trajectory(4)
        with torch.no_grad():
            shift[0] = 0.25
        recipe = reflow.Recipe(space=space, direction_weight=0.5, direction_space="u")
        values, parts = reflow.student_loss(model, ends, times, {}, recipe)
        p, q = reflow.SPACES[space](model.schedule, *times[1:])
        p = p if torch.is_tensor(p) else torch.full((6,), p)
        expected = (p.double() * 0.25).square().float()
        cosine = torch.cosine_similarity((eps - x - 0.25).flatten(1), (eps - x).flatten(1))
        assert torch.allclose(values, expected + 0.5 * (1 - cosine), rtol=1e-4, atol=1e-5), space
        assert torch.allclose(parts["magnitude"] + parts["direction"], expected, rtol=1e-3, atol=1e-4), space
        assert torch.equal(values.detach(), parts["loss"]) and not parts["loss"].requires_grad
        gradient, = torch.autograd.grad(values.sum(), shift)
        assert gradient[0].abs().max() > 0 or space == "eps"


def test_normalization_weighs_the_values_and_not_what_is_logged():
    model, ends, times, (x, eps), shift = window_of_a_trajectory(2)
    with torch.no_grad():
        shift[1] = 0.5
    recipe = reflow.Recipe(normalization="learned")
    plain = reflow.student_loss(model, ends, times, {}, reflow.Recipe())[1]["loss"]
    values, parts = reflow.student_loss(model, ends, times, {}, recipe, normalizer=lambda z, t: torch.full((6,), math.log(0.1)))
    assert torch.allclose(parts["loss"], plain) and torch.allclose(plain, torch.full((6,), 0.25))
    assert torch.allclose(values, torch.full((6,), 0.25 / 0.1 + math.log(0.25 / 0.1) ** 2), rtol=1e-5)


def test_the_student_is_evaluated_under_autocast():
    model, ends, times, *_ = window_of_a_trajectory(2)
    inside, seen = [], []

    @contextlib.contextmanager
    def half():
        inside.append(True)
        yield
        inside.clear()

    def asked(*given):
        seen.append(bool(inside))
        return model(*given)
    asked.schedule, asked.coefficients = model.schedule, model.coefficients
    reflow.student_loss(asked, ends, times, {}, reflow.Recipe(), autocast=half())
    assert seen == [True]


def test_the_share_of_starts_counts_inside_windows_too():
    t = reflow.draw_times(reflow.Recipe(time_law="starts", time_inside=True, starts_share=0.2), DRAWS, 4, SCHEDULES["sd"])
    assert (t == reflow.window_of(t, 4)[0]).double().mean().item() == pytest.approx(0.2, abs=0.01)
