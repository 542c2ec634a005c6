"""Adapters: nothing changes at first, nothing else changes later, merged is the same, and PEFT agrees."""

import pytest
import torch
from torch import nn

from flatgpt import lora
from flatgpt.engine import generate
from flatgpt.errors import UserError
from model import ARCHS, GPT, GPTConfig

SMALL = {'vocab_size': 50, 'block_size': 16, 'n_layer': 3, 'n_embd': 24, 'n_head': 4}
KINDS = {'gpt2': {}, 'llama': ARCHS['llama'] | {'n_kv_head': 2}, 'speedrun': ARCHS['speedrun'] | {'zero_init': False}}
with_each_kind = pytest.mark.parametrize('changes', KINDS.values(), ids=list(KINDS))


def make(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **changes})).eval()


def tokens(seed=0):
    return torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(seed))


def adapted(rank=4, alpha=8.0, dropout=0.0, targets='attn|mlp', spread=0.1, **changes):
    """A model and the same with adapters that have learnt something."""
    base, model = make(**changes), make(**changes)
    lora.put(model, rank, alpha, dropout, targets)
    with torch.no_grad():
        for p in lora.adapters(model).values():
            p.add_(torch.randn_like(p), alpha=spread)
    return base, model


def logits(model):
    with torch.inference_mode():
        return model(tokens(), tokens())[0]


@with_each_kind
def test_at_first_the_model_is_exactly_what_it_was(changes):
    base, model = adapted(spread=0.0, **changes)
    assert torch.equal(logits(base), logits(model))
    assert all(p.abs().sum() > 0 for name, p in lora.adapters(model).items() if name.endswith('lora_A'))


@with_each_kind
def test_an_adapter_adds_b_a_times_alpha_over_rank(changes):
    base, model = adapted(rank=3, alpha=7.0, **changes)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != 'lm_head':
            p, x = dict(model.named_parameters()), torch.randn(5, module.in_features)
            expected = module(x) + (p[f'{name}.lora_B'] @ p[f'{name}.lora_A'] @ x.T).T * (7 / 3)
            torch.testing.assert_close(model.get_submodule(name)(x), expected)
    assert (logits(base) - logits(model)).abs().max() > 0.01


@with_each_kind
def test_merged_is_the_same_and_a_plain_model_again(changes):
    base, model = adapted(**changes)
    before = logits(model)
    assert lora.merge(model) is model
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, lora.LoRALinear) for module in model.modules())


def test_only_adapters_are_trained_and_only_they_change():
    _, model = adapted(rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(tokens(), tokens(1))[1].backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == lora.adapters(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(changed) == 2 * 4 * 3


def test_dropout_is_of_what_enters_the_adapter_and_of_training():
    base, model = adapted(dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    plain = model.transformer.h[0].mlp.c_fc
    plain.lora_B.data.zero_()
    x = torch.randn(4, 24)
    assert torch.equal(plain(x), base.transformer.h[0].mlp.c_fc(x))   # the weights see all of x


@pytest.mark.parametrize(('targets', 'count'), [('attn|mlp', 12), ('c_attn', 3), (r'h\.2\.', 4), ('mlp.c_proj$', 3)])
def test_the_regex_says_which_modules_get_one(targets, count):
    model = make()
    lora.put(model, 2, 4.0, 0.0, targets)
    assert len(lora.adapters(model)) == 2 * count


def test_an_untied_head_can_have_one_and_a_tied_one_cannot():
    model = make(tie_weights=False)
    lora.put(model, 2, 4.0, 0.0, 'lm_head')
    assert lora.adapters(model).keys() == {'lm_head.lora_A', 'lm_head.lora_B'}
    with pytest.raises(UserError, match='lm_head, whose matrix is also the embedding'):
        lora.put(make(), 2, 4.0, 0.0, 'attn|lm_head')


@pytest.mark.parametrize(('targets', 'words'), [('q_proj', 'finds some of transformer.h.0.attn.c_attn'),
                                                ('', 'finds some of'),
                                                ('(', 'no regular expression')])
def test_a_regex_that_finds_nothing_is_refused(targets, words):
    with pytest.raises(UserError, match=words):
        lora.put(make(), 2, 4.0, 0.0, targets)


def test_decoding_with_a_cache_is_the_same_with_adapters():
    _, model = adapted(**KINDS['llama'])
    ids = torch.tensor([[1, 2, 3]])
    fast = [int(token) for token, _ in generate(model, ids, 8, temperature=0)]
    slow = ids
    for _ in range(8):
        slow = torch.cat((slow, model(slow)[0][:, -1:].argmax(-1)), dim=1)
    assert fast == slow[0, 3:].tolist()
