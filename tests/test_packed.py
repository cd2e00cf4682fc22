"""Packed sequences, in every operator that takes them: the property checks, bad bounds, errors, registration."""

import importlib
from functools import partial

import pytest
import torch
import zipvl_reference
from zipvl_reference.testing import (
    check_packed_probe_rows,
    check_packed_score_tokens,
    check_packed_select_tokens,
    check_packed_sparse_attention,
    check_packed_zipvl_prefill,
)

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKS = {
    "score_tokens": check_packed_score_tokens,
    "sparse_attention": check_packed_sparse_attention,
    "zipvl_prefill_": check_packed_zipvl_prefill,
}
packages = pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(lengths=(7, 0, 1, 12), D=8, dtype=torch.float32, more=2):
    """A fused projection's queries, keys and values, and the arguments that say where sequences are."""
    random = torch.Generator().manual_seed(0)
    total = sum(lengths) + more
    q, k, v = torch.randn(total, 8, D, generator=random).to(dtype).split((4, 2, 2), 1)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return (q, k, v), {"cu_seqlens": bounds, "max_seqlen": max(lengths, default=0)}


def steps(package, q, k, v, *, sets=None, **where):
    """All operators one after the other; the results of each. `sets` are taken in place of those that are selected."""
    rows = package.probe_rows(where["max_seqlen"], num_recent=2, num_random=3, cu_seqlens=where["cu_seqlens"])
    scores = package.score_tokens(q, k, rows, **where)
    indices, counts = sets or package.select_tokens(*scores, tau=0.8, **where)
    out = package.sparse_attention(q, k, v, indices, counts, **where)
    k, v = k.clone(), v.clone()
    package.compact_kv_(k, v, indices, counts, **where)
    compacted = package.sparse_attention(q, k, v, indices, counts, kv_compacted=True, **where)
    return rows, *scores, indices, counts, out, k, v, compacted


# The reference pads: its floats are those of the dense form but for rounding.


@packages
def test_probe_rows(package):
    check_packed_probe_rows(package.probe_rows, derandomize=True)


def test_probe_rows_triton():
    pytest.importorskip("triton")
    drawn = importlib.import_module("zipvl_kernels._triton.probe_rows").probe_rows
    check_packed_probe_rows(drawn, device=DEVICE, derandomize=True, max_examples=20)


@pytest.mark.parametrize("root", [4096, 46339, 46340])
def test_probe_rows_of_long_sequences(root):
    """The square root that the permutation needs is exact, on the device too."""
    pytest.importorskip("triton")
    drawn = importlib.import_module("zipvl_kernels._triton.probe_rows").probe_rows
    for length in (root**2 + 3, root**2 + 4, root**2 + 5, 2**31 - 8):  # of which 3 are not drawn
        options = {"num_recent": 3, "num_random": 40, "seed": 5}
        wanted = zk.probe_rows(length, **options)
        for fn in (zk.probe_rows, drawn):
            got = fn(length + 7, **options, cu_seqlens=torch.tensor([0, length, 5], dtype=torch.int32, device=DEVICE))
            assert torch.equal(got[0].cpu(), wanted)
            assert (got[1] == -1).all()


@packages
def test_select_tokens(package):
    check_packed_select_tokens(package.select_tokens, derandomize=True)


def test_select_tokens_triton():
    pytest.importorskip("triton")
    fn = partial(zk.select_tokens, backend="triton")
    check_packed_select_tokens(fn, device=DEVICE, derandomize=True, max_examples=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", CHECKS)
@packages
def test_contract(package, operator, dtype):
    CHECKS[operator](getattr(package, operator), dtype=dtype, derandomize=True, same_bits=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("operator", ["score_tokens", "sparse_attention"])
def test_contract_triton(operator, dtype):
    pytest.importorskip("triton")
    fn = partial(getattr(zk, operator), backend="triton")
    CHECKS[operator](fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=5)


def test_contract_triton_of_prefill():
    """Of the steps above."""
    pytest.importorskip("triton")
    fn = partial(zk.zipvl_prefill_, backend="triton")
    check_packed_zipvl_prefill(fn, device=DEVICE, dtype=torch.float16, derandomize=True, max_examples=2)


@pytest.mark.parametrize("programs", [(12, 6), (60, 30)])
def test_score_tokens_triton_over_several_tiles(programs):
    """Tiles small enough for several splits and spans, whose number differs from sequence to sequence."""
    pytest.importorskip("triton")
    launch = importlib.import_module("zipvl_kernels._triton.score_tokens").launch

    def fn(q, k, probe_rows, *, scale=None, pool="layer", cu_seqlens=None, max_seqlen=None):
        sizes = 16, 16, 4, 1, *programs
        return launch(q, k, probe_rows, scale, None, None, None, pool, *sizes, cu_seqlens, max_seqlen)

    check_packed_score_tokens(fn, device=DEVICE, derandomize=True, max_examples=4, max_tokens=90)


def test_score_tokens_triton_shares_of_long_and_short_sequences(monkeypatch):
    """One that counts as short has the shares of a short one, whatever the longest is; probes fill several blocks."""
    pytest.importorskip("triton")
    module = importlib.import_module("zipvl_kernels._triton.score_tokens")
    monkeypatch.setattr(module, "SHORT", 40)
    monkeypatch.setattr(module, "FEW", 9)
    monkeypatch.setattr(module, "tiles", lambda dtype, D: (16, 16, 4, 1))
    monkeypatch.setattr(module, "programs", lambda N: (9, 9) if N <= 40 else (36, 20))
    (q, k, _), where = tensors((70, 40, 17, 0, 41))
    options = {"num_recent": 9, "num_random": 30}
    rows = zk.probe_rows(70, **options, cu_seqlens=where["cu_seqlens"])
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in where.items()}
    got = zk.score_tokens(q.to(DEVICE), k.to(DEVICE), rows.to(DEVICE), **given, backend="triton")
    for start, end in zip(*(where["cu_seqlens"].tolist()[i : i or None] for i in (0, 1)), strict=False):
        one = (x[start:end].transpose(0, 1)[None].to(DEVICE) for x in (q, k))
        alone = zk.score_tokens(*one, zk.probe_rows(end - start, **options).to(DEVICE), backend="triton")
        for mine, single in zip(got, alone, strict=True):
            assert torch.equal(mine[:, start:end], single[0])


@pytest.mark.parametrize("tiles", [(16, 16), (16, 32)])
def test_sparse_attention_triton_over_several_tiles(tiles):
    pytest.importorskip("triton")
    launch = importlib.import_module("zipvl_kernels._triton.sparse_attention").launch

    def fn(q, k, v, indices, counts, *, scale=None, kv_compacted=False, cu_seqlens=None, max_seqlen=None):
        return launch(q, k, v, indices, counts, scale, None, kv_compacted, *tiles, 4, 2, cu_seqlens, max_seqlen)

    check_packed_sparse_attention(fn, device=DEVICE, derandomize=True, max_examples=2, max_tokens=90)


@packages
def test_prefill_is_its_steps(package):
    (q, k, v), where = tensors()
    *_, indices, counts, _, steps_k, steps_v, out = steps(package, q, k, v, **where)
    got = package.zipvl_prefill_(q, k, v, tau=0.8, num_recent=2, num_random=3, **where)
    for a, b in zip((*got, k, v), (out, indices, counts, steps_k, steps_v), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("operator", ["score_tokens", "sparse_attention", "zipvl_prefill_"])
def test_catches_one_sequence_that_sees_another(operator):
    """The packed rows taken for one long sequence: right for the first, wrong for all others."""

    def joined(q, k, *rest, cu_seqlens=None, max_seqlen=None, **options):
        if cu_seqlens is not None:
            cu_seqlens, max_seqlen = cu_seqlens.clone(), len(q)
            cu_seqlens[1:-1] = 0
        where = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return getattr(zipvl_reference, operator)(q, k, *rest, **options, **where)

    with pytest.raises(AssertionError):
        CHECKS[operator](joined, derandomize=True, same_bits=False)


BOUNDS = {
    "falls": (ints(0, 9, 4, 20), "cu_seqlens: sequence 1 starts at row 9 and ends before it, at 4"),
    "late start": (ints(2, 9, 9, 20), "cu_seqlens: expected sequence 0 to start at row 0, got 2"),
    "negative": (ints(-5, 9, 9, 20), "cu_seqlens: expected sequence 0 to start at row 0, got -5"),
    "beyond": (ints(0, 7, 12, 23), "cu_seqlens: sequence 2 ends at row 23, and there are 22 rows"),
    "far beyond": (ints(0, 2**31 - 1, -(2**31), 20), "cu_seqlens: sequence 0 ends at row 2147483647"),
    "too long": (ints(0, 13, 13, 20), "max_seqlen: sequence 0 has length 13, which is more than 12"),
}
OPERATORS = ("probe_rows", "score_tokens", "select_tokens", "compact_kv_", "sparse_attention", "zipvl_prefill_")


def call(operator, bounds, backend="auto"):
    """`operator` on 22 rows, of sequences of at most 12, within these bounds."""
    (q, k, v), where = tensors()
    where["cu_seqlens"] = bounds
    options = where if backend == "auto" else {**where, "backend": backend}
    scores = torch.rand(1, len(q)), torch.rand(1, len(q))
    indices = torch.arange(len(q), dtype=torch.int32)[None].clone()
    sets = indices, torch.full((len(bounds) - 1, 1), 22, dtype=torch.int32)  # more than there are, too
    return {
        "probe_rows": lambda: zk.probe_rows(12, cu_seqlens=bounds),
        "score_tokens": lambda: zk.score_tokens(q, k, ints(0, 5, -1), **options),
        "select_tokens": lambda: zk.select_tokens(*scores, tau=0.8, **options),
        "compact_kv_": lambda: zk.compact_kv_(k.clone(), v.clone(), *sets, **options),
        "sparse_attention": lambda: zk.sparse_attention(q, k, v, *sets, **options),
        "zipvl_prefill_": lambda: zk.zipvl_prefill_(q, k.clone(), v.clone(), **options),
    }[operator]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_bounds_are_named_when_asked(monkeypatch, operator, bounds):
    run = call(operator, BOUNDS[bounds][0])
    run()  # off by default: no error, and nothing out of bounds
    monkeypatch.setenv("ZIPVL_CHECK", "1")
    call(operator, ints(0, 7, 7, 19))()
    call(operator, ints(0))()
    if operator == "probe_rows" and bounds == "beyond":  # it does not know how many rows there are
        return
    message = BOUNDS[bounds][1]
    if operator == "probe_rows" and bounds == "far beyond":
        message = "max_seqlen: sequence 0 has length 2147483647"
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("bounds", BOUNDS)
def test_bad_bounds_lead_nowhere_in_triton(bounds):
    """What lies around the tensors stays as it is, and reading or writing elsewhere would fault in the interpreter."""
    pytest.importorskip("triton")
    bounds = BOUNDS[bounds][0]
    drawn = importlib.import_module("zipvl_kernels._triton.probe_rows").probe_rows
    wanted = zk.probe_rows(12, cu_seqlens=bounds)
    bounds = bounds.to(DEVICE)
    assert torch.equal(drawn(12, device=DEVICE, cu_seqlens=bounds).cpu(), wanted)
    (q, k, v), where = tensors(more=6)
    around = [torch.nn.functional.pad(x, (0, 0, 0, 0, 30, 30), value=7.0).to(DEVICE) for x in (q, k, v)]
    q, k, v = (x[30:56] for x in around)
    where["cu_seqlens"] = bounds
    before = [x.clone() for x in around]
    out, indices, counts = zk.zipvl_prefill_(q, k, v, **where, backend="triton")
    assert out.shape == q.shape
    assert bool((counts >= 0).all() & (counts <= 12).all())
    zk.sparse_attention(q, k, v, indices, counts + 30, **where, backend="triton")
    for now, old in zip(around, before, strict=True):
        assert torch.equal(now[:30], old[:30])
        assert torch.equal(now[56:], old[56:])


def test_sets_of_other_bounds_lead_nowhere_in_triton():
    """Gathered rows stay within their sequence, whatever sets other bounds have left in its place."""
    pytest.importorskip("triton")
    (q, k, v), where = tensors((10, 4), more=0)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 14, 14), value=torch.nan).to(DEVICE)[14:28] for x in (k, v))
    for columns in ((9, 11, 12, 3), (-20, -1, 0, 3)):
        indices = ints(*range(10), *columns).to(DEVICE)[None]
        given = {**where, "cu_seqlens": where["cu_seqlens"].to(DEVICE)}
        out = zk.sparse_attention(
            q.to(DEVICE), k, v, indices, ints(10, 4).to(DEVICE)[:, None], **given, backend="triton"
        )
        assert out.isfinite().all()


(q, k, v), where = tensors()
rows, accumulated, normalized, indices, counts, *_ = steps(zk, q, k, v, **where)
CALLS = {
    "score_tokens": (q, k, rows),
    "select_tokens": (accumulated, normalized),
    "compact_kv_": (k, v, indices, counts),
    "sparse_attention": (q, k, v, indices, counts),
    "zipvl_prefill_": (q, k, v),
}
SHARE = {"select_tokens": {"tau": 0.8}}


def unpacked(x):
    return x[None] if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, "max_seqlen: .*with cu_seqlens, got None", {"max_seqlen": None}),
        (ValueError, "max_seqlen: .*at least 0, got -1", {"max_seqlen": -1}),
        (TypeError, "max_seqlen: .*got 2.5", {"max_seqlen": 2.5}),
        (TypeError, "cu_seqlens: .*Tensor, got list", {"cu_seqlens": [0, 4]}),
        (
            TypeError,
            r"cu_seqlens: expected int32 \[B \+ 1\], got torch.int64",
            {"cu_seqlens": where["cu_seqlens"].long()},
        ),
        (ValueError, r"cu_seqlens: .*\[1\], got shape \[0\]", {"cu_seqlens": where["cu_seqlens"][:0]}),
        (ValueError, r"cu_seqlens: .*got shape \[1, 5\]", {"cu_seqlens": where["cu_seqlens"][None]}),
        (ValueError, "cu_seqlens: .*on cpu.*on meta", {"cu_seqlens": where["cu_seqlens"].to("meta")}),
    ],
)
def test_errors(operator, error, match, changed):
    with pytest.raises(error, match=match):
        getattr(zk, operator)(*CALLS[operator], **SHARE.get(operator, {}), **{**where, **changed})


@pytest.mark.parametrize("operator", CALLS)
def test_packed_and_padded_arguments_do_not_mix(operator):
    fn, arguments, share = getattr(zk, operator), CALLS[operator], SHARE.get(operator, {})
    first = "accumulated" if operator == "select_tokens" else "k" if operator == "compact_kv_" else "q"
    with pytest.raises(ValueError, match=f"{first}: expected .*with cu_seqlens, got shape"):
        fn(*arguments, **share)
    with pytest.raises(ValueError, match=f"{first}: expected .*with cu_seqlens, got shape"):
        fn(*map(unpacked, arguments), **share, **where)
    (dense_q, dense_k, dense_v), sets = (torch.rand(1, 2, 6, 8) for _ in range(3)), torch.zeros(1, 1, 6).int()
    dense = {
        "score_tokens": (dense_q, dense_k, rows[0]),
        "select_tokens": (torch.rand(1, 1, 6), torch.rand(1, 1, 6)),
        "compact_kv_": (dense_k, dense_v, sets, sets[..., 0]),
        "sparse_attention": (dense_q, dense_k, dense_v, sets, sets[..., 0]),
        "zipvl_prefill_": (dense_q, dense_k, dense_v),
    }
    with pytest.raises(ValueError, match="max_seqlen: expected None without cu_seqlens, got 9"):
        fn(*dense[operator], **share, max_seqlen=9)
    padded = {
        "select_tokens": ("leftpad_k", "seqused_k"),
        "compact_kv_": ("dst_start",),
        "sparse_attention": ("q_start",),
    }
    for name in padded.get(operator, ("q_start", "leftpad_k", "seqused_k")):
        with pytest.raises(ValueError, match=f"{name}: expected None with cu_seqlens.*got Tensor"):
            fn(*arguments, **share, **where, **{name: ints(0, 0, 0, 0)})


def attend(*sets):
    zk.sparse_attention(q, k, v, *sets, **where)


@pytest.mark.parametrize(
    ("error", "match", "run"),
    [
        (ValueError, r"probe_rows: .*\[4, 5\], got shape \[3, 5\]", lambda: zk.score_tokens(q, k, rows[:3], **where)),
        (ValueError, r"k: .*\[T, Hkv, D\] with T = 22", lambda: zk.score_tokens(q, k[:9], rows, **where)),
        (ValueError, "k: .*contiguous last dim", lambda: zk.score_tokens(q, k.mT.contiguous().mT, rows, **where)),
        (ValueError, "v: .*shape of k", lambda: zk.zipvl_prefill_(q, k, v[:9], **where)),
        (ValueError, r"indices: .*\[1, 22\] or \[2, 22\]", lambda: attend(indices[:, 1:], counts)),
        (ValueError, r"counts: .*\[4, 1\]", lambda: attend(indices, counts[1:])),
        (ValueError, "normalized: .*shape", lambda: zk.select_tokens(accumulated, normalized[:, 1:], tau=0.5, **where)),
        (TypeError, "cu_seqlens: .*int64", lambda: zk.probe_rows(9, cu_seqlens=where["cu_seqlens"].long())),
        (ValueError, "cu_seqlens: .*on meta.*on cpu", lambda: zk.probe_rows(9, device="meta", cu_seqlens=ints(0))),
    ],
)  # fmt: skip
def test_errors_of_shapes(error, match, run):
    with pytest.raises(error, match=match):
        run()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("more", [0, 5])
@packages
def test_no_sequence_or_empty_ones(package, lengths, more):
    (q, k, v), where = tensors(lengths, more=more)
    got = steps(package, q, k, v, **where)
    assert got[0].shape == (len(lengths), 0)
    assert got[1].shape == got[3].shape == (1, more)
    assert got[4].shape == (len(lengths), 1)
    assert not got[4].any()
    assert got[5].shape == q.shape
    out, indices, counts = package.zipvl_prefill_(q, k, v, **where)
    assert (out.shape, indices.shape, counts.shape) == (q.shape, (1, more), (len(lengths), 1))


def test_no_sequence_or_empty_ones_triton():
    pytest.importorskip("triton")
    for lengths in ((), (0, 0)):
        for more in (0, 5):
            (q, k, v), where = tensors(lengths, more=more)
            where["cu_seqlens"] = where["cu_seqlens"].to(DEVICE)
            where["max_seqlen"] = 7  # more than there are
            _, _, counts = zk.zipvl_prefill_(*(x.to(DEVICE) for x in (q, k, v)), **where, backend="triton")
            assert counts.tolist() == [[0]] * len(lengths)


def test_max_seqlen_cuts_sequences_that_are_longer():
    (q, k, v), where = tensors((20,), more=0)
    _, indices, counts = zk.zipvl_prefill_(q, k, v, keep_ratio=1.0, cu_seqlens=where["cu_seqlens"], max_seqlen=8)
    assert counts.tolist() == [[8]]
    assert indices[0, :8].tolist() == list(range(8))


REGISTERED = {
    "score_tokens": (None, None, None, None, "layer", "auto"),
    "select_tokens": (0.8, None, 0, 1, None, None, "auto"),
    "sparse_attention": (None, None, False, "auto"),
    "zipvl_prefill_": (0.9, None, 4, 4, 0, 0, 1, None, None, None, None, "kv_head", "auto"),
}


@pytest.mark.parametrize("operator", REGISTERED)
def test_registration(operator):
    arguments = [x.clone() for x in CALLS[operator]]
    rest = *REGISTERED[operator], where["cu_seqlens"], where["max_seqlen"]
    torch.library.opcheck(getattr(torch.ops.zipvl, operator).default, (*arguments, *rest))


def test_registration_of_probe_rows():
    arguments = 50, 8, 8, 3, torch.device("cpu"), where["cu_seqlens"]
    torch.library.opcheck(torch.ops.zipvl.probe_rows.default, arguments)


def test_compiles():
    compiled = torch.compile(partial(steps, zk), fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((7, 0, 1, 12), (3, 30), (5,)):
        (q, k, v), where = tensors(lengths)
        for got, wanted in zip(compiled(q, k, v, **where), steps(zk, q, k, v, **where), strict=True):
            assert torch.equal(got, wanted)
