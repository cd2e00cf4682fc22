"""Attaching and leaving, what is refused and how, statistics, vision towers."""

import pytest
import torch
import transformers
from tiny_models import TEXT, VISION_FAMILIES, inputs_for, tiny
from torch import nn
from transformers import DynamicCache
from zipvl_adapters import ATTENTION, Policy, ZipVLCache, ZipVLPolicy, attach, enable

SPARSE = ZipVLPolicy(tau=0.7, num_recent=4, num_random=8)


def settings_of(model):
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return {key: config._attn_implementation for key, config in configs.items()}


def hooks_of(model):
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize("family", [*VISION_FAMILIES, "llama"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_is_left_behind(family, implementation):
    model = tiny(family).model
    model.set_attn_implementation(implementation)
    before = settings_of(model), hooks_of(model), type(model), model.config.to_dict()
    with attach(model, SPARSE):
        text = model.config.get_text_config()
        assert text._attn_implementation == ATTENTION
        others = [value for key, value in settings_of(model).items() if key != id(text)]
        assert set(others) <= {implementation}
    assert (settings_of(model), hooks_of(model), type(model), model.config.to_dict()) == before
    with pytest.raises(KeyError), attach(model, SPARSE):
        raise KeyError
    assert (settings_of(model), hooks_of(model), type(model), model.config.to_dict()) == before


def test_nothing_is_saved(tmp_path):
    kind = tiny("llava")
    with attach(kind.model, SPARSE):
        kind.model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def test_twice_at_once_is_refused_and_twice_in_a_row_is_not():
    model = tiny("llava").model
    with attach(model, SPARSE):
        with pytest.raises(RuntimeError, match="attached already"), attach(model, SPARSE):
            pass
        with pytest.raises(RuntimeError, match="attached already"), attach(model.model.language_model, SPARSE):
            pass
        assert model.config.text_config._attn_implementation == ATTENTION
    with attach(model):
        pass


def test_the_session_shows_the_last_prompt():
    kind = tiny("llava")
    inputs = inputs_for(kind, (19, 5))
    with attach(kind.model, SPARSE) as session:
        assert session.cache is None
        with pytest.raises(RuntimeError, match="nothing has run"):
            _ = session.stats
        kind.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        first = session.cache
        kind.model.generate(**inputs_for(kind), max_new_tokens=3, do_sample=False)
        assert session.cache is not first
    assert session.stats.layers[0].seen == (39,)


def test_statistics_count_what_is_there():
    kind = tiny("llama")
    inputs = inputs_for(kind, (40, 22))
    with attach(kind.model, SPARSE) as session, torch.no_grad():
        kind.model(**inputs)
        stats = session.stats
        for layer, held in zip(stats.layers, session.cache.layers, strict=True):
            assert layer.seen == (42, 24)
            assert layer.kept == tuple(held.lens[:, 0].tolist()) == tuple(map(len, layer.kept_positions))
            assert layer.ratio == tuple(k / s for k, s in zip(layer.kept, layer.seen, strict=True))
            for b, positions in enumerate(layer.kept_positions):
                assert positions.dtype == torch.int64
                assert positions[0] >= (0, 18)[b]
                assert positions[-1] == 41
            token = 2 * 2 * 8 * 4  # K and V, KV heads, head dim, bytes
            assert layer.kv_bytes == token * sum(layer.kept)
            assert layer.kv_bytes_dense == token * 66
            assert layer.attention_flops_dense == 4 * 8 * 4 * (42 * 43 // 2 + 24 * 25 // 2)
            probes = SPARSE.probe_rows(42, layer.layer).tolist()
            scored = sum(i + 1 for i in probes) + sum(i - 18 + 1 for i in probes if i >= 18)
            pairs = sum(k * (k + 1) // 2 for k in layer.kept)
            assert layer.attention_flops == 4 * 8 * 4 * pairs + 2 * 8 * 4 * scored
        kind.model(torch.tensor([[9], [9]]), past_key_values=session.cache)
        later = session.stats
    assert later.kv_bytes_dense - stats.kv_bytes_dense == later.kv_bytes - stats.kv_bytes == 3 * 2 * token
    assert later.attention_flops == stats.attention_flops
    ratios = [r for layer in stats.layers for r in layer.ratio]
    assert stats.kept_ratio == pytest.approx(sum(ratios) / 6)
    table = stats.table().splitlines()
    assert len(table) == 5
    assert f"{stats.kept_ratio:.1%}" in table[-1]


def test_statistics_per_head():
    kind = tiny("llama")
    policy = ZipVLPolicy(tau=0.7, num_recent=4, num_random=8, pool="kv_head")
    with attach(kind.model, policy) as session, torch.no_grad():
        kind.model(**inputs_for(kind, (40,)))
    for layer, held in zip(session.stats.layers, session.cache.layers, strict=True):
        per_head = held.lens[0].tolist()
        assert max(per_head) <= layer.kept[0] <= sum(per_head)
        assert layer.kv_bytes == sum(per_head) * 2 * 8 * 4


def test_probes_differ_by_layer_and_seed_and_forced_tokens_stay():
    policy = ZipVLPolicy(num_recent=2, num_random=3)
    assert not torch.equal(policy.probe_rows(50, 0), policy.probe_rows(50, 1))
    assert not torch.equal(policy.probe_rows(50, 0), ZipVLPolicy(num_recent=2, num_random=3, seed=1).probe_rows(50, 0))
    assert torch.equal(policy.probe_rows(50, 4), policy.probe_rows(50, 4))
    kind = tiny("llama")
    with attach(kind.model, ZipVLPolicy(tau=0.3, keep_first=3, keep_recent=5)) as session, torch.no_grad():
        kind.model(**inputs_for(kind, (40,)))
    for layer in session.stats.layers:
        assert {0, 1, 2, 37, 38, 39, 40, 41} <= set(layer.kept_positions[0].tolist())


def test_a_fixed_ratio():
    kind = tiny("llama")
    with attach(kind.model, ZipVLPolicy(keep_ratio=0.25)) as session, torch.no_grad():
        kind.model(**inputs_for(kind, (38, 18)))
    assert {layer.kept for layer in session.stats.layers} == {(10, 5)}


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_vision_tower_that_gets_our_attention_keeps_its_own(family):
    """`set_attn_implementation` with a plain string reaches the tower too."""
    kind = tiny(family)
    inputs = inputs_for(kind, (19, 5))
    with torch.no_grad():
        stock = kind.model(**inputs).logits
        enable(kind.model)
        kind.model.set_attn_implementation(ATTENTION)
        assert torch.equal(kind.model(**inputs, use_cache=False).logits, stock)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tau", 0),
        ("tau", 1.01),
        ("tau", float("nan")),
        ("tau", "0.9"),
        ("keep_ratio", 0.0),
        ("keep_recent", 0),
        ("num_recent", 0),
        ("num_random", -1),
        ("keep_first", 1.5),
        ("recompress_interval", -1),
        ("pool", "head"),
        ("seed", -1),
    ],
)
def test_a_bad_policy_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .*got"):
        ZipVLPolicy(**{field: value})


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))


def t5():
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def sliding_mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, sliding_window=16))


def sliding_qwen2():
    config = transformers.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    return transformers.Qwen2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "PreTrainedModel"),
        (bert, ValueError, "BertModel.*not supported"),
        (t5, ValueError, "not supported"),
        (sliding_mistral, ValueError, "without full attention"),
        (sliding_qwen2, ValueError, "sliding_attention"),
    ],
)
def test_unsupported_models_are_refused(make, error, words):
    model = make()
    with pytest.raises(error, match=words), attach(model, SPARSE):
        pass
    with pytest.raises(error, match=words):
        enable(model)
    if hasattr(model, "config"):
        assert model.config._attn_implementation != ATTENTION


@pytest.mark.parametrize("make", [t5, sliding_mistral, bert])
def test_a_cache_for_an_unsupported_model_is_refused(make):
    with pytest.raises(ValueError, match="not supported"):
        ZipVLCache(SPARSE, config=make().config)


def test_wrong_types_are_refused():
    model = tiny("llama").model
    with pytest.raises(TypeError, match="policy: expected a Policy"), attach(model, 0.9):
        pass
    with pytest.raises(TypeError, match="policy: expected a Policy"):
        ZipVLCache(0.9, config=model.config)
    with pytest.raises(TypeError, match="config: expected"):
        ZipVLCache(SPARSE, config=model)


def test_training_is_refused_before_the_first_layer():
    kind = tiny("llama")
    ids = inputs_for(kind)["input_ids"]
    kind.model.train()
    with attach(kind.model, SPARSE) as session:
        with pytest.raises(RuntimeError, match="training is not supported"):
            kind.model(ids)
        with torch.no_grad():
            kind.model(ids)
        assert session.stats.kept_ratio < 1
    enable(kind.model)
    with pytest.raises(RuntimeError, match="training is not supported"):
        kind.model(ids, past_key_values=ZipVLCache(SPARSE, config=kind.model.config))


def test_gradients_are_refused_when_sparse_and_right_when_dense():
    kind = tiny("llama")
    ids = inputs_for(kind)["input_ids"]
    weight = kind.model.model.layers[0].self_attn.q_proj.weight
    kind.model(ids).logits.sum().backward()
    stock, weight.grad = weight.grad, None
    enable(kind.model)
    with pytest.raises(RuntimeError, match="no backward"):
        kind.model(ids, past_key_values=ZipVLCache(SPARSE, config=kind.model.config)).logits.sum().backward()
    dense = ZipVLCache(ZipVLPolicy(tau=1.0), config=kind.model.config)
    kind.model.zero_grad()
    kind.model(ids, past_key_values=dense).logits.sum().backward()
    torch.testing.assert_close(weight.grad, stock)


def test_caches_that_cannot_be_compacted_are_refused():
    model = tiny("llama").model
    ids = torch.tensor([[9, 10, 11, 12]])
    offloaded = DynamicCache()
    offloaded.offloading = True
    window = transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=8)
    sliding = transformers.cache_utils.Cache(layers=[window] * 3)
    both = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
    with attach(model, SPARSE), torch.no_grad():
        for cache, words in ((offloaded, "offloaded DynamicCache"), (sliding, "a Cache"), (both, "EncoderDecoder")):
            with pytest.raises(ValueError, match=f"{words}.* is not supported"):
                model(ids, past_key_values=cache)


def test_our_cache_without_our_attention_says_what_to_call():
    for tau in (0.7, 1.0):
        kind = tiny("llava")
        cache = ZipVLCache(ZipVLPolicy(tau=tau), config=kind.model.config)
        inputs = inputs_for(kind)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"zipvl_adapters\.enable\(model\)"):
            kind.model(**inputs, past_key_values=cache)
        assert cache.get_seq_length() == 0
        enable(kind.model)  # and doing so is enough
        kind.model.generate(**inputs, past_key_values=cache, max_new_tokens=3)


def test_a_cache_serves_one_model_and_one_session():
    first, second = tiny("llama"), tiny("llama", seed=1)
    ids = inputs_for(first)["input_ids"]
    enable(first.model)
    enable(second.model)
    cache = ZipVLCache(SPARSE, config=first.model.config)
    with torch.no_grad():
        first.model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="belongs to another model"):
            second.model(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == ids.shape[1]
        first.model(ids[:, :1], past_key_values=cache)  # unharmed
        cache.reset()
        second.model(ids, past_key_values=cache)
        with attach(first.model, SPARSE) as session:
            first.model(ids)
        with attach(first.model, SPARSE), pytest.raises(ValueError, match="attached elsewhere"):
            first.model(ids[:, :1], past_key_values=session.cache)


def test_a_policy_that_overrides_nothing_is_dense():
    kind = tiny("llava")
    inputs = inputs_for(kind, (19, 5))
    stock = kind.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with attach(kind.model, Policy()) as session:
        assert torch.equal(kind.model.generate(**inputs, max_new_tokens=6, do_sample=False), stock)
    assert session.stats.kept_ratio == 1


def test_a_policy_may_hook_the_decoder_for_the_time_of_the_block():
    seen = []

    class Watching(Policy):
        def hooks(self, decoder):
            return [layer.register_forward_hook(lambda *_: seen.append(1)) for layer in decoder.layers]

    kind = tiny("llama")
    ids = inputs_for(kind)["input_ids"]
    before = hooks_of(kind.model)
    with attach(kind.model, Watching()), torch.no_grad():
        kind.model(ids)
    assert len(seen) == 3
    assert hooks_of(kind.model) == before


@pytest.mark.parametrize("family", ["llama", "qwen3", "llava", "internvl", "qwen2_vl"])
def test_mlps_take_so_many_rows_at_a_time(family):
    kind = tiny(family)
    inputs = inputs_for(kind, (30, 5, 14))
    layers = kind.model.get_decoder().layers
    rows = []
    watch = layers[1].mlp.gate_proj.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2]))
    with attach(kind.model, SPARSE) as session:
        want, kept = kind.model(**inputs).logits, session.stats.kept_ratio
    assert len(rows) == 1
    n = rows.pop()[1]
    with attach(kind.model, SPARSE, mlp_rows=24) as session:
        torch.testing.assert_close(kind.model(**inputs).logits, want, rtol=1e-4, atol=1e-5)
        assert session.stats.kept_ratio == kept
    assert [tuple(shape) for shape in rows] == [(3, 8)] * (n // 8) + [(3, n % 8)] * (n % 8 > 0)
    watch.remove()
    assert all("forward" not in vars(layer.mlp) for layer in layers)


def test_mlps_that_somebody_else_has_changed_stay_so():
    """As accelerate does, which puts a function in the place of a module's `forward`."""
    kind = tiny("llama")
    mlp = kind.model.get_decoder().layers[0].mlp
    original = mlp.forward
    mlp.forward = theirs = lambda hidden: 2 * original(hidden)
    inputs = inputs_for(kind, (30,))
    with attach(kind.model, SPARSE):
        want = kind.model(**inputs).logits
    with attach(kind.model, SPARSE, mlp_rows=4):
        torch.testing.assert_close(kind.model(**inputs).logits, want, rtol=1e-4, atol=1e-5)
    assert mlp.forward is theirs


@pytest.mark.parametrize("rows", [0, -1, 2.0, True, "many"])
def test_a_bad_number_of_mlp_rows_is_refused_and_nothing_is_left_behind(rows):
    model = tiny("llama").model
    with pytest.raises(ValueError, match="mlp_rows: expected an integer of at least 1"), attach(model, mlp_rows=rows):
        pass
    with attach(model, mlp_rows=1):
        pass
