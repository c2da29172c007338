"""In a notebook: a bar by itself, drawn by IPython, which needs no widgets for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CELLS = """
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

shown = []

class Publisher(DisplayPublisher):
    def publish(self, data, metadata=None, *args, transient=None, update=False, **more):
        shown.append((update, transient, data))

class ZMQInteractiveShell(InteractiveShell):  # the name by which a notebook is known
    def init_display_pub(self):
        self.display_pub = Publisher(parent=self)

shell = ZMQInteractiveShell.instance()
cell = "import sfda_tune; sfda_tune.rank('digits', 'demo:res*', samples=300, cache=False)"
assert shell.run_cell(cell).success
assert len({str(transient) for _, transient, _ in shown}) == 1  # one place, drawn again and again
assert [update for update, *_ in shown] == [False] + [True] * (len(shown) - 1)
assert any("images" in data.get("text/html", "") for *_, data in shown)
assert shown[-1][2]["text/html"] == ""  # and gone at the end
"""


def test_a_notebook_has_a_bar_and_a_script_has_none(clean_environment):
    pytest.importorskip("IPython", reason="no IPython: pip install ipython")
    command = [sys.executable, "-c", CELLS]
    result = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    script = "import sfda_tune; sfda_tune.rank('digits', 'demo:res*', samples=300, cache=False)"
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment, timeout=300
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
