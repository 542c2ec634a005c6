"""What a model says of texts: against Hugging Face's model and recipe, by hand, and where the answer is known."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import make

from flatgpt import engine, evaluation
from flatgpt.answers import Answer
from flatgpt.engine import generate
from flatgpt.errors import UserError
from flatgpt.evaluation import Item
from flatgpt.tokenizer import CharTokenizer, Tokenizer
from model import GPT, GPTConfig

RT = SimpleNamespace(device=torch.device('cpu'), compile=False, rank=0, world_size=1, master=True, sum=lambda x: x,
                     notice=print)
LETTERS = CharTokenizer('abcdefghijklmnopqrstuv ')   # of the size of test_model's vocabulary


def ids_of(n, vocab=23, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.uint16)


# ---------------------------------------------------------------------------------------------------------------------
# the loss of a text

@pytest.fixture(scope='module')
def pair():
    """A GPT-2 of Hugging Face's with random weights, and the same of ours."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=128, n_embd=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    ours = GPT(GPTConfig(101, 128, n_layer=2, n_embd=32, n_head=4)).eval()
    crossed = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')   # kept as (in, out) by Hugging Face
    ours.load_state_dict({name: p.T if name.endswith(crossed) else p for name, p in theirs.state_dict().items()})
    return theirs, ours


def hugging_face_loss(model, ids, size, stride):
    """The loss by the recipe of Hugging Face's documentation, which gives the model its window and labels; it leaves
    out the first token of a window that nothing precedes."""
    total, n, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + size, len(ids))
        window = torch.tensor(ids[None, begin:end].astype(np.int64))
        labels = window.clone()
        labels[:, :done - begin if done else 0] = -100
        count = (labels[:, 1:] != -100).sum().item()
        total, n, done = total + model(window, labels=labels).loss.item() * count, n + count, end
        if end == len(ids):
            return total / n


@torch.no_grad()
def token_by_token(model, ids, size, stride):
    """The costs of all tokens but the first, each by itself: given the tokens before it in the first window that
    contains it, and if there are none there the one before the window."""
    costs = []
    for t in range(1, len(ids)):
        begin = next(begin for begin in range(0, len(ids), stride) if t < begin + size)
        context = torch.tensor(ids[None, min(begin, t - 1) - (stride == size and begin and t > begin):t].astype(int))
        costs.append(-model(context).logits[0, -1].log_softmax(-1)[ids[t]].item())
    return costs


@pytest.mark.parametrize('stride', [1, 100, 128])
def test_the_loss_is_that_of_hugging_face_and_its_error_that_of_numpy(pair, stride):
    theirs, ours = pair
    ids = ids_of(300, 101)
    costs = token_by_token(theirs, ids, 128, stride)
    loss, error, n = evaluation.rolling_loss(ours, RT, ids, stride, batch_size=7)
    assert n == len(costs) == 299
    assert abs(loss - np.mean(costs)) < 1e-5
    assert abs(error - np.std(costs, ddof=1) / math.sqrt(n)) < 1e-5
    if stride < 128:
        with torch.no_grad():
            assert abs(loss - hugging_face_loss(theirs, ids, 128, stride)) < 1e-5


def test_the_loss_of_some_tokens_is_the_mean_cost_of_those(pair):
    theirs, ours = pair
    ids, learnt = ids_of(300, 101), np.arange(301)[1:] % 7 < 3
    learnt[:150] = False   # whole windows
    costs = np.array(token_by_token(theirs, ids, 128, 100))[learnt[1:]]
    loss, error, n = evaluation.rolling_loss(ours, RT, ids, 100, 2, learnt)
    assert n == len(costs) == learnt.sum()
    assert (loss, error) == pytest.approx((costs.mean(), costs.std(ddof=1) / math.sqrt(n)), abs=1e-5)


@pytest.mark.parametrize('n', [2, 3, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize('stride', [1, 3, 7, 8])
def test_every_token_but_the_first_is_scored_once_after_enough_others(n, stride):
    scored, size = [], 8
    for begin, first, end in evaluation.windows(n, size, stride):
        assert 0 <= begin < first < end <= n and end - begin <= size + 1   # the last one is not read
        assert begin == 0 or first - begin >= max(size - stride, 1)
        scored += range(first, end)
    assert scored == list(range(1, n))


def test_the_loss_does_not_depend_on_the_batch_or_on_how_many_logits_are_made_at_once(monkeypatch):
    model, ids = make(torch.float32), ids_of(50)
    loss, error, n = evaluation.rolling_loss(model, RT, ids, 5, batch_size=1)
    monkeypatch.setattr(evaluation, 'LOGITS', 3 * 23)
    assert evaluation.rolling_loss(model, RT, ids, 5, batch_size=16) == pytest.approx((loss, error, n), rel=1e-6)


def test_longest_rows_come_first_and_processes_take_different_batches():
    lengths = [3, 9, 1, 9, 5, 2, 7]
    whole = list(evaluation.share(RT, lengths, 2, ''))
    assert whole == [[1, 3], [6, 4], [0, 5], [2]]
    parts = [list(evaluation.share(SimpleNamespace(rank=rank, world_size=3, master=False), lengths, 2, ''))
             for rank in range(3)]
    assert parts == [whole[0::3], whole[1::3], whole[2::3]]


def test_a_model_with_nan_is_refused():
    model = make(torch.float32)
    model.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(UserError, match='NaN or infinite logits'):
        evaluation.rolling_loss(model, RT, ids_of(9), 4, 2)


def uniform(vocab=23):
    """A model to which all tokens are equally likely."""
    model = make(torch.float32, vocab_size=vocab, tie_weights=False)
    model.lm_head.weight.data.zero_()
    return model


def test_a_uniform_model_has_the_vocabulary_as_perplexity_and_chance_accuracy():
    loss, error, _ = evaluation.rolling_loss(uniform(), RT, ids_of(60), 6, 4)
    assert evaluation.perplexity(loss) == pytest.approx(23) and error == pytest.approx(0, abs=1e-6)
    items = [Item('', 'abc', ['de', 'fg', 'hi', 'jk'], gold % 4) for gold in range(40)]
    pairs = [evaluation.encode_pair(LETTERS, item.context, answer) for item in items for answer in item.answers]
    likelihoods = evaluation.loglikelihood(uniform(), RT, pairs, 4, '')[0]
    found = evaluation.summary(evaluation.right_choices(items, likelihoods))
    assert [found[name] for name in ('acc', 'acc_norm', 'acc_bytes')] == [0.25] * 3
    assert found['acc_stderr'] == pytest.approx(math.sqrt(0.25 * 0.75 / 39))


def test_a_perplexity_beyond_floats_is_none():
    assert evaluation.perplexity(1000.0) is None and evaluation.perplexity(0.0) == 1


# ---------------------------------------------------------------------------------------------------------------------
# continuations

def by_hand(model, ids, first):
    """(log-probability of ids from first on, whether all are the likeliest), each after all ids that fit before it."""
    total, greedy = 0.0, True
    for t in range(first, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor(ids[None, max(t - model.config.block_size, 0):t].astype(int)))[0][0, -1]
        total += logits.log_softmax(-1)[ids[t]].item()
        greedy &= logits.argmax().item() == ids[t]
    return total, greedy


def test_a_log_likelihood_is_the_sum_over_the_continuation():
    model = make(torch.float32)
    pairs = [(ids_of(n, seed=n), ids_of(m, seed=m + 50)) for n, m in ((1, 1), (4, 3), (9, 1), (2, 6), (5, 8))]
    logprobs, greedy = evaluation.loglikelihood(model, RT, pairs, 2, '')
    for (context, continuation), logprob, likeliest in zip(pairs, logprobs, greedy):
        assert (logprob, likeliest) == pytest.approx(
            by_hand(model, np.concatenate((context, continuation)), len(context)), abs=1e-4)


def test_a_continuation_that_is_made_of_the_likeliest_tokens_is_greedy_until_one_is_changed():
    model, context = make(torch.float32), ids_of(4)
    likeliest = np.array([token.item() for token, _ in generate(model, [torch.tensor(context.astype(int))], 5, 0)])
    other = likeliest.copy()
    other[2] = (other[2] + 1) % 23
    pairs = [(context, likeliest), (context, other)]
    assert evaluation.loglikelihood(model, RT, pairs, 2, '')[1].tolist() == [True, False]


def test_a_long_context_is_cut_on_the_left_and_no_more_than_needed():
    model, text = make(torch.float32), ids_of(40)   # of which the model reads 12
    cut = evaluation.loglikelihood(model, RT, [(text[:36], text[36:])], 1, '')[0]
    same, shorter = (evaluation.loglikelihood(model, RT, [(text[start:36], text[36:])], 1, '')[0] for start in (27, 28))
    assert cut == same and abs(cut - shorter) > 1e-3


def test_a_continuation_longer_than_the_context_of_the_model_is_scored_whole():
    model, text = make(torch.float32), ids_of(40)
    (logprob,), _ = evaluation.loglikelihood(model, RT, [(text[:3], text[3:])], 4, '')
    pieces = [evaluation.loglikelihood(model, RT, [(text[:a], text[a:min(a + 6, 40)])], 1, '')[0][0]
              for a in range(3, 40, 6)]
    assert logprob == pytest.approx(sum(pieces), abs=1e-3)


class Pairs(Tokenizer):
    """Bytes, but 'ab' and ' a' are one token each; 258 ends a text."""

    eot, ends, vocab_size = 258, (258,), 259

    def encode(self, text, special=False):
        ids, data = [], text.encode()
        while data:
            known = {b'ab': 256, b' a': 257}.get(data[:2])
            ids.append(known or data[0])
            data = data[2 if known else 1:]
        return np.array(ids, dtype=np.uint16)

    def token_bytes(self, i):
        return {256: b'ab', 257: b' a', 258: b'<|endoftext|>'}.get(i) or bytes([i])


@pytest.mark.parametrize('context, continuation, expected', [
    ('xy', ' ac', ([120, 121], [257, 99])),
    ('xy ', 'ac', ([120, 121], [257, 99])),         # the space belongs to the word after it
    ('xy \n', 'ac', ([120, 121], [32, 10, 97, 99])),
    ('xa', 'bc', ([120], [256, 99])),               # a token across the seam belongs to the continuation
    ('', 'ab', ([258], [256])), (' ', 'a', ([258], [257])), ('a', 'b', ([258], [256])),
])
def test_a_continuation_begins_at_the_first_token_that_is_not_all_context(context, continuation, expected):
    assert tuple(ids.tolist() for ids in evaluation.encode_pair(Pairs(), context, continuation)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# what it would write

def test_what_is_generated_is_the_likeliest_text_up_to_a_stop_whatever_the_batch():
    model, prompts = make(torch.float32), [ids_of(n, seed=n) for n in (3, 7, 1, 15)]
    whole = [LETTERS.decode([token.item() for token, _ in generate(model, [torch.tensor(ids.astype(int))], 20, 0)])
             for ids in prompts]
    for batch_size in (1, 3, 4):
        assert evaluation.generate_until(model, LETTERS, RT, prompts, 20, [], batch_size) == whole
    stops = [whole[0][4:6], whole[1][9], 'never seen']
    expected = [text[:min((place for stop in stops if (place := text.find(stop)) >= 0), default=20)] for text in whole]
    assert expected != whole
    assert evaluation.generate_until(model, LETTERS, RT, prompts, 20, stops, 2) == expected


def test_a_padded_vocabulary_is_not_written_and_nothing_is_made_after_all_have_ended(monkeypatch):
    model, tok = make(torch.float32), CharTokenizer('abc')
    (text,) = evaluation.generate_until(model, tok, RT, [ids_of(3, vocab=3)], 20, [], 1)
    assert len(text) == 20
    steps = []
    monkeypatch.setattr(engine, 'generate', lambda *args, **more: (
        steps.append(pair) or pair for pair in generate(*args, **more)))
    assert evaluation.generate_until(model, tok, RT, [ids_of(3, vocab=3)], 20, [text[5:9]], 1) == [
        text[:text.find(text[5:9])]]
    assert len(steps) <= 9


@pytest.mark.parametrize('ids, stops, text, finish', [
    ([97, 258, 97], [], 'a', 'stop'), ([97], [], 'a', None), ([97, 97, 97], [], 'aaa', 'length'),
    ([97], ['x', 'a'], '', 'stop'), ([98, 97, 98], ['ab', 'xb'], 'b', 'stop'),
])
def test_an_answer_ends_with_its_text_before_a_stop_or_at_its_length(ids, stops, text, finish):
    answer = Answer(Pairs(), np.array([97]), 3, stops)
    for token in ids:
        answer.add(token)
    assert (answer.text, answer.finish) == (text, finish)


# ---------------------------------------------------------------------------------------------------------------------
# questions

def write(path, *records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
    return path


def test_hellaswag_is_read_as_published_with_its_marks_removed(tmp_path):
    path = write(tmp_path / 'h.jsonl', {
        'ind': 24, 'activity_label': 'Roof repair', 'ctx_a': 'A man sits on a roof.', 'ctx_b': 'he', 'split': 'val',
        'ctx': 'A man sits on a roof. he', 'label': 3, 'endings': ['is  happy.', 'pulls [step] tiles.', 'flies.', 'z']},
        {'activity_label': 'Tea', 'ctx': '[header] How to  brew [title] Boil water. [step] Wait.', 'label': '1',
         'endings': [' Pour it. [substeps] Stir.', 'Drink']})
    first, second = evaluation.read_items(path, evaluation.multiple_choice)
    assert first.context == 'Roof repair: A man sits on a roof. He'
    assert first.answers == ['is happy.', 'pulls tiles.', 'flies.', 'z'] and first.gold == 3
    assert second.context == 'Tea: How to brew. Boil water. Wait.' and second.gold == 1
    assert second.answers == ['Pour it. Stir.', 'Drink']


def test_the_other_layouts(tmp_path):
    path = tmp_path / 'x.jsonl'
    path.write_bytes(b'\xef\xbb\xbf{"context": "c", "choices": ["a", "b"], "gold": 1}\r\n\r\n')
    assert evaluation.read_items(path, evaluation.multiple_choice) == [Item(f'{path}, line 1', 'c', ['a', 'b'], 1)]
    write(path, {'text': 'It was a  dark night \n'}, {'prompt': '', 'reference': 'r', 'other': 1})
    lines = path.read_text().splitlines()
    assert evaluation.last_word(json.loads(lines[0])) == ('It was a  dark', ['night'])
    assert evaluation.to_continue(json.loads(lines[1])) == ('', ['r'])


GOOD = {'context': 'c', 'choices': ['a', 'b'], 'gold': 0}


@pytest.mark.parametrize('line, words', [
    (json.dumps({**GOOD, 'gold': 2}), ['"gold" is 2', '0 to 1']), (json.dumps({**GOOD, 'gold': -1}), ['"gold" is -1']),
    (json.dumps({**GOOD, 'gold': True}), ['"gold" is true', 'a whole number']),
    (json.dumps({**GOOD, 'gold': 'a'}), ['"gold" is "a"', 'a whole number']),
    (json.dumps({'context': 'c', 'choices': ['a', 'b']}), ['no "gold"', "'context', 'choices'"]),
    (json.dumps({**GOOD, 'choices': ['a']}), ['"choices" is ["a"]', 'two or more']),
    (json.dumps({**GOOD, 'choices': ['a', '']}), ['two or more']), (json.dumps({**GOOD, 'choices': 'ab'}), ['a list']),
    (json.dumps({**GOOD, 'context': 7}), ['"context" is 7', 'a text']), ('{}', ['no "context"', 'it has nothing']),
    (json.dumps({'ctx': 'c', 'endings': ['a', 'b'], 'label': ''}), ['"label" is ""', 'a whole number']),
    (json.dumps({'ctx': 'c', 'endings': ['a', 'b'], 'label': '4'}), ['"label" is 4', '0 to 1']),
    (json.dumps({'ctx': 'c', 'endings': ['a', 'b']}), ['no "label"']), ('[1]', ['expected an object']),
    ('{"context": ', ['is not JSON']), ('[' * 100_000, ['is not JSON']), ('"x"', ['expected an object']),
])
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / 'bad.jsonl'
    path.write_text(f'{json.dumps(GOOD)}\n\n{line}\n')
    with pytest.raises(UserError) as error:
        evaluation.read_items(path, evaluation.multiple_choice)
    message = str(error.value)
    assert message.startswith(f'{path}, line 3') and '\n' not in message and len(message) < 250
    assert all(word in message for word in words), message


@pytest.mark.parametrize('parse, record, words', [
    (evaluation.last_word, {'text': 'word'}, '"word": expected two words'), (evaluation.last_word, {}, 'no "text"'),
    (evaluation.to_continue, {'prompt': 'p'}, 'no "reference"'),
    (evaluation.to_continue, {'reference': 'r'}, 'no "prompt"'),
])
def test_a_bad_line_of_the_other_layouts_is_named(tmp_path, parse, record, words):
    path = write(tmp_path / 'bad.jsonl', record)
    with pytest.raises(UserError, match=words) as error:
        evaluation.read_items(path, parse)
    assert str(error.value).startswith(f'{path}, line 1: ')


def test_an_empty_file_and_one_of_mixed_encodings_are_refused(tmp_path):
    path = tmp_path / 'bad.jsonl'
    path.write_text('\n \n')
    with pytest.raises(UserError, match='bad.jsonl is empty'):
        evaluation.read_items(path, evaluation.last_word)
    path.write_bytes('{"text": "un é"}\n'.encode() + '{"text": "un é"}\n'.encode('latin-1'))
    with pytest.raises(UserError, match='bad.jsonl, line 2 is not UTF-8'):
        evaluation.read_items(path, evaluation.last_word)


def test_examples_are_others_solved_and_drawn_by_seed_and_number():
    def contexts(shots, seed, limit=None):
        return [item.context for item in evaluation.with_examples(items, limit, shots, ': ', seed)]

    items = [Item(f'x, line {i}', f'question {i // 2}', ['yes', 'no'], i % 2) for i in range(40)]   # each asked twice
    drawn = contexts(5, seed=3)
    solved = {f'{item.context}: {item.answers[item.gold]}': n for n, item in enumerate(items)}
    for item, text in zip(items, drawn):
        *examples, question = text.split('\n\n')
        assert question == item.context and len(examples) == len({solved[example] for example in examples}) == 5
        assert not any(example.startswith(f'{question}:') for example in examples)
    assert len({text.rpartition('\n\n')[0] for text in drawn}) == 40                # its own for each
    assert drawn == contexts(5, seed=3) != contexts(5, seed=4)
    assert contexts(5, seed=3, limit=7) == drawn[:7] and contexts(0, seed=3, limit=7) == [
        item.context for item in items[:7]]
    assert len(contexts(38, seed=3)[7].split('\n\n')) == 39
    with pytest.raises(UserError, match='x, line 0: shots=39, but the file has 38 other questions'):
        contexts(39, seed=3)


def test_the_right_choice_is_judged_as_a_whole_per_character_and_per_byte():
    items = [Item('', '', ['aa', 'bbbb'], 0), Item('', '', ['éééé', 'bbbbbb'], 0), Item('', '', ['a', 'b', 'c'], 2)]
    found = evaluation.right_choices(items, np.array([-3.0, -4.0, -5.0, -6.5, -2.0, -2.5, -1.0]))
    # per character -1.5 to -1, -1.25 to -1.08, ...; per byte -1.5 to -1, -0.625 to -1.08
    assert found == {'acc': [True, True, True], 'acc_norm': [False, False, True], 'acc_bytes': [False, True, True]}


TEXTS = {   # how BLEU cuts a text, and a text
    'ascii': ('13a', 'the cat sat on the mat today'), 'German': ('13a', 'größere Bäume wachsen über Ämter hinaus'),
    'Russian': ('13a', 'кошка сидит на ковре у двери'), 'Chinese': ('zh', '床前明月光，疑是地上霜。'),
    'Chinese with English': ('zh', '用 PyTorch 训练一个很小的模型'), 'Japanese': ('char', '猫がマットの上に座っている'),
    'Thai': ('char', 'แมวนั่งอยู่บนเสื่อ'), 'Korean': ('13a', '고양이가 매트 위에 앉아 있다 오늘'),
}


@pytest.mark.parametrize('name', TEXTS)
def test_a_perfect_answer_has_full_marks_in_every_language_and_another_has_few(name):
    tokenize, text = TEXTS[name]
    perfect = evaluation.compare_texts([text], [text])
    assert (perfect['bleu'], perfect['chrf']) == (pytest.approx(100), pytest.approx(100))
    assert perfect['rouge1'] == perfect['rouge2'] == perfect['rougeL'] == 1
    assert f'tok:{tokenize}|' in perfect['bleu_signature']
    assert perfect['rouge_words'] == ('ascii' if name == 'ascii' else 'unicode')
    half = text[:len(text) // 2 + 1]
    part = evaluation.compare_texts([half], [text])
    assert 0 < part['rouge1'] < 1 and 0 < part['rougeL'] < 1 and part['bleu'] < 100
    other = evaluation.compare_texts(['xyzw'], [text])
    assert other['rouge1'] == 0 and other['bleu'] < 20


@pytest.mark.parametrize('begin, kept', [((), []), ((21, 22), [21, 22])])
def test_a_context_that_is_too_long_loses_all_but_what_begins_a_text(monkeypatch, begin, kept):
    rows = []
    monkeypatch.setattr(evaluation, 'costs', lambda model, rt, of, *more: rows.extend(of) or torch.zeros(len(of), 3))
    model = SimpleNamespace(config=GPTConfig(23, 8, 1, 4, 1))
    pairs = [(np.arange(n), np.array([19, 20])) for n in (3, 7, 20)]
    monkeypatch.setattr(torch.Tensor, 'index_add_', lambda self, *more: self)
    evaluation.loglikelihood(model, RT, pairs, 2, '', begin)
    assert [row.tolist() for row, _ in rows] == [
        [0, 1, 2, 19, 20], [0, 1, 2, 3, 4, 5, 6, 19, 20],
        [*kept, *range(13 + len(kept), 20), 19, 20]]


def test_a_summary_has_the_mean_and_its_error():
    assert evaluation.summary({'a': [1, 2, 3, 6]}) == {'a': 3.0, 'a_stderr': pytest.approx(math.sqrt(14 / 3 / 4))}
    assert evaluation.summary({'a': [True]}) == {'a': 1.0}
