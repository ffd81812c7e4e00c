"""Find which GPUs a job would get, from what the drivers' own tools print and the environment hides.

The parsers take text. A GPU that is there, but of which no tool tells, is one without numbers: not none.
"""

import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.common.gpu import Gpu
from pipeline.common.units import GB, MIB

QUERY = "uuid,memory.total,memory.free,compute_cap"
# Files that a driver makes where it has a GPU. Intel's are every graphics card's.
FILES = {"cuda": ("/dev/nvidiactl", "/dev/dxg"), "rocm": ("/dev/kfd",), "xpu": ("/dev/dri/renderD128",)}
UNREADABLE = {"cuda": "an NVIDIA GPU", "rocm": "an AMD GPU", "xpu": "an Intel GPU"}


def backends(torch_version: str, platform: str, machine: str) -> tuple[str, ...]:
    """List the kinds of GPU that an installed torch may use: its version says what it is built for.

    A version without a suffix, as 2.11.0, may be built for anything but Apple's.
    """
    if platform == "darwin":
        return ("mps",) if machine == "arm64" else ()
    build = torch_version.partition("+")[2]
    for prefix, kinds in (("cpu", ()), ("cu", ("cuda",)), ("rocm", ("rocm",)), ("xpu", ("xpu",))):
        if build.startswith(prefix):
            return kinds
    return ("cuda", "rocm", "xpu")


def find_gpus(kinds: Iterable[str], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Find the GPUs of the first of these kinds that this machine has, as far as the environment leaves them."""
    kinds = tuple(kinds)
    for kind in kinds:
        found = {"cuda": _nvidia, "rocm": _amd, "xpu": _intel}[kind](environ)
        if (
            found is None
            and (kind != "xpu" or kinds == ("xpu",))
            and any(Path(f).exists() for f in FILES[kind])
        ):
            found = () if hides_all(kind, environ) else (Gpu(kind, UNREADABLE[kind]),)
        if found:
            return found
    return ()


def hides_all(kind: str, environ: Mapping[str, str]) -> bool:
    """Say whether the environment hides every GPU: its list begins with what can name none, as -1 or nothing."""
    names = {"cuda": ["CUDA_VISIBLE_DEVICES"], "xpu": ["ZE_AFFINITY_MASK"]}
    names["rocm"] = ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]
    values = (environ[name] for name in names[kind] if name in environ)
    return any(not re.match(r"\s*([0-9]|GPU-|MIG-)", value) for value in values)


def visible(cards: Sequence[Sequence[Gpu]], names: str | None) -> tuple[Gpu, ...]:
    """Return what CUDA shows of these cards, in the order of CUDA_VISIBLE_DEVICES.

    The list ends at the first name that names nothing; a GPU that is named twice hides all. Ids may be cut
    short as long as they are unique. Of slices, CUDA shows a process one.

    Args:
        cards: each a card alone, or its slices.
        names: as "1,0", "GPU-5c89", "MIG-c6d4f1ef-…" or "-1"; None shows all.
    """
    shown: list[Gpu] = []
    for name in map(str, range(len(cards))) if names is None else names.split(","):
        if (gpu := _named(cards, name.strip())) is None:
            break
        if gpu in shown:
            return ()
        shown.append(gpu)
    if shown and shown[0].mig:
        return (shown[0],)
    return tuple(gpu for gpu in shown if not gpu.mig)


def _named(cards: Sequence[Sequence[Gpu]], name: str) -> Gpu | None:
    if name.isdigit():
        card = cards[int(name)] if int(name) < len(cards) else ()
        return card[0] if card else None
    ids = name.startswith(("GPU-", "MIG-"))
    found = [gpu for card in cards for gpu in card if ids and (gpu.uuid or "").startswith(name)]
    return found[0] if len(found) == 1 else None


def parse_nvidia(listed: str, queried: str) -> list[list[Gpu]]:
    """Read the cards of `nvidia-smi -L`, each alone or as its MIG slices, with the numbers of QUERY, by id."""
    numbers = {fields[0]: fields for line in queried.splitlines() if (fields := _fields(line))}
    cards: list[list[Gpu]] = []
    for line in listed.splitlines():
        if found := re.fullmatch(r"GPU \d+: (.+) \(UUID: (.+)\)\s*", line):
            card = _nvidia_card(found[1], found[2], numbers.get(found[2], []))
            cards.append([card])
        elif cards and (found := re.fullmatch(r"\s+(MIG \S+)\s+Device\s+\d+: \(UUID: (.+)\)\s*", line)):
            cards[-1] = [gpu for gpu in cards[-1] if gpu.mig] + [_slice(card, found[1], found[2])]
    return cards


def _slice(card: Gpu, profile: str, uuid: str) -> Gpu:
    """Describe a part of a card. No query tells its memory: its profile does, as 1g.10gb, a little below the real."""
    size = re.search(r"\.(\d+)gb", profile)
    total_bytes = int(size[1]) * GB if size else None
    return replace(card, name=f"{card.name} {profile}", total_bytes=total_bytes, free_bytes=None, uuid=uuid)


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.split(",")]


def _nvidia_card(name: str, uuid: str, fields: Sequence[str]) -> Gpu:
    """Read fields as in QUERY; what the driver does not tell is "[N/A]" there, or the query failed."""
    total, free, capability = [*fields, "", "", "", ""][1:4]
    version = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return Gpu(
        "cuda",
        name,
        int(total) * MIB if total.isdigit() else None,
        int(free) * MIB if free.isdigit() else None,
        (int(version[1]), int(version[2])) if version else None,
        uuid,
    )


def parse_rocm_smi(text: str) -> list[Gpu]:
    """Read `rocm-smi --showproductname --showmeminfo vram --showuniqueid --json`."""
    cards = _json(text)
    numbered = {
        int(name[4:]): {key.lower(): value for key, value in fields.items()}
        for name, fields in (cards.items() if isinstance(cards, dict) else ())
        if re.fullmatch(r"card\d+", name) and isinstance(fields, dict)
    }
    return [_rocm_card(numbered[index]) for index in sorted(numbered)]


def _rocm_card(fields: Mapping[str, Any]) -> Gpu:
    total = _bytes(fields.get("vram total memory (b)"), 1)
    used = _bytes(fields.get("vram total used memory (b)"), 1)
    series = fields.get("card series") or fields.get("card model") or UNREADABLE["rocm"]
    unique = str(fields.get("unique id", "")).removeprefix("0x")
    return Gpu("rocm", str(series), total, _rest(total, used), uuid=f"GPU-{unique}" if unique else None)


def parse_amd_smi(metric: str, static: str) -> list[Gpu]:
    """Read `amd-smi metric --mem-usage --json`, with the names of `amd-smi static --asic --json`. Its MB are MiB."""
    names = {entry.get("gpu"): entry.get("asic", {}).get("market_name") for entry in _amd_entries(static)}
    found = []
    for entry in sorted(_amd_entries(metric), key=lambda entry: int(entry.get("gpu", 0))):
        usage = entry.get("mem_usage", {})
        total, used = (_bytes(usage.get(key), MIB) for key in ("total_vram", "used_vram"))
        name = names.get(entry.get("gpu")) or UNREADABLE["rocm"]
        found.append(Gpu("rocm", name, total, _rest(total, used)))
    return found


def _amd_entries(text: str) -> list[dict[str, Any]]:
    """Take out the list; in later versions it is under "gpu_data"."""
    loaded = _json(text)
    entries = loaded.get("gpu_data") if isinstance(loaded, dict) else loaded
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def parse_xpu_smi(text: str) -> Gpu | None:
    """Read `xpu-smi discovery -d 0 -j`."""
    fields = _json(text)
    if not isinstance(fields, dict) or "device_name" not in fields:
        return None
    total, free = (_bytes(fields.get(f"memory_{key}_size_byte"), 1) for key in ("physical", "free"))
    return Gpu("xpu", str(fields["device_name"]), total, free)


def _json(text: str) -> Any:
    """Read a tool's JSON, behind whatever warnings it writes first; None if there is none."""
    start = re.search(r"^[\[{]", text, re.MULTILINE)
    try:
        return json.loads(text[start.start() :]) if start else None
    except ValueError:
        return None


def _bytes(value: Any, unit: int) -> int | None:
    """Read a number, one as text, or as {"value": …}; None for "N/A" and the like."""
    value = value.get("value") if isinstance(value, dict) else value
    return int(value) * unit if str(value).isdigit() else None


def _rest(total: int | None, used: int | None) -> int | None:
    return None if total is None or used is None else max(0, total - used)


def _nvidia(environ: Mapping[str, str]) -> tuple[Gpu, ...] | None:
    if not (listed := _run("nvidia-smi", "-L")):
        return None
    queried = _run("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    return visible(parse_nvidia(listed, queried), environ.get("CUDA_VISIBLE_DEVICES"))


def _amd(environ: Mapping[str, str]) -> tuple[Gpu, ...] | None:
    """Apply ROCR's list first, then HIP's of what that leaves; CUDA's counts where HIP's is missing."""
    shown = ("--showproductname", "--showmeminfo", "vram", "--showuniqueid", "--json")
    found = parse_rocm_smi(_run("rocm-smi", *shown)) or parse_amd_smi(
        _run("amd-smi", "metric", "--mem-usage", "--json"), _run("amd-smi", "static", "--asic", "--json")
    )
    if not found:
        return None
    left = visible([[gpu] for gpu in found], environ.get("ROCR_VISIBLE_DEVICES"))
    second = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES"))
    return visible([[gpu] for gpu in left], second)


def _intel(environ: Mapping[str, str]) -> tuple[Gpu, ...] | None:
    """Ask xpu-smi. A mask may name tiles, as 0.1: of these the memory is not known."""
    listed = _json(_run("xpu-smi", "discovery", "-j"))
    entries = listed.get("device_list", []) if isinstance(listed, dict) else []
    ids = [str(entry["device_id"]) for entry in entries if "device_id" in entry]
    found = [gpu for i in ids if (gpu := parse_xpu_smi(_run("xpu-smi", "discovery", "-d", i, "-j")))]
    return masked(found, environ.get("ZE_AFFINITY_MASK")) if found else None


def masked(gpus: Sequence[Gpu], mask: str | None) -> tuple[Gpu, ...]:
    """Return what ZE_AFFINITY_MASK leaves of Intel's GPUs."""
    shown = visible([[gpu] for gpu in gpus], mask and re.sub(r"\.\d+", "", mask))
    return (
        tuple(replace(g, total_bytes=None, free_bytes=None) for g in shown) if "." in (mask or "") else shown
    )


def _run(*command: str) -> str:
    """Return what a tool prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
