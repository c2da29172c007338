"""What a ranking will cost, told before it begins, against what it takes."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

from sfda_tune import Backbone, rank, resolve_backbones
from sfda_tune.cli.main import main
from sfda_tune.pipelines.bill import draw_up_bill

CPU: Any = {"device": "cpu"}


def test_what_is_kept_costs_nothing(photos, toy_zoo, tmp_path):
    cache = tmp_path / "cache"
    before = draw_up_bill(photos, toy_zoo, cache=cache, **CPU)
    assert (before.n_backbones, before.n_images) == (4, 36)
    assert (before.n_computed, before.n_kept) == (4 * 36, 0)
    assert before.to_download == {}
    assert before.failed == {}
    assert before.forward > 0
    assert before.decode > 0
    ranking = rank(photos, toy_zoo, cache=cache, workers=0, **CPU)
    assert before.disk == sum(4 * 36 * s.n_dims for s in ranking.scores)
    assert before.memory == 4 * max(s.details["n_params"] for s in ranking.scores)
    after = draw_up_bill(photos, toy_zoo, cache=cache, **CPU)
    assert (after.n_computed, after.n_kept) == (0, 4 * 36)
    assert after.forward == after.decode == after.disk == 0
    some = draw_up_bill(photos, toy_zoo, cache=cache, samples=9, **CPU)
    assert (some.n_computed, some.n_kept) == (0, 4 * 9)


def test_a_larger_network_is_dearer_and_what_fails_is_named(photos, toy_zoo, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"architecture": "no_such_net"}))
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"")
    names = ["resnet10t.c3_in1k", "resnet18.a1_in1k", str(tmp_path / "broken")]
    bill = draw_up_bill(photos, names, samples=9, cache=False, **CPU)
    assert list(bill.to_download) == names[:2]  # nothing is fetched for a bill
    assert 60e6 < bill.download < 70e6  # 4.9 and 11.2 million parameters
    assert list(bill.failed) == ["broken"]
    assert "no_such_net" in bill.failed["broken"]
    assert "to download beside the forward passes: the weights of 2, about 6" in str(bill)
    assert list(bill.estimated) == names[:2]  # there is no hub
    small = draw_up_bill(photos, names[:1], samples=9, cache=False, **CPU)
    assert bill.memory > small.memory
    own = Backbone("mine", load=resolve_backbones(str(toy_zoo / "vit"))[0].load or _load)
    mine = draw_up_bill(photos, [own], samples=9, cache=False, **CPU)
    assert mine.to_download == {}
    assert np.isfinite(mine.forward)


def _load():
    import torch

    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return (
        net,
        lambda image: torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255.0,
    )


def test_the_command_line_tells_and_does_nothing(photos, toy_zoo, tmp_path, capsys, cache):
    arguments = ["rank", str(photos), "-b", str(toy_zoo), "--device", "cpu", "--dry-run"]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    out = capsys.readouterr().out
    assert out.startswith("4 backbones, 36 images: 144 forward passes, 0 more are kept")
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "nonsense"}, "`budget` must be a time"),
        ({"budget": 0}, "`budget` must be a time"),
        ({"seed": -1}, "`seed` must be an integer"),
        ({"seed": 2**32, "samples": 8}, "`seed` must be an integer"),
        ({"map_fn": 3}, "`map_fn` must be a function"),
        ({"metric": "nosuch"}, "`metric` must be a sum of some of"),
        ({"metric": "sfda", "variant": "foo"}, "`variant` must be one of"),
        ({"train": "foo"}, "`train` must be one of"),
        ({"ensemble": 99}, "`ensemble` must be an integer in 1 … 4"),
        ({"top": 3}, "`top` is for a race"),
        ({"top": 0, "race": True}, "`top` must be an integer ≥ 1"),
        ({"threads": -3}, "`threads` must be an integer"),
        ({"batch_size": -1}, "`batch_size` must be an integer"),
        ({"workers": -2}, "`workers` must be an integer"),
        ({"max_unreadable": 7}, "`max_unreadable` must lie in"),
        ({"metric": "transrate", "race": True}, "`race` needs a metric that is a mean"),
    ],
)
def test_what_rank_refuses_has_no_bill(toy_zoo, options, message):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    for call in rank, draw_up_bill:
        with pytest.raises(ValueError, match=message):
            call((images, list("aabbcc")), toy_zoo, **CPU, **options)


def test_classes_of_one_image_have_no_bill(toy_zoo):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="a class of two different images, but all 4"):
        draw_up_bill((images, list("abcd")), toy_zoo, **CPU)


def test_copies_are_not_billed(photos, toy_zoo, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    for file in sorted((tmp_path / "photos").rglob("*.jpg"))[:5]:
        shutil.copy(file, file.with_name(f"copy of {file.name}"))
    bill = draw_up_bill(tmp_path / "photos", toy_zoo, cache=False, **CPU)
    assert (bill.n_images, bill.n_copies, bill.n_computed) == (36, 5, 4 * 36)
    assert "36 images (and 5 copies, left out): 144 forward passes" in str(bill)


def test_a_bill_says_that_it_is_without_budget_and_race(photos, toy_zoo):
    bill = draw_up_bill(photos, toy_zoo, budget="10m", race=True, cache=False, **CPU)
    assert bill.n_computed == 4 * 36
    assert "figures without --budget and --race: of all backbones on all" in str(bill)
    assert "without" not in str(draw_up_bill(photos, toy_zoo, cache=False, **CPU))
