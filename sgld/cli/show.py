"""`--print-config`: the merged configuration as YAML that `--config` takes back."""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from sgld.cli.sources import Layer
from sgld.convert import Values, default_of, fields_of, knob_of, unstructure
from sgld.settings import SECTION_CLASSES, Settings


def merged(layer: Layer, settings: Settings, sections: Iterable[type]) -> str:
    """Write every knob as YAML. Null is the model's own default. A secret is only said to be set."""
    whole: Values = {}
    secrets = []
    for cls in sections:
        for name, field in fields_of(cls).items():
            meta = knob_of(field)
            if meta.secret:
                secrets += [name] if layer.values.get(name) else []
            elif cls in SECTION_CLASSES.values():
                whole[name] = unstructure(settings.get(name))
            else:
                whole[name] = layer.values.get(name, None if meta.per_model else unstructure(default_of(field)))
    notes = "".join(f"# {name} is set, and not shown\n" for name in secrets)
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True) + notes
