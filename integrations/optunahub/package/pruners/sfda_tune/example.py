"""Keep a TPE study to the three best backbones, among real fine-tuning runs."""

import optuna
import optunahub

import sfda_tune


benchmark = optunahub.load_module(package="benchmarks/backbone_selection")
problem = benchmark.BackboneSelectionProblem(benchmark.DIGITS, params=("lr", "epochs"))


def objective(trial: optuna.Trial) -> float:
    name = trial.suggest_categorical("backbone", problem.backbones)
    lr = trial.suggest_categorical("lr", problem.search_space["lr"].choices)
    if trial.should_prune():  # before any epoch
        raise optuna.TrialPruned
    accuracy = 0.0
    for epochs in problem.search_space["epochs"].choices:
        accuracy = problem.evaluate({"backbone": name, "lr": lr, "epochs": epochs})
        trial.report(accuracy, epochs)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


if __name__ == "__main__":
    ranking = sfda_tune.rank("digits", "demo:*", samples=200, cache=False)
    pruner = optunahub.load_module(package="pruners/sfda_tune").SFDAPruner(
        ranking, keep=3, base_pruner=optuna.pruners.MedianPruner()
    )
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=30)
    n_gated = sum(not trial.intermediate_values for trial in study.trials)
    print(f"{n_gated} of 30 trials stopped before their first epoch")
    print(f"{study.best_value:.3f} of {problem.best_value:.3f}, {study.best_params}")
