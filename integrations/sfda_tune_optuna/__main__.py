"""Command line: ``python -m sfda_tune_optuna enqueue --storage URL --study-name NAME --top-k 3``.

For studies that are driven by ``optuna ask``, which knows no sampler but Optuna's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.exc import SQLAlchemyError

from sfda_tune.values.ranking import Ranking
from sfda_tune.values.redaction import hide_secrets, redact
from sfda_tune_optuna.store import load_ranking, load_record, save_ranking
from sfda_tune_optuna.study import calibrate_study, enqueue_top_k, find_param_name

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sfda_tune_optuna", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--storage", required=True, help="URL of a database, or a journal file")
    shared.add_argument("--study-name", required=True, help="an existing study")
    shared.add_argument(
        "--ranking",
        help="file that `sfda-tune --json` or Ranking.to_json wrote; default: the study's own",
    )
    shared.add_argument(
        "--param-name", help="of the backbone; default: the study's own, or backbone"
    )
    enqueue = commands.add_parser("enqueue", parents=[shared], help="try the best backbones first")
    enqueue.add_argument("--top-k", type=int, default=3, help="how many; default: 3")
    commands.add_parser("calibrate", parents=[shared], help="say what the scores are worth here")
    options = parser.parse_args(arguments)
    try:
        study = optuna.load_study(
            study_name=options.study_name, storage=_open_storage(options.storage)
        )
        ranking = Ranking.from_json(options.ranking) if options.ranking else load_ranking(study)
        param_name = options.param_name or find_param_name(study)
        if options.command == "calibrate":
            sys.stdout.write(f"{calibrate_study(study, ranking, param_name=param_name)}\n")
            return 0
        names = enqueue_top_k(study, ranking, options.top_k, param_name=param_name)
        if load_record(study) is None:
            save_ranking(study, ranking, settings={"param_name": param_name})
    except KeyError:
        parser.error(
            f"--study-name: {redact(options.storage)} has no study {options.study_name!r}"
        )
    except (OSError, ValueError, ImportError, SQLAlchemyError) as error:
        parser.error(hide_secrets(str(error), options.storage))
    sys.stdout.write("".join(f"{name}\n" for name in names))
    return 0


def _open_storage(storage: str) -> Any:
    if "://" in storage:
        return storage
    if not Path(storage).is_file():  # Optuna would make one
        raise FileNotFoundError(f"--storage: there is no journal file {storage!r}")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(storage))


if __name__ == "__main__":
    sys.exit(main())
