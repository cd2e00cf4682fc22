"""One compiled decode step of whole models: its time, the time of its bytes, and tokens a second against dense caches.

The text models of LLaVA-NeXT-13B and Qwen2-VL-7B in bf16 with random weights. Nothing is prefilled, since the time of a
step does not depend on how its cache was filled: every layer is given random keys and values for as many tokens as it
would keep, by the method that a prefill stores them with. So the ratio of kept tokens is forced. Three caches, and the
model compiled in the same way for each:

    zipvl    ZipVLStaticCache, 36.7 % of the context
    full     ZipVLStaticCache with the whole context: dense attention by this library's kernel
    static   transformers' StaticCache and "sdpa": what the model does by itself

    python bench/compiled_decode.py [--model NAME]... [--cache CACHE]... [--batch N|max]... [--fuse] [--out FILE]

Before a model is timed, compiled steps of two of its layers are compared with eager ones, both against float32. Every
row compiles the model anew. Needs a GPU with 80 GB, or 141 GB for all batches; without one a tiny model runs, to try
the script.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from filled_caches import CACHES, Case, bytes_of_a_row, filled, held_bytes, largest
from torch import Tensor
from whole_models import (
    DEVICE,
    KEEP_RATIO,
    MODELS,
    Record,
    available_bytes,
    build,
    out_of_memory,
    peak_bytes,
    release,
    synchronize,
)
from zipvl_adapters import fused_projections
from zipvl_adapters.cli.timing import ceilings

WARM_UP = 4  # steps: the first compiles, the next ones warm up and record the CUDA graph
STEPS_A_ROUND, ROUNDS = 8, 4
CHECK_LAYERS, CHECK_STEPS, CHECK_CONTEXT = 2, 6, 8192
HEAD_START, HOST_SECONDS = 1.5, 0.01  # of a round before the device begins it; what a step may take on the host


# -- a step -----------------------------------------------------------------------------------------------------------


def compiled(model: Any, how: argparse.Namespace) -> Callable[..., Any]:
    """What `generate()` makes of the model for its decode steps, held to one graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._inductor.config.coordinate_descent_tuning = how.tune
    mode = how.mode if how.backend == "inductor" else None
    return torch.compile(model.__call__, backend=how.backend, mode=mode, fullgraph=True, dynamic=False)


def projections(model: Any, how: argparse.Namespace) -> AbstractContextManager[None]:
    """A block in which the model's projections are as asked for."""
    return fused_projections(model) if how.fuse else nullcontext()


def logits_of(call: Callable[..., Any], ids: Tensor, cache: Any) -> Tensor:
    """Of the token after `ids` `[B, 1]`, `[B, vocabulary]`."""
    torch.compiler.cudagraph_mark_step_begin()
    logits: Tensor = call(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return logits


def next_ids(call: Callable[..., Any], ids: Tensor, cache: Any) -> Tensor:
    """The likeliest token after `ids` `[B, 1]`, of the same shape, on the device."""
    return logits_of(call, ids, cache).argmax(-1, keepdim=True)


def eager_step(model: Any, batch: int, cache: Any) -> Tensor:
    """Not compiled."""
    return next_ids(model, first_ids(model, batch), cache)


def first_ids(model: Any, batch: int) -> Tensor:
    """Any tokens, `[B, 1]`."""
    return torch.arange(batch, device=DEVICE)[:, None] % model.config.vocab_size


# -- right before fast ------------------------------------------------------------------------------------------------


def check(case: Case, how: argparse.Namespace) -> dict[str, float]:
    """Logits of compiled and of eager steps against float32 ones, two layers deep; raises where compiling is worse.

    The error may be twice that of the eager step in the same dtype, and the rounding of the largest logit.
    """
    model = build(case.model, layers=CHECK_LAYERS)
    exact = copy.deepcopy(model).float()
    calls = {"eager": (model, model), "compiled": (model, compiled(model, how)), "exact": (exact, exact)}
    caches = {name: filled(owner, case) for name, (owner, _) in calls.items()}
    found = {}
    with projections(model, how):
        for name, (_, call) in calls.items():
            for layer, same in zip(caches[name].layers, caches["compiled"].layers, strict=True):
                layer.keys.copy_(same.keys)
                layer.values.copy_(same.values)
            tokens = [(first_ids(model, case.batch) + 17 * i) % model.config.vocab_size for i in range(CHECK_STEPS)]
            found[name] = [logits_of(call, ids, caches[name]).float().clone() for ids in tokens]
            if int(caches[name].get_seq_length()) != case.context + CHECK_STEPS:
                raise AssertionError(f"{name}: the cache has seen {int(caches[name].get_seq_length())} tokens")
    exact_logits = torch.stack(found["exact"])
    rounding = float(exact_logits.abs().max()) * torch.finfo(model.dtype).eps
    errors = {name: float((torch.stack(found[name]) - exact_logits).abs().max()) for name in ("eager", "compiled")}
    if not errors["compiled"] <= 2 * errors["eager"] + rounding:  # NaN is worse, too
        raise AssertionError(f"a compiled step is wrong: largest errors of logits {errors}, rounding {rounding}")
    torch._dynamo.reset()
    return errors | {"largest_logit": float(exact_logits.abs().max())}


# -- measuring --------------------------------------------------------------------------------------------------------


@cache
def copy_speed() -> float:
    """Bytes a second, read and written, of a large copy on this machine."""
    return ceilings()["copy_bytes_per_second"] if DEVICE.type == "cuda" else 1e10


def bytes_of_a_step(model: Any, case: Case) -> int:
    """Weights and held keys and values, read once; of the embeddings one row a sequence."""
    embeddings, (weights, _) = model.get_input_embeddings().weight, held_bytes(model, case)
    rows = case.kept + WARM_UP + STEPS_A_ROUND * (1 + ROUNDS // 2)  # in the middle of what is timed
    return weights - embeddings.nbytes + case.batch * (embeddings[0].nbytes + rows * bytes_of_a_row(model))


def wall_seconds(step: Callable[[], None], steps: int) -> float:
    """Of one step, when the host starts them without waiting for any."""
    synchronize()
    begin = perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (perf_counter() - begin) / steps


def device_milliseconds(step: Callable[[], None], host_seconds: float) -> list[float]:
    """Of each step, on a device that never waits for the host: it begins when a round of steps is in its queue."""
    if DEVICE.type != "cuda":
        return [1e3 * wall_seconds(step, 1) for _ in range(STEPS_A_ROUND * ROUNDS)]
    samples = []
    for _ in range(ROUNDS):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS_A_ROUND + 1)]
        torch.cuda._sleep(int(2e9 * HEAD_START * min(host_seconds, HOST_SECONDS) * STEPS_A_ROUND))  # at most 2 GHz
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        synchronize()
        samples += [a.elapsed_time(b) for a, b in pairwise(events)]
    return samples


def measure(model: Any, case: Case, how: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    cache, call = filled(model, case), compiled(model, how)
    ids = first_ids(model, case.batch)

    def step() -> None:
        nonlocal ids
        ids = next_ids(call, ids, cache)

    begin = perf_counter()
    step()
    synchronize()
    compile_seconds = perf_counter() - begin
    for _ in range(WARM_UP - 1):
        step()
    wall = wall_seconds(step, STEPS_A_ROUND)
    samples = device_milliseconds(step, wall)
    counters = torch._dynamo.utils.counters
    num_bytes, fifths = bytes_of_a_step(model, case), quantiles(samples, n=5, method="inclusive")
    row = {
        "capacity": cache.layers[0].keys.shape[2],
        "compile_seconds": compile_seconds,
        "step_ms": {"p20": fifths[0], "p50": median(samples), "p80": fifths[-1], "samples": len(samples)},
        "wall_ms": 1e3 * wall,
        "bytes": num_bytes,
        "bytes_ms": 1e3 * num_bytes / copy_speed(),
        "copy_bytes_per_second": copy_speed(),
        "peak_bytes": peak_bytes(),
        "graphs": counters["stats"]["unique_graphs"],
        "cuda_graphs_skipped": counters["inductor"]["cudagraph_skips"],
    }
    row["x_bytes"] = row["step_ms"]["p50"] / row["bytes_ms"]
    row["tokens_per_second"] = 1e3 * case.batch / row["step_ms"]["p50"]
    return row


# -- all of it --------------------------------------------------------------------------------------------------------


def row_of(model: Any, case: Case, how: argparse.Namespace, asked: str) -> dict[str, Any]:
    """`measure`, or why there is nothing to measure."""
    about = {**vars(case), "asked": asked, "kept": case.kept, "layers": model.config.num_hidden_layers}
    about |= {"mode": how.mode, "tuned": how.tune, "fused": how.fuse}
    weights, sequence = held_bytes(model, case)
    needed, there = weights + max(case.batch, 1) * sequence, available_bytes()
    if not case.batch or needed > there:
        return about | {"failed": f"memory: needs {needed / 2**30:.1f} GiB and more, of {there / 2**30:.1f}"}
    try:
        return about | measure(model, case, how)
    except Exception as error:  # the compiler may raise anything; the other rows are worth having
        kind = "memory" if out_of_memory(error) else type(error).__name__
        return about | {"failed": f"{kind}: {' '.join(str(error).split())[:600]}"}


def compare(row: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Notes × the tokens a second of the dense caches that were asked for in the same way."""
    same = ("model", "context", "layers", "asked", "mode", "tuned", "fused")
    for other in others:
        is_dense = other["cache"] != "zipvl" and "failed" not in other
        if is_dense and all(other[name] == row[name] for name in same):
            row[f"x_{other['cache']}"] = row["tokens_per_second"] / other["tokens_per_second"]


def print_row(row: dict[str, Any]) -> None:
    text = f"{row['model']:16} {row['cache']:7} batch {row['batch']:>3}"
    if "failed" in row:
        print(f"{text}  {row['failed']}", flush=True)
        return
    text += (
        f" {row['step_ms']['p50']:8.3f} ms, {row['x_bytes']:.2f} x its bytes, {row['tokens_per_second']:8.1f} tokens/s"
    )
    text += "".join(f", {row[name]:.2f} {name.replace('_', ' ')}" for name in ("x_static", "x_full") if name in row)
    if DEVICE.type == "cuda" and (row["graphs"] != 1 or row["cuda_graphs_skipped"]):
        text += f", {row['graphs']} GRAPHS, CUDA GRAPHS SKIPPED {row['cuda_graphs_skipped']} TIMES"
    print(f"{text}  (wall {row['wall_ms']:.2f} ms, compiled in {row['compile_seconds']:.0f} s)", flush=True)


def measure_model(name: str, how: argparse.Namespace, record: Record) -> bool:
    """All rows of a model; False where one failed, other than for lack of memory."""
    batches = how.batch or ["1", "8", "max"]
    errors = None
    if not how.no_check:
        batch = next((int(x) for x in batches if x != "max"), 1)
        errors = check(Case(name, "zipvl", batch, min(how.context, CHECK_CONTEXT)), how)
        print(f"{name:16} compiled logits are right: {errors}", flush=True)
    release()
    model = build(name, how.layers)
    kinds = [x for x in CACHES if not how.cache or x in how.cache]  # ours last, to be compared with the others
    succeeded = True
    with projections(model, how):
        for asked in batches:
            for kind in kinds:
                case = Case(name, kind, 0, how.context)
                batch = largest(model, case, partial(eager_step, model), how.seconds) if asked == "max" else int(asked)
                row = row_of(model, replace(case, batch=batch), how, asked) | {"logit_errors": errors}
                torch._dynamo.reset()
                release()
                if kind == "zipvl" and "failed" not in row:
                    compare(row, record.rows)
                record.add(row)
                print_row(row)
                succeeded &= row.get("failed", "memory").startswith("memory")
    return succeeded


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="repeat for more (all)")
    parser.add_argument("--cache", action="append", choices=list(CACHES), help="repeat for more (all)")
    parser.add_argument("--batch", action="append", help='a number, or "max" for the largest that fits (1, 8, max)')
    parser.add_argument("--context", type=int, default=32768 if DEVICE.type == "cuda" else 300, help="tokens seen")
    parser.add_argument("--layers", type=int, help="so many layers instead of all, to try something")
    parser.add_argument("--mode", default="reduce-overhead", help="of torch.compile (reduce-overhead, as generate())")
    parser.add_argument("--tune", action="store_true", help="inductor's coordinate descent: slower to compile")
    parser.add_argument("--fuse", action="store_true", help="q, k, v and gate, up as one product each, for all caches")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; others to try the script")
    parser.add_argument("--no-check", action="store_true", help="do not compare logits first")
    parser.add_argument("--seconds", type=float, default=30, help="for finding the largest batch")
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU/compiled_decode.json")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    how = arguments()
    about = {
        "weights": "random, and random keys and values in place of a prefill: what a step costs, not what it says",
        "kept": f"zipvl: {KEEP_RATIO} of the context in every layer, forced; full and static: all of it",
        "measured": "a compiled step with CUDA graphs, its next token included; step_ms: between CUDA events, the "
        "device never waiting for the host; wall_ms: the host starting steps without waiting for any; bytes: weights, "
        "less embeddings, and held keys and values, once; tokens_per_second: of step_ms; peak_bytes: filling included",
    }
    case_of_a_row = ("model", "cache", "context", "layers", "asked", "mode", "tuned", "fused")
    record = Record("compiled_decode", how.out, case_of_a_row, about)
    print(f"copy: {copy_speed() / 1e12:.2f} TB/s", flush=True)
    succeeded = [measure_model(name, how, record) for name in how.model or MODELS]
    return int(not all(succeeded))


if __name__ == "__main__":
    sys.exit(main())
