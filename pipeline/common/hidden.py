"""Leave out of what is shown around what nobody else should read."""

import re


def hide_environment(word: str) -> str:
    """Leave out what a word of a command line sets a variable of a cluster's job to: it may be a token."""
    return re.sub(r"(?<=submit\.environment)([\w.]*)=.*", r"\1=…", word, flags=re.DOTALL)


def hide_passwords(text: str) -> str:
    """Leave names and passwords out of the addresses in a text."""
    return re.sub(r"://[^/\s@]+@", "://…@", text)
