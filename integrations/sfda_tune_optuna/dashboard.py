"""What optuna-dashboard shows of a ranking: two figures and a note."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optuna.study import Study

from sfda_tune.selection.calibration import Calibration
from sfda_tune.values.lazy import import_optional
from sfda_tune_optuna.plots import _show, plot_backbone_ranking, plot_proxy_calibration
from sfda_tune_optuna.store import load_ranking
from sfda_tune_optuna.study import calibrate_study, summarise

__all__ = ["publish_to_dashboard"]

# Markdown's only comment; what stands outside is the user's and stays.
BEGIN, END = "[//]: # (sfda_tune begins)", "[//]: # (sfda_tune ends)"


def publish_to_dashboard(
    study: Study, *, ranking: Mapping[str, float] | None = None, top: int = 10
) -> None:
    """Show ranking, calibration and a summary in optuna-dashboard; call again to refresh.

    The figures appear on the study's first page, the summary in its note, below what is there.

    Parameters
    ----------
    study : Study
    ranking : Ranking or mapping of str to float, optional
        Default: the one saved in the study.
    top : int, default 10
        Rows of the table in the note.

    Examples
    --------
    >>> import optuna
    >>> study = optuna.create_study()
    >>> publish_to_dashboard(study, ranking={"vit": 3.1, "resnet": 2.5})
    >>> from optuna_dashboard import get_note
    >>> "| 1 | vit | 3.1 |" in get_note(study)
    True
    """
    advice = "publish_to_dashboard needs optuna-dashboard: pip install optuna-dashboard plotly"
    dashboard = import_optional("optuna_dashboard", advice)
    ranking = load_ranking(study) if ranking is None else ranking
    calibration = calibrate_study(study, ranking)
    figure = plot_backbone_ranking(study, ranking=ranking)
    dashboard.save_plotly_graph_object(study, figure, graph_object_id="sfda-ranking")
    if calibration.n_trials:
        figure = plot_proxy_calibration(study, ranking=ranking)
        dashboard.save_plotly_graph_object(study, figure, graph_object_id="sfda-calibration")
    before, _, rest = dashboard.get_note(study).partition(BEGIN)
    after = rest.partition(END)[2]
    note = "\n\n".join([BEGIN, _write_note(study, calibration, top), END])
    dashboard.save_note(study, f"{before.rstrip()}\n\n{note}\n{after}".lstrip())


def _write_note(study: Study, calibration: Calibration, top: int) -> str:
    rows = [row for row in calibration.table if math.isfinite(row["score"])]
    rows.sort(key=lambda row: (-row["score"], row["backbone"]))
    lines = ["## Backbones by score", "", f"Calibration: {summarise(calibration)}", ""]
    lines += ["| rank | backbone | score | trials | best |", "| ---: | --- | ---: | ---: | ---: |"]
    for rank, row in enumerate(rows[:top], 1):
        best = "" if row["best"] is None else f"{_show(study, row['best']):.4g}"
        name = row["backbone"].replace("|", "\\|")
        lines.append(f"| {rank} | {name} | {row['score']:.4g} | {row['n_trials']} | {best} |")
    return "\n".join(lines)
