"""The literal record at the head of every paper's file."""

from dataclasses import dataclass

from lossary.vocabulary import SYMPTOMS


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What is published. All arguments are literals, so that the catalogue reads them without importing.

    Attributes:
        title: the paper's title as printed.
        year: of first publication.
        helps: symptoms, from `lossary.vocabulary.SYMPTOMS`, on which the paper claims to help.
        departs: every known way in which the code here departs from the paper, one phrase each.
        equation: the one formula that says what is new, in LaTeX, for the paper's page; a raw string.
        url: the paper's address; left empty rather than guessed.

    Raises:
        ValueError: a symptom outside the vocabulary.
    """

    title: str
    year: int
    helps: tuple[str, ...] = ()
    departs: tuple[str, ...] = ()
    equation: str = ""
    url: str = ""

    def __post_init__(self) -> None:
        for symptom in self.helps:
            if symptom not in SYMPTOMS:
                raise ValueError(f"helps: {symptom!r} is not a symptom; choose from {', '.join(SYMPTOMS)}")
