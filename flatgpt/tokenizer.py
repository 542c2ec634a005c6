"""
Text to token ids and back. Every tokenizer has the same face:

    encode(text) -> numpy array of ids          vocab_size        number of ids
    decode(ids) -> text                         eot               id of the end-of-text token, or None
    stream() -> function: id -> text            to_dict()         plain data, from which from_dict() makes it again

Characters need no download, nor do encodings that are trained here; tiktoken's ('gpt2', 'cl100k_base', ...) fetch a
file once.
"""

import codecs
import functools
import itertools
import json as jsons
import re
import threading
from pathlib import Path

import numpy as np

from flatgpt.errors import UsageError, UserError


def id_type(vocab_size):
    """The smallest of the two types in which ids are kept: uint16 up to 65,536 ids, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class Tokenizer:
    """What all tokenizers share; a subclass sets vocab_size and eot, and defines encode, token_bytes and to_dict."""

    cuttable = True   # whether a text may be encoded in pieces, if cut at a BORDER
    parallel = True   # whether threads that encode do not wait for each other

    def decode(self, ids):
        """The text of a sequence of ids. Bytes that are no UTF-8, as a model may produce, become U+FFFD."""
        return b''.join(self.token_bytes(int(i)) for i in ids).decode('utf-8', errors='replace')

    def stream(self):
        """A function to be called with one id at a time, which returns the text that is complete by then, and to be
        called with None at the end for what is left: a character whose bytes are spread over tokens comes whole."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda i: decoder.decode(b'', final=True) if i is None else decoder.decode(self.token_bytes(int(i)))

    def encode_texts(self, texts, end=True):
        """The ids of several texts in one array, each followed by the end-of-text token if there is one and end says
        so; many at once are much faster than one by one. Threads may call it at the same time, but for the first."""
        if self.eot is None and self.cuttable:
            return self.encode(''.join(texts))
        ends = [] if self.eot is None or not end else [self.eot]
        return np.concatenate([[*self.encode(text), *ends] for text in texts]).astype(id_type(self.vocab_size))

    def beginning(self):
        """The ids that stand for an empty prompt: the end of a text before it, or where there is none a line break."""
        if self.eot is not None:
            return np.array([self.eot])
        return self.encode('\n' if '\n' in self.chars else self.chars[0])


class CharTokenizer(Tokenizer):
    """One id per character of an alphabet, in its order. UserError if it is empty or has a character twice."""

    eot, parallel = None, False

    def __init__(self, chars):
        if not chars or len(set(chars)) < len(chars):
            raise UserError(f'an alphabet of {len(chars)} characters, {len(set(chars))} distinct: expected each once')
        points = np.frombuffer(chars.encode('utf-32-le', errors='surrogatepass'), dtype='<u4')
        self.chars, self.vocab_size = chars, len(chars)
        self.ids = np.full(points.max() + 2, self.vocab_size, dtype=np.uint32)   # of a code point; vocab_size: none
        self.ids[points] = np.arange(self.vocab_size)
        self.ascii = bytearray([255] * 256)   # the id of a byte; 255: look closer
        for byte, i in enumerate(self.ids[:128].tolist()):
            self.ascii[byte] = i if i < min(self.vocab_size, 255) else 255

    @classmethod
    def of(cls, text):
        """The tokenizer of all characters that occur in a text, in the order of their code points."""
        return cls.of_all([text])

    @classmethod
    def of_all(cls, texts):
        """The same for all characters of an iterable of texts."""
        seen, new = np.zeros(0x110000, bool), bytearray([1]) * 256   # by code point; by byte, 1: not seen
        for text in texts:
            if text.isascii():
                content = text.encode()
                if 1 not in content.translate(new):
                    continue
                for point in set(content):
                    new[point] = 0
            seen[np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), '<u4')] = True
        if not seen.any():
            raise UserError('no characters to make a vocabulary from: the text is empty')
        return cls(''.join(map(chr, np.flatnonzero(seen).tolist())))

    def encode(self, text, special=False):
        """The ids of a text; UserError with the characters that are not in the vocabulary, if there are any."""
        if text.isascii():
            content = text.encode().translate(self.ascii)
            if 255 not in content:
                return np.frombuffer(content, np.uint8).astype(id_type(self.vocab_size))
        points = np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype='<u4')
        ids = self.ids[np.minimum(points, len(self.ids) - 1)]
        if len(ids) and ids.max() == self.vocab_size:
            missing = ''.join(sorted(set(text) - set(self.chars)))
            raise UserError(f'characters that this model has never seen: {missing[:40]!r}; it knows {self.chars!r}')
        return ids.astype(id_type(self.vocab_size))

    def token_bytes(self, i):
        return self.chars[i].encode('utf-8', errors='surrogatepass')

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars}

    @classmethod
    def from_dict(cls, d):
        return cls(d['chars'])


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding of the tiktoken library, by name."""

    def __init__(self, name):
        import tiktoken

        if name not in tiktoken.list_encoding_names():
            raise UserError(f'no encoding {name!r}, expected one of {", ".join(tiktoken.list_encoding_names())}')
        try:
            self.encoding = tiktoken.get_encoding(name)
        except Exception as error:   # requests' and tiktoken's many ways of not getting or not reading the file
            raise UserError(f'cannot load the encoding {name!r} ({type(error).__name__}): it is downloaded once; '
                            f'without network set TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept it') from None
        self.name, self.vocab_size, self.eot = name, self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text, special=False):
        """The ids of a text. special: read '<|endoftext|>' as the end-of-text token instead of as its characters."""
        text = no_surrogates(text)   # as tiktoken does, elsewhere
        if special:
            ids = self.encoding.encode(text, allowed_special={'<|endoftext|>'}, disallowed_special=())
        else:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        return np.asarray(ids, dtype=id_type(self.vocab_size))

    def encode_texts(self, texts, end=True):
        return encode_joined(self.own.encoding, self.eot, texts, end).astype(id_type(self.vocab_size))

    @functools.cached_property
    def own(self):
        return OwnCopy(self.encoding)

    def token_bytes(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:   # the padding of a vocabulary, and numbers that GPT-4's leaves out
            return '\ufffd'.encode()

    def to_dict(self):
        return {'kind': 'tiktoken', 'name': self.name}

    @classmethod
    def from_dict(cls, d):
        return cls(d['name'])


class BpeTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, in the text of its tokenizer.json: one trained here, or one that came with
    pretrained weights. eot: id of its end-of-text token, None: that of '<|endoftext|>', if it has it."""

    def __init__(self, json, eot=None):
        import tokenizers

        try:
            self.encoding = tokenizers.Tokenizer.from_str(json)
        except Exception as error:   # the library's errors have no class of their own
            raise UserError(f'no tokenizer.json that the tokenizers library can read: {str(error)[:80]}') from None
        self.encoding.no_padding()
        self.encoding.no_truncation()
        self.json, ids = json, self.encoding.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1   # there may be gaps
        self.eot = ids.get(EOT) if eot is None or eot >= self.vocab_size else eot
        self.added = {i: token.content for i, token in self.encoding.get_added_tokens_decoder().items()}
        self.bytes_of = byte_alphabet() if 'ByteLevel' in str(self.encoding.decoder) else None

    @functools.cached_property
    def cuttable(self):
        """As it is for all tokenizers; found out by cutting a text that has something of everything."""
        if self.bytes_of is None or self.encoding.pre_tokenizer is None:
            return False
        normal = self.encoding.normalizer.normalize_str if self.encoding.normalizer else str

        def words(text):
            return [word for word, _ in self.encoding.pre_tokenizer.pre_tokenize_str(normal(text))]

        cuts = [match.start() for match in BORDER.finditer(PROBE)]
        return all(words(PROBE[:at]) + words(PROBE[at:]) == words(PROBE) for at in cuts)

    @classmethod
    def train(cls, texts, vocab_size, min_frequency=2, special=('<|endoftext|>',)):
        """The byte-level encoding of so many tokens that shortens texts, an iterable, most (Sennrich et al., 2016;
        bytes: Radford et al., 2019). A pair must occur min_frequency times to become a token. The 256 bytes and the
        special tokens, whose ids come first, count too; every text of every language can be encoded."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab_size < 256 + len(special):
            raise UsageError(f'a vocabulary of {vocab_size}: expected {256 + len(special)} or more, the bytes and '
                             f'{len(special)} special tokens')
        taken = [token for token in special if not token.isascii() and token in byte_alphabet()]
        if taken:
            raise UsageError(f'special token {taken[0]!r}: it stands for a byte, expected a longer name such as <pad>')
        encoding = Tokenizer(models.BPE())
        encoding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoding.decoder = decoders.ByteLevel()
        encoding.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(special), show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
        return cls(encoding.to_str())

    @classmethod
    def of_files(cls, vocab, merges, eot=None):
        """The encoding in the two files in which GPT-2's came, vocab.json, {token: id}, and merges.txt, a pair per line
        in their order."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        lines = [line for line in merges.splitlines() if line.strip() and not line.startswith('#version')]
        try:
            encoding = Tokenizer(models.BPE(vocab, [tuple(line.split(' ')) for line in lines]))
        except Exception as error:
            raise UserError(f'vocab.json and merges.txt are no encoding: {str(error)[:80]}') from None
        encoding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoding.decoder = decoders.ByteLevel()
        encoding.add_special_tokens([token for token in (EOT,) if token in vocab])
        return cls(encoding.to_str(), eot)

    def encode(self, text, special=False):
        """The ids of a text. special: read special tokens in it as such, and put those before it with which its model
        expects a text to begin."""
        if self.encoding.encode_special_tokens == special:   # cannot be set while another thread encodes
            self.encoding.encode_special_tokens = not special
        ids = self.encoding.encode(no_surrogates(text), add_special_tokens=special).ids
        return np.array(ids, dtype=id_type(self.vocab_size))

    def encode_texts(self, texts, end=True):
        if self.by_ranks is not None:
            return encode_joined(self.by_ranks.encoding, self.eot, texts, end).astype(id_type(self.vocab_size))
        if not self.encoding.encode_special_tokens:
            self.encoding.encode_special_tokens = True
        ends = [] if self.eot is None or not end else [self.eot]
        found = self.encoding.encode_batch_fast([no_surrogates(text) for text in texts], add_special_tokens=False)
        ids = itertools.chain.from_iterable((*one.ids, *ends) for one in found)
        return np.fromiter(ids, dtype=id_type(self.vocab_size))

    @functools.cached_property
    def by_ranks(self):
        """An encoding of tiktoken, ten times as fast, that gives the same ids; None if that is not certain."""
        encoding = ranked(jsons.loads(self.json), self.eot)
        return None if encoding is None else OwnCopy(encoding)

    def beginning(self):
        ids = self.encode('', special=True)
        if len(ids) == 0 and self.eot is None:
            raise UserError('this tokenizer has no token to begin an empty text with: give a prompt')
        return ids if len(ids) else np.array([self.eot])

    def token_bytes(self, i):
        """The bytes of a token; where they depend on what is before it, as in SentencePiece, its text."""
        text = self.added.get(i) or self.encoding.id_to_token(i) or '\ufffd'
        if i in self.added or self.bytes_of is None or text == '\ufffd':
            return text.encode()
        return bytes(self.bytes_of[char] for char in text)

    def decode(self, ids):
        if self.bytes_of:
            return super().decode(ids)
        return self.encoding.decode([int(i) for i in ids], skip_special_tokens=False)

    def stream(self):
        if self.bytes_of:
            return super().stream()
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return lambda i: '' if i is None else stream.step(self.encoding, int(i)) or ''

    def to_dict(self):
        return {'kind': 'bpe', 'json': self.json, 'eot': self.eot}

    @classmethod
    def from_dict(cls, d):
        return cls(d['json'], d['eot'])


EOT = '<|endoftext|>'


def byte_alphabet():
    """{character: byte} of byte-level encodings: a byte that prints stands for itself, the others, in their order, for
    the characters from U+0100 on (Radford et al., 2019)."""
    prints = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    rest = [byte for byte in range(256) if byte not in prints]
    return {**{chr(byte): byte for byte in prints}, **{chr(0x100 + i): byte for i, byte in enumerate(rest)}}


def no_surrogates(text):
    """A text without lone surrogates, which UTF-8 has no bytes for."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def text_size(tok, ids):
    """(bytes, characters) of the text, in UTF-8, that an array of ids stands for; the end-of-text token is no text."""
    counts, size, length = np.bincount(ids), 0, 0
    for i in np.flatnonzero(counts).tolist():
        piece, count = b'' if i == tok.eot else tok.token_bytes(i), int(counts[i])
        size += count * len(piece)
        length += count * sum(byte & 0xc0 != 0x80 for byte in piece)   # of which each character has one
    return size, length


class OwnCopy(threading.local):
    """.encoding: a copy of an encoding of tiktoken for each thread that asks for it. What its regular expressions write
    on belongs to the thread that came first, and the others would queue for it."""

    def __init__(self, encoding):
        import tiktoken

        self.encoding = tiktoken.Encoding(encoding.name, pat_str=encoding._pat_str,
                                          special_tokens=encoding._special_tokens,
                                          mergeable_ranks=encoding._mergeable_ranks)


def encode_joined(encoding, eot, texts, end):
    """The ids of texts by an encoding of tiktoken, each followed by its end-of-text token if end says so: in one call,
    with the name of that token between the texts, unless it occurs in one."""
    name = encoding.decode([eot]) if eot is not None else None
    texts = [no_surrogates(text) for text in texts]
    if not end or eot is None or any(name in text for text in texts):
        ids = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        ends = [np.array([eot] if end and eot is not None else [], np.uint32)] * len(ids)
        return np.concatenate([part for both in zip(ids, ends) for part in both])
    joined = ''.join(text + name for text in texts)
    return encoding.encode_to_numpy(joined, allowed_special={name}, disallowed_special=())


GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def ranked(d, eot):
    """The encoding of tiktoken that is a tokenizer.json, given as a dict: None if it is not byte-level, cuts words
    otherwise than GPT-2, or lists merges that do not follow from the order of its tokens.

    tiktoken joins those two neighbours that make the token of the lowest id, a tokenizer.json those that its list of
    merges names first. It is the same if the ids are in the order of the merges, and if the bytes of each token, joined
    with lower ids alone, end as the two parts that its merge names: then no other parts of it are ever joined.
    """
    import tiktoken

    model, cuts = d['model'], d['pre_tokenizer'] or {}
    plain = (model.get('type') == 'BPE' and d['normalizer'] is None and cuts.get('type') == 'ByteLevel'
             and cuts['use_regex'] and not cuts['add_prefix_space'] and not model.get('byte_fallback')
             and not any(model.get(name) for name in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'))
             and all(token['special'] for token in d['added_tokens']))
    if not plain:
        return None
    special, byte_of = {token['content']: token['id'] for token in d['added_tokens']}, byte_alphabet()
    try:
        ranks = {bytes(byte_of[char] for char in token): i
                 for token, i in model['vocab'].items() if token not in special}
    except KeyError:   # a token of other characters
        return None
    merges = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]
    merges = [tuple(bytes(byte_of[char] for char in part) for part in merge) for merge in merges]
    made = [ranks.get(a + b, -1) for a, b in merges]
    if len(ranks) != 256 + len(merges) or made != sorted(set(made)) or any(bytes([i]) not in ranks for i in range(256)):
        return None
    for (a, b), rank in zip(merges, made):
        parts = [bytes([byte]) for byte in a + b]
        while len(parts) > 1:
            pairs = [ranks.get(x + y, rank) for x, y in zip(parts, parts[1:])]
            lowest = min(pairs)
            if lowest >= rank:
                break
            i = pairs.index(lowest)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if parts != [a, b]:
            return None
    named = {name: i for name, i in special.items() if i == eot}
    return tiktoken.Encoding('ranked', pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=named)


KINDS = {'char': CharTokenizer, 'tiktoken': TiktokenTokenizer, 'bpe': BpeTokenizer}


def from_dict(d):
    """The tokenizer that to_dict() described."""
    try:
        kind = KINDS[d['kind']]
        return kind.from_dict(d)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'tokenizer {str(d)[:60]!r}: expected a description of kind {" or ".join(KINDS)}') from None


def same(d, e):
    """Whether two descriptions mean the same ids: equal ones do, others if all tokens are the same bytes and a text
    that has something of everything is cut in the same places."""
    if d == e:
        return True
    a, b = from_dict(d), from_dict(e)
    return (a.vocab_size == b.vocab_size and all(a.token_bytes(i) == b.token_bytes(i) for i in range(a.vocab_size))
            and (CharTokenizer in (type(a), type(b)) or np.array_equal(a.encode(PROBE), b.encode(PROBE))))


def make(spec, texts=(), min_frequency=2, special=()):
    """The tokenizer that a short text names: 'char' (the characters of texts, an iterable), 'bpe:5000' (trained on
    texts to so many tokens, see BpeTokenizer.train; special: further special tokens), the path of a tokenizer.json, or
    the name of one of tiktoken's encodings."""
    if spec == 'char':
        return CharTokenizer.of_all(texts)
    size = trained_size(spec)
    if size is not None:
        return BpeTokenizer.train(texts, size, min_frequency, dict.fromkeys([EOT, *special]))
    if spec.endswith('.json') or '/' in spec:
        return BpeTokenizer(read_text(spec), end_of_text(spec))
    try:
        return TiktokenTokenizer(spec)
    except UserError as error:
        if str(error).startswith('no encoding'):
            raise UsageError(f"tokenizer {spec!r}: expected 'char', 'bpe:5000', the path of a tokenizer.json, or one "
                             f"of tiktoken's: {str(error).split('one of ')[1]}") from None
        raise


def trained_size(spec):
    """The number of tokens that 'bpe:5000' asks for; None for what is not to be trained."""
    kind, _, size = spec.partition(':')
    if kind != 'bpe':
        return None
    if not size.isdecimal() or not 256 < int(size) < 2**31:
        raise UsageError(f'tokenizer {spec!r}: expected a number of tokens above 256, as in bpe:5000')
    return int(size)


def end_of_text(path):
    """The id of the end-of-text token of a tokenizer.json, by the tokenizer_config.json beside it, else by the names
    that are in use; None if there is none."""
    try:
        added = {token['content']: token['id'] for token in jsons.loads(read_text(path))['added_tokens']}
    except (ValueError, KeyError, TypeError):   # no such file; whoever reads it in earnest will say so
        return None
    try:
        named = jsons.loads((Path(path).parent / 'tokenizer_config.json').read_text(encoding='utf-8'))['eos_token']
        named = named['content'] if isinstance(named, dict) else named
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    names = (named, EOT, '<|end_of_text|>', '</s>', '<eos>')
    return next((added[name] for name in names if name in added), None)


PROBE = ("It's 12,345 o'clock:\n\n    don't  __init__(self) -> naïve café, Größe 你好，世界 😀\t!!\r\n"
         'A line\n2 more x1\n世界\nend.\nÉ')
BORDER = re.compile(r'(?<=[^\W_])(?=\s)|(?<=\S\n)(?=[^\W_])')   # where no encoding in use has a token that goes across


def read_text(path):
    """The text of a UTF-8 file, as it is; UserError when it cannot be read or is something else."""
    try:
        return Path(path).read_bytes().decode('utf-8')
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            line = error.object.count(b'\n', 0, error.start) + 1
            raise UserError(f'{path}, line {line:,}: not UTF-8 text, byte {error.start:,} of the file is '
                            f'0x{error.object[error.start]:02x}; convert it, for instance with iconv') from None
        raise UserError(f'cannot read {path}: {getattr(error, "strerror", None) or error}') from None
