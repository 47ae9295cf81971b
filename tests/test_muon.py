"""Muon: orthogonal updates for matrices, AdamW's for the rest, on one process as on two."""
import copy

import pytest
import torch
from conftest import run_two

from runtime import muon


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rows, columns", [(24, 24), (16, 90), (90, 16)])
def test_orthogonal_keeps_singular_vectors_and_makes_their_values_near_one(rows, columns):
    given = torch.randn(3, rows, columns, generator=generator())
    found = muon.orthogonal(given)
    for one, other in zip(given, found):
        u, s, v = torch.linalg.svd(one, full_matrices=False)
        inside = u.T @ other @ v.T
        assert (inside - inside.diagonal().diag()).abs().max() < 1e-4
        large = inside.diagonal()[s > 0.2 * s[0]]
        assert large.min() > 0.6 and large.max() < 1.3


SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from runtime.muon import Muon

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3))
optimizer = Muon(model.parameters(), 0.01)
for step in range(3):
    model.zero_grad()
    model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
    optimizer.step()
if int(os.environ.get("RANK", 0)) == 0:
    torch.save(model.state_dict(), sys.argv[1])
"""


def test_two_processes_make_the_update_of_one(tmp_path):
    """Three matrices of one shape: the second process has one of them, and a row of zeros."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_two([str(tmp_path / "script.py"), str(tmp_path / "two.pt")], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), *(torch.nn.Conv2d(8, 8, 3) for _ in range(3))]
    model = torch.nn.Sequential(*layers)
    before, optimizer = {key: value.clone() for key, value in model.state_dict().items()}, muon.Muon(model.parameters(), 0.01)
    for step in range(3):
        model.zero_grad()
        model(torch.randn(2, 3, 16, 16, generator=generator(step))).square().mean().backward()
        optimizer.step()
    two = torch.load(tmp_path / "two.pt")
    for key, value in model.state_dict().items():
        assert torch.allclose(value, two[key], atol=1e-6) and not torch.equal(value, before[key]), key


def test_an_update_has_the_size_of_adamws_and_vectors_and_tables_are_adamws():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(dict(table=torch.nn.Embedding(9, 4), layer=torch.nn.Linear(64, 32)))
    other = copy.deepcopy(model)
    ours = muon.Muon(model.parameters(), 0.005, tables=[model.table.weight], weight_decay=0.0)
    theirs = torch.optim.AdamW(other.parameters(), 0.005, weight_decay=0.0)
    for step in range(3):
        before = model.layer.weight.detach().clone()
        for p, q in zip(model.parameters(), other.parameters()):
            p.grad = torch.randn(p.shape, generator=generator(step))
            q.grad = p.grad.clone()
        ours.step(), theirs.step()
        assert (model.layer.weight - before).square().mean().sqrt().item() == pytest.approx(0.2 * 0.005, rel=0.25)
    assert torch.equal(model.layer.bias, other.layer.bias) and torch.equal(model.table.weight, other.table.weight)
    assert not torch.allclose(model.layer.weight, other.layer.weight, atol=1e-3)
    assert set(ours.state[model.layer.weight]) == {"step", "momentum"} and "exp_avg" in ours.state[model.table.weight]


def test_a_group_may_be_adamws_alone_and_decay_is_both_of_theirs():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    optimizer = muon.Muon(one.parameters(), 0.1, weight_decay=0.5)
    optimizer.add_param_group(dict(params=list(other.parameters()), orthogonal=False))
    before = [p.weight.detach().clone() for p in (one, other)]
    for p in (one.weight, other.weight):
        p.grad = torch.zeros(4, 4)
    optimizer.step()
    assert all(torch.allclose(p.weight, 0.95 * old) for p, old in zip((one, other), before))
    assert "momentum" in optimizer.state[one.weight] and "momentum" not in optimizer.state[other.weight]


def test_the_direction_is_nesterovs_momentum():
    layer, momentum = torch.nn.Linear(8, 8, bias=False), torch.zeros(8, 8)
    optimizer = muon.Muon(layer.parameters(), 0.1, weight_decay=0.0)
    for step in range(3):
        gradient, before = torch.randn(8, 8, generator=generator(step)), layer.weight.detach().clone()
        momentum = 0.95 * momentum + 0.05 * gradient
        layer.weight.grad = gradient.clone()
        optimizer.step()
        expected = muon.orthogonal((0.05 * gradient + 0.95 * momentum)[None])[0]
        assert torch.allclose(before - layer.weight, 0.1 * 0.2 * 8 ** 0.5 * expected, atol=1e-5)
