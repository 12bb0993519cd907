"""Reinforcement learning: objectives on attention and on tokens, distillation, rewards and rollouts."""

from .attention.recorder import AttentionRecorder
from .objectives.advantages import group_advantages, groups_with_signal
from .objectives.allocation import AllocationRL
from .objectives.allocation_fixed import FixedAllocation
from .objectives.allocation_supervised import AllocationDistillation, AllocationSFT
from .objectives.attention import AttentionRL
from .objectives.critique import CritiqueGRPO, CritiqueGRPOReleased
from .objectives.distillation import AttentionDistillation
from .objectives.objective import Objective
from .objectives.supervised import SFT, RejectionFineTune
from .objectives.token import CISPO, DAPO, GRPO, GSPO, DrGRPO, SWEDapo, TokenObjective
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
    "AllocationDistillation",
    "AllocationRL",
    "AllocationSFT",
    "AttentionDistillation",
    "AttentionRL",
    "AttentionRecorder",
    "CritiqueGRPO",
    "CritiqueGRPOReleased",
    "DrGRPO",
    "EndpointCritic",
    "FixedAllocation",
    "FormatReward",
    "GroundTruthCritic",
    "HTTPRetriever",
    "IndicativeCritic",
    "Objective",
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
