"""The page of results: whole, escaped, in one file; and what is wrong with the results is said in one line."""
import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from conftest import ROOT
from PIL import Image

import config
import eval as evaluation
import report
from studies import STUDIES

NASTY = """<b onload="x">&amp; 'quoted' </script></style>{{ 7 * 7 }}{% raw %}"""


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(file, "PNG")
    return file.getvalue()


def leave(folder, name, colour="red", **changes):
    """NAME.json and NAME.png as a study leaves them.  Returns: the JSON's content."""
    study = dict(name=name, question=f"Is {name} good?", command=f"python eval.py --study {name}",
                 verdict=[f"{name}: better (-0.1 FD).", f"{name}: not worse."], protocol=f"N = 2048 for {name}.",
                 tables=[[f"Table of {name}", ["method", "steps", "FD"], [["teacher", 32, "1.76 (1.11 to 1.91)"], [f"{name} 8→4", 4, "-"]]]],
                 runs=[f"python train.py --name {name}", "python train.py --windows 8 4"], seconds=90.4, commit="abc+",
                 versions=dict(torch="2.13", diffusers="0.42")) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(study, ensure_ascii=False), encoding="utf-8")
    (folder / f"{name}.png").write_bytes(png(colour))
    return study


class Page(HTMLParser):
    """A page as a browser reads it: tags [(name, attributes)], words inside each kind of tag, and what lies in <details>."""
    VOID = {"meta", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.folded, self.open = [], {}, "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.setdefault(tag, []).append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag                       # every tag is closed, and in order

    def handle_data(self, text):
        for tag in {*self.open}:
            self.inside[tag][-1] += text
        self.folded += text * ("details" in self.open)

    def text(self, tag="body"):
        return " ".join(" ".join(self.inside.get(tag, [])).split())

    def of(self, tag, key):
        return [attributes[key] for name, attributes in self.tags if name == tag and key in attributes]


@pytest.fixture
def make(tmp_path):
    """make(embedded=...) writes the page of tmp_path/results.  Returns: Page."""
    def build(embedded=tmp_path / "none.json"):
        report.main(report.Config(str(tmp_path / "results"), str(embedded), str(tmp_path / "report.html")))
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    return build


# ---- what a page is --------------------------------------------------------------------------------------------------


def test_it_is_one_file_that_asks_for_nothing(make, tmp_path):
    for name in STUDIES:
        leave(tmp_path / "results", name)
    page = make(ROOT / "results" / "tiny.json")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["report.html"]
    assert not {"script", "iframe", "object", "embed", "video", "audio", "source", "base"} & {tag for tag, _ in page.tags}
    resources = page.of("img", "src") + page.of("link", "href")
    assert len(resources) == len(STUDIES) + 1 and all(resource.startswith("data:") for resource in resources)
    assert not re.search(r"url\(|@import|expression\(", page.text("style")) and not any("srcset" in attributes for _, attributes in page.tags)
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert '"Segoe UI"' in page.text("style")               # CSS is not escaped


def test_every_link_has_its_target_and_every_id_is_unique(make, tmp_path):
    for name in ("samples", "ablation", "pairs"):
        leave(tmp_path / "results", name)
    page = make(ROOT / "results" / "tiny.json")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    inner = [link[1:] for link in page.of("a", "href") if link.startswith("#")]
    assert inner == ["ablation", "pairs", "embedded", "paper", "missing"] and set(inner) < set(ids)


def test_all_a_study_says_is_there(make, tmp_path):
    studies = [leave(tmp_path / "results", name) for name in ("samples", "ablation", "one-step")]
    page = make()
    for study in studies:
        said = [study["question"]] * (study["name"] != "samples") + [*study["verdict"], study["protocol"], study["command"], *study["runs"]]
        for sentence in said:
            assert sentence in page.text(), sentence
        for caption, columns, lines in study["tables"]:
            assert caption in page.inside["figcaption"]
            start = page.inside["td"].index(str(lines[0][0]), [study["name"] for study in studies].index(study["name"]) * 6)
            assert page.inside["td"][start:start + 6] == [str(cell) for line in lines for cell in line]
            assert page.inside["th"][:3] == columns
    assert page.of("img", "alt") == [study["question"] for study in studies]
    assert "torch 2.13, diffusers 0.42. The last call took 90 s" in page.text()


def test_what_comes_from_json_is_text_wherever_it_stands(make, tmp_path):
    leave(tmp_path / "results", "ablation", question=NASTY, command=NASTY, verdict=[NASTY] * 8, protocol=NASTY, runs=[NASTY],
          tables=[[NASTY, [NASTY, "x"], [[NASTY, 1]]]], versions={NASTY: NASTY})
    plain = leave(tmp_path / "results", "pairs")
    page = make()
    assert "b" not in {tag for tag, _ in page.tags} and not page.of("b", "onload")
    assert page.inside["td"][:2] == [NASTY, "1"] and page.inside["th"][0] == NASTY and page.inside["figcaption"][0] == NASTY
    assert page.inside["li"][:8] == [NASTY] * 8 and NASTY in page.inside["h2"] and page.of("img", "alt") == [NASTY, plain["question"]]
    assert page.inside["code"][:2] == [NASTY, NASTY] and f"{NASTY} {NASTY}." in page.text()
    assert page.inside["a"][0] == NASTY and "7 * 7" in page.text("nav")


def test_pictures_are_the_files_bit_by_bit(make, tmp_path):
    for name, colour in (("samples", "green"), ("ablation", "blue"), ("noise", "pink")):
        leave(tmp_path / "results", name, colour)
    found = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in make().of("img", "src")]
    assert found == [(tmp_path / "results" / f"{name}.png").read_bytes() for name in ("samples", "ablation", "noise")] == [
        png(colour) for colour in ("green", "blue", "pink")]


def test_samples_come_first_and_the_others_as_in_studies(make, tmp_path):
    for name in ("aardvark", *sorted(STUDIES, reverse=True)):
        leave(tmp_path / "results", name)
    page = make()
    order = [name for name in STUDIES if name != "samples"] + ["aardvark"]
    assert page.of("img", "alt") == [f"Is {name} good?" for name in ["samples", *order]]
    assert page.of("section", "id") == order + ["missing"]
    assert page.text("header").index("samples: better") < page.text("header").index("ablation: better")


def test_the_contents_give_each_question_and_its_first_sentence(make, tmp_path):
    for name in ("samples", "noise"):
        leave(tmp_path / "results", name)
    page = make()
    assert "Is noise good? noise: better (-0.1 FD)." in page.text("nav") and "not worse" not in page.text("nav")
    assert "samples" not in page.text("nav")                # its pictures stand beside


def test_the_longest_parts_are_folded_and_the_rest_is_not(make, tmp_path):
    leave(tmp_path / "results", "ablation", verdict=[f"Sentence {i}." for i in range(9)])
    page = make()
    for i in range(9):
        assert f"Sentence {i}." in page.text() and (f"Sentence {i}." in page.folded) == (i >= 6)
    assert "3 more comparisons" in page.folded and "The 2 training runs" in page.folded and "--windows 8 4" in page.folded
    assert "1.76" not in page.folded and "--study ablation" not in page.folded


def test_a_study_of_no_runs_and_no_tables_is_shown_without_them(make, tmp_path):
    leave(tmp_path / "results", "noise", runs=[], tables=[], verdict=[])
    page = make()
    assert "training run" not in page.text() and "Is noise good?" in page.text("h2")


@pytest.mark.parametrize("present", [["noise"], ["samples"], list(STUDIES)])
def test_what_is_missing_is_named_with_its_command(make, tmp_path, capsys, present):
    for name in present:
        leave(tmp_path / "results", name)
    page, printed = make(ROOT / "results" / "tiny.json"), capsys.readouterr().out
    for name, study in STUDIES.items():
        gone = name not in present
        assert (f"{' '.join(study.__doc__.split())} python eval.py --study {name}" in page.text()) == gone
        assert (f"--study {name}" in printed) == gone
    assert ("missing" in page.of("section", "id")) == (len(present) < len(STUDIES))
    assert f"{len(STUDIES) - len(present)} without results" in page.text("nav") or len(present) == len(STUDIES)


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_the_embedded_default_is_evals_table(make, tmp_path, name):
    leave(tmp_path / "results", "samples", tables=[])
    file = ROOT / "results" / f"{name}.json"
    page, text = make(file), evaluation.table(json.loads(file.read_text()))
    cells = [cell.strip() for line in text.splitlines()[2:] if line.startswith("|") for cell in line.strip("|").split("|")]
    assert page.inside["td"][:len(cells)] == cells and len(cells) > 50
    assert " ".join(text.split("\n\n", 1)[1].split()) in page.text()
    assert "embedded" in page.of("section", "id")


def test_without_the_embedded_default_the_page_says_so(make, tmp_path):
    leave(tmp_path / "results", "samples")
    page = make(tmp_path / "tiny.json")
    assert "embedded" not in page.of("section", "id") and "tiny.json python eval.py runs/train" in page.text("section")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells, side", [
    (["1", "-", ""], "number"), ([1, 2.5], "number"), (["1.76 (1.11 to 1.91)"], "number"), (["2.04 ± 0.34"], "number"), (["-0.1", "+3"], "number"),
    (["1.50 (1.20 x); 61.9"], "number"), (["1e-05", "12%"], "number"), (["2-ReFlow", "3"], "text"), (["8→4→2"], "text"), (["4 windows"], "text"),
    (["teacher", "1"], "text"), (["8→4, equal updates"], "text"), (["none"], "text"), (["to"], "text")])
def test_a_column_is_set_to_the_right_if_all_its_cells_are_numbers(cells, side):
    assert report.sides(["x"], [[cell] for cell in cells]) == [side]


def test_sides_reach_the_page_for_heads_and_cells(make, tmp_path):
    leave(tmp_path / "results", "noise")
    page = make()
    for tag in ("th", "td"):
        assert page.of(tag, "class")[:3] == ["text", "number", "number"]


def test_durations_read_well():
    assert [report.duration(s) for s in (0.4, 119, 120, 7199, 7200, 30000)] == ["0 s", "119 s", "2 min", "120 min", "2.0 h", "8.3 h"]


def test_the_papers_numbers_agree_with_each_other_and_are_marked_as_theirs(make, tmp_path):
    leave(tmp_path / "results", "samples")
    page = make()
    assert "theirs, not ours" in page.text("aside") and {"arXiv 2503.04824", "arXiv 2410.07815"} <= set(page.inside["a"])
    (_, _, first), (_, _, second), (_, _, ablation), (_, _, small) = report.PAPER
    fid = {(name.split(" (")[0], steps): float(value) for name, steps, value, _ in first}
    without, direction, progressive, both = (float(line[1]) for line in ablation)
    assert (without, both) == (fid["PeRFlow", 4], fid["ProReflow-I", 4]) and without > direction > progressive > both
    # the text's claim: the two setups differ by what ProReflow-I gains
    assert round(without - both, 2) == round(fid["PeRFlow", 4] - 22.97, 2) == 0.84
    assert min(float(value) for _, steps, value in second if steps <= 4) == 10.70 and len(first) == 8 and len(second) == 17
    assert len(small) == 4 and all(float(guided) < float(plain) for _, plain, guided in small)
    for _, columns, lines in report.PAPER:
        assert all(len(line) == len(columns) for line in lines)
        assert all(str(cell) in page.inside["td"] for line in lines for cell in line)


def test_the_same_results_give_the_same_page(make, tmp_path):
    leave(tmp_path / "results", "samples")
    make()
    before = (tmp_path / "report.html").read_bytes()
    make()
    assert (tmp_path / "report.html").read_bytes() == before


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def spoil(folder, what):
    """Leave one thing wrong in a folder of one good and one bad study."""
    leave(folder, "noise")
    content = leave(folder, "pairs")
    file, picture = folder / "pairs.json", folder / "pairs.png"
    {"torn": lambda: file.write_text('{"name": "pa'),
     "bytes": lambda: file.write_bytes(b"\xff\xfe{}"),
     "list": lambda: file.write_text("[]"),
     "number": lambda: file.write_text("3"),
     "key": lambda: file.write_text(json.dumps({key: value for key, value in content.items() if key != "verdict"})),
     "ragged": lambda: leave(folder, "pairs", tables=[["a", ["x", "y"], [[1, 2], [3]]]]),
     "no picture": picture.unlink,
     "torn picture": lambda: picture.write_bytes(picture.read_bytes()[:-5]),
     "no png": lambda: picture.write_bytes(b"GIF89a" + picture.read_bytes()[6:]),
     "nothing": lambda: [other.unlink() for other in folder.iterdir()],
     "embedded": lambda: (folder.parent / "tiny.json").write_text("{"),
     "embedded key": lambda: (folder.parent / "tiny.json").write_text('{"rows": []}')}[what]()


@pytest.mark.parametrize("what, words", [
    ("torn", ["pairs.json", "not valid JSON"]), ("bytes", ["pairs.json", "not valid JSON"]), ("list", ["pairs.json", "has no question"]),
    ("number", ["pairs.json", "has no question"]), ("key", ["pairs.json", "has no verdict"]), ("ragged", ["pairs.json", "'a'", "--study pairs"]), ("no picture", ["pairs.png: missing", "--study pairs"]),
    ("torn picture", ["pairs.png: not a whole PNG"]), ("no png", ["pairs.png: not a whole PNG"]),
    ("nothing", ["results: no study's results", "python eval.py --study all"]), ("embedded", ["tiny.json", "not valid JSON"]),
    ("embedded key", ["tiny.json", "has no protocol"])])
def test_bad_results_are_one_line_that_names_the_file_and_the_last_page_stays(tmp_path, capsys, what, words):
    spoil(tmp_path / "results", what)
    (tmp_path / "report.html").write_text("the last page")
    with pytest.raises(SystemExit) as stop:
        config.run(report.main, report.Config, "", ["--results", str(tmp_path / "results"), "--embedded", str(tmp_path / "tiny.json"),
                                                    "--out", str(tmp_path / "report.html")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert (tmp_path / "report.html").read_text() == "the last page"


def test_a_folder_that_does_not_exist_is_no_results(tmp_path):
    with pytest.raises(config.UserError, match="no study's results there"):
        report.main(report.Config(results=str(tmp_path / "nowhere"), out=str(tmp_path / "report.html")))


def test_a_folder_is_never_overwritten_by_the_page(tmp_path):
    leave(tmp_path / "results", "noise")
    for out, words in (("results", "is a folder"), ("nowhere/report.html", "its folder does not exist")):
        with pytest.raises(config.UserError, match=words):
            report.main(report.Config(results=str(tmp_path / "results"), out=str(tmp_path / out)))
    assert (tmp_path / "results" / "noise.json").is_file()
