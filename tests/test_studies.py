"""Studies: their statistics against closed forms, their budgets against counted evaluations, each study on made-up rows whose
verdict is known, and one end to end on a random model."""
import dataclasses
import json
import math
import os
import re
import types
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from safetensors.torch import save_file
from transformers import CLIPModel

import models
import reflow
import sampler
import train
from evaluation import judge, metrics
from models import saved
from runtime import cli
from runtime.cli import UserError
from studies import (
    __main__,
    compare,
    curriculum,
    matching,
    methods,
    proreflow,
    results,
    runner,
    simple_reflow,
    time_law,
)
from tools import bench, build


@pytest.fixture(autouse=True)
def figures_are_closed():
    """As studies/__main__.py closes those that it has saved."""
    yield
    plt.close("all")


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_the_interval_is_students_and_covers():
    mean, half = runner.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.3026527 * 1 / math.sqrt(3), abs=1e-6)         # t of 2 degrees of freedom
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covered = sum(abs(mean) < half for mean, half in map(runner.mean_interval, draws.tolist()))
    assert 0.935 < covered / 2000 < 0.965
    assert runner.mean_interval([7.0]) == (7.0, math.inf) and runner.shown([7.0]) == "7.00"


def test_pairs_are_compared_pair_by_pair():
    common, shift = [0.0, 10.0, 20.0, 30.0], [0.9, 1.1, 1.0, 1.0]
    mean, half, p = runner.paired([c + s for c, s in zip(common, shift)], common)
    assert mean == pytest.approx(1.0) and half < 0.2 and p < 0.001                             # unpaired, the spread of 10 would hide it


@pytest.mark.parametrize("shift, word", [(-1.0, "better"), (1.0, "worse"), (0.0, "no difference is shown")])
def test_words_follow_the_adjusted_p(shift, word):
    noise = [0.01, -0.01, 0.02, -0.02, 0.0]
    one = runner.Comparison("a against b", [5 + shift + e for e in noise], [5.0] * 5)
    runner.judge([one])
    assert word in str(one) and "5 seeds" in str(one)
    assert [other in str(one) for other in ("better", "worse", "no difference is shown")].count(True) == 1
    alone = runner.Comparison("a against b", [1.0], [2.0])
    assert "for the 0 comparisons" in runner.judge([alone]) and "one seed" in str(alone) and alone.outcome == "no difference is shown"


def test_p_values_are_adjusted_for_all_comparisons_of_a_study():
    assert runner.holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)        # by hand
    generator, false = torch.Generator().manual_seed(0), 0
    for _ in range(200):                                              # studies of 20 comparisons in which nothing is different
        a, b = torch.randn(2, 20, 5, generator=generator, dtype=torch.float64).tolist()
        comparisons = [runner.Comparison("", x, y) for x, y in zip(a, b)]
        runner.judge(comparisons)
        false += any(each.outcome != "no difference is shown" for each in comparisons)
    assert false <= 20                                                # 5% of 200 and chance; unadjusted, 64% of them


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path):
    return runner.Lab(runner.Config(out=str(tmp_path / "study"), results=str(tmp_path / "results"), seeds=3, workers=2))


@pytest.mark.parametrize("options, per_sample", [
    ("--recipe perflow", 8 + 3), ("--recipe rectified-diffusion", 10 + 3), ("--recipe lcm", 2 + 3), ("--pairs data --windows 1", 32 + 3),
    ("--recipe proreflow --windows 8 4", (4 + 2) / 2 + 3), ("--recipe proreflow --windows 8 4 2", (4 + 2 + 2) / 3 + 3),
    ("--recipe perflow --reuse 2", 4 + 3), ("--recipe perflow --matching 0.1", 8 + 3 + 3 * 4 + 3 + 1)])
def test_a_run_costs_what_its_recipe_says(lab, options, per_sample):
    assert lab.evaluations(f"{options} --updates 600") == pytest.approx(600 * 16 * per_sample)


def test_costs_are_the_counted_ones(lab, small_models, monkeypatch):
    """The loop's own calls of the student and the solver, counted."""
    lab.c.model = str(small_models["sd15"])
    for options in (dict(recipe="proreflow", windows=[8, 4]), dict(recipe="lcm")):
        counted = bench.run_training(model=lab.c.model, random_init=False, data="scenes", batch=16, updates=2, device="cpu", **options)["evaluations"]
        words = f"--recipe {options['recipe']} --data scenes --updates 2" + (" --windows 8 4" if "windows" in options else "")
        assert counted["solver"] + 3 * counted["student"] == pytest.approx(lab.evaluations(words)) or options["recipe"] == "lcm"


def test_trajectories_are_part_of_the_cost_and_of_the_budget(lab):
    assert lab.evaluations("--trajectories 100 --updates 10") == 100 * 32 + 10 * 16 * 3
    for options in ("--trajectories 100", "--recipe perflow", "--recipe proreflow --windows 8 4 2", "--recipe lcm"):
        c = lab.parse(lab.within(40_000, options))
        assert abs(lab.evaluations(f"{options} --updates {c.updates}") - 40_000) < 0.02 * 40_000, options


def test_straight_training_costs_what_the_curriculum_had_cost_by_then(lab):
    for seed in range(2):
        arms = curriculum.arms(lab, 400, 1536, seed)
        assert set(arms) == {(arm, k) for arm in curriculum.STYLES for k in curriculum.KEPT}
        configs = {key: lab.parse(options) for key, (_, options) in arms.items()}
        for k in curriculum.KEPT:
            merged, plain, straight = (train.resolve_recipe(configs[arm, k]) for arm in curriculum.STYLES)
            assert merged.direction_weight == straight.direction_weight > plain.direction_weight == 0 and straight.stages == (k,)
            done = dict(zip(merged.stages, np.cumsum(reflow.stage_updates(merged, 400))))
            assert configs[curriculum.STRAIGHT, k].updates == done[k] and done[1] == 400
        assert len({(c.seed, c.batch, c.trajectories, c.cache) for c in configs.values()}) == 1
        costs = [lab.evaluations(arms[arm, 1][1]) for arm in curriculum.STYLES]
        assert costs == [costs[0]] * 3


def test_every_weight_of_matching_costs_the_same_and_begins_with_the_same_trajectories(lab):
    for seed in range(2):
        arms = {weight: options for weight, (_, options) in matching.runs(lab, seed, "student-1").items()}
        configs = {weight: lab.parse(options) for weight, options in arms.items()}
        assert {weight: train.resolve_recipe(c).matching for weight, c in configs.items()} == {weight: weight for weight in matching.WEIGHTS}
        spent = matching.BUDGET + 32 * matching.TRAJECTORIES
        assert all(lab.evaluations(options) == pytest.approx(spent, rel=0.01) for options in arms.values())
        first = lab.parse(matching.beginning(lab, seed)[1])
        assert {(c.seed, c.cache, c.trajectories) for c in (first, *configs.values())} == {(seed, first.cache, matching.TRAJECTORIES)}
        assert len({(c.optimizer, c.lr, c.batch, c.init) for c in configs.values()}) == 1
        assert configs[0].updates == pytest.approx(10 / 3 * configs[0.3].updates, rel=0.01)


def test_every_method_has_the_same_budget_and_the_same_choice(lab):
    for budget in methods.BUDGETS:
        for name in methods.METHODS:
            configs = {(rate, starts): lab.parse(methods.options_of(lab, name, rate, starts, budget, 0))
                       for rate in methods.RATES for starts in (False, True)}
            for (rate, starts), c in configs.items():
                recipe = train.resolve_recipe(c)
                words = methods.options_of(lab, name, rate, starts, budget, 0)
                assert lab.evaluations(words) == pytest.approx(budget, rel=0.02), (name, budget)
                assert (c.optimizer, c.lr) == rate and (recipe.time_law == "starts") == starts and c.updates >= 8 * len(recipe.stages)
    laws = {name: train.resolve_recipe(lab.parse(methods.options_of(lab, name, ("adamw", 2e-4), False, 30_000, 0))).time_law for name in methods.METHODS}
    assert laws.pop("Simple ReFlow") == "exponential" and set(laws.values()) == {"uniform"}


@pytest.mark.filterwarnings("ignore:Precision loss occurred")
def test_the_sweep_chooses_by_its_own_noise_and_seed(pretend):
    asked, trained = [], {}
    pretend.train = lambda runs: trained.update(runs) or {name: pretend.out / name for name in runs}

    def measure(requests):
        asked.extend(requests)
        rows = [made_up(request) for request in requests]
        for row, request in zip(rows, requests):
            if "methods/sweep/" in str(request["folder"]):
                row["fd_corrected"] = 1 + ("muon-0.001-starts" not in str(request["folder"]))
        return rows
    pretend.measure = measure
    found = methods.methods(pretend)
    final = {name: pretend.parse(options) for name, options in trained.items() if "sweep" not in name}
    assert {(c.optimizer, c.lr, c.time_law) for name, c in final.items() if "perflow-uniform" not in name} == {("muon", 1e-3, "starts")} and {c.seed for c in final.values()} == {0, 1, 2}
    assert {pretend.parse(options).seed for name, options in trained.items() if "sweep" in name} == {methods.SWEEP_SEED}
    for request in asked:
        assert ("methods/sweep/" in str(request["folder"])) == (request.get("seed") == methods.SWEEP_NOISE)
    lines = [line for line in found["tables"][-1][2] if line[2] == "half at starts"]
    assert all(line[-1] == "**1.00**" for line in lines) and len(lines) == len(methods.METHODS) - 1
    # a paper's own time law is kept, whatever the sweep of the others finds
    laws = {pretend.parse(options).time_law for name, options in trained.items() if "perflow-uniform" in name}
    assert laws == {"uniform"} and sum("perflow-uniform" in name for name in trained) == 3 + 3 * 3


def test_a_student_is_asked_in_as_many_steps_as_it_has_windows(lab):
    def asked(name):
        return {steps: request["folder"].name for steps, request in methods.students(lab, name, lab.out).items()}
    assert asked("default") == {1: "student-1", 2: "student-2", 4: "student-4", 8: "student-8"}
    assert asked("PeRFlow") == {4: "student-4", 8: "student-4"} and asked("ProReflow-II (8→4→2)")[2] == "student-2"
    assert asked("LCM") == dict.fromkeys((1, 2, 4, 8), "student-1") and methods.students(lab, "LCM", lab.out)[1]["solver"] == "lcm"


def test_another_teacher_has_runs_and_results_of_its_own(tmp_path):
    small, other = (runner.Config(out=str(tmp_path), model=model) for model in ("tiny", "/somewhere/tiny-sd3"))
    assert runner.Lab(small).out == tmp_path and runner.Lab(other).out == tmp_path / "tiny-sd3"
    assert "--model /somewhere/tiny-sd3" in train.command(runner.Lab(other).parse(""))


# ---- rows of eval.py against each other ------------------------------------------------------------------------------


def measured(folder, shift, **protocol):
    """A results.json in folder, whose student of one window in one step is shift above another's."""
    noise = np.random.default_rng(0).normal(0, 0.3, 20)        # of the images: what rows of a protocol share
    rows = [dict(method=method, windows=windows, steps=steps, solver="ddim", guidance=1.0,
                 fd_groups=(fd + noise + np.random.default_rng([steps, round(10 * abs(shift))]).normal(0, 0.02, 20)).tolist())
            for method, windows, steps, fd in (("teacher", None, 32, 1.0), ("ddim", None, 1, 9.0), ("default", 1, 1, 2 + shift), ("default", 4, 4, 1.0))]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(dict(protocol=dict(n=2048, seeds=[0, 2047], **protocol), rows=rows)))
    return str(folder)


def test_rows_of_two_runs_are_told_apart_by_what_their_images_share(tmp_path, capsys):
    first, second = measured(tmp_path / "a", 0), measured(tmp_path / "b", -0.1)
    one, four = compare.main(compare.Config(files=[first, second]))
    mean, half, _ = runner.paired(one.a, one.b)
    assert one.outcome == "better" and mean == pytest.approx(-0.1, abs=0.02) and half < 0.02 and four.outcome == "no difference is shown"
    printed = capsys.readouterr().out
    assert f"- 1 window, 1 step: default ({second}) against default ({first}): better (-0." in printed and "ddim" not in printed
    assert "these 2 comparisons" in printed
    plain, student, level = compare.main(compare.Config(files=[f"{first}/results.json"]))
    assert plain.label == "ddim, 1 step, against the teacher in 32" and (plain.outcome, student.outcome, level.outcome) == ("worse", "worse", "no difference is shown")


def test_the_committed_rows_say_what_the_documents_quote():
    root = Path(__file__).parent.parent
    gain = {each.label.split(":")[0]: each for each in compare.against_each_other(root / "results/squared.json", root / "results/tiny.json")}
    mean, half, _ = runner.paired(gain["1 window, 1 step"].a, gain["1 window, 1 step"].b)
    assert f"{-mean - half:.2f} to {-mean + half:.2f} lower" in (root / "docs/results.md").read_text()


@pytest.mark.parametrize("change, complaint", [
    (lambda first, second: [], "0 files; give one"), (lambda first, second: [first, second, first], "3 files"),
    (lambda first, second: [first, f"{second}/none.json"], "none.json: missing"),
    (lambda first, second: [first, measured(Path(second).parent / "c", 0, captions="other")], "measured with different captions, None and other"),
    (lambda first, second: [measured(Path(second).parent / "c", 0, networks="these"), measured(Path(second).parent / "d", 0, networks="those")],
     "measured with different networks, these and those")])
def test_rows_that_cannot_be_compared_are_refused(tmp_path, change, complaint):
    with pytest.raises(cli.UserError, match=complaint):
        compare.main(compare.Config(files=change(measured(tmp_path / "a", 0), measured(tmp_path / "b", 0))))


def test_rows_without_their_groups_or_their_like_are_refused(tmp_path):
    first, second = measured(tmp_path / "a", 0), measured(tmp_path / "b", 0)
    file = Path(second, "results.json")
    result = json.loads(file.read_text())
    result["rows"] = [dict(row, steps=row["steps"] + 1) for row in result["rows"] if row["method"] != "teacher"]
    file.write_text(json.dumps(result))
    for files, complaint in (([first, second], "no student of as many windows"), ([second], "0 rows of a teacher")):
        with pytest.raises(cli.UserError, match=complaint):
            compare.main(compare.Config(files=files))
    del result["rows"][0]["fd_groups"]
    file.write_text(json.dumps(result))
    with pytest.raises(cli.UserError, match="has no fd_groups; measure it again"):
        compare.main(compare.Config(files=[second]))


def test_rows_at_another_guidance_or_of_another_protocol_are_no_pair(tmp_path):
    first, second = measured(tmp_path / "a", 0), Path(measured(tmp_path / "b", 0), "results.json")
    result = json.loads(second.read_text())
    second.write_text(json.dumps(dict(result, rows=[dict(row, guidance=2.0) for row in result["rows"]])))
    with pytest.raises(cli.UserError, match="no student of as many windows"):
        compare.main(compare.Config(files=[first, str(second)]))
    for name in ("name", "split", "n", "real", "captions", "reference", "size", "resize", "crop", "distance", "features", "seeds", "corrected"):
        second.write_text(json.dumps(dict(result, protocol=dict(result["protocol"], **{name: "other"}))))
        with pytest.raises(cli.UserError, match=f"measured with different {name}, "):
            compare.main(compare.Config(files=[first, str(second)]))


# ---- what a study runs and notes ----


def test_fewer_windows_keep_the_last_shares(lab):
    whole, last = (train.resolve_recipe(lab.parse(words)) for words in ("", "--windows 2 1"))
    assert last.shares == whole.shares[-2:] == (2, 4) and reflow.stage_updates(last, 60) == (20, 40)
    assert reflow.stage_updates(whole, 80) == (10, 10, 20, 40)


def test_budgets_are_scaled(lab):
    lab.c.scale = 0.1
    options = f"--recipe reflow {lab.cached(0, 1000)}"
    assert lab.parse(options).trajectories == 100
    for each in (options, "--recipe perflow"):
        assert lab.evaluations(lab.within(100_000, each)) == pytest.approx(10_000, rel=0.02)


def test_trajectories_from_images_cost_the_same(lab):
    assert lab.evaluations("--forward-rate 0.5 --trajectories 100 --updates 10") == 100 * 32 + 10 * 16 * 3


def test_a_row_is_named_after_its_weights_and_all_that_is_asked(lab, tmp_path):
    file = tmp_path / "student-2" / "unet" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    request = dict(folder=tmp_path / "student-2", steps=2)
    before = lab.row_file(request)
    assert lab.row_file(request) == before
    os.utime(file, ns=(0, 1))
    files = [before, lab.row_file(request), *(lab.row_file({**request, **more}) for more in (
        dict(steps=4), dict(guidance=2.0), dict(seed=3), dict(solver="heun"), dict(edit=("a", None)), dict(edit=("b", None))))]
    files += [runner.Lab(dataclasses.replace(lab.c, **{name: value})).row_file(request)
              for name, value in dict(n=7, real=7, paths=7, clip="x", judge="x", model="x").items()]
    assert len(set(files)) == len(files)


def test_a_record_counts_pairs_and_training(lab, tmp_path):
    row = dict(method="default", windows=2, steps=2, solver="ddim", guidance=1.0, nfe=2, fd=1.0, fd_corrected=1.0, fd_interval=[0, 1],
               endpoint_error=0.1, prompt_accuracy=dict(all=1.0))
    (tmp_path / "reflow.json").write_text(json.dumps(dict(updates=10, recipe="default", config=dict(batch=4, seed=7), cost=dict(evaluations=100))))
    found = lab.record(dict(folder=tmp_path, steps=2), row)
    assert (found["samples"], found["evaluations"]) == (40, 100 + 3 * 40) and found["seeds"] == dict(training=7, evaluation=1_000_000)


# ---- each study on made-up rows --------------------------------------------------------------------------------------


def made_up(request):
    """A row that depends on what is asked: more steps are better, runs of 8 windows first are worse."""
    name = str(request["folder"])
    fd = 2.0 + 1 / request["steps"] + 0.5 * ("progressive" in name) + 0.9 * ("no-direction" in name) + zlib.crc32(f"{name} {request.get('solver')}".encode()) % 1000 * 1e-5
    fd += {"d": 0.3, "m": 0.1}.get((request.get("edit") or "x")[0][0], 0) + 0.1 * (request.get("guidance") or 1)
    noise = np.random.default_rng(zlib.crc32(f"{name} {request}".encode())).normal(0, 0.05, 20)
    return dict(fd_corrected=fd, fd_groups=(fd + noise - noise.mean()).tolist(), fd_interval=[fd - 0.1, fd + 0.1], endpoint_error=fd / 10, clip=60.0, chord_error=[0.1], straightness=[0.1],
                prompt_accuracy=dict(all=0.7 - fd / 100))


@pytest.fixture
def pretend(lab, random_sd, monkeypatch):
    """A Lab whose runs are all the random model and whose rows are made up."""
    lab.train = lambda runs: {name: lab.out / name for name in runs}
    lab.measure = lambda requests: [made_up(request) for request in requests]
    lab.c.model = str(random_sd)
    bins = [(0.1 * i, 0.1, 1.0, 10.0) for i in range(10)]
    monkeypatch.setattr(time_law, "errors", lambda *_: [(1 - i / 64, 0.1) for i in range(64)])
    monkeypatch.setattr(time_law, "plane", lambda lab, share, width, updates: 0.5 - 0.1 * share - 0.1 * (width > 0))
    monkeypatch.setattr(simple_reflow, "loss_spread", lambda *_: {"raw": bins, "normalized": [(t, 0.5, 1.0, 2.0) for t, *_ in bins]})
    monkeypatch.setattr(simple_reflow, "end_distances", lambda *_: [made_up(dict(folder=name, steps=1))["fd_groups"] for name in ("ends", "projected")])
    return lab


@pytest.mark.filterwarnings("ignore:Precision loss occurred")         # made-up differences are all alike
@pytest.mark.parametrize("name", [name for name in __main__.STUDIES if name != "discrepancy"])
def test_a_study_is_whole(pretend, name, tmp_path):
    found = __main__.STUDIES[name](pretend)
    assert found["verdict"] and all(sentence.endswith(".") for sentence in found["verdict"])
    for caption, columns, lines in found["tables"]:
        assert caption and lines and all(len(line) == len(columns) for line in lines)
    found.pop("figure").savefig(tmp_path / "figure.png")
    text = results.markdown(dict(found, question=__main__.STUDIES[name].__doc__.strip(), command="x", protocol="y"))
    assert text.count("\n|") >= 3 and "nan" not in text and json.dumps(found) and results.tables(found) in text
    assert f"**q** {found['verdict'][0]}" in results.index({name: dict(found, question="q", command="x")})


@pytest.mark.filterwarnings("ignore:Precision loss occurred")
@pytest.mark.parametrize("chosen", [["perflow", "proreflow-i"], ["proreflow-ii"], ["default", "perflow"]])
def test_some_methods_alone_are_compared_with_each_other(pretend, chosen):
    trained, pretend.c.methods = {}, chosen
    pretend.train = lambda runs: trained.update(runs) or {name: pretend.out / name for name in runs}
    found = methods.methods(pretend)
    assert {re.sub(r"-(adamw|muon|\d).*", "", Path(name).name) for name in trained} == set(chosen)
    assert {methods.slug(line[0]) for line in found["tables"][2][2]} == {*chosen, methods.slug("teacher, plain DDIM")}
    assert sum("against PeRFlow " in sentence for sentence in found["verdict"]) == ("perflow" in chosen)
    pretend.c.methods = ["perflo"]
    with pytest.raises(cli.UserError, match="--methods perflo: not one of .*; did you mean perflow"):
        methods.methods(pretend)


@pytest.mark.filterwarnings("ignore:Precision loss occurred")
def test_peers_have_three_seeds_and_are_compared_on_those_in_the_steps_they_are_made_for(pretend):
    pretend.c.seeds, trained = 5, []
    pretend.train = lambda runs: trained.extend(runs) or {name: pretend.out / name for name in runs}
    found = methods.methods(pretend)
    count = {line[0]: line[1] for line in found["tables"][0][2][1:]}
    assert count == {name: 3 if name in methods.PEERS else 5 for name in methods.METHODS}
    assert all(sum(name.startswith(f"methods/{methods.slug(each)}-30000-s") for name in trained) == count[each] for each in count)
    said = {sentence.split(" against ")[1].split(" in ")[0]: sentence for sentence in found["verdict"] if sentence.startswith("default against")}
    assert set(said) == set(methods.METHODS) - {"default"} and all(f"{count[name]} seeds)." in sentence for name, sentence in said.items())
    assert " in 1 step: " in said["LCM"] and " in 2 steps: " in said["ProReflow-II (8→4→2)"] and " in 4 steps: " in said["PeRFlow"]


@pytest.mark.filterwarnings("ignore:Precision loss occurred")
def test_verdicts_are_those_of_the_rows(pretend):
    compared = curriculum.curriculum(pretend)["verdict"]
    assert compared[0].endswith("by FD worse in 3 of 3 comparisons; by endpoint error worse in 3 of 3 comparisons.")
    assert compared[1].endswith("by FD better in 3 of 3 comparisons; by endpoint error better in 3 of 3 comparisons.")
    assert proreflow.noise(pretend)["verdict"][0].startswith("Direction is shown to cost more at 4 of 4 sizes")
    guided = proreflow.guidance(pretend)["verdict"][:2]
    assert all("FD is lowest at guidance 1 " in sentence for sentence in guided)


@pytest.mark.filterwarnings("ignore:Precision loss occurred")
@pytest.mark.parametrize("gains, winner, rounds", [
    ({"forward-pairs": 0.3, "loss-normalization": 0.1, "time-law": -0.1, "high-pass": 0}, "curriculum, forward pairs, loss normalization", 4 + 3 + 2),
    ({"forward-pairs": -0.01, "loss-normalization": 0, "time-law": -1, "high-pass": -1}, "curriculum", 4)])
def test_what_gains_is_added_to_the_curriculum(pretend, gains, winner, rounds):
    pretend.c.seeds = 5
    asked, trained = [], {}

    def measure(requests):
        asked.extend(requests)
        return [dict(clip=60.0, fd_corrected=2 - sum(gain for name, gain in gains.items() if name in str(request["folder"])))
                for request in requests]
    pretend.measure = measure
    pretend.train = lambda runs: trained.update(runs) or {name: pretend.out / name for name in runs}
    found = simple_reflow.best_of_both(pretend)
    assert found["verdict"][0].startswith(f"The winner is {winner}: ") and len(found["tables"][1][2]) == rounds
    kept_name = f"best-of-both/{winner.replace(', ', '-').replace(' ', '-')}-s"
    kept = trained[f"{kept_name}0"]
    assert all((option in kept) == (name in winner) for name, option in simple_reflow.CANDIDATES.items())
    costs = {name: pretend.evaluations(options) for name, options in trained.items()}
    assert max(costs.values()) < 1.02 * min(costs.values()), costs
    # what judges had no say in the choice: neither its seeds of training nor its noise
    noises = {}
    for request in asked:
        noises.setdefault(request.get("seed"), set()).add(int(request["folder"].parent.name[-1]))
    assert noises == {None: {0, 1, 2}, simple_reflow.FRESH_NOISE: {3, 4, 5, 6, 7}}
    assert {name[:-3] for name in trained if name[-1] in "34567"} == {name[:-3] for name in trained if name.startswith((
        "best-of-both/proreflow", "best-of-both/simple-reflow", "best-of-both/curriculum-s", kept_name))}
    assert " 5 seeds of training that had no say" in found["tables"][0][0] and "3 seeds" in found["tables"][1][0]


def test_a_lead_within_the_noise_is_called_no_difference(pretend):
    """In the studies of one seed: the groups of images say what the noise is."""
    def close(request):
        row = made_up(request)
        lead = 0.02 * ("progressive" in str(request["folder"]) or (request.get("edit") or "x")[0][0] == "d")
        return dict(row, fd_corrected=2.0 - lead, fd_groups=[value - row["fd_corrected"] + 2.0 - lead for value in row["fd_groups"]])
    pretend.measure = lambda requests: [close(request) for request in requests]
    for name in ("guidance", "noise"):
        compared = [sentence for sentence in __main__.STUDIES[name](pretend)["verdict"] if "groups of images)" in sentence]
        assert compared and all("no difference is shown" in sentence for sentence in compared), name


def test_the_default_recipe_is_the_winner_of_its_study():
    verdict = json.loads((ROOT / "results" / "studies" / "best-of-both.json").read_text())["verdict"][0]
    winner = verdict.removeprefix("The winner is curriculum, ").split(": ")[0].split(", ")
    options = " ".join([simple_reflow.CURRICULUM, *(simple_reflow.CANDIDATES[name] for name in winner)])
    assert train.resolve_recipe(cli.parse(train.Config, "", options.split())) == reflow.RECIPES["default"]


# ---- what is looked at directly --------------------------------------------------------------------------------------


def test_perturbed_velocities_are_equally_wrong_in_one_way_only(schedule):
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(6, 4, 8, 8, generator=generator) for _ in range(2))
    t = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    alpha, sigma = (v.float()[:, None, None, None] for v in schedule(t))
    z, u = alpha * x + sigma * eps, (eps - x).flatten(1)
    for size in (0.05, 0.4):
        for kind in ("direction", "magnitude"):
            x_hat, eps_hat = proreflow.perturb(z, t, x, eps, schedule, kind, size)
            moved = (eps_hat - x_hat).flatten(1)
            assert torch.allclose(alpha * x_hat + sigma * eps_hat, z, atol=1e-5)
            assert torch.allclose((moved - u).norm(dim=1), size * u.norm(dim=1), rtol=1e-4)
            cosine = torch.cosine_similarity(moved, u)
            if kind == "direction":
                assert torch.allclose(moved.norm(dim=1), u.norm(dim=1), rtol=1e-4) and (cosine < 0.9999).all()
            else:
                assert torch.allclose(cosine, torch.ones(6), atol=1e-5)
    # an image is perturbed alike in any batch, and otherwise than its neighbor
    alone = proreflow.perturb(z[2:3], t[2:3], x[2:3], eps[2:3], schedule, "direction", 0.4)
    assert torch.allclose(alone[0], proreflow.perturb(z, t, x, eps, schedule, "direction", 0.4)[0][2:3], atol=1e-6)


def test_errors_at_window_starts_are_the_chord_errors(lab, random_sd, monkeypatch):
    """time-law's profile against eval.py's column, which asks at the starts alone; elsewhere it is another number."""
    pipeline, model, _ = saved.open_model(str(random_sd))
    points = []
    end = sampler.generate(pipeline, model, ["fox", "food", ""], range(3), sampler.time_grid(8), batch=3, callback=lambda state: points.append(state["z"]))
    path = torch.stack([*points, end], 1)

    class Rows(list):
        def __getitem__(self, numbers):
            return {"z": path}
    lab.c.model = str(random_sd)
    monkeypatch.setattr(time_law, "evaluator", lambda c: types.SimpleNamespace(teacher_path=Rows(range(3)), prompts=["fox", "food", "", "more"]))
    found = time_law.errors(lab, random_sd)
    cond = models.encode_text(pipeline, ["fox", "food", ""])
    starts = [value for _, value in found[::len(time_law.PLACES)]]
    assert starts == pytest.approx(metrics.chord_error(model, path, cond, 4), rel=1e-4)
    assert [t for t, _ in found[::len(time_law.PLACES)]] == [1, 0.75, 0.5, 0.25] and found[1][1] != starts[0]


def test_the_plane_is_trained_once_and_the_law_decides(lab, monkeypatch):
    untrained = time_law.plane(lab, 0, 0, 0)
    uniform, half = (time_law.plane(lab, share, 32, 150) for share in (0, 0.5))
    assert half < untrained and half < uniform
    monkeypatch.setattr(time_law.flow2d, "straighten", lambda *_: pytest.fail("trained again"))
    assert time_law.plane(lab, 0.5, 32, 150) == half


def test_velocities_are_those_the_sampler_meets(random_sd):
    u = proreflow.velocities(random_sd, "cpu", ["fox", "food"], steps=4)
    assert u.shape[:2] == (4, 2) and u.isfinite().all() and not torch.allclose(u[0], u[3])


@pytest.mark.slow
def test_the_spread_of_a_loss_is_least_mean_and_most_at_each_time(lab, random_sd):
    lab.c.model, lab.c.data, lab.c.scale = str(random_sd), "scenes", 0.01
    spread = simple_reflow.loss_spread(lab, random_sd, count=256, bins=4)
    for bins in spread.values():
        assert len(bins) == 4 and all(0 < least < mean < most for _, least, mean, most in bins)
        assert [t for t, *_ in bins] == [0.125, 0.375, 0.625, 0.875]
        assert np.mean([mean for _, _, mean, _ in bins]) == pytest.approx(1, abs=0.4)       # about as many samples in each
    # a random network's losses depend on the time above all: what the normalizer has learned takes most of that away
    assert simple_reflow.between(spread["normalized"]) < 0.7 * simple_reflow.between(spread["raw"])
    assert simple_reflow.within([(0, 1, 2, 4), (1, 1, 3, 9)]) == 9 and simple_reflow.between([(0, 1, 2, 4), (1, 1, 3, 9)]) == 1.5


def test_projected_ends_are_told_from_the_teachers(lab, random_sd, monkeypatch):
    """By a network whose features are the picture's mean colors: the random model's pictures are far from white ones."""
    network = types.SimpleNamespace(images=lambda images: images.double().mean((2, 3)))
    white = 1 + 0.01 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(simple_reflow, "evaluator", lambda c: types.SimpleNamespace(
        network=network, device="cpu", protocol=types.SimpleNamespace(network="colors"), reference={"colors": white}))
    lab.c.model, lab.c.data, lab.c.scale = str(random_sd), "scenes", 0.02
    found = simple_reflow.end_distances(lab)
    assert [len(values) for values in found] == [20, 20]
    teacher, projected = map(np.mean, found)
    assert teacher != projected and min(teacher, projected) > 0.1


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_eyes(tmp_path_factory):
    """A folder with a CLIPModel and a judge of 8 features: 80 images are enough."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("eyes"), build.make_tokenizer()
    settings = build.make_clip(tokenizer).config
    settings.projection_dim = 8
    CLIPModel(settings).save_pretrained(folder), tokenizer.save_pretrained(folder)
    save_file(judge.Judge((8, 8, 8)).state_dict(), folder / "judge.safetensors")
    return folder


@pytest.mark.slow
def test_a_study_trains_measures_writes_and_is_not_repeated(random_sd, small_eyes, tmp_path, monkeypatch, capsys):
    name = f"guidance-{random_sd.name}"                    # of another teacher than the default
    monkeypatch.setattr(runner, "EVALUATORS", {})
    c = runner.Config(study=["guidance", "discrepancy"], scale=0.002, model=str(random_sd), data="scenes", n=80, real=80, paths=4,
                      out="rows", results=str(tmp_path / "results"), clip=str(small_eyes), judge=str(small_eyes), workers=1, device="cpu")
    monkeypatch.chdir(tmp_path)                            # a folder with the name of a key, which stays
    monkeypatch.setattr(proreflow, "SCALES", (1, 2))
    __main__.main(c)
    first = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert f"guidance --model {random_sd} --data scenes --scale 0.002 --n 80 --real 80 --paths 4 --clip" in first["command"]
    assert first["runs"] and first["runs"][0].startswith("python train.py --model") and first["commit"] and len(first["tables"][0][2]) == 2
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 5000 and (tmp_path / "results" / f"discrepancy-{random_sd.name}.png").stat().st_size > 5000
    assert (tmp_path / "results" / f"{name}.md").read_text() == results.markdown(first)
    out = capsys.readouterr().out
    assert first["verdict"][0] in out
    rows = first["rows"]
    assert {row["method"] for row in rows} == {"default", "ddim"} and {row["steps"] for row in rows if row["method"] == "ddim"} == {
        row["steps"] for row in rows}
    for row in rows:
        of_student = row["method"] == "default"
        assert row["fd_interval"][0] <= row["fd_corrected"] <= row["fd_interval"][1] and row["nfe"] == row["steps"] * (1 if row["guidance"] == 1 else 2)
        assert row["seeds"] == dict(training=0 if of_student else None, evaluation=1_000_000) and row["recipe"] == ("default" if of_student else None)
        assert (row["samples"] > 0) == of_student and row["evaluations"] >= 3 * row["samples"]
    monkeypatch.setattr(runner.Lab, "run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda *_: pytest.fail("measured again"))
    __main__.main(dataclasses.replace(c, study=["guidance"]))
    again = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert all(row["run"] == first["teacher"] or row["run"].startswith("runs/study/") for row in rows)
    assert again["seconds"] >= first["seconds"]             # a call that finds all ready does not say that it takes none
    assert again["tables"] == first["tables"] and again["verdict"] == first["verdict"] and again["rows"] == rows
    assert re.search(r"guidance: \d+ minutes at the longest so far \(.*guidance-.*json\)", capsys.readouterr().out)


def test_a_run_that_fails_names_itself_and_its_reason(lab, monkeypatch):
    lab.c.model = "/nowhere"
    monkeypatch.setattr(runner.subprocess, "run", lambda command, **_: run_python(command[1:], ROOT))
    with pytest.raises(UserError, match=r"broken: python train.py .*nowhere.* ended with status 2: error: .*nowhere"):
        lab.train({"broken": "--recipe perflow --updates 8"})


@pytest.mark.parametrize("changes, message", [
    (dict(study=["curricula"]), "did you mean curriculum"), (dict(scale=0), "--scale 0"), (dict(seeds=0), "--seeds 0"), (dict(workers=0), "--workers 0")])
def test_bad_input_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        __main__.main(runner.Config(**{"study": ["noise"], **changes}))


def test_the_command_line_knows_studies(run_file):
    done = run_file("-m", "studies", "nonsense")
    assert done.returncode == 2 and "study nonsense" in done.stderr and "Traceback" not in done.stderr
