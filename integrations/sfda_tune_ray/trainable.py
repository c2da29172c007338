"""Fine-tuning as a trainable of Ray Tune."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune

from sfda_tune.data.decoding import get_switches, set_switches
from sfda_tune.data.opening import settle_task
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.shared import SharedWork
from sfda_tune_ray import _compat

__all__ = ["finetune_trainable"]


def finetune_trainable(
    dataset: Any,
    *,
    backbones: Any = None,
    config: Mapping[str, Any] | None = None,
    param_name: str = "backbone",
    device: str = "auto",
    workers: int = 0,
    task: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    groups: Any = None,
    split_column: str | None = None,
    time_column: str | None = None,
    label_columns: str | Sequence[str] | None = None,
    label_delimiter: str | None = None,
    levels: str | Sequence[str] | None = None,
    bit_depth: str | int | None = None,
    bands: str | Sequence[int] | None = None,
) -> Callable[[dict[str, Any]], None]:
    """Return a function for ``tune.Tuner`` that fine-tunes the backbone of its configuration.

    It reports the values of `sfda_tune.finetuning.epochs.Epoch` after every epoch, among them
    ``accuracy`` and ``log_loss`` (of numbers ``r2`` and ``rmse``, of several labels ``map`` and
    ``macro_f1``), with a checkpoint, from which a trial that was killed goes on. Running out of
    memory fails the trial, which `SFDASearcher` learns from.

    Parameters
    ----------
    dataset : str, path or anything that `sfda_tune.open_dataset` takes
        A name or a path is opened by every actor; an object travels through the object store.
        Its own validation part is used, if it has one.
        With ``TuneConfig(reuse_actors=True)`` trials share decoded images and starts of heads.
    backbones : optional
        Those that can be chosen, as for `sfda_tune.rank`, if their names are not what
        `sfda_tune.resolve_backbones` understands.
    config : mapping, optional
        Fields of `sfda_tune.finetuning.run.FinetuneConfig`. Those that are searched are in
        ``param_space`` under the same names, flat.
    param_name : str, default "backbone"
    device, workers
        See `sfda_tune.finetuning.run.finetune`.
    task : {"auto", "classification", "regression", "ordinal", "multilabel"}, optional
        See `sfda_tune.open_dataset`.
    split, image_column, label_column, groups, split_column, time_column : optional
        As for `sfda_tune.search`: without `split` the data set's own validation part is used, else
        images are held out, by whole groups, of the latest.
    label_columns, label_delimiter, levels, bit_depth, bands : optional
        See `sfda_tune.open_dataset`.

    Returns
    -------
    callable
        A new one every time: ``tune.with_resources`` changes what it is given.

    Notes
    -----
    Leave ``CheckpointConfig(num_to_keep=…)`` unset, or not below 2: Tune deletes and synchronises
    each time, and a trial may be restored from what has just gone. ``checkpoint_frequency`` and
    ``checkpoint_at_end`` are for classes. Several machines need one ``storage_path`` that all see.

    Examples
    --------
    >>> from ray import tune
    >>> trainable = finetune_trainable("digits", config={"epochs": 3})
    >>> space = {"backbone": tune.choice(["demo:resnet_glyphs"]), "lr": tune.uniform(0, 0.1)}
    >>> tuner = tune.Tuner(trainable, param_space=space)
    """
    settle_task(task, label_columns, label_delimiter, levels)
    given: dict[str, Any] = {
        "task": None if task == "auto" else task, "split": split, "image_column": image_column,
        "label_column": label_column, "groups": groups, "split_column": split_column,
        "time_column": time_column, "label_columns": label_columns,
        "label_delimiter": label_delimiter, "levels": levels, "bit_depth": bit_depth,
        "bands": bands, "samples": None, "seed": 0, "test": 0.0,
    }  # fmt: skip
    fixed, shared = dict(config or {}), SharedWork()  # one in each actor: it travels empty
    FinetuneConfig.from_dict(fixed)  # what is wrong is said here, not by every trial
    switches = get_switches()

    def train(config: dict[str, Any], data: Any = dataset) -> None:
        from sfda_tune import resolve_backbones
        from sfda_tune.data.splits import open_parts
        from sfda_tune.finetuning.run import finetune

        set_switches(switches)
        flat = _compat.flatten_dict(config)
        if param_name not in flat:
            raise ValueError(
                f"`param_space` must hold {param_name!r} but has only {sorted(flat)}; "
                "`param_name` says what the backbone is called."
            )
        name = flat.pop(param_name)
        chosen = {key: v for key, v in flat.items() if not key.startswith("__")}  # of Repeater
        known = resolve_backbones(name if backbones is None else backbones)
        backbone = next((b for b in known if b.name == name), None)
        if backbone is None:
            found = [b.name for b in known]
            raise ValueError(
                f"{param_name!r} must be the name of one of {found}, but is {name!r}."
            )
        limit_memory()
        parts, _ = shared.get_or_compute(
            (), "parts", lambda: open_parts({**given, "dataset": data})
        )
        with tempfile.TemporaryDirectory() as folder:
            saved = tune.get_checkpoint()
            if saved is not None:
                saved.to_directory(folder)
            for epoch in finetune(
                backbone,
                parts["train"],
                FinetuneConfig.from_dict({**fixed, **chosen}),
                val=parts.get("val"),
                checkpoint_dir=folder,
                device=device,
                workers=workers,
                shared=shared,
            ):
                tune.report(epoch.flatten(), checkpoint=tune.Checkpoint.from_directory(folder))

    if isinstance(dataset, (str, os.PathLike)):
        return train
    return tune.with_parameters(train, data=dataset)


def limit_memory() -> None:
    """Keep a trial to its fraction of a GPU, which Ray only counts."""
    resources = tune.get_context().get_trial_resources()
    share = resources.required_resources.get("GPU", 0) if resources else 0
    if 0 < share < 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(share)
