"""Attention as the policy: objectives on attention and tokens, a teacher, and rewards."""

from .attention.recorder import AttentionRecorder
from .objectives.attention import AttentionRL
from .objectives.critique import CritiqueGRPO, CritiqueGRPOReleased
from .objectives.distillation import AttentionDistillation
from .objectives.token import (  # fmt: skip
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
)
from .rewards.critics import EndpointCritic, GroundTruthCritic, IndicativeCritic
from .rewards.functions import FormatReward, OverlongPenalty, Rewards, RewardSum, check_columns
from .rewards.ranking import RankingReward
from .rewards.retrievers import BM25, HTTPRetriever

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
