"""The command line: python -m clipfix."""

import sys

from clipfix.cli import command, errors


def main() -> None:
    """Run the command. User errors end in a one-line message, bugs in a traceback."""
    with errors.in_one_line():
        command.run_command(sys.argv[1:])


if __name__ == "__main__":
    main()
