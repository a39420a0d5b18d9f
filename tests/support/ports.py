"""Ports for ranks to meet at: below those that the system hands to connections, so that none takes one first."""

import random
import socket

LOWEST, HIGHEST = 15_000, 32_000
DRAWS = random.SystemRandom()  # two test processes may have seeded the usual one alike


def free_port(row: int = 1) -> int:
    """The first of so many in a row at which nobody listens."""
    while True:
        first = DRAWS.randrange(LOWEST, HIGHEST - row)
        try:
            for port in range(first, first + row):
                with socket.socket() as tried:
                    tried.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
