"""Damaged cache entries, strange RUN files, and what is no image or has no decent name."""

import json
import os
import random
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from chaos_lab import BACKBONES, essence, trials
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import sfda_tune
from sfda_tune.extraction.store import FeatureStore
from sfda_tune.values.text import printable

HERE = {"device": "cpu", "workers": 0}


def flip(rng, path):
    """Damage a file: some bits, or a piece of it."""
    content = bytearray(path.read_bytes())
    how = rng.choice(("bits", "bits", "bits", "cut", "zeros", "longer", "header"))
    start = rng.randrange(len(content) or 1)
    if how == "cut":
        del content[start:]
    elif how == "zeros":
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    elif how == "longer":
        content += rng.randbytes(rng.randint(1, 600))
    elif content:
        end = min(len(content), 400) if how == "header" else len(content)
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


# The cache --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def kept(photos, tmp_path_factory):
    cache = tmp_path_factory.mktemp("kept") / "cache"
    return cache, sfda_tune.rank(photos, BACKBONES, cache=cache, **HERE)


def is_same(a, b):
    return (
        np.array_equal(a.x, b.x) and np.array_equal(a.rows, b.rows)
        and a.unreadable == b.unreadable and a.info == b.info
    )  # fmt: skip


def look(store, path, photos):
    return store.get(path.parent.name, sfda_tune.open_dataset(photos).digests())


@trials(4)
def test_flipped_bits(seed, kept, photos, tmp_path, record_property):
    rng, cache = random.Random(seed), tmp_path / "cache"
    shutil.copytree(kept[0], cache)
    store = FeatureStore(cache)
    files = [path for path, _ in store.entries()]
    for k in range(50):
        path = rng.choice(files)
        whole, entry = path.read_bytes(), look(store, path, photos)
        assert len(entry.known) == 36
        flip(rng, path)
        found = look(store, path, photos)
        assert not len(found.known) or is_same(found, entry), f"flip {k}"
        store.summary()
        path.write_bytes(whole)
    for path in rng.sample(files, 2):
        flip(rng, path)
    assert essence(sfda_tune.rank(photos, BACKBONES, cache=cache, **HERE)) == essence(kept[1])
    record_property("inputs", 52)


STRANGE = [
    "[1]", "null", '{"forward_seconds": "x"}', '{"forward_seconds": NaN}', "[]", '{"0": 5}',
    '{"-1": "x"}', '{"x": "y"}', '{"99999999999999999999": "x"}', "[" * 100_000,
     "", "{", "\x1b[31m",
    '{"backbone": 3}', '{"n_params": 1e999}', '{"n_params": -1}', "1" * 5000,
]  # fmt: skip


def make_strange(rng, path):
    """Write another header, or other arrays, into an entry."""
    with safe_open(path, "np") as file:
        header = dict(file.metadata())
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if rng.random() < 0.7:
        header[rng.choice(sorted(header))] = rng.choice(STRANGE)
    else:
        name = "x"
        change = rng.choice(
            (
                lambda a: a[:-1], lambda a: a.astype("f8"), lambda a: a[None], lambda a: a[::-1],
                lambda a: a * 0, lambda a: a.ravel()[:1],
            )
        )  # fmt: skip
        arrays[name] = np.ascontiguousarray(change(arrays[name]))
        if rng.random() < 0.3:
            del arrays[name]
    save_file(arrays, path, header)


@trials(4)
def test_headers_of_entries(seed, kept, photos, tmp_path, record_property, cli):
    rng, cache = random.Random(seed), tmp_path / "cache"
    shutil.copytree(kept[0], cache)
    store = FeatureStore(cache)
    files = [path for path, _ in store.entries()]
    for k in range(20):
        path = rng.choice(files)
        whole, entry = path.read_bytes(), look(store, path, photos)
        make_strange(rng, path)
        found = look(store, path, photos)
        assert not len(found.known) or is_same(found, entry), f"header {k}"
        store.summary()
        path.write_bytes(whole)
    for path in files:
        make_strange(rng, path)
    assert cli("cache", "show", "--cache", cache)[0] == 0
    assert essence(sfda_tune.rank(photos, BACKBONES, cache=cache, **HERE)) == essence(kept[1])
    record_property("inputs", 20 + len(files))


# RUN --------------------------------------------------------------------------------------------
SEARCH = ["search", "digits", "--backbones", BACKBONES[0], "--trials", 1, "--epochs", 1]
SEARCH += ["--samples", 60, "--device", "cpu", "-q"]
WRONG = [
    None, True, -1, 0, 1.5, 10**400, float("nan"), float("inf"), "x", "", "\x1b[31mred\n", [], {},
    [1], {"x": 1}, [[[[]]]], [None], {"": None}, "\ud800", -(2**63), "../../x",
]  # fmt: skip
NO_JSON = ["", "{", "[" * 100_000, "null", "[]", "{}", "NaN", '"x"', "\xff\x00", "1" * 5000]


@pytest.fixture(scope="module")
def found(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("found")
    sfda_tune.search(
        "digits", BACKBONES[0], trials=1, epochs=1, samples=60, device="cpu",
        cache=folder / "cache", out=folder / "run",
    )  # fmt: skip
    return folder


def spoil(rng, path):
    """Make a JSON file another one."""
    if rng.random() < 0.25:
        text = rng.choice(
            ("", "{", "[" * 100_000, "null", "[]", "{}", "NaN", '"x"', "\xff\x00", "1" * 5000)
        )
        path.write_bytes(text.encode("latin-1"))
        return text[:20]
    tree = json.loads(path.read_text())
    node, where = tree, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        where.append(key)
        inner = node[key]
        if not (isinstance(inner, (dict, list)) and inner) or rng.random() < 0.4:
            break
        node = inner
    if rng.random() < 0.2:
        del node[key]
        new = "(gone)"
    else:
        node[key] = new = rng.choice(WRONG)
    path.write_text(json.dumps(tree))
    return f"{where} = {new!r}"[:200]


@trials(5)
def test_run_files(seed, found, photos, tmp_path, record_property, cli):
    rng, n = random.Random(seed), 4
    for k in range(n):
        run = tmp_path / f"run{k}"
        shutil.copytree(found / "run", run)
        names = ("config", "search", "search", "splits", "ranking", "seconds", "environment")
        files = [run / f"{name}.json" for name in names] + list(run.glob("trials/*/trial.json"))
        files += [*run.glob("model/*.json"), *run.glob("hardest/*.json")]
        path = rng.choice([file for file in files if file.is_file()])
        what = f"input {k}: {path.relative_to(run)}: {spoil(rng, path)}"
        doors = [
            ["report", run, "--out", tmp_path / "r.html"],
            ["predict", run, photos / "ant" / "00.jpg"],
            [*SEARCH, "--cache", found / "cache", "--out", run],
        ]
        for door in doors:
            try:
                cli(*door)
            except BaseException as error:
                raise AssertionError(f"{what}: {door[0]}") from error
    record_property("inputs", n)


# Images and names -------------------------------------------------------------------------------
def png_of_size(path, size):
    Image.new("L", (2, 2)).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = size.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def animate(path):
    frames = [Image.new("P", (20, 20), k) for k in range(5)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
READABLE = {
    "animated.gif": animate,
    "cmyk.jpg": lambda p: PHOTO.convert("CMYK").save(p),
    "deep.png": lambda p: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(p),
    "narrow.png": lambda p: PHOTO.resize((1, 300)).save(p),
    "flat.png": lambda p: PHOTO.resize((300, 1)).save(p),
    "alpha.png": lambda p: PHOTO.convert("RGBA").save(p),
    "one.bmp": lambda p: PHOTO.convert("1").save(p),
}


def save_cut(path):
    PHOTO.save(path)
    path.write_bytes(path.read_bytes()[:400])


UNREADABLE = {
    "cut.jpg": save_cut,
    "magic.png": lambda p: p.write_bytes(b"\x89PNX" + bytes(500)),
    "empty.jpg": lambda p: p.write_bytes(b""),
    "zeros.png": lambda p: p.write_bytes(bytes(4096)),
    "huge.png": lambda p: png_of_size(p, 60_000),
    "vast.png": lambda p: png_of_size(p, 2**31 - 1),
    "fifo.jpg": os.mkfifo,
    "loop.png": lambda p: p.symlink_to(p.name),
    "text.webp": lambda p: p.write_text("\x1b[31m<svg onload=alert(1)>"),
}
NAMES = [
    "[red]x[", "[bold]", "\x1b[31mred", "\x1b]0;title\x07", "two\nlines", "cr\rx", "caf\udce9",
    "a*b?[c]", "=1+1", "@x", "-rf", " x", "\u202ertl", "%s{0}{{", "~", "$HOME", "'\"", "a,b;c",
    "\\x", "\udcff\udcfe", "é" * 60, "\u200b", "x..", "#?&", "<script>", "\x7f", "\x9b31m",
]  # fmt: skip


def rank_here(cli, folder, data, *backbones):
    code, out, err = cli(
        "rank", data, "--backbones", *backbones, "--device", "cpu", "-q", "--decoders", 0,
        "--max-unreadable", 1, "--cache", folder / "cache", "--out", folder / "r.json",
    )  # fmt: skip
    assert code == 0, err
    return sfda_tune.Ranking.from_json(folder / "r.json"), out + err


@trials(4)
def test_images(seed, photos, tmp_path, record_property, cli):
    rng, data = random.Random(seed), tmp_path / "data"
    for name in ("ant", "bee"):
        shutil.copytree(photos / name, data / name)
    for name, make in (READABLE | UNREADABLE).items():
        make(data / rng.choice(("ant", "bee")) / name)
    sources = list(photos.glob("*/*.jpg"))
    for k in range(20):
        path = data / rng.choice(("ant", "bee")) / f"damaged{k}.jpg"
        if rng.random() < 0.5:
            shutil.copy(rng.choice(sources), path)
        else:
            PHOTO.save(path, rng.choice(("PNG", "GIF", "BMP", "TIFF", "WEBP")))
        flip(rng, path)
    ranking, said = rank_here(cli, tmp_path, data, BACKBONES[0])
    left_out = {Path(name).name for name in ranking.info["unreadable"]}
    assert left_out >= set(UNREADABLE)
    assert not left_out & set(READABLE)
    assert {name for name in left_out if name not in UNREADABLE} <= {
        f"damaged{k}.jpg" for k in range(20)
    }
    copies = ranking.info["copies"]  # a flipped bit need not change the pixels
    (total,) = re.findall(rf"{len(left_out)} of (\d+) images could not be read", said)
    n = 24 + len(READABLE) + len(UNREADABLE) + 20  # some copies are found before they are read
    assert n - len(copies) <= int(total) <= n
    assert all("damaged" in copy["image"] + copy["same_as"] for copy in copies)
    n = 24 + len(READABLE) + 20 + len(UNREADABLE) - len(left_out) - len(copies)
    assert ranking.info["n_samples"] == n
    record_property("inputs", len(READABLE) + len(UNREADABLE) + 20)


@trials(4)
def test_names(seed, photos, toy_zoo, tmp_path, record_property, cli):
    rng = random.Random(seed)
    root, *classes = rng.sample(NAMES, 4)
    data, n = tmp_path / rng.choice(("data", "[", "[/x]")) / root, 0
    for k, name in enumerate(classes):
        (data / name).mkdir(parents=True)
        sources = sorted(photos.glob("*/*.jpg"))[12 * k : 12 * k + 12]
        for source, new in zip(sources, rng.sample(NAMES, 12), strict=True):
            shutil.copy(source, data / name / f"{new}.jpg")
            n += 1
        (data / name / f"{rng.choice(NAMES)}.png").write_bytes(b"\x1b[31m")
    backbone = tmp_path / "zoo" / rng.choice(NAMES)
    shutil.copytree(toy_zoo / "resnet", backbone)
    ranking, said = rank_here(cli, tmp_path, data, backbone, BACKBONES[0])
    assert not ranking.failed
    assert set(ranking.info["classes"]) == {printable(name.strip()) for name in classes}
    assert ranking.info["n_samples"] == n
    assert len(ranking.info["unreadable"]) == 3
    assert "3 of 39 images" in said
    code, *_ = cli("report", tmp_path / "r.json", "--out", tmp_path / "r.html")
    assert code == 0
    assert "\x1b" not in (tmp_path / "r.html").read_text()
    record_property("inputs", n + 8)
