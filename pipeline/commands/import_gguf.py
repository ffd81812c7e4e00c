"""python -m pipeline import-gguf FILE.gguf to=models/NAME: use a local GGUF file as a model."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.common.errors import PipelineError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    # Loads torch, which takes seconds: --help and a wrong option answer without.
    from pipeline.models.gguf import convert
    from pipeline.models.loading import quiet_transformers

    quiet_transformers()
    try:
        made = convert(options.file, options.to, options.dtype)
    except PipelineError as error:
        print(f"import_gguf: {error}", file=sys.stderr)
        return error.exit_status
    if made:
        print(f"{options.to}: imported from {options.file.name} as {options.dtype}")
    else:
        print(f"{options.to}: there already. To import it again, remove the folder first")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline import-gguf",
        description="Dequantize a local GGUF file and save it as a folder of safetensors with its tokenizer, "
        "ready for model.name=FOLDER. Does nothing if the folder is there.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="such as models/NAME")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="of the saved weights (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
