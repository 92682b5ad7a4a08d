"""Tables for people: in a terminal, as wide as that is and with no word broken, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from rich import box
from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

_GAP = 2


@dataclass(frozen=True)
class Table:
    """Rows of text below their headings. Columns whose heading begins with `>` are aligned to the right and hold
    numbers, which are never wrapped; the others wrap between words.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()
    """Lines that explain it."""

    @property
    def headings(self) -> list[str]:
        return [column.removeprefix(">") for column in self.columns]

    def show(self, console: Console) -> None:
        """Print it, if it has rows: as columns where all words fit, else row by row."""
        if not self.rows:
            return
        console.print(Text(f"\n{self.title}", style="bold"))
        if widths := self.widths(console.width):
            self._show_columns(widths, console)
        else:
            self._show_rows(console)
        for line in self.below:
            console.print(Text(line, style="dim"))

    def _show_columns(self, widths: Sequence[int], console: Console) -> None:
        table = rich_table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for column, heading, width in zip(self.columns, self.headings, widths, strict=True):
            table.add_column(Text(heading), justify="right" if column.startswith(">") else "left", width=width)
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)

    def widths(self, room: int) -> list[int] | None:
        """The width of each column in a room of so many letters; None if words would have to be broken."""
        natural, least = [], []
        for number, (column, heading) in enumerate(zip(self.columns, self.headings, strict=True)):
            lines = [line for row in self.rows for line in row[number].split("\n")]
            whole = lines if column.startswith(">") else [word for line in lines for word in line.split(" ")]
            natural.append(max(map(cell_len, [heading, *lines])))
            least.append(max(map(cell_len, [*heading.split(" "), *whole])))
        too_much = sum(natural) + _GAP * (len(natural) - 1) - room
        for _ in range(too_much):
            can_give = [number for number in range(len(natural)) if natural[number] > least[number]]
            if not can_give:
                return None
            natural[max(can_give, key=natural.__getitem__)] -= 1
        return natural

    def _show_rows(self, console: Console) -> None:
        if self.headings[0]:
            console.print(Text(self.headings[0], style="dim"))
        for name, *cells in self.rows:
            console.print(Text(name))
            said = [f"{heading} {cell}" for heading, cell in zip(self.headings[1:], cells, strict=True) if cell]
            console.print(Padding(Text("; ".join(said).replace("\n", ", ")), (0, 0, 0, 4), expand=False))

    def to_html(self) -> Markup:
        """The same as HTML; everything in it is escaped."""
        kinds = [Markup(' class="number"') if column.startswith(">") else "" for column in self.columns]
        cells = [[escape(cell).replace("\n", Markup("<br>")) for cell in row] for row in [self.headings, *self.rows]]
        tags = [Markup('<th scope="col"{}>{}</th>'), Markup('<th scope="row"{}>{}</th>'), Markup("<td{}>{}</td>")]
        rows = [
            Markup("").join(
                tags[0 if row is cells[0] else 1 if number == 0 else 2].format(kind, cell)
                for number, (kind, cell) in enumerate(zip(kinds, row, strict=True))
            )
            for row in cells
        ]
        body = Markup("\n").join(Markup("<tr>{}</tr>").format(row) for row in rows)
        return Markup('<div class="scroll"><table>\n{}\n</table></div>').format(body)

    def to_markdown(self) -> str:
        """The same as Markdown, under its title; nothing if it has neither rows nor lines below them."""
        marks = ["--:" if column.startswith(">") else "---" for column in self.columns]
        cells = [[cell.replace("|", "\\|").replace("\n", "; ") for cell in row] for row in self.rows]
        table = "\n".join(f"| {' | '.join(row)} |" for row in ([self.headings, marks, *cells] if cells else []))
        parts = [part for part in (table, "\n".join(self.below)) if part]
        return "\n\n".join([f"## {self.title}", *parts]) if parts else ""

    def __html__(self) -> str:
        """Title above, lines below, as jinja and markupsafe put it into a page."""
        below = Markup("").join(Markup("\n<p><small>{}</small></p>").format(line) for line in self.below)
        return Markup("<h2>{}</h2>\n{}{}").format(self.title, self.to_html(), below)


def show_facts(facts: dict[str, str | None], console: Console) -> None:
    """Names and values, one below the other; those without a value are left out."""
    grid = rich_table.Table.grid(padding=(0, _GAP))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            grid.add_row(Text(name), Text(value))
    console.print(grid)
