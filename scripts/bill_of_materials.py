"""What is installed, with versions and licences, as a CycloneDX document and as a table.

Command line::

    python -m scripts.bill_of_materials --output_dir sbom

The image runs this when it is built. The same packages give the same files, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any, NamedTuple

from scripts.runtime.output_folder import write_csv, write_text

ROOT = Path(__file__).resolve().parents[1]
_DPKG_STATUS = Path("/var/lib/dpkg/status")
_SHORT = 60


class Component(NamedTuple):
    """An installed package."""

    name: str
    version: str
    licence: str
    purl: str
    """Package URL, by which scanners know it."""


def bill_of_materials(output_dir: str) -> None:
    """Write ``sbom.cdx.json`` (CycloneDX 1.5) and ``licenses.csv`` of this Python and of Debian's packages below it.

    Args:
        output_dir: where the two files go; replaced if they are there.
    """
    found = sorted({*_python_packages(), *_debian_packages()})
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text(encoding="utf-8"))
    write_text(json.dumps(document(found, metadata), indent=1) + "\n", Path(output_dir) / "sbom.cdx.json")
    write_csv(Component._fields[:3], [component[:3] for component in found], Path(output_dir) / "licenses.csv")
    print(f"{len(found)} packages in {output_dir}")


def document(components: list[Component], metadata: dict[str, Any]) -> dict[str, Any]:
    """CycloneDX document of a bundle with these metadata on top of these packages."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "name": metadata["name"], "version": metadata["version"]},
        },
        "components": [
            {
                "type": "library",
                "bom-ref": component.purl,
                "name": component.name,
                "version": component.version,
                "purl": component.purl,
                **({"licenses": [{"license": {"name": component.licence}}]} if component.licence else {}),
            }
            for component in components
        ],
    }


def licence_of(package: Distribution) -> str:
    """A package's licence as its metadata have it, in one line: expression, short text or classifiers."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    text = (metadata.get("License") or "").strip()
    if text and "\n" not in text and len(text) <= _SHORT:
        return text
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    return "; ".join(classifiers) or text.partition("\n")[0][:_SHORT].strip()


def _python_packages() -> Iterator[Component]:
    for package in distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        purl = f"pkg:pypi/{name}@{package.version.replace('+', '%2B')}"
        yield Component(name, package.version, licence_of(package), purl)


def _debian_packages() -> Iterator[Component]:
    if not _DPKG_STATUS.is_file():
        return
    for paragraph in _DPKG_STATUS.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version|Architecture): (.+)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            quoted = version.replace("+", "%2B").replace(":", "%3A")
            licence = f"see /usr/share/doc/{name}/copyright"
            yield Component(name, version, licence, f"pkg:deb/debian/{name}@{quoted}?arch={fields['Architecture']}")


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(bill_of_materials)
