"""
A model as one GGUF file, for llama.cpp and what is built on it, such as Ollama and LM Studio.

The gguf library writes the file and knows the names of tensors. What llama.cpp does with a file stands in its sources
alone (github.com/ggml-org/llama.cpp, src/llama-vocab.cpp and src/models). What it would compute otherwise than we do is
refused; tokenizers are compared by a twin, which encodes as llama.cpp does.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from flatgpt import architectures, encodings, tokenizer
from flatgpt.conversation import chat_template_of
from flatgpt.errors import UserError
from flatgpt.pretrained import tokenizer_json
from model import GPT, GPTConfig, rope_angles

DTYPES = {'F32': 'ALL_F32', 'F16': 'MOSTLY_F16', 'BF16': 'MOSTLY_BF16', 'Q8_0': 'MOSTLY_Q8_0'}   # {dtype: file type}
ARCHS = {'gpt2': 'gpt2', 'qwen3': 'qwen3'}   # its names; the others are its llama

# {tokenizer.ggml.pre: (regexes, whether a word that is a token is not split)}: how it cuts a text into words
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA3 = (CONTRACTIONS + r'[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
QWEN2 = LLAMA3.replace('{1,3}', '')
UPPER, LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
START = r'[^\r\n\p{L}\p{N}]?'
TEKKEN = (f'{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|' r'\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|'
          r'\s+(?!\S)|\s+')
PRE_TOKENIZERS = {
    'gpt-2': ([encodings.GPT2_WORDS], False),
    'smollm': ([r'\p{N}', encodings.GPT2_WORDS], False),
    'qwen2': ([QWEN2], False),
    'llama-bpe': ([LLAMA3], True),
    'dbrx': ([LLAMA3], False),
    'tekken': ([TEKKEN], True),
}
# Texts on which pre-tokenizers differ. In the second list: on which SentencePiece and its imitations do
TEXTS = [tokenizer.PROBE, "IT'S we'LL x'd 1234567 3.14  foo_Bar.baz(HTTPServer)\r\n\r\n\tif x:\n\n\n  y -= 1 ...!?\n /",
         '数字 12345，标点。「引号」１２３ ½ हिन्दी עברית 한국어 ไทย  \u3000\n', 'x\n\n  \n', "'sad 'S\t\t1st"]
BEGINNINGS = [' a', '  a', '\na', '▁a']


# ---------------------------------------------------------------------------------------------------------------------
# the model

def header(config: GPTConfig, tok: tokenizer.Tokenizer, dtype: str, name: str):
    """A gguf.GGUFWriter that has all metadata of a file and no tensors yet. UserError names what llama.cpp cannot
    represent. dtype: one of DTYPES, of the matrices; what is small stays in float32."""
    try:
        import gguf
    except ImportError:
        raise UserError('a GGUF file needs the gguf package: pip install gguf') from None
    architecture = architectures.hf_architecture(config)
    scaling = config.rope_scaling or [None]
    if config.window is not None and config.window < config.block_size:
        raise UserError(f'window={config.window}: llama.cpp has no window in a model of this kind, and the context has '
                        f'{config.block_size:,} tokens')
    if scaling[0] == 'dynamic' and config.block_size > scaling[2]:
        raise UserError(f'rope_scaling={config.rope_scaling}: llama.cpp has no dynamic scaling, and the context has '
                        f'{config.block_size:,} tokens')
    if architecture == 'gpt2' and config.gelu == 'erf':
        print("llama.cpp computes gelu='erf' by its tanh approximation: logits differ a little", file=sys.stderr)
    writer = gguf.GGUFWriter(None, ARCHS.get(architecture, 'llama'))
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.block_size)
    writer.add_block_count(config.n_layer)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner_width)
    writer.add_head_count(config.n_head)
    if architecture == 'gpt2':
        writer.add_layer_norm_eps(config.norm_eps or 1e-5)
    else:
        writer.add_vocab_size(config.vocab_size)
        writer.add_head_count_kv(config.n_kv_head or config.n_head)
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
        writer.add_layer_norm_rms_eps(config.norm_eps or 1e-6)
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.rope_base)
    if scaling[0] == 'linear':
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling[1])
    add_vocabulary(writer, tok, config.vocab_size)
    return writer


def tensors_of(model: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the file, tensor) for all tensors of a model."""
    import gguf

    config, D = model.config, model.config.head_width
    architecture = architectures.hf_architecture(config)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHS.get(architecture, 'llama'))
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    for hf_name, tensor in architectures.hf_parameters(model, architecture):
        module, _, leaf = hf_name.rpartition('.')
        if arch == gguf.MODEL_ARCH.LLAMA and module.endswith(('q_proj', 'k_proj')):
            # RoPE rotates rows 2 i and 2 i + 1 of a head in its llama, i and i + D / 2 here
            tensor = tensor.view(-1, 2, D // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        yield f'{names.get_name(module)}.{leaf}', tensor
    if config.rope_scaling and config.rope_scaling[0] == 'llama3':
        speeds = [torch.atan2(sin, cos)[0, D // 2:] for cos, sin in (   # angles from one position to the next
            rope_angles(torch.ones(1), D, config.rope_base, scaling) for scaling in (None, config.rope_scaling))]
        yield 'rope_freqs.weight', speeds[0] / speeds[1]                              # (D / 2,)


def write(writer, path: Path, model: GPT, dtype: str):
    """Write the file of a header() with the weights of its model, one tensor at a time. UserError if one of them has
    numbers that dtype cannot hold."""
    import gguf
    import numpy as np

    kinds = {}
    for name, tensor in tensors_of(model):
        kind = gguf.GGMLQuantizationType[dtype]
        if tensor.dim() == 1 or name.startswith('position_embd'):
            kind = gguf.GGMLQuantizationType.F32
        elif tensor.size(-1) % gguf.GGML_QUANT_SIZES[kind][0]:   # rows are quantized in blocks
            kind = gguf.GGMLQuantizationType.F16
        block, size = gguf.GGML_QUANT_SIZES[kind]
        kinds[name] = kind
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for name, tensor in tqdm(tensors_of(model), total=len(kinds), desc='GGUF', leave=False, disable=None):
            if kinds[name] == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > np.finfo(np.float16).max:
                raise UserError(f'{name} has numbers beyond float16: give --gguf_dtype=BF16')
            writer.write_tensor_data(gguf.quantize(tensor.float().contiguous().numpy(), kinds[name]))
    finally:
        writer.close()


def same(path: Path, model: GPT) -> bool:
    """Whether a file, read by the gguf library, has a token for each id and all tensors of a model: their names
    and shapes, and their numbers as they are when they are quantized."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if len(reader.fields['tokenizer.ggml.tokens'].data) != model.config.vocab_size:
        return False
    for name, tensor in tensors_of(model):
        other = found.pop(name, None)
        if other is None or other.shape.tolist() != [*reversed(tensor.shape)]:
            return False
        expected = gguf.quantize(tensor.float().contiguous().numpy(), other.tensor_type)
        if not np.array_equal(other.data.view(np.uint8), expected.view(np.uint8)):
            return False
    return not found


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer

def add_vocabulary(writer, tok: tokenizer.Tokenizer, size: int):
    """Add a tokenizer to a GGUFWriter, for a model of so many tokens. UserError if llama.cpp has none that encodes as
    it does."""
    from gguf import TokenType

    if isinstance(tok, tokenizer.CharTokenizer):   # the longest token that fits, of a list of byte strings
        writer.add_tokenizer_model('rwkv')
        tokens = [''.join(f'\\x{byte:02x}' for byte in tok.token_bytes(i)) for i in range(tok.vocab_size)]
        types = [TokenType.NORMAL] * len(tokens)
    else:
        bpe = tok if isinstance(tok, tokenizer.BpeTokenizer) else tokenizer.BpeTokenizer(tokenizer_json(tok))
        description = json.loads(bpe.encoding.to_str())
        model, added = description['model'], {token['id']: token for token in description['added_tokens']}
        if model['type'] != 'BPE' or not (bpe.bytes_of or bpe.fallback):
            raise UserError(f'llama.cpp has no tokenizer that encodes as this one, of type {model["type"]} without '
                            f'byte fallback, does: export the folder alone, with --to')
        texts = {i: text for text, i in model['vocab'].items()}
        tokens = [texts.get(i, f'[unused{i}]') for i in range(tok.vocab_size)]
        types = [TokenType.NORMAL if i in texts else TokenType.UNUSED for i in range(tok.vocab_size)]
        for i in bpe.fallback:
            types[i] = TokenType.BYTE
        for i, token in added.items():
            tokens[i] = token['content']
            types[i] = TokenType.CONTROL if token['special'] else TokenType.USER_DEFINED
        if bpe.bytes_of:
            writer.add_tokenizer_model('gpt2')
            writer.add_tokenizer_pre(pre_tokenizer(bpe, description))
            writer.add_token_merges([' '.join(pair) for pair in model['merges']])
        else:
            writer.add_tokenizer_model('llama')
            ranks, with_prefix = like_sentencepiece(bpe, description)
            writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens] + [0.0] * (size - len(tokens)))
            writer.add_add_space_prefix(with_prefix)
            unknown = model['vocab'].get(model.get('unk_token'))
            if unknown is not None:
                types[unknown] = TokenType.UNKNOWN
                writer.add_unk_token_id(unknown)
        add_roles(writer, tok)
    padding = range(len(tokens), size)
    writer.add_token_list([text.encode() for text in tokens] + [f'[unused{i}]'.encode() for i in padding])
    writer.add_token_types([*types, *(TokenType.UNUSED for _ in padding)])


def add_roles(writer, tok):
    """Add what begins and ends a text, and the chat template. UserError if nothing ends one: llama.cpp would then end
    at a token of its own choice."""
    if tok.eot is None:
        raise UserError('the tokenizer names no token that ends a text, and llama.cpp would choose one itself: put '
                        ' "eos_token_id" into generation_config.json of the folder')
    if len(tok.begin) > 1:
        raise UserError(f'texts begin with the tokens {tok.begin}, and llama.cpp adds one at most')
    ends = [tok.eot, *(i for i in tok.ends if i != tok.eot)]
    for add, i in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends):
        add(i)
    if len(ends) > 3:
        print(f'llama.cpp has three tokens that end a text: {ends[3:]} are left out', file=sys.stderr)
    config = tok.files.get('config.json', {})
    begin = tok.begin[0] if tok.begin else config.get('bos_token_id')
    writer.add_bos_token_id(begin if type(begin) is int and begin < tok.vocab_size else tok.eot)
    writer.add_add_bos_token(bool(tok.begin))
    writer.add_add_eos_token(False)
    template = chat_template_of(tok)
    if template:
        writer.add_chat_template(template.source)


def pre_tokenizer(bpe, description):
    """The name of the first of PRE_TOKENIZERS with which llama.cpp splits texts as a byte-level BPE does. UserError if
    there is none."""
    from tokenizers import Regex, pre_tokenizers

    words = [encodings.words(bpe.encoding, text) for text in TEXTS]
    for name, (patterns, whole_words) in PRE_TOKENIZERS.items():
        pre = pre_tokenizers.Sequence([
            *(pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if [[word for word, _ in pre.pre_tokenize_str(text)] for text in TEXTS] == words:
            ids = twin_of(description, None, pre, ignore_merges=whole_words)
            if all(ids(text) == bpe.encode(text).tolist() for text in TEXTS):
                return name
    raise UserError(f'llama.cpp cuts words by none of the rules of this tokenizer (tried '
                    f'{", ".join(PRE_TOKENIZERS)}): export the folder alone, with --to')


def like_sentencepiece(bpe, description):
    """({token: its rank}, whether a text gets a space in front) with which llama.cpp's SentencePiece encodes as a BPE
    with byte fallback does: it joins the neighbours whose token has the lowest rank, whatever they are. UserError if
    there is none."""
    from tokenizers import normalizers

    vocab, ranks = description['model']['vocab'], {}
    for first, second in description['model']['merges']:
        ranks.setdefault(first + second, len(ranks) + 1)
    for token in vocab.keys() - {*bpe.added.values()}:   # which llama.cpp can make, too
        if len(token) > 1 and vocab[token] not in bpe.fallback:
            ranks.setdefault(token, len(vocab))
    merges = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))
              if token[:i] in vocab and token[i:] in vocab]
    for with_prefix in (True, False):
        parts = [normalizers.Prepend('▁')] if with_prefix else []
        ids = twin_of(description, normalizers.Sequence([*parts, normalizers.Replace(' ', '▁')]), None, merges=merges)
        if all(ids(text) == bpe.encode(text).tolist() for text in TEXTS):
            if any(ids(text) != bpe.encode(text).tolist() for text in BEGINNINGS):
                print('llama.cpp encodes texts that begin with a space otherwise than this tokenizer', file=sys.stderr)
            return ranks, with_prefix
    raise UserError('llama.cpp encodes texts otherwise than this tokenizer (BPE with byte fallback): export the folder '
                    'alone, with --to')


def twin_of(description, normalizer, pre, **model):
    """A function, text -> ids, of a tokenizer.json with another normalizer, pre-tokenizer and fields of its model."""
    from tokenizers import Tokenizer

    plain = {'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'dropout': None}
    twin = Tokenizer.from_str(json.dumps({**description, 'model': {**description['model'], **plain, **model}}))
    twin.normalizer, twin.pre_tokenizer = normalizer, pre
    return lambda text: twin.encode(text, add_special_tokens=False).ids
