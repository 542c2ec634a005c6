"""Preferences: log-probabilities, losses and rewards against written-out references and trl."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from flatgpt import alignment, lora
from model import ARCHS, GPT, GPTConfig

SMALL = {'vocab_size': 40, 'block_size': 16, 'n_layer': 2, 'n_embd': 24, 'n_head': 4}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **changes}))


def batch(rows=6, length=12, seed=0):
    """Token ids of rows, chosen answers above rejected ones, and targets of which only answers count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(rows):
        targets[row, :3 + row % 3] = -1
        targets[row, length - row % 4:] = -1
    return tokens[:, :-1], targets


def written_out(model, idx, targets):
    """The log-probabilities by the definition, from all logits."""
    logits = model.compute_logits(model.hidden_states(idx))
    found = logits.log_softmax(dim=-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets >= 0, found, 0)


# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities

@pytest.mark.parametrize('max_logits', [10**6, 400, 1])
@pytest.mark.parametrize('arch', ['gpt2', 'llama', 'speedrun'])
def test_log_probabilities_and_gradients_are_those_of_all_logits_whatever_the_pieces(arch, max_logits, monkeypatch):
    monkeypatch.setattr(alignment, 'MAX_LOGITS', max_logits)
    model = make(**ARCHS[arch])
    idx, targets = batch()
    gradients = []
    for log_probs_of in (written_out, lambda model, *rows: alignment.LogProbs(model)(*rows)):
        found = log_probs_of(model, idx, targets)
        (found * torch.linspace(0.1, 1, found.numel()).view(found.shape)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(found, written_out(model, idx, targets), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and (found[targets < 0] == 0).all()


def test_the_mean_log_probability_is_the_negative_loss():
    model = make()
    idx, targets = batch()
    found = alignment.LogProbs(model)(idx, targets)
    torch.testing.assert_close(-found.sum() / (targets >= 0).sum(), model(idx, targets)[1])


def test_a_row_does_not_depend_on_the_padding_after_it():
    model = make()
    idx, targets = batch(rows=1)
    padded = F.pad(idx, (0, 4)), F.pad(targets, (0, 4), value=-1)
    torch.testing.assert_close(alignment.LogProbs(model)(*padded)[:, :12],
                               alignment.LogProbs(model)(idx, targets))


def test_a_batch_without_a_target_is_zero():
    idx, targets = batch()
    assert (alignment.LogProbs(make())(idx, torch.full_like(targets, -1)) == 0).all()


def test_in_bfloat16_log_probabilities_are_still_float32():
    with torch.autocast('cpu', torch.bfloat16):
        found = alignment.LogProbs(make())(*batch())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, alignment.LogProbs(make())(*batch()), rtol=0.02, atol=0.02)


def test_with_adapters_off_the_model_is_its_base_and_afterwards_it_is_as_before():
    base, model = make(), make()
    lora.put(model, 4, 8.0, 0.0, 'attn|mlp')
    with torch.no_grad():
        for p in lora.adapters(model).values():
            p.normal_()
    adapted = alignment.LogProbs(model)(*batch())
    with alignment.adapters_off(model):
        assert torch.equal(alignment.LogProbs(model)(*batch()), alignment.LogProbs(base)(*batch()))
    assert torch.equal(alignment.LogProbs(model)(*batch()), adapted)
    assert not torch.allclose(alignment.LogProbs(base)(*batch()), adapted)


# ---------------------------------------------------------------------------------------------------------------------
# pairs

def ours(loss, model, reference, beta=0.3, **more):
    """The mean loss, the rewards and the gradients of our functions."""
    idx, targets = batch()
    sums = alignment.LogProbs(model)(idx, targets).sum(dim=1).view(2, -1)
    with torch.no_grad():
        reference_sums = alignment.LogProbs(reference)(idx, targets).sum(dim=1).view(2, -1)
    lengths = (targets >= 0).sum(dim=1).view(2, -1)
    losses, (chosen, rejected) = alignment.preference_loss(loss, sums, reference_sums, lengths, beta, **more)
    losses.mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return losses.mean().detach(), chosen, rejected, gradients


@pytest.fixture(scope='module')
def trl():
    os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
    return pytest.importorskip('trl')


def of_dpo_trainer(trl, kind, model, reference, beta):
    """The same of trl's DPOTrainer, whose method gets the log-probabilities of our models by the definition."""
    idx, targets = batch()
    tokens = torch.cat((idx, torch.zeros(len(idx), 1, dtype=torch.int64)), dim=1)
    mask = F.pad((targets >= 0).long(), (1, 0))
    metrics = {mode: {name: [] for name in (
        'entropy', 'logits/chosen', 'logits/rejected', 'mean_token_accuracy', 'rewards/chosen', 'rewards/rejected',
        'rewards/accuracies', 'rewards/margins', 'logps/chosen', 'logps/rejected')} for mode in ('train', 'eval')}
    alike = lambda x: x
    accelerator = SimpleNamespace(device='cpu', gather=alike, gather_for_metrics=alike)
    with torch.no_grad():
        reference_sums = written_out(reference, idx, targets).sum(dim=1).chunk(2)

    def call(**arguments):
        zeros = torch.zeros(targets.shape)
        return SimpleNamespace(log_probs=written_out(model, idx, targets), entropy=zeros, mean_logits=zeros,
                               is_top1=zeros.bool(), log_sum_sq_probs=zeros)

    trainer = SimpleNamespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type='reverse_kl', loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=0.0,
        use_weighting=False, _metrics=metrics, _total_train_tokens=0, _tp_size=1)
    inputs = {'input_ids': tokens, 'attention_mask': torch.ones_like(tokens), 'completion_mask': mask,
              'ref_chosen_logps': reference_sums[0], 'ref_rejected_logps': reference_sums[1]}
    loss = trl.DPOTrainer._compute_loss(trainer, call, inputs, False)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), metrics['train'], gradients


@pytest.mark.full   # its import takes seconds
@pytest.mark.parametrize('kind, name', [('dpo', 'sigmoid'), ('ipo', 'ipo')])
def test_loss_rewards_and_gradients_are_those_of_trl(trl, kind, name):
    model, reference = make(0), make(1)
    loss, chosen, rejected, gradients = ours(kind, model, reference)
    expected, metrics, expected_gradients = of_dpo_trainer(trl, name, model, reference, 0.3)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    assert chosen.mean().item() == pytest.approx(metrics['rewards/chosen'][0], abs=1e-5)
    assert rejected.mean().item() == pytest.approx(metrics['rewards/rejected'][0], abs=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize('label_smoothing', [0.0, 0.2])
@pytest.mark.parametrize('kind, name', [('dpo', 'sigmoid'), ('simpo', 'simpo')])
def test_label_smoothing_and_simpo_are_those_of_trls_cpo(trl, kind, name, label_smoothing):
    from trl.experimental.cpo import CPOTrainer

    model, reference = make(0), make(1)
    more = {'gamma': 0.7} if kind == 'simpo' else {}
    loss, chosen, rejected, gradients = ours(kind, model, reference, label_smoothing=label_smoothing, **more)
    idx, targets = batch()
    scores = written_out(model, idx, targets).sum(dim=1)
    if kind == 'dpo':   # there is no reference: log-ratios instead of log-probabilities
        scores = scores - written_out(reference, idx, targets).sum(dim=1).detach()
    else:
        scores = scores / (targets >= 0).sum(dim=1)
    trainer = SimpleNamespace(alpha=0.0, loss_type=name, simpo_gamma=0.7, beta=0.3, label_smoothing=label_smoothing,
                              accelerator=SimpleNamespace(device='cpu'))
    losses, expected_chosen, expected_rejected = CPOTrainer.cpo_loss(trainer, *scores.chunk(2))
    losses.mean().backward()
    torch.testing.assert_close(loss, losses.mean().detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(chosen, expected_chosen, rtol=0, atol=1e-5)
    torch.testing.assert_close(rejected, expected_rejected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=0, atol=1e-5)


def by_hand(kind, chosen, rejected, lengths, beta, gamma, smoothing):
    """The loss of one pair by the formulas of the papers; chosen and rejected: (log p, log p of the reference)."""
    log_sigmoid = lambda z: -math.log1p(math.exp(-z))
    better, worse = chosen[0] - chosen[1], rejected[0] - rejected[1]
    if kind == 'ipo':
        return (better / lengths[0] - worse / lengths[1] - 1 / (2 * beta)) ** 2, beta * better, beta * worse
    if kind == 'simpo':
        better, worse = chosen[0] / lengths[0], rejected[0] / lengths[1]
    margin = beta * (better - worse) - (gamma if kind == 'simpo' else 0)
    loss = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    return loss, beta * better, beta * worse


@pytest.mark.parametrize('kind', alignment.LOSSES)
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_losses_and_rewards_are_those_of_the_papers(kind, smoothing):
    chosen, rejected, lengths = (-12.0, -14.5), (-20.0, -17.0), (5, 8)
    sums, reference, lengths_of = (torch.tensor(numbers)[:, None] for numbers in (*zip(chosen, rejected), lengths))
    loss, rewards = alignment.preference_loss(kind, sums, reference, lengths_of, 0.4, 0.5, smoothing)
    expected = by_hand(kind, chosen, rejected, lengths, 0.4, 0.5, smoothing)
    assert [*loss.tolist(), *rewards.flatten().tolist()] == pytest.approx(expected, abs=1e-5)


def test_where_nothing_has_changed_the_loss_of_dpo_is_log_2_and_the_margin_0():
    loss, chosen, rejected, gradients = ours('dpo', make(0), make(0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert (chosen == 0).all() and (rejected == 0).all()
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    loss, *_ = ours('ipo', make(0), make(0), beta=0.5)
    assert loss.item() == pytest.approx(1, abs=1e-6)   # (1 / 2 beta)²


def test_rewards_carry_no_gradient():
    sums = torch.tensor([[-3.0], [-4.0]], requires_grad=True)
    for kind in alignment.LOSSES:
        loss, rewards = alignment.preference_loss(kind, sums, sums + 1, torch.tensor([[2], [3]]), beta=0.1)
        assert loss.requires_grad and not rewards.requires_grad
