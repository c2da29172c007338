"""Weights from a hub that is there, slow, in trouble, or gone."""

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from hub_lab import Hub, connect, connect_xet

from sfda_tune import rank, resolve_backbones, search
from sfda_tune.backbones import weights
from sfda_tune.backbones.fingerprints import fingerprint
from sfda_tune.backbones.loading import BackboneError, load
from sfda_tune.backbones.weights import find_cached, look_up_sizes
from sfda_tune.cli.main import main
from sfda_tune.data.hub import forget_reachable
from sfda_tune.extraction import fetching
from sfda_tune.extraction.fetching import Fetcher, sweep
from sfda_tune.pipelines.bill import draw_up_bill
from sfda_tune.pipelines.progress import NullProgress
from sfda_tune.report.html import write_report

CPU = {"device": "cpu", "workers": 0}
FILE = "model.safetensors"


@pytest.fixture
def waits(monkeypatch):
    """Have the hub's client, and what calls it, wait a hundredth of the seconds; note them."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    waited = []

    def sleep(seconds):
        waited.append(seconds)
        time.sleep(seconds / 100)

    for module in (file_download, _http, weights):
        monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": sleep}))
    return waited


@pytest.fixture
def hub(tmp_path, monkeypatch, toy_zoo, waits):
    """A hub with the toy zoo, of which nothing is here."""
    with Hub() as served:
        for folder in sorted(toy_zoo.iterdir()):
            served.publish(f"toy/{folder.name}", {f.name: f for f in folder.iterdir()})
        connect(served, tmp_path / "hub", monkeypatch)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        yield served
    forget_reachable()


def specs(hub):
    return [f"hf-hub:{repo}" for repo in sorted(hub.repos)]


def one(name):
    return resolve_backbones(f"hf-hub:toy/{name}")[0]


def scores(ranking):
    return {s.backbone.rpartition("/")[2]: s.value for s in ranking.scores}


class Heard(NullProgress):
    def __init__(self):
        self.told = {}

    def fetch(self, backbone, done, total):
        self.told.setdefault(backbone, []).append((done, total))


def test_a_ranking_over_a_hub_is_that_of_the_folders(hub, toy_zoo, photos, monkeypatch, tmp_path):
    local = rank(photos, toy_zoo, metric="sfda", cache=False, **CPU)
    heard = Heard()
    before = threading.active_count()
    remote = rank(photos, specs(hub), metric="sfda", progress=heard, **CPU)
    served = [t for t in threading.enumerate() if "process_request_thread" in t.name]
    assert threading.active_count() - len(served) <= before
    assert scores(remote) == scores(local)
    for repo in hub.repos:  # each came once, and told of itself to its end
        (size,) = {total for _, total in heard.told[f"hf-hub:{repo}"]}
        assert heard.told[f"hf-hub:{repo}"][-1] == (size, size)
        assert hub.sent[repo] - size < 5000  # and config.json
    asked = len(hub.requests)
    again = rank(photos, specs(hub), metric="sfda", cache=tmp_path / "new", **CPU)
    assert scores(again) == scores(local)
    assert len(hub.requests) == asked  # what is here needs no hub
    hub.down = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = rank(photos, specs(hub), metric="sfda", cache=False, **CPU)
    assert scores(offline) == scores(local)


CARDS = {
    "vit": ("cc-by-nc-4.0", b"---\nlicense: cc-by-nc-4.0\n---\n# A card\n"),
    "resnet": ("mine-1.0", b"---\nlicense: other\nlicense_name: mine-1.0\n---\n"),
    "convnext": (None, b"---\nlicense: [unclosed\n---\n"),
    "efficientnet": (None, None),
}


def test_licences_come_from_the_cards_with_the_weights(
    hub, toy_zoo, photos, tmp_path, monkeypatch
):
    for name, (_, card) in CARDS.items():
        files = {f.name: f for f in (toy_zoo / name).iterdir()}
        hub.publish(f"toy/{name}", files if card is None else {**files, "README.md": card})
    expected = {name: license_ for name, (license_, _) in CARDS.items()}

    def licenses():
        ranking = rank(photos, specs(hub), metric="sfda", cache=tmp_path / "features", **CPU)
        ranking.to_json(tmp_path / "r.json")
        return {s.backbone.rpartition("/")[2]: s.details.get("license") for s in ranking.scores}

    assert licenses() == expected
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.down, n = True, len(hub.requests)
    assert licenses() == expected  # of the cards that are here
    bill = draw_up_bill(photos, specs(hub), cache=tmp_path / "features")
    assert bill.licenses == {f"hf-hub:toy/{k}": v or "unknown" for k, v in expected.items()}
    assert "licences of the weights: " in str(bill)
    assert len(hub.requests) == n
    page = write_report(tmp_path / "r.json").read_text()
    for name in ("mine-1.0", "cc-by-nc-4.0", "unknown"):
        assert f"<option>{name}</option>" in page


def test_a_bill_asks_the_hub_for_licences(hub, toy_zoo, photos):
    files = {f.name: f for f in (toy_zoo / "vit").iterdir()}
    hub.publish("toy/vit", {**files, "README.md": CARDS["vit"][1]})
    bill = draw_up_bill(photos, specs(hub), cache=False)
    assert bill.licenses["hf-hub:toy/vit"] == "cc-by-nc-4.0"
    assert bill.licenses["hf-hub:toy/resnet"] == "unknown"
    assert not any("README" in path for _, path in hub.requests)  # nothing was fetched


@pytest.mark.parametrize(
    "trouble",
    [
        ("status", 503),
        ("status", 429, {"Retry-After": "7"}),
        ("body", 500),
        ("body", 429, {"Retry-After": "7"}),
        ("cut", 50_000),
        ("reset", 50_000),
        ("wrong",),
    ],
    ids=lambda t: " ".join(map(str, t[:2])),
)
def test_a_trouble_passes(hub, trouble, toy_zoo, waits):
    hub.trouble["toy/vit", FILE] += [trouble, trouble]
    module, _ = load(one("vit"))
    expected, _ = load(resolve_backbones(toy_zoo / "vit")[0])
    for mine, its in zip(module.parameters(), expected.parameters(), strict=True):
        assert mine.equal(its)
    assert not hub.trouble["toy/vit", FILE]  # it was met
    assert max(waits) >= (7 if trouble[1:2] == (429,) else 1)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ([("status", 503)] * 30, "the hub answers 503 to the request for hf-hub:toy/vit: also"),
        ([("body", 502)] * 30, "the hub answers 502 to the request for hf-hub:toy/vit: also"),
        ([("wrong",)] * 30, "it came damaged: its checksum is"),
        ("gated", "hf-hub:toy/vit is gated on the hub: ask for access"),
        ("absent", "hf-hub:toy/vit"),
    ],
)
def test_who_fails_is_named_and_last_and_the_others_are_ranked(
    hub, toy_zoo, photos, trouble, said
):
    if trouble == "gated":
        hub.gated.add("toy/vit")
    elif trouble == "absent":
        everything = list(hub.repos["toy/vit"].values())[-1]
        hub.publish("toy/vit", {"config.json": everything["config.json"]})
    else:
        hub.trouble["toy/vit", FILE] += trouble
    ranking = rank(photos, specs(hub), metric="sfda", **CPU)
    assert list(ranking.failed) == ["hf-hub:toy/vit"]
    assert list(ranking)[-1] == "hf-hub:toy/vit"
    assert said in ranking.failed["hf-hub:toy/vit"]
    local = scores(rank(photos, toy_zoo, metric="sfda", cache=False, **CPU))
    assert {n: v for n, v in scores(ranking).items() if n != "vit"} == {
        n: v for n, v in local.items() if n != "vit"
    }
    assert find_cached("hf-hub:toy/vit") is None  # nor is anything damaged left behind
    hub.gated.clear()
    if trouble != "absent":
        hub.trouble.clear()
        again = rank(photos, specs(hub), metric="sfda", **CPU)
        assert scores(again) == local


def test_one_that_trickles_waits_for_nobody_else_and_is_given_up(
    hub, photos, monkeypatch, toy_zoo
):
    monkeypatch.setenv("SFDA_TUNE_PATIENCE", "0.1")
    hub.trouble["toy/convnext", FILE] += [("trickle", 10, 0.05)]  # an hour
    began = time.monotonic()
    ranking = rank(photos, specs(hub), metric="sfda", cache=False, **CPU)
    assert time.monotonic() - began < 20
    assert list(ranking.failed) == ["hf-hub:toy/convnext"]
    assert "nothing of its weights came for 1 s" in ranking.failed["hf-hub:toy/convnext"]


def test_a_hub_that_goes_leaves_what_is_here(hub, photos):
    rank(photos, specs(hub)[:2], metric="sfda", **CPU)
    hub.down = True
    began = time.monotonic()
    ranking = rank(photos, specs(hub), metric="sfda", cache=False, **CPU)
    assert time.monotonic() - began < 20
    assert list(ranking.failed) == specs(hub)[2:]
    assert "the hub cannot be reached" in ranking.failed[specs(hub)[2]]


def test_what_is_here_is_opened_though_the_hub_has_a_newer_one(hub, toy_zoo, make_checkpoint,
                                                               tmp_path):  # fmt: skip
    before = load(one("resnet"))[0].state_dict()
    key = fingerprint(one("resnet"))
    newer = make_checkpoint(tmp_path / "newer", "test_resnet", seed=1)
    hub.publish("toy/resnet", {f.name: f for f in newer.iterdir()})
    module = load(one("resnet"))[0]
    assert fingerprint(one("resnet")) == key
    for name, tensor in module.state_dict().items():
        assert tensor.equal(before[name])
    assert module.pretrained_cfg["hf_hub_id"] == "toy/resnet"


def test_weights_take_no_more_disk_than_they_may_and_none_in_the_end(
    hub, photos, tmp_path, toy_zoo
):
    def lying():
        return sum(p.stat().st_size for p in tmp_path.joinpath("hub").rglob("blobs/*"))

    class Watch(Heard):
        def fetch(self, backbone, done, total):
            super().fetch(backbone, done, total)
            most.append(lying())

        def advance(self, backbone, n_images):
            most.append(lying())

    most = []
    mine = "hf-hub:toy/convnext"
    load(resolve_backbones(mine)[0])
    sizes = look_up_sizes(specs(hub))
    before, limit = lying(), max(sizes.values()) + 1000
    assert sum(sizes.values()) - sizes[mine] > limit  # not all fit
    ranking = rank(photos, specs(hub), metric="sfda", progress=Watch(), weights_disk=limit, **CPU)
    assert scores(ranking) == scores(rank(photos, toy_zoo, metric="sfda", cache=False, **CPU))
    assert max(most) <= before + limit + 20_000  # with config.json
    assert find_cached(mine) is not None
    assert [find_cached(spec) is None for spec in specs(hub)].count(True) == len(specs(hub)) - 1
    asked, sent = len(hub.requests), dict(hub.sent)
    again = rank(photos, specs(hub), metric="sfda", weights_disk=limit, **CPU)
    assert scores(again) == scores(ranking)  # features are kept, though weights are not
    assert (len(hub.requests), dict(hub.sent)) == (asked, sent)
    bill = draw_up_bill(photos, specs(hub), device="cpu")
    assert (bill.n_computed, bill.to_download) == (0, {})
    few = rank(photos, specs(hub), metric="sfda", cache=False, weights_disk=1000, **CPU)
    assert set(few.failed) == set(specs(hub)) - {mine}
    assert "`weights_disk` allows 0.0 MB" in few.failed[specs(hub)[-1]]


@pytest.mark.parametrize("xet", [False, True])
def test_a_hub_that_tells_no_sizes_before_bounds_the_disk_when_the_download_begins(
    hub, photos, tmp_path, monkeypatch, xet
):
    """A mirror may have no API; what a download says of itself is all there is."""
    if xet:
        connect_xet(hub, monkeypatch)
    sizes, most = look_up_sizes(specs(hub)), []

    def watch(name, done, total):
        taken = [p for p in tmp_path.joinpath("hub").rglob("blobs/*") if p.is_file()]
        most.append(sum({p.resolve(): p.stat().st_size for p in taken}.values()))

    for repo in hub.repos:
        hub.trouble[repo, ""] += [("status", 503)] * 100
    hub.rate = 2e6  # so that what is under way is not the whole
    failed = rank(photos, specs(hub), metric="sfda", weights_disk=1000, **CPU).failed
    assert set(failed) == set(specs(hub))
    assert all("`weights_disk` allows 0.0 MB" in why for why in failed.values())
    assert sum(hub.sent.values()) < sum(sizes.values()) / 2
    hub.rate = None
    limit = max(sizes.values()) + 1000
    assert sum(sizes.values()) > limit
    with Fetcher(limit, tell=watch) as fetcher:
        for backbone in resolve_backbones(specs(hub)):
            with fetcher.opening(backbone) as came:
                assert came
            fetcher.want(resolve_backbones(specs(hub)))
    assert max(most) <= limit + 20_000
    assert not np.any([find_cached(spec) for spec in specs(hub)])
    how = {"keep": 4, "device": "cpu", "decoders": 0, "weights_disk": limit}
    with pytest.raises(ValueError, match=r"`weights_disk` allows .* to be tuned, of hf-hub:toy/"):
        search(photos, specs(hub), out=tmp_path / "run", **how)


def test_weights_that_come_by_xet_are_checked_and_removed_unless_others_share_them(
    hub, photos, tmp_path, monkeypatch, toy_zoo
):
    """The client keeps one file of each content, to which all repositories with it have links."""
    store = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    connect_xet(hub, monkeypatch)
    hub.publish("other/vit", next(iter(hub.repos["toy/vit"].values())))
    before = one("vit")
    load(before)  # here before
    assert store.shared_store_blob_paths(tmp_path / "hub")  # by Xet, indeed
    how = {"metric": "sfda", "weights_disk": "3MB", **CPU}
    ranking = rank(photos, [s for s in specs(hub) if s != before.spec], **how)
    assert ranking.failed == {}
    local = rank(photos, toy_zoo, metric="sfda", cache=False, **CPU)
    assert scores(ranking) == scores(local)
    here = [spec for spec in specs(hub) if find_cached(spec) is not None]
    assert here == [before.spec]
    load(before)
    large = [p for p in tmp_path.joinpath("hub").rglob("*") if p.stat().st_size > 20_000]
    assert len([p for p in large if p.is_file() and not p.is_symlink()]) == 1
    hub.trouble["toy/resnet", FILE] += [("wrong",)] * 30
    failed = rank(photos, one("resnet"), cache=False, **how).failed
    assert "it came damaged" in failed["hf-hub:toy/resnet"]


def test_weights_that_another_process_opens_are_not_removed(hub, caplog, tmp_path):
    """Two fetchers, as in two actors on one machine: a lock knows no processes, only files."""
    backbone, ledger = one("vit"), tmp_path / "ledger"
    with Fetcher(10**9, ledger=ledger) as first, first.opening(backbone) as came:
        assert came
    assert find_cached(backbone.spec) is None
    with Fetcher(10**9) as second:
        with Fetcher(10**9, ledger=ledger) as first:
            first.expect([backbone])
            while not first.is_ready(backbone.name):
                time.sleep(0.01)
            opened = second.opening(backbone)
            assert opened.__enter__() is False  # it is here already
        assert find_cached(backbone.spec) is not None
        assert "another process is opening it" in caplog.text
        load(backbone)
        opened.__exit__(None, None, None)
    ledger.write_text(f"{find_cached(backbone.spec)}\n{tmp_path}/gone\n")
    assert sweep([ledger]) == []
    assert find_cached(backbone.spec) is None
    assert not ledger.exists()


def test_what_nobody_expects_any_more_makes_room(hub):
    with Fetcher() as fetcher:
        fetcher.expect([one("vit"), one("resnet"), one("convnext"), one("efficientnet")])
        while not all(find_cached(f"hf-hub:{repo}") for repo in hub.repos):
            time.sleep(0.01)
        newest = next(iter(hub.repos["toy/vit"].values()))
        hub.publish("toy/fifth", newest)
        fetcher.expect([one("fifth")])  # else four were ahead, and nothing more would come
        with fetcher.opening(one("fifth")) as came:
            assert came


def parts(cache):
    return list(cache.rglob("*.incomplete"))


@pytest.mark.slow  # an interpreter starts, and ends as a user's does
def test_a_process_that_ends_leaves_no_half_of_a_download(hub, tmp_path, clean_environment):
    hub.trouble["toy/vit", FILE] += [("trickle", 100, 0.05)]
    environment = clean_environment | {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    code = "import time; from sfda_tune import resolve_backbones as r\n"
    code += "from sfda_tune.extraction.fetching import Fetcher\n"
    code += "with Fetcher() as fetcher:\n    fetcher.want(r('hf-hub:toy/vit'))\n"
    code += "    input()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, text=True
    )
    while not parts(tmp_path / "hub"):
        time.sleep(0.02)
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert parts(tmp_path / "hub") == []


def test_halves_that_killed_processes_left_are_told_and_deleted(
    hub, photos, tmp_path, capsys, clean_environment
):
    load(one("vit"))
    blobs = tmp_path / "hub" / "models--toy--vit" / "blobs"
    (whole,) = [p for p in blobs.iterdir() if p.stat().st_size > 10_000]
    left, living = (blobs / f"{whole.name}.{c * 8}.incomplete" for c in "ab")
    left.write_bytes(bytes(3_000_000))

    def told(*arguments):
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, "--cache", str(tmp_path / "features")])
        return capsys.readouterr().out

    assert re.search(r"1 cut downloads, 3\.0 MB", told("cache", "show"))
    shown = json.loads(told("cache", "show", "--json"))
    assert shown["cut_downloads"] == {"folder": str(tmp_path / "hub"), "files": 1,
                                      "bytes": 3_000_000}  # fmt: skip
    assert "1 cut downloads, 3.0 MB" in told("doctor")
    told("cache", "clear", "--older-than", "1")
    assert left.exists()
    assert "1 cut downloads, 3.0 MB" in told("cache", "clear")
    assert parts(blobs) == []
    locks = tmp_path / "hub" / ".locks" / "models--toy--vit"
    living.write_bytes(bytes(1000))
    with FileLock(locks / f"{whole.name}.lock"):  # as the client does while it downloads
        told("cache", "clear")
        assert parts(blobs) == [living]
    # of what a run with a limit fetches nothing is left, whoever was killed before
    weights.remove(find_cached("hf-hub:toy/vit"))
    ranking = rank(photos, one("vit"), metric="sfda", cache=False, weights_disk="3MB", **CPU)
    assert ranking.failed == {}
    assert parts(blobs) == []


@pytest.mark.slow  # a Ray starts
def test_actors_fetch_within_the_disk_and_leave_nothing(hub, photos, tmp_path, clean_environment):
    pytest.importorskip("ray")
    largest = max(look_up_sizes(specs(hub)).values())
    cache = tmp_path / "hub"
    environment = clean_environment | {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "sfda_tune", "rank", photos, "-b", *specs(hub), "--ray", "local",
        "--metric", "sfda", "--budget", "10m", "--json", "--cache", tmp_path / "features",
        "--weights-disk", f"{2 * largest + 4000}", "--quiet",
    ]  # fmt: skip
    told = subprocess.run(
        list(map(str, command)), env=environment, text=True, timeout=300, check=False,
        capture_output=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    ranking = json.loads(told.stdout)
    assert ranking["failed"] == {}
    assert len(ranking["backbones"]) == len(hub.repos)
    assert sum(hub.sent.values()) > 0
    assert not [p for p in cache.rglob("*") if p.is_file() and p.stat().st_size > 5000]
    assert not list(cache.glob(".sfda-tune-*"))


@pytest.mark.parametrize("limit", [None, 10**6])
def test_what_is_needed_now_comes_before_what_is_ahead(hub, limit, monkeypatch):
    """Else what was fetched too early would take its place, and all would wait for ever."""
    if limit is None:
        monkeypatch.setattr(fetching, "AHEAD", 1)
    else:
        limit = max(look_up_sizes(specs(hub)).values())  # each alone
    with Fetcher(limit) as fetcher:
        fetcher.expect([one("resnet")])
        while not fetcher.is_ready("hf-hub:toy/resnet"):
            time.sleep(0.01)
        fetcher.expect([one("vit"), one("resnet")])  # the second one is ahead of its time
        with fetcher.opening(one("vit")) as came:
            assert came
        with fetcher.opening(one("resnet")):
            assert find_cached("hf-hub:toy/resnet") is not None


def test_another_image_needs_the_same_weights_again(hub, photos, tmp_path):
    first = rank(photos, specs(hub), metric="sfda", samples=20, weights_disk="2MB", **CPU)
    newest = next(iter(hub.repos["toy/resnet"].values()))
    hub.publish("toy/resnet", {**newest, "more": b"more"})  # another commit
    ranking = rank(photos, specs(hub), metric="sfda", weights_disk="2MB", **CPU)
    assert (first.failed, ranking.failed) == ({}, {})
    whole = rank(photos, specs(hub), metric="sfda", cache=False, **CPU)
    assert scores(ranking) == pytest.approx(scores(whole), abs=1e-6)


def test_the_bill_has_the_sizes_of_the_hub(hub, photos, monkeypatch):
    sizes = {
        f"hf-hub:{repo}": list(commits.values())[-1][FILE].size
        for repo, commits in hub.repos.items()
    }
    bill = draw_up_bill(photos, specs(hub), device="cpu")
    assert dict(bill.to_download) == sizes
    assert (bill.download, bill.estimated) == (sum(sizes.values()), ())
    sent = sum(hub.sent.values())
    load(one("vit"))
    bill = draw_up_bill(photos, specs(hub), device="cpu", weights_disk=min(sizes.values()))
    assert bill.download == sum(sizes.values()) - sizes["hf-hub:toy/vit"]
    assert "at a time, removed in the end" in str(bill)
    assert "so that they will fail" in str(bill)
    assert sum(hub.sent.values()) - sent < sizes["hf-hub:toy/vit"] + 5000
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = draw_up_bill(photos, specs(hub), device="cpu")
    assert list(offline.estimated) == list(offline.to_download)
    assert offline.download == pytest.approx(bill.download, rel=0.2)
    assert "the hub does not tell the size of 3" in str(offline)


def test_a_budget_ends_while_weights_are_awaited(hub, photos):
    for name in ("convnext", "vit"):
        hub.trouble[f"toy/{name}", FILE] += [("trickle", 10, 0.05)]
    began = time.monotonic()
    ranking = rank(photos, specs(hub), cache=False, budget=4, **CPU)
    assert time.monotonic() - began < 12
    assert {"hf-hub:toy/convnext", "hf-hub:toy/vit"} <= set(ranking.info["not_looked_at"])


def test_a_search_over_a_hub(hub, photos, tmp_path, monkeypatch):
    hub.gated.add("toy/convnext")
    hub.trouble["toy/vit", FILE] += [("body", 503)]
    how = {"trials": 1, "epochs": 1, "keep": 1, "device": "cpu", "decoders": 0}
    found = search(photos, [specs(hub)[0], specs(hub)[-1]], out=tmp_path / "run", **how)
    assert found.best["backbone"] == "hf-hub:toy/vit"
    assert (
        "gated on the hub"
        in json.loads((tmp_path / "run/search.json").read_text())["excluded"][
            "hf-hub:toy/convnext"
        ]
    )
    hub.down = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = search(photos, [specs(hub)[-1]], out=tmp_path / "again", **how)
    assert again.best["backbone"] == "hf-hub:toy/vit"


def test_a_search_keeps_to_the_disk_for_weights(hub, photos, tmp_path):
    sizes, how = look_up_sizes(specs(hub)), {"keep": 4, "device": "cpu", "decoders": 0}
    how |= {"trials": 2, "epochs": 1, "out": tmp_path / "run"}
    mine = specs(hub)[1]
    load(resolve_backbones(mine)[0])
    with pytest.raises(ValueError, match=r"`weights_disk` allows .* to be tuned, of hf-hub:toy/"):
        search(photos, specs(hub), weights_disk=max(sizes.values()), **how)
    here = [spec for spec in sizes if find_cached(spec) is not None]
    assert here == [mine]  # what was ranked is not
    disk = sum(sizes.values())
    with pytest.raises(ValueError, match="`weights_disk` bounds the disk of this machine"):
        search(photos, specs(hub), weights_disk=disk, engine="ray", **how)
    found = search(photos, specs(hub), weights_disk=disk, **how)
    assert len(found.trials) == 2
    assert "fetched" not in found.summary
    assert [spec for spec in sizes if find_cached(spec) is not None] == [mine]
    with pytest.raises(ValueError, match="`weights_disk` must be a size"):
        search(photos, specs(hub), weights_disk="much", **how)


def test_names_of_timm_and_old_formats(hub, monkeypatch, make_checkpoint, tmp_path):
    import timm
    import torch
    from safetensors.torch import load_file

    name = "test_resnet.r160_in1k"
    folder = make_checkpoint(tmp_path / "x", "test_resnet", num_classes=1000)
    torch.save(load_file(folder / FILE), tmp_path / "pytorch_model.bin")
    repo = timm.get_pretrained_cfg(name).hf_hub_id
    hub.publish(repo, {"pytorch_model.bin": tmp_path / "pytorch_model.bin"})
    (backbone,) = resolve_backbones(name)
    module, _ = load(backbone)
    its = load_file(folder / FILE)
    assert all(tensor.equal(its[key]) for key, tensor in module.state_dict().items())
    assert find_cached(name) is not None
    assert fingerprint(backbone) == fingerprint(backbone, module) is not None


@pytest.fixture
def addresses(tmp_path, monkeypatch, make_checkpoint):
    """Give networks of timm another place for their weights: an address, or none on the hub.

    Returns a function that does so, and lays the file into torch's cache.
    """
    import torch
    from safetensors.torch import load_file
    from timm.models import _registry

    folder = make_checkpoint(tmp_path / "old", "test_resnet", seed=1, num_classes=1000)
    file = Path(torch.hub.get_dir(), "checkpoints", "old.pth")

    def give(name, **more):
        known = _registry._model_pretrained_cfgs
        changed = replace(known[name], url="http://127.0.0.1:9/old.pth", **more)
        monkeypatch.setitem(known, name, changed)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(load_file(folder / FILE), file)
        return file

    return give


def test_old_weights_of_torch_s_cache_are_not_those_of_the_hub(
    hub, photos, monkeypatch, make_checkpoint, tmp_path, addresses
):
    import timm

    name = "test_resnet.r160_in1k"
    folder = make_checkpoint(tmp_path / "x", "test_resnet", num_classes=1000)
    hub.publish(timm.get_pretrained_cfg(name).hf_hub_id, {FILE: folder / FILE})
    old = addresses(name)
    assert find_cached(name) is None
    assert list(draw_up_bill(photos, name, device="cpu").to_download) == [name]
    few = rank(photos, name, metric="sfda", weights_disk=1000, **CPU)
    assert "`weights_disk` allows 0.0 MB" in few.failed[name]
    (backbone,) = resolve_backbones(name)
    module, _ = load(backbone)
    assert fingerprint(backbone) == fingerprint(backbone, module)
    assert find_cached(name) != str(old)
    weights.remove(find_cached(name))
    monkeypatch.setattr("timm.models._builder._USE_OLD_CACHE", True)  # TIMM_USE_OLD_CACHE=1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_cached(name) == str(old)
    module, _ = load(backbone)
    assert fingerprint(backbone) == fingerprint(backbone, module)


def test_weights_that_timm_fetches_by_an_address_are_refused_where_the_disk_is_bounded(
    hub, photos, addresses, tmp_path
):
    name = "test_resnet.r160_in1k"
    file = addresses(name, hf_hub_id=None)
    assert find_cached(name) == str(file)
    assert rank(photos, name, metric="sfda", weights_disk="1GB", cache=False, **CPU).failed == {}
    how = {"keep": 1, "trials": 1, "device": "cpu", "decoders": 0, "weights_disk": "1GB"}
    rank(photos, name, **CPU)
    file.unlink()
    failed = rank(photos, name, metric="sfda", weights_disk="1GB", cache=False, **CPU).failed
    assert "which `weights_disk` cannot bound" in failed[name]
    with pytest.raises(ValueError, match="which `weights_disk` cannot bound"):
        search(photos, [name], out=tmp_path / "run", **how)
    assert not file.exists()


def test_damaged_weights_in_the_cache_are_fetched_again(hub, photos, toy_zoo, monkeypatch, caplog):
    whole = rank(photos, specs(hub), metric="sfda", cache=False, **CPU)
    file = Path(find_cached("hf-hub:toy/vit"))
    content = file.read_bytes()
    file.write_bytes(content[:-5000])  # through the link
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = rank(photos, specs(hub), metric="sfda", cache=False, **CPU)
    assert f"; if {file} or the config.json beside it is dam" in offline.failed["hf-hub:toy/vit"]
    assert file.exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    again = rank(photos, specs(hub), metric="sfda", cache=False, **CPU)
    assert scores(again) == scores(whole)
    assert file.read_bytes() == content
    assert "is damaged (its checksum is" in caplog.text
    file.write_bytes(content[:-5000])
    hub.trouble["toy/vit", FILE] += [("wrong",)] * 30
    failed = rank(photos, specs(hub), metric="sfda", cache=False, **CPU).failed
    assert "it came damaged" in failed["hf-hub:toy/vit"]


def test_the_command_line_over_a_hub(hub, photos, tmp_path, capsys, toy_zoo):
    names = [word for spec in specs(hub) for word in ("-b", spec)]
    hub.gated.add("toy/vit")
    arguments = ["rank", str(photos), *names, "--device", "cpu", "--decoders", "0",
                 "--weights-disk", "2MB"]  # fmt: skip
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--dry-run"])
    shown = capsys.readouterr().out
    assert re.search(r"the weights of 3, \d\.\d MB", shown), shown
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    shown = capsys.readouterr()
    assert "gated" in shown.out + shown.err
    assert re.search(r"weights of 3 backbones are to be downloaded, about \d\.\d MB", shown.err)
    assert [n for n in ("resnet", "convnext", "efficientnet") if n not in shown.out] == []
    assert not np.any([find_cached(spec) for spec in specs(hub)])


def test_a_password_in_the_address_of_the_hub_is_shown_nowhere(
    hub, photos, tmp_path, capsys, monkeypatch
):
    """On its way to a mirror or a proxy."""
    address = SimpleNamespace(url=hub.url.replace("//", "//anna:s3cretpw@"))
    connect(address, tmp_path / "hub", monkeypatch)
    hub.trouble["toy/vit", FILE] += [("status", 418)] * 9
    hub.trouble["toy/resnet", "config.json"] += [("status", 503)] * 99
    names = ["hf-hub:toy/vit", "hf-hub:toy/resnet"]
    told = []
    for arguments in (
        ["rank", photos, "-b", *names, "--json", "--device", "cpu", "--decoders", "0",
         "--log", tmp_path / "log", "--debug"],
        ["rank", "hf:toy/photos", "-b", "demo:*", "--debug"],
        ["backbones", *names],
        ["doctor"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(list(map(str, arguments)))
        told += capsys.readouterr()
    told.append((tmp_path / "log").read_text())
    assert [text for text in told if "s3cretpw" in text] == []
    assert "418" in told[0]
    assert "418" in told[-1]
    assert "//anna:***@" in told[0]
    assert "//anna:***@" in told[-3]  # doctor
    with pytest.raises(BackboneError, match="418") as caught:
        load(one("vit"))
    assert "s3cretpw" not in str(caught.value)


def test_backbones_are_listed_with_and_without_a_hub(hub, capsys, monkeypatch):
    arguments = ["backbones", *specs(hub), "test_convnext.*", "--sort", "params"]

    def shown():
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        return capsys.readouterr().out

    online = shown()
    assert [spec for spec in specs(hub) if spec not in online] == []
    hub.down = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert shown() == online


def test_errors_of_weights_disk(photos):
    with pytest.raises(ValueError, match="`weights_disk` must be a size such as 500MB or 20GB"):
        rank(photos, weights_disk="much")
    with pytest.raises(ValueError, match="`weights_disk` is for downloads of this process"):
        rank(photos, weights_disk="1GB", map_fn=map)
    with pytest.raises(BackboneError, match="cannot be reached"):
        load(resolve_backbones("resnet18.a1_in1k")[0])
