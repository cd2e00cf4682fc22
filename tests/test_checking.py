"""`ZIPVL_CHECK=1`: what is wrong in tensors is found on the host, named, and nothing has been written."""

import pytest
import torch

import zipvl_kernels as zk

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("ZIPVL_CHECK", "1")


def ints(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def compaction(groups=1, **changed):
    """Arguments: two sequences of 9 and 6 rows in pages of 4, the first of which they share; the pool has 7 pages."""
    k = torch.randn(7, 4, 2, 8)
    sets = torch.full((2, groups, 9), -1, dtype=torch.int32)
    sets[0, :, :6], sets[1, :, :5] = ints(0, 1, 2, 3, 5, 8), ints(0, 1, 2, 3, 5)
    good = {
        "k_cache": k,
        "v_cache": -k,
        "indices": sets,
        "counts": ints([6], [5]).repeat(1, groups),
        "block_table": ints([6, 0, 3], [6, 5, 2**31 - 1]),
        "seqused_k": ints(9, 6),
        "first_writable": ints(4, 4),
    }
    return good | changed


def with_set(b, *columns, groups=1):
    """The argument `indices` with another set of sequence `b`."""
    indices = compaction(groups)["indices"].clone()
    indices[b, -1, : len(columns)] = ints(*columns)
    return indices


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_what_is_right_passes(checked, layout):
    arguments = compaction()
    for name in ("k_cache", "v_cache"):
        pool = arguments[name]
        arguments[name] = pool.transpose(1, 2).contiguous() if layout == "HND" else pool.clone()
    seqused, freed = zk.compact_paged_kv_(**arguments, layout=layout)
    assert (seqused.tolist(), freed.tolist()) == ([6, 5], [1, 0])
    assert zk.compact_paged_kv_(**compaction(seqused_k=ints(0, 0), counts=ints([0], [0])))[1].tolist() == [0, 0]
    nothing = compaction()
    names = ("indices", "counts", "block_table", "seqused_k", "first_writable")
    zk.compact_paged_kv_(**nothing | {name: nothing[name][:0] for name in names})


# What is wrong, and how it is named.
PAGES = [
    ({"block_table": ints([6, 7, 3], [6, 5, 9])}, r"block_table: sequence 0 .*pool of 7: .*\[0, 1\] is page 7"),
    (
        {"block_table": ints([6, 0, -1], [6, 5, 9])},
        r"block_table: sequence 0 of length 9 needs a page for .* 8 on.*free",
    ),
    ({"block_table": ints([6, 0, 3], [5, 5, 9])}, r"block_table: sequence 1 has a page twice: .*\[1, 1\] is page 5"),
    ({"seqused_k": ints(9, 13)}, "seqused_k: sequence 1 has length 13, and 3 pages of 4 rows hold 0 to 12"),
    ({"seqused_k": ints(-1, 6)}, "seqused_k: sequence 0 has length -1"),
]
COMPACTIONS = [
    *PAGES,
    ({"first_writable": ints(3, 4)}, "sequence 0 may write page 6 .*is 3.*belongs to sequence 1"),
    ({"first_writable": None}, "sequence 0 may write page 6 .*is 0.*belongs to sequence 1"),
    ({"block_table": ints([6, 0, 3], [6, 3, 9])}, "sequence 0 may write page 3 .*sequence 1"),
    ({"counts": ints([6], [7])}, "counts: sequence 1, group 0 keeps 7 rows, and may keep 0 to 6"),
    ({"counts": ints([-1], [5])}, "counts: sequence 0, group 0 keeps -1 rows"),
    ({"indices": with_set(0, 0, 1, 2, 3, 8, 5)}, "indices: sequence 0, group 0 .*got 5 after 8 at place 5"),
    ({"indices": with_set(1, 0, 1, 2, 3, 6)}, "indices: sequence 1, group 0 .*below 6.*got 6 after 3"),
    ({"indices": with_set(1, 0, 1, 3, 4, 5)}, "sequence 1, group 0 has to keep .*first_writable, 4, .*lacks row 2"),
    (compaction(2, indices=with_set(0, 1, 2, 3, 4, 5, 8, groups=2)), "indices: sequence 0, group 1 .*lacks row 0"),
]


@pytest.mark.parametrize(("changed", "message"), COMPACTIONS)
def test_compaction(checked, monkeypatch, changed, message):
    arguments = compaction() | changed
    before = arguments["k_cache"].clone()
    with pytest.raises(ValueError, match=message):
        zk.compact_paged_kv_(**arguments)
    assert torch.equal(arguments["k_cache"], before)
    monkeypatch.delenv("ZIPVL_CHECK")
    zk.compact_paged_kv_(**arguments)  # off by default: no error, and nothing out of bounds


@pytest.mark.parametrize(("changed", "message"), PAGES)
@pytest.mark.parametrize("return_lse", [False, True])
def test_decoding(checked, monkeypatch, changed, message, return_lse):
    arguments = compaction() | changed
    q, pools = torch.randn(2, 4, 1, 8), (arguments["k_cache"], arguments["v_cache"])
    options = {"block_table": arguments["block_table"], "return_lse": return_lse}
    with pytest.raises(ValueError, match=message):
        zk.decode_attention(q, *pools, arguments["seqused_k"], **options)
    monkeypatch.delenv("ZIPVL_CHECK")
    zk.decode_attention(q, *pools, arguments["seqused_k"], **options)


def over_pages(operator, changed, **options):
    """The operator on the arguments of `compaction`, for a chunk of 3 rows."""
    given = compaction() | changed
    q, (k, v) = torch.randn(2, 4, 3, 8), (given["k_cache"], given["v_cache"])
    options |= {name: given[name] for name in ("block_table", "seqused_k")}
    if operator == "score_tokens":
        return zk.score_tokens(q, k, ints(0, 2), **options)
    return zk.sparse_attention(q, k, v, given["indices"], given["counts"], **options)


SETS = [  # of those of a compaction, what matters where nothing is written
    ({"counts": ints([6], [7])}, "counts: sequence 1, group 0 keeps 7 rows, and may keep 0 to 6"),
    ({"indices": with_set(0, 0, 1, 2, 3, 8, 5)}, "indices: sequence 0, group 0 .*got 5 after 8 at place 5"),
    ({"indices": with_set(1, 0, 1, 2, 3, 6)}, "indices: sequence 1, group 0 .*below 6.*got 6 after 3"),
]


@pytest.mark.parametrize(
    ("operator", "changed", "message"),
    [
        *((operator, *case) for operator in ("score_tokens", "sparse_attention") for case in PAGES),
        *(("sparse_attention", *case) for case in SETS),
    ],
)
def test_scores_and_attention(checked, monkeypatch, operator, changed, message):
    with pytest.raises(ValueError, match=message):
        over_pages(operator, changed)
    monkeypatch.delenv("ZIPVL_CHECK")
    over_pages(operator, changed)


def test_attention_over_compacted_pages(checked):
    """Pages that came free may be gone from the table; those of the kept rows may not."""
    over_pages("score_tokens", {})
    over_pages("sparse_attention", {})
    freed = ints([6, 0, -1], [6, 5, -1])
    over_pages("sparse_attention", {"block_table": freed}, kv_compacted=True)
    with pytest.raises(ValueError, match="block_table: sequence 0 of length 6 needs a page for rows from 4 on"):
        over_pages("sparse_attention", {"block_table": ints([6, -1, -1], [6, 5, -1])}, kv_compacted=True)
    with pytest.raises(ValueError, match="counts: sequence 0 has length 6, and 1 pages of 4 rows hold 0 to 4"):
        over_pages("sparse_attention", {"block_table": freed[:, :1]}, kv_compacted=True)


def test_decoding_may_share_any_page(checked):
    arguments = compaction()
    table = ints([6, 0, 3], [6, 0, 3])
    pools = arguments["k_cache"], arguments["v_cache"]
    zk.decode_attention(torch.randn(2, 4, 1, 8), *pools, arguments["seqused_k"], block_table=table)


def test_in_compiled_code(checked):
    compiled = torch.compile(zk.compact_paged_kv_, fullgraph=True, backend="aot_eager")
    compiled(**compaction())
    with pytest.raises(ValueError, match="sequence 1 has length 13"):
        compiled(**compaction(seqused_k=ints(9, 13)))
