"""The report of a run: what it is compared with, its examples, its figures, its page."""

import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import depthmix_cli
from checkpoints import make_tokenizer
from depthmix.evaluation.reading import load_evaluation
from depthmix.evaluation.wordings import read_wordings
from depthmix.figures.accuracies import draw_accuracies
from depthmix.figures.style import to_svg
from depthmix.figures.training_panels import loss_panels, optimisation_panels, routing_panels
from depthmix.pages import (
    choose_passages,
    collect_report,
    draw_report,
    read_passages,
    report_page,
    show_report,
    write_report,
)
from depthmix.pages.examples import Example, find_examples, first_items
from depthmix.pages.page import hash_text
from depthmix.pages.verdict import judge_run
from depthmix.statistics.intervals import paired_difference, wilson_interval
from depthmix.training.folder import load_result
from runs import HOSTILE_QUESTION, ITEMS, judge_by, make_runs
from test_comparison import write_evaluation

LOG = [
    {
        "step": step,
        "loss": 2 / step,
        "task_loss": 1.9 / step,
        "distillation_loss": 5 / step,
        "layer_loss/layer_9": 2.5 / step,
        "layer_loss/layer_10": 2.1 / step,
        "routing_entropy": 0.5 - step / 100,
        "routing_weight/layer_9": 0.3,
        "routing_weight/layer_10": 0.7,
        "routing_variance/layer_9": 0.01,
        "routing_variance/layer_10": 0.01,
        "routing_sparsity/layer_9": 0.5,
        "routing_sparsity/layer_10": 0.25,
        "learning_rate": 1e-3 / step,
        "grad_norm": 1.0,
        "tokens_per_second": 900.0,
        "memory_gib": 1.5,
    }
    for step in range(1, 61)
] + [{"step": 60, "train_runtime": 65.0, "train_loss": 0.4}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs in one folder whose items right and wrong are set by hand."""
    runs = make_runs(
        tmp_path_factory.mktemp("trained"),
        {
            "mode-0": {},
            "mode-1": {"training": {"seed": "1"}},
            "mode-l": {"mode": {"distillation_weight": "0.5"}},
            "lora": {"method": "lora"},
            "short": {"evaluation": {"num_items": "4"}},
            "unmeasured": {"evaluation": None, "method": "lora"},
        },
    )
    judge_by(runs / "mode-0", "before", "11000000")
    judge_by(runs / "mode-0", "after", "10111000")
    judge_by(runs / "mode-1", "after", "10111110")
    judge_by(runs / "mode-l", "after", "00000001")
    judge_by(runs / "lora", "after", "01111100")
    return runs


@pytest.fixture
def runs(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "runs"))


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


def test_a_run_is_judged_beside_its_neighbours(runs):
    (verdict,) = judge_run(runs / "mode-0")
    own, baseline = "LoRA_¬K + MoDE (defaults)", "LoRA_¬K + MoDE (distillation_weight 0.5)"
    assert list(verdict.methods) == [own, "LoRA_¬K", "pretrained", baseline]  # best first
    assert [run.seed for run in verdict.methods[own]] == [0, 1]
    assert verdict.rivals == ("LoRA_¬K", "pretrained", baseline)
    (row,) = verdict.comparison.rows
    scores = {score.method: score for score in row.scores}
    assert scores[own].mean == pytest.approx((4 + 6) / 16)
    assert scores["LoRA_¬K"].mean == pytest.approx(5 / 8)
    assert scores["pretrained"].interval == wilson_interval(2, 8)
    assert scores["pretrained"].difference.estimate == pytest.approx((4 - 10) / 16)
    reasons = {
        Path(folder).relative_to(runs).parts[0]: reason
        for folder, reason in verdict.left_out.items()
    }
    assert reasons.keys() == {"short"}
    assert "must have judged the same items" in reasons["short"]


def test_named_baselines_are_the_only_ones(runs):
    (verdict,) = judge_run(runs / "mode-0", [runs / "lora"])
    assert list(verdict.methods) == ["LoRA_¬K + MoDE", "LoRA_¬K", "pretrained"]
    difference = verdict.comparison.rows[0].scores[1].difference
    assert difference == paired_difference([1, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0])
    with pytest.raises(FileNotFoundError, match=r"`baselines` must be folders of runs, and .*no"):
        judge_run(runs / "mode-0", [runs / "nowhere"])


def test_a_damaged_neighbour_is_told_and_a_damaged_run_refused(runs):
    (runs / "lora" / "results.json").write_text("{")
    (verdict,) = judge_run(runs / "mode-0")
    assert "LoRA_¬K" not in verdict.methods
    reason = verdict.left_out[str(runs / "lora")]
    assert reason.startswith(f"Cannot read {runs / 'lora' / 'results.json'}")
    with pytest.raises(ValueError, match="Cannot read"):
        judge_run(runs / "lora")


def test_an_unmeasured_run_has_no_verdict(runs):
    assert judge_run(runs / "unmeasured") == ()
    page = show_report(runs / "unmeasured", lens=False).read_text("utf-8")
    assert "This run was not evaluated" in page
    assert "Wins and losses" not in page
    page = show_report(runs / "unmeasured").read_text("utf-8")
    assert "No text was read. There is no item to read, since the run was not evaluated" in page
    page = show_report(runs / "unmeasured", texts=["1 + 1"]).read_text("utf-8")
    assert "No text was read" not in page


def test_a_run_that_parts_from_none_reads_the_first_of_its_items(runs):
    judge_by(runs / "mode-0", "before", "10111000")
    (verdict,) = judge_run(runs / "mode-0", [])
    assert find_examples(verdict, verdict.rivals[0]) == ()
    items, responses = first_items(verdict, limit=3), read_responses(runs / "mode-0", "after")
    assert [(e.kind, e.prompt, e.reference) for e in items] == [
        ("item", item["prompt"], item["choices"][1]) for item in ITEMS[:3]
    ]
    assert [[(a.text, a.correct) for a in e.answers] for e in items] == [
        [(responses[0], True)], [(responses[1], False)], [(responses[2], True)],
    ]  # fmt: skip
    page = show_report(runs / "mode-0", baselines=[]).read_text("utf-8")
    data = page.partition('id="data">')[2].partition("</script>")[0]
    titles = [passage["title"] for passage in json.loads(data)["passages"]]
    assert [title[:24] for title in titles] == [
        "item 1 · Question: Is </",
        "item 2 · Question: 1 + 1",
    ]


def read_responses(run, moment):
    """What a run's model answered, in the order of the records."""
    evaluation = getattr(load_result(run), moment)
    items = list(evaluation.task.scores)
    words = read_wordings(evaluation, items)
    return [words[item].response for item in items]


def test_examples_are_the_items_on_which_two_models_part(runs):
    (verdict,) = judge_run(runs / "mode-0")
    examples = find_examples(verdict, "LoRA_¬K")
    ours, theirs = (read_responses(runs / name, "after") for name in ("mode-0", "lora"))
    found = [(e.kind, e.prompt, [(a.text, a.correct) for a in e.answers]) for e in examples]
    assert found == [  # 10111000 against 01111100
        ("win", ITEMS[0]["prompt"], [(ours[0], True), (theirs[0], False)]),
        ("loss", ITEMS[1]["prompt"], [(ours[1], False), (theirs[1], True)]),
        ("loss", ITEMS[5]["prompt"], [(ours[5], False), (theirs[5], True)]),
    ]
    assert [e.reference for e in examples] == [" 0", " 2", " 10"]
    assert len(find_examples(verdict, "LoRA_¬K", limit=1)) == 2
    before = read_responses(runs / "mode-0", "before")
    (first, *_) = find_examples(verdict, "pretrained")
    assert first.answers[1].text == before[2]  # 10111000 against 11000000
    titles = {
        "win 1 · Question: Is": f" {examples[0].answers[0].text.strip()}",  # what it said itself
        "loss 2 · Question: 1": " 2",
        "loss 3 · Question: 5": " 10",
    }
    passages = choose_passages(examples)
    for (title, passage), (start, end) in zip(passages.items(), titles.items(), strict=True):
        assert title.startswith(start)
        assert passage.render(make_tokenizer()).text.endswith(f"\nAnswer:{end}")


CHOICE = {
    "arguments": [["Q: Which?\nA:", " a"], ["Q: Which?\nA:", " longer"]],
    "filtered_resps": [[-1.0, False], [-2.0, False]],
    "resps": [[[-1.0, False]], [[-2.0, False]]],
    "target": 0,
}
GENERATED = {
    "arguments": [["Q: 1 + 1?\nA:", {"until": ["\n"]}]],
    "filtered_resps": ["2"],
    "resps": [[" It is 2."]],
    "target": ["2", "two"],
}


@pytest.mark.parametrize(
    ("metric", "sample", "expected"),
    [
        ("acc,none", CHOICE, ("Q: Which?\nA:", " a", " a")),
        ("acc_norm,none", CHOICE, ("Q: Which?\nA:", " a", " longer")),  # -1 / 1 < -2 / 6
        ("exact_match,none", GENERATED, ("Q: 1 + 1?\nA:", "2", " It is 2.")),
        ("acc,none", CHOICE | {"target": [1, 0]}, ("Q: Which?\nA:", " longer", " a")),  # the first
    ],
)
def test_samples_of_lm_eval_are_put_into_words(metric, sample, expected, tmp_path):
    folder = write_evaluation(tmp_path / "e", {"arc": [1, 0]}, main_metric={"arc": metric})
    path = folder / "samples_arc.jsonl"
    lines = [json.loads(line) | sample for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcomes = load_evaluation(folder)
    item = ("arc", "arc-1", 0)
    assert item in outcomes.tasks["arc"].scores
    (wording,) = read_wordings(outcomes, {item}).values()
    assert (wording.prompt, wording.reference, wording.response) == expected


def test_evaluations_of_layers_and_other_protocols_are_kept_apart(runs):
    for run, layer, scores in (
        ("mode-0", "ensemble", [1, 1, 0, 0]),
        ("mode-0", 4, [1, 0, 0, 0]),
        ("lora", "ensemble", [0, 1, 1, 1]),
    ):
        write_evaluation(
            runs / run / "evaluation" / str(layer), {"arc": scores}, layer=layer, method=run
        )
    whole, during = judge_run(runs / "mode-0")
    assert list(whole.methods) == ["mode-0", "lora", "mode-0, layer 4"]
    assert whole.rivals[0] == "lora"
    assert [task.task for task in during.comparison.tasks] == ["records"]
    report = collect_report(runs / "mode-0", baselines=[runs / "lora"], num_examples=0)
    figures = draw_report(report)
    assert figures.keys() >= {"accuracies_0", "overlaps_0", "accuracies_1", "overlaps_1"}


def evaluate_by(run, name, scores, *, task="arc", **facts):
    """Write an evaluation into a run's folder, as of the method that the run has."""
    known = load_evaluation(run / "evaluation" / "training")
    about = {"method": known.method, "seed": known.seed, "settings": known.settings}
    about |= {"adapter_sha256": known.adapter, "dtype": "float32"}
    write_evaluation(run / "evaluation" / name, {task: scores}, **about | facts)


def test_one_run_evaluated_in_several_ways_is_told_apart(runs):
    evaluate_by(runs / "mode-0", "default", [1, 1, 1, 0])
    evaluate_by(runs / "mode-0", "default-top-1", [0, 0, 0, 1], top_k=1)
    evaluate_by(runs / "mode-1", "default-layer-final", [1, 1, 1, 1], layer="final")
    evaluate_by(runs / "lora", "default", [1, 0])
    evaluate_by(runs / "mode-l", "default", [1])
    untuned = {"method": "pretrained", "settings": None, "adapter_sha256": None}
    evaluate_by(runs / "short", "b", [1, 0, 0, 0], **untuned)
    evaluate_by(runs / "short", "c", [1, 1, 0, 0], **untuned, dtype="bfloat16")
    whole, single, _ = judge_run(runs / "mode-0")
    mode = "LoRA_¬K + MoDE"
    means = {score.method: score.mean for score in whole.comparison.rows[0].scores}
    assert means == {
        f"{mode} (defaults)": 0.75,
        f"{mode} (top_k 1)": 0.25,
        f"{mode}, final layer": 1,
        "pretrained (dtype float32)": 0.25,
        "pretrained (dtype bfloat16)": 0.5,
    }
    assert whole.run == f"{mode} (defaults)"
    assert single.run == f"{mode} (top_k 1)"
    # What is the same method read out in another way, also of another seed, is no rival.
    assert whole.rivals == ("pretrained (dtype bfloat16)", "pretrained (dtype float32)")
    places = {tuple(Path(folder).parts[-3:]) for folder in whole.left_out}
    assert places == {("lora", "evaluation", "default"), ("mode-l", "evaluation", "default")}
    page = write_report(collect_report(runs / "mode-0", num_examples=0), runs / "r.html")
    for name in ("lora, default", "mode-l, default"):
        assert f">{name}</th>" in page.read_text("utf-8")


def test_runs_may_lie_in_a_folder_of_any_name(runs):
    inner = Path(shutil.copytree(runs / "mode-0", runs / "evaluation" / "mode-0"))
    shutil.copytree(runs / "mode-l", runs / "evaluation" / "mode-l")
    report = collect_report(inner)
    assert report.verdicts[0].run == "LoRA_¬K + MoDE (defaults)"
    assert report.trainable[0][report.verdicts[0].run] == report.ledger.total


def test_trained_parameters_are_those_of_the_verdicts_own_methods(runs):
    path = runs / "lora" / "results.json"
    content = json.loads(path.read_text())
    content["ledger"]["total"] = 7
    evaluate_by(runs / "mode-0", "default", [1, 0])
    evaluate_by(runs / "lora", "default", [1, 0], method="x")
    del content["after"]  # so that another run is `x` in the second verdict
    path.write_text(json.dumps(content))
    report = collect_report(runs / "mode-0", num_examples=0)
    assert report.trainable[0] == {"LoRA_¬K + MoDE": report.ledger.total, "x": 7}
    assert "x" not in report.trainable[1]
    assert report.trainable[1]["pretrained"] == 0


def test_what_is_gone_is_told(runs, trained):
    config = json.loads((runs / "mode-0" / "run_config.json").read_text())
    config["evaluation"]["data"] = config["model"]["name"] = str(runs / "gone")
    config["training"]["hub_token"] = "hf_secret"
    (runs / "mode-0" / "run_config.json").write_text(json.dumps(config))
    path = runs / "mode-0" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(trained.parent / "base"), str(runs / "gone")))
    page = show_report(runs / "mode-0", baselines=[]).read_text("utf-8")
    assert "No text was read. Cannot find model" in page
    assert "hf_secret" not in page
    with pytest.raises(OSError, match="Cannot find model"):
        show_report(runs / "mode-0", baselines=[], texts=["1 + 1"])


def test_texts_that_are_damaged_are_told(runs):
    path = runs / "mode-0" / "evaluation" / "training" / "samples_records.jsonl"
    samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for sample in samples:
        del sample["resps"], sample["filtered_resps"]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), "utf-8")
    report = collect_report(runs / "mode-0", baselines=[runs / "lora"])
    assert report.examples == ()
    assert "must hold lm-eval's samples with their texts" in report.missing["examples"]


def test_wins_and_losses_too_long_for_the_model_are_told(runs, monkeypatch):
    def refuse(*_args, **_options):
        raise ValueError("`text` must have between 1 and 8 tokens.")

    monkeypatch.setattr(report_page, "read_passages", refuse)
    page = show_report(runs / "mode-0").read_text("utf-8")
    assert "No text was read. `text` must have" in page
    with pytest.raises(ValueError, match="between 1 and 8 tokens"):
        show_report(runs / "mode-0", layers="3")


def test_texts_in_one_template_have_titles_of_their_own():
    frame = "Below is an instruction that describes a task. Write a response.\n\n"
    prompts = [f"{frame}{word} the sum of {'1 and ' * 40}1:" for word in ("Give", "Give", "Name")]
    examples = [
        Example(task="t", kind=kind, prompt=prompt, reference="2", answers=())
        for kind, prompt in zip(("win", "win", "loss"), prompts, strict=True)
    ]
    titles = list(choose_passages(examples))
    assert [title[:24] for title in titles] == [
        "win 1 · … Give the sum o",
        "win 2 · … Give the sum o",
        "loss 3 · … Name the sum ",
    ]
    page_part = report_page._clip_prompt(prompts[0] + "x" * 600)
    assert page_part.startswith("… x")


def test_the_page_says_what_happened(runs):
    report = collect_report(runs / "mode-0", title="A & B", command="make it")
    page = write_report(report, runs / "new" / "report.html").read_text("utf-8")
    result = load_result(runs / "mode-0")
    for text in (
        "A &amp; B",
        ">62.5 %<",
        "this method, 2 seeds",
        "LoRA_¬K + MoDE (distillation_weight 0.5)",
        f"{result.ledger.total:,}",
        "3, 4",
        "8 records of sums.jsonl",
        "make it",
        "Not compared: 2 evaluations<",
        "p is McNemar&#39;s exact test",
        "Question: 5 + 5?",
    ):
        assert text in page, text
    assert page.count("✓ right") == page.count("✗ wrong") == 3
    # Verdict; losses, routing, optimisation; and all but the circles once more for narrow screens.
    assert page.count("<svg") == 2 + 3 + 4
    assert page.count('class="on-narrow"') == 4


def test_the_page_says_first_whether_it_helped(runs):
    text = write_report(collect_report(runs / "mode-0"), runs / "report.html").read_text("utf-8")
    said = re.findall(r"<li>(.*?)</li>", re.findall(r'<ul class="said">(.*?)</ul>', text, re.S)[0])
    assert said[0].startswith("Whether tuning as a whole helped is open: LoRA_¬K + MoDE")
    assert said[1].startswith("Whether the mixture adds anything to LoRA alone is open: ")
    assert re.match(r"Cost: LoRA_¬K \+ MoDE .* min of training, .* trained parameters", said[2])
    cards = re.findall(r'<div class="number [a-z]*"><span>(.*?)</span>', text)
    assert {"LoRA_¬K", "pretrained"} <= set(cards)


def test_the_command_asks_for_as_many_devices_as_trained(runs):
    run, again = runs / "mode-0", runs / "mode-0-again"
    train = f"train --config {run / 'run_config.json'} --training.output-dir {again}"
    assert collect_report(run).command == f"depthmix {train}"
    path = run / "results.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"num_devices": 4}))
    launch = "accelerate launch --multi_gpu --num_processes=4 -m depthmix_cli"
    assert collect_report(run).command == f"{launch} {train}"
    path.write_text(before)


def test_the_page_is_well_formed_and_harmless(runs):
    page = show_report(runs / "mode-0", texts=["</script><i>1 + 1</i>"]).read_text("utf-8")
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert outline.references
    assert all(reference.startswith("#") for reference in outline.references)
    assert {reference[1:] for reference in outline.references} <= set(outline.ids)
    assert len(outline.ids) == len(set(outline.ids))
    assert not re.search(r"@import|url\((?!#)|https?:", page.replace("http://www.w3.org/", ""))
    assert page.count("<script") == page.count("</script>") == 2
    assert HOSTILE_QUESTION not in page
    assert "Is &lt;/script&gt;&lt;b&gt;bold" in page
    for kind, name in (("style", "style"), ("script", "script")):
        text = page.rpartition(f"<{name}>")[2].partition(f"</{name}>")[0]
        assert f"{kind}-src '{hash_text(text)}'" in page
    assert "script-src 'unsafe" not in page


@pytest.mark.parametrize("run", ["mode-0", "lora"])
def test_texts_are_read_tuned_and_as_before(run, runs):
    lenses = read_passages(runs / run, {"t": "1 + 1 = 2"})
    tuned, before = lenses["t"].values()
    assert list(lenses["t"])[1] == "pretrained"
    assert [prediction.readout for prediction in tuned.layers] == [3, 4]
    assert [prediction.readout for prediction in before.layers] == [4]
    assert (tuned.routing is None) == (run == "lora")
    assert before.routing is None
    assert tuned.ensemble.loss != before.ensemble.loss
    both = read_passages(runs / run, {"t": "1 + 1 = 2"}, layers="all")["t"].values()
    assert [len(lens.layers) for lens in both] == [4, 4]


def test_the_command_writes_a_page(runs, capsys):
    assert depthmix_cli.main(["report", str(runs / "mode-0"), "--layers", "1,4"]) == 0
    assert f"Written: {runs / 'mode-0' / 'report.html'}" in capsys.readouterr().out
    page = (runs / "mode-0" / "report.html").read_text("utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [passage["title"].split(" ·")[0] for passage in data["passages"]] == [
        "win 1",
        "loss 2",
        "loss 3",
    ]
    layers = [readout["layer"] for readout in data["passages"][0]["lenses"][1]["readouts"]]
    assert layers == [1, 4]
    out = runs / "out.html"
    options = ["--baselines", f"{runs / 'lora'},{runs / 'mode-1'}", "--no-lens"]
    assert depthmix_cli.main(["report", str(runs / "mode-0"), *options, "--output", str(out)]) == 0
    assert "distillation_weight 0.5" not in out.read_text("utf-8")
    assert 'id="data"' not in out.read_text("utf-8")
    assert depthmix_cli.main(["report", str(runs)]) == 1
    assert "must be the folder of a finished run" in capsys.readouterr().err


def test_panels_hold_what_was_logged():
    titles = {panel.title: panel for panel in (*loss_panels([LOG]), *routing_panels([LOG]))}
    assert list(titles) == [
        "task loss",
        "distillation loss",
        "loss of each late layer",
        "routing weight, mean over tokens",
        "routing weight, variance over tokens",
        "tokens that make no use of a layer",
        "routing entropy",
    ]
    assert titles["task loss"].curves[0].values[0][1] == 1.9 / 2
    assert [curve.label for curve in titles["loss of each late layer"].curves] == [
        "layer 9",
        "layer 10",
    ]
    panels = optimisation_panels([LOG])
    assert [panel.title for panel in panels] == ["learning rate", "gradient norm", "pace", "memory"]
    plain = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}]
    assert [panel.title for panel in loss_panels([plain])] == ["task loss"]
    assert loss_panels([plain])[0].curves[0].values == ((2.0,),)
    assert routing_panels([plain]) == ()
    validated = [*plain, {"step": 1, "eval_loss": 1.5}]
    assert [panel.title for panel in loss_panels([validated])] == ["task loss", "validation loss"]
    assert loss_panels([[{"step": 3, "train_loss": 1.0}]]) == ()


def test_steps_that_loss_scaling_skipped_leave_gaps():
    log = [{"step": 1, "grad_norm": float("inf")}, {"step": 2, "grad_norm": 2.0}]
    (panel,) = optimisation_panels([log])
    assert panel.ylim == pytest.approx((0, 2.16))
    (panel,) = optimisation_panels([[{"step": 1, "grad_norm": float("nan")}]])
    assert panel.ylim == (0, 1)


def test_a_long_run_is_drawn_with_its_average(runs):
    report = collect_report(runs / "mode-0")
    long = {"losses": loss_panels([LOG]), "optimisation": optimisation_panels([LOG])}
    figures = draw_report(replace(report, panels=long, verdicts=()))
    assert len(figures["losses"].axes[0].lines) == 2  # pale as it is, and the average
    title = figures["losses"].legends[0].get_title().get_text()
    assert title == "one seed, moving average of 6 points"
    short = draw_report(replace(report, verdicts=()))
    assert len(short["losses"].axes[0].lines) == 1
    assert not short["losses"].legends
    assert json.loads(json.dumps([asdict(panel) for panel in long["losses"]]))


def test_svg_is_deterministic_and_takes_the_page_colour():
    rows = {"before": (0.1, 0.05, 0.2), "after": (1.0, 0.9, 1.0)}
    svg = to_svg(draw_accuracies(rows, highlighted="after"))
    assert svg == to_svg(draw_accuracies(rows, highlighted="after"))
    assert svg != to_svg(draw_accuracies(rows))
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "<style" not in svg
    assert "date" not in svg
    assert ">100 %</text>" in svg
    assert not re.search(r"<svg[^>]*(?:width|height)=", svg)
    names = {"$\\frac$ costs $5": (0.5, 0.4, 0.6), "long " * 20: (0.5, 0.4, 0.6)}
    svg = to_svg(draw_accuracies(names))
    assert ">$\\frac$ costs $5</text>" in svg
    assert svg.count(">long long") == 3
    with pytest.raises(ValueError, match="at least one accuracy"):
        draw_accuracies({})
