"""What answers to the questions of held_out.jsonl are like, for eval.py --check and grpo.py --reward."""


def short(question: dict, answer: str) -> float:
    """1.0 if an answer is not longer than the chosen one, else 0.0."""
    return float(len(answer.strip()) <= len(question['chosen']))


def right(question: dict, answer: str) -> float:
    """1.0 if an answer ends with the result, whatever is before it, else 0.0."""
    return float(answer.strip().endswith(question['chosen']))
