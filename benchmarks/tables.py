"""The README's results from the results files, and from nothing else; `report` also draws the plots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import atomic_path
from .provenance import RESULTS
from .registry import GROUPS
from .runner import Row, read_rows

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: written by python -m flashcocos.benchmarks report -->", "<!-- /results -->"
METHODS = {
    "eager": "eager PyTorch, as published",
    "eager-fused": "eager PyTorch, full matrix in the warp alone",
    "eager-tiled": "flashcocos's networks in PyTorch",
    "compiled": "torch.compile, as published",
    "naive": "one naive ONNX graph, ONNX Runtime",
    "naive-openvino": "one naive ONNX graph, OpenVINO",
    "runtime": "runtime",
}
WARPS = {
    "numba": "runtime, numba",
    "numpy": "runtime, numpy",
    "cpu": "tiled PyTorch",
    "triton": "Triton",
    "sdpa": "torch's SDPA on patches",
    "reference": "published, full matrix",
    "compiled": "published, compiled",
}
CAVEATS = """**What this does not show.**

- Weights are seeded noise where a full-size network runs: agreement is that of two programs on the same weights, and
  says nothing of how good a picture is.
- Inputs are in memory already; reading, decoding and writing files is not in any time.
- Processes have the machine to themselves. Other processors, with AVX-512 or more cores, rank the rows differently.
- Peak memory is that of a whole fresh process, the interpreter and its packages included.
- The published form is flashcocos's own code of the published computation, not the authors' program.
- In the run at hand torch.compile found code of an earlier run in its cache; its first run had taken 97 s without.
- The largest batches are planned and have not been tried, and no row has run on a GPU unless it names one."""


def report(readme: Path = README, results: Path = RESULTS) -> int:
    """Rewrite `readme` between its markers and draw the plots beside the `results`."""
    from .plots import draw

    text = insert(readme.read_text(encoding="utf-8"), sections(results))
    for path in draw(results, results):
        print(path)
    with atomic_path(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(readme)
    return 0


def insert(readme: str, tables: str) -> str:
    """`readme` with everything between its two markers replaced; `InputError` without them."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(readme):
        raise InputError(f"README: expected the markers {BEGIN!r} and {END!r}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", readme)


def sections(results: Path = RESULTS) -> str:
    """Everything between the markers; a group without a results file has no section."""
    parts = [avatars(_load(results / "avatars-128.json"))]
    for group in GROUPS:
        for path in sorted(results.glob(f"{group}*.jsonl")):
            rows = read_rows(path)
            text = SECTIONS[group](rows) if rows else ""
            if group == "warp":
                text += shares(rows, read_rows(path.with_name(path.name.replace("warp", "machine", 1))))
            if text:
                parts.append(f"{text}\n\n{origin(rows)}")
    return "\n\n".join([*parts, CAVEATS])


def ablation(rows: Sequence[Row]) -> str:
    """One translation at 256 px, from the published form downwards, with the quality of each step."""
    size = rows[0]["parameters"]["size"]
    base = next((row["ms"]["median"] for row in rows if row["status"] == "timed"), None)
    lines = []
    for row in rows:
        if row["status"] != "timed":
            lines.append([label(row), "", unmeasured(row), *[""] * 6])
            continue
        first = seconds(row["first_ms"]) if "first_ms" in row else ""
        lines.append([label(row), first, duration(row), spread(row)])
        lines[-1] += [f"{base / row['ms']['median']:.2f}", memory(row), *agreement(row)]
    plot = "![time and agreement of each step](benchmarks/results/ablation.png)"
    head = ["", "first run", "median", "p5 to p95", "times as fast", "peak memory", "largest error", "PSNR", "SSIM"]
    return (
        f"**The latency ablation**: one translation at {size} x {size}, a full-size ade20k network, quality against the "
        f"first row; the first run includes compilation:\n\n{plot}\n\n{table(head, lines)}"
    )


def resolution(rows: Sequence[Row]) -> str:
    """Time and memory over the size of the picture."""
    lines = []
    for row in sorted(rows, key=lambda row: row["parameters"]["size"]):
        start = [f"{row['parameters']['size']} px", label(row)]
        if row["status"] == "timed":
            lines.append([*start, duration(row), memory(row), *agreement(row)[1:2]])
        else:
            lines.append([*start, unmeasured(row), "", ""])
    plot = "![peak memory over resolution](benchmarks/results/memory.png)"
    head = ["size", "", "time", "peak memory", "PSNR"]
    return f"**Larger pictures**, the same network:\n\n{plot}\n\n{table(head, lines)}"


def warp(rows: Sequence[Row]) -> str:
    """The warp alone: methods over positions, then everything that is not its plain forward pass."""
    plain = [row for row in rows if is_plain(row)]
    methods = list(dict.fromkeys(row["parameters"]["method"] for row in plain))
    counts = sorted({row["parameters"]["size"] ** 2 for row in plain})
    cells = {(row["parameters"]["method"], row["parameters"]["size"] ** 2): row for row in plain}
    lines = [[_count(count), *(_cell(cells.get((method, count))) for method in methods)] for count in counts]
    text = (
        "**The warp alone** over N positions, 256 channels, patch 3, 3 values: time, and memory beside inputs and "
        f"result:\n\n![time of the warp over N](benchmarks/results/warp.png)\n\n{_by_count(methods, lines)}"
    )
    others = [row for row in rows if not is_plain(row) and "ratio" not in row]
    lines = [[row["measures"], _cell(row), error(row)] for row in others]
    text += f"\n\n{table(['', 'time, memory', 'largest error'], lines)}" if others else ""
    lines = [
        [f"{row['measures']}, {row['parameters']['inputs']}", duration(row), f"{row['ratio']:.2f}", error(row)]
        for row in rows
        if "ratio" in row
    ]
    head = ["", "median", "ratio", "largest error"]
    what = "Time over that of the bare theta^T phi product; noise has no match, so no key can be left out"
    return text + (f"\n\n{what}:\n\n{table(head, lines)}" if lines else "")


def shares(rows: Sequence[Row], machine: Sequence[Row]) -> str:
    """The warp's products of whole features, 2 C N^2, as shares of the machine's matrix rate where it was measured."""
    rates = {name: rate for row in machine if row["status"] == "measured" for name, rate in row["facts"].items()}
    plain = [row for row in rows if is_plain(row) and row["status"] == "timed"]
    found: dict[int, dict[str, str]] = {}
    for row in plain:
        chosen = row["parameters"]
        if rate := rates.get(f"{chosen['dtype']}_gflop_s"):
            work = 2 * chosen["channels"] * chosen["size"] ** 4 / row["ms"]["median"] / 1e6
            found.setdefault(chosen["size"] ** 2, {})[chosen["method"]] = f"{work / rate:.0%}"
    if not found:
        return ""
    methods = list(dict.fromkeys(row["parameters"]["method"] for row in plain))
    lines = [[_count(count), *(of.get(method, "") for method in methods)] for count, of in sorted(found.items())]
    return f"\n\nProducts of whole features, 2 C N^2, as a share of the matrix rate:\n\n{_by_count(methods, lines)}"


def training(rows: Sequence[Row]) -> str:
    """A training step."""
    return f"**A training step**:\n\n{_plain_table(rows)}"


def plan(rows: Sequence[Row]) -> str:
    """What a training step takes, and the largest batch in each budget."""
    budgets = rows[0]["parameters"]["budgets_gib"]
    lines = []
    for row in rows:
        if row["status"] != "measured":
            lines.append([row["measures"], unmeasured(row), *[""] * len(budgets)])
            continue
        found = row["facts"]["largest"].values()
        cells = (f"{of['batch']} ({of['mib']:.0f} MiB)" if of["batch"] else "none" for of in found)
        lines.append([row["measures"], f"{row['facts']['one_mib']['total']:.0f} MiB", *cells])
    head = ["", "one sample", *(f"in {budget:g} GiB" for budget in budgets)]
    return (
        "**The largest batch** of ade20k's training step in float32, planned from the tensors that it makes "
        "(`flashcocos train ade20k --plan 8 12 24`), with its peak; CUDA's context and workspaces come on top:"
        f"\n\n{table(head, lines)}"
    )


def throughput(rows: Sequence[Row]) -> str:
    """Pictures a second."""
    lines = []
    for row in rows:
        batch = row["parameters"]["batch"]
        if row["status"] == "timed":
            lines.append([str(batch), label(row), f"{1e3 * batch / row['ms']['median']:.3g}", memory(row)])
        else:
            lines.append([str(batch), label(row), unmeasured(row), ""])
    head = ["batch", "", "pictures a second", "peak memory"]
    return f"**Batches**, {rows[0]['parameters']['size']} px, the same network:\n\n{table(head, lines)}"


def startup(rows: Sequence[Row]) -> str:
    """First pictures, then sizes of installations."""
    lines = [
        [row["measures"], seconds(row["parts_ms"]["ready"]), duration(row), f"{row['facts']['peak_mib']:.0f} MiB"]
        if row["status"] == "timed"
        else [row["measures"], unmeasured(row), "", ""]
        for row in rows
        if "extra" not in row["parameters"]
    ]
    text = f"**Start-up**:\n\n{table(['', 'ready', 'first picture', 'peak memory'], lines)}" if lines else ""
    sizes = [
        [row["measures"], f"{row['facts']['mib']:.0f} MiB", str(row["facts"]["packages"]), _largest(row)]
        if row["status"] == "measured"
        else [row["measures"], unmeasured(row), "", ""]
        for row in rows
        if "extra" in row["parameters"]
    ]
    head = ["", "size", "packages", "the largest"]
    return text + (f"\n\n**Installed**, flashcocos itself left out:\n\n{table(head, sizes)}" if sizes else "")


def machine(rows: Sequence[Row]) -> str:
    """The machine's own rates."""
    lines = [
        [name.replace("_gb_s", ", GB/s").replace("_gflop_s", " products, GFLOP/s"), f"{value:,.0f}".replace(",", " ")]
        for row in rows
        if row["status"] == "measured"
        for name, value in row["facts"].items()
    ]
    text = "**The machine**, copied bytes read and written"
    return f"{text}:\n\n{table(['', 'rate'], lines)}"


def avatars(results: dict[str, Any]) -> str:
    """The shipped model on the held-out avatars, as `flashcocos evaluate` wrote it."""
    lines = [
        ["result", f"{results['psnr']:.2f} dB", f"{results['ssim']:.3f}", f"{results['correspondence']:.3f}"],
        ["warped exemplar", f"{results['psnr_warped']:.2f} dB", "", ""],
        ["class-mean baseline", f"{results['psnr_baseline']:.2f} dB", "", ""],
    ]
    by_class = [
        ["PSNR, dB", *(f"{value:.1f}" for value in results["psnr_by_class"].values())],
        ["color error", *(f"{value:.3f}" for value in results["color_error_by_class"].values())],
    ]
    return (
        f"**The shipped model** on {results['pairs']} held-out pairs of portraits whose exact answer is known.\n"
        "the class-mean baseline paints each class in the exemplar's mean color of that class.\n\n"
        f"{table(['', 'PSNR', 'SSIM', 'correspondence'], lines)}\n\n{table(['', *results['psnr_by_class']], by_class)}"
    )


SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": machine,
    "ablation": ablation,
    "resolution": resolution,
    "warp": warp,
    "training": training,
    "plan": plan,
    "throughput": throughput,
    "startup": startup,
}


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [re.sub(r" +\|", " |", f"| {' | '.join(row)} |") for row in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def label(row: Row) -> str:
    """What ran, for people."""
    chosen = row["parameters"]
    name = METHODS[chosen["method"]]
    if chosen["method"] != "runtime":
        return name + (f", {chosen['dtype']}" if chosen.get("dtype", "float32") != "float32" else "")
    parts = [] if chosen["bundle"] == "model" else [chosen["bundle"]]
    parts += ["OpenVINO"] * (chosen["backend"] == "openvino")
    parts += [chosen["precision"]] * (chosen["precision"] != "float32")
    parts.append("exemplar encoded once" if chosen["cached"] else "exemplar encoded each time")
    parts += [f"tiles of {chosen['tile']}"] if chosen.get("tile") else []
    return ", ".join([name, *parts])


def seconds(milliseconds: float) -> str:
    """1.23 s, or 45.6 ms below one second."""
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def duration(row: Row) -> str:
    """The median."""
    return seconds(row["ms"]["median"])


def spread(row: Row) -> str:
    """p5 to p95, where more than one run tells them."""
    ms = row["ms"]
    return f"{seconds(ms['p5'])} to {seconds(ms['p95'])}" if "p5" in ms and row["runs"] > 1 else ""


def memory(row: Row) -> str:
    """Peak of the device where one ran, else of the process."""
    return f"{row.get('device_peak_mib', row['peak_mib']):.0f} MiB"


def agreement(row: Row) -> list[str]:
    """Largest error of 255, PSNR, SSIM; empty for what others are compared with."""
    found, forms = row["quality"], {"max_abs": "{:.0f} of 255", "psnr_db": "{:.1f} dB", "ssim": "{:.4f}"}
    return [form.format(found[name]) if name in found else "" for name, form in forms.items()]


def error(row: Row) -> str:
    """The warp's largest error."""
    return f"{row['quality']['max_error']:.0e}" if "quality" in row else ""


def unmeasured(row: Row) -> str:
    """Why a row has no time."""
    if row["status"] == "outside":
        found = ", ".join(f"{name} {value:.4g}" for name, value in row["quality"].items())
        return f"too far off ({found}), not timed"
    return f"{row['status']}: {row['reason']}" if row["status"] in ("skipped", "timeout", "failed") else row["status"]


def origin(rows: Sequence[Row]) -> str:
    """Hardware, versions and commands of one results file."""
    setup = rows[0]["setup"]
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    place = f"{setup['processor']}, {setup['cores']} cores" + (f", {setup['gpu']}" if "gpu" in setup else "")
    return f"{place}; Python {setup['python']}, {versions}; revision {setup['revision']}: {commands}"


def is_plain(row: Row) -> bool:
    chosen = row["parameters"]
    return (chosen["patch"], chosen["values"], chosen["inputs"], chosen["backward"]) == (3, 3, "noise", False)


def _by_count(methods: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return table(["N", *(WARPS[method] for method in methods)], lines)


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _cell(row: Row | None) -> str:
    if row is None or row["status"] != "timed":
        return "" if row is None else unmeasured(row)
    extra = row.get("device_peak_mib", row.get("extra_mib"))
    return duration(row) + (f", {extra:.0f} MiB" if extra is not None else "")


def _plain_table(rows: Sequence[Row]) -> str:
    lines = [
        [row["measures"], duration(row), memory(row)]
        if row["status"] == "timed"
        else [row["measures"], unmeasured(row), ""]
        for row in rows
    ]
    return table(["", "time", "peak memory"], lines)


def _largest(row: Row) -> str:
    return ", ".join(f"{name} {size:.0f}" for name, size in row["facts"]["largest"].items())


def _load(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        command = "flashcocos evaluate bundle/models/avatars-128.zip --data avatars"
        raise InputError(f"{path}: {error.strerror}; run `{command} -o {path}` first") from error
    return found
