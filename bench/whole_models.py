"""What benchmarks of whole models share: geometries, random weights, memory, the search for a batch, and records."""

import gc
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from records import DEVICE, default_path, origin, write
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from zipvl_adapters.cli.problems import KEEP_RATIO

__all__ = [
    "DEVICE",
    "DTYPE",
    "KEEP_RATIO",
    "MODELS",
    "Record",
    "available_bytes",
    "build",
    "head_dim",
    "largest_batch",
    "out_of_memory",
    "peak_bytes",
    "release",
    "synchronize",
]
DTYPE = torch.bfloat16
MODELS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "LLaVA-NeXT-13B": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
            num_key_value_heads=40, max_position_embeddings=32768,
        ),
    ),
    "Qwen2-VL-7B": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, max_position_embeddings=131072, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip
if DEVICE.type != "cuda":  # to try the scripts
    MODELS = {
        "tiny": (
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2,
            ),
        )
    }  # fmt: skip


def build(name: str, layers: int | None = None) -> PreTrainedModel:
    """The model with random weights, made where they stay; `layers`: so many instead of all."""
    kind, config = MODELS[name]
    if layers is not None:
        config = deepcopy(config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = kind._from_config(config, attn_implementation="sdpa", dtype=DTYPE)
    finally:
        torch.set_default_dtype(previous)
    return model.eval()


def head_dim(config: Any) -> int:
    """Of a text model's heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def release() -> None:
    """Gives freed memory back to the device, and begins to watch the peak anew."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The most that tensors took since `release`."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def available_bytes() -> int:
    """What tensors can take of the device, those that are there already included."""
    if DEVICE.type != "cuda":
        return 1 << 22  # tiny as the model
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def out_of_memory(error: Exception) -> bool:
    """Whether memory is what was missing: libraries have errors of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "out_of_memory", "alloc_failed")
    )


def largest_batch(
    fits: Callable[[int], bool],
    guess: int,
    *,
    seconds: float,
    known: int = 0,
    cost: Callable[[int], float] = lambda batch: 0.0,
) -> tuple[int, int | None]:
    """The largest batch known to fit, 0 for none, and the least known not to, None where the time ran out before.

    `guess`: where the search begins; it doubles its steps away from there, and then halves them. `known`: a batch that
    fits. It ends early where an attempt, which takes `cost(batch)` seconds, would not end within `seconds`.
    """
    begin = perf_counter()
    low, high, step, batch = known, None, 1, max(known + 1, guess)
    while high is None or high - low > 1:
        if perf_counter() - begin + cost(batch) > seconds:
            break
        if fits(batch):
            low = batch
        else:
            high = batch
        if high is None:
            batch, step = low + step, 2 * step
        elif low == known:
            batch, step = max(low + 1, high - step), 2 * step
        else:
            batch = (low + high) // 2
    return low, high


class Record:
    """Rows in a JSON file, which is written after each of them; a row replaces an earlier one of the same case.

    Without a GPU nothing is written, unless a file is named.
    """

    def __init__(self, stem: str, out: Path | None, case: tuple[str, ...], about: dict[str, Any]) -> None:
        default = default_path(stem) if DEVICE.type == "cuda" else None
        self.path, self.case = out or default, case
        now = origin(stem)
        self.about = {"command": now["command"], **about, "device": now["device"]}
        self.versions = {name: now[name] for name in ("versions", "commit")}  # of each row, since rows may be older
        self.rows: list[dict[str, Any]] = []
        if self.path and self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier["device"] == self.about["device"]:  # rows that do not say their case are of an earlier script
                self.rows = [row for row in earlier["rows"] if all(name in row for name in case)]

    def add(self, row: dict[str, Any]) -> None:
        """Puts the row in and writes the file."""
        case = [row.get(name) for name in self.case]
        self.rows = [other for other in self.rows if [other.get(name) for name in self.case] != case]
        self.rows.append(row | self.versions)
        if self.path is not None:
            write(self.path, self.about | {"rows": self.rows})
