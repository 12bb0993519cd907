"""Attention as the policy: objectives on attention and tokens, a teacher, and rewards."""

from .attention_rl import AttentionRL
from .distillation import AttentionDistillation
from .objectives import CISPO, DAPO, GRPO, GSPO, SFT, DrGRPO, TokenObjective, group_advantages, groups_with_signal
from .recorder import AttentionRecorder
from .rewards import FormatReward, OverlongPenalty, Rewards, RewardSum, check_columns

__all__ = [
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "SFT",
    "AttentionDistillation",
    "AttentionRL",
    "AttentionRecorder",
    "DrGRPO",
    "FormatReward",
    "OverlongPenalty",
    "RewardSum",
    "Rewards",
    "TokenObjective",
    "check_columns",
    "group_advantages",
    "groups_with_signal",
]
