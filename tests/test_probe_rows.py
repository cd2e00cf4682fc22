"""`probe_rows`: the property check, examples, errors, registration."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import zipvl_reference
from zipvl_reference.testing import check_probe_rows

import zipvl_kernels as zk

KERNELS = Path(zk.__file__).parent / "_cuda"
DRAWS = [
    (1000, 64, 64, 0),
    (131072, 64, 64, 3 * 65537 + 1),
    (50, 10, 300, 5),
    (1, 64, 64, 2),
    (65, 64, 64, 1),
    (1000, 0, 5, 2**63 - 1),
    (700, 64, 200, -5),
    (2**31 - 1, 64, 100, 7),
]
CUDA = zk.backends()["cuda"] == "available"


@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package):
    check_probe_rows(package.probe_rows, derandomize=True)


def test_triton_draws_the_same():
    pytest.importorskip("triton")
    drawn = importlib.import_module("zipvl_kernels._triton.probe_rows").probe_rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for num_rows, num_recent, num_random, seed in DRAWS:
        sizes = {"num_recent": num_recent, "num_random": num_random, "seed": seed}
        wanted = zipvl_reference.probe_rows(num_rows, **sizes)
        assert torch.equal(drawn(num_rows, **sizes, device=device).cpu(), wanted)


@pytest.mark.skipif(not CUDA, reason="needs CuPy and a GPU")
@pytest.mark.parametrize(("num_rows", "num_recent", "num_random", "seed"), [*DRAWS, (5000, 700, 3000, 4)])
def test_cuda_draws_the_same(num_rows, num_recent, num_random, seed):
    drawn = importlib.import_module("zipvl_kernels._cuda.probe_rows").probe_rows
    options = {"num_recent": num_recent, "num_random": num_random, "seed": seed}
    got = drawn(num_rows, **options, device="cuda")
    assert torch.equal(got.cpu(), zipvl_reference.probe_rows(num_rows, **options))


PRINT_DRAWS = """
#include <cmath>
#include <cstdio>
#include "permutation.cuh"

int main() {
    Permutation p;
    u32 count;
    while (std::scanf("%u %u %u %u %u %u", &p.key, &p.a, &p.b, &p.walks, &p.n, &count) == 6) {
        Permutation own = permutation_of(p.key, p.n);
        std::printf("%u\\n", own.key == p.key && own.a == p.a && own.b == p.b && own.walks == p.walks && own.n == p.n);
        for (u32 i = 0; i < count; ++i) std::printf("%u\\n", permuted(p, i));
    }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_cuda_arithmetic_is_that_of_the_reference(tmp_path):
    """The permutation of the CUDA kernel, compiled for the CPU: over whole small ranges, and parts of large ones.

    Before its draws each range says whether the kernel itself finds the numbers that the host gives it.
    """
    source, program = tmp_path / "draws.cpp", tmp_path / "draws"
    source.write_text(PRINT_DRAWS)
    macros = ("-D__device__=", "-D__forceinline__=inline", "-std=c++17", "-O2")
    subprocess.run(["g++", *macros, f"-I{KERNELS}", source, "-o", program], check=True)
    reference = importlib.import_module("zipvl_reference.probe_rows")
    sizes = [
        *range(1, 70),
        *(n + more for n in (1024, 2816, 10**6, 2**20, 4099**2, 46339**2, 46340**2) for more in (-1, 0, 1, 2)),
        2**31 - 2,
        2**31 - 1,
    ]
    draws = [(n, reference.seed_key(seed), min(n, 500)) for n in sizes for seed in (0, 1, -5, 2**63 - 1)]
    lines = (f"{key} {' '.join(map(str, reference.halves(n)))} {n} {count}" for n, key, count in draws)
    found = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout.split()
    same = torch.ones(1, dtype=torch.int64)
    wanted = [torch.cat([same, reference._permuted(torch.arange(count), n, key)]) for n, key, count in draws]
    assert torch.equal(torch.tensor([int(x) for x in found]), torch.cat(wanted))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("packed", [0, 1])
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_cuda_kernel_compiles_without_spills(tmp_path, architecture, packed):
    target = [f"-arch=sm_{architecture}", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    macros = ["-DTHREADS=64", f"-DPACKED={packed}"]
    done = subprocess.run(["nvcc", *target, *macros, KERNELS / "probe_rows.cu"], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert "warning" not in said


def test_defaults():
    rows = zk.probe_rows(1000)
    assert rows.shape == (128,)
    assert rows[-64:].tolist() == list(range(936, 1000))
    assert int(rows[63]) < 936


def test_seeds_differ():
    drawn = {tuple(zk.probe_rows(1000, seed=seed).tolist()) for seed in range(20)}
    assert len(drawn) == 20
    overlap = set(zk.probe_rows(1000, seed=2).tolist()[:64]) & set(zk.probe_rows(1000, seed=3).tolist()[:64])
    assert len(overlap) < 20  # 4.4 expected of 64 drawn from 936


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, -(2**63)])
def test_any_seed(seed):
    assert zk.probe_rows(200, seed=seed).shape == (128,)


def test_last_row_is_a_probe_without_recent_ones():
    assert zk.probe_rows(100, num_recent=0, num_random=3)[-1] == 99


def test_few_rows():
    assert zk.probe_rows(5).tolist() == [0, 1, 2, 3, 4]
    assert zk.probe_rows(0).shape == (0,)
    assert zk.probe_rows(1, num_random=0).tolist() == [0]


def test_catches_a_biased_draw():
    def first_rows(num_rows, *, num_recent=64, num_random=64, seed=0, device=None):
        recent = min(num_rows, max(num_recent, 1))
        random = min(num_rows - recent, num_recent + num_random - recent)
        return torch.cat([torch.arange(random), torch.arange(num_rows - recent, num_rows)]).int()

    with pytest.raises(AssertionError, match="about 100 times"):
        check_probe_rows(first_rows, derandomize=True)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "num_rows.*-1", {"num_rows": -1}),
        (ValueError, "num_rows.*int32, got 2147483648", {"num_rows": 2**31}),
        (TypeError, "num_rows.*2.5", {"num_rows": 2.5}),
        (ValueError, "num_recent.*-1", {"num_rows": 8, "num_recent": -1}),
        (ValueError, "num_random.*-3", {"num_rows": 8, "num_random": -3}),
        (TypeError, "num_random.*True", {"num_rows": 8, "num_random": True}),
        (ValueError, "at least one probe", {"num_rows": 8, "num_recent": 0, "num_random": 0}),
        (TypeError, "seed.*'a'", {"num_rows": 8, "seed": "a"}),
        (ValueError, "device: expected .*'foo'", {"num_rows": 8, "device": "foo"}),
        (TypeError, "device: expected .*float", {"num_rows": 8, "device": 5.5}),
        (TypeError, "device: expected .*bool", {"num_rows": 8, "device": True}),
    ],
)
def test_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        zk.probe_rows(**arguments)


def test_registration():
    torch.library.opcheck(torch.ops.zipvl.probe_rows.default, (50, 8, 8, 3, torch.device("cpu")))


def test_compiles():
    def rows_of(x):
        return zk.probe_rows(x.shape[0], num_recent=4, num_random=4, seed=5, device=x.device)

    compiled = torch.compile(rows_of, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 30, 90):
        x = torch.zeros(rows)
        assert torch.equal(compiled(x), rows_of(x))
