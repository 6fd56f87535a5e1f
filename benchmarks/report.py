"""`bench.py compare`: the speeds and memories in two saved outputs of one benchmark, row by row."""

import contextlib
import json
from pathlib import Path

from runs import markdown_table


def read_report(path: Path) -> dict:
    """The last line of JSON that a benchmark printed into a file. Raises FileNotFoundError, or ValueError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; save what a benchmark prints: python bench.py train > {path}")
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        with contextlib.suppress(ValueError):
            if line.startswith("{") and "rows" in (report := json.loads(line)):
                return report
    raise ValueError(f"{path} holds no line of JSON from bench.py; save all that it prints")


def compare(one: Path, two: Path) -> list[dict]:
    """Print and return the ratio of every speed and memory in two saved outputs, row by row."""
    a, b = read_report(one), read_report(two)
    if a["bench"] != b["bench"]:
        raise ValueError(f"{one} is of bench.py {a['bench']}, {two} of bench.py {b['bench']}; only equals can be compared")
    other = [f"{key} {a.get(key)} -> {b.get(key)}" for key in {**a, **b} if key != "rows" and a.get(key) != b.get(key)]
    print(f"A {one}, B {two}; {'; '.join(other) or 'same settings'}")

    def named(report: dict) -> dict[str, dict]:
        return {" ".join(str(row[key]) for key in ("model", "variant") if key in row): row for row in report["rows"]}

    before, after = named(a), named(b)
    rows, lines = [], []
    for name in (name for name in before if name in after):
        for key, x in before[name].items():
            y = after[name].get(key)
            if (key.endswith("_per_second") or key == "peak_memory_bytes") and x and y:
                rows.append({"variant": name, "quantity": key, "a": x, "b": y, "ratio": y / x})
                lines.append([name, key, f"{x:,.4g}", f"{y:,.4g}", f"{y / x:.2f}"])
    print("\n" + markdown_table(["variant", "quantity", "A", "B", "B / A"], lines))
    for path, missing in ((one, after.keys() - before.keys()), (two, before.keys() - after.keys())):
        for name in sorted(missing):
            print(f"not in {path}: {name}")
    return rows
