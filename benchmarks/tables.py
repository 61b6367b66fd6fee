"""How a row of the results is printed: its label, its numbers with their units, and Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .runner import Row

METHODS = {
    "eager": "eager PyTorch, as published",
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
    "triton-nine-tap": "Triton, nine-tap",
    "triton-straightforward": "Triton, straightforward",
    "sdpa": "torch's SDPA on patches",
    "reference": "published, full matrix",
    "compiled": "published, compiled",
}


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells that a line lacks at its end are empty."""
    padded = ([*line, *[""] * (len(head) - len(line))] for line in (head, *lines))
    rows = [re.sub(r" +\|", " |", f"| {' | '.join(line)} |") for line in padded]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def label(row: Row) -> str:
    """What ran, for people."""
    parameters = row["parameters"]
    name = METHODS[parameters["method"]]
    if parameters["method"] != "runtime":
        dtype = parameters.get("dtype", parameters.get("precision", "float32"))
        return name + (f", {dtype}" if dtype != "float32" else "")
    parts = [] if parameters["bundle"] == "model" else [parameters["bundle"]]
    parts += ["OpenVINO"] * (parameters["backend"] == "openvino")
    parts += [parameters["precision"]] * (parameters["precision"] != "float32")
    what = "label and exemplar" if parameters.get("label_cached") else "exemplar"
    parts.append(f"{what} encoded once" if parameters["cached"] else "exemplar encoded each time")
    parts += [f"tiles of {parameters['tile']}"] if parameters.get("tile") else []
    return ", ".join([name, *parts])


def seconds(milliseconds: float) -> str:
    """1.23 s, or 45.6 ms below one second."""
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def duration(row: Row) -> str:
    """The median."""
    return seconds(row["ms"]["median"])


def spread(row: Row) -> str:
    """p5 to p95 of more than one run."""
    ms = row["ms"]
    return f"{seconds(ms['p5'])} to {seconds(ms['p95'])}" if "p5" in ms and row["runs"] > 1 else ""


def memory(row: Row) -> str:
    """Peak of the device where one ran, else of the process."""
    return f"{row.get('device_peak_mib', row['peak_mib']):.0f} MiB"


def agreement(row: Row) -> list[str]:
    """Largest error of 255, PSNR, SSIM; empty for what others are compared with."""
    quality, forms = row["quality"], {"max_abs": "{:.0f} of 255", "psnr_db": "{:.1f} dB", "ssim": "{:.4f}"}
    return [form.format(quality[name]) if name in quality else "" for name, form in forms.items()]


def error(row: Row) -> str:
    """The warp's largest error."""
    return f"{row['quality']['max_error']:.0e}" if "quality" in row else ""


def unmeasured(row: Row) -> str:
    """Why a row has no time."""
    if row["status"] == "outside":
        quality = ", ".join(f"{name} {value:.4g}" for name, value in row["quality"].items())
        return f"too far off ({quality}), not timed"
    return f"{row['status']}: {row['reason']}" if row["status"] in ("skipped", "timeout", "failed") else row["status"]


def hardware(setup: Mapping[str, Any]) -> str:
    """One line: processor, cores, the GPU if there is one, and versions."""
    gpu = f", {setup['gpu']}" if "gpu" in setup else ""
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    return f"{setup['processor']}, {setup['cores']} cores{gpu}; Python {setup['python']}, {versions}"


def origin(rows: Sequence[Row]) -> str:
    """Hardware, revision and commands of one results file."""
    setup = rows[0]["setup"]
    commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
    return f"{hardware(setup)}; revision {setup['revision']}:\n\n```sh\n{commands}\n```"


def is_plain(row: Row) -> bool:
    """Whether a row of the warp is a plain forward pass, of patch 3 and 3 values."""
    usual = {"patch": 3, "values": 3, "inputs": "noise", "backward": False}
    return all(row["parameters"][name] == value for name, value in usual.items())


def cell(row: Row | None) -> str:
    """Time and memory of a row of the warp, or why there is none; empty without a row."""
    if row is None or row["status"] != "timed":
        return "" if row is None else unmeasured(row)
    extra = row.get("device_peak_mib", row.get("extra_mib"))
    return duration(row) + (f", {extra:.0f} MiB" if extra is not None else "")


def grouped(number: float) -> str:
    """A number without decimals, its digits in groups of three."""
    return f"{number:,.0f}".replace(",", " ")
