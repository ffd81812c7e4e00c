"""Copy OpenVINO's packages into avx2/ of its environment, where they take any CPU for one with AVX2 alone.

    benchmarks/.envs/openvino/bin/python benchmarks/hold_to_avx2.py

Its own kernels ask the CPU and heed no variable. In the copy each `cpuid` is a `ud2`, which is two bytes
long, too, and raises a signal; avx2/answer.so, loaded first, answers it. Needs gcc and objdump.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = ("openvino", "openvino_genai", "openvino_tokenizers")
CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"


def hold(packages: list[Path], to: Path) -> None:
    """Copy packages, as links but for the libraries that ask the CPU, and compile what answers them."""
    shutil.rmtree(to, ignore_errors=True)
    for package in packages:
        shutil.copytree(package, to / package.name, copy_function=os.link)
    for library in to.rglob("*.so*"):
        if places := cpuids(library):
            code = bytearray(library.read_bytes())
            for place in places:
                assert code[place : place + 2] == CPUID, f"{library}: no cpuid at {place:#x}"
                code[place : place + 2] = UD2
            library.unlink()  # the original has its bytes in the same file
            library.write_bytes(code)
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(to / "answer.so"), str(source)], check=True)


def cpuids(library: Path) -> list[int]:
    """List the places in a library's file where its code asks the CPU."""
    command = ["objdump", "--section-headers", "--disassemble", "--section=.text", "--no-show-raw-insn"]
    places, offset = [], 0
    with subprocess.Popen([*command, str(library)], stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout
        for line in listing.stdout:
            words = line.split()
            if words[1:2] == [".text"]:  # number, name, size, address, address, place in the file
                offset = int(words[5], 16) - int(words[3], 16)
            elif words[1:] == ["cpuid"]:
                places.append(int(words[0].rstrip(":"), 16) + offset)
    if listing.returncode:
        raise subprocess.CalledProcessError(listing.returncode, command)
    return places


if __name__ == "__main__":
    site = Path(sysconfig.get_path("purelib"))
    hold([site / package for package in PACKAGES], Path(sys.prefix, "avx2"))
