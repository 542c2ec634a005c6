"""
Losses with which a model learns what is preferred: from pairs of answers (dpo.py), or from rewards (grpo.py).

A row is a prompt with one answer. Its targets, (T,), are the ids one step ahead; those that are not of the answer are
negative. The reference is the model as it was at the start: what training moves away from is measured against it.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from flatgpt import lora
from model import GPT

LOSSES = ('dpo', 'ipo', 'simpo')
NORMALIZE = ('answer', 'token', 'constant')   # see token_weights()
MAX_LOGITS = 2**24   # numbers of one piece of logits: 64 MiB in float32


# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities

def token_log_probs(model: GPT, idx: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities in nats of targets, (B, T) in float32, after token ids idx, (B, T); 0 where a target
    is negative. Logits are computed for the other positions alone, in pieces that are computed again in the backward
    pass if one piece is not enough, so that a large vocabulary needs little memory. temperature: divides the logits."""
    counted = targets >= 0
    x = model.hidden_states(idx)[counted]                                             # (N, C), N targets that count
    wanted = targets[counted]                                                         # (N,)
    rows = max(MAX_LOGITS // model.config.vocab_size, 1)
    if len(x) <= rows:
        found = log_probs_of(model, x, wanted, temperature)
    else:
        pieces = zip(x.split(rows), wanted.split(rows))
        found = torch.cat([recompute(log_probs_of, model, *piece, temperature, use_reentrant=False)
                           for piece in pieces])
    return torch.zeros(targets.shape, device=found.device).masked_scatter(counted, found)


def log_probs_of(model: GPT, x: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities of targets, (N,), after hidden states x, (N, C)."""
    return -F.cross_entropy(model.compute_logits(x).float() / temperature, targets, reduction='none')


class LogProbs(nn.Module):
    """token_log_probs() of a model as a module, which is what DistributedDataParallel can wrap."""

    def __init__(self, model: GPT, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, idx, targets):
        return token_log_probs(self.model, idx, targets, self.temperature)


@contextlib.contextmanager
def adapters_off(model: GPT):
    """A context in which a model computes what it does without its adapters: the reference, without a second copy."""
    adapted = [module for module in model.modules() if isinstance(module, lora.LoRALinear)]
    scales = [module.scale for module in adapted]
    for module in adapted:
        module.scale = 0.0
    try:
        yield
    finally:
        for module, scale in zip(adapted, scales):
            module.scale = scale


def sums_and_lengths(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each row the log-probability of its answer, (B,), and its number of tokens, (B,), from those of its
    tokens, (B, T)."""
    return log_probs.sum(dim=1), (targets >= 0).sum(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# pairs of a better and a worse answer
#
# Each loss returns three tensors, (B,): the loss of a pair, and the implicit rewards of its chosen and its rejected
# answer. Arguments are log-probabilities of whole answers, (B,).

def dpo(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float,
        label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of direct preference optimization (Rafailov et al., 2023): -log sigmoid(margin), where the margin
    is the difference of the rewards beta · log(p / p of the reference). label_smoothing: the share of pairs that are
    expected to be the wrong way round (Mitchell, 2023)."""
    better = beta * (chosen - reference_chosen)
    worse = beta * (rejected - reference_rejected)
    loss = smooth_logistic(better - worse, label_smoothing)
    return loss, better.detach(), worse.detach()


def ipo(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float,
        chosen_length: Tensor, rejected_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of identity preference optimization (Azar et al., 2023, eq. 17): the squared distance of the
    margin from 1 / (2 beta), which stops its growth. The margin is of log-ratios per token of each answer."""
    better = chosen - reference_chosen
    worse = rejected - reference_rejected
    margin = better / chosen_length - worse / rejected_length
    loss = (margin - 1 / (2 * beta)) ** 2
    return loss, beta * better.detach(), beta * worse.detach()


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, chosen_length: Tensor, rejected_length: Tensor,
          label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of simple preference optimization (Meng et al., 2024): -log sigmoid(margin - gamma), where the
    rewards are beta times the mean log-probability per token. There is no reference."""
    better = beta * chosen / chosen_length
    worse = beta * rejected / rejected_length
    loss = smooth_logistic(better - worse - gamma, label_smoothing)
    return loss, better.detach(), worse.detach()


def smooth_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """Return -log sigmoid(margin) for the share 1 - label_smoothing of labels that are right, and -log sigmoid(-margin)
    for the others."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def preference_loss(loss: str, chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
                    chosen_length: Tensor, rejected_length: Tensor, beta: float, gamma: float = 0.0,
                    label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the loss of a name, one of LOSSES, returns."""
    if loss == 'dpo':
        return dpo(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing)
    if loss == 'ipo':
        return ipo(chosen, rejected, reference_chosen, reference_rejected, beta, chosen_length, rejected_length)
    return simpo(chosen, rejected, beta, gamma, chosen_length, rejected_length, label_smoothing)


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


def token_weights(lengths: Tensor, normalize: str, answers: int, tokens: float, longest: int) -> Tensor:
    """Return what each token of an answer weighs in the loss of a step, (N,), for answers of `lengths` tokens, (N,).
    answers, tokens: how many there are in the step, over all processes.

    'answer': each answer counts the same, its tokens share it (GRPO, Shao et al., 2024); so the tokens of a long wrong
    answer are punished less. 'token': each token counts the same (DAPO, Yu et al., 2025). 'constant': as 'token', but
    divided by the length that answers may have, `longest`, not by the one they have (Dr. GRPO, Liu et al., 2025)."""
    if normalize == 'answer':
        return 1 / (answers * lengths.float())
    divisor = tokens if normalize == 'token' else answers * longest
    return torch.full(lengths.shape, 1 / divisor, device=lengths.device)


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
