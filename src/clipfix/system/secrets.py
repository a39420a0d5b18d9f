"""Secrets come in by environment variables and stay out of whatever a run writes, prints or sends."""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
NAMES = r"(?:token|secret|passw(?:or)?d|api[-_]?key|access[-_]?key(?:[-_]?id)?|signature|credential|sig)"
# What looks like a secret by what stands before it; the group is what may be shown.
LOOKS = re.compile(
    r"(://)[^/\s'\"@]+:[^/\s'\"@]+(?=@)"  # user:password of a url
    rf"|([?&][^=&\s'\"]*{NAMES}=)[^&\s'\"]+"  # of a signed url
    r"|(\bauthorization:\s*(?:\w+\s+)?+|\bbearer\s+|\b(?:x-)?api-key:\s*)[^\s'\"$]+",  # of a command that fetches
    re.IGNORECASE,
)
SECRET_VARIABLE = re.compile(rf"{NAMES}$", re.IGNORECASE)
SHORTEST = 8  # characters: `true` as the value of a variable would be hidden all over


def hidden(text: str) -> str:
    """The text without what looks like a secret, and without the values of environment variables named as one."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return LOOKS.sub(lambda found: (found[1] or found[2] or found[3]) + HIDDEN, text)


def without_secrets(node: Any) -> Any:
    """Nested lists and dicts, all their strings `hidden`."""
    if isinstance(node, dict):
        return {key: without_secrets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_secrets(value) for value in node]
    return hidden(node) if isinstance(node, str) else node


def check_words(words: Sequence[str]) -> None:
    """Refuses a secret on the command line: the shell's history, `ps` and W&B keep those words as they are."""
    for word in words:
        if hidden(word) != word:
            raise ValueError(
                f"{hidden(word)[:200]} holds a secret, and the shell's history, `ps` and W&B would keep it: put the "
                "value into an environment variable, say URL, and write ${oc.env:URL} here, in single quotes."
            )


class Record(logging.LogRecord):
    """What Python's logging writes, worker processes included; for `logging.setLogRecordFactory`."""

    def getMessage(self) -> str:
        return hidden(super().getMessage())
