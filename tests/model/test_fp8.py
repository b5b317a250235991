"""Products in fp8: within the rounding of the formats, and as the units of a GPU want their operands.

The bounds: an element x of a matrix whose scale is s is rounded by at most u·|x| + s·d, with u half the last bit of the
fraction (2^-4 in e4m3, 2^-3 in e5m2) and d half the smallest number. A sum of products of two such is off by what its
terms are, and its own rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Activation, Fp8
from model import build_model, fp8
from model.fp8 import E4M3, E5M2, fp8_linear, peak_of, problems, product, scaled
from model.init import Linear
from model.weight_gradient import summed_linear
from tests.model.small import small

RECIPES = [Fp8.tensorwise, Fp8.rowwise]
ROUNDING = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}
"""u and d of a format."""
T, IN, OUT = 96, 160, 224


def layer(seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (2, T/2, I), weight (O, I), bias (O,), and a gradient of the output (2, T/2, O), bf16."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device)

    x, weight, bias = random(2, T // 2, IN), 0.02 * random(OUT, IN), random(OUT)
    # Rows of a gradient differ in size, as those of easy and hard tokens do.
    d_out = 1e-5 * random(2, T // 2, OUT) * torch.logspace(-3, 0, T // 2, device=device).bfloat16()[:, None]
    return x, weight, bias, d_out


def run(recipe: Fp8, x: Tensor, weight: Tensor, bias: Tensor | None, d_out: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a layer without sums."""
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    out = fp8_linear(leaves["x"], leaves["weight"], leaves.get("bias"), None, None, recipe)
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out)
    return {"out": out.detach()} | {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def allowed(left: Tensor, right: Tensor, dtype: torch.dtype, recipes: tuple[Fp8, Fp8]) -> Tensor:
    """How far left (M, K) · rightᵀ (K, N), the right in e4m3, may be off before it is rounded, fp64 (M, N)."""
    errors = []
    for matrix, kind, recipe in zip((left, right), (dtype, E4M3), recipes, strict=True):
        unit, smallest = ROUNDING[kind]
        scale = peak_of(matrix, recipe).double() / torch.finfo(kind).max
        errors.append((matrix.abs().double(), unit * matrix.abs().double() + scale * smallest))
    (a, da), (b, db) = errors
    return a @ db.t() + da @ b.t() + da @ db.t()


def check_errors(recipe: Fp8, device: str, slack: float) -> None:
    """Of all three products, against fp64. `slack`: the error of sums, as a share of the sum of magnitudes."""
    x, weight, bias, d_out = layer(device=device)
    found = run(recipe, x, weight, bias, d_out)
    rows, d_rows = x.flatten(0, 1), d_out.flatten(0, 1)
    gradient = E5M2 if recipe is Fp8.tensorwise else E4M3
    cases = {
        "out": (rows, weight, E4M3, recipe, bias.double(), 0.045),
        "d_x": (d_rows, weight.t(), gradient, Fp8.tensorwise, 0.0, 0.07 if recipe is Fp8.tensorwise else 0.045),
    }
    for name, (left, right, dtype, weight_recipe, added, typical) in cases.items():
        exact = left.double() @ right.double().t()
        error = found[name].flatten(0, 1).double() - exact - added
        bound = allowed(left, right, dtype, (recipe, weight_recipe))
        bound += 2**-8 * (exact + added).abs() + slack * (left.abs().double() @ right.abs().double().t())
        assert (error.abs() <= bound).all(), name
        assert 0.01 < error.norm() / exact.norm() < typical, name  # rounding to 8 bits, seen
    torch.testing.assert_close(found["d_weight"], d_rows.t() @ rows, rtol=0, atol=0)
    torch.testing.assert_close(found["d_bias"], d_rows.sum(0), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_errors_are_those_of_the_formats(recipe: Fp8) -> None:
    """And the weight's gradient is the plain layer's."""
    check_errors(recipe, "cpu", slack=1e-6)


def test_rows_with_scales_of_their_own_keep_small_gradients() -> None:
    """Gradients a thousandth of the largest are as exact as any by row; e5m2 costs a bit everywhere."""
    x, weight, bias, d_out = layer()
    exact = d_out.double() @ weight.double()
    for recipe, least, most in [(Fp8.rowwise, 0.02, 0.05), (Fp8.tensorwise, 0.05, 0.08)]:
        found = run(recipe, x, weight, bias, d_out)["d_x"].double()
        errors = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert least < errors[:, :8].mean() < most, recipe  # the smallest
        assert least < errors[:, -8:].mean() < most, recipe


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_sums_are_those_of_the_plain_layer(recipe: Fp8, with_bias: bool) -> None:
    """Bit for bit: only the other two products are in fp8; autograd gets no gradient of weight and bias."""
    x, weight, bias, d_out = layer()
    results = []
    for linear in (summed_linear, fp8_linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        sums = torch.ones(OUT, IN), torch.ones(OUT) if with_bias else None
        rest: Any = (recipe,) if linear is fp8_linear else ()
        linear(leaves[0], leaves[1], leaves[2] if with_bias else None, *sums, *rest).backward(d_out)
        assert leaves[1].grad is None
        assert leaves[2].grad is None
        results.append([total for total in sums if total is not None])
        assert not torch.equal(results[-1][0], torch.ones(OUT, IN))
    assert all(torch.equal(plain, own) for plain, own in zip(*results, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_and_the_smallest(recipe: Fp8) -> None:
    """Nothing divides by zero, and nothing is lost to a small scale."""
    x, weight, bias, d_out = layer()
    for zero in (x, weight, d_out):
        kept = zero.clone()
        zero.zero_()
        found = run(recipe, x, weight, bias, d_out)
        assert all(tensor.isfinite().all() for tensor in found.values())
        if zero is not d_out:
            assert torch.equal(found["out"], bias.expand_as(found["out"]))
        zero.copy_(kept)
    expected = run(recipe, x, weight, None, d_out)
    tiny = run(recipe, x * 2.0**-60, weight, None, d_out * 2.0**-60)
    assert torch.equal(tiny["out"], expected["out"] * 2.0**-60)
    assert torch.equal(tiny["d_x"], expected["d_x"] * 2.0**-60)


def test_outliers_spoil_their_row_alone() -> None:
    """One element of 10^4: by row the other tokens don't notice, by tensor they lose what falls below the scale."""
    x, weight, _, d_out = layer()
    loud = x.clone()
    loud[0, 3, 5] = 1e4
    calm, found = (run(Fp8.rowwise, given, weight, None, d_out)["out"].flatten(0, 1) for given in (x, loud))
    others = torch.arange(T) != 3
    assert torch.equal(found[others], calm[others])
    together = run(Fp8.tensorwise, loud, weight, None, d_out)["out"].flatten(0, 1)
    exact = loud.flatten(0, 1).double() @ weight.double().t()
    error = (together.double() - exact)[others]
    bound = allowed(loud.flatten(0, 1), weight, E4M3, (Fp8.tensorwise, Fp8.tensorwise))[others]
    assert (error.abs() <= bound + 2**-8 * exact[others].abs() + 1e-6).all()
    assert error.norm() > (calm.double() - exact)[others].norm()


def check_nonfinite(recipe: Fp8, device: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x, weight, bias, d_out = layer(device=device)
        spoiled = x.clone()
        spoiled[1, 2, 3] = bad
        out = run(recipe, spoiled, weight, bias, d_out)["out"]
        assert not out[1, 2].isfinite().any()
        assert out[0, 0].isfinite().all() == (recipe is Fp8.rowwise)
        spoiled = weight.clone()
        spoiled[7, 3] = bad
        found = run(recipe, x, spoiled, bias, d_out)
        assert not found["out"][..., 7].isfinite().any()
        assert not found["d_x"].isfinite().any()
        spoiled = d_out.clone()
        spoiled[1, 2, 3] = bad
        found = run(recipe, x, weight, bias, spoiled)
        assert not found["d_x"][1, 2].isfinite().any()
        assert not found["d_weight"][3].isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_stays_so(recipe: Fp8) -> None:
    check_nonfinite(recipe, "cpu")


@pytest.mark.parametrize("recipe", RECIPES)
def test_operands_are_as_the_units_want_them(recipe: Fp8, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch checks on a GPU, checked here on any inputs: transposed, sliced, expanded, of one token."""
    calls = []

    def scaled_mm(left: Tensor, right: Tensor, scale_left: Tensor, scale_right: Tensor, **options: Any) -> Tensor:
        (rows, inner), columns = left.shape, right.shape[1]
        assert left.stride() == (inner, 1)
        assert right.stride() == (1, inner)
        assert inner % 16 == 0
        assert columns % 16 == 0
        assert {left.dtype, right.dtype} <= {E4M3, E5M2}
        assert right.dtype is E4M3  # not both e5m2
        assert scale_left.dtype is scale_right.dtype is torch.float32
        shapes = ((rows, 1), (1, columns)) if recipe is Fp8.rowwise else ((), ())
        assert (scale_left.shape, scale_right.shape) == shapes
        assert scale_left.is_contiguous()
        assert scale_right.is_contiguous()
        bias = options["bias"]
        calls.append(options["use_fast_accum"])
        out = (left.double() @ right.double()) * scale_left * scale_right + (0 if bias is None else bias)
        return out.to(options["out_dtype"])

    x, weight, bias, d_out = layer()
    inputs = {
        "plain": (x, d_out),
        "transposed": (x[:1].mT.contiguous().mT, d_out[:1].mT.contiguous().mT),
        "sliced": (torch.cat([x, x], -1)[..., :IN], torch.cat([d_out, d_out], -1)[..., OUT:]),
        "expanded": (x[:1, :1].expand(2, T // 2, IN), d_out[0, 0, 0].expand(2, T // 2, OUT)),
        "one token": (x[:1, :1], d_out[:1, :1]),
    }
    for name, (given, d_given) in inputs.items():
        expected = run(recipe, given, weight, bias, d_given)
        with monkeypatch.context() as patch:
            patch.setattr(fp8, "has_units", lambda _: True)
            patch.setattr(torch, "_scaled_mm", scaled_mm)
            found = run(recipe, given, weight, bias, d_given)
        for kind in expected:  # but for the order of sums
            torch.testing.assert_close(found[kind], expected[kind], rtol=2**-7, atol=1e-8, msg=f"{name}: {kind}")
    assert calls == [True, False] * len(inputs)


def test_casts_use_the_whole_range() -> None:
    """The largest magnitude becomes the format's largest number, whatever it was, in each row or in all."""
    matrix = torch.randn(8, 32) * torch.logspace(-20, 20, 8)[:, None]
    for dtype in (E4M3, E5M2):
        rows = scaled(matrix, peak_of(matrix, Fp8.rowwise), dtype)
        assert (rows.values.float().abs().amax(1) == torch.finfo(dtype).max).all()
        whole = scaled(matrix, peak_of(matrix, Fp8.tensorwise), dtype)
        assert whole.values.float().abs().max() == torch.finfo(dtype).max
        assert rows.scale.shape == (8, 1)
        assert whole.scale.shape == ()
    assert torch.equal(product(rows, rows, torch.float32, fast=False), fp8.emulated(rows, rows, torch.float32))


@pytest.mark.parametrize("activation", [Activation.gelu_tanh, Activation.swiglu])
def test_layers_of_blocks_and_no_others(activation: Activation) -> None:
    """The four of each block; the loss moves by rounding, and comes back when it is switched off."""
    model = build_model(small(activation=activation))
    tokens = torch.randint(0, 131, (2, 16))

    def loss() -> float:
        return float(model(tokens, tokens)[0].detach())

    plain = loss()
    model.set_fp8(Fp8.rowwise)
    chosen = [name for name, m in model.named_modules() if isinstance(m, Linear) and m.fp8 is Fp8.rowwise]
    layers = ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")
    assert chosen == [f"blocks.{index}.{layer}" for index in (0, 1) for layer in layers]
    assert not any(isinstance(m, nn.Linear) for name, m in model.named_modules() if name not in chosen)
    in_fp8 = loss()
    assert in_fp8 != plain
    assert in_fp8 == pytest.approx(plain, rel=1e-2)
    model.set_fp8(Fp8.none)
    assert loss() == plain


def test_dims_that_do_not_fit_are_named() -> None:
    assert not problems(small())
    assert not problems(small(activation=Activation.swiglu, num_kv_heads=2))
    (told,) = problems(small(mlp_width=72))
    assert told.startswith("engine.fp8 multiplies matrices whose dims are multiples of 16, and model.mlp_width is 72")
    assert told.endswith("change it, or use engine.fp8=none")
    found = problems(small(width=24, num_heads=3, head_dim=12, num_kv_heads=1))
    names = ["model.width is 24", "model.num_heads × head dim is 36", "× head dim is 60"]
    assert len(found) == 3
    assert all(name in line for name, line in zip(names, found, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# On a GPU with fp8 units
# ---------------------------------------------------------------------------------------------------------------


def needs_units() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8 units")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_units_multiply_as_emulated(recipe: Fp8) -> None:
    """The same bounds; against the emulation, exact in fp32, they are off by their accumulators' bits and the output's
    rounding. Fast sums keep some 14 bits of the largest partial sum."""
    needs_units()
    check_errors(recipe, "cuda", slack=2**-10)
    check_nonfinite(recipe, "cuda")
    torch.manual_seed(0)
    for tokens, inner, columns in [(1, 64, 48), (24, 2560, 7680), (8192, 10240, 2560)]:
        x, weight = (torch.randn(n, inner, device="cuda").bfloat16() for n in (tokens, columns))
        bias = torch.randn(columns, device="cuda").bfloat16()
        left, right = (scaled(m, peak_of(m, recipe), E4M3) for m in (x, weight))
        magnitude = x.abs().float() @ weight.abs().float().t()
        for fast, share in [(True, 2.0**-10), (False, 2.0**-12)]:
            found = product(left, right, torch.bfloat16, bias, fast=fast).float()
            exact = fp8.emulated(left, right, torch.float32, bias)
            assert ((found - exact).abs() <= share * magnitude + 2**-8 * exact.abs()).all(), (tokens, inner, fast)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_casts_are_the_eager_ones(recipe: Fp8) -> None:
    """Inductor fuses GELU and casts; its values differ where it skips a rounding to bf16, by one step of fp8."""
    needs_units()
    x, weight, bias, d_out = layer(device="cuda")

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fp8_linear(F.gelu(x), weight, bias, None, None, recipe)

    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    for eager, compiled in zip(*results, strict=True):
        assert (compiled - eager).float().norm() <= 0.03 * eager.float().norm()
