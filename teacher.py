"""The frozen diffusion model behind one contract: model(z, t, cond) -> (x_hat, eps_hat).
The only file that knows the network's side of diffusers: its noise schedule, its clock, its
prediction type. Text encoders and loading are in models/.

Clock: t is continuous, 0 = data, 1 = noise. The network sees the timestep 1000 t - 1 (a float;
SD's own integers at t = k/1000): t = 1 is timestep 999, and t = 0 is "timestep -1", clean data,
where no network is evaluated. Networks in EDM's form and of flow matching have clocks of their own
(EDMSchedule, FlowSchedule).

A pixel model (UNet2DModel, no autoencoder, no text) keeps the same contract: its latents are the
pixels, and it is conditioned on nothing or on a class, whose name takes the place of the prompt.
"""
from dataclasses import dataclass

import numpy as np
import torch

from runtime.cli import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# what a network predicts -> (p, q) with output = p x + q eps, given (alpha_t, sigma_t)
PREDICTIONS = {
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "sample": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow_prediction": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),
}


def clock_device(device):
    """Where the times (float64) of a network on this device are kept: there, or on the host if it has
    no float64, as Apple's and some of Intel's."""
    return torch.device("cpu") if torch.device(device).type in ("mps", "xpu") else device


def check_times(t):
    """Raises ValueError unless all of t lies in [0, 1]; on a GPU, looking would stop it, and
    nothing is checked."""
    if t.device.type == "cpu" and ((t < -1e-9) | (t > 1 + 1e-9)).any():
        raise ValueError(f"t = {t.min().item():g} to {t.max().item():g}: outside [0, 1], data to noise")


class Schedule:
    """alpha_t and sigma_t of z_t = alpha_t x + sigma_t eps, for any t in [0, 1]: exact at t =
    k/1000, alpha linear between.
    alphas_cumprod: (T,), as diffusers' schedulers carry it; T timesteps. floor: the t of the lowest
    noise the network knows, timestep 0; key: what a cache knows it by."""

    def __init__(self, alphas_cumprod):
        self.alpha = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().sqrt()])
        self.timesteps = len(alphas_cumprod)
        self.floor, self.key = 1 / self.timesteps, self.alpha.tolist()
        self.tables = {}  # alpha per device: a copy per call would stop the GPU

    def __call__(self, t):
        """t: tensor of any shape, in [0, 1].  Returns: (alpha_t, sigma_t), float64, the same shape.
        Raises as check_times."""
        check_times(t)
        position = t.double() * self.timesteps
        low = position.floor().clamp(0, self.timesteps - 1).long()
        if t.device not in self.tables:
            self.tables[t.device] = self.alpha.to(t.device)
        table = self.tables[t.device]
        alpha = torch.lerp(table[low], table[low + 1], position - low)
        return alpha, (1 - alpha.square()).clamp_min(0).sqrt()

    def time_of(self, sigma_karras):
        """The t at which sigma_t / alpha_t is sigma_karras >= 0: the exact inverse, as alpha is
        linear between timesteps.
        sigma_karras: CPU tensor of any shape; beyond what the schedule reaches gives t = 1.
        Returns: float64, the same shape."""
        alpha = 1 / (1 + sigma_karras.double().square()).sqrt()
        table = self.alpha.numpy()[::-1]                    # rising, as interp wants it
        return torch.tensor(np.interp(alpha.numpy(), table, np.linspace(1, 0, len(table))))

    def timestep(self, t):
        """The time input of the network. t: (B,).  Returns: float32 (B,)."""
        return (t.double() * self.timesteps - 1).float()

    def network_input(self, z, alpha, sigma):
        """What the network is given for z: z itself."""
        return z

    def output(self, prediction, alpha, sigma):
        """(p, q) with the network's output = p x + q eps. prediction: a key of PREDICTIONS."""
        return PREDICTIONS[prediction](alpha, sigma)


class EDMSchedule:
    """A network in the form of EDM (Karras et al. 2022), under the variance-preserving contract and
    called like Schedule: with s = sigma_karras, alpha = 1 / sqrt(1 + s^2) and sigma = s alpha, so z
    = alpha (x + s eps).
    Clock: EDM's ramp (eq. 5, rho = 7), even in s^(1/7) from sigma_max at t = 1 to sigma_min, the
    lowest noise the network knows, at t = floor = 1/1000, where SD's tables have theirs;
    below it s is linear in t, down to the data at t = 0, and the network gets sigma_min as its
    time.  Raises UserError unless 0 < sigma_min < sigma_max and 0 < sigma_data."""
    RHO = 7
    floor, timesteps = 1 / 1000, None                       # any t is a time of the network

    def __init__(self, sigma_min, sigma_max, sigma_data):
        if not (0 < sigma_min < sigma_max < float("inf") and 0 < sigma_data < float("inf")):
            raise UserError(f"an EDM scheduler with sigma_min {sigma_min}, sigma_max {sigma_max}, sigma_data "
                            f"{sigma_data}: need 0 < sigma_min < sigma_max and sigma_data above 0; correct "
                            "its scheduler_config.json")
        self.sigma_min, self.sigma_data = sigma_min, sigma_data
        self.low, self.high = sigma_min ** (1 / self.RHO), sigma_max ** (1 / self.RHO)
        self.key = ("edm", sigma_min, sigma_max, sigma_data)

    def sigma_karras(self, t):
        ramp = (self.low + (t - self.floor) / (1 - self.floor) * (self.high - self.low)) ** self.RHO
        return torch.where(t < self.floor, self.sigma_min * t / self.floor, ramp)

    def __call__(self, t):
        check_times(t)
        s = self.sigma_karras(t.double().clamp_min(0))
        alpha = 1 / (1 + s.square()).sqrt()
        return alpha, s * alpha

    def time_of(self, sigma_karras):
        s = sigma_karras.double()
        ramp = self.floor + (s ** (1 / self.RHO) - self.low) / (self.high - self.low) * (1 - self.floor)
        return torch.where(s < self.sigma_min, self.floor * s / self.sigma_min, ramp.clamp_max(1))

    def timestep(self, t):
        """c_noise = ln(s) / 4 (EDM, table 1)."""
        return self.sigma_karras(t.double().clamp_min(self.floor)).log().div(4).float()

    def network_input(self, z, alpha, sigma):
        """c_in (x + s eps) = z / sqrt(alpha^2 sigma_data^2 + sigma^2)."""
        return z / (alpha.square() * self.sigma_data ** 2 + sigma.square()).sqrt().to(z.dtype).to(z.device)

    def output(self, prediction, alpha, sigma):
        """EDM's x = c_skip (x + s eps) + c_out F, solved for F = p x + q eps;
        v_prediction's c_out is the negative of epsilon's."""
        root = (alpha.square() * self.sigma_data ** 2 + sigma.square()).sqrt()
        sign = {"epsilon": 1, "v_prediction": -1}[prediction]
        return sign * sigma / (self.sigma_data * root), -sign * self.sigma_data * alpha / root


class FlowSchedule:
    """Flow matching, called like Schedule: z = (1 - sigma) x + sigma eps, and the network gives
    u = eps - x. At t = 1 z is pure noise, alpha = 0, and nothing is singular: (x, eps) = (z - u, z).
    Clock: sigma = s t / (1 + (s - 1) t), the shift s > 0 of the model's own sampler, which spends
    more of its steps near noise the larger s. sigma/alpha = s t / (1 - t).
    The network is told 1000 sigma; floor = 1/1000 is where its training ends.
    Raises UserError unless the shift is above 0."""
    floor, timesteps = 1 / 1000, None                       # any t is a time of the network

    def __init__(self, shift=1.0):
        if not 0 < shift < float("inf"):
            raise UserError(f"a flow scheduler with shift {shift}: must be above 0; correct its "
                            "scheduler_config.json")
        self.shift, self.key = shift, ("flow", shift)

    def __call__(self, t):
        check_times(t)
        t = t.double().clamp(0, 1)
        whole = 1 + (self.shift - 1) * t
        return (1 - t) / whole, self.shift * t / whole

    def time_of(self, sigma_karras):
        return 1 / (1 + self.shift / sigma_karras.double())

    def timestep(self, t):
        return (1000 * self(t)[1]).float()

    def network_input(self, z, alpha, sigma):
        return z

    def output(self, prediction, alpha, sigma):
        return PREDICTIONS[prediction](alpha, sigma)


def to_pair(output, z, prediction, a, b):
    """Solve {z = a x + b eps, output = p x + q eps} for the pair. prediction: (p, q).
    All broadcast with z.
    Returns: (x_hat, eps_hat). Singular only where the network says nothing about the pair (epsilon
    at alpha = 0)."""
    p, q = prediction
    determinant = a * q - b * p
    return (q * z - b * output) / determinant, (a * output - p * z) / determinant


@dataclass
class Model:
    """A network under the contract. path and windows say on which curve z lies (reflow.PATHS);
    the schedule's own by default.

    network: callable (z, timestep (B,), **cond) -> output like z; prediction: a key of
    PREDICTIONS."""
    network: object
    schedule: Schedule | EDMSchedule | FlowSchedule
    prediction: str = "epsilon"
    path: object = None
    windows: int = 1

    def coefficients(self, t, ndim=1):
        """(a_t, b_t) with z_t = a_t x + b_t eps, float64. t: (B,).  Returns: two tensors (B, 1,
        ...) with ndim axes."""
        a, b = self.path(self.schedule, t, self.windows) if self.path else self.schedule(t)
        return a.view(-1, *[1] * (ndim - 1)), b.view(-1, *[1] * (ndim - 1))

    def needs_null(self, guidance):
        """Whether a call at this guidance evaluates uncond."""
        return guidance != 1

    def __call__(self, z, t, cond, guidance=1.0, uncond=None):
        """z: (B, ...) float32; t: (B,) in (0, 1]; cond: dict of tensors (B, ...) that the network
        takes by name.
        guidance: w in out_uncond + w (out_cond - out_uncond), a number or one of each sample, (B,);
        the number 1 evaluates only cond, 0 only uncond, anything else both in one batch. uncond: dict
        like cond.  Returns: (x_hat, eps_hat), like z.
        Nothing here waits for the device."""
        alpha, sigma = (c.view(-1, *[1] * (z.ndim - 1)) for c in self.schedule(t))
        timestep, given = self.schedule.timestep(t).to(z.device), self.schedule.network_input(z, alpha, sigma)
        drawn = torch.is_tensor(guidance)
        if not drawn and guidance == 1:
            output = self.network(given, timestep, **cond)
        elif uncond is None:
            raise ValueError(f"guidance {guidance} needs uncond")
        elif not drawn and guidance == 0:
            output = self.network(given, timestep, **uncond)
        else:
            both = {key: torch.cat([uncond[key], cond[key]]) for key in cond}
            without, guided = self.network(torch.cat([given, given]), torch.cat([timestep, timestep]),
                                           **both).chunk(2)
            w = guidance.to(z).view(-1, *[1] * (z.ndim - 1)) if drawn else guidance
            output = without + w * (guided - without)
        prediction = [c.to(z.dtype).to(z.device)
                      for c in self.schedule.output(self.prediction, alpha, sigma)]
        a, b = (c.to(z.dtype).to(z.device) for c in self.coefficients(t, z.ndim))
        return to_pair(output, z, prediction, a, b)


def check_finite(values, names, meaning):
    """Raises UserError with the name of the first of values (N, ...) that is not finite everywhere.
    names: N strings; meaning: what has happened. Only on the CPU: on a GPU, looking would stop
    it."""
    if values.device.type == "cpu" and not values.isfinite().all():
        raise UserError(f"{names[(~values.isfinite().flatten(1).all(1)).nonzero()[0].item()]}: {meaning}")

PRECISIONS = DTYPES                                        # of arithmetic in training; fp16 scales its loss


# ---- guidance by a weaker model ----------------------------------------------------------------------------


@dataclass
class Guided(Model):
    """A model that --guidance leads away from a weaker one instead of from its own answer without
    text: autoguidance, Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of
    Itself". Made by guided(), which checks that the two go together."""
    guide: Model = None

    def needs_null(self, guidance):
        """Never: the guide stands in for no text."""
        return False

    def __call__(self, z, t, cond, guidance=1.0, uncond=None):
        """guidance: w in guide + w (model - guide), of the pair (x_hat, eps_hat), so that z stays a
        x_hat + b eps_hat; 1 evaluates only the model, 0 only the guide. Both get cond, neither
        with uncond. The rest: as for teacher.Model."""
        if guidance == 1:
            return super().__call__(z, t, cond)
        weak = self.guide(z, t, cond)
        if guidance == 0:
            return weak
        return tuple(w + guidance * (s - w) for w, s in zip(weak, super().__call__(z, t, cond)))


def guided(model, guide):
    """The model with its guide: its schedule, path and windows are the model's.
    Both: teacher.Model.  Returns: Guided.  Raises UserError unless z is the same mixture of x and
    eps to both at every time; windows alone may differ, on the schedule's own curve."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    if not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.coefficients(t), guide.coefficients(t))):
        raise UserError("its noise schedule or path is not the model's, and both see the same z; "
                        "give an earlier student of the same path and windows, or on path vp the teacher or "
                        "any of its students")
    return Guided(**vars(model), guide=guide)


def check_guide(guide, guidance):
    """Raises UserError if a guide is named, but not used at this guidance."""
    if guide and guidance == 1:
        raise UserError(f"--guide {guide}: not used at --guidance 1; give another --guidance, for "
                        "instance 2")
