from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import close, fill, naive_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import palora

D = torch.float64
RAYS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])


def whole(name: str, module: nn.Module) -> bool:
    return name == ""


def set_path(model: nn.Module, path: str) -> None:
    for module in model.modules():
        if "_palora_spec" in module.__dict__:
            module._palora_spec.path = path


LAYERS: list[tuple[str, Any, Any]] = [
    ("linear", lambda: nn.Linear(5, 7), (4, 5)),
    ("linear-3d", lambda: nn.Linear(5, 7, bias=False), (4, 3, 5)),
    ("conv", lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 4, 7, 7)),
    ("conv-1x1", lambda: nn.Conv2d(4, 6, 1, bias=False), (4, 4, 5, 5)),
    ("conv-groups", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 9, 9)),
    ("conv-depthwise", lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 4, 6, 6)),
    (
        "conv-reflect",
        lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="reflect"),
        (4, 4, 9, 9),
    ),
    (
        "conv-circular",
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"),
        (4, 2, 5, 6),
    ),
    ("conv-replicate", lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="replicate"), (4, 2, 6)),
    ("conv-valid", lambda: nn.Conv2d(2, 3, 3, padding="valid"), (4, 2, 5, 6)),
    ("conv-same", lambda: nn.Conv2d(2, 3, 3, padding="same"), (4, 2, 5, 6)),
    ("conv-not-square", lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2), (4, 4, 5, 6)),
    ("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 4, 9)),
    ("conv3d", lambda: nn.Conv3d(2, 3, 3, padding=1), (4, 2, 4, 5, 5)),
]


@pytest.mark.parametrize(("make", "shape"), [c[1:] for c in LAYERS], ids=[c[0] for c in LAYERS])
@pytest.mark.parametrize("conv", ["folded", "spatial"])
def test_all_paths_equal_the_naive_loop(make: Any, shape: tuple[int, ...], conv: str) -> None:
    plain = make().double()
    x = torch.randn(shape, dtype=D)
    model = fill(palora.inject(copy.deepcopy(plain), 3, rank=2, target=whole, conv=conv))
    for lam in RAYS[:3]:
        reference = copy.deepcopy(plain)
        reference.weight.data = naive_weight(model, lam)
        expected = reference(x)
        close(palora.merge(model, lam)(x), expected)
        for path in ("auto", "activation", "weight"):
            set_path(model, path)
            with palora.preference(model, lam):
                close(model.train()(x), expected)
                with torch.no_grad():
                    close(model.eval()(x), expected)
                    close(model(x), expected)  # from the cache
                one = x[0] if x.dim() == len(shape) and len(shape) != 3 else None
                if one is not None and "conv" in type(model).__name__.lower():
                    close(model(one), reference(one))  # without a batch dimension


@pytest.mark.parametrize(("make", "shape"), [c[1:] for c in LAYERS], ids=[c[0] for c in LAYERS])
@pytest.mark.parametrize("conv", ["folded", "spatial"])
@pytest.mark.parametrize("path", ["auto", "activation", "weight"])
def test_one_preference_per_sample_equals_a_loop_over_samples(
    make: Any, shape: tuple[int, ...], conv: str, path: str
) -> None:
    x = torch.randn(shape, dtype=D)
    model = fill(palora.inject(make().double(), 3, rank=2, target=whole, conv=conv, path=path))
    with palora.preference(model, RAYS):  # rows 0 and 3 are equal: grouped where kernels are mixed
        ours = model(x)
    distinct = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    with palora.preference(model, distinct):
        all_distinct = model(x)
    tiled = palora.multi(model, RAYS, x)
    g = torch.randn_like(ours)
    parameters = list(model.parameters())
    for i in range(4):
        with palora.preference(model, RAYS[i]):
            single = model(x)
        close(ours[i], single[i])
        close(tiled[i], single)
        with palora.preference(model, distinct[i]):
            close(all_distinct[i], model(x)[i])
    gradients = torch.autograd.grad((ours * g).sum(), parameters)
    loop = [torch.zeros_like(p) for p in parameters]
    for i in range(4):
        with palora.preference(model, RAYS[i]):
            part = torch.autograd.grad((model(x)[i] * g[i]).sum(), parameters)
        loop = [a + b for a, b in zip(loop, part, strict=True)]
    for a, b in zip(gradients, loop, strict=True):
        close(a, b)


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding_looks_up_rows_of_the_mixed_table(padding_idx: int | None) -> None:
    plain = nn.Embedding(10, 6, padding_idx=padding_idx).double()
    index = torch.randint(0, 10, (4, 3))
    model = palora.inject(copy.deepcopy(plain), 3, rank=2, target=whole)
    assert not model.palora_A.any()
    assert model.palora_B.detach().std() > 0.5
    with palora.preference(model, RAYS[0]):
        assert torch.equal(model(index), plain(index))
    fill(model)
    with palora.preference(model, RAYS):
        rows = model(index)
    for i, lam in enumerate(RAYS):
        table = naive_weight(model, lam)
        close(rows[i], table[index][i])
        close(palora.merge(model, lam)(index), table[index])
    if padding_idx is not None:
        model.zero_grad()
        with palora.preference(model, RAYS[0]):
            model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
        assert not model.palora_A.grad.any()  # the padding row is not trained


def test_folded_kernel_follows_the_row_major_index_formula() -> None:
    out, inputs, k, r = 4, 3, 3, 2
    model = fill(palora.inject(nn.Conv2d(inputs, out, k).double(), 2, rank=r, target=whole))
    assert tuple(model.palora_A.shape) == (2, r * k, inputs * k)
    assert tuple(model.palora_B.shape) == (2, out * k, r * k)
    product = (model.palora_B[0] @ model.palora_A[0]).detach()
    delta = (palora.merge(model, [1.0, 0.0]).weight - model.weight).detach()
    for o in range(out):
        for i in range(inputs):
            for u in range(k):
                for v in range(k):
                    flat = ((o * inputs + i) * k + u) * k + v
                    entry = product[flat // (inputs * k), flat % (inputs * k)] / r
                    assert abs(float(delta[o, i, u, v] - entry)) < 1e-14


def test_spatial_kernel_is_the_einsum_of_two_convolutions() -> None:
    model = fill(
        palora.inject(nn.Conv2d(3, 4, 3).double(), 2, rank=2, conv="spatial", target=whole)
    )
    A = model.palora_A[1].view(2, 3, 3, 3)
    expected = torch.einsum("or,rikl->oikl", model.palora_B[1], A) / 2
    close(palora.merge(model, [0.0, 1.0]).weight - model.weight, expected)


def test_untrained_adapters_change_no_bit_and_A_has_no_gradient_yet() -> None:
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    model = palora.inject(copy.deepcopy(plain), 3, rank=2)
    x = torch.randn(6, 4, 6, 6)
    for lam in (RAYS[0], RAYS[1].expand(6, 3)):
        with palora.preference(model, lam):
            out = model(x)
        torch.testing.assert_close(out, plain(x), rtol=0, atol=0 if lam.dim() == 1 else 1e-6)
    with palora.preference(model, RAYS[0]):
        model(x).square().sum().backward()
    assert not model[0].palora_A.grad.any()
    assert not model[3].palora_A.grad.any()
    assert all(b.any() for b in model[3].palora_B.grad)


def test_init_is_uniform_within_one_over_the_root_of_the_columns() -> None:
    model = palora.inject(nn.Linear(400, 50), 2, rank=40, target=whole)
    bound = 400**-0.5
    assert model.palora_A.detach().abs().max() <= bound
    assert abs(float(model.palora_A.detach().var()) - bound**2 / 3) < 0.05 * bound**2
    normal = palora.inject(nn.Linear(400, 50), 2, rank=40, target=whole, init="gaussian")
    assert abs(float(normal.palora_A.detach().std()) - 1 / 40) < 0.05 / 40
    generator = torch.Generator().manual_seed(3)
    first = palora.inject(nn.Linear(4, 4), 2, target=whole, generator=generator).palora_A
    again = palora.inject(
        nn.Linear(4, 4), 2, target=whole, generator=torch.Generator().manual_seed(3)
    ).palora_A
    assert torch.equal(first, again)


def injected(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return fill(palora.inject(nn.Linear(5, 4).double(), 3, rank=2, target=whole)), torch.randn(
        6, 5, dtype=D
    )


def run(model: nn.Module, lam: Any, x: Tensor) -> Tensor:
    with palora.preference(model, lam, simplex=False):
        out: Tensor = model(x)
        return out


def test_mixed_weight_is_linear_in_the_preference() -> None:
    model, x = injected()
    middle = run(model, 0.5 * (RAYS[0] + RAYS[1]), x)
    # λ is float32: the midpoint is rounded to 6e-8
    torch.testing.assert_close(
        middle, 0.5 * (run(model, RAYS[0], x) + run(model, RAYS[1], x)), rtol=0, atol=1e-7
    )


def test_permuting_the_tasks_permutes_the_preference() -> None:
    model, x = injected()
    other = copy.deepcopy(model)
    order = [2, 0, 1]
    with torch.no_grad():
        other.palora_A.copy_(model.palora_A[order])
        other.palora_B.copy_(model.palora_B[order])
    close(run(other, RAYS[0][order], x), run(model, RAYS[0], x))


def test_rescaling_A_against_B_changes_nothing() -> None:
    model, x = injected()
    before = run(model, RAYS[1], x)
    with torch.no_grad():
        model.palora_A.div_(4.0)
        model.palora_B.mul_(4.0)
    close(run(model, RAYS[1], x), before)


def test_equal_adapters_make_the_output_independent_of_the_preference() -> None:
    model, x = injected()
    with torch.no_grad():
        model.palora_A.copy_(model.palora_A[:1].expand_as(model.palora_A))
        model.palora_B.copy_(model.palora_B[:1].expand_as(model.palora_B))
    # the float32 entries of each λ sum to 1 within 6e-8
    torch.testing.assert_close(run(model, RAYS[0], x), run(model, RAYS[1], x), rtol=0, atol=1e-6)


def test_gradient_to_the_preference_is_the_closed_form() -> None:
    model, x = injected()
    g = torch.randn(6, 4, dtype=D)
    for path in ("activation", "weight"):
        set_path(model, path)
        lam = RAYS[0].clone().requires_grad_()
        with palora.preference(model, lam):
            (model(x) * g).sum().backward()
        expected = torch.stack(
            [0.5 * (g * (x @ (model.palora_B[t] @ model.palora_A[t]).t())).sum() for t in range(3)]
        )
        torch.testing.assert_close(lam.grad, expected.float(), rtol=1e-6, atol=1e-6)


def test_scaling_is_alpha_over_rank_or_its_root() -> None:
    lora = palora.inject(nn.Linear(9, 9), 2, rank=4, alpha=8.0, target=whole)
    rslora = palora.inject(nn.Linear(9, 9), 2, rank=4, alpha=8.0, scaling="rslora", target=whole)
    assert (lora._palora_spec.scale, rslora._palora_spec.scale) == (2.0, 4.0)


@pytest.mark.parametrize("conv", ["folded", "spatial"])
def test_dropout_acts_on_the_adapters_input_only(conv: str) -> None:
    for plain, x in (
        (nn.Linear(200, 3), torch.ones(40, 200)),
        (nn.Conv2d(8, 3, 3), torch.ones(4, 8, 6, 6)),
    ):
        model = palora.inject(copy.deepcopy(plain), 2, rank=2, dropout=0.5, conv=conv, target=whole)
        with palora.preference(model, [0.5, 0.5]):
            assert torch.equal(model(x), plain(x))  # B = 0: the base sees no dropout
        fill(model)
        with palora.preference(model, [0.5, 0.5]):
            assert not torch.equal(model(x), model(x))
            model.eval()
            assert torch.equal(model(x), model(x))
            torch.testing.assert_close(
                model(x), palora.merge(model, [0.5, 0.5])(x), rtol=1e-4, atol=1e-4
            )


def test_a_layers_own_temperature_sharpens_its_preference() -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    model = fill(palora.inject(net, 3, rank=2, layer_temperature=3.0))
    assert [m._palora_spec.exponent for m in model] == [1.0, 3.0]
    lam = RAYS[0]
    sharp = lam**3 / (lam**3).sum()
    reference = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    for layer, plain, own in zip(model, reference, (lam, sharp), strict=True):
        plain.load_state_dict({"weight": naive_weight(layer, own), "bias": layer.bias})
    x = torch.randn(3, 5, dtype=D)
    with palora.preference(model, lam):
        torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(palora.merge(model, lam)(x), reference(x), rtol=0, atol=1e-6)
    by_name = palora.inject(
        nn.Sequential(nn.Linear(2, 2)), 2, rank=1, layer_temperature=lambda n: 2.0
    )
    assert by_name[0]._palora_spec.exponent == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_get_float32_adapters_by_the_activation_path(
    dtype: torch.dtype,
) -> None:
    for plain, x in (
        (nn.Linear(16, 8), torch.randn(64, 16)),
        (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)),
    ):
        model = fill(palora.inject(copy.deepcopy(plain).to(dtype), 2, rank=2, target=whole))
        assert model.palora_A.dtype == torch.float32
        reference = copy.deepcopy(plain)
        reference.weight.data = naive_weight(model, torch.tensor([0.3, 0.7])).float()
        reference.bias.data = model.bias.data.float()
        with palora.preference(model, [0.3, 0.7]):
            out = model(x.to(dtype))
        assert out.dtype == dtype
        scale = float(reference(x).detach().abs().max())
        torch.testing.assert_close(out.float(), reference(x), rtol=0, atol=2e-2 * scale)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("per_sample", [False, True])
def test_bf16_autocast_stays_close_to_float32(rows: int, per_sample: bool) -> None:
    net = nn.Sequential(
        nn.Linear(16, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 6, 2), nn.Flatten()
    )
    model = fill(palora.inject(net, 2, rank=2))
    x = torch.randn(rows, 16)
    lam = torch.tensor([0.3, 0.7]).expand(rows, 2) if per_sample else [0.3, 0.7]
    with palora.preference(model, lam):
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    scale = float(exact.detach().abs().max())
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=2e-2 * scale)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval()
        with palora.preference(model, [0.3, 0.7]):
            assert model(x).dtype == torch.bfloat16
            assert torch.equal(model(x), model(x))


def test_cached_weight_follows_the_parameters_and_ends_with_the_context() -> None:
    model = fill(palora.inject(nn.Linear(8, 8), 2, rank=2, target=whole)).eval()
    x = torch.randn(64, 8)
    with torch.no_grad(), palora.preference(model, [0.5, 0.5]):
        first = model(x)
        model.palora_B.mul_(2.0)
        second = model(x)
        model.load_state_dict({k: 0.5 * v for k, v in model.state_dict().items()})
        third = model(x)
        model.weight.data = torch.zeros(8, 8)
        fourth = model(x)
    outs = [first, second, third, fourth]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outs) for b in outs[:i])
    with torch.inference_mode(), palora.preference(model, [0.5, 0.5]):
        torch.testing.assert_close(model(x), fourth)
    with palora.preference(model, [0.5, 0.5]):
        assert model(x).requires_grad  # a later pass with gradients is not served from the cache


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tasks=st.integers(2, 8),
    rank=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    conv=st.sampled_from(["folded", "spatial"]),
    path=st.sampled_from(["auto", "activation", "weight"]),
    single=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions_of_any_shape_match_merging(
    tasks: int, rank: int, groups: int, stride: int, dilation: int, mode: str, conv: str,
    path: str, single: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    dtype = torch.float32 if single else D
    layer = nn.Conv2d(
        4, 6, 3, stride=stride, padding=2, dilation=dilation, groups=groups, padding_mode=mode
    ).to(dtype)
    model = fill(palora.inject(layer, tasks, rank=rank, conv=conv, path=path, target=whole), seed)
    x = torch.randn(3, 4, 7, 7, dtype=dtype)
    lam = torch.distributions.Dirichlet(torch.ones(tasks)).sample((3,))
    with palora.preference(model, lam):
        out = model(x)
    for i in range(3):
        close(out[i], palora.merge(model, lam[i])(x)[i], 1e-5 if single else 1e-12)


def test_unknown_first_dimension_is_refused_naming_layer_and_shapes() -> None:
    model = palora.inject(
        nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 1)), 2, rank=1
    )
    with palora.preference(model, torch.full((3, 2), 0.5)):
        with pytest.raises(ValueError, match=r"layer '0'.*dimension is 6.*has 3 rows"):
            model(torch.zeros(6, 4))
        with pytest.raises(ValueError, match="layer '0'"):
            model[0](torch.zeros(4))
        with pytest.raises(ValueError, match="layer '2'"):
            model[2](torch.zeros(1, 2, 2))


def test_windows_flattened_into_the_batch_follow_their_sample_when_allowed() -> None:
    model = fill(palora.inject(nn.Linear(5, 4).double(), 3, rank=2, target=whole))
    x = torch.randn(8, 5, dtype=D)
    with palora.preference(model, RAYS, allow_expand=True):
        out = model(x)
    with palora.preference(model, RAYS.repeat_interleave(2, 0)):
        close(out, model(x))


@pytest.mark.filterwarnings("ignore:the preference lies off the simplex")
def test_a_layer_of_its_own_temperature_extrapolates() -> None:
    """Weights off the simplex are sharpened in size and keep their sign."""
    net = nn.Sequential(nn.Linear(2, 2))
    model = fill(palora.inject(net, 2, rank=1, layer_temperature=lambda n: 1.5).double())
    with palora.preference(model, [1.25, -0.25], simplex=False):
        out = model(torch.eye(2, dtype=D))
    size = torch.tensor([1.25**1.5, -(0.25**1.5)], dtype=D)
    weight = naive_weight(model[0], size / size.sum())
    close(out, weight.t() + model[0].bias)
