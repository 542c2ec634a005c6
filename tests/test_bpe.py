"""Encodings of the tokenizers library: trained here or come with weights, nothing is lost, and others read the same."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import quick

from flatgpt import tokenizer
from flatgpt.errors import UserError
from flatgpt.tokenizer import BpeTokenizer, CharTokenizer, from_dict, same

texts = st.text(st.characters(exclude_categories=['Cs']))   # any Unicode text
LINES = [f'the {i}th line says: 你好 world, naïve café! def f(x): return {i}\n' for i in range(300)]


@pytest.fixture(scope='module')
def trained():
    return BpeTokenizer.train(LINES, 400)


@pytest.fixture(scope='module')
def sentencepiece():
    """A tokenizer as Llama 2's: blanks are part of the words, others become bytes, a text has a beginning."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), '▁', 'h', 'e', 'l', 'o', 'he', 'll',
              '▁he', 'llo', '▁hello']
    merges = [('h', 'e'), ('l', 'l'), ('▁', 'he'), ('ll', 'o'), ('▁he', 'llo')]
    tok = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token='<unk>',
                               byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(' ', 1, 0)])
    tok.add_special_tokens(['<s>', '</s>'])
    tok.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return BpeTokenizer(tok.to_str(), eot=2)


@quick
@given(texts)
def test_every_text_of_every_language_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == trained.decode(ids.tolist()) == text
    stream = trained.stream()
    assert ''.join(stream(i) for i in [*ids, None]) == text
    assert len(ids) <= len(text.encode()) and (not len(ids) or ids.max() < trained.vocab_size)


def test_what_is_frequent_takes_few_tokens(trained):
    assert trained.vocab_size == 400 and trained.encode('').tolist() == []
    assert len(trained.encode(LINES[0])) < len(LINES[0].encode()) / 2
    assert len(BpeTokenizer.train(LINES, 300).encode(LINES[0])) > len(trained.encode(LINES[0]))


def test_a_pair_must_be_frequent_enough():
    assert BpeTokenizer.train(LINES, 10_000, min_frequency=10**6).vocab_size == 257   # bytes alone
    rare = [*LINES, 'uncommon']
    assert 'uncommon' in BpeTokenizer.train(rare, 10_000, min_frequency=1).encoding.get_vocab()
    assert 'uncommon' not in BpeTokenizer.train(rare, 10_000).encoding.get_vocab()


def test_special_tokens_come_first_and_are_read_only_when_asked_for():
    tok = BpeTokenizer.train(LINES, 300, special=('<pad>', '<|endoftext|>'))
    assert tok.eot == 1
    assert tok.encode('<pad>a<|endoftext|>', special=True).tolist() == [0, *tok.encode('a'), 1]
    plain = tok.encode('<pad>a<|endoftext|>')
    assert not {0, 1} & set(plain.tolist()) and tok.decode(plain) == '<pad>a<|endoftext|>'
    assert tok.decode([1]) == '<|endoftext|>' and tok.beginning().tolist() == [1]


def test_lone_surrogates_become_replacement_characters(trained):
    assert trained.decode(trained.encode('a\ud800b')) == 'a\ufffdb'


def test_transformers_reads_the_same_tokenizer(trained, tmp_path):
    from transformers import PreTrainedTokenizerFast
    path = tmp_path / 'tokenizer.json'
    path.write_text(trained.json, encoding='utf-8')
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in (*LINES[:5], '世界 😀\r\n\t  x', ''):
        assert theirs(text)['input_ids'] == trained.encode(text).tolist()
        assert theirs.decode(trained.encode(text), clean_up_tokenization_spaces=False) == text


def test_a_description_makes_the_same_tokenizer_again_through_json_too(trained):
    again = from_dict(json.loads(json.dumps(trained.to_dict())))
    assert again.to_dict() == trained.to_dict() and again.eot == trained.eot == 0
    assert np.array_equal(again.encode(LINES[7]), trained.encode(LINES[7]))


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(UserError, match='vocabulary of 256: expected 257 or more'):
        BpeTokenizer.train(LINES, 256)


@pytest.mark.parametrize('text', ['', '{', '{"model": 1}', 'null'])
def test_a_damaged_tokenizer_json_is_refused(text):
    with pytest.raises(UserError, match=r'no tokenizer\.json'):
        BpeTokenizer(text)


@pytest.mark.parametrize('name', ['trained', 'sentencepiece'])
@pytest.mark.parametrize('setting', [
    {'truncation': {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}},
    {'padding': {'strategy': {'Fixed': 50}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0,
                 'pad_type_id': 0, 'pad_token': '<unk>'}}], ids=['truncation', 'padding'])
def test_texts_are_encoded_whole_and_without_padding_whatever_a_tokenizer_json_sets(request, name, setting):
    tok = request.getfixturevalue(name)
    other = BpeTokenizer(json.dumps(json.loads(tok.json) | setting), tok.eot)
    text = 'hello hello hello hello'
    assert len(tok.encode(text)) > 3
    for special in (False, True):
        assert other.encode(text, special=special).tolist() == tok.encode(text, special=special).tolist()
    assert other.encode_texts([text, 'h']).tolist() == tok.encode_texts([text, 'h']).tolist()


def test_a_tokenizer_of_the_sentencepiece_kind_begins_texts_and_falls_back_to_bytes(sentencepiece):
    tok = sentencepiece
    assert tok.encode('hello hello').tolist() == [tok.encoding.token_to_id('▁hello')] * 2
    assert tok.encode('hello', special=True).tolist() == [1, *tok.encode('hello')]
    assert tok.beginning().tolist() == [1] and tok.eot == 2
    ids = tok.encode('hello 你')
    assert len(ids) == 5 and tok.decode(ids) == 'hello 你'


def test_a_stream_of_the_sentencepiece_kind_shows_whole_characters_and_blanks(sentencepiece):
    stream = sentencepiece.stream()
    pieces = [stream(i) for i in [*sentencepiece.encode('hello hello 你'), None]]
    assert ''.join(pieces) == 'hello hello 你' and '\ufffd' not in ''.join(pieces) and pieces[-2] == '你'


def test_a_tokenizer_that_knows_no_beginning_asks_for_a_prompt(trained):
    changed = json.loads(trained.json.replace('<|endoftext|>', '<x>'))
    with pytest.raises(UserError, match='give a prompt'):
        BpeTokenizer(json.dumps(changed)).beginning()


def test_the_same_tokenizer_in_another_form_is_the_same(trained):
    d = trained.to_dict()
    assert same(d, d) and same(d, {**d, 'json': json.dumps(json.loads(d['json']))})
    assert not same(d, BpeTokenizer.train(LINES, 401).to_dict())
    assert not same(d, BpeTokenizer.train(LINES[:150], 400).to_dict())
    assert not same(CharTokenizer('ab').to_dict(), CharTokenizer('ba').to_dict())
    other = json.loads(d['json'])
    other['pre_tokenizer']['add_prefix_space'] = True   # the same tokens, found differently
    assert not same(d, {**d, 'json': json.dumps(other)})


def test_every_byte_has_a_character_of_its_own():
    from tokenizers import pre_tokenizers
    alphabet = tokenizer.byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ('~', 'é', '\n', '世', ' '):
        ((shown, _),) = splitter.pre_tokenize_str(text)
        assert bytes(alphabet[char] for char in shown) == text.encode()


# ---------------------------------------------------------------------------------------------------------------------
# many texts at once, and by ranks

def alone(tok, texts):
    """The ids of texts as the tokenizers library gives them one by one, the end of text behind each."""
    tok.encoding.encode_special_tokens = True
    return [i for text in texts for i in [*tok.encoding.encode(text, add_special_tokens=False).ids, tok.eot]]


@pytest.fixture(scope='module')
def wordy():
    """An encoding of long tokens, with runs, repetitions and overlaps."""
    lines = [*LINES, 'aaaa aaaaaaaa abababab bababa aab baa abcabcabc cabcab  \n\n\n', '你好世界你好好世世界'] * 3
    return BpeTokenizer.train(lines, 600, special=('<|endoftext|>', '<pad>'))


some = st.sampled_from([*LINES, '<|endoftext|>', 'aaab<|endoftext|> '])


@quick
@given(st.lists(texts | st.text(st.sampled_from('abc 你好世界the\n')) | some, min_size=1))
def test_texts_encoded_together_by_ranks_have_the_ids_that_they_have_alone(wordy, many):
    assert wordy.by_ranks is not None
    ids = wordy.encode_texts(many)
    assert ids.tolist() == alone(wordy, many) and ids.dtype == np.uint16
    assert wordy.encode_texts(many, end=False).tolist() == [i for text in many for i in alone(wordy, [text])[:-1]]


def test_by_ranks_is_what_the_library_does_on_source_code():
    import inspect
    import json.decoder
    import typing
    source = inspect.getsource(typing)
    tok = BpeTokenizer.train([source], 3000)
    pieces = [source, inspect.getsource(json.decoder), inspect.getsource(np.linalg)]
    assert tok.by_ranks is not None and tok.encode_texts(pieces).tolist() == alone(tok, pieces)


def test_each_thread_has_a_copy_of_the_encoding_which_gives_the_same_ids(wordy):
    with ThreadPoolExecutor(2) as pool:
        barrier = threading.Barrier(2)

        def encode(_):
            barrier.wait()   # so that each thread does one
            return id(wordy.by_ranks.encoding), wordy.encode_texts(LINES).tolist()

        (one, ids), (other, same_ids) = pool.map(encode, range(2))
    assert len({one, other, id(wordy.by_ranks.encoding)}) == 3
    assert ids == same_ids == alone(wordy, LINES)
    assert wordy.by_ranks.encoding is wordy.by_ranks.encoding   # made once


@pytest.mark.parametrize('token', ['Ġ', 'é'])
def test_a_special_token_that_stands_for_a_byte_is_refused(token):
    with pytest.raises(UserError, match=f'special token {token!r}: it stands for a byte'):
        BpeTokenizer.train(LINES, 300, special=['<|endoftext|>', token])
    tok = BpeTokenizer.train(LINES, 300, special=['<|endoftext|>', f'<{token}>', '你'])
    assert tok.decode(tok.encode('a b é 你好')) == 'a b é 你好'


@pytest.mark.parametrize('name', ['wordy', 'trained', 'sentencepiece'])
def test_lone_surrogates_become_replacement_characters_in_many_texts_too(request, name):
    tok = request.getfixturevalue(name)
    assert (tok.by_ranks is None) == (name == 'sentencepiece')
    for end in True, False:
        assert np.array_equal(tok.encode_texts(['a\ud800b', 'c'], end), tok.encode_texts(['a\ufffdb', 'c'], end))


def test_the_names_of_special_tokens_are_text_in_many_texts_whatever_was_read_before(wordy, trained):
    without = other(json.loads(trained.json), lambda d: d.update(normalizer={'type': 'NFC'}))
    assert wordy.by_ranks is not None and without.by_ranks is None
    for tok in wordy, without:
        many = ['a<pad>b<|endoftext|>c', '<pad>', '<|endoftext|>', 'plain']
        tok.encode('<|endoftext|>', special=True)
        ids = tok.encode_texts(many).tolist()
        assert ids == alone(tok, many) and ids.count(tok.eot) == len(many)
        assert tok.encoding.token_to_id('<pad>') not in ids
        assert tok.decode([i for i in ids if i != tok.eot]) == ''.join(many)
        assert tok.encode_texts(['x<pad>', 'y']).tolist() == alone(tok, ['x<pad>', 'y'])


def other(d, change):
    """A tokenizer.json with something changed."""
    d = json.loads(json.dumps(d))
    change(d)
    return BpeTokenizer(json.dumps(d))


def swap_merges(d):
    d['model']['merges'][3], d['model']['merges'][4] = d['model']['merges'][4], d['model']['merges'][3]


def name_other_parts(d):
    """The merge that makes a token of three letters joins what is never there."""
    merges, vocab = d['model']['merges'], d['model']['vocab']
    for merge in merges:
        a, b = merge
        if len(a) == 2 and len(b) == 1 and a[1] + b not in vocab:
            vocab[a[1] + b] = len(vocab)
            merges.append([a[1], b])
            merge[:] = [a[0], a[1] + b]
            return
    raise AssertionError('no such merge')


@pytest.mark.parametrize('change', [
    swap_merges, name_other_parts, lambda d: d['pre_tokenizer'].update(use_regex=False),
    lambda d: d['pre_tokenizer'].update(add_prefix_space=True), lambda d: d.update(normalizer={'type': 'NFC'}),
    lambda d: d['added_tokens'].append({**d['added_tokens'][0], 'content': 'hello', 'id': 400, 'special': False}),
    lambda d: d['model'].update(dropout=0.5), lambda d: d.update(pre_tokenizer=None),
], ids=['order', 'parts', 'no words', 'prefix', 'normalizer', 'added', 'dropout', 'no pre-tokenizer'])
def test_ranks_are_not_used_where_they_might_give_other_ids(trained, change):
    tok = other(json.loads(trained.json), change)
    assert tok.by_ranks is None
    if change in (swap_merges, name_other_parts):
        assert tok.encode_texts(LINES[:9]).tolist() == alone(tok, LINES[:9])


def test_ranks_are_not_used_where_there_is_a_token_that_no_merge_makes(trained):
    tok = other(json.loads(trained.json), lambda d: d['model']['vocab'].update(zq=400))
    assert tok.by_ranks is None
    assert tok.encode_texts(['zq']).tolist() == alone(tok, ['zq']) == [*tok.encode('z'), *tok.encode('q'), tok.eot]


def test_texts_must_not_be_cut_where_blanks_are_put_before_them(trained, sentencepiece):
    assert trained.cuttable and not sentencepiece.cuttable
    assert not other(json.loads(trained.json), lambda d: d['pre_tokenizer'].update(add_prefix_space=True)).cuttable
    assert not other(json.loads(trained.json), lambda d: d['pre_tokenizer'].update(use_regex=False)).cuttable
    split = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious', 'invert': False}
    by_bytes = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    after = {'type': 'Sequence', 'pretokenizers': [split, by_bytes]}   # blanks belong to the word before them
    assert not other(json.loads(trained.json), lambda d: d.update(pre_tokenizer=after)).cuttable
    prepend = {'type': 'Prepend', 'prepend': 'x'}
    assert not other(json.loads(trained.json), lambda d: d.update(normalizer=prepend)).cuttable
    assert other(json.loads(trained.json), lambda d: d.update(normalizer={'type': 'NFC'})).cuttable
    assert sentencepiece.encode_texts(['hello', 'hello']).tolist() == [*sentencepiece.encode('hello'), 2] * 2


@pytest.mark.full
def test_every_character_is_of_the_same_kind_to_both_libraries():
    """Else words might end in other places: seen by whether a character makes a word with 'a', '1' and '!'."""
    import tiktoken
    from tokenizers import pre_tokenizers
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    points = [*range(0xd800), *range(0xe000, 0x32000), *range(0x32000, 0x110000, 101)]   # the rest is hardly assigned
    for start in range(0, len(points), 4000):
        chars = [chr(point) for point in points[start:start + 4000]]
        tokens = {char.encode()[:n] for char in chars for n in range(2, len(char.encode()) + 1)}
        tokens |= {(first + char).encode() for char in chars for first in 'a1!'}
        ranks = {bytes([i]): i for i in range(256)}
        ranks |= {token: 256 + i for i, token in enumerate(sorted(tokens, key=lambda token: (len(token), token)))}
        ours = tiktoken.Encoding('x', pat_str=tokenizer.GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
        for char in chars:
            for first in 'a1!':
                together = len(words.pre_tokenize_str(first + char)) == 1
                assert (len(ours.encode_ordinary(first + char)) == 1) == together, hex(ord(char))


# ---------------------------------------------------------------------------------------------------------------------
# by name

def test_a_tokenizer_is_made_by_its_name(trained, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(trained.json, encoding='utf-8')
    assert tokenizer.make('char', ['ba', 'c']).chars == 'abc'
    assert tokenizer.make(f'{tmp_path}/tokenizer.json').to_dict() == trained.to_dict()
    made = tokenizer.make('bpe:400', LINES)
    assert made.json == trained.json
    more = tokenizer.make('bpe:400', LINES, 10**6, ['<pad>', '<|endoftext|>', '<unk>'])
    assert more.vocab_size == 259 and more.eot == 0 and more.encode('<unk>', special=True).tolist() == [2]


@pytest.mark.parametrize('spec, words', [
    ('gpt5', "expected 'char', 'bpe:5000', the path of a tokenizer.json, or one of tiktoken's: gpt2,"),
    ('', "tokenizer ''"), ('bpe', 'expected a number of tokens'), ('bpe:-5', 'expected a number of tokens'),
    ('nowhere.json', 'cannot read nowhere.json'), ('a/folder', 'cannot read a/folder')])
def test_a_tokenizer_by_another_name_is_refused(spec, words):
    with pytest.raises(UserError) as refusal:
        tokenizer.make(spec, LINES)
    assert words in str(refusal.value)


@pytest.mark.parametrize('names, config, eot', [
    (['</s>', '<x>'], None, '</s>'), (['<eos>', '<|endoftext|>'], None, '<|endoftext|>'), (['<x>'], None, None),
    (['</s>', '<x>'], {'eos_token': '<x>'}, '<x>'), (['</s>', '<x>'], {'eos_token': {'content': '<x>'}}, '<x>'),
    (['</s>', '<x>'], {'eos_token': '<y>'}, '</s>'), (['</s>', '<x>'], {'eos_token': None}, '</s>'),
    (['</s>'], 7, '</s>')])
def test_the_end_of_text_of_a_tokenizer_json_is_found(trained, tmp_path, names, config, eot):
    d = json.loads(trained.json.replace('<|endoftext|>', 'nothing'))
    first = d['added_tokens'][0]
    d['added_tokens'] += [{**first, 'content': name, 'id': 400 + i} for i, name in enumerate(names)]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(d), encoding='utf-8')
    if config is not None:
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    tok = tokenizer.make(f'{tmp_path}/tokenizer.json')
    assert tok.eot == (None if eot is None else 400 + names.index(eot))
