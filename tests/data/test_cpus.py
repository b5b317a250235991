"""Counting CPUs where a container or a job has a part of their time: trees of control groups as Linux shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from data import cpus
from data.cpus import available_cpus, cpu_quotas
from data.encode import Encoder
from data.tokenizer import TokenizerInfo

ROOT = Path(__file__).parents[2]

V2 = "31 24 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = """30 24 0:26 {top} /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:11 - cgroup cgroup rw,cpu,cpuacct
31 24 0:27 {top} /sys/fs/cgroup/cpuset ro,nosuid master:12 - cgroup cgroup rw,cpuset"""
OTHERS = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"
HYBRID = V1.format(top="/") + "\n32 24 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


class Host:
    """A made-up /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, groups: str, mounts: str, **files: str) -> None:
        """What /proc/self says, and control files by their path below /sys/fs/cgroup."""
        self.write("proc/self/cgroup", groups)
        self.write("proc/self/mountinfo", f"{OTHERS}\n{mounts}\n")
        for path, text in files.items():
            self.write(f"sys/fs/cgroup/{path}", text)

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """With 64 CPUs."""
    monkeypatch.setattr(cpus, "SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return Host(tmp_path)


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    """The control files of a group of version 1."""
    place = f"cpu,cpuacct/{folder}".rstrip("/")
    return {f"{place}/cpu.cfs_quota_us": f"{quota}\n", f"{place}/cpu.cfs_period_us": f"{period}\n"}


def test_no_control_groups(host: Host) -> None:
    assert available_cpus() == 64
    host("0::/\n", "")
    assert available_cpus() == 64


def test_a_container_of_version_2(host: Host) -> None:
    """Its own group is all it sees."""
    host("0::/\n", V2, **{"cpu.max": "200000 100000\n"})
    assert available_cpus() == 2
    host("0::/\n", V2, **{"cpu.max": "max 100000\n"})
    assert available_cpus() == 64
    assert cpu_quotas() == {}


@pytest.mark.parametrize(
    ("quota", "count"),
    [("150000 100000", 2), ("1000 100000", 1), ("25000 50000", 1), ("9900000 100000", 64), ("300000 50000", 6)],
)
def test_parts_of_a_cpu(host: Host, quota: str, count: int) -> None:
    host("0::/\n", V2, **{"cpu.max": f"{quota}\n"})
    assert available_cpus() == count


def test_any_group_above_may_be_the_narrowest(host: Host) -> None:
    """As of a SLURM job or a systemd service; the topmost has no file, nor has one without the controller."""
    path = "system.slice/slurmstepd.scope/job_7/step_0"
    limits = {"system.slice": "800000", "system.slice/slurmstepd.scope/job_7": "300000", path: "max"}
    host(f"0::/{path}\n", V2, **{f"{folder}/cpu.max": f"{quota} 100000\n" for folder, quota in limits.items()})
    assert available_cpus() == 3
    assert sorted(cpu_quotas().values()) == [Fraction(3), Fraction(8)]


def test_version_1(host: Host) -> None:
    groups = "5:cpuset:/job\n4:cpuacct,cpu:/job/step\n1:name=systemd:/x\n0::/y\n"
    host(groups.replace("cpuacct,cpu", "cpu,cpuacct"), HYBRID, **v1("", -1), **v1("job", 400_000), **v1("job/step", -1))
    assert available_cpus() == 4


def test_a_container_of_version_1(host: Host) -> None:
    """/proc names the group as the host does; what is mounted begins there."""
    host("4:cpu,cpuacct:/docker/abc\n", V1.format(top="/docker/abc"), **v1("", 250_000))
    assert available_cpus() == 3
    host("4:cpu,cpuacct:/docker/abc/inner\n", V1.format(top="/docker/abc"), **v1("inner", 50_000, 50_000))
    assert available_cpus() == 1
    host("4:cpu,cpuacct:/elsewhere\n", V1.format(top="/docker/abc"), **v1("", 250_000))
    assert available_cpus() == 3


def test_a_group_outside_of_what_the_container_sees(host: Host) -> None:
    host("0::/../sibling\n", V2, **{"cpu.max": "200000 100000\n"})
    assert available_cpus() == 2


def test_affinity_counts_as_well(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    host("0::/\n", V2, **{"cpu.max": "800000 100000\n"})
    assert available_cpus() == 2


def test_tokenising_keeps_to_a_quota(host: Host) -> None:
    host("0::/\n", V2, **{"cpu.max": "300000 100000\n"})
    info = TokenizerInfo(300, "<end>", 0, "hash")
    assert Encoder(Path("tokenizer.json"), info, "uint16", 100, num_workers=0).num_workers == 3
    assert Encoder(Path("tokenizer.json"), info, "uint16", 100, num_workers=7).num_workers == 7


def test_a_run_keeps_to_a_quota() -> None:
    """From its start: PyTorch's own number of threads is that of the affinity."""
    script = "import torch; torch.set_num_threads(5); from training import distributed as d\n"
    script += "d.available_cpus = lambda: 3; d.init().close(); print(torch.get_num_threads())"
    free = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    for variables, expected in ((free, "3"), (free | {"OMP_NUM_THREADS": "1"}, "5")):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables | {"CUDA_VISIBLE_DEVICES": ""},
                              capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
        assert done.stdout.strip() == expected
