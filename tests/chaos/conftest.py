"""Random damage, and what every trial of it must leave whole.

``pytest -m slow tests/chaos`` takes under three minutes; ``SFDA_TUNE_CHAOS=10`` before it makes
ten times as many trials. A trial that fails is repeated by its name: ``pytest -m slow
'tests/chaos/test_kills.py::test_rank[3]'``, with the same SFDA_TUNE_CHAOS. The counts stand at
the end of pytest's output.
"""

import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # `--import-mode=importlib` does not


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter):
    counts = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            if "tests/chaos/" in report.nodeid:
                name = report.nodeid.partition("tests/chaos/")[2].partition("[")[0]
                n = next((v for k, v in report.user_properties if k == "inputs"), 1)
                done, bad = counts.get(name, (0, 0))
                counts[name] = done + n, bad + (outcome != "passed")
    if counts:
        terminalreporter.section("chaos: trials and failures")
    for name, (done, bad) in counts.items():
        terminalreporter.line(f"{name}: {done} trials, {bad} failures")


@pytest.fixture(scope="session")
def finish(forked):
    """Run a command to its end, which must be a good one."""

    def run(arguments, log, seconds=150):
        child = forked(arguments, log)
        child.join(seconds)
        text = Path(log).read_text(errors="replace")
        assert child.exitcode == 0, f"exit code {child.exitcode} (None: hung)\n{text[-3000:]}"
        assert "Traceback" not in text, text[-3000:]

    return run


@pytest.fixture(scope="session")
def kill(forked):
    """Start a command and kill it after some seconds: alone, or with all its processes."""

    def run(arguments, log, seconds, everything):
        child = forked(arguments, log)
        child.join(seconds)
        if child.exitcode is None:
            with suppress(ProcessLookupError):  # it has not made its group yet
                (os.killpg if everything else os.kill)(child.pid, signal.SIGKILL)
            child.kill()
            child.join()

    return run


@pytest.fixture
def cli(clean_environment, monkeypatch, capfd):
    """`sfda-tune` in this process: it must end well, or with one line for people."""
    from sfda_tune.cli import main as commands

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` sets these
    signs = (signal.SIGTERM, signal.SIGHUP)
    handlers = {sign: signal.getsignal(sign) for sign in signs}

    def run(*arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            with pytest.raises(SystemExit) as done:
                commands.main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        both = out + err
        assert done.value.code in (0, 1), both
        assert "Traceback" not in both, both
        assert "--debug" not in both, both  # an error that nobody foresaw
        foreign = {c for c in both if not c.isprintable()} - {"\n"}
        assert not foreign, both
        if done.value.code == 1:
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, both
        return done.value.code, out, err

    yield run
    for sign, handler in handlers.items():
        signal.signal(sign, handler)
