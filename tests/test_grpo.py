"""grpo.py: its losses against trl and by hand, its runs by what they promise."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from test_alignment import batch, make, written_out

from flatgpt import alignment

# ---------------------------------------------------------------------------------------------------------------------
# advantages and losses

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]])


def test_advantages_by_hand():
    found = alignment.group_advantages(REWARDS, divide_by_std=False)
    assert found.tolist() == [[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [3.0, -1.0, -1.0, -1.0]]
    found = alignment.group_advantages(REWARDS, divide_by_std=True)
    std = math.sqrt(1 / 3)   # of the first group, with 3 degrees of freedom; the last one has 2
    expected = [[x / (std + 1e-4) for x in (0.5, -0.5, -0.5, 0.5)], [0.0] * 4, [x / 2.0001 for x in (3, -1, -1, -1)]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_weights_by_hand():
    lengths = torch.tensor([1, 2, 5])
    assert alignment.token_weights(lengths, 'answer', 10).tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 15])
    assert alignment.token_weights(lengths, 'token', 10).tolist() == pytest.approx([1 / 8] * 3)
    assert alignment.token_weights(lengths, 'constant', 10).tolist() == pytest.approx([1 / 30] * 3)


def problem(clip=0.2, high=0.3):
    """A model, its rows with log-probabilities of an earlier policy and of a reference, and advantages."""
    model = make(0)
    idx, targets = batch()
    with torch.no_grad():
        old = written_out(model, idx, targets) + 0.3 * torch.randn(targets.shape, generator=generator(1))
        reference = written_out(make(1), idx, targets)
    advantages = torch.randn(len(idx), generator=generator(2))
    return model, idx, targets, torch.where(targets >= 0, old, 0), reference, advantages


def generator(seed):
    return torch.Generator().manual_seed(seed)


def ours(model, idx, targets, old, reference, advantages, normalize='token', low=0.2, high=0.3, kl=0.0):
    """(loss, gradients, share of tokens clipped, mean KL) as grpo.py computes them."""
    mask = targets >= 0
    log_probs = alignment.token_log_probs(model, idx, targets)
    weights = mask * alignment.token_weights(mask.sum(dim=1), normalize, 20)[:, None]
    loss, clipped = alignment.policy_loss(log_probs, old, advantages, weights, low, high)
    estimate = alignment.kl_estimate(log_probs, reference) * mask
    loss = loss + kl * (weights * estimate).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), gradients, clipped.sum().item() / mask.sum().item(), estimate.sum().item() / mask.sum().item()


@pytest.fixture(scope='module')
def trl():
    os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
    return pytest.importorskip('trl')


def of_grpo_trainer(trl, model, idx, targets, old, reference, advantages, loss_type, low, high, kl):
    """The same of trl's GRPOTrainer, whose method gets the log-probabilities of our models by the definition."""
    mask = (targets >= 0).long()
    metrics = {name: [] for name in ('kl', 'entropy', 'clip_ratio/low_mean', 'clip_ratio/high_mean',
                                     'clip_ratio/region_mean', 'clip_ratio/low_min', 'clip_ratio/high_max')}
    alike = lambda x, **more: x

    def log_probs_and_entropies(*arguments, **more):
        return written_out(model, idx, targets), torch.zeros(targets.shape), None

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), _get_per_token_logps_and_entropies=log_probs_and_entropies,
        aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level='token', beta=kl, loss_type=loss_type,
        epsilon_low=low, epsilon_high=high, use_vllm=False, _entropy_bonus_enabled=False, max_completion_length=20,
        current_gradient_accumulation_steps=1, _metrics={'train': metrics},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=alike, reduce=alike, gather_for_metrics=alike))
    inputs = {'prompt_ids': idx[:, :1], 'prompt_mask': mask[:, :1], 'completion_ids': idx, 'completion_mask': mask,
              'advantages': advantages, 'old_per_token_logps': old, 'ref_per_token_logps': reference,
              'num_items_in_batch': mask.sum()}
    loss = trl.GRPOTrainer._compute_loss(trainer, SimpleNamespace(training=True), inputs)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), gradients, metrics


@pytest.mark.full   # its import takes seconds
@pytest.mark.parametrize('high', [0.2, 0.3])
@pytest.mark.parametrize('kl', [0.0, 0.04])
@pytest.mark.parametrize('normalize, loss_type', [('answer', 'grpo'), ('token', 'dapo'), ('constant', 'dr_grpo')])
def test_loss_gradients_clipped_share_and_kl_are_those_of_trl(trl, normalize, loss_type, kl, high):
    found, gradients, clipped, estimate = ours(*problem(), normalize=normalize, high=high, kl=kl)
    loss, expected, metrics = of_grpo_trainer(trl, *problem(), loss_type, 0.2, high, kl)
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-5)
    assert clipped == pytest.approx(metrics['clip_ratio/region_mean'][0], abs=1e-6) and 0.02 < clipped < 0.98
    assert not kl or estimate == pytest.approx(metrics['kl'][0], abs=1e-5)


@pytest.mark.parametrize('kl', [0.0, 0.1])
@pytest.mark.parametrize('normalize', ['answer', 'token', 'constant'])
def test_the_loss_is_the_one_written_out(normalize, kl):
    model, idx, targets, old, reference, advantages = problem()
    found, gradients, *_ = ours(model, idx, targets, old, reference, advantages, normalize, kl=kl)
    log_probs = written_out(model, idx, targets)
    loss = 0
    lengths = (targets >= 0).sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        answer = 0
        for t in (targets[row] >= 0).nonzero()[:, 0]:
            ratio = torch.exp(log_probs[row, t] - old[row, t])
            a = advantages[row]
            answer = answer + torch.min(ratio * a, ratio.clamp(0.8, 1.3) * a)
            other = torch.exp(reference[row, t] - log_probs[row, t])   # p of the reference / p
            answer = answer - kl * (other - torch.log(other) - 1)
        divisor = {'answer': len(lengths) * length, 'token': sum(lengths), 'constant': len(lengths) * 20}[normalize]
        loss = loss - answer / divisor
    loss.backward()
    torch.testing.assert_close(found, loss.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=0, atol=1e-6)


def test_of_the_policy_that_has_drawn_the_gradient_is_the_policy_gradient_whatever_the_clip():
    model, idx, targets, _, _, advantages = problem()
    old = written_out(model, idx, targets).detach()
    for low, high in ((0.0, 0.0), (0.2, 0.3), (1.0, 100.0)):
        _, gradients, clipped, _ = ours(model, idx, targets, old, old, advantages, low=low, high=high, kl=0.5)
        (-(written_out(model, idx, targets) * advantages[:, None]).sum() / (targets >= 0).sum()).backward()
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=0, atol=1e-5)
        model.zero_grad()
        assert clipped < 1e-9 or low == 0


def test_log_probabilities_are_those_at_the_temperature_that_the_answers_are_drawn_with():
    model = make()
    idx, targets = batch()
    logits = model.compute_logits(model.hidden_states(idx)) / 0.7
    expected = logits.log_softmax(dim=-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(alignment.LogProbs(model, 0.7)(idx, targets), torch.where(targets >= 0, expected, 0))
