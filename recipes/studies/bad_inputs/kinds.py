"""The kinds of bad input by name, each a function from a context to a case."""

from kind_adapters import adapters, attributes
from kind_data import rows, yaml
from kind_models import models
from kind_options import options
from kind_paths import files
from kind_stored import merges, runs, scorers, stores
from kind_surroundings import surroundings
from kind_text import hostile

KINDS = {
    "rows": rows,
    "yaml": yaml,
    "adapters": adapters,
    "attributes": attributes,
    "models": models,
    "runs": runs,
    "merges": merges,
    "stores": stores,
    "scorers": scorers,
    "files": files,
    "hostile": hostile,
    "options": options,
    "surroundings": surroundings,
}
