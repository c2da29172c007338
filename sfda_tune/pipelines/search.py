"""`search`: from labelled images and candidate backbones to the fine-tuned winner.

What happens when is in `sfda_tune.pipelines.stages`, what stands where in `run_folder`. The same
call goes on where another was stopped, and several at a time share the trials.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfda_tune.backbones.devices import check_device, resolve_device
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data.opening import check_form
from sfda_tune.finetuning.images import own_randomness
from sfda_tune.pipelines.clock import counting
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.progress import SearchProgress, as_progress, check_progress
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.pipelines.stages import run_stages
from sfda_tune.pipelines.workers import share_cores
from sfda_tune.values.redaction import without_secrets
from sfda_tune.values.text import require

__all__ = ["search"]


def search(
    dataset: Any,
    backbones: Any = "demo:*",
    *,
    trials: int | None = None,
    budget: str | float | None = None,
    engine: str = "optuna",
    storage: str | None = None,
    workers: int = 1,
    decoders: int | None = None,
    keep: int | None = None,
    objective: str | Sequence[str] | None = None,
    metric: str | None = None,
    max_params: float | None = None,
    max_latency: float | None = None,
    space: Any = None,
    epochs: int | None = None,
    samples: int | None = None,
    test: Any = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    groups: Any = None,
    split_column: str | None = None,
    time_column: str | None = None,
    task: str | None = None,
    label_columns: str | Sequence[str] | None = None,
    label_delimiter: str | None = None,
    levels: str | Sequence[Any] | None = None,
    loss: str | None = None,
    bit_depth: str | int | None = None,
    bands: str | Sequence[int] | None = None,
    max_unreadable: float = 0.1,
    device: str = "auto",
    precision: str = "float32",
    plugins: Iterable[str] = (),
    cache: bool | str | os.PathLike[str] | None = True,
    weights_disk: str | int | None = None,
    previous: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: Any = None,
    threads: int | None = None,
) -> SearchResult:
    """Rank, tune and fine-tune backbones; return the best model and its test.

    The same call with the same `out` goes on with what was interrupted, and may run several times
    at once, on one machine or on several that share the folder (or, with `storage`, at least the
    database). With more `trials` or a larger `budget` it goes on where the smaller one ended.

    Parameters
    ----------
    dataset : object
        See `open_dataset`.
    backbones : str, Backbone, mapping, or an iterable of these, default "demo:*"
        See `sfda_tune.backbones.specs`.
    trials : int, optional
        How many fine-tunings, some of them stopped early. Default: 12 if there is no `budget`.
    budget : str or float, optional
        Time for everything, in seconds or as "90s", "45m", "1h30m". Trials are stopped, inside an
        epoch if need be, so that final training and test fit in.
    engine : str, default "optuna"
        See `sfda_tune.pipelines.engines`.
    storage : str, optional
        URL of the engine's database; default: SQLite in `out`.
    workers : int, default 1
        Processes that train at the same time; on several GPUs, each its own.
    decoders : int, optional
        Processes that decode images, for each of these; 0 decodes in the process itself. Default:
        one per core, at most 8. Has no influence on the result.
    keep : int, default 3
        How many backbones are tuned.
    objective : "accuracy", or ("accuracy", "latency") or ("accuracy", "params"); optional
        With two, the front between them is searched; the winner is the best by the first. For
        numbers "r2" in the place of "accuracy", for levels "spearman", for several labels "map".
    metric : {"accuracy", "balanced_accuracy", "macro_f1", "log_loss"}, optional
        What "accuracy" means. For numbers one of "r2", "spearman", "rmse" and "mae"; for levels
        one of "spearman", "qwk" (quadratic weighted kappa), "mae", "accuracy" and "log_loss"; for
        several
        labels one of "map" (mean average precision), "macro_f1" and "log_loss".
    max_params : float, optional
    max_latency : float, optional
        Milliseconds for one image on this device. Backbones above a maximum are left out.
    space : mapping, path or Space, optional
        What may vary, see `sfda_tune.pipelines.spaces`; default: `default_space`.
    epochs : int, optional
        Of a full trial; default: half of what `FinetuneConfig` says for so many images.
    samples : int, optional
        Use a stratified sample of so many images; of the data set's own validation and test parts
        in proportion.
    test : float or data set, optional
        Part to hold out, or the test images. Default: the data set's own test part, else 0.2.
    split, image_column, label_column
        See `open_dataset`. Without `split` the data set's own validation part is used, too.
    groups, split_column, time_column : optional
        See `open_dataset`. What belongs together stays on one side of every split, is left out
        together by the scores, and counts once in the interval of the test; with times the latest
        images are held out. `groups` as a sequence is that of the images to train on (of all,
        where there are no own parts).
    task : {"auto", "classification", "regression", "ordinal", "multilabel"}, optional
        See `open_dataset`. For "regression" the network learns to predict the numbers
        (`sfda_tune.finetuning.tasks`), and the test says R², Spearman's ρ, RMSE and MAE. For
        "ordinal" it learns the probability of each level; the place of an image is their mean
        0 … C − 1, its level their median. The test says Spearman's ρ of the places, and of the
        levels quadratic weighted kappa, MAE (in levels) and accuracy. For
        "multilabel" each label has a threshold, chosen on the validation images of the winning
        trial: the one with the highest F1 (`sfda_tune.selection.several.choose_thresholds`). The
        test says mean average precision, macro-F1 at these and log-loss, and
        ``result.best["labels"]`` each label by itself.
    label_columns, label_delimiter, levels : optional
        See `open_dataset`.
    loss : {"mse", "l1", "huber"}, optional
        What training minimises for numbers; default: "mse". A `space` may vary it instead.
    bit_depth, bands : optional
        See `open_dataset`. The winner is shown new images in the same way.
    max_unreadable : float, default 0.1
        Fraction of unreadable images, of all, above which the data set is refused. They are looked
        for once, before anything is ranked, and left out of everything.
    device, precision, plugins, cache
        See `rank`.
    weights_disk : str or int, optional
        How much of the disk may be taken at a time by weights that the search downloads, such as
        "50GB" (or bytes): those of networks that are ranked make room for the next, those of the
        `keep` that are tuned stay until the test is done. What was here before stays. For an
        engine that trains on this machine.
    previous : path or sequence of path, optional
        Folders of finished searches on other data: what parameters did best there is preferred, as
        far as the trials of this search bear it out. With one objective.
    seed : int, default 0
        With one worker, no budget and one objective, the same seed gives the same trials.
    out : path, optional
        The folder RUN; default: a new temporary one.
    progress : bool or SearchProgress, optional
    threads : int, optional
        At most so many threads of the CPU compute in each of the processes; default: those of
        PyTorch, shared between the `workers`. Scores do not depend on it; training does (an epoch
        on 60 digits with one thread and with two: log-losses up to 0.0001 apart, four demo
        networks), so a search is repeated to the bit with as many. Trials on Ray have the CPUs
        that Ray gives them.

    Returns
    -------
    SearchResult

    Raises
    ------
    ValueError, DatasetError, BackboneError
        If an argument cannot be understood, nothing satisfies the constraints, `out` holds another
        search, or no trial came to a value.

    Examples
    --------
    >>> quick = {"trials": 1, "epochs": 1, "samples": 100, "cache": False}
    >>> found = search("digits", "demo:resnet_glyphs", **quick)
    >>> found.best["backbone"], found.test["accuracy"] > 0.5
    ('demo:resnet_glyphs', True)
    """
    if out is None:
        out = tempfile.mkdtemp(prefix="sfda-tune-")
    config = SearchConfig(
        dataset=dataset, backbones=backbones, trials=trials, budget=budget, engine=engine,
        storage=storage, workers=workers, keep=keep, objective=objective, metric=metric,
        max_params=max_params, max_latency=max_latency, space=space, epochs=epochs,
        previous=previous,
        samples=samples, test=test, split=split, image_column=image_column,
        label_column=label_column, max_unreadable=max_unreadable, device=device,
        precision=precision, plugins=plugins, cache=cache, seed=seed, out=Path(out),
        progress=progress, decoders=decoders, groups=groups, split_column=split_column,
        time_column=time_column, task=task, label_columns=label_columns,
        label_delimiter=label_delimiter, levels=levels, loss=loss, bit_depth=bit_depth,
        bands=bands, weights_disk=weights_disk, threads=threads,
    )  # fmt: skip
    check_progress(progress)
    check_form(dataset)  # before torch is imported, which takes seconds
    check_device(device)
    _check_names(config)
    for run in config.previous:  # what cannot be read is said before any work
        known = SearchResult.open(run).history
        require("previous", run, "the folder of a search with a complete trial", known)
    with (
        counting(),
        _as_found(device),
        share_cores(workers, config.threads),
        without_secrets(storage),
        as_progress(progress, SearchProgress) as shown,
    ):
        run_stages(config, shown)
    return SearchResult.open(config.out)


def _check_names(config: SearchConfig) -> None:
    """Refuse unknown backbones; warnings wait until the networks are opened."""
    if isinstance(config.backbones, (str, list, tuple)):  # others may be read but once
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resolve_backbones(config.backbones, plugins=config.plugins)


@contextmanager
def _as_found(device: str) -> Iterator[None]:
    """Leave random streams and warning filters as they were; libraries use and add some."""
    with own_randomness(resolve_device(device)), warnings.catch_warnings():
        yield
