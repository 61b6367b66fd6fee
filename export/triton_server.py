"""`flashcocos export-triton`: a bundle becomes a model repository of Triton Inference Server.

    query/ exemplar/ coarse/ fine/   the stages, in the server's backend for ONNX or TensorRT, or in Python
    warp/                            between query and coarse; Python: numba on the CPU, compiled kernels on a GPU
    translate/                       the entry; Python: checks, keeps exemplars, and asks the models above
    translate_ensemble/              query, warp, coarse and fine in a row, for callers that keep phi and values

What the Python models do is in `runtime/triton_server.py`. Triton, the language of kernels, is another thing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .. import __version__
from ..bundle import MANIFEST, STAGES, Bundle, TensorSpec
from ..bundle.graph_check import refuse_external_data
from ..bundle.stages import axis_sizes, check_stages, concrete_shape, stage_tensors, translation_tensors
from ..config import MIN_SIDE, ModelConfig
from ..errors import InputError
from ..files import atomic_path, require_distinct, require_target
from ..preprocess.palette import legend
from ..runtime.gpu.cubins import FOLDER, available_kernels
from ..runtime.gpu.store import default_folder

PLATFORMS = ("onnxruntime", "tensorrt", "python")
MAX_BATCH = 4  # of every model
MAX_QUEUE = 32  # requests that wait for a model; more are refused with status 503
TIMEOUT_US = 30_000_000  # in the queue
MAX_SIDE = 1024  # pixels of a label or exemplar that the entry takes
MODELS = (*STAGES, "warp", "translate", "translate_ensemble")
_README, _SCRIPT = "README.md", "build_plans.sh"
_TYPES = {"uint8": "UINT8", "float32": "FP32", "int64": "INT64", "bytes": "STRING"}
_MODEL_PY = '''"""Written by flashcocos export-triton; the server's Python needs the package flashcocos."""

import triton_python_backend_utils

from flashcocos.runtime.triton_server import {model}


class TritonPythonModel({model}):
    utils = triton_python_backend_utils
'''


def export_triton(
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    platform: str = "onnxruntime",
    instances: int = 1,
    gpu: bool = False,
) -> Path:
    """Write the model repository.

    Args:
        bundle: path of a bundle.
        output: folder to write; an existing one is replaced only if it is such a repository, with nothing else in it.
        platform: what runs the stages: "onnxruntime" or "tensorrt", backends of the server, or "python", ONNX Runtime
            in a Python model on the CPU. TensorRT plans are made in the server's own image, by the script that the
            repository then holds.
        instances: of each stage and of the warp, on each device; the entry has one, which keeps the exemplars.
        gpu: whether the stages and the warp run on a GPU.

    Returns:
        The folder.

    Raises:
        InputError: An option that is unknown or does not fit the others, kernels that are missing, or an output that
            is something else.
        BundleError: The bundle is damaged.
    """
    opened = Bundle(bundle)
    check_stages(opened.manifest)
    _check_options(platform, instances, gpu)
    require_distinct(output, bundle)
    folder = Path(output)
    _require_repository(folder)
    files = _repository(opened, platform, instances, gpu)
    with atomic_path(folder, directory=True) as temporary:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if platform == "tensorrt":
            (temporary / _SCRIPT).chmod(0o755)
    return folder


def _check_options(platform: str, instances: int, gpu: bool) -> None:
    if platform not in PLATFORMS:
        raise InputError(f"unknown platform {platform!r}; expected one of {', '.join(PLATFORMS)}")
    if not 1 <= instances <= 64:
        raise InputError(f"instances: expected 1 to 64 of each model, got {instances}")
    if platform == "tensorrt" and not gpu:
        raise InputError("platform tensorrt runs on a GPU; add --gpu, or choose onnxruntime")
    if platform == "python" and gpu:
        raise InputError("platform python runs on the CPU; leave --gpu out, or choose onnxruntime")


def _require_repository(folder: Path) -> None:
    """Refuse a folder that holds anything else than what an earlier run wrote."""
    require_target(folder, directory=True)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if other := sorted(names - {*MODELS, _README, _SCRIPT}):
            raise InputError(f"{folder} holds {other[0]}, which this would delete; choose another output")
        if names and not (folder / "translate" / "config.pbtxt").is_file():
            raise InputError(f"{folder} is no repository of flashcocos export-triton; choose another output")


def _repository(bundle: Bundle, platform: str, instances: int, gpu: bool) -> dict[str, bytes]:
    """Path in the repository -> content."""
    config = bundle.manifest.config
    files: dict[str, bytes] = {}
    for stage in STAGES:
        files |= _stage(bundle, stage, platform)
        tensors = stage_tensors(config)[stage]
        files[f"{stage}/config.pbtxt"] = _config(stage, platform, *tensors, instances=instances, gpu=gpu)
    warp = _warp_tensors(config)
    files |= _python_model(bundle, "warp", "Warp", _kernels(bundle) if gpu else {})
    files["warp/config.pbtxt"] = _config("warp", "python", *warp, instances=instances, gpu=gpu)
    files |= _python_model(bundle, "translate", "Translate")
    inputs, outputs = translation_tensors(config)
    optional = [tensor.name for tensor in inputs[1:]]
    files["translate/config.pbtxt"] = _config("translate", "python", inputs, outputs, optional=optional) + (
        f'parameters {{ key: "max_side" value: {{ string_value: "{MAX_SIDE}" }} }}\n'.encode()
    )
    files["translate_ensemble/config.pbtxt"] = _ensemble(config)
    files["translate_ensemble/1/.keep"] = b""  # the server asks for the folder of a version, and version control
    if platform == "tensorrt":
        files[_SCRIPT] = _plan_script(config)
    files[_README] = _readme(bundle, platform, gpu).encode()
    return files


def _stage(bundle: Bundle, stage: str, platform: str) -> dict[str, bytes]:
    if platform == "python":
        return _python_model(bundle, stage, "Stage", {bundle.manifest.stages[stage].file: bundle.read_stage(stage)})
    if platform == "tensorrt":
        from .tensorrt.graphs import bundle_graph

        graph = bundle_graph(bundle, stage, "float16", pack=False).SerializeToString(deterministic=True)
    else:
        graph = bundle.read_stage(stage)
        refuse_external_data(graph, f"{bundle.path}: stage {stage}")
    return {f"{stage}/1/model.onnx": graph}


def _python_model(bundle: Bundle, name: str, model: str, files: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    """A version that is a bundle, with those of its files that the model reads."""
    content = {"model.py": _MODEL_PY.format(model=model).encode(), MANIFEST: bundle.manifest.to_json().encode()}
    return {f"{name}/1/{file}": data for file, data in {**content, **(files or {})}.items()}


def _kernels(bundle: Bundle) -> dict[str, bytes]:
    """The compiled kernels of the bundle and of the engines beside it, as a folder of kernels."""
    folder = default_folder(bundle.path) / FOLDER
    if not available_kernels((folder, bundle), bundle.manifest.config):
        raise InputError(
            f"{bundle.path}: no compiled kernels for the warp on a GPU; flashcocos build, or flashcocos export --aot, "
            "makes them"
        )
    own = [name for name in bundle.manifest.files if name.endswith((".cubin", ".json"))]
    files = {name: bundle.read(name) for name in own}
    files |= {path.name: path.read_bytes() for path in sorted(folder.glob("*_sm*"))}
    return {f"{FOLDER}/{name}": content for name, content in files.items()}


def _warp_tensors(config: ModelConfig) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    theta, (phi, values) = stage_tensors(config)["query"][1][0], stage_tensors(config)["exemplar"][1]
    positions = ("batch", "h", "w")
    matches = TensorSpec("index", "int64", positions), TensorSpec("probability", "float32", positions)
    return (theta, phi, values), (stage_tensors(config)["coarse"][0][0], *matches)


# config.pbtxt


def _config(
    name: str,
    backend: str,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    *,
    optional: Sequence[str] = (),
    instances: int = 1,
    gpu: bool = False,
) -> bytes:
    text = f'name: "{name}"\nbackend: "{backend}"\nmax_batch_size: {MAX_BATCH}\n'
    text += _tensors("input", inputs, optional) + _tensors("output", outputs)
    text += f"instance_group [ {{ kind: KIND_{'GPU' if gpu else 'CPU'} count: {instances} }} ]\n"
    text += (
        "dynamic_batching {\n  max_queue_delay_microseconds: 0\n  default_queue_policy {\n"
        f"    max_queue_size: {MAX_QUEUE}\n    default_timeout_microseconds: {TIMEOUT_US}\n    timeout_action: REJECT\n"
        "  }\n}\n"
    )
    return text.encode()


def _tensors(kind: str, tensors: Iterable[TensorSpec], optional: Sequence[str] = ()) -> str:
    """The tensors without their first axis, the batch; sides that vary are -1."""
    lines = []
    for tensor in tensors:
        dims = ", ".join(str(side) if isinstance(side, int) else "-1" for side in tensor.shape[1:])
        extra = " optional: true" if tensor.name in optional else ""
        lines.append(f'  {{ name: "{tensor.name}" data_type: TYPE_{_TYPES[tensor.dtype]} dims: [ {dims} ]{extra} }}')
    return f"{kind} [\n" + ",\n".join(lines) + "\n]\n"


def _ensemble(config: ModelConfig) -> bytes:
    steps = {stage: stage_tensors(config)[stage] for stage in ("query", "coarse", "fine")}
    steps = {"query": steps["query"], "warp": _warp_tensors(config), "coarse": steps["coarse"], "fine": steps["fine"]}
    label, (phi, values) = steps["query"][0][0], steps["warp"][0][1:]
    text = f'name: "translate_ensemble"\nplatform: "ensemble"\nmax_batch_size: {MAX_BATCH}\n'
    text += _tensors("input", (label, phi, values))
    text += _tensors("output", (*steps["fine"][1], *steps["warp"][1][1:]))
    blocks = []
    for model, (inputs, outputs) in steps.items():
        maps = [(kind, t.name) for kind, tensors in (("input", inputs), ("output", outputs)) for t in tensors]
        lines = [f'      {kind}_map {{ key: "{name}" value: "{name}" }}' for kind, name in maps]
        lines = [f'      model_name: "{model}"', "      model_version: -1", *lines]
        blocks.append("\n".join(["    {", *lines, "    }"]))
    return (text + "ensemble_scheduling {\n  step [\n" + ",\n".join(blocks) + "\n  ]\n}\n").encode()


# what a person reads and runs


def _plan_script(config: ModelConfig) -> bytes:
    """A script that builds the plans in NVIDIA's image of TensorRT of the server's release."""
    lines = [
        "#!/bin/sh",
        "# Run this inside the image whose TensorRT the server has; README.md beside it has the line.",
    ]
    lines += ["set -eu", 'cd "$(dirname "$0")"']
    side = config.image_size
    for stage in STAGES:
        shapes = []
        for batch, length in ((1, MIN_SIDE), (MAX_BATCH, side), (MAX_BATCH, side)):
            sizes = axis_sizes(config, batch, length, length)
            tensors = stage_tensors(config)[stage][0]
            shapes.append(",".join(f"{t.name}:{'x'.join(map(str, concrete_shape(t, sizes)))}" for t in tensors))
        least, optimal, most = shapes
        lines.append(
            f"trtexec --onnx={stage}/1/model.onnx --saveEngine={stage}/1/model.plan --stronglyTyped \\\n"
            f"  --minShapes={least} --optShapes={optimal} --maxShapes={most}"
        )
    return ("\n".join(lines) + "\n").encode()


def _readme(bundle: Bundle, platform: str, gpu: bool) -> str:
    config = bundle.manifest.config
    names = bundle.manifest.class_names or legend(config)[0]
    label = "uint8 class ids (height, width)" if config.label_kind == "classes" else "uint8 planes, value * 255"
    classes = "".join(f"- {index}: {name}\n" for index, name in enumerate(names))
    parts = [
        f"# {bundle.path.stem} for Triton Inference Server\n\n"
        f"Written by flashcocos {__version__} (`flashcocos export-triton`); its docs/triton-server.md says more.\n",
        _README_RUN.format(options="--gpus all " if gpu else "", extra="gpu" if gpu else "cpu"),
        _README_PLANS if platform == "tensorrt" else "",
        _README_MODELS.format(label=label, batch=MAX_BATCH, queue=MAX_QUEUE, side=MAX_SIDE),
        f"\n## Classes\n\n{classes}" if classes else "",
    ]
    return "".join(parts)


_README_RUN = """
## Run

The server's Python needs flashcocos as a library, and numpy below 2: with numpy 2 the Python backend of release 24.10
sent empty outputs. From a checkout of flashcocos:

```sh
docker build -t tritonserver-flashcocos -f - . <<'END'
FROM nvcr.io/nvidia/tritonserver:25.10-py3
COPY . /src/flashcocos
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN pip install '/src/flashcocos[{extra}]' 'numpy<2'
END
docker run --rm {options}--shm-size 1g -p 127.0.0.1:8000:8000 -v "$PWD/models:/models:ro" tritonserver-flashcocos \\
  tritonserver --model-repository=/models --model-control-mode=none --disable-auto-complete-config \\
  --backend-config=python,stub-timeout-seconds=120  # the warp may compile for longer than the default of 30
```

The server has no tokens of its own: keep it on the loopback address or a private network, behind a gateway.
"""
_README_PLANS = """
TensorRT plans belong to the TensorRT of the server's release and to this machine's GPU. Make them first:

```sh
docker run --rm --gpus all -v "$PWD/models:/models" nvcr.io/nvidia/tensorrt:25.10-py3 /models/build_plans.sh
```
"""
_README_MODELS = """
## Ask

Ask the model `translate`. Its inputs, each with a batch axis in front:

- `label`: {label}; the result has its size, rounded to multiples of 32, at most {side} a side
- `exemplar`: uint8 (height, width, 3), and `exemplar_label` where the model has it, of the exemplar's form
- or `exemplar_id`, a string: that of an earlier answer, in place of both. Status 404 asks to send the exemplar again.

Its outputs: `image` and `warped` uint8 (height, width, 3), `confidence` float32 (h, w), `matches` float32 (h, w, 2) as
(x, y) in pixels of the exemplar, and `exemplar_id`. Ask for those that you need.

`translate_ensemble` takes a label with the `phi` and `values` that the model `exemplar` gave, and gives float32 planes
in [-1, 1]. It checks nothing.

Every model joins up to {batch} requests of equal shapes. {queue} may wait for each; more get status 503 at once.
"""
