"""The waterfall on traces made by hand, whose answers are worked out in the tests."""

import gzip
import importlib
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from configs.messages import schema_keys
from configs.schema import Attention, Fp8, Precision, Recompute, RunConfig, Toggle
from model.flops import parameter_counts
from tests.training.conftest import run_config
from training import profile as profile_module
from training.batch import resolve_batch
from training.profile import StepProfiler, annotated
from training.waterfall import Setting, TraceError, Unprofiled, account, build_report, read_trace
from training.waterfall import names as known
from training.waterfall.lanes import Lanes, coarse, draw_lanes, lanes_of
from training.waterfall.names import Category, classify_kernel, classify_operator
from training.waterfall.remedies import remedies_for
from training.waterfall.report import Report
from training.waterfall.show import draw, duration, lines_of, table_of
from training.waterfall.timeline import Span, sweep
from training.waterfall.trace import (
    BACKWARD,
    DATA_WAIT,
    EXCLUDED,
    KERNEL,
    MEMORY,
    OPTIMIZER,
    WINDOW,
    HostEvent,
    Thread,
    parse_trace,
)
from training.waterfall.work import work_of

MAIN, AUTOGRAD = 1, 2
C = Category


class Made:
    """A chrome trace, written in microseconds."""

    def __init__(self, end: float = 1000.0) -> None:
        self.records: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}]
        self.launches = 0
        self.host(WINDOW, 0, end, kind="user_annotation")

    def host(self, name: str, start: float, end: float, thread: int = MAIN, kind: str = "cpu_op") -> "Made":
        self.records.append(event(kind, name, start, end, thread))
        return self

    def kernel(
        self,
        name: str,
        start: float,
        end: float,
        *,
        launched: float | None = None,
        thread: int = MAIN,
        stream: int = 7,
        kind: str = "kernel",
        **arguments: Any,
    ) -> "Made":
        """A device event, and the call that launched it."""
        self.launches += 1
        tie = {"correlation": self.launches}
        if launched is not None:
            self.records.append(event("cuda_runtime", "cudaLaunchKernel", launched, launched + 0.5, thread, **tie))
        self.records.append(event(kind, name, start, end, stream, stream=stream, **tie, **arguments))
        return self

    def account(self, on_device: bool = True) -> Any:
        return account(parse_trace(self.records), on_device=on_device)


def event(kind: str, name: str, start: float, end: float, thread: int, **arguments: Any) -> dict[str, Any]:
    shape = {"ph": "X", "cat": kind, "name": name, "pid": 1, "tid": thread}
    return {**shape, "ts": start, "dur": end - start, "args": arguments}


def micros(times: dict[Category, int]) -> dict[str, float]:
    return {category.value: ns / 1e3 for category, ns in times.items() if ns}


# ---------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------


def test_computation_hides_communication_and_that_hides_copies() -> None:
    made = Made(1000)
    made.kernel("nvjet_tst_128x256", 0, 400, launched=0)
    made.kernel("ncclDevKernel_AllReduce_Sum_bf16", 300, 700, launched=1, stream=20)  # 100 hidden, 300 not
    made.kernel("Memcpy HtoD (Pinned -> Device)", 350, 900, launched=2, stream=13, kind="gpu_memcpy", bytes=8000)
    made.kernel("attention_forward", 600, 650, launched=3)  # hides 50 more of both
    made.kernel("attention_dq", 900, 1000, launched=4)
    found = made.account()
    expected = {"matmul": 400, "communication": 250, "attention_forward": 50, "copies": 200, "attention_backward": 100}
    assert micros(found.times) == expected
    assert found.communication_ns == 400_000
    assert found.hidden_communication_ns == 150_000
    assert found.bytes_copied == 8000
    assert found.total_ns == sum(found.times.values()) == 1_000_000


def test_computation_beside_computation_counts_once() -> None:
    made = Made(100)
    made.kernel("nvjet_a", 0, 60, launched=0)
    made.kernel("attention_dkdv", 20, 100, launched=1, stream=8)
    assert micros(made.account().times) == {"matmul": 60, "attention_backward": 40}


def test_gaps_are_data_host_or_idle() -> None:
    """The device is free from 200 to 500 and from 600 to 700. The batch arrives at 330; what runs at 500 is launched at
    480, and what runs at 700 had been launched before the gap."""
    made = Made(800)
    made.kernel("nvjet_a", 0, 200, launched=0)
    made.host(DATA_WAIT, 150, 330, kind="user_annotation")
    made.kernel("nvjet_b", 500, 600, launched=480)
    made.kernel("nvjet_c", 700, 750, launched=590)
    found = made.account()
    data_wait, late, latency, end = 130, 150, 20 + 100, 50  # nothing follows the last 50: the host's
    assert micros(found.times) == {"matmul": 350, "data_wait": data_wait, "host": late + end, "idle": latency}


def test_what_is_not_training_is_cut_out() -> None:
    made = Made(1000)
    made.kernel("nvjet_a", 0, 300, launched=0)
    made.host(EXCLUDED, 300, 700, kind="user_annotation")
    made.kernel("nvjet_evaluation", 320, 650, launched=310)
    made.kernel("ncclDevKernel_AllReduce", 660, 680, launched=655)
    made.kernel("nvjet_b", 750, 1000, launched=710)
    found = made.account()
    assert micros(found.times) == {"matmul": 550, "host": 10, "idle": 40}
    assert found.total_ns == 600_000
    assert found.communication_ns == 0


def test_window_clips_what_crosses_it() -> None:
    made = Made(100)
    made.kernel("nvjet_before", -50, 10, launched=-60)
    made.kernel("nvjet_after", 90, 140, launched=20)
    assert micros(made.account().times) == {"matmul": 20, "idle": 80 - 10, "host": 10}


def test_unknown_kernels_are_listed() -> None:
    made = Made(100)
    made.kernel("mystery<int>", 0, 30, launched=0)
    made.kernel("mystery<int>", 30, 40, launched=0)
    made.kernel("nvjet_a", 40, 100, launched=1)
    found = made.account()
    assert micros(found.times) == {"matmul": 60, "other": 40}
    assert dict(found.unknown) == {"mystery<int>": 40_000}


def test_cpu_operators_own_their_time_outside_of_what_they_call() -> None:
    made = Made(100)
    made.host("aten::linear", 10, 50).host("aten::addmm", 15, 45).host("aten::empty", 15, 18)
    made.host("autograd::engine::evaluate_function: GeluBackward0", 50, 70).host("aten::gelu_backward", 55, 65)
    made.host("aten::mystery", 80, 85)
    made.host(DATA_WAIT, 90, 96, kind="user_annotation")
    made.host("aten::mm", 0, 100, thread=AUTOGRAD)  # another thread doesn't hold the training thread up
    found = made.account(on_device=False)
    assert micros(found.times) == {"matmul": 40, "activations": 10, "other": 5, "data_wait": 6, "host": 39}
    assert dict(found.unknown) == {"aten::mystery": 5_000}
    assert dict(found.names[C.matmul]) == {"aten::linear": 10_000, "aten::addmm": 30_000}


spans = st.lists(
    st.builds(
        lambda start, length, priority: Span(start, start + length, priority, C.matmul, "x"),
        st.integers(-5, 25),
        st.integers(0, 12),
        st.integers(0, 3),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(spans)
def test_sweep_gives_each_instant_to_the_first_of_the_highest_priority(made: list[Span]) -> None:
    stretches = list(sweep(made, 0, 20))
    assert [s[0] for s in stretches] == [0, *(s[1] for s in stretches)][:-1]  # without gap or overlap
    assert stretches[-1][1] == 20
    for start, end, owner in stretches:
        assert end > start
        for now in range(start, end):
            running = [s for s in made if s.start_ns <= now < s.end_ns]
            best = min(((s.priority, s.start_ns) for s in running), default=None)
            assert best == (None if owner is None else (owner.priority, owner.start_ns))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=10))
def test_own_times_never_overlap_and_cover_all_events(made: list[tuple[int, int]]) -> None:
    """Also where events don't nest, as asynchronous ones do."""
    thread = Thread(HostEvent(str(i), start, start + length) for i, (start, length) in enumerate(made))
    stretches = list(thread.own_times())
    covered = [now for start, end, _ in stretches for now in range(start, end)]
    assert len(covered) == len(set(covered))
    assert set(covered) == {now for start, length in made for now in range(start, start + length)}


def test_launch_is_found_on_its_thread_and_operators_by_their_id() -> None:
    made = Made(100)
    made.host("CompiledFunctionBackward", 5, 50, thread=AUTOGRAD).host(
        "aten::native_layer_norm_backward", 10, 20, AUTOGRAD
    )
    made.kernel("void elementwise_kernel<4>", 30, 60, launched=15, thread=AUTOGRAD)
    made.records.append(event("cpu_op", "aten::gelu", 60, 62, MAIN, **{"External id": 77}))
    made.kernel("void elementwise_kernel<4>", 70, 90, **{"External id": 77})  # no launch recorded
    made.kernel("after_the_operator", 60, 61, launched=25, thread=AUTOGRAD)
    made.kernel("outside_of_all", 61, 62, launched=55, thread=AUTOGRAD)
    first, second, third, fourth = parse_trace(made.records).device
    assert first.stack == ("aten::native_layer_norm_backward", "CompiledFunctionBackward")
    assert first.launched_ns == 15_000
    assert second.stack == ("aten::gelu", WINDOW)
    assert second.launched_ns is None
    assert third.stack == ("CompiledFunctionBackward",)
    assert fourth.stack == ()


def test_trace_without_window_or_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="profiled steps"):
        parse_trace(Made().records[:1])
    with pytest.raises(TraceError, match="CUPTI"):
        Made().account(on_device=True)
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": Made(50).records}).encode()))
    assert read_trace(path).window == HostEvent(WINDOW, 0, 50_000)


# ---------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------

BACKWARD_NODE = "autograd::engine::evaluate_function: AddmmBackward0"
GRADIENT_NODE = "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"


@pytest.mark.parametrize(
    ("name", "stack", "category"),
    [
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NTN", ("aten::addmm",), C.matmul),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", (), C.matmul),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1", (), C.matmul),
        ("nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT", ("aten::_scaled_mm",), C.matmul),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<>>", ("aten::_scaled_mm",), C.matmul),
        ("triton_red_fused__to_copy_abs_amax_clamp_mul_reciprocal_view_2", (), C.casts),
        ("triton_red_fused__to_copy_abs_amax_attention_qkvpacked_clamp_mul_reciprocal_view_3", (), C.casts),
        ("triton_red_fused_abs_add_norm_amax_view_0", (), C.casts),
        ("triton_poi_fused__to_copy_clone_mul_reciprocal_t_5", (), C.casts),
        ("triton_per_fused__to_copy_abs_amax_clamp_1", (), C.casts),
        ("triton_red_fused__to_copy_abs_add_amax_clamp_mul_reciprocal_sigmoid_4", (), C.activations),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", (), C.matmul),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", ("aten::mm", "_LinearCrossEntropy"), C.matmul),
        ("triton_tem_fused_addmm_3", (), C.matmul),
        ("nvjet_tst_128x128", ("aten::bmm", "aten::matmul"), C.attention_forward),
        ("nvjet_tst_128x128", ("aten::bmm", "BmmBackward0", BACKWARD_NODE), C.attention_backward),
        ("forward_kernel", ("flashtrain::attention_qkvpacked",), C.attention_forward),
        ("backward_postprocess", ("flashtrain::attention_qkvpacked_backward",), C.attention_backward),
        ("void elementwise_kernel", ("aten::fill_", "flashtrain::attention_backward"), C.attention_backward),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", (), C.attention_forward),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", (), C.attention_backward),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3", (), C.attention_backward),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", (), C.attention_forward),
        ("triton_tem_fused_flex_attention_0", (), C.attention_forward),
        ("triton_tem_fused_flex_attention_backward_1", (), C.attention_backward),
        ("triton_red_fused__softmax_2", (), C.attention_forward),
        ("triton_red_fused__softmax_backward_data_4", (), C.attention_backward),
        ("triton_red_fused_add_native_layer_norm_0", (), C.norms),
        ("triton_per_fused_native_layer_norm_backward_sum_5", (), C.norms),
        ("_rms_norm_forward_kernel", (), C.norms),
        ("triton_poi_fused_add_1", (), C.norms),
        ("triton_poi_fused_addmm_gelu_2", (), C.activations),
        ("triton_poi_fused_mul_silu_view_2", (), C.activations),
        ("triton_poi_fused__to_copy_add_mul_sigmoid_3", (), C.activations),
        ("_add_norm_kernel", (), C.norms),
        ("_adamw_kernel", (), C.optimizer),
        ("_add_mean_kernel", (BACKWARD,), C.accumulation),
        ("void c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int)", (), C.communication),
        ("Memcpy PtoP (Device -> Device)", ("aten::copy_", BACKWARD), C.communication),
        ("_add_norm_backward_kernel", (), C.norms),
        ("triton_red_fused_sum_7", (), C.elementwise),
        ("triton_poi_fused__to_copy_t_9", (), C.copies),
        ("triton_poi_fused_cat_3", (), C.copies),
        ("_cross_entropy_kernel", ("_LinearCrossEntropy",), C.loss),
        ("void elementwise_kernel", ("aten::mul", "_LinearCrossEntropyBackward"), C.loss),
        ("void elementwise_kernel", ("aten::add_", GRADIENT_NODE, BACKWARD), C.accumulation),
        ("void elementwise_kernel", ("aten::div_", BACKWARD), C.accumulation),
        ("void elementwise_kernel", ("aten::sum", BACKWARD_NODE, BACKWARD), C.elementwise),
        ("multi_tensor_apply_kernel<FusedAdamMath>", ("aten::_fused_adamw_", OPTIMIZER), C.optimizer),
        ("void elementwise_kernel", ("aten::copy_", OPTIMIZER), C.optimizer),
        ("ncclDevKernel_AllGather_RING_LL", ("c10d::_allgather_base_", OPTIMIZER), C.communication),
        ("void elementwise_kernel", ("aten::copy_", "aten::_to_copy"), C.copies),
        ("void vectorized_gather_kernel", ("aten::index_select", "aten::embedding"), C.elementwise),
        ("brand_new_kernel", ("flashtrain::something",), None),
    ],
)
def test_kernels(name: str, stack: tuple[str, ...], category: Category | None) -> None:
    assert classify_kernel(name, KERNEL, (*stack, WINDOW)) is category


def test_copies_of_memory() -> None:
    assert classify_kernel("Memcpy DtoH (Device -> Pinned)", MEMORY, ("aten::copy_", WINDOW)) is C.copies
    assert classify_kernel("Memset (Device)", MEMORY, (OPTIMIZER, WINDOW)) is C.optimizer


@pytest.mark.parametrize(
    ("stack", "category"),
    [
        (("aten::empty", "aten::addmm", "aten::linear"), C.matmul),
        (("aten::mm", "aten::matmul", "_LinearCrossEntropy"), C.matmul),
        (("aten::exp", "_LinearCrossEntropy"), C.loss),
        (("aten::_scaled_dot_product_flash_attention_for_cpu_backward", BACKWARD_NODE, BACKWARD), C.attention_backward),
        (("aten::bmm", "aten::matmul"), C.attention_forward),
        (("c10d::allreduce_", GRADIENT_NODE, BACKWARD), C.communication),
        (("aten::copy_", "gloo:all_reduce"), C.copies),  # runs beside a collective that goes on
        (("aten::add_", GRADIENT_NODE, BACKWARD), C.accumulation),
        (("Optimizer.step#AdamW.step", OPTIMIZER), C.optimizer),
        (("aten::copy_", DATA_WAIT), C.data_wait),
        ((BACKWARD,), C.host),
        (("AddmmBackward0", BACKWARD_NODE, BACKWARD), C.host),
        (("aten::view",), C.host),
        (("## Call CompiledFxGraph abc ##", "CompiledFunction"), C.elementwise),
        (("aten::mystery",), None),
    ],
)
def test_operators(stack: tuple[str, ...], category: Category | None) -> None:
    assert classify_operator((*stack, WINDOW)) is category


def test_our_kernels_are_called_so() -> None:
    """Names in the table are those of the kernels' functions."""
    hopper, portable = "kernels.attention.hopper", "kernels.attention.portable"
    places = ["kernels.attention.flash1", "model.loss_kernel", "model.norm_kernel", "training.adamw_kernel"]
    places += ["training.mean_kernel"]
    places += [f"{portable}.forward", f"{portable}.backward"]
    places += [f"{hopper}.{module}" for module in ("elementwise", "gluon_backward", "gluon_forward")]
    modules = [importlib.import_module(place) for place in places]
    for name in known.OUR_KERNELS:
        assert any(hasattr(module, name) for module in modules), name


# ---------------------------------------------------------------------------------------------------------------
# Work and report
# ---------------------------------------------------------------------------------------------------------------


def setting_of(config: RunConfig | None = None, **changes: Any) -> Setting:
    config = config or run_config(stage=1)
    world_size = changes.get("world_size", 1)
    standard = Setting(
        config=config,
        plan=resolve_batch(config.train, world_size),
        precision=Precision.bf16,
        attention=Attention.flash,
        compiled=True,
        world_size=1,
        on_device=True,
        peak_tflops=989.4,
        peak_source="table",
        device_name="NVIDIA H100 80GB HBM3",
        memory_gb_per_s=3352.0,
    )
    return replace(standard, **changes)


def test_work_by_hand() -> None:
    """Two layers of width 64, 16 tokens a sequence, vocabulary 61 padded to 64, bf16."""
    config = run_config(stage=1)
    work = work_of(config.model, config.engine, Precision.bf16, tokens=64, accumulation=2, world_size=1)
    weights = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256) + 61 * 64
    attention = 64 * 12 * 2 * 64 * 8.5  # (16 + 1) / 2 visible keys
    assert work.flops[C.matmul] == 64 * 6 * weights
    assert work.flops[C.attention_forward] == pytest.approx(attention / 3)
    assert work.flops[C.attention_backward] == pytest.approx(attention * 2 / 3)
    count = parameter_counts(config.model).total
    least = work.least_bytes
    block = least[C.norms] / 5 * 4 + least[C.activations]  # of two layers, without the final norm
    assert block == 64 * 2 * 72 * 64  # 72 E bytes a layer and token
    assert least[C.loss] == 64 * 2 * 2 * 64
    assert least[C.optimizer] == 30 * count
    assert least[C.accumulation] == 0  # inside the products
    assert C.communication not in least
    config.engine.fuse_weight_gradients = Toggle.off
    apart = work_of(config.model, config.engine, Precision.bf16, tokens=64, accumulation=2, world_size=1).least_bytes
    assert apart[C.accumulation] == 10 * count * 2


def test_casts_to_fp8_by_hand() -> None:
    """Two layers of width 64, 64 tokens in two micro-batches. Three bytes an element: of what qkv, up and projection
    are given (3 E) and get back (qkv 3 E, projection and down E each), and of each weight twice. GELU's own, a byte."""
    config = run_config(stage=1)
    plain, cast = (
        work_of(
            config.model, replace(config.engine, fp8=recipe), Precision.bf16, tokens=64, accumulation=2, world_size=1
        )
        for recipe in (Fp8.none, Fp8.rowwise)
    )
    weights = 64 * 192 + 64 * 64 + 2 * 64 * 256
    assert C.casts not in plain.least_bytes
    assert cast.least_bytes[C.casts] == 2 * 3 * (64 * 8 * 64 + 2 * 2 * weights)
    assert cast.least_bytes[C.activations] == plain.least_bytes[C.activations] + 2 * 64 * 2 * 256
    assert cast.flops == plain.flops


@pytest.mark.parametrize(("stage", "per_weight"), [(0, 2 * 4), (1, 4 + 2), (2, 3 * 4 + 2), (3, 3 * 4 + 3 * 2 * 2)])
def test_least_communication(stage: int, per_weight: int) -> None:
    config = run_config(stage)
    work = work_of(config.model, config.engine, Precision.bf16, tokens=64, accumulation=3, world_size=4)
    count = parameter_counts(config.model).total
    assert work.least_bytes[C.communication] == pytest.approx(count * 3 / 4 * per_weight)


def test_exchanged_heads_count_as_communication() -> None:
    """A rank's 64 tokens in two layers: two heads of 32, and as many keys, values and outputs, there and back."""
    plain, shared = (
        work_of(config.model, config.engine, Precision.bf16, tokens=64, accumulation=3, world_size=4).least_bytes
        for config in (run_config(1), run_config(1, sequence_parallel_size=2))
    )
    assert shared[C.communication] - plain[C.communication] == 64 * 2 * (4 * 64) * 2 * 2 / 2


def example(**changes: Any) -> Report:
    """Two steps of 500 µs."""
    made = Made(1000)
    for step in (0, 500):
        made.host(DATA_WAIT, step + 1, step + 6, kind="user_annotation")
        made.kernel("nvjet_a", step + 10, step + 210, launched=step + 8)
        made.kernel("forward_kernel", step + 210, step + 240, launched=step + 9)
        made.kernel("backward_kernel", step + 240, step + 300, launched=step + 10)
        made.kernel("triton_red_fused_add_native_layer_norm_0", step + 300, step + 340, launched=step + 11)
        made.kernel("ncclDevKernel_AllReduce", step + 320, step + 380, launched=step + 12, stream=20)
        made.kernel("mystery", step + 380, step + 390, launched=step + 13)
        made.kernel("_cross_entropy_kernel", step + 400, step + 440, launched=step + 395)
        made.kernel("triton_red_fused_sum_7", step + 440, step + 499, launched=step + 396)
    plain = Unprofiled(8, 450e-6, 0.5, 0.4)
    return build_report(made.account(), 2, setting_of(**changes), plain)


def test_report_adds_up() -> None:
    report = example(peak_tflops=0.5)
    assert report.step_time_s == pytest.approx(500e-6)
    assert sum(part.time_s for part in report.parts) == pytest.approx(report.step_time_s, rel=1e-12)
    assert sum(part.share for part in report.parts) == pytest.approx(1)
    assert sum(part.gap_share for part in report.parts) == pytest.approx(1)
    work = report.setting.work
    assert work.tokens == 2 * 2 * 16
    causal = sum(work.flops.values()) / 500e-6 / 0.5e12
    assert report.mfu_causal == pytest.approx(causal)
    assert sum(part.mfu_lost for part in report.parts) == pytest.approx(1 - causal)
    assert report.mfu == pytest.approx(64 * work.flops_per_token.megatron / 500e-6 / 0.5e12)
    parts = {part.category: part for part in report.parts}
    assert parts[C.matmul].tflops == pytest.approx(work.flops[C.matmul] / 200e-6 / 1e12)
    assert parts[C.attention_backward].tflops == pytest.approx(work.flops[C.attention_backward] / 60e-6 / 1e12)
    assert parts[C.norms].least_gb_per_s == pytest.approx(work.least_bytes[C.norms] / 40e-6 / 1e9)
    assert parts[C.matmul].names == {"nvjet_a": pytest.approx(200e-6)}
    assert report.unknown == {"mystery": pytest.approx(10e-6)}
    assert report.hidden_share == pytest.approx(20 / 60)
    assert report.overhead == pytest.approx(500 / 450 - 1)


def test_report_is_json_and_a_picture_and_lines(tmp_path: Path) -> None:
    report = example()
    read = json.loads(json.dumps(report.to_json()))
    assert read["sum_of_parts_s"] == pytest.approx(read["step_time_s"])
    assert {"matmul", "data_wait", "host", "idle"} <= {part["category"] for part in read["parts"]}
    draw(report, tmp_path / "waterfall.png")
    assert (tmp_path / "waterfall.png").read_bytes().startswith(b"\x89PNG")
    assert table_of(report).row_count == len(report.parts) + 1
    text = "\n".join(lines_of(report))
    for words in ("33% of it hidden", "mystery", "median of 8", "+11.1%", "Remedy 1"):
        assert words in text, text


def test_durations() -> None:
    assert [duration(s) for s in (12.3456, 2.604, 0.1234, 0.0014, 4.37e-5)] == [
        "12.35 s",
        "2,604 ms",
        "123 ms",
        "1.40 ms",
        "0.0437 ms",
    ]


# ---------------------------------------------------------------------------------------------------------------
# Remedies
# ---------------------------------------------------------------------------------------------------------------


def keys_of(report: Report) -> dict[tuple[str, ...], float]:
    return {remedy.keys: remedy.saves_s for remedy in remedies_for(report)}


def changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def test_levers_that_are_pulled_are_not_named() -> None:
    base = run_config(stage=1)
    plain = keys_of(example(compiled=False))
    assert ("engine.compile",) in plain
    assert ("engine.compile",) not in keys_of(example())
    assert ("engine.recompute", "train.micro_batch_size") not in plain
    again = changed(base, "engine", recompute=Recompute.block)
    saved = keys_of(example(config=again))[("engine.recompute", "train.micro_batch_size")]
    assert saved == pytest.approx(200e-6 / 4 + 30e-6 / 2)
    assert ("model.fused",) in keys_of(example())  # off in the tests' model
    assert ("model.fused",) not in keys_of(example(config=changed(base, "model", fused=Toggle.auto)))
    assert ("model.bias",) not in keys_of(example(config=changed(base, "model", bias=False)))
    assert keys_of(example())[("model.bias",)] == pytest.approx(59e-6)


def test_remedies_are_bounded_sorted_and_name_keys_that_exist() -> None:
    settings = [
        example(),
        example(compiled=False, attention=Attention.standard, precision=Precision.fp32, peak_tflops=494.7),
        example(config=changed(run_config(0), "model", vocab_multiple=1), world_size=4),
        example(config=changed(run_config(3), "engine", overlap_comm=False, recompute=Recompute.block), world_size=2),
        example(config=changed(run_config(2), "data", prefetch=0), compiled=False),
        example(config=changed(run_config(1), "engine", offload_optimizer=True)),
    ]
    schema = set(schema_keys(RunConfig))
    seen: set[str] = set()
    for report in settings:
        found = remedies_for(report)
        assert len(found) >= 3
        assert report.remedies == found[:3]
        assert [r.saves_s for r in found] == sorted((r.saves_s for r in found), reverse=True)
        assert all(0 < r.saves_s < report.step_time_s for r in found)
        seen |= {key for r in found for key in r.keys}
    assert seen <= schema
    assert {"engine.precision", "engine.zero_stage", "engine.overlap_comm", "data.prefetch", "model.attention"} <= seen
    assert {"engine.offload_optimizer", "train.micro_batch_size", "train.global_batch_size"} <= seen


def test_fusions_are_remedies_where_they_are_off() -> None:
    unfused = changed(run_config(1), "model", fused_norms=Toggle.off)
    report = example(config=changed(unfused, "engine", fuse_weight_gradients=Toggle.off))
    report = replace(report, parts=[*report.parts, replace(report.parts[0], category=C.accumulation, time_s=5e-5)])
    assert keys_of(report)[("engine.fuse_weight_gradients",)] == 5e-5
    assert keys_of(report)[("model.fused_norms",)] == pytest.approx(40e-6, rel=0.01)  # its few bytes take no time
    on = run_config(1)
    stage_2 = changed(
        changed(run_config(2, lean_zero2=Toggle.off), "model", fused_norms=Toggle.off),
        "engine",
        fuse_weight_gradients=Toggle.off,
    )
    for config in (on, stage_2):
        kept = replace(report, setting=replace(report.setting, config=config))
        assert ("engine.fuse_weight_gradients",) not in keys_of(kept)
        assert (("model.fused_norms",) in keys_of(kept)) == (config is stage_2)
    assert ("model.fused_norms",) not in keys_of(replace(report, setting=replace(report.setting, on_device=False)))


def test_a_step_in_passes_is_a_remedy_where_one_kernel_could_make_it() -> None:
    """Of 50 bytes a weight 12 go: the clipped gradients' way there and back, and the masters read again."""
    config = changed(run_config(1), "optim", fused_step=Toggle.off)
    report = example(config=config)
    report = replace(report, parts=[*report.parts, replace(report.parts[0], category=C.optimizer, time_s=5e-5)])
    assert keys_of(report)[("optim.fused_step",)] == pytest.approx(report.time_of(C.optimizer) * 12 / 50)
    for other in (run_config(1), changed(run_config(2, lean_zero2=Toggle.off), "optim", fused_step=Toggle.off)):
        assert ("optim.fused_step",) not in keys_of(replace(report, setting=replace(report.setting, config=other)))
    assert ("optim.fused_step",) not in keys_of(replace(report, setting=replace(report.setting, on_device=False)))


# ---------------------------------------------------------------------------------------------------------------
# The profiler in a run
# ---------------------------------------------------------------------------------------------------------------


class Counted:
    def work(self, value: int) -> int:
        return value + 1


def test_annotations_come_and_go() -> None:
    owner = Counted()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        with annotated(owner, "work", OPTIMIZER):
            assert owner.work(1) == 2
        assert owner.work(2) == 3
    assert sum(e.name == OPTIMIZER for e in recorded.events()) == 1
    assert vars(owner) == {}


def profiler_of(steps_left: int, num_steps: int = 2) -> StepProfiler:
    config = run_config()
    config.train.profile_steps = num_steps
    processes = SimpleNamespace(is_main=True, world_size=1)
    engine: Any = SimpleNamespace(device=torch.device("cpu"), precision=Precision.fp32, processes=processes)
    peak: Any = SimpleNamespace(tflops=0.1, source="measured", note="", device_name="CPU")
    anything: Any = SimpleNamespace(path=Path())
    return StepProfiler(
        config, config.model, resolve_batch(config.train, 1), engine, peak, anything, anything, steps_left
    )


@pytest.mark.parametrize(("steps_left", "settled"), [(1000, 10), (13, 10), (8, 5), (6, 3)])
def test_profile_comes_late_enough_or_as_late_as_it_can(steps_left: int, settled: int) -> None:
    profiler = profiler_of(steps_left)
    assert profiler.settled == settled
    assert profiler.problem == ""


def test_run_too_short_for_a_profile_says_so_and_goes_on() -> None:
    profiler = profiler_of(5)
    assert "needs 6 steps, and 5 are left" in profiler.problem
    for _ in range(5):
        profiler.begin_step()
        assert profiler.end_step() is None
    assert not profiler.running


@pytest.mark.parametrize("device", ["stuck", "failed", "sound"])
def test_an_unfinished_profile_ends_whatever_the_device_does(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Without its profiler's end where that would wait for the device as well."""
    profiler, come_to_life = profiler_of(1000), threading.Event()
    profiler.meter = SimpleNamespace(report=lambda: None, total=lambda: None)  # type: ignore[assignment]
    engine: Any = profiler.engine
    engine.update, engine.deepspeed = print, SimpleNamespace(backward=print)

    def synchronize() -> None:
        if device == "failed":
            raise RuntimeError("CUDA error: unspecified launch failure")
        if device == "stuck":
            come_to_life.wait(60)

    profiler._start()
    stop, stopped = profiler.profiler.stop, []
    monkeypatch.setattr(profile_module, "STUCK_S", 0.3)
    monkeypatch.setattr(profiler, "_synchronize", synchronize)
    monkeypatch.setattr(profiler.profiler, "stop", lambda: stopped.append((synchronize(), stop())))
    started = time.monotonic()
    profiler.close()
    assert time.monotonic() - started < 10
    assert len(stopped) == (device == "sound")
    assert not profiler.running
    assert engine.update is print, "annotations come off all the same"
    come_to_life.set()
    if device != "sound":
        stop()


def two_lanes(made: Made, on_device: bool) -> Lanes:
    made.host(DATA_WAIT, 0, 5, kind="user_annotation").host(DATA_WAIT, 400, 405, kind="user_annotation")
    return lanes_of(parse_trace(made.records), 3, on_device=on_device)


def test_lanes_of_a_device() -> None:
    """The first of two steps: 100 µs of gathering, of which 60 beside a product; a reduction that ends in the next."""
    made = Made(1000)
    made.kernel("nvjet_a", 10, 110, launched=8).kernel("nvjet_b", 110, 170, launched=8)
    made.kernel("ncclDevKernel_AllGather_RING_LL", 50, 110, launched=8, stream=20)
    made.kernel("ncclDevKernel_AllGather_RING_LL", 200, 240, launched=8, stream=20)
    made.kernel("ncclDevKernel_ReduceScatter_Sum_f32", 390, 450, launched=8, stream=21)
    made.kernel("ncclDevKernel_SendRecv", 500, 600, launched=8, stream=20)
    lanes = two_lanes(made, on_device=True)
    assert lanes.compute == [(10_000, 170_000)]
    assert lanes.communication == {
        "exchange": [],
        "gather": [(50_000, 110_000), (200_000, 240_000)],
        "reduce-scatter": [(390_000, 400_000)],
    }
    assert lanes.to_json() == {
        "rank": 3,
        "step_time_s": 400e-6,
        "compute_s": 160e-6,
        "communication_s": 110e-6,
        "hidden_s": 60e-6,
        "hidden_share": pytest.approx(60 / 110),
    }


def test_lanes_of_a_cpu() -> None:
    """gloo works on threads of its own, beside the training thread; waiting for it is no computation."""
    made = Made(1000).host("aten::mm", 10, 110).host("c10d::allreduce_", 200, 260)
    made.host("gloo:all_reduce", 90, 130, thread=7, kind="user_annotation")
    made.host("gloo:all_gather", 120, 150, thread=8, kind="user_annotation")
    lanes = two_lanes(made, on_device=False)
    assert lanes.compute == [(10_000, 110_000)]
    assert (lanes.communication_ns, lanes.hidden_ns) == (60_000, 20_000)


def test_lanes_need_the_begin_of_a_step() -> None:
    with pytest.raises(TraceError, match=DATA_WAIT):
        lanes_of(parse_trace(Made().records), 0, on_device=False)


def test_lanes_are_drawn_without_gaps_too_fine_to_see(tmp_path: Path) -> None:
    assert coarse([(0, 10), (11, 20), (40, 50)], gap=5) == [(0, 20), (40, 50)]
    assert coarse([], gap=5) == []
    ranks = [Lanes(rank, 1000, [(0, 10), (20, 900)], {"gather": [(800, 950)]}) for rank in range(2)]
    draw_lanes(ranks, tmp_path / "ranks.png", "title")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
