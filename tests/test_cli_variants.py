"""The variants that `zipvl eval` measures ZipVL against."""

import math

import pytest
import torch
from tiny_models import inputs_for, tiny
from zipvl_adapters import ZipVLPolicy, attach
from zipvl_adapters.attention import zipvl_attention
from zipvl_adapters.cache import ZipVLCache
from zipvl_adapters.cli.variants import AllRowsPolicy, RandomPolicy

PADDED = (19, 5)  # text tokens of the two sequences: the second is left-padded
PROBES = {"num_recent": 4, "num_random": 4}


def prefill(policy, n=40, heads=(4, 2), pad=0):
    """Output `[2, n, Hq, D]` and statistics of the first layer, whose second sequence starts with `pad` columns."""
    kind = tiny("llava")
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, n, 16, generator=generator) for h in (heads[0], heads[1], heads[1]))
    module = torch.nn.Module().eval()
    module.num_key_value_groups = heads[0] // heads[1]
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, :pad] = False
    cache = ZipVLCache(policy, config=kind.model.config)
    out, _ = zipvl_attention(module, q, *cache.update(k, v, 0), mask if pad else None)
    return out, cache.layers[0]


def kept(layer, sequence):
    return layer.positions[sequence, 0, : layer.lens[sequence, 0]].tolist()


@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_random_keeps_the_ratio_and_the_last_token(ratio):
    _, layer = prefill(RandomPolicy(keep_ratio=ratio), pad=7)
    for sequence, n in enumerate((40, 33)):
        positions = kept(layer, sequence)
        assert len(positions) == len(set(positions)) == math.ceil(ratio * n)
        assert positions[-1] == 39
        assert positions[0] >= 40 - n
    assert kept(layer, 0) == kept(prefill(RandomPolicy(keep_ratio=ratio), pad=7)[1], 0)
    assert kept(layer, 0) != kept(prefill(RandomPolicy(keep_ratio=ratio, seed=1), pad=7)[1], 0)


def test_random_is_not_the_same_in_every_layer_and_spreads_over_all_tokens():
    kind = tiny("llava")
    with attach(kind.model, RandomPolicy(keep_ratio=0.5)) as session:
        kind.model.generate(**inputs_for(kind, PADDED), max_new_tokens=2, do_sample=False)
    positions = [layer.kept_positions[0].tolist() for layer in session.stats.layers]
    assert positions[0] != positions[1] != positions[2]
    drawn = torch.zeros(40)
    for seed in range(200):
        drawn[kept(prefill(RandomPolicy(keep_ratio=0.5, seed=seed))[1], 0)] += 1
    assert drawn[-1] == 200
    assert 60 < drawn[:-1].min() < drawn[:-1].max() < 140


def test_random_needs_a_ratio():
    with pytest.raises(ValueError, match="keep_ratio"):
        prefill(RandomPolicy(tau=0.9))


@pytest.mark.parametrize("pad", [0, 7])
def test_all_rows_over_all_columns_is_dense(pad):
    everything = math.nextafter(1.0, 0.0)  # 1 itself would not come to the variant's own code
    ours, layer = prefill(AllRowsPolicy(keep_ratio=everything, **PROBES), pad=pad)
    dense, _ = prefill(ZipVLPolicy(tau=1.0), pad=pad)
    torch.testing.assert_close(ours[0], dense[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1, pad:], dense[1, pad:], rtol=0, atol=1e-5)
    read = layer.prefills[0].read()
    assert read.flops - read.flops_dense == 2 * 16 * 4 * scored(layer, pad)


def scored(layer, pad):
    rows = layer.prefills[0].probes().tolist()
    return sum(i + 1 for i in rows) + sum(i + 1 - pad for i in rows if i >= pad)


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
@pytest.mark.parametrize("pad", [0, 7])
def test_all_rows_agrees_with_zipvl_where_zipvl_computes(pool, pad):
    settings = {"keep_ratio": 0.4, "pool": pool, **PROBES}
    ours, layer = prefill(AllRowsPolicy(**settings), pad=pad)
    zipvl, same = prefill(ZipVLPolicy(**settings), pad=pad)
    assert torch.equal(layer.positions, same.positions)
    assert torch.equal(layer.lens, same.lens)
    for sequence in range(2):
        held = layer.lens[sequence].max()
        assert torch.equal(layer.keys[sequence, :, :held], same.keys[sequence, :, :held])
    computed = zipvl.abs().sum(-1) > 0
    torch.testing.assert_close(ours[computed], zipvl[computed], rtol=0, atol=1e-5)
    assert (~computed).any()
    assert (ours.abs().sum(-1) > 0)[0].all()
    assert (ours.abs().sum(-1) > 0)[1, pad:].all()


def test_all_rows_counts_its_own_pairs():
    _, layer = prefill(AllRowsPolicy(keep_ratio=0.4, **PROBES), pad=7)
    pairs = 0
    for sequence, first in enumerate((0, 7)):
        positions = kept(layer, sequence)
        pairs += sum(max(1, sum(p <= row for p in positions)) for row in range(first, 40))
    assert layer.prefills[0].read().flops == 4 * 16 * 4 * pairs + 2 * 16 * 4 * scored(layer, 7)


def test_variants_answer_one_prompt_only():
    kind = tiny("llava")
    inputs = inputs_for(kind)
    for policy in (AllRowsPolicy(tau=0.9), RandomPolicy(keep_ratio=0.5)):
        cache = ZipVLCache(policy, config=kind.model.config)
        with attach(kind.model, policy), torch.no_grad():
            kind.model(**inputs, past_key_values=cache)
            with pytest.raises(NotImplementedError, match=type(policy).__name__):
                kind.model(input_ids=inputs["input_ids"][:, -3:], past_key_values=cache)
