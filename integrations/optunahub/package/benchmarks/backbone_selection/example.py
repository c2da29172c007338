"""How soon does a sampler find the best of 120 real fine-tuning runs?"""

import optuna
import optunahub


if __name__ == "__main__":
    benchmark = optunahub.load_module(package="benchmarks/backbone_selection")
    problem = benchmark.BackboneSelectionProblem(
        benchmark.DIGITS, params=("lr", "epochs"), seconds="seconds"
    )
    for sampler in (optuna.samplers.RandomSampler(seed=0), optuna.samplers.TPESampler(seed=0)):
        study = optuna.create_study(directions=problem.directions, sampler=sampler)
        study.optimize(problem, n_trials=30)
        seconds = sum(problem.read_seconds(trial.params) for trial in study.trials)
        name = type(sampler).__name__
        print(f"{name}: {study.best_value:.3f} of {problem.best_value:.3f} in {seconds:.0f} s")
