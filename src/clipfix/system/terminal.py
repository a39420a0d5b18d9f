"""Text from files, made safe to print: captions, keys and names could carry escape sequences of a terminal."""

import re
from typing import Any

# Control characters but tab and newline, and those that reverse the direction of the text after them.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return the text with control characters as escapes, `\\x1b`; carriage returns before newlines are removed."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def all_visible(node: Any) -> Any:
    """Return nested dicts and lists with `visible` applied to all strings, keys included."""
    if isinstance(node, dict):
        return {all_visible(key): all_visible(value) for key, value in node.items()}
    if isinstance(node, list):
        return [all_visible(value) for value in node]
    return visible(node) if isinstance(node, str) else node
