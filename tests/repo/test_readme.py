"""The README's commands are those of CI, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _block(heading: str) -> str:
    section = README.split(f"## {heading}", 1)[1]
    found = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1].strip()


def test_ci_runs_exactly_the_readme_s_test_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[:2] == ["set -eu", 'cd "$(dirname "$0")/.."']
    assert commands[2] == ".ci/install"
    assert "\n".join(commands[3:]) == _block("Set-up and tests")


def test_both_set_up_commands_are_one_line():
    for heading in ("Set-up and first ranking", "Set-up and tests"):
        block = _block(heading)
        assert len(block.splitlines()) == 1
        assert block.startswith("python3 -m venv .venv && ")


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+?)\)", (ROOT / file).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_example_is_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    files = sorted((ROOT / "examples").glob("*.py"))
    assert len(files) >= 2
    for file in files:
        assert file.name in listed
