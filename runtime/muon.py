"""Muon: momentum made orthogonal for what is a matrix, AdamW for what is not."""
import torch
import torch.distributed as dist


def orthogonal(matrices):
    """The orthogonal matrices nearest to some of one shape, roughly: five Newton-Schulz steps bring
    singular values to 0.7 to 1.2 (Jordan et al. 2024, Muon).
    matrices: (n, rows, columns).  Returns: the same shape."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.AdamW):
    """Momentum, made orthogonal (Jordan et al. 2024), for weights of two or more axes: a convolution
    is the matrix of its output channels. Their updates have the size that AdamW's have at the same rate
    (rms 0.2 lr; Liu et al. 2025). What is no matrix is AdamW's: vectors, the tables of embeddings, a group
    added with orthogonal=False. torch's own Muon takes no convolutions, and works in bf16. Of several
    processes, which hold the same gradients, each makes its share of the matrices.
    parameters: as torch's optimizers take them; tables: weights of nn.Embedding among them."""

    def __init__(self, parameters, lr, momentum=0.95, tables=(), **settings):
        self.momentum, self.tables = momentum, set(tables)
        super().__init__(parameters, lr, **settings)

    def add_param_group(self, group):
        super().add_param_group({"orthogonal": True, **group})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if group["orthogonal"] and p.grad is not None
                        and p.ndim > 1 and p not in self.tables]
            self.turn(matrices, group["lr"], group["weight_decay"])
            for p in matrices:
                p.grad = None                              # what is left is AdamW's
        return super().step(closure)

    def turn(self, matrices, lr, weight_decay):
        """One update of weights that are matrices."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        shapes = {}
        for p in matrices:
            if not self.state[p]:                          # AdamW reads a step of all that it keeps
                self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            self.state[p]["step"] += 1
            self.state[p]["momentum"].lerp_(p.grad, 1 - self.momentum)
            shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
        for (rows, columns), members in shapes.items():
            ahead = torch.stack([p.grad.lerp(self.state[p]["momentum"], self.momentum)
                                 .reshape(rows, -1) for p in members])                  # Nesterov's
            share = -(-len(members) // world)
            mine = ahead[rank * share:(rank + 1) * share]
            mine = torch.cat([orthogonal(mine), mine.new_zeros(share - len(mine), rows, columns)])
            every = [torch.empty_like(mine) for _ in range(world)]
            if world > 1:
                dist.all_gather(every, mine.contiguous())
            else:
                every = [mine]
            size = 0.2 * max(rows, columns) ** 0.5
            for p, update in zip(members, torch.cat(every)):
                p.mul_(1 - lr * weight_decay)
                p.add_(update.view(p.shape), alpha=-lr * size)
