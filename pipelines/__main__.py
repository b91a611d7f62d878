"""The command `curlora …`, also `python -m pipelines …`.

The package installs without what the system needs, for those who want the adapter type alone; then this says so.
"""

import sys
from importlib.util import find_spec

NEEDED = ("click", "ray", "mlflow")


def main() -> None:
    """Run the command line; exit with code 1 if the packages of curlora[pipelines] are not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: the command needs the training system, of which {missing[0]} is not installed: pip install "
            "'curlora[pipelines]'"
        )
    from pipelines.cli.app import main as command_line  # only where it can be imported

    command_line()


if __name__ == "__main__":
    main()
