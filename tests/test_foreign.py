"""Models in the forms that other projects leave: adapters of PEFT, checkpoints of build-nanogpt, files of folders."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import state_of
from test_pretrained import classes, copy, folders, tokens  # noqa: F401, fixtures

from flatgpt import checkpoint
from flatgpt.errors import UserError
from flatgpt.tokenizer import CharTokenizer
from model import GPT, GPTConfig

pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')   # peft about transformers
SMALL = {'vocab_size': 300, 'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'bias': True, 'dropout': 0.0}


def logits(model):
    with torch.inference_mode():
        found = model(tokens()) if not isinstance(model, GPT) else model(tokens(), tokens())
    return found[0] if isinstance(model, GPT) else found.logits


# ---------------------------------------------------------------------------------------------------------------------
# PEFT

ALL = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


@pytest.fixture
def adapter(copy, folders, tmp_path):  # noqa: F811
    """A function that puts an adapter of PEFT on a folder's model and saves it: (its folder, the model with it)."""
    def made(name, targets, **options):
        import peft

        folder = copy(name)
        torch.manual_seed(0)
        model = type(folders[name][1]).from_pretrained(folder)
        model.name_or_path = str(folder)
        adapted = peft.get_peft_model(model, peft.LoraConfig(
            r=3, lora_alpha=7, target_modules=targets, task_type='CAUSAL_LM', **options))
        with torch.no_grad():
            for key, p in adapted.named_parameters():
                if 'lora_' in key:
                    p.add_(torch.randn_like(p), alpha=0.2)
        adapted.save_pretrained(tmp_path / 'adapter')
        return tmp_path / 'adapter', adapted.eval()
    return made


@pytest.mark.parametrize(('name', 'targets', 'options'), [
    ('gpt2', ['c_attn', 'c_proj', 'c_fc'], {'fan_in_fan_out': True}), ('llama', ALL, {}),
    ('llama', ['q_proj', 'v_proj'], {}), ('llama, groups', ['k_proj', 'down_proj'], {'use_rslora': True}),
    ('qwen3', ['gate_proj', 'o_proj'], {'rank_pattern': {'o_proj': 5}}), ('mistral', ['up_proj'], {})])
def test_an_adapter_of_peft_is_its_base_with_the_adapter_merged(adapter, folders, name, targets, options):  # noqa: F811
    folder, theirs = adapter(name, targets, **options)
    model = checkpoint.build(checkpoint.load(folder), folder).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)
    assert (logits(model) - logits(folders[name][1])).abs().max() > 0.01
    assert checkpoint.in_folder(folder) == folder


def test_an_older_file_of_an_adapter_is_read(adapter):
    folder, theirs = adapter('llama', ['q_proj'])
    tensors = load_file(folder / 'adapter_model.safetensors')
    torch.save({name.replace('.weight', '.default.weight'): p for name, p in tensors.items()},
               folder / 'adapter_model.bin')
    (folder / 'adapter_model.safetensors').unlink()
    model = checkpoint.build(checkpoint.load(folder), folder).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(('fields', 'words'), [
    ({'peft_type': 'IA3'}, "peft_type='IA3'"), ({'use_dora': True}, 'use_dora=True'), ({'bias': 'all'}, "bias='all'"),
    ({'modules_to_save': ['lm_head']}, r"modules_to_save=\['lm_head'\]"),
    ({'alpha_pattern': {'q': 1}}, 'alpha_pattern'),
    ({'base_model_name_or_path': 'nowhere'}, 'an adapter for nowhere, which is neither here nor'),
    ({'base_model_name_or_path': None}, 'an adapter for None')])
def test_what_an_adapter_has_that_cannot_be_merged_is_named(adapter, fields, words):
    folder, _ = adapter('llama', ['q_proj'])
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(UserError, match=words):
        checkpoint.load(folder)


def test_an_adapter_for_another_base_is_refused(adapter):
    folder, _ = adapter('llama', ['q_proj'])
    tensors = load_file(folder / 'adapter_model.safetensors')
    extra = {'base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight': torch.zeros(3, 24)}
    save_file({**tensors, **extra}, folder / 'adapter_model.safetensors')
    with pytest.raises(UserError, match=r'has an adapter for model\.layers\.7\.self_attn\.q_proj\.lora_A\.weight'):
        checkpoint.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# files

@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_a_file_of_a_folder_means_the_folder(copy, name):  # noqa: F811
    folder = copy()
    assert checkpoint.in_folder(folder / name) == folder
    (folder / 'ckpt.pt').touch()
    assert checkpoint.in_folder(folder / 'ckpt.pt') == folder / 'ckpt.pt'


def test_a_file_of_an_adapter_means_its_folder_and_weights_alone_are_named(adapter, tmp_path):
    folder, _ = adapter('llama', ['q_proj'])
    for path in (folder / 'adapter_model.safetensors', folder / 'adapter_config.json'):
        assert checkpoint.in_folder(path) == folder
    save_file({'x': torch.zeros(1)}, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=r'model\.safetensors has weights alone: get the config\.json of its model'):
        checkpoint.in_folder(tmp_path / 'model.safetensors')


@pytest.mark.parametrize('content', [[torch.zeros(1)], {'model': {'x': torch.zeros(1)}}, {'epoch': 3}, 7],
                         ids=['list', 'nested', 'number', 'alone'])
def test_a_pickle_that_is_no_state_dict_is_named(copy, content):  # noqa: F811
    folder = copy('llama')
    (folder / 'model.safetensors').unlink()
    torch.save(content, folder / 'pytorch_model.bin')
    with pytest.raises(UserError, match=r'cannot read .*pytorch_model\.bin: it is no state_dict'):
        checkpoint.load(folder)


@pytest.mark.parametrize('module', ['__main__', 'train_gpt2'])
def test_a_checkpoint_of_build_nanogpt_is_read(tmp_path, monkeypatch, module):
    """Its configuration is an object of a class in its script."""
    model = GPT(GPTConfig(**SMALL))
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    theirs = type('GPTConfig', (), {'__module__': module})
    sys.modules[module].GPTConfig = theirs
    config = theirs()
    config.__dict__ |= {name: SMALL[name] for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')}
    torch.save({'model': model.state_dict(), 'config': config, 'step': 250, 'val_loss': 3.25}, tmp_path / 'x.pt')
    ckpt = checkpoint.load(tmp_path / 'x.pt')
    again = checkpoint.build(ckpt, tmp_path / 'x.pt')
    assert again.config == model.config and (ckpt['iter_num'], ckpt['best_val_loss']) == (250, 3.25)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters()))


@pytest.mark.parametrize('loss', [np.float64(1.5), np.float32(1.5), torch.tensor(1.5), 1.5])
def test_a_loss_of_numpy_in_a_checkpoint_of_nanogpt_is_read(tmp_path, loss):
    model = GPT(GPTConfig(**SMALL))
    torch.save({'model': model.state_dict(), 'model_args': SMALL, 'best_val_loss': loss, 'iter_num': np.int64(7)},
               tmp_path / 'ckpt.pt')
    ckpt = checkpoint.load(tmp_path / 'ckpt.pt')
    assert math.isclose(ckpt['best_val_loss'], 1.5) and ckpt['iter_num'] == 7


def test_an_adapter_of_peft_for_a_run_of_ours(tmp_path, monkeypatch):
    """What export.py --adapter writes names the run's file as its base."""
    from flatgpt import lora

    torch.manual_seed(0)
    tok = CharTokenizer('abcd')
    model = GPT(GPTConfig(**{**SMALL, 'vocab_size': 4}))
    checkpoint.save(tmp_path / 'best.pt', state_of(model, tokenizer=tok.to_dict()))
    lora.put(model, rank=2, alpha=4.0, dropout=0.0, targets='attn|mlp')
    with torch.no_grad():
        for p in lora.adapters(model).values():
            p.add_(torch.randn_like(p), alpha=0.2)
    lora.save_peft(tmp_path / 'adapter', model, 'gpt2', {'rank': 2, 'alpha': 4.0, 'dropout': 0.0},
                   str(tmp_path / 'best.pt'))
    again, found, _ = checkpoint.load_model(tmp_path / 'adapter')
    expected = lora.merge(model)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(again.parameters(), expected.parameters()))
    assert found.chars == tok.chars
