"""The command line: python -m clipfix."""

import sys

from clipfix.cli import command, errors


def main() -> None:
    """Run the command: one readable line for the user's mistakes, a traceback for ours."""
    with errors.in_one_line():
        command.start(sys.argv[1:])


if __name__ == "__main__":
    main()
