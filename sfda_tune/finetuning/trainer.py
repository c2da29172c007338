"""The Trainer of transformers: a search space and a model with a head."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfda_tune.values.features import Backbone
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import as_tuple, integer, some

__all__ = ["ModelInit", "TrainerSpace"]


def find_specs(
    ranking: Mapping[str, float],
    k: int | None,
    translate: Callable[[str], str | None] = lambda spec: spec,
) -> dict[str, str]:
    """Return name → translated spec of the best `k` backbones (None: all), best first.

    What has no spec, because it exists in this process only, or no translation is left out, with a
    warning.
    """
    k = None if k is None else integer("k", k, 1)
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
            + (f"only {some(lost)}, which cannot." if lost else "none.")
        )
    if lost:
        warnings.warn(f"left out, for they cannot be opened by name: {some(lost)}", stacklevel=3)
    return found


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
        return ModelInit(self, tuple(names), rescale, as_tuple("plugins", plugins))


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

        from sfda_tune.finetuning.models import Model, with_head, write_model
        from sfda_tune.finetuning.tasks import Classification

        name = self.space.choose(trial)
        backbone = Backbone(name, self.space.specs[name], plugins=self.plugins)
        module, preprocessing, _ = with_head(backbone, len(self.classes))
        with tempfile.TemporaryDirectory() as folder:  # what the Trainer is going to save
            model = Model(module, preprocessing, Classification(self.classes))
            write_model(backbone, model, Path(folder))
            config = TimmWrapperConfig.from_pretrained(folder)
            # The wrapper sets it itself, and Python takes no argument twice.
            config.model_args = dict(config.model_args or {})
            config.model_args.pop("num_classes", None)
            wrapped: Any = TimmWrapperForImageClassification.from_pretrained(folder, config=config)
        if self.rescale and preprocessing.input_size is not None:
            wrapped.timm_model.register_forward_pre_hook(_Rescale(preprocessing))
        return wrapped


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
