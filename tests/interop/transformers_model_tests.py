"""transformers' model tests for every variant, run by scripts/transformers_tests.

The script copies this file next to test_modeling_common.py of transformers' source distribution, the only place where
its imports resolve. The source distribution lacks the tests of `generate` and of exporters, so the script adds empty
classes for them; tests/interop and tests/hybridmem cover both.
"""

import unittest

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from hybridmem import HybridMemConfig, HybridMemForCausalLM, HybridMemModel

from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

# The tests use these lists of built-in models to find the classes with a head, so custom classes must be added.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hybridmem"] = HybridMemForCausalLM.__name__
MODEL_MAPPING_NAMES["hybridmem"] = HybridMemModel.__name__

TIME, PERSISTENT = 7, 2  # longer than the window, the segment and the chunk, and divisible by none of them


class Tester:
    """Tiny model and its inputs, with the attributes that the tests require."""

    batch_size, seq_length = 3, TIME
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    is_training = True

    def __init__(self, variant):
        self.variant = variant
        # Columns of an attention map: persistent tokens, in mac recalled tokens, and tokens.
        self.key_length = PERSISTENT + TIME * (2 if variant == "mac" else 1)

    def get_config(self):
        return HybridMemConfig(
            variant=self.variant,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=8,
            attention_window=4,
            segment_length=4,
            num_persistent_tokens=PERSISTENT,
            memory_heads=2,
            memory_head_dim=8,
            memory_chunk_size=4,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), dict(
            input_ids=ids_tensor(shape, self.vocab_size), attention_mask=random_attention_mask(shape)
        )


class VariantTests(ModelTesterMixin):
    all_model_classes = (HybridMemModel, HybridMemForCausalLM)
    test_can_init_all_missing_weights_before_2023 = (
        True  # the tests read the year from a file header, which this file lacks
    )
    variant: str

    def setUp(self):
        self.model_tester = Tester(self.variant)

    def test_generation_tester_mixin_inheritance(self):
        self.skipTest("the tests of `generate` are not in the source distribution")


class MacTest(VariantTests, unittest.TestCase):
    variant = "mac"

    def test_retain_grad_hidden_states_attentions(self):
        self.skipTest("mac's map is put together from its segments' maps to be read: no gradient goes through it")


class MagTest(VariantTests, unittest.TestCase):
    variant = "mag"


class MalTest(VariantTests, unittest.TestCase):
    variant = "mal"


class LmmTest(VariantTests, unittest.TestCase):
    variant = "lmm"
    has_attentions = False  # memory without attention


class SwaTest(VariantTests, unittest.TestCase):
    variant = "swa"


class FullTest(VariantTests, unittest.TestCase):
    variant = "full"
