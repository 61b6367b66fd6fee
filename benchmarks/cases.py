"""The cases of every group. Limits keep a run's time predictable; the comments say what they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..config import ModelConfig
from .registry import CHANNELS, Case, Gate

# bounds in dB: float32 reaches more than 70; bfloat16; any bundle of the same model
EXACT, ROUNDED, SIMILAR = 40.0, 30.0, 20.0
TRANSLATION = ".speed.translation:prepare"
TILE = 288  # pixels; two a side at 512 px, four at 1024


def ablation_cases(extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """256 px, step by step; about 15 s a case, and a minute for the compiler."""
    size = 256
    yield _eager("ablation/eager-256", "eager", size, config, repeats=3)
    yield _eager("ablation/eager-tiled-256", "eager-tiled", size, config, repeats=2)
    yield _eager("ablation/compiled-256", "compiled", size, config, repeats=2)
    for method in ("eager", "compiled"):
        yield _eager(f"ablation/{method}-bfloat16-256", method, size, config, dtype="bfloat16", repeats=2)
    yield _naive("ablation/naive-256", "naive", size, config, repeats=3)
    yield _naive("ablation/naive-openvino-256", "naive-openvino", size, config, repeats=3)
    name = "ablation/naive-openvino-bfloat16-256"
    yield _naive(name, "naive-openvino", size, config, precision="bfloat16", repeats=3)
    yield _runtime("ablation/runtime-256", size, cached=False)
    yield _runtime("ablation/runtime-cached-256", size)
    yield _runtime("ablation/runtime-label-256", size, label_cached=True)
    yield _runtime("ablation/openvino-256", size, backend="openvino")
    yield _runtime("ablation/openvino-bfloat16-256", size, backend="openvino", precision="bfloat16")
    for bundle in extra_bundles:
        yield _runtime(f"ablation/{bundle}-256", size, bundle=bundle)
        yield _runtime(f"ablation/{bundle}-openvino-256", size, bundle=bundle, backend="openvino")


def resolution_cases(extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """512 to 1024 px: half a minute to four a run on two cores, so one run each.

    All are compared with flashcocos's own networks in PyTorch, the only ones that need no matrix.
    """
    for size in (512, 768, 1024):
        options: dict[str, Any] = {"reference": f"resolution/eager-tiled-{size}", "repeats": 1, "warmup": False}
        for method in ("eager-tiled", "eager"):
            yield _eager(f"resolution/{method}-{size}", method, size, config, **options)
        yield _naive(f"resolution/naive-{size}", "naive", size, config, **options)
        if size == 512:
            yield _runtime("resolution/runtime-512", size, cached=False, **options)
        yield _runtime(f"resolution/runtime-cached-{size}", size, **options)
        yield _runtime(f"resolution/runtime-tiled-{size}", size, tile=TILE, **options)
        for bundle in extra_bundles if size == 512 else ():
            yield _runtime(f"resolution/{bundle}-{size}", size, bundle=bundle, **options)


def throughput_cases() -> Iterator[Case]:
    """Batches of 1, 4 and 16 at 256 px: 20 and 75 s a run on two cores for the latter two."""
    yield _runtime("throughput/runtime-batch1", 256)
    for batch in (4, 16):
        yield _runtime(f"throughput/runtime-batch{batch}", 256, batch=batch, repeats=1, warmup=False)


def _eager(name: str, method: str, size: int, config: ModelConfig, *, dtype: str = "float32", **options: Any) -> Case:
    matrix = 0 if method == "eager-tiled" else _largest_matrix(size, config)
    return _translation(
        name,
        f"{method} PyTorch, {size} px, {dtype}{' autocast' if dtype == 'bfloat16' else ''}",
        {"method": method, "size": size, "dtype": dtype},
        bound=EXACT if dtype == "float32" else SIMILAR,
        memory=2 * matrix * (4 if dtype == "float32" else 2),  # logits and weights
        requires=("torch", "model", *(["c++"] if method == "compiled" else []), *_needs(dtype)),
        **options,
    )


def _naive(
    name: str, method: str, size: int, config: ModelConfig, *, precision: str = "float32", **options: Any
) -> Case:
    engine = "openvino" if method == "naive-openvino" else "onnxruntime"
    return _translation(
        name,
        f"the published form as one ONNX graph in {engine} in {precision}, {size} px",
        {"method": method, "size": size, "precision": precision},
        bound=EXACT if precision == "float32" else SIMILAR,
        memory=4 * _largest_matrix(size, config),
        requires=(engine, "naive", *_needs(precision)),
        **options,
    )


def _runtime(
    name: str,
    size: int,
    *,
    reference: str = "ablation/eager-256",
    repeats: int = 5,
    warmup: bool = True,
    **changes: Any,
) -> Case:
    parameters = runtime_parameters(size, **changes)
    backend, precision, bundle, tile = (parameters[key] for key in ("backend", "precision", "bundle", "tile"))
    exemplar = "its exemplar encoded before" if parameters["cached"] else "with its exemplar"
    exemplar += ", its label too" if parameters["label_cached"] else ""
    tiles = "" if tile is None else f", in tiles of {tile}"
    what = f"bundle {bundle}, {size} px, batch {parameters['batch']}, {exemplar}{tiles}"
    return _translation(
        name,
        f"the runtime on {backend} in {precision}, {what}",
        parameters,
        reference=reference,
        bound=SIMILAR if bundle != "model" else EXACT if precision == "float32" else ROUNDED,
        seconds=25.0,
        repeats=repeats,
        warmup=warmup,
        requires=(backend, "bundle", *_needs(precision)),
    )


def _translation(
    name: str,
    measures: str,
    parameters: Mapping[str, Any],
    *,
    bound: float,
    reference: str = "ablation/eager-256",
    seconds: float = 40.0,
    **options: Any,
) -> Case:
    """A case whose picture is compared with that of the case `reference`, if it is not that one."""
    compared: dict[str, Any] = {"gate": Gate("psnr_db", bound), "reference": reference} if name != reference else {}
    return Case(name, TRANSLATION, measures, parameters, seconds=seconds, **compared, **options)


def _needs(precision: str) -> list[str]:
    return ["bfloat16"] if precision == "bfloat16" else []


def _largest_matrix(size: int, config: ModelConfig) -> int:
    """Elements of the larger of the two matrices of the published form: the warp's and the self-attention's."""
    return max((size // config.warp_stride) ** 4, (size // 2) ** 2 * (size // 4) ** 2 * config.attention)


def runtime_parameters(size: int, **changes: Any) -> dict[str, Any]:
    """Parameters of the runtime at `size` pixels: everything that `speed/translation.py` reads, with `changes`."""
    parameters = {"method": "runtime", "size": size, "bundle": "model", "backend": "onnxruntime"}
    parameters |= {"precision": "float32", "cached": True, "label_cached": False, "batch": 1, "tile": None}
    return {**parameters, **changes}


def warp_cases() -> Iterator[Case]:
    """N = 32^2 to 256^2 positions; then inputs that match, the backward pass, 48 and 151 values, patch 1."""
    for size in (32, 64, 128):
        for method in ("numba", "numpy", "sdpa", "reference"):
            yield warp_case(method, size)
    for method in ("numba", "sdpa", "reference"):
        yield warp_case(method, 256)
    for method in ("numba", "numpy"):
        for size in (64, 128):
            yield warp_case(method, size, inputs="shifted")
    for method in ("numba", "sdpa", "reference"):
        yield warp_case(method, 64, backward=True)
    for values in (48, 151):
        for method in ("numba", "reference"):
            yield warp_case(method, 64, values=values)
    for method in ("numba", "reference"):
        yield warp_case(method, 64, patch=1)


def warp_case(
    method: str,
    size: int,
    *,
    device: str = "cpu",
    patch: int = 3,
    values: int = 3,
    inputs: str = "noise",
    backward: bool = False,
) -> Case:
    """The warp by `method`, a name of `speed/warp.py`, on maps of `size` x `size`."""
    parameters: dict[str, Any] = {"method": method, "size": size, "patch": patch, "values": values}
    parameters |= {"channels": CHANNELS, "inputs": inputs, "backward": backward}
    parameters |= {
        "dtype": "float16" if device == "cuda" else "float32",
        "product": method in ("numba", "numpy") and patch == 3 and not backward,
    }
    extras = [f"v{values}"] * (values != 3) + [inputs] * (inputs != "noise") + ["backward"] * backward
    positions, width = size * size, 2 if device == "cuda" else 4
    matrices = (3 if backward else 2) if method in ("reference", "sdpa", "compiled") else 0
    needs = {"numba": ("numba",), "numpy": (), "compiled": ("torch", "c++")}.get(method, ("torch",))
    needs += ("triton", "cuda") if method.startswith("triton") else ("torch",) if backward and method == "numba" else ()
    return Case(
        "-".join([f"warp/{method}-p{patch}-n{positions}", *extras]),
        ".speed.warp:prepare",
        f"the warp by {method}: {size} x {size} maps, patch {patch}, {values} values{', with gradients' * backward}",
        parameters,
        Gate("max_error", 2e-2 if device == "cuda" else 1e-3 if backward else 1e-4, at_least=False),
        repeats=100 if device == "cuda" else 5 if size < 256 else 1,
        seconds=4.0,
        limit=300.0,
        warmup=device == "cuda" or size < 256,
        memory=matrices * positions**2 * width,
        requires=needs,
    )


def stride_cases() -> Iterator[Case]:
    """The small network at 128 and 256 px and a published one at 256, with a correspondence ever finer."""
    for preset, size in (("avatars-128", 128), ("avatars-128", 256), ("ade20k", 256)):
        for stride in (4, 2, 1):
            yield Case(
                f"strides/{preset.partition('-')[0]}-{size}-{stride}",
                ".speed.strides:prepare",
                f"{preset}'s network, {size} px, a position for {stride} x {stride} pixels",
                {"preset": preset, "size": size, "stride": stride},
                Gate("largest", 1.0, at_least=False),
                seconds=30.0,
                requires=("torch", "numba"),
            )


def training_cases(device: str, config: ModelConfig) -> Iterator[Case]:
    """The published objective of ade20k with one sample a step; on two cores 40 s at 256 px and four minutes at 512.

    With whole matrices 512 px take 30 GiB, so there is no such case.
    """
    for size, method in ((256, "tiled"), (256, "matrix"), (512, "tiled")):
        matrices = 3 * _largest_matrix(size, config) if method == "matrix" else 0
        text = "whole matrices, as published" if method == "matrix" else "no matrix formed"
        yield Case(
            f"training/{method}-{size}",
            ".speed.training:prepare",
            f"one step of ade20k's training, {size} px, batch 1, {text}",
            {"method": method, "preset": "ade20k", "size": size, "batch": 1, "changes": []},
            Gate("largest_term", 1e6, at_least=False),
            repeats=1 if device == "cpu" else 10,
            warmup=device != "cpu",
            seconds=20.0,
            memory=4 * matrices,  # logits, weights and the gradient of either
            requires=("torch",),
        )


def estimate_cases() -> Iterator[Case]:
    """A minute each, whatever the size: nothing runs."""
    for size in (256, 512):
        for checkpointing in (False, True):
            yield Case(
                f"estimate/ade20k-{size}{'-checkpointing' * checkpointing}",
                ".speed.training:estimate",
                f"{size} px, {'blocks recomputed in the backward pass' if checkpointing else 'everything kept'}",
                {"preset": "ade20k", "size": size, "checkpointing": checkpointing}
                | {"budgets_gib": [8, 12, 24], "changes": []},
                requires=("torch",),
            )


def serving_cases() -> Iterator[Case]:
    """The shipped model behind HTTP: a minute or two each, the soak of 10 000 requests five."""
    common = {"size": 128, "pairs": 6}
    batches = [(1, 4), (4, 8)]  # with their clients: as many again must wait as run, for batches to be full
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "overhead": ("one request after the other", common | {"count": 200}),
        **{
            f"throughput-batch{batch}": (
                f"{clients} clients, --batch {batch}, by turns with the bare Translator",
                common | {"kind": "throughput", "batch": batch, "clients": clients, "rounds": 8, "seconds": 4.0},
            )
            for batch, clients in batches
        },
        "overload": ("10 times as many requests as it can do, for 60 s", common | {"times": 10, "seconds": 60.0}),
        "arrivals": (
            "7 tenths of what it can do, at random times for 120 s, and the same simulated",
            common | {"load_share": 0.7, "seconds": 120.0},
        ),
        "soak": (
            "10 000 requests at 64 px from 16 clients, 4 in 10 hang up",
            {"size": 64, "pairs": 6, "count": 10000, "clients": 8, "aborts": 0.4},
        ),
        "drain": ("SIGTERM with 16 requests in work, 5 times", common | {"clients": 16, "times": 5}),
        "ready": ("start of the process until /readyz, 5 times", {"times": 5}),
    }
    for name, (text, parameters) in kinds.items():
        yield Case(
            f"serving/{name}",
            ".speed.serving:prepare",
            text,
            {"kind": name, **parameters},
            limit=1800.0,
            requires=("onnxruntime", "fastapi", "psutil", *(["simpy"] if name == "arrivals" else [])),
        )


def startup_cases() -> Iterator[Case]:
    """From the start of a process, files in the system's cache, and what an installation takes on the disk."""
    shared: dict[str, Any] = {"repeats": 3, "seconds": 30.0}
    light = Gate("mean", 1.0)  # of a picture that is not black
    for bundle, size in (("default", 128), ("model", 256)):
        yield Case(
            f"startup/runtime-{bundle}-{size}",
            ".speed.machine:startup",
            f"process start to the first picture of the runtime, bundle {bundle}, {size} px",
            runtime_parameters(size, bundle=bundle, cached=False),
            light,
            requires=("onnxruntime", "bundle"),
            **shared,
        )
    yield Case(
        "startup/eager-256",
        ".speed.machine:startup",
        "process start to the first picture of eager PyTorch, 256 px",
        {"method": "eager", "size": 256, "dtype": "float32"},
        light,
        requires=("torch", "model"),
        **shared,
    )
    for extra, needs in (("cpu", ("numba",)), ("train", ("torch", "tensorboard"))):
        yield Case(
            f"startup/install-{extra}",
            ".speed.machine:install_size",
            f"what pip installs for flashcocos[{extra}]",
            {"extra": extra},
            requires=("packaging", *needs),
        )


def machine_case(side: int = 2048) -> Case:
    """Seconds; `side` of the products."""
    return Case("machine/rates", ".speed.machine:roofline", "copy bandwidth and matrix rate", {"side": side})


def all_cases(extra_bundles: Sequence[str] = (), config: ModelConfig | None = None) -> list[Case]:
    """Every case of every group.

    extra_bundles: names of further bundles of the same model, each a step of the ablation. config: of the model, whose
    matrices the memory of a case depends on; the published ade20k network's by default.
    """
    config = config or ModelConfig.preset("ade20k")
    return [
        machine_case(),
        *ablation_cases(extra_bundles, config),
        *resolution_cases(extra_bundles, config),
        *warp_cases(),
        *stride_cases(),
        *training_cases("cpu", config),
        *estimate_cases(),
        *throughput_cases(),
        *serving_cases(),
        *startup_cases(),
    ]
