"""Pairs: the forms in which people keep them, token ids and targets, what is cut, held out and in which batch."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import quick
from test_tokenizer import KINDS

from flatgpt.conversation import add_chatml
from flatgpt.errors import UserError
from flatgpt.pairs import Pair, Rows, hold_out, in_epochs, pair_of, read, row_of
from flatgpt.tokenizer import BpeTokenizer, CharTokenizer, load

CPU = torch.device('cpu')
CHARS = CharTokenizer.of('abcdefghijklmnopqrstuvwxyz ?.')
USER, GOOD, BAD = ({'role': 'user', 'content': 'why?'}, {'role': 'assistant', 'content': 'because'},
                   {'role': 'assistant', 'content': 'no idea'})
MESSAGES = Pair([USER], 'because', 'no idea')


@pytest.fixture(scope='module')
def chat():
    """A tokenizer with ChatML's template, and the template."""
    tok = load('bpe:300', ['why because no idea yes'] * 3, special=('<|im_start|>', '<|im_end|>'))
    return tok, add_chatml(tok)


# ---------------------------------------------------------------------------------------------------------------------
# records

@pytest.mark.parametrize('record, pair', [
    ({'prompt': 'why?', 'chosen': 'because', 'rejected': 'no idea'}, Pair('why?', 'because', 'no idea')),
    ({'prompt': [USER], 'chosen': 'because', 'rejected': 'no idea'}, MESSAGES),
    ({'messages': [USER], 'chosen': [GOOD], 'rejected': [BAD]}, MESSAGES),
    ({'prompt': 'why?', 'chosen': [GOOD], 'rejected': [BAD], 'score_chosen': 7}, MESSAGES),
    ({'prompt': 'why?', 'chosen': [USER, GOOD], 'rejected': [USER, BAD]}, MESSAGES),   # UltraFeedback
    ({'chosen': [USER, GOOD], 'rejected': [USER, BAD]}, MESSAGES),
    ({'chosen': [USER, GOOD, USER, GOOD], 'rejected': [USER, GOOD, USER, BAD]},
     Pair([USER, GOOD, USER], 'because', 'no idea')),
    ({'chosen': '\n\nHuman: why?\n\nAssistant: because', 'rejected': '\n\nHuman: why?\n\nAssistant: no idea'},
     MESSAGES),
])
def test_the_forms_that_people_keep_pairs_in(record, pair):
    assert pair_of(record, 'line 1') == pair


@pytest.mark.parametrize('record, words', [
    ([], 'expected an object with "prompt"'), ({'prompt': 'why?', 'chosen': 'a'}, 'expected an object'),
    ({'prompt': 'why?', 'chosen': 'a', 'rejected': ' '}, 'rejected: '),
    ({'prompt': 'why?', 'chosen': 3, 'rejected': 'b'}, 'chosen: '),
    ({'prompt': 'why?', 'chosen': None, 'rejected': 'b'}, 'chosen: '),
    ({'prompt': 'why?', 'chosen': [], 'rejected': 'b'}, 'chosen: '),
    ({'prompt': 'why?', 'chosen': [USER], 'rejected': [BAD]}, 'chosen: '),
    ({'prompt': 'why?', 'chosen': [USER, GOOD, USER], 'rejected': [BAD]}, 'expected the assistant'),
    ({'chosen': [USER, GOOD], 'rejected': [{**USER, 'content': 'how?'}, BAD]}, 'different prompts'),
    ({'chosen': 'because', 'rejected': 'no idea'}, 'chosen: '),
    ({'prompt': [], 'chosen': 'a', 'rejected': 'b'}, 'prompt: '),
    ({'prompt': 5, 'chosen': 'a', 'rejected': 'b'}, 'prompt: '),
    ({'prompt': [GOOD], 'chosen': 'a', 'rejected': 'b'}, 'prompt: '),
    ({'prompt': [USER, GOOD], 'chosen': 'a', 'rejected': 'b'}, 'chosen: message 3'),
    ({'prompt': 'why?', 'chosen': [5], 'rejected': [BAD]}, 'chosen: '),
])
def test_another_record_is_refused_in_one_line_with_its_place(record, words):
    with pytest.raises(UserError) as error:
        pair_of(record, 'x.jsonl, line 7')
    assert str(error.value).startswith('x.jsonl, line 7') and words in str(error.value)
    assert '\n' not in str(error.value)


def test_files_are_read_together_and_an_empty_one_is_refused(tmp_path):
    for name in 'ab':
        (tmp_path / f'{name}.jsonl').write_text(json.dumps({'prompt': name, 'chosen': 'x', 'rejected': 'y'}))
    assert [pair.prompt for pair in read(f'{tmp_path}/a.jsonl,{tmp_path}/b.jsonl')] == ['a', 'b']
    (tmp_path / 'empty.jsonl').write_text('')
    with pytest.raises(UserError, match='empty.jsonl'):
        read(str(tmp_path / 'empty.jsonl'))


# ---------------------------------------------------------------------------------------------------------------------
# what is held out

def numbered(n):
    return [Pair(f'prompt {i % max(n // 2, 1)}', f'good {i}', f'bad {i}') for i in range(n)]


@given(st.integers(4, 60), st.floats(0.01, 0.5), st.randoms())
@quick
def test_no_prompt_is_in_both_and_the_order_of_pairs_does_not_matter(n, fraction, generator):
    pairs = numbered(n)
    train, val = hold_out(pairs, fraction)
    assert val and train and sorted(train + val) == sorted(pairs)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in val}
    prompts = len({pair.prompt for pair in pairs})
    assert len({pair.prompt for pair in val}) == max(round(fraction * prompts), 1)
    generator.shuffle(pairs)
    assert sorted(hold_out(pairs, fraction)[1]) == sorted(val)


def test_one_prompt_cannot_be_split():
    with pytest.raises(UserError, match='--val_pairs'):
        hold_out([Pair('a', 'b', 'c')] * 3, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# ids and targets

def test_with_a_template_only_the_last_answer_is_learned_and_what_ends_it(chat):
    tok, template = chat
    ids, start = row_of([USER, BAD, USER], 'because', tok, template)
    assert tok.decode(ids[start:]) == 'because<|im_end|>'
    assert tok.decode(ids[:start]) == template.render([USER, BAD, USER], add_generation_prompt=True)
    assert np.array_equal(row_of('why?', 'yes', tok, template)[0], row_of([USER], 'yes', tok, template)[0])


def test_without_a_template_a_text_goes_on_and_messages_are_refused(chat):
    ids, start = row_of('why? ', 'because', CHARS, None)
    assert (CHARS.decode(ids), start) == ('why? because', 5)
    tok, _ = chat
    ids, start = row_of('why? ', 'because', tok, None)
    assert ids[-1] == tok.ends[0] and tok.decode(ids[start:-1]).lstrip() == 'because'
    assert row_of('', 'ab', CHARS, None)[1] == 1   # nothing comes before the first token
    with pytest.raises(UserError, match='no chat template'):
        row_of([USER], 'because', CHARS, None)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('prompt, answer', [('hello', ' hello'), ('hello ', 'hello'), ('<s>hello', 'llo'), ('', 'he')])
def test_without_a_template_a_row_has_the_ids_that_training_data_and_prompts_have(kind, prompt, answer):
    tok = BpeTokenizer(KINDS[kind][0]())
    ids, start = row_of(prompt, answer, tok, None)
    assert ids.tolist() == tok.encode_document(prompt + answer).tolist()
    if prompt:
        assert ids[:start].tolist() == tok.encode_prompt(prompt).tolist()[:start]
        assert tok.stream(ids[:start])(ids[start:len(ids) - len(tok.ends)]).endswith(answer)


def test_a_batch_has_chosen_rows_above_rejected_ones_and_targets_of_answers_alone():
    rows = Rows([Pair('ab', 'cde', 'f'), Pair('a', 'gh', 'ijkl')], CHARS, None, 20, 'train')
    idx, targets = rows.batch(np.array([1, 0]), CPU)
    shown = [''.join('_' if t < 0 else CHARS.decode([t]) for t in row) for row in targets.tolist()]
    assert shown == ['gh__', '_cde', 'ijkl', '_f__']
    assert [CHARS.decode(row) for row in idx.tolist()] == ['ag  ', 'abcd', 'aijk', 'ab  ']   # padded with id 0
    assert rows.lengths.tolist() == [4 + 2, 2 + 4] and rows.longest == 4


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_is_left_out():
    pairs = [Pair('abcdefgh', 'xyz', 'x'), Pair('ab', 'x' * 9, 'y'), Pair('ab', 'same', 'same'), Pair('ab', 'c', 'd')]
    rows = Rows(pairs, CHARS, None, 6, 'train')
    assert (len(rows), rows.num_cut, rows.num_left_out) == (2, 1, 2)
    idx, targets = rows.batch(np.array([0]), CPU)
    assert CHARS.decode(idx[0].tolist()) == 'efghxy' and idx.shape[1] == 6   # both rows have the same prompt
    assert CHARS.decode(idx[1, :4].tolist()) == 'efgh' and (targets[0] >= 0).sum() == 3
    assert len(Rows([Pair('abc', 'xyz', 'x')], CHARS, None, 5, 'train').pairs[0][0][0]) == 6   # as long as fits
    with pytest.raises(UserError, match='block_size=2'):
        Rows(pairs[:3], CHARS, None, 2, 'train')


def test_the_ids_that_begin_a_text_stay_when_its_prompt_is_cut():
    tok = BpeTokenizer(KINDS['byte-level with a template'][0]())
    pair = Pair('hello ' * 9, 'yes', 'no')
    whole = [ids.tolist() for ids, _ in Rows([pair], tok, None, 999, 'train').pairs[0]]
    rows = Rows([pair], tok, None, len(whole[0]) - 5, 'train')   # the longest has one token more: 4 are too many
    assert tok.begin and rows.num_cut == 1
    for (ids, start), before in zip(rows.pairs[0], whole):
        assert ids.tolist() == [*tok.begin, *before[len(tok.begin) + 4:]]
        assert tok.decode(ids[start:]).strip().removesuffix('</s>') in ('yes', 'no')
    with pytest.raises(UserError, match='block_size=4'):   # <s>, the answer and </s> are left
        Rows([pair], tok, None, 4, 'train')


def test_a_long_conversation_loses_its_oldest_turns_but_not_its_system_message(chat):
    tok, template = chat
    system = {'role': 'system', 'content': 'yes'}
    turns = [{'role': role, 'content': f'{word} {i}'} for i in range(3) for role, word in
             (('user', 'why'), ('assistant', 'because'))]
    pair = Pair([system, *turns[:5]], 'because', 'no idea')
    longest = [len(row_of([system, *turns[n:5]], 'no idea', tok, template)[0]) for n in (0, 2, 4)]
    for room, kept in ((longest[0], 0), (longest[0] - 1, 2), (longest[1], 2), (longest[1] - 1, 4), (longest[2], 4)):
        rows = Rows([pair], tok, template, room - 1, 'train')
        ids, start = rows.pairs[0][1]
        assert tok.decode(ids[:start]) == template.render([system, *turns[kept:5]], add_generation_prompt=True)
        assert tok.decode(ids[start:]) == 'no idea<|im_end|>' and rows.num_cut == (kept > 0)
    with pytest.raises(UserError, match='fit into block_size'):   # the last question is never cut
        Rows([pair], tok, template, longest[2] - 2, 'train')


def test_the_checksum_tells_pairs_apart():
    def checksum(*pairs):
        return Rows(pairs, CHARS, None, 20, 'train').checksum()

    one, two = Pair('ab', 'c', 'd'), Pair('a', 'bc', 'd')   # of the same characters
    assert len({checksum(one), checksum(two), checksum(one, two), checksum(two, one)}) == 4
    assert checksum(one, two) == checksum(one, two)


# ---------------------------------------------------------------------------------------------------------------------
# epochs

@given(st.integers(1, 30), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 2**70))
@quick
def test_each_epoch_has_all_numbers_once_in_its_own_order_whatever_the_steps(count, steps, seed):
    ends = np.cumsum([0, *steps]).tolist()
    found = np.concatenate([in_epochs(count, 0, 0, seed), *(in_epochs(count, first, end, seed)
                                                            for first, end in zip(ends, ends[1:]))])
    whole = in_epochs(count, 0, 240 + 3 * count, seed)   # longer than any steps
    assert found.dtype == int and found.tolist() == whole[:sum(steps)].tolist()
    for epoch in range(3):
        assert sorted(whole[epoch * count:(epoch + 1) * count]) == list(range(count))


def test_the_order_differs_between_epochs_and_seeds():
    found = [in_epochs(50, first, first + 50, seed).tolist() for first in (0, 50) for seed in (1, 2)]
    assert len({str(numbers) for numbers in found}) == 4
