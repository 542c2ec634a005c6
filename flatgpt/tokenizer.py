"""
Text to token ids and back. Every tokenizer has the same face:

    encode(text)            its ids, all of it read as characters     vocab_size   number of ids
    encode_prompt(text)     the ids with which a prompt begins        eot          id of the end-of-text token, or None
    encode_document(text)   what training data has of a document      ends         all ids that end a sample
    decode(ids)             the text of ids                           begin        ids that stand before every text
    stream(prompt_ids)      function: id -> text that is complete     to_dict()    plain data, see from_dict()
    count(ids)              characters and bytes of their text        unknown(text)   characters without ids

Prompts and documents are encoded by one rule: the ids in `begin`, unless the text begins with them, then the text, in
which the names of special tokens are read as these tokens.
"""

import codecs
import functools
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flatgpt import encodings
from flatgpt.encodings import EOT
from flatgpt.errors import UserError, nearest_to, refuse_pointer

PROBE = ("It's 12,345 o'clock:\n\n    don't  __init__(self) -> naïve café, Größe 你好，世界 😀\t!!\r\n"
         'A line\n2 more x1\n世界\nend.\nÉ 1234567')
BORDER = re.compile(r'(?<=[^\W_])(?=\s)|(?<=\S\n)(?=[^\W_])')   # no encoding in use has a token that goes across
BLANK = re.compile(r'(?<=[^\W_])(?= [^\W_])')   # the same for tokenizers that look at more than a word
CONTEXT = 8   # how many tokens back the text of a token can depend on others


class Tokenizer:
    """What all tokenizers share; a subclass sets vocab_size and eot, and defines encode, token_bytes and to_dict."""

    begin = ()        # ids before every text
    ends = ()
    files = {}        # {name: content} of other files of its model, which an export writes back
    ranks = None      # the Encodings of an encoding that tiktoken can run
    local = True      # whether the bytes of a token do not depend on those before it
    border = BORDER   # where a long text may be cut into pieces
    joint = ''        # what a piece that continues a text begins with and must not be encoded

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids with which a prompt begins; of an empty one, those that stand for the beginning of a text."""
        ids = self.after_begin(self.encode(text, special=True))
        if len(ids):
            return ids
        if self.eot is not None:
            return np.array([self.eot], ids.dtype)
        if isinstance(self, CharTokenizer):
            return self.encode('\n' if '\n' in self.chars else self.chars[0])
        raise UserError('this tokenizer has no token to begin an empty text with: give a prompt')

    def after_begin(self, ids):
        if tuple(ids[:len(self.begin)]) == self.begin:
            return ids
        return np.concatenate((np.array(self.begin, ids.dtype), ids))

    def encode_document(self, text: str) -> np.ndarray:
        """The ids of a document in training data: those of a prompt, then the end-of-text token, if there is one."""
        return self.encode_texts([text])

    def encode_texts(self, texts: Iterable[str], end: bool = True, begin: bool = True) -> np.ndarray:
        """The ids of several documents in one array. end, begin: whether the end-of-text token and the ids before a
        text are added, which pieces of a document have only at its ends. Threads may call it at the same time, after
        a first call."""
        end = end and self.eot is not None
        texts = texts if begin else [text.removeprefix(self.joint) for text in texts]
        if self.ranks:   # all in one call
            name = self.token_bytes(self.eot).decode() if end else ''
            return self.encode(''.join(text + name for text in texts), special=True)
        ends = np.array([self.eot] if end else [], id_type(self.vocab_size))
        ids = (self.encode(text, special=True) for text in texts)
        return np.concatenate([part for of in ids for part in (self.after_begin(of) if begin else of, ends)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Invalid UTF-8, as a model may produce, becomes U+FFFD."""
        return b''.join(self.token_bytes(int(i)) for i in ids).decode('utf-8', errors='replace')

    def stream(self, prompt_ids: Iterable[int] = ()):
        """A function to be called with an id, or several, that follow a prompt and what it was called with before: it
        returns the text that is complete by then. At the end, call it with None for the rest."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

        def piece(ids):
            content = b'' if ids is None else b''.join(self.token_bytes(int(i)) for i in np.atleast_1d(ids))
            return decoder.decode(content, final=ids is None)

        piece([*prompt_ids][-CONTEXT:])
        return piece

    def count(self, ids: np.ndarray) -> tuple[int, int]:
        """(characters, bytes in UTF-8) of the text of ids, in which tokens that begin or end a text are no text."""
        silent = [*{*self.begin, *self.ends}]
        if self.local:   # much faster
            counts = np.bincount(ids, minlength=self.vocab_size)
            counts[silent] = 0
            pieces = [(int(counts[i]), self.token_bytes(i)) for i in np.flatnonzero(counts).tolist()]
            characters = sum(n * sum(byte & 0xc0 != 0x80 for byte in piece) for n, piece in pieces)   # one in each
            return characters, sum(n * len(piece) for n, piece in pieces)
        parts = np.split(ids, np.flatnonzero(np.isin(ids, silent)))
        texts = [self.decode(part[~np.isin(part, silent)]).removeprefix(self.lead) for part in parts]
        return sum(map(len, texts)), sum(len(text.encode()) for text in texts)

    def unknown(self, text: str) -> list[str]:
        """The characters of a text that cannot be encoded, each once."""
        return []

    def probe(self) -> str:
        """A text that has something of everything and that can be encoded."""
        missing = self.unknown(PROBE)
        return ''.join(char for char in PROBE if char not in missing)

    def refuse_unknown(self, text):
        if missing := self.unknown(text):
            shown = f'{"".join(missing[:20])!r}{" ..." if len(missing) > 20 else ""}'
            raise UserError(f'{len(missing):,} characters that this model has never seen: {shown}')


class CharTokenizer(Tokenizer):
    """One id per character of an alphabet, in its order. UserError if it is empty or has a character twice."""

    eot = None

    def __init__(self, chars: str):
        if not chars or len(set(chars)) < len(chars):
            raise UserError(f'an alphabet of {len(chars)} characters, {len(set(chars))} distinct: expected each once')
        self.chars = chars
        self.vocab_size = len(chars)
        points = code_points(chars)
        self.ids = np.full(points.max() + 2, self.vocab_size, np.uint32)   # of a code point; vocab_size: none
        self.ids[points] = np.arange(self.vocab_size)

    @classmethod
    def of(cls, texts: str | Iterable[str]):
        """The tokenizer of all characters that occur in a text, or in several, in the order of their code points."""
        seen = np.zeros(0x110000, bool)
        for text in [texts] if isinstance(texts, str) else texts:
            seen[code_points(text)] = True
        return cls(''.join(map(chr, np.flatnonzero(seen).tolist())))

    def unknown(self, text: str) -> list[str]:
        return sorted(set(text) - set(self.chars))

    def probe(self) -> str:
        return self.chars

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """The ids of a text. UserError names characters that are not in the vocabulary."""
        ids = self.ids[np.minimum(code_points(text), len(self.ids) - 1)]
        if len(ids) and ids.max() == self.vocab_size:
            self.refuse_unknown(text)
        return ids.astype(id_type(self.vocab_size))

    def token_bytes(self, i: int) -> bytes:
        return self.chars[i].encode('utf-8', errors='surrogatepass')

    def to_dict(self) -> dict:
        return {'kind': 'char', 'chars': self.chars}


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding of the tiktoken library, by its name, or also by its parts, see
    encodings.tiktoken_parts()."""

    def __init__(self, name: str, parts: dict | None = None):
        self.name = name
        self.by_name = parts is None
        self.parts = parts or encodings.tiktoken_parts(name)
        self.ranks = encodings.Encodings(self.parts)
        self.vocab_size = self.ranks.encoding.n_vocab
        self.eot = self.ranks.encoding.eot_token
        self.ends = (self.eot,)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """The ids of a text. special: read the names of special tokens as these, not as characters."""
        return self.ranks.encode(no_surrogates(text), special).astype(id_type(self.vocab_size))

    def token_bytes(self, i: int) -> bytes:
        try:
            return self.ranks.encoding.decode_single_token_bytes(i)
        except KeyError:   # the padding of a vocabulary, and numbers that GPT-4's leaves out
            return '\ufffd'.encode()

    def to_dict(self) -> dict:
        found = {'kind': 'tiktoken', 'name': self.name}
        return found if self.by_name else {**found, 'parts': encodings.with_ranks_as_text(self.parts)}


class BpeTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, of any kind, in the text of its tokenizer.json: one trained here, or one
    that came with pretrained weights. eot: id of its end-of-text token; None: that of '<|endoftext|>', or what its
    template puts after a text. ends: all ids that end a sample; empty: eot. files: {name: content} of other files
    of its model, which an export writes back."""

    def __init__(self, text: str, eot: int | None = None, ends: Iterable[int] = (), files: dict | None = None):
        import tokenizers

        try:
            self.encoding = tokenizers.Tokenizer.from_str(text)
            ids = self.encoding.get_vocab(with_added_tokens=True)
            self.vocab_size = max(ids.values()) + 1   # there may be gaps
        except Exception as error:   # the library's errors have no class of their own
            raise UserError(f'no tokenizer.json that the tokenizers library can read: {str(error)[:80]}') from None
        self.encoding.no_padding()
        self.encoding.no_truncation()
        self.json = text
        self.files = files or {}
        self.added = {i: token.content for i, token in self.encoding.get_added_tokens_decoder().items()}
        self.bytes_of = encodings.byte_alphabet() if self.decoded('Ã', '©') == 'é' else None
        names = {f'<0x{byte:02X}>': byte for byte in range(256) if self.decoded('<0x41>') == 'A'}
        self.fallback = {ids[name]: byte for name, byte in names.items() if name in ids}
        # what a template adds is marked in the ids of a text, the first one here that has ids of its own
        probe = next(found for found in map(self.encoding.encode, ('a', *ids)) if 0 in found.special_tokens_mask)
        own = [i for i, added in enumerate(probe.special_tokens_mask) if not added]
        self.begin, after = tuple(probe.ids[:own[0]]), probe.ids[own[-1] + 1:]
        if eot is None or eot >= self.vocab_size:
            eot = ids.get(EOT, after[-1] if after else None)
        self.eot = eot
        self.ends = tuple(dict.fromkeys(ends)) or (() if eot is None else (eot,))
        text = self.decode(self.library_ids('a', special=True))   # which may begin with a space of its own
        self.lead = text[:-1] if text.endswith('a') else ''
        self.local = self.bytes_of is not None and not self.lead
        self.knows = functools.cache(self.can_encode)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, min_frequency: int = 2, special: Iterable[str] = (EOT,)):
        """The byte-level encoding that encodings.train() makes of texts."""
        return cls(encodings.train(texts, vocab_size, min_frequency, [*special]))

    @functools.cached_property
    def ranks(self):
        """As it is for all tokenizers, of what train() made."""
        return encodings.ranks_of(self.encoding) if self.eot in (None, *self.added) else None

    @functools.cached_property
    def border(self):
        """As it is for all tokenizers; found out by cutting a text that has something of everything."""
        cuts = [match.start() for match in BORDER.finditer(PROBE)]
        words = functools.partial(encodings.words, self.encoding)
        same_words = all(words(PROBE[:at]) + words(PROBE[at:]) == words(PROBE) for at in cuts)
        return BORDER if self.bytes_of is not None and same_words else BLANK

    @functools.cached_property
    def joint(self):
        """As it is for all tokenizers; many put a blank before each text themselves."""
        a, b, both = (self.library_ids(text, special=True) for text in ('a', 'b', 'a b'))
        return ' ' if self.border is BLANK and a + b == both else ''

    def can_encode(self, char):
        """Whether a character is in the ids of a text, or is one that the tokenizer removes on purpose."""
        ids = self.library_ids(char, special=True)   # True: other threads encode documents so
        normal = encodings.normalize(self.encoding, char)
        if not encodings.words(self.encoding, char) or (ids and not normal.strip(' ▁')):
            return True
        text = self.decode(ids).strip(' ')
        return bool(text) and ('\ufffd' not in text or char == '\ufffd')

    def unknown(self, text: str) -> list[str]:
        return [] if self.ranks else sorted(char for char in set(no_surrogates(text)) if not self.knows(char))

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """The ids of a text. special: as TiktokenTokenizer's. UserError with the characters that it would lose."""
        if self.ranks:
            return self.ranks.encode(no_surrogates(text), special).astype(id_type(self.vocab_size))
        self.refuse_unknown(text)
        return np.array(self.library_ids(text, special), dtype=id_type(self.vocab_size))

    def library_ids(self, text, special):
        if self.encoding.encode_special_tokens == special:   # cannot be set while another thread encodes
            self.encoding.encode_special_tokens = not special
        return self.encoding.encode_batch_fast([no_surrogates(text)], add_special_tokens=False)[0].ids

    def token_text(self, i):
        return self.encoding.id_to_token(i) or '\ufffd'

    def token_bytes(self, i: int) -> bytes:
        """The bytes of a token; where they depend on the token before it, as in SentencePiece, its text."""
        text = self.token_text(i)
        if i in self.fallback:
            return bytes([self.fallback[i]])
        if i in self.added or self.bytes_of is None or not self.bytes_of.keys() >= set(text):
            return text.encode()
        return bytes(self.bytes_of[char] for char in text)

    def decoded(self, *tokens):
        return self.encoding.decoder.decode(list(tokens)) if self.encoding.decoder else ' '.join(tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Bytes between other tokens that are invalid UTF-8 become U+FFFD."""
        if self.bytes_of:
            return super().decode(ids)
        tokens = []
        for is_byte, run in itertools.groupby(map(int, ids), self.fallback.__contains__):
            if is_byte:
                tokens += bytes(map(self.fallback.get, run)).decode('utf-8', errors='replace')   # characters
            else:
                tokens += map(self.token_text, run)
        return self.decoded(*tokens)

    def stream(self, prompt_ids: Iterable[int] = ()):
        if self.bytes_of:
            return super().stream(prompt_ids)
        window = [int(i) for i in prompt_ids][-CONTEXT:]   # what the text of the next tokens depends on
        shown = self.decode(window)

        def piece(ids):
            nonlocal window, shown
            window += [] if ids is None else np.atleast_1d(ids).tolist()
            whole = self.decode(window)
            text = whole if ids is None else whole.removesuffix('\ufffd')   # which may become a character
            new = text[len(os.path.commonprefix([shown, text])):]
            if new:
                shown = text
            if len(window) > 4 * CONTEXT and shown == whole:
                window = window[-CONTEXT:]
                shown = self.decode(window)
            return new

        return piece

    def to_dict(self) -> dict:
        ends = {} if self.ends in ((), (self.eot,)) else {'ends': list(self.ends)}
        files = {'files': self.files} if self.files else {}
        return {'kind': 'bpe', 'json': self.json, 'eot': self.eot, **ends, **files}


def id_type(vocab_size: int) -> np.dtype:
    """The smallest of the two types in which ids are kept: uint16 up to 65,536 ids, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def code_points(text: str) -> np.ndarray:
    """The code points of a text, an array of uint32."""
    return np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), '<u4')


def no_surrogates(text: str) -> str:
    """A text without lone surrogates, which UTF-8 has no bytes for."""
    return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


def from_dict(d: dict):
    """The tokenizer that to_dict() described."""
    try:
        if d['kind'] == 'bpe':
            return BpeTokenizer(d['json'], d['eot'], d.get('ends', ()), d.get('files'))
        if d['kind'] == 'tiktoken':
            parts = d.get('parts')
            ranks = parts and encodings.parse_ranks(parts['mergeable_ranks'])
            return TiktokenTokenizer(d['name'], parts and {**parts, 'mergeable_ranks': ranks})
        return {'char': CharTokenizer}[d['kind']](d['chars'])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f'tokenizer {str(d)[:60]!r}: expected a description of kind char, tiktoken or bpe') from None


def same(a, b) -> bool:
    """Whether two tokenizers, or descriptions of them, mean the same ids: the tokens of both are the same bytes, and a
    text that has something of everything is cut in the same places."""
    a, b = (tok if isinstance(tok, dict) else tok.to_dict() for tok in (a, b))
    by_name = [{key: d.get(key) for key in ('kind', 'name')} for d in (a, b)]
    if a == b or (by_name[0] == by_name[1] and 'name' in a and not ('parts' in a and 'parts' in b)):
        return True
    a, b = from_dict(a), from_dict(b)
    probe = a.probe()
    return (a.vocab_size == b.vocab_size and all(a.token_bytes(i) == b.token_bytes(i) for i in range(a.vocab_size))
            and not b.unknown(probe) and np.array_equal(a.encode(probe), b.encode(probe)))


def load(spec: str, texts: Iterable[str] = (), min_frequency: int = 2, special: Iterable[str] = ()):
    """The tokenizer that a short text names: 'char' (the characters of texts), 'bpe:5000' (trained on texts to so many
    tokens, see BpeTokenizer.train; special: further special tokens), the path of a tokenizer.json or of a .tiktoken
    file, or one of tiktoken's names. checkpoint.load_tokenizer() knows those of models too. Raises UserError."""
    if spec == 'char':
        return CharTokenizer.of(texts)
    size = encodings.trained_size(spec)
    if size is not None:
        return BpeTokenizer.train(texts, size, min_frequency, dict.fromkeys([EOT, *special]))
    if spec.endswith('.tiktoken'):
        return TiktokenTokenizer(Path(spec).stem, encodings.tiktoken_file(spec, read_text(spec)))
    if spec.endswith('.json'):
        return BpeTokenizer(read_text(spec))
    return TiktokenTokenizer(spec)


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark and with \\n as line ends. Raises UserError."""
    try:
        content = Path(path).read_bytes()
        refuse_pointer(path, content)
        return content.decode('utf-8').removeprefix('\ufeff').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8: byte {error.start:,} is 0x{error.object[error.start]:02x}; convert it, '
                        f'for instance with iconv') from None
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {path}: {getattr(error, "strerror", None) or error}{nearest_to(path)}') from None
