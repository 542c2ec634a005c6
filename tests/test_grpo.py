"""grpo.py: its losses against trl and by hand, its runs by what they promise."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from test_alignment import batch, make, written_out
from test_checkpoint import state_of

from flatgpt import alignment, checkpoint, rollouts
from flatgpt.errors import UserError
from flatgpt.tokenizer import CharTokenizer
from model import ARCHS, GPT, GPTConfig

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
    for normalize, divisors in (('answer', (4, 8, 20)), ('token', (11, 11, 11)), ('constant', (40, 40, 40))):
        found = alignment.token_weights(lengths, normalize, answers=4, tokens=11, longest=10)   # one is elsewhere
        assert found.tolist() == pytest.approx([1 / divisor for divisor in divisors])


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
    lengths = mask.sum(dim=1)
    weights = mask * alignment.token_weights(lengths, normalize, len(lengths), lengths.sum().item(), 20)[:, None]
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


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn

LETTERS = 'abcdefgh'


@pytest.fixture(scope='module')
def letters(tmp_path_factory):
    """A folder with a small model of letters, a reward for answers that have many a, and questions."""
    folder = tmp_path_factory.mktemp('letters')
    tok = CharTokenizer(LETTERS)
    torch.manual_seed(3)
    model = GPT(GPTConfig(len(LETTERS), 24, n_layer=1, n_embd=16, n_head=2, **ARCHS['llama']))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    checkpoint.save(folder / 'ckpt.pt', state_of(model, tokenizer=tok.to_dict()))
    asked = [{'text': LETTERS[i % 8] + LETTERS[i // 8:][:1 + i % 3]} for i in range(40)]
    (folder / 'asked.jsonl').write_text(''.join(json.dumps(question) + '\n' for question in asked))
    (folder / 'rewards.py').write_text("def many(question, answer):\n    return answer.count('a') / len(answer)\n")
    return folder


def drawn(folder, step=0, first=0, n=6, seed=1, temperature=1.0):
    """A Rollout of a model of letters, which has an end token, and the model."""
    model, tok, _ = checkpoint.load_model(folder)
    tok.ends = (7,)
    asked = rollouts.Questions('x.py:f', str(folder / 'asked.jsonl'), '', 4, tok, 9).of_step(seed, step, 6)
    return rollouts.draw(model, tok, asked[first:first + n], lambda question, answer: float(len(answer)), 4, 9,
                         temperature, seed, step, first * 4), model


@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_log_probabilities_of_the_engine_are_those_of_the_model_that_learns(letters, temperature):
    rollout, model = drawn(letters, temperature=temperature)
    found = alignment.token_log_probs(model, rollout.idx, rollout.targets)
    torch.testing.assert_close(found.sum(dim=1), rollout.drawn_with, rtol=1e-5, atol=1e-5)
    assert len(set(rollout.lengths.tolist())) > 3   # rows of many lengths


def test_targets_are_the_answers_with_their_end_and_nothing_else(letters):
    rollout, _ = drawn(letters)
    for row in range(24):
        counted = (rollout.targets[row] >= 0).nonzero()[:, 0].tolist()
        first, end = counted[0], counted[-1]
        assert counted == list(range(first, end + 1)) and len(counted) == rollout.lengths[row]
        answer = rollout.targets[row, first:end + 1].tolist()
        assert 7 not in answer[:-1] and (answer[-1] == 7 or len(answer) == 9)
        assert rollout.answers[row] == ''.join(LETTERS[i] for i in answer if i != 7)
        assert torch.equal(rollout.idx[row, first + 1:end + 1], rollout.targets[row, first:end])



def test_answers_are_a_function_of_seed_and_step_and_not_of_who_draws_them(letters):
    whole = drawn(letters)[0].answers
    assert whole == drawn(letters)[0].answers
    assert whole == drawn(letters, n=3)[0].answers + drawn(letters, first=3, n=3)[0].answers
    assert whole != drawn(letters, step=1)[0].answers and whole != drawn(letters, seed=2)[0].answers
    assert len(set(whole)) > 20   # the answers to a question differ


def test_figures_of_a_step_by_hand(letters):
    rollout, _ = drawn(letters)
    rollout.rewards = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]] * 2)
    reward, length, entropy, no_signal, tokens = rollout.totals().tolist()
    assert (reward, no_signal, length, tokens) == (10, 16, rollout.lengths.sum(), rollout.lengths.sum())
    assert entropy == pytest.approx(sum(-(rollout.drawn_with / rollout.lengths)).item(), rel=1e-5)


def test_rows_that_move_nothing_are_dropped_but_one_and_the_gradient_stays(letters):
    gradients = []
    for drops in (False, True):
        rollout, model = drawn(letters)
        rollout.advantages = torch.tensor([1.0, 0, 0, -1] + [0.0] * 20)
        rollout.weights = (rollout.targets >= 0) / 100
        if drops:
            rollout.drop(rollout.advantages == 0)
            assert len(rollout.idx) == len(rollout.targets) == len(rollout.lengths) == 2
        log_probs = alignment.token_log_probs(model, rollout.idx, rollout.targets)
        loss, _ = alignment.policy_loss(log_probs, log_probs.detach(), rollout.advantages, rollout.weights, 0.2, 0.2)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    rollout.drop(torch.ones(2, dtype=torch.bool))
    assert len(rollout.idx) == 1


def test_the_questions_of_a_file_come_in_another_order_in_each_pass_and_some_are_held_out(letters):
    tok = CharTokenizer(LETTERS)
    source = rollouts.Questions('x.py:f', str(letters / 'asked.jsonl'), '', 3, tok, 9)
    assert len(source.val) == 3 and len(source.train) == 37 and not any(q in source.train for q in source.val)
    passes = [source.of_step(5, step, 37) for step in (0, 1)]
    for found in passes:
        assert sorted(q['text'] for q in found) == sorted(q['text'] for q in source.train)
    assert passes[0] != passes[1] != source.train
    assert source.of_step(5, 1, 10) == passes[0][10:20] and source.of_step(5, 5, 7)[2:] == passes[1][:5]
    assert source.of_step(6, 0, 37) != passes[0]


def test_questions_that_are_too_long_are_left_out_and_counted(letters):
    tok = CharTokenizer(LETTERS)
    source = rollouts.Questions('x.py:f', str(letters / 'asked.jsonl'), str(letters / 'asked.jsonl'), 40, tok, 3)
    assert 0 < len(source.train) == len(source.val) < 40 and all(len(q['text']) <= 3 for q in source.train)
    assert len(source.notes) == 2
    assert f'{40 - len(source.val)} of 40 questions are longer than 3 tokens' in source.notes[0]
    with pytest.raises(UserError, match='of at most 0 tokens'):
        rollouts.Questions('x.py:f', str(letters / 'asked.jsonl'), '', 3, tok, 0)
