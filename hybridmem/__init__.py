"""Neural memory with short-range attention, and reinforcement learning of attention policies."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hybridmem_kernels import MemoryMLPState, MemoryState

from .model.attention import AttentionState
from .model.configuration import HybridMemConfig
from .model.convolution import ConvolutionState
from .model.heads import FullKeys, HeadsState, WindowKeys
from .model.memory import HeadMemoryState, NeuralMemoryState
from .model.mixers import BranchStates, OpenSegment, SegmentBuffer, SegmentStates
from .model.modeling import HybridMemForCausalLM, HybridMemModel
from .model.sequence import LastDocument
from .model.sinks import Places
from .model.state import KeyBuffer, PlainKeys

__version__ = "0.1.0rc1"

AutoConfig.register(HybridMemConfig.model_type, HybridMemConfig)
AutoModel.register(HybridMemConfig, HybridMemModel)
AutoModelForCausalLM.register(HybridMemConfig, HybridMemForCausalLM)

# Checkpoints are loaded with weights_only, which allows only tensors, plain values and these tuples of tensors.
torch.serialization.add_safe_globals(
    [
        AttentionState,
        BranchStates,
        ConvolutionState,
        FullKeys,
        HeadMemoryState,
        HeadsState,
        KeyBuffer,
        LastDocument,
        MemoryMLPState,
        MemoryState,
        NeuralMemoryState,
        OpenSegment,
        Places,
        PlainKeys,
        SegmentBuffer,
        SegmentStates,
        WindowKeys,
    ]
)

__all__ = ["HybridMemConfig", "HybridMemForCausalLM", "HybridMemModel"]
