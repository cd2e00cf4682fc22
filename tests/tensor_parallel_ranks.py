"""What every rank of `test_tensor_parallel.py` runs, started by torchrun: `... FOLDER all|few SECONDS`.

Results are in FOLDER/rank*.pt. A rank that takes longer says where it is, and ends. Also says what one process has to
compare with (`observe`), and the same cases for both (`CASES`, and few of them where every second is paid for).
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("llama", "qwen2_vl", "internvl")
BATCHES = {"batch1": (23,), "batch3": (23, 5, 14)}
POLICIES: dict[str, dict[str, Any]] = {
    "layer": {"pool": "layer"},
    "kv_head": {"pool": "kv_head"},
    "ratio": {"keep_ratio": 0.4, "keep_first": 2},
    "dense": {"tau": 1.0},
}
SPARSE = {"tau": 0.7, "num_recent": 4, "num_random": 8, "recompress_interval": 5}
GREEDY = {"max_new_tokens": 12, "do_sample": False}  # past two recompressions
CASES = [(family, batch, policy) for family in FAMILIES for batch in BATCHES for policy in POLICIES]
# Those in which no decision is close: the last bits of a GPU's products depend on the number of heads that it has.
FEW_CASES = [("llama", "batch3", "layer"), ("internvl", "batch3", "kv_head"), ("qwen2_vl", "batch1", "layer")]


def model_of(family: str) -> Any:
    """A tiny model with two KV heads a rank where there are two ranks; Qwen2-VL's vision tower fits one only."""
    from tiny_models import tiny

    heads = {} if family == "qwen2_vl" else {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    return tiny(family, vocab_size=100, **heads)  # older transformers split the logits evenly


def odd_model() -> Any:
    """Three KV heads do not divide among two ranks."""
    from tiny_models import tiny

    return tiny("llama", vocab_size=100, num_attention_heads=6, num_key_value_heads=3, hidden_size=48).model


def prompts(kind: Any, batch: str) -> dict[str, Any]:
    """Left-padded where there are several."""
    from tiny_models import inputs_for

    inputs: dict[str, Any] = inputs_for(kind, BATCHES[batch])
    return inputs


def observe(model: Any, inputs: dict[str, Any], policy: str) -> dict[str, Any]:
    """Tokens, and each layer's kept set, cache sizes and positions, of two turns; tokens with a static cache."""
    from zipvl_adapters import ZipVLPolicy, ZipVLStaticCache, attach

    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    rule = ZipVLPolicy(**SPARSE | POLICIES[policy])
    with attach(model, rule) as session:
        static = None
        if not rule.keeps_all:
            cache = ZipVLStaticCache(rule, model.config, GREEDY["max_new_tokens"])
            # On a GPU generate() would compile, for minutes and for every case anew.
            options = {"do_sample": False, "disable_compile": True}
            static = model.generate(**inputs, **cache.generate_arguments(), **options).cpu()
        first = model.generate(**inputs, **GREEDY)
        seen = [_layer(layer) for layer in session.cache.layers]
        second = None
        if "mm_token_type_ids" not in inputs:
            second, again = _second_turn(model, inputs, first, session.cache)
            seen += again
    return {"tokens": first.cpu(), "second": second, "static": static, "layers": seen}


def _second_turn(model: Any, inputs: dict[str, Any], first: Any, cache: Any) -> tuple[Any, list[dict[str, Any]]]:
    more = torch.cat([first, torch.arange(9, 33, device=first.device).expand(len(first), -1)], 1)
    width = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, width:])], 1)
    out = model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, **GREEDY)
    return out.cpu(), [_layer(layer) for layer in cache.layers]


def _layer(layer: Any) -> dict[str, Any]:
    prefill = layer.prefills[-1]
    held = {} if layer.lens is None else {"lens": layer.lens.cpu(), "positions": _held(layer)}
    kept = {} if prefill.indices is None else {"indices": prefill.indices.cpu(), "counts": prefill.counts.cpu()}
    return {"rows": layer.keys.shape[2], "heads": layer.keys.shape[1], "used": layer.used, **kept, **held}


def _held(layer: Any) -> Any:
    rows = torch.arange(layer.positions.shape[-1], device=layer.lens.device)
    return layer.positions.masked_fill(rows >= layer.lens[..., None], -1).cpu()


def faults(kind: Any, model: Any, rank: int) -> dict[str, str]:
    """What ranks that do not run the same are told, under ZIPVL_CHECK=1."""
    from zipvl_adapters import ZipVLCache, ZipVLPolicy, attach, enable

    inputs = {name: x.to(model.device) for name, x in prompts(kind, "batch1").items()}
    other = {**inputs, "input_ids": inputs["input_ids"].roll(rank, 1)}
    longer = {name: torch.cat([x, x[:, -rank:]], 1) if rank else x for name, x in inputs.items()}
    sparse = ZipVLPolicy(**SPARSE)
    tries = {
        "seed": (ZipVLPolicy(**SPARSE, seed=rank), inputs),
        "tau": (ZipVLPolicy(**SPARSE | {"tau": (0.7, 0.8)[rank]}), inputs),
        "prompt": (sparse, other),
        "length": (sparse, longer),
        "nothing": (sparse, inputs),
    }
    told = {}
    os.environ["ZIPVL_CHECK"] = "1"
    for name, (policy, given) in tries.items():
        with attach(model, policy):
            told[name] = _error_of(lambda given=given: model.generate(**given, **GREEDY))
    with attach(model, sparse):
        torch.manual_seed(rank)
        told["sampling"] = _error_of(lambda: model.generate(**inputs, max_new_tokens=20, do_sample=True))
    enable(model)
    cache = ZipVLCache(ZipVLPolicy(**SPARSE, seed=rank), config=model.config)
    told["enable"] = _error_of(lambda: model.generate(**inputs, **GREEDY, past_key_values=cache))
    os.environ["ZIPVL_CHECK"] = "0"
    return told


def _error_of(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def scores(rank: int, ranks: int, group: Any, device: str) -> list[dict[str, Any]]:
    """Scores over ranks of drawn queries and keys, each rank with its share of the heads, against one process."""
    from zipvl_adapters.ranks import score_tokens

    import zipvl_kernels as zk

    found = []
    for seed, (hkv, group_size) in enumerate([(2, 1), (2, 3), (4, 1), (6, 2), (8, 2), (10, 1), (40, 1)] * 2):
        draw = torch.Generator().manual_seed(seed)
        B, M, N, D = 3, 40, 40 + 30 * (seed % 2), 16
        q = torch.randn(B, hkv * group_size, M, D, generator=draw).to(device) * 2
        k = torch.randn(B, hkv, N, D, generator=draw).to(device)
        rows = zk.probe_rows(M, num_recent=5, num_random=9, seed=seed, device=device)
        where = {
            "q_start": torch.tensor([N - M, N - M - 7, 0], dtype=torch.int32, device=device) if seed % 3 else None,
            "leftpad_k": torch.tensor([0, 11, 3], dtype=torch.int32, device=device) if seed % 2 else None,
            "seqused_k": torch.tensor([N, N - 7, 39], dtype=torch.int32, device=device) if seed % 5 else None,
        }
        share = [x.chunk(ranks, 1)[rank] for x in (q, k)]
        found.append({"one": zk.score_tokens(q, k, rows, **where), "all": score_tokens(group, *share, rows, **where)})
    return [{name: tuple(x.cpu() for x in pair) for name, pair in case.items()} for case in found]


def main(folder: Path, cases: list[tuple[str, str, str]]) -> None:
    """These cases on this rank, and with all of them what does not depend on cases."""
    import torch.distributed as dist
    from zipvl_adapters import attach, enable

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results: dict[Any, Any] = {}
    for family in dict.fromkeys(case[0] for case in cases):
        kind = model_of(family)
        model = type(kind.model).from_pretrained(folder / family, tp_plan="auto").eval()
        for case in cases:
            if case[0] == family:
                results[case] = observe(model, prompts(kind, case[1]), case[2])
                print(f"rank {rank}: {case}", flush=True)
        if family == "llama":
            results["scores"] = scores(rank, ranks, dist.group.WORLD, model.device.type)
            if cases is CASES:
                results["faults"] = faults(kind, model, rank)
    if cases is CASES:
        odd = type(odd_model()).from_pretrained(folder / "odd", tp_plan="auto")
        results["odd"] = [_error_of(lambda: enable(odd)), _error_of(lambda: attach(odd).__enter__())]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[3]), exit=True)
    main(Path(sys.argv[1]), {"all": CASES, "few": FEW_CASES}[sys.argv[2]])
