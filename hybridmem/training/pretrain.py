"""Pretraining as a Lightning module: next-token prediction, packed or with the memory carried from row to row."""

import math
import time
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import DynamicCache

from hybridmem.distributed import all_gather_object, global_mean_weights, shard
from hybridmem.metrics.bits import BitsPerByte, LossByPosition, document_positions
from hybridmem.metrics.needle import NeedleAccuracy
from hybridmem.model.configuration import HybridMemConfig
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.model.patches import embed_with_patches
from hybridmem.model.sequence import PADDING
from hybridmem.model.state import detach_state
from hybridmem.training.checkpoints.carried import own_cache, restore_cache, save_cache
from hybridmem.training.checkpoints.contents import check_same_model, name_optimizer_states, start_from
from hybridmem.training.checkpoints.model_card import training_facts

from .errors import named
from .optimizers import MatrixOptimizer, OptimizerFactory, decay_groups
from .schedules import SchedulerFactory, WarmupCosine, check_schedule, scheduled_steps

Batch = dict[str, Tensor]


class PretrainModule(L.LightningModule):
    """Trains a HybridMem language model, from scratch or from the weights of another.

    Args:
        config: the model.
        init_from: a checkpoint of `hybridmem fit`, or a folder or name of `from_pretrained`, with the same tensors: its
            weights are where training begins. Optimiser and data start anew; --ckpt_path goes on with a run.
        optimizer: made with the parameter groups; matrices decay, vectors and embeddings do not.
        matrix_optimizer: a second optimiser for the hidden layers' matrices, such as torch.optim.Muon.
        lr_scheduler: made with the optimiser and the number of optimiser steps of the whole run.
        carry_state: hand each row's memory and window, detached, to the next batch's row (truncated
            backpropagation). For data in `continuous` mode.
        activation_checkpointing: recompute layers in the backward instead of keeping their activations.
        attn_implementation: `eager`, `sdpa`, `flex_attention` or `flash_attention_2`.
        position_edges: where the ranges of the loss by position begin; None: 0 and the attention window times
            1, 2, 4, ….

    Raises:
        ValueError: settings that cannot go together, before training starts.
    """

    def __init__(
        self,
        config: HybridMemConfig,
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
                "carry_state hands states over through the cache, which activation_checkpointing leaves out: "
                "set one of the two to false"
            )
        self.config, self.init_from = config, init_from
        self.optimizer, self.matrix_optimizer, self.lr_scheduler = optimizer, matrix_optimizer, lr_scheduler
        self.carry_state, self.activation_checkpointing = carry_state, activation_checkpointing
        self.attn_implementation = attn_implementation
        window = config.attention_window
        edges = position_edges or [0, *(window * 2**n for n in range(15))]
        with named("position_edges"):
            self.bits_per_byte, self.loss_by_position = BitsPerByte(), LossByPosition(edges)
        self.needles = torch.nn.ModuleDict()
        self.answers: NeedleAccuracy | None = None  # of a task, where the data has one
        self.model: HybridMemForCausalLM | None = None
        self.carried: DynamicCache | None = None
        self.register_buffer("byte_lengths", torch.ones(config.vocab_size, dtype=torch.long), persistent=False)
        self._batch_started = 0.0

    @property
    def has_started(self) -> bool:
        """Whether a training batch was begun: what fails earlier is a matter of settings."""
        return self._batch_started > 0

    def configure_model(self) -> None:
        """Build the model once; under Lightning's ModelParallelStrategy, sharded layer by layer (FSDP2)."""
        if self.model is not None:
            return
        with named("config"):  # such as more memory than there is
            model = HybridMemForCausalLM(self.config)
        if self.init_from is not None and (self._trainer is None or self.trainer.ckpt_path is None):
            with named("init_from"):
                start_from(model, self.init_from)
        model.set_attn_implementation(self.attn_implementation)
        if self.activation_checkpointing:
            model.activation_checkpointing_enable()
        mesh = self.device_mesh
        if mesh is not None:
            if self.matrix_optimizer is not None:
                raise ValueError(
                    "matrix_optimizer works on whole matrices, which ModelParallelStrategy shards: set it to null, or "
                    "trainer.strategy to ddp"
                )
            shard(model, mesh)
        self.model = model

    def setup(self, stage: str) -> None:
        """Take from the data what a token stands for."""
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
        """Raise a ValueError when the data cannot be read by this model."""
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer's largest id is {data.vocab_size - 1} but config.vocab_size={self.config.vocab_size}; "
                f"set model.init_args.config.vocab_size to {data.vocab_size} or more"
            )
        if self.carry_state and data.hparams.get("mode") != "continuous":
            raise ValueError(
                "carry_state needs rows that go on from batch to batch: set data.init_args.mode to continuous"
            )

    def check_schedule(self, trainer: L.Trainer) -> None:
        """Raise a ValueError when the learning-rate schedule cannot run for so many optimiser steps."""
        if trainer.max_steps > 0:
            check_schedule(self.lr_scheduler, trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss per predicted token, over the batches of all processes."""
        cache = self._cache() if self.carry_state else None
        _, nats = self._token_losses(batch, cache)
        if cache is not None:
            for layer in cache.layers:
                layer.state = detach_state(layer.state)
        predicted = (batch["shift_labels"] != -100).sum()
        (share,) = global_mean_weights(predicted)  # processes may predict unequally many tokens
        loss = nats.sum() / predicted.clamp(min=1) * share.to(nats.dtype)
        bits = BitsPerByte().to(self.device)
        bits.update(nats.detach(), self._bytes(batch))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.log("train/bits_per_byte", bits.compute().float(), prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the clock."""
        self._batch_started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the speed."""
        seconds = time.perf_counter() - self._batch_started
        tokens = batch["input_ids"].numel() * self.trainer.world_size
        self.log("train/tokens_per_second", tokens / seconds)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Bits per byte, overall and by position in the document."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log them."""
        self._log_evaluation("val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Held-out rows first, then needles, length by length."""
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
        """For every row the tokens to predict, in order, and how many bits each took."""
        _, nats = self._token_losses(batch)
        rows = []
        for labels, row in zip(batch["shift_labels"], nats / math.log(2), strict=True):
            predicted = labels != -100
            rows.append({"tokens": labels[predicted].tolist(), "bits": row[predicted].tolist()})
        return rows

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimiser for all, or Muon's kind for the matrices beside it; the schedule steps with it."""
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
        """Add the configuration, so that the checkpoint says what it holds, and the states under way."""
        checkpoint["hybridmem_config"] = self.config.to_dict()
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["tokenizer"] = None if data is None else data.hparams.get("tokenizer")
        checkpoint["carried"] = all_gather_object(save_cache(self.carried))
        if self.device_mesh is None:
            name_optimizer_states(checkpoint, self, self.trainer.optimizers)
        checkpoint["facts"] = training_facts(data, self.trainer.callback_metrics, "pretraining")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model's checkpoint; take up the states."""
        check_same_model(self.config, checkpoint)
        self.carried = restore_cache(own_cache(checkpoint.get("carried") or [None]), self.config)

    def _cache(self) -> DynamicCache:
        if self.carried is None:
            self.carried = DynamicCache(config=self.config)
        return self.carried

    def _token_losses(
        self, batch: Batch, cache: DynamicCache | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], Float[Tensor, "batch time"]]:
        """Logits, and each predicted token's negative log-likelihood in nats."""
        assert self.model is not None
        batch = self._with_patches(batch)
        outputs = self.model(
            batch.get("input_ids"),
            inputs_embeds=batch.get("inputs_embeds"),
            document_ids=batch.get("document_ids"),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        logits = outputs.logits[:, -batch["shift_labels"].shape[1] :]
        labels = batch["shift_labels"]
        nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
        return logits, nats.view_as(labels)

    def _with_patches(self, batch: Batch) -> Batch:
        """Images, where there are any, become patches in front of the text, and part of its first document."""
        if "images" not in batch:
            return batch
        assert self.model is not None
        front = (batch["images"].shape[1], 0)
        ids, documents = F.pad(batch["input_ids"], front), F.pad(batch["document_ids"], front)
        embeds = embed_with_patches(batch["images"], ids, None, self.model.get_input_embeddings())
        return {"inputs_embeds": embeds, "document_ids": documents, "shift_labels": batch["shift_labels"]}

    def _bytes(self, batch: Batch) -> Int[Tensor, "batch time"]:
        """Bytes that each predicted token stands for."""
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
        """Log what is the same on every process, since metrics add up over them."""
        log = partial(self.log, sync_dist=True)
        log(f"{stage}/bits_per_byte", self.bits_per_byte.compute().float(), prog_bar=True)
        for name, bits in self.loss_by_position.compute().items():
            log(f"{stage}/bits_per_byte_at/{name}", bits.float())
        if self.answers is not None:
            log(f"{stage}/accuracy", self.answers.compute().float(), prog_bar=True)
            self.answers.reset()
        self.bits_per_byte.reset()
        self.loss_by_position.reset()
