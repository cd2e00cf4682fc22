"""Token for token what the unmodified model generates; logit for logit what an oracle with a full cache computes."""

import pytest
import torch
from oracle import Oracle, alive_of, held_by, judged_by
from tiny_models import PAD, TEXT_FAMILIES, VISION_FAMILIES, inputs_for, tiny
from zipvl_adapters import ZipVLCache, ZipVLPolicy, attach, enable

FAMILIES = VISION_FAMILIES + TEXT_FAMILIES
BATCHES = {"batch1": (19,), "batch3": (19, 5, 12)}
SPARSE = ZipVLPolicy(tau=0.7, num_recent=4, num_random=8)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tau_1_generates_what_the_model_generates(family, lengths):
    kind = tiny(family)
    inputs = inputs_for(kind, lengths)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    stock = kind.model.generate(**inputs, **greedy)
    with attach(kind.model, ZipVLPolicy(tau=1.0)) as session:
        attached = kind.model.generate(**inputs, **greedy)
    assert torch.equal(attached, stock)
    assert session.stats.kept_ratio == 1
    assert [layer.seen for layer in session.stats.layers] == [tuple(inputs["attention_mask"].sum(1).tolist())] * 3
    assert torch.equal(kind.model.generate(**inputs, **greedy), stock)

    enable(kind.model)
    cache = ZipVLCache(ZipVLPolicy(tau=1.0), config=kind.model.config)
    assert torch.equal(kind.model.generate(**inputs, **greedy, past_key_values=cache), stock)
    assert torch.equal(kind.model.generate(**inputs, **greedy), stock)  # without a ZipVLCache: dense
    assert torch.equal(kind.model.generate(**inputs, **greedy, use_cache=False), stock)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_logits_equal_a_masked_full_cache(family, lengths):
    kind = tiny(family)
    inputs = inputs_for(kind, lengths)
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with attach(kind.model, SPARSE) as session:
        sparse = kind.model.generate(**inputs, **settings)
    width = inputs["input_ids"].shape[1]
    assert session.stats.kept_ratio < 0.6
    with judged_by(kind.model, Oracle(alive_of(session.stats, width))):
        full = kind.model.generate(**inputs, **settings)
    assert torch.equal(sparse.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(sparse.logits), torch.stack(full.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_prefill_equals_the_oracle(family):
    """Rows that are not kept too: their attention is zero, and the rest of the model goes on."""
    kind = tiny(family)
    inputs = inputs_for(kind, (19, 5, 12))
    with torch.no_grad():
        with attach(kind.model, SPARSE) as session:
            sparse = kind.model(**inputs).logits
        with judged_by(kind.model, Oracle(alive_of(session.stats, sparse.shape[1]))):
            full = kind.model(**inputs).logits
    torch.testing.assert_close(sparse, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("second", [37, 12], ids=["padded", "starts_in_a_later_chunk"])
@pytest.mark.parametrize("pool", ["layer", "kv_head"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_turns_and_chunks_equal_the_oracle(family, pool, second):
    """Prompt, two tokens, a second turn, two tokens: new rows see the compacted past and what is kept of the new."""
    kind = tiny(family)
    ids = inputs_for(kind, (50, second, 44), seed=3)["input_ids"]
    mask = (ids != PAD).long()
    policy = ZipVLPolicy(tau=0.7, num_recent=4, num_random=8, pool=pool)
    pieces = [slice(0, 30), slice(30, 31), slice(31, 32), slice(32, 48), slice(48, 49), slice(49, ids.shape[1])]
    enable(kind.model)
    with torch.no_grad():
        cache = ZipVLCache(policy, config=kind.model.config)
        sparse, alive = [], []
        for piece in pieces:
            out = kind.model(ids[:, piece], attention_mask=mask[:, : piece.stop], past_key_values=cache)
            sparse.append(out.logits)
            alive.append(held_by(cache))
        full_cache = None
        for piece, logits, held in zip(pieces, sparse, alive, strict=True):
            with judged_by(kind.model, Oracle(held)):
                out = kind.model(
                    ids[:, piece], attention_mask=mask[:, : piece.stop], past_key_values=full_cache, use_cache=True
                )
            full_cache = out.past_key_values
            torch.testing.assert_close(logits, out.logits, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == ids.shape[1]
    assert all(int(layer.lens.max()) < 45 for layer in cache.layers)


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
def test_recompression_equals_the_rule_in_plain_words(pool):
    kind = tiny("llama")
    inputs = inputs_for(kind, (30, 21))
    settings = {"max_new_tokens": 23, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    policy = ZipVLPolicy(tau=0.8, num_recent=4, num_random=8, recompress_interval=6, pool=pool)
    enable(kind.model)
    before = ZipVLCache(policy, config=kind.model.config)
    with torch.no_grad():
        kind.model(**inputs, past_key_values=before)
    cache = ZipVLCache(policy, config=kind.model.config)
    sparse = kind.model.generate(**inputs, **settings, past_key_values=cache)
    oracle = Oracle(held_by(before), interval=6, tau=0.8)
    with judged_by(kind.model, oracle):
        full = kind.model.generate(**inputs, **settings)
    torch.testing.assert_close(torch.stack(sparse.logits), torch.stack(full.logits), rtol=0, atol=1e-5)
    for layer, held, alive in zip(cache.layers, held_by(cache), oracle.alive, strict=True):
        assert torch.equal(held, alive)
        assert int(layer.lens.max()) < int(before.layers[layer.index].lens.max()) + 22  # it did shrink


def test_a_manual_loop_counts_true_positions():
    """Positions come from `get_seq_length()`, which has to be the number of tokens seen and not of those held."""
    kind = tiny("llama")
    ids = inputs_for(kind, (40,))["input_ids"]
    with attach(kind.model, SPARSE) as session, torch.no_grad():
        expected = kind.model.generate(ids, max_new_tokens=6, do_sample=False)
        out = kind.model(ids)
        for _ in range(5):
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
            assert session.cache.get_seq_length() == ids.shape[1] - 1
            out = kind.model(ids[:, -1:], past_key_values=out.past_key_values)
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, expected)


def test_a_masked_last_row_is_computed_and_not_kept():
    kind = tiny("llama")
    inputs = inputs_for(kind, (30, 30))
    inputs["attention_mask"][1, -7:] = 0
    with attach(kind.model, SPARSE) as session, torch.no_grad():
        sparse = kind.model(**inputs).logits
    assert all(int(layer.kept_positions[1].max()) < 25 for layer in session.stats.layers)
    with judged_by(kind.model, Oracle(alive_of(session.stats, 32))), torch.no_grad():
        full = kind.model(**inputs).logits
    torch.testing.assert_close(sparse, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    kind = tiny("llava")
    kind.model.to(dtype)
    inputs = inputs_for(kind)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with attach(kind.model, SPARSE) as session:
        kind.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert {layer.keys.dtype for layer in session.cache.layers} == {dtype}
    assert session.stats.kept_ratio < 0.9
