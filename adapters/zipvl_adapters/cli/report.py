"""The demo's report: one HTML file that needs no other file and no network."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from zipvl_adapters.cli.scoring import ALL_TASKS, Score
from zipvl_adapters.cli.tables import percent

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #d9dee4; --fill: #f5f7fa; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; }
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.1rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; }
h3 { margin: 1.6rem 0 .6rem; font-size: 1rem; }
.card h3 { margin-top: 0; }
.card dl { display: grid; grid-template-columns: 1fr auto; gap: .2rem 1rem; margin: 0; }
.card dt { color: var(--soft); }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
ul { max-width: 46rem; padding-left: 1.2rem; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { background: var(--fill); vertical-align: bottom; font-weight: 600; }
th.name, td.name { text-align: left; }
tr.all td, tr.all th { font-weight: 600; border-bottom: 2px solid var(--soft); }
td.bar { min-width: 6rem; background: linear-gradient(90deg, #cfe3f1 var(--share), transparent var(--share)); }
figure { margin: 1.2rem 0 2rem; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
.facts td, .facts th { text-align: left; white-space: normal; }
code { background: var(--fill); padding: .1rem .3rem; border-radius: 4px; }
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ZipVL demo</title>
<style>$style</style>
</head>
<body>
<main>
<h1>ZipVL on small trained vision-language models</h1>
<p class="lead">$lead</p>
<div class="cards">$cards</div>

<h2>Accuracy, memory and work</h2>
<div class="wide">$table</div>
<ul class="soft">$notes</ul>

<h2>Which visual tokens each layer kept</h2>
<p>Parts of the picture whose tokens a layer kept are shown as they are; parts whose tokens it dropped are dark.
Percentages are shares of the visual tokens. Each layer chooses anew, so a token that one layer dropped may be kept by
the next.</p>
$kept

<h2>Harder questions keep more tokens?</h2>
<p>ZipVL sets the number of tokens in every layer from the attention itself. The plot shows the share kept per layer for
an easy and a hard task.</p>
$layers

<h2>Settings and versions</h2>
$facts
</main>
</body>
</html>
""")


def demo_report(
    pairs: Sequence[tuple[Score, Score]],
    record: Mapping[str, Any],
    kept: Mapping[str, Path],
    layers: Path,
    notes: Sequence[str],
) -> str:
    """The whole page from (dense, ZipVL) pairs, the record that results.json holds, and the PNG files to inline."""
    return _PAGE.substitute(
        style=_STYLE,
        lead=escape(_lead([pair for pair in pairs if pair[1].task == ALL_TASKS], record["settings"]["tau"])),
        cards="".join(_card(dense, zipvl) for dense, zipvl in pairs if zipvl.task == ALL_TASKS),
        table=_table(pairs),
        kept="".join(
            f"<h3>{escape(model)}</h3>"
            + _figure(path, f"Visual tokens that {model} kept in three layers", _caption(model, record["examples"]))
            for model, path in kept.items()
        ),
        layers=_figure(
            layers, "Share of tokens kept per decoder layer for an easy and a hard task, one panel a model", ""
        ),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes),
        facts=_facts(record),
    )


def _lead(totals: Sequence[tuple[Score, Score]], tau: float) -> str:
    def mean(values: Sequence[float]) -> str:
        return f"{100 * sum(values) / len(values):.1f} %"

    questions = totals[0][0].questions
    kept = mean([zipvl.kept_ratio for _, zipvl in totals])
    right = mean([zipvl.accuracy for _, zipvl in totals])
    right_dense = mean([dense.accuracy for dense, _ in totals])
    return (
        f"{len(totals)} models answered {questions} held-out questions each, dense and with ZipVL"
        f" at tau\u00a0=\u00a0{tau:g}. ZipVL kept {kept} of the tokens and answered {right} of the questions right;"
        f" the dense models, which keep every token, {right_dense}."
    )


def _card(dense: Score, zipvl: Score) -> str:
    entries = {
        "right answers, dense": dense.accuracy,
        "right answers, ZipVL": zipvl.accuracy,
        "tokens kept": zipvl.kept_ratio,
        "KV cache saved": zipvl.kv_saved,
        "attention FLOPs saved": zipvl.flops_saved,
    }
    lines = "".join(f"<dt>{name}</dt><dd>{100 * share:.1f} %</dd>" for name, share in entries.items())
    return f'<section class="card"><h3>{escape(zipvl.model)}</h3><dl>{lines}</dl></section>'


def _table(pairs: Sequence[tuple[Score, Score]]) -> str:
    headings = ["dense %", "ZipVL %", "agree %", "tokens kept %", "KV saved %", "FLOPs saved %", "dense s", "ZipVL s"]
    head = '<th class="name" scope="col">model</th><th class="name" scope="col">task</th>'
    head += "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body, previous = "", ""
    for dense, zipvl in pairs:
        shares = [percent(share) for share in (dense.accuracy, zipvl.accuracy, zipvl.agreement)]
        saved = [percent(share) for share in (zipvl.kv_saved, zipvl.flops_saved)]
        kept = percent(zipvl.kept_ratio)
        cells = "".join(f"<td>{cell}</td>" for cell in shares)
        cells += f'<td class="bar" style="--share: {kept}%">{kept}</td>'
        cells += "".join(f"<td>{cell}</td>" for cell in [*saved, f"{dense.seconds:.1f}", f"{zipvl.seconds:.1f}"])
        kind = ' class="all"' if zipvl.task == ALL_TASKS else ""
        name = "" if zipvl.model == previous else escape(zipvl.model)
        body += f'<tr{kind}><th class="name">{name}</th><td class="name">{escape(zipvl.task)}</td>{cells}</tr>'
        previous = zipvl.model
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _caption(model: str, examples: Sequence[Mapping[str, Any]]) -> str:
    shown = [entry for entry in examples if entry["model"] == model]
    text = f"{shown[0]['visual_tokens']} of the {shown[0]['tokens']} prompt tokens stand for the picture."
    if any(entry["overlapping"] for entry in shown):
        text += (
            " Several tokens may show one place (an overview and its tiles): half-dark means that some were dropped."
        )
    return text


def _figure(path: Path, alternative: str, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/png;base64,{content}" alt="{escape(alternative)}">{note}</figure>'


def _facts(record: Mapping[str, Any]) -> str:
    facts = {
        "command": record["command"],
        **record["settings"],
        "device": record["device"]["name"],
        "commit": record["commit"] or "unknown",
        **{name: version or "not installed" for name, version in record["versions"].items()},
    }
    rows = "".join(f"<tr><th scope=row>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>'
