"""Actions: an objective's choices for every response, apart from its tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

Part = Literal["prompt", "response"]  # of a sequence that a model reads


@runtime_checkable
class Action(Protocol):
    """A choice for every response, such as noise on its attention or the heads that read beyond a window."""

    @property
    def prefill_once(self) -> bool:
        """Return True if a group's responses can share one prefill of their prompt."""
        ...

    @property
    def in_passes(self) -> bool:
        """Return True if the passes that score responses also run with this action."""
        ...

    def applied(self, model: Any, part: Part = "response") -> AbstractContextManager[None]:
        """Return a context in which the model reads with the choice, one row a response.

        Prompts that are read once for all responses have one row a prompt.
        """
        ...

    def cut(self, time: int) -> "Action":
        """Return the action on the first `time` tokens."""
        ...

    def select(self, rows: Int[Tensor, " rows"]) -> "Action":
        """Return the action on the selected responses."""
        ...


class SharedAction(ABC):
    """Action that all responses share, prompts included, such as a rule of the policy."""

    @property
    def prefill_once(self) -> bool:
        """Return False, because prompts are read with the action."""
        return False

    @property
    def in_passes(self) -> bool:
        """Return True, because the action belongs to the policy."""
        return True

    @abstractmethod
    def applied(self, model: Any, part: Part = "response") -> AbstractContextManager[None]:
        """Return a context in which the model reads with the action."""

    def cut(self, time: int) -> "SharedAction":
        """Return the action, which holds for all tokens."""
        return self

    def select(self, rows: Int[Tensor, " rows"]) -> "SharedAction":
        """Return the action, which holds for all responses."""
        return self


@contextmanager
def reading(actions: Sequence[Action], model: Any, part: Part) -> Iterator[None]:
    """Run a model with several actions."""
    with ExitStack() as stack:
        for action in actions:
            stack.enter_context(action.applied(model, part))
        yield


def prefilled_once(actions: Sequence[Action]) -> bool:
    """Return True if the responses to a prompt can share one prefill."""
    return all(action.prefill_once for action in actions)
