"""Removal of secrets from everything that a run writes, prints or sends. Secrets belong into environment variables."""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from clipfix.system.terminal import visible

HIDDEN = "***"
NAMES = r"(?:token|secret|passw(?:or)?d|api[-_]?key|access[-_]?key(?:[-_]?id)?|signature|credential|sig)"
# Matches secrets by the text before them; the groups are the parts that may be shown.
LOOKS = re.compile(
    r"(://)[^/\s'\"@]+:[^/\s'\"@]+(?=@)"  # user:password in a url
    rf"|([?&][^=&\s'\"]*{NAMES}=)[^&\s'\"]+"  # signature in a url
    r"|(\bauthorization:\s*(?:\w+\s+)?+|\bbearer\s+|\b(?:x-)?api-key:\s*)[^\s'\"$]+",  # header in a command
    re.IGNORECASE,
)
SECRET_VARIABLE = re.compile(rf"{NAMES}$", re.IGNORECASE)
SHORTEST = 8  # characters; shorter values, such as `true`, occur in other text


def hidden(text: str) -> str:
    """Return the text with `***` in place of secrets: matches of LOOKS, and values of variables with such names."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return LOOKS.sub(lambda match: (match[1] or match[2] or match[3]) + HIDDEN, text)


def without_secrets(node: Any) -> Any:
    """Return nested lists and dicts with `hidden` applied to all strings."""
    if isinstance(node, dict):
        return {key: without_secrets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_secrets(value) for value in node]
    return hidden(node) if isinstance(node, str) else node


def check_words(words: Sequence[str]) -> None:
    """Raise ValueError for a secret on the command line, which the shell's history, `ps` and W&B would show."""
    for word in words:
        if hidden(word) != word:
            raise ValueError(
                f"{hidden(word)[:200]} holds a secret, which the shell's history, `ps` and W&B would show: put the "
                "value into an environment variable, such as URL, and write ${oc.env:URL} here, in single quotes."
            )


class Record(logging.LogRecord):
    """A log record without secrets and control characters, for `logging.setLogRecordFactory` in all processes."""

    def getMessage(self) -> str:
        return visible(hidden(super().getMessage()))
