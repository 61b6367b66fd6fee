"""The registered operator: what torch.library, torch.compile and torch.export see of it, for each backend."""

from __future__ import annotations

import pytest
import torch

from flashcocos.errors import InputError
from flashcocos.kernels import corr_warp
from flashcocos.kernels.op import corr_warp_op


@pytest.fixture(params=["numba", "triton"])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("device")
    return request.param


@pytest.fixture
def inputs(backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 8, 3, 4), (1, 8, 4, 3), (1, 3, 4, 3))
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def test_operator_passes_the_checks_of_torch_library(backend, inputs):
    inputs[0] = inputs[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    results = torch.library.opcheck(corr_warp_op, (*inputs, 3, 0.01, backend))
    assert set(results.values()) == {"SUCCESS"}


def test_fake_gradients_have_the_strides_of_the_real_ones(backend, inputs):
    grad = torch.ones(1, 3, 3, 4, device=inputs[0].device)

    def strides(tensors):
        out, _ = corr_warp_op(*tensors, 3, 0.01, backend)
        return [g.stride() for g in torch.autograd.grad(out, tensors, grad)]

    real = strides(inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        grad = mode.from_tensor(grad)
        assert strides(fakes) == real


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_a_break(backend, inputs, compiler):
    def function(theta, phi, values):
        return corr_warp(theta, phi, values, backend=backend).square().sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    got = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_exports_as_one_node_of_any_size(backend, inputs):
    class Warp(torch.nn.Module):
        def forward(self, theta, phi, values):
            return corr_warp(theta, phi, values, backend=backend)

    height, width = torch.export.Dim("height", max=64), torch.export.Dim("width", max=64)
    program = torch.export.export(
        Warp(), tuple(x.detach() for x in inputs), dynamic_shapes=({2: height, 3: width}, None, None)
    )
    ops = [str(node.target) for node in program.graph.nodes if "flashcocos" in str(node.target)]
    assert ops == ["flashcocos.corr_warp.default"]
    theta = torch.cat([inputs[0].detach()] * 2, dim=3)
    out = program.module()(theta, *(x.detach() for x in inputs[1:]))
    assert torch.equal(out, corr_warp(theta, *(x.detach() for x in inputs[1:]), backend=backend))


def test_lse_carries_no_gradient(backend, inputs):
    out, lse = corr_warp_op(*inputs, 3, 0.01, backend)
    assert out.requires_grad
    assert not lse.requires_grad


def test_unknown_backend_is_refused():
    x = torch.zeros(1, 2, 2, 2)
    with pytest.raises(InputError, match="expected one of numba, triton, got 'cuda'"):
        corr_warp_op(x, x, x, 3, 0.01, "cuda")


def test_the_choice_of_a_backend_compiles_without_a_break():
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(corr_warp, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, x, x), corr_warp(x, x, x))
