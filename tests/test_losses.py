"""Identities of losses.py: zero at the target, exact decomposition, limits, the high-pass map, normalized losses, gradients."""
import math

import pytest
import torch

import losses
import reflow


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("loss", [*losses.LOSSES.values(), losses.direction_loss])
def test_zero_at_the_target_and_one_value_per_sample(loss, pair):
    p, q = pair
    assert loss(p, q).shape == (5,) and (loss(p, q) > 0).all()
    assert loss(q, q).abs().max() < 1e-12


def test_squared_error_splits_exactly_into_magnitude_and_direction(pair):
    p, q = pair
    magnitude, direction = losses.decompose(p, q)
    assert torch.allclose(magnitude + direction, losses.mse(p, q), atol=1e-14)
    assert losses.decompose(3 * q, q)[1].abs().max() < 1e-12                     # parallel: all magnitude
    turned = p * (q.flatten(1).norm(dim=1) / p.flatten(1).norm(dim=1))[:, None, None]
    assert losses.decompose(turned, q)[0].abs().max() < 1e-12                    # same length: all direction


def test_direction_is_0_1_2_for_parallel_orthogonal_opposite_and_blind_to_length():
    q = torch.tensor([[1.0, 2.0]])
    for p, expected in (([3, 6], 0), ([-2, 1], 1), ([-5, -10], 2)):
        assert losses.direction_loss(torch.tensor([p]).float(), q).item() == pytest.approx(expected, abs=1e-6)


def test_direction_gradient_is_orthogonal_to_the_prediction(pair):
    p, q = pair[0].clone().requires_grad_(), pair[1]
    losses.direction_loss(p, q).sum().backward()
    assert (p.grad * p).flatten(1).sum(1).abs().max() < 1e-12 and p.grad.abs().max() > 1e-3


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    zero = torch.zeros(1, 4, dtype=torch.float64)
    near, far = losses.pseudo_huber(zero + 1e-6, zero, c=1e-3).item(), losses.pseudo_huber(zero + 100, zero, c=1e-3).item()
    assert near == pytest.approx(1e-12 / 2e-3, rel=1e-5)
    assert far == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("loss", [*losses.LOSSES.values(), losses.direction_loss])
def test_gradients_against_finite_differences(loss, pair):
    p, q = pair
    assert torch.autograd.gradcheck(lambda x: loss(x, q), p.clone().requires_grad_())


def test_aligned_adds_the_weighted_direction(pair):
    p, q = pair
    value = losses.pseudo_huber(q, p)
    assert torch.equal(losses.aligned(value, p, q, 0.0), value)
    assert torch.allclose(losses.aligned(value, p, q, 0.5), value + 0.5 * losses.direction_loss(p, q))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="4, 1"):
        losses.mse(torch.zeros(4, 1), torch.zeros(4, 4))
    assert losses.mse(torch.zeros(4, 4), torch.ones(4, 4)).tolist() == [1] * 4       # batch equal to width


# ---- the high-pass map ---------------------------------------------------------------------------------------------

SIZES = [(8, 8), (7, 9), (6, 5), (1, 4), (3, 1), (32, 32)]


def image(height, width, seed=0):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frequencies(height, width):
    """Cycles per pixel of each number of fft2, by hand: indices above the middle are negative frequencies."""
    signed = [[(i if 2 * i < n else i - n) / n for i in range(n)] for n in (height, width)]
    return torch.tensor([[math.hypot(y, x) for x in signed[1]] for y in signed[0]], dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", [-0.5, 0.0, 1.0, 1000.0])
def test_high_pass_is_the_whole_complex_transform_with_a_centred_mask(size, weight):
    e, radius = image(*size), 0.4
    mask = 1 + weight * (frequencies(*size) >= radius * math.sqrt(0.5))
    expected = torch.fft.ifft2(torch.fft.fft2(e) * mask)
    found = losses.high_pass(e, weight, radius)
    assert found.dtype == e.dtype and found.shape == e.shape
    assert expected.imag.abs().max() < 1e-10 * (1 + weight)                          # Hermitian: nothing imaginary is dropped
    assert torch.allclose(found, expected.real, atol=1e-10 * (1 + abs(weight)))


def test_high_pass_multiplies_a_wave_by_1_or_by_1_plus_the_weight():
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    for ky, kx, kept in ((0, 0, False), (2, 1, False), (2, 2, True), (0, 3, True), (16, 16, True)):    # cut at 0.1 x 22.6 = 2.26 bins
        wave = torch.cos(2 * math.pi * (ky * y + kx * x).double() / 32)[None, None]
        assert torch.allclose(losses.high_pass(wave, 5.0), wave * (6 if kept else 1), atol=1e-6), (ky, kx)
    assert (frequencies(32, 32) < 0.1 * math.sqrt(0.5)).sum() == 21


@pytest.mark.parametrize("size", SIZES)
def test_high_pass_is_linear_symmetric_invertible_and_the_identity_at_weight_0(size):
    e, f = image(*size), image(*size, seed=1)

    def phi(z):
        return losses.high_pass(z, 3.0, 0.3)
    assert torch.allclose(phi(2 * e - f), 2 * phi(e) - phi(f), atol=1e-10)
    assert (phi(e) * f).sum().item() == pytest.approx((e * phi(f)).sum().item(), rel=1e-9)
    assert torch.allclose(losses.high_pass(phi(e), -3 / 4, 0.3), e, atol=1e-10)
    assert torch.allclose(losses.high_pass(e, 0.0), e, atol=1e-12)


def test_high_pass_norm_is_parsevals_sum_over_the_spectrum():
    e, weight, radius = image(7, 9), 3.0, 0.3
    power = torch.fft.fft2(e).abs().square() / (7 * 9)
    high = power * (frequencies(7, 9) >= radius * math.sqrt(0.5))
    expected = power.sum((1, 2, 3)) + (weight ** 2 + 2 * weight) * high.sum((1, 2, 3))
    assert torch.allclose(losses.high_pass(e, weight, radius).square().sum((1, 2, 3)), expected)
    assert 0 < high.sum() < power.sum()


def test_high_pass_keeps_all_at_radius_0_and_only_the_corner_at_radius_1():
    e = image(8, 8)
    assert torch.allclose(losses.high_pass(e, 2.0, 0.0), 3 * e)
    corner = torch.tensor([[(-1.0) ** (i + j) for j in range(8)] for i in range(8)], dtype=torch.float64)
    projection = (e * corner).mean((2, 3), keepdim=True) * corner
    assert torch.allclose(losses.high_pass(e, 2.0, 1.0), e + 2 * projection)


def test_high_pass_loss_is_mse_at_weight_0_and_never_above_it_for_weight_above_0():
    p, q = image(8, 6), image(8, 6, seed=1)
    assert torch.allclose(losses.high_pass_loss(p, q, 0.0), losses.mse(p, q))
    values = [losses.high_pass_loss(p, q, weight) for weight in (0.0, 1.0, 10.0, 1e6)]
    assert all((after < before).all() for before, after in zip(values, values[1:]))
    fine = torch.tensor([[(-1.0) ** (i + j) for j in range(6)] for i in range(8)], dtype=torch.float64).expand(2, 3, 8, 6)
    assert torch.allclose(losses.high_pass_loss(q + fine, q, 7.0), losses.mse(q + fine, q))          # high frequencies count in full
    assert torch.allclose(losses.high_pass_loss(q + 1, q, 7.0), losses.mse(q + 1, q) / 64)           # an error of the mean does not


def test_high_pass_computes_low_precision_in_float32():
    e = image(8, 8)
    found = losses.high_pass(e.bfloat16(), 1.0)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), losses.high_pass(e, 1.0), atol=0.05)


def test_high_pass_that_cannot_be_inverted_or_filtered_is_refused():
    for shape, weight, radius in (((2, 3, 4, 4), -1.0, 0.1), ((2, 3, 4, 4), float("nan"), 0.1), ((2, 3, 4, 4), 1.0, -0.1),
                                  ((2, 3, 4, 4), 1.0, 1.1), ((2, 3), 1.0, 0.1)):
        with pytest.raises(ValueError, match="weight > -1"):
            losses.high_pass(torch.zeros(shape), weight, radius)
    with pytest.raises(ValueError, match="4, 1"):
        losses.high_pass_loss(torch.zeros(4, 1, 2, 2), torch.zeros(4, 4, 2, 2))


# ---- normalized losses ---------------------------------------------------------------------------------------------


def test_normalized_weighs_the_student_and_teaches_the_normalizer_apart():
    value = torch.tensor([0.5, 2.0, 0.01], dtype=torch.float64, requires_grad=True)
    predicted = torch.tensor([0.0, 1.0, -3.0], dtype=torch.float64, requires_grad=True)
    total = losses.normalized(value, predicted)
    expected = value / predicted.exp() + (value.log() - predicted).square()
    assert total.shape == (3,) and torch.allclose(total, expected)
    student, normalizer = torch.autograd.grad(total.sum(), (value, predicted))
    assert torch.allclose(student, (-predicted).exp())                               # no gradient through log value
    assert torch.allclose(normalizer, 2 * (predicted - value.log()))                 # nor through the weight


def test_normalized_is_the_plain_loss_plus_a_constant_while_the_prediction_is_0():
    value = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(losses.normalized(value, torch.zeros(2, dtype=torch.float64)).sum(), value)
    assert torch.equal(gradient, torch.ones(2, dtype=torch.float64))


def test_normalized_by_the_true_mean_log_has_the_scale_of_no_region():
    value = torch.tensor([1e-3, 1.0, 1e3])
    assert losses.normalized(value, value.log()).tolist() == pytest.approx([1] * 3)


def test_the_floor_bounds_the_weight_and_the_target_also_at_loss_zero():
    value, low = torch.zeros(2, requires_grad=True), torch.tensor([-50.0, -1.0], requires_grad=True)
    total = losses.normalized(value, low, floor=0.01)
    assert total.tolist() == pytest.approx([(math.log(0.01) + 50) ** 2, (math.log(0.01) + 1) ** 2])
    total.sum().backward()
    assert value.grad.tolist() == pytest.approx([100, math.e]) and low.grad.isfinite().all()


def test_self_normalized_is_constant_with_the_gradient_of_the_logarithm_above_the_floor():
    value = torch.tensor([0.5, 1e-3, 1e-6, 0.0], dtype=torch.float64, requires_grad=True)
    found = losses.self_normalized(value, floor=1e-4)
    assert torch.allclose(found, torch.tensor([1, 1, 0.01, 0], dtype=torch.float64))
    gradient, = torch.autograd.grad(found.sum(), value)
    assert torch.allclose(gradient, torch.tensor([2, 1e3, 1e4, 1e4], dtype=torch.float64))


def test_normalized_losses_refuse_other_shapes_and_no_floor():
    for value, predicted, floor in (((3,), (3, 1), 1e-4), ((3,), (3,), 0.0), ((2, 2), (2, 2), 1.0)):
        with pytest.raises(ValueError, match="floor"):
            losses.normalized(torch.ones(value), torch.ones(predicted), floor)
    with pytest.raises(ValueError, match="floor"):
        losses.self_normalized(torch.ones(3), 0.0)


# ---- the network that predicts the size of a loss ----


@pytest.mark.parametrize("channels, size", [(4, (8, 8)), (16, (5, 7)), (3, (1, 1)), (1, (33, 2))])
def test_one_value_per_sample_for_any_channels_and_size(channels, size):
    network = losses.LossNormalizer(channels, width=4)
    assert network(torch.randn(3, channels, *size), torch.tensor([1.0, 0.5, 0.001])).shape == (3,)


def test_it_starts_at_zero_so_that_every_weight_is_one_and_its_head_learns_at_once():
    torch.manual_seed(0)
    network, z, t = losses.LossNormalizer(4), torch.randn(5, 4, 8, 8), torch.rand(5)
    assert network(z, t).abs().max() == 0
    losses.normalized(torch.full((5,), 0.1), network(z, t)).mean().backward()
    assert network.head[-1].weight.grad.abs().max() > 0 and network.head[-1].bias.grad.abs().max() > 0
    assert 2e5 < sum(p.numel() for p in network.parameters()) < 1e6


def test_a_sample_does_not_see_the_rest_of_the_batch_and_low_precision_is_cast():
    torch.manual_seed(0)
    network, z, t = losses.LossNormalizer(4, width=8), torch.randn(4, 4, 4, 4), torch.rand(4, dtype=torch.float64)
    torch.nn.init.normal_(network.head[-1].weight)
    together = network(z, t)
    assert torch.allclose(together[1:2], network(z[1:2], t[1:2]), atol=1e-5) and together.dtype == torch.float32
    assert torch.allclose(network(z.bfloat16(), t), together, atol=0.1)
    assert not torch.allclose(network(z, t.flip(0)), together, atol=1e-3) and not torch.allclose(network(z.flip(0), t), together, atol=1e-3)


def test_it_learns_the_mean_log_of_a_loss_that_hangs_on_time_and_on_the_latent():
    """log loss = 4 t + 2 (mean of z) + noise of standard deviation 0.5, whose mean is predicted and whose spread is not."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = losses.LossNormalizer(2, width=8, stages=2)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0)

    def draw(n):
        level, t = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
        z = level[:, None, None, None] + 0.1 * torch.randn(n, 2, 4, 4, generator=generator)
        return z, t, 4 * t + 2 * level
    for _ in range(300):
        z, t, mean_log = draw(128)
        value = (mean_log + 0.5 * torch.randn(128, generator=generator)).exp()
        optimizer.zero_grad()
        losses.normalized(value, network(z, t)).mean().backward()
        optimizer.step()
    z, t, mean_log = draw(512)
    with torch.no_grad():
        error = (network(z, t) - mean_log).square().mean().sqrt().item()
    assert error < 0.35 < 0.1 * mean_log.square().mean().sqrt().item() + 0.2
    value = mean_log.exp()
    weighted = value / network(z, t).detach().exp()
    assert (value.max() / value.min()).log10() > 3 and weighted.log().std() < 0.4                # four decades become a factor


# ---- targets of other methods --------------------------------------------------------------------------------------


class Flow:
    """Data ~ N(mean, std^2): the teacher's answer, and that of a student which crosses the window down to t_end exactly."""

    def __init__(self, schedule, mean, std, t_end=0.5):
        self.schedule, self.mean, self.std, self.t_end = schedule, mean, std, torch.tensor([t_end], dtype=torch.float64)

    def levels(self, t):
        return [v[:, None] for v in self.schedule(t)]

    def teacher(self, z, t):
        alpha, sigma = self.levels(t)
        x = self.mean + alpha * self.std ** 2 * (z - alpha * self.mean) / (alpha ** 2 * self.std ** 2 + sigma ** 2)
        return x, (z - alpha * x) / sigma

    def end(self, z, t):
        (a, s), (a_end, s_end) = self.levels(t), self.levels(self.t_end)
        unit = (z - a * self.mean) / (a ** 2 * self.std ** 2 + s ** 2).sqrt()
        return a_end * self.mean + unit * (a_end ** 2 * self.std ** 2 + s_end ** 2).sqrt()

    def student(self, z, t):
        return reflow.chord(z, self.end(z, t), self.levels(t), self.levels(self.t_end))

    def velocity(self, z, z_end, t):
        x, eps = reflow.chord(z, z_end, self.levels(t), self.levels(self.t_end))
        return eps - x


def times(count=65):
    """Of the window (0.5, 1]: t at and below its start, and its two ends."""
    t = torch.linspace(1, 0.51, count, dtype=torch.float64)
    return t, torch.ones_like(t), torch.full_like(t, 0.5)


@pytest.mark.parametrize("name", ["imitation", "flow-map"])
def test_a_straight_teacher_is_a_fixed_point_of_every_target(name, schedule):
    """All data in one point: every trajectory is straight, the teacher's own answer is the step over the window."""
    flow, (t, t_start, t_end) = Flow(schedule, 0.7, 0.0), times()
    z = torch.randn(len(t), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    begin = t_start if name == "imitation" else t
    found = losses.TARGETS[name](flow.teacher, flow.teacher, schedule, z, t, t_start, t_end, 8)
    assert torch.allclose(found, flow.end(z, begin), atol=1e-9)
    assert torch.allclose(found, losses.noised(schedule, t_end, *flow.teacher(z, begin)), atol=1e-9)


def test_the_exact_map_is_the_fixed_point_of_flow_map_to_second_order(schedule):
    flow, (t, t_start, t_end) = Flow(schedule, 0.7, 0.4), times()
    z = torch.randn(len(t), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [(losses.flow_map(flow.teacher, flow.student, schedule, z, t, t_start, t_end, 8, d=d) - flow.end(z, t)).abs().amax(1)
              for d in (0.02, 0.01)]
    inside = (t < 0.95) & (t > 0.56)                       # at the window's two ends the difference has one side
    assert errors[0][inside].max() < 2e-4 and (errors[0] / errors[1])[inside] == pytest.approx(4, rel=0.2)
    assert errors[0].max() < 2e-3
    off = losses.flow_map(flow.teacher, flow.teacher, schedule, z, t, t_start, t_end, 8) - flow.end(z, t)
    assert off.abs().max() > 1e-2                           # the teacher's own answer is none


def test_a_student_that_learns_flow_map_comes_to_the_exact_map(schedule):
    """A student linear in z, whose factor is a polynomial in t, fitted again and again to the targets that it makes itself."""
    flow, (t, t_start, t_end) = Flow(schedule, 0.0, 0.5), times()
    z = torch.ones(len(t), 1, dtype=torch.float64)

    def features(t):
        return torch.stack([(4 * t - 3) ** k for k in range(5)], 1)

    def fitted(z_end):
        return torch.linalg.lstsq(features(t), flow.velocity(z, z_end, t)).solution

    def student(z, t):
        alpha, sigma = flow.levels(t)
        u = features(t) @ weights * z
        x = (z - sigma * u) / (alpha + sigma)
        return x, x + u
    exact, weights = flow.velocity(z, flow.end(z, t), t), fitted(losses.noised(schedule, t_end, *flow.teacher(z, t)))
    assert (features(t) @ weights - exact).abs().max() > 0.05
    for _ in range(60):
        weights = weights + 0.1 * (fitted(losses.flow_map(flow.teacher, student, schedule, z, t, t_start, t_end, 8)) - weights)
    assert (features(t) @ weights - exact).abs().max() < 2e-3


def test_imitation_comes_to_the_mean_of_the_teachers_velocities_on_its_line(schedule):
    """Data ~ N(0, std^2): with y = z / (alpha + sigma) and tau = sigma / (alpha + sigma) the teacher's velocity is k(tau) y, so that the
    mean c of k (y_0 + (tau - tau_0) c) is known."""
    flow, (t, t_start, t_end) = Flow(schedule, 0.0, 0.5), times()
    z = torch.ones(len(t), 1, dtype=torch.float64)
    alpha, sigma = flow.levels(t)
    x, eps = flow.teacher(alpha + sigma, t)                 # at y = 1
    k, tau, y = eps - x, sigma / (alpha + sigma), 1 / (alpha + sigma)[0]
    c = (k * y).mean() / (1 - (k * (tau - tau[0])).mean())

    def student(z, t):
        alpha, sigma = flow.levels(t)
        x = (z - sigma * u) / (alpha + sigma)
        return x, x + u
    u = torch.zeros(1, dtype=torch.float64)
    for _ in range(40):
        u = flow.velocity(z, losses.imitation(flow.teacher, student, schedule, z, t, t_start, t_end, 8), t_start).mean(0)
    assert u.item() == pytest.approx(c.item(), abs=1e-9)
    assert abs(u.item() - flow.velocity(z, flow.end(z, t_start), t_start)[0].item()) > 1e-3           # and that is not the exact step


# ---- distribution matching -----------------------------------------------------------------------------------------


def noise(count, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_times(count):
    return 0.02 + 0.96 * torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_matching_moves_the_student_from_the_critics_answer_to_the_teachers_and_teaches_the_critic_alone(schedule):
    flow, t, x = Flow(schedule, 0.7, 0.4), drawn_times(8), noise(8).requires_grad_()
    shift = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)

    def critic(z, t):
        x_hat, eps_hat = flow.teacher(z, t)
        return x_hat + shift, eps_hat
    moved, learned = losses.matching(flow.teacher, critic, schedule, x, t, noise(8, 2))
    teachers, _ = flow.teacher(losses.noised(schedule, t, x.detach(), noise(8, 2)), t)
    distance = (x.detach() - teachers).abs().mean(1, keepdim=True)
    by_student, nothing = torch.autograd.grad(moved.sum(), (x, shift), retain_graph=True, allow_unused=True)
    assert nothing is None and torch.allclose(by_student, 0.3 / distance.expand(-1, 3) / 3)            # descent: towards the teacher's answer
    assert torch.allclose(moved, (0.3 / distance[:, 0]).square() / 2)
    nothing, by_critic = torch.autograd.grad(learned.sum(), (x, shift), allow_unused=True)
    assert nothing is None and by_critic.abs() > 0
    for space, (p, q) in (("x", (1.0, 0.0)), ("eps", (0.0, 1.0))):
        _, learned = losses.matching(flow.teacher, flow.teacher, schedule, x, t, noise(8, 2), (p, q))
        found = flow.teacher(losses.noised(schedule, t, x.detach(), noise(8, 2)), t)[space == "eps"]
        assert torch.allclose(learned, losses.mse(found, x.detach() if space == "x" else noise(8, 2)))


def test_a_critic_that_agrees_with_the_teacher_leaves_the_student_where_it_is(schedule):
    flow, x = Flow(schedule, 0.7, 0.4), noise(8).requires_grad_()
    moved, _ = losses.matching(flow.teacher, flow.teacher, schedule, x, drawn_times(8), noise(8, 2))
    moved.sum().backward()
    assert moved.eq(0).all() and x.grad.eq(0).all()


def test_what_matching_comes_to_is_the_teachers_distribution(schedule):
    """Data ~ N(0.7, 0.4^2). A student x = a + b z, whose exact critic knows that it makes N(a, b^2), and begins far away."""
    flow = Flow(schedule, 0.7, 0.4)
    a, b = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-0.5, 1.0))
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    for step in range(400):
        critic = Flow(schedule, a.detach(), b.detach())
        generator = torch.Generator().manual_seed(step)
        z, eps = torch.randn(2, 256, 3, generator=generator, dtype=torch.float64)
        t = 0.02 + 0.96 * torch.rand(256, generator=generator, dtype=torch.float64)
        moved, _ = losses.matching(flow.teacher, critic.teacher, schedule, a + b * z, t, eps)
        optimizer.zero_grad()
        moved.mean().backward()
        optimizer.step()
    assert a.item() == pytest.approx(0.7, abs=0.02) and b.item() == pytest.approx(0.4, abs=0.02)


def test_a_critic_learns_what_the_student_makes(schedule):
    """One answer per time, fitted to samples of N(-0.2, 0.3^2): least where it is the mean of x given z."""
    right, wrong = Flow(schedule, -0.2, 0.3), Flow(schedule, -0.2, 0.4)
    x, t = -0.2 + 0.3 * noise(4096), drawn_times(4096)
    least, more = (losses.matching(wrong.teacher, each.teacher, schedule, x, t, noise(4096, 2))[1].mean() for each in (right, wrong))
    assert least < more


# ---- at the edges ----


def test_flow_map_asks_the_student_inside_the_window_alone(schedule):
    flow, asked = Flow(schedule, 0.7, 0.4), []

    def student(z, t):
        asked.append(t)
        return flow.teacher(z, t)
    for start, end in ((0.5, 0.25), (0.25, 0.0)):
        t = torch.linspace(start, end + 1e-3, 9, dtype=torch.float64)
        losses.flow_map(flow.teacher, student, schedule, torch.zeros(9, 1, dtype=torch.float64), t, torch.full_like(t, start), torch.full_like(t, end), 8)
        before, after = asked[-2:]
        assert before.max() == start and (after < before).all() and after.min() > end and after.min() >= schedule.floor


def test_matching_is_bounded_where_the_teacher_gives_the_sample_itself(schedule):
    x, eps = noise(4), noise(4, 2)
    moved, _ = losses.matching(lambda z, t: (x, eps), lambda z, t: (x + 0.1, eps), schedule, x, drawn_times(4), eps)
    assert torch.allclose(moved, torch.full((4,), (0.1 / 1e-3) ** 2 / 2).double())


def test_the_direction_of_nothing_is_one_away_and_its_gradient_finite():
    zero = torch.zeros(2, 3, requires_grad=True)
    value = losses.direction_loss(zero, torch.ones(2, 3))
    value.sum().backward()
    assert value.tolist() == [1, 1] and zero.grad.isfinite().all()


def test_the_normalizer_is_told_timesteps():
    network, seen = losses.LossNormalizer(1, width=4), []
    network.embed[0].register_forward_hook(lambda module, given, made: seen.append(given[0]))
    network(torch.zeros(2, 1, 4, 4), torch.tensor([0.25, 1.0]))
    assert seen[0].tolist() == [250, 1000]


def test_losses_of_half_precision_are_computed_in_float32():
    p, q = (torch.randn(2, 4096, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    for loss in (losses.mse, losses.pseudo_huber, losses.direction_loss):
        assert loss(p, q).dtype == torch.float32 and torch.allclose(loss(p, q), loss(p.float(), q.float()))
