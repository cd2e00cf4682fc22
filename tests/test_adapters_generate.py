"""Everything that `generate()` can do, and what callers do to a cache."""

import copy
import weakref

import pytest
import torch
from oracle import held_by
from tiny_models import TEXT_FAMILIES, VISION_FAMILIES, inputs_for, tiny
from transformers import Cache, CompileConfig, DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer
from zipvl_adapters import ZipVLCache, ZipVLPolicy, attach, enable

DENSE = ZipVLPolicy(tau=1.0)
SPARSE = ZipVLPolicy(tau=0.7, num_recent=4, num_random=8)
MODES = {
    "beams": {"num_beams": 3, "do_sample": False},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "sampling": {"do_sample": True},
    "several_samples": {"do_sample": True, "num_return_sequences": 2},
    "static_cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no_cache": {"do_sample": False, "use_cache": False},
}
LOOKUP = {"prompt_lookup_num_tokens": 4, "eos_token_id": 6}  # before 5.10 or so it does not run without an end token
ONE_EACH = ("llava", "internvl", "qwen2_vl", "llama")


def generate(kind, inputs, seed=7, **settings):
    torch.manual_seed(seed)
    return kind.model.generate(**inputs, **{"max_new_tokens": 10} | settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ONE_EACH)
def test_modes_at_tau_1_equal_the_model(family, mode):
    kind = tiny(family)
    inputs = inputs_for(kind, (19, 5, 12))
    stock = generate(kind, inputs, **MODES[mode])
    with attach(kind.model, DENSE):
        assert torch.equal(generate(kind, inputs, **MODES[mode]), stock)


@pytest.mark.parametrize("mode", ["beams", "beams_returned", "sampling", "several_samples"])
def test_modes_when_sparse_are_reproducible(mode):
    kind = tiny("qwen2_vl")
    inputs = inputs_for(kind, (19, 5))
    with attach(kind.model, SPARSE) as session:
        first = generate(kind, inputs, **MODES[mode])
        assert session.stats.kept_ratio < 0.6
        assert torch.equal(generate(kind, inputs, **MODES[mode]), first)


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
def test_beams_of_a_padded_batch_equal_beams_alone(pool):
    """Beams are reordered between sequences of different lengths: the cache has to follow them."""
    kind = tiny("llama")
    inputs = inputs_for(kind, (40, 25))
    # Random probes are drawn among the padded rows: without them, padding changes nothing.
    policy = ZipVLPolicy(tau=0.7, num_recent=8, num_random=0, recompress_interval=4, pool=pool)
    with attach(kind.model, policy):
        beams = generate(kind, inputs, num_beams=3, do_sample=False)
        for row, length in enumerate((42, 27)):
            alone = generate(kind, _row(inputs, row), num_beams=3, do_sample=False)
            assert torch.equal(beams[row, -length - 10 :], alone[0])


def _row(inputs, row):
    real = inputs["attention_mask"][row].bool()
    return {name: value[row : row + 1, real] for name, value in inputs.items()}


@pytest.mark.parametrize("policy", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_streaming(policy):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    kind = tiny("llava")
    inputs = inputs_for(kind)
    streamer = Collect()
    with attach(kind.model, policy):
        whole = generate(kind, inputs, do_sample=False)
        generate(kind, inputs, do_sample=False, streamer=streamer)
    assert streamer.tokens == whole[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("way", ["attach", "cache"])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_prompt_lookup_at_tau_1_equals_the_model(family, way):
    kind = tiny(family)
    inputs = _repetitive(kind)
    settings = {"do_sample": False, "max_new_tokens": 16} | LOOKUP
    stock = generate(kind, inputs, **settings)
    if way == "attach":
        with attach(kind.model, DENSE):
            assert torch.equal(generate(kind, inputs, **settings), stock)
    else:
        enable(kind.model)
        cache = ZipVLCache(DENSE, config=kind.model.config)
        assert torch.equal(generate(kind, inputs, past_key_values=cache, **settings), stock)


@pytest.mark.parametrize("way", ["attach", "cache"])
def test_prompt_lookup_when_sparse_verifies_drafts_whole(way):
    """Drafts are appended and cropped without a trace: what is held are the prompt's tokens and the accepted ones."""
    kind = tiny("llama")
    inputs = _repetitive(kind)
    settings = {"do_sample": False, "max_new_tokens": 16} | LOOKUP
    policy = ZipVLPolicy(tau=0.7, num_recent=8, num_random=8, recompress_interval=3)
    if way == "attach":
        with attach(kind.model, policy) as session:
            out = generate(kind, inputs, **settings)
        cache = session.cache
    else:
        enable(kind.model)
        cache = ZipVLCache(policy, config=kind.model.config)
        if not hasattr(Cache, "activate_past_recording"):
            cache.activate_past_recording()  # older versions of generate() do not say that drafts will come
        out = generate(kind, inputs, past_key_values=cache, **settings)
    assert cache.get_seq_length() == out.shape[1] - 1
    prompt = inputs["input_ids"].shape[1]
    for held in held_by(cache):
        assert held[0, 0, prompt - 1 :].all()
        assert not held.all()


def _repetitive(kind):
    inputs = inputs_for(kind, (24,))
    tail = inputs["input_ids"][0, -12:]
    inputs["input_ids"][0, -24:-12] = tail
    return inputs


@pytest.mark.parametrize("policy", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_assisted_decoding(policy):
    kind, draft = tiny("llama"), tiny("llama", num_hidden_layers=1)
    inputs = inputs_for(kind, (30,))
    stock = generate(kind, inputs, do_sample=False, assistant_model=draft.model)
    with attach(kind.model, policy) as session:
        out = generate(kind, inputs, do_sample=False, assistant_model=draft.model)
    if policy is DENSE:
        assert torch.equal(out, stock)
    assert session.cache.get_seq_length() == out.shape[1] - 1


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, "llava", "internvl"])
def test_a_second_turn_at_tau_1_equals_the_model(family):
    kind = tiny(family)
    inputs = inputs_for(kind, (19, 12))

    def two_turns(cache):
        first = generate(kind, inputs, do_sample=False, past_key_values=cache, max_new_tokens=5)
        more = torch.cat([first, torch.full((2, 9), 33)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, more.shape[1] - inputs["input_ids"].shape[1])], 1)
        rest = {"input_ids": more, "attention_mask": mask.long()}
        return generate(kind, rest, do_sample=False, past_key_values=cache)

    stock = two_turns(DynamicCache(config=kind.model.config))
    enable(kind.model)
    assert torch.equal(two_turns(ZipVLCache(DENSE, config=kind.model.config)), stock)


def test_a_second_turn_continues_inside_attach():
    kind = tiny("llama")
    inputs = inputs_for(kind, (40,))
    with attach(kind.model, SPARSE) as session:
        first = generate(kind, inputs, do_sample=False, return_dict_in_generate=True)
        held = [int(layer.lens) for layer in session.cache.layers]
        more = torch.cat([first.sequences, torch.full((1, 20), 33)], 1)
        second = kind.model.generate(more, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False)
    assert session.cache is first.past_key_values
    assert second.shape[1] == more.shape[1] + 5
    assert [layer.seen for layer in session.stats.layers] == [(21,)] * 3
    for layer, before in zip(session.cache.layers, held, strict=True):
        assert before < int(layer.lens) < before + 21 + 4


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_chunked_prefill_at_tau_1_equals_the_model(family):
    kind = tiny(family)
    inputs = inputs_for(kind, (41, 17))
    stock = generate(kind, inputs, do_sample=False)
    with attach(kind.model, DENSE) as session:
        assert torch.equal(generate(kind, inputs, do_sample=False, prefill_chunk_size=16), stock)
    assert session.stats.layers[0].seen == (43, 19)


def test_chunked_prefill_when_sparse_counts_all_chunks():
    kind = tiny("llama")
    inputs = inputs_for(kind, (41, 17))
    with attach(kind.model, SPARSE) as session:
        generate(kind, inputs, do_sample=False, prefill_chunk_size=16)
    assert session.stats.layers[0].seen == (43, 19)
    assert 0.1 < session.stats.kept_ratio < 0.8
    for layer, held in zip(session.stats.layers, held_by(session.cache), strict=True):
        for b, positions in enumerate(layer.kept_positions):
            assert torch.equal(held[b, 0, :43].nonzero()[:, 0], positions)


@pytest.mark.parametrize("policy", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_users_own_4d_mask_is_obeyed_on_true_positions(policy):
    """Dense fallback: prompt and continuation under a mask of the user's, which hides some columns from some rows."""
    kind = tiny("llama")
    ids = torch.randint(8, 99, (2, 24), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    causal[15:, 3:6] = False
    mask = torch.where(causal, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)

    def run(cache, masks):
        pieces = zip((slice(0, 16), slice(16, 20), slice(20, 24)), masks, strict=True)
        return torch.cat([kind.model(ids[:, p], attention_mask=m, past_key_values=cache).logits for p, m in pieces], 1)

    masks = [mask[:, :, :16, :16], mask[:, :, 16:20, :20], mask[:, :, 20:, :]]
    with torch.no_grad():
        stock = run(DynamicCache(config=kind.model.config), masks)
        enable(kind.model)
        ours = run(ZipVLCache(policy, config=kind.model.config), masks)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


def test_a_4d_mask_over_a_compacted_cache():
    """Columns are looked up by the true positions of what is left."""
    kind = tiny("llama")
    ids = torch.randint(8, 99, (1, 30), generator=torch.Generator().manual_seed(0))
    enable(kind.model)
    plain, masked = (ZipVLCache(SPARSE, config=kind.model.config) for _ in range(2))
    with torch.no_grad():
        for cache in (plain, masked):
            kind.model(ids[:, :24], past_key_values=cache)
            cache.activate_past_recording()
        causal = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
        expected = kind.model(ids[:, 24:], past_key_values=plain).logits
        given = kind.model(ids[:, 24:], attention_mask=causal[:, :, 24:], past_key_values=masked).logits
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
        # One more token, now under a 2-D mask, which has to hide what it masks.
        one = torch.tensor([[40]])
        hidden = torch.ones(1, 31, dtype=torch.long)
        hidden[:, 26:29] = 0
        by_2d = kind.model(one, attention_mask=hidden, past_key_values=copy.deepcopy(masked)).logits
        by_4d = kind.model(one, attention_mask=hidden[:, None, None].bool(), past_key_values=masked).logits
    torch.testing.assert_close(by_2d, by_4d, rtol=0, atol=1e-5)
    assert not torch.allclose(by_2d, expected[:, -1:], atol=1e-3)


def test_a_mask_with_holes_falls_back_to_dense():
    kind = tiny("llama")
    inputs = inputs_for(kind, (30, 30))
    inputs["attention_mask"][0, 8:11] = 0
    with torch.no_grad():
        stock = kind.model(**inputs).logits
        with attach(kind.model, SPARSE) as session:
            ours = kind.model(**inputs).logits
    torch.testing.assert_close(ours[inputs["attention_mask"].bool()], stock[inputs["attention_mask"].bool()])
    assert session.stats.kept_ratio == 1


@pytest.mark.parametrize("make", [DynamicCache, None], ids=["dynamic", "static"])
def test_a_foreign_cache_stays_dense(make):
    kind = tiny("llama")
    inputs = inputs_for(kind, (20, 11))
    stock = generate(kind, inputs, do_sample=False)
    enable(kind.model)
    cache = DynamicCache() if make else StaticCache(config=kind.model.config, max_cache_len=64)
    out = generate(kind, inputs, do_sample=False, past_key_values=cache, disable_compile=True)
    assert torch.equal(out, stock)


def test_reset_and_reuse():
    kind = tiny("llava")
    enable(kind.model)
    cache = ZipVLCache(SPARSE, config=kind.model.config)
    inputs = inputs_for(kind, (19, 7))
    first = generate(kind, inputs, do_sample=False, past_key_values=cache)
    cache.reset()
    assert cache.nbytes == 0
    assert cache.get_seq_length() == 0
    with pytest.raises(RuntimeError, match="no prompt yet"):
        _ = cache.stats
    assert torch.equal(generate(kind, inputs, do_sample=False, past_key_values=cache), first)


def test_crop_goes_back_to_an_earlier_step():
    kind = tiny("llama")
    ids = inputs_for(kind, (40,))["input_ids"]
    enable(kind.model)
    cache = ZipVLCache(SPARSE, config=kind.model.config)
    with torch.no_grad():
        kind.model(ids, past_key_values=cache)
        before = copy.deepcopy(cache)
        for token in (20, 30, 40):
            kind.model(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(torch.tensor(-3))
        assert cache.get_seq_length() == before.get_seq_length() == ids.shape[1]
        one = torch.tensor([[50]])
        again, expected = (kind.model(one, past_key_values=c).logits for c in (cache, before))
    assert torch.equal(again, expected)


def test_batches_are_repeated_selected_and_reordered_whole():
    kind = tiny("llama")
    inputs = inputs_for(kind, (40, 20))
    enable(kind.model)
    cache = ZipVLCache(SPARSE, config=kind.model.config)
    tokens = torch.tensor([[20], [30]])

    def step(cache, rows):
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)[rows]
        return kind.model(tokens[rows], attention_mask=mask, past_key_values=cache).logits

    with torch.no_grad():
        kind.model(**inputs, past_key_values=cache)
        expected = step(copy.deepcopy(cache), [0, 1])
        repeated, selected, reordered = (copy.deepcopy(cache) for _ in range(3))
        repeated.batch_repeat_interleave(2)
        selected.batch_select_indices(torch.tensor([1]))
        reordered.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(step(repeated, [0, 0, 1, 1]), expected[[0, 0, 1, 1]])
        torch.testing.assert_close(step(selected, [1]), expected[[1]])
        torch.testing.assert_close(step(reordered, [1, 0]), expected[[1, 0]])


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_memory_shrinks_layer_by_layer(family):
    """While a layer's prefill runs, no earlier layer's full-length keys and values are alive any more."""
    kind = tiny(family)
    inputs = inputs_for(kind, (30,))
    enable(kind.model)
    cache = ZipVLCache(SPARSE, config=kind.model.config)
    width = inputs["input_ids"].shape[1]
    full_length, alive = [], []

    def watch(layer, original):
        def update(k, v, *args, **kwargs):
            alive.append(sum(ref() is not None for ref in full_length))
            tagged, value = original(k, v, *args, **kwargs)
            assert tagged.shape[2] == width
            full_length.extend(map(weakref.ref, (k, v, tagged)))
            return tagged, value

        layer.update = update

    for layer in cache.layers:
        watch(layer, layer.update)
    with torch.no_grad():
        kind.model(**inputs, past_key_values=cache)
    assert alive == [0, 0, 0]
    assert all(ref() is None for ref in full_length)
    for layer, stats in zip(cache.layers, cache.stats.layers, strict=True):
        rows = max(stats.kept)
        assert rows < width
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes == rows * 2 * 8 * 4
        assert layer.values.untyped_storage().nbytes() == layer.values.nbytes
        assert stats.kv_bytes == 2 * layer.keys.nbytes
        assert stats.kv_bytes_dense == 2 * width * 2 * 8 * 4


def test_a_sequence_is_the_same_alone_and_in_a_batch():
    kind = tiny("qwen3")
    inputs = inputs_for(kind, (40, 40, 40))
    with attach(kind.model, ZipVLPolicy(tau=0.7)) as session, torch.no_grad():
        kind.model(**inputs)
        together = session.stats
        for row in range(3):
            kind.model(**{name: value[row : row + 1] for name, value in inputs.items()})
            for one, all_three in zip(session.stats.layers[:1], together.layers, strict=False):
                assert torch.equal(one.kept_positions[0], all_three.kept_positions[row])


def test_a_compiled_static_cache_is_one_graph_and_equals_the_model():
    """generate()'s own compilation of the decode step: our dense fallback must not break its graph."""
    kind = tiny("llama")
    inputs = inputs_for(kind, (19, 5))
    stock = generate(kind, inputs, do_sample=False)
    once = CompileConfig(backend="eager", mode=None, fullgraph=True)
    once._compile_all_devices = True
    with attach(kind.model, DENSE):
        out = generate(kind, inputs, do_sample=False, cache_implementation="static", compile_config=once)
    assert torch.equal(out, stock)


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_generating_from_embeddings(family):
    kind = tiny(family)
    inputs = inputs_for(kind, (19, 5))
    inputs["inputs_embeds"] = kind.model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs.pop("pixel_values", None)
    stock = generate(kind, inputs, do_sample=False)
    with attach(kind.model, DENSE) as session:
        assert torch.equal(generate(kind, inputs, do_sample=False), stock)
    assert session.cache.get_seq_length() == inputs["inputs_embeds"].shape[1] + 9


def test_a_cache_made_under_inference_mode_goes_on_outside_it():
    kind = tiny("llama")
    ids = inputs_for(kind, (40,))["input_ids"]
    enable(kind.model)
    inside, outside = (ZipVLCache(SPARSE, config=kind.model.config) for _ in range(2))
    with torch.inference_mode():
        kind.model(ids, past_key_values=inside)
    with torch.no_grad():
        kind.model(ids, past_key_values=outside)
        one = torch.tensor([[20]])
        torch.testing.assert_close(
            kind.model(one, past_key_values=inside).logits, kind.model(one, past_key_values=outside).logits
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_decode_step_never_waits_for_the_device():
    kind = tiny("llama")
    kind.model.cuda()
    ids = inputs_for(kind, (40,))["input_ids"].cuda()
    with attach(kind.model, SPARSE), torch.no_grad():
        out = kind.model(ids)
        one = ids[:, :1]
        kind.model(one, past_key_values=out.past_key_values)  # the first step may compile kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            kind.model(one, past_key_values=out.past_key_values)
        finally:
            torch.cuda.set_sync_debug_mode("default")
