"""grpo.py: its losses against trl and by hand, what it draws, its runs. What dpo.py does too is in test_aligned.py."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import test_alignment
import torch
from conftest import assert_one_line, log_of
from in_process import call
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
    targets = torch.tensor([[3, -1, -1], [-1, 1, 0], [2, 0, 4]])
    for normalize, divisors in (('answer', (4, 8, 12)), ('token', (9, 9, 9)), ('constant', (40, 40, 40))):
        found = alignment.token_weights(targets, normalize, answers=4, tokens=9, longest=10)   # one is elsewhere
        torch.testing.assert_close(found, (targets >= 0) / torch.tensor(divisors)[:, None])


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
    log_probs = alignment.LogProbs(model)(idx, targets)
    weights = alignment.token_weights(targets, normalize, len(targets), mask.sum().item(), 20)
    loss, clipped = alignment.policy_loss(log_probs, old, advantages, weights, low, high)
    estimate = alignment.kl_estimate(log_probs, reference) * mask
    loss = loss + kl * (weights * estimate).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), gradients, clipped.sum().item() / mask.sum().item(), estimate.sum().item() / mask.sum().item()


trl = test_alignment.trl   # a fixture


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
    rollout = rollouts.draw(model, tok, asked[first:first + n], lambda question, answer: float(len(answer)), 4, 9,
                            temperature, seed, step, first * 4)
    rollout.advantages = torch.ones(4 * n)
    rollout.pad(rollout.advantages > 0, torch.device('cpu'))
    return rollout, model


def lengths_of(rollout):
    return (rollout.targets >= 0).sum(dim=1)


def rows_of(rollout):
    return [(ids.tolist(), start) for ids, start in rollout.rows]


@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_log_probabilities_of_the_engine_are_those_of_the_model_that_learns(letters, temperature):
    rollout, model = drawn(letters, temperature=temperature)
    found = alignment.LogProbs(model)(rollout.idx, rollout.targets)
    torch.testing.assert_close(found.sum(dim=1), rollout.drawn_with, rtol=1e-5, atol=1e-5)
    assert len(set(lengths_of(rollout).tolist())) > 3   # rows of many lengths


def test_targets_are_the_answers_with_their_end_and_nothing_else(letters):
    rollout, _ = drawn(letters)
    for row in range(24):
        counted = (rollout.targets[row] >= 0).nonzero()[:, 0].tolist()
        first, end = counted[0], counted[-1]
        assert counted == list(range(first, end + 1))
        answer = rollout.targets[row, first:end + 1].tolist()
        assert 7 not in answer[:-1] and (answer[-1] == 7 or len(answer) == 9)
        assert rollout.rewards.flatten()[row] == len([i for i in answer if i != 7])   # of the text without the end
        assert rollout.rows[row][0].tolist() == [*rollout.idx[row, :end + 1].tolist(), answer[-1]]
        assert torch.equal(rollout.idx[row, first + 1:end + 1], rollout.targets[row, first:end])



def test_answers_are_a_function_of_seed_and_step_and_not_of_who_draws_them(letters):
    whole = rows_of(drawn(letters)[0])
    assert whole == rows_of(drawn(letters)[0])
    assert whole == rows_of(drawn(letters, n=3)[0]) + rows_of(drawn(letters, first=3, n=3)[0])
    for other in (drawn(letters, step=1)[0], drawn(letters, seed=2)[0]):
        assert [ids[start:] for ids, start in whole] != [ids[start:] for ids, start in rows_of(other)]
    assert len({str(row) for row in whole}) > 20   # the answers to a question differ


def test_an_answer_that_does_not_end_gets_nothing_if_it_must(letters):
    free, model = drawn(letters)
    tok = CharTokenizer(LETTERS)
    tok.ends = (7,)
    asked = rollouts.Questions('x.py:f', str(letters / 'asked.jsonl'), '', 4, tok, 9).of_step(1, 0, 6)
    found = rollouts.draw(model, tok, asked, lambda question, answer: 1.0, 4, 9, 1.0, 1, 0, 0, must_end=True)
    assert rows_of(found) == rows_of(free)
    ended = [ids[-1].item() == 7 for ids, _ in found.rows]
    assert found.rewards.flatten().tolist() == ended and 0 < sum(ended) < 24


def test_figures_of_a_step_by_hand(letters):
    rollout, _ = drawn(letters)
    rollout.rewards = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]] * 2)
    reward, length, entropy, no_signal = rollout.totals().tolist()
    lengths = lengths_of(rollout)
    assert (reward, no_signal, length) == (10, 16, lengths.sum())
    assert entropy == pytest.approx(sum(-(rollout.drawn_with / lengths)).item(), rel=1e-5)


def test_rows_that_move_nothing_are_dropped_but_one_and_the_gradient_stays(letters):
    gradients = []
    for drops in (False, True):
        rollout, model = drawn(letters)
        rollout.advantages = torch.tensor([1.0, 0, 0, -1] + [0.0] * 20)
        if drops:
            rollout.pad(rollout.advantages != 0, torch.device('cpu'))
            assert len(rollout.idx) == len(rollout.targets) == len(rollout.rows) == 2
        log_probs = alignment.LogProbs(model)(rollout.idx, rollout.targets)
        weights = (rollout.targets >= 0) / 100
        loss, _ = alignment.policy_loss(log_probs, log_probs.detach(), rollout.advantages, weights, 0.2, 0.2)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    rollout.pad(torch.zeros(2, dtype=torch.bool), torch.device('cpu'))
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


# ---------------------------------------------------------------------------------------------------------------------
# runs

SETTINGS = ['--eval_interval=4', '--num_val=4', '--batch_size=3', '--gradient_accumulation_steps=2', '--group_size=4',
            '--block_size=24', '--max_new_tokens=6', '--max_iters=8', '--learning_rate=1e-2', '--warmup_iters=2',
            '--device=cpu', '--dtype=float32']


def arguments(letters, out_dir, *more):
    return [f'--init_from={letters}', f'--questions={letters / "asked.jsonl"}', f'--out_dir={out_dir}',
            f'--reward={letters / "rewards.py"}:many', *SETTINGS, *more]


def grpo(*args):
    done = call('grpo.py', *args)
    assert done.returncode == 0, done.stderr
    return done


def weights(path):
    return checkpoint.load(path)['model']


def records(out_dir):
    """The log of a run without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != 'seconds_drawing'} for record in log_of(out_dir)]



@pytest.fixture(scope='module')
def whole(letters, tmp_path_factory):
    """The out_dir of a finished run with a reference and two updates per step."""
    out_dir = tmp_path_factory.mktemp('grpo') / 'whole'
    grpo(*arguments(letters, out_dir, '--kl=0.01', '--updates=2'))
    return out_dir


def test_the_reward_rises_and_what_is_logged_is_consistent(letters, tmp_path):
    done = grpo(*arguments(letters, tmp_path / 'out', '--max_iters=25', '--eval_interval=25', '--optimizer=muon'))
    found = records(tmp_path / 'out')
    evals = [record for record in found if 'step' in record]
    steps = [record for record in found if 'iter' in record]
    assert evals[-1]['val_reward'] > evals[0]['val_reward'] + 0.2
    assert sum(r['reward'] for r in steps[-5:]) > sum(r['reward'] for r in steps[:5]) + 0.5
    for record in steps:
        assert 1 <= record['length'] <= 6 and 0 <= record['no_signal'] <= 1 and record['entropy'] > 0
        assert record['clipped'] == record['kl'] == 0   # one update, no reference
    assert all(record['val_loss'] == -record['val_reward'] for record in evals)
    assert f"reward of held-out questions {max(r['val_reward'] for r in evals):.4f} at best" in done.stderr
    assert '-> ' in done.stderr and ', reward ' in done.stderr   # samples to look at


def test_without_a_learning_rate_nothing_changes_and_the_policy_is_the_reference(letters, tmp_path):
    grpo(*arguments(letters, tmp_path / 'out', '--max_iters=1', '--learning_rate=0', '--kl=0.5', '--updates=3'))
    before = weights(letters / 'ckpt.pt')
    for name, p in weights(tmp_path / 'out' / 'ckpt.pt').items():
        assert torch.equal(p, before[name]), name
    (record,) = [record for record in records(tmp_path / 'out') if 'iter' in record]
    assert record['kl'] == pytest.approx(0, abs=1e-6) and record['clipped'] == 0 and record['grad_norm'] > 0


def test_the_reference_is_the_starting_model_and_never_changes(letters, whole):
    saved, before = checkpoint.load(whole / 'ckpt.pt'), weights(letters / 'ckpt.pt')
    assert 'reference' not in checkpoint.load(whole / 'best.pt')
    for name, p in saved['reference'].items():
        assert torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in saved['model'].items())
    assert [record for record in records(whole) if 'iter' in record][-1]['kl'] > 0


def test_the_flops_of_training_are_counted(letters, whole):
    evals = [record for record in records(whole) if 'step' in record]
    model = checkpoint.load_model(letters)[0]
    seen, rest = divmod(evals[-1]['flops'], 2 * model.flops_per_token(24))   # two updates see each token
    asked = 8 * 6 * 4   # 6 questions of 1 to 4 letters and 4 answers to each, in 8 steps; the last token is not seen
    assert rest == evals[0]['flops'] == 0 and evals[-1]['tokens'] <= seen <= evals[-1]['tokens'] + 3 * asked




def test_the_memory_of_micro_batches_does_not_change_the_step(letters, tmp_path):
    """The same questions and answers in one micro-batch or in six."""
    for name, *shape in (('one', '--batch_size=6', '--gradient_accumulation_steps=1'),
                         ('six', '--batch_size=1', '--gradient_accumulation_steps=6')):
        grpo(*arguments(letters, tmp_path / name, '--max_iters=1', '--kl=0.1', *shape))
    one, six = ([r for r in records(tmp_path / name) if 'iter' in r] for name in ('one', 'six'))
    assert one[0] == pytest.approx(six[0], rel=1e-4, abs=1e-6)
    for name, p in weights(tmp_path / 'one' / 'ckpt.pt').items():
        torch.testing.assert_close(p, weights(tmp_path / 'six' / 'ckpt.pt')[name], rtol=1e-3, atol=1e-4)





def test_a_reward_that_fails_ends_the_run_in_one_line(letters, tmp_path):
    (tmp_path / 'bad.py').write_text('def reward(question, answer):\n    return 1 / 0\n')
    done = call('grpo.py', *arguments(letters, tmp_path / 'out', f'--reward={tmp_path / "bad.py"}:reward'))
    assert_one_line(done, 1, 'fails: ZeroDivisionError', 'question', 'answer')


@pytest.mark.parametrize('arg, told', [
    ('--learning_rate=1e-3', False), ('--max_new_tokens=2', True), ('--num_val=3', True)])
def test_the_best_reward_begins_anew_when_something_else_is_measured(whole, tmp_path, arg, told):
    out_dir = shutil.copytree(whole, tmp_path / 'out')
    done = grpo(f'--out_dir={out_dir}', '--init_from=resume', arg)
    assert ('begin anew' in done.stderr) == told
