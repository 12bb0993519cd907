"""Neural memory layers: projections and gates, the scan, and the output gate (Titans, arXiv 2501.00663, section 4)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from hybridmem_kernels import MemoryMLPState, MemoryState, memory_mlp, memory_mlp_scan, memory_scan
from hybridmem_kernels.documents import document_starts
from hybridmem_kernels.memory_scan import state_dtype

from .configuration import HybridMemConfig
from .convolution import ConvolutionState, ShortConvolution, convolve
from .functional import l2_normalize, linear_rows, rms_norm
from .sequence import TokenSequence, known_true
from .sinks import WindowPlan
from .state import select_rows

NO_DOCUMENT = -3  # no token has been written yet


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
        """Normalise `x`."""
        return rms_norm(x, self.weight, self.eps)


class PretrainedRMSNorm(RMSNorm):
    """RMSNorm with the rounding of transformers' models, so that converted models give identical logits."""

    def forward(self, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
        """Normalise `x`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def norm_layer(config: HybridMemConfig, dim: int) -> RMSNorm:
    """Return the normalisation layer for a pretrained base model, or the default one."""
    return (PretrainedRMSNorm if config.is_pretrained else RMSNorm)(dim, config.rms_norm_eps)


class ScanInputs(NamedTuple):
    """Queries, keys, values and gates of every token, as inputs of the scan."""

    q: Float[Tensor, "batch heads time dim"]
    k: Float[Tensor, "batch heads time dim"]
    v: Float[Tensor, "batch heads time dim"]
    alpha: Float[Tensor, "batch heads time"]
    eta: Float[Tensor, "batch heads time"]
    theta: Float[Tensor, "batch heads time"]


class MemoryTrace(NamedTuple):
    """Gates, surprise and state norms of a memory along a text."""

    alpha: Float[Tensor, "batch heads time"]
    eta: Float[Tensor, "batch heads time"]
    theta: Float[Tensor, "batch heads time"]
    surprise: Float[Tensor, "batch heads rest"]  # of every token except the first
    state_norm: Float[Tensor, "batch heads"]


class WriteRouter(nn.Module):
    """Rule by which a memory stores a token if a linear function of its normalised input is positive.

    Its numbers are buffers, because no gradient passes through the choice.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(hidden_size))
        self.register_buffer("bias", torch.ones(()))

    def forward(self, x: Float[Tensor, "batch time hidden"]) -> Bool[Tensor, "batch time"]:
        """Return True for tokens to store."""
        return router_scores(x, self.weight, self.bias) > 0


def router_scores(
    x: Float[Tensor, "*rows hidden"], weight: Float[Tensor, "*#rows hidden"], bias: Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows"]:
    """Return a linear function of each token's normalised input, divided by the number of its channels."""
    x = nn.functional.rms_norm(x.to(weight.dtype), x.shape[-1:])
    return (x * weight).mean(-1) + bias


class NeuralMemoryState(NamedTuple):
    """State that a memory layer carries from call to call; its size is constant."""

    scan: MemoryState | MemoryMLPState
    convolution: ConvolutionState | None


class NeuralMemory(nn.Module):
    """Memory that learns surprising tokens and forgets old ones; each token reads it after its own write.

    The pipeline: projections, short convolution, SiLU, L2 norm, gates, scan, RMSNorm, output gate, output projection.
    """

    def __init__(self, config: HybridMemConfig):
        super().__init__()
        self.config = config
        heads, dim = config.memory_heads, config.memory_head_dim
        self.heads, self.dim, self.inner = heads, dim, heads * dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * self.inner, bias=False)
        self.convolution = (
            ShortConvolution(3 * self.inner, config.memory_conv_size) if config.memory_conv_size > 1 else None
        )
        self.eta_depends_on_token = config.memory_momentum and config.memory_step != "certified"
        self.gate_proj = nn.Linear(config.hidden_size, heads * (3 if self.eta_depends_on_token else 2))
        # Certified steps require a constant eta, one per head.
        self.eta_logit = (
            nn.Parameter(torch.empty(heads)) if config.memory_momentum and not self.eta_depends_on_token else None
        )
        hidden = dim * config.memory_expansion
        widths = [dim, *[hidden] * (config.memory_depth - 1), dim]
        shapes = pairwise(widths) if config.memory_depth > 1 else ()
        self.initial_weights = nn.ParameterList(torch.empty(heads, *shape) for shape in shapes)
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.output_gate = nn.Linear(config.hidden_size, self.inner, bias=False)
        self.o_proj = nn.Linear(self.inner, config.hidden_size, bias=False)
        self.router = WriteRouter(config.hidden_size) if config.memory_router else None

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: NeuralMemoryState | None, sequence: TokenSequence
    ) -> tuple[Float[Tensor, "batch time hidden"], NeuralMemoryState]:
        """Read and write along `x`; return the output and the next state."""
        if state is not None and sequence.fresh_rows is not None:
            state = self.reset(state, sequence.fresh_rows)
        sequence = self._routed(x, sequence)
        inputs, convolution = self.scan_inputs(x, None if state is None else state.convolution, sequence)
        out, scan = self._scan(inputs, None if state is None else state.scan, sequence)
        return self._finish(out, x), NeuralMemoryState(scan, convolution)

    def scan_inputs(
        self, x: Float[Tensor, "batch time hidden"], state: ConvolutionState | None, sequence: TokenSequence
    ) -> tuple[ScanInputs, ConvolutionState | None]:
        """Compute queries, keys, values and gates of every token."""
        qkv = self.qkv_proj(x)
        if self.convolution is not None:
            qkv, state = self.convolution(qkv, state, sequence)
        q, k, v = self._split(nn.functional.silu(qkv))
        return ScanInputs(q, k, v, *self._gates(x)), state

    def trace(
        self, x: Float[Tensor, "batch time hidden"], state: NeuralMemoryState | None, sequence: TokenSequence
    ) -> MemoryTrace:
        """Record the gates, the surprise ‖M(W_{t-1}; k_t) - v_t‖ and the state's norm along `x`."""
        if state is not None and sequence.fresh_rows is not None:
            state = self.reset(state, sequence.fresh_rows)
        sequence = self._routed(x, sequence)
        inputs, _ = self.scan_inputs(x, None if state is None else state.convolution, sequence)
        # A token reads the state after its own write. Querying with the next token's key gives M(W_{t-1}; k_t).
        ahead = inputs._replace(q=inputs.k.roll(-1, dims=2))
        recalled, scan = self._scan(ahead, None if state is None else state.scan, sequence)
        weights = (scan.weight,) if isinstance(scan, MemoryState) else scan.weights
        norm = torch.stack([w.square().sum((-2, -1)) for w in weights]).sum(0).sqrt()
        recalled = recalled[:, :, :-1]
        if sequence.document_ids is not None:  # the first token of a document finds an empty memory
            starts = document_starts(sequence.document_ids, sequence.mask)[:, None, 1:, None]
            fresh = _recall(self.initial_scan_state(len(x), x), inputs.k[:, :, 1:])
            recalled = torch.where(starts, fresh.to(recalled.dtype), recalled)
        surprise = (recalled - inputs.v[:, :, 1:]).norm(dim=-1)
        return MemoryTrace(inputs.alpha, inputs.eta, inputs.theta, surprise, norm)

    def read(
        self,
        x: Float[Tensor, "batch time hidden"],
        queries: Float[Tensor, "batch heads time dim"],
        scan: MemoryState | MemoryMLPState,
    ) -> Float[Tensor, "batch time hidden"]:
        """Read the memory in its current state with `queries` from `NeuralMemory.queries`, without writing."""
        return self._finish(_recall(scan, queries).to(queries.dtype), x)

    def queries(
        self, x: Float[Tensor, "batch time hidden"], state: ConvolutionState | None, sequence: TokenSequence
    ) -> tuple[Float[Tensor, "batch heads time dim"], ConvolutionState | None]:
        """Compute only the queries of `x`, for `read`."""
        q = linear_rows(self.qkv_proj, x, 0, self.inner)
        if self.convolution is not None:
            q, state = convolve(q, self.convolution.weight[: self.inner], state, sequence)
        return l2_normalize(self._heads(nn.functional.silu(q))), state

    def initial_scan_state(self, batch: int, like: Tensor) -> MemoryState | MemoryMLPState:
        """Return the state of an empty memory."""
        empty = like.new_zeros(batch, self.heads, 0, self.dim)
        gate = like.new_zeros(batch, self.heads, 0)
        return self._scan(ScanInputs(empty, empty, empty, gate, gate, gate), None, TokenSequence())[1]

    def reset(self, state: NeuralMemoryState, rows: Bool[Tensor, " batch"]) -> NeuralMemoryState:
        """Empty the memory in the selected rows."""
        fresh = self.initial_scan_state(len(rows), self.o_proj.weight)
        return state._replace(scan=select_rows(rows, fresh, state.scan))

    def _routed(self, x: Float[Tensor, "batch time hidden"], sequence: TokenSequence) -> TokenSequence:
        """Add the router's choice, unless the caller has made one."""
        if self.router is None or sequence.writes is not None:
            return sequence
        return replace(sequence, writes=self.router(x))

    def _scan(
        self, inputs: ScanInputs, state: MemoryState | MemoryMLPState | None, sequence: TokenSequence
    ) -> tuple[Float[Tensor, "batch heads time dim"], MemoryState | MemoryMLPState]:
        config, mask = self.config, sequence.mask
        if sequence.writes is not None:
            inputs, mask = skip_writes(inputs, sequence.writes, sequence.document_ids, mask, config)
        if config.memory_depth == 1:
            assert not isinstance(state, MemoryMLPState)
            return memory_scan(
                *inputs,
                state,
                chunk_size=config.memory_chunk_size,
                document_ids=sequence.document_ids,
                mask=mask,
                in_place=sequence.decodes,
            )
        assert not isinstance(state, MemoryState)
        return memory_mlp_scan(
            *inputs,
            list(self.initial_weights),
            state,
            chunk_size=config.memory_chunk_size,
            max_grad_norm=config.memory_max_grad_norm,
            document_ids=sequence.document_ids,
            mask=sequence.mask,
        )

    def _gates(self, x: Float[Tensor, "batch time hidden"]) -> tuple[Float[Tensor, "batch heads time"], ...]:
        """Compute alpha, eta and theta, with theta within the bound of `memory_step`."""
        return memory_gates(self.config, self.gate_proj(x), self.eta_logit)

    def _heads(self, x: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch heads time dim"]:
        """Split channels into heads."""
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def _split(self, x: Float[Tensor, "batch time channels"]) -> tuple[Float[Tensor, "batch heads time dim"], ...]:
        """Split channels into normalised queries and keys, and values."""
        unnormalized, v = self._heads(x).split((2 * self.heads, self.heads), dim=1)
        q, k = l2_normalize(unnormalized).split(self.heads, dim=1)
        return q, k, v

    def _finish(
        self, out: Float[Tensor, "batch heads time dim"], x: Float[Tensor, "batch time hidden"]
    ) -> Float[Tensor, "batch time hidden"]:
        """Normalise each head, apply the output gate, and project."""
        out = self.norm(out.transpose(1, 2)).flatten(-2)
        return self.o_proj(out * torch.sigmoid(self.output_gate(x)))


def _recall(
    scan: MemoryState | MemoryMLPState, queries: Float[Tensor, "batch heads time dim"]
) -> Float[Tensor, "batch heads time dim"]:
    """Read a memory state with `queries`, in the state's dtype."""
    if isinstance(scan, MemoryState):
        return queries.to(scan.weight.dtype) @ scan.weight
    return memory_mlp(scan.weights, queries.to(scan.weights[0].dtype))


def memory_gates(
    config: HybridMemConfig,
    logits: Float[Tensor, "batch time channels"],
    eta_logit: Float[Tensor, " heads"] | None,
) -> tuple[Float[Tensor, "batch heads time"], ...]:
    """Compute alpha, eta and theta from the logits of alpha and theta, and of eta if it depends on the token."""
    depends_on_token = config.memory_momentum and eta_logit is None
    gates = torch.sigmoid(logits.to(state_dtype(logits.dtype))).transpose(1, 2)
    alpha, write, *rest = gates.chunk(3 if depends_on_token else 2, dim=1)
    if not config.memory_forgetting:
        alpha = torch.zeros_like(alpha)
    if not config.memory_momentum:
        eta = torch.zeros_like(write)
    elif eta_logit is not None:
        eta = torch.sigmoid(eta_logit.to(write.dtype))[:, None].expand_as(write)
    else:
        eta = rest[0]
    theta = write * write_bound(config.memory_step, eta)
    # A deep memory has no certificate: all layers move at once, so the step is divided among them.
    return alpha, eta, theta if config.memory_depth == 1 else theta / config.memory_depth


def write_bound(step: str, eta: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
    """Return the largest theta that `memory_step` allows for the momentum gate eta.

    Through the momentum, a write keeps moving the weights, by theta / (1 - eta) in total. Below
    2(1 - eta)² / (1 + eta) and with constant eta, no sequence of unit keys makes the state grow. Above 1, a write
    without momentum overshoots its target, so the bound is capped at 1.
    """
    if step == "certified":
        return (2 * (1 - eta).square() / (1 + eta)).clamp(max=1)
    return 1 - eta if step == "damped" else torch.ones_like(eta)


def skip_writes(
    inputs: ScanInputs,
    writes: Bool[Tensor, "batch time"],
    document_ids: Int[Tensor, "batch time"] | None,
    mask: Bool[Tensor, "batch time"] | None,
    config: HybridMemConfig,
) -> tuple[ScanInputs, Bool[Tensor, "batch time"]]:
    """Return inputs and mask of a scan that reads at every token and stores only some.

    A skipped token leaves weights and momentum alone, as if the text lacked it. If it begins a document, it still
    empties the memory.

    Raises:
        ValueError: a deep memory, which reads only at tokens that it stores.
    """
    if config.memory_depth > 1:
        raise ValueError(f"memory_depth={config.memory_depth} stores every token: set 1 to choose which to write")
    kept = writes if document_ids is None else writes | document_starts(document_ids, mask)
    inputs = inputs._replace(theta=inputs.theta.where(writes[:, None], 0))
    return inputs, kept if mask is None else kept & mask


class HeadMemoryState(NamedTuple):
    """State of the memory, with unrotated keys and gates of the window's tokens, which are written later."""

    scan: MemoryState | MemoryMLPState | None  # None: no token has left the window
    keys: Float[Tensor, "batch kv_heads kept dim"]
    gates: Float[Tensor, "batch heads kept gates"]
    document: Int[Tensor, " batch"]  # of the last write
    writes: Bool[Tensor, "batch 1 kept"] | None = None  # False for tokens to skip; None: all are stored


class FeatureMap(nn.Module):
    """Linear map for each head, followed by L2 normalisation; it starts as the identity."""

    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))

    def forward(
        self, x: Float[Tensor, "batch heads time dim"], heads: list[int]
    ) -> Float[Tensor, "batch heads time dim"]:
        """Map the vectors of `heads`."""
        return l2_normalize(x @ pick(self.weight, heads, 0).to(x.dtype))


class HeadMemory(nn.Module):
    """Memories of a layer's query heads, with the gates that mix them with the window."""

    def __init__(self, config: HybridMemConfig):
        super().__init__()
        self.config = config
        heads, dim = config.num_attention_heads, config.head_dim
        self.heads, self.groups = heads, heads // config.num_key_value_heads
        self.q_map, self.k_map = FeatureMap(heads, dim), FeatureMap(heads, dim)
        depends_on_token = config.memory_momentum and config.memory_step != "certified"
        self.gate_proj = nn.Linear(config.hidden_size, heads * (3 if depends_on_token else 2))
        self.eta_logit = nn.Parameter(torch.zeros(heads)) if config.memory_momentum and not depends_on_token else None
        self.mixing_gate = nn.Linear(config.hidden_size, heads)
        self.window_mass = nn.Parameter(torch.zeros(heads))
        widths = [dim, *[dim * config.memory_expansion] * (config.memory_depth - 1), dim]
        shapes = pairwise(widths) if config.memory_depth > 1 else ()
        self.initial_weights = nn.ParameterList(torch.empty(heads, *shape) for shape in shapes)
        self.router = WriteRouter(config.hidden_size) if config.memory_router else None

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialise near plain window attention: identity maps, a mixing gate near 1, small write gates."""
        for feature_map in (self.q_map, self.k_map):
            init.copy_(feature_map.weight, torch.eye(self.config.head_dim).repeat(self.heads, 1, 1))
        init.normal_(self.gate_proj.weight, std=self.config.initializer_range)
        init.zeros_(self.gate_proj.bias)
        forgetting = -torch.linspace(4, 8, self.heads) if self.heads > 1 else torch.tensor([-6.0])
        rest = torch.zeros(self.gate_proj.out_features - self.heads)
        init.copy_(self.gate_proj.bias, torch.cat((forgetting, rest)))
        if self.eta_logit is not None:
            init.zeros_(self.eta_logit)
        init.zeros_(self.mixing_gate.weight)
        init.constant_(self.mixing_gate.bias, 4.0)
        init.zeros_(self.window_mass)
        for weight in self.initial_weights:
            init.normal_(weight, std=weight.shape[1] ** -0.5 * 0.5)

    def forward(
        self,
        x: Float[Tensor, "batch time hidden"],
        q: Float[Tensor, "batch heads time dim"],
        keys: Float[Tensor, "batch kv_heads read dim"],
        values: Float[Tensor, "batch kv_heads read dim"],
        attended: Float[Tensor, "batch time heads dim"],
        mass: Float[Tensor, "batch time heads"],
        kv_heads: list[int],
        plan: WindowPlan,
        state: HeadMemoryState | None,
        writes: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time heads dim"], HeadMemoryState]:
        """Write the tokens that leave the window, read the memory, and mix it with the window's output.

        Args:
            x: the layer's input.
            q: unrotated queries of `kv_heads`.
            keys, values: unrotated keys, and values, of [kept tokens, `x`].
            attended: the window's output.
            mass: log-sum-exp of the window's scores.
            kv_heads: indices of the KV heads.
            plan: the tokens that leave the window at each step.
            state: the state after earlier calls.
            writes: False for tokens of `x` that are skipped when they leave the window; None: those that the router
                skips, if there is one.
        """
        heads = self.query_heads(kv_heads)
        stored = self._stored(x, writes, state)
        gates = self.gates(x, heads)
        scan: MemoryState | MemoryMLPState | None = None
        document = torch.full((len(x),), NO_DOCUMENT, device=x.device)
        if state is not None:
            gates = torch.cat((state.gates.to(gates.dtype), gates), dim=2)
            scan, document = state.scan, state.document
        if plan.first_write < plan.time:
            scan, document = self._begin_documents(plan, scan, document, q, heads)
            inputs = self.scan_inputs(plan, q, keys, values, gates, heads)
            documents = None if plan.document_ids is None else plan.document_ids[:, plan.first_write :]
            mask = plan.written
            if stored is not None:
                inputs, mask = skip_writes(inputs, plan.leaving(stored)[:, 0], documents, mask, self.config)
            recalled, scan = self._scan(inputs, heads, scan, documents, mask)
            recalled = recalled.transpose(1, 2)
            if stored is not None:  # a memory that has stored nothing recalls zeros, and the window has all the mass
                recalled = recalled.where((recalled != 0).any(-1, keepdim=True), attended[:, plan.first_write :])
            attended = self._mix(x, attended, recalled, mass, heads, plan)
        kept = None if stored is None else plan.keep(stored)
        return attended, HeadMemoryState(scan, plan.keep(keys), plan.keep(gates), document, kept)

    def query_heads(self, kv_heads: list[int]) -> list[int]:
        """Return the query heads of the given KV heads."""
        return [head * self.groups + n for head in kv_heads for n in range(self.groups)]

    def gates(
        self, x: Float[Tensor, "batch time hidden"], heads: list[int]
    ) -> Float[Tensor, "batch some_heads time gates"]:
        """Compute alpha, eta and theta of the given query heads."""
        found = memory_gates(self.config, _project(self.gate_proj, x), self.eta_logit)
        return torch.stack([pick(gate, heads) for gate in found], dim=-1)

    def scan_inputs(
        self, plan: WindowPlan, q: Tensor, keys: Tensor, values: Tensor, gates: Tensor, heads: list[int]
    ) -> ScanInputs:
        """Return the writes of tokens that leave the window, and the queries that read after each write."""
        q = self.q_map(q[:, :, plan.first_write :], heads)
        k = self.k_map(self._repeat(plan.leaving(keys)), heads)
        alpha, eta, theta = plan.leaving(gates).unbind(-1)
        return ScanInputs(q, k, self._repeat(plan.leaving(values)), alpha, eta, theta)

    def _stored(
        self, x: Float[Tensor, "batch time hidden"], writes: Tensor | None, state: HeadMemoryState | None
    ) -> Bool[Tensor, "batch 1 read"] | None:
        """Return the choices for [kept tokens, `x`], or None if no call has made any."""
        before = None if state is None else state.writes
        if writes is None and self.router is not None:
            writes = self.router(x)
        if writes is None and before is None:
            return None
        writes = torch.ones_like(x[..., 0], dtype=torch.bool) if writes is None else writes
        if state is None:
            return writes[:, None]
        before = torch.ones_like(state.keys[:, :1, :, 0], dtype=torch.bool) if before is None else before
        return torch.cat((before, writes[:, None]), dim=2)

    def window_share(
        self,
        x: Float[Tensor, "batch time hidden"],
        mass: Float[Tensor, "batch time some_heads"],
        heads: list[int],
        plan: WindowPlan,
    ) -> Float[Tensor, "batch steps some_heads"]:
        """Return the window's modelled share of the attention mass, which is 1 while the memory is empty."""
        start = plan.first_write
        logits = pick(_project(self.mixing_gate, x[:, start:]).to(mass.dtype), heads, 2)
        share = torch.sigmoid(logits + pick(self.window_mass, heads, 0).to(mass.dtype) * mass[:, start:])
        return share if plan.written is None else share.where(plan.written[..., None], 1)

    def _mix(
        self, x: Tensor, attended: Tensor, recalled: Tensor, mass: Tensor, heads: list[int], plan: WindowPlan
    ) -> Tensor:
        """Weight window and memory by their shares of the attention mass."""
        start, share = plan.first_write, self.window_share(x, mass, heads, plan)
        mixed = torch.lerp(recalled, attended[:, start:], share[..., None].to(attended.dtype))
        return torch.cat((attended[:, :start], mixed), dim=1) if start else mixed

    def _begin_documents(
        self, plan: WindowPlan, scan: Any, document: Int[Tensor, " batch"], q: Tensor, heads: list[int]
    ) -> tuple[Any, Int[Tensor, " batch"]]:
        """Empty the memories of rows whose first write belongs to a new document.

        Return the memories, and the document of each row's last write after this call.
        """
        written = plan.written
        if written is None or plan.document_ids is None:
            return scan, torch.zeros_like(document)
        documents = plan.document_ids[:, plan.first_write :]
        last = torch.maximum(torch.where(written, documents, NO_DOCUMENT).amax(1), document)
        if scan is None:
            return None, last
        first = documents.gather(1, written.long().argmax(1, keepdim=True))[:, 0]
        other = written.any(1) & (first != document)
        if not known_true(~other.any()):
            empty, gate = q.new_zeros(*q.shape[:2], 0, q.shape[3]), q.new_zeros(*q.shape[:2], 0)
            fresh = self._scan(ScanInputs(empty, empty, empty, gate, gate, gate), heads, None)[1]
            scan = select_rows(other, fresh, scan)
        return scan, last

    def _scan(
        self,
        inputs: ScanInputs,
        heads: list[int],
        state: Any,
        document_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        config = self.config
        rows: dict[str, Any] = dict(chunk_size=config.memory_chunk_size, document_ids=document_ids, mask=mask)
        if config.memory_depth == 1:
            return memory_scan(*inputs, state, **rows)
        weights = [pick(weight, heads, 0) for weight in self.initial_weights]
        return memory_mlp_scan(*inputs, weights, state, max_grad_norm=config.memory_max_grad_norm, **rows)

    def _repeat(self, x: Tensor) -> Tensor:
        """Repeat each KV head for its query heads."""
        return x.repeat_interleave(self.groups, dim=1)


def _project(linear: Any, x: Float[Tensor, "*lead inputs"]) -> Float[Tensor, "*lead outputs"]:
    """Project in the layer's dtype, since memories may have a higher precision than the rest of the model."""
    return linear(x.to(linear.weight.dtype))


def pick(x: Tensor, wanted: Sequence[int], dim: int = 1) -> Tensor:
    """Select entries along an axis, in the given order; return a view if they are consecutive."""
    if list(wanted) == list(range(x.shape[dim])):
        return x
    if not wanted:
        return x.narrow(dim, 0, 0)
    starts = [n for n, index in enumerate(wanted) if not n or index != wanted[n - 1] + 1]
    runs = [x.narrow(dim, wanted[n], end - n) for n, end in pairwise([*starts, len(wanted)])]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=dim)
