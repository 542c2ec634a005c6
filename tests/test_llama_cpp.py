"""GGUF files: what the gguf library reads back is the model, and llama.cpp splits and continues texts as we do."""

import copy
import json
import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, assert_one_line, needs, node_llama_cpp
from in_process import call
from test_checkpoint import state_of
from test_export import disturb
from test_tokenizer import BYTES, LINES, as_json, byte_level, sentencepiece, unigram, wordpiece

from flatgpt import checkpoint, conversation, encodings, llama_cpp
from flatgpt.errors import UserError
from flatgpt.tokenizer import BpeTokenizer, CharTokenizer, TiktokenTokenizer
from model import ARCHS, GPT, GPTConfig

LLAMA3 = (8.0, 1.0, 4.0, 64.0)
MODELS = {   # fields of GPTConfig
    'gpt2': {**ARCHS['gpt2']},
    'gpt2, other': {**ARCHS['gpt2'], 'bias': False, 'tie_weights': False, 'n_inner': 96, 'norm_eps': 1e-3},
    'llama': {**ARCHS['llama'], 'bias': False},
    'llama, biases': {**ARCHS['llama'], 'n_kv_head': 2, 'rope_scaling': ('linear', 2.0)},
    'llama, tied': {**ARCHS['llama'], 'bias': False, 'tie_weights': True, 'n_kv_head': 1, 'head_dim': 32,
                    'rope_base': 5e3, 'rope_scaling': LLAMA3},
    'llama, dynamic': {**ARCHS['llama'], 'bias': False, 'rope_scaling': ('dynamic', 4.0, 64.0)},
    'mistral': {**ARCHS['llama'], 'bias': False, 'window': 64},
    'qwen3': {**ARCHS['qwen3'], 'bias': False, 'n_kv_head': 2, 'head_dim': 32, 'rope_base': 1e6},
}


@pytest.fixture(scope='module')
def trained():
    return BpeTokenizer.train(LINES, 400)


def model_of(name, tok, padding=0):
    torch.manual_seed(0)
    model = GPT(GPTConfig(tok.vocab_size + padding, 64, n_layer=2, n_embd=64, n_head=4, **MODELS[name])).eval()
    disturb(model.parameters())
    return model


def written(path, model, tok, dtype='F32'):
    """The GGUFReader of a file of a model."""
    gguf = pytest.importorskip('gguf')
    llama_cpp.write(llama_cpp.header(model.config, tok, dtype, 'some name'), path, model, dtype)
    return gguf.GGUFReader(path)


def fields_of(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors_of(reader):
    import gguf
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).astype('float32')) for t in reader.tensors}


# ---------------------------------------------------------------------------------------------------------------------
# the model

@pytest.mark.parametrize('name', MODELS)
def test_the_file_has_all_weights_under_the_names_of_llama_cpp(tmp_path, trained, name):
    model = model_of(name, trained)
    tensors, config, state = tensors_of(written(tmp_path / 'm', model, trained)), model.config, model.state_dict()

    def take(name, rows=None):
        """A tensor of the file; of queries or keys, with its rows in our order, i before i + D / 2."""
        tensor, D = tensors.pop(name), config.head_width
        if rows and config.pos == 'rope' and not config.qk_norm:
            tensor = tensor.view(rows, D // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def same(ours, *parts):
        assert torch.equal(state[ours], torch.cat(parts))

    same('transformer.wte.weight', take('token_embd.weight'))
    same('transformer.ln_f.weight', take('output_norm.weight'))
    if not config.tie_weights:
        same('lm_head.weight', take('output.weight'))
    if config.pos == 'learned':
        same('transformer.wpe.weight', take('position_embd.weight'))
    for i in range(2):
        leaves = ('weight', 'bias') if config.bias else ('weight',)
        for leaf in leaves:
            ours, theirs = f'transformer.h.{i}.{{}}.{leaf}', f'blk.{i}.{{}}.{leaf}'
            if config.pos == 'learned':
                same(ours.format('attn.c_attn'), take(theirs.format('attn_qkv')))
                same(ours.format('mlp.c_fc'), take(theirs.format('ffn_up')))
            else:
                heads = {'q': config.n_head, 'k': config.n_kv_head or config.n_head, 'v': None}
                same(ours.format('attn.c_attn'), *(take(theirs.format(f'attn_{x}'), rows) for x, rows in heads.items()))
                same(ours.format('mlp.c_fc'), take(theirs.format('ffn_gate')), take(theirs.format('ffn_up')))
            same(ours.format('attn.c_proj'), take(theirs.format('attn_output')))
            same(ours.format('mlp.c_proj'), take(theirs.format('ffn_down')))
        same(f'transformer.h.{i}.ln_1.weight', take(f'blk.{i}.attn_norm.weight'))
        same(f'transformer.h.{i}.ln_2.weight', take(f'blk.{i}.ffn_norm.weight'))
        if config.qk_norm:
            same(f'transformer.h.{i}.attn.q_norm.weight', take(f'blk.{i}.attn_q_norm.weight'))
            same(f'transformer.h.{i}.attn.k_norm.weight', take(f'blk.{i}.attn_k_norm.weight'))
    tensors.pop('rope_freqs.weight', None)
    norms = {name for name in tensors if name.endswith('norm.bias')}   # GPT-2's class always has biases
    assert len(norms) == (5 if config.pos == 'learned' else 0)
    rest = tensors.keys() - norms
    if name == 'gpt2, other':
        assert len(rest) == 8 and not any(tensors[name].any() for name in tensors)
    else:
        assert not rest and all(torch.equal(tensors[f'blk.{i}.attn_norm.bias'],
                                            state[f'transformer.h.{i}.ln_1.bias']) for i in range(2) if norms)


@pytest.mark.parametrize(('name', 'expected'), [
    ('gpt2', {'gpt2.context_length': 64, 'gpt2.block_count': 2, 'gpt2.embedding_length': 64,
              'gpt2.attention.head_count': 4, 'gpt2.feed_forward_length': 256,
              'gpt2.attention.layer_norm_epsilon': 1e-5}),
    ('gpt2, other', {'gpt2.feed_forward_length': 96, 'gpt2.attention.layer_norm_epsilon': 1e-3}),
    ('llama, biases', {'llama.rope.scaling.type': 'linear', 'llama.rope.scaling.factor': 2.0,
                       'llama.attention.head_count_kv': 2}),
    ('llama, tied', {'llama.context_length': 64, 'llama.attention.head_count': 4, 'llama.attention.head_count_kv': 1,
                     'llama.attention.key_length': 32, 'llama.attention.value_length': 32, 'llama.rope.freq_base': 5e3,
                     'llama.rope.dimension_count': 32, 'llama.attention.layer_norm_rms_epsilon': 1e-6,
                     'llama.vocab_size': 400, 'llama.rope.scaling.type': None}),
    ('llama, dynamic', {'llama.rope.scaling.type': None, 'llama.attention.head_count_kv': 4}),
    ('qwen3', {'general.architecture': 'qwen3', 'general.name': 'some name', 'general.file_type': 0,
               'qwen3.rope.freq_base': 1e6, 'qwen3.feed_forward_length': 192}),
])
def test_the_metadata_say_what_the_configuration_says(tmp_path, trained, name, expected):
    found = fields_of(written(tmp_path / 'm', model_of(name, trained), trained))
    for key, value in expected.items():
        assert found.get(key) == (pytest.approx(value) if isinstance(value, float) else value), key


def test_llama3s_scaling_is_a_factor_per_pair_of_channels(tmp_path, trained):
    """Pairs that turn often in the original context stay, slow ones are 8 times slower (Grattafiori et al., 2024)."""
    model = model_of('llama, tied', trained)
    factors = tensors_of(written(tmp_path / 'm', model, trained))['rope_freqs.weight']
    turns = 64 / (2 * np.pi * 5e3 ** (torch.arange(0, 32, 2) / 32))
    torch.testing.assert_close(factors[turns > 4], torch.ones(int((turns > 4).sum())))
    torch.testing.assert_close(factors[turns < 1], torch.full((int((turns < 1).sum()),), 8.0))
    between = (turns - 1) / 3
    expected = 1 / (between + (1 - between) / 8)
    torch.testing.assert_close(factors[(turns > 1) & (turns < 4)], expected[(turns > 1) & (turns < 4)])
    assert len(factors) == 16 and factors[0] == 1 and factors[-1] > 7.99 and ((turns > 1) & (turns < 4)).any()


@pytest.mark.parametrize(('dtype', 'file_type', 'error'), [('F16', 1, 5e-4), ('BF16', 32, 4e-3), ('Q8_0', 7, 1e-2)])
def test_matrices_are_rounded_to_a_dtype_and_what_is_small_is_not(tmp_path, trained, dtype, file_type, error):
    model = model_of('gpt2', trained)
    reader = written(tmp_path / 'm', model, trained, dtype)
    assert fields_of(reader)['general.file_type'] == file_type
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert {kinds[name] for name in kinds if not re.search(r'(embd|attn_qkv|output|ffn_\w+)\.weight', name)} == {'F32'}
    assert kinds['position_embd.weight'] == 'F32' and kinds['blk.1.ffn_down.weight'] == dtype
    ours, again = model.transformer.h[1].mlp.c_proj.weight, tensors_of(reader)['blk.1.ffn_down.weight']
    assert 0 < (ours - again).abs().max() < error * ours.abs().max()


def test_rows_that_are_no_multiple_of_a_block_keep_16_bits(tmp_path, trained):
    model = GPT(GPTConfig(400, 8, n_layer=1, n_embd=24, n_head=2, bias=False, **ARCHS['llama']))
    kinds = {t.name: t.tensor_type.name for t in written(tmp_path / 'm', model, trained, 'Q8_0').tensors}
    assert kinds['token_embd.weight'] == 'F16' and kinds['blk.0.ffn_down.weight'] == 'Q8_0'


def test_numbers_beyond_float16_are_refused_and_bfloat16_has_them(tmp_path, trained):
    model = model_of('llama', trained)
    model.lm_head.weight.data[3, 4] = 1e5
    with pytest.raises(UserError, match='output.weight has numbers beyond float16: give --gguf_dtype=BF16'):
        written(tmp_path / 'm', model, trained, 'F16')
    assert tensors_of(written(tmp_path / 'm', model, trained, 'BF16'))['output.weight'].max() > 9e4


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer

def vocabulary(tmp_path, tok, padding=0):
    return fields_of(written(tmp_path / 'v', model_of('llama', tok, padding), tok))


def test_a_trained_tokenizer_is_there_token_by_token(tmp_path, trained):
    found = vocabulary(tmp_path, trained, padding=3)
    assert (found['tokenizer.ggml.model'], found['tokenizer.ggml.pre']) == ('gpt2', 'gpt-2')
    tokens, alphabet = found['tokenizer.ggml.tokens'], encodings.byte_alphabet()
    assert tokens[0] == '<|endoftext|>' and tokens[-3:] == ['[unused400]', '[unused401]', '[unused402]']
    for i in range(1, 400):
        assert bytes(alphabet[char] for char in tokens[i]) == trained.token_bytes(i)
    assert found['tokenizer.ggml.token_type'] == [3] + [1] * 399 + [5] * 3
    merges = [tuple(merge.split(' ')) for merge in found['tokenizer.ggml.merges']]
    assert [first + second for first, second in merges] == tokens[257:400]
    assert (found['tokenizer.ggml.eos_token_id'], found['tokenizer.ggml.bos_token_id']) == (0, 0)
    assert found['tokenizer.ggml.add_bos_token'] is False and found['tokenizer.ggml.add_eos_token'] is False
    assert 'tokenizer.chat_template' not in found


def test_a_tokenizer_like_sentencepieces_has_scores_and_bytes(tmp_path):
    tok = BpeTokenizer(sentencepiece(), eot=2)
    found = vocabulary(tmp_path, tok)
    tokens, scores = found['tokenizer.ggml.tokens'], found['tokenizer.ggml.scores']
    assert found['tokenizer.ggml.model'] == 'llama' and found['tokenizer.ggml.add_space_prefix'] is True
    assert tokens[:3] == ['<unk>', '<s>', '</s>'] and tokens[3:259] == BYTES and tokens[-1] == '▁hello'
    assert found['tokenizer.ggml.token_type'][:4] == [2, 3, 3, 6] and found['tokenizer.ggml.token_type'][-1] == 1
    ranked = sorted((tokens[i] for i in range(259, len(tokens)) if len(tokens[i]) > 1),
                    key=lambda token: -scores[tokens.index(token)])
    assert ranked == ['he', 'll', '▁he', 'llo', '▁hello']
    assert (found['tokenizer.ggml.bos_token_id'], found['tokenizer.ggml.eos_token_id']) == (1, 2)
    assert found['tokenizer.ggml.add_bos_token'] is True and found['tokenizer.ggml.unknown_token_id'] == 0


def test_characters_are_a_list_of_byte_strings(tmp_path):
    found = vocabulary(tmp_path, CharTokenizer('\n\\ a世'), padding=1)
    assert found['tokenizer.ggml.tokens'] == ['\\x0a', '\\x5c', '\\x20', '\\x61', '\\xe4\\xb8\\x96', '[unused5]']
    assert found['tokenizer.ggml.model'] == 'rwkv' and 'tokenizer.ggml.eos_token_id' not in found


def test_tiktokens_encodings_have_their_merges(tmp_path):
    parts = {'name': 'few', 'pat_str': encodings.GPT2_WORDS,
             'mergeable_ranks': {bytes([i]): i for i in range(256)} | {b'ab': 256, b'abc': 257},
             'special_tokens': {'<|endoftext|>': 258, '<|fim|>': 260}}
    found = vocabulary(tmp_path, TiktokenTokenizer('few', parts))
    assert found['tokenizer.ggml.merges'] == ['a b', 'ab c'] and found['tokenizer.ggml.pre'] == 'gpt-2'
    assert found['tokenizer.ggml.tokens'][256:] == ['ab', 'abc', '<|endoftext|>', '[unused259]', '<|fim|>']
    assert found['tokenizer.ggml.token_type'][257:] == [1, 3, 5, 3] and found['tokenizer.ggml.eos_token_id'] == 258


def test_roles_ends_and_the_chat_template_come_along(tmp_path, capsys):
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<a>', '<b>']
    tok = BpeTokenizer.train(LINES, 400, special=special)
    tok.files = {'config.json': {'bos_token_id': 1}}
    tok.ends = (0, 3)
    template = conversation.add_chatml(tok)
    tok.eot = 2
    found = vocabulary(tmp_path, tok)
    assert found['tokenizer.chat_template'] == template.source and 'im_start' in template.source
    roles = {name: found[f'tokenizer.ggml.{name}_token_id'] for name in ('bos', 'eos', 'eot', 'eom')}
    assert roles == {'bos': 1, 'eos': 2, 'eot': 0, 'eom': 3}
    assert not capsys.readouterr().err
    tok.ends = (2, 0, 3, 4)
    vocabulary(tmp_path, tok)
    assert capsys.readouterr().err == 'llama.cpp has three tokens that end a text: [4] are left out\n'


def cut_by(*patterns, normalizer=None):
    """A byte-level tokenizer that cuts words by regexes, one after the other."""
    from tokenizers import Regex, pre_tokenizers

    tok = json.loads(byte_level(special=('<|endoftext|>',)))
    pre = pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in patterns),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made = BpeTokenizer(json.dumps(tok)).encoding
    made.pre_tokenizer = pre
    if normalizer:
        made.normalizer = normalizer
    return BpeTokenizer(made.to_str())


CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
          r'\s+(?!\S)|\s')   # tiktoken's spelling of what Llama 3 has, too
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r'\s+(?!\S)|\s+')
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(('patterns', 'name'), [
    ([GPT2], 'gpt-2'), ([r'\p{N}', GPT2], 'smollm'), ([QWEN], 'qwen2'), ([CL100K], 'llama-bpe')])
def test_the_rule_that_cuts_words_is_found_by_what_it_does(tmp_path, patterns, name):
    assert vocabulary(tmp_path, cut_by(*patterns))['tokenizer.ggml.pre'] == name


def test_composed_characters_are_left_to_the_text(tmp_path):
    from tokenizers import normalizers
    assert vocabulary(tmp_path, cut_by(QWEN, normalizer=normalizers.NFC()))['tokenizer.ggml.pre'] == 'qwen2'


def metaspace(merges):
    """A BPE with byte fallback whose merges are given, as another trainer would leave them."""
    from tokenizers import decoders, models, normalizers

    tokens = ['<unk>', '<s>', '</s>', *BYTES, '▁', *'abclins', *(first + second for first, second in merges)]
    return as_json(models.BPE({token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges, unk_token='<unk>',
                              fuse_unk=True, byte_fallback=True), normalizers.Replace(' ', '▁'), None,
                   decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]),
                   special=('<s>', '</s>'))


def lower_case():
    from tokenizers import normalizers
    return cut_by(GPT2, normalizer=normalizers.Lowercase())


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: cut_by(r'\s+'), 'cuts words by none of the rules of this tokenizer (tried gpt-2, '),
    (lambda: cut_by(r'\d{1,2}', GPT2), 'cuts words by none of the rules'),
    (lower_case, 'cuts words by none of the rules'),
    (lambda: BpeTokenizer(byte_level(add_prefix_space=True)), 'cuts words by none of the rules'),
    (lambda: BpeTokenizer(unigram()), 'of type Unigram'),
    (lambda: BpeTokenizer(wordpiece()), 'of type WordPiece'),
    (lambda: BpeTokenizer(metaspace([('i', 'n'), ('l', 'i'), ('li', 'n')]), eot=2), 'encodes texts otherwise'),
    (lambda: BpeTokenizer(byte_level()), 'names no token that ends a text'),
    (lambda: BpeTokenizer(byte_level(template='<s> <t> $A', special=('<s>', '<t>', '<|endoftext|>'))), 'one at most'),
])
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path, make, words):
    with pytest.raises(UserError, match=re.escape(words)):
        vocabulary(tmp_path, make())
    assert not list(tmp_path.iterdir())


def test_a_space_in_front_is_kept_only_where_the_tokenizer_has_one(tmp_path):
    tok = BpeTokenizer(metaspace([('i', 'n'), ('▁', 'a')]), eot=2)
    assert vocabulary(tmp_path, tok)['tokenizer.ggml.add_space_prefix'] is False


# ---------------------------------------------------------------------------------------------------------------------
# the script

@pytest.fixture(scope='module')
def out_dir(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp('out')
    checkpoint.save(folder / 'best.pt', state_of(model_of('qwen3', trained), tokenizer=trained.to_dict()))
    return folder


def test_the_script_writes_a_file_alone_or_besides_a_folder(out_dir, tmp_path):
    gguf = pytest.importorskip('gguf')
    alone, both = tmp_path / 'new' / 'er' / 'alone.gguf', tmp_path / 'both.gguf'
    done = call('export.py', f'--out_dir={out_dir}', f'--gguf={alone}')
    assert done.returncode == 0 and done.stdout == f'{alone}\n', done.stderr
    assert 'F16, read back and compared' in done.stderr
    assert fields_of(gguf.GGUFReader(alone))['general.name'] == 'alone' and [*alone.parent.iterdir()] == [alone]
    done = call('export.py', f'--out_dir={out_dir}', f'--to={tmp_path / "hf"}', f'--gguf={both}', '--gguf_dtype=F32')
    assert done.returncode == 0 and done.stdout == f'{tmp_path / "hf"}\n{both}\n', done.stderr
    again, ours = checkpoint.load_model(tmp_path / 'hf')[0], tensors_of(gguf.GGUFReader(both))
    assert torch.equal(again.transformer.wte.weight, ours['token_embd.weight'])


@pytest.mark.parametrize(('fields', 'words'), [
    ({**ARCHS['llama'], 'bias': False, 'window': 5}, "window=5: llama.cpp has no window"),
    ({**ARCHS['llama'], 'bias': False, 'rope_scaling': ('dynamic', 2.0, 8.0)}, 'has no dynamic scaling'),
    ({**ARCHS['gpt2'], 'pos': 'alibi'}, "pos='alibi'"), (ARCHS['speedrun'], 'softcap=15.0'),
    ({**ARCHS['llama'], 'layer_scale': 0.1}, 'layer_scale=0.1')])
def test_what_llama_cpp_has_not_is_refused_by_name_before_anything_is_written(tmp_path, fields, words):
    (tmp_path / 'out').mkdir()
    model = GPT(GPTConfig(5, 16, n_layer=1, n_embd=8, n_head=2, **fields))
    checkpoint.save(tmp_path / 'out' / 'best.pt', state_of(model))
    to = f'--gguf={tmp_path / "x.gguf"}', f'--to={tmp_path / "to"}'
    done = call('export.py', f'--out_dir={tmp_path / "out"}', *to)
    assert_one_line(done, 1, words)
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_usage(out_dir, tmp_path):
    where, file = f'--out_dir={out_dir}', tmp_path / 'x.gguf'
    assert_one_line(call('export.py', where), 2, '--to=my-model', '--gguf=my-model.gguf')
    assert_one_line(call('export.py', where, f'--gguf={file}', '--gguf_dtype=Q4'), 2, "gguf_dtype='Q4'", "'Q8_0'")
    assert_one_line(call('export.py', where, f'--gguf={file}', '--adapter'), 2, 'remove --adapter')
    file.touch()
    assert_one_line(call('export.py', where, f'--gguf={file}'), 1, 'is there already')


def test_a_write_that_fails_leaves_nothing(out_dir, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(pytest.importorskip('gguf'), 'quantize', full)
    done = call('export.py', f'--out_dir={out_dir}', f'--gguf={tmp_path / "new" / "er" / "x.gguf"}')
    assert_one_line(done, 1, 'cannot write', 'No space left on device')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('dtype', llama_cpp.DTYPES)
def test_a_file_that_is_not_the_model_is_told(tmp_path, trained, dtype):
    model = model_of('llama', trained)
    written(tmp_path / 'm', model, trained, dtype)
    assert llama_cpp.same(tmp_path / 'm', model)
    weight = model.lm_head.weight
    with torch.no_grad():
        weight[-1, -1] += 1
    assert not llama_cpp.same(tmp_path / 'm', model)
    deeper = model_of('llama', trained)
    deeper.transformer.h.append(copy.deepcopy(deeper.transformer.h[0]))
    deeper.config.n_layer += 1
    assert not llama_cpp.same(tmp_path / 'm', deeper)
    assert not llama_cpp.same(tmp_path / 'm', model_of('llama', trained, padding=32))


def test_a_file_that_is_not_what_was_written_does_not_appear(out_dir, tmp_path, monkeypatch):
    pytest.importorskip('gguf')
    monkeypatch.setattr(llama_cpp, 'same', lambda *args: False)
    done = call('export.py', f'--out_dir={out_dir}', f'--gguf={tmp_path / "x.gguf"}')
    assert_one_line(done, 1, 'that was read back is not', 'nothing was exported')
    assert not list(tmp_path.iterdir())


def test_gelu_that_llama_cpp_approximates_is_told(trained, capsys):
    pytest.importorskip('gguf')
    config = GPTConfig(400, 8, n_layer=1, n_embd=8, n_head=2, gelu='erf')
    llama_cpp.header(config, trained, 'F16', 'x')
    assert "gelu='erf' by its tanh approximation" in capsys.readouterr().err


def test_a_package_that_is_missing_is_one_line(out_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
    assert_one_line(call('export.py', f'--out_dir={out_dir}', f'--gguf={tmp_path / "x"}'), 1, 'pip install gguf')


# ---------------------------------------------------------------------------------------------------------------------
# llama.cpp

def sample_texts():
    """50 texts: English, Chinese, code and what is between."""
    english = ["It's 12,345 o'clock!", 'HELLO we\'ll see', '  two  spaces ', 'tabs\there\n\nand lines\r\n', 'a', '']
    chinese = ['你好，世界！', '今天天气很好。我们去公园散步吧', '数字 12345，标点：「引号」', '混合 mixed 文字',
               '１２３ 全角']
    other = ['naïve café Größe', 'हिन्दी עברית 한국어', '😀👩‍👩‍👧 🇺🇦', '½ ² Ⅷ ٣', '\u3000wide\u00a0hard',
             '<|endoftext|>x', "x'S"]
    code = (ROOT / 'model.py').read_text(encoding='utf-8').split('\n\n')[:50 - len(english + chinese + other)]
    return english + chinese + other + code


@pytest.fixture(scope='module')
def ask():
    """A function that asks llama.cpp about a file."""
    def of(path, texts, ids):
        request = {'model': str(path), 'texts': texts, 'ids': ids.tolist()}
        done = subprocess.run(['node', ROOT / 'tests' / 'llama.mjs', node_llama_cpp()], input=json.dumps(request),
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return of


def tokenizers_of(name, monkeypatch):
    if name == 'char':
        return CharTokenizer.of('\n'.join(sample_texts()) + '\\')
    if name == 'tiktoken':
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
        return TiktokenTokenizer('gpt2')
    if name == 'SentencePiece':
        return BpeTokenizer(sentencepiece(), eot=2)
    if name == 'trained':
        return BpeTokenizer.train([*LINES, *sample_texts() * 2], 1500, special=('<|endoftext|>', '<|im_end|>'))
    found = {'gpt-2': [GPT2], 'smollm': [r'\p{N}', GPT2], 'qwen2': [QWEN], 'llama-bpe': [CL100K],
             'tekken': [llama_cpp.TEKKEN]}[name]
    return cut_by(*found)


@pytest.mark.full
@needs('llama_cpp', 'gpt2_encoding')
@pytest.mark.parametrize(('name', 'tokens'), [
    ('gpt2', 'tiktoken'), ('gpt2, other', 'trained'), ('llama', 'SentencePiece'), ('llama, biases', 'trained'),
    ('llama, tied', 'llama-bpe'), ('llama, dynamic', 'smollm'), ('mistral', 'tekken'), ('qwen3', 'trained'),
    ('qwen3', 'qwen2'), ('llama', 'char'), ('gpt2', 'gpt-2')])
def test_llama_cpp_splits_texts_and_computes_logits_as_we_do(tmp_path, monkeypatch, ask, name, tokens):
    tok = tokenizers_of(tokens, monkeypatch)
    model = model_of(name, tok, padding=2)
    written(tmp_path / 'm.gguf', model, tok)
    texts = sample_texts()
    ids = torch.randint(tok.vocab_size, (1, 60), generator=torch.Generator().manual_seed(3))
    found = ask(tmp_path / 'm.gguf', texts, ids[0])
    for text, plain, special in zip(texts, found['plain'], found['special']):
        assert plain == tok.encode(text).tolist(), text
        assert special == tok.encode(text, special=True).tolist(), text
    assert found['context'] == 64 and found['addsBos'] == bool(tok.begin) and found['eos'] == tok.eot
    with torch.inference_mode():
        ours = model(ids, ids)[0][0]
    tokens, logits = torch.tensor(found['logits']).unbind(-1)   # (60, 50) each
    tokens = tokens.long()
    limit = 1e-2 if name.startswith('gpt2') else 1e-4   # its GELU comes from a table in 16 bits
    torch.testing.assert_close(ours.gather(1, tokens), logits, rtol=0, atol=limit * ours.std())
    best = ours.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.02 * ours.std()
    assert clear.sum() > 40 and torch.equal(tokens[clear, 0], ours.argmax(-1)[clear])
