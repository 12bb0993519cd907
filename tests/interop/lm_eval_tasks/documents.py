"""Documents of the local tasks, each a repeated line."""

import random

from datasets import Dataset


def documents(**_) -> dict[str, Dataset]:
    draw = random.Random(0)
    rows = []
    for _ in range(2):
        choices = ["".join(draw.choices("0123456789", k=3)) for _ in range(3)]
        label = draw.randrange(3)
        rows.append(dict(context=f"key={choices[label]}; " * 3 + "key=", choices=choices, label=label))
    return {"test": Dataset.from_list(rows)}
