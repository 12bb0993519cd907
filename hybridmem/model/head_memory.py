"""The memory of `mah`: what query heads remember of the tokens that left their window."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from hybridmem_kernels import MemoryMLPState, MemoryState, memory_mlp_scan, memory_scan

from .configuration import HybridMemConfig
from .functional import l2_normalize
from .memory import ScanInputs, memory_gates
from .sequence import known_true
from .sinks import WindowPlan
from .state import select_rows

NO_DOCUMENT = -3  # nothing was written yet


class HeadMemoryState(NamedTuple):
    """The memory, and what it will write of tokens that are still in the window: unrotated keys, gates."""

    scan: MemoryState | MemoryMLPState | None  # None: nothing has left the window
    keys: Float[Tensor, "batch kv_heads kept dim"]
    gates: Float[Tensor, "batch heads kept gates"]
    document: Int[Tensor, " batch"]  # of the last write


class FeatureMap(nn.Module):
    """A linear map for each head, followed by L2 normalisation; the identity at the start."""

    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))

    def forward(
        self, x: Float[Tensor, "batch heads time dim"], heads: list[int]
    ) -> Float[Tensor, "batch heads time dim"]:
        """Map the vectors of `heads`."""
        return l2_normalize(x @ pick(self.weight, heads, 0).to(x.dtype))


class HeadMemory(nn.Module):
    """The memories of a layer's query heads, and the gates that mix them with the window."""

    def __init__(self, config: HybridMemConfig):
        super().__init__()
        self.config = config
        heads, dim = config.num_attention_heads, config.head_dim
        self.heads, self.groups = heads, heads // config.num_key_value_heads
        self.q_map, self.k_map = FeatureMap(heads, dim), FeatureMap(heads, dim)
        depends_on_token = config.memory_momentum and config.memory_step != "certified"
        self.gate_proj = nn.Linear(config.hidden_size, heads * (3 if depends_on_token else 2))
        self.momentum_logit = (
            nn.Parameter(torch.zeros(heads)) if config.memory_momentum and not depends_on_token else None
        )
        self.mixing_gate = nn.Linear(config.hidden_size, heads)
        self.window_mass = nn.Parameter(torch.zeros(heads))
        widths = [dim, *[dim * config.memory_expansion] * (config.memory_depth - 1), dim]
        shapes = pairwise(widths) if config.memory_depth > 1 else ()
        self.initial_weights = nn.ParameterList(torch.empty(heads, *shape) for shape in shapes)

    @torch.no_grad()
    def initialize(self) -> None:
        """Start near the plain window: identity maps, a mixing gate near 1, gates that write gently."""
        for feature_map in (self.q_map, self.k_map):
            init.copy_(feature_map.weight, torch.eye(self.config.head_dim).repeat(self.heads, 1, 1))
        init.normal_(self.gate_proj.weight, std=self.config.initializer_range)
        init.zeros_(self.gate_proj.bias)
        forgetting = -torch.linspace(4, 8, self.heads) if self.heads > 1 else torch.tensor([-6.0])
        rest = torch.zeros(self.gate_proj.out_features - self.heads)
        init.copy_(self.gate_proj.bias, torch.cat((forgetting, rest)))
        if self.momentum_logit is not None:
            init.zeros_(self.momentum_logit)
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
    ) -> tuple[Float[Tensor, "batch time heads dim"], HeadMemoryState]:
        """Write the tokens that leave the window, read the memory, and mix it with the window's output.

        Args:
            x: the layer's input.
            q: unrotated queries of `kv_heads`.
            keys, values: unrotated keys, and values, of [kept tokens, `x`].
            attended: the window's output.
            mass: log-sum-exp of the window's scores.
            kv_heads: the heads of which these are.
            plan: which tokens leave the window at which step.
            state: what earlier calls left.
        """
        heads = [head * self.groups + n for head in kv_heads for n in range(self.groups)]
        found = memory_gates(self.config, self.gate_proj(x), self.momentum_logit)
        gates = torch.stack([pick(gate, heads) for gate in found], dim=-1)
        scan: MemoryState | MemoryMLPState | None = None
        document = torch.full((len(x),), NO_DOCUMENT, device=x.device)
        if state is not None:
            gates = torch.cat((state.gates.to(gates.dtype), gates), dim=2)
            scan, document = state.scan, state.document
        if plan.first_write < plan.time:
            scan, document = self._begin_documents(plan, scan, document, q, heads)
            recalled, scan = self._read_and_write(plan, q, keys, values, gates, heads, scan)
            attended = self._mix(x, attended, recalled.transpose(1, 2), mass, heads, plan)
        return attended, HeadMemoryState(scan, plan.keep(keys), plan.keep(gates), document)

    def _mix(
        self, x: Tensor, attended: Tensor, recalled: Tensor, mass: Tensor, heads: list[int], plan: WindowPlan
    ) -> Tensor:
        """Weigh the window by its modelled share of the attention mass, which is 1 while the memory is empty."""
        start = plan.first_write
        logits = pick(self.mixing_gate(x[:, start:]).to(mass.dtype), heads, 2)
        share = torch.sigmoid(logits + pick(self.window_mass, heads, 0).to(mass.dtype) * mass[:, start:])
        if plan.written is not None:
            share = share.where(plan.written[..., None], 1)
        mixed = torch.lerp(recalled, attended[:, start:], share[..., None].to(attended.dtype))
        return torch.cat((attended[:, :start], mixed), dim=1) if start else mixed

    def _read_and_write(
        self, plan: WindowPlan, q: Tensor, keys: Tensor, values: Tensor, gates: Tensor, heads: list[int], state: Any
    ) -> tuple[Tensor, Any]:
        """Step by step, write the token that leaves the window and answer the query."""
        start = plan.first_write
        q = self.q_map(q[:, :, start:], heads)
        k = self.k_map(self._repeat(plan.leaving(keys)), heads)
        alpha, eta, theta = plan.leaving(gates).unbind(-1)
        documents = None if plan.document_ids is None else plan.document_ids[:, start:]
        inputs = ScanInputs(q, k, self._repeat(plan.leaving(values)), alpha, eta, theta)
        return self._scan(inputs, heads, state, documents, plan.written)

    def _begin_documents(
        self, plan: WindowPlan, scan: Any, document: Int[Tensor, " batch"], q: Tensor, heads: list[int]
    ) -> tuple[Any, Int[Tensor, " batch"]]:
        """Empty the memories of rows whose first write is of another document than the last one.

        Returns the memories, and the document that each row will have written last.
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
        """Give each query head its KV head."""
        return x.repeat_interleave(self.groups, dim=1)


def pick(x: Tensor, wanted: Sequence[int], dim: int = 1) -> Tensor:
    """Take entries along an axis, in this order; a view where they are neighbours."""
    if list(wanted) == list(range(x.shape[dim])):
        return x
    if not wanted:
        return x.narrow(dim, 0, 0)
    starts = [n for n, index in enumerate(wanted) if not n or index != wanted[n - 1] + 1]
    runs = [x.narrow(dim, wanted[n], end - n) for n, end in pairwise([*starts, len(wanted)])]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=dim)
