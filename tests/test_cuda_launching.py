"""Launching CUDA C kernels without the host time that CuPy takes: the right arguments. Needs no GPU."""

import ctypes
import importlib.util
import struct
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cuda_over_nothing import KERNELS, OPTIONS, qkv

import zipvl_kernels as zk
from zipvl_kernels import _backends

GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda_common(monkeypatch):
    """`zipvl_kernels._cuda.common` over a CuPy that only notes what reaches the driver."""

    class DriverError(RuntimeError):
        def __init__(self, status):
            self.status = status

    names = ("cupy", "cupy.cuda", "cupy.cuda.driver", "cupy.cuda.function", "cupy.cuda.nvrtc", "cupy.cuda.runtime")
    fakes = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        setattr(fakes[name.rpartition(".")[0]], name.rpartition(".")[2], fakes[name])
    launched, errors, freed = [], [], []

    def start(config, function, pointers, extra):
        if errors:
            return errors.pop()
        *sizes, stream, _, attributes = struct.unpack("=7I4xQQI4x", ctypes.string_at(config, 56))
        parameters = ctypes.string_at(ctypes.c_void_p.from_address(pointers).value, 5)
        launched.append((function, *sizes, stream, attributes, parameters, extra))
        return 0

    fakes["cupy.cuda.driver"].CUDADriverError = DriverError
    fakes["cupy.cuda.runtime"].free = freed.append
    fakes["cupy.cuda.function"].Function = fakes["cupy.cuda.function"].Module = object
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    source = Path(zk.__file__).parent / "_cuda" / "common.py"
    spec = importlib.util.spec_from_file_location("cuda_common_over_nothing", source)  # beside the real one, if any
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "current_device", lambda: 0)
    monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "_start", lambda: start)
    return module, launched, errors, freed


def test_cuda_launch_passes_the_bytes(cuda_common, monkeypatch):
    module, launched, _, _ = cuda_common
    fixed = SimpleNamespace(ptr=23), GPU, 40, 256, struct.Struct("=2s"), b"b\0c"
    step = module.Launch(*fixed, shared=1024)
    step(7, b"a\0")
    monkeypatch.setattr(module, "capability", lambda device: (8, 0))  # kernels do not overlap there
    module.Launch(*fixed)(7, b"a\0")
    step(9, b"xy")
    monkeypatch.setattr(module, "current_stream", lambda device: 5)
    module.launch(step, b"xz")
    sizes = 40, 1, 1, 256, 1, 1
    expected = [(1024, 7, 1, b"a\0"), (0, 7, 0, b"a\0"), (1024, 9, 1, b"xy"), (1024, 5, 1, b"xz")]
    assert launched == [(23, *sizes, x, stream, n, at + b"b\0c", None) for x, stream, n, at in expected]
    assert struct.unpack("=i4xi60x", module._ATTRIBUTE.raw) == (6, 1)


def test_cuda_launch_in_a_thread_without_a_context(cuda_common):
    module, launched, errors, freed = cuda_common
    step = module.Launch(SimpleNamespace(ptr=23), GPU, 40, 256, struct.Struct("=2s"), b"cde")
    errors.append(module.INVALID_CONTEXT)
    step(7, b"ab")
    assert (len(launched), freed) == (1, [0])
    errors.append(700)
    with pytest.raises(RuntimeError):
        step(7, b"ab")
    assert len(launched) == 1


def step_by_step(
    cuda, q, k, v, *, tau, keep_ratio, num_recent, num_random, seed, keep_first, keep_recent,
    cu_seqlens=None, max_seqlen=None, **options,
):  # fmt: skip
    packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    draw = {"num_recent": num_recent, "num_random": num_random, "seed": seed, "cu_seqlens": cu_seqlens}
    rows = cuda.probe_rows.probe_rows(max_seqlen if packed else q.shape[2], **draw)
    scores = cuda.score_tokens.score_tokens(q, k, rows, **options, **packed)
    share = {"tau": tau if keep_ratio is None else None, "keep_ratio": keep_ratio}
    forced, padding = {"keep_first": keep_first, "keep_recent": keep_recent}, ("leftpad_k", "seqused_k")
    padding = {name: options[name] for name in padding}
    kept = cuda.select_tokens.select_tokens(*scores, **share, **forced, **padding, **packed)
    cuda.compact_kv.compact_kv_(k, v, *kept, **packed)
    rest = {"scale": options["scale"], "q_start": options["q_start"], **packed}
    return cuda.sparse_attention.sparse_attention(q, k, v, *kept, **rest, kv_compacted=True), *kept


def by_name(cuda, known, out):
    """What was launched, with names in place of addresses: those known, `out`, then numbers in order of appearance."""
    names, launches = dict(known), []
    for kernel, config, parameters in cuda.launched:
        module = getattr(cuda, "score_tokens" if kernel in ("row_sums", "column_sums") else kernel)
        (*addresses,) = module._ADDRESSES.unpack_from(parameters)
        if kernel == "sparse_attention":
            assert addresses[3] == out
            addresses[3] = 0
        addresses = [names.setdefault(x, len(names)) if isinstance(x, int) and x > 1 << 32 else x for x in addresses]
        launches.append((kernel, config, addresses, parameters[module._ADDRESSES.size :]))
    cuda.launched.clear()
    return launches


@pytest.mark.parametrize(
    ("shape", "changed"),
    [
        ((1, 28, 4, 2880, 2880, 128), {}),
        ((2, 8, 2, 300, 300, 64), {"pool": "kv_head", "padded": True, "seed": 2**40 + 1}),
        ((1, 40, 40, 1, 700, 128), {"keep_ratio": 0.4, "keep_first": 3, "keep_recent": 9, "scale": 0.3}),
        ((3, 4, 4, 50, 4000, 64), {"q_start": True, "num_recent": 0, "num_random": 7, "dtype": torch.float16}),
        ((1, 1, 1, 1, 1, 64), {}),
    ],
    ids=str,
)
def test_one_plan_launches_what_the_steps_launch(cuda, shape, changed):
    B, N = shape[0], shape[4]
    options = {**OPTIONS, **changed}
    q, k, v = qkv(*shape, dtype=options.pop("dtype", torch.bfloat16))
    if options.pop("padded", False):
        options["leftpad_k"] = torch.zeros(2 * B, dtype=torch.int32)[::2]  # copied, since its stride is not 1
        options["seqused_k"] = torch.full((B,), N, dtype=torch.int32)
    if options["q_start"]:
        options["q_start"] = torch.zeros(B, dtype=torch.int32)
    found = []
    for fn in (partial(step_by_step, cuda), cuda.zipvl_prefill.zipvl_prefill_, cuda.zipvl_prefill.zipvl_prefill_):
        out, indices, counts = fn(q, k, v, **options)
        given = {name: x.data_ptr() for name, x in options.items() if isinstance(x, torch.Tensor) and x.is_contiguous()}
        known = {"q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), **given}
        known |= {"indices": indices.data_ptr(), "counts": counts.data_ptr()}
        found.append(by_name(cuda, {at: name for name, at in known.items()}, out.data_ptr()))
        assert (out.shape, indices.shape[2], out.is_contiguous()) == (q.shape, N, True)
        assert [x.dtype for x in (out, indices, counts)] == [q.dtype, torch.int32, torch.int32]
    steps, first, again = found
    assert [kernel for kernel, *_ in steps] == list(KERNELS)
    assert first == again == steps
    assert len(cuda.zipvl_prefill._plans) == 1


@pytest.mark.parametrize(
    ("heads", "D", "lengths", "changed"),
    [
        ((28, 4), 128, [2880, 0, 1, 700, 4096], {}),
        ((8, 2), 64, [40, 300], {"pool": "kv_head", "seed": 2**40 + 1, "max_seqlen": 200}),
        ((4, 4), 64, [50] * 7, {"keep_ratio": 0.4, "keep_first": 3, "scale": 0.3, "dtype": torch.float16}),
    ],
    ids=str,
)
def test_one_plan_launches_packed_sequences_as_the_steps_do(cuda, heads, D, lengths, changed):
    options = {**OPTIONS, "max_seqlen": max(lengths), **changed}
    T, dtype = sum(lengths), options.pop("dtype", torch.bfloat16)
    fused = torch.zeros(T, heads[0] + 2 * heads[1], D, dtype=dtype)  # as a projection to all three gives them
    q, k, v = fused.split((heads[0], heads[1], heads[1]), dim=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    G, found = 1 if options["pool"] == "layer" else heads[1], []
    for fn in (partial(step_by_step, cuda), cuda.zipvl_prefill.zipvl_prefill_, cuda.zipvl_prefill.zipvl_prefill_):
        out, indices, counts = fn(q, k, v, **options, cu_seqlens=bounds)
        known = {"q": q, "k": k, "v": v, "indices": indices, "counts": counts, "cu_seqlens": bounds}
        found.append(by_name(cuda, {x.data_ptr(): name for name, x in known.items()}, out.data_ptr()))
        assert (out.shape, indices.shape, counts.shape) == (q.shape, (G, T), (len(lengths), G))
        assert out.is_contiguous()
    steps, first, again = found
    assert [kernel for kernel, *_ in steps] == list(KERNELS)
    assert first == again == steps
    for kernel, _, addresses, _ in steps:
        assert "cu_seqlens" in addresses, kernel


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
@pytest.mark.parametrize(
    "shape", [(1, 28, 4, 2880, 2880, 128), (2, 8, 2, 17, 32768, 64), (1, 40, 40, 100, 131072, 64), (1, 4, 2, 3, 5, 64)]
)
def test_parts_of_the_scratch_are_apart(cuda, shape, pool):
    B, Hq, _, M, N, D = shape
    q, k, v = qkv(*shape)
    plan = cuda.zipvl_prefill.prepared(q, k, v, 0.9, None, 64, 64, 0, 1, None, True, pool)
    G, P = plan.sets[1], min(M, 128)
    layout = q.shape, k.shape, (P,), q.stride(), (1,)
    _, sizes = cuda.score_tokens.prepared(q.device, False, *layout, G, None)
    least = [4 * n for n in (P, *sizes, B * G * N, B * G * N)]
    assert all(x % 128 == 0 for x in plan.offsets)
    assert all(end - begin >= n for (begin, end), n in zip(pairwise(plan.offsets), least, strict=True))
    assert len(plan.offsets) == 7
    assert plan.in_out == (plan.offsets[-1] <= 2 * B * Hq * M * D)
    if pool == "layer" and N >= 2880:
        assert plan.offsets[-1] <= 64 * B * N + 4096  # and none at all where it is in `out`


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"dtype": torch.float32}, "q: expected float16 or bfloat16"),
        ({"scale": 0.0}, "scale: expected more than 0"),
        ({"num_random": 600}, "probe_rows: expected at most 512"),
        ({"B": 600}, "counts: expected at most 512 sets"),
        ({"D": 80}, "q: expected a head dim"),
        ({"shift": 1}, "q: expected rows that start at multiples of 16 bytes"),
        ({"N": 0}, ""),
        ({"B": 0}, ""),
        ({"M": 0}, ""),
    ],
    ids=str,
)
def test_a_plan_says_what_it_lacks(cuda, changed, why):
    sizes = {"B": 1, "Hq": 2, "Hkv": 1, "M": 700, "N": 700, "D": 64, "dtype": torch.bfloat16}
    q, k, v = qkv(**{**sizes, **{name: x for name, x in changed.items() if name in sizes}})
    if "shift" in changed:
        q = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    options = {name: x for name, x in changed.items() if name in OPTIONS}
    for _ in range(2):
        found = cuda.zipvl_prefill.zipvl_prefill_(q, k, v, **{**OPTIONS, **options})
        assert isinstance(found, str)
        assert found.startswith(why)
        assert bool(found) == bool(why)
    assert not cuda.launched


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("page", "width"), [(16, 180), (256, 12)])
def test_scores_over_pages_are_launched_as_over_one_buffer(cuda, page, width, layout):
    """Of as many rows as the table has room for; what differs is where the rows are."""
    N = page * width
    q, k, _ = qkv(2, 28, 4, 700, N, 128)
    pool = (
        torch.zeros(9, page, 4, 128, dtype=q.dtype) if layout == "NHD" else torch.zeros(9, 4, page, 128, dtype=q.dtype)
    )
    table, used, rows = torch.zeros(2, 2 * width).int()[:, ::2], torch.full((2,), N).int(), torch.arange(128).int()
    paged = {"seqused_k": used, "block_table": table, "layout": layout}
    assert cuda.score_tokens.lacks(q, pool, rows, **paged) == ""
    scores = cuda.score_tokens.score_tokens(q, pool, rows, **paged)
    assert [x.shape for x in scores] == [(2, 1, N)] * 2
    found, pages = parameters_of_scores(cuda)
    cuda.score_tokens.score_tokens(q, k, rows, seqused_k=used)
    wanted, none = parameters_of_scores(cuda)
    assert found == wanted
    assert pages == [(table.data_ptr(), 2 * width, 2, 9)] * 2
    assert none == [(0, 0, 0, 2)] * 2


def parameters_of_scores(cuda):
    """Of both launches: grids, and parameters but for where K and the scratch are; and those of pages."""
    numbers, pages, module = [], [], cuda.score_tokens
    for kernel, config, parameters in cuda.launched:
        *_, table = module._ADDRESSES.unpack_from(parameters)
        shares, *rest, num_blocks = module._NUMBERS.unpack_from(parameters, module._ADDRESSES.size)
        numbers.append((kernel, config, shares, rest[:5], rest[7:]))
        pages.append((table, *rest[5:7], num_blocks))
    cuda.launched.clear()
    return numbers, pages


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_attention_over_pages_is_launched_as_over_one_buffer(cuda, layout):
    page, width, module = 16, 25, cuda.sparse_attention
    q, k, v = qkv(2, 28, 4, 70, page * width, 64)
    pools = torch.zeros(2, 9, *((page, 4) if layout == "NHD" else (4, page)), 64, dtype=q.dtype).unbind()
    sets = torch.zeros(2, 1, page * width).int(), torch.zeros(2, 1).int()
    table, used = torch.zeros(2, width).int(), torch.full((2,), page * width).int()
    paged = {"kv_compacted": True, "seqused_k": used, "block_table": table, "layout": layout}
    assert module.lacks(q, *pools, *sets, **paged) == ""
    found = []
    for keys, where in ((pools, paged), ((k, v), {"kv_compacted": True})):
        assert module.sparse_attention(q, *keys, *sets, **where).shape == q.shape
        ((kernel, config, parameters),) = cuda.launched
        cuda.launched.clear()
        *_, lengths, pages = module._ADDRESSES.unpack_from(parameters)
        *numbers, num_blocks = module._NUMBERS.unpack_from(parameters, module._ADDRESSES.size)
        found.append((kernel, config, numbers[:8], numbers[10:]))
        over_pages = used.data_ptr(), table.data_ptr(), width, 1, 9
        assert (lengths, pages, *numbers[8:10], num_blocks) == (over_pages if where is paged else (0, 0, 0, 0, 2))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"page": 24}, "k: expected pages of 16, 32, 64, 128, 256 rows, got 24"),
        ({"page": 512}, "k: expected pages of 16, 32, 64, 128, 256 rows, got 512"),
        ({"width": 2**26 + 1}, "block_table: expected at most 1073741824 rows of a sequence"),
        ({"leftpad_k": torch.zeros(1).int()}, "leftpad_k: expected None with a block_table"),
        ({"seqused_k": None}, "seqused_k: expected int32 [B] with a block_table, got None"),
        ({"dtype": torch.float32}, "q: expected float16 or bfloat16"),
        ({}, ""),
    ],
    ids=str,
)
def test_kernels_over_pages_say_what_they_lack(cuda, changed, why):
    given = {"page": 16, "width": 3, "dtype": torch.bfloat16, "seqused_k": torch.ones(1).int()} | changed
    page, width, dtype = (given.pop(name) for name in ("page", "width", "dtype"))
    q, pool = torch.zeros(1, 2, 9, 64, dtype=dtype), torch.zeros(4, page, 2, 64, dtype=dtype)
    where = {**given, "block_table": torch.zeros(1, 1).int().expand(1, width)}
    found = [cuda.score_tokens.lacks(q, pool, torch.arange(9).int(), **where)]
    if "leftpad_k" not in where:
        sets = torch.zeros(1, 1, 9).int(), torch.zeros(1, 1).int()
        found.append(cuda.sparse_attention.lacks(q, pool, pool, *sets, kv_compacted=True, **where))
        if not why:
            in_place = cuda.sparse_attention.lacks(q, pool, pool, *sets, **where)
            assert in_place == "kv_compacted: expected True, got False"
    for said in found:
        assert said.startswith(why)
        assert bool(said) == bool(why)


def test_what_a_kernel_lacks_is_asked_once():
    asked = []

    def lacks(x):
        asked.append(x)
        return "" if x > 0 else f"x: expected more than 0, got {x}"

    auto = _backends._first_that_can([(lambda x: "kernel", lacks), (lambda x: "reference", None)])
    assert [auto(1), auto(-1), asked] == ["kernel", "reference", [1, -1]]
    explicit = _backends._or_raise("cuda", lambda x: "kernel", lacks)
    assert explicit(2) == "kernel"
    with pytest.raises(ValueError, match=r"^backend='cuda': x: expected more than 0, got -2$"):
        explicit(-2)
    assert asked == [1, -1, 2, -2]


def test_layers_go_in_launches_of_64(cuda):
    """Addresses of each layer stand one after the other; what a launch holds for no layer is 0."""
    _, *kv = qkv(1, 1, 2, 1, 9, 64)
    lists = [[x.clone() for _ in range(70)] for x in kv]
    lists += [[torch.zeros(shape, dtype=torch.int32) for _ in range(70)] for shape in ((1, 1, 9), (1, 1))]
    cuda.compact_kv.compact_kv_(*lists)
    first, second = (struct.unpack("=4Q", parameters[:32]) for _, _, parameters in cuda.launched)
    assert first == tuple(x[0].data_ptr() for x in lists)
    assert second == tuple(x[64].data_ptr() for x in lists)
    found, addresses, layers = cuda.compact_kv.moving.of_layers(*(x[64:] for x in lists))
    assert [x is y[64] for x, y in zip(found, lists, strict=True)] == [True] * 4
    assert (layers, len(addresses), addresses[24:]) == (6, 4 * 64, [0] * 4 * 58)


def test_rows_are_read_as_wide_as_they_allow(cuda):
    of = cuda.compact_kv.moving.Row.of
    assert of(256, 0, [512], [3], 256) == (16, 16, 16, 1)
    assert of(160, 0, [160], [3], 256) == (16, 10, 16, 1)
    assert of(256, 8, [512], [3], 256) == (8, 32, 32, 1)
    assert of(256, 0, [514], [3], 256) == (2, 128, 128, 1)
    assert of(256, 0, [514], [1], 256) == (16, 16, 16, 1)  # one row has no stride
    assert of(600, 0, [602], [3], 256) == (2, 150, 256, 2)
    assert of(2 * 521, 0, [1042], [3], 256) == (2, 1, 1, 521)  # 521 is prime


@pytest.mark.parametrize("packed", [None, (3, 40000)], ids=["batch", "packed"])
def test_clusters_of_eight_where_there_is_no_room_for_sixteen(cuda, monkeypatch, packed):
    shape, stride = ((1, 40000), (50000, 1)) if packed else ((1, 1, 40000), (70000, 50000, 1))
    given = torch.device("cpu"), torch.Size(shape), stride, stride, 0.9, None, 0, 1, packed
    numbers = {}
    for room in (1, 0):
        monkeypatch.setattr(cuda.common, "clusters_at_once", lambda step, room=room: room)
        cuda.select_tokens.prepared.cache_clear()
        step = cuda.select_tokens.prepared(*given)
        sets = packed[0] if packed else 1
        numbers[struct.unpack_from("=I", step.config)[0] // sets] = bytes(step.parameters)
    assert list(numbers) == [16, 8]
    assert numbers[16] == numbers[8]


@pytest.mark.parametrize(
    ("N", "sets", "hopper", "chosen"),
    [
        (2880, 1, True, (4, 512)),  # these four are what was fastest on an H200
        (8192, 1, True, (8, 512)),
        (32768, 1, True, (16, 512)),
        (131072, 1, True, (16, 1024)),
        (2880, 60, True, (2, 512)),
        (2880, 100, True, (1, 1024)),  # a block each, which has more columns than 512 threads hold
        (2000, 100, True, (1, 512)),
        (2880, 1, False, (1, 1024)),
    ],
)
def test_select_tokens_takes_threads_that_hold_the_columns(cuda, monkeypatch, N, sets, hopper, chosen):
    monkeypatch.setattr(cuda.common, "capability", lambda device: (9, 0) if hopper else (8, 0))
    shape, stride = torch.Size((sets, 1, N)), (N, N, 1)
    step = cuda.select_tokens.prepared(torch.device("cpu"), shape, stride, stride, 0.9, None, 0, 1)
    blocks, _, _, threads = struct.unpack_from("=4I", step.config)
    assert (blocks // sets, threads) == chosen
