"""`optim.fused_step`: AdamW's step in one kernel (interpreted on a CPU), against fp64, PyTorch's and the plain path."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.errors import UserError
from configs.schema import Precision, RunConfig, Toggle
from tests.training.conftest import Build, equal, make_batch, masters, run_config, state_of, train
from tests.training.driver import Driver, Job
from tests.training.test_resume_engine import KILLED, content, log, losses
from training import checkpoint
from training.adamw_kernel import BLOCK, CPU_BLOCK, Scalars, adamw_step_, scalars_of, update
from training.backend import should_fuse_step
from training.engine import Engine
from training.optimizer import update_in_one_kernel
from training.state import TrainState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHOLE = BLOCK if DEVICE == "cuda" else CPU_BLOCK
SIZES = (1, 37, WHOLE, 2 * WHOLE + 5)
HALF_ULP = 2.0**-24
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels don't run on a CPU")


def state_at(step: int, size: int, spread: float = 1.0) -> dict[str, Tensor]:
    """Master, summed gradient and moments of random training before update number `step`, fp32; before the first, the
    moments are zero. Gradients of all sizes from 1e-4 to 10 times `spread`, some of them zero."""
    torch.manual_seed(step + size)
    total = torch.randn(size) * spread * 10 ** (torch.rand(size) * 5 - 4)
    total[::7] = 0.0
    known = 0.0 if step == 1 else 1.0
    values = {
        "master": torch.randn(size),
        "total": total,
        "first": torch.randn(size) * spread * known,
        "second": (torch.randn(size) * spread).square() * known,
    }
    return {name: value.to(DEVICE) for name, value in values.items()}


def one_number(value: float) -> Tensor:
    """As the kernel reads it."""
    return torch.tensor([value], device=DEVICE)


def exactly(given: dict[str, Tensor], factor: float, s: Scalars) -> dict[str, Tensor]:
    """The update of the same numbers in fp64; the master's change apart."""
    p, total, first, second = (t.double() for t in given.values())
    s = Scalars(**{name: float(torch.tensor(value)) for name, value in vars(s).items()})
    g = total * float(one_number(factor))
    first = s.beta1 * first + (1 - s.beta1) * g
    second = s.beta2 * second + (1 - s.beta2) * g * g
    change = -s.decay * p - s.step_size * first / (second.sqrt() / s.root_correction + s.eps)
    return {"first": first, "second": second, "change": change, "master": p + change}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_against_fp64(size: int, step: int, factor: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The master is rounded twice (after decay and after the update), by at most half an ulp, 2^-24 of it; the update's
    own operations are at most twelve, each rounded by 2^-24 of it. A moment is two products and a sum, of g rounded."""
    given = state_at(step, size)
    given["total"] = given["total"].to(dtypes[0])
    scalars = scalars_of(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=step)
    truth = exactly(given, factor, scalars)
    got = {name: tensor.clone() for name, tensor in given.items()}
    weight = torch.full((size,), 7.0, dtype=dtypes[1], device=DEVICE)
    update(**got, weight=weight, factor=one_number(factor), scalars=scalars)
    g = (given["total"].double() * factor).abs()
    for name, terms in (("first", given["first"].double().abs() + g), ("second", given["second"].double() + g * g)):
        assert ((got[name] - truth[name]).abs() <= 4 * HALF_ULP * terms).all(), name
    error = (got["master"] - truth["master"]).abs()
    largest = torch.maximum(given["master"].abs(), got["master"].abs()).double()
    cancelled = 4 * HALF_ULP * g / truth["second"].sqrt().clamp_min(1e-30) * scalars.step_size  # in the first moment
    assert (error <= 2 * HALF_ULP * largest + 12 * HALF_ULP * truth["change"].abs() + cancelled).all()
    assert torch.equal(weight, got["master"].to(dtypes[1]))
    assert not got["total"].any()


@pytest.mark.parametrize("step", [1, 2, 10, 1000])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_against_pytorch(step: int, decay: float) -> None:
    """The same update as PyTorch's fused AdamW, but for the master's roundings, some millionths of the update, and what
    rounding left of a first moment that cancels. The millionths are PyTorch's on CUDA: its bias corrections are 1 less
    a power in fp32, good to 4 ulp: of 0.19 at β1 and of the root of 0.0975 at β2 in the second update, 2.5e-6."""
    lr, size = 1e-2, 5000
    given = state_at(step, size)
    leaf = given["master"].clone().requires_grad_()
    plain = torch.optim.AdamW([leaf], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True)
    state = plain.state[leaf]
    state["step"] = torch.tensor(float(step - 1), device=DEVICE)
    state["exp_avg"], state["exp_avg_sq"] = given["first"].clone(), given["second"].clone()
    leaf.grad = given["total"] * 0.37
    plain.step()
    scalars = scalars_of(lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, step=step)
    weight = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    before = given["master"].clone()
    terms = given["first"].abs() + leaf.grad.abs()  # of the first moment, which may cancel
    update(**given, weight=weight, factor=one_number(0.37), scalars=scalars)
    assert ((given["first"] - state["exp_avg"]).abs() <= 4 * HALF_ULP * terms).all()
    torch.testing.assert_close(given["second"], state["exp_avg_sq"], rtol=16 * HALF_ULP, atol=0)
    theirs = leaf.detach()
    ulp = 2 * HALF_ULP * torch.maximum(before.abs(), theirs.abs())
    slack = 4 * HALF_ULP * scalars.step_size * terms / (state["exp_avg_sq"].sqrt() / scalars.root_correction + 1e-8)
    share = 4e-6 if DEVICE == "cuda" else 1e-6
    roundings = ulp * (2 if decay else 1)  # half an ulp each, on either side, of the decay and of the update
    assert ((given["master"] - theirs).abs() <= roundings + share * (theirs - before).abs() + slack).all()
    assert (theirs - before).abs().max() > 0.1 * lr


def test_many_steps_against_pytorch() -> None:
    """Groups with and without decay, learning rates and factors that change: states stay together over 50 updates."""
    torch.manual_seed(0)
    leaves = [torch.randn(300, device=DEVICE), torch.randn(21, device=DEVICE)]
    found = {}
    for one_kernel in (False, True):
        torch.manual_seed(1)
        flats = [leaf.clone().requires_grad_() for leaf in leaves]
        groups = [{"params": [flat], "weight_decay": decay} for flat, decay in zip(flats, (0.1, 0.0), strict=True)]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=not one_kernel)
        weights = [torch.empty(flat.shape, dtype=torch.bfloat16, device=DEVICE) for flat in flats]
        for step in range(50):
            gradients = [torch.randn(flat.shape, device=DEVICE) for flat in flats]
            factor = 0.5 + 0.01 * step
            for group in adamw.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            if one_kernel:
                update_in_one_kernel(adamw, gradients, weights, factor)
            else:
                for flat, gradient in zip(flats, gradients, strict=True):
                    flat.grad = gradient * factor
                adamw.step()
        found[one_kernel] = [flat.detach() for flat in flats]
        assert [adamw.state[flat]["step"].item() for flat in flats] == [50, 50]
    for ours, theirs, leaf in zip(found[True], found[False], leaves, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
        assert (ours - leaf).abs().max() > 1e-2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_no_number_is_no_update(size: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """NaN for a factor empties the sum, whatever is in it, and leaves every other bit."""
    given = state_at(3, size)
    given["total"] = given["total"].to(dtypes[0])
    given["total"][0] = torch.inf
    weight = torch.randn(size, device=DEVICE).to(dtypes[1])  # not what the master would be rounded into
    got, left = {name: tensor.clone() for name, tensor in given.items()}, weight.clone()
    scalars = scalars_of(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=3)
    update(**got, weight=left, factor=one_number(torch.nan), scalars=scalars)
    assert all(torch.equal(got[name], given[name]) for name in ("master", "first", "second"))
    assert torch.equal(left, weight)
    assert not got["total"].any()


def test_operator() -> None:
    given = state_at(3, 40)
    weight = torch.empty(40, dtype=torch.bfloat16, device=DEVICE)
    factor = one_number(0.5)
    torch.library.opcheck(adamw_step_, (*given.values(), weight, factor, 0.9, 0.95, 1e-3, 1e-2, 0.3, 1e-8))
    scalars = scalars_of(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=1)
    empty = {name: tensor[:0] for name, tensor in given.items()}
    update(**empty, weight=weight[:0], factor=factor, scalars=scalars)
    with pytest.raises(ValueError, match=r"weight: needs a contiguous tensor of shape \(40,\).* given \(39,\)"):
        update(**given, weight=weight[1:], factor=factor, scalars=scalars)
    with pytest.raises(ValueError, match=r"first: needs torch\.float32, given torch\.bfloat16"):
        update(**{**given, "first": given["first"].bfloat16()}, weight=weight, factor=factor, scalars=scalars)
    with pytest.raises(ValueError, match=r"factor: needs torch\.float32, given torch\.float64"):
        update(**given, weight=weight, factor=factor.double(), scalars=scalars)


# ---------------------------------------------------------------------------------------------------------------
# In the engine
# ---------------------------------------------------------------------------------------------------------------

KINDS = [(0, Precision.fp32), *((stage, Precision.bf16) for stage in (0, 1, 2, 3))]


def config_of(stage: int, precision: Precision, fused: Toggle = Toggle.on, **engine: Any) -> RunConfig:
    config = run_config(stage, accumulation=2, micro=2, **engine)
    config.engine.precision, config.optim.fused_step = precision, fused
    return config


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
@pytest.mark.parametrize("clip", [0.0, 0.1, 100.0])
def test_course_of_training(build: Build, stage: int, precision: Precision, clip: float) -> None:
    """One step differs from the plain path's by fp32 rounding; later ones too, in bf16 once a weight has been rounded
    the other way by bf16's. The weights are the masters rounded."""
    config = config_of(stage, precision)
    config.optim.grad_clip = clip
    fused = build(config)
    config.optim.fused_step = Toggle.off
    plain = build(config)
    first = [train(one, 0, 1)[0] for one in (fused, plain)]
    assert first[0] == first[1]
    assert all(p.dtype is (torch.float32 if precision is Precision.fp32 else torch.bfloat16) for p in weights(fused))
    for name, master in masters(fused).items():
        torch.testing.assert_close(master, masters(plain)[name], rtol=3e-7, atol=1e-7)
    slack = 1e-5 if precision is Precision.fp32 else 3e-3
    for left, right in zip(train(fused, 1, 8), train(plain, 1, 8), strict=True):
        assert left.updated
        assert left.loss == pytest.approx(right.loss, rel=slack)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=10 * slack)
    state = masters(fused)
    for name, parameter in fused.module.named_parameters():
        assert torch.equal(parameter, state[name].to(parameter.dtype)), name
    assert fused.partition.updates == plain.partition.updates == 8


def weights(one: Engine) -> list[Tensor]:
    return list(one.module.parameters())


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_only_matrices_decay(build: Build, stage: int, precision: Precision) -> None:
    """With a gradient of zero nothing but the decay changes a master."""
    config = config_of(stage, precision)
    config.model.bias = True
    one = build(config)
    before = masters(one)
    one.deepspeed.set_gradient_accumulation_boundary(True)
    one.update(config.optim.lr, 1.0)
    for name, master in masters(one).items():
        decays = before[name].dim() > 1
        expected = before[name] * (1 - config.optim.lr * config.optim.weight_decay) if decays else before[name]
        torch.testing.assert_close(master, expected, rtol=2e-7, atol=0)


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_nonfinite_step_leaves_no_trace(build: Build, stage: int, precision: Precision) -> None:
    one, clean = (build(config_of(stage, precision)) for _ in range(2))
    for each in (one, clean):
        train(each, 0, 2)
    before, plain = state_of(one), one.forward
    one.forward = lambda micro: plain(micro) * torch.nan  # type: ignore[method-assign]
    assert not train(one, 7, 8)[0].updated
    one.forward = plain  # type: ignore[method-assign]
    assert equal(state_of(one), before)
    assert one.partition.updates == 2
    assert train(one, 2, 4) == train(clean, 2, 4)
    assert equal(state_of(one), state_of(clean))


class Launches(TorchDispatchMode):
    """Lists the operators that do something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = (torch.ops.aten.detach, torch.ops.aten.slice, torch.ops.aten.alias)
        if func.overloadpacket not in free and func.namespace != "profiler":
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_an_update_is_one_launch_a_group(build: Build, stage: int, precision: Precision) -> None:
    """Beside it the step counts, in host memory, change and are read; no gradient is left, in a sum or a parameter."""
    one = build(config_of(stage, precision))
    train(one, 0, 1)
    one.accumulate(make_batch(1, one.config))  # type: ignore[arg-type]
    assert any(total.any() for total in one.partition.sums().values())
    factor = one_number(0.5)
    with Launches() as launches:
        one.update(one.config.optim.lr, factor)
    groups = len(one.partition.masters())
    assert groups == 2
    counting = {"aten.add_", "aten._local_scalar_dense"}
    assert [name for name in launches.names if name not in counting] == ["flashtrain.adamw_step_"] * groups
    assert not any(total.any() for total in one.partition.sums().values())
    assert all(parameter.grad is None for parameter in weights(one))


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), KINDS)
@pytest.mark.parametrize("saved", [Toggle.on, Toggle.off])
def test_resume(build: Build, tmp_path: Path, stage: int, precision: Precision, saved: Toggle) -> None:
    """Exact where the path stays; a checkpoint of the plain path is one of this path, whose state it is bit for bit."""
    one = build(config_of(stage, precision, saved))
    train(one, 0, 3)
    checkpoint.save(one, TrainState(step=3), tmp_path, tokenizer_hash="")
    other = build(config_of(stage, precision, Toggle.on))
    loaded = checkpoint.load(other, tmp_path)
    assert loaded is not None
    assert equal(state_of(one), state_of(other))
    assert other.partition.updates == 3
    expected, got = train(one, 3, 5), train(other, 3, 5)
    if saved is Toggle.on:
        assert got == expected
        assert equal(state_of(one), state_of(other))
    assert [r.loss for r in got] == pytest.approx([r.loss for r in expected], rel=3e-3)
    assert other.partition.updates == 5


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    one = Driver()
    yield one
    one.close()


@CPU_ONLY
@pytest.mark.parametrize(("stage", "precision"), [(stage, "bf16") for stage in (0, 1, 2, 3)])
def test_two_ranks(driver: Driver, tmp_path: Path, stage: int, precision: str) -> None:
    """Ranks agree, the losses are those of the plain path, and a killed run goes on bit for bit."""
    found = {}
    for toggle in ("on", "off"):
        folder = tmp_path / toggle
        folder.mkdir()
        assert driver.run(Job(str(folder), 2, stage, precision=precision, fused_step=toggle)).codes == [0, 0], log(
            folder
        )
        found[toggle] = losses(folder)
        assert losses(folder, 1) == found[toggle]
    for step, values in found["on"].items():
        assert values == pytest.approx(found["off"][step], rel=3e-2)
    again = tmp_path / "again"
    again.mkdir()
    job = Job(str(again), 2, stage, precision=precision, fused_step="on")
    killed = Job(**{**vars(job), "fault": "update", "fault_step": 4, "fault_rank": 1})
    assert driver.run(killed).codes[1] == KILLED
    assert driver.run(job).codes == [0, 0], log(again)
    assert losses(again) == found["on"]
    assert content(again) == content(tmp_path / "on")


def test_where_it_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes it on CUDA where the layout is flat and nowhere else; `on` refuses elsewhere and says why."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def takes_it(config: RunConfig, device: torch.device) -> bool:
        return should_fuse_step(config.optim, config.engine, config.engine.precision, device)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for stage, precision in [*KINDS, (0, Precision.fp16)]:
        assert takes_it(config_of(stage, precision, Toggle.auto), cuda)
        assert takes_it(config_of(stage, precision, Toggle.on), cuda)
        assert not takes_it(config_of(stage, precision, Toggle.auto), cpu)
        assert not takes_it(config_of(stage, precision, Toggle.off), cuda)
        with pytest.raises(UserError, match=r"optim\.fused_step=on: needs a CUDA device.* given cpu"):
            takes_it(config_of(stage, precision, Toggle.on), cpu)
    impossible = [(1, Precision.fp32, {}), (1, Precision.fp16, {}), (2, Precision.fp32, {}), (3, Precision.fp32, {})]
    for stage in (1, 2, 3):
        impossible += [(stage, Precision.bf16, {"fp32_accumulation": False})]
        impossible += [(stage, Precision.bf16, {"offload_optimizer": True})]
    impossible += [(2, Precision.bf16, {"lean_zero2": Toggle.off}), (3, Precision.bf16, {"lean_zero3": Toggle.off})]
    impossible += [(3, Precision.bf16, {"offload_params": True})]
    for stage, precision, keys in impossible:
        assert not takes_it(config_of(stage, precision, Toggle.auto, **keys), cuda)
        with pytest.raises(UserError, match=r"optim\.fused_step=on: .* or use optim\.fused_step=auto or off"):
            takes_it(config_of(stage, precision, Toggle.on, **keys), cuda)


# ---------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.alone  # for its memory
def test_more_elements_than_32_bits_count() -> None:
    """2^31 and some: 39 GB. The last block is as right as the first."""
    size = 2**31 + 4099
    made = {name: torch.empty(size, device="cuda") for name in ("master", "total", "first", "second")}
    given = state_at(5, 8192)
    places = [slice(0, 4096), slice(size - 4096, size)]
    for name, tensor in made.items():
        tensor.fill_(0.5)
        for place, part in zip(places, given[name].split(4096), strict=True):
            tensor[place] = part
    weight = torch.empty(size, dtype=torch.bfloat16, device="cuda")
    scalars = scalars_of(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=5)
    update(**made, weight=weight, factor=one_number(0.5), scalars=scalars)
    small = torch.empty(8192, dtype=torch.bfloat16, device="cuda")
    update(**given, weight=small, factor=one_number(0.5), scalars=scalars)
    for place, part in zip(places, (slice(0, 4096), slice(4096, 8192)), strict=True):
        assert all(torch.equal(made[name][place], given[name][part]) for name in made)
        assert torch.equal(weight[place], small[part])
    middle = made["master"][4096:-4096]
    assert middle.min() == middle.max()
    assert not made["total"].any()


@pytest.mark.gpu
def test_compiles_once_and_waits_for_nothing() -> None:
    from training.adamw_kernel import _adamw_kernel

    given = state_at(3, 4096)
    weight = torch.empty(4096, dtype=torch.bfloat16, device="cuda")
    factor = one_number(0.5)

    def one_step(step: int) -> None:
        scalars = scalars_of(lr=1.0 / step, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=step)
        update(**given, weight=weight, factor=factor, scalars=scalars)

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _adamw_kernel.device_caches.values())

    one_step(1)
    torch.cuda.synchronize()
    before = compiled()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 20):
            one_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled() == before


GPU_RUN = """
import json, sys, torch
from configs.schema import Device, Precision, Toggle
from tests.training.conftest import make_batch, make_engine, masters, run_config
from training import distributed

stage = int(sys.argv[1])
own = distributed.init(Device.cuda)
found, states = {}, {}
for toggle in (Toggle.off, Toggle.on):
    config = run_config(stage, accumulation=2, micro=2, compile=Toggle.off)
    config.engine.precision, config.optim.fused_step = Precision.bf16, toggle
    one = make_engine(config, own)
    found[toggle] = []
    for step in range(8):
        batch = make_batch(step, config)
        for micro in batch.micro_batches:
            micro.tokens, micro.targets = micro.tokens.cuda(), micro.targets.cuda()
        found[toggle].append(one.train_step(batch, 1e-2).result().loss)
        if step == 0:
            states[toggle] = masters(one)
    assert all(torch.equal(p, masters(one)[name].to(p.dtype)) for name, p in one.module.named_parameters())
    one.close()
worst = max((states[Toggle.on][name] - master).abs().max().item() for name, master in states[Toggle.off].items())
print(json.dumps({"on": found[Toggle.on], "off": found[Toggle.off], "worst": worst}))
own.close()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_on_a_gpu(stage: int) -> None:
    """The engine's first step with and without the kernel is the same up to rounding, and so are the losses."""
    command = [sys.executable, "-c", GPU_RUN, str(stage)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["worst"] <= 1e-5  # of a step of 1e-2: a GPU adds rows of embeddings in any order
    assert found["on"] == pytest.approx(found["off"], rel=3e-3)
