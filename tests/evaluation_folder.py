"""Evaluations on disk, as `depthmix evaluate` would leave them."""

import json

import numpy as np


def write_evaluation(
    folder, tasks, *, order=None, groups=None, shots=None, questions=None, **facts
):
    """Write scores, a dict of arrays by task, as `depthmix evaluate` would.

    Tasks of the same kind, before a plus in their names, ask the same items. A score that is None
    is left out, as that of an item without a verdict. Questions say by task what lm-eval keeps of
    each item's.
    """
    folder.mkdir(parents=True)
    metrics = {task: "acc,none" for task in tasks} | facts.pop("main_metric", {})
    about = {"method": folder.name, "model": "base", "protocol": "default", "layer": "ensemble"}
    about |= {"seed": 0, "main_metric": metrics} | facts
    results = {"results": {}, "group_subtasks": groups or {}, "depthmix": about}
    results |= {"n-shot": shots} if shots else {}
    (folder / "results.json").write_text(json.dumps(results))
    for task, scores in tasks.items():
        name = metrics[task].split(",")[0]
        lines = [
            json.dumps(
                {
                    "doc_id": item,
                    "doc": {"question": f"{task} {item}"},
                    "filter": filter_name,
                    "metrics": [name] if score is not None else [],
                    "doc_hash": f"{task.partition('+')[0]}-{item}",
                }
                | (questions[task][item] if questions else {})
                | ({} if score is None else {name: score if filter_name in metrics[task] else 1})
            )
            for filter_name in ("none", "flexible")
            for item, score in enumerate(np.asarray(scores, dtype=object).tolist())
        ]
        order_of = order or (lambda n: range(n))
        chosen = [lines[item] for item in order_of(len(lines))]
        (folder / f"samples_{task}.jsonl").write_text("\n".join(chosen) + "\n")
    return folder
