"""``python -m sfda_tune``, and ``sfda-tune``: hears Ctrl-C also while the rest is imported."""

import sys


def main() -> None:
    """Import the command line, and run it."""
    try:
        from sfda_tune.cli.main import main
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    main()


if __name__ == "__main__":
    main()
