"""Checks of `compact_paged_kv_`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zipvl_reference.testing.budget import assert_same_bits
from zipvl_reference.testing.draw import for_each, strided
from zipvl_reference.testing.pages import BLOCK_SIZES, PagedCase, paged_cases
from zipvl_reference.testing.sparse_attention import as_indices


def check_compact_paged_kv(
    fn: Callable[..., tuple[Tensor, Tensor]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> None:
    """Every bit pattern, NaN included, arrives where it should; new lengths and freed blocks are exact.

    No row of the pools changes but those of a sequence from `first_writable` on, also where the set lacks some before.
    Lengths per sequence and per head, first pages that all share, empty sequences. The same alone as in a batch.
    """

    def test(paged: PagedCase) -> None:
        case = paged.rows
        used, seqused_k = _draw_lengths(paged, device)
        table, first = paged.table(used, device), _draw_first_writable(paged, used)
        member = torch.rand(case.B, case.groups, case.N, generator=case.random) < (0, 0.2, 0.5, 0.8, 1.1)[case.seed % 5]
        member = (member | (torch.arange(case.N) < first[:, None, None])) & (torch.arange(case.N) < used[..., None])
        indices, counts = as_indices(member, device)
        if case.seed % 4 == 0:  # as wide as the largest set
            indices = indices[..., : int(counts.max())]
        protect = first.int().to(device)
        options = {"first_writable": strided(protect) if case.layout == "sliced" else protect} if first.any() else {}

        shape = (paged.num_blocks, case.Hkv, paged.block_size, torch.finfo(dtype).bits // 8 * case.D)
        bits = (torch.randint(256, shape, generator=case.random, dtype=torch.uint8) for _ in range(2))
        old = [x.view(dtype).to(device) for x in bits]
        wanted = [_moved(paged, x, table.cpu(), member) for x in old]

        def call(pools: list[Tensor], b: slice = slice(None)) -> tuple[Tensor, Tensor]:
            mine = {name: x[b] for name, x in options.items()}
            return fn(*pools, indices[b], counts[b], table[b], seqused_k[b], layout=paged.layout, **mine)

        def assert_pools(what: str, pools: list[Tensor], wanted: list[Tensor], but: Tensor) -> None:
            for name, pool, x in zip(("k_cache", "v_cache"), pools, wanted, strict=True):
                now = paged.heads_first(pool).masked_fill(but.to(device), 0)
                assert_same_bits(f"{name}, {what}", x.masked_fill(but.to(device), 0), now)

        unspecified = _between(paged, table, counts.cpu().maximum(first[:, None]), used)
        pools = [paged.pool(x) for x in old]
        returned = call(pools)
        _assert_returned(returned, used, counts.cpu(), paged.block_size)
        assert_pools("all rows but those past a set", pools, wanted, unspecified)

        pools = [paged.pool(x) for x in old]
        for b in range(case.B):
            alone = call(pools, slice(b, b + 1))
            for name, many, x in zip(("seqused", "freed"), returned, alone, strict=True):
                assert_same_bits(f"{name}, sequence {b} alone", many[b : b + 1], x)
        assert_pools("one sequence after the other", pools, wanted, unspecified)

        indices, counts = as_indices(member & (torch.arange(case.N) >= first[:, None, None]), device)
        pools = [paged.pool(x) for x in old]
        call(pools)
        writable = _between(paged, table, first[:, None].expand_as(used), used)
        assert_pools("rows before first_writable, and of no sequence", pools, old, writable)

    cases = paged_cases(head_dims, max_tokens, block_sizes)
    for_each(cases, test, max_examples=max_examples, derandomize=derandomize)


def _draw_lengths(paged: PagedCase, device: str) -> tuple[Tensor, Tensor]:
    """Used rows as `[B, G]` on the CPU, and as the argument `seqused_k`: of each group, or one for all."""
    case = paged.rows
    used = case.integers(0, case.N, case.B, case.groups)
    if case.seed % 3:
        return used, used.to(device)
    return used[:, :1].expand(-1, case.groups), used[:, 0].to(device)


def _draw_first_writable(paged: PagedCase, used: Tensor) -> Tensor:
    """`[B]` on the CPU: at least the shared rows; where nothing is shared, 0 for all now and then."""
    case, shared = paged.rows, paged.shared(used) * paged.block_size
    first = torch.cat([case.integers(shared, int(shortest), 1) for shortest in used.amin(1)])
    return first if shared or case.seed % 2 else torch.zeros_like(first)


def _moved(paged: PagedCase, old: Tensor, table: Tensor, member: Tensor) -> Tensor:
    """The pool `[num_blocks, Hkv, block_size, D]` after one row at a time has moved, from a copy of what it was."""
    new, size = old.clone(), paged.block_size
    for b, h in torch.cartesian_prod(torch.arange(paged.rows.B), torch.arange(paged.rows.Hkv)).tolist():
        for to, source in enumerate(member[b, h % member.shape[1]].nonzero().flatten().tolist()):
            new[table[b, to // size], h, to % size] = old[table[b, source // size], h, source % size]
    return new


def _between(paged: PagedCase, table: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Which rows `[num_blocks, Hkv, block_size, 1]` are rows `[begin, end)` of a sequence; both bounds `[B, G]`."""
    rows = torch.zeros(paged.num_blocks, paged.rows.Hkv, paged.block_size, 1, dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(paged.rows.B), torch.arange(paged.rows.Hkv)).tolist():
        g = h % end.shape[1]
        for j in range(int(begin[b, g]), int(end[b, g])):
            rows[int(table[b, j // paged.block_size]), h, j % paged.block_size] = True
    return rows


def _assert_returned(returned: tuple[Tensor, Tensor], used: Tensor, counts: Tensor, block_size: int) -> None:
    """The new lengths are the counts, and the longest head before and after says which pages came free."""
    before, after = ((x.amax(1) + block_size - 1) // block_size for x in (used, counts))
    wanted = counts[:, 0] if counts.shape[1] == 1 else counts, before - after
    for name, x, want in zip(("seqused", "freed"), returned, wanted, strict=True):
        assert x.dtype == torch.int32, f"{name}: expected int32, got {x.dtype}"
        assert x.tolist() == want.tolist(), f"{name}: expected {want.tolist()}, got {x.tolist()}"


def check_compact_paged_kv_of_layers(
    fn: Callable[..., tuple[Tensor, Tensor]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    layers: Sequence[int] = (1, 2, 5),
) -> None:
    """`compact_paged_kv_` over lists of layers, their number one of `layers`: each has pools and a set of its own.

    Block tables and lengths are of each layer, or the same for all of them.
    """

    def test(paged: PagedCase) -> None:
        case, L = paged.rows, layers[paged.rows.seed % len(layers)]
        used, seqused_k = _draw_lengths(paged, device)
        table, first = paged.table(used, device).cpu(), _draw_first_writable(paged, used)
        protect = {"first_writable": first.int().to(device)} if first.any() else {}
        shape = (paged.num_blocks, case.Hkv, paged.block_size, torch.finfo(dtype).bits // 8 * case.D)
        shared = case.seed % 2 == 0
        pools: tuple[list[Tensor], list[Tensor]] = ([], [])
        wanted: tuple[list[Tensor], list[Tensor]] = ([], [])
        sets, sizes, tables, unspecified = [], [], [], []
        for _ in range(L):
            member = torch.rand(case.B, case.groups, case.N, generator=case.random) < float(case.integers(0, 4, 1)) / 4
            member = (member | (torch.arange(case.N) < first[:, None, None])) & (torch.arange(case.N) < used[..., None])
            renamed = torch.randperm(paged.num_blocks, generator=case.random).int()
            at = torch.where(
                (table >= 0) & (table < len(renamed)), renamed[table.clamp(0, len(renamed) - 1).long()], -1
            )
            at = table if shared else at
            for buffers, after in zip(pools, wanted, strict=True):
                bits = torch.randint(256, shape, generator=case.random, dtype=torch.uint8).view(dtype).to(device)
                buffers.append(paged.pool(bits))
                after.append(_moved(paged, bits, at, member))
            indices, counts = as_indices(member, device)
            unspecified.append(_between(paged, at, counts.cpu().maximum(first[:, None]), used).to(device))
            sets.append(indices)
            sizes.append(counts)
            tables.append(at.to(device))
        where = (tables[0], seqused_k) if shared else (tables, [seqused_k] * L)
        seqused, freed = fn(*pools, sets, sizes, *where, layout=paged.layout, **protect)
        assert len(seqused) == len(freed) == L, f"expected a row of each of {L} layers"
        for i, but in enumerate(unspecified):
            _assert_returned((seqused[i], freed[i]), used, sizes[i].cpu(), paged.block_size)
            for name, buffers, after in zip(("k_cache", "v_cache"), pools, wanted, strict=True):
                now = paged.heads_first(buffers[i]).masked_fill(but, 0)
                assert_same_bits(f"{name}[{i}], all rows but those past a set", after[i].masked_fill(but, 0), now)

    cases = paged_cases(head_dims, max_tokens, block_sizes)
    for_each(cases, test, max_examples=max_examples, derandomize=derandomize)
