"""Commands in this process; or, as scripts, in one that is forked where all is imported already.

Importing takes longer than a small ranking, and a signal is to hit the work, not the imports.
"""

import os
import runpy
import shlex
import signal
import sys

import torch

import sfda_tune.cli.main
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.report.commands import repeat
from sfda_tune.report.run import read_run


def call(*arguments):
    """Be `sfda-tune` here; return the exit code."""
    try:
        sfda_tune.cli.main.main(list(map(str, arguments)))
    except SystemExit as end:
        return end.code
    raise AssertionError("the command did not end by itself")


def search_twice(folder, command, options):
    """Search; then do it again as the page has it, with these `options`: nothing happens."""
    assert call(*command, "--out", folder, "-q") == 0
    found = SearchResult.open(folder)
    again = shlex.split(repeat(read_run(folder))[0])
    assert options <= set(again)
    assert call(*again[1:], "--out", folder, "--json") == 0
    assert SearchResult.open(folder).summary == found.summary
    return found


def run_command(arguments, out, err, environment):
    """Be `sfda-tune`; `out` and `err` are paths to append to."""
    _be_alone(out, err, environment)
    sfda_tune.cli.main.main(list(map(str, arguments)))


def run_script(arguments, out, err, environment):
    """Be ``python SCRIPT ...``."""
    _be_alone(out, err, environment)
    sys.argv = list(map(str, arguments))
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _be_alone(out, err, environment):
    """Have a process group, an environment and streams of one's own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(environment["PWD"])
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where pytest ignores it
    torch.set_num_threads(1)
