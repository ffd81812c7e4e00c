"""Write a checkpoint of random weights in the shape of a model that conf/ names, with the tokenizer of another.

python benchmarks/memory_shapes.py llama1b FOLDER models/SmolLM2-135M-Instruct
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 2 * 10**9


def write_checkpoint(model: str, folder: Path, tokenizer: Path) -> None:
    """Weights are one block of noise, over and over: no figure of memory depends on them."""
    facts = yaml.safe_load((ROOT / "conf" / "model" / f"{model}.yaml").read_text())["architecture"]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(**{key: value for key, value in facts.items() if key != "of"} | ends)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(network).__name__]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    noise = (0.02 * torch.randn(1 << 24)).to(torch.bfloat16)
    places, shard, size = dict[str, str](), dict[str, torch.Tensor](), 0
    weights = list(network.named_parameters())
    for index, (name, weight) in enumerate(weights):
        count = weight.numel()
        shard[name] = noise.repeat(-(-count // noise.numel()))[:count].view(weight.shape).clone()
        size += 2 * count
        if size > SHARD_BYTES or index + 1 == len(weights):
            file = f"model-{index:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    index_file = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder)


if __name__ == "__main__":
    write_checkpoint(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
