"""Neural memory beside short-range attention, and rewards that train what a model attends to."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model.configuration import HybridMemConfig
from .model.modeling import HybridMemForCausalLM, HybridMemModel

__version__ = "0.1.0"

AutoConfig.register(HybridMemConfig.model_type, HybridMemConfig)
AutoModel.register(HybridMemConfig, HybridMemModel)
AutoModelForCausalLM.register(HybridMemConfig, HybridMemForCausalLM)

__all__ = ["HybridMemConfig", "HybridMemForCausalLM", "HybridMemModel"]
