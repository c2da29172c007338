"""A command or a script in a process of its own that is forked where all is imported already.

Importing takes longer than a small ranking, and a signal is to hit the work, not the imports.
"""

import os
import runpy
import signal
import sys

import torch

import sfda_tune.cli.main


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
