"""Figures with matplotlib, of real scores, and the Pareto front against its definition."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import sfda_tune
from sfda_tune.finetuning.calibration import calibrate_on_test
from sfda_tune.report import plots
from sfda_tune.selection.calibration import Observation, calibrate
from sfda_tune.selection.odds import judge

ODD = r"$\frac{<b>"  # neither mathematics nor markup


@pytest.fixture(scope="module")
def ranking():
    return sfda_tune.rank("digits", "demo:res*", samples=150, cache=False)


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_ranking_has_its_intervals(ranking, ax, tmp_path):
    assert plots.plot_ranking(ranking, ax=ax) is ax
    assert labels(ax.yaxis) == list(ranking)[::-1]
    (whiskers,) = ax.containers[0].lines[2]
    ends = np.array([segment[:, 0] for segment in whiskers.get_segments()])
    np.testing.assert_allclose(ends, judge(ranking).score_interval[::-1])
    assert ax.get_xlabel() == "forecast (full), standard deviations"
    assert ax.get_title() == "2 backbones, 90 % intervals"
    plots.plot_ranking({ODD: 0.5, "a": np.nan}, ax=(other := Figure().subplots()))
    assert labels(other.yaxis) == [ODD]
    other.figure.savefig(tmp_path / "a.svg")


def test_reliability_before_and_after_the_temperature(ax):
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 3, 200), rng.dirichlet([0.2] * 3, 200)
    found = calibrate_on_test(y, p, 2.5, 40)
    assert plots.plot_reliability(found, ax=ax) is ax
    before, after = ax.collections
    for marks, when in ((before, "before"), (after, "after")):
        np.testing.assert_allclose(marks.get_offsets(), [b[:2] for b in found[f"bins_{when}"]])
        n = np.array([b[2] for b in found[f"bins_{when}"]])
        assert np.argmax(marks.get_sizes()) == np.argmax(n)
    told = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert told == [
        f"as it is: calibration error {found['ece_before']:.4f}",
        f"temperature 2.50: calibration error {found['ece_after']:.4f}",
    ]


def test_new_axes_where_none_are_given(ranking):
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    assert plots.plot_ranking(ranking, top=1).figure in map(plt.figure, plt.get_fignums())
    plt.close("all")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("maximize", [False, True])
def test_the_front_by_its_definition(seed, maximize):
    rng = np.random.default_rng(seed)
    scores = {f"b{i}": float(rng.integers(6)) for i in range(12)}
    costs = {name: float(rng.integers(1, 7)) for name in scores}
    scores["b3"], costs["b4"], costs["b5"] = np.nan, np.nan, None
    known = [n for n in scores if n not in ("b3", "b4", "b5")]

    def at_least(a, b):
        return scores[a] >= scores[b] and (costs[a] - costs[b]) * (1 if maximize else -1) >= 0

    front = plots.find_front(scores, costs, maximize=maximize)
    for name in known:  # everybody is matched by somebody on the front, nobody on it by another
        assert any(at_least(f, name) for f in front)
        if name in front:
            assert not any(at_least(other, name) for other in known if other != name) or all(
                (scores[other], costs[other]) == (scores[name], costs[name])
                for other in known
                if other != name and at_least(other, name)
            )
    assert len({(scores[f], costs[f]) for f in front}) == len(front)
    assert [costs[f] for f in front] == sorted((costs[f] for f in front), reverse=maximize)


def test_the_front_is_drawn_and_named(ranking, ax):
    costs = {s.backbone: s.details["n_params"] for s in ranking.scores}
    plots.plot_pareto(ranking, costs, cost="parameters", ax=ax)
    front = plots.find_front(ranking, costs)
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [costs[name] for name in front])
    assert [text.get_text() for text in ax.texts] == front
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "parameters, logarithmic"
    plots.plot_pareto({ODD: 1.0, "b": 2.0}, {ODD: 3.0, "b": None}, ax=ax)
    ax.figure.canvas.draw()


@pytest.mark.parametrize("n", [3, 16, 60])
def test_nothing_is_printed_over_something_else(n, ax):
    """Names, or numbers with a legend, whatever lies where."""
    rng = np.random.default_rng(n)
    names = [f"a_rather_long_name_{i}.of_{ODD}_in22k_ft_in1k" for i in range(n)]
    scores = dict(zip(names, np.sort(rng.random(n)), strict=True))
    costs = dict(zip(names, np.sort(10 ** rng.uniform(6.5, 7.5, n)), strict=True))  # all on it
    plots.plot_pareto(scores, costs, cost="parameters", ax=ax)
    ax.figure.draw_without_rendering()
    low, high = ax.get_xlim()
    ticks = [t for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]  # as drawn
    boxes = [text.get_window_extent() for text in (*ax.texts, *ticks, ax.title, ax.xaxis.label)]
    boxes += [text.get_window_extent() for of in ax.figure.legends for text in of.get_texts()]
    shown = [box for box in boxes if box.width]
    crossing = [(a, b) for k, a in enumerate(shown) for b in shown[:k] if a.overlaps(b)]
    assert crossing == []
    page = ax.figure.bbox
    assert all(b.x0 >= 0 and b.x1 <= page.x1 + 1 for b in shown)
    if n == 60:
        numbers = [int(text.get_text()) for text in ax.texts]
        assert len(numbers) > 6
        legend = [text.get_text() for of in ax.figure.legends for text in of.get_texts()]
        best = sorted(scores, key=scores.get)[::-1][:12]
        assert legend[:12] == [f"{k}  {name}" for k, name in enumerate(best, 1)]
        assert legend[12:] == ["and 48 more, without a number"]


def test_calibration_draws_the_best_values_and_the_line(ax):
    scores = {"a": 1.0, "b": 2.0, ODD: 3.0, "untried": 4.0}
    history = [Observation(n, "complete", v) for n, v in [("a", 0.5), ("b", 0.6), (ODD, 0.8)]]
    c = calibrate(scores, history)
    plots.plot_calibration(c, ax=ax)
    assert sorted(ax.lines[0].get_ydata()) == [0.5, 0.6, 0.8]
    (x0, x1), (y0, y1) = ax.lines[1].get_data()
    assert (y1 - y0) / (x1 - x0) == pytest.approx(c.slope * c.scale)
    assert f"slope {c.slope:.2f}" in ax.get_title()
    ax.figure.canvas.draw()
    plots.plot_calibration(calibrate(scores, []), ax=Figure().subplots())


def test_trials_are_bars_in_rows(ax):
    trials = [
        {"backbone": name, "state": state, "started": 100.0 + k, "seconds": seconds}
        for k, (name, state, seconds) in enumerate(
            [
                ("a", "complete", 2.0),
                (ODD, "failed", 0.0),
                ("a", "pruned", 1.0),
                ("b", "running", None),
            ]
        )
    ]
    trials.append({"backbone": "c", "state": "running", "started": None, "seconds": None})
    plots.plot_trials(trials, ax=ax)
    bars = [(p.get_x(), p.get_width(), p.get_y() + 0.3) for p in ax.patches]
    assert bars[0] == pytest.approx((0.0, 2.0, 0.0))
    assert bars[2] == pytest.approx((2.0, 1.0, 0.0))
    assert labels(ax.yaxis) == ["a", ODD, "b"]
    assert len({(p.get_hatch(), p.get_facecolor()) for p in ax.patches}) == 4
    plots.plot_trials([], ax=Figure().subplots())


def test_confusions_of_a_real_model(ax):
    x, y = load_digits(return_X_y=True)
    predicted = LogisticRegression(C=1e-4).fit(x[:200], y[:200]).predict(x[200:600])
    plots.plot_confusion(y[200:600], predicted, ax=ax)
    counts = {(t.get_position()[::-1]): int(t.get_text()) for t in ax.texts}
    for (label, guess), count in counts.items():
        assert count == ((y[200:600] == label) & (predicted == guess)).sum()
    assert sum(counts.values()) == 400
    plots.plot_confusion(list(range(150)), [0] * 150, ax=(large := Figure().subplots()))
    assert not large.texts
    with pytest.raises(ValueError, match=r"\['c'\] are none of them"):
        plots.plot_confusion(["a"], ["c"], classes=["a", "b"])
    with pytest.raises(ValueError, match="the lengths differ"):
        plots.plot_confusion(["a", "a"], ["b"])


def test_without_matplotlib_it_says_what_to_install(clean_environment):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from sfda_tune.report import html, plots\n"  # the page needs none
        "try: plots.plot_ranking({'a': 1.0})\n"
        "except ImportError as error: print(error)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment, check=True, timeout=100
    )
    assert "pip install 'sfda-tune[report]'" in result.stdout
