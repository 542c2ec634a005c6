"""
Rollouts: the questions of each step of grpo.py, the answers that the model draws for them, and the rows that it learns
from. All of it is a pure function of (seed, step), whatever the number of processes.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatgpt import alignment, rewards, tasks
from flatgpt.answers import Answer, grow
from flatgpt.errors import UserError
from flatgpt.pairs import in_epochs

FIGURES = ('reward', 'length', 'entropy', 'no_signal')   # means over the answers of a step, as totals() has them


class Questions:
    """The questions of a run: those of each step, and .val, which are held out.

    reward, path, val_path: the options reward, questions and val_questions of grpo.py. num_val: how many are held out.
    longest: tokens of a prompt. .notes: lines for the user. UserError.
    """

    def __init__(self, reward: str, path: str, val_path: str, num_val: int, tok, longest: int):
        kind = path or reward
        self.kind = kind if kind in tasks.KINDS else ''   # of generated questions
        self.notes = []
        of_tasks = ':' not in reward
        self.train = [] if self.kind else rewards.read(path, of_tasks)
        if val_path:
            self.val = rewards.read(val_path, of_tasks)[:num_val]
        elif self.kind:
            self.val = rewards.generate(self.kind, 'val', num_val, held_out=True)
        else:
            held_out = min(num_val, max(len(self.train) // 10, 1))
            self.val = self.train[-held_out:]
            self.train = self.train[:-held_out]
        self.train = self.short_ones(self.train, tok, longest, path)
        self.val = self.short_ones(self.val, tok, longest, val_path or 'the held-out questions')
        if not self.val or not (self.train or self.kind):
            raise UserError(f'{val_path or path or reward}: expected questions to learn from, and others to evaluate '
                            f'on, of at most {longest} tokens (block_size - max_new_tokens)')

    def short_ones(self, questions, tok, longest, where):
        """Return the questions of at most `longest` tokens; a note says how many others there are."""
        found = [question for question in questions if len(rewards.prompt_ids(tok, question)) <= longest]
        if len(found) < len(questions):
            self.notes.append(f'{where}: {len(questions) - len(found):,} of {len(questions):,} questions are longer '
                              f'than {longest} tokens (block_size - max_new_tokens) and are left out')
        return found

    def of_step(self, seed: int, step: int, n: int) -> list[dict]:
        """Return the n questions of a step: generated ones, or the next n of the file, in an order that differs from
        one pass through it to the next."""
        if self.kind:
            return rewards.generate(self.kind, f'{seed} {step}', n, held_out=False)
        numbers = in_epochs(len(self.train), step * n, (step + 1) * n, seed)
        return [self.train[i] for i in numbers]

    def checksum(self) -> int:
        """Return a number that stands for the held-out questions."""
        return zlib.crc32(repr(self.val).encode(errors='surrogatepass'))


@dataclass
class Rollout:
    """The answers to P questions, G to each, as N = P G rows, and what they are worth. What pad() and grpo.py set is of
    the rows that are learned from."""
    rows: list[tuple[Tensor, int]]     # (token ids of question and answer, where the answer begins)
    rewards: Tensor                    # (P, G)
    drawn_with: Tensor                 # (N,), log-probabilities of the answers as they were drawn
    advantages: Tensor | None = None   # (N,)
    idx: Tensor | None = None          # (N, T), token ids, padded on the right
    targets: Tensor | None = None      # (N, T), ids one step ahead; -1 outside the answers
    weights: Tensor | None = None      # (N, T), of the tokens in the loss
    reference: Tensor | None = None    # (N, T), log-probabilities by the first model
    log_probs: Tensor | None = None    # (N, T), by the policy before the first update

    def totals(self) -> Tensor:
        """Return the sums over the answers of FIGURES, in float64. The length has the end token. The entropy is
        estimated: the negative log-probability of a token, averaged over an answer."""
        lengths = torch.tensor([len(ids) - start for ids, start in self.rows])
        alike = (self.rewards == self.rewards[:, :1]).all(dim=1)   # a group from which nothing is learned
        figures = (self.rewards, lengths, -self.drawn_with / lengths, alike[:, None].expand_as(self.rewards))
        return torch.stack([figure.double().sum() for figure in figures])

    def pad(self, kept: Tensor, device: torch.device):
        """Set the rows to learn from, those that are kept, (N,) of bool: one at least, DDP needs a backward pass."""
        numbers = kept.nonzero()[:, 0].tolist() or [0]
        self.rows = [self.rows[i] for i in numbers]
        self.advantages = self.advantages[numbers].to(device)
        self.idx, self.targets = (part.to(device) for part in alignment.pad_rows(self.rows))


def draw(model, tok, questions: Sequence[dict], reward_of: rewards.Reward, group_size: int, max_new_tokens: int,
         temperature: float, seed: int, step: int, first_row: int, must_end: bool = False) -> Rollout:
    """Return group_size answers of a model to each question, with their rewards. first_row: the number of the first
    answer among those of the step; the random numbers of an answer depend on it, the seed and the step. must_end: an
    answer that max_new_tokens cuts off gets nothing; else a model may learn not to end."""
    prompts = [rewards.prompt_ids(tok, question) for question in questions]
    answers = [Answer(tok, ids, max_new_tokens) for ids in prompts for _ in range(group_size)]
    for _ in grow(model, answers, temperature=temperature, seed=seed * 1_000_003 + step, first_row=first_row):
        pass
    values = [0.0 if must_end and answer.finish == 'length' else reward_of(questions[i // group_size], answer.text)
              for i, answer in enumerate(answers)]
    rows = [(torch.cat((answer.prompt_ids, torch.tensor(answer.ids))), len(answer.prompt_ids)) for answer in answers]
    return Rollout(rows, rewards=torch.tensor(values).view(len(questions), group_size),
                   drawn_with=torch.tensor([answer.log_prob for answer in answers]))
