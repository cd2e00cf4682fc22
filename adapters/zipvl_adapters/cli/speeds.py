"""Measured speeds: rows of one operator, shape and provider, as JSON, as a table and as plots."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipvl_adapters.cli.problems import Geometry, Problem

Row = dict[str, Any]
Fn = Callable[..., Any]

HEADINGS = ("operator", "heads\nq/kv", "tokens", "by", "ms", "TFLOP/s\nor TB/s", "of the\nceiling %", "×\ndense")
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def implementations(operator: str) -> dict[str, Fn]:
    """Our GPU implementations of an operator that this machine can run, by the names that results carry."""
    from functools import partial

    import zipvl_kernels as zk
    from zipvl_kernels._backends import resolve
    from zipvl_kernels.zipvl_prefill import STEPS

    def has(step: str, backend: str) -> bool:
        try:
            resolve(step, backend, "cuda")
        except RuntimeError:
            return False
        return True

    fn, found = getattr(zk, operator), {}
    if operator == "zipvl_prefill_":  # "auto" takes each step's best; all of Triton is what machines without CuPy have
        steps = [step for step in STEPS if step != "probe_rows"]
        if all(resolve(step, "auto", "cuda") is not resolve(step, "reference", "cuda") for step in steps):
            found["zipvl"] = fn
        if all(has(step, "triton") for step in steps) and ("zipvl" not in found or any(has(x, "cuda") for x in steps)):
            found["zipvl, triton"] = partial(fn, backend="triton")
        return found
    for backend in ("cuda", "triton"):
        if has(operator, backend):
            found[f"zipvl, {backend}"] = partial(fn, backend=backend)
    return found


def measure(
    problem: "Problem", fns: Mapping[str, Fn], ceilings: Mapping[str, float], seconds: float | None = None
) -> tuple[list[Row], list[str]]:
    """A row for each of `fns` that is right on the problem's inputs and for each baseline; what failed, a line each."""
    import torch

    from zipvl_adapters.cli.timing import SECONDS, time_calls

    where = f"{problem.operator} {problem.geometry.heads} {_tokens(problem.shape)}"
    right, failed = {}, []
    for name, fn in fns.items():
        try:
            problem.check(fn)
            torch.cuda.synchronize()
            right[name] = problem.call(fn)
        except Exception as error:  # also of somebody else's function
            failed.append(f"{where}: {name} is not timed, {type(error).__name__}: {_one_line(error)}")
    if not right:
        return [], failed
    times, refused = time_calls(
        {**right, **problem.baselines},
        problem.sets,
        restore=problem.restore,
        cold=problem.cold,
        seconds=seconds or SECONDS,
    )
    failed += [f"{where}: {name} is not timed, {why}" for name, why in refused.items()]
    dense = times.get(problem.dense) if problem.dense else None
    rows = []
    for name, t in times.items():
        row: Row = {
            "operator": problem.operator,
            "geometry": problem.geometry.name,
            "heads": problem.geometry.heads,
            "shape": problem.shape,
            "provider": name,
            "p20_ms": t.p20,
            "p50_ms": t.p50,
            "p80_ms": t.p80,
            "input_sets": problem.sets,
            "x_dense": dense.p50 / t.p50 if dense else None,
        }
        row |= _rates(problem, name, right, t.p50 / 1e3, ceilings)
        rows.append(row)
    return rows, failed


def _rates(
    problem: "Problem", name: str, right: Mapping[str, object], seconds: float, ceilings: Mapping[str, float]
) -> Row:
    """Bytes or FLOPs a second, of the work that the operator has; dense attention of a prefill has its own."""
    shape, flops, num_bytes = problem.shape, problem.flops, problem.num_bytes
    if problem.operator == "zipvl_prefill_" and "dense" in name:
        flops = 2 * shape["Hq"] * shape["D"] * shape["M"] * (shape["M"] + 1)
    elif name not in right and problem.operator != "decode_attention" and "dense" not in name:
        flops = num_bytes = None  # the recipe moves more than that
    row: Row = {"bytes": num_bytes, "flops": flops, "bytes_per_second": None, "flops_per_second": None}
    row["of_ceiling"] = None
    if num_bytes:
        row["bytes_per_second"] = num_bytes / seconds
        row["of_ceiling"] = num_bytes / seconds / ceilings["copy_bytes_per_second"]
    if flops:
        row["flops_per_second"] = flops / seconds
        if not num_bytes:
            row["of_ceiling"] = flops / seconds / ceilings["bf16_flops_per_second"]
    return row


def overhead(fn: Fn, geometry: "Geometry", N: int = 2880, calls: int = 200) -> Row:
    """What an eager prefill costs beside its kernels: host time, launches, and memory beyond what it returns."""
    import torch

    from zipvl_adapters.cli.problems import KEEP_RATIO, prefill_problem

    problem = prefill_problem(geometry, N)
    call = problem.call(fn)
    for _ in range(3):
        call(0)
    torch.cuda.synchronize()
    microseconds = []
    for _ in range(calls):
        begin = perf_counter()
        call(0)
        microseconds.append(1e6 * (perf_counter() - begin))
        torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = call(0)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    extra -= sum(x.numel() * x.element_size() for x in returned)  # type: ignore[attr-defined]
    return {
        "geometry": geometry.name,
        "heads": geometry.heads,
        "N": N,
        "keep_ratio": KEEP_RATIO,
        "host_us_p50": sorted(microseconds)[calls // 2],
        "host_us_p80": sorted(microseconds)[calls * 4 // 5],
        "graph_nodes": graph_nodes(lambda: call(0)),
        "extra_bytes_per_token": extra / N,
    }


def graph_nodes(call: Callable[[], object]) -> dict[str, int] | None:
    """How many kernels, copies and fills a call launches, read off a captured graph; None where torch cannot tell."""
    import ctypes
    from collections import Counter

    import torch

    try:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            call()
        driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
        size = ctypes.c_size_t()
        assert driver.cuGraphGetNodes(handle, None, ctypes.byref(size)) == 0
        nodes = (ctypes.c_void_p * size.value)()
        assert driver.cuGraphGetNodes(handle, nodes, ctypes.byref(size)) == 0
        kinds: Counter[str] = Counter()
        for node in nodes:
            kind = ctypes.c_int()
            assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
            kinds[{0: "kernel", 1: "copy", 2: "fill"}.get(kind.value, f"kind {kind.value}")] += 1
    except (TypeError, AttributeError, AssertionError, OSError, RuntimeError):
        return None
    return dict(kinds)


def _tokens(shape: Mapping[str, int]) -> str:
    return f"{shape['N']:,}" + (f" × {shape['B']}" if shape.get("B", 1) > 1 else "")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of `print_table` under HEADINGS."""
    cells = []
    for row in rows:
        rate = row["bytes_per_second"] or row["flops_per_second"]
        ceiling = row["of_ceiling"]
        cells.append(
            [
                row["operator"],
                row["heads"],
                _tokens(row["shape"]),
                row["provider"],
                f"{row['p50_ms']:.4f}" if row["p50_ms"] < 1 else f"{row['p50_ms']:.3f}",
                f"{rate / 1e12:.2f}" if row["bytes_per_second"] else f"{rate / 1e12:.0f}" if rate else "-",
                f"{100 * ceiling:.0f}" if ceiling else "-",
                f"{row['x_dense']:.2f}" if row["x_dense"] else "-",
            ]
        )
    return cells


def caption(record: Mapping[str, Any]) -> str:
    """What the numbers of a record are."""
    copy, product = (record["ceilings"][x] / 1e12 for x in ("copy_bytes_per_second", "bf16_flops_per_second"))
    return (
        f"{record['device']['name']}, bf16, D = 128, {100 * record['settings']['keep_ratio']:.1f} % of the tokens kept;"
        f" medians of replayed graphs, inputs cold in L2. Ceilings measured in the same run: copy {copy:.2f} TB/s,"
        f" matrix product {product:.0f} TFLOP/s. × dense: against cuDNN on all tokens (on the kept ones for"
        " sparse_attention)."
    )


def overhead_lines(record: Mapping[str, Any]) -> list[str]:
    """The costs beside the kernels, a line a geometry."""
    lines = []
    for row in record["overhead"]:
        nodes = row["graph_nodes"]
        launches = "unknown" if nodes is None else ", ".join(f"{n} {kind}" for kind, n in sorted(nodes.items()))
        lines.append(
            f"zipvl_prefill_ {row['heads']} at {row['N']:,}: host {row['host_us_p50']:.0f} µs a call,"
            f" launches {launches}, extra memory {row['extra_bytes_per_token']:.1f} bytes a token"
        )
    return lines


def draw(record: Mapping[str, Any], folder: Path) -> list[str]:
    """`length.png` and `kept.png`: the prefill's × dense against length, and against kept ratio. Names of the files."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = []
    prefill = [row for row in record["rows"] if row["operator"] == "zipvl_prefill_" and row["x_dense"]]
    ratio = record["settings"]["keep_ratio"]
    by_length = [row for row in prefill if abs(row["shape"]["kept"] / row["shape"]["N"] - ratio) < 1e-3]
    by_share = [row for row in prefill if row["shape"]["N"] == record["settings"].get("ratio_length")]
    x: Callable[[Row], float]
    for name, rows, x, label in (
        ("length.png", by_length, lambda row: row["shape"]["N"], "tokens"),
        ("kept.png", by_share, lambda row: 100 * row["shape"]["kept"] / row["shape"]["N"], "tokens kept (%)"),
    ):
        if len({x(row) for row in rows}) < 2:
            continue
        with rc_context({"font.size": 10, "savefig.dpi": 150, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure(figsize=(6.4, 4.0), layout="constrained")
            axis = figure.subplots()
            for colour, heads in zip(_COLOURS, dict.fromkeys(row["heads"] for row in rows), strict=False):
                for provider, style in (("zipvl", "o-"), ("recipe in torch", "s--"), ("flash-attn-4", "^:")):
                    line = sorted(
                        (x(r), r["x_dense"]) for r in rows if (r["heads"], r["provider"]) == (heads, provider)
                    )
                    if line:
                        axis.plot(*zip(*line, strict=True), style, color=colour, label=f"{provider}, {heads}")
            axis.axhline(1, color="#1f2933", linewidth=1)
            if name == "length.png":
                axis.set_xscale("log", base=2)
                ticks = sorted({x(row) for row in rows})
                axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.set_xlabel(label)
            axis.set_ylabel("times as fast as cuDNN dense")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=8)
            figure.savefig(folder / name)
        drawn.append(name)
    return drawn
