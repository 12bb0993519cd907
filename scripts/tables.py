"""Tables in docs/results/, each between its markers `<!-- PLACE -->` and `<!-- end of PLACE -->`."""

from pathlib import Path

from hybridmem.metrics import mean_interval

PAGES = Path("docs/results")
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
    """Replace the tables between the markers of a place, on the page that has them."""
    start, end = f"<!-- {place} -->", f"<!-- end of {place} -->"
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text()
        if start in text and end in text:
            before, after = text.split(start)[0], text.split(end)[1]
            page.write_text(before + start + "\n" + "\n\n".join(map(markdown, tables)) + "\n" + end + after)
            return
    raise SystemExit(f"no page in {PAGES} has the markers {start} and {end}; add them where the tables belong")
