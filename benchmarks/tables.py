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
        f"**One translation** at {size} x {size}, a full-size ade20k network, seeded weights, 16 classes in a label:",
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


def avatars(results: Results) -> str:
    """The shipped model on the held-out avatars, as `flashcocos evaluate` wrote it."""
    lines = [
        f"**The shipped model** on {results['pairs']} held-out pairs of portraits whose exact answer is known.",
        "The trivial answer paints each class in the exemplar's mean colour of that class.",
        "",
        "| | PSNR | SSIM | correspondence |",
        "|---|---|---|---|",
        f"| result | {results['psnr']:.2f} dB | {results['ssim']:.3f} | {results['correspondence']:.3f} |",
        f"| warped exemplar | {results['psnr_warped']:.2f} dB | | |",
        f"| trivial answer | {results['psnr_trivial']:.2f} dB | | |",
        "",
        "| | " + " | ".join(results["psnr_by_class"]) + " |",
        "|---|" + "---|" * len(results["psnr_by_class"]),
        "| PSNR, dB | " + " | ".join(f"{value:.1f}" for value in results["psnr_by_class"].values()) + " |",
        "| colour error | " + " | ".join(f"{value:.3f}" for value in results["colour_error_by_class"].values()) + " |",
    ]
    return "\n".join(lines)


CASES = {
    "eager": "eager PyTorch, as published, full matrix",
    "runtime": "runtime, exemplar encoded each time",
    "runtime-cached": "runtime, exemplar encoded once",
}
SECTIONS = {
    "avatars-128": avatars,
    "translation": translation,
    "translation_512": translation,
    "corr_warp": corr_warp,
}

_COMMANDS = {
    "avatars-128": "flashcocos evaluate runtime/shipped/avatars-128.zip --data avatars -o FILE",
    "translation": "python -m flashcocos.benchmarks.translation",
    "translation_512": "python -m flashcocos.benchmarks.translation --size 512 --name translation_512",
    "corr_warp": "python -m flashcocos.benchmarks.corr_warp",
}


def _load(name: str) -> Results:
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run {_COMMANDS[name]} first") from error


def _origin(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['processor']}, {results['cores']} cores; Python {results['python']}, {versions}; "
        f"revision {results['revision']}: `{results['command']}`"
    )


if __name__ == "__main__":
    main()
