"""torch.compile, torch.export and ONNX see one graph, whatever the length."""

from __future__ import annotations

import warnings

import pytest
import torch

from hypermixer import HyperMixing

pytestmark = [
    # raised by torch's own compiler while it imports and traces
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class CountGraphs:
    def __init__(self):
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return module.forward


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


OPTIONS = [{}, {"tied": True}, {"bias": True}, {"token_info": "idiap"}, {"chunk_size": 16}]


@pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="before 2.6 each length is a graph of its own"
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_full_graph_for_each_side_of_the_crossover(options):
    layer = HyperMixing(32, 64, 4, **options)
    counter = CountGraphs()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[0, 3:] = True
    for n in (100, 50, 199, 77, 5, 4, 6):
        x = torch.randn(2, n, 32)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert counter.graphs <= 2
    for n in (100, 50):
        x = torch.randn(2, n, 32)
        got = compiled(x, key_padding_mask=mask[:, :n])
        expected = layer(x, key_padding_mask=mask[:, :n])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"causal": True}, {"block_size": 4}], ids=str)
def test_causal_layers_compile(options):
    layer = HyperMixing(16, 32, 2, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


def test_traced_forward_and_backward():
    layer = HyperMixing(32, 64, 4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (60, 90):
        x = torch.randn(2, n, 32, requires_grad=True)
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        (got,) = torch.autograd.grad(y.square().sum(), x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_export_with_a_dynamic_length():
    layer = HyperMixing(32, 64, 4, algorithm="factored").eval()
    shapes = {"query": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.export.export(layer, (torch.randn(2, 50, 32),), dynamic_shapes=shapes)
    for batch, n in ((3, 20), (1, 300)):
        x = torch.randn(batch, n, 32)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="onnx.export(dynamo=True) works from 2.6 on")
def test_onnx_export_of_the_factored_form(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    layer = HyperMixing(16, 32, 2, algorithm="factored").eval()
    x = torch.randn(2, 9, 16)
    path = tmp_path / "layer.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (x,), dynamo=True, verbose=False).save(path)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    (got,) = evaluator.run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(got.copy()), layer(x).detach(), rtol=1e-4, atol=1e-4
    )


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    layer = HyperMixing(16, 32, 2)
    x = torch.randn(2, 9, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(got, expected)
