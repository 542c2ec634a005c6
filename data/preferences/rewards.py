"""What an answer to a question of held_out.jsonl is like, for --check of eval.py and --reward of grpo.py."""


def polite(question: dict, answer: str) -> float:
    """1.0 if an answer ends by asking whether there is anything else, else 0.0."""
    return float(answer.strip().endswith(('Anything else?', '还有问题吗？')))


def short(question: dict, answer: str) -> float:
    """1.0 if an answer is the result and at most two characters more, else 0.0."""
    return float(len(answer.strip()) <= len(question['result']) + 2)
