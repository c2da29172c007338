"""Figures of a study with plotly; `sfda_tune_optuna.plots.matplotlib` has their twins.

>>> from sfda_tune_optuna.plots import plot_backbone_ranking, plot_proxy_calibration
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.study import Study

from sfda_tune.selection.calibration import estimate_errors, scores_by_name
from sfda_tune.selection.policy import survivors
from sfda_tune.values.lazy import import_optional
from sfda_tune_optuna.history import observe
from sfda_tune_optuna.store import SFDAWarning, load_ranking
from sfda_tune_optuna.study import calibrate_study, find_param_name

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["plot_backbone_ranking", "plot_proxy_calibration"]

BLUE, GREY = "#3572b0", "#b0b0b0"


@dataclass(frozen=True)
class RankingInfo:
    """What `plot_backbone_ranking` draws, best backbone first."""

    names: tuple[str, ...]
    scores: tuple[float, ...]
    errors: tuple[float, ...]  # standard errors; empty if unknown
    labels: tuple[str, ...]  # "4 trials, best 0.913"
    tried: tuple[bool, ...]
    title: str


@dataclass(frozen=True)
class CalibrationInfo:
    """What `plot_proxy_calibration` draws: values against standardised scores."""

    names: tuple[str, ...]
    z: tuple[float, ...]
    best: tuple[float, ...]
    others: tuple[tuple[float, float, str], ...]  # z, value, text; pruned or infeasible trials
    line: tuple[tuple[float, float], ...]  # two ends, or none
    title: str


def plot_backbone_ranking(
    study: Study, *, ranking: Mapping[str, float] | None = None, top: int = 30
) -> go.Figure:
    """Draw the scores as bars, with what the study made of each backbone.

    Parameters
    ----------
    study : Study
    ranking : Ranking or mapping of str to float, optional
        Default: the one saved in the study.
    top : int, default 30
        Draw at most so many.

    Returns
    -------
    plotly.graph_objects.Figure

    Examples
    --------
    >>> import optuna
    >>> figure = plot_backbone_ranking(optuna.create_study(), ranking={"vit": 3.1, "resnet": 2.5})
    >>> figure.data[0].y
    ('vit', 'resnet')
    """
    go = _import_plotly()
    info = get_ranking_info(study, ranking, top)
    figure = go.Figure(
        go.Bar(
            x=info.scores,
            y=info.names,
            orientation="h",
            text=info.labels,
            textposition="inside",
            insidetextanchor="start",
            constraintext="none",
            marker_color=[BLUE if tried else GREY for tried in info.tried],
            error_x={"type": "data", "array": info.errors} if info.errors else None,
        )
    )
    return figure.update_layout(
        title=info.title,
        xaxis_title="score",
        yaxis={"autorange": "reversed"},
        template="simple_white",
        height=max(300, 120 + 24 * len(info.names)),
    )


def plot_proxy_calibration(
    study: Study, *, ranking: Mapping[str, float] | None = None
) -> go.Figure:
    """Draw the best value of each backbone against its score: right or wrong.

    Pruned and infeasible trials are grey. In a multi-objective study: the first objective.

    Parameters
    ----------
    study : Study
    ranking : Ranking or mapping of str to float, optional
        Default: the one saved in the study.

    Returns
    -------
    plotly.graph_objects.Figure
        Empty, with a warning, if no trial is complete.

    Examples
    --------
    >>> import optuna
    >>> study = optuna.create_study(direction="maximize")
    >>> for name, value in [("vit", 0.9), ("resnet", 0.7)]:
    ...     study.add_trial(optuna.create_trial(
    ...         params={"backbone": name}, value=value,
    ...         distributions={"backbone": optuna.distributions.CategoricalDistribution(
    ...             ["resnet", "vit"])},
    ...     ))
    >>> figure = plot_proxy_calibration(study, ranking={"vit": 3.1, "resnet": 2.5})
    >>> sorted(figure.data[0].text)
    ['resnet', 'vit']
    """
    go = _import_plotly()
    info = get_calibration_info(study, ranking)
    figure = go.Figure()
    if info.names:
        figure.add_scatter(
            x=info.z,
            y=info.best,
            text=info.names,
            mode="markers+text",
            textposition=["top left" if z > 0 else "top right" for z in info.z],
            cliponaxis=False,
            marker={"color": BLUE, "size": 9},
            name="best of a backbone",
        )
    if info.others:
        z, values, text = zip(*info.others, strict=True)
        figure.add_scatter(
            x=z, y=values, hovertext=text, mode="markers", marker={"color": GREY},
            name="pruned or infeasible",
        )  # fmt: skip
    if info.line:
        z, values = zip(*info.line, strict=True)
        figure.add_scatter(x=z, y=values, mode="lines", line={"color": BLUE}, name="slope")
    return figure.update_layout(
        title={"text": info.title, "font_size": 14},
        xaxis_title="score, standardised",
        yaxis_title="value",
        legend={"orientation": "h", "y": -0.25},
        template="simple_white",
    )


def get_ranking_info(study: Study, ranking: Mapping[str, float] | None, top: int) -> RankingInfo:
    """Collect what `plot_backbone_ranking` draws."""
    ranking = load_ranking(study) if ranking is None else ranking
    rows = {row["backbone"]: row for row in calibrate_study(study, ranking).table}
    scores = scores_by_name(ranking)
    names = survivors(scores)[:top]  # in order, without those that have no finite score
    errors = estimate_errors(ranking) or {}
    labels = []
    for name in names:
        n, best = rows[name]["n_trials"], rows[name]["best"]
        text = f"{n} trial{'' if n == 1 else 's'}" if n else ""
        labels.append(text if best is None else f"{text}, best {_show(study, best):.4g}")
    hidden = len(scores) - len(names)
    return RankingInfo(
        names,
        tuple(scores[name] for name in names),
        tuple(errors.get(name, 0.0) for name in names) if errors else (),
        tuple(labels),
        tuple(bool(rows[name]["n_trials"]) for name in names),
        f"Backbones by score{f' ({hidden} more)' if hidden else ''}",
    )


def get_calibration_info(study: Study, ranking: Mapping[str, float] | None) -> CalibrationInfo:
    """Collect what `plot_proxy_calibration` draws."""
    calibration = calibrate_study(study, ranking)
    rows = calibration.reached
    if not rows:
        warnings.warn("The study has no complete trial to draw.", SFDAWarning, stacklevel=3)
    z = {row["backbone"]: row["z"] for row in calibration.table}
    history = observe(study, study.get_trials(deepcopy=False), find_param_name(study))
    others = tuple(
        (z[o.backbone], _show(study, o.value), f"{o.backbone}, {o.state}")
        for o in history
        if o.value is not None and o.backbone in z and (o.state == "pruned" or not o.feasible)
    )
    return CalibrationInfo(
        tuple(row["backbone"] for row in rows),
        tuple(row["z"] for row in rows),
        tuple(_show(study, row["best"]) for row in rows),
        others,
        tuple((z, _show(study, value)) for z, value in calibration.fit_line()),
        f"Scores against values: {calibration.describe_slope()}, "
        f"{calibration.n_backbones} backbones".replace(" Kendall", "<br>Kendall"),  # two lines
    )


def _show(study: Study, utility: float) -> float:
    """Return a value as the user knows it: observations are all higher-is-better."""
    return -utility if study.directions[0].name == "MINIMIZE" else utility


def _import_plotly() -> Any:
    return import_optional(
        "plotly.graph_objects",
        "This figure needs plotly: pip install plotly, or use sfda_tune_optuna.plots.matplotlib.",
    )
