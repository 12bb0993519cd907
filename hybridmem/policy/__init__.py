"""Attention as the policy: objectives on attention and tokens, a teacher, and rewards."""

from .attention_rl import AttentionRL
from .critics import EndpointCritic, GroundTruthCritic, IndicativeCritic
from .critique import CritiqueGRPO, CritiqueGRPOReleased
from .distillation import AttentionDistillation
from .objectives import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    SFT,
    DrGRPO,
    RejectionFineTune,
    SWEDapo,
    TokenObjective,
    group_advantages,
    groups_with_signal,
)  # fmt: skip
from .ranking import RankingReward
from .recorder import AttentionRecorder
from .retrievers import BM25, HTTPRetriever
from .rewards import FormatReward, OverlongPenalty, Rewards, RewardSum, check_columns

__all__ = [
    "BM25",
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "SFT",
    "AttentionDistillation",
    "AttentionRL",
    "AttentionRecorder",
    "CritiqueGRPO",
    "CritiqueGRPOReleased",
    "DrGRPO",
    "EndpointCritic",
    "FormatReward",
    "GroundTruthCritic",
    "HTTPRetriever",
    "IndicativeCritic",
    "OverlongPenalty",
    "RankingReward",
    "RejectionFineTune",
    "RewardSum",
    "Rewards",
    "SWEDapo",
    "TokenObjective",
    "check_columns",
    "group_advantages",
    "groups_with_signal",
]
