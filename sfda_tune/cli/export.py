"""The command ``sfda-tune export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sfda_tune.cli.options import AsJson, Debug, Imports
from sfda_tune.cli.terminal import output, print_json
from sfda_tune.pipelines.terminal import say
from sfda_tune.values.files import check_folder

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished search.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Default: RUN/export.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="As ONNX; so far there is no other form.")
    ] = True,
    imports: Imports = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the winner of the search in RUN as ONNX, with its preprocessing and a model card.

    Both networks are shown the test images, and how they differ is told.

    For example:

      sfda-tune export run/ --onnx
    """
    from sfda_tune.pipelines.export import export_onnx

    if out is not None:
        check_folder("--out", out)
    found = export_onnx(run, out, plugins=imports or ())
    if as_json:
        print_json(asdict(found) | {"folder": str(found.folder)})
    else:
        say(output, found)
