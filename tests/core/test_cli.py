import json
import os
import pty
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from termios import TIOCSWINSZ

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError

import sfda_tune
from sfda_tune import Ranking, __version__
from sfda_tune.cli import main as commands
from sfda_tune.cli import reports, terminal
from sfda_tune.cli.options import spread_lists
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.values import ranking as values_ranking

COMMAND = [sys.executable, "-m", "sfda_tune"]


@pytest.fixture
def cli(clean_environment):
    def run(*arguments, code=0, **kwargs):
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=120,
            env=clean_environment, stdin=subprocess.DEVNULL, **kwargs,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


@pytest.fixture
def cli_here(clean_environment, monkeypatch, capfd):
    """The same in this process: imports are most of what a short command takes."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` sets both
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments, code=0, both=False):
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)  # they are shown, as to a user
            with pytest.raises(SystemExit) as done:
                commands.main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert done.value.code == code, out + err
        if both:
            return out, err
        return out if code == 0 else err

    monkeypatch.setattr(terminal, "output", Console(width=200, no_color=True))
    monkeypatch.setattr(terminal, "messages", Console(stderr=True, width=200, no_color=True))
    yield run
    for sign, handler in handlers.items():
        signal.signal(sign, handler)


RANK = ["--device", "cpu", "--quiet"]


def test_rank_prints_and_writes_and_reuses(cli_here, photos, toy_zoo, tmp_path):
    arguments = [photos, "--backbones", toy_zoo, *RANK]
    out = cli_here("rank", *arguments, "--out", tmp_path / "r.json")
    assert "my photos: 36 images, 3 classes" in out
    for word in (
        "rank",
        "backbone",
        "forecast",
        "P(best)",
        "score",
        "width",
        "params",
        "images/s",
    ):
        assert word in out
    ranking = Ranking.from_json(tmp_path / "r.json")
    assert [line.split("│")[2].strip() for line in out.splitlines() if "│ " in line] == [*ranking]
    again, err = cli_here("rank", *arguments, "--out", tmp_path / "r.csv", both=True)
    assert "No room" not in err
    specs = [ranking.score(name).details["spec"] for name in ranking.shortlist(3)]
    words = ["sfda-tune", "search", str(photos), "--backbones", *specs]
    words += ["--device", "cpu", "--out", "run"]
    assert f"Next: {shlex.join(words)}" in " ".join(err.split("\n"))
    assert again.count("cached") == 4
    csv = (tmp_path / "r.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in csv[1:]] == list(ranking)
    fresh = cli_here("rank", *arguments, "--no-cache")
    assert "cached" not in fresh
    lines = [line.split("│") for line in cli_here("cache", "show").splitlines() if "│" in line]
    kept = {line[2].strip(): line for line in lines if line[1].strip() == "my photos"}
    assert sorted(kept) == ["convnext", "efficientnet", "resnet", "vit"]
    assert [cell.strip() for cell in kept["vit"][3:5]] == ["1", "36"]
    assert "deleted 0 files" in cli_here("cache", "clear", "--older-than", 1)
    assert "deleted 0 files" in cli_here("cache", "clear", "--larger-than", "1GB")
    assert "deleted 4 files" in cli_here("cache", "clear", "--larger-than", "1kB")
    assert "deleted 0 files" not in cli_here("cache", "clear")  # the notes
    assert "my photos" not in cli_here("cache", "show")


def test_doctor(cli_here, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAY_ADDRESS", "ray://me:secret@host:10001")
    told = cli_here("doctor", "--cache", tmp_path / "cache")
    for word in (
        f"sfda-tune {__version__}",
        torch.__version__,
        "/dev/shm",
        "reachable",
        "no prob",
    ):
        assert word in " ".join(told.split())
    assert "secret" not in told
    pytest.importorskip("fsspec")
    monkeypatch.setenv("SFDA_TUNE_CACHE", "memory://me:secret@there")
    told = cli_here("doctor")
    assert re.search(r"folder +memory://me:\*{3}@there", told)
    assert "secret" not in told
    monkeypatch.setenv("SFDA_TUNE_CACHE_SIZE", "plenty")
    told, _ = cli_here("doctor", code=1, both=True)
    assert "SFDA_TUNE_CACHE_SIZE must be a size" in told


def test_doctor_tells_what_then_fails(cli_here, tmp_path, monkeypatch):
    """HF_HOME is a file, HF_TOKEN_PATH a folder, and rank would not start."""
    (tmp_path / "file").touch()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))
    monkeypatch.setenv("SFDA_TUNE_PATIENCE", "-3")
    told = " ".join(cli_here("doctor", code=1, both=True)[0].split())
    problems = told.partition(" problems ")[2]
    assert "token: cannot be read" in problems
    assert "weights: must be in a folder but" in problems
    assert "SFDA_TUNE_PATIENCE must be a positive number of seconds but is '-3'" in problems
    assert "SFDA_TUNE_PATIENCE -3" in told  # a name longer than most


def test_backbones_in_every_spelling(cli_here, photos, toy_zoo, tmp_path):
    a, b = toy_zoo / "vit", toy_zoo / "resnet"
    for k, spelling in enumerate(
        (
            ["--backbones", a, b],
            ["-b", a, "-b", b],
            ["--backbones", f"{a},{b}"],
        )
    ):
        cli_here("rank", photos, *spelling, *RANK, "--out", tmp_path / f"{k}.json")
        assert sorted(Ranking.from_json(tmp_path / f"{k}.json")) == ["resnet", "vit"]


def test_spread():
    assert spread_lists(["rank", "-b", "x", "y", "--seed", "3", "d"]) == [
        "rank", "-b", "x", "-b", "y", "--seed", "3", "d",
    ]  # fmt: skip
    assert spread_lists(["rank", "--backbones=x", "d"]) == ["rank", "--backbones=x", "d"]
    assert spread_lists(["rank", "-b", "x", "--", "y"]) == ["rank", "-b", "x", "--", "y"]


def test_a_failed_backbone_is_shown_last_with_its_error(cli_here, photos, toy_zoo, tmp_path):
    bare = shutil.copytree(toy_zoo / "vit", tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    out = cli_here("rank", photos, "-b", bare, toy_zoo / "vit", "resnet10t.c3_in1k", *RANK)
    lines = [line for line in out.splitlines() if "│ " in line]
    assert "vit" in lines[0]
    assert "failed" in lines[1]
    assert "No suitable checkpoints" in out
    assert "the hub cannot be reached" in out
    error = cli_here("rank", photos, "-b", bare, *RANK, code=1)
    assert "no backbone could be ranked" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "no/such/folder"),
        (["digits", "-b", "resnet5O"], "did you mean"),
        (["digits", "-b", ""], "timm knows no model ''"),
        (["-b", "demo:*", "."], "it stands before --backbones"),
        (["digits", "--out", "r.txt"], "--out must end in .json or .csv"),
        (["digits", "--out", "no/such/r.json"], "there is no folder"),
        (["digits", "--metric", "nonsense"], "nonsense"),
        (["digits", "--variant", "nonsense"], "official, paper, loo"),
        (["digits", "--device", "nonsense"], "`device`"),
        (["digits", "--precision", "int8"], "`precision`"),
        (["digits", "--samples", "3"], "3"),
        (["digits", "--threads", "0"], "`threads` must be an integer ≥ 1"),
        (["digits", "--cache", "c", "--no-cache"], "exclude each other"),
        (["digits", "--import", "nope.py"], "nope.py"),
    ],
)
def test_errors_are_one_clear_line(cli_here, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = cli_here("rank", *arguments, code=1)
    assert message in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1


def test_debug_shows_the_traceback(cli_here):
    assert "Traceback" in cli_here("rank", "digits", "-b", "resnet5O", "--debug", code=1)


def test_usage_errors(cli, cli_here):
    for arguments, message in (
        (["rank", "--nonsense"], "No such option"),
        (["rank", "--samples", "many"], "Invalid value for '--samples'"),
        (["nonsense"], "No such command"),
    ):
        error = cli_here(*arguments, code=2)
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert cli("nonsense", code=2) == error  # in a process of its own, too
    assert f"sfda-tune {__version__}" in cli_here("--version")
    assert "rank" in cli_here("--help")
    assert "--backbones" in cli_here("rank", "-h")
    assert "'convnext_*.fb_in22k*'" in cli_here("rank", "--help")


def test_a_dash_is_no_name_of_a_file(cli_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, option, code in (
        ("predict run x.png --csv -", "--csv must be the name of a file but is '-'", 1),
        ("predict run x.png --jsonl -", "--jsonl must be the name of a file but is '-'", 1),
        ("report r.json --out -", "--out must be the name of a file but is '-'", 1),
        ("rank digits --log -", "'--log'.*: '-' is no name of a file", 2),
    ):
        assert re.search(option, cli_here(*words.split(), code=code))
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_replaced_by_one(cli_here, tmp_path):
    pipe, folder, known = tmp_path / "pipe.json", tmp_path / "x.html", tmp_path / "r.json"
    os.mkfifo(pipe)
    folder.mkdir()
    known.write_text("{}")  # looked at later
    for arguments, message in (
        (["rank", "digits", "--out", pipe], f"--out must be a file but '{pipe}' is a FIFO"),
        (["report", known, "--out", pipe], f"--out must be a file but '{pipe}' is a FIFO"),
        (["report", known, "--out", folder], f"--out: '{folder}' cannot be written"),
        (["report", known, "--plots", pipe], f"`--plots` must be a folder but '{pipe}' is a FIFO"),
        (["report", known, "--plots", known], f"must be a folder but '{known}' is a file"),
    ):
        assert message in cli_here(*arguments, code=1)
    assert pipe.is_fifo()
    assert not (tmp_path / "r.html").exists()  # nothing was written before


def test_a_ranking_that_cannot_be_written_is_still_shown(
    cli_here, toy_zoo, photos, tmp_path, monkeypatch
):
    (tmp_path / "r.json").mkdir()
    assert "cannot be written" in cli_here("rank", "--out", tmp_path / "r.json", code=1)

    def fill_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(values_ranking, "write_text", fill_disk)
    arguments = ["rank", photos, "-b", toy_zoo / "vit", *RANK, "--out", tmp_path / "x.json"]
    out, err = cli_here(*arguments, code=1, both=True)
    assert "vit" in out
    assert "x.json' could not be written (No space left on device)" in err


@pytest.mark.parametrize("encoding", [pytest.param("ascii", marks=pytest.mark.slow), None])
def test_the_ranking_is_written_whoever_reads_the_table(
    toy_zoo, photos, tmp_path, clean_environment, encoding
):
    """Output in an encoding that lacks half of the table; or (None) that nobody reads."""
    odd = shutil.copytree(toy_zoo / "vit", tmp_path / "caf\udce9 ü")
    arguments = ["rank", photos, "-b", odd, toy_zoo / "resnet", *RANK, "-o", tmp_path / "r.json"]
    environment = clean_environment | ({"PYTHONIOENCODING": encoding} if encoding else {})
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    if encoding is None:
        process.stdout.close()
        process.stdout = None
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert b"Error" not in err
    assert odd.name in Ranking.from_json(tmp_path / "r.json")
    if encoding:
        assert rb"caf\udce9" in out
        assert b"1-2" in out or b"1 " in out


FOREIGN = "[bold]\x1b]0;pwned\x07\x1b[31m\x9b1m\u202e[red]*"


def test_names_reach_the_terminal_as_text(cli_here, toy_zoo, photos, tmp_path, capfd):
    zoo, images = tmp_path / f"zoo {FOREIGN}", tmp_path / f"photos {FOREIGN}"
    shutil.copytree(toy_zoo / "vit", zoo / FOREIGN)
    shutil.copytree(photos, images)
    (images / "ant").rename(images / f"ant {FOREIGN}")
    shutil.copytree(toy_zoo / "resnet", zoo / "bare [v1]")
    (zoo / "bare [v1]" / "model.safetensors").unlink()
    shown = cli_here("rank", images, "-b", zoo, "--cache", tmp_path / f"c [/b]{FOREIGN}", *RANK)
    shown += cli_here("rank", images, "-b", zoo / FOREIGN, "--device", "cpu", "--no-cache")
    shown += cli_here("backbones", zoo)
    shown += cli_here("cache", "show", "--cache", tmp_path / f"c [/b]{FOREIGN}")
    shown += cli_here("cache", "clear", "--cache", tmp_path / f"c [/b]{FOREIGN}")
    shown += cli_here("rank", images, "-b", zoo / "bare [v1]", *RANK, code=1)
    shown += cli_here("rank", tmp_path / f"none {FOREIGN}", code=1)
    assert shown.count("[bold]\\x1b]0;pwned") >= 6
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_bars_take_names_as_text():
    from io import StringIO

    from sfda_tune.pipelines.progress import Bar, SearchProgress

    for make in (Bar, SearchProgress):
        bar = make(Console(file=(shown := StringIO()), width=200, force_terminal=False))
        if make is SearchProgress:
            bar.enter("rank")
        bar.start(10, 0)
        bar.advance(f"[/b]{FOREIGN}", 1)
        bar.rich.console.print(bar.rich.get_renderable())
        assert r"[/b][bold]\x1b]0;pwned" in shown.getvalue()


def test_saturated_scores_are_remarked_upon(cli_here, photos, toy_zoo):
    _, err = cli_here("rank", photos, "-b", toy_zoo, "--variant", "official", *RANK, both=True)
    assert "warning: " in err
    assert "tie" in err


@pytest.fixture(scope="module")
def ranking(photos, toy_zoo):
    return sfda_tune.rank(photos, toy_zoo, device="cpu", workers=0, cache=False)


@pytest.mark.parametrize("columns", [40, 60, 80, 110])
def test_a_narrow_terminal_keeps_names_and_scores(ranking, monkeypatch, capsys, columns):
    told = StringIO()
    monkeypatch.setattr(terminal, "output", Console(file=told, width=columns, force_terminal=True))
    terminal.show_ranking(ranking)
    text = re.sub(r"\x1b\[[0-9;]*m", "", told.getvalue())
    for name in ("convnext", "efficientnet", "resnet", "vit"):
        assert name in text
    assert len(re.findall(r"│ +[+-]\d\.\d\d │", text)) == 4  # the forecasts
    table, _, sentences = text.partition("└")
    assert ("P(best)" in table) is (columns >= 60)
    assert ("90% interval" in table) is (columns >= 80)
    assert ("score" in table) is (columns == 110)
    lines = sentences.splitlines()
    assert max(map(len, lines)) <= columns
    for sentence in ("it will be the best with probability", "may be the best after fine-tuning."):
        assert sentence in " ".join(sentences.split())  # folded between words
    assert "No room for: " in capsys.readouterr().err


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_cuts_no_number_of_backbones(cli_here, monkeypatch, columns):
    told = StringIO()
    monkeypatch.setattr(terminal, "output", Console(file=told, width=columns, force_terminal=True))
    monkeypatch.setattr(reports, "output", terminal.output)
    long = "mobilenetv4_conv_medium.e250_r384_in12k_ft_in1k"
    _, err = cli_here("backbones", "resnet18.a1_in1k", long, both=True)
    table = re.sub(r"\x1b\[[0-9;]*m", "", told.getvalue())
    assert max(map(len, table.splitlines())) <= columns
    for number in ("11.2M", "71.5", "8.43M", "82.8"):
        assert f" {number} │" in table
    assert ("44.7" in table) is (columns == 80)
    assert table.count("…") == (columns == 60)  # in the middle of the long name
    assert "a wider terminal or --json shows them" in err


def test_the_width_is_that_of_the_terminal(forked, photos, toy_zoo, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    child = forked(["rank", photos, "-b", toy_zoo, *RANK], os.ttyname(theirs), tmp_path / "err")
    child.join(120)
    assert child.exitcode == 0, (tmp_path / "err").read_text()
    os.close(theirs)
    assert "P(best)" in os.read(ours, 100_000).decode()
    assert "No room for: " in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_a_script_without_main_guard_works_where_processes_are_spawned(
    photos, toy_zoo, tmp_path, clean_environment
):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sfda_tune\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        f"r = sfda_tune.rank({str(photos)!r}, {str(toy_zoo / 'vit')!r}, device='cpu', workers=1)\n"
        "print('ranked', len(r), len(r.failed))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, check=False, env=clean_environment,
    )  # fmt: skip
    assert done.stdout == "ranked 1 0\n", done.stderr
    assert "if __name__ == '__main__'" in done.stderr


@pytest.mark.slow
def test_what_is_imported_once_is_no_price_of_a_network(tmp_path, clean_environment):
    """A small budget looked at one network only: the import of timm was the price of each."""
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.abc, sys, time\n"
        "now, late = time.perf_counter, 0.0\n"
        "time.perf_counter = lambda: now() + late\n"
        "class SlowDisk(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        global late\n"
        "        late += 1000 * (name == 'timm')\n"
        "if __name__ == '__main__':\n"
        "    sys.meta_path.insert(0, SlowDisk())\n"
        "    import sfda_tune\n"
        "    r = sfda_tune.rank('digits', 'demo:resnet*', samples=60, budget=600, cache=False)\n"
        "    print(late, r.info.get('not_looked_at'))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, check=False, env=clean_environment,
    )  # fmt: skip
    assert done.stdout == "1000.0 None\n", done.stderr


def test_help_and_typos_are_quick(tmp_path):
    """They load neither torch nor timm, which take seconds; and say what may be meant."""
    calls = {
        "rank --help": "--backbones",
        "rank --metric sfdaa": "did you mean 'sfda'?",
        "rank -b demo:convnet_glyphs": "did you mean 'demo:convnext_glyphs'?",
        "rank -b preset:smal": "did you mean 'preset:small'?",
        "rank demo:digits": "did you mean 'digits'?",
        "rank no/such/folder": "does not exist",
        "rank --train haed": "one of full, head",
        "rank --budget 5parsec": "`budget`",
        "rank --top 3": "add race=True",
        "search no/such/folder -o run": "does not exist",
        "search digits -o run --objective acc": "`objective`",
        "rank digits -b resnet5O": "did you mean resnet50",
        "search digits -o run -b resnet5O.a1_in1k": "timm knows no model 'resnet5O.a1_in1k'",
        "search digits -o run -b demo:convnet_glyphs": "did you mean 'demo:convnext_glyphs'?",
        "rank digits --device cude": "but is 'cude'; did you mean 'cuda'?\n",
        "search digits -o run --device gpu": "'auto' or a device torch can use, such as 'cpu'",
        "predict no/such/run a.jpg": "does not exist",
    }
    code = (
        "import sys\nfrom sfda_tune.cli.main import main\n"
        f"for call in {list(calls)!r}:\n"
        "    try: main(call.split())\n    except SystemExit: pass\n"
        "    print(call, sorted({'torch', 'timm', 'sklearn'} & set(sys.modules)), flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    for call, said in calls.items():
        assert said in done.stdout + done.stderr
        assert f"{call} []" in done.stdout


def test_backbones_lists_what_is_there(cli_here, toy_zoo):
    out = cli_here("backbones", toy_zoo, "resnet18.*")
    assert "32×32" in out
    assert "resnet18.a1_in1k" in out
    assert "11.2M" in out  # without the classifier
    assert "512" in out
    assert "no model" in cli_here("backbones", "zzz*", code=1)
    names = "resnet50.a1_in1k", "resnet18.a1_in1k", toy_zoo
    for key, order in (
        ("imagenet", "resnet50 resnet18 vit"),
        ("params", "vit resnet18 resnet50"),
        ("name", "resnet18 resnet50 vit"),
    ):
        shown = cli_here("backbones", *names, "--sort", key)
        assert sorted(order.split(), key=shown.index) == order.split(), shown
    assert "--sort must be name, imagenet" in cli_here("backbones", toy_zoo, "--sort", "x", code=1)


def test_unreadable_images_are_named_in_a_warning(cli_here, photos, toy_zoo, tmp_path):
    root = shutil.copytree(photos, tmp_path / "spoilt")
    (root / "bee" / "03.jpg").write_bytes(b"no image")
    out, err = cli_here("rank", root, "-b", toy_zoo / "vit", *RANK, both=True)
    assert "warning: 1 of 36 images could not be read" in err
    assert "03.jpg" in err
    assert "35 images" in out


def test_evaluate(cli_here, tmp_path):
    scores, truth = tmp_path / "scores.json", tmp_path / "truth.csv"
    scores.write_text('{"a": 0.9, "b": 0.5, "c": 0.1, "d": 0.2}')
    truth.write_text("model,accuracy\na,0.9\nb,0.8\n")
    assert "nan" not in cli_here("evaluate", scores, truth)  # too few for most figures
    truth.write_text("backbone,accuracy\na,0.8\nb,0.7\nc,0.5\nd,0.6\n")
    out = cli_here("evaluate", scores, truth)
    assert re.search(r"weighted_tau\s+1\.0", out)
    assert re.search(r"regret_at_1\s+0\.0", out)
    truth.write_text('{"x": {"a": 1, "b": 2, "c": 3, "d": 4}}')
    both = tmp_path / "both.json"
    both.write_text(
        '{"x": {"a": 1, "b": 2, "c": 3, "d": 4}, "y": {"a": 4, "b": 3, "c": 2, "d": 1}}'
    )
    assert "x" in cli_here("evaluate", both, both)
    assert "no/such.json" in cli_here("evaluate", "no/such.json", both, code=1)


SLOW_PLUGIN = """
import pathlib
import time
import timm.models.resnet as r
from timm.models import register_model

class Slow(r.ResNet):
    def forward(self, x):
        pathlib.Path({marker!r}).touch()  # no file whose end could swallow an interrupt
        time.sleep(1.5)
        return super().forward(x)

@register_model
def slow_resnet(pretrained=False, **kwargs):
    model = r.test_resnet(pretrained=pretrained, **kwargs)
    model.__class__ = Slow
    return model
"""


@pytest.fixture
def slow_zoo(toy_zoo, tmp_path):
    """Two backbones, the second of which is slow and says when it has begun."""
    marker = tmp_path / "begun"
    plugin = tmp_path / "slow_plugin.py"
    plugin.write_text(SLOW_PLUGIN.format(marker=str(marker)))
    slow = shutil.copytree(toy_zoo / "resnet", tmp_path / "zoo" / "slow")
    config = json.loads((slow / "config.json").read_text())
    config["architecture"] = "slow_resnet"
    (slow / "config.json").write_text(json.dumps(config))
    shutil.copytree(toy_zoo / "convnext", tmp_path / "zoo" / "quick")
    return tmp_path / "zoo", plugin, marker


def test_without_a_standard_output_it_ends_as_with_one(clean_environment):
    command = f"exec {shlex.join(COMMAND)} --version >&-"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=clean_environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_messages_that_cannot_be_written_lose_no_result(photos, toy_zoo, tmp_path):
    out, backbone = tmp_path / "r.json", toy_zoo / "resnet"
    command = [*COMMAND, "rank", photos, "-b", backbone, *RANK, "--out", out]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*map(str, command)], stderr=full, check=False)
    assert done.returncode == 0
    assert json.loads(out.read_text())["scores"]


def wait_for(marker: Path, child, err: Path) -> None:
    for _ in range(2400):
        if marker.exists() or not child.is_alive():
            break
        time.sleep(0.05)
    assert marker.exists(), err.read_text()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_shows_and_writes_what_is_finished(
    forked, photos, slow_zoo, tmp_path, sign
):
    zoo, plugin, marker = slow_zoo
    out, err, written = tmp_path / "out", tmp_path / "err", tmp_path / "r.json"
    arguments = ["rank", photos, "-b", zoo, "--import", plugin, *RANK]
    child = forked([*arguments, "--batch-size", 4, "--out", written], out, err)
    wait_for(marker, child, err)
    os.kill(child.pid, sign)
    child.join(60)
    assert child.exitcode == 130, err.read_text()
    assert "Interrupted" in err.read_text()
    assert "quick" in out.read_text()
    ranking = Ranking.from_json(written)
    assert ranking.info["not_looked_at"] == ["slow"]
    assert ranking.records()[0]["score"] is not None
    assert "1 of 2 was not looked at: slow" in out.read_text()


def test_what_there_was_no_time_for_has_not_failed(cli_here):
    words = ["rank", "digits", "-b", "demo:resnet_*", "--no-cache", "--budget", "0.0001", "-q"]
    out, err = cli_here(*words, code=1, both=True)
    assert "failed" not in out
    assert out.count("not looked at") == 3  # in each row, and once in words
    assert "there was no time to look at any; give a larger --budget." in err


def test_nohup_stays(cli_here):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        cli_here("--version")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_kill_only_the_unfinished_backbone_is_run(forked, photos, slow_zoo, tmp_path):
    zoo, plugin, marker = slow_zoo
    arguments = ["rank", photos, "-b", zoo, "--import", plugin, *RANK]
    err = tmp_path / "err"
    child = forked([*arguments, "--batch-size", 4], err)
    wait_for(marker, child, err)
    os.killpg(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL

    def rank():
        marker.unlink(missing_ok=True)
        again = forked([*arguments, "--out", tmp_path / "r.json"], err)
        again.join(120)
        assert again.exitcode == 0, err.read_text()
        cached = {
            s.backbone: s.details["cached"] for s in Ranking.from_json(tmp_path / "r.json").scores
        }
        return cached, marker.exists()

    assert rank() == ({"quick": True, "slow": False}, True)
    assert rank() == ({"quick": True, "slow": True}, False)


def test_options_may_come_from_a_file_which_stands_beside_each_result(cli_here, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "backbones: [demo:resnet_glyphs, demo:vit_glyphs]\nsamples: 80\nno_cache: true\n"
    )
    first = tmp_path / "a.json"
    cli_here("rank", "digits", "--config", file, "--samples", 60, *RANK, "-o", first)
    a = Ranking.from_json(first)
    assert (a.info["n_samples"], len(a)) == (60, 2)  # the command line counts more
    written = first.with_suffix(".config.yaml")
    again = tmp_path / "b.json"
    cli_here("rank", f"--config={written}", "-q", "-o", again)
    b = Ranking.from_json(again)
    assert dict(a) == dict(b)
    assert (
        again.with_suffix(".config.yaml").read_text().splitlines()[1:]
        == (written.read_text().splitlines()[1:])
    )
    file.write_text("sampels: 3\n")
    assert "did you mean 'samples'?" in cli_here("rank", "--config", file, code=1)
    file.write_text("- 3\n")
    assert "must hold options" in cli_here("rank", "--config", file, code=1)
    assert "does not exist" in cli_here("rank", "--config", tmp_path / "none.yaml", code=1)
    assert "after a command" in cli_here("--config", file, code=1)
    file.write_text("samples: many\n")
    assert "valid integer" in cli_here("rank", "--config", file, code=2)


def test_a_file_of_options_holds_what_its_command_can_take(cli_here, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("backbones: demo:resnet_glyphs, demo:vit_glyphs\nsamples: 60\n")  # no list
    out = cli_here("rank", "--config", file, "--no-cache", "--json", *RANK)
    assert len(json.loads(out)["backbones"]) == 2
    for text, said in {
        "metric: [knn, sfda]": "'metric' must be one value but is the list ['knn', 'sfda']",
        "samples: true": "'samples' is no switch but is True",
        "split: true": "'split' is no switch but is True; if it is a text, quote it",
        "budget: {a: 1}": "'budget' must be text or a number but is {'a': 1} (dict)",
        "split: 2026-01-01": "'split' must be text or a number but is datetime.date",
        "backbones: [[a]]": "'backbones' must be text or a number but is ['a'] (list)",
        "backbones: [true]": "'backbones' is no switch",
    }.items():
        file.write_text(text)
        assert said in cli_here("rank", "--config", file, code=1)


def test_ctrl_c_before_anything_is_finished_is_heard(cli_here, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sfda_tune.rank", interrupt)
    assert "Interrupted." in cli_here("rank", *RANK, code=130)


def test_a_dry_run_refuses_what_a_run_refuses(cli_here, photos, toy_zoo):
    words = ["rank", photos, "-b", toy_zoo, "--budget", "nonsense", *RANK]
    assert cli_here(*words, "--dry-run", code=1) == cli_here(*words, code=1)
    words = ["rank", "-b", "demo:*", photos, *RANK]
    assert cli_here(*words, "--dry-run", code=1) == cli_here(*words, code=1)


@pytest.mark.parametrize(
    ("options", "then", "more"),
    [
        ([], "goes on from here", "goes on from there"),
        (["--no-cache"], "begins anew, for nothing was kept", "begins anew, for nothing was kept"),
    ],
)
def test_interrupted_it_says_what_is_kept(
    cli_here, photos, toy_zoo, monkeypatch, options, then, more
):
    def finish(self, score):
        raise KeyboardInterrupt

    monkeypatch.setattr("sfda_tune.pipelines.progress.Bar.finish", finish)
    words = ["rank", photos, "-b", toy_zoo, "--device", "cpu", *options]
    out, err = cli_here(*words, code=130, both=True)
    assert f"Interrupted: the same command {then}." in err
    assert f"the same command, with more time, {more}." in " ".join(out.split())


def test_ctrl_c_during_the_imports_is_heard(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, *arguments):
            if name == "sfda_tune.cli.main":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "sfda_tune.cli.main")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("sfda_tune", run_name="__main__")
    assert end.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_search_that_is_refused_leaves_the_options_of_the_run(cli_here, tmp_path):
    for name in ("config.json", "config.yaml"):
        (tmp_path / name).write_text("of the run")
    cli_here("search", tmp_path / "nowhere", "-o", tmp_path, code=1)
    assert (tmp_path / "config.yaml").read_text() == "of the run"
    for words in (["nowhere"], ["digits", "-b", "demo:resnet_noise", "--max-params", 10]):
        cli_here("search", *words, "-o", tmp_path / "new", code=1)
        assert not list(tmp_path.glob("new/*"))  # not even a lock


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["rank", "nowhere"], 1, "nowhere"),
        (["rank", "digits", "--out", "r.txt"], 1, "--out must end in .json or .csv"),
        (["rank", "nowhere", "--debug"], 1, "nowhere"),
        (["rank", "digits", "--samples", "many"], 2, "valid integer"),
        (["rank", "digits", "--config", "none.yaml"], 1, "does not exist"),
        (["search", "nowhere", "-o", "run"], 1, "nowhere"),
        (["predict", "run", "a.png"], 1, "run"),
        (["evaluate", "a.json", "b.json"], 1, "does not exist"),
        (["compare", "a.json", "b.json"], 1, "a.json"),
        (["backbones", "nothing-like-it"], 1, "nothing-like-it"),
        (["doctor", "--nothing"], 2, "--nothing"),
    ],
)
def test_what_fails_is_one_json_document_too(cli_here, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    out, err = cli_here(*words, "--json", code=code, both=True)
    assert said in json.loads(out)["error"]
    assert json.loads(out)["error"] in err  # as people read it


def test_what_fails_after_its_document_is_still_one(cli_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "options.yaml"
    file.write_text("json: true\nbackbones: local-dir:nowhere\n")
    told = json.loads(cli_here("rank", "--config", file, *RANK, code=1, both=True)[0])
    assert "nowhere" in told["error"]
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text("{}")
    words = ("rank", "-b", "local-dir:net", "--no-cache", "--json", *RANK)
    told = json.loads(cli_here(*words, code=1, both=True)[0])
    assert list(told["failed"]) == ["net"]
    assert "error" not in told


def test_a_full_disk_is_one_line_and_the_same_search_goes_on(cli_here, tmp_path, monkeypatch):
    words = ["digits", "-b", "demo:resnet_glyphs", "--samples", "90", "--epochs", "1"]
    words = ["search", *words, "--trials", "2", "-o", tmp_path / "run"]

    def fill(path, *content):
        if path.suffix == ".safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(28, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr("sfda_tune.finetuning.checkpoints.write_tensors", fill)
        patch.setattr("sfda_tune.cli.config.write_text", fill)
        err = cli_here(*words, "-q", code=1)
    assert re.fullmatch(r"error: the disk of '.*run' fails: No space left.*; make room.*\n", err)
    cli_here(*words)
    trials = SearchResult.open(tmp_path / "run").trials
    assert [t["state"] for t in trials] == ["complete", "complete"]
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_search_writes_its_options_without_secrets(tmp_path, monkeypatch):
    import typer

    from sfda_tune.cli.config import write_config

    command = typer.main.get_command(commands.app).commands["search"]
    arguments = ["digits", "-o", str(tmp_path), "--storage", "postgresql://me:secret@host/db"]
    context = command.make_context("search", [*arguments, "-b", "demo:*", "--trials", "3"])
    write_config(context, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "me:secret" not in text
    assert "# storage is left out" in text
    assert "trials: 3" in text


def test_every_help_has_an_example_and_every_result_a_document(cli_here):
    commands = "rank, search, predict, export, backbones, evaluate, compare, report, doctor"
    for command in f"{commands}, cache show, cache clear".split(", "):
        said = cli_here(*command.split(), "--help")
        assert "For example:" in said
        assert f"sfda-tune {command}" in said.partition("For example:")[2]
        assert "--json" in said
        assert "<bool>" not in said


def test_help_shows_what_stands_in_brackets(cli_here):
    assert "sfda-tune[ray]" in "".join(cli_here("rank", "-h").split())


def test_compare_and_presets_on_the_command_line(cli_here, tmp_path):
    for name, values in {"a": {"x": 2, "y": 1}, "b": {"x": 1, "y": 2}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    out = cli_here("compare", tmp_path / "a.json", tmp_path / "b.json")
    for words in (("compare", "a.json", "b.json"), ("evaluate", "a.json", "b.json")):
        told = json.loads(cli_here(words[0], *(tmp_path / w for w in words[1:]), "--json"))
        assert told.get("kendall_tau", told.get("figures", {}).get("kendall_tau")) == -1
    told = json.loads(cli_here("doctor", "--json", "--cache", tmp_path / "cache"))
    assert told["versions"]["sfda-tune"] == __version__
    assert told["problems"] == []
    assert json.loads(cli_here("cache", "show", "--json", "--cache", tmp_path / "c"))["kept"] == []
    assert "The first is y now, number 2 before; x is number 2." in out
    assert "none of the presets" in cli_here("backbones", "preset:huge", code=1)


def test_what_happens_is_logged_to_a_file_and_with_verbose_to_the_terminal(cli_here, tmp_path):
    log = tmp_path / "log.txt"
    call = ["rank", "digits", "-b", "demo:resnet_*", "--samples", 60, *RANK]
    _, err = cli_here(*call, "--log", log, "-v", both=True)
    assert err.count("demo:resnet_glyphs: score 0.") == 1
    assert log.read_text().count(" INFO sfda_tune.pipelines.ranking demo:resnet_") == 2
    assert "score 0." not in cli_here(*call, both=True)[1]  # without
    assert "--log" in cli_here(*call, "--log", tmp_path / "no" / "log.txt", code=2)


@pytest.mark.parametrize(
    ("epochs", "error", "said"),
    [
        ([0, 1, 2], None, "none of 2 epochs was better"),
        ([0], None, "No epoch of training ended in time"),
        ([0], "MemoryError: x", "1 of 1 trials failed: .* with MemoryError: x"),
    ],
)
def test_why_the_winner_is_a_probe(epochs, error, said):
    trial = {"epochs": [{"number": n} for n in epochs], "error": error}
    found = SearchResult(Path("run"), {"trials": [trial]}, Ranking([]))
    assert re.search(said, terminal._explain_probe(found))


def test_the_command_asks_what_numbers_are(cli_here, tmp_path):
    lines = ["path,label"]
    for n in range(40):
        Image.fromarray(np.full((8, 8), 6 * n, np.uint8)).save(tmp_path / f"{n}.png")
        lines.append(f"{n}.png,{n / 7}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    words = ["rank", tmp_path / "t.csv", "-b", "demo:resnet_*", "--cache", tmp_path / "c", "-q"]
    asked = " ".join(cli_here(*words, code=1).split())
    assert "40 different numbers with a fraction from 0 to 5.57143 on 40 images" in asked
    assert "--task regression" in asked
    out, err = cli_here(*words, "--task", "regression", "-o", tmp_path / "r.json", both=True)
    assert "40 images, numbers from 0 to 5.57" in out
    assert "predicts numbers from 0 to 5.57" in out
    assert "fitted to classification only" in err
    assert re.search("Next: sfda-tune search .* --task regression --out run", err)
    info = Ranking.from_json(tmp_path / "r.json").info
    assert info["arguments"]["task"] == "regression"
    told = cli_here(*words, "--task", "classification", "--dry-run", code=1)
    assert "all 40 classes have one" in told
    search = ["search", tmp_path / "t.csv", "-o", tmp_path / "run", "--task", "regression"]
    told = cli_here(*search, "--monitor", "accuracy", code=1)
    assert "must be one of ('r2', 'spearman', 'rmse', 'mae') for regression" in told


def test_the_command_ranks_on_several_labels(cli_here, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["path,label"]
    for n in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"{n}.png")
        lines.append(f"{n}.png,{rng.choice(['cat', 'dog', 'cat;dog', ''])}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    words = ["rank", tmp_path / "t.csv", "-b", "demo:resnet_*", "--cache", tmp_path / "c", "-q"]
    assert "--task multilabel --label-delimiter ';'" in cli_here(*words, code=1)
    words += ["--label-delimiter", ";"]
    out, err = cli_here(*words, "-o", tmp_path / "r.json", both=True)
    assert "40 images, 2 labels" in out
    assert "Labels that separate worst" in out
    assert "fitted to classification only" in err
    assert "Next: sfda-tune search" in err
    assert "--label-delimiter ';' --out run" in err
    told = json.loads(cli_here(*words, "--json"))
    assert {row["name"] for row in told["labels"]} == {"cat", "dog"}
    assert "40 images: 0 forward" in cli_here(*words, "--dry-run")
    assert "40 images, 2 labels" in cli_here("rank", "--config", tmp_path / "r.config.yaml")
    cli_here("report", tmp_path / "r.json")
    page = re.sub("<wbr>|<.?span>", "", (tmp_path / "r.html").read_text("utf-8"))
    assert "--label-delimiter &#39;;&#39;" in page
