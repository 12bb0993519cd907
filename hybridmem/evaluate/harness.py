"""lm-eval tasks on a reader's model: lm-eval's own by name, and this package's, which need no download."""

import contextlib
import inspect
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cells import ANY_LENGTH, Cell
from .reader import Reader

OWN_TASKS = Path(__file__).with_name("lm_eval_tasks")
PREFIX, OWN_PREFIX = "lm_eval/", "hybridmem_"
ROOM = 1024  # tokens for an answer, and for what a chat template adds
WITHOUT_LENGTH = ("longbench",)
WORDED_LENGTH = ("babilong",)  # named by their length, such as 4k


def has_length(row: str) -> bool:
    """Return True if a task is measured at each length."""
    return not row.removeprefix(PREFIX).startswith(WITHOUT_LENGTH)


class HarnessTask:
    """A task or group of lm-eval at one length, with its data loaded.

    Args:
        name: name in lm-eval.
        length: length in tokens, or ANY_LENGTH.
        model: folder or name from which tasks load their tokenizer.
        num_samples: number of documents for each task.
        seed: seed of this package's own tasks.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task, or its data cannot be loaded.
    """

    def __init__(self, name: str, length: int, model: str, num_samples: int, seed: int):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(f"tasks={PREFIX}{name} needs lm-eval: pip install 'hybridmem[interop]'") from error
        self.name, self.num_samples = name, num_samples
        self.max_length = length + ROOM if length != ANY_LENGTH else None
        lengths: Any = f"{length >> 10}k" if name.startswith(WORDED_LENGTH) else [length]
        metadata = {"pretrained": model, "max_seq_lengths": lengths, "num_samples": num_samples, "seed": seed}
        with quiet("lm_eval"):
            found = folders(name, Path(inspect.getfile(TaskManager)).parent)
            paths = [str(folder) for folder in found]
            self.manager = TaskManager(include_path=paths, include_defaults=not found, metadata=metadata)
            if name not in self.manager.all_tasks:
                raise ValueError(f"tasks: lm-eval has no task {name!r}; see lm_eval --tasks list")
            try:
                self.tasks = self.manager.load_task_or_group(name)
            except Exception as error:  # of any library that loads data
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"tasks={PREFIX}{name}: its data cannot be loaded ({reason}); lm-eval's own tasks need a Hugging "
                    "Face hub, but tasks such as hybridmem_ruler do not"
                ) from error

    def measure(self, reader: Reader) -> Cell:
        """Evaluate; the score is the first metric, averaged over the tasks of a group without metrics of its own."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with quiet("lm_eval"):
            model = HFLM(pretrained=reader.model, tokenizer=reader.tokenizer, batch_size=1, max_length=self.max_length)
            started = time.perf_counter()
            found = simple_evaluate(
                model,
                tasks=[self.name],
                task_manager=self.manager,
                limit=self.num_samples,
                bootstrap_iters=0,
                apply_chat_template=reader.chat,
                log_samples=False,
            )
        assert found is not None
        seconds = time.perf_counter() - started
        results = {task: _metrics(values) for task, values in found["results"].items()}
        first = [next(iter(values.values())) for values in results.values() if values]
        whole = results.get(self.name)
        score = next(iter(whole.values())) if whole else sum(first) / len(first)
        return {"score": score, "seconds": seconds / self.num_samples, "results": results}


def folders(name: str, shipped: Path) -> list[Path]:
    """Return the folders that may contain a task; an empty list means all of lm-eval's, which are slow to read.

    Args:
        name: name of the task.
        shipped: lm-eval's folder of tasks.
    """
    if name.startswith(OWN_PREFIX):
        return [OWN_TASKS]
    return [folder for folder in sorted(shipped.iterdir()) if folder.is_dir() and name.startswith(folder.name)]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return a task's metrics without standard errors, and without unmeasured lengths of RULER."""
    return {
        name.removesuffix(",none"): value
        for name, value in values.items()
        if isinstance(value, float) and "_stderr" not in name and value != -1
    }


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Context in which a library logs only errors."""
    own = logging.getLogger(logger)
    level = own.level
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.setLevel(level)
