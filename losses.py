"""Losses: pure functions of (prediction, target) that return one value per sample;
weighting and averaging belong to the caller. What is compared (eps, flow velocity, end of the
window) is a row of reflow.SPACES. And the targets of other methods, which take the chord's place, and
distribution matching, which stands beside it.

    python losses.py        # prints each loss at known points and asserts the decomposition
"""
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn


def _flat(pred, target):
    """Both as (B, D) in float32 or better. Raises ValueError if shapes differ: broadcasting would
    hide the mistake."""
    if pred.shape != target.shape or pred.ndim < 2:
        raise ValueError(f"prediction {tuple(pred.shape)} and target {tuple(target.shape)}: need one shape "
                         "(B, ...)")
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    return pred.flatten(1).to(dtype), target.flatten(1).to(dtype)


def mse(pred, target):
    """mean (p - q)^2 over all but B.  pred, target: (B, ...).  Returns: (B,), >= 0, 0 at the
    target."""
    p, q = _flat(pred, target)
    return (p - q).square().mean(1)


def pseudo_huber(pred, target, c=0.001):
    """mean (sqrt((p - q)^2 + c^2) - c): quadratic near 0 (error^2 / 2c), linear far away (|error|).
    pred, target: (B, ...).  Returns: (B,), >= 0, 0 at the target. c = 0.001 is Rectified
    Diffusion's."""
    p, q = _flat(pred, target)
    return (((p - q).square() + c * c).sqrt() - c).mean(1)


def direction_loss(pred, target):
    """1 - cos(p, q), per sample. Penalizes the angle only; blind to length.
    pred, target: (B, ...) same shape, flattened over all but B.  Returns: (B,), in [0, 2].
    0 when parallel, 1 when orthogonal, 2 when opposite; the gradient is orthogonal to pred.
    Norms are clamped at 1e-8.
    Source: ProReflow's direction term (whether it is per sample there is unknown; ours is)."""
    p, q = _flat(pred, target)
    return 1 - (p * q).sum(1) / (p.norm(dim=1).clamp_min(1e-8) * q.norm(dim=1).clamp_min(1e-8))


def decompose(pred, target):
    """The squared error, split exactly into magnitude and direction, over D = numbers per sample:
    mean (p - q)^2 = (|p| - |q|)^2 / D + 2 |p||q| (1 - cos) / D.
    pred, target: (B, ...).  Returns: (magnitude, direction), each (B,), >= 0;
    their sum is mse(pred, target)."""
    p, q = _flat(pred, target)
    p_norm, q_norm = p.norm(dim=1), q.norm(dim=1)
    magnitude = (p_norm - q_norm).square() / p.shape[1]
    direction = 2 * (p_norm * q_norm - (p * q).sum(1)) / p.shape[1]
    return magnitude, direction


def aligned(value, pred, target, direction_weight):
    """Aligned v-prediction: value + alpha (1 - cos(p, q)), alpha = direction_weight >= 0.
    value: (B,), a loss of the same samples; pred, target: (B, ...), velocities.  Returns: (B,).
    Source: ProReflow, with value = MSE; its alpha is unknown, and so is the space of its cosine."""
    return value + direction_weight * direction_loss(pred, target) if direction_weight else value


# ---- Simple ReFlow: any invertible linear map before the square, any positive weight after it --------------
# Neither moves the minimum, the posterior mean, which is why the paper allows these two and no perceptual
# loss.


def high_pass(z, weight, radius=0.1):
    """phi(z) = z + weight HPF(z), over the last two axes, each channel by itself.
    HPF keeps the frequencies of at least radius times the highest one, sqrt(1/2) cycles per pixel
    (the corner of the spectrum), and is an orthogonal projector:
    |phi(z)|^2 = |z|^2 + (weight^2 + 2 weight) |HPF(z)|^2, and phi with -weight / (1 + weight) is the inverse.
    z: (..., h, w), real, any h and w; weight > -1, 0 is the identity; radius in [0, 1].
    Returns: like z, float32 or better.
    Raises ValueError outside these ranges.  Source: Simple ReFlow, whose weight and radius are
    unknown; 0.1 is our default."""
    if z.ndim < 3 or not weight > -1 or not 0 <= radius <= 1:
        raise ValueError(f"shape {tuple(z.shape)}, weight {weight:g}, radius {radius:g}: need (..., h, w), "
                         "weight > -1 (phi must be invertible) and radius in [0, 1]")
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # there is no FFT of bfloat16
    height, width = z.shape[-2:]
    vertical = torch.fft.fftfreq(height, device=z.device)
    horizontal = torch.fft.rfftfreq(width, device=z.device)
    # even in both frequencies, so that what comes back is real; a little less, so that rounding leaves the
    # corner in at radius 1
    kept = vertical[:, None].square() + horizontal.square() >= radius ** 2 / 2 * (1 - 1e-6)
    return torch.fft.irfft2(torch.fft.rfft2(z) * (1 + weight * kept), s=(height, width))


def high_pass_loss(pred, target, weight=1.0, radius=0.1):
    """mean (phi(p - q) / (1 + weight))^2 over all but B: the highest frequencies count as in mse,
    those below radius by 1 / (1 + weight)^2 of it. Without the division the size of the loss, and
    of its gradients, would grow with weight^2.
    pred, target: (B, ..., h, w).  Returns: (B,), >= 0, 0 at the target, mse at weight = 0.
    weight and radius: of high_pass; ours."""
    p, q = _flat(pred, target)
    return (high_pass((p - q).view(pred.shape), weight, radius) / (1 + weight)).square().flatten(1).mean(1)


def normalized(value, log_predicted, floor=1e-4):
    """Each sample's loss over what is usual at its (z_t, t), so that no region outweighs the
    others, and the regression that teaches log_predicted what is usual: value / sg[max(exp(p),
    floor)] + (sg[log max(value, floor)] - p)^2. The first part moves the student alone, the second
    the normalizer alone (LossNormalizer), towards E[log value].
    value: (B,), >= 0; log_predicted: (B,), p; floor > 0: below it a loss counts as that small.
    Returns: (B,), >= 0.
    Source: Simple ReFlow's w(x_t, t) = 1 / sg[E loss]; that it learns the denominator, and how, is
    our guess."""
    _check_normalizer(value, log_predicted, floor)
    usual = log_predicted.detach().exp().clamp_min(floor)
    return value / usual + (value.detach().clamp_min(floor).log() - log_predicted).square()


def self_normalized(value, floor=1e-4):
    """value / sg[max(value, floor)]: w = 1 / sg[loss] read literally, sample by sample.
    Above floor it is the constant 1 with the gradient of log value (so log `value`, not this);
    below, an ordinary loss, as 1 / value has no bound.
    value: (B,), >= 0.  Returns: (B,), in [0, 1].  Source: Simple ReFlow, as for normalized;
    the floor is ours."""
    _check_normalizer(value, value, floor)
    return value / value.detach().clamp_min(floor)


def _check_normalizer(value, log_predicted, floor):
    if value.ndim != 1 or value.shape != log_predicted.shape or not floor > 0:
        raise ValueError(f"loss {tuple(value.shape)}, predicted {tuple(log_predicted.shape)}, floor "
                         f"{floor:g}: need (B,) twice and floor > 0")


class LossNormalizer(nn.Module):
    """A small network that predicts E[log loss | z_t, t], for `normalized`. Stages of a 3x3
    convolution that halves the picture, each given the time; their mean over the picture;
    two linear layers, the last zero: 0 before training, every weight 1.
    channels: of the latent; width: of the first stage, doubled by each.  z: (B, channels, h, w),
    any h and w; t: (B,), in (0, 1].
    Returns: (B,), float32. Half a million parameters, for a learning rate of about 1e-3.
    Shape and sizes are ours."""

    def __init__(self, channels, width=32, stages=4):
        super().__init__()
        widths = [channels, *(width * 2 ** i for i in range(stages))]
        self.embed = nn.Sequential(Timesteps(128, flip_sin_to_cos=True, downscale_freq_shift=0),
                                   TimestepEmbedding(128, 128))
        self.times = nn.ModuleList(nn.Linear(128, out) for out in widths[1:])
        self.stages = nn.ModuleList(nn.Conv2d(before, out, 3, stride=2, padding=1)
                                    for before, out in zip(widths, widths[1:]))
        self.head = nn.Sequential(nn.Linear(widths[-1], 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, z, t):
        z, time = z.float(), self.embed(1000 * t.float().to(z.device))          # sinusoids made for timesteps
        for stage, shift in zip(self.stages, self.times):
            z = nn.functional.leaky_relu(stage(z) + shift(time)[:, :, None, None], 0.2)
        return self.head(z.mean((2, 3)))[:, 0]


LOSSES = {"mse": mse, "pseudo-huber": pseudo_huber, "high-pass": high_pass_loss}

# (values (B,), function that evaluates the normalizer) -> what is minimized
NORMALIZATIONS = {"none": lambda value, predict: value,
                  "learned": lambda value, predict: normalized(value, predict()),
                  "per-sample": lambda value, predict: self_normalized(value)}


# ---- targets of other methods ------------------------------------------------------------------------------
# What stands at a window's end where it is neither cached nor solved: it is made of one answer of the teacher
# and of answers of the student that is trained, without gradients.
# teacher, student: (z, t) -> (x_hat, eps_hat); schedule: t -> (alpha, sigma); z: (B, ...), at the time that
# the function names; times: float64 (B,); steps: of the teacher from t = 1 to 0.  Returns: z_end, like z.


def levels(schedule, t, z):
    """(alpha_t, sigma_t), (B, 1, ...) like z."""
    return [like(c, z) for c in schedule(t)]


def like(values, z):
    """One number per sample, (B,), to broadcast with z (B, ...): its dtype, its device."""
    return values.view(-1, *[1] * (z.ndim - 1)).to(z.dtype).to(z.device)


def noised(schedule, t, x, eps):
    """alpha_t x + sigma_t eps.  x, eps: (B, ...)."""
    alpha, sigma = levels(schedule, t, x)
    return alpha * x + sigma * eps


def consistency(teacher, student, schedule, z, t, t_start, t_end, steps):
    """z at t: the student's own prediction of the data, one step of the teacher nearer to it.
    Source: latent consistency models (Luo et al. 2023), without their skip and output scales."""
    nearer = (t - 1 / steps).clamp_min(0)
    z_near = noised(schedule, nearer, *teacher(z, t))
    jump = noised(schedule, t_end, *student(z_near, nearer.clamp_min(schedule.floor)))
    return torch.where(like(nearer, z) > 0, jump, z_near)


def imitation(teacher, student, schedule, z, t, t_start, t_end, steps):
    """z at t_start: the student's answer draws a line over the window; the teacher is evaluated at t on that
    line, and its velocity there carries z to the window's end. Needs no image and no trajectory. What it
    comes to is the mean of these velocities, the exact step only where the teacher is straight.
    Source: policy imitation, pi-Flow (Chen et al. 2025), with one point per window."""
    x, eps = teacher(noised(schedule, t, *student(z, t_start)), t)
    return carried(schedule, z, t_start, t_end, eps - x)


def flow_map(teacher, student, schedule, z, t, t_start, t_end, steps, d=0.005):
    """z at t: the mean velocity from t to t_end is the velocity at t, less the time that is left times
    the mean velocity's own change along the trajectory, here a difference of the student's answers d
    before and after t, within the window.
    Source: MeanFlow's identity; differences as in AnyFlow (2026) and Align Your Flow (Sabour et al. 2025),
    with their d = 5/1000. Their second time is our window's end, so the network needs none."""
    x, eps = teacher(z, t)

    def tau(t):                                # the clock in which z / (alpha + sigma) moves with velocity u
        alpha, sigma = schedule(t)
        return sigma / (alpha + sigma)
    before, after = torch.minimum(t + d, t_start), torch.maximum(t - d, (t + t_end) / 2)
    after = after.clamp_min(schedule.floor)
    x_b, eps_b = student(noised(schedule, before, x, eps), before)
    x_a, eps_a = student(noised(schedule, after, x, eps), after)
    left = like((tau(t) - tau(t_end)) / (tau(before) - tau(after)), z)
    return carried(schedule, z, t, t_end, eps - x - left * ((eps_b - x_b) - (eps_a - x_a)))


def carried(schedule, z, t, t_end, u):
    """Where the constant flow velocity u = eps - x carries z from t to t_end."""
    alpha, sigma = levels(schedule, t, z)
    x = (z - sigma * u) / (alpha + sigma)
    return noised(schedule, t_end, x, x + u)


TARGETS = {"consistency": consistency, "imitation": imitation, "flow-map": flow_map}

# ---- distribution matching ---------------------------------------------------------------------------------


def matching(teacher, critic, schedule, x, t, eps, space=(-1.0, 1.0), floor=1e-3):
    """What the squared error cannot tell: whether the student's samples x, all of them together, are
    distributed as the teacher's. Noised to t they are shown to the teacher and to a critic, a second
    network that learns from them alone what the student makes. Where the two disagree about what is
    under the noise, x moves from the critic's answer to the teacher's, so from what is likelier of the
    student to what is likelier of the teacher, in units of the teacher's own distance from x. A student
    with the teacher's distribution is at rest: then they agree.
    teacher, critic: (z, t) -> (x_hat, eps_hat); x: (B, ...), what the student made of noise in all of
    its steps; t: float64 (B,), in (0, 1]; eps: like x; space: (p, q), of reflow.SPACES, what the critic
    is judged in; floor > 0: the least distance.
    Returns: (mean squared move / 2, (B,), whose gradient in x is that move over the numbers of a sample
    and reaches nothing else; the critic's own loss, (B,), whose gradient reaches the critic alone).
    Source: distribution matching distillation (Yin et al. 2024), with a regression beside it as there:
    here reflow. Space and floor are ours."""
    made = x.detach()
    z = noised(schedule, t, made, eps)
    x_critic, eps_critic = critic(z, t)
    with torch.no_grad():
        x_teacher, _ = teacher(z, t)
        distance = (made - x_teacher).abs().flatten(1).mean(1).clamp_min(floor)
        move = (x_teacher - x_critic) / like(distance, x)
    p, q = (value if isinstance(value, float) else like(value, x) for value in space)
    return mse(x, made + move) / 2, mse(p * x_critic + q * eps_critic, p * made + q * eps)


if __name__ == "__main__":
    target = torch.tensor([[3.0, 4.0]]).repeat(5, 1)
    points = {"at the target": [3, 4], "twice as long": [6, 8], "turned 90 degrees": [-4, 3],
              "opposite": [-3, -4], "zero": [0, 0]}
    pred = torch.tensor(list(points.values()), dtype=torch.float32)
    magnitude, direction = decompose(pred, target)
    assert torch.allclose(magnitude + direction, mse(pred, target))
    print(f"{'target (3, 4), prediction':30} {'mse':>8} {'magnitude':>10} {'direction':>10} {'1 - cos':>8} "
          f"{'p-huber':>8}")
    for row in zip(points, mse(pred, target), magnitude, direction, direction_loss(pred, target),
                   pseudo_huber(pred, target)):
        print(f"{row[0]:30} {row[1]:8.3f} {row[2]:10.3f} {row[3]:10.3f} {row[4]:8.3f} {row[5]:8.3f}")
