"""Identities of losses.py: zero at the target, exact decomposition, limits, gradients."""
import pytest
import torch

import losses


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
