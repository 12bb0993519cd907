"""Reinforcement learning and distillation as a Lightning module: rewards or a teacher train tokens and attention."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridmem.checks import at_least, one_of
from hybridmem.data.vision import Prompt
from hybridmem.distributed import (
    Measured,
    all_gather_object,
    dealt,
    gather_groups,
    global_mean_weights,
    means,
    own_groups,
    rank_and_size,
    shard,
    unsharded,
)
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.rl.attention.exploration import Noise, cut_noise, draw_noise, explored
from hybridmem.rl.attention.recorder import AttentionRecorder
from hybridmem.rl.environments.tools import CALL_FORMATS, tools_of
from hybridmem.rl.objectives.attention import AttentionRL
from hybridmem.rl.objectives.critique import CritiqueGRPO
from hybridmem.rl.objectives.distillation import AttentionDistillation, Observation, observed
from hybridmem.rl.objectives.token import (
    SFT,
    RejectionFineTune,
    SWEDapo,
    TokenObjective,
    group_advantages,
    groups_with_signal,
)
from hybridmem.rl.rewards.functions import Rewards, RewardSum
from hybridmem.rl.rollouts.experience import Answered, Experience, Rollout, Scores
from hybridmem.rl.rollouts.sampling import (
    Completions,
    Generators,
    PromptBatch,
    Sampling,
    Times,
    completion_logps,
    concatenate,
    evaluating,
    generators,
    pad_prompts,
    sample,
    vision_positions,
)
from hybridmem.rl.rollouts.vllm_rollouts import ServedRollouts
from hybridmem.training.checkpoints.contents import load_policy, name_optimizer_states, tokenizer_of_policy
from hybridmem.training.checkpoints.model_card import training_facts
from hybridmem.training.errors import named
from hybridmem.training.optimizers import decay_groups
from hybridmem.training.pretrain import OptimizerFactory, SchedulerFactory
from hybridmem.training.schedules import WarmupCosine, check_schedule, scheduled_steps

from .agent_rollouts import Acted, act_out, begin, environment_reward
from .refinement import with_refinements
from .validation import validate, validate_acting

Example = dict[str, Any]
MEAN_OVER = {"grpo": "responses", "dr_grpo": "responses", "bnpo": "tokens", "dapo": "processes"}  # what losses are
ROLLOUT = 0  # what random numbers are for; refinements have 1, validation 2
SHOWN = ("reward", "loss")  # in the progress bar


class PolicyModule(L.LightningModule):
    """Trains a causal LM by reward, with objectives on its tokens, on its attention, or on both; or by a teacher.

    A training batch is a list of prompts. Each is answered `num_generations` times, the answers are rewarded, and the
    objectives take `num_iterations` passes over them in `steps_per_generation` optimiser steps each. trainer.max_steps
    counts optimiser steps.

    Args:
        model: a Hugging Face folder or name, or a checkpoint (.ckpt) of `hybridmem fit`.
        objectives: their losses are added. At most one TokenObjective, one AttentionRL and one AttentionDistillation,
            which needs no other: rewards are then only logged. Or SFT alone, which samples nothing, or
            RejectionFineTune alone.
        num_generations: responses to each prompt: a group, whose mean is the baseline. 1 is enough to distil.
        max_completion_length: tokens of a response, observations among them; None: what the task needs.
        temperature, top_k, top_p, min_p: how responses are drawn (see Sampling).
        num_iterations: passes over the responses.
        steps_per_generation: optimiser steps that a pass is cut into.
        reward_funcs: reward functions with TRL's signature; None: the task's own.
        reward_weights: one for each; None: 1.
        environment_factory: makes an environment for every response (see hybridmem.rl.environments.tools), in which it
            acts over many turns; its `get_reward`, if it has one, is a reward beside reward_funcs. None: the task's
            own `environment`, if it has one.
        max_turns: turns of a trajectory.
        call_format: how tools are called, `plain` or `json`.
        max_observation_length: characters of an environment's answer; what is longer is cut.
        optimizer: made with the parameter groups; matrices decay, vectors and embeddings do not.
        lr_scheduler: made with the optimiser and the number of optimiser steps of the run.
        max_grad_norm: gradients are cut to this norm; None: they are not.
        lora: settings of PEFT's LoraConfig; None: all weights are trained.
        attn_implementation: `sdpa`, or another that goes through transformers' registry.
        rollouts: who samples training responses; None: the policy itself (see ServedRollouts).
        seed: of the rollouts.

    Raises:
        ValueError: settings that cannot go together or that could change nothing, before training starts.
    """

    def __init__(
        self,
        model: str,
        objectives: list[TokenObjective | AttentionRL | AttentionDistillation | SFT | RejectionFineTune],
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
        lora: dict[str, Any] | None = None,
        attn_implementation: str = "sdpa",
        rollouts: ServedRollouts | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model_name, self.num_generations = model, num_generations
        self.max_completion_length = max_completion_length
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.num_iterations, self.steps_per_generation = num_iterations, steps_per_generation
        self.reward_funcs, self.reward_weights = reward_funcs, reward_weights
        self.environment_factory, self.max_turns = environment_factory, max_turns
        self.call_format, self.max_observation_length = call_format, max_observation_length
        self.optimizer, self.lr_scheduler, self.max_grad_norm = optimizer, lr_scheduler, max_grad_norm
        self.lora, self.attn_implementation = lora, attn_implementation
        self.token_objective = _only(objectives, TokenObjective)
        self.attention_rl = _only(objectives, AttentionRL)
        self.distillation = _only(objectives, AttentionDistillation)
        self.supervised = _only(objectives, SFT)
        self.rejection = _only(objectives, RejectionFineTune)
        self._check_settings()
        self.rollouts, self.seed = rollouts, seed
        self.num_rollouts = 0  # that were begun since the run's first start
        self.model: Any = None
        self._reference: list[PreTrainedModel] = []  # in a list: not a part of the module, nor of its checkpoints
        self._teacher: list[PreTrainedModel] = []  # the same
        self._teacher_tokenizer: PreTrainedTokenizerBase | None = None
        self._waiting: list[Rollout] = []  # groups with signal, of all processes, that do not fill a batch yet
        self._measured: Measured = defaultdict(list)
        self._started = False

    def _check_settings(self) -> None:
        others = self.learns_by_reward or self.distillation is not None
        alone = [objective for objective in (self.supervised, self.rejection) if objective is not None]
        if not alone and not others:
            raise ValueError(
                "objectives is empty: name a token objective (GRPO, …), AttentionRL, AttentionDistillation, several of "
                "them, SFT, or RejectionFineTune"
            )
        if self.rejection is not None and (others or len(alone) > 1):
            raise ValueError(
                "objectives: RejectionFineTune learns from what was solved alone: remove it, or the others"
            )
        if self.supervised is not None and others:
            raise ValueError("objectives: SFT learns from answers and samples none: remove it, or the others")
        for name in ("num_generations", "num_iterations", "steps_per_generation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        at_least(1, max_turns=self.max_turns, max_observation_length=self.max_observation_length)
        one_of(CALL_FORMATS, call_format=self.call_format)
        if self.learns_by_reward and self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: a group of one has no advantage over itself; sample 2 or more"
            )
        attention = self.attention_rl
        if attention is None:
            return
        if attention.weight and not attention.exploration and self.num_iterations * self.steps_per_generation == 1:
            raise ValueError(
                "AttentionRL compares with the rollout's attention, from which one optimiser step per rollout never "
                "moves: its gradient would be zero. Set num_iterations or steps_per_generation to 2 or more, or "
                "AttentionRL's exploration above 0"
            )
        if attention.exploration and self.dynamic_sampling:
            raise ValueError("exploration does not go with dynamic_sampling: set one of the two off")
        if attention.exploration and isinstance(self.token_objective, CritiqueGRPO):
            raise ValueError(
                "exploration does not go with CritiqueGRPO, whose refinements are sampled without it: set exploration "
                "to 0, or take DrGRPO"
            )

    @property
    def learns_by_reward(self) -> bool:
        """Whether an objective reads advantages; distillation does not."""
        return self.token_objective is not None or self.attention_rl is not None

    @property
    def dynamic_sampling(self) -> bool:
        """Whether groups without signal are replaced."""
        return self.token_objective is not None and self.token_objective.dynamic_sampling

    @property
    def has_started(self) -> bool:
        """Whether a training batch was begun: what fails earlier is a matter of settings."""
        return self._started

    def generators(self, purpose: int, places: Sequence[tuple[int, ...]]) -> list[torch.Generator]:
        """The random numbers of prompts in this process's batch: they are the same however many processes share it.

        Args:
            purpose: ROLLOUT or another number, whose random numbers are others.
            places: of every prompt, its place in the batch, and what tells it from others of the same place.
        """
        rank, size = rank_and_size()
        keys = [(self.seed, purpose, self.num_rollouts, place * size + rank, *rest) for place, *rest in places]
        return generators(self.device, *keys)

    def measure(self, name: str, value: Tensor | float, weight: Tensor | float | int = 1) -> None:
        """Log, when the batch is done, the mean over all processes by weight, and over what has the same name."""
        self._measured[name].append((value.detach() if isinstance(value, Tensor) else value, weight))

    def configure_model(self) -> None:
        """Load the policy once, and the reference model and the teacher where an objective needs one."""
        if self.model is not None:
            return
        with named("model"):
            model = load_policy(self.model_name)
        model.set_attn_implementation(self.attn_implementation)
        if self.attention_rl is not None:
            AttentionRecorder(model, self.attention_rl.layers)  # layers that are not there: now
        if self.token_objective is not None and self.token_objective.beta and self.lora is None:
            self._reference = [copy.deepcopy(model).eval().requires_grad_(False)]
        if self.distillation is not None:
            self._load_teacher(self.distillation, model)
        if self.lora is not None:
            from peft import LoraConfig, get_peft_model

            try:
                model = get_peft_model(model, LoraConfig(**self.lora))
            except (TypeError, ValueError) as error:
                raise ValueError(f"lora={self.lora} are no settings of PEFT's LoraConfig: {error}") from error
        self.model = model
        if self.device_mesh is not None:
            for whole in (self.model, *self._reference, *self._teacher):
                shard(whole, self.device_mesh)
        if self.rollouts is not None:
            self.rollouts.check(self)
        self.check_data(self.data)

    def _load_teacher(self, distillation: AttentionDistillation, student: PreTrainedModel) -> None:
        try:
            teacher = load_policy(distillation.teacher)
            self._teacher_tokenizer = tokenizer_of_policy(distillation.teacher)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"teacher={distillation.teacher!r} cannot be loaded: set a Hugging Face folder or name, or a "
                f"checkpoint of hybridmem fit ({str(error).splitlines()[0]})"
            ) from error
        teacher.set_attn_implementation(self.attn_implementation)
        distillation.check_models(student, teacher)
        self._teacher = [teacher.eval().requires_grad_(False)]

    def setup(self, stage: str) -> None:
        """Take tokenizer, task and rewards from the data."""
        self.data: Any = self.trainer.datamodule
        self.check_data(self.data)
        self._check_strategy(self.trainer.strategy)
        self.environment_factory = self.environment_factory or getattr(self.data.task, "environment", None)
        example = self.data.task.example("val", 0)
        self.rewards = RewardSum(self._reward_functions(example), self.reward_weights)
        self.rewards.check_columns([*example, *(["environments"] if self.acts else [])])
        if self.supervised is not None and "answer" not in example:
            raise ValueError("SFT learns from the column answer, which the task's examples lack: choose another")
        length = self.max_completion_length or self.data.task.max_completion_length
        self.sampling = Sampling(
            max_completion_length=length, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            min_p=self.min_p,
        )  # fmt: skip

    def _check_strategy(self, strategy: Any) -> None:
        """DistributedDataParallel waits for every weight's gradient unless told that some have none."""
        everything = any((self.token_objective, self.supervised, self.rejection))
        everything |= self.distillation is not None and bool(self.distillation.mu)
        settings = getattr(strategy, "_ddp_kwargs", {})
        if isinstance(strategy, DDPStrategy) and not everything and not settings.get("find_unused_parameters"):
            raise ValueError(
                "objectives on attention alone give the model's head no gradient, which strategy ddp waits for: set "
                "trainer.strategy to ddp_find_unused_parameters_true"
            )

    def _reward_functions(self, example: Example) -> list[Callable]:
        """What the settings name, beside what an environment says; else the task's own."""
        if self.environment_factory is None:
            return self.reward_funcs or [self.data.task.reward]
        self._check_acting()
        environment = self.environment_factory()
        tools_of(environment)
        begin(self, example, [environment, self.environment_factory()])
        own = [environment_reward] if hasattr(environment, "get_reward") else []
        return [*own, *(self.reward_funcs or [])] or [self.data.task.reward]

    def _check_acting(self) -> None:
        explores = self.attention_rl is not None and self.attention_rl.exploration
        for name, there in (
            ("AttentionRL's exploration", explores),
            ("CritiqueGRPO", isinstance(self.token_objective, CritiqueGRPO)),
        ):
            if there:
                raise ValueError(f"{name} does not go with an environment, in which responses have many turns")

    @property
    def acts(self) -> bool:
        """Whether responses are trajectories in environments."""
        return self.environment_factory is not None

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a response: the tokenizer's and the model's own."""
        own = self.model.generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        return sorted({self.data.end_id, *own})

    def check_data(self, data: Any) -> None:
        """Raise a ValueError when the data cannot be read by this model."""
        if data.hparams.get("mode") != "prompts":
            raise ValueError("reinforcement learning takes prompts: set data.init_args.mode to prompts")
        if self.model is not None:
            vocab_size = self.model.config.get_text_config().vocab_size
            if data.vocab_size > vocab_size:
                raise ValueError(
                    f"the tokenizer's largest id is {data.vocab_size - 1} but the model's vocab_size is {vocab_size}: "
                    "set data.init_args.tokenizer to the model's own"
                )
        if self.distillation is not None and self._teacher_tokenizer is not None:
            self.distillation.check_tokenizers(data.tokenizer, self._teacher_tokenizer)

    def check_schedule(self, trainer: L.Trainer) -> None:
        """Raise a ValueError when the run has no end or the learning-rate schedule cannot run for so many steps."""
        if trainer.max_steps < 1:
            raise ValueError("trainer.max_steps must be given: it is the number of optimiser steps")
        check_schedule(self.lr_scheduler, trainer)

    def training_step(self, batch: list[Example], batch_idx: int) -> None:
        """Sample, reward, and step; or, supervised, step towards the answers."""
        self._started = True
        if self.supervised is not None:
            self.imitate(self.supervised, batch)
        else:
            rollout = self.roll_out(batch)
            self.num_rollouts += 1
            filled = self._filled_up(rollout) if self.dynamic_sampling else rollout
            if filled is not None:
                self.learn(filled)
        for name, value in means(self._measured).items():
            self.log(name, value, prog_bar=name in SHOWN)
        self._measured.clear()

    @torch.no_grad()
    def roll_out(self, examples: list[Example]) -> Rollout:
        """Answer and reward a batch of prompts, and measure how it went under TRL's names."""
        with unsharded(self.model):  # for good: processes may sample different numbers of tokens
            return self._act(examples) if self.acts else self._answer(examples)

    def _answer(self, examples: list[Example]) -> Rollout:
        asked = [self.data.prompt(example) for example in examples]
        prompts = self.prompt_batch(asked)
        each = self.generators(ROLLOUT, [(place,) for place in range(len(examples))])
        noise: Noise | None = None
        looking: AbstractContextManager = nullcontext()
        attention = self.attention_rl
        if attention is not None and attention.exploration:
            time = prompts.input_ids.shape[1] + self.sampling.max_completion_length
            layers = list(AttentionRecorder(self.model, attention.layers).layers)
            noise = draw_noise(
                self.model, attention.target, layers, attention.exploration, len(examples), self.num_generations, time,
                each,
            )  # fmt: skip
            looking = explored(self.model, attention.target, noise)
        if self.rollouts is not None:
            completions = self._ask_server(self.rollouts, asked, each)
        else:
            with evaluating(self.model), looking:
                completions = sample(
                    self.model, prompts, self.num_generations, self.sampling, self.eos_token_ids, self.data.pad_id,
                    each, prefill_once=noise is None,
                )  # fmt: skip
        noise = noise and cut_noise(noise, prompts.input_ids.shape[1] + completions.ids.shape[1])
        texts, rewards = self._rewarded(examples, completions)
        rollout = Rollout(asked, completions, rewards.total, noise)
        if isinstance(self.token_objective, CritiqueGRPO):
            return with_refinements(self, self.token_objective, examples, texts, rollout)
        return rollout

    def _ask_server(self, served: ServedRollouts, asked: list[Prompt], each: list[torch.Generator]) -> Completions:
        """The same by a server that has the policy's weights."""
        if any(prompt.images is not None for prompt in asked):
            raise ValueError("rollouts: prompts with images are not sent to a server: remove rollouts")
        served.update(self)
        seeds = [generator.initial_seed() & 0x7FFFFFFF for generator in each]
        completions = served.sample(
            [prompt.tokens for prompt in asked], self.num_generations, self.sampling, self.eos_token_ids,
            self.data.pad_id, seeds,
        )  # fmt: skip
        return Completions(*(x.to(self.device) for x in completions))

    def _act(self, examples: list[Example]) -> Rollout:
        """The same in environments."""
        each = self.generators(ROLLOUT, [(place,) for place in range(len(examples))])
        acted = act_out(self, examples, self.num_generations, self.sampling, each)
        _, rewards = self._rewarded(examples, acted.completions, acted.environments)
        for name, (value, weight) in acted.metrics().items():
            self.measure(name, value, weight)
        return self._judged(acted, rewards.total)

    def _judged(self, acted: Acted, rewards: Float[Tensor, " responses"]) -> Rollout:
        """Trajectories as they are learnt from: what SWEDapo makes of rewards, and what is left out of the loss."""
        shaped, kept = rewards, torch.ones_like(acted.completions.mask)
        if isinstance(self.token_objective, SWEDapo):
            shaped = self.token_objective.shaped(rewards, acted.turns.cpu(), self.max_turns)
            kept = kept & self.token_objective.kept(rewards, self.num_generations).to(kept.device)[:, None]
            self.measure("reward/shaped", shaped.mean())
        if self.rejection is not None:
            kept = kept & self.rejection.kept(rewards).to(kept.device)[:, None] & ~acted.faulty
        return Rollout(acted.prompts, acted.completions, shaped, kept=kept)

    def _rewarded(
        self, examples: list[Example], completions: Completions, environments: list[Any] | None = None
    ) -> tuple[list[str], Rewards]:
        """Texts and rewards of all responses; what is measured is that of all processes together."""
        repeated = [example for example in examples for _ in range(self.num_generations)]
        texts, rewards = self.reward(repeated, completions, environments)
        everyones = Rewards(*(gather_groups(x, self.num_generations) for x in rewards))
        if self.num_generations > 1:
            signal = groups_with_signal(everyones.total, self.num_generations)
            self.measure("frac_reward_zero_std", (~signal).float().mean())
        for name, value in self.rewards.metrics(everyones).items():
            self.measure(name, value)
        self.measure("completions/mean_length", completions.mask.sum(1).float().mean())
        self.measure("completions/clipped_ratio", completions.truncated.float().mean())
        self.samples = list(zip([e["prompt"] for e in repeated], texts, rewards.total.tolist(), strict=True))
        return texts, rewards

    def learn(self, rollout: Rollout) -> None:
        """Take the optimiser steps that a rollout is good for."""
        experience = self._experience(rollout)
        first = True
        for _ in range(self.num_iterations):
            for rows in self._steps(len(rollout.rewards), len(rollout.prompts) * self.num_generations):
                if self.trainer.global_step >= self.trainer.max_steps:
                    break
                part = experience.select(rows)
                times = self._times(part)
                with self._observing(times) as seen:
                    scores = self._score(part.prompts, part.completions, times)
                old = scores.detach() if part.old is None else part.old
                if self.steps_per_generation == 1:  # one step a pass: the first pass is the rollout's policy
                    experience.old = old
                loss = self._loss(part, scores, old, seen)
                if first:
                    self._measure_sampling(part.sampled(), scores.logps)
                self._step(loss)
                self.measure("loss", loss)
                first = False

    def _steps(self, responses: int, sampled: int) -> tuple[Tensor, ...]:
        """The rows of each optimiser step of a pass: as many steps in every process, which may have refined others."""
        return torch.arange(responses).tensor_split(min(self.steps_per_generation, sampled))

    def imitate(self, supervised: SFT, examples: list[Example]) -> None:
        """Take the optimiser steps that the answers are good for: as many as a rollout of as many prompts."""
        for _ in range(self.num_iterations):
            for rows in self._steps(len(examples), len(examples)):
                if self.trainer.global_step >= self.trainer.max_steps:
                    break
                prompts, completions = self._answers([examples[row] for row in rows.tolist()])
                logps, _ = completion_logps(self.model, prompts, completions, temperature=1.0)
                (share,) = global_mean_weights(completions.mask.sum())
                loss = supervised.loss(logps, completions.mask) * share.to(logps.dtype)
                self._step(loss)
                self.measure("loss", loss)

    def _answers(self, examples: list[Example]) -> tuple[PromptBatch, Completions]:
        """Prompts, and their answers as if they had been sampled."""
        prompts = [self.data.prompt(example) for example in examples]
        answers = [
            self.data.answer_and_mask(prompt.tokens, example) for prompt, example in zip(prompts, examples, strict=True)
        ]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(x, device=self.device) for x in column], True, padding)
            for column, padding in zip(zip(*answers, strict=True), (self.data.pad_id, False), strict=True)
        )
        never = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        return self.prompt_batch(prompts), Completions(ids, mask, never, torch.zeros_like(ids, dtype=torch.float32))

    def _experience(self, rollout: Rollout) -> Experience:
        """What the objectives need of a rollout, but for the policy's own passes."""
        sizes = self._sizes(rollout)
        completions = Completions(*(x.to(self.device) for x in rollout.completions))
        mask = completions.mask
        if self.token_objective is not None:
            mask = self.token_objective.loss_mask(mask, completions.truncated)
        if rollout.kept is not None:
            mask = mask & rollout.kept.to(self.device)
        items = torch.stack(all_gather_object(mask.sum().cpu())).double().mean().to(self.device)
        experience = Experience(
            self.prompt_batch(rollout.prompts).repeat(sizes), torch.arange(len(sizes)).repeat_interleave(sizes),
            completions, self._advantages(rollout), mask, items / self.steps_per_generation, noise=rollout.noise,
            refined=None if rollout.refined is None else rollout.refined.to(self.device),
        )  # fmt: skip
        if rollout.noise is not None or (self.learns_by_reward and self.steps_per_generation > 1):
            experience.old = self._score_rollout(experience)
        experience.ref_logps = self._reference_logps(experience)
        return experience

    def _sizes(self, rollout: Rollout) -> Times:
        """How many responses each group has."""
        even = torch.full((len(rollout.prompts),), self.num_generations)
        return even if rollout.sizes is None else rollout.sizes

    def _advantages(self, rollout: Rollout) -> Float[Tensor, " responses"]:
        """Those of the groups; zeros for distillation alone, which needs neither groups nor rewards."""
        rewards = rollout.rewards
        if not self.learns_by_reward:
            return torch.zeros_like(rewards, device=self.device)
        if isinstance(self.token_objective, CritiqueGRPO):
            return self.token_objective.advantages(rewards, self._sizes(rollout).tolist()).to(self.device)
        scale = "group" if self.token_objective is None else self.token_objective.scale_rewards
        everyones = gather_groups(rewards, self.num_generations)  # a batch's deviation is that of all processes
        advantages = group_advantages(everyones, self.num_generations, scale)
        return own_groups(advantages, self.num_generations).to(self.device)

    def _loss(self, part: Experience, scores: Scores, old: Scores, seen: list[Observation]) -> Float[Tensor, ""]:
        """The sum of the objectives' losses; its mean over processes is the loss of all their responses."""
        loss, generated, tokens = scores.logps.new_zeros(()), part.completions.mask, part.mask.sum()
        self.measure("entropy", (scores.entropy * generated).sum() / generated.sum(), generated.sum())
        of_responses, of_tokens = global_mean_weights(torch.tensor(len(part.mask), device=tokens.device), tokens)
        share = {"responses": of_responses, "tokens": of_tokens, "processes": torch.ones_like(of_tokens)}
        for prefix, mean_over, objective_loss, metrics in self._losses(part, scores, old, seen):
            loss = loss + objective_loss * share[mean_over].to(loss.dtype)
            for name, value in metrics.items():
                self.measure(f"{prefix}{name}", value, tokens)
        return loss

    def _losses(
        self, part: Experience, scores: Scores, old: Scores, seen: list[Observation]
    ) -> Iterator[tuple[str, str, Float[Tensor, ""], dict[str, Tensor]]]:
        """What stands before an objective's metrics in the log, what its loss is a mean over, the loss, the metrics."""
        if self.token_objective is not None:
            shaped = {} if part.refined is None else {"refined": part.refined}
            loss, metrics = self.token_objective.loss(
                scores.logps, old.logps, part.advantages, part.mask, ref_logps=part.ref_logps,
                num_items=part.num_items, max_completion_length=self.sampling.max_completion_length, **shaped,
            )  # fmt: skip
            yield "", MEAN_OVER[self.token_objective.loss_type], loss, metrics
        if self.rejection is not None:
            self.measure("rejection/kept", part.mask.any(1).float().mean())
            yield "rejection/", "tokens", self.rejection.loss(scores.logps, part.mask), {}
        if self.attention_rl is not None:
            loss, metrics = self.attention_rl.loss(scores.records, old.records, part.advantages, part.mask, part.noise)
            yield "attention/", "tokens", loss, metrics
        if self.distillation is not None:
            loss, metrics = self.distillation.loss(seen[0], self._teach(self.distillation, part), part.mask)
            yield "distillation/", "tokens", loss, metrics

    def _measure_sampling(self, completions: Completions, logps: Float[Tensor, "responses length"]) -> None:
        """How far log-probabilities are from those that were sampled with, under TRL's names."""
        difference = ((logps - completions.sampled_logps).abs() * completions.mask).detach()
        count = completions.mask.sum()
        self.measure("sampling/sampling_logp_difference/mean", difference.sum() / count.clamp(min=1), count)
        self.measure("sampling/sampling_logp_difference/max", difference.max())

    def _step(self, loss: Float[Tensor, ""]) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.log("grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        schedule.step()

    def _score(self, prompts: PromptBatch, completions: Completions, times: int | Times) -> Scores:
        """Log-probabilities, token entropies and what AttentionRL's layers attended to."""
        if self.attention_rl is None:
            return Scores(*completion_logps(self.model, prompts, completions, self.temperature, times), {})
        with AttentionRecorder(self.model, self.attention_rl.layers, times) as recorder:
            logps, entropy = completion_logps(self.model, prompts, completions, self.temperature, times)
            return Scores(logps, entropy, recorder.records)

    def _times(self, part: Experience) -> int | Times:
        """How many responses share one reading of their prompt.

        One where activation checkpointing forbids a cache, and in sharded models: gradients that go through a cache go
        past the places where those gather a layer's weights.
        """
        alone = self.device_mesh is not None or self.model.is_activation_checkpointing
        return 1 if alone else part.times

    @torch.no_grad()
    def _score_rollout(self, experience: Experience) -> Scores:
        """The same under the policy that sampled, its exploration included."""
        prompts, completions, noise = experience.prompts, experience.completions, experience.noise
        if noise is None or self.attention_rl is None:
            return self._score(prompts, completions, self._times(experience))
        with explored(self.model, self.attention_rl.target, noise):
            return self._score(prompts, completions, 1)  # responses read differently

    def _observing(self, times: int | Times) -> AbstractContextManager[list[Observation]]:
        """A context in which the policy's passes leave what distillation compares."""
        if self.distillation is None:
            return nullcontext([])
        return observed(self.model, self.distillation.student_layer, times)

    @torch.no_grad()
    def _teach(self, distillation: AttentionDistillation, part: Experience) -> Observation:
        """What the teacher makes of the policy's responses: for each step anew, as logits are large."""
        self._teacher = [model.to(self.device) for model in self._teacher]
        with observed(self._teacher[0], distillation.teacher_layer, part.times) as seen:
            completion_logps(self._teacher[0], part.prompts, part.completions, self.temperature, part.times)
        return seen[0]

    @torch.no_grad()
    def _reference_logps(self, experience: Experience) -> Tensor | None:
        if self.token_objective is None or not self.token_objective.beta:
            return None
        read = experience.prompts, experience.completions, self.temperature, self._times(experience)
        if self.lora is not None:
            with self.model.disable_adapter():
                return completion_logps(self.model, *read)[0]
        self._reference = [model.to(self.device) for model in self._reference]
        return completion_logps(self._reference[0], *read)[0]

    def prompt_batch(self, prompts: list[Prompt]) -> PromptBatch:
        """Prompts as the model reads them."""
        images = _stacked([prompt.images for prompt in prompts])
        grids = _stacked([prompt.image_grid_thw for prompt in prompts])
        batch = pad_prompts([prompt.tokens for prompt in prompts], self.data.pad_id, self.device, images, grids)
        return batch if grids is None else batch._replace(position_ids=vision_positions(self.model, batch))

    def reward(
        self, examples: list[Example], completions: Completions, environments: list[Any] | None = None
    ) -> tuple[list[str], Rewards]:
        """The texts of responses, one to each example, and what they earn."""
        texts, ids = self.texts_and_ids(completions)
        columns = {name: [example[name] for example in examples] for name in examples[0] if name != "prompt"}
        if environments is not None:
            columns["environments"] = environments
        return texts, self.rewards([example["prompt"] for example in examples], texts, ids, **columns)

    def texts_and_ids(self, completions: Completions) -> tuple[list[str], list[list[int]]]:
        """Each response's text without its end, and its tokens with it."""
        ids = [row[mask].tolist() for row, mask in zip(completions.ids, completions.mask, strict=True)]
        bare = [[token for token in row if token not in self.eos_token_ids] for row in ids]
        return self.data.tokenizer.batch_decode(bare), ids

    def _filled_up(self, rollout: Rollout) -> Rollout | None:
        """A batch of groups whose rewards differ, out of this rollout and those before it; None: too few yet.

        What waits is that of all processes: one that found less learns from what another has found.
        """
        rank, size = rank_and_size()
        self._waiting += [group for group in dealt(all_gather_object(self._groups(rollout))) if group is not None]
        if len(self._waiting) < len(rollout.prompts) * size:
            self.measure("dynamic_sampling/waiting", float(len(self._waiting) * self.num_generations))
            return None
        chosen, self._waiting = self._waiting[: len(rollout.prompts) * size], []
        mine = chosen[rank::size]
        completions = concatenate([group.completions for group in mine], self.data.pad_id)
        prompts = [prompt for group in mine for prompt in group.prompts]
        return Rollout(prompts, completions, torch.cat([group.rewards for group in mine]))

    def _groups(self, rollout: Rollout) -> list[Rollout | None]:
        """Every group on its own and on the CPU; None in the place of those without signal."""
        signal = groups_with_signal(rollout.rewards, self.num_generations)
        parts = zip(*(x.cpu().split(self.num_generations) for x in rollout.completions), strict=True)
        rewards = rollout.rewards.split(self.num_generations)
        return [
            Rollout([prompt], Completions(*completions), earned) if kept else None
            for prompt, completions, earned, kept in zip(rollout.prompts, parts, rewards, signal.tolist(), strict=True)
        ]

    @torch.no_grad()
    def validation_step(self, batch: list[Example], batch_idx: int) -> Answered:
        """Answer held-out prompts; callbacks get what was answered as the step's output."""
        return (validate_acting if self.acts else validate)(self, batch, batch_idx)

    def answer(self, prompts: PromptBatch, times: int, sampling: Sampling, generator: Generators = None) -> Completions:
        """Responses of the policy as it is, without exploration."""
        with evaluating(self.model):
            return sample(self.model, prompts, times, sampling, self.eos_token_ids, self.data.pad_id, generator)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimiser; the schedule steps with it."""
        with named("optimizer"):
            optimizer = self.optimizer(decay_groups(self.model))
        with named("lr_scheduler"):
            return [optimizer], [self.lr_scheduler(optimizer, scheduled_steps(self.trainer, self.trainer.max_steps))]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the checkpoint holds and how many rollouts there were: their random numbers follow from it."""
        model = self.model if self.lora is None else self.model.get_base_model()
        own = isinstance(model, HybridMemForCausalLM)
        checkpoint["hybridmem_config" if own else "transformers_config"] = model.config.to_dict()
        checkpoint["lora"] = self.lora
        checkpoint["processor"] = self.data.hparams.get("processor")
        checkpoint["tokenizer"] = checkpoint["processor"] or self.data.hparams.get("tokenizer")
        checkpoint["num_rollouts"] = self.num_rollouts
        if self.device_mesh is None:
            name_optimizer_states(checkpoint, self, self.trainer.optimizers)
        parts = self.token_objective, self.attention_rl, self.distillation, self.supervised, self.rejection
        method = " and ".join(type(part).__name__ for part in parts if part is not None)
        checkpoint["facts"] = training_facts(self.data, self.trainer.callback_metrics, method)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the random numbers that come next."""
        self.num_rollouts = checkpoint["num_rollouts"]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """What each prompt of a batch has, as one tensor; None where they have none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    if len(found) < len(parts) or len({part.shape for part in found}) > 1:
        raise ValueError("prompts of one batch must all have images, of one size, or none: make the task's examples so")
    return torch.stack(found)


def _only(objectives: Sequence[Any], kind: type) -> Any:
    found = [objective for objective in objectives if isinstance(objective, kind)]
    if len(found) > 1:
        raise ValueError(f"objectives names {len(found)} of {kind.__name__}; keep one")
    return found[0] if found else None
