"""A ranking in the words of other AutoML tools: AutoGluon, Ludwig, Hugging Face's `Trainer`.

===============================  ================================================================
`to_autogluon`                   arguments of ``MultiModalPredictor.fit``
`to_ludwig`                      a Ludwig configuration: image encoder and ``hyperopt``
`TrainerSpace` `ModelInit`       what ``hp_space`` of `sfda_tune_optuna` and `sfda_tune_ray` make
===============================  ================================================================

None of these tools is imported until its own objects are made.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfda_tune.backbones.specs import read_config, timm_name
from sfda_tune.values.ranking import Backbone, Ranking

__all__ = ["ModelInit", "TrainerSpace", "to_autogluon", "to_ludwig"]


def find_specs(
    ranking: Mapping[str, float],
    k: int | None,
    translate: Callable[[str], str | None] = lambda spec: spec,
) -> dict[str, str]:
    """Return name → translated spec of the best `k` backbones (None: all), best first.

    What has no spec, because it exists in this process only, or no translation is left out, with a
    warning.
    """
    if k is not None:
        k = _positive("k", k, 1)
    if isinstance(ranking, Ranking):
        scores = [s for s in ranking.scores if s.error is None]
        specs = {s.backbone: str(s.details.get("spec", s.backbone)) for s in scores}
    else:
        names = sorted((n for n in ranking if ranking[n] == ranking[n]), key=lambda n: -ranking[n])
        specs = {name: name for name in names}
    found: dict[str, str] = {}
    lost = []
    for name, spec in specs.items():
        if len(found) == k:
            break
        translated = translate(spec) if spec else None
        if translated is None:
            lost.append(name)
        else:
            found[name] = translated
    if not found:
        raise ValueError(
            "`ranking` must hold a scored backbone that can be opened by its name but holds "
            + (f"only {', '.join(lost)}, which cannot." if lost else "none.")
        )
    if lost:
        warnings.warn(
            f"left out, for they cannot be opened by name: {', '.join(lost)}", stacklevel=3
        )
    return found


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
    n_trials = _positive("n_trials", n_trials, len(names))
    if choice is None:
        try:
            from autogluon.common import space  # type: ignore[import]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_autogluon with k > 1 makes a search space of AutoGluon's: pip install "
                "autogluon.multimodal, or pass `choice`, as lambda *names: tune.choice(names)",
                name=error.name,
            ) from error
        choice = space.Categorical
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
        JSON values; for ``LudwigModel(config)``, or `ludwig.hyperopt.run.hyperopt` if `k` > 1.
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
    encoder = {"type": "timm", "model_name": names[0], "use_pretrained": True, "trainable": True}
    config: dict[str, Any] = {
        "input_features": [{"name": image, "type": "image", "encoder": encoder}],
        "output_features": [{"name": label, "type": "category"}],
    }
    if len(names) > 1:
        space = {"space": "grid_search", "values": names}
        if n_trials is not None:
            space = {"space": "choice", "categories": names}
        config["hyperopt"] = {
            "goal": "maximize",
            "metric": "accuracy",
            "output_feature": label,
            "parameters": {f"{image}.encoder.model_name": space},
            "search_alg": {"type": "variant_generator"},
            "executor": {"type": "ray", "num_samples": _positive("n_trials", n_trials, 1)},
        }
    return config


def _positive(name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer ≥ 1 but is {value!r}.")
    return value


# Hugging Face Trainer ---------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class TrainerSpace:
    """What is searched by ``Trainer.hyperparameter_search``, and the models that go with it.

    Made by ``hp_space`` of `sfda_tune_optuna` or `sfda_tune_ray`; called by the Trainer.

    Parameters
    ----------
    specs : mapping of str to str
        Name → spec of the candidates, best first.
    name : str
        The parameter that holds the backbone.
    other : mapping
        Further parameters, in the words of the backend.
    """

    specs: Mapping[str, str]
    name: str = "backbone"
    other: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, trial: Any = None) -> dict[str, Any]:
        """Return what the backend wants of a space."""
        raise NotImplementedError("made by hp_space of sfda_tune_optuna or sfda_tune_ray")

    def choose(self, trial: Any) -> str:
        """Return the backbone of a trial; of no trial, the best one."""
        if trial is None:
            return next(iter(self.specs))
        if isinstance(trial, Mapping):  # Ray's, or the hyperparameters of the best run
            return trial[self.name]
        # The Trainer makes the model before it asks for the parameters. A second suggestion of
        # the same name gives the same value; the choices are sorted so that they never change.
        return trial.suggest_categorical(self.name, sorted(self.specs))

    def model_init(
        self, classes: int | Sequence[str], *, rescale: bool = True, plugins: Sequence[str] = ()
    ) -> ModelInit:
        """Return the ``model_init`` of the Trainer, see `ModelInit`."""
        names = [str(c) for c in (range(classes) if isinstance(classes, int) else classes)]
        return ModelInit(self, tuple(names), rescale, tuple(plugins))


@dataclass(frozen=True, eq=False)
class ModelInit:
    """Make the model of a trial: a ``TimmWrapperForImageClassification`` with a new head.

    Parameters
    ----------
    space : TrainerSpace
    classes : tuple of str
        Names of the labels 0, 1, ….
    rescale : bool, default True
        Take ``pixel_values`` that are RGB in 0 … 1, of any size, and resize and normalise them as
        each backbone wants: the candidates differ in that, while a Trainer has one data set. The
        saved checkpoint has no such step; its ``TimmWrapperImageProcessor`` does it. False: feed
        what the backbones want.
    plugins : tuple of str
        Files or modules that register further timm architectures.
    """

    space: TrainerSpace
    classes: tuple[str, ...]
    rescale: bool = True
    plugins: tuple[str, ...] = ()

    def __call__(self, trial: Any = None) -> Any:
        """Return the model of a trial; of no trial, with the best backbone."""
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

        from sfda_tune.finetuning.heads import with_head, write_model
        from sfda_tune.finetuning.models import Model

        name = self.space.choose(trial)
        backbone = Backbone(name, self.space.specs[name], plugins=self.plugins)
        module, preprocessing, _ = with_head(backbone, len(self.classes))
        with tempfile.TemporaryDirectory() as folder:  # what the Trainer is going to save
            write_model(backbone, Model(module, preprocessing, self.classes), Path(folder))
            config = TimmWrapperConfig.from_pretrained(folder)
            # The wrapper sets it itself, and Python takes no argument twice.
            config.model_args = dict(config.model_args or {})
            config.model_args.pop("num_classes", None)
            model: Any = TimmWrapperForImageClassification.from_pretrained(folder, config=config)
        if self.rescale and preprocessing.input_size is not None:
            model.timm_model.register_forward_pre_hook(_Rescale(preprocessing))
        return model


@dataclass(frozen=True)
class _Rescale:
    """A hook, not a layer: the weights keep the names that timm gives them."""

    preprocessing: Any

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        from torch.nn.functional import interpolate

        size = self.preprocessing.input_size[1:]
        pixels = inputs[0]
        if tuple(pixels.shape[2:]) != tuple(size):
            pixels = interpolate(pixels, size, mode="bilinear", antialias=True)
        return (self.preprocessing.normalize(pixels * 255), *inputs[1:])
