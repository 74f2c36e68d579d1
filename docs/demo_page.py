"""Turn the demos' `demo.json` files into one table in the terminal and one self-contained page.

`python docs/demo_page.py build/demo NAME...` reads `build/demo/NAME/demo.json`, writes
`build/demo/index.html` (figures embedded) and exits with 1 if a claim failed or a demo left no result.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c1e21; background: #fff; }
h1 { margin-bottom: 0; } h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; min-width: 50%; }
th, td { text-align: left; padding: .35rem .8rem; border-bottom: 1px solid #e3e3e3; }
thead th { border-bottom: 2px solid #999; } caption { text-align: left; font-weight: 600; }
.ok { color: #14713a; font-weight: 600; } .no { color: #b3261e; font-weight: 600; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; }
.small { color: #555; font-size: .875rem; }
.claims td:nth-child(n+2) { min-width: 7rem; }
@media (max-width: 45rem) { .claims thead { display: none; } .claims tr { display: block;
  border-bottom: 1px solid #999; padding: .5rem 0; } .claims td { display: block; border: 0; padding: .1rem 0; }
  .claims td::before { content: attr(data-label) ": "; color: #777; } .claims td:empty { display: none; } }
@media (prefers-color-scheme: dark) { body { background: #16181b; color: #e6e6e6; }
  img { background: #fff; } .ok { color: #6bd695; } .no { color: #ff8a80; }
  .small, figcaption { color: #aaa; } th, td { border-color: #3a3d42; } h2 { border-color: #3a3d42; } }
"""
MISSING = "the demo ended without a result"


def summary(name: str, result: dict[str, Any] | None) -> list[list[str]]:
    """Return a demo's rows of the summary table, one for each claim."""
    if result is None:
        return [[name, MISSING, "", "", "FAILED", ""]]
    seconds = f"{result['seconds']:.0f}"
    return [
        [
            name if first else "",
            claim["claim"],
            claim["baseline"],
            claim["ours"],
            "holds" if claim["holds"] else "FAILED",
            seconds if first else "",
        ]
        for first, claim in zip([True] + [False] * 99, result["claims"], strict=False)
    ]


def as_text(columns: list[str], rows: list[list[str]]) -> str:
    """Lay a table out in plain text."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [[cell.ljust(width) for cell, width in zip(r, widths, strict=True)] for r in rows]
    head = [cell.ljust(width) for cell, width in zip(columns, widths, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(line).rstrip() for line in [head, rule, *lines])


def overview(name: str, result: dict[str, Any] | None) -> list[str]:
    """Return a demo's row of the table that opens the page."""
    if result is None:
        return [name, MISSING, "FAILED", "", ""]
    held = [claim["holds"] for claim in result["claims"]]
    verdict = "holds" if all(held) else "FAILED"
    count = f"{sum(held)} of {len(held)}"
    return [name, result["title"], verdict, count, f"{result['seconds']:.0f}"]


def as_html(columns: list[str], rows: list[list[str]], title: str = "", kind: str = "") -> str:
    """Lay a table out in HTML; verdicts get their colour, and narrow screens a label for each cell."""
    colour = {"holds": ' class="ok"', "FAILED": ' class="no"'}

    def cell(column: str, text: str) -> str:
        label = f' data-label="{html.escape(column)}"'
        return f"<td{colour.get(text, '')}{label}>{html.escape(text)}</td>"

    cells = ["<tr>" + "".join(map(cell, columns, row)) + "</tr>" for row in rows]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    body = "".join(cells)
    table = f"<table{kind and f' class={kind!r}'}>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def section(name: str, result: dict[str, Any] | None, folder: Path) -> str:
    """Return the part of the page that shows one demo."""
    parts = [f'<h2 id="{name}">{name}</h2>']
    if result is None:
        return parts[0] + f'<p class="no">{MISSING}</p>'
    parts.append(f"<p>{html.escape(result['title'])}</p>")
    columns, rows = ["Claim", "Baseline", "Ours", "Verdict"], summary(name, result)
    parts.append(as_html(columns, [row[1:5] for row in rows], kind="claims"))
    for figure in result["figures"]:
        data = base64.b64encode((folder / figure["file"]).read_bytes()).decode()
        caption = html.escape(figure["caption"])
        picture = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    for table in result["tables"]:
        rows = [[str(cell) for cell in row] for row in table["rows"]]
        parts.append(as_html(table["columns"], rows, table["title"]))
    if result["findings"]:
        items = "".join(f"<li>{html.escape(finding)}</li>" for finding in result["findings"])
        parts.append(f"<p><b>What did not hold, or surprised:</b></p><ul>{items}</ul>")
    where = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    parts.append(f'<p class="small">Data: {html.escape(result["data"])}<br>')
    parts.append(f"{result['seconds']:.0f} s on {html.escape(where)}</p>")
    return "".join(parts)


def main() -> int:
    """Write the page, print the table, and say by the exit status whether every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any] | None] = {}
    for name in arguments.names:
        file = folder / name / "demo.json"
        results[name] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    columns = ["package", "claim", "baseline", "ours", "verdict", "seconds"]
    rows = [row for name, result in results.items() for row in summary(name, result)]
    first = [overview(name, result) for name, result in results.items()]
    linked = as_html(
        ["package", "what it shows", "verdict", "claims", "seconds"], first, kind="claims"
    )
    for name in results:
        linked = linked.replace(f">{name}</td>", f'><a href="#{name}">{name}</a></td>')
    sections = "".join(section(name, result, folder / name) for name, result in results.items())
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Ten methods: the demos</title><style>{STYLE}</style></head><body>"
        "<h1>The demos</h1><p>Each package tests the claims of its paper on real data. A verdict is the "
        "result of this run, made by the command <code>python -m nox -s demo</code>; what did not hold "
        f"stands under each package.</p>{linked}{sections}</body></html>\n"
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    print(as_text(columns, rows))
    print(f"\n{folder / 'index.html'}")
    return int(any(row[4] == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
