"""
Low-rank adapters on a built model (Hu et al., 2021): put on from outside, kept apart from it, merged into it.
"""

import math
import re
import shutil
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from flatgpt.architectures import hf_architecture, hf_parts
from flatgpt.errors import UserError
from flatgpt.pretrained import read_json, read_tensors, write_json
from model import GPTConfig, dropout


class LoRALinear(nn.Linear):
    """A Linear with an adapter: y = W x + b + (alpha / rank) B A x. W and b are those of the Linear, and not trained.
    B begins at zero, so that the adapter changes nothing at first."""

    def __init__(self, linear, rank, alpha, dropout):
        nn.Module.__init__(self)   # no weights of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))   # as nn.Linear begins
        self.train(linear.training)

    def forward(self, x):
        low = F.linear(dropout(x, self.dropout, self.training), self.lora_A)   # (..., rank)
        return F.linear(x, self.weight, self.bias) + F.linear(low * self.scale, self.lora_B)

    @torch.no_grad()
    def merged(self):
        """Return a plain Linear that computes what this one does."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device='meta')
        linear.weight = nn.Parameter(self.weight + self.scale * self.lora_B @ self.lora_A)
        linear.bias = self.bias
        return linear


def put(model: nn.Module, rank: int, alpha: float, dropout: float, targets: str):
    """Put an adapter on every Linear of a model whose name the regex targets finds, and freeze all other parameters.
    UserError if it finds none, or a head that shares its matrix with the embedding."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name in linears if finds(targets, name, 'lora_targets')]
    if not chosen or not targets:
        raise UserError(f'lora_targets={targets!r}: expected a regex that finds some of '
                        f'{", ".join(list(linears)[:4])}, ..., lm_head')
    if 'lm_head' in chosen and model.config.tie_weights:
        raise UserError(f'lora_targets={targets!r} finds lm_head, whose matrix is also the embedding (tie_weights) and '
                        f'cannot change alone: leave it out')
    model.requires_grad_(False)
    for name in chosen:
        parent, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(parent), leaf, LoRALinear(linears[name], rank, alpha, dropout))


def finds(regex: str, name: str, option: str) -> bool:
    """Return whether a regex finds something in a name. UserError, with the option that has it, if it is invalid."""
    try:
        return re.search(regex, name) is not None
    except re.error as error:
        raise UserError(f'{option}={regex!r} is no regular expression: {error}') from None


def adapters(model: nn.Module) -> dict:
    """Return the parameters of all adapters on a model, {name: parameter}."""
    return {name: p for name, p in model.named_parameters() if name.endswith(('lora_A', 'lora_B'))}


def merge(model: nn.Module) -> nn.Module:
    """Add the adapters on a model to the matrices that they are on, and remove them. Returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, leaf = name.rpartition('.')
            setattr(model.get_submodule(parent), leaf, module.merged())
    return model


# ---------------------------------------------------------------------------------------------------------------------
# folders of PEFT: adapter_config.json and adapter_model.safetensors

def save_peft(folder: Path, model: nn.Module, architecture: str, description: dict, base: str):
    """Write the adapter on a model as a folder of PEFT.

    architecture: the model_type of Hugging Face for the model. description: the arguments of put() for this adapter.
    base: name or path of the model that the adapter is for.
    """
    from safetensors.torch import save_file

    tensors, targets = {}, []
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):   # if it is several of theirs, they share A
            for other, rows in hf_parts(f'{name}.weight', module.lora_B.detach(), model.config, architecture):
                other = other.removesuffix('.weight')
                targets.append(other)
                tensors[f'base_model.model.{other}.lora_A.weight'] = module.lora_A.detach().clone()
                tensors[f'base_model.model.{other}.lora_B.weight'] = rows.clone()
    folder.mkdir(parents=True)
    write_json(folder / 'adapter_config.json', {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'r': description['rank'],
        'lora_alpha': description['alpha'], 'lora_dropout': description['dropout'], 'target_modules': targets,
        'bias': 'none', 'fan_in_fan_out': architecture == 'gpt2', 'inference_mode': True})
    save_file(tensors, folder / 'adapter_model.safetensors', metadata={'format': 'pt'})
    shutil.copymode(folder / 'adapter_config.json', folder / 'adapter_model.safetensors')


def same_peft(folder: Path, model: nn.Module) -> bool:
    """Whether merging a folder of PEFT into the base of a model gives what its own adapter gives; merges that, too."""
    weights = {name: p.detach() for name, p in model.named_parameters() if not name.endswith(('lora_A', 'lora_B'))}
    merge_peft(folder, weights, model.config)
    return all(torch.allclose(weights[name], p, atol=1e-6) for name, p in merge(model).named_parameters())


def merge_peft(folder: Path, weights: dict, config: GPTConfig):
    """Add the adapter in a folder of PEFT to weights of ours, {name: tensor}. UserError names what it has that this
    cannot merge."""
    architecture = hf_architecture(config)
    settings = read_json(folder / 'adapter_config.json')
    plain = {'peft_type': 'LORA', 'bias': 'none', 'use_dora': False, 'modules_to_save': [], 'alpha_pattern': {},
             'layer_replication': [], 'trainable_token_indices': []}
    refused = [f'{name}={settings[name]!r}' for name, value in plain.items() if settings.get(name) not in (value, None)]
    if refused:
        raise UserError(f'{folder}: adapters with {", ".join(refused)} are not read')
    files = [folder / f'adapter_model.{ending}' for ending in ('safetensors', 'bin')]
    found = read_tensors(files[1] if files[1].exists() else files[0])
    tensors = {re.sub(r'^base_model\.model\.|(?<=lora_[AB])\.default', '', name): p.float()
               for name, p in found.items()}
    for name in weights:
        modules = [other.removesuffix('.weight') for other, _ in hf_parts(name, weights[name], config, architecture)]
        if not any(f'{module}.lora_A.weight' in tensors for module in modules):
            continue
        weights[name] = weights[name].float().clone()
        for module, (_, rows) in zip(modules, hf_parts(name, weights[name], config, architecture)):
            A = tensors.pop(f'{module}.lora_A.weight', None)
            if A is not None:
                B = tensors.pop(f'{module}.lora_B.weight')
                rows += settings['lora_alpha'] / (math.sqrt(len(A)) if settings.get('use_rslora') else len(A)) * B @ A
    if tensors:
        raise UserError(f'{folder} has an adapter for {min(tensors)}, which its base has not')
