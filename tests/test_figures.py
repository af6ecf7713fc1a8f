"""Figures from plain data: what is drawn is what the data say."""

import json
import re
import warnings
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.patches import Circle, Rectangle
from matplotlib.text import Text

from depthmix.figures.curves import Curve, Panel, draw_curves, moving_mean
from depthmix.figures.maps import Grid, draw_grid, to_markdown
from depthmix.figures.overlap_diagrams import MOST_SETS, draw_overlaps
from depthmix.figures.style import INK, save_figure, to_svg
from depthmix.figures.sweeps import Point, Sweep, draw_sweeps
from depthmix.figures.trade_offs import TradeOff, draw_trade_offs
from depthmix.figures.training_panels import curves_from_logs
from depthmix.figures.venn_layout import LARGEST_ERROR, lay_out
from depthmix.statistics.overlaps import Overlap, count_overlaps

ROOT = Path(__file__).parent.parent


def noisy_curve(label, start, end, num_seeds=3, num_steps=40):
    steps = np.arange(1, num_steps + 1) * 10
    trend = end + (start - end) * np.exp(-steps / 90)
    rng = np.random.default_rng(0)
    rows = trend + 0.04 * rng.standard_normal((num_seeds, num_steps))
    return Curve(label=label, steps=tuple(steps.tolist()), values=tuple(map(tuple, rows.tolist())))


def panel(title, starts, ends):
    layers = range(30, 30 + len(ends))
    curves = (
        noisy_curve(f"layer {layer}", start, end)
        for layer, start, end in zip(layers, starts, ends, strict=True)
    )
    return Panel(title=title, curves=tuple(curves), ylabel="training loss, nats")


def top_k_grid(title, largest=6, best=0.53, num_items=1172):
    def table(shift):
        return tuple(
            tuple(
                best + 0.02 * k - 0.004 * k * k - 0.05 / (top_k + 1) + shift if top_k <= k else None
                for top_k in range(1, largest + 1)
            )
            for k in range(1, largest + 1)
        )

    settings = tuple(range(1, largest + 1))
    return Grid(
        title=title,
        row_name="k",
        column_name="Top-K",
        rows=settings,
        columns=settings,
        values=table(0.0),
        low=table(-0.028),
        high=table(0.028),
        num_items=num_items,
    )


def random_overlaps(num_methods, num_items, seed=0, prefix="layer"):
    rng = np.random.default_rng(seed)
    hard = rng.random(num_items)
    names = [f"{prefix} {30 + number}" for number in range(num_methods)]
    return count_overlaps(
        {name: (rng.random((1, num_items)) > hard).astype(float) for name in names}
    )


def sweep(title, points, xname="method"):
    return Sweep(title=title, xname=xname, points=tuple(Point(*point) for point in points))


PANELS = (
    panel("(a) loss on the final layer", (7.4, 6.1, 2.3), (5.6, 3.9, 0.9)),
    panel("(b) loss on each late layer", (7.4, 6.1, 2.3), (1.4, 1.2, 0.9)),
)
VENNS = {
    title: random_overlaps(3, num_items, seed)
    for seed, (title, num_items) in enumerate({"AQuA": 254, "ARC-c": 1172, "GSM8K": 1319}.items())
}
ABLATION = tuple(
    sweep(task, (("MoDE", a, a - w, a + w), ("MoDE without Nᵢ", b, b - w, b + w)))
    for task, a, b, w in (("ARC-e", 0.012, 0.004, 0.009), ("ARC-c", 0.031, -0.008, 0.018))
)
TRADE_OFFS = [
    TradeOff(
        label=f"LoRA_¬K + MoDE, Top-K = {top_k}",
        score=0.6 + top_k / 100,
        low=0.55 + top_k / 100,
        high=0.66 + top_k / 100,
        speedups=(1.4 - top_k / 15, 1.45 - top_k / 15),
    )
    for top_k in range(1, 7)
]
SAMPLES = {
    "curves": lambda: draw_curves(PANELS),
    "one_curve": lambda: draw_curves(
        (Panel(title="t", curves=(noisy_curve("layer 30", 3, 1, 1),), ylabel="share"),)
    ),
    "many_curves": lambda: draw_curves((panel("many", [3] * 9, range(9)),), moving_average=3),
    "grids": lambda: draw_grid(
        [top_k_grid("ARC-c"), top_k_grid("BoolQ", 6, 0.68, 3270), top_k_grid("MAWPS", 4, 0.6, 238)]
    ),
    "venn_3": lambda: draw_overlaps(VENNS),
    "venn_2": lambda: draw_overlaps(
        {
            title: random_overlaps(2, num_items, 1, "LoRA_¬K + MoDE")
            for title, num_items in {"AQuA": 254, "ARC-c": 1172}.items()
        }
    ),
    "upset": lambda: draw_overlaps({"GSM8K": random_overlaps(4, 1319), "ARC-c": VENNS["ARC-c"]}),
    "sweeps": lambda: draw_sweeps(ABLATION, baseline="LoRA_¬K"),
    "trade_offs": lambda: draw_trade_offs(TRADE_OFFS, title="ARC-Easy", xlabel="accuracy"),
}


def words(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("name", SAMPLES)
def test_no_text_is_cut_off_or_lies_on_another(name, monkeypatch):
    drawn = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, *args: (drawn.append(text), draw(text, *args)))
    figure = SAMPLES[name]()
    figure.draw_without_rendering()
    shown = [text for text in drawn if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    assert len(boxes) > 5
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 + 1, text
        assert box.x1 - 1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 + 1, text
        assert box.y1 - 1 <= figure.bbox.y1, text
    for (text, box), (other, other_box) in combinations(boxes, 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_equal_data_give_equal_bytes(suffix, tmp_path):
    for name in SAMPLES if suffix == ".svg" else ("curves", "grids"):
        draw = SAMPLES[name]
        first = save_figure(draw(), tmp_path / "new" / f"{name}{suffix}").read_bytes()
        assert save_figure(draw(), tmp_path / f"{name}{suffix}").read_bytes() == first, name


def test_an_svg_file_suits_light_and_dark(tmp_path):
    svg = save_figure(SAMPLES["sweeps"](), tmp_path / "a.svg").read_text("utf-8")
    assert svg.count(INK) == 1  # in the style sheet, for light pages
    assert "prefers-color-scheme:dark" in svg
    assert "currentColor" in svg
    assert re.match(r'<svg [^>]*width="[\d.]+pt"', svg)
    assert ">MoDE without Nᵢ</text>" in svg


def test_png_and_pdf_are_on_white(tmp_path):
    pixels = plt.imread(save_figure(SAMPLES["sweeps"](), tmp_path / "a.png"))
    assert pixels[0, 0].tolist() == [1, 1, 1, 1]
    assert save_figure(SAMPLES["sweeps"](), tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match=r"must end in \.svg, \.png or \.pdf, .* got 'a\.jpg'"):
        save_figure(SAMPLES["sweeps"](), Path("a.jpg"))


def test_data_are_written_as_json():
    for data in (*PANELS, top_k_grid("ARC-c"), *ABLATION):
        content = asdict(data)
        again = json.loads(json.dumps(content, allow_nan=False))
        assert json.dumps(again) == json.dumps(content)


def test_curves_are_means_and_ranges_over_seeds():
    figure = draw_curves(PANELS, xlabel="update")
    for axes, shown in zip(figure.axes, PANELS, strict=True):
        assert (axes.get_title("left"), axes.get_xlabel()) == (shown.title, "update")
        assert axes.get_ylabel() == "training loss, nats"
        for line, band, curve in zip(axes.lines, axes.collections, shown.curves, strict=True):
            values = np.array(curve.values)
            assert line.get_xdata().tolist() == list(curve.steps)
            np.testing.assert_allclose(line.get_ydata(), values.mean(0))
            edge = band.get_paths()[0].vertices
            for step, low, high in zip(curve.steps, values.min(0), values.max(0), strict=True):
                ends = edge[edge[:, 0] == step][:, 1]
                assert {round(end, 9) for end in ends} == {round(low, 9), round(high, 9)}
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["layer 30", "layer 31", "layer 32"]
    assert legend.get_title().get_text() == "mean of 3 seeds and their range"


def test_a_label_looks_the_same_in_every_panel_and_unlike_the_others():
    both = (PANELS[0], replace(PANELS[1], curves=PANELS[1].curves[::-1]))
    first, second = (
        [(x.get_color(), x.get_linestyle()) for x in a.lines] for a in draw_curves(both).axes
    )
    assert first == second[::-1]
    many = [noisy_curve(f"layer {n}", 1, 0, 1, 4) for n in range(36)]
    figure = draw_curves([Panel(title="", curves=tuple(many), ylabel="")])
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == 36


def test_a_curve_of_one_seed_has_no_band_and_one_of_one_step_has_a_marker():
    curve = Curve(label="layer 3", steps=(10,), values=((0.5,),))
    figure = draw_curves([Panel(title="t", curves=(curve,), ylabel="y", ylim=(0.0, 1.0))])
    (line,) = figure.axes[0].lines
    assert line.get_marker() == "o"
    assert not figure.axes[0].collections
    assert figure.axes[0].get_ylim() == (0, 1)
    assert figure.legends[0].get_title().get_text() == "one seed"


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=12),
    st.integers(1, 30),
)
def test_moving_mean_is_the_mean_of_the_neighbours_there_are(values, width):
    before, after = width // 2, (width - 1) // 2
    slow = [np.mean(values[max(0, i - before) : i + after + 1]) for i in range(len(values))]
    np.testing.assert_allclose(moving_mean(np.array(values), width), slow, atol=1e-9)


def test_the_moving_average_is_drawn():
    curve = PANELS[0].curves[0]
    figure = draw_curves(PANELS, moving_average=3)
    smooth = np.mean([moving_mean(np.array(row), 3) for row in curve.values], axis=0)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), smooth)
    assert "moving average of 3 points" in figure.legends[0].get_title().get_text()


def test_curves_from_logs_keep_the_steps_of_all_seeds_and_count_the_others():
    def entry(step):
        return {"step": step, "routing_sparsity/layer_9": step / 10, "routing_sparsity/layer_10": 0}

    logs = [
        [entry(1), entry(2), entry(3), {"step": 3, "train_loss": 1.0}],
        [entry(1), {**entry(2), "routing_sparsity/layer_9": 7.0}, entry(2)],  # resumed at step 2
    ]
    nine, ten = curves_from_logs(logs, "routing_sparsity/layer_")
    assert nine == Curve(
        label="layer 9", steps=(1, 2), values=((0.1, 0.2), (0.1, 0.2)), num_left_out=1
    )
    assert (ten.label, ten.values) == ("layer 10", ((0, 0), (0, 0)))
    figure = draw_curves([Panel(title="", curves=(nine, ten), ylabel="")])
    note = "mean of 2 seeds and their range, steps left out because a seed lacks them: 1"
    assert figure.legends[0].get_title().get_text() == note


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ([], r"in every seed, got \[\]"),
        ([[]], r"in every seed, got \[\[\]\]"),
        (
            [[{"step": 1, "x/layer_1": 1.0}], [{"step": 1, "x/layer_2": 1.0}]],
            r"got \[\[1\], \[2\]\]",
        ),
        ([[{"step": 1, "x/layer_1": 1.0}], [{"step": 2, "x/layer_1": 1.0}]], "got none"),
    ],
)
def test_logs_that_cannot_be_put_together_are_refused(logs, message):
    with pytest.raises(ValueError, match=message):
        curves_from_logs(logs, "x/layer_")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: draw_curves([]), r"`panels` must be at least one"),
        (lambda: draw_curves([Panel(title="", curves=(), ylabel="")]), r"got \[0\] curves"),
        (lambda: draw_curves(PANELS, moving_average=0), "`moving_average` and `columns`"),
        (lambda: Curve(label="a", steps=(), values=()), r"got rows of \[\] numbers for 0 steps"),
        (lambda: Curve(label="a", steps=(1,), values=((1.0,), ())), r"rows of \[1, 0\] numbers"),
        (lambda: draw_grid([]), "`grids` and `columns` must be at least one"),
        (lambda: replace(top_k_grid("a"), low=()), "filled at the same places"),
        (lambda: draw_trade_offs([], title="t", xlabel="x"), "`trade_offs` must be at least one"),
        (lambda: draw_sweeps([], baseline="b"), "`sweeps` must be at least one"),
        (lambda: draw_sweeps([sweep("a", ())], baseline="b"), r"got \[0\] points"),
        (lambda: draw_overlaps({}), "`overlaps` and `columns` must be at least one"),
        (lambda: draw_overlaps({"a": ()}), r"got {'a': 0} sets"),
        (lambda: draw_overlaps({"a": [Overlap(methods=(), num_items=3)]}), r"got no name"),
        (lambda: draw_overlaps(VENNS, methods=["layer 30"]), "got layer 30; give the labels"),
    ],
)
def test_nothing_to_draw_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_grid_has_a_cell_for_every_value_and_no_other():
    grids = [top_k_grid("ARC-c"), top_k_grid("BoolQ", 3, 0.6, 3270)]
    *panels, bar = draw_grid(grids).axes
    for axes, grid in zip(panels, grids, strict=True):
        places = [
            (column, row)
            for row, column in product(range(len(grid.rows)), repeat=2)
            if grid.values[row][column] is not None
        ]
        cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert [text.get_position() for text in axes.texts] == places
        assert len(cells) == len(places)
        for (column, row), text in zip(places, words(axes), strict=True):
            assert text == f"{100 * grid.values[row][column]:.1f}\n± 2.8"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("Top-K", "k")
    assert panels[1].get_title("left") == "BoolQ (n = 3,270)"
    assert bar.get_ylabel().startswith("accuracy, %")
    values = [100 * v for grid in grids for row in grid.values for v in row if v is not None]
    np.testing.assert_allclose(bar.get_ylim(), (min(values), max(values)))


def test_equal_values_have_equal_colours_in_all_grids_and_texts_stand_out():
    grids = [top_k_grid("ARC-c"), replace(top_k_grid("BoolQ"), num_items=10)]
    *panels, _ = draw_grid(grids).axes
    first, second = ([to_hex(cell.get_facecolor()) for cell in axes.patches] for axes in panels)
    assert first == second
    for axes in panels:
        for cell, text in zip(axes.patches, axes.texts, strict=True):
            back, front = (
                np.dot(np.array(colour) ** 2.2, (0.2126, 0.7152, 0.0722)) + 0.05
                for colour in (
                    cell.get_facecolor()[:3],
                    plt.matplotlib.colors.to_rgb(text.get_color()),
                )
            )
            assert max(back / front, front / back) > 4.5  # WCAG's contrast of legible text


def test_one_cell_and_one_row_are_drawn():
    cell = Grid(
        title="GSM8K",
        row_name="",
        column_name="k",
        rows=("",),
        columns=(3,),
        values=((0.0,),),
        low=((0.0,),),
        high=((0.02,),),
        num_items=1,
    )
    axes, _ = draw_grid([cell]).axes
    assert words(axes) == ["0.0\n± 1.0"]
    assert to_markdown(cell) == ("GSM8K (n = 1)\n\n| k | 3 |\n| --- | ---: |\n|  | 0.0 ± 1.0 |\n")


def test_a_grid_as_markdown():
    lines = to_markdown(top_k_grid("ARC|c", 2)).splitlines()
    assert lines == [
        r"ARC\|c (n = 1,172)",
        "",
        "| k ↓, Top-K → | 1 | 2 |",
        "| --- | ---: | ---: |",
        "| 1 | 52.1 ± 2.8 |  |",
        "| 2 | 52.9 ± 2.8 | 53.7 ± 2.8 |",
    ]


def counts_of(figure, number=0):
    return sorted(int(w.replace(",", "")) for w in words(figure.axes[number]) if w[0].isdigit())


def test_a_venn_diagram_shows_every_count():
    figure = draw_overlaps(VENNS)
    for number, (title, sets) in enumerate(VENNS.items()):
        axes = figure.axes[number]
        solved = sorted(s.num_items for s in sets if s.methods)
        assert counts_of(figure, number) == solved
        num_items = sum(s.num_items for s in sets)
        unsolved = sum(s.num_items for s in sets if not s.methods)
        assert axes.get_title("left").startswith(
            f"{title}\n{num_items:,} items, none solves {unsolved:,}"
        )
        for name in ("layer 30", "layer 31", "layer 32"):
            total = sum(s.num_items for s in sets if name in s.methods)
            assert f"{name} ({total:,})" in words(axes)
        assert sum(isinstance(patch, Circle) for patch in axes.patches) == 2 * 3


@pytest.mark.parametrize(
    "counts",
    [
        (7, 10, 20, 5),
        (0, 100, 100, 300),
        (3, 0, 40, 60),
        (0, 30, 30, 0),
        (5, 50, 60, 20, 70, 30, 30, 90),
    ],
)
def test_areas_are_as_the_counts_where_the_diagram_says_so(counts):
    counts = np.array(counts)
    layout = lay_out(counts)
    assert layout.to_scale
    np.testing.assert_allclose(layout.shares[1:], counts[1:] / counts[1:].sum(), atol=LARGEST_ERROR)
    # The middle of a region lies in the circles that make it, and in no other.
    for region in np.flatnonzero(counts[1:]) + 1:
        away = np.linalg.norm(layout.centres - layout.middles[region], axis=1)
        inside = away < layout.radii
        assert inside.tolist() == [bool(region >> i & 1) for i in range(len(layout.radii))]


@pytest.mark.parametrize(
    "counts",
    [
        (9, 0, 0, 0),  # nobody solves anything
        (1, 5, 0, 0),
        (0, 0, 5, 0, 3, 0, 0, 0),
        (0, 0, 0, 1, 0, 1, 1, 0),  # pairs without a common part
        (0, 1, 0, 0, 650, 0, 76, 13),
        (0, 1, 1, 0, 1, 0, 0, 900),
        (0, 0, 0, 0, 0, 0, 0, 4),
    ],
)
def test_a_venn_diagram_that_circles_cannot_show_to_scale_says_so_and_shows_all(counts):
    names = ("a", "b", "c")[: len(counts).bit_length() - 1]
    sets = [
        Overlap(methods=tuple(n for i, n in enumerate(names) if region >> i & 1), num_items=count)
        for region, count in enumerate(counts)
        if count
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_overlaps({"t": sets}, methods=names)
    shown = counts_of(figure)
    title = figure.axes[0].get_title("left")
    assert [count for count in shown if count] == sorted(count for count in counts[1:] if count)
    if title.endswith("areas not to scale"):
        assert shown == sorted(counts[1:])


@settings(max_examples=15)
@given(st.lists(st.integers(0, 2000), min_size=7, max_size=7))
def test_no_count_is_lost_in_any_venn_diagram(counts):
    layout = lay_out(np.array([3, *counts]))
    seen = layout.room[1:] > 0.02
    assert seen[np.array(counts) > 0].all()
    assert np.isfinite(layout.middles).all()


def test_more_than_three_methods_make_an_upset_plot():
    sets = random_overlaps(4, 500)
    bars, dots = draw_overlaps({"GSM8K": sets}).axes
    by_size = sorted((s for s in sets if s.methods), key=lambda s: -s.num_items)
    unsolved = [s.num_items for s in sets if not s.methods]
    heights = [s.num_items for s in by_size] + unsolved
    assert [bar.get_height() for bar in bars.patches] == heights
    assert words(bars) == [f"{height:,}" for height in heights]
    names = [label.get_text() for label in dots.get_yticklabels()]
    assert [name.split(" (")[0] for name in names] == [f"layer {n}" for n in range(30, 34)]
    for column, (line, overlap) in enumerate(zip(dots.lines, by_size, strict=True)):
        assert set(line.get_xdata()) == {column}
        rows = [f"layer {30 + row}" for row in line.get_ydata()]
        assert rows == list(overlap.methods)
    assert words(dots) == ["none"]


def test_an_upset_plot_says_what_it_leaves_out():
    names = [f"m{n}" for n in range(6)]
    pairs = [pair for size in (1, 2, 3) for pair in combinations(names, size)]
    sets = [Overlap(methods=pair, num_items=100 - n) for n, pair in enumerate(pairs)]
    bars, dots = draw_overlaps({"t": sets}).axes
    assert len(bars.patches) == MOST_SETS
    rest = sum(s.num_items for s in sets[MOST_SETS:])
    note = f"not drawn: {len(sets) - MOST_SETS} smaller sets with {rest:,} items"
    assert bars.get_title("left").endswith(note)
    assert not words(dots)  # every item is solved


def test_methods_that_solve_nothing_are_shown_when_named():
    sets = [Overlap(methods=(), num_items=4), Overlap(methods=("a",), num_items=6)]
    venn = draw_overlaps({"t": sets}, methods=["a", "b"])
    assert {"a (6)", "b (0)"} <= set(words(venn.axes[0]))
    bars, _ = draw_overlaps({"t": sets}).axes
    assert [bar.get_height() for bar in bars.patches] == [6, 4]
    nothing = draw_overlaps({"t": sets[:1]}, methods=["a", "b", "c", "d"])
    assert [bar.get_height() for bar in nothing.axes[0].patches] == [4]


def test_sweeps_show_differences_in_points():
    figure = draw_sweeps(ABLATION, baseline="LoRA_¬K")
    for axes, group in zip(figure.axes, ABLATION, strict=True):
        assert axes.get_title("left") == group.title
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == [point.label for point in group.points]
        ends = [segment[:, 0] for line in axes.collections for segment in line.get_segments()]
        expected = [(100 * point.low, 100 * point.high) for point in group.points]
        np.testing.assert_allclose(ends, expected)
        drawn = {y: x for line in axes.lines[1:] for x, y in line.get_xydata()}
        assert [drawn[row] for row in sorted(drawn)] == [100 * point.mean for point in group.points]
        assert axes.lines[0].get_xdata() == [0, 0]
    assert words(figure.axes[0])[0] == "+1.2 (+0.3 to +2.1)"
    assert "LoRA_¬K, percentage points" in figure.axes[-1].get_xlabel()


def test_scores_stand_beside_the_range_of_speeds():
    scores, speeds = SAMPLES["trade_offs"]().axes
    for axes, ends in (
        (scores, [(one.low, one.high) for one in TRADE_OFFS]),
        (speeds, [(min(one.speedups), max(one.speedups)) for one in TRADE_OFFS]),
    ):
        (lines,) = axes.collections
        drawn = [line.vertices[:, 0] for line in lines.get_paths()]
        assert np.array(drawn) == pytest.approx(np.array(ends))
        means = axes.lines[0].get_xdata()
        assert all(low <= mean <= high for mean, (low, high) in zip(means, ends, strict=True))
    labels = [label.get_text() for label in scores.get_yticklabels()]
    assert labels == [one.label for one in TRADE_OFFS]
    assert scores.get_ylim()[0] > scores.get_ylim()[1]  # the first on top


def test_a_dot_marks_an_interval_without_zero():
    group = sweep("t", (("a", 0.1, 0.05, 0.2), ("b", 0.0, -0.1, 0.1), ("c", -0.2, -0.3, -0.0001)))
    axes = draw_sweeps([group], baseline="base").axes[0]
    marks = {line.get_marker(): line.get_ydata().tolist() for line in axes.lines[1:]}
    assert marks == {"o": [0, 2], "|": [1]}
    assert words(axes)[1] == "0.0 (−10.0 to +10.0)"  # noqa: RUF001
    assert words(axes)[2] == "−20.0 (−30.0 to 0.0)"  # noqa: RUF001


def test_the_page_about_figures_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/figures.md").read_text("utf-8"), re.DOTALL
    )
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, "figures.md", "exec"), names)


def test_to_svg_has_no_size_of_its_own():
    assert not re.search(r"<svg[^>]*(?:width|height)=", to_svg(SAMPLES["sweeps"]()))
