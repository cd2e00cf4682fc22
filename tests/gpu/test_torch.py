"""The operators inside torch: registration, torch.compile, CUDA graphs, several streams, no wait for the device."""

import sys

import pytest
import torch
from cases import DEVICE, REAL, every_on_tensors, function, inputs, needs_gpu, never_waiting, results
from zipvl_reference.testing.budget import assert_same_bits

import zipvl_kernels as zk

N = 2880 if REAL else 40
# The registered operators take everything by position.
POSITIONS = {
    "score_tokens": ("scale", "q_start", "leftpad_k", "seqused_k", "pool"),
    "select_tokens": ("tau", "keep_ratio", "keep_first", "keep_recent", "leftpad_k", "seqused_k"),
    "compact_kv_": ("dst_start",),
    "sparse_attention": ("scale", "q_start", "kv_compacted"),
    "decode_attention": ("scale",),
    "zipvl_prefill_": (
        "tau", "keep_ratio", "num_recent", "num_random", "seed", "keep_first", "keep_recent", "scale", "q_start",
        "leftpad_k", "seqused_k", "pool",
    ),
}  # fmt: skip
DEFAULTS = {
    "pool": "layer", "keep_first": 0, "keep_recent": 1, "kv_compacted": False,
    "num_recent": 64, "num_random": 64, "seed": 0,
}  # fmt: skip


@every_on_tensors
def test_opcheck(operator, backend):
    arguments, options = inputs(operator, (60, 33) if REAL else (12, 5))
    rest = [options.get(name, DEFAULTS.get(name)) for name in POSITIONS[operator]]
    torch.library.opcheck(getattr(torch.ops.zipvl, operator).default, (*arguments, *rest, backend))


@every_on_tensors
def test_compiles_as_one_graph(operator, backend):
    fn = function(operator, backend)
    compiled = torch.compile(fn, fullgraph=True, backend="inductor" if REAL else "aot_eager")
    for lengths in ((N,), (N - 7,)):
        arguments, options = inputs(operator, lengths)
        got = results(operator, compiled, arguments, options)
        for i, (a, b) in enumerate(zip(results(operator, fn, arguments, options), got, strict=True)):
            assert_same_bits(f"{operator}, result {i}, compiled", a, b)


@needs_gpu
@every_on_tensors
def test_graph_replays_with_other_inputs(operator, backend):
    fn, (arguments, options) = function(operator, backend), inputs(operator, (N, 1000))
    results(operator, fn, arguments, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(operator, fn, arguments, options)
    for seed, lengths in ((1, (N, 1000)), (2, (N, 64))):
        other, other_options = inputs(operator, lengths, seed=seed)
        given = [*other, *other_options.values()]
        for held, x in zip([*arguments, *options.values()], given, strict=True):
            if isinstance(held, torch.Tensor):
                held.copy_(x)
        graph.replay()
        for i, (a, b) in enumerate(zip(results(operator, fn, other, other_options), captured, strict=True)):
            assert_same_bits(f"{operator}, result {i}, replayed with seed {seed}", a, b)


@needs_gpu
@every_on_tensors
def test_never_waits_for_the_device(operator, backend):
    fn, (arguments, options) = function(operator, backend), inputs(operator, (N, 1000))
    results(operator, fn, arguments, options)
    with never_waiting():
        fn(*arguments, **options)


@needs_gpu
@every_on_tensors
def test_streams_do_not_disturb_each_other(operator, backend):
    fn, sets = function(operator, backend), [inputs(operator, (N, 1000), seed=seed) for seed in range(2)]
    wanted = [results(operator, fn, *one) for one in sets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    found = []
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((i, results(operator, fn, *sets[i])))
    torch.cuda.synchronize()
    for i, got in found:
        for a, b in zip(wanted[i], got, strict=True):
            assert_same_bits(f"{operator} on stream {i}", a, b)


def test_probes_are_the_same_on_every_device():
    for rows in (1, 100, 2880, 131072):
        for options in ({}, {"seed": 5}, {"num_recent": 3, "num_random": 200}):
            assert torch.equal(zk.probe_rows(rows, **options), zk.probe_rows(rows, device=DEVICE, **options).cpu())


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
def test_prefill_is_its_steps(pool):
    (q, k, v), options = inputs("zipvl_prefill_", (N, N // 2))
    steps_k, steps_v = k.clone(), v.clone()
    rows = zk.probe_rows(N, device=DEVICE)
    scores = zk.score_tokens(q, k, rows, pool=pool, leftpad_k=options["leftpad_k"])
    indices, counts = zk.select_tokens(*scores, **options)
    zk.compact_kv_(steps_k, steps_v, indices, counts)
    out = zk.sparse_attention(q, steps_k, steps_v, indices, counts, kv_compacted=True)
    got = zk.zipvl_prefill_(q, k, v, pool=pool, **options)
    for name, a, b in zip(("out", "indices", "counts"), got, (out, indices, counts), strict=True):
        assert_same_bits(name, a, b)


@needs_gpu
@pytest.mark.parametrize("M", [N, 1])  # what the steps hand on fits into the output, or does not
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"keep_ratio": 0.4, "scale": 0.2, "keep_first": 3, "keep_recent": 70, "num_recent": 5, "num_random": 200},
        {"pool": "kv_head", "seed": 2**40 + 1, "seqused": True},
        {"start": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefill_in_one_plan_is_step_by_step(monkeypatch, dtype, changed, M):
    module = sys.modules["zipvl_kernels.zipvl_prefill"]
    if module._fused("auto", torch.device("cuda", torch.cuda.current_device())) is None:
        pytest.skip("not every step has a kernel in CUDA C here")
    (q, k, v), options = inputs("zipvl_prefill_", (N, N // 2, N), dtype=dtype)
    q, options = q[:, :, -M:], {**options, **changed}
    if options.pop("seqused", False):
        options["seqused_k"] = torch.tensor([N, N - 3, 700], dtype=torch.int32, device=DEVICE)
    if options.pop("start", False):
        options["q_start"] = torch.tensor([N - M, 1, 0], dtype=torch.int32, device=DEVICE)
    found = []
    for fused in (True, True, False):
        if not fused:
            monkeypatch.setattr(module, "_fused", lambda backend, device: None)
        found.append(results("zipvl_prefill_", zk.zipvl_prefill_, [q, k, v], options))
    for again in found[1:]:
        for i, (a, b) in enumerate(zip(found[0], again, strict=True)):
            assert_same_bits(f"result {i}", a, b)
