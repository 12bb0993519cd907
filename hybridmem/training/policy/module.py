"""Lightning module for reinforcement learning and distillation of tokens and attention."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from hybridmem.data.trainer_state import is_training
from hybridmem.distributed import Meter
from hybridmem.rl.objectives.objective import Objective, ObjectiveError
from hybridmem.rl.rewards.functions import RewardSum
from hybridmem.rl.rollouts.agent_rollouts import Environments
from hybridmem.rl.rollouts.policy import Example, Policy
from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.rl.rollouts.vllm_rollouts import ServedRollouts
from hybridmem.training.checkpoints.contents import config_entry, holding, name_optimizer_states
from hybridmem.training.checkpoints.model_card import training_facts
from hybridmem.training.errors import named, stopping_at
from hybridmem.training.non_finite import stopping_at_non_finite_logits
from hybridmem.training.optimizers import OptimizerFactory, decay_groups
from hybridmem.training.schedules import SchedulerFactory, WarmupCosine, scheduled_steps

from .checks import (
    by_family,
    check_answers,
    check_end,
    check_learning,
    check_prompts,
    check_rewards,
    check_settings,
    check_strategy,
    explorations,
)
from .group_buffer import GroupBuffer, SignalWatch
from .learner import Learner, OptimizerStep
from .loading import prepare_policy, reward_functions
from .rollout_worker import LocalSampler, RolloutWorker
from .validation import Answered, validate

SHOWN = ("reward", "loss")  # in the progress bar
SHOWN_IN_VALIDATION = ("reward", "accuracy")


class PolicyModule(L.LightningModule):
    """Training of a causal LM by rewards or a teacher, with objectives on its tokens, its attention, or both.

    A training batch is a list of prompts. The policy answers each prompt `num_generations` times, the answers are
    rewarded, and the learner takes `num_iterations` passes over them, with `steps_per_generation` optimiser steps per
    pass. trainer.max_steps counts optimiser steps.

    Args:
        model: Hugging Face folder or name, or checkpoint (.ckpt) of `hybridmem fit`.
        objectives: objectives whose losses are summed: at most one TokenObjective, one AttentionRL and one
            AttentionDistillation. With AttentionDistillation alone, rewards are only logged. SFT, which does not
            sample, and RejectionFineTune must be alone.
        num_generations: responses per prompt. They form a group, whose mean reward is the baseline. Distillation needs
            only 1.
        max_completion_length: maximum tokens of a response, including observations. None: the task's own value.
        temperature: sampling temperature of responses (see Sampling).
        top_k: number of most likely tokens to sample from; 0 disables it.
        top_p: total probability of the most likely tokens to sample from; 1 disables it.
        min_p: minimum probability of a token relative to the most likely one; 0 disables it.
        num_iterations: passes over the responses.
        steps_per_generation: optimiser steps per pass.
        reward_funcs: reward functions with TRL's signature. None: the task's own.
        reward_weights: weight of each reward function. None: 1 each.
        environment_factory: makes an environment for every response (see hybridmem.rl.environments.tools), in which the
            policy acts over several turns. An environment's `get_reward`, if defined, adds to reward_funcs. None: the
            task's own `environment`, if defined.
        max_turns: maximum turns of a trajectory.
        call_format: format of tool calls, `plain` or `json`.
        max_observation_length: maximum characters of an observation; longer ones are truncated.
        optimizer: optimiser of the parameter groups; matrices decay, vectors and embeddings do not.
        lr_scheduler: learning-rate schedule over the optimiser steps of the run.
        max_grad_norm: gradients are clipped to this norm. None: no clipping.
        frozen: train only the objectives' own parameters, such as a mixed allocation with a token objective.
        lora: settings of PEFT's LoraConfig. None: train all weights, or none if no objective trains the model.
        dtype: type of weights that are not trained, such as `bfloat16`. None: float32. Memories stay in float32.
        attn_implementation: `sdpa`, or another implementation in transformers' registry.
        rollouts: server that samples training responses (see ServedRollouts). None: the policy itself.
        seed: seed of the rollouts.
        max_empty_rollouts: consecutive rollouts without different rewards in any group before a warning. Ten times this
            number ends a run with dynamic sampling, which would never fill a batch.

    Raises:
        ValueError: settings that are incompatible or have no effect, before training starts.
    """

    takes_bfloat16 = True  # where a CPU gains by it and no precision is set

    def __init__(
        self,
        model: str,
        objectives: list[Objective],
        num_generations: int = 8,
        max_completion_length: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        num_iterations: int = 1,
        steps_per_generation: int = 1,
        reward_funcs: list[Callable] | None = None,
        reward_weights: list[float] | None = None,
        environment_factory: type | Callable | None = None,
        max_turns: int = 16,
        call_format: str = "plain",
        max_observation_length: int = 2000,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory = WarmupCosine,
        max_grad_norm: float | None = 1.0,
        frozen: bool = False,
        lora: dict[str, Any] | None = None,
        dtype: str | None = None,
        attn_implementation: str = "sdpa",
        rollouts: ServedRollouts | None = None,
        seed: int = 0,
        max_empty_rollouts: int = 10,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.objectives = by_family(objectives)
        check_settings(
            self.objectives,
            num_generations,
            num_iterations,
            steps_per_generation,
            max_turns,
            call_format,
            max_observation_length,
            max_empty_rollouts,
        )
        self.model_name, self.num_generations = model, num_generations
        self.max_completion_length = max_completion_length
        self.draw: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        self.num_iterations, self.steps_per_generation = num_iterations, steps_per_generation
        self.reward_funcs, self.reward_weights = reward_funcs, reward_weights
        self.environment_factory, self.max_turns = environment_factory, max_turns
        self.call_format, self.max_observation_length = call_format, max_observation_length
        self.optimizer, self.lr_scheduler, self.max_grad_norm = optimizer, lr_scheduler, max_grad_norm
        self.frozen, self.lora, self.dtype_name, self.attn_implementation = frozen, lora, dtype, attn_implementation
        self.rollouts, self.seed, self.max_empty_rollouts = rollouts, seed, max_empty_rollouts
        self.model: Any = None
        self.data: Any = None
        self.policy: Policy
        self.worker: RolloutWorker
        self.learner: Learner
        self.meter = Meter()
        self.has_started = False  # until a training batch begins, errors are errors in settings

    def setup(self, stage: str) -> None:
        """Read task, rewards and environments from the data, and check that they are compatible."""
        self.data = self.trainer.datamodule
        self.check_data(self.data)
        check_strategy(self.trainer.strategy, self.objectives)
        factory = self.environment_factory or getattr(self.data.task, "environment", None)
        self.environments = factory and Environments(
            factory, self.max_turns, self.call_format, self.max_observation_length
        )
        example = self.data.task.example("val", 0)
        functions = reward_functions(self.reward_funcs, self.data, self.environments, self.objectives, example)
        self.rewards = RewardSum(functions, self.reward_weights)
        self.rewards.check_columns([*example, *([] if self.environments is None else ["environments"])])
        check_answers(self.objectives, example)
        length = self.max_completion_length or self.data.task.max_completion_length
        self.sampling = Sampling(max_completion_length=length, **self.draw)

    def configure_model(self) -> None:
        """Load the policy once, and connect it to the data of this run."""
        if self.data is None:  # a callback that averages weights configures the model before `setup`
            self.setup("fit")
        if self.model is None:
            self.policy = prepare_policy(
                self.model_name,
                self.data,
                self.objectives,
                self.frozen,
                self.lora,
                self.dtype_name,
                self.attn_implementation,
                self.device_mesh,
            )
            self.model = self.policy.model
            self.learned = torch.nn.ModuleDict(self.policy.learned)
        self.policy.data = self.data
        if self.rollouts is not None:
            acting = [] if self.environments is None else ["an environment"]
            self.rollouts.check(self.policy, [*explorations(self.objectives), *acting])
        self.check_data(self.data)
        self.worker = RolloutWorker(
            self.policy,
            self.objectives,
            self.rewards,
            self.rollouts or LocalSampler(),
            self.environments,
            self.num_generations,
            self.sampling,
            self.seed,
            self.meter,
        )
        self.groups = GroupBuffer(self.num_generations, self.data.pad_id)
        self.signal = SignalWatch(
            self.max_empty_rollouts, self.num_generations, self.rewards.names, self.dynamic_sampling
        )

    def check_data(self, data: Any) -> None:
        """Raise a ValueError if the policy cannot train on this data."""
        check_prompts(data, self.model)

    def check_schedule(self, trainer: L.Trainer) -> None:
        """Raise a ValueError if nothing is trained, or trainer.max_steps does not suit the learning-rate schedule."""
        check_learning(self.objectives, self.frozen, self.lora)
        check_end(self.lr_scheduler, trainer)

    def on_train_start(self) -> None:
        """Check that rewards differ, and create the learner, which needs the optimiser."""
        if not self.worker.num_rollouts:
            with self.trainer.precision_plugin.forward_context(), stopping_at_non_finite_logits(self.trainer):
                check_rewards(self.worker, self._first_prompts)
        step = OptimizerStep(
            self.model,
            self.optimizers(),
            self.lr_schedulers(),
            self.manual_backward,
            self.max_grad_norm,
            lambda: self.trainer.global_step >= self.trainer.max_steps,
            self.log,
            [] if self.device_mesh is None else list(self.learned.parameters()),
        )
        self.learner = Learner(
            self.worker.policy,
            self.objectives,
            step,
            self.num_generations,
            self.num_iterations,
            self.steps_per_generation,
            self.sampling,
            self.meter,
        )

    def _first_prompts(self, number: int) -> list[Example]:
        """Return a batch of the task's first prompts, the same ones on every rank."""
        size = self.data.hparams.batch_size
        return [self.data.task.example("train", number * size + place) for place in range(size)]

    def training_step(self, batch: list[Example], batch_idx: int) -> None:
        """Roll out and learn, or learn from the given answers if no objective samples."""
        self.has_started = True
        with stopping_at_non_finite_logits(self.trainer), stopping_at(ObjectiveError):
            self._learn_from(batch)
        for name, value in self.meter.pop_means().items():
            self.log(name, value, prog_bar=name in SHOWN)

    def _learn_from(self, batch: list[Example]) -> None:
        if not all(objective.samples for objective in self.objectives.values()):
            self.learner.imitate(batch)
        else:
            rollout = self.worker.roll_out(batch)
            if self.learns_by_reward and not any(objective.refines for objective in self.objectives.values()):
                self.signal.look(self.worker.last_rewards)
            full = self.groups.fill(rollout) if self.dynamic_sampling else rollout
            if full is not None:
                self.learner.learn(full)
            else:
                self.meter.measure("dynamic_sampling/waiting", float(self.groups.num_waiting))

    @property
    def learns_by_reward(self) -> bool:
        """True if any objective uses advantages; distillation does not."""
        return any(objective.learns_by_reward for objective in self.objectives.values())

    @property
    def dynamic_sampling(self) -> bool:
        """True if groups without signal are replaced."""
        return any(objective.dynamic_sampling for objective in self.objectives.values())

    @torch.no_grad()
    def validation_step(self, batch: list[Example], batch_idx: int) -> Answered:
        """Answer held-out prompts, and return the answers for callbacks."""
        return self._answer(batch, batch_idx, "val")

    @torch.no_grad()
    def test_step(self, batch: list[Example], batch_idx: int) -> Answered:
        """Answer held-out prompts as in validation."""
        return self._answer(batch, batch_idx, "test")

    def _answer(self, batch: list[Example], batch_idx: int, stage: str) -> Answered:
        """Answer held-out prompts and log the metrics under the stage's name."""
        first = batch_idx * self.data.hparams.batch_size
        with stopping_at_non_finite_logits(self.trainer):
            answered, values = validate(self.worker, self.data.task, batch, first)
        for name, value in values.items():
            shown = name in SHOWN_IN_VALIDATION
            self.log(f"{stage}/{name}", value, batch_size=len(batch), prog_bar=shown, sync_dist=True)
        return answered

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser and the schedule that steps with it."""
        with named("optimizer"):
            own = [g for o in self.objectives.values() for g in o.parameter_groups(self.policy)]
            optimizer = self.optimizer([*decay_groups(self.model), *own])
        with named("lr_scheduler"):
            return [optimizer], [self.lr_scheduler(optimizer, scheduled_steps(self.trainer, self.trainer.max_steps))]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's configuration, the rollout count, which determines random numbers, and waiting groups."""
        checkpoint |= config_entry(self.policy.base_model.config)
        checkpoint["lora"] = self.lora
        checkpoint["processor"] = self.data.hparams.get("processor")
        checkpoint["tokenizer"] = checkpoint["processor"] or self.data.hparams.get("tokenizer")
        checkpoint["rollouts"] = {
            "count": self.worker.num_rollouts,
            "waiting": self.groups.state_dict(),
            "empty": self.signal.num_empty,
        }
        if self.device_mesh is None and "optimizer_states" in checkpoint:  # absent with save_weights_only
            name_optimizer_states(checkpoint, self.named_parameters(), self.trainer.optimizers)
        with holding(self.learned, checkpoint["state_dict"], "learned."):  # averaged ones, where callbacks average
            for objective in self.objectives.values():
                checkpoint.update(objective.artefacts(self.policy))
        method = " and ".join(type(objective).__name__ for objective in self.objectives.values())
        checkpoint["facts"] = training_facts(self.data, self.trainer.callback_metrics, method)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counts of rollouts, which determine random numbers, and the groups that wait for a full batch."""
        if not is_training(self.trainer):
            return
        if "rollouts" not in checkpoint:
            raise ValueError(
                "ckpt_path is not a checkpoint of PolicyModule; to start from its weights, give its path as "
                "model.init_args.model instead"
            )
        self.worker.num_rollouts = checkpoint["rollouts"]["count"]
        self.groups.load_state_dict(checkpoint["rollouts"]["waiting"])
        self.signal.num_empty = checkpoint["rollouts"].get("empty", 0)  # absent from older checkpoints
