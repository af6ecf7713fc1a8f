"""The card of a run, where those look who cannot load it."""

from __future__ import annotations

from pathlib import Path

from depthmix.files.drafts import write_whole

PLACE = "Use the code below to get started with the model.\n\n[More Information Needed]"
"""What PEFT's card has where something is to be said."""

HOW = """\
The adapter holds a mixture of depths beside LoRA, which PEFT knows when depthmix is installed and
imported. `KeyError: 'MODE_LORA'` says that it is not:

```
pip install depthmix
```

```python
import depthmix
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("the folder of this file")
```

Other people's commands know it by `depthmix run`, for example `depthmix run -- lm_eval --model hf
--model_args pretrained=BASE,peft=FOLDER`. `depthmix export` writes it for those who have no
depthmix."""
"""What is said there."""


def explain_loading(folder: Path) -> None:
    """Say in the card of an adapter with a mixture how it is loaded.

    Args:
        folder: Of the adapter, as PEFT has written it.
    """
    path = folder / "README.md"
    if not path.is_file():  # a library's card may have gone
        return
    text = path.read_text("utf-8")
    if "MODE_LORA" in text:
        return
    found = PLACE in text
    text = text.replace(PLACE, HOW) if found else f"{text.rstrip()}\n\n## Loading\n\n{HOW}\n"
    write_whole(path, text)
