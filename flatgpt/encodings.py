"""
Byte-pair encodings: those of tiktoken by name or file, and byte-level ones of the tokenizers library, trained here or
in files. Tiktoken encodes many times as fast; what is trained here has ranks for it.
"""

import base64
import contextlib
import functools
import json
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

from flatgpt.errors import UsageError, UserError

EOT = '<|endoftext|>'
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Encodings(threading.local):
    """A tiktoken.Encoding of its own for each thread, because threads that share one wait for each other.
    parts: the arguments of tiktoken.Encoding."""

    def __init__(self, parts: dict):
        import tiktoken

        self.encoding = tiktoken.Encoding(**parts)

    def encode(self, text, special):
        allowed = 'all' if special else set()
        return self.encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())


# ---------------------------------------------------------------------------------------------------------------------
# of tiktoken

@functools.cache
def tiktoken_parts(name: str) -> dict:
    """The arguments of tiktoken.Encoding for one of its encodings. UserError if the name is unknown, or the file of the
    encoding cannot be downloaded."""
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UsageError(f"tokenizer {name!r}: expected 'char', 'bpe:5000', a tokenizer.json or .tiktoken file, the "
                         f"folder or the hub name of a model, or one of tiktoken's: {', '.join(names)}")
    try:
        return tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
    except Exception as error:   # requests' and tiktoken's many ways of not getting or not reading the file
        raise UserError(f'cannot load the encoding {name!r} ({type(error).__name__}): it is downloaded once; '
                        f'without network set TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept it') from None


def tiktoken_file(path: str, text: str) -> dict:
    """The arguments of tiktoken.Encoding for the ranks in the text of a file. One of tiktoken's own, such as
    cl100k_base.tiktoken, is the encoding of that name; another cuts words as GPT-2 does, and <|endoftext|> follows its
    tokens."""
    import tiktoken

    try:
        ranks = parse_ranks(text)
    except ValueError:
        raise UserError(f'{path} has no ranks: expected a token in base64 and its rank on each line') from None
    name = Path(path).stem
    if name in set(tiktoken.list_encoding_names()) - {'gpt2'}:
        constructor = tiktoken.registry.ENCODING_CONSTRUCTORS[name]
        with mock.patch.dict(constructor.__globals__, load_tiktoken_bpe=lambda *_, **__: ranks):   # no download
            return constructor()
    special = {EOT: max(ranks.values()) + 1}
    return {'name': name, 'pat_str': GPT2_WORDS, 'mergeable_ranks': ranks, 'special_tokens': special}


def parse_ranks(text):
    pairs = [line.split() for line in text.splitlines()]
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def with_ranks_as_text(parts):
    ranks = (f'{base64.b64encode(token).decode()} {rank}' for token, rank in parts['mergeable_ranks'].items())
    return {**parts, 'mergeable_ranks': '\n'.join(ranks)}


def portable(d: dict) -> dict:
    """A description, as to_dict() gives it, with the ranks of an encoding of tiktoken if they are here: from it the
    encoding can be made without a download."""
    parts = portable_parts(d['name']) if d.get('kind') == 'tiktoken' and 'parts' not in d else None
    return {**d, 'parts': parts} if parts else d


@functools.cache
def portable_parts(name):
    """Plain tiktoken_parts(); None if their files are not here, because a run must not wait for a download."""
    with mock.patch('tiktoken.load.read_file', side_effect=OSError), contextlib.suppress(UserError):
        return with_ranks_as_text(tiktoken_parts(name))


# ---------------------------------------------------------------------------------------------------------------------
# of the tokenizers library, of bytes

def trained_size(spec: str) -> int | None:
    """The number of tokens that 'bpe:5000' asks for; None for an encoding that is not to be trained."""
    kind, _, size = spec.partition(':')
    if kind != 'bpe':
        return None
    if not size.isdecimal() or not 256 < int(size) < 2**31:
        raise UsageError(f'tokenizer {spec!r}: expected a number of tokens above 256, as in bpe:5000')
    return int(size)


def train(texts: Iterable[str], vocab_size: int, min_frequency: int, special: list[str]) -> str:
    """The tokenizer.json of the byte-level encoding of so many tokens that shortens texts most (Sennrich et al., 2016;
    bytes: Radford et al., 2019). A pair must occur min_frequency times to become a token. The 256 bytes and the special
    tokens, whose ids come first, count too; every text of every language can be encoded."""
    from tokenizers import Regex, models, pre_tokenizers, trainers

    if vocab_size < 256 + len(special):
        raise UsageError(f'a vocabulary of {vocab_size}: expected {256 + len(special)} or more, the bytes and '
                         f'{len(special)} special tokens')
    encoding = byte_level(models.BPE())
    to_words = encoding.pre_tokenizer
    short = pre_tokenizers.Split(Regex('.{256}'), 'isolated')   # the time grows with the square of a word's length
    encoding.pre_tokenizer = pre_tokenizers.Sequence([to_words, short])
    encoding.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=special,
        show_progress=sys.stderr.isatty(), initial_alphabet=list(byte_alphabet())))
    encoding.pre_tokenizer = to_words
    return encoding.to_str()


def ranks_of(encoding) -> Encodings | None:
    """Encodings of tiktoken, many times as fast, that give the ids of a tokenizers.Tokenizer made by train(); None for
    another one: tiktoken joins the neighbours whose token has the lowest id, tokenizers those whose merge comes first,
    and train() numbers tokens in the order of their merges."""
    from tokenizers import models

    special = [token.content for _, token in sorted(encoding.get_added_tokens_decoder().items())]
    merges = [tuple(pair) for pair in json.loads(encoding.to_str())['model'].get('merges', [])]
    alphabet = byte_alphabet()
    tokens = [*special, *sorted(alphabet), *map(''.join, merges)]
    ids = {token: i for i, token in enumerate(tokens)}
    ambiguous = any(a != b and b.startswith(a) for a in special for b in special)
    if ambiguous or ids != encoding.get_vocab(with_added_tokens=True):
        return None
    again = byte_level(models.BPE(ids, merges))
    again.add_special_tokens(special)
    if again.to_str() != encoding.to_str():
        return None
    ranks = {bytes(alphabet[char] for char in token): ids[token] for token in tokens[len(special):]}
    return Encodings({'name': 'trained', 'pat_str': GPT2_WORDS, 'mergeable_ranks': ranks,
                      'special_tokens': {token: ids[token] for token in special}})


def byte_level(model):
    """A tokenizers.Tokenizer that cuts words as GPT-2 does and splits their bytes by a model of that library."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    encoding = Tokenizer(model)
    encoding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoding.decoder = decoders.ByteLevel()
    return encoding


def normalize(encoding, text: str) -> str:
    """A text as the normalizer of a tokenizers.Tokenizer changes it."""
    return encoding.normalizer.normalize_str(text) if encoding.normalizer else text


def words(encoding, text: str) -> list[str]:
    """The words that a tokenizers.Tokenizer makes of a text before it cuts them into tokens."""
    normal = normalize(encoding, text)
    if encoding.pre_tokenizer is None:
        return [normal] if normal else []
    return [word for word, _ in encoding.pre_tokenizer.pre_tokenize_str(normal)]


def of_files(vocab: str, merges: str) -> str:
    """The tokenizer.json of the encoding in the two files in which GPT-2's came, given the paths of vocab.json and
    merges.txt."""
    from tokenizers import models

    try:
        encoding = byte_level(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        raise UserError(f'{vocab} and {merges} are no encoding: {str(error)[:80]}') from None
    encoding.add_special_tokens([EOT] if encoding.token_to_id(EOT) is not None else [])
    return encoding.to_str()


def byte_alphabet() -> dict[str, int]:
    """{character: byte} of byte-level encodings: a byte that prints stands for itself, the others, in their order, for
    the characters from U+0100 on (Radford et al., 2019)."""
    prints = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    rest = [byte for byte in range(256) if byte not in prints]
    return {**{chr(byte): byte for byte in prints}, **{chr(0x100 + i): byte for i, byte in enumerate(rest)}}
