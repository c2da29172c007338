"""A ranking in the words of other AutoML tools: AutoGluon, Ludwig, Hugging Face's `Trainer`.

===============================  ================================================================
`to_autogluon`                   arguments of ``MultiModalPredictor.fit``
`to_ludwig`                      a Ludwig configuration: image encoder and ``hyperopt``
`TrainerSpace` `ModelInit`       what ``hp_space`` of `sfda_tune_optuna` and `sfda_tune_ray` make
===============================  ================================================================

None of these tools is imported until its own objects are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfda_tune.backbones.loading import read_config, timm_name
from sfda_tune.finetuning.trainer import find_specs
from sfda_tune.values.lazy import import_optional
from sfda_tune.values.text import integer

__all__ = ["to_autogluon", "to_ludwig"]


def _find_for_autogluon(spec: str) -> str | None:
    """Return what AutoGluon's ``timm_image`` opens; None for most folders.

    It names a folder by its path, reads ``pytorch_model.bin`` only, and ignores ``model_args``.
    """
    name = timm_name(spec)
    if not name.startswith("local-dir:"):
        return name
    folder = Path(name.partition(":")[2])
    if not (folder / "pytorch_model.bin").is_file():
        return None
    config = read_config(folder)
    return None if config.get("model_args") else str(folder)


def to_autogluon(
    ranking: Mapping[str, float],
    k: int = 3,
    *,
    n_trials: int | None = None,
    choice: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Return arguments of AutoGluon's ``MultiModalPredictor.fit``: train the best, or search `k`.

    Parameters
    ----------
    ranking : Ranking or mapping of str to float
    k : int, default 3
        1 names the best one, without a search.
    n_trials : int, optional
        Default: `k`, each backbone about once.
    choice : callable, optional
        Makes a search space of names: ``choice(*names)``. Default: AutoGluon's own
        ``autogluon.common.space.Categorical``, whose first value is the first trial; it is the
        only thing here that needs AutoGluon.

    Returns
    -------
    dict
        ``hyperparameters`` and, if `k` > 1, ``hyperparameter_tune_kwargs``; add to the former
        what else is to be tuned. Names and ``hf-hub:`` go to the timm that AutoGluon requires
        (1.6: below 1.0.7); of folders it opens only those with a ``pytorch_model.bin``, so others,
        such as the demo, are left out, with a warning.

    Raises
    ------
    ValueError
        If nothing could be scored, or a number is out of range.

    Examples
    --------
    >>> to_autogluon({"resnet50.a1_in1k": 2.5, "vit_small_patch16_224": 3.1}, k=1)
    {'hyperparameters': {'model.names': ['timm_image'], \
'model.timm_image.checkpoint_name': 'vit_small_patch16_224'}}
    """
    names = list(find_specs(ranking, k, _find_for_autogluon).values())
    result: dict[str, Any] = {"hyperparameters": {"model.names": ["timm_image"]}}
    key = "model.timm_image.checkpoint_name"
    if len(names) == 1:
        result["hyperparameters"][key] = names[0]
        return result
    n_trials = len(names) if n_trials is None else integer("n_trials", n_trials, 1)
    if choice is None:
        advice = (
            "to_autogluon with k > 1 makes a search space of AutoGluon's: pip install "
            "autogluon.multimodal, or pass `choice`, as lambda *names: tune.choice(names)"
        )
        choice = import_optional("autogluon.common.space", advice).Categorical
    assert choice is not None
    result["hyperparameters"][key] = choice(*names)
    result["hyperparameter_tune_kwargs"] = {
        "searcher": "random",
        "scheduler": "FIFO",
        "num_trials": n_trials,
    }
    return result


def to_ludwig(
    ranking: Mapping[str, float],
    k: int = 3,
    *,
    image: str = "image",
    label: str = "label",
    n_trials: int | None = None,
) -> dict[str, Any]:
    """Return a Ludwig configuration with timm's encoder: train the best, or search `k`.

    Parameters
    ----------
    ranking : Ranking or mapping of str to float
    k : int, default 3
        1 makes a configuration without ``hyperopt``.
    image, label : str
        Columns of the data set.
    n_trials : int, optional
        Default: each backbone once (a grid); with a number, so many random draws.

    Returns
    -------
    dict
        JSON values; for ``LudwigModel(config)``, or `ludwig.hyperopt.run.hyperopt` if `k` > 1. The
        output is a category, or a number where the ranking is of numbers.
        It needs a Ludwig that has the encoder ``timm`` (not 0.11 or older).

    Raises
    ------
    ValueError
        If nothing could be scored, or a number is out of range.

    Examples
    --------
    >>> config = to_ludwig({"resnet50.a1_in1k": 2.5, "vit_small_patch16_224": 3.1}, k=2)
    >>> config["input_features"][0]["encoder"]["model_name"]
    'vit_small_patch16_224'
    >>> config["hyperopt"]["parameters"]
    {'image.encoder.model_name': {'space': 'grid_search', \
'values': ['vit_small_patch16_224', 'resnet50.a1_in1k']}}
    """
    names = list(find_specs(ranking, k, timm_name).values())
    numbers = getattr(ranking, "info", {}).get("task") == "regression"
    encoder = {"type": "timm", "model_name": names[0], "use_pretrained": True, "trainable": True}
    config: dict[str, Any] = {
        "input_features": [{"name": image, "type": "image", "encoder": encoder}],
        "output_features": [{"name": label, "type": "number" if numbers else "category"}],
    }
    if len(names) > 1:
        space, n = {"space": "grid_search", "values": names}, 1
        if n_trials is not None:
            space, n = {"space": "choice", "categories": names}, integer("n_trials", n_trials, 1)
        config["hyperopt"] = {
            "goal": "maximize",
            "metric": "r2" if numbers else "accuracy",
            "output_feature": label,
            "parameters": {f"{image}.encoder.model_name": space},
            "search_alg": {"type": "variant_generator"},
            "executor": {"type": "ray", "num_samples": n},
        }
    return config
