"""Choose backbone and learning rate among real fine-tuning runs, with and without scores."""

import optuna
import optunahub

import sfda_tune


N_TRIALS = 12

if __name__ == "__main__":
    # No network is trained: what a trial reaches is looked up in a table of finished runs.
    benchmark = optunahub.load_module(package="benchmarks/backbone_selection")
    problem = benchmark.BackboneSelectionProblem(benchmark.DIGITS, params=("lr", "epochs"))
    ranking = sfda_tune.rank("digits", "demo:*", samples=200, cache=False)

    SFDASampler = optunahub.load_module(package="samplers/sfda_tune").SFDASampler
    for sampler in (SFDASampler(ranking, seed=0), optuna.samplers.TPESampler(seed=0)):
        study = optuna.create_study(directions=problem.directions, sampler=sampler)
        study.optimize(problem, n_trials=N_TRIALS)
        print(
            f"{sampler}: {study.best_value:.3f} of {problem.best_value:.3f}, {study.best_params}"
        )
