"""`fused_projections`: fewer products in compiled code, and nothing else that changes."""

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from test_compiled_decode import assert_same_cache, compile_config, graphs_and_breaks, ragged, static
from tiny_models import TEXT_FAMILIES, VISION_FAMILIES, inputs_for, tiny
from torch import nn
from zipvl_adapters import ZipVLPolicy, fused_projections

LAYERS = 3
IDS = torch.arange(8, 18)[None]
SPLIT, JOINED = [7 * LAYERS + 1], [4 * LAYERS + 1]  # products of a whole model


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


class Compiler:
    """`torch.compile` by a backend that takes no time; notes how many products each graph has."""

    def __init__(self):
        torch._dynamo.reset()
        self.products = []

    def __call__(self, fn):
        return torch.compile(fn, backend=self.backend, fullgraph=True)

    def backend(self, graph, _):
        self.products.append(sum(node.target is nn.functional.linear for node in graph.graph.nodes))
        return graph


def compiled_logits(model):
    """And the products of the graphs."""
    compiler = Compiler()
    with torch.no_grad():
        return compiler(model.__call__)(input_ids=IDS).logits, compiler.products


def close(x, y):
    """Logits of the size of 1, after products of other shapes: fp32 can tell no more."""
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def lies_together(model):
    """Every weight of a group ends where the next begins."""
    ends = []
    for layer in model.get_decoder().layers:
        for block, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
            weights = [getattr(block, name).weight for name in names]
            ends += [a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(weights)]
    return all(ends)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_three_products_a_layer_fewer_and_nothing_else(family):
    model = tiny(family).model
    want, before = logits_of(model), {name: x.clone() for name, x in model.state_dict().items()}
    parameters, in_all = list(model.parameters()), sum(x.nbytes for x in model.parameters())
    plain, products = compiled_logits(model)
    assert products == SPLIT
    for _ in range(2):  # it can be done again
        with fused_projections(model):
            fused, products = compiled_logits(model)
            assert products == JOINED
            close(fused, plain)
            assert torch.equal(logits_of(model), want)  # eager: bit for bit
            assert lies_together(model)
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
            assert sum(storages.values()) == in_all
            state = model.state_dict()
            assert state.keys() == before.keys()
            assert all(torch.equal(x, before[name]) for name, x in state.items())
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
    assert {type(m) for m in model.modules()} == {type(m) for m in tiny(family).model.modules()}
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in tiny(family).model.named_buffers()}
    assert compiled_logits(model)[1] == SPLIT
    assert torch.equal(logits_of(model), want)


@pytest.mark.parametrize("family", ["llama", *VISION_FAMILIES])
def test_the_same_tokens_by_one_graph(family):
    kind = tiny(family)
    inputs = inputs_for(kind, (30, 5, 14))
    policy = ZipVLPolicy(tau=0.7, num_recent=4, num_random=8, recompress_interval=5)
    want, theirs = ragged(kind, inputs, policy, do_sample=False)
    with fused_projections(kind.model):
        out, ours = static(kind, inputs, policy, do_sample=False, compile_config=compile_config())
    assert torch.equal(out, want)
    assert_same_cache(ours, theirs)
    assert graphs_and_breaks() == (1, 0)


def test_layers_of_one_kind_share_a_graph():
    """Where each layer is compiled by itself, as many engines do."""
    model, compiler = tiny("llama", num_hidden_layers=12).model, Compiler()
    want = logits_of(model)
    with fused_projections(model):
        for layer in model.get_decoder().layers:
            layer.compile(backend=compiler.backend, fullgraph=True)
        with torch.no_grad():
            close(model(input_ids=IDS, use_cache=False).logits, want)
    assert compiler.products == [4]


def test_an_input_that_is_used_again_is_read_again():
    """The product that stays with an input is of one call."""
    model = tiny("llama").model
    mlp, x, y = model.get_decoder().layers[0].mlp, *torch.randn(2, 1, 4, 32)
    with torch.no_grad(), fused_projections(model):
        compiled = Compiler()(mlp)
        for values in (x.clone(), y, x.clone()):
            x.copy_(values)
            close(compiled(x), mlp(values))
        assert getattr(x, "_zipvl_fused", None) is None  # nor does it stay for longer


def test_parameters_changed_in_place_within_the_block():
    """As an optimizer or load_state_dict does, and before any eager call."""
    model, other = tiny("qwen2").model, tiny("qwen2", seed=1).model  # with biases
    compiler = Compiler()
    with torch.no_grad(), fused_projections(model):
        call = compiler(model.__call__)
        call(input_ids=IDS)
        model.load_state_dict(other.state_dict())
        close(call(input_ids=IDS).logits, logits_of(other))
        for x in (*model.parameters(), *other.parameters()):
            x.mul_(1.1)
        close(call(input_ids=IDS).logits, logits_of(other))
    assert compiler.products == JOINED


def test_compiled_training_has_all_gradients():
    plain, fused = tiny("llama").model, tiny("llama").model
    plain(input_ids=IDS, labels=IDS).loss.backward()
    torch._dynamo.reset()
    with fused_projections(fused):
        call = torch.compile(fused.__call__, backend="aot_eager", fullgraph=True)
        call(input_ids=IDS, labels=IDS).loss.backward()
    for (name, x), y in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_frozen_weights_are_fused_where_gradients_are_on():
    model, compiler = tiny("llama").model.requires_grad_(False), Compiler()
    with fused_projections(model):
        close(compiler(model.__call__)(input_ids=IDS).logits, logits_of(model))
    assert compiler.products == JOINED


def test_a_copy_stands_alone():
    model = tiny("llama").model
    want = logits_of(model)
    with fused_projections(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for x in other.parameters():
                x.zero_()
        assert torch.equal(logits_of(model), want)
        close(compiled_logits(model)[0], want)
        assert not compiled_logits(other)[0].any()


def test_it_is_saved_as_before(tmp_path):
    model = tiny("llama").model
    want = logits_of(model)
    with fused_projections(model):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), want)


def test_nothing_keeps_the_weights():
    model = tiny("llama").model
    with fused_projections(model):
        pass
    weight = weakref.ref(model.get_decoder().layers[0].mlp.gate_proj)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_an_error_within_the_block_undoes_it():
    model = tiny("llama").model
    with pytest.raises(KeyError), fused_projections(model):
        raise KeyError
    assert compiled_logits(model)[1] == SPLIT


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


def tied(attention):
    attention.v_proj.weight = attention.k_proj.weight


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (other_module, TypeError, r"layers\.2\.self_attn\.k_proj: expected a torch.nn.Linear, got Other"),
        (other_parameter, TypeError, r"layers\.2\.self_attn\.k_proj\.weight: expected .* got OtherParameter"),
        (meta, TypeError, r"layers\.2\.self_attn\.k_proj\.weight: expected .* got one on the meta device"),
        (other_dtype, ValueError, r"layers\.2\.self_attn\.k_proj and layers\.2\.self_attn\.v_proj: expected one dtype"),
        (one_bias, ValueError, r"both or none with a bias"),
        (hook, ValueError, r"layers\.2\.self_attn\.q_proj: expected the forward of its class"),
        (tied, ValueError, r"layers\.2\.self_attn\.v_proj\.weight: .* got that of layers\.2\.self_attn\.k_proj"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_fused_is_refused_and_nothing_is_changed(spoil, error, message):
    model = tiny("llama").model
    spoil(model.get_decoder().layers[2].self_attn)
    before = [(type(module), vars(module).keys()) for module in model.modules()]
    addresses = [x.data_ptr() for x in model.parameters() if not x.is_meta]
    with pytest.raises(error, match=message), fused_projections(model):
        pass
    assert [x.data_ptr() for x in model.parameters() if not x.is_meta] == addresses
    assert [(type(module), vars(module).keys()) for module in model.modules()] == before


def test_other_models_and_a_second_block_are_refused():
    linear = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        fused_projections(linear).__enter__()
    model = tiny("llama").model
    with fused_projections(model):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: fused already"):
            fused_projections(model).__enter__()
        assert compiled_logits(model)[1] == JOINED
