"""How sure the order of a ranking is: by its forecast, or by the images behind its scores."""

from __future__ import annotations

from sfda_tune.selection.forecast import forecast, is_forecast
from sfda_tune.selection.uncertainty import Confidence, confidence
from sfda_tune.values.ranking import Ranking

__all__ = ["find_odds", "judge"]


def judge(ranking: Ranking) -> Confidence:
    """Return the odds of what a ranking is ordered by.

    Of a forecast they speak of what training will reach (`sfda_tune.forecast`), of a score only of
    that score (`sfda_tune.selection.uncertainty.confidence`, which says what it raises).
    """
    if is_forecast(ranking) and len(ranking) > len(ranking.failed):
        return forecast(ranking, train=ranking.info["train"]).confidence()
    return confidence(ranking)


def find_odds(ranking: Ranking) -> Confidence | None:
    """Return `judge`; None if the metric is no mean over images, or nothing was scored."""
    try:
        return judge(ranking)
    except ValueError:
        return None
