"""The report and its figures, from plain data."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from depthmix.analysis import Report, report_from_result, write_report
from depthmix.analysis.figures import (
    accuracies,
    routed_layers,
    routing_weights,
    training_loss,
)
from depthmix.analysis.style import to_svg
from depthmix.evaluation.scoring import Evaluation
from depthmix.ledger import Ledger
from depthmix.run_config import DataSection, ModelSection, RunConfig

LOG = [
    {
        "step": step,
        "loss": 2 / step,
        "task_loss": 1.9 / step,
        "distillation_loss": 5 / step,
        "routing_entropy": 1 - step / 100,
        "routing_weight/layer_9": 0.3,
        "routing_weight/layer_10": 0.2,
        "routing_weight/layer_11": 0.5,
    }
    for step in range(1, 31)
] + [{"step": 30, "train_runtime": 65.0, "train_loss": 0.4}]
RECORDS = [{"prompt": f"Question: {n} + {n}?\nAnswer:", "answer": str(2 * n)} for n in range(8)]


def evaluation(num_correct):
    return Evaluation(
        metric="exact_match",
        correct=tuple(item < num_correct for item in range(8)),
        responses=tuple(f" The <b>answer</b> is {item}" for item in range(8)),
    )


@pytest.fixture
def result():
    return SimpleNamespace(
        output_dir=Path("out"),
        metrics={"total_seconds": 65.0},
        log_history=LOG,
        ledger=Ledger(
            lora_below=4_000_000,
            lora_late=0,
            norms=1_152,
            router=1_731,
            other=0,
            total=4_002_883,
            model=134_515_008,
        ),
        before=evaluation(1),
        after=evaluation(7),
    )


@pytest.fixture
def config():
    return RunConfig(
        model=ModelSection(name="models/tiny & co"), data=DataSection(train="data/train.jsonl")
    )


class Outline(HTMLParser):
    """Collects tags and attributes, and checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action"}:
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_nothing_else(result, config, tmp_path):
    report = report_from_result(result, config, command="make quickstart", records=RECORDS)
    page = write_report(report, tmp_path / "new" / "report.html").read_text("utf-8")
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert all(reference.startswith("#") for reference in outline.references)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert page.count("<svg") == 3


def test_page_says_what_happened(result, config, tmp_path):
    report = report_from_result(result, config, command="make quickstart", records=RECORDS)
    page = write_report(report, tmp_path / "report.html").read_text("utf-8")
    for text in (
        "Tuning tiny &amp; co",
        "12.5 %",
        "87.5 %",
        "<b>+75</b>",
        "p = 0.031",
        "9, 10, 11",
        ">4,002,883<",
        ">100.07 %<",
        "1 min 5 s",
        "make quickstart",
        "train.jsonl",
        "0 + 0?",
    ):
        assert text in page, text
    assert page.count("✓ right") == 1 + 6
    assert page.count("✗ wrong") == 5 + 0


def test_texts_are_escaped(result, config, tmp_path):
    report = report_from_result(
        result, config, command="<script>alert(1)</script>", records=RECORDS, title="<i>a</i>"
    )
    page = write_report(report, tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert "<i>" not in page
    assert "<b>answer" not in page
    assert "&lt;b&gt;answer" in page


def test_page_without_evaluation_or_mixture(result, config, tmp_path):
    result.before = result.after = None
    result.log_history = [{"step": 1, "loss": 1.0}]
    config = replace(config, method="lora")
    report = report_from_result(result, config, command="c", records=RECORDS, seconds=3700.0)
    page = write_report(report, tmp_path / "report.html").read_text("utf-8")
    assert page.count("<svg") == 1
    assert "LoRA without the mixture" in page
    assert "1 h 1 min" in page
    assert "Sample answers" not in page
    assert "Late layers" not in page


def test_choices_show_the_right_choice(result, config):
    records = [{"prompt": "p", "choices": [" yes", " no"], "answer": 1}]
    result.before = result.after = Evaluation(
        metric="choices", correct=(True,), responses=(" no",), measures={"nll": 1.5}
    )
    report = report_from_result(result, config, command="c", records=records)
    assert report.samples[0].reference == " no"


def test_an_empty_run_still_makes_a_page(tmp_path):
    report = Report(
        title="t", model="m", method="x", facts={}, ledger="", log_history=(), seconds=0.2,
        command="c", config="{}",
    )  # fmt: skip
    page = write_report(report, tmp_path / "report.html").read_text("utf-8")
    assert "under 1 s" in page
    assert "<svg" not in page


def test_layers_are_ordered_by_number():
    assert routed_layers(LOG) == [9, 10, 11]


@pytest.mark.parametrize("log", [LOG, LOG[:2], [{"step": 1, "loss": 1.0}]])
def test_training_loss_panels(log):
    figure = training_loss(log)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["nats"] * (2 if "distillation_loss" in log[0] else 1)


def test_routing_weights_show_every_layer():
    weights, entropy = routing_weights(LOG).axes
    assert len(weights.lines) == 3
    assert list(weights.lines[2].get_ydata()) == [0.5] * 30
    assert entropy.get_ylabel() == "nats"
    with pytest.raises(ValueError, match="which only the mixture logs"):
        routing_weights([{"step": 1, "loss": 1.0}])


def test_svg_is_deterministic_and_takes_the_page_colour():
    rows = {"before": (0.1, 0.05, 0.2), "after": (1.0, 0.9, 1.0)}
    svg = to_svg(accuracies(rows))
    assert svg == to_svg(accuracies(rows))
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "<style" not in svg
    assert "date" not in svg
    assert ">100 %</text>" in svg
    assert not re.search(r"<svg[^>]*(?:width|height)=", svg)
