"""Samplers beyond DDIM, and grids beyond the uniform one, all of sampler.ddim's signature."""
import torch

import reflow
import teacher
from runtime.cli import UserError


def sigmoid_grid(u, start, end, schedule, kappa=10.0):
    """Denser towards both ends, the more so the larger kappa > 0: sigmoid(kappa (u - 1/2)) brought
    to [0, 1]. As kappa goes to 0 it becomes uniform.  Source: Simple ReFlow has a sigmoid grid;
    its kappa is unknown, 10 is our default."""
    if not kappa > 0:
        raise ValueError(f"kappa = {kappa:g}: must be above 0")
    curve = torch.sigmoid(kappa * (u - 0.5))
    return start + (end - start) * (curve - curve[0]) / (curve[-1] - curve[0])


def edm_grid(u, start, end, schedule, rho=7.0):
    """Evenly in sigma_karras^(1/rho), EDM (Karras et al. 2022) eq. 5: towards t = 0 the last but
    one time is the lowest noise that the network knows (the schedule's floor, timestep 0), then 0;
    a window that lies on one side of the floor is even.
    Raises ValueError if sigma_karras is infinite at the start (zero terminal SNR)."""
    steps, floor = len(u) - 1, schedule.floor
    if schedule(torch.tensor(start))[0] == 0:
        raise ValueError("sigma/alpha is infinite at t = 1 (zero terminal SNR): use another grid")
    if steps > 1 and end < floor < start:                   # i / (N - 1), and the appended 0
        return torch.cat([edm_grid(torch.linspace(0, 1, steps, dtype=torch.float64), start, floor, schedule,
                                   rho), torch.zeros(1).double()])
    high, low = (sigma_karras(schedule, torch.tensor(t, dtype=torch.float64)) ** (1 / rho)
                 for t in (start, end))
    return schedule.time_of((high + (low - high) * u) ** rho)


def sigma_karras(schedule, t):
    """sigma_t / alpha_t, float64, like t."""
    alpha, sigma = schedule(t)
    return sigma / alpha


def dpm2(model, z, times, cond, guidance=1.0, uncond=None, callback=None, generators=None, r=0.5):
    """DPM-Solver-2 with free r (Lu et al. 2022; Simple ReFlow samples so too, its r is unknown):
    second order in sigma_karras = sigma/alpha. A DDIM step to the middle point sigma_m =
    sigma^(1-r) sigma_next^r, then the whole step with eps = (1 - 1/(2r)) eps_hat + 1/(2r) eps_m.
    r in (0, 1]: 1/2 is halfway in log sigma_karras, 1 is Heun's method. A step that ends a window
    of the model is DDIM: at its end the network speaks for the next window, and at t = 0 not at
    all. So S steps through K windows cost 2S - K evaluations, and one step per window is exact
    where ddim is.
    Arguments, Returns: as for ddim.  Raises ValueError unless 0 < r <= 1, UserError where
    sigma_karras is infinite or, for r < 1, where z is off the schedule's curve.
    Waits for the device once, if times are there."""
    if not 0 < r <= 1:
        raise ValueError(f"r = {r:g}: must be above 0 and at most 1")
    times = times.cpu().double().reshape(len(times), -1).expand(-1, len(z))         # (S+1, B)
    if (model.schedule(times[0])[0] == 0).any():
        raise UserError("solver heun, dpm2: sigma/alpha is infinite at t = 1 (zero terminal SNR); use ddim")
    if r < 1:
        check_on_schedule("dpm2", model, times[:-1])
    last = times[1:] <= reflow.window_of(times[:-1], model.windows)[1] + 1e-9       # (S, B): ends a window
    sigma = sigma_karras(model.schedule, times)
    middle = times[1:] if r == 1 else model.schedule.time_of(sigma[:-1] ** (1 - r) * sigma[1:] ** r)
    middle = torch.where(last, times[:-1], middle)          # there eps_m is eps_hat, and the step is DDIM
    single = last.all(1).tolist()
    times, middle = (v.to(teacher.clock_device(z.device)) for v in (times, middle))
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x_hat, eps_hat = model(z, t, cond, guidance, uncond)
        if callback:
            callback(dict(i=i, t=t, t_next=t_next, z=z, x_hat=x_hat, eps_hat=eps_hat))
        if not single[i]:
            a, b = (c.to(z.dtype).to(z.device) for c in model.coefficients(middle[i], z.ndim))
            _, eps_m = model(a * x_hat + b * eps_hat, middle[i], cond, guidance, uncond)
            change = (eps_m - eps_hat) / (2 * r)
            # the same z is a (x_hat - b/a change) + b (eps_hat + change)
            a, b = model.coefficients(t, z.ndim)
            x_hat, eps_hat = x_hat - (b / a).to(z.dtype).to(z.device) * change, eps_hat + change
        a, b = (c.to(z.dtype).to(z.device) for c in model.coefficients(t_next, z.ndim))
        z = a * x_hat + b * eps_hat
    return z


def check_on_schedule(name, model, t):
    """Raises UserError unless the model's z lies on the noise schedule's own curve at every t, as
    PeRFlow's linear path does only at boundaries. t: CPU tensor."""
    for found, expected in zip(model.coefficients(t.reshape(-1)), model.schedule(t.reshape(-1))):
        if not torch.allclose(found, expected, atol=1e-6):
            raise UserError(f"solver {name}: between its boundaries this student leaves the noise schedule "
                            f"(path linear, {model.windows} window{'s' * (model.windows > 1)}); use ddim or "
                            "heun, or one step per window")


def from_diffusers(name, scheduler_class, draws=False, **options):
    """A solver out of a diffusers scheduler, which gets the model's betas and its x_hat, whatever
    the network predicts. It evaluates at its own integer timesteps, so times must be the uniform grid
    from 1 to 0, one for all samples; z must lie on the noise schedule. draws: it adds noise, from
    one generator per image.  Returns: a function like ddim.  Its errors are UserError: another
    grid, more steps than it can make, a student off the schedule."""
    def solve(model, z, times, cond, guidance=1.0, uncond=None, callback=None, generators=None):
        if not isinstance(model.schedule, teacher.Schedule):
            kind = "EDM" if isinstance(model.schedule, teacher.EDMSchedule) else "a flow"
            raise UserError(f"solver {name}: needs a table of betas, and this model's noise is {kind}'s; use "
                            "ddim")
        steps, alpha = len(times) - 1, model.schedule.alpha
        uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        if times.ndim > 1 or not torch.allclose(times.cpu().double(), uniform, atol=1e-6):
            raise UserError(f"solver {name}: has its own times, {steps} uniform steps from 1 to 0; use ddim, "
                            "heun or dpm2 with other grids, and a multiple of its windows as --steps for a "
                            "student of several")
        if draws and (generators is None or len(generators) != len(z)):
            raise ValueError(f"solver {name} draws noise: give {len(z)} generators, one per image")
        betas = 1 - (alpha[1:] / alpha[:-1]).square()
        scheduler = scheduler_class(trained_betas=betas.tolist(), num_train_timesteps=len(betas),
                                    prediction_type="sample",
                                    # where it is, it stays as it is
                                    rescale_betas_zero_snr=alpha[-1].item() == 0, **options)
        try:
            scheduler.set_timesteps(steps)
        except ValueError as error:
            raise UserError(f"solver {name}: cannot make {steps} steps ({error}); use fewer") from error
        visited = torch.cat([(scheduler.timesteps.double() + 1) / len(betas),
                           torch.zeros(1, dtype=torch.float64)])
        if not (visited.diff() < 0).all():                 # it divides by what is between two of them
            raise UserError(f"solver {name}: cannot make {steps} steps of {len(betas)} timesteps; use fewer")
        check_on_schedule(name, model, visited[:-1])
        visited = visited.to(teacher.clock_device(z.device)).reshape(-1, 1).expand(-1, len(z))
        for i, timestep in enumerate(scheduler.timesteps):
            x_hat, eps_hat = model(z, visited[i], cond, guidance, uncond)
            if callback:
                callback(dict(i=i, t=visited[i], t_next=visited[i + 1], z=z, x_hat=x_hat, eps_hat=eps_hat))
            z = scheduler.step(x_hat, timestep, z, **({"generator": generators} if draws else {})).prev_sample
        return z
    return solve
