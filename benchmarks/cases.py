"""The cases of every group. Limits keep a run's time predictable; the comments say what they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..config import ModelConfig
from .registry import CHANNELS, Case, Gate

# bounds in dB: float32 reaches more than 70; bfloat16; any bundle of the same model
EXACT, ROUNDED, SIMILAR = 40.0, 30.0, 20.0
_BOUNDS = {"float32": EXACT, "float16": ROUNDED, "bfloat16": SIMILAR}  # of what is not ours
TRANSLATION = ".speed.translation:prepare"
TILE = 288  # pixels; two a side at 512 px, four at 1024


def ablation_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """256 px, step by step; about 15 s a case, and a minute for the compiler."""
    size = 256
    yield _eager("ablation/eager-256", "eager", size, config, device, repeats=3)
    yield _eager("ablation/eager-tiled-256", "eager-tiled", size, config, device, repeats=2)
    yield _eager("ablation/compiled-256", "compiled", size, config, device, repeats=2)
    if device == "cuda":
        for method in ("eager", "eager-tiled", "compiled"):
            yield _eager(f"ablation/{method}-float16-256", method, size, config, device, dtype="float16")
    else:
        for method in ("eager", "compiled"):
            yield _eager(f"ablation/{method}-bfloat16-256", method, size, config, device, dtype="bfloat16", repeats=2)
    yield _naive("ablation/naive-256", "naive", size, config, repeats=3)
    if device == "cpu":
        yield _naive("ablation/naive-openvino-256", "naive-openvino", size, config, repeats=3)
        yield _naive(
            "ablation/naive-openvino-bfloat16-256", "naive-openvino", size, config, precision="bfloat16", repeats=3
        )
    yield _runtime("ablation/runtime-256", size, cached=False, published=True)
    yield _runtime("ablation/runtime-cached-256", size, published=True)
    yield _runtime("ablation/runtime-label-256", size, label_cached=True, published=True)
    if device == "cpu":
        yield _runtime("ablation/openvino-256", size, backend="openvino", published=True)
        yield _runtime("ablation/openvino-bfloat16-256", size, backend="openvino", precision="bfloat16", published=True)
    for bundle in extra_bundles:
        yield _runtime(f"ablation/{bundle}-256", size, bundle=bundle, published=True)
        if device == "cpu":
            yield _runtime(f"ablation/{bundle}-openvino-256", size, bundle=bundle, backend="openvino")


def resolution_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """512 to 1024 px: half a minute to four a run on two cores, so one run each.

    All are compared with flashcocos's own networks in PyTorch, the only ones that need no matrix.
    """
    for size in (512, 768, 1024):
        reference = f"resolution/eager-tiled-{size}"
        options: dict[str, Any] = {"reference": reference, "repeats": 1, "warmup": False}
        for method in ("eager-tiled", "eager"):
            yield _eager(f"resolution/{method}-{size}", method, size, config, device, **options)
        yield _naive(f"resolution/naive-{size}", "naive", size, config, **options)
        yield _runtime(f"resolution/runtime-{size}", size, cached=False, published=size == 512, **options)
        yield _runtime(f"resolution/runtime-cached-{size}", size, published=True, **options)
        yield _runtime(f"resolution/runtime-tiled-{size}", size, tile=TILE, published=True, **options)
        for bundle in extra_bundles:
            yield _runtime(f"resolution/{bundle}-{size}", size, bundle=bundle, published=size == 512, **options)


def throughput_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """Batches of 1, 4 and 16 at 256 px: 20 and 75 s a run on two cores for the latter two."""
    for batch in (1, 4, 16):
        name = f"throughput/runtime-batch{batch}"
        once: dict[str, Any] = {"repeats": 1, "warmup": False} if batch > 1 and device == "cpu" else {}
        yield _runtime(name, 256, batch=batch, published=True, **once)
        if device == "cuda":
            yield _eager(f"throughput/eager-tiled-batch{batch}", "eager-tiled", 256, config, device, batch=batch)


def _eager(
    name: str,
    method: str,
    size: int,
    config: ModelConfig,
    device: str,
    *,
    dtype: str = "float32",
    batch: int = 1,
    reference: str = "ablation/eager-256",
    published: bool = True,
    **options: Any,
) -> Case:
    width = 4 if dtype == "float32" else 2
    matrix = 0 if method == "eager-tiled" else _largest_matrix(size, config)
    is_reference = reference == name
    return Case(
        name,
        TRANSLATION,
        f"{method} PyTorch, {size} px, batch {batch}, {dtype}{' autocast' if dtype == 'bfloat16' else ''}",
        {"method": method, "size": size, "dtype": dtype, "batch": batch},
        None if is_reference else Gate("psnr_db", _BOUNDS[dtype]),
        "" if is_reference else reference,
        seconds=40.0,
        memory=2 * matrix * width * batch,  # logits and weights
        requires=("torch", "model", *(["c++"] if method == "compiled" else []), *_needs(dtype)),
        published=published,
        **options,
    )


def _naive(
    name: str,
    method: str,
    size: int,
    config: ModelConfig,
    *,
    precision: str = "float32",
    reference: str = "ablation/eager-256",
    published: bool = True,
    **options: Any,
) -> Case:
    engine = "openvino" if method == "naive-openvino" else "onnxruntime"
    return Case(
        name,
        TRANSLATION,
        f"the published form as one ONNX graph in {engine} in {precision}, {size} px",
        {"method": method, "size": size, "precision": precision},
        Gate("psnr_db", _BOUNDS[precision]),
        reference,
        seconds=40.0,
        memory=4 * _largest_matrix(size, config),
        requires=(engine, "naive", *_needs(precision)),
        published=published,
        **options,
    )


def _needs(precision: str) -> list[str]:
    return ["bfloat16"] if precision == "bfloat16" else []


def _largest_matrix(size: int, config: ModelConfig) -> int:
    """Elements of the larger of the two matrices of the published form: the warp's and the self-attention's."""
    return max((size // config.warp_stride) ** 4, (size // 2) ** 2 * (size // 4) ** 2 * config.attention)


def _runtime(
    name: str,
    size: int,
    *,
    bundle: str = "model",
    backend: str = "onnxruntime",
    precision: str = "float32",
    cached: bool = True,
    label_cached: bool = False,
    batch: int = 1,
    tile: int | None = None,
    reference: str = "ablation/eager-256",
    **options: Any,
) -> Case:
    bound = SIMILAR if bundle != "model" else EXACT if precision == "float32" else ROUNDED
    exemplar = "its exemplar encoded before" if cached else "with its exemplar"
    exemplar += ", its label too" if label_cached else ""
    tiles = "" if tile is None else f", in tiles of {tile}"
    return Case(
        name,
        TRANSLATION,
        f"the runtime on {backend} in {precision}, bundle {bundle}, {size} px, batch {batch}, {exemplar}{tiles}",
        runtime_parameters(
            size,
            bundle=bundle,
            backend=backend,
            precision=precision,
            cached=cached,
            label_cached=label_cached,
            batch=batch,
            tile=tile,
        ),
        Gate("psnr_db", bound),
        reference,
        seconds=25.0,
        requires=(backend, "bundle", *_needs(precision)),
        **options,
    )


def runtime_parameters(size: int, **changes: Any) -> dict[str, Any]:
    """Parameters of the runtime at `size` pixels: everything that `speed/translation.py` reads, with `changes`."""
    parameters = {"method": "runtime", "size": size, "bundle": "model", "backend": "onnxruntime"}
    parameters |= {"precision": "float32", "cached": True, "label_cached": False, "batch": 1, "tile": None}
    return {**parameters, **changes}


def warp_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """N = 32^2 to 256^2 positions, all methods; patch 1 and 3; 3, 48 and 151 values; with the backward pass."""
    arrays, trained = ("numba", "numpy"), ["cpu", "sdpa", "reference"]
    if device == "cuda":
        # the forward pass has two kernels, of which plain "triton" takes one by a rule
        arrays, trained = ("triton-nine-tap", "triton-straightforward"), ["triton", "sdpa", "reference", "compiled"]
    plain = [*arrays, *trained]
    for size in (32, 64, 128, 256):
        for method in plain:
            published = size < 256 or method not in ("numpy", "cpu", "compiled")
            yield warp_case(method, size, device=device, published=published)
    for method in ("numba", "numpy") if device == "cpu" else ():
        for size in (64, 128):
            yield warp_case(method, size, device=device, inputs="shifted", published=True)
    for method in trained if device == "cuda" else ["numba", *trained]:
        for size in (32, 64, 128):
            yield warp_case(method, size, device=device, backward=True, published=size == 64)
    for values in (48, 151):
        for method in plain:
            yield warp_case(
                method, 64, device=device, values=values, published=method in ("numba", "triton", "reference")
            )
    for method in plain:
        if method == "triton-nine-tap":
            continue  # for patch 3 alone
        yield warp_case(method, 64, device=device, patch=1, published=method in ("numba", "triton", "reference"))


def warp_case(
    method: str,
    size: int,
    *,
    device: str,
    patch: int = 3,
    values: int = 3,
    inputs: str = "noise",
    backward: bool = False,
    published: bool = False,
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
        published=published,
    )


def stride_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """The small network at 128 and 256 px and a published one at 256, with a correspondence ever finer."""
    for preset, size in (("avatars-128", 128), ("avatars-128", 256), ("ade20k", 256)) if device == "cpu" else ():
        for stride in (4, 2, 1):
            yield Case(
                f"strides/{preset.partition('-')[0]}-{size}-{stride}",
                ".speed.strides:prepare",
                f"{preset}'s network, {size} px, a position for {stride} x {stride} pixels",
                {"preset": preset, "size": size, "stride": stride},
                Gate("largest", 1.0, at_least=False),
                seconds=30.0,
                requires=("torch", "numba"),
                published=True,
            )


def training_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """The published objective of ade20k with one sample a step; on two cores 40 s at 256 px and four minutes at 512.

    With whole matrices 512 px take 30 GiB, so that case is not published.
    """
    for size in (256, 512):
        for method, matrices, text in (
            ("tiled", 0, "no matrix formed"),
            ("matrix", 3 * _largest_matrix(size, config), "whole matrices, as published"),
        ):
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
                published=size == 256 or method == "tiled",
            )


def estimate_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
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
                published=True,
            )


def serving_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
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
            published=True,
        )


def startup_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """From the start of a process, files in the system's cache, and what an installation takes on the disk."""
    shared: dict[str, Any] = {"repeats": 3, "seconds": 30.0, "published": True}
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
        {"method": "eager", "size": 256, "dtype": "float32", "batch": 1},
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
            published=True,
        )


def machine_cases(device: str, extra_bundles: Sequence[str], config: ModelConfig) -> Iterator[Case]:
    """Seconds."""
    yield Case(
        "machine/rates",
        ".speed.machine:roofline",
        "copy bandwidth and matrix rate",
        {"side": 2048 if device == "cpu" else 8192},
        published=True,
    )


CASE_FACTORIES = (
    machine_cases,
    ablation_cases,
    resolution_cases,
    warp_cases,
    stride_cases,
    training_cases,
    estimate_cases,
    throughput_cases,
    serving_cases,
    startup_cases,
)


def all_cases(device: str = "cpu", extra_bundles: Sequence[str] = (), config: ModelConfig | None = None) -> list[Case]:
    """Every case of every group for `device`, "cpu" or "cuda".

    extra_bundles: names of further bundles of the same model, each a step of the ablation. config: of the model, whose
    matrices the memory of a case depends on; the published ade20k network's by default.
    """
    config = config or ModelConfig.preset("ade20k")
    return [case for make in CASE_FACTORIES for case in make(device, extra_bundles, config)]
