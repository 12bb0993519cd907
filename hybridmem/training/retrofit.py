"""Lightning module for retrofits: the heads of a pretrained model learn to read a memory beyond their window."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import AutoConfig

from hybridmem.checks import at_least, one_of
from hybridmem.convert import convert
from hybridmem.convert.memories import add_memories
from hybridmem.convert.weights import available_memory
from hybridmem.data.trainer_state import accumulations
from hybridmem.distributed import global_mean_weights
from hybridmem.metrics.bits import NatsPerToken
from hybridmem.model.configuration import HybridMemConfig
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.training.checkpoints.contents import (
    check_same_model,
    load_policy,
    name_optimizer_states,
    tokenizer_of_policy,
)
from hybridmem.training.checkpoints.loading import load_checkpoint
from hybridmem.training.checkpoints.model_card import public, training_facts

from .errors import named
from .optimizers import OptimizerFactory
from .retrofit_losses import (
    Batch,
    beyond_window,
    every_source,
    kl_to_base,
    nats_beyond,
    read,
    regress_heads,
    with_gradients,
)
from .schedules import SchedulerFactory, WarmupCosine, check_schedule, scheduled_steps

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")  # projections with adapters by default
WAYS = ("full", "window", "hybrid")  # passes over a validation row
STATE_BYTES = 16  # per trained weight: the weight, its gradient and AdamW's two moments, in float32
LOGIT_BYTES = 20  # per logit in stage `kl`: both models' logits, their logarithms and a gradient


class RetrofitModule(L.LightningModule):
    """Training of the memories that a converted model gains, with its own weights frozen.

    Stage `regression` reads each batch once with full attention. It fits window and memory to the full output of every
    layer, one layer at a time, without a backward pass through the base model. Stage `kl` trains the whole model to
    predict the base model's next-token distribution. Both losses cover the tokens beyond window and sinks. The teacher
    is the model itself with all heads `full`.

    Memories and adapters are float32 in every precision. The base model uses the trainer's precision; `bf16-true`
    halves its memory.

    Args:
        base: Hugging Face folder or name of a supported family, converted folder, or checkpoint of an earlier stage.
        stage: `regression` or `kl`.
        head_sources: one source for all heads, or a list of sources for each layer and KV head.
        attention_window: window of heads without full attention. None: a converted base's own, or else 256.
        num_sink_tokens: sink tokens of heads without full attention. None: a converted base's own, or else 4.
        memory: settings of new memories, named as in HybridMemConfig, such as {memory_depth: 2}.
        frozen: patterns of memory parameters to freeze for ablations, such as "q_map.*".
        lora: settings of PEFT's LoraConfig, for stage `kl`; adapters are on q, k, v and o by default. None: train only
            the memories.
        optimizer: optimiser of the trained parameters, in one group.
        lr_scheduler: learning-rate schedule over the optimiser steps of the run.
        attn_implementation: `eager`, `sdpa`, `flex_attention` or `flash_attention_2`.

    Raises:
        ValueError: incompatible settings, before training starts.
    """

    def __init__(
        self,
        base: str,
        stage: Literal["regression", "kl"] = "regression",
        head_sources: list[list[str]] | str = "memory",
        attention_window: int | None = None,
        num_sink_tokens: int | None = None,
        memory: dict[str, Any] | None = None,
        frozen: list[str] | None = None,
        lora: dict[str, Any] | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory = WarmupCosine,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        one_of(("regression", "kl"), stage=stage)
        at_least(1, attention_window=attention_window)
        at_least(0, num_sink_tokens=num_sink_tokens)
        if lora is not None and stage == "regression":
            raise ValueError("stage=regression freezes the base model; set lora to null, or stage to kl")
        self.base, self.stage, self.head_sources = base, stage, head_sources
        self.attention_window, self.num_sink_tokens = attention_window, num_sink_tokens
        self.memory, self.frozen = memory, frozen or []
        self.lora = None if lora is None else {"target_modules": list(PROJECTIONS), **lora}
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.attn_implementation = attn_implementation
        self.model: Any = None  # HybridMemForCausalLM, wrapped in PEFT's model with lora
        self.nats = nn.ModuleDict({way: NatsPerToken() for way in WAYS})
        self._batch_started = 0.0

    @property
    def has_started(self) -> bool:
        """True once a training batch has begun; earlier errors are errors in settings."""
        return self._batch_started > 0

    @property
    def causal(self) -> HybridMemForCausalLM:
        """The causal LM, with any adapters in its layers."""
        model = self.model if self.lora is None else self.model.get_base_model()
        assert isinstance(model, HybridMemForCausalLM)
        return model

    @property
    def config(self) -> HybridMemConfig:
        """The model's configuration."""
        return self.causal.config

    @property
    def reach(self) -> int:
        """Number of tokens that a token's window and sinks cover."""
        return self.config.attention_window + self.config.num_sink_tokens

    def setup(self, stage: str) -> None:
        """Raise a ValueError if the run accumulates gradients, which would average batches instead of tokens."""
        size = max(accumulations(self.trainer))
        if stage == "fit" and size > 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={size} is not supported by RetrofitModule; set it to 1, and raise "
                "data.init_args.batch_size or trainer.devices instead"
            )

    def configure_model(self) -> None:
        """Load the base model once, add memories, and freeze everything else."""
        if self.device_mesh is not None:
            raise ValueError("RetrofitModule needs whole weights on every device; set trainer.strategy to auto or ddp")
        if self.model is not None:
            return
        try:
            model = self._load()
        except MemoryError as error:
            raise ValueError(f"base={self.base!r}: {error}") from error
        model.set_attn_implementation(self.attn_implementation)
        model.requires_grad_(False)
        if self.lora is not None:
            self.model = _with_adapters(model, self.lora)
        else:
            self.model = model
        trained = 0
        for name, parameter in self._memory_parameters().items():
            wanted = not any(fnmatch(name.split(".memory.")[1], pattern) for pattern in self.frozen)
            trained += parameter.requires_grad_(wanted).numel() if wanted else 0
        if not trained:
            raise ValueError(
                f"head_sources and frozen={self.frozen} leave no memory to train; set some heads to memory, or shorten "
                "frozen"
            )

    def _load(self) -> HybridMemForCausalLM:
        """Return the base model with the memories that `head_sources` requests."""
        window, sinks = self.attention_window, self.num_sink_tokens
        if _is_ours(self.base):
            with named("base"):
                _check_no_adapters(self.base)
                model = load_policy(self.base)
            if not isinstance(model, HybridMemForCausalLM):
                raise ValueError(
                    f"base={self.base!r} is not a converted model; give a converted model, or a model to convert"
                )
            config = model.config
            config.attention_window = config.attention_window if window is None else window
            config.num_sink_tokens = config.num_sink_tokens if sinks is None else sinks
            if config.attention_window > config.max_position_embeddings:
                raise ValueError(
                    f"attention_window={window} is longer than the model's context of "
                    f"{config.max_position_embeddings} tokens; set it to at most {config.max_position_embeddings}"
                )
        else:
            model = convert(self.base, 256 if window is None else window, 4 if sinks is None else sinks)
        model.float()
        add_memories(model, self.head_sources, self.memory)
        return model.eval()

    def _memory_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if ".memory." in name}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RetrofitModule":
        """Keep the dtype of memories and adapters when a precision plugin converts the module."""
        parameters = () if self.model is None else (*self._memory_parameters().values(), *self._trained())
        kept = {p: p.data for p in parameters}
        super()._apply(fn, recurse)
        for parameter, before in kept.items():
            parameter.data = before.to(parameter.device)
        return self

    def train(self, mode: bool = True) -> "RetrofitModule":
        """Set the mode, but keep a model without adapters in eval mode, without dropout."""
        super().train(mode)
        if self.model is not None and self.lora is None:
            self.model.eval()
        return self

    def check_data(self, data: L.LightningDataModule) -> None:
        """Build the model, and raise a ValueError if it cannot be trained on this data."""
        self.configure_model()
        own = tokenizer_of_policy(self.base)
        if own is not None and own.get_vocab() != data.tokenizer.get_vocab():
            raise ValueError(
                f"tokenizer={data.hparams.get('tokenizer')!r} differs from the tokenizer of base={self.base!r}; set "
                "data.init_args.tokenizer to the base model's folder or name"
            )
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer's largest id is {data.vocab_size - 1}, but the model's vocab_size is "
                f"{self.config.vocab_size}; set data.init_args.tokenizer to the base model's tokenizer"
            )
        tokens = 0
        for part in getattr(data, "parts", [data]):
            length = part.hparams.get("sequence_length")
            if length is None:
                continue
            if length <= self.reach:
                raise ValueError(
                    f"sequence_length={length} must exceed attention_window + num_sink_tokens = {self.reach}, or no "
                    "token needs the memory; raise it, or lower attention_window"
                )
            tokens = max(tokens, length * part.hparams.get("batch_size", 1))
        self._check_memory(tokens)

    def _check_memory(self, tokens: int) -> None:
        """Raise a ValueError if memory is too small for the optimiser and the logits in addition to the model."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        logits = tokens * self.config.vocab_size * LOGIT_BYTES if self.stage == "kl" else 0
        needed, free = trained * STATE_BYTES + logits, available_memory()
        if free is not None and needed > free:
            raise ValueError(
                f"stage={self.stage} needs {needed / 1e9:.1f} GB of memory in addition to the model, and "
                f"{free / 1e9:.1f} GB are free; lower batch_size or sequence_length, or use a larger machine"
            )

    def check_schedule(self, trainer: L.Trainer) -> None:
        """Raise a ValueError if the learning-rate schedule cannot run for trainer.max_steps."""
        if trainer.max_steps > 0:
            check_schedule(self.lr_scheduler, trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the clock."""
        self._batch_started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the throughput."""
        tokens = batch["input_ids"].numel() * self.trainer.world_size
        self.log("train/tokens_per_second", tokens / (time.perf_counter() - self._batch_started))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the current stage."""
        beyond = beyond_window(batch["document_ids"], self.reach)
        loss = self._regression(batch, beyond) if self.stage == "regression" else self._kl(batch, beyond)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        return loss

    def _regression(self, batch: Batch, beyond: Tensor) -> Tensor:
        fit = regress_heads(self.causal, batch, beyond)
        return with_gradients(fit.errors.mean(), fit.gradients, self._trained())

    def _kl(self, batch: Batch, beyond: Tensor) -> Tensor:
        model = self.causal
        with torch.no_grad(), self._without_adapters():
            wanted = read(model, batch, every_source(model, "full"))[beyond]
        found = read(model, batch, None)[beyond]
        (share,) = global_mean_weights(beyond.sum())  # ranks may have different numbers of tokens beyond the window
        return kl_to_base(model, found, wanted) / beyond.sum().clamp(min=1) * share.float()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _without_adapters(self) -> Any:
        return nullcontext() if self.lora is None else self.model.disable_adapter()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update nats per token beyond the window, for full attention, the window alone and the hybrid."""
        model, labels = self.causal, batch["shift_labels"]
        counted = beyond_window(batch["document_ids"], self.reach) & (labels >= 0)
        for way, source in zip(WAYS, ("full", "none", None), strict=True):
            with self._without_adapters() if source else nullcontext():
                hidden = read(model, batch, None if source is None else every_source(model, source))
                metric: Any = self.nats[way]
                metric.update(nats_beyond(model, hidden, labels, counted))

    def on_validation_epoch_end(self) -> None:
        """Log nats per token, and the fraction of the gap between window and full attention that memory recovers."""
        nats: dict[str, Tensor] = {}
        for way, metric in self.nats.items():
            nats[way] = metric.compute()  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]
            self.log(f"val/nats/{way}", nats[way].float(), prog_bar=way == "hybrid", sync_dist=True)
        gap = nats["window"] - nats["full"]
        if gap != 0:
            self.log("val/recovered", ((nats["window"] - nats["hybrid"]) / gap).float(), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Compute the validation metrics."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        """Reject prediction, which needs an exported model.

        Raises:
            ValueError: always.
        """
        raise ValueError("RetrofitModule does not support predict; export the checkpoint, or run hybridmem validate")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return an optimiser of all trained parameters and the schedule that steps with it."""
        with named("optimizer"):
            optimizer = self.optimizer(self._trained())
        with named("lr_scheduler"):
            steps = scheduled_steps(self.trainer, self.trainer.estimated_stepping_batches)
            scheduler = self.lr_scheduler(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, the tokenizer and the facts for the model card."""
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["hybridmem_config"] = self.config.to_dict()
        checkpoint["lora"] = self.lora
        checkpoint["tokenizer"] = None if data is None else data.hparams.get("tokenizer")
        name_optimizer_states(checkpoint, self.named_parameters(), self.trainer.optimizers)
        facts = training_facts(data, self.trainer.callback_metrics, f"retrofit, stage {self.stage}")
        facts["data"] |= {"base model": public(self.base)}
        checkpoint["facts"] = facts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject another model's checkpoint."""
        check_same_model(self.config, checkpoint)


def _is_ours(base: str) -> bool:
    """Return True if `base` is a converted folder or a checkpoint, and False if it still needs converting."""
    if Path(base).suffix == ".ckpt":
        return True
    try:
        return AutoConfig.from_pretrained(base).model_type == HybridMemConfig.model_type
    except (OSError, ValueError, KeyError):
        return False  # the conversion reports the error


def _check_no_adapters(base: str) -> None:
    """Raise a ValueError if `base` is a checkpoint with adapters, which would change the teacher as well."""
    if Path(base).suffix == ".ckpt" and load_checkpoint(base, weights=False).get("lora"):
        raise ValueError(
            f"{base} has adapters, so its full attention is no longer the base model's: resume that run with "
            "--ckpt_path and a larger trainer.max_steps, or start from the stage before it"
        )


def _with_adapters(model: Any, settings: dict[str, Any]) -> Any:
    """Return the model inside PEFT, with new LoRA adapters."""
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(model, LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT's LoraConfig rejects lora={settings}: {error}") from error
