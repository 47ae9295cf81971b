"""The method: windows, their chord, the paths through it, the curriculum and the recipes.
Tensors in, tensors out.

Time runs from t = 0 (data) to t = 1 (noise): z_t = alpha_t x + sigma_t eps. Cut time into K
windows. The two ends of a trajectory in a window, z_start and z_end, are two equations in two
unknowns: exactly one pair (x*, eps*), the chord, explains both. Reflow trains the student to answer
with the chord everywhere between the two ends. Once it does, its trajectory is straight over the
window, and one step crosses it.

Here is the method, complete; tools/flow2d.py runs it on a flow in the plane, train.py on diffusion
models.
"""
import contextlib
import functools
import math
from dataclasses import dataclass

import torch

import losses

# ---- windows -----------------------------------------------------------------------------------------------


def boundaries(windows):
    """The K+1 times that cut (0, 1] into K windows, in sampling order: (1, (K-1)/K, ..., 0).
    On Stable Diffusion's grid these are the timesteps 1000 k/K - 1, exact for any K;
    the last one, "timestep -1", is clean data. Boundaries of 8, 4, 2 and 1 windows nest."""
    if windows < 1:
        raise ValueError(f"windows = {windows}: at least 1 is needed")
    return tuple(k / windows for k in range(windows, -1, -1))


def window_of(t, windows):
    """The window (t_end, t_start] that holds t. t: tensor in (0, 1].  Returns: (t_start, t_end),
    tensors like t."""
    k = torch.ceil(t * windows - 1e-5).clamp(1, windows)      # the tolerance keeps 0.1 * 10 in its own window
    return k / windows, (k - 1) / windows


def check_curriculum(stages):
    """Raises ValueError unless each window count divides the one before it (so that windows merge,
    never split)."""
    if not stages or min(stages) < 1:
        raise ValueError(f"stages {stages}: at least one stage of at least one window is needed")
    for before, after in zip(stages, stages[1:]):
        if after >= before or before % after:
            raise ValueError(f"stages {stages}: {before} windows do not merge into {after}; each count must "
                             "divide the one before")


# ---- the chord ---------------------------------------------------------------------------------------------


def chord(z_start, z_end, start, end):
    """The pair (x, eps) that explains both ends of a window: solves z_start = alpha_s x + sigma_s
    eps, z_end = alpha_e x + sigma_e eps (design: the determinant is never 0 while t_start > t_end).
    z_start, z_end: (B, ...).  start, end: pairs (alpha, sigma) of tensors that broadcast with z.
    Returns: (x, eps)."""
    (alpha_s, sigma_s), (alpha_e, sigma_e) = start, end
    determinant = alpha_s * sigma_e - alpha_e * sigma_s
    x = (sigma_e * z_start - sigma_s * z_end) / determinant
    eps = (alpha_s * z_end - alpha_e * z_start) / determinant
    return x, eps


# A path says where the student meets the chord at time t: z_t = a_t x* + b_t eps*. Every path agrees with the
# noise schedule at the two ends of the window.


def vp_path(schedule, t, windows):
    """The schedule's own curve: (a_t, b_t) = (alpha_t, sigma_t). Rectified Diffusion;
    also Simple ReFlow's x_t = (1-t) x0 + t x1, which is the same curve run at another speed.
    The student never leaves the teacher's noise levels."""
    return schedule(t)


def linear_path(schedule, t, windows):
    """PeRFlow's, and so probably ProReflow's: z runs in a straight line from z_start to z_end,
    linear in t. As both ends are mixtures of x* and eps*, so is everything between: a_t and b_t are
    linear in t too."""
    t_start, t_end = window_of(t, windows)
    (a_s, b_s), (a_e, b_e) = schedule(t_start), schedule(t_end)
    progress = ((t_start - t) / (t_start - t_end)).to(a_s)
    return a_s + progress * (a_e - a_s), b_s + progress * (b_e - b_s)


PATHS = {"vp": vp_path, "linear": linear_path}

# ---- the space of the loss ---------------------------------------------------------------------------------
# Whatever is compared between student and chord is p x + q eps.
# Each row: (schedule, t_start, t_end) -> (p, q).


def eps_space(schedule, t_start, t_end):
    """Noise, as most trainers do. An error in x is sigma/alpha times the error in eps (14.6 at SD's
    last timestep), so this space hardly sees the errors that few steps are made of."""
    return 0.0, 1.0


def flow_space(schedule, t_start, t_end):
    """The flow velocity u = eps - x."""
    return -1.0, 1.0


def clean_space(schedule, t_start, t_end):
    """The clean latent x. For a network that predicts x, where eps_hat = (z - alpha x_hat) / sigma,
    the spaces that contain eps weigh its error by alpha / sigma, without bound as t goes to 0."""
    return 1.0, 0.0


def window_velocity_space(schedule, t_start, t_end):
    """The mean velocity over the window, (z_end - z_start) / (t_end - t_start): PeRFlow's
    `velocity`."""
    (a_s, b_s), (a_e, b_e) = schedule(t_start), schedule(t_end)
    width = (t_end - t_start).to(a_s)
    return (a_e - a_s) / width, (b_e - b_s) / width


def end_space(schedule, t_start, t_end):
    """The latent at the end of the window: Rectified Diffusion's."""
    return schedule(t_end)


SPACES = {"eps": eps_space, "u": flow_space, "x": clean_space, "velocity": window_velocity_space,
          "end": end_space}

# ---- time laws: where in (0, 1] the student is evaluated; u uniform in [0, 1) -> t -------------------------
# `uniform` and `starts` are laws of our t. The others are published for straight flows, z = (1 - tau) x + tau
# eps, and so are laws of the noise level sigma_karras = tau / (1 - tau): they draw tau, CUMULATIVE has the
# share of draws at or below tau, and draw_times goes on to the t at which the model's own schedule has that
# level. All but `starts` ignore windows.


def uniform(u, windows):
    """t uniform in (0, 1]."""
    return 1 - u


def starts(u, windows, share=0.5):
    """A share of the draws exactly at the start of a uniform window, the rest uniform.
    The student's target jumps at each boundary, from one window's chord to the next one's, and a
    sampler with one step per window evaluates it exactly there: a network that is smooth in t must
    learn which side counts."""
    at_start = u < share
    t = (1 - torch.where(at_start, u / share, (u - share) / (1 - share))).clamp_min(2 ** -53)
    return torch.where(at_start, window_of(t, windows)[0], t)


def exponential(u, windows, base=10.0):
    """More often near noise: density base^tau ln(base) / (base - 1). base > 0 and not 1;
    below 1, more often near data.
    Source: Simple ReFlow, with its base 10."""
    _check_base(base)
    return (torch.log1p((1 - u) * (base - 1)) / math.log(base)).clamp(2 ** -53, 1)


def exponential_cumulative(tau, base=10.0):
    _check_base(base)
    return (base ** tau - 1) / (base - 1)


def _check_base(base):
    if not base > 0 or base == 1:
        raise ValueError(f"base = {base:g}: must be above 0 and not 1 (which would be the uniform law)")


def cosh(u, windows, a=4.0):
    """More often near both ends: density a cosh(a (tau - 1/2)) / (2 sinh(a / 2)), a > 0.
    Source: Lee et al. 2024 (Improving the training of rectified flows), with their a = 4."""
    return (0.5 + torch.asinh((1 - 2 * u) * math.sinh(a / 2)) / a).clamp(2 ** -53, 1)


def cosh_cumulative(tau, a=4.0):
    return 0.5 + torch.sinh(a * (tau - 0.5)) / (2 * math.sinh(a / 2))


def log_normal(u, windows, mean=-1.2, std=1.2):
    """ln sigma_karras = logit(tau) is normal with this mean and standard deviation: the median
    level is exp(-1.2) = 0.301.
    Source: Karras et al. 2022 (EDM), table 1."""
    return torch.sigmoid(mean + std * torch.special.ndtri(1 - u)).clamp_min(2 ** -53)


def log_normal_cumulative(tau, mean=-1.2, std=1.2):
    return torch.special.ndtr((torch.logit(tau) - mean) / std)


TIME_LAWS = {"uniform": uniform, "starts": starts, "exponential": exponential, "cosh": cosh,
             "log-normal": log_normal}

CUMULATIVE = {"exponential": exponential_cumulative, "cosh": cosh_cumulative,
              "log-normal": log_normal_cumulative}


def draw_times(recipe, u, windows, schedule):
    """The times that a recipe trains at. u: float64 (N,), uniform in [0, 1), CPU.
    Returns: float64 (N,), in (0, 1].
    A law of the noise level is truncated to the levels of the schedule, from its floor to t = 1.
    With time_inside, every law is one of the place within the window, and all windows are equally
    likely."""
    law, cumulative = TIME_LAWS[recipe.time_law], CUMULATIVE.get(recipe.time_law)
    if recipe.time_law == "starts":
        law = functools.partial(law, share=recipe.starts_share)
    if recipe.time_law == "exponential":
        law, cumulative = (functools.partial(each, base=recipe.time_base) for each in (law, cumulative))
    if recipe.time_inside:
        window = (u * windows).floor()
        return (window + law(u * windows - window, 1)) / windows
    if cumulative is None:
        return law(u, windows)
    alpha, sigma = schedule(torch.tensor([schedule.floor, 1], dtype=torch.float64))
    low, high = cumulative(sigma / (alpha + sigma))
    tau = law(1 - low - (1 - u) * (high - low), windows)
    return schedule.time_of(tau / (1 - tau)).clamp_min(schedule.floor)


# ---- recipes are data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One way to train. What a paper leaves unknown is our value, and docs/equations.md says so."""
    stages: tuple = (8, 4, 2, 1)         # windows of each stage, trained in this order
    shares: tuple = (1, 1, 1, 1)         # share of the updates that each stage gets
    pairs: str = "trajectory"            # where (z_start, z_end) come from: trajectory, data, student,
                                         # consistency, imitation or flow-map, as pairs.py says
    path: str = "vp"                     # how the student meets the chord, a row of PATHS: vp or linear
    space: str = "u"                     # what the loss compares, a row of SPACES: eps, u, x, velocity or
                                         # end; of a teacher that predicts x: x or end
    loss: str = "mse"                    # a row of losses.LOSSES: mse, pseudo-huber or high-pass
    high_pass_weight: float = 1.0        # lambda of the high-pass loss, above -1; 0 is mse
    high_pass_radius: float = 0.1        # where its high frequencies begin, as a share of the highest
    normalization: str = "none"          # of each sample's loss: none, learned or per-sample
    direction_weight: float = 0.0        # alpha of aligned v-prediction: alpha (1 - cos)
    direction_space: str = "u"           # what that cosine compares, a row of SPACES, as space
    matching: float = 0.0                # in the last stage, weight of distribution matching: what a student
                                         # makes of new noise goes where the teacher finds it likelier
    time_law: str = "starts"             # a row of TIME_LAWS: uniform, starts, exponential, cosh or
                                         # log-normal
    starts_share: float = 0.5            # of the law `starts`: of all draws, those at the starts themselves
    time_base: float = 10.0              # of the exponential law; above 0 and not 1
    time_inside: bool = False            # the law inside each window, all windows equally often, instead of
                                         # on the whole axis
    solver_steps: int = 32               # teacher's DDIM steps from t = 1, noise, to t = 0, data
    forward_rate: float = 0.0            # rho: share of trajectories that run from real data to noise
    projection: float = 0.0              # how far the generated ends are moved towards true samples, down
                                         # the gradient of a Sinkhorn divergence; 0 = not at all, 1 = a step
    dropout: float = 0.0                 # of the student while it trains
    reuse: int = 1                       # times t drawn for each pair, in the same update


RECIPES = {
    # ours: prompts are all it needs; ProReflow's curriculum with Simple ReFlow's loss, which the study
    # best-of-both chose
    "default": Recipe(shares=(1, 1, 2, 4), loss="high-pass", direction_weight=0.1),
    # straight to one window
    "reflow": Recipe(stages=(1,), shares=(1,), direction_weight=0.1),
    # a student of one window made better in one step: give it with --init
    "matched": Recipe(stages=(1,), shares=(1,), direction_weight=0.1, matching=0.3),
    # its time law is unknown: `starts` is ours
    "proreflow": Recipe(stages=(8, 4, 2, 1), shares=(1, 1, 1, 1), pairs="student", path="linear",
                        space="velocity", direction_weight=0.1, direction_space="velocity"),
    "perflow": Recipe(stages=(4,), shares=(1,), pairs="data", path="linear", space="eps", time_law="uniform"),
    "rectified-diffusion": Recipe(stages=(4,), shares=(1,), pairs="data", space="end", loss="pseudo-huber",
                                  solver_steps=40, time_law="uniform"),
    "2-reflow": Recipe(stages=(1,), shares=(1,), path="linear", space="velocity", time_law="uniform"),
    # the peer: latent consistency
    "lcm": Recipe(stages=(1,), shares=(1,), pairs="consistency", space="end", loss="pseudo-huber",
                  time_law="uniform", solver_steps=50),
    # peers of 2025-26, as losses.py says; columns that their papers do not tell are ours
    "imitation": Recipe(stages=(1,), shares=(1,), pairs="imitation", time_law="uniform"),
    "flow-map": Recipe(stages=(1,), shares=(1,), pairs="flow-map", time_law="uniform"),
    # no projection: ours is not known to help (docs/log.md)
    "simple-reflow": Recipe(stages=(1,), shares=(1,), loss="high-pass", normalization="learned",
                            time_law="exponential", forward_rate=0.5),
}


def stage_updates(recipe, updates):
    """Updates of each stage; they sum to updates, and every stage gets at least one.
    Returns: tuple of int."""
    if updates < len(recipe.stages):
        raise ValueError(f"updates = {updates}: {len(recipe.stages)} stages need at least as many updates")
    stages = len(recipe.stages)
    cuts = [round(updates * sum(recipe.shares[:i]) / sum(recipe.shares)) for i in range(stages + 1)]
    cuts = [min(max(cut, i), updates - (stages - i)) for i, cut in enumerate(cuts)]
    return tuple(after - before for before, after in zip(cuts, cuts[1:]))


# ---- what is minimized -------------------------------------------------------------------------------------


def student_loss(model, ends, times, cond, recipe, normalizer=None, autocast=None):
    """The one place where a window's two ends become a loss: noise the chord to z_t, evaluate the
    student there, compare.

    model: the student under the contract, (z, t, cond) -> (x_hat, eps_hat); ends: (z_start, z_end),
    float32 (B, ...) each;
    times: (t, t_start, t_end), float64 (B,) each, t in (t_end, t_start]; cond: dict of tensors (B,
    ...);
    recipe: its path is the model's; space, loss, direction term and normalization are read here;
    normalizer: (z, t) -> predicted log loss (B,), for normalization "learned";
    autocast: context of the student's forward.
    Returns: (values (B,), whose mean is minimized, and a dict of what they are made of: z (B, ...),
    loss, magnitude, direction, (B,) each, magnitude + direction being the mean squared error in the
    recipe's space)."""
    (z_start, z_end), (t, t_start, t_end) = ends, times

    def like_z(pair):
        return [v.float().to(z_start.device).view(-1, *[1] * (z_start.ndim - 1)) if torch.is_tensor(v) else v
                for v in pair]

    # the chord of the window, and the student's prediction at one point of it
    # (B, ...) each
    x, eps = chord(z_start, z_end, like_z(model.schedule(t_start)), like_z(model.schedule(t_end)))
    a, b = like_z(model.coefficients(t))
    z = a * x + b * eps
    with autocast or contextlib.nullcontext():
        x_hat, eps_hat = model(z, t, cond)

    # both in the space of the loss, and in that of the direction term
    def compared(space):
        p, q = like_z(SPACES[space](model.schedule, t_start, t_end))
        return p * x_hat + q * eps_hat, p * x + q * eps
    pred, target = compared(recipe.space)
    options = dict(weight=recipe.high_pass_weight,
                   radius=recipe.high_pass_radius) if recipe.loss == "high-pass" else {}
    value = losses.LOSSES[recipe.loss](pred, target, **options)
    value = losses.aligned(value, *compared(recipe.direction_space), recipe.direction_weight)
    values = losses.NORMALIZATIONS[recipe.normalization](value, lambda: normalizer(z, t))
    magnitude, direction = losses.decompose(pred.detach(), target)
    return values, dict(z=z, loss=value.detach(), magnitude=magnitude, direction=direction)
