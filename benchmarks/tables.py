"""Write the tables of the README from the results that the benchmarks wrote, and from nothing else.

python -m flashcocos.benchmarks.tables          # rewrites README.md between its markers
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import atomic_path
from .harness import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: written by python -m flashcocos.benchmarks.tables -->", "<!-- /results -->"

Results = dict[str, Any]


def main() -> None:
    """Rewrite the README in place."""
    sections = [section(_load(name)) for name, section in SECTIONS.items()]
    text = insert(README.read_text(), "\n\n".join(sections))
    with atomic_path(README) as temporary:
        temporary.write_text(text)
    print(README)


def insert(readme: str, tables: str) -> str:
    """`readme` with everything between its two markers replaced; `InputError` without them."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(readme):
        raise InputError(f"README: expected the markers {BEGIN!r} and {END!r}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", readme)


def translation(results: Results) -> str:
    """One translation, end to end: time, memory and agreement."""
    size = results["rows"][0]["size"]
    lines = [
        f"**One translation** at {size} x {size}, a full-size ade20k network with seeded weights:",
        "",
        "| | median | peak memory of the process | agreement with eager |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        agreement = "-" if row["case"] == "eager" else f"{row['psnr_db']:.1f} dB"
        lines.append(
            f"| {CASES[row['case']]} | {row['median_ms'] / 1e3:.2f} s | {row['peak_mib']:.0f} MiB | {agreement} |"
        )
    return "\n".join([*lines, "", _origin(results)])


def corr_warp(results: Results) -> str:
    """The warp alone on the CPU against the product it contains."""
    lines = [
        "**The warp on the CPU**, C 256, patch 3, 3 values: time over that of the bare theta^T phi product in numpy",
        "in the same run, and memory beside inputs and result:",
        "",
        "| backend | maps | inputs | warp | product | ratio | extra memory | max error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if row["values"] != 3:
            continue
        times = row["milliseconds"]
        lines.append(
            f"| {row['backend']} | {row['size']} x {row['size']} | {row['inputs']} | {times['warp']['min']:.0f} ms | "
            f"{times['product']['min']:.0f} ms | {row['ratio']:.2f} | {row['extra_mib']:.0f} MiB | "
            f"{row['max_error']:.0e} |"
        )
    return "\n".join([*lines, "", _origin(results)])


CASES = {
    "eager": "eager PyTorch, as published, full matrix",
    "runtime": "runtime, exemplar encoded each time",
    "runtime-cached": "runtime, exemplar encoded once",
}
SECTIONS = {"translation": translation, "corr_warp": corr_warp}


def _load(name: str) -> Results:
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run python -m flashcocos.benchmarks.{name} first") from error


def _origin(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['processor']}, {results['cores']} cores; Python {results['python']}, {versions}; "
        f"revision {results['revision']}: `{results['command']}`"
    )


if __name__ == "__main__":
    main()
