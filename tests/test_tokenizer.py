"""Text to ids and back: nothing is lost, tiktoken agrees, and a stream never shows half a character."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SHARED, needs
from hypothesis import example, given
from hypothesis import strategies as st
from properties import quick

from flatgpt import tokenizer
from flatgpt.errors import UserError
from flatgpt.tokenizer import CharTokenizer, TiktokenTokenizer, Tokenizer, from_dict, id_type, read_text

characters = st.characters(exclude_categories=['Cs'])
texts = st.text(characters)   # any Unicode text
MIXED = 'Grüße, 世界! 👩‍👩‍👧 🇺🇦 e\u0301 \u0000\r\n\t𝔘\U0010ffff'


@pytest.fixture(scope='module')
def gpt2():
    """GPT-2's encoding, from files that lie ready."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
        return TiktokenTokenizer('gpt2')


@pytest.fixture(scope='module')
def few():
    """An encoding of tiktoken's kind that has few tokens, another special one after a gap, and needs no file."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b'ab': 256, b'abc': 257}
    encoding = tiktoken.Encoding('few', pat_str=tokenizer.GPT2_WORDS, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 258, '<|fim|>': 300})
    with pytest.MonkeyPatch.context() as patch:
        real = tiktoken.get_encoding
        patch.setattr(tiktoken, 'get_encoding', lambda name: encoding if name == 'p50k_base' else real(name))
        yield TiktokenTokenizer('p50k_base')


class Pieces(Tokenizer):
    """A tokenizer whose id i stands for the i-th of some pieces of bytes."""

    def __init__(self, pieces):
        self.pieces, self.eot, self.vocab_size = pieces, None, len(pieces)

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
            assert CharTokenizer.of_all(iter(whole)).chars == ''.join(sorted(set(''.join(whole))))


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
    assert str(error.value).endswith(f'{"".join(missing)[:40]!r}; it knows {alphabet!r}')
    assert '\n' not in str(error.value)


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
    with pytest.raises(UserError, match='the text is empty'):
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
    assert ids.tolist() == few.encoding.encode_ordinary(text) and ids.dtype == np.uint16
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
    assert few.decode(ids) == few.encoding.decode(ids)


def test_end_of_text_is_a_token_only_when_it_is_asked_for(few):
    text = 'a<|endoftext|>b'
    assert few.encode(text, special=True).tolist() == [97, 258, 98]
    assert few.encode(text).tolist() == few.encoding.encode_ordinary(text) and 258 not in few.encode(text)
    assert few.decode(few.encode(text)) == few.decode([97, 258, 98]) == text
    assert few.encode(text, special=True).dtype == np.uint16
    assert (few.eot, few.vocab_size) == (258, 301)


@pytest.mark.parametrize('special', [False, True])
def test_other_special_tokens_are_read_as_text(few, special):
    ids = few.encode('a<|fim|>b', special=special)
    assert ids.tolist() == few.encoding.encode_ordinary('a<|fim|>b') and 300 not in ids


def test_an_id_that_no_token_has_decodes_to_a_replacement_character(few):
    assert few.decode([97, 280, 98]) == 'a\ufffdb'


@pytest.mark.parametrize('special', [False, True])
def test_lone_surrogates_are_encoded_as_tiktoken_does(few, special):
    text = 'a\udcff'   # what a command line makes of a byte that is no UTF-8
    assert few.encode(text, special=special).tolist() == few.encoding.encode_ordinary(text)


@quick
@given(many=st.lists(texts | st.text(st.sampled_from('abc \n<|>')) | st.sampled_from(['a<|endoftext|>b', '<|fim|>']),
                     min_size=1))
@example(many=['abc<|fim|>', 'abc'])
@example(many=['a\ud83d', '\ude00b'])   # a surrogate pair, cut in two
def test_many_texts_have_the_ids_that_they_have_alone(few, many):
    each = [few.encode(text).tolist() for text in many]
    assert few.encode_texts(many).tolist() == [i for ids in each for i in [*ids, few.eot]]
    assert few.encode_texts(many, end=False).tolist() == [i for ids in each for i in ids]


def test_each_thread_encodes_many_texts_with_an_encoding_of_its_own(few, monkeypatch):
    import tiktoken

    used, barrier = [], threading.Barrier(2)
    for name in 'encode', 'encode_ordinary', 'encode_to_numpy':
        real = getattr(tiktoken.Encoding, name)
        monkeypatch.setattr(tiktoken.Encoding, name, lambda self, *args, real=real, **how: (
            used.append((threading.get_ident(), self)), real(self, *args, **how))[1])

    def encode(_):
        barrier.wait()   # so that each thread does one
        return [few.encode_texts(['abc', 'ab']).tolist() for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(encode, range(2))) == [[[257, 258, 256, 258]] * 3] * 2
        encodings = [{encoding for thread, encoding in used if thread == one} for one in {thread for thread, _ in used}]
    assert [len(of) for of in encodings] == [1, 1] and encodings[0] != encodings[1]   # made once


def test_an_unknown_encoding_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="^no encoding 'gpt-2', expected one of gpt2, .*cl100k_base"):
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

@pytest.fixture(params=['char', 'tiktoken'])
def tok(request):
    return CharTokenizer.of(MIXED) if request.param == 'char' else request.getfixturevalue('few')


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
    tok.eot = len(pieces)
    ids = np.array([tok.eot, *range(len(pieces)), tok.eot, *range(len(pieces))], np.uint16)
    assert tokenizer.text_size(tok, ids) == (2 * len(text.encode()), 2 * len(text))


def test_a_text_begins_after_the_end_of_another_or_after_a_line_break(few):
    assert few.beginning().tolist() == [258]
    assert CharTokenizer('\na').beginning().tolist() == [0]
    assert CharTokenizer('ab\n').beginning().tolist() == [2]
    assert CharTokenizer.of('ba').beginning().tolist() == [0]


@pytest.mark.parametrize('description', [
    None, [], 'char', {}, {'kind': 'bpe'}, {'kind': None}, {'kind': ['char']}, {'kind': 'char'},
    {'kind': 'char', 'chars': ''}, {'kind': 'char', 'chars': 7}, {'kind': 'char', 'chars': None},
    {'kind': 'char', 'chars': 'aa'}, {'kind': 'char', 'chars': ['a', 'b']}, {'kind': 'char', 'chars': ['ab', 'c']},
    {'kind': 'tiktoken'}, {'kind': 'tiktoken', 'name': None}, {'kind': 'tiktoken', 'name': ['gpt2']},
], ids=str)
def test_a_damaged_description_is_refused(description):
    with pytest.raises(UserError):
        from_dict(description)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=f"'kind': 'bpe'.*expected .* of kind {' or '.join(tokenizer.KINDS)}$"):
        from_dict({'kind': 'bpe'})


# ---------------------------------------------------------------------------------------------------------------------
# text files

@quick
@given(text=texts)
def test_a_text_file_is_read_as_it_is(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / 'text.txt'
    path.write_bytes(('\ufeff\r\n' + text).encode())
    assert read_text(path) == read_text(str(path)) == '\ufeff\r\n' + text


@pytest.mark.parametrize('name, reason', [('gone.txt', 'No such file'), ('.', 'Is a directory'), ('a\0b', 'null byte'),
                                          ('x' * 300, 'File name too long'), ('\ud800', 'encode')])
def test_a_text_file_that_cannot_be_read_is_named(tmp_path, name, reason):
    with pytest.raises(UserError) as error:
        read_text(f'{tmp_path}/{name}')
    assert str(error.value).startswith(f'cannot read {tmp_path}/{name}: ') and reason in str(error.value)


@pytest.mark.parametrize('content, place', [
    (b'\xff\xfea\0', (1, '0', '0xff')), (b'a\nb' * 500 + b'\xe9t\xe9', (501, '1,500', '0xe9')),
    ('世'.encode()[:2], (1, '0', '0xe4')), (b'\na\xed\xa0\x80', (2, '2', '0xed')), (b'a\xc0\x80', (1, '1', '0xc0')),
])
def test_a_text_file_that_is_not_utf8_is_refused_with_the_line_and_the_offset(tmp_path, content, place):
    path = tmp_path / 'text.txt'
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_text(path)
    line, byte, value = place
    assert str(error.value) == (f'{path}, line {line}: not UTF-8 text, byte {byte} of the file is {value}; convert it, '
                                f'for instance with iconv')
