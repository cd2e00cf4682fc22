"""What benchmarks of whole models share: geometries, random weights, memory, the search for a batch, and records."""

import gc
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from zipvl_adapters.cli.env import commit, device_name, versions
from zipvl_adapters.cli.outputs import whole_files

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
KEEP_RATIO = 0.367  # what ZipVL keeps of LLaVA-NeXT-13B's tokens at tau = 0.975
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


def largest_batch(
    fits: Callable[[int], bool], guess: int, *, seconds: float, cost: Callable[[int], float] = lambda batch: 0.0
) -> tuple[int, int | None]:
    """The largest batch known to fit, 0 for none, and the least known not to, None where time ran out before.

    `guess`: where the search begins; it doubles away from there and then halves. It ends early where an attempt, which
    takes `cost(batch)` seconds, would not end within `seconds`.
    """
    begin = perf_counter()
    low, high, step, batch = 0, None, 1, max(1, guess)
    while high is None or high - low > 1:
        if perf_counter() - begin + cost(batch) > seconds:
            break
        if fits(batch):
            low = batch
        else:
            high = batch
        if high is None:
            batch, step = low + step, 2 * step
        elif not low:
            batch, step = max(1, high - step), 2 * step
        else:
            batch = (low + high) // 2
    return low, high


class Record:
    """Rows in a JSON file, which is written after each of them; a row replaces an earlier one of the same case.

    Without a GPU nothing is written, unless a file is named.
    """

    def __init__(self, stem: str, out: Path | None, case: tuple[str, ...], about: dict[str, Any]) -> None:
        gpu = device_name(DEVICE).removeprefix("NVIDIA ").split()[0].lower()
        default = ROOT / "bench" / "results" / gpu / f"{stem}.json" if DEVICE.type == "cuda" else None
        self.path, self.case = out or default, case
        self.about = {"command": f"python bench/{stem}.py", **about, "device": device_name(DEVICE)}
        self.rows: list[dict[str, Any]] = []
        if self.path and self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier["device"] == self.about["device"]:
                self.rows = earlier["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """Puts the row in and writes the file."""
        case = [row.get(name) for name in self.case]
        self.rows = [other for other in self.rows if [other.get(name) for name in self.case] != case]
        self.rows.append(row | {"versions": versions(), "commit": commit()})
        if self.path is None:
            return
        with whole_files(self.path.parent) as folder:
            text = json.dumps(self.about | {"rows": self.rows}, indent=1) + "\n"
            (folder / self.path.name).write_text(text, encoding="utf-8")
