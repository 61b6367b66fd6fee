"""docs/benchmarks.md, the README's table and the plots, from the results files and from nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import atomic_path
from .gpu import FILE, gpu_section
from .plots import draw_plots
from .provenance import RESULTS
from .registry import GROUPS
from .runner import Row, read_rows
from .tables import (
    WARPS,
    agreement,
    cell,
    duration,
    error,
    grouped,
    hardware,
    is_plain,
    label,
    memory,
    origin,
    seconds,
    spread,
    table,
    unmeasured,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: written by python -m flashcocos.benchmarks report -->", "<!-- /results -->"
README_CASES = ("eager-256", "compiled-256", "naive-256", "runtime-256", "runtime-cached-256")
TITLE = """# Benchmarks

`python -m flashcocos.benchmarks report` writes this page from the files in `benchmarks/results`; do not edit it.
How to measure again: `python -m flashcocos.benchmarks --help`. How fast a bundle is on your machine:
`flashcocos bench model.zip --quick`."""
CAVEATS = """## What these numbers do not show

- A full-size network has seeded noise as weights here. Agreement is that of two programs on the same weights, and says
  nothing about how good a picture is.
- Inputs are in memory already; reading, decoding and writing files is not in any time.
- Each process had the machine to itself. Other processors, with AVX-512 or more cores, rank the rows differently.
- Peak memory is that of a whole fresh process, the interpreter and its packages included.
- The published form is flashcocos's own code of the published computation, not the authors' program.
- The rows of larger pictures and of batches are of revisions before exports had Winograd's form.
- The largest batches are estimated and have not been tried, and no row has run on a GPU unless it names one.
- Commands use today's names of groups. At the revisions given here, `ablation` was `ladder` and `estimate` was
  `plan`."""


def write_report(page: Path = PAGE, readme: Path = README, results: Path = RESULTS) -> list[Path]:
    """Write the page of all results, the README's table between its markers, and the plots.

    Args:
        page: The page to write; it links to the plots in benchmarks/results.
        readme: The README, which has the two markers.
        results: The folder of the results files; the plots are drawn into it.

    Returns:
        The files written.

    Raises:
        InputError: The README lacks its markers, or a results file is missing or damaged.
        BackendError: matplotlib is missing.
    """
    texts = {page: full_page(results), readme: insert(readme.read_text(encoding="utf-8"), readme_table(results))}
    plots = draw_plots(results, results)
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*plots, *texts]


def insert(readme: str, text: str) -> str:
    """`readme` with `text` in place of what is between its two markers; `InputError` without them."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(readme):
        raise InputError(f"README: expected the markers {BEGIN!r} and {END!r}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", readme)


def readme_table(results: Path = RESULTS) -> str:
    """The README's table of five rows and its hardware line."""
    rows = {row["case"]: row for row in read_rows(results / "ablation.jsonl")}
    steps = [rows[f"ablation/{name}"] for name in README_CASES if f"ablation/{name}" in rows]
    if len(steps) < len(README_CASES):
        raise InputError(f"{results / 'ablation.jsonl'}: expected the cases {', '.join(README_CASES)}; run them first")
    base = steps[0]["ms"]["median"] if steps[0]["status"] == "timed" else None
    lines = [
        [label(row), duration(row), _speedup(row, base), memory(row), agreement(row)[1]]
        if row["status"] == "timed"
        else [label(row), unmeasured(row)]
        for row in steps
    ]
    return f"{table(['', 'median', 'times as fast', 'peak memory', 'PSNR'], lines)}\n\n{hardware(steps[0]['setup'])}"


def full_page(results: Path = RESULTS) -> str:
    """docs/benchmarks.md: a section for the default model and for each group that has a results file."""
    parts = [TITLE, shipped_models({name: _load(results / f"{name}.json") for name in _scores(results)})]
    for group in GROUPS:
        if rows := read_rows(results / f"{group}.jsonl"):
            text = SECTIONS[group](rows)
            if group == "warp":
                text += shares(rows, read_rows(results / "machine.jsonl"))
            if group == "strides":
                text += trained_strides({stride: _load(path) for stride, path in _trained(results).items()})
            parts += [text, origin(rows)]
    if rows := read_rows(results / FILE):
        parts += [gpu_section(rows), origin(rows)]
    return "\n\n".join([*parts, CAVEATS]) + "\n"


def shipped_models(scores: Mapping[str, dict[str, Any]]) -> str:
    """The models that ship on the held-out avatars, by the names of the files that `flashcocos evaluate` wrote."""
    first = next(iter(scores.values()))
    lines = []
    for name, found in scores.items():
        lines.append([name, *(f"{found[key]:.2f} dB" for key in ("psnr", "psnr_warped", "psnr_baseline"))])
        lines[-1] += [f"{found['ssim']:.3f}", f"{found['correspondence']:.3f}"]
    by_class = [
        [f"{name}, {what}", *(f"{value:.{digits}f}" for value in found[key].values())]
        for name, found in scores.items()
        for what, key, digits in (("PSNR, dB", "psnr_by_class", 1), ("color error", "color_error_by_class", 3))
    ]
    head = ["", "result", "warped exemplar", "class-mean baseline", "SSIM", "correspondence"]
    return (
        f"## The models that ship\n\nScores on {first['pairs']} held-out pairs of portraits whose answer is known. "
        'The class-mean baseline paints each class\nin the exemplar\'s mean color of that class. For "hand-drawn" a '
        "script repainted each label as if by hand; the answer stays.\n\n"
        f"{table(head, lines)}\n\n{table(['', *first['psnr_by_class']], by_class)}"
    )


def machine(rows: Sequence[Row]) -> str:
    """The machine's own rates."""
    lines = [
        [name.replace("_gb_s", ", GB/s").replace("_gflop_s", " products, GFLOP/s"), grouped(value)]
        for row in rows
        if row["status"] == "measured"
        for name, value in row["facts"].items()
    ]
    return f"## The machine\n\nA copy counts the bytes that it reads and writes.\n\n{table(['', 'rate'], lines)}"


def ablation(rows: Sequence[Row]) -> str:
    """One translation at 256 px, from the published form downwards, with the quality of each step."""
    size = rows[0]["parameters"]["size"]
    base = next((row["ms"]["median"] for row in rows if row["status"] == "timed"), None)
    lines = []
    for row in rows:
        if row["status"] != "timed":
            lines.append([label(row), "", unmeasured(row)])
            continue
        first = seconds(row["first_ms"]) if "first_ms" in row else ""
        lines.append([label(row), first, duration(row), spread(row)])
        lines[-1] += [_speedup(row, base), memory(row), *agreement(row)]
    head = ["", "first run", "median", "p5 to p95", "times as fast", "peak memory", "largest error", "PSNR", "SSIM"]
    return (
        f"## Step by step\n\nOne translation at {size} x {size} by a full-size ade20k network. Quality is against the "
        "first row; the first run includes\ncompilation.\n\n"
        f"![time and agreement of each step]({_plot('ablation')})\n\n{table(head, lines)}"
    )


def resolution(rows: Sequence[Row]) -> str:
    """Time and memory over the size of the picture."""
    lines = []
    for row in sorted(rows, key=lambda row: row["parameters"]["size"]):
        timed = row["status"] == "timed"
        lines.append([f"{row['parameters']['size']} px", label(row), duration(row) if timed else unmeasured(row)])
        lines[-1] += [memory(row), agreement(row)[1]] if timed else []
    return (
        f"## Larger pictures\n\nThe same network.\n\n![peak memory over resolution]({_plot('memory')})\n\n"
        f"{table(['size', '', 'time', 'peak memory', 'PSNR'], lines)}"
    )


def warp(rows: Sequence[Row]) -> str:
    """The warp alone: methods over positions, then everything that is not its plain forward pass."""
    plain = {(row["parameters"]["method"], row["parameters"]["size"] ** 2): row for row in rows if is_plain(row)}
    methods = list(dict.fromkeys(method for method, _ in plain))
    lines = [
        [grouped(count), *(cell(plain.get((method, count))) for method in methods)]
        for count in sorted({count for _, count in plain})
    ]
    text = (
        "## The warp alone\n\nOver N positions, 256 channels, patch 3, 3 values: time, and memory beside inputs and "
        f"result.\n\n![time of the warp over N]({_plot('warp')})\n\n{_by_count(methods, lines)}"
    )
    lines = [[row["measures"], cell(row), error(row)] for row in rows if not is_plain(row) and "ratio" not in row]
    text += f"\n\n{table(['', 'time, memory', 'largest error'], lines)}" if lines else ""
    lines = [
        [f"{row['measures']}, {row['parameters']['inputs']}", duration(row), f"{row['ratio']:.2f}", error(row)]
        for row in rows
        if "ratio" in row
    ]
    what = "The ratio is to the time of the bare theta^T phi product. Noise has no match, so no key can be left out."
    return text + (f"\n\n{what}\n\n{table(['', 'median', 'ratio', 'largest error'], lines)}" if lines else "")


def shares(rows: Sequence[Row], machine: Sequence[Row]) -> str:
    """The warp's products of whole features, 2 C N^2, as shares of the machine's matrix rate where it was measured."""
    rates = {name: rate for row in machine if row["status"] == "measured" for name, rate in row["facts"].items()}
    by_count: dict[int, dict[str, str]] = {}
    for row in rows:
        parameters = row["parameters"]
        if is_plain(row) and row["status"] == "timed" and (rate := rates.get(f"{parameters['dtype']}_gflop_s")):
            work = 2 * parameters["channels"] * parameters["size"] ** 4 / row["ms"]["median"] / 1e6
            by_count.setdefault(parameters["size"] ** 2, {})[parameters["method"]] = f"{work / rate:.0%}"
    if not by_count:
        return ""
    methods = list(dict.fromkeys(method for cells in by_count.values() for method in cells))
    lines = [
        [grouped(count), *(cells.get(method, "") for method in methods)] for count, cells in sorted(by_count.items())
    ]
    return f"\n\nProducts of whole features, 2 C N^2, as a share of the matrix rate:\n\n{_by_count(methods, lines)}"


def strides(rows: Sequence[Row]) -> str:
    """The cost of a finer correspondence."""
    lines = []
    for row in rows:
        parameters = row["parameters"]
        lines.append([parameters["preset"], f"{parameters['size']} px", str(parameters["stride"])])
        if row["status"] != "timed":
            lines[-1].append(unmeasured(row))
            continue
        facts = row["facts"]
        lines[-1] += [grouped(facts["positions"]), duration(row), seconds(row["parts_ms"]["warp"]), memory(row)]
        lines[-1].append(f"{facts['matrix_gib']:.3g} GiB")
    head = ["network", "size", "`warp_stride`", "positions", "time", "of it the warp", "peak memory", "a full matrix"]
    return (
        "## A finer correspondence\n\nOne translation in PyTorch, its exemplar encoded once, the warp by numba. The "
        "weights are seeded noise: cost only. The\nlast column is what the published form would take for one "
        f"float32 matrix of the warp.\n\n{table(head, lines)}"
    )


def trained_strides(scores: Mapping[int, dict[str, Any]]) -> str:
    """What a finer correspondence gives: one network at every stride, trained alike."""
    if not scores:
        return ""
    parts = ("eyes", "mouth", "glasses")
    lines = [
        [str(stride), *(f"{found[key]:.2f} dB" for key in ("psnr_warped", "psnr"))]
        + [f"{found['psnr_by_class'][name]:.1f} dB" for name in parts]
        for stride, found in scores.items()
    ]
    return (
        f"\n\nThe network of avatars-128 at each stride, from the same start and trained alike, on the first "
        f"{next(iter(scores.values()))['pairs']} test\npairs:\n\n"
        f"{table(['`warp_stride`', 'warped exemplar', 'result', *parts], lines)}"
    )


def training(rows: Sequence[Row]) -> str:
    """A training step."""
    lines = [
        [row["measures"], duration(row), memory(row)]
        if row["status"] == "timed"
        else [row["measures"], unmeasured(row)]
        for row in rows
    ]
    return f"## A training step\n\n{table(['', 'time', 'peak memory'], lines)}"


def estimate(rows: Sequence[Row]) -> str:
    """The estimated memory of a training step, and the largest batch in each budget."""
    lines = []
    for row in rows:
        if row["status"] != "measured":
            lines.append([row["measures"], unmeasured(row)])
            continue
        batches = row["facts"]["largest"].values()
        cells = (f"{batch['batch']} ({batch['mib']:.0f} MiB)" if batch["batch"] else "none" for batch in batches)
        lines.append([row["measures"], f"{row['facts']['one_mib']['total']:.0f} MiB", *cells])
    head = ["", "one sample", *(f"in {budget:g} GiB" for budget in rows[0]["parameters"]["budgets_gib"])]
    return (
        "## The largest batch\n\nOf ade20k's training step in float32, with its peak, estimated from the tensors that "
        "the step makes\n(`flashcocos train ade20k --estimate-memory 8 12 24`). CUDA's context and workspaces come on "
        f"top.\n\n{table(head, lines)}"
    )


def throughput(rows: Sequence[Row]) -> str:
    """Pictures a second."""
    lines = []
    for row in rows:
        batch = row["parameters"]["batch"]
        timed = row["status"] == "timed"
        lines.append([str(batch), label(row), f"{1e3 * batch / row['ms']['median']:.3g}" if timed else unmeasured(row)])
        lines[-1] += [memory(row)] if timed else []
    head = ["batch", "", "pictures a second", "peak memory"]
    return f"## Batches\n\nAt {rows[0]['parameters']['size']} px, the same network.\n\n{table(head, lines)}"


def serving(rows: Sequence[Row]) -> str:
    """What each kind of load found."""
    lines = [
        [row["measures"], ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row["facts"].items())]
        if row["status"] == "measured"
        else [row["measures"], unmeasured(row)]
        for row in rows
    ]
    return (
        "## The HTTP service\n\n`flashcocos serve` with the default model of the revision below, on loopback. "
        'The client compares each answer\nwith the bare Translator\'s and runs on the same cores. "Outside" is a '
        "request without the model's "
        'stages as Server-Timing states them:\nclient, HTTP, queue and PNG both ways. "Other" counts answers that are '
        "wrong, lost or of another status.\nOnly the extras cpu, serve and bench were installed: where scipy is, numba "
        f"loads it at the start.\n\n{table(['', 'found'], lines)}"
    )


def startup(rows: Sequence[Row]) -> str:
    """First pictures, then sizes of installations."""
    starts: list[list[str]] = []
    sizes: list[list[str]] = []
    for row in rows:
        facts, lines = row.get("facts", {}), sizes if "extra" in row["parameters"] else starts
        if row["status"] == "timed":
            peak = f"{facts['peak_mib']:.0f} MiB"
            lines.append([row["measures"], seconds(row["parts_ms"]["ready"]), duration(row), peak])
        elif row["status"] == "measured":
            largest = ", ".join(f"{name} {size:.0f}" for name, size in facts["largest"].items())
            lines.append([row["measures"], f"{facts['mib']:.0f} MiB", str(facts["packages"]), largest])
        else:
            lines.append([row["measures"], unmeasured(row)])
    parts = ["## Start-up and installation"]
    parts += [table(["", "ready", "first picture", "peak memory"], starts)] if starts else []
    if sizes:
        parts += [
            "Sizes without flashcocos itself; the largest in MiB.",
            table(["", "size", "packages", "largest"], sizes),
        ]
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": machine,
    "ablation": ablation,
    "resolution": resolution,
    "warp": warp,
    "strides": strides,
    "training": training,
    "estimate": estimate,
    "throughput": throughput,
    "serving": serving,
    "startup": startup,
}


def _speedup(row: Row, base: float | None) -> str:
    return "" if base is None else f"{base / row['ms']['median']:.2f}"


def _plot(name: str) -> str:
    return f"../benchmarks/results/{name}.png"


def _by_count(methods: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return table(["N", *(WARPS[method] for method in methods)], lines)


def _scores(results: Path) -> list[str]:
    """Names of the score files of the models that ship; that of the default model is always wanted."""
    wanted = [f"avatars-{size}{drawn}" for size in (128, 256) for drawn in ("", "-hand-drawn")]
    return [name for name in wanted if name == wanted[0] or (results / f"{name}.json").exists()]


def _trained(results: Path) -> dict[int, Path]:
    paths = {stride: results / f"strides-{stride}.json" for stride in (4, 2, 1)}
    return {stride: path for stride, path in paths.items() if path.exists()}


def _load(path: Path) -> dict[str, Any]:
    try:
        scores: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        command = "flashcocos evaluate bundle/models/avatars-128.zip --data avatars"
        raise InputError(f"{path}: {error.strerror}; run `{command} -o {path}` first") from error
    return scores
