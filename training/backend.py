"""DeepSpeed, quietly: importing it, and our `EngineConfig` in its terms.

DeepSpeed is imported on first use, since that takes seconds; what it prints goes to Python's `logging`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from configs.errors import UserError
from configs.schema import EngineConfig, Fp8, ModelConfig, OptimConfig, Precision, Toggle
from training.batch import BatchPlan

if TYPE_CHECKING:
    from model import GPT

LOG = logging.getLogger(__name__)
DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}
FP8_CAPABILITY = (8, 9)
"""CUDA's compute capability from which tensor cores multiply in fp8: Ada, Hopper and later."""
NEVER = 2**31  # steps between DeepSpeed's own progress lines


class LogStream(io.TextIOBase):
    """A text stream whose lines become log records."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                LOG.info("%s", line.rstrip())
        return len(text)


def set_local_rank(rank: int) -> Callable[[], None]:
    """Set the one variable of a launcher that DeepSpeed reads, at set-up and in ZeRO-3 at each step; how to undo it."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(rank)

    def undo() -> None:
        if before is not None:
            os.environ["LOCAL_RANK"] = before
        else:
            os.environ.pop("LOCAL_RANK", None)

    return undo


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what Python code prints to the log."""
    with contextlib.redirect_stdout(LogStream()), contextlib.redirect_stderr(LogStream()):
        yield


def import_deepspeed(device: torch.device) -> Any:
    """The `deepspeed` module, set up for this kind of device, without its terminal output."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with quiet():
        import deepspeed
        import deepspeed.ops
    # It would compile a C++ extension for shared-memory collectives on CPUs; gloo does that work without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    log = logging.getLogger("DeepSpeed")
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = True
    # It calls collectives by names that torch 2.13 calls old, which warns at every micro-batch.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    return deepspeed


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """What `engine.precision` means on this device. Raises `UserError` if the device can't do it."""
    cuda = device.type == "cuda"
    has_bf16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision is Precision.auto:
        if not cuda:
            return Precision.fp32
        return Precision.bf16 if has_bf16 else Precision.fp16
    if precision is Precision.bf16 and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"engine.precision=bf16: {name} has no bf16 units; possible: fp16, fp32")
    return precision


def check_engine(config: EngineConfig, precision: Precision, device: torch.device) -> None:
    """Raise `UserError` for what DeepSpeed or the device can't do."""
    stage = config.zero_stage
    if stage not in (0, 1, 2, 3):
        raise UserError(f"engine.zero_stage={stage}: possible are 0, 1, 2 and 3")
    if config.offload_optimizer and stage == 0:
        raise UserError("engine.offload_optimizer=true: needs engine.zero_stage=1, 2 or 3, given 0")
    if config.offload_params and stage != 3:
        raise UserError(f"engine.offload_params=true: needs engine.zero_stage=3, given {stage}")
    if precision is Precision.fp16 and stage > 0 and device.type == "cpu":
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)()
        if not supported:
            raise UserError("engine.precision=fp16: this CPU has no fp16 units; possible: fp32, bf16, or zero_stage=0")


def check_fp8(config: EngineConfig, model: ModelConfig, precision: Precision, device: torch.device) -> None:
    """Raise `UserError` for all that keeps the blocks from `engine.fp8`, also on this device. A CPU emulates it.

    `model`: one that `model.check` finds no fault with.
    """
    if config.fp8 is Fp8.none:
        return
    from model import fp8

    found, asked = fp8.problems(model), f"engine.fp8={config.fp8}"
    if precision is not Precision.bf16:
        found.append(f"{asked}: needs engine.precision=bf16, given {precision}; or use engine.fp8=none")
    if device.type == "cuda":
        capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
        if torch.version.hip is not None or capability < FP8_CAPABILITY:
            found.append(f"{asked}: {name} has no fp8 units that PyTorch can use; use engine.fp8=none")
    if found:
        raise UserError("\n".join(found))


def arithmetic(config: EngineConfig, precision: Precision) -> str:
    """What a run computes in, for people: `bf16`, or `bf16 with fp8 (rowwise)`."""
    return precision.value if config.fp8 is Fp8.none else f"{precision} with fp8 ({config.fp8})"


def should_be_lean(config: EngineConfig) -> bool:
    """Whether ZeRO-2 or 3 sums gradients and steps by our code. Raises `UserError` for `on` where it can't."""
    possible = config.fp32_accumulation and not config.offload_optimizer and not config.offload_params
    toggles = {2: config.lean_zero2, 3: config.lean_zero3}
    for stage, toggle in toggles.items():
        if toggle is Toggle.on and not (config.zero_stage == stage and possible):
            raise UserError(
                f"engine.lean_zero{stage}=on: needs engine.zero_stage={stage}, engine.fp32_accumulation=true, "
                "engine.offload_optimizer=false and engine.offload_params=false, given "
                f"{config.zero_stage}, {str(config.fp32_accumulation).lower()}, "
                f"{str(config.offload_optimizer).lower()} and {str(config.offload_params).lower()}; "
                f"or use engine.lean_zero{stage}=auto or off"
            )
    return possible and toggles.get(config.zero_stage, Toggle.off) is not Toggle.off


def should_sum_in_products(config: EngineConfig, precision: Precision, world_size: int) -> bool:
    """Whether products add weight gradients to the optimizer's fp32 sums over micro-batches."""
    return config.fuse_weight_gradients is not Toggle.off and _can_sum_in_products(config, precision, world_size)


def _can_sum_in_products(config: EngineConfig, precision: Precision, world_size: int) -> bool:
    """Stages 2 and 3 on several ranks reduce each gradient while the backward pass goes on, and fp16 is to notice what
    overflows in fp16."""
    whole = config.zero_stage < 2 or (world_size == 1 and should_be_lean(config))
    return precision is Precision.bf16 and whole and config.fp32_accumulation and not config.offload_optimizer


def should_fuse_weight_gradients(config: EngineConfig, precision: Precision, world_size: int, with_peers: bool) -> bool:
    """Whether layers bring weight gradients to where they are summed themselves. Raises `UserError` for `on` where they
    can't. `with_peers`: whether ranks read each other's memory (`engine.copy_engines`), or may turn out to.
    """
    direct = config.zero_stage == 2 and with_peers and precision is Precision.bf16 and should_be_lean(config)
    summed = _can_sum_in_products(config, precision, world_size)
    if config.fuse_weight_gradients is Toggle.on and not (direct or summed):
        raise UserError(
            "engine.fuse_weight_gradients=on: needs engine.precision=bf16, engine.zero_stage=0, 1, or on one rank 2 "
            "with engine.lean_zero2 or 3 with engine.lean_zero3, or on several 2 with engine.lean_zero2 and "
            "engine.copy_engines, engine.fp32_accumulation=true and engine.offload_optimizer=false, given "
            f"{precision.value}, {config.zero_stage}{'' if with_peers else ' without engine.copy_engines'}, "
            f"{str(config.fp32_accumulation).lower()} and {str(config.offload_optimizer).lower()} on {world_size}; or "
            "use engine.fuse_weight_gradients=auto or off"
        )
    if direct and not summed:
        return config.fuse_weight_gradients is Toggle.on  # not measured yet: docs/mfu_log.md
    return summed and config.fuse_weight_gradients is not Toggle.off


def may_have_peers(config: EngineConfig, precision: Precision, device: torch.device, world_size: int) -> bool:
    """Whether ranks may turn out to read each other's memory (`training.peers.find_peers`)."""
    asked = should_be_lean(config) and config.copy_engines is not Toggle.off
    return asked and world_size > 1 and precision is not Precision.fp32 and device.type == "cuda"


def should_fuse_step(optim: OptimConfig, engine: EngineConfig, precision: Precision, device: torch.device) -> bool:
    """Whether the optimizer steps in one kernel a group. Raises `UserError` for `on` where it can't.

    DeepSpeed's wrapper of the other stages and precisions mixes its step with the loss scale, its buckets or the host's
    memory; `BF16_Optimizer`, our stage 0 and what is left of DeepSpeed's stages 2 and 3 only have flat tensors.
    """
    if optim.fused_step is Toggle.off:
        return False
    from model import loss_kernel

    in_bf16 = engine.zero_stage == 1 and engine.fp32_accumulation and not engine.offload_optimizer
    flat = engine.zero_stage == 0 or (precision is Precision.bf16 and (in_bf16 or should_be_lean(engine)))
    if optim.fused_step is Toggle.on and not (flat and loss_kernel.runs_on(device)):
        raise UserError(
            "optim.fused_step=on: needs a CUDA device, and engine.zero_stage=0, or 1 to 3 with engine.precision=bf16, "
            "engine.fp32_accumulation=true, engine.offload_optimizer=false and, at 2 or 3, engine.lean_zero2 or "
            "lean_zero3, given "
            f"{device.type}, {engine.zero_stage}, {precision.value}, {str(engine.fp32_accumulation).lower()} and "
            f"{str(engine.offload_optimizer).lower()}; or use optim.fused_step=auto or off"
        )
    return flat and (optim.fused_step is Toggle.on or device.type == "cuda")


def should_compile(config: EngineConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: `auto` means on CUDA."""
    return device.type == "cuda" if config.compile is Toggle.auto else config.compile is Toggle.on


def keeps_plain_linear(config: EngineConfig, device: torch.device, world_size: int) -> bool:
    """Whether PyTorch's `linear` stays where ZeRO-3 would have its own, which saves the weights for the backward pass
    by name, so that their memory can be freed meanwhile, and adds biases in a kernel apart.

    A compiled block saves them by name anyway; and Dynamo, which traces the backward pass of DeepSpeed's, guards on the
    number of each parameter: it compiles every block anew up to its limit of eight, and runs the rest uncompiled. On
    one rank, weights stay.
    """
    return should_compile(config, device) or (world_size == 1 and should_be_lean(config))


def gather_whole_blocks(deepspeed: Any, model: GPT) -> None:
    """Have ZeRO-3 gather and free the parameters of a block together, around the block.

    Its hooks would otherwise sit on every module inside, where they break compiled graphs; and one large message uses
    a link better than a dozen small ones.
    """
    deepspeed.utils.set_z3_leaf_modules(model, [type(model.blocks[0])])


def shard_while_building(
    deepspeed: Any, model: GPT, settings: dict[str, Any], dtype: torch.dtype, *, draw: bool
) -> None:
    """Give a model on the meta device its initial weights, those of each module sharded before the next are drawn;
    without `draw` memory alone.

    The same values as built whole and then sharded: drawn on the CPU, in the same order, and rounded. But a rank's
    host memory holds one module instead of 4 bytes a parameter of the model.
    """
    sharded: list[Any] = []
    deepspeed.init_distributed()  # on the run's process group; `zero.Init` would check batches as if it were alone

    def shard(module: nn.Module) -> None:
        own = [parameter for parameter in module.parameters(recurse=False) if not hasattr(parameter, "ds_id")]
        if own and not sharded:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)
        elif own:
            sharded[0].convert_to_zero_parameters(param_list=own)
        sharded.extend(own)

    model.materialise("cpu", shard, dtype, draw=draw)


def deepspeed_config(
    config: EngineConfig,
    plan: BatchPlan,
    precision: Precision,
    *,
    num_parameters: int,
    num_block_parameters: int,
    device: torch.device,
    world_size: int,
) -> dict[str, Any]:
    """DeepSpeed's config; clipping, learning rates and the loss scale, which the engine does itself, aren't in it."""
    settings: dict[str, Any] = {
        # To DeepSpeed ranks that share samples are ranks like others, which all have samples.
        "train_batch_size": plan.micro_batch_size * plan.accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": 0.0,
        "steps_per_print": NEVER,
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device at every micro-batch
    }
    if config.zero_stage == 0:  # `ReplicatedAdamW` keeps masters and sums gradients itself
        settings["communication_data_type"] = "fp32"
        return settings
    settings["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW on the CPU needs no compiler
    settings["zero_optimization"] = zero_section(config, num_parameters, device, world_size)
    if config.zero_stage == 3:
        settings["zero_optimization"] |= gathering(num_block_parameters)
        settings["zero_optimization"]["stage3_allgather_sequential"] = config.gather_in_place
        settings["zero_optimization"]["memory_efficient_linear"] = not keeps_plain_linear(config, device, world_size)
    if precision is Precision.bf16:
        # Non-finite gradients are looked for once, by the engine, before the step.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": False}
    elif precision is Precision.fp16:
        settings["fp16"] = {"enabled": True, "loss_scale": 1.0}
    if config.fp32_accumulation:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def zero_section(config: EngineConfig, num_parameters: int, device: torch.device, world_size: int) -> dict[str, Any]:
    """The `zero_optimization` section of stages 1 to 3."""
    cuda = device.type == "cuda"
    bucket = max(2, min(config.bucket_size, num_parameters + num_parameters % 2))  # it allocates whole buckets
    section: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket - bucket % 2,
        "overlap_comm": config.overlap_comm and cuda and world_size > 1,
    }
    place = {"device": "cpu", "pin_memory": cuda}
    if config.offload_optimizer:
        section["offload_optimizer"] = dict(place)
    if config.offload_params:
        section["offload_param"] = dict(place)
    return section


def gathering(num_block_parameters: int) -> dict[str, Any]:
    """What ZeRO-3 gathers ahead: the next two blocks while this one computes, DeepSpeed's own 50 M elements at least.

    One block ahead, a forward pass often waits for it: NCCL gets multiprocessors only when a product ends (a step of
    723 ms became one of 705, docs/scaling.md). The limit of gathered parameters, DeepSpeed's 10^9 at least, leaves room
    for this block, the next two, and the one that is being freed.
    """
    return {
        "stage3_prefetch_bucket_size": max(50_000_000, 2 * num_block_parameters),
        "stage3_max_live_parameters": max(1_000_000_000, 4 * num_block_parameters),
    }
