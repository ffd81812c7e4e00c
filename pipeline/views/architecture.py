"""Show the module tree of a model as it will be loaded, from its config alone: no weight is read or made.

models/meta.py builds it. Bytes are those of the stored tensors.
"""

import re
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from pipeline.common.errors import ConfigError, LoadError
from pipeline.config.quant import QuantConfig, quant_name
from pipeline.config.schema import ModelConfig
from pipeline.engine.accelerators import usable_gpus
from pipeline.memory.facts import job_architecture
from pipeline.memory.plan import footprint_bytes, quant_state_bytes
from pipeline.models.checkpoint import find_checkpoint, locate
from pipeline.models.config_checks import check_adapter
from pipeline.models.loading import quiet_transformers
from pipeline.models.loading_checks import first_line
from pipeline.models.meta import build_on_meta, loaded_as
from pipeline.models.quantized_share import QuantizedShare, packed_shape, quantized_share

_SHAPES = ("in_features", "out_features", "num_embeddings", "embedding_dim")


@dataclass(frozen=True, slots=True)
class Node:
    """Hold a module, or `count` neighbours that are the same; parameters and bytes are those of all of them."""

    name: str  # "layers.0-31" where folded
    kind: str  # the class
    shape: str  # "4096 → 14336" of a linear layer, the weight's "576" of a norm, else ""
    count: int
    parameters: int
    dtype: str  # as stored; "bfloat16 + nf4" of a module that holds both
    bytes: int
    note: str
    children: list["Node"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ArchitectureView:
    """Hold the whole tree.

    Bytes are `get_memory_footprint()` of the loaded model; `predicted_bytes` is the memory plan's figure.
    """

    model: str
    source: str  # of the config
    quant: str
    tree: Node
    parameters: int
    bytes: int
    predicted_bytes: int | None  # None where the memory plan does not know the architecture
    quant_state_bytes: int | None  # beside the footprint
    quantized: QuantizedShare | None  # None where nothing was asked to be
    windows: list[int | None]  # by layer: how many tokens it sees; None is all


def architecture_view(model: ModelConfig, quant: QuantConfig, models_dir: str) -> ArchitectureView:
    """Build the whole tree, without an adapter; `pruned` and `matching` make it smaller.

    Raises:
        ConfigError: transformers does not know the architecture.
        LoadError: there is no config to be had.
    """
    quiet_transformers()
    config, source = model_config(model, models_dir)
    gpus, asked = usable_gpus(model.device_map), quant
    config, quant, skipped = loaded_as(config, quant, gpus, source)
    network = build_on_meta(config, quant, trust_remote_code=model.trust_remote_code, skipped=skipped)
    tree = _tree("", network, quant, set())
    arch = job_architecture(replace(model, adapter=None), models_dir, asked, gpus)
    return ArchitectureView(
        model=model.name,
        source=source,
        quant=quant_name(quant),
        tree=tree,
        parameters=tree.parameters,
        bytes=tree.bytes,
        predicted_bytes=footprint_bytes(arch, quant) if arch else None,
        quant_state_bytes=quant_state_bytes(arch, quant) if arch else None,
        quantized=quantized_share(network, quant) if quant.quantized else None,
        windows=list(arch.windows) if arch else [],
    )


def model_config(model: ModelConfig, models_dir: str) -> tuple[PreTrainedConfig, str]:
    """Read a config.json on this machine, else the facts in conf/model, else the hub's; and say which it was.

    Raises:
        ConfigError: the facts in conf/model are wrong.
        LoadError: there is no config to be had, or it cannot be read.
    """
    checkpoint = find_checkpoint(model, models_dir)
    facts = model.architecture
    if checkpoint is None and facts and facts.get("of") == model.name:
        values = {key: value for key, value in facts.items() if key not in ("of", "model_type")}
        try:
            return CONFIG_MAPPING[str(facts["model_type"])](**values), "conf/model"
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"model.architecture: not a config of transformers ({error})", "Correct conf/model/NAME.yaml"
            ) from error
    checkpoint = checkpoint or locate(model, models_dir, weights=False)
    path = checkpoint.config_path
    check_adapter(checkpoint.folder, checkpoint.source)
    checkpoint.read_config()
    checkpoint.read_generation()
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        raise LoadError(
            f"{path}: transformers cannot read it: {first_line(error)}", checkpoint.again
        ) from error
    return config, str(path)


def pruned(node: Node, depth: int) -> Node:
    """Cut the tree at this depth; 0 is the model alone."""
    return replace(node, children=[pruned(child, depth - 1) for child in node.children] if depth > 0 else [])


def matching(node: Node, pattern: str) -> Node | None:
    """Find the modules whose name or class matches, with all that they lie in; None if there are none.

    Raises:
        ConfigError: not a regular expression.
    """
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            f"filter={pattern}: not a regular expression ({error})", "Write it as filter=q_proj"
        ) from error
    if found.search(node.name) or found.search(node.kind):
        return node
    kept = [child for child in (matching(child, pattern) for child in node.children) if child is not None]
    return replace(node, children=kept) if kept else None


def _tree(name: str, module: nn.Module, quant: QuantConfig, seen: set[int]) -> Node:
    children = _folded([_tree(n, child, quant, seen) for n, child in module.named_children()])
    parameters, size, dtypes, note = 0, 0, list[str](), ""
    for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        is_buffer = not isinstance(tensor, nn.Parameter)
        if id(tensor) in seen:
            note = "the embedding's weight"
            continue
        seen.add(id(tensor))
        dtype, held = str(tensor.dtype).removeprefix("torch."), tensor.nbytes
        if packed_shape(own, module):  # which happens only when it is loaded
            dtype, held = quant.method.value, quant.stored_bytes(tensor.numel())
        dtypes.append(dtype)
        parameters += 0 if is_buffer else tensor.numel()
        size += held
    for child in children:
        parameters, size = parameters + child.parameters, size + child.bytes
        dtypes += child.dtype.split(" + ") if child.dtype else []
    dtype = " + ".join(sorted(set(dtypes)))
    return Node(name, type(module).__name__, _shape(module), 1, parameters, dtype, size, note, children)


def _folded(children: list[Node]) -> list[Node]:
    """Fold neighbours that differ in nothing but their name into one."""
    kept: list[list[Node]] = []
    for child in children:
        if kept and child.name.isdigit() and replace(child, name=kept[-1][0].name) == kept[-1][0]:
            kept[-1].append(child)
        else:
            kept.append([child])
    return [
        group[0]
        if len(group) == 1
        else replace(
            group[0],
            name=f"{group[0].name}-{group[-1].name}",
            count=len(group),
            parameters=len(group) * group[0].parameters,
            bytes=len(group) * group[0].bytes,
        )
        for group in kept
    ]


def _shape(module: nn.Module) -> str:
    """Say what goes in and what comes out; the weight's shape of other modules that have one."""
    sizes = [getattr(module, name, None) for name in _SHAPES]
    pair = sizes[:2] if None not in sizes[:2] else sizes[2:]
    if None not in pair:
        return f"{pair[0]} → {pair[1]}" + (" + bias" if getattr(module, "bias", None) is not None else "")
    weight = getattr(module, "weight", None)
    return "×".join(map(str, weight.shape)) if isinstance(weight, Tensor) else ""
