"""What the tests of the Optuna adapter share: real studies, and a log that copies share."""

from __future__ import annotations

import warnings

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optunahub.samplers import SimpleBaseSampler

NAMES = ["a", "b", "c", "d", "e", "f"]
VALUES = dict(zip(NAMES, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), strict=True))


class Log(list):
    """A list that a copied sampler shares with the original."""

    def __deepcopy__(self, memo: object) -> Log:
        return self


def spy_on(cls: type[optuna.samplers.BaseSampler], log: Log, **options: object):
    """Return a sampler that notes which trials it sees, and which space it is to draw from."""

    class Spy(cls):  # type: ignore[misc, valid-type]
        def sample_relative(self, study, trial, search_space):
            seen = {t.number for t in study.get_trials(deepcopy=False)} - {trial.number}
            log.append((trial.number, seen, set(search_space)))
            return super().sample_relative(study, trial, search_space)

    return Spy(**options)


def make_trial(backbone=None, value=0.5, lr=0.01, state="COMPLETE", choices=NAMES, **more):
    params, distributions = {"lr": lr}, {"lr": FloatDistribution(1e-5, 1e-1, log=True)}
    if backbone is not None:
        params["backbone"] = backbone
        distributions["backbone"] = CategoricalDistribution(choices)
    if "values" not in more and (state == "COMPLETE" or "intermediate_values" in more):
        more["value"] = value
    return optuna.create_trial(
        state=optuna.trial.TrialState[state], params=params, distributions=distributions, **more
    )


def objective(trial: optuna.Trial) -> float:
    name = trial.suggest_categorical("backbone", NAMES)
    lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    return VALUES[name] - abs(lr - 1e-3)


def prunable(trial: optuna.Trial) -> float:
    """The same, of which the pruner is asked at the end."""
    value = objective(trial)
    if trial.should_prune():
        raise optuna.TrialPruned
    return value


def pairs(study: optuna.Study) -> list[tuple[str, float]]:
    return [(t.params["backbone"], t.params["lr"]) for t in study.trials]


def open_storage(kind: str, place: str, **heartbeat: object) -> optuna.storages.BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if kind == "memory":
            return optuna.storages.InMemoryStorage()
        if kind == "journal":
            return JournalStorage(JournalFileBackend(place))
        if kind == "grpc":
            return GrpcStorageProxy(host="127.0.0.1", port=int(place))
        OPENED.append(RDBStorage(place, **heartbeat))  # type: ignore[arg-type]
        return OPENED[-1]


OPENED: list[RDBStorage] = []


def close_storages() -> None:
    while OPENED:
        storage = OPENED.pop()
        storage.remove_session()
        storage.engine.dispose()


# Bases with state of their own -----------------------------------------------------------------
class Swarm(optuna.samplers.BaseSampler):
    """A population on the sampler itself, fed by `after_trial`, for floats and ints."""

    def __init__(self, size: int = 5, seed: int | None = None) -> None:
        self.size, self.told, self.best = size, 0, []
        self.rng = np.random.default_rng(seed)
        self.independent = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study, trial):
        space = optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))
        return {n: d for n, d in space.items() if not isinstance(d, CategoricalDistribution)}

    def sample_relative(self, study, trial, search_space):
        fit = [params for _, params in self.best if search_space.keys() <= params.keys()]
        if len(fit) < 2 or not search_space:
            return {}
        drawn = {}
        for name, d in search_space.items():
            one, other = self.rng.choice(len(fit), 2, replace=False)
            mean = (d.to_internal_repr(fit[one][name]) + d.to_internal_repr(fit[other][name])) / 2
            low, high = d.to_internal_repr(d.low), d.to_internal_repr(d.high)
            x = float(np.clip(mean, low, high))
            if d.step is not None:
                x = d.low + round((x - d.low) / d.step) * d.step
            drawn[name] = d.to_external_repr(min(max(x, low), high))
        return drawn

    def sample_independent(self, *args):
        return self.independent.sample_independent(*args)

    def reseed_rng(self):
        self.independent.reseed_rng()

    def after_trial(self, study, trial, state, values):
        self.told += 1
        if values is not None:
            sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
            self.best.append((sign * values[0], dict(trial.params)))
            self.best = sorted(self.best, key=lambda pair: pair[0])[: self.size]


class Climber(SimpleBaseSampler):
    """A step from the best trial, that shrinks with every draw; on the base class of OptunaHub."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(seed=seed)
        self.step, self.rng = 0.5, np.random.RandomState(seed)

    def sample_relative(self, study, trial, search_space):
        done = [t for t in study.get_trials(deepcopy=False) if t.values is not None]
        done = [t for t in done if search_space.keys() <= t.params.keys()]
        if not search_space or not done:
            return {}
        sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
        best = min(done, key=lambda t: sign * t.values[0])
        self.step *= 0.95
        drawn = {}
        for name, d in search_space.items():
            if isinstance(d, CategoricalDistribution) or d.step is not None or d.log:
                drawn[name] = best.params[name]
            else:
                x = best.params[name] + self.rng.uniform(-1, 1) * self.step * (d.high - d.low)
                drawn[name] = float(np.clip(x, d.low, d.high))
        return drawn
