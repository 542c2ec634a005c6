"""
Models of Hugging Face as models of ours, both ways: config.json and GPTConfig, names and shapes of parameters.

The tables give the names of Hugging Face, hf, for ours. They are read in both directions. An architecture is what
config.json calls model_type.
"""

import re
from collections.abc import Iterator

import torch

from flatgpt.errors import UserError
from flatgpt.machine import SkipInit
from model import ARCHS, GPT, GPTConfig

CLASSES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
           'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}

# {module of ours: modules of hf}; # is the number of a layer. Several are rows of ours, one below the other
GPT2 = {name: [name] for name in ('transformer.wte', 'transformer.wpe', 'transformer.ln_f', 'lm_head', *(
    f'transformer.h.#.{part}' for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')))}
LLAMA = {
    'transformer.wte': ['model.embed_tokens'],
    'transformer.h.#.ln_1': ['model.layers.#.input_layernorm'],
    'transformer.h.#.attn.c_attn': [f'model.layers.#.self_attn.{part}_proj' for part in 'qkv'],
    'transformer.h.#.attn.c_proj': ['model.layers.#.self_attn.o_proj'],
    'transformer.h.#.ln_2': ['model.layers.#.post_attention_layernorm'],
    'transformer.h.#.mlp.c_fc': [f'model.layers.#.mlp.{part}_proj' for part in ('gate', 'up')],
    'transformer.h.#.mlp.c_proj': ['model.layers.#.mlp.down_proj'],
    'transformer.ln_f': ['model.norm'],
    'lm_head': ['lm_head'],
}
MODULES = {**dict.fromkeys(CLASSES, LLAMA), 'gpt2': GPT2, 'qwen3': {
    **LLAMA, **{f'transformer.h.#.attn.{part}_norm': [f'model.layers.#.self_attn.{part}_norm'] for part in 'qk'}}}
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')   # in GPT-2 these are stored input by output
WITHOUT_BIAS = ('wte.weight', 'wpe.weight', 'lm_head.weight')   # in any GPT-2
BUFFERS = r'(^|\.)attn\.(masked_)?bias$|rotary_emb\.inv_freq$'   # constants that old files hold

# {field of GPTConfig: field of config.json}
LLAMA_FIELDS = {
    'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
    'n_embd': 'hidden_size', 'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads',
    'head_dim': 'head_dim', 'n_inner': 'intermediate_size', 'norm_eps': 'rms_norm_eps', 'rope_base': 'rope_theta',
    'bias': 'attention_bias', 'tie_weights': 'tie_word_embeddings'}
FIELDS = {**dict.fromkeys(CLASSES, LLAMA_FIELDS), 'mistral': {**LLAMA_FIELDS, 'window': 'sliding_window'}, 'gpt2': {
    'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer', 'n_embd': 'n_embd',
    'n_head': 'n_head', 'n_inner': 'n_inner', 'norm_eps': 'layer_norm_epsilon', 'tie_weights': 'tie_word_embeddings'}}
# What a config.json means that is silent
LLAMA_DEFAULTS = {'num_key_value_heads': None, 'head_dim': None, 'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0,
                  'attention_bias': False, 'mlp_bias': False, 'tie_word_embeddings': False}
DEFAULTS = {
    'gpt2': {'n_inner': None, 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True,
             'activation_function': 'gelu_new'},
    'llama': LLAMA_DEFAULTS,
    'mistral': {**LLAMA_DEFAULTS, 'num_key_value_heads': 8, 'sliding_window': 4096},
    'qwen2': {**LLAMA_DEFAULTS, 'num_key_value_heads': 32, 'attention_bias': True},
    'qwen3': {**LLAMA_DEFAULTS, 'num_key_value_heads': 32, 'head_dim': 128},
}
GELUS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'erf'}   # {activation_function: gelu}
# Fields that change the result, with the values that we can compute, the usual one first
LLAMA_SUPPORTED = {'hidden_act': ('silu',), 'rope_type': ('default', 'linear', 'dynamic', 'llama3'),
                   'use_sliding_window': (False,), 'quantization_config': (None,)}
SUPPORTED = {
    **dict.fromkeys(CLASSES, LLAMA_SUPPORTED),
    'qwen3': {**LLAMA_SUPPORTED, 'attention_bias': (False,)},
    'gpt2': {'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
             'add_cross_attention': (False,), 'activation_function': (*GELUS,), 'quantization_config': (None,)},
}
# {rope_type: the fields that are the numbers of GPTConfig.rope_scaling}
CONTEXT = 'original_max_position_embeddings'
ROPE = {'linear': ('factor',), 'dynamic': ('factor', CONTEXT),
        'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', CONTEXT)}


# ---------------------------------------------------------------------------------------------------------------------
# configuration

def config_from_hf(hf_config: dict, source) -> dict:
    """The fields of GPTConfig, {name: value}, for the config.json of a source, a folder or repository. UserError names
    what it asks for and we cannot compute."""
    try:
        architecture = hf_config.get('model_type')
        if architecture not in CLASSES:
            raise UserError(f'{source} is a model of type {architecture!r}: expected one of '
                            f'{", ".join(map(repr, CLASSES))}')
        values = {**DEFAULTS[architecture], **hf_config, 'rope_type': 'default'}
        for rope in (hf_config.get('rope_parameters') or {}, hf_config.get('rope_scaling') or {}):
            older = {'rope_type': rope['type']} if 'type' in rope else {}   # its name before transformers 4.43
            values |= {**older, **rope}
        refused = [f'{name}={values[name]!r}' for name, allowed in SUPPORTED[architecture].items()
                   if values.get(name, allowed[0]) not in allowed]
        if refused:
            raise UserError(f'{source}: our {architecture} cannot compute {", ".join(refused)}')
        config = {**ARCHS.get(architecture, ARCHS['llama']),
                  **{name: values[field] for name, field in FIELDS[architecture].items()}}
        if architecture == 'gpt2':
            config |= {'bias': True, 'gelu': GELUS[values['activation_function']]}
        else:
            config['bias'] = values['attention_bias'] or values['mlp_bias']
        if values['rope_type'] in ROPE:
            if values['rope_type'] == 'dynamic':
                values.setdefault(CONTEXT, config['block_size'])
            numbers = tuple(float(values[name]) for name in ROPE[values['rope_type']])
            config['rope_scaling'] = (values['rope_type'], *numbers)
        with torch.device('meta'), SkipInit():
            c = GPT(GPTConfig(**config)).config
    except KeyError as error:
        raise UserError(f'{source}/config.json does not say its {error.args[0]}') from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f'{source}/config.json says what cannot be: {error}') from None
    # What an open field means is left open: nanoGPT, which has not these fields, reads a finetuned GPT-2 too
    usual = {'norm_eps': 1e-5 if architecture == 'gpt2' else 1e-6, 'n_kv_head': c.n_head,
             'head_dim': c.n_embd / c.n_head, 'n_inner': 4 * c.n_embd if architecture == 'gpt2' else None}
    return {name: None if value == usual.get(name) else value for name, value in config.items()}


def hf_architecture(config: GPTConfig) -> str:
    """The architecture whose class computes what a GPTConfig says. UserError names the fields that no class has."""
    unsupported = {}
    for architecture in CLASSES:
        wanted = {**ARCHS.get(architecture, ARCHS['llama']), 'tie_weights': config.tie_weights, 'layer_scale': None}
        if architecture == 'gpt2':
            wanted |= {'n_kv_head': config.n_head if config.n_kv_head else None, 'head_dim': None}
        if architecture in ('mistral', 'qwen3'):
            wanted['bias'] = False
        if architecture != 'mistral':
            wanted['window'] = None
        unsupported[architecture] = [f'{name}={getattr(config, name)!r}' for name, value in wanted.items()
                                     if getattr(config, name) != value]
        if not unsupported[architecture]:
            return architecture
    nearest = min(reversed(unsupported.values()), key=len)
    raise UserError(f'no class of Hugging Face has {", ".join(nearest)}: what can be exported is what '
                    f'--arch={", --arch=".join(CLASSES)} make, without these')


def config_to_hf(config: GPTConfig, architecture: str, dtype: torch.dtype, roles: dict) -> dict:
    """The config.json of a model. roles: {'eos_token_id': id, ...}, the ids of its special tokens."""
    values = {**vars(config), 'n_kv_head': config.n_kv_head or config.n_head, 'head_dim': config.head_width,
              'n_inner': config.n_inner if architecture == 'gpt2' else config.inner_width,
              'norm_eps': config.norm_eps or (1e-5 if architecture == 'gpt2' else 1e-6)}
    hf_config = {'architectures': [CLASSES[architecture]], 'model_type': architecture,
                 'dtype': str(dtype).removeprefix('torch.'), **roles,
                 **{field: values[name] for name, field in FIELDS[architecture].items()}}
    if architecture == 'gpt2':
        activation = next(name for name, gelu in GELUS.items() if gelu == config.gelu)
        return {**hf_config, 'n_ctx': config.block_size, 'activation_function': activation,   # n_ctx: for llama.cpp
                **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), config.dropout)}
    hf_config |= {'hidden_act': 'silu', 'attention_dropout': config.dropout}
    if architecture == 'llama':
        hf_config['mlp_bias'] = config.bias
    if config.rope_scaling:
        method, *numbers = config.rope_scaling
        rope = {name: int(number) if name == CONTEXT else number for name, number in zip(ROPE[method], numbers)}
        hf_config['rope_scaling'] = {'rope_type': method, **rope}
    return hf_config


# ---------------------------------------------------------------------------------------------------------------------
# weights

def hf_parts(name: str, tensor: torch.Tensor, config: GPTConfig, architecture: str) -> list[tuple[str, torch.Tensor]]:
    """[(name in an architecture, its rows of a tensor)] for a parameter of ours, or what has as many rows as it:
    several if it is made of several of theirs."""
    module, leaf = name.rsplit('.', 1)
    layer = re.search(r'\.h\.(\d+)\.', name)
    number = layer[1] if layer else ''
    names = [f'{other.replace("#", number)}.{leaf}'
             for other in MODULES[architecture][re.sub(r'\.h\.\d+\.', '.h.#.', module)]]
    if len(names) == 1:
        return [(names[0], tensor)]
    D, K = config.head_width, config.n_kv_head or config.n_head
    rows = [config.n_head * D, K * D, K * D] if '.c_attn.' in name else [config.inner_width] * 2
    return list(zip(names, tensor.split(rows)))


def weights_from_hf(hf_tensors: dict, config: GPTConfig, architecture: str, source) -> dict:
    """Our parameters, {name: tensor}, from those of an architecture, of a source, a folder or repository. Biases that
    no layer has are zeros. UserError if a parameter is missing, left over or of another shape."""
    prefix = 'transformer.' if architecture == 'gpt2' else 'model.'
    hf_tensors = {name if name.startswith((prefix, 'lm_head.')) else prefix + name: tensor
                  for name, tensor in hf_tensors.items() if not re.search(BUFFERS, name)}
    head = hf_tensors.pop('lm_head.weight', None) if config.tie_weights else None
    with torch.device('meta'), SkipInit():
        parameters = list(GPT(config).named_parameters())
    tensors, kinds = {}, {re.sub(r'\d+', '#', name) for name in hf_tensors}
    for name, p in parameters:
        parts = hf_parts(name, p, config, architecture)
        missing = [other for other, _ in parts if other not in hf_tensors]
        if name.endswith('.bias') and len(missing) == len(parts) and re.sub(r'\d+', '#', missing[0]) not in kinds:
            tensors[name] = torch.zeros(p.shape)
            continue
        if missing:
            raise UserError(f'{source} has no weights {missing[0]}: it is not complete')
        found = []
        for other, rows in parts:
            tensor = hf_tensors.pop(other)
            if architecture == 'gpt2' and name.endswith(TRANSPOSED):
                tensor = tensor.T
            if tensor.shape != rows.shape:
                raise UserError(f'{source}: {other} has shape {tuple(tensor.shape)}, and its config.json means '
                                f'{tuple(rows.shape)}')
            found.append(tensor)
        tensors[name] = torch.cat(found)   # a copy: safetensors maps its files, which somebody may change later
    if config.tie_weights:
        tensors['lm_head.weight'] = tensors['transformer.wte.weight']
    if head is not None and not torch.equal(head, tensors['lm_head.weight']):
        raise UserError(f'{source}: config.json says tie_word_embeddings, and lm_head.weight is another matrix')
    if hf_tensors:
        raise UserError(f'{source} has weights that a {architecture} has not: {", ".join(sorted(hf_tensors)[:3])}')
    return tensors


def hf_parameters(model: GPT, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in an architecture, tensor) for all parameters of a model, each output by input, none copied. GPT-2's class
    always has biases: zeros for a model without."""
    for name, p in model.named_parameters():
        yield from hf_parts(name, p.detach(), model.config, architecture)
        if architecture == 'gpt2' and not model.config.bias and not name.endswith(WITHOUT_BIAS):
            yield name.replace('.weight', '.bias'), p.new_zeros(p.size(0))


def weights_to_hf(model: GPT, architecture: str) -> dict:
    """The parameters of a model, {name: tensor}, as an architecture stores them."""
    return {name: (p.T if architecture == 'gpt2' and name.endswith(TRANSPOSED) else p).contiguous()
            for name, p in hf_parameters(model, architecture)}
