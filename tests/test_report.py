"""HTML reports: complete, escaped and self-contained, whatever files a run contains."""

import base64
import hashlib
import html
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from polyseg import INTENDED_USE
from polyseg.commands import report as page_job
from polyseg.commands.report import make_page, page_of
from polyseg.errors import PolysegError
from polyseg.figures.training import training_curves, validation_curves
from polyseg.metrics.image_metrics import METRICS
from polyseg.records import Assessment, Schedule
from polyseg.report import figures, run_files
from polyseg.report.document import Folded, Gallery, Page, PageSection, Picture, Table, Text, render
from polyseg.report.run_files import EvaluationFiles, RunFiles, read_run
from polyseg.report.tables import (
    comparison_tables,
    conclusions,
    dice_comparison,
    further_tables,
    metric_tables,
    number,
)
from polyseg.runs.record_files import write_assessment, write_schedule

EVIL = '<script>alert("1")</script>&\'\u202e'
VOID = {"meta", "img", "br"}
IMAGES = 30
HISTORY = (
    "epoch,train_loss,validation_dice,learning_rate,assessed\n"
    "1,0.9,0.2,0.01,0\n2,0.8,0.7,0.01,1\n3,0.7,0.6,0.01,0\n"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Parser(HTMLParser):
    """Collect tags, ids and words of a page, and fail if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def png(size=(8, 6)):
    stream = io.BytesIO()
    Image.new("RGB", size, "navy").save(stream, "PNG")
    return stream.getvalue()


def assessment(epoch, *, labels=(), difficulty=None, dice=None, case="case"):
    rows = IMAGES * (len(labels) or 1)
    values = np.linspace(0.1, 0.4, rows) if difficulty is None else np.resize(difficulty, rows)
    return Assessment(
        epoch=epoch,
        samples=7,
        rate=0.2,
        metric="entropy",
        region="mask",
        masks="consistent",
        seed=0,
        ids=[f"{case}{i}" for i in range(IMAGES) for _ in labels or [""]],
        scores={"entropy": values},
        scores_se={},
        foreground_pixels=np.ones(rows, np.int64),
        fallback=np.zeros(rows, np.int8),
        dice=np.linspace(0.9, 0.3, rows) if dice is None else np.resize(dice, rows),
        rank_stability={"entropy": 0.875},
        labels=list(labels) * IMAGES or None,
    )


def summary(name, labels=("",)):
    statistics = {"mean": 0.5, "deviation": 0.25, "low": 0.4, "high": 0.6, "n": 29}
    return {
        "rule": "The rule.",
        "metrics": {"dice": {"title": "Dice!"}},
        "runs": [
            {"name": name, "counts": {"images": IMAGES}, "metrics": {"dice": statistics}}
            | ({"label": label} if label else {})
            for label in labels
        ],
    }


def per_image(name="case", run="a"):
    dice = [f"{value:.6g}" for value in np.random.default_rng(0).permutation(IMAGES) / IMAGES]
    lines = [f'{run},"{name}{i}",{one},{i}' for i, one in enumerate(dice)]
    return "\n".join(["run,id,dice,mask_pixels", *lines, f'{run},"{name} undefined",,3']) + "\n"


@pytest.fixture
def drawn():
    """Draw real figures; without this fixture figures are empty, which is faster."""


@pytest.fixture(autouse=True)
def _empty_drawings(request, monkeypatch):
    if "drawn" not in request.fixturenames:

        def empty(_, caption, alternative, *, wide=False):
            return Picture(b"<svg/>", "svg", caption, alternative, wide)

        monkeypatch.setattr(figures, "_drawn", empty)


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run's folder as training would, without training."""

    def make(name="a", *, loss="polydice1", start=0.2, labels=(), **changes):
        path = tmp_path / "runs" / name
        epsilon = np.random.default_rng(0).uniform(-0.4, 1, (3, IMAGES * (len(labels) or 1)))
        last = assessment(2, labels=labels, **changes)
        for folder in ("uncertainty", "figures", "evaluation", "checkpoints"):
            (path / folder).mkdir(parents=True)
        (path / "checkpoints/best.safetensors").touch()  # the report does not read it
        settings = (
            f"loss: {{name: {loss}}}\noutput: {{path: {name}}}\ncontrol: {{start: {start}}}\n"
        )
        (path / "config.yaml").write_text(settings)
        command = ["/usr/bin/polyseg", "train", "--set", "data.path=a b; rm"]
        environment = {"polyseg": "0.9", "device": "cpu", "started": "2026-01-02T03:04:05+0000"}
        (path / "environment.json").write_text(json.dumps(environment | {"command": command}))
        (path / "history.csv").write_text(HISTORY)
        write_assessment(path / "uncertainty" / "epoch_0002.h5", last)
        schedule = Schedule(last.ids, np.array([1, 2, 3]), epsilon.astype("f4"), last.labels)
        write_schedule(path / "schedule.h5", schedule)
        (path / "evaluation/summary.json").write_text(json.dumps(summary(name, labels or ("",))))
        (path / "evaluation/per_image.csv").write_text(per_image(run=name))
        (path / "evaluation/comparison.png").write_bytes(png())
        (path / "figures/overlays_smallest_d.png").write_bytes(png((9, 9)))
        (path / "figures/overlays_largest_d.png").write_bytes(png((7, 7)))
        (path / "figures/curves.png").write_bytes(png((5, 5)))
        return path

    return make


FIGURES = {
    "differences": (1400, 660),
    "comparison": (1400, 700),
    "reliability": (700, 860),
    "risk_coverage": (700, 720),
    "robustness": (700, 470),
    "predictions_1_cyst_worst": (1050, 2160),
    "predictions_best": (1050, 2160),
    "own": (700, 500),
}


@pytest.fixture
def evaluation(tmp_path):
    """Return a folder with the files that `polyseg evaluate` writes."""
    path = tmp_path / "cmp"
    path.mkdir()
    record = summary("adaptive") | {"comparisons": compared(DIFFERENCE)}
    (path / "summary.json").write_text(json.dumps(record))
    (path / "per_image.csv").write_text(per_image())
    for name, size in FIGURES.items():
        (path / f"{name}.png").write_bytes(png(size))
    return path


def written(*runs, name="page.html", **options):
    return make_page(runs, out=runs[0].parent.parent / name, **options).read_text()


def remarks(page):
    return Parser(page).text.partition("Summary")[0]


def test_report_shows_all_records_of_a_run(make_run):
    page = Parser(written(make_run()))
    assert "Trained 2026-01-02 polyseg 0.9" in page.text
    assert "a polydice1 3 2 0.700 30 0.500 ± 0.250" in page.text
    assert "Dice! 0.500 ± 0.250 0.400 to 0.600, n = 29" in page.text
    assert "loss: {name: polydice1}" in page.text
    assert "polyseg train --set 'data.path=a b; rm'" in page.text
    heads = [one for one in page.words if one.startswith("case") or one == "Difficulty and ε"]
    assert len(heads) == 2 + 20 + 30 + 1  # two headings, the worst images, all images
    assert len(page.all("figure")) == 4 + 3  # drawn and stored figures, the curves only once
    assert [one["class"] for one in page.all("figure")].count("png") == 3


@pytest.mark.parametrize(
    ("arm", "shown"), [("", "replayed"), (", replay_arm: permuted", "permuted")]
)
def test_first_table_names_the_arm_of_a_replay(make_run, arm, shown):
    run = make_run()
    (run / "config.yaml").write_text(
        f"loss: {{name: polydice1}}\ncontrol: {{replay: x{arm}}}\n"  # 0.1 had no arms
    )
    assert f"a polydice1, {shown} ε 3 2" in Parser(written(run)).text


def test_first_table_has_the_number_of_patients_only_if_metrics_are_by_patient(make_run):
    run = make_run()
    record = summary("a") | {"by": "patient"}
    record["runs"][0]["patients"] = 7
    (run / "evaluation/summary.json").write_text(json.dumps(record))
    text = Parser(written(run)).text
    assert "0.700 30 (7 patients) 0.500 ± 0.250" in text
    assert "over the patients if their number is given" in text
    (run / "evaluation/summary.json").write_text(json.dumps(record | {"by": "image"}))
    assert "0.700 30 0.500 ± 0.250" in Parser(written(run, name="again.html")).text


def test_page_ends_with_the_intended_use(make_run):
    page = written(make_run())
    assert f"<footer><p>{INTENDED_USE}</p></footer>" in page.partition("</main>")[2]


def test_names_escaped_in_csv_are_shown_unescaped(make_run):
    run = make_run("a")
    table = per_image("'=1+1 ", "'@a") + "'@a,''=2 ,0.5,3\n"
    (run / "evaluation/per_image.csv").write_text(table)
    text = Parser(written(run)).text
    assert "=1+1 0" in text and "'=1+1" not in text and "''=2" not in text and "'=2" in text


def test_assessment_table_equals_numpy(make_run):
    run = make_run()
    epsilon = read_run(run, "a").schedule.epsilon[2]
    expected = [
        f"{one:#.3g}" for one in np.percentile(np.linspace(0.1, 0.4, 30), (5, 25, 50, 75, 95))
    ]
    expected += [f"{one:.2f}".replace("-", "−") for one in np.percentile(epsilon, (5, 50, 95))]
    text = Parser(written(run)).text
    assert " ".join(["2 7 30", *expected, "1.00 1.00 to 1.00 0.88"]) in text
    assert "Images of largest and smallest D" in text and "ardest" not in text


@pytest.mark.parametrize("labels", [(), ("bone", "cyst")])
def test_page_reports_difficulty_that_falls_as_the_error_rises(make_run, labels):
    rows = IMAGES * (len(labels) or 1)
    run = make_run(labels=labels, dice=np.linspace(0.3, 0.9, rows))
    text = Parser(written(run)).text
    for name in [f"D of {label}" for label in labels] or ["D"]:
        assert (
            f"correlation of {name} with 1 - Dice: -1.00 (95 % interval -1.00 to -1.00, 30 images)"
            f": {name} falls as the error rises; see `polyseg schedule validity`" in text
        )


def test_worst_images_are_first_and_undefined_ones_last(make_run):
    page = written(make_run())
    worst, everything = re.findall(r'<table[^>]*class="sortable">(.*?)</table>', page, flags=re.S)
    for table, count in ((worst, 20), (everything, IMAGES + 1)):
        dice = re.findall(r'<tr><th scope="row">[^<]*</th><td class="number">([^<]*)<', table)
        assert len(dice) == count
        known = [float(one) for one in dice if one != "–"]
        assert known == sorted(known)
        assert (dice[-1] == "–") == (count > IMAGES)


def test_long_image_tables_are_shortened(make_run, evaluation, monkeypatch):
    monkeypatch.setattr(page_job, "_MOST_ROWS", 27)
    page = Parser(written(make_run(), evaluations=[evaluation])).text
    assert "20 of 31 test images of a by Dice" in page
    assert "The first 27 of 31 test images of a by Dice" in page
    assert (
        "cmp: a row for each network and image, by Dice, the worst first, the first 27 of 31."
        in page
    )
    assert "case undefined" not in page  # undefined values come last


def test_worst_images_have_the_main_metrics_and_all_images_have_all(make_run):
    run = make_run()
    keys = [name for name in METRICS if name != "dice"]
    rows = [",".join([f"case{i}", "p1", str(i / 9), *["0.5"] * len(keys), "7"]) for i in range(9)]
    head = ",".join(["id", "group", "dice", *keys, "mask_pixels"])
    (run / "evaluation/per_image.csv").write_text("\n".join([head, *rows]) + "\n")
    page = written(run)
    main, everything = re.findall(r'<table[^>]*class="sortable">(.*?)</table>', page, flags=re.S)
    of_table = [re.findall(r"<th scope=\"col\"[^>]*>([^<]*)<", one) for one in (main, everything)]
    shown = [metric.title for metric in METRICS.values() if metric.in_figures]
    assert of_table[0] == ["id", "group", *shown, "mask pixels"]
    assert set(of_table[1]) == {one.title for one in METRICS.values()} | set(of_table[0])
    text = Parser(page).text
    assert "Main metrics of 9 test images of a by Dice, the worst first." in text
    assert "<summary>All metrics of 9 test images of a</summary>" in page


def test_settings_table_shows_differences_between_runs(make_run):
    page = written(make_run("a", start=6), make_run("b", loss="dice"))
    (table,) = (
        one for one in re.findall(r"<table.*?</table>", page, flags=re.S) if "setting" in one
    )
    assert re.findall(r"<t[hd](?: [^>]*)?>([^<]*)<", table) == [
        *("setting", "a", "b"),
        *("loss.name", "polydice1", "dice"),
    ]
    assert "Dice! 0.500 ± 0.250 0.400 to 0.600, n = 29 0.500" in Parser(page).text
    same = written(make_run("c"), make_run("d"), name="same.html")
    assert "The runs have the same settings." in same
    other = written(make_run("e"), make_run("f", start=6), name="other.html")
    assert "control.start 0.2 6" in Parser(other).text


def test_each_label_has_its_own_tables_and_figures(make_run):
    page = Parser(written(make_run(labels=("tumour", "cyst"))))
    captions = re.findall(r"Test metrics of (\w+)", page.text)
    assert captions == ["tumour", "cyst"]
    assert page.text.count("a, tumour: ") == page.text.count("a, cyst: ") == 3
    assert "30 tumour 0.500 ± 0.250, cyst 0.500 ± 0.250" in page.text
    assert "2 tumour 7 30" in page.text and "2 cyst 7 30" in page.text


@pytest.mark.parametrize(
    "gone",
    ["config.yaml", "environment.json", "history.csv", "uncertainty", "schedule.h5", "evaluation"],
)
def test_missing_files_of_a_run_give_no_remark(make_run, gone):
    run = make_run()
    shutil.rmtree(run / gone) if (run / gone).is_dir() else (run / gone).unlink()
    page = Parser(written(run))
    assert not page.all("aside")
    links = [one["href"].removeprefix("#") for one in page.all("a")]
    assert links == [one for one in page.ids if one.startswith("part-")]


def test_run_without_checkpoints_gives_a_remark(polyseg, make_run):
    run = make_run()
    shutil.rmtree(run / "checkpoints")
    assert "a: checkpoints/ has no checkpoint: the network cannot" in remarks(written(run))
    said = polyseg("report", run, "--out", run.parent / "other.html").err
    assert "1 remark on files that are missing" in " ".join(said.split())


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "environment.json",
        "history.csv",
        "uncertainty/epoch_0002.h5",
        "schedule.h5",
        "evaluation/summary.json",
        "evaluation/per_image.csv",
        "evaluation/comparison.png",
    ],
)
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"a,b\n1\n", b"[" * 9999])
def test_damaged_file_gives_a_remark_and_the_rest_is_shown(make_run, name, content):
    run = make_run()
    (run / name).write_bytes(content)
    page = written(run)
    # An empty table or list of settings counts as missing, and any text can be a table head.
    none = not content and name.endswith(("csv", "yaml"))
    if not none and not (name.endswith("image.csv") and content.startswith(b"[")):
        assert f"a: {name} could not be read" in remarks(page)
    assert str(run) not in page


def test_links_out_of_the_run_are_not_read(make_run, tmp_path):
    run = make_run()
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "hidden.png").write_bytes(png((31, 33)))
    (secret / "text").write_text("loss: {name: SECRET}\n")
    (run / "figures/linked.png").symlink_to(secret / "hidden.png")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(secret / "text")
    shutil.rmtree(run / "evaluation")
    (run / "evaluation").symlink_to(secret)
    (run / "figures/loop.png").symlink_to("loop.png")
    page = written(run)
    assert "SECRET" not in page and "hidden" not in page
    assert base64.b64encode(png((31, 33))).decode() not in page
    found = remarks(page)
    assert found.count("is a link that leads out of the folder") == 3
    assert "figures/loop.png could not be read" in found


def test_links_within_a_run_are_followed(make_run):
    run = make_run()
    (run / "figures/again.png").symlink_to("overlays_largest_d.png")
    page = Parser(written(run))
    assert not page.all("aside")
    assert "figures/again.png" in page.text


def test_only_png_files_of_bounded_size_are_embedded(make_run, monkeypatch):
    monkeypatch.setattr(run_files, "LARGEST_PICTURE", 2000)
    run = make_run()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(run / "figures/large.png")
    Image.new("L", (2**13, 2**13)).save(run / "figures/huge.png", compress_level=9)
    (run / "figures/page.png").write_text("<svg onload='alert(1)'/>")
    Image.new("L", (4, 4)).save(run / "figures/other.png", "GIF")
    (run / "figures/cut.png").write_bytes(png()[:-20])
    found = remarks(written(run))
    for name in ("large", "huge", "page", "other", "cut"):
        assert f"figures/{name}.png could not be read" in found


def test_names_are_escaped_in_the_page(make_run):
    run = make_run("a", case=EVIL)
    (run / "config.yaml").write_text(json.dumps({EVIL: {"name": EVIL}}))
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL, "command": [EVIL, "\ud800"]}))
    record = summary(EVIL)
    record["runs"][0]["label"] = EVIL
    record["metrics"][EVIL] = {"title": EVIL}
    record["runs"][0]["metrics"][EVIL] = {"mean": EVIL}
    (run / "evaluation/summary.json").write_text(json.dumps(record | {"rule": EVIL}))
    quoted = EVIL.replace('"', '""')
    (run / "evaluation/per_image.csv").write_text(per_image(quoted, quoted))
    (run / "figures" / f"{EVIL.replace('/', '')}.png").write_bytes(png())
    text = written(run, title=EVIL)
    page = Parser(text)
    assert len(page.all("script")) == 1 and text.count("<script") == 1
    assert text.count(html.escape(EVIL[:-1])) > 50
    assert "\u202e" not in text and "\ud800" not in text
    assert {name for _, attributes in page.tags for name in attributes} <= {
        *("lang", "charset", "http-equiv", "content", "name", "id", "href", "class", "src", "alt"),
        *("scope", "aria-label", "aria-labelledby"),
    }


@given(words=st.text(st.characters(categories=["C", "L", "P", "S", "Z", "N"])))
def test_any_text_is_shown_or_escaped(words):
    block = Table(words, [words, words], [[words, words]])
    picture = Picture(b"", "png", words, words)
    blocks = [block, Gallery([picture]), Folded(words, [Text(words)])]
    page = Parser(render(Page(words, [(words, words)], [words], [PageSection(words, blocks)])))
    assert all(c.isprintable() or c.isspace() for c in "".join(page.words))
    for part in "".join(c if c.isprintable() else " " for c in words).split():
        assert part in "".join(page.words)
    assert [tag for tag, _ in page.tags].count("script") == 1


def section(page, title):
    (found,) = re.findall(rf"<section [^>]*>\n<h2>{title}</h2>(.*?)</section>", page, flags=re.S)
    return found


def test_comparison_comes_before_the_tests_of_single_runs(make_run, evaluation):
    page = written(make_run("a"), make_run("b", loss="dice"), evaluations=[evaluation])
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[:2] == ["Summary", "Comparison"] and "Test images" in titles[2:]
    assert "Comparison cmp" in Parser(page).text.partition("Contents")[0]
    found = section(page, "Comparison")
    text = Parser(found).text
    assert "arm 0 minus b (9 images). +/-/=: number of images that are better, worse" in text
    assert " ".join(["Dice!*", *CELLS, "0.040"]) in text
    assert f"metric adaptive ({IMAGES} images) Dice! 0.500 ± 0.250" in text
    assert text.index("minus b") < text.index("Test metrics") < text.index("Figure 1.")
    assert "<summary>All images of cmp</summary>" in found


def test_evaluation_figures_have_captions_order_and_grid(make_run, evaluation):
    found = section(written(make_run(), evaluations=[evaluation]), "Comparison")
    figures_ = re.findall(r'<figure class="([^"]*)"><img[^>]*alt="([^"]*)">.*?</b> (.*?)<', found)
    wide = {alt.partition(".png")[0] for kind, alt, _ in figures_ if "wide" in kind}
    names = [alt.partition(".png")[0] for _, alt, _ in figures_]
    numbers = ["differences", "comparison", "reliability", "risk_coverage", "robustness", "own"]
    assert names == [*numbers, "predictions_1_cyst_worst", "predictions_best"]
    # Texts in figures of images are too small at half the width.
    assert wide == {"differences", "comparison", "predictions_1_cyst_worst", "predictions_best"}
    captions = dict(zip(names, (caption for *_, caption in figures_), strict=True))
    assert captions["own"] == "cmp: own.png."
    assert captions["predictions_1_cyst_worst"].startswith("cmp, cyst: the images with the lowest")
    assert all(".png" not in caption for name, caption in captions.items() if name != "own")
    # What is a patient in the tables is an image in some figures.
    assert "over patients if the evaluation is by patient" in captions["differences"]
    assert "stars, if any" in captions["differences"]
    assert "over the images, even where tables and tests are by patient" in captions["comparison"]
    assert "for an arm the mean over its runs" in captions["comparison"]
    assert "bands are 95 % bootstrap intervals over the images" in captions["robustness"]
    assert "the one in the tables is the mean over single images" in captions["reliability"]
    assert found.count('class="gallery"') == 2


@pytest.mark.parametrize("gone", ["per_image.csv", "differences.png", "comparison.png"])
def test_missing_files_of_an_evaluation_give_no_remark(make_run, evaluation, gone):
    (evaluation / gone).unlink()
    page = written(make_run(), evaluations=[evaluation])
    assert not Parser(page).all("aside") and section(page, "Comparison")


@pytest.mark.parametrize("name", ["summary.json", "per_image.csv", "comparison.png"])
@pytest.mark.parametrize("content", [b"\x00\xff\xfe", b"a,b\n1\n"])
def test_damaged_file_of_an_evaluation_gives_a_remark(make_run, evaluation, name, content):
    (evaluation / name).write_bytes(content)
    page = written(make_run(), evaluations=[evaluation])
    assert f"cmp: {name} could not be read" in remarks(page)
    assert "All images of cmp" in page or name == "per_image.csv"
    assert str(evaluation) not in page


def test_links_out_of_an_evaluation_are_not_read(make_run, evaluation, tmp_path):
    (tmp_path / "hidden.png").write_bytes(png((31, 33)))
    (evaluation / "linked.png").symlink_to(tmp_path / "hidden.png")
    (tmp_path / "secret.csv").write_text(per_image("SECRET"))
    (evaluation / "per_image.csv").unlink()
    (evaluation / "per_image.csv").symlink_to("../secret.csv")
    page = written(make_run(), evaluations=[evaluation])
    assert "SECRET" not in page and base64.b64encode(png((31, 33))).decode() not in page
    assert remarks(page).count("is a link that leads out of the folder") == 2


def test_each_evaluation_has_its_own_heading(make_run, evaluation, tmp_path):
    other = shutil.copytree(evaluation, tmp_path / "others" / "cmp")
    page = written(make_run(), evaluations=[evaluation, other])
    assert re.findall("<h3>(.*?)</h3>", section(page, "Comparison")) == [
        f"{evaluation.parent.name}/cmp",
        "others/cmp",
    ]


def test_folder_without_an_evaluation_is_refused_in_one_line(make_run, evaluation, tmp_path):
    run, out = make_run(), tmp_path / "page.html"
    with pytest.raises(PolysegError, match=r"no summary\.json in it"):
        make_page([run], evaluations=[run], out=out)
    with pytest.raises(PolysegError, match="given twice"):
        make_page([run], evaluations=[evaluation, evaluation], out=out)
    with pytest.raises(PolysegError, match="give an evaluation by --evaluation"):
        make_page([evaluation], out=out)
    with pytest.raises(PolysegError, match="more than the 50"):
        make_page([run], evaluations=[evaluation] * 50, out=out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["p5.pdf", "page", "page.html.txt", ".html"])
def test_report_file_must_end_in_html(make_run, tmp_path, name):
    with pytest.raises(PolysegError, match=r"ends in \.html"):
        make_page([make_run()], out=tmp_path / name)
    assert not (tmp_path / name).exists()


def test_different_paths_are_shown_without_private_folders(make_run):
    one, other = make_run("a"), make_run("b")
    for run in (one, other):
        replay = f"/home/me/{run.name}/schedule.h5"
        text = f"control: {{replay: {replay}}}\ndata: {{path: 'C:\\me\\{run.name}'}}\n"
        (run / "config.yaml").write_text(text)
    text = section(written(one, other), "Settings")
    table = Parser(text.partition("<details>")[0]).text
    assert "control.replay …/a/schedule.h5 …/b/schedule.h5" in table
    assert "data.path …/me/a …/me/b" in table and "home" not in table


def test_legends_of_training_curves_are_outside_the_axes():
    rows = [
        {"epoch": k, "train_loss": 1 / k, "validation_dice": 0.5, "assessed": 1} for k in (1, 2)
    ]
    figure = training_curves(rows)
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1
        assert legend.y1 <= figure.bbox.y1 and legend.x1 <= figure.bbox.x1


def test_caption_explains_ticks_only_if_drawn(make_run):
    run = make_run()
    assert "Ticks at the bottom" in written(run)
    (run / "history.csv").write_text(HISTORY.replace("0.01,1", "0.01,0"))
    assert "Ticks at the bottom" not in written(run, name="again.html")


def test_validation_curves_show_dice_and_mark_the_first_best_epoch():
    dice = [np.array([0.2, 0.7, np.nan, 0.7]), np.array([np.nan, np.nan]), np.array([0.5, 0.4])]
    epochs = [np.arange(1, len(one) + 1) for one in dice]
    axes = validation_curves(["a", "b", "c"], epochs, dice).axes[0]
    curves = [line for line in axes.lines if line.get_marker() != "o"]
    marks = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(curves[0].get_ydata(), dice[0])
    np.testing.assert_array_equal(curves[1].get_ydata(), dice[2])
    assert marks == [[[2, 0.7]], [[1, 0.5]]]
    many = validation_curves([str(k) for k in range(20)], [epochs[2]] * 20, [dice[2]] * 20)
    lines = [one for one in many.axes[0].lines if one.get_marker() != "o"]
    assert len({(one.get_color(), one.get_linestyle()) for one in lines}) == 20


def test_validation_curves_of_all_runs_share_one_figure(make_run, monkeypatch):
    seen = {}

    def draw(names, epochs, dice):
        seen.update(zip(names, zip(epochs, dice, strict=True), strict=True))
        return training_curves([])

    monkeypatch.setattr(figures, "validation_curves", draw)
    empty = make_run("c")
    (empty / "history.csv").unlink()
    page = written(make_run("a"), make_run("b"), empty)
    assert list(seen) == ["a", "b"]
    assert [values.tolist() for values in seen["a"]] == [[1, 2, 3], [0.2, 0.7, 0.6]]
    assert page.count("Validation Dice of all runs") == 1
    assert "Validation Dice of all runs" not in written(make_run("d"), name="one.html")


def test_page_loads_no_external_resources(make_run, drawn):
    text = written(make_run())
    page = Parser(text)
    for attributes in (attributes for _, attributes in page.tags):
        for name in ("src", "href"):
            assert re.match(
                r"data:image/(png|svg\+xml);base64,|#part-\d+$", attributes.get(name, "#part-1")
            )
        assert "style" not in attributes
    plain = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//\w|url\(|@import|<link|<iframe|\bfetch\b|XMLHttp", plain)
    (policy,) = (one["content"] for one in page.all("meta") if "http-equiv" in one)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        inner = re.search(f"<{tag}>(.*?)</{tag}>", text, flags=re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for data in re.findall(r"svg\+xml;base64,([\w+/=]+)", text):
        assert not re.search(rb"<script|href=\"(?!#)|<image", base64.b64decode(data))


def test_page_is_accessible(make_run):
    page = Parser(written(make_run("a"), make_run("b")))
    assert page.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(len(one["alt"]) > 10 for one in page.all("img"))
    assert len(page.ids) == len(set(page.ids))
    assert {one["aria-labelledby"] for one in page.all("table")} <= set(page.ids)
    assert all("scope" in one for one in page.all("th"))


@pytest.mark.slow
def test_equal_runs_give_equal_pages_in_any_folder(make_run, drawn, tmp_path, monkeypatch):
    run = make_run()
    first = written(run)
    moved = tmp_path / "elsewhere" / "a"
    shutil.copytree(run, moved)
    monkeypatch.chdir(moved)
    assert make_page([Path()], out=Path("../page.html")).name == "page.html"
    assert (tmp_path / "elsewhere/page.html").read_text() == first


def test_stored_figure_replaces_an_unreadable_record(make_run):
    run = make_run()
    (run / "history.csv").write_text("nothing")
    assert "figures/curves.png" in Parser(written(run)).text


def test_runs_with_equal_names_are_distinguished(make_run):
    page = Parser(written(make_run("x/a"), make_run("y/a")))
    assert "Runs x/a, y/a" in page.text


def test_invalid_runs_and_existing_output_are_refused_in_one_line(make_run, tmp_path):
    run, out = make_run(), tmp_path / "page.html"
    for sources, said in (
        ([tmp_path], "is not a run"),
        ([run, tmp_path / "nowhere"], "is not a run"),
        ([run, run / ".." / "a"], "given twice"),
        ([run] * 51, "more than the 50"),
    ):
        with pytest.raises(PolysegError, match=said) as error:
            make_page(sources, out=out)
        assert "\n" not in str(error.value) and not out.exists()
    out.write_text("mine")
    with pytest.raises(PolysegError, match="exists already"):
        make_page([run], out=out)
    assert out.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1e300, np.inf, [-1e-9, 1e9, np.nan]])
def test_impossible_values_are_drawn_or_left_out(make_run, drawn, value):
    run = make_run(difficulty=value, dice=value)
    number_ = float(np.ravel(value)[0])
    (run / "history.csv").write_text(f"epoch,train_loss,validation_dice\n1,{number_},{number_}\n")
    ids = [str(i) for i in range(3)]
    epsilon = np.array([[number_, 1, 2]], "f8").clip(-3e38, 3e38).astype("f4")
    write_schedule(run / "schedule.h5", Schedule(ids, np.array([1]), epsilon))
    Parser(written(run))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = ("name", "label", "metrics", "counts", "strata", "failure_detection", "run", "strength")
ENTRIES = JSON | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4)
SUMMARIES = st.fixed_dictionaries(
    {},
    optional={
        key: JSON | st.lists(ENTRIES, max_size=3)
        for key in ("rule", "metrics", "runs", "comparisons", "robustness", "failure_dice")
    },
)


@given(record=SUMMARIES, environment=st.dictionaries(st.text(max_size=9), JSON))
def test_any_summary_and_environment_can_be_shown(record, environment):
    environment |= {key: environment.get(key) for key in ("started", "command", "polyseg")}
    run = RunFiles("a", evaluation=EvaluationFiles("a", summary=record), environment=environment)
    compared = EvaluationFiles("c", compares=True, summary=record)
    Parser(render(page_of([run, RunFiles("b")], [compared])))


DIFFERENCE = {
    "images": 9,
    "mean": -0.01234,
    "low": -0.02,
    "high": 0.001,
    "better": 3,
    "worse": 5,
    "equal": 1,
    "p_value": 1e-5,
    "adjusted": 0.04,
}
CELLS = ["−0.0123 [−0.0200, +0.0010]", "3/5/1", "< 0.001"]
OVER_RUNS = {"runs": 3, "deviation_over_runs": 0.00456, "p_over_runs": 0.0312}


def compared(*differences, metrics=("dice",)):
    return [
        {"run": f"arm {k}", "baseline": "b", "metrics": dict.fromkeys(metrics, one)}
        for k, one in enumerate(differences)
    ]


def test_conclusions_are_whole_paragraphs_and_not_in_captions():
    sentence = f"No difference {'was shown ' * 40}."
    record = summary("a") | {"comparisons": compared(DIFFERENCE), "conclusions": [sentence, 3]}
    own = EvaluationFiles("cmp", summary=record)
    assert [one.words for one in conclusions(own)] == [sentence]
    assert conclusions(EvaluationFiles("cmp", summary=summary("a"))) == []
    (table,) = comparison_tables(own)
    assert "No difference" not in table.caption


def test_further_tables_show_strata_failures_and_robustness():
    record = summary("a") | {
        "failure_dice": 0.7,
        "robustness": [
            {"run": "a", "corruption": "noise", "strength": k, "metrics": {"dice": 0.9 - 0.1 * k}}
            for k in range(3)
        ],
    }
    record["runs"][0] |= {
        "strata": [
            {"by": "size", "name": name, "images": 4, "means": {"dice": 0.5}}
            for name in ("small", "large")
        ],
        "failure_detection": [{"uncertainty": "mutual_information", "failed": 2, "auroc": 0.75}],
    }
    own = EvaluationFiles("a", summary=record)
    strata, failures, robustness = further_tables(own)
    assert strata.rows == [["a", "0.500 (4)", "0.500 (4)"]]
    assert failures.rows == [["a", "mutual information", "2", "0.750", "–", "–", "–"]]
    assert robustness.rows == [["noise", "a", "0.900", "0.800", "0.700"]]
    record["runs"].append(
        {"name": "other", "prediction": "mc_mean", "metrics": {"new": {"mean": 2}}}
    )
    (table,) = metric_tables([own])
    assert table.head == [
        "metric",
        f"a: a ({IMAGES} images)",
        "a: other (MC mean) (0 images)",
    ]
    assert table.rows[1] == ["new", "–", "2.0000"]


def test_comparison_tables_show_tests_over_images_and_over_runs():
    record = summary("a") | {"comparisons": compared(DIFFERENCE, metrics=("dice", "hd95"))}
    evaluation = EvaluationFiles("a", summary=record)
    (table,) = comparison_tables(evaluation)
    assert table.rows[0] == ["Dice!*", *CELLS, "0.040"]
    assert [row[0] for row in table.rows] == ["Dice!*", "HD95*"]
    assert table.rows[1][1].startswith("−0.012 ")  # distances have fewer decimals
    assert "arm 0 minus b" in table.caption and not list(dice_comparison(evaluation))
    record["comparisons"] = compared(DIFFERENCE, DIFFERENCE | OVER_RUNS)
    _, over_runs = comparison_tables(evaluation)
    assert "3 pairs of runs" in over_runs.caption
    assert over_runs.head[3:] == ["p", "SD runs", "p runs", "Holm"]
    assert over_runs.rows == [["Dice!*", *CELLS, "± 0.0046", "0.031", "0.040"]]
    (dice,) = dice_comparison(evaluation)
    assert dice.rows == [
        ["arm 0*", *CELLS, "± –", "–", "0.040"],
        ["arm 1*", *CELLS, "± 0.0046", "0.031", "0.040"],
    ]
    assert dice.caption.startswith("Dice: difference from b.") and "t-test" in dice.caption


def test_metric_table_shows_runs_and_seed_spread_of_an_arm():
    record = summary("adaptive")
    record["runs"][0]["members"] = ["adaptive-0", "adaptive-1"]
    record["runs"][0]["metrics"]["dice"] |= {"seed_deviation": 0.0123}
    (table,) = metric_tables([EvaluationFiles("c", compares=True, summary=record)])
    assert (
        table.head == ["metric", f"adaptive (2 runs, {IMAGES} images)"] and "seeds" in table.caption
    )
    assert table.rows == [["Dice!", "0.500 ± 0.250 (seeds 0.012)\n0.400 to 0.600, n = 29"]]


def test_only_numbers_are_right_aligned():
    numbers = ["0.5 ± 0.1 (0.02)***", "−1e−05", "−0.01 [−0.02, +0.03]", "– –", "3/–/1", "± 0.01"]
    table = Table("", ["a", "b", "c"], [[str(k), one, "x"] for k, one in enumerate(numbers)])
    text = render(Page("", [], [], [PageSection("", [table])]))
    assert re.findall(r"<th scope=\"col\"([^>]*)>", text) == ["", ' class="number"', ""]
    with pytest.raises(ValueError):
        render(Page("", [], [], [PageSection("", [Table("", ["a"], [["1", "2"]])])]))


def test_numbers_read_from_files_are_formatted_or_dashes():
    assert [number(one) for one in (1e400, 10**400, True, [], 1234.5)] == ["–"] * 4 + ["1,234.500"]


@pytest.mark.slow
def test_large_svg_is_embedded_as_png(make_run, drawn, monkeypatch):
    monkeypatch.setattr(figures, "_LARGEST_DRAWING", 100)
    page = Parser(written(make_run()))
    assert all(one["src"].startswith("data:image/png") for one in page.all("img"))


def test_report_command_writes_the_page(polyseg, make_run, evaluation, tmp_path):
    out = tmp_path / "new" / "page.html"
    asked = ("report", make_run(), "--evaluation", evaluation, "--out", out, "--title", "T")
    answer = polyseg(*asked)
    assert (answer.code, answer.out) == (0, f"{tmp_path}/new/page.html\n")
    assert "<h1>T</h1>" in out.read_text() and "<h2>Comparison</h2>" in out.read_text()
    assert polyseg("report", tmp_path).code == 2


def test_report_without_a_comparison_names_the_command_that_makes_one(
    polyseg, make_run, evaluation, monkeypatch
):
    one, other = make_run("a b"), make_run("c")
    monkeypatch.chdir(one.parent)
    wanted = "`polyseg evaluate 'a b' c --baseline 'a b'` makes one"
    assert wanted in " ".join(polyseg("report", one.name, other.name).err.split())
    for asked in ((one,), (one, other, "--evaluation", evaluation)):
        answer = polyseg("report", *asked, "--out", f"{len(asked)}.html")
        assert answer.code == 0 and "makes one" not in answer.err


def browse(path, folder):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    return subprocess.run(
        [CHROMIUM, *flags.split(), "--enable-logging=stderr", f"--user-data-dir={folder}",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="there is no browser")
def test_in_a_browser_tables_sort_figures_enlarge_and_injected_scripts_do_not_run(
    make_run, tmp_path
):
    page = written(make_run())
    clicks = (
        "const [table] = document.querySelectorAll('table.sortable');"
        "table.querySelectorAll('button')[1].click(); table.querySelectorAll('button')[1].click();"
        "document.querySelector('figure img').click();"
    )
    allowed = base64.b64encode(hashlib.sha256(clicks.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{allowed}' ")
    path = tmp_path / "clicked.html"
    path.write_text(page.replace("</body>", f"<script>{clicks}</script></body>"))
    done = browse(path, tmp_path / "profile")
    assert "CONSOLE" not in done.stderr
    table = re.search(r'<table[^>]*class="sortable">(.*?)</table>', done.stdout, flags=re.S)[1]
    assert re.findall(r'aria-sort="(\w+)"', table) == ["descending"]
    dice = [float(one) for one in re.findall(r'</th><td class="number">([\d.]+)<', table)]
    assert len(dice) == 20 and dice == sorted(dice, reverse=True)
    assert re.search(r'<dialog class="svg"[^>]* open="">', done.stdout)
    path.write_text(page.replace("</body>", "<script>document.title = 'owned'</script></body>"))
    done = browse(path, tmp_path / "profile")
    assert "owned</title>" not in done.stdout and "Content Security Policy" in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="there is no browser")
def test_ids_stay_in_one_line_unless_they_are_very_long(tmp_path):
    ids = ["SC-HYP-03-IM-0001-0128", "-".join(["very-long"] * 30)]
    head = ["id", "group", *map(str, range(30))]
    rows = [[name, "SC-HYP-03", *["0.123"] * 30] for name in ids]
    page = render(Page("", [], [], [PageSection("", [Table("", head, rows, sortable=True)])]))
    measure = (
        "const size = (one) => one.getClientRects()[0];"
        "const [one, many] = document.querySelectorAll('tbody th');"
        "const lines = (cell) => { const range = document.createRange();"
        "range.selectNodeContents(cell); return range.getClientRects().length; };"
        "const scroll = document.querySelector('.scroll');"
        "document.title = [lines(one), lines(one.nextSibling), lines(many) > 2,"
        "size(many).width < 400, scroll.scrollWidth > scroll.clientWidth].join();"
    )
    allowed = base64.b64encode(hashlib.sha256(measure.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{allowed}' ")
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>{measure}</script></body>"))
    assert "<title>1,1,true,true,true</title>" in browse(path, tmp_path / "profile").stdout
