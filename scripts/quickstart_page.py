"""The quickstart's page: a figure, a sample, a head map, answers and reads, in one self-contained file."""

import base64
import html
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --soft: #57606a; --line: #d0d7de; --box: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --page: #0d1117; --soft: #9aa4af; --line: #30363d; --box: #161b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1, h2 { line-height: 1.25; }
.answer { padding: .75rem 1rem; border-left: 4px solid #0969da; background: var(--box); }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { margin-bottom: 1rem; overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { padding: .75rem; background: var(--box); white-space: pre-wrap; font-size: .85rem; }
iframe { width: 100%; height: 46rem; border: 1px solid var(--line); border-radius: 8px; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; frame-src 'self'"


@dataclass
class Page:
    """Parts of a page, in the order in which they are added; all text is escaped."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Add a heading."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        """Add a paragraph; `kind` is `answer` for a result, or `soft` for a remark."""
        self.parts.append(f'<p class="{kind}">{html.escape(text)}</p>')

    def code(self, text: str) -> None:
        """Add text in a fixed width, with its line breaks."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def folded(self, title: str, text: str) -> None:
        """Add text in a fixed width that opens on a click."""
        self.parts.append(f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>")

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Add a table."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self.parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def image(self, path: Path, label: str) -> None:
        """Add a PNG file."""
        data = base64.b64encode(path.read_bytes()).decode()
        self.parts.append(f'<img alt="{html.escape(label)}" src="data:image/png;base64,{data}">')

    def frame(self, path: Path, label: str) -> None:
        """Add another self-contained page in a frame."""
        inner = html.escape(path.read_text(encoding="utf-8"))
        self.parts.append(f'<iframe title="{html.escape(label)}" srcdoc="{inner}"></iframe>')

    def write(self, path: Path) -> None:
        """Write the page."""
        head = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head>"
        )
        body = f"<body><h1>{html.escape(self.title)}</h1>{''.join(self.parts)}</body></html>\n"
        path.write_text(head + body, encoding="utf-8")
