"""`engine.fuse_weight_gradients`: sums made inside the products, against those that autograd and the engine make."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from configs.errors import UserError
from configs.schema import Device, Precision, Recompute, RunConfig, Toggle
from model.init import Embedding, Linear
from model.loss import Head
from model.weight_gradient import add_weight_gradient_, write_weight_gradient_
from tests.ranks import on_ranks
from tests.training.conftest import Build, Reference, make_batch, make_engine, make_model, run_config, train
from training import distributed
from training.engine import Engine

STAGES = (0, 1, 2, 3)
"""Where one rank sums inside the products."""
SHARED = (0, 1)
"""Where several do."""


def bf16_config(stage: int, accumulation: int = 2, fuse: Toggle = Toggle.on, **engine: Any) -> RunConfig:
    """Eight samples a step in so many micro-batches, in bf16."""
    config = run_config(stage, accumulation=accumulation, micro=8 // accumulation, fuse_weight_gradients=fuse, **engine)
    config.engine.precision = Precision.bf16
    return config


def sums_of(one: Engine) -> dict[str, Tensor]:
    """Copies of the summed gradients by parameter name."""
    names = {parameter: name for name, parameter in one.module.named_parameters()}
    return {names[parameter]: total.clone() for parameter, total in one.partition.sums().items()}


def accumulated(one: Engine, step: int = 0) -> dict[str, Tensor]:
    """The gradients of one batch."""
    one.accumulate(make_batch(step, one.config))  # type: ignore[arg-type]
    return sums_of(one)


def terms_of(config: RunConfig) -> dict[str, list[Tensor]]:
    """Each micro-batch's gradient as autograd alone makes it, bf16, by parameter name."""
    model, batch = Reference(config).model.to(torch.bfloat16), make_batch(0, config)
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for micro in batch.micro_batches:
        model.zero_grad()
        (model(micro.tokens, micro.targets).sum() * (1 / batch.valid_tokens)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name].append(parameter.grad.clone())
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_sums_differ_from_autograds_by_its_rounding(build: Build, stage: int, accumulation: int, tied: bool) -> None:
    """Each of autograd's terms is rounded to bf16, by at most 2^-8 of it. An embedding's rows are added in bf16 on a
    CPU, and a tied one's to the head's part, which may cancel them: there four such of the largest element."""
    config = bf16_config(stage, accumulation)
    config.model.tied_embeddings = tied
    fused = accumulated(build(config))
    config.engine.fuse_weight_gradients = Toggle.off
    plain, terms = accumulated(build(config)), terms_of(config)
    assert fused.keys() == plain.keys() == terms.keys()
    for name, total in fused.items():
        exactly = torch.stack(terms[name]).float()
        torch.testing.assert_close(plain[name], exactly.sum(0), rtol=1e-5, atol=1e-8)
        assert total.abs().max() > 0
        size = exactly.abs().sum(0)
        slack = 2**-8 * (4 * size.max() if name == "embedding.weight" else size + size.mean())
        assert ((total - plain[name]).abs() <= slack).all(), name
    layers = [name for name, m in make_model(config).named_modules() if isinstance(m, Linear | Head | Embedding)]
    layers.remove("position")  # no row twice: nothing to round
    names = [f"{layer}.weight" for layer in layers if f"{layer}.weight" in fused]
    assert len(names) == 8 + (1 if tied else 2)
    assert all(not torch.equal(fused[name], plain[name]) for name in names)  # unrounded: the path was taken


def rows_of(module: nn.Module, given: Tensor) -> Tensor:
    """What a layer multiplies its weight with, fp64 (T, I); of an embedding, ones where its tokens are."""
    if isinstance(module, Embedding):
        return F.one_hot(given.flatten(), module.num_embeddings).double()
    return given.detach().double().flatten(0, -2)


@pytest.mark.parametrize("stage", STAGES)
def test_sums_are_those_of_exact_products(build: Build, stage: int) -> None:
    """What each layer adds is the fp64 product of its input and its output's gradient, but for fp32 rounding."""
    config = bf16_config(stage, 4)
    config.model.tied_embeddings = False
    one = build(config)
    seen: dict[str, dict[str, list[Tensor]]] = {}

    def watch(name: str, module: nn.Module) -> None:
        seen[name] = {"x": [], "d": []}
        module.register_forward_pre_hook(lambda _, inputs: seen[name]["x"].append(rows_of(module, inputs[0])))
        module.register_full_backward_hook(lambda _, __, grads: seen[name]["d"].append(grads[0].double()))

    for name, module in one.module.named_modules():
        if isinstance(module, Linear | Embedding):
            watch(name, module)
    sums = accumulated(one)
    assert len(seen) == 4 * 2 + 2
    for name, got in seen.items():
        assert len(got["x"]) == len(got["d"]) == 4
        rows = [d.flatten(0, -2) for d in got["d"]]  # (T, O)
        products = [d.t() @ x for x, d in zip(got["x"], rows, strict=True)]
        exacts = {"weight": torch.stack(products).sum(0), "bias": torch.stack(rows).sum((0, 1))}
        if name in ("embedding", "position"):
            exacts = {"weight": exacts["weight"].t()}
        for kind, exact in exacts.items():
            error = (sums[f"{name}.{kind}"] - exact).abs().max()
            assert error <= 1e-5 * exact.abs().max(), f"{name}.{kind}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_uses_and_empties_the_sums(build: Build, stage: int) -> None:
    one = build(bf16_config(stage))
    expected = torch.cat([total.flatten() for total in accumulated(build(bf16_config(stage))).values()]).double().norm()
    result = train(one, 0, 1)[0]
    assert result.grad_norm == pytest.approx(expected.item(), rel=1e-6)
    assert result.updated
    assert not any(total.any() for total in sums_of(one).values())
    assert all(parameter.grad is None for parameter in one.module.parameters())


class Passes(TorchDispatchMode):
    """Counts the elements that are emptied and whose norm is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.emptied, self.measured = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in (torch.ops.aten.zero_, torch.ops.aten.fill_):
            self.emptied += args[0].numel()
        if packet in (torch.ops.aten.linalg_vector_norm, torch.ops.aten.norm):
            self.measured += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_empties_the_sums_once_and_measures_nothing(build: Build, stage: int) -> None:
    one = build(bf16_config(stage))
    train(one, 0, 1)
    count = sum(total.numel() for total in accumulated(one, 1).values())
    with Passes() as passes:
        one.update(one.config.optim.lr, 1.0)
    assert count <= passes.emptied <= 1.01 * count
    assert passes.measured <= 1


@pytest.mark.parametrize("stage", STAGES)
def test_course_of_training(build: Build, stage: int) -> None:
    """The losses of twelve steps are those of the plain path, up to what bf16 rounding makes of them."""
    config = bf16_config(stage)
    fused = train(build(config), 0, 12)
    config.engine.fuse_weight_gradients = Toggle.off
    plain = train(build(config), 0, 12)
    for left, right in zip(fused, plain, strict=True):
        assert left.loss == pytest.approx(right.loss, rel=3e-3)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=3e-2)
    assert [r.loss for r in fused] != [r.loss for r in plain]


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_blocks_add_once(build: Build, stage: int) -> None:
    config = bf16_config(stage)
    plain = accumulated(build(config))
    config.engine.recompute = Recompute.block
    recomputed = accumulated(build(config))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize(("stage", "recompute"), [(0, Recompute.none), (1, Recompute.none), (1, Recompute.block)])
def test_equal_blocks_share_one_compilation(build: Build, stage: int, recompute: Recompute) -> None:
    """No graph break, one graph for all blocks and one to evaluate with, none made anew in later steps; the sums are
    those of eager blocks."""
    eager, compiled = build(bf16_config(stage)), build(bf16_config(stage, recompute=recompute))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.module.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for step in range(2):
        expected, got = accumulated(eager, step), accumulated(compiled, step)
        for name, total in got.items():
            assert (total - expected[name]).abs().max() <= 0.05 * expected[name].abs().max(), name
        for one in (eager, compiled):
            one.update(one.config.optim.lr, 1.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    batches: Any = make_batch(9, compiled.config).micro_batches
    assert compiled.evaluate(batches)[0] == pytest.approx(eager.evaluate(batches)[0], rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_where_it_is_possible(build: Build) -> None:
    """`auto` takes it there and nowhere else, `on` refuses elsewhere, closing the engine gives the layers back."""

    def takes_it(config: RunConfig) -> bool:
        modules = [m for m in build(config).module.modules() if isinstance(m, Linear | Head | Embedding)]
        assert len({m.weight_sum is None for m in modules}) == 1
        return modules[0].weight_sum is not None

    for stage in STAGES:
        assert takes_it(bf16_config(stage, fuse=Toggle.auto))
        assert not takes_it(bf16_config(stage, fuse=Toggle.off))
    fp32 = run_config(0)
    bf16_sums = bf16_config(1, fp32_accumulation=False)
    impossible = [fp32, bf16_sums, bf16_config(2, lean_zero2=Toggle.off), bf16_config(1, offload_optimizer=True)]
    impossible += [bf16_config(3, lean_zero3=Toggle.off), bf16_config(3, fp32_accumulation=False)]
    for config in impossible:
        config.engine.fuse_weight_gradients = Toggle.on
        with pytest.raises(UserError, match=r"engine\.fuse_weight_gradients=on: needs .* or off"):
            build(config)
        config.engine.fuse_weight_gradients = Toggle.auto
        assert not takes_it(config)
    one = build(bf16_config(1))
    model = one.module
    one.close()
    assert all(m.weight_sum is None and m.bias_sum is None for m in model.modules() if isinstance(m, Linear | Head))


def test_operator() -> None:
    """Its declarations hold: schema, fake kernel, behaviour under AOT dispatch; and what it adds is the product."""
    for dtype in (torch.bfloat16, torch.float32):
        d_out, x = torch.randn(24, 8).to(dtype), torch.randn(24, 16).to(dtype)
        total = torch.randn(8, 16)
        torch.library.opcheck(add_weight_gradient_, (total.clone(), d_out, x))
        expected = total.double() + d_out.double().t() @ x.double()
        add_weight_gradient_(total, d_out, x)
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_operator_that_writes() -> None:
    """Its declarations hold; and whatever its place held is the product then, as autograd rounds it."""
    for dtype in (torch.bfloat16, torch.float32):
        d_out, x = torch.randn(24, 8).to(dtype), torch.randn(24, 16).to(dtype)
        place = torch.full((8, 16), torch.nan, dtype=dtype)
        torch.library.opcheck(write_weight_gradient_, (torch.zeros_like(place), d_out, x))
        write_weight_gradient_(place, d_out, x)
        assert torch.equal(place, d_out.t() @ x)


def reduced_sums() -> dict[int, Any]:
    """On one of the ranks: the loss, the norm and the reduced sums of a step, at each stage; of each sum the elements
    that this rank has, and the first one's place."""
    own = distributed.init(Device.cpu, timeout_minutes=0.5)
    found = {}
    for stage in SHARED:
        config = bf16_config(stage, 4)
        config.train.accumulation_steps = 4 // own.world_size
        one = make_engine(config, own)
        one.accumulate(make_batch(0, config, own.rank, own.world_size))  # type: ignore[arg-type]
        totals = sums_of(one)
        held = {at.name: (at.start, at.length) for at in one.partition.ranges(owned=False)}
        sums = {name: (start, totals[name].flatten()[start : start + n].numpy()) for name, (start, n) in held.items()}
        one.partition.drop()
        result = train(one, 0, 1)[0]
        found[stage] = (result.loss, result.grad_norm, sums)
        one.close()
    own.close()
    return found


def test_ranks_reduce_the_sums() -> None:
    """Two ranks with two micro-batches each have, after the reduction, what one rank has from all four."""
    (alone,), both = on_ranks(1, reduced_sums), on_ranks(2, reduced_sums)
    for stage in SHARED:
        loss, norm, sums = alone[stage]
        seen = dict.fromkeys(sums, 0)
        for rank in (0, 1):
            rank_loss, rank_norm, rank_sums = both[rank][stage]
            assert rank_loss == pytest.approx(loss, rel=1e-6)
            assert rank_norm == pytest.approx(norm, rel=1e-5)
            for name, (start, part) in rank_sums.items():
                total = sums[name][1]
                seen[name] += part.size
                own = total[start : start + part.size]
                assert abs(part - own).max() <= 1e-5 * abs(total).max() + 1e-9, name
        copies = 2 if stage == 0 else 1  # at stage 0 each rank has all sums, at stage 1 its part of them
        assert seen == {name: copies * total.size for name, (_, total) in sums.items()}


@pytest.mark.gpu
def test_operator_on_a_gpu() -> None:
    """cuBLAS sums bf16 products in fp32 into fp32, also from transposed and sliced rows."""
    d_out, x = torch.randn(4096, 3 * 512, device="cuda").bfloat16(), torch.randn(4096, 512, device="cuda").bfloat16()
    total = torch.randn(512, 512, device="cuda")
    for rows in (d_out[:, :512].contiguous(), d_out[:, 512:1024], d_out[:, 1024:].t().contiguous().t()):
        got = total.clone()
        add_weight_gradient_(got, rows, x)
        exact = total.double() + rows.double().t() @ x.double()
        rounded = total.double() + (rows.t() @ x).double()
        assert (got - exact).norm() <= 0.1 * (rounded - exact).norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels don't run on a CPU; see test_sums_on_a_gpu")
@pytest.mark.parametrize("stage", STAGES)
def test_fused_norms_add_to_the_sums(build: Build, stage: int) -> None:
    """With `model.fused_norms` every weight is summed in place: autograd has no gradient left."""
    config = bf16_config(stage)
    expected = accumulated(build(config))
    config.model.fused_norms = Toggle.on
    one = build(config)
    given: set[str] = set()
    for name, parameter in one.module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: None if gradient is None else given.add(name))
    got = accumulated(one)
    for name, total in got.items():  # Triton's interpreter cuts bf16 off
        assert (total - expected[name]).abs().max() <= 0.1 * expected[name].abs().max(), name
    assert not given
    biases = [layer.bias_sum for block in one.module.blocks for layer in (block.attention.proj, block.mlp.down)]
    assert biases == 4 * [None]  # summed by the norms that follow


GPU_RUN = """
import json, sys, torch
from configs.schema import Device, Precision, Toggle
from tests.training.conftest import make_batch, make_engine, run_config, train
from training import distributed

stage, compiled, norms = int(sys.argv[1]), Toggle(sys.argv[2]), Toggle(sys.argv[3])
own = distributed.init(Device.cuda)
found = {}
for fuse in (Toggle.off, Toggle.on):
    config = run_config(stage, accumulation=4, micro=2, fuse_weight_gradients=fuse, compile=compiled)
    config.engine.precision, config.model.fused_norms = Precision.bf16, norms
    one = make_engine(config, own)
    for _ in range(2):  # the second time with what the first has compiled
        one.partition.drop()
        batch = make_batch(0, config)
        for micro in batch.micro_batches:
            micro.tokens, micro.targets = micro.tokens.cuda(), micro.targets.cuda()
        one.accumulate(batch)
    names = {parameter: name for name, parameter in one.module.named_parameters()}
    found[fuse] = {names[p]: total.clone() for p, total in one.partition.sums().items()}
    one.close()
counters = torch._dynamo.utils.counters
worst = {
    name: ((total - found[Toggle.off][name]).abs().max() / found[Toggle.off][name].abs().max()).item()
    for name, total in found[Toggle.on].items()
}
graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
print(json.dumps({"worst": worst, "graphs": graphs, "breaks": breaks}))
own.close()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("norms", ["off", "on"])
@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("stage", STAGES)
def test_sums_on_a_gpu(stage: int, compiled: str, norms: str) -> None:
    """The engine's sums with and without fusion on CUDA, eager and compiled by Inductor: rounding apart, and no more
    than one graph for each of the two engines."""
    command = [sys.executable, "-c", GPU_RUN, str(stage), compiled, norms]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert max(found["worst"].values()) < 0.03, found["worst"]
    assert max(found["worst"].values()) > 0
    assert found["breaks"] == 0
    assert found["graphs"] <= 2


def test_operators_of_compiled_blocks_write_one_tensor_at_most() -> None:
    """The sums are views of one buffer. Of an operator that writes two of them Inductor clones all that lies behind the
    second one's beginning, as long as the whole buffer: it reads past the buffer's end."""
    from model import norm_kernel, sequence
    from training import adamw_kernel

    assert all((norm_kernel, sequence, adamw_kernel))  # imported: their operators are registered
    writes = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("flashtrain::"):
            schema = getattr(torch.ops.flashtrain, name.partition("::")[2]).default._schema
            writes[name] = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert writes["flashtrain::add_weight_gradient_"] == ["total"]
    assert writes["flashtrain::write_weight_gradient_"] == ["place"]
    assert writes["flashtrain::add_norm_backward"] == []
    del writes["flashtrain::adamw_step_"]  # called between steps, never compiled
    assert {name for name, written in writes.items() if len(written) > 1} == set()
