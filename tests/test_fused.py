"""`fuse_projections`: fewer products in compiled code, the same parameters, eager results and tokens."""

import copy
from itertools import pairwise

import pytest
import torch
from test_compiled_decode import assert_same_cache, compile_config, graphs_and_breaks, ragged, static
from tiny_models import TEXT_FAMILIES, VISION_FAMILIES, inputs_for, tiny
from torch import nn
from zipvl_adapters import ZipVLPolicy, fuse_projections

LAYERS = 3


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def compiled_logits(model, ids):
    """And how many products the graph has."""
    products = []

    def backend(graph, _):
        products.append(sum(node.target is nn.functional.linear for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(model.__call__, backend=backend, fullgraph=True)(input_ids=ids).logits
    return logits, products


def lies_together(model):
    """Every weight of a group ends where the next begins."""
    ends = []
    for layer in model.get_decoder().layers:
        for block, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
            weights = [getattr(block, name).weight for name in names]
            ends += [a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(weights)]
    return all(ends)


IDS = torch.arange(8, 18)[None]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_three_products_a_layer_fewer_and_nothing_else(family):
    model = tiny(family).model
    want, parameters = logits_of(model, IDS), {name: x.clone() for name, x in model.state_dict().items()}
    in_all = sum(x.nbytes for x in model.parameters())
    plain, before = compiled_logits(model, IDS)
    fuse_projections(model)
    fused, after = compiled_logits(model, IDS)
    assert (before, after) == ([7 * LAYERS + 1], [4 * LAYERS + 1])
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-6)
    assert torch.equal(logits_of(model, IDS), want)  # eager: bit for bit
    state = model.state_dict()
    assert state.keys() == parameters.keys()
    assert all(torch.equal(x, parameters[name]) for name, x in state.items())
    assert lies_together(model)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
    assert sum(storages.values()) == in_all


@pytest.mark.parametrize("family", ["llama", *VISION_FAMILIES])
def test_the_same_tokens_by_one_graph(family):
    kind = tiny(family)
    inputs = inputs_for(kind, (30, 5, 14))
    policy = ZipVLPolicy(tau=0.7, num_recent=4, num_random=8, recompress_interval=5)
    want, theirs = ragged(kind, inputs, policy, do_sample=False)
    fuse_projections(kind.model)
    out, ours = static(kind, inputs, policy, do_sample=False, compile_config=compile_config())
    assert torch.equal(out, want)
    assert_same_cache(ours, theirs)
    assert graphs_and_breaks() == (1, 0)


def test_compiled_training_has_all_gradients():
    plain, fused = tiny("llama").model, tiny("llama").model
    fuse_projections(fused)
    torch._dynamo.reset()
    torch.compile(fused.__call__, backend="aot_eager", fullgraph=True)(input_ids=IDS, labels=IDS).loss.backward()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for (name, x), y in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_changed_parameters_are_changed_fused_weights():
    """They are the same memory."""
    model = tiny("llama").model
    fuse_projections(model)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.1)
    torch.testing.assert_close(compiled_logits(model, IDS)[0], logits_of(model, IDS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", ["moved", "replaced", "copied"])
def test_weights_of_now_count(change):
    """Eager code, such as any prefill, puts weights together again that a move or a new parameter took apart."""
    model = tiny("qwen2").model  # with a bias
    fuse_projections(model)
    if change == "moved":
        model = model.double()
    elif change == "copied":
        model = copy.deepcopy(model)
    else:
        layer = model.get_decoder().layers[1]
        for linear in (layer.self_attn.k_proj, layer.mlp.up_proj):
            linear.weight = nn.Parameter(torch.randn_like(linear.weight))
        layer.self_attn.v_proj.bias = nn.Parameter(torch.randn_like(layer.self_attn.v_proj.bias))
    logits_of(model, IDS)
    assert lies_together(model)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.1)
    torch.testing.assert_close(compiled_logits(model, IDS)[0], logits_of(model, IDS), rtol=0, atol=1e-6)


def test_a_copy_stands_alone():
    model = tiny("llama").model
    fuse_projections(model)
    other, want = copy.deepcopy(model), logits_of(model, IDS)
    with torch.no_grad():
        for x in other.parameters():
            x.zero_()
    assert torch.equal(logits_of(model, IDS), want)
    torch.testing.assert_close(compiled_logits(model, IDS)[0], want, rtol=0, atol=1e-6)


def test_it_is_saved_as_before(tmp_path):
    model = tiny("llama").model
    want = logits_of(model, IDS)
    fuse_projections(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, IDS), want)


class Other(nn.Linear):
    """What a quantised or adapted projection is to `type(...) is nn.Linear`."""


class OtherParameter(nn.Parameter):
    """What a DTensor is to a plain parameter."""


def other_module(attention):
    attention.k_proj = Other(32, 16, bias=False)


def other_parameter(attention):
    attention.k_proj.weight = OtherParameter(attention.k_proj.weight.detach())


def meta(attention):
    attention.k_proj.to("meta")


def other_dtype(attention):
    attention.v_proj.double()


def one_bias(attention):
    attention.v_proj.bias = nn.Parameter(torch.zeros(16))


def hook(attention):
    attention.q_proj.forward = attention.q_proj.forward


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (other_module, TypeError, r"layers\.2\.self_attn\.k_proj: expected a torch.nn.Linear, got Other"),
        (other_parameter, TypeError, r"layers\.2\.self_attn\.k_proj\.weight: expected .* got OtherParameter"),
        (meta, TypeError, r"layers\.2\.self_attn\.k_proj\.weight: expected .* got one on the meta device"),
        (other_dtype, ValueError, r"layers\.2\.self_attn\.k_proj and layers\.2\.self_attn\.v_proj: expected one dtype"),
        (one_bias, ValueError, r"both or none with a bias"),
        (hook, ValueError, r"layers\.2\.self_attn\.q_proj: its forward is replaced already"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_fused_is_refused_and_nothing_is_changed(spoil, error, message):
    model = tiny("llama").model
    spoil(model.get_decoder().layers[2].self_attn)
    addresses = [x.data_ptr() for x in model.parameters() if not x.is_meta]
    with pytest.raises(error, match=message):
        fuse_projections(model)
    assert [x.data_ptr() for x in model.parameters() if not x.is_meta] == addresses
    assert not list(model.get_decoder().layers[0].mlp.gate_proj.buffers())


def test_other_models_and_a_second_time_are_refused():
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        fuse_projections(nn.Linear(2, 2))
    model = tiny("llama").model
    fuse_projections(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: its forward is replaced already"):
        fuse_projections(model)
