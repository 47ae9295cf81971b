"""normaliser.py: shape, start, what it learns, which gradients it gets."""
import pytest
import torch

import losses
from normaliser import Normaliser


@pytest.mark.parametrize("channels, size", [(4, (8, 8)), (16, (5, 7)), (3, (1, 1)), (1, (33, 2))])
def test_one_value_per_sample_for_any_channels_and_size(channels, size):
    network = Normaliser(channels, width=4)
    assert network(torch.randn(3, channels, *size), torch.tensor([1.0, 0.5, 0.001])).shape == (3,)


def test_it_starts_at_zero_so_that_every_weight_is_one_and_its_head_learns_at_once():
    torch.manual_seed(0)
    network, z, t = Normaliser(4), torch.randn(5, 4, 8, 8), torch.rand(5)
    assert network(z, t).abs().max() == 0
    losses.normalised(torch.full((5,), 0.1), network(z, t)).mean().backward()
    assert network.head[-1].weight.grad.abs().max() > 0 and network.head[-1].bias.grad.abs().max() > 0
    assert 2e5 < sum(p.numel() for p in network.parameters()) < 1e6


def test_a_sample_does_not_see_the_rest_of_the_batch_and_low_precision_is_cast():
    torch.manual_seed(0)
    network, z, t = Normaliser(4, width=8), torch.randn(4, 4, 4, 4), torch.rand(4, dtype=torch.float64)
    torch.nn.init.normal_(network.head[-1].weight)
    together = network(z, t)
    assert torch.allclose(together[1:2], network(z[1:2], t[1:2]), atol=1e-5) and together.dtype == torch.float32
    assert torch.allclose(network(z.bfloat16(), t), together, atol=0.1)
    assert not torch.allclose(network(z, t.flip(0)), together, atol=1e-3) and not torch.allclose(network(z.flip(0), t), together, atol=1e-3)


def test_it_learns_the_mean_log_of_a_loss_that_hangs_on_time_and_on_the_latent():
    """log loss = 4 t + 2 (mean of z) + noise of standard deviation 0.5, whose mean is predicted and whose spread is not."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = Normaliser(2, width=8, stages=2)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0)

    def draw(n):
        level, t = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
        z = level[:, None, None, None] + 0.1 * torch.randn(n, 2, 4, 4, generator=generator)
        return z, t, 4 * t + 2 * level
    for _ in range(300):
        z, t, mean_log = draw(128)
        value = (mean_log + 0.5 * torch.randn(128, generator=generator)).exp()
        optimizer.zero_grad()
        losses.normalised(value, network(z, t)).mean().backward()
        optimizer.step()
    z, t, mean_log = draw(512)
    with torch.no_grad():
        error = (network(z, t) - mean_log).square().mean().sqrt().item()
    assert error < 0.35 < 0.1 * mean_log.square().mean().sqrt().item() + 0.2
    value = mean_log.exp()
    weighted = value / network(z, t).detach().exp()
    assert (value.max() / value.min()).log10() > 3 and weighted.log().std() < 0.4                # four decades become a factor
