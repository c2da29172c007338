import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch

from sfda_tune import (
    BackboneError,
    DatasetError,
    Features,
    ImageDataset,
    MetricResult,
    Ranking,
    RankingInterruptedError,
    rank,
    score,
)
from sfda_tune.extraction.settings import Settings
from sfda_tune.metrics.priors import look_up_facts
from sfda_tune.metrics.sfda import sfda
from sfda_tune.pipelines import progress
from sfda_tune.pipelines.budget import parse_budget
from sfda_tune.pipelines.progress import NullProgress
from sfda_tune.pipelines.ranking import find_prices, order_by_promise
from sfda_tune.selection.forecast import find_evidence, order_by_forecast
from sfda_tune.selection.odds import judge
from sfda_tune.values.features import Score

CPU = {"device": "cpu", "workers": 0, "cache": False}


def test_rank_is_extract_and_score(photos, toy_zoo):
    ranking = rank(photos, toy_zoo, metric="sfda", **CPU)
    assert sorted(ranking) == ["convnext", "efficientnet", "resnet", "vit"]
    assert list(ranking.values()) == sorted(ranking.values(), reverse=True)
    assert ranking.metric == "sfda (loo)"
    assert ranking.labels is not None
    assert ranking.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    info = ranking.info
    assert (info["dataset"], info["n_samples"], info["n_classes"]) == ("my photos", 36, 3)
    assert info["classes"] == ["ant", "bee", "cat"]
    parts = {"load", "decode", "decode_work", "forward", "copy", "score", "total"}
    assert set(info["seconds"]) == parts
    assert info["seconds"]["forward"] > 0
    from sfda_tune import extract, open_dataset, resolve_backbones

    settings = Settings(device="cpu", workers=0)
    for e in extract(open_dataset(photos), resolve_backbones(toy_zoo), settings):
        assert e.features is not None
        s = ranking.score(e.backbone.name)
        result = sfda(e.features.x, e.features.y)
        assert s.value == pytest.approx(result.value, abs=1e-9)
        assert s.per_sample is not None
        assert result.per_sample is not None
        np.testing.assert_allclose(s.per_sample, result.per_sample, atol=1e-9)
        assert s.n_dims == e.features.n_dims
        assert s.details["n_params"] == e.n_params
        assert s.details["images_per_second"] > 0
        assert "lambda" in s.details
    assert Ranking.from_json(ranking.to_json()).to_json() == ranking.to_json()


def test_rank_orders_by_the_forecast_of_these_scores(photos, toy_zoo):
    ranking, scores = rank(photos, toy_zoo, **CPU), rank(photos, toy_zoo, metric="sfda", **CPU)
    assert ranking.metric == "forecast (full)"
    assert dict(find_evidence(ranking)) == dict(scores)
    assert {**ranking} == {**order_by_forecast(scores)}
    head = rank(photos, toy_zoo, train="head", **CPU)
    assert (head.metric, head.info["train"]) == ("forecast (head)", "head")
    assert {**head} == {**order_by_forecast(scores, "head")}


def test_the_same_whatever_the_executor(photos, toy_zoo):
    options = {**CPU, "metric": lambda x, y: x.std()}
    serial = rank(photos, toy_zoo, **options)
    assert len(set(serial.values())) == 4
    with ThreadPoolExecutor(3) as pool:
        threads = rank(photos, toy_zoo, map_fn=pool.map, **options)
    assert list(threads) == list(serial)
    assert dict(threads) == pytest.approx(dict(serial), abs=1e-9)


class Local:
    """An executor in this process, which notes what happens to it."""

    def __init__(self):
        self.events = []

    def __enter__(self):
        self.events.append("enter")

    def __exit__(self, *error):
        self.events.append("exit")

    def resolve_device(self, device):
        return "cpu"

    def run(self, worker, plan):
        self.events.append("run")
        return map(worker, plan.units(list(plan.missing), range(len(plan.shards)), 0))

    def report(self):
        return {"events": list(self.events)}


def test_an_executor_is_entered_once(photos, toy_zoo, tmp_path):
    executor, options = Local(), {"metric": lambda x, y: x.std(), "workers": 0}
    there = rank(photos, toy_zoo / "vit", executor=executor, cache=tmp_path, **options)
    assert executor.events == ["enter", "run", "exit"]
    assert there.info["executor"] == {"events": ["enter", "run"]}
    assert dict(there) == dict(rank(photos, toy_zoo / "vit", **{**CPU, **options}))


def test_within_a_budget_no_place_of_an_executor_is_idle_from_the_first(photos, toy_zoo, tmp_path):
    class Places(Local):
        """Has three places, which is known when it has started."""

        @property
        def n_places(self):
            return 3 if self.events else 1

        def run(self, worker, plan):
            self.events.append(len(plan.missing))
            return super().run(worker, plan)

    executor, options = Places(), {"budget": "1h", "cache": tmp_path, "workers": 0}
    there = rank(photos, toy_zoo, executor=executor, **options)
    assert executor.events[:3] == ["enter", 3, "run"]
    assert there.failed == {}
    executor = Places()
    again = rank(photos, toy_zoo, executor=executor, **options)
    assert executor.events == []  # all is kept: it is not even started
    assert dict(again) == dict(there)


def test_each_image_is_digested_once(photos, toy_zoo, tmp_path, monkeypatch):
    digested = []
    digest = ImageDataset.digest
    monkeypatch.setattr(
        ImageDataset, "digest", lambda self, row: digested.append(row) or digest(self, row)
    )
    for how in ({"budget": "1h"}, {"race": True}, {}):
        ranking = rank(photos, toy_zoo, cache=tmp_path, device="cpu", workers=0, **how)
        assert len(ranking) == 4
        assert len(digested) == 36
        digested.clear()


def test_a_long_run_says_how_long_it_is(photos, toy_zoo, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(progress, "LONG", 100)
        rank(photos, toy_zoo, progress=True, **CPU)
    assert "144 forward passes lie ahead, of 4 backbones" in capsys.readouterr().err
    rank(photos, toy_zoo, progress=True, **CPU)
    assert "lie ahead" not in capsys.readouterr().err


def test_samples_are_seeded(photos, toy_zoo):
    options = {**CPU, "metric": lambda x, y: x.mean(), "samples": 15}
    runs = [rank(photos, toy_zoo / "vit", seed=seed, **options) for seed in (0, 0, 1)]
    assert [r.info["n_samples"] for r in runs] == [15] * 3
    assert runs[0]["vit"] == runs[1]["vit"] != runs[2]["vit"]


def test_a_metric_of_ones_own(photos, toy_zoo):
    def width(x, y):
        return float(x.shape[1])

    ranking = rank(photos, toy_zoo, metric=width, **CPU)
    assert ranking.metric == "width"
    assert ranking["resnet"] == 96
    named = rank(photos, toy_zoo, metric=partial(sfda, variant="paper"), **CPU)
    assert dict(named) == dict(rank(photos, toy_zoo, variant="paper", **CPU))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_networks_of_torchscript_are_those_they_are_made_of(photos):
    from torch import nn

    def transform(image):
        return torch.from_numpy(np.asarray(image.resize((16, 16)), np.float32)).permute(2, 0, 1)

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    script = torch.jit.script(plain)
    traced = torch.jit.trace(plain.eval(), torch.zeros(2, 3, 16, 16))
    given = {"plain": plain, "script": script, "traced": traced}
    ranking = rank(photos, {k: (m, transform) for k, m in given.items()}, metric="sfda", **CPU)
    assert ranking.failed == {}
    assert ranking["script"] == pytest.approx(ranking["plain"], abs=1e-4)
    assert ranking["traced"] == pytest.approx(ranking["plain"], abs=1e-4)
    assert script.training  # the caller's is left as it is
    assert all(p.requires_grad for p in script.parameters())


def test_a_metric_that_fails_is_recorded(photos, toy_zoo):
    def picky(x, y):
        if x.shape[1] == 96:
            raise ArithmeticError("not 96")
        return MetricResult(float(x.shape[1]), None, {"odd": np.inf})

    ranking = rank(photos, toy_zoo, metric=picky, **CPU)
    assert ranking.failed == {"resnet": "ArithmeticError: not 96"}
    assert list(ranking)[-1] == "resnet"
    ranking.to_json()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "nonsense"}, "sfda.*nonsense"),
        ({"variant": "nonsense"}, "`variant` must be one of official, paper, loo"),
        ({"metric": max, "variant": "paper"}, "`variant` belongs to the metric 'sfda'"),
        ({"metric": "forecast", "variant": "loo"}, "`variant` belongs to the metric 'sfda'"),
        ({"metric": "sfda", "train": "head"}, "`train` is for the metric 'forecast'"),
        ({"top": 3}, "`top` is for a race but is 3 without one"),
        ({"train": "both"}, "`train` must be one of full, head"),
        ({"metric": "leep"}, "'leep' needs logits, which `rank` does not have; choose one of"),
        ({"device": "nonsense"}, "`device`"),
        ({"precision": "nonsense"}, "`precision`"),
        ({"samples": 0}, "`n`|`samples`"),
        ({"plugins": ["/no/such.py"]}, "could not be imported"),
        ({"plugins": "/no/such.py"}, "'/no/such.py' could not be imported"),
        ({"seed": -1}, "`seed` must be an integer in 0 … 4294967295 but is -1"),
        ({"seed": "a", "samples": 30}, "`seed` must be an integer in 0 … 4294967295 but is 'a'"),
        ({"budget": [5]}, "`budget` must be a time such as"),
        ({"max_unreadable": "few"}, "`max_unreadable` must lie in 0 … 1 but is 'few'"),
        ({"map_fn": 3}, "`map_fn` must be a function .* but is 3"),
        ({"progress": "x"}, "`progress` must be True, False, or an object with"),
        ({"plugins": None}, "`plugins` must be a list, or one of its values, but is None"),
    ],
)
def test_arguments_refused_before_any_work(photos, toy_zoo, arguments, message):
    with pytest.raises(ValueError, match=message):
        rank(photos, toy_zoo, **{**CPU, **arguments})


def test_bad_dataset_and_backbones(photos, toy_zoo):
    with pytest.raises(DatasetError):
        rank(photos.parent / "nothing", toy_zoo, **CPU)
    with pytest.raises(BackboneError):
        rank(photos, "resnet5O", **CPU)


def test_unreadable_images_are_counted_and_named(photos, toy_zoo, tmp_path):
    root = shutil.copytree(photos, tmp_path / "spoilt")
    (root / "bee" / "03.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 of 36 images could not be read.*03\.jpg"):
        ranking = rank(root, toy_zoo, **CPU)
    ((name, reason),) = ranking.info["unreadable"].items()
    assert name.endswith("03.jpg")
    assert reason
    assert ranking.info["n_samples"] == 35
    assert {s.n_samples for s in ranking.scores} == {35}
    assert ranking.labels is not None
    assert len(ranking.labels) == 35


class StopAfterFirst(NullProgress):
    def finish(self, score):
        raise KeyboardInterrupt


def test_ctrl_c_hands_over_what_is_finished(photos, toy_zoo):
    with pytest.raises(RankingInterruptedError) as caught:
        rank(photos, toy_zoo, progress=StopAfterFirst(), **CPU)
    ranking = caught.value.ranking
    assert len(ranking) == 4
    unseen = ranking.info["not_looked_at"]
    assert len(unseen) == 3
    assert not ranking.failed
    notes = {ranking.score(name).details["note"] for name in unseen}
    assert notes == {"not looked at: interrupted"}
    assert len(ranking.shortlist(probability=0.95)) == 4  # of any part the best may be elsewhere
    assert isinstance(caught.value, KeyboardInterrupt)


def test_cache_is_used_by_default_and_can_be_turned_off(photos, toy_zoo, cache, tmp_path):
    options = {"device": "cpu", "workers": 0}
    assert not rank(photos, toy_zoo, **options).score("vit").details["cached"]
    again = rank(photos, toy_zoo, **options).score("vit")
    assert again.details["cached"]
    assert again.details["note"] == "cached"
    assert not rank(photos, toy_zoo, cache=False, **options).score("vit").details["cached"]
    assert (
        not rank(photos, toy_zoo, cache=tmp_path / "b", **options).score("vit").details["cached"]
    )
    assert (tmp_path / "b").is_dir()


def test_within_a_budget_the_rest_is_not_looked_at(photos, toy_zoo, tmp_path):
    class Slow(NullProgress):
        """Waits where images have been seen, so that the time is over in the third backbone."""

        seen = 0

        def advance(self, backbone, n_images):
            self.seen += n_images
            while self.seen > 2 * 36 and time.perf_counter() < end:
                time.sleep(0.05)

    options = {**CPU, "cache": tmp_path}
    rank(photos, toy_zoo / "vit", device="cpu", workers=0, cache=False)  # what is imported once
    end = time.perf_counter() + 4
    cut = rank(photos, toy_zoo, budget=3.0, race=False, progress=Slow(), **options)
    unseen = cut.info["not_looked_at"]
    assert len(unseen) == 2
    assert not cut.failed
    for record in cut.records():
        assert (record["score"] is None) is (record["backbone"] in unseen)
        assert record["note"] == "not looked at: the 3 s were over" * (record["score"] is None)
    assert sum(judge(cut).best.values()) == pytest.approx(1)
    assert cut.labels is not None
    whole = rank(photos, toy_zoo, budget="10m", **options)
    assert "not_looked_at" not in whole.info
    assert {**whole} == {**rank(photos, toy_zoo, **CPU)}
    scored = rank(photos, toy_zoo, metric="sfda", budget=1e-4, **CPU)
    assert set(scored.failed.values()) == {"not looked at: the 0.0001 s were over"}
    with pytest.raises(ValueError, match="`budget` must be a time"):
        rank(photos, toy_zoo, budget="soon", **CPU)


@pytest.mark.parametrize(
    "budget", ["1.2.3", ".", "1..s", "", "-1s", "nan", True, [90], b"90", timedelta(minutes=2)]
)
def test_what_is_no_time_is_no_budget(budget):
    with pytest.raises(ValueError, match="`budget` must be a time such as '2h', '45m' or 90"):
        parse_budget(budget)
    assert parse_budget(" 1.5h.5m ") == 5430


def test_one_image_per_class_is_refused_before_networks_see_them(toy_zoo):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    images = np.concatenate([images, images[:1]])  # a copy judges nothing
    labels = list("abcda")
    for metric in "sfda", "knn":
        with pytest.raises(ValueError, match=r"a class of two different images, but all 4"):
            rank((images, labels), toy_zoo, metric=metric, **CPU)


def test_the_most_promising_for_their_price_come_first():
    names = ["resnet18.a1_in1k", "resnet50.a1_in1k", "vgg19.tv_in1k", "convnext_large.fb_in1k"]
    order = order_by_promise(look_up_facts(names))
    assert order[0] == "resnet50.a1_in1k"
    assert order[-1] == "vgg19.tv_in1k"  # large, old
    nothing = look_up_facts(["mine", "yours"])
    assert order_by_promise(nothing) == ["mine", "yours"]
    assert order_by_promise(nothing, {"mine": 2.0, "yours": 1.0}) == ["yours", "mine"]
    prices = find_prices(look_up_facts([*names, "mine"]))
    assert min(prices.values()) < prices["mine"] < max(prices.values())


def test_all_backbones_fail(photos):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    broken = {"b": (Broken(), lambda image: torch.zeros(3, 4, 4))}
    ranking = rank(photos, broken, **CPU)
    assert ranking.failed == {"b": "RuntimeError: no"}
    assert ranking.shortlist(1) == []


def test_arrays_are_ranked_and_never_changed(toy_zoo):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 20, 20, 3), np.uint8)
    labels = np.array(["x", "y", "z"] * 8)
    before = images.copy(), labels.copy()
    ranking = rank((images, labels), toy_zoo, **CPU)
    assert not ranking.failed
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_score_is_independent_of_row_order_and_label_names():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 7)), np.arange(90) % 3
    order = rng.permutation(90)
    names = np.array(["c", "a", "b"])
    a = score(Features(x, y))
    b = score(Features(x[order], names[y[order]]))
    assert a.value == pytest.approx(b.value, abs=1e-9)
    assert a.seconds > 0


def test_the_demo_runs_as_in_the_readme():
    ranking = rank("digits", samples=200, **CPU)
    assert len(ranking) >= 6
    assert not ranking.failed
    assert all(name.startswith("demo:") for name in ranking)


def test_the_time_left_goes_by_what_the_backbones_cost(monkeypatch):
    from sfda_tune.pipelines import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    work = progress._Work()
    work.plan({"small": (10, 1.0), "large": (10, 9.0)})
    assert (work.backbones, work.left) == ("0 of 2 backbones", None)
    now[0] = 10.0
    work.advance("small", 10)
    assert (work.backbones, work.left) == ("1 of 2 backbones", pytest.approx(90.0))
    work.plan({"large": (10, 9.0)})  # the next stage of a race
    now[0] = 55.0
    work.advance("large", 5)
    assert work.left == pytest.approx(55 * (190 - 55) / 55)


def test_the_bar_counts_backbones(photos, toy_zoo):
    import io

    from rich.console import Console

    from sfda_tune.pipelines.progress import Bar

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bar = Bar(console)
    rank(photos, toy_zoo, cache=False, device="cpu", progress=bar)
    (task,) = bar.rich.tasks
    assert task.fields["through"] == "4 of 4 backbones"
    assert task.completed == task.total > 0


@pytest.mark.parametrize("command", ["rank", pytest.param("search", marks=pytest.mark.slow)])
def test_the_best_so_far_stand_below_the_bar_on_a_terminal(command, tmp_path, monkeypatch, capsys):
    """Not in a log, nor with --json."""
    import io

    from rich.console import Console

    from sfda_tune.cli import main as commands
    from sfda_tune.cli import rank as cli_rank
    from sfda_tune.cli import search as cli_search
    from sfda_tune.cli import terminal

    words = [command, "digits", "-b", "demo:*glyphs", "--samples", "60", "--device", "cpu"]
    if command == "search":
        words += ["--trials", "1", "--epochs", "1"]
    for k, (is_terminal, more) in enumerate([(True, []), (False, []), (True, ["--json"])]):
        drawn = Console(file=io.StringIO(), force_terminal=is_terminal, width=100)
        for module in (terminal, cli_rank, cli_search):
            monkeypatch.setattr(module, "messages", drawn)
        place = ["--cache", str(tmp_path / str(k)), "-o", str(tmp_path / f"{k}.json")]
        with pytest.raises(SystemExit, match="0"):
            commands.main([*words, *place, *more])
        shown = drawn.file.getvalue()
        assert ("best scores so far" in shown) is (is_terminal and not more)
        capsys.readouterr()


def test_leaders_are_those_that_have_seen_most_and_have_a_score():
    from sfda_tune.pipelines.progress import LEADERS, _Leaders

    leaders = _Leaders()
    leaders.add(Score("early", 0.99, n_samples=50))
    assert leaders.lines() == []
    for k in range(8):
        leaders.add(Score(f"[/b]{k}", k / 10, n_samples=100))
    leaders.add(Score("failed", error="no weights"))
    assert leaders.lines()[1:] == [f"    {k / 10:.4f}  [/b]{k}" for k in (7, 6, 5, 4, 3)]
    assert len(leaders.lines()) == 1 + LEADERS
