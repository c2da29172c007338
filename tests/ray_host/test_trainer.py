"""Hugging Face's own `Trainer.hyperparameter_search` on Ray Tune, without network."""

import pytest

transformers = pytest.importorskip("transformers")
RANKING = {"demo:resnet_glyphs": 2.0, "demo:vit_glyphs": 1.5, "demo:resnet_noise": 0.2}
ARCHITECTURE = {"demo:resnet_glyphs": "resnet10t", "demo:vit_glyphs": "test_vit"}


class Note(transformers.TrainerCallback):
    """Write what was trained into the metrics, which come back from the worker."""

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        metrics["architecture"] = model.config.architecture
        metrics["rate"] = args.learning_rate


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_search_trains_the_backbone_that_the_configuration_names(
    ray_cluster, make_trainer, tmp_path, monkeypatch
):
    from ray import tune
    from sfda_tune_ray import hp_space

    monkeypatch.chdir(tmp_path)
    space = hp_space(RANKING, 2, learning_rate=tune.loguniform(1e-4, 1e-2), weight_decay=0.01)
    trainer = make_trainer(space, callbacks=[Note()])
    first = [{"backbone": name, "learning_rate": 1e-3} for name in ("demo:vit_glyphs",)]
    best = trainer.hyperparameter_search(
        space, backend="ray", n_trials=2, direction="minimize",
        compute_objective=lambda metrics: metrics["eval_loss"],
        search_alg=tune.search.BasicVariantGenerator(points_to_evaluate=first, random_state=0),
        storage_path=str(tmp_path / "tune"), verbose=0, max_concurrent_trials=1,
        reuse_actors=True,  # it need not import transformers again
    )  # fmt: skip
    trials = best.run_summary.trials
    assert [trial.status for trial in trials] == ["TERMINATED"] * 2
    assert {trial.config["backbone"] for trial in trials} <= set(ARCHITECTURE)
    assert trials[0].config["backbone"] == "demo:vit_glyphs"
    for trial in trials:
        result = trial.last_result
        assert result["architecture"] == ARCHITECTURE[trial.config["backbone"]]
        assert result["rate"] == pytest.approx(trial.config["learning_rate"])
    assert best.objective == min(trial.last_result["objective"] for trial in trials)
    winner = trainer.model_init(best.hyperparameters)
    assert winner.config.architecture == ARCHITECTURE[best.hyperparameters["backbone"]]
