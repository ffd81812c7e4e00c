"""Turn a local GGUF file into a model's folder."""

import os
import sys
from pathlib import Path

from pipeline.commands.arguments import take_paths
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus

EXAMPLES = {"to": "models/NAME", "dtype": "bfloat16"}
DTYPES = ("bfloat16", "float16", "float32")
HELP = """\
  python -m pipeline import-gguf FILE.gguf to=models/NAME      then: model.name=models/NAME

Dequantizes the file and saves it as safetensors with its tokenizer. Does nothing if the folder is there.

  to=FOLDER        where the model goes
  dtype=bfloat16   of the saved weights; or float16, float32
"""


def main(arguments: list[str]) -> ExitStatus:
    """Convert the file, unless that was done before.

    Raises:
        ConfigError: the command line is wrong.
        LoadError: the file cannot be read, or the folder holds something else.
    """
    file, folder, dtype = parse(arguments)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    from pipeline.models.gguf import convert  # torch, which takes seconds
    from pipeline.models.loading import quiet_transformers

    quiet_transformers()
    if convert(file, folder, dtype):
        print(f"{folder}: imported from {file.name} as {dtype}")
    else:
        print(f"{folder}: there already. To import it again, remove the folder first")
    return ExitStatus.DONE


def parse(arguments: list[str]) -> tuple[Path, Path, str]:
    """Take the file, the folder and the dtype apart.

    Raises:
        ConfigError: one is missing, or there is no such dtype.
    """
    files, values = take_paths(arguments, EXAMPLES)
    if len(files) != 1 or "to" not in values:
        raise ConfigError(
            "one file, and the folder that it goes to", "As import-gguf FILE.gguf to=models/NAME"
        )
    dtype = values.get("dtype", "bfloat16")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: no such dtype", f"There are: {', '.join(DTYPES)}.")
    return files[0], Path(values["to"]), dtype
