"""`zipvl bench`: the operators' speed on shapes of real models, beside dense attention. Nothing wrong is timed."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from zipvl_adapters.cli.checks import UserError, check_output, check_positive
from zipvl_adapters.cli.env import commit, device_name, versions
from zipvl_adapters.cli.outputs import whole_files
from zipvl_adapters.cli.progress import reporting
from zipvl_adapters.cli.speeds import (
    HEADINGS,
    Row,
    caption,
    draw,
    implementations,
    measure,
    overhead,
    overhead_lines,
    table,
)
from zipvl_adapters.cli.tables import print_table

if TYPE_CHECKING:
    from zipvl_adapters.cli.problems import Geometry, Problem

OPERATORS = (
    "zipvl_prefill_", "score_tokens", "select_tokens", "compact_kv_", "sparse_attention", "decode_attention",
)  # fmt: skip
RATIOS = (0.1, 0.2, 0.5, 0.75, 1.0)  # of the plot, beside the one that is kept everywhere else
CHECKED_EXAMPLES = 25  # of somebody else's function


def bench(
    op: Annotated[list[str] | None, typer.Option(help=f"Repeat for more (all): {', '.join(OPERATORS)}.")] = None,
    geometry: Annotated[
        list[str] | None, typer.Option(help="A model's name or its heads, such as 28/4; repeat for more (all).")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens, with commas between (2880,8192,32768; 28/4 also 131072).")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="package.module:function, your kernel: checked, then timed beside ours.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, length.png and kept.png.")] = Path("out/bench"),
    read: Annotated[
        Path | None, typer.Option(help="Measure nothing: table and plots of a recorded bench.json.")
    ] = None,
) -> None:
    """Time every operator beside dense attention: table, JSON and plots. Needs a GPU."""
    check_output(out)
    if read is not None:
        record = _recorded(read)
        _show(record, out, write_json=False)
        return
    operators = check_operators(op)
    wanted = check_lengths(lengths)
    theirs = check_against(against, operators) if against is not None else None
    if theirs is not None:
        operators = [theirs[0]]
    geometries = check_geometries(geometry)
    check_gpu("zipvl bench")
    _show(_record(operators, geometries, wanted, theirs, against), out, write_json=True)


def check_operators(names: list[str] | None) -> list[str]:
    """The operators of these names, all without any."""
    for name in names or ():
        if name not in OPERATORS:
            raise UserError(f"--op {name}: expected one of {', '.join(OPERATORS)}.")
    return list(dict.fromkeys(names or OPERATORS))


def check_lengths(lengths: str | None) -> list[int] | None:
    """Whole numbers with commas between."""
    if lengths is None:
        return None
    try:
        return [check_positive("--lengths", int(length)) for length in lengths.split(",")]
    except ValueError:
        raise UserError(
            f"--lengths {lengths}: expected whole numbers with commas between, such as 2880,8192."
        ) from None


def check_geometries(names: list[str] | None) -> "list[Geometry]":
    """The geometries of these names, or of these heads."""
    from zipvl_adapters.cli.problems import GEOMETRIES

    for name in names or ():
        if name not in [known for g in GEOMETRIES for known in (g.name, g.heads)]:
            known = ", ".join(f"{g.name} ({g.heads})" for g in GEOMETRIES)
            raise UserError(f"--geometry {name}: expected one of {known}.")
    return [g for g in GEOMETRIES if names is None or g.name in names or g.heads in names]


def check_against(name: str, operators: list[str]) -> tuple[str, Callable[..., Any]]:
    """The operator that `package.module:function` implements, and the function."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(f"--against {name}: expected package.module:function, for example my_kernels.attention:fast.")
    operator = operators[0] if len(operators) == 1 else next((o for o in operators if o == attribute), None)
    if operator is None:
        raise UserError(f"--against {name}: say which operator it is with one --op, or name the function after it.")
    sys.path.insert(0, "")  # a module of the folder that the command runs in
    try:
        found = getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise UserError(f"--against {name}: there is no {attribute} in {module}.") from None
    except Exception as error:  # whatever their module raises while it is imported
        raise UserError(f"--against {name}: cannot be imported, {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise UserError(f"--against {name}: expected a function, got {type(found).__name__}.")
    return operator, found


def check_gpu(command: str) -> None:
    """Refuse to go on without a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"{command} needs a GPU, and torch sees none ('zipvl env' shows what it sees).")


def _record(
    operators: list[str],
    geometries: "list[Geometry]",
    lengths: list[int] | None,
    theirs: tuple[str, Callable[..., Any]] | None,
    against: str | None,
) -> dict[str, Any]:
    """Check, measure, and everything that is known about how."""
    import torch

    from zipvl_adapters.cli.problems import KEEP_RATIO, PROBLEMS, prefill_problem
    from zipvl_adapters.cli.timing import ceilings

    rows: list[Row] = []
    failed: list[str] = []
    sizes = [(g, N) for g in geometries for N in lengths or g.lengths]
    ratio_length = min((N for _, N in sizes), key=lambda N: abs(N - 8192))
    costs: list[Row] = []
    with reporting(len(operators) * len(sizes) + len(geometries), unit="problems") as reporter:
        reporter.say("measuring the ceilings")
        reached = ceilings()

        def run(make: "Callable[[], list[Problem]]", fns: dict[str, Callable[..., Any]], what: str) -> None:
            reporter.say(what)
            try:
                for problem in make():
                    measured, wrong = measure(problem, fns, reached)
                    rows.extend(measured)
                    failed.extend(wrong)
            except torch.OutOfMemoryError:
                failed.append(f"{what}: not timed, the GPU's memory does not hold it")
            torch.cuda.empty_cache()
            reporter.advance(1)

        for operator in operators:
            fns = implementations(operator)
            if theirs is not None and against is not None:
                reporter.say(f"checking {against}")
                why = _wrong(operator, theirs[1])
                if why:
                    raise UserError(f"--against {against}: wrong, so not timed. {why}")
                fns[against] = theirs[1]
            if not fns:
                failed.append(f"{operator}: not timed, this machine has no GPU kernel of it ('zipvl env' says why)")
                continue
            for g, N in sizes:
                run(lambda o=operator, g=g, N=N: PROBLEMS[o](g, N), fns, f"{operator} {g.heads} {N:,}")  # type: ignore[misc]
            if operator != "zipvl_prefill_":
                continue
            for g in geometries:
                costs.append(overhead(next(iter(fns.values())), g))
                run(
                    lambda g=g: [prefill_problem(g, ratio_length, ratio) for ratio in RATIOS],  # type: ignore[misc]
                    fns,
                    f"{operator} {g.heads} {ratio_length:,}, other kept ratios",
                )
    device = torch.device("cuda")
    return {
        "command": "zipvl bench",
        "settings": {"dtype": "bfloat16", "keep_ratio": KEEP_RATIO, "ratio_length": ratio_length, "against": against},
        "device": {"name": device_name(device), "capability": torch.cuda.get_device_capability()},
        "versions": versions() | _gpu_versions(),
        "commit": commit(),
        "ceilings": reached,
        "rows": rows,
        "overhead": costs,
        "failed": failed,
    }


def _wrong(operator: str, fn: Callable[..., Any]) -> str:
    """What the contract's property check finds wrong with `fn` on the GPU, "" for nothing."""
    import torch

    try:
        testing = importlib.import_module("zipvl_reference.testing")
    except ImportError as error:
        raise UserError(str(error)) from error
    check = getattr(testing, f"check_{operator.removesuffix('_')}")
    options: dict[str, Any] = {"max_examples": CHECKED_EXAMPLES, "derandomize": True, "device": "cuda"}
    if operator != "select_tokens":
        options |= {"dtype": torch.bfloat16, "head_dims": (128,)}
    try:
        check(fn, **options)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return ""


def _gpu_versions() -> dict[str, Any]:
    """Of what a GPU's speed depends on."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from zipvl_adapters.cli.env import environment

    found: dict[str, Any] = {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    for name in ("cupy-cuda13x", "cupy-cuda12x", "flash-attn-4"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = environment()["gpu"]
    return found | ({"driver": gpu.get("driver")} if isinstance(gpu, dict) else {})


def _recorded(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"rows", "overhead", "ceilings", "settings", "device", "failed"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--read {path}: {error}; expected a bench.json that 'zipvl bench' wrote.") from error
    if missing:
        raise UserError(f"--read {path}: holds no {', '.join(sorted(missing))}; expected what 'zipvl bench' wrote.")
    assert isinstance(record, dict)
    return record


def _show(record: dict[str, Any], out: Path, *, write_json: bool) -> None:
    """Print the table, write the files, and fail where something was wrong."""
    console = Console()
    if record["rows"]:
        print_table(console, HEADINGS, table(record["rows"]), title="Speed", caption=caption(record), labels=4)
    for line in [*overhead_lines(record), *record["failed"]]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    with whole_files(out) as folder:
        if write_json:
            (folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        try:
            draw(record, folder)
        except ImportError:
            console.print("plots are left out: matplotlib is not installed", soft_wrap=True)
    console.print(f"files: {out}", markup=False, highlight=False, soft_wrap=True)
    if any("AssertionError" in line for line in record["failed"]):
        raise typer.Exit(1)
