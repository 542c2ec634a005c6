"""Folders of Hugging Face: our logits are those of its own classes, and what goes in comes out bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hub import COMMIT, cut_off, server  # noqa: F401

from flatgpt import architectures, checkpoint, hub, pretrained, tokenizer
from flatgpt.engine import generate
from flatgpt.errors import UserError
from flatgpt.tokenizer import BpeTokenizer
from model import ARCHS, GPT, GPTConfig

SMALL = {'vocab_size': 300, 'hidden_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'intermediate_size': 40, 'max_position_embeddings': 32, 'bos_token_id': 0, 'eos_token_id': 0}
SMALL_GPT2 = {'vocab_size': 300, 'n_embd': 24, 'n_layer': 2, 'n_head': 4, 'n_positions': 32, 'bos_token_id': 0,
              'eos_token_id': 0}
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}
LINEAR = {'rope_type': 'linear', 'factor': 4.0}
DYNAMIC = {'rope_type': 'dynamic', 'factor': 4.0}
THEIRS = {
    'gpt2': ('GPT2', SMALL_GPT2),
    'gpt2, other': ('GPT2', {**SMALL_GPT2, 'n_inner': 40, 'activation_function': 'gelu', 'layer_norm_epsilon': 1e-3,
                             'tie_word_embeddings': False}),
    'llama': ('Llama', {**SMALL, 'num_key_value_heads': 4}),
    'llama, groups': ('Llama', {**SMALL, 'num_key_value_heads': 2, 'attention_bias': True, 'mlp_bias': True}),
    'llama, tied': ('Llama', {**SMALL, 'num_key_value_heads': 1, 'tie_word_embeddings': True, 'rms_norm_eps': 1e-2,
                              'head_dim': 8, 'rope_theta': 5e3, 'rope_scaling': LLAMA3}),
    'llama, linear': ('Llama', {**SMALL, 'num_key_value_heads': 2, 'rope_theta': 5e3, 'rope_scaling': LINEAR}),
    'mistral, dynamic': ('Mistral', {**SMALL, 'num_key_value_heads': 2, 'rope_theta': 5e3, 'rope_scaling': DYNAMIC,
                                     'sliding_window': None, 'head_dim': 8}),
    'llama, biases of attention': ('Llama', {**SMALL, 'attention_bias': True}),
    'llama, biases of the MLP': ('Llama', {**SMALL, 'mlp_bias': True}),
    'mistral': ('Mistral', {**SMALL, 'num_key_value_heads': 2, 'sliding_window': None, 'head_dim': 8}),
    'mistral, window': ('Mistral', {**SMALL, 'num_key_value_heads': 2, 'sliding_window': 7, 'head_dim': 8}),
    'qwen2': ('Qwen2', {**SMALL, 'num_key_value_heads': 2, 'tie_word_embeddings': True}),
    'qwen3': ('Qwen3', {**SMALL, 'num_key_value_heads': 2, 'head_dim': 16, 'tie_word_embeddings': True,
                        'rope_theta': 1e6}),
    'qwen3, untied': ('Qwen3', {**SMALL, 'num_key_value_heads': 4, 'head_dim': 6}),
}


def classes(name):
    """Their configuration and their model. Imported here: it takes two seconds, also where no test needs it."""
    import transformers

    transformers.logging.disable_progress_bar()
    model = getattr(transformers, f'{name}LMHeadModel' if name == 'GPT2' else f'{name}ForCausalLM')
    return getattr(transformers, f'{name}Config'), model


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """{name: (a folder that transformers wrote, its model)}, with weights and biases that all matter."""
    made, root = {}, tmp_path_factory.mktemp('theirs')
    for number, (name, (kind, fields)) in enumerate(THEIRS.items()):
        torch.manual_seed(number)
        config, model = classes(kind)
        model = model(config(**fields)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        model.save_pretrained(root / str(number))
        made[name] = root / str(number), model
    return made


def tokens():
    return torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(0))


def loaded(folder):
    return checkpoint.build(checkpoint.load(folder), folder).eval()


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of one folder, to be damaged."""
    def copied(name='gpt2'):
        shutil.copytree(folders[name][0], tmp_path / 'copy', dirs_exist_ok=True)
        return tmp_path / 'copy'
    return copied


def change(folder, **fields):
    path = folder / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---------------------------------------------------------------------------------------------------------------------
# in, and out again

@pytest.mark.parametrize('name', THEIRS)
def test_logits_are_those_of_their_own_class(folders, name):
    folder, theirs = folders[name]
    with torch.inference_mode():
        ours = loaded(folder)(tokens(), tokens())[0]
        torch.testing.assert_close(ours, theirs(tokens()).logits, rtol=0, atol=1e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize('name', THEIRS)
def test_in_out_and_in_again_is_the_same_bit_for_bit(folders, name, tmp_path):
    folder, _ = folders[name]
    model, tok = loaded(folder), BpeTokenizer.train(['abc'], 300)
    kind = architectures.hf_architecture(model.config)
    pretrained.save(tmp_path / 'again', model, kind, torch.float32, tok)
    first, second = load_file(folder / 'model.safetensors'), load_file(tmp_path / 'again' / 'model.safetensors')
    more = second.keys() - first.keys()   # a class that has a bias everywhere or nowhere
    assert first.keys() <= second.keys() and all(key.endswith('bias') and not second[key].any() for key in more)
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = loaded(tmp_path / 'again')
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize('name', THEIRS)
def test_what_goes_out_is_read_by_their_own_class(folders, name, tmp_path):
    """Their configuration, read from what we wrote, is the one that we read, down to the stretched positions."""
    from transformers import AutoModelForCausalLM

    folder, theirs = folders[name]
    model = loaded(folder)
    pretrained.save(tmp_path / 'again', model, architectures.hf_architecture(model.config), torch.float32,
                    BpeTokenizer.train(['abc'], 300))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / 'again').eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize('changes', [
    {}, {'bias': False}, {'gelu': 'erf'}, {'tie_weights': False}, {'norm_eps': 1e-3}, {'n_inner': 40},
    ARCHS['llama'] | {'bias': False}, ARCHS['llama'] | {'n_kv_head': 2}, ARCHS['qwen3'] | {'bias': False},
    ARCHS['qwen3'] | {'bias': False, 'head_dim': 10, 'rope_scaling': (4.0, 1.0, 2.0, 16.0)}])
def test_a_model_of_ours_gives_the_same_logits_in_their_class(changes, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = GPT(GPTConfig(**{'vocab_size': 300, 'block_size': 32, 'n_layer': 2, 'n_embd': 24, 'n_head': 4, **changes}))
    with torch.no_grad():
        for p in model.eval().parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    kind = architectures.hf_architecture(model.config)
    pretrained.save(tmp_path / 'new', model, kind, torch.float32, BpeTokenizer.train(['abc'], 300))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'new')
    assert type(theirs).__name__ == architectures.CLASSES[kind]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens()).logits, model(tokens(), tokens())[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(('changes', 'words'), [
    ({'mlp': 'relu2'}, "mlp='relu2'"), ({'softcap': 5.0}, 'softcap=5.0'), ({'window': 8}, 'window=8'),
    ({'layer_scale': 0.1}, 'layer_scale=0.1'), ({'pos': 'alibi'}, "pos='alibi'"), ({'qk_norm': True}, 'qk_norm=True'),
    ({'n_kv_head': 1}, 'n_kv_head=1'), (ARCHS['qwen3'] | {'bias': True}, 'bias=True'),
    (ARCHS['speedrun'], 'softcap=15.0')])
def test_an_architecture_that_no_class_has_is_refused_with_the_switch(changes, words):
    with pytest.raises(UserError, match=r'no class of Hugging Face has .*--arch=gpt2') as refusal:
        architectures.hf_architecture(GPTConfig(**{**changes}))
    assert words in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# forms that are met

def test_gpt2_as_it_is_on_the_hub_without_prefix_and_with_masks(folders, tmp_path):
    folder, _ = folders['gpt2']
    tensors = load_file(folder / 'model.safetensors')
    tensors = {name.removeprefix('transformer.'): tensor for name, tensor in tensors.items()}
    tensors |= {'h.0.attn.bias': torch.ones(1, 1, 32, 32), 'h.1.attn.masked_bias': torch.tensor(-1e4)}
    save_file(tensors, tmp_path / 'model.safetensors')
    shutil.copy(folder / 'config.json', tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(loaded(tmp_path).parameters(), loaded(folder).parameters()))


def test_weights_in_bfloat16_are_read_and_written_without_loss(folders, tmp_path):
    torch.manual_seed(0)
    theirs = type(folders['qwen3'][1])(folders['qwen3'][1].config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / 'in')
    model = loaded(tmp_path / 'in')
    assert model.lm_head.weight.dtype == torch.float32
    pretrained.save(tmp_path / 'out', model, 'qwen3', torch.bfloat16, BpeTokenizer.train(['abc'], 300))
    first, second = (load_file(tmp_path / part / 'model.safetensors') for part in ('in', 'out'))
    assert all(torch.equal(first[key], second[key]) for key in second)


def test_a_tied_head_that_is_stored_twice_must_be_the_same(copy):
    folder = copy()
    tensors = load_file(folder / 'model.safetensors')
    head = tensors['transformer.wte.weight'].clone()
    save_file({**tensors, 'lm_head.weight': head}, folder / 'model.safetensors')
    loaded(folder)
    save_file({**tensors, 'lm_head.weight': head + 1}, folder / 'model.safetensors')
    with pytest.raises(UserError, match='tie_word_embeddings'):
        checkpoint.load(folder)


@pytest.mark.parametrize('name, rope', [('llama, tied', LLAMA3), ('qwen3', {'rope_type': 'default'}),
                                        ('llama, linear', LINEAR), ('mistral, dynamic', DYNAMIC)])
def test_older_and_newer_configurations_of_rotary_positions_mean_the_same(copy, folders, name, rope):
    """transformers 5 writes rope_parameters; before, there were rope_theta and rope_scaling, with a type."""
    base = THEIRS[name][1]['rope_theta']
    folder = copy(name)
    fields = json.loads((folder / 'config.json').read_text())
    for key in ('rope_parameters', 'rope_theta', 'rope_scaling'):
        fields.pop(key, None)
    older = {'type': rope['rope_type'], **{key: value for key, value in rope.items() if key != 'rope_type'}}
    for written in ({'rope_parameters': {'rope_theta': base, **rope}}, {'rope_theta': base, 'rope_scaling': rope},
                    {'rope_theta': base, 'rope_scaling': older if len(older) > 1 else None},
                    {'rope_parameters': {'rope_type': 'default', 'rope_theta': base}, 'rope_scaling': older}):
        (folder / 'config.json').write_text(json.dumps({**fields, **written}))
        assert loaded(folder).config == loaded(folders[name][0]).config


def test_nanogpt_can_read_what_is_finetuned_from_gpt2(folders):
    from model import NANOGPT_FIELDS
    assert set(loaded(folders['gpt2'][0]).config.to_dict()) == set(NANOGPT_FIELDS)


def test_the_tokenizer_of_a_folder_comes_along(folders, copy):
    folder = copy()
    assert 'tokenizer' not in checkpoint.load(folder)
    tok = BpeTokenizer.train(['hello world ' * 30, '你好'], 300)
    (folder / 'tokenizer.json').write_text(tok.json, encoding='utf-8')
    change(folder, eos_token_id=[7, 8])
    (folder / 'generation_config.json').unlink()
    _, found, _ = checkpoint.load_model(folder)
    assert found.encode('hello 你').tolist() == tok.encode('hello 你').tolist() and found.ends == (7, 8)


def test_gpt2s_two_files_are_a_tokenizer_too(copy):
    folder = copy()
    tok = BpeTokenizer.train(['hello world, hello words ' * 30], 300)
    model = json.loads(tok.json)['model']
    (folder / 'vocab.json').write_text(json.dumps(model['vocab']))
    merges = ['#version: 0.2', *(' '.join(pair) for pair in model['merges']), '']
    (folder / 'merges.txt').write_text('\n'.join(merges), encoding='utf-8')
    _, found, _ = checkpoint.load_model(folder)
    for special in (False, True):
        text = 'hello, words<|endoftext|> é'
        assert found.encode(text, special=special).tolist() == tok.encode(text, special=special).tolist()
    assert found.decode(found.encode('hello, 你')) == 'hello, 你' and found.eot == 0


NAMES = ['<unk>', '<s>', '</s>', '<pad>', '<|im_end|>']   # ids 0 to 4


def named_tokenizer(special=NAMES):
    return BpeTokenizer.train(['hello world ' * 30, '你好'], 300, special=special)


def write(folder, **files):
    """Write JSON files, by their names without .json, into a folder."""
    for name, content in files.items():
        (folder / f'{name}.json').write_text(json.dumps(content), encoding='utf-8')


@pytest.mark.parametrize(('files', 'ends', 'notice'), [
    ({'config': {'eos_token_id': [0, 2]}}, (0, 2), ''),
    ({'config': {'eos_token_id': 2}, 'generation_config': {'eos_token_id': [4, 2]}}, (4, 2), ''),
    ({'config': {'eos_token_id': 2}, 'generation_config': {'eos_token_id': [2, 4]},
      'tokenizer_config': {'eos_token': '<|im_end|>'}}, (4, 2), ''),
    ({'config': {'eos_token_id': 1}, 'tokenizer_config': {'eos_token': '</s>'}}, (2, 1), 'files disagree'),
    ({'config': {}, 'special_tokens_map': {'eos_token': {'content': '</s>', 'lstrip': False}}}, (2,), ''),
    ({'config': {'eos_token_id': 99_999}, 'tokenizer_config': {'eos_token': '</s>'}}, (2,), ''),
    ({'config': {'eos_token_id': None}}, (2,), ''), ({'config': {'eos_token_id': 99_999}}, (2,), ''),
    ({'config': {'eos_token_id': -1}, 'tokenizer_config': {'eos_token': 'nothing'}}, (2,), ''),
    ({'config': {'eos_token_id': ['nothing', {}, True]}, 'tokenizer_config': {'eos_token': None}}, (2,), ''),
])
def test_all_files_are_searched_for_the_tokens_that_end_a_text(tmp_path, capsys, files, ends, notice):
    (tmp_path / 'tokenizer.json').write_text(named_tokenizer().json, encoding='utf-8')
    write(tmp_path, **files)
    tok = pretrained.tokenizer_in(tmp_path)
    assert tok.ends == ends and tok.eot == ends[0]
    err = capsys.readouterr().err
    assert notice in err and err.count('\n') == bool(notice)
    again = tokenizer.from_dict(tok.to_dict())
    assert again.ends == ends and again.files == tok.files


def test_a_folder_that_names_no_end_is_told(tmp_path, capsys):
    (tmp_path / 'tokenizer.json').write_text(named_tokenizer(['<x>']).json, encoding='utf-8')
    assert pretrained.tokenizer_in(tmp_path).ends == ()
    assert capsys.readouterr().err.endswith('names no token that ends a text: samples go on to their last token\n')


@pytest.mark.parametrize('old', [True, False], ids=['vocab.json', 'tokenizer.json'])
@pytest.mark.parametrize('files', [
    {'added_tokens': {'<|user|>': 301, '<|assistant|>': 300}},
    {'tokenizer_config': {'added_tokens_decoder': {'300': {'content': '<|assistant|>', 'special': False},
                                                   '301': {'content': '<|user|>', 'special': True}}}},
    {'added_tokens': {'<|user|>': 301}, 'tokenizer_config': {
        'added_tokens_decoder': {'300': {'content': '<|assistant|>'}}}},
], ids=['added_tokens.json', 'tokenizer_config.json', 'both'])
def test_tokens_beside_the_vocabulary_are_tokens(tmp_path, files, old):
    tok = BpeTokenizer.train(['hello world ' * 30, '你好', *map(str, range(1000))], 300)
    assert tok.vocab_size == 300
    if old:
        model = json.loads(tok.json)['model']
        write(tmp_path, vocab=model['vocab'])
        (tmp_path / 'merges.txt').write_text('\n'.join(' '.join(pair) for pair in model['merges']), encoding='utf-8')
    else:
        (tmp_path / 'tokenizer.json').write_text(tok.json, encoding='utf-8')
    write(tmp_path, **files)
    found = pretrained.tokenizer_in(tmp_path)
    assert found.vocab_size == 302
    assert found.encode('<|user|>hi<|assistant|>', special=True).tolist() == [301, *tok.encode('hi'), 300]
    assert found.decode([301, 300]) == '<|user|><|assistant|>'


def test_added_tokens_with_a_gap_are_refused(tmp_path):
    (tmp_path / 'tokenizer.json').write_text(named_tokenizer().json, encoding='utf-8')
    write(tmp_path, added_tokens={'<|user|>': 999})
    with pytest.raises(UserError, match=r"the id 999 of the added token '<\|user\|>' does not follow"):
        pretrained.tokenizer_in(tmp_path)


def test_an_added_token_beyond_the_embedding_is_plain_text(folders, copy, capsys):
    """As the [PAD] that a finetune adds for its batches, in either of the two files."""
    folder, tok = copy('llama'), named_tokenizer()
    for files in ({'added_tokens': {'[PAD]': tok.vocab_size}}, {'tokenizer_config': {
            'added_tokens_decoder': {str(tok.vocab_size): {'content': '[PAD]'}}}}):
        (folder / 'tokenizer.json').write_text(tok.json, encoding='utf-8')
        write(folder, **files)
        change(folder, vocab_size=tok.vocab_size)
        found = pretrained.tokenizer_in(folder)
        assert found.vocab_size == tok.vocab_size
        assert found.encode('a[PAD]b', special=True).tolist() == tok.encode('a[PAD]b').tolist()
        assert f'the model has {tok.vocab_size:,} tokens, none for [PAD]: read as plain text' in capsys.readouterr().err
        (folder / 'added_tokens.json').unlink(missing_ok=True)
    change(folder, vocab_size=tok.vocab_size + 1)
    assert pretrained.tokenizer_in(folder).vocab_size == tok.vocab_size + 1


def test_a_byte_order_mark_is_no_part_of_a_file(copy, tmp_path):
    folder = copy('gpt2')
    (folder / 'tokenizer.json').write_text(named_tokenizer().json, encoding='utf-8')
    write(folder, tokenizer_config={'eos_token': '</s>'})
    (folder / 'chat_template.jinja').write_text('{{ messages }}', encoding='utf-8')
    plain = pretrained.tokenizer_in(folder).to_dict()
    for path in folder.iterdir():
        if path.suffix in ('.json', '.jinja'):
            path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    assert pretrained.tokenizer_in(folder).to_dict() == plain
    assert checkpoint.load(folder)['model_args']['n_embd'] == 24


def test_dynamic_positions_beyond_the_context_are_transformers_with_a_cache(folders):
    """The base grows with each token; what is in the cache keeps the base that it had, in both."""
    folder, theirs = folders['mistral, dynamic']
    model, start = checkpoint.build(checkpoint.load(folder), folder, block_size=64).eval(), tokens()[:1, :24]
    assert model.config.rope_scaling == ('dynamic', 4.0, 32.0)
    ours = [int(token) for token, _ in generate(model, start, 36, temperature=0)]
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(start, max_new_tokens=36, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert ours == expected[0, 24:].tolist() and len(set(ours)) > 5


@pytest.mark.parametrize('name', hub.FOLDERS)
def test_a_folder_of_a_recipe_that_is_missing_is_named_with_the_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f'^there is no folder {name} here: hf download .* --local-dir {name}$'):
        checkpoint.resolve(name)


ROLES = {'tokenizer_config': {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>',
                              'unk_token': '<unk>', 'pad_token': '<pad>', 'padding_side': 'left',
                              'model_max_length': 10**30, 'auto_map': {'AutoTokenizer': ['x.Y', None]}},
         'generation_config': {'bos_token_id': 1, 'eos_token_id': [2, 4], 'pad_token_id': 3, 'temperature': 0.6,
                               'do_sample': True}}


def test_special_tokens_keep_their_roles_from_a_folder_through_a_checkpoint_to_a_folder(copy, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    folder = copy('llama')
    (folder / 'tokenizer.json').write_text(named_tokenizer().json, encoding='utf-8')
    write(folder, **ROLES)
    (folder / 'chat_template.jinja').write_text('{{ messages }}你', encoding='utf-8')
    change(folder, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    ckpt = checkpoint.load(folder)
    checkpoint.save(tmp_path / 'ckpt.pt', {**ckpt, 'version': 1})
    model, tok, _ = checkpoint.load_model(tmp_path / 'ckpt.pt')
    pretrained.save(tmp_path / 'out', model, 'llama', torch.float32, tok)
    first, second = (json.loads((where / 'config.json').read_text()) for where in (folder, tmp_path / 'out'))
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id', 'max_position_embeddings'):
        assert first[name] == second[name]
    theirs = AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token) == ('<s>', '</s>', '<unk>', '<pad>')
    assert theirs.padding_side == 'left' and theirs.chat_template == '{{ messages }}你'
    assert GenerationConfig.from_pretrained(tmp_path / 'out').to_diff_dict() == \
        GenerationConfig.from_pretrained(folder).to_diff_dict()
    assert 'auto_map' not in (tmp_path / 'out' / 'tokenizer_config.json').read_text()


def test_a_tokenizer_of_ours_gets_no_roles_that_it_has_not(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    config = GPTConfig(300, 8, n_layer=1, n_embd=8, n_head=2, **ARCHS['llama'])
    pretrained.save(tmp_path / 'out', GPT(config), 'llama', torch.float32, named_tokenizer(['<|endoftext|>', '<s>']))
    theirs, config = AutoTokenizer.from_pretrained(tmp_path / 'out'), AutoConfig.from_pretrained(tmp_path / 'out')
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (None, '<|endoftext|>', None)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 0, None)


def test_a_tokenizer_that_only_another_library_reads_is_named(copy):
    folder = copy()
    (folder / 'tokenizer.model').touch()
    with pytest.raises(UserError, match=r'tokenizer\.model alone: write tokenizer\.json once'):
        checkpoint.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize(('name', 'fields', 'words'), [
    ('gpt2', {'model_type': 'bert'}, "type 'bert': expected one of 'gpt2', 'llama', 'mistral', 'qwen2', 'qwen3'"),
    ('gpt2', {'model_type': None}, 'type None'),
    ('gpt2', {'activation_function': 'relu'}, "activation_function='relu'"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
    ('llama', {'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ('llama', {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, "rope_type='yarn'"),
    ('llama', {'quantization_config': {'bits': 4}}, 'quantization_config'),
    ('qwen3', {'use_sliding_window': True}, 'use_sliding_window=True'),
    ('qwen3', {'attention_bias': True}, 'attention_bias=True'),
    *(('gpt2', {name: value}, 'says what cannot be') for name, value in (
        ('n_embd', '16'), ('n_layer', None), ('n_layer', 2.0), ('n_inner', '64'), ('layer_norm_epsilon', '1e-5'))),
    ('gpt2', {'n_head': 0}, 'says what cannot be'), ('gpt2', {'n_head': 5}, 'n_head=5'),
    ('gpt2', {'model_type': ['gpt2']}, "says what cannot be"),
    ('llama', {'rope_parameters': 'linear'}, 'says what cannot be'),
    ('llama', {'rope_parameters': {'rope_type': 'llama3'}}, 'does not say its factor'),
    ('gpt2', {'n_embd': 48}, 'has shape (300, 24), and its config.json means (300, 48)'),
    ('gpt2', {'n_layer': 3}, 'has no weights transformer.h.2.ln_1.weight'),
    ('gpt2', {'n_layer': 1}, 'has weights that a gpt2 has not: transformer.h.1.'),
])
def test_what_we_cannot_compute_is_refused_by_name(copy, name, fields, words):
    folder = copy(name)
    change(folder, **fields)
    with pytest.raises(UserError) as refusal:
        checkpoint.load(folder)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


def test_a_configuration_that_lacks_a_size_is_refused(copy):
    folder = copy('llama')
    fields = json.loads((folder / 'config.json').read_text())
    del fields['hidden_size']
    (folder / 'config.json').write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r'config\.json does not say its hidden_size'):
        checkpoint.load(folder)


@pytest.mark.parametrize('content', ['', '{', '[]', '\xff'])
def test_a_damaged_configuration_is_refused(copy, content):
    folder = copy()
    (folder / 'config.json').write_bytes(content.encode('latin-1'))
    with pytest.raises(UserError, match=r'cannot read .*config\.json'):
        checkpoint.load(folder)


@pytest.mark.parametrize('left', [0, 4, 100, -100])
def test_truncated_weights_are_refused(copy, left):
    path = copy() / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r'cannot read .*model\.safetensors: .*it is cut off, damaged or not'):
        checkpoint.load(path.parent)


class Evil:
    def __reduce__(self):
        return print, ('executed',)


LLM_C = (20240326).to_bytes(4, 'little')


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
@pytest.mark.parametrize(('content', 'words'), [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n', 'pointer of Git LFS: run `git lfs pull`'),
    (b'GGUF\3', 'a GGUF file: give the folder'), (LLM_C + b'0' * 99, "a model of llm.c: convert it"),
    (b'<!DOCTYPE html>', 'a web page'), (b'what', 'cut off, damaged')])
def test_a_file_that_holds_no_weights_is_named_with_what_helps(copy, name, content, words):
    folder = copy()
    (folder / 'model.safetensors').unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f'cannot read .*{name}: .*{words}'):
        checkpoint.load(folder)


def test_nothing_in_a_pickle_is_executed(copy, capsys):
    folder = copy()
    (folder / 'model.safetensors').unlink()
    torch.save({'x': Evil()}, folder / 'pytorch_model.bin')
    with pytest.raises(UserError, match=r'it carries code \([\w.]*print\), which is not run'):
        checkpoint.load(folder)
    assert capsys.readouterr().out == ''


def test_quantized_weights_and_none_are_refused(copy):
    folder = copy()
    tensors = load_file(folder / 'model.safetensors')
    tensors['transformer.h.0.attn.c_attn.weight'] = tensors['transformer.h.0.attn.c_attn.weight'].to(torch.int8)
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(UserError, match=r'c_attn\.weight has type torch\.int8, quantized weights are not read'):
        checkpoint.load(folder)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(UserError, match=r'has no weights: expected model\.safetensors or pytorch_model\.bin'):
        checkpoint.load(folder)


def in_shards(tensors, folder):
    """Write tensors into two pickles and their index."""
    names = sorted(tensors)
    parts = {'pytorch_model-00001-of-00002.bin': names[::2], 'pytorch_model-00002-of-00002.bin': names[1::2]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps(
        {'weight_map': {name: file for file, part in parts.items() for name in part}}))


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'llama, tied'])
@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.', 'base_model.model.'])
@pytest.mark.parametrize('form', ['safetensors', 'bin', 'bins'])
def test_weights_are_read_with_the_prefixes_of_wrappers_from_all_formats(copy, folders, name, prefix, form):
    folder = copy(name)
    tensors = {prefix + key: tensor for key, tensor in load_file(folder / 'model.safetensors').items()}
    (folder / 'model.safetensors').unlink()
    if form == 'safetensors':
        save_file(tensors, folder / 'model.safetensors')
    elif form == 'bin':
        torch.save(tensors, folder / 'pytorch_model.bin')
    else:
        in_shards(tensors, folder)
    assert all(torch.equal(p, q) for p, q in zip(loaded(folder).parameters(), loaded(folders[name][0]).parameters()))


@pytest.mark.parametrize('name', ['llama, tied', 'qwen3'])
def test_a_tied_head_that_is_not_declared_is_tied_and_told(copy, folders, name, capsys):
    folder = copy(name)
    change(folder, tie_word_embeddings=False)
    assert loaded(folder).config == loaded(folders[name][0]).config
    assert capsys.readouterr().err.count('has no lm_head.weight: the embedding is the head, too\n') == 1


def test_the_later_of_two_places_for_the_base_of_positions_counts(copy, folders):
    folder = copy('qwen3')
    change(folder, rope_theta=1e4, rope_parameters={'rope_type': 'default', 'rope_theta': 1e6})
    assert loaded(folder).config.rope_base == 1e6


@pytest.mark.parametrize('index', [{}, {'weight_map': []}, {'weight_map': {'a': ['b']}}, {'weight_map': {}},
                                   {'weight_map': {'a': '../../etc/passwd'}}])
def test_an_index_that_names_no_weights_is_refused(copy, index):
    folder = copy()
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match=r'index\.json names .*expected files of weights'):
        checkpoint.load(folder)


def test_a_projection_of_another_width_is_refused(copy):
    folder = copy('llama')
    tensors = load_file(folder / 'model.safetensors')
    tensors['model.layers.0.self_attn.k_proj.weight'] = torch.zeros(24, 20)
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(UserError, match=r'k_proj.weight has shape \(24, 20\), and its config.json means \(24, 24\)'):
        checkpoint.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# from the hub

def serve(server, folder, name='owner/name'):   # noqa: F811
    server.repos[name] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'pickle'])
def test_a_model_on_the_hub_is_fetched_whole_and_loads_without_network_afterwards(
        server, folders, tmp_path, monkeypatch, name):   # noqa: F811
    folder, theirs = folders['llama' if name == 'pickle' else name]
    theirs.save_pretrained(tmp_path / 'shards', max_shard_size='20KB' if name == 'llama' else '1GB')
    if name == 'pickle':
        in_shards(load_file(tmp_path / 'shards' / 'model.safetensors'), tmp_path / 'shards')
        (tmp_path / 'shards' / 'model.safetensors').unlink()
    (tmp_path / 'shards' / 'tokenizer.json').write_text(BpeTokenizer.train(['abc'], 300).json)
    serve(server, tmp_path / 'shards')
    found = checkpoint.resolve('owner/name')
    assert found.name == COMMIT
    model, tok, ckpt = checkpoint.load_model('owner/name')
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded(folder).parameters()))
    assert tok.eot == 0 and ckpt['iter_num'] == 0
    server.asked.clear()
    for how in ('offline', 'nobody', 'offline'):
        cut_off(monkeypatch, how)
        again = checkpoint.load_model('owner/name')[0]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters())) and server.asked == []
        for path in (tmp_path / 'cache').rglob('trees/*'):   # which other tools do not write
            path.unlink()


def test_the_weights_of_another_architecture_are_not_even_fetched(server, folders, copy):   # noqa: F811
    folder = copy()
    change(folder, model_type='bert')
    serve(server, folder)
    with pytest.raises(UserError, match="owner/name is a model of type 'bert'"):
        checkpoint.load_model('owner/name')
    assert not [asked for asked in server.asked if 'safetensors' in asked[1]]


def test_a_repository_without_a_model_is_one_line(server):   # noqa: F811
    server.repos['owner/name'] = {'README.md': b'x'}
    with pytest.raises(UserError, match=r'owner/name has no config\.json'):
        checkpoint.load_model('owner/name')


def test_a_shard_that_is_missing_is_one_line(server, folders, tmp_path):   # noqa: F811
    folders['llama'][1].save_pretrained(tmp_path, max_shard_size='20KB')
    (tmp_path / 'model-00002-of-00003.safetensors').unlink(missing_ok=True)
    for path in sorted(tmp_path.glob('model-00002*')):
        path.unlink()
    serve(server, tmp_path)
    with pytest.raises(UserError, match='has no model-00002'):
        checkpoint.load_model('owner/name')


def test_gpt2_names_its_context_as_the_converter_of_llama_cpp_asks_for_it():
    config = GPTConfig(block_size=48, n_layer=1, n_head=1, n_embd=8)
    hf_config = architectures.config_to_hf(config, 'gpt2', torch.float32, {})
    assert (hf_config['n_ctx'], hf_config['n_positions']) == (48, 48)
