"""Prefill of whole models, with ZipVL and with dense attention: time to a first token, peak memory, largest batch.

The text models of LLaVA-NeXT-13B and Qwen2-VL-7B in bf16, with random weights and random tokens, so that the ratio of
kept tokens has to be forced.

    python bench/model_prefill.py [--quick] [--model NAME]... [--length N]... [--attention NAME]... [--out FILE]
    python bench/model_prefill.py --batch max [--seconds 60] ...

The first measures a batch of one. The second looks for the largest batch, one prefill a try: it foretells it from the
peaks of one and two sequences, and then tries that and its neighbours until the time for a search is over. Needs a GPU
with 80 GB, or 141 GB for all lengths. `--quick` takes the shortest length of each model. Without a GPU a tiny model
runs, to try the script.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import zipvl_adapters
from torch.nn.attention import SDPBackend, sdpa_kernel
from whole_models import (
    DEVICE,
    DTYPE,
    KEEP_RATIO,
    MODELS,
    Record,
    available_bytes,
    build,
    head_dim,
    largest_batch,
    out_of_memory,
    peak_bytes,
    release,
    synchronize,
)
from zipvl_adapters import ZipVLPolicy

TIMED = 2
MARGIN = 0.95  # of the memory: what a batch is foretold to take, since not every gap in it can be used
DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
ZIPVL = {"zipvl": None, "zipvl+mlp_rows": 8192}  # the most tokens that an MLP takes at a time
LENGTHS = {"LLaVA-NeXT-13B": (2880, 8192, 32768), "Qwen2-VL-7B": (32768, 131072), "tiny": (64,)}


@contextmanager
def attending(model, how):
    """Within the block, a function that forgets the last prompt and prefills `[batch, length]` tokens; and the session.

    The function returns the seconds until a first token is on the host, and the peak of memory in bytes.
    """
    with ExitStack() as stack:
        session = None
        if how in ZIPVL:
            policy = ZipVLPolicy(keep_ratio=KEEP_RATIO)
            session = stack.enter_context(zipvl_adapters.attach(model, policy, mlp_rows=ZIPVL[how]))
        else:
            stack.enter_context(sdpa_kernel(DENSE[how]) if DEVICE.type == "cuda" else nullcontext())

        @torch.inference_mode()
        def prefill(batch, length):
            ids = torch.randint(0, model.config.vocab_size, (batch, length), device=DEVICE)
            if session:
                session.cache = None
            release()
            synchronize()
            begin = perf_counter()
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            output.logits[0, -1].argmax().item()
            return perf_counter() - begin, peak_bytes()

        yield prefill, session


def measure(prefill, session, model, row):
    """A batch of one, after a warm-up."""
    runs = [prefill(1, row["length"]) for _ in range(1 + TIMED)]
    seconds, peaks = zip(*runs[1:], strict=True)
    row["kept_ratio"] = float(session.stats.kept_ratio) if session else 1.0
    row |= {"seconds": list(seconds), "seconds_p50": median(seconds), "peak_bytes": max(peaks)}
    if row["attention"] in ZIPVL:
        row["mlp_rows"] = ZIPVL[row["attention"]]
        row["bound_bytes"] = bound_bytes(row, model.config)
    return row


def bound_bytes(row, config):
    """Weights, kept keys and values, and one whole layer of them: what the peak is compared with."""
    layer = 2 * config.num_key_value_heads * head_dim(config) * row["length"] * DTYPE.itemsize
    return round(row["weight_bytes"] + layer * (KEEP_RATIO * config.num_hidden_layers + 1))


def search(prefill: Callable[[int], tuple[float, int]], available: int, seconds: float) -> dict:
    """The largest batch whose `prefill`, which returns seconds and peak bytes, does not run out of memory.

    `least_too_large` is None where the time ran out before one was seen. Any other error of a batch counts as well, and
    is told; of a single sequence it is raised.
    """
    begin, tried = perf_counter(), {}
    found: dict = {"available_bytes": available}

    def fits(batch: int) -> bool:
        try:
            tried[batch] = prefill(batch)
        except Exception as error:
            if not out_of_memory(error):
                if not tried:
                    raise
                found["other_error"] = f"batch {batch}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if batch not in tried:
            release()  # not in the handler, where the error still holds on to everything
        return batch in tried

    if not fits(1) or not fits(2):
        low, high = len(tried), len(tried) + 1
    else:
        a_sequence = max(1, tried[2][1] - tried[1][1])
        guess = found["foretold"] = max(2, 2 + int(MARGIN * available - tried[2][1]) // a_sequence)
        cost = max(tried[2][0] / 2, 1e-4)
        left = seconds - (perf_counter() - begin)
        low, high = largest_batch(fits, guess, known=2, seconds=left, cost=lambda batch: cost * batch)
    found |= {"largest_batch": low, "least_too_large": high}
    if low:
        found |= {"seconds": tried[low][0], "peak_bytes": tried[low][1]}
    return found


def row_of(model, name, length, how, given):
    """A batch of one, or the largest; or why there is nothing to measure."""
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    row = {"model": name, "length": length, "attention": how, "batch": given.batch, "weight_bytes": weights}
    try:
        with attending(model, how) as (prefill, session):
            if given.batch == "1":
                return measure(prefill, session, model, row)
            return row | search(lambda batch: prefill(batch, length)[:2], available_bytes(), given.seconds)
    except Exception as error:  # a backend may refuse a shape in any way; the other rows are worth having
        kind = "memory" if out_of_memory(error) else type(error).__name__
        return row | {"failed": f"{kind}: {' '.join(str(error).split())[:300]}"}


def print_row(row):
    text = f"{row['model']:16} {row['length']:7,} {row['attention']:22}"
    if "failed" in row:
        text += row["failed"]
    elif "largest_batch" in row:
        text += f"largest batch {row['largest_batch']}"
        text += f" of {row['foretold']} foretold" if "foretold" in row else ""
        text += f"; {row['least_too_large']} do not fit" if row["least_too_large"] else "; no time to try more"
        text += f" ({row['other_error']})" if "other_error" in row else ""
        if row["largest_batch"]:
            text += f"; {row['seconds']:.2f} s, {row['peak_bytes'] / 2**30:.1f} GiB"
    else:
        text += f"{row['seconds_p50']:8.3f} s {row['peak_bytes'] / 2**30:7.2f} GiB"
        text += f", {row['peak_bytes'] / row['bound_bytes']:.2f} x the bound" if "bound_bytes" in row else ""
    text += "".join(f", {row[x]:.2f} x {x.removeprefix('x_')}" for x in row if x.startswith("x_"))
    print(text, flush=True)


def compare(row, others):
    """Notes how many times faster than dense attention, or larger than its largest batch, one of ours is."""
    measured = "largest_batch" if "largest_batch" in row else "seconds_p50"
    for other in others:
        same = all(row[x] == other[x] for x in ("model", "length", "batch"))
        if same and other["attention"] in DENSE and other.get(measured) and row.get(measured):
            ours, theirs = row[measured], other[measured]
            row[f"x_{other['attention']}"] = ours / theirs if measured == "largest_batch" else theirs / ours


def measure_model(name, given, record):
    """All rows of a model; False where one failed, other than for lack of memory."""
    model, succeeded = build(name), True
    lengths = given.length or (LENGTHS[name][:1] if given.quick else LENGTHS[name])
    for length in lengths:
        for how in given.attention or [x for x in (*DENSE, *ZIPVL) if x != "flash" or given.batch == "1"]:
            row = row_of(model, name, length, how, given)
            release()
            if how in ZIPVL and "failed" not in row:
                compare(row, record.rows)
            record.add(row)
            print_row(row)
            succeeded &= row.get("failed", "memory").startswith("memory")
    return succeeded


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shortest length of each model")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="repeat for more (all)")
    parser.add_argument("--length", action="append", type=int, help="tokens; repeat for more (those of the model)")
    parser.add_argument("--attention", action="append", choices=[*DENSE, *ZIPVL], help="repeat for more (all)")
    parser.add_argument(
        "--batch", choices=["1", "max"], default="1", help="time one sequence, or find the largest batch"
    )
    parser.add_argument("--seconds", type=float, default=60, help="for the search of one largest batch")
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU/model_prefill.json")
    given = parser.parse_args()
    about = {
        "weights": "random: the time is that of the real model, what it says is not",
        "keep_ratio": f"{KEEP_RATIO}, forced in every layer",
        "measured": f"time until the first token is on the host, median of {TIMED} after a warm-up; batch of 1, bf16",
        "largest_batch": "that a prefill was run with; least_too_large: ran out of memory, None: not tried",
    }
    record = Record("model_prefill", given.out, ("model", "length", "attention", "batch"), about)
    succeeded = [measure_model(name, given, record) for name in given.model or MODELS]
    return int(not all(succeeded))


if __name__ == "__main__":
    sys.exit(main())
