"""`zipvl tune`: times the kernels' configurations on this GPU and says where another is faster than the shipped one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Annotated, Any

import typer
from rich.console import Console

from zipvl_adapters.cli.bench import check_gpu
from zipvl_adapters.cli.checks import UserError
from zipvl_adapters.cli.progress import reporting
from zipvl_adapters.cli.tables import print_table

Config = dict[str, Any]  # keyword arguments of a launcher
OPERATORS = ("score_tokens", "select_tokens", "compact_kv_", "sparse_attention", "decode_attention")
GAIN = 1.03  # less than this is noise


@dataclass(frozen=True)
class Table:
    """The configurations of one kernel to try, and the shipped one."""

    backend: str
    operator: str
    shipped: Callable[[int], Config]  # for a head dim
    tried: tuple[Config, ...]

    @property
    def module(self) -> Any:
        """Where the kernel's `launch` is."""
        return import_module(f"zipvl_kernels._{self.backend}.{self.operator.removesuffix('_')}")

    def call(self, config: Config) -> Callable[..., Any]:
        """The operator, by its public arguments, with `config`; `launch` takes the same by name or fewer."""
        launch = self.module.launch
        names = signature(launch).parameters

        def fn(*args: Any, **options: Any) -> Any:
            filled = {name: options.get(name, default) for name, default in _DEFAULTS.items() if name in names}
            given = dict(zip(names, args, strict=False))
            result = launch(**filled | given | config)
            return result[0] if self.operator == "decode_attention" else result  # without the log-sum-exp

        return fn


_DEFAULTS: Config = {
    "scale": None, "q_start": None, "leftpad_k": None, "seqused_k": None, "dst_start": None, "pool": "layer",
    "kv_compacted": False, "return_lse": False, "tau": None, "keep_ratio": None, "keep_first": 0, "keep_recent": 1,
}  # fmt: skip


def _by_name(names: str, *values: tuple[Any, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in values)


def tables() -> Iterator[Table]:
    """The tables of the kernels that this machine can run."""
    import torch

    from zipvl_kernels._backends import resolve

    def has(backend: str, operator: str) -> bool:
        try:
            resolve(operator, backend, "cuda")
        except RuntimeError:
            return False
        return hasattr(import_module(f"zipvl_kernels._{backend}.{operator.removesuffix('_')}"), "launch")

    def named(names: str, find: Callable[[Any, int], tuple[Any, ...]], backend: str, operator: str) -> Any:
        """The shipped configurations, by name, as `find` gets them from the kernel's module."""
        module = import_module(f"zipvl_kernels._{backend}.{operator}")
        return lambda D: dict(zip(names.split(), find(module, D), strict=True))

    half = torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if has("triton", "sparse_attention"):
        names = "block_m block_n num_warps num_stages"
        yield Table(
            "triton",
            "sparse_attention",
            named(names, lambda m, D: m.tiles(half, D, m.shared_kilobytes(device)), "triton", "sparse_attention"),
            _by_name(names, (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 4, 4)),
        )
    if has("cuda", "sparse_attention"):
        yield Table(
            "cuda",
            "sparse_attention",
            lambda D: {},
            (
                {"take_turns": False},
                {"consumer_registers": 240, "producer_registers": 24},
                {"section_bytes": 12 << 20},
                {"section_bytes": 40 << 20},
            ),
        )
    if has("triton", "score_tokens"):
        names = "block_p block_n num_warps num_stages row_programs column_programs"
        yield Table(
            "triton",
            "score_tokens",
            named(names, lambda m, D: (*m.tiles(half, D), *m.programs(32768)), "triton", "score_tokens"),
            _by_name(
                names, (128, 64, 4, 3, 264, 264), (128, 64, 4, 2, 1056, 528), (128, 64, 4, 3, 528, 1056),
                (128, 128, 8, 2, 1056, 528), (128, 128, 8, 2, 264, 264), (64, 128, 4, 3, 1056, 528),
            ),
        )  # fmt: skip
    if has("cuda", "select_tokens"):
        yield Table(
            "cuda",
            "select_tokens",
            lambda D: {},
            tuple({"threads": threads, "blocks": blocks} for threads in (512, 1024) for blocks in (1, 2, 4, 8, 16)),
        )
    if has("cuda", "compact_kv_"):
        yield Table(
            "cuda",
            "compact_kv_",
            lambda D: {},
            _by_name("threads items blocks_per_sm", (256, 4, 5), (256, 4, 6), (512, 4, 2), (512, 8, 1), (128, 8, 6)),
        )
    if has("triton", "decode_attention"):
        names = "split block_n num_warps num_stages"
        yield Table(
            "triton",
            "decode_attention",
            named(names, lambda m, D: (m.SPLIT, *m.tiles(half, D)), "triton", "decode_attention"),
            _by_name(
                names, (256, 64, 4, 3), (256, 128, 4, 2), (256, 32, 2, 4), (512, 64, 4, 4), (1024, 64, 4, 3),
                (512, 128, 4, 3), (128, 64, 4, 2),
            ),
        )  # fmt: skip


def tune(
    op: Annotated[list[str] | None, typer.Option(help=f"Repeat for more (all): {', '.join(OPERATORS)}.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, with commas between.")] = "2880,32768",
) -> None:
    """Time the configurations of the kernels on this GPU, beside the shipped ones. Changes nothing. Needs a GPU."""
    from zipvl_adapters.cli.bench import check_lengths

    for name in op or ():
        if name not in OPERATORS:
            raise UserError(f"--op {name}: expected one of {', '.join(OPERATORS)}.")
    wanted = check_lengths(lengths) or []
    check_gpu("zipvl tune")
    rows, failed = _times(list(op or OPERATORS), wanted)
    if rows:
        print_table(
            Console(),
            ("kernel", "shape", "shipped", "ms", "fastest", "ms", "faster"),
            rows,
            title="Configurations",
            caption=f"bf16, D = 128. A gain under {100 * (GAIN - 1):.0f} % is noise; 'shipped' then stays the fastest.",
            labels=3,
        )
    for line in failed:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _times(operators: list[str], lengths: list[int]) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and a line for every configuration that is wrong or does not run."""
    from zipvl_adapters.cli.problems import GEOMETRIES, PROBLEMS
    from zipvl_adapters.cli.timing import time_calls

    chosen = [table for table in tables() if table.operator in operators]
    failed = [f"{name}: has no table here" for name in operators if name not in {table.operator for table in chosen}]
    rows = []
    with reporting(len(chosen) * len(GEOMETRIES) * len(lengths), unit="shapes") as reporter:
        for table in chosen:
            for geometry, N in ((g, N) for g in GEOMETRIES for N in lengths):
                what = f"{table.operator}, {table.backend}: {geometry.heads} {N:,}"
                reporter.say(what)
                problem, *_ = PROBLEMS[table.operator](geometry, N)
                shipped = table.shipped(geometry.D)
                calls = {}
                for config in (shipped, *(c for c in table.tried if c != shipped)):
                    try:
                        problem.check(table.call(config))
                        calls[_words(config)] = problem.call(table.call(config))
                    except Exception as error:
                        failed.append(f"{what}: {_words(config)} {type(error).__name__}: {str(error)[:100]}")
                times, refused = time_calls(
                    calls, problem.sets, restore=problem.restore, cold=problem.cold, seconds=0.05
                )
                failed += [f"{what}: {name} {why}" for name, why in refused.items()]
                reporter.advance(1)
                if _words(shipped) not in times:
                    continue
                ours = times[_words(shipped)].p50
                best = min(times, key=lambda name: times[name].p50)
                if ours / times[best].p50 < GAIN:
                    best = _words(shipped)
                rows.append(
                    [
                        f"{table.operator}, {table.backend}", f"{geometry.heads} {N:,}", _words(shipped), f"{ours:.4f}",
                        "shipped" if best == _words(shipped) else best, f"{times[best].p50:.4f}",
                        f"{ours / times[best].p50:.2f}",
                    ]
                )  # fmt: skip
    return rows, failed


def _words(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items()) or "defaults"
