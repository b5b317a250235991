"""One optimizer step over a global batch, in every ZeRO stage and precision alike.

DeepSpeed runs the backward pass's communication, shards the optimizer and updates the weights. What decides the
result is done here, once for all its wrappers: the loss is the mean over the counted tokens of the global batch, the
gradient's norm is measured, a step with a non-finite loss or gradient is dropped on all ranks before any weight moves,
and clipping, the learning rate and the fp16 loss scale are ours. Where one kernel makes the update (`optim.fused_step`)
the device takes that decision, and the host learns of it a step later; elsewhere the host waits for the norm.

Micro-batch m on rank r contributes the sum L(m, r) over its tokens. DeepSpeed averages gradients over the R ranks and
adds them over micro-batches, so each backward gets L(m, r) · R / T with T the counted tokens of all ranks and
micro-batches, and the result is the gradient of sum(L) / T.

Ranks that share samples (`engine.sequence_parallel_size`) compute the sums of their own tokens, and the exchanges in
attention carry gradients between them: to add up, they need nothing else than ranks with samples of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from configs.schema import OptimConfig, Precision, Recompute, RunConfig
from model.init import host_threads
from model.sequence import own_part
from model.weight_gradient import release_sums
from training.backend import (
    DTYPES,
    check_engine,
    check_fp8,
    deepspeed_config,
    gather_whole_blocks,
    import_deepspeed,
    keeps_plain_linear,
    quiet,
    resolve_precision,
    set_local_rank,
    shard_while_building,
    should_be_lean,
    should_compile,
    should_fuse_step,
    should_fuse_weight_gradients,
)
from training.batch import BatchPlan
from training.distributed import Processes
from training.lean_zero import partition_of
from training.optimizer import LossScale, ReplicatedAdamW, adamw_arguments, fp16_scale
from training.peers import find_peers
from training.step import HostCopy, Step, StepResult, clip_factor, clip_factor_on_device
from training.zero import Bf16Stage1, Partition, Replicated, Stage3, Stage12

if TYPE_CHECKING:
    from data import GlobalBatch, MicroBatch
    from model import GPT

PLAIN_LINEAR = torch.nn.functional.linear


class Engine:
    """A model, its optimizer shards and the step that trains them. Made by `build_engine`."""

    def __init__(
        self,
        deepspeed: Any,
        partition: Partition,
        shapes: dict[str, tuple[int, ...]],
        config: RunConfig,
        precision: Precision,
        processes: Processes,
        decides_on_device: bool,
        restore_environment: Callable[[], None],
    ) -> None:
        self.deepspeed = deepspeed
        self.partition = partition
        self.shapes = shapes
        """Name → shape of each parameter, in the model's order, shared ones once."""
        self.config = config
        self.precision = precision
        self.processes = processes
        self.device = processes.device
        self.decides_on_device = decides_on_device
        """Whether steps are handed over whole, so that the host learns of them a step later (see `training.step`)."""
        self.unread: Step | None = None
        """The last step, if its result may not have been read."""
        self.restore_environment = restore_environment
        self.loss_scale = fp16_scale(config.engine.loss_scale) if precision is Precision.fp16 else LossScale()
        self.skipped = 0
        """Steps dropped for a non-finite loss or gradient."""
        partition.scale(1.0)

    @property
    def module(self) -> GPT:
        """The model."""
        model: GPT = self.deepspeed.module
        return model

    def train_step(self, batch: GlobalBatch, lr: float) -> Step:
        """One update from this rank's micro-batches of the global batch, at learning rate `lr`.

        Waits for the device once, after the backward pass: where the device decides whether to step, for the decision
        of the step before, which the device has long made; else for that of this one.
        """
        if not self.module.training:
            self.module.train()
        totals = self.accumulate(batch)
        squares = gradient_squares(self.partition.gradients(), self.device)
        report = torch.cat([totals, squares])  # (3,)
        if self.processes.world_size > 1:
            dist.all_reduce(report)
        tokens = max(batch.valid_tokens, 1)
        if self.decides_on_device:
            return self.hand_over(report, tokens, lr)
        loss, z_loss, norm = self.means(report.tolist(), tokens)
        if not all(math.isfinite(value) for value in (loss, z_loss, norm)):
            return Step(self.drop(loss, z_loss, norm))
        self.update(lr, clip_factor(norm, self.config.optim.grad_clip))
        return Step(StepResult(loss, z_loss, norm, finite=True, updated=True))

    def means(self, report: list[float], tokens: int) -> tuple[float, float, float]:
        """Mean loss, mean z-loss and gradient norm from their sums over all ranks and the squared norm."""
        loss_sum, z_sum, squared_norm = report
        return loss_sum / tokens, z_sum / tokens, math.sqrt(squared_norm) / self.loss_scale.scale

    def hand_over(self, report: Tensor, tokens: int, lr: float) -> Step:
        """Let the device decide from the report, (3,), whether to step, and how much to clip."""
        factor = clip_factor_on_device(report, self.config.optim.grad_clip)
        step = Step(HostCopy(report), partial(self.learn, tokens))
        self.settle()  # if the step before was no update, this one has its number
        self.update(lr, factor)
        self.unread = step
        return step

    def learn(self, tokens: int, report: list[float]) -> StepResult:
        """What the report says of a step that was handed over. It was counted as an update; if it was none, no more."""
        loss, z_loss, norm = self.means(report, tokens)
        finite = all(math.isfinite(value) for value in (loss, z_loss, norm))
        if not finite:
            self.skipped += 1
            self.partition.updates -= 1
        return StepResult(loss, z_loss, norm, finite=finite, updated=finite)

    def settle(self) -> None:
        """Learn how the last step has ended, if that isn't known yet: then `skipped` and the number of updates are
        right. To be called before the optimizer's state is saved."""
        step, self.unread = self.unread, None
        if step is not None:
            step.result()

    def accumulate(self, batch: GlobalBatch) -> Tensor:
        """Forward and backward of this rank's micro-batches; their summed loss and z-loss, fp64, (2,)."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        factor = self.processes.world_size / max(batch.valid_tokens, 1) * self.loss_scale.scale
        last = len(batch.micro_batches) - 1
        for index, micro in enumerate(batch.micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == last)
            sums = self.forward(micro)
            totals += sums.detach()
            self.deepspeed.backward(sums.sum() * factor, scale_wrt_gas=False)
        return totals

    def forward(self, micro: MicroBatch) -> Tensor:
        """Summed loss and z-loss of a micro-batch, fp32, (2,)."""
        sums: Tensor = self.deepspeed(micro.tokens, micro.targets, micro.cu_seqlens, micro.max_seqlen)
        return sums

    def update(self, lr: float, clip: float | Tensor) -> None:
        """Step the optimizer with gradients multiplied by `clip` and freed of the loss scale.

        A tensor, fp32 (1,), where the device decides: then there is no loss scale, and NaN forgets the gradients.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.partition.scale(clip if isinstance(clip, Tensor) else clip / self.loss_scale.scale)
        self.deepspeed.step()
        self.partition.scale(1.0)
        self.loss_scale.succeeded()

    def drop(self, loss: float, z_loss: float, norm: float) -> StepResult:
        """Forget this step's gradients."""
        self.partition.drop()
        loss_is_good = math.isfinite(loss) and math.isfinite(z_loss)
        cured = loss_is_good and self.loss_scale.overflowed()
        if not cured:
            self.skipped += 1
        return StepResult(loss, z_loss, norm, finite=cured, updated=False)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """Summed cross-entropy in nats, without z-loss, and counted tokens, over all ranks' batches."""
        self.module.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro, counts in self.in_step(batches):
            sums = self.forward(micro)
            if counts:
                totals[0] += sums[0]
                totals[1] += (own_part(micro.targets, self.module.sequence) >= 0).sum()
        if self.processes.world_size > 1:
            dist.all_reduce(totals)
        self.module.train()
        loss, tokens = totals.tolist()
        return loss, int(tokens)

    def in_step(self, batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
        """The batches, and whether they count.

        ZeRO-3 gathers parameters in the forward pass, and ranks that share samples exchange heads, so a rank whose
        batches are finished goes on with its last one, uncounted, until all are.
        """
        alone = self.config.engine.zero_stage < 3 and self.module.sequence is None
        if alone or self.processes.world_size == 1:
            yield from ((micro, True) for micro in batches)
            return
        last: MicroBatch | None = None
        source = iter(batches)
        while True:
            micro = next(source, None)
            if not self.processes.any(micro is not None):
                return
            last = micro or last
            if last is None:
                raise ValueError(
                    "evaluation: this rank has no batch at all, which ZeRO-3 and sequence parallelism can't evaluate"
                )
            yield last, micro is not None

    def close(self) -> None:
        """Undo what DeepSpeed needs: hooks on the model, LOCAL_RANK, and ZeRO-3's replacement of PyTorch's `linear`."""
        release_sums(self.module)
        self.deepspeed.destroy()
        torch.nn.functional.linear = PLAIN_LINEAR
        self.restore_environment()


def gradient_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of this rank's gradients, fp64, (1,) on `device`; NaN or infinite if one of them is."""
    if not gradients:
        return torch.zeros(1, dtype=torch.float64, device=device)
    if gradients[0].is_cuda:
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square()
    else:  # a CPU's norm adds up one by one, 5e-4 off at 12 M elements; its sum goes pairwise
        pieces = [piece for gradient in gradients for piece in gradient.view(-1).split(2**20)]
        squares = torch.stack([piece.float().square().sum() for piece in pieces]).double()
    return squares.sum().to(device).view(1)


def build_engine(model: GPT, config: RunConfig, plan: BatchPlan, processes: Processes, *, draw: bool = True) -> Engine:
    """Wrap the model for training; its weights move to the device, in the run's precision.

    The model may be on the meta device: it gets its initial weights here, in the run's precision; at ZeRO stage 3 a
    part at a time, so that no rank's host memory holds the whole model. Launchers give a rank one thread (torchrun sets
    OMP_NUM_THREADS=1), which suits steps on a GPU; weights are drawn by its share of the host's CPUs. Without `draw`
    they are whatever was in memory, until `checkpoint.load` has put a checkpoint's in their place.

    Raises `UserError` for a combination of `engine.*` keys that the device or DeepSpeed can't do.
    """
    device = processes.device
    precision = resolve_precision(config.engine.precision, device)
    check_engine(config.engine, precision, device)
    check_fp8(config.engine, config.model, precision, device)
    lean = should_be_lean(config.engine)
    one_kernel = should_fuse_step(config.optim, config.engine, precision, device)
    peers = find_peers(config.engine, precision, processes, lean)
    fuse = should_fuse_weight_gradients(config.engine, precision, processes.world_size, peers is not None)
    model.set_recompute(config.engine.recompute is Recompute.block)
    model.set_fp8(config.engine.fp8)
    model.set_sequence_group(processes.sequence_group(config.engine.sequence_parallel_size))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # before ZeRO-3 takes them away
    if config.engine.zero_stage == 0:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[precision])
    settings = deepspeed_config(
        config.engine,
        plan,
        precision,
        num_parameters=count_parameters(model),
        num_block_parameters=count_parameters(model.blocks[0]),
        device=device,
        world_size=processes.world_size,
    )
    deepspeed = import_deepspeed(device)
    compiled = should_compile(config.engine, device)
    if compiled and config.engine.zero_stage == 3:
        gather_whole_blocks(deepspeed, model)
    restore = set_local_rank(device.index or 0)
    with quiet():
        if model.embedding.weight.is_meta:
            with host_threads(processes.cpu_share()):
                if config.engine.zero_stage == 3:
                    shard_while_building(deepspeed, model, settings, DTYPES[precision], draw=draw)
                else:
                    model.materialise("cpu", dtype=DTYPES[precision], draw=draw)
        wrapped, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, config.optim),
            optimizer=lambda groups: build_adamw(groups, config, precision, one_kernel),
            config=settings,
        )
    # DeepSpeed makes a group of its own, with PyTorch's default timeout.
    dist.distributed_c10d._set_pg_timeout(processes.timeout, wrapped.seq_data_parallel_group)
    names = {parameter: name for name, parameter in model.named_parameters()}
    partition = partition_of(
        wrapped.optimizer,
        names,
        processes.rank,
        processes.world_size,
        lean=lean,
        one_kernel=one_kernel,
        peers=peers,
        matrices=model.block_matrices() if fuse else (),
    )
    sums = partition.sums()
    if fuse and sums:
        model.bind_sums(sums)
    if isinstance(partition, Replicated):
        wrapped.zero_grad = lambda: None  # a loop over the parameters, whose gradients hooks have freed
    if processes.world_size == 1 and isinstance(partition, Replicated | Bf16Stage1):
        wrapped.buffered_allreduce_fallback = lambda **_: None  # copies all sums together and back, for one rank too
    if isinstance(partition, Bf16Stage1):
        if processes.world_size > 1:
            wrapped.buffered_allreduce_fallback = partition.average
        if one_kernel:
            partition.step_by_kernel()
    if keeps_plain_linear(config.engine, device, processes.world_size):
        torch.nn.functional.linear = PLAIN_LINEAR  # also after an engine that replaced it and wasn't closed
    if compiled:
        model.compile_blocks()
    on_device = (
        one_kernel
        and precision is not Precision.fp16  # its loss scale is the host's, and the next step's
        and type(partition) not in (Stage12, Stage3)  # DeepSpeed's own step
    )
    return Engine(wrapped, partition, shapes, config, precision, processes, on_device, restore)


def parameter_groups(model: GPT, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices and embeddings decay, norms and biases don't."""
    return [
        {"params": list(parameters), "weight_decay": optim.weight_decay if name == "decay" else 0.0, "name": name}
        for name, parameters in model.decay_groups()
        if parameters
    ]


def build_adamw(groups: list[dict[str, Any]], config: RunConfig, precision: Precision, one_kernel: bool) -> AdamW:
    """The optimizer that DeepSpeed shards, or at stage 0 uses as it is. `one_kernel`: `optim.fused_step`, resolved."""
    arguments = adamw_arguments(config.optim, one_kernel)
    if config.engine.zero_stage > 0:
        return AdamW(groups, **arguments)
    accumulation = torch.float32 if config.engine.fp32_accumulation else DTYPES[precision]
    return ReplicatedAdamW(groups, accumulation, one_kernel, **arguments)


def count_parameters(module: nn.Module) -> int:
    """Weights of the module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
