"""Blocks of a bundle: the same functions as in training, by fewer operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import CLASSES, exported_stage, seeded_model
from onnx import numpy_helper

from flashcocos.export.blocks import FoldedBlock
from flashcocos.export.inference import stage_module
from flashcocos.export.tensorrt.graphs import tensorrt_graph
from flashcocos.train.networks.layers import SpadeBlock


@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize("channels", [(6, 6), (6, 4)])
def test_a_folded_block_is_the_block(channels: tuple[int, int], enlarge: bool) -> None:
    torch.manual_seed(0)
    block = SpadeBlock(*channels, 5, 7).double().eval()
    folded = FoldedBlock(block)
    side = 4 if enlarge else 8
    x, condition = torch.randn(2, 6, side, side).double(), torch.randn(2, 5, 8, 8).double()
    with torch.no_grad():
        expected = block(x, condition, enlarge=enlarge)
        torch.testing.assert_close(folded(x, condition, enlarge=enlarge), expected, rtol=1e-12, atol=1e-12)


def test_enlarging_in_the_block_is_enlarging_before_it() -> None:
    torch.manual_seed(0)
    for channels in ((6, 6), (6, 4)):
        block = SpadeBlock(*channels, 5, 7).double()
        x, condition = torch.randn(2, 6, 4, 4).double(), torch.randn(2, 5, 8, 8).double()
        twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        # PyTorch adds in another order in maps of another size
        result = block(x, condition, enlarge=True)
        torch.testing.assert_close(result, block(twice, condition), rtol=1e-12, atol=1e-12)


def test_stages_have_folded_blocks_and_leave_the_model_alone() -> None:
    model = seeded_model(CLASSES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {type(module) for module in stage_module(model, "coarse").modules()}
    assert FoldedBlock in kinds
    assert SpadeBlock not in kinds
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tensorrt_gets_sums_over_channels() -> None:
    def rows(graph: object) -> int:
        """Products with a row of one number."""
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        products = [node.input[0] for node in graph.node if node.op_type == "MatMul"]
        return sum(name in constants and len(constants[name]) == 1 and not np.ptp(constants[name]) for name in products)

    model = exported_stage(CLASSES, "fine")
    assert rows(model.graph) > 0
    plain = tensorrt_graph(model.SerializeToString(), "fine", classes=CLASSES.label_channels, half=False)
    assert rows(plain.graph) == 0
    assert sum(node.op_type == "ReduceSum" for node in plain.graph.node) >= rows(model.graph)
