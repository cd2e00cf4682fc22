"""Tables on the terminal that stay readable when it is narrow or is not a terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, caption: str, labels: int
) -> None:
    """Print `rows` under `headings`; the first `labels` columns are names (left), the others numbers (right).

    A table wider than the terminal is printed as one block of `heading: value` lines a row; nothing is ever cut off.
    Headings may be broken over lines with a newline.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < labels else "right", no_wrap=True, vertical="bottom")
    previous: Sequence[str] = ()
    for row in rows:
        if previous and labels > 1 and row[0] != previous[0]:
            table.add_section()
        repeated = bool(previous) and row[0] == previous[0]
        table.add_row(*(Text("" if repeated and column == 0 else cell) for column, cell in enumerate(row)))
        previous = row
    needed = Console(width=10_000).measure(table).maximum
    console.print(Text(title, style="bold"), soft_wrap=True)
    if not console.is_terminal or needed <= console.width:
        console.width = max(needed, console.width)
        console.print()
        console.print(table)
    else:
        _print_blocks(console, headings, rows, labels)
    console.print()
    console.print(Text(caption, style="dim"))


def _print_blocks(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> None:
    for row in rows:
        console.print()
        console.print(Text(" · ".join(row[:labels]), style="bold"), soft_wrap=True)
        for heading, cell in zip(headings[labels:], row[labels:], strict=True):
            console.print(Text(f"  {' '.join(heading.split())}: {cell}"), soft_wrap=True)


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal, a dash for None."""
    return "-" if share is None else f"{100 * share:.1f}"
