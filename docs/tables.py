"""Write the tables of results into the documentation from the JSON files of docs/results.

    python docs/tables.py   # a test compares the pages with the files

A page holds each table between two markers, `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is one
of TABLES. Labels come from the table of measures (latent_shift/evaluation/measures.py).
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tables_of_quality
import tables_of_reliability
import tables_of_speed

ROOT = Path(__file__).parent.parent

IDEAS = ("ideas", "ideas-pixart", "ideas-sana", "ideas-full-sana", "ideas-full-pixart")
TABLES: dict[str, Callable[[], str]] = {
    name.replace("-", "_"): partial(tables_of_quality.ranked, name) for name in IDEAS
} | {
    function.__name__: function
    for module in (tables_of_quality, tables_of_reliability, tables_of_speed)
    for function in module.TABLES
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if MARKED.search(path.read_text(encoding="utf-8"))
]


def with_tables(page: str) -> str:
    """Return the text of a page with its marked tables replaced; raise ValueError for a marker without a function."""

    def replacement(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"{page}: no table {name}; expected one of {', '.join(TABLES)}")
        return f"{start}\n{TABLES[name]()}\n\n{end}"

    return MARKED.sub(replacement, (ROOT / page).read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(with_tables(page), encoding="utf-8")
