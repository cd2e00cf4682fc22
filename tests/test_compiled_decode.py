"""A static cache: what the ragged one generates, by one compiled graph, tokens reselected between steps."""

import re

import pytest
import torch
from test_no_host_read import NoHostRead
from tiny_models import TEXT_FAMILIES, VISION_FAMILIES, inputs_for, tiny
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig
from zipvl_adapters import Policy, ZipVLCache, ZipVLPolicy, ZipVLStaticCache, attach, enable

SPARSE = {"tau": 0.7, "num_recent": 4, "num_random": 8}
N = 13
GREEDY = {"do_sample": False}


def ragged(kind, inputs, policy, n=N, **mode):
    enable(kind.model)
    cache = ZipVLCache(policy, config=kind.model.config)
    torch.manual_seed(3)
    return kind.model.generate(**inputs, past_key_values=cache, max_new_tokens=n, **mode), cache


def static(kind, inputs, policy, n=N, **mode):
    enable(kind.model)
    cache = ZipVLStaticCache(policy, config=kind.model.config, max_new_tokens=n)
    torch.manual_seed(3)
    return kind.model.generate(**inputs, **cache.generate_arguments(), **mode), cache


def compile_config(backend="aot_eager"):
    """For generate(); begins to count graphs anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True  # generate() compiles on GPUs alone, unless told otherwise
    return config


def graphs_and_breaks():
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def assert_same_cache(static_cache, ragged_cache, atol=1e-5):
    """Lengths, true positions, keys and values of what is held."""
    assert int(static_cache.get_seq_length()) == ragged_cache.get_seq_length()
    for ours, theirs in zip(static_cache.layers, ragged_cache.layers, strict=True):
        assert torch.equal(ours.lens, theirs.lens)
        assert torch.equal(ours.anchor, theirs.anchor)
        rows = min(ours.keys.shape[2], theirs.keys.shape[2])
        held = torch.arange(rows, device=ours.lens.device) < ours.lens[..., None]  # [B, G, rows]
        assert torch.equal(ours.positions[..., :rows][held], theirs.positions[..., :rows][held])
        for name in ("keys", "values"):
            x, y = (getattr(layer, name)[:, :, :rows] for layer in (ours, theirs))
            shown = held.repeat_interleave(x.shape[1] // held.shape[1], 1)
            torch.testing.assert_close(x[shown], y[shown], rtol=0, atol=atol)


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
@pytest.mark.parametrize("lengths", [(30,), (30, 5, 14)], ids=["batch1", "batch3"])
@pytest.mark.parametrize("family", [*VISION_FAMILIES, *TEXT_FAMILIES])
def test_uncompiled_equals_the_ragged_cache(family, lengths, pool):
    kind = tiny(family)
    inputs = inputs_for(kind, lengths)
    policy = ZipVLPolicy(**SPARSE, recompress_interval=5, pool=pool)
    want, theirs = ragged(kind, inputs, policy, **GREEDY)
    out, ours = static(kind, inputs, policy, **GREEDY)
    assert torch.equal(out, want)
    assert_same_cache(ours, theirs)
    assert [layer.kv_bytes for layer in ours.stats.layers] == [layer.kv_bytes for layer in theirs.stats.layers]


@pytest.mark.parametrize("family", ["llama", "llava", "internvl", "qwen2_vl", "qwen3_vl"])
def test_generate_compiles_one_graph(family):
    """Three prompts of other lengths, each with a cache of its own: the graph of the first serves all."""
    kind = tiny(family)
    policy = ZipVLPolicy(**SPARSE, recompress_interval=5)
    config = compile_config()
    for lengths in ((30, 5, 14), (27, 31, 3), (8, 9, 40)):
        inputs = inputs_for(kind, lengths)
        want, theirs = ragged(kind, inputs, policy, **GREEDY)
        out, ours = static(kind, inputs, policy, **GREEDY, compile_config=config)
        assert torch.equal(out, want)
        assert_same_cache(ours, theirs)
        assert graphs_and_breaks() == (1, 0)


MODES = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True}, "beams": {"do_sample": False, "num_beams": 3}}


@pytest.mark.parametrize("mode", MODES)
def test_inside_attach(mode):
    """Hooks of attach() and MLPs in parts are part of the graph. generate() does not compile steps of beams."""
    kind = tiny("llama")
    inputs = inputs_for(kind, (30, 5))
    policy = ZipVLPolicy(**SPARSE, recompress_interval=4)
    config = compile_config()
    with attach(kind.model, policy, mlp_rows=16) as session:
        torch.manual_seed(3)
        want = kind.model.generate(**inputs, max_new_tokens=N, **MODES[mode])
        cache = ZipVLStaticCache(policy, config=kind.model.config, max_new_tokens=N)
        torch.manual_seed(3)
        out = kind.model.generate(**inputs, **cache.generate_arguments(), **MODES[mode], compile_config=config)
        assert session.cache is cache
        assert session.stats.kept_ratio < 0.7
    assert torch.equal(out, want)
    assert graphs_and_breaks() == (0 if mode == "beams" else 1, 0)


def test_the_default_interval_of_a_hundred_tokens():
    kind = tiny("llama")
    inputs = inputs_for(kind, (40, 22))
    policy = ZipVLPolicy(**SPARSE)
    config = compile_config()
    want, theirs = ragged(kind, inputs, policy, n=215, **GREEDY)
    out, ours = static(kind, inputs, policy, n=215, **GREEDY, compile_config=config)
    assert torch.equal(out, want)
    assert_same_cache(ours, theirs)
    assert graphs_and_breaks() == (1, 0)
    assert all((layer.lens < layer.seen - 40).all() for layer in ours.layers)  # two windows were thinned out


def test_inductor():
    """Real generated code, in one step of a model with one layer: it takes a C++ compiler seconds."""
    kind = tiny("llama", num_hidden_layers=1)
    inputs = inputs_for(kind, (30, 5))
    policy = ZipVLPolicy(**SPARSE, recompress_interval=5)
    config = compile_config("inductor")
    want, theirs = ragged(kind, inputs, policy, **GREEDY)
    with torch._inductor.config.patch(fx_graph_cache=False):  # a graph that is read from disk shows no code
        (out, ours), codes = run_and_get_code(static, kind, inputs, policy, **GREEDY, compile_config=config)
    assert torch.equal(out, want)
    assert_same_cache(ours, theirs)
    assert graphs_and_breaks() == (1, 0)
    made = {shape for code in codes for shape in re.findall(r"= empty_strided_cpu\((\(.*?\))", code)}
    assert len(made) > 3
    assert str(tuple(ours.layers[0].keys.shape)) not in made  # a step writes into the cache, and never into a copy
    assert str(tuple(ours.layers[0].positions.shape)) not in made


def test_nothing_moves_while_decoding():
    """Storage keeps its addresses, recompression included: what a CUDA graph needs. One capacity for all layers."""
    kind = tiny("llama")
    enable(kind.model)
    policy = ZipVLPolicy(**SPARSE, recompress_interval=3)
    cache = ZipVLStaticCache(policy, config=kind.model.config, max_new_tokens=N)
    names = ("keys", "values", "positions", "lens", "anchor", "seen", "query")
    arguments = cache.generate_arguments()
    addresses = []

    def watch(input_ids, scores, **kwargs):
        addresses.append([getattr(layer, name).data_ptr() for layer in cache.layers for name in names])
        return torch.zeros(len(input_ids), dtype=torch.bool)

    arguments["stopping_criteria"].append(watch)
    kind.model.generate(**inputs_for(kind, (30, 5)), **arguments, **GREEDY)
    assert len(addresses) == N
    assert all(at == addresses[0] for at in addresses)
    assert {layer.keys.shape[2] for layer in cache.layers} == {256}


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
def test_a_step_reads_nothing_on_the_host(pool):
    """The prefill does; what follows does not, reselection included."""
    kind = tiny("llama")
    enable(kind.model)
    policy = ZipVLPolicy(**SPARSE, recompress_interval=2, pool=pool)
    cache = ZipVLStaticCache(policy, config=kind.model.config, max_new_tokens=N)
    between = cache.generate_arguments()["stopping_criteria"]
    with torch.no_grad():
        kind.model(input_ids=inputs_for(kind, (30,))["input_ids"], past_key_values=cache)
        ids = torch.tensor([[9]])
        with NoHostRead():
            for _ in range(5):
                between(ids, None)
                kind.model(input_ids=ids, past_key_values=cache)
    assert all((layer.lens < layer.seen).all() for layer in cache.layers)


def test_a_cache_serves_again_after_reset():
    kind = tiny("llava")
    policy = ZipVLPolicy(**SPARSE, recompress_interval=5)
    out, cache = static(kind, inputs_for(kind, (19, 7)), policy, **GREEDY)
    cache.reset()
    assert cache.nbytes == 0
    again = kind.model.generate(**inputs_for(kind, (19, 7)), **cache.generate_arguments(), **GREEDY)
    assert torch.equal(again, out)


def test_what_is_refused():
    kind = tiny("llama")
    inputs, policy, config = inputs_for(kind, (30,)), ZipVLPolicy(**SPARSE), kind.model.config
    for other in (Policy(), 0.7):
        with pytest.raises(TypeError, match="policy: expected a ZipVLPolicy, got"):
            ZipVLStaticCache(other, config=config, max_new_tokens=N)
    with pytest.raises(ValueError, match="policy: expected one that drops tokens"):
        ZipVLStaticCache(ZipVLPolicy(tau=1.0), config=config, max_new_tokens=N)
    for bad in (0, True, 2.5):
        with pytest.raises(ValueError, match="max_new_tokens: expected an integer of at least 1, got"):
            ZipVLStaticCache(policy, config=config, max_new_tokens=bad)

    enable(kind.model)
    cache = ZipVLStaticCache(policy, config=config, max_new_tokens=N)
    with pytest.raises(RuntimeError, match=r"generate_arguments\(\)"):
        kind.model.generate(**inputs, past_key_values=cache, max_new_tokens=N)
    cache.reset()
    with pytest.raises(ValueError, match=f"max_new_tokens: this ZipVLStaticCache was made for {N}"):
        kind.model.generate(**inputs, **cache.generate_arguments() | {"max_new_tokens": N + 1})
    cache.reset()
    out = kind.model.generate(**inputs, **cache.generate_arguments(), **GREEDY)
    more = {"input_ids": torch.cat([out, out[:, -4:]], 1)}
    with pytest.raises(ValueError, match="reset\\(\\) it for another prompt"):
        kind.model.generate(**more, **cache.generate_arguments(), **GREEDY)
    cache.reset()
    with pytest.raises(NotImplementedError, match="cannot verify drafts"):
        kind.model.generate(**inputs, **cache.generate_arguments(), **GREEDY, prompt_lookup_num_tokens=4)
    cache.reset()
    with pytest.raises(ValueError, match="got 8 more"):
        kind.model.generate(**inputs, **cache.generate_arguments(), **GREEDY, prefill_chunk_size=8)
    cache.reset()
    inputs["attention_mask"][0, 8:11] = 0
    with pytest.raises(ValueError, match="padding masks without holes"):
        kind.model.generate(**inputs, **cache.generate_arguments(), **GREEDY)
