"""What the kernels say on this CPU they say on older ones of its kind: the same tests, compiled for those."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.cpu import load_kernels

kernels = load_kernels()
if kernels is None or kernels.products is None:
    pytest.skip("the kernels multiply on none but an x86 CPU with AVX2", allow_module_level=True)

from cpu_products import OLDER, WITHOUT_VNNI, older_cpu  # noqa: E402  without the kernels it cannot be imported

HERE = Path(__file__).parent
# What in each file depends on the CPU's vectors: parts of names.
DEPENDING = {
    "test_cpu_kernels.py": ("test_attention_over_rectangles", "linear_vectors", "causal_attention"),
    "test_eight_bits.py": ("linear_vectors",),
    "test_four_bits.py": ("linear_vectors",),
    "test_linear_floats.py": ("float32",),
}


@pytest.mark.parametrize(
    ("file", "newer"),
    [
        *itertools.product(DEPENDING, OLDER),
        *itertools.product(("test_eight_bits.py", "test_four_bits.py"), WITHOUT_VNNI),
    ],
)
def test_an_older_cpu_of_this_kind_says_the_same(file: str, newer: tuple[str, ...]) -> None:
    """One without instructions for bf16, and one without AVX-512; an older CPU yet is tested as itself."""
    names = DEPENDING[file]
    command = [sys.executable, "-m", "pytest", "-v", str(HERE / file), "-k", " or ".join(names)]
    done = subprocess.run(command, env=older_cpu(newer), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" not in done.stdout
    assert all(re.search(rf"{name}.* PASSED", done.stdout) for name in names)


def test_a_cpu_without_fused_multiply_add_leaves_products_to_torch() -> None:
    """As some virtual machines show theirs: our products would end the process."""
    code = (
        "import torch\n"
        "from pipeline.engine.cpu import load_kernels\n"
        "kernels = load_kernels()\n"
        "print(kernels.products, kernels.attends_causally(64, torch.float32))"
    )
    env = older_cpu((*OLDER[1], "fma"))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "None False", done.stderr
