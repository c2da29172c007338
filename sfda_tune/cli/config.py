"""``--config run.yaml``: options from a file, and the file beside each result."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from sfda_tune.values.files import read_text, write_text
from sfda_tune.values.redaction import redact

__all__ = ["take_config", "write_config"]

# What is of one call alone, or about the file itself
_NOT_KEPT = ("out", "quiet", "verbose", "log", "as_json", "debug", "dry_run", "config", "help")


def take_config(arguments: list[str], app: Any) -> tuple[list[str], dict[str, Any]]:
    """Take ``--config FILE`` out of the arguments; return the rest, and defaults for the commands.

    The file is YAML (or JSON, which is YAML), a mapping of the options of the command by their
    names on the command line. What stands on the command line counts more.

    Raises
    ------
    ValueError
        If the file cannot be read, or names what is no option of the command.
    """
    rest, file = [], None
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--config":
            file = next(words, "")
        elif word.startswith("--config="):
            file = word.partition("=")[2]
        else:
            rest.append(word)
    if file is None:
        return rest, {}
    import typer

    command = next((word for word in rest if not word.startswith("-")), "")
    found = getattr(typer.main.get_command(app), "commands", {}).get(command)
    if found is None or command == "cache":
        raise ValueError("--config must stand after a command, such as `sfda-tune rank`.")
    return rest, {command: _read(file, command, found)}


def _options(command: Any) -> dict[str, Any]:
    """Return name on the command line, without dashes → parameter."""
    found = {}
    for parameter in command.params:
        words = [word.lstrip("-") for word in parameter.opts if word.startswith("--")]
        for word in words or [parameter.name]:
            found[word] = parameter
    return {word: p for word, p in found.items() if p.name not in ("help", "config")}


def _read(file: str, command: str, found: Any) -> dict[str, Any]:
    import yaml

    options = _options(found)
    try:
        values = yaml.safe_load(read_text(file))
    except FileNotFoundError:
        raise ValueError(f"--config must be a YAML file but {file!r} does not exist.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"--config {file!r} cannot be read as YAML: {why}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"--config {file!r} must hold options and their values, such as race: true."
        )
    settings = {}
    for key, value in values.items():
        word = key.replace("_", "-").lstrip("-")
        if word not in options:
            near = difflib.get_close_matches(word, options, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(options)}."
            raise ValueError(
                f"--config {file!r}: {key!r} is no option of `sfda-tune {command}`; {hint}"
            )
        if value is not None:
            settings[options[word].name] = _check(
                f"--config {file!r}: {key!r}", options[word], value
            )
    return settings


def _check(what: str, parameter: Any, value: Any) -> Any:
    """Return the value of a parameter as its command takes it, or say why there is none."""
    is_list = getattr(parameter, "multiple", False) or parameter.nargs != 1
    if is_list and not isinstance(value, list):
        value = [value]
    if not is_list and isinstance(value, list):
        raise ValueError(f"{what} must be one value but is the list {value!r}.")
    for one in value if is_list else [value]:
        if isinstance(one, bool) and not getattr(parameter, "is_flag", False):
            raise ValueError(f"{what} is no switch but is {one!r}; if it is a text, quote it.")
        if not isinstance(one, (str, int, float)):
            kind = type(one).__name__
            raise ValueError(f"{what} must be text or a number but is {one!r} ({kind}); quote it.")
    return value


def _plain(value: Any) -> str | int | float:
    return value if isinstance(value, (str, int, float)) else str(value)


def write_config(context: Any, path: Path) -> None:
    """Write what a command was called with as a file that ``--config`` takes."""
    import yaml

    head, values = f"# sfda-tune {context.info_name} --config {path.name}\n", {}
    for word, parameter in _options(context.command).items():
        value = context.params.get(parameter.name)
        if parameter.name in _NOT_KEPT or value in (None, (), []):
            continue
        if isinstance(value, str) and redact(value) != value:
            head += f"# {word} is left out: it holds a secret\n"
        elif isinstance(value, (tuple, list)):
            values[word] = [_plain(one) for one in value]
        else:
            values[word] = _plain(value)
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
