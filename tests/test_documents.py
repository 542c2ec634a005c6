"""
Conversations in batches: rows begin at one, attention stays within each, targets say where the next one begins.
"""

import numpy as np
import pytest
import torch

from flatgpt import evaluation, runtime
from flatgpt.dataset import BEGINS, Dataset, write
from flatgpt.tokenizer import CharTokenizer
from model import ARCHS, GPT, GPTConfig

TOK = CharTokenizer('\n0123456789?')
LENGTHS = (5, 9, 3, 12, 30, 7, 4, 11)   # of conversations; the last of 30 is longer than a row of 16


def write_conversations(folder, lengths=LENGTHS, times=6):
    """Conversation c is the id c % 10 + 1, repeated; its second half is to be learned."""
    lengths = lengths * times
    ids = np.concatenate([np.full(n, c % 10 + 1) for c, n in enumerate(lengths)])
    mask = np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.uint8)
    mask[np.cumsum([0, *lengths[:-1]])] = BEGINS
    write(folder, {'train': ids, 'val': ids}, TOK, {}, {'train': mask, 'val': mask})
    return Dataset(str(folder)), ids, mask


def test_rows_begin_at_every_conversation_and_after_the_last_comes_the_first(tmp_path):
    data, ids, mask = write_conversations(tmp_path / 'talks')
    rows = {tuple(ids.take(range(start, start + 16), mode='wrap')) for start in np.flatnonzero(mask == BEGINS)}
    seen = {tuple(row) for step in range(50)
            for row in data.train_batch(step, 1337, 2, 8, 16, torch.device('cpu'))[0].flatten(0, 1).tolist()}
    assert seen == rows
    evaluated = [data.eval_batch('val', i, 3, 16, 16, torch.device('cpu'))[0].tolist() for i in range(3)]
    assert {tuple(row) for batch in evaluated for row in batch} == rows   # 48 rows, 48 conversations


def test_conversations_that_are_shorter_than_a_row_fill_it_several_times(tmp_path):
    data, ids, _ = write_conversations(tmp_path / 'talks', (5, 3), 1)
    data.validate_ids(16, 20)
    x, y = data.windows('train', np.array([5]), 16, torch.device('cpu'))
    assert x[0].tolist() == [*ids[5:], *ids, *ids[:5]]
    assert (y[0] == -2).sum() == 4


def test_targets_are_learned_hidden_or_say_that_a_conversation_begins(tmp_path):
    data, ids, mask = write_conversations(tmp_path / 'talks')
    x, y = data.windows('train', np.array([0]), 16, torch.device('cpu'))
    expected = [int(i) if m == 1 else {0: -1, BEGINS: -2}[int(m)] for i, m in zip(ids[1:17], mask[1:17])]
    assert y[0].tolist() == expected
    assert x[0].tolist() == ids[:16].tolist()


def test_a_batch_is_a_function_of_seed_and_step_for_any_number_of_processes(tmp_path):
    data, _, _ = write_conversations(tmp_path / 'talks')
    whole = data.train_batch(7, 1, 4, 3, 16, torch.device('cpu'))
    for rank in range(2):
        part = data.train_batch(7, 1, 4, 3, 16, torch.device('cpu'), rank, 2)
        assert all(torch.equal(a[rank::2], b) for a, b in zip(whole, part))


def test_conversations_that_are_cut_are_counted(tmp_path):
    data, _, _ = write_conversations(tmp_path / 'talks')
    assert [data.num_cut(size) for size in (4, 11, 16, 28, 29)] == [6 * 5, 6 * 1, 6 * 1, 6 * 1, 0]


MODELS = {**ARCHS, 'alibi': {**ARCHS['gpt2'], 'pos': 'alibi'}, 'window': {**ARCHS['llama'], 'window': 4},
          'grouped heads': {**ARCHS['llama'], 'n_kv_head': 2}}


@pytest.mark.parametrize('attention', ['math', 'sdpa'])
@pytest.mark.parametrize('name', MODELS)
def test_the_loss_of_a_row_is_that_of_its_documents_alone(name, attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=12, block_size=16, n_layer=2, n_head=4, n_embd=32, attention=attention,
                          **MODELS[name]))
    for p in model.parameters():
        p.data.normal_(std=0.3)
    model.within_documents = True
    idx = torch.randint(12, (2, 16))
    ends = [[5, 9, 16], [1, 16]]   # where the documents of each row end
    targets = torch.cat((idx[:, 1:], torch.zeros(2, 1, dtype=torch.long)), dim=1)
    total = 0.0
    count = 0
    for row, borders in enumerate(ends):
        start = 0
        for end in borders:
            if end < 16:
                targets[row, end - 1] = -2
            document = idx[row:row + 1, start:end]
            learned = targets[row:row + 1, start:end].clamp(min=-1)
            loss = model(document, learned)[1]
            total = total + loss * (learned >= 0).sum()
            count += int((learned >= 0).sum())
            start = end
    loss = model(idx, targets)[1]
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
    model.within_documents = False
    assert abs(model(idx, targets)[1].item() - loss.item()) > 1e-4


def test_a_row_without_a_target_to_learn_has_no_loss_and_no_nan():
    model = GPT(GPTConfig(vocab_size=12, block_size=16, n_layer=1, n_head=2, n_embd=16))
    model.within_documents = True
    targets = torch.full((2, 16), -1)
    targets[:, 3] = -2
    loss = model(torch.randint(12, (2, 16)), targets)[1]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_an_evaluation_scores_the_answers_each_by_its_own_conversation(tmp_path):
    data, ids, mask = write_conversations(tmp_path / 'talks', times=1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=12, block_size=16, n_layer=1, n_head=2, n_embd=16)).eval()
    rt = runtime.setup('cpu', 'float32', False, 1)
    total = 0.0
    for part, learned in zip(np.split(ids, data.begins['train'][1:]), np.split(mask == 1, data.begins['train'][1:])):
        loss, _, n = evaluation.rolling_loss(model, rt, part, 16, 4, learned)
        total += loss * n
    loss, _, n = evaluation.rolling_loss(model, rt, ids, 16, 4, mask == 1, data.begins['train'])
    assert n == (mask == 1).sum()
    assert loss == pytest.approx(total / n, rel=1e-6)
    assert loss != pytest.approx(evaluation.rolling_loss(model, rt, ids, 16, 4, mask == 1)[0], rel=1e-3)
