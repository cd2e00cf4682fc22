"""No operator reads device data on the host: by watching every torch call, by tracing, and by CUDA graph capture."""

import pytest
import torch
import zipvl_reference
from torch.utils._python_dispatch import TorchDispatchMode

import zipvl_kernels as zk

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.unique_dim}
INDEXES = {aten.index, aten.index_put, aten.index_put_, aten.repeat_interleave}


class NoHostRead(TorchDispatchMode):
    """Raises at a torch call whose result on the host, or whose output shape, depends on device data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_values = packet in INDEXES and any(
            isinstance(x, torch.Tensor) and (x.dtype == torch.bool or packet == aten.repeat_interleave)
            for x in torch.utils._pytree.tree_leaves(args[1:] or args)
        )
        if packet in READS or by_values:
            raise AssertionError(f"{func} reads device data on the host")
        return func(*args, **(kwargs or {}))


def tensors(device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, 40, 16, generator=random).to(device) for heads in (4, 2, 2))
    return q, k, v, torch.tensor([0, 7 + seed], dtype=torch.int32).to(device)


def of_packed(package, q, k, v, leftpad):
    """Packed, the rows of both sequences one after the other, are two others, whose ends the device knows alone."""
    where = {"cu_seqlens": torch.nn.functional.pad(leftpad + 30, (1, 0)), "max_seqlen": 35}
    q, k, v = (x.transpose(0, 1).flatten(1, 2).transpose(0, 1) for x in (q, k, v))
    rows = package.probe_rows(35, num_recent=4, num_random=4, cu_seqlens=where["cu_seqlens"])
    scores = package.score_tokens(q, k, rows, **where)
    indices, counts = package.select_tokens(*scores, tau=0.8, **where)
    out = package.sparse_attention(q, k, v, indices, counts, **where)
    moved_k, moved_v = k.clone(), v.clone()
    package.compact_kv_(moved_k, moved_v, indices, counts, **where)
    kept = package.zipvl_prefill_(q, k.clone(), v.clone(), **where, num_recent=4, num_random=4)
    # Where rows of a set or of a sequence end, the rest is unspecified.
    known = torch.arange(len(q), device=q.device) < where["cu_seqlens"][-1]
    known_floats = (x.masked_fill(~known[:, None, None], 0) for x in (out, kept[0]))
    known_scores = (x.masked_fill(~known, 0) for x in (*scores, indices, kept[1]))
    return rows, counts, kept[2], *known_floats, *known_scores


def every_operator(package):
    """A function that calls each operator of `package` once."""

    def run(q, k, v, leftpad):
        rows = package.probe_rows(q.shape[2], num_recent=4, num_random=4, device=q.device)
        scores = package.score_tokens(q, k, rows, leftpad_k=leftpad)
        indices, counts = package.select_tokens(*scores, tau=0.8, leftpad_k=leftpad)
        out = package.sparse_attention(q, k, v, indices, counts)
        moved_k, moved_v = k.clone(), v.clone()
        package.compact_kv_(moved_k, moved_v, indices, counts)
        decoded = package.decode_attention(q[:, :, -2:], moved_k, moved_v, counts[:, 0])
        pools = [x.transpose(1, 2).reshape(20, 4, 2, 16).clone() for x in (k, v)]  # pages of 4
        table, used = torch.arange(20, dtype=torch.int32, device=q.device).view(2, 10), leftpad + 33
        chunk, pages = q[:, :, -9:], {"seqused_k": used, "block_table": table}
        paged_scores = package.score_tokens(chunk, pools[0], rows - 31, **pages)
        sets = package.select_tokens(*paged_scores, tau=0.8, seqused_k=used)
        attended = package.sparse_attention(chunk, *pools, *sets, **pages)
        lengths, freed = package.compact_paged_kv_(*pools, indices, counts, table, used, first_writable=leftpad - 7)
        paged = package.decode_attention(q[:, :, -2:], *pools, lengths, block_table=table)
        kept = package.zipvl_prefill_(q, k.clone(), v.clone(), leftpad_k=leftpad, num_recent=4, num_random=4)
        of_pages = *paged_scores, attended, *pools, lengths, freed, paged
        every = *scores, indices, counts, out, moved_k, decoded, *of_pages, *kept
        return *every, *of_packed(package, q, k, v, leftpad)

    return run


packages = pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)


@packages
def test_no_host_read(package):
    with NoHostRead():
        every_operator(package)(*tensors())


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.nonzero, lambda x: x[x > 0], bool, torch.repeat_interleave])
def test_the_watch_sees_reads(read):
    with NoHostRead(), pytest.raises(AssertionError, match="reads device data"):
        read(torch.tensor([1]))


def test_reference_traces_as_one_graph():
    run = every_operator(zipvl_reference)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for got, wanted in zip(compiled(*tensors()), run(*tensors()), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@packages
def test_cuda_graph_replays_with_new_inputs(package):
    run, inputs = every_operator(package), tensors("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*inputs)
    new = tensors("cuda", seed=3)
    for held, x in zip(inputs, new, strict=True):
        held.copy_(x)
    graph.replay()
    for got, wanted in zip(outputs, run(*new), strict=True):
        assert torch.equal(got, wanted)
