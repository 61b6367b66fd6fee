"""Engines out of bundles: real ones by TensorRT for RTX, which builds for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flashcocos import cli
from flashcocos.bundle import STAGES, Bundle
from flashcocos.bundle.default_model import resolve_model
from flashcocos.errors import BackendError, InputError
from flashcocos.export.tensorrt import build as build_module
from flashcocos.export.tensorrt.build import build, parse_profile
from flashcocos.runtime.gpu.memory_estimate import estimate_memory
from flashcocos.runtime.gpu.store import Profile, default_folder, find_engines, read_engine
from flashcocos.train.networks.generator import Generator

SQUARE = Profile((1, 1, 1), (64, 64, 64), (64, 64, 64))


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")


@pytest.fixture(scope="module")
def built(rtx, tmp_path_factory):
    """The shipped model for three architectures at once, in a static and a dynamic profile."""
    folder = tmp_path_factory.mktemp("engines")
    profiles = [SQUARE, parse_profile("64:64:128", "1:1:2")]
    return folder, list(build(resolve_model(), targets=[120, 86, 89], profiles=profiles, output=folder))


def test_every_stage_and_profile_becomes_an_engine(rtx, built):
    folder, engines = built
    assert [(one.record.key.stage, one.record.key.profile.static) for one in engines] == [
        (stage, static) for stage in STAGES for static in (True, False)
    ]
    for one in engines:
        record = one.record
        assert record.key.architectures == (86, 89, 120)
        assert record.key.version == rtx.__version__
        engine = read_engine(folder, record)
        assert len(engine) == record.bytes > record.weight_bytes > 0
        assert one.path.read_bytes() == engine
        assert record.activation_bytes > 0
        assert not one.kept


def test_the_runtime_finds_them_for_each_architecture(rtx, built):
    folder, _ = built
    for architecture in (86, 89, 120):
        found = find_engines(
            Bundle(resolve_model()),
            folder,
            variant="tensorrt-rtx",
            version=rtx.__version__,
            architecture=architecture,
        )
        assert len(found) == 2 * len(STAGES)


def test_what_is_built_is_kept_unless_it_was_damaged(built):
    folder, engines = built
    damaged = next(one for one in engines if one.record.key.profile.static and one.record.key.stage == "query")
    whole = damaged.path.read_bytes()
    damaged.path.write_bytes(whole[:-1])
    again = list(build(resolve_model(), targets=[86, 89, 120], profiles=[SQUARE], output=folder))
    assert {one.record.key.stage: one.kept for one in again} == {stage: stage != "query" for stage in STAGES}
    assert read_engine(folder, again[0].record)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_weights_take_what_the_precision_says(built, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "STAGES", ("fine",))
    (single,) = build(resolve_model(), targets=[89], precision="float32", profiles=[SQUARE], output=tmp_path)
    half = next(one for one in built[1] if one.record.key.stage == "fine")
    generator = Generator(Bundle(resolve_model()).manifest.config)
    elements = sum(p.numel() for part in (generator.up_2, generator.up_3, generator.last) for p in part.parameters())
    assert single.record.weight_bytes == pytest.approx(4 * elements, rel=0.1)
    assert half.record.weight_bytes == pytest.approx(2 * elements, rel=0.1)


def test_the_plan_adds_up(built):
    _, engines = built
    config = Bundle(resolve_model()).manifest.config
    records = [one.record for one in engines]
    estimate = estimate_memory(config, records, 64, 64)
    static = {one.record.key.stage: one.record for one in engines if one.record.key.profile.static}
    positions = (64 // config.warp_stride) ** 2
    padded = -(-config.warped_channels // 8) * 8
    # phi and values in float16 rows of C and of V padded to 8, and two float32 statistics
    assert estimate.parts["exemplar"] == positions * (2 * config.feature_channels + 2 * padded + 4 + 4)
    assert estimate.total == (
        sum(record.weight_bytes for record in static.values())
        + max(record.activation_bytes for record in static.values())
        + sum(estimate.parts[name] for name in ("stages", "warp", "exemplar", "encoding"))
    )
    larger = estimate_memory(config, records, 128, 128, batch=2)
    assert larger.parts["stages"] == pytest.approx(8 * estimate.parts["stages"], rel=0.01)  # but for alignment
    assert str(larger).startswith("128 x 128, batch 2: ")
    with pytest.raises(
        BackendError, match=r"no engine of query for 256 x 256, batch 1, only .*--size 256x256 --batch 1"
    ):
        estimate_memory(config, records, 256, 256)


@pytest.mark.parametrize(
    ("size", "batch", "profile"),
    [
        ("512", "1", Profile((1, 1, 1), (512, 512, 512), (512, 512, 512))),
        ("256x512", "4", Profile((4, 4, 4), (256, 256, 256), (512, 512, 512))),
        ("256:512:1024", "1:2:8", Profile((1, 2, 8), (256, 512, 1024), (256, 512, 1024))),
        ("64x96:128x96:256x96", "1", Profile((1, 1, 1), (64, 128, 256), (96, 96, 96))),
    ],
)
def test_profiles_are_read(size, batch, profile):
    assert parse_profile(size, batch) == profile


@pytest.mark.parametrize(
    ("size", "batch", "message"),
    [
        ("100", "1", "expected multiples of 32 from 64 to 8192, got 100"),
        ("32", "1", "expected multiples of 32 from 64 to 8192, got 32"),
        ("512:256:1024", "1", "size: expected one number or least:optimal:most, got '512:256:1024'"),
        ("256:512", "1", "size: expected one number or least:optimal:most"),
        ("1x2x3", "1", "expected SIDE or HEIGHTxWIDTH"),
        ("large", "1", "size: expected one number"),
        ("256", "0", "batch: expected one number"),
        ("256", "two", "batch: expected one number"),
    ],
)
def test_other_profiles_are_refused(size, batch, message):
    with pytest.raises(InputError, match=message):
        parse_profile(size, batch)


def test_an_architecture_that_the_variant_does_not_know_is_refused(rtx):
    with pytest.raises(BackendError, match=r"builds for sm_75, .*not for sm_90; use variant tensorrt on such a GPU"):
        next(build(resolve_model(), targets=[90]))


def test_other_options_that_do_not_fit_are_refused(rtx):
    with pytest.raises(InputError, match="precision 'int4' is unknown; expected one of float32, float16"):
        next(build(resolve_model(), targets=[89], precision="int4"))
    with pytest.raises(BackendError, match=r"the GPU at hand is unknown .*name a target: sm_89"):
        next(build(resolve_model()))


def test_a_build_that_fails_says_why_and_leaves_nothing(rtx, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "STAGES", ("coarse",))
    with pytest.raises(BackendError, match=r"64 x 64, batch 1 for sm_75: the build failed: .*FP32 GEMM is not"):
        list(build(resolve_model(), targets=[75], precision="float32", profiles=[SQUARE], output=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unit", [" bytes", ""])
def test_memory_is_read_from_the_log_of_every_version(rtx, unit):
    logger = build_module._logger(rtx)
    for figure, size in zip(build_module._FIGURES, (5, 7), strict=True):
        logger.log(rtx.ILogger.VERBOSE, f"{figure}: {size}{unit}")
    assert list(logger.figures.values()) == [5, 7]


def test_a_version_that_logs_no_memory_is_refused(rtx, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "_FIGURES", ("Total Activation Memory", "Total Other Memory"))
    with pytest.raises(BackendError, match="did not log its Total Other Memory"):
        list(build(resolve_model(), targets=[89], profiles=[SQUARE], output=tmp_path))


def test_flags_that_a_version_has_are_set():
    flags = SimpleNamespace(TF32=1, STRICT_NANS=2)
    config = SimpleNamespace(clear_flag=lambda flag: cleared.append(flag), set_flag=lambda flag: given.append(flag))
    cleared, given = [], []
    build_module._set_flags(SimpleNamespace(BuilderFlag=flags), config)
    assert (cleared, given) == ([1], [2])
    flags.REQUIRE_USER_ALLOCATION = 3
    build_module._set_flags(SimpleNamespace(BuilderFlag=flags), config)
    assert given == [2, 2, 3]


def test_running_out_of_memory_is_told_with_what_to_lower():
    message = build_module._failure(["Error Code 2: OutOfMemory (Requested size was 68912805254 bytes.)"])
    assert message == ("the build ran out of memory (64.2 GiB); lower the size or the batch, or use precision float16")
    assert build_module._failure([]) == "the build failed: TensorRT gave no reason"


def test_the_command_builds_engines_kernels_and_a_plan(rtx, tmp_path):
    """In a process of its own, for this one's Triton interprets and cannot compile."""
    command = [
        "build",
        str(resolve_model()),
        "--target",
        "sm_89",
        "--precision",
        "float16",
        "--size",
        "64",
        "--check",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "flashcocos.cli", *command, "-o", str(tmp_path / "engines")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "float16 against the bundle's graphs on the CPU, 128 px: " in done.stdout
    assert done.stdout.count(": built, ") == len(STAGES)
    assert "device memory: 64 x 64, batch 1: " in done.stdout
    assert len(list((tmp_path / "engines" / "kernels").glob("*_sm89.cubin"))) == 3
    assert done.stdout.splitlines()[-1] == str(tmp_path / "engines")


def test_the_command_refuses_what_cannot_be(capsys):
    assert cli.main(["build", str(resolve_model()), "--target", "ada"]) == 1
    assert "target 'ada': expected a compute capability as sm_89" in capsys.readouterr().err
    assert cli.main(["build", "nowhere.zip", "--target", "sm_89"]) == 1
    assert "no model bundle at nowhere.zip" in capsys.readouterr().err


def test_engines_lie_beside_the_bundle_by_default(rtx, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(resolve_model().read_bytes())
    first = next(build(path, targets=[89], profiles=[SQUARE]))
    assert first.path.parent == default_folder(path) == tmp_path / "model.engines"
