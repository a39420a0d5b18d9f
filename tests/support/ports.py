"""Free ports for rendezvous, below the range that the system assigns to connections."""

import random
import socket

LOWEST, HIGHEST = 15_000, 32_000
DRAWS = random.SystemRandom()  # other generators may have the same seed in two test processes


def free_port(row: int = 1) -> int:
    """Return the first of `row` consecutive free ports."""
    while True:
        first = DRAWS.randrange(LOWEST, HIGHEST - row)
        try:
            for port in range(first, first + row):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
