"""Lightning module for pretraining: next-token prediction on packed rows, or with memory carried across rows."""

import math
import time
from copy import copy
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from hybridmem.data.trainer_state import batches_trained, is_training
from hybridmem.distributed import all_gather_object, global_mean_weights, shard
from hybridmem.metrics.bits import BitsPerByte, LossByPosition, document_positions
from hybridmem.metrics.needle import NeedleAccuracy
from hybridmem.model.configuration import HybridMemConfig
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.model.patches import embed_with_patches
from hybridmem.model.sequence import PADDING
from hybridmem.model.state import detach_state
from hybridmem.peers import build_peer, check_peer, document_logits, set_attention
from hybridmem.training.checkpoints.carried import own_cache, restore_cache, save_cache
from hybridmem.training.checkpoints.contents import check_same_model, config_entry, name_optimizer_states, start_from
from hybridmem.training.checkpoints.model_card import training_facts

from .accumulation import Accumulation, check_epochs
from .errors import named
from .optimizers import MatrixOptimizer, OptimizerFactory, decay_groups
from .schedules import SchedulerFactory, WarmupCosine, check_schedule, scheduled_steps

Batch = dict[str, Tensor]
WINDOWED = {"mag", "mal", "swa", "mah"}  # layers that read attention_window
PEER_RANGE = 64  # tokens in the first range of the loss by position, for models of transformers


class PretrainModule(L.LightningModule):
    """Pretraining of a HybridMem language model, or of a transformers baseline, from scratch or existing weights.

    Args:
        config: configuration of a HybridMem model; or class_path and init_args of any configuration with a causal LM
            in transformers, such as transformers.Mamba2Config, which then reads every document on its own.
        init_from: checkpoint of `hybridmem fit`, or folder or name for `from_pretrained`, with the same tensors.
            Training starts from its weights, with a new optimiser and from the first batch. Use --ckpt_path to resume
            a run.
        optimizer: optimiser of the parameter groups; matrices decay, vectors and embeddings do not.
        matrix_optimizer: separate optimiser for the hidden layers' matrices, such as torch.optim.Muon.
        lr_scheduler: learning-rate schedule over the optimiser steps of the whole run.
        carry_state: pass each row's memory and window, detached, to the same row of the next batch (truncated
            backpropagation through time). Requires data in `continuous` mode.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        attn_implementation: `eager`, `sdpa`, `flex_attention` or `flash_attention_2`.
        position_edges: start of each position range in the loss by position. None: 0 and the attention window times
            1, 2, 4, …; transformers' models count from 64.

    Raises:
        ValueError: incompatible settings, before training starts.
    """

    takes_bfloat16 = True  # where a CPU gains by it and no precision is set

    def __init__(
        self,
        config: HybridMemConfig | PreTrainedConfig,
        init_from: str | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        matrix_optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory = WarmupCosine,
        carry_state: bool = False,
        activation_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
        position_edges: list[int] | None = None,
    ):
        super().__init__()
        if carry_state and activation_checkpointing:
            raise ValueError(
                "carry_state=true needs the cache, which activation_checkpointing=true disables; set one of the two to "
                "false"
            )
        if not isinstance(config, HybridMemConfig):
            check_peer(config)
            if carry_state:
                raise ValueError(
                    f"carry_state=true needs a HybridMem model, but config is a {type(config).__name__}; set "
                    "carry_state to false"
                )
        self.config, self.init_from = config, init_from
        self.optimizer, self.matrix_optimizer, self.lr_scheduler = optimizer, matrix_optimizer, lr_scheduler
        self.carry_state, self.activation_checkpointing = carry_state, activation_checkpointing
        self.attn_implementation = attn_implementation
        window = config.attention_window if isinstance(config, HybridMemConfig) else PEER_RANGE
        edges = position_edges or [0, *(window * 2**n for n in range(15))]
        with named("position_edges"):
            self.bits_per_byte, self.loss_by_position = BitsPerByte(), LossByPosition(edges)
        self.needles = torch.nn.ModuleDict()
        self.answers: NeedleAccuracy | None = None  # accuracy on the data's task, if it has one
        self.model: Any = None  # HybridMemForCausalLM, or a causal LM of transformers
        self.carried: DynamicCache | None = None
        self.carried_before: tuple[int, DynamicCache | None] = (-1, None)  # number of batches, and the cache after them
        self.accumulation = Accumulation()
        self.loaded_accumulation: dict[str, Any] | None = None
        self.register_buffer("byte_lengths", torch.ones(config.vocab_size, dtype=torch.long), persistent=False)
        self._batch_started = 0.0

    saves_accumulation = True  # lets GracefulStop save a checkpoint between any two batches

    @property
    def has_started(self) -> bool:
        """True once a training batch has begun; earlier errors are errors in settings."""
        return self._batch_started > 0

    def configure_model(self) -> None:
        """Build the model once; shard it layer by layer (FSDP2) under Lightning's ModelParallelStrategy."""
        if self.model is not None:
            return
        with named("config"):  # for example, out of memory
            ours = isinstance(self.config, HybridMemConfig)
            model: Any = HybridMemForCausalLM(self.config) if ours else build_peer(self.config)
        if self.init_from is not None and (self._trainer is None or self.trainer.ckpt_path is None):
            with named("init_from"):
                start_from(model, self.init_from)
        set_attention(model, self.attn_implementation)
        if self.activation_checkpointing:
            model.activation_checkpointing_enable()
        mesh = self.device_mesh
        if mesh is not None:
            if not ours:
                raise ValueError(
                    f"config={type(self.config).__name__} reads documents in passes, whose number differs between "
                    "processes, and ModelParallelStrategy needs equal numbers; set trainer.strategy to ddp"
                )
            if self.matrix_optimizer is not None:
                raise ValueError(
                    "matrix_optimizer needs whole matrices, but ModelParallelStrategy shards them; set it to null, or "
                    "trainer.strategy to ddp"
                )
            shard(model, mesh)
        self.model = model

    def setup(self, stage: str) -> None:
        """Check the data, and create the metrics that depend on it."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        self.check_data(data)
        lengths = data.token_byte_lengths
        self.byte_lengths[: len(lengths)] = lengths
        if hasattr(data, "task"):
            self.answers = NeedleAccuracy().to(self.device)
        if stage == "test":
            needles = {str(length): NeedleAccuracy() for length in data.hparams.get("needle_lengths") or ()}
            self.needles = torch.nn.ModuleDict(needles).to(self.device)

    def check_data(self, data: L.LightningDataModule) -> None:
        """Raise a ValueError if the model cannot train on this data."""
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer's largest id is {data.vocab_size - 1}, but config.vocab_size={self.config.vocab_size}; "
                f"set model.init_args.config.vocab_size to {data.vocab_size} or more"
            )
        if self.carry_state and data.hparams.get("mode") != "continuous":
            raise ValueError(
                f"carry_state=true needs rows that continue across batches, but data.init_args.mode is "
                f"{data.hparams.get('mode')!r}; set it to continuous"
            )

    def check_schedule(self, trainer: L.Trainer) -> None:
        """Raise a ValueError if the learning-rate schedule cannot run for trainer.max_steps."""
        if trainer.max_steps > 0:
            check_schedule(self.lr_scheduler, trainer)

    def on_train_start(self) -> None:
        """Reject epochs that end within an optimiser step, and restore a step interrupted by the checkpoint."""
        for callback in self.trainer.callbacks:
            if isinstance(callback, GradientAccumulationScheduler):  # Lightning calls it only at an epoch's start
                callback.on_train_epoch_start(self.trainer)
        check_epochs(self.trainer)
        warn_of_short_rows(self.config, self.trainer.datamodule, self.carry_state)
        self.carried_before, self.accumulation = (-1, None), Accumulation()
        loaded, self.loaded_accumulation = self.loaded_accumulation, None
        if loaded is not None:
            self.accumulation.load_state_dict(loaded, self, self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss per predicted token over the batches of all ranks.

        With gradient accumulation, the returned loss is in the units of `accumulation`, and the logged loss is the mean
        over the step so far.
        """
        cache = self._cache() if self.carry_state else None
        _, nats = self._token_losses(batch, cache)
        if cache is not None:
            for layer in cache.layers:
                layer.state = detach_state(layer.state)
        if self.trainer.accumulate_grad_batches > 1:
            labels, num_bytes = batch["shift_labels"], self._bytes(batch)
            loss = self.accumulation.loss(self.trainer, batch_idx, nats, labels, num_bytes)
            per_token, per_byte = self.accumulation.means()
            self.log("train/loss", per_token.float(), prog_bar=True)
            self.log("train/bits_per_byte", (per_byte / math.log(2)).float(), prog_bar=True)
            return loss
        predicted = (batch["shift_labels"] != -100).sum()
        (share,) = global_mean_weights(predicted)  # ranks may predict different numbers of tokens
        loss = nats.sum() / predicted.clamp(min=1) * share.to(nats.dtype)
        bits = BitsPerByte().to(self.device)
        bits.update(nats.detach(), self._bytes(batch))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.log("train/bits_per_byte", bits.compute().float(), prog_bar=True)
        return loss

    def on_after_backward(self) -> None:
        """Scale the gradients after the last batch of an optimiser step."""
        trainer = self.trainer
        if trainer.accumulate_grad_batches > 1 and not trainer.fit_loop._should_accumulate():
            self.accumulation.finish(self.parameters(), trainer.accumulate_grad_batches)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Keep the state carried into the batch, for a checkpoint on an exception, and start the clock."""
        self.accumulation.check_place(self, self.trainer, batch_idx)
        self.carried_before = batches_trained(self.trainer), _shallow_copy(self.carried)
        self._batch_started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the throughput."""
        seconds = time.perf_counter() - self._batch_started
        tokens = batch["input_ids"].numel() * self.trainer.world_size
        self.log("train/tokens_per_second", tokens / seconds)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update bits per byte, overall and by position in the document."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log bits per byte, overall and by position."""
        self._log_evaluation("val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate held-out rows (dataloader 0) or needles of one length (the others)."""
        if dataloader_idx == 0:
            self._evaluate(batch)
            return
        logits, _ = self._token_losses(batch)
        needles: Any = list(self.needles.values())[dataloader_idx - 1]
        needles.update(logits, batch["shift_labels"])

    def on_test_epoch_end(self) -> None:
        """Log bits per byte, loss by position and needle accuracy by length."""
        self._log_evaluation("test")
        metric: Any
        for length, metric in self.needles.items():
            self.log(f"test/needle_accuracy/{length}", metric.compute().float(), sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, list]]:
        """Return each row's predicted tokens, in order, with the bits that each token costs."""
        _, nats = self._token_losses(batch)
        rows = []
        for labels, row in zip(batch["shift_labels"], nats / math.log(2), strict=True):
            predicted = labels != -100
            rows.append({"tokens": labels[predicted].tolist(), "bits": row[predicted].tolist()})
        return rows

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser, split in two if matrix_optimizer is set, and the schedule that steps with it."""
        assert self.model is not None
        with named("optimizer" if self.matrix_optimizer is None else "optimizer or matrix_optimizer"):
            if self.matrix_optimizer is None:
                optimizer = self.optimizer(decay_groups(self.model))
            else:
                optimizer = MatrixOptimizer(self.model, self.matrix_optimizer, self.optimizer)
        with named("lr_scheduler"):
            steps = scheduled_steps(self.trainer, self.trainer.estimated_stepping_batches)
            scheduler = self.lr_scheduler(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's configuration, the carried state and the accumulated gradients."""
        checkpoint |= config_entry(self.config)
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["tokenizer"] = None if data is None else data.hparams.get("tokenizer")
        batches, before = self.carried_before
        under_way = batches == batches_trained(self.trainer)  # an exception cut the batch; it will be repeated
        checkpoint["carried"] = all_gather_object(save_cache(before if under_way else self.carried))
        if "optimizer_states" in checkpoint:  # absent with save_weights_only
            checkpoint["accumulation"] = self.accumulation.state_dict(self, self.trainer)
            if self.device_mesh is None:
                name_optimizer_states(checkpoint, self.named_parameters(), self.trainer.optimizers)
        checkpoint["facts"] = training_facts(data, self.trainer.callback_metrics, "pretraining")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject another model's checkpoint, and restore the carried state and the accumulated gradients."""
        check_same_model(self.config, checkpoint)
        self.carried = restore_cache(own_cache(checkpoint.get("carried") or [None]), self.config)
        self.loaded_accumulation = checkpoint.get("accumulation") if is_training(self._trainer) else None

    def _cache(self) -> DynamicCache:
        if self.carried is None:
            self.carried = DynamicCache(config=self.config)
        return self.carried

    def _token_losses(
        self, batch: Batch, cache: DynamicCache | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], Float[Tensor, "batch time"]]:
        """Return the logits and each predicted token's negative log-likelihood in nats."""
        assert self.model is not None
        batch = self._with_patches(batch)
        logits = self._logits(batch, cache)[:, -batch["shift_labels"].shape[1] :]
        labels = batch["shift_labels"]
        nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
        return logits, nats.view_as(labels)

    def _logits(self, batch: Batch, cache: DynamicCache | None) -> Float[Tensor, "batch time vocab"]:
        name = "input_ids" if "input_ids" in batch else "inputs_embeds"
        inputs, documents = {name: batch[name]}, batch.get("document_ids")
        if not isinstance(self.config, HybridMemConfig):
            return document_logits(self.model, documents, **inputs)
        options = dict(document_ids=documents, past_key_values=cache, use_cache=cache is not None)
        return self.model(**inputs, **options).logits

    def _with_patches(self, batch: Batch) -> Batch:
        """Return the batch with its images, if any, as patches before the text, in the text's first document."""
        if "images" not in batch:
            return batch
        assert self.model is not None
        front = (batch["images"].shape[1], 0)
        ids, documents = F.pad(batch["input_ids"], front), F.pad(batch["document_ids"], front)
        embeds = embed_with_patches(batch["images"], ids, None, self.model.get_input_embeddings())
        return {"inputs_embeds": embeds, "document_ids": documents, "shift_labels": batch["shift_labels"]}

    def _bytes(self, batch: Batch) -> Int[Tensor, "batch time"]:
        """Return the number of bytes of each predicted token."""
        labels = batch["shift_labels"]
        return torch.where(labels == -100, 0, self.byte_lengths[labels.clamp(min=0)])

    def _evaluate(self, batch: Batch) -> None:
        logits, nats = self._token_losses(batch)
        if self.answers is not None:
            self.answers.update(logits, batch["answer_labels"])
        num_bytes = self._bytes(batch)
        documents = batch.get("document_ids")
        if documents is None:
            documents = torch.zeros_like(batch["input_ids"])
        self.bits_per_byte.update(nats, num_bytes)
        self.loss_by_position.update(nats, num_bytes.where(documents != PADDING, 0), document_positions(documents))

    def _log_evaluation(self, stage: str) -> None:
        """Log the metrics, which are already summed over ranks."""
        log = partial(self.log, sync_dist=True)
        log(f"{stage}/bits_per_byte", self.bits_per_byte.compute().float(), prog_bar=True)
        for name, bits in self.loss_by_position.compute().items():
            log(f"{stage}/bits_per_byte_at/{name}", bits.float())
        if self.answers is not None:
            log(f"{stage}/accuracy", self.answers.compute().float(), prog_bar=True)
            self.answers.reset()
        self.bits_per_byte.reset()
        self.loss_by_position.reset()


def warn_of_short_rows(config: PreTrainedConfig, data: L.LightningDataModule | None, carry_state: bool) -> None:
    """Warn if the window covers every training row, so that nothing trains the reach beyond it."""
    if carry_state or data is None or not isinstance(config, HybridMemConfig):
        return
    windowed = WINDOWED.intersection(map(config.layer_type, range(config.num_hidden_layers)))
    lengths = [part.hparams.get("sequence_length") for part in getattr(data, "parts", [data])]
    if windowed and None not in lengths and max(lengths) <= config.attention_window:
        rank_zero_warn(
            f"sequence_length={max(lengths)} is within attention_window={config.attention_window}, so attention sees "
            "whole rows and nothing trains the reach beyond the window; raise data.init_args.sequence_length, or lower "
            "model.init_args.config.attention_window"
        )


def _shallow_copy(cache: DynamicCache | None) -> DynamicCache | None:
    """Return a cache that keeps the current states while the original moves on."""
    if cache is None:
        return None
    kept = copy(cache)
    kept.layers = [copy(layer) for layer in cache.layers]
    return kept
