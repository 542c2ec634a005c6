"""
Losses with which a model learns what is preferred: from pairs of answers (dpo.py), or from rewards (grpo.py).

A row is a prompt with one answer. Its targets, (T,), are the ids one step ahead; those that are not of the answer are
negative. The reference is the model as it was at the start: what training moves away from is measured against it.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute

from flatgpt import lora
from model import GPT

LOSSES = ('dpo', 'ipo', 'simpo')
NORMALIZE = ('answer', 'token', 'constant')   # see token_weights()
MAX_LOGITS = 2**24   # numbers of one piece of logits: 64 MiB in float32


# ---------------------------------------------------------------------------------------------------------------------
# rows and their log-probabilities

def pad_rows(rows: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets, (N, T) each, of rows, each (token ids, where the answer begins). They are padded
    on the right; targets outside the answers are -1."""
    idx = [ids[:-1] for ids, _ in rows]
    targets = [torch.where(torch.arange(1, len(ids)) < start, -1, ids[1:]) for ids, start in rows]
    return pad_sequence(idx, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-1)


class LogProbs(nn.Module):
    """The log-probabilities of targets by a model, as a module, which is what DistributedDataParallel can wrap.
    temperature: divides the logits."""

    def __init__(self, model: GPT, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities in nats of targets, (B, T) in float32, after token ids idx, (B, T); 0 where a
        target is negative. Logits are computed for the other positions alone, in pieces that are computed again in the
        backward pass if one piece is not enough, so that a large vocabulary needs little memory."""
        counted = targets >= 0
        x = self.model.hidden_states(idx)[counted]                                    # (N, C), N targets that count
        wanted = targets[counted]                                                     # (N,)
        size = max(MAX_LOGITS // self.model.config.vocab_size, 1)
        if len(x) <= size:
            found = self.of_piece(x, wanted)
        else:
            pieces = zip(x.split(size), wanted.split(size))
            found = torch.cat([recompute(self.of_piece, *piece, use_reentrant=False) for piece in pieces])
        return torch.zeros(targets.shape, device=found.device).masked_scatter(counted, found)

    def of_piece(self, x, targets):
        """Return the log-probabilities of targets, (N,), after hidden states x, (N, C)."""
        logits = self.model.compute_logits(x).float() / self.temperature
        return -F.cross_entropy(logits, targets, reduction='none')


@contextlib.contextmanager
def adapters_off(model: GPT):
    """A context in which a model computes what it does without its adapters: the reference, without a second copy."""
    scales = {module: module.scale for module in model.modules() if isinstance(module, lora.LoRALinear)}
    for module in scales:
        module.scale = 0.0
    try:
        yield
    finally:
        for module, scale in scales.items():
            module.scale = scale


# ---------------------------------------------------------------------------------------------------------------------
# pairs of a better and a worse answer

def preference_loss(loss: str, sums: Tensor, reference: Tensor, lengths: Tensor, beta: float, gamma: float = 0.0,
                    label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the losses of pairs, (B,), and the implicit rewards of their answers, (2, B). sums, reference, lengths,
    (2, B) each: of the chosen answers, then of the rejected ones, the log-probabilities by the model and by the
    reference, and the numbers of tokens. loss: one of LOSSES.

    'dpo': -log sigmoid(margin), where the margin is the difference of the rewards beta · log(p / p of the reference)
    (Rafailov et al., 2023). 'ipo': the squared distance of the margin from 1 / (2 beta), which stops its growth; the
    margin is of log-ratios per token (Azar et al., 2023, eq. 17). 'simpo': -log sigmoid(margin - gamma), where the
    rewards are beta times the mean log-probability of a token; there is no reference (Meng et al., 2024).

    label_smoothing, for 'dpo' and 'simpo': the share of pairs that are expected to be the wrong way round (Mitchell,
    2023)."""
    if loss == 'simpo':
        rewards = beta * sums / lengths
        margin = rewards[0] - rewards[1] - gamma
    else:
        rewards = beta * (sums - reference)
        margin = rewards[0] - rewards[1]
    if loss == 'ipo':
        better, worse = (sums - reference) / lengths
        losses = (better - worse - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, rewards.detach()


# ---------------------------------------------------------------------------------------------------------------------
# rewards of answers that the model has drawn

def group_advantages(rewards: Tensor, divide_by_std: bool) -> Tensor:
    """Return the advantages of answers, (P, G), from their rewards, (P, G), of P questions with G answers each: how
    much better an answer is than the mean of its group (Shao et al., 2024, section 4.1.2).

    divide_by_std: divide by the standard deviation of the group, as GRPO does. Without it, questions that are nearly
    always or nearly never answered do not get more weight than others (Dr. GRPO, Liu et al., 2025)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if divide_by_std:
        centred = centred / (rewards.std(dim=1, keepdim=True) + 1e-4)   # a group of equal rewards stays zero
    return centred


def token_weights(targets: Tensor, normalize: str, answers: int, tokens: float, longest: int) -> Tensor:
    """Return what each token weighs in the loss of a step, (N, T): 0 where a target, (N, T), is negative. answers,
    tokens: how many there are in the step, over all processes.

    'answer': each answer counts the same, its tokens share it (GRPO, Shao et al., 2024); so the tokens of a long wrong
    answer are punished less. 'token': each token counts the same (DAPO, Yu et al., 2025). 'constant': as 'token', but
    divided by the length that answers may have, `longest`, not by the one they have (Dr. GRPO, Liu et al., 2025)."""
    counted = (targets >= 0).float()
    divisor = {'answer': answers * counted.sum(dim=1, keepdim=True), 'token': tokens, 'constant': answers * longest}
    return counted / divisor[normalize]


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip_low: float,
                clip_high: float) -> tuple[Tensor, Tensor]:
    """Return the clipped policy objective (Schulman et al., 2017, eq. 7), negative, summed over tokens; and which
    tokens were clipped, (B, T) of bool.

    log_probs: of the tokens by the model that learns, (B, T); old_log_probs: by the model that drew them. advantages:
    of each answer, (B,). weights: of each token, (B, T), 0 where there is none. A ratio of the probabilities below
    1 - clip_low or above 1 + clip_high gets no gradient where it already is on the side that the advantage asks for;
    a clip_high above clip_low lets unlikely tokens rise (DAPO, Yu et al., 2025)."""
    advantages = advantages[:, None]                                                  # (B, 1)
    ratio = (log_probs - old_log_probs).exp()                                         # (B, T)
    limited = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, limited * advantages)
    clipped = (limited * advantages < ratio * advantages) & (weights > 0)
    return -(weights * objective).sum(), clipped


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return an estimate of the KL divergence of the model from its reference at each token, (B, T), from the
    log-probabilities of tokens that the model has drawn: unbiased and never negative (k3, Schulman, 2020)."""
    log_ratio = reference - log_probs
    return log_ratio.exp() - log_ratio - 1
