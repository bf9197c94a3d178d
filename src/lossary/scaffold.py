"""The three files that a new paper begins with. They pass lint, and fail their tests until they are written."""

import re
from pathlib import Path

from lossary import catalogue
from lossary.audit import REFERENCES
from lossary.catalogue import PACKAGE
from lossary.errors import BadInput

PART = '''"""One sentence: what the idea changes.

When it helps, and when it does not.
"""

from jaxtyping import Float, Int
from torch import Tensor

from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="{title}",
    year={year},
    helps=(),
    departs=(),
)


@loss(on="classes")
def {name}(input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """What it is, with its equation's number. Per sample; unit.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    raise NotImplementedError
'''

CLAIM = '''"""{title}: the headline as a question."""

from lossary.claims import Arms, Seeds, claim


@claim(
    says="The paper's headline, in a sentence",
    kind="superiority",
    metric="accuracy",
    scale="data, model, steps; settings tried for each arm",
)
def {name}_beats_the_baseline(seeds: Seeds) -> Arms:
    raise NotImplementedError
'''

REFERENCE = '''"""{title} against an independent number: a closed form, a limit, a slow re-derivation or a peer."""

from lossary.{room} import {name}


def test_{name}_equals_an_independent_number():
    assert {name} is None, "write down the number, and where it comes from"
'''

ROOM = '''"""{Room}: what this room is about.

The engine, in a few lines, and a table from symptom to part.
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
'''


def write(room: str, paper_id: str, package: Path = PACKAGE, references: Path = REFERENCES) -> list[Path]:
    """Write the stubs and return their paths.

    Raises:
        BadInput: an unknown room, an id that is not lower-case words joined by hyphens, or a file in the way.
    """
    if room not in catalogue.ROOMS:
        raise BadInput(f"room: expected one of {', '.join(catalogue.ROOMS)}, got {room!r}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", paper_id):
        raise BadInput(f"id: expected lower-case words joined by hyphens, such as soft-nms, got {paper_id!r}")
    stem = paper_id.replace("-", "_")
    # The stub's part is called like the paper, so the file takes the underscore that tells them apart.
    facts = {"room": room, "Room": room.capitalize(), "name": stem, "title": f"Title of {paper_id}", "year": 2026}
    texts = {
        package / room / f"{stem}_.py": PART,
        package / "claims" / room / f"{stem}.py": CLAIM,
        references / room / f"test_{stem}.py": REFERENCE,
    }
    taken = [path for path in [*texts, package / room / f"{stem}.py"] if path.exists()]
    if taken:
        raise BadInput(f"{taken[0]}: already exists; choose another id or edit that file")
    if not (package / room / "__init__.py").exists():
        texts[package / room / "__init__.py"] = ROOM
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(**facts), "utf-8")
    return list(texts)
