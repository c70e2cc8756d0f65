"""`python -m condor_lite`. The scoring workers import this module too, so it imports nothing heavy."""

from __future__ import annotations

import sys

from condor_lite import stopping


def main() -> int:
    """Run the command line; returns the exit code."""
    stopping.install()
    from condor_lite import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
