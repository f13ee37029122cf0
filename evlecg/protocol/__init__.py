"""Answers as text, scored as ECGBench scores them.

items, replies = ..., read_replies(Path("predictions.jsonl"))
scores = score(join(items, replies), parser="pulse")
scores.subsets["ptb-test"].headline        # auc_hard with counts and interval
compare(AUC_HARD, {"a": scores_a.subsets["ptb-test"].scored, ...})
"""

from evlecg.protocol.bench import SUBSETS, Item, Subset, published
from evlecg.protocol.judged import JUDGED, Verdicts, read_verdicts
from evlecg.protocol.parsers import PARSERS, Named, Parser
from evlecg.protocol.replies import Joined, Reply, ReplyLog, join, model_of, read_replies
from evlecg.protocol.scores import SEED, Read, SubsetScores, TextScores, score, subset_of

__all__ = [
    "JUDGED",
    "PARSERS",
    "SEED",
    "SUBSETS",
    "Item",
    "Joined",
    "Named",
    "Parser",
    "Read",
    "Reply",
    "ReplyLog",
    "Subset",
    "SubsetScores",
    "TextScores",
    "Verdicts",
    "join",
    "model_of",
    "published",
    "read_replies",
    "read_verdicts",
    "score",
    "subset_of",
]
