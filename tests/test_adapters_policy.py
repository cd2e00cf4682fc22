"""Other systems on the seam, in miniature: each kind acts at another moment, and all have to fit."""

import torch
from oracle import Oracle, judged_by
from tiny_models import inputs_for, tiny
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from zipvl_adapters import Policy, attach

import zipvl_kernels as zk


class LastAndFirst(Policy):
    """Attends densely, then keeps the first 2 and the last 10 of each sequence: compaction after attention."""

    def after_prefill(self, layer, step):
        B, n = step.q.shape[0], step.q.shape[2]
        leftpad = torch.zeros(B, dtype=torch.int32) if step.padding is None else step.padding.leftpad
        first = leftpad[:, None, None] + torch.arange(2, dtype=torch.int32)
        last = torch.arange(n - 10, n, dtype=torch.int32).expand(B, 1, 10)
        indices = torch.full((B, 1, n), -1, dtype=torch.int32)
        indices[..., :12] = torch.cat([first, last], 2)
        counts = torch.full((B, 1), 12, dtype=torch.int32)
        zk.compact_kv_(layer.keys, layer.values, indices, counts)
        layer.fill(layer.keys, layer.values, indices, counts)


def test_compaction_after_attention():
    kind = tiny("llava")
    inputs = inputs_for(kind, (19, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with attach(kind.model, LastAndFirst()) as session:
        ours = kind.model.generate(**inputs, **settings)
    assert all(layer.lens.tolist() == [[17], [17]] for layer in session.cache.layers)

    width = inputs["input_ids"].shape[1]
    alive = inputs["attention_mask"].bool()[:, None]
    kept = torch.zeros_like(alive)
    for b, start in enumerate((inputs["attention_mask"] == 0).sum(1).tolist()):
        kept[b, 0, [start, start + 1, *range(width - 10, width)]] = True
    oracle = Oracle([alive.clone() for _ in range(3)])

    def evict(module, args, out):
        """After the prefill of the whole model, before the first decode step."""
        if oracle.alive[0].shape[-1] == width:
            oracle.alive = [kept.clone() for _ in range(3)]

    handle = kind.model.register_forward_hook(evict)
    with judged_by(kind.model, oracle):
        full = kind.model.generate(**inputs, **settings)
    handle.remove()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(full.logits), rtol=0, atol=1e-5)


class Newest(Policy):
    """Keeps everything and reads the newest 8 tokens only: decoding over a part of a full cache."""

    def decode(self, layer, step):
        keys, values = layer.extend(step.k, step.v)
        near = keys[:, :, -8:], values[:, :, -8:]
        out, _ = sdpa_attention_forward(step.module, step.q, *near, None, scaling=step.scale)
        return out


def test_decoding_over_a_part_of_a_full_cache():
    kind = tiny("llama")
    ids = inputs_for(kind, (30,))["input_ids"]
    with attach(kind.model, Newest()) as session, torch.no_grad():
        kind.model(ids)
        ours = kind.model(ids[:, :1], past_key_values=session.cache).logits
    assert all(layer.keys.shape[2] == ids.shape[1] + 1 for layer in session.cache.layers)
    with torch.no_grad(), judged_by(kind.model, Oracle([torch.ones(1, 1, 32, dtype=torch.bool)] * 3)) as _:
        past = kind.model(ids, use_cache=True).past_key_values
    alive = torch.zeros(1, 1, 32, dtype=torch.bool)
    alive[..., -7:] = True
    with torch.no_grad(), judged_by(kind.model, Oracle([alive] * 3)):
        full = kind.model(ids[:, :1], past_key_values=past).logits
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-5)


def test_dropping_hidden_states_from_a_layer_on():
    """A hook between decoder layers scales the hidden states of dropped tokens away: the block undoes it."""

    class Drop(Policy):
        def hooks(self, decoder):
            def drop(module, args, kwargs):
                hidden = args[0].clone()
                hidden[:, 3:9] = 0
                return (hidden, *args[1:]), kwargs

            return [decoder.layers[1].register_forward_pre_hook(drop, with_kwargs=True)]

    kind = tiny("llama")
    ids = inputs_for(kind, (30,))["input_ids"]
    with torch.no_grad():
        stock = kind.model(ids).logits
        with attach(kind.model, Drop()):
            dropped = kind.model(ids).logits
        assert torch.equal(kind.model(ids).logits, stock)
    torch.testing.assert_close(dropped[:, :3], stock[:, :3])
    assert not torch.allclose(dropped[:, 9:], stock[:, 9:], atol=1e-3)
