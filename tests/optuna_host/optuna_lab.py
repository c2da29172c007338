"""What the tests of the Optuna adapter share: real studies, and a log that copies share."""

from __future__ import annotations

import warnings

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

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
