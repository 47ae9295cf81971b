"""Losses: pure functions of (prediction, target) that return one value per sample; weighting and averaging belong to
the caller. What is compared (eps, flow velocity, end of the window) is a row of reflow.SPACES.

    python losses.py        # prints each loss at known points and asserts the decomposition
"""
import torch


def _flat(pred, target):
    """Both as (B, D) in float32 or better. Raises ValueError if shapes differ: broadcasting would hide the mistake."""
    if pred.shape != target.shape or pred.ndim < 2:
        raise ValueError(f"prediction {tuple(pred.shape)} and target {tuple(target.shape)}: need one shape (B, ...)")
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    return pred.flatten(1).to(dtype), target.flatten(1).to(dtype)


def mse(pred, target):
    """mean (p - q)^2 over all but B.  pred, target: (B, ...).  Returns: (B,), >= 0, 0 at the target."""
    p, q = _flat(pred, target)
    return (p - q).square().mean(1)


def pseudo_huber(pred, target, c=0.001):
    """mean (sqrt((p - q)^2 + c^2) - c): quadratic near 0 (error^2 / 2c), linear far away (|error|).
    pred, target: (B, ...).  Returns: (B,), >= 0, 0 at the target. c = 0.001 is Rectified Diffusion's."""
    p, q = _flat(pred, target)
    return (((p - q).square() + c * c).sqrt() - c).mean(1)


def direction_loss(pred, target):
    """1 - cos(p, q), per sample. Penalises the angle only; blind to length.
    pred, target: (B, ...) same shape, flattened over all but B.  Returns: (B,), in [0, 2].
    0 when parallel, 1 when orthogonal, 2 when opposite; the gradient is orthogonal to pred. Norms are clamped at 1e-8.
    Source: ProReflow's direction term (whether it is per sample there is unknown; ours is)."""
    p, q = _flat(pred, target)
    return 1 - (p * q).sum(1) / (p.norm(dim=1).clamp_min(1e-8) * q.norm(dim=1).clamp_min(1e-8))


def decompose(pred, target):
    """The squared error, split exactly into magnitude and direction, over D = numbers per sample:
    mean (p - q)^2 = (|p| - |q|)^2 / D + 2 |p||q| (1 - cos) / D.
    pred, target: (B, ...).  Returns: (magnitude, direction), each (B,), >= 0; their sum is mse(pred, target)."""
    p, q = _flat(pred, target)
    p_norm, q_norm = p.norm(dim=1), q.norm(dim=1)
    magnitude = (p_norm - q_norm).square() / p.shape[1]
    direction = 2 * (p_norm * q_norm - (p * q).sum(1)) / p.shape[1]
    return magnitude, direction


def aligned(value, pred, target, direction_weight):
    """Aligned v-prediction: value + alpha (1 - cos(p, q)), alpha = direction_weight >= 0.  value: (B,), a loss of the same
    samples; pred, target: (B, ...), velocities.  Returns: (B,).
    Source: ProReflow, with value = MSE; its alpha is unknown, and so is the space of its cosine."""
    return value + direction_weight * direction_loss(pred, target) if direction_weight else value


LOSSES = {"mse": mse, "pseudo-huber": pseudo_huber}


if __name__ == "__main__":
    target = torch.tensor([[3.0, 4.0]]).repeat(5, 1)
    points = {"at the target": [3, 4], "twice as long": [6, 8], "turned 90 degrees": [-4, 3], "opposite": [-3, -4], "zero": [0, 0]}
    pred = torch.tensor(list(points.values()), dtype=torch.float32)
    magnitude, direction = decompose(pred, target)
    assert torch.allclose(magnitude + direction, mse(pred, target))
    print(f"{'target (3, 4), prediction':30} {'mse':>8} {'magnitude':>10} {'direction':>10} {'1 - cos':>8} {'p-huber':>8}")
    for row in zip(points, mse(pred, target), magnitude, direction, direction_loss(pred, target), pseudo_huber(pred, target)):
        print(f"{row[0]:30} {row[1]:8.3f} {row[2]:10.3f} {row[3]:10.3f} {row[4]:8.3f} {row[5]:8.3f}")
