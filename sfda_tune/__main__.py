"""``python -m sfda_tune``: the command line where the script is not on the path."""

from sfda_tune.cli.main import main

if __name__ == "__main__":
    main()
