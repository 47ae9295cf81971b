"""What loss is usual at (z_t, t): a small network that predicts its logarithm, for losses.normalised.

    python normaliser.py        # learns the size of a loss that spans three decades, and asserts it
"""
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn


class Normaliser(nn.Module):
    """p(z_t, t), about E[log loss | z_t, t]. Stages of a 3x3 convolution that halves the picture, each told the time; their
    mean over the picture; two linear layers, the last zero: p = 0 before training, and every weight 1.
    channels: of the latent; width: of the first stage, doubled by each.  z: (B, channels, h, w), any h and w; t: (B,), in (0, 1].
    Returns: (B,), float32. Half a million parameters, for a learning rate of about 1e-3.  Shape and sizes are ours."""

    def __init__(self, channels, width=32, stages=4):
        super().__init__()
        widths = [channels, *(width * 2 ** i for i in range(stages))]
        self.embed = nn.Sequential(Timesteps(128, flip_sin_to_cos=True, downscale_freq_shift=0), TimestepEmbedding(128, 128))
        self.times = nn.ModuleList(nn.Linear(128, out) for out in widths[1:])
        self.stages = nn.ModuleList(nn.Conv2d(before, out, 3, stride=2, padding=1) for before, out in zip(widths, widths[1:]))
        self.head = nn.Sequential(nn.Linear(widths[-1], 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, z, t):
        z, time = z.float(), self.embed(1000 * t.float())                       # sinusoids made for timesteps
        for stage, shift in zip(self.stages, self.times):
            z = nn.functional.leaky_relu(stage(z) + shift(time)[:, :, None, None], 0.2)
        return self.head(z.mean((2, 3)))[:, 0]


if __name__ == "__main__":
    import losses

    torch.manual_seed(0)
    network = Normaliser(4, width=8, stages=3)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0)
    for step in range(151):
        z, t = torch.randn(128, 4, 8, 8), 1 - torch.rand(128)
        value = 10 ** (3 * t - 2) * torch.rand(128)                             # E[log value] = (3 t - 2) log 10 - 1
        loss = losses.normalised(value, network(z, t)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"update {step:3}: value spans {value.min():.4f} to {value.max():.1f}; predicted off by a factor "
                  f"{(network(z, t) - (3 * t - 2) * 2.3026 + 1).abs().mean().exp():.2f} (mean)")
    assert (network(z, t) - (3 * t - 2) * 2.3026 + 1).abs().mean() < 0.5
