"""Tables in docs/results.md, each between its markers `<!-- PLACE -->` and `<!-- end of PLACE -->`."""

from pathlib import Path

from hybridmem.metrics import mean_interval

PAGE = Path("docs/results.md")
Table = list[list[str]]


def markdown(table: Table) -> str:
    """Format a table, whose first row is the header, as Markdown."""
    head, *rows = table
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def mean_and_half(values: list[float], digits: int = 3) -> str:
    """Format the mean ± half the width of the 95 % confidence interval."""
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def write_tables(place: str, tables: list[Table]) -> None:
    """Replace the tables between the markers of a place in the page."""
    text = PAGE.read_text()
    start, end = f"<!-- {place} -->", f"<!-- end of {place} -->"
    if start not in text or end not in text:
        raise SystemExit(f"{PAGE} lacks the markers {start} and {end}; add them where the tables belong")
    before, after = text.split(start)[0], text.split(end)[1]
    PAGE.write_text(before + start + "\n" + "\n\n".join(map(markdown, tables)) + "\n" + end + after)
