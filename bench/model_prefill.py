"""Prefill of whole models: time to the first token and peak memory, with ZipVL and with dense attention.

The text models of LLaVA-NeXT-13B and Qwen2-VL-7B in bf16, with random weights and random tokens, so that the ratio of
kept tokens has to be forced. A batch of one.

    python bench/model_prefill.py [--quick] [--model NAME]... [--out FILE]

Needs a GPU with 80 GB, or 141 GB for all lengths. `--quick` takes the shortest length of each model. Without a GPU a
tiny model runs, to try the script, and nothing is written.
"""

import argparse
import gc
import json
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import zipvl_adapters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from zipvl_adapters import ZipVLPolicy
from zipvl_adapters.cli.env import commit, device_name, versions
from zipvl_adapters.cli.outputs import whole_files

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
KEEP_RATIO = 0.367  # what ZipVL keeps of LLaVA-NeXT-13B's tokens at tau = 0.975
TIMED = 2
DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
MODELS = {
    "LLaVA-NeXT-13B": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
            num_key_value_heads=40, max_position_embeddings=32768,
        ),
        (2880, 8192, 32768),
    ),
    "Qwen2-VL-7B": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, max_position_embeddings=131072, tie_word_embeddings=False,
        ),
        (32768, 131072),
    ),
}  # fmt: skip
TINY = (
    LlamaForCausalLM,
    LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    (64,),
)  # fmt: skip


def build(kind, config):
    """The model with random weights, made where they stay."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = kind._from_config(config, attn_implementation="sdpa", dtype=DTYPE)
    finally:
        torch.set_default_dtype(previous)
    return model.eval()


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def allocated(peak):
    if DEVICE.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


@torch.inference_mode()
def prefill(model, ids):
    """Seconds until the first token is on the host, and the most memory that was in use."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    begin = perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    output.logits[0, -1].argmax().item()
    return perf_counter() - begin, allocated(peak=True)


def measure(model, name, length, how):
    """One row: `how` is a dense backend of torch, or ZipVL."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=DEVICE)
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    row = {"model": name, "length": length, "attention": how, "weight_bytes": weights}
    with ExitStack() as stack:
        session = None
        if how == "zipvl":
            session = stack.enter_context(zipvl_adapters.attach(model, ZipVLPolicy(keep_ratio=KEEP_RATIO)))
        else:
            stack.enter_context(sdpa_kernel(DENSE[how]) if DEVICE.type == "cuda" else nullcontext())
        try:
            runs = []
            for _ in range(1 + TIMED):
                if session:
                    session.cache = None  # the keys and values of the run before
                runs.append(prefill(model, ids))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            return row | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        row["kept_ratio"] = float(session.stats.kept_ratio) if session else 1.0
    seconds, peaks = zip(*runs[1:], strict=True)  # the first is the warm-up
    return row | {"seconds": list(seconds), "seconds_p50": median(seconds), "peak_bytes": max(peaks)}


def bound_bytes(row, config):
    """Weights, kept keys and values, and one whole layer of them: what the peak is compared with."""
    layer = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * row["length"]
    layer *= DTYPE.itemsize
    return round(row["weight_bytes"] + layer * (KEEP_RATIO * config.num_hidden_layers + 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the shortest length of each model")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="repeat for more (all)")
    parser.add_argument("--out", type=Path, default=Path("out/bench/model_prefill.json"))
    given = parser.parse_args()
    chosen = {name: MODELS[name] for name in given.model or MODELS} if DEVICE.type == "cuda" else {"tiny": TINY}
    rows = []
    for name, (kind, config, lengths) in chosen.items():
        model = build(kind, config)
        for length in lengths[:1] if given.quick else lengths:
            found = [measure(model, name, length, how) for how in (*DENSE, "zipvl")]
            ours = found[-1]
            for row in found:
                if "seconds" in row and "seconds" in ours:
                    row["zipvl_is_faster_by"] = row["seconds_p50"] / ours["seconds_p50"]
                if row is ours and "seconds" in row:
                    row["bound_bytes"] = bound_bytes(row, config)
                text = row.get("failed") or f"{row['seconds_p50']:8.3f} s {row['peak_bytes'] / 2**30:7.2f} GiB"
                print(f"{name:16} {length:7,} {row['attention']:6} {text}", flush=True)
            rows += found
        del model
        gc.collect()
    record = {
        "command": "python bench/model_prefill.py",
        "weights": "random: the time is that of the real model, what it says is not",
        "keep_ratio": f"{KEEP_RATIO}, forced in every layer",
        "measured": f"time until the first token is on the host, median of {TIMED} after a warm-up; batch of 1, bf16",
        "device": device_name(DEVICE),
        "versions": versions(),
        "commit": commit(),
        "rows": rows,
    }
    if DEVICE.type != "cuda":
        print("no GPU: this was the tiny model, nothing is written")
        return
    with whole_files(given.out.parent) as folder:
        (folder / given.out.name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"file: {given.out}")


if __name__ == "__main__":
    main()
