"""The serving example: its allocator loses nothing, answers are generate()'s, too few pages only make it wait."""

import json
import os
import sys
from dataclasses import replace
from functools import cache
from unittest import mock

import hypothesis
import pytest
import serving
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_engine import Engine
from paged_pool import BlockAllocator, OutOfPagesError
from tiny_models import inputs_for, tiny
from zipvl_adapters import ZipVLPolicy, attach
from zipvl_adapters.attention import zipvl_attention
from zipvl_adapters.cli.assets import find_assets

SPARSE = ZipVLPolicy(tau=0.8, num_recent=8, num_random=8, recompress_interval=None)
NEW = 20  # tokens of an answer
picks = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def checked():
    """Tables, lengths and sets are looked at in every call."""
    with mock.patch.dict(os.environ, ZIPVL_CHECK="1"):
        yield


class Allocator(RuleBasedStateMachine):
    """Sequences take, share and give back pages; beside the allocator a plain count of each page's users."""

    @initialize(num_blocks=st.integers(2, 12))
    def start(self, num_blocks):
        self.allocator = BlockAllocator(num_blocks)
        self.num_blocks = num_blocks
        self.sequences = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count):
        free = self.num_blocks - 1 - len(self.counted())
        if count > free:
            with pytest.raises(OutOfPagesError):
                self.allocator.allocate(count)
        else:
            pages = self.allocator.allocate(count)
            assert len(set(pages)) == count
            assert not self.counted().keys() & set(pages), "a page was given out twice"
            assert 0 not in pages
            self.sequences.append(pages)

    @precondition(lambda self: self.sequences)
    @rule(pick=picks, count=st.integers(0, 6))
    def share(self, pick, count):
        pages = self.sequences[pick % len(self.sequences)][:count]
        self.allocator.share(pages)
        self.sequences.append(list(pages))

    @precondition(lambda self: self.sequences)
    @rule(pick=picks, count=st.integers(0, 6))
    def free_the_tail(self, pick, count):
        pages = self.sequences[pick % len(self.sequences)]
        tail = pages[max(len(pages) - count, 0) :]
        self.allocator.free(tail)
        del pages[len(pages) - len(tail) :]

    @rule(page=st.integers(-1, 13), more=st.integers(1, 3))
    def free_what_nobody_has(self, page, more):
        users = self.counted().get(page, 0)
        with pytest.raises(ValueError, match=r"^pages: "):
            self.allocator.free([page] * (users + more))
        if not users:
            with pytest.raises(ValueError, match=r"^pages: "):
                self.allocator.share([page])

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "allocator"):
            counted = self.counted()
            assert [self.allocator.users(page) for page in range(self.num_blocks)] == [
                counted.get(page, 0) for page in range(self.num_blocks)
            ]
            assert self.allocator.num_free == self.allocator.capacity - len(counted)

    def teardown(self):
        for pages in getattr(self, "sequences", []):
            self.allocator.free(pages)
        if hasattr(self, "allocator"):
            everything = self.allocator.allocate(self.allocator.capacity)
            assert sorted(everything) == list(range(1, self.num_blocks)), "pages have leaked"

    def counted(self):
        """Users of each page that somebody has."""
        users = {}
        for pages in self.sequences:
            for page in pages:
                users[page] = users.get(page, 0) + 1
        return users


def test_the_allocator_loses_and_leaks_nothing():
    settings = hypothesis.settings(
        max_examples=60, stateful_step_count=30, derandomize=True, deadline=None, database=None
    )
    hypothesis.stateful.run_state_machine_as_test(Allocator, settings=settings)


def prompts(kind, lengths):
    return [inputs_for(kind, (n,), seed=n) for n in lengths]


def generated(kind, asked, policy, new=NEW):
    """What the model answers to each prompt alone, through the adapters."""
    answers = []
    for inputs in asked:
        with attach(kind.model, policy) if policy else torch.no_grad():
            out = kind.model.generate(**inputs, max_new_tokens=new, do_sample=False)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def served(kind, asked, policy, new=NEW, **pool):
    """The same from the engine; also its requests, and how many it had at once. All pages are free afterwards."""
    engine = Engine(kind.model, policy, **pool)
    requests = [engine.submit(inputs, new) for inputs in asked]
    most = steps = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(engine.running))
        steps += 1
        assert steps < 500, "the engine makes no progress"
        held = sum(len(table) for request in engine.running for table in request.tables)
        assert engine.cache.allocator.num_free + held == engine.cache.allocator.capacity
    assert engine.cache.share_in_use == 0
    assert all(request.is_done for request in requests)
    return [request.tokens for request in requests], requests, most


@pytest.mark.parametrize("table_per_layer", [False, True])
@pytest.mark.parametrize("policy", [None, SPARSE], ids=["dense", "zipvl"])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_answers_are_those_of_generate(family, policy, table_per_layer):
    """Prompts of several lengths, joining and leaving the batch at different steps."""
    kind = tiny(family)
    asked = prompts(kind, (40, 23, 57, 31))
    expected = generated(kind, asked, policy)
    # 29 pages of 4 rows: not enough for all four at once.
    tokens, requests, most = served(kind, asked, policy, num_blocks=30, block_size=4, table_per_layer=table_per_layer)
    assert tokens == expected
    assert len({tuple(answer) for answer in tokens}) == len(tokens), "the prompts should tell answers apart"
    assert most > 1
    if policy:
        assert all(0.1 < request.kept < 0.95 for request in requests)


def test_a_policy_that_keeps_all():
    kind = tiny("llama")
    asked = prompts(kind, (30,))
    everything = replace(SPARSE, tau=1.0)
    expected = generated(kind, asked, everything)
    tokens, requests, _ = served(kind, asked, everything, num_blocks=20, block_size=8)
    assert tokens == expected
    assert requests[0].kept == 1


def test_text_after_a_picture():
    """Qwen-VL's rotary positions: what a prompt with a picture leaves in the model is not another one's."""
    picture = inputs_for(tiny("qwen2_vl"), (20,))
    text = {"input_ids": picture["input_ids"][:, -15:]}
    expected = [*generated(tiny("qwen2_vl"), [picture], SPARSE), *generated(tiny("qwen2_vl"), [text], SPARSE)]
    tokens, _, _ = served(tiny("qwen2_vl"), [picture, text], SPARSE, num_blocks=40, block_size=4)
    assert tokens == expected


def test_a_stop_token_ends_an_answer():
    kind = tiny("llama")
    asked = prompts(kind, (30,))
    [whole] = generated(kind, asked, SPARSE)
    stop = whole[5]
    tokens, _, _ = served(kind, asked, SPARSE, num_blocks=20, block_size=8, stop_tokens=[stop])
    assert tokens == [whole[: whole.index(stop) + 1]]


@cache
def three_prompts():
    """Their inputs and answers, and how many tokens the longest may come to."""
    kind = tiny("llama", seed=3)
    asked = prompts(kind, (12, 30, 21))
    return asked, generated(kind, asked, SPARSE, new=10), 32 + 10 - 1


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, database=None)
@hypothesis.given(spare=st.integers(0, 12), block_size=st.sampled_from([1, 3, 8, 16]), table_per_layer=st.booleans())
def test_too_few_pages_only_make_it_wait(spare, block_size, table_per_layer):
    """Down to a pool that holds one request and no more: requests wait, or give way and come back."""
    asked, expected, longest = three_prompts()
    pool = {"num_blocks": 1 + -(-longest // block_size) + spare, "block_size": block_size}
    tokens, _, _ = served(tiny("llama", seed=3), asked, SPARSE, new=10, table_per_layer=table_per_layer, **pool)
    assert tokens == expected


def test_the_youngest_gives_way():
    """Two prompts fill the pool: the second one's pages go to the first, and it starts again when there are some."""
    kind = tiny("llama")
    asked = prompts(kind, (14, 14, 13))  # 16 tokens each, and 15: 4 pages, of 9
    expected = generated(kind, asked, None)
    tokens, requests, most = served(kind, asked, None, num_blocks=10, block_size=4)
    assert tokens == expected
    assert requests[0].preemptions == 0 < requests[1].preemptions
    assert most == 2


def test_admission():
    kind = tiny("llama")
    engine = Engine(kind.model, None, num_blocks=11, block_size=4)
    with pytest.raises(ValueError, match=r"^inputs: 40 \+ 20 tokens may need 15 pages, the pool has 10$"):
        engine.submit(inputs_for(kind, (38,)), 20)
    with pytest.raises(ValueError, match=r"^inputs: expected one prompt"):
        engine.submit(inputs_for(kind, (9, 9)), 20)
    long, short = engine.submit(inputs_for(kind, (22,)), 3), engine.submit(inputs_for(kind, (18,)), 3)
    shorter = engine.submit(inputs_for(kind, (2,)), 3)
    engine.step()  # 6 pages of 10: the next one needs 5, and the one behind it has to wait its turn
    assert (engine.running, list(engine.waiting)) == ([long], [short, shorter])
    while not long.is_done:
        engine.step()
    assert engine.running == [short, shorter]


@pytest.mark.parametrize("policy", [ZipVLPolicy(), ZipVLPolicy(pool="kv_head", recompress_interval=None)])
def test_policies_that_it_cannot_follow(policy):
    with pytest.raises(ValueError, match=r"^policy: "):
        Engine(tiny("llama").model, policy, num_blocks=4)


def test_eviction_makes_room():
    """The same pool: a table for each layer serves more at once than one table, and that more than dense."""
    kind = tiny("llama", num_hidden_layers=4)
    asked = prompts(kind, range(50, 66))
    few = replace(SPARSE, tau=0.6)
    # A page of one table comes free when no layer needs it, else when its own layer does not.
    most = [
        served(kind, asked, policy, new=4, num_blocks=50, block_size=4, table_per_layer=table_per_layer)[2]
        for policy, table_per_layer in ((None, False), (few, False), (few, True))
    ]
    assert most[0] < most[1] < most[2]


def test_the_demonstration(tmp_path, monkeypatch, capsys):
    """Three questions, and a pool for one and a half of them."""
    found = find_assets()
    three = replace(found, tasks={task: found.tasks[task] for task in ("colour_shape", "relation", "code")})
    monkeypatch.setattr(serving, "find_assets", lambda: three)
    monkeypatch.setattr(serving, "PER_TASK", 1)
    monkeypatch.setattr(serving, "NUM_BLOCKS", 59)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["serving.py", "--out", str(tmp_path / "out")])
    serving.main()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"serving.png", "serving.json"}
    record = json.loads((tmp_path / "out" / "serving.json").read_text())
    assert [run["mode"] for run in record["runs"]] == list(serving.MODES)
    assert all(run["right"] >= 2 and len(run["history"]) == run["steps"] for run in record["runs"])
    dense, one_table, table_per_layer = (run["most_at_once"] for run in record["runs"])
    assert dense == 1 <= one_table < table_per_layer
    assert " of 3" in capsys.readouterr().out


def test_continuous_batching_of_transformers_is_refused():
    """What docs/integration.md says is missing there: nothing is computed wrongly meanwhile."""
    kind = tiny("llama")
    with attach(kind.model, SPARSE), pytest.raises(ValueError, match="zipvl is not supported for continuous batching"):
        kind.model.generate_batch(inputs=[[9, 10, 11]], max_new_tokens=2)
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"^cache: paged caches \(generate_batch, continuous batching\) are not"):
        zipvl_attention(None, q, q[:, :2], q[:, :2], None, cache=object())
