"""The command ``sfda-tune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfda_tune.cli.options import Debug, Imports
from sfda_tune.cli.terminal import output
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
    say(output, export_onnx(run, out, plugins=imports or ()))
