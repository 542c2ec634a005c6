"""
Pairs of a better and a worse answer to one prompt: out of files, to token ids, to batches.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from flatgpt import alignment
from flatgpt.conversation import Message, brief, messages_from, text_of, without_oldest_turn
from flatgpt.corpus import find_files, read_records
from flatgpt.errors import UserError
from flatgpt.machine import to_device

SPEAKERS = {'Human': 'user', 'Assistant': 'assistant'}   # in texts such as those of Anthropic/hh-rlhf


class Pair(NamedTuple):
    prompt: str | list[Message]   # a text that the answers continue, or messages that they answer
    chosen: str
    rejected: str


def read(paths: str) -> list[Pair]:
    """Return the pairs in comma-separated files, globs and folders. UserError names the record that is none."""
    found = [pair_of(record.value, record.where) for path in find_files(paths) for record in read_records(path)]
    if not found:
        raise UserError(f'{paths} has no pair')
    return found


def pair_of(record: dict, where: str) -> Pair:
    """Return the pair of one record. {"prompt" or "messages", "chosen", "rejected"}: the answers are texts, or lists of
    messages that are the answer alone or the whole conversation; a prompt is a text or a list of messages. Without a
    prompt, chosen and rejected are whole conversations, as messages or as "\\n\\nHuman: ...\\n\\nAssistant: ...".
    UserError, which begins with `where`, for anything else."""
    if not isinstance(record, dict) or not {'chosen', 'rejected'} <= record.keys():
        raise UserError(f'{where}: expected an object with "prompt", "chosen" and "rejected", found {brief(record)}')
    prompt = record.get('prompt', record.get('messages'))
    if isinstance(prompt, list):
        prompt = messages_from(prompt, f'{where}, prompt', answered=False)
    elif prompt is not None:
        text_of(prompt, f'{where}, prompt')
    prompts = []
    answers = []
    for name in ('chosen', 'rejected'):
        answer = record[name]
        before = prompt
        if prompt is None and isinstance(answer, str):
            parts = re.split(r'\n\n(Human|Assistant):', f'\n\n{answer.strip()}')
            answer = [{'role': SPEAKERS[who], 'content': said.strip()} for who, said in zip(parts[1::2], parts[2::2])]
        elif isinstance(prompt, list) and isinstance(answer, str):
            answer = [{'role': 'assistant', 'content': answer}]
        if isinstance(answer, list):
            asked = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt or []
            alone = bool(answer) and isinstance(answer[0], dict) and answer[0].get('role') == 'assistant'
            *before, last = messages_from([*asked, *answer] if alone else answer, f'{where}, {name}')
            if last['role'] != 'assistant':
                raise UserError(f'{where}, {name}: its last message is of the {last["role"]}, expected the assistant')
            answer = last['content']
        if before is None or not text_of(answer, f'{where}, {name}').strip():
            raise UserError(f'{where}, {name}: {brief(record[name])}, expected an answer to a prompt, not empty')
        prompts.append(before)
        answers.append(answer)
    if prompts[0] != prompts[1]:
        raise UserError(f'{where}: chosen and rejected answer different prompts')
    return Pair(prompts[0], *answers)


def hold_out(pairs: Sequence[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on, and those to validate on: the pairs of this fraction of all prompts, at least one,
    whose hash is smallest. No prompt is in both, and the order of the pairs does not matter."""
    hashes = [hashlib.sha256(repr(pair.prompt).encode()).digest() for pair in pairs]
    known = sorted(set(hashes))
    if len(known) < 2:
        raise UserError('all pairs have one prompt: two or more are needed to hold one out, or give --val_pairs')
    last = known[max(round(fraction * len(known)), 1) - 1]
    train = [pair for pair, number in zip(pairs, hashes) if number > last]
    return train, [pair for pair, number in zip(pairs, hashes) if number <= last]


def row_of(prompt: str | list[Message], answer: str, tok, template) -> tuple[np.ndarray, int]:
    """Return the token ids of a prompt with its answer, (T,), and where the answer begins; they end with what ends an
    answer. template: the ChatTemplate of the model, or None: then the prompt must be a text. Its ids and those of the
    answer are those of the whole text: a blank between them may belong to the first word of the answer."""
    if template is None and not isinstance(prompt, str):
        raise UserError('these pairs have messages and the model has no chat template: give prompts as texts, or use '
                        'an instruct model')
    if template is None:
        before, whole = (tok.encode_texts([text], end=False) for text in (prompt, prompt + answer))
        n = min(len(before), len(whole))
        start = int((before[:n] == whole[:n]).cumprod().sum())
        return np.concatenate((whole, tok.ends[:1])).astype(np.int64), max(start, 1)
    messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
    ids, learned = template.training_ids(tok, [*messages, {'role': 'assistant', 'content': answer}])
    before = np.flatnonzero(~learned)   # the answer is the last run of what is learned
    end = np.flatnonzero(learned)[-1] + 1
    return ids[:end], int(before[before < end][-1]) + 1


def rows_that_fit(pair: Pair, tok, template, block_size: int) -> tuple[list, bool]:
    """Return the rows of the chosen and the rejected answer of a pair, each (ids, where the answer begins), and whether
    their prompt was cut to fit into block_size: a text at its beginning, but not the ids that begin every text; a
    conversation by its oldest turns, but not its system message. [] instead of the rows if they cannot fit."""
    prompt = pair.prompt
    kept = len(tok.begin)
    while True:
        rows = [row_of(prompt, answer, tok, template) for answer in (pair.chosen, pair.rejected)]
        excess = max(len(ids) for ids, _ in rows) - 1 - block_size
        cut = prompt is not pair.prompt
        if excess <= 0:
            return rows, cut
        if template is None and excess + kept < min(start for _, start in rows):
            return [(np.delete(ids, slice(kept, kept + excess)), start - excess) for ids, start in rows], True
        prompt = without_oldest_turn(prompt) if isinstance(prompt, list) else []
        if not prompt:
            return [], cut


class Rows:
    """Pairs as token ids: .pairs has the rows of each, those of rows_that_fit(). .num_cut: how many prompts were cut;
    .num_left_out: how many pairs do not fit into block_size, or have equal answers. UserError if none is left."""

    def __init__(self, pairs: Sequence[Pair], tok, template, block_size: int, name: str):
        self.pairs = []
        self.num_cut = 0
        for pair in tqdm(pairs, desc=name, unit=' pairs', leave=False, disable=None):
            rows, cut = rows_that_fit(pair, tok, template, block_size)
            if rows and pair.chosen != pair.rejected:
                self.pairs.append(rows)
                self.num_cut += int(cut)
        if not self.pairs:
            raise UserError(f'no pair of {name} has answers that differ and fit into block_size={block_size}')
        self.num_left_out = len(pairs) - len(self.pairs)
        lengths = np.array([[len(ids) - 1 for ids, _ in rows] for rows in self.pairs])
        self.lengths = lengths.sum(axis=1)   # tokens of both rows of a pair
        self.longest = int(lengths.max())    # tokens of a row

    def __len__(self):
        return len(self.pairs)

    def checksum(self) -> int:
        """Return the CRC-32 of all ids, which tells these pairs from others."""
        number = 0
        for rows in self.pairs:
            for ids, start in rows:
                number = zlib.crc32(np.append(ids, start).tobytes(), number)
        return number

    def spread(self, count: int) -> np.ndarray:
        """Return the numbers of at most `count` pairs, spread evenly over all."""
        return np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)

    def batch(self, numbers: Sequence[int], device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and targets, (2 B, T) each, of B pairs: the chosen answers, then the rejected ones."""
        rows = [self.pairs[i][which] for which in (0, 1) for i in numbers]
        parts = alignment.pad_rows([(torch.from_numpy(ids), start) for ids, start in rows])
        return tuple(to_device(part, device) for part in parts)


def in_epochs(count: int, first: int, end: int, seed: int) -> np.ndarray:
    """Return the numbers, below count, at positions first to end - 1 of epochs one after another. Each epoch has all
    numbers once, in an order that is a pure function of (seed, epoch)."""
    found = [np.array([], int)]
    for epoch in range(first // count, -(-end // count)):
        raw = np.random.Philox(key=seed % 2**64, counter=[0, epoch, 0, 0]).random_raw(count)
        order = np.argsort(raw, kind='stable')
        found.append(order[max(first - epoch * count, 0):end - epoch * count])
    return np.concatenate(found)
