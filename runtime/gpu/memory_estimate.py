"""How much device memory a translation takes with TensorRT engines, before a GPU is at hand.

Weights of all stages lie on the device together. The stages run one after another and share their working memory, the
most that one of them asks for, by TensorRT's own figure at the engine's largest shape. What lies between the stages
grows with the picture, and nothing with its square. Not counted are the context of the driver, some 300 to 500 MiB, and
the kernels that tensorrt-rtx compiles.

Arithmetic alone: no estimate has been compared with a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ...bundle import STAGES
from ...config import ModelConfig
from ...errors import BackendError
from .device import mebibytes, total_bytes
from .engine import concrete, device_tensors
from .store import EngineRecord
from .warp import feature_map, key_tensors, query_tensors
from .workspace import stage_shape, translate_tensors


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of device memory for a batch of pictures of height x width, with an exemplar of the same size.

    parts: "STAGE weights" and "working memory"; "stages" and "warp", the buffers between them; "exemplar", one encoded
    exemplar in the cache; "encoding", the buffers that encoding one takes, which stay allocated.
    """

    batch: int
    height: int
    width: int
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it at once."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {mebibytes(size)}" for name, size in self.parts.items())
        return f"{self.height} x {self.width}, batch {self.batch}: {mebibytes(self.total)} ({parts})"


def estimate_memory(
    config: ModelConfig,
    records: Sequence[EngineRecord],
    height: int,
    width: int,
    *,
    batch: int = 1,
    tile: int | None = None,
) -> MemoryEstimate:
    """The memory for `batch` pictures with the engines of `records`, of one variant and precision, static ones first.

    tile: side of the fine stage's tiles, None for whole pictures.
    Raises `BackendError` where a stage has no engine for the shape.
    """
    engines: dict[str, EngineRecord] = {}
    for stage in STAGES:
        count = 1 if stage == "exemplar" else batch  # an exemplar is encoded alone
        shape = stage_shape(stage, (count, height, width), tile)
        fitting = [record for record in records if record.key.stage == stage and record.key.profile.supports(*shape)]
        if not fitting:
            available = "; ".join(str(record.key.profile) for record in records if record.key.stage == stage) or "none"
            tiled = "" if tile is None else f" --tile {tile}"
            raise BackendError(
                f"no engine of {stage} for {shape[1]} x {shape[2]}, batch {shape[0]}, only {available}; "
                f"flashcocos build BUNDLE --size {height}x{width} --batch {batch}{tiled}"
            )
        engines[stage] = fitting[0]
    dtype, key_map = engines["query"].key.precision, feature_map(config, height, width)
    fine, encoding = (device_tensors(config, stage, uint8_output=True) for stage in ("fine", "exemplar"))
    results = total_bytes(query_tensors(config, dtype, batch, key_map))
    parts = {f"{stage} weights": record.weight_bytes for stage, record in engines.items()}
    parts["working memory"] = max(record.activation_bytes for record in engines.values())
    parts["stages"] = total_bytes(translate_tensors(config, dtype, fine, (batch, height, width), tile)) - results
    parts["warp"] = results + total_bytes(key_tensors(config, dtype, batch, key_map))
    parts["exemplar"] = total_bytes(key_tensors(config, dtype, 1, key_map))
    parts["encoding"] = total_bytes(concrete(config, sum(encoding, ()), (1, height, width)))
    return MemoryEstimate(batch, height, width, parts)
