"""YAML as people write it: keys in our order, commands of several lines as blocks."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from train.studies.job_files.job import Job


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Texts of several lines as blocks; no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def manifest(job: Job, scheduler: str, document: Mapping[str, Any]) -> str:
    """A document below a comment that says where it comes from."""
    grace = f"A stop takes {job.grace}." if job.grace else "How long a stop takes is not known: no speed is."
    comment = [
        f"{job.config.run.name}: {job.nodes} nodes of {job.gpus_per_node} ranks. Change the configuration, not this:",
        f"  python -m launch.cluster {scheduler} {shlex.join(job.arguments)}",
        grace,
    ]
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)
    return "".join(f"# {line}\n" for line in comment) + str(text)
