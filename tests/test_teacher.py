"""Identities of teacher.py and the solver: schedule, conversions, guidance, the clock, closed-form flows, diffusers."""
import diffusers
import pytest
import torch

import reflow
import sampler
import teacher
import tiny


def test_schedule_is_stable_diffusions_on_the_grid_and_clean_at_zero(schedule):
    alphas_cumprod = tiny.make_scheduler().alphas_cumprod.double()
    for timestep in (0, 1, 499, 999):
        alpha, sigma = schedule(torch.tensor((timestep + 1) / 1000, dtype=torch.float64))
        assert alpha.item() == pytest.approx(alphas_cumprod[timestep].sqrt().item(), abs=1e-12)
        assert (alpha ** 2 + sigma ** 2).item() == pytest.approx(1, abs=1e-12)
    alpha, sigma = schedule(torch.tensor([0.0, 1.0]))
    assert (alpha[0], sigma[0]) == (1, 0) and alpha[1] == pytest.approx(0.0683, abs=1e-4)
    between = schedule(torch.linspace(0, 1, 4001, dtype=torch.float64))[0]
    assert (between.diff() < 0).all()


@pytest.mark.parametrize("prediction", teacher.PREDICTIONS)
def test_prediction_to_pair_and_back_is_the_identity(schedule, prediction):
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.05, 1, 7, dtype=torch.float64)
    for path in reflow.PATHS.values():
        a, b = (v[:, None] for v in path(schedule, t, 4))
        p, q = teacher.PREDICTIONS[prediction](*(v[:, None] for v in schedule(t)))
        found = teacher.to_chord(p * x + q * eps, a * x + b * eps, (p, q), a, b)
        assert torch.allclose(found[0], x, atol=1e-10) and torch.allclose(found[1], eps, atol=1e-10)


def test_v_prediction_is_diffusers_get_velocity(schedule):
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, eps, timestep = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    alpha, sigma = (v.float()[:, None, None, None] for v in schedule((timestep + 1) / 1000))
    p, q = teacher.PREDICTIONS["v_prediction"](alpha, sigma)
    assert torch.allclose(p * x + q * eps, scheduler.get_velocity(x, eps, timestep), atol=1e-5)


def test_guidance_is_linear_and_0_and_1_ask_one_side_only(schedule):
    asked = []

    def network(z, timestep, text):
        asked.append(len(z))
        return text.expand_as(z)
    model = teacher.Model(network, schedule)
    z, t = torch.zeros(3, 4), torch.full((3,), 0.5, dtype=torch.float64)
    cond, uncond = {"text": torch.full((3, 1), 2.0)}, {"text": torch.full((3, 1), 1.0)}
    for w, expected in ((0, 1), (1, 2), (0.5, 1.5), (7, 8)):
        assert torch.allclose(model(z, t, cond, w, uncond)[1], torch.full((3, 4), float(expected)))
    assert asked == [3, 3, 6, 6]
    with pytest.raises(ValueError, match="guidance 3"):
        model(z, t, cond, 3)


def test_the_clock_shows_the_network_integers_at_boundaries(schedule):
    shown = []
    model = teacher.Model(lambda z, timestep: shown.append(timestep[0].item()) or z, schedule)
    for steps in (1, 2, 4, 8, 32):
        sampler.ddim(model, torch.ones(1, 2, dtype=torch.float64), sampler.time_grid(steps), {})
        assert shown == [1000 * (steps - i) / steps - 1 for i in range(steps)]
        shown.clear()


@pytest.mark.parametrize("steps", [1, 2, 5, 32])
def test_point_mass_data_is_hit_exactly_in_any_number_of_steps(gaussian, steps):
    network, model = gaussian
    network.mean, network.std = -1.3, 0.0
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sampler.ddim(model, z, sampler.time_grid(steps), {}), torch.full_like(z, -1.3), atol=1e-9)


def test_gaussian_data_ddim_reaches_the_exact_flow_at_first_order(gaussian):
    """Between t = 0.999 and 0.111 the grid stays on integers at 37, 111 and 333 steps: error / 3 when steps x 3."""
    network, model = gaussian
    z = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (37, 111, 333):
        times = torch.linspace(0.999, 0.111, steps + 1, dtype=torch.float64)
        errors.append((sampler.ddim(model, z, times, {}) - network.flow(z, 0.999, 0.111)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(3, rel=0.15) and errors[1] / errors[2] == pytest.approx(3, rel=0.1)
    assert errors[2] < 5e-3


def test_inversion_runs_the_same_solver_backwards(gaussian):
    network, model = gaussian
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(0.999, 0.1, 900, dtype=torch.float64)
    end = sampler.ddim(model, z, times, {})
    back = sampler.ddim(model, end, times.flip(0), {})
    assert (back - z).abs().max() < 0.02
    assert (network.flow(end, 0.1, 0.999) - z).abs().max() < 0.02


def test_one_step_per_window_is_exact_once_the_chord_is_known(gaussian):
    """A student that answers with the chords of the exact flow lands on its boundaries, with 1, 2 or 5 steps per window,
    on both paths: this is what 'straight over the window' means."""
    network, model = gaussian
    for path in reflow.PATHS.values():
        for windows in (1, 2, 4, 8):
            z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            edges = reflow.boundaries(windows)
            exact = [network.flow(z, 1.0, t) for t in edges]

            class Chord:
                coefficients = teacher.Model(None, model.schedule, path=path, windows=windows).coefficients

                def __call__(self, z, t, cond, guidance, uncond):
                    t_start, t_end = reflow.window_of(t, windows)
                    i = round((1 - t_start[0].item()) * windows)
                    ends = [[v[:, None] for v in model.schedule(time)] for time in (t_start, t_end)]
                    return reflow.chord(exact[i], exact[i + 1], *ends)
            for per_window in (1, 2, 5):
                end = sampler.ddim(Chord(), z, sampler.time_grid(windows * per_window, windows), {})
                assert torch.allclose(end, exact[-1], atol=1e-9)


@pytest.mark.parametrize("windows", [8, 4, 2, 1])
def test_the_untrained_student_is_ddim_with_as_many_steps_as_windows(random_sd, windows):
    pipeline = teacher.load_pipeline(str(random_sd))
    cond = teacher.encode_text(pipeline, ["fox on blue", "heart"])
    z = sampler.noise([0, 1], sampler.latent_shape(pipeline))
    plain = teacher.as_model(pipeline)
    with torch.no_grad():
        expected = sampler.ddim(plain, z, sampler.time_grid(windows), cond)
        for path in reflow.PATHS.values():
            student = teacher.as_model(pipeline, path=path, windows=windows)
            assert torch.allclose(sampler.ddim(student, z, sampler.time_grid(windows, windows), cond), expected, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampler_equals_diffusers_own_pipeline_and_scheduler(random_sd, steps, guidance):
    pipeline = teacher.load_pipeline(str(random_sd))
    prompts, seeds = ["red heart on blue", "cat", ""], [5, 6, 7]
    ours = sampler.generate(pipeline, teacher.as_model(pipeline), prompts, seeds, sampler.time_grid(steps), guidance)
    stock = diffusers.DiffusionPipeline.from_pretrained(random_sd)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
                   latents=sampler.noise(seeds, sampler.latent_shape(pipeline))).images
    assert (ours - theirs).abs().max() <= 1e-4


def test_time_grid_is_trailing_and_respects_windows():
    for steps in (1, 2, 4, 5, 8, 10, 20, 25, 40):
        scheduler = tiny.make_scheduler()
        scheduler.set_timesteps(steps)
        assert (1000 * sampler.time_grid(steps)[:-1] - 1).round().long().tolist() == scheduler.timesteps.tolist()
    assert sampler.time_grid(3, 2).tolist() == [1, 0.75, 0.5, 0]
    assert sampler.time_grid(32)[16] == 0.5 and 1000 * sampler.time_grid(32)[1] - 1 == 967.75
    with pytest.raises(ValueError, match="1 steps cannot cross 2 windows"):
        sampler.time_grid(1, 2)


def test_image_i_is_the_same_in_any_batch(random_sd):
    pipeline = teacher.load_pipeline(str(random_sd))
    prompts, seeds, times = ["fox"] * 5, range(5), sampler.time_grid(2)
    model = teacher.as_model(pipeline)
    together = sampler.generate(pipeline, model, prompts, seeds, times, batch=5)
    apart = sampler.generate(pipeline, model, prompts, seeds, times, batch=2)
    assert (together - apart).abs().max() < 1e-4 * together.abs().max() and not torch.allclose(together[0], together[1], atol=0.1)
    assert torch.equal(together, sampler.generate(pipeline, model, prompts, seeds, times, batch=5))
