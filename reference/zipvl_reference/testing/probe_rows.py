"""Checks of `probe_rows`."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from zipvl_reference.testing.budget import assert_same_bits
from zipvl_reference.testing.draw import for_each, st


def check_probe_rows(
    fn: Callable[..., Tensor], *, device: str = "cpu", max_examples: int = 50, derandomize: bool = False
) -> None:
    """Number, order and range of the rows, the same on every device and at every run, and a uniform draw."""

    def test(case: tuple[int, int, int, int]) -> None:
        num_rows, num_recent, num_random, seed = case
        rows = fn(num_rows, num_recent=num_recent, num_random=num_random, seed=seed, device=device)
        listed = rows.tolist()
        assert rows.dtype == torch.int32
        assert rows.device.type == torch.device(device).type
        assert rows.shape == (min(num_rows, num_recent + num_random),)
        assert listed == sorted(set(listed)), f"expected ascending, distinct rows, got {listed}"
        wanted = range(max(0, num_rows - max(num_recent, 1)), num_rows)
        assert set(wanted) <= set(listed) <= set(range(num_rows)), f"expected {wanted} and rows below, got {listed}"
        again = fn(num_rows, num_recent=num_recent, num_random=num_random, seed=seed, device="cpu")
        assert_same_bits("the same seed", again, rows.cpu())

    sizes = st.tuples(st.integers(0, 300), st.integers(0, 80), st.integers(0, 80), st.integers(0, 2**40))
    for_each(sizes.filter(lambda c: c[1] + c[2] > 0), test, max_examples=max_examples, derandomize=derandomize)

    # 5 of 20 rows over 400 seeds: each row is expected 100 times, with a standard deviation below 9
    drawn = Counter(
        row for seed in range(400) for row in fn(24, num_recent=4, num_random=5, seed=seed, device=device).tolist()
    )
    times = [drawn[row] for row in range(20)]
    assert all(55 <= n <= 145 for n in times), f"expected every row about 100 times in 400 draws, got {times}"
