"""Show bytes and seconds to people, and read sizes that they write. MB is 10⁶ bytes, GB is 10⁹."""

import re

KB, MB, GB = 10**3, 10**6, 10**9
MIB, GIB = 2**20, 2**30
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


def megabytes(size_bytes: float | None) -> str:
    """Show bytes as 1,234.5 MB, and None as a dash."""
    return "-" if size_bytes is None else f"{size_bytes / MB:,.1f} MB"


def small_bytes(size_bytes: float) -> str:
    """Show bytes as 1,234.5 MB, 1.2 kB or 576 B, so that a norm's weights are not 0.0 MB."""
    if size_bytes >= MB // 10:
        return megabytes(size_bytes)
    return kilobytes(size_bytes) if size_bytes >= KB else f"{size_bytes} B"


def kilobytes(size_bytes: float) -> str:
    """Show bytes as 131.1 kB."""
    return f"{size_bytes / KB:,.1f} kB"


def in_megabytes(size_bytes: float, *, exact: bool = False) -> str:
    """Show bytes as 1,234.5, for a column headed MB; exact is to the byte where it is less than 0.05 MB."""
    return f"{size_bytes / MB:,.{6 if exact and 0 < size_bytes < 50_000 else 1}f}"


def in_gigabytes(size_bytes: float | None) -> str:
    """Show bytes as 24.03, for a column headed GB, and None as a dash."""
    return "-" if size_bytes is None else f"{size_bytes / GB:,.2f}"


def gigabytes(size_bytes: float | None) -> str:
    """Show bytes as 24.0 GB, and None as a dash."""
    return "-" if size_bytes is None else f"{size_bytes / GB:,.1f} GB"


def parse_bytes(size: str) -> int:
    """Read a size: "24GB" is 24 · 10⁹, "24GiB" and "24G" are 24 · 2³⁰.

    Raises:
        ValueError: it is neither, or zero.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", size.strip())
    if not match or match[2].lower() not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"{size!r} is not a size: write it as 24GB or 24GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def duration(seconds: float | None) -> str:
    """Show seconds as 42 s, 3 min, 2 h 05 or 4 d 03 h, and None as a dash."""
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02}"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"
