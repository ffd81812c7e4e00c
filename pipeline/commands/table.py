"""Name every command that can be typed, and find its file."""

from importlib import import_module
from types import ModuleType

COMMANDS = {
    "run": "Run a job, or with -m a sweep of jobs; this is what a line without a command does",
    "demo": "Run a first job on a small real model, which it fetches",
    "plan": "Say whether a job fits in memory, before a weight is downloaded",
    "inspect": "Show tokens, chat template, batch, architecture or one step of a model",
    "doctor": "Say whether a job will run on this machine, and what is missing",
    "submit": "Run a sweep on Slurm, and return at once",
    "status": "Show how far jobs are",
    "merge": "Join the shards of a job into one outputs.jsonl, in the order of the prompt file",
    "export": "Write a job's answers as OpenAI's batch output, Parquet, CSV, JSON Lines or a dataset",
    "score": "Say what quantization changed: other models read a baseline's completions",
    "report": "Set jobs side by side: memory, speed, quality",
    "import-gguf": "Turn a local GGUF file into a model's folder",
}


def module_of(command: str) -> ModuleType:
    """Import a command's file, which holds its HELP and its `main(arguments) -> ExitStatus`."""
    return import_module(f"pipeline.commands.{command.replace('-', '_')}")
