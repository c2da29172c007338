"""The figures of `sfda_tune_optuna.plots` with matplotlib: each returns its Axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optuna.study import Study

from sfda_tune.values.lazy import import_optional
from sfda_tune_optuna.plots import BLUE, GREY, get_calibration_info, get_ranking_info

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_backbone_ranking", "plot_proxy_calibration"]


def plot_backbone_ranking(
    study: Study, *, ranking: Mapping[str, float] | None = None, top: int = 30
) -> Axes:
    """Draw the scores as bars; see `sfda_tune_optuna.plots.plot_backbone_ranking`."""
    info = get_ranking_info(study, ranking, top)
    axes = _make_axes(height=max(3.0, 1.2 + 0.24 * len(info.names)))
    bars = axes.barh(
        info.names,
        info.scores,
        xerr=info.errors or None,
        color=[BLUE if tried else GREY for tried in info.tried],
    )
    axes.bar_label(bars, info.labels, padding=3)
    axes.invert_yaxis()
    axes.set(title=info.title, xlabel="score")
    return axes


def plot_proxy_calibration(study: Study, *, ranking: Mapping[str, float] | None = None) -> Axes:
    """Draw best values against scores; see `sfda_tune_optuna.plots.plot_proxy_calibration`."""
    info = get_calibration_info(study, ranking)
    axes = _make_axes()
    for z, value, _ in info.others:
        axes.plot(z, value, "o", color=GREY)
    axes.plot(info.z, info.best, "o", color=BLUE)
    for name, z, value in zip(info.names, info.z, info.best, strict=True):
        axes.annotate(name, (z, value), textcoords="offset points", xytext=(0, 6), ha="center")
    if info.line:
        axes.plot(*zip(*info.line, strict=True), color=BLUE)
    title = info.title.replace("<br>", "\n")
    axes.set(title=title, xlabel="score, standardised", ylabel="value")
    return axes


def _make_axes(height: float = 4.8) -> Any:
    advice = "This figure needs matplotlib: pip install matplotlib, or use sfda_tune_optuna.plots."
    # Not pyplot's: that would keep every figure and choose a window system.
    return (
        import_optional("matplotlib.figure", advice)
        .Figure(figsize=(8, height), layout="constrained")
        .subplots()
    )
