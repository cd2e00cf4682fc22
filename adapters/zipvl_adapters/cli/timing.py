"""Times on a GPU: replayed graphs, medians, several candidates in turn, and the ceilings they are compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from statistics import median, quantiles

import torch

Call = Callable[[int], object]  # of one candidate, on the input set of that number

SECONDS = 0.12  # spent on a candidate
SAMPLES = (6, 20)  # at least, at most
HEAD_START = 400_000  # clock cycles that the GPU waits, so that a replay is all there when its time begins
SET_BYTES, MAX_SETS = 1_200_000_000, 16  # all input sets together, many times the L2 cache; and how many


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Times":
        """The percentiles of `samples`."""
        fifths = quantiles(samples, n=5, method="inclusive")
        return cls(fifths[0], median(samples), fifths[-1])


def sets_of(num_bytes: int) -> int:
    """How many input sets of `num_bytes` to use in turn, so that none is still in L2 when its turn comes again."""
    return max(1, min(MAX_SETS, ceil(SET_BYTES / max(1, num_bytes))))


def time_calls(
    candidates: Mapping[str, Call],
    sets: int,
    *,
    restore: Callable[[], object] | None = None,
    cold: bool = True,
    seconds: float = SECONDS,
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of each candidate, and why the others gave none.

    A candidate's graph calls it once on every input set. The graphs are replayed in turn, so that a drift of the clocks
    meets all of them alike; `restore` runs before each replay, outside the measured time. `cold` empties L2 after it.
    """
    graphs, failed = {}, {}
    for name, call in candidates.items():
        try:
            graphs[name] = capture(call, sets)
        except Exception as error:  # another package's kernel may raise anything
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    emptied = torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")

    def sample(name: str) -> None:
        if restore:
            restore()
        if cold:
            emptied.zero_()
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graphs[name].replay()
        end.record()
        end.synchronize()
        samples[name].append(begin.elapsed_time(end) / sets)

    rounds = {}
    for name in graphs:
        sample(name)  # also the last of the warm-up
        rounds[name] = max(SAMPLES[0], min(SAMPLES[1], int(seconds * 1000 / (samples[name].pop() * sets))))
    for i in range(max(rounds.values(), default=0)):
        for name in graphs:
            if i < rounds[name]:
                sample(name)
    return {name: Times.of(found) for name, found in samples.items()}, failed


def capture(call: Call, sets: int) -> "torch.cuda.CUDAGraph":
    """A graph of one call on each input set, after a warm-up on the stream that captures."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(sets):
            call(i)
    torch.cuda.synchronize()
    return graph


def ceilings() -> dict[str, float]:
    """What this GPU reaches a second: bytes read and written by a large copy, FLOPs by a large bf16 product."""
    source = torch.randint(1 << 30, (1 << 28,), dtype=torch.int32, device="cuda")
    copy = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(a)

    def moved(i: int) -> object:
        return torch.bitwise_not(source, out=copy)  # by a kernel: a captured copy_ is left to the slower copy engines

    times, _ = time_calls({"copy": moved, "product": lambda i: torch.mm(a, b, out=product)}, 1)
    return {
        "copy_bytes_per_second": 2e3 * source.nbytes / times["copy"].p50,
        "bf16_flops_per_second": 2e3 * 8192**3 / times["product"].p50,
    }
