"""Build hook: room stubs for editors, and for a wheel the catalogue's index, so that it need not parse at all."""

import json
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CatalogueHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = Path(self.root) / "src"
        sys.path.insert(0, str(source))
        from lossary import catalogue

        for path, text in catalogue.stubs().items():
            path.write_text(text, "utf-8")
            build_data["artifacts"].append(str(path.relative_to(self.root)))
        if version != "editable":
            index = Path(self.directory) / "_index.json"
            index.parent.mkdir(parents=True, exist_ok=True)
            index.write_text(json.dumps(catalogue.entries()), "utf-8")
            build_data["force_include"][str(index)] = "lossary/_index.json"
