"""`generate()` compiles its steps over a static cache by itself: CUDA graphs that give what eager steps give."""

import torch
from cases import DEVICE, needs_gpu, never_waiting
from test_compiled_decode import GREEDY, SPARSE, assert_same_cache, graphs_and_breaks, ragged, static
from tiny_models import inputs_for, tiny
from zipvl_adapters import ZipVLPolicy, ZipVLStaticCache, enable


@needs_gpu
def test_generate_records_cuda_graphs():
    """Two prompts, each with a cache of its own and two reselections; float32, since tokens have to be the same."""
    kind = tiny("llama", num_attention_heads=4, num_key_value_heads=2, hidden_size=256, initializer_range=0.15)
    kind.model.to(DEVICE)
    policy = ZipVLPolicy(**SPARSE, recompress_interval=5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for lengths in ((30, 5, 14), (27, 31, 3)):
        inputs = {name: x.to(DEVICE) for name, x in inputs_for(kind, lengths).items()}
        want, theirs = ragged(kind, inputs, policy, **GREEDY)
        out, ours = static(kind, inputs, policy, **GREEDY)
        assert torch.equal(out, want)
        assert_same_cache(ours, theirs, atol=1e-3)  # of keys of about 2: generated code sums in another order
    assert graphs_and_breaks() == (1, 0)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@needs_gpu
def test_a_step_never_waits_for_the_device():
    """An eager one, reselection included."""
    kind = tiny("llama")
    kind.model.to(DEVICE)
    enable(kind.model)
    cache = ZipVLStaticCache(ZipVLPolicy(**SPARSE, recompress_interval=2), config=kind.model.config, max_new_tokens=13)
    between = cache.generate_arguments()["stopping_criteria"]
    ids = inputs_for(kind, (40,))["input_ids"].to(DEVICE)

    def steps(n):
        for _ in range(n):
            between(ids[:, :1], None)
            kind.model(ids[:, :1], past_key_values=cache)

    with torch.no_grad():
        kind.model(ids, past_key_values=cache)
        steps(4)  # compiles kernels
        with never_waiting():
            steps(4)
