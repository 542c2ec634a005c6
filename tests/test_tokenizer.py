"""Text to ids and back: nothing is lost, other libraries agree, and a stream never shows half a character."""

import json
import socket
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SHARED, needs
from hypothesis import example, given
from hypothesis import strategies as st
from properties import quick

from flatgpt import checkpoint, encodings, tokenizer
from flatgpt.errors import UserError
from flatgpt.tokenizer import (
    BLANK,
    BORDER,
    BpeTokenizer,
    CharTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    from_dict,
    id_type,
    same,
)

characters = st.characters(exclude_categories=['Cs'])
texts = st.text(characters)   # any Unicode text
MIXED = 'Grüße, 世界! 👩‍👩‍👧 🇺🇦 e\u0301 \u0000\r\n\t𝔘\U0010ffff'
LINES = [f'the {i}th line says: 你好 world, naïve café! def f(x): return {i}\n' for i in range(300)]


@pytest.fixture(scope='module')
def gpt2():
    """GPT-2's encoding, from files that are already here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
        return TiktokenTokenizer('gpt2')


FEW = {'name': 'few', 'pat_str': encodings.GPT2_WORDS,
       'mergeable_ranks': {bytes([i]): i for i in range(256)} | {b'ab': 256, b'abc': 257},
       'special_tokens': {'<|endoftext|>': 258, '<|fim|>': 300}}


@pytest.fixture(scope='module')
def few():
    """An encoding of tiktoken's kind that has few tokens, another special one after a gap, and needs no file."""
    return TiktokenTokenizer('few', FEW)


@pytest.fixture(scope='module')
def trained():
    return BpeTokenizer.train(LINES, 400)


# ---------------------------------------------------------------------------------------------------------------------
# the kinds of tokenizers that come with models

BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
PIECES = ['▁', *'helo世', 'he', 'll', '▁he', 'llo', '▁hello']


def as_json(model, normalizer=None, pre_tokenizer=None, decoder=None, template='$A', special=()):
    """The text of a tokenizer.json of these parts."""
    import tokenizers
    from tokenizers import processors

    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(list(special))
    for name, part in (('normalizer', normalizer), ('pre_tokenizer', pre_tokenizer), ('decoder', decoder)):
        if part is not None:
            setattr(made, name, part)
    named = [(name, made.token_to_id(name)) for name in template.split() if name != '$A']
    if named:
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return made.to_str()


def sentencepiece(template='<s> $A'):
    """As Llama 2's: spaces are part of the words, unknown characters become bytes, a text has a beginning."""
    from tokenizers import decoders, models, normalizers

    tokens = ['<unk>', '<s>', '</s>', *BYTES, *PIECES]
    merges = [('h', 'e'), ('l', 'l'), ('▁', 'he'), ('ll', 'o'), ('▁he', 'llo')]
    return as_json(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token='<unk>', fuse_unk=True,
                              byte_fallback=True),
                   normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]), None,
                   decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(' ', 1, 0)]), template, ('<s>', '</s>'))


def unigram(template='$A </s>'):
    """As Gemma's or T5's: Unigram, Metaspace, unknown characters become bytes."""
    from tokenizers import decoders, models, pre_tokenizers

    vocab = [('<unk>', 0.0), ('</s>', 0.0), *((token, -9.0) for token in BYTES), *((piece, -2.0) for piece in PIECES)]
    return as_json(models.Unigram(vocab, 0, byte_fallback=True), None,
                   pre_tokenizers.Metaspace('▁', prepend_scheme='first'),
                   decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace('▁', prepend_scheme='first')]),
                   template, ('</s>',))


def byte_level(add_prefix_space=False, normalizer=None, template='$A', special=()):
    """As GPT-2's or RoBERTa's, from another trainer: the vocabulary begins with the bytes in their order."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    alphabet = [char for char, _ in sorted(encodings.byte_alphabet().items(), key=lambda item: item[1])]
    tokens = [*alphabet, 'he', 'll', 'Ġhe', 'llo', *special]
    return as_json(models.BPE({token: i for i, token in enumerate(tokens)},
                              [('h', 'e'), ('l', 'l'), ('Ġ', 'he'), ('ll', 'o')]),
                   normalizers.NFC() if normalizer else None, pre_tokenizers.ByteLevel(add_prefix_space),
                   decoders.ByteLevel(), template, special)


def wordpiece():
    """As BERT's: lower case, words, and what continues them after ##."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    tokens = ['[UNK]', '[CLS]', '[SEP]', *'helowrd', *(f'##{char}' for char in 'helowrd'), 'hello', '世', '.', '##ll']
    return as_json(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token='[UNK]'),
                   normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(),
                   '[CLS] $A [SEP]', ('[CLS]', '[SEP]', '[UNK]'))


def without_first_space(text):
    return text.removeprefix(' ')


def composed(text):
    return unicodedata.normalize('NFC', text)


# name: (tokenizer.json, the text that comes back of a text)
KINDS = {
    'byte-level': (byte_level, str), 'NFC': (lambda: byte_level(normalizer=True), composed),
    'byte-level with a template': (lambda: byte_level(template='<s> $A </s>', special=('<s>', '</s>')), str),
    'prefix space': (lambda: byte_level(add_prefix_space=True), str),
    'SentencePiece': (sentencepiece, str), 'SentencePiece with an end': (lambda: sentencepiece('<s> $A </s>'), str),
    'Unigram': (unigram, without_first_space), 'trained': (lambda: BpeTokenizer.train(LINES, 300).json, str),
}


@pytest.fixture(scope='module')
def kinds():
    return {name: BpeTokenizer(make()) for name, (make, _) in KINDS.items()} | {'WordPiece': BpeTokenizer(wordpiece())}


some_texts = texts | st.text(st.sampled_from('hello 世界 é😀\n')) | st.sampled_from(['hello', ' hello hello', 'x  y '])


@pytest.mark.parametrize('name', KINDS)
@quick
@given(text=some_texts)
@example(text='<0x41>')   # whose characters may be tokens of bytes, while it is the name of another one
def test_every_text_comes_back_whole_and_streamed_and_its_size_is_counted(kinds, name, text):
    if name == 'prefix space':
        text = text.lstrip()   # it puts a space before a text that has none
    if name == 'Unigram':
        text = text.replace('<0x', '')   # with which the library's names of bytes begin, in a text too
    text = text.replace('▁', '')   # which means a space to SentencePiece
    tok, expected = kinds[name], KINDS[name][1](text)
    ids = tok.encode(text)
    assert tok.decode(ids).removeprefix(tok.lead) == expected and ids.dtype == np.uint16
    piece = tok.stream()
    assert ''.join([piece(i) for i in ids]) + piece(None) == tok.decode(ids)
    document = tok.encode_document(text)
    assert document.tolist() == [*tok.begin, *ids, *([] if tok.eot is None else [tok.eot])]
    for times in (1, 2):
        assert tok.count(np.tile(document if tok.eot is not None else ids, times)) == (
            times * len(expected), times * len(expected.encode())) or tok.eot is None


@pytest.mark.parametrize('name', [*KINDS, 'WordPiece'])
@quick
@given(data=st.data())
def test_any_ids_after_any_prompt_are_streamed_as_they_are_decoded_together(kinds, name, data):
    tok = kinds[name]
    ids = st.lists(st.integers(0, tok.vocab_size) | st.sampled_from(tok.encode('hello 世').tolist()), max_size=60)
    prompt, answer = data.draw(ids), data.draw(ids)
    piece = tok.stream(prompt)
    shown = ''.join([piece(i) for i in answer]) + piece(None)
    assert shown == decode_after(tok, prompt, answer)
    start = tok.decode(prompt)
    if not start.endswith('\ufffd'):   # it may be completed by the answer
        assert start + shown == tok.decode(prompt + answer)


@pytest.mark.parametrize('text', ['世é' * 30_000, 'é世' * 30_000, 'h' * 2**16])
def test_a_long_text_is_counted_in_parts_that_may_end_within_a_character(kinds, text):
    ids = kinds['Unigram'].encode(text)
    assert len(ids) > 2**16 and kinds['Unigram'].count(ids) == (len(text), len(text.encode()))


def test_an_answer_is_the_text_after_the_prompt(kinds):
    tok = kinds['SentencePiece']
    hello = tok.encoding.token_to_id('▁hello')
    assert decode_after(tok, tok.encode_prompt('hello'), [hello]) == ' hello' and tok.decode([hello]) == 'hello'


@pytest.mark.parametrize('name', ['SentencePiece', 'Unigram'])
def test_stray_bytes_become_replacement_characters_and_the_stream_goes_on(kinds, name):
    tok = kinds[name]
    h, lone, first, second, third = (tok.encoding.token_to_id(token) for token in (
        'h', '<0xFF>', '<0xE4>', '<0xBD>', '<0xA0>'))
    piece = tok.stream([h])
    assert [piece(i) for i in (lone, h, first, second, third, first, h, first, None)] == [
        '', '\ufffdh', '', '', '你', '', '\ufffdh', '', '\ufffd']
    assert tok.decode([h, first, second, third, lone, h]) == 'h你\ufffdh'


def test_half_a_character_at_the_end_is_shown(kinds):
    for name, tok in kinds.items():
        if name != 'WordPiece':
            half = tok.encode('😀')[-2:-1].tolist()
            assert decode_after(tok, tok.encode_prompt('h'), half) == '\ufffd'


@pytest.mark.parametrize('name', ['byte-level', 'SentencePiece', 'Unigram', 'trained'])
def test_a_character_that_begins_in_the_prompt_is_completed_in_the_answer(kinds, name):
    ids = kinds[name].encode('é😀')[-4:].tolist()   # one token per byte
    for cut in (1, 2, 3):
        assert decode_after(kinds[name], ids[:cut], ids[cut:]) == '😀'


@pytest.mark.parametrize('name, begin, eot', [
    ('byte-level', [], None), ('byte-level with a template', ['<s>'], '</s>'), ('SentencePiece', ['<s>'], None),
    ('SentencePiece with an end', ['<s>'], '</s>'), ('Unigram', [], '</s>'), ('trained', [], '<|endoftext|>'),
    ('WordPiece', ['[CLS]'], '[SEP]')])
def test_what_stands_before_and_after_a_text_is_asked_of_the_template(kinds, name, begin, eot):
    tok = kinds[name]
    number = tok.encoding.token_to_id
    assert tok.begin == tuple(map(number, begin)) and tok.eot == (eot and number(eot))
    assert tok.ends == (() if eot is None else (tok.eot,))
    ids = tok.encode('hello').tolist()
    assert tok.encode_prompt('hello').tolist() == [*tok.begin, *ids]   # and not what ends a text
    assert tok.encode_document('hello').tolist() == [*tok.begin, *ids, *tok.ends]
    two = tok.encode_texts(['hello', 'hello']).tolist()
    assert two == [*tok.begin, *ids, *tok.ends] * 2
    pieces = tok.encode_texts(['hello'], end=False).tolist(), tok.encode_texts(['hello'], begin=False).tolist()
    assert pieces == ([*tok.begin, *ids], [*ids, *tok.ends])


def test_the_template_is_found_where_no_latin_letter_can_be_encoded():
    from tokenizers import models
    tokens = ['<s>', '</s>', '你', '好']
    tok = BpeTokenizer(as_json(models.BPE({token: i for i, token in enumerate(tokens)}, []), template='<s> $A </s>',
                               special=('<s>', '</s>')))
    assert tok.encode_document('你好').tolist() == [0, 2, 3, 1] and tok.lead == ''
    assert tok.encode_prompt('你').tolist() == [0, 2]


def test_documents_are_encoded_the_same_while_characters_are_looked_up(kinds):
    tok = kinds['SentencePiece']
    tok.encode_document('hello')
    assert not tok.encoding.encode_special_tokens   # a thread must not change it while others encode
    tok.unknown('ᚠ')
    assert not tok.encoding.encode_special_tokens


def test_no_download_is_tried_for_ranks_that_travel(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **how: pytest.fail('a download'))
    short = {'kind': 'tiktoken', 'name': 'r50k_base'}
    assert encodings.portable(short) == short


def test_a_beginning_that_a_text_has_already_is_not_put_before_it_again(kinds):
    tok = kinds['SentencePiece with an end']
    once = tok.encode_prompt('hello').tolist()
    assert tok.encode_prompt('<s>hello').tolist() == once
    assert tok.encode_document('<s>hello').tolist() == [*once, tok.eot]
    assert tok.encode_prompt('hello<s>').tolist()[-1] == tok.begin[0]


def test_an_empty_prompt_is_the_beginning_of_a_text(kinds, few):
    assert kinds['SentencePiece with an end'].encode_prompt('').tolist() == [1]
    assert kinds['trained'].encode_prompt('').tolist() == [0]
    assert few.encode_prompt('').tolist() == [258]
    assert CharTokenizer('\na').encode_prompt('').tolist() == [0]
    assert CharTokenizer('ab\n').encode_prompt('').tolist() == [2]
    assert CharTokenizer.of('ba').encode_prompt('').tolist() == [0]
    with pytest.raises(UserError, match='give a prompt'):
        kinds['byte-level'].encode_prompt('')


def test_special_tokens_are_read_in_prompts_and_in_documents_alike():
    tok = BpeTokenizer.train(LINES, 300, special=('<|endoftext|>', '<|user|>'))
    assert tok.ranks
    library = BpeTokenizer(json.dumps({**json.loads(tok.json), 'normalizer': {'type': 'NFC'}}))
    assert not library.ranks
    text = '<|user|>hello<|endoftext|>x'
    for each in (tok, library):
        ids = [1, *each.encode('hello').tolist(), 0, *each.encode('x').tolist()]
        assert each.encode_prompt(text).tolist() == ids and each.encode_document(text).tolist() == [*ids, 0]
        plain = each.encode(text)
        assert not {0, 1} & set(plain.tolist()) and each.decode(plain) == each.decode(ids) == text


@pytest.mark.parametrize('name', ['SentencePiece', 'byte-level', 'WordPiece'])
def test_keys_that_a_tokenizer_json_may_lack_are_those_of_the_library(kinds, name):
    tok = kinds[name]
    d = json.loads(tok.json)
    for key in ('truncation', 'padding'):
        del d[key]
    if name == 'byte-level':
        del d['pre_tokenizer']['use_regex'], d['normalizer'], d['post_processor'], d['added_tokens']
        for key in ('dropout', 'unk_token', 'fuse_unk', 'byte_fallback', 'ignore_merges'):
            del d['model'][key]
    again = BpeTokenizer(json.dumps(d))
    assert again.encode_document('hello').tolist() == tok.encode_document('hello').tolist()
    assert again.decode(again.encode('hello')) == 'hello' and same(again, tok)


@pytest.mark.parametrize('name', ['trained', 'SentencePiece'])
@pytest.mark.parametrize('setting', [
    {'truncation': {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}},
    {'padding': {'strategy': {'Fixed': 50}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0,
                 'pad_type_id': 0, 'pad_token': '<unk>'}}], ids=['truncation', 'padding'])
def test_texts_are_encoded_whole_and_without_padding_whatever_a_tokenizer_json_sets(kinds, name, setting):
    tok = kinds[name]
    other = BpeTokenizer(json.dumps(json.loads(tok.json) | setting), tok.eot)
    text = 'hello hello hello hello'
    assert len(tok.encode(text)) > 3
    for special in (False, True):
        assert other.encode(text, special=special).tolist() == tok.encode(text, special=special).tolist()
    assert other.encode_texts([text, 'h']).tolist() == tok.encode_texts([text, 'h']).tolist()


def test_a_token_outside_the_byte_alphabet_is_its_own_text():
    d = json.loads(byte_level())
    d['model']['vocab']['你好'] = len(d['model']['vocab'])
    tok = BpeTokenizer(json.dumps(d))
    assert tok.token_bytes(tok.vocab_size - 1) == '你好'.encode()
    assert tok.decode([tok.vocab_size - 1]) == '你好' == tok.encoding.decode([tok.vocab_size - 1])


def test_characters_that_would_be_lost_are_refused():
    from tokenizers import decoders, models, pre_tokenizers
    plain = BpeTokenizer(as_json(models.BPE({'a': 0, 'b': 1, ' ': 2}, []), decoder=decoders.Fuse()))
    metaspace = BpeTokenizer(as_json(models.BPE({'▁': 0, 'a': 1, 'b': 2}, []), None, pre_tokenizers.Metaspace(),
                                     decoders.Metaspace()))
    alphabet = [char for char in encodings.byte_alphabet() if char != '©']   # which é needs
    partial = BpeTokenizer(as_json(models.BPE({char: i for i, char in enumerate(alphabet)}, []), None,
                                   pre_tokenizers.ByteLevel(False), decoders.ByteLevel()))
    for tok in (plain, metaspace):
        assert tok.probe() == ''.join(char for char in tokenizer.PROBE if char in ' ab')
        assert tok.unknown('ab x你a') == ['x', '你'] and tok.decode(tok.encode('ab')) == 'ab'
        with pytest.raises(UserError, match="^2 characters that this model has never seen: 'x你'$"):
            tok.encode('ab x你a')
    for tok in (plain, metaspace):
        assert tok.unknown('a\tb\n') == ['\t', '\n']
    tight = BpeTokenizer(as_json(models.BPE({'a': 0, 'b': 1}, []), decoder=decoders.Fuse()))
    assert tight.unknown('a b') == [' '] and tight.probe() == 'aa' and same(tight, CharTokenizer('ab'))
    assert not same(tight, CharTokenizer('ba'))
    assert partial.unknown('aé你') == ['é'] and partial.decode(partial.encode('a你')) == 'a你'


def test_what_is_removed_or_has_a_token_for_all_unknown_ones_is_not_refused(kinds):
    assert kinds['WordPiece'].unknown('Hello \x00\u200b 世 ☃') == []
    assert all(tok.unknown(MIXED) == [] for tok in kinds.values())


def test_ends_are_given_with_the_tokenizer_and_travel_with_it(kinds):
    tok = BpeTokenizer(sentencepiece(), eot=2, ends=(2, 260))
    assert tok.eot == 2 and tok.ends == (2, 260) and from_dict(json.loads(json.dumps(tok.to_dict()))).ends == (2, 260)
    assert BpeTokenizer(sentencepiece(), eot=2).ends == (2,) and BpeTokenizer(sentencepiece(), eot=10**6).eot is None
    assert tok.count(np.array([1, 269, 260, 2])) == (5, 5)
    assert 'ends' not in kinds['trained'].to_dict()   # as descriptions were before


def decode_after(tok, prompt, ids):
    """The text of ids that follow a prompt, as a stream shows it."""
    piece = tok.stream(prompt)
    return piece(ids) + piece(None)


class Pieces(Tokenizer):
    """A tokenizer whose id i stands for the i-th of some pieces of bytes."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.eot = None
        self.vocab_size = len(pieces)

    def token_bytes(self, i):
        return self.pieces[i]


@st.composite
def cut_texts(draw):
    """(a text, its UTF-8 bytes cut into pieces anywhere, in the midst of characters too)"""
    text = draw(st.text(characters | st.sampled_from('é世👩‍👧🇺𝔘\ufffd'), max_size=12))
    content = text.encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(content)))) | {0, len(content)})
    return text, [content[i:j] for i, j in zip(cuts, cuts[1:])]


# ---------------------------------------------------------------------------------------------------------------------
# characters

alphabets = st.lists(characters, min_size=1, unique=True).map(''.join)


@quick
@given(alphabets, st.data())
def test_char_ids_are_places_in_the_alphabet_and_decode_to_the_text(alphabet, data):
    tok, text = CharTokenizer(alphabet), data.draw(st.text(st.sampled_from(alphabet)))
    ids = tok.encode(text)
    assert ids.tolist() == [alphabet.index(c) for c in text] and ids.dtype == np.uint16
    assert tok.decode(ids) == tok.decode(ids.tolist()) == text
    assert tok.vocab_size == len(alphabet) and tok.eot is None
    assert np.array_equal(tok.encode(text, special=True), ids)


@quick
@given(texts.filter(bool))
def test_the_alphabet_of_a_text_is_in_the_order_of_code_points(text):
    tok = CharTokenizer.of(text)
    assert list(tok.chars) == sorted(set(text)) and tok.decode(tok.encode(text)) == text


@quick
@given(st.lists(texts), st.lists(st.sampled_from(['plain', 'text 123', 'größe', '世界😀', '\x7f\x80'])))
def test_the_alphabet_of_many_texts_is_that_of_the_whole(many, more):
    for whole in (many + more, more + many):
        if ''.join(whole):
            assert CharTokenizer.of(iter(whole)).chars == ''.join(sorted(set(''.join(whole))))


def test_a_large_alphabet_has_the_same_ids_for_plain_text():
    chars = ''.join(map(chr, range(0x4e00, 0x5000))) + 'abc'   # in which plain characters have ids past a byte
    tok = CharTokenizer(chars)
    assert tok.encode('cab').tolist() == [514, 512, 513] and tok.encode_texts(['ca', 'b']).tolist() == [514, 512, 513]


@quick
@given(alphabets, st.text(st.characters()))   # lone surrogates too, which a command line may bring
def test_characters_outside_the_alphabet_are_listed(alphabet, text):
    tok, missing = CharTokenizer(alphabet), sorted(set(text) - set(alphabet))
    if not missing:
        assert tok.decode(tok.encode(text)) == text
        return
    with pytest.raises(UserError) as error:
        tok.encode(text)
    assert str(error.value) == (f'{len(missing):,} characters that this model has never seen: '
                                f'{"".join(missing[:20])!r}{" ..." if len(missing) > 20 else ""}')


def test_an_alphabet_past_uint16_has_wider_ids():
    alphabet = ''.join(map(chr, range(0x10000, 0x10000 + 65537)))
    tok = CharTokenizer(alphabet)
    ids = tok.encode(alphabet)
    assert ids.dtype == np.uint32 and np.array_equal(ids, np.arange(65537)) and tok.decode(ids[-3:]) == alphabet[-3:]


@pytest.mark.parametrize('alphabet', ['', 'aba'])
def test_an_alphabet_has_characters_each_once(alphabet):
    with pytest.raises(UserError, match=f'^an alphabet of {len(alphabet)} characters, .*each once'):
        CharTokenizer(alphabet)


def test_an_empty_text_has_no_alphabet():
    with pytest.raises(UserError, match='an alphabet of 0 characters'):
        CharTokenizer.of('')


@pytest.mark.parametrize('vocab_size, dtype', [(1, np.uint16), (50257, np.uint16), (65535, np.uint16),
                                               (65536, np.uint16), (65537, np.uint32), (2**32, np.uint32)])
def test_ids_take_two_bytes_as_long_as_they_fit(vocab_size, dtype):
    assert id_type(vocab_size) == dtype
    assert np.iinfo(id_type(vocab_size)).max >= vocab_size - 1


# ---------------------------------------------------------------------------------------------------------------------
# tiktoken

@quick
@given(text=texts | st.text(st.sampled_from('abc \n1é世👩‍👧'), max_size=40))
def test_ids_are_tiktokens_own_and_decode_to_the_text(few, text):
    ids = few.encode(text)
    assert ids.tolist() == few.ranks.encoding.encode_ordinary(text) and ids.dtype == np.uint16
    assert few.decode(ids) == text
    if '<|' not in text:
        assert np.array_equal(few.encode(text, special=True), ids)


@needs('gpt2_encoding')
@pytest.mark.parametrize('text, ids', [('Hello world', [15496, 995]), (' Hello', [18435]), ('\n\n', [628]),
                                       ('', []), ('世', [10310, 244])])
def test_gpt2_golden_ids(gpt2, text, ids):
    assert gpt2.encode(text).tolist() == ids and gpt2.decode(ids) == text
    assert gpt2.encode(f'{text}<|endoftext|>', special=True).tolist() == [*ids, 50256]
    assert (gpt2.eot, gpt2.vocab_size) == (50256, 50257)


@quick
@given(ids=st.lists(st.integers(0, 258), max_size=20))
def test_any_ids_are_decoded_as_tiktoken_does(few, ids):
    assert few.decode(ids) == few.ranks.encoding.decode(ids)


def test_special_tokens_are_tokens_only_when_it_is_asked_for(few):
    text = 'a<|endoftext|>b<|fim|>'
    assert few.encode(text, special=True).tolist() == [97, 258, 98, 300]
    assert few.encode(text).tolist() == few.ranks.encoding.encode_ordinary(text) and 258 not in few.encode(text)
    assert few.decode(few.encode(text)) == few.decode([97, 258, 98, 300]) == text
    assert few.encode(text, special=True).dtype == np.uint16
    assert (few.eot, few.ends, few.begin, few.vocab_size) == (258, (258,), (), 301)


def test_an_id_that_no_token_has_decodes_to_a_replacement_character(few):
    assert few.decode([97, 280, 98]) == 'a\ufffdb'


@pytest.mark.parametrize('special', [False, True])
def test_lone_surrogates_are_encoded_as_tiktoken_does(few, special):
    text = 'a\udcff'   # what a command line makes of a byte that is no UTF-8
    assert few.encode(text, special=special).tolist() == few.ranks.encoding.encode_ordinary(text)


@quick
@given(many=st.lists(texts | st.text(st.sampled_from('abc \n<|>')) | st.sampled_from(['a<|endoftext|>b', '<|fim|>']),
                     min_size=1))
@example(many=['abc<|fim|>', 'abc'])
@example(many=['a\ud83d', '\ude00b'])   # a surrogate pair, cut in two
def test_many_texts_have_the_ids_that_they_have_alone(few, many):
    each = [few.encode_prompt(text).tolist() if text else [] for text in many]
    assert few.encode_texts(many).tolist() == [i for ids in each for i in [*ids, few.eot]]


def test_each_thread_encodes_with_an_encoding_of_its_own(few):
    barrier = threading.Barrier(2)

    def encode(_):
        barrier.wait()   # so that each thread does one
        return few.encode_texts(['abc', 'ab']).tolist(), few.ranks.encoding, few.ranks.encoding

    with ThreadPoolExecutor(2) as pool:
        (ids, one, again), (more, other, _) = pool.map(encode, range(2))
    assert ids == more == [257, 258, 256, 258] and one is again   # made once
    assert len({one, other, few.ranks.encoding}) == 3


def test_an_unknown_encoding_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="^tokenizer 'gpt-2': expected 'char', .*tiktoken's: gpt2, .*cl100k_base"):
        TiktokenTokenizer('gpt-2')


def test_without_network_and_cache_the_way_out_is_named(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise socket.gaierror(-3, 'Temporary failure in name resolution')

    monkeypatch.setattr(socket, 'getaddrinfo', unreachable)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    with pytest.raises(UserError, match=r"cannot load the encoding 'r50k_base' .*set TIKTOKEN_CACHE_DIR") as error:
        TiktokenTokenizer('r50k_base')
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# streams

@quick
@given(cut_texts())
def test_a_stream_shows_every_character_as_soon_as_it_is_whole(case):
    text, pieces = case
    stream, shown, content = Pieces(pieces).stream(), '', b''
    for i, piece in enumerate(pieces):
        shown, content = shown + stream(i), content + piece
        assert shown == content.decode(errors='ignore')   # which leaves out a character that is not all there
    assert stream(None) == '' and shown == text == Pieces(pieces).decode(range(len(pieces)))


@quick
@given(st.lists(st.binary(max_size=5)))
def test_a_stream_of_any_bytes_adds_up_to_what_decode_says(pieces):
    tok = Pieces(pieces)
    stream = tok.stream()
    shown = ''.join([stream(i) for i in range(len(pieces))]) + stream(None)
    assert shown == tok.decode(range(len(pieces))) == b''.join(pieces).decode(errors='replace')


def test_two_streams_at_once_do_not_mix():
    tok = Pieces(list('é世'.encode()[i:i + 1] for i in range(5)))
    one, two = tok.stream(), tok.stream()
    assert [one(0), two(2), one(1), two(3), two(4)] == ['', '', 'é', '', '世']
    assert (one(2), one(None), two(None)) == ('', '\ufffd', '')


def test_a_stream_of_ids_adds_up_to_the_text(few):
    stream, shown = few.stream(), ''
    for i in np.array(list(MIXED.encode())):   # a token is a byte
        shown += stream(i)
        assert MIXED.startswith(shown)
    assert shown == MIXED and stream(None) == ''


def test_a_stream_of_characters_shows_each_at_once():
    tok = CharTokenizer.of(MIXED)
    stream = tok.stream()
    assert [stream(i) for i in tok.encode(MIXED)] == list(MIXED)


# ---------------------------------------------------------------------------------------------------------------------
# the same face for all

@pytest.fixture(params=['char', 'trained'])
def tok(request):
    return CharTokenizer.of(MIXED) if request.param == 'char' else request.getfixturevalue('trained')


def test_a_description_makes_the_same_tokenizer_again_through_json_too(tok):
    for description in (tok.to_dict(), json.loads(json.dumps(tok.to_dict()))):
        again = from_dict(description)
        assert type(again) is type(tok) and again.to_dict() == tok.to_dict() == description
        assert again.vocab_size == tok.vocab_size and again.eot == tok.eot
        assert np.array_equal(again.encode(MIXED), tok.encode(MIXED))


def test_the_empty_text_has_no_ids(tok):
    assert len(tok.encode('')) == len(tok.encode('', special=True)) == 0
    assert tok.encode('').dtype == tok.encode('', special=True).dtype == id_type(tok.vocab_size)
    assert tok.decode([]) == tok.decode(tok.encode('')) == '' and tok.stream()(None) == ''


def test_all_ids_are_in_the_vocabulary(tok):
    assert tok.encode(MIXED).max() < tok.vocab_size and tok.decode(tok.encode(MIXED)) == MIXED


@quick
@given(cut_texts())
def test_the_size_of_ids_is_that_of_their_text_wherever_it_is_cut_and_without_its_ends(case):
    text, pieces = case
    tok = Pieces([*pieces, b'<end>'])
    tok.ends = (len(pieces),)
    ids = np.array([*tok.ends, *range(len(pieces)), *tok.ends, *range(len(pieces))], np.uint16)
    assert tok.count(ids) == (2 * len(text), 2 * len(text.encode()))


@pytest.mark.parametrize('description', [
    None, [], 'char', {}, {'kind': 'bpe'}, {'kind': None}, {'kind': ['char']}, {'kind': 'char'},
    {'kind': 'char', 'chars': ''}, {'kind': 'char', 'chars': 7}, {'kind': 'char', 'chars': None},
    {'kind': 'char', 'chars': 'aa'}, {'kind': 'char', 'chars': ['a', 'b']}, {'kind': 'char', 'chars': ['ab', 'c']},
    {'kind': 'tiktoken'}, {'kind': 'tiktoken', 'name': None},
    {'kind': 'tiktoken', 'name': 'x', 'parts': {'mergeable_ranks': 'no base64'}},
    {'kind': 'tiktoken', 'name': ['gpt2']},
], ids=str)
def test_a_damaged_description_is_refused(description):
    with pytest.raises(UserError):
        from_dict(description)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'kind': 'bpe'.*expected .* of kind char, tiktoken or bpe$"):
        from_dict({'kind': 'bpe'})


# ---------------------------------------------------------------------------------------------------------------------
# text files

@quick
@given(text=texts)
def test_a_text_file_is_read_without_byte_order_mark_and_with_plain_line_ends(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / 'text.txt'
    path.write_bytes(('\ufeff\r\n' + text).encode())
    assert tokenizer.read_text(path) == tokenizer.read_text(str(path)) == ('\r\n' + text).replace('\r\n', '\n')


@pytest.mark.parametrize('name, reason', [('gone.txt', 'No such file'), ('.', 'Is a directory'), ('a\0b', 'null byte'),
                                          ('x' * 300, 'File name too long'), ('\ud800', 'encode')])
def test_a_text_file_that_cannot_be_read_is_named(tmp_path, name, reason):
    with pytest.raises(UserError) as error:
        tokenizer.read_text(f'{tmp_path}/{name}')
    assert str(error.value).startswith(f'cannot read {tmp_path}/{name}: ') and reason in str(error.value)


@pytest.mark.parametrize('content, place', [
    (b'\xff\xfea\0', '0 is 0xff'), (b'a\nb' * 500 + b'\xe9t\xe9', '1,500 is 0xe9'),
    ('世'.encode()[:2], '0 is 0xe4'), (b'\na\xed\xa0\x80', '2 is 0xed'), (b'a\xc0\x80', '1 is 0xc0'),
])
def test_a_text_file_that_is_not_utf8_is_refused_with_the_offset(tmp_path, content, place):
    path = tmp_path / 'text.txt'
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        tokenizer.read_text(path)
    assert str(error.value) == f'{path} is not UTF-8: byte {place}; convert it, for instance with iconv'


# ---------------------------------------------------------------------------------------------------------------------
# trained here

def test_what_is_frequent_takes_few_tokens(trained):
    assert trained.vocab_size == 400 and trained.encode('').tolist() == []
    assert len(trained.encode(LINES[0])) < len(LINES[0].encode()) / 2
    assert len(BpeTokenizer.train(LINES, 300).encode(LINES[0])) > len(trained.encode(LINES[0]))


def test_a_pair_must_be_frequent_enough():
    assert BpeTokenizer.train(LINES, 10_000, min_frequency=10**6).vocab_size == 257   # bytes alone
    rare = [*LINES, 'uncommon']
    assert 'uncommon' in BpeTokenizer.train(rare, 10_000, min_frequency=1).encoding.get_vocab()
    assert 'uncommon' not in BpeTokenizer.train(rare, 10_000).encoding.get_vocab()


def test_transformers_reads_the_same_tokenizer(trained, tmp_path):
    from transformers import PreTrainedTokenizerFast
    path = tmp_path / 'tokenizer.json'
    path.write_text(trained.json, encoding='utf-8')
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in (*LINES[:5], '世界 😀\r\n\t  x', ''):
        assert theirs(text)['input_ids'] == trained.encode(text).tolist()
        assert theirs.decode(trained.encode(text), clean_up_tokenization_spaces=False) == text


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(UserError, match='vocabulary of 256: expected 257 or more'):
        BpeTokenizer.train(LINES, 256)


EMPTY = '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}'


@pytest.mark.parametrize('text', ['', '{', '{"model": 1}', 'null', EMPTY])
def test_a_damaged_tokenizer_json_is_refused(text):
    with pytest.raises(UserError, match=r'no tokenizer\.json'):
        BpeTokenizer(text)


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
    alphabet = encodings.byte_alphabet()
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
    tok.encoding.encode_special_tokens = False
    return [i for text in texts for i in [*tok.encoding.encode(text, add_special_tokens=False).ids, tok.eot]]


@pytest.fixture(scope='module')
def wordy():
    """An encoding of long tokens, with runs, repetitions and overlaps."""
    lines = [*LINES, 'aaaa aaaaaaaa abababab bababa aab baa abcabcabc cabcab  \n\n\n', '你好世界你好好世世界'] * 3
    return BpeTokenizer.train(lines, 600, special=('<|endoftext|>', '<pad>'))


some = st.sampled_from([*LINES, '<|endoftext|>', 'aaab<|endoftext|> '])


@quick
@given(st.lists(texts | st.text(st.sampled_from('abc 你好世界the\n')) | some, min_size=1))
def test_texts_encoded_together_ranks_have_the_ids_that_they_have_alone(wordy, many):
    assert wordy.ranks is not None
    ids = wordy.encode_texts(many)
    assert ids.tolist() == alone(wordy, many) and ids.dtype == np.uint16


def test_ranks_is_what_the_library_does_on_source_code():
    import inspect
    import json.decoder
    import typing
    source = inspect.getsource(typing)
    tok = BpeTokenizer.train([source], 3000)
    pieces = [source, inspect.getsource(json.decoder), inspect.getsource(np.linalg)]
    assert tok.ranks is not None and tok.encode_texts(pieces).tolist() == alone(tok, pieces)


def other(d, change):
    """A tokenizer.json with something changed."""
    d = json.loads(json.dumps(d))
    change(d)
    return BpeTokenizer(json.dumps(d))


def test_ranks_are_not_used_where_names_of_special_tokens_or_the_end_are_ambiguous(trained):
    special = ['<|endoftext|>', '<a', '<a>']
    tok = BpeTokenizer.train(LINES, 300, special=special)   # which of two names a text has depends on their order
    assert tok.ranks is None and tok.encode('x<a>y', special=True).tolist()[1] == 2
    end = BpeTokenizer(trained.json, eot=5)   # not a special token
    assert end.ranks is None and end.encode_document('a').tolist() == [*end.encode('a'), 5]


def test_texts_must_not_be_cut_where_blanks_are_put_before_them(trained, kinds):
    assert trained.border is BORDER and kinds['SentencePiece'].border is BLANK
    assert other(json.loads(trained.json), lambda d: d['pre_tokenizer'].update(add_prefix_space=True)).border is BLANK
    assert other(json.loads(trained.json), lambda d: d['pre_tokenizer'].update(use_regex=False)).border is BLANK
    split = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious', 'invert': False}
    by_bytes = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    after = {'type': 'Sequence', 'pretokenizers': [split, by_bytes]}   # blanks belong to the word before them
    assert other(json.loads(trained.json), lambda d: d.update(pre_tokenizer=after)).border is BLANK
    prepend = {'type': 'Prepend', 'prepend': 'x'}
    assert other(json.loads(trained.json), lambda d: d.update(normalizer=prepend)).border is BLANK
    assert other(json.loads(trained.json), lambda d: d.update(normalizer={'type': 'NFC'})).border is BORDER


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
        ours = tiktoken.Encoding('x', pat_str=encodings.GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
        for char in chars:
            for first in 'a1!':
                together = len(words.pre_tokenize_str(first + char)) == 1
                assert (len(ours.encode_ordinary(first + char)) == 1) == together, hex(ord(char))


def test_a_tokenizer_is_made_by_its_name(trained, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(trained.json, encoding='utf-8')
    assert tokenizer.load('char', ['ba', 'c']).chars == 'abc'
    assert tokenizer.load(f'{tmp_path}/tokenizer.json').to_dict() == trained.to_dict()
    made = tokenizer.load('bpe:400', LINES)
    assert made.json == trained.json
    more = tokenizer.load('bpe:400', LINES, 10**6, ['<pad>', '<|endoftext|>', '<unk>'])
    assert more.vocab_size == 259 and more.eot == 0 and more.encode('<unk>', special=True).tolist() == [2]


@pytest.mark.parametrize('spec, words', [
    ('gpt5', "expected 'char', 'bpe:5000', a tokenizer.json or .tiktoken file, the folder or "),
    ('', "tokenizer ''"), ('bpe', 'expected a number of tokens'), ('bpe:-5', 'expected a number of tokens'),
    ('nowhere.json', 'cannot read nowhere.json'), ('x.tiktoken', 'cannot read x.tiktoken'), ('a/folder', 'expected')])
def test_a_tokenizer_by_another_name_is_refused(spec, words):
    with pytest.raises(UserError) as refusal:
        tokenizer.load(spec, LINES)
    assert words in str(refusal.value)


def test_ranks_in_a_file_are_an_encoding(few, tmp_path, monkeypatch):
    import base64

    from tiktoken_ext import openai_public
    lines = [f'{base64.b64encode(token).decode()} {rank}' for token, rank in FEW['mergeable_ranks'].items()]
    for name in ('mine', 'cl100k_base'):
        (tmp_path / f'{name}.tiktoken').write_text('\n'.join(lines) + '\n')
    text = 'abc 12345 你好 I\'LL<|endoftext|>'
    mine = tokenizer.load(f'{tmp_path}/mine.tiktoken')
    assert mine.encode(text, special=True).tolist() == few.encode(text, special=True).tolist() and mine.eot == 258
    loader = openai_public.load_tiktoken_bpe
    known = tokenizer.load(f'{tmp_path}/cl100k_base.tiktoken')
    assert openai_public.load_tiktoken_bpe is loader
    assert known.eot == 100257 and "(?i:[sdmt]|ll|ve|re)" in known.parts['pat_str']
    (tmp_path / 'bad.tiktoken').write_text('YQ== 1\nno base64 2\n')
    with pytest.raises(UserError, match=r'bad\.tiktoken has no ranks'):
        tokenizer.load(f'{tmp_path}/bad.tiktoken')


def test_the_ranks_of_an_encoding_travel_in_its_description(few, monkeypatch):
    monkeypatch.setattr(encodings, 'tiktoken_parts', lambda name: FEW)
    monkeypatch.setattr(encodings, 'portable_parts', encodings.portable_parts.__wrapped__)   # without its cache
    short = {'kind': 'tiktoken', 'name': 'few'}
    whole = json.loads(json.dumps(encodings.portable(short)))

    def no_file(name):
        raise UserError('cannot be downloaded')

    monkeypatch.setattr(encodings, 'tiktoken_parts', no_file)
    again = from_dict(whole)
    assert again.encode('abc<|fim|>', special=True).tolist() == [257, 300] and again.to_dict() == whole
    assert same(short, whole) and same(whole, again) and not same({**whole, 'name': 'other', 'parts': {
        **whole['parts'], 'mergeable_ranks': whole['parts']['mergeable_ranks'].replace('YWI= 256', 'YWQ= 256')}}, whole)
    assert encodings.portable(short) == short   # nothing better is here
    assert encodings.portable({'kind': 'char', 'chars': 'ab'}) == {'kind': 'char', 'chars': 'ab'}


@pytest.mark.parametrize('word', ['a', 'ACGT', '你', '7', '=', '_', ' '])
def test_training_sees_words_of_bounded_length(word):
    text = f'{LINES[0]}x{word * 3000}\n{LINES[1]}'
    tok = BpeTokenizer.train([text], 700, min_frequency=1)   # the time grows with the square of a word's length
    assert max(len(tok.token_bytes(i)) for i in range(tok.vocab_size)) == 256
    assert tok.decode(tok.encode(text)) == text


def test_the_tokenizer_of_a_model_or_a_dataset_is_named_by_its_folder(tmp_path, char_dataset, folder, monkeypatch):
    for spec in (folder, folder / 'tokenizer.json'):
        tok = checkpoint.load_tokenizer(str(spec))
        assert tok.encode('hello').tolist() == BpeTokenizer(sentencepiece()).encode('hello').tolist() and tok.eot == 2
    assert isinstance(checkpoint.load_tokenizer(str(char_dataset)), CharTokenizer)
    assert isinstance(checkpoint.load_tokenizer('char', ['ab']), CharTokenizer)
    with pytest.raises(UserError, match="tokenizer 'no/where': expected .* folder or the hub name of a model"):
        (tmp_path / 'no').mkdir()
        monkeypatch.chdir(tmp_path)
        checkpoint.load_tokenizer('no/where')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no best.pt, ckpt.pt or config.json in '):
        checkpoint.load_tokenizer(str(tmp_path / 'empty'))


@pytest.fixture
def folder(tmp_path):
    """A folder with the tokenizer of a model, whose end another file names."""
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'tokenizer.json').write_text(sentencepiece(), encoding='utf-8')
    (tmp_path / 'model' / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>'}))
    return tmp_path / 'model'


def test_a_checkpoint_has_the_ranks_of_its_encoding(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(encodings, 'portable_parts', lambda name: {'ranks of': name})
    stateful = SimpleNamespace(state_dict=dict)
    model = SimpleNamespace(state_dict=lambda keep_vars: {}, config=SimpleNamespace(to_dict=dict))
    for description in ({'kind': 'tiktoken', 'name': 'gpt2'}, {'kind': 'char', 'chars': 'ab'}):
        state = checkpoint.state_of(model, stateful, stateful, description, {}, SimpleNamespace(step=3), ())
        parts = {'parts': {'ranks of': 'gpt2'}} if description['kind'] == 'tiktoken' else {}
        assert state['tokenizer'] == {**description, **parts}
