"""The page asks for nothing, runs nothing, and says what the stages wrote."""

import html.parser
import itertools
import re
import shutil

import pytest

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.evaluation import report

STAGES = ("prepare_data", "pretrain", "prune", "distill", "upcycle", "cpt", "evaluate")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Collects elements, attributes and text as a browser would see them; fails on an element that is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data.replace("\u00a0", " ") + " "


def build(workdir, models, names=STAGES, **changes) -> str:
    material = report.read(workdir, names, models, **{"title": "A title", "command": "python -m it", **changes})
    return report.build(material)


@pytest.fixture
def page(workdir, descriptions) -> Page:
    return Page(build(workdir, descriptions()))


def test_nothing_is_loaded_and_nothing_runs(page, workdir, descriptions):
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert "://" not in value
        assert "javascript:" not in value
        if name in ("src", "href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert not {"script", "img", "iframe", "link", "object", "embed", "base", "form"} & set(page.elements)
    text = build(workdir, descriptions())
    assert "default-src &#x27;none&#x27;" in text
    assert not re.search(r"url\(|@import|https?:", text)


def test_hostile_text_is_shown_and_not_obeyed(page, workdir, descriptions):
    # the completion, the detail, the task, both sides of two spans, the wanted middle: all there, as characters
    assert page.text.count("</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;") >= 7
    assert "\\u202e" in page.text  # turns the direction of what follows
    assert "\\u0000\\ud800" in page.text
    build(workdir, descriptions()).encode("utf-8")  # a lone surrogate could not be written
    title = Page(build(workdir, descriptions(), title="<b>&", command="x --a='<i>'"))
    assert "<b>&" in title.text
    assert "x --a='<i>'" in title.text


def test_the_numbers_are_those_of_the_summaries(page, summaries):
    for name, keys in {
        "pretrain": ("valid_loss_start", "valid_loss_end"), "prune": ("valid_loss_before", "valid_loss_after"),
        "distill": ("valid_loss_start", "valid_loss_end", "valid_loss_end_without_teacher"),
        "upcycle": ("valid_loss_dense", "valid_loss_moe"), "cpt": ("valid_loss_start", "valid_loss_end"),
        "evaluate": ("valid_loss", "valid_loss_code"),
    }.items():  # fmt: skip
        for key in keys:
            assert f"{summaries[name][key]:.3f}" in page.text, (name, key)
    for shown in (
        "900 k", "700 k", "1.10 M", "750 k",  # parameters: teacher, student, mixture, active
        "8 k", "4 k", "235 k", "234,567", "4,321", "5,000",  # tokens and documents
        "3.21 TFLOP", "1.50 TFLOP", "1 TFLOP", "1.23 GB", "11 s", "17 s",
        "3.4 × 10⁻⁷", "2.5 × 10⁻⁷", "12.5 %", "50.0 %", "prune +1.111", "upcycle ±0.000", "2.00",
        "1.600 at the end", "0.40 to 1.60 at the end", "2 samples of 2 tasks, 1 passed (50.0 %)",
    ):  # fmt: skip
        assert shown in page.text, shown


def test_equal_material_gives_equal_pages_wherever_it_lies(workdir, descriptions, tmp_path):
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(workdir, moved)
    one, other = build(workdir, descriptions()), build(moved, descriptions())
    assert one == other
    assert str(workdir) not in one


@pytest.mark.parametrize("names", [(), *((name,) for name in STAGES), *itertools.combinations(STAGES, 6)])
def test_a_stage_that_is_not_there_is_left_out(workdir, descriptions, names):
    for name in set(STAGES) - set(names):
        shutil.rmtree(workdir / name)
    page = Page(build(workdir, descriptions(*names)))
    assert page.elements.count("li") == len(names)
    assert not {"nan", "None"} & set(page.text.split())
    for name in names:
        assert name in page.text
    # every place that the navigation points at is there
    anchors = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")} <= anchors


def test_a_stage_without_its_files_is_shown_by_its_summary(workdir, descriptions):
    for name in ("prune/scores.npz", "upcycle/verify.json", "cpt/metrics.jsonl", "evaluate/infilling.jsonl",
                 "evaluate/outcomes_house_functions.jsonl", "prepare_data/corpus/manifest.json"):  # fmt: skip
        (workdir / name).unlink()
    page = Page(build(workdir, {}))
    assert "3.666" in page.text
    assert "Experts in training" not in page.text


def test_samples_without_outcomes_are_not_called_failures(workdir, descriptions):
    (workdir / "evaluate/outcomes_house_functions.jsonl").unlink()
    (workdir / "evaluate/samples_house_functions.jsonl").write_text('{"task_id": "house/a", "completion": "x"}\n')
    page = Page(build(workdir, descriptions()))
    assert "outcomes were not recorded" in page.text
    assert "0 passed" not in page.text


def test_distillation_loss_is_not_drawn_as_a_cross_entropy(workdir, descriptions):
    from kwaicoder_jax.evaluation.report import runs

    material = report.read(workdir, STAGES, descriptions(), title="", command="")
    segments, baseline = runs.segments(material)
    assert [(s.name, s.start, s.end, len(s.train)) for s in segments] == [
        ("pretrain", 0, 8000, 20), ("distill", 8000, 12000, 0), ("cpt", 12000, 16000, 10),
    ]  # fmt: skip
    assert segments[1].valid == [(8000, 5.333), (12000, 4.444)]
    assert segments[2].phases == [(12000, "best"), (14000, "broad")]
    assert baseline is not None
    assert baseline.valid[-1] == (12000, 4.555)


def test_a_run_that_diverged_can_be_shown(workdir, descriptions):
    """JSON has no NaN: such a loss is null in metrics.jsonl and summary.json."""
    metrics = workdir / "pretrain/metrics.jsonl"
    metrics.write_text(re.sub(r'(loss": )[0-9.]+', r"\1null", metrics.read_text()))
    summary = workdir / "pretrain/summary.json"
    summary.write_text(summary.read_text().replace("4.222", "null").replace("8.111", "null"))
    assert "not finite" in Page(build(workdir, descriptions())).text


@pytest.mark.parametrize(
    "name", ["upcycle/verify.json", "prune/scores.npz", "cpt/metrics.jsonl", "pretrain/summary.json"]
)
def test_a_damaged_file_is_named(workdir, descriptions, name):
    (workdir / name).write_bytes(b'{"a"\n')
    with pytest.raises(UserError, match=name):
        build(workdir, descriptions())
