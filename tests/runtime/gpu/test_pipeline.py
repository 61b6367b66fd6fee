"""The GPU pipeline on a fake device: what stays on it, what it costs, what it refuses, and what it leaves behind."""

from __future__ import annotations

import gc
import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import MIB, STREAM
from fake_gpu import FakeGpu, fake_gpu
from fake_tensorrt import SCRATCH, WEIGHTS, profile, write_engines
from kernel_twins import write_kernels
from PIL import Image
from tiny_bundle import CHANNELS, CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos.cli import main
from flashcocos.errors import BackendError, BundleError, InputError
from flashcocos.preprocess import save_label
from flashcocos.runtime import Exemplar, Translator
from flashcocos.runtime.gpu import pipeline, workspace
from flashcocos.runtime.gpu.warp import DeviceWarp

LABEL = random_label(CLASSES, 64, 64)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "m")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> FakeGpu:
    return fake_gpu(monkeypatch, bundle)


def exemplar_of(translator: Translator, size: tuple[int, int] = (64, 64), seed: int = 0) -> Exemplar:
    return translator.encode_exemplar(random_picture(*size, seed), random_label(CLASSES, *size, seed), size)


def nothing_left(gpu: FakeGpu) -> bool:
    gc.collect()
    return gpu.device.live == (0, 0, 0) and gpu.device.used == 0 and gpu.trt.engines == 0 and gpu.device.closed


def test_only_labels_and_results_cross_the_bus(gpu: FakeGpu) -> None:
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        translator.translate(LABEL, exemplar)
        up, down, allocations = gpu.device.uploaded, gpu.device.downloaded, gpu.device.allocations
        translator.translate(random_label(CLASSES, 64, 64, 1), exemplar)
        assert gpu.device.uploaded - up == LABEL.nbytes
        # two pictures, index and probability of 16 x 16 positions, and whether it is finite
        assert gpu.device.downloaded - down == 2 * 64 * 64 * 3 + 16 * 16 * 12 + 4
        for seed in range(3):
            translator.translate(random_label(CLASSES, 64, 64, seed), exemplar)
        assert gpu.device.allocations == allocations
    assert nothing_left(gpu)


def test_every_shape_is_captured_after_a_run(gpu: FakeGpu) -> None:
    with gpu.translator() as translator:
        exemplars = [exemplar_of(translator, seed=seed) for seed in range(2)]
        runs = [translator.translate(LABEL, exemplar) for exemplar in exemplars * 3]
        assert [set(run.timings) for run in runs[:2]] == [{"query", "warp", "synthesis"}, {"total"}]
        assert gpu.device.replays == 1 + 5  # of the second exemplar, and of these
        launches, copies = gpu.device.launches, gpu.device.copies
        translator.translate(LABEL, exemplars[0])
        assert gpu.device.copies == copies + 4  # the exemplar's
        assert gpu.device.launches == launches  # no Python beyond the replay
        for one, other in zip(runs[:2], runs[4:], strict=True):  # the graph is not bound to an exemplar
            np.testing.assert_array_equal(one.image, other.image)
        assert not np.array_equal(runs[0].image, runs[1].image)
        for _ in range(3):
            translator.translate(LABEL, exemplars[0], (64, 96))
        assert gpu.device.replays == 6 + 1 + 2  # of dynamic engines, too


def test_a_graph_is_captured_again_where_working_memory_moved(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, profiles=[profile()], engines={"scratch": SCRATCH + 1})
    write_engines(gpu.folder, gpu.bundle, [profile(64, 96)], scratch=SCRATCH + 300)
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        before = [translator.translate(LABEL, exemplar) for _ in range(3)][-1]
        assert gpu.device.replays == 2
        translator.translate(LABEL, exemplar, (64, 96))
        after = [translator.translate(LABEL, exemplar) for _ in range(3)]
        assert "query" in after[0].timings
        assert gpu.device.replays == 4
        np.testing.assert_array_equal(before.image, after[-1].image)
        assert sum(one.bytes == SCRATCH + 300 for one in gpu.device.buffers) == 1
        assert not any(one.bytes == SCRATCH + 1 for one in gpu.device.buffers)
    assert nothing_left(gpu)


def test_what_cannot_be_captured_runs_and_says_so_once(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.trt.syncs = True
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        with caplog.at_level(logging.WARNING, "flashcocos"):
            results = [translator.translate(LABEL, exemplar) for _ in range(4)]
        assert gpu.device.replays == 0
        (record,) = caplog.records
        assert re.match(r"no CUDA graph, launches .*engine query-\w+ failed to run: waits while work", record.message)
        np.testing.assert_array_equal(results[0].image, results[3].image)
    assert nothing_left(gpu)


def test_a_variant_that_says_it_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = fake_gpu(monkeypatch, bundle, "tensorrt-rtx")
    gpu.trt.can_capture = False
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        assert all("query" in translator.translate(LABEL, exemplar).timings for _ in range(3))
        assert gpu.device.replays == 0
        told = "no CUDA graph, launches one by one: an engine cannot be captured yet"
        assert [record.message for record in caplog.records] == [told]
        gpu.trt.can_capture = True  # once all kernels are compiled
        assert "total" in translator.translate(LABEL, exemplar).timings
    assert nothing_left(gpu)


def test_exemplars_stay_up_to_the_budget(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """Three of these fit into a MiB."""
    gpu = fake_gpu(monkeypatch, bundle, profiles=[profile((64, 256, 512), (64, 256, 512), 1)])
    assert 3 * 3072 * 4 * (16 + 8 + 1 + 1) <= MIB < 4 * 3072 * 4 * (16 + 8 + 1 + 1)
    with gpu.translator(exemplar_cache_mib=1) as translator:
        exemplars = [exemplar_of(translator, (256, 192), seed) for seed in range(4)]

        def uploads(exemplar: Exemplar) -> bool:
            before = gpu.device.uploaded
            translator.translate(LABEL, exemplar)
            return gpu.device.uploaded - before > LABEL.nbytes

        assert [uploads(one) for one in exemplars] == [True] * 4
        assert [uploads(one) for one in exemplars[1:]] == [False] * 3
        assert uploads(exemplars[0])  # evicted, and brought back from its host copy
        assert uploads(exemplars[1])  # the least recently used
        assert not uploads(exemplars[3])
        buffers = len(gpu.device.buffers)
        del exemplars[3]
        gc.collect()
        assert not uploads(exemplars[0])
        assert len(gpu.device.buffers) == buffers - 4  # what nobody holds makes room at the next call
        wide = exemplar_of(translator, (256, 256))
        del exemplars
        assert uploads(wide)
        with pytest.raises(InputError, match=r"512 x 512 pixels takes 2 MiB .*, more than exemplar_cache_mib, 1 MiB"):
            translator.translate(LABEL, exemplar_of(translator, (512, 512)))
        assert not uploads(wide)
    assert nothing_left(gpu)


def test_batches_run_as_the_engines_were_built(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, profiles=[profile(batch=2), profile(64, 96, (3, 3, 4))])
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)  # by an engine for two, filled up
        assert gpu.trt.runs == ["exemplar"]
        translator.translate([LABEL] * 5, exemplar, batch_size=5)
        assert gpu.trt.runs[1:] == ["query", "coarse", "fine"] * 3
        gpu.trt.runs.clear()
        translator.translate([LABEL] * 5, exemplar, (64, 96), batch_size=8)
        assert gpu.trt.runs == ["query", "coarse", "fine"] * 2  # four, and one filled up to three
    assert nothing_left(gpu)


def test_a_request_above_the_profiles(gpu: FakeGpu) -> None:
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        launches = gpu.device.launches
        for call in (
            lambda: translator.translate(LABEL, exemplar, (96, 160)),
            lambda: exemplar_of(translator, (96, 160)),
        ):
            with pytest.raises(InputError) as caught:
                call()
            assert "96 x 160 pixels (height x width), batch 1: the engines of stage" in str(caught.value)
            assert "run 64:64:128 x 64:64:128, batch 1:2:4; 64 x 64, batch 1 (the largest first)" in str(caught.value)
            assert f"flashcocos build {gpu.bundle.path} --size 96x160 makes others" in str(caught.value)
        assert gpu.device.launches == launches
        translator.translate(LABEL, exemplar)
    assert nothing_left(gpu)


def test_stages_of_different_batches(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """That no batch suits all of them is the fault of those that lack the batch asked for."""
    gpu = fake_gpu(monkeypatch, bundle, profiles=[])
    write_engines(gpu.folder, gpu.bundle, [profile()], stages=("query", "exemplar", "coarse"))
    write_engines(gpu.folder, gpu.bundle, [profile(batch=2)], stages=("fine",))
    message = r"batch 1: the engines of stage fine run 64 x 64, batch 2 \(the largest"
    with gpu.translator() as translator, pytest.raises(InputError, match=message):
        translator.translate(LABEL, exemplar_of(translator))
    assert nothing_left(gpu)


def test_a_request_above_the_memory(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, profiles=[profile((64, 64, 512), (64, 64, 512), (1, 1, 8))], total=14 * MIB)
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        runs = list(gpu.trt.runs)
        with pytest.raises(BackendError) as caught:
            translator.translate(LABEL, exemplar, 512)
        assert gpu.trt.runs == runs
        message = str(caught.value)
        assert message.startswith("batch 1 of 512 x 512 pixels does not fit on Fake RTX: no ")
        assert " MiB of 14 MiB are free; lower size, batch_size or exemplar_cache_mib, or tile= makes" in message
        assert translator.translate(LABEL, exemplar, 256).image.shape == (256, 256, 3)
        with pytest.raises(BackendError, match=r"batch 8 of 256 x 256 pixels does not fit"):
            translator.translate([LABEL] * 8, exemplar, 256, batch_size=8)
        translator.translate(LABEL, exemplar)
    assert nothing_left(gpu)


def test_tiles(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """With an engine of the fine stage for tiles alone: captured, and its memory counted for a tile."""
    gpu = fake_gpu(monkeypatch, bundle, profiles=[], total=16 * MIB)
    whole = profile(128, 192)
    write_engines(gpu.folder, gpu.bundle, [whole, profile()], stages=("query", "exemplar", "coarse"))
    write_engines(gpu.folder, gpu.bundle, [whole.tiled(96)], stages=("fine",))
    label = random_label(CLASSES, 128, 192)
    with gpu.translator() as translator, pytest.raises(InputError, match=r"stage fine run 96 x 96, batch 1"):
        translator.translate(label, exemplar_of(translator), (128, 192))
    with gpu.translator(tile=96) as translator:
        exemplar = exemplar_of(translator)
        gpu.trt.runs.clear()
        timings = [set(translator.translate(label, exemplar, (128, 192)).timings) for _ in range(3)]
        assert timings == [{"query", "warp", "synthesis"}, {"total"}, {"total"}]
        assert gpu.trt.runs == ["query", "coarse", *["fine"] * 6] * 3
        assert gpu.device.replays == 2
        gpu.trt.nan = True
        with pytest.raises(BundleError, match="stage fine gave NaN"):
            translator.translate(label, exemplar, (128, 192))
    assert nothing_left(gpu)


def test_idle_workspaces_make_room(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    big = profile((64, 64, 1024), (64, 64, 1024), 1)
    gpu = fake_gpu(monkeypatch, bundle, profiles=[big], total=12 * MIB)
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        for size in (256, 288, 320, 256):
            translator.translate(LABEL, exemplar, size)
        assert len(translator._pipeline._workspaces) < 5
        monkeypatch.setattr(pipeline, "MAX_WORKSPACES", 2)
        translator.translate(LABEL, exemplar, 64)
        assert len(translator._pipeline._workspaces) == 2
    assert nothing_left(gpu)


def test_no_memory_for_the_weights(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, total=WEIGHTS + WEIGHTS // 2)
    with pytest.raises(BackendError, match=r"the weights of engine \w+-\w+ take 1 MiB, 1 MiB are free"):
        gpu.translator()
    assert nothing_left(gpu)


@pytest.mark.parametrize("after", range(0, 60, 3))
def test_a_failing_launch_leaves_nothing(gpu: FakeGpu, after: int) -> None:
    """Wherever it happens; and the translator works on."""
    with gpu.translator() as translator:
        gpu.device.fail_at = after
        failures = 0
        while gpu.device.fail_at is not None:
            try:
                exemplar = exemplar_of(translator)
                results = [translator.translate(LABEL, exemplar, size) for size in (64, (64, 96), 64)]
            except BackendError:
                failures += 1
        exemplar = exemplar_of(translator)
        results = [translator.translate(LABEL, exemplar) for _ in range(3)]
        np.testing.assert_array_equal(results[0].image, results[2].image)
        assert failures == 1 or after > 30  # while work is captured, a failure is only logged
    assert nothing_left(gpu)


def test_an_exemplar_that_is_forgotten_after_a_failure(gpu: FakeGpu) -> None:
    """Its memory is not freed while copies of it are under way."""
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        translator.translate(LABEL, exemplar)
        translator.translate(LABEL, exemplar_of(translator, seed=1))
        gpu.device.fail_at = 5  # after the exemplar's copies
        with pytest.raises(BackendError, match="cuGraphLaunch: CUDA_ERROR_OUT_OF_MEMORY"):
            translator.translate(LABEL, exemplar)
        del exemplar
        translator.translate(LABEL, exemplar_of(translator, seed=2))
    assert nothing_left(gpu)


def test_work_that_cannot_be_made_leaves_nothing(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise InputError("maps of too many elements")

    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        with monkeypatch.context() as patch, pytest.raises(InputError, match="too many elements"):
            patch.setattr(DeviceWarp, "run", refuses)
            translator.translate(LABEL, exemplar)
        translator.translate(LABEL, exemplar)
    assert nothing_left(gpu)


def test_only_a_few_sizes_of_exemplars_are_prepared(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the pictures are the same when one comes back."""
    monkeypatch.setattr(workspace, "MAX_KEY_MAPS", 2)
    sizes = [(64, 64), (64, 96), (96, 64)]
    with gpu.translator() as translator:
        exemplars = [exemplar_of(translator, size) for size in sizes]
        rounds = [[translator.translate(LABEL, exemplar).image for exemplar in exemplars] for _ in range(3)]
        (made,) = [kept for kept in translator._pipeline._workspaces.values() if "theta" in kept.tensors]
        assert len(made.work) == 2
    for images in rounds[1:]:
        np.testing.assert_array_equal(images, rounds[0])
    assert nothing_left(gpu)


def test_short_memory_is_told_or_made(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """However much there is beyond weights and working memory, at every point of a translation that needs some."""
    told: list[str] = []
    images: dict[Any, list[np.ndarray]] = defaultdict(list)
    for spare in range(0, 4 * MIB, MIB // 2):
        total = 4 * WEIGHTS + SCRATCH + spare
        gpu = fake_gpu(monkeypatch, bundle, profiles=[profile((64, 64, 256), (64, 64, 256), (1, 1, 4))], total=total)
        errors = 0
        with gpu.translator() as translator:
            for size in ((64, 64), (256, 256), (64, 64)):
                try:
                    exemplar = exemplar_of(translator, size)
                    for count in (1, 3):
                        images[size, count].append(translator.translate([LABEL] * count, exemplar)[0].image)
                except BackendError as error:
                    told.append(str(error))
                    errors += 1
        assert nothing_left(gpu)
    assert errors == 0  # with the most there is enough
    assert all("does not fit on Fake RTX: " in one for one in told)
    whats = ("batch 1 of 64 x 64", "batch 1 of 256 x 256", "batch 3 of 64 x 64")
    assert all(any(one.startswith(what) for one in told) for what in whats), told
    for made in images.values():
        np.testing.assert_array_equal(made, made[:1] * len(made))


@pytest.mark.parametrize("stage", ["query", "exemplar", "coarse", "fine"])
def test_an_engine_that_fails(gpu: FakeGpu, stage: str) -> None:
    with gpu.translator() as translator:
        gpu.trt.fails = stage
        with pytest.raises(BackendError, match=rf"engine {stage}-\w+ failed to run: .*enqueueV3: Error Code 7: no"):
            translator.translate(LABEL, exemplar_of(translator))
        translator.translate(LABEL, exemplar_of(translator))
    assert nothing_left(gpu)


def test_nan_is_an_error(gpu: FakeGpu) -> None:
    with gpu.translator() as translator:
        exemplar = exemplar_of(translator)
        gpu.trt.nan = True
        for _ in range(3):
            with pytest.raises(
                BundleError,
                match=r"stage fine gave NaN or infinity in image: .*; build it again with precision float32",
            ):
                translator.translate(LABEL, exemplar)
        gpu.trt.nan = False
        translator.translate(LABEL, exemplar)


def test_half_kernels_unless_exact_ones_are_asked_for(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, engines={"precision": "float32"}, dtype=np.float16)
    write_kernels(gpu.folder / "kernels", CLASSES, "float16")
    with Translator(bundle, device="cpu", warp="numpy") as reference:
        expected = reference.translate(LABEL, exemplar_of(reference))
    with gpu.translator() as translator:
        assert translator.describe()["warp"]["arithmetic"] == "float16"
        halves = translator.translate(LABEL, exemplar_of(translator))
    difference = np.abs(halves.image.astype(int) - expected.image)
    assert 0 < difference.max() <= 6
    gpu.device.dtype = np.float32
    with gpu.translator(precision="float32") as translator:
        assert translator.describe()["warp"]["arithmetic"] == "float32"
        exact = translator.translate(LABEL, exemplar_of(translator))
    assert np.abs(exact.image.astype(int) - expected.image).max() <= 1
    assert nothing_left(gpu)


def test_two_translators_share_a_gpu(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gpu.translator()
    other = fake_gpu(monkeypatch, write_tiny_bundle(tmp_path / "other", CHANNELS), cuda=gpu.device)
    second = other.translator()
    picture = random_picture(64, 64)
    for _ in range(3):
        first.translate(LABEL, exemplar_of(first))
        second.translate(random_label(CHANNELS, 64, 64), second.encode_exemplar(picture))
    first.close()
    second.translate(random_label(CHANNELS, 64, 64), second.encode_exemplar(picture))
    del second  # not closed
    assert nothing_left(gpu)
    assert nothing_left(other)


def test_auto_takes_the_gpu_where_all_is_there(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = fake_gpu(monkeypatch, bundle, "onnxruntime", kernels=False)
    with pytest.raises(BackendError, match=r"no compiled warp kernels .*build .*sm_86.*export --aot, makes them"):
        gpu.translator()
    assert nothing_left(gpu)
    with gpu.translator(device="auto") as translator:
        assert {one["device"] for one in translator.describe().values()} == {"cpu"}
    assert "device auto: cpu, because cuda does not start: no compiled warp kernels" in caplog.text
    write_kernels(gpu.folder / "kernels", CLASSES)
    with gpu.translator(device="auto") as translator:
        assert {one["device"] for one in translator.describe().values()} == {"cuda"}
    assert nothing_left(gpu)


def test_what_the_provider_is_asked_for(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = fake_gpu(monkeypatch, bundle, "onnxruntime")
    with gpu.translator() as translator:
        assert translator.describe()["query"]["arithmetic"] == "tf32"
    with gpu.translator(precision="float32") as translator:
        assert translator.describe()["query"]["arithmetic"] == "float32"
    common = {"device_id": "0", "user_compute_stream": str(STREAM), "arena_extend_strategy": "kSameAsRequested"}
    assert gpu.onnx.options == [common] * 4 + [{**common, "use_tf32": "0"}] * 4
    assert gpu.onnx.preloaded == 8  # the libraries of the wheels for CUDA and cuDNN, before each session


def test_from_the_command_line(gpu: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_label(tmp_path / "label.png", LABEL)
    Image.fromarray(random_picture(64, 64)).save(tmp_path / "exemplar.png")
    gpu.folder.rename(tmp_path / "engines")
    arguments = f"translate --model {gpu.bundle.path} --input {tmp_path}/label.png --exemplar {tmp_path}/exemplar.png "
    arguments += f"--exemplar-label {tmp_path}/label.png -o {tmp_path}/out.png --backend tensorrt"
    assert main([*arguments.split(), "--exemplar-cache-mib", "64", "--engines", str(tmp_path / "engines")]) == 0
    assert gpu.trt.runs == ["exemplar", "query", "coarse", "fine"]
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert nothing_left(gpu)
    assert main(arguments.split()) == 1
    assert re.search(r"error: no compiled warp kernels .* in .*m.engines/kernels or .*", capsys.readouterr().err)
