"""Adapters of braces and PEFT on one base, which is bit-identical afterwards."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from braces_cli.core.adapter.model import open_session
from braces_cli.core.errors import ModelError
from braces_cli.core.models.load import input_device
from braces_cli.core.options import LoadOptions
from braces_cli.evaluation.systems import attached, bare, find_eval_adapter


@pytest.fixture
def session(tiny_folder):
    return open_session(str(tiny_folder), None, LoadOptions(device="cpu"))


def _logits(session):
    with torch.no_grad():
        return session.base.model(torch.arange(2, 30)[None]).logits


@pytest.mark.parametrize(
    "make",
    [
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        lambda: peft.LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["norm"], init_lora_weights=False),
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
        lambda: peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False
        ),
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5], init_lora_weights=False),
        lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
    ],
    ids=["lora", "lora with a whole layer", "lora of embedding", "whole embedding", "tokens", "ia3"],
)
def test_the_base_is_bit_identical_after_an_adapter(session, make_peft, tiny_folder, make, make_adapter):
    """Also if lm-eval ties the weights meanwhile."""
    folder = make_peft(tiny_folder, make())
    before = {name: tensor.clone() for name, tensor in session.base.model.state_dict().items()}
    modules = dict(session.base.model.named_modules())
    before_logits = _logits(session)
    own, other = find_eval_adapter(str(make_adapter(tiny_folder))), find_eval_adapter(str(folder))
    seen = []
    for adapter in (other, own, other, own):
        with attached(session, adapter):
            session.base.model.tie_weights()
            seen.append(_logits(session))
            assert input_device(session.base.model).type == "cpu"
            with bare(session):
                assert torch.equal(_logits(session), before_logits)
        assert torch.equal(_logits(session), before_logits)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.allclose(seen[0], before_logits)
    assert not torch.allclose(seen[0], seen[1])
    after = session.base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert dict(session.base.model.named_modules()) == modules
    # The adapter as PEFT applies it.
    fresh = open_session(str(tiny_folder), None, LoadOptions(device="cpu"))
    fresh.base.model = peft.PeftModel.from_pretrained(fresh.base.model, str(folder)).eval()
    assert torch.equal(_logits(fresh), seen[0])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weights_that_an_adapter_changes_are_restored(session, make_peft, tiny_folder, init):
    folder = make_peft(tiny_folder, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))
    before = {name: tensor.clone() for name, tensor in session.base.model.state_dict().items()}
    with attached(session, find_eval_adapter(str(folder))):
        pass
    after = session.base.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="module")
def lora(make_peft, tiny_folder):
    return make_peft(tiny_folder, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), seed=7)


@pytest.fixture
def damaged(lora, tmp_path):
    """A copy of `lora` with changes in its config, or with a weight that is not a number."""
    folder = tmp_path / "damaged"

    def make(changes):
        shutil.copytree(lora, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        if not changes:
            tensors = load_file(folder / "adapter_model.safetensors")
            next(iter(tensors.values()))[0, 0] = float("nan")
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 3}, "lora adapter does not fit"),
        ({"target_modules": ["c_attn"]}, "lora adapter does not fit"),
        ({"target_modules": ["q_proj", "k_proj"]}, "lora adapter does not fit"),
        ({}, r"lora_[AB].* holds numbers that are not finite"),
    ],
)
def test_a_peft_adapter_that_does_not_fit_is_refused(session, damaged, changes, words):
    """The base is unchanged."""
    before, modules = _logits(session), dict(session.base.model.named_modules())
    with pytest.raises(ModelError, match=words), attached(session, find_eval_adapter(str(damaged(changes)))):
        pass
    assert dict(session.base.model.named_modules()) == modules
    assert torch.equal(_logits(session), before)


def test_options_that_peft_does_not_know_are_shown(session, damaged, caplog):
    """As in an adapter of a newer peft."""
    with attached(session, find_eval_adapter(str(damaged({"use_new_scaling": True})))):
        pass
    assert caplog.text.count("use_new_scaling") == 1


@pytest.mark.parametrize(
    ("key", "kind", "words"),
    [
        *(
            ("peft_type", kind, rf"{kind} [^\n]*\nMeasure")
            for kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "XLORA")
        ),
        ("task_type", "SEQ_CLS", "the adapter is for SEQ_CLS"),
    ],
)
def test_types_that_are_not_layers_are_refused(key, kind, words, damaged):
    """Before peft reads the config: some types load files that it names. So are adapters for another task."""
    with pytest.raises(ModelError, match=f"`{key}`: {words}"):
        find_eval_adapter(str(damaged({key: kind})))
