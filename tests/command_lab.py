"""`sfda-tune` in a process of its own that is forked where all is imported already.

Importing takes longer than a small ranking, and a signal is to hit the work, not the imports.
"""

import os
import signal
import sys
import threading

import torch

import sfda_tune.cli.main


def run_command(arguments, out, err, environment):
    """Be `sfda-tune`, with a process group of its own; `out` and `err` are paths to append to."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where pytest ignores it
    torch.set_num_threads(1)
    assert threading.active_count() == 1
    sfda_tune.cli.main.main(list(map(str, arguments)))
