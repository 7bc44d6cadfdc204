"""The README's tables, out of the JSON files that the benchmarks wrote.

python benchmarks/report.py benchmarks/results/*.json > benchmarks/results/README.md
"""

from __future__ import annotations

import argparse
import json
import pathlib

# What a reader needs to repeat a measurement, in this order; packages follow.
_HARDWARE = ("processor", "processors", "device", "machine")
_NOT_PACKAGES = (*_HARDWARE, "when", "load", "cores", "batch", "size", "workers", "data",
                 "load_average", "packages")  # fmt: skip


def markdown(results: list[dict]) -> str:
    """Every table of some results; what they were measured on is said once, at the end."""
    parts, notes = [], []
    for result in results:
        note = conditions(result["about"])
        if note not in notes:
            notes.append(note)
        for table in result["tables"]:
            if table["rows"]:
                parts.append(table_of(table, notes.index(note) + 1))
    several = len(notes) > 1
    parts += [f"[{i}] {note}" if several else note for i, note in enumerate(notes, 1)]
    text = "\n\n".join(parts) + "\n"
    return text if several else text.replace(" [1]**", "**")


def table_of(table: dict, note: int) -> str:
    """One table: medians, quartiles, and ratios above 1 where a contender is faster."""
    unit = table.get("unit", "ms")
    rows, baseline = table["rows"], table.get("baseline")
    columns = [("", "---"), ("n", "--:"), (f"median, {unit}", "--:"), ("quartiles", "--:")]
    ratio = any(row.get("ratio") is not None for row in rows)
    memory = any(row.get("peak_mb") is not None for row in rows)
    if ratio:
        columns.append((f"x {baseline}", "--:"))
    if memory:
        columns.append(("memory, MB", "--:"))
    lines = [
        f"**{table['title']} [{note}]**",
        "",
        "| " + " | ".join(head for head, _ in columns) + " |",
        "|" + "|".join(line for _, line in columns) + "|",
    ]
    for row in rows:
        median = row["median_ms"] if "median_ms" in row else row["median"]
        low, high = row["quartiles_ms"] if "quartiles_ms" in row else row["quartiles"]
        cells = [row["contender"], str(row["n"]), number(median), f"{number(low)} - {number(high)}"]
        if ratio:
            cells.append("" if row.get("ratio") is None else f"{row['ratio']:.2f}")
        if memory:
            cells.append("" if row.get("peak_mb") is None else f"{row['peak_mb']:.0f}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits or all before the point.

    Example:
        >>> number(1234.5), number(12.345), number(0.01234)
        ('1234', '12.3', '0.0123')
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def conditions(about: dict) -> str:
    """Hardware, versions and date in a sentence."""
    hardware = [str(about[key]) for key in _HARDWARE if key in about and key != "processors"]
    count = about.get("processors", about.get("cores"))
    packages = {**about, **about.get("packages", {})}
    versions = [
        f"{name} {version}"
        for name, version in packages.items()
        if name not in _NOT_PACKAGES and isinstance(version, str)
    ]
    date = f", {about['when']}" if "when" in about else ""
    return f"{', '.join(hardware)}; {count} processors; {', '.join(versions)}{date}."


def read(paths: list[pathlib.Path]) -> list[dict]:
    """The results in these files."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    print(markdown(read(parser.parse_args().files)), end="")


if __name__ == "__main__":
    main()
