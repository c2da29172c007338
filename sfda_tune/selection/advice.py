"""What follows from a ranking, in sentences: which one to train, and what is not known."""

from __future__ import annotations

from typing import Any

from sfda_tune.selection.evaluation import accuracy_interval
from sfda_tune.selection.forecast import is_forecast
from sfda_tune.selection.labels import judge_labels
from sfda_tune.selection.uncertainty import Confidence, shortlist
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import format_duration, is_number, printable, some

__all__ = ["recommend"]

FIRST = {"full": "Fine-tune", "head": "Train a head on"}
# Forward passes that an epoch takes: 2.2, 2.6, 3.3, 3.9 and 5.6 were measured for three networks
# of the zoo and two of the demo, on one core
PASSES = 3
HALF = 0.5
TRAINED = {"full": "after fine-tuning", "head": "once a head is trained"}
NAMED = 3  # names in a sentence
WITH_MORE_TIME = {
    True: "the same command, with more time, goes on from there",
    False: "the same command, with more time, begins anew, for nothing was kept",
}  # by whether there was a cache
GOOD = 0.95  # average precision of a label of which there is nothing to say


def recommend(ranking: Ranking, odds: Confidence | None) -> list[str]:
    """Say what follows from a ranking and its odds: the shortlist, the race, the ensemble.

    Examples
    --------
    >>> from sfda_tune.selection.forecast import order_by_forecast
    >>> from sfda_tune.selection.odds import find_odds
    >>> from sfda_tune.values.features import Score
    >>> ranking = order_by_forecast(Ranking([Score("a", 0.9), Score("b", 0.5)], "knn"))
    >>> recommend(ranking, find_odds(ranking))[1]
    'Any of them may be the best after fine-tuning.'
    """
    lines, trained = [], is_forecast(ranking)
    unseen = ranking.info.get("not_looked_at") or ()
    more = WITH_MORE_TIME[(ranking.info.get("arguments") or {}).get("cache") is not False]
    if odds is not None and trained and len(odds.names) > 1:
        first, best = str(odds.names[0]), list(odds.best.values())
        seen = [str(name) for name in odds.names if name not in unseen]
        doubt = ""
        if unseen and seen and (first in unseen or best[0] < max(best)):
            doubt = "too little is known of the others"
            if first in unseen:
                doubt = f"by what is known of it, {printable(first)} may be better"
            first = seen[0]
        line = f"{FIRST[ranking.info['train']]} {printable(first)} first: "
        if doubt:
            line += f"it is the best of the {len(seen)} that were looked at; {doubt}."
        else:
            line += f"of these {len(best)} it will be the best with probability {best[0]:.2f}"
            line += f", and one of the first three with {sum(best[:3]):.2f}." if best[3:] else "."
        lines.append(line)
        lines += _expect(ranking, first) + ([] if unseen else _say_what_helps(ranking, first))
    elif odds is not None and len(odds.names) > 1:
        first, best = str(odds.names[0]), next(iter(odds.best.values()))
        lines.append(
            f"By {ranking.metric or 'this score'}, before any training, {printable(first)} is the "
            f"best of these {len(odds.names)}: with probability {best:.2f} also on other images."
        )
        lines += _expect(ranking, first)
    elif (
        odds is None and len(names := [name for name in ranking if name not in ranking.failed]) > 1
    ):
        lines.append(
            f"By {ranking.metric or 'this score'}, before any training, {printable(names[0])} is "
            f"the best of these {len(names)}; how sure that is cannot be told."
        )
        lines += _expect(ranking, names[0])
    lines += _name_bad_labels(ranking)
    if odds is not None:
        names = [printable(str(name)) for name in shortlist(odds)]
        by = TRAINED[ranking.info["train"]] if trained else "by this score"
        if trained and len(names) == len(odds.names) > 1:
            lines.append(f"Any of them may be the best {by}.")
        elif trained or len(names) > 1:
            among = "of those that finished the race, " * ("race" in ranking.info and not trained)
            one_of = ", one of" * (len(names) > 1)
            lines.append(f"Best {by}, {among}with probability .95{one_of}: {some(names, NAMED)}.")
        if not trained and any(len(group) > 1 for group in odds.groups):
            lines.append(
                "Those that share a letter (column group) are not told apart by these images; "
                "more images tell them apart, or trials."
            )
    if unseen:
        were = "was" if len(unseen) == 1 else "were"
        line = f"{len(unseen)} of {len(ranking)} {were} not looked at: {some(unseen, NAMED)}"
        lines.append(f"{line}; {more}.")
    if race := ranking.info.get("race"):
        saved = 1 - race["forward_passes"] / race["full_run"]
        most = race["stages"][-1]["images"]
        is_whole = most >= race.get("images", 0)
        if is_whole and any(stage["dropped"] for stage in race["stages"]):
            lines.append(
                f"Race for the top {race['top']}: {race['forward_passes']} forward passes instead "
                f"of {race['full_run']}, {saved:.0%} saved."
            )
        if late := race.get("late"):
            lines.append(f"{len(late)} saw fewer images: {some(late, NAMED)}; {more}.")
        if not is_whole:
            cut = race.get("interrupted")
            what = "The race was interrupted after" if cut else "The time sufficed for"
            lines.append(f"{what} {most} of {race['images']} images.")
    if ensemble := ranking.info.get("ensemble"):
        lines.append(f"To fine-tune together: {', '.join(ensemble['backbones'])}.")
    return lines


def _expect(ranking: Ranking, first: str) -> list[str]:
    """Say what the first reaches as it is, and what it will take to train it."""
    of_task = {
        "regression": _expect_numbers, "ordinal": _expect_levels, "multilabel": _expect_labels,
    }  # fmt: skip
    expect = of_task.get(ranking.info.get("task", ""), _expect_classes)
    return [*expect(ranking, first), *_cost(ranking, first)]


def _expect_classes(ranking: Ranking, first: str) -> list[str]:
    """Say how many new images a head on the features of the first is right on."""
    details = ranking.score(first).details
    accuracy, n = _number(details.get("accuracy")), _number(details.get("n_samples"))
    if accuracy is None or not n:
        return []
    low, high = accuracy_interval(round(accuracy * n), int(n))
    # where groups are left out, the images are fewer than they look
    sure = "" if "groups" in ranking.info else f" (95 %: {low:.2f} to {high:.2f})"
    right = f"{accuracy:.2f} of new images{sure}"
    line = f"As it is, a head on its features is right on {right}"
    if ranking.info.get("train") == "full":
        line += "; training usually adds to that"
    return [f"{line}."]


def _cost(ranking: Ranking, first: str) -> list[str]:
    """Say how long an epoch of the first will take."""
    details = ranking.score(first).details
    n, pace = (_number(details.get(key)) for key in ("n_samples", "images_per_second"))
    if not n or not pace or ranking.info.get("train") == "head":
        return []
    seconds = PASSES * n / pace
    spent = f"about {format_duration(seconds)}" if seconds >= 1 else "less than a second"
    return [f"An epoch over these {n:.0f} images takes {spent} here."]


def _expect_numbers(ranking: Ranking, first: str) -> list[str]:
    """Say how well the first predicts numbers as it is."""
    score, target = ranking.score(first), ranking.info.get("target") or {}
    value, rmse = _number(score.details.get("evidence")), _number(score.details.get("rmse"))
    low, high = _number(target.get("min")), _number(target.get("max"))
    if value is None or rmse is None or low is None or high is None:
        return []
    return [
        f"As it is, a linear model on its features predicts numbers from {low:g} to {high:g} with "
        f"an error of {rmse:.3g} (root mean square; R² {value:.2f})."
    ]


def _expect_levels(ranking: Ranking, first: str) -> list[str]:
    """Say how well the first orders images by level as it is."""
    rho = _number(ranking.score(first).details.get("spearman"))
    if rho is None:
        return []
    n = len(ranking.info.get("level_counts") or ())
    return [
        f"As it is, a linear model on its features orders images by {n} levels with a rank "
        f"correlation (Spearman) of {rho:.2f}."
    ]


def _expect_labels(ranking: Ranking, first: str) -> list[str]:
    """Say how well the first tells several labels as it is."""
    details, counts = ranking.score(first).details, ranking.info.get("label_counts") or ()
    value = _number(details.get("mean_average_precision"))
    if value is None:
        return []
    return [
        f"As it is, a linear model on its features finds the images of {len(counts)} labels with "
        f"a mean average precision of {value:.2f}."
    ]


def _name_bad_labels(ranking: Ranking) -> list[str]:
    """Name the labels that separate worst by the first."""
    rows = [r for r in judge_labels(ranking) if r["average_precision"] is not None]
    several, rows = len(rows) > 1, [r for r in rows if r["average_precision"] < GOOD]
    if not several or not rows:
        return []
    told = [
        f"{printable(r['name'])} {r['average_precision']:.2f} ({r['share']:.2f} by chance)"
        for r in rows[:3]
    ]
    return [f"Labels that separate worst, by average precision: {'; '.join(told)}."]


def _say_what_helps(ranking: Ranking, first: str) -> list[str]:
    """Say what would make the first surer: images, if their choice is what makes it unsure."""
    known = ranking.score(first).details.get("forecast") or {}
    sd, error, best = (_number(known.get(key)) for key in ("sd", "error", "p_best"))
    if not sd or error is None or best is None or best > HALF:
        return []
    if error**2 > HALF * sd**2:
        return ["More images would make that surer."]
    return ["More images would hardly make that surer; training the first few would."]


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None
