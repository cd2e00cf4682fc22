"""Tensor parallel: each rank holds a share of the heads, and all ranks have to keep the same tokens.

Under transformers' own tensor parallelism the projections of a layer are split by heads, so `q`, `k`, `v` of a rank are
plain tensors with its heads alone. Everything but a score summed over all heads is local.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig
from zipvl_reference.score_tokens import add_neighbours, sum_heads

import zipvl_kernels as zk

if TYPE_CHECKING:
    from zipvl_adapters.policy import Policy


def group_of(module: Any, q: Tensor) -> dist.ProcessGroup | None:
    """The ranks among which the heads of an attention module are split; None where this process has all of them.

    q: `[B, Hq, n, D]`, with the query heads of this rank. Raises RuntimeError for heads split in a way unknown here.
    """
    config = getattr(module, "config", None)  # none where a policy runs outside of a model
    heads = q.shape[1] if config is None else config.num_attention_heads
    if q.shape[1] == heads:
        return None
    group = _group_of_weight(module)
    if group is None:
        raise RuntimeError(
            f"q_proj.weight: expected a DTensor, since this rank has {q.shape[1]} of {heads} "
            f"query heads, got {type(module.q_proj.weight).__name__}; load unquantised weights with tp_plan='auto'"
        )
    return group


def score_tokens(
    group: dist.ProcessGroup,
    q: Tensor,  # [B, Hq, M, D], this rank's heads
    k: Tensor,  # [B, Hkv, N, D], this rank's heads
    probe_rows: Tensor,  # int32 [P], ascending, in [0, M)
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,  # int32 [B]
    leftpad_k: Tensor | None = None,  # int32 [B]
    seqused_k: Tensor | None = None,  # int32 [B]
) -> tuple[Tensor, Tensor]:
    """`zk.score_tokens` with `pool="layer"` over the heads of all ranks, `[B, 1, N]`: the same bits on every rank.

    One collective and nothing read on the host. The sum's order is the reference's and knows nothing of ranks: sums of
    KV heads are added pair by pair, those of a rank before the exchange as long as their number is even.
    """
    where: dict[str, Any] = {"q_start": q_start, "leftpad_k": leftpad_k, "seqused_k": seqused_k}
    heads, _ = zk.score_tokens(q, k, probe_rows, scale=scale, pool="kv_head", **where)  # [B, Hkv, N]
    while heads.shape[1] % 2 == 0:
        heads = add_neighbours(heads)
    ranks = dist.get_world_size(group)
    of_ranks = heads.new_empty(ranks * heads.shape[0], *heads.shape[1:])
    dist.all_gather_into_tensor(of_ranks, heads.contiguous(), group=group)
    accumulated = sum_heads(of_ranks.view(ranks, *heads.shape).transpose(0, 1).flatten(1, 2))  # [B, N]
    seen = _probes_at_or_after(probe_rows, q.shape[2], k.shape[2], q_start, seqused_k)
    normalized = torch.where(seen > 0, accumulated / (seen * (q.shape[1] * ranks)), 0)  # 0, too, in columns of padding
    return accumulated[:, None], normalized[:, None]


def _probes_at_or_after(rows: Tensor, M: int, N: int, q_start: Tensor | None, seqused_k: Tensor | None) -> Tensor:
    """How many probes stand at each column or after it and before the end, int64 `[N]` or `[B, N]`."""
    start = N - M if q_start is None else q_start[:, None]
    row = torch.arange(N, dtype=rows.dtype, device=rows.device) - start  # that stands at each column
    end = (N if seqused_k is None else seqused_k[:, None].clamp(max=N)) - start
    before_end = torch.searchsorted(rows, end) if isinstance(end, Tensor) else rows.shape[0]
    return before_end - torch.searchsorted(rows, row)


def check_heads(decoder: nn.Module, text: PreTrainedConfig) -> None:
    """Raises ValueError where key/value heads do not divide among the ranks; a projection would fail, less clearly."""
    group, heads = _group_of_decoder(decoder), text.num_key_value_heads
    if group is not None and heads % (ranks := dist.get_world_size(group)):
        raise ValueError(f"model: expected a number of ranks that divides its {heads} key/value heads, got {ranks}")


# -- ZIPVL_CHECK=1: do all ranks run the same? ------------------------------------------------------------------------


def compare(decoder: nn.Module, policy: Policy | None, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError, on all ranks, where their policies or the tensors among their `inputs` differ.

    Nothing without tensor parallelism, nor within a compiled graph. Waits for the device and for the other ranks.
    """
    group = None if torch.compiler.is_compiling() else _group_of_decoder(decoder)
    if group is None:
        return
    mine = _facts_of(policy) | {name: _digest(x) for name, x in inputs.items() if isinstance(x, Tensor)}
    facts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(facts, mine, group=group)
    numbers = dist.get_process_group_ranks(group)
    for name in sorted(set().union(*facts)):
        values = [fact.get(name, "nothing") for fact in facts]
        others = [i for i, value in enumerate(values) if value != values[0]]
        if others:
            which = f"rank {numbers[others[0]]}" if len(others) == 1 else f"ranks {[numbers[i] for i in others]}"
            raise ValueError(
                f"{name}: expected the same on all ranks of a tensor-parallel model; {which} and rank {numbers[0]} "
                f"differ: {values[others[0]]} and {values[0]}"
            )


def _facts_of(policy: Policy | None) -> dict[str, str]:
    facts = {"policy": type(policy).__name__}
    if is_dataclass(policy):
        facts |= {f"policy.{field.name}": repr(getattr(policy, field.name)) for field in fields(policy)}
    return facts


def _digest(x: Tensor) -> str:
    content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    digest = hashlib.blake2b(content, digest_size=4).hexdigest()
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} #{digest}"


# -- groups -----------------------------------------------------------------------------------------------------------


def _group_of_decoder(decoder: nn.Module) -> dist.ProcessGroup | None:
    attention = next((m for m in decoder.modules() if hasattr(m, "q_proj")), None)
    return None if attention is None else _group_of_weight(attention)


def _group_of_weight(attention: Any) -> dist.ProcessGroup | None:
    """The group of the mesh that the query projection is split over by heads."""
    mesh = getattr(attention.q_proj.weight, "device_mesh", None)
    if mesh is None:  # transformers 5.5 keeps plain tensors, and the mesh beside them
        mesh = getattr(attention.q_proj, "_hf_device_mesh", None)
    if mesh is None:
        return None
    names = mesh.mesh_dim_names
    if names is not None and "tp" not in names:
        return None  # whole weights in pieces, as FSDP stores them: every rank has all heads
    group: dist.ProcessGroup = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    return group
