"""FFNs that are found, dense and mixtures of experts; refused models; numbers of parameters; mixtures by hand."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from braces_cli.core.adapter.model import Session, attach
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import MixtureFFN, find_ffns
from braces_cli.core.models.load import Base
from braces_cli.core.models.structure import add_to_output
from braces_cli.training.run import count_parameters
from braces_cli.training.settings import TrainSettings
from tests.conftest import ARCHITECTURES, open_gates, tiny_model
from tests.core.architectures import tiny
from tests.core.comparison import logits_of, relative, run

# The FFN of OPT is not a module, and that of GPT-2 ends in a dropout.
TWO_HOOKS = {"opt", "gpt2"}
FIRST_KEY = {"gpt2": "c_fc", "gpt_neox": "dense_h_to_4h", "opt": "fc1", "phi": "fc1"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_has_its_pair(name):
    """Sizes, ends and host are right, and the value matrix is a view (d, d_ff)."""
    model = tiny_model(name)
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == [0, 1]
    for ffn in ffns:
        assert (ffn.hidden_size, ffn.value_vectors) == (32, 52)
        assert ffn.value_matrix().shape == (32, 52)
        assert ffn.value_matrix().data_ptr() == ffn.value.weight.data_ptr()
        key = next(n for n, m in ffn.host.named_children() if m is ffn.keys[0])
        assert key == FIRST_KEY.get(name, "gate_proj")
        assert ffn.is_host_output == (name not in TWO_HOOKS)
    assert model.get_submodule(ffns[1].path) is ffns[1].host


def test_a_model_without_layers_is_refused():
    """A single projection is not a decoder."""
    with pytest.raises(ModelError, match="no list of layers"):
        find_ffns(nn.Sequential(nn.Linear(4, 4)))


QWEN = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA2 = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
LLAMA3 = {**LLAMA2, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


@pytest.mark.parametrize(
    ("kind", "sizes", "rank", "expected", "lora", "total"),
    [
        ("Qwen2Config", QWEN, 16, 688_156, 2_179_072, 1_543_714_304),
        ("LlamaConfig", LLAMA2, 16, 2_097_184, 8_388_608, 6_738_415_616),
        ("LlamaConfig", LLAMA3, 32, 4_194_336, 6_815_744, 8_030_261_248),
    ],
)
def test_parameter_counts_of_the_papers_models(kind, sizes, rank, expected, lora, total):
    """Qwen2.5-1.5B, Llama-2-7B and Llama-3-8B without weights, and LoRA r = 16 on queries and values."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes))
    counts = count_parameters(model, find_ffns(model), TrainSettings(rank=rank))
    assert counts["trainable_parameters"] == expected
    assert counts["total_parameters"] == total
    names = [name for name, _ in model.named_parameters()]
    counts = count_parameters(model, find_ffns(model), TrainSettings(rank=16, method="lora"))
    assert (counts["trainable_parameters"], counts["total_parameters"]) == (lora, total)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert not any("brace" in name for name, _ in model.named_modules())


# Parts of the last layer.
MIXTURES = {
    "mixtral": ["Experts"],
    "qwen2_moe": ["Experts", "FFN"],
    "qwen3_moe": ["Experts"],
    "olmoe": ["Experts"],
    "deepseek_v3": ["Experts", "FFN"],
    "llama4_text": ["Experts", "FFN"],
    "gpt_oss": ["Experts"],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_parts_of_mixtures_are_found(name):
    """Routed experts, and shared experts that are modules."""
    model = tiny(name)
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == list(range(len(model.model.layers)))
    mixture = [ffn for ffn in ffns if isinstance(ffn, MixtureFFN)][-1]
    assert [type(part).__name__ for part in mixture.parts] == MIXTURES[name]
    stacked = mixture.parts[0]
    assert stacked.value_matrix().shape[:2] == (4, 32)
    assert stacked.value_matrix().data_ptr() == stacked.module.down_proj.data_ptr()
    assert mixture.value_matrix().shape == (32, mixture.value_vectors)


@pytest.mark.parametrize("name", MIXTURES)
def test_grouped_products_of_experts_equal_the_reference(name):
    """float32 within 1e-5 relative, gradients too; `invariants` tests eager experts."""
    model = tiny(name)
    base = logits_of(model)
    if name != "llama4_text":
        model.set_experts_implementation("grouped_mm")
    adapter = attach(model, 4)
    open_gates(adapter)
    assert relative(logits_of(model), base) > 1e-3
    fast, fast_grads = run(model, adapter, False)
    slow, slow_grads = run(model, adapter, True)
    assert relative(fast, slow) < 1e-5
    for kind in ("weight", "gate"):  # of all layers together: the gradient of one gate can be near 0
        keys = [key for key in slow_grads if key.endswith(kind)]
        ours, theirs = (torch.cat([grads[key].flatten() for key in keys]) for grads in (fast_grads, slow_grads))
        assert relative(ours, theirs) < 2e-5, kind


@pytest.mark.parametrize("name", MIXTURES)
def test_bfloat16_error_of_a_mixture_is_at_most_twice_that_of_the_reference(name):
    """Against the float32 model with the same rounded weights.

    Rounding can send a token with a near-tie to other experts in either of them, so the median token is compared.
    """
    model = tiny(name).to(torch.bfloat16)
    adapter = attach(model, 4)
    open_gates(adapter)
    fast, _ = run(model, adapter, False)
    slow, _ = run(model, adapter, True)
    model.float()
    truth, _ = run(model, adapter, True)
    ours, plain = ((logits.double() - truth.double()).norm(dim=-1).median() for logits in (fast, slow))
    assert ours <= 2 * plain


def test_mixtral_by_hand():
    """One layer, expert by expert and neuron by neuron."""
    model = tiny("mixtral")
    adapter = attach(model, 4)
    open_gates(adapter)
    block = model.model.layers[0].mlp
    adapter_layer = adapter.adapted_ffns[0][1]
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    fast = block(h.view(1, 5, 32))[0]
    _, weights, index = block.gate(h)
    projection, g = adapter_layer.projection(), torch.sigmoid(adapter_layer.gate)
    slow = torch.zeros_like(h)
    for token in range(5):
        for place in range(2):
            expert = int(index[token, place])
            gate, up = (block.experts.gate_up_proj[expert] @ h[token]).chunk(2)
            values = block.experts.down_proj[expert]
            for j in range(values.shape[1]):
                r = (projection @ values[:, j]) @ (projection @ h[token]) * adapter_layer.scale / 2  # sqrt of rank 4
                w = F.silu(gate[j]) * up[j] + g * r
                slow[token] += weights[token, place] * w * values[:, j]
    assert relative(fast, slow) < 1e-5


def test_experts_in_a_module_list_share_one_projection_and_gate():
    """The model weights the output of each expert."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x):
            return x + 0.75 * self.experts[0](x) + 0.25 * self.experts[2](x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Model()
    adapter = attach(model, 4)
    open_gates(adapter)
    assert [len(ffn.parts) for ffn, _ in adapter.adapted_ffns] == [3, 3]
    assert sum(p.numel() for _, p in adapter.named_parameters()) == 2 * (4 * 8 + 1)
    x = torch.randn(5, 8)
    expected = x
    for (_, adapter_layer), layer in zip(adapter.adapted_ffns, model.layers, strict=True):
        term, projection = expected, adapter_layer.projection()
        for p, expert in ((0.75, layer.experts[0]), (0.25, layer.experts[2])):
            w = expert.act(expert.up(expected))
            r = (expected @ projection.mT) @ (projection @ expert.down.weight) * adapter_layer.scale / 2
            term = term + p * ((w + adapter_layer.g * r) @ expert.down.weight.mT + expert.down.bias)
        expected = term
    assert relative(model(x), expected) < 1e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_without_an_adapter_is_steered_independently_of_its_router(name):
    """Against adding s * scale * p to the output of each decoder layer; no hook remains."""
    model = tiny(name)
    session = Session(Base(model, None, name))
    layers = list(range(len(session.ffns)))
    generator = torch.Generator().manual_seed(1)
    hidden, reference = torch.randn(2, 2, len(layers), 32, generator=generator)
    residual = torch.linspace(50.0, 20.0, len(layers))
    attribute = Attribute("x", [], hidden, reference, residual, layers, {}, residual)
    bare = logits_of(model)
    with steered(session, [(attribute, 2.0)], layers) as sizes:
        fast = logits_of(model)
    vectors = 2.0 * attribute.scale[:, None] * (hidden - reference)[0]
    handles = [add_to_output(layer, vectors[index]) for index, layer in enumerate(model.model.layers)]
    slow = logits_of(model)
    for handle in handles:
        handle.remove()
    assert relative(fast, slow) < 1e-5
    assert relative(fast, bare) > 1e-2
    assert torch.equal(logits_of(model), bare)
    assert [size.layer for size in sizes] == layers
    assert torch.allclose(torch.cat([size.total for size in sizes]), vectors)
