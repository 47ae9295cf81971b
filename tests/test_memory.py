"""The peak that is computed without memory: closed forms, a real run's own record of what it allocates, the table of cards."""
import re

import pytest
import torch
from conftest import ROOT, SMALL, slow
from test_life import SD3
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import models
from models import architectures
from runtime import cli, plan
from tools import memory

GIB = 2 ** 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp("memory") / name for name in ("sd15", "sd3")}
    architectures.build("sd15", **SMALL["sd15"]).save_pretrained(made["sd15"])
    architectures.build("sd3", **SD3).save_pretrained(made["sd3"])
    return made


def config(folder, *words):
    return cli.parse(memory.Config, "", ["--model", str(folder), "--prompts", "p.txt", "--size", "32", "--device", "cpu", *words])


@pytest.mark.parametrize("grad, alive", [(False, 2), (True, 3)])
def test_the_peak_of_a_chain_is_what_it_keeps(grad, alive):
    """Three times exp: with gradients each result is kept, without only the one before."""
    with FakeTensorMode():
        x = torch.empty(1000, requires_grad=grad)
        assert memory.peak(lambda: x.exp().exp().exp()) == alive * 4000
        with memory.Live([x]) as live:
            x.view(10, 100)[0].t()
            assert live.peak == 0                                               # a view takes nothing
            y = x.exp().sum()
            if grad:
                y.backward()
                assert live.now == 4000 + 4                                     # the gradient, and the sum
        assert live.peak >= 4004


def measured(function):
    """Bytes that a real function() allocates on the CPU at the highest, by torch's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize("name, words", [("sd15", []), ("sd15", ["--gradient-checkpointing"]),
                                         slow("sd15", ["--lora", "2", "--precision", "bf16", "--gradient-checkpointing"]),
                                         ("sd3", ["--lora", "2", "--precision", "bf16"])], ids=str)
def test_the_peak_of_an_update_is_that_of_a_real_one(folders, name, words):
    c = config(folders[name], "--batch", "4", "--grid-steps", "0", *words)
    computed = memory.phases(c)["updates"]
    dtype = memory.PRECISIONS[c.precision] if c.lora else torch.float32
    pipeline = memory.load.load_pipeline(c.model, dtype)
    network = memory.make_student(c, models.network(pipeline), torch.device("cpu"))
    module, shape = models.family_of(network), models.latent_shape(pipeline, c.size)

    def update():
        cond = {key: torch.randn(4, *value.shape[1:]) for key, value in module.meta_condition(network).items()}
        z, t = torch.randn(4, *shape), torch.full((4,), 500.0)
        with torch.autocast("cpu", torch.bfloat16, c.precision == "bf16"):
            out = module.forward(network)(z, t, **cond)
        out.float().mean().backward()
    trained = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    states = plan.nbytes(network) + plan.added(c, trained) - trained
    assert computed - states == pytest.approx(measured(update), rel=0.05)


def test_options_change_the_peak_as_they_should(folders):
    def found(*words):
        return memory.phases(config(folders["sd15"], "--batch", "4", *words))
    plain, weights = found(), 4 * sum(p.numel() for p in models.network(memory.load.load_pipeline(str(folders["sd15"]))).parameters())
    assert found("--no-ema")["updates"] == plain["updates"] - weights == found("--ema-device", "cpu")["updates"]
    assert found("--optimizer", "adamw8bit")["updates"] == pytest.approx(plain["updates"] - 1.5 * weights)
    assert found("--gradient-checkpointing")["updates"] < plain["updates"]
    assert found("--micro-batch", "1")["trajectories"] < plain["trajectories"]
    alone, after_others = (found("--batch", n, "--micro-batch", "2")["updates"] for n in ("2", "4"))
    assert alone < after_others <= alone + weights         # gradients of the micro-batches before are there, once
    assert found("--grid-steps", "0")["pictures"] == 0 < plain["pictures"]


def test_what_is_not_counted_is_refused(folders):
    for words in (["--pairs", "data", "--data", "x", "--prompts", ""], ["--compile"], ["--shard"]):
        with pytest.raises(cli.UserError, match="counted are runs with cached trajectories"):
            memory.phases(config(folders["sd15"], *words))


TABLE = [[cell.strip() for cell in line.strip("|").split("|")]
         for line in re.findall(r"^\| \d+ GB \|.*$", (ROOT / "docs" / "costs.md").read_text(), re.M)]


def test_the_table_of_cards_has_its_rows_and_each_fits():
    assert [row[:2] for row in TABLE] == [[f"{card} GB", f"`--model {model} {flags}`"] for card, model, flags in memory.CARDS]
    for (card, *_), row in zip(memory.CARDS, TABLE):
        assert max(float(cell) for cell in row[2:] if cell != "-") <= card - 1, row


@pytest.mark.parametrize("models_", [("sd15",), slow(("sdxl", "sd3"))], ids=lambda names: ",".join(names))
def test_the_rows_of_the_table_are_what_is_computed(models_):
    """Those of one model and its options share a count of the network."""
    chosen = [(card, row) for card, row in zip(memory.CARDS, TABLE) if card[1] in models_]
    assert chosen and [memory.row(*card) for card, _ in chosen] == ["| " + " | ".join(row) + " |" for _, row in chosen]
